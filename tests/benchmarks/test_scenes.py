"""The scenes' labels agree with each other, with the picture and with the words of the caption."""

import colorsys
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import scenes
from labelers.protocol import check_label
from manifests.modality import get

NAME = r"a (small|large) (floating )?(\w+) (\w+)"
CAPTION = re.compile(
    rf"{NAME}(?: (left of|right of|in front of|behind) {NAME}(?: and (left of|right of|in front of|behind) {NAME})?)?"
    r" (on|over) a (\w+) floor"
)
SEEDS_AND_INDICES = [(0, index) for index in range(40)] + [(7, index) for index in range(8)]


@pytest.fixture(scope="module")
def rendered() -> list[scenes.Scene]:
    return [scenes.render(index, seed=seed) for seed, index in SEEDS_AND_INDICES]


def _color_name(rgb: np.ndarray) -> str:
    """The word for a color, by hue and not by the renderer's table."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(rgb / 255))
    if saturation < 0.3:
        return "white" if value > 0.35 else "black"
    for last_degree, name in (
        (15, "red"),
        (39, "orange"),
        (70, "yellow"),
        (175, "green"),
        (250, "blue"),
        (315, "purple"),
    ):
        if 360 * hue < last_degree:
            return name
    return "red"


def _told(caption: str) -> tuple[list[tuple[str, ...]], list[str], str, str]:
    """Names (size, floating, color, shape), relations of the first to the others, on or over, ground."""
    match = CAPTION.fullmatch(caption)
    assert match, caption
    words = match.groups(default="")
    names = [words[start : start + 4] for start in (0, 5, 10) if words[start]]
    return names, [words[at] for at in (4, 9) if words[at]], words[14], words[15]


def test_equal_arguments_give_equal_scenes():
    one, two = scenes.render(3, seed=5), scenes.render(3, seed=5)
    for name in ("rgb", "depth", "normals", "segmentation", "instances"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name
    assert (one.boxes, one.caption, one.solids) == (two.boxes, two.caption, two.solids)
    assert one.solids != scenes.render(4, seed=5).solids
    assert one.solids != scenes.render(3, seed=6).solids


def test_labels_are_what_their_modalities_say(rendered):
    scene = rendered[0]
    for name in ("rgb", "depth", "normals", "segmentation"):
        check_label(get(name), getattr(scene, name))
    fields = get("boxes").fields
    check_label(get("boxes"), [{name: box[name] for name in fields} for box in scene.boxes])


def test_null_markers_mean_sky_and_nothing_else(rendered):
    for scene in rendered:
        is_sky = scene.segmentation == scenes.CLASSES.index("sky")
        assert is_sky.any()
        assert not is_sky.all()
        assert np.array_equal(np.isnan(scene.depth), is_sky)
        assert np.array_equal((scene.normals == 0).all(axis=2), is_sky)
        depth, normals = scene.depth[~is_sky], scene.normals[~is_sky]
        assert depth.min() > 0.5
        assert depth.max() <= scenes.FAR_M
        assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-4)
        assert not scene.instances[is_sky].any()


def test_surfaces_face_the_camera(rendered):
    for scene in rendered:
        points = _points(scene)[~np.isnan(scene.depth)]
        toward = (points * scene.normals[~np.isnan(scene.depth)]).sum(axis=1) / np.linalg.norm(points, axis=1)
        assert toward.max() < 2e-3  # a tenth of a degree, for rounding at a cone's tip


def test_segmentation_instances_and_boxes_tell_the_same(rendered):
    for scene in rendered:
        present = [int(number) for number in np.unique(scene.instances) if number]
        assert present == list(range(1, len(scene.boxes) + 1))
        assert np.array_equal(scene.instances > 0, scene.segmentation >= 2)
        for number, box in zip(present, scene.boxes, strict=True):
            mask = scene.instances == number
            assert mask.sum() >= 150
            assert {scenes.CLASSES[index] for index in np.unique(scene.segmentation[mask])} == {box["class"]}
            height, width = mask.shape
            rows, columns = np.nonzero(mask)
            extent = columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
            assert (box["x0"], box["y0"], box["x1"], box["y1"]) == pytest.approx(extent, abs=1e-9)
            assert box["score"] == 1.0


def _points(scene: scenes.Scene) -> np.ndarray:
    """Camera coordinates (h, w, 3) of what each pixel shows, from depth and intrinsics."""
    rows, columns = np.indices(scene.depth.shape) + 0.5
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=2) @ np.linalg.inv(scenes.intrinsics(len(scene.depth))).T
    return rays * scene.depth[..., None]


def test_normals_are_the_slope_of_the_depth(rendered):
    for scene in rendered:
        points, normals = _points(scene), scene.normals
        across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        slope = -np.cross(across, down)
        slope /= np.linalg.norm(slope, axis=2, keepdims=True)
        center = normals[1:-1, 1:-1]
        sides = (normals[1:-1, 2:], normals[1:-1, :-2], normals[2:, 1:-1], normals[:-2, 1:-1])
        labels = scene.instances.astype(int) + 10 * np.isnan(scene.depth)
        label = labels[1:-1, 1:-1]
        sides_labels = (labels[1:-1, 2:], labels[1:-1, :-2], labels[2:, 1:-1], labels[:-2, 1:-1])
        is_inside = np.logical_and.reduce([side == label for side in sides_labels])
        is_smooth = np.logical_and.reduce([(side * center).sum(axis=2) > 0.98 for side in sides])
        for number in range(len(scene.boxes) + 1):
            checked = is_inside & is_smooth & (label == number)
            assert checked.sum() > 50
            degrees = np.degrees(np.arccos(np.clip((slope * center).sum(axis=2)[checked], -1, 1)))
            assert np.median(degrees) < 0.5
            assert np.quantile(degrees, 0.98) < 3


def test_captions_name_the_solids_by_the_colors_and_shapes_that_are_seen(rendered):
    for scene in rendered:
        names, relations, place, ground = _told(scene.caption)
        assert len(names) == len(scene.boxes) == len(relations) + 1
        assert {(color, shape) for _, _, color, shape in names} == {(box["color"], box["class"]) for box in scene.boxes}
        assert ground in scenes.GROUNDS
        assert (place == "over") == bool(names[0][1])
        for number, (box, solid) in enumerate(zip(scene.boxes, scene.solids, strict=True), start=1):
            assert _color_name(np.median(scene.rgb[scene.instances == number], axis=0)) == box["color"], scene.caption
            name = next(name for name in names if name[2] == box["color"])
            half_width = scenes.SIZES[name[0]] * scenes.SHAPES[solid.shape][0]
            assert solid.half_m[0] == pytest.approx(half_width, rel=0.1)


def test_relations_are_true_in_the_picture(rendered):
    for scene in rendered:
        names, relations, _, _ = _told(scene.caption)
        number_of = {box["color"]: number for number, box in enumerate(scene.boxes, start=1)}
        masks = [scene.instances == number_of[color] for _, _, color, _ in names]
        columns = [float(np.nonzero(mask)[1].mean()) / 224 for mask in masks]
        depths = [float(scene.depth[mask].mean()) for mask in masks]
        for relation, column, depth in zip(relations, columns[1:], depths[1:], strict=True):
            lead = {
                "left of": column - columns[0],
                "right of": columns[0] - column,
                "in front of": depth - depths[0],
                "behind": depths[0] - depth,
            }[relation]
            assert lead > (0.08 if relation in ("left of", "right of") else 0.35), scene.caption


def test_floating_solids_have_the_floor_far_behind_their_lower_edge(rendered):
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for scene in rendered:
        for number, solid in enumerate(scene.solids, start=1):
            rows, columns = np.nonzero(scene.instances == number)
            lowest = rows.argmax()
            below = rows[lowest] + 1, columns[lowest]
            if scene.segmentation[below] == scenes.CLASSES.index("ground"):
                gaps[solid.is_floating].append(float(scene.depth[below] - scene.depth[rows[lowest], columns[lowest]]))
    assert len(gaps[True]) >= 5
    assert len(gaps[False]) >= 20
    assert max(gaps[False]) < 0.4 < min(gaps[True])


def test_another_size_shows_the_same_layout():
    for index in range(6):
        small, large = scenes.render(index, size=64), scenes.render(index, size=192)
        assert (small.solids, small.caption) == (large.solids, large.caption)
        # At three times the size, every third pixel's center is a center of the small picture.
        same = small.instances == large.instances[1::3, 1::3]
        assert same.mean() > 0.999
        depth, expected = small.depth[same], large.depth[1::3, 1::3][same]
        assert np.isclose(depth, expected, atol=2e-3, rtol=1e-3, equal_nan=True).mean() > 0.999


def test_everything_that_is_named_occurs():
    sample = [scenes.render(index, seed=1, size=32) for index in range(150)]
    told = [_told(scene.caption) for scene in sample]
    assert {len(names) for names, *_ in told} == {1, 2, 3}
    assert {relation for _, relations, *_ in told for relation in relations} == set(scenes.RELATIONS)
    assert {ground for *_, ground in told} == set(scenes.GROUNDS)
    solids = [solid for scene in sample for solid in scene.solids]
    assert {solid.shape for solid in solids} == set(scenes.SHAPES)
    assert {solid.color for solid in solids} == set(scenes.COLORS)
    assert {solid.size for solid in solids} == set(scenes.SIZES)
    assert all(scene.caption.isascii() and scene.caption == scene.caption.lower() for scene in sample)


@pytest.mark.parametrize("wrong", [{"index": -1}, {"index": 0, "seed": -1}, {"index": 0, "size": 31}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected index >= 0, seed >= 0, size from 32 to 4096 px"):
        scenes.render(**wrong)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _read(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert picture is not None
    return picture


def test_written_files_hold_the_scene(tmp_path: Path):
    scenes.write(tmp_path, 1, seed=2, size=96, start=5)
    scene = scenes.render(5, seed=2, size=96)
    kinds = ("images", "depth", "normals", "segmentation", "instances")
    assert set(_files(tmp_path)) == {f"{kind}/000005.png" for kind in kinds} | {
        "images/000005.txt",
        "boxes/000005.json",
    }
    rgb, depth, normals, segmentation, instances = (_read(tmp_path / kind / "000005.png") for kind in kinds)
    is_sky = np.isnan(scene.depth)
    assert np.array_equal(rgb[..., ::-1], scene.rgb)
    assert depth.dtype == np.uint16
    assert np.array_equal(depth == 0, is_sky)
    assert np.allclose(depth[~is_sky] / 1000, scene.depth[~is_sky], atol=0.00051)
    assert np.array_equal((normals == 128).all(axis=2), is_sky)
    assert np.abs(normals[..., ::-1][~is_sky] / 255 * 2 - 1 - scene.normals[~is_sky]).max() < 1 / 254
    assert np.array_equal(segmentation, scene.segmentation)
    assert np.array_equal(instances, scene.instances)
    assert (tmp_path / "images/000005.txt").read_text() == scene.caption
    assert json.loads((tmp_path / "boxes/000005.json").read_text()) == scene.boxes


def test_the_command_writes_the_bytes_of_write_and_a_sheet(tmp_path: Path):
    page = tmp_path / "sheet.png"
    root = Path(scenes.__file__).parents[1]
    options = ["--count", "3", "--seed", "4", "--size", "64", "--workers", "2", "--sheet", str(page)]
    command = [sys.executable, "-m", "benchmarks.scenes", str(tmp_path / "one"), *options]
    subprocess.run(command, check=True, cwd=root)
    scenes.write(tmp_path / "two", 3, seed=4, size=64)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    scenes.write(tmp_path / "two", 3, seed=4, size=64)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert _read(page).shape == (3 * (64 + 24), 5 * 64, 3)


def test_the_renderer_needs_numpy_and_opencv_alone():
    code = "import sys, benchmarks.scenes; print(sorted({'torch', 'manifests', 'labelers', 'PIL'} & set(sys.modules)))"
    root = Path(scenes.__file__).parents[1]
    shown = subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"
