"""Linear layers of a model that runs on a CPU, with weights laid out once for oneDNN's kernels.

torch's own `nn.Linear` has oneDNN lay a bfloat16 weight out anew at every call, and copies the bias first. The
operators used here are those that torch.compile calls when it freezes a model (`torch/_inductor/fx_passes` in torch's
source); called directly they need no compiler and no time to compile. On two cores with AVX512-BF16 a product takes 0.6
to 0.9 of the time and comes out bit for bit the same.

In int8 weights have a scale for each output and activations one for each row, found as they come (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339, without its outliers). So a row's result depends on that row alone.
"""

import logging
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import first_line
from .text import BlipTextLMPredictionHead
from .text_layers import BlipTextIntermediate, BlipTextSelfAttention, BlipTextSelfOutput
from .vision import BlipAttention, BlipMLP

_log = logging.getLogger(__name__)

#: Modules whose linear layers are worth int8. The others are small, and their results are what is asked for.
_LARGE = (
    BlipAttention,
    BlipMLP,
    BlipTextSelfAttention,
    BlipTextSelfOutput,
    BlipTextIntermediate,
    BlipTextLMPredictionHead,
)
_MIDDLE = 128  # of unsigned bytes: the products' fast kernels take activations unsigned and weights signed
_MAGNITUDE = 0x7FFF  # all bits of a bfloat16 but the sign
_REACH = 126.0  # steps from the middle to the largest activation of a row; bfloat16 may round it up by half a step


class PackedLinear(nn.Module):
    """`F.linear(x, weight, bias)`, perhaps with a GELU behind it, in bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()
        self._behind: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, states: Tensor) -> Tensor:
        """(..., features) to (..., outputs)."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(states, self._weight, self._bias, *self._behind))


class Int8Linear(nn.Module):
    """The same, multiplied in int8 and summed in int32; what goes in and comes out is bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        super().__init__()
        full = weight.detach().float()
        self._scale = full.abs().amax(1).clamp(min=1e-12) / 127
        whole = (full / self._scale[:, None]).round().to(torch.int8).contiguous()
        self._weight = torch.ops.onednn.qlinear_prepack(whole, None)
        self._no_zero_points = torch.zeros(len(full), dtype=torch.int32)
        self._bias = (torch.zeros(len(full)) if bias is None else bias.detach()).to(torch.bfloat16)
        self._gelu = gelu

    def forward(self, states: Tensor) -> Tensor:
        """(..., features) to (..., outputs)."""
        rows = states.flatten(0, -2)
        # A magnitude's bits grow with it; as whole numbers they are compared three times as fast.
        largest = (rows.view(torch.int16) & _MAGNITUDE).amax(1, keepdim=True).view(rows.dtype)
        step = largest.clamp_(min=1e-12).mul_(1 / _REACH)  # what one unit stands for
        # Through int8, for torch has no fast way to uint8. Turning the first bit adds _MIDDLE to a signed byte.
        whole = (rows / step).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(_MIDDLE)
        product = torch.ops.onednn.qlinear_pointwise(
            whole,
            1.0,
            _MIDDLE,
            self._weight,
            self._scale,
            self._no_zero_points,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )
        found = torch.addcmul(self._bias, product, step)
        return (F.gelu(found) if self._gelu else found).unflatten(0, states.shape[:-1])


def can_pack(device: torch.device, dtype: torch.dtype, kind: type[PackedLinear] | type[Int8Linear]) -> bool:
    """Whether this torch has the operators for this processor, and they compute what `F.linear` does."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    weight, bias, states = (torch.randn(*shape).to(dtype) for shape in ((64, 32), (64,), (8, 32)))
    try:
        with torch.inference_mode():
            plain = F.linear(states, weight, bias)
            pairs = (kind(weight, bias)(states), plain), (kind(weight, bias, gelu=True)(states), F.gelu(plain))
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # another build of torch: its caller decides
        _log.info("no %s here: %s", kind.__name__, first_line(error))
        return False
    return all(torch.allclose(packed, truth, atol=0.5, rtol=0.05) for packed, truth in pairs)


def pack_linears(model: nn.Module, int8: bool) -> None:
    """Replace every linear layer of a bfloat16 model on a CPU; it can run then, but not be trained or saved."""
    for module in list(model.modules()):
        kind = Int8Linear if int8 and isinstance(module, _LARGE) else PackedLinear
        fused = _fusable(module)
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child.weight, child.bias, gelu=name == fused))
        if fused is not None:
            setattr(module, "activation", _nothing)  # noqa: B010  # mypy takes functions of modules for parameters


def _fusable(module: nn.Module) -> str | None:
    """The name of the linear layer of a module that an exact GELU follows."""
    if isinstance(module, BlipMLP | BlipTextIntermediate) and module.activation is F.gelu:
        return "fc1" if isinstance(module, BlipMLP) else "dense"
    return None


def _nothing(states: Tensor) -> Tensor:
    return states
