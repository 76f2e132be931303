"""The retrieval losses against plain re-computations, what they reach, and what they may not choose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import WORDS, liven, small_config
from torch import Tensor
from torch.nn import functional as F
from twins import assert_close, images, words

from blip_engine import BlipConfig, BlipForImageTextRetrieval, BlipProcessor
from blip_engine.errors import InputError, OptionError
from blip_engine.shapes import demo_checkpoint
from blip_engine.shapes.scenes import held_out_drawings
from blip_engine.training import ImageTextLosses, ImageTextObjective, contrastive_loss, hard_negatives

MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0], [1] * 6])
ENC = len(WORDS) + 1


def small_model(seed: int = 0) -> BlipForImageTextRetrieval:
    torch.manual_seed(seed)
    model = liven(BlipForImageTextRetrieval(BlipConfig(**small_config())), 4.0)
    assert isinstance(model, BlipForImageTextRetrieval)
    return model


def batch(model: Any, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    mask = MASK[torch.arange(rows) % len(MASK)]
    return {"input_ids": words(rows, 6, seed=seed), "pixel_values": images(model, rows, seed), "attention_mask": mask}


def objective(**options: Any) -> ImageTextObjective:
    return ImageTextObjective(small_model(), **options).train()


@torch.no_grad()
def embeddings(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and texts by the model's own forward pass."""
    states = model.vision_model(given["pixel_values"]).last_hidden_state
    texts = model.text_encoder(given["input_ids"], given["attention_mask"]).last_hidden_state
    return F.normalize(model.vision_proj(states[:, 0]), dim=-1), F.normalize(model.text_proj(texts[:, 0]), dim=-1)


def plain_contrast(queries: Tensor, keys: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The definition, row by row."""
    rows = []
    for query, target in zip(queries, targets, strict=True):
        scores = torch.tensor([float(query @ key) / temperature for key in keys]).double()
        rows.append(-(target.double() * (scores - scores.exp().sum().log())).sum())
    return torch.stack(rows).mean()


class TestGradients:
    @pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "queue_size": 8, "enc_token_id": ENC}], ids=str)
    def test_they_reach_every_parameter(self, options: dict[str, Any]) -> None:
        training = objective(**options)
        for step in range(2):  # with an empty queue and a filled one
            training.zero_grad()
            training(**batch(training.model, seed=step), alpha=0.4 if options else 0.0).loss.backward()
            for name, parameter in [*training.model.named_parameters(), ("temperature", training.temperature)]:
                assert parameter.grad is not None, name
                if not name.endswith("key.bias"):  # a constant on all keys changes no attention
                    assert parameter.grad.abs().max() > 0, name
        if training.teacher is not None:
            assert all(parameter.grad is None for parameter in training.teacher.parameters())

    def test_the_model_keeps_the_tensors_of_a_checkpoint(self) -> None:
        training = objective(momentum=0.9, queue_size=4)
        assert training.model.state_dict().keys() == small_model().state_dict().keys()
        again = ImageTextObjective(small_model(1), momentum=0.9, queue_size=4)
        training(**batch(training.model))
        again.load_state_dict(training.state_dict(), strict=True)  # training can go on where it was left
        assert int(again.seen) == 4
        assert again.queued_texts.equal(training.queued_texts)

    def test_two_losses_at_once(self) -> None:
        training = objective(momentum=0.5, queue_size=4)
        losses = [training(**batch(training.model, seed=seed)).loss for seed in range(2)]
        torch.stack(losses).sum().backward()
        assert training.temperature.grad is not None


class TestContrast:
    def test_of_a_batch_with_itself(self) -> None:
        training = objective()
        given = batch(training.model)
        pictures, texts = embeddings(training.model, given)
        truth = torch.eye(4)
        wanted = (plain_contrast(pictures, texts, truth, 0.07) + plain_contrast(texts, pictures, truth, 0.07)) / 2
        assert training(**given).contrastive_loss.item() == pytest.approx(float(wanted), rel=1e-5)

    def test_several_texts_of_an_image(self) -> None:
        training = objective()
        given = batch(training.model)
        pictures, texts = embeddings(training.model, given)
        truth = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
        wanted = (plain_contrast(pictures, texts, truth, 0.07) + plain_contrast(texts, pictures, truth, 0.07)) / 2
        found = training(**given, image_ids=torch.tensor([7, 3, 7, 0]))
        assert found.contrastive_loss.item() == pytest.approx(float(wanted), rel=1e-5)

    def test_momentum_queue_and_soft_targets_over_steps(self) -> None:
        """Three steps, with an image that comes again two steps later, in a queue of one and a half batches."""
        training = objective(momentum=0.8, queue_size=6, temperature=0.1)
        optimizer = torch.optim.SGD(training.parameters(), lr=0.05)
        slow = {name: value.detach().clone() for name, value in training.model.named_parameters()}
        follower, queue = small_model(), []
        all_ids = [[0, 1, 2, 3], [4, 5, 5, 6], [0, 7, 5, 8]]
        for step, row_ids in enumerate(all_ids):
            given, temperature = batch(training.model, seed=step), training.temperature.item()
            slow = {k: 0.8 * v + 0.2 * training.model.get_parameter(k).detach() for k, v in slow.items()}
            follower.load_state_dict(slow, strict=False)
            pictures, texts = embeddings(training.model, given)
            new = list(zip(*embeddings(follower, given), row_ids, strict=True))
            keys = new + queue
            key_pictures, key_texts = (torch.stack([key[side] for key in keys]) for side in (0, 1))
            same = torch.tensor([[float(own == key[2]) for key in keys] for own in row_ids])
            truth = same / same.sum(1, keepdim=True)
            wanted = 0.0
            for queries, judges, others in ((pictures, key_pictures, key_texts), (texts, key_texts, key_pictures)):
                judged = (judges[:4] @ others.T / temperature).softmax(1)
                wanted += float(plain_contrast(queries, others, 0.4 * judged + 0.6 * truth, temperature)) / 2
            found = training(**given, image_ids=torch.tensor(row_ids), alpha=0.4)
            assert found.contrastive_loss.item() == pytest.approx(wanted, rel=1e-4)
            queue = (queue + new)[-6:]
            held = sorted(training.queued_ids[: min(int(training.seen), 6)].tolist())
            assert held == sorted(key[2] for key in queue)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
        assert_close(torch.stack([v.norm() for v in slow.values()]), _norms(training))

    def test_rows_without_ids_are_nobody_elses_positive(self) -> None:
        training = objective(momentum=0.9, queue_size=8)
        for step in range(3):
            training(**batch(training.model, seed=step))
        assert len(set(training.queued_ids.tolist())) == 8
        assert not set(training.queued_ids.tolist()) & set(training._ids(None, torch.empty(4, 1)).tolist())

    def test_a_batch_larger_than_the_queue(self) -> None:
        training = objective(momentum=0.9, queue_size=3)
        for step in range(2):
            training(**batch(training.model, seed=step), image_ids=torch.arange(4) + 4 * step)
        assert sorted(training.queued_ids.tolist()) == [5, 6, 7]

    def test_evaluation_moves_nothing(self) -> None:
        training = objective(momentum=0.9, queue_size=8).eval()
        before = {name: value.clone() for name, value in training.state_dict().items()}
        with torch.no_grad():
            training(**batch(training.model))
        assert all(value.equal(before[name]) for name, value in training.state_dict().items())

    def test_the_temperature_stays_in_its_range(self) -> None:
        training = objective()
        training.temperature.data.fill_(-1.0)
        assert training(**batch(training.model)).loss.isfinite()
        assert training.temperature.item() == pytest.approx(0.001)

    def test_it_is_transformers_loss_without_extras(self) -> None:
        """BlipModel's own contrastive loss, which equals transformers', is the case of one batch."""
        vectors = [F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2)]
        found = contrastive_loss(*vectors, *vectors, same=torch.eye(5).bool(), temperature=0.07)
        scores = vectors[0] @ vectors[1].T / 0.07
        truth = torch.arange(5)
        assert_close(found, (F.cross_entropy(scores, truth) + F.cross_entropy(scores.T, truth)) / 2)


class TestMatching:
    def test_against_pairs_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        training = objective(enc_token_id=ENC)
        given = batch(training.model)
        drawn = iter([torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])])  # an image of each text, and a text
        monkeypatch.setattr("blip_engine.training.hard_negatives", lambda *_: next(drawn))
        found = training(**given).matching_loss
        pairs = [(i, i, 1) for i in range(4)]
        pairs += [(2, 0, 0), (0, 1, 0), (3, 2, 0), (1, 3, 0), (0, 1, 0), (1, 3, 0), (2, 0, 0), (3, 2, 0)]
        ids = given["input_ids"].clone()
        ids[:, 0] = ENC
        losses = []
        for image, text, matches in pairs:
            kept = MASK[text].bool()
            score = training.model(ids[text][kept][None], given["pixel_values"][image][None]).itm_score
            losses.append(-score.log_softmax(-1)[0, matches])
        assert_close(found, torch.stack(losses).mean())

    def test_enc_stands_in_for_the_first_id_of_fused_texts_only(self) -> None:
        def losses(**options: Any) -> Any:
            training = objective(**options)
            return training(**batch(training.model), generator=torch.Generator().manual_seed(0))

        plain, switched = losses(), losses(enc_token_id=ENC)
        assert plain.contrastive_loss.equal(switched.contrastive_loss)
        assert not plain.matching_loss.equal(switched.matching_loss)

    def test_the_callers_ids_stay(self) -> None:
        training = objective(enc_token_id=ENC)
        given = batch(training.model)
        before = given["input_ids"].clone()
        training(**given)
        assert given["input_ids"].equal(before)

    def test_a_generator_decides(self) -> None:
        training = objective()
        given = batch(training.model, 8)

        def losses(seed: int) -> list[float]:
            generator = torch.Generator().manual_seed(seed)
            return [training(**given, generator=generator).matching_loss.item() for _ in range(3)]

        state = torch.get_rng_state()
        assert losses(1) == losses(1)
        assert losses(1) != losses(2)
        assert torch.get_rng_state().equal(state)


class TestHardNegatives:
    @settings(max_examples=100, deadline=None)
    @given(ids=st.lists(st.integers(0, 4), min_size=2, max_size=12).filter(lambda ids: len(set(ids)) > 1),
           scale=st.sampled_from([0.0, 1.0, 50.0, 1e4]), seed=st.integers(0, 999))  # fmt: skip
    def test_never_a_positive_however_similar(self, ids: list[int], scale: float, seed: int) -> None:
        generator, numbers = torch.Generator().manual_seed(seed), torch.tensor(ids)
        same = numbers[:, None] == numbers
        logits = torch.randn(len(ids), len(ids), generator=generator) * scale + same * 1e3
        chosen = hard_negatives(logits, same, generator)
        assert chosen.shape == numbers.shape
        assert not (numbers[chosen] == numbers).any()

    def test_the_similar_ones_are_drawn_by_their_softmax(self) -> None:
        logits = torch.tensor([[9.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
        same = torch.tensor([[True, False, False, False]]).expand(20_000, -1)
        chosen = hard_negatives(logits, same, torch.Generator().manual_seed(0))
        shares = torch.bincount(chosen, minlength=4) / 20_000
        wanted = torch.tensor([0.0, *torch.tensor([1.0, 0.0, -1.0]).softmax(0).tolist()])
        assert (shares - wanted).abs().max() < 0.015

    def test_a_batch_without_negatives(self) -> None:
        training = objective()
        with pytest.raises(InputError, match="row 0 has no negative: a batch needs pairs of at least two different"):
            training(**batch(training.model, 2), image_ids=torch.tensor([5, 5]))


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: objective(queue_size=4), "queue_size must be 0 or more, and 0 without momentum, not 4"),
        (lambda: objective(momentum=1.5), "momentum must be 0 to 1"),
        (lambda: objective(temperature=0.0), "temperature must be 0.001 to 0.5"),
        (lambda: objective(enc_token_id=30523), f"enc_token_id must be 0 to {ENC}, the model's last word, not 30523"),
        (lambda: (it := objective())(**batch(it.model), alpha=0.4), "alpha must be 0 to 1, and 0 without momentum"),
        (
            lambda: (it := objective())(**batch(it.model), image_ids=torch.arange(3)),
            r"one per image \(4,\), not \(3,\)",
        ),
    ],
)
def test_faults(make: Callable[[], Any], fault: str) -> None:
    with pytest.raises((OptionError, InputError), match=fault):
        make()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "queue_size": 32}], ids=str)
def test_it_learns_drawings(options: dict[str, Any]) -> None:
    """A model that knows nothing yet: the bundled one's towers, its heads and text encoder made anew."""
    torch.manual_seed(0)
    model = BlipForImageTextRetrieval.from_pretrained(demo_checkpoint("itm"))
    fresh = BlipForImageTextRetrieval(model.config)
    fresh.vision_model = model.vision_model
    drawn = list(held_out_drawings(12, seed=3))
    processor = BlipProcessor.from_pretrained(demo_checkpoint("itm"))
    captions = [each.scene.caption for each in drawn]
    inputs = processor([each.image() for each in drawn], captions, padding=True, return_tensors="pt")
    numbers = torch.tensor([captions.index(caption) for caption in captions])
    training, judge = ImageTextObjective(fresh, **options).train(), ImageTextObjective(fresh).eval()
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-3)

    @torch.no_grad()
    def judged() -> ImageTextLosses:
        return judge(**inputs, image_ids=numbers, generator=torch.Generator().manual_seed(0))

    before = judged()
    for _ in range(14):
        loss = training(**inputs, image_ids=numbers, generator=torch.Generator().manual_seed(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = judged()
    assert after.contrastive_loss < before.contrastive_loss * 0.6
    assert after.matching_loss < before.matching_loss * 0.95
    assert training.temperature.item() != pytest.approx(0.07, abs=1e-6)


def _norms(training: ImageTextObjective) -> Tensor:
    assert training.teacher is not None
    return torch.stack([parameter.norm() for parameter in training.teacher.parameters()])


def test_it_runs_on_the_device(device: torch.device) -> None:
    """Three steps there and on a CPU; the negatives drawn may differ."""
    found: dict[str, list[float]] = {}
    for place in ("cpu", str(device)):
        training = ImageTextObjective(small_model(), momentum=0.9, queue_size=6, enc_token_id=ENC).to(place).train()
        found[place] = []
        for step in range(3):
            given = {name: value.to(place) for name, value in batch(training.model, seed=step).items()}
            generator = torch.Generator(place).manual_seed(step)
            output = training(**given, image_ids=torch.tensor([0, 1, 2, step]), alpha=0.4, generator=generator)
            output.loss.backward()
            found[place].append(output.contrastive_loss.item())
            assert output.matching_loss.isfinite()
        assert all(parameter.grad is not None for parameter in training.model.parameters())
    assert found[str(device)] == pytest.approx(found["cpu"], rel=1e-3)
