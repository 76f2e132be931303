"""Greedy and beam search choose transformers' tokens, with its scores."""

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import BOS, CONFIGS, SEP, VQA_CONFIGS, assert_close, images, texts, twins, words

from blip_engine.errors import InputError, OptionError
from blip_engine.generation import Memory, Prompt, generate
from blip_engine.requests import GenerationOptions, Task

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")

END = 1.0  # what [SEP] is favoured by: some texts end early, some not at all
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 9},
    {"max_length": 12, "min_length": 8},
    {"min_new_tokens": 4, "repetition_penalty": 1.3},
    {"num_beams": 2, "min_new_tokens": 4},
    {"num_beams": 4, "max_length": 14, "min_length": 9, "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 1.5},
    {"num_beams": 5, "num_return_sequences": 2, "max_new_tokens": 1},
    {"num_beams": 5, "num_return_sequences": 5, "length_penalty": 0.0, "min_new_tokens": 2},
]


def assert_same(ours: Tensor, theirs: Tensor, prompt: int = 1) -> list[int]:
    """The texts are equal; returns their lengths."""
    assert texts(ours, prompt) == texts(theirs, prompt)
    assert ours.dtype == torch.int64
    return [len(text) for text in texts(ours, prompt)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name: str, beams: int) -> None:
    ours, theirs = twins("caption", CONFIGS[name], end=END)
    pixels = images(ours, 5)
    assert_same(ours.generate(pixels, num_beams=beams), theirs.generate(pixels, num_beams=beams))
    ours, theirs = twins("vqa", VQA_CONFIGS[name], end=END)
    pixels, questions = images(ours, 5), words(5, 6)
    mine = ours.generate(questions, pixels, num_beams=beams)
    assert_same(mine, theirs.generate(questions, pixels, num_beams=beams))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_captions(options: dict[str, Any]) -> None:
    ours, theirs = twins("caption", end=END)
    pixels = images(ours, 8)
    assert_same(ours.generate(pixels, **options), theirs.generate(pixels, **options))
    prompts = words(8, 6)
    mask = torch.ones_like(prompts)
    mine = ours.generate(pixels, input_ids=prompts, **options)
    assert_same(mine, theirs.generate(pixels, input_ids=prompts.clone(), **options), prompt=5)
    assert torch.equal(mine, ours.generate(pixels, input_ids=prompts, attention_mask=mask, **options))
    assert torch.equal(mine, ours.generate(pixels, input_ids=prompts.tolist(), **options))
    assert mine[:, 0].eq(BOS).all()
    assert mine[:: len(mine) // 8, 1:5].equal(prompts[:, 1:-1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers(options: dict[str, Any]) -> None:
    ours, theirs = twins("vqa", end=END)
    pixels, questions = images(ours, 8), words(8, 7)
    mask = torch.ones_like(questions)
    mine = ours.generate(questions, pixels, attention_mask=mask, **options)
    assert_same(mine, theirs.generate(questions, pixels, attention_mask=mask, **options))
    assert torch.equal(mine, ours.generate(questions.tolist(), pixels, **options))


def test_texts_of_these_tests_end_at_many_lengths() -> None:
    captions, others = twins("caption", end=END)
    answers, theirs = twins("vqa", end=END)
    pixels, questions = images(captions, 40), words(40, 7)
    for beams in (1, 3):
        mine = captions.generate(pixels, num_beams=beams)
        assert len(set(assert_same(mine, others.generate(pixels, num_beams=beams)))) > 4
        mine = answers.generate(questions, pixels, num_beams=beams)
        assert len(set(assert_same(mine, theirs.generate(questions, pixels, num_beams=beams)))) > 4


@pytest.mark.parametrize("penalty", [1.0, 2.0, 0.0])
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_beam_scores(task: Task, penalty: float) -> None:
    ours, theirs = twins(task, end=END)
    states, options = torch.randn(6, 9, 48 if task == "caption" else 32), {"num_beams": 4, "length_penalty": penalty}
    start = torch.full((6, 1), BOS)
    found = theirs.text_decoder.generate(
        start, encoder_hidden_states=states, eos_token_id=SEP, pad_token_id=0, num_return_sequences=4,
        max_new_tokens=12, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    chosen = GenerationOptions(max_new_tokens=12, num_return_sequences=4, **options)
    mine = generate(ours.text_decoder, Prompt(start, None), Memory(states), chosen)
    assert_close(mine.scores.flatten(), found.sequences_scores)
    assert texts(mine.tokens.flatten(0, 1), 0) == [text[1:] for text in texts(found.sequences)]
    assert mine.lengths.flatten().tolist() == [len(text) - 1 for text in texts(found.sequences)]


class TestFaults:
    def test_unknown_arguments_are_named(self) -> None:
        ours, _ = twins("caption")
        with pytest.raises(OptionError, match="no argument 'beams'; it has: num_beams"):
            ours.generate(images(ours), beams=3)

    def test_no_room_behind_the_prompt(self) -> None:
        ours, _ = twins("caption")
        with pytest.raises(InputError, match="leaves no room behind the prompt"):
            ours.generate(images(ours), input_ids=words(3, 7), max_length=6)
        with pytest.raises(InputError, match="need 78 positions, the model has 64"):
            ours.generate(images(ours), input_ids=words(3, 60))

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("num_beams", "3"),
            ("max_new_tokens", 2.5),
            ("max_length", [7]),
            ("top_p", "0.9"),
            ("num_beams", 0),
            ("temperature", 0),
            ("top_p", 1.5),
            ("num_return_sequences", 2),
        ],
    )
    def test_values_out_of_range(self, option: str, value: float) -> None:
        ours, _ = twins("caption")
        with pytest.raises(OptionError, match=f"option '{option}' must be"):
            ours.generate(images(ours), **{option: value})
