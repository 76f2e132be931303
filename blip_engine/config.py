"""Configurations of BLIP's parts, with the defaults of `Salesforce/blip-vqa-base` as transformers has them.

Hub files carry only what differs from these defaults, so the defaults must stay equal to transformers'
(https://huggingface.co/docs/transformers/model_doc/blip). A value that describes no model raises ValueError,
a tower that is neither a configuration nor a dictionary TypeError.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from .errors import CheckpointError

CONFIG_FILE = "config.json"


@dataclass(kw_only=True)
class PreTrainedConfig:
    """What the three configurations share: what calls return unless they say it, dictionaries and files."""

    model_type: ClassVar[str]
    base_config_key: ClassVar[str | None] = None  # its name in a whole model's configuration

    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dictionary as `config.json` holds it; keys of other libraries are passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Every field and `model_type`, ready for `config.json`."""
        return {"model_type": self.model_type, **asdict(self)}

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Read `config.json`, a tower's own or a whole model's; CheckpointError when it is absent or no JSON object."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent} holds no {path.name}; is it a BLIP checkpoint?") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
        if cls.base_config_key is not None and isinstance(values.get(cls.base_config_key), dict):
            values = values[cls.base_config_key]
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no BLIP configuration: {error}") from None

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` into `directory`, which is made if absent."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


@dataclass
class BlipTextConfig(PreTrainedConfig):
    """The BERT of the text encoder and decoder. Real checkpoints say 12 heads; the default of 8 is transformers'."""

    model_type: ClassVar[str] = "blip_text_model"
    base_config_key: ClassVar[str | None] = "text_config"

    vocab_size: int = 30524  # bert-base-uncased's 30,522, [DEC] and [ENC]
    hidden_size: int = 768
    encoder_hidden_size: int = 768  # width of what cross-attention reads; set from the vision tower by BlipConfig
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int = 30522  # [DEC]
    eos_token_id: int = 2  # never produced: a caption ends with sep_token_id
    pad_token_id: int = 0
    sep_token_id: int = 102
    is_decoder: bool = True  # whether the layers have cross-attention
    use_cache: bool = True
    tie_word_embeddings: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_heads("text", self.hidden_size, self.num_attention_heads)


@dataclass
class BlipVisionConfig(PreTrainedConfig):
    """The vision transformer."""

    model_type: ClassVar[str] = "blip_vision_model"
    base_config_key: ClassVar[str | None] = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 384  # pixels, both sides
    patch_size: int = 16  # pixels, both sides
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 1e-10

    def __post_init__(self) -> None:
        self.image_size = _one_side("image_size", self.image_size)
        self.patch_size = _one_side("patch_size", self.patch_size)
        _check_heads("vision", self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


@dataclass
class BlipConfig(PreTrainedConfig):
    """A whole model: both towers and the projections. The towers may be given as objects or as dictionaries."""

    model_type: ClassVar[str] = "blip"

    text_config: BlipTextConfig = field(default_factory=BlipTextConfig)
    vision_config: BlipVisionConfig = field(default_factory=BlipVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    image_text_hidden_size: int = 256
    label_smoothing: float = 0.0
    tie_word_embeddings: bool = True
    initializer_factor: float = 1.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        self.text_config = _as_config(BlipTextConfig, self.text_config)
        self.vision_config = _as_config(BlipVisionConfig, self.vision_config)
        self.text_config.encoder_hidden_size = self.vision_config.hidden_size
        self.text_config.return_dict = self.vision_config.return_dict = True  # parts of a model return to it

    def to_dict(self) -> dict[str, Any]:
        """Every field, the towers nested with their own `model_type`."""
        return super().to_dict() | {
            "text_config": self.text_config.to_dict(),
            "vision_config": self.vision_config.to_dict(),
        }

    def answer_decoder_config(self) -> BlipTextConfig:
        """The VQA decoder reads the question encoder, so its cross-attention has the text's width.

        transformers forces the vision width on it too, which breaks VQA with ViT-L.
        """
        return replace(self.text_config, encoder_hidden_size=self.text_config.hidden_size)


C = TypeVar("C", bound=PreTrainedConfig)


def _as_config(kind: type[C], value: Any) -> C:
    if value is None:
        return kind()
    if isinstance(value, Mapping):
        return kind.from_dict(value)
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__} or a dictionary, not {type(value).__name__}")
    return replace(value)  # a copy: the caller's object keeps its encoder_hidden_size


def _one_side(name: str, value: Any) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"{name} must be square, not {value}")
    return int(sides.pop())


def _check_heads(tower: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{tower} hidden_size {width} is not a multiple of num_attention_heads {heads}")
