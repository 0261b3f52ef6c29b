"""Data card: what a prepared set is, what was left out, and what the audit found, for people.

`card.md` and `card.html` lie next to the shards. Equal sets have equal cards: no dates, no paths of
this machine.
"""

import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.audit import LEAKS, Audit, findings
from data.document import (
    Bar,
    Block,
    Bullets,
    Cell,
    Code,
    Exhibit,
    Gallery,
    Heading,
    Paragraph,
    Picture,
    Table,
    Verdict,
    to_html,
    to_markdown,
)
from data.fingerprints import read_frames, read_spectrogram, shown_frames
from data.folder import Folder
from data.schema import Manifest, Modality
from data.twins import SPLITS, Likeness, Pair

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARKDOWN_NAME, HTML_NAME = "card.md", "card.html"
NUM_SAMPLES = 6
NUM_VALUES = 8
NUM_REASONS = 20
NUM_REJECTED_SHOWN = 3
MAX_PICTURE_HEIGHT = 96
MAX_TEXT = 300
JPEG_QUALITY = 80
HEAT_MAP_INCHES = (3.0, 0.96)

Rejected = tuple[str, str, str]
"""Key, split and reason of a sample that was left out."""


def write_card(
    place: str | Path | Folder, manifest: Manifest, audit: Audit, rejected: Sequence[Rejected]
) -> tuple[str, str]:
    """Write `card.md` and `card.html` into the folder of a prepared set.

    Args:
        place: the folder, with its shards.
        manifest: its manifest.
        audit: what `data.audit.audit` found in it.
        rejected: samples that were left out.

    Returns:
        Where the two files are.
    """
    folder = Folder.at(place)
    title = f"Data card: {manifest.name}"
    start = [*_findings(audit), *_overview(manifest, audit), *_class_counts(manifest, audit)]
    modalities = _modalities(manifest, audit)
    end = [*_examples(audit), *_rejected(audit, rejected), *_settings(manifest)]
    gallery = [Heading("Samples"), Gallery(_exhibits(folder, manifest))]
    note = Paragraph(f"Samples are shown in {HTML_NAME}.")
    folder.write(MARKDOWN_NAME, to_markdown(title, [*start, *modalities, *end, note]))
    folder.write(HTML_NAME, to_html(title, [*start, *modalities, *gallery, *end]))
    return f"{folder}/{MARKDOWN_NAME}", f"{folder}/{HTML_NAME}"


def _findings(audit: Audit) -> list[Block]:
    verdict, *others = findings(audit)
    return [Verdict(verdict, audit.grade), *([Bullets(others)] if others else [])]


def _overview(manifest: Manifest, audit: Audit) -> list[Block]:
    size = sum(shard.num_bytes for shards in manifest.splits.values() for shard in shards)
    files = sum(len(shards) for shards in manifest.splits.values())
    groups = f"{audit.groups.total:,}" if audit.groups.total else "not known"
    rows = ", ".join(f"{audit.rows[split]:,} {split}" for split in SPLITS)
    facts = {
        "Samples": rows,
        "Classes": f"{len(manifest.classes):,}",
        "Groups": groups,
        "Split rule": manifest.split_rule,
        "Size": f"{_bytes(size)} in {files:,} Parquet files",
        "Digest": manifest.digest,
    }
    return [Table(["", "this set"], list(facts.items()))]


def _class_counts(manifest: Manifest, audit: Audit) -> list[Block]:
    counts = np.array([audit.class_counts[split] for split in SPLITS])
    totals = counts.sum(axis=0)
    largest = max(int(totals.max(initial=0)), 1)
    rows: list[list[Cell]] = [
        [name, *(f"{count:,}" for count in own), Bar(total / largest)]
        for name, own, total in zip(
            manifest.classes, counts.T.tolist(), totals.tolist(), strict=True
        )
    ]
    shares = [
        f"{100 * own.max() / own.sum():.1f} % of {split}"
        for split, own in zip(SPLITS, counts, strict=True)
        if own.sum()
    ]
    return [
        Heading("Samples per class"),
        Paragraph(f"The largest class is {', '.join(shares)}: what constant answers would score."),
        Table(["class", *SPLITS, "all"], rows),
    ]


def _modalities(manifest: Manifest, audit: Audit) -> list[Block]:
    columns = ["name", "kind", "shape", "stored as", "bytes a row", "how made"]
    rows = [
        [
            modality.name,
            modality.kind,
            _shape(modality),
            f"{modality.dtype}, {modality.storage}",
            _row_bytes(audit, modality.name),
            modality.about,
        ]
        for modality in manifest.modalities
    ]
    blocks: list[Block] = [Heading("Modalities"), Table(columns, rows)]
    if audit.missing:
        missing = [
            [name, *(_share(count[split], audit.rows[split]) for split in SPLITS)]
            for name, count in audit.missing.items()
        ]
        blocks += [
            Paragraph("Samples that lack a modality:"),
            Table(["modality", *SPLITS], missing),
        ]
    return blocks


def _shape(modality: Modality) -> str:
    shape = _times(modality.shape)
    stored = modality.stored("train")
    return shape if stored == modality.shape else f"{shape} (train: {_times(stored)})"


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _row_bytes(audit: Audit, name: str) -> str:
    """Mean per split; one number if it is the same everywhere."""
    stored = audit.stored_bytes[name]
    means = {s: round(stored[s] / audit.rows[s]) for s in SPLITS if audit.rows[s]}
    if len(set(means.values())) == 1:
        return f"{next(iter(means.values())):,}"
    return ", ".join(f"{mean:,} {split}" for split, mean in means.items())


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(total, 1):.1f} %)"


# --- samples -------------------------------------------------------------------------------------


def _exhibits(folder: Folder, manifest: Manifest) -> list[Exhibit]:
    """The first samples of the first row group of train, of different classes where there are."""
    shards = manifest.splits["train"]
    if not shards:
        return []
    with folder.open(shards[0].path) as source, pq.ParquetFile(source) as file:
        table = file.read_row_group(0, use_threads=False)
    tokenizers = {m.name: _tokenizer(folder, manifest, m) for m in manifest.modalities}
    labels = table["label"].to_pylist()
    first = [row for row, label in enumerate(labels) if label not in labels[:row]]
    again = [row for row in range(len(labels)) if row not in first]
    exhibits: list[Exhibit] = []
    for row in sorted([*first, *again][:NUM_SAMPLES]):
        parts = [
            (m.name, _part(m, table[m.name][row].as_buffer(), tokenizers[m.name]))
            if _is_present(table, row, number)
            else (m.name, Paragraph("missing"))
            for number, m in enumerate(manifest.modalities)
        ]
        title, subtitle = table["key"][row].as_py(), manifest.classes[labels[row]]
        exhibits.append(Exhibit(title, subtitle, parts))
    return exhibits


def _is_present(table: pa.Table, row: int, modality: int) -> bool:
    return "present" not in table.column_names or bool(
        table["present"][row].as_py() >> modality & 1
    )


def _tokenizer(folder: Folder, manifest: Manifest, modality: Modality) -> "Tokenizer | None":
    """The tokenizer of a text, if it was kept with the shards."""
    name = f"tokenizer-{modality.name}.json"
    if name not in manifest.files:
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_str(folder.read(name).decode())


def _part(
    modality: Modality, data: bytes, tokenizer: "Tokenizer | None"
) -> Picture | Paragraph | Table:
    """What is shown of a stored training row."""
    if modality.kind in ("image", "frames", "flow"):
        frames = read_frames(modality, "train", data, shown_frames(modality, "train"))
        return _picture(frames, modality.name)
    values = np.frombuffer(data, modality.dtype)
    if modality.kind == "text":
        return _text(values, modality, tokenizer)
    if modality.kind == "vector" or len(modality.shape) == 1:
        return _numbers(values)
    if modality.kind == "audio":
        return _heat_map(read_spectrogram(modality, data), modality.name)
    return _heat_map(values.astype(np.float32).reshape(modality.shape).T, modality.name)


def _picture(frames: np.ndarray, name: str) -> Picture:
    """Frames (K, C, H, W) side by side; of anything but RGB, every channel in grey."""
    if frames.shape[1] != 3:
        frames = frames.reshape(-1, 1, *frames.shape[-2:])
    if frames.dtype != np.uint8:
        frames = frames.astype(np.float32)
        span = np.ptp(frames) or 1.0
        frames = ((frames - frames.min()) * (255 / span)).astype(np.uint8)
    strip = np.concatenate(list(frames), axis=-1)
    is_rgb = len(strip) == 3
    image = Image.fromarray(strip.transpose(1, 2, 0) if is_rgb else strip[0])
    image.thumbnail((image.width, MAX_PICTURE_HEIGHT))
    file = io.BytesIO()
    if is_rgb:
        image.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(file, "PNG")
    return Picture(file.getvalue(), "image/jpeg" if is_rgb else "image/png", name)


def _heat_map(lines: np.ndarray, name: str) -> Picture:
    """Spectrogram or sequence (lines, time)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=HEAT_MAP_INCHES, dpi=100)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.imshow(lines, origin="lower", aspect="auto", cmap="viridis")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return Picture(file.getvalue(), "image/png", name)


def _text(ids: np.ndarray, modality: Modality, tokenizer: "Tokenizer | None") -> Paragraph:
    tokens = ids[ids != modality.pad].tolist()
    words = (
        tokenizer.decode(tokens)
        if tokenizer is not None
        else " ".join(str(token) for token in tokens)
    )
    shown = words if len(words) <= MAX_TEXT else words[:MAX_TEXT] + " ..."
    return Paragraph(f"{len(tokens)} of {len(ids)} tokens: {shown}")


def _numbers(values: np.ndarray) -> Table:
    shown = values[:NUM_VALUES]
    columns = [str(place) for place in range(len(shown))]
    cells = [f"{value:.3g}" for value in shown]
    if len(values) > len(shown):
        columns, cells = [*columns, "..."], [*cells, f"{len(values):,} in all"]
    return Table(columns, [cells])


# --- findings ------------------------------------------------------------------------------------


def _examples(audit: Audit) -> list[Block]:
    """Numbers and examples behind the findings."""
    blocks: list[Block] = []
    if audit.groups.examples:
        names = ", ".join(audit.groups.examples)
        rest = audit.groups.shared - len(audit.groups.examples)
        more = f" and {rest:,} more" if rest else ""
        blocks.append(Paragraph(f"Groups on both sides: {names}{more}."))
    modalities = audit.modalities if len(audit.modalities) > 1 else {}
    everything = {"whole samples": audit.samples, **modalities}
    counts = [row for name, likeness in everything.items() for row in _count_rows(name, likeness)]
    if counts:
        leaks = [f"{a} in {b}" for a, b in LEAKS]
        blocks.append(Table(["what", "how", *leaks, "within a split", "other label"], counts))
    shown = {tuple(row[2:]): row for row in reversed(_pair_rows(everything))}
    if pairs := list(reversed(shown.values())):
        blocks += [Paragraph("Examples:"), Table(["what", "how", "one", "the other"], pairs)]
    return [Heading("Duplicates and leaks"), *blocks] if blocks else []


def _count_rows(name: str, likeness: Likeness) -> list[list[Cell]]:
    """Rows with a twin, identical and near; left out where there are none."""
    rows: list[list[Cell]] = []
    for how, twins in (("identical", likeness.identical), ("near", likeness.near)):
        counts = [
            *(twins.rows[a][b] for a, b in LEAKS),
            sum(twins.rows[split][split] for split in SPLITS),
            twins.conflicts,
        ]
        if any(counts):
            rows.append([name, how, *(f"{count:,}" for count in counts)])
    return rows


def _pair_rows(everything: Mapping[str, Likeness]) -> list[list[Cell]]:
    """Pairs of twins, those of different classes first."""
    return [
        [name, how, _member(pair, 0), _member(pair, 1)]
        for name, likeness in everything.items()
        for how, twins in (("identical", likeness.identical), ("near", likeness.near))
        for pair in (*twins.conflict_examples, *twins.examples)
    ]


def _member(pair: Pair, place: int) -> str:
    return f"{pair.keys[place]} ({pair.splits[place]}, {pair.labels[place]})"


# --- what was left out, and how to repeat it -----------------------------------------------------


def _rejected(audit: Audit, rejected: Sequence[Rejected]) -> list[Block]:
    heading = Heading("Rejected samples")
    if not rejected:
        return [heading, Paragraph("None.")]
    kinds: dict[str, list[Rejected]] = defaultdict(list)
    for entry in rejected:
        kinds[_kind_of(entry[2])].append(entry)
    ranked = sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    rows = [
        [
            kind,
            *(f"{sum(split == own for _, own, _ in entries):,}" for split in SPLITS),
            "; ".join(f"{key}: {reason}" for key, _, reason in entries[:NUM_REJECTED_SHOWN]),
        ]
        for kind, entries in ranked[:NUM_REASONS]
    ]
    read = len(rejected) + sum(audit.rows.values())
    blocks = [
        heading,
        Paragraph(f"{_share(len(rejected), read)} of {read:,} samples were left out."),
        Table(["reason", *SPLITS, "first ones"], rows),
    ]
    if len(ranked) > NUM_REASONS:
        blocks.append(Paragraph(f"And {len(ranked) - NUM_REASONS:,} more reasons."))
    return blocks


def _kind_of(reason: str) -> str:
    """The reason without what differs from sample to sample: quoted words, paths and numbers."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*[\d/\\]\S*|\S+\.\w+", "…", reason)


def _settings(manifest: Manifest) -> list[Block]:
    text = json.dumps(manifest.source, indent=2, sort_keys=True, ensure_ascii=False)
    return [
        Heading("How to repeat it"),
        Paragraph(
            "Prepare with these settings, and data.root where the raw files are; equal digests "
            "mean equal bytes."
        ),
        Code(text),
    ]


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
