"""Training on drawings works, and the shipped checkpoints are what transformers would make of the same files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip_engine.errors import CheckpointError
from blip_engine.processor import BlipProcessor
from blip_engine.requests import TASKS, Task
from blip_engine.resident import MODEL_CLASSES
from blip_engine.shapes import demo_checkpoint
from blip_engine.shapes.evaluate import evaluate, pixels
from blip_engine.shapes.evaluate import main as evaluate_main
from blip_engine.shapes.scenes import held_out_drawings
from blip_engine.shapes.texts import VOCABULARY
from blip_engine.shapes.train import RECIPES, Lesson, main, new_model, train

BATCH = list(held_out_drawings(8, seed=9))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other's steps on a shared machine take minutes for what one does in a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", TASKS)
def test_a_short_training_lowers_the_loss(task: Task) -> None:
    torch.manual_seed(0)
    model = new_model(task, text_layers=1)
    recipe = replace(RECIPES[task], steps=30, images=8, texts=2)
    lesson = Lesson(task, model, recipe.texts)
    with torch.no_grad():
        before = lesson.loss(BATCH, Random(0)).item()
    steps = [step for step, _ in train(task, model, recipe)]
    with torch.no_grad():
        after = lesson.loss(BATCH, Random(0)).item()
    assert steps == [30]
    # Which of two texts matches takes longer than 30 steps to see; which words there are does not.
    assert after < before * (0.95 if task == "itm" else 0.6)


def test_training_writes_a_checkpoint_that_can_be_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["itm", str(tmp_path), "--steps", "1"]) == 0
    assert {path.name for path in (tmp_path / "itm").iterdir()} >= {
        "config.json", "model.safetensors", "preprocessor_config.json", "vocab.txt", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert main(["itm", str(tmp_path / "again"), "--start", str(tmp_path / "itm"), "--steps", "1"]) == 0
    capsys.readouterr()
    assert main(["itm", str(tmp_path), "--start", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_task_has_no_demo_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="caption, vqa, itm"):
        demo_checkpoint("paint")  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
def test_a_shipped_checkpoint_is_small_and_complete(task: Task) -> None:
    files = {path.name: path.stat().st_size for path in demo_checkpoint(task).iterdir()}
    assert files["model.safetensors"] <= 6_000_000
    model = MODEL_CLASSES[task].from_pretrained(demo_checkpoint(task))
    assert sum(weight.numel() for weight in model.parameters()) <= 1_450_000
    assert model.dtype == torch.float32
    text = model.config.text_config
    assert (text.bos_token_id, text.vocab_size) == (len(VOCABULARY), len(VOCABULARY) + 2)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_shipped_checkpoint_knows_held_out_drawings(task: Task, precision: torch.dtype) -> None:
    model = MODEL_CLASSES[task].from_pretrained(demo_checkpoint(task), dtype=precision)
    tokenizer = BlipProcessor.from_pretrained(demo_checkpoint(task)).tokenizer
    assert evaluate(task, model, tokenizer, 150, seed=2)["all"] >= 0.97


def test_the_evaluation_command_prints_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(["itm", "demo", "--count", "10", "--precision", "bf16"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["all", "match", "mismatch"]
    assert evaluate_main(["itm", "/nowhere"]) == 1


THEIRS: dict[Task, Any] = {
    "caption": transformers.BlipForConditionalGeneration,
    "vqa": transformers.BlipForQuestionAnswering,
    "itm": transformers.BlipForImageTextRetrieval,
}


def _inputs(task: Task, tokenizer: Any) -> dict[str, torch.Tensor]:
    texts = [each.scene.caption for each in BATCH]
    if task == "vqa":  # of one length: transformers lets the answer see a question's padding
        texts = ["what color is the background?"] * len(BATCH)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")} | {"pixel_values": pixels(BATCH)}
    if task == "vqa":
        inputs["labels"] = torch.tensor([[len(VOCABULARY), 9, 3]] * len(BATCH))
    return inputs


@pytest.mark.parametrize("task", TASKS)
def test_transformers_loads_it_whole_and_computes_the_same(task: Task) -> None:
    folder = demo_checkpoint(task)
    theirs, report = THEIRS[task].from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    theirs = theirs.eval()
    ours = MODEL_CLASSES[task].from_pretrained(folder)
    inputs = _inputs(task, transformers.BertTokenizer.from_pretrained(folder))
    assert all(torch.equal(value, _inputs(task, BlipProcessor.from_pretrained(folder).tokenizer)[name])
               for name, value in inputs.items())  # fmt: skip
    name = {"caption": "logits", "vqa": "loss", "itm": "itm_score"}[task]
    with torch.no_grad():
        torch.testing.assert_close(getattr(ours(**inputs), name), getattr(theirs(**inputs), name), atol=1e-4, rtol=1e-4)
        if task == "caption":
            tokenizer = BlipProcessor.from_pretrained(folder).tokenizer  # transformers fills up with [SEP], not [PAD]
            captions = [
                tokenizer.batch_decode(model.generate(inputs["pixel_values"], num_beams=3, max_new_tokens=20), True)
                for model in (ours, theirs)
            ]
            assert captions[0] == captions[1]
        if task == "itm":
            similar = [model(**inputs, use_itm_head=False).itm_score for model in (ours, theirs)]
            torch.testing.assert_close(*similar, atol=1e-4, rtol=1e-4)


def test_the_image_processor_is_read_by_transformers_and_gives_what_training_saw() -> None:
    for task in TASKS:
        theirs = BlipImageProcessorPil.from_pretrained(demo_checkpoint(task))
        values = theirs([each.image() for each in BATCH], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(values, pixels(BATCH), atol=1e-5, rtol=0)


def test_similarity_ranks_a_drawings_own_caption_first() -> None:
    folder = demo_checkpoint("itm")
    model, processor = MODEL_CLASSES["itm"].from_pretrained(folder), BlipProcessor.from_pretrained(folder)
    drawn = list({each.scene.caption: each for each in held_out_drawings(100, seed=4)}.values())[:50]
    given = processor.tokenizer([each.scene.caption for each in drawn], padding=True, return_tensors="pt")
    with torch.no_grad():
        cosines = model(given["input_ids"], pixels(drawn), use_itm_head=False, attention_mask=given["attention_mask"])
    best = cosines.itm_score.argmax(dim=1)
    assert (best == torch.arange(len(drawn))).float().mean() >= 0.8
