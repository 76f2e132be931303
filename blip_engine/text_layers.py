"""The layers of BLIP's text transformer: BERT's, with cross-attention. The modules have their checkpoints' names."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .absorption import Absorbed
from .attention import attend, merge_heads, split_heads
from .cache import DecoderCache
from .config import BlipTextConfig
from .errors import InputError
from .pretrained import activation


def check_ids(ids: Tensor, words: int, name: str = "input_ids") -> None:
    """Raise InputError for the first of the ids (·) that none of `words` words has. Waits for the device."""
    outside = ids[(ids < 0) | (ids >= words)]
    if len(outside):
        raise InputError(f"{name} hold {int(outside[0])}, but the model's vocabulary is 0 to {words - 1}")


class BlipTextEmbeddings(nn.Module):
    """Words and learned positions, normalised. There are no token types."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None, past: int
    ) -> Tensor:
        """(B, T) ids, or their (B, T, width) embeddings, behind `past` cached tokens, to (B, T, width)."""
        words = self._words(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            total, limit = past + words.shape[1], self.position_embeddings.num_embeddings
            if total > limit:
                raise InputError(f"{total} tokens are more than the model's {limit} positions; shorten the text")
            position_ids = torch.arange(past, total, device=words.device)[None]
        return self.dropout(self.LayerNorm(words + self.position_embeddings(position_ids)))

    def _words(self, input_ids: Tensor | None) -> Tensor:
        try:
            return self.word_embeddings(input_ids)
        except IndexError:  # of a CPU. A GPU fails later and for good: generate() looks at the ids before
            if input_ids is not None:
                check_ids(input_ids, self.word_embeddings.num_embeddings)
            raise


@dataclass
class Source:
    """What a layer may look at besides its own states."""

    mask: Tensor | None  # additive, for the self-attention
    encoder_states: Tensor | None  # (B, S, encoder width), for the cross-attention
    encoder_mask: Tensor | None  # additive, for the cross-attention
    cache: DecoderCache | None
    weights: bool  # whether attention probabilities are asked for

    @property
    def crosses(self) -> bool:
        return self.encoder_states is not None or (self.cache is not None and self.cache.cross[0] is not None)


class BlipTextSelfAttention(nn.Module):
    """Query, key and value projections of a self- or cross-attention."""

    def __init__(self, config: BlipTextConfig, source_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)
        self.absorbed: Absorbed | None = None  # set by a resident model, for few queries on many states

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of (B, S, source width) states, (B, heads, S, hs) each."""
        return split_heads(self.key(states), self.heads), split_heads(self.value(states), self.heads)

    def forward(
        self, states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from (B, T, width) states to keys and values: context (B, T, width) and the probabilities.

        Keys of fewer rows than `states` are shared by `rows / key rows` neighbouring rows, the hypotheses of an image:
        they become further queries on them.
        """
        query = self._queries(states, len(key))
        dropout = self.dropout if self.training else 0.0
        context, probabilities = attend(query, key, value, mask, dropout, weights)
        return self._contexts(context, states), probabilities

    def look(self, states: Tensor, seen: Tensor) -> Tensor:
        """`forward` with the absorbed projections: (B, T, width) states look at (images, S, source width) ones."""
        if self.absorbed is None:
            raise ValueError("this layer's projections are not absorbed")
        return self._contexts(self.absorbed.attend(self._queries(states, len(seen)), seen), states)

    def _queries(self, states: Tensor, images: int) -> Tensor:
        """(images, heads, shared * T, hs) of (images * shared, T, width) states."""
        query = split_heads(self.query(states), self.heads)  # (B, heads, T, hs)
        if len(states) == images:
            return query
        return query.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)

    def _contexts(self, context: Tensor, states: Tensor) -> Tensor:
        """The way back: (images * shared, T, width), where `states` have that many rows and tokens."""
        if len(context) != len(states):
            context = context.unflatten(2, (-1, states.shape[1])).transpose(1, 2).flatten(0, 1)
        return merge_heads(context)


class BlipTextSelfOutput(nn.Module):
    """A projection, the residual and its layer norm; after attention and after the feed-forward block."""

    def __init__(self, config: BlipTextConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class BlipTextAttention(nn.Module):
    """Attention with its output projection."""

    def __init__(self, config: BlipTextConfig, source_width: int) -> None:
        super().__init__()
        self.self = BlipTextSelfAttention(config, source_width)
        self.output = BlipTextSelfOutput(config, config.hidden_size)

    def forward(
        self, states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        context, probabilities = self.self(states, key, value, mask, weights)
        return self.output(context, states), probabilities


class BlipTextIntermediate(nn.Module):
    """The widening half of the feed-forward block."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, states: Tensor) -> Tensor:
        return self.activation(self.dense(states))


class BlipTextLayer(nn.Module):
    """A post-norm transformer layer, with cross-attention if the configuration says `is_decoder`."""

    def __init__(self, config: BlipTextConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention = BlipTextAttention(config, config.hidden_size)
        if config.is_decoder:
            self.crossattention = BlipTextAttention(config, config.encoder_hidden_size)
        self.intermediate = BlipTextIntermediate(config)
        self.output = BlipTextSelfOutput(config, config.intermediate_size)

    def forward(self, states: Tensor, source: Source) -> tuple[Tensor, Tensor | None, Tensor | None]:
        key, value = self.attention.self.project(states)
        if source.cache is not None:
            key, value = source.cache.append(self.index, key, value)
        states, attention = self.attention(states, key, value, source.mask, source.weights)
        cross = None
        if source.crosses:
            states, cross = self._cross(states, source)
        return self.output(self.intermediate(states), states), attention, cross

    def _cross(self, states: Tensor, source: Source) -> tuple[Tensor, Tensor | None]:
        attention = self.crossattention
        held = source.cache is not None and source.cache.cross[self.index] is not None
        if attention.self.absorbed is not None and not held and source.encoder_states is not None:
            return attention.output(attention.self.look(states, source.encoder_states), states), None
        key, value = self._cross_keys(source)
        found: tuple[Tensor, Tensor | None] = attention(states, key, value, source.encoder_mask, source.weights)
        return found

    def _cross_keys(self, source: Source) -> tuple[Tensor, Tensor]:
        if source.cache is not None and (held := source.cache.cross[self.index]) is not None:
            return held
        if source.encoder_states is None:
            raise ValueError("a cache holds the cross-attention of all layers or of none")
        projected = self.crossattention.self.project(source.encoder_states)
        if source.cache is not None:
            source.cache.cross[self.index] = projected
        return projected


class BlipTextEncoder(nn.Module):
    """The stack of layers (a module of its own only for its name in the checkpoints)."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BlipTextLayer(config, i) for i in range(config.num_hidden_layers))


class BlipTextPooler(nn.Module):
    """BERT's pooler: a tanh projection of the first token."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.dense(states[:, 0]).tanh()
