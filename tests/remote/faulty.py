"""A small HTTP server for shards that misbehaves as told, on loopback, with the standard library alone.

A fault belongs to a file and is taken by its next ``times`` requests; all requests are written down.
"""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FOR_EVER = 10**9


@dataclass
class Request:
    """One request: the part that was asked for (first byte, past-the-last one), the answer, the bytes of body sent."""

    name: str
    method: str
    part: tuple[int, int] | None
    status: int = 0
    sent: int = 0
    at: float = field(default_factory=time.monotonic)


@dataclass
class Fault:
    """What the next ``left`` requests for a file meet."""

    kind: str
    left: int
    options: dict[str, Any]


class FaultyServer:
    """Serves the files of a folder on a free port of loopback until ``stop``; ``start`` comes back on the same port."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[Request] = []
        self.gone = threading.Event()
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._port = 0
        self._http: _Http | None = None

    def __enter__(self) -> "FaultyServer":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the port of before if there was one."""
        self.gone.clear()
        self._http = _Http(("127.0.0.1", self._port), _Handler)
        self._http.owner = self
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and drop the open ones."""
        if self._http is None:
            return
        self._http.shutdown()
        self._http.server_close()
        self._http.drop_connections()
        self.gone.set()  # what stalls goes on now, to find nobody there
        self._http = None

    def plan(self, name: str, kind: str, *, times: int = FOR_EVER, **options: Any) -> None:
        """Let the next ``times`` requests for file ``name`` meet a fault (a key of FAULTS), after those planned before."""
        assert kind in FAULTS, f"{kind} is none of {sorted(FAULTS)}"
        with self._lock:
            self._faults.setdefault(name, []).append(Fault(kind, times, options))

    def mend(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()

    def faults_left(self) -> int:
        """Return how many planned faults no request has met yet."""
        with self._lock:
            return sum(fault.left for faults in self._faults.values() for fault in faults)

    def bytes_sent(self, name: str) -> int:
        """Return how many bytes of a file's body were sent so far, over all requests."""
        return sum(request.sent for request in self.requests if request.name == name)

    def gets(self, name: str) -> list[Request]:
        """Return the GET requests for a file so far."""
        return [request for request in self.requests if (request.name, request.method) == (name, "GET")]

    def take_fault(self, name: str, method: str) -> Fault | None:
        with self._lock:
            for fault in self._faults.get(name, []):
                if fault.left > 0 and (method == "GET" or fault.kind not in NEED_A_BODY):
                    fault.left -= 1
                    return fault
        return None


class _Http(ThreadingHTTPServer):
    owner: FaultyServer
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *args: Any):
        self._connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().close_request(request)

    def drop_connections(self) -> None:
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the other side was faster

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed in mid-transfer is what these tests are about: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    protocol_version = "HTTP/1.1"
    asked: Request

    def log_message(self, *_args: Any) -> None:
        """Nothing on stderr: the server keeps its own list."""

    def do_GET(self) -> None:
        owner = self.server.owner
        name = os.path.basename(self.path)
        self.asked = Request(name, self.command, parse_range(self.headers.get("Range")))
        owner.requests.append(self.asked)
        file = owner.folder / name
        if not name or not file.is_file():
            self.head(404, 0)
            return
        fault = owner.take_fault(name, self.command)
        if fault is None:
            honest(self, file.read_bytes())
        else:
            FAULTS[fault.kind](self, file.read_bytes(), **fault.options)

    do_HEAD = do_GET

    def head(self, status: int, length: int, **headers: str) -> None:
        self.asked.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def begin(self, content: bytes, *, ranges: bool = True) -> bytes:
        """Send the head of an honest answer and return the body that belongs to it."""
        if self.asked.part is None or not ranges:
            self.head(200, len(content), **({"Accept_Ranges": "bytes"} if ranges else {}))
            return content if self.command == "GET" else b""
        start, stop = self.asked.part
        start, stop = (max(len(content) + start, 0), len(content)) if start < 0 else (start, stop)
        stop = min(stop, len(content))
        if start >= stop:
            self.head(416, 0, Content_Range=f"bytes */{len(content)}")
            return b""
        self.head(
            206, stop - start, Content_Range=f"bytes {start}-{stop - 1}/{len(content)}", Accept_Ranges="bytes"
        )
        return content[start:stop] if self.command == "GET" else b""

    def send(self, body: bytes) -> None:
        for start in range(0, len(body), 1 << 16):
            piece = body[start : start + (1 << 16)]
            self.wfile.write(piece)
            self.asked.sent += len(piece)


def parse_range(header: str | None) -> tuple[int, int] | None:
    """Return (first, past-the-last) byte of a Range header, first negative = that many from the end."""
    if header is None:
        return None
    first, _, last = header.removeprefix("bytes=").partition("-")
    if not first:
        return -int(last), FOR_EVER
    return int(first), int(last) + 1 if last else FOR_EVER


def honest(handler: _Handler, content: bytes) -> None:
    handler.send(handler.begin(content))


def status(handler: _Handler, content: bytes, *, status: int = 500) -> None:
    """Nothing but this status."""
    handler.head(status, 0)


def cut(handler: _Handler, content: bytes, *, after: int) -> None:
    """Announce the whole length, end the connection (FIN) after some bytes."""
    handler.send(handler.begin(content)[:after])
    handler.close_connection = True


def reset(handler: _Handler, content: bytes, *, after: int) -> None:
    """Announce the whole length, reset the connection (RST) after some bytes."""
    handler.send(handler.begin(content)[:after])
    time.sleep(0.05)  # a reset would overtake what is still on its way
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()  # it holds the socket open
    handler.connection.close()
    handler.close_connection = True


def stall(handler: _Handler, content: bytes, *, after: int, seconds: float = 3600.0) -> None:
    """Send some bytes, then nothing for a while, then the rest."""
    body = handler.begin(content)
    handler.send(body[:after])
    handler.server.owner.gone.wait(seconds)
    handler.send(body[after:])


def slow(handler: _Handler, content: bytes, *, rate: int) -> None:
    """Send at most ``rate`` bytes a second."""
    body = handler.begin(content)
    piece = max(1, rate // 50)
    for start in range(0, len(body), piece):
        handler.send(body[start : start + piece])
        if handler.server.owner.gone.wait(piece / rate):
            return


def short(handler: _Handler, content: bytes, *, size: int) -> None:
    """A perfectly well-formed answer of a file that holds only its first bytes."""
    honest(handler, content[:size])


def wrong(handler: _Handler, content: bytes, *, instead: bytes) -> None:
    """Other bytes of the right length."""
    honest(handler, (instead * (len(content) // len(instead) + 1))[: len(content)])


def no_range(handler: _Handler, content: bytes) -> None:
    """The whole file, whatever part was asked for."""
    handler.send(handler.begin(content, ranges=False))


FAULTS: dict[str, Callable[..., None]] = {
    "status": status,
    "cut": cut,
    "reset": reset,
    "stall": stall,
    "slow": slow,
    "short": short,
    "wrong": wrong,
    "no_range": no_range,
}
NEED_A_BODY = {"cut", "reset", "stall", "slow"}  # a HEAD request does not use them up
