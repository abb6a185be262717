"""The report of a run or of a chain, made anew from its folder."""

from __future__ import annotations

from pathlib import Path

from beit_pretrain.errors import BeitError
from beit_pretrain.report import make_report
from beit_pretrain.tools.run_folders import is_run


def report(folder: Path) -> Path:
    """Write `report.html` of the run or chain in `folder`, finished or not, and return its path."""
    if (folder / "chain.json").is_file():
        from beit_pretrain.chain import report_chain

        return report_chain(folder)
    if not is_run(folder):
        raise BeitError(
            f"{folder} holds no run (config.yaml) and no chain (chain.json): give the folder of one, such as runs/NAME"
        )
    return make_report(folder)
