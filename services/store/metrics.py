"""The store's Prometheus metrics, in a registry of its own."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from gearfall.core.tiers import Tier
from services.store.loading.load import LoadEnd, LoadOutcome
from services.store.loading.wishes import WishOutcome

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TIERS = (Tier.REMOTE, Tier.SSD, Tier.DRAM)


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """What the store's owners know at the moment of a scrape."""

    capacity_bytes: Mapping[Tier, int]
    used_bytes: Mapping[Tier, int]
    models: Mapping[Tier, int]
    """Whole models in each tier."""
    queued_bytes: Mapping[Tier, int]
    """Still to move out of each tier for loads that were asked for."""
    bytes_per_s: Mapping[Tier, float]
    """Median of recent loads out of each tier; 0 while unknown."""
    leases: int
    broken_models: int
    """Registered models whose bytes failed their check."""
    pending_wishes: int = 0
    """Models that the scheduler wishes for and that are not there yet."""


class StoreMetrics:
    """Counters and histograms; `tier` is the one that a load's bytes came out of."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._loads = Counter(
            "gearfall_store_loads", "Loads that ended", ["tier", "outcome"], registry=registry
        )
        self._bytes = Counter(
            "gearfall_store_loaded_bytes", "Bytes verified", ["tier"], registry=registry
        )
        self._seconds = Histogram(
            "gearfall_store_load_seconds",
            "From the request to the model's presence, of loads that came about",
            ["tier"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._corrupt = Counter(
            "gearfall_store_corrupt_found",
            "Loads that met bytes which were not what the manifest says",
            ["tier"],
            registry=registry,
        )
        self._wishes = Counter(
            "gearfall_store_wishes",
            "Attempts to fetch ahead what the scheduler wished for",
            ["outcome"],
            registry=registry,
        )
        for wish_outcome in WishOutcome:
            self._wishes.labels(wish_outcome.value)
        for tier in _TIERS:
            # Present from the first scrape on, so that a rate sees the first one.
            for outcome in LoadOutcome:
                self._loads.labels(tier.value, outcome.value)
            self._bytes.labels(tier.value)
            self._corrupt.labels(tier.value)
        self._gauges = {
            name: Gauge(f"gearfall_store_{name}", meaning, ["tier"], registry=registry)
            for name, meaning in (
                ("capacity_bytes", "Most bytes of models"),
                ("used_bytes", "Bytes of models, and of loads under way"),
                ("models", "Whole models"),
                ("queued_bytes", "Bytes still to move out of the tier"),
                ("bytes_per_second", "Median of recent loads out of the tier, 0 while unknown"),
            )
        }
        self._leases = Gauge(
            "gearfall_store_leases", "Leases of workers on resident models", registry=registry
        )
        self._pending_wishes = Gauge(
            "gearfall_store_pending_wishes",
            "Models to fetch ahead that are not there yet",
            registry=registry,
        )
        self._broken = Gauge(
            "gearfall_store_broken_models",
            "Models that can't be loaded before they are registered again",
            registry=registry,
        )

    def count_load(self, end: LoadEnd) -> None:
        """Take one load's end in."""
        tier = end.from_tier.value
        self._loads.labels(tier, end.outcome.value).inc()
        if end.outcome is LoadOutcome.DONE:
            self._bytes.labels(tier).inc(end.moved_bytes)
            self._seconds.labels(tier).observe(end.seconds)
        elif end.outcome is LoadOutcome.CORRUPT:
            self._corrupt.labels(tier).inc()

    def count_wish(self, outcome: WishOutcome) -> None:
        """Take the end of one attempt at a wish in."""
        self._wishes.labels(outcome.value).inc()

    def render(self, figures: StoreFigures) -> bytes:
        """Return the exposition text."""
        for name, by_tier in (
            ("capacity_bytes", figures.capacity_bytes),
            ("used_bytes", figures.used_bytes),
            ("models", figures.models),
            ("queued_bytes", figures.queued_bytes),
            ("bytes_per_second", figures.bytes_per_s),
        ):
            for tier, value in by_tier.items():
                self._gauges[name].labels(tier.value).set(value)
        self._leases.set(figures.leases)
        self._broken.set(figures.broken_models)
        self._pending_wishes.set(figures.pending_wishes)
        return generate_latest(self._registry)
