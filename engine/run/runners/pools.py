"""Defines pools: what each worker of one needs, and how many a cluster has room for. Ray itself is not imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.pipeline.sections import EngineConfig, PoolConfig
from engine.plan.groups import pool_of
from engine.plan.items import FitItem
from engine.work.inputs import WorkerSettings
from engine.work.machine import cores
from manifests.errors import ConfigError

_LOCAL_ONLY_FOR_ALL = ("working_dir", "py_modules")


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Describes workers that serve some labelers, or "": all that no other pool serves. `workers` None: all that fit.

    `needs` is what Ray sets aside for a worker: CPU and GPU in numbers, memory in bytes.
    """

    name: str
    settings: WorkerSettings
    workers: int | None
    needs: Mapping[str, float]
    node_labels: Mapping[str, str] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"pool {self.name!r}" if self.name else "the pool of workers"

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options of its actors."""
        found: dict[str, Any] = {"num_cpus": self.needs["CPU"], "num_gpus": self.needs.get("GPU", 0)}
        if "memory" in self.needs:
            found["memory"] = int(self.needs["memory"])
        if self.node_labels:
            found["label_selector"] = dict(self.node_labels)
        if self.runtime_env:
            # Over the one of the whole job: Ray lays one over the other.
            found["runtime_env"] = dict(self.runtime_env)
        return found

    def fits_on(self, node: Mapping[str, Any]) -> bool:
        """Tells whether a node has the labels; Ray judges what they say beside plain equality."""
        labels = node.get("Labels") or {}
        plain = {name: value for name, value in self.node_labels.items() if not value.startswith(("!", "in("))}
        return all(labels.get(name) == value for name, value in plain.items())


def workers_of(engine: EngineConfig) -> int:
    """Returns how many workers the engine's options ask for; by default as many as this machine's cores allow."""
    return engine.workers or max(1, cores() // engine.threads)


def pools(
    engine: EngineConfig,
    settings: WorkerSettings,
    *,
    has_gpus: bool,
    runtime_env: Mapping[str, Any] | None = None,
) -> dict[str, Pool]:
    """Returns every pool of the pipeline file by name, and the one named "". `has_gpus`: whether the cluster has any GPU.

    `runtime_env` is what all workers get that the job has not.
    """
    own = PoolConfig(labelers=["*"], workers=engine.workers)
    return {
        name: _pool(name, section, engine, settings, has_gpus=has_gpus, runtime_env=runtime_env or {})
        for name, section in {"": own, **engine.pools}.items()
    }


def pool_of_fit(item: FitItem, engine: EngineConfig) -> str:
    """Returns the pool whose workers can label what a tokenizer is fitted on; "" if the labelers are not all of one."""
    served = {modality.name for modality in item.modalities}
    uses = [use for rows in item.rows for use in rows.plan.labelers]
    found = {pool_of(use, engine) for use in uses if any(output.name in served for output in use.outputs)}
    return found.pop() if len(found) == 1 else ""


def wanted_workers(
    known: Mapping[str, Pool], nodes: Sequence[Mapping[str, Any]], loads: Mapping[str, int]
) -> dict[str, int]:
    """Returns how many workers each pool should have now: never more than its items at hand.

    A number that was asked for is asked of the cluster at once, so that autoscalers see it; else as many as the nodes
    have room for (`ray.nodes()`), at least one, shared evenly by the pools that have work.
    """
    busy = [pool for pool in known.values() if loads.get(pool.name)]
    wanted = {pool.name: min(pool.workers or 0, loads[pool.name]) for pool in busy}
    found = dict.fromkeys(known, 0)
    for node in nodes:
        if not node.get("Alive"):
            continue
        free = dict(node["Resources"])
        for pool in busy:
            while found[pool.name] < wanted[pool.name] and _take(pool, node, free):
                found[pool.name] += 1
        open_ended = [pool for pool in busy if pool.workers is None]
        while open_ended:
            open_ended = [pool for pool in open_ended if _take(pool, node, free)]
            for pool in open_ended:
                found[pool.name] += 1
    for pool in busy:
        if pool.workers is None:
            wanted[pool.name] = max(1, min(found[pool.name], loads[pool.name]))
    return {name: wanted.get(name, 0) for name in known}


def has_room(pool: Pool, nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Tells whether a worker of the pool could ever run on one of these nodes."""
    return any(_take(pool, node, dict(node["Resources"])) for node in nodes if node.get("Alive"))


def _take(pool: Pool, node: Mapping[str, Any], free: dict[str, float]) -> bool:
    if not pool.fits_on(node) or any(free.get(name, 0) < amount for name, amount in pool.needs.items()):
        return False
    for name, amount in pool.needs.items():
        free[name] -= amount
    return True


def _pool(
    name: str,
    section: PoolConfig,
    engine: EngineConfig,
    settings: WorkerSettings,
    *,
    has_gpus: bool,
    runtime_env: Mapping[str, Any],
) -> Pool:
    for key in _LOCAL_ONLY_FOR_ALL:
        given = section.runtime_env.get(key, [])
        local = next((path for path in ([given] if isinstance(given, str) else given) if "://" not in path), None)
        if local is not None:
            raise ConfigError(
                f"engine.pools.{name}.runtime_env.{key}: {local} is a folder of this machine, which Ray takes for all workers "
                f"alike; write it in engine.runtime_env.{key}, or give the URI of a zip file"
            )
    made = replace(
        settings,
        threads=section.threads or settings.threads,
        batch=section.batch or settings.batch,
    )
    needs: dict[str, float] = {"CPU": made.threads}
    gpus = engine.gpus if section.gpus is None else section.gpus
    if gpus and (made.device.startswith("cuda") or (made.device == "auto" and has_gpus)):
        needs["GPU"] = gpus
    memory_mb = section.memory_mb or engine.memory_mb
    if memory_mb is not None:
        needs["memory"] = memory_mb << 20
    return Pool(
        name=name,
        settings=made,
        workers=section.workers,
        needs=needs,
        node_labels={**engine.node_labels, **section.node_labels},
        runtime_env={**runtime_env, **section.runtime_env},
    )
