"""Pictures of ten solids on a floor, rendered when they are needed: a data set for CPUs without a download.

Each picture has its own colours, pose and light. Solids are signed distance functions, rendered by sphere tracing
(Hart, The Visual Computer 12, 1996). Some functions and the soft shadow follow Quilez,
https://iquilezles.org/articles/distfunctions and https://iquilezles.org/articles/rmshadows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.images import save_png

RENDERED = 48  # px; preprocessing reduces it to RESOLUTION
RESOLUTION = 24
PER_CLASS = (300, 100)  # pictures to train on, and held out
BATCH_SIZE = 50  # pictures rendered at once

CAMERA_DISTANCE, CAMERA_ELEVATION = 4.9, math.radians(24)
TARGET_HEIGHT = 0.7  # where the camera looks
FOCAL_LENGTH = 3.1  # in halves of the picture's width
BOUND = 1.5  # radius around the target that contains every solid
TRACE_STEPS, HIT = 40, 2e-3  # of a ray; distance at which it has met the solid
SHADOW_STEPS, SHADOW_SHARPNESS = 24, 7.0


# Signed distances. Points are (N, 3) with y up and the floor at y = 0, or (N, 2) in a plane; distances are (N,).


def box(p: Tensor, half: tuple[float, ...], rounding: float = 0.05) -> Tensor:
    """Return the distance to a box or rectangle around the origin with round edges; `half`: half of its sides."""
    q = p.abs() - (torch.tensor(half) - rounding)
    return q.clamp(min=0).norm(dim=1) + q.amax(dim=1).clamp(max=0) - rounding


def half_plane(p: Tensor, a: tuple[float, float], b: tuple[float, float]) -> Tensor:
    """Return the distance (N,) of points (N, 2) to the line through a and b, negative to the right of its direction."""
    normal = F.normalize(torch.tensor([a[1] - b[1], b[0] - a[0]]), dim=0)
    return (p - torch.tensor(a)) @ normal


def capsule(p: Tensor, start: tuple[float, ...], end: tuple[float, ...], radii: tuple[float, float]) -> Tensor:
    """Return the distance to a rod with round ends whose radius changes from the first to the second value."""
    a, axis = torch.tensor(start), torch.tensor(end) - torch.tensor(start)
    along = ((p - a) @ axis / axis.square().sum()).clamp(0, 1)
    return (p - a - along[:, None] * axis).norm(dim=1) - torch.lerp(*torch.tensor(radii), along)


def revolved(p: Tensor) -> Tensor:
    """Return (N, 2), distance from the vertical axis and height: a plane figure becomes a solid of revolution."""
    return torch.stack([p[:, [0, 2]].norm(dim=1), p[:, 1]], dim=1)


def extruded(p: Tensor, figure: Tensor, half: float, rounding: float = 0.06) -> Tensor:
    """Return the distance to a figure in the plane z = 0, given its distance there, that is 2 `half` thick."""
    q = torch.stack([figure + rounding, p[:, 2].abs() - half + rounding], dim=1)
    return q.clamp(min=0).norm(dim=1) + q.amax(dim=1).clamp(max=0) - rounding


def from_height(p: Tensor, height: float) -> Tensor:
    """Return points relative to the point at a height above the origin."""
    return p - torch.tensor([0, height, 0])


def cone(p: Tensor) -> Tensor:
    return torch.maximum(half_plane(revolved(p), (0.0, 1.7), (0.9, 0.0)), -p[:, 1])


def cross(p: Tensor) -> Tensor:
    q = from_height(p, 0.85)
    return torch.minimum(box(q, (0.85, 0.28, 0.28)), box(q, (0.28, 0.85, 0.28)))


def cube(p: Tensor) -> Tensor:
    return box(from_height(p, 0.7), (0.7, 0.7, 0.7))


def cylinder(p: Tensor) -> Tensor:
    return box(revolved(from_height(p, 0.75)), (0.66, 0.75))


def heart(p: Tensor) -> Tensor:
    x, y = p[:, 0].abs() / 1.45, p[:, 1] / 1.45
    upper = ((x - 0.25).square() + (y - 0.75).square()).sqrt() - math.sqrt(2) / 4
    m = (x + y).clamp(min=0) / 2
    lower = torch.minimum(x.square() + (y - 1).square(), (x - m).square() + (y - m).square()).sqrt() * (x - y).sign()
    return extruded(p, 1.45 * torch.where(x + y > 1, upper, lower), 0.26, rounding=0.1)


def mushroom(p: Tensor) -> Tensor:
    cap = torch.maximum(from_height(p, 0.8).norm(dim=1) - 0.85, 0.8 - p[:, 1])
    return torch.minimum(cap, capsule(p, (0.0, 0.1, 0.0), (0.0, 0.9, 0.0), (0.34, 0.3)))


def sphere(p: Tensor) -> Tensor:
    return from_height(p, 0.85).norm(dim=1) - 0.85


def star(p: Tensor) -> Tensor:
    x, y = p[:, 0], p[:, 1] - 0.85
    angle = ((torch.atan2(x, y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5).abs()  # from the nearest tip
    folded = torch.stack([angle.sin(), angle.cos()], dim=1) * torch.hypot(x, y)[:, None]
    inner = (0.44 * math.sin(math.pi / 5), 0.44 * math.cos(math.pi / 5))
    return extruded(p, half_plane(folded, (0.0, 0.98), inner), 0.24)


def teapot(p: Tensor) -> Tensor:
    body = ((p - torch.tensor([0, 0.62, 0])) / torch.tensor([1, 0.8, 1])).norm(dim=1) * 0.8 - 0.61
    knob = from_height(p, 1.33).norm(dim=1) - 0.14
    spout = capsule(p, (0.55, 0.5, 0.0), (1.15, 1.0, 0.0), (0.2, 0.1))
    q = p - torch.tensor([-0.72, 0.68, 0])
    handle = torch.stack([q[:, :2].norm(dim=1) - 0.36, q[:, 2]], dim=1).norm(dim=1) - 0.1
    return torch.stack([body, knob, spout, handle]).amin(dim=0)


def torus(p: Tensor) -> Tensor:
    return (revolved(p) - torch.tensor([0.68, 0.32])).norm(dim=1) - 0.32


Solid = Callable[[Tensor], Tensor]
SHAPES = (cone, cross, cube, cylinder, heart, mushroom, sphere, star, teapot, torus)
SOLIDS: dict[str, Solid] = {solid.__name__: solid for solid in SHAPES}


class Scenes(NamedTuple):
    """What differs between N pictures. Angles in radians; `light` points to the light; colours are linear RGB."""

    yaw: Tensor  # (N,)
    light: Tensor  # (N, 3)
    solid_colour: Tensor  # (N, 3)
    floor_colour: Tensor  # (N, 3)


def draw_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Return random scenes."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    azimuth, elevation = uniform(-1.2, -0.3), uniform(0.65, 0.9)
    light = [elevation.cos() * azimuth.sin(), elevation.sin(), elevation.cos() * azimuth.cos()]
    return Scenes(
        yaw=uniform(0.15, 0.75),
        light=torch.stack(light, dim=1),
        solid_colour=rgb(uniform(0, 1), uniform(0.65, 0.95), uniform(0.85, 1)),
        floor_colour=rgb(uniform(0, 1), uniform(0.04, 0.18), uniform(0.8, 0.95)),
    )


def rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return linear RGB (N, 3) of colours in HSV, each component (N,) in 0-1."""
    k = (torch.tensor([5.0, 3, 1]) + hue[:, None] * 6) % 6
    encoded = value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return encoded**2.2


def render(solid: Solid, scenes: Scenes) -> Tensor:
    """Return pictures (N, RENDERED, RENDERED, 3) uint8 of one solid."""
    count = len(scenes.yaw)
    picture, points, direction, light, hits = met(solid, scenes)
    colour = torch.empty_like(points)
    floor, body = scenes.floor_colour[picture], scenes.solid_colour[picture]
    colour[~hits] = floor[~hits] * floor_light(solid, points[~hits], light[~hits])[:, None]
    colour[hits] = solid_light(solid, points[hits], direction[hits], light[hits], body[hits], floor[hits])
    pixels = (colour.clamp(0, 1) ** (1 / 2.2) * 255).round().to(torch.uint8)
    return pixels.view(count, RENDERED, RENDERED, 3)


class Met(NamedTuple):
    """What P rays of some pictures meet, in the frame of the solid; the rays of a picture are row by row."""

    picture: Tensor  # (P,), number of the ray's picture
    points: Tensor  # (P, 3), on the solid or the floor
    direction: Tensor  # (P, 3), of the ray
    light: Tensor  # (P, 3), to the lamp
    hits: Tensor  # (P,) bool, whether the ray meets the solid


def met(solid: Solid, scenes: Scenes) -> Met:
    """Return what each ray of the pictures of one solid meets."""
    count, rays = len(scenes.yaw), camera_rays()
    picture = torch.arange(count).repeat_interleave(len(rays))
    eye = torch.tensor([0.0, math.sin(CAMERA_ELEVATION), math.cos(CAMERA_ELEVATION)]) * CAMERA_DISTANCE
    origin = turned(from_height(eye, -TARGET_HEIGHT).expand(count, 1, 3), scenes.yaw)[picture, 0]
    direction = turned(rays.expand(count, -1, -1), scenes.yaw).flatten(0, 1)
    light = turned(scenes.light[:, None], scenes.yaw)[picture, 0]
    to_floor = -origin[:, 1] / direction[:, 1]  # the floor is below all rays, because the camera looks down
    to_solid = trace(solid, origin, direction, to_floor)
    points = origin + direction * torch.minimum(to_solid, to_floor)[:, None]
    return Met(picture, points, direction, light, to_solid < to_floor)


def camera_rays() -> Tensor:
    """Return the unit directions (RENDERED^2, 3) of the camera's rays, row by row."""
    centres = (torch.arange(RENDERED) + 0.5) / RENDERED * 2 - 1
    y, x = torch.meshgrid(-centres, centres, indexing="ij")
    rays = torch.stack([x, y, torch.full_like(x, -FOCAL_LENGTH)], dim=-1).view(-1, 3)
    cos, sin = math.cos(CAMERA_ELEVATION), math.sin(CAMERA_ELEVATION)
    return F.normalize(rays @ torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]), dim=1)


def turned(vectors: Tensor, yaw: Tensor) -> Tensor:
    """Return vectors (N, P, 3) rotated around the vertical axis by angles (N,)."""
    cos, sin = yaw.cos()[:, None], yaw.sin()[:, None]
    x, y, z = vectors.unbind(dim=-1)
    return torch.stack([x * cos + z * sin, y, z * cos - x * sin], dim=-1)


def trace(solid: Solid, origin: Tensor, direction: Tensor, to_floor: Tensor) -> Tensor:
    """Return how far along each ray the solid is (P,), infinity where the ray does not meet it before the floor."""
    found = torch.full_like(to_floor, math.inf)

    # Only rays through the sphere that contains the solid are traced, and only until they leave it.
    offset = from_height(origin, TARGET_HEIGHT)
    middle = -(offset * direction).sum(dim=1)
    squared = BOUND**2 - offset.square().sum(dim=1) + middle.square()
    rays = torch.nonzero(squared > 0)[:, 0]
    half = squared[rays].sqrt()
    along, end = middle[rays] - half, torch.minimum(middle[rays] + half, to_floor[rays])
    for _ in range(TRACE_STEPS):
        distance = solid(origin[rays] + along[:, None] * direction[rays])
        hit = distance < HIT
        found[rays[hit]] = along[hit]
        along = along + distance
        going = ~hit & (along < end)
        rays, along, end = rays[going], along[going], end[going]
    return found


def floor_light(solid: Solid, points: Tensor, light: Tensor) -> Tensor:
    """Return the brightness (P,) of the floor: the lamp with the solid's shadow, and the sky."""
    near = torch.nonzero(points.norm(dim=1) < 4)[:, 0]
    shadow, sky = torch.ones(len(points)), torch.ones(len(points))
    shadow[near] = lit(solid, points[near], light[near])
    sky[near] = 0.55 + 0.45 * (solid(from_height(points[near], -0.3)) / 0.3).clamp(0, 1)
    return 0.78 * light[:, 1] * shadow + 0.3 * sky


def solid_light(
    solid: Solid, points: Tensor, direction: Tensor, light: Tensor, colour: Tensor, floor: Tensor
) -> Tensor:
    """Return the colour (P, 3) of the solid's surface: lamp, sky, light from the floor, highlight."""
    corners = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]]) * 1e-3
    normal = F.normalize(sum(solid(points + corner)[:, None] * corner for corner in corners), dim=1)
    shadow = lit(solid, points + 0.02 * normal, light)
    lamp = (normal * light).sum(dim=1).clamp(min=0) * shadow
    open_sky = 0.5 + 0.5 * (solid(points + 0.25 * normal) / 0.25).clamp(0, 1)
    up = (1 + normal[:, 1]) / 2
    highlight = (normal * F.normalize(light - direction, dim=1)).sum(dim=1).clamp(min=0) ** 40 * shadow
    diffuse = (0.85 * lamp + 0.22 * up * open_sky)[:, None] + 0.25 * (1 - up)[:, None] * floor
    return colour * diffuse + 0.35 * highlight[:, None]


def lit(solid: Solid, points: Tensor, light: Tensor) -> Tensor:
    """Return the share (P,) of the lamp that reaches each point; the edge of a shadow is soft."""
    share, along, rays = torch.ones(len(points)), torch.full((len(points),), 0.04), torch.arange(len(points))
    for _ in range(SHADOW_STEPS):
        distance = solid(points[rays] + along[:, None] * light[rays])
        share[rays] = torch.minimum(share[rays], (SHADOW_SHARPNESS * distance / along).clamp(0, 1))
        along = along + distance.clamp(0.03, 0.4)
        going = (share[rays] > 0.005) & (along < 3.5)
        rays, along = rays[going], along[going]
    return share.square() * (3 - 2 * share)


def scenes_of(half: int, per_class: int) -> Iterator[tuple[str, int, Scenes]]:
    """Yield the scenes of one half (0: to train on, 1: held out): the class, the number of the first one, a batch."""
    for number, name in enumerate(SOLIDS):
        generator = torch.Generator().manual_seed(2 * number + half)
        for first in range(0, per_class, BATCH_SIZE):
            yield name, first, draw_scenes(min(BATCH_SIZE, per_class - first), generator)


def write_images(dest: Path, half: int = 0, per_class: int | None = None) -> None:
    """Write the pictures of one half as class folders of PNGs, the layout of a raw data set."""
    for name, first, scenes in scenes_of(half, per_class or PER_CLASS[half]):
        for index, pixels in enumerate(render(SOLIDS[name], scenes).numpy()):
            save_png(dest / name / f"{first + index:04d}.png", Image.fromarray(pixels))


def factors_of(half: int, per_class: int) -> Tensor:
    """Return what differs between the pictures that `write_images` writes, (N, 10) float32, sorted by their paths.

    The columns are those of `Scenes`, colours in sRGB.
    """
    rows = []
    for _, _, scenes in scenes_of(half, per_class):
        colours = (scenes.solid_colour ** (1 / 2.2), scenes.floor_colour ** (1 / 2.2))
        rows.append(torch.cat([scenes.yaw[:, None], scenes.light, *colours], dim=1))
    return torch.cat(rows)


def maps_of(half: int, per_class: int) -> Tensor:
    """Return what the pixels show, (N, 4, RESOLUTION, RESOLUTION) float32, of the pictures that `write_images` writes.

    The channels are the share of the pixel that shows the solid, and x, y, z of that place in the solid's own frame,
    relative to where the camera looks, times that share. The order is that of `factors_of`.
    """
    maps = []
    for name, _, scenes in scenes_of(half, per_class):
        found = met(SOLIDS[name], scenes)
        places = from_height(found.points, TARGET_HEIGHT).where(found.hits[:, None], torch.zeros(()))
        shown = torch.cat([found.hits[:, None], places], dim=1).view(-1, RENDERED, RENDERED, 4).permute(0, 3, 1, 2)
        maps.append(F.adaptive_avg_pool2d(shown, RESOLUTION))
    return torch.cat(maps)
