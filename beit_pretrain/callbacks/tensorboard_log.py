"""TensorBoard in the run folder, one log over all restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from beit_pretrain.callbacks.without_secrets import without_secrets


class TensorBoardLog(TensorBoardLogger):
    """Event files in `run_dir/tensorboard`, points after `resume_step` (without one: after 0) taken back."""

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        super().__init__(
            save_dir=run_dir,
            name="",
            version="tensorboard",
            default_hp_metric=False,
            purge_step=(resume_step or 0) + 1,
        )

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Keep the configuration, without secrets: in `hparams.yaml`, and for TensorBoard's page HPARAMS.

        Only what begins a session is written. With torch's description of the whole experiment beside it TensorBoard
        would know the options and metrics of one run alone, and finds those of all runs by itself.
        """
        shown = without_secrets(params)
        Path(self.log_dir, self.NAME_HPARAMS_FILE).unlink(missing_ok=True)  # Lightning writes it only once
        super().log_hyperparams(shown)
        _, session, _ = hparams(_flat(shown), {})
        self.experiment._get_file_writer().add_summary(session)


def _flat(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their whole name, such as stage.optim.lr, as numbers and text."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value) if isinstance(value, list) else value
    return found
