"""Recipes: how each modality of each set is preprocessed, as settings; the work itself is in
data/processors.py.

`official` follows the released code of the set (methods.md 2.11, datasets.md), except for its bugs:

- frames are sorted by name (Kinetics-Sounds used the file system's order);
- a sample that cannot be read is rejected (UCF-101 took its neighbour instead, CREMA-D dropped it
  in silence);
- training frames of Kinetics-Sounds are drawn from files 1 to 9 of 10, not 2 to 10, and a clip of
  six frames or fewer gives one of each third, not three times its second;
- of a UCF-101 clip with just three flow fields all three are taken (there: 1, 2, 2);
- crops of training clips are cut from frames of 256 x 256 pixels, not of the original size, and
  at most `candidates` frames of each third of a clip are kept to draw from.

`default` is what the field would do today: audio at 16 kHz with its channels averaged, pictures
turned upright, one crop and one flip for all frames of a clip and for both directions of a flow
(whose sign changes when it is mirrored), word pieces learnt from the training texts where no
tokenizer is named, vectors standardised by the training split.
"""

from collections.abc import Mapping

from data.config import DataConfig, Kind, ModalityConfig
from data.schema import Augment, DataError
from data.sources.raw import Adapter

_PICTURE = ModalityConfig(storage="tensor", side=224, train_side=256)
_DEFAULT: dict[Kind, ModalityConfig] = {
    "image": _PICTURE,
    "frames": _PICTURE.model_copy(update={"frames": 3, "candidates": 3, "pick": "middle"}),
    "flow": _PICTURE.model_copy(update={"frames": 3, "candidates": 3, "pick": "middle"}),
    "audio": ModalityConfig(storage="float16", sample_rate=16_000, seconds=10.24, num_mels=128),
    "text": ModalityConfig(tokenizer="fit", tokens=128),
    "vector": ModalityConfig(storage="float32", scale="standard"),
    "sequence": ModalityConfig(storage="float32", scale="none"),
}
_OFFICIAL: dict[Kind, ModalityConfig] = {
    **_DEFAULT,
    "audio": ModalityConfig(storage="float32", sample_rate=0, seconds=10.24, num_mels=128),
    "text": ModalityConfig(tokenizer="google/electra-small-discriminator", tokens=512),
    "vector": ModalityConfig(storage="float32", scale="none"),
}
_DEFAULT_AUGMENT: dict[Kind, Augment] = {
    "image": Augment(crop=True, flip=True),
    "frames": Augment(crop=True, flip=True),
    "flow": Augment(crop=True, flip=True),
}
_EACH_FRAME = Augment(crop=True, flip=True, per_frame=True)
_OFFICIAL_AUGMENT: dict[tuple[str, str], Augment] = {
    ("cremad", "visual"): _EACH_FRAME,
    ("kinetics", "visual"): _EACH_FRAME,
    ("ucf101", "visual"): Augment(flip=True, per_frame=True),
    ("ucf101", "flow"): Augment(flip=True, per_frame=True),
    ("food101", "image"): Augment(rotate_degrees=30.0, flip=True),
    ("n24news", "image"): Augment(flip=True),
    ("twitter2015", "image"): Augment(crop=True, flip=True),
}
# What a kind reads; anything else would be silently ignored.
_READ: dict[Kind, tuple[str, ...]] = {
    "image": ("storage", "side", "train_side"),
    "frames": ("storage", "side", "train_side", "frames", "candidates", "pick"),
    "flow": ("storage", "side", "train_side", "frames", "candidates", "pick"),
    "audio": ("storage", "sample_rate", "seconds", "num_mels"),
    "text": ("tokenizer", "tokens"),
    "vector": ("storage", "scale"),
    "sequence": ("storage", "steps", "scale"),
}
_STORAGE: dict[Kind, tuple[str, ...]] = {
    "image": ("tensor", "jpeg"),
    "frames": ("tensor", "jpeg"),
    "flow": ("tensor",),
    "audio": ("float16", "float32"),
    "vector": ("float16", "float32"),
    "sequence": ("float16", "float32"),
}
_ALWAYS = ("kind", "column", "optional")


def modality_settings(config: DataConfig, adapter: Adapter) -> dict[str, ModalityConfig]:
    """Settings of every modality: the kind's, then the set's official ones, then the user's.

    Raises:
        DataError: the user's settings name an unknown modality, or one that its kind does not read.
    """
    official = config.recipe == "official"
    kinds = adapter.kinds
    _check(config.modalities, kinds)
    settings: dict[str, ModalityConfig] = {}
    for name, kind in kinds.items():
        base = (_OFFICIAL if official else _DEFAULT)[kind]
        layers = [adapter.official.get(name)] if official else []
        for layer in [*layers, config.modalities.get(name)]:
            if layer is not None:
                base = base.model_copy(update=layer.model_dump(exclude_none=True))
        settings[name] = base
    return settings


def augmentation(config: DataConfig, name: str, kind: Kind) -> Augment:
    """Random changes of a modality in training."""
    if config.recipe == "official":
        return _OFFICIAL_AUGMENT.get((config.name, name), Augment())
    return _DEFAULT_AUGMENT.get(kind, Augment())


def _check(settings: Mapping[str, ModalityConfig], kinds: Mapping[str, Kind]) -> None:
    for name, setting in settings.items():
        if name not in kinds:
            raise DataError(
                f"data.modalities names {name!r}, which the data set does not have; it has "
                f"{', '.join(kinds)}"
            )
        kind = kinds[name]
        read = (*_READ[kind], *_ALWAYS)
        ignored = [key for key in setting.model_dump(exclude_defaults=True) if key not in read]
        if ignored:
            raise DataError(
                f"data.modalities.{name}.{ignored[0]} has no effect on a modality of kind {kind}; "
                f"it reads {', '.join(_READ[kind])}; leave it out"
            )
        if setting.storage and setting.storage not in _STORAGE.get(kind, ()):
            raise DataError(
                f"data.modalities.{name}.storage={setting.storage} does not suit kind {kind}; use "
                f"{' or '.join(_STORAGE[kind])}"
            )
