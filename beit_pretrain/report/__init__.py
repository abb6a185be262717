"""Reports made from run folders only: `report.html` of a run and of a chain, and runs side by side."""

from beit_pretrain.report.compare_page import make_comparison
from beit_pretrain.report.html import make_chain_report, make_report

__all__ = ["make_chain_report", "make_comparison", "make_report"]
