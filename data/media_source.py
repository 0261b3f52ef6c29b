"""MediaSource: an adapter's raw samples, split, checked and shaped by a recipe."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.kept import scale_json, scale_name, tokenizer_name
from data.processors import Numbers, Place, Processor, build
from data.recipes import augmentation, modality_settings
from data.schema import DataError, Modality, Split
from data.sources.base import Item, RejectedSample, Rejection
from data.sources.raw import Adapter, Media, RawSample, Unreadable
from data.splits import assign
from data.text import Tokens

log = logging.getLogger(__name__)


class MediaSource:
    """Source over an adapter; see data/sources/base.py for the attributes.

    A key that comes twice keeps its first sample; the later ones are rejected. So are samples of an
    unknown class, and rows that are no sample. What is left is split (data/splits.py); media are
    read by `load`.
    """

    def __init__(self, adapter: type[Adapter], config: DataConfig):
        self.name = adapter.name
        self.version = adapter.version
        self._adapter = adapter(config)
        self._config = config
        self.modalities: tuple[Modality, ...] = ()
        self.classes: tuple[str, ...] = ()
        self.split_rule = ""
        self.rejected: Sequence[Rejection] = ()
        self.files: Mapping[str, str] = {}
        self._processors: dict[str, Processor] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without the adapter, which can hold whole tables: other processes only load items."""
        return {**self.__dict__, "_adapter": None}

    def items(self) -> list[Item]:
        """List, check and split the samples; build the processors.

        Raises:
            DataError: see `Source.items`; or every sample is rejected.
        """
        adapter = self._adapter
        samples, self.rejected = sound(adapter)
        if not samples:
            raise _nothing_left(self.name, self.rejected)
        self.classes = present_classes(adapter, samples)
        splits, self.split_rule = assign(samples, self.classes, self._config)
        items = [
            Item(number, sample.key, sample.label, split, sample.group or "", sample.media)
            for number, (sample, split) in enumerate(zip(samples, splits, strict=True))
        ]
        self._build(adapter, [item.media for item in items if item.split == "train"])
        return items

    def load(self, item: Item) -> dict[str, np.ndarray]:
        """Read the media of a sample; see `Source.load`."""
        return load_media(self._processors, item.media, item.split)

    def _build(self, adapter: Adapter, training: Sequence[Mapping[str, Media]]) -> None:
        """Processors of all modalities; some take sizes and scales from the training media."""
        place = Place(root_of(adapter, self._config), self._config.recipe == "official")
        settings = modality_settings(self._config, adapter)
        for name, kind in adapter.kinds.items():

            def own(name: str = name) -> Iterable[Media]:
                return (media[name] for media in training if name in media)

            augment = augmentation(self._config, name, kind)
            self._processors[name] = build(name, kind, settings[name], augment, place, own)
        self.modalities = tuple(p.modality for p in self._processors.values())
        self.files = dict(_kept(self._processors)) | getattr(adapter, "files", {})


def load_media(
    processors: Mapping[str, Processor], media: Mapping[str, Media], split: Split
) -> dict[str, np.ndarray]:
    """Arrays of the modalities that a sample has.

    Raises:
        RejectedSample: one cannot be read, or is missing and must not be.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, processor in processors.items():
        medium = media.get(name)
        if medium is not None:
            try:
                arrays[name] = processor.load(medium, split)
            except RejectedSample as error:
                raise RejectedSample(f"{name}: {error}") from error
        elif not processor.modality.optional:
            raise RejectedSample(
                f"{name} is missing; to keep such samples give --data.modalities.{name}.optional"
            )
    return arrays


def _kept(processors: Mapping[str, Processor]) -> Iterator[tuple[str, str]]:
    """Name and content of files that keep what processors learnt from the training media."""
    for name, processor in processors.items():
        if isinstance(processor, Tokens):
            yield tokenizer_name(name), processor.tokenizer_json
        elif isinstance(processor, Numbers) and processor.scale is not None:
            yield scale_name(name), scale_json(processor.scale)


def _nothing_left(name: str, rejected: Sequence[Rejection]) -> DataError:
    first = f"; the first is {rejected[0].key}: {rejected[0].reason}" if rejected else ""
    return DataError(
        f"{name} has no usable sample, and {len(rejected)} are rejected{first}; check data.root "
        "and the index files"
    )


def present_classes(adapter: Adapter, samples: Sequence[RawSample]) -> tuple[str, ...]:
    """The adapter's classes that have samples."""
    found = {sample.label for sample in samples}
    if absent := [name for name in adapter.classes if name not in found]:
        log.warning("%s: no sample of class %s; left out", adapter.name, ", ".join(absent))
    return tuple(name for name in adapter.classes if name in found)


def root_of(adapter: Adapter, config: DataConfig) -> Path:
    """Folder that the adapter's paths are relative to."""
    root = getattr(adapter, "root", None) or Path(config.root or ".").expanduser()
    return root.resolve()


def sound(adapter: Adapter) -> tuple[list[RawSample], list[Rejection]]:
    """Samples that can be split, and those that cannot."""
    samples: list[RawSample] = []
    rejected: list[Rejection] = []
    seen: dict[str, Split] = {}
    for sample in adapter.samples():
        reason = _objection(sample, seen, adapter.classes)
        if reason is not None:
            key = sample.key.encode(errors="backslashreplace").decode()
            rejected.append(Rejection(key, sample.split, reason))
        elif isinstance(sample, RawSample):
            seen[sample.key] = sample.split
            samples.append(sample)
    return samples, rejected


def _objection(
    sample: RawSample | Unreadable, seen: Mapping[str, Split], classes: tuple[str, ...]
) -> str | None:
    if isinstance(sample, Unreadable):
        return sample.reason
    if sample.key in seen:
        return f"its key was seen before, in {seen[sample.key]}; keys are unique"
    if sample.label not in classes:
        return f"label {sample.label!r} is none of {_few(classes)}"
    return None


def _few(names: Sequence[str], count: int = 8) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
