"""Bytes on their way over a link that all transfers share fairly, each with a limit of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from gearfall.simulation.agenda import Agenda

_EPSILON_BYTES = 1e-3


@dataclass(slots=True, eq=False)
class Transfer:
    """Some bytes on their way."""

    left_bytes: float
    limit_bytes_per_s: float
    on_done: Callable[[], None]
    rate_bytes_per_s: float = field(default=0.0)
    plan_number: int = 0


class SharedLink:
    """Owner of the transfers of one link. Between two changes each one's rate stands.

    A transfer gets the smaller of its own limit and an even share of the link.
    """

    def __init__(self, agenda: Agenda, bytes_per_s: float) -> None:
        self._agenda = agenda
        self._bytes_per_s = bytes_per_s
        self._active: dict[Transfer, None] = {}
        self._seen_s = agenda.now_s
        self.moved_bytes = 0.0
        """That have arrived."""

    def begin(
        self, size_bytes: float, limit_bytes_per_s: float, on_done: Callable[[], None]
    ) -> Transfer:
        """Send so many bytes; `on_done` is called when the last has arrived."""
        self._advance()
        transfer = Transfer(size_bytes, limit_bytes_per_s, on_done)
        self._active[transfer] = None
        self._share()
        return transfer

    def stop(self, transfer: Transfer) -> float:
        """End a transfer early; return the bytes that had not arrived."""
        self._advance()
        if self._active.pop(transfer, transfer) is None:
            self._share()
        return transfer.left_bytes

    def _advance(self) -> None:
        elapsed_s = self._agenda.now_s - self._seen_s
        self._seen_s = self._agenda.now_s
        if elapsed_s <= 0:
            return
        for transfer in self._active:
            moved = min(transfer.left_bytes, transfer.rate_bytes_per_s * elapsed_s)
            transfer.left_bytes -= moved
            self.moved_bytes += moved

    def _share(self) -> None:
        """Set everybody's rate, and plan anew the end of those whose rate changed."""
        share = self._bytes_per_s / max(1, len(self._active))
        for transfer in self._active:
            rate = min(transfer.limit_bytes_per_s, share)
            if rate != transfer.rate_bytes_per_s or transfer.plan_number == 0:
                transfer.rate_bytes_per_s = rate
                transfer.plan_number += 1
                event = partial(self._arrive, transfer, transfer.plan_number)
                self._agenda.after(transfer.left_bytes / rate, event)

    def _arrive(self, transfer: Transfer, plan_number: int) -> None:
        if transfer not in self._active or plan_number != transfer.plan_number:
            return
        self._advance()
        # What rounding left over is not a transfer.
        assert transfer.left_bytes <= max(_EPSILON_BYTES, 1e-9 * transfer.rate_bytes_per_s) + 1.0
        del self._active[transfer]
        self._share()
        transfer.on_done()
