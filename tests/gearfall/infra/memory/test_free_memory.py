"""The tightest limit counts, in both generations of control groups."""

from pathlib import Path

import pytest

from gearfall.infra.memory.free_memory import free_memory_bytes

MIB = 2**20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4096 kB\nHuge: 0\n")
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def limit(root: Path, group: str, granted: object, taken: int, stat: str = "") -> None:
    write(root, f"sys/fs/cgroup/{group}/memory.max", f"{granted}\n")
    write(root, f"sys/fs/cgroup/{group}/memory.current", f"{taken}\n")
    write(root, f"sys/fs/cgroup/{group}/memory.stat", stat)


def test_without_limits_it_is_the_machines(root: Path):
    assert free_memory_bytes(root) == 4 * MIB
    limit(root, "a/b", "max", 1)
    assert free_memory_bytes(root) == 4 * MIB


def test_a_group_grants_less(root: Path):
    limit(root, "a/b", 3 * MIB, MIB)
    assert free_memory_bytes(root) == 2 * MIB


def test_a_group_above_grants_less(root: Path):
    limit(root, "a/b", 9 * MIB, MIB)
    limit(root, "a", 3 * MIB, 2 * MIB)
    assert free_memory_bytes(root) == MIB


def test_the_page_cache_is_free_and_shared_memory_is_not(root: Path):
    limit(root, "a/b", 3 * MIB, 3 * MIB, f"shmem {MIB}\ninactive_file {MIB}\nactive_file 4096\n")
    assert free_memory_bytes(root) == MIB + 4096


def test_beyond_its_limit_nothing_is_free(root: Path):
    limit(root, "a/b", MIB, 2 * MIB)
    assert free_memory_bytes(root) == 0


def test_the_first_generation(root: Path):
    write(root, "proc/self/cgroup", "4:memory:/c\n3:cpu,cpuacct:/d\n0::/\n")
    for name, value in (("limit_in_bytes", 3 * MIB), ("usage_in_bytes", 2 * MIB)):
        write(root, f"sys/fs/cgroup/memory/c/memory.{name}", f"{value}\n")
    write(root, "sys/fs/cgroup/memory/c/memory.stat", "inactive_file 7\ntotal_inactive_file 4096\n")
    assert free_memory_bytes(root) == MIB + 4096


def test_a_path_that_is_the_hosts_still_meets_the_groups_that_are_seen(root: Path):
    write(root, "proc/self/cgroup", "4:memory:/host/only\n")
    for name, value in (("limit_in_bytes", 3 * MIB), ("usage_in_bytes", 2 * MIB)):
        write(root, f"sys/fs/cgroup/memory/memory.{name}", f"{value}\n")
    assert free_memory_bytes(root) == MIB


def test_a_kernel_that_does_not_tell_is_an_error(root: Path):
    write(root, "proc/meminfo", "MemTotal: 9000 kB\n")
    with pytest.raises(OSError, match="does not tell"):
        free_memory_bytes(root)


def test_of_this_machine():
    assert 0 < free_memory_bytes() < 2**50
