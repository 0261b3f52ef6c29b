"""The `search:` block of a config: what `midas tune` searches, how, and for how long."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["uniform", "loguniform", "int", "choice", "grid"]
RANGES = ("uniform", "loguniform", "int")
Value = bool | int | float | str
# Sections of settings that the optimizer and the method read in every step.
CHANGEABLE = ("optim", "midas", "ogm_ge")


class Distribution(BaseModel):
    """Where the values of one setting come from."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind
    """uniform, loguniform and int lie between low and high; choice takes one of values; grid takes
    each of them in turn, with every combination of the other grids."""
    low: float | None = None
    """Smallest value of a range."""
    high: float | None = None
    """Largest value of a range, included."""
    step: int | None = Field(default=None, ge=1)
    """Distance of an int's values; 1 if it is not given."""
    values: tuple[Value, ...] = ()
    """Values of a choice or grid."""
    when: dict[str, tuple[Value, ...]] = {}
    """Other searched settings and those of their values with which this one is searched; with any
    other it keeps the config's value."""

    @model_validator(mode="after")
    def _check(self) -> "Distribution":
        if self.kind in RANGES:
            self._check_range()
        elif len(set(map(repr, self.values))) != len(self.values) or not self.values:
            raise ValueError(f"{self.kind} needs values, each once; it has {list(self.values)}")
        elif self.low is not None or self.high is not None or self.step is not None:
            raise ValueError(f"{self.kind} takes values, not low, high or step")
        return self

    def _check_range(self) -> None:
        if self.low is None or self.high is None or self.values or self.low >= self.high:
            raise ValueError(
                f"{self.kind} needs low and high with low < high, and no values; it has "
                f"low={self.low}, high={self.high}, values={list(self.values)}"
            )
        if self.kind == "loguniform" and self.low <= 0:
            raise ValueError(f"loguniform needs low > 0; it has low={self.low}")
        if self.kind == "int" and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"int needs whole low and high; it has {self.low} and {self.high}")
        if self.step is not None and self.kind != "int":
            raise ValueError(f"{self.kind} takes no step; only int does")

    @property
    def corners(self) -> tuple[Value, ...]:
        """Values that stand for all: the ends of a range, or every one."""
        if self.low is None or self.high is None:
            return self.values
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)


class SearchConfig(BaseModel):
    """What `midas tune` searches; training does not look at it.

    The objective is the best validation accuracy of the main phase.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    space: dict[str, Distribution] = {}
    """Setting, as in a flag (`optim.lr`) -> where its values come from."""
    trials: int = Field(default=16, ge=1)
    """Configurations to try; a grid ends earlier when it is through."""
    hours: float | None = Field(default=None, gt=0)
    """Time after which the sweep stops, its trials saved; None has no limit."""
    searcher: Literal["tpe", "random", "grid"] = "tpe"
    """tpe learns from finished trials (Optuna); random does not; grid goes through all
    combinations of grids, and of choices."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """What ends hopeless trials early: asha keeps the best 1 / reduction_factor at every rung,
    median those that are not below the median of finished trials. pbt ends none: the worst go on
    from the state of the best, with settings near theirs."""
    grace_epochs: int = Field(default=2, ge=1)
    """Main-phase epochs before a trial can be ended, the first rung; a generation of pbt."""
    reduction_factor: int = Field(default=3, ge=2)
    """Ratio of the epochs of two rungs, and share of the trials that a rung keeps."""
    concurrent: int | None = Field(default=None, ge=1)
    """Most trials at a time; None fills the cluster."""
    workers_per_trial: int = Field(default=1, ge=1)
    """Worker processes of a trial; those of scaling are for training."""
    reseeds: int = Field(default=1, ge=0)
    """Other seeds with which the five best are trained again, to see how much of their lead is
    luck; 0 spares it. Not with pbt."""
    seed: int = Field(default=0, ge=0)
    """Seed of the searcher; trials train with train.seed."""
    share_warmup: bool = True
    """Let trials whose warm-up is the same go on from one checkpoint; changes no result."""

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        for name, distribution in self.space.items():
            self._check_kind(name, distribution)
            names = list(self.space)
            for other, values in distribution.when.items():
                if other not in names[: names.index(name)]:
                    raise ValueError(
                        f"{name} is searched when {other} has some value, so {other} must be "
                        f"searched too, and stand before it; searched before it are "
                        f"{', '.join(names[: names.index(name)]) or 'none'}"
                    )
                known = self.space[other].values
                if known and not set(values) <= set(known):
                    raise ValueError(f"{name}: {other} never has a value of {list(values)}")
        return self

    @property
    def num_reseeds(self) -> int:
        """Other seeds for the best; a way of pbt cannot be gone again from its settings."""
        return 0 if self.scheduler == "pbt" else self.reseeds

    def _check_kind(self, name: str, distribution: Distribution) -> None:
        if self.searcher == "grid" and distribution.kind in RANGES:
            raise ValueError(
                f"{name} is {distribution.kind}, and search.searcher=grid goes through given "
                "values; make it a grid with values, or take tpe or random"
            )
        if self.searcher != "grid" and distribution.kind == "grid":
            raise ValueError(
                f"{name} is a grid, which search.searcher=grid goes through; "
                f"{self.searcher} draws; make it a choice, or take searcher: grid"
            )


def is_active(distribution: Distribution, values: dict[str, Any]) -> bool:
    """Whether a setting is searched beside these values of settings before it."""
    return all(values.get(other) in wanted for other, wanted in distribution.when.items())


def changeable(search: SearchConfig) -> dict[str, Distribution]:
    """Searched settings that a trial of pbt may change on its way; others come with its state."""
    return {
        name: distribution
        for name, distribution in search.space.items()
        if distribution.kind in ("uniform", "loguniform") and name.split(".")[0] in CHANGEABLE
    }
