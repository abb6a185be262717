"""TensorBoard in the run folder, one log over all restarts."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger


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
