"""Several stages in a row: each link is a `beit-train` process or a job, whose folder the next ones start from."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from beit_pretrain.checkpoint import files
from beit_pretrain.cluster.launch import launched
from beit_pretrain.cluster.signals import Interrupted
from beit_pretrain.cluster.submit import active, job_script, sbatch
from beit_pretrain.compose import (
    LAUNCHER,
    SEARCHPATH,
    compose,
    config_dir,
    explicit_keys,
    flat_keys,
    launcher_node,
)
from beit_pretrain.devices import job_faults
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.report import make_chain_report
from beit_pretrain.run_files import RESULTS, holds_run, holds_several, read_json

STARTS = ("tokenizer.checkpoint", "init_from")  # options by which a link starts from another
RESOURCES = "chain.resources."  # chain.resources.LINK.key=value: of one link's job
REPORT = "report"  # the job after all links
TOLD = 5.0  # seconds after Ctrl-C in which a link has heard it from the terminal
# It reads folders and writes a page.
SMALL_JOB = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": "null", "cpus_per_task": 1, "timeout_min": 10}


class LinkFailed(BeitError):
    """A link of a chain ended with an error, which it has printed itself."""


def run_chain(overrides: Sequence[str]) -> None:
    """Run the links of `chain=...` that are not finished, or hand them in as jobs, then write the chain's report.

    Overrides without a prefix go to every link that knows the key; `links.NAME.key=value` to one.
    """
    for_jobs = [o for o in overrides if _of_the_jobs(o)]
    overrides = [o for o in overrides if not _of_the_jobs(o)]
    general, by_link = split_overrides(overrides)
    cfg = compose([o for o in overrides if _of_the_chain(o) or _key(o) == SEARCHPATH])
    if missing := [key for key in cfg.chain if OmegaConf.is_missing(cfg.chain, key)]:
        raise ConfigError([f"chain.{key} is not given: set chain.{key}=..." for key in missing])
    submit = cfg.chain.get("submit")
    if submit not in (None, "slurm"):
        raise ConfigError(f"chain.submit={submit}: set chain.submit=slurm, or null to run the links here")
    if for_jobs and submit is None:
        raise ConfigError(f"{for_jobs[0]} is for jobs: set chain.submit=slurm too, or leave it out")
    folder = Path(cfg.runs) / cfg.name
    if holds_run(folder) and not holds_several(folder):
        raise ConfigError(f"{folder} holds a run, not a chain: give this chain another name=")
    links = link_overrides(cfg, general, by_link, folder)
    for arguments in links.values():
        compose(_without_checkpoints(arguments))  # a mistake in the last link shows before the first one runs
    dry = any(o.partition("=")[::2] == ("dry_run", "true") for o in general)
    if not dry and not launched().rank:
        chain = {"name": cfg.name, "links": list(links)}
        files.write_text(folder / "chain.json", json.dumps(chain, indent=2) + "\n")
    if submit is not None:
        search = [o for o in general if _key(o) == SEARCHPATH]
        _submit(cfg.name, links, [*search, *for_jobs], folder, dry=dry)
        return
    for number, (name, arguments) in enumerate(links.items(), 1):
        print(f"\n[{number}/{len(links)}] {name}: beit-train {' '.join(arguments)}", flush=True)
        if dry and (missing := _missing(arguments)):
            print(f"starts from {missing}, which is not there yet", flush=True)
            continue
        if code := run_link(arguments):
            raise LinkFailed(f"link {name} ended with exit code {code}; the same command goes on from there")
    if not dry and not launched().rank:
        _show(folder)


def run_link(arguments: Sequence[str]) -> int:
    """The exit code of a `beit-train` process; signals are for it, and it is waited for."""
    process = subprocess.Popen([sys.executable, "-m", "beit_pretrain", *arguments])
    try:
        return process.wait()
    except Interrupted as interrupted:
        process.send_signal(interrupted.number)  # it writes a checkpoint, and says how it goes on
        raise SystemExit(process.wait()) from None
    except KeyboardInterrupt:
        try:
            process.wait(TOLD)  # the terminal has told it too
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # or it was this process alone
            process.wait()
        raise


def report_chain(folder: Path) -> Path:
    """Write `report.html` of a chain, and `results.json` if all its links are finished; returns the page's path."""
    name, links = _chain(folder)
    results = {link: found for link in links if (found := _results(folder / link))}
    if len(results) == len(links):
        files.write_text(
            folder / "results.json",
            json.dumps(
                {
                    "name": name,
                    "status": "finished",
                    "seconds": sum(r["seconds"] for r in results.values()),
                    "links": {link: r["metrics"] for link, r in results.items()},
                },
                indent=2,
            )
            + "\n",
        )
    return make_chain_report(folder, [(link, folder / link) for link in links])


def _chain(folder: Path) -> tuple[str, list[str]]:
    """Name and links of the chain in a folder."""
    path = folder / "chain.json"
    chain = read_json(path)
    if not isinstance(chain.get("links"), list) or "name" not in chain:
        raise BeitError(
            f"{path} names no links of a chain: give the chain's command again, which writes it anew"
        )
    return chain["name"], chain["links"]


def _show(folder: Path) -> None:
    """The report, and its table on the terminal; all links are finished."""
    from beit_pretrain.summary import show_chain

    report = report_chain(folder)
    show_chain({link: _results(folder / link) or {} for link in _chain(folder)[1]}, report)


def _results(run: Path) -> dict[str, Any] | None:
    """What a run ended with; None if it has not."""
    results = read_json(run / RESULTS)
    return results if results.get("status") == "finished" else None


# --- as jobs ------------------------------------------------------------------------------------------------


def _submit(
    chain: str, links: Mapping[str, list[str]], for_jobs: Sequence[str], folder: Path, *, dry: bool
) -> None:
    """A job for each link that is not finished, waiting or running; each waits for the links it starts from.

    `jobs.json` remembers the jobs and what they run. One more job writes the report.
    """
    links = {name: _for_a_job(arguments) for name, arguments in links.items()}
    scripts = _scripts(chain, links, for_jobs, folder)
    if dry:
        for name, script in scripts.items():
            after = list(links) if name == REPORT else _sources(name, links, folder)
            print(f"\n# {name}: after {', '.join(after) or 'nothing'}\n{script}")
        return
    file = folder / "jobs.json"
    known = {"links": {}, REPORT: None, **read_json(file)}
    jobs: dict[str, dict[str, Any]] = known["links"]
    waiting = active([str(known[REPORT]), *(entry["job"] for entry in jobs.values())])
    same = {name for name in links if name in jobs and jobs[name]["overrides"] == links[name]}
    if changed := [name for name in links if name not in same and jobs.get(name, {}).get("job") in waiting]:
        job = jobs[changed[0]]["job"]
        raise ConfigError(
            f"link {changed[0]} is job {job}, with other options: end it first (scancel {job}), "
            "or give the same ones again"
        )
    done = {name for name in same if _results(folder / name)}
    fresh: set[str] = set()
    for number, (name, arguments) in enumerate(links.items(), 1):
        sources = _sources(name, links, folder)
        if name in done:
            state = "finished"
        elif jobs.get(name, {}).get("job") in waiting and not fresh & set(sources):
            state = f"job {jobs[name]['job']}, as before"
        else:
            after = [jobs[source]["job"] for source in sources if source not in done]
            jobs[name] = {"job": sbatch(scripts[name], after=after), "overrides": arguments}
            fresh.add(name)
            files.write_text(file, json.dumps(known, indent=2) + "\n")
            state = f"job {jobs[name]['job']}" + (f" after {', '.join(after)}" if after else "")
        print(f"[{number}/{len(links)}] {name}: {state}", flush=True)
    if len(done) == len(links):
        _show(folder)
        return
    if fresh or known[REPORT] not in waiting:
        known[REPORT] = sbatch(
            scripts[REPORT], after=[jobs[name]["job"] for name in links if name not in done]
        )
        files.write_text(file, json.dumps(known, indent=2) + "\n")
    print(f"job {known[REPORT]} writes {folder}/report.html after them; logs: {folder}/*.log")
    print("what failed is handed in again by the same command")


def _scripts(
    chain: str, links: Mapping[str, list[str]], for_jobs: Sequence[str], folder: Path
) -> dict[str, str]:
    """The sbatch script of each link and of the report, all made before the first is handed in."""
    general = [o for o in for_jobs if not _key(o).startswith(RESOURCES)]
    small = [f"hydra.launcher.{key}={value}" for key, value in SMALL_JOB.items()]
    own: dict[str, list[str]] = {**{name: [] for name in links}, REPORT: small}
    for override in for_jobs:
        if _key(override).startswith(RESOURCES):
            name, _, rest = override.split(RESOURCES, 1)[1].partition(".")
            if name not in own or not rest:
                raise ConfigError(
                    f"{override}: write {RESOURCES}LINK.key=value with one of the links {', '.join(own)}"
                )
            own[name].append(f"hydra.launcher.{rest}")
    nodes = {name: launcher_node([*general, *own[name]]) for name in own}
    for name, arguments in links.items():
        if faults := job_faults(compose(_without_checkpoints(arguments)), nodes[name]):
            raise ConfigError([f"link {name}: {fault}" for fault in faults])
    door = "from beit_pretrain.cli import tools_main; tools_main()"
    commands = {
        name: [sys.executable, "-m", "beit_pretrain", *arguments] for name, arguments in links.items()
    }
    commands[REPORT] = [sys.executable, "-c", door, "report", str(folder)]
    return {
        name: job_script(
            nodes[name],
            shlex.join(command),
            name=f"{chain}/{name}",
            log=str(folder / f"{name}.log"),
            tasks=name != REPORT,
        )
        for name, command in commands.items()
    }


def _for_a_job(arguments: Sequence[str]) -> list[str]:
    """A link's options in a job: with the processes that srun starts, unless it says otherwise."""
    found = [o for o in arguments if _key(o) != "dry_run"]
    return found if "trainer" in explicit_keys(found) else [*found, "trainer=slurm"]


def _sources(name: str, links: Mapping[str, list[str]], folder: Path) -> list[str]:
    """The links that a link starts from."""
    values = set(explicit_keys(links[name]).values())
    return [other for other in links if str(folder / other) in values]


# --- options ------------------------------------------------------------------------------------------------


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides for all links, and those for single ones (`links.NAME.`)."""
    general: list[str] = []
    by_link: dict[str, list[str]] = {}
    for override in overrides:
        key = override.split("=", 1)[0]
        bare = key.lstrip("+~")
        if bare.startswith("links."):
            _, name, rest = bare.split(".", 2) if bare.count(".") >= 2 else (None, bare[6:], "")
            if not rest:
                raise ConfigError(f"{override}: write links.NAME.key=value")
            prefix = key[: len(key) - len(bare)]
            by_link.setdefault(name, []).append(prefix + rest + override[len(key) :])
        elif not _of_the_chain(override):
            general.append(override)
    return general, by_link


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _of_the_jobs(override: str) -> bool:
    """Whether an override says what Slurm jobs ask for."""
    return _key(override) == LAUNCHER or _key(override).startswith(("hydra.launcher.", RESOURCES))


def _of_the_chain(override: str) -> bool:
    """Whether an override is for the chain itself, not for its links."""
    key = _key(override)
    return key in ("chain", "name", "runs", "run_dir") or key.startswith("chain.")


def link_overrides(
    cfg: DictConfig, general: Sequence[str], by_link: dict[str, list[str]], folder: Path
) -> dict[str, list[str]]:
    """Each link's whole command line.

    Raises ConfigError for a link or an option that no link knows.
    """
    links = {str(name): list(own) for name, own in cfg.chain.links.items()}
    if unknown := sorted(by_link.keys() - links.keys()):
        raise ConfigError(f"links.{unknown[0]}: the chain {cfg.chain.name} has the links {', '.join(links)}")
    commands: dict[str, list[str]] = {}
    search = [o for o in general if _key(o) == SEARCHPATH]
    general = [o for o in general if o not in search]
    used: set[str] = set()
    for name, own in links.items():
        own = [*search, *(_resolve(o, folder, name, list(links)) for o in own)]
        known = set(flat_keys(compose(_without_checkpoints(own))))
        fits = [o for o in general if _fits(o, known)]
        used.update(fits)
        commands[name] = [*own, *fits, *by_link.get(name, []), f"name={cfg.name}/{name}", f"runs={cfg.runs}"]
    if left := [o for o in general if o not in used]:
        compose(
            [*_without_checkpoints(next(iter(commands.values()))), left[0]]
        )  # says what it might have meant
        raise ConfigError(f"{left[0]}: no link of the chain {cfg.chain.name} has this option")
    return commands


def _fits(override: str, known: set[str]) -> bool:
    key = override.split("=", 1)[0]
    return key.startswith("+") or key.lstrip("~") in known or (config_dir() / key.lstrip("~")).is_dir()


def _resolve(override: str, folder: Path, link: str, links: list[str]) -> str:
    """`key=@link` with that link's folder; it must come before the one that names it."""
    key, _, value = override.partition("=")
    if not value.startswith("@"):
        return override
    if value[1:] not in links[: links.index(link)]:
        raise ConfigError(
            f"{override}: there is no link {value[1:]} before {link} in this chain (links: {', '.join(links)})"
        )
    return f"{key}={folder / value[1:]}"


def _without_checkpoints(overrides: Sequence[str]) -> list[str]:
    """For composing before the links run: what they start from does not exist yet."""
    return [o for o in overrides if o.split("=", 1)[0] not in STARTS]


def _missing(overrides: Sequence[str]) -> str | None:
    """What a link starts from and an earlier one has not made yet."""
    sources = [o.split("=", 1)[1] for o in overrides if o.split("=", 1)[0] in STARTS]
    return next((source for source in sources if not Path(source).exists()), None)
