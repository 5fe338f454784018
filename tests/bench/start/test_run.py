"""What the start bench says of its rounds."""

import pytest

from bench.load.report import Sample
from bench.start.run import OURS, THEIRS, over_load, parse_flags, table

SAMPLES = [
    Sample(OURS, "ssd", 10**9, 0, 1.0, {"ssd": 0.8, "request": 0.2}),
    Sample(THEIRS, "ssd", 10**9, 0, 8.0, {"import": 5.0, "load": 3.0}),
    Sample(OURS, "ssd", 10**9, 1, 1.0, {"ssd": 0.5, "build": 0.4, "request": 0.1}),
    Sample(THEIRS, "ssd", 10**9, 1, 12.0, {"import": 6.0, "load": 6.0}),
]


def test_phases_and_ratios_stand_in_the_table():
    found = table(SAMPLES)
    columns = {column.header: list(column.cells) for column in found.columns}
    assert columns["system"] == [OURS, THEIRS]
    assert columns["x gearfall"] == ["1.0", "10.0"]
    assert columns["phases ms"][1] == "import 5500.0, load 4500.0"


def test_a_start_is_held_against_its_own_load():
    assert over_load(SAMPLES) == (
        "from SSD a start takes 1.62 (1.25 to 2.00) of the load alone, until it is ready "
        "1.40 (1.00 to 1.80)"
    )


@pytest.mark.parametrize(("argv", "size"), [([], 1.0), (["--size", "0.5"], 0.5)])
def test_flags(argv, size):
    assert parse_flags(argv).size == size
