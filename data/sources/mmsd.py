"""MMSD and MMSD2.0: sarcastic tweets or not, text and image.

Y. Cai et al., ACL 2019; corrected by L. Qin et al., "MMSD2.0", ACL findings 2023. In the layout of
JoeYing1019/MMSD2.0: below `data/`, the lists `{train,valid,test}.json` of objects `image_id`,
`text`, `label` in text_json_final (MMSD2.0) and text_json_clean (MMSD), and the images
`dataset_image/<image_id>.jpg`, a separate download.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import Split
from data.sources.base import raw_folder
from data.sources.index import read_json_list
from data.sources.raw import Media, RawSample, Stills, Text, Unreadable

FILES: dict[Split, str] = {"train": "train.json", "val": "valid.json", "test": "test.json"}
TEXT_FOLDERS = ("text_json_final", "text_json_clean")
IMAGE_FOLDER = "dataset_image"
LABELS = {0: "not_sarcastic", 1: "sarcastic"}
REMEDY = (
    "`--data.root DIR` with dataset_image/ and text_json_final/ or text_json_clean/ inside, or "
    "the folder above, which holds data/"
)


class Mmsd:
    """Text and image of a tweet; the key is the image's id.

    Reads text_json_final (MMSD2.0) where it is there, else text_json_clean (MMSD): to use MMSD,
    leave that alone below the root. The root is the repository or its folder `data`. Ids have 18
    digits, more than a float holds: one that is written as a float names no image. A blank text is
    left out of the sample.
    """

    name: ClassVar[str] = "mmsd"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {"text": "text", "image": "image"}
    classes: tuple[str, ...] = tuple(LABELS.values())
    official: ClassVar[Mapping[str, ModalityConfig]] = {
        "text": ModalityConfig(tokenizer="openai/clip-vit-base-patch32", tokens=77)
    }

    def __init__(self, config: DataConfig) -> None:
        root = raw_folder(config, (), REMEDY)
        above = "data/" if (root / "data" / IMAGE_FOLDER).is_dir() else ""
        texts = next((f for f in TEXT_FOLDERS if (root / above / f).is_dir()), TEXT_FOLDERS[0])
        self._files: dict[Split, str] = {s: f"{above}{texts}/{f}" for s, f in FILES.items()}
        self._images = f"{above}{IMAGE_FOLDER}"
        self._root = raw_folder(config, (*self._files.values(), self._images), REMEDY)

    def samples(self) -> Iterator[RawSample | Unreadable]:
        """One sample an item; a label that is neither 0 nor 1 stays as it is written."""
        for split, name in self._files.items():
            path = self._root / name
            for position, item in read_json_list(path):
                sample = item if isinstance(item, str) else self._sample(item, split)
                if isinstance(sample, str):
                    sample = Unreadable(f"{path.name} item {position}", sample, split)
                yield sample

    def _sample(self, item: dict[str, object], split: Split) -> RawSample | str:
        """The sample, or what is wrong with the item."""
        image_id, text, label = (item.get(name) for name in ("image_id", "text", "label"))
        if not isinstance(image_id, int | str) or not str(image_id).isdecimal():
            return f"image_id is {image_id!r}; a whole number is needed"
        if not isinstance(text, str):
            return f"text is {text!r}; a string is needed"
        if not isinstance(label, int):
            return f"label is {label!r}; 0 or 1 is needed"
        media: dict[str, Media] = {"text": Text(text.strip())} if text.strip() else {}
        media["image"] = Stills((f"{self._images}/{image_id}.jpg",))
        return RawSample(str(image_id), LABELS.get(label, str(label)), split, media)
