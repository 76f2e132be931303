"""Choosing answers, re-ranking, CapFilt and Salesforce's ways of reading texts, through the engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CLASSES, WORDS, save_checkpoint, small_config

from blip_engine import BlipProcessor, Engine, capfilt, find_images, find_texts
from blip_engine.cleaning import clean_caption, clean_question
from blip_engine.errors import CheckpointError, InputError, OptionError
from blip_engine.requests import TASKS, options_for, result_record
from blip_engine.shapes.scenes import held_out_drawings

RANDOM = np.random.default_rng(5)
IMAGES = [RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(6)]
QUESTIONS = ["what is this ?", "how many dogs are in this picture of a red cat ?", "a dog", "is the cat red ?"] * 2
ANSWERS = ["yes", "no", "red", "a red dog", "two dogs", "two cats on the left", "blue", "a"]
ENC = len(WORDS) + 1


@pytest.fixture(scope="module")
def engine(checkpoints: Path) -> Iterator[Engine]:
    with Engine.load({task: str(checkpoints / task) for task in TASKS}, device="cpu", precision="fp32") as engine:
        yield engine


def drop_in(checkpoints: Path, task: Any) -> tuple[Any, BlipProcessor]:
    return CLASSES[task].from_pretrained(checkpoints / task), BlipProcessor.from_pretrained(checkpoints / task)


class TestChosenAnswers:
    @pytest.mark.parametrize("most", [128, 3, 1])
    def test_ranked_as_the_model_ranks_them(self, engine: Engine, checkpoints: Path, most: int) -> None:
        model, processor = drop_in(checkpoints, "vqa")
        answers = processor(text=ANSWERS, padding=True, return_tensors="pt").input_ids
        images = [IMAGES[i % 5] for i in range(8)]
        inputs = processor(images, QUESTIONS, padding=True, return_tensors="pt")
        truth = model.rank_answers(**inputs, answer_ids=answers, k=most)
        found = engine.answer(images, QUESTIONS, ANSWERS, rank_candidates=most)
        for answer, order, scores in zip(found, truth.answers.tolist(), truth.scores.tolist(), strict=True):
            assert [text for text, _ in answer.ranking] == [ANSWERS[n] for n in order]
            assert [score for _, score in answer.ranking] == pytest.approx(scores, abs=1e-4)
            assert (answer.text, answer.score) == answer.ranking[0]
        assert len({answer.text for answer in found}) > 1

    def test_a_list_for_each_question(self, engine: Engine) -> None:
        lists = [ANSWERS[:2], ANSWERS[2:6], ANSWERS[4:]]
        found = engine.answer([IMAGES[0]] * 3, QUESTIONS[:3], lists)
        for answer, given in zip(found, lists, strict=True):
            assert {text for text, _ in answer.ranking} == set(given)
        alone = engine.answer([IMAGES[0]], QUESTIONS[1:2], lists[1])
        assert alone == found[1:2]

    def test_in_a_record(self, engine: Engine) -> None:
        answers = engine.answer([IMAGES[0]], ["what is this ?"], ["red", "blue"])
        record = result_record("vqa", answers, several=False)
        assert [entry["answer"] for entry in record["ranking"]] == [text for text, _ in answers[0].ranking]
        assert record["answer"] == record["ranking"][0]["answer"]

    @pytest.mark.parametrize(
        ("answers", "words"),
        [
            ([], "empty list"),
            ([["red"], ["blue"]], "one list for each"),
            ("red", "must be a list"),
            ([["red"] * 2, [2]], "no Unicode"),
        ],
    )
    def test_refused(self, engine: Engine, answers: Any, words: str) -> None:
        number = 2 if words == "no Unicode" else 3
        with pytest.raises(InputError, match=words):
            engine.answer(IMAGES[:number], QUESTIONS[:number], answers)


class TestRetrieval:
    @torch.no_grad()
    def scores(self, checkpoints: Path, enc: bool) -> tuple[Any, Any]:
        """(images, texts) logits + cosines, and cosines, of every pair, with the model itself."""
        model, processor = drop_in(checkpoints, "itm")
        texts = processor(text=QUESTIONS[:4], padding=True, return_tensors="pt")
        pixels = processor(IMAGES, return_tensors="pt").pixel_values
        cosines = model(**texts, pixel_values=pixels, use_itm_head=False).itm_score
        opened = texts.input_ids.clone()
        if enc:
            opened[:, 0] = ENC
        logits = torch.stack([
            model(opened, image[None].expand(4, -1, -1, -1), attention_mask=texts.attention_mask).itm_score[:, 1]
            for image in pixels
        ])  # fmt: skip
        return (logits + cosines).numpy(), cosines.numpy()

    @pytest.mark.parametrize("enc", [False, True])
    @pytest.mark.parametrize("k", [1, 3, 100])
    def test_nearest_first_then_by_both_heads(self, engine: Engine, checkpoints: Path, k: int, enc: bool) -> None:
        scores, cosines = self.scores(checkpoints, enc)
        of_texts = find_images(engine, QUESTIONS[:4], IMAGES, k, enc_token=enc)
        of_images = find_texts(engine, IMAGES, QUESTIONS[:4], k, enc_token=enc)
        for found, score, cosine in [
            *zip(of_texts, scores.T, cosines.T, strict=True), *zip(of_images, scores, cosines, strict=True)
        ]:  # fmt: skip
            near = np.argsort(-cosine, kind="stable")[:k]
            assert [entry.index for entry in found] == sorted(near, key=lambda n: -score[n])
            assert [entry.score for entry in found] == pytest.approx([score[e.index] for e in found], abs=1e-4)

    def test_a_text_finds_its_drawing(self) -> None:
        drawings = list({each.scene.caption: each for each in held_out_drawings(60, seed=12)}.values())[:40]
        captions, images = [each.scene.caption for each in drawings], [each.image() for each in drawings]
        with Engine.load({"itm": "demo"}, device="cpu", precision="fp32") as engine:
            of_texts, of_images = find_images(engine, captions, images, 8), find_texts(engine, images, captions, 8)
        for found in (of_texts, of_images):
            assert sum(ranking[0].index == own for own, ranking in enumerate(found)) >= 38  # cosines alone: 32

    def test_kept_vectors_serve_again(self, engine: Engine) -> None:
        vectors = engine.embed(images=IMAGES)
        assert find_images(engine, ["a dog"], IMAGES, 2, image_vectors=vectors) == find_images(
            engine, ["a dog"], IMAGES, 2
        )
        with pytest.raises(InputError, match="6 images and 5 vectors"):
            find_images(engine, ["a dog"], IMAGES, image_vectors=vectors[:5])
        with pytest.raises(InputError, match="k must be"):
            find_texts(engine, IMAGES, ["a dog"], 0)


class TestCapfilt:
    def test_both_texts_are_judged(self, engine: Engine) -> None:
        texts = ["a dog", None, "the red cat", "a", None, "two dogs ?"]
        found = capfilt(engine, IMAGES, texts, num_beams=1)
        captions = engine.caption(IMAGES, num_beams=1)
        fits = engine.match(IMAGES, [caption.text for caption in captions])
        for image, text, caption, fit, entry in zip(IMAGES, texts, captions, fits, found, strict=True):
            own = None if text is None else engine.match([image], [text])[0].itm
            assert entry.caption == caption
            assert entry.caption_match == pytest.approx(fit.itm, abs=1e-5)
            assert entry.text_match == (None if own is None else pytest.approx(own, abs=1e-5))
            expected = [text] if own is not None and own > 0.5 else []
            assert list(entry.kept) == expected + ([caption.text] if fit.itm > 0.5 else [])
            assert entry.as_record()["kept"] == list(entry.kept)

    def test_right_texts_are_kept_and_wrong_ones_are_not(self) -> None:
        drawings = list(held_out_drawings(40, seed=11))
        truths = [drawing.scene.caption for drawing in drawings]
        texts = truths[:20] + [truths[n - 1] for n in range(20, 40)]  # another drawing's
        with Engine.load({"caption": "demo", "itm": "demo"}, device="cpu", precision="fp32") as engine:
            found = capfilt(engine, [drawing.image() for drawing in drawings], texts)
        right = sum(text in entry.kept for text, entry in zip(texts[:20], found[:20], strict=True))
        wrong = sum(text in entry.kept for text, entry in zip(texts[20:], found[20:], strict=True))
        captions = sum(entry.kept[-1:] == (truth,) for truth, entry in zip(truths, found, strict=True))
        assert (right >= 19, wrong <= 1, captions >= 37) == (True, True, True), (right, wrong, captions)

    def test_captions_alone(self, engine: Engine) -> None:
        assert all(entry.text_match is None for entry in capfilt(engine, IMAGES[:2]))

    def test_wrong_number_of_texts(self, engine: Engine) -> None:
        with pytest.raises(InputError, match="6 images and 1 texts"):
            capfilt(engine, IMAGES, ["a dog"])


class TestReading:
    """The switches for Salesforce's ways."""

    @torch.no_grad()
    def test_enc_token(self, engine: Engine, checkpoints: Path) -> None:
        model, processor = drop_in(checkpoints, "itm")
        inputs = processor(IMAGES[:3], ["a dog", "a cat", "the red cat"], padding=True, return_tensors="pt")
        cosine = model(**inputs, use_itm_head=False).itm_score.diagonal()
        inputs["input_ids"][:, 0] = ENC
        truth = model(**inputs).itm_score
        found = engine.match(IMAGES[:3], ["a dog", "a cat", "the red cat"], enc_token=True)
        assert [m.itm for m in found] == pytest.approx(truth.softmax(-1)[:, 1].tolist(), abs=1e-5)
        assert [m.itm_logit for m in found] == pytest.approx(truth[:, 1].tolist(), abs=1e-4)
        assert [m.itc for m in found] == pytest.approx(cosine.tolist(), abs=1e-5)  # [CLS] stays there
        assert found != engine.match(IMAGES[:3], ["a dog", "a cat", "the red cat"])

    def test_enc_token_of_questions(self, engine: Engine, checkpoints: Path) -> None:
        model, processor = drop_in(checkpoints, "vqa")
        inputs = processor(IMAGES[:4], QUESTIONS[:4], padding=True, return_tensors="pt")
        inputs["input_ids"][:, 0] = ENC
        truth = model.generate(**inputs, num_beams=3, max_new_tokens=9)
        found = engine.answer(IMAGES[:4], QUESTIONS[:4], enc_token=True)
        assert [a.text for a in found] == processor.batch_decode(truth, skip_special_tokens=True)
        assert found != engine.answer(IMAGES[:4], QUESTIONS[:4])

    def test_a_model_without_that_token(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "m", "itm", **small_config(text={"vocab_size": ENC}))
        with (
            Engine.load({"itm": str(tmp_path / "m")}, device="cpu") as engine,
            pytest.raises(InputError, match=r"\[ENC\]"),
        ):
            engine.match(IMAGES[:1], ["a dog"], enc_token=True)

    def test_clean_text(self, engine: Engine) -> None:
        assert engine.answer(IMAGES[:1], ["What: IS (this)?"], clean_text=True) == engine.answer(
            IMAGES[:1], ["what is this?"]
        )
        assert engine.match(IMAGES[:1], ["A dog.a  CAT!"], clean_text=True) == engine.match(IMAGES[:1], ["a dog a cat"])
        plain = engine.match(IMAGES[:1], ["A dog.a  CAT!"])
        assert plain != engine.match(IMAGES[:1], ["a dog a cat"])
        cleaned = engine.embed(texts=["A dog.a  CAT!"], clean_text=True)
        np.testing.assert_array_equal(cleaned, engine.embed(texts=["a dog a cat"]))

    @pytest.mark.parametrize(
        ("text", "question", "caption"),
        [
            ('Is "this" (a) *dog*; ~#1?', "is this a dog 1?", "is this a dog 1?"),
            ("What's that...  ", "what's that", "what's that"),
            ("one.two", "onetwo", "one two"),
            (" ".join(["word"] * 60), " ".join(["word"] * 50), " ".join(["word"] * 50)),
            ("!", "", ""),
        ],
    )
    def test_the_rules(self, text: str, question: str, caption: str) -> None:
        assert clean_question(text) == question
        assert clean_caption(text) == caption

    def test_options(self) -> None:
        with pytest.raises(OptionError, match="rank_candidates"):
            options_for("vqa", {"rank_candidates": 0})
        with pytest.raises(OptionError, match="enc_token"):
            options_for("caption", {"enc_token": True})


class TestLargerImages:
    """Salesforce answered questions at 480 pixels with positions learned at 384."""

    def test_positions_are_interpolated_once(self, checkpoints: Path) -> None:
        large = [RANDOM.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(3)]
        model, processor = drop_in(checkpoints, "vqa")
        inputs = processor(large, QUESTIONS[:3], padding=True, return_tensors="pt", size={"height": 40, "width": 40})
        truth = model.generate(**inputs, interpolate_pos_encoding=True, num_beams=3, max_new_tokens=9)
        with Engine(device="cpu", precision="fp32") as engine:
            info = engine.load_model("vqa", str(checkpoints / "vqa"), "vqa", image_size=40)
            assert info.image_size == (40, 40)
            assert [a.text for a in engine.answer(large, QUESTIONS[:3])] == processor.batch_decode(
                truth, skip_special_tokens=True
            )
            assert engine.load_model("vqa", str(checkpoints / "vqa"), "vqa", image_size=40) is info
            with pytest.raises(CheckpointError, match="taken"):
                engine.load_model("vqa", str(checkpoints / "vqa"), "vqa", image_size=48)
            with pytest.raises(InputError, match="multiple of the patch size 8"):
                engine.load_model("other", str(checkpoints / "vqa"), "vqa", image_size=42)
