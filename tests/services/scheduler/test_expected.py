"""What is on its way counts, whatever order its answer and the watch come in."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import PrefetchRecord
from gearfall.core.tiers import Tier
from gearfall.infra.state.change_feed import Change, ChangeFeed
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.scheduling.actions import Assign, Unwish, Wish
from services.scheduler.fleet_follower import FleetFollower
from tests.gearfall.scheduling.clusters import assignment
from tests.services.scheduler.loop_fleet import ScriptedLinks
from tests.services.scheduler.test_fleet_follower import follower

KEYS = tuple((NodeId("n"), ModelName(name)) for name in ("a", "b"))


def wish(key: tuple[NodeId, ModelName], number: int) -> PrefetchRecord:
    return PrefetchRecord(*key, Tier.DRAM, f"wish {number}", 0.0)


class PlayedState:
    """Cluster state with one writer: writes are issued, then taken, then answered.

    What may not be issued beside what is on its way is written once all of that has settled.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.records: dict[tuple[NodeId, ModelName], PrefetchRecord] = {}
        self.views = [ClusterView(revision=0)]
        self.feed = ChangeFeed(self.views[0])
        self.fed: FleetFollower = follower_without_links()
        self.issued: dict[tuple[NodeId, ModelName], PrefetchRecord | None] = {}
        self.untaken: list[tuple[tuple[NodeId, ModelName], Callable[[int], None]]] = []
        self.unanswered: list[tuple[int, Callable[[int], None]]] = []

    def issue(self, key: tuple[NodeId, ModelName], number: int | None) -> None:
        step = Unwish(key, "") if number is None else Wish(wish(key, number))
        if not self.fed.may_expect((step,)):
            self.settle()
            self.issued[key] = None if number is None else wish(key, number)
            self.happen(key)
            self.follow()
            return
        self.issued[key] = None if number is None else wish(key, number)
        self.untaken.append((key, self.fed.expect((step,))))

    def take(self) -> None:
        """Let the oldest write happen: the watch tells of it."""
        if not self.untaken:
            return
        key, on_seen = self.untaken.pop(0)
        self.happen(key)
        self.unanswered.append((self.revision, on_seen))

    def happen(self, key: tuple[NodeId, ModelName]) -> None:
        self.revision += 1
        record = self.issued[key]
        if record is None:
            self.records.pop(key, None)
        else:
            self.records[key] = record
        self.views.append(ClusterView(prefetch=dict(self.records), revision=self.revision))
        self.feed.add((Change("prefetch", key, record),), self.revision)

    def answer(self) -> None:
        if self.unanswered:
            revision, on_seen = self.unanswered.pop(0)
            on_seen(revision)

    def settle(self) -> None:
        while self.untaken or self.unanswered:
            self.take()
            self.answer()

    def follow(self) -> None:
        self.fed.take_in(self.feed.take())

    def check(self) -> None:
        """The fleet holds what was last issued, taken and answered or not."""
        held = self.fed.fleet.records.prefetch
        assert held == {key: each for key, each in self.issued.items() if each is not None}


def follower_without_links() -> FleetFollower:
    return follower(ScriptedLinks())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("issue"), st.sampled_from(KEYS), st.none() | st.integers(1, 9)),
        st.sampled_from([("take",), ("answer",), ("follow",), ("list anew",)]),
    ),
    max_size=40,
)


@given(STEPS)
def test_the_fleet_holds_what_was_issued_last(steps) -> None:
    state = PlayedState()
    state.follow()
    for name, *values in steps:
        if name == "issue":
            state.issue(*values)
        elif name == "list anew":
            state.feed.restart(state.views[-1])
        else:
            getattr(state, name)()
        state.check()
    state.settle()
    state.follow()
    state.check()
    assert state.fed.may_expect([Unwish(key, "") for key in KEYS]), "nothing is on its way"


def test_what_another_one_wrote_since_is_what_stands() -> None:
    fed = follower_without_links()
    fed.take_in(ChangeFeed(ClusterView()).take())
    feed = ChangeFeed(ClusterView())
    feed.take()
    made = assignment()
    key = (made.worker_id, made.model)
    on_seen = fed.expect((Assign(made),))
    feed.add((Change("assignments", key, made), Change("assignments", key, None)), 2)
    fed.take_in(feed.take())
    assert fed.fleet.records.assignments == {key: made}, "that may be older than the write"
    on_seen(1)
    fed.take_in(feed.take())
    assert fed.fleet.records.assignments == {}


def test_what_waited_is_forgotten_once_something_newer_came() -> None:
    fed, feed = follower_without_links(), ChangeFeed(ClusterView())
    fed.take_in(feed.take())
    made = assignment()
    key = (made.worker_id, made.model)
    on_seen = fed.expect((Assign(made),))
    feed.add((Change("assignments", key, made),), 1)
    fed.take_in(feed.take())
    on_seen(1)
    feed.add((Change("assignments", key, None),), 2)
    fed.take_in(feed.take())
    assert fed.fleet.records.assignments == {}
