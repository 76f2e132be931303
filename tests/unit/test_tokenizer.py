"""The tokenizer agrees with transformers' BertTokenizer, from either of its files and on any text."""

import json
import string
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import WORDS
from transformers import BertTokenizer as Theirs

from blip_engine import BertTokenizer
from blip_engine.errors import CheckpointError, InputError

LETTERS = string.ascii_letters + string.digits + "äß中文"
VOCABULARY = list(dict.fromkeys([*WORDS, *LETTERS, *(f"##{c}" for c in LETTERS), *string.punctuation, "un", "##able"]))
TEXTS = [
    "a cat", "A Cats, don't!", "it's what? I'm", "éa photo of the dog-cat zzz", "", "   ", "a [SEP] b [MASK]",
    "[CLS]", "中文 a中b", "ÄÖß é", "tab\tnew\nline", "a\u200bb\x00c\ufffd", "naïve café ﬁ \uff12", "😀 dog",
    "supercalifragilistic", "x" * 101, "red,blue;green", "##ing", "[sep] [Pad]", "dogs dogs dogs unable",
]  # fmt: skip
#: Texts near the vocabulary, so that many a word is known, and any others.
ANY_TEXT = st.text(max_size=60) | st.lists(st.sampled_from([*VOCABULARY, " ", "\u0301"]), max_size=30).map("".join)


def write_vocabulary(directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> BertTokenizer:
    return BertTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return Theirs.from_pretrained(folder, model_max_length=512)


def assert_same(ours: BertTokenizer, theirs: Any, text: Any, **options: Any) -> None:
    mine, other = ours(text, **options), theirs(text, return_token_type_ids=False, **options)
    assert set(mine) == set(other)
    for name in mine:
        if "return_tensors" in options:
            assert torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(other[name]))
        else:
            assert mine[name] == other[name]


class TestEncoding:
    @pytest.mark.parametrize("text", TEXTS)
    def test_texts(self, ours: BertTokenizer, theirs: Any, text: str) -> None:
        assert_same(ours, theirs, text)

    @settings(max_examples=300, deadline=None)
    @given(text=ANY_TEXT)
    def test_any_text(self, ours: BertTokenizer, theirs: Any, text: str) -> None:
        assert_same(ours, theirs, text)

    @settings(max_examples=100, deadline=None)
    @given(
        texts=st.lists(ANY_TEXT, min_size=1, max_size=5),
        padding=st.sampled_from([False, True, "longest", "max_length", "do_not_pad"]),
        truncation=st.booleans(),
        max_length=st.integers(2, 40),
    )
    def test_any_padding_and_truncation(
        self, ours: BertTokenizer, theirs: Any, texts: list[str], padding: Any, truncation: bool, max_length: int
    ) -> None:
        limit = max_length if truncation or padding == "max_length" else None
        assert_same(ours, theirs, texts, padding=padding, truncation=truncation, max_length=limit)

    @settings(max_examples=150, deadline=None)
    @given(
        texts=st.lists(ANY_TEXT, min_size=1, max_size=4),
        padding=st.sampled_from([False, True, "max_length"]),
        truncation=st.sampled_from([None, False, True, "longest_first", "only_first", "do_not_truncate"]),
        max_length=st.none() | st.integers(2, 40),
        options=st.fixed_dictionaries({
            "add_special_tokens": st.booleans(),
            "pad_to_multiple_of": st.sampled_from([None, 1, 4, 8]),
            "padding_side": st.sampled_from([None, "left", "right"]),
            "return_attention_mask": st.sampled_from([None, True, False]),
        }),
    )  # fmt: skip
    def test_any_other_arguments(
        self, ours: BertTokenizer, theirs: Any, texts: list[str], padding: Any, truncation: Any, max_length: int | None,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        given = {"padding": padding, "truncation": truncation, "max_length": max_length, **options}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                assert_same(ours, theirs, texts, **given)
            except InputError:
                with pytest.raises(InputError, match="does not divide the max_length"):
                    ours(texts, **given)
                with pytest.raises(ValueError, match="not a multiple of pad_to_multiple_of"):
                    theirs(texts, **given)
        assert len(caught) in (0, 2)  # an idle max_length: both say it, or neither

    def test_token_types(self, ours: BertTokenizer, theirs: Any) -> None:
        options = {"padding": True, "return_tensors": "pt", "return_token_type_ids": True}
        mine, other = ours(TEXTS[:3], **options), theirs(TEXTS[:3], **options)
        assert list(mine) == list(other)
        assert all(mine[name].equal(other[name]) for name in mine)

    @pytest.mark.parametrize("kind", ["pt", "np"])
    def test_tensors(self, ours: BertTokenizer, theirs: Any, kind: str) -> None:
        assert_same(ours, theirs, TEXTS, padding=True, return_tensors=kind)
        assert_same(ours, theirs, "a cat", return_tensors=kind)
        assert ours("a cat", return_tensors="pt").input_ids.dtype == torch.int64

    def test_faults_are_named(self, ours: BertTokenizer) -> None:
        with pytest.raises(ValueError, match="pass padding=True"):
            ours(["a", "a dog"], return_tensors="pt")
        with pytest.raises(ValueError, match="return_tensors must be"):
            ours("a", return_tensors="tf")
        for name, value in (("padding", "left"), ("truncation", "only_second"), ("padding_side", "top")):
            with pytest.raises(InputError, match=f"{name} must be .*, not '{value}'"):
                ours("a", **{name: value})
        with pytest.raises(InputError, match="max_length must be 2 or more to hold a text, not 1"):
            ours("a", max_length=1)
        with pytest.raises(InputError, match=r"text of 5 tokens is longer than 4: 'a dog sit'"):
            ours.encode_rows(["a", "a dog sit"], limit=4)
        for text in ("a \ud800", None, 3):
            with pytest.raises(InputError, match="is no Unicode text"):
                ours.encode_rows(["a", text])  # type: ignore[list-item]


class TestDecoding:
    @settings(max_examples=200, deadline=None)
    @given(ids=st.lists(st.integers(0, len(VOCABULARY) + 4), max_size=30), skip=st.booleans())
    def test_any_ids_those_out_of_vocabulary_included(
        self, ours: BertTokenizer, theirs: Any, ids: list[int], skip: bool
    ) -> None:
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)

    def test_forms_of_ids(self, ours: BertTokenizer, theirs: Any) -> None:
        encoded = ours(["a cat sits", "dogs"], padding=True, return_tensors="pt").input_ids
        texts = theirs.batch_decode(encoded, skip_special_tokens=True)
        assert texts == ["a cat sits", "dogs"]
        assert ours.batch_decode(encoded, skip_special_tokens=True) == texts
        assert ours.batch_decode(encoded.tolist()) == theirs.batch_decode(encoded)
        assert ours.decode(encoded[0].numpy()) == theirs.decode(encoded[0])
        assert ours.decode(5) == theirs.decode(5) == "a"

    def test_the_words_of_blip_itself_leave_no_trace(self, ours: BertTokenizer) -> None:
        beyond = len(VOCABULARY)  # [DEC], which BLIP's embedding has and its tokenizer has not
        assert ours.decode([beyond, 5, VOCABULARY.index("dog")], skip_special_tokens=True) == "a dog"


class TestFiles:
    @pytest.mark.parametrize("lowercase", [True, False])
    def test_either_file_gives_the_same_ids_there_and_back(self, tmp_path: Path, lowercase: bool) -> None:
        first = write_vocabulary(tmp_path / "vocab", do_lower_case=lowercase, model_max_length=512)
        theirs = Theirs.from_pretrained(first)
        theirs.save_pretrained(tmp_path / "theirs")
        from_vocabulary = BertTokenizer.from_pretrained(first)
        from_vocabulary.save_pretrained(tmp_path / "ours")
        assert (tmp_path / "theirs" / "tokenizer.json").is_file()
        assert not (tmp_path / "theirs" / "vocab.txt").exists()
        tokenizers = [
            from_vocabulary,
            BertTokenizer.from_pretrained(tmp_path / "theirs"),
            BertTokenizer.from_pretrained(tmp_path / "ours"),
            Theirs.from_pretrained(tmp_path / "ours"),
        ]
        for text in TEXTS:
            assert all(tokenizer(text)["input_ids"] == theirs(text)["input_ids"] for tokenizer in tokenizers)
        assert all(len(tokenizer) == len(VOCABULARY) for tokenizer in tokenizers)
        assert (tmp_path / "ours" / "vocab.txt").read_text() == (first / "vocab.txt").read_text()

    def test_settings_baked_into_tokenizer_json_do_not_apply(self, folder: Path, tmp_path: Path) -> None:
        theirs = Theirs.from_pretrained(folder)
        theirs(["a"] * 2, padding="max_length", truncation=True, max_length=4)  # kept by the file below
        theirs.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is not None
        ours = BertTokenizer.from_pretrained(tmp_path)
        assert ours("a dog sit on a cat")["attention_mask"] == [1] * 8

    def test_a_line_separator_may_be_a_word(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY[:20], "\u2028", "\x85", "zebra"]), encoding="utf-8")
        ours, theirs = BertTokenizer.from_pretrained(tmp_path), Theirs.from_pretrained(tmp_path)
        assert ours("zebra")["input_ids"] == theirs("zebra")["input_ids"] == [2, 22, 3]

    def test_faults_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.txt"):
            BertTokenizer.from_directory(tmp_path)
        (tmp_path / "vocab.txt").write_text("a\nb\n")
        with pytest.raises(CheckpointError, match="the tokenizer in"):
            BertTokenizer.from_directory(tmp_path)
        (tmp_path / "tokenizer.json").write_text('{"model": 1}')
        with pytest.raises(CheckpointError, match="cannot be read"):
            BertTokenizer.from_directory(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
            BertTokenizer.from_directory(tmp_path)
