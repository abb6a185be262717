#!/usr/bin/env python
"""Looks like `beit-train` from outside (lock, metrics.csv, checkpoint, results.json, exit codes) and trains nothing.

The held-out loss after an epoch is |log10(lr) + 3| + 1 / epoch. Faults come from the environment: STUB_EXIT=code and
STUB_KILL=1 (the first start of each run kills itself), STUB_SLURM=number (as if Slurm had sent it, after one epoch),
STUB_AWAITS=file (no lock before it is there).
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
run = Path(given["runs"]) / given["name"]
run.mkdir(parents=True, exist_ok=True)
lock, checkpoint, metrics = run / ".lock", run / "checkpoint", run / "metrics.csv"
told: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: told.append(number))

if "STUB_EXIT" in os.environ:
    print("error: data.root=/nowhere: there is no such folder", file=sys.stderr)
    sys.exit(int(os.environ["STUB_EXIT"]))
deadline = time.monotonic() + 60
while "STUB_AWAITS" in os.environ and not Path(os.environ["STUB_AWAITS"]).exists():
    assert time.monotonic() < deadline
    time.sleep(0.01)
if lock.exists():
    pid = json.loads(lock.read_text())["pid"]
    if Path(f"/proc/{pid}").exists():
        print(f"error: {run} is being written by process {pid}", file=sys.stderr)
        sys.exit(2)
began = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
draft = run / f".lock.{os.getpid()}"
draft.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": began}))
draft.replace(lock)

done = int(checkpoint.read_text()) if checkpoint.exists() else 0
first = not (run / "starts").exists()
with (run / "starts").open("a") as file:
    file.write(f"{done} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
if not metrics.exists():
    metrics.write_text("step,epoch,val/loss\n")


def loss(epoch: int) -> float:
    return abs(math.log10(float(given["stage.optim.lr"])) + 3) + 1 / epoch


epochs = int(given["stage.epochs"])
for epoch in range(done + 1, epochs + 1):
    time.sleep(float(os.environ.get("STUB_SECONDS", "0.02")))
    with metrics.open("a") as file:
        file.write(f"{10 * epoch},{epoch}.0,{loss(epoch)}\n")
    draft.write_text(str(epoch))
    draft.replace(checkpoint)
    if first and "STUB_KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    if first and "STUB_SLURM" in os.environ:
        told.append(int(os.environ["STUB_SLURM"]))
    if told:
        lock.unlink()
        sys.exit(128 + told[0])
(run / "results.json").write_text(json.dumps({"status": "finished", "metrics": {"val/loss": loss(epochs)}}))
lock.unlink()
