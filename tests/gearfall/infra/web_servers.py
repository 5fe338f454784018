"""A small web server of ours that serves a directory by ranges, and the faults a test asks for."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_LAST_MODIFIED = "Sat, 21 Nov 2026 00:00:00 GMT"


@dataclass
class Faults:
    """What goes wrong; read at each request, so that a test may change it half way."""

    cut_after_bytes: int | None = None
    """Of a body; the connection is then closed."""
    cuts_left: int = 10**9
    from_byte: int = 0
    """Ranges that begin before it are neither cut nor stalled."""
    stall: threading.Event | None = None
    """Bodies wait for it before their second half."""
    stall_file: str = ""
    """The only one that stalls; all do if empty."""
    extra_length: int = 0
    """Added to every size that is told."""
    ignore_ranges: bool = False
    tag: str = "v1"
    obey_if_match: bool = True
    replace: dict[str, bytes] = field(default_factory=dict)
    """Other bytes under a name, without another tag."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(file, Range header) of every GET, in order."""
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set when the first body stalls."""
    partition_asked: threading.Event = field(default_factory=threading.Event)
    """Set by the first GET of a partition."""


@dataclass
class WebServer:
    url: str
    faults: Faults


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.faults = Faults()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.faults.requests.append((name, self.headers.get("Range", "")))
        if name.startswith("partition"):
            self.server.faults.partition_asked.set()
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        faults, name = self.server.faults, self.path.lstrip("/")
        tag, wanted = f'"{faults.tag}"', self.headers.get("If-Match")
        if not (self.server.directory / name).is_file():
            self._send_head(404, 0, {})
        elif faults.obey_if_match and wanted not in {None, tag}:
            self._send_head(412, 0, {})
        else:
            body = self._send_range(name, {"ETag": tag, "Last-Modified": _LAST_MODIFIED})
            if has_body:
                with contextlib.suppress(ConnectionError):
                    self._send_body(body)

    def _send_range(self, name: str, head: dict[str, str]) -> bytes:
        faults = self.server.faults
        content = faults.replace.get(name) or (self.server.directory / name).read_bytes()
        told_bytes = len(content) + faults.extra_length
        range_ = self.headers.get("Range")
        if range_ is None or faults.ignore_ranges:
            self._send_head(200, told_bytes, head)
            return content
        start, end = (int(text) for text in range_.removeprefix("bytes=").split("-"))
        head["Content-Range"] = f"bytes {start}-{end}/{told_bytes}"
        self._send_head(206, end + 1 - start, head)
        return content[start : end + 1]

    def _send_head(self, status: int, length: int, head: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for key, value in head.items():
            self.send_header(key, value)
        self.end_headers()

    def _send_body(self, body: bytes) -> None:
        faults = self.server.faults
        begin = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0]
        if int(begin) < faults.from_byte:
            self.wfile.write(body)
            return
        if faults.stall is not None and self.path.lstrip("/").startswith(faults.stall_file):
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            faults.stalled.set()
            faults.stall.wait(20)
            body = body[half:]
        if faults.cut_after_bytes is not None and faults.cuts_left > 0:
            faults.cuts_left -= 1
            body = body[: faults.cut_after_bytes]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()


@contextlib.contextmanager
def web_server(directory: Path) -> Iterator[WebServer]:
    server = _Server(directory)
    faults = server.faults
    thread = threading.Thread(target=lambda: server.serve_forever(0.02))
    thread.start()
    try:
        yield WebServer(f"http://127.0.0.1:{server.server_port}", faults)
    finally:
        if faults.stall is not None:
            faults.stall.set()
        server.shutdown()
        server.server_close()
        thread.join()
