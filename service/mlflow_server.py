"""The command that serves the pages of MLflow, and who may reach them."""

import importlib.util
import ipaddress
import os
import sys
from pathlib import Path

from service.config import ConfigError
from service.sending import SERVERS
from service.tracking import artifact_location

# Of a server without seven processes for background jobs, which take a core when they start.
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
# What MLflow's own login needs.
AUTH_VARIABLES = ("MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_FLASK_SERVER_SECRET_KEY")


def ui_command(uri: str, storage: Path, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves the pages of a database store, and the environment to add for it.

    The environment names the store, whose address may hold a password that `ps` would show, and
    keeps MLflow from starting seven processes for background jobs. Runs that take the server for
    their store have their artifacts where those without a server have them.

    Raises:
        ConfigError: the store is a tracking server, which serves its own pages; or the address can
            be reached from other machines and nobody would have to log in.
    """
    if uri.startswith(SERVERS):
        raise ConfigError(f"{uri} is a running MLflow server: open {uri} in a browser")
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--artifacts-destination", artifact_location(storage)]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    if not is_loopback(host):
        _check_login(host)
        command += ["--app-name", "basic-auth"]
    return command, SERVER_ENVIRONMENT | {STORE_VARIABLE: uri}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_login(host: str) -> None:
    missing = [name for name in AUTH_VARIABLES if not os.environ.get(name)]
    if importlib.util.find_spec("flask_wtf") is None:
        missing.append("the package Flask-WTF (mlflow[auth])")
    if missing:
        raise ConfigError(
            f"--host {host} can be reached from other machines, where whoever can connect may "
            "read and change every run; beyond loopback MLflow must ask for a login, and for that "
            f"{' and '.join(missing)} must be set; see Security in the README; or leave --host out "
            "and use an SSH tunnel: ssh -L 5000:127.0.0.1:5000 THIS_MACHINE"
        )
