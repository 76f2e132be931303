"""What crosses between the worker's processes. Light: a loader imports it, and so does the parent."""

from dataclasses import dataclass

from blip_engine.requests import Options, Task


@dataclass(frozen=True, slots=True)
class Failure:
    """How the work on one image ends when it does not succeed; becomes the error record of the rows concerned."""

    code: str  # an error code of the records
    message: str  # one line


@dataclass(frozen=True, slots=True)
class Load:
    """To the engine: make a checkpoint resident under `name`."""

    name: str
    model: str
    task: Task


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """From the engine: a resident checkpoint (its ModelInfo, without the import of torch that comes with that)."""

    name: str
    source: str  # what it was loaded from
    revision: str | None  # the hub's commit
    weights_sha256: str
    image_size: tuple[int, int]  # height, width


@dataclass(frozen=True, slots=True)
class Run:
    """To the engine: one image in a slot with every text asked about it."""

    model: str  # a loaded name
    task: Task
    slot: int
    size: tuple[int, int]  # height, width
    texts: tuple[str, ...]
    options: Options
    candidates: tuple[str, ...] = ()  # vqa: the answers to choose from
