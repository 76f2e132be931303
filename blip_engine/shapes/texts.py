"""Texts about scenes: questions with their only answer, false descriptions, and the vocabulary of them all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import Final

from .scenes import BACKGROUNDS, COLORS, CONVERSE, KINDS, NUMBERS, SIZES, Scene, Shape

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
class Question:
    """A question whose answer the scene determines."""

    kind: str  # one of QUESTION_KINDS
    text: str
    answer: str


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
