"""A search over options of `beit-train`: its settings, its folder, its workers, and the table of what came out.

Training knows nothing of it: a trial is a `beit-train` process like any other (`trials`).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from beit_pretrain.checkpoint import files
from beit_pretrain.compose import compose, explicit_keys, set_by_hand
from beit_pretrain.errors import ConfigError
from beit_pretrain.folder import differences, plain
from beit_pretrain.run_files import read_json
from beit_pretrain.wording import show

LAUNCHER = ("hydra.launcher", "hydra/launcher")  # for the jobs of workers
# Overrides of the search itself, and those that would make a trial something else than a run that can go on.
OWN = ("sweep", "name", *LAUNCHER)
REFUSED = {
    "chain": "a search runs one stage: leave it out",
    "run_dir": "each trial has a folder of its own: set runs or name",
    "overwrite": "a trial goes on in its folder: take another name=, or remove the folder yourself",
    "debug": "try the first trial with beit-train debug=true",
    "dry_run": "try the first trial with beit-train dry_run=true",
}

Space = dict[str, dict[str, Any]]  # option: {low, high, log, step} or {choices}


def sweep(overrides: Sequence[str], *, workers: int, slurm: bool, in_job: bool, only_show: bool) -> None:
    """Run the trials that are not finished, or submit jobs which do, and print the table.

    `in_job`: as a worker in a Slurm job, where a trial is started with `srun`. Raises ConfigError before anything is
    started for settings that do not compose, and where the folder holds another search.
    """
    if find_spec("optuna") is None:
        raise ConfigError(
            "a search needs a package that is not installed: pip install 'beit-pretrain[sweep]'"
        )
    cfg = compose([o for o in overrides if not _of(o, LAUNCHER)])
    given = [o for o in overrides if not _of(o, OWN)]
    settings = _settings(cfg, given, overrides)
    name = settings["name"]
    folder = Path(cfg.runs) / name
    if cfg.logger.get("wandb") and cfg.logger.wandb.group is None:
        given.append(f"logger.wandb.group={name}")
    if not (folder / "sweep.json").exists():
        _compose_ends(given, settings["parameters"])
        if only_show:
            raise ConfigError(f"{folder} holds no search yet: leave --show out to start it")
    _keep(folder, settings, cfg, overrides)

    from beit_pretrain.tools.sweep_study import Search
    from beit_pretrain.tools.sweep_table import show_sweep

    search = Search(folder, settings)
    if slurm and not search.finished():
        return _submit(folder, name, overrides, workers)
    if not only_show:
        from beit_pretrain.tools.trials import Trials

        own = ["trainer=slurm"] if in_job and "trainer" not in explicit_keys(given) else []
        Trials(search, overrides=[*given, *own], at_once=workers, srun=in_job).run()
    show_sweep(search, given)


def _of(override: str, roots: Sequence[str]) -> bool:
    """Whether an override is for one of these keys or groups, or below it."""
    key = override.split("=", 1)[0].lstrip("+~")
    return any(key == root or key.startswith((f"{root}.", f"{root}/")) for root in roots)


# --- settings -----------------------------------------------------------------------------------------------


def _settings(cfg: DictConfig, given: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """The search as plain containers, with name, metric and direction in place and one level of parameters.

    Raises ConfigError with all that is wrong in it.
    """
    node = OmegaConf.to_container(cfg.sweep, resolve=True) if cfg.get("sweep") is not None else None
    if not isinstance(node, dict):
        raise ConfigError("a search needs its settings: set sweep=finetune, or another of configs/sweep")
    settings = {str(key): value for key, value in node.items()}
    keys = explicit_keys(overrides)
    settings["name"] = keys.get("name", settings["name"])
    settings["parameters"] = dict(_parameters(settings["parameters"]))
    settings["epochs"] = (cfg.stage or {}).get("epochs", 0)
    faults = [f"{key}={keys[key]}: {why}" for key, why in REFUSED.items() if key in keys]
    if cfg.stage is None or "_target_" not in cfg.stage:
        faults.append("a search runs one stage: set stage=pretrain, or another")
    if settings["name"] is None:
        faults.append("a search needs a folder: set name=")
    if not settings["parameters"]:
        faults.append("sweep.parameters is empty: name an option, {low: 1e-4, high: 1e-2, log: true} or so")
    for key, how in settings["parameters"].items():
        if (fault := _fault(how)) is not None:
            faults.append(f"sweep.parameters.{key}={_show_how(how)}: {fault}")
        elif any(explicit_keys([o]).keys() == {key} for o in given):
            faults.append(f"{key} is both given and searched: leave it out, or add '~sweep.parameters.{key}'")
    sampler = settings["sampler"]["name"]
    if sampler not in ("tpe", "random"):
        faults.append(f"sweep.sampler.name={sampler}: set tpe or random")
    if not isinstance(settings["trials"], int) or settings["trials"] < 1:
        faults.append(f"sweep.trials={settings['trials']}: set a whole number from 1")
    if settings["direction"] not in (None, "min", "max"):
        faults.append(f"sweep.direction={settings['direction']}: set min, max or null")
    pruner = settings["pruner"] or {"keep": 0.5, "warmup": 0}
    for key, least in (("keep", 1e-6), ("warmup", 0)):
        if not isinstance(pruner[key], int | float) or not least <= pruner[key] < 1:
            faults.append(f"sweep.pruner.{key}={show(pruner[key])}: set a share between 0 and 1")
    if not faults and settings["metric"] is None:
        faults += _take_monitor(settings, cfg)
    if not faults and settings["direction"] is None:
        faults.append(f"sweep.metric={settings['metric']} needs sweep.direction=min or max")
    if faults:
        raise ConfigError(faults)
    return settings


def _take_monitor(settings: dict[str, Any], cfg: DictConfig) -> list[str]:
    """Put in what the stage itself calls best; what is wrong if it has nothing of the kind."""
    from hydra.utils import get_class

    from beit_pretrain.stages.base import Stage

    kind = get_class(cfg.stage._target_)
    if not issubclass(kind, Stage):
        return [f"stage={cfg.stage.name} has no number of its own to improve: set sweep.metric"]
    settings["metric"], direction = kind.monitor
    if settings["direction"] not in (None, direction):
        return [f"sweep.direction={settings['direction']}: {kind.monitor[0]} is best at its {direction}imum"]
    settings["direction"] = direction
    return []


def _parameters(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted options and how each is drawn, from nested mappings or dotted keys."""
    for key, value in node.items():
        if isinstance(value, dict) and not value.keys() & {"low", "high", "choices"}:
            yield from _parameters(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fault(how: Any) -> str | None:
    """What is wrong with the description of one parameter."""
    if not isinstance(how, dict):
        return "write {low: 0.1, high: 0.5}, perhaps with log: true or step: 0.1, or {choices: [a, b]}"
    if "choices" in how:
        if how.keys() != {"choices"}:
            return "choices stand alone"
        return None if isinstance(how["choices"], list) and how["choices"] else "choices are a list"
    if unknown := sorted(how.keys() - {"low", "high", "log", "step"}):
        return f"{unknown[0]} is not known (low, high, log, step, choices)"
    low, high, log, step = (how.get(key) for key in ("low", "high", "log", "step"))
    numbers = [n for n in (low, high) if isinstance(n, int | float) and not isinstance(n, bool)]
    if len(numbers) < 2 or not numbers[0] < numbers[1]:
        return "set low and high, two numbers, low below high"
    if log and numbers[0] <= 0:
        return "a logarithmic range begins above 0: set a larger low, or log: false"
    if step is not None and (log or not isinstance(step, int | float) or step <= 0):
        return "a step is a number above 0, of a range without log: true"
    return None


def _show_how(how: Any) -> str:
    """The description of one parameter as one would type it."""
    return f"{{{','.join(f'{k}:{show(v)}' for k, v in how.items())}}}" if isinstance(how, dict) else show(how)


def _compose_ends(given: Sequence[str], space: Space) -> None:
    """Compose both ends of every range and all choices, so that a mistake shows before the first trial runs."""
    values = [how.get("choices") or [how["low"], how["high"]] for how in space.values()]
    for row in zip_longest(*values):
        # The shorter lists are filled up with their first value.
        drawn = zip(space, values, row, strict=True)
        compose([*given, *(f"{key}={show(own[0] if x is None else x)}" for key, own, x in drawn)])


# --- folder -------------------------------------------------------------------------------------------------


def _keep(folder: Path, settings: dict[str, Any], cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Write sweep.json, or compare with the one that is there: only the number of trials may differ."""
    now = {"search": dict(_flat(settings)), "config": {k: v for k, v in plain(cfg).items() if k != "sweep"}}
    file = folder / "sweep.json"
    if file.exists():
        before = read_json(file)
        harmless, changed = differences(before["config"], now["config"], lambda: set_by_hand(cfg, overrides))
        # Harmless for a run, but trials of other lengths do not compare.
        changed += [line for line in harmless if line.startswith("stage.epochs")]
        old, new = before["search"], now["search"]
        changed += [
            f"sweep.{key}: {old.get(key)} -> {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key not in ("trials", "epochs")
        ]
        if changed:
            raise ConfigError(
                f"{folder} holds another search ({'; '.join(changed)}): give this one another name="
            )
    elif (folder / "results.json").exists() or (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds a run, not a search: give this one another name=")
    files.write_text(file, json.dumps(now, indent=2) + "\n")


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each setting, and each parameter, as one would type it."""
    for key, value in settings.items():
        if key == "parameters":
            yield from ((f"parameters.{name}", _show_how(how)) for name, how in value.items())
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", show(each)) for name, each in value.items())
        else:
            yield key, show(value)


def _submit(folder: Path, name: str, overrides: Sequence[str], workers: int) -> None:
    """A job array of workers, each with one trial at a time."""
    from beit_pretrain.cluster.submit import job_script, sbatch
    from beit_pretrain.compose import launcher_node

    own = [o for o in overrides if not _of(o, LAUNCHER)]
    door = "from beit_pretrain.cli import tools_main; tools_main()"
    command = shlex.join([sys.executable, "-c", door, "sweep", *own, "--in-job"])
    script = job_script(
        launcher_node(overrides),
        command,
        name=name.rpartition("/")[2],
        log=str(folder / "worker-%A_%a.log"),
        array=f"0-{workers - 1}",
        tasks=False,
    )
    print(f"job {sbatch(script)}: {workers} workers, which write to {folder}/worker-*.log")
    print("the table so far: the same command with --show in place of --slurm")
