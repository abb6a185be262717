"""A run's folder: who may write in it, and whether a command goes on, prints what is there, or is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from beit_pretrain.checkpoint import files, record
from beit_pretrain.compose import flat_keys
from beit_pretrain.errors import BeitError, CheckpointError, ConfigError

HEARTBEAT = 15.0  # seconds between touches of the lock
STALE = 120.0  # seconds without one after which another machine's lock is taken over

# May differ when a run goes on: where and how it runs, and what is watched; nothing that changes the weights.
HARMLESS = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.allocation",
    "trainer.strategy",
    "trainer.signals",
    "trainer.signal_grace",
    "trainer.requeue",
    "trainer.max_requeues",
    "trainer.compile",
    "stage.compile",
    "micro_batch_size",
    "data.workers",
    "data.timeout",
    "data.source.timeout",
    "data.source.cache_gb",
    "data.check_label_maps",
    "stage.predict.windows",
    "logger",
    "callbacks",
    "checkpoint",
    "stage.log_every",
    "stage.max_bad_steps",
    "stage.cache",
    "stage.cache_gb",
    "model.checkpointing",
    "tokenizer.cache",
    "tokenizer.weights",
    "tokenizer.offline",
)
# Where weights come from: harmless if only the place is another.
SOURCES = ("tokenizer.checkpoint", "init_from")
# Not part of a run at all.
IGNORED = (
    "name",
    "runs",
    "run_dir",
    "stage.run_dir",
    "overwrite",
    "debug",
    "dry_run",
    "resume_step",
    "chain",
    "experiment",
)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain, resolved containers."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def _under(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(root + ".") for root in roots)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    cfg = OmegaConf.create(config)
    return {k: v for k in flat_keys(cfg) if not isinstance(v := OmegaConf.select(cfg, k), DictConfig)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Keys in which two configurations differ: those that may, and those that may not (`key: before -> now`)."""
    old, new = _flat(before), _flat(now)
    harmless, harmful = [], []
    scores = now.get("mode") == "evaluate" or (now.get("stage") or {}).get("name") == "knn"
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key) or _under(key, IGNORED):
            continue
        line = f"{key}: {old.get(key)} -> {new.get(key)}"
        longer = key == "stage.epochs" and (new.get(key) or 0) > (old.get(key) or 0)
        moved = key in SOURCES and _only_moved(old.get(key), new.get(key), scores)
        # Without a cache shards are streamed, in another order.
        moved = moved or (key == "data.source.cache" and None not in (old.get(key), new.get(key)))
        (harmless if longer or moved or _under(key, HARMLESS) else harmful).append(line)
    return harmless, harmful


def _only_moved(before: str | None, now: str | None, scores: bool) -> bool:
    """Whether two paths hold the same weights, as far as they are still there.

    A training run that goes on has its weights from its own checkpoint, and compares a tokenizer's with what that
    remembers, so the old file may be gone; a score is one of the file it names.
    """
    if before is None or now is None:
        return False
    try:
        old, _ = record.file_of(before, key="init_from")
    except CheckpointError:
        return not scores
    try:
        return files.sha256(old) == files.sha256(record.file_of(now, key="init_from")[0])
    except CheckpointError:
        return False


class RunFolder:
    """`runs/<name>`, held by one process at a time (a context manager)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = threading.Event()
        self._mine = ""

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise ConfigError(
                f"run_dir={self.path} cannot be written ({error.strerror}): set runs or name to another place"
            ) from error
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: object = None, *_: object) -> None:
        self._stop.set()
        with suppress(FileNotFoundError):  # the folder itself is gone
            if kind is not None and {item.name for item in self.path.iterdir()} <= {"config.yaml", ".lock"}:
                # It failed before it made anything: the folder would only be in the way of the next try.
                self.config_file.unlink(missing_ok=True)
        # Not the lock of one that took a stalled run's folder over.
        with suppress(FileNotFoundError):
            if self.lock_file.read_text() == self._mine:
                self.lock_file.unlink()
        if kind is not None:
            with suppress(OSError):  # not empty
                self.path.rmdir()

    def _take_lock(self) -> None:
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._mine = json.dumps(me)
        for _ in range(2):
            try:
                descriptor = os.open(self.lock_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if (holder := self._holder()) is not None:
                    raise BeitError(
                        f"{self.path} is being written by process {holder['pid']} on {holder['host']}; "
                        f"wait for it, or give this run another name="
                    ) from None
                self._remove_stale()
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(self._mine)
            return
        raise BeitError(f"{self.path}: another process took the folder at the same moment; try again")

    def _remove_stale(self) -> None:
        """Remove the lock of a writer that is gone, unless another process has just done so and locked anew."""
        with suppress(FileNotFoundError), self.lock_file.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if self.lock_file.stat().st_ino == os.fstat(file.fileno()).st_ino and self._holder() is None:
                self.lock_file.unlink()

    def _holder(self) -> dict[str, Any] | None:
        """Who holds the lock, or None if whoever made it is gone."""
        try:
            text = self.lock_file.read_text()
            age = time.time() - self.lock_file.stat().st_mtime
        except FileNotFoundError:
            return None
        try:
            holder = json.loads(text)
        except json.JSONDecodeError:
            # Between its creation and its first line, or from a process killed just then.
            return {"host": "?", "pid": "?"} if age < STALE else None
        if holder["host"] == socket.gethostname():
            return holder if _started(holder["pid"]) == holder["started"] is not None else None
        return holder if age < STALE else None

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(FileNotFoundError):
                os.utime(self.lock_file)

    # --- going on --------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Throw away what an earlier run left (overwrite=true)."""
        for item in self.path.iterdir():
            if item != self.lock_file:
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()

    def compare(self, config: dict[str, Any]) -> list[str]:
        """Harmless differences to the run that lies here (none if it is new); harmful ones are refused."""
        if not self.config_file.exists() or not self._holds_results():
            return []
        before = yaml.safe_load(self.config_file.read_text())
        harmless, harmful = differences(before, config)
        if harmful:
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({'; '.join(harmful)}): "
                "give this one another name=, or overwrite=true to throw the old one away"
            )
        return harmless

    def _holds_results(self) -> bool:
        """Whether there is anything to go on from: a start that failed at once leaves its configuration only."""
        return any((self.path / "checkpoints").glob("*.ckpt")) or (self.path / "results.json").exists()

    def write_config(self, config: dict[str, Any]) -> None:
        files.write_text(self.config_file, yaml.safe_dump(config, sort_keys=False))

    def reopen(self) -> None:
        """Let a finished run go on; on other ranks too, which look for its results."""
        (self.path / "results.json").unlink()

    def finished(self) -> dict[str, Any] | None:
        """results.json of a finished run."""
        path = self.path / "results.json"
        if not path.exists():
            return None
        results = json.loads(path.read_text())
        return results if results.get("status") == "finished" else None


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: tells a process from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"  # a system without /proc
