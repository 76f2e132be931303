"""Finding and reading checkpoints: a local directory, a hub repository, or the bundled demo ones.

Loading is all or nothing: a tensor that is missing, unexpected or of another shape fails with its name. safetensors
is preferred; `.bin` files are read with `weights_only=True`, so they cannot run code.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config import CONFIG_FILE
from .errors import CheckpointError, OptionError, first_line
from .requests import DEMO_MODEL, Task
from .shapes import demo_checkpoint

SAFETENSORS_FILE = "model.safetensors"
_WEIGHT_FILES = (SAFETENSORS_FILE, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SIDE_FILES = ("*.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Where and how a checkpoint is looked for; the names are transformers'."""

    cache_dir: str | Path | None = None  # instead of huggingface_hub's
    token: str | bool | None = field(default=None, repr=False)  # of the hub, for a private repository
    local_files_only: bool = False  # take what the cache has, without asking the hub
    force_download: bool = False
    subfolder: str = ""  # of the repository or directory

    @classmethod
    def of(cls, given: Mapping[str, Any], without_effect: Collection[str] = ()) -> Self:
        """From arguments of a `from_pretrained`; None is the default. Raises OptionError for an unknown one."""
        known = [each.name for each in fields(cls)]
        unknown = [name for name in given if name not in known and name not in without_effect]
        if unknown:
            raise OptionError(f"from_pretrained() has no argument {unknown[0]!r}; see docs/api.md for those it has")
        return cls(**{name: given[name] for name in known if given.get(name) is not None})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

    source: str  # as the user named it
    directory: Path
    revision: str | None  # the hub's commit; None for a directory
    safetensors: bool | None = None  # whether the weights must be safetensors, or `.bin` files

    def weight_files(self) -> list[Path]:
        """The files that hold the tensors, safetensors before `.bin`."""
        names = [name for name in _WEIGHT_FILES if self.safetensors in (None, ".safetensors" in name)]
        for name in names:
            path = self.directory / name
            if path.is_file():
                return _shards(path) if name.endswith(".index.json") else [path]
        raise CheckpointError(f"{self.source}: no weights in {self.directory}; looked for {', '.join(names)}")

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


def find_checkpoint(
    model: str | Path,
    revision: str | None = None,
    task: Task | None = None,
    hub: HubOptions | None = None,
    safetensors: bool | None = None,
) -> Checkpoint:
    """Resolve what a user calls a model.

    `model` is a directory, a hub repository id (`owner/name`, `owner/name@revision`), or, with a task, `demo`.
    Hub files are downloaded into, or read from, the cache of huggingface_hub. With `safetensors` the weights are to be
    of that format, or not. Raises CheckpointError.
    """
    name, hub = str(model), hub or HubOptions()
    if name == DEMO_MODEL and task is not None:
        return Checkpoint(name, demo_checkpoint(task), None)
    if name and Path(name).is_dir():
        return Checkpoint(name, Path(name, hub.subfolder), None, safetensors)
    repository, _, pinned = name.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"no model {name!r}: it is neither a directory here nor a hub id such as Salesforce/name")
    return _from_hub(name, repository, revision or pinned or None, hub, safetensors)


def _from_hub(
    source: str, repository: str, revision: str | None, hub: HubOptions, safetensors: bool | None
) -> Checkpoint:
    inside = f"{hub.subfolder}/" if hub.subfolder else ""

    def fetched(weights: str) -> Path:
        patterns = [f"{inside}{name}" for name in (*_SIDE_FILES, weights)]
        return fetch_from_hub(source, repository, revision, patterns, hub)

    snapshot = fetched("pytorch_model*.bin" if safetensors is False else "*.safetensors")
    if safetensors is None and not any(snapshot.joinpath(hub.subfolder).glob("*.safetensors")):
        snapshot = fetched("pytorch_model*.bin")
    if not snapshot.joinpath(hub.subfolder, CONFIG_FILE).is_file():
        raise CheckpointError(f"model {source!r} holds no {inside}{CONFIG_FILE}; is it a BLIP checkpoint?")
    return Checkpoint(source, snapshot / hub.subfolder, snapshot.name, safetensors)


def fetch_from_hub(
    source: str, repository: str, revision: str | None, patterns: Iterable[str], hub: HubOptions | None = None
) -> Path:
    """The directory in huggingface_hub's cache with a repository's files of these patterns. Raises CheckpointError."""
    hub = hub or HubOptions()
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import, and a directory needs none of it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                cache_dir=hub.cache_dir,
                token=hub.token,
                local_files_only=hub.local_files_only,
                force_download=hub.force_download,
            )
        )
    except LocalEntryNotFoundError:
        why = "local_files_only keeps it from the hub" if hub.local_files_only else "the hub cannot be reached"
        raise CheckpointError(
            f"model {source!r} is not in the local cache and {why}; "
            "give a local directory, or set HF_HOME to a cache that holds it"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        line = first_line(error)
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
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None


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
