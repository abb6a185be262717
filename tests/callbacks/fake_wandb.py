"""As much of a W&B server as its client needs to begin, resume and finish a run."""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "toy", "entity": {"id": "e", "name": "me"}}


class FakeWandb:
    """Keeps runs by id: rows as the client sent them, and the exit codes with which it ended (a context manager)."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.exits: dict[str, list[int]] = {}
        self.groups: dict[str, str] = {}
        self.sockets: list[Any] = []

    def __enter__(self) -> FakeWandb:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """As if the network was gone: nothing listens, and what is under way is cut."""
        self._server.shutdown()
        self._server.server_close()
        for each in self.sockets:
            each.close()

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL query."""
        run = str(given.get("name"))
        if name == "Viewer":
            return {
                "viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            }
        if name == "RunResumeStatus" and run in self.rows:
            return {
                "model": {
                    "id": "p",
                    "name": "toy",
                    "entity": {"id": "e", "name": "me"},
                    "bucket": self._bucket(run),
                }
            }
        if name == "UpsertBucket":
            self.rows.setdefault(run, [])
            self.groups[run] = given.get("groupName") or self.groups.get(run, "")
            return {"upsertBucket": {"bucket": {**self._bucket(run), "project": PROJECT}, "inserted": True}}
        if name == "CreateRunFiles":
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}}
        return {}

    def _bucket(self, run: str) -> dict[str, Any]:
        rows = self.rows[run]
        summary = {key: value for row in rows for key, value in row.items()}
        return {
            "id": "x",
            "name": run,
            "displayName": "n",
            "summaryMetrics": json.dumps(summary),
            "historyLineCount": len(rows),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        """Rows of a run; they may come a second time, from the line that the client names."""
        if (part := (sent.get("files") or {}).get("wandb-history.jsonl")) is not None:
            self.rows[run][part["offset"] :] = [json.loads(line) for line in part["content"]]
        if sent.get("complete"):
            self.exits.setdefault(run, []).append(sent["exitcode"])


def _handler(fake: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            fake.sockets.append(self.connection)

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                answer = {"data": fake.answer(name[1] if name else "", asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                fake.stream(self.path.split("/")[-2], json.loads(body))
            self._reply(answer)

        def do_GET(self) -> None:
            self._reply({})

        def _reply(self, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
