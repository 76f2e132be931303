"""What crosses between the worker's processes. Light: a loader imports it, and so does the parent."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from blip_engine.errors import CheckpointError
from blip_engine.requests import Options, Task
from orchestrator.errors import BlipBatchError


@dataclass(frozen=True, slots=True)
class Failure:
    """How the work on one image ends when it does not succeed; becomes the error record of the rows concerned."""

    code: str  # an error code of the records
    message: str  # one line


class Ask(NamedTuple):
    """To a loader: put the image at a location into a slot."""

    slot: int
    location: Any  # what orchestrator.fetch.fetch takes
    size: tuple[int, int]  # height, width


class Loaded(NamedTuple):
    """From a loader: what became of an Ask."""

    slot: int
    outcome: Failure | tuple[int, int] | BlipBatchError  # (height, width) in the slot; why none can be fetched
    bytes: int = 0  # fetched
    fetch_seconds: float = 0.0
    decode_seconds: float = 0.0  # the resize included


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
    judge: str = ""  # the other one's name, where a task needs two
    precision: str = ""
    device: str = ""  # cpu or cuda

    def judged_by(self, other: "Checkpoint") -> "Checkpoint":
        """This one and the filter of its captions as one. Raises CheckpointError when one image cannot serve both."""
        if self.image_size != other.image_size:
            sizes = " and ".join(f"{each.source} at {each.image_size[0]} pixels" for each in (self, other))
            raise CheckpointError(f"{sizes}: a captioner and its filter must take images of one size")
        revision = f"{self.revision}+{other.revision}" if self.revision and other.revision else None
        weights = f"{self.weights_sha256}+{other.weights_sha256}"
        source = f"{self.source}+{other.source}"
        return replace(self, source=source, revision=revision, weights_sha256=weights, judge=other.name)


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
    judge: str = ""  # capfilt: the loaded name of the filter
