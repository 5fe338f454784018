"""What the command line accepts, and how it refuses the rest."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gearfall.cli.connection import parse_address
from gearfall.cli.deploy import (
    deployment_from_file,
    parse_escalation,
    parse_labels,
    parse_stage,
    parse_streaming,
    streaming_of,
)
from gearfall.cli.main import app, main
from gearfall.cli.render import bytes_text
from gearfall.cli.up import parse_bytes, real_policy
from gearfall.core.certainty.escalation import AtOverload, EscalationPolicy, WhileLoading
from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import plan_text
from gearfall.core.generation.streaming import Streaming, StreamMode
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from gearfall.scheduling.policies import PlacementPolicy
from tests.gearfall.scheduling.plans import plan


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1", 1), ("4K", 4096), ("512M", 2**29), ("4G", 2**32), ("4GiB", 2**32), ("2gb", 2**31)],
)
def test_sizes_are_binary(text: str, size_bytes: int) -> None:
    assert parse_bytes(text, param="--dram") == size_bytes


@pytest.mark.parametrize("text", ["", "0", "-1G", "4X", "G", "1.5G", "4 elephants"])
def test_a_wrong_size_names_the_option(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_bytes(text, param="--dram")
    assert caught.value.param == "--dram"


def test_a_policy_that_only_a_simulation_can_follow_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        real_policy(PlacementPolicy.PREEMPT)
    assert caught.value.param == "--policy"


def test_a_stage_is_a_model_with_or_without_a_threshold() -> None:
    assert parse_stage("small:0.9") == Stage(ModelName("small"), 0.9)
    assert parse_stage("large") == Stage(ModelName("large"))
    assert parse_stage("small*3:0.6") == Stage(ModelName("small"), 0.6, SelfConsistency(3))
    for wrong in ("small:very", "small*many:0.5", "small*:0.5"):
        with pytest.raises(InvalidRequest):
            parse_stage(wrong)


def test_a_file_says_how_a_stage_counts_equal_answers(tmp_path: Path) -> None:
    path = tmp_path / "deployment.json"
    path.write_text(
        '{"name": "b", "stages": [{"model": "s", "threshold": 0.6, "self_consistency": '
        '{"samples": 3, "temperature": 1.1}}, {"model": "m", "threshold": 0.5, "self_consistency": '
        '{"samples": 2}}, {"model": "l"}]}'
    )
    found = [each.self_consistency for each in deployment_from_file(path).stages]
    assert found == [SelfConsistency(3, 1.1), SelfConsistency(2, 0.7), None]
    path.write_text(path.read_text().replace('"samples": 2', '"answers": 2'))
    with pytest.raises(InvalidRequest, match="'samples'"):
        deployment_from_file(path)


def test_labels_are_pairs() -> None:
    assert parse_labels(["zone=a", "rack=", "note=a=b"]) == {"zone": "a", "rack": "", "note": "a=b"}
    for texts in (["zone"], ["=a"], ["zone=a", "zone=b"]):
        with pytest.raises(InvalidRequest) as caught:
            parse_labels(texts)
        assert caught.value.param == "label"


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:x", "host:70000"])
def test_a_wrong_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_address(text, param="--rest")


def test_a_deployment_file_is_read_and_renamed(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(
        '{"name": "a", "certainty": "min_margin", "keep_alive_s": 5,'
        ' "target_jobs": 3, "labels": {"zone": "a"}, "spread": true, "accelerators": 2,'
        ' "shadow_share": 0.02, "cache_bytes": 65536,'
        ' "escalation": {"while_loading": "answer", "queue_target_s": 2},'
        ' "streaming": {"mode": "early", "hold_tokens": 8, "finishes_drafts": true},'
        ' "stages": [{"model": "s", "threshold": 0.5}, {"model": "l", "threshold": null}]}'
    )
    record = deployment_from_file(path, "b")
    assert (record.name, record.certainty, record.keep_alive_s) == ("b", "min_margin", 5.0)
    assert record.stages == (Stage(ModelName("s"), 0.5), Stage(ModelName("l")))
    assert (record.target_jobs, record.labels, record.spread) == (3, {"zone": "a"}, True)
    assert record.accelerators == 2
    assert (record.shadow_share, record.cache_bytes) == (0.02, 65536)
    assert record.escalation == EscalationPolicy(WhileLoading.ANSWER, queue_target_s=2.0)
    assert record.streaming == Streaming(StreamMode.EARLY, 8, finishes_drafts=True)


def test_an_escalation_policy_is_read() -> None:
    fields = {"at_overload": "answer", "queue_target_s": "1.5"}
    wanted = EscalationPolicy(at_overload=AtOverload.ANSWER, queue_target_s=1.5)
    assert parse_escalation(fields) == wanted


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"while_loading": "hurry"}, "while_loading 'hurry' must be wait or answer"),
        ({"at_deadline": ""}, "at_deadline '' must be answer or fail"),
        ({"while_cold": "wait"}, "escalation has no 'while_cold'"),
    ],
)
def test_an_escalation_policy_is_refused(fields: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_escalation(fields)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mode": "eager"}, "streaming.mode 'eager' is not one of buffer, early, draft"),
        ({"hold": 4}, "streaming has no 'hold'"),
    ],
)
def test_a_streaming_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_streaming(fields)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("mode", "hold_tokens", "planned", "wanted"),
    [
        (None, None, 0, Streaming(StreamMode.BUFFER, 16)),
        (StreamMode.EARLY, 4, 0, Streaming(StreamMode.EARLY, 4)),
        (None, None, 8, Streaming(StreamMode.EARLY, 8)),
        (None, 8, 8, Streaming(StreamMode.EARLY, 8)),
        (StreamMode.EARLY, None, 8, Streaming(StreamMode.EARLY, 8)),
        (StreamMode.DRAFT, None, 8, Streaming(StreamMode.DRAFT, 8)),
    ],
)
def test_the_plan_says_how_many_tokens_are_held(
    mode: StreamMode | None, hold_tokens: int | None, planned: int, wanted: Streaming
) -> None:
    assert streaming_of(mode, hold_tokens, None, planned) == wanted


@pytest.mark.parametrize(("hold_tokens", "planned"), [(4, 8), (16, 8), (0, 8)])
def test_other_held_tokens_than_the_plans_are_refused(hold_tokens: int, planned: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{hold_tokens}: the plan .* first 8 .* out, or"):
        streaming_of(StreamMode.EARLY, hold_tokens, None, planned)


def test_a_deployment_that_holds_other_tokens_than_its_plan_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made = plan(("small", "large"), on=("n/small", "n/large"))
    path.write_text(plan_text(replace(made, hold_tokens=8)))
    flags = ["deploy", "--plan", str(path), "--hold-tokens", "4"]
    result = CliRunner().invoke(app, flags)
    assert isinstance(result.exception, InvalidRequest)
    assert result.exception.param == "hold_tokens"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"stages": 3}',
        '{"name": "a", "stages": [{}]}',
        '{"stages": [1]}',
        '{"name": "a", "stages": [], "escalation": 3}',
        '{"name": "a", "stages": [], "streaming": 3}',
        '{"name": "a", "stages": [], "streaming": {"hold_tokens": "x"}}',
    ],
)
def test_a_wrong_deployment_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        deployment_from_file(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("flags", [["up"], ["deploy"], ["plan", "--show"], ["plan", "--diff", "a"]])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_file_that_can_not_be_read_is_one_line(
    flags: list[str],
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = str(tmp_path / "missing")
    last = [missing] if flags[0] == "plan" else ["--plan", missing]
    flags = [missing if each == "a" else each for each in flags]
    monkeypatch.setattr(sys, "argv", ["gearfall", *flags, *last, *(["--json"] if as_json else [])])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    told = json.loads(said.out)["error"]["message"] if as_json else said.err
    assert caught.value.code == 1
    assert f"{missing}: No such file" in told


@pytest.mark.parametrize("flags", [["up"], ["deploy"]])
def test_a_plan_that_is_no_text_is_refused(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xf6\xc1")
    result = CliRunner().invoke(app, [*flags, "--plan", str(path)])
    assert isinstance(result.exception, InvalidRequest)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB")]
)
def test_sizes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert bytes_text(count) == text
