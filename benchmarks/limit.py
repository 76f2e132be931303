"""What this device can do at best, and the share of it that the engine reaches, stage by stage.

    python -m benchmarks.limit --model base --precision bf16

The peaks are measured here, before and after the rest: the best of several large matrix products for every number type,
and a copy of a buffer larger than any cache. Stages are timed with a wait at their borders, in batches of the engine's
own size; the work they need is computed by `benchmarks.flops`. Large products are held against the product peak;
decoding reads all weights and all keys and values in every step, and is held against the copy peak too. The last row of
a workload is the engine as a whole.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from blip_engine.checkpoint import find_checkpoint
from blip_engine.precision import choose_dtype
from blip_engine.requests import Request, Task, options_for
from blip_engine.resident import ResidentModel
from blip_engine.runner import Runner, runner_for

from . import common, flops
from .stages import HOST, STAGES, watching
from .workloads import WORKLOADS, Workload


def best_seconds(run: Callable[[], Any], device: torch.device, repeats: int, budget: float) -> float:
    """The shortest of at least `repeats` runs, or of what fits into `budget` seconds."""
    times: list[float] = []
    run()
    while len(times) < 2 or (len(times) < repeats and sum(times) < budget):
        common.synchronise(device)
        started = time.perf_counter()
        run()
        common.synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times)


def product_peak(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """FLOP/s of the best of several matrix products, the shapes of BLIP's vision tower among them."""
    sizes = [(2308, 768, 3072), (2308, 3072, 768), (4096, 4096, 4096)]
    if device.type == "cuda":
        sizes = [(36928, 768, 3072), (36928, 3072, 768), (8192, 8192, 8192), (16384, 8192, 8192)]
    if quick:
        sizes = [(256, 256, 256)]
    best = 0.0
    for rows, inner, columns in sizes:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(columns, inner, device=device, dtype=dtype).t()  # as a layer's weights lie
        took = best_seconds(lambda left=left, right=right: left @ right, device, 20, 5)  # type: ignore[misc]
        best = max(best, 2 * rows * inner * columns / took)
    return best


def copy_peak(device: torch.device, quick: bool) -> float:
    """Bytes/s read and written by a copy."""
    size = (4 << 30 if device.type == "cuda" else 512 << 20) >> (8 if quick else 0)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, 20, 5)


def peaks(device: torch.device, quick: bool) -> dict[str, Any]:
    """Products of every number type, and copies."""
    products = {}
    for name, dtype in common.DTYPES.items():
        if name == "fp16" and device.type == "cpu":
            continue  # no product of it in this generation of processors that anyone would use
        products[name] = product_peak(device, dtype, quick)
    return {"flop_per_second": products, "copy_bytes_per_second": copy_peak(device, quick)}


def better(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements of the peaks."""
    first, second = one["flop_per_second"], other["flop_per_second"]
    return {
        "flop_per_second": {name: max(first[name], second[name]) for name in first},
        "copy_bytes_per_second": max(one["copy_bytes_per_second"], other["copy_bytes_per_second"]),
    }


def batch_of(runner: Runner[Any], workload: Workload) -> list[Any]:
    """A full batch of the engine, prepared."""
    chosen, words = options_for(workload.task, workload.options), tuple(workload.words) or ("",)
    pictures = common.random_images(runner.resident.shapes.groups, runner.resident.image_size[0])
    return [runner.prepare(Request("m", workload.task, each, words, chosen)) for each in pictures]


def runner_of(given: argparse.Namespace, task: Task, device: torch.device) -> Runner[Any]:
    """A runner around a random model."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = find_checkpoint(str(common.random_checkpoint(Path(folder), task, given.model)))
        dtype, int8 = choose_dtype(given.precision, device), given.precision == "int8"
        compiled = device.type == "cuda"  # as an engine does by itself
        resident: ResidentModel[Any] = ResidentModel(checkpoint, task, device, dtype, int8=int8, compiled=compiled)
    return runner_for(task, resident)


def watch(runner: Runner[Any], batch: Sequence[Any], repeats: int) -> dict[str, float]:
    """Median seconds of every stage of a batch."""
    rounds: list[dict[str, float]] = []
    for _ in range(repeats):
        with watching(runner) as seen, seen.stage(HOST):
            runner.run(batch)
        rounds.append(dict(seen.seconds))
    return {name: statistics.median(each[name] for each in rounds) for name in STAGES if name in rounds[0]}


def decode_bytes(runner: Runner[Any], images: int, steps: int) -> int:
    """Bytes that decoding captions reads at least: weights, and the images' keys and values, in every step."""
    config, itemsize = runner.resident.model.config, runner.resident.dtype.itemsize
    batches = -(-images // runner.resident.shapes.groups)
    return steps * (batches * flops.decoder_bytes(config, itemsize) + images * flops.cross_bytes(config, itemsize))


def measure(workload: Workload, given: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Seconds, images, FLOP and bytes of every stage of one workload."""
    runner = runner_of(given, workload.task, device)
    batch = batch_of(runner, workload)
    common.warm_up(lambda: runner.run(batch), device)
    seconds = watch(runner, batch, given.repeats)
    whole = statistics.median(_timed(lambda: runner.run(batch), device) for _ in range(given.repeats))
    config, images = runner.resident.model.config, len(batch)
    tokens = len(batch[0].tokens[0]) if workload.texts else 0  # padding is no work that anyone needs
    steps, beams = workload.options.get("max_new_tokens", 0), workload.options.get("num_beams", 1)
    work = flops.by_stage(config, workload.task, images, workload.texts, tokens, beams, steps)
    rows = [{"stage": name, "seconds": seconds[name], "flop": work.get(name)} for name in seconds]
    if workload.task == "caption":
        took = sum(seconds.get(name, 0.0) for name in ("decoder", "text attention", "head", "search"))
        rows.append({"stage": "decoding, by bytes", "seconds": took, "bytes": decode_bytes(runner, images, steps)})
    rows.append({"stage": "all, not watched", "seconds": whole, "flop": sum(work.values())})
    return [{"workload": workload.name, "images": images, **row} for row in rows]


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    common.synchronise(device)
    started = time.perf_counter()
    run()
    common.synchronise(device)
    return time.perf_counter() - started


def with_shares(row: dict[str, Any], found: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A stage with milliseconds per image, GFLOP per image and its shares of the peaks."""
    seconds, flop, moved = row["seconds"], row.get("flop"), row.get("bytes")
    return row | {
        "ms_per_image": 1e3 * seconds / row["images"],
        "gflop_per_image": flop / row["images"] / 1e9 if flop else None,
        "peak_share": flop / seconds / found["flop_per_second"][dtype] if flop else None,
        "copy_share": moved / seconds / found["copy_bytes_per_second"] if moved else None,
    }


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Measure the peaks, then the stages."""
    parser = common.arguments(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME",
                        default=["caption-beams3", "caption-greedy", "vqa-8", "itm-8"],
                        help=f"some of: {', '.join(WORKLOADS)}")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small products, 1 repeat: whether it runs")
    given = parser.parse_args(arguments_given)
    given.repeats = 1 if given.quick else given.repeats
    device = common.settle_process(given)
    facts = common.machine(device) | {"model": given.model, "precision": given.precision}
    common.print_machine(facts)
    before = peaks(device, given.quick)
    stages = [row for name in given.workloads for row in measure(WORKLOADS[name], given, device)]
    found = better(before, peaks(device, given.quick))  # of two moments: something else may have run at one of them
    for name, rate in found["flop_per_second"].items():
        print(f"matrix products, {name}: {rate / 1e12:.3f} TFLOP/s")
    print(f"copy: {found['copy_bytes_per_second'] / 1e9:.1f} GB/s read and written\n")
    rows = [with_shares(row, found, common.dtype_name(given.precision, device)) for row in stages]
    columns = ("workload", "stage", "ms_per_image", "gflop_per_image", "peak_share", "copy_share")
    common.print_table([c.replace("_", " ") for c in columns], [[row[c] for c in columns] for row in rows])
    common.write_json(given.json, facts, peaks=found, rows=rows)


if __name__ == "__main__":
    main()
