"""The audit of dependencies in CI, against a stand-in for the service of advisories."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "audit.py"


class Advisories(BaseHTTPRequestHandler):
    """Knows a hole in Pillow that a later version closes, and one in NumPy that none does."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = asked["package"]["name"]
        events = [{"introduced": "0"}, *([{"fixed": "99.1"}] if name == "pillow" else [])]
        hole = {
            "id": f"GHSA-{name}",
            "aliases": [f"CVE-{name}"],
            "summary": "a hole",
            "affected": [
                {
                    "package": {"name": name, "ecosystem": "PyPI"},
                    "ranges": [{"type": "ECOSYSTEM", "events": events}],
                }
            ],
        }
        body = json.dumps({"vulns": [hole]} if name in ("pillow", "numpy") else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Advisories) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def audit(url: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--osv-url", url, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_fix_that_is_not_taken_fails(url: str):
    done = audit(url)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "CVE-pillow, fixed in 99.1; take it" in done.stdout
    assert "CVE-numpy, fixed in no version; " in done.stdout
    assert "1 fixes to take" in done.stdout


def test_a_reviewed_advisory_does_not(url: str, tmp_path: Path):
    project = tmp_path / "pyproject.toml"
    project.write_text('[tool.midas.reviewed-advisories]\nCVE-pillow = "we read no such files"\n')
    done = audit(url, "--project", str(project))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CVE-pillow, fixed in 99.1; reviewed: we read no such files" in done.stdout


def test_without_the_network_it_warns():
    done = audit("http://127.0.0.1:9/v1/query")
    assert (done.returncode, done.stdout) == (0, "")
    assert "warning: no audit" in done.stderr
