"""A Hugging Face hub on this machine: what its library asks for when it lists and fetches a repository."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from web import listening

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub holds (repository -> file -> content), whom it refuses, and what it was asked for."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", COMMIT)
    refusal: tuple[int, dict[str, str]] | None = None  # of every request: status and headers
    refuses_files: bool = False  # ... of files only
    headers: dict[str, str] = field(default_factory=dict)  # of every answer
    asked: list[str] = field(default_factory=list)  # "GET /path"
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def fetched(self) -> set[str]:
        """The files that were sent."""
        return {
            line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line
        }


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            is_file = "/resolve/" in path
            if hub.refusal and (is_file or not hub.refuses_files):
                return self.answer(hub.refusal[0], hub.refusal[1], b"")
            owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
            files = hub.repositories.get(f"{owner}/{name}")
            if files is None:
                return self.answer(404, {"X-Error-Code": "RepoNotFound"}, b"")
            if (rest or ["", "main"])[1] not in hub.revisions:
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
            if is_file:
                content = files.get("/".join(rest[2:]))
                if content is None:
                    return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                return self.answer(200, {"ETag": etag, "X-Repo-Commit": COMMIT}, content)
            if rest[:1] == ["tree"]:
                listing = [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for file, content in files.items()
                ]
                return self.answer(200, {}, json.dumps(listing).encode())
            about = {
                "id": f"{owner}/{name}",
                "sha": COMMIT,
                "siblings": [{"rfilename": file} for file in files],
            }
            return self.answer(200, {}, json.dumps(about).encode())

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **hub.headers, **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends."""
    with listening(_handler(hub)) as hub.port:
        yield hub
