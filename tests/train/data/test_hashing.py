import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data import hashing

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.lists(INT64, min_size=1, max_size=20), INT64)
def test_numpy_torch_and_plain_numbers_give_the_same_bits(values: list[int], key: int) -> None:
    array = np.array(values, dtype=np.int64)
    hashed = hashing.combine(key, array)
    assert hashed.dtype == np.int64
    np.testing.assert_array_equal(hashing.combine(key, torch.from_numpy(array)).numpy(), hashed)
    np.testing.assert_array_equal(hashing.mix(torch.from_numpy(array)).numpy(), hashing.mix(array))
    assert [hashing.combine(key, value) for value in values] == hashed.tolist()
    turned = hashing.combine(array, key)
    assert [hashing.combine(value, key) for value in values] == turned.tolist()


def test_hashes_broadcast_and_depend_on_the_order_of_what_is_hashed() -> None:
    rows, columns = np.arange(30)[:, None], np.arange(20)[None]
    grid = hashing.combine(hashing.combine(7, rows), columns)
    assert grid.shape == (30, 20)
    assert len(np.unique(grid)) == 600
    assert hashing.combine(hashing.combine(7, 3), 5) == grid[3, 5] != hashing.combine(hashing.combine(7, 5), 3)


def test_half_of_the_output_bits_change_with_any_input_bit() -> None:
    values = hashing.mix(np.arange(1000))
    for bit in range(64):
        flipped = hashing.mix(np.arange(1000) ^ np.int64(np.uint64(1 << bit).astype(np.int64)))
        changed = np.unpackbits((values ^ flipped).view(np.uint8)).mean()
        assert changed == pytest.approx(0.5, abs=0.02)


def test_names_have_the_first_bytes_of_their_sha256() -> None:
    assert hashing.name_hash("abc") == int.from_bytes(bytes.fromhex("ba7816bf8f01cfea"), "big", signed=True)
    assert hashing.name_hash("seed", 1) != hashing.name_hash("seed", 2)


def test_uniform_numbers_are_uniform_and_never_zero_or_one() -> None:
    draws = hashing.uniform(hashing.mix(np.arange(100_000)))
    assert np.histogram(draws, 20, (0, 1))[0] == pytest.approx(5000, rel=0.07)
    extremes = hashing.uniform(np.array([0, -1, 1 << 62, -(1 << 63)]))
    assert extremes.min() > 0
    assert extremes.max() < 1


@pytest.mark.parametrize("bound", [1, 2, 7, 1000])
def test_below_reaches_every_number_under_its_bound_and_no_other(bound: int) -> None:
    draws = hashing.below(hashing.mix(np.arange(200 * bound)), bound)
    counts = np.bincount(draws, minlength=bound)
    assert len(counts) == bound
    assert counts.min() > 100
    assert counts.max() < 300


def test_below_takes_a_bound_for_each() -> None:
    bounds = np.array([1, 5, (1 << 31) - 1])
    for hashes in (np.full(3, -1), np.zeros(3, dtype=np.int64), np.full(3, (1 << 63) - 1)):
        draws = hashing.below(hashes, bounds)
        assert (draws >= 0).all()
        assert (draws < bounds).all()
