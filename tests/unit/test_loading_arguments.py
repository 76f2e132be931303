"""The arguments of `from_pretrained` that transformers has, too: what they do here, and that none is passed over."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import save_checkpoint

from blip_engine import AutoTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
from blip_engine.checkpoint import HubOptions
from blip_engine.errors import CheckpointError, OptionError

REVISION = "0123456789abcdef0123456789abcdef01234567"
KINDS: tuple[Any, ...] = (BlipForConditionalGeneration, BlipProcessor, BlipImageProcessor, AutoTokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", "caption")


@pytest.fixture
def cached(folder: Path, tmp_path: Path) -> Path:
    """A hub cache that holds the checkpoint in the folder `inner` of `owner/name`."""
    root = tmp_path / "hub" / "models--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    inner = root / "snapshots" / REVISION / "inner"
    inner.parent.mkdir(parents=True)
    folder.rename(inner)
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestWhereToLook:
    def test_a_cache_of_ones_own_without_asking_the_hub(self, kind: Any, cached: Path) -> None:
        options = {"cache_dir": cached, "local_files_only": True, "token": "hf_secret", "subfolder": "inner"}
        kind.from_pretrained("owner/name", **options, force_download=None, revision=None)
        with pytest.raises(CheckpointError, match=r"not in the local cache and local_files_only keeps it from the hub"):
            kind.from_pretrained("owner/other", **options)
        with pytest.raises(CheckpointError, match=r"'owner/name' holds no outer/config\.json"):
            kind.from_pretrained("owner/name", **options | {"subfolder": "outer"})

    def test_a_folder_of_a_directory(self, kind: Any, folder: Path) -> None:
        kind.from_pretrained(folder.parent, subfolder="model")

    def test_unknown_arguments_are_named(self, kind: Any, folder: Path) -> None:
        for name in ("load_in_8bit", "quantization_config", "output_loading_info", "cash_dir"):
            with pytest.raises(OptionError, match=rf"from_pretrained\(\) has no argument '{name}'"):
                kind.from_pretrained(folder, **{name: True})


def test_a_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(HubOptions(token="hf_secret"))


@pytest.mark.parametrize(
    "given",
    [{"low_cpu_mem_usage": True}, {"trust_remote_code": True}, {"attn_implementation": "eager"},
     {"attn_implementation": "sdpa", "low_cpu_mem_usage": False}],
    ids=str,
)  # fmt: skip
def test_what_changes_nothing(folder: Path, given: dict[str, Any]) -> None:
    model, plain = (BlipForConditionalGeneration.from_pretrained(folder, **each) for each in (given, {}))
    assert all(value.equal(plain.state_dict()[name]) for name, value in model.state_dict().items())
    BlipProcessor.from_pretrained(folder, use_fast=True, backend="pil")


def test_a_configuration_of_ones_own(folder: Path) -> None:
    config = BlipConfig.from_json_file(folder / "config.json")
    config.text_config.label_smoothing, config.vision_config.layer_norm_eps = 0.3, 1e-2
    model = BlipForConditionalGeneration.from_pretrained(folder, config=config)
    plain = BlipForConditionalGeneration.from_pretrained(folder)
    assert model.config == config
    assert model.config is not config  # the caller's may change later
    assert plain.config.text_config.label_smoothing == 0.0
    pixels = torch.randn(1, 3, 32, 32)
    assert not model(pixels).logits.equal(plain(pixels).logits)
    with pytest.raises(OptionError, match=r"config must be a BlipConfig, not 'other\.json'"):
        BlipForConditionalGeneration.from_pretrained(folder, config="other.json")
    config.text_config.num_hidden_layers = 3
    with pytest.raises(CheckpointError, match=r"missing: text_decoder\.bert\.encoder\.layer\.2"):
        BlipForConditionalGeneration.from_pretrained(folder, config=config)


def test_other_attentions_are_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="attn_implementation must be 'sdpa' or 'eager', not 'flash_attention_2'"):
        BlipForConditionalGeneration.from_pretrained(folder, attn_implementation="flash_attention_2")


class TestFormats:
    def test_of_both_files_the_one_asked_for(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
        for wanted, added in ((None, 0), (True, 0), (False, 1)):
            model = BlipForConditionalGeneration.from_pretrained(folder, use_safetensors=wanted)
            name = "vision_model.post_layernorm.weight"
            assert model.state_dict()[name].equal(tensors[name] + added)

    @pytest.mark.parametrize("wanted", [True, False])
    def test_of_one_file_the_other(self, folder: Path, wanted: bool) -> None:
        if wanted:
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        names = "model.safetensors, model.safetensors.index.json" if wanted else "pytorch_model.bin, pytorch_model.bin"
        with pytest.raises(CheckpointError, match=f"no weights in .*; looked for {names}"):
            BlipForConditionalGeneration.from_pretrained(folder, use_safetensors=wanted)
