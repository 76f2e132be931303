"""Models come unchanged out of Salesforce's `.pth` files, and anything else is refused in one line."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from salesforce_files import small, their_name, their_tensors
from small_models import CLASSES, WORDS
from torch import Tensor
from torch.nn import functional as F
from twins import assert_close

from blip_engine import BertTokenizer, BlipConfig, BlipProcessor, Engine
from blip_engine.errors import CheckpointError
from blip_engine.requests import TASKS, Task
from blip_engine.salesforce import _read_model, convert, main
from blip_engine.tokenizer import wordpiece


@pytest.fixture
def words(tmp_path: Path) -> Path:
    folder = tmp_path / "words"
    BertTokenizer(wordpiece({word: number for number, word in enumerate(WORDS)})).save_pretrained(folder)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    """Saves something as `model.pth`."""

    def save(content: Any, **options: Any) -> Path:
        torch.save(content, tmp_path / "model.pth", **options)
        return tmp_path / "model.pth"

    return save


def run(model: Any, pixels: Tensor) -> list[Tensor]:
    """What a model says, through every part of it."""
    ids = torch.tensor([[2, 9, 10, 6, 11, 15, 3], [2, 9, 10, 6, 11, 3, 0]])
    mask = (ids != 0).long()  # not for VQA, where transformers loses it
    match type(model).__name__:
        case "BlipForConditionalGeneration":
            return [model(pixels, ids).logits]
        case "BlipForQuestionAnswering":
            output = model(ids, pixels, labels=ids[:, :4])
            return [output.loss, output.image_embeds]
    matched, similar = (model(ids, pixels, attention_mask=mask, use_itm_head=head) for head in (True, False))
    return [matched.itm_score, similar.itm_score]


@torch.no_grad()
def same(one: Any, other: Any, size: int = 32) -> None:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(run(one, pixels), run(other, pixels), strict=True):
        assert_close(mine, theirs)


class TestConversion:
    @pytest.mark.parametrize("task", TASKS)
    def test_ours_and_transformers_load_it_and_agree(self, task: Task, tmp_path: Path, words: Path, file: Any) -> None:
        truth = small(task)
        saved = {
            "model": their_tensors(truth),
            "optimizer": {"state": {}, "lr": 1e-5},
            "config": {"image_size": 32},
            "epoch": 3,
        }
        out = tmp_path / "out"
        convert(file(saved), out, tokenizer=words)
        same(CLASSES[task].from_pretrained(out), truth)
        theirs, report = getattr(transformers, CLASSES[task].__name__).from_pretrained(out, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        same(theirs.eval(), truth)

    @pytest.mark.parametrize("task", TASKS)
    def test_the_configuration_is_told_from_shapes(self, task: Task, tmp_path: Path, words: Path, file: Any) -> None:
        truth = small(task, vision_width=192)
        convert(file({"model": their_tensors(truth)}), tmp_path / "out", tokenizer=words)
        found = BlipConfig.from_json_file(tmp_path / "out" / "config.json").to_dict()
        wanted = truth.config.to_dict()
        wanted["vision_config"]["initializer_range"] = 1e-10  # only the small models' own
        if task != "itm":
            wanted["image_text_hidden_size"] = 256  # no file without projections tells it
        assert found == wanted
        same(CLASSES[task].from_pretrained(tmp_path / "out"), truth)

    def test_the_directory_is_whole(self, tmp_path: Path, words: Path, file: Any) -> None:
        """Processor and tokenizer load, transformers' too, and the engine tells the task by itself."""
        out = tmp_path / "deeper" / "out"
        convert(file(their_tensors(small("caption"))), out, tokenizer=words)
        names = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]
        assert sorted(path.name for path in out.iterdir()) == [*names, "tokenizer_config.json", "vocab.txt"]
        assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # who may read one file may read all
        ours, theirs = BlipProcessor.from_pretrained(out), transformers.AutoProcessor.from_pretrained(out)
        text = "how many dogs, cats?"
        assert ours(text=text)["input_ids"] == theirs(text=text)["input_ids"]
        assert ours.image_processor.size == {"height": 32, "width": 32}
        with Engine.load({"mine": str(out)}, device="cpu", precision="fp32") as engine:
            assert engine.caption([torch.zeros(40, 50, 3, dtype=torch.uint8).numpy()], model="mine")[0].text

    def test_a_tokenizer_saved_by_salesforces_code(self, tmp_path: Path, file: Any) -> None:
        """It has [DEC] and [ENC] already. In captions they leave no trace."""
        words = wordpiece({word: number for number, word in enumerate(WORDS)})
        words.add_special_tokens(["[DEC]", "[ENC]"])
        BertTokenizer(words).save_pretrained(tmp_path / "words")
        convert(file(their_tensors(small("caption"))), tmp_path / "out", tokenizer=tmp_path / "words")
        with Engine.load({"caption": str(tmp_path / "out")}, device="cpu", precision="fp32") as engine:
            (caption,) = engine.caption([torch.zeros(40, 50, 3, dtype=torch.uint8).numpy()], ["a picture of"])
        assert caption.text.startswith("a picture of")

    def test_ties(self, tmp_path: Path, words: Path, file: Any) -> None:
        """The decoder's projection may be left out; an equal one is not stored twice; one that differs stays."""
        tensors = their_tensors(small("caption"))
        name = "text_decoder.cls.predictions.decoder.weight"
        embeddings = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
        contents = {
            "tied": tensors,
            "equal": tensors | {name: embeddings.clone()},
            "absent": {key: value for key, value in tensors.items() if "predictions.decoder" not in key},
            "own": tensors | {name: embeddings + 1},
        }
        for case, content in contents.items():
            convert(file(content), tmp_path / case, tokenizer=words)
        models = {case: CLASSES["caption"].from_pretrained(tmp_path / case) for case in contents}
        sizes = {case: (tmp_path / case / "model.safetensors").stat().st_size for case in contents}
        assert sizes["tied"] == sizes["equal"] == sizes["absent"] < sizes["own"]
        same(models["tied"], models["absent"])
        assert models["own"].state_dict()[name].equal(embeddings + 1)

    def test_files_older_than_torch_1_6(self, tmp_path: Path, words: Path, file: Any) -> None:
        truth = small("caption")
        path = file({"model": their_tensors(truth)}, _use_new_zipfile_serialization=False)
        same(convert(path, tmp_path / "out", tokenizer=words), truth)

    @pytest.mark.parametrize(
        ("task", "arch"),
        [("caption", "blip_caption"), ("vqa", "blip_vqa"), ("itm", "blip_retrieval"),
         ("itm", "blip_image_text_matching"), ("vqa", "my_own_model"), ("vqa", None)],
    )  # fmt: skip
    def test_files_of_lavis_runner(self, task: Task, arch: Any, tmp_path: Path, words: Path, file: Any) -> None:
        model = small(task)
        saved = {"model": their_tensors(model), "config": {"model": {"arch": arch}}, "optimizer": {}, "scaler": None}
        made = convert(file(saved), tmp_path / "out", tokenizer=words)
        assert type(made) is type(model)
        assert all(value.equal(made.state_dict()[name]) for name, value in model.state_dict().items())


class TestImageSize:
    def test_positions_are_interpolated_as_blip_does(self, tmp_path: Path, words: Path, file: Any) -> None:
        truth = small("vqa")
        convert(file({"model": their_tensors(truth)}), tmp_path / "out", 48, words)
        model = CLASSES["vqa"].from_pretrained(tmp_path / "out")
        assert BlipProcessor.from_pretrained(tmp_path / "out").image_processor.size == {"height": 48, "width": 48}
        positions = truth.vision_model.embeddings.position_embedding
        # interpolate_pos_embed of salesforce/BLIP, models/vit.py, restated
        first, patches = positions[:, :1], positions[:, 1:].reshape(-1, 4, 4, 128).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(6, 6), mode="bicubic", align_corners=False)
        wanted = torch.cat((first, patches.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
        assert model.vision_model.embeddings.position_embedding.equal(wanted)
        same(transformers.BlipForQuestionAnswering.from_pretrained(tmp_path / "out").eval(), model, size=48)

    def test_the_files_own_size_changes_nothing(self, tmp_path: Path, words: Path, file: Any) -> None:
        truth = small("caption")
        model = convert(file(their_tensors(truth)), tmp_path / "out", 32, words)
        name = "vision_model.embeddings.position_embedding"
        assert model.state_dict()[name].equal(truth.state_dict()[name])

    @pytest.mark.parametrize("size", [0, -8, 4, 36])
    def test_a_size_of_no_whole_patches_is_refused(self, size: int, tmp_path: Path, words: Path, file: Any) -> None:
        with pytest.raises(CheckpointError, match=f"image size {size} is not a multiple .* 8 pixels$"):
            convert(file(their_tensors(small("caption"))), tmp_path / "out", size, words)
        assert not (tmp_path / "out").exists()


#: Millions of parameters of the hub's checkpoints. ViT-L of the other two tasks is not there, or not as trained.
PUBLISHED = {("caption", 768): 224.0, ("vqa", 768): 361.2, ("itm", 768): 223.7, ("caption", 1024): 446.3}


@pytest.mark.parametrize("width", [768, 1024])
@pytest.mark.parametrize("task", TASKS)
def test_the_published_sizes(task: Task, width: int, file: Any) -> None:
    """ViT-B and ViT-L with BERT-base, as files of zeros that take no room."""
    layers, heads = (12, 12) if width == 768 else (24, 16)
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    with torch.device("meta"):
        model = CLASSES[task](
            BlipConfig(image_text_hidden_size=256, vision_config={**vision, "num_attention_heads": heads})
        )
    zero = torch.zeros(1)
    path = file({their_name(name): zero.expand(value.shape) for name, value in model.state_dict().items()})
    special = ["[PAD]", *(f"[unused{n}]" for n in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # as in BERT's list
    words = BertTokenizer(wordpiece({word: n for n, word in enumerate([*special, *map(str, range(104, 30522))])}))
    found = _read_model(path, None, words)
    config = found.config
    size = sum(parameter.numel() for parameter in found.parameters())
    assert size == sum(parameter.numel() for parameter in model.parameters())
    assert round(size / 1e6, 1) == PUBLISHED.get((task, width), round(size / 1e6, 1))
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (heads, 12)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (384, 16)
    assert (config.vision_config.layer_norm_eps, config.text_config.layer_norm_eps) == (1e-6, 1e-12)
    tokens = config.text_config
    assert (tokens.bos_token_id, tokens.sep_token_id, tokens.pad_token_id) == (30522, 102, 0)


def test_vit_l_question_answering(tmp_path: Path, words: Path, file: Any) -> None:
    """The decoder reads the text's width, the question encoder the vision's. transformers cannot load it."""
    truth = small("vqa", vision_width=192)
    convert(file({"model": their_tensors(truth)}), tmp_path / "out", tokenizer=words)
    same(CLASSES["vqa"].from_pretrained(tmp_path / "out"), truth)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        transformers.BlipForQuestionAnswering.from_pretrained(tmp_path / "out")


class TestRefusals:
    """Every one is one line, and nothing is left behind."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path: Path) -> Any:
        yield
        assert {path.name for path in tmp_path.iterdir()} <= {"words", "model.pth", "taken", "other"}

    def refused(self, path: Path, tmp_path: Path, words: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            convert(path, tmp_path / "out", tokenizer=words)
        assert "\n" not in str(caught.value)

    def test_frozen_parameters_that_lavis_left_out(self, tmp_path: Path, words: Path, file: Any) -> None:
        tensors = their_tensors(small("vqa"))
        kept = {
            name: value for name, value in tensors.items() if not name.startswith("visual_encoder.blocks.0.attn.proj")
        }
        names = r"visual_encoder\.blocks\.0\.attn\.proj\.bias, visual_encoder\.blocks\.0\.attn\.proj\.weight"
        self.refused(file({"model": kept}), tmp_path, words, f"2 missing: {names}. LAVIS leaves frozen parameters out")

    def test_a_whole_frozen_tower(self, tmp_path: Path, words: Path, file: Any) -> None:
        tensors = their_tensors(small("itm"))
        kept = {name: value for name, value in tensors.items() if not name.startswith("visual_encoder.")}
        self.refused(file({"model": kept}), tmp_path, words, r"missing: visual_encoder\.cls_token.*LAVIS leaves")

    def test_a_frozen_question_encoder_is_missed_where_lavis_says_what_the_model_is(
        self, tmp_path: Path, words: Path, file: Any
    ) -> None:
        """Without it the file has a captioner's tensors, in small: decoders of both are of one width here."""
        tensors = {k: v for k, v in their_tensors(small("vqa")).items() if not k.startswith("text_encoder.")}
        saved = {"model": tensors, "config": {"model": {"arch": "blip_vqa"}, "run": {}}, "epoch": 3}
        self.refused(file(saved), tmp_path, words, r"\d+ missing: text_encoder\.embeddings\..*LAVIS leaves frozen")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"visual_encoder.head.weight": torch.zeros(2, 2)}, r"1 unexpected: visual_encoder\.head\.weight$"),
            ({"visual_encoder.pos_embed": torch.zeros(1, 19, 128)}, r"mis-shaped: visual_encoder\.pos_embed is"),
            ({"visual_encoder.pos_embed": torch.zeros(0)}, r"mis-shaped: visual_encoder\.pos_embed is"),
            ({"visual_encoder.cls_token": torch.zeros(1, 1, 100)}, "width 100; BLIP's are multiples of 64$"),
            ({"visual_encoder.norm.bias": torch.zeros(128, dtype=torch.int8)}, r"norm\.bias is torch\.int8$"),
        ],
    )
    def test_tensors_that_do_not_fit(
        self, change: dict[str, Tensor], match: str, tmp_path: Path, words: Path, file: Any
    ) -> None:
        self.refused(file({"model": their_tensors(small("caption")) | change}), tmp_path, words, match)

    @pytest.mark.parametrize(
        ("names", "match"),
        [
            (["text_encoder.x", "text_decoder.x", "itm_head.x", "visual_encoder.x"], "pretrained BLIP"),
            (["text_encoder.x", "cls_head.0.weight", "visual_encoder.x"], "NLVR"),
            (["text_encoder.encoder.layer.0.crossattention.self0.query.weight"], "NLVR"),
            (["Qformer.bert.x", "ln_vision.weight", "visual_encoder.x"], "are of Qformer, ln_vision, visual_encoder$"),
            (["vision_model.x", "text_decoder.x"], "has the hub's names already"),
            (["text_encoder.x", "visual_encoder.x"], "no captioning, VQA or retrieval model"),
        ],
    )
    def test_other_layouts(self, names: list[str], match: str, tmp_path: Path, words: Path, file: Any) -> None:
        self.refused(file({"model": dict.fromkeys(names, torch.zeros(1))}), tmp_path, words, match)

    @pytest.mark.parametrize(
        "content", [{}, {"model": {}}, [1, 2], {"model": {"a": 1}}, {"state_dict": {"a": torch.ones(1)}}]
    )
    def test_no_model_at_all(self, content: Any, tmp_path: Path, words: Path, file: Any) -> None:
        self.refused(file(content), tmp_path, words, "no dictionary of tensors|no captioning")

    def test_a_pickle_that_would_run_code(self, tmp_path: Path, words: Path, file: Any) -> None:
        path = file({"model": their_tensors(small("caption")), "config": _Bomb(tmp_path / "exploded")})
        self.refused(path, tmp_path, words, r"model\.pth is refused: it asks for posix\.mkdir, which could run code")

    @pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut short"])
    def test_broken_files(self, content: bytes, tmp_path: Path, words: Path) -> None:
        path = tmp_path / "model.pth"
        path.write_bytes(content)
        self.refused(path, tmp_path, words, r"model\.pth is refused: it is no whole torch file")

    def test_files_and_directories(self, tmp_path: Path, words: Path, file: Any) -> None:
        self.refused(tmp_path / "absent.pth", tmp_path, words, r"no file .*absent\.pth")
        path, taken = file(their_tensors(small("caption"))), tmp_path / "taken"
        taken.mkdir()
        (taken / "keep.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="taken exists already"):
            convert(path, taken, tokenizer=words)
        with pytest.raises(CheckpointError, match=r"model\.pth exists already"):
            convert(path, path, tokenizer=words)
        with pytest.raises(CheckpointError, match=r"out cannot be written: .*model\.pth"):
            convert(path, path / "out", tokenizer=words)
        assert [entry.name for entry in taken.iterdir()] == ["keep.txt"]

    def test_a_full_disk(self, tmp_path: Path, words: Path, file: Any) -> None:
        path = file({"model": their_tensors(small("caption"))})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            self.refused(path, tmp_path, words, "out cannot be written: ")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_another_models_words(self, tmp_path: Path, file: Any) -> None:
        path = file(their_tensors(small("caption")))
        BertTokenizer(wordpiece({word: number for number, word in enumerate([*WORDS, "more"])})).save_pretrained(
            tmp_path / "other"
        )
        self.refused(path, tmp_path, tmp_path / "other", f"has {len(WORDS) + 1} words, the model's has {len(WORDS)}")
        plain = {word: number for number, word in enumerate([*WORDS, "[DEC]", "[ENC]"])}  # no special tokens
        BertTokenizer(wordpiece(plain)).save_pretrained(tmp_path / "other")
        self.refused(path, tmp_path, tmp_path / "other", f"has {len(plain)} words, the model's has {len(WORDS)}")
        self.refused(path, tmp_path, tmp_path / "absent", "holds neither tokenizer.json nor vocab.txt")


class _Bomb:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self._path,)


class TestCommand:
    def test_it_says_what_it_made(
        self, tmp_path: Path, words: Path, file: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        path = file({"model": their_tensors(small("itm"))})
        assert main([str(path), str(out), "--image-size", "64", "--tokenizer", str(words)]) == 0
        said = capsys.readouterr().out
        assert re.fullmatch(rf"{out}: BlipForImageTextRetrieval, 64 pixels, \d\.\d M parameters\n", said)
        assert json.loads((out / "config.json").read_text())["vision_config"]["image_size"] == 64

    def test_an_error_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(tmp_path / "absent.pth"), str(tmp_path / "out")]) == 1
        assert re.fullmatch(r"no file .*absent\.pth; [^\n]+\n", capsys.readouterr().err)

    def test_blip_batch_convert(self, tmp_path: Path, words: Path, file: Any) -> None:
        path, out = file({"model": their_tensors(small("caption"))}), tmp_path / "-out"
        arguments = ["--image-size", "64", "--tokenizer", words, "--", path, out.name]
        done = blip_batch(tmp_path, "convert", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"-out: BlipForConditionalGeneration, 64 pixels, \d\.\d M parameters\n", done.stdout)
        assert BlipConfig.from_json_file(out / "config.json").vision_config.image_size == 64
        done = blip_batch(tmp_path, "convert", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"Error: cannot convert: -out exists already; [^\n]+\n", done.stderr)


def blip_batch(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).parent / "blip-batch"
    command = [program, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
