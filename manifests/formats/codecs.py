"""Defines how labels become members of tars: a codec for each extension, chosen by modality, found again by first bytes.

The one place that knows how pixels, maps and tokens are kept. Records, text and vectors are Parquet and have no codec.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa

from manifests.errors import DecodeError, ShardError
from manifests.formats import shards
from manifests.modality import Modality
from manifests.pixels import images
from manifests.store import parquet


@dataclass(frozen=True, slots=True)
class Codec:
    """Holds how members with an extension are written and read; each begins with the bytes `starts`."""

    extension: str
    starts: bytes
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes], np.ndarray]


PNG = Codec("png", b"\x89PNG", images.encode_png, images.decode_map)
NPY = Codec("npy", images.NPY_START, images.encode_npy, images.decode_npy)
CODECS = (PNG, NPY)


def of_modality(modality: Modality) -> Codec | None:
    """Returns the codec of the kept labels of a modality: PNG for 8 and 16 bits, else .npy. None if they are Parquet."""
    if modality.in_parquet:
        return None
    return PNG if modality.dtype in ("uint8", "uint16") and modality.channels in (1, 3) else NPY


def of_bytes(data: bytes) -> Codec:
    """Returns the codec that wrote a member. Raises DecodeError if none did."""
    for codec in CODECS:
        if data.startswith(codec.starts):
            return codec
    raise DecodeError(f"a member of {len(data)} bytes; expected {' or '.join(codec.extension for codec in CODECS)}")


def decode(data: bytes) -> np.ndarray:
    """Returns the array in a member: tokens, or a label as its labeler made it. Raises DecodeError if it is damaged."""
    return of_bytes(data).decode(data)


def read_tokens(format: str, file: bytes | IO[bytes]) -> tuple[list[str], list[np.ndarray | None]]:
    """Returns the keys and the tokens of a shard of either format; tokens are unsigned, None if the row is not ok.

    Those of Parquet are views of one array. Raises ShardError if it is no such shard.
    """
    if format != "parquet":
        found = shards.read_rows(format, file)
        return found.keys, [None if value is None else decode(value) for value in found.values or []]
    try:
        table = parquet.read(file, ["key", "tokens"])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ShardError(f"no Parquet shard of tokens: {error}") from error
    rows = [row.values for row in table["tokens"]]
    return table["key"].to_pylist(), [None if row is None else row.to_numpy() for row in rows]


def decode_file(modality: Modality, data: bytes) -> np.ndarray:
    """Returns the numbers in a user's own label file, as stored; `fit_array` makes them a label of the modality.

    A .npy of any shape; else for a modality of photographs whatever `images.decode` takes, for others a PNG or TIFF.
    Raises DecodeError if it is none of these or is damaged.
    """
    if data.startswith(NPY.starts):
        return NPY.decode(data)
    is_photograph = modality.crop_rule == "pixels" and modality.dtype == "uint8" and modality.channels == 3
    return images.decode(data) if is_photograph else images.decode_map(data)
