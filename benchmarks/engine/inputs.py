"""Makes the inputs of `benchmarks.engine`: JPEGs as photographs have them, huge ones, and pipelines over folders of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks import scenes

QUALITY = 90
SIDES_PX = (500, 1000)  # of the ordinary ones, both sides
HUGE_PX = (11_500, 8_700)  # 100 million pixels
_SCENES = 8  # drawn once, cut many times


def make_images(folder: Path, count: int, *, sides_px: tuple[int, int] = SIDES_PX, seed: int = 0) -> list[Path]:
    """Makes `count` JPEGs of varied sizes: cuts of photographs that ship inside scikit-image, every fifth of a scene.

    Every second one has a caption beside it. What is there already stays.
    """
    import skimage.data

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    if all(path.exists() for path in paths):
        return paths
    drawn = [scenes.render(index, seed=seed, size=min(448, sides_px[1])) for index in range(_SCENES)]
    photographs = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    for number, path in enumerate(paths):
        generator = np.random.default_rng((seed, number))
        scene = drawn[number // 5 % len(drawn)] if number % 5 == 0 else None
        source = photographs[number % len(photographs)] if scene is None else scene.rgb
        width, height = (int(side) for side in generator.integers(sides_px[0], sides_px[1] + 1, 2))
        image = cv2.resize(_cut(source, generator), (width, height), interpolation=cv2.INTER_CUBIC)
        # A camera's noise: without it enlarged pictures are smoother than photographs, and decode faster.
        noise = generator.normal(0, 3, (height, width, 1)).astype(np.float32)
        write_jpeg(path, np.clip(image + noise, 0, 255).astype(np.uint8))
        if number % 2:
            path.with_suffix(".txt").write_text(scene.caption if scene else f"a photograph, number {number}")
    return paths


def _cut(source: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns a window of at least two thirds of a picture's sides."""
    height, width = (int(generator.integers(2 * side // 3, side + 1)) for side in source.shape[:2])
    top, left = (
        int(generator.integers(0, have - want + 1)) for have, want in zip(source.shape, (height, width), strict=False)
    )
    return source[top : top + height, left : left + width]


def make_huge(folder: Path, count: int) -> None:
    """Makes `count` JPEGs of 100 million pixels, each 300 MB when decoded."""
    width, height = HUGE_PX
    columns, rows = np.arange(width, dtype=np.uint16), np.arange(height, dtype=np.uint16)[:, None]
    image = np.stack([(columns + rows) % 256, (columns // 2 + rows) % 256, (columns + rows // 3) % 256], -1)
    for number in range(count):
        write_jpeg(folder / f"huge{number}.jpg", image.astype(np.uint8))


def write_jpeg(path: Path, rgb: np.ndarray) -> None:
    """Writes RGB pixels."""
    cv2.imwrite(str(path), np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def pipeline(
    source: Path, workspace: Path, modalities: Mapping[str, Mapping[str, Any]], *, part_rows: int, **engine: Any
) -> dict[str, Any]:
    """Returns a pipeline file's content: one corpus, `photos`."""
    return {
        "workspace": str(workspace),
        "corpora": {"photos": {"source": str(source), "part_rows": part_rows, "modalities": dict(modalities)}},
        "engine": engine,
    }


def folder_of(paths: Sequence[Path], folder: Path) -> Path:
    """Makes a folder with links to some images (one may occur several times) and to their captions: a corpus of its own."""
    folder.mkdir(parents=True)
    for number, path in enumerate(paths):
        for name in (path, path.with_suffix(".txt")):
            if name.exists():
                (folder / f"{number:05d}{name.suffix}").hardlink_to(name)
    return folder
