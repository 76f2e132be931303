"""BERT's WordPiece tokenizer over the `tokenizers` library, from `tokenizer.json` or `vocab.txt`.

Source: Devlin et al. 2018, https://arxiv.org/abs/1810.04805; WordPiece is Wu et al. 2016, https://arxiv.org/abs/1609.08144.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor

from .checkpoint import find_checkpoint
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
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None
    ) -> "BertTokenizer":
        """From a directory or a hub repository. Raises CheckpointError."""
        return cls.from_directory(find_checkpoint(pretrained_model_name_or_path, revision).directory)

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

    def encode_rows(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """[CLS] words [SEP] of every text, unpadded.

        InputError when one has more than `limit` tokens or is no text (half of a surrogate pair is none).
        """
        for text in texts:
            if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"{text!r:.60} is no Unicode text")
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        for text, row in zip(texts, rows, strict=True):
            if limit is not None and len(row) > limit:
                raise InputError(f"text of {len(row)} tokens is longer than {limit}: {text[:60]!r}…")
        return rows

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Encode one text or several to `input_ids` and `attention_mask` (B, T).

        `padding`: False, True or "longest" (to the longest), "max_length". `truncation` cuts to `max_length`
        (default: the model's), [SEP] kept. One text without `return_tensors` gives flat lists. Raises InputError for
        what is no text, ValueError for rows of different lengths where tensors are asked for.
        """
        alone = isinstance(text, str)
        rows = self.encode_rows([text] if isinstance(text, str) else text)
        limit = max_length or self.model_max_length
        if truncation:
            rows = [row if len(row) <= limit else [*row[: limit - 1], self.sep_token_id] for row in rows]
        widest = max((len(row) for row in rows), default=0)
        widths = {False: 0, "do_not_pad": 0, True: widest, "longest": widest, "max_length": limit}
        if padding not in widths:
            raise InputError(f"padding must be True, False, 'longest' or 'max_length', not {padding!r}")
        width = widths[padding]
        ids = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        if alone and return_tensors is None:
            return BatchFeature(input_ids=ids[0], attention_mask=mask[0])
        return as_features({"input_ids": ids, "attention_mask": mask}, return_tensors)

    def decode(self, token_ids: int | Iterable[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """The text of (T,) ids; ids outside the vocabulary, [DEC] and [ENC] in BLIP, leave no trace."""
        ids: Any = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        return str(self._tokenizer.decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens))

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """The texts of (B, T) ids."""
        return [self.decode(sequence, skip_special_tokens) for sequence in sequences]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    return settings if isinstance(settings, dict) else {}
