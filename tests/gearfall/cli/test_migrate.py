"""Which job `gearfall migrate` moves, and where to."""

import pytest

from gearfall.cli.migrate import find_job, find_target
from gearfall.core.errors import NotFound
from gearfall.pb import common_pb2
from gearfall.pb import worker_pb2 as pb

READY, LOADING = common_pb2.REPLICA_STATE_READY, common_pb2.REPLICA_STATE_LOADING


def worker(name, *, running=0, state=READY, jobs=(), model="m"):
    replica = common_pb2.Replica(model=model, state=state, slots=4, running_jobs=running)
    return pb.WorkerStatus(worker_id=name, replicas=[replica], jobs=list(jobs))


JOB = pb.RunningJob(job_id="j1", request_id="r1", model="m")


@pytest.mark.parametrize("name", ["j1", "r1"])
def test_a_job_is_found_by_its_id_or_its_requests(name):
    found, job = find_job([worker("a"), worker("b", jobs=[JOB])], name)
    assert (found.worker_id, job.job_id) == ("b", "j1")


def test_what_does_not_run_is_not_found():
    with pytest.raises(NotFound, match="r2"):
        find_job([worker("b", jobs=[JOB])], "r2")


@pytest.mark.parametrize(
    ("others", "asked", "target"),
    [
        ([worker("b", running=3), worker("c", running=1)], "", "c"),
        ([worker("b", running=3), worker("c", running=1)], "b", "b"),
        ([worker("b", state=LOADING), worker("c", running=4)], "", "c"),
    ],
)
def test_the_freest_other_worker_that_serves_the_model(others, asked, target):
    source = worker("a", jobs=[JOB])
    assert find_target([source, *others], source, "m", asked).worker_id == target


@pytest.mark.parametrize("asked", ["", "a", "b", "x"])
def test_no_other_worker(asked):
    source = worker("a", jobs=[JOB])
    with pytest.raises(NotFound):
        find_target([source, worker("b", model="other")], source, "m", asked)
