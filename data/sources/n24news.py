"""N24News: a news image with headline, caption, abstract or article; 24 sections of a newspaper.

Z. Wang et al., "N24News: A New Dataset for Multimodal News Classification", LREC 2022. Two layouts
are read: `news/nytimes_{train,dev,test}.json` with `imgs/<image_id>.jpg`, as downloaded; else
`nytimes_dataset_full.json` with `images/<image_id>.jpg`, as build_fully_dataset.py of
billywzh717/N24News writes them, with no partition, and `body` for `article`. Either folder of
images goes with either index.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import Split
from data.sources.base import raw_folder
from data.sources.index import read_json_list
from data.sources.raw import Media, RawSample, Stills, Text, Unreadable

# In the order of their numbers in RaghavSinghal10/M3CoL.
SECTIONS = (
    *("Health", "Books", "Science", "Art & Design", "Television", "Style", "Travel", "Media"),
    *("Movies", "Food", "Dance", "Well", "Real Estate", "Fashion & Style", "Economy"),
    *("Technology", "Sports", "Your Money", "Theater", "Education", "Opinion", "Automobiles"),
    *("Music", "Global Business"),
)
PARTITION: dict[Split, str] = {
    "train": "news/nytimes_train.json",
    "val": "news/nytimes_dev.json",
    "test": "news/nytimes_test.json",
}
WHOLE: dict[Split, str] = {"train": "nytimes_dataset_full.json"}
IMAGE_FOLDERS = ("imgs", "images")
REMEDY = (
    "`--data.root DIR` with imgs/ or images/, and with nytimes_train.json, nytimes_dev.json and "
    "nytimes_test.json in news/, or nytimes_dataset_full.json inside"
)


class N24News:
    """One text of an article, `DataConfig.text`, and its image.

    Classes are the sections that occur in the index, of the 24 there are, in M3CoL's order: all 24
    in the full set, fewer in a part of it. A text that is blank or not there (articles behind a
    wall) is left out of the sample. Samples of one article are a group.
    """

    name: ClassVar[str] = "n24news"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {"text": "text", "image": "image"}
    official: ClassVar[Mapping[str, ModalityConfig]] = {
        "text": ModalityConfig(tokenizer="roberta-base", tokens=512)
    }

    def __init__(self, config: DataConfig) -> None:
        root = raw_folder(config, (), REMEDY)
        indexes = (PARTITION, WHOLE)
        self._files = next((i for i in indexes if (root / i["train"]).is_file()), PARTITION)
        self._images = next((f for f in IMAGE_FOLDERS if (root / f).is_dir()), IMAGE_FOLDERS[0])
        self._root = raw_folder(config, (*self._files.values(), self._images), REMEDY)
        self._text = config.text
        found = {item.label for item in self.samples() if isinstance(item, RawSample)}
        self.classes: tuple[str, ...] = tuple(name for name in SECTIONS if name in found)

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """One sample an item; the key is the image's id."""
        for split, name in self._files.items():
            path = self._root / name
            for position, item in read_json_list(path):
                sample = item if isinstance(item, str) else self._sample(item, split)
                if isinstance(sample, str):
                    sample = Unreadable(f"{path.name} item {position}", sample, split)
                yield sample

    def _sample(self, item: dict[str, object], split: Split) -> RawSample | str:
        """The sample, or what is wrong with the item."""
        image_id, section, url = (item.get(k) for k in ("image_id", "section", "article_url"))
        if not isinstance(image_id, str) or not image_id:
            return f"image_id is {image_id!r}; the name of an image is needed"
        if not isinstance(section, str) or not section:
            return f"section is {section!r}; a name is needed"
        text = item["body"] if self._text == "article" and "body" in item else item.get(self._text)
        words = text.strip() if isinstance(text, str) else ""
        media: dict[str, Media] = {"text": Text(words)} if words else {}
        media["image"] = Stills((f"{self._images}/{image_id}.jpg",))
        return RawSample(image_id, section, split, media, url if isinstance(url, str) else None)
