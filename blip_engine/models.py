"""BLIP's task models (Li et al. 2022, https://arxiv.org/abs/2201.12086), under the names transformers gives them.

Captioning decodes from the image; question answering encodes the question with the image and decodes from that;
retrieval matches a text with an image. Tensors have the names of the hub's checkpoints, both ways.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import BlipConfig
from .dropin import decode, token_rows
from .generation import Memory
from .outputs import (
    BlipForConditionalGenerationModelOutput,
    BlipImageTextMatchingModelOutput,
    BlipTextVisionModelOutput,
)
from .pretrained import PreTrainedModel
from .ranking import Ranking, rank
from .text import BlipTextLMHeadModel, BlipTextModel
from .text_layers import check_ids
from .vision import BlipVisionModel

_DECODER_TIES: Mapping[str, str] = {
    f"text_decoder.{alias}": f"text_decoder.{source}" for alias, source in BlipTextLMHeadModel.tied_weights.items()
}


class _BlipPreTrainedModel(PreTrainedModel[BlipConfig]):
    """A model with a vision tower."""

    config_class = BlipConfig

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.vision_model = BlipVisionModel(config.vision_config)


class BlipForConditionalGeneration(_BlipPreTrainedModel):
    """Image captioning: a vision encoder and a text decoder, with an optional prompt that the decoder continues."""

    tied_weights: ClassVar[Mapping[str, str]] = _DECODER_TIES

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.text_decoder = BlipTextLMHeadModel(config.text_config)
        if config.tie_word_embeddings:  # either configuration may ask for it
            self.tie_weights()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word embeddings."""
        return self.text_decoder.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits (B, T, vocabulary) of a caption, and its loss, one number, if `labels` are given.

        `pixel_values` (B, 3, H, W); `input_ids`, `attention_mask` and `labels` (B, T), -100 in `labels` is ignored.
        Without `input_ids` the decoder reads [BOS] alone. Returns a BlipForConditionalGenerationModelOutput, or a tuple
        with `return_dict=False`. Raises InputError for images of another size or too many tokens.
        """
        vision = self.vision_model(
            pixel_values, interpolate_pos_encoding, *self.asked(output_attentions, output_hidden_states)
        )
        if input_ids is None:
            bos = self.config.text_config.bos_token_id
            input_ids = torch.full((len(pixel_values), 1), bos, device=pixel_values.device)
        text = self.text_decoder(
            input_ids,
            attention_mask,
            encoder_hidden_states=vision.last_hidden_state,
            labels=labels,
            use_cache=False,
            logits_to_keep=logits_to_keep,
        )
        output = BlipForConditionalGenerationModelOutput(
            loss=text.loss,
            logits=text.logits,
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )
        return self.returned(output, return_dict)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs: Any,
    ) -> Any:
        """Captions as token ids (B * num_return_sequences, T), prompt included, padded on the right.

        `input_ids` (B, T) is a prompt as the processor gives it: [CLS] words [SEP]. Its first id becomes [BOS] and its
        last one is dropped, in a copy. Prompts of different lengths may be padded on either side; each row comes out as
        it would alone. The default is greedy decoding of 20 new tokens. `return_dict_in_generate` gives a
        GenerateOutput.

        `generate_kwargs` are transformers': num_beams, do_sample, temperature, top_k, top_p, repetition_penalty,
        length_penalty, num_return_sequences, max_length, min_length, max_new_tokens, min_new_tokens, early_stopping,
        no_repeat_ngram_size, bad_words_ids, return_dict_in_generate, output_scores, output_logits, output_attentions,
        output_hidden_states; and `generator`, a torch.Generator to sample with. `do_sample` with beams draws the beams.
        Raises OptionError for any other, InputError for images of another size or no room behind the prompt.
        """
        states = self.vision_model(pixel_values, interpolate_pos_encoding).last_hidden_state
        config = self.config.text_config
        rows = token_rows(input_ids, attention_mask) if input_ids is not None else [[0, 0]] * len(pixel_values)
        prompts = [[config.bos_token_id, *row[1:-1]] for row in rows]
        return decode(self.text_decoder, prompts, Memory(states), generate_kwargs)


class BlipForQuestionAnswering(_BlipPreTrainedModel):
    """Visual question answering: an encoder for the question that attends to the image, and an answer decoder."""

    main_input_name = "input_ids"
    tied_weights: ClassVar[Mapping[str, str]] = _DECODER_TIES

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(config.answer_decoder_config())
        if config.tie_word_embeddings:
            self.tie_weights()
        self.decoder_start_token_id = config.text_config.bos_token_id
        self.decoder_pad_token_id = config.text_config.pad_token_id

    def get_input_embeddings(self) -> nn.Module:
        """The question encoder's word embeddings."""
        return self.text_encoder.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The mean loss of answers `labels` (B, A) to questions `input_ids` (B, T) about `pixel_values` (B, 3, H, W).

        `decoder_input_ids` default to the labels, with -100 read as padding. Returns a BlipTextVisionModelOutput, or a
        tuple with `return_dict=False`. Raises ValueError where there is neither, InputError for images of another size
        or too many tokens.
        """
        if labels is None and decoder_input_ids is None:
            raise ValueError("pass labels to train, decoder_input_ids to run the decoder, or call generate()")
        vision = self.vision_model(
            pixel_values, interpolate_pos_encoding, *self.asked(output_attentions, output_hidden_states)
        )
        question = self.encode_question(input_ids, attention_mask, vision.last_hidden_state)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = labels.masked_fill(labels == -100, self.decoder_pad_token_id)
        answer = self.text_decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_hidden_states=question,
            encoder_attention_mask=attention_mask,
            labels=labels,
            use_cache=False,
        )
        output = BlipTextVisionModelOutput(
            loss=answer.loss,
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )
        return self.returned(output, return_dict)

    def encode_question(self, input_ids: Tensor, attention_mask: Tensor | None, image_states: Tensor) -> Tensor:
        """Questions (B, T) in the light of images (B, S, vision width): (B, T, text width)."""
        output = self.text_encoder(input_ids, attention_mask, encoder_hidden_states=image_states)
        return output.last_hidden_state

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs: Any,
    ) -> Any:
        """Answers as token ids (B * num_return_sequences, A), [BOS] first, padded on the right.

        Padding of a question is hidden from the decoder, so a row comes out as it would alone (transformers shows it
        the padding). `generate_kwargs` and errors are as of `BlipForConditionalGeneration.generate`.
        """
        if not isinstance(input_ids, Tensor):
            input_ids = torch.tensor(input_ids, device=pixel_values.device)
        check_ids(input_ids, self.config.text_config.vocab_size)
        states = self.vision_model(pixel_values, interpolate_pos_encoding).last_hidden_state
        question = self.encode_question(input_ids, attention_mask, states)
        prompts = [[self.decoder_start_token_id]] * len(question)
        return decode(self.text_decoder, prompts, Memory(question, attention_mask), generate_kwargs)

    @torch.no_grad()
    def rank_answers(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        answer_ids: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        k: int = 128,
        label_smoothing: float = 0.1,
    ) -> Ranking:
        """Which of the answers `answer_ids` (A, L) fit questions (B, T) about images (B, 3, H, W), best first.

        The answers are as the processor gives them, [CLS] words [SEP] padded on the right; a copy's first id becomes
        [BOS]. For `k`, `label_smoothing` and the scores see `ranking.rank`. Raises InputError.
        """
        check_ids(input_ids, self.config.text_config.vocab_size)
        check_ids(answer_ids, self.config.text_config.vocab_size, "answer_ids")
        states = self.vision_model(pixel_values, interpolate_pos_encoding).last_hidden_state
        question = self.encode_question(input_ids, attention_mask, states)
        candidates = answer_ids.clone()
        candidates[..., 0] = self.decoder_start_token_id
        return rank(self.text_decoder, Memory(question, attention_mask), candidates, k, label_smoothing)


class BlipForImageTextRetrieval(_BlipPreTrainedModel):
    """Image-text matching (a head on the fused encoder) and contrastive similarity (a cosine of projections)."""

    main_input_name = "input_ids"

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        for head in (self.vision_proj, self.text_proj, self.itm_head):
            nn.init.normal_(head.weight, std=config.initializer_range)
            nn.init.zeros_(head.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's word embeddings."""
        return self.text_encoder.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        use_itm_head: bool | None = True,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Match texts `input_ids` (B, T) with images `pixel_values` (B, 3, H, W).

        `itm_score` is (B, 2) logits (does not match, matches) with the ITM head, else (images, texts) cosines.
        Returns a BlipImageTextMatchingModelOutput, or a tuple with `return_dict=False`. Raises InputError for images of
        another size or too many tokens.
        """
        vision = self.vision_model(
            pixel_values, interpolate_pos_encoding, *self.asked(output_attentions, output_hidden_states)
        )
        image_states = vision.last_hidden_state
        if use_itm_head:
            text_states = self.fuse(input_ids, attention_mask, image_states)
            score = self.itm_head(text_states[:, 0])
        else:
            text_states = self.text_encoder(input_ids, attention_mask).last_hidden_state
            score = self.project_image(image_states) @ self.project_text(text_states).T
        output = BlipImageTextMatchingModelOutput(
            itm_score=score,
            last_hidden_state=image_states,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
            question_embeds=text_states,
        )
        return self.returned(output, return_dict)

    def fuse(self, input_ids: Tensor, attention_mask: Tensor | None, image_states: Tensor) -> Tensor:
        """Texts (B, T) in the light of images (B, S, vision width): (B, T, text width)."""
        output = self.text_encoder(input_ids, attention_mask, encoder_hidden_states=image_states)
        return output.last_hidden_state

    def project_image(self, image_states: Tensor) -> Tensor:
        """Unit vectors (B, image_text_hidden_size) of images (B, S, vision width)."""
        return F.normalize(self.vision_proj(image_states[:, 0]), dim=-1)

    def project_text(self, text_states: Tensor) -> Tensor:
        """Unit vectors (B, image_text_hidden_size) of texts (B, T, text width)."""
        return F.normalize(self.text_proj(text_states[:, 0]), dim=-1)
