"""BlipModel's features agree with transformers', and it takes the towers of a captioning checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import save_checkpoint, small_config
from torch import Tensor
from twins import assert_close, images, pair, words

from blip_engine import BlipForConditionalGeneration, BlipModel
from blip_engine.errors import CheckpointError

MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])


def assert_tuples_close(ours: Any, theirs: Any) -> None:
    """Two tuples of tensors and tuples are equal in structure and close in value."""
    if isinstance(theirs, Tensor):
        assert_close(ours, theirs)
        return
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_tuples_close(mine, other)


@torch.no_grad()
def test_features() -> None:
    ours, theirs = pair("BlipModel", small_config())
    ids, pixels = words(3, 6), images(ours)
    more = {"output_hidden_states": True, "output_attentions": True}
    for given in ({}, more):
        for plain in (True, False):
            chosen = given | {"return_dict": plain}
            mine, other = ours.get_text_features(ids, MASK, **chosen), theirs.get_text_features(ids, MASK, **chosen)
            assert_tuples_close(tuple(mine), other.to_tuple() if plain else other)
            mine, other = ours.get_image_features(pixels, **chosen), theirs.get_image_features(pixels, **chosen)
            assert_tuples_close(tuple(mine), other.to_tuple() if plain else other)
    wide = torch.randn(2, 3, 48, 32)
    mine = ours.get_image_features(wide, interpolate_pos_encoding=True).pooler_output
    assert_close(mine, theirs.get_image_features(wide, interpolate_pos_encoding=True).pooler_output)
    assert mine.shape == (2, 512)


class TestFiles:
    def test_it_is_saved_and_loaded_both_ways(self, tmp_path: Path) -> None:
        ours, theirs = pair("BlipModel", small_config())
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        loaded, info = transformers.BlipModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for model in (loaded, BlipModel.from_pretrained(tmp_path / "theirs")):
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in theirs.state_dict().items())

    def test_the_towers_of_a_captioning_checkpoint(self, tmp_path: Path) -> None:
        caption = BlipForConditionalGeneration.from_pretrained(save_checkpoint(tmp_path, "caption"))
        with pytest.warns(UserWarning, match="Newly initialised") as caught:
            model = BlipModel.from_pretrained(tmp_path)
        assert caught[0].filename == __file__
        named = str(caught[0].message).rpartition(": ")[2].split(", ")
        towers = {"vision_model.": "vision_model.", "text_decoder.bert.": "text_model."}
        taken = set()
        for source, target in towers.items():
            for key, value in caption.state_dict().items():
                if key.startswith(source):
                    taken.add(key.replace(source, target))
                    assert torch.equal(model.state_dict()[key.replace(source, target)], value)
        assert set(named) == model.state_dict().keys() - taken
        assert model.logit_scale.item() == pytest.approx(2.6592)
        assert 0.01 < model.visual_projection.weight.std() < 0.03
        assert model(words(2, 5), images(model)).logits_per_image.isfinite().all()

    def test_other_checkpoints_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"missing: logit_scale.*unexpected: itm_head"):
            BlipModel.from_pretrained(save_checkpoint(tmp_path / "itm", "itm"))
        with pytest.raises(CheckpointError, match="missing"):  # and the answer decoder is no text tower
            BlipModel.from_pretrained(save_checkpoint(tmp_path / "vqa", "vqa"))
