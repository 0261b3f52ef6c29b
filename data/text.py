"""Texts -> token ids: by a tokenizer of transformers, or word pieces of the training texts."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data.config import ModalityConfig
from data.processors import Place, text_of
from data.schema import DataError, Modality, Split
from data.sources.base import RejectedSample
from data.sources.raw import Media

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FIT = "fit"
VOCAB_SIZE = 8192
MIN_FREQUENCY = 2
PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
INSIDE = "##"


class Tokens:
    """Text: int32 (L,) token ids, cut at the end, padded behind.

    Attributes:
        tokenizer_json: the tokenizer as `tokenizers` reads it; kept with the shards.
    """

    def __init__(
        self,
        base: Modality,
        settings: ModalityConfig,
        place: Place,
        training: Callable[[], Iterable[Media]],
        kept: str | None = None,
    ):
        """With `kept`, the tokenizer of a prepared set, nothing is learnt or loaded."""
        assert settings.tokens
        assert settings.tokenizer
        self._place = place
        length = settings.tokens
        if kept is not None:
            from tokenizers import Tokenizer

            tokenizer, pad = Tokenizer.from_str(kept), base.pad
        elif settings.tokenizer == FIT:
            tokenizer, pad = _fit(lambda: _texts(training(), place)), 0
        else:
            tokenizer, pad = _load(settings.tokenizer)
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad, pad_token=tokenizer.id_to_token(pad))
        self._tokenizer = tokenizer
        self.tokenizer_json = tokenizer.to_str()
        self.modality = base.model_copy(
            update={
                "shape": (length,),
                "dtype": "int32",
                "pad": pad,
                "vocab_size": tokenizer.get_vocab_size(),
                "about": f"tokens of {settings.tokenizer}",
            }
        )

    def load(self, media: Media, split: Split) -> np.ndarray:
        """Tokenize."""
        text = text_of(media, self._place)
        if not text.strip():
            raise RejectedSample("the text is empty")
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int32)


def _texts(media: Iterable[Media], place: Place) -> Iterator[str]:
    for medium in media:
        try:
            yield text_of(medium, place)
        except RejectedSample:  # it is rejected, and reported, when its own turn comes
            continue


def _fit(texts: Callable[[], Iterator[str]]) -> "Tokenizer":
    """Uncased word pieces (as BERT's), learnt from texts; the same in every process.

    The trainer numbers the pieces inside words in an order that differs from process to process,
    and breaks ties by number. Given as special tokens they have numbers of their own; a second
    tokenizer takes over the pieces, and only the real special tokens are special there.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import models, processors
    from tokenizers.trainers import WordPieceTrainer

    special = [PAD, UNKNOWN, FIRST, LAST]
    learner = _word_pieces(models.WordPiece(unk_token=UNKNOWN))
    trainer = WordPieceTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=MIN_FREQUENCY,
        special_tokens=special + _pieces_inside(learner, texts()),
        show_progress=False,
    )
    learner.train_from_iterator(texts(), trainer)
    tokenizer = _word_pieces(models.WordPiece(learner.get_vocab(), unk_token=UNKNOWN))
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A {LAST}", special_tokens=[(FIRST, 2), (LAST, 3)]
    )
    return tokenizer


def _word_pieces(model: Any) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _pieces_inside(tokenizer: "Tokenizer", texts: Iterable[str]) -> list[str]:
    """The pieces of one letter that stand inside words, sorted."""
    letters: set[str] = set()
    for text in texts:
        plain = tokenizer.normalizer.normalize_str(text)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(plain):
            letters.update(word[1:])
    return [INSIDE + letter for letter in sorted(letters)]


def _load(name: str) -> tuple["Tokenizer", int]:
    """The fast tokenizer `name`, a folder or a hub name, and the id of its padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(
            f"tokenizer {name!r} cannot be loaded ({first}); give a folder that holds it, a hub "
            f'name with network access, or "{FIT}" to learn one from the training texts '
            "(data.modalities.NAME.tokenizer)"
        ) from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise DataError(
            f"tokenizer {name!r} has no fast form or no padding token, which rows of one length "
            "need; use another one"
        )
    return tokenizer.backend_tokenizer, tokenizer.pad_token_id
