"""Finds color palettes of 1 to 7 colors by k-means of the photograph's pixels."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from labelers.protocol import LabelerSpec
from manifests.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

# k-means stops after _ITERATIONS, or when no center moves by more than _SHIFT code values. Measured on four photographs:
# the sum of squares is 1.5 % above the best one; twice the iterations at half the shift gain 1 % in twice the time.
_ITERATIONS = 10
_SHIFT = 2.0


class Palette:
    """Makes modality `palette`: for each k from 1 to `colors` exactly k records `{k, rank, r, g, b, share}`, in one list.

    Rank 0 has the largest share; equal shares are ordered by r, g, b. k = 1 is the mean color, the others are OpenCV's
    k-means++ with the seed `seed` on a copy of at most `side` x `side` pixels. A photograph with fewer than k colors
    gives each of them, then repeats the first with share 0, so that every palette has k colors.
    """

    spec = LabelerSpec(
        name="palette",
        version=1,
        scope="image",
        outputs=("palette",),
        # As in labelers/metadata.py.
        batch=2,
        requires=("cv2", "numpy", "PIL"),
    )

    def __init__(
        self,
        colors: Annotated[int, "colors of the largest palette, 1 to 255; a sequence of tokens holds 7"] = 7,
        side: Annotated[int, "longest side, px, of the copy whose pixels are clustered"] = 64,
        seed: Annotated[int, "seed of k-means++"] = 0,
    ) -> None:
        if not 1 <= colors <= 255:
            raise ConfigError(f"palette: colors={colors}; expected 1 to 255 (a palette token sequence holds 7)")
        if side < 1:
            raise ConfigError(f"palette: side={side}; expected a length in pixels of at least 1")
        self.colors, self.side, self.seed = colors, side, seed

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[Any]]:
        return {"palette": [self._palettes(image) for image in batch["image"]]}

    def _palettes(self, image: "np.ndarray") -> list[dict[str, Any]]:
        import numpy as np

        pixels = _small(image, self.side).reshape(-1, 3)
        # Colors as single integers: NumPy finds unique integers many times faster than unique rows.
        codes, counts = np.unique(
            pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32), return_counts=True
        )
        present = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
        records = _records(1, pixels.mean(axis=0, keepdims=True), np.array([len(pixels)]))
        for k in range(2, self.colors + 1):
            if len(present) <= k:
                records += _records(k, present, counts)
            else:
                records += _records(k, *self._cluster(pixels, k))
        return records

    def _cluster(self, pixels: "np.ndarray", k: int) -> tuple["np.ndarray", "np.ndarray"]:
        """Returns centers (k, 3) and their pixel counts (k,)."""
        import cv2
        import numpy as np

        # OpenCV's generator belongs to the thread, so seeding it here disturbs nobody and depends on nobody.
        cv2.setRNGSeed(self.seed)
        stop = (cv2.TERM_CRITERIA_MAX_ITER + cv2.TERM_CRITERIA_EPS, _ITERATIONS, _SHIFT)
        start: Any = None
        _, members, centers = cv2.kmeans(pixels.astype(np.float32), k, start, stop, 1, cv2.KMEANS_PP_CENTERS)
        return centers, np.bincount(members.ravel(), minlength=k)


def _small(image: "np.ndarray", side: int) -> "np.ndarray":
    """Returns a copy of at most side x side pixels, each the mean of its area; nothing is enlarged."""
    import cv2

    from manifests.pixels.crops import reduce

    height, width = image.shape[:2]
    blocks = reduce(image, max(1, height // (2 * side)), max(1, width // (2 * side)))
    return cv2.resize(blocks, (min(side, width), min(side, height)), interpolation=cv2.INTER_AREA)


def _records(k: int, centers: "np.ndarray", counts: "np.ndarray") -> list[dict[str, Any]]:
    """Returns k records from at most k colors (n, 3) that cover `counts` pixels each."""
    import numpy as np

    total = int(counts.sum())
    colors = [tuple(center) for center in np.rint(centers).astype(int).tolist()]
    ranked = sorted(zip(counts.tolist(), colors, strict=True), key=lambda entry: (-entry[0], entry[1]))
    ranked += [(0, ranked[0][1])] * (k - len(ranked))
    return [
        {"k": k, "rank": rank, "r": r, "g": g, "b": b, "share": count / total}
        for rank, (count, (r, g, b)) in enumerate(ranked)
    ]


LABELER = Palette
