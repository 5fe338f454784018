"""`gearfall simulate`: what it prints, writes and refuses."""

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gearfall.cli.main import app
from gearfall.cli.simulate import read_trace
from gearfall.core.errors import InvalidRequest

SHORT = ["simulate", "--rate", "0.5", "--duration", "60", "--seed", "3"]


def invoke(*arguments: str):
    return CliRunner().invoke(app, [*SHORT, *arguments])


def test_figures_as_json_are_the_same_for_the_same_seed(tmp_path):
    found = []
    for name in ("one.json", "two.json"):
        result = invoke("--policy", "ours", "--policy", "random", "--out", str(tmp_path / name))
        assert result.exit_code == 0, result.output
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]
    document = json.loads(found[0])
    assert [each["policy"] for each in document["policies"]] == ["ours", "random"]
    assert all(each["finished"] == document["requests"] for each in document["policies"])


def test_the_oracle_waits_for_nothing_and_costs_more():
    result = invoke("--policy", "ours", "--policy", "all-warm", "--json")
    ours, warm = json.loads(result.output)["policies"]
    assert warm["startup_p99_s"] == 0.0 < ours["startup_p99_s"]
    assert warm["accelerator_hours"] > ours["accelerator_hours"]


def test_plots_are_the_same_for_the_same_seed(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    for name in ("one", "two"):
        result = invoke("--policy", "ours", "--plots", str(tmp_path / name))
        assert result.exit_code == 0, result.output
    for file in ("startup.svg", "first-token.svg"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert (tmp_path / "one" / "startup.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments",
    [["--policy", "best"], ["--size", "7b"], ["--dataset", "none"], ["--trace", "nowhere.csv.gz"]],
)
def test_what_is_not_known_is_refused(arguments):
    result = invoke(*arguments)
    assert isinstance(result.exception, InvalidRequest)


def test_a_trace_is_replayed_on_a_fleet(tmp_path):
    path = tmp_path / "trace.csv.gz"
    rows = [f"2023-11-16 18:15:{second:02}.6805900,100,20" for second in range(20)]
    path.write_bytes(
        gzip.compress("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]).encode())
    )
    result = invoke(
        *("--trace", str(path), "--nodes", "2", "--models", "4", "--policy", "ours", "--json")
    )
    figures = json.loads(result.output)["policies"][0]
    assert (figures["arrived"], figures["finished"]) == (20, 20)


def test_both_kinds_of_traces_are_read(tmp_path):
    azure, mooncake = tmp_path / "a.csv.gz", tmp_path / "m.csv.gz"
    azure.write_bytes(
        gzip.compress(
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
            b"2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
        )
    )
    mooncake.write_bytes(
        gzip.compress(
            b"timestamp_ms,input_length,output_length,n_hash_blocks\n0,6,5,1\n1500,7,4,1\n"
        )
    )
    assert [(r.prompt_tokens, r.output_tokens) for r in read_trace(azure)] == [
        (374, 44),
        (396, 109),
    ]
    assert read_trace(azure)[1].at_s == pytest.approx(4.314579)
    assert [(r.at_s, r.prompt_tokens) for r in read_trace(mooncake)] == [(0.0, 6), (1.5, 7)]


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"timestamp_ms,input_length,output_length\nx,1,1"]
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, content):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InvalidRequest):
        read_trace(path)


TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not on this machine")
@pytest.mark.parametrize(
    ("name", "rows", "seconds"),
    [
        ("AzureLLMInferenceTrace_code_2023", 8_819, 3_400),
        ("AzureLLMInferenceTrace_conv_2023", 19_366, 3_500),
        ("mooncake_conversation_trace", 12_031, 3_500),
    ],
)
def test_recorded_traces_are_read_whole(name, rows, seconds):
    found = read_trace(TRACES / f"{name}.csv.gz")
    assert len(found) == rows
    assert found[0].at_s == 0.0
    assert found[-1].at_s == pytest.approx(seconds, rel=0.1)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not on this machine")
def test_a_recorded_minute_is_answered_by_a_fleet_that_nobody_built():
    path = TRACES / "AzureLLMInferenceTrace_conv_2023.csv.gz"
    result = invoke(
        *("--trace", str(path), "--nodes", "8", "--models", "40", "--slots", "8", "--json"),
        *("--policy", "ours", "--policy", "random"),
    )
    ours, random = json.loads(result.output)["policies"]
    assert ours["arrived"] == ours["finished"] == random["finished"] > 100
    assert ours["ssd_bytes"] + ours["remote_bytes"] < random["ssd_bytes"] + random["remote_bytes"]
