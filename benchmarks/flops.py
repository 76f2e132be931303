"""What the model must compute and move, from its configuration alone: 2 FLOP per multiply-add, matrix products only.

The one place of these formulas. They say what the work *needs*: one vision pass and one cross-attention projection per
image whatever the number of beams, questions or texts. Softmax, norms and activations are not counted.
"""

from typing import Any


def patches(config: Any) -> int:
    """Patches of an image."""
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


def vision(config: Any) -> int:
    """FLOP of the vision tower, per image."""
    c = config.vision_config
    width, tokens = c.hidden_size, patches(config) + 1
    linears = 2 * tokens * (4 * width**2 + 2 * width * c.intermediate_size)
    attention = 4 * tokens**2 * width
    embedding = 2 * patches(config) * 3 * c.patch_size**2 * width
    return int(embedding + c.num_hidden_layers * (linears + attention))


def cross_keys(config: Any, tokens: int | None = None, source_width: int | None = None) -> int:
    """FLOP of projecting the cross-attention keys and values of all layers, per source.

    The source is an image, or, with `tokens` and `source_width`, a question's states.
    """
    text = config.text_config
    tokens = patches(config) + 1 if tokens is None else tokens
    source_width = config.vision_config.hidden_size if source_width is None else source_width
    return int(text.num_hidden_layers * 4 * tokens * source_width * text.hidden_size)


def text_token(config: Any, source: int | None, seen: int = 0) -> int:
    """FLOP of one token in the text transformer, without the head.

    `source`: positions that the cross-attention reads (None: there is none, 0: its attention is not counted); `seen`:
    positions that the self-attention reads.
    """
    text = config.text_config
    width = text.hidden_size
    linears = 2 * (4 * width**2 + 2 * width * text.intermediate_size)
    if source is not None:
        linears += 2 * 2 * width**2 + 4 * source * width
    return int(text.num_hidden_layers * (linears + 4 * seen * width))


def head(config: Any) -> int:
    """FLOP of one position's logits."""
    text = config.text_config
    return int(2 * (text.hidden_size**2 + text.hidden_size * text.vocab_size))


def decode_token(config: Any, source: int | None = None, seen: int = 0) -> int:
    """FLOP of one token of one hypothesis, head included. `source`: as of `text_token`; None: the image's tokens."""
    return text_token(config, patches(config) + 1 if source is None else source, seen) + head(config)


def caption(config: Any, beams: int, tokens: int) -> int:
    """FLOP of one caption of `tokens` new tokens. The convention of published figures: every beam reads every token."""
    return vision(config) + cross_keys(config) + beams * tokens * decode_token(config)


def read_text(config: Any, tokens: int, cross: bool) -> int:
    """FLOP of encoding a text of `tokens`, with the cross-attention to an image or without."""
    return tokens * text_token(config, patches(config) + 1 if cross else None, tokens)


def answer(config: Any, questions: int, question_tokens: int, beams: int, tokens: int) -> int:
    """FLOP of `questions` about one image, each answered with `tokens` new tokens."""
    width = config.text_config.hidden_size
    each = read_text(config, question_tokens, cross=True) + cross_keys(config, question_tokens, width)
    each += beams * tokens * decode_token(config, question_tokens)
    return vision(config) + cross_keys(config) + questions * each


def match(config: Any, texts: int, text_tokens: int) -> int:
    """FLOP of matching `texts` with one image: the matching head's pass and the contrastive one of every text."""
    each = read_text(config, text_tokens, cross=True) + read_text(config, text_tokens, cross=False)
    return vision(config) + cross_keys(config) + texts * each


def embed(config: Any, text_tokens: int) -> int:
    """FLOP of embedding one image and one text."""
    return vision(config) + read_text(config, text_tokens, cross=False)


def cross_bytes(config: Any, itemsize: int) -> int:
    """Bytes of an image's cross-attention keys and values, all layers."""
    text = config.text_config
    return int(text.num_hidden_layers * 2 * (patches(config) + 1) * text.hidden_size * itemsize)


def decoder_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the decoder's weights that every step reads (biases and norms left out)."""
    text = config.text_config
    width = text.hidden_size
    layer = 6 * width**2 + 2 * width * text.intermediate_size
    return int(itemsize * (text.num_hidden_layers * layer + width**2 + width * text.vocab_size))
