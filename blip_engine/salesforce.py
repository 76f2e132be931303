"""Salesforce's own checkpoints, the `.pth` files of BLIP and LAVIS, to checkpoint directories in the hub's layout.

    python -m blip_engine.salesforce FILE DIR [--image-size N] [--tokenizer DIR]

Sources: https://github.com/salesforce/BLIP and https://github.com/salesforce/LAVIS. Their text towers have the hub's
names already; the vision tower is timm's. Shapes say most of the configuration. The rest is the same in all of them:
heads 64 wide (12 in the text towers and ViT-B, 16 in ViT-L), the feed-forward ratio, the vision layer norms' epsilon.
"""

import argparse
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from .checkpoint import as_tensors, check_tensors, fetch_from_hub, read_pickle
from .config import BlipConfig, BlipTextConfig, BlipVisionConfig
from .errors import BlipError, CheckpointError
from .image_processor import BlipImageProcessor
from .requests import Task
from .resident import MODEL_CLASSES, TaskModel
from .tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, VOCAB_FILE, BertTokenizer
from .vision import resized_positions

BERT: Final = "bert-base-uncased"  # the tokenizer of all BLIP models
_HEAD_WIDTH, _FEED_FORWARD, _VISION_EPS = 64, 4, 1e-6
_NEW_WORDS: Final = 2  # [DEC] and [ENC], behind BERT's

#: Only training needs these: momentum copies, queues, the temperature, and buffers.
_IGNORED = re.compile(r"\w+_m\.|(image_queue|text_queue|idx_queue|queue_ptr|ptr_queue|temp)$|.*\.position_ids$")
_VISION_NAMES: Final = (
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm", ".norm"),
)
#: LAVIS's names of what converts
_ARCHITECTURES: Final[Mapping[str, Task]] = {
    "blip_caption": "caption",
    "blip_vqa": "vqa",
    "blip_retrieval": "itm",
    "blip_image_text_matching": "itm",
}
_POSITIONS: Final = "vision_model.embeddings.position_embedding"


def convert(file: Path, directory: Path, image_size: int | None = None, tokenizer: Path | None = None) -> TaskModel:
    """Write `file` as the checkpoint directory `directory`, whole or not at all, and return the model, which shares
    the memory-mapped file.

    `image_size` in pixels, when it is not to be the file's own; the positions are interpolated. `tokenizer` is a
    directory with `tokenizer.json` or `vocab.txt`; without it the hub's `bert-base-uncased` is taken.
    Raises CheckpointError.
    """
    if not file.is_file():
        raise CheckpointError(f"no file {file}; convert takes a .pth file of BLIP or LAVIS")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists already; choose another directory, or remove it")
    words = _tokenizer(tokenizer)
    model = _read_model(file, image_size, words)
    with _whole_directory(directory) as folder:
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        BlipImageProcessor(size=model.config.vision_config.image_size).save_pretrained(folder)
    return model


def _read_model(file: Path, image_size: int | None, words: BertTokenizer) -> TaskModel:
    saved = read_pickle(file)
    said = _said_task(saved)
    if isinstance(saved, dict) and isinstance(saved.get("model"), dict):
        saved = saved["model"]  # beside the optimizer's state
    given = {name: value for name, value in as_tensors(file, saved).items() if not _IGNORED.match(name)}
    kind = MODEL_CLASSES[said or _task(file, given)]
    config = _config(file, given)
    _take_tokens(config.text_config, words)
    tensors = _renamed(file, kind, config, given)
    if image_size is not None:
        _resize(config, tensors, image_size)
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights({alias: name for alias, name in kind.tied_weights.items() if tensors[alias] is tensors[name]})
    return model.eval()


def _said_task(saved: Any) -> Task | None:
    """What LAVIS's configuration beside the weights says, if it is there: a frozen tower may be missing in these."""
    for key in ("config", "model", "arch"):
        saved = saved.get(key) if isinstance(saved, Mapping) else None
    return _ARCHITECTURES.get(saved) if isinstance(saved, str) else None


def _task(file: Path, given: Mapping[str, Tensor]) -> Task:
    parts = {name.partition(".")[0] for name in given}
    if "cls_head" in parts or any(".crossattention.self0." in name for name in given):
        raise CheckpointError(f"{file} holds a classifier (NLVR or the like); captioning, VQA and retrieval convert")
    if "vision_model" in parts:
        raise CheckpointError(f"{file} has the hub's names already; load it from beside its config.json")
    match "text_encoder" in parts, "text_decoder" in parts, "itm_head" in parts:
        case False, True, False:
            return "caption"
        case True, True, False:
            return "vqa"
        case True, False, True:
            return "itm"
        case True, True, True:
            raise CheckpointError(f"{file} holds a pretrained BLIP; only captioning, VQA and retrieval models convert")
    raise CheckpointError(
        f"{file} is no captioning, VQA or retrieval model of BLIP; its tensors are of {', '.join(sorted(parts)[:6])}"
    )


def _config(file: Path, given: Mapping[str, Tensor]) -> BlipConfig:
    """What the shapes say. A tensor that is absent or odd is passed over here: `_renamed` will name it."""

    def shape(name: str, usual: tuple[int, ...]) -> tuple[int, ...]:
        found = given.get(name)
        return tuple(found.shape) if found is not None and found.dim() == len(usual) and found.numel() else usual

    text = "text_encoder." if any(name.startswith("text_encoder.") for name in given) else "text_decoder.bert."
    vocabulary, width = shape(f"{text}embeddings.word_embeddings.weight", (30524, 768))
    vision_width = shape("visual_encoder.cls_token", (1, 1, 768))[-1]
    patch = shape("visual_encoder.patch_embed.proj.weight", (768, 3, 16, 16))[-1]
    side = math.isqrt(max(shape("visual_encoder.pos_embed", (1, 577, 768))[1] - 1, 1))
    return BlipConfig(
        image_text_hidden_size=shape("vision_proj.weight", (256, 768))[0],
        vision_config=BlipVisionConfig(
            **_tower(file, vision_width, _layers(given, "visual_encoder.blocks.")),
            image_size=side * patch,
            patch_size=patch,
            layer_norm_eps=_VISION_EPS,
        ),
        text_config=BlipTextConfig(
            **_tower(file, width, _layers(given, f"{text}encoder.layer.")),
            vocab_size=vocabulary,
            bos_token_id=vocabulary - _NEW_WORDS,
            max_position_embeddings=shape(f"{text}embeddings.position_embeddings.weight", (512, 768))[0],
        ),
    )


def _tower(file: Path, width: int, layers: int) -> dict[str, Any]:
    if width % _HEAD_WIDTH:
        raise CheckpointError(f"{file} has a tower of width {width}; BLIP's are multiples of {_HEAD_WIDTH}")
    return {
        "hidden_size": width,
        "intermediate_size": _FEED_FORWARD * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // _HEAD_WIDTH,
    }


def _layers(given: Mapping[str, Tensor], prefix: str) -> int:
    numbers = (name.removeprefix(prefix).partition(".")[0] for name in given if name.startswith(prefix))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _renamed(file: Path, kind: type[TaskModel], config: BlipConfig, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the hub's names, tied twins made one. CheckpointError in the file's own names."""
    with torch.device("meta"):
        wanted = kind(config).state_dict()
    names = {_their_name(name): name for name in wanted}
    try:
        check_tensors(str(file), {theirs: wanted[name] for theirs, name in names.items()}, given, kind.tied_weights)
    except CheckpointError as error:
        frozen = names.keys() - given.keys() - kind.tied_weights.keys()
        hint = ". LAVIS leaves frozen parameters out of what it saves: save the whole model" if frozen else ""
        raise CheckpointError(f"{error}{hint}") from None
    tensors = {name: given[theirs] for theirs, name in names.items() if theirs in given}
    for alias, source in kind.tied_weights.items():
        if alias not in tensors or tensors[alias].equal(tensors[source]):
            tensors[alias] = tensors[source]
    return tensors


def _their_name(name: str) -> str:
    if name.startswith("vision_model."):
        for ours, theirs in _VISION_NAMES:
            name = name.replace(ours, theirs)
    return name


def _resize(config: BlipConfig, tensors: dict[str, Tensor], image_size: int) -> None:
    """Make positions and configuration those of images of `image_size` pixels."""
    patch = config.vision_config.patch_size
    if image_size < patch or image_size % patch:
        raise CheckpointError(f"image size {image_size} is not a multiple of the model's patches of {patch} pixels")
    if image_size != config.vision_config.image_size:
        tensors[_POSITIONS] = resized_positions(tensors[_POSITIONS], image_size // patch, image_size // patch)
        config.vision_config.image_size = image_size


def _tokenizer(directory: Path | None) -> BertTokenizer:
    if directory is None:
        files = (TOKENIZER_FILE, VOCAB_FILE, TOKENIZER_CONFIG_FILE)
        try:
            directory = fetch_from_hub(BERT, BERT, None, files)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (for convert: --tokenizer DIR)") from None
    return BertTokenizer.from_directory(directory)


def _take_tokens(config: BlipTextConfig, words: BertTokenizer) -> None:
    """Take over the tokenizer's [SEP] and [PAD]. CheckpointError when its vocabulary is not the model's."""
    own = config.vocab_size - _NEW_WORDS
    # One saved by Salesforce's code holds the two new words, as special tokens: they must not show up in captions.
    with_new = len(words) == config.vocab_size and not words.decode([own, own + 1], skip_special_tokens=True)
    if len(words) != own and not with_new:
        raise CheckpointError(f"the tokenizer has {len(words)} words, the model's has {own}; BLIP's is {BERT}'s")
    config.sep_token_id, config.pad_token_id = words.sep_token_id, words.pad_token_id


@contextmanager
def _whole_directory(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its place if the block succeeds, and is removed if it fails."""
    target = directory.resolve()
    folder = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True)
        yield folder
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        folder.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already after the renaming


def main(arguments: list[str] | None = None) -> int:
    """The command. 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m blip_engine.salesforce", description="Convert a .pth checkpoint.")
    parser.add_argument("file", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--tokenizer", type=Path)
    given = parser.parse_args(arguments)
    try:
        model = convert(given.file, given.directory, given.image_size, given.tokenizer)
    except (BlipError, OSError) as error:  # the user's to mend; nothing was written
        sys.stderr.write(f"{error}\n")
        return 1
    size, millions = model.config.vision_config.image_size, sum(p.numel() for p in model.parameters()) / 1e6
    sys.stdout.write(f"{given.directory}: {type(model).__name__}, {size} pixels, {millions:.1f} M parameters\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
