"""Several stages in a row: each link is a `beit-train` process of its own, whose folder the next ones start from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from beit_pretrain.checkpoint import files
from beit_pretrain.compose import compose, config_dir, flat_keys
from beit_pretrain.errors import BeitError, ConfigError
from beit_pretrain.report import make_chain_report

STARTS = ("tokenizer.checkpoint", "init_from")  # options by which a link starts from another


class LinkFailed(BeitError):
    """A link of a chain ended with an error, which it has printed itself."""


def run_chain(overrides: Sequence[str]) -> None:
    """Run the links of `chain=...` that are not finished, then write the chain's report.

    Overrides without a prefix go to every link that knows the key; `links.NAME.key=value` to one.
    """
    general, by_link = split_overrides(overrides)
    cfg = compose([o for o in overrides if _of_the_chain(o)])
    if missing := [key for key in cfg.chain if OmegaConf.is_missing(cfg.chain, key)]:
        raise ConfigError([f"chain.{key} is not given: set chain.{key}=..." for key in missing])
    folder = Path(cfg.runs) / cfg.name
    links = link_overrides(cfg, general, by_link, folder)
    for arguments in links.values():
        compose(_without_checkpoints(arguments))  # a mistake in the last link shows before the first one runs
    dry = any(o.partition("=")[::2] == ("dry_run", "true") for o in general)
    for number, (name, arguments) in enumerate(links.items(), 1):
        print(f"\n[{number}/{len(links)}] {name}: beit-train {' '.join(arguments)}", flush=True)
        if dry and (missing := _missing(arguments)):
            print(f"starts from {missing}, which is not there yet", flush=True)
            continue
        code = subprocess.run([sys.executable, "-m", "beit_pretrain", *arguments]).returncode
        if code:
            raise LinkFailed(f"link {name} ended with exit code {code}; the same command goes on from there")
    if dry:
        return
    results = {name: json.loads((folder / name / "results.json").read_text()) for name in links}
    files.write_text(
        folder / "results.json",
        json.dumps(
            {
                "name": cfg.name,
                "status": "finished",
                "seconds": sum(r["seconds"] for r in results.values()),
                "links": {name: r["metrics"] for name, r in results.items()},
            },
            indent=2,
        )
        + "\n",
    )
    report = make_chain_report(folder, [(name, folder / name) for name in links])
    from beit_pretrain.summary import show_chain

    show_chain(results, report)


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


def _of_the_chain(override: str) -> bool:
    """Whether an override is for the chain itself, not for its links."""
    key = override.split("=", 1)[0].lstrip("+~")
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
    used: set[str] = set()
    for name, own in links.items():
        own = [_resolve(o, folder, list(links)) for o in own]
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


def _resolve(override: str, folder: Path, links: list[str]) -> str:
    """`key=@link` with the link's folder."""
    key, _, value = override.partition("=")
    if not value.startswith("@"):
        return override
    if value[1:] not in links:
        raise ConfigError(
            f"{override}: there is no link {value[1:]} in this chain (links: {', '.join(links)})"
        )
    return f"{key}={folder / value[1:]}"


def _without_checkpoints(overrides: Sequence[str]) -> list[str]:
    """For composing before the links run: what they start from does not exist yet."""
    return [o for o in overrides if o.split("=", 1)[0] not in STARTS]


def _missing(overrides: Sequence[str]) -> str | None:
    """What a link starts from and an earlier one has not made yet."""
    sources = [o.split("=", 1)[1] for o in overrides if o.split("=", 1)[0] in STARTS]
    return next((source for source in sources if not Path(source).exists()), None)
