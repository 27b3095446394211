"""Decides which labelers of a corpus share a decode: the groups that its work items are made for.

Which group a labeler is in never shows in its labels; it decides how often sources are decoded, and how many models a
worker holds at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.pipeline.sections import EngineConfig
from engine.plan.corpus import CorpusPlan, LabelerUse
from labelers import protocol as labelers

# The bytes of a labeler's models in a pool.
ModelBytes = Callable[[LabelerUse, str], int]


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


def groups(plan: CorpusPlan, engine: EngineConfig, model_bytes: ModelBytes) -> list[Group]:
    """Returns the groups of a corpus's labelers, in the order that its labelers run.

    Labelers of a pool stay in it; heavy ones stand alone; the rest share a group for as long as their models fit into
    `engine.models_mb` together. A labeler that needs another's labels joins its group if neither is heavy; if one is, the
    other runs once more beside it. Labelers that only serve others make no group.
    """
    clusters = [
        cluster for cluster in _clusters(plan, engine) if any(_is_written(plan, use) for use in cluster.labelers)
    ]
    packed: list[Group] = []
    for cluster in clusters:
        size = sum(model_bytes(use, cluster.pool) for use in cluster.labelers)
        for place, group in enumerate(packed):
            is_light = not (_is_heavy(group.labelers[0]) or _is_heavy(cluster.labelers[0]))
            if is_light and group.pool == cluster.pool and group.model_bytes + size <= engine.models_mb << 20:
                joined = (*group.labelers, *cluster.labelers)
                packed[place] = Group(name="", pool=group.pool, labelers=joined, model_bytes=group.model_bytes + size)
                break
        else:
            packed.append(Group(name="", pool=cluster.pool, labelers=cluster.labelers, model_bytes=size))
    return _named(plan, packed)


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    """Holds labelers that must not be parted."""

    pool: str
    labelers: tuple[LabelerUse, ...]


def _clusters(plan: CorpusPlan, engine: EngineConfig) -> list[_Cluster]:
    """Returns each labeler, together with the light ones of its pool that it gives labels to or gets them from."""
    clusters: list[_Cluster] = []
    for use in plan.labelers:
        pool = _pool_of(use, engine)
        needed = set(labelers.find(use.name).spec.inputs)
        joined = [
            cluster
            for cluster in clusters
            if cluster.pool == pool
            and not _is_heavy(use)
            and not _is_heavy(cluster.labelers[0])
            and any(output.name in needed for made in cluster.labelers for output in made.outputs)
        ]
        clusters = [cluster for cluster in clusters if cluster not in joined]
        clusters.append(_Cluster(pool=pool, labelers=(*(u for cluster in joined for u in cluster.labelers), use)))
    return clusters


def _pool_of(use: LabelerUse, engine: EngineConfig) -> str:
    return next((name for name, pool in engine.pools.items() if use.name in pool.labelers), "")


def _is_heavy(use: LabelerUse) -> bool:
    return labelers.find(use.name).spec.heavy


def _is_written(plan: CorpusPlan, use: LabelerUse) -> bool:
    return any(output.name in plan.modalities for output in use.outputs)


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
        named.append(Group(name=name, pool=group.pool, labelers=inside, model_bytes=group.model_bytes))
    return named
