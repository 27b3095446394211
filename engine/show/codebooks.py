"""Counts how the tokens of a workspace use their vocabularies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifests.catalog.catalog import Catalog
from manifests.formats import codecs
from manifests.log.actions import TokenizerAdded

# A histogram needs no more than this; a report of a large workspace must not read all of it.
_MOST_SHARDS = 200


@dataclass(frozen=True, kw_only=True)
class CodebookUse:
    """Holds how often each token of a tokenizer occurs: `counts` (vocabulary,) int64.

    `shards_read` of `shards` were counted, of the modalities named.
    """

    tokenizer: TokenizerAdded
    modalities: tuple[str, ...]
    counts: np.ndarray
    shards_read: int
    shards: int

    @property
    def used(self) -> int:
        """Returns how many tokens occur at all."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """Returns how many equally common tokens would carry as much; 0 if no token occurs."""
        from tokenize_jobs.reconstruction import codebook_figures

        return codebook_figures(self.counts)["perplexity"] if self.used else 0.0


def codebook_use(catalog: Catalog) -> list[CodebookUse]:
    """Returns the use of every tokenizer that current token shards name, by name."""
    found = catalog.sql(
        "SELECT r.weights, s.modality, s.path, s.format FROM shards s "
        "JOIN recipes r ON r.recipe = s.recipe AND r.modality = s.modality AND r.form = s.form "
        "WHERE s.is_current AND s.form = 'token' ORDER BY s.path"
    ).to_pylist()
    uses = []
    for tokenizer in catalog.tokenizers():
        mine = [shard for shard in found if shard["weights"] == tokenizer.digest]
        if mine:
            uses.append(_use(catalog, tokenizer, mine))
    return uses


def _use(catalog: Catalog, tokenizer: TokenizerAdded, mine: Sequence[dict[str, Any]]) -> CodebookUse:
    counts = np.zeros(tokenizer.vocabulary, np.int64)
    # Evenly over the paths, so that every modality and corpus has a part in it.
    step = -(-len(mine) // _MOST_SHARDS)
    for shard in mine[::step]:
        tokens = _tokens(catalog, shard["path"], shard["format"])
        counts += np.bincount(tokens, minlength=len(counts))[: len(counts)]
    return CodebookUse(
        tokenizer=tokenizer,
        modalities=tuple(sorted({shard["modality"] for shard in mine})),
        counts=counts,
        shards_read=len(mine[::step]),
        shards=len(mine),
    )


def _tokens(catalog: Catalog, path: str, form: str) -> np.ndarray:
    """Returns all tokens of a shard, int64 (n,)."""
    with catalog.storage.open(path) as file:
        _, rows = codecs.read_tokens(form, file)
    return np.concatenate([np.zeros(0, np.int64), *(row for row in rows if row is not None)])
