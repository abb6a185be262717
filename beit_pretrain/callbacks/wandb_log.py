"""Weights & Biases: one run id per run folder, and never a question asked."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from beit_pretrain.callbacks.without_secrets import without_secrets
from beit_pretrain.errors import ConfigError

ID_FILE = "wandb_id"
STEP = "trainer/global_step"  # the axis of all charts
BEGIN = 60.0  # seconds to wait for W&B at the start; then the run is logged offline
FINISH = 120.0  # seconds to wait at the end for what is not uploaded yet; W&B's own patience has no end


class WandbLog(WandbLogger):
    """A W&B run that goes on when the run folder goes on, offline when it can't be online.

    Steps that a restart does again are not logged again: W&B says how far it got. What it did not get, since the
    network went away, lies in the folder `wandb`. Raises ConfigError where the package is missing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        project: str,
        *,
        title: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        if find_spec("wandb") is None:
            raise ConfigError(
                "logger=wandb needs a package that is not installed: `pip install beit-pretrain[wandb]`, or "
                "leave logger=wandb out"
            )
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        import wandb

        super().__init__(
            name=title,
            save_dir=folder,
            project=project,
            id=_run_id(folder),
            entity=entity,
            group=group,
            tags=list(tags) if tags else None,
            settings=wandb.Settings(init_timeout=BEGIN, finish_timeout=FINISH),
        )
        self._logged = -1  # the step up to which W&B has this run from before
        del self._wandb_init["anonymous"]  # Lightning still passes it on, W&B warns that it is gone
        if rank_zero_only.rank == 0 and not _logged_in():
            self._go_offline("no W&B credentials found (`wandb login`, or WANDB_API_KEY)")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun at the first use."""
        import wandb
        from wandb.errors import AuthenticationError, CommError

        if self._experiment is not None:
            return self._experiment
        try:
            run = super().experiment
        except (CommError, AuthenticationError) as error:
            wandb.teardown()  # W&B's own process, which still holds the run id
            self._go_offline(f"W&B could not be reached: {' '.join(str(error).split())}")
            return super().experiment
        if isinstance(run, wandb.Run) and run.resumed:
            self._logged = int(run.summary.get(STEP, -1))
        return run

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Keep the configuration, which runs are filtered, grouped and compared by, without secrets."""
        super().log_hyperparams(without_secrets(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of a step that W&B does not have yet; of its last one it may have a part."""
        _ = self.experiment  # begun here at the latest, it says how far W&B got
        if step is None or step >= self._logged:
            super().log_metrics(metrics, step)

    def _go_offline(self, why: str) -> None:
        parts = f"{shlex.quote(str(self.save_dir))}/wandb/offline-run-*"
        rank_zero_warn(f"{why}: the run is logged offline; upload it later with `wandb sync {parts}`")
        # `resume` means nothing offline, and W&B would warn of that; the id alone joins the parts.
        self._wandb_init |= {"mode": "offline", "resume": None}


def _logged_in() -> bool:
    """Whether W&B can begin without asking; what the user told W&B itself (offline, disabled) stands."""
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return True
    return wandb.login(prompt=False, verify=False)


def _run_id(folder: Path) -> str | None:
    """The id kept in the run folder; rank 0, the only one that talks to W&B, makes it."""
    file = folder / ID_FILE
    if file.exists():
        return file.read_text().strip()
    if rank_zero_only.rank != 0:
        return None
    run_id = secrets.token_hex(8)
    draft = file.with_name(f".{ID_FILE}.part")
    draft.write_text(run_id + "\n")
    draft.replace(file)
    return run_id
