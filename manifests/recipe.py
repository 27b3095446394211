"""Defines recipes and their fingerprints: what decides a labeler's or a tokenizer's output, and the hash of that.

The rule (fixed; shards are found by it): the fingerprint is the sha256, in hex, of the canonical JSON of

    {"crop": rule or null, "form": "label" or "token", "inputs": {name: fingerprint or version}, "modality": name,
     "parameters": {...}, "producer": name, "version": integer, "weights": sha256 or null}

Canonical JSON: UTF-8, keys sorted, no spaces, no NaN or infinity, floats as Python's shortest repr.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any

from manifests.modality import Form

_SEAL = b',"seal":"'
_SEAL_BYTES = len(_SEAL) + 64 + 2


def canonical_json(value: Any) -> bytes:
    """Writes a JSON value in its one spelling, so that equal values have equal hashes.

    Raises ValueError on NaN and infinity, TypeError on what JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parsed_json(data: bytes | str) -> Any:
    """Parses a JSON document that anybody may have written. Raises ValueError for what is none, such as NaN, however deep."""
    try:
        return json.loads(data, parse_constant=_refused)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refused(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is no number of JSON")


def sealed_json(document: Mapping[str, Any]) -> bytes:
    """Writes a JSON object canonically, with the sha256 of that as its last member `seal`."""
    return sealed(canonical_json(document))


def sealed(document: bytes) -> bytes:
    """Returns the bytes of a JSON object with the sha256 of them as its last member."""
    return document[:-1] + _SEAL + sha256_hex(document).encode() + b'"}'


def is_as_sealed(data: bytes) -> bool:
    """Tells whether the bytes of a JSON object are those that were sealed, or have no seal: the first writers made none."""
    document, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    return not seal.startswith(_SEAL) or sealed(document + b"}") == data


def sha256_hex(data: bytes | memoryview) -> str:
    """Returns the sha256 of bytes, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_stream(stream: IO[bytes]) -> str:
    """Reads a stream from where it stands to its end; returns the sha256 of that, as 64 hex digits."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Holds everything that decides the output of a labeler or a tokenizer.

    `version` is raised by hand when outputs change. `weights` is the sha256 of the weights, None if it has none.
    `crop` is the crop rule if the output depends on it (seed, scale, ratio, flip; never the number of crops).
    `inputs` maps an input's name to its fingerprint.
    """

    modality: str
    form: Form
    producer: str
    version: int
    weights: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    crop: Mapping[str, Any] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Returns the recipe as plain JSON values; the fingerprint is the hash of them."""
        return {
            "modality": self.modality,
            "form": self.form,
            "producer": self.producer,
            "version": self.version,
            "weights": self.weights,
            "parameters": dict(self.parameters),
            "crop": None if self.crop is None else dict(self.crop),
            "inputs": dict(self.inputs),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hashes the document to 64 hex digits; the first 12 name the folder of the recipe's shards."""
        return sha256_hex(canonical_json(self.document()))
