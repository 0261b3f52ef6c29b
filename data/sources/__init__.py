"""Sources of raw samples, by name. A new data set is one adapter file here and one line below."""

import importlib
import math
from typing import Any

from data.config import DataConfig
from data.schema import DataError
from data.sources.base import Item, RejectedSample, Rejection, Source

__all__ = [
    "DataConfig",
    "Item",
    "RejectedSample",
    "Rejection",
    "Source",
    "build_source",
    "check_settings",
    "source_class",
]

# Sources that make their tensors themselves, and adapters, whose samples a recipe shapes; imported
# when they are asked for.
TENSOR_SOURCES = {"digits": "digits:Digits", "avdigits": "avdigits:AVDigits"}
ADAPTERS = {
    "rosmap": "mogonet:Rosmap",
    "brca": "mogonet:Brca",
    "mfeat": "mfeat:Mfeat",
    "avmnist": "avmnist:AVMnist",
    "cremad": "cremad:Cremad",
    "kinetics": "kinetics:Kinetics",
    "ucf101": "ucf101:Ucf101",
    "food101": "food101:Food101",
    "n24news": "n24news:N24News",
    "twitter2015": "twitter2015:Twitter2015",
    "mmsd": "mmsd:Mmsd",
    "mosi": "mosi:Mosi",
    "mosei": "mosi:Mosei",
    "table": "table:Table",
}
# Settings that only some sets read; anywhere else a changed value would be silently ignored.
_READ_BY: dict[str, tuple[str, ...]] = {
    "root": ("avdigits", *ADAPTERS),
    "noise": tuple(TENSOR_SOURCES),
    "test_images_per_recording": ("avdigits",),
    "val_fraction": tuple(ADAPTERS),
    "split_seed": tuple(ADAPTERS),
    "recipe": tuple(ADAPTERS),
    "modalities": tuple(ADAPTERS),
    "media": ("cremad", "kinetics", "ucf101"),
    "text": ("n24news",),
    "table": ("table",),
    "label_column": ("table",),
    "group_column": ("table",),
    "split_column": ("table",),
}
_SPLITS: dict[str, tuple[str, ...]] = {
    "digits": ("official",),
    "avdigits": ("official", "unseen_speakers"),
}
_ADAPTER_SPLITS = ("official", "random_70_10_20", "grouped", "given")


def check_settings(config: DataConfig) -> None:
    """Check what can be checked without the raw files.

    Raises:
        DataError: noise for an unknown modality or of a wrong size, or a setting that this
            source does not read.
    """
    for field, readers in _READ_BY.items():
        value = getattr(config, field)
        if config.name not in readers and value != DataConfig.model_fields[field].default:
            raise DataError(
                f"data.{field}={value!r} has no effect on {config.name}; only "
                f"{', '.join(readers)} read it; leave it out or choose another data.name"
            )
    known = _SPLITS.get(config.name, _ADAPTER_SPLITS)
    if config.split not in known:
        raise DataError(
            f"data.split={config.split} does not exist for {config.name}; use {', '.join(known)}"
        )
    if config.name in TENSOR_SOURCES:
        _check_noise(config)


def build_source(config: DataConfig) -> Source:
    """The source that the settings name.

    Raises:
        DataError: see `check_settings`, or the raw folder is missing or lacks files.
    """
    check_settings(config)
    found = source_class(config.name)
    if config.name in TENSOR_SOURCES:
        return found(config)
    from data.media_source import MediaSource

    return MediaSource(found, config)


def source_class(name: str) -> Any:
    """The class of a data set: a Source, or an Adapter."""
    module, _, attribute = (TENSOR_SOURCES | ADAPTERS)[name].partition(":")
    return getattr(importlib.import_module(f"data.sources.{module}"), attribute)


def _check_noise(config: DataConfig) -> None:
    names = [modality.name for modality in source_class(config.name).modalities]
    for name, strength in config.noise.items():
        if name not in names:
            raise DataError(
                f"data.noise names {name!r}, which is no modality of {config.name}; "
                f"use one of {', '.join(names)}"
            )
        if not (math.isfinite(strength) and strength >= 0.0):
            raise DataError(
                f"data.noise[{name!r}]={strength} is not a finite number >= 0; give 0 for no "
                f"noise (modalities of {config.name}: {', '.join(names)})"
            )
