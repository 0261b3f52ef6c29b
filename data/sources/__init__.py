"""Sources of raw samples, by name. A new data set is one file here and one line in `SOURCES`."""

import math

from data.schema import DataError
from data.sources.avdigits import AVDigits
from data.sources.base import DataConfig, Item, RejectedSample, Source
from data.sources.digits import Digits
from data.sources.rosmap import Rosmap

__all__ = [
    "SOURCES",
    "DataConfig",
    "Item",
    "RejectedSample",
    "Source",
    "build_source",
    "check_settings",
]

SOURCES: dict[str, type[Source]] = {"digits": Digits, "avdigits": AVDigits, "rosmap": Rosmap}

# Settings that only some sources read; anywhere else a changed value would be silently ignored.
_READ_BY: dict[str, tuple[str, ...]] = {
    "root": ("avdigits", "rosmap"),
    "split": ("avdigits",),
    "test_images_per_recording": ("avdigits",),
    "val_fraction": ("rosmap",),
}


def check_settings(config: DataConfig) -> None:
    """Check what can be checked without the raw files.

    Raises:
        DataError: noise for an unknown modality or of a wrong size, or a setting that this
            source does not read.
    """
    names = [modality.name for modality in SOURCES[config.name].modalities]
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
    for field, readers in _READ_BY.items():
        value = getattr(config, field)
        if config.name not in readers and value != DataConfig.model_fields[field].default:
            raise DataError(
                f"data.{field}={value!r} has no effect on {config.name}; only "
                f"{' and '.join(readers)} read it; leave it out or choose another data.name"
            )


def build_source(config: DataConfig) -> Source:
    """The source that the settings name.

    Raises:
        DataError: see `check_settings`, or the raw folder is missing or lacks files.
    """
    check_settings(config)
    return SOURCES[config.name](config)
