"""BERT's WordPiece tokenizer over the `tokenizers` library, from `tokenizer.json` or `vocab.txt`.

Source: Devlin et al. 2018, https://arxiv.org/abs/1810.04805; WordPiece is Wu et al. 2016, https://arxiv.org/abs/1609.08144.
"""

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor

from .checkpoint import HubOptions, find_checkpoint
from .errors import CheckpointError, InputError
from .features import BatchFeature, as_features

TOKENIZER_FILE, VOCAB_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
#: What `padding` and `truncation` may be. With one text in a row, all ways to truncate are the same.
_PADDINGS: Final = {False: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": "max_length"}
_TRUNCATIONS: Final = {False: False, "do_not_truncate": False, True: True, "longest_first": True, "only_first": True}


def wordpiece(vocab: dict[str, int], lowercase: bool = True) -> Tokenizer:
    """BERT's tokenizer (https://arxiv.org/abs/1810.04805) over a vocabulary that holds the special tokens."""
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))  # noqa: S106  # a token of text, not of access
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    cls, sep = ("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[cls, sep]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
    return tokenizer


class BertTokenizer:
    """Texts to ids and back. A tokenizer without BERT's special tokens raises CheckpointError."""

    def __init__(self, tokenizer: Tokenizer, model_max_length: int = 512) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.cls_token_id, self.sep_token_id, self.pad_token_id = (
            self._special(SPECIAL_TOKENS[name]) for name in ("cls_token", "sep_token", "pad_token")
        )

    def _special(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise CheckpointError(f"the tokenizer has no {token}; it is not BERT's")
        return int(number)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **loading: Any
    ) -> "BertTokenizer":
        """From a directory or a hub repository.

        `loading` is as of the models; use_fast changes nothing. Raises CheckpointError, OptionError for other names.
        """
        hub = HubOptions.of(loading, without_effect=("use_fast", "trust_remote_code"))
        return cls.from_directory(find_checkpoint(pretrained_model_name_or_path, revision, hub=hub).directory)

    @classmethod
    def from_directory(cls, directory: Path) -> "BertTokenizer":
        """From `tokenizer.json`, or else `vocab.txt`, in `directory`. Raises CheckpointError."""
        settings = _read_settings(directory / TOKENIZER_CONFIG_FILE)
        limit = min(int(settings.get("model_max_length", 512)), 1 << 20)
        try:
            if (directory / TOKENIZER_FILE).is_file():
                return cls(Tokenizer.from_file(str(directory / TOKENIZER_FILE)), limit)
            # Not splitlines(): it would also split at characters that may be words.
            words = (directory / VOCAB_FILE).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            vocab = {word: number for number, word in enumerate(words)}
            return cls(wordpiece(vocab, bool(settings.get("do_lower_case", True))), limit)
        except FileNotFoundError:
            raise CheckpointError(f"{directory} holds neither {TOKENIZER_FILE} nor {VOCAB_FILE}") from None
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises plain Exception for a broken file
            raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from None

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json`, `vocab.txt` and `tokenizer_config.json`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / TOKENIZER_FILE))
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        (folder / VOCAB_FILE).write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n", encoding="utf-8")
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": getattr(self._tokenizer.normalizer, "lowercase", True),
            "model_max_length": self.model_max_length,
            "model_input_names": ["input_ids", "attention_mask"],
            **SPECIAL_TOKENS,
        }
        (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode_rows(
        self, texts: Sequence[str], limit: int | None = None, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """[CLS] words [SEP] of every text, or its words alone, unpadded.

        InputError when one has more than `limit` tokens or is no text (half of a surrogate pair is none).
        """
        for text in texts:
            if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"{text!r:.60} is no Unicode text")
        rows = [
            encoding.ids
            for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        ]
        for text, row in zip(texts, rows, strict=True):
            if limit is not None and len(row) > limit:
                raise InputError(f"text of {len(row)} tokens is longer than {limit}: {text[:60]!r}…")
        return rows

    def __call__(  # noqa: PLR0913  # transformers' arguments
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
    ) -> BatchFeature:
        """Encode one text or several to `input_ids` and `attention_mask` (B, T).

        `padding`: False, True or "longest" (to the longest), "max_length", on the `padding_side` "right" or "left", to
        a width that `pad_to_multiple_of` divides. `truncation` (True, "longest_first", "only_first") cuts to
        `max_length` (default: the model's), [SEP] kept; `max_length` alone, without padding, cuts too. Without
        `add_special_tokens` there is no [CLS] and no [SEP]. `return_token_type_ids` adds zeros, for other models. One
        text without `return_tensors` ("pt" or "np") gives flat lists. Raises InputError for what is no text and for
        values that are not named here, ValueError for rows of different lengths where tensors are asked for.
        """
        if truncation is None and padding is False and max_length is not None:
            truncation = True  # as in transformers
        to, cut = _named("padding", padding, _PADDINGS), _named("truncation", truncation or False, _TRUNCATIONS)
        if max_length is not None and to == "longest" and not cut:
            warnings.warn("max_length does nothing without truncation=True or padding='max_length'", stacklevel=2)
        limit = self.model_max_length if max_length is None else max_length
        if cut and to and pad_to_multiple_of and limit % pad_to_multiple_of:
            raise InputError(f"pad_to_multiple_of {pad_to_multiple_of} does not divide the max_length {limit}")
        alone = isinstance(text, str)
        rows = self.encode_rows([text] if isinstance(text, str) else text, add_special_tokens=add_special_tokens)
        if cut:
            rows = self._cut(rows, limit, add_special_tokens)
        widest = limit if to == "max_length" else max((len(row) for row in rows), default=0)
        width = -(-widest // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1) if to else 0
        left = _named("padding_side", padding_side or "right", {"left": True, "right": False})
        columns = {
            "input_ids": [_padded(row, self.pad_token_id, width, left) for row in rows],
            "token_type_ids": [[0] * max(width, len(row)) for row in rows] if return_token_type_ids else None,
            "attention_mask": [_padded([1] * len(row), 0, width, left) for row in rows],
        }
        if return_attention_mask is False:
            del columns["attention_mask"]
        kept = {name: column for name, column in columns.items() if column is not None}
        if alone and return_tensors is None:
            return BatchFeature({name: column[0] for name, column in kept.items()})
        return as_features(kept, return_tensors)

    def _cut(self, rows: list[list[int]], limit: int, special: bool) -> list[list[int]]:
        least = 2 if special else 1
        if limit < least:
            raise InputError(f"max_length must be {least} or more to hold a text, not {limit}")
        end = [self.sep_token_id] if special else []
        return [row if len(row) <= limit else [*row[: limit - len(end)], *end] for row in rows]

    def decode(self, token_ids: int | Iterable[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """The text of (T,) ids; ids outside the vocabulary, [DEC] and [ENC] in BLIP, leave no trace."""
        ids: Any = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        return str(self._tokenizer.decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens))

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """The texts of (B, T) ids."""
        return [self.decode(sequence, skip_special_tokens) for sequence in sequences]


def _named(name: str, value: Any, values: dict[Any, Any]) -> Any:
    """What `value` stands for. Raises InputError for one that stands for nothing."""
    if value not in values:
        raise InputError(f"{name} must be {', '.join(repr(each) for each in values)}, not {value!r}")
    return values[value]


def _padded(row: list[int], filler: int, width: int, left: bool) -> list[int]:
    rest = [filler] * (width - len(row))
    return rest + row if left else row + rest


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    return settings if isinstance(settings, dict) else {}
