"""Raw samples -> Parquet shards and a manifest. Resumable, atomic and byte-identical when repeated.

How one shard is written is in `data/shards.py`; here is which samples go where, and what is kept.
While a set is being made, `.progress/` in its folder holds the plan and one small JSON file per
finished shard; it is removed after the manifest, which is written last, is in place.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.schema import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    Shard,
    Split,
    file_sha256,
    load_manifest,
    verify_shards,
)
from data.shards import ShardOutcome, shard_nbytes, write_shard
from data.sources import SOURCES, DataConfig, Item, Source, build_source, check_settings
from data.sources.base import Purpose, stream

logger = logging.getLogger(__name__)

REJECTED_NAME = "rejected.jsonl"
PROGRESS_NAME = ".progress"
PLAN_NAME = "plan"
SPLITS: tuple[Split, ...] = ("train", "val", "test")
NUM_HASH_DIGITS = 10


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        folder: where the shards are.
        manifest: the manifest in it.
        read: samples that were looked at.
        written: samples in the shards.
        rejected: key and reason of every sample left out; also in `rejected.jsonl`.
        seconds: wall time of this call.
        reused: the set was there already; it was verified and nothing was written.
    """

    folder: Path
    manifest: Manifest
    read: int
    written: int
    rejected: list[tuple[str, str]]
    seconds: float
    reused: bool


@dataclass(frozen=True)
class _Part:
    """The items that one shard is made from."""

    split: Split
    path: str
    items: list[Item]


@dataclass
class _Counter:
    """Counts items for the caller's progress function."""

    total: int
    report: Callable[[int, int], None] | None
    done: int = field(default=0, init=False)

    def add(self, count: int) -> None:
        self.done += count
        if self.report is not None:
            self.report(self.done, self.total)


def default_folder(config: DataConfig, storage: Path) -> Path:
    """Folder of a prepared set under `storage`: its name and a hash of all its settings.

    The raw folder enters the hash as an absolute path, so equal names mean equal settings.
    """
    settings = _settings(config) | {"root": _resolved_root(config)}
    digest = hashlib.sha256(_canonical(settings).encode()).hexdigest()
    return storage / "shards" / f"{config.name}-{digest[:NUM_HASH_DIGITS]}"


def prepare(
    config: DataConfig, folder: Path, progress: Callable[[int, int], None] | None = None
) -> PrepareReport:
    """Make the prepared set in `folder`, continue an interrupted one, or verify a finished one.

    The items of each split are shuffled once with `stream(config.seed, SHUFFLE, split)` and cut
    into parts of `rows_per_shard`. A finished set is compared with the settings and its shards
    with their hashes; the raw files are then not needed. Two calls at once on one folder wait for
    each other.

    Args:
        config: the data set and how to prepare it.
        folder: new, empty, or one that an earlier call worked in.
        progress: called with the number of samples done and of all samples.

    Returns:
        What was done.

    Raises:
        DataError: settings, raw files or the folder are not usable; the message says what to do.
    """
    start = time.monotonic()
    check_settings(config)
    if not os.path.isfile(folder / MANIFEST_NAME):
        build_source(config)  # a wrong data.root must not leave an empty folder behind
    _make_folder(folder)
    with _lock(folder):
        reused = (folder / MANIFEST_NAME).is_file()
        if reused:
            manifest, rejected = _check_existing(config, folder)
        else:
            manifest, rejected = _make(config, folder, progress)
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
        key, reason = rejected[0]
        logger.warning(
            "%d samples were rejected, the first is %s: %s; all are listed in %s",
            len(rejected),
            key,
            reason,
            folder / REJECTED_NAME,
        )
    read = written + len(rejected)
    return PrepareReport(folder, manifest, read, written, rejected, seconds, reused)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _settings(config: DataConfig) -> dict[str, object]:
    """Settings kept in the manifest: all but the raw folder, which may move, and the version of the
    source, so that shards of an older one are made again."""
    version = SOURCES[config.name].version
    return {**config.model_dump(mode="json", exclude={"root"}), "source_version": version}


def _resolved_root(config: DataConfig) -> str | None:
    return None if config.root is None else str(Path(config.root).expanduser().resolve())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise DataError(
            f"{folder} cannot be used as a folder for shards ({error}); choose another place or "
            "change its permissions"
        ) from error
    if names and not names & {MANIFEST_NAME, PROGRESS_NAME}:
        raise DataError(
            f"{folder} holds files ({', '.join(sorted(names)[:3])}) that `midas prepare` did not "
            "make; give a new or empty folder, or delete it"
        )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder, so that two calls do not write the same shards; the lock dies with us."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_existing(config: DataConfig, folder: Path) -> tuple[Manifest, list[tuple[str, str]]]:
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
    shutil.rmtree(folder / PROGRESS_NAME, ignore_errors=True)
    lines = (folder / REJECTED_NAME).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return manifest, [(entry["key"], entry["reason"]) for entry in entries]


def _make(
    config: DataConfig, folder: Path, progress: Callable[[int, int], None] | None
) -> tuple[Manifest, list[tuple[str, str]]]:
    source = build_source(config)
    items = source.items()
    _check_items(source, items)
    parts = _plan(config, items)
    draft = Manifest(
        name=source.name,
        source=_settings(config),
        modalities=source.modalities,
        classes=source.classes,
        splits={},
        class_counts={},
    )
    _open_progress(folder, _plan_digest(config, draft, items))
    finished = {part.path: done for part in parts if (done := _finished(folder, part))}
    pending = [part for part in parts if part.path not in finished]
    check_disk(sum(shard_nbytes(len(part.items), draft.row_nbytes) for part in pending), folder)
    counter = _Counter(len(items), progress)
    counter.add(len(items) - sum(len(part.items) for part in pending))
    group_rows = config.group_rows(sum(item.split == "train" for item in items))
    for part in pending:
        finished[part.path] = _write_part(source, draft, part, folder, group_rows, counter)
    return _finish(draft, parts, finished, folder)


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


def _plan(config: DataConfig, items: list[Item]) -> list[_Part]:
    parts: list[_Part] = []
    for number, split in enumerate(SPLITS):
        own = [item for item in items if item.split == split]
        order = stream(config.seed, Purpose.SHUFFLE, number).permutation(len(own))
        for first in range(0, len(own), config.rows_per_shard):
            chosen = order[first : first + config.rows_per_shard]
            path = f"{split}-{first // config.rows_per_shard:05d}.parquet"
            parts.append(_Part(split, path, [own[position] for position in chosen]))
    return parts


def _plan_digest(config: DataConfig, draft: Manifest, items: list[Item]) -> str:
    """Hash of everything that must be as before if finished shards are to be kept."""
    rows = [[item.sample_id, item.key, item.label, item.split] for item in items]
    text = draft.to_json() + _canonical([_resolved_root(config), rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _open_progress(folder: Path, plan: str) -> None:
    """Start `.progress/`, or keep the one there if it belongs to this very plan."""
    marker = folder / PROGRESS_NAME / PLAN_NAME
    if marker.is_file() and marker.read_text() == plan:
        return
    _clear(folder)
    marker.parent.mkdir()
    _write_atomically(marker, plan)


def _clear(folder: Path) -> None:
    """Remove everything an unfinished call left."""
    for split in SPLITS:
        for path in folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].parquet"):
            path.unlink()
    (folder / REJECTED_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder / PROGRESS_NAME, ignore_errors=True)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _sidecar(folder: Path, part: _Part) -> Path:
    return folder / PROGRESS_NAME / f"{part.path}.json"


def _finished(folder: Path, part: _Part) -> ShardOutcome | None:
    """What an earlier call made of this part, if its shard is whole."""
    sidecar = _sidecar(folder, part)
    if not sidecar.is_file():
        return None
    done = ShardOutcome.model_validate_json(sidecar.read_text())
    path = folder / part.path
    if done.shard and not (path.is_file() and file_sha256(path) == done.shard.sha256):
        return None
    return done


def _write_part(
    source: Source, draft: Manifest, part: _Part, folder: Path, group_rows: int, counter: _Counter
) -> ShardOutcome:
    """Write the shard of a part, then the note that it is finished."""
    done = write_shard(
        source,
        part.items,
        folder / part.path,
        folder / PROGRESS_NAME / f"{part.path}.tmp",
        schema=draft.arrow_schema(),
        group_rows=group_rows,
        count=counter.add,
    )
    _write_atomically(_sidecar(folder, part), done.model_dump_json())
    return done


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
    draft: Manifest, parts: list[_Part], finished: dict[str, ShardOutcome], folder: Path
) -> tuple[Manifest, list[tuple[str, str]]]:
    """Write `rejected.jsonl`, then the manifest, then remove `.progress/`."""
    splits: dict[Split, tuple[Shard, ...]] = {}
    counts: dict[Split, tuple[int, ...]] = {}
    for split in SPLITS:
        own = [finished[part.path] for part in parts if part.split == split]
        splits[split] = tuple(done.shard for done in own if done.shard)
        counts[split] = tuple(np.sum([done.class_counts for done in own], axis=0).tolist())
    manifest = draft.model_copy(update={"splits": splits, "class_counts": counts})
    entries = [(part, *entry) for part in parts for entry in finished[part.path].rejected]
    rejected = [(key, reason) for _, key, reason in entries]
    _check_outcome(manifest, rejected, folder)
    lines = [
        json.dumps({"key": key, "split": part.split, "reason": reason}, ensure_ascii=False)
        for part, key, reason in entries
    ]
    _write_atomically(folder / REJECTED_NAME, "".join(line + "\n" for line in lines))
    _write_atomically(folder / MANIFEST_NAME, manifest.to_json())
    shutil.rmtree(folder / PROGRESS_NAME)
    return manifest, rejected


def _check_outcome(manifest: Manifest, rejected: list[tuple[str, str]], folder: Path) -> None:
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
        key, reason = rejected[0]
        raise DataError(
            f"{len(rejected)} samples were rejected and nothing is left of {', '.join(empty)}; "
            f"the first is {key}: {reason}; repair the raw files and prepare again"
        )
