"""However a run ends, it ends: soon, with its line, with its exit code, and with all its processes."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from endings import on, paint, spoil
from forked import Forked, ForkServer, left
from running import start

BEGIN = 30  # seconds that a run on a busy machine may need until the fault
ALONE, TOGETHER = 30, 60  # seconds in which it must be over then, on one rank and on two

# What happens, how the run is told of it, its exit code, and its line.
CASES = {
    "unreadable": ([], 2, "of 40 images cannot be read, more"),
    "blocked": (
        ["+callbacks.fault._target_=endings.BlockFile", "data.timeout=2"],
        2,
        "the data workers gave nothing for 2 s",
    ),
    "killed": (
        ["+callbacks.fault._target_=endings.KillWorkers"],
        1,
        "(out of memory?): give the job more of it",
    ),
    "exception": (
        ["+callbacks.fault._target_=running.Fail", "+callbacks.fault.step=3"],
        1,
        "RuntimeError: rank",
    ),
    "removed": (["+callbacks.fault._target_=endings.RemoveFolder"], 1, "runs/run was removed"),
    "ctrl-c": (
        ["+callbacks.fault._target_=endings.Signal", f"+callbacks.fault.number={signal.SIGINT.value}"],
        130,
        "stopped; the same command",
    ),
    "term": (
        ["+callbacks.fault._target_=endings.Signal", f"+callbacks.fault.number={signal.SIGTERM.value}"],
        143,
        "stopped by SIGTERM after step 6",
    ),
}
NEED_WORKERS = ("blocked", "killed")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


def _arguments(case: str, folder: Path, workers: int, rank: int = 0) -> list[str]:
    data = paint(folder / "data")
    if case == "unreadable":
        spoil(data)
    more = [f"+callbacks.fault.path={data}/val/b/00.png"] if case == "blocked" else []
    if case not in ("unreadable", "blocked"):
        more.append(f"+callbacks.fault.rank={rank}")
    return [*on(data, workers), "stage.epochs=2", *CASES[case][0], *more]


def _assert_told(output: str, words: str) -> None:
    """One line says it: a user's mistake as one, an exception with its traceback above."""
    told = [line for line in output.splitlines() if words in line]
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and errors in ([], told), output
    assert "Traceback" not in output or words.startswith("RuntimeError"), output


@pytest.mark.parametrize(
    ("case", "workers"),
    [
        pytest.param(case, workers, marks=() if (case, workers) == ("unreadable", 1) else pytest.mark.slow)
        for case in CASES
        for workers in ((1, 2) if case in NEED_WORKERS else (0, 1, 2))
    ],
)
def test_a_run_ends(case: str, workers: int, server: ForkServer, tmp_path: Path) -> None:
    run = server.start(_arguments(case, tmp_path, workers), tmp_path)
    _, code, words = CASES[case]
    assert run.wait(BEGIN + ALONE) == code, run.output
    assert run.left() == []
    _assert_told(run.output, words)
    if case in ("unreadable", "exception", "ctrl-c", "term"):
        assert not (tmp_path / "runs" / "run" / ".lock").exists()


def _two(server: ForkServer, arguments: list[str], folder: Path) -> list[Forked]:
    """Two ranks, as torchrun starts them, and nobody who ends one for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    among = {
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    among |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        server.start(
            [*arguments, "trainer.devices=2"],
            folder,
            log=f"log{rank}",
            **among,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rank"),
    [
        ("unreadable", 0),
        ("blocked", 0),
        ("killed", 0),
        ("killed", 1),
        ("exception", 1),
        ("ctrl-c", 0),
        ("ctrl-c", 1),
    ],
)
def test_two_ranks_end(case: str, rank: int, server: ForkServer, tmp_path: Path) -> None:
    runs = _two(server, _arguments(case, tmp_path, 1, rank), tmp_path)
    deadline = time.monotonic() + BEGIN + TOGETHER
    codes = [run.wait(deadline - time.monotonic()) for run in runs]
    output = "".join(run.output for run in runs)
    assert [run.left() for run in runs] == [[], []]
    _, code, words = CASES[case]
    assert code in codes and set(codes) <= {code, 1}, output
    assert output.count(words) == 1, output
    assert "Traceback" not in output or case == "exception", output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_takes_the_other_one_along_though_its_workers_have_its_connections(
    rank: int, server: ForkServer, tmp_path: Path
) -> None:
    data = paint(tmp_path / "data")
    kill = ["+callbacks.fault._target_=endings.Signal", f"+callbacks.fault.number={signal.SIGKILL.value}"]
    # Of this rank's share, in a batch that its worker has begun by then: it hangs, and does not look for its parent.
    blocked = data / "val" / "a" / f"{12 + rank}.png"
    block = ["+callbacks.block._target_=endings.BlockFile", f"+callbacks.block.path={blocked}"]
    runs = _two(server, [*on(data, 1), *kill, f"+callbacks.fault.rank={rank}", *block], tmp_path)
    codes = [run.wait(BEGIN + TOGETHER) for run in runs]
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert [run.left() for run in runs] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_command_of_its_own_ends(ranks: int, tmp_path: Path) -> None:
    """As a user types it, and not by the server; Lightning starts the second rank."""
    process = start([*_arguments("unreadable", tmp_path, 1), f"trainer.devices={ranks}"], tmp_path)
    output, _ = process.communicate(timeout=2 * BEGIN + TOGETHER)
    assert process.returncode == 2, output
    assert output.count("of 40 images cannot be read, more") == 1 and "Traceback" not in output, output
    assert left(process.pid) == []
