"""Masks: golden cases of sequences, and what holds for every batch."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import ConfigError
from train.data.batch import Batch, Column, MaskedBatch
from train.data.hashing import combine
from train.data.mask import Masking, Strategy, budgets, mask_batch, mask_sequence
from train.data.vocabulary import TokenModality, Vocabulary

FIRST_SENTINEL, END = 4, 3
RECORD, VALUE = 50, 20


def sequence(name: str, offset: int = 0, *, records: bool = False, tokens: int = 64) -> TokenModality:
    return TokenModality(
        name=name,
        sequence=True,
        vocabulary=100,
        tokens=tokens,
        offset=offset,
        tokenizer="text",
        digest="text",
        path="tokenizers/text",
        first_sentinel=FIRST_SENTINEL,
        sentinels=16,
        end=END,
        record_start=(RECORD, RECORD + 10) if records else None,
    )


def grid(name: str, offset: int, tokens: int = 16) -> TokenModality:
    return TokenModality(
        name=name, sequence=False, vocabulary=32, tokens=tokens, offset=offset, tokenizer=name, digest=name, path=name
    )


VOCABULARY = Vocabulary(
    modalities=(sequence("caption"), grid("depth", 100), sequence("metadata", records=True), grid("rgb", 132)), size=164
)
NAMES = [modality.name for modality in VOCABULARY.modalities]


def ragged(rows: Sequence[Sequence[int]]) -> Column:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Column(values=np.array([token for row in rows for token in row], dtype=np.uint16), offsets=offsets)


def batch_of(columns: dict[str, Column], seed: int = 0) -> Batch:
    count = len(next(iter(columns.values())).offsets) - 1
    zeros = np.zeros(count, dtype=np.int64)
    return Batch(
        slots=np.arange(count),
        sources=zeros,
        corpora=("photos",),
        corpus=zeros,
        parts=zeros,
        rows=np.arange(count),
        crops=zeros,
        epochs=zeros,
        keys=combine(np.arange(count), seed),
        columns=columns,
    )


def random_batch(count: int, seed: int) -> Batch:
    """Rows that have each modality three times of four, with tokens that no sentinel is among."""
    rng = np.random.default_rng(seed)
    columns = {}
    for modality in VOCABULARY.modalities:
        rows = []
        for _ in range(count):
            if rng.random() < 0.25:
                rows.append([])
            elif not modality.sequence:
                rows.append(rng.integers(0, modality.vocabulary, modality.tokens).tolist())
            elif modality.record_start:
                fields = range(rng.integers(1, 8))
                rows.append([*(token for field in fields for token in (RECORD + field, VALUE + field)), END])
            else:
                rows.append([*rng.integers(60, 100, rng.integers(0, 40)).tolist(), END])
        columns[modality.name] = ragged(rows)
    return batch_of(columns, seed)


def side(masked: MaskedBatch, name: str, sample: int, *, inputs: bool) -> list[tuple[int, int]]:
    """(position, id in the modality) of a modality's inputs or targets in a sample."""
    index = NAMES.index(name)
    if inputs:
        chosen = (masked.input_modality == index) & (masked.input_sample == sample)
        ids = masked.input_ids[chosen] - VOCABULARY.modalities[index].offset
        return list(zip(masked.input_position[chosen].tolist(), ids.tolist(), strict=True))
    chosen = (masked.target_modality == index) & (masked.target_sample == sample)
    return list(zip(masked.target_position[chosen].tolist(), masked.target_ids[chosen].tolist(), strict=True))


def spans(tokens: list[int], kept: list[bool], budget: int = 99, asked: int = 99, *, seed: int = 0) -> tuple:
    """The input and target of one sequence whose tokens are kept as a test says: a key is searched that draws that."""
    column = ragged([tokens])
    modality = sequence("caption")
    for key in range(200_000):
        keys = np.array([key + seed * 1_000_003])
        given, wanted = mask_sequence(column, keys, np.array([budget]), np.array([asked]), np.array([0.5]), modality)
        shown = [token for token in given[2].tolist() if token >= 60 or token == END]
        if shown == [token for token, keep in zip(tokens, kept, strict=True) if keep]:
            return given[2].tolist(), wanted[2].tolist(), wanted[3].tolist()
    raise AssertionError("no key draws this mask")


S = [FIRST_SENTINEL + number for number in range(8)]


def test_runs_of_dropped_tokens_become_sentinels() -> None:
    tokens = [60, 61, 62, 63, 64, END]
    given_, wanted, previous = spans(tokens, [True, False, False, True, False, False])
    assert given_ == [60, S[1], 63, S[2]]
    # [S_1] 61 62 [S_2] 64 [EOS] [S_3], of which the first is given to the decoder and all others are asked for.
    assert wanted == [61, 62, S[2], 64, END, S[3]]
    assert previous == [S[1], 61, 62, S[2], 64, END]


def test_a_sequence_without_an_input_budget_is_asked_for_whole() -> None:
    given_, wanted = mask_sequence(
        ragged([[60, 61, END]]), np.array([5]), np.array([0]), np.array([99]), np.array([1.0]), sequence("caption")
    )
    assert given_.shape[1] == 0
    assert wanted[2].tolist() == [60, 61, END, S[2]]
    assert wanted[3].tolist() == [S[1], 60, 61, END]
    assert wanted[1].tolist() == [0, 1, 2, 3]


def test_a_kept_sequence_asks_for_nothing() -> None:
    given_, wanted = mask_sequence(
        ragged([[60, 61, END]]), np.array([5]), np.array([3]), np.array([99]), np.array([1.0]), sequence("caption")
    )
    assert given_[2].tolist() == [60, 61, END]
    assert wanted.shape[1] == 0


def test_a_target_over_its_budget_begins_at_a_sentinel_that_is_not_the_last() -> None:
    tokens = [60, 61, 62, 63, 64, END]
    kept = [False, True, False, True, False, True]
    starts = set()
    for seed in range(12):
        _, wanted, previous = spans(tokens, kept, asked=2, seed=seed)
        assert len(wanted) <= 2
        starts.add(previous[0])
    assert starts == {S[1], S[2], S[3]}


def filled(whole: list[int], start: int, budget: int) -> list[int]:
    """What ml-4m asks for of a laid out target (masking.py, `sequence_mask`), but that its first sentinel costs nothing."""
    if len(whole) - 1 <= budget:
        return whole[1:]
    if len(whole) - 1 - start >= budget:
        return whole[start + 1 : start + 1 + budget]
    sentinels = [place for place, token in enumerate(whole) if token < FIRST_SENTINEL + 16 and token != END]
    return next(whole[place + 1 :] for place in sentinels if len(whole) - 1 - place <= budget)


@given(key=st.integers(0, 10**9), length=st.integers(1, 30), budget=st.integers(1, 30), keep=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_a_target_over_its_budget_is_filled_as_4m_fills_it(key: int, length: int, budget: int, keep: float) -> None:
    given_ = ragged([[*range(60, 60 + length), END]]), np.array([key]), np.array([99])

    def asked(most: int, overlong: Any) -> tuple[list[int], list[int]]:
        _, wanted = mask_sequence(*given_, np.array([most]), np.array([keep]), sequence("caption"), overlong)
        assert wanted[1].tolist() == list(range(wanted.shape[1]))
        return wanted[2].tolist(), wanted[3].tolist()

    rest, before = asked(99, "random")
    whole = [*before[:1], *rest]
    _, cut = asked(budget, "random")
    start = whole.index(cut[0]) if cut else 0
    assert asked(budget, "fill")[0] == (filled(whole, start, budget) if whole else [])
    assert asked(budget, None) == asked(budget, "fill")


def test_a_run_that_began_before_draws_what_it_drew() -> None:
    masking = Masking(
        inputs=(4, 30), targets=(4, 30), strategies=(Strategy(), Strategy(keep="binary")), overlong="random"
    )
    masked = mask_batch(random_batch(200, 5), VOCABULARY, masking)
    drawn = [masked.input_ids, masked.input_position, masked.target_ids, masked.target_position, masked.previous_ids]
    assert (
        sha256(b"".join(tensor.numpy().tobytes() for tensor in drawn)).hexdigest()
        == "d28d14807b83a251b9e6392c308dc6399522bbb0aecaf659126ac13ce708b401"
    )


def test_long_targets_use_their_budget_unless_a_run_began_without_that() -> None:
    rows = 400
    column = ragged([[*[60] * 199, END]] * rows)
    budget = np.full(rows, 100)
    keep = np.random.default_rng(0).random(rows)
    counts = {}
    for rule in ("fill", "random"):
        modality = replace(sequence("caption"), sentinels=200)
        _, wanted = mask_sequence(column, combine(np.arange(rows), 1), budget, budget, keep, modality, rule)
        counts[rule] = wanted.shape[1] / rows
    assert counts["fill"] > 95
    assert counts["random"] < 80


def test_sequences_are_kept_by_modality_and_strategy_as_4m_21_keeps_them() -> None:
    """Of cfgs/default/4m/alphas_mixture/main/mix_mod21_all2allmix_rgb2all_capT5bias.yaml the two schemes of its kinds."""
    masking = Masking(
        strategies=(Strategy(keep={"metadata": "binary"}), Strategy(keep={"caption": "all", "metadata": "binary"}))
    )
    masking.check(VOCABULARY)
    lengths = np.full((500, 4), 16)
    drawn = budgets(combine(np.arange(500), 3), lengths, VOCABULARY, masking).keep
    caption, metadata = drawn[:, NAMES.index("caption")], drawn[:, NAMES.index("metadata")]
    assert set(metadata) == {0.0, 1.0}
    assert 0.4 < (caption == 1).mean() < 0.6
    assert len(np.unique(caption)) > 200
    one = Masking(strategies=(Strategy(keep="binary"),))
    each = Masking(strategies=(Strategy(keep={"*": "binary"}),))
    same = [budgets(combine(np.arange(9), 1), lengths[:9], VOCABULARY, which).keep for which in (one, each)]
    assert (same[0] == same[1]).all()


def test_records_are_kept_or_dropped_whole() -> None:
    row = [RECORD, VALUE, RECORD + 1, VALUE + 1, RECORD + 2, VALUE + 2, END]
    modality = sequence("metadata", records=True)
    seen = set()
    for key in range(200):
        given_, _ = mask_sequence(
            ragged([row]), np.array([key]), np.array([99]), np.array([99]), np.array([0.5]), modality
        )
        kept = tuple(token for token in given_[2].tolist() if token >= VALUE)
        for token in kept:
            partner = token - 30 if token >= RECORD else token + 30
            assert partner in kept
        seen.add(kept)
    assert len(seen) == 8


def test_the_kept_share_shrinks_until_the_input_fits() -> None:
    row = [*range(60, 95), END]
    for key in range(50):
        given_, _ = mask_sequence(
            ragged([row]), np.array([key]), np.array([6]), np.array([99]), np.array([1.0]), sequence("caption")
        )
        assert 1 <= given_.shape[1] <= 6


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), most=st.integers(1, 60), alpha=st.sampled_from([0.0, 0.01, 0.5, 10.0]))
def test_no_position_is_given_and_asked_for_and_budgets_are_kept(seed: int, most: int, alpha: float) -> None:
    batch = random_batch(6, seed)
    masking = Masking(
        inputs=(1, most), targets=(1, most), strategies=(Strategy(inputs={"*": alpha}, targets={"*": alpha}),)
    )
    masked = mask_batch(batch, VOCABULARY, masking)
    for sample in range(6):
        assert int((masked.input_sample == sample).sum()) <= most
        assert int((masked.target_sample == sample).sum()) <= most
        for index, modality in enumerate(VOCABULARY.modalities):
            column = batch.columns[modality.name]
            row = column.values[column.offsets[sample] : column.offsets[sample + 1]].tolist()
            shown, asked = (side(masked, modality.name, sample, inputs=which) for which in (True, False))
            if not row:
                assert not shown
                assert not asked
            elif modality.sequence:
                check_spans(row, [token for _, token in shown], [token for _, token in asked], modality)
            else:
                places = [place for place, _ in shown + asked]
                assert len(set(places)) == len(places)
                assert all(row[place] == token for place, token in shown + asked)
                assert int((masked.previous_ids[masked.target_modality == index] >= 0).sum()) == 0


def check_spans(row: list[int], shown: list[int], asked: list[int], modality: TokenModality) -> None:
    """Sentinels are in order on both sides; what is given, with what is asked for in its place, is the row again."""

    def is_sentinel(token: int) -> bool:
        return FIRST_SENTINEL <= token < FIRST_SENTINEL + modality.sentinels

    for side_ in (shown, asked):
        marks = [token for token in side_ if is_sentinel(token)]
        assert marks == list(range(marks[0], marks[0] + len(marks))) if marks else True
    kept = [token for token in shown if not is_sentinel(token)]
    dropped = [token for token in asked if not is_sentinel(token)]
    assert len(kept) + len(dropped) <= len(row)
    if shown and asked:
        rest = iter(row)
        assert all(token in rest for token in kept), "what is given is not in the row's order"


def test_sequences_can_be_put_together_again() -> None:
    batch = random_batch(40, 3)
    masking = Masking(inputs=(99, 99), targets=(99, 99), strategies=(Strategy(inputs={"*": 9.0}, targets={"*": 9.0}),))
    masked = mask_batch(batch, VOCABULARY, masking)
    restored = 0
    for sample in range(40):
        column = batch.columns["caption"]
        row = column.values[column.offsets[sample] : column.offsets[sample + 1]].tolist()
        shown = [token for _, token in side(masked, "caption", sample, inputs=True)]
        asked = [token for _, token in side(masked, "caption", sample, inputs=False)]
        marks = [number for number, token in enumerate(asked) if FIRST_SENTINEL <= token < 20]
        if not asked or len(marks) != len([token for token in shown if 4 <= token < 20]):
            continue
        pieces = np.split(np.array(asked), np.array(marks) + 1)
        built: list[int] = []
        for token in shown:
            if FIRST_SENTINEL <= token < 20:
                piece = pieces[token - FIRST_SENTINEL - 1].tolist()
                built += piece[:-1]
            else:
                built.append(token)
        assert built == row
        restored += 1
    assert restored > 10


def test_a_row_has_the_same_mask_in_any_batch() -> None:
    batch = random_batch(9, 1)
    masking = Masking(inputs=(4, 30), targets=(4, 30), strategies=(Strategy(), Strategy(keep="binary")))
    whole = mask_batch(batch, VOCABULARY, masking)
    for sample in range(9):
        columns = {
            name: ragged([column.values[column.offsets[sample] : column.offsets[sample + 1]].tolist()])
            for name, column in batch.columns.items()
        }
        alone = batch_of(columns)
        alone = mask_batch(Batch(**{**alone.__dict__, "keys": batch.keys[sample : sample + 1]}), VOCABULARY, masking)
        for name in NAMES:
            for inputs in (True, False):
                assert side(alone, name, 0, inputs=inputs) == side(whole, name, sample, inputs=inputs)


def test_a_tiny_alpha_gives_one_modality_nearly_all_and_a_large_one_divides_evenly() -> None:
    lengths = np.full((2000, 4), 1000)
    keys = combine(np.arange(2000), 1)

    def shares(alpha: float) -> np.ndarray:
        masking = Masking(inputs=(100, 100), targets=(100, 100), strategies=(Strategy(inputs={"*": alpha}),))
        return budgets(keys, lengths, VOCABULARY, masking).inputs

    assert (shares(0.01).max(axis=1) >= 95).mean() > 0.9
    even = shares(1000.0)
    assert (even.sum(axis=1) == 100).all()
    assert even.min() >= 18
    # A Dirichlet draw with alpha 1 over four is uniform on the simplex: mean 1/4, variance 3/80.
    ones = shares(1.0) / 100
    assert np.allclose(ones.mean(axis=0), 0.25, atol=0.02)
    assert np.allclose(ones.var(axis=0), 3 / 80, atol=0.006)


def test_absent_modalities_take_no_budget() -> None:
    lengths = np.array([[10, 0, 0, 0], [0, 0, 0, 16], [0, 0, 0, 0]])
    masking = Masking(inputs=(8, 8), targets=(8, 8))
    drawn = budgets(combine(np.arange(3), 1), lengths, VOCABULARY, masking)
    assert drawn.inputs.tolist() == [[8, 0, 0, 0], [0, 0, 0, 8], [0, 0, 0, 0]]
    assert drawn.targets.tolist() == [[8, 0, 0, 0], [0, 0, 0, 8], [0, 0, 0, 0]]


def test_alphas_of_an_unknown_modality_are_refused() -> None:
    masking = Masking(strategies=(Strategy(inputs={"dept": 1.0}),))
    with pytest.raises(ConfigError, match=r"masking.strategies\[0\].inputs: .*did you mean 'depth'"):
        masking.check(VOCABULARY)
    with pytest.raises(ConfigError, match=r"masking.strategies\[0\].keep: .*did you mean 'caption'"):
        Masking(strategies=(Strategy(keep={"captoin": "all"}),)).check(VOCABULARY)
    with pytest.raises(
        ConfigError, match=r"strategies\[0\].keep: 'rgb' has no sequence.*expected \*, caption, metadata"
    ):
        Masking(strategies=(Strategy(keep={"rgb": "all"}),)).check(VOCABULARY)
