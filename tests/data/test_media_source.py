"""MediaSource: what an adapter yields is checked, split and shaped; nothing is lost in silence."""

import hashlib
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from data.config import DataConfig, Kind, ModalityConfig
from data.media_source import MediaSource
from data.prepare import prepare
from data.schema import DataError
from data.sources.base import Item, RejectedSample, Rejection, raw_folder
from data.sources.raw import Media, RawSample, Sound, Stills, Text, Unreadable, Values
from tests.data.media_files import picture, tone, write_image, write_sound

SETTINGS = {
    "photo": {"side": 16, "train_side": 24},
    "sound": {"seconds": 0.3, "num_mels": 16},
    "words": {"tokens": 8},
}


class Toy:
    """Samples of four modalities; `rows` is what each test bends."""

    name: ClassVar[str] = "cremad"
    version: ClassVar[int] = 7
    kinds: Mapping[str, Kind] = {
        "photo": "image",
        "sound": "audio",
        "words": "text",
        "numbers": "vector",
    }
    classes: tuple[str, ...] = ("cat", "dog", "eel")
    official: ClassVar[Mapping[str, ModalityConfig]] = {"numbers": ModalityConfig(scale="minmax")}
    rows: ClassVar[list[RawSample | Unreadable]] = []
    made: ClassVar[int] = 0

    def __init__(self, config: DataConfig) -> None:
        raw_folder(config, ("photos",), "a folder")
        Toy.made += 1

    def samples(self) -> Iterator[RawSample | Unreadable]:
        yield from self.rows


def media(number: int, without: str = "") -> dict[str, Media]:
    found: dict[str, Media] = {
        "photo": Stills((f"photos/{number % 4}.png",)),
        "sound": Sound(f"sounds/{number % 4}.wav"),
        "words": Text(f"a cat or a dog, number {number % 4}"),
        "numbers": Values(np.array([number, 10.0 * number])),
    }
    found.pop(without, None)
    return found


def sample(number: int, label: str = "", **changes: Any) -> RawSample:
    split = "test" if number >= 40 else "val" if number >= 30 else "train"
    values = {
        "key": f"clip-{number}",
        "label": label or ("cat", "dog", "eel")[number % 3],
        "split": split,
        "media": media(number),
        "group": f"person-{number // 10}",
    }
    return RawSample(**values | changes)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "raw"
    for number in range(4):
        write_image(folder / "photos" / f"{number}.png", picture(20, 30, seed=number))
        write_sound(folder / "sounds" / f"{number}.wav", tone(0.3, hertz=200.0 + 100 * number))
    monkeypatch.setattr(Toy, "rows", [sample(number) for number in range(50)])
    monkeypatch.setattr(Toy, "made", 0)
    return folder


def source(root: Path, **settings: Any) -> MediaSource:
    values: dict[str, Any] = {"name": "cremad", "root": str(root), "modalities": SETTINGS}
    return MediaSource(Toy, DataConfig.model_validate(values | settings))


def test_a_wrong_root_is_found_at_once(root: Path) -> None:
    with pytest.raises(DataError, match=r"is not a folder; give a folder"):
        source(root / "nowhere")
    with pytest.raises(DataError, match="lacks photos, which cremad needs"):
        source(root / "sounds")


def test_the_adapter_is_made_once(root: Path) -> None:
    made = source(root)
    made.items()
    made.items()
    assert Toy.made == 1


def test_items_are_the_samples_in_order(root: Path) -> None:
    made = source(root)
    items = made.items()
    assert [item.sample_id for item in items] == list(range(50))
    assert [item.key for item in items] == [f"clip-{n}" for n in range(50)]
    assert items[31] == Item(31, "clip-31", "dog", "val", "person-3", Toy.rows[31].media)  # pyright: ignore[reportAttributeAccessIssue]
    assert (made.name, made.version, made.split_rule) == ("cremad", 7, "official")
    assert (made.classes, made.rejected) == (("cat", "dog", "eel"), [])
    assert [m.name for m in made.modalities] == ["photo", "sound", "words", "numbers"]


def test_samples_load_as_their_modalities_say(root: Path) -> None:
    made = source(root)
    for item in made.items()[::7]:
        arrays = made.load(item)
        for modality in made.modalities:
            array = arrays[modality.name]
            assert array.shape == modality.stored(item.split)
            assert array.dtype == modality.dtype
    train = np.arange(30.0)
    found = made.load(made.items()[45])["numbers"]
    np.testing.assert_allclose(found, np.full(2, (45 - train.mean()) / train.std()), rtol=1e-6)


def test_the_recipe_chooses_the_settings(root: Path) -> None:
    made = source(root, recipe="official", modalities=SETTINGS | {"words": {"tokenizer": "fit"}})
    items = made.items()
    photo, sound, words, _ = made.modalities
    assert (photo.train_shape, sound.dtype, words.shape) == (None, "float32", (512,))
    assert made.load(items[29])["numbers"].tolist() == [1.0, 1.0]  # the largest of train


def test_what_is_no_sample_is_rejected_with_its_reason(root: Path) -> None:
    Toy.rows += [
        Unreadable("train.csv line 9", "2 cells, 3 expected", "train"),
        sample(3, split="test"),
        sample(60, "zebra"),
        sample(61, ""),
        sample(61, "dog"),
    ]
    made = source(root)
    items = made.items()
    assert made.rejected == [
        Rejection("train.csv line 9", "train", "2 cells, 3 expected"),
        Rejection("clip-3", "test", "its key was seen before, in train; keys are unique"),
        Rejection("clip-60", "test", "label 'zebra' is none of cat, dog, eel"),
        Rejection("clip-61", "test", "its key was seen before, in test; keys are unique"),
    ]
    assert len(items) + len(made.rejected) == 55
    assert items[3].split == "train"
    assert [item.sample_id for item in items] == list(range(51))


def test_a_rejected_row_does_not_take_the_key(root: Path) -> None:
    Toy.rows[:] = [sample(0, "zebra"), *Toy.rows]
    made = source(root)
    assert made.items()[0].label == "cat"
    assert [rejection.reason for rejection in made.rejected] == [
        "label 'zebra' is none of cat, dog, eel"
    ]


def test_many_classes_are_not_all_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "classes", (*Toy.classes, *(f"c{n}" for n in range(9))))
    Toy.rows += [sample(60, "zebra")]
    made = source(root)
    made.items()
    assert made.rejected[0].reason == "label 'zebra' is none of " + (
        "cat, dog, eel, c0, c1, c2, c3, c4 and 4 more"
    )


def test_classes_without_samples_are_left_out_aloud(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Toy, "classes", ("ant", *Toy.classes, "fox"))
    made = source(root)
    with caplog.at_level(logging.WARNING):
        made.items()
    assert made.classes == ("cat", "dog", "eel")
    assert "no sample of class ant, fox" in caplog.text


def test_nothing_but_rejected_samples(root: Path) -> None:
    Toy.rows[:] = [sample(n, "zebra") for n in range(5)]
    with pytest.raises(
        DataError, match=r"no usable sample, and 5 are rejected; the first is clip-0: label 'zebra'"
    ):
        source(root).items()
    Toy.rows[:] = []
    with pytest.raises(DataError, match=r"no usable sample, and 0 are rejected; check data\.root"):
        source(root).items()


def test_reasons_name_the_modality(root: Path) -> None:
    Toy.rows[0] = sample(0, media=media(0) | {"sound": Sound("sounds/9.wav")})
    Toy.rows[1] = sample(1, media=media(1) | {"photo": Stills(("../../etc/passwd",))})
    Toy.rows[2] = sample(2, media=media(2) | {"words": Text(" ")})
    made = source(root)
    items = made.items()
    for item, reason in zip(
        items,
        ["sound: sounds/9.wav does not exist", "photo: .*passwd", "words: the text is empty"],
        strict=False,
    ):
        with pytest.raises(RejectedSample, match=reason):
            made.load(item)


def test_an_absent_modality_rejects_the_sample_or_is_optional(root: Path) -> None:
    Toy.rows[5] = sample(5, media=media(5, without="sound"))
    made = source(root)
    item = made.items()[5]
    with pytest.raises(
        RejectedSample, match=r"sound is missing; .* --data\.modalities\.sound\.optional"
    ):
        made.load(item)
    optional = SETTINGS | {"sound": SETTINGS["sound"] | {"optional": True}}
    made = source(root, modalities=optional)
    arrays = made.load(made.items()[5])
    assert list(arrays) == ["photo", "words", "numbers"]
    assert [m.optional for m in made.modalities] == [False, True, False, False]


def test_other_processes_load_the_same(root: Path) -> None:
    made = source(root)
    items = made.items()
    again = pickle.loads(pickle.dumps(made))
    for item in (items[0], items[45]):
        expected = made.load(item)
        for name, array in again.load(item).items():
            np.testing.assert_array_equal(array, expected[name])
    assert Toy.made == 1
    assert again.modalities == made.modalities


def test_what_was_learnt_is_kept_with_the_shards(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.cremad.Cremad", Toy)
    config = DataConfig.model_validate(
        {"name": "cremad", "root": str(root), "modalities": SETTINGS}
    )
    for place in ("one", "two"):
        manifest = prepare(config, tmp_path / place).manifest
        kept = ("scale-numbers.json", "tokenizer-words.json")
        contents = {name: (tmp_path / place / name).read_bytes() for name in kept}
        assert manifest.files == {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()}
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
