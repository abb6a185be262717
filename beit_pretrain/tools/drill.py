"""A fire drill: a run that is interrupted on purpose must be the run that was left alone.

Both are the user's own configuration, cut short after some updates. What they held and where they got is compared by
`drill_checks`.
"""

from __future__ import annotations

import json
import math
import random
import shlex
import shutil
import signal as signals
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beit_pretrain.cluster import events
from beit_pretrain.cluster.submit import job_script
from beit_pretrain.compose import LAUNCHER, compose, explicit_keys, launcher_node
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.tools.drill_checks import Finding, checkpoint, compare, rehearsed, wandb_id
from beit_pretrain.tools.drill_runs import Job, Process, Run
from beit_pretrain.wording import show

MARK = "drill.json"  # in a folder that a drill may clear
# Overrides with which a rehearsal would not be a run that can go on.
REFUSED = ("chain", "run_dir", "overwrite", "debug", "dry_run", "mode")


class Settings(NamedTuple):
    steps: int
    signal: str
    grace: float
    seed: int
    timeout: float  # minutes


class Times(NamedTuple):
    """When the signal came and what it took, in seconds after it."""

    step: int
    saved: float
    ended: float
    wandb_id: str | None


def drill(
    overrides: Sequence[str],
    *,
    steps: int,
    signal: str | None,
    slurm: bool,
    seed: int,
    out: Path | None,
    timeout: float,
) -> int:
    """Run both, print the table, and return the exit code: 0 if every check holds, 1 if not, 130 after Ctrl-C.

    Raises BeitError for a configuration that does not train, a run that ends early and a job that does not come back.
    """
    own = [o for o in overrides if not o.lstrip("+~").startswith((f"{LAUNCHER}=", "hydra.launcher."))]
    if slurm and "trainer" not in explicit_keys(own):
        own.append("trainer=slurm")
    cfg = compose(own)
    signal = _check(cfg, own, signal, slurm)
    settings = Settings(steps, signal, cfg.trainer.signal_grace, seed, timeout)
    out = Path(cfg.runs) / f"{cfg.name}-drill" if out is None else out
    alone, broken = _runs(own, out, steps, launcher_node(overrides) if slurm else None)
    _clear(out, [alone, broken], overrides, seed)
    try:
        with _ends_like_ctrl_c(), ExitStack() as stack:
            for run in (alone, broken):
                stack.callback(run.end)
            times = _rehearse(alone, broken, settings)
    except KeyboardInterrupt:
        print("the drill was stopped, and with it what it had started", file=sys.stderr)
        return 130
    findings = compare(
        alone.folder, broken.folder, signal=signal, job=broken.job, wandb_before=times.wandb_id
    )
    findings.append(_in_time(times, settings))
    _show(findings, times, settings, out)
    return 0 if all(finding.good for finding in findings) else 1


def _check(cfg: DictConfig, own: Sequence[str], signal: str | None, slurm: bool) -> str:
    """The signal to send. ConfigError for what cannot be rehearsed."""
    keys = explicit_keys(own)
    faults = [
        f"{key}={keys[key]}: a drill has two runs of its own: leave it out" for key in REFUSED if key in keys
    ]
    listens = list(cfg.trainer.signals)
    if cfg.stage is None or cfg.stage.name == "knn":
        faults.append("a drill interrupts a training: set stage=pretrain, or another that trains")
    if not any(node and str(node._target_).endswith(".CsvLog") for node in cfg.logger.values()):
        faults.append("a drill compares metrics.csv: set logger=csv")
    if signal not in (None, *listens) or not listens:
        given = "" if signal is None else f"--signal={signal}, but "
        faults.append(
            f"{given}trainer.signals={show(listens)} is what the run listens to: put the signal into it"
        )
    if slurm and cfg.trainer.requeue is not True:
        faults.append(
            f"trainer.requeue={show(cfg.trainer.requeue)}: the job would not come back; leave it out"
        )
    if faults:
        raise ConfigError(faults)
    return signal or str(listens[0])


def _runs(own: Sequence[str], out: Path, steps: int, node: DictConfig | None) -> list[Run]:
    """The run that is left alone and the one that is interrupted; jobs with a launcher node."""
    runs: list[Run] = []
    for name in ("alone", "interrupted"):
        command = [
            sys.executable,
            "-m",
            "beit_pretrain",
            *own,
            f"runs={out.parent}",
            f"name={out.name}/{name}",
        ]
        command += [
            "stage.log_every=1",
            "+callbacks.rehearsal._target_=beit_pretrain.callbacks.rehearsal.Rehearsal",
            "+callbacks.rehearsal.run_dir=${run_dir}",
            f"+callbacks.rehearsal.steps={steps}",
        ]
        folder, log = out / name, out / f"{name}.log"
        if node is None:
            # Not the job of an interactive shell, which a run in it would put back into the queue.
            runs.append(Process([*command, "trainer.requeue=false"], folder=folder, log=log))
        else:
            script = job_script(node, shlex.join(command), name=f"{out.name}-{name}", log=str(log))
            runs.append(Job(script, folder=folder, log=log))
    return runs


def _clear(out: Path, runs: Sequence[Run], overrides: Sequence[str], seed: int) -> None:
    """Throw away what an earlier drill has left, and nothing else."""
    mark = out / MARK
    if out.exists() and not mark.is_file():
        raise BeitError(f"{out} is there and no drill has made it: give another folder with --out")
    for run in runs:
        if run.folder.exists():
            shutil.rmtree(run.folder)
        run.log.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"overrides": list(overrides), "seed": seed}) + "\n")


@contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """A lost connection or a `kill` leaves no jobs behind either."""
    numbers = (signals.SIGTERM, signals.SIGHUP)
    before = {number: signals.signal(number, signals.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signals.signal(number, handler)


# --- the two runs -------------------------------------------------------------------------------------------


def _rehearse(alone: Run, broken: Run, settings: Settings) -> Times:
    _start(alone, "left alone")
    if isinstance(alone, Process):
        _finish(alone)  # jobs wait in the queue side by side, processes would be in each other's way
    _start(broken, "to be interrupted")
    times = _interrupt(broken, settings)
    for run in (broken, alone):
        _finish(run)
    return times


def _start(run: Run, what: str) -> None:
    run.start()
    _tell(f"{run.title()}: {what}, its log is {run.log}")


def _finish(run: Run) -> None:
    run.until(lambda: _done(run))
    run.wait()


def _interrupt(run: Run, settings: Settings) -> Times:
    """Send the signal in a random step, and see to it that the run is taken up again."""
    run.until(lambda: _begun(run) is not None)
    steps = rehearsed(run.folder)["steps"]
    at = random.Random(settings.seed).randint(math.ceil(steps / 4), min(3 * steps // 4, steps - 2))
    run.until(lambda: (_begun(run) or 0) >= at)
    step, sent = _begun(run) or at, time.monotonic()
    run.send(settings.signal)
    run.until(lambda: _happened(run, "signal") or _done(run))
    saved = time.monotonic() - sent
    if not _happened(run, "signal"):
        raise BeitError(
            f"{run.title()}: its {steps} steps were over before SIG{settings.signal}, sent in step {step}, reached it: "
            "set --steps to more"
        )
    before = wandb_id(run.folder)
    if isinstance(run, Process):
        run.wait(128 + getattr(signals, f"SIG{settings.signal}"))
        ended = time.monotonic() - sent
        _tell(f"SIG{settings.signal} in step {step}; there is no queue here: the same command starts again")
        run.start()
    else:
        run.until(lambda: _happened(run, "requeue"))
        ended = time.monotonic() - sent
        _tell(f"SIG{settings.signal} in step {step}; {run.title()} is back in the queue")
    run.until(
        lambda: _happened(run, "start") == 2,
        minutes=settings.timeout,
        late=lambda: (
            f"{run.title()} did not start again within --timeout={settings.timeout:g} minutes of the signal"
        ),
    )
    return Times(step, saved, ended, before)


def _begun(run: Run) -> int | None:
    """The step that rank 0 is in; None before the first."""
    path = run.folder / "order-0.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return json.loads(whole.rpartition("\n")[2])[0] if whole else None


def _happened(run: Run, event: str) -> int:
    return sum(row["event"] == event for row in events.read(run.folder))


def _done(run: Run) -> bool:
    facts = run.folder / "rehearsal.json"
    return facts.exists() and checkpoint(run.folder, rehearsed(run.folder)["steps"]).exists()


# --- what came out ------------------------------------------------------------------------------------------


def _in_time(times: Times, settings: Settings) -> Finding:
    found = f"checkpoint after {times.saved:.1f} s, end after {times.ended:.1f} s of the {settings.grace:g} s"
    return Finding("in time", f"{found} of trainer.signal_grace", times.ended <= settings.grace)


def _show(findings: Sequence[Finding], times: Times, settings: Settings, out: Path) -> None:
    title = f"fire drill: SIG{settings.signal} in step {times.step}"
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for check, found, good in findings:
        table.add_row(Text(check), Text(found), Text("ok" if good else "NOT"))
    console = Console()
    console.print(table)
    if times.ended > settings.grace / 2:
        _tell(
            f"warning: the end took more than half of trainer.signal_grace={settings.grace:g}: set it higher, and "
            "hydra.launcher.signal_delay_s above it"
        )
    _tell(f"both runs: {out}")


def _tell(text: str) -> None:
    print(text, flush=True)
