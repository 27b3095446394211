"""Compares the pipeline file with the manifest: what is to be made, and what of it is missing.

A part's missing shards of a group become one `WorkItem`; a tokenizer that is not there yet becomes a `FitItem`. What
becomes of a corpus as a whole is in `engine/plan/corpus.py`, which labelers form a group in `engine/plan/groups.py`.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from engine.pipeline.config import PipelineConfig
from engine.plan.corpus import CorpusPlan
from engine.plan.groups import Group
from engine.plan.items import Attempt, FitItem, FitRows, Target, WorkItem
from engine.plan.where import PickedRows, has_row
from manifests.catalog.catalog import Catalog
from manifests.formats.shards import Status
from manifests.log.actions import PartAdded, ShardAdded, TokenizerAdded
from manifests.modality import Form, Modality
from manifests.queries import planning
from manifests.queries.planning import Place, Unfinished
from manifests.recipe import sha256_hex
from manifests.store import paths
from manifests.store.storage import Storage

FORMS: frozenset[Form] = frozenset(("label", "token"))
_JUDGED_ONE_IN = 10
# Parts that are looked at together: at most this many records of parts are in memory.
_WINDOW = 2048
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Holds what of all that is missing is asked for.

    `picked` are the rows to be labeled (None: all). `retry` are the classes of failures whose rows are made again (empty:
    every class; None: failed rows stay as they are).
    """

    forms: frozenset[Form] = FORMS
    picked: PickedRows | None = None
    retry: frozenset[str] | None = None


def wanted_targets(plan: CorpusPlan) -> list[Target]:
    """Returns every shard that each part of the corpus should have by the current recipes, in a fixed order."""
    targets = []
    for name, modality in plan.modalities.items():
        for form, recipe in modality.written().items():
            targets += [
                Target(modality=name, form=form, fingerprint=recipe.fingerprint, crop=crop)
                for crop in plan.grains(name, form)
            ]
    return targets


def group_targets(plan: CorpusPlan, group: Group, forms: frozenset[Form] = FORMS) -> list[Target]:
    """Returns the `wanted_targets` that a group makes in some forms."""
    made = group.modalities
    return [target for target in wanted_targets(plan) if target.modality in made and target.form in forms]


def places_of(targets: Sequence[Target]) -> list[Place]:
    """Returns targets as the manifest is asked for them."""
    return [(target.modality, target.form, target.fingerprint, target.crop) for target in targets]


def work_items(
    catalog: Catalog, plan: CorpusPlan, group: Group, tokenizers: Mapping[str, TokenizerAdded], wanted: Wanted
) -> Iterator[WorkItem]:
    """Yields what a group has to do: an item for each part with missing shards of it, in the order of the parts.

    The catalog is asked for a window of parts at a time, on the thread that takes the items.
    """
    targets = group_targets(plan, group, wanted.forms)
    if not targets:
        return
    places = places_of(targets)
    and_failed = wanted.retry is not None
    failing = planning.failing(catalog, plan.corpus, wanted.retry) if wanted.retry else None
    used = {plan.modalities[target.modality].tokenizer for target in targets if target.form == "token"}
    known = {name: tokenizers[name] for name in sorted(used)}
    left = _parts_left_aside(catalog, plan.corpus, targets)
    for first in range(0, planning.last_part(catalog, plan.corpus) + 1, _WINDOW):
        last = first + _WINDOW - 1
        window = planning.unfinished(catalog, plan.corpus, places, first, last, and_failed=and_failed)
        if wanted.picked is not None:
            window = [found for found in window if found.part.part in wanted.picked.parts(plan.corpus)]
        if not window:
            continue
        not_whole = planning.not_whole(catalog, plan.corpus, places, first, last, and_failed=and_failed)
        lives = [not_whole.get(found.part.part, {}) for found in window]
        made = _each(
            lambda found, live: _missing(catalog.storage, plan, targets, found, live, wanted, failing), window, lives
        )
        for found, (missing, base) in zip(window, made, strict=True):
            if missing:
                yield WorkItem(
                    plan=plan,
                    part=found.part,
                    targets=missing,
                    tokenizers=known,
                    group=group.name,
                    pool=group.pool,
                    selected=wanted.picked.bits(plan.corpus, found.part.part) if wanted.picked else None,
                    base=base,
                    retry=wanted.retry or frozenset(),
                    attempt=Attempt(resumes=found.part.part in left),
                )


def _parts_left_aside(catalog: Catalog, corpus: str, targets: Sequence[Target]) -> set[int]:
    """Returns the parts of which an earlier run that was cut short may have left rows of these targets aside."""
    if not planning.was_cut_short(catalog):
        return set()
    folders = {paths.recipe_folder(corpus, target.modality, target.fingerprint) for target in targets}
    found = (
        paths.SPILL.parse(f"{folder}/{name}")
        for folder in sorted(folders)
        for name in catalog.storage.names(folder, beginning=paths.SPILL_BEGINNING)
    )
    return {fields["part"] for fields in found if fields}


def _each(
    look: Callable[..., Any], window: Sequence[Unfinished], lives: Sequence[Mapping[int, ShardAdded]]
) -> list[Any]:
    """Looks at the parts of a window, on threads if shards may have to be read."""
    if not any(lives):
        return list(map(look, window, lives))
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look, window, lives))


def _missing(
    storage: Storage,
    plan: CorpusPlan,
    targets: Sequence[Target],
    found: Unfinished,
    live: Mapping[int, ShardAdded],
    wanted: Wanted,
    failing: Collection[tuple[int, str, Form, int | None]] | None,
) -> tuple[tuple[Target, ...], dict[Target, ShardAdded]]:
    """Returns the targets of a part that are to be made, and the live shards of those that have rows already."""
    part = found.part.part
    missing, base = [], {}
    for place, target in enumerate(targets):
        shard = live.get(place)
        if shard is None:
            if place not in found.done:
                missing.append(target)
            continue
        statuses = [Status.NOT_SELECTED] if shard.not_selected else []
        is_failing = failing is None or (part, target.modality, target.form, target.crop) in failing
        if wanted.retry is not None and shard.failed and is_failing:
            statuses.append(Status.FAILED)
        bits = wanted.picked.bits(plan.corpus, part) if wanted.picked else None
        if statuses and (bits is None or has_row(storage, shard, bits, statuses)):
            missing.append(target)
            base[target] = shard
    return tuple(missing), base


def fit_items(
    config: PipelineConfig,
    plans: Mapping[str, CorpusPlan],
    parts: Callable[[str], Sequence[PartAdded]],
    *,
    refit: bool,
    fitted: Mapping[str, TokenizerAdded | None],
) -> list[FitItem]:
    """Returns the tokenizers that the pipeline needs and the workspace does not have (with `refit`, all that it needs).

    `parts` gives the parts of a corpus, and is called only if there is something to fit.
    """
    items = []
    for tokenizer, users in _users(plans).items():
        if fitted.get(tokenizer) is not None and not refit:
            continue
        by_corpus = {corpus: tuple(parts(corpus)) for corpus, _ in users}
        corpora = [corpus for corpus, found in by_corpus.items() if found]
        served = {modality.name: modality for _, modality in users}
        items.append(
            FitItem(
                name=tokenizer,
                family=next(iter(served.values())).tokenizer,
                modalities=tuple(served.values()),
                options=config.fit_options(tokenizer, next(iter(served.values())).kind),
                rows=tuple(
                    FitRows(
                        plan=plans[corpus],
                        parts=by_corpus[corpus],
                        fit_rows=max(1, config.fit_rows // len(corpora)),
                    )
                    for corpus in corpora
                ),
            )
        )
    return items


def otherwise_fitted(
    config: PipelineConfig, plans: Mapping[str, CorpusPlan], fitted: Mapping[str, TokenizerAdded | None]
) -> list[str]:
    """Returns a line for each tokenizer that was fitted with other options than the pipeline has now: it stays as it is."""
    lines = []
    for name, users in _users(plans).items():
        known = fitted.get(name)
        if known is None:
            continue
        wanted = config.fit_options(name, users[0][1].kind)
        names = sorted(
            option for option in {*wanted, *known.options} if wanted.get(option) != known.options.get(option)
        )
        if names:
            was = ", ".join(f"{option} {known.options.get(option)}, now {wanted.get(option)}" for option in names)
            lines.append(
                f"tokenizer {name} was fitted with other options ({was}) and stays as it is; --refit fits it again"
            )
    return lines


def _users(plans: Mapping[str, CorpusPlan]) -> dict[str, list[tuple[str, Modality]]]:
    """Returns the corpora and modalities that need each tokenizer."""
    needed: dict[str, list[tuple[str, Modality]]] = {}
    for corpus, plan in plans.items():
        for modality in plan.modalities.values():
            if modality.wants_tokens:
                needed.setdefault(modality.tokenizer, []).append((corpus, modality.modality))
    return needed


def is_judged(key: str) -> bool:
    """Tells whether a sample is never fitted on, so that tokenizers can be judged by it: one key in ten, by hash."""
    return int.from_bytes(hashlib.sha256(f"held-out/{key}".encode()).digest()[:8], "big") % _JUDGED_ONE_IN == 0


def fit_order(key: str) -> str:
    """Returns what samples for fitting are sorted by: a hash of the key, so that new photographs change little."""
    return sha256_hex(f"fit/{key}".encode())
