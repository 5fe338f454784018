"""Profiles made elsewhere: CSV with a row for each query and model.

Columns: query, model, correct, confidence, cost; latency is optional. `correct` in [0, 1],
`confidence` in [0, 1], `cost` in any one unit, `latency` in seconds. Every model answers every
query.
"""

import csv
import io
from collections.abc import Mapping, Sequence

from gearfall.core.errors import InvalidRequest
from gearfall.core.profile import Generation, Profile, ProfiledModel, check_profile

NEEDED = ("query", "model", "correct", "confidence", "cost")
OPTIONAL = ("latency",)


def import_csv(text: str, *, made_unix_s: float, cost_unit: str) -> Profile:
    """Return the profile. Raises InvalidRequest naming the row and what to change."""
    rows = csv.DictReader(io.StringIO(text), strict=True)
    _check_columns(rows.fieldnames or ())
    found: dict[str, dict[str, Generation]] = {}
    queries: dict[str, None] = {}
    try:
        for number, row in enumerate(rows, start=2):
            query, model = row["query"], row["model"]
            if not query or not model or None in row:
                raise InvalidRequest(f"row {number}: a query, a model and no further columns")
            answers = found.setdefault(model, {})
            if query in answers:
                raise InvalidRequest(f"row {number}: {model} answers {query} a second time")
            answers[query] = _generation(number, row)
            queries[query] = None
    except csv.Error as error:
        raise InvalidRequest(f"this is no CSV: {error}") from error
    for model, answers in found.items():
        missing = [query for query in queries if query not in answers]
        if missing:
            raise InvalidRequest(
                f"{model} has no answer to {missing[0]} ({len(missing)} such); every model must "
                "answer every query"
            )
    models = tuple(
        ProfiledModel(model, generations=tuple(answers[query] for query in queries))
        for model, answers in found.items()
    )
    profile = Profile(made_unix_s, cost_unit, tuple(queries), models)
    check_profile(profile)
    return profile


def _check_columns(names: Sequence[str]) -> None:
    missing = [name for name in NEEDED if name not in names]
    unknown = [name for name in names if name not in (*NEEDED, *OPTIONAL)]
    if missing or unknown:
        raise InvalidRequest(
            f"columns {', '.join(names) or 'none'}: missing {', '.join(missing) or 'none'}, "
            f"unknown {', '.join(unknown) or 'none'}; a profile has {', '.join(NEEDED)} and may "
            "have latency"
        )


def _generation(number: int, row: Mapping[str, str | None]) -> Generation:
    return Generation(
        quality=_number(number, row, "correct"),
        cost=_number(number, row, "cost"),
        prompt_tokens=0,
        output_tokens=0,
        certainty=_number(number, row, "confidence"),
        latency_s=_number(number, row, "latency") if row.get("latency") else 0.0,
    )


def _number(number: int, row: Mapping[str, str | None], column: str) -> float:
    try:
        return float(row[column] or "")
    except ValueError:
        raise InvalidRequest(f"row {number}: {column} {row[column]!r} is no number") from None
