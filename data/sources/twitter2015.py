"""Twitter2015: the sentiment of a tweet with image towards a target named in it.

Text in the layout of jefferyYu/TomBERT (J. Yu and J. Jiang, IJCAI 2019), `{train,dev,test}.tsv`;
columns by position: number, label, image, sentence, target. In the sentence `$T$` stands for the
target. The header of test.tsv lacks a name, so headers are not read. Images are a separate
download.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import Split
from data.sources.base import raw_folder
from data.sources.index import read_rows, where
from data.sources.raw import RawSample, Stills, Text, Unreadable

FILES: dict[Split, str] = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
TEXT_FOLDERS = ("", "twitter2015/", "absa_data/twitter2015/")
IMAGE_FOLDERS = ("twitter2015_images", "images", "absa_data/twitter2015_images")
NUM_COLUMNS = 5
LABELS = {"0": "negative", "1": "neutral", "2": "positive"}
TARGET_MARK = "$T$"
# A word for BERT's tokenizers, which write it between two texts; other tokenizers take it apart.
SEPARATOR = "[SEP]"
REMEDY = (
    "`--data.root DIR` with train.tsv, dev.tsv and test.tsv of twitter2015 and the folder "
    "twitter2015_images or images inside"
)


class Twitter2015:
    """Sentence with target, and image.

    TomBERT gives BERT two texts, the sentence and the target, both in lower case and `$T$` left
    where it is. Here they are one text, `<sentence> [SEP] <target>`; the official recipe keeps the
    lower case and `$T$`, the default puts the target in its place.

    Several rows share an image, and often a sentence, with other targets: the image is the group.
    The key is file and number: `train-17`.
    """

    name: ClassVar[str] = "twitter2015"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {"text": "text", "image": "image"}
    classes: tuple[str, ...] = tuple(LABELS.values())
    official: ClassVar[Mapping[str, ModalityConfig]] = {
        "text": ModalityConfig(tokenizer="bert-base-uncased", tokens=64)
    }

    def __init__(self, config: DataConfig) -> None:
        root = raw_folder(config, (), REMEDY)
        texts = next((f for f in TEXT_FOLDERS if (root / f"{f}train.tsv").is_file()), "")
        self._files: dict[Split, str] = {split: texts + name for split, name in FILES.items()}
        self._images = next((f for f in IMAGE_FOLDERS if (root / f).is_dir()), IMAGE_FOLDERS[0])
        self._root = raw_folder(config, (*self._files.values(), self._images), REMEDY)
        self._join = _official_text if config.recipe == "official" else _default_text

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """One sample a row; a label that is not 0, 1 or 2 stays as it is written."""
        for split, name in self._files.items():
            path = self._root / name
            for position, (line, cells) in enumerate(read_rows(path, "\t")):
                if position == 0 and cells[0] == "index":
                    continue
                if len(cells) != NUM_COLUMNS or not all(cells):
                    reason = f"{sum(map(bool, cells))} filled cells, {NUM_COLUMNS} are needed"
                    yield Unreadable(where(path, line), reason, split)
                else:
                    yield self._sample(cells, split, path.stem)

    def _sample(self, cells: list[str], split: Split, stem: str) -> RawSample:
        number, label, image, sentence, target = cells
        return RawSample(
            key=f"{stem}-{number}",
            label=LABELS.get(label, label),
            split=split,
            media={
                "text": Text(self._join(sentence, target)),
                "image": Stills((f"{self._images}/{image}",)),
            },
            group=image,
        )


def _default_text(sentence: str, target: str) -> str:
    return f"{sentence.replace(TARGET_MARK, target)} {SEPARATOR} {target}"


def _official_text(sentence: str, target: str) -> str:
    return f"{sentence.lower()} {SEPARATOR} {target.lower()}"
