"""The engine against transformers, on this machine, in one run: same random weights, same lengths forced.

    python -m benchmarks.engine --model base --images 16 --repeats 5

Both sides take images at the model's size to results. transformers gets its best setting: pixels normalised and cast
beforehand, the better of its number types, then the best of the batch sizes, all found in this run. It has a process of
its own, as its users run it; `--peer-memory ours` gives it the engine's memory setting, too. For ITM it computes the
matching score only (one pass), the engine the similarity as well.

Repeats are interleaved and take turns in who goes first; the table has medians, and the spread of the pairs' ratios.
`same` is the share of rows with the same tokens (ITM and embeddings: the greatest difference); in half precision random
weights make near-ties, so only fp32 on both sides must give 1.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from blip_engine import Engine
from blip_engine.precision import choose_device
from blip_engine.requests import TASKS, Request, Task, options_for

from . import common
from .common import DTYPES
from .peer import Theirs, peer
from .workloads import WORKLOADS, Images, Workload


class Ours:
    """The engine, asked as a worker asks it: a request per image with all its texts."""

    def __init__(self, folder: Path, task: Task, given: argparse.Namespace) -> None:
        self.engine = Engine.load({task: str(folder)}, given.device, given.precision)

    def run(self, workload: Workload, images: Images) -> Any:
        """Results of every image and text, in order."""
        if workload.embeds:
            words = workload.words * len(images)
            return self.engine.embed(images), self.engine.embed(texts=words)
        options = options_for(workload.task, workload.options)
        texts = tuple(workload.words) or ("",)
        requests = [Request(workload.task, workload.task, pixels, texts, options) for pixels in images]
        futures = [self.engine.submit(request) for request in requests]
        return [result for future in futures for result in future.result()]


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long it took, and what came out."""
    started = time.perf_counter()
    found = run()
    common.synchronise(device)
    return time.perf_counter() - started, found


def find_best(theirs: Theirs, workload: Workload, images: Images, given: argparse.Namespace) -> tuple[str, int]:
    """transformers' fastest number type (at the smallest batch), then its fastest batch size, in rows."""
    device = choose_device(given.device)
    times: dict[tuple[str, int], float] = {}

    def measure(dtype: str, batch: int) -> None:
        theirs.use(DTYPES[dtype])
        rows = theirs.prepare(workload, images[: -(-batch // max(1, workload.texts))], batch)
        try:
            theirs.run(workload, batch)  # the first one is slower
            took = min(seconds(lambda: theirs.run(workload, batch), device)[0] for _ in range(2))
        except torch.OutOfMemoryError:
            return
        times[dtype, batch] = took / rows

    sizes = [size for size in given.batch_sizes if size <= len(images) * max(1, workload.texts)] or [len(images)]
    for dtype in given.peer_precisions:
        measure(dtype, sizes[0])
    best = min(times, key=lambda setting: times[setting])[0]
    for size in sizes[1:]:
        measure(best, size)
    return min((setting for setting in times if setting[0] == best), key=lambda setting: times[setting])


def interleave(
    sides: Sequence[Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[list[list[float]], list[Any]]:
    """Seconds of every repeat of both sides, and what each gave last. They take turns in who goes first."""
    times: list[list[float]] = []
    outputs: list[Any] = [None, None]
    for repeat in range(repeats):
        pair = [0.0, 0.0]
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            pair[side], outputs[side] = seconds(sides[side], device)
        times.append(pair)
    return times, outputs


def compare(ours: Ours, theirs: Theirs | None, workload: Workload, given: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides, and of the pairs' ratio, for one workload."""
    images = common.random_images(given.images, common.config_of(given.model).vision_config.image_size)
    items, device = len(images) * max(1, workload.texts), ours.engine.device
    row = {
        "workload": workload.name, "unit": workload.unit, "images": len(images), "precision": given.precision,
        "peer_memory": given.peer_memory,
    }  # fmt: skip
    common.warm_up(lambda: ours.run(workload, images), device)
    if theirs is None:
        rates = [items / seconds(lambda: ours.run(workload, images), device)[0] for _ in range(given.repeats)]
        return row | {"ours": statistics.median(rates), "all": rates, "note": "transformers cannot run it"}
    dtype, batch = find_best(theirs, workload, images, given)
    theirs.use(DTYPES[dtype])
    theirs.prepare(workload, images)
    sides = [lambda: ours.run(workload, images), lambda: theirs.run(workload, batch)]
    times, outputs = interleave(sides, given.repeats, device)
    ratios = sorted(other / mine for mine, other in times)
    return row | {
        "ours": statistics.median(items / mine for mine, _ in times),
        "transformers": statistics.median(items / other for _, other in times),
        "transformers_setting": {"precision": dtype, "batch": batch},
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "seconds": times,
        "same": None if workload.options.get("do_sample") else agreement(workload, theirs, *outputs),
    }


def agreement(workload: Workload, peer: Theirs, ours: Any, theirs: Any) -> float:
    """Share of rows with the same tokens (answers: words); for scores and vectors the greatest difference."""
    if workload.embeds:
        other = [np.concatenate([part[which] for part in theirs]) for which in (0, 1)]
        return max(float(np.abs(mine - vectors).max()) for mine, vectors in zip(ours, other, strict=True))
    if workload.task == "itm":
        return float(np.abs(np.array([match.itm for match in ours]) - np.concatenate(theirs)).max())
    rows = [row for part in theirs for row in part.tolist()]
    if workload.task == "vqa":
        return statistics.mean(mine.text == peer.decode(row) for mine, row in zip(ours, rows, strict=True))
    return statistics.mean(mine.token_ids == tuple(row) for mine, row in zip(ours, rows, strict=True))


def run_task(task: Task, names: Sequence[str], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The workloads of one task, on one checkpoint, each as soon as it is measured."""
    device = common.settle_process(given)
    with ExitStack() as open_:
        folder = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = common.random_checkpoint(folder, task, given.model)
        ours, theirs = Ours(checkpoint, task, given), None
        open_.callback(ours.engine.close)
        if (task, given.model) != ("vqa", "large"):  # it forces the image's width on its answering decoder
            theirs = open_.enter_context(peer(checkpoint, task, device, given.threads, given.peer_memory == "ours"))
        for name in names:
            print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
            row = compare(ours, theirs, WORKLOADS[name], given)
            print(f"{row['ours']:.3g} {row['unit']}, ratio {row.get('ratio', float('nan')):.2f}", file=sys.stderr)
            yield row


def parse(arguments_given: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with what `--quick` and the device decide filled in."""
    parser = common.arguments(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
                        help=f"some of: {', '.join(WORKLOADS)}")  # fmt: skip
    parser.add_argument("--images", type=int, help="images in one timed run (default: 16; on a GPU 512)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="ROWS", help="that transformers may choose from")
    parser.add_argument("--peer-precisions", nargs="+", choices=DTYPES, help="that transformers may choose from "
                        "(default: the engine's; on a CPU fp32 too, on a GPU bf16 and fp16)")  # fmt: skip
    parser.add_argument("--peer-memory", choices=("usual", "ours"), default="usual",
                        help="whether transformers' process keeps freed memory as the engine's does")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="2 repeats of few images: whether it runs, not how fast")
    given = parser.parse_args(arguments_given)
    device = choose_device(given.device)
    gpu, own = device.type == "cuda", common.dtype_name(given.precision, device)
    if given.quick:
        given.repeats, given.images = 2, given.images or 4
        given.batch_sizes, given.peer_precisions = given.batch_sizes or [4], given.peer_precisions or [own]
    given.images = given.images or (512 if gpu else 16)
    given.batch_sizes = sorted(given.batch_sizes or ([32, 64, 128, 256, 512] if gpu else [4, 8, 16]))
    given.peer_precisions = given.peer_precisions or list(
        dict.fromkeys([own, *(["bf16", "fp16"] if gpu else ["fp32"])])
    )
    return given


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Run the workloads, print a table, and write a JSON document if a file is named."""
    given = parse(arguments_given)
    facts = common.machine(common.settle_process(given)) | {
        "transformers": transformers.__version__,
        "model": given.model,
    }
    common.print_machine(facts)
    rows = []
    for task in TASKS:
        names = [name for name in given.workloads if WORKLOADS[name].task == task]
        for row in run_task(task, names, given) if names else ():
            rows.append(row)
            common.write_json(given.json, facts, rows=rows)  # what is measured is kept, come what may
    common.print_table(
        ("workload", "unit", "ours", "transformers", "its setting", "ratio", "spread", "same"),
        [table_row(row) for row in rows],
    )


def table_row(row: dict[str, Any]) -> list[object]:
    """A result as a row of the table."""
    if "ratio" not in row:
        return [row["workload"], row["unit"], row["ours"], row["note"], None, None, None, None]
    setting, spread = row["transformers_setting"], row["ratio_spread"]
    return [
        row["workload"], row["unit"], row["ours"], row["transformers"],
        f"{setting['precision']}, {setting['batch']} rows", row["ratio"], f"{spread[0]:.2f}-{spread[1]:.2f}",
        row["same"],
    ]  # fmt: skip


if __name__ == "__main__":
    main()
