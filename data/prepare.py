"""Raw samples -> Parquet shards and a manifest. Resumable, atomic and byte-identical when repeated.

How one shard is written is in `data/shards.py`; here is which samples go where, and what is kept.
While a set is being made, `.progress/` in its folder holds the plan and one small JSON file per
finished shard; it is removed after the manifest, which is written last, is in place. Shards are
independent of each other, so they can be made by one process or by a cluster.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.folder import Folder
from data.schema import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    Shard,
    Split,
    load_manifest,
    verify_shards,
)
from data.shards import ShardOutcome, shard_nbytes, write_shard
from data.sources import Item, Rejection, Source, build_source, check_settings, source_class
from data.sources.base import Purpose, stream
from data.sources.raw import Values

logger = logging.getLogger(__name__)

REJECTED_NAME = "rejected.jsonl"
AUDIT_NAME = "audit.json"
CARD_NAMES = ("card.md", "card.html")
KEPT_PREFIXES = ("tokenizer-", "scale-")
PROGRESS_NAME = ".progress"
PLAN_NAME = "plan"
SPLITS: tuple[Split, ...] = ("train", "val", "test")
NUM_HASH_DIGITS = 10
SHARD_BYTES = 128 << 20
MAX_SHARD_ROWS = 8192
# A cluster takes ten seconds to start; for smaller sets, one process is done sooner.
CLUSTER_BYTES = 1 << 30
# Not in the manifest: they do not change the shards.
NOT_RECORDED = {"root", "table", "storage", "max_rejected"}
JPEG_RATIO = 0.3

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        folder: where the shards are.
        manifest: the manifest in it.
        read: samples that were looked at.
        written: samples in the shards.
        rejected: every sample left out, and why; also in `rejected.jsonl`.
        findings: what the audit of the set found, a line each.
        seconds: wall time of this call.
        reused: the set was there already; it was verified and nothing was written.
    """

    folder: Folder
    manifest: Manifest
    read: int
    written: int
    rejected: list[Rejection]
    findings: list[str]
    seconds: float
    reused: bool


@dataclass(frozen=True)
class Part:
    """The items that one shard is made from."""

    split: Split
    path: str
    items: list[Item]


Work = Callable[[Part], ShardOutcome]
Cluster = Callable[[], AbstractContextManager[Callable[[Work, list[Part]], Iterator[ShardOutcome]]]]
"""Starts a cluster; on it, work is done on parts, many at a time, and comes back in any order."""


class _Tally:
    """Counts samples for the caller's progress function, and those rejected for the limit."""

    def __init__(self, total: int, config: DataConfig, report: Report | None):
        self._total = total
        self._allowed = config.max_rejected
        self._report = report
        self._done = 0
        self.rejected: list[Rejection] = []

    def add(self, count: int) -> None:
        self._done += count
        if self._report is not None:
            self._report(self._done, self._total)

    def reject(self, rejections: Sequence[Rejection]) -> None:
        """Raises DataError if too many samples are rejected by now."""
        self.rejected += rejections
        _check_rejected(self.rejected, self._total, self._allowed)


def _check_rejected(rejected: Sequence[Rejection], total: int, allowed: float) -> None:
    """Raise DataError if more than a part `allowed` of `total` samples is rejected."""
    count = len(rejected)
    if count > allowed * total:
        first = rejected[0]
        raise DataError(
            f"{count} of {total} samples ({count / total:.1%}) are rejected, "
            f"more than data.max_rejected={allowed:g} allows; the first is {first.key}: "
            f"{first.reason}; repair the raw files, or give a larger --data.max-rejected to go "
            "on without these samples"
        )


def default_folder(config: DataConfig, storage: Path) -> Folder:
    """Folder of a prepared set below `data.storage`, or `storage`: name and hash of all settings.

    The raw folder enters the hash as an absolute path, so equal names mean equal settings.

    Raises:
        DataError: `data.storage` cannot be used.
    """
    places = {"root": _resolved(config.root), "table": _resolved(config.table)}
    settings = _settings(config) | places
    digest = hashlib.sha256(_canonical(settings).encode()).hexdigest()
    try:
        place = Folder.at(config.storage or storage / "shards")
    except ValueError as error:
        raise DataError(f"data.storage: {error}") from error
    return place.child(f"{config.name}-{digest[:NUM_HASH_DIGITS]}")


def prepare(
    config: DataConfig,
    place: str | Path | Folder,
    progress: Report | None = None,
    cluster: Cluster | None = None,
) -> PrepareReport:
    """Make the prepared set in a folder, continue an interrupted one, or verify a finished one.

    The items of each split are shuffled once with `stream(config.seed, SHUFFLE, split)` and cut
    into parts. A finished set is compared with the settings and its shards with their hashes; the
    raw files are then not needed. Two calls at once on one local folder wait for each other.

    Args:
        config: the data set and how to prepare it.
        place: new, empty, or one that an earlier call worked in.
        progress: called with the number of samples done and of all samples.
        cluster: used for large sets; without it, everything is done in this process.

    Returns:
        What was done.

    Raises:
        DataError: settings, raw files or the folder are not usable, or too many samples are
            rejected; the message says what to do.
    """
    start = time.monotonic()
    check_settings(config)
    folder = Folder.at(place)
    # First, so that a wrong data.root leaves no empty folder behind.
    source = None if folder.has(MANIFEST_NAME) else build_source(config)
    _make_folder(folder)
    with _lock(folder):
        reused = folder.has(MANIFEST_NAME)
        if reused:
            manifest, rejected = _check_existing(config, folder)
        else:
            manifest, rejected = _make(
                config, source or build_source(config), folder, progress, cluster
            )
    written = sum(manifest.rows(split) for split in manifest.splits)
    seconds = time.monotonic() - start
    logger.info(
        "%s: %d samples %s in %s (%.1f s)",
        config.name,
        written,
        "verified" if reused else "written",
        folder,
        seconds,
    )
    if rejected:
        logger.warning(
            "%d samples were rejected, the first is %s: %s; all are listed in %s/%s",
            len(rejected),
            rejected[0].key,
            rejected[0].reason,
            folder,
            REJECTED_NAME,
        )
    read = written + len(rejected)
    findings = _findings(folder)
    return PrepareReport(folder, manifest, read, written, rejected, findings, seconds, reused)


def _findings(folder: Folder) -> list[str]:
    from data.audit import Audit, summary_lines

    return summary_lines(Audit.model_validate_json(folder.read(AUDIT_NAME)))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _settings(config: DataConfig) -> dict[str, object]:
    """Settings kept in the manifest: all that decide what is in the shards, but the raw folder,
    which may move; and the version of the source, so that shards of an older one are made again."""
    values = config.model_dump(mode="json", exclude=NOT_RECORDED)
    if config.table and (path := Path(config.table).expanduser()).is_file():
        values["table_sha256"] = Folder.at(path.parent).sha256(path.name)
    return {**values, "source_version": source_class(config.name).version}


def _resolved(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _make_folder(folder: Folder) -> None:
    try:
        folder.create()
        names = set(folder.names())
    except OSError as error:
        raise DataError(
            f"{folder} cannot be used as a folder for shards ({error}); choose another place or "
            "change its permissions"
        ) from error
    if names and not names & {MANIFEST_NAME, PROGRESS_NAME, REJECTED_NAME}:
        raise DataError(
            f"{folder} holds files ({', '.join(sorted(names)[:3])}) that `midas prepare` did not "
            "make; give a new or empty folder, or delete it"
        )


@contextlib.contextmanager
def _lock(folder: Folder) -> Iterator[None]:
    """Hold a local folder, so that two calls do not write the same shards; it dies with us."""
    if not folder.is_local:
        yield
        return
    descriptor = os.open(folder.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_existing(config: DataConfig, folder: Folder) -> tuple[Manifest, list[Rejection]]:
    manifest = load_manifest(folder)
    asked = _settings(config)
    differences = [
        f"{name} is {manifest.source.get(name)!r} there and {asked.get(name)!r} here"
        for name in sorted(asked.keys() | manifest.source.keys())
        if manifest.source.get(name) != asked.get(name)
    ]
    if differences:
        raise DataError(
            f"{folder} holds a set made with other settings: {'; '.join(differences)}; use its "
            "settings, give another folder, or delete this one"
        )
    verify_shards(manifest, folder)
    folder.child(PROGRESS_NAME).remove_all()
    lines = folder.read(REJECTED_NAME).decode().split("\n")[:-1]  # keys may have U+2028
    rejected = [Rejection(**json.loads(line)) for line in lines]
    read = len(rejected) + sum(manifest.rows(split) for split in manifest.splits)
    _check_rejected(rejected, read, config.max_rejected)
    return manifest, rejected


def _make(
    config: DataConfig,
    source: Source,
    folder: Folder,
    progress: Report | None,
    cluster: Cluster | None,
) -> tuple[Manifest, list[Rejection]]:
    items = source.items()
    tally = _Tally(len(items) + len(source.rejected), config, progress)
    with _rejections_kept(folder, tally):
        tally.reject(source.rejected)
        tally.add(len(source.rejected))
        _check_items(source, items)
        draft = _draft(config, source)
        parts = _plan(config, draft, items)
        _open_progress(folder, _plan_digest(config, draft, items))
        finished = {part.path: done for part in parts if (done := _finished(folder, part))}
        pending = [part for part in parts if part.path not in finished]
        tally.add(len(items) - sum(len(part.items) for part in pending))
        nbytes = _nbytes(draft, pending)
        if folder.is_local:
            check_disk(nbytes, folder.path)
        train_rows = sum(item.split == "train" for item in items)
        group_rows = config.group_rows(train_rows, draft.stored_row_nbytes("train"))
        work = partial(make_part, source, draft, folder, group_rows)
        for part, done in _run(work, pending, nbytes, tally, cluster):
            finished[part.path] = done
            tally.reject([Rejection(key, part.split, reason) for key, reason in done.rejected])
    for name, content in source.files.items():
        folder.write(name, content)
    return _finish(draft, parts, finished, folder, tally.rejected)


def _draft(config: DataConfig, source: Source) -> Manifest:
    files = {
        name: hashlib.sha256(content.encode()).hexdigest() for name, content in source.files.items()
    }
    return Manifest(
        name=source.name,
        source=_settings(config),
        split_rule=source.split_rule,
        modalities=source.modalities,
        classes=source.classes,
        splits={},
        class_counts={},
        files=files,
    )


@contextlib.contextmanager
def _rejections_kept(folder: Folder, tally: _Tally) -> Iterator[None]:
    """Write `rejected.jsonl` also when there are too many of them to go on."""
    try:
        yield
    except DataError:
        if tally.rejected:
            _write_rejected(folder, tally.rejected)
        raise


def _write_rejected(folder: Folder, rejected: list[Rejection]) -> None:
    lines = (json.dumps(asdict(rejection), ensure_ascii=False) + "\n" for rejection in rejected)
    folder.write(REJECTED_NAME, "".join(lines))


def _run(
    work: Callable[..., ShardOutcome],
    parts: list[Part],
    nbytes: int,
    tally: _Tally,
    cluster: Cluster | None,
) -> Iterator[tuple[Part, ShardOutcome]]:
    """Outcomes of parts, `nbytes` in all, made here or on a cluster."""
    if cluster is None or len(parts) < 2 or nbytes < CLUSTER_BYTES:
        for part in parts:
            yield part, work(part, tally.add)
        return
    by_path = {part.path: part for part in parts}
    with cluster() as run:
        for done in run(work, parts):
            part = by_path[done.path]
            tally.add(len(part.items))
            yield part, done


def make_part(
    source: Source,
    draft: Manifest,
    folder: Folder,
    group_rows: int,
    part: Part,
    count: Callable[[int], None] = lambda _: None,
) -> ShardOutcome:
    """Write the shard of a part, then the note that it is finished. Runs in any process."""
    done = write_shard(
        source,
        part.items,
        folder,
        part.path,
        draft=draft,
        split=part.split,
        group_rows=group_rows,
        count=count,
    )
    folder.child(PROGRESS_NAME).write(f"{part.path}.json", done.model_dump_json())
    return done


def _check_items(source: Source, items: list[Item]) -> None:
    if len(source.classes) < 2:
        raise DataError(
            f"{source.name} has {len(source.classes)} class ({', '.join(source.classes)}); "
            "classification needs at least 2; check the raw labels"
        )
    labels = {item.label for item in items if item.split == "train"}
    if missing := [name for name in source.classes if name not in labels]:
        raise DataError(
            f"{source.name} has no training sample of class {', '.join(missing)}; every class "
            "needs one; add raw files or check data.root"
        )
    present = {item.split for item in items}
    if empty := [split for split in SPLITS if split not in present]:
        raise DataError(
            f"{source.name} has no sample in split {', '.join(empty)}; all of {', '.join(SPLITS)} "
            "need one; add raw files or change data.val_fraction or data.split"
        )


def _plan(config: DataConfig, draft: Manifest, items: list[Item]) -> list[Part]:
    parts: list[Part] = []
    for number, split in enumerate(SPLITS):
        own = [item for item in items if item.split == split]
        order = stream(config.seed, Purpose.SHUFFLE, number).permutation(len(own))
        fits = SHARD_BYTES // max(1, draft.stored_row_nbytes(split))
        rows = config.rows_per_shard or min(max(fits, 1), MAX_SHARD_ROWS)
        for first in range(0, len(own), rows):
            chosen = order[first : first + rows]
            path = f"{split}-{first // rows:05d}.parquet"
            parts.append(Part(split, path, [own[position] for position in chosen]))
    return parts


def _plan_digest(config: DataConfig, draft: Manifest, items: list[Item]) -> str:
    """Hash of everything that must be as before if finished shards are to be kept."""
    digest = hashlib.sha256(draft.to_json().encode())
    digest.update(_canonical(_resolved(config.root)).encode())
    for item in items:
        row = [item.sample_id, item.key, item.label, item.split, item.group]
        digest.update(_canonical(row).encode())
        for name, medium in item.media.items():
            numbers = isinstance(medium, Values)
            digest.update(name.encode())
            digest.update(medium.array.tobytes() if numbers else repr(medium).encode())
    return digest.hexdigest()


def _open_progress(folder: Folder, plan: str) -> None:
    """Start `.progress/`, or keep the one there if it belongs to this very plan."""
    notes = folder.child(PROGRESS_NAME)
    if notes.has(PLAN_NAME) and notes.read(PLAN_NAME).decode() == plan:
        return
    _clear(folder)
    notes.create()
    notes.write(PLAN_NAME, plan)


def _clear(folder: Folder) -> None:
    """Remove everything an unfinished call left."""
    for name in folder.names():
        ours = name in (REJECTED_NAME, AUDIT_NAME, *CARD_NAMES) or name.startswith(KEPT_PREFIXES)
        if ours or name.endswith((".parquet", ".parquet.tmp")):
            folder.remove(name)
    folder.child(PROGRESS_NAME).remove_all()


def _finished(folder: Folder, part: Part) -> ShardOutcome | None:
    """What an earlier call made of this part, if its shard is whole and has all its samples.

    One with rejected samples is made again: they may have been repaired.
    """
    notes, name = folder.child(PROGRESS_NAME), f"{part.path}.json"
    if not notes.has(name):
        return None
    done = ShardOutcome.model_validate_json(notes.read(name))
    whole = done.shard and folder.has(part.path) and folder.sha256(part.path) == done.shard.sha256
    return done if whole and not done.rejected else None


def _nbytes(draft: Manifest, parts: list[Part]) -> int:
    """About the size of shards, rather too much."""
    needed = 0
    for part in parts:
        row_nbytes = sum(
            round(m.stored_nbytes(part.split) * (JPEG_RATIO if m.storage == "jpeg" else 1))
            for m in draft.modalities
        )
        needed += shard_nbytes(len(part.items), row_nbytes)
    return needed


def check_disk(needed_bytes: int, folder: Path) -> None:
    """Check that the disk of `folder` has room.

    Raises:
        DataError: fewer bytes are free than needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DataError(
            f"{folder} needs {needed_bytes / 2**30:.2f} GiB for the shards and its disk has "
            f"{free / 2**30:.2f} GiB free; free some space or choose a folder on another disk"
        )


def _finish(
    draft: Manifest,
    parts: list[Part],
    finished: dict[str, ShardOutcome],
    folder: Folder,
    rejected: list[Rejection],
) -> tuple[Manifest, list[Rejection]]:
    """Write `rejected.jsonl`, the data card and, last, the manifest; remove `.progress/`."""
    splits: dict[Split, tuple[Shard, ...]] = {}
    counts: dict[Split, tuple[int, ...]] = {}
    for split in SPLITS:
        own = [finished[part.path] for part in parts if part.split == split]
        splits[split] = tuple(done.shard for done in own if done.shard)
        counts[split] = tuple(np.sum([done.class_counts for done in own], axis=0).tolist())
    manifest = draft.model_copy(update={"splits": splits, "class_counts": counts})
    # A cluster finishes parts in any order; the file must not depend on it.
    place = {(item.key, part.split): n for n, part in enumerate(parts) for item in part.items}
    rejected = sorted(rejected, key=lambda r: place.get((r.key, r.split), -1))
    _check_outcome(manifest, rejected, folder)
    _write_rejected(folder, rejected)
    _write_card(folder, manifest, rejected)
    folder.write(MANIFEST_NAME, manifest.to_json())
    folder.child(PROGRESS_NAME).remove_all()
    return manifest, rejected


def _write_card(folder: Folder, manifest: Manifest, rejected: list[Rejection]) -> None:
    """Audit the shards; write what was found, and the card."""
    from data.audit import audit  # with what follows it, two seconds to import
    from data.card import write_card

    found = audit(folder, manifest)
    folder.write(AUDIT_NAME, found.model_dump_json(indent=2))
    write_card(folder, manifest, found, [(r.key, r.split, r.reason) for r in rejected])


def _check_outcome(manifest: Manifest, rejected: list[Rejection], folder: Folder) -> None:
    """Refuse a set in which rejection emptied a split or a class of train.

    The shards are removed, so that the next call reads the repaired raw files.
    """
    empty = [f"split {split}" for split in SPLITS if manifest.rows(split) == 0]
    empty += [
        f"class {name} of train"
        for name, count in zip(manifest.classes, manifest.class_counts["train"], strict=True)
        if count == 0
    ]
    if empty:
        _clear(folder)
        raise DataError(
            f"{len(rejected)} samples were rejected and nothing is left of {', '.join(empty)}; "
            f"the first is {rejected[0].key}: {rejected[0].reason}; repair the raw files and "
            "prepare again"
        )
