"""embed and capfilt: what their jobs may name, and the engine's queue against its in-process calls."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_models import save_checkpoint, small_config

from blip_engine import Engine, capfilt
from blip_engine.errors import CheckpointError, InputError, OptionError
from blip_engine.requests import (
    TASKS,
    Caption,
    Embedding,
    Filtered,
    Request,
    checkpoints_of,
    options_for,
    result_record,
)  # fmt: skip
from orchestrator.contract import BadRow, Chunk, Row
from orchestrator.errors import UsageError
from orchestrator.jobs import make_spec
from orchestrator.rows import parse_rows
from workers.messages import Checkpoint

RANDOM = np.random.default_rng(5)
IMAGES = [RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(6)]
TEXTS = ["a dog", "", "the red cat", "a", "  ", "two dogs ?"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("models")
    models = {task: str(save_checkpoint(root / task, task)) for task in TASKS}
    with Engine.load(models, device="cpu", precision="fp32") as engine:
        yield engine


def test_embeddings_are_those_of_embed(engine: Engine) -> None:
    options = options_for("embed")
    futures = [
        engine.submit(Request("itm", "embed", image, (text, "a cat"), options))
        for image, text in zip(IMAGES, TEXTS, strict=True)
    ]
    images = engine.embed(images=IMAGES)
    texts = engine.embed(texts=TEXTS)
    cat = engine.embed(texts=["a cat"])[0]
    for future, image, text, words in zip(futures, images, texts, TEXTS, strict=True):
        found = future.result()
        for entry, expected in zip(found, (text if words.strip() else None, cat), strict=True):
            assert isinstance(entry, Embedding)
            np.testing.assert_array_equal(np.float32(entry.image), image)
            if expected is None:
                assert entry.text is None
            else:
                np.testing.assert_array_equal(np.float32(entry.text), expected)
        assert np.linalg.norm(found[0].image) == pytest.approx(1, abs=1e-6)
    record = result_record("embed", futures[1].result()[:1], several=False)
    assert list(record) == ["embedding"]
    assert list(result_record("embed", futures[0].result()[:1], several=False)) == ["embedding", "text_embedding"]
    match = engine.match(IMAGES[:1], TEXTS[:1])[0]
    assert float(np.dot(images[0], texts[0])) == pytest.approx(match.itc, abs=1e-6)


def test_filtered_captions_are_those_of_the_recipe(engine: Engine) -> None:
    truth = capfilt(engine, IMAGES, [text if text.strip() else None for text in TEXTS], num_beams=1)
    options = options_for("capfilt", {"num_beams": 1})
    futures = [
        engine.submit(Request("caption", "capfilt", image, (text,), options, judge="itm"))
        for image, text in zip(IMAGES, TEXTS, strict=True)
    ]
    found = [future.result()[0] for future in futures]
    for mine, other in zip(found, truth, strict=True):
        assert isinstance(mine, Filtered)
        assert (mine.caption, mine.kept) == (other.caption, other.kept)
        assert mine.caption_match == pytest.approx(other.caption_match, abs=1e-5)
        assert mine.text_match == (None if other.text_match is None else pytest.approx(other.text_match, abs=1e-5))
    assert [entry.text_match is None for entry in found] == [False, True, False, False, True, False]


def test_what_either_model_refuses_comes_out(engine: Engine) -> None:
    options = options_for("capfilt")
    for request in (
        Request("caption", "capfilt", IMAGES[0], ("a " * 600,), options, judge="itm"),
        Request("caption", "capfilt", IMAGES[0], ("a",), options, judge="nobody"),
        Request("nobody", "capfilt", IMAGES[0], ("a",), options, judge="itm"),
        Request("caption", "embed", IMAGES[0], ("a",), options_for("embed")),
        Request("itm", "embed", IMAGES[0][:, :, :2], ("a",), options_for("embed")),
    ):
        with pytest.raises(InputError):
            engine.submit(request).result(30)
    assert engine.caption(IMAGES[:1])  # it goes on


def test_several_texts_share_a_caption() -> None:
    caption = Caption("a dog", -0.5, (1, 2))
    results = [Filtered(caption, 0.9, 0.7, ("a pet", "a dog")), Filtered(caption, 0.9, 0.2, ("a dog",))]
    assert result_record("capfilt", results, several=True) == {
        "caption": "a dog", "caption_match": 0.9, "text_match": None, "kept": ["a pet", "a dog"],
        "text_matches": [0.7, 0.2],
    }  # fmt: skip
    assert result_record("capfilt", results[1:], several=False) == {
        "caption": "a dog", "caption_match": 0.9, "text_match": 0.2, "kept": ["a dog"],
    }  # fmt: skip


def test_several_captions_of_an_image(engine: Engine) -> None:
    found = engine.caption(IMAGES[:1], num_beams=3, num_return_sequences=3)
    record = result_record("caption", found, several=False)
    assert len(record["captions"]) == 3
    assert record["captions"][0] == {key: record[key] for key in ("caption", "score", "tokens")}
    assert len({(entry["caption"], entry["score"]) for entry in record["captions"]}) == 3


def test_models_of_a_job(tmp_path: Path) -> None:
    assert checkpoints_of("vqa", "o/m") == (("vqa", "o/m"),)
    assert checkpoints_of("embed", "demo") == (("itm", "demo"),)
    assert checkpoints_of("capfilt", "demo") == (("caption", "demo"), ("itm", "demo"))
    assert checkpoints_of("capfilt", "o/c@1+demo") == (("caption", "o/c@1"), ("itm", "demo"))
    for model in ("o/c", "a+b+c", "+b", "a+"):
        with pytest.raises(OptionError, match=r"CAPTIONER\+FILTER"):
            checkpoints_of("capfilt", model)
    (tmp_path / "m.txt").write_text("a.png\n")
    (tmp_path / "own").mkdir()

    def model_of(task: str, model: str | None = None) -> str:
        return make_spec(str(tmp_path / "m.txt"), task, str(tmp_path / "out"), model=model).model

    assert model_of("capfilt") == "Salesforce/blip-image-captioning-base+Salesforce/blip-itm-base-coco"
    assert model_of("embed") == "Salesforce/blip-itm-base-coco"
    assert model_of("capfilt", f"{tmp_path}/own+demo") == f"{tmp_path}/own+demo"
    assert model_of("capfilt", "demo") == "demo"
    for model, says in (("demo+no such", "'no such'"), ("o/c", "CAPTIONER")):
        with pytest.raises(UsageError, match=says):
            model_of("capfilt", model)


def test_rows_need_no_text() -> None:
    lines = b'{"image": "a"}\n{"image": "b", "text": "a dog"}\n{"image": "c", "text": 7}\n'
    chunk = Chunk(0, 0, len(lines), 0, 3)
    for task in ("embed", "capfilt"):
        first, second, bad = parse_rows(lines, chunk, task, "jsonl")  # type: ignore[arg-type]
        assert isinstance(first, Row)
        assert isinstance(second, Row)
        assert (first.texts, second.texts) == (("",), ("a dog",))
        assert isinstance(bad, BadRow)
        assert bad.code == "row_invalid"


def test_a_captioner_and_its_filter_as_one() -> None:
    captioner = Checkpoint("caption:a", "a", "r1", "1" * 64, (384, 384))
    judge = Checkpoint("itm:b", "b", "r2", "2" * 64, (384, 384))
    both = captioner.judged_by(judge)
    assert (both.name, both.judge, both.source, both.revision) == ("caption:a", "itm:b", "a+b", "r1+r2")
    assert both.weights_sha256 == f"{'1' * 64}+{'2' * 64}"
    with pytest.raises(CheckpointError, match="a at 384 pixels and c at 480 pixels"):
        captioner.judged_by(Checkpoint("itm:c", "c", None, "3" * 64, (480, 480)))


def test_embed_takes_retrieval_models_only(tmp_path: Path) -> None:
    config = small_config(vision={"image_size": 16})
    models = {"caption": str(save_checkpoint(tmp_path / "c", "caption", **config))}
    with Engine.load(models, device="cpu") as engine, pytest.raises(InputError, match="serves caption, not embed"):
        engine.submit(Request("caption", "embed", IMAGES[0], ("",), options_for("embed"))).result(30)
    with Engine(device="cpu") as engine, pytest.raises(CheckpointError, match="'embed' uses theirs"):
        engine.load_model("embed", "demo", "embed")
