"""MLflow away in the middle of a run: is training slowed, and is everything there afterwards?

    uv run python tests/bench/outage.py --seconds 300 --mode down

Trains digits with a real MLflow server over an SQLite file, which is killed (`down`) or stopped
with SIGSTOP (`slow`) for so long in mid-run, and started again. Prints one JSON line: median
seconds of an epoch before, while the server was away, and after; and the points that MLflow has
against the rows of the run's history.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlflow import MlflowClient

from service import mlflow_server, tracking
from service.files import HISTORY_NAME, read_history
from service.outbox import Outbox
from tests.service.test_tracking import free_port, wait_until_up

TRIED_EPOCHS = 60
SMALL = (
    *("--midas.warmup-epochs", "2", "--scaling.num-workers", "1"),
    *("--model.encoders.image.kind", "mlp", "--model.encoders.audio.kind", "mlp"),
)


def serve(storage: Path, port: int) -> subprocess.Popen[bytes]:
    command, extra = mlflow_server.ui_command(
        tracking.tracking_uri(storage), storage, "127.0.0.1", port
    )
    server = subprocess.Popen(command, env=os.environ | extra, cwd=storage, start_new_session=True)
    wait_until_up(f"http://127.0.0.1:{port}", server)
    return server


def train(storage: Path, name: str, epochs: int, server: str) -> subprocess.Popen[bytes]:
    words = ["train", "digits", "--name", name, "--storage", str(storage), *SMALL]
    command = [sys.executable, "-m", "service", *words, "--optim.epochs", str(epochs)]
    variables = os.environ | {"MLFLOW_TRACKING_URI": server}
    return subprocess.Popen(command, env=variables, stdout=sys.stderr)


def rows(storage: Path, name: str) -> list[dict[str, float]]:
    return read_history(storage / name / HISTORY_NAME)


def enough_epochs(storage: Path, server: str, seconds: float) -> int:
    """For so long and half as long again, as fast as a short run is."""
    assert train(storage, "short", TRIED_EPOCHS, server).wait() == 0
    return round(1.6 * seconds / median(r["time/epoch_seconds"] for r in rows(storage, "short")))


def result(
    storage: Path, store: str, left: float, came_back: float, up_again: float
) -> dict[str, object]:
    """Speed before, during and after, and what MLflow has of what it should have."""
    found, client = rows(storage, "run"), MlflowClient(store)
    run_id = tracking.run_id(storage / "run")
    keys = sorted({key for row in found for key in row} - {"time"})
    wanted = {key: [(r["epoch"], r[key]) for r in found if key in r] for key in keys}
    there = {
        key: [(p.step, p.value) for p in client.get_metric_history(run_id, key)] for key in keys
    }
    windows = {
        "before": (found[5]["time"], left),
        "away": (left + 5, came_back),
        "after": (up_again, math.inf),
    }
    seconds = {
        name: [r["time/epoch_seconds"] for r in found if begin < r["time"] < end]
        for name, (begin, end) in windows.items()
    }
    return {
        "epochs": {name: len(times) for name, times in seconds.items()},
        "epoch_seconds": {name: median(times) for name, times in seconds.items()},
        # The fastest tenth feels least of what else the machine does.
        "epoch_seconds_p10": {name: quantiles(t, n=10)[0] for name, t in seconds.items()},
        "epoch_seconds_p90": {name: quantiles(t, n=10)[-1] for name, t in seconds.items()},
        "points_in_history": sum(map(len, wanted.values())),
        "points_in_mlflow": sum(map(len, there.values())),
        "equal": all(sorted(there[key]) == wanted[key] for key in keys),
        "status": client.get_run(run_id).info.status,
        "events_left": Outbox(storage / "run").num_due(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long it is away")
    parser.add_argument("--mode", choices=("down", "slow"), default="down")
    args = parser.parse_args()
    storage = Path(tempfile.mkdtemp(prefix="midas-outage-"))
    store, port = tracking.tracking_uri(storage), free_port()
    server, url = serve(storage, port), f"http://127.0.0.1:{port}"
    run = train(storage, "run", enough_epochs(storage, url, args.seconds + 60.0), url)

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition() and run.poll() is None:
            time.sleep(1.0)  # to look more often would slow what is measured

    try:
        wait_for(lambda: len(rows(storage, "run")) >= 100)
        left = time.time()
        os.killpg(server.pid, signal.SIGKILL if args.mode == "down" else signal.SIGSTOP)
        wait_for(lambda: time.time() - left >= args.seconds)
        came_back = time.time()
        if args.mode == "down":
            server.wait()
            server = serve(storage, port)
        else:
            os.killpg(server.pid, signal.SIGCONT)
        up_again = time.time()
        wait_for(lambda: Outbox(storage / "run").num_due() < 5)
        caught_up = time.time() - up_again if run.poll() is None else None
        about = {
            "mode": args.mode,
            "seconds_away": came_back - left,
            "seconds_to_catch_up": caught_up,
            "returncode": run.wait(),
        }
        print(json.dumps(about | result(storage, store, left, came_back, up_again)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        run.kill()


if __name__ == "__main__":
    main()
