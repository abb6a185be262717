"""Text from outside: what a terminal and a spreadsheet are given of it."""

from __future__ import annotations

import csv
import io
import os

import pytest

from beit_pretrain.errors import BeitError, ConfigError, DataError
from beit_pretrain.wording import cell, from_cell, printable

UNSEEN = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, 0x2028, 0x2029]
UNSEEN += [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDCE4]


@pytest.mark.parametrize("code", UNSEEN, ids=hex)
def test_what_a_terminal_would_obey_is_shown(code: int) -> None:
    shown = printable(f"a{chr(code)}b")
    assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")
    assert shown.encode().decode("unicode_escape") == f"a{chr(code)}b"


def test_what_is_text_stays() -> None:
    for text in ("plain", "ä 虎斑猫 \U0001f600 \N{ZERO WIDTH JOINER}", "C:\\new", "[red]", "\u05d0\u0627"):
        assert printable(text) == text
    assert printable(os.fsdecode(b"l\xe4n\x1b[2J")) == r"l\udce4n\x1b[2J" and printable(5) == "5"


def test_a_mistake_is_one_line_and_several_are_several() -> None:
    evil = "a\x1b[2J\nerror: b\x9b\u202e"
    for kind in (BeitError, DataError):
        assert str(kind(evil)) == r"a\x1b[2J\nerror: b\x9b\u202e"
    assert str(ConfigError([evil, "c"])).split("\n") == [r"a\x1b[2J\nerror: b\x9b\u202e", "c"]
    assert ConfigError(evil).faults == [evil]


FORMULAS = [
    "=1+1",
    "+x",
    "-x.jpg",
    "@sum(a)",
    "\tx",
    "\rx",
    "\n=x",
    "\uff1dx",
    "'=x",
    "''-x",
    "-1+cmd|' /C calc'!A0",
]
PLAIN = ["a=b", "", "'", "'x", "x", "-1", "-1.5e-3", "+2", "-inf", "1", "{-x}"]


def test_a_formula_becomes_text_and_comes_back_and_numbers_stay() -> None:
    for text in FORMULAS:
        assert cell(text) == f"'{text}" and from_cell(cell(text)) == text
    for value in [*PLAIN, -1, 1.5, -0.25, None]:
        assert cell(value) == value
    assert [from_cell(text) for text in PLAIN] == PLAIN
    text = io.StringIO()
    csv.writer(text).writerow(map(cell, FORMULAS + PLAIN))
    (row,) = csv.reader(io.StringIO(text.getvalue(), newline=""))
    assert list(map(from_cell, row)) == FORMULAS + PLAIN
