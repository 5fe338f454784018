"""Books of an engine's adapters: kept while used, least recently used out, never one in use."""

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName
from services.worker.processes.adapter_leases import AdapterLimits, AdapterTable

A, B, C = (ModelName(name) for name in "abc")


def bring(table: AdapterTable, name: ModelName, user: str, size_bytes: int = 1) -> None:
    _, is_new = table.want(name, user)
    if is_new:
        table.brought(name, f"digest-{name}", size_bytes)


def test_the_least_recently_used_goes_first_and_used_ones_stay():
    table = AdapterTable(AdapterLimits(count=1, size_bytes=100))
    for name, user in ((A, "1"), (B, "2"), (C, "3"), (A, "4")):
        bring(table, name, user)
    assert table.evict() == []
    for user in "134":
        table.release(user)
    assert [held.name for held in table.evict()] == [C, A]
    assert table.names == (B,)


def test_bytes_are_limited_too():
    table = AdapterTable(AdapterLimits(count=9, size_bytes=10))
    bring(table, A, "1", 8)
    table.release("1")
    assert table.evict() == []
    bring(table, B, "2", 8)
    assert [held.name for held in table.evict()] == [A]


def test_one_that_was_removed_goes_with_its_last_user():
    table = AdapterTable(AdapterLimits())
    bring(table, A, "1")
    table.retire(A)
    assert table.evict() == []
    table.release("1")
    assert [held.name for held in table.evict()] == [A]


def test_one_that_is_coming_is_brought_once_and_stays():
    table = AdapterTable(AdapterLimits(count=0))
    assert [table.want(A, user)[1] for user in "12"] == [True, False]
    table.release("1")
    table.release("2")
    assert table.evict() == []
    table.brought(A, "d", 1)
    assert table.named("d") == [A]
    assert [held.name for held in table.evict()] == [A]


MOVES = st.tuples(
    st.sampled_from(["want", "brought", "lose", "release", "retire", "evict"]),
    st.sampled_from([A, B, C]),
    st.integers(0, 4),
)


@given(st.lists(MOVES, max_size=60))
def test_users_always_have_their_adapter(moves: list[tuple[str, ModelName, int]]):
    table = AdapterTable(AdapterLimits(count=1, size_bytes=3))
    users: dict[int, ModelName] = {}
    for move, name, user in moves:
        match move:
            case "want" if user not in users:
                table.want(name, user)
                users[user] = name
            case "brought" if name in table.names and not table.digest_of(name):
                table.brought(name, f"d-{name}", 2)
            case "lose":
                table.lose(name)
                users = {each: held for each, held in users.items() if held != name}
            case "release":
                table.release(user)
                users.pop(user, None)
            case "retire":
                table.retire(name)
            case "evict":
                assert not {held.name for held in table.evict()} & set(users.values())
                idle = [each for each in table.names if each not in users.values()]
                assert len([each for each in idle if table.digest_of(each)]) <= 1
        table.check()
        assert set(users.values()) <= set(table.names)
        assert all(table.adapter_of(each) == held for each, held in users.items())
