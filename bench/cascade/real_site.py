"""What `bench.cascade real` and `simulated` set up, cluster, profile and plans; and one run."""

import argparse
import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench.cascade.real_cluster import (
    COMPANIONS,
    RealCluster,
    deployed,
    keep_replicas,
    running_cluster,
)
from bench.cascade.real_console import say
from bench.cascade.real_figures import Run
from bench.cascade.real_load import replay
from bench.cascade.real_machine import MachineSample, sampling
from bench.cascade.real_prediction import AS_PROFILED, Predictor
from bench.cascade.real_probe import PROFILED, Pace, at_pace, probe
from bench.cascade.real_served import (
    Shape,
    Slowness,
    pieces_of,
    references,
    slowness,
    steps_by_node,
)
from bench.cascade.real_systems import OURS, Wanted, gearfall, make_plans
from bench.cascade.real_work import (
    Window,
    lines_of,
    profiled_questions,
    unseen_questions,
    window_of,
)
from gearfall.cli.simulate import read_trace
from gearfall.core.gears.gear_plan import GearPlan, plan_text
from gearfall.core.profile import Profile, parse_profile
from gearfall.demo.arithmetic import Question
from services.worker.engine.step_log import read_step_logs

SHARED = Path(__file__).parents[3] / "shared"
TRACE = SHARED / "data" / "traces" / "AzureLLMInferenceTrace_conv_2023.csv.gz"
TRACE_PART_S = (0.0, 3480.0)
"""Of the trace: all but its last, broken minute."""
QUESTIONS = 2000
QUIET_S = 2.0
"""Before a run: what the one before left behind ends, and the plan is followed."""
P95_OF_ALONE = 4.0
"""The latency target, in mean answers of the largest model when nobody else asks."""
PLANNED_SHARE = 0.6
"""Of that target is what plans are made for: load moves before a gear does."""
LOADS = (0.15, 0.3, 0.5, 0.75, 1.0)
"""Of the highest load that is planned for: the gears."""


def new_directory(text: str) -> Path:
    """Return the path of a directory to be made; refuse what exists before anything is measured."""
    path = Path(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{text} exists, a new directory is wanted")
    return path


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    trace: Path
    seconds: float
    """Of each replay."""
    rounds: int
    queries: int
    """Asked of each model for the profile."""
    peak: float
    """Highest load that is planned for, in requests that the largest model can serve."""
    companions: str
    """A size of COMPANIONS."""

    @staticmethod
    def flags(program: str, text: str | None) -> argparse.ArgumentParser:
        """Return the flags that both benches have."""
        parser = argparse.ArgumentParser(prog=program, description=text)
        parser.add_argument("--trace", type=Path, default=TRACE)
        parser.add_argument("--seconds", type=float, default=20.0, help="Of each replay.")
        parser.add_argument("--rounds", type=int, default=2)
        parser.add_argument("--queries", type=int, default=800, help="Asked for the profile.")
        parser.add_argument("--peak", type=float, default=2.0, help="Of the largest's capacity.")
        parser.add_argument(
            "--keep", type=new_directory, help="A new directory for all that is measured."
        )
        parser.add_argument(
            "--companions",
            choices=tuple(COMPANIONS),
            default="usual",
            help="Up to 255 or 680 million parameters; the large ones serve fewer requests a "
            "second: ask for longer replays.",
        )
        return parser

    @staticmethod
    def of(chosen: argparse.Namespace) -> "Settings":
        """Return parsed flags as a value."""
        return Settings(
            chosen.trace,
            chosen.seconds,
            chosen.rounds,
            chosen.queries,
            chosen.peak,
            chosen.companions,
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """A run with what the machine did meanwhile."""

    run: Run
    per_s: float
    is_profiled: bool
    begun_s: float
    """On the monotonic clock."""
    samples: tuple[MachineSample, ...]


@dataclass(frozen=True, slots=True)
class Site:
    """Everything that is set up once."""

    cluster: RealCluster
    window: Window
    questions: tuple[Question, ...]
    """That nothing here has seen."""
    profiled: tuple[Question, ...]
    """Those of the profile, in its order."""
    predictor: Predictor
    plans: Mapping[str, GearPlan]
    p95_s: float
    """The latency target."""
    large_per_s: float
    """Requests a second that the largest model can serve on all workers."""
    highest_per_s: float
    """That is planned for."""
    known: Mapping[Shape, float]
    """What steps took while the profile was measured."""
    kept: list[Kept] = field(default_factory=list)
    """All that was measured."""

    async def measure(
        self, system: str, number: int, per_s: float, seconds: float, *, is_profiled: bool = False
    ) -> Run:
        """Deploy a system alone, replay the trace on it, and remove it.

        `is_profiled`: ask the profile's own questions, each when a prediction has it come.
        """
        questions = self.profiled if is_profiled else self.questions
        prompts = [len(each.prompt) for each in questions]
        asks = self.window.asks(per_s, seconds, prompts)
        began_s = time.perf_counter()
        async with deployed(self.cluster.client, self.plans[system]):
            await asyncio.sleep(QUIET_S)
            async with sampling(self.cluster.pids) as samples:
                found = await replay(self.cluster, system, asks, questions)
        say(f"round {number + 1}: {system}, {len(asks)} requests, {per_s:.1f}/s", began_s)
        slow = await self._slowness(samples, found.begun_s)
        run = Run(system, number, found.outcomes, found.device_s, slow)
        self.kept.append(Kept(run, per_s, is_profiled, found.begun_s, tuple(samples)))
        return run

    async def _slowness(
        self, samples: Sequence[MachineSample], begun_s: float
    ) -> Mapping[str, Slowness]:
        """Return how slow each worker was, from when a run began."""
        engines = await self.cluster.engines()
        steps = steps_by_node(read_step_logs(self.cluster.step_logs, begun_s), engines)
        return {
            node: slowness(steps.get(node, ()), pieces_of(samples, node), self.known, begun_s)
            for node in self.cluster.worker_pids
        }

    async def probe(self) -> Pace:
        """Measure how fast the cluster is now; nobody asks it for anything else meanwhile."""
        return await probe(self.cluster.client, self.predictor.profile, self.predictor.workers)

    def predict(
        self,
        system: str,
        per_s: float,
        seconds: float,
        pace: Pace = PROFILED,
        slow: Mapping[str, Slowness] = AS_PROFILED,
    ) -> Run:
        """Return what the simulator says of such a run, at the profile's speed or another."""
        predictor = replace(self.predictor, profile=at_pace(self.predictor.profile, pace))
        plan = self.plans[system]
        return predictor.predict(plan, self.window, per_s, seconds, system, slowness=slow)


@asynccontextmanager
async def site(settings: Settings, scratch: Path, keep: Path | None = None) -> AsyncIterator[Site]:
    """Start the cluster, profile, plan, and have a replica of every model on every worker.

    What was measured is kept in the directory `keep`, where there is one.
    """
    window = window_of(read_trace(settings.trace), *TRACE_PART_S)
    began_s = time.perf_counter()
    async with running_cluster(scratch, COMPANIONS[settings.companions]) as cluster:
        say("the cluster is up", began_s)
        profiled = profiled_questions(settings.queries)
        profile = await _profiled(cluster, profiled, scratch)
        steps = steps_by_node(read_step_logs(cluster.step_logs), await cluster.engines())
        known = references(step for found in steps.values() for step in found)
        say(f"profiled with {len(profile.queries)} queries", began_s)
        predictor = Predictor(profile, len(cluster.worker_pids))
        large = cluster.models[-1]
        large_per_s = predictor.capacity_per_s(large)
        highest = settings.peak * large_per_s * predictor.tokens(large)
        p95_s = round(P95_OF_ALONE * predictor.alone_s(large), 2)
        wanted = Wanted(PLANNED_SHARE * p95_s, tuple(share * highest for share in LOADS))
        plans = await make_plans(cluster, scratch / "profile.json", predictor, wanted)
        last = plans[OURS].gears[-1]
        highest_per_s = last.max_load / predictor.tokens(last.stages[0].model)
        target = f"p95 <= {p95_s:g} s, {PLANNED_SHARE:.0%} of it"
        say(f"planned for {target}, up to {highest_per_s:.0f} requests/s", began_s)
        await keep_replicas(cluster.client, cluster.models, len(cluster.worker_pids))
        say("every model is ready on every worker", began_s)
        questions = unseen_questions(QUESTIONS)
        there = Site(
            cluster=cluster,
            window=window,
            questions=questions,
            profiled=profiled,
            predictor=predictor,
            plans=plans,
            p95_s=p95_s,
            large_per_s=large_per_s,
            highest_per_s=highest_per_s,
            known=known,
        )
        yield there
        if keep is not None:
            _keep(there, await cluster.engines(), scratch, keep)


def _keep(
    there: Site, engines: Mapping[int, tuple[str, str]], scratch: Path, directory: Path
) -> None:
    """Write down what a replay in simulated time needs, and the steps of all engines."""
    directory.mkdir(parents=True)
    shutil.copy(scratch / "profile.json", directory)
    shutil.copytree(there.cluster.step_logs, directory / "steps")
    for name, plan in there.plans.items():
        (directory / f"plan-{name}.json").write_text(plan_text(plan))
    runs = [asdict(each) for each in there.kept]
    found = {"p95_s": there.p95_s, "engines": engines, "runs": runs}
    (directory / "runs.json").write_text(json.dumps(found))


async def _profiled(cluster: RealCluster, questions: Sequence[Question], scratch: Path) -> Profile:
    """Profile on one replica of each model, alone."""
    await keep_replicas(cluster.client, cluster.models, 1)
    asked, out = scratch / "queries.jsonl", scratch / "profile.json"
    asked.write_text(lines_of(questions))
    await gearfall(
        cluster, "profile", *cluster.models, "--queries", asked, "--at-once", 16, "--out", out
    )
    return parse_profile(out.read_bytes())
