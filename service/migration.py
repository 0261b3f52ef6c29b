"""Moving the MLflow store of a folder, an SQLite file, into an empty PostgreSQL database.

Every table is copied as it is, so that runs keep their ids, histories, tags and links. Artifacts
are files and stay where they are.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.config import ConfigError
from service.redaction import redact

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData, Table

TARGET_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
ROWS_AT_ONCE = 5000
# What MLflow writes into a database when it makes its tables.
FILLED_BY_MLFLOW = ("alembic_version", "workspaces")
MIGRATIONS_SECONDS = 300
CONNECT_SECONDS = 10
# `mlflow db upgrade`, but for an address that no list of processes shows.
UPGRADE = "import os, mlflow.db; mlflow.db.upgrade.callback(os.environ['MIDAS_DATABASE'])"


def migrate(storage: Path) -> dict[str, int]:
    """Copy `mlflow.db` in `storage` into the database that MLFLOW_BACKEND_STORE_URI names.

    It is done in one transaction: either everything is there afterwards, or nothing. The file
    stays as it is, but for MLflow's own upgrade of its tables.

    Returns:
        Rows by table.

    Raises:
        ConfigError: there is no file or no target, the target has runs in it, or counts differ
            after copying.
    """
    source_file, target = storage / "mlflow.db", os.environ.get(TARGET_VARIABLE, "")
    if not source_file.is_file():
        raise ConfigError(f"{source_file} is not there; give the folder of the runs: --storage DIR")
    if not target.startswith("postgresql"):
        raise ConfigError(
            f"{TARGET_VARIABLE}={redact(target)} must be the address of an empty PostgreSQL "
            "database: postgresql://USER:PASSWORD@HOST/NAME; it is read from the environment so "
            "that the password shows up in no list of processes"
        )
    source = f"sqlite:///{source_file.resolve()}"
    _check_connection(target)
    for uri in (source, target):
        _make_tables(uri)
    return _copy(source, target)


def _check_connection(uri: str) -> None:
    """MLflow itself would try for an hour."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError

    try:
        create_engine(uri, connect_args={"connect_timeout": CONNECT_SECONDS}).connect().close()
    except OperationalError as error:
        raise ConfigError(
            f"{redact(uri)} does not let this user in: {redact(str(error.orig)).strip()}; check "
            f"that the server is up, and {TARGET_VARIABLE}"
        ) from error


def _make_tables(uri: str) -> None:
    """Have MLflow make its tables, or bring them to its version."""
    done = subprocess.run(
        [sys.executable, "-c", UPGRADE],
        env=os.environ | {"MIDAS_DATABASE": uri, "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True,
        text=True,
        timeout=MIGRATIONS_SECONDS,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise ConfigError(
            f"MLflow cannot make its tables in {redact(uri)}: {redact(' '.join(last))}; check that "
            "the database is there and that this user may create tables in it"
        )


def _copy(source_uri: str, target_uri: str) -> dict[str, int]:
    from sqlalchemy import MetaData, create_engine, func, select

    source, target = MetaData(), MetaData()
    with create_engine(source_uri).connect() as read, create_engine(target_uri).begin() as write:
        source.reflect(read)
        target.reflect(write)
        tables = [table for table in target.sorted_tables if table.name in source.tables]
        if write.scalar(select(func.count()).select_from(target.tables["runs"])):
            raise ConfigError(
                f"{redact(target_uri)} has runs in it already; copying into them would mix two "
                "stores; take an empty database"
            )
        for table in reversed(tables):
            if table.name not in FILLED_BY_MLFLOW:
                write.execute(table.delete())
        counts = {}
        for table in tables:
            if table.name in FILLED_BY_MLFLOW:
                continue
            for rows in _rows(read, source.tables[table.name]):
                write.execute(table.insert(), rows)
            there = write.scalar(select(func.count()).select_from(table)) or 0
            here = read.scalar(select(func.count()).select_from(source.tables[table.name]))
            if there != here:
                raise ConfigError(
                    f"{table.name} has {here} rows here and {there} there; not copied"
                )
            counts[table.name] = there
        _advance_sequences(write, target)
    return counts


def _rows(connection: "Connection", table: "Table") -> Iterator[list[dict[str, Any]]]:
    found = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(table.select())
    for part in found.mappings().partitions(ROWS_AT_ONCE):
        yield [dict(row) for row in part]


def _advance_sequences(connection: "Connection", tables: "MetaData") -> None:
    """Let new rows get numbers behind those that were copied."""
    from sqlalchemy import func, select, text

    for table in tables.sorted_tables:
        for column in table.columns:
            named = text("select pg_get_serial_sequence(:table, :column)")
            names = {"table": table.name, "column": column.name}
            sequence = connection.scalar(named, names)
            last = sequence and connection.scalar(select(func.max(column)))
            if last:
                connection.execute(select(func.setval(sequence, last)))
