"""Measure a checkpoint on held-out drawings: exact match of captions and answers, right decisions on texts.

python -m blip_engine.shapes.evaluate vqa OUT/vqa --count 1000 --precision bf16
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import find_checkpoint
from ..errors import BlipError
from ..image_processor import CLIP_MEAN, CLIP_STD
from ..models import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from ..requests import TASKS, Task
from ..resident import MODEL_CLASSES
from ..tokenizer import BertTokenizer
from .scenes import Drawing, held_out_drawings
from .texts import mismatch, questions

#: (kind, whether the model was right) for everything asked of a batch of drawings
Marks: TypeAlias = Iterator[tuple[str, bool]]


def pixels(batch: Sequence[Drawing]) -> Tensor:
    """Normalised images (B, 3, 64, 64), as the checkpoints' image processor makes them."""
    stacked = torch.from_numpy(np.stack([np.asarray(each.image()) for each in batch]))
    return ((stacked / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def evaluate(task: Task, model: Any, tokenizer: BertTokenizer, count: int, seed: int = 0) -> dict[str, float]:
    """Accuracy on `count` held-out drawings by kind of drawing, question or text, and over `all`."""
    mark = _MARKERS[task]
    right, asked = Counter[str](), Counter[str]()
    drawn = list(held_out_drawings(count, seed))
    for start in range(0, count, 50):
        for kind, is_right in mark(model.eval(), tokenizer, drawn[start : start + 50]):
            asked.update([kind, "all"])
            right.update([kind, "all"] * is_right)
    return {kind: right[kind] / number for kind, number in sorted(asked.items())}


def _captions(model: BlipForConditionalGeneration, tokenizer: BertTokenizer, batch: list[Drawing]) -> Marks:
    tokens = model.generate(pixels(batch).to(model.dtype), num_beams=3)
    for each, text in zip(batch, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
        kind = "pair" if each.scene.relation else "group" if each.scene.count > 1 else "one"
        yield kind, text == each.scene.caption


def _answers(model: BlipForQuestionAnswering, tokenizer: BertTokenizer, batch: list[Drawing]) -> Marks:
    asked = [(index, q) for index, each in enumerate(batch) for q in questions(each.scene, Random(each.seed))]
    images = pixels(batch).to(model.dtype)[[index for index, _ in asked]]
    given = tokenizer([q.text for _, q in asked], padding=True, return_tensors="pt")
    tokens = model.generate(given["input_ids"], images, given["attention_mask"], num_beams=3, max_new_tokens=9)
    for (_, question), answer in zip(asked, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
        yield question.kind, answer == question.answer


def _matches(model: BlipForImageTextRetrieval, tokenizer: BertTokenizer, batch: list[Drawing]) -> Marks:
    true = [each.scene.caption for each in batch]
    false = [mismatch(each.scene, Random(each.seed)).caption for each in batch]
    given = tokenizer(true + false, padding=True, return_tensors="pt")
    images = pixels(batch).to(model.dtype).repeat(2, 1, 1, 1)
    scores = model(given["input_ids"], images, attention_mask=given["attention_mask"]).itm_score
    said = (scores[:, 1] > scores[:, 0]).tolist()
    yield from (("match", yes) for yes in said[: len(batch)])
    yield from (("mismatch", not yes) for yes in said[len(batch) :])


_MARKERS: Final[dict[Task, Callable[[Any, BertTokenizer, list[Drawing]], Marks]]] = {
    "caption": _captions,
    "vqa": _answers,
    "itm": _matches,
}
PRECISIONS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m blip_engine.shapes.evaluate", description="Measure a checkpoint.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", help="directory of the checkpoint, or demo")
    parser.add_argument("--count", type=int, default=1000, help="how many drawings (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which drawings (default 0)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    given = parser.parse_args(arguments)
    try:
        checkpoint = find_checkpoint(given.model, task=given.task)
        model = MODEL_CLASSES[given.task].from_checkpoint(checkpoint, PRECISIONS[given.precision])
        tokenizer = BertTokenizer.from_directory(checkpoint.directory)
    except BlipError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for kind, accuracy in evaluate(given.task, model, tokenizer, given.count, given.seed).items():
        sys.stdout.write(f"{kind:12} {accuracy:8.2%}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
