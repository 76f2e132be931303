"""How many images and texts run together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import WORDS, save_checkpoint, small_config

from benchmarks.common import config_of
from blip_engine import Engine
from blip_engine.errors import CheckpointError
from blip_engine.resident import Shapes

GIB = 2**30
CUDA = torch.device("cuda")


def test_on_a_cpu() -> None:
    assert Shapes.fitting(config_of("base"), torch.device("cpu"), torch.bfloat16) == Shapes(4, 32)
    assert Shapes.fitting(config_of("base"), torch.device("cpu"), torch.float32) == Shapes(4, 16)
    assert Shapes.fitting(config_of("tiny"), torch.device("cpu"), torch.bfloat16).groups == 256  # a worker's slots


@pytest.mark.parametrize(
    ("free", "shapes"), [(76, Shapes(32, 256)), (40, Shapes(32, 256)), (12, Shapes(16, 128)), (1, Shapes(1, 8))]
)
def test_on_a_gpu_what_its_free_memory_holds(free: int, shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 80 * GIB))
    config: Any = config_of("base")
    found = Shapes.fitting(config, CUDA, torch.bfloat16)
    assert found == shapes
    assert found.images == 1 or found.memory(config, torch.bfloat16) <= free * GIB // 2


def test_wider_numbers_and_larger_models_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (24 * GIB, 24 * GIB))
    base, large = config_of("base"), config_of("large")
    usual = Shapes.fitting(base, CUDA, torch.bfloat16)
    assert Shapes.fitting(base, CUDA, torch.float32).groups < usual.groups
    assert Shapes.fitting(large, CUDA, torch.float32).groups <= usual.groups
    assert Shapes(8, 16).memory(large, torch.bfloat16) > Shapes(8, 16).memory(base, torch.bfloat16)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", "vqa", **small_config(text={"vocab_size": len(WORDS) - 1, "bos_token_id": 5}))
    with pytest.raises(CheckpointError, match=f"{len(WORDS)} words, the model room for {len(WORDS) - 1}"):
        Engine.load({"vqa": str(tmp_path / "m")}, "cpu")


def test_large_groups_are_fewer() -> None:
    shapes = Shapes(4, 16)
    assert [shapes.groups_of(size) for size in (1, 2, 4, 8)] == [16, 16, 16, 8]
    assert Shapes(1, 1).groups_of(8) == 1
