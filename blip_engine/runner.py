"""The three tasks on a resident model: images and texts of one batch to results."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .cache import CrossKeys
from .errors import InputError
from .generation import Generated, Memory, Prompt, generate
from .models import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from .requests import Answer, Caption, GenerationOptions, Match, Options, Request, Result, Task
from .resident import ImageStates, ModelT, Pixels, ResidentModel, TextBatch


@dataclass(frozen=True)
class Prepared:
    """A request with its texts as tokens."""

    request: Request
    tokens: list[list[int]]


@dataclass(frozen=True)
class _Stage:
    """A batch of texts with what they are about."""

    batch: Sequence[Prepared]
    encoded: ImageStates
    texts: TextBatch
    cross: CrossKeys  # of the image of every text


class Runner(ABC, Generic[ModelT]):
    """Runs requests of one model, task and options together."""

    def __init__(self, resident: ResidentModel[ModelT]) -> None:
        self.resident: ResidentModel[ModelT] = resident
        self._text_config = resident.model.config.text_config

    def prepare(self, request: Request) -> Prepared:
        """Check a request and tokenise its texts. Raises InputError; cheap enough for the caller's thread."""
        height, width = self.resident.image_size
        if request.pixels.shape != (height, width, 3) or request.pixels.dtype.name != "uint8":
            raise InputError(
                f"model {request.model!r} takes uint8 pixels ({height}, {width}, 3), "
                f"not {request.pixels.dtype} {request.pixels.shape}"
            )
        if not request.texts:
            raise InputError("a request needs at least one text; a caption's may be empty")
        return Prepared(request, self._tokenise(request.texts, request.options))

    def _tokenise(self, texts: Sequence[str], options: Options) -> list[list[int]]:
        del options  # of no matter to texts that are only read
        return self._encode(texts, self._text_config.max_position_embeddings)

    def _encode(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        return self.resident.processor.tokenizer.encode_rows(texts, limit)

    @torch.inference_mode()
    def run(self, batch: Sequence[Prepared]) -> list[list[Result]]:
        """The results of every request, one per text, in order."""
        encoded = self.resident.encode_images([entry.request.pixels for entry in batch])
        owners = [image for image, entry in enumerate(batch) for _ in entry.tokens]
        rows = [tokens for entry in batch for tokens in entry.tokens]
        results: dict[int, Result] = {}
        for texts in self.resident.text_batches(rows, owners, left=self.pads_left):
            found = self._run_texts(_Stage(batch, encoded, texts, self.resident.cross_of(encoded, texts.images)))
            results.update(zip(texts.rows, found, strict=False))  # the blank texts' results are dropped
        flat = (results[index] for index in range(len(rows)))
        return [list(islice(flat, len(entry.tokens))) for entry in batch]

    pads_left = False

    @abstractmethod
    def _run_texts(self, stage: _Stage) -> Sequence[Result]:
        """Results of a batch of texts, the blank ones at the end included or not."""


GeneratingT = TypeVar("GeneratingT", BlipForConditionalGeneration, BlipForQuestionAnswering)


class _Generating(Runner[GeneratingT]):
    """What captions and answers share."""

    def _generate(self, prompt: Prompt, memory: Memory, stage: _Stage) -> Generated:
        options = stage.batch[0].request.options
        if not isinstance(options, GenerationOptions):
            raise InputError(f"generation takes GenerationOptions, not {type(options).__name__}")
        uniforms = _uniforms(options, stage).to(self.resident.device) if options.do_sample else None
        return generate(self.resident.model.text_decoder, prompt, memory, options, uniforms=uniforms)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.resident.processor.tokenizer.decode(tokens, skip_special_tokens=True)


class CaptionRunner(_Generating[BlipForConditionalGeneration]):
    """Captions. A text is the prompt, empty for none; the caption contains it."""

    pads_left = True

    def _tokenise(self, texts: Sequence[str], options: Options) -> list[list[int]]:
        new = options.max_new_tokens if isinstance(options, GenerationOptions) else 0
        # [SEP] goes, and the last new token is not read.
        rows = self._encode(texts, self._text_config.max_position_embeddings + 2 - new)
        return [[self._text_config.bos_token_id, *row[1:-1]] for row in rows]  # [BOS] for [CLS], no [SEP]

    def _run_texts(self, stage: _Stage) -> Sequence[Result]:
        texts = stage.texts
        prompt = Prompt(texts.ids, texts.mask if texts.ids.shape[1] > 1 else None)
        generated = self._generate(prompt, Memory(None, None, stage.cross), stage)
        return [
            self._caption(prompt_ids, hypotheses)
            for prompt_ids, hypotheses in zip(texts.tokens, _hypotheses(generated, len(texts.rows)), strict=True)
        ]

    def _caption(self, prompt: Sequence[int], hypotheses: list[tuple[tuple[int, ...], float]]) -> Caption:
        best, *others = [Caption(self._decode([*prompt, *ids]), score, ids) for ids, score in hypotheses]
        return Caption(best.text, best.score, best.token_ids, tuple(others))


class AnswerRunner(_Generating[BlipForQuestionAnswering]):
    """Answers to questions."""

    def _run_texts(self, stage: _Stage) -> Sequence[Result]:
        encoder, texts = self.resident.model.text_encoder, stage.texts
        question = encoder(texts.ids, texts.mask, past_key_values=encoder.new_cache(0, stage.cross)).last_hidden_state
        bos = torch.full((len(texts.ids), 1), self._text_config.bos_token_id, device=self.resident.device)
        generated = self._generate(Prompt(bos, None), Memory(question, texts.mask), stage)
        return [self._answer(hypotheses) for hypotheses in _hypotheses(generated, len(texts.rows))]

    def _answer(self, hypotheses: list[tuple[tuple[int, ...], float]]) -> Answer:
        ranking = tuple((self._decode(ids), score) for ids, score in hypotheses)
        return Answer(*ranking[0], ranking if len(ranking) > 1 else ())


class MatchRunner(Runner[BlipForImageTextRetrieval]):
    """Matching probability and contrastive similarity."""

    def _run_texts(self, stage: _Stage) -> Sequence[Result]:
        model, texts = self.resident.model, stage.texts
        cache = model.text_encoder.new_cache(0, stage.cross)
        fused = model.text_encoder(texts.ids, texts.mask, past_key_values=cache).last_hidden_state
        matches = model.itm_head(fused[:, 0]).float().softmax(-1)[:, 1]
        first = stage.encoded.states[:, :1].index_select(0, texts.images)  # before projecting: a fixed number of rows
        images = model.project_image(first).float()
        similarity = (images * self._project_texts(texts)).sum(-1)
        return [Match(*pair) for pair in zip(matches.tolist(), similarity.tolist(), strict=True)]

    def _project_texts(self, texts: TextBatch) -> Tensor:
        model = self.resident.model
        return model.project_text(model.text_encoder(texts.ids, texts.mask).last_hidden_state).float()

    @torch.inference_mode()
    def embed_images(self, pixels: Sequence[Pixels]) -> Tensor:
        """Unit vectors (N, projection) float32 of uint8 images at the model's size."""
        if not pixels:
            return torch.empty(0, self.resident.model.config.image_text_hidden_size)
        blocks = self.resident.image_states(pixels)
        return torch.cat([self.resident.model.project_image(block) for block in blocks]).float()[: len(pixels)].cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, projection) float32. Raises InputError for a text that is too long."""
        rows = self._encode(texts, self._text_config.max_position_embeddings)
        vectors = torch.empty(len(rows), self.resident.model.config.image_text_hidden_size)
        for batch in self.resident.text_batches(rows, [0] * len(rows), left=False):
            vectors[batch.rows] = self._project_texts(batch)[: len(batch.rows)].cpu()
        return vectors


def runner_for(task: Task, resident: ResidentModel[ModelT]) -> "CaptionRunner | AnswerRunner | MatchRunner":
    """The runner of a task, around its model."""
    kinds = {"caption": CaptionRunner, "vqa": AnswerRunner, "itm": MatchRunner}
    return kinds[task](resident)


def _hypotheses(generated: Generated, rows: int) -> list[list[tuple[tuple[int, ...], float]]]:
    """Tokens and score of every sequence of the first `rows` rows."""
    columns = (generated.tokens[:rows].tolist(), generated.lengths[:rows].tolist(), generated.scores[:rows].tolist())
    return [
        [(tuple(tokens[:length]), score) for tokens, length, score in zip(*row, strict=True)]
        for row in zip(*columns, strict=True)
    ]


def _uniforms(options: GenerationOptions, stage: _Stage) -> Tensor:
    """The draws of every text: of its seed, image and words alone, so that batch-mates change nothing."""
    asked = [(entry.request, text) for entry in stage.batch for text in entry.request.texts]
    uniforms = torch.zeros(len(stage.texts.ids), options.num_return_sequences, options.max_new_tokens)
    for place, index in enumerate(stage.texts.rows):
        request, text = asked[index]
        digest = hashlib.blake2b(request.pixels.tobytes(), digest_size=8)
        digest.update(text.encode())
        digest.update(options.seed.to_bytes(8, "little"))
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        uniforms[place] = torch.rand(uniforms.shape[1:], generator=generator)
    return uniforms
