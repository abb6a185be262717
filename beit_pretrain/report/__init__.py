"""Reports made from run folders only: `report.html` of a run and of a chain."""

from beit_pretrain.report.html import make_chain_report, make_report

__all__ = ["make_chain_report", "make_report"]
