"""The further arguments of `generate`: early stopping, n-grams, scores and a generator of one's own."""

from typing import Any, ClassVar

import pytest
import torch
from twins import SEP, assert_close, images, texts, twins, words

from blip_engine.errors import OptionError
from blip_engine.requests import Task

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")

RECORDED = {"return_dict_in_generate": True, "output_scores": True}


def both(task: Task, **options: Any) -> tuple[Any, Any]:
    """What ours and transformers' generate, captions behind prompts or answers to questions."""
    ours, theirs = twins(task, end=1.0)
    given = {"pixel_values": images(ours, 8), "attention_mask": torch.ones(8, 6, dtype=torch.long)}
    return tuple(model.generate(input_ids=words(8, 6), **given, **options) for model in (ours, theirs))


@pytest.mark.parametrize("task", ["caption", "vqa"])
@pytest.mark.parametrize("stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [2.0, 1.0, -1.0])
def test_early_stopping(task: Task, stopping: bool | str, penalty: float) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": penalty, "early_stopping": stopping}
    ours, theirs = both(task, **options, **RECORDED)
    prompt = 5 if task == "caption" else 1
    assert texts(ours.sequences, prompt) == texts(theirs.sequences, prompt)
    assert_close(ours.sequences_scores, theirs.sequences_scores)


def test_early_stopping_changes_something() -> None:
    found = [
        both("caption", num_beams=3, length_penalty=2.0, early_stopping=stop)[0] for stop in (True, False, "never")
    ]
    assert len({str(texts(sequences, 5)) for sequences in found}) == 3


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_no_ngram_comes_twice(size: int, beams: int) -> None:
    options = {"num_beams": beams, "min_new_tokens": 15}
    ours, theirs = both("caption", no_repeat_ngram_size=size, **options)
    assert texts(ours, 5) == texts(theirs, 5)
    for text in texts(ours, 5):
        runs = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        new = runs[max(0, 5 - size + 1) :]
        assert len(new) == len(set(new))
    assert texts(ours, 5) != texts(both("caption", **options)[0], 5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "repetition_penalty": 1.5}], ids=str)
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_bad_words_do_not_come(task: Task, options: dict[str, Any]) -> None:
    prompt = 5 if task == "caption" else 1
    spoken = [text[prompt:] for text in texts(both(task, **options)[0], prompt)]
    longest = sorted(spoken, key=len)[-3:]
    bad = [longest[0][:1], longest[1][:2], longest[2][1:4], [7, 8, 9], [SEP]]
    ours, theirs = both(task, bad_words_ids=bad, **options)
    assert texts(ours, prompt) == texts(theirs, prompt)
    said = [text[prompt:] for text in texts(ours, prompt)]
    assert said != spoken
    for run in bad[:-1]:  # ends are allowed, as in transformers
        assert not any(text[i : i + len(run)] == run for text in said for i in range(len(text)))


def test_a_bad_word_begun_by_the_prompt() -> None:
    ours, theirs = twins("caption")
    pixels, prompts = images(ours, 4), words(4, 6)
    first = ours.generate(pixels, prompts)[:, 5]
    bad = [[int(prompts[row, -2]), int(first[row])] for row in range(4)]
    mine = ours.generate(pixels, prompts, bad_words_ids=bad)
    assert texts(mine, 5) == texts(theirs.generate(pixels, prompts.clone(), bad_words_ids=bad), 5)
    assert not (mine[:, 5] == first).any()


def test_a_cache_more_or_less() -> None:
    ours, _ = twins("caption", end=1.0)
    pixels = images(ours)
    assert ours.generate(pixels, use_cache=False).equal(ours.generate(pixels))


def test_padding_is_no_part_of_an_ngram() -> None:
    ours, _ = twins("caption", end=-1.0)
    pixels, ids = images(ours, 2), words(2, 7)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    together = texts(ours.generate(pixels, ids, mask, no_repeat_ngram_size=1), 3)[1]
    alone = texts(ours.generate(pixels[1:], ids[1:, :4], no_repeat_ngram_size=1), 3)[0]
    assert together == alone


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "repetition_penalty": 1.3}, {"min_new_tokens": 3}], ids=str)
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_scores(task: Task, options: dict[str, Any]) -> None:
    ours, theirs = both(task, **options, **RECORDED)
    assert ours.sequences.shape[1] == theirs.sequences.shape[1]
    assert len(ours.scores) == len(theirs.scores)
    assert (ours.sequences_scores is None) == ("num_beams" not in options)
    # Behind its [SEP] a row's scores mean nothing.
    first, other = ours.scores[0], theirs.scores[0]
    assert_close(first.nan_to_num(neginf=-9.0), other.nan_to_num(neginf=-9.0))
    if "num_beams" not in options:
        prompt = 5 if task == "caption" else 1
        for row, text in enumerate(texts(ours.sequences, prompt)):
            for step in range(len(text) - prompt):
                mine, truth = ours.scores[step][row], theirs.scores[step][row]
                assert_close(mine.nan_to_num(neginf=-9.0), truth.nan_to_num(neginf=-9.0))


def assert_steps_close(ours: Any, theirs: Any, lengths: list[int], beams: int) -> None:
    """Tensors, or tuples of them per layer, of every step. Behind a row's end they mean nothing."""
    for field in ("logits", "attentions", "hidden_states"):
        assert len(ours[field]) == len(theirs[field])
        for step, (mine, other) in enumerate(zip(ours[field], theirs[field], strict=True)):
            # With beams a row of a step is no row of the result: compared are the steps that all texts have.
            alive = [row for row, length in enumerate(lengths) if length > step]
            rows = alive if beams == 1 else list(range(len(lengths) * beams)) if step < min(lengths) else []
            layers = [(mine, other)] if field == "logits" else zip(mine, other, strict=True)
            for own, truth in layers:
                assert own.shape == truth.shape
                if rows:
                    assert_close(own[rows], truth[rows])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_logits_attentions_and_hidden_states(task: Task, options: dict[str, Any]) -> None:
    asked = {"output_logits": True, "output_attentions": True, "output_hidden_states": True}
    ours, theirs = both(task, **options, **asked, return_dict_in_generate=True)
    assert ours.scores is ours.sequences_scores is None
    assert set(ours.keys()) == set(theirs.keys()) - {"past_key_values"}
    prompt = 5 if task == "caption" else 1
    lengths = [len(text) - prompt for text in texts(ours.sequences, prompt)]
    assert_steps_close(ours, theirs, lengths, options.get("num_beams", 1))
    plain, _ = both(task, **options)
    assert ours.sequences.equal(plain)


@pytest.mark.parametrize("task", ["caption", "vqa"])
@pytest.mark.parametrize(
    "options", [{}, {"num_return_sequences": 3, "length_penalty": 2.0}, {"min_new_tokens": 4}, {"max_new_tokens": 1}],
    ids=str,
)  # fmt: skip
def test_beam_indices(task: Task, options: dict[str, Any]) -> None:
    ours, theirs = both(task, num_beams=3, output_scores=True, return_dict_in_generate=True, **options)
    assert ours.beam_indices.equal(theirs.beam_indices)
    assert ours.beam_indices.dtype == theirs.beam_indices.dtype
    assert both(task, num_beams=3, return_dict_in_generate=True)[0].keys() == ("sequences", "beam_indices")
    # What they are for: a beam's score is the sum of its tokens' scores where they were chosen.
    prompt, penalty = 5 if task == "caption" else 1, options.get("length_penalty", 1.0)
    for row, beams in enumerate(ours.beam_indices.tolist()):
        new = ours.sequences[row, prompt:].tolist()
        gained = [float(ours.scores[i][beam, new[i]]) for i, beam in enumerate(beams) if beam >= 0]
        assert sum(gained) / len(gained) ** penalty == pytest.approx(float(ours.sequences_scores[row]), rel=1e-4)


def test_what_is_returned() -> None:
    ours, theirs = twins("caption", end=1.0)
    pixels = images(ours)
    plain = ours.generate(pixels, output_scores=True)  # without a dictionary there is no place for them
    output = ours.generate(pixels, return_dict_in_generate=True)
    assert output.keys() == ("sequences",)
    assert output.sequences.equal(plain)
    assert output[0].equal(plain)
    assert texts(plain) == texts(theirs.generate(pixels))


class TestSampling:
    def test_the_scores_are_those_drawn_from(self) -> None:
        options = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8}
        ours, theirs = both("vqa", **options, **RECORDED)
        mine, other = ours.scores[0], theirs.scores[0]  # the first step does not hang on what was drawn
        assert mine.isneginf().equal(other.isneginf())
        assert_close(mine.nan_to_num(neginf=-9.0), other.nan_to_num(neginf=-9.0))
        for step, scores in enumerate(ours.scores):
            drawn = scores.gather(1, ours.sequences[:, step + 1 : step + 2])[:, 0]
            ended = (ours.sequences[:, 1 : step + 1] == SEP).any(1)
            assert (drawn.isfinite() | ended).all()

    def test_a_generator_decides_the_draws(self) -> None:
        ours, _ = twins("caption")
        pixels = images(ours, 6)

        def sample(seed: int) -> Any:
            generator = torch.Generator().manual_seed(seed)
            return ours.generate(pixels, do_sample=True, num_return_sequences=2, generator=generator)

        state = torch.get_rng_state()
        assert sample(1).equal(sample(1))
        assert not sample(1).equal(sample(2))
        assert torch.get_rng_state().equal(state)


class TestSampledBeams:
    OPTIONS: ClassVar[dict[str, Any]] = {"do_sample": True, "num_beams": 3}

    @pytest.mark.parametrize(
        "options",
        [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}, {"top_k": 1}, {"top_k": 0, "top_p": 0.1}],
        ids=str,
    )
    def test_the_scores_are_those_drawn_from(self, options: dict[str, Any]) -> None:
        ours, theirs = twins("vqa", end=1.0)
        given = {"pixel_values": images(ours, 8), "input_ids": words(8, 6), **self.OPTIONS, **options, **RECORDED}
        mine = ours.generate(**given).scores[0]
        other = theirs.generate(**given, attention_mask=torch.ones(8, 6, dtype=torch.long)).scores[0]
        assert mine.isneginf().equal(other.isneginf())
        assert_close(mine.nan_to_num(neginf=-9.0), other.nan_to_num(neginf=-9.0))
        assert (mine.isfinite().sum(1) >= 2).all()

    def test_a_beam_is_what_its_scores_say(self) -> None:
        ours, _ = twins("caption", end=1.0)
        output = ours.generate(images(ours, 6), num_return_sequences=2, **self.OPTIONS, **RECORDED)
        assert output.sequences.shape[0] == 12
        for row, beams in enumerate(output.beam_indices.tolist()):
            new = output.sequences[row, 1:].tolist()
            gained = [float(output.scores[i][beam, new[i]]) for i, beam in enumerate(beams) if beam >= 0]
            assert sum(gained) / len(gained) == pytest.approx(float(output.sequences_scores[row]), rel=1e-4)

    def test_a_generator_decides_the_draws(self) -> None:
        ours, _ = twins("caption")
        pixels = images(ours, 6)

        def sample(seed: int) -> Any:
            return ours.generate(pixels, generator=torch.Generator().manual_seed(seed), **self.OPTIONS)

        state = torch.get_rng_state()
        assert sample(1).equal(sample(1))
        assert not sample(1).equal(sample(2))
        assert torch.get_rng_state().equal(state)

    @pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.05}, {"top_k": 1, "max_new_tokens": 1}], ids=str)
    @pytest.mark.parametrize("task", ["caption", "vqa"])
    def test_fewer_continuations_than_beams(self, task: Task, options: dict[str, Any]) -> None:
        """transformers draws what has no chance then. Here beams may come out equal, each with its own score."""
        ours, _ = twins(task, end=1.0)
        given = {"pixel_values": images(ours, 3), "input_ids": words(3, 6), **RECORDED, **options}
        output = ours.generate(**given, do_sample=True, num_beams=5, num_return_sequences=5)
        prompt = 5 if task == "caption" else 1
        for row, beams in enumerate(output.beam_indices.tolist()):
            new = output.sequences[row, prompt:].tolist()
            gained = [float(output.scores[i][beam, new[i]]) for i, beam in enumerate(beams) if beam >= 0]
            assert sum(gained) / len(gained) == pytest.approx(float(output.sequences_scores[row]), rel=1e-4)

    def test_first_tokens_come_as_often_as_their_probability_says(self) -> None:
        """With one new token and two beams the first drawn and the second are both returned, the likelier first."""
        ours, _ = twins("caption", end=-1.0)
        options = {"top_k": 3, "max_new_tokens": 1, "num_beams": 2, "num_return_sequences": 2, **RECORDED}
        output = ours.generate(images(ours, 1).expand(4000, -1, -1, -1), do_sample=True, **options,
                               generator=torch.Generator().manual_seed(0))  # fmt: skip
        chances = output.scores[0][0].softmax(-1)
        first = chances.argmax()
        pairs = output.sequences[:, 1].view(4000, 2)
        # Without replacement: among the first two draws unless drawn neither first nor second.
        others = [p for p in chances.tolist() if p > 0 and p != float(chances[first])]
        missed = sum(p * q / (1 - p) for p in others for q in others if q != p)
        assert (pairs == first).any(1).float().mean().item() == pytest.approx(1 - missed, abs=0.03)

    def test_they_differ_from_the_best_ones(self) -> None:
        ours, _ = twins("caption", end=1.0)
        pixels = images(ours, 6)
        assert texts(ours.generate(pixels, **self.OPTIONS)) != texts(ours.generate(pixels, num_beams=3))


@pytest.mark.parametrize(
    ("option", "value", "fault"),
    [
        ("early_stopping", "soon", "must be True, False or 'never', not 'soon'"),
        ("no_repeat_ngram_size", -1, "must be 0 .off. or more, not -1"),
        ("bad_words_ids", [7], "must be lists of ids from 0 to 40, not .7."),
        ("bad_words_ids", [[7, 41]], "must be lists of ids from 0 to 40"),
        ("bad_words_ids", [[]], "must be lists of ids from 0 to 40"),
        ("generator", 7, "must be a torch.Generator, not 7"),
        ("penalty_alpha", 0.6, "no argument 'penalty_alpha'; it has: num_beams"),
        ("num_beam_groups", 2, "no argument 'num_beam_groups'"),
    ],
)
def test_faults(option: str, value: Any, fault: str) -> None:
    ours, _ = twins("caption")
    with pytest.raises(OptionError, match=fault):
        ours.generate(images(ours), **{option: value})


def test_all_of_them_on_the_device(device: torch.device) -> None:
    ours, _ = twins("caption", end=1.0)
    pixels, prompts = images(ours, 4), words(4, 6)
    asked = {"output_logits": True, "output_attentions": True, "output_hidden_states": True, **RECORDED}
    for options in ({"num_beams": 3}, {"num_beams": 3, "do_sample": True}, {"do_sample": True}, {}):

        def said(place: torch.device, options: dict[str, Any] = options) -> Any:
            generator = torch.Generator().manual_seed(3)
            bad = {"bad_words_ids": [[7], [8, 9]], "no_repeat_ngram_size": 2}
            return ours.to(place).generate(
                pixels.to(place), prompts.to(place), generator=generator, **asked, **bad, **options
            )

        plain, there = said(torch.device("cpu")), said(device)
        assert texts(there.sequences, 5) == texts(plain.sequences, 5)
        assert there.keys() == plain.keys()
        assert there.attentions[0][0].device.type == device.type
        assert_close(there.logits[0].cpu(), plain.logits[0])
