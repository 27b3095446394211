"""Makes the keyed hashes that are the only source of randomness in training.

Every draw is a hash of what it is for (seed, epoch, row, position), so that nothing needs a generator's state: the same
row gets the same crop and mask whatever the number of workers, the batch it falls into, or the run that resumes.

The functions take and return int64, numpy arrays or torch tensors alike, with the same bits: products wrap, shifts are
logical. The mixer is that of SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195).
"""

import hashlib
from typing import Any, TypeVar

import numpy as np

Hashes = TypeVar("Hashes", bound=Any)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def name_hash(*names: str | int) -> int:
    """Returns a hash of names and numbers as an int64: the first bytes of the sha256 of their text, equal on every machine."""
    text = "\n".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def mix(values: Hashes) -> Hashes:
    """Mixes int64 values, one to one: every output bit depends on every input bit."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def combine(key: Any, values: Any) -> Any:
    """Returns the hash of `values` under `key`, elementwise with broadcasting; `combine(combine(k, a), b)` hashes the pair.

    The values may be one number, and so may the key.
    """
    if isinstance(values, int | np.integer):
        # Python's own integers do not wrap.
        values = np.array([values], dtype=np.int64)
        hashed = int(mix(values * _GOLDEN)[0])
    else:
        hashed = mix(values * _GOLDEN)
    if isinstance(key, int) and isinstance(hashed, int):
        return int(mix(np.array([key ^ hashed], dtype=np.int64) + _GOLDEN)[0])
    return mix((key ^ hashed) + _GOLDEN)


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Returns float64 in the open interval (0, 1), made of the upper 52 bits."""
    return (_shifted(hashes, 12).astype(np.float64) + 0.5) * 2.0**-52


def below(hashes: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Returns int64 in 0..bound-1. `bound` must be under 2**31; the bias is under bound / 2**31."""
    return (_shifted(hashes, 33) * bound) >> 31


def _shifted(values: Any, bits: int) -> Any:
    return (values >> bits) & ((1 << (64 - bits)) - 1)
