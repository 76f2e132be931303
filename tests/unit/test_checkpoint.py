"""Loading is all or nothing, names what is wrong, runs nobody's code and asks no network."""

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import save_checkpoint
from torch import Tensor
from twins import assert_close, words

from blip_engine import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from blip_engine.checkpoint import find_checkpoint
from blip_engine.errors import CheckpointError

REVISION = "0123456789abcdef0123456789abcdef01234567"
DECODER = "text_decoder.cls.predictions.decoder.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", "caption")


@pytest.fixture
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def load(folder: Path) -> BlipForConditionalGeneration:
    return BlipForConditionalGeneration.from_pretrained(folder)


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TestTensors:
    def test_missing_unexpected_and_misshaped_ones_are_all_named(
        self, folder: Path, tensors: dict[str, Tensor]
    ) -> None:
        del tensors["vision_model.post_layernorm.weight"]
        tensors["vision_model.extra"] = torch.zeros(1)
        tensors["text_decoder.cls.predictions.bias"] = torch.zeros(3)
        rewrite(folder, tensors)
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        message = str(caught.value)
        assert message.startswith(f"{folder}: the tensors do not fit the model.")
        assert "1 missing: vision_model.post_layernorm.weight" in message
        assert "1 unexpected: vision_model.extra" in message
        assert "1 mis-shaped: text_decoder.cls.predictions.bias is (3,) and must be (41,)" in message
        assert "\n" not in message

    def test_a_long_list_is_cut(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        rewrite(folder, {name: value for name, value in tensors.items() if not name.startswith("vision_model")})
        with pytest.raises(CheckpointError, match=r"\d\d missing: [^,]+, [^,]+, [^,]+, …$"):
            load(folder)

    def test_another_tasks_checkpoint_is_refused(self, folder: Path) -> None:
        for kind in (BlipForQuestionAnswering, BlipForImageTextRetrieval):
            with pytest.raises(CheckpointError, match=r"\d+ missing: .*text_encoder"):
                kind.from_pretrained(folder)

    def test_another_configuration_is_refused(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 3
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"missing: text_decoder\.bert\.encoder\.layer\.2"):
            load(folder)

    def test_position_ids_of_old_files_are_passed_over(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        tensors["text_decoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
        rewrite(folder, tensors)
        load(folder)

    def test_twins_may_be_absent_or_present(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        assert DECODER not in tensors
        embedding = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
        rewrite(folder, tensors | {DECODER: embedding.clone()})
        model = load(folder)
        assert model.text_decoder.cls.predictions.decoder.weight is model.get_input_embeddings().weight

    def test_a_decoder_that_is_no_twin_stays_so(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        own = torch.randn_like(tensors["text_decoder.bert.embeddings.word_embeddings.weight"])
        rewrite(folder, tensors | {DECODER: own})
        model, theirs = load(folder), transformers.BlipForConditionalGeneration.from_pretrained(folder)
        assert model.text_decoder.cls.predictions.decoder.weight.equal(own)
        assert theirs.text_decoder.cls.predictions.decoder.weight.equal(own)
        pixels, ids = torch.randn(2, 3, 32, 32), words(2, 5)
        assert_close(model(pixels, ids).logits, theirs(pixels, ids).logits)
        model.save_pretrained(folder / "again")
        assert load_file(folder / "again" / "model.safetensors")[DECODER].equal(own)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "auto", None])
    def test_types(self, folder: Path, dtype: Any) -> None:
        model = BlipForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        wanted = {"float16": torch.float16, "auto": torch.float32, None: torch.float32}.get(dtype, dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}
        assert not model.training
        for unfit in ("float9", "int8", torch.int64):
            with pytest.raises(CheckpointError, match=f"dtype '?{unfit}'? is unknown; use float32"):
                BlipForConditionalGeneration.from_pretrained(folder, dtype=unfit)


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(Path(os.environ["BOMB_AT"])),)


class TestFiles:
    def test_safetensors_come_before_bin(self, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"never read")
        load(folder)
        assert [path.name for path in find_checkpoint(folder).weight_files()] == ["model.safetensors"]

    @pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 8 + b"{}", None])
    def test_a_broken_safetensors_file_is_named(self, folder: Path, content: bytes | None) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-7] if content is None else content)
        with pytest.raises(CheckpointError, match=rf"{path} cannot be read: [^\n]+$"):
            load(folder)

    def test_bin_files(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        truth = load(folder).state_dict()
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert all(value.equal(truth[name]) for name, value in load(folder).state_dict().items())

    def test_a_pickle_bomb_does_not_go_off(
        self, folder: Path, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BOMB_AT", str(tmp_path / "exploded"))
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors | {"bomb": _Bomb()}, path)
        with pytest.raises(CheckpointError, match=rf"{path} (is refused|cannot be read): [^\n]+$"):
            load(folder)
        path.write_bytes(pickle.dumps(_Bomb()))
        with pytest.raises(CheckpointError, match=rf"{path} (is refused|cannot be read): [^\n]+$"):
            load(folder)
        assert not (tmp_path / "exploded").exists()
        torch.save([1, 2], path)
        with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
            load(folder)

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_shards(self, folder: Path, tensors: dict[str, Tensor], kind: str) -> None:
        truth = load(folder).state_dict()
        (folder / "model.safetensors").unlink()
        stem = "model" if kind == "safetensors" else "pytorch_model"
        where = {name: f"{stem}-0000{number % 2 + 1}-of-00002.{kind}" for number, name in enumerate(sorted(tensors))}
        for file in set(where.values()):
            part = {name: tensors[name] for name in tensors if where[name] == file}
            (save_file if kind == "safetensors" else torch.save)(part, folder / file)  # type: ignore[operator]
        index = folder / f"{stem}.{kind}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        assert all(value.equal(truth[name]) for name, value in load(folder).state_dict().items())
        first = min(where.values())
        (folder / first).unlink()
        with pytest.raises(CheckpointError, match=f"shards named by {index.name} are absent: {first}"):
            load(folder)
        index.write_text("{}")
        with pytest.raises(CheckpointError, match="is no index of shards"):
            load(folder)

    def test_an_index_leads_nowhere_else(self, folder: Path, tmp_path: Path) -> None:
        (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
        index = {"weight_map": {"a": "../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"absent: elsewhere\.safetensors"):
            load(folder)

    def test_absent_and_broken_configurations(self, folder: Path) -> None:
        path = folder / "config.json"
        for text, fault in [
            ("{", "cannot be read as JSON"),
            ("[]", "must hold a JSON object, not list"),
            ('{"text_config": {"hidden_size": 30, "num_attention_heads": 4}}', "30 is not a multiple"),
            ('{"vision_config": {"image_size": 50}}', "image_size 50 is not a multiple"),
            ('{"vision_config": {"hidden_act": "tanhh"}}', "'tanhh' is unknown"),
            ('{"text_config": {"num_hidden_layers": "2"}}', "config.json describes no model"),
            ('{"text_config": {"vocab_size": -1}}', "config.json describes no model"),
            ('{"vision_config": 3}', "not int"),
        ]:
            path.write_text(text)
            with pytest.raises(CheckpointError, match=fault):
                load(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{folder} holds no config\.json"):
            load(folder)

    def test_a_digest_tells_weights_apart(self, folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
        digest = find_checkpoint(folder).weights_sha256()
        same = save_checkpoint(tmp_path / "same", "caption")
        assert find_checkpoint(same).weights_sha256() == digest
        tensors["vision_model.post_layernorm.weight"][0] += 1e-3
        rewrite(folder, tensors)
        assert find_checkpoint(folder).weights_sha256() != digest
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=f"no weights in {folder}; looked for model.safetensors"):
            find_checkpoint(folder).weights_sha256()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of this test's own, offline; a connection is an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "hub"


def cache(hub: Path, repository: str, source: Path, revision: str = REVISION, ref: str = "main") -> None:
    """Lay `source` out as huggingface_hub caches a repository: blobs, a snapshot of links, a ref."""
    root = hub / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        blob = root / "blobs" / f"{revision[:4]}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (root / "refs" / ref).write_text(revision)


class TestHub:
    def test_a_cached_snapshot_with_its_revision(self, hub: Path, folder: Path) -> None:
        cache(hub, "owner/name", folder)
        checkpoint = find_checkpoint("owner/name")
        assert (checkpoint.source, checkpoint.revision) == ("owner/name", REVISION)
        model = BlipForConditionalGeneration.from_pretrained("owner/name")
        assert all(value.equal(load(folder).state_dict()[name]) for name, value in model.state_dict().items())

    def test_a_pinned_revision(self, hub: Path, folder: Path, tmp_path: Path) -> None:
        cache(hub, "owner/name", folder)
        other = save_checkpoint(tmp_path / "other", "caption", seed=1)
        cache(hub, "owner/name", other, "f" * 40, ref="v2")
        assert find_checkpoint("owner/name").revision == REVISION
        for name in ("owner/name@v2", f"owner/name@{'f' * 40}"):
            assert find_checkpoint(name).revision == "f" * 40
        assert find_checkpoint("owner/name", revision="v2").revision == "f" * 40
        digests = {find_checkpoint(name).weights_sha256() for name in ("owner/name", "owner/name@v2")}
        assert len(digests) == 2
        with pytest.raises(CheckpointError, match="'owner/name@v3' is not in the local cache"):
            find_checkpoint("owner/name@v3")

    def test_an_absent_model_is_one_clear_line(self, hub: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            find_checkpoint("owner/absent")
        assert str(caught.value) == (
            "model 'owner/absent' is not in the local cache and the hub cannot be reached; "
            "give a local directory, or set HF_HOME to a cache that holds it"
        )

    def test_a_repository_of_something_else(self, hub: Path, folder: Path) -> None:
        (folder / "config.json").unlink()
        cache(hub, "owner/name", folder)
        with pytest.raises(CheckpointError, match=r"'owner/name' holds no config\.json; is it a BLIP checkpoint\?"):
            find_checkpoint("owner/name")

    def test_a_cached_bin_model(self, hub: Path, folder: Path, tensors: dict[str, Tensor]) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        cache(hub, "owner/name", folder)
        BlipForConditionalGeneration.from_pretrained("owner/name")

    @pytest.mark.parametrize("name", ["nothing", "./nothing", "/no/where", "a/b/c", "", "~/model"])
    def test_names_that_are_neither(self, hub: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match=f"no model '{name}': it is neither a directory here nor a hub id"):
            find_checkpoint(name)

    @pytest.mark.parametrize("name", ["own er/name", "owner/na--me", "owner/.."])
    def test_names_that_no_hub_id_can_have(self, hub: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match=rf"model '{name}' cannot be fetched from the hub: [^\n]+$"):
            find_checkpoint(name)

    def test_demo_needs_a_task(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # `make demo` leaves a folder of that name in the repository
        assert find_checkpoint("demo", task="caption").revision is None
        with pytest.raises(CheckpointError, match="no model 'demo'"):
            find_checkpoint("demo")
