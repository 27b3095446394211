"""Holds what the measures of `benchmarks.engine` share: images, folders and processes of their own, and taking turns."""

import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine import bare, inputs, raydata

Figures = dict[str, float]


class Bench:
    """Holds what the measures share: images, folders of their own, processes, and the table."""

    def __init__(self, folder: Path, scale: float, rounds: int) -> None:
        self.folder, self.scale, self.rounds = folder, scale, rounds
        self.figures: Figures = {}
        self.starts_s: dict[str, float] = {}
        self._made = 0
        self.images = inputs.make_images(folder / "images", self.rows(384, 32))

    def rows(self, wanted: int, part_rows: int) -> int:
        """Returns `wanted` rows at this scale, in whole parts, four at least."""
        return part_rows * max(4, round(wanted * self.scale / part_rows))

    def new(self, name: str) -> Path:
        """Returns a folder's path that nothing stands at."""
        self._made += 1
        return self.folder / f"{name}-{self._made}"

    def pipeline(self, rows: int, modalities: dict[str, Any], *, part_rows: int, **engine: Any) -> dict[str, Any]:
        """Returns a pipeline over the first images, repeated if there are fewer, in a workspace of its own."""
        source = self.folder / f"first-{rows}"
        if not source.exists():
            inputs.folder_of([self.images[row % len(self.images)] for row in range(rows)], source)
        options = {"device": "cpu", "queue_mb": 256, **engine}
        return inputs.pipeline(source, self.new("workspace"), modalities, part_rows=part_rows, **options)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def compare(
        self, name: str, ours: Callable[[], Figures], theirs: Callable[[], Figures], *, cpu: bool = False
    ) -> float:
        """Rounds of both, in turns; the median of our images/s over theirs. One round before them warms both up."""
        ratios, cpu_ratios, rates = [], [], []
        for turn in range(self.rounds + 1):
            other, own = theirs(), ours()
            self.starts_s[name] = max(self.starts_s.get(name, 0), own.get("start_s", 0))
            if turn == 0 and self.rounds > 1:
                continue
            rates.append((rate(own), rate(other)))
            ratios.append(rate(own) / rate(other))
            if cpu:
                own_s = own["cpu_s"] / own["cpu_rows"]
                cpu_ratios.append(other["cpu_s"] / other["rows"] / own_s)
        ratio = statistics.median(ratios)
        own_rate, other_rate = (statistics.median(column) for column in zip(*rates, strict=True))
        more = f", by processor time {statistics.median(cpu_ratios):.3f}" if cpu_ratios else ""
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        self.say(f"{name:<26} {own_rate:8.1f} images/s against {other_rate:8.1f}: {ratio:.3f} ({spread}{more})")
        return ratio


def rate(figures: Figures) -> float:
    """Returns images a second."""
    return figures["rows"] / figures["wall_s"]


@contextmanager
def process(core: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Yields a fresh process that does what it is given, one thing after another; on one core, if one is named."""
    context = multiprocessing.get_context("spawn")
    initial: Any = (bare.pin, (core,)) if core is not None else (None, ())
    with ProcessPoolExecutor(1, mp_context=context, initializer=initial[0], initargs=initial[1]) as pool:
        yield pool


@contextmanager
def ray_of_two(bench: Bench) -> Iterator[None]:
    """Starts a Ray with two processors."""
    import ray

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="modmill-ray-") as empty:
        ray.init(
            address="local",
            num_cpus=raydata.WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"working_dir": empty},
        )
        bench.starts_s["ray"] = time.perf_counter() - started
        try:
            yield
        finally:
            ray.shutdown()
