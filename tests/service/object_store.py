"""A small S3 server over a folder, for a storage that is away for a while:

    python -m tests.service.object_store FOLDER PORT

It knows what pyarrow's S3 client asks for and checks no signature. Objects are files, named by
their quoted keys, so what it has accepted is there when it is started again.
"""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
BUCKET = "bucket"
COUNT = itertools.count()
# Without these the client wraps what it sends in chunks with checksums.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


class Server:
    """The server in a process of its own, which can be stopped, killed and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [sys.executable, "-m", "tests.service.object_store", str(folder)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/runs?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us"

    def start(self) -> None:
        self._process = subprocess.Popen([*self._command, str(self.port)], cwd=ROOT)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        raise TimeoutError("the server did not start")

    def send(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server for as long as the body runs."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def __getattr__(self, name: str):
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if bucket != BUCKET:
            self._reply(404)
        elif not key:
            self._bucket(query, body)
        elif self.command == "POST" or "partNumber" in query:
            self._parts(key, query, body)
        elif self.command == "PUT":
            self._write(key, body)
            self._reply(200)
        elif self.command == "DELETE":
            self._file(key).unlink(missing_ok=True)
            self._reply(204)
        else:
            self._read(key)

    def _bucket(self, query: dict[str, str], body: bytes) -> None:
        if "list-type" in query:
            self._list(query.get("prefix", ""), query.get("delimiter", ""))
        elif "delete" in query:
            for key in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self._file(key).unlink(missing_ok=True)
            self._reply(200, "<DeleteResult/>")
        else:
            self._reply(200)

    def _list(self, prefix: str, delimiter: str) -> None:
        keys = sorted(unquote(path.name) for path in self.folder.iterdir() if path.is_file())
        inside = [key for key in keys if key.startswith(prefix)]
        rest = {key: key[len(prefix) :].partition(delimiter or "\0") for key in inside}
        folders = {prefix + head + mark for head, mark, _ in rest.values() if mark}
        found = [
            f"<Contents><Key>{escape(key)}</Key><Size>{self._file(key).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, (_, mark, _) in rest.items()
            if not mark
        ]
        found += [
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
        ]
        about = f"<IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>"
        self._reply(200, f"<ListBucketResult>{about}{''.join(found)}</ListBucketResult>")

    def _parts(self, key: str, query: dict[str, str], body: bytes) -> None:
        """An object that is sent in parts."""
        if "uploads" in query:
            upload = f"{os.getpid()}-{next(COUNT)}"
            (self.folder / upload).mkdir()
            self._reply(200, f"<R><UploadId>{upload}</UploadId></R>")
            return
        parts = self.folder / query["uploadId"]
        if "partNumber" in query:
            (parts / f"{int(query['partNumber']):05d}").write_bytes(body)
            self._reply(200)
        else:
            self._write(key, b"".join(part.read_bytes() for part in sorted(parts.iterdir())))
            self._reply(200, "<CompleteMultipartUploadResult/>")

    def _read(self, key: str) -> None:
        path = self._file(key)
        if not path.is_file():
            self._reply(404, "<Error><Code>NoSuchKey</Code></Error>")
            return
        content, asked = path.read_bytes(), self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        self._reply(206 if asked else 200, content)

    def _write(self, key: str, content: bytes) -> None:
        part = self.folder / f"{os.getpid()}-{next(COUNT)}.part"
        part.write_bytes(content)
        os.replace(part, self._file(key))

    def _file(self, key: str) -> Path:
        return self.folder / quote(key, safe="")

    def _reply(self, status: int, content: str | bytes = b"") -> None:
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
