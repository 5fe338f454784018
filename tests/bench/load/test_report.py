"""What rounds of the loading bench say together."""

import json

import pytest

from bench.load.model import llama_shapes, write_llama
from bench.load.report import OURS, Sample, of_ceiling, phase_lines, summarize, table
from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source

SIZE = 10**9
SAMPLES = [
    Sample("raw io_uring", "cold", SIZE, 0, 0.5),
    Sample("raw threads", "cold", SIZE, 0, 0.4),
    Sample("raw io_uring", "cold", SIZE, 1, 0.45),
    Sample(OURS, "cold", SIZE, 0, 0.55, {"load": 0.5, "touch": 0.05}, 3 * 2**20, 640),
    Sample(OURS, "cold", SIZE, 1, 0.45, {"load": 0.45, "touch": 0.0}, 5 * 2**20),
    Sample("torch.load", "cold", SIZE, 0, 1.1, {"load": 1.0, "touch": 0.1}),
    Sample("torch.load", "cold", SIZE, 1, 1.8, {"load": 1.8, "touch": 0.0}),
    Sample("torch.load", "warm", SIZE, 0, 1.0),
]


def test_ratios_are_of_the_same_round():
    rows = {(row.loader, row.condition): row for row in summarize(SAMPLES)}
    ratio = rows["torch.load", "cold"].over_ours
    assert ratio is not None
    assert [ratio.low, ratio.high] == pytest.approx([2.0, 4.0])
    assert rows["torch.load", "warm"].over_ours is None
    assert rows[OURS, "cold"].seconds.median == pytest.approx(0.5)
    assert rows[OURS, "cold"].peak_mib == 5
    assert rows["torch.load", "warm"].gb_per_s == pytest.approx(1.0)


def test_the_ceiling_is_the_faster_raw_read_of_each_round():
    ratio = of_ceiling(SAMPLES, SIZE)
    assert ratio is not None
    assert [ratio.low, ratio.high] == pytest.approx([0.8, 1.0])
    assert of_ceiling(SAMPLES, 2 * SIZE) is None


def test_the_table_has_a_row_for_each_loader_and_condition():
    rows = summarize(SAMPLES)
    assert table(rows).row_count == len(rows) == 5
    assert phase_lines(rows) == [
        "1.00 GB cold, gearfall: load 475.0 ms, touch 25.0 ms; 640 page faults in the touch"
    ]


def test_the_model_is_a_sound_checkpoint_of_about_the_size_without_equal_tensors(tmp_path):
    size_bytes = 200 * 10**6
    written = write_llama(tmp_path / "model", size_bytes)
    assert written == pytest.approx(size_bytes, rel=0.1)
    config = json.loads((tmp_path / "model/config.json").read_text())
    shapes = llama_shapes(size_bytes)
    with open_source(str(tmp_path / "model")) as source:
        manifest = convert(source, None, lambda done, total: None)
    assert len(manifest.tensors) == len(shapes) == 9 * config["num_hidden_layers"] + 3
    assert not manifest.aliases
