"""Core time by kind of process."""

import subprocess
import sys

import pytest

from bench.cascade.core_time import (
    ALL,
    ENGINES,
    HOST,
    Burst,
    medians_ms,
    ratios,
    spent_so_far,
)

ENGINE = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True); input()"
HOST_OF_ENGINE = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ENGINE!r}])"


def burst(cluster: str, what: str, spent_s: float, *, requests: int = 10) -> Burst:
    return Burst(cluster, what, requests, 4.0, {"router": spent_s / 2, ALL: spent_s})


def test_requests_share_what_was_spent_and_seconds_where_there_were_none() -> None:
    assert burst("here", "small", 0.1).figures_ms() == {"router": 5.0, ALL: 10.0}
    assert burst("here", "", 0.1, requests=0).figures_ms() == {"router": 12.5, ALL: 25.0}


def test_medians_and_ratios_keep_clusters_and_loads_apart() -> None:
    bursts = [
        burst(cluster, what, spent_s)
        for ours_s, theirs_s in ((0.2, 0.4), (0.1, 0.5), (0.3, 0.3))
        for cluster, what, spent_s in (
            ("here", "small", ours_s),
            ("there", "small", theirs_s),
            ("here", "large", 9.0),
        )
    ]
    assert medians_ms(bursts, "here", "small")[ALL] == pytest.approx(20.0)
    assert medians_ms(bursts, "there", "small")[ALL] == pytest.approx(40.0)
    assert ratios(bursts, "small", "here", "there") == pytest.approx([0.5, 0.2, 1.0])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_workers_host_is_told_from_what_it_forked() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOST_OF_ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    spent = spent_so_far([("worker", process.pid), ("router", process.pid)])
    process.communicate(b"\n")
    assert spent[ENGINES] >= 0.25
    assert 0.0 <= spent[HOST] < spent[ENGINES]
    assert spent["router"] == pytest.approx(spent[HOST] + spent[ENGINES], abs=0.03)
    assert spent[ALL] == pytest.approx(spent[HOST] + spent[ENGINES] + spent["router"])
