"""Lightning's loop counters for a run that stands after a given optimiser step.

Lightning stores counters and mends them on restart by guessing at which hook the checkpoint was written. Here
the place is arithmetic, so the counters are made from the step: complete up to it, nothing half-done.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def _even(n: int) -> dict[str, int]:
    return {"ready": n, "started": n, "processed": n, "completed": n}


def fit_loop_state(trainer: Trainer, *, step: int, steps_per_epoch: int, accumulate: int) -> dict[str, Any]:
    """State for `trainer.fit_loop.load_state_dict`: `step` updates done, in the middle of an epoch or between two."""
    epoch, into = divmod(step, steps_per_epoch)
    begun = epoch + 1 if into else epoch
    state = trainer.fit_loop.state_dict()
    progress = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    state["epoch_progress"] = {"total": dict(progress), "current": dict(progress)}
    state["epoch_loop.batch_progress"] = {
        "total": _even(step * accumulate),
        "current": _even(into * accumulate),
        "is_last_batch": False,
    }
    state["epoch_loop.state_dict"] = {"_batches_that_stepped": step}
    state["epoch_loop.automatic_optimization.optim_progress"] = {
        "optimizer": {
            "step": {
                "total": {"ready": step, "completed": step},
                "current": {"ready": into, "completed": into},
            },
            "zero_grad": {
                "total": {"ready": step, "started": step, "completed": step},
                "current": {"ready": into, "started": into, "completed": into},
            },
        }
    }
    return state
