"""Keeps what a probe of some samples measured, and estimates by it what the work to do takes.

Figures are kept in the user's cache by recipe, source and machine: the head of a later run estimates by them, and groups
of labelers are made by the measured sizes of their models. `engine/run/probe.py` takes them.
"""

import functools
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.pipeline.config import EngineConfig
from engine.plan import corpus, weights
from engine.plan.corpus import CorpusPlan, LabelerUse
from manifests import units
from manifests.recipe import canonical_json, sha256_hex
from manifests.store.storage import cache_folder, replace_file
from manifests.store.uris import without_credentials

# Raised by hand when what is measured changes: older figures are then not used.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds what a labeler takes for one sample on this machine.

    `label_s` is of its own calls; `rest_s` is what its group took beside the calls of labelers: decoding, crops, tokens,
    files. `bytes_by_form` are written bytes by "modality/form".
    """

    label_s: float
    rest_s: float
    bytes_by_form: Mapping[str, float]
    model_bytes: int
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Holds what some work takes: hours of one worker, bytes written (NaN if that is not known)."""

    hours: float
    size_bytes: float
    on_gpu: bool

    @property
    def hours_words(self) -> str:
        """Returns the hours as a person reads them: "1,234", "5.6", "<0.01"."""
        return "<0.01" if self.hours < 0.01 else f"{self.hours:,.2f}" if self.hours < 100 else f"{self.hours:,.0f}"

    def words(self, price: float | None) -> str:
        """Returns the cost in words, as in "1.2 GPU-hours, 3.4 GB written, 2.40 dollars"."""
        said = [f"{self.hours_words} {'GPU' if self.on_gpu else 'worker'}-hours"]
        if not math.isnan(self.size_bytes):
            said.append(f"{units.size(self.size_bytes)} written")
        if price is not None:
            said.append(f"{self.hours * price:,.2f} dollars")
        return ", ".join(said)

    def wall(self, workers: int) -> str:
        """Returns the time that some workers take together, as in "0:12:00 at 10 workers"."""
        return f"{units.span(3600 * self.hours / workers)} at {workers:,} worker{'s' * (workers != 1)}"


def total(costs: Iterable[Cost]) -> Cost:
    """Returns the sum of some costs."""
    found = list(costs)
    return Cost(
        hours=sum(cost.hours for cost in found),
        size_bytes=sum(cost.size_bytes for cost in found),
        on_gpu=any(cost.on_gpu for cost in found),
    )


def costs(rows: int, labelers: Sequence[tuple[Measured, int, Mapping[str, float]]]) -> list[Cost]:
    """Returns what a group takes: each of its labelers, and last what they share.

    `rows` is how many samples the group reads. `labelers` has for each: what was measured, how many samples it labels, and
    for how many samples it writes each "modality/form".
    """
    found = []
    for measured, count, samples in labelers:
        size = sum(measured.bytes_by_form.get(form, math.nan) * written for form, written in samples.items())
        hours = count * measured.label_s / 3600
        found.append(Cost(hours=hours, size_bytes=size, on_gpu=measured.on_gpu))
    # The rest was measured with all labelers of a group at work. With fewer of them it is at most as much.
    rest_s = max((measured.rest_s for measured, _, _ in labelers), default=0.0)
    on_gpu = any(cost.on_gpu for cost in found)
    return [*found, Cost(hours=rows * rest_s / 3600, size_bytes=0, on_gpu=on_gpu)]


def known(plan: CorpusPlan, use: LabelerUse, engine: EngineConfig, pool: str = "") -> Measured | None:
    """Returns what an earlier probe on such a machine measured of a labeler in a corpus, None if there was no such probe."""
    try:
        return Measured(**json.loads(_file(plan, use, engine, pool).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def keep(plan: CorpusPlan, use: LabelerUse, engine: EngineConfig, pool: str, measured: Measured) -> None:
    """Keeps what was measured for `known`."""
    replace_file(_file(plan, use, engine, pool), json.dumps(asdict(measured)).encode())


def model_bytes(plan: CorpusPlan, use: LabelerUse, engine: EngineConfig, pool: str = "") -> int:
    """Returns the bytes of a labeler's models: as measured, or else those of its weights' files; 0 for one without weights."""
    if use.weights is None:
        return 0
    measured = known(plan, use, engine, pool)
    return measured.model_bytes if measured else weights.resolve(str(use.parameters["checkpoint"])).size_bytes


def _file(plan: CorpusPlan, use: LabelerUse, engine: EngineConfig, pool: str) -> Path:
    own = engine.pools.get(pool)
    document: dict[str, Any] = {
        "version": _VERSION,
        "labeler": corpus.identity(use),
        "labels": [plan.modalities[o.name].label.fingerprint for o in use.outputs if o.name in plan.modalities],
        "source": without_credentials(plan.config.source),
        "crops": plan.crops,
        "machine": machine(),
        "threads": (own and own.threads) or engine.threads,
        "batch": (own and own.batch) or engine.batch,
        "device": engine.device,
        "dtype": engine.dtype,
        "compile": engine.compile,
    }
    return cache_folder() / "probes" / f"{sha256_hex(canonical_json(document))[:24]}.json"


@functools.cache
def machine() -> dict[str, Any]:
    """Returns the hardware that a probe's figures hold for; a moment's work, without torch."""
    lines = _text("/proc/cpuinfo").splitlines()
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    found = [_text(path) for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    gpus = [line.partition(":")[2].strip() for text in found for line in text.splitlines() if line.startswith("Model:")]
    return {"cpu": cpu or platform.machine(), "cores": os.cpu_count(), "gpus": gpus}


def machine_words() -> str:
    """Returns the machine in a few words."""
    facts = machine()
    gpus: Sequence[str] = facts["gpus"]
    return ", ".join([f"{facts['cores']} cores", *([f"{len(gpus)} x {gpus[0]}"] if gpus else ["no GPU"])])


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
