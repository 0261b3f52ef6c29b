"""DataConfig: which data set is prepared, from where and how."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

GROUP_BYTES = 16 << 20
Kind = Literal["image", "frames", "flow", "audio", "text", "vector", "sequence"]
SourceName = Literal[
    "digits",
    "avdigits",
    "rosmap",
    "brca",
    "mfeat",
    "avmnist",
    "cremad",
    "kinetics",
    "ucf101",
    "food101",
    "n24news",
    "twitter2015",
    "mmsd",
    "mosi",
    "mosei",
    "table",
]
SplitRule = Literal["official", "random_70_10_20", "grouped", "given", "unseen_speakers"]


class ModalityConfig(BaseModel):
    """How one modality is stored; what is None follows the recipe. See data/processors.py."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind | None = None
    """Kind of a table's column, where it is not what it looks like."""
    column: str | None = None
    """Column of a table; None takes the one of the modality's name."""
    optional: bool = False
    """Samples may lack it; training and evaluation then leave it out for them."""
    storage: Literal["tensor", "jpeg", "float16", "float32"] | None = None
    """Form on disk: tensor (bytes of pixels) or jpeg for pictures, a float type for the others."""
    side: int | None = Field(default=None, ge=8, le=1024)
    """Pixels of a side that the model sees (image, frames, flow)."""
    train_side: int | None = Field(default=None, ge=8, le=2048)
    """Pixels of a side of stored training pictures, from which crops are taken."""
    frames: int | None = Field(default=None, ge=1, le=256)
    """Frames of a clip that the model sees: one from each of as many equal parts."""
    candidates: int | None = Field(default=None, ge=1, le=64)
    """Frames stored of each part of a training clip; one is drawn each epoch."""
    pick: Literal["middle", "early"] | None = None
    """Frame of a part of n that evaluation takes, counted from 0: middle is n // 2; early, as some
    releases do it, max(n // 2, 1) - 1."""
    sample_rate: int | None = Field(default=None, ge=0, le=192_000)
    """Audio is resampled to this rate, in Hz; 0 keeps the file's."""
    seconds: float | None = Field(default=None, gt=0, le=600)
    """Length of audio clips; shorter ones are padded, longer ones cut."""
    num_mels: int | None = Field(default=None, ge=8, le=512)
    """Mel bands."""
    tokenizer: str | None = None
    """Tokenizer of a text: hub name or folder for transformers; "fit" learns word pieces from the
    training texts."""
    tokens: int | None = Field(default=None, ge=2, le=8192)
    """Tokens of a text; longer ones are cut, shorter ones padded."""
    steps: int | None = Field(default=None, ge=1, le=100_000)
    """Steps of a sequence; longer ones are cut, shorter ones padded with zeros in front."""
    scale: Literal["none", "standard", "minmax"] | None = None
    """Vectors and sequences: per-column scaling by numbers of the training split."""


class DataConfig(BaseModel):
    """Which data set is prepared, from where and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: SourceName = "digits"
    """Data set; table is your own, see data.table."""
    root: str | None = None
    """Folder of the raw files, in the set's official layout."""
    table: str | None = None
    """CSV, JSON-lines or Parquet file with a row per sample; paths in it are relative to data.root,
    or to the table's folder."""
    label_column: str = "label"
    """Column of the class (table)."""
    group_column: str | None = None
    """Column of the group: speaker, source video, patient (table)."""
    split_column: str | None = None
    """Column that says train, val or test (table)."""
    recipe: Literal["default", "official"] = "default"
    """Preprocessing: what the field would do today, or what the released code of the set does."""
    media: Literal["auto", "extracted", "videos"] = "auto"
    """Take extracted frames and sounds, or original videos; auto: extracted if there are any."""
    modalities: dict[str, ModalityConfig] = {}
    """Changes to the recipe, per modality."""
    text: Literal["headline", "caption", "abstract", "article"] = "caption"
    """Which text of an article (n24news)."""
    noise: dict[str, float] = {}
    """Noise per modality: std on the standardised input; digits audio: noise to tone RMS."""
    split: SplitRule = "official"
    """Partition: official; random_70_10_20, as the MIDAS release draws it; grouped, with no group
    (actor, speaker, source video) on two sides; given by the table; unseen_speakers (avdigits)."""
    split_seed: int = Field(default=2, ge=0)
    """Seed of random_70_10_20 and grouped; 2 is the release's."""
    max_rejected: float = Field(default=0.01, ge=0.0, le=1.0)
    """Largest part of the samples that may be rejected; more stops the preparation."""
    test_images_per_recording: int = Field(default=1, ge=1)
    """Images paired with each test recording (avdigits); no image is used twice."""
    val_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Part of the training rows that becomes the validation split where the official partition has
    none."""
    storage: str | None = None
    """Folder or URI (s3://, gs://, ...) that gets a folder per prepared set; None keeps them below
    the folder of the runs."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data: noise and the order inside shards; training has its own."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Samples per Parquet file; None: as many as make about 128 MiB, at most 8192."""
    rows_per_group: int | None = Field(default=None, ge=1)
    """Rows per Parquet row group; None: training rows / 128, between 8 and 256."""

    def group_rows(self, train_rows: int, row_nbytes: int) -> int:
        """Rows per row group; small ones, so that shuffling whole groups mixes well.

        Args:
            row_nbytes: of a stored training row; a group takes at most 16 MiB.
        """
        fits = max(1, GROUP_BYTES // max(1, row_nbytes))
        return self.rows_per_group or min(max(train_rows // 128, 8), 256, fits)
