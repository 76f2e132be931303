"""Teach the bundled captioner another wording, on drawings made on the fly: see docs/finetune.md.

python docs/finetune.py OUT --steps 60
"""
# ruff: noqa: T201

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random

import torch

from blip_engine import BlipForConditionalGeneration, BlipProcessor, Engine
from blip_engine.features import BatchFeature
from blip_engine.shapes import demo_checkpoint
from blip_engine.shapes.scenes import HELD_OUT_SEEDS, Drawing, Scene, drawing, held_out_drawings

IMAGES = 16  # of a step
LEARNING_RATE = 1e-3  # of this small model; the hub's want 1e-5


def wording(scene: Scene) -> str:
    """What is to be said of a scene: `there are two small red stars`, and nothing of the background."""
    shapes = scene.caption.removesuffix(f" on a {scene.background} background")
    return f"there {'are' if scene.count > 1 else 'is'} {shapes}"


def batches(seed: int) -> Iterator[list[Drawing]]:
    """New drawings for every step, none of them held out."""
    rng = Random(seed)
    while True:
        yield [drawing(rng.randrange(HELD_OUT_SEEDS)) for _ in range(IMAGES)]


def inputs_of(batch: Sequence[Drawing], processor: BlipProcessor, bos: int) -> BatchFeature:
    """What the model takes: pixel_values (B, 3, H, W); input_ids, attention_mask and labels (B, T)."""
    images, texts = [each.image() for each in batch], [wording(each.scene) for each in batch]
    inputs = processor(images, texts, padding=True, return_tensors="pt")
    inputs.input_ids[:, 0] = bos  # the processor says [CLS], but captions are generated from [BOS]
    inputs["labels"] = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)  # padding teaches nothing
    return inputs


def finetune(out: Path, steps: int, seed: int = 0) -> Iterator[float]:
    """Train and save to `out`; yields the loss of every step."""
    model = BlipForConditionalGeneration.from_pretrained(demo_checkpoint("caption")).train()
    processor = BlipProcessor.from_pretrained(demo_checkpoint("caption"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    for batch in islice(batches(seed), steps):
        loss = model(**inputs_of(batch, processor, model.config.text_config.bos_token_id)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    model.save_pretrained(out)
    processor.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for the new checkpoint")
    parser.add_argument("--steps", type=int, default=60, help="default 60, ten seconds on one core")
    given = parser.parse_args(arguments)
    for step, loss in enumerate(finetune(given.out, given.steps), 1):
        if step % 10 == 0 or step in (1, given.steps):
            print(f"step {step}  loss {loss:.3f}")
    unseen = [each.image() for each in held_out_drawings(4, seed=0)]
    with Engine.load({"caption": str(given.out)}) as engine:
        print(*(caption.text for caption in engine.caption(unseen)), sep="\n")


if __name__ == "__main__":
    main()
