"""Recipes: the settings of a modality are its kind's, then the set's official ones, then ours."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from data.config import DataConfig, Kind, ModalityConfig
from data.recipes import augmentation, modality_settings
from data.schema import Augment, DataError
from data.sources.raw import RawSample, Unreadable


class Toy:
    """An adapter with a modality of every kind."""

    name: ClassVar[str] = "cremad"
    version: ClassVar[int] = 1
    kinds: Mapping[str, Kind] = {
        "photo": "image",
        "clip": "frames",
        "motion": "flow",
        "sound": "audio",
        "words": "text",
        "numbers": "vector",
        "steps": "sequence",
    }
    classes: tuple[str, ...] = ("a", "b")
    official: ClassVar[Mapping[str, ModalityConfig]] = {
        "motion": ModalityConfig(pick="early", candidates=5),
        "numbers": ModalityConfig(scale="minmax"),
    }

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def samples(self) -> Iterator[RawSample | Unreadable]:
        yield from ()


def settings(recipe: str = "default", **modalities: Any) -> dict[str, ModalityConfig]:
    config = DataConfig.model_validate(
        {"name": "cremad", "recipe": recipe, "modalities": modalities}
    )
    return modality_settings(config, Toy(config))


def test_default_is_what_the_field_does_today() -> None:
    found = settings()
    assert list(found) == list(Toy.kinds)
    sound, words = found["sound"], found["words"]
    assert (sound.sample_rate, sound.seconds, sound.num_mels) == (16_000, 10.24, 128)
    assert sound.storage == "float16"
    assert (words.tokenizer, words.tokens) == ("fit", 128)
    assert (found["clip"].frames, found["clip"].candidates, found["clip"].side) == (3, 3, 224)
    assert (found["motion"].candidates, found["motion"].pick) == (3, "middle")
    assert (found["numbers"].scale, found["steps"].scale) == ("standard", "none")


def test_official_is_what_the_release_of_the_set_does() -> None:
    found = settings("official")
    assert (found["sound"].sample_rate, found["sound"].storage) == (0, "float32")
    assert found["words"].tokenizer == "google/electra-small-discriminator"
    assert found["words"].tokens == 512
    motion = found["motion"]
    assert (motion.pick, motion.candidates, motion.side) == ("early", 5, 224)
    assert (found["numbers"].scale, found["numbers"].storage) == ("minmax", "float32")


def test_the_users_settings_win_one_by_one() -> None:
    found = settings("official", motion={"candidates": 1}, numbers={"optional": True})
    assert (found["motion"].candidates, found["motion"].pick) == (1, "early")
    assert (found["numbers"].optional, found["numbers"].scale) == (True, "minmax")
    assert not found["sound"].optional
    assert settings(sound={"sample_rate": 0})["sound"].sample_rate == 0


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({"smell": {}}, r"names 'smell', which the data set does not have; it has photo, clip, "),
        ({"sound": {"side": 32}}, r"sound\.side has no effect .* kind audio; it reads storage, "),
        ({"words": {"storage": "float16"}}, r"words\.storage has no effect .* kind text; it reads"),
        ({"photo": {"frames": 3}}, r"photo\.frames has no effect .* kind image"),
        ({"motion": {"storage": "jpeg"}}, r"storage=jpeg does not suit kind flow; use tensor"),
        ({"clip": {"storage": "float16"}}, r"float16 does not suit kind frames; use tensor or jpe"),
        ({"numbers": {"storage": "tensor"}}, r"does not suit kind vector; use float16 or float32"),
    ],
)
def test_settings_that_would_do_nothing(modalities: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        settings(**modalities)


def test_augmentation() -> None:
    default = DataConfig(name="ucf101")
    official = DataConfig(name="ucf101", recipe="official")
    assert augmentation(default, "flow", "flow") == Augment(crop=True, flip=True)
    assert augmentation(official, "flow", "flow") == Augment(flip=True, per_frame=True)
    assert augmentation(default, "audio", "audio") == Augment()
    assert augmentation(official, "anything", "image") == Augment()
    food = DataConfig(name="food101", recipe="official")
    assert augmentation(food, "image", "image") == Augment(rotate_degrees=30.0, flip=True)
