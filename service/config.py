"""RunConfig: everything that decides what a run computes; read from YAML, overridden by flags.

Each section is defined beside the code it configures; here they are put together, checked against
each other, and errors are turned into sentences.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.config import DataConfig
from service.redaction import has_credentials, redact
from service.search import CHANGEABLE, SearchConfig, Value, changeable
from training.config import MidasConfig, ModelConfig, OgmGeConfig, OptimConfig

PRESETS = Path(__file__).parent.parent / "tune_configs"
NAMED_FLAG = re.compile(
    r"--(no-)?((?P<section>data|model)\.)?(?P<field>modalities|encoders|augment)\.(?P<name>[^.=]+)\."
)
# Settings that a sweep cannot search.
UNSEARCHED = ("search", "scaling", "checkpoint", "storage", "name", "experiment")
MethodName = Literal["midas", "joint", "joint_uni", "unimodal", "ogm_ge"]


class ConfigError(ValueError):
    """A setting is wrong; the message names value, rule and remedy."""


class RunError(RuntimeError):
    """A run failed; the message says why and what continues it."""


class TrainConfig(BaseModel):
    """Batches, seeds and intervals."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seed: int = Field(default=0, ge=0)
    """Training seed: initial weights, order of rows, pairing."""
    global_batch_size: int = Field(default=64, ge=2)
    """Rows of one optimizer step, over all workers."""
    lanes: int = Field(default=8, ge=1)
    """Lanes of the row order; a multiple of every number of workers you want equal results for."""
    shuffle_window_mib: int = Field(default=256, ge=1)
    """Memory of one shuffle window over all workers, in MiB."""
    eval_every_epochs: int = Field(default=1, ge=1)
    """Epochs between validations; a checkpoint is written before each."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic of the encoders; all else is fp32. auto takes bf16 where the processor is faster
    with it. fp64 is for proofs: what differs in it is not rounding."""
    micro_batches: int = Field(default=1, ge=1)
    """Parts of a batch that go through the model one after the other, in less memory. Pairs and
    statistics of BatchNorm are then taken inside each part."""
    compile: bool = False
    """Compile the encoders (torch.compile); worth it where a run has many thousands of steps."""
    gradient_compression: Literal["none", "bf16", "fp16"] = "none"
    """Type in which gradients travel between workers."""
    deterministic: bool = False
    """Use only algorithms that repeat bit for bit, also with more than two workers; slower. On CPUs
    with one or two workers a run repeats itself without it."""


class AugmentConfig(BaseModel):
    """Random changes of a modality in training; None follows the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    crop: bool | None = None
    """A random part of 8 to 100 % of a picture's area, resized."""
    flip: bool | None = None
    """Mirror pictures left to right, half of the time."""
    rotate_degrees: float | None = Field(default=None, ge=0.0, le=180.0)
    """Turn pictures by up to this angle either way."""
    per_frame: bool | None = None
    """Let every frame of a clip draw its own numbers."""
    time_mask: int | None = Field(default=None, ge=0)
    """Largest width of a masked stripe of time in a spectrogram (SpecAugment)."""
    frequency_mask: int | None = Field(default=None, ge=0)
    """Largest width of a masked stripe of frequency."""


class CheckpointConfig(BaseModel):
    """When training is saved, beside the end of every epoch that is validated, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints in mid-epoch; None goes by time alone."""
    every_seconds: float = Field(default=300.0, gt=0)
    """Seconds between checkpoints in mid-epoch."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints to keep; the best one stays as well."""
    storage: str | None = None
    """Folder or URI (s3://, gs://, ... as pyarrow or fsspec know it) that gets a folder per run;
    None keeps checkpoints in the run's folder."""


class FeedConfig(BaseModel):
    """How far each worker reads ahead; changes no result, and may change when a run continues."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    readers: int | None = Field(default=None, ge=1)
    """Read tasks that run at a time; None takes what a short measurement at the start calls for."""
    windows_ahead: int | None = Field(default=None, ge=1)
    """Shuffle windows beyond the one in use that are read or being read; None follows the
    readers."""


class ScalingConfig(BaseModel):
    """How many processes train, and on what."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_workers: Annotated[int, Field(ge=1)] | tuple[int, int] = 2
    """Data-parallel workers, one process each; two numbers make the run elastic: it starts with as
    many as the cluster has, and goes on with fewer, or more, within these limits."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes one GPU a worker where the cluster has enough of them."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores, and threads, of one worker."""
    awake: bool = False
    """Keep the cores of CPU workers from going to sleep, by processes of idle priority: several
    workers on a virtual machine are faster with it; it costs electricity."""
    max_failures: int = Field(default=2, ge=0)
    """Worker crashes after which the run is given up; each continues at the last checkpoint."""
    start_timeout_seconds: float = Field(default=60.0, gt=0)
    """How long the cluster may lack the fewest workers' resources before the run ends."""

    @model_validator(mode="after")
    def _check(self) -> "ScalingConfig":
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"num_workers={self.num_workers} must be two numbers from 1 up, the smaller first; "
                "one number fixes the workers"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Fewest workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class RunConfig(BaseModel):
    """One training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    method: MethodName = "midas"
    """Training method; the controls run in the same harness."""
    data: DataConfig = DataConfig()
    augment: dict[str, AugmentConfig] = {}
    """Random changes in training, per modality; what is not named follows the data's recipe."""
    model: ModelConfig = ModelConfig()
    midas: MidasConfig = MidasConfig()
    ogm_ge: OgmGeConfig = OgmGeConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    feed: FeedConfig = FeedConfig()
    scaling: ScalingConfig = ScalingConfig()
    search: SearchConfig = SearchConfig()
    experiment: str = "midas"
    """MLflow experiment."""
    storage: str = "runs"
    """Folder for prepared data, runs and the local MLflow store; shared by all nodes."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Run name; the same name continues a stopped run. None makes a new one from the time."""

    @property
    def warmup_epochs(self) -> int:
        """Epochs before the main phase; only MIDAS has them."""
        return self.midas.warmup_epochs if self.method == "midas" else 0

    @property
    def method_sections(self) -> dict[str, BaseModel]:
        """Config section of every configurable method, by method name."""
        return {"midas": self.midas, "ogm_ge": self.ogm_ge}

    def resolved(self) -> dict[str, Any]:
        """JSON values of everything that decides the result: sections of other methods left out."""
        values = self.model_dump(mode="json")
        del values["search"]
        for name in self.method_sections:
            if name != self.method:
                del values[name]
        return values


def check(config: RunConfig) -> None:
    """Check settings against each other.

    Raises:
        ConfigError: batch, lanes, workers, micro-batches, pair groups, exchange of gradients or
            phases do not fit together, or there is a password in an address.
    """
    for name, place in (
        ("checkpoint.storage", config.checkpoint.storage),
        ("data.storage", config.data.storage),
    ):
        if place and has_credentials(place):
            raise ConfigError(
                f"{name}={redact(place)} holds a password, and settings are written to files and "
                "to MLflow; put it into the environment (for S3 AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY) or into the file that the store's client reads"
            )
    workers, batch, lanes = (
        config.scaling.max_workers,
        config.train.global_batch_size,
        config.train.lanes,
    )
    if workers > lanes or batch % lanes:
        fits = [n for n in range(workers, batch + 1) if batch % n == 0] or ["none"]
        raise ConfigError(
            f"train.lanes={lanes} must be at least scaling.num_workers={workers} and divide "
            f"train.global_batch_size={batch}: every worker owns lanes, and every lane gives the "
            f"same number of rows to a batch; use one of {fits[:8]}, or another batch size"
        )
    parts = config.train.micro_batches
    if batch // lanes % parts:
        raise ConfigError(
            f"train.micro_batches={parts} must divide the rows that a lane gives to a batch, "
            f"train.global_batch_size / train.lanes = {batch // lanes}, so that parts are equal"
        )
    if config.train.deterministic and config.train.gradient_compression != "none":
        raise ConfigError(
            f"train.gradient_compression={config.train.gradient_compression} adds gradients in an "
            "order that is not fixed, train.deterministic=True fixes it; give up one of them"
        )
    groups = config.midas.pair_groups
    if config.method == "midas" and lanes % groups:
        raise ConfigError(
            f"midas.pair_groups={groups} must divide train.lanes={lanes}; 1 pairs over the whole "
            "global batch"
        )
    if config.warmup_epochs >= config.optim.epochs:
        raise ConfigError(
            f"midas.warmup_epochs={config.warmup_epochs} leaves no main phase in "
            f"optim.epochs={config.optim.epochs}; the best checkpoint is taken from the main phase "
            "only; use fewer warm-up epochs or more epochs"
        )


def with_values(config: RunConfig, settings: Mapping[str, Value]) -> RunConfig:
    """The config with settings, named as in flags, set to these values, and checked.

    Raises:
        ConfigError: there is no such setting, or its value or their combination is wrong.
    """
    values = config.model_dump(mode="json")
    for name, value in settings.items():
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"search.space: {name} is no setting: {part} has no parts")
        section[last] = value
    try:
        changed = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"search.space: {explain(error)}") from error
    check(changed)
    return changed


def check_search(config: RunConfig) -> None:
    """Check what `midas tune` needs of a config.

    Raises:
        ConfigError: nothing is searched, or an end of a range or a choice is no valid value.
    """
    if not config.search.space:
        raise ConfigError(
            "search.space is empty; midas tune needs settings to search, as in "
            "search: {space: {optim.lr: {kind: loguniform, low: 0.001, high: 0.1}}}"
        )
    for name, distribution in config.search.space.items():
        if name.split(".")[0] in UNSEARCHED:
            raise ConfigError(f"search.space: {name} does not decide what a run computes")
        for value in distribution.corners:
            with_values(config, {name: value})
    if config.search.scheduler == "pbt" and not changeable(config.search):
        raise ConfigError(
            "search.scheduler=pbt changes settings on the way, and search.space has none that can: "
            f"uniform or loguniform ones of {', '.join(CHANGEABLE)}; search one, or take asha"
        )


def named(config: RunConfig, flags: Sequence[str]) -> RunConfig:
    """The config with an entry for every name that flags set something of.

    `--data.modalities.photo.side 64` needs an entry `photo` in `data.modalities`: flags exist for
    the entries of a default only.
    """
    for found in filter(None, map(NAMED_FLAG.match, flags)):
        section, field, name = found["section"], found["field"], found["name"]
        owner = getattr(config, section) if section else config
        entries = getattr(owner, field)
        if name not in entries:
            entry = get_args(type(owner).model_fields[field].annotation)[1]()
            owner = owner.model_copy(update={field: {**entries, name: entry}})
            config = config.model_copy(update={section: owner}) if section else owner
    return config


def preset_names() -> list[str]:
    """Names that `load_preset` knows."""
    return sorted(path.stem.removesuffix("_midas") for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> RunConfig:
    """Read a config by preset name (`digits`) or path of a YAML file.

    Raises:
        ConfigError: no such preset or file, bad YAML, unknown key or bad value.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"config file {name} does not exist; give an existing YAML file")
    else:
        path = PRESETS / f"{name}_midas.yaml"
        if not path.is_file():
            path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            raise ConfigError(
                f"there is no preset {name!r}{_did_you_mean(name, preset_names())}; presets are "
                f"{', '.join(preset_names())}; or give the path of a YAML file"
            )
    return parse_config(path.read_text(), str(path))


def parse_config(text: str, origin: str) -> RunConfig:
    """Validate YAML text; `origin` names it in errors.

    Raises:
        ConfigError: as for `load_preset`.
    """
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """The first problem of a validation error as one sentence, with the nearest valid name."""
    problem = error.errors()[0]
    parts = [str(part) for part in problem["loc"]]
    where = ".".join(part for part in parts if not part.startswith(("constrained-", "tuple[")))
    if problem["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in problem["loc"][:-1]:
            is_dict = get_origin(section) is dict
            section = get_args(section)[1] if is_dict else section.model_fields[part].annotation
        valid = list(section.model_fields)
        return (
            f"unknown key {where}{_did_you_mean(str(problem['loc'][-1]), valid)}; "
            f"valid keys here: {', '.join(valid)}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}={problem['input']!r}: {message}" if where else message


def _did_you_mean(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def config_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, readable by `parse_config`."""
    return yaml.safe_dump(config.resolved(), sort_keys=False)


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every value that differs between two resolved configs."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
