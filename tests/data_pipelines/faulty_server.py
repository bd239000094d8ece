"""A loopback http server of a folder's files by byte range, which fails as real ones do, each time in the same way."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("503", "429", "reset", "truncated", "short", "long", "wrong range", "slow")
SLOW_S = 1.5
CLOSE_WITH_RESET = struct.pack("ii", 1, 0)


class FaultyServer(ThreadingHTTPServer):
    """Files of `folder` at `url`/name. Of the tries for a range, `fault_share` fail, drawn by hash of `seed`.

    down: names that answer 503 for ever. latency_s: before every answer. requests: (name, first byte, last byte) of all
    that came; num_bytes: sent in bodies; faults: how often each failure was played.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, fault_share: float = 0.0, seed: int = 0, latency_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fault_share, self.seed, self.latency_s = folder, fault_share, seed, latency_s
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.down: set[str] = set()
        self.requests: list[tuple[str, int, int]] = []
        self.faults: Counter[str] = Counter()
        self.num_bytes = 0
        self._tries: Counter[tuple[str, int, int]] = Counter()
        self._lock = threading.Lock()

    def note(self, wanted: tuple[str, int, int]) -> str:
        """Which failure this request meets, or ""."""
        with self._lock:
            self.requests.append(wanted)
            self._tries[wanted] += 1
            text = repr((self.seed, *wanted, self._tries[wanted])).encode()
            value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
            fault = FAULTS[value % len(FAULTS)] if value / 2**64 < self.fault_share else ""
            fault = "503" if wanted[0] in self.down else fault
            self.faults[fault] += 1
            return fault

    def count(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is part of the play."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.server.folder / Path(self.path).name
        if not path.is_file():
            self._answer(404, b"")
            return
        content = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(match[1]), min(int(match[2]), len(content) - 1)) if match else (0, len(content) - 1)
        if first >= len(content):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        fault = self.server.note((path.name, first, last))
        time.sleep(self.server.latency_s)
        etag = f'"{hashlib.blake2b(content, digest_size=8).hexdigest()}"'
        self._play(fault, content[first : last + 1], f"bytes {first}-{last}/{len(content)}", etag)

    def _play(self, fault: str, body: bytes, content_range: str, etag: str) -> None:
        headers = {"Content-Range": content_range, "ETag": etag}
        if fault in ("503", "429"):
            self._answer(int(fault), b"try later")
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_WITH_RESET)
            self.connection.close()
        elif fault == "truncated":
            self._answer(206, body[: len(body) // 2], {**headers, "Content-Length": str(len(body))})
            self.close_connection = True
        elif fault in ("short", "long"):
            self._answer(206, body[:-1] if fault == "short" else body + b"x", headers)
        elif fault == "wrong range":
            self._answer(206, body, {**headers, "Content-Range": content_range.replace("bytes ", "bytes 1")})
        else:
            time.sleep(SLOW_S if fault == "slow" else 0)
            self._answer(206, body, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.server.count(len(body))

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@contextmanager
def serving(folder: Path, fault_share: float = 0.0, seed: int = 0, latency_s: float = 0.0) -> Iterator[FaultyServer]:
    with FaultyServer(folder, fault_share, seed, latency_s) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
