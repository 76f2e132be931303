"""`BlipModel`: both towers, projected into one space and compared, as CLIP does (https://arxiv.org/abs/2103.00020)."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import BlipConfig
from .outputs import BlipOutput, TextOutput, VisionOutput
from .pretrained import PreTrainedModel
from .text import BlipTextModel
from .vision import BlipVisionModel

#: What a captioning checkpoint has under another name, and what of it has no place here
_CAPTION_TEXT, _CAPTION_HEAD = "text_decoder.bert.", "text_decoder.cls."


class BlipModel(PreTrainedModel[BlipConfig]):
    """Images and texts as vectors of `projection_dim`, and how similar they are."""

    config_class = BlipConfig
    main_input_name = "input_ids"

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.text_model = BlipTextModel(config.text_config)
        self.vision_model = BlipVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        for projection in (self.visual_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.text_model.set_input_embeddings(value)

    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The text tower's TextOutput for texts (B, T), its `pooler_output` (B, projection_dim) projected.

        The vectors are not normalised. Returns a tuple with `return_dict=False`.
        """
        asked = self.asked(output_attentions, output_hidden_states)
        output = self._run_text(input_ids, attention_mask, position_ids, *asked)
        output.pooler_output = self.text_projection(output.pooler_output)
        return self.returned(output, return_dict)

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The vision tower's VisionOutput for images (B, 3, H, W), its `pooler_output` (B, projection_dim) projected.

        The vectors are not normalised. Returns a tuple with `return_dict=False`.
        """
        asked = self.asked(output_attentions, output_hidden_states)
        output: VisionOutput = self.vision_model(pixel_values, interpolate_pos_encoding, *asked)
        output.pooler_output = self.visual_projection(output.pooler_output)
        return self.returned(output, return_dict)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compare every text `input_ids` (texts, T) with every image `pixel_values` (images, 3, H, W).

        `logits_per_image` (images, texts) are cosines times exp(logit_scale). `return_loss` adds the contrastive loss,
        for which text i belongs to image i. Returns a BlipOutput, or a tuple with `return_dict=False`. Raises
        InputError for images of another size or too many tokens.
        """
        asked = self.asked(output_attentions, output_hidden_states)
        vision = self.vision_model(pixel_values, interpolate_pos_encoding, *asked)
        text = self._run_text(input_ids, attention_mask, position_ids, *asked)
        image_embeds = _unit(self.visual_projection(vision.pooler_output))
        text_embeds = _unit(self.text_projection(text.pooler_output))
        logits = text_embeds @ image_embeds.T * self.logit_scale.exp()
        output = BlipOutput(
            loss=_contrastive_loss(logits) if return_loss else None,
            logits_per_image=logits.T,
            logits_per_text=logits,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )
        return self.returned(output, return_dict)

    def _run_text(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        attentions: bool | None,
        hidden_states: bool | None,
    ) -> TextOutput:
        output: TextOutput = self.text_model(
            input_ids, attention_mask, position_ids, output_attentions=attentions, output_hidden_states=hidden_states
        )
        return output

    @classmethod
    def adapted(cls, source: str, config: BlipConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a captioning checkpoint both towers; what it has not is initialised, and named in a UserWarning."""
        if {name.partition(".")[0] for name in tensors} != {"vision_model", "text_decoder"}:
            return dict(tensors)
        found = {
            name.replace(_CAPTION_TEXT, "text_model."): tensor
            for name, tensor in tensors.items()
            if not name.startswith(_CAPTION_HEAD)
        }
        dtype = next(iter(found.values())).dtype
        fresh = {name: tensor.to(dtype) for name, tensor in _fresh_tensors(config).items()}
        warnings.warn(
            f"{source} is a captioning checkpoint: BlipModel takes its towers and drops its language model head. "
            f"Newly initialised, so train them before use: {', '.join(fresh)}",
            UserWarning,
            stacklevel=4,
        )
        return fresh | found


def _fresh_tensors(config: BlipConfig) -> dict[str, Tensor]:
    """The tensors of BlipModel that no other BLIP model has."""
    vision, text, deviation = config.vision_config, config.text_config, config.text_config.initializer_range
    scale = config.initializer_range
    return {
        "logit_scale": torch.tensor(config.logit_scale_init_value),
        "text_model.pooler.dense.bias": torch.zeros(text.hidden_size),
        "text_model.pooler.dense.weight": torch.randn(text.hidden_size, text.hidden_size) * deviation,
        "text_projection.weight": torch.randn(config.projection_dim, text.hidden_size) * scale,
        "visual_projection.weight": torch.randn(config.projection_dim, vision.hidden_size) * scale,
    }


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _contrastive_loss(logits: Tensor) -> Tensor:
    """The mean of both directions' cross-entropies of (N, N) logits whose diagonal are the true pairs."""
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
