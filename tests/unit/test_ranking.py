"""Ranked answers, against the rule of salesforce/BLIP applied word by word with transformers' modules."""

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import BOS, SEP, images, twins, words

from blip_engine.errors import InputError

PAD = 0
#: [CLS] words [SEP] of different lengths; three share their first word, two are equal.
ANSWERS = [[9], [9, 12], [9, 12, 30], [15], [20, 21], [33, 6, 7, 8], [15], [27]]


def rows(answers: list[list[int]]) -> Tensor:
    width = max(map(len, answers)) + 2
    return torch.tensor([[2, *answer, SEP] + [PAD] * (width - len(answer) - 2) for answer in answers])


def by_the_rule(model: Any, question: Tensor, pixels: Tensor, k: int, smoothing: float) -> list[tuple[int, float]]:
    """Of one question without padding: (candidate, score), best first."""
    states = model.vision_model(pixels[None]).last_hidden_state
    states = model.text_encoder(question[None], encoder_hidden_states=states)[0]

    def log_probabilities(ids: list[int]) -> Tensor:
        output: Any = model.text_decoder(torch.tensor([ids]), encoder_hidden_states=states)
        return output.logits[0].log_softmax(-1)  # type: ignore[no-any-return]

    first = log_probabilities([BOS])[0].exp()
    likely = sorted(range(len(ANSWERS)), key=lambda n: -float(first[ANSWERS[n][0]]))[:k]
    scored = []
    for number in likely:
        targets = [*ANSWERS[number], SEP]
        words = log_probabilities([BOS, *ANSWERS[number]])
        right = sum(float(words[place, target]) for place, target in enumerate(targets))
        scored.append((number, (1 - smoothing) * right + smoothing * float(words.mean(1).sum())))
    return sorted(scored, key=lambda pair: -pair[1])


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@pytest.mark.parametrize("k", [1, 3, 5, 128])
@torch.no_grad()
def test_the_rule(k: int, smoothing: float) -> None:
    """Questions padded to the same length rank as each does alone."""
    ours, theirs = twins("vqa", seed=3)
    pixels, questions = images(ours), words(3, 7)
    lengths = [7, 4, 5]
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    answers = rows(ANSWERS)
    before = answers.clone()
    ranking = ours.rank_answers(questions * mask, pixels, answers, mask, k=k, label_smoothing=smoothing)
    assert answers.equal(before)
    assert ranking.answers.shape == ranking.scores.shape == (3, min(k, len(ANSWERS)))
    winners = set()
    for row, length in enumerate(lengths):
        truth = by_the_rule(theirs, questions[row, :length], pixels[row], k, smoothing)
        assert [ANSWERS[number] for number, _ in truth] == [ANSWERS[number] for number in ranking.answers[row].tolist()]
        assert ranking.scores[row].tolist() == pytest.approx([score for _, score in truth], rel=1e-5)
        winners.add(truth[0][0])
    assert k < 5 or len(winners) > 1  # the questions matter


@torch.no_grad()
def test_a_score_without_smoothing_is_what_generation_gives() -> None:
    """The log-probability of the answer, [SEP] included."""
    ours, _ = twins("vqa", end=3.0)
    pixels, questions = images(ours), words(3, 7)
    beams = ours.generate(questions, pixels, num_beams=4, max_new_tokens=6, length_penalty=0.0, output_scores=True,
                          return_dict_in_generate=True)  # fmt: skip
    ended = 0
    for row, tokens in enumerate(beams.sequences.tolist()):
        if SEP not in tokens:
            continue
        answer = torch.tensor([tokens[: tokens.index(SEP) + 1]])
        ranking = ours.rank_answers(questions[row : row + 1], pixels[row : row + 1], answer, label_smoothing=0.0)
        assert float(ranking.scores) == pytest.approx(float(beams.sequences_scores[row]), rel=1e-5)
        ended += 1
    assert ended


def test_what_cannot_be_ranked() -> None:
    ours, _ = twins("vqa")
    for candidates in (torch.zeros(0, 4, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long), torch.zeros(3).long()):
        with pytest.raises(InputError, match="candidates must be"):
            ours.rank_answers(words(3, 7), images(ours), candidates)
    with pytest.raises(InputError, match="k must be 1 or more, not 0"):
        ours.rank_answers(words(3, 7), images(ours), rows(ANSWERS), k=0)
    with pytest.raises(InputError, match="66 tokens are more than the model's 64 positions"):
        ours.rank_answers(words(3, 7), images(ours), rows([[9] * 64]))
