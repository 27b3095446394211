"""What is to be made, and what is missing of it: pure functions of the pipeline file and the manifest.

A part's missing shards become one `WorkItem`, whose labelers share a decode; a tokenizer that is not there yet becomes a
`FitItem`. What becomes of a corpus as a whole is in `engine/corpus_plan.py`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import PipelineConfig
from engine.corpus_plan import CorpusPlan
from engine.work import Target, WorkItem
from manifests.actions import PartAdded, ShardAdded, TokenizerAdded
from manifests.modality import Form, Modality
from manifests.recipe import sha256_hex

_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, kw_only=True)
class FitRows:
    """The rows of one corpus that a tokenizer is fitted on, and those it is judged on, by part."""

    plan: CorpusPlan
    parts: tuple[PartAdded, ...]
    fit_rows: int


@dataclass(frozen=True, kw_only=True)
class FitItem:
    """A tokenizer to be fitted, for the stated number of steps. `modalities` are those it serves."""

    name: str
    family: str
    modalities: tuple[Modality, ...]
    options: Mapping[str, Any]
    rows: tuple[FitRows, ...]


def wanted_targets(plan: CorpusPlan) -> list[Target]:
    """Every shard that each part of the corpus should have by the current recipes, in a fixed order."""
    targets = []
    for name, modality in plan.modalities.items():
        for form, recipe in modality.written().items():
            targets += [
                Target(modality=name, form=form, fingerprint=recipe.fingerprint, crop=crop)
                for crop in plan.grains(name, form)
            ]
    return targets


def work_items(
    plan: CorpusPlan,
    parts: Sequence[PartAdded],
    live: Iterable[ShardAdded],
    tokenizers: Mapping[str, TokenizerAdded],
    *,
    forms: frozenset[Form] = frozenset(("label", "token")),
    retry_failed: bool = False,
) -> list[WorkItem]:
    """What is missing: an item for each part that lacks shards, or with `retry_failed` has shards with failed rows."""
    done = {
        (shard.part, shard.modality, shard.form, shard.fingerprint, shard.crop)
        for shard in live
        if shard.corpus == plan.corpus and not (retry_failed and shard.failed)
    }
    wanted = [target for target in wanted_targets(plan) if target.form in forms]
    used = {modality.tokenizer for modality in plan.modalities.values() if modality.token is not None}
    items = []
    for part in parts:
        missing = tuple(
            target
            for target in wanted
            if (part.part, target.modality, target.form, target.fingerprint, target.crop) not in done
        )
        if missing:
            have = {name: tokenizers[name] for name in sorted(used)}
            items.append(WorkItem(plan=plan, part=part, targets=missing, tokenizers=have))
    return items


def fit_items(
    config: PipelineConfig,
    plans: Mapping[str, CorpusPlan],
    parts: Mapping[str, Sequence[PartAdded]],
    *,
    refit: bool,
    fitted: Mapping[str, TokenizerAdded | None],
) -> list[FitItem]:
    """The tokenizers that the pipeline needs and the workspace lacks (all that it needs, with `refit`)."""
    needed: dict[str, list[tuple[str, Modality]]] = {}
    for corpus, plan in plans.items():
        for modality in plan.modalities.values():
            if modality.wants_tokens:
                needed.setdefault(modality.tokenizer, []).append((corpus, modality.modality))
    items = []
    for tokenizer, users in needed.items():
        if fitted.get(tokenizer) is not None and not refit:
            continue
        corpora = [corpus for corpus in dict.fromkeys(corpus for corpus, _ in users) if parts[corpus]]
        served = {modality.name: modality for _, modality in users}
        items.append(
            FitItem(
                name=tokenizer,
                family=next(iter(served.values())).tokenizer,
                modalities=tuple(served.values()),
                options=config.fit_options(tokenizer),
                rows=tuple(
                    FitRows(
                        plan=plans[corpus],
                        parts=tuple(parts[corpus]),
                        fit_rows=max(1, config.fit_rows // len(corpora)),
                    )
                    for corpus in corpora
                ),
            )
        )
    return items


def is_held_out(key: str) -> bool:
    """Whether a sample is never fitted on, so that tokenizers can be judged by it: one key in ten, by hash."""
    return int.from_bytes(hashlib.sha256(f"held-out/{key}".encode()).digest()[:8], "big") % _HELD_OUT_ONE_IN == 0


def fit_order(key: str) -> str:
    """Samples are taken for fitting in this order: by hash of the key, so that new photographs shift nothing much."""
    return sha256_hex(f"fit/{key}".encode())
