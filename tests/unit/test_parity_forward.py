"""Forward passes, losses and files agree with transformers', whatever the configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import CLASSES
from torch import Tensor
from twins import BOS, CONFIGS, assert_close, configs_for, images, twins, words

from blip_engine import BlipConfig, BlipTextLMHeadModel, BlipTextModel, BlipVisionModel
from blip_engine.requests import TASKS, Task

CASES = [(task, name) for task in TASKS for name in CONFIGS]


def padded(rows: int = 3, width: int = 7) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts of different lengths."""
    ids, mask = words(rows, width), torch.ones(rows, width, dtype=torch.long)
    for row in range(1, rows):
        ids[row, width - row :], mask[row, width - row :] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
class TestCaption:
    def test_logits_and_loss(self, name: str) -> None:
        ours, theirs = twins("caption", CONFIGS[name])
        pixels, (ids, mask) = images(ours), padded()
        labels = ids.masked_fill(mask == 0, -100)
        for given in ({"labels": ids}, {"labels": labels}, {}):
            mine, other = ours(pixels, ids, mask, **given), theirs(pixels, ids, mask, **given)
            assert_close(mine.logits, other.logits)
            assert_close(mine.image_embeds, other.image_embeds)
            assert (mine.loss is None) == (other.loss is None) == (not given)
            if given:
                assert_close(mine.loss, other.loss)

    def test_gradients(self, name: str) -> None:
        ours, theirs = twins("caption", CONFIGS[name])
        pixels, ids = images(ours), words(3, 7)
        for model in (ours, theirs):
            model(pixels, ids, labels=ids).loss.backward()
        gradients = dict(theirs.named_parameters())
        for key, parameter in ours.named_parameters():
            assert_close(parameter.grad, gradients[key].grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_question_losses(name: str) -> None:
    ours, theirs = twins("vqa", configs_for("vqa")[name])
    pixels, ids, labels = images(ours), words(3, 7), words(3, 4, seed=1)
    mask = torch.ones_like(ids)
    partly = labels.clone()
    partly[1:, 2:] = -100
    for given in (
        {"labels": labels},
        {"labels": labels, "attention_mask": mask},
        {"labels": labels, "decoder_attention_mask": torch.ones_like(labels)},
        {"labels": partly, "decoder_input_ids": labels},
    ):
        assert_close(ours(ids, pixels, **given).loss, theirs(ids, pixels, **given).loss)


@pytest.mark.parametrize("name", CONFIGS)
def test_matching_scores(name: str) -> None:
    ours, theirs = twins("itm", CONFIGS[name])
    pixels, (ids, mask) = images(ours), padded()
    for head in (True, False):
        mine = ours(ids, pixels, use_itm_head=head, attention_mask=mask)
        other = theirs(ids, pixels, use_itm_head=head, attention_mask=mask)
        assert_close(mine.itm_score, other.itm_score)
        assert_close(mine.question_embeds, other.question_embeds)
    fewer = ours(ids[:2], pixels, use_itm_head=False).itm_score
    assert_close(fewer, theirs(ids[:2], pixels, use_itm_head=False).itm_score)
    assert fewer.shape == (3, 2)  # images by texts


class TestTowers:
    def test_vision(self) -> None:
        caption, theirs = twins("caption")
        vision = BlipVisionModel(caption.config.vision_config)
        vision.load_state_dict(theirs.vision_model.state_dict())
        pixels = images(caption)
        other = theirs.vision_model(pixels, output_hidden_states=True)
        mine = vision(pixels, output_hidden_states=True, output_attentions=True)
        assert_close(mine.last_hidden_state, other.last_hidden_state)
        assert_close(mine.pooler_output, other.pooler_output)
        assert len(mine.hidden_states) == len(other.hidden_states)
        for ours_, theirs_ in zip(mine.hidden_states[:-1], other.hidden_states[:-1], strict=True):
            assert_close(ours_, theirs_)
        for weights in mine.attentions:
            assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))

    @pytest.mark.parametrize("size", [(32, 64), (48, 40)])
    def test_interpolated_positions(self, size: tuple[int, int]) -> None:
        ours, theirs = twins("itm")
        pixels, ids = torch.randn(2, 3, *size), words(2, 5)
        mine = ours(ids, pixels, interpolate_pos_encoding=True)
        assert_close(mine.itm_score, theirs(ids, pixels, interpolate_pos_encoding=True).itm_score)

    def test_text_encoder_and_decoder(self) -> None:
        caption, theirs = twins("caption")
        (ids, mask), states = padded(), torch.randn(3, 9, 48)
        bert = BlipTextModel(caption.config.text_config, add_pooling_layer=False)
        bert.load_state_dict(theirs.text_decoder.bert.state_dict())
        for given in ({}, {"encoder_hidden_states": states}, {"is_decoder": True, "encoder_hidden_states": states}):
            mine, other = bert(ids, mask, **given), theirs.text_decoder.bert(ids, mask, **given)
            assert_close(mine.last_hidden_state, other.last_hidden_state)
        embedded = bert.embeddings.word_embeddings(ids)
        assert_close(bert(inputs_embeds=embedded).last_hidden_state, bert(ids).last_hidden_state)

    def test_logits_to_keep_and_losses_per_row(self) -> None:
        caption, theirs = twins("caption")
        head: BlipTextLMHeadModel = caption.text_decoder
        ids, states = words(3, 6), torch.randn(3, 9, 48)
        for keep in (1, 2, torch.tensor([0, 3])):
            mine = head(ids, encoder_hidden_states=states, logits_to_keep=keep).logits
            assert_close(mine, theirs.text_decoder(ids, encoder_hidden_states=states, logits_to_keep=keep).logits)
        given: dict[str, Any] = {"encoder_hidden_states": states, "labels": ids, "reduction": "none"}
        assert_close(head(ids, **given).loss, theirs.text_decoder(ids, **given).loss)

    def test_a_cache_changes_nothing(self) -> None:
        caption, _ = twins("caption")
        ids, states = words(3, 6), torch.randn(3, 9, 48)
        whole = caption.text_decoder(ids, encoder_hidden_states=states).logits
        past, parts = None, []
        for part in ids.split(2, dim=1):
            output = caption.text_decoder(part, encoder_hidden_states=states, past_key_values=past, use_cache=True)
            past = output.past_key_values
            parts.append(output.logits)
        assert_close(torch.cat(parts, dim=1), whole)

    def test_a_caption_without_ids_reads_bos(self) -> None:
        ours, theirs = twins("caption")
        pixels = images(ours)
        assert_close(ours(pixels).logits, theirs(pixels, torch.full((3, 1), BOS)).logits)


@pytest.mark.parametrize(("task", "name"), CASES)
class TestFiles:
    def test_state_dicts_fit_both_ways(self, task: Task, name: str) -> None:
        ours, theirs = twins(task, configs_for(task)[name])
        mine, other = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == other.keys()
        assert all(mine[key].shape == other[key].shape and torch.equal(mine[key], other[key]) for key in mine)
        assert str(theirs.load_state_dict(mine, strict=True)) == "<All keys matched successfully>"

    def test_saved_checkpoints_are_read_by_the_other(self, task: Task, name: str, tmp_path: Path) -> None:
        ours, theirs = twins(task, configs_for(task)[name])
        kind, other = CLASSES[task], type(theirs)
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        loaded, info = other.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for model in (loaded, kind.from_pretrained(tmp_path / "theirs"), kind.from_pretrained(tmp_path / "ours")):
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_default_configurations_are_transformers() -> None:
    mine = BlipConfig().to_dict()
    theirs = transformers.BlipConfig().to_dict()
    for part in ("text_config", "vision_config"):
        values = mine.pop(part)
        assert {key: theirs[part][key] for key in values} == values
    assert {key: theirs[key] for key in mine} == mine


def test_configuration_files_go_both_ways(tmp_path: Path) -> None:
    config = CONFIGS["large patches, other epsilon"]
    BlipConfig(**config).save_pretrained(tmp_path / "ours")
    transformers.BlipConfig(**config).save_pretrained(tmp_path / "theirs")
    read = transformers.BlipConfig.from_pretrained(tmp_path / "ours")
    assert read.text_config.num_attention_heads == 8
    assert read.vision_config.patch_size == 16
    assert BlipConfig.from_json_file(tmp_path / "theirs" / "config.json") == BlipConfig(**config)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["vision_config"]["layer_norm_eps"] == 1e-6
