"""Questions for profiling: readable as `gearfall profile` reads them, none of the comparison's."""

from pathlib import Path

from gearfall.cli.demo_queries import queries
from gearfall.demo.catalogue import demo_questions
from gearfall.profiling.queries import parse_queries


def test_the_questions_can_be_profiled_and_are_not_those_of_the_test(tmp_path: Path) -> None:
    out = tmp_path / "queries.jsonl"
    queries(out, 200)
    found = parse_queries(out.read_text().splitlines())
    assert 180 <= len(found) <= 200
    assert all(each.judge(str(eval(each.prompt.removesuffix("=")))) == 1.0 for each in found)
    assert not {each.prompt for each in found} & {each.prompt for each in demo_questions(1000)}
