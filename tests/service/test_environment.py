"""What is set for Ray, and what workers elsewhere are given."""

import pytest

from service import environment


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty environment in the place of this process's."""
    found: dict[str, str] = {}
    monkeypatch.setattr(environment.os, "environ", found)
    return found


def test_a_local_cluster_gets_a_token_of_its_own(variables: dict[str, str]):
    environment.configure_ray()
    assert variables["RAY_AUTH_MODE"] == "token"
    assert len(variables["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize("joins", [{}, {"RAY_ADDRESS": "10.0.0.7:6379"}])
@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_who_names_a_token_wants_it_asked_for(
    name: str, joins: dict[str, str], variables: dict[str, str]
):
    variables |= {name: "given", **joins}
    environment.configure_ray()
    assert variables["RAY_AUTH_MODE"] == "token"
    named = {key: value for key, value in variables.items() if key.startswith("RAY_AUTH_TOKEN")}
    assert named == {name: "given"}


def test_a_cluster_without_a_token_is_joined_without_one(variables: dict[str, str]):
    variables["RAY_ADDRESS"] = "10.0.0.7:6379"
    environment.configure_ray()
    assert not [name for name in variables if name.startswith("RAY_AUTH")]


def test_no_token_is_a_choice_that_is_kept(variables: dict[str, str]):
    variables["RAY_AUTH_MODE"] = "disabled"
    environment.configure_ray()
    assert variables["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in variables


def test_workers_get_secrets_apart_from_what_everyone_may_see(variables: dict[str, str]):
    variables |= {
        "MLFLOW_TRACKING_URI": "http://me:word@mlflow",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "word",
        "AWS_SECRET_ACCESS_KEY": "not for workers",
    }
    seen, hidden = environment.worker_environment()
    assert seen == {"MLFLOW_TRACKING_USERNAME": "me"}
    assert set(hidden) == {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"}
