"""Scenes of shapes that follow from a seed, their canonical captions, and their drawing.

Seeds from `HELD_OUT_SEEDS` on give held-out scenes: about a tenth of all descriptions, chosen by a hash, never appear
below that seed. A model trained on lower seeds has therefore seen neither the drawing nor its caption, and an exact
match is generalisation. Needs Pillow only.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from PIL import Image, ImageDraw

SIDE: Final = 64  # pixels of a drawing's edge
HELD_OUT_SEEDS: Final = 10**9  # training uses seeds below, evaluation seeds from here on

COLORS: Final = {
    "red": (214, 40, 40),
    "green": (44, 160, 64),
    "blue": (40, 80, 220),
    "yellow": (244, 220, 50),
    "purple": (140, 50, 180),
    "orange": (245, 135, 25),
}
BACKGROUNDS: Final = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (128, 128, 128)}
KINDS: Final = ("circle", "square", "triangle", "star")
SIZES: Final = {"small": (6, 7), "large": (11, 13)}  # half of the shape's extent in pixels, drawn from this range
NUMBERS: Final = ("zero", "one", "two", "three", "four")
#: How one shape lies to another, and what the other then is to it.
CONVERSE: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What is said of one shape; several equal shapes are one `Shape` with the scene's count."""

    size: str
    color: str
    kind: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.kind}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A description: one shape, two shapes with a relation, or two to four equal shapes."""

    background: str
    shapes: tuple[Shape, ...]  # one, or the two that the relation is between, in its order
    relation: str = ""  # "left of" or "above" where there are two
    count: int = 1  # how many times the only shape is drawn

    @property
    def caption(self) -> str:
        """The one canonical caption; no two descriptions share it."""
        what = f"a {self.shapes[0]}" if self.count == 1 else f"{NUMBERS[self.count]} {self.shapes[0]}s"
        if self.relation:
            what += f" {self.relation} a {self.shapes[1]}"
        return f"{what} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether training never sees this description."""
        return zlib.crc32(self.caption.encode()) % 10 == 0


@dataclass(frozen=True, slots=True)
class Box:
    """Where a shape is drawn: centre and half extent, in pixels."""

    x: int
    y: int
    radius: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """A scene with the places of its shapes; `boxes[i]` belongs to `shapes[i]`, or all boxes to the only shape."""

    seed: int
    scene: Scene
    boxes: tuple[Box, ...]

    def image(self) -> Image.Image:
        """The drawing, RGB, 64x64."""
        image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[self.scene.background])
        pen = ImageDraw.Draw(image)
        shapes = self.scene.shapes * self.scene.count
        for shape, box in zip(shapes, self.boxes, strict=True):
            _draw(pen, shape, box)
        return image


def drawing(seed: int) -> Drawing:
    """The drawing of a seed: one shape, two related shapes (half of all) or a group of equal ones."""
    rng = Random(seed)
    wanted = seed >= HELD_OUT_SEEDS
    while (scene := _scene(rng)).held_out != wanted:
        pass
    return Drawing(seed, scene, tuple(_boxes(scene, rng)))


def held_out_drawings(count: int, seed: int) -> Iterator[Drawing]:
    """`count` held-out drawings; other seeds give other ones (each seed has room for a million)."""
    first = HELD_OUT_SEEDS + seed * 10**6
    return (drawing(first + index) for index in range(count))


def _shape(rng: Random) -> Shape:
    return Shape(rng.choice(list(SIZES)), rng.choice(list(COLORS)), rng.choice(KINDS))


def _scene(rng: Random) -> Scene:
    background, first = rng.choice(list(BACKGROUNDS)), _shape(rng)
    family = rng.random()
    if family < 0.2:
        return Scene(background, (first,))
    if family < 0.5:
        return Scene(background, (first,), count=rng.randint(2, 4))
    while (second := _shape(rng)) == first:
        pass
    return Scene(background, (first, second), rng.choice(("left of", "above")))


def _boxes(scene: Scene, rng: Random) -> Iterator[Box]:
    radii = [rng.randint(*SIZES[shape.size]) for shape in scene.shapes]
    if scene.relation:
        yield from _pair(radii, scene.relation, rng)
    elif scene.count == 1:
        edge = radii[0] + 1
        yield Box(rng.randint(edge, SIDE - 1 - edge), rng.randint(edge, SIDE - 1 - edge), radii[0])
    else:
        yield from _group(scene.count, radii[0], rng)


def _pair(radii: list[int], relation: str, rng: Random) -> Iterator[Box]:
    """Apart along the relation's axis, overlapping across it, so that no other relation holds."""
    slack = SIDE - 2 - 2 * sum(radii) - 2  # pixels to share out between both margins and the gap
    gap = rng.randint(3, slack)
    start = 1 + rng.randint(0, slack - gap)
    edge = max(radii) + 3
    level = rng.randint(edge, SIDE - 1 - edge)
    along = (start + radii[0], start + 2 * radii[0] + 1 + gap + radii[1])
    for position, radius in zip(along, radii, strict=True):
        across = level + rng.randint(-2, 2)
        yield Box(position, across, radius) if relation == "left of" else Box(across, position, radius)


def _group(count: int, radius: int, rng: Random) -> Iterator[Box]:
    """Somewhere in `count` cells of a grid: never touching, never in a fixed pattern."""
    cells = 2 if radius >= SIZES["large"][0] else 3
    width = SIDE // cells
    for cell in rng.sample(range(cells * cells), count):
        x, y = (width * part + rng.randint(radius + 1, width - 2 - radius) for part in divmod(cell, cells))
        yield Box(x, y, radius)


def _draw(pen: ImageDraw.ImageDraw, shape: Shape, box: Box) -> None:
    x, y, radius, color = box.x, box.y, box.radius, COLORS[shape.color]
    if shape.kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape.kind == "square":
        half = round(radius * 0.88)
        pen.rectangle((x - half, y - half, x + half, y + half), fill=color)
    elif shape.kind == "triangle":
        base = y + round(radius * 0.8)
        pen.polygon([(x, y - radius), (x - radius, base), (x + radius, base)], fill=color)
    else:
        angles = [math.pi * step / 5 for step in range(10)]
        reach = [radius if step % 2 == 0 else radius * 0.42 for step in range(10)]
        points = [(x + r * math.sin(a), y - r * math.cos(a)) for a, r in zip(angles, reach, strict=True)]
        pen.polygon(points, fill=color)
