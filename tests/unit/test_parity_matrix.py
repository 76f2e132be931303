"""Every class, argument, configuration and dtype agrees with transformers: outputs, losses, gradients, tokens.

float32 is held to 1e-5. In bfloat16 two right programs differ by their roundings, so both are measured against
transformers in float32 with the same (rounded) weights: ours may be no further off than theirs, but for chance.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor
from twins import CONFIGS, WIDE_CONFIGS, pair, texts, words

from blip_engine.cache import DecoderCache
from blip_engine.outputs import ModelOutput

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")

ALL = {name: config | {"projection_dim": 24} for name, config in {**CONFIGS, **WIDE_CONFIGS}.items()}
MORE = {"output_attentions": True, "output_hidden_states": True}
ROWS, WIDTH = 3, 6
IDS, LABELS = words(ROWS, WIDTH), words(ROWS, 4, seed=1)
NO_TENSOR = torch.zeros(())
PLACES = torch.tensor([[5, 0, 3, 2, 1, 4]])
RIGHT = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
LEFT = RIGHT.flip(1)
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1], [1] * 6, [0, 1, 0, 0, 1, 1]])
PARTLY = IDS.masked_fill(RIGHT == 0, -100)


def pixels(config: dict[str, Any], rows: float = 1, columns: float = 1, number: int = ROWS) -> Tensor:
    """Images (number, 3, H, W), so many times as high and wide as the model's."""
    side = config["vision_config"]["image_size"]
    shape = (number, 3, int(side * rows), int(side * columns))
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def interpolated(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Images of other sizes: smaller, larger as 480 is to 384, of no whole patches, not square."""
    sizes = {"smaller": (0.5, 0.5), "480 for 384": (1.25, 1.25), "odd": (1.3, 1.3), "not square": (1.5, 0.8)}
    return {
        f"interpolated, {name}": {"pixel_values": pixels(config, *size), "interpolate_pos_encoding": True}
        for name, size in sizes.items()
    }


def text_calls(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of the text transformer, as encoder and as decoder."""
    text, vision = config["text_config"], config["vision_config"]
    torch.manual_seed(3)
    states = {"encoder_hidden_states": torch.randn(ROWS, 9, vision["hidden_size"])}
    ids = {"input_ids": IDS}
    return {
        "encoder": ids | MORE,
        "encoder, right padding": ids | {"attention_mask": RIGHT} | MORE,
        "encoder, left padding": ids | {"attention_mask": LEFT},
        "encoder, holes": ids | {"attention_mask": HOLES} | MORE,
        "encoder, image": ids | states | {"attention_mask": RIGHT} | MORE,
        "decoder": ids | {"is_decoder": True} | MORE,
        "decoder, right padding": ids | states | {"is_decoder": True, "attention_mask": RIGHT} | MORE,
        "decoder, left padding": ids | states | {"is_decoder": True, "attention_mask": LEFT, "position_ids": PLACES},
        "decoder, holes": ids | states | {"is_decoder": True, "attention_mask": HOLES, "use_cache": False} | MORE,
        "embeddings": {"inputs_embeds": torch.randn(ROWS, WIDTH, text["hidden_size"]), "attention_mask": RIGHT},
        "places": ids | {"position_ids": PLACES},
        "tuple": ids | states | {"is_decoder": True, "return_dict": False} | MORE,
        "tuple, bare": ids | {"return_dict": False},
    }


def head_calls(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of the language model."""
    ids = text_calls(config)["decoder, right padding"]
    return text_calls(config) | {
        "labels": ids | {"labels": IDS},
        "labels, -100": ids | {"labels": PARTLY},
        "labels, encoder": {"input_ids": IDS, "labels": PARTLY, "is_decoder": False},
        "a loss per row": ids | {"labels": PARTLY, "reduction": "none"},
        "a sum of losses": ids | {"labels": PARTLY, "reduction": "sum", "return_dict": False},
        "logits alone": ids | {"return_logits": True},
        "last logits": ids | {"logits_to_keep": 2},
        "some logits": ids | {"logits_to_keep": torch.tensor([0, 3])},
    }


def caption_calls(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    given = {"pixel_values": pixels(config), "input_ids": IDS}
    masked = given | {"attention_mask": RIGHT}
    return {
        "plain": given | MORE,
        "labels": masked | {"labels": IDS},
        "labels, -100": masked | {"labels": PARTLY} | MORE,
        "left padding": given | {"attention_mask": LEFT},
        "holes": given | {"attention_mask": HOLES},
        "last logits": given | {"logits_to_keep": 2},
        "some logits": given | {"logits_to_keep": torch.tensor([0, 3]), "output_attentions": True},
        "tuple": masked | {"labels": IDS, "return_dict": False} | MORE,
        "tuple, bare": given | {"return_dict": False},
    } | {name: masked | {"labels": PARTLY} | sizes for name, sizes in interpolated(config).items()}


def question_calls(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # Padded questions are in test_parity_faults.py: transformers shows the decoder their padding.
    given = {"pixel_values": pixels(config), "input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    partly = LABELS.masked_fill(torch.tensor([[0] * 4, [0, 0, 1, 1], [0, 0, 0, 1]]).bool(), -100)
    return {
        "labels": given | {"labels": LABELS} | MORE,
        "labels, -100": given | {"labels": partly, "decoder_input_ids": LABELS},
        "answers": given | {"decoder_input_ids": LABELS, "output_attentions": True},
        "masked answers": given | {"labels": LABELS, "decoder_attention_mask": RIGHT[:, :4]},
        "tuple": given | {"labels": LABELS, "return_dict": False} | MORE,
        "tuple, bare": given | {"decoder_input_ids": LABELS, "return_dict": False},
    } | {name: given | {"labels": LABELS} | sizes for name, sizes in interpolated(config).items()}


def matching_calls(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    given = {"pixel_values": pixels(config), "input_ids": IDS, "attention_mask": RIGHT}
    return {
        "head": given | MORE,
        "head, no mask": given | {"attention_mask": None},
        "head, holes": given | {"attention_mask": HOLES, "output_hidden_states": True},
        "cosines": given | {"use_itm_head": False} | MORE,
        "cosines, more texts": given | {"use_itm_head": False, "pixel_values": pixels(config, number=2)},
        "tuple": given | {"return_dict": False} | MORE,
        "tuple, cosines": given | {"use_itm_head": False, "return_dict": False},
    } | {name: given | sizes for name, sizes in interpolated(config).items()}


def contrastive_calls(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    given = {"pixel_values": pixels(config), "input_ids": IDS, "attention_mask": RIGHT}
    return {
        "plain": given,
        "loss": given | {"return_loss": True} | MORE,
        "more texts": given | {"pixel_values": pixels(config, number=2)},
        "holes, places": given | {"attention_mask": HOLES, "position_ids": PLACES},
        "tuple": given | {"return_loss": True, "return_dict": False} | MORE,
        "tuple, bare": given | {"return_dict": False},
    } | {name: given | {"return_loss": True} | sizes for name, sizes in interpolated(config).items()}


def vision_calls(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    given = {"pixel_values": pixels(config)}
    return {
        "plain": given,
        "all": given | MORE,
        "tuple": given | {"return_dict": False} | MORE,
        "its own size, interpolated": given | {"interpolate_pos_encoding": True},
    } | {name: sizes | MORE for name, sizes in interpolated(config).items()}


CALLS: dict[str, Callable[[dict[str, Any]], dict[str, dict[str, Any]]]] = {
    "BlipModel": contrastive_calls,
    "BlipTextModel": text_calls,
    "BlipTextLMHeadModel": head_calls,
    "BlipVisionModel": vision_calls,
    "BlipForConditionalGeneration": caption_calls,
    "BlipForImageTextRetrieval": matching_calls,
    "BlipForQuestionAnswering": question_calls,
}
#: With these every parameter that can learn has a gradient.
TRAINED = {
    "BlipModel": ("loss",),
    "BlipTextModel": ("decoder, holes", "decoder, left padding"),
    "BlipTextLMHeadModel": ("labels, -100",),
    "BlipVisionModel": ("interpolated, odd",),
    "BlipForConditionalGeneration": ("interpolated, not square",),
    "BlipForImageTextRetrieval": ("head, holes", "cosines"),
    "BlipForQuestionAnswering": ("labels", "labels, -100"),
}
ROUNDED = ("vision wider", *WIDE_CONFIGS)  # the configurations that are also run in bfloat16
WRITERS = ("BlipForConditionalGeneration", "BlipForQuestionAnswering")
#: Class and configuration. The tests of some of them take the first ones, so that pytest puts a case's tests together.
CASES = sorted(
    ((name, config) for config in ALL for name in CALLS),
    key=lambda case: (case[1] not in ROUNDED, case[0] not in WRITERS, case[1]),
)
GENERATED = [case for case in CASES if case[1] in ROUNDED and case[0] in WRITERS]
CASES_ROUNDED = [case for case in CASES if case[1] in ROUNDED]
assert CASES[: len(GENERATED)] == GENERATED
assert CASES[: len(CASES_ROUNDED)] == CASES_ROUNDED


@dataclass(frozen=True)
class Case:
    """A class in one configuration."""

    name: str
    config: str
    ours: Any
    theirs: Any

    def calls(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Callable[[Any], Any]]]:
        """All calls or those named, as functions of a model that make their arguments: transformers changes some."""
        for name in names or CALLS[self.name](ALL[self.config]):
            yield name, lambda model, name=name: _call(model, CALLS[self.name](ALL[self.config])[name])


def _call(model: Any, given: dict[str, Any]) -> Any:
    # In bfloat16 and for its truth in float32 both: fractions that bfloat16 can hold.
    round_to = (lambda value: value.bfloat16()) if hasattr(model, "rounded") else (lambda value: value)
    return model(**{
        key: round_to(value).to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in given.items()
    })  # fmt: skip


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """Made once for all tests of a class and a configuration."""
    name, config = request.param
    return Case(name, config, *pair(name, ALL[config], end=1.0))


def tensors(output: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of an output by their places in it; of a cache only that it is there, for layouts differ."""
    if isinstance(output, Tensor):
        return {path: output}
    if isinstance(output, DecoderCache | transformers.Cache):
        return {f"{path}.cache": NO_TENSOR}
    items = enumerate(output) if isinstance(output, tuple) else ((key, output[key]) for key in output.keys())  # noqa: SIM118
    return {place: value for key, part in items for place, value in tensors(part, f"{path}.{key}").items()}


def _same(one: Any, other: Any) -> bool:
    return all(a is b for a, b in zip(tensors(one).values(), tensors(other).values(), strict=True))


def distance(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def loss_of(output: Any) -> Tensor:
    """The loss, or, of a class that has none, a weighted sum of the squares of what it finds."""
    if output.keys() and "loss" in tuple(output.keys()):
        return output.loss
    generator = torch.Generator().manual_seed(4)
    last = ("last_hidden_state", "pooler_output", "itm_score", "question_embeds")
    parts = [output[key].float() for key in last if key in tuple(output.keys())]
    return torch.stack([(part * torch.randn(part.shape, generator=generator)).square().mean() for part in parts]).sum()


def gradients(model: Any, call: Callable[[Any], Any]) -> dict[str, Tensor]:
    """The loss and every parameter's gradient."""
    model.zero_grad()
    loss = loss_of(call(model))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def size(values: Tensor) -> float:
    """Root mean square."""
    return float(values.float().square().mean().sqrt())


def assert_no_further_off(mine: Tensor, other: Tensor, truth: Tensor, what: str) -> None:
    """Our error is at most 1.5 times transformers', plus 2^-6 of the values.

    Both programs round about equally often, so their errors have one distribution: over thousands of numbers their
    sizes are equal. Over a handful (a loss is one) theirs may be none by luck; then ours may be a few roundings of
    2^-9 each.
    """
    assert mine.dtype == other.dtype, what
    error, allowed = size(mine.float() - truth), size(other.float() - truth)
    assert error <= 1.5 * allowed + 2**-6 * size(truth), what


def over(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, indirect=True, ids=", ".join)


class TestFloat32:
    @torch.no_grad()
    @over(CASES)
    def test_outputs(self, case: Case) -> None:
        for name, call in case.calls():
            output = call(case.ours)
            mine, other = tensors(output), tensors(call(case.theirs))
            assert list(mine) == list(other), name
            assert not isinstance(output, ModelOutput) or _same(output.to_tuple(), output)
            for place, value in other.items():
                assert distance(mine[place], value) <= 1e-5 * max(1.0, float(value.abs().max())), f"{name}: {place}"

    @over(CASES)
    def test_losses_and_gradients(self, case: Case) -> None:
        """Ours are within 1e-5 of transformers' in double precision; in single ones both round, each processor anew."""
        trained, exact = set(), copy.deepcopy(case.theirs).double()
        for name, call in case.calls(TRAINED[case.name]):
            mine, other, truth = (gradients(model, call) for model in (case.ours, case.theirs, exact))
            assert mine.keys() == other.keys() == truth.keys(), name
            trained |= mine.keys()
            largest = max(float(value.abs().max()) for value in truth.values())
            for place, value in truth.items():
                # Each is held to its own size, but where sums cancel: a key's bias has gradient 0, and roundings.
                own = float(value.abs().max())
                scale = largest if place.endswith("key.bias") else max(own, 1e-3 * largest)
                assert mine[place].dtype == other[place].dtype == torch.float32
                assert distance(mine[place], value) <= 1e-5 * scale, f"{name}: {place}"
                assert distance(mine[place], other[place]) <= 2e-5 * scale, f"{name}: {place}"
        untrained = {name for name, _ in case.ours.named_parameters()} - trained
        assert all(case.name == "BlipModel" and "crossattention" in name for name in untrained)  # it fuses nothing

    @over(GENERATED)
    def test_tokens(self, case: Case) -> None:
        for beams in (1, 3):
            for more in (
                {"pixel_values": pixels(ALL[case.config], number=5)},
                *interpolated(ALL[case.config]).values(),
            ):
                given = more | {"num_beams": beams, "max_new_tokens": 8}
                if case.name == "BlipForQuestionAnswering":
                    given |= {"input_ids": words(len(given["pixel_values"]), 6)}
                mine, other = case.ours.generate(**given), case.theirs.generate(**given)
                assert texts(mine) == texts(other)


@pytest.fixture
def three(case: Case) -> tuple[Any, Any, Any]:
    """Ours and theirs in bfloat16, and theirs in float32 with the same weights."""
    ours, theirs = copy.deepcopy(case.ours).bfloat16(), copy.deepcopy(case.theirs).bfloat16()
    models = ours, theirs, copy.deepcopy(theirs).float()
    for model in models:
        model.rounded = True
    return models


@over(CASES_ROUNDED)
class TestBfloat16:
    @torch.no_grad()
    def test_outputs(self, case: Case, three: tuple[Any, Any, Any]) -> None:
        for name, call in case.calls():
            mine, other, truth = (tensors(call(model)) for model in three)
            assert list(mine) == list(other), name
            for place, value in truth.items():
                assert_no_further_off(mine[place], other[place], value, f"{name}: {place}")

    def test_losses_and_gradients(self, case: Case, three: tuple[Any, Any, Any]) -> None:
        for name, call in case.calls(TRAINED[case.name][:1]):
            found = [gradients(model, call) for model in three]
            largest = max(size(value) for value in found[2].values())
            scales = {place: max(size(value), 1e-3 * largest) for place, value in found[2].items()}
            # One vector, for which tensors count alike.
            mine, other, truth = (
                torch.cat([values[place].float().flatten() / scale for place, scale in scales.items()])
                for values in found
            )
            assert_no_further_off(mine, other, truth, name)
            assert_no_further_off(*(values["loss"] for values in found), name)


@torch.no_grad()
@over(GENERATED)
def test_bfloat16_tokens(case: Case, three: tuple[Any, Any, Any]) -> None:
    """Greedy tokens are the best ones but for rounding: in float32 none is worse than the best by more than that."""
    ours, theirs, truth = three
    given = {"pixel_values": pixels(ALL[case.config], number=8).bfloat16(), "max_new_tokens": 8}
    if case.name == "BlipForQuestionAnswering":
        given["input_ids"] = words(8, 6)
    mine, other = ours.generate(**given), theirs.generate(**given)
    assert sum(one == two for one, two in zip(texts(mine), texts(other), strict=True)) >= 4  # most have no near ties

    def logits(model: Any) -> Tensor:
        states = model.vision_model(given["pixel_values"].to(model.dtype)).last_hidden_state
        if "input_ids" in given:
            states = model.text_encoder(given["input_ids"], encoder_hidden_states=states).last_hidden_state
        return cast(Tensor, model.text_decoder(mine[:, :-1], encoder_hidden_states=states).logits.float())

    best = logits(truth)
    rounding = float((logits(theirs) - best).abs().max())
    behind = best.amax(-1) - best.gather(-1, mine[:, 1:, None])[..., 0]
    for row, text in enumerate(texts(mine)):
        assert float(behind[row, : len(text) - 1].max()) <= 2 * rounding  # both the best and the chosen one are rounded
    assert rounding < 0.1 * float(best.std())
