"""Gives the answers of an S3 server the status 206 where they are ranges.

rclone's server sends the right bytes and Content-Range, but under status 200, which clients refuse
(the library it stands on was mended later: github.com/johannesboyne/gofakes3, pull request 121).
Everything else goes through as it is, the Host that requests are signed for included.
"""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HOP = {"connection", "transfer-encoding", "date", "server"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        self._forward()

    def do_HEAD(self) -> None:
        self._forward()

    def _forward(self) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.port)) as peer:
            try:
                peer.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for key, value in self.headers.items():
                    peer.putheader(key, value)
                peer.endheaders()
                answer = peer.getresponse()
                body = answer.read()
            except OSError:
                self.close_connection = True
                return
        is_range = answer.status == 200 and answer.headers["Content-Range"] is not None
        self.send_response_only(206 if is_range else answer.status)
        for key, value in answer.headers.items():
            if key.lower() not in _HOP | ({"content-length"} if body else set()):
                self.send_header(key, value)
        if body:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port


@contextlib.contextmanager
def partial_content(port: int) -> Iterator[str]:
    """Forward to a port of this machine and give the address to use instead."""
    server = _Server(port)
    thread = threading.Thread(target=lambda: server.serve_forever(0.02))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
