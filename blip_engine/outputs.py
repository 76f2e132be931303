"""What the models return: dataclasses that also unpack and index as tuples of the fields that are set.

Losses are one number each. Hidden states are (B, T, width), the embeddings' and every layer's, where an image has
T = 1 + patches. Attentions are probabilities per layer, (B, heads, T, T), with a cache (B, heads, T, cached + T);
cross-attentions (B, heads, T, S) look at S states of an image or a question.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .cache import DecoderCache


class ModelOutput:
    """Base of the outputs. `output[0]`, `output["loss"]`, `a, b = output` and `output.to_tuple()` all work."""

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are set, in order."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order; nested outputs as tuples too."""
        values = (getattr(self, name) for name in self.keys())
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class VisionOutput(ModelOutput):
    """Of `BlipVisionModel`."""

    last_hidden_state: Tensor  # (B, 1 + patches, width)
    pooler_output: Tensor  # (B, width): the class token, post_layernorm applied twice, as the checkpoints expect
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings and every layer
    attentions: tuple[Tensor, ...] | None = None  # per layer (B, heads, T, T)


@dataclass
class TextOutput(ModelOutput):
    """Of `BlipTextModel`."""

    last_hidden_state: Tensor  # (B, T, width)
    pooler_output: Tensor | None = None  # (B, width)
    past_key_values: "DecoderCache | None" = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LanguageModelOutput(ModelOutput):
    """Of `BlipTextLMHeadModel`."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T, vocabulary)
    past_key_values: "DecoderCache | None" = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """Of `generate` with `return_dict_in_generate`; `output_scores`, `output_logits` and so on fill in the rest.

    Hypotheses (hyp.) are num_beams, or num_return_sequences of samples. A row's values behind its end mean nothing.
    """

    sequences: Tensor  # (B * num_return_sequences, T) ids
    sequences_scores: Tensor | None = None  # of beams, with output_scores: (B * num_return_sequences,)
    #: per step (B * hyp., vocabulary) as the search saw them: logits, or log-probabilities with beams
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None  # per step (B * hyp., vocabulary) as the decoder gave them
    #: of beams: (B * num_return_sequences, new tokens), the row of `scores` a token was chosen from, -1 behind the end
    beam_indices: Tensor | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None  # per step and layer (B * hyp., heads, T, keys)
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None  # per step and layer (B * hyp., T, width)


@dataclass
class BlipForConditionalGenerationModelOutput(ModelOutput):
    """Of `BlipForConditionalGeneration`. Hidden states and attentions are the vision tower's."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T, vocabulary)
    image_embeds: Tensor | None = None  # (B, 1 + patches, vision width)
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BlipTextVisionModelOutput(ModelOutput):
    """Of `BlipForQuestionAnswering`. Hidden states and attentions are the vision tower's."""

    loss: Tensor | None = None
    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BlipImageTextMatchingModelOutput(ModelOutput):
    """Of `BlipForImageTextRetrieval`. Three fields stay None, as in transformers; losses are `ImageTextObjective`'s."""

    itm_score: Tensor | None = None  # (B, 2) logits with the ITM head, else (images, texts) cosines
    loss: Tensor | None = None  # stays None
    image_embeds: Tensor | None = None  # stays None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    vision_pooler_output: Tensor | None = None  # stays None
    attentions: tuple[Tensor, ...] | None = None
    question_embeds: Tensor | None = None  # (B, T, text width)


@dataclass
class BlipOutput(ModelOutput):
    """Of `BlipModel`."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None  # (images, texts)
    logits_per_text: Tensor | None = None  # (texts, images)
    text_embeds: Tensor | None = None  # (texts, projection), unit length
    image_embeds: Tensor | None = None  # (images, projection), unit length
    text_model_output: TextOutput | None = None
    vision_model_output: VisionOutput | None = None
