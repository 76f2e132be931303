"""The fine-tuning example of docs/ runs, learns, and saves what the engine loads."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from blip_engine import BlipConfig, BlipForImageTextRetrieval, Engine
from blip_engine.requests import Task
from blip_engine.shapes import demo_checkpoint
from blip_engine.shapes.scenes import held_out_drawings
from blip_engine.training import ImageTextObjective

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a shared machine threads wait for each other longer than one of them works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_example", DOCS / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_learns_the_new_wording(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([str(tmp_path), "--steps", "40"])
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 10
    unseen = list(held_out_drawings(24, seed=5))
    with Engine.load({"caption": str(tmp_path)}) as engine:
        said = [caption.text for caption in engine.caption([each.image() for each in unseen])]
        first_four = [
            caption.text for caption in engine.caption([each.image() for each in held_out_drawings(4, seed=0)])
        ]
    assert printed.splitlines()[-4:] == first_four
    right = [text == example.wording(each.scene) for text, each in zip(said, unseen, strict=True)]
    assert sum(right) >= 16  # 40 steps; the old wording would be right never


def test_the_wording_is_in_the_vocabulary(example: ModuleType) -> None:
    batch = next(example.batches(seed=1))
    tokenizer = example.BlipProcessor.from_pretrained(demo_checkpoint("caption")).tokenizer
    texts = [example.wording(each.scene) for each in batch]
    assert tokenizer.batch_decode(tokenizer.encode_rows(texts), skip_special_tokens=True) == texts
    assert {text.split()[1] for text in texts} == {"is", "are"}
    assert not any("background" in text for text in texts)


def test_the_matcher_learns_the_new_wording(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([str(tmp_path), "--task", "itm", "--steps", "12"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[:3]] == ["1", "10", "12"]
    assert all(0 <= float(line.split()[0]) <= 1 for line in printed[3:])
    assert len(printed) == 7
    unseen = list(held_out_drawings(16, seed=5))
    images, texts = [each.image() for each in unseen], [example.wording(each.scene) for each in unseen]

    def loss(checkpoint: Path) -> float:
        objective = ImageTextObjective(BlipForImageTextRetrieval.from_pretrained(checkpoint))
        inputs = example.BlipProcessor.from_pretrained(checkpoint)(images, texts, padding=True, return_tensors="pt")
        return float(objective(**inputs, generator=torch.Generator().manual_seed(0)).loss.detach())

    assert loss(tmp_path) < loss(demo_checkpoint("itm")) / 2


def test_the_lines_for_own_pictures_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.+?)```", (DOCS / "finetune.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 2
    monkeypatch.chdir(tmp_path)
    for name, each in zip(("cat.jpg", "dog.jpg"), held_out_drawings(2, seed=0), strict=True):
        each.image().save(name)
    names: dict[str, object] = {}
    for block, model, task in zip(code, ("image-captioning", "itm"), ("caption", "itm"), strict=True):
        words = example_words(task)
        own = re.sub(rf"Salesforce/blip-{model}-base[a-z-]*", str(demo_checkpoint(task)), block)
        exec(own.replace("30523", str(words)), names)
        trained = names["model"]
        assert isinstance(trained, torch.nn.Module)
        assert all(weight.grad is not None for weight in trained.parameters())
    assert isinstance(names["loss"], torch.Tensor)
    assert names["loss"].isfinite()
    assert (tmp_path / "OUT" / "model.safetensors").is_file()


def example_words(task: Task) -> int:
    """The number of [ENC], the last word of the bundled model."""
    return int(BlipConfig.from_json_file(demo_checkpoint(task) / "config.json").text_config.vocab_size) - 1
