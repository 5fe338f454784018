"""What holds over time, whatever comes: everybody is served, nothing is given twice, moves end."""

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gearfall.core.generation.job import Priority
from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.scheduling.actions import Assign
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.gear_wishes import missing_on
from tests.gearfall.scheduling.clusters import MIB, demand, deployment, model, node, worker
from tests.gearfall.scheduling.plans import plan, plan_record, vote
from tests.gearfall.scheduling.small_world import POLICY, SmallWorld

MODELS = tuple(map(ModelName, ("m0", "m1", "m2", "m3")))
WORKERS = tuple(map(WorkerId, ("w0", "w1", "w2", "w3")))
NODES = ("n0", "n1")


@st.composite
def clusters(draw):
    """Records of two nodes, some workers, four models and some deployments."""
    records: list[tuple[str, Any]] = []
    for name in NODES:
        resident = draw(st.lists(st.sampled_from(MODELS), unique=True))
        on_ssd = draw(st.sampled_from((None, (), MODELS)))
        speed = draw(st.sampled_from((0.0, 1e8, 1e10)))
        made = node(name, resident=resident, on_ssd=on_ssd, remote_bytes_per_s=speed)
        records.append(("nodes", made))
    for name in MODELS:
        size = draw(st.integers(1, 500)) * MIB
        nodes = draw(st.sampled_from((("n0",), ("n1",), NODES)))
        source = draw(st.sampled_from(("/models/x", "s3://bucket/x")))
        records.append(("models", model(name, size_bytes=size, nodes=nodes, source=source)))
    for name in WORKERS[: draw(st.integers(1, 4))]:
        size = draw(st.integers(150, 1200)) * MIB
        host = worker(
            name,
            node_id=draw(st.sampled_from(NODES)),
            memory_bytes=size,
            max_replicas=draw(st.integers(1, 3)),
        )
        labels = draw(st.sampled_from(({}, {"zone": "a"})))
        records.append(("workers", replace(host, labels=labels, slots=draw(st.integers(1, 2)))))
    for name in MODELS[: draw(st.integers(0, 3))]:
        kept = deployment(
            name,
            name=f"d-{name}",
            min_replicas=draw(st.integers(0, 1)),
            max_replicas=draw(st.integers(1, 3)),
            keep_alive_s=draw(st.sampled_from((0.0, 5.0, 60.0))),
        )
        spread, labels = draw(st.booleans()), draw(st.sampled_from(({}, {"zone": "a"})))
        accelerators = draw(st.sampled_from((1, 1, 2)))
        changed = replace(kept, spread=spread, labels=labels, accelerators=accelerators)
        records.append(("deployments", changed))
    return records


arrivals = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.sampled_from(MODELS),
        st.sampled_from((5, 100, 1000)),
        st.sampled_from((Priority.INTERACTIVE, Priority.INTERACTIVE, Priority.BATCH)),
    ),
    min_size=3,
    max_size=20,
)


def fits_alone(records, name):
    """Whether an empty fleet would start the model somewhere."""
    fleet = Fleet()
    for kind, record in records:
        fleet.put(kind, record)
    fleet.put("demand", demand(name, since=0.0))
    plan = decide(fleet, StartCosts(), POLICY, 1.0)
    return any(isinstance(each, Assign) and each.assignment.model == name for each in plan.actions)


SOME = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def play(world, requests, until):
    for second in range(until):
        for _, name, tokens, priority in [each for each in requests if each[0] == second]:
            world.ask(name, tokens, priority)
        world.tick()


@SOME
@given(clusters(), arrivals)
def test_every_waiting_model_is_served_when_it_fits_somewhere(records, requests):
    # Replicas that must be kept may leave no room; that they are kept is the next test's.
    records = [
        (kind, replace(record, min_replicas=0) if kind == "deployments" else record)
        for kind, record in records
    ]
    world = SmallWorld(*records)
    play(world, requests, 60)
    hopeless = {name for name in MODELS if not fits_alone(records, name)}
    for _ in range(900):
        if all(job.model in hopeless for job in world.jobs):
            break
        world.tick()
    assert {job.model for job in world.jobs} <= hopeless
    assert not world.records.moves or world.jobs
    # Replicas stay for a while each time: a slot sees a bounded number of starts.
    slots = sum(each.max_replicas for each in world.records.workers.values())
    lived_s = world.now - 1000.0
    assert sum(world.starts.values()) <= slots * (2 + lived_s)


@SOME
@given(clusters(), arrivals)
def test_min_replicas_are_kept_once_they_are_there(records, requests):
    world = SmallWorld(*records)
    kept: set[ModelName] = set()
    for second in range(90):
        for _, name, tokens, priority in [each for each in requests if each[0] == second]:
            world.ask(name, tokens, priority)
        world.tick()
        hosted = {name for name in MODELS if world.fleet.counted(name)}
        wanted = {name for name in MODELS if world.fleet.limits_of(name).min_replicas}
        assert kept <= hosted
        kept |= hosted & wanted


@SOME
@given(
    clusters(),
    arrivals,
    st.lists(
        st.tuples(
            st.integers(0, 60),
            st.sampled_from(WORKERS),
            st.sampled_from(("lose", "drain", "hide", "show", "store")),
        ),
        max_size=5,
    ),
)
def test_nothing_is_given_twice_whoever_goes(records, requests, blows):
    world = SmallWorld(*records)
    hidden: set[WorkerId] = set()
    for second in range(150):
        for _, name, tokens, priority in [each for each in requests if each[0] == second]:
            world.ask(name, tokens, priority)
        for _, worker_id, blow in [each for each in blows if each[0] == second]:
            if blow == "lose":
                world.lose_worker(worker_id)
            elif blow == "drain":
                world.drain_worker(worker_id)
            elif blow == "store":
                world.fleet.remove("nodes", "n0")
            else:
                hidden = hidden | {worker_id} if blow == "hide" else hidden - {worker_id}
                world.fleet.set_unreachable(hidden)
        world.tick()
    for move in world.records.moves.values():
        assert world.now - move.began_unix_s < 121.0


@st.composite
def planned(draw):
    """A deployment of three models with a plan of three gears, placed anywhere."""
    nodes = {name: draw(st.lists(st.sampled_from(NODES), min_size=1, unique=True)) for name in
             MODELS[:3]}  # fmt: skip
    on = tuple(f"{node}/{name}" for name, found in nodes.items() for node in found)
    gears = [
        tuple(draw(st.lists(st.sampled_from(MODELS[:3]), min_size=1, max_size=2, unique=True)))
        for _ in range(3)
    ]
    kept = deployment("m0", name="chat", keep_alive_s=draw(st.sampled_from((0.0, 5.0, 60.0))))
    return [("deployments", kept), ("gear_plans", plan_record(plan(*gears, on=on)))]


def _taken(world: SmallWorld, name: ModelName) -> set[NodeId]:
    """Nodes where a replica was taken back; for who waits it may be moved elsewhere, alive."""
    return {
        world.records.workers[worker_id].node_id
        for (worker_id, model), reason in world.took_back.items()
        if model == name and not reason.startswith("moves to")
    }


@settings(SOME, max_examples=15)
@given(
    clusters(),
    arrivals,
    planned(),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 2)), max_size=8),
)
def test_what_gears_want_is_kept_and_nothing_else_for_ever(records, requests, with_plan, shifts):
    """Whoever waits: what stands where the plan wants it stays while its gear is in force."""
    world = SmallWorld(*records, *with_plan)
    for second in range(160):
        for _, name, tokens, priority in [each for each in requests if each[0] == second]:
            world.ask(name, tokens, priority)
        for _, gear in [each for each in shifts if each[0] == second]:
            world.fleet.put("gear_votes", vote(gear))
        before = dict(world.fleet.gears)
        world.tick()
        for name, wish in world.fleet.gears.items():
            if wish == before.get(name):
                assert not _taken(world, name) & set(
                    missing_on(wish.by_node.items(), world.fleet.by_node(name))
                )
    for _ in range(120):  # what is idle goes, and the gears have its room
        world.tick()
    started = world.starts.copy()
    for _ in range(40):
        world.tick()
    if not world.jobs and not world.records.moves:
        assert world.starts == started, "starts for ever though nothing comes"
