"""What the model must compute and move, from its configuration alone: 2 FLOP per multiply-add, matrix products only.

The one place of these formulas. They say what the work *needs*: one vision pass per image whatever the number of beams,
questions or texts, and one cross-attention projection, or none where few queries are better off looking at the states
themselves (`blip_engine.absorption`). Softmax, norms and activations are not counted.
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


def absorbed_look(config: Any) -> int:
    """FLOP of one query that looks at an image's states, all layers: scores, sums, and the way there and back."""
    text, width = config.text_config, config.vision_config.hidden_size
    attended = text.num_attention_heads * (patches(config) + 1) * width
    return int(text.num_hidden_layers * 4 * (attended + width * text.hidden_size))


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


def by_stage(config: Any, task: str, images: int, texts: int, tokens: int, beams: int, steps: int) -> dict[str, int]:
    """FLOP of every stage for `images` with `texts` of `tokens` each (captions: 0), decoded in `steps` with `beams`.

    As an engine does it: [BOS] is read once per row, the last token never. The matching and contrastive projections of
    one position per text are left out.
    """
    v, t = config.vision_config, config.text_config
    seen, rows = patches(config) + 1, images * max(1, texts)
    pair = t.num_hidden_layers * 4 * t.hidden_size  # of one query and one key
    vision_attention = v.num_hidden_layers * 4 * seen**2 * v.hidden_size
    own = 0  # pairs of text with text, or with a question
    work = {"vision": images * (vision(config) - vision_attention), "vision attention": images * vision_attention}
    if task != "caption":
        work["text encoder"] = rows * tokens * text_token(config, 0)
        own += rows * tokens * tokens
    if task == "itm":  # a second pass, without the image
        work["text encoder"] += rows * tokens * text_token(config, None)
        own += rows * tokens * tokens
    read = rows * (1 + beams * (steps - 1)) if steps else 0
    if steps:
        work["decoder"], work["head"] = read * text_token(config, 0), read * head(config)
        # Beams are queries on each other's tokens too, masked, and nothing is copied when they change places.
        own += rows * (1 + beams * sum(1 + beams * step for step in range(1, steps)))
    if task == "vqa":
        work["decoder"] += rows * cross_keys(config, tokens, t.hidden_size)
        own += read * tokens
    looks = read if task == "caption" else rows * tokens
    projected, absorbed = images * cross_keys(config) + looks * seen * pair, looks * absorbed_look(config)
    work["cross K/V"] = 0 if absorbed <= projected else images * cross_keys(config)
    work["text attention"] = pair * own + min(absorbed, projected) - work["cross K/V"]
    return {name: int(number) for name, number in work.items()}


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
