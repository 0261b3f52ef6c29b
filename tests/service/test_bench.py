"""`midas bench`: the report made of turns, and the command on real Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.folder import Folder
from data.prepare import prepare
from data.schema import Manifest
from service.bench import bare_contenders, limit, summary, work
from service.config import RunConfig, load_preset
from service.contest import TheEnd, Turns, for_fewer
from service.launch import base_payload
from service.rows import make_order
from tests.service.cli import SMALL, last_json, midas, until

LOOP = {"seconds": 2.0, "steps": 10, "rows": 640, "step_p50": 0.2, "step_p95": 0.3}


def turns() -> dict[str, list[dict[str, float]]]:
    """Two rounds; the second is twice as slow for all, as on a busy machine."""
    slow = {"seconds": 4.0, "rows": 640}
    return {
        "loop": [LOOP | {"wait_share": 0.01}, LOOP | slow | {"wait_share": 0.02}],
        "bare": [{"seconds": 1.6, "rows": 640}, {"seconds": 3.2, "rows": 640}],
        "alone": [{"seconds": 3.2, "rows": 640}, {"seconds": 6.4, "rows": 640}],
        "apart": [{"rate": 390.0, "slowest_rate": 360.0}, {"rate": 195.0, "slowest_rate": 180.0}],
        "memory": [
            {"midas": 0.11, "joint": 0.1, "joint_uni": 0.11, "rows": 64},
            {"midas": 0.22, "joint": 0.2, "joint_uni": 0.22, "rows": 64},
        ],
        "reader": [{"rows_per_second": 9000.0}, {"rows_per_second": 7000.0}],
        "released": [{"seconds": 20.0, "rows": 640}, {"seconds": 40.0, "rows": 640}],
    }


def test_ratios_are_taken_turn_by_turn():
    report = summary(turns(), others=["released"])
    assert report["samples_per_second"] == pytest.approx((320 + 160) / 2)
    assert report["ray_over_bare"] == pytest.approx(0.8)
    assert report["scaling"] == pytest.approx(2.0)
    assert report["apart_scaling"] == pytest.approx(1.95)
    assert report["slowest_scaling"] == pytest.approx(1.8)
    assert report["midas_over_joint"] == pytest.approx(1.1)
    assert report["midas_over_joint_uni"] == pytest.approx(1.0)
    assert report["rows_per_second"] == pytest.approx(8000)
    assert report["data_wait_share"] == pytest.approx(0.015)
    assert report["released_over"] == pytest.approx(10.0)
    assert report["rounds"] == 2
    assert report["samples_per_second_min"] == pytest.approx(160)
    assert report["samples_per_second_max"] == pytest.approx(320)
    assert report["ray_over_bare_min"] == report["ray_over_bare_max"] == pytest.approx(0.8)


def test_one_worker_and_a_cluster_have_no_scaling():
    found = turns()
    del found["alone"]
    assert not {"scaling", "apart_scaling"} & set(summary(found))
    del found["bare"]
    assert "ray_over_bare" not in summary(found)


def test_groups_of_powers_of_two_show_how_training_scales():
    assert bare_contenders(1) == {"bare": ["single_0"]}
    assert set(bare_contenders(2)) == {"bare", "alone", "apart"}
    assert {"group_2", "group_4"} < set(bare_contenders(5))
    assert bare_contenders(5)["bare"] == ["group_5"]
    assert "group_4" not in bare_contenders(4)
    smaller = [{"seconds": 1.6, "rows": 320}, {"seconds": 3.2, "rows": 320}]
    report = summary(turns() | {"group_16": smaller, "group_2": smaller})
    assert report["scaling_2"] == pytest.approx(1.0)
    for size in (2, 16):
        assert {f"scaling_{size}{end}" for end in ("_min", "", "_max")} < set(report)


@pytest.mark.parametrize(("groups", "expected"), [(1, 1), (2, 1), (4, 2), (8, 2)])
def test_a_pair_group_of_fewer_workers_has_at_least_one(groups: int, expected: int):
    values = {"midas": {"pair_groups": groups}, "scaling": {"num_workers": 4}}
    config = RunConfig.model_validate(load_preset("digits").model_dump() | values)
    assert for_fewer(config, 2).midas.pair_groups == expected


def test_work_is_compared_with_gpus_that_are_known():
    assert work(4 * 10**12, 2.0, None, 2) == {"model_tflops": 2.0}
    known = work(989 * 10**12, 2.0, "NVIDIA H100 80GB HBM3", 2)
    assert known["peak_share"] == pytest.approx(0.25)
    part = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    assert work(10**12, 1.0, part, 1) == {"model_tflops": 1.0, "gpu": part}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({}, "the model"),
        ({"data_wait_share": 0.2}, "reading"),
        ({"rows_per_second": 250.0}, "reading"),
        ({"exchange_share": 0.3}, "exchange"),
        ({"prepare_share": 0.2}, "augmentation"),
        ({"optimizer_share": 0.2}, "the optimizer"),
    ],
)
def test_limit_names_the_slowest_part(values, word):
    report = summary(turns()) | {"exchange_share": 0.02}
    assert limit(report | values, workers=2).startswith(word)


def test_limit_says_what_the_machine_allows():
    report = summary(turns()) | {"exchange_share": 0.3}
    expected = (
        "2 processes that do not talk are as fast as 1.95, at the pace of the slowest as 1.80"
    )
    assert expected in limit(report, workers=2)


def test_a_contender_waits_for_its_turns_and_hears_the_end(tmp_path: Path):
    mine = Turns(tmp_path, "other")
    (tmp_path / "call-other-1").write_text("7")
    assert mine.next({}) == 7
    (tmp_path / "call-other-2").write_text("7")
    assert mine.next({"seconds": 1.5}) == 7
    assert (tmp_path / "done-other-1").read_text() == '{"seconds": 1.5}'
    (tmp_path / "end").write_text("")
    with pytest.raises(TheEnd):
        mine.next({"seconds": 2.5})


def leave_batch(folder: Path, config: RunConfig, manifest: Manifest, place: int) -> int:
    """The part of `place` of a global batch, as a worker leaves it; returns its rows."""
    order = make_order(config, manifest)
    lane_rows = [order.batch_rows(0, range(lane, lane + 1)) for lane in range(order.lanes)]
    lane = torch.tensor(
        [own for own in order.lanes_of(place, 3) for _ in range(lane_rows[own])], dtype=torch.int64
    )
    inputs = {
        m.name: torch.rand(len(lane), *m.shape).to(getattr(torch, m.dtype))
        for m in manifest.modalities
    }
    number = torch.arange(len(lane))
    values = {
        **{"inputs": inputs, "label": number % len(manifest.classes), "sample_id": number},
        **{"lane": lane, "num_lanes": order.lanes, "global_rows": sum(lane_rows)},
        "lane_rows": tuple(lane_rows),
    }
    torch.save([values], folder / f"batches-{place}.pt")
    return len(lane)


@pytest.mark.ray  # other processes, not Ray
def test_fewer_processes_train_with_the_rows_of_their_places(tmp_path: Path):
    manifest = prepare(load_preset("digits").data, tmp_path / "shards").manifest
    values = load_preset("digits").model_dump() | {
        **{"scaling": {"num_workers": 3}, "name": "bench", "storage": str(tmp_path)}
    }
    config = RunConfig.model_validate(values)
    payload = base_payload(config, manifest, Folder.at(tmp_path / "shards"))
    (tmp_path / "payload.json").write_text(json.dumps(payload))
    rows = [leave_batch(tmp_path, config, manifest, place) for place in range(3)]
    assert sorted(rows) == [16, 24, 24]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "service.contest", str(tmp_path), *map(str, arguments)]
        )
        for arguments in (("group_2", 0, 2), ("group_2", 1, 2), ("single_2", 2, 1))
    ]
    try:
        for name, expected in (("group_2", sum(rows[:2])), ("single_2", rows[2])):
            (tmp_path / f"call-{name}-1").write_text("4")
            answer = tmp_path / f"done-{name}-1"
            until(answer.exists)
            assert json.loads(answer.read_text())["rows"] == 4 * expected
        (tmp_path / "end").write_text("")
        assert [process.wait(60) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.ray
def test_bench_of_a_small_set(tmp_path: Path):
    result = last_json(
        midas("bench", "digits", *SMALL, "--seconds", "4", "--json", storage=tmp_path)
    )
    for name in (
        *("samples_per_second", "model_samples_per_second", "bare_samples_per_second"),
        *("rows_per_second", "midas_over_joint", "midas_over_joint_uni", "ray_over_bare"),
        *("scaling", "apart_scaling", "slowest_scaling", "first_step_seconds"),
        *("step_p50_seconds", "memory/peak_mib", "model_step_seconds", "model_tflops"),
    ):
        assert result[name] > 0
    for share in ("data_wait", "prepare", "exchange", "optimizer"):
        assert 0 <= result[f"{share}_share"] < 1
    assert result["workers"] == 2
    assert result["limit"]
    low, middle, high = (result[f"ray_over_bare{end}"] for end in ("_min", "", "_max"))
    assert low <= middle <= high
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]  # nothing is left behind
