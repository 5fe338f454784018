"""Labelled queries, one JSON object a line: prompt, answer, and how an answer is judged.

{"id": "q1", "prompt": "12+30=", "answer": "42", "match": "exact"}

match: `exact` (default; white space at the ends does not count), `contains`, or `regex` (the whole
answer must match). Without an id a query's name is its line number.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gearfall.core.certainty.agreement import EXACT, NORMALISED
from gearfall.core.errors import InvalidRequest

MATCHES = ("exact", "contains", "regex")


@dataclass(frozen=True, slots=True)
class LabelledQuery:
    """One query with its right answer."""

    name: str
    prompt: str
    answer: str
    match: str = "exact"

    def judge(self, text: str) -> float:
        """Return 1 for a right answer, 0 for a wrong one."""
        if self.match == "exact":
            return float(text.strip() == self.answer.strip())
        if self.match == "contains":
            return float(self.answer in text)
        return float(re.fullmatch(self.answer, text.strip()) is not None)


def agreement_rule(queries: Iterable[LabelledQuery]) -> str:
    """Return how answers to these queries are compared with each other, as strictly as judged."""
    return EXACT if all(query.match == "exact" for query in queries) else NORMALISED


def parse_queries(lines: Iterable[str]) -> tuple[LabelledQuery, ...]:
    """Return the queries. Raises InvalidRequest naming the line and what to change."""
    found: dict[str, LabelledQuery] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        query = _parse(number, line)
        if query.name in found:
            raise InvalidRequest(f"line {number}: the id {query.name} is there twice")
        found[query.name] = query
    if not found:
        raise InvalidRequest("there is no query in the file")
    return tuple(found.values())


def _parse(number: int, line: str) -> LabelledQuery:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"line {number} is no JSON: {error}") from error
    if not isinstance(value, dict) or not {"prompt", "answer"} <= value.keys():
        raise InvalidRequest(f"line {number}: an object with prompt and answer is needed")
    unknown = value.keys() - {"id", "prompt", "answer", "match"}
    if unknown or not all(isinstance(value[key], str) for key in value if key != "id"):
        raise InvalidRequest(
            f"line {number}: id, prompt, answer and match are texts; {sorted(unknown) or 'not so'}"
        )
    query = LabelledQuery(
        str(value.get("id", number)), value["prompt"], value["answer"], value.get("match", "exact")
    )
    if query.match not in MATCHES:
        raise InvalidRequest(f"line {number}: match {query.match!r} is not one of {MATCHES}")
    if not query.prompt:
        raise InvalidRequest(f"line {number}: the prompt is empty")
    if query.match == "regex":
        try:
            re.compile(query.answer)
        except re.error as error:
            raise InvalidRequest(f"line {number}: the answer is no regex: {error}") from error
    return query
