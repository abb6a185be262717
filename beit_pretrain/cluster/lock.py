"""One process at a time may write into a folder: a lock file that also holds between machines.

No two machines' clocks are compared. Whoever finds another machine's lock watches for some heartbeats whether it is
touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from beit_pretrain.errors import BeitError, LockLost
from beit_pretrain.wording import printable

HEARTBEAT = 15.0  # seconds between touches of a lock
WATCH = 60.0  # seconds without one, as seen by this machine, after which another machine's lock is taken over
LOOK = 1.0  # seconds between two looks at a lock that is watched
SHORT = 0.05  # seconds until the next try where a lock is neither to be made nor to be seen


class _State(NamedTuple):
    """A lock file at one moment."""

    inode: int
    touched: int  # by the file system's clock; only compared with itself
    text: str


class Lock:
    """The lock in one file. It is watched over several attempts: the object remembers what it has seen."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lost = False  # noticed by the heartbeat; `check` looks for itself
        self._mine = ""  # what the file holds while this process has the lock
        self._seen: tuple[_State, float] | None = (
            None  # another machine's lock, and since when it is like that
        )
        self._stop = threading.Event()

    def acquire(self, *, wait: bool = True) -> None:
        """Take the lock. BeitError if another process has it.

        Of another machine's lock this is known after at most `WATCH` seconds; without `wait` the lock counts as held
        until then, and later attempts go on watching.
        """
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid())}
        text, told = json.dumps(me), False
        while not self._create(text):
            if (state := self._look()) is None:
                if self.file.is_symlink():
                    raise BeitError(f"{self.file} is a link to nothing: remove it")
                time.sleep(SHORT)  # it was removed just now, which some file systems show late
                continue
            holder = _holder(state.text)
            if holder is not None and holder["host"] == me["host"]:
                alive = started(holder["pid"]) == holder["started"]
            else:
                alive = self._alive(state)
            if alive is False:
                self._remove(state)
            elif alive or not wait:
                raise BeitError(self._held_by(holder))
            else:
                if not told:
                    who = self._who(holder)
                    line = f"{self.file}: watching for up to {WATCH:g} s whether {who} is still alive"
                    print(printable(line), file=sys.stderr)
                told = True
                time.sleep(LOOK)
        self._mine, self.lost, self._seen = text, False, None
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=[self._stop], daemon=True, name="lock").start()

    def check(self) -> None:
        """Before this process writes: LockLost if it had the lock and has it no longer. Nothing if it never had it."""
        if not self._mine:
            return
        try:
            text = self.file.read_text(errors="replace")
        except FileNotFoundError:
            text = ""
        except OSError as error:
            raise LockLost(
                f"{self.file} cannot be read ({error.strerror}), so this run ends without writing more: the same "
                "command goes on"
            ) from error
        if text != self._mine:
            self.lost = True
            if not self.file.parent.exists():
                raise LockLost(
                    f"{self.file.parent} was removed while this run wrote into it: the run ends here"
                )
            now = self._who(_holder(text)) + " has taken the folder over" if text else "it was removed"
            raise LockLost(
                f"{self.file} is no longer this run's: {now}. This run ends without writing more; its machine or its "
                "storage stood still for a while, or somebody removed the file"
            )

    def release(self) -> None:
        """Give the lock back; that of a process which took a stalled run's folder over stays."""
        self._stop.set()
        mine, self._mine = self._mine, ""
        with suppress(OSError):  # the file may be gone, or its file system out of reach
            if mine and self.file.read_text(errors="replace") == mine:
                self.file.unlink()

    def _create(self, text: str) -> bool:
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
        except OSError:  # a full disk: an empty lock would be watched by the next start
            self.file.unlink(missing_ok=True)
            raise
        return True

    def _look(self) -> _State | None:
        # Opened, not only asked for its time: an NFS client may answer that from memory for a minute.
        try:
            with self.file.open(errors="replace") as file:
                status = os.fstat(file.fileno())
                return _State(status.st_ino, status.st_mtime_ns, file.read())
        except FileNotFoundError:
            return None

    def _alive(self, state: _State) -> bool | None:
        """Whether the lock is touched, or None if that isn't known yet."""
        now = time.monotonic()
        before, since = self._seen or (state, now)
        self._seen = (state, since if before == state else now)
        if before != state:
            return True
        return False if now - since >= WATCH else None

    def _remove(self, dead: _State) -> None:
        """Remove the lock of a writer that is gone, unless another process has just done so and locked anew."""
        with suppress(FileNotFoundError), self.file.open("r+") as file:
            with suppress(OSError):  # a file system without such locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if self._look() == dead:
                self.file.unlink()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT) and not self.lost:
            with suppress(LockLost, OSError):  # a file system that is out of reach may come back
                self.check()
                os.utime(self.file)

    def _who(self, holder: dict[str, Any] | None) -> str:
        return f"process {holder['pid']} on {holder['host']}" if holder else "an unknown process"

    def _held_by(self, holder: dict[str, Any] | None) -> str:
        return (
            f"{self.file.parent} is being written by {self._who(holder)}; wait for it, or give this run another "
            f"name= (if you know that it does not run any more, remove {self.file})"
        )


def _holder(text: str) -> dict[str, Any] | None:
    """Who wrote a lock, or None if it is not whole: its writer was killed just then, or is about to finish it."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {"host": str, "pid": int, "started": str}
    known = isinstance(holder, dict) and all(isinstance(holder.get(key), kind) for key, kind in kinds.items())
    return holder if known else None


def started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: tells a process from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return "unknown"  # a system without /proc
