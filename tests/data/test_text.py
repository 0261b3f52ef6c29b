"""Texts -> token ids: learnt word pieces are the same everywhere, given tokenizers are obeyed."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from data.config import ModalityConfig
from data.processors import Place
from data.schema import DataError, Modality
from data.sources.base import RejectedSample
from data.sources.raw import Media, Text, TextFile
from data.text import Tokens

WORDS = [f"{a}{b}{c}" for a in ("ba", "ke", "lo", "mu") for b in "rst" for c in ("an", "ing", "o")]
TEXTS = [
    " ".join(WORDS[(n * k + k) % len(WORDS)].title() for k in range(3, 12)) + f", no. {n}!"
    for n in range(60)
]


def tokens(
    tokenizer: str = "fit", length: int = 16, texts: Sequence[str] = TEXTS, root: Path = Path(".")
) -> Tokens:
    base = Modality(name="text", kind="text", shape=(), dtype="float32")
    settings = ModalityConfig(tokenizer=tokenizer, tokens=length)
    media: list[Media] = [Text(text) for text in texts]
    return Tokens(base, settings, Place(root.resolve(), official=False), lambda: media)


# ---- learnt

LEARN = """
import json, sys
from pathlib import Path
from data.config import ModalityConfig
from data.processors import Place
from data.schema import Modality
from data.sources.raw import Text
from data.text import Tokens

base = Modality(name="text", kind="text", shape=(), dtype="float32")
settings = ModalityConfig(tokenizer="fit", tokens=16)
texts = [Text(text) for text in json.load(sys.stdin)]
sys.stdout.write(Tokens(base, settings, Place(Path("."), False), lambda: texts).tokenizer_json)
"""


def learn_elsewhere(seed: int) -> str:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": root}
    command, given = [sys.executable, "-c", LEARN], json.dumps(TEXTS)
    done = subprocess.run(
        command, input=given, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_word_pieces_are_the_same_in_every_process() -> None:
    """The trainer of `tokenizers` alone gives other pieces in every process."""
    here = tokens().tokenizer_json
    assert learn_elsewhere(1) == learn_elsewhere(2) == here


def test_word_pieces() -> None:
    processor = tokens()
    modality = processor.modality
    assert (modality.shape, modality.dtype, modality.pad) == ((16,), "int32", 0)
    tokenizer = Tokenizer.from_str(processor.tokenizer_json)
    vocabulary = tokenizer.get_vocab()
    assert modality.vocab_size == len(vocabulary) > len(WORDS)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    assert [vocabulary[token] for token in special] == [0, 1, 2, 3]
    added = json.loads(processor.tokenizer_json)["added_tokens"]
    assert [token["content"] for token in added if token["special"]] == special
    found = processor.load(Text("BARAN loroing?"), "train")
    assert (found.shape, found.dtype) == ((16,), np.int32)
    assert found[0] == 2
    assert (found[list(found).index(3) + 1 :] == 0).all()
    assert tokenizer.decode(found.tolist()) == "baran loroing"  # "?" is nowhere in the texts
    assert 1 in found


def test_words_are_whole_where_they_are_frequent_and_in_pieces_where_not() -> None:
    tokenizer = Tokenizer.from_str(tokens().tokenizer_json)
    assert tokenizer.encode("baran kesing").tokens[1:3] == ["baran", "kesing"]
    assert tokenizer.encode("barano").tokens[1:3] == ["baran", "##o"]
    assert tokenizer.decode(tokenizer.encode("barano").ids) == "barano"


def test_long_texts_are_cut_and_end_as_they_should() -> None:
    processor = tokens(length=8)
    found = processor.load(Text(" ".join(WORDS)), "val")
    assert found.shape == (8,)
    assert (found[0], found[-1]) == (2, 3)
    assert 0 not in found


def test_learning_skips_texts_that_cannot_be_read(tmp_path: Path) -> None:
    base = Modality(name="text", kind="text", shape=(), dtype="float32")
    settings = ModalityConfig(tokenizer="fit", tokens=16)
    place = Place(tmp_path.resolve(), official=False)
    media: list[Media] = [*(Text(text) for text in TEXTS), TextFile("absent"), Text("\ud83d")]
    processor = Tokens(base, settings, place, lambda: media)
    assert processor.tokenizer_json == tokens().tokenizer_json
    for medium, words in ((media[-2], "absent does not exist"), (media[-1], "as UTF-8")):
        with pytest.raises(RejectedSample, match=words):
            processor.load(medium, "train")


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_empty_texts(text: str) -> None:
    with pytest.raises(RejectedSample, match="the text is empty"):
        tokens().load(Text(text), "train")


# ---- given


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: n for n, word in enumerate([*special, *WORDS, "!", ",", "##ing", "un"])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder


def test_a_given_tokenizer_gives_its_own_ids(bert: Path) -> None:
    processor = tokens(str(bert), length=12)
    reference = AutoTokenizer.from_pretrained(bert)
    texts = ["Baran, keso!", "unbaraning unknown", " ".join(WORDS)]
    expected = reference(texts, padding="max_length", truncation=True, max_length=12)["input_ids"]
    found = [processor.load(Text(text), "train").tolist() for text in texts]
    assert found == expected
    assert len({tuple(row) for row in found}) == 3
    modality = processor.modality
    assert (modality.pad, modality.vocab_size) == (0, len(reference))


def test_the_stored_tokenizer_gives_the_same_ids(bert: Path) -> None:
    for processor in (tokens(str(bert)), tokens()):
        again = Tokenizer.from_str(processor.tokenizer_json)
        text = Text("Baran, keso lotan!")
        assert again.encode(text.text).ids == processor.load(text, "test").tolist()


def test_missing_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "nowhere"), str(tmp_path / "empty")):
        words = rf"tokenizer '{name}' cannot be loaded \(.*give a folder that holds it, .* \"fit\""
        with pytest.raises(DataError, match=words):
            tokens(name)


def test_tokenizer_without_padding(tmp_path: Path) -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no fast form or no padding token"):
        tokens(str(tmp_path))
