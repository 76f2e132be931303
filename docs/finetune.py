"""Teach a bundled model another wording, on drawings made on the fly: see docs/finetune.md.

python docs/finetune.py OUT --steps 60
python docs/finetune.py OUT --task itm --steps 60
"""
# ruff: noqa: T201

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random

import torch

from blip_engine import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipProcessor, Engine
from blip_engine.features import BatchFeature
from blip_engine.requests import Task
from blip_engine.shapes import demo_checkpoint
from blip_engine.shapes.scenes import HELD_OUT_SEEDS, Drawing, Scene, drawing, held_out_drawings
from blip_engine.training import ImageTextObjective

IMAGES = 16  # of a step
LEARNING_RATES = {"caption": 1e-3, "itm": 2e-4}  # of these small models; the hub's want 1e-5


def wording(scene: Scene) -> str:
    """What is to be said of a scene: `there are two small red stars`, and nothing of the background."""
    shapes = scene.caption.removesuffix(f" on a {scene.background} background")
    return f"there {'are' if scene.count > 1 else 'is'} {shapes}"


def batches(seed: int) -> Iterator[list[Drawing]]:
    """New drawings for every step, none of them held out."""
    rng = Random(seed)
    while True:
        yield [drawing(rng.randrange(HELD_OUT_SEEDS)) for _ in range(IMAGES)]


def inputs_of(batch: Sequence[Drawing], processor: BlipProcessor) -> BatchFeature:
    """What a model takes: pixel_values (B, 3, H, W), input_ids and attention_mask (B, T)."""
    images, texts = [each.image() for each in batch], [wording(each.scene) for each in batch]
    return processor(images, texts, padding=True, return_tensors="pt")


class CaptionLoss(torch.nn.Module):
    """The next token's cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BlipForConditionalGeneration.from_pretrained(demo_checkpoint("caption"))

    def forward(self, inputs: BatchFeature) -> torch.Tensor:
        """The loss of a batch."""
        inputs.input_ids[:, 0] = self.model.config.text_config.bos_token_id  # the processor's [CLS] begins no caption
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)  # padding teaches nothing
        loss: torch.Tensor = self.model(**inputs, labels=labels).loss
        return loss


class RetrievalLoss(torch.nn.Module):
    """Contrast and matching."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BlipForImageTextRetrieval.from_pretrained(demo_checkpoint("itm"))
        self.objective = ImageTextObjective(self.model)

    def forward(self, inputs: BatchFeature) -> torch.Tensor:
        """The loss of a batch. Drawings with one wording count as one: their texts are right for each other."""
        _, numbers = inputs.input_ids.unique(dim=0, return_inverse=True)
        loss: torch.Tensor = self.objective(**inputs, image_ids=numbers).loss
        return loss


def finetune(task: Task, out: Path, steps: int, seed: int = 0) -> Iterator[float]:
    """Train and save to `out`; yields the loss of every step."""
    torch.manual_seed(seed)  # of the negatives that the matching loss draws
    trained = (RetrievalLoss() if task == "itm" else CaptionLoss()).train()
    processor = BlipProcessor.from_pretrained(demo_checkpoint(task))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATES[task], weight_decay=0.05)
    for batch in islice(batches(seed), steps):
        loss = trained(inputs_of(batch, processor))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    trained.model.save_pretrained(out)
    processor.save_pretrained(out)


def shown(task: Task, checkpoint: Path) -> Iterator[str]:
    """What a checkpoint says of four unseen drawings: its captions, or which of their four wordings fits best."""
    unseen = list(held_out_drawings(4, seed=0))
    images, texts = [each.image() for each in unseen], [wording(each.scene) for each in unseen]
    with Engine.load({task: str(checkpoint)}) as engine:
        if task == "caption":
            yield from (caption.text for caption in engine.caption(images))
            return
        for image in images:
            matches = engine.match([image] * 4, texts)
            best = max(range(4), key=[match.itm for match in matches].__getitem__)
            yield f"{matches[best].itm:.2f}  {texts[best]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for the new checkpoint")
    parser.add_argument("--task", choices=("caption", "itm"), default="caption")
    parser.add_argument("--steps", type=int, default=60, help="default 60, ten seconds on one core")
    given = parser.parse_args(arguments)
    for step, loss in enumerate(finetune(given.task, given.out, given.steps), 1):
        if step % 10 == 0 or step in (1, given.steps):
            print(f"step {step}  loss {loss:.3f}")
    print(*shown(given.task, given.out), sep="\n")


if __name__ == "__main__":
    main()
