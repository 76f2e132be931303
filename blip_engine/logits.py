"""Rules on the next token's logits: repetition, minimum length, and the warps of sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .requests import GenerationOptions

_PADDING = -1  # an id that no token has


class LogitRules:
    """The rules one batch decodes under, in the order transformers applies them."""

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: Tensor,
        prompt_mask: Tensor | None,
        least: Tensor,
        end: int,
        ngram: int = 0,
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        self._options, self._least, self._end = options, least, end
        self._prompt = prompt_ids
        if prompt_mask is not None:  # padding was not said: let it repeat the last token of the prompt instead
            self._prompt = torch.where(prompt_mask.bool(), prompt_ids, prompt_ids[:, -1:])
        self._any_least = options.min_new_tokens > 0
        self._ngram = ngram  # no run of this many tokens may come twice; 0: any may
        self._bad_words = [torch.tensor(word, device=prompt_ids.device) for word in bad_words if list(word) != [end]]
        self._said = prompt_ids if prompt_mask is None else prompt_ids.masked_fill(prompt_mask == 0, _PADDING)

    def narrow(self, rows: Tensor) -> None:
        """Rule these rows (n,) only from now on."""
        self._least, self._prompt, self._said = self._least[rows], self._prompt[rows], self._said[rows]

    def apply(self, scores: Tensor, generated: Tensor) -> Tensor:
        """(B, K, vocabulary) logits or log-probabilities, ruled by what (B, K, step) generated tokens say."""
        if self._options.repetition_penalty != 1.0:
            scores = self._penalise_repetition(scores, generated)
        if self._ngram:
            scores = self._ban_ngrams(scores, generated)
        if self._bad_words:
            scores = self._ban_words(scores, generated)
        if self._any_least:
            too_short = (generated.shape[2] < self._least)[:, None]
            scores = scores.clone()
            scores[:, :, self._end] = scores[:, :, self._end].masked_fill(too_short, -torch.inf)
        return scores

    def _penalise_repetition(self, scores: Tensor, generated: Tensor) -> Tensor:
        prompt = self._prompt[:, None].expand(-1, scores.shape[1], -1)
        said = torch.cat([prompt, generated], dim=2)
        penalty = self._options.repetition_penalty
        of_said = scores.gather(2, said)
        return scores.scatter(2, said, torch.where(of_said < 0, of_said * penalty, of_said / penalty))

    def _ban_ngrams(self, scores: Tensor, generated: Tensor) -> Tensor:
        said = torch.cat([self._said[:, None].expand(-1, scores.shape[1], -1), generated], dim=2)
        length, before = said.shape[2], self._ngram - 1
        if length < self._ngram:
            return scores
        runs = said.unfold(2, self._ngram, 1)  # (B, K, runs, ngram)
        same = (runs[..., :-1] == said[:, :, None, length - before :]).all(-1) & (runs != _PADDING).all(-1)
        banned = torch.zeros_like(scores).scatter_add_(2, runs[..., -1].clamp(min=0), same.to(scores.dtype))
        return scores.masked_fill(banned > 0, -torch.inf)

    def _ban_words(self, scores: Tensor, generated: Tensor) -> Tensor:
        """A word's last token is banned behind its others."""
        said = torch.cat([self._said[:, None].expand(-1, scores.shape[1], -1), generated], dim=2)
        scores = scores.clone()
        for word in self._bad_words:
            before = len(word) - 1
            if before <= said.shape[2]:
                begun = (said[:, :, said.shape[2] - before :] == word[:-1]).all(-1)
                scores[:, :, word[-1]] = scores[:, :, word[-1]].masked_fill(begun, -torch.inf)
        return scores

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Sample a token per row by inverting the cumulative distribution at (B, K) `uniforms` in [0, 1).

        Temperature, then the top_k most probable tokens, then the smallest set of probability top_p (nucleus sampling,
        Holtzman et al. 2019, https://arxiv.org/abs/1904.09751). Returns (B, K).
        """
        _, probabilities, tokens = self._ordered(logits)
        cumulative = probabilities.cumsum(-1)
        target = uniforms[..., None] * cumulative[..., -1:]
        index = torch.searchsorted(cumulative, target, right=True)
        last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not lead past the nucleus
        return tokens.gather(-1, index.minimum(last)).squeeze(-1)

    def warped(self, logits: Tensor, least_kept: int = 1) -> Tensor:
        """The logits (B, K, vocabulary) that `draw` draws from, -inf where a token cannot be drawn.

        `least_kept` tokens can, whatever the options say.
        """
        ordered, probabilities, tokens = self._ordered(logits, least_kept)
        return torch.empty_like(logits).scatter_(-1, tokens, ordered.masked_fill(probabilities == 0, -torch.inf))

    def _ordered(self, logits: Tensor, least_kept: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and probabilities (0 for what is cut off) of the tokens, the most probable first, and the tokens."""
        options = self._options
        ordered, tokens = (logits / options.temperature).sort(stable=True, dim=-1, descending=True)
        if 0 < options.top_k < ordered.shape[-1]:
            ordered[..., max(options.top_k, least_kept) :] = -torch.inf
        probabilities = ordered.softmax(-1)
        if options.top_p < 1.0:
            before = probabilities.cumsum(-1) - probabilities
            beyond = before >= options.top_p
            if least_kept > 1:  # the first is never beyond
                beyond[..., :least_kept] = False
            probabilities = probabilities.masked_fill(beyond, 0.0)
        return ordered, probabilities, tokens
