from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import skimage.data

from labelers.palette import Palette
from manifests.errors import ConfigError


def palettes(photo: np.ndarray, **options: int) -> dict[int, list[dict]]:
    (records,) = Palette(**options).label({"image": [photo]})["palette"]
    by_k: dict[int, list[dict]] = {}
    for record in records:
        by_k.setdefault(record["k"], []).append(record)
    return by_k


def colors(records: list[dict]) -> list[tuple[int, int, int]]:
    return [(record["r"], record["g"], record["b"]) for record in records]


def flags() -> np.ndarray:
    photo = np.zeros((128, 256, 3), np.uint8)
    photo[:, :128] = [200, 0, 0]
    photo[:, 128:192] = [0, 180, 0]
    photo[:, 192:] = [0, 0, 160]
    return photo


def test_three_stripes():
    found = palettes(flags())
    assert colors(found[1]) == [(100, 45, 40)]
    assert colors(found[3]) == [(200, 0, 0), (0, 0, 160), (0, 180, 0)]
    assert [record["share"] for record in found[3]] == [0.5, 0.25, 0.25]
    assert [record["rank"] for record in found[3]] == [0, 1, 2]
    # Equal shares: the smaller color comes first.
    assert colors(found[2]) == [(0, 90, 80), (200, 0, 0)]


def test_every_palette_has_exactly_k_colors():
    for photo in (flags(), skimage.data.astronaut(), np.full((5, 5, 3), 9, np.uint8)):
        found = palettes(photo)
        assert list(found) == [1, 2, 3, 4, 5, 6, 7]
        for k, records in found.items():
            assert [record["rank"] for record in records] == list(range(k))
            shares = [record["share"] for record in records]
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) == pytest.approx(1)


def test_fewer_colors_than_k_repeat_the_first_with_no_share():
    found = palettes(flags())
    assert colors(found[5]) == [(200, 0, 0), (0, 0, 160), (0, 180, 0), (200, 0, 0), (200, 0, 0)]
    assert [record["share"] for record in found[5]] == [0.5, 0.25, 0.25, 0, 0]


def test_the_clusters_are_near_the_best():
    photo = skimage.data.coffee()
    pixels = cv2.resize(photo, (64, 64), interpolation=cv2.INTER_AREA).reshape(-1, 3).astype(np.float32)
    for k, records in palettes(photo).items():
        centers = np.array(colors(records), np.float32)
        error = ((pixels[:, None] - centers) ** 2).sum(-1).min(1).sum()
        best = cv2.kmeans(pixels, k, None, (3, 100, 0.01), 10, cv2.KMEANS_PP_CENTERS)[0]
        assert error < 1.15 * best


def test_parameters_decide():
    photo = skimage.data.astronaut()
    assert list(palettes(photo, colors=2)) == [1, 2]
    assert palettes(photo, seed=1) != palettes(photo, seed=0)
    assert palettes(photo, side=16) != palettes(photo)


def test_neither_threads_nor_the_generators_state_matter():
    photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    expected = [palettes(photo) for photo in photos]
    cv2.setRNGSeed(12345)
    with ThreadPoolExecutor(4) as pool:
        for place, found in enumerate(pool.map(palettes, photos * 4)):
            assert found == expected[place % 3]


@pytest.mark.parametrize("wrong", [{"colors": 0}, {"colors": 256}, {"side": 0}])
def test_parameters_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
        Palette(**wrong)
