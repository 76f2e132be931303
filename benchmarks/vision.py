"""The engine's vision tower against OpenVINO's, on this CPU, in one run: same random weights, same images.

    pip install openvino; python -m benchmarks.vision --precision bf16 --batches 8 --repeats 7

Both take images to states. The engine gets bytes and normalises them; OpenVINO gets normalised pixels, a process of
its own, and the better of the batch sizes. Repeats are interleaved and take turns in who goes first; the table has
medians, and the spread of the pairs' ratios. `off` is the greatest difference of the states, relative to the largest.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from blip_engine import BlipForConditionalGeneration, BlipImageProcessor, BlipVisionModel
from blip_engine.checkpoint import find_checkpoint
from blip_engine.precision import choose_dtype
from blip_engine.resident import ResidentModel

from . import common
from .engine import interleave, seconds


class OpenVino:
    """The tower of a checkpoint, compiled by OpenVINO."""

    def __init__(self, folder: Path, precision: str, threads: int | None) -> None:
        import openvino  # noqa: PLC0415 - not among what this project installs  # type: ignore[import-not-found]

        self._openvino, self._tower = (
            openvino,
            _States(BlipForConditionalGeneration.from_pretrained(folder).eval().vision_model),
        )
        self._hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, "bf16")}
        if threads:
            self._hints["INFERENCE_NUM_THREADS"] = threads
        self._pixels = np.empty(0, dtype=np.float32)
        self._compiled: Any = None

    def version(self) -> str:
        """Of OpenVINO."""
        return str(self._openvino.__version__)

    def use(self, images: Sequence[np.ndarray[Any, Any]], batch: int) -> None:
        """Run these images `batch` at a time from now on."""
        self._pixels = BlipImageProcessor()(list(images), do_resize=False, return_tensors="np").pixel_values
        first = torch.from_numpy(self._pixels[:batch])
        model = self._openvino.convert_model(self._tower, example_input=first, input=list(first.shape))
        self._compiled = self._openvino.Core().compile_model(model, "CPU", self._hints)
        self._batch = batch

    def run(self) -> np.ndarray[Any, Any]:
        """States (N, S, width) of all images."""
        parts = range(0, len(self._pixels), self._batch)
        return np.concatenate([self._compiled(self._pixels[at : at + self._batch])[0] for at in parts])


class _States(torch.nn.Module):
    def __init__(self, tower: BlipVisionModel) -> None:
        super().__init__()
        self._tower = tower

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self._tower(pixels).last_hidden_state)


class _Manager(BaseManager):
    """Makes and calls objects in a process of its own."""


_Manager.register("OpenVino", OpenVino)


@contextmanager
def peer(folder: Path, precision: str, threads: int | None) -> Iterator[OpenVino]:
    """OpenVINO in a process of its own."""
    with _Manager(ctx=get_context("spawn")) as manager:
        yield cast(OpenVino, manager.OpenVino(folder, precision, threads))  # type: ignore[attr-defined]


def find_best(theirs: OpenVino, images: Sequence[Any], sizes: Sequence[int], device: torch.device) -> int:
    """OpenVINO's fastest batch size."""
    times = {}
    for size in sizes:
        theirs.use(images, size)
        theirs.run()
        times[size] = min(seconds(theirs.run, device)[0] for _ in range(2))
    return min(times, key=lambda size: times[size])


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians of both, and of the pairs' ratio."""
    device = common.settle_process(given)
    checkpoint, dtype = find_checkpoint(str(folder)), choose_dtype(given.precision, device)
    resident: ResidentModel[Any] = ResidentModel(checkpoint, "caption", device, dtype, int8=given.precision == "int8")
    images = common.random_images(given.batches * resident.shapes.images, resident.image_size[0])

    def ours() -> np.ndarray[Any, Any]:
        return torch.cat(resident.image_states(images)).float().cpu().numpy()

    with peer(folder, given.precision, given.threads) as theirs:
        batch = find_best(theirs, images, given.batch_sizes, device)
        theirs.use(images, batch)
        ours()
        time.sleep(1)  # what compiled may still be busy
        times, (mine, other) = interleave([ours, theirs.run], given.repeats, device)
        version = theirs.version()
    ratios = sorted(theirs_took / ours_took for ours_took, theirs_took in times)
    return {
        "model": given.model, "precision": given.precision, "attention": resident.attention,
        "ours": statistics.median(len(images) / took for took, _ in times),
        "openvino": statistics.median(len(images) / took for _, took in times),
        "openvino_batch": batch, "openvino_version": version,
        "ratio": statistics.median(ratios), "ratio_spread": [ratios[0], ratios[-1]],
        "off": float(np.abs(mine - other).max() / np.abs(other).max()),
    }  # fmt: skip


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write a JSON document if a file is named."""
    parser = common.arguments(__doc__)
    parser.add_argument("--batches", type=int, default=4, help="batches of the engine's size in one timed run")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8], help="that OpenVINO may choose from")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments_given)
    facts = common.machine(common.settle_process(given))
    common.print_machine(facts)
    with tempfile.TemporaryDirectory() as folder:
        row = compare(given, common.random_checkpoint(Path(folder), "caption", given.model))
    common.write_json(given.json, facts, rows=[row])
    spread = f"{row['ratio_spread'][0]:.2f}-{row['ratio_spread'][1]:.2f}"
    header = ("model", "precision", "engine, images/s", "OpenVINO", "its batch", "version", "ratio", "spread", "off")
    cells = [row["model"], row["precision"], row["ours"], row["openvino"], row["openvino_batch"]]
    common.print_table(header, [[*cells, row["openvino_version"], row["ratio"], spread, row["off"]]])


if __name__ == "__main__":
    main()
