"""Tells what each node of a Ray cluster has for modmill, and what is missing: `modmill doctor [TARGET] --ray ADDRESS`.

A task on every node tells its versions, processors, memory and disks, whether its cache folder takes files, whether it
reads what this machine wrote into the workspace's store and writes there what this machine reads, and whether checkpoints
that are named by a path lie there. What differs from this machine, or is missing, is told.
"""

import os
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.pipeline import config as pipeline
from engine.pipeline.sections import EngineConfig
from engine.run.runners.ray.runner import start_ray
from engine.show.tables import plain_lines
from manifests import units
from manifests.errors import ModmillError
from manifests.store.storage import Storage, open_storage

_ANSWER_S = 120.0
_DISK_AT_LEAST_BYTES = 5 << 30
# What must be the same everywhere: Ray's own protocol, and what decides a label.
_SAME = ("python", "ray", "modmill", "torch")


@dataclass(frozen=True, kw_only=True)
class Node:
    """Holds one node: Ray's facts of it, what it told, and what is wrong with it."""

    address: str
    cpus: float
    gpus: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()

    @property
    def works(self) -> bool:
        """Tells whether workers can run there; a head without processors only manages."""
        return self.cpus > 0


def report(address: str, target: str | None = None) -> list[Node]:
    """Looks at the nodes of the cluster at `address`, with the environment that a run would have there.

    `target` is a pipeline file, a workspace, or None. Raises UserError if the cluster is out of reach, ConfigError if the
    pipeline file is not right.
    """
    engine, workspace, checkpoints = _of_target(target)
    with tempfile.TemporaryDirectory(prefix="modmill-ray-") as empty:
        start_ray(address, engine, empty)
        try:
            return _look(workspace, checkpoints)
        finally:
            ray.shutdown()


def text(nodes: Sequence[Node]) -> str:
    """Returns a table, a line a node, and below it what is wrong, a line each."""
    head = (
        "",
        "node",
        "CPUs",
        "GPUs",
        "memory",
        "python",
        "ray",
        "torch",
        "modmill",
        "free temp",
        "free cache",
        "store",
    )
    wrong = [f"WRONG  {node.address}: {problem}" for node in nodes for problem in node.wrong]
    return "\n".join([*plain_lines([head, *map(_row, nodes)]), *wrong])


def _row(node: Node) -> tuple[str, ...]:
    facts = node.facts
    mark = "WRONG" if node.wrong else "ok" if node.works else "-"
    sizes = {name: units.size(facts[name]) if name in facts else "?" for name in ("memory", "temp", "cache")}
    return (
        mark,
        node.address,
        f"{node.cpus:g}",
        f"{node.gpus:g}" + (f" ({facts['gpus']})" if facts.get("gpus") else ""),
        sizes["memory"],
        *(str(facts.get(name) or "-") for name in ("python", "ray", "torch", "modmill")),
        sizes["temp"],
        sizes["cache"],
        str(facts.get("store", "-")),
    )


def _of_target(target: str | None) -> tuple[EngineConfig, str | None, tuple[str, ...]]:
    """Returns the engine's options, the workspace, and the checkpoints that a pipeline file or a workspace names."""
    if target is None:
        return EngineConfig(), None, ()
    if not target.endswith((".yaml", ".yml")):
        return EngineConfig(), target, ()
    config = pipeline.load(Path(target))
    return config.engine, config.workspace, checkpoints_of(config)


def checkpoints_of(config: pipeline.PipelineConfig) -> tuple[str, ...]:
    """Returns the checkpoints of a pipeline's labelers that are paths, which every node must see; others are fetched there."""
    from engine.plan import weights
    from labelers import protocol
    from manifests import modality

    found = set()
    for corpus in config.corpora:
        for name, options in config.modality_options(corpus).items():
            labeler = protocol.find(options.labeler or modality.get(name).labeler)
            given = {"modality": name} if labeler.spec.outputs is None else {}
            checkpoint = protocol.parameters(labeler, {**given, **options.parameters}).get("checkpoint")
            path = Path(os.path.expanduser(str(checkpoint))).absolute()
            if checkpoint and (path.exists() or not ("://" in checkpoint or weights.is_hub_id(checkpoint))):
                found.add(str(path))
    return tuple(sorted(found))


def _look(workspace: str | None, checkpoints: Sequence[str]) -> list[Node]:
    storage = None if workspace is None else open_storage(workspace)
    folder = f"_doctor-{secrets.token_hex(4)}"
    here = _facts(None, "", ())
    is_new = storage is not None and storage.is_local and not Path(storage.full("")).exists()
    if storage is not None:
        storage.put(f"{folder}/driver", folder.encode())
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        # A node without modmill tells so instead of failing to import this module.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ask = ray.remote(num_cpus=0, max_retries=0)(_facts)
        where = None if storage is None else storage.uri
        asked = {
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                where, f"{folder}/{node['NodeID']}", tuple(checkpoints) if node["Resources"].get("CPU") else ()
            ): node
            for node in nodes
        }
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
        found = [
            _judged(asked[reference], _answer(reference) if reference in ready else None, here, storage, folder)
            for reference in asked
        ]
    finally:
        if storage is not None:
            storage.remove_folder(folder)
            if is_new:
                Path(storage.full("")).rmdir()
    return sorted(found, key=lambda node: (node.works, node.address))


def _answer(reference: Any) -> Mapping[str, Any] | str:
    """Returns what a node told, or why it did not."""
    try:
        return ray.get(reference)
    except Exception as error:
        return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _judged(
    node: Mapping[str, Any],
    answer: Mapping[str, Any] | str | None,
    here: Mapping[str, Any],
    storage: Storage | None,
    folder: str,
) -> Node:
    """Returns a node with what is wrong with it."""
    resources = node["Resources"]
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    address = node["NodeManagerAddress"]
    if answer is None or isinstance(answer, str):
        problem = f"no answer in {_ANSWER_S:.0f} s" if answer is None else f"the look at it failed: {answer}"
        return Node(address=address, cpus=cpus, gpus=gpus, wrong=(problem,))
    facts = dict(answer)
    wrong = list(facts.pop("problems"))
    for name in _SAME:
        # Patch releases of Python agree with each other; a head that only manages needs no torch and no modmill.
        there, mine = (str(side[name] or "none") for side in (facts, here))
        if name == "python":
            there, mine = there.rpartition(".")[0], mine.rpartition(".")[0]
        if there != mine and (cpus or name in ("python", "ray")):
            wrong.append(f"{name} {there}, here {mine}; give all nodes one image, or engine.runtime_env")
    for name, words in (("temp", "for temporary files"), ("cache", "in the cache folder (MODMILL_CACHE)")):
        if facts[name] < _DISK_AT_LEAST_BYTES:
            wrong.append(f"{units.size(facts[name])} free {words}; a worker needs {units.size(_DISK_AT_LEAST_BYTES)}")
    if gpus and not facts["gpus"]:
        wrong.append(f"Ray counts {gpus:g} GPUs, nvidia-smi finds none; see the driver, or the container's runtime")
    if storage is not None and facts.get("store") == "ok" and not _wrote(storage, f"{folder}/{node['NodeID']}"):
        facts["store"] = "other"
        wrong.append(
            f"what it writes to {storage.uri} is not seen here; a workspace needs a store that all nodes share"
        )
    return Node(address=address, cpus=cpus, gpus=gpus, facts=facts, wrong=tuple(wrong))


def _wrote(storage: Storage, path: str) -> bool:
    try:
        return bool(storage.read(path))
    except (ModmillError, OSError):
        return False


def _facts(workspace: str | None, probe: str, checkpoints: tuple[str, ...]) -> dict[str, Any]:
    """Tells on a node, maybe without modmill, what it has, and in `problems` what went wrong. Imports stand inside."""
    import os
    import platform
    import shutil
    import subprocess
    import tempfile
    from importlib import metadata
    from pathlib import Path

    problems = []
    facts: dict[str, Any] = {"python": platform.python_version(), "problems": problems}
    for name in ("ray", "torch", "modmill"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    facts["memory"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts["temp"] = facts["cache"] = shutil.disk_usage(tempfile.gettempdir()).free
    facts["gpus"] = ""
    if command := shutil.which("nvidia-smi"):
        query = [command, "--query-gpu=name", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            facts["gpus"] = ", ".join(sorted({line.strip() for line in done.stdout.splitlines() if line.strip()}))
        except (OSError, subprocess.SubprocessError) as error:
            problems.append(f"nvidia-smi failed: {error}; see the driver")
    for checkpoint in checkpoints:
        if not Path(checkpoint).exists():
            problems.append(
                f"checkpoint {checkpoint} is not there; name a path that every node sees, a URI or a hub id"
            )
    if facts["modmill"] is None:
        return facts
    try:
        from manifests.store.storage import cache_folder, open_storage

        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        facts["cache"] = shutil.disk_usage(folder).free
    except Exception as error:
        problems.append(f"the cache folder takes no files ({error}); set MODMILL_CACHE to a folder of a local disk")
        return facts
    if workspace is None or not probe:
        return facts
    facts["store"] = "fails"
    try:
        storage = open_storage(workspace)
        if not storage.exists(f"{Path(probe).parent}/driver"):
            facts["store"] = "other"
            problems.append(f"{workspace} is not the driver's there; a workspace needs a store that all nodes share")
            return facts
        storage.put(f"{probe}-own", b"x")
        storage.read(f"{probe}-own")
        storage.remove(f"{probe}-own")
        storage.put(probe, b"x")
        facts["store"] = "ok"
    except Exception as error:
        problems.append(f"{workspace} cannot be written ({type(error).__name__}: {error}); see its credentials there")
    return facts
