"""A workspace with token shards and tokenizers, made without labeling anything."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manifests.catalog.catalog import Catalog
from manifests.formats import shards
from manifests.log import actions
from manifests.log import entries as log
from manifests.modality import MODALITIES
from manifests.recipe import Recipe, sha256_hex
from manifests.snapshots import snapshot
from manifests.snapshots.snapshot import Snapshot
from manifests.store import paths
from manifests.store.storage import Storage, open_storage
from tokenize_jobs import grid, protocol
from tokenize_jobs.grids import networks
from tokenize_jobs.text import TextOptions, TextTokenizer, fit_text

WORDS = ("a", "red", "blue", "green", "cube", "sphere", "cone", "left", "right", "above", "of", "the", "grass", "snow")


@dataclass
class TokenWorkspace:
    """A workspace on disk, with everything that was written into it.

    values  the tokens of (corpus, modality, crop or None), a row each in the order of the parts, None where not ok
    keys    the keys of each corpus, in the order of the parts
    """

    storage: Storage
    codebook: int
    values: dict[tuple[str, str, int | None], list[np.ndarray | None]] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return self.storage.uri

    def snapshot(self, name: str, **options: Any) -> Snapshot:
        """Makes a snapshot, by the options of `manifests.snapshot.make`."""
        with Catalog(self.storage) as catalog:
            catalog.refresh()
            return snapshot.make(catalog, name, **{"run": "test", **options})

    def commit(self, new: Sequence[actions.Action]) -> None:
        with Catalog(self.storage) as catalog:
            catalog.refresh()
            catalog.commit(new, run="test")

    def add_corpus(self, corpus: str, modalities: Sequence[str], rows: int, *, part_rows: int) -> None:
        """A corpus of parts, of kind text where `text` is all that it has."""
        kind = "text" if tuple(modalities) == ("text",) else "image"
        self.keys[corpus] = [sha256_hex(f"{corpus}/{row}".encode())[:16] for row in range(rows)]
        new: list[actions.Action] = [
            actions.CorpusAdded(corpus=corpus, kind=kind, source=corpus, seed=0, part_rows=part_rows, config={})
        ]
        for part, keys in enumerate(_parts(self.keys[corpus], part_rows)):
            samples = [_sample(corpus, part, row, key) for row, key in enumerate(keys)]
            data = shards.write_samples(samples, shards.pa.schema([]))
            path = paths.samples(corpus, part, sha256_hex(data))
            self.storage.put(path, data)
            facts = {"path": path, "sha256": sha256_hex(data), "size_bytes": len(data), "source_bytes": 1}
            digest = shards.keys_digest(keys)
            new.append(actions.PartAdded(corpus=corpus, part=part, rows=len(keys), keys_sha256=digest, **facts))
        self.commit(new)

    def add_tokens(
        self,
        corpus: str,
        modality: str,
        *,
        part_rows: int,
        crops: int = 1,
        absent: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Random tokens of a modality; the share `absent` of the rows has none."""
        tokenizer = self._tokenizer(modality)
        by_crop = MODALITIES[modality].token_grain == "crop"
        recipe = Recipe(
            modality=modality,
            form="token",
            producer=tokenizer.family,
            version=tokenizer.family_version,
            weights=tokenizer.digest,
            parameters={"tokenizer": tokenizer.name, "seed": seed},
            inputs={modality: "0" * 64},
        )
        new: list[actions.Action] = [
            actions.RecipeAdded(fingerprint=recipe.fingerprint, document=recipe.document()),
            actions.RecipeCurrent(
                corpus=corpus,
                modality=modality,
                form="token",
                fingerprint=recipe.fingerprint,
                crops=crops if by_crop else None,
            ),
        ]
        for crop in range(crops) if by_crop else [None]:
            rng = np.random.default_rng([seed, shards_seed(corpus, modality, crop)])
            count = len(self.keys[corpus])
            values: list[np.ndarray | None] = self._draw(modality, count, rng, tokenizer)
            missing = np.random.default_rng([seed, shards_seed(corpus, modality, None)]).random(count) < absent
            values = [None if gone else row for gone, row in zip(missing, values, strict=True)]
            self.values[corpus, modality, crop] = values
            for part, rows in enumerate(_parts(list(range(count)), part_rows)):
                held = [values[row] for row in rows]
                keys = [self.keys[corpus][row] for row in rows]
                new.append(self._shard(corpus, part, crop, modality, recipe.fingerprint, tokenizer, keys, held))
        self.commit(new)

    def _shard(
        self,
        corpus: str,
        part: int,
        crop: int | None,
        modality: str,
        fingerprint: str,
        tokenizer: actions.TokenizerAdded,
        keys: list[str],
        values: list[np.ndarray | None],
    ) -> actions.ShardAdded:
        statuses = [shards.Status.ABSENT if value is None else shards.Status.OK for value in values]
        data = shards.write_tokens(keys, statuses, values, tokenizer.vocabulary, {"modality": modality})
        path = paths.shard(corpus, modality, fingerprint, part, crop, sha256_hex(data), is_tar=False)
        self.storage.put(path, data)
        return actions.ShardAdded(
            corpus=corpus,
            part=part,
            crop=crop,
            modality=modality,
            form="token",
            fingerprint=fingerprint,
            path=path,
            format="parquet",
            sha256=sha256_hex(data),
            size_bytes=len(data),
            rows=len(keys),
            ok=statuses.count(shards.Status.OK),
            failed=0,
            absent=statuses.count(shards.Status.ABSENT),
            keys_sha256=shards.keys_digest(keys),
            tokens=sum(len(value) for value in values if value is not None),
            vocabulary=tokenizer.vocabulary,
        )

    def _tokenizer(self, modality: str) -> actions.TokenizerAdded:
        """The committed tokenizer of a modality: one text tokenizer for all sequences, an unfitted grid one a modality."""
        text = MODALITIES[modality].is_structured
        name = "text" if text else modality
        with Catalog(self.storage) as catalog:
            catalog.refresh()
            known = {tokenizer.name: tokenizer for tokenizer in catalog.tokenizers()}
        if name in known:
            return known[name]
        made = Path(self.storage.full(f".{name}"))
        vocabulary = _make_text(made) if text else _make_grid(made, modality, self.codebook)
        digest = protocol.digest(made)
        path = paths.tokenizer(name, digest)
        made.rename(_parent(Path(self.storage.full(path))))
        added = actions.TokenizerAdded(
            name=name,
            digest=digest,
            path=path,
            family="text" if text else "grid",
            family_version=1,
            vocabulary=vocabulary,
            options={},
            rows=1,
            metrics={},
        )
        self.commit([added])
        return added

    def _draw(self, modality: str, rows: int, rng: np.random.Generator, tokenizer: actions.TokenizerAdded) -> list[Any]:
        facts = MODALITIES[modality]
        if not facts.is_structured:
            return list(rng.integers(0, tokenizer.vocabulary, (rows, facts.tokens)))
        table = TextTokenizer.load(Path(self.storage.full(tokenizer.path)), modality)
        return table.encode([_label(modality, rng) for _ in range(rows)]) if rows else []


def shards_seed(*names: object) -> int:
    return int(sha256_hex("/".join(map(str, names)).encode())[:8], 16)


def _label(modality: str, rng: np.random.Generator) -> Any:
    if MODALITIES[modality].kind == "text":
        return " ".join(rng.choice(WORDS, int(rng.integers(1, 40))))
    if modality == "palette":
        k = int(rng.integers(1, 8))
        return [
            {"k": k, "rank": rank, **dict(zip("rgb", rng.integers(0, 256, 3).tolist(), strict=True))}
            for rank in range(k)
        ]
    if modality == "metadata":
        numbers = rng.integers(0, 100, 4).tolist()
        return dict(zip(("original_width", "original_height", "caption_n_words", "brightness"), numbers, strict=True))
    corners = np.sort(rng.random((int(rng.integers(0, 5)), 2, 2)), axis=1).reshape(-1, 4).tolist()
    return [{"class": "cat", "score": 1.0, **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))} for box in corners]


def _make_text(folder: Path) -> int:
    return int(fit_text([" ".join(WORDS)] * 2, folder, options=TextOptions(vocabulary=4500))["vocabulary"])


def _make_grid(folder: Path, modality: str, codebook: int) -> int:
    facts = MODALITIES[modality]
    coding = grid.coding_of(facts)
    shape = {"channels": coding.channels, "classes": 0, "patch": facts.size // math.isqrt(facts.tokens or 1)}
    shape |= {"codebook": codebook, "latent": 4, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
    network = networks.empty(**shape)
    networks.initialize(network, torch.Generator().manual_seed(0))
    grid.write(folder, network, coding, modality=facts, shape=shape, fit={})
    return codebook


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _parts(rows: list[Any], part_rows: int) -> list[list[Any]]:
    return [rows[start : start + part_rows] for start in range(0, len(rows), part_rows)]


def _sample(corpus: str, part: int, row: int, key: str) -> dict[str, Any]:
    digest = bytes.fromhex(sha256_hex(key.encode()))
    return {
        "corpus": corpus,
        "part": part,
        "row": row,
        "key": key,
        "source": f"{key}.jpg",
        "size_bytes": 1,
        "sha256": digest,
    }


@pytest.fixture(scope="session")
def token_workspace() -> Callable[..., TokenWorkspace]:
    """Makes a workspace in a folder: corpora by name, each with its rows and its modalities.

    `absent` gives modalities the share of rows that have none (0.1 where it names none); crops count for modalities of
    crop grain alone. Tokens are random, sequences those of random labels.
    """

    def make(
        folder: Path,
        corpora: Mapping[str, tuple[int, Sequence[str]]],
        *,
        part_rows: int = 16,
        crops: int = 2,
        absent: Mapping[str, float] | None = None,
        codebook: int = 64,
        seed: int = 0,
    ) -> TokenWorkspace:
        storage = open_storage(folder)
        log.create_workspace(storage)
        made = TokenWorkspace(storage=storage, codebook=codebook)
        for corpus, (rows, modalities) in corpora.items():
            made.add_corpus(corpus, modalities, rows, part_rows=part_rows)
            for modality in modalities:
                share = (absent or {}).get(modality, 0.1)
                made.add_tokens(corpus, modality, part_rows=part_rows, crops=crops, absent=share, seed=seed)
        return made

    return make
