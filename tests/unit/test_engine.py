"""The engine: every future settles, faults stay with their request, results are the drop-in model's."""

import json
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import CLASSES, save_checkpoint

from blip_engine import BlipProcessor, Engine
from blip_engine.engine import ModelInfo
from blip_engine.errors import CheckpointError, EngineClosedError, InputError, OptionError
from blip_engine.requests import TASKS, Request, Result, options_for
from blip_engine.resident import Shapes
from blip_engine.runner import Begun, Prepared

WAIT = 60  # seconds until a future that does not settle fails its test
RANDOM = np.random.default_rng(0)
IMAGES = [RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(21)]
QUESTIONS = ["what is this ?", "how many dogs are in this picture of a red cat on the left ?", "a"] * 7


@pytest.fixture(scope="module")
def engine(checkpoints: Path, device: torch.device) -> Iterator[Engine]:
    with Engine.load({task: str(checkpoints / task) for task in TASKS}, device=str(device), precision="fp32") as engine:
        yield engine


@pytest.fixture
def own(checkpoints: Path, device: torch.device) -> Iterator[Engine]:
    """An engine that a test may harm."""
    with Engine.load({"caption": str(checkpoints / "caption")}, device=str(device), precision="fp32") as engine:
        yield engine


def request(pixels: Any = IMAGES[0], texts: tuple[str, ...] = ("",), model: str = "caption", **options: Any) -> Request:
    return Request(model, "caption", pixels, texts, options_for("caption", options))


def inject(engine: Engine, monkeypatch: pytest.MonkeyPatch, before: Callable[[Sequence[Prepared]], None]) -> list[int]:
    """Let `before` see (and fail) the caption batches; returns their sizes as they come."""
    runner = engine._runners["caption"]
    finish = runner.finish
    sizes: list[int] = []

    def watched(begun: Begun) -> list[list[Result]]:
        sizes.append(len(begun.batch))
        before(begun.batch)
        return finish(begun)

    monkeypatch.setattr(runner, "finish", watched)
    return sizes


def hold(engine: Engine) -> threading.Event:
    """Keep the engine from starting a step until the event is set, so that requests gather."""
    event = threading.Event()
    engine._steps.call(event.wait)
    return event


class TestResults:
    """Single precision: the engine's answers are those of the model used by itself."""

    def drop_in(self, checkpoints: Path, task: Any) -> tuple[Any, BlipProcessor]:
        return CLASSES[task].from_pretrained(checkpoints / task), BlipProcessor.from_pretrained(checkpoints / task)

    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 1, "max_new_tokens": 7}, {"num_beams": 4, "repetition_penalty": 1.4}], ids=str
    )
    def test_captions(self, engine: Engine, checkpoints: Path, options: dict[str, Any]) -> None:
        model, processor = self.drop_in(checkpoints, "caption")
        pixels = processor(IMAGES, return_tensors="pt").pixel_values
        given = {"num_beams": 3, "max_new_tokens": 20} | options
        truth = processor.batch_decode(model.generate(pixels, **given), skip_special_tokens=True)
        assert [caption.text for caption in engine.caption(IMAGES, **options)] == truth
        prompts = [["a dog", "", "the picture of a red cat"][i % 3] for i in range(21)]
        texts = processor(text=prompts, padding=True, return_tensors="pt")
        truth = processor.batch_decode(model.generate(pixels, **texts, **given), skip_special_tokens=True)
        found = engine.caption(IMAGES, prompts, **options)
        assert [caption.text for caption in found] == truth
        assert all(caption.text.startswith(prompt) for caption, prompt in zip(found, prompts, strict=True))

    def test_answers(self, engine: Engine, checkpoints: Path) -> None:
        model, processor = self.drop_in(checkpoints, "vqa")
        inputs = processor(IMAGES, QUESTIONS, padding=True, return_tensors="pt")
        truth = processor.batch_decode(
            model.generate(**inputs, num_beams=3, max_new_tokens=9), skip_special_tokens=True
        )
        assert [answer.text for answer in engine.answer(IMAGES, QUESTIONS)] == truth
        assert len(set(truth)) > 2

    def test_matches(self, engine: Engine, checkpoints: Path) -> None:
        model, processor = self.drop_in(checkpoints, "itm")
        inputs = processor(IMAGES, QUESTIONS, padding=True, return_tensors="pt")
        with torch.no_grad():
            itm = model(**inputs).itm_score.softmax(-1)[:, 1]
            itc = model(**inputs, use_itm_head=False).itm_score.diagonal()
        found = engine.match(IMAGES, QUESTIONS)
        assert [match.itm for match in found] == pytest.approx(itm.tolist(), abs=1e-5)
        assert [match.itc for match in found] == pytest.approx(itc.tolist(), abs=1e-5)

    def test_embeddings_multiply_to_similarities(self, engine: Engine) -> None:
        pictures, texts = engine.embed(images=IMAGES), engine.embed(texts=QUESTIONS)
        assert pictures.shape == texts.shape == (21, 16)
        assert pictures.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(pictures, axis=1), 1, atol=1e-5)
        similarity = [match.itc for match in engine.match(IMAGES, QUESTIONS)]
        assert similarity == pytest.approx((pictures * texts).sum(1).tolist(), abs=1e-5)
        with pytest.raises(InputError, match="either images or texts"):
            engine.embed()
        with pytest.raises(InputError, match="serves caption, not itm"):
            engine.embed(images=IMAGES, model="caption")

    def test_several_sequences(self, engine: Engine) -> None:
        (caption,) = engine.caption(IMAGES[:1], num_return_sequences=3)
        ranking = [caption, *caption.alternatives]
        assert len({hypothesis.token_ids for hypothesis in ranking}) == 3
        assert [h.score for h in ranking] == sorted((h.score for h in ranking), reverse=True)
        (answer,) = engine.answer(IMAGES[:1], QUESTIONS[:1], num_return_sequences=2)
        assert answer.ranking[0] == (answer.text, answer.score)
        assert len(answer.ranking) == 2

    def test_samples_depend_on_the_seed_the_image_and_the_prompt(self, engine: Engine) -> None:
        def sample(**options: Any) -> list[str]:
            return [c.text for c in engine.caption(IMAGES[:6], do_sample=True, temperature=4.0, **options)]

        assert sample(seed=1) == sample(seed=1)
        assert sample(seed=1) != sample(seed=2)
        twice = engine.caption([IMAGES[0]] * 2, ["a dog", "a cat"], do_sample=True, temperature=9.0)
        assert twice[0].token_ids != twice[1].token_ids

    def test_every_kind_of_image(self, engine: Engine, tmp_path: Path) -> None:
        image = Image.fromarray(IMAGES[0])
        path = tmp_path / "image.png"
        image.save(path)
        found = engine.caption([IMAGES[0], image, path, str(path), path.read_bytes()])
        assert len(set(found)) == 1
        with pytest.raises(InputError, match="not int"):
            engine.caption([3])  # type: ignore[list-item]

    def test_an_image_given_many_times_is_encoded_once(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        resident, seen = engine._runners["vqa"].resident, []
        encode = resident.encode_images

        def counted(pixels: Any) -> Any:
            seen.append(len(pixels))
            return encode(pixels)

        monkeypatch.setattr(resident, "encode_images", counted)
        questions = QUESTIONS[:6]
        together = engine.answer([IMAGES[0]] * 3 + [IMAGES[1]] * 3, questions)
        assert sum(seen) == 2
        apart = [engine.answer([IMAGES[i // 3]], [question])[0] for i, question in enumerate(questions)]
        assert [answer.text for answer in together] == [answer.text for answer in apart]
        assert [answer.score for answer in together] == pytest.approx([answer.score for answer in apart], abs=1e-5)


class TestFaults:
    def test_an_input_error_hits_only_its_request(self, engine: Engine) -> None:
        bad = [
            (request(IMAGES[0][..., :2]), r"takes uint8 pixels \(height, width, 3\), not uint8 \(32, 32, 2\)"),
            (request(IMAGES[0][:0]), r"takes uint8 pixels \(height, width, 3\), not uint8 \(0, 32, 3\)"),
            (request(IMAGES[0].astype(np.float32)), "not float32"),
            (request(texts=()), "at least one text"),
            (request(texts=("dog " * 70,)), "text of 72 tokens is longer than"),
            (request(texts=("", "\ud800")), "is no Unicode text"),
            (request(model="other"), "no model 'other' is loaded; there is: caption, vqa, itm"),
            (request(model="vqa"), "model 'vqa' serves vqa, not caption"),
        ]
        futures = [future for entry, _ in bad for future in (engine.submit(request()), engine.submit(entry))]
        for good in futures[::2]:
            assert good.result(WAIT)[0].text == engine.caption(IMAGES[:1])[0].text  # type: ignore[union-attr]
        for future, (_, fault) in zip(futures[1::2], bad, strict=True):
            with pytest.raises(InputError, match=fault):
                future.result(WAIT)

    def test_options_are_checked_before_anything_runs(self, engine: Engine) -> None:
        with pytest.raises(OptionError, match="has no option 'beams'"):
            engine.caption(IMAGES, beams=3)
        with pytest.raises(OptionError, match="'num_beams' must be 1 to 32, not 0"):
            engine.answer(IMAGES, QUESTIONS, num_beams=0)
        with pytest.raises(InputError, match="21 images and 2 texts"):
            engine.answer(IMAGES, QUESTIONS[:2])

    def test_a_failure_hits_only_the_row_that_causes_it(self, own: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        truth = own.caption(IMAGES[:5])

        def fail(batch: Sequence[Prepared]) -> None:
            if any(entry.request.pixels is IMAGES[3] for entry in batch):
                raise RuntimeError("a kernel failed")

        sizes = inject(own, monkeypatch, fail)
        futures = self.gathered(own, IMAGES[:5])
        for place, future in enumerate(futures):
            if place == 3:
                with pytest.raises(RuntimeError, match="a kernel failed"):
                    future.result(WAIT)
            else:
                assert future.result(WAIT) == [truth[place]]
        assert sizes[-5:] == [1] * 5

    def gathered(self, engine: Engine, images: Sequence[Any]) -> "list[Future[list[Result]]]":
        held = hold(engine)
        futures = [engine.submit(request(image)) for image in images]
        held.set()
        return futures

    def test_out_of_memory_halves_the_batches(self, own: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        truth, before = own.caption(IMAGES), own._runners["caption"].resident.shapes
        failures = iter([True, True])

        def fail(batch: Sequence[Prepared]) -> None:
            if next(failures, False):
                raise torch.OutOfMemoryError("out of memory")

        inject(own, monkeypatch, fail)
        found = own.caption(IMAGES)
        assert [caption.text for caption in found] == [caption.text for caption in truth]
        assert [c.score for c in found] == pytest.approx([c.score for c in truth], abs=1e-4)
        assert own.oom_splits == 2
        shapes = own._runners["caption"].resident.shapes
        assert (shapes.images, shapes.groups) == (before.images // 4, before.groups // 4)

    def test_memory_that_is_never_enough_fails_the_rows(self, own: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(batch: Sequence[Prepared]) -> None:
            raise torch.OutOfMemoryError("out of memory")

        with monkeypatch.context() as context:
            inject(own, context, fail)
            for future in self.gathered(own, IMAGES[:3]):
                with pytest.raises(torch.OutOfMemoryError):
                    future.result(WAIT)
        assert len(own.caption(IMAGES)) == 21  # and the engine lives on

    def test_batches_that_cannot_be_made_smaller(
        self, own: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        errors: list[Exception] = [torch.OutOfMemoryError("out of memory")]

        def fail(batch: Sequence[Prepared]) -> None:
            if errors:
                raise errors.pop()

        def resize(shapes: Shapes) -> None:
            raise RuntimeError("no memory for this either")

        with monkeypatch.context() as context:
            inject(own, context, fail)
            context.setattr(own._runners["caption"], "resize", resize)
            assert len(own.caption(IMAGES)) == 21  # row by row
        assert "could not be made smaller" in caplog.text
        assert len(own.caption(IMAGES)) == 21

    def test_what_other_models_keep_goes_first(
        self, checkpoints: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = {task: str(checkpoints / task) for task in ("caption", "vqa")}
        errors: list[Exception] = [torch.OutOfMemoryError("out of memory")]
        forgotten: list[str] = []

        def fail(batch: Sequence[Prepared]) -> None:
            if errors:
                raise errors.pop()

        with Engine.load(models, device=str(device), precision="fp32") as engine, monkeypatch.context() as context:
            inject(engine, context, fail)
            for name, runner in engine._runners.items():
                context.setattr(runner, "forget", lambda name=name: forgotten.append(name))
            engine.caption(IMAGES[:3])
        assert set(forgotten) == set(models)

    def test_states_of_images_are_not_kept_for_their_vectors(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resident, made, most = engine._runners["itm"].resident, [], []
        encode = resident.image_states

        def watched(pixels: Sequence[Any]) -> list[torch.Tensor]:
            states = encode(pixels)
            made.extend(map(weakref.ref, states))
            most.append(sum(state() is not None for state in made))
            return states

        images = IMAGES * 7
        truth = engine.embed(images)
        monkeypatch.setattr(resident, "image_states", watched)
        assert np.array_equal(engine.embed(images), truth)
        assert len(most) == -(-len(images) // resident.shapes.images) > 1
        assert max(most) <= 2

    def test_a_caller_that_gives_up_harms_nobody(self, own: Engine) -> None:
        held = hold(own)
        futures = [own.submit(request(image)) for image in IMAGES[:4]]
        assert not futures[1].cancel()
        held.set()
        for future in futures:
            assert len(future.result(WAIT)) == 1
        assert len(own.caption(IMAGES)) == 21


class TestLife:
    def test_close_finishes_what_is_queued_and_refuses_more(self, checkpoints: Path, device: torch.device) -> None:
        threads = set(threading.enumerate())
        engine = Engine.load({"caption": str(checkpoints / "caption")}, device=str(device), precision="fp32")
        held = hold(engine)
        futures = [engine.submit(request(image)) for image in IMAGES]
        held.set()
        engine.close()
        assert all(future.done() and len(future.result()) == 1 for future in futures)
        with pytest.raises(EngineClosedError, match="the engine is closed"):
            engine.submit(request()).result(WAIT)
        engine.close()
        assert set(threading.enumerate()) <= threads

    def test_many_threads_share_it(self, engine: Engine) -> None:
        truth = engine.caption(IMAGES)
        found: dict[int, Any] = {}

        def ask(place: int) -> None:
            found[place] = engine.caption(IMAGES[place : place + 7])

        threads = [threading.Thread(target=ask, args=(place,)) for place in (0, 7, 14)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert found[0] + found[7] + found[14] == truth

    def test_names(self, checkpoints: Path) -> None:
        models = {"mine": str(checkpoints / "vqa"), "caption": str(checkpoints / "caption")}
        with Engine.load(models, device="cpu", precision="fp32") as engine:
            assert engine.answer(IMAGES[:1], QUESTIONS[:1], model="mine")
            with pytest.raises(InputError, match="no model 'vqa' is loaded; there is: mine, caption"):
                engine.answer(IMAGES[:1], QUESTIONS[:1])
            info = engine.load_model("caption", str(checkpoints / "caption"), "caption")
            assert info == ModelInfo(
                "caption", "caption", models["caption"], None, info.weights_sha256, (32, 32), "fp32", "cpu"
            )
            assert engine.load_model("caption", str(checkpoints / "caption"), "caption") is info
            with pytest.raises(CheckpointError, match=f"the name 'caption' is taken by {checkpoints / 'caption'}"):
                engine.load_model("caption", str(checkpoints / "vqa"), "caption")
            says = "vqa is a question-answering checkpoint; task caption needs a captioning one, such as Salesforce/"
            with pytest.raises(CheckpointError, match=says):
                engine.load_model("other", str(checkpoints / "vqa"), "caption")
            with pytest.raises(InputError, match="no model 'other'"):
                engine.caption(IMAGES[:1], model="other")

    def test_a_checkpoint_that_does_not_say_its_task(self, checkpoints: Path, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "model", "itm")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        del config["architectures"]
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="name it caption, vqa or itm"):
            Engine.load({"mine": str(tmp_path / "model")}, device="cpu")
        with Engine.load({"itm": str(tmp_path / "model")}, device="cpu", precision="fp32") as engine:
            assert len(engine.match(IMAGES, QUESTIONS)) == 21

    @pytest.mark.parametrize(
        ("given", "fault"),
        [
            ({"device": "gpu"}, "device 'gpu' is unknown"),
            ({"device": "cuda:99"}, r"device 'cuda:99' is not here: torch sees .*; use "),
            ({"precision": "int4"}, "precision 'int4' is unknown; use one of auto, fp32"),
        ],
    )
    def test_devices_and_precisions(self, given: dict[str, str], fault: str) -> None:
        with pytest.raises(OptionError, match=fault):
            Engine(**given)

    def test_a_model_without_a_name(self) -> None:
        with pytest.raises(OptionError, match=r"given by name: \{'caption': 'demo'\}"):
            Engine.load("demo")  # type: ignore[arg-type]

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_half_precision_gives_float32_scores(self, checkpoints: Path, precision: str, device: torch.device) -> None:
        models = {task: str(checkpoints / task) for task in TASKS}
        with Engine.load(models, device=str(device), precision=precision) as engine:
            assert all(np.isfinite(caption.score) for caption in engine.caption(IMAGES[:3]))
            assert all(np.isfinite(answer.score) for answer in engine.answer(IMAGES[:3], QUESTIONS[:3]))
            assert all(0 <= match.itm <= 1 for match in engine.match(IMAGES[:3], QUESTIONS[:3]))
            assert engine.embed(images=IMAGES[:3]).dtype == np.float32


def test_slips_in_calls_are_told(engine: Engine) -> None:
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    for call in (
        lambda: engine.caption("cat.jpg"),
        lambda: engine.caption(Image.fromarray(picture)),
        lambda: engine.match([picture], "a dog"),
        lambda: engine.embed(texts="a dog"),
        lambda: engine.caption(["/nowhere/cat.jpg"]),
        lambda: engine.caption([picture.astype(np.float32)]),
        lambda: engine.caption([picture[:, :, 0]]),
        lambda: engine.caption([None]),
    ):
        with pytest.raises(InputError) as told:
            call()
        assert "\n" not in str(told.value)
    assert engine.embed(images=[]).shape == engine.embed(texts=[]).shape
    with pytest.raises(CheckpointError, match="name it caption, vqa, itm"):
        Engine.load({"mine": "demo"}, device="cpu")


def test_a_stack_of_images_is_as_many_images(engine: Engine) -> None:
    stack = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    assert engine.caption(stack) == engine.caption(list(stack))
    assert len({caption.score for caption in engine.caption(stack)}) > 1
