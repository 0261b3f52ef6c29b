"""Whether a version may become champion; plain numbers, no MLflow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ACCURACY = "val/accuracy"
FloorMetric = Literal["head_accuracy", "zero_out_accuracy"]
# Above chance by this part of what there is above chance, a modality has learnt something.
LEARNT = 0.1
EXACT_DIGITS = 9


@dataclass(frozen=True)
class Rules:
    """What the gate asks for.

    Attributes:
        margin: by how much the validation accuracy must be above that of the champion.
        floor: least validation accuracy of every modality; None goes by `default_floor`.
        floors: of single modalities, in its place.
        floor_metric: the accuracy that `floor` is about: of a modality's own head, or of the fused
            prediction from its features alone.
        new_data: why the champion, which knows other data, is to be replaced; its accuracy is then
            not compared. None keeps to the champion's data.
    """

    margin: float = 0.005
    floor: float | None = None
    floors: Mapping[str, float] | None = None
    floor_metric: FloorMetric = "head_accuracy"
    new_data: str | None = None


@dataclass(frozen=True)
class Contender:
    """A version, as the gate sees it.

    Attributes:
        metrics: with ACCURACY and `val/<floor metric>/<modality>`.
        chance: accuracy of always saying the commonest class of the validation split.
        data_digest: of the data it was trained and validated on.
    """

    version: str
    metrics: Mapping[str, float]
    chance: float
    data_digest: str

    @property
    def accuracy(self) -> float:
        """Fused, on validation; NaN if it is not on record."""
        return self.metrics.get(ACCURACY, math.nan)


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Attributes:
        refusals: a sentence for each rule that is not met; empty if the version is promoted.
        numbers: what was compared, flat.
    """

    refusals: list[str]
    numbers: dict[str, float | str]

    @property
    def promoted(self) -> bool:
        """Whether the alias moves."""
        return not self.refusals


def default_floor(chance: float) -> float:
    """A tenth of the way from chance to perfect."""
    return chance + LEARNT * (1 - chance)


def decide(new: Contender, champion: Contender | None, rules: Rules) -> Decision:
    """Compare a version with the rules and with the present champion, if there is one."""
    numbers: dict[str, float | str] = {ACCURACY: new.accuracy, "data_digest": new.data_digest}
    refusals = _collapsed(new, rules, numbers)
    if not math.isfinite(new.accuracy):
        refusals.append(f"version {new.version} has no finite {ACCURACY} on record")
    if champion is None:
        return Decision(refusals, numbers)
    numbers |= {f"champion/{ACCURACY}": champion.accuracy, "champion/version": champion.version}
    if champion.version == new.version:
        return Decision([f"version {new.version} is the champion already"], numbers)
    if champion.data_digest != new.data_digest:
        numbers["champion/data_digest"] = champion.data_digest
        if rules.new_data is None:
            refusals.append(
                f"it was validated on data with digest {new.data_digest[:12]}, the champion "
                f"(version {champion.version}) on {champion.data_digest[:12]}; accuracies on "
                "different data cannot be compared; train on the champion's data, or say why its "
                "data are out of date with --new-data REASON"
            )
        return Decision(refusals, numbers)
    gain = round(new.accuracy - champion.accuracy, EXACT_DIGITS)
    numbers |= {"gain": gain, "margin": rules.margin}
    if math.isfinite(new.accuracy) and not (gain > 0 and gain >= rules.margin):
        refusals.append(
            f"its {ACCURACY} {new.accuracy:.4f} is not above the champion's "
            f"{champion.accuracy:.4f} (version {champion.version}) by the margin of "
            f"{rules.margin:g}"
        )
    return Decision(refusals, numbers)


def _collapsed(new: Contender, rules: Rules, numbers: dict[str, float | str]) -> list[str]:
    """A sentence for every modality below its floor; what was compared goes into `numbers`."""
    prefix = f"val/{rules.floor_metric}/"
    found = {k.removeprefix(prefix): v for k, v in new.metrics.items() if k.startswith(prefix)}
    own = rules.floors or {}
    general = default_floor(new.chance) if rules.floor is None else rules.floor
    refusals = [f"--floor names {name!r}, which is no modality" for name in own.keys() - found]
    if not found:
        refusals.append(f"version {new.version} has no {prefix}<modality> on record")
    for name, value in found.items():
        floor = own.get(name, general)
        numbers |= {f"{prefix}{name}": value, f"floor/{name}": floor}
        if not value >= floor:
            refusals.append(
                f"modality {name} has collapsed: its {prefix}{name} is {value:.4f}, and the floor "
                f"is {floor:.4f}"
            )
    return refusals
