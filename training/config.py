"""Settings of models, optimizer and methods; no torch, so that a command can read them at once."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Similarity = Literal["cosine", "l2"]
Pairing = Literal["mismatch", "permutation", "confusion"]
Orders = Literal["cyclic"] | int
UniReduction = Literal["sum", "mean"]
AlphaStat = Literal["mean_of_ratios", "ratio_of_means"]
AlphaFlip = Literal["reset", "keep", "carry"]


class EncoderConfig(BaseModel):
    """Encoder of one modality."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["auto", "small_cnn", "resnet18", "mlp", "transformer", "pretrained"] = "auto"
    """auto: mlp for vectors, transformer (from scratch) for sequences and texts; for the others
    small_cnn if a side is under 64, resnet18 otherwise. pretrained: see `name`."""

    width: PositiveInt | None = None
    """small_cnn: channels of the first block, 32; the second has twice as many. transformer: width
    of every layer, 128."""

    hidden: PositiveInt = 256
    """mlp: units of the hidden layer."""

    layers: PositiveInt = 2
    """transformer: number of layers."""

    heads: PositiveInt = 4
    """transformer: attention heads; a divisor of width."""

    features: PositiveInt | None = None
    """Output width. Default: 4 * width (small_cnn), hidden (mlp), 512 (resnet18), width
    (transformer), the network's own (pretrained); another width adds a linear layer to the last
    three."""

    weights: str = "none"
    """resnet18: none, imagenet, or the path of a state dict of torchvision's (.safetensors, .pth);
    filters for other than 3 channels are the mean of those for rgb."""

    name: str | None = None
    """pretrained: hub name or folder of a transformers model with weights in safetensors. Where it
    has dropout, every worker draws its own, so results depend on the number of workers."""

    pretrained: bool = True
    """pretrained: take its weights; off takes the architecture only, with weights from the seed."""

    @model_validator(mode="after")
    def _check(self) -> "EncoderConfig":
        # Another kind that is asked for leaves a preset's name aside.
        decided = self.kind not in ("auto", "pretrained")
        if not decided and (self.kind == "pretrained") != (self.name is not None):
            raise ValueError(
                f"kind={self.kind!r} with name={self.name!r}: a name belongs to kind='pretrained', "
                "and it needs one; set both or neither"
            )
        return self


class ModelConfig(BaseModel):
    """Encoders and heads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoders: dict[str, EncoderConfig] = {}
    """Encoder per modality; a modality that is not named gets the defaults."""

    batchnorm: Literal["sync", "local"] = "sync"
    """Statistics of BatchNorm: of the global batch, or of each worker's part of it; local saves two
    small exchanges a layer and step, and makes the result depend on the number of workers."""

    head_hidden: NonNegativeInt = 0
    """Units of the hidden ReLU layer of every head; 0 makes heads linear."""


class OptimConfig(BaseModel):
    """Optimizer, epochs and learning-rate steps (defaults: methods.md 2.11)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer."""

    lr: PositiveFloat = 1e-3
    """Learning rate of the first epoch."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd; adam and adamw do not use it."""

    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty of sgd and adam; decoupled decay of adamw."""

    epochs: PositiveInt = 70
    """Passes over the training split, warm-up included."""

    lr_step_epochs: PositiveInt = 50
    """Epochs between two reductions of the learning rate."""

    lr_gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of every reduction."""

    schedule_after_warmup: bool = False
    """Count lr_step_epochs from the end of warm-up, as the authors' code does."""


class MidasConfig(BaseModel, extra="forbid", frozen=True):
    """MIDAS hyper-parameters and study switches (methods.md 2.8, 2.9, 3.1)."""

    variant: Literal["paper", "official_code"] = "paper"
    """Decides every field that is left at None: as printed, or as released."""

    warmup_epochs: int = Field(default=10, ge=0)
    """Epochs that train encoders and unimodal heads only; released: 10, Food-101 2, UCF-101 0."""

    lambda_mis: float = Field(default=1.0, ge=0)
    """Weight of the misaligned loss; the paper takes 5 for Kinetics-Sounds, 1 elsewhere."""

    eta: float = Field(default=0.05, ge=0)
    """Step of alpha."""

    weak_modality_weighting: bool = True
    """Up-weight the weak modality's share; off keeps alpha at 1."""

    hard_sample_weighting: bool = True
    """Weight misaligned samples by feature similarity; off keeps the weight at 1."""

    similarity: Similarity = "cosine"
    """Similarity behind the hard-sample weight."""

    mix_level: Literal["feature", "input"] = "feature"
    """What is swapped: features of the aligned pass, or raw inputs that are encoded again."""

    pairing: Pairing | None = None
    """Partners: any other label; a shuffle (labels may repeat); the class confused with the own."""

    pair_groups: int = Field(default=1, ge=1)
    """Groups of the global batch in which rows find partners; a multiple of the number of workers
    spares the exchange of features."""

    perms_per_sample: Orders = "cyclic"
    """Misaligned samples per row: the M cyclic shifts, or this many random permutations."""

    uni_reduction: UniReduction | None = None
    """Unimodal losses are added or averaged over modalities."""

    alpha_stat: AlphaStat | None = None
    """Confidence shares averaged over samples, or ratios of averaged raw confidences (M = 2)."""

    alpha_flip: AlphaFlip | None = None
    """When another modality becomes weak: others return to 1, keep theirs, or it moves."""

    alpha_cap: float | None = Field(default=None, ge=1)
    """Largest alpha; none in the paper, 10 in the released Kinetics-Sounds code."""

    kinetics_ratio_test: bool = False
    """Repeat the inverted comparison of the released Kinetics-Sounds code (3.1 row 12)."""

    @model_validator(mode="after")
    def _check(self) -> "MidasConfig":
        if self.perms_per_sample != "cyclic" and self.perms_per_sample < 1:
            raise ValueError(
                f"perms_per_sample={self.perms_per_sample} must be at least 1, or 'cyclic'"
            )
        official_stat = self.variant == "official_code" and self.alpha_stat != "mean_of_ratios"
        if self.kinetics_ratio_test and not official_stat:
            raise ValueError(
                f"kinetics_ratio_test=True changes nothing with variant={self.variant!r} and "
                f"alpha_stat={self.alpha_stat!r}; set variant='official_code' and leave alpha_stat"
            )
        return self


class OgmGeConfig(BaseModel, extra="forbid", frozen=True):
    """OGM-GE hyper-parameters; defaults are those of the authors' code."""

    strength: float = Field(default=0.1, ge=0)
    """a in 1 - tanh(a * ratio); authors: 0.1, CREMA-D 0.8; BalanceBenchmark: 0.3."""

    start_epoch: int = Field(default=0, ge=0)
    """First epoch with modulation; BalanceBenchmark: 10."""

    end_epoch: int = Field(default=50, ge=0)
    """Last epoch with modulation, inclusive; BalanceBenchmark: 80."""

    noise: bool = True
    """Add Gaussian noise to the modulated gradients (GE); off is plain OGM."""

    @model_validator(mode="after")
    def _check(self) -> "OgmGeConfig":
        if self.end_epoch < self.start_epoch:
            raise ValueError(
                f"end_epoch={self.end_epoch} is before start_epoch={self.start_epoch}; modulation "
                "would never run; raise end_epoch, or use method=joint"
            )
        return self
