"""The order of rows: which source, which row, which crop."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import ConfigError
from manifests.snapshots.snapshot import Snapshot, SnapshotPart, SnapshotShard
from manifests.store.storage import open_storage
from train.data.mixture import WINDOW_PARTS, WINDOW_SLOTS, Mixture, MixtureEntry, Picks, RowOrder, join


def frozen(
    parts: dict[tuple[str, int], int],
    *,
    crops: int | dict[tuple[str, int], int] = 1,
    modalities: tuple[str, ...] = ("rgb",),
    selected: float = 1.0,
    held_out: float = 0.0,
) -> Snapshot:
    """A snapshot of parts with so many rows; shares of them are selected, and of these held out."""
    made, shards = [], []
    for (corpus, part), rows in sorted(parts.items()):
        draws = np.random.default_rng(part + 1000 * len(corpus)).random((2, rows))
        chosen = draws[0] < selected
        held = chosen & (draws[1] < held_out)
        made.append(
            SnapshotPart(
                corpus=corpus,
                corpus_kind="image",
                part=part,
                rows=rows,
                keys_sha256="0" * 64,
                selected=chosen,
                held_out=held,
            )
        )
        count = crops if isinstance(crops, int) else crops[corpus, part]
        for modality in modalities:
            for crop in range(count):
                facts = {"fingerprint": "f", "path": "p", "sha256": "s", "size_bytes": 1, "format": "parquet"}
                shards.append(SnapshotShard(corpus=corpus, part=part, modality=modality, crop=crop, **facts))
    return Snapshot(
        storage=open_storage("nowhere"),
        name="-".join(modalities),
        sha256="-".join(modalities),
        where=None,
        modalities=(),
        parts=tuple(made),
        shards=tuple(shards),
    )


def order_of(snapshot: Snapshot, *, seed: int = 0, held_out: bool = False, corpora: tuple[str, ...] | None = None):
    return RowOrder(MixtureEntry(snapshot=snapshot, corpora=corpora), 0, seed=seed, held_out=held_out)


def identities(picks: Picks) -> list[tuple[int, int]]:
    return list(zip(picks.places.tolist(), picks.rows.tolist(), strict=True))


# -- sources ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.lists(st.floats(1e-6, 1e6, exclude_min=False), min_size=1, max_size=12),
    st.integers(0, 1 << 40),
    st.integers(0, 100),
)
def test_every_window_has_the_same_number_of_each_source(weights: list[float], first_window: int, seed: int) -> None:
    mixture = Mixture(weights, seed=seed)
    exact = np.array(weights) / math.fsum(weights) * WINDOW_SLOTS
    assert mixture.counts.sum() == WINDOW_SLOTS
    assert mixture.counts.min() >= 1
    large = exact >= 1
    assert (np.abs(mixture.counts - exact)[large] < 1 + np.count_nonzero(~large)).all()
    slots = np.arange(2 * WINDOW_SLOTS) + first_window * WINDOW_SLOTS
    sources, draws = mixture.draws(slots)
    for source, count in enumerate(mixture.counts.tolist()):
        # Each draw of a source comes once, in the order of the slots, and none is left out between windows.
        own = draws[sources == source]
        np.testing.assert_array_equal(own, np.arange(2 * count) + first_window * count)
    assert (sources[:WINDOW_SLOTS] != sources[WINDOW_SLOTS:]).any() or len(weights) == 1


def test_shares_go_by_the_largest_remainder() -> None:
    assert Mixture([1, 1, 1], seed=0).counts.tolist() == [1366, 1365, 1365]
    assert Mixture([3, 1], seed=0).counts.tolist() == [3072, 1024]
    assert Mixture([1e9, 1e9, 1e-9, 1e-9], seed=0).counts.tolist() == [2047, 2047, 1, 1]
    assert Mixture([1.0] * WINDOW_SLOTS, seed=0).counts.tolist() == [1] * WINDOW_SLOTS


def test_slots_are_found_one_by_one_in_any_order() -> None:
    mixture = Mixture([2.0, 1.0], seed=3)
    sources, draws = mixture.draws(np.arange(3 * WINDOW_SLOTS))
    some = np.random.default_rng(0).permutation(3 * WINDOW_SLOTS)[:200]
    again = mixture.draws(some)
    np.testing.assert_array_equal(again[0], sources[some])
    np.testing.assert_array_equal(again[1], draws[some])
    other = Mixture([2.0, 1.0], seed=4).draws(np.arange(WINDOW_SLOTS))[0]
    assert (other != sources[:WINDOW_SLOTS]).any()


@pytest.mark.parametrize("weight", [0, -1.0, math.inf, math.nan, "1", None])
def test_a_weight_that_is_no_positive_number_is_refused(weight) -> None:
    with pytest.raises(ConfigError, match="expected a number over 0"):
        Mixture([1.0, weight], seed=0)


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 sources"):
        Mixture([], seed=0)


# -- rows -------------------------------------------------------------------------------------------------------------

PARTS = {("photos", part): 3 + part % 5 for part in range(150)} | {("scenes", part): 4 for part in range(20)}


@pytest.mark.parametrize("held_out", [False, True])
def test_an_epoch_has_every_row_once_and_no_other(held_out: bool) -> None:
    snapshot = frozen(PARTS, selected=0.8, held_out=0.2)
    order = order_of(snapshot, held_out=held_out)
    expected = {
        (place, row)
        for place, part in enumerate(snapshot.parts)
        for row in np.flatnonzero(part.selected & (part.held_out == held_out)).tolist()
    }
    assert order.rows == len(expected) > 50
    for epoch in range(3):
        picks = order.picks(np.arange(order.rows) + epoch * order.rows)
        assert Counter(identities(picks)) == dict.fromkeys(expected, 1)
        assert set(picks.epochs.tolist()) == {epoch}


def test_epochs_and_seeds_have_other_orders() -> None:
    snapshot = frozen(PARTS)
    order = order_of(snapshot)
    first = identities(order.picks(np.arange(order.rows)))
    assert identities(order.picks(np.arange(order.rows) + order.rows)) != first
    assert identities(order_of(snapshot, seed=1).picks(np.arange(order.rows))) != first
    assert identities(order_of(snapshot).picks(np.arange(order.rows))) == first


def test_rows_come_from_few_parts_at_a_time_and_are_mixed_among_them() -> None:
    order = order_of(frozen({("photos", part): 10 for part in range(4 * WINDOW_PARTS)}))
    picks = order.picks(np.arange(order.rows))
    windows = [set(picks.places[start : start + 640].tolist()) for start in range(0, order.rows, 640)]
    assert [len(window) for window in windows] == [WINDOW_PARTS] * 4
    assert len(set().union(*windows)) == 4 * WINDOW_PARTS
    assert len(set(picks.places[:64].tolist())) > 30


def test_any_draw_is_found_by_itself() -> None:
    order = order_of(frozen(PARTS, crops=3))
    all_of_it = order.picks(np.arange(3 * order.rows))
    some = np.random.default_rng(0).permutation(3 * order.rows)[:300]
    picks, expected = order_of(frozen(PARTS, crops=3)).picks(some), all_of_it.take(some)
    for name in ("places", "rows", "crops", "epochs", "keys"):
        np.testing.assert_array_equal(getattr(picks, name), getattr(expected, name))


def test_far_draws_are_as_quick_as_near_ones() -> None:
    order = order_of(frozen(PARTS))
    picks = order.picks(np.arange(4) + order.rows * 10**12)
    assert picks.epochs.tolist() == [10**12] * 4


def test_the_order_is_that_of_the_rows_whatever_their_modalities() -> None:
    one, other = frozen(PARTS, modalities=("rgb",), crops=2), frozen(PARTS, modalities=("depth", "rgb"), crops=2)
    draws = np.arange(1500)
    first, second = order_of(one).picks(draws), order_of(other).picks(draws)
    assert identities(first) == identities(second)
    np.testing.assert_array_equal(first.crops, second.crops)
    np.testing.assert_array_equal(first.keys, second.keys)


def test_parts_without_rows_change_nothing() -> None:
    more = {**PARTS, **{("photos", part): 0 for part in range(150, 190)}}
    picks, with_more = order_of(frozen(PARTS)).picks(np.arange(500)), order_of(frozen(more)).picks(np.arange(500))
    np.testing.assert_array_equal(picks.keys, with_more.keys)


def test_keys_belong_to_a_row_and_an_epoch() -> None:
    order = order_of(frozen(PARTS))
    picks = order.picks(np.arange(3 * order.rows))
    assert len(np.unique(picks.keys)) == 3 * order.rows
    # Masks are drawn with them, so they must not tell the place in the order.
    assert abs(np.corrcoef(picks.keys[: order.rows].astype(float), np.arange(order.rows))[0, 1]) < 0.1


def test_corpora_can_be_chosen() -> None:
    snapshot = frozen(PARTS)
    order = order_of(snapshot, corpora=("scenes",))
    assert order.rows == 80
    picks = order.picks(np.arange(80))
    assert {snapshot.parts[place].corpus for place in picks.places.tolist()} == {"scenes"}
    with pytest.raises(ConfigError, match="did you mean 'scenes'"):
        order_of(snapshot, corpora=("scene",))


# -- crops ------------------------------------------------------------------------------------------------------------


def test_a_row_has_each_crop_in_turn_from_a_start_of_its_own() -> None:
    crops = {place: 1 + place[1] % 3 for place in PARTS}
    snapshot = frozen(PARTS, crops=crops)
    order = order_of(snapshot)
    seen: dict[tuple[int, int], list[int]] = {}
    for epoch in range(6):
        picks = order.picks(np.arange(order.rows) + epoch * order.rows)
        for identity, crop in zip(identities(picks), picks.crops.tolist(), strict=True):
            seen.setdefault(identity, []).append(crop)
    starts = Counter()
    for (place, _), found in seen.items():
        count = crops[snapshot.parts[place].corpus, snapshot.parts[place].part]
        assert found == [(found[0] + epoch) % count for epoch in range(6)]
        starts[count, found[0]] += 1
    assert all(starts[3, crop] > 40 for crop in range(3))


def test_rows_without_crops_have_crop_0() -> None:
    assert set(order_of(frozen(PARTS, crops=0)).picks(np.arange(100)).crops.tolist()) == {0}


def test_the_first_rows_have_the_first_crop() -> None:
    order = order_of(frozen(PARTS, crops=3))
    assert identities(order.first_picks(50)) == identities(order.picks(np.arange(50)))
    assert set(order.first_picks(50).crops.tolist()) == {0}
    assert len(order.first_picks(10**9).rows) == order.rows


def test_no_rows_give_no_picks() -> None:
    order = order_of(frozen(PARTS), held_out=True)
    assert order.rows == 0
    assert len(join([order.first_picks(5), order.picks(np.arange(0))]).rows) == 0
