"""Where transformers 5.23 errs, each shown with what ours does: a row comes out as it would alone, or a clear error.

When one of these fails on a newer transformers, its half of the fault was mended: keep ours, drop theirs.
"""

from typing import Any

import pytest
import torch
import transformers
from small_models import small_config
from torch import Tensor
from twins import SEP, assert_close, images, texts, twins, words

from blip_engine import BlipConfig, BlipForQuestionAnswering
from blip_engine.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")

LENGTHS = (9, 4, 6, 3, 7)


def ragged(lengths: tuple[int, ...] = LENGTHS, left: bool = False) -> tuple[Tensor, Tensor]:
    """Texts [CLS] words [SEP] of these lengths, padded with 0: ids and mask."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(max(lengths) - length, None) if left else slice(0, length)
        ids[row, place] = torch.cat([torch.tensor([2]), words(length - 2, seed=row), torch.tensor([SEP])])
    return ids, ids.ne(0).long()


def alone(model: Any, pixels: Tensor, ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
    """What each question gives by itself, without any padding."""
    rows = []
    for row in range(len(ids)):
        own = ids[row, mask[row].bool()][None]
        rows += texts(model.generate(input_ids=own.clone(), pixel_values=pixels[row : row + 1], **options))
    return rows


class TestPaddedQuestions:
    @pytest.mark.parametrize("beams", [1, 3])
    def test_generate_shows_the_decoder_no_padding(self, beams: int) -> None:
        ours, theirs = twins("vqa", end=1.0)
        pixels, (ids, mask) = images(ours, len(LENGTHS)), ragged()
        truth = alone(theirs, pixels, ids, mask, num_beams=beams)
        assert alone(ours, pixels, ids, mask, num_beams=beams) == truth
        assert texts(ours.generate(ids, pixels, attention_mask=mask, num_beams=beams)) == truth
        assert texts(theirs.generate(ids, pixels, attention_mask=mask, num_beams=beams)) != truth

    def test_the_loss_is_the_mean_of_the_rows_losses(self) -> None:
        ours, theirs = twins("vqa")
        pixels, (ids, mask), labels = images(ours, len(LENGTHS)), ragged(), words(len(LENGTHS), 4, seed=9)
        one_by_one = torch.stack([
            theirs(ids[i : i + 1, mask[i].bool()], pixels[i : i + 1], labels=labels[i : i + 1]).loss
            for i in range(len(ids))
        ]).mean()  # fmt: skip
        assert_close(ours(ids, pixels, attention_mask=mask, labels=labels).loss, one_by_one)
        assert (theirs(ids, pixels, attention_mask=mask, labels=labels).loss - one_by_one).abs() > 1e-2

    def test_the_decoder_heeds_the_encoder_mask(self) -> None:
        ours, theirs = twins("vqa")
        states, ids = torch.randn(2, 7, 32), words(2, 4)
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        truth = theirs.text_decoder(ids[1:], encoder_hidden_states=states[1:, :4]).logits
        given = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        assert_close(ours.text_decoder(ids, **given).logits[1:], truth)
        assert (theirs.text_decoder(ids, **given).logits[1:] - truth).abs().max() > 1e-2


class TestPrompts:
    @pytest.mark.parametrize("left", [False, True])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_prompts_of_unequal_length(self, left: bool, beams: int) -> None:
        ours, theirs = twins("caption", end=1.0)
        pixels, (ids, mask) = images(ours, len(LENGTHS)), ragged(left=left)
        truth, mine, other = [], [], []
        together = ours.generate(pixels, ids, mask, num_beams=beams).tolist()
        theirs_together = theirs.generate(pixels, ids.clone(), attention_mask=mask, num_beams=beams).tolist()
        for row, length in enumerate(LENGTHS):
            own = ids[row, mask[row].bool()][None]
            single = theirs.generate(pixels[row : row + 1], own.clone(), num_beams=beams)
            truth += texts(single, length - 1)
            mine += texts(torch.tensor(together[row : row + 1]), length - 1)
            other.append([token for token in theirs_together[row] if token != 0])
        assert mine == truth
        assert other != truth

    def test_the_callers_prompt_is_left_alone(self) -> None:
        ours, theirs = twins("caption")
        ids, kept = words(3, 5), words(3, 5)
        ours.generate(images(ours), input_ids=ids)
        assert ids.equal(kept)
        theirs.generate(images(ours), input_ids=ids)
        assert not ids.equal(kept)


def test_a_beam_is_padded_with_pad_not_with_sep() -> None:
    ours, theirs = twins("caption", end=1.0)
    pixels = images(ours, 8)
    mine, other = ours.generate(pixels, num_beams=3), theirs.generate(pixels, num_beams=3)
    assert texts(mine) == texts(other)
    behind = [(row[len(text) :], text) for row, text in zip(mine.tolist(), texts(mine), strict=True)]
    assert {token for padding, _ in behind for token in padding} == {0}
    assert sum(row.count(SEP) for row in other.tolist()) > sum(text.count(SEP) for _, text in behind)


class TestWideVision:
    """VQA with a vision tower wider than the text, as ViT-L is."""

    config = small_config({"hidden_size": 64}, {"hidden_size": 32})

    def test_ours_works_and_transformers_fails(self) -> None:
        ours = BlipForQuestionAnswering(BlipConfig(**self.config)).eval()
        pixels, questions = images(ours), words(3, 6)
        assert ours(questions, pixels, labels=words(3, 4)).loss.isfinite()
        assert len(ours.generate(questions, pixels, num_beams=3)) == 3
        theirs = transformers.BlipForQuestionAnswering(transformers.BlipConfig(**self.config)).eval()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            theirs(questions, pixels, labels=words(3, 4))

    def test_the_computation_is_transformers_own_with_the_right_width(self) -> None:
        ours = BlipForQuestionAnswering(BlipConfig(**self.config)).eval()
        encoder = transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**self.config)).eval()
        narrow = small_config({"hidden_size": 32}, {"hidden_size": 32})
        decoder = transformers.BlipForQuestionAnswering(transformers.BlipConfig(**narrow)).eval().text_decoder
        ours.vision_model.load_state_dict(encoder.vision_model.state_dict())
        ours.text_encoder.load_state_dict(encoder.text_encoder.state_dict())
        ours.text_decoder.load_state_dict(decoder.state_dict())
        pixels, questions, labels = images(ours), words(3, 6), words(3, 4)
        states = encoder.vision_model(pixels).last_hidden_state
        question = encoder.text_encoder(questions, encoder_hidden_states=states).last_hidden_state
        truth = decoder(labels, encoder_hidden_states=question, labels=labels).loss
        assert_close(ours(questions, pixels, labels=labels).loss, truth)

    def test_it_is_saved_and_loaded(self, tmp_path: Any) -> None:
        ours = BlipForQuestionAnswering(BlipConfig(**self.config)).eval()
        ours.save_pretrained(tmp_path)
        pixels, questions = images(ours), words(3, 6)
        again = BlipForQuestionAnswering.from_pretrained(tmp_path)
        assert again.generate(questions, pixels).equal(ours.generate(questions, pixels))


def test_smaller_images_are_refused_not_cut_off_silently() -> None:
    ours, theirs = twins("caption")
    small = torch.randn(2, 3, 24, 24)
    assert theirs(small, words(2, 4)).logits.isfinite().all()  # with the positions of other patches
    with pytest.raises(InputError, match="24x24, the model expects 32x32"):
        ours(small, words(2, 4))
    assert ours(small, words(2, 4), interpolate_pos_encoding=True).logits.isfinite().all()


def test_labels_of_minus_100_need_no_decoder_ids() -> None:
    ours, theirs = twins("vqa")
    labels = words(3, 5)
    labels[1:, 3:] = -100
    pixels, questions = images(ours), words(3, 6)
    with pytest.raises(IndexError):
        theirs(questions, pixels, labels=labels)
    padded = labels.masked_fill(labels == -100, 0)
    truth = theirs(questions, pixels, labels=labels, decoder_input_ids=padded).loss
    assert_close(ours(questions, pixels, labels=labels).loss, truth)
