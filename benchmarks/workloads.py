"""What the engine's measurements ask of every image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blip_engine.requests import Task

from . import common

QUESTION_TOKENS = 10  # with [CLS] and [SEP]
CAPTION_TOKENS = 12  # of a text to match: what a caption of COCO has, with [CLS] and [SEP]


@dataclass(frozen=True)
class Workload:
    """What is asked of every image."""

    name: str
    task: Task
    texts: int  # of every image; 0: none
    unit: str
    options: dict[str, Any] = field(default_factory=dict)  # of the engine, and of transformers' generate
    embeds: bool = False

    @property
    def words(self) -> list[str]:
        """The texts, the same for every image."""
        return common.random_texts(self.texts, QUESTION_TOKENS if self.task == "vqa" else CAPTION_TOKENS)


def _forced(tokens: int, **options: Any) -> dict[str, Any]:
    return {"min_new_tokens": tokens, "max_new_tokens": tokens, **options}


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("caption-greedy", "caption", 0, "images/s", _forced(20, num_beams=1)),
        Workload("caption-beams3", "caption", 0, "images/s", _forced(20, num_beams=3)),
        Workload("caption-nucleus", "caption", 0, "images/s", _forced(20, num_beams=1, do_sample=True, top_p=0.9)),
        Workload("vqa-1", "vqa", 1, "questions/s", _forced(9, num_beams=3)),
        Workload("vqa-8", "vqa", 8, "questions/s", _forced(9, num_beams=3)),
        Workload("itm-1", "itm", 1, "pairs/s"),
        Workload("itm-8", "itm", 8, "pairs/s"),
        Workload("embed", "itm", 1, "pairs/s", embeds=True),
    )
}
Images = Sequence[np.ndarray[Any, Any]]
