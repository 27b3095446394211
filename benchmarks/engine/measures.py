"""Measures the engine for `benchmarks.engine`: each function sets some of the figures that are named there."""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine import bare, inputs, raydata, runs, weights
from benchmarks.engine.bench import Bench, Figures, process, rate, ray_of_two
from benchmarks.engine.memory import peak_mb, slope_mb_per_100_parts
from manifests.pixels.images import header_of

LIGHT = {name: {"keep": True, "tokens": False} for name in bare.LIGHT}
SIX_LIGHT = {name: {"keep": True, "tokens": False} for name in (*bare.LIGHT, "boxes", "caption")}
TINY = "benchmarks.engine.weights:TINY_GLOBAL"
# What docs/running.md says a worker of light labelers takes beside what lies decoded.
BASE_MB = 500


def light(bench: Bench) -> None:
    """Sets light_ms_per_image, light_over_loop, over_ray_data_light."""
    # By default a part has 2,048 rows. The first part is the start.
    part_rows = max(32, round(256 * bench.scale))
    images = bench.images[:part_rows]
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else [0, 1]
    with process(cores[0]) as one, process(cores[-1]) as two:
        functions = one.submit(bare.light_functions_ms, images[:: max(1, part_rows // 64)]).result()
        spent = ", ".join(f"{name} {ms:.2f}" for name, ms in functions.items())
        bench.say(f"{'milliseconds an image':<26} {spent}")
        bench.figures["light_ms_per_image"] = sum(functions[name] for name in ("palette", "metadata", "edges"))

        def alone() -> Figures:
            pipeline = bench.pipeline(2 * part_rows, LIGHT, part_rows=part_rows, runner="local", workers=1)
            return one.submit(runs.run, pipeline, workers=1).result()

        def loop() -> Figures:
            return one.submit(bare.light_loop, images, bench.new("loop")).result()

        of_one = bench.compare("light, one core", alone, loop, cpu=True)

        # Enough parts that the last ones, beside which the other worker has nothing to do, weigh little.
        many = bench.rows(512, 32)
        twice = [bench.images[row % len(bench.images)] for row in range(many)]

        def loops() -> Figures:
            halves = [
                pool.submit(bare.light_loop, twice[start::2], bench.new("loop"))
                for start, pool in enumerate((one, two))
            ]
            both = [half.result() for half in halves]
            return {"wall_s": max(half["wall_s"] for half in both), "rows": many}

        with ray_of_two(bench):
            of_two = bench.compare("light, two cores", lambda: on_ray(bench, many, 32, LIGHT), loops)
            bench.figures["light_over_loop"] = min(of_one, of_two)
            some = bench.rows(128, 16)

            def ray_data() -> Figures:
                return raydata.run(bench.images[:some], bench.new("ray-data"))

            bench.figures["over_ray_data_light"] = bench.compare(
                "light, Ray Data", lambda: on_ray(bench, some, 16, LIGHT), ray_data
            )


def on_ray(bench: Bench, rows: int, part_rows: int, modalities: dict[str, Any], **engine: Any) -> Figures:
    """Runs the engine on the Ray that runs, with two workers."""
    workers = raydata.WORKERS
    pipeline = bench.pipeline(rows, modalities, part_rows=part_rows, runner="ray", workers=workers, **engine)
    return runs.run(pipeline, workers=workers)


def tiny(bench: Bench) -> dict[str, Any]:
    """Returns options of the modality that a small DINOv2 makes; saves its checkpoint."""
    return _neural(bench, weights.dinov2_tiny, "benchmarks.engine.weights:TinyDinov2")


def _neural(bench: Bench, save: Callable[[Path], Path], labeler: str) -> dict[str, Any]:
    checkpoint = bench.folder / save.__name__
    if not checkpoint.exists():
        with process() as pool:
            pool.submit(_quietly, save, checkpoint).result()
    return {"labeler": labeler, "keep": True, "tokens": False, "parameters": {"checkpoint": str(checkpoint)}}


def _quietly(save: Callable[[Path], Path], checkpoint: Path) -> None:
    """Saves a checkpoint without the library's bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    save(checkpoint)


def neural(bench: Bench) -> None:
    """Sets engine_over_bare_tiny: one thread decodes, one computes, in parts of 32 batches (by default a part has 64)."""
    part_rows = 32 * max(2, round(32 * bench.scale))
    # The first part is the start.
    rows = 2 * part_rows
    options = tiny(bench)
    labeler, checkpoint = options["labeler"], options["parameters"]["checkpoint"]
    with process() as pool:

        def ours() -> Figures:
            pipeline = bench.pipeline(
                rows,
                {TINY: options},
                part_rows=part_rows,
                runner="local",
                workers=1,
                threads=1,
                batch=32,
                decode_threads=1,
            )
            pipeline["corpora"]["photos"]["decode_short"] = bare.SIDE
            return pool.submit(runs.run, pipeline, workers=1).result()

        def theirs() -> Figures:
            given = {"batch": 32, "threads": 1, "batches": part_rows // 32}
            return pool.submit(bare.bare_model, labeler, checkpoint, bench.images, **given).result()

        bench.figures["engine_over_bare_tiny"] = bench.compare("tiny DINOv2, bare model", ours, theirs, cpu=True)


def neural_on_ray(bench: Bench) -> None:
    """Sets over_ray_data_neural: both decode photographs whole, both have two workers with one thread each."""
    rows = bench.rows(256, 16)
    options = tiny(bench)
    given = {
        "labeler": options["labeler"],
        "parameters": options["parameters"],
        "modality": "tiny_global",
        "batch": 16,
    }
    with ray_of_two(bench):
        bench.figures["over_ray_data_neural"] = bench.compare(
            "tiny DINOv2, Ray Data",
            lambda: on_ray(bench, rows, 16, {TINY: options}, batch=16),
            lambda: raydata.run(bench.images[:rows], bench.new("ray-data"), given),
        )


def dinov2(bench: Bench) -> None:
    """Sets engine_over_bare_dinov2: the true size, in parts of three batches (by default a part has 256 of this size)."""
    options = _neural(bench, weights.dinov2, "dinov2")
    checkpoint = options["parameters"]["checkpoint"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batch = 8
    part_rows = 3 * batch
    rows = part_rows * max(2, round(48 * bench.scale / part_rows))
    with process() as pool:

        def theirs() -> Figures:
            given = {"batch": batch, "threads": cores, "batches": rows // batch // 2}
            return pool.submit(bare.bare_model, "dinov2", checkpoint, bench.images, **given).result()

        def ours() -> Figures:
            # One part more, which is the start.
            pipeline = bench.pipeline(
                rows + part_rows,
                {"dinov2_global": options},
                part_rows=part_rows,
                runner="local",
                workers=1,
                threads=cores,
                batch=batch,
            )
            return pool.submit(runs.run, pipeline, workers=1).result()

        # A round takes long enough for the machine's speed to drift: each of ours stands between two of the bare model.
        others, own = [theirs()], []
        for _ in range(bench.rounds):
            own.append(ours())
            others.append(theirs())
    ratios = [
        2 * rate(one) / (rate(before) + rate(after))
        for one, before, after in zip(own, others, others[1:], strict=False)
    ]
    bench.starts_s["DINOv2-B"] = own[0]["start_s"]
    ratio = bench.figures["engine_over_bare_dinov2"] = statistics.median(ratios)
    mine, bares = (", ".join(f"{rate(one):.2f}" for one in column) for column in (own, others))
    bench.say(f"{'DINOv2-B, bare model':<26} {mine} images/s between {bares}: {ratio:.3f}")


def fused(bench: Bench) -> None:
    """Sets fused_over_separate, on one core: on a machine whose cores all have work no decode comes free."""
    rows = bench.rows(128, 32)
    every = {**SIX_LIGHT, TINY: tiny(bench), "depth": _neural(bench, weights.depth_tiny, "dpt")}
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    with process(core) as pool:

        def seconds(modalities: dict[str, Any]) -> float:
            pipeline = bench.pipeline(rows, modalities, part_rows=32, runner="local", workers=1)
            figures = pool.submit(runs.run, pipeline, workers=1).result()
            return figures["wall_s"] / figures["rows"]

        seconds(every)
        separate, together = [], []
        for _ in range(bench.rounds):
            together.append(seconds(every))
            separate.append({name: seconds({name: options}) for name, options in every.items()})
    ratios = [sum(each.values()) / one for each, one in zip(separate, together, strict=True)]
    ratio = bench.figures["fused_over_separate"] = statistics.median(ratios)
    shares = ", ".join(f"{name.rpartition(':')[2]} {1000 * each:.1f}" for name, each in separate[0].items())
    bench.say(f"{'fused':<26} {1000 * together[0]:.1f} ms an image against {shares}: {ratio:.3f}")


def memory(bench: Bench) -> None:
    """Sets worker_rss_mb_max, worker_rss_slope_mb_per_100_parts."""
    small = bench.folder / "small"
    parts = max(8, round(400 * bench.scale))
    some = inputs.make_images(bench.folder / "of-small", min(400, parts * 4), sides_px=(200, 400), seed=1)
    inputs.folder_of([some[row % len(some)] for row in range(parts * 4)], small)
    huge = bench.folder / "huge"
    inputs.folder_of(bench.images[:28], huge)
    inputs.make_huge(huge, 4)
    queue_mb = 512
    options: dict[str, Any] = {"runner": "local", "workers": 1, "device": "cpu", "queue_mb": queue_mb}
    few = inputs.folder_of(some[:200], bench.folder / "few")
    warm = inputs.pipeline(few, bench.new("workspace"), LIGHT, part_rows=len(some[:200]) // 2, **options)
    big = inputs.pipeline(huge, bench.new("workspace"), LIGHT, part_rows=16, **options)
    many = inputs.pipeline(small, bench.new("workspace"), LIGHT, part_rows=4, **options)
    with process() as pool:
        peak = pool.submit(peak_mb, warm, big).result()
    with process() as pool:
        slope = pool.submit(slope_mb_per_100_parts, many).result()
    bench.figures["worker_rss_mb_max"] = peak["rss_mb_max"]
    bench.figures["worker_rss_slope_mb_per_100_parts"] = slope["mb_per_100_parts"]
    bound = BASE_MB + max(queue_mb, header_of((huge / "huge0.jpg").read_bytes()).decode_bytes / 2**20)
    bench.say(
        f"{'memory':<26} {peak['rss_mb_before']:.0f} MB after ordinary images, at most {peak['rss_mb_max']:.0f} MB with four "
        f"of 100 megapixels (300 MB decoded) and a queue of {queue_mb} MB; bound {bound:.0f} MB"
    )
    bench.say(
        f"{'memory, many parts':<26} {slope['mb_per_100_parts']:+.2f} MB per 100 parts over the second half of "
        f"{slope['parts']:.0f} parts, {slope['rss_mb_last']:.0f} MB at the end"
    )


def driver(bench: Bench) -> None:
    """Sets driver_efficiency_64, driver_ms_per_item, driver_mb_growth."""
    from benchmarks.engine.driver import measure

    for name, value in measure(bench.folder / "driver", quick=bench.scale <= 1).items():
        bench.figures[name] = value
        bench.say(f"{name:<26} {value:.3f}")


MEASURES: dict[str, Callable[[Bench], None]] = {
    measure.__name__: measure for measure in (light, neural, neural_on_ray, dinov2, fused, driver, memory)
}
