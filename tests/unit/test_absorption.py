"""Looking at the image's states themselves gives what keys and values of them give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import save_checkpoint, small_config

from benchmarks import flops
from benchmarks.common import config_of
from blip_engine import BlipTextConfig, resident
from blip_engine.absorption import Absorbed, absorbing_pays
from blip_engine.checkpoint import find_checkpoint
from blip_engine.requests import TASKS, Request, Task, options_for
from blip_engine.resident import ResidentModel
from blip_engine.runner import runner_for
from blip_engine.text_layers import BlipTextSelfAttention


def attention(dtype: torch.dtype, width: int = 48) -> BlipTextSelfAttention:
    torch.manual_seed(0)
    config = BlipTextConfig(**small_config()["text_config"])
    layer = BlipTextSelfAttention(config, width).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.to(dtype)
    layer.absorbed = Absorbed(layer.key, layer.value, layer.heads)
    return layer


@pytest.mark.parametrize(("shared", "tokens"), [(1, 1), (3, 1), (1, 5), (2, 4)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@torch.inference_mode()
def test_one_layer(dtype: torch.dtype, error: float, shared: int, tokens: int, device: torch.device) -> None:
    layer = attention(dtype).to(device)
    layer.absorbed = Absorbed(layer.key, layer.value, layer.heads)  # of the weights where they are now
    states, seen = torch.randn(4 * shared, tokens, 32), torch.randn(4, 17, 48)
    states, seen = states.to(device, dtype), seen.to(device, dtype)
    truth, _ = layer(states, *layer.project(seen), None, False)
    found = layer.look(states, seen)
    assert found.shape == truth.shape
    assert (found - truth).abs().max() <= error * truth.abs().max()


@pytest.mark.parametrize("task", TASKS)
def test_whole_models(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """In float32: the same words, and scores that differ by rounding."""
    save_checkpoint(tmp_path, task)
    runner = runner_for(task, ResidentModel(find_checkpoint(tmp_path), task, device, torch.float32))
    pictures = np.random.default_rng(3).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    texts = ("",) if task == "caption" else ("a red dog", "what is in this picture ?")
    asked = [Request(task, task, each, texts, options_for(task, {})) for each in pictures]

    def results(absorbed: bool) -> list[Any]:
        monkeypatch.setattr(resident, "absorbing_pays", lambda *_: absorbed)
        return [each for row in runner.run([runner.prepare(request) for request in asked]) for each in row]

    for found, truth in zip(results(True), results(False), strict=True):
        numbers = ("itm", "itc") if task == "itm" else ("score",)
        if task != "itm":
            assert found.text == truth.text
        for name in numbers:
            assert getattr(found, name) == pytest.approx(getattr(truth, name), abs=1e-5)


@pytest.mark.parametrize("model", ["base", "large"])
def test_it_is_chosen_where_it_is_less_work(model: str) -> None:
    config: Any = config_of(model)
    text, width, seen = config.text_config, config.vision_config.hidden_size, flops.patches(config) + 1
    pair = text.num_hidden_layers * 4 * text.hidden_size * seen
    for queries in (1, 20, 58, 61, 64, 128, 600):
        less = queries * flops.absorbed_look(config) <= flops.cross_keys(config) + queries * pair
        assert absorbing_pays(queries, seen, width, text.hidden_size, text.num_attention_heads) is less
        assert less is (queries < 64)
