"""What every model here shares: initial weights, loading and saving in the hub's layout."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .checkpoint import SAFETENSORS_FILE, Checkpoint, HubOptions, check_tensors, find_checkpoint
from .config import CONFIG_FILE, BlipConfig, BlipTextConfig, BlipVisionConfig
from .errors import CheckpointError, OptionError, first_line
from .outputs import ModelOutput
from .precision import choose_device

#: one device for the whole model: by itself, or for parts of it by name ("" is all of it)
DeviceMap: TypeAlias = str | int | torch.device | Mapping[str, str | int | torch.device] | None

ConfigT = TypeVar("ConfigT", BlipConfig, BlipTextConfig, BlipVisionConfig)

_CHOICES = ("auto", "balanced", "balanced_low_0", "sequential")  # of transformers; on one device they are the same

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # the exact one, with erf
    "relu": F.relu,
    "selu": F.selu,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that `hidden_act` names; ValueError for an unknown one."""
    try:
        return _ACTIVATIONS[name]
    except KeyError:
        raise ValueError(f"hidden_act {name!r} is unknown; use one of {', '.join(_ACTIVATIONS)}") from None


class PreTrainedModel(nn.Module, Generic[ConfigT]):
    """Base of the models: `from_pretrained`, `save_pretrained`, `device`, `dtype`."""

    config_class: ClassVar[type[Any]]
    main_input_name: ClassVar[str] = "pixel_values"
    #: tensors that are another one's twin: alias -> source. A file may omit them.
    tied_weights: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config: ConfigT = config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return next(self.parameters()).dtype

    def asked(self, attentions: bool | None, hidden_states: bool | None) -> tuple[bool | None, bool | None]:
        """Whether a call keeps attentions and hidden states: as it says, else as the configuration does.

        None where neither asks for it, so that a tower's own configuration may.
        """
        config = self.config
        return (
            (config.output_attentions or None) if attentions is None else attentions,
            (config.output_hidden_states or None) if hidden_states is None else hidden_states,
        )

    def returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """`output`, or its tuple, as the call or else the configuration says."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def initialise(self, std: float) -> None:
        """Random weights as BLIP's: normal with deviation `std`, biases 0, layer norms 1."""
        for module in self.modules():
            initialise_module(module, std)

    def tie_weights(self, twins: Mapping[str, str] | None = None) -> None:
        """Make every alias of `twins` (default: `tied_weights`) the same parameter as its source."""
        for alias, source in (self.tied_weights if twins is None else twins).items():
            owner, _, name = alias.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(source))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: ConfigT | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: DeviceMap = None,
        use_safetensors: bool | None = None,
        attn_implementation: str | None = None,
        **loading: Any,
    ) -> Self:
        """Load a checkpoint, whole or not at all, in evaluation mode.

        `config` stands in for the checkpoint's own. `dtype` (or `torch_dtype`, its older name) None or "auto" keeps the
        file's. `device_map` is a device, a dictionary that gives all parts the same one, or "auto" for the GPU if there
        is one. `use_safetensors` False reads `.bin` files only, True never. `loading`: cache_dir, token,
        local_files_only, force_download and subfolder, as in transformers. `attn_implementation` "eager" and "sdpa",
        low_cpu_mem_usage and trust_remote_code change nothing: attention has one implementation here, tensors are
        mapped anyway, and no repository's code is run.
        Raises CheckpointError; OptionError for a device that is not there and for an argument or value not named here.
        """
        if attn_implementation not in (None, "eager", "sdpa"):
            raise OptionError(f"attn_implementation must be 'sdpa' or 'eager', not {attn_implementation!r}")
        hub = HubOptions.of(loading, without_effect=("low_cpu_mem_usage", "trust_remote_code"))
        checkpoint = find_checkpoint(pretrained_model_name_or_path, revision, hub=hub, safetensors=use_safetensors)
        return cls.from_checkpoint(checkpoint, torch_dtype if dtype is None else dtype, device_map, config)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype | str | None = None,
        device_map: DeviceMap = None,
        config: ConfigT | None = None,
    ) -> Self:
        """As `from_pretrained`, for a checkpoint that was already found. Raises CheckpointError and OptionError."""
        device, kind = _device(device_map), _dtype(dtype)  # a wrong one is told before anything is read
        config = cls._config(checkpoint, config)
        tensors = {k: v for k, v in checkpoint.read().items() if not k.endswith(".position_ids")}
        tensors = cls.adapted(checkpoint.source, config, tensors)
        try:
            with torch.device("meta"), _Unfilled():
                model = cls(config)
        except (TypeError, ValueError, RuntimeError) as error:
            line = first_line(error)
            raise CheckpointError(f"{checkpoint.source}: {CONFIG_FILE} describes no model: {line}") from None
        if isinstance(device_map, Mapping):
            _check_parts(model, device_map)
        check_tensors(checkpoint.source, model.state_dict(), tensors, model.tied_weights)
        twins = {alias: source for alias, source in model.tied_weights.items() if _is_twin(tensors, alias, source)}
        model.load_state_dict(tensors | {alias: tensors[source] for alias, source in twins.items()}, assign=True)
        model.tie_weights(twins)
        return model.to(device=device, dtype=kind).eval()

    @classmethod
    def _config(cls, checkpoint: Checkpoint, given: ConfigT | None) -> ConfigT:
        """A copy of the caller's configuration, or else the checkpoint's."""
        if given is None:
            found: ConfigT = cls.config_class.from_json_file(checkpoint.directory / CONFIG_FILE)
            return found
        if not isinstance(given, cls.config_class):
            raise OptionError(f"config must be a {cls.config_class.__name__}, not {given!r:.60}")
        return deepcopy(given)

    @classmethod
    def adapted(cls, source: str, config: ConfigT, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG003
        """The tensors of another model's checkpoint as this one names them; here: none is taken for another's."""
        return dict(tensors)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, as transformers reads them; tied twins are left out."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {"architectures": [type(self).__name__], **self.config.to_dict(), "dtype": str(self.dtype)[6:]}
        written, weights = folder / CONFIG_FILE, folder / SAFETENSORS_FILE
        written.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        state = self.state_dict()
        for alias, source in self.tied_weights.items():
            if state[alias].data_ptr() == state[source].data_ptr():
                del state[alias]
        save_file({k: v.contiguous() for k, v in state.items()}, weights, metadata={"format": "pt"})
        weights.chmod(written.stat().st_mode)  # safetensors lets nobody else read it, whatever the umask says


class _Unfilled(TorchFunctionMode):
    """Draws no random weights: on the meta device they are of no use, and torch imports its compiler for them (1 s)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def initialise_module(module: nn.Module, std: float) -> None:
    """Random weights of one linear, convolution or embedding layer; others keep theirs."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def _is_twin(tensors: Mapping[str, Tensor], alias: str, source: str) -> bool:
    # Both present and different: the model was trained untied, and transformers keeps it so.
    return alias not in tensors or torch.equal(tensors[alias], tensors[source])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    return found


def _device(device_map: DeviceMap) -> torch.device:
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping):
        devices = {_device(device) for device in device_map.values()}
        if len(devices) != 1:
            raise OptionError(f"device_map must put the whole model on one device, not {_line(device_map)}")
        return devices.pop()
    if not isinstance(device_map, str | int | torch.device):
        raise OptionError(f"device_map must be a device, a dictionary or 'auto', not {device_map!r}")
    if device_map in _CHOICES:
        return choose_device("auto")
    return choose_device(f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map))


def _check_parts(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Raise OptionError unless the names of `device_map` are parts of the model, and all of it."""
    parts = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    unknown = [name for name in device_map if name not in parts]
    if unknown:
        raise OptionError(f"device_map names {unknown[0]!r}, which is no part of the model")
    for name, _ in model.named_parameters():
        if not any(part in ("", name) or name.startswith(f"{part}.") for part in device_map):
            raise OptionError(f"device_map has no device for {name}; {{'': device}} is for the whole model")


def _line(device_map: Mapping[str, Any]) -> str:
    return ", ".join(f"{name or 'all'}: {device}" for name, device in device_map.items()) or "on none"
