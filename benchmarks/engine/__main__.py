"""Measures the engine beside what one would write instead: `python -m benchmarks.engine [--quick] [--json] [--only A,B]`.

All on the same images (JPEGs of 500 to 1000 px), in one run. Prints a table, and last one line of JSON:

    engine_over_bare_tiny      images/s of the engine over the bare model on tensors in memory: a DINOv2 of six layers, one
                               thread for the model in both; the engine reads and decodes with another one
    engine_over_bare_dinov2    the same with DINOv2-B (random weights), whose model has all cores in both
    light_over_loop            rgb, edges, metadata, palette: the engine over a plain loop over the same functions, per
                               core; the lower of one core (in this process) and two (on Ray, against two loops)
    light_ms_per_image         palette + metadata + edges of a decoded photograph, milliseconds
    fused_over_separate        six light and two small neural modalities: eight runs over one, seconds on one core
    over_ray_data_light        images/s of the engine on Ray over Ray Data: the light group
    over_ray_data_neural       the same: the tiny DINOv2
    driver_efficiency_64, driver_ms_per_item, driver_mb_growth      of benchmarks.engine.driver
    worker_rss_mb_max          resident megabytes of a worker with photographs of 100 megapixels in its part
    worker_rss_slope_mb_per_100_parts                               how that grows over 200 parts, after 200 others

The two sides of a ratio take turns and the median of the ratios counts. Starting Ray and actors, importing and loading
models lie outside, on both sides, and are printed apart; `benchmarks.engine.runs` says how.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.engine.bench import Bench
from benchmarks.engine.measures import MEASURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two rounds, fewer images: about ten minutes on two cores, some of them the start of 64 workers",
    )
    parser.add_argument("--json", action="store_true", help="the last line only")
    parser.add_argument("--only", help=f"some of: {','.join(MEASURES)}", metavar="A,B")
    parser.add_argument("--scale", type=float, help="images, as a multiple of those of --quick (a test takes 0.1)")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(MEASURES)
    if unknown := set(chosen) - set(MEASURES):
        parser.error(f"--only {','.join(sorted(unknown))}: no such measure; there are {','.join(MEASURES)}")
    scale = options.scale or (1.0 if options.quick else 3.0)
    with tempfile.TemporaryDirectory(prefix="modmill-bench-") as scratch:
        os.environ.setdefault("MODMILL_CACHE", str(Path(scratch, "cache")))
        bench = Bench(Path(scratch), scale, rounds=1 if scale < 0.5 else 2 if scale <= 1 else 5)
        if options.json:
            bench.say = lambda text: None
        for name in chosen:
            MEASURES[name](bench)
            for made in Path(scratch).glob("*-[0-9]*"):
                shutil.rmtree(made)
        starts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in bench.starts_s.items())
        bench.say(f"{'not in these figures':<26} starts (of which the first loads libraries): {starts}")
    print(json.dumps({name: round(value, 4) for name, value in bench.figures.items()}))


if __name__ == "__main__":
    main()
