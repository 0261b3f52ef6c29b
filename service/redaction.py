"""Secrets do not leave the program: the one place that knows what they look like.

What people read (terminal, logs, MLflow, files of a run) goes through `redact`. Secrets come from
the environment or from files, never from settings.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, TextIO

HIDDEN = "***"
# Shorter values would hide ordinary words.
MIN_CHARACTERS = 6
SECRET_WORDS = ("TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "KEY", "CREDENTIALS")
# Variables that say where a secret is, not what it is.
PLACES = ("PATH", "FILE", "DIR", "URL", "URI")
USER_INFO = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?P<user>[^\s/?#:@]*:)?[^\s/?#@]+@")
# A password that was not quoted may hold any of these characters.
LOOSE_USER_INFO = re.compile(
    r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?P<user>[^\s/?#:@]*:)(?!\d+(?:[/?#\s]|$))[^\s\"']+@"
)
PARAMETER = re.compile(
    r"(?P<name>[?&][\w.-]*(?:token|password|passwd|secret|signature|credential|key)[\w.-]*=)[^&\s#\"']+",
    re.IGNORECASE,
)
HEADER = re.compile(
    r"(?P<name>\b(?:authorization|x-ray-authorization)\b['\"]?\s*[:=]\s*['\"]?"
    r"(?:bearer|basic)\s+)[\w+/=.~-]+",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret: MLFLOW_TRACKING_PASSWORD."""
    words = name.upper().split("_")
    return words[-1] not in PLACES and any(word.endswith(SECRET_WORDS) for word in words)


def secret_names() -> list[str]:
    """Environment variables that hold secrets; their names, never their values."""
    return sorted(name for name, value in os.environ.items() if value and is_secret_name(name))


def has_credentials(uri: str) -> bool:
    """Whether a URI holds a password, token or key."""
    return _without_credentials(uri) != uri


def redact(text: str) -> str:
    """The text with `***` in the place of secrets.

    Secrets are values of environment variables that are named like one, and passwords, tokens and
    keys in URIs and in authorization headers.
    """
    values = {os.environ[name] for name in secret_names()}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= MIN_CHARACTERS:
            text = text.replace(value, HIDDEN)
    return _without_credentials(text)


def redacted(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with `redact` applied to every text in it."""
    return {name: _redacted(value) for name, value in values.items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return redacted(value)
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return value


def _without_credentials(text: str) -> str:
    for pattern in (USER_INFO, LOOSE_USER_INFO):
        text = pattern.sub(lambda m: f"{m['scheme']}{m['user'] or ''}{HIDDEN}@", text)
    text = PARAMETER.sub(lambda m: m["name"] + HIDDEN, text)
    return HEADER.sub(lambda m: m["name"] + HIDDEN, text)


class RedactedStream:
    """A text stream that writes what `redact` leaves; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without its secrets; returns how many characters were taken."""
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
