"""The three tasks on a resident model: images and texts of one batch to results."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .cleaning import clean_caption, clean_question
from .errors import InputError
from .generation import Memory, Prompt
from .graphs import CudaCapture, GraphedDecoder
from .models import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from .narrowing import NarrowingDecoder
from .ranking import LABEL_SMOOTHING, answer_scores, first_token_chances, with_keys
from .requests import (
    Answer,
    AnswerOptions,
    Caption,
    Embedding,
    EmbedOptions,
    GenerationOptions,
    Match,
    MatchOptions,
    Options,
    Request,
    Result,
    Task,
)
from .resident import ImageStates, ModelT, Pixels, ResidentModel, Shapes, TextBatch, batched
from .search import Generated


@dataclass(frozen=True)
class Prepared:
    """A request with its texts as tokens."""

    request: Request
    tokens: list[list[int]]
    candidates: list[list[int]]  # [BOS] words [SEP] of the answers to choose from


@dataclass(frozen=True)
class Begun:
    """A batch whose images are encoded, or on their way through the device."""

    batch: Sequence[Prepared]
    encoded: ImageStates


@dataclass(frozen=True)
class _Stage:
    """A batch of texts with what they are about."""

    batch: Sequence[Prepared]
    encoded: ImageStates
    texts: TextBatch
    image: Memory  # that of every group

    @property
    def options(self) -> Options:
        return self.batch[0].request.options  # the same for all


class Runner(ABC, Generic[ModelT]):
    """Runs requests of one model, task and options together."""

    def __init__(self, resident: ResidentModel[ModelT]) -> None:
        self.resident: ResidentModel[ModelT] = resident
        self._text_config = resident.model.config.text_config
        # Salesforce adds [DEC], which is [BOS] here, then [ENC].
        self._enc_token_id = self._text_config.bos_token_id + 1

    def prepare(self, request: Request) -> Prepared:
        """Check a request and tokenise its texts. Raises InputError; cheap enough for the caller's thread."""
        shape, kind = request.pixels.shape, request.pixels.dtype
        if len(shape) != 3 or shape[2] != 3 or 0 in shape or kind.name != "uint8":
            raise InputError(f"model {request.model!r} takes uint8 pixels (height, width, 3), not {kind} {shape}")
        if not request.texts:
            raise InputError("a request needs at least one text; a caption's may be empty")
        if getattr(request.options, "enc_token", False) and self._enc_token_id >= self._text_config.vocab_size:
            raise InputError(f"model {request.model!r} has no [ENC] token; leave option 'enc_token' off")
        tokens = self._tokenise(request.texts, request.options)
        return Prepared(request, tokens, self._tokenise_candidates(request.candidates))

    def _tokenise(self, texts: Sequence[str], options: Options) -> list[list[int]]:
        if isinstance(options, AnswerOptions | EmbedOptions) and options.clean_text:
            texts = [self._clean(text) for text in texts]
        return self._encode(texts, self._text_config.max_position_embeddings)

    def _tokenise_candidates(self, candidates: Sequence[str]) -> list[list[int]]:
        if candidates:
            raise InputError("answers to choose from go with questions only")
        return []

    _clean = staticmethod(clean_question)

    def _opened(self, texts: TextBatch, options: Options) -> Tensor:
        """The ids of the texts, starting with [ENC] where the options ask for it."""
        if not (isinstance(options, AnswerOptions | MatchOptions) and options.enc_token):
            return texts.ids
        ids = texts.ids.clone()
        ids[:, 0] = self._enc_token_id
        return ids

    def _encode(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        return self.resident.processor.tokenizer.encode_rows(texts, limit)

    def run(self, batch: Sequence[Prepared]) -> list[list[Result]]:
        """The results of every request, one per text, in order."""
        return self.finish(self.begin(batch))

    def begin(self, batch: Sequence[Prepared]) -> Begun:
        """The first half of `run`: the images. On a GPU it does not wait for the device."""
        return Begun(batch, self.resident.encode_images([entry.request.pixels for entry in batch]))

    @torch.inference_mode()
    def finish(self, begun: Begun) -> list[list[Result]]:
        """The second half: what is asked about them. Returns when the results are on the host."""
        batch, encoded = begun.batch, begun.encoded
        owners = [image for image, entry in enumerate(batch) for _ in entry.tokens]
        rows = [tokens for entry in batch for tokens in entry.tokens]
        results: dict[int, Result] = {}
        for texts in self.resident.text_batches(rows, owners, left=self.pads_left):
            queries = self._queries(texts, batch[0].request.options)
            stage = _Stage(batch, encoded, texts, self.resident.memory_of_groups(encoded, texts, queries))
            results.update(zip(texts.texts, self._run_texts(stage), strict=True))
        flat = (results[index] for index in range(len(rows)))
        return [list(islice(flat, len(entry.tokens))) for entry in batch]

    def resize(self, shapes: Shapes) -> None:
        """Run batches of other sizes from now on, and give up memory that those of before hold."""
        self.forget()
        self.resident.resize(shapes)

    def forget(self) -> None:
        """Give up memory that is held for batches to come."""

    pads_left = False

    def _queries(self, texts: TextBatch, options: Options) -> int:
        """How often the texts of a group look at their image in a layer, at most."""
        looks = texts.ids.shape[1]
        if self.pads_left and isinstance(options, GenerationOptions):  # a decoder's prompt; the last token is not read
            looks += max(options.num_beams, options.num_return_sequences) * (options.max_new_tokens - 1)
        return texts.size * looks

    def _read(self, ids: Tensor, mask: Tensor, image: Memory) -> Tensor:
        """States (B, T, width) of texts that the text encoder reads, looking at their image."""
        encoder = self.resident.attending_text()
        cache = None if image.keys is None else encoder.new_cache(0, image.keys)
        found: Tensor = encoder(ids, mask, encoder_hidden_states=image.states, past_key_values=cache).last_hidden_state
        return found

    @abstractmethod
    def _run_texts(self, stage: _Stage) -> Sequence[Result]:
        """Results of a batch of texts, without the blank ones, in order."""


GeneratingT = TypeVar("GeneratingT", BlipForConditionalGeneration, BlipForQuestionAnswering)


class _Generating(Runner[GeneratingT]):
    """What captions and answers share."""

    def __init__(self, resident: ResidentModel[GeneratingT]) -> None:
        super().__init__(resident)  # type: ignore[arg-type]  # mypy mixes up the two classes of the variable
        decoder = resident.model.text_decoder
        self._decoder: GraphedDecoder | NarrowingDecoder = NarrowingDecoder(decoder)
        if resident.device.type == "cuda":
            self._decoder = GraphedDecoder(decoder, CudaCapture(resident.device))

    def forget(self) -> None:
        self._decoder.forget()

    def _generate(self, prompt: Prompt, memory: Memory, stage: _Stage) -> Generated:
        options = stage.options
        if not isinstance(options, GenerationOptions):
            raise InputError(f"generation takes GenerationOptions, not {type(options).__name__}")
        uniforms = _uniforms(options, stage).to(self.resident.device) if options.do_sample else None
        return self._decoder.generate(prompt, memory, options, uniforms, stage.texts.rows)

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
        generated = self._generate(prompt, stage.image, stage)
        return [
            self._caption(prompt_ids, hypotheses)
            for prompt_ids, hypotheses in zip(texts.tokens, texts.listed(_hypotheses(generated)), strict=True)
        ]

    def _caption(self, prompt: Sequence[int], hypotheses: list[tuple[tuple[int, ...], float]]) -> Caption:
        best, *others = [Caption(self._decode([*prompt, *ids]), score, ids) for ids, score in hypotheses]
        return Caption(best.text, best.score, best.token_ids, tuple(others))


class AnswerRunner(_Generating[BlipForQuestionAnswering]):
    """Answers to questions: generated, or chosen from a request's candidates."""

    def __init__(self, resident: ResidentModel[BlipForQuestionAnswering]) -> None:
        super().__init__(resident)
        self._candidate_rows = lru_cache(maxsize=16)(self._encode_candidates)  # often one list for a whole job

    def _tokenise_candidates(self, candidates: Sequence[str]) -> list[list[int]]:
        return self._candidate_rows(tuple(candidates))

    def _encode_candidates(self, candidates: tuple[str, ...]) -> list[list[int]]:
        rows = self._encode(candidates, self._text_config.max_position_embeddings)
        return [[self._text_config.bos_token_id, *row[1:]] for row in rows]

    def _run_texts(self, stage: _Stage) -> Sequence[Result]:
        texts = stage.texts
        memory = Memory(self._read(self._opened(texts, stage.options), texts.mask, stage.image), texts.mask)
        if stage.batch[0].candidates:
            return self._choose(memory, stage)
        bos = torch.full((len(texts.ids), 1), self._text_config.bos_token_id, device=self.resident.device)
        generated = self._generate(Prompt(bos, None), memory, stage)
        return [self._answer(hypotheses) for hypotheses in texts.listed(_hypotheses(generated))]

    def _answer(self, hypotheses: list[tuple[tuple[int, ...], float]]) -> Answer:
        ranking = tuple((self._decode(ids), score) for ids, score in hypotheses)
        return Answer(*ranking[0], ranking if len(ranking) > 1 else ())

    def _choose(self, memory: Memory, stage: _Stage) -> list[Result]:
        """Rank every question's candidates as `ranking.rank` does, but in batches of the fixed shapes."""
        owners = [entry for entry in stage.batch for _ in entry.tokens]
        asked = [owners[text] for text in stage.texts.texts]
        memory = with_keys(self.resident.model.text_decoder, memory)
        likely = self._likely(memory, stage.texts.rows, asked, stage.options)
        scores = self._scores(
            memory,
            [
                (row, entry.candidates[n])
                for row, entry, chosen in zip(stage.texts.rows, asked, likely, strict=True)
                for n in chosen
            ],
        )
        results: list[Result] = []
        for entry, chosen in zip(asked, likely, strict=True):
            found = ((entry.request.candidates[n], next(scores)) for n in chosen)
            ranking = tuple(sorted(found, key=lambda pair: -pair[1]))
            results.append(Answer(*ranking[0], ranking))
        return results

    def _likely(
        self, memory: Memory, rows: Sequence[int], asked: Sequence[Prepared], options: Options
    ) -> list[list[int]]:
        """Of every question the candidates worth reading: those whose first wordpieces are the likeliest."""
        most = options.rank_candidates if isinstance(options, AnswerOptions) else 1
        chances = first_token_chances(self.resident.model.text_decoder, memory, self._text_config.bos_token_id)
        found = []
        for row, entry in zip(rows, asked, strict=True):
            first = torch.tensor([ids[1] for ids in entry.candidates], device=chances.device)
            found.append(chances[row, first].argsort(descending=True, stable=True)[:most].tolist())
        return found

    def _scores(self, memory: Memory, pairs: Sequence[tuple[int, list[int]]]) -> Iterator[float]:
        """Of every (question, answer), in order."""
        scores = [0.0] * len(pairs)
        rows, questions = [ids for _, ids in pairs], [question for question, _ in pairs]
        for batch in self.resident.text_batches(rows, questions, left=False):
            keys = self.resident.keys_of_groups(memory.keys or [], batch)
            mask = None if memory.mask is None else self.resident.of_groups(memory.mask, batch)
            found = answer_scores(
                self.resident.model.text_decoder, Memory(None, mask, keys), batch.ids, LABEL_SMOOTHING
            )
            for pair, score in zip(batch.texts, batch.listed(found.tolist()), strict=True):
                scores[pair] = score
        return iter(scores)


class MatchRunner(Runner[BlipForImageTextRetrieval]):
    """Matching probability and contrastive similarity."""

    _clean = staticmethod(clean_caption)

    def _run_texts(self, stage: _Stage) -> Sequence[Result]:
        model, texts = self.resident.model, stage.texts
        fused = self._read(self._opened(texts, stage.options), texts.mask, stage.image)
        logits = model.itm_head(fused[:, 0]).float()
        first = self.resident.of_groups(stage.encoded.states[:, :1], texts)
        images = model.project_image(first).float().repeat_interleave(texts.size, 0)
        similarity = (images * self._project_texts(texts)).sum(-1)
        columns = logits.softmax(-1)[:, 1], similarity, logits[:, 1]
        return [Match(*row) for row in texts.listed(torch.stack(columns, 1).tolist())]

    def _project_texts(self, texts: TextBatch) -> Tensor:
        model = self.resident.model
        return model.project_text(model.text_encoder(texts.ids, texts.mask).last_hidden_state).float()

    @torch.inference_mode()
    def embed_images(self, pixels: Sequence[Pixels]) -> Tensor:
        """Unit vectors (N, projection) float32 of uint8 images at the model's size."""
        if not pixels:
            return torch.empty(0, self.resident.model.config.image_text_hidden_size)
        parts = batched(pixels, self.resident.shapes.images)  # states of one are dropped before the next one's are made
        return torch.cat([self._projected(self.resident.image_states(part)) for part in parts])[: len(pixels)]

    def _projected(self, blocks: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.resident.model.project_image(block) for block in blocks]).float().cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], options: EmbedOptions) -> Tensor:
        """Unit vectors (N, projection) float32. Raises InputError for a text that is too long."""
        return self._embed_rows(self._tokenise(texts, options))

    def _embed_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        vectors = torch.empty(len(rows), self.resident.model.config.image_text_hidden_size)
        for batch in self.resident.text_batches(rows, range(len(rows)), left=False):  # each on its own
            vectors[batch.texts] = self._project_texts(batch)[batch.rows].cpu()
        return vectors


class EmbedRunner(MatchRunner):
    """Vectors of images, and of the texts that are asked with them (blank for none)."""

    @torch.inference_mode()
    def finish(self, begun: Begun) -> list[list[Result]]:
        batch = begun.batch
        images = self._projected(begun.encoded.blocks)[: len(batch)].tolist()
        asked = [(text, row) for entry in batch for text, row in zip(entry.request.texts, entry.tokens, strict=True)]
        texts = iter(self._embed_rows([row for text, row in asked if text.strip()]).tolist())
        return [
            [Embedding(image, _nine_digits(next(texts)) if text.strip() else None) for text in entry.request.texts]
            for entry, image in zip(batch, map(_nine_digits, images), strict=True)
        ]


def _nine_digits(vector: list[float]) -> tuple[float, ...]:
    """32-bit floats without the digits that double precision would add."""
    return tuple(float(f"{value:.8e}") for value in vector)


def runner_for(task: Task, resident: ResidentModel[ModelT]) -> "CaptionRunner | AnswerRunner | MatchRunner":
    """The runner of a task, around its model."""
    kinds = {"caption": CaptionRunner, "vqa": AnswerRunner, "itm": MatchRunner}
    return kinds[task](resident)


def _hypotheses(generated: Generated) -> list[list[tuple[tuple[int, ...], float]]]:
    """Tokens and score of every sequence of every row."""
    columns = generated.tokens.tolist(), generated.lengths.tolist(), generated.scores.tolist()
    return [
        [(tuple(tokens[:length]), score) for tokens, length, score in zip(*row, strict=True)]
        for row in zip(*columns, strict=True)
    ]


def _uniforms(options: GenerationOptions, stage: _Stage) -> Tensor:
    """The draws of every text: of its seed, image and words alone, so that batch-mates change nothing."""
    asked = [(entry.request, text) for entry in stage.batch for text in entry.request.texts]
    images: dict[int, Any] = {}  # digests by the request's identity: an image is read once for all its texts
    uniforms = torch.zeros(len(stage.texts.ids), options.num_return_sequences, options.max_new_tokens)
    for row, index in zip(stage.texts.rows, stage.texts.texts, strict=True):
        request, text = asked[index]
        if id(request) not in images:
            images[id(request)] = hashlib.blake2b(request.pixels.tobytes(), digest_size=8)
        digest = images[id(request)].copy()
        digest.update(text.encode())
        digest.update(options.seed.to_bytes(8, "little"))
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        uniforms[row] = torch.rand(uniforms.shape[1:], generator=generator)
    return uniforms
