"""What crosses the engine's boundary: requests, their options and their results (standard library only).

The orchestrator checks a job's options with `options_for` before any GPU is started, so this module, and only
this one, may be imported by it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from .errors import OptionError

if TYPE_CHECKING:
    import numpy as np

Task: TypeAlias = Literal["caption", "vqa", "itm", "embed", "capfilt"]
#: The tasks that checkpoints are made for.
TASKS: Final[tuple[Task, ...]] = ("caption", "vqa", "itm")
#: The tasks of jobs: the same, and what is made of them. `embed` needs an itm checkpoint, `capfilt` a captioner and a
#: filter (caption and itm).
JOB_TASKS: Final[tuple[Task, ...]] = (*TASKS, "embed", "capfilt")
_CHECKPOINTS: Final[Mapping[Task, tuple[Task, ...]]] = {"embed": ("itm",), "capfilt": ("caption", "itm")}

#: The hub repository that serves a task when the user names none.
DEFAULT_MODELS: Final[Mapping[Task, str]] = {
    "caption": "Salesforce/blip-image-captioning-base",
    "vqa": "Salesforce/blip-vqa-base",
    "itm": "Salesforce/blip-itm-base-coco",
    "embed": "Salesforce/blip-itm-base-coco",
    "capfilt": "Salesforce/blip-image-captioning-base+Salesforce/blip-itm-base-coco",
}
#: `--model demo` means the small checkpoints that ship in the package.
DEMO_MODEL: Final = "demo"

#: Number types that a model may run in; `precision` tells when which.
Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16", "int8"]
_DEVICE: Final = re.compile(r"auto|cpu|cuda(:\d+)?", re.ASCII)


def check_words(device: str, precision: str) -> None:
    """Raises OptionError for a device or a precision of no machine; whether one is here only torch can tell."""
    if not _DEVICE.fullmatch(device):
        raise OptionError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:1")
    check_precision(precision)


def check_precision(precision: str) -> None:
    """Raises OptionError for what is no Precision."""
    if precision not in get_args(Precision):
        raise OptionError(f"precision {precision!r} is unknown; use one of {', '.join(get_args(Precision))}")


def _require(name: str, holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise OptionError(f"option {name!r} must be {rule}, not {value!r}")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How a caption or an answer is decoded. Lengths count new tokens: neither the prompt nor [BOS], but [SEP]."""

    num_beams: int = 3
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    do_sample: bool = False  # nucleus sampling instead of a search
    temperature: float = 1.0  # only with do_sample
    top_k: int = 0  # only with do_sample; 0: all tokens
    top_p: float = 1.0  # only with do_sample; 1: all tokens
    seed: int = 0  # only with do_sample; a row's draw depends on it and on the image and text, not on batch-mates
    repetition_penalty: float = 1.0  # Keskar et al. 2019, https://arxiv.org/abs/1909.05858
    length_penalty: float = 1.0  # exponent of the length that a finished beam's log-probability is divided by
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        _require("num_beams", 1 <= self.num_beams <= 32, "1 to 32", self.num_beams)
        _require("max_new_tokens", 1 <= self.max_new_tokens <= 256, "1 to 256", self.max_new_tokens)
        _require(
            "min_new_tokens",
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "0 to max_new_tokens",
            self.min_new_tokens,
        )
        _require("temperature", self.temperature > 0, "above 0", self.temperature)
        _require("top_k", self.top_k >= 0, "0 (off) or more", self.top_k)
        _require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1", self.top_p)
        _require("seed", 0 <= self.seed < 2**63, "0 to 2^63-1", self.seed)
        _require("repetition_penalty", self.repetition_penalty > 0, "above 0", self.repetition_penalty)
        if self.do_sample:
            _require("num_beams", self.num_beams == 1, "1 when do_sample is set", self.num_beams)
            _require("num_return_sequences", 1 <= self.num_return_sequences <= 32, "1 to 32", self.num_return_sequences)
        else:
            _require(
                "num_return_sequences",
                1 <= self.num_return_sequences <= self.num_beams,
                "1 to num_beams",
                self.num_return_sequences,
            )


@dataclass(frozen=True, slots=True)
class AnswerOptions(GenerationOptions):
    """How a question is read and answered; `rank_candidates` counts only where answers to choose from are given."""

    rank_candidates: int = 128  # answers, those with the likeliest first wordpieces, that are read to the end
    enc_token: bool = False  # the question starts with [ENC] as in Salesforce's code, not with [CLS] as on the hub
    clean_text: bool = False  # the question in lower case without .!"()*#:;~ and cut at 50 words, as Salesforce has it

    def __post_init__(self) -> None:
        GenerationOptions.__post_init__(self)  # super() does not know the class that `slots` made anew
        _require("rank_candidates", self.rank_candidates >= 1, "1 or more", self.rank_candidates)


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """How a text is read that becomes a vector."""

    clean_text: bool = False  # as AnswerOptions.clean_text, with a space for each of the characters


@dataclass(frozen=True, slots=True)
class MatchOptions(EmbedOptions):
    """How a text is read that is matched with an image."""

    enc_token: bool = False  # matching starts with [ENC] as in Salesforce's evaluation of retrieval; similarity never


Options: TypeAlias = GenerationOptions | EmbedOptions

#: BLIP's own settings: captions with 3 beams and 20 tokens, answers with 3 beams and 10 tokens with [BOS] counted.
_TASK_DEFAULTS: Final[Mapping[Task, Options]] = {
    "caption": GenerationOptions(),
    "vqa": AnswerOptions(max_new_tokens=9),
    "itm": MatchOptions(),
    "embed": EmbedOptions(),
    "capfilt": GenerationOptions(),  # of the captioner
}


def options_for(task: Task, given: Mapping[str, Any] | None = None) -> Options:
    """The task's options with its defaults filled in.

    Raises OptionError for a task or an option that does not exist, or for a value of the wrong type or range.
    """
    if task not in JOB_TASKS:
        raise OptionError(f"unknown task {task!r}; the tasks are: {', '.join(JOB_TASKS)}")
    default = _TASK_DEFAULTS[task]
    known = asdict(default)
    for name, value in (given or {}).items():
        if name not in known:
            raise OptionError(f"task {task!r} has no option {name!r}; it has: {', '.join(known) or 'none'}")
        known[name] = _coerced(name, value, type(known[name]))
    if isinstance(default, GenerationOptions) and known["do_sample"] and "num_beams" not in (given or {}):
        known["num_beams"] = 1
    return type(default)(**known)


def checkpoints_of(task: Task, model: str) -> tuple[tuple[Task, str], ...]:
    """The checkpoints that a job's `model` names, each with the task that it was made for.

    For `capfilt` these are two with a + between, the captioner and the filter; `demo` names both. Raises
    OptionError for another number of names.
    """
    kinds = _CHECKPOINTS.get(task, (task,))
    names = model.split("+") if len(kinds) > 1 else [model]
    if names == [DEMO_MODEL]:
        names *= len(kinds)
    if len(names) != len(kinds) or not all(names):
        raise OptionError(f"task {task!r} takes two models, CAPTIONER+FILTER, not {model!r}")
    return tuple(zip(kinds, names, strict=True))


def _coerced(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise OptionError(f"option {name!r} must be {_KIND_NAMES[kind]}, not {value!r}")
    return value


_KIND_NAMES: Final = {bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption of one image."""

    text: str  # the prompt, where one was given, included
    score: float  # sum of the new tokens' log-probabilities / their number^length_penalty
    token_ids: tuple[int, ...]  # the new tokens, [SEP] included where the model ended by itself
    alternatives: tuple["Caption", ...] = ()  # the other returned sequences, best first

    def as_record(self) -> dict[str, Any]:
        """The `result` of a record (CONTRACT: `caption, score, tokens`, and `captions` when several)."""
        record: dict[str, Any] = {"caption": self.text, "score": self.score, "tokens": len(self.token_ids)}
        if self.alternatives:
            record["captions"] = [
                {"caption": c.text, "score": c.score, "tokens": len(c.token_ids)} for c in (self, *self.alternatives)
            ]
        return record


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question about one image."""

    text: str
    score: float  # as Caption.score; of an answer that was chosen, as `ranking.Ranking.scores`
    ranking: tuple[tuple[str, float], ...] = ()  # several answers with scores, best first, where they were asked for

    def as_record(self) -> dict[str, Any]:
        """The `result` of a record (`answer, score`, and `ranking` when several)."""
        record: dict[str, Any] = {"answer": self.text, "score": self.score}
        if self.ranking:
            record["ranking"] = [{"answer": text, "score": score} for text, score in self.ranking]
        return record


@dataclass(frozen=True, slots=True)
class Match:
    """How well one text fits one image."""

    itm: float  # probability that they match, from the image-text matching head
    itc: float  # cosine of their projections, from the contrastive heads
    itm_logit: float  # the matching head's logit for "they match"; with `itc` added it ranks (see Engine.find_images)

    def as_record(self) -> dict[str, Any]:
        """The `result` of a record (`match, similarity`)."""
        return {"match": self.itm, "similarity": self.itc}


@dataclass(frozen=True, slots=True)
class Found:
    """One image of a text's ranking, or one text of an image's."""

    index: int  # its place among the images or texts that were searched
    score: float  # match.itm_logit + match.itc
    match: Match


@dataclass(frozen=True, slots=True)
class Filtered:
    """A caption made for an image and, where there was one, the text it came with, both judged (CapFilt)."""

    caption: Caption
    caption_match: float  # probability that the caption fits
    text_match: float | None  # the same of the text it came with
    kept: tuple[str, ...]  # the texts that fit: the given one, then the caption

    def as_record(self) -> dict[str, Any]:
        """The `result` of a record (`caption, caption_match, text_match, kept`)."""
        return {
            "caption": self.caption.text, "caption_match": self.caption_match,
            "text_match": self.text_match, "kept": list(self.kept),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Embedding:
    """An image, and the text that it came with, as vectors of length 1 whose product is `Match.itc`."""

    image: tuple[float, ...]  # 32-bit values, each in the nine digits that tell them apart
    text: tuple[float, ...] | None = None  # None: it came with none

    def as_record(self) -> dict[str, Any]:
        """The `result` of a record (`embedding`, and `text_embedding` where there is a text)."""
        record = {"embedding": list(self.image)}
        return record if self.text is None else {**record, "text_embedding": list(self.text)}


Result: TypeAlias = Caption | Answer | Match | Embedding | Filtered


@dataclass(frozen=True, slots=True)
class Request:
    """One image and every text asked about it. Its vision pass is computed once."""

    model: str  # a name the engine was loaded with
    task: Task
    pixels: "np.ndarray[Any, Any]"  # uint8 (height, width, 3); what is not at the model's size is resized on the device
    texts: tuple[str, ...]  # prompts, questions, or texts to match, embed or judge; one result each, in order
    options: Options  # a blank text is one only to itm and vqa
    candidates: tuple[str, ...] = ()  # vqa: the answers to choose from; none: the answer is generated
    judge: str = ""  # capfilt: the name of the matching model


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch that was run, in numbers; see `Engine.on_batch`."""

    task: Task
    requests: int  # images with their texts
    texts: int
    busy_seconds: float  # of the engine's thread
    stage_seconds: Mapping[str, float]  # of the device: `vision`, then `text`
    oom_splits: int  # times that batches were halved for want of memory, since the last report


def result_record(task: Task, results: Sequence[Result], several: bool) -> dict[str, Any]:
    """The `result` of a row: its only result's record, or the list of them under `answers` or `matches`.

    The texts of a capfilt row share their caption, so they have one record, with `text_matches` in their order.
    """
    if not several:
        return results[0].as_record()
    if task == "capfilt":
        return _several_filtered([result for result in results if isinstance(result, Filtered)])
    key = {"caption": "captions", "vqa": "answers", "itm": "matches"}[task]
    return {key: [result.as_record() for result in results]}


def _several_filtered(results: Sequence[Filtered]) -> dict[str, Any]:
    caption = results[0].caption.text
    kept = dict.fromkeys(text for result in results for text in result.kept if text != caption)
    fits = [caption] if any(caption in result.kept for result in results) else []
    record = results[0].as_record() | {"text_match": None, "kept": [*kept, *fits]}
    return record | {"text_matches": [result.text_match for result in results]}


def option_names(task: Task) -> tuple[str, ...]:
    """The names of the task's options, for help texts and documentation."""
    return tuple(field.name for field in fields(_TASK_DEFAULTS[task]))
