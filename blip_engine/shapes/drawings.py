"""Drawings of shapes with exact ground truth: captions, questions with answers, matching and mismatching texts.

A scene follows from its seed alone. Seeds from `HELD_OUT_SEEDS` on give held-out scenes: about a tenth of all
descriptions, chosen by a hash, never appear below that seed. A model trained on lower seeds has therefore seen
neither the drawing nor its caption, and an exact match is generalisation.

    python -m blip_engine.shapes.drawings OUT --count 500 --seed 1

writes `OUT/images/*.png` and the manifests `caption.jsonl`, `vqa.jsonl` and `itm.jsonl`, all of held-out scenes.
Needs Pillow only.
"""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
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

_CONNECTING: Final = "a an the is are there on of what color shape size object objects how many background ? yes no"
SPECIAL_TOKENS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: The WordPiece vocabulary of the demo checkpoints, in the order of its ids; every word of every text is in it.
VOCABULARY: Final = (
    *SPECIAL_TOKENS,
    *_CONNECTING.split(),
    *chain(*((kind, f"{kind}s") for kind in KINDS)),
    *chain(COLORS, BACKGROUNDS, SIZES, NUMBERS),
    *("left", "right", "above", "below"),
)


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


@dataclass(frozen=True, slots=True)
class Question:
    """A question whose answer the scene determines."""

    kind: str  # one of QUESTION_KINDS
    text: str
    answer: str


# --- scenes ----------------------------------------------------------------------------------------------------------


def drawing(seed: int) -> Drawing:
    """The drawing of a seed: one shape, two related shapes (half of all) or a group of equal ones."""
    rng = Random(seed)
    wanted = seed >= HELD_OUT_SEEDS
    while (scene := _scene(rng)).held_out != wanted:
        pass
    return Drawing(seed, scene, tuple(_boxes(scene, rng)))


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


# --- questions -------------------------------------------------------------------------------------------------------


def questions(scene: Scene, rng: Random) -> list[Question]:
    """One question of every kind the scene allows; what it says of shapes varies with `rng`."""
    asked = [_ask(kind, scene, rng) for kind in QUESTION_KINDS]
    return [question for question in asked if question is not None]


#: `exists` and `holds` are the yes/no questions: is there such a shape, does such a relation hold.
QUESTION_KINDS: Final = ("color", "shape", "size", "count", "relation", "exists", "holds", "background")


def _ask(kind: str, scene: Scene, rng: Random) -> Question | None:
    if kind == "background":
        return Question(kind, "what color is the background?", scene.background)
    if kind == "count":
        return _count_question(scene, rng)
    if kind == "exists":
        return _exists_question(scene, rng)
    if kind in {"relation", "holds"}:
        return _relation_question(kind, scene, rng) if scene.relation else None
    return _attribute_question(kind, scene, rng)


def _attribute_question(kind: str, scene: Scene, rng: Random) -> Question | None:
    """What color, shape or size has the shape that the other attributes single out?"""
    shape = rng.choice(scene.shapes)
    attribute = "kind" if kind == "shape" else kind
    names = [name for name in _names(scene, shape) if getattr(name, attribute) == ""]
    if not names:
        return None
    plural = scene.count > 1
    said = _said(rng.choice(names), plural)
    return Question(kind, f"what {kind} {'are' if plural else 'is'} the {said}?", getattr(shape, attribute))


def _count_question(scene: Scene, rng: Random) -> Question:
    """How many such shapes are there? One time in four about shapes that are not there."""
    part = rng.choice(list(_parts(rng.choice(scene.shapes))))
    if rng.random() < 0.25:
        part = _altered_part(part, rng)
    number = sum(_fits(part, shape) for shape in scene.shapes) * scene.count
    return Question("count", f"how many {_said(part, plural=True)} are there?", NUMBERS[number])


def _exists_question(scene: Scene, rng: Random) -> Question:
    some = [part for shape in scene.shapes for part in _parts(shape) if part != _NOTHING]
    part, answer = rng.choice(some), "yes"
    if rng.random() < 0.5:
        answer = "no"
        while any(_fits(part, shape) for shape in scene.shapes):
            part = _altered_part(rng.choice(some), rng)
    said = _said(part)
    return Question("exists", f"is there {'an' if said[0] == 'o' else 'a'} {said}?", answer)


def _relation_question(kind: str, scene: Scene, rng: Random) -> Question:
    """What lies in a relation to one of the two shapes, or: does it hold between them?"""
    subject, target, relation = *scene.shapes, scene.relation
    if rng.random() < 0.5:
        subject, target, relation = target, subject, CONVERSE[relation]
    said = _said(rng.choice(_names(scene, target)))
    if kind == "relation":
        return Question(kind, f"what is {relation} the {said}?", str(subject))
    answer = rng.choice(("yes", "no"))
    if answer == "no":
        relation = rng.choice([other for other in CONVERSE if other != relation])
    return Question(kind, f"is the {_said(rng.choice(_names(scene, subject)))} {relation} the {said}?", answer)


_NOTHING: Final = Shape("", "", "")


def _parts(shape: Shape) -> Iterator[Shape]:
    """The shape with any of its attributes left unsaid (empty)."""
    for mask in range(8):
        yield Shape(
            shape.size if mask & 1 else "",
            shape.color if mask & 2 else "",
            shape.kind if mask & 4 else "",
        )


def _fits(part: Shape, shape: Shape) -> bool:
    return part.size in {"", shape.size} and part.color in {"", shape.color} and part.kind in {"", shape.kind}


def _names(scene: Scene, shape: Shape) -> list[Shape]:
    """The parts of a shape's description that fit no other shape of the scene."""
    return [part for part in _parts(shape) if sum(_fits(part, other) for other in scene.shapes) == 1]


def _said(part: Shape, plural: bool = False) -> str:
    noun = (part.kind or "object") + ("s" if plural else "")
    return " ".join(word for word in (part.size, part.color, noun) if word)


def _altered_part(part: Shape, rng: Random) -> Shape:
    said = [name for name in ("size", "color", "kind") if getattr(part, name)]
    return _altered(part, rng.choice(said), rng) if said else part


def _altered(shape: Shape, attribute: str, rng: Random) -> Shape:
    """The same shape with another value of one attribute."""
    values: dict[str, Sequence[str]] = {"size": list(SIZES), "color": list(COLORS), "kind": KINDS}
    others = [value for value in values[attribute] if value != getattr(shape, attribute)]
    return replace(shape, **{attribute: rng.choice(others)})


# --- texts to match --------------------------------------------------------------------------------------------------


def mismatch(scene: Scene, rng: Random) -> Scene:
    """A description that differs from the scene in one point, so that its caption is false of it."""
    while (other := _changed(scene, rng.choice(_CHANGES), rng)) == scene or len(set(other.shapes)) < len(other.shapes):
        pass
    return other


_CHANGES: Final = ("size", "color", "kind", "relation", "count", "background")


def _changed(scene: Scene, change: str, rng: Random) -> Scene:
    if change == "background":
        return replace(scene, background=rng.choice(list(BACKGROUNDS)))
    if change == "count":
        return scene if scene.relation else replace(scene, count=rng.randint(1, 4))
    if change == "relation":
        if not scene.relation:
            return scene
        if rng.random() < 0.5:
            return replace(scene, shapes=scene.shapes[::-1])
        return replace(scene, relation="above" if scene.relation == "left of" else "left of")
    shapes = list(scene.shapes)
    index = rng.randrange(len(shapes))
    shapes[index] = _altered(shapes[index], change, rng)
    return replace(scene, shapes=tuple(shapes))


# --- manifests -------------------------------------------------------------------------------------------------------


def held_out_drawings(count: int, seed: int) -> Iterator[Drawing]:
    """`count` held-out drawings; other seeds give other ones (each seed has room for a million)."""
    first = HELD_OUT_SEEDS + seed * 10**6
    return (drawing(first + index) for index in range(count))


def write(out: Path, count: int, seed: int) -> None:
    """Write the images and the three manifests below `out`. Equal arguments give equal bytes."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"caption": [], "vqa": [], "itm": []}
    for index, held_out in enumerate(held_out_drawings(count, seed)):
        name = f"images/{index:06d}.png"
        held_out.image().save(out / name)
        for task, fields in _rows(held_out, index).items():
            lines[task].append(json.dumps({"image": name, "id": f"{index:06d}", **fields}))
    for task, rows in lines.items():
        (out / f"{task}.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _rows(held_out: Drawing, index: int) -> dict[str, dict[str, str | bool]]:
    """One row of each task; the kinds of questions and the truth of texts take turns."""
    rng = Random(held_out.seed)
    scene = held_out.scene
    asked = questions(scene, rng)
    question = asked[index % len(asked)]
    matches = index % 2 == 0
    text = (scene if matches else mismatch(scene, rng)).caption
    return {
        "caption": {"expected": scene.caption},
        "vqa": {"question": question.text, "expected": question.answer, "kind": question.kind},
        "itm": {"text": text, "expected": matches},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m blip_engine.shapes.drawings", description="Draw held-out scenes.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=500, help="how many drawings (default 500, at most a million)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default 0)")
    given = parser.parse_args(arguments)
    if not 1 <= given.count <= 10**6 or given.seed < 0:
        parser.error("--count must be 1 to 1000000 and --seed 0 or more")
    try:
        write(given.out, given.count, given.seed)
    except OSError as error:
        sys.stderr.write(f"cannot write to {given.out}: {error.strerror or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
