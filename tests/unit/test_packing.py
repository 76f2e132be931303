"""Linear layers laid out for oneDNN: equal to torch's own, and in int8 near to them, row by row."""

import logging
from typing import Any

import pytest
import torch
from small_models import save_checkpoint
from torch import nn
from torch.nn import functional as F

from blip_engine import BlipForQuestionAnswering, Engine, packing
from blip_engine.errors import OptionError
from blip_engine.packing import Int8Linear, PackedLinear, can_pack, pack_linears
from blip_engine.precision import choose_dtype

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def layer(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(BF16)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (3, 17, 48), (2, 300, 768)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_is_bit_for_bit_the_same(shape: tuple[int, ...], bias: bool) -> None:
    plain, states = layer(shape[-1], 96, bias), torch.randn(shape).to(BF16)
    assert PackedLinear(plain.weight, plain.bias)(states).equal(plain(states))
    fused = PackedLinear(plain.weight, plain.bias, gelu=True)(states)
    torch.testing.assert_close(fused, F.gelu(plain(states)), atol=2**-7, rtol=2**-7)  # rounded once instead of twice


@torch.inference_mode()
@pytest.mark.parametrize("inputs", [48, 768, 3072])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_int8_is_within_its_steps(inputs: int, scale: float) -> None:
    plain, states = layer(inputs, 128), torch.randn(40, inputs).to(BF16) * scale
    truth = F.linear(states.float(), plain.weight.float(), plain.bias.float())
    off = (Int8Linear(plain.weight, plain.bias)(states).float() - truth).norm() / truth.norm()
    assert off < 0.02
    fused = Int8Linear(plain.weight, plain.bias, gelu=True)(states)
    assert (fused.float() - F.gelu(truth)).norm() / truth.norm() < 0.02


@torch.inference_mode()
def test_int8_takes_every_row_by_itself() -> None:
    """One row of huge values does not coarsen the steps of the others, and blank rows stay finite."""
    packed = Int8Linear(layer(64, 32).weight, None)
    states = torch.randn(9, 64).to(BF16)
    alone = packed(states)
    states[4], states[6] = 1e4, 0.0
    crowd = packed(states)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert crowd[others].equal(alone[others])
    assert crowd[6].equal(torch.zeros(32, dtype=BF16))
    extreme = torch.full((1, 64), 3e38).to(BF16)
    assert packed(extreme * 0 + 1).isfinite().all()


@torch.inference_mode()
def test_every_value_of_a_row_finds_its_step() -> None:
    """The largest of a row must not wrap around to the smallest byte, however bfloat16 rounds the steps."""
    packed = Int8Linear(torch.eye(32).to(BF16), None)
    rows = torch.randn(4000, 32).to(BF16)
    largest = rows.abs().amax(1, keepdim=True)
    assert ((packed(rows) - rows).abs() <= largest * 0.012).all()


def test_a_model_runs_on_with_packed_layers(tmp_path: Any) -> None:
    save_checkpoint(tmp_path / "vqa", "vqa")
    plain, packed = (BlipForQuestionAnswering.from_pretrained(tmp_path / "vqa", dtype=BF16) for _ in range(2))
    pack_linears(packed, int8=False)
    assert not [name for name, module in packed.named_modules() if isinstance(module, nn.Linear)]
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 9, 12, 3], [2, 15, 20, 3]])
    with torch.inference_mode():
        states = [model.vision_model(pixels).last_hidden_state for model in (plain, packed)]
        torch.testing.assert_close(states[1], states[0], atol=0.05, rtol=0.05)
        assert packed.generate(ids, pixels).shape[0] == 2


def test_the_engine_packs(tmp_path: Any) -> None:
    save_checkpoint(tmp_path / "vqa", "vqa")
    kinds: dict[str, set[type]] = {"bf16": {PackedLinear}, "int8": {PackedLinear, Int8Linear}, "fp32": {nn.Linear}}
    for precision, expected in kinds.items():
        with Engine.load({"vqa": str(tmp_path / "vqa")}, "cpu", precision) as engine:
            found = {type(module) for module in engine._runners["vqa"].resident.model.modules()}
        assert found & {PackedLinear, Int8Linear, nn.Linear} == expected


def test_another_build_of_torch_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Absent:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"'_OpNamespace' has no attribute '{name}'")

    save_checkpoint(tmp_path / "vqa", "vqa")
    monkeypatch.setattr(packing.torch.ops, "mkldnn", Absent())
    monkeypatch.setattr(packing.torch.ops, "onednn", Absent())
    with caplog.at_level(logging.INFO, "blip_engine.packing"):
        assert not can_pack(CPU, BF16, PackedLinear)
    assert "PackedLinear" in caplog.text
    with Engine.load({"vqa": str(tmp_path / "vqa")}, "cpu", "bf16") as engine:
        assert nn.Linear in {type(module) for module in engine._runners["vqa"].resident.model.modules()}
    with pytest.raises(OptionError, match="int8"):
        Engine.load({"vqa": str(tmp_path / "vqa")}, "cpu", "int8")


def test_other_places_and_types_are_left_alone() -> None:
    assert not can_pack(CPU, torch.float32, PackedLinear)
    assert not can_pack(torch.device("cuda"), BF16, PackedLinear)
    with pytest.raises(OptionError, match="for CPUs"):
        choose_dtype("int8", torch.device("cuda"))
