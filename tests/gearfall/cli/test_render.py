import io

import pytest
from rich.console import Console

from gearfall.cli import render

ROWS = [["a-model-with-a-long-name", "x " * 100]]
LONGER = [["n" * 40, "1.5 GiB", "ready"]]


@pytest.fixture
def printed(monkeypatch):
    def print_to(stream, rows=ROWS):
        console = Console(file=stream, width=render.line_width(stream), no_color=True)
        monkeypatch.setattr(render, "console", console)
        render.print_table("models", ["name", "size", "state"][: len(rows[0])], rows)
        return stream.getvalue().splitlines()

    return print_to


class Terminal(io.StringIO):
    def isatty(self):
        return True


def rows_with(lines, text):
    return [line for line in lines if text in line]


def test_a_row_that_goes_into_a_pipe_stays_one_line(printed, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    (row,) = rows_with(printed(io.StringIO()), ROWS[0][0])
    assert row.count("x") == 100


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_width_that_somebody_set_bounds_lines_but_breaks_no_name(printed, monkeypatch, stream):
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(stream())
    assert max(map(len, rows_with(lines, "x"))) <= 80
    assert len(rows_with(lines, "x")) > 1
    assert len(rows_with(lines, ROWS[0][0])) == 1


def test_a_name_that_leaves_no_room_is_folded_and_loses_nothing(printed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = printed(Terminal(), LONGER)
    assert sum(line.count("n") for line in lines if "nn" in line) == 40
    assert rows_with(lines, "1.5 GiB")
    assert rows_with(lines, "ready")
