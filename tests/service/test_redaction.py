"""Secrets are hidden in what leaves the program."""

import io
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import ConfigError, RunConfig, check
from service.console import Console
from service.redaction import has_credentials, is_secret_name, redact, redacted, secret_names
from tests.service.test_cli import midas


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("postgresql://user:pass@host/db", "postgresql://user:***@host/db"),
        ("postgresql+psycopg2://user:p@ss/w:rd@host:5432/db", "postgresql+psycopg2://user:***@host:5432/db"),
        ("at https://token@host/x now", "at https://***@host/x now"),
        ("s3://bucket/a?secret_key=abc&region=us", "s3://bucket/a?secret_key=***&region=us"),
        ('{"uri": "s3://KEY:abc@bucket"}', '{"uri": "s3://KEY:***@bucket"}'),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("http://127.0.0.1:5000/api?x=1", "http://127.0.0.1:5000/api?x=1"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("mail to a@b.org about x: y", "mail to a@b.org about x: y"),
        ("s3://b/r?scheme=http&endpoint_override=127.0.0.1:9000&region=us",) * 2,
    ],
)  # fmt: skip
def test_passwords_in_addresses_are_hidden_and_nothing_else_is(text: str, left: str):
    assert redact(text) == left
    assert redact(left) == left
    assert has_credentials(text) == (text != left)


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22+longer")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "secrets/token")
    monkeypatch.setenv("TINY_TOKEN", "a")
    assert redact("hunter22+longer, hunter22; secrets/token a") == "***, ***; secrets/token a"
    assert {"MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"} <= set(secret_names())
    values = {"a": ["hunter22", {"b": "x hunter22"}], "c": 1, "d": None}
    assert redacted(values) == {"a": ["***", {"b": "x ***"}], "c": 1, "d": None}


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("RAY_AUTH_TOKEN", True),
        ("PGPASSWORD", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("MLFLOW_FLASK_SERVER_SECRET_KEY", True),
        ("HF_TOKEN", True),
        ("RAY_AUTH_TOKEN_PATH", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("SSH_AUTH_SOCK", False),
        ("PWD", False),
    ],
)
def test_which_variables_are_secret(name: str, secret: bool):
    assert is_secret_name(name) == secret


PASSWORD = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=6)


@given(password=PASSWORD, before=st.text(), after=st.text())
def test_no_password_survives(password: str, before: str, after: str):
    found = redact(f"{before} postgresql://midas:{password}@db/mlflow {after}")
    assert f":{password}@" not in found
    assert "midas:***@db/mlflow" in found


def test_the_terminal_shows_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("X_TOKEN", "s3cret-value")
    out, err = io.StringIO(), io.StringIO()
    console = Console(json_mode=False, stdout=out, stderr=err)
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    try:
        console.setup_logging()
        logging.getLogger("service").warning("lost %s", "http://u:s3cret@h")
    finally:
        root.handlers[:] = handlers
    console.status("joining s3cret-value")
    console.error_panel("no s3cret-value at postgresql://u:s3cret@h/d")
    console.plan({"token": "s3cret-value"})
    try:
        raise ValueError("bad s3cret-value")
    except ValueError as error:
        console.trace(error)
    console.json_line({"uri": "postgresql://u:s3cret@h/d", "x": 1})
    text = out.getvalue() + err.getvalue()
    assert "s3cret" not in text
    assert text.count("***") == 8
    assert out.getvalue().endswith('{"uri": "postgresql://u:***@h/d", "x": 1}\n')


@pytest.mark.parametrize("setting", ["checkpoint", "data"])
def test_settings_with_passwords_are_refused(setting: str):
    place = "s3://KEY:hidden@bucket/x"
    config = RunConfig.model_validate({setting: {"storage": place}})
    with pytest.raises(
        ConfigError, match=rf"{setting}.storage=s3://KEY:\*\*\*@bucket/x holds"
    ) as e:
        check(config)
    assert "hidden" not in str(e.value)


def test_an_error_with_an_address_in_it_hides_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:hidden@h:5000")
    for flags in ([], ["--debug"]):
        done = midas("ui", "--storage", tmp_path, *flags)
        assert done.code == 1
        assert "http://u:***@h:5000" in done.err
        assert "hidden" not in done.err
