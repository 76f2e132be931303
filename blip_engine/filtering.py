"""CapFilt on the engine's queue: an image is captioned by one model, then its texts are judged by another.

Li et al. 2022, section 3.3, https://arxiv.org/abs/2201.12086.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, TypeAlias, cast

from .requests import Caption, Filtered, Match, MatchOptions, Request, Result

FITS: Final = 0.5  # a text is kept above this probability

_Results: TypeAlias = "Future[list[Result]]"


def submit_capfilt(submit: Callable[[Request], _Results], request: Request) -> _Results:
    """A Filtered for every text of a request; A blank one is none. What either model raises comes out of the future.

    `submit` queues the caption's request, and once that is there the judge's, so both run in the batches of all jobs.
    """
    done: _Results = Future()
    done.set_running_or_notify_cancel()
    given = [text for text in dict.fromkeys(request.texts) if text.strip()]

    def captioned(future: _Results) -> None:
        with _settling(done):
            caption = cast(Caption, future.result()[0])
            texts = tuple(dict.fromkeys([*given, caption.text]))
            asked = replace(request, model=request.judge, task="itm", texts=texts, options=MatchOptions(), judge="")
            submit(asked).add_done_callback(lambda future: judged(caption, texts, future))

    def judged(caption: Caption, texts: Sequence[str], future: _Results) -> None:
        with _settling(done):
            chances = {text: cast(Match, match).itm for text, match in zip(texts, future.result(), strict=True)}
            done.set_result([filtered(caption, text if text.strip() else None, chances) for text in request.texts])

    submit(replace(request, task="caption", texts=("",), judge="")).add_done_callback(captioned)
    return done


@contextmanager
def _settling(done: _Results) -> Iterator[None]:
    """What the block raises, a model's error too, goes to whoever waits: it would be lost in a callback."""
    try:
        yield
    except BaseException as error:
        done.set_exception(error)


def filtered(caption: Caption, text: str | None, chances: dict[str, float]) -> Filtered:
    """A caption and the text it came with, given the probability that each fits."""
    judged = [*([] if text is None else [text]), caption.text]
    kept = tuple(given for given in dict.fromkeys(judged) if chances[given] > FITS)
    return Filtered(caption, chances[caption.text], None if text is None else chances[text], kept)
