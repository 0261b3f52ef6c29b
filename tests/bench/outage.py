"""MLflow away in the middle of a run: is training slowed, and is everything there afterwards?

    uv run python tests/bench/outage.py --seconds 300 --mode down

Trains digits with a real MLflow server over an SQLite file, which is killed (`down`) or stopped
with SIGSTOP (`slow`) for so long in mid-run, and started again. Prints one JSON line: median
seconds of an epoch with the server up and away, and the points that MLflow has against the rows
of the run's history.
"""

import argparse
import contextlib
import json
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
from service.outbox import Outbox
from tests.service.test_tracking import free_port, wait_until_up

EPOCH_SECONDS = 0.7  # about, of the small model


def serve(storage: Path, port: int) -> subprocess.Popen[bytes]:
    command, extra = mlflow_server.ui_command(tracking.tracking_uri(storage), "127.0.0.1", port)
    server = subprocess.Popen(command, env=os.environ | extra, cwd=storage, start_new_session=True)
    wait_until_up(f"http://127.0.0.1:{port}", server)
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long it is away")
    parser.add_argument("--mode", choices=("down", "slow"), default="down")
    args = parser.parse_args()
    storage = Path(tempfile.mkdtemp(prefix="midas-outage-"))
    store, port = tracking.tracking_uri(storage), free_port()
    server = serve(storage, port)
    epochs = round((1.5 * args.seconds + 90.0) / EPOCH_SECONDS)
    words = f"train digits --name run --storage {storage} --optim.epochs {epochs} --json".split()
    words += ["--midas.warmup-epochs", "2", "--scaling.num-workers", "1"]
    words += ["--model.encoders.image.kind", "mlp", "--model.encoders.audio.kind", "mlp"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    run = subprocess.Popen([sys.executable, "-m", "service", *words], env=environment)
    history = storage / "run" / "history.jsonl"

    def rows() -> list[dict[str, float]]:
        lines = history.read_text().splitlines() if history.is_file() else []
        return [json.loads(line) for line in lines]

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition() and run.poll() is None:
            time.sleep(0.1)

    try:
        wait_for(lambda: len(rows()) >= 40)
        left = time.time()
        os.killpg(server.pid, signal.SIGKILL if args.mode == "down" else signal.SIGSTOP)
        wait_for(lambda: time.time() - left >= args.seconds)
        came_back = time.time()
        if args.mode == "down":
            server.wait()
            server = serve(storage, port)
        else:
            os.killpg(server.pid, signal.SIGCONT)
        returncode = run.wait()
        folder, found = storage / "run", rows()
        client, run_id = MlflowClient(store), tracking.run_id(storage / "run")
        keys = sorted({key for row in found for key in row} - {"time"})
        wanted = {key: [(r["epoch"], r[key]) for r in found if key in r] for key in keys}
        there = {
            key: [(p.step, p.value) for p in client.get_metric_history(run_id, key)] for key in keys
        }
        times = [row["time/epoch_seconds"] for row in found if row["time"] < left][5:]
        times += [r["time/epoch_seconds"] for r in found if r["time"] > came_back + 30]
        away = [r["time/epoch_seconds"] for r in found if left + 5 < r["time"] < came_back]
        result = {
            "mode": args.mode,
            "seconds_away": came_back - left,
            "returncode": returncode,
            "epochs": len(found),
            "epoch_seconds_up": median(times),
            "epoch_seconds_up_p90": quantiles(times, n=10)[-1],
            "epoch_seconds_away": median(away),
            "epoch_seconds_away_p90": quantiles(away, n=10)[-1],
            "points_in_history": sum(map(len, wanted.values())),
            "points_in_mlflow": sum(len(there[key]) for key in keys),
            "equal": all(sorted(there[key]) == wanted[key] for key in keys),
            "status": client.get_run(run_id).info.status,
            "events_left": sum(1 for _ in Outbox(folder).due()),
        }
        print(json.dumps(result))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        run.kill()


if __name__ == "__main__":
    main()
