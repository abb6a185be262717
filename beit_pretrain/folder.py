"""A run's folder: who may write in it, and whether a command goes on, prints what is there, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from beit_pretrain import run_files
from beit_pretrain.checkpoint import files, record
from beit_pretrain.cluster.lock import Lock
from beit_pretrain.errors import CheckpointError, ConfigError, LockLost
from beit_pretrain.models.default_blocks import blocks_of_null
from beit_pretrain.report.folder import read_series

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
# Options that came after runs had been made: the value with which the program does what it did before.
ADDED = {
    "data.repeats": 1,
    "data.train_on_val": False,
    "init_weights": "raw",
    "model.mask_token": True,
    "stage.views.defer_jitter": False,
}


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain, resolved containers."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def _under(key: str, roots: Collection[str]) -> bool:
    return any(key == root or key.startswith(root + ".") for root in roots)


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of plain containers, lists being values; what a file holds is not resolved."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _with_blocks(flat: dict[str, Any]) -> dict[str, Any]:
    """A flat configuration with the blocks that a null of stage.blocks stands for."""
    depth = flat.get("model.depth")
    if flat.get("stage.blocks", ()) is None and isinstance(depth, int):
        flat["stage.blocks"] = blocks_of_null(depth)
    return flat


def differences(
    before: dict[str, Any], now: dict[str, Any], by_hand: Callable[[], Collection[str]] = tuple
) -> tuple[list[str], list[str]]:
    """Keys in which two configurations differ: those that may, and those that may not (`key: before -> now`).

    An option that `before` does not know may have its default, as nobody can ask for what was there before it; not a
    value that somebody has set: those keys `by_hand` is asked for.
    """
    old, new = (_with_blocks(_flat(config)) for config in (before, now))
    asked = by_hand() if new.keys() - old.keys() else ()
    harmless, harmful = [], []
    scores = now.get("mode") == "evaluate" or (now.get("stage") or {}).get("name") == "knn"
    for key in sorted(old.keys() | new.keys()):
        was, value = old.get(key, ADDED.get(key)), new.get(key)
        if was == value or _under(key, IGNORED):
            continue
        fresh = key not in old and not _under(key, [*SOURCES, *asked])
        longer = key == "stage.epochs" and (value or 0) > (was or 0)
        moved = key in SOURCES and _only_moved(was, value, scores)
        # Without a cache shards are streamed, in another order.
        moved = moved or (key == "data.source.cache" and None not in (was, value))
        line = f"{key}: {'(new option)' if fresh else was} -> {value}"
        (harmless if fresh or longer or moved or _under(key, HARMLESS) else harmful).append(line)
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
        self.lock = Lock(path / run_files.LOCK)

    @property
    def config_file(self) -> Path:
        return self.path / run_files.CONFIG

    def __enter__(self) -> RunFolder:
        self.enter(wait=True)
        return self

    def enter(self, *, wait: bool) -> None:
        """Take the folder. BeitError if another process has it; `wait` as for `Lock.acquire`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(wait=wait)
        except OSError as error:
            raise ConfigError(
                f"run_dir={self.path} cannot be written ({error.strerror}): set runs or name to another place"
            ) from error

    def __exit__(self, kind: object = None, *_: object) -> None:
        with suppress(OSError, LockLost):  # the folder may be gone, or another run's
            self.lock.check()
            if kind is not None and {item.name for item in self.path.iterdir()} <= {
                run_files.CONFIG,
                run_files.LOCK,
            }:
                # It failed before it made anything: the folder would only be in the way of the next try.
                self.config_file.unlink(missing_ok=True)
        self.lock.release()
        if kind is not None:
            with suppress(OSError):  # not empty
                self.path.rmdir()

    # --- going on --------------------------------------------------------------------------------------------

    def clear(self, *, debug: bool, needed: Iterable[str | None] = ()) -> None:
        """Throw away what an earlier run left (overwrite=true, or a `debug` run's own remains).

        `needed` are the paths that the new run starts from.
        """
        inside = [path for path in filter(None, needed) if _inside(path, self.path)]
        if inside:
            raise ConfigError(
                f"{self.path} holds {inside[0]}, which this run starts from and which would be thrown away: give it "
                "another name="
            )
        if debug and self._holds_results() and not self._config().get("debug"):
            raise ConfigError(
                f"{self.path} holds a run that was not made with debug=true: give this one another name=, or "
                "overwrite=true to throw the old one away"
            )
        run_files.clear(self.path)

    def compare(self, config: dict[str, Any], by_hand: Callable[[], Collection[str]] = tuple) -> list[str]:
        """Harmless differences to the run that lies here (none if it is new); harmful ones are refused.

        `by_hand` as for `differences`.
        """
        if several := run_files.holds_several(self.path):
            raise ConfigError(f"{self.path} holds {several}, not a run: give this run another name=")
        if not self.config_file.exists() or not self._holds_results():
            return []
        harmless, harmful = differences(self._config(), config, by_hand)
        if harmful:
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({'; '.join(harmful)}): "
                "give this one another name=, or overwrite=true to throw the old one away"
            )
        return harmless

    def _config(self) -> dict[str, Any]:
        return run_files.read_config(self.config_file)[1]

    def _holds_results(self) -> bool:
        """Whether there is anything to go on from: a start that failed at once leaves its configuration only."""
        return any((self.path / "checkpoints").glob("*.ckpt")) or (self.path / run_files.RESULTS).exists()

    def from_the_start(self) -> None:
        """Before a run without a checkpoint begins. ConfigError if it had one, which would start it anew in silence."""
        metrics = read_series(self.path / "metrics.csv")
        epochs = metrics.get("epoch")
        steps, epoch = (0, 0.0) if epochs is None else (int(epochs.step[-1]), epochs.last)
        # Each epoch ends with a checkpoint, and the link stays when somebody removes the file.
        if (self.path / "checkpoints" / "last.ckpt").is_symlink() or epoch > 1:
            raise ConfigError(
                f"{self.path} was trained for {steps} steps or more, but its checkpoints are gone: put them back, or "
                "start anew with overwrite=true or another name="
            )
        if steps:
            print(f"{self.path}: no checkpoint after {steps} steps; the run begins anew", flush=True)

    def write_config(self, config: dict[str, Any]) -> None:
        files.write_text(self.config_file, yaml.safe_dump(config, sort_keys=False))

    def reopen(self) -> None:
        """Let a finished run go on; on other ranks too, which look for its results."""
        (self.path / run_files.RESULTS).unlink()

    def finished(self) -> dict[str, Any] | None:
        """results.json of a finished run."""
        results = run_files.read_json(self.path / run_files.RESULTS)
        return results if results.get("status") == "finished" else None

    def lacks_report(self) -> bool:
        """Whether a kill or a full disk left a finished run without its whole report."""
        report = self.path / run_files.REPORT
        return not report.exists() or any(self.path.glob(f".{report.name}.*"))


def _inside(path: str, folder: Path) -> bool:
    """Whether a file or folder lies in a folder; False for addresses and what is not there."""
    return Path(path).expanduser().exists() and Path(path).expanduser().resolve().is_relative_to(
        folder.resolve()
    )
