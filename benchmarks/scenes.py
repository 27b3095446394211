"""Procedural scenes with exact labels: shaded solids on a textured ground, ray cast with numpy.

    python benchmarks/scenes.py OUT --count 1000 --seed 0 --size 224 --workers 2 [--sheet sheet.png]

One to three solids of different colors stand on, or float over, a patterned floor under a sky. The caption's colors,
sizes and relations are true in the picture, and every label is computed at pixel centers from the same rays.

Camera: a pinhole at the origin; x right, y down, z along the view. The center of pixel (row, column) is at
(column + 0.5, row + 0.5), and `intrinsics` projects camera coordinates in metres to such coordinates. Rays have a z
of 1, so that the distance along a ray is the depth. The world that the solids stand in has the same origin and x;
its y is straight down, and the camera looks `pitch_rad` below its z.

Shapes below: n rays or points, always as float32 (3, n), rows x, y, z.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# name: half width and half height of a solid of radius 1; a cube's or pyramid's width is along its edges.
SHAPES = {
    "sphere": (1.0, 1.0),
    "cube": (0.82, 0.82),
    "cylinder": (0.72, 0.95),
    "cone": (0.95, 1.1),
    "pyramid": (0.92, 0.95),
}
CLASSES = ("sky", "ground", *SHAPES)  # a pixel of segmentation is an index into these; 255, null, does not occur
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
GROUNDS = ("checkered", "striped", "speckled", "wooden", "tiled", "dotted")
RELATIONS = ("left of", "right of", "in front of", "behind")
FAR_M = 30.0  # the ground ends here, in depth: beyond is sky
FOCAL = 1.1  # focal length as a share of the picture's side: 48.9 degrees across

_SKIES = (  # linear zenith, horizon
    ((0.13, 0.33, 0.75), (0.60, 0.75, 0.90)),
    ((0.36, 0.42, 0.50), (0.66, 0.69, 0.72)),
    ((0.32, 0.22, 0.55), (0.95, 0.62, 0.48)),
    ((0.05, 0.38, 0.50), (0.62, 0.82, 0.78)),
    ((0.55, 0.40, 0.24), (0.92, 0.84, 0.62)),
    ((0.03, 0.05, 0.16), (0.24, 0.28, 0.46)),
)
_ORIGIN = np.zeros((3, 1), np.float32)
_PROBE = 56  # side of the small picture by which a layout is judged; fixed, so that layouts do not depend on the size
_LEAST_SHARE = 0.006  # visible pixels of each solid, of the whole picture: twice 150 px at 224
_LEAST_VISIBLE = 0.6  # of a solid's own silhouette
_SUN, _AMBIENT = 0.86, 0.35  # light on a surface that faces the sun, and from the whole sky
_SUBPIXELS = np.float32([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]])
_PYRAMID = np.float32([[0, 1, 0, 1], *([2 * x, -1, 2 * z, 1] for x, z in ((1, 0), (-1, 0), (0, 1), (0, -1)))])
_CUBE = np.float32([[*axis, 1] for axis in (*np.eye(3), *-np.eye(3))])  # rows a, b, c, w: ax + by + cz <= w inside


@dataclass(frozen=True, kw_only=True)
class Solid:
    """One solid; `center_m` and `yaw_rad` (about the vertical) are in world axes, `half_m` is half width and height."""

    shape: str
    color: str
    size: str
    is_floating: bool
    center_m: tuple[float, float, float]
    half_m: tuple[float, float]
    yaw_rad: float

    @property
    def name(self) -> str:
        """What the caption calls it, such as "large floating red cube"."""
        return f"{self.size} {'floating ' if self.is_floating else ''}{self.color} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture (h = w = size) and its labels.

    rgb            uint8 (h, w, 3) sRGB; edges are anti-aliased
    depth          float32 (h, w), metres along the camera's z axis, over 0 to FAR_M; NaN in the sky
    normals        float32 (h, w, 3), unit vectors in camera axes x right, y down, z away from the camera, so that a
                   surface that faces the camera has z < 0; (0, 0, 0) in the sky
    segmentation   uint8 (h, w), index into CLASSES
    instances      uint8 (h, w), 0 none, i = the i-th solid, from left to right
    boxes          one {"class", "color", "score", "x0", "y0", "x1", "y1"} for each solid, in the same order: the extent
                   of its visible pixels in fractions of the picture
    caption        lower-case ASCII
    solids         what was placed, in the same order
    """

    rgb: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    segmentation: np.ndarray
    instances: np.ndarray
    boxes: list[dict[str, Any]]
    caption: str
    solids: tuple[Solid, ...]


@dataclass(frozen=True, kw_only=True)
class _View:
    """All of a scene but its solids; colors are linear."""

    height_m: float
    pitch_rad: float
    light: np.ndarray  # (3, 1), world, towards the sun
    ground: str
    tones: np.ndarray  # (2, 3)
    texture: tuple[float, float, float, float]  # period in metres, angle in radians, offsets in periods
    sky: np.ndarray  # (2, 3): zenith, horizon
    clouds: float  # which stretch of them; 0 for a clear sky


def intrinsics(size: int) -> np.ndarray:
    """The float64 (3, 3) matrix from camera coordinates to pixel coordinates of a picture of `size` px a side."""
    return np.array([[FOCAL * size, 0, size / 2], [0, FOCAL * size, size / 2], [0, 0, 1]])


def render(index: int, *, seed: int = 0, size: int = 224) -> Scene:
    """Scene `index` of the corpus `seed`, `size` px a side.

    The same arguments give the same scene, and another size the same solids. Raises ValueError for a negative index or
    seed and for a size under 16 px or over 4096 px.
    """
    if index < 0 or seed < 0 or not 16 <= size <= 4096:
        raise ValueError(f"scene {index=} {seed=} {size=}: expected index >= 0, seed >= 0, size from 16 to 4096 px")
    view, solids, caption = _layout(np.random.default_rng((seed, index)))
    rays = _rays(view, size, _grid(size))
    depth, owner, normal = _trace(view, solids, rays)
    linear = _shade(view, solids, rays, depth, owner, normal)
    edges = _edges(linear, owner, size)
    grid = _grid(size).take(edges, axis=1)
    samples = _rays(view, size, np.concatenate([grid + offset[:, None] for offset in _SUBPIXELS], axis=1))
    shades = _shade(view, solids, samples, *_trace(view, solids, samples))
    linear[:, edges] = shades.reshape(3, len(_SUBPIXELS), -1).mean(axis=1)

    is_sky = np.isinf(depth)
    cos, sin = np.float32(np.cos(view.pitch_rad)), np.float32(np.sin(view.pitch_rad))
    normals = np.stack([normal[0], normal[1] * cos - normal[2] * sin, normal[1] * sin + normal[2] * cos], axis=1)
    normals[is_sky] = 0
    depth[is_sky] = np.nan
    kinds = np.array([1, *(CLASSES.index(solid.shape) for solid in solids)], dtype=np.uint8)
    segmentation = kinds[owner]
    segmentation[is_sky] = 0
    instances = owner.reshape(size, size)
    return Scene(
        rgb=_srgb(linear, size),
        depth=depth.reshape(size, size),
        normals=normals.reshape(size, size, 3),
        segmentation=segmentation.reshape(size, size),
        instances=instances,
        boxes=[_box(solid, instances == number) for number, solid in enumerate(solids, start=1)],
        caption=caption,
        solids=solids,
    )


def _box(solid: Solid, mask: np.ndarray) -> dict[str, Any]:
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return {
        "class": solid.shape,
        "color": solid.color,
        "score": 1.0,
        "x0": int(columns[0]) / width,
        "y0": int(rows[0]) / height,
        "x1": int(columns[-1] + 1) / width,
        "y1": int(rows[-1] + 1) / height,
    }


# ---- layout: what stands where


def _layout(rng: np.random.Generator) -> tuple[_View, tuple[Solid, ...], str]:
    """A view, solids that all can be seen well, from left to right, and the caption.

    Draws until the small picture passes; after every 16 vain draws one solid fewer is tried.
    """
    view = _draw_view(rng)
    wanted = int(rng.integers(1, 4))
    rays = _rays(view, _PROBE, _grid(_PROBE))
    attempt = 0
    while True:
        solids = _draw_solids(rng, view, max(1, wanted - attempt // 16))
        places = _places(view, solids, rays)
        if places is not None:
            order = np.argsort(places[:, 0])
            solids, places = tuple(solids[i] for i in order), places[order]
            caption = _caption(view, solids, places, int(rng.integers(len(solids))))
            if caption is not None:
                return view, solids, caption
        attempt += 1


def _draw_view(rng: np.random.Generator) -> _View:
    azimuth, elevation = rng.uniform(-1.2, 1.2), rng.uniform(0.6, 1.1)
    light = [np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), -np.cos(azimuth) * np.cos(elevation)]
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    if ground == "wooden":
        tone = np.array([0.34, 0.19, 0.10]) * rng.uniform(0.8, 1.3)
    else:
        # Muted and of middle brightness, so that every color of a solid stands out, black and white too.
        tone = rng.uniform(0.24, 0.42) * (1 + rng.uniform(-0.32, 0.32, size=3))
    return _View(
        height_m=rng.uniform(1.15, 1.45),
        pitch_rad=rng.uniform(0.24, 0.36),
        light=np.float32(light)[:, None],
        ground=ground,
        tones=np.float32([tone, tone * rng.uniform(0.45, 0.6)]),
        texture=(rng.uniform(0.4, 0.7), rng.uniform(-0.7, 0.7), *rng.uniform(0, 64, size=2)),
        sky=np.float32(_SKIES[rng.integers(len(_SKIES))]),
        clouds=float(rng.integers(2) * rng.uniform(1, 32)),
    )


def _draw_solids(rng: np.random.Generator, view: _View, count: int) -> list[Solid]:
    colors = rng.permutation(list(COLORS))[:count]
    return [_draw_solid(rng, view, str(color)) for color in colors]


def _draw_solid(rng: np.random.Generator, view: _View, color: str) -> Solid:
    shape = list(SHAPES)[rng.integers(len(SHAPES))]
    size = list(SIZES)[rng.integers(len(SIZES))]
    half_width, half_height = (SIZES[size] * rng.uniform(0.93, 1.07) * share for share in SHAPES[shape])
    is_floating = bool(rng.random() < 0.15)
    z = rng.uniform(1.9, 4.6)
    reach = 0.5 / FOCAL * z - half_width
    lift = rng.uniform(0.25, 0.55) if is_floating else 0.0
    return Solid(
        shape=shape,
        color=color,
        size=size,
        is_floating=is_floating,
        center_m=(rng.uniform(-reach, reach), view.height_m - half_height - lift, z),
        half_m=(half_width, half_height),
        yaw_rad=rng.uniform(0, np.pi / 2),
    )


def _places(view: _View, solids: Sequence[Solid], rays: np.ndarray) -> np.ndarray | None:
    """Where each solid is in the small picture: (k, 2) mean column, 0 to 1, and mean depth of its visible pixels.

    None where one is hidden too much or cut by the frame, or two touch.
    """
    for i, one in enumerate(solids):
        for other in solids[:i]:
            gap = np.hypot(one.center_m[0] - other.center_m[0], one.center_m[2] - other.center_m[2])
            if gap < 1.45 * max(one.half_m[0] + other.half_m[0], 0.5):
                return None
    reach = np.full((len(solids), rays.shape[1]), np.inf, np.float32)
    for solid, distance in zip(solids, reach, strict=True):
        near, entry, _ = _cast(solid, _ORIGIN, rays)
        distance[near] = entry
    is_hit = np.isfinite(reach)
    picture = is_hit.any(axis=0).reshape(_PROBE, _PROBE)
    if picture[[0, -1]].any() or picture[:, [0, -1]].any():
        return None
    first = reach.argmin(axis=0)
    places = []
    for number, distance in enumerate(reach):
        visible = np.flatnonzero(is_hit[number] & (first == number))
        if len(visible) < max(_LEAST_SHARE * _PROBE**2, _LEAST_VISIBLE * is_hit[number].sum()):
            return None
        places.append(((visible % _PROBE).mean() / _PROBE, distance[visible].mean()))
    return np.array(places)


def _caption(view: _View, solids: Sequence[Solid], places: np.ndarray, subject: int) -> str | None:
    """A sentence that relates the subject to the other solids; None where a relation is not plain to see."""
    clauses = []
    for other, solid in enumerate(solids):
        if other == subject:
            continue
        relation = _relation(places[subject], places[other])
        if relation is None:
            return None
        clauses.append(f"{relation} a {solid.name}")
    told = " " + " and ".join(clauses) if clauses else ""
    place = "over" if solids[subject].is_floating else "on"
    return f"a {solids[subject].name}{told} {place} a {view.ground} floor"


def _relation(one: np.ndarray, other: np.ndarray) -> str | None:
    """The greater of the distances across and along the view, where it is over a tenth of the width or 0.45 m."""
    column, depth = one - other
    across = column / FOCAL * (one[1] + other[1]) / 2
    if abs(across) >= abs(depth):
        return None if abs(column) < 0.1 else RELATIONS[0 if column < 0 else 1]
    return None if abs(depth) < 0.45 else RELATIONS[2 if depth < 0 else 3]


# ---- rays: what is hit where


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]


@functools.lru_cache(maxsize=2)
def _grid(size: int) -> np.ndarray:
    """Column and row of each pixel's center, counted from the picture's: float32 (2, size * size)."""
    centers = np.arange(size, dtype=np.float32) + np.float32(0.5 - size / 2)
    return np.stack([np.tile(centers, size), centers.repeat(size)])


def _rays(view: _View, size: int, grid: np.ndarray) -> np.ndarray:
    """World directions (3, n), their z in camera axes 1, of rays through points of the picture, as `_grid` has them."""
    across, down = grid * np.float32(1 / (FOCAL * size))
    cos, sin = np.float32(np.cos(view.pitch_rad)), np.float32(np.sin(view.pitch_rad))
    return np.stack([across, down * cos + sin, cos - down * sin])


def _trace(view: _View, solids: Sequence[Solid], rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest hit of each ray: depth (n,), inf for sky; owner uint8 (n,), 0 or the solid; normal (3, n), world."""
    with np.errstate(divide="ignore"):
        depth = np.float32(view.height_m) / rays[1]
    depth[(depth <= 0) | (depth > FAR_M)] = np.inf
    owner = np.zeros(depth.shape, np.uint8)
    normal = np.zeros_like(rays)
    normal[1] = -1
    for number, solid in enumerate(solids, start=1):
        near, distance, local = _cast(solid, _ORIGIN, rays)
        closer = np.flatnonzero(distance < depth[near])
        hit = near[closer]
        depth[hit] = distance[closer]
        owner[hit] = number
        normal[:, hit] = _world_normal(solid, local.take(closer, axis=1))
    return depth, owner, normal


def _frame(solid: Solid) -> np.ndarray:
    """The (3, 3) matrix from world offsets to the solid's own axes, in which it spans -1 to 1."""
    cos, sin = np.cos(solid.yaw_rad), np.sin(solid.yaw_rad)
    width, height = solid.half_m
    return np.float32([[cos / width, 0, -sin / width], [0, 1 / height, 0], [sin / width, 0, cos / width]])


def _world_normal(solid: Solid, local: np.ndarray) -> np.ndarray:
    normal = _frame(solid).T @ local  # normals go by the transpose of what points go by
    return normal / np.sqrt(_dot(normal, normal))


def _cast(solid: Solid, start: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rays enter a solid: indices (k,) of rays near it, distance (k,), inf for a miss, and normal (3, k), local.

    `start` or `rays` may be (3, 1) and then serves all.
    """
    width, height = solid.half_m
    bound = {"sphere": width**2, "cube": 2 * width**2 + height**2, "pyramid": 2 * width**2 + height**2}
    to_center = np.float32(solid.center_m)[:, None] - start
    along = _dot(to_center, rays)
    excess = _dot(to_center, to_center) - np.float32(1.01 * bound.get(solid.shape, width**2 + height**2))
    near = np.flatnonzero((along > 0) & (along * along > _dot(rays, rays) * excess))
    frame = _frame(solid)
    origin = frame @ -(to_center if to_center.shape[1] == 1 else to_center.take(near, axis=1))
    direction = frame @ (rays if rays.shape[1] == 1 else rays.take(near, axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "sphere":
            distance, normal = _enter_sphere(origin, direction)
        elif solid.shape in ("cube", "pyramid"):
            distance, normal = _enter_planes(_CUBE if solid.shape == "cube" else _PYRAMID, origin, direction)
        else:
            distance, normal = _enter_turned(0.5 if solid.shape == "cone" else 0.0, origin, direction)
    return near, np.where(distance > 0, distance, np.float32(np.inf)), normal


def _enter_sphere(origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _dot(direction, direction), _dot(origin, direction)
    distance = (-b - np.sqrt(b * b - a * (_dot(origin, origin) - 1))) / a  # NaN where the ray misses
    return distance, origin + distance * direction


def _enter_planes(planes: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A convex body: the last plane that is entered, if it is before the first that is left."""
    speed = planes[:, :3] @ direction
    distance = (planes[:, 3:] - planes[:, :3] @ origin) / speed
    entries = np.where(speed < 0, distance, np.float32(-np.inf))
    last = entries.argmax(axis=0)
    entry = np.take_along_axis(entries, last[None], axis=0)[0]
    leave = np.where(speed > 0, distance, np.float32(np.inf)).min(axis=0)
    return np.where(entry < leave, entry, np.float32(np.inf)), planes[last, :3].T


def _enter_turned(taper: float, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A cylinder (taper 0) or a cone with its tip up (taper 0.5): radius 1 - taper + taper * y for y from -1 to 1."""
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    radius, change = 1 - taper + taper * oy, taper * dy
    a = dx * dx + dz * dz - change * change
    b = ox * dx + oz * dz - radius * change
    root = np.sqrt(b * b - a * (ox * ox + oz * oz - radius * radius))
    best = np.full(root.shape, np.inf, np.float32)
    for side in ((-b - root) / a, (-b + root) / a):
        is_on = (np.abs(oy + side * dy) <= 1) & (side > 0) & (side < best)
        best = np.where(is_on, side, best)
    cap = (np.where(dy > 0, np.float32(-1), np.float32(1)) - oy) / dy  # only the cap that faces the ray can be entered
    rim = np.where(dy > 0, np.float32(1 - 2 * taper), np.float32(1))
    is_cap = (np.square(ox + cap * dx) + np.square(oz + cap * dz) <= rim * rim) & (cap > 0) & (cap < best)
    best = np.where(is_cap, cap, best)
    x, y, z = origin + best * direction
    normal = np.stack([x, -taper * (1 - taper + taper * y), z])
    return best, np.where(is_cap, np.stack([0 * dy, -np.sign(dy), 0 * dy]), normal)


# ---- light: what color is seen


def _shade(
    view: _View, solids: Sequence[Solid], rays: np.ndarray, depth: np.ndarray, owner: np.ndarray, normal: np.ndarray
) -> np.ndarray:
    """Linear rgb (3, n), 0 and up, of what the rays hit."""
    is_sky = np.isinf(depth)
    sky, floor = np.flatnonzero(is_sky), np.flatnonzero((owner == 0) & ~is_sky)
    depth_m = depth.take(floor)
    pixels = [sky, floor]
    colors = [
        _sky(view, rays.take(sky, axis=1)),
        _shade_floor(view, solids, rays.take(floor, axis=1) * depth_m, depth_m),
    ]
    for number, solid in enumerate(solids, start=1):
        seen = np.flatnonzero(owner == number)
        others = [other for other in solids if other is not solid]
        points = rays.take(seen, axis=1) * depth.take(seen)
        pixels.append(seen)
        colors.append(_shade_solid(view, others, solid, points, normal.take(seen, axis=1)))
    place = np.empty(len(depth), np.intp)
    place[np.concatenate(pixels)] = np.arange(len(depth))
    return np.concatenate(colors, axis=1).take(place, axis=1)  # six times as fast as to assign columns


def _shade_floor(view: _View, solids: Sequence[Solid], points: np.ndarray, depth: np.ndarray) -> np.ndarray:
    light = np.where(_is_sunlit(view, solids, points), np.float32(_SUN) * -view.light[1], np.float32(0))
    ambient = np.full_like(light, _AMBIENT)
    for solid in solids:
        ambient *= 1 - _occlusion(solid, points)
    light += ambient
    haze = np.square(depth) * np.float32(0.8 / FAR_M**2)
    return _floor(view, points, depth) * (light * (1 - haze)) + haze * view.sky[1][:, None]


def _shade_solid(
    view: _View, others: Sequence[Solid], solid: Solid, points: np.ndarray, normal: np.ndarray
) -> np.ndarray:
    cosine = np.maximum(_dot(view.light, normal), 0)
    cosine *= _is_sunlit(view, others, points)  # a convex solid throws no shadow on its own sunny side
    ambient = _AMBIENT * (0.75 - 0.25 * normal[1])  # the floor sends back half of what the sky does
    linear = _linear(np.float32(COLORS[solid.color]))[:, None] * (ambient + _SUN * cosine)
    if solid.shape not in ("cube", "pyramid"):  # Blinn's highlight; on a flat face it would bleach the color
        toward = view.light - points / np.sqrt(_dot(points, points))
        shine = np.maximum(_dot(toward, normal), 0) / np.sqrt(_dot(toward, toward))
        linear += np.where(cosine > 0, 0.25 * shine**48, np.float32(0))
    return linear


def _is_sunlit(view: _View, solids: Sequence[Solid], points: np.ndarray) -> np.ndarray:
    """Whether each point (n,) is in no solid's shadow."""
    is_sunlit = np.ones(points.shape[1], bool)
    for solid in solids:
        near, distance, _ = _cast(solid, points, view.light)
        is_sunlit[near[np.isfinite(distance)]] = False
    return is_sunlit


def _occlusion(solid: Solid, points: np.ndarray) -> np.ndarray:
    """The share (n,) of the sky above points of the ground that a sphere in the solid's place hides."""
    radius = np.float32(solid.half_m[0])
    to_center = np.float32(solid.center_m)[:, None] - points
    squared = np.maximum(_dot(to_center, to_center), radius * radius)
    return 0.75 * -to_center[1] * radius * radius / (squared * np.sqrt(squared))


def _floor(view: _View, points: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Albedo (3, n) of the ground."""
    period, angle, *offset = view.texture
    cos, sin = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    a = points[0] * cos + points[2] * sin + np.float32(offset[0])
    b = points[2] * cos - points[0] * sin + np.float32(offset[1])
    pattern = _pattern(view.ground, a, b)
    # Fades out with the distance, before a period is as small as a pixel.
    pattern = 0.5 + (pattern - 0.5) / (1 + np.square(np.square(depth / 9)))
    return view.tones[0][:, None] + pattern * (view.tones[1] - view.tones[0])[:, None]


def _pattern(ground: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Values 0 to 1 (n,) of a pattern whose period is about 1 (checks and stripes: 2) in the plane a, b."""
    if ground == "checkered":
        return (np.floor(a) + np.floor(b)) % 2
    if ground == "striped":
        return np.floor(1.4 * a) % 2
    if ground == "speckled":
        return np.clip(4 * _noise(4 * a, 4 * b) - 1.5, 0, 1)
    if ground == "wooden":
        board = np.floor(2 * a)
        end = 0.4 * b + 0.37 * board
        tone = _noise(3.5 * board, 3.5 * np.floor(end))
        is_seam = (2 * a - board < 0.05) | (end - np.floor(end) < 0.012)
        return np.where(is_seam, np.float32(1.3), 0.7 * tone + 0.5 * _noise(5 * a, 0.6 * b) - 0.1)
    a, b = a - np.floor(a) - 0.5, b - np.floor(b) - 0.5
    if ground == "tiled":
        return (np.maximum(np.abs(a), np.abs(b)) > 0.46).astype(np.float32)
    return (a * a + b * b < 0.08).astype(np.float32)


def _sky(view: _View, rays: np.ndarray) -> np.ndarray:
    up = np.maximum(-rays[1], 0)
    zenith, horizon = view.sky[0][:, None], view.sky[1][:, None]
    color = horizon + np.minimum(3 * up, 1) * (zenith - horizon)
    if view.clouds:
        cover = np.clip(4 * _noise(3 * rays[0] + view.clouds, 9 * up) - 1.8, 0, 1)
        color += cover * (0.15 + 0.7 * horizon - 0.7 * color)
    return color


@functools.cache
def _lattice() -> np.ndarray:
    """Periodic fractal noise, float32 (128, 128), 0 to 1: random numbers under a power-law spectrum."""
    frequency = np.hypot(np.fft.fftfreq(128, 1 / 128)[:, None], np.fft.rfftfreq(128, 1 / 128))
    spectrum = np.fft.rfft2(np.random.default_rng(4).standard_normal((128, 128))) / np.maximum(frequency, 10) ** 1.6
    noise = np.fft.irfft2(spectrum)
    return np.clip(0.5 + noise / (4 * noise.std()), 0, 1).astype(np.float32)


def _noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Values 0 to 1 (n,) of the lattice, whose step is 0.25, linearly interpolated."""
    values, a, b = _lattice().ravel(), 4 * a, 4 * b
    row, column = np.floor(a), np.floor(b)
    s, t = a - row, b - column
    i, j = row.astype(np.intp), column.astype(np.intp)
    i0, i1, j0, j1 = (i & 127) << 7, ((i + 1) & 127) << 7, j & 127, (j + 1) & 127
    first, second = values.take(i0 + j0), values.take(i1 + j0)
    first += t * (values.take(i0 + j1) - first)
    second += t * (values.take(i1 + j1) - second)
    return first + s * (second - first)


def _edges(linear: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """Flat indices of the pixels that differ visibly from a neighbor: those that need more than one ray."""
    brightness = np.sqrt(linear[0] + linear[1] + linear[2]).reshape(size, size)
    owner = owner.reshape(size, size)
    marked = np.zeros((size, size), bool)
    for one, other in (((slice(1, None),), (slice(-1),)), ((slice(None), slice(1, None)), (slice(None), slice(-1)))):
        step = (np.abs(brightness[one] - brightness[other]) > 0.12) | (owner[one] != owner[other])
        marked[one] |= step
        marked[other] |= step
    return np.flatnonzero(marked)


def _linear(srgb: np.ndarray) -> np.ndarray:
    """Linear light, 0 to 1, of sRGB code values (IEC 61966-2-1)."""
    value = srgb / np.float32(255)
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


@functools.cache
def _srgb_table() -> np.ndarray:
    linear = np.arange(4096) / 4095
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def _srgb(linear: np.ndarray, size: int) -> np.ndarray:
    """sRGB code values uint8 (h, w, 3) of linear light (3, n); a table, since a power a value costs more than the rays."""
    codes = _srgb_table()[(np.minimum(linear, 1) * 4095 + 0.5).astype(np.intp)]
    return cv2.merge(list(codes.reshape(3, size, size)))
