"""Whether workers fit a cluster: each on one node."""

from typing import Any

import pytest

from service.capacity import check_cluster_capacity, missing, places
from service.config import RunError, ScalingConfig

TWO = [{"CPU": 2.0}, {"CPU": 2.0}]
MIXED = [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}]


def scaling(**settings: Any) -> ScalingConfig:
    return ScalingConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        ({"cpus_per_worker": 1}, TWO, 4),
        ({"cpus_per_worker": 2}, TWO, 2),
        ({"cpus_per_worker": 3}, TWO, 0),  # four CPUs, but no node has three
        ({"cpus_per_worker": 2, "device": "gpu"}, MIXED, 2),
        ({"cpus_per_worker": 3, "device": "gpu"}, MIXED, 1),
        ({"cpus_per_worker": 4, "device": "cpu"}, MIXED, 3),
        ({"num_workers": 3, "cpus_per_worker": 4}, MIXED, 3),  # auto: not enough GPUs, so none
    ],
)
def test_a_worker_is_on_one_node(
    settings: dict[str, Any], nodes: list[dict[str, float]], expected: int
):
    assert places(scaling(**settings), nodes) == expected


@pytest.mark.parametrize(
    ("settings", "nodes", "reason"),
    [
        ({"num_workers": 5}, TWO, "has 4 CPUs; 5 workers with 1 each need 5"),
        ({"num_workers": 1, "cpus_per_worker": 4}, TWO, "room for 0 workers with 4 CPUs each"),
        ({"num_workers": 3, "device": "gpu"}, MIXED, "needs one GPU a worker, 3; .* has 2"),
        (
            {"num_workers": 2, "cpus_per_worker": 3, "device": "gpu"},
            MIXED,
            "room for 1 workers with 3 CPUs and a GPU each, and 2 are asked for",
        ),
    ],
)
def test_what_is_missing_is_said(
    settings: dict[str, Any], nodes: list[dict[str, float]], reason: str
):
    with pytest.raises(RunError, match=reason):
        check_cluster_capacity(scaling(**settings), nodes)


def test_an_elastic_run_needs_its_fewest_workers_only():
    assert missing(scaling(num_workers=(2, 64)), TWO) is None
