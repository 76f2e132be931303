"""An id outside the vocabulary is named, with the vocabulary, wherever it comes in."""

from typing import Any

import pytest
import torch
from small_models import WORDS
from twins import images, twins, words

from blip_engine import BlipModel, BlipTextModel
from blip_engine.errors import InputError
from blip_engine.requests import Task

LAST = len(WORDS) + 1
WRONG = [30523, LAST + 1, -1, -100]


def wrong_ids(wrong: int, rows: int = 3, place: tuple[int, int] = (1, 2)) -> torch.Tensor:
    ids = words(rows, 6)
    ids[place] = wrong
    return ids


def message(wrong: int, name: str = "input_ids") -> str:
    return f"^{name} hold {wrong}, but the model's vocabulary is 0 to {LAST}$"


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("task", ["caption", "vqa", "itm"])
def test_forward(task: Task, wrong: int) -> None:
    ours, _ = twins(task)
    more = {"decoder_input_ids": words(3, 4)} if task == "vqa" else {}
    with pytest.raises(InputError, match=message(wrong)):
        ours(input_ids=wrong_ids(wrong), pixel_values=images(ours), **more)


@pytest.mark.parametrize("wrong", WRONG)
def test_towers(wrong: int) -> None:
    config = twins("itm")[0].config
    with pytest.raises(InputError, match=message(wrong)):
        BlipTextModel(config.text_config)(wrong_ids(wrong))
    with pytest.raises(InputError, match=message(wrong)):
        BlipModel(config).get_text_features(wrong_ids(wrong))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("task", ["caption", "vqa"])
@pytest.mark.parametrize("listed", [True, False])
def test_generate(task: Task, wrong: int, listed: bool) -> None:
    ours, _ = twins(task)
    ids = wrong_ids(wrong)
    with pytest.raises(InputError, match=message(wrong)):
        ours.generate(input_ids=ids.tolist() if listed else ids, pixel_values=images(ours))


def test_the_first_and_last_id_of_a_prompt_do_not_count() -> None:
    """They are replaced and dropped."""
    ours, _ = twins("caption")
    ids = wrong_ids(30523, place=(1, 0))
    ids[0, -1] = 30523
    plain = wrong_ids(7, place=(1, 0))
    assert ours.generate(images(ours), ids).equal(ours.generate(images(ours), plain))


def test_padding_does_not_count_in_prompts() -> None:
    ours, _ = twins("caption")
    ids, mask = words(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:], ids[1, 4:] = 0, -1
    assert ours.generate(images(ours), ids, mask).shape[0] == 3


@pytest.mark.parametrize("name", ["input_ids", "answer_ids"])
def test_ranked_answers(name: str) -> None:
    ours, _ = twins("vqa")
    given = {"input_ids": words(3, 6), "answer_ids": words(4, 5), name: wrong_ids(99)}
    with pytest.raises(InputError, match=message(99, name)):
        ours.rank_answers(pixel_values=images(ours), **given)


@pytest.mark.parametrize("wrong", [30523, -1])
def test_labels(wrong: int) -> None:
    ours, _ = twins("caption")
    given: dict[str, Any] = {"input_ids": words(3, 6), "pixel_values": images(ours)}
    with pytest.raises(InputError, match=message(wrong, "labels")):
        ours(**given, labels=wrong_ids(wrong))
    assert ours(**given, labels=wrong_ids(-100)).loss.isfinite()


def test_it_costs_nothing_while_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's path, the towers themselves, looks at ids only after the embedding refused them."""
    monkeypatch.setattr("blip_engine.text_layers.check_ids", None)
    ours, _ = twins("itm")
    ours(input_ids=words(3, 6), pixel_values=images(ours))
