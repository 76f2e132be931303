"""Parity at the size of the published base checkpoints, with random weights: float32, 384 pixels."""

from typing import Any

import pytest
import torch
import transformers
from small_models import CLASSES
from torch import Tensor
from twins import assert_close

from blip_engine import BlipConfig
from blip_engine.requests import Task

#: As the hub's base checkpoints say; the vision tower's default deviation of 1e-10 would make every image alike.
BASE: dict[str, Any] = {
    "text_config": {"num_attention_heads": 12},
    "vision_config": {"initializer_range": 0.02},
    "image_text_hidden_size": 256,
}
PIXELS = torch.randn(2, 3, 384, 384, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1000, 30000, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _all_threads() -> Any:
    torch.set_num_threads(2)  # these matrices are large enough
    yield
    torch.set_num_threads(1)


def base(task: Task, keys: int, parameters: float) -> tuple[Any, Any]:
    """Ours and theirs, sharing the memory of one set of weights."""
    kind = CLASSES[task]
    torch.manual_seed(0)
    theirs = getattr(transformers, kind.__name__)(transformers.BlipConfig(**BASE)).eval()
    with torch.device("meta"):
        ours = kind(BlipConfig(**BASE))
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert len(state) == keys
    assert round(sum(p.numel() for p in theirs.parameters()) / 1e6, 1) == parameters
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == parameters
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval(), theirs


@torch.no_grad()
def test_caption() -> None:
    ours, theirs = base("caption", 473, 224.0)
    mine, other = ours(PIXELS, IDS, labels=IDS), theirs(PIXELS, IDS, labels=IDS)
    assert_close(mine.logits, other.logits)
    assert_close(mine.image_embeds, other.image_embeds)
    assert_close(mine.loss, other.loss)

    def generate(model: Any) -> Tensor:
        return model.generate(PIXELS, input_ids=IDS.clone(), num_beams=3, max_new_tokens=4)  # type: ignore[no-any-return]

    assert generate(ours).equal(generate(theirs))


@torch.no_grad()
def test_question_answering() -> None:
    ours, theirs = base("vqa", 789, 361.2)
    ids, pixels = IDS[:1], PIXELS[:1]
    mine, other = ours(ids, pixels, labels=ids[:, :4]), theirs(ids, pixels, labels=ids[:, :4])
    assert_close(mine.loss, other.loss)
    assert_close(mine.image_embeds, other.image_embeds)
    question = torch.randn(2, 6, 768)
    truth = theirs.text_decoder(IDS, encoder_hidden_states=question).logits
    assert_close(ours.text_decoder(IDS, encoder_hidden_states=question).logits, truth)


@torch.no_grad()
def test_matching() -> None:
    ours, theirs = base("itm", 472, 223.7)
    pixels, mask = PIXELS[:1], torch.tensor([[1] * 4 + [0] * 2])
    mine, other = ours(IDS[:1], pixels, attention_mask=mask), theirs(IDS[:1], pixels, attention_mask=mask)
    assert_close(mine.itm_score, other.itm_score)
