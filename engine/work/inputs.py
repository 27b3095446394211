"""Defines what every stage of the work is given: the worker's settings, and the samples with where their bytes lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.plan.corpus import CorpusPlan
from engine.sources.read import SourceReader
from manifests.formats.shards import Sample
from manifests.store.storage import Storage

_GPU_DECODE_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Says how a worker works. Only `batch`, `threads` and `dtype` can show in its output, and the run records those.

    decode_threads   threads that decode; None: `threads` on a CPU, more beside a GPU
    run              the run's name, under which marks lie
    """

    threads: int
    batch: int
    decode_threads: int | None
    queue_bytes: int
    device: str
    run: str = ""
    dtype: str = "auto"
    compile: bool = False
    models_bytes: int = 16 << 30
    batch_deadline_s: float = 600.0
    spill_after_s: float = 600.0

    @property
    def decoders(self) -> int:
        """Returns how many threads decode at once."""
        return self.decode_threads or (self.threads if self.device == "cpu" else _GPU_DECODE_THREADS)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Holds what all stages share that work on some samples: those of a part, or those that a tokenizer is fitted on."""

    plan: CorpusPlan
    samples: Sequence[Sample]
    source: SourceReader
    storage: Storage
    settings: WorkerSettings
