"""A web server on this machine whose answers a test can spoil."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from web import listening


@dataclass
class Mirror:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True  # honour Range
    cut_after: list[int] = field(
        default_factory=list
    )  # bytes of the body until the connection ends, per answer
    status: list[int] = field(default_factory=list)  # refusals to give first
    content_type: str = "application/octet-stream"
    version: str = '"1"'
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    delay: float = 0.0  # seconds before an answer
    port: int = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


def _handler(mirror: Mirror) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            mirror.asked.append((self.path, wanted))
            time.sleep(mirror.delay)
            if mirror.status:
                return self.send_error(mirror.status.pop(0))
            if (whole := mirror.files.get(self.path.lstrip("/"))) is None:
                return self.send_error(404)
            fresh = self.headers.get("If-Range", mirror.version) == mirror.version
            start = (
                int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and mirror.ranges and fresh else None
            )
            if start is not None and start >= len(whole):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(whole)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            body = whole[start or 0 :]
            self.send_response(200 if start is None else 206)
            if start is not None:
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            self.send_header("Content-Type", mirror.content_type)
            self.send_header("Content-Length", str(len(body)))
            if mirror.version:
                self.send_header("ETag", mirror.version)
            self.end_headers()
            self.wfile.write(body[: mirror.cut_after.pop(0)] if mirror.cut_after else body)
            return None

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving(mirror: Mirror) -> Iterator[Mirror]:
    """Serve until the block ends."""
    with listening(_handler(mirror)) as mirror.port:
        yield mirror
