"""Where the engine's time goes: torch's profiler over full batches, sorted into the engine's stages.

    python -m benchmarks.profile --workloads caption-beams3 --precision bf16 --trace trace.json

For every stage: milliseconds per image on the processor inside of operators, those outside of them (Python and the
framework), and on a GPU the milliseconds of its kernels. Then the operators that took longest. The profiler itself
costs time: the shares count, `unprofiled` says how long the batch takes without it. On a GPU `busy` is the kernels'
share of that: what is missing to 1 is waiting for the host.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile

from . import common
from .limit import batch_of, runner_of
from .stages import HOST, PREFIX, STAGES, watching
from .workloads import WORKLOADS, Workload

Counts: TypeAlias = dict[str, float]


def stage_of(event: Any) -> str:
    """The innermost stage that an event happened in."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return HOST


def sorted_events(
    events: Any, images: int
) -> tuple[dict[str, dict[str, float]], dict[tuple[str, str], dict[str, float]]]:
    """Milliseconds per image by stage, and by (stage, operator)."""
    stages: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    operators: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event.device_type.name != "CPU":
            continue  # a kernel: its time is with the operator that launched it
        stage, scale = stage_of(event), 1e-3 / images  # the profiler counts microseconds
        device = event.self_device_time_total * scale
        stages[stage]["device"] += device
        if event.name.startswith(PREFIX):
            stages[stage]["outside"] += event.self_cpu_time_total * scale
            stages[stage]["calls"] += 1
            continue
        stages[stage]["operators"] += event.self_cpu_time_total * scale
        row = operators[stage, event.name]
        row["cpu"] += event.self_cpu_time_total * scale
        row["device"] += device
        row["calls"] += 1
    return stages, operators


def measure(workload: Workload, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Profile one batch of a workload."""
    runner = runner_of(given, workload.task, device)
    batch = batch_of(runner, workload)
    common.warm_up(lambda: runner.run(batch), device)
    started = time.perf_counter()
    for _ in range(given.repeats):
        runner.run(batch)
    common.synchronise(device)
    plain = (time.perf_counter() - started) / given.repeats
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as seen:
        with watching(runner, exact=False) as watch, watch.stage(HOST):
            runner.run(batch)
        common.synchronise(device)
    if given.trace:
        seen.export_chrome_trace(str(given.trace.with_name(f"{given.trace.stem}-{workload.name}{given.trace.suffix}")))
    stages, operators = sorted_events(seen.events(), len(batch))
    busy = sum(row["device"] for row in stages.values()) / (1e3 * plain / len(batch)) if device.type == "cuda" else None
    return {
        "workload": workload.name,
        "images": len(batch),
        "unprofiled_ms_per_image": 1e3 * plain / len(batch),
        "busy": busy,
        "stages": {name: dict(stages[name]) for name in STAGES if name in stages},
        "operators": [
            {"stage": stage, "operator": name, **row}
            for (stage, name), row in sorted(operators.items(), key=lambda item: -item[1]["cpu"] - item[1]["device"])
        ][: given.top],
    }


def show(found: dict[str, Any], on_gpu: bool) -> None:
    """Both tables of a workload."""
    print(
        f"{found['workload']}: {found['images']} images, {found['unprofiled_ms_per_image']:.3g} ms per image unprofiled"
    )
    if found["busy"] is not None:
        print(f"busy: {found['busy']:.2f}")
    which = "device" if on_gpu else "operators"
    total = sum(row.get(which, 0.0) + (0.0 if on_gpu else row.get("outside", 0.0)) for row in found["stages"].values())
    rows = []
    for name, row in found["stages"].items():
        inside, outside, device = (row.get(key, 0.0) for key in ("operators", "outside", "device"))
        share = (device if on_gpu else inside + outside) / total if total else 0.0
        rows.append([name, int(row.get("calls", 0)), inside, outside, device if on_gpu else None, f"{share:.1%}"])
    print()
    common.print_table(("stage", "calls", "operators, ms/image", "outside, ms/image", "GPU, ms/image", "share"), rows)
    print()
    common.print_table(
        ("operator", "in", "calls", "CPU, ms/image", "GPU, ms/image"),
        [
            [row["operator"], row["stage"], int(row["calls"]), row["cpu"], row["device"] if on_gpu else None]
            for row in found["operators"]
        ],
    )
    print()


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Profile the workloads, one after the other."""
    parser = common.arguments(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=[name for name in WORKLOADS if name != "embed"],
                        metavar="NAME", default=["caption-beams3", "vqa-8", "itm-8"],
                        help=f"some of: {', '.join(WORKLOADS)}")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="of the unprofiled run")
    parser.add_argument("--top", type=int, default=12, help="operators shown")
    parser.add_argument("--trace", type=Path, help="also write a trace for chrome://tracing, named by the workload")
    given = parser.parse_args(arguments_given)
    device = common.settle_process(given)
    facts = common.machine(device) | {"model": given.model, "precision": given.precision}
    common.print_machine(facts)
    found = [measure(WORKLOADS[name], given, device) for name in given.workloads]
    for each in found:
        show(each, device.type == "cuda")
    common.write_json(given.json, facts, workloads=found)


if __name__ == "__main__":
    main()
