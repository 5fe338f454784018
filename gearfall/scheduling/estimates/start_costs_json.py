"""Start costs as the JSON that one leader leaves for the next (`learned/starts`)."""

from dataclasses import astuple
from typing import Annotated

import msgspec

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.robust_line import Line
from gearfall.scheduling.estimates.start_costs import (
    KEPT_OUTCOMES,
    NEWEST,
    NEWEST_CANARIES,
    NEWEST_LOADS,
    StartCosts,
    StartOutcome,
    canary_line_through,
)

MAX_BYTES = 1_000_000
"""Of one value: cluster state refuses more than 1.5 MB."""
KEPT_OUTCOMES_WRITTEN = 64
KEPT_FIXED = 8_000
"""Models by tier and node that are written, the ones started last."""

_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e7)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
_Name = Annotated[str, msgspec.Meta(max_length=512)]
_Few = Annotated[list[_Seconds], msgspec.Meta(min_length=1, max_length=NEWEST)]
_Loads = Annotated[
    list[tuple[_Bytes, _Seconds]], msgspec.Meta(min_length=1, max_length=NEWEST_LOADS)
]


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    fixed: list[tuple[_Name, Tier, _Name, _Few]]
    loads: list[tuple[_Name, Tier, _Loads]]
    load_lines: list[tuple[_Name, Tier, _Seconds, _Seconds]]
    by_size: list[tuple[Tier, _Seconds, _Seconds]]
    outcomes: Annotated[
        list[tuple[_Name, _Name, _Seconds, _Seconds, Tier, _Bytes, _Seconds]],
        msgspec.Meta(max_length=KEPT_OUTCOMES),
    ]
    canaries: Annotated[
        list[tuple[_Bytes, _Seconds]], msgspec.Meta(max_length=NEWEST_CANARIES)
    ] = []


def costs_to_json(costs: StartCosts) -> str:
    """Return the costs as JSON of at most MAX_BYTES, what was learned last first to stay."""
    kept_fixed, kept_outcomes = KEPT_FIXED, KEPT_OUTCOMES_WRITTEN
    while True:
        text = msgspec.json.encode(_document(costs, kept_fixed, kept_outcomes))
        if len(text) <= MAX_BYTES or kept_fixed == 0:
            return text.decode()
        kept_fixed //= 2


def costs_from_json(text: str) -> StartCosts:
    """Return the costs; InvalidRequest for anything that `costs_to_json` would not write."""
    try:
        document = msgspec.json.decode(text, type=_Document)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"these are no start costs: {error}") from error
    return StartCosts(
        fixed={
            (ModelName(model), tier, NodeId(node)): tuple(seconds)
            for model, tier, node, seconds in document.fixed
        },
        loads={
            (NodeId(node), tier): tuple((size, s) for size, s in loads)
            for node, tier, loads in document.loads
        },
        load_lines={
            (NodeId(node), tier): Line(fixed, slope)
            for node, tier, fixed, slope in document.load_lines
        },
        by_size={tier: Line(fixed, slope) for tier, fixed, slope in document.by_size},
        outcomes=tuple(
            StartOutcome(ModelName(each[0]), WorkerId(each[1]), *each[2:])
            for each in document.outcomes
        ),
        canaries=tuple(document.canaries),
        canary_line=canary_line_through(tuple(document.canaries)),
    )


def _document(costs: StartCosts, kept_fixed: int, kept_outcomes: int) -> _Document:
    newest = list(costs.fixed.items())[-kept_fixed:] if kept_fixed else []
    return _Document(
        fixed=[(*key, list(seconds)) for key, seconds in newest],
        loads=[(*key, list(loads)) for key, loads in costs.loads.items()],
        load_lines=[(*k, line.fixed_s, line.s_per_byte) for k, line in costs.load_lines.items()],
        by_size=[(tier, line.fixed_s, line.s_per_byte) for tier, line in costs.by_size.items()],
        outcomes=[astuple(outcome) for outcome in costs.outcomes[-kept_outcomes:]],
        canaries=list(costs.canaries),
    )
