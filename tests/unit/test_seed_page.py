"""Every code block of transformers' BLIP page, with only the import, the checkpoints and the addresses changed.

A block runs as it stands for ours, and for transformers where it can; the values it leaves behind are compared.
"""

import ast
import importlib.util
import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import utils as hub_utils
from PIL import Image
from small_models import save_checkpoint, small_config
from torch import Tensor
from twins import assert_close

import blip_engine
from blip_engine.requests import DEFAULT_MODELS, TASKS

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")

PAGE = Path(__file__).parents[1] / "fixtures" / "seed_examples.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
OURS, THEIRS = "blip_engine", "transformers"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What is changed in a block besides its import: checkpoints to small local ones, addresses to one on loopback."""
    root = tmp_path_factory.mktemp("seed")
    config = small_config({"hidden_size": 32})  # transformers can do VQA only where both widths are equal
    found = {DEFAULT_MODELS[task]: str(save_checkpoint(root / task, task, **config)) for task in TASKS}
    drawing = Image.linear_gradient("L").convert("RGB")
    drawing.paste("red", (40, 60, 150, 200))
    drawing.save(root / "cat.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    local = f"http://127.0.0.1:{server.server_address[1]}/cat.png"
    yield found | {address: local for block in BLOCKS for address in re.findall(r'"(https?://[^"]+)"', block)}
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page imports httpx; where only the hub's own copy is installed, that is it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if importlib.util.find_spec("httpx") is None:
        monkeypatch.setitem(sys.modules, "httpx", hub_utils.httpx)  # type: ignore[attr-defined]


def run(number: int, changes: dict[str, str], library: str = OURS, **names: Any) -> dict[str, Any]:
    """Run a block; returns its names, and the value of a last expression as `value`."""
    lines = BLOCKS[number].splitlines()
    if lines[0].startswith(">>> "):
        lines = [line[4:] for line in lines if line.startswith((">>>", "..."))]
    source = "\n".join(lines).replace("from transformers import", f"from {library} import")
    for old, new in changes.items():
        source = source.replace(f'"{old}"', repr(new))
    assert "Salesforce/" not in re.sub("#.*", "", source)
    statements = ast.parse(source).body
    last = statements.pop() if isinstance(statements[-1], ast.Expr) else None
    exec(compile(ast.Module(statements, []), f"block {number}", "exec"), names)
    if isinstance(last, ast.Expr):
        names["value"] = eval(compile(ast.Expression(last.value), f"block {number}", "eval"), names)
    return names


def assert_same_inputs(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name])


def test_these_are_the_blocks() -> None:
    assert len(BLOCKS) == 11
    for library in (blip_engine, transformers):
        for names in re.findall(r"from transformers import (.+)", "\n".join(BLOCKS)):
            assert all(hasattr(library, name.strip()) for name in names.split(","))


@pytest.mark.filterwarnings("ignore:there is no GPU 0 here:UserWarning")
def test_block_0_the_pipeline(changes: dict[str, str]) -> None:
    found = run(0, changes)["value"]
    with pytest.raises(KeyError, match="visual-question-answering"):
        run(0, changes, THEIRS)  # transformers 5 has no such task any more
    assert found == [{"answer": run(1, changes)["value"]}]  # the same question by hand


def test_block_1_the_auto_model(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = run(1, changes)
    if importlib.util.find_spec("accelerate") is None:  # without it transformers has no device_map
        load = transformers.AutoModelForVisualQuestionAnswering.from_pretrained
        monkeypatch.setattr(
            transformers.AutoModelForVisualQuestionAnswering, "from_pretrained", lambda name, device_map: load(name)
        )
    theirs = run(1, changes, THEIRS)
    assert mine["value"] == theirs["value"]
    assert torch.equal(mine["output"], theirs["output"])
    assert_same_inputs(mine["inputs"], theirs["inputs"])
    assert mine["inputs"]["pixel_values"].dtype is torch.float16
    assert mine["value"]


class TestConfigurations:
    def both(self, number: int, **names: str) -> tuple[Any, Any]:
        mine = run(number, {}, **{name: getattr(blip_engine, name) for name in names})
        with torch.device("meta"):
            theirs = run(number, {}, THEIRS, **{name: getattr(transformers, name) for name in names})
        shapes = {name: value.shape for name, value in theirs["model"].state_dict().items()}
        assert {name: value.shape for name, value in mine["model"].state_dict().items()} == shapes
        assert mine["configuration"] is mine["model"].config
        assert not mine["model"].state_dict()[next(iter(shapes))].is_meta
        return mine, theirs

    def test_block_2_the_whole(self) -> None:
        with pytest.raises(NameError, match="BlipTextConfig"), torch.device("meta"):
            run(2, {})  # the page forgot two imports
        mine, theirs = self.both(2, BlipTextConfig="", BlipVisionConfig="")
        other = theirs["config"].to_dict()
        for name, value in mine["config"].to_dict().items():
            for key, inner in value.items() if isinstance(value, dict) else [(name, value)]:
                assert (other[name][key] if isinstance(value, dict) else other[key]) == inner

    @pytest.mark.parametrize("number", [3, 4])
    def test_blocks_3_and_4_the_towers(self, number: int) -> None:
        mine, theirs = self.both(number)
        other = theirs["configuration"].to_dict()
        assert {key: other[key] for key in mine["configuration"].to_dict()} == mine["configuration"].to_dict()


@pytest.mark.filterwarnings("ignore:.*Newly initialised:UserWarning")
class TestContrastive:
    """transformers gives a captioning checkpoint a random text tower, so its own values cannot be compared.

    Its model with our weights says what the values are.
    """

    def theirs(self, model: Any) -> Any:
        twin = transformers.BlipModel(transformers.BlipConfig(**model.config.to_dict())).eval()
        twin.load_state_dict(model.state_dict(), strict=True)
        return twin

    def test_block_5_similarities(self, changes: dict[str, str]) -> None:
        mine, theirs = run(5, changes), run(5, changes, THEIRS)
        assert_same_inputs(mine["inputs"], theirs["inputs"])
        truth = self.theirs(mine["model"])(**theirs["inputs"])
        assert_close(mine["logits_per_image"], truth.logits_per_image)
        assert_close(mine["probs"], truth.logits_per_image.softmax(dim=1))
        assert mine["probs"].shape == theirs["probs"].shape == (1, 2)
        own = theirs["outputs"].vision_model_output.last_hidden_state  # the tower that transformers does load
        assert_close(mine["outputs"].vision_model_output.last_hidden_state, own)

    def test_block_6_texts(self, changes: dict[str, str]) -> None:
        mine, theirs = run(6, changes), run(6, changes, THEIRS)
        assert_same_inputs(mine["inputs"], theirs["inputs"])
        truth = self.theirs(mine["model"]).get_text_features(**theirs["inputs"])
        self.assert_same_features(mine["text_features"], truth)

    def test_block_7_images(self, changes: dict[str, str]) -> None:
        mine, theirs = run(7, changes), run(7, changes, THEIRS)
        assert_same_inputs(mine["inputs"], theirs["inputs"])
        truth = self.theirs(mine["model"]).get_image_features(**theirs["inputs"])
        self.assert_same_features(mine["image_features"], truth)
        assert_close(mine["image_features"].last_hidden_state, theirs["image_features"].last_hidden_state)

    def assert_same_features(self, ours: Any, theirs: Any) -> None:
        assert ours.keys() == tuple(theirs.keys())
        for name, truth in theirs.items():
            assert_close(ours[name], truth)


@pytest.mark.parametrize("number", [8, 9])
def test_blocks_8_and_9_captions_and_matches(number: int, changes: dict[str, str]) -> None:
    mine, theirs = run(number, changes), run(number, changes, THEIRS)
    assert_same_inputs(mine["inputs"], theirs["inputs"])
    assert mine["outputs"].keys() == tuple(theirs["outputs"].keys())
    for ours_, theirs_ in zip(mine["outputs"], theirs["outputs"].to_tuple(), strict=True):
        assert_close(ours_, theirs_)


def test_block_10_training_and_answering(changes: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    mine = run(10, changes)
    printed = capsys.readouterr().out
    assert printed.strip()
    theirs = run(10, changes, THEIRS)
    assert printed == capsys.readouterr().out
    assert_close(mine["loss"], theirs["loss"])
    assert torch.equal(mine["outputs"], theirs["outputs"])
    gradients: dict[str, Tensor] = {name: p.grad for name, p in theirs["model"].named_parameters()}
    assert gradients.keys() == dict(mine["model"].named_parameters()).keys()
    for name, parameter in mine["model"].named_parameters():
        assert_close(parameter.grad, gradients[name])
