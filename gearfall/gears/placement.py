"""Which worker holds which model, so that every gear can be served without moving anything.

A mixed-integer program (HiGHS through scipy). Binary x[k, w]: worker w holds model k. Load
y[g, k, w] in tokens a second: of model k in gear g on worker w. Minimise the highest utilisation t:

    sum_k memory[k, w] x[k, w]          <= memory of w          for each w
    sum_k x[k, w]                       <= replicas of w        for each w
    sum_w y[g, k, w]                     = demand[g, k]          for each g, k
    y[g, k, w]                          <= demand[g, k] x[k, w]  for each g, k, w
    sum_k y[g, k, w] / speed[k, w]      <= t                     for each g, w

Shifting a gear then moves shares of load, never weights: as in CascadeServe (arXiv 2406.14424) one
placement serves all gears. Of equal t fewer replicas are better: they cost memory, and their sum
enters with a weight too small to change t by more than a thousandth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import PlacedReplicas

TIME_LIMIT_S = 20.0
_TIDY = 1e-3
_TRACE = 1e-6
"""Shares below this are none."""


@dataclass(frozen=True, slots=True)
class Host:
    """A worker as far as placement is concerned."""

    name: str
    node: str
    memory_bytes: int
    max_replicas: int


@dataclass(frozen=True, slots=True)
class Placeable:
    """A model as far as placement is concerned."""

    name: str
    memory_bytes: int
    """Of one replica: weights, keys and values, process."""
    speed: Mapping[str, float]
    """By worker: tokens a second that a replica there computes when it has the worker alone."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the models are and how each gear's load is shared."""

    replicas: tuple[PlacedReplicas, ...]
    by_worker: tuple[tuple[str, str], ...]
    """(worker, model)."""
    shares: tuple[Mapping[str, Mapping[str, float]], ...]
    """By gear, model and node; adding up to 1."""
    utilisation: tuple[float, ...]
    """By gear: of the busiest worker. Above 1 the gear's load can't be served."""


def place_models(
    hosts: Sequence[Host],
    models: Sequence[Placeable],
    demand: Sequence[Mapping[str, float]],
) -> Placement:
    """Return the placement with the lowest highest utilisation.

    demand: by gear, tokens a second of each model. Raises InvalidRequest when the models do not fit
    together, saying what is missing, or when no solution was found in time.
    """
    _check(hosts, models, demand)
    problem = _Problem(hosts, models, demand)
    solved = problem.solve()
    if solved.x is None:
        if solved.status == 2:
            raise InvalidRequest(_why_not(hosts, models), param="nodes")
        raise InvalidRequest(
            f"no placement was found within {TIME_LIMIT_S:g} s ({solved.message}); plan for fewer "
            "gears or fewer models",
            param="nodes",
        )
    return problem.read(np.asarray(solved.x))


class _Problem:
    """The program's matrices; columns are x[k, w], then y[g, k, w], then t."""

    def __init__(
        self,
        hosts: Sequence[Host],
        models: Sequence[Placeable],
        demand: Sequence[Mapping[str, float]],
    ) -> None:
        self._hosts, self._models, self._demand = hosts, models, demand
        self._places = len(models) * len(hosts)
        self._columns = self._places * (1 + len(demand)) + 1
        self._rows: list[dict[int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def solve(self) -> Any:
        """Return scipy's result, which has no types."""
        self._add_capacity()
        for gear in range(len(self._demand)):
            self._add_gear(gear)
        rows = [at for at, row in enumerate(self._rows) for _ in row]
        columns = [column for row in self._rows for column in row]
        values = [value for row in self._rows for value in row.values()]
        matrix = sparse.csr_array((values, (rows, columns)), (len(self._rows), self._columns))
        cost = np.zeros(self._columns)
        cost[-1] = 1.0
        cost[: self._places] = _TIDY / max(1, self._places)
        whole = np.zeros(self._columns)
        whole[: self._places] = 1
        upper = np.full(self._columns, np.inf)
        upper[: self._places] = 1.0
        return milp(
            cost,
            integrality=whole,
            bounds=Bounds(np.zeros(self._columns), upper),
            constraints=LinearConstraint(matrix, np.array(self._low), np.array(self._high)),
            options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": 1e-3},
        )

    def read(self, solution: npt.NDArray[np.float64]) -> Placement:
        """Return the solution in words."""
        held = [
            (host, model)
            for w, host in enumerate(self._hosts)
            for k, model in enumerate(self._models)
            if solution[self._x(k, w)] > 0.5
        ]
        counts: dict[tuple[str, str], int] = {}
        for host, model in held:
            counts[host.node, model.name] = counts.get((host.node, model.name), 0) + 1
        gears = range(len(self._demand))
        return Placement(
            tuple(
                PlacedReplicas(node, name, count) for (node, name), count in sorted(counts.items())
            ),
            tuple((host.name, model.name) for host, model in held),
            tuple(self._shares(solution, gear) for gear in gears),
            tuple(self._utilisation(solution, gear) for gear in gears),
        )

    def _add_capacity(self) -> None:
        for w, host in enumerate(self._hosts):
            columns = [self._x(k, w) for k in range(len(self._models))]
            memory = [float(model.memory_bytes) / host.memory_bytes for model in self._models]
            self._add(dict(zip(columns, memory, strict=True)), high=1.0)
            self._add(dict.fromkeys(columns, 1.0), high=float(host.max_replicas))

    def _add_gear(self, gear: int) -> None:
        hosts = range(len(self._hosts))
        for k, model in enumerate(self._models):
            wanted = self._demand[gear].get(model.name, 0.0)
            if wanted <= 0.0:
                self._add({self._y(gear, k, w): 1.0 for w in hosts}, high=0.0)
                continue
            # Loads in units of their demand: numbers of one size, whatever the tokens.
            self._add({self._y(gear, k, w): 1.0 for w in hosts}, low=1.0, high=1.0)
            for w in hosts:
                self._add({self._y(gear, k, w): 1.0, self._x(k, w): -1.0}, high=0.0)
        for w, host in enumerate(self._hosts):
            row = {
                self._y(gear, k, w): self._demand[gear].get(model.name, 0.0)
                / model.speed[host.name]
                for k, model in enumerate(self._models)
            }
            self._add({**row, self._columns - 1: -1.0}, high=0.0)

    def _shares(
        self, solution: npt.NDArray[np.float64], gear: int
    ) -> Mapping[str, Mapping[str, float]]:
        found = {}
        for k, model in enumerate(self._models):
            if self._demand[gear].get(model.name, 0.0) <= 0.0:
                continue
            by_node: dict[str, float] = {}
            for w, host in enumerate(self._hosts):
                share = float(solution[self._y(gear, k, w)])
                if share > _TRACE:
                    by_node[host.node] = by_node.get(host.node, 0.0) + share
            total = sum(by_node.values())
            found[model.name] = {node: share / total for node, share in by_node.items()}
        return found

    def _utilisation(self, solution: npt.NDArray[np.float64], gear: int) -> float:
        wanted = self._demand[gear]
        return max(
            sum(
                float(solution[self._y(gear, k, w)]) * wanted.get(m.name, 0.0) / m.speed[host.name]
                for k, m in enumerate(self._models)
            )
            for w, host in enumerate(self._hosts)
        )

    def _x(self, model: int, host: int) -> int:
        return model * len(self._hosts) + host

    def _y(self, gear: int, model: int, host: int) -> int:
        return self._places * (1 + gear) + self._x(model, host)

    def _add(self, row: dict[int, float], *, high: float, low: float = -np.inf) -> None:
        self._rows.append(row)
        self._low.append(low)
        self._high.append(high)


def _check(
    hosts: Sequence[Host], models: Sequence[Placeable], demand: Sequence[Mapping[str, float]]
) -> None:
    if not hosts or not models or not demand:
        raise InvalidRequest("placement needs workers, models and gears", param="nodes")
    for host in hosts:
        if host.memory_bytes <= 0 or host.max_replicas < 1:
            raise InvalidRequest(
                f"worker {host.name}: {host.memory_bytes} bytes for {host.max_replicas} replicas; "
                "it can hold nothing",
                param="nodes",
            )
    largest = max(host.memory_bytes for host in hosts)
    names = {model.name for model in models}
    for model in models:
        if not 0 < model.memory_bytes <= largest:
            raise InvalidRequest(
                f"{model.name} needs {model.memory_bytes} bytes; the largest worker has {largest}",
                param="models",
            )
        slow = [host.name for host in hosts if not 0.0 < model.speed.get(host.name, 0.0) < np.inf]
        if slow:
            raise InvalidRequest(
                f"{model.name} has no speed on worker {slow[0]}: profile it there", param="models"
            )
    for gear, wanted in enumerate(demand):
        unknown = sorted(set(wanted) - names)
        if unknown or not all(0.0 <= load < np.inf for load in wanted.values()):
            raise InvalidRequest(
                f"gear {gear} demands {dict(wanted)}; finite loads of known models are needed",
                param="demand",
            )


def _why_not(hosts: Sequence[Host], models: Sequence[Placeable]) -> str:
    needed = sum(model.memory_bytes for model in models)
    there = sum(host.memory_bytes for host in hosts)
    slots = sum(host.max_replicas for host in hosts)
    return (
        f"the gears' models do not fit together: one replica of each needs {needed} bytes and "
        f"{len(models)} places, the workers have {there} bytes and {slots} places, each with "
        f"at most {max(host.memory_bytes for host in hosts)} bytes. Add memory or a worker, or "
        "plan with fewer models"
    )
