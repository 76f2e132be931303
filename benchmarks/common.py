"""What the measurements share: random checkpoints, images, texts, flags, what is said of the machine, tables."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip_engine import BertTokenizer, BlipConfig, BlipImageProcessor
from blip_engine.memory import keep_memory
from blip_engine.precision import choose_device, choose_dtype
from blip_engine.requests import Task
from blip_engine.resident import MODEL_CLASSES, TaskModel
from blip_engine.tokenizer import wordpiece

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORDS = [f"word{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(100)]
_SPECIAL = ["[PAD]", "[UNK]", *(f"[unused{i}]" for i in range(99)), "[CLS]", "[SEP]", "[MASK]"]  # ids as BERT's

#: As the hub's configurations say. The vision tower's default deviation of 1e-10 would make every image alike.
_CONFIGS: dict[str, dict[str, Any]] = {
    "base": {"text_config": {"num_attention_heads": 12}, "vision_config": {"initializer_range": 0.02}},
    "large": {
        "text_config": {"num_attention_heads": 12, "encoder_hidden_size": 1024},
        "vision_config": {
            "initializer_range": 0.02, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    },
    # For finding out whether a benchmark runs, not for measuring.
    "tiny": {
        "text_config": {
            "num_attention_heads": 4, "hidden_size": 64, "encoder_hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "vocab_size": 240, "bos_token_id": 238, "max_position_embeddings": 64,
        },
        "vision_config": {
            "initializer_range": 0.1, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "image_size": 64, "patch_size": 16,
        },
    },
}  # fmt: skip
MODELS = tuple(_CONFIGS)


def config_of(model: str) -> BlipConfig:
    """The configuration of `base` (ViT-B), `large` (ViT-L), or `tiny`."""
    return BlipConfig(**_CONFIGS[model])


def random_checkpoint(folder: Path, task: Task, model: str) -> Path:
    """A checkpoint with random weights, laid out as on the hub, which both sides can read."""
    config = config_of(model)
    with ThreadPoolExecutor(1) as passing:  # with it end its OpenMP threads, which would be in the way of the engine's
        passing.submit(lambda: _random_model(config, task).save_pretrained(folder)).result()
    BertTokenizer(wordpiece({word: i for i, word in enumerate([*_SPECIAL, *WORDS])})).save_pretrained(folder)
    BlipImageProcessor(size=config.vision_config.image_size).save_pretrained(folder)
    return folder


def _random_model(config: BlipConfig, task: Task) -> TaskModel:
    torch.manual_seed(0)
    return MODEL_CLASSES[task](config)


def random_images(number: int, size: int) -> list[np.ndarray[Any, Any]]:
    """Noise, uint8 (size, size, 3): what the engine costs does not depend on what is in an image."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(number)]


def random_texts(number: int, tokens: int) -> list[str]:
    """Different texts of `tokens` tokens each, [CLS] and [SEP] counted."""
    generator = np.random.default_rng(1)
    return [" ".join(generator.choice(WORDS, tokens - 2)) for _ in range(number)]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="base", help="size of the random model (default: base)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--precision", default="auto", help="of the engine: auto, fp32, bf16, fp16, ...")
    parser.add_argument("--threads", type=int, help="of torch, per process; default: torch's own choice")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def settle_process(given: argparse.Namespace) -> torch.device:
    """Make this process like a worker's engine process; returns the device that was asked for."""
    keep_memory()
    if given.threads:
        torch.set_num_threads(given.threads)
    return choose_device(given.device)


def warm_up(run: Callable[[], Any], device: torch.device) -> None:
    """What the first runs do: kernels are chosen; on a GPU decoding is captured at a kind's second batch."""
    for _ in range(3 if device.type == "cuda" else 1):
        run()
    synchronise(device)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dtype_name(precision: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`: what `precision` computes in (bf16 or fp16 for policies that only change weights)."""
    known = precision if precision in DTYPES else "auto"
    chosen = choose_dtype(known, device)
    return next(name for name, dtype in DTYPES.items() if dtype == chosen)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and load: what a figure needs beside it to mean anything."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _module() -> str:
    return ".".join(Path(sys.argv[0]).with_suffix("").parts[-2:])


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a clone: the figure goes without it
        return None


def print_machine(facts: dict[str, Any]) -> None:
    """One line per fact; a warning where other programs were using the processor."""
    for name, value in facts.items():
        print(f"{name}: {value}")
    if facts["load_before"] > 0.3:
        print("warning: the machine was busy when this began; do not publish these figures")
    print()


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, numbers with three significant digits."""
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(_cell(value) for value in row)} |", flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.0f}"
        if isinstance(value, float) and value >= 1000
        else (f"{value:#.3g}" if isinstance(value, float) else str(value))
    )


def write_json(path: Path | None, facts: dict[str, Any], **figures: Any) -> None:
    """The figures with the machine's facts, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps({"machine": facts, **figures}, indent=2) + "\n")
