"""What transformers' own suite asks of every BLIP class: signatures, initial weights, rows, gradients, ties."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from small_models import small_config
from torch import Tensor, nn
from twins import TOWERS, assert_close, pair, words

import blip_engine
from blip_engine import BlipConfig

CONFIG = small_config({"hidden_size": 32, "initializer_range": 0.03}, {"initializer_range": 0.05})
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS, MASK = words(3, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
MORE = {"output_attentions": True, "output_hidden_states": True}
INPUTS: dict[str, dict[str, Tensor]] = {
    "BlipModel": {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": MASK},
    "BlipTextModel": {"input_ids": IDS, "attention_mask": MASK},
    "BlipTextLMHeadModel": {"input_ids": IDS, "attention_mask": MASK},
    "BlipVisionModel": {"pixel_values": PIXELS},
    "BlipForConditionalGeneration": {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": MASK},
    "BlipForImageTextRetrieval": {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": MASK},
    "BlipForQuestionAnswering": {
        "input_ids": IDS, "pixel_values": PIXELS, "attention_mask": MASK, "labels": words(3, 4),
    },
}  # fmt: skip
each_class = pytest.mark.parametrize("name", INPUTS)


def fresh(name: str, **settings: Any) -> tuple[Any, Any]:
    """Ours and theirs, each with its own initial weights."""
    config = CONFIG | settings
    whole, other = BlipConfig(**config), transformers.BlipConfig(**config)
    part = TOWERS.get(name)
    ours = getattr(blip_engine, name)(getattr(whole, part) if part else whole)
    return ours, getattr(transformers, name)(getattr(other, part) if part else other)


@each_class
def test_signatures(name: str) -> None:
    ours, theirs = getattr(blip_engine, name), getattr(transformers, name)
    for method in ("forward", "generate", "get_text_features", "get_image_features"):
        if method not in vars(theirs):
            continue
        mine, other = (inspect.signature(getattr(kind, method)).parameters for kind in (ours, theirs))
        named = [key for key, value in other.items() if value.kind is not value.VAR_KEYWORD]
        assert list(mine)[: len(named)] == named, method
        assert [mine[key].default for key in named] == [other[key].default for key in named], method
    assert ours.main_input_name == theirs.main_input_name


@torch.no_grad()
@each_class
def test_initial_weights(name: str) -> None:
    """Each tensor is spread as transformers spreads it, or is the same constant."""
    torch.manual_seed(0)
    ours, theirs = fresh(name)
    mine = dict(ours.named_parameters())
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    for key, other in theirs.named_parameters():
        if float(other.std()) if other.numel() > 1 else 0.0:
            tolerance = 6 / (2 * other.numel()) ** 0.5  # six deviations of a sample's deviation
            assert float(mine[key].std() / other.std()) == pytest.approx(1, abs=2 * tolerance), key
            assert float(mine[key].mean().abs()) < 6 * float(other.std()) / other.numel() ** 0.5, key
        else:
            assert mine[key].equal(other), key


@torch.no_grad()
@each_class
def test_a_row_is_what_it_is_alone_and_again(name: str) -> None:
    ours, _ = pair(name, CONFIG)
    together, again = ours(**INPUTS[name], **MORE), ours(**INPUTS[name], **MORE)
    alone = ours(**{key: value[:1] for key, value in INPUTS[name].items()}, **MORE)

    def compare(one: Any, two: Any, three: Any) -> None:
        if isinstance(one, Tensor) and one.dim():
            assert one.equal(two)
            assert_close(one[tuple(slice(0, size) for size in three.shape)], three)
        elif isinstance(one, tuple):
            for parts in zip(one, two, three, strict=True):
                compare(*parts)

    compare(together.to_tuple(), again.to_tuple(), alone.to_tuple())


@each_class
def test_hidden_states_and_attentions_keep_gradients(name: str) -> None:
    ours, _ = pair(name, CONFIG)
    output = ours(**INPUTS[name], **MORE)
    parts = [output] if hasattr(output, "hidden_states") else [output.text_model_output, output.vision_model_output]
    kept = [value for part in parts for value in (part.hidden_states[0], part.attentions[0])]
    for value in kept:
        value.retain_grad()
    output[0].sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in kept)


@pytest.mark.parametrize("name", ["BlipTextModel", "BlipModel"])
def test_word_embeddings_are_replaced(name: str) -> None:
    ours, _ = fresh(name)
    assert isinstance(ours.get_input_embeddings(), nn.Embedding)
    other = nn.Embedding(7, 32)
    ours.set_input_embeddings(other)
    assert ours.get_input_embeddings() is other


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("name", ["BlipTextLMHeadModel", "BlipForConditionalGeneration", "BlipForQuestionAnswering"])
def test_tied_words_are_the_configurations_choice(name: str, text: bool, whole: bool, tmp_path: Any) -> None:
    settings = {"tie_word_embeddings": whole, "text_config": CONFIG["text_config"] | {"tie_word_embeddings": text}}
    ours, theirs = fresh(name, **settings)
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    ours.save_pretrained(tmp_path)
    loaded, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for model in (loaded, type(ours).from_pretrained(tmp_path)):
        assert all(value.equal(model.state_dict()[key]) for key, value in ours.state_dict().items())
