"""Defines what a tokenizer is, and loads one from a workspace.

A tokenizer is a folder `<name>-<digest12>/` with `config.json` (`{"family": "grid", ...}`) beside its weights. The
family is a file of this package; its class, named as `TOKENIZER` at the file's end, has a `spec`, `load`, `encode`
and `decode`.
"""

import importlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from manifests.errors import ConfigError, ShardError
from manifests.log.actions import TokenizerAdded
from manifests.recipe import canonical_json, sha256_hex
from manifests.store.storage import Storage, cache_folder

FAMILIES = ("grid", "text")


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """Holds the facts of a tokenizer.

    family      `grid` or `text`: the file that holds its code
    version     an integer of that code, raised by hand when outputs change
    modality    the modality it encodes
    vocabulary  tokens are 0 <= token < vocabulary
    tokens      tokens a row; for a sequence the most that a row may have, None for no limit
    """

    family: str
    version: int
    modality: str
    vocabulary: int
    tokens: int | None


@runtime_checkable
class Tokenizer(Protocol):
    """Defines what the engine asks of a tokenizer: labels to tokens and back."""

    @property
    def spec(self) -> TokenizerSpec: ...

    @classmethod
    def load(cls, folder: Path, modality: str) -> Self:
        """Loads the tokenizer in `folder`, for `modality` (one text tokenizer serves all sequences)."""
        ...

    def encode(self, labels: Any) -> Sequence[np.ndarray]:
        """Returns the tokens of B labels: B one-dimensional int64 arrays.

        `labels` is one array (B, ...) for modalities of arrays, of NumPy or torch (on any device: what a labeler made on
        a GPU is encoded there), else a list of labels as labelers make them. The tokens of a row depend on its label
        alone.
        """
        ...

    def decode(self, tokens: Sequence[np.ndarray]) -> Sequence[Any]:
        """Returns the labels of B rows of tokens, in the form that `encode` takes, as exactly as tokens hold them."""
        ...


def digest(folder: Path) -> str:
    """Returns the sha256 that names a tokenizer: that of the names and sha256s of all its files."""
    # A hidden file is what a killed writer left behind.
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    files = {path.name: sha256_hex(path.read_bytes()) for path in paths}
    return sha256_hex(canonical_json(files))


def fetch(storage: Storage, path: str) -> tuple[Path, str]:
    """Returns a local folder with the files at `path` of a workspace, and their digest ("missing" if there are no files)."""
    if storage.is_local:
        folder = Path(storage.full(path))
        return folder, digest(folder) if folder.is_dir() else "missing"
    folder = cache_folder() / "tokenizers" / Path(path).name
    folder.mkdir(parents=True, exist_ok=True)
    names = storage.names(path)
    for name in names:
        (folder / name).write_bytes(storage.read(f"{path}/{name}"))
    return folder, digest(folder) if names else "missing"


def fetch_tokenizer(storage: Storage, known: TokenizerAdded) -> Path:
    """Returns a local folder with a tokenizer of the workspace. Raises ShardError if its files are not the committed ones."""
    folder, found = fetch(storage, known.path)
    if found != known.digest:
        raise ShardError(
            f"{storage.location(known.path)}: the tokenizer's digest is {found[:12]}, the log says "
            f"{known.digest[:12]}; restore the folder from a copy, or fit a new one with --refit"
        )
    return folder


def load(folder: Path, modality: str, device: str = "cpu") -> Tokenizer:
    """Loads the tokenizer in `folder` for `modality`, on `device` if it computes on one.

    Raises ConfigError if the folder does not hold a tokenizer.
    """
    path = folder / "config.json"
    try:
        family = json.loads(path.read_text())["family"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: no tokenizer's config.json ({error}); expected an object with a family") from error
    if family not in FAMILIES:
        raise ConfigError(f"{path}: unknown family {family!r}; known: {', '.join(FAMILIES)}")
    tokenizer = importlib.import_module(f"tokenize_jobs.{family}").TOKENIZER
    options = {"device": device} if "device" in inspect.signature(tokenizer.load).parameters else {}
    return tokenizer.load(folder, modality, **options)
