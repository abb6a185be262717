"""The doors: `beit-train` (Hydra overrides) and `beit-tools` (sub-commands).

A user's mistake is one line on stderr and exit code 2; an interrupted run says how to go on and ends with 130.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

from beit_pretrain.cluster.ending import among_others, die_with_parent, end, end_late, fail
from beit_pretrain.cluster.launch import launched
from beit_pretrain.cluster.signals import NAMES, Interrupted, Signals
from beit_pretrain.compose import LAUNCHER, complete, compose, config_dir, explicit_keys
from beit_pretrain.errors import BeitError, ConfigError

HELP = """\
beit-train: BEiT pre-training from one command.

  beit-train                                    the quickstart on the embedded digits (chain=quickstart)
  beit-train stage=tokenizer data=folder data.root=/images name=tok batch_size=512
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
        _guard(lambda: _check_sweep(arguments))
        _hydra(arguments)
    else:
        if launched().rank and launched().kind == "alone":
            die_with_parent()
        _guard(lambda: train(arguments))
        # All is done; a warning of the time limit that comes while the interpreter ends must not look like a failure.
        for name in NAMES:
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)


def train(overrides: Sequence[str]) -> None:
    """One run, or a chain of them."""
    with Signals() as signals:
        _train(overrides, signals)


def _train(overrides: Sequence[str], signals: Signals) -> None:
    keys = explicit_keys(overrides)
    stage, chain = (keys.get(group, "null") != "null" for group in ("stage", "chain"))
    if keys.get("sweep", "null") != "null":
        raise ConfigError("sweep=... is for beit-tools: write `beit-tools sweep` in place of `beit-train`")
    if stage and chain:
        raise ConfigError(
            "stage and chain are both given: a chain brings its own stages, leave one of them out"
        )
    asked = next((k for k in keys if k == LAUNCHER or k.startswith("hydra.launcher.")), None)
    if stage and asked:
        raise ConfigError(
            f"{asked}={keys[asked]} is for jobs: write a script with beit-tools sbatch, sweep with -m, or leave it out"
        )
    if not stage:
        from beit_pretrain.chain import run_chain

        signals.grace = 3600.0  # a link has its own, and is waited for
        run_chain(overrides if chain else ["chain=quickstart", *overrides])
        return
    cfg = compose(overrides)
    _run(cfg, overrides, signals, show=True)


def _run(cfg: DictConfig, overrides: Sequence[str], signals: Signals, *, show: bool) -> None:
    _listen(cfg, signals)
    from beit_pretrain import summary
    from beit_pretrain.run import run

    _quiet()
    results = run(cfg, overrides, signals)
    if show and launched().rank == 0:
        summary.show(results, cfg)


def _listen(cfg: DictConfig, signals: Signals) -> None:
    """What the configuration says of signals, as far as it makes sense: its faults come out together, later."""
    t = cfg.trainer
    if OmegaConf.is_list(t.signals) and all(name in NAMES for name in t.signals):
        signals.listen_to(list(t.signals))
    if isinstance(t.signal_grace, int | float):
        signals.grace = float(t.signal_grace)
    signals.requeue = t.requeue is True
    signals.late = lambda number: end_late(signals, number)


def tools_main() -> None:
    """`beit-tools`."""
    from beit_pretrain.tools.app import app

    _guard(app)


def _guard(action: Callable[[], object]) -> None:
    try:
        action()
    except Interrupted as interrupted:
        end(interrupted)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        mistake = _mistake(error)
        if among_others():
            fail(error, None if mistake is None else str(mistake))
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


def _check_sweep(arguments: Sequence[str]) -> None:
    """What Hydra would say at length, or for each job anew."""
    keys = explicit_keys([a for a in arguments if not a.startswith("-")])
    sweep = any(a in ("-m", "--multirun") for a in arguments)
    if sweep and (chain := next((k for k in keys if k.partition(".")[0] == "chain"), None)):
        raise ConfigError(
            f"{chain}={keys[chain]}: -m runs one stage with several settings, and a chain is not one"
        )
    if sweep and keys.get(LAUNCHER) == "slurm" and find_spec("submitit") is None:
        raise ConfigError(
            f"-m {LAUNCHER}=slurm needs hydra-submitit-launcher: pip install 'beit-pretrain[slurm]'"
        )


def _hydra(arguments: list[str]) -> None:
    """Sweeps and Hydra's own flags go through Hydra; a bad job of a sweep raises and does not end the others."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import CompactHydraException

    from beit_pretrain.compose import register_resolvers

    register_resolvers()
    parser = OverridesParser.create()
    given = parser.parse_overrides([a for a in arguments if "=" in a and not a.startswith("-")])
    swept = {o.key_or_group for o in given if o.is_sweep_override()}

    @hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")
    def job(cfg: DictConfig) -> None:
        overrides = list(HydraConfig.get().overrides.task)
        try:
            cfg = complete(cfg, overrides)
            if cfg.stage is None:
                raise ConfigError(
                    "a sweep runs one stage with several settings: set stage=pretrain, or another"
                )
            # A folder for each job, named by what the sweep changes.
            own = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") in swept]
            if (wandb := cfg.logger.get("wandb")) is not None and wandb.group is None:
                wandb.group = cfg.name
            cfg.name = "/".join([cfg.name, ",".join(own)] if own else [cfg.name])
            with Signals() as signals:  # here: a launcher may run this function anywhere
                _job(cfg, overrides, signals)
        except Interrupted as interrupted:
            end(interrupted)
        except Exception as error:
            mistake = _mistake(error)
            if among_others():
                fail(error, None if mistake is None else str(mistake))
            if mistake is None:
                raise
            # Hydra prints its own exceptions without a traceback, after the other jobs.
            raise CompactHydraException(f"error: {mistake}") from error

    sys.argv = [sys.argv[0], *arguments]
    job()


def _job(cfg: DictConfig, overrides: Sequence[str], signals: Signals) -> None:
    """One job of a sweep."""
    from beit_pretrain.devices import devices

    if launched().kind != "alone" or (devices(cfg) or 1) == 1:
        _run(cfg, overrides, signals, show=False)
        return
    # Lightning starts the other processes with this one's command line, which must not be that of the whole sweep.
    from beit_pretrain.chain import run_link

    signals.grace = 3600.0  # it has its own, and is waited for
    own = [o for o in overrides if o.split("=", 1)[0] != "name"]
    if (wandb := cfg.logger.get("wandb")) is not None:
        own.append(f'logger.wandb.group="{wandb.group}"')
    if code := run_link([*own, f'name="{cfg.name}"']):
        raise BeitError(f"{cfg.run_dir}: ended with exit code {code}")


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
        ".*It is recommended to use .self.log.*sync_dist=True.*",
        ".*srun. command is available on your system but is not used.*",
        ".*Total length of .list. across ranks is zero.*",  # nothing is held out
        ".*This DataLoader will create .* worker processes in total.*",
    ):
        warnings.filterwarnings("ignore", message=advice)


def _help() -> str:
    groups = sorted(p for p in config_dir().iterdir() if p.is_dir() and p.name != "hydra")
    rows = (f"  {g.name:<11} {', '.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups)
    return HELP.format(groups="\n".join(rows), configs=config_dir())
