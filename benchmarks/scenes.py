"""Renders procedural scenes with exact labels: shaded solids over a patterned floor, ray cast with numpy.

    python -m benchmarks.scenes OUT --count 1000 --seed 0 --size 224 --workers 2 --sheet sheet.png

Captions are true in the picture, and every label is computed at pixel centers from the rays that make the picture.
Camera: a pinhole at the origin; x right, y down, z along the view. The center of pixel (row, column) is the point
(column + 0.5, row + 0.5) of the picture. Rays have z = 1 there, so that the distance along a ray is the depth. The world
in which the solids stand has the same origin and x; its y is straight down: the camera looks `pitch_rad` below its z.
Below, n rays or points are float32 (3, n), rows x, y, z of the world.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

# Half width and half height, in radii; a cube's width is along its edges.
SHAPES = {"sphere": (1.0, 1.0), "cube": (0.8, 0.8), "cylinder": (0.7, 0.95), "cone": (0.95, 1.1), "dome": (1.0, 0.65)}
CLASSES = ("sky", "ground", *SHAPES)  # segmentation is an index into these; 255, its null marker, does not occur
COLORS = {  # sRGB
    "red": (215, 32, 36),
    "green": (34, 152, 52),
    "blue": (28, 74, 214),
    "yellow": (244, 208, 24),
    "purple": (132, 44, 176),
    "orange": (242, 116, 12),
    "white": (236, 236, 233),
    "black": (32, 32, 35),
}
SIZES = {"small": 0.3, "large": 0.5}  # radius in metres
GROUNDS = ("checkered", "striped", "marbled", "wooden", "tiled", "dotted")
RELATIONS = ("left of", "right of", "in front of", "behind")
FAR_M = 30.0  # depth at which the ground ends and the sky begins
FOCAL = 1.1  # focal length as a share of the picture's side: 48.9 degrees across

# In its own axes a solid spans -1 to 1. All but the cube are turned about y: squared radius p + q y + r y^2.
_PROFILES = {"sphere": (1, 0, -1), "cylinder": (1, 0, 0), "cone": (0.25, 0.5, 0.25), "dome": (0.5, 0.5, 0)}
_SUN, _AMBIENT = 0.86, 0.35  # light on a surface that faces the sun, and from the whole sky
_GAMMA = 2.2  # in place of sRGB's curve, from colors to linear light and back
_CODES = np.rint(255 * np.linspace(0, 1, 4096) ** (1 / _GAMMA)).astype(np.uint8)
_SUBPIXELS = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]], np.float32)[..., None]
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
_PROBE = 56  # side of the picture by which a layout is judged; fixed, so that layouts do not depend on the size
_PROBE_GRID = np.indices((_PROBE, _PROBE), np.float32).reshape(2, -1)
# Once glibc has freed a block this large it keeps smaller ones: page faults were a quarter of the time.
np.empty(7 << 20, np.float32)
_Hits = tuple[np.ndarray, np.ndarray, np.ndarray]  # of n rays, as _trace returns them


@dataclass(frozen=True, kw_only=True)
class Solid:
    """Holds one solid: `center_m` and `yaw_rad` (about the vertical) are in world axes, `half_m` is half width and height."""

    shape: str
    color: str
    size: str
    is_floating: bool
    center_m: tuple[float, float, float]
    half_m: tuple[float, float]
    yaw_rad: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Holds one picture (h = w = size) and its labels.

    rgb            uint8 (h, w, 3) sRGB; edges are anti-aliased
    depth          float32 (h, w), metres along the camera's z axis, over 0 to FAR_M; NaN in the sky
    normals        float32 (h, w, 3), unit vectors, x right, y down, z away from the camera; (0, 0, 0) in the sky
    segmentation   uint8 (h, w), index into CLASSES
    instances      uint8 (h, w), 0 none, i = the i-th solid, from left to right
    boxes          {"class", "color", "score", "x0", "y0", "x1", "y1"} of each solid's visible pixels, fractions of a side
    caption        lower-case ASCII
    solids         what was placed
    """

    rgb: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    segmentation: np.ndarray
    instances: np.ndarray
    boxes: list[dict[str, str | float]]
    caption: str
    solids: tuple[Solid, ...]


@dataclass(frozen=True, kw_only=True)
class _View:
    """Holds a scene without its solids; colors are linear."""

    height_m: float
    pitch_rad: float
    light: np.ndarray  # (3, 1), towards the sun
    ground: str
    tones: np.ndarray  # (2, 3)
    texture: tuple[float, float, float, float]  # period in metres, angle in radians, offsets in periods
    sky: np.ndarray  # (2, 3): zenith, horizon


def intrinsics(size: int) -> np.ndarray:
    """Returns the float64 (3, 3) matrix from camera coordinates to points of a picture of `size` px a side."""
    return np.array([[FOCAL * size, 0, size / 2], [0, FOCAL * size, size / 2], [0, 0, 1]])


def render(index: int, *, seed: int = 0, size: int = 224) -> Scene:
    """Renders scene `index` of the corpus `seed`. Another size shows the same solids.

    Raises ValueError for a negative index or seed and for a size that is not from 32 to 4096 px.
    """
    if index < 0 or seed < 0 or not 32 <= size <= 4096:
        raise ValueError(f"scene {index=} {seed=} {size=}: expected index >= 0, seed >= 0, size from 32 to 4096 px")
    view, solids, caption = _layout(np.random.default_rng((seed, index)))
    grid = np.indices((size, size), np.float32).reshape(2, -1)
    rays = _rays(view, size, grid)
    hits = depth, owner, normal = _trace(view, solids, rays)
    linear = _shade(view, solids, rays, hits)
    # More rays through the pixels that differ visibly from a neighbor.
    maps = owner.reshape(size, size), np.sqrt(linear[0] + linear[1] + linear[2]).reshape(size, size)
    borders, steps = (cv2.morphologyEx(one, cv2.MORPH_GRADIENT, _CROSS) for one in maps)
    edges = np.flatnonzero((borders > 0) | (steps > 0.12))
    rays = _rays(view, size, np.concatenate(grid.take(edges, axis=1) + _SUBPIXELS, axis=1))
    linear[:, edges] = _shade(view, solids, rays, _trace(view, solids, rays)).reshape(3, 4, -1).mean(axis=1)
    codes = _CODES[(np.minimum(linear, 1) * 4095 + 0.5).astype(np.intp)]
    is_sky = np.isinf(depth)
    cos, sin = np.float32(np.cos(view.pitch_rad)), np.float32(np.sin(view.pitch_rad))
    normals = np.stack([normal[0], normal[1] * cos - normal[2] * sin, normal[1] * sin + normal[2] * cos], axis=1)
    classes = np.array([1, *(CLASSES.index(solid.shape) for solid in solids)], np.uint8)
    return Scene(
        rgb=cv2.merge(list(codes.reshape(3, size, size))),
        depth=np.where(is_sky, np.float32(np.nan), depth).reshape(size, size),
        normals=normals.reshape(size, size, 3),
        segmentation=np.where(is_sky, np.uint8(0), classes[owner]).reshape(size, size),
        instances=maps[0],
        boxes=[_box(solid, maps[0] == number) for number, solid in enumerate(solids, start=1)],
        caption=caption,
        solids=solids,
    )


def _box(solid: Solid, mask: np.ndarray) -> dict[str, str | float]:
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    corners = {"x0": x, "y0": y, "x1": x + width, "y1": y + height}
    shares = {name: pixels / len(mask) for name, pixels in corners.items()}
    return {"class": solid.shape, "color": solid.color, "score": 1.0, **shares}


def _layout(rng: np.random.Generator) -> tuple[_View, tuple[Solid, ...], str]:
    """Draws a view, solids that can all be seen well, from left to right, and the caption, until a layout passes."""
    view, wanted = _draw_view(rng), int(rng.integers(1, 4))
    vain, solids, caption = 0, (), None
    while caption is None:
        colors = rng.permutation(list(COLORS))[: max(1, wanted - vain // 16)]  # one less after every 16
        solids = tuple(_draw_solid(rng, view, str(color)) for color in colors)
        places = _places(view, solids)
        if places is not None:
            order = np.argsort(places[:, 0])
            solids = tuple(solids[i] for i in order)
            caption = _caption(view, solids, places[order], int(rng.integers(len(solids))))
        vain += 1
    return view, solids, caption


def _draw_view(rng: np.random.Generator) -> _View:
    azimuth, elevation = rng.uniform(-1.2, 1.2), rng.uniform(0.6, 1.1)  # the sun is behind the camera or beside it
    light = [np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), -np.cos(azimuth) * np.cos(elevation)]
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    # Muted and of middle brightness, so that every color of a solid stands out, black and white too.
    tone = rng.uniform(0.24, 0.42) * (1 + rng.uniform(-0.25, 0.25, size=3))
    if ground == "wooden":
        tone = np.array([0.34, 0.19, 0.10]) * rng.uniform(0.8, 1.3)
    horizon = rng.uniform(0.5, 0.9) * (1 + rng.uniform(-0.15, 0.15, size=3))
    return _View(
        height_m=rng.uniform(1.15, 1.45),
        pitch_rad=rng.uniform(0.24, 0.36),
        light=np.array(light, np.float32)[:, None],
        ground=ground,
        tones=np.array([tone, tone * rng.uniform(0.45, 0.6)], np.float32),
        texture=(rng.uniform(0.4, 0.7), rng.uniform(-0.7, 0.7), *rng.uniform(0, 64, size=2)),
        sky=np.array([horizon * rng.uniform((0.2, 0.4, 0.7), (0.7, 0.8, 1.0)), horizon], np.float32),
    )


def _draw_solid(rng: np.random.Generator, view: _View, color: str) -> Solid:
    shape, size = list(SHAPES)[rng.integers(len(SHAPES))], list(SIZES)[rng.integers(len(SIZES))]
    radius, (width, height) = SIZES[size] * rng.uniform(0.93, 1.07), SHAPES[shape]
    half_m = radius * width, radius * height
    lift_m = rng.uniform(0.25, 0.55) if rng.random() < 0.15 else 0.0
    z = rng.uniform(1.9, 4.6)
    reach = 0.5 / FOCAL * z - half_m[0]  # half of what the camera sees there
    center_m, yaw_rad = (rng.uniform(-reach, reach), view.height_m - half_m[1] - lift_m, z), rng.uniform(0, np.pi / 2)
    return Solid(
        shape=shape, color=color, size=size, is_floating=lift_m > 0, center_m=center_m, half_m=half_m, yaw_rad=yaw_rad
    )


def _places(view: _View, solids: Sequence[Solid]) -> np.ndarray | None:
    """Returns mean column, 0 to 1, and depth of each solid's pixels (k, 2); None if one is cut, small or half hidden."""
    for one, other in itertools.combinations(solids, 2):
        (x, _, z), (other_x, _, other_z), width = one.center_m, other.center_m, one.half_m[0] + other.half_m[0]
        is_apart = np.hypot(x - other_x, z - other_z) > 1.45 * max(width, 0.5)
        if not is_apart or abs(x / z - other_x / other_z) < 0.6 * (one.half_m[0] / z + other.half_m[0] / other_z):
            return None
    depth, owner, _ = _trace(view, solids, _rays(view, _PROBE, _PROBE_GRID))
    picture = owner.reshape(_PROBE, _PROBE)
    seen = [np.flatnonzero(owner == number) for number in range(1, len(solids) + 1)]
    if picture[[0, -1]].any() or picture[:, [0, -1]].any() or min(map(len, seen)) < 20:
        return None  # 20 pixels here are 320 at 224
    return np.array([((pixels % _PROBE).mean() / _PROBE, depth[pixels].mean()) for pixels in seen])


def _caption(view: _View, solids: Sequence[Solid], places: np.ndarray, subject: int) -> str | None:
    """Returns a sentence that relates the subject to the other solids; None if a relation is not plain to see."""
    names = [f"{one.size} {'floating ' if one.is_floating else ''}{one.color} {one.shape}" for one in solids]
    told = []
    for other in (i for i in range(len(solids)) if i != subject):
        column, depth = places[subject] - places[other]
        is_across = abs(column) / FOCAL * (places[subject, 1] + places[other, 1]) / 2 >= abs(depth)
        offset = column if is_across else depth
        if abs(offset) < (0.1 if is_across else 0.45):
            return None
        told.append(f" {RELATIONS[2 * (not is_across) + (offset > 0)]} a {names[other]}")
    place = "over" if solids[subject].is_floating else "on"
    return f"a {names[subject]}{' and'.join(told)} {place} a {view.ground} floor"


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]


def _rays(view: _View, size: int, grid: np.ndarray) -> np.ndarray:
    """Returns world directions (3, n), with z = 1 in camera axes, through rows and columns (2, n)."""
    down, across = (grid + np.float32(0.5 - size / 2)) * np.float32(1 / (FOCAL * size))
    cos, sin = np.float32(np.cos(view.pitch_rad)), np.float32(np.sin(view.pitch_rad))
    return np.stack([across, down * cos + sin, cos - down * sin])


def _trace(view: _View, solids: Sequence[Solid], rays: np.ndarray) -> _Hits:
    """Returns the nearest hit of each ray: depth (n,), inf for sky; owner uint8 (n,), 0 or the solid; unit normal (3, n)."""
    with np.errstate(divide="ignore"):
        depth = np.float32(view.height_m) / rays[1]
    depth[(depth <= 0) | (depth > FAR_M)] = np.inf
    owner, normal = np.zeros(depth.shape, np.uint8), np.zeros_like(rays)
    normal[1] = np.where(np.isinf(depth), 0, -1)
    for number, solid in enumerate(solids, start=1):
        near, distance, normals = _cast(solid, 0, rays)
        closer = np.flatnonzero(distance < depth[near])
        hit = near[closer]
        depth[hit], owner[hit], normal[:, hit] = distance[closer], number, normals.take(closer, axis=1)
    return depth, owner, normal


def _cast(solid: Solid, start: np.ndarray | int, rays: np.ndarray) -> _Hits:
    """Finds where rays enter a solid: indices (k,) of rays near it, distance (k,), inf for a miss, unit normal (3, k).

    `start` (0: the camera) or `rays` may be (3, 1) and then serves all.
    """
    width, height = solid.half_m
    bound = {"sphere": width**2, "cube": 2 * width**2 + height**2}.get(solid.shape, width**2 + height**2)
    offset = start - np.array(solid.center_m, np.float32)[:, None]
    along = _dot(offset, rays)
    near = np.flatnonzero((along < 0) & (along * along > _dot(rays, rays) * (_dot(offset, offset) - bound)))
    cos, sin = np.cos(solid.yaw_rad), np.sin(solid.yaw_rad)
    frame = np.array([[cos / width, 0, -sin / width], [0, 1 / height, 0], [sin / width, 0, cos / width]], np.float32)
    origin, way = (frame @ (lines if lines.shape[1] == 1 else lines.take(near, axis=1)) for lines in (offset, rays))
    with np.errstate(divide="ignore", invalid="ignore"):  # rays along a face, and rays that miss
        profile = _PROFILES.get(solid.shape)
        distance, normal = _enter_cube(origin, way) if profile is None else _enter_turned(profile, origin, way)
        normal = frame.T @ normal  # normals go by the transpose of what points go by
        return near, np.where(distance > 0, distance, np.float32(np.inf)), normal / np.sqrt(_dot(normal, normal))


def _enter_cube(origin: np.ndarray, way: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the last of three pairs of planes that is entered, if that is before the first is left."""
    inverse = 1 / np.where(way == 0, np.float32(1e-20), way)
    middle, half = -origin * inverse, np.abs(inverse)
    entries = middle - half
    entry, leave = entries.max(axis=0), (middle + half).min(axis=0)
    return np.where(entry < leave, entry, np.float32(np.inf)), np.where(entries == entry, -np.sign(way), np.float32(0))


def _enter_turned(profile: Sequence[float], origin: np.ndarray, way: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the point on the curved side at which the quadric falls below 0, or one before on the end that faces the ray."""
    (p, q, r), (ox, oy, oz), (dx, dy, dz) = profile, origin, way
    a = dx * dx + dz * dz - r * dy * dy
    b = ox * dx + oz * dz - (q / 2 + r * oy) * dy
    side = (-b - np.sqrt(b * b - a * (ox * ox + oz * oz - p - (q + r * oy) * oy))) / a
    # A little over the edges, so that rounding opens no gap between side and end.
    side = np.where((np.abs(oy + side * dy) < 1.0001) & (side > 0), side, np.float32(np.inf))
    end = -np.sign(dy)
    flat = (end - oy) / dy
    is_inside = np.square(ox + flat * dx) + np.square(oz + flat * dz) < p + q * end + r + 1e-5
    is_flat = is_inside & (flat > 0) & (flat < side)
    distance = np.where(is_flat, flat, side)
    x, y, z = origin + distance * way
    return distance, np.where(is_flat, np.stack([0 * end, end, 0 * end]), np.stack([x, -q / 2 - r * y, z]))


def _shade(view: _View, solids: Sequence[Solid], rays: np.ndarray, hits: _Hits) -> np.ndarray:
    """Returns linear rgb (3, n), 0 and up, of what the rays hit."""
    (depth, owner, normal), linear = hits, np.empty_like(rays)
    is_sky = np.isinf(depth)
    sky, floor = np.flatnonzero(is_sky), np.flatnonzero((owner == 0) & ~is_sky)
    linear[:, sky] = _sky(view, rays.take(sky, axis=1))
    linear[:, floor] = _floor(view, solids, rays.take(floor, axis=1), depth.take(floor))
    for number, solid in enumerate(solids, start=1):
        seen = np.flatnonzero(owner == number)
        points = rays.take(seen, axis=1) * depth.take(seen)
        linear[:, seen] = _surface(view, solids, solid, points, normal.take(seen, axis=1))
    return linear


def _is_sunlit(view: _View, solids: Sequence[Solid], points: np.ndarray) -> np.ndarray:
    """Tells whether each point (n,) is in no solid's shadow."""
    is_sunlit = np.ones(points.shape[1], bool)
    for solid in solids:
        near, distance, _ = _cast(solid, points, view.light)
        is_sunlit[near[np.isfinite(distance)]] = False
    return is_sunlit


def _surface(view: _View, solids: Sequence[Solid], solid: Solid, points: np.ndarray, normal: np.ndarray) -> np.ndarray:
    others = [other for other in solids if other is not solid]  # a convex solid does not shade its own sunny side
    cosine = np.maximum(_dot(view.light, normal), 0) * _is_sunlit(view, others, points)
    ambient = _AMBIENT * (0.75 - 0.25 * normal[1])  # the floor sends back half of what the sky does
    linear = (np.array(COLORS[solid.color], np.float32)[:, None] / 255) ** _GAMMA * (ambient + _SUN * cosine)
    if solid.shape != "cube":  # Blinn's highlight; it would bleach a whole flat face
        toward = view.light - points / np.sqrt(_dot(points, points))
        shine = np.maximum(_dot(toward, normal), 0) / np.sqrt(_dot(toward, toward))
        linear += np.where(cosine > 0, 0.25 * shine**48, np.float32(0))
    return linear


def _floor(view: _View, solids: Sequence[Solid], rays: np.ndarray, depth: np.ndarray) -> np.ndarray:
    points = rays * depth
    ambient = np.full_like(depth, _AMBIENT)
    for solid in solids:  # the share of the sky that a sphere in its place hides
        radius, offset = np.float32(solid.half_m[0]), points - np.array(solid.center_m, np.float32)[:, None]
        squared = np.maximum(_dot(offset, offset), radius * radius)
        ambient *= 1 - 0.75 * radius * radius * offset[1] / (squared * np.sqrt(squared))
    light = ambient - _SUN * view.light[1] * _is_sunlit(view, solids, points)
    period, angle, *offsets = view.texture
    cos, sin = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    a = points[0] * cos + points[2] * sin + np.float32(offsets[0])
    b = points[2] * cos - points[0] * sin + np.float32(offsets[1])
    pattern = 0.5 + (_pattern(view.ground, a, b) - 0.5) / (1 + np.square(np.square(depth / 9)))  # fades far off
    color = view.tones[0][:, None] + pattern * (view.tones[1] - view.tones[0])[:, None]
    haze = 0.8 * np.square(depth / FAR_M)
    return color * (light * (1 - haze)) + haze * view.sky[1][:, None]


def _pattern(ground: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns values (n,), about 0 to 1, of a pattern in the plane a, b."""
    if ground == "striped":
        return np.floor(1.4 * a) % 2
    if ground == "marbled":
        return np.clip(4 * _noise(4 * a, 4 * b) - 1.5, 0, 1)
    if ground == "wooden":
        board = np.floor(2 * a)
        length = 0.4 * b + 0.37 * board
        tone = 0.3 + 0.4 * np.sin(7 * board + 5 * np.floor(length)) + 0.3 * _noise(9 * a, b)
        return np.where((2 * a - board < 0.05) | (length % 1 < 0.012), np.float32(1.3), tone)
    row, column = np.floor(a), np.floor(b)
    if ground == "checkered":
        return (row + column) % 2
    a, b = a - row - 0.5, b - column - 0.5
    return np.float32(1) * (np.maximum(np.abs(a), np.abs(b)) > 0.46 if ground == "tiled" else a * a + b * b < 0.08)


def _sky(view: _View, rays: np.ndarray) -> np.ndarray:
    up, (zenith, horizon) = np.maximum(-rays[1], 0), view.sky[..., None]
    color = horizon + np.minimum(3 * up, 1) * (zenith - horizon)
    cover = np.clip(3 * _noise(3 * rays[0] + np.float32(view.texture[2]), 12 * up) - 1.5, 0, 1)
    return color + 0.7 * cover * (0.2 + 0.8 * horizon - color)


def _noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns smooth blots, values 0 to 1 (n,), in the plane a, b."""
    return 0.5 + 0.25 * (np.sin(2.3 * a + 1.9 * np.sin(1.7 * b)) + np.sin(2.9 * b + 2.1 * np.sin(1.3 * a + b)))


def write(folder: Path, count: int, *, seed: int = 0, size: int = 224, start: int = 0) -> None:
    """Writes scenes `start` to `start + count` as a corpus of files, over what is there; equal input, equal bytes.

    images/000000.png         8-bit RGB; its caption is images/000000.txt
    depth/000000.png          16-bit, millimetres; 0 in the sky
    normals/000000.png        8-bit RGB, round(127.5 n + 127.5); 128, 128, 128, which no unit vector gives, in the sky
    segmentation/000000.png   8-bit, index into CLASSES
    instances/000000.png      8-bit, 0 none, i = the i-th record of the boxes
    boxes/000000.json         the list of Scene.boxes
    """
    for kind in ("images", "depth", "normals", "segmentation", "instances", "boxes"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        scene = render(index, seed=seed, size=size)
        pictures = {
            "images": scene.rgb[..., ::-1],  # OpenCV writes BGR
            "depth": np.rint(1000 * np.nan_to_num(scene.depth)).astype(np.uint16),
            "normals": np.rint(127.5 * scene.normals[..., ::-1] + 127.5).astype(np.uint8),
            "segmentation": scene.segmentation,
            "instances": scene.instances,
        }
        for kind, picture in pictures.items():
            (folder / kind / f"{index:06d}.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        (folder / "images" / f"{index:06d}.txt").write_text(scene.caption)
        (folder / "boxes" / f"{index:06d}.json").write_text(json.dumps(scene.boxes))


def sheet(scenes: Sequence[Scene]) -> np.ndarray:
    """Paints a contact sheet, uint8 (H, W, 3) RGB: a row a scene, with rgb, depth, normals, segmentation, instances."""
    rows = []
    for scene in scenes:
        maps = np.nan_to_num(255 * np.minimum(1.3 / scene.depth, 1)), 36 * scene.segmentation, 80 * scene.instances
        depth, *indices = (cv2.applyColorMap(one.astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1] for one in maps)
        normals = np.rint(127.5 * scene.normals + 127.5).astype(np.uint8)
        row = np.concatenate([scene.rgb, depth, normals, *indices], axis=1)
        strip = np.full((24, row.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, scene.caption, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [row, strip]
    return np.concatenate(rows)


def main() -> None:
    """Writes a corpus, and a contact sheet of its first scenes if one is asked for."""
    parser = argparse.ArgumentParser(description="Write procedural scenes with exact labels as a corpus of files.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the corpus's folder")
    parser.add_argument("--count", type=int, default=1000, help="how many scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which corpus (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="px a side (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw the first scenes, at most 12, on one page")
    given = parser.parse_args()
    chosen = {"seed": given.seed, "size": given.size}
    with ProcessPoolExecutor(given.workers) as pool:
        for run in [pool.submit(write, given.out, 1, **chosen, start=index) for index in range(given.count)]:
            run.result()
    print(f"{given.count} scenes in {given.out}")
    if given.sheet is not None:
        page = sheet([render(index, **chosen) for index in range(min(given.count, 12))])
        given.sheet.write_bytes(cv2.imencode(".png", page[..., ::-1])[1].tobytes())


if __name__ == "__main__":
    main()
