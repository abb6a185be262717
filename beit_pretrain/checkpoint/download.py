"""Files from the network: several addresses, resumed after a broken connection, kept only if right."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import DownloadError
from beit_pretrain.wording import printable

ATTEMPTS = 4  # in a row without a new byte, until the next address has its turn
PAUSE = 0.5  # seconds before another attempt, times the attempts that were in vain
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes
WEB_PAGE = "sent a web page instead of the file (a log-in or proxy page, or an address that moved)"


class _NextMirrorError(Exception):
    """This address cannot serve the file; another one may."""


class _BrokenError(Exception):
    """The connection ended early; what came is kept and the rest can be asked for."""


@dataclass(frozen=True)
class _Wanted:
    """One file: where it goes and what it must be."""

    path: Path
    size: int | None
    sha256: str | None

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    @property
    def origin(self) -> Path:
        """Beside the part: the address it came from and that file's version there."""
        return self.path.with_name(self.path.name + ".part.json")

    def fault(self, path: Path) -> str:
        """What is wrong with the file at `path`, or nothing."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"
        if self.sha256 is not None and (found := files.sha256(path)) != self.sha256.lower():
            return f"SHA-256 {found} instead of {self.sha256.lower()}"
        return ""

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.origin.unlink(missing_ok=True)


def fetch(
    name: str,
    *,
    urls: Sequence[str],
    cache: Path,
    size: int | None = None,
    sha256: str | None = None,
    offline: bool = False,
    key: str = "offline",
) -> Path:
    """The path of file `name` in the folder `cache`, fetched from the first address that delivers it.

    `size` in bytes and `sha256` are checked where given, also on a file that is there already; one that fails
    is never kept. Processes that want the same file at once take turns, and one fetches. `key` is the config
    key of `offline`, for the message.
    """
    wanted = _Wanted(Path(cache).expanduser() / name, size, sha256)
    if wanted.path.is_file() and not wanted.fault(wanted.path):
        return wanted.path
    if offline:
        state = "is damaged" if wanted.path.is_file() else "is not there"
        raise DownloadError(
            f"{wanted.path} {state} and {key}=true forbids fetching it;"
            f" put the file there (published at {_listed(urls)}) or set {key}=false"
        )
    try:
        with _turn(wanted.path):
            if wanted.path.is_file():
                if not wanted.fault(wanted.path):  # another process fetched it while this one waited
                    return wanted.path
                wanted.path.unlink()
            return _from_any(wanted, urls)
    except OSError as error:
        raise DownloadError(
            f"{wanted.path} cannot be written: {error.strerror}; free or change the cache"
        ) from error


def _from_any(wanted: _Wanted, urls: Sequence[str]) -> Path:
    """Try each address; complain about all of them if none works."""
    faults = []
    for url in urls:
        try:
            _from_one(wanted, url)
        except _NextMirrorError as fault:
            faults.append(f"{url}: {fault}")
            continue
        wanted.part.replace(wanted.path)
        wanted.origin.unlink(missing_ok=True)
        return wanted.path
    tried = "; ".join(faults) or "no address is given"
    raise DownloadError(
        f"{wanted.path.name} could not be fetched ({tried});"
        f" add a working address, or put the file at {wanted.path}"
    )


def _from_one(wanted: _Wanted, url: str) -> None:
    """Fill the part from one address, asking again for the rest when the connection breaks, and check it."""
    if not url.startswith(("http://", "https://")):
        raise _NextMirrorError("not an http or https address")
    vain, reached = 0, -1
    while vain < ATTEMPTS:
        try:
            resumed = _transfer(wanted, url)
        except _BrokenError as broken:
            fault = str(broken)
            have = wanted.part.stat().st_size if wanted.part.is_file() else 0
            vain, reached = (0, have) if have > reached else (vain + 1, reached)
            time.sleep(PAUSE * (1 + vain))
            continue
        fault = wanted.fault(wanted.part)
        if not fault:
            return
        wanted.discard()
        if not resumed:
            break
        vain += 1  # the beginning may have been another file's: once more from the start
    raise _NextMirrorError(fault)


def _transfer(wanted: _Wanted, url: str) -> bool:
    """Ask for the file, or for what is missing of it; returns whether a part was continued."""
    start, headers = _continuation(wanted, url)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            resumed = _accept(wanted, url, start, response)
            _copy(wanted, response, resumed)
            return resumed
    except urllib.error.HTTPError as error:
        with error:
            if (
                error.code == 416 and start
            ):  # nothing after what is here: complete, or a part of something else
                if error.headers.get("Content-Range", "").strip() == f"bytes */{start}":
                    return True
                wanted.discard()
                raise _BrokenError("the part did not fit the file") from error
            if error.code in (429, 500, 502, 503, 504):
                raise _BrokenError(f"HTTP {error.code} {error.reason}") from error
            raise _NextMirrorError(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _BrokenError(str(error.reason)) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _BrokenError(str(error) or type(error).__name__) from error


def _continuation(wanted: _Wanted, url: str) -> tuple[int, dict[str, str]]:
    """Bytes that need not be asked for again, and the headers that say so.

    A part from another address is continued only if a hash will tell whether the two fit together.
    """
    start = wanted.part.stat().st_size if wanted.part.is_file() else 0
    origin: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        origin = json.loads(wanted.origin.read_text())
    same = origin.get("url") == url
    if not start or not (same or wanted.sha256):
        wanted.discard()
        return 0, {}
    headers = {"Range": f"bytes={start}-"}
    if same and origin.get("version"):
        headers["If-Range"] = origin["version"]
    return start, headers


def _accept(wanted: _Wanted, url: str, start: int, response: http.client.HTTPResponse) -> bool:
    """Judge an answer by its headers; returns whether it continues the part from byte `start`."""
    headers = response.headers
    if headers.get_content_type() == "text/html":
        raise _NextMirrorError(WEB_PAGE)
    resumed = response.status == 206
    length = int(headers["Content-Length"]) if headers.get("Content-Length", "").isdigit() else None
    total = length
    if resumed:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", "").strip())
        if not match or int(match[1]) != start:
            wanted.discard()
            raise _BrokenError("sent another range than was asked for")
        total = None if match[3] == "*" else int(match[3])
    if wanted.size is not None and total is not None and total != wanted.size:
        raise _NextMirrorError(f"offers {total:,} bytes instead of {wanted.size:,}")
    if not resumed:
        wanted.discard()
        etag = headers.get("ETag", "")
        version = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
        wanted.origin.write_text(json.dumps({"url": url, "version": version}))
    return resumed


def _copy(wanted: _Wanted, response: http.client.HTTPResponse, resumed: bool) -> None:
    """Append the body to the part; a body shorter than announced is a broken connection."""
    left = int(response.headers["Content-Length"]) if response.headers.get("Content-Length") else None
    have = wanted.part.stat().st_size if resumed else 0
    total = None if left is None else have + left
    with wanted.part.open("ab") as part, _bar() as bar:
        task = bar.add_task(printable(wanted.path.name), total=total, completed=have)
        while chunk := response.read1(CHUNK):
            if not part.tell() and chunk.lstrip().lower().startswith((b"<!doctype html", b"<html")):
                wanted.discard()
                raise _NextMirrorError(WEB_PAGE)
            part.write(chunk)
            bar.advance(task, len(chunk))
        have = part.tell()
    if total is not None and have < total:
        raise _BrokenError(f"the connection ended after {have:,} of {total:,} bytes")


def _bar() -> Progress:
    """A progress bar on stderr, where somebody can see it."""
    columns = (
        TextColumn("{task.description}", markup=False),  # a name from outside
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`; the operating system lets go of it if this process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _listed(urls: Sequence[str]) -> str:
    return ", ".join(urls) or "no address"
