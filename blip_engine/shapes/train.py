"""Train the demo checkpoints on drawings of shapes.

    python -m blip_engine.shapes.train caption OUT
    python -m blip_engine.shapes.train caption OUT --start OUT/caption --seed 1 --learning-rate 1e-3
    python -m blip_engine.shapes.train vqa OUT --start OUT/caption
    python -m blip_engine.shapes.train vqa OUT --start OUT/vqa --seed 1 --steps 1000
    python -m blip_engine.shapes.train itm OUT --start OUT/caption

writes `OUT/<task>/` in the hub's layout; each line takes ten to twenty minutes on two cores. The models are the
package's own modules, the losses are BLIP's (Li et al. 2022, https://arxiv.org/abs/2201.12086): language modelling for
captions and answers, matching and contrast for texts.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint import find_checkpoint
from ..config import BlipConfig
from ..errors import BlipError
from ..image_processor import BlipImageProcessor
from ..processor import BlipProcessor
from ..requests import TASKS, Task
from ..resident import MODEL_CLASSES
from ..tokenizer import BertTokenizer, wordpiece
from ..training import contrastive_loss
from .evaluate import pixels
from .scenes import HELD_OUT_SEEDS, SIDE, Drawing, drawing
from .texts import VOCABULARY, mismatch, questions

BOS: Final = len(VOCABULARY)  # [DEC]: as in the hub's checkpoints, only the embedding knows it
CONTEXT: Final = 64  # positions of the text towers
TEMPERATURE: Final = 0.07  # of the contrastive loss, BLIP's initial value


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one checkpoint is trained."""

    steps: int
    images: int = 64  # drawings of a step
    texts: int = 4  # questions, or mismatching texts, of a drawing
    text_layers: int = 3
    learning_rate: float = 1e-3  # at its peak


RECIPES: Final[dict[Task, Recipe]] = {
    "caption": Recipe(steps=3000, learning_rate=2e-3),
    "vqa": Recipe(steps=2000, text_layers=2),
    "itm": Recipe(steps=2000, texts=3),
}


def demo_config(text_layers: int) -> BlipConfig:
    """A small BLIP: 128 wide, four vision layers, 64 pixels in patches of 8; at most 1.45M weights in any model."""
    shared = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "initializer_range": 0.05}
    text = {
        **shared,
        "num_hidden_layers": text_layers,
        "vocab_size": len(VOCABULARY) + 2,  # and [DEC], [ENC]
        "max_position_embeddings": CONTEXT,
        "projection_dim": 64,
        "bos_token_id": BOS,
        "pad_token_id": VOCABULARY.index("[PAD]"),
        "sep_token_id": VOCABULARY.index("[SEP]"),
        "eos_token_id": VOCABULARY.index("[SEP]"),
    }
    vision = {**shared, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": 8, "projection_dim": 64}
    return BlipConfig.from_dict(
        {"text_config": text, "vision_config": vision, "projection_dim": 64, "image_text_hidden_size": 64}
    )


def demo_processor() -> BlipProcessor:
    """The tokenizer of the drawings' vocabulary and the image processor of 64 pixels."""
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    return BlipProcessor(BlipImageProcessor(size=SIDE), BertTokenizer(wordpiece(vocabulary), CONTEXT))


def new_model(task: Task, text_layers: int) -> Any:
    """A model with random weights. Image positions begin as sines of row and column: "left of" is learned sooner."""
    model = MODEL_CLASSES[task](demo_config(text_layers))
    side, width = SIDE // 8, model.config.vision_config.hidden_size
    angles = torch.arange(side)[:, None] / 4 ** (torch.arange(width // 4) / (width // 4) * 2)  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], dim=2)
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding[0, 1:] = grid.flatten(0, 1) / 2
    return model


def begin_with(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Take over what fits. A text encoder may begin as a captioner's decoder, which already looks at images."""
    own = model.state_dict()
    given = dict(tensors)
    for name, value in tensors.items():
        given.setdefault(name.replace("text_decoder.bert.", "text_encoder."), value)
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)


# --- losses ----------------------------------------------------------------------------------------------------------


class Lesson:
    """The loss of one task on a batch of drawings."""

    def __init__(self, task: Task, model: Any, texts: int) -> None:
        self.model, self.texts = model, texts
        self.tokenizer = demo_processor().tokenizer
        losses: dict[Task, Callable[[list[Drawing], Random], Tensor]] = {
            "caption": self._caption,
            "vqa": self._answer,
            "itm": self._match,
        }
        self.loss = losses[task]

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]

    def _targets(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder inputs that begin with [BOS], their mask, and labels without padding."""
        ids, mask = self._encode(texts)
        ids[:, 0] = BOS
        return ids, mask, ids.masked_fill(mask == 0, -100)

    def _caption(self, batch: list[Drawing], rng: Random) -> Tensor:  # noqa: ARG002  # one caption, nothing to choose
        ids, mask, labels = self._targets([each.scene.caption for each in batch])
        loss: Tensor = self.model(pixel_values=pixels(batch), input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    def _answer(self, batch: list[Drawing], rng: Random) -> Tensor:
        """Several questions about each drawing; their drawings are seen once."""
        asked = [q for each in batch for q in rng.sample(questions(each.scene, rng), self.texts)]
        states = self.model.vision_model(pixels(batch)).last_hidden_state.repeat_interleave(self.texts, dim=0)
        ids, mask = self._encode([q.text for q in asked])
        question = self.model.encode_question(ids, mask, states)
        answer_ids, answer_mask, labels = self._targets([q.answer for q in asked])
        loss: Tensor = self.model.text_decoder(
            answer_ids, answer_mask, encoder_hidden_states=question, encoder_attention_mask=mask, labels=labels
        ).loss
        return loss

    def _match(self, batch: list[Drawing], rng: Random) -> Tensor:
        """Matching: each drawing with its caption and several false ones. Contrast: with the batch's captions."""
        states = self.model.vision_model(pixels(batch)).last_hidden_state
        captions = [each.scene.caption for each in batch]
        wrong = [_training_mismatch(each, rng) for each in batch for _ in range(self.texts)]
        ids, mask = self._encode(captions + wrong)
        fused = self.model.fuse(ids, mask, torch.cat([states, states.repeat_interleave(self.texts, dim=0)]))
        truth = torch.tensor([1] * len(captions) + [0] * len(wrong))
        balance = torch.tensor([1.0, float(self.texts)])
        matching = F.cross_entropy(self.model.itm_head(fused[:, 0]), truth, weight=balance)
        text_states = self.model.text_encoder(ids[: len(batch)], mask[: len(batch)]).last_hidden_state
        shown, said = self.model.project_image(states), self.model.project_text(text_states)
        same = torch.tensor([[a == b for b in captions] for a in captions])
        return matching + 0.25 * contrastive_loss(shown, said, shown, said, same, TEMPERATURE)


def _training_mismatch(each: Drawing, rng: Random) -> str:
    while (other := mismatch(each.scene, rng)).held_out:  # held-out descriptions are not even shown as false ones
        pass
    return other.caption


# --- training --------------------------------------------------------------------------------------------------------


def train(task: Task, model: Any, recipe: Recipe, seed: int = 0) -> Iterator[tuple[int, float]]:
    """Train in place; yields (steps done, mean loss since the last) every 100 steps and at the end."""
    rng = Random(seed)
    lesson = Lesson(task, model.train(), recipe.texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    for step in range(1, recipe.steps + 1):
        batch = [drawing(rng.randrange(HELD_OUT_SEEDS)) for _ in range(recipe.images)]
        loss = lesson.loss(batch, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == recipe.steps:
            yield step, sum(losses) / len(losses)
            losses.clear()
    model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m blip_engine.shapes.train", description="Train a demo checkpoint.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("out", type=Path, help="folder to write <task>/ to")
    parser.add_argument("--start", help="checkpoint to begin with: every tensor that has the same name and shape")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--learning-rate", type=float, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="draws other weights and scenes (default 0)")
    given = parser.parse_args(arguments)
    recipe = RECIPES[given.task]
    recipe = replace(
        recipe,
        steps=given.steps or recipe.steps,
        learning_rate=given.learning_rate or recipe.learning_rate,
    )
    torch.manual_seed(given.seed)
    model = new_model(given.task, recipe.text_layers)
    try:
        if given.start:
            begin_with(model, find_checkpoint(given.start).read())
        _train_and_save(given.task, model, recipe, given.out / given.task, given.seed)
    except (BlipError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _train_and_save(task: Task, model: Any, recipe: Recipe, folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # before the minutes of training, not after
    started = time.monotonic()
    for step, loss in train(task, model, recipe, seed):
        sys.stdout.write(f"step {step}  loss {loss:.4f}  {time.monotonic() - started:.0f} s\n")
        sys.stdout.flush()
    model.save_pretrained(folder)
    demo_processor().save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
