"""Decides which labelers of a corpus share a decode: the groups that its work items are made for.

Which group a labeler is in never shows in its labels; it decides how often sources are decoded, and how many models a
worker holds at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from engine.pipeline.sections import EngineConfig
from engine.plan.corpus import CorpusPlan, LabelerUse
from labelers import protocol as labelers


@dataclass(frozen=True, kw_only=True)
class Group:
    """Holds labelers that share a decode, the pool whose workers serve them, and the bytes of their models.

    The name is "" if the corpus has one group: its items are then named by corpus and part alone.
    """

    name: str
    pool: str
    labelers: tuple[LabelerUse, ...]
    model_bytes: int

    @property
    def modalities(self) -> frozenset[str]:
        """Returns what the group makes."""
        return frozenset(output.name for use in self.labelers for output in use.outputs)


def groups(plan: CorpusPlan, engine: EngineConfig) -> list[Group]:
    """Returns the groups of a corpus's labelers, in the order that its labelers run.

    Labelers of a pool stay in it; heavy ones stand alone; the rest share a group for as long as their models fit into
    `engine.models_mb` together. A labeler that needs another's labels joins its group if neither is heavy; if one is, the
    other runs once more beside it. Labelers that only serve others make no group.
    """
    packed: list[Group] = []
    for uses in _clusters(plan, engine):
        if not any(output.name in plan.modalities for use in uses for output in use.outputs):
            continue
        pool = pool_of(uses[0], engine)
        size = sum(use.model_bytes for use in uses)
        for place, group in enumerate(packed):
            is_light = not (_is_heavy(group.labelers[0]) or _is_heavy(uses[0]))
            if is_light and group.pool == pool and group.model_bytes + size <= engine.models_mb << 20:
                joined = (*group.labelers, *uses)
                packed[place] = replace(group, labelers=joined, model_bytes=group.model_bytes + size)
                break
        else:
            packed.append(Group(name="", pool=pool, labelers=uses, model_bytes=size))
    return _named(plan, packed)


def _clusters(plan: CorpusPlan, engine: EngineConfig) -> list[tuple[LabelerUse, ...]]:
    """Returns each labeler, together with the light ones of its pool that it gives labels to or gets them from."""
    clusters: list[tuple[LabelerUse, ...]] = []
    for use in plan.labelers:
        pool = pool_of(use, engine)
        needed = set(labelers.find(use.name).spec.inputs)
        joined = [
            cluster
            for cluster in clusters
            if pool_of(cluster[0], engine) == pool
            and not _is_heavy(use)
            and not _is_heavy(cluster[0])
            and any(output.name in needed for made in cluster for output in made.outputs)
        ]
        clusters = [cluster for cluster in clusters if cluster not in joined]
        clusters.append((*chain.from_iterable(joined), use))
    return clusters


def pool_of(use: LabelerUse, engine: EngineConfig) -> str:
    """Returns the pool that serves a labeler."""
    return next((name for name, pool in engine.pools.items() if use.name in pool.labelers), "")


def _is_heavy(use: LabelerUse) -> bool:
    return labelers.find(use.name).spec.heavy


def _named(plan: CorpusPlan, packed: Sequence[Group]) -> list[Group]:
    """Returns the groups in the order that their first labelers run, each with a name of its own."""
    order = {id(use): place for place, use in enumerate(plan.labelers)}
    ordered = sorted(packed, key=lambda group: min(order[id(use)] for use in group.labelers))
    if len(ordered) == 1:
        return ordered
    named: list[Group] = []
    for group in ordered:
        inside = tuple(sorted(group.labelers, key=lambda use: order[id(use)]))
        stem = inside[0].outputs[0].name if len(inside) == 1 else group.pool or "light"
        taken = {other.name for other in named}
        name = next(name for name in (stem, *(f"{stem}-{n}" for n in range(2, len(ordered) + 2))) if name not in taken)
        named.append(replace(group, name=name, labelers=inside))
    return named
