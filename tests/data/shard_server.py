"""A web server on this machine that is slow, silent or cut off, as a test asks of it answer by answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Literal

from web import listening

Mood = Literal[
    "silent", "stops", "cut", "drips", "refuses"
]  # answers nothing; stops, or hangs up, after half


@dataclass
class ShardServer:
    """What it holds, what becomes of the next answers, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    moods: list[Mood] = field(
        default_factory=list
    )  # of the answers to come, in order; then whole and at once
    bodies: list[bytes] = field(default_factory=list)  # sent first in place of what was asked for
    asked: list[str] = field(default_factory=list)
    end: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


def _handler(server: ShardServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            server.asked.append(name)
            mood = server.moods.pop(0) if server.moods else None
            if mood == "silent":
                server.end.wait()
                return
            if name not in server.files or mood == "refuses":
                self.send_error(404 if mood is None else 403)
                return
            body = server.bodies.pop(0) if server.bodies else server.files[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if mood == "drips":
                for start in range(0, len(body), len(body) // 10):  # curl gathers 4 kB before it hands on
                    self.wfile.write(body[start : start + len(body) // 10])
                    server.end.wait(0.1)
                return
            self.wfile.write(body if mood is None else body[: len(body) // 2])
            if mood == "stops":
                server.end.wait()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving(server: ShardServer) -> Iterator[ShardServer]:
    """Serve until the block ends."""
    with listening(_handler(server)) as server.port:
        try:
            yield server
        finally:
            server.end.set()
