"""Shapes, masks, padding, labels and generation options that Hypothesis chooses: ours does as transformers does."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_models import WORDS, small_config
from torch import Tensor
from twins import SEP, assert_close, pair, texts, words

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")

#: The same examples in every run: what fails here can be run again.
few, more = (settings(derandomize=True, deadline=None, max_examples=number) for number in (25, 50))
MORE = {"output_attentions": True, "output_hidden_states": True}
SIDE = st.integers(8, 60)  # pixels; patches have 8, the configured side is 32
OPTIONS = st.fixed_dictionaries(
    {
        "num_beams": st.integers(1, 5),
        "max_new_tokens": st.integers(1, 10),
        "length_penalty": st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.2, 2.0]),
        "no_repeat_ngram_size": st.integers(0, 3),
        "early_stopping": st.sampled_from([False, True, "never"]),
    },
    optional={"min_new_tokens": st.integers(1, 8), "num_return_sequences": st.integers(1, 5)},
).map(lambda chosen: chosen | _possible(chosen))


def _possible(chosen: dict[str, Any]) -> dict[str, Any]:
    """Values that fit each other: no more sequences than beams, no lower bound above the upper one."""
    bounds = {"min_new_tokens": "max_new_tokens", "num_return_sequences": "num_beams"}
    return {name: min(chosen[name], chosen[bound]) for name, bound in bounds.items() if name in chosen}


@st.composite
def batches(draw: st.DrawFn, rows: int = 4) -> tuple[Tensor, Tensor]:
    """Ids and a mask (rows, T) of zeros and ones in any order, so padded on either side and with holes."""
    shape = draw(st.integers(1, rows)), draw(st.integers(1, 9))
    cells = st.lists(st.integers(0, 1), min_size=shape[1], max_size=shape[1])
    mask = torch.tensor([draw(cells) for _ in range(shape[0])])
    return words(*shape, seed=draw(st.integers(0, 9))), mask


@st.composite
def ragged(draw: st.DrawFn, left: bool) -> tuple[Tensor, Tensor]:
    """Texts [CLS] words [SEP] of different lengths, padded on the right, or where `left` allows it on the left."""
    lengths = draw(st.lists(st.integers(2, 9), min_size=2, max_size=4))
    before, width = left and draw(st.booleans()), max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        text = torch.cat([torch.tensor([2]), words(length - 2, seed=row), torch.tensor([SEP])])
        ids[row, slice(width - length, None) if before else slice(0, length)] = text
    return ids, ids.ne(0).long()


@cache
def models(name: str) -> tuple[Any, Any]:
    # transformers can do VQA only where both widths are equal.
    return pair(name, small_config({"hidden_size": 32}), end=1.0)


def pixels(rows: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(5))


def partly(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels: -100 where the mask is 0, but a loss of something there is."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, -1] = ids[0, -1]
    return labels


def assert_alike(ours: Any, theirs: Any) -> None:
    """Two outputs of the same fields, tuples of tensors included; caches have layouts of their own."""
    assert ours.keys() == tuple(theirs.keys())
    for key in set(ours.keys()) - {"past_key_values"}:
        mine, other = ours[key], theirs[key]
        if isinstance(other, Tensor):
            assert_close(mine, other)
        else:
            assert len(mine) == len(other)
            for one, two in zip(mine, other, strict=True):
                assert_close(one, two)


@torch.no_grad()
@more
@given(batches(), st.booleans(), st.integers(0, 6))
@example((words(2, 3), torch.tensor([[0, 0, 0], [1, 1, 1]])), True, 2)
def test_text(batch: tuple[Tensor, Tensor], decoder: bool, states: int) -> None:
    ours, theirs = models("BlipTextModel")
    call: dict[str, Any] = {"input_ids": batch[0], "attention_mask": batch[1], "is_decoder": decoder} | MORE
    if states:
        call["encoder_hidden_states"] = torch.randn(
            len(batch[0]), states, 32, generator=torch.Generator().manual_seed(6)
        )
    assert_alike(ours(**call), theirs(**call))


@torch.no_grad()
@few
@given(st.integers(1, 3), SIDE, SIDE)
def test_images(rows: int, height: int, width: int) -> None:
    ours, theirs = models("BlipVisionModel")
    call = {"pixel_values": pixels(rows, height, width), "interpolate_pos_encoding": True} | MORE
    assert_alike(ours(**call), theirs(**call))


@few
@given(batches(), SIDE, SIDE)
def test_captions(batch: tuple[Tensor, Tensor], height: int, width: int) -> None:
    ours, theirs = models("BlipForConditionalGeneration")
    ids, mask = batch
    if ids.shape[1] == 1:
        ids, mask = ids.repeat(1, 2), mask.repeat(1, 2)  # a loss needs a next word
    given = {"pixel_values": pixels(len(ids), height, width), "interpolate_pos_encoding": True}
    given |= {"input_ids": ids, "attention_mask": mask, "labels": partly(ids, mask)}
    assert_losses_agree(ours, theirs, given)


@few
@given(batches(rows=2), st.integers(1, 9))
def test_questions(answers: tuple[Tensor, Tensor], width: int) -> None:
    ours, theirs = models("BlipForQuestionAnswering")
    ids, mask = answers
    if ids.shape[1] == 1:
        ids, mask = ids.repeat(1, 2), mask.repeat(1, 2)
    given = {"pixel_values": pixels(len(ids)), "input_ids": words(len(ids), width), "decoder_attention_mask": mask}
    assert_losses_agree(ours, theirs, given | {"labels": partly(ids, mask), "decoder_input_ids": ids})


def assert_losses_agree(ours: Any, theirs: Any, given: dict[str, Any]) -> None:
    """Outputs, and the gradients of the loss as one vector."""
    found = []
    outputs = [model(**given) for model in (ours, theirs)]
    assert_alike(*outputs)
    for model, output in zip((ours, theirs), outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    mine, truth = (torch.cat([values[name].flatten() for name in found[1]]) for values in found)
    assert float((mine - truth).norm()) <= 1e-5 * float(truth.norm())


@torch.no_grad()
@few
@given(batches(), st.booleans(), st.integers(1, 3))
def test_matching(batch: tuple[Tensor, Tensor], head: bool, pictures: int) -> None:
    ours, theirs = models("BlipForImageTextRetrieval")
    ids, mask = batch
    call = {"pixel_values": pixels(len(ids) if head else pictures), "input_ids": ids, "attention_mask": mask}
    assert_alike(ours(**call, use_itm_head=head), theirs(**call, use_itm_head=head))


@more
@given(OPTIONS, st.integers(1, 3), st.integers(2, 7))
def test_generation(options: dict[str, Any], rows: int, width: int) -> None:
    """Rows of one length: there transformers is right."""
    for name, prompt in (("BlipForConditionalGeneration", width - 1), ("BlipForQuestionAnswering", 1)):
        ours, theirs = models(name)
        call = {"pixel_values": pixels(rows), "input_ids": words(rows, width)} | options
        mine = ours.generate(**call)
        assert texts(mine, prompt) == texts(theirs.generate(**call | {"input_ids": words(rows, width)}), prompt)
        assert int(mine.max()) < len(WORDS) + 2


@few
@given(ragged(left=True), OPTIONS)
def test_padded_prompts(batch: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    assert_as_alone("BlipForConditionalGeneration", batch, options)


@few
@given(ragged(left=False), OPTIONS)
def test_padded_questions(batch: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    assert_as_alone("BlipForQuestionAnswering", batch, options)


def assert_as_alone(name: str, batch: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    """Ours generates for padded rows together what transformers does for each without its padding."""
    ours, theirs = models(name)
    ids, mask = batch
    pictures, each = pixels(len(ids)), options.get("num_return_sequences", 1)
    together = ours.generate(pixel_values=pictures, input_ids=ids, attention_mask=mask, **options).split(each)
    for row, mine in enumerate(together):
        own = ids[row, mask[row].bool()][None]
        prompt = own.shape[1] - 1 if name == "BlipForConditionalGeneration" else 1
        single = theirs.generate(pixel_values=pictures[row : row + 1], input_ids=own.clone(), **options)
        # Behind its limit a row is padded to the longest one's, whose prompt counts.
        assert texts(mine[:, : single.shape[1]], prompt) == texts(single, prompt)
        assert not mine[:, single.shape[1] :].any()
