"""The glue between transformers' calling conventions for `generate` and ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, OptionError
from .generation import Memory, Prompt, generate
from .outputs import GenerateOutput
from .requests import GenerationOptions
from .search import Extras, Generated, Limits, Record
from .text import BlipTextLMHeadModel
from .text_layers import check_ids

_DEFAULT_NEW_TOKENS = 20  # what transformers generates for BLIP when no length is given
_DEFAULT_TOP_K = 50  # its default when sampling
_OPTIONS = (
    *("num_beams", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "length_penalty"),
    *("num_return_sequences", "max_length", "min_length", "max_new_tokens", "min_new_tokens"),
)
_WHOLE = ("num_beams", "top_k", "num_return_sequences", "max_length", "min_length", "max_new_tokens", "min_new_tokens")
_RECORDED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_EXTRAS = (
    *("early_stopping", "no_repeat_ngram_size", "bad_words_ids", "return_dict_in_generate", *_RECORDED, "generator"),
    "use_cache",  # changes nothing: there always is one
)


def decode(
    decoder: BlipTextLMHeadModel, prompts: Sequence[Sequence[int]], memory: Memory, given: Mapping[str, Any]
) -> Any:
    """`generate(**given)` as transformers means it: prompts (B) go on to ids (B * num_return_sequences, T).

    Prompt included, padded on the right; with `return_dict_in_generate` a GenerateOutput.
    Raises OptionError for an argument that does not exist here, or has a value it cannot have.
    """
    config = decoder.config
    values = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in values if name not in _OPTIONS + _EXTRAS]
    if unknown:
        raise OptionError(f"generate() has no argument {unknown[0]!r}; it has: {', '.join(_OPTIONS + _EXTRAS)}")
    wanted = {name: values.pop(name) for name in _EXTRAS if name in values}
    for name, value in values.items():
        if not isinstance(value, int if name in _WHOLE else int | float):
            raise OptionError(f"option {name!r} must be a {'whole ' if name in _WHOLE else ''}number, not {value!r}")
    check_ids(torch.tensor([token for prompt in prompts for token in prompt]), config.vocab_size)
    prompt = Prompt.of(prompts, config.pad_token_id, decoder.device)
    sampled_beams = _sampled_beams(values)
    options, limits = _options_and_limits(values, prompt.lengths, config.max_position_embeddings)
    extras = _extras(wanted, sampled_beams, options.num_beams, config.vocab_size)
    uniforms = _uniforms(extras.generator, len(prompts), options, limits)
    generated = generate(decoder, prompt, memory, options, limits, uniforms, extras)
    sequences = _with_prompts(prompts, generated, config.pad_token_id)
    return _output(sequences, generated, extras.record) if wanted.get("return_dict_in_generate") else sequences


def _output(sequences: Tensor, generated: Generated, record: Record) -> GenerateOutput:
    beams = None
    if generated.beams is not None:
        beams = generated.beams.flatten(0, 1)[:, : int(generated.lengths.max())].int()
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=None if beams is None or record.scores is None else generated.scores.flatten(),
        scores=None if record.scores is None else tuple(step.flatten(0, 1) for step in record.scores),
        logits=None if record.logits is None else tuple(step.flatten(0, 1) for step in record.logits),
        beam_indices=beams,
        attentions=None if record.attentions is None else tuple(record.attentions),
        hidden_states=None if record.hidden_states is None else tuple(record.hidden_states),
    )


def _sampled_beams(values: dict[str, Any]) -> bool:
    """Whether beams are to be drawn. To the options they are beams, so `do_sample` goes and leaves its defaults."""
    if not values.get("do_sample") or values.get("num_beams", 1) == 1:
        return False
    del values["do_sample"]
    values.setdefault("top_k", _DEFAULT_TOP_K)
    return True


def _options_and_limits(
    values: dict[str, Any], prompt_lengths: Tensor, positions: int
) -> tuple[GenerationOptions, Limits]:
    """Options and limits with transformers' defaults and meanings.

    `max_length` and `min_length` count the prompt (B,) lengths, the `*_new_tokens` do not and win over them.
    `positions` is how many tokens the decoder can tell apart. Raises InputError when the lengths leave no room.
    """
    most = _limit(values, "max_new_tokens", "max_length", prompt_lengths, _DEFAULT_NEW_TOKENS)
    least = _limit(values, "min_new_tokens", "min_length", prompt_lengths, 0).clamp(min=0)
    if int(most.min()) < 1:
        raise InputError("max_length leaves no room behind the prompt; raise it, or set max_new_tokens")
    values.setdefault("num_beams", 1)
    if values.get("do_sample"):
        values.setdefault("top_k", _DEFAULT_TOP_K)
    longest = int((prompt_lengths + most).max()) - 1  # the last token is not read
    if longest > positions:
        raise InputError(f"prompt and new tokens need {longest} positions, the model has {positions}")
    steps = int(most.max())
    options = GenerationOptions(max_new_tokens=steps, min_new_tokens=min(int(least.max()), steps), **values)
    return options, Limits(most, least, steps)


def _extras(wanted: Mapping[str, Any], sampled_beams: bool, beams: int, words: int) -> Extras:
    stopping, ngram = wanted.get("early_stopping", False), wanted.get("no_repeat_ngram_size", 0)
    bad_words = _bad_words(wanted.get("bad_words_ids", ()), words)
    if stopping not in (True, False, "never"):
        raise OptionError(f"option 'early_stopping' must be True, False or 'never', not {stopping!r}")
    if type(ngram) is not int or ngram < 0:
        raise OptionError(f"option 'no_repeat_ngram_size' must be 0 (off) or more, not {ngram!r}")
    generator = wanted.get("generator")
    if not isinstance(generator, torch.Generator | None):
        raise OptionError(f"option 'generator' must be a torch.Generator, not {generator!r}")
    returned = wanted.get("return_dict_in_generate", False)  # without it there is no place for what is recorded
    lists: list[Any] = [[] if returned and wanted.get(name) else None for name in _RECORDED]
    scores, logits, attentions, hidden_states = lists
    record = Record(scores, logits, attentions, hidden_states, beams=bool(returned and beams > 1))
    return Extras(stopping, ngram, bad_words, sampled_beams, generator, record)


def _bad_words(given: Any, words: int) -> Sequence[Sequence[int]]:
    fits = isinstance(given, list | tuple) and all(
        isinstance(run, list | tuple) and run and all(type(token) is int and 0 <= token < words for token in run)
        for run in given
    )
    if not fits:
        raise OptionError(f"option 'bad_words_ids' must be lists of ids from 0 to {words - 1}, not {given!r:.60}")
    return tuple(given)


def _uniforms(
    generator: torch.Generator | None, rows: int, options: GenerationOptions, limits: Limits
) -> Tensor | None:
    if generator is None or not options.do_sample:
        return None
    shape = (rows, options.num_return_sequences, limits.steps)
    return torch.rand(shape, generator=generator, device=generator.device).to(limits.most.device)


def _limit(values: dict[str, Any], new: str, total: str, prompt_lengths: Tensor, default: int) -> Tensor:
    whole = values.pop(total, None)
    fresh = values.pop(new, None)
    if fresh is None and whole is not None:
        return int(whole) - prompt_lengths
    return torch.full_like(prompt_lengths, default if fresh is None else int(fresh))


def token_rows(input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None) -> list[list[int]]:
    """The ids of every row without its padding, as lists."""
    ids = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(row) for row in input_ids]
    if attention_mask is None:
        return ids
    return [
        [token for token, kept in zip(row, mask, strict=True) if kept]
        for row, mask in zip(ids, attention_mask.tolist(), strict=True)
    ]


def _with_prompts(prompts: Sequence[Sequence[int]], generated: Generated, pad: int) -> Tensor:
    """Prompt and new tokens of every sequence, (B * sequences, T), padded on the right."""
    rows = [
        [*prompt, *tokens[:length]]
        for prompt, sequences, lengths in zip(
            prompts, generated.tokens.tolist(), generated.lengths.tolist(), strict=True
        )
        for tokens, length in zip(sequences, lengths, strict=True)
    ]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=generated.tokens.device)
