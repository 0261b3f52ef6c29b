"""UPMC Food-101: web images of 101 dishes with the title (or the text) of their page.

X. Wang et al., "Recipe recognition with large multimodal food dataset", ICME workshops 2015.
Images lie in `images/{train,test}/<class>/<class>_<n>.jpg`. Three forms of index are read, the
first that is there:

1. `{train,test}.jsonl`, and `dev.jsonl` if there is one, an object a line: `img`, `label`, `text`.
   The MIDAS release writes `apple_pie/apple_pie_0.jpg` and a number,
   facebookresearch/mmbt `images/train/apple_pie/apple_pie_0.jpg` and the class's name.
2. `texts/{train,test}_titles.csv`: image, title, class.
3. `{train,test}.csv` of RaghavSinghal10/M3CoL: image, text, class, number of the class. The text is
   the column's, not that of `texts_txt/`.

CSV is read by position, with or without a header.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import Split
from data.sources.base import raw_folder
from data.sources.index import Record, read_json_lines, read_rows, where, without_header
from data.sources.raw import Media, RawSample, Stills, Text, Unreadable

FORMS: tuple[dict[Split, str], ...] = (
    {"train": "train.jsonl", "val": "dev.jsonl", "test": "test.jsonl"},
    {"train": "texts/train_titles.csv", "test": "texts/test_titles.csv"},
    {"train": "train.csv", "test": "test.csv"},
)
IMAGE_FOLDERS: dict[Split, str] = {"train": "train", "val": "train", "test": "test"}
CSV_COLUMNS = ("image", "text", "class", "number")
REMEDY = (
    "`--data.root DIR` with images/, and with train.jsonl and test.jsonl, or texts/ holding "
    "train_titles.csv and test_titles.csv, or train.csv and test.csv inside"
)

RETWEET = re.compile(r"^RT\s+")
LINK = re.compile(r"https?://.*[\r\n]*")


@dataclass(frozen=True)
class _Row:
    """One row of an index.

    Attributes:
        folder: class folder of the image.
        image: path of the image relative to the root.
        label: class as the index says it: number or name.
    """

    folder: str
    image: str
    label: int | str
    text: str
    split: Split


class Food101:
    """Title and image of a page.

    A class is a folder of images. Which label belongs to which folder is found by counting: most
    rows of the folder have the label, and most rows with the label are in the folder. The label of
    any other row stays as it is written, and is then no class. Classes stand in the order of their
    numbers, so that a label here is the index's; without numbers they are sorted by name.

    The official partition has no validation part; `dev.jsonl`, which MMBT's script takes out of
    train, is one if it is there. The official recipe cleans texts (`clean_title`); the default only
    strips them. A text that is blank then is left out of the sample; the release keeps it.
    """

    name: ClassVar[str] = "food101"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {"text": "text", "image": "image"}
    official: ClassVar[Mapping[str, ModalityConfig]] = {}

    def __init__(self, config: DataConfig) -> None:
        root = raw_folder(config, ("images",), REMEDY)
        self._clean = clean_title if config.recipe == "official" else str.strip
        self._rows = list(_read(root, config))
        self._labels = _class_labels([row for row in self._rows if isinstance(row, _Row)])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders, in label order."""
        return tuple(self._labels)

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """One sample a row; the key is the image's name without suffix: `apple_pie_0`."""
        for row in self._rows:
            yield row if isinstance(row, Unreadable) else self._sample(row)

    def _sample(self, row: _Row) -> RawSample:
        is_class = self._labels.get(row.folder) == row.label
        text = self._clean(row.text)
        media: dict[str, Media] = {"text": Text(text)} if text.strip() else {}
        media["image"] = Stills((row.image,))
        label = row.folder if is_class else str(row.label)
        return RawSample(PurePosixPath(row.image).stem, label, row.split, media)


def clean_title(text: str) -> str:
    """Text as the MIDAS release cleans it (models/model_midas_food101.py, `clean_text`).

    A leading "RT " goes, then each link with the rest of its line and the line ends after it, then
    every "#".
    """
    return LINK.sub("", RETWEET.sub("", text)).replace("#", "")


def _read(root: Path, config: DataConfig) -> Iterator[_Row | Unreadable]:
    """Rows of the first form of index whose train file is there, split after split."""
    form = next((form for form in FORMS if (root / form["train"]).is_file()), FORMS[0])
    raw_folder(config, (form["train"], form["test"]), REMEDY)
    for split, name in form.items():
        path = root / name
        if not path.is_file():
            continue  # dev.jsonl
        for line, record in _records(path):
            row = record if isinstance(record, str) else _row(record, split)
            yield Unreadable(where(path, line), row, split) if isinstance(row, str) else row


def _records(path: Path) -> list[Record]:
    """Line number and fields of every row; a row of another width is a str, the reason."""
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    columns = CSV_COLUMNS[:3] if path.parent.name == "texts" else CSV_COLUMNS
    rows = without_header(read_rows(path, ","))
    return [(line, _fields(cells, columns)) for line, cells in rows]


def _fields(cells: list[str], columns: tuple[str, ...]) -> dict[str, object] | str:
    """A row of a CSV file under the names of the JSON form."""
    if len(cells) != len(columns):
        return f"{len(cells)} cells; {', '.join(columns)} are needed"
    image, text, folder = cells[:3]
    return {"img": f"{folder}/{image}", "label": cells[-1], "text": text}


def _row(record: dict[str, object], split: Split) -> _Row | str:
    """The row, or what is wrong with it."""
    image, label, text = (record.get(name) for name in ("img", "label", "text"))
    if not isinstance(image, str) or "/" not in image:
        return f"img is {image!r}; `class/file` is needed"
    if not isinstance(label, int | str) or label == "":
        return f"label is {label!r}; a number or a name is needed"
    if not isinstance(text, str):
        return f"text is {text!r}; a string is needed"
    if not image.startswith("images/"):
        image = f"images/{IMAGE_FOLDERS[split]}/{image}"
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    return _Row(PurePosixPath(image).parent.name, image, label, text, split)


def _class_labels(rows: list[_Row]) -> dict[str, int | str]:
    """Class folder -> its label, in label order; folder and label are each other's most common."""
    pairs = Counter((row.folder, row.label) for row in rows)
    label_of: dict[str, int | str] = {}
    folder_of: dict[int | str, str] = {}
    for (folder, label), _ in pairs.most_common():
        label_of.setdefault(folder, label)
        folder_of.setdefault(label, folder)
    labels = {f: label for f, label in label_of.items() if folder_of[label] == f}
    numbered = all(isinstance(label, int) for label in labels.values())
    order = sorted(labels, key=lambda folder: (labels[folder] if numbered else 0, folder))
    return {folder: labels[folder] for folder in order}
