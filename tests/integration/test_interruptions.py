"""Runs that are interrupted at any moment, by a signal or without a word, end with the bits of one left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from finetuning import SMALL_FINETUNE
from running import SMALL_PRETRAIN, assert_same_run, record, start, train

from beit_pretrain.cluster import events

OFTEN = ["checkpoint.every_steps=5", "stage.log_every=5", "data.workers=1", "micro_batch_size=32"]
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGKILL)


class Interrupted:
    """One kind of run, and how long it takes when nobody interrupts it."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.arguments = [*arguments, *OFTEN]
        self.whole = folder / "runs" / "whole"
        began = time.monotonic()
        train([*self.arguments, *record(self.whole), "name=whole"], folder)
        self.seconds = time.monotonic() - began

    def survives(self, number: int) -> None:
        """Interrupt a run of its own once; which way and when follows from `number`."""
        rng = random.Random(number)
        how, moment = rng.choice(SIGNALS), rng.uniform(0, self.seconds)
        run = self.folder / "runs" / f"broken-{number}"
        command = [*self.arguments, *record(run), f"name={run.name}"]
        process = start(command, self.folder)
        time.sleep(moment)
        if process.poll() is None:
            os.killpg(process.pid, how)  # data workers too, as Slurm does it
        output, _ = process.communicate(timeout=120)
        # Ended with a checkpoint, before the program had begun to listen, or just finished.
        assert process.returncode in (128 + how, -how, 0), output
        story = [row["event"] for row in events.read(run)]
        if process.returncode > 0 and "finish" not in story and "start" in story:
            assert story == ["start", "signal"], f"{how!r} after {moment:.2f} s: {story}\n{output}"
        train(command, self.folder)
        assert_same_run(self.whole, run)


@pytest.fixture(scope="module")
def pretraining(tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    arguments = [*SMALL_PRETRAIN, f"tokenizer.checkpoint={tokenizer_run}", "masking.exact=false"]
    return Interrupted([*arguments, "stage.epochs=4"], tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="module")
def finetuning(pretrain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    arguments = [*SMALL_FINETUNE, f"init_from={pretrain_run}", "stage.ema=0.9", "stage.mixup=0.8"]
    return Interrupted([*arguments, "stage.epochs=4"], tmp_path_factory.mktemp("finetuning"))


def test_pretraining_survives_an_interruption(pretraining: Interrupted) -> None:
    pretraining.survives(1)  # a signal; test_resume kills


def test_fine_tuning_survives_an_interruption(finetuning: Interrupted) -> None:
    finetuning.survives(14)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, *range(3, 12)])
def test_pretraining_survives_ten_interruptions(number: int, pretraining: Interrupted) -> None:
    pretraining.survives(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 13, *range(15, 23)])
def test_fine_tuning_survives_ten_interruptions(number: int, finetuning: Interrupted) -> None:
    finetuning.survives(number)
