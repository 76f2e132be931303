"""Sampling, limits and scores of decoding, judged by the model's own teacher-forced probabilities."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import BOS, SEP, images, twins, words

from blip_engine.generation import Generated, Limits, Memory, Prompt, generate
from blip_engine.logits import LogitRules
from blip_engine.requests import GenerationOptions

ROWS = 6


@pytest.fixture(scope="module")
def decoder() -> Any:
    return twins("caption", end=1.0)[0].text_decoder


@pytest.fixture(scope="module")
def states() -> Tensor:
    return torch.randn(ROWS, 9, 48, generator=torch.Generator().manual_seed(3))


def start(rows: int = ROWS) -> Prompt:
    return Prompt.of([[BOS]] * rows, 0, torch.device("cpu"))


def forced(decoder: Any, states: Tensor, found: Generated, row: int, place: int, prompt: tuple[int, ...]) -> float:
    """The log-probability of a row's tokens behind its prompt, in one pass over all of them."""
    tokens = found.tokens[row, place, : found.lengths[row, place]].tolist()
    with torch.no_grad():
        logits = decoder(torch.tensor([[*prompt, *tokens]]), encoder_hidden_states=states[row : row + 1]).logits[0]
    steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(steps.gather(1, torch.tensor(tokens)[:, None]).sum())


OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 1, "max_new_tokens": 12},
    {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10},
    {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "length_penalty": 2.0},
    {"num_beams": 1, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 7},
    {"num_beams": 1, "do_sample": True, "temperature": 3.0, "top_p": 0.8, "top_k": 9, "length_penalty": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prompt", [(BOS,), (BOS, 5, 9, 17)])
def test_scores_are_teacher_forced_log_probabilities(
    decoder: Any, states: Tensor, options: dict[str, Any], prompt: tuple[int, ...]
) -> None:
    chosen = GenerationOptions(**options)
    found = generate(decoder, Prompt.of([prompt] * ROWS, 0, states.device), Memory(states), chosen)
    for row in range(ROWS):
        for place in range(chosen.num_return_sequences):
            length = int(found.lengths[row, place])
            truth = forced(decoder, states, found, row, place, prompt) / length**chosen.length_penalty
            assert float(found.scores[row, place]) == pytest.approx(truth, abs=2e-4)
            tokens = found.tokens[row, place].tolist()
            assert SEP not in tokens[: length - 1]
            assert length == chosen.max_new_tokens or tokens[length - 1] == SEP
            assert not any(tokens[length:])


def test_hypotheses_come_best_first_and_differ(decoder: Any, states: Tensor) -> None:
    found = generate(decoder, start(), Memory(states), GenerationOptions(num_beams=5, num_return_sequences=5))
    assert (found.scores.diff(dim=1) <= 0).all()
    for row in found.tokens.tolist():
        assert len({tuple(tokens) for tokens in row}) == 5


@pytest.mark.parametrize("beams", [1, 3])
def test_every_row_keeps_its_own_limits(decoder: Any, states: Tensor, beams: int) -> None:
    most, least = torch.tensor([1, 3, 5, 7, 9, 9]), torch.tensor([0, 3, 2, 7, 0, 8])
    options = GenerationOptions(num_beams=beams, max_new_tokens=9, min_new_tokens=8)
    found = generate(decoder, start(), Memory(states), options, Limits(most, least, 9))
    assert (found.lengths[:, 0] <= most).all()
    assert (found.lengths[:, 0] >= least).all()
    for row in range(ROWS):
        alone = generate(
            decoder,
            start(1),
            Memory(states[row : row + 1]),
            GenerationOptions(num_beams=beams, max_new_tokens=int(most[row]), min_new_tokens=int(least[row])),
        )
        assert found.tokens[row, 0, : most[row]].tolist() == alone.tokens[0, 0].tolist()
        assert float(found.scores[row, 0]) == pytest.approx(float(alone.scores[0, 0]), abs=1e-5)


def draws(logits: Tensor, number: int = 40_000, **options: Any) -> Tensor:
    """Frequencies (V,) of the tokens that evenly spread uniforms draw from `logits` (V,)."""
    chosen = GenerationOptions(num_beams=1, do_sample=True, **options)
    rules = LogitRules(chosen, torch.zeros(1, 1, dtype=torch.long), None, torch.zeros(1), SEP)
    uniforms = (torch.arange(number) + 0.5)[None] / number
    tokens = rules.draw(logits.expand(1, number, -1), uniforms)
    return torch.bincount(tokens[0], minlength=len(logits)) / number


class TestSampling:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(5)) * 2

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_frequencies_are_the_softmax(self, temperature: float) -> None:
        wanted = (self.logits / temperature).softmax(-1)
        assert (draws(self.logits, temperature=temperature) - wanted).abs().max() < 1e-4

    @pytest.mark.parametrize("top_k", [1, 3, 30, 99])
    def test_top_k(self, top_k: int) -> None:
        kept = self.logits.topk(min(top_k, 30)).indices
        wanted = torch.zeros(30).index_put((kept,), self.logits[kept].softmax(-1))
        assert (draws(self.logits, top_k=top_k) - wanted).abs().max() < 1e-4

    @pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
    def test_top_p_keeps_the_smallest_set_of_that_probability(self, top_p: float) -> None:
        ordered = self.logits.softmax(-1).sort(descending=True)
        size = next(n for n in range(1, 31) if ordered.values[:n].sum() >= min(top_p, 0.9999))
        kept = ordered.indices[: 30 if top_p == 1.0 else size]
        wanted = torch.zeros(30).index_put((kept,), self.logits[kept].softmax(-1))
        assert (draws(self.logits, top_p=top_p) - wanted).abs().max() < 1e-4

    def test_temperature_then_top_k_then_top_p(self) -> None:
        warm = self.logits / 2.0
        five = warm.topk(5)
        probabilities = five.values.softmax(-1)
        size = next(n for n in range(1, 6) if probabilities[:n].sum() >= 0.6)
        wanted = torch.zeros(30).index_put((five.indices[:size],), five.values[:size].softmax(-1))
        assert (draws(self.logits, temperature=2.0, top_k=5, top_p=0.6) - wanted).abs().max() < 1e-4

    @pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 2}, {"temperature": 1e-3}])
    def test_the_ends_of_the_unit_interval_draw_possible_tokens(self, options: dict[str, Any]) -> None:
        logits = self.logits.clone()
        logits[SEP] = -math.inf
        rules = LogitRules(
            GenerationOptions(num_beams=1, do_sample=True, **options),
            torch.zeros(1, 1, dtype=torch.long), None, torch.zeros(1), SEP,
        )  # fmt: skip
        ends = torch.tensor([[0.0, 1.0 - 2**-24]])
        first, last = rules.draw(logits.expand(1, 2, -1), ends)[0].tolist()
        assert first == int(logits.argmax())
        assert last != SEP

    def test_the_first_token_of_many_samples_follows_the_model(self, decoder: Any, states: Tensor) -> None:
        number = 32
        options = GenerationOptions(num_beams=1, do_sample=True, num_return_sequences=number, max_new_tokens=1)
        uniforms = ((torch.arange(number) + 0.5) / number)[None, :, None].expand(ROWS, -1, -1)
        found = generate(decoder, start(), Memory(states), options, uniforms=uniforms)
        with torch.no_grad():
            wanted = decoder(start().ids, encoder_hidden_states=states).logits[:, -1].softmax(-1)
        for row in range(ROWS):
            frequencies = torch.bincount(found.tokens[row, :, 0], minlength=wanted.shape[1]) / number
            assert (frequencies - wanted[row]).abs().max() <= 1.01 / number

    def test_torchs_generator_decides_where_no_uniforms_are_given(self) -> None:
        model = twins("caption")[0]
        pixels = images(model, 4)

        def sample(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return model.generate(pixels, do_sample=True, num_return_sequences=3, top_p=0.95)  # type: ignore[no-any-return]

        assert sample(1).equal(sample(1))
        assert not sample(1).equal(sample(2))
        assert len(sample(1)) == 12

    def test_top_k_of_one_is_greedy(self) -> None:
        model = twins("caption")[0]
        pixels, prompt = images(model, 4), words(4, 5)
        sampled = model.generate(pixels, prompt, do_sample=True, top_k=1)
        assert sampled.equal(model.generate(pixels, prompt))


def test_a_repeated_token_becomes_less_likely() -> None:
    ids, mask = torch.tensor([[0, 0, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    rules = LogitRules(GenerationOptions(repetition_penalty=2.0), ids, mask, torch.zeros(1), SEP)
    scores = torch.full((1, 1, 12), 4.0)
    scores[..., 8] = -4.0
    ruled = rules.apply(scores, torch.tensor([[[9]]]))[0, 0]
    assert ruled[[7, 8, 9]].tolist() == [2.0, -8.0, 2.0]
    assert ruled[0] == 4.0  # padding was not said
