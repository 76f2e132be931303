"""The engine against transformers, on this machine, in one run: same random weights, same tokens forced.

    python benchmarks/engine.py --images 16 --repeats 3

Each side takes the same decoded images to results. transformers runs at the batch sizes given and the best one counts;
both sides run in `--dtype`. Repeats are interleaved; the table has medians, and the ratio of each pair's rates.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from blip_engine import BertTokenizer, BlipConfig, BlipImageProcessor, Engine
from blip_engine.requests import Task
from blip_engine.resident import MODEL_CLASSES
from blip_engine.tokenizer import wordpiece

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUESTION = "a word a word a word"
#: what is timed: name -> task, options of the engine (transformers gets the same)
WORKLOADS: dict[str, tuple[Task, dict[str, Any]]] = {
    "caption, greedy 20": ("caption", {"num_beams": 1, "min_new_tokens": 20, "max_new_tokens": 20}),
    "caption, beams 3, 20": ("caption", {"num_beams": 3, "min_new_tokens": 20, "max_new_tokens": 20}),
    "vqa, beams 3, 9": ("vqa", {"num_beams": 3, "min_new_tokens": 9, "max_new_tokens": 9}),
    "itm": ("itm", {}),
}


def random_checkpoint(folder: Path, task: Task) -> Path:
    """BLIP base (ViT-B, 384 px, 12 heads) with random weights, in the hub's layout."""
    torch.manual_seed(0)
    text, vision = {"num_attention_heads": 12}, {"initializer_range": 0.02}
    MODEL_CLASSES[task](BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)  # type: ignore[arg-type]
    words = ["[PAD]", "[UNK]", *(f"[unused{i}]" for i in range(99)), "[CLS]", "[SEP]", "[MASK]", "a", "word"]
    BertTokenizer(wordpiece({word: i for i, word in enumerate(words)})).save_pretrained(folder)
    BlipImageProcessor().save_pretrained(folder)
    return folder


def peer(folder: Path, task: Task, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """transformers doing the same: pixels of a batch, on the device, to results."""
    kind = getattr(transformers, MODEL_CLASSES[task].__name__)
    model = kind.from_pretrained(folder, dtype=dtype).eval().to(device)
    processor = BlipImageProcessor()
    ids = torch.tensor(BertTokenizer.from_pretrained(folder).encode_rows([QUESTION]), device=device)

    @torch.inference_mode()
    def run(images: Sequence[np.ndarray], options: dict[str, Any]) -> Any:
        pixels = processor(list(images), do_resize=False, return_tensors="pt").pixel_values.to(device, dtype)
        texts = ids.expand(len(images), -1)
        if task == "caption":
            return model.generate(pixels, **options).cpu()
        if task == "vqa":
            return model.generate(texts, pixels, **options).cpu()
        both = [model(texts, pixels, use_itm_head=head).itm_score.float().cpu() for head in (True, False)]
        return both[0].softmax(-1)[:, 1], both[1].diag()

    return run


def rate(run: Callable[[], Any], images: int) -> float:
    """Images per second of one run."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - started)


def compare(name: str, images: list[np.ndarray], given: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides and of their ratio for one workload."""
    task, options = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(Path(folder), task)
        engine = Engine.load({task: str(checkpoint)}, given.device, given.dtype)
        theirs = peer(checkpoint, task, DTYPES[given.dtype], engine.device)
    asked = {"caption": engine.caption, "vqa": engine.answer, "itm": engine.match}[task]
    texts = [""] * len(images) if task == "caption" else [QUESTION] * len(images)

    def ours() -> Any:
        return asked(images, texts, **options)

    def peer_in(batch: int) -> Callable[[], Any]:
        return lambda: [theirs(images[i : i + batch], options) for i in range(0, len(images), batch)]

    ours()
    best = max(given.peer_batches, key=lambda batch: rate(peer_in(batch), len(images)))
    pairs = [(rate(ours, len(images)), rate(peer_in(best), len(images))) for _ in range(given.repeats)]
    engine.close()
    ratios = sorted(a / b for a, b in pairs)
    return {
        "workload": name,
        "ours": statistics.median(a for a, _ in pairs),
        "transformers": statistics.median(b for _, b in pairs),
        "transformers_batch": best,
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
    }


def main() -> None:
    """Run the workloads, print a table, and a JSON document if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--only", help="workloads whose names contain this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (384, 384, 3), dtype=np.uint8) for _ in range(given.images)]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, {given.dtype}")
    print(f"{'images/s':24}{'ours':>8}{'transformers':>14}{'batch':>7}{'ratio':>8}   spread")
    rows = []
    for name in WORKLOADS:
        if given.only is None or given.only in name:
            row = compare(name, images, given)
            rows.append(row)
            low, high = row["ratio_spread"]
            print(
                f"{name:24}{row['ours']:8.2f}{row['transformers']:14.2f}{row['transformers_batch']:7}"
                f"{row['ratio']:8.2f}   {low:.2f}-{high:.2f}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps({"argv": sys.argv[1:], "where": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
