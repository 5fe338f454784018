"""Who waits to lead keeps the fleet's index true meanwhile, so that the first decision is quick."""

from collections.abc import Callable

from gearfall.infra.state.change_feed import ChangeFeed
from gearfall.infra.state.cluster import Cluster
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from services.scheduler.fleet_follower import FleetFollower


class Standby:
    """Follows what the leader follows and decides nothing; who leads goes on from its fleet."""

    def __init__(
        self,
        cluster: Cluster,
        feed: ChangeFeed,
        follower: FleetFollower,
        policy: SchedulerPolicy,
        clock: Callable[[], float],
    ) -> None:
        self._cluster = cluster
        self._policy = policy
        self._clock = clock
        self.feed = feed
        self.follower = follower

    async def run(self) -> None:
        """Follow until it is cancelled. Raises Internal when the view no longer follows."""
        while True:
            await self.feed.wait()
            self._cluster.check_follows()
            self.follower.take_in(self.feed.take())
            self.follower.fleet.keep_warm(self._policy, self._clock())
