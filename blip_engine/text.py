"""BLIP's text transformer: BERT with cross-attention, as encoder or decoder, with BLIP's tensor names.

Source: `models/med.py` of https://github.com/salesforce/BLIP; BERT is Devlin et al. 2018,
https://arxiv.org/abs/1810.04805.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import causal_mask, padding_mask
from .cache import CrossKeys, DecoderCache
from .config import BlipTextConfig
from .outputs import LanguageModelOutput, TextOutput
from .pretrained import PreTrainedModel, activation, initialise_module
from .text_layers import BlipTextEmbeddings, BlipTextEncoder, BlipTextPooler, Source, check_ids

_IGNORED = -100  # the label of a position without a loss


class BlipTextModel(PreTrainedModel[BlipTextConfig]):
    """The text transformer, as an encoder (bidirectional) or as a decoder (causal, with a cache)."""

    config_class = BlipTextConfig
    main_input_name = "input_ids"

    def __init__(self, config: BlipTextConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BlipTextEmbeddings(config)
        self.encoder = BlipTextEncoder(config)
        self.pooler = BlipTextPooler(config) if add_pooling_layer else None
        self.initialise(config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value

    def new_cache(self, capacity: int, cross: CrossKeys | None = None) -> DecoderCache:
        """A cache that holds `capacity` tokens without growing; `cross` are keys and values projected before."""
        return DecoderCache(len(self.encoder.layer), capacity, cross)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        use_cache: bool | None = None,
        is_decoder: bool | None = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Run the layers over `input_ids` (B, T), `inputs_embeds` (before) or `encoder_embeds` (behind the embeddings).

        `attention_mask` (B, cached + T) and `encoder_attention_mask` (B, S) hold 1 for tokens and 0 for padding. Where
        `past_key_values` hold a row for every K rows of `input_ids` (B, 1), it is (B / K, K, cached + K).
        `encoder_hidden_states` (B, S, encoder width) turn the cross-attention on. As a decoder (`is_decoder`) tokens
        see only earlier ones, and `past_key_values` (made here with `use_cache`) carries keys and values between calls.
        Returns a TextOutput, or a tuple with `return_dict=False`. Raises InputError for too many tokens, ValueError for
        none, or for both `input_ids` and `inputs_embeds`.
        """
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("You cannot specify both input_ids and inputs_embeds at the same time")
        if input_ids is None and inputs_embeds is None and encoder_embeds is None:
            raise ValueError("You have to specify input_ids, inputs_embeds or encoder_embeds")
        keep_attentions, keep_hidden = self.asked(output_attentions, output_hidden_states)
        cache = past_key_values
        wants_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and wants_cache and is_decoder:
            cache = self.new_cache(capacity=0)
        past = cache.length if cache is not None else 0
        states = encoder_embeds
        if states is None:
            states = self.embeddings(input_ids, position_ids, inputs_embeds, past)
        source = Source(
            mask=_self_mask(bool(is_decoder), states, past, attention_mask),
            encoder_states=encoder_hidden_states,
            encoder_mask=None if encoder_attention_mask is None else padding_mask(encoder_attention_mask, states.dtype),
            cache=cache,
            weights=bool(keep_attentions),
        )
        output = self._run_layers(states, source, bool(keep_hidden))
        return self.returned(output, return_dict)

    def _run_layers(self, states: Tensor, source: Source, keep_hidden: bool) -> TextOutput:
        hidden, attentions, crosses = [states], [], []
        for layer in self.encoder.layer:
            states, attention, cross = layer(states, source)
            hidden.append(states)
            attentions.append(attention)
            crosses.append(cross)
        if source.cache is not None:
            source.cache.advance(len(states), states.shape[1])
        return TextOutput(
            last_hidden_state=states,
            pooler_output=None if self.pooler is None else self.pooler(states),
            past_key_values=source.cache,
            hidden_states=tuple(hidden) if keep_hidden else None,
            attentions=tuple(attentions) if source.weights else None,
            cross_attentions=tuple(crosses if source.crosses else ()) if source.weights else None,
        )


def _self_mask(causal: bool, states: Tensor, past: int, attention_mask: Tensor | None) -> Tensor | None:
    if causal:
        return causal_mask(states.shape[1], past, attention_mask, states)
    return None if attention_mask is None else padding_mask(attention_mask, states.dtype)


class BlipTextPredictionHeadTransform(nn.Module):
    """Dense, activation, layer norm."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(states)))


class BlipTextLMPredictionHead(nn.Module):
    """Logits over the vocabulary. `bias` is a second name of `decoder.bias` in the checkpoints."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.transform = BlipTextPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor) -> Tensor:
        return self.decoder(self.transform(states))


class BlipTextOnlyMLMHead(nn.Module):
    """Holds the prediction head under its name in the checkpoints."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.predictions = BlipTextLMPredictionHead(config)

    def forward(self, states: Tensor) -> Tensor:
        return self.predictions(states)


class BlipTextLMHeadModel(PreTrainedModel[BlipTextConfig]):
    """The text decoder with a language-modelling head."""

    config_class = BlipTextConfig
    main_input_name = "input_ids"
    tied_weights: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__(config)
        self.bert = BlipTextModel(config, add_pooling_layer=False)
        self.cls = BlipTextOnlyMLMHead(config)
        self.cls.apply(lambda module: initialise_module(module, config.initializer_range))
        if config.tie_word_embeddings:
            self.tie_weights()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.bert.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.cls.predictions.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        use_cache: bool | None = None,
        return_logits: bool | None = False,
        is_decoder: bool | None = True,
        reduction: str | None = "mean",
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Predict the next token at every position.

        `labels` (B, T): the same ids, shifted here; -100 is ignored. `logits_to_keep` n > 0 computes only the last n
        positions, a tensor those it names. `reduction="none"` gives one summed loss per row. `return_logits` returns
        only the logits without the last position (B, T - 1, vocabulary). The rest is as in `BlipTextModel`. On a CPU
        ids and labels outside the vocabulary raise InputError; on a GPU they end the process's use of it.
        """
        outputs = self.bert(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache if labels is None else False,
            is_decoder=is_decoder,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.cls(_kept(outputs.last_hidden_state, logits_to_keep))
        if return_logits:
            return logits[:, :-1]
        output = LanguageModelOutput(
            loss=None if labels is None else self.language_loss(logits, labels, reduction or "mean"),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        return self.returned(output, return_dict)

    def language_loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """Cross-entropy of each position's logits (B, T, vocabulary) with the next label of (B, T)."""
        predicted, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
        try:
            loss = F.cross_entropy(predicted, wanted, reduction=reduction, label_smoothing=self.config.label_smoothing)
        except IndexError:  # of a CPU
            check_ids(wanted[wanted != _IGNORED], predicted.shape[1], "labels")
            raise
        return loss.view(len(labels), -1).sum(1) if reduction == "none" else loss


def _kept(states: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        return states[:, keep]
    return states[:, -keep:] if keep else states
