"""Finding and reading checkpoints: a local directory, a hub repository, or the bundled demo ones.

Loading is all or nothing: a tensor that is missing, unexpected or of another shape fails with its name. safetensors
is preferred; `.bin` files are read with `weights_only=True`, so they cannot run code.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config import CONFIG_FILE
from .errors import CheckpointError
from .requests import DEMO_MODEL, Task
from .shapes import demo_checkpoint

SAFETENSORS_FILE = "model.safetensors"
_WEIGHT_FILES = (SAFETENSORS_FILE, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SIDE_FILES = ("*.json", "vocab.txt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

    source: str  # as the user named it
    directory: Path
    revision: str | None  # the hub's commit; None for a directory

    def weight_files(self) -> list[Path]:
        """The files that hold the tensors, safetensors before `.bin`."""
        for name in _WEIGHT_FILES:
            path = self.directory / name
            if path.is_file():
                return _shards(path) if name.endswith(".index.json") else [path]
        raise CheckpointError(f"{self.source}: no weights in {self.directory}; looked for {', '.join(_WEIGHT_FILES)}")

    def weights_sha256(self) -> str:
        """SHA-256 over the weight files in order, in hexadecimal."""
        digest = hashlib.sha256()
        for path in self.weight_files():
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def read(self) -> dict[str, Tensor]:
        """All tensors by name, memory-mapped where the format allows it."""
        tensors: dict[str, Tensor] = {}
        for path in self.weight_files():
            tensors |= _read_tensors(path)
        return tensors


def find_checkpoint(model: str | Path, revision: str | None = None, task: Task | None = None) -> Checkpoint:
    """Resolve what a user calls a model.

    `model` is a directory, a hub repository id (`owner/name`, `owner/name@revision`), or, with a task, `demo`.
    Hub files are downloaded into, or read from, the cache of huggingface_hub. Raises CheckpointError.
    """
    name = str(model)
    if name == DEMO_MODEL and task is not None:
        return Checkpoint(name, demo_checkpoint(task), None)
    if name and Path(name).is_dir():
        return Checkpoint(name, Path(name), None)
    repository, _, pinned = name.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"no model {name!r}: it is neither a directory here nor a hub id such as Salesforce/name")
    return _from_hub(name, repository, revision or pinned or None)


def _from_hub(source: str, repository: str, revision: str | None) -> Checkpoint:
    directory = fetch_from_hub(source, repository, revision, (*_SIDE_FILES, "*.safetensors"))
    if not any(directory.glob("*.safetensors")):
        directory = fetch_from_hub(source, repository, revision, (*_SIDE_FILES, "pytorch_model*.bin"))
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(f"model {source!r} holds no {CONFIG_FILE}; is it a BLIP checkpoint?")
    return Checkpoint(source, directory, directory.name)


def fetch_from_hub(source: str, repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """The directory in huggingface_hub's cache with a repository's files of these patterns. Raises CheckpointError."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import, and a directory needs none of it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"model {source!r} is not in the local cache and the hub cannot be reached; "
            "give a local directory, or set HF_HOME to a cache that holds it"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"model {source!r} cannot be fetched from the hub: {line}") from None


def check_tensors(
    source: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], optional: Iterable[str]
) -> None:
    """Raise CheckpointError, naming the tensors, unless `given` fits `wanted` exactly; `optional` may be absent."""
    missing = sorted(wanted.keys() - given.keys() - set(optional))
    unexpected = sorted(given.keys() - wanted.keys())
    misshaped = [
        f"{name} is {tuple(given[name].shape)} and must be {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & given.keys())
        if wanted[name].shape != given[name].shape
    ]
    whole = [f"{name} is {value.dtype}" for name, value in sorted(given.items()) if not value.is_floating_point()]
    kinds = ("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped), ("no floating-point", whole)
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in kinds
        if names
    ]
    if faults:
        raise CheckpointError(f"{source}: the tensors do not fit the model. {'; '.join(faults)}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error}") from None
    paths = [index.parent / Path(name).name for name in names]  # a name only: an index must not lead elsewhere
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(f"{index.parent}: shards named by {index.name} are absent: {', '.join(absent)}")
    return paths


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return as_tensors(path, read_pickle(path))
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def as_tensors(path: Path, value: Any) -> dict[str, Tensor]:
    """`value`, read from `path`, if it is a dictionary of tensors by name. Raises CheckpointError."""
    if isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        return value
    raise CheckpointError(f"{path} holds no dictionary of tensors")


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU. Only tensors and plain values are read, so the file cannot run code.

    Raises CheckpointError.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 are not, and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the bytes decide what is raised. torch's text advises to load the file unsafely
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {foreign[1]}, which could run code" if foreign else "it is no whole torch file"
        raise CheckpointError(f"{path} is refused: {what}; only tensors and plain values are read") from None
