"""Weights & Biases: one run id per run folder, and never a question asked."""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from beit_pretrain.errors import ConfigError

ID_FILE = "wandb_id"


class WandbLog(WandbLogger):
    """A W&B run that goes on when the run folder goes on, offline when it can't be online.

    W&B also keeps what was logged after the checkpoint that a restart begins from; `trainer/global_step` is
    the common axis. Raises ConfigError where the package is missing.
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
        super().__init__(
            name=title,
            save_dir=folder,
            project=project,
            id=_run_id(folder),
            entity=entity,
            group=group,
            tags=list(tags) if tags else None,
        )
        del self._wandb_init["anonymous"]  # Lightning still passes it on, W&B warns that it is gone
        if rank_zero_only.rank == 0 and not _logged_in():
            self._go_offline("no W&B credentials found (`wandb login`, or WANDB_API_KEY)")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun at the first use."""
        from wandb.errors import AuthenticationError, CommError

        if self._experiment is not None:
            return self._experiment
        try:
            return super().experiment
        except (CommError, AuthenticationError) as error:
            self._go_offline(f"W&B could not be reached: {error}")
            return super().experiment

    def _go_offline(self, why: str) -> None:
        rank_zero_warn(
            f"{why}: the run is logged offline to {self.save_dir}/wandb; upload it with `wandb sync --append`"
        )
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
