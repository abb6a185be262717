"""The doors: `beit-train` (Hydra overrides) and `beit-tools` (sub-commands).

A user's mistake is one line on stderr and exit code 2; an interrupted run says how to go on and ends with 130.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from beit_pretrain.compose import complete, compose, config_dir, explicit_keys
from beit_pretrain.errors import BeitError, ConfigError

HELP = """\
beit-train: BEiT pre-training from one command.

  beit-train                                    the quickstart on the embedded digits (chain=quickstart)
  beit-train stage=tokenizer data=folder data.root=/images name=tok
  beit-train stage=pretrain  data=folder data.root=/images model=tiny tokenizer.checkpoint=runs/tok
  beit-train stage=knn init_from=runs/pretrain-folder-tiny data=folder data.root=/labelled

The same command again goes on where it stopped. Useful everywhere:
  dry_run=true   what would run: steps, parameters, lr per group, memory; then exit
  debug=true     two steps without worker processes, in a folder of its own
  name=NAME      the run's folder below runs/        overwrite=true   throw away what is there

Choices:
{groups}
Every option with its comment: {configs}
A sweep: beit-train -m stage=pretrain stage.optim.lr=1e-3,2e-3 ...    Composed config: beit-train --cfg job ...
"""


def main(argv: Sequence[str] | None = None) -> None:
    """`beit-train`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Before torch is imported: by default OpenMP threads spin for long while they wait for each other, and where
    # something else uses the cores too (data workers, a neighbour on the node) that made a step ten times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if any(a in ("-h", "--help") for a in arguments):
        print(_help())
    elif any(a.startswith("-") for a in arguments):
        _hydra(arguments)
    else:
        _guard(lambda: train(arguments))


def train(overrides: Sequence[str]) -> None:
    """One run, or a chain of them."""
    keys = explicit_keys(overrides)
    stage, chain = (keys.get(group, "null") != "null" for group in ("stage", "chain"))
    if stage and chain:
        raise ConfigError(
            "stage and chain are both given: a chain brings its own stages, leave one of them out"
        )
    if not stage:
        from beit_pretrain.chain import run_chain

        run_chain(overrides if chain else ["chain=quickstart", *overrides])
        return
    cfg = compose(overrides)
    from beit_pretrain.run import run
    from beit_pretrain.summary import show

    _quiet()
    show(run(cfg, overrides), cfg)


def tools_main() -> None:
    """`beit-tools`."""
    from beit_pretrain.tools.app import app

    _guard(app)


def _guard(action: Callable[[], object]) -> None:
    try:
        action()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        for line in str(mistake).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def _mistake(error: BaseException | None) -> BeitError | None:
    """The user's mistake behind an error: Hydra wraps what a constructor raises."""
    while error is not None and not isinstance(error, BeitError):
        error = error.__cause__
    return error


def _hydra(arguments: list[str]) -> None:
    """Sweeps and Hydra's own flags go through Hydra; a bad job of a sweep raises and does not end the others."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import CompactHydraException
    from omegaconf import DictConfig

    from beit_pretrain.compose import register_resolvers

    register_resolvers()
    parser = OverridesParser.create()
    given = parser.parse_overrides([a for a in arguments if not a.startswith("-")])
    swept = {o.key_or_group for o in given if o.is_sweep_override()}

    @hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")
    def job(cfg: DictConfig) -> None:
        from beit_pretrain.run import run

        _quiet()
        overrides = list(HydraConfig.get().overrides.task)
        try:
            cfg = complete(cfg, overrides)
            if cfg.stage is None:
                raise ConfigError(
                    "a sweep runs one stage with several settings: set stage=pretrain, or another"
                )
            # A folder for each job, named by what the sweep changes.
            own = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") in swept]
            cfg.name = "/".join([cfg.name, ",".join(own)] if own else [cfg.name])
            run(cfg, overrides)
        except Exception as error:
            mistake = _mistake(error)
            if mistake is None:
                raise
            # Hydra prints its own exceptions without a traceback, after the other jobs.
            raise CompactHydraException(f"error: {mistake}") from error

    sys.argv = [sys.argv[0], *arguments]
    job()


def _quiet() -> None:
    """Leave the terminal to what a user needs, without Lightning's greetings; after its import, which sets levels."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard's event writer, if TensorFlow is there
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    for advice in (
        ".*does not have many workers.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*module.s. in eval mode at the start of training.*",
        ".*GPU available but not used.*",
        ".*LeafSpec.*",
        ".*This DataLoader will create .* worker processes in total.*",
    ):
        warnings.filterwarnings("ignore", message=advice)


def _help() -> str:
    groups = sorted(p for p in config_dir().iterdir() if p.is_dir() and p.name != "hydra")
    rows = (f"  {g.name:<11} {', '.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups)
    return HELP.format(groups="\n".join(rows), configs=config_dir())
