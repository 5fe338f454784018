"""The adapters that one engine was given: brought once, kept while used, least recently used out.

    absent --wanted--> coming --brought--> here --evicted or removed--> absent
                          |
                          +--failed--> absent

Pure: what to do comes back as values, the caller does it.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from gearfall.core.ids import ModelName


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """How much an engine keeps beyond what is in use, which always stays.

    Leased bytes can't make room for a model in the node's pool, so they are kept few.
    """

    count: int = 32
    size_bytes: int = 256 << 20


@dataclass(slots=True)
class Held:
    """One adapter under its name."""

    name: ModelName
    users: set[Hashable] = field(default_factory=set)
    digest: str = ""
    """Empty while it is coming."""
    size_bytes: int = 0
    is_leaving: bool = False
    """It was removed or replaced: it goes as soon as nobody uses it."""


class AdapterTable:
    """Owner of the books; `check()` says what holds."""

    def __init__(self, limits: AdapterLimits) -> None:
        self._limits = limits
        self._held: dict[ModelName, Held] = {}  # least recently used first
        self._adapter_of: dict[Hashable, ModelName] = {}

    @property
    def names(self) -> tuple[ModelName, ...]:
        """Adapters that are coming or here, least recently used first."""
        return tuple(self._held)

    def adapter_of(self, user: Hashable) -> ModelName | None:
        """Return the adapter that a user has, None if it has none."""
        return self._adapter_of.get(user)

    def want(self, name: ModelName, user: Hashable) -> tuple[Held, bool]:
        """Note a user; return the entry and whether the adapter is to be brought now."""
        held = self._held.pop(name, None)
        is_new = held is None
        held = held or Held(name)
        self._held[name] = held
        held.users.add(user)
        self._adapter_of[user] = name
        return held, is_new

    def brought(self, name: ModelName, digest: str, size_bytes: int) -> None:
        """Note that an adapter that was coming is here."""
        held = self._held[name]
        held.digest, held.size_bytes = digest, size_bytes

    def lose(self, name: ModelName) -> None:
        """Forget an adapter that could not be brought or attached. Idempotent."""
        held = self._held.pop(name, None)
        for user in held.users if held else ():
            self._adapter_of.pop(user, None)

    def release(self, user: Hashable) -> None:
        """Note that a user is gone. Idempotent."""
        name = self._adapter_of.pop(user, None)
        if name is not None and name in self._held:
            self._held[name].users.discard(user)

    def retire(self, name: ModelName) -> None:
        """Have an adapter go as soon as nobody uses it."""
        if name in self._held:
            self._held[name].is_leaving = True

    def named(self, digest: str) -> list[ModelName]:
        """Return every name under which these bytes are here."""
        return [held.name for held in self._held.values() if held.digest == digest]

    def digest_of(self, name: ModelName) -> str:
        """Return an adapter's digest; empty unless it is here."""
        held = self._held.get(name)
        return "" if held is None else held.digest

    def evict(self) -> list[Held]:
        """Take out what must go, least recently used first, and return it."""
        return [
            self._held.pop(held.name)
            for held in tuple(self._held.values())
            if held.digest and not held.users and (held.is_leaving or self._is_over())
        ]

    def check(self) -> None:
        """Assert that users and adapters name each other."""
        users = {user: held.name for held in self._held.values() for user in held.users}
        assert users == self._adapter_of

    def _is_over(self) -> bool:
        size_bytes = sum(held.size_bytes for held in self._held.values())
        return len(self._held) > self._limits.count or size_bytes > self._limits.size_bytes
