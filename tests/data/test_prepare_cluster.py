"""Preparing on Ray Data: the same bytes as in one process, and nothing done twice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from data import prepare as module
from data.pipeline import work_anywhere
from data.prepare import Part, Work, prepare
from data.shards import ShardOutcome
from data.sources import DataConfig

pytestmark = pytest.mark.ray

CONFIG = DataConfig(name="digits", rows_per_shard=200, noise={"image": 0.5})


@pytest.fixture(autouse=True)
def small_sets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLUSTER_BYTES", 1)


@contextmanager
def on_ray() -> Iterator[Callable[[Work, list[Part]], Iterator[ShardOutcome]]]:
    yield lambda work, parts: map(ShardOutcome.model_validate, work_anywhere(work, parts))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_cluster_makes_the_same_files(one_cpu_ray: None, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    prepare(CONFIG, tmp_path / "here")
    report = prepare(CONFIG, tmp_path / "there", lambda *count: seen.append(count), on_ray)
    assert report.written == 1797
    assert seen[-1] == (1797, 1797)
    assert len(seen) > 5  # while it runs, not at its end only
    assert files(tmp_path / "here") == files(tmp_path / "there")


class Number(BaseModel):
    """What `double` returns."""

    value: float


def double(array: np.ndarray) -> Number:
    return Number(value=2 * float(array.sum()))


def test_items_may_hold_large_arrays(one_cpu_ray: None):
    items = [np.full(400_000, n, np.float64) for n in range(3)]
    found = sorted(result["value"] for result in work_anywhere(double, items))
    assert found == [0.0, 800_000.0, 1_600_000.0]


def test_a_second_call_makes_only_what_is_left(one_cpu_ray: None, tmp_path: Path):
    made: list[str] = []

    @contextmanager
    def breaks_off() -> Iterator[Callable[[Work, list[Part]], Iterator[ShardOutcome]]]:
        def run(work: Work, parts: list[Part]) -> Iterator[ShardOutcome]:
            with on_ray() as whole:
                for done in whole(work, parts[:3]):
                    made.append(done.path)
                    yield done
            raise KeyboardInterrupt

        yield run

    @contextmanager
    def counted() -> Iterator[Callable[[Work, list[Part]], Iterator[ShardOutcome]]]:
        def run(work: Work, parts: list[Part]) -> Iterator[ShardOutcome]:
            made.extend(part.path for part in parts)
            with on_ray() as whole:
                yield from whole(work, parts)

        yield run

    prepare(CONFIG, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare(CONFIG, tmp_path / "cut", None, breaks_off)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    prepare(CONFIG, tmp_path / "cut", None, counted)
    assert sorted(made) == sorted(set(made))
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
