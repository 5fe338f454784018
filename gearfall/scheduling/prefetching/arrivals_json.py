"""Arrival histories as the JSON that one leader leaves for the next (`learned/arrivals`).

Most of a history is zeros: bins and slots that hold something are written as (index, value).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.scheduling.prefetching.forecast import GAP_EDGES_S, SEASON_SLOTS, ArrivalHistory

MAX_BYTES = 1_000_000
"""Of one value: cluster state refuses more than 1.5 MB."""
DIGITS = 4
"""Significant ones of a bin's or slot's weight."""

_Name = Annotated[str, msgspec.Meta(max_length=512)]
_Time = Annotated[float, msgspec.Meta(ge=0.0, le=1e11)]
_Weight = Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]
_Slot = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Gap = Annotated[int, msgspec.Meta(ge=0, lt=len(GAP_EDGES_S))]
_SeasonSlot = Annotated[int, msgspec.Meta(ge=0, lt=SEASON_SLOTS)]


class _History(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    model: _Name
    first_unix_s: _Time
    last_unix_s: _Time
    rate_per_s: _Weight
    gaps: Annotated[list[tuple[_Gap, _Weight]], msgspec.Meta(max_length=len(GAP_EDGES_S))]
    slot: _Slot
    slot_jobs: _Weight
    season: Annotated[list[tuple[_SeasonSlot, _Weight]], msgspec.Meta(max_length=SEASON_SLOTS)]


def arrivals_to_json(histories: Mapping[ModelName, ArrivalHistory]) -> str:
    """Return the histories as JSON of at most MAX_BYTES: the models that were wanted last."""
    newest = sorted(histories.items(), key=lambda item: (-item[1].last_unix_s, item[0]))
    kept: list[bytes] = []
    size_bytes = 2
    for model, history in newest:
        text = msgspec.json.encode(_written(model, history))
        size_bytes += len(text) + 1
        if size_bytes > MAX_BYTES:
            break
        kept.append(text)
    return (b"[" + b",".join(kept) + b"]").decode()


def arrivals_from_json(text: str) -> dict[ModelName, ArrivalHistory]:
    """Return the histories; InvalidRequest for what `arrivals_to_json` would not write."""
    try:
        found = msgspec.json.decode(text, type=list[_History])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"these are no arrivals: {error}") from error
    return {
        ModelName(each.model): ArrivalHistory(
            first_unix_s=each.first_unix_s,
            last_unix_s=each.last_unix_s,
            rate_per_s=each.rate_per_s,
            gaps=_dense(each.gaps, len(GAP_EDGES_S)),
            slot=each.slot,
            slot_jobs=each.slot_jobs,
            season=_dense(each.season, SEASON_SLOTS),
        )
        for each in found
    }


def _written(model: ModelName, history: ArrivalHistory) -> _History:
    return _History(
        model,
        history.first_unix_s,
        history.last_unix_s,
        history.rate_per_s,
        _sparse(history.gaps),
        history.slot,
        history.slot_jobs,
        _sparse(history.season),
    )


def _sparse(weights: Sequence[float]) -> list[tuple[int, float]]:
    rounded = ((index, float(f"{weight:.{DIGITS}g}")) for index, weight in enumerate(weights))
    return [(index, weight) for index, weight in rounded if weight]


def _dense(pairs: Sequence[tuple[int, float]], length: int) -> tuple[float, ...]:
    weights = [0.0] * length
    for index, weight in pairs:
        weights[index] = weight
    return tuple(weights)
