"""The bytes of a remote file as they come, and never a wait without end for the next.

webdataset's openers read `http(s)://` (by curl), `hf://`, `sftp://`, `pipe:COMMAND` and the like, fsspec everything
else (`s3://`, `gs://`).
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

import fsspec
from webdataset.gopen import Pipe, gopen, gopen_schemes

from beit_pretrain.errors import ConfigError

_CHUNK = 1 << 20  # bytes
# But gs://, which is gcsfs' here: gsutil is rarely installed.
_BY_WEBDATASET = {"", "file", *gopen_schemes} - {"__default__", "gs"}
_NOT_FOUND = {22, 78}  # curl: an answer of 400 or above (it has repeated what may pass); no such file (sftp)


class BrokenError(Exception):
    """A transfer that broke off or stood still; another attempt may succeed."""


class MissingError(Exception):
    """Nothing is to be had at this address, however often it is asked."""


def pieces(url: str, timeout: float) -> Generator[bytes]:
    """The bytes of a URL, each piece within `timeout` seconds of being asked for.

    To be closed where it is not read to its end. BrokenError, MissingError; ConfigError where a package is missing.
    """
    opener = _webdataset if urlparse(url).scheme in _BY_WEBDATASET else _fsspec
    with opener(url) as (descriptor, finish):
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        while ready.poll(1000 * timeout):
            piece = os.read(descriptor, _CHUNK)
            if not piece:
                return finish(timeout)
            yield piece
    raise BrokenError(f"no byte for {timeout:g} s")


# What is read from, and what says at its end whether that was all.
_Flow = tuple[int, Callable[[float], None]]


@contextmanager
def _webdataset(url: str) -> Iterator[_Flow]:
    try:
        opened: Any = gopen(url)
    except OSError as error:
        if urlparse(url).scheme in ("", "file"):
            raise MissingError(str(error.strerror).lower()) from error
        raise ConfigError(f"{url} is read by {error.filename}, which is not there; install it") from error
    except ImportError as error:
        raise ConfigError(f"{url} needs a package that is not there; pip install {error.name}") from error
    if not isinstance(opened, Pipe):  # a file
        with opened:
            yield opened.fileno(), lambda timeout: None
        return
    process: subprocess.Popen[bytes] = opened.proc

    def finish(timeout: float) -> None:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BrokenError("its command does not end") from None
        if code:
            missing = code in _NOT_FOUND and not url.startswith("pipe:")
            raise (MissingError if missing else BrokenError)(f"its command ended with code {code}")

    try:
        yield opened.stream.fileno(), finish
    finally:
        process.kill()
        process.wait()
        opened.stream.close()


@contextmanager
def _fsspec(url: str) -> Iterator[_Flow]:
    """By a thread that fills a pipe: a library's read can be waited for, but not ended."""
    reading, writing = os.pipe()
    errors: list[Exception] = []

    def pump() -> None:
        try:
            with open(writing, "wb") as sink, fsspec.open(url, "rb") as source:
                while piece := source.read(_CHUNK):  # pyright: ignore[reportAttributeAccessIssue] it is no list
                    sink.write(piece)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=pump, name=f"reader of {url}", daemon=True)

    def finish(timeout: float) -> None:
        thread.join(timeout)  # the pipe ends before the thread
        for error in errors:
            if isinstance(error, FileNotFoundError):
                raise MissingError("no such file") from error
            if isinstance(error, ImportError):
                raise ConfigError(
                    f"{url} needs a package that is not there ({error}); for s3:// pip install 'beit-pretrain[remote]'"
                ) from error
            raise BrokenError(f"{type(error).__name__}: {error}") from error

    thread.start()
    try:
        yield reading, finish
    finally:
        os.close(reading)
