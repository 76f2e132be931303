"""Files and configurations are transformers', and what its forward passes do not say (test_parity_matrix.py does)."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from small_models import CLASSES, small_config
from twins import BOS, CONFIGS, assert_close, configs_for, images, pair, texts, twins, words

import blip_engine
from blip_engine import BlipConfig
from blip_engine.requests import TASKS, Task

CASES = [(task, name) for task in TASKS for name in CONFIGS]


def test_a_cache_changes_nothing() -> None:
    caption, _ = twins("caption")
    ids, states = words(3, 6), torch.randn(3, 9, 48)
    whole = caption.text_decoder(ids, encoder_hidden_states=states).logits
    past, parts = None, []
    for part in ids.split(2, dim=1):
        output = caption.text_decoder(part, encoder_hidden_states=states, past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1), whole)


def test_a_caption_without_ids_reads_bos() -> None:
    ours, theirs = twins("caption")
    pixels = images(ours)
    assert_close(ours(pixels).logits, theirs(pixels, torch.full((3, 1), BOS)).logits)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_questions_at_480_pixels(tmp_path: Path) -> None:
    """A model of 384 pixels, as the hub has it, at the size that Salesforce ran it at: in the call, or once for all."""
    sides = {"image_size": 384, "patch_size": 16, "hidden_size": 32}
    ours, theirs = pair("BlipForQuestionAnswering", small_config(sides), end=1.0)
    pixels, ids, labels = torch.randn(2, 3, 480, 480), words(2, 6), words(2, 4, seed=1)
    once = copy.deepcopy(ours)
    once.vision_model.resize_images(480)
    once.save_pretrained(tmp_path)
    loaded = [kind.from_pretrained(tmp_path) for kind in (type(ours), type(theirs))]
    at_call = [(model, {"interpolate_pos_encoding": True}) for model in (ours, theirs)]
    answers, losses = [], []
    for model, how in [*at_call, *((model, {}) for model in (once, *loaded))]:
        answers.append(texts(model.generate(ids, pixels, num_beams=3, **how)))
        output = model(ids, pixels, labels=labels, **how)
        assert output.image_embeds.shape == (2, 1 + 30 * 30, 32)
        losses.append(output.loss)
    assert answers == [answers[0]] * 5
    for loss in losses:
        assert_close(loss, losses[1])
    assert (
        loaded[0](ids, pixels, labels=labels).loss - ours(ids, pixels[..., :384, :384], labels=labels).loss
    ).abs() > 1e-3


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


@pytest.mark.parametrize("name", ["BlipTextConfig", "BlipVisionConfig"])
def test_a_towers_configuration_out_of_a_whole_ones(name: str, tmp_path: Path) -> None:
    BlipConfig(**CONFIGS["large patches, other epsilon"]).save_pretrained(tmp_path)
    mine = getattr(blip_engine, name).from_json_file(tmp_path / "config.json")
    theirs = getattr(transformers, name).from_pretrained(tmp_path).to_dict()
    assert {key: theirs[key] for key in mine.to_dict()} == mine.to_dict()
    mine.save_pretrained(tmp_path / "alone")
    assert type(mine).from_json_file(tmp_path / "alone" / "config.json") == mine


def test_configuration_files_go_both_ways(tmp_path: Path) -> None:
    config = CONFIGS["large patches, other epsilon"]
    BlipConfig(**config).save_pretrained(tmp_path / "ours")
    transformers.BlipConfig(**config).save_pretrained(tmp_path / "theirs")
    read = transformers.BlipConfig.from_pretrained(tmp_path / "ours")
    assert read.text_config.num_attention_heads == 8
    assert read.vision_config.patch_size == 16
    assert BlipConfig.from_json_file(tmp_path / "theirs" / "config.json") == BlipConfig(**config)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["vision_config"]["layer_norm_eps"] == 1e-6
