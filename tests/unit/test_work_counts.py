"""How much work the engine does, counted: a guard against regressions that no noise can touch.

Products (FLOP), copies of keys and values (bytes), waits for the device (calls that need a number on the host), vision
passes and image decodes, on a small model and through the code that a worker runs. What is needed is said by
`benchmarks.flops`.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_config
from work_counting import counting

from benchmarks import flops
from benchmarks.common import config_of
from blip_engine import BlipConfig, Engine
from blip_engine.checkpoint import find_checkpoint
from blip_engine.generation import Memory, Prompt, decoding
from blip_engine.requests import Answer, GenerationOptions, Request, Task, options_for
from blip_engine.resident import LENGTH_STEP as LENGTH
from blip_engine.resident import ResidentModel, Shapes
from blip_engine.runner import Runner, runner_for
from orchestrator.contract import Row
from workers import load
from workers.loader import LoaderLimits
from workers.messages import Checkpoint, Run
from workers.pipeline import ChunkRun, JobContext, Lane
from workers.slots import Slots

CONFIG = small_config()
SETTINGS = BlipConfig(**CONFIG)
SHAPES = Shapes(4, 16)
SEEN = 17  # tokens of an image: a number that no other dimension of the small model has
BEAMS, STEPS = 3, 6
WORDS = ("dog", "cat", "picture", "photo", "red", "blue", "green", "run")


def runner_of(checkpoints: Path, task: Task) -> Runner[Any]:
    resident: ResidentModel[Any] = ResidentModel(
        find_checkpoint(checkpoints / task), task, torch.device("cpu"), torch.float32
    )
    resident.shapes = SHAPES
    return runner_for(task, resident)


def requests(task: Task, images: int, texts: int, steps: int = STEPS, beams: int = BEAMS) -> list[Request]:
    """`texts` of LENGTH tokens about each image; captions have none."""
    options = {} if task == "itm" else {"num_beams": beams, "min_new_tokens": steps, "max_new_tokens": steps}
    words = tuple(" ".join([word] * (LENGTH - 2)) for word in WORDS[:texts]) if task != "caption" else ("",)
    pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    return [Request(task, task, image, words, options_for(task, options)) for image in pixels]


def run(runner: Runner[Any], asked: Sequence[Request]) -> Any:
    return runner.run([runner.prepare(request) for request in asked])


def needed(task: Task, images: int, texts: int, beams: int = BEAMS, steps: int = STEPS) -> int:
    """FLOP that images with so many texts each need."""
    steps = 0 if task == "itm" else steps
    work = sum(flops.by_stage(SETTINGS, task, images, texts * (task != "caption"), LENGTH, beams, steps).values())
    if task == "itm":  # the matching head and the two projections
        width, shared = SETTINGS.text_config.hidden_size, SETTINGS.image_text_hidden_size
        work += images * 2 * (texts * (2 * width + width * shared) + SETTINGS.vision_config.hidden_size * shared)
    return work


class TestFormulas:
    """Against the figures that follow from the published models' sizes."""

    def test_base(self) -> None:
        base = config_of("base")
        assert flops.vision(base) / 1e9 == pytest.approx(110.97, abs=0.01)
        assert flops.cross_keys(base) / 1e9 == pytest.approx(16.34, abs=0.01)
        assert flops.decode_token(base) / 1e9 == pytest.approx(0.2675, abs=0.0001)
        assert flops.head(base) / flops.decode_token(base) == pytest.approx(0.18, abs=0.005)
        assert flops.caption(base, beams=3, tokens=20) / 1e9 == pytest.approx(143.4, abs=0.1)
        assert flops.cross_bytes(base, 2) / 1e6 == pytest.approx(21.3, abs=0.1)
        assert flops.decoder_bytes(base, 2) / 1e6 == pytest.approx(246, abs=1)
        assert flops.read_text(base, 10, cross=True) / 1e9 == pytest.approx(2.2, abs=0.05)
        assert flops.read_text(base, 35, cross=True) / 1e9 == pytest.approx(7.7, abs=0.06)
        assert flops.read_text(base, 35, cross=False) / 1e9 == pytest.approx(6.0, abs=0.06)

    def test_large(self) -> None:
        large = config_of("large")
        assert flops.vision(large) / 1e9 == pytest.approx(382.1, abs=0.1)
        assert flops.cross_keys(large) / 1e9 == pytest.approx(21.78, abs=0.01)


WORKLOADS = [("caption", 16, 1), ("vqa", 16, 1), ("vqa", 16, 8), ("itm", 16, 1), ("itm", 16, 8)]


@pytest.mark.parametrize(("task", "images", "texts"), WORKLOADS)
def test_products(checkpoints: Path, task: Task, images: int, texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full batches compute what is needed and not a product more: no pass per question, no projection per beam."""
    runner = runner_of(checkpoints, task)
    with counting(runner, monkeypatch) as work:
        run(runner, requests(task, images, texts))
    assert work.flop == needed(task, images, texts)
    assert sum(work.vision_rows) == images


@pytest.mark.parametrize("beams", [1, 3, 8])
def test_beams_share_the_image(checkpoints: Path, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(checkpoints, "caption")
    with counting(runner, monkeypatch) as work:
        run(runner, requests("caption", 16, 1, beams=beams))
    assert work.flop == needed("caption", 16, 1, beams)


def copied(runner: Runner[Any], asked: Sequence[Request], monkeypatch: pytest.MonkeyPatch) -> float:
    """Bytes of image states, keys and values that were copied behind their projection, in keys and values needed."""
    with counting(runner, monkeypatch) as work:
        run(runner, asked)
    return work.copies.cross / (len(asked) * flops.cross_bytes(SETTINGS, 4))


class TestKeysAndValues:
    """Bytes copied: on a GPU decoding is bound by them."""

    @pytest.mark.parametrize(("task", "images", "texts"), WORKLOADS)
    def test_of_images(
        self, checkpoints: Path, task: Task, images: int, texts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Blocks of images are joined once, with the states; texts and beams copy nothing."""
        states = SETTINGS.vision_config.hidden_size * SEEN * 4 / flops.cross_bytes(SETTINGS, 4)
        assert copied(runner_of(checkpoints, task), requests(task, images, texts), monkeypatch) <= 1 + states

    @pytest.mark.parametrize(("task", "images", "texts"), [("vqa", 4, 8), ("itm", 4, 8), ("caption", 4, 1)])
    def test_of_images_are_shared(
        self, checkpoints: Path, task: Task, images: int, texts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A block of images, all of whose texts fit one batch, needs no copy, or one to lay them out for attention."""
        runner = runner_of(checkpoints, task)
        runner.resident.shapes = Shapes(images, images)
        assert copied(runner, requests(task, images, texts), monkeypatch) <= 1

    def own(self, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> int:
        runner = runner_of(checkpoints, "caption")
        with counting(runner, monkeypatch) as work:
            run(runner, requests("caption", 16, 1))
        return work.copies.own

    def token_bytes(self) -> int:
        """Of one token of one row, all layers."""
        return 2 * SETTINGS.text_config.num_hidden_layers * SETTINGS.text_config.hidden_size * 4

    def test_of_beams(self, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every token is written once. Beams that follow their parents copy nothing."""
        written = 16 * (1 + BEAMS * (STEPS - 1))
        assert self.own(checkpoints, monkeypatch) == written * self.token_bytes()


class TestWaits:
    """Calls that wait for the device: behind each one it runs dry until it is told more."""

    def waits(self, checkpoints: Path, task: Task, steps: int, monkeypatch: pytest.MonkeyPatch) -> int:
        runner = runner_of(checkpoints, task)
        with counting(runner, monkeypatch) as work:
            run(runner, requests(task, 16, 1, steps))
        return work.waits.calls.total()

    def per_step(self, checkpoints: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> float:
        few, many = (self.waits(checkpoints, task, steps, monkeypatch) for steps in (4, 12))
        return (many - few) / 8

    @pytest.mark.parametrize("task", ["caption", "vqa"])
    def test_one_a_step_at_most(self, checkpoints: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.per_step(checkpoints, task, monkeypatch) <= 1

    def test_none_in_the_decoding_itself(self, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU is asked every few tokens whether all is settled, a CPU after each."""
        runner = runner_of(checkpoints, "caption")
        decoder, ids = runner.resident.model.text_decoder, torch.full((4, 1), SETTINGS.text_config.bos_token_id)
        states = torch.zeros(4, SEEN, SETTINGS.vision_config.hidden_size)
        options = options_for("caption", {"repetition_penalty": 1.2, "min_new_tokens": 3})
        assert isinstance(options, GenerationOptions)
        with counting(runner, monkeypatch) as work:
            looks = sum(1 for _ in decoding(decoder, Prompt(ids, None), Memory(states), options, every=5))
        assert looks == 4  # of 20 tokens
        assert work.waits.calls.total() == 0

    @pytest.mark.parametrize(("task", "most"), [("caption", 3), ("vqa", 3), ("itm", 3)])
    def test_results_are_read_at_once(
        self, checkpoints: Path, task: Task, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Beside those of the steps: tokens, lengths and scores of a batch."""
        steps = 4
        found = self.waits(checkpoints, task, steps, monkeypatch) - steps * self.per_step(
            checkpoints, task, monkeypatch
        )
        assert found <= most


class TestBatches:
    """What the engine makes of a queue: blank rows cost as much as others."""

    def vision_rows(self, checkpoints: Path, texts: int, monkeypatch: pytest.MonkeyPatch) -> int:
        """Rows of the vision tower for 16 images that wait in the queue."""
        with Engine.load({"vqa": str(checkpoints / "vqa")}, device="cpu", precision="fp32") as engine:
            resident = engine._runners["vqa"].resident
            resident.shapes = SHAPES
            rows: list[int] = []
            forward = resident.model.vision_model.forward

            def seen(pixels: torch.Tensor) -> Any:
                rows.append(len(pixels))
                return forward(pixels)

            asked, held = requests("vqa", 16, texts), threading.Event()
            monkeypatch.setattr(resident.model.vision_model, "forward", seen)
            engine._steps.call(held.wait)  # until all are in the queue
            futures = [engine.submit(request) for request in asked]
            held.set()
            for future in futures:
                future.result(60)
            return sum(rows)

    @pytest.mark.parametrize("texts", [1, 4, 8])
    def test_no_blank_images_while_others_wait(
        self, checkpoints: Path, texts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.vision_rows(checkpoints, texts, monkeypatch) == 16

    def test_short_texts_share_a_batch(self, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = runner_of(checkpoints, "vqa")
        asked = requests("vqa", 16, 1)
        shorter = [replace(request, texts=("dog",)) for request in asked]
        with counting(runner, monkeypatch) as alone:
            run(runner, asked)
        with counting(runner, monkeypatch) as mixed:
            run(runner, asked[:8] + shorter[8:])
        assert mixed.flop == alone.flop


class TestLoading:
    """Fetches, decodes and resizes per image."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> "Counter[str]":
        calls: Counter[str] = Counter()
        for name in ("fetch", "decode_image", "resized_pixels"):
            monkeypatch.setattr(load, name, self.counted(calls, name))
        return calls

    def counted(self, calls: "Counter[str]", name: str) -> Callable[..., Any]:
        real = getattr(load, name)

        def call(*args: Any, **more: Any) -> Any:
            calls[name] += 1
            return real(*args, **more)

        return call

    def work(self, folder: Path, questions: int) -> None:
        """Rows about two images through a lane that loads as a loader process does."""
        for number in range(2):
            Image.new("RGB", (80, 60), (90 * number, 0, 0)).save(folder / f"{number}.jpg")
        rows: list[Any] = [
            Row(number, f"{number % 2}.jpg", None, (f"question {number}",), False, {}) for number in range(questions)
        ]
        checkpoint = Checkpoint("m", "m", None, "0" * 64, (32, 32))
        job = JobContext("vqa", options_for("vqa"), checkpoint, lambda image: str(folder / image))
        children = _Loading()
        records = Lane(range(4), children, children).run(ChunkRun(job, rows, lambda: None))  # type: ignore[arg-type]
        assert [record["result"]["answer"] for record in records] == [f"question {n}" for n in range(questions)]

    def test_once_per_image(self, tmp_path: Path, calls: "Counter[str]") -> None:
        self.work(tmp_path, 60)
        assert calls == {"fetch": 2, "decode_image": 2, "resized_pixels": 2}

    def test_once_per_image_with_many_questions(self, tmp_path: Path, calls: "Counter[str]") -> None:
        self.work(tmp_path, 300)
        assert calls == {"fetch": 2, "decode_image": 2, "resized_pixels": 2}


class _Loading:
    """Loads in this process; the engine repeats the question."""

    def __init__(self) -> None:
        self._slots, self._limits = Slots(4), LoaderLimits(10**6, 10**6, 5.0, 30.0)

    def load(self, slot: int, location: str, size: tuple[int, int], replies: "SimpleQueue[Any]", token: Any) -> None:
        data = load.fetched(location, self._limits)
        assert isinstance(data, bytes)
        replies.put((token, load.decode_into(self._slots, slot, data, size, self._limits)))

    def submit(self, run: Run, replies: "SimpleQueue[Any]", token: Any) -> None:
        replies.put((token, [Answer(text, 0.0) for text in run.texts]))
