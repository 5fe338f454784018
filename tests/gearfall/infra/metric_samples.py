"""Exposition text as Prometheus would read it."""

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, ...], float]


def samples_of(text: bytes | str) -> Samples:
    """Every sample by its name and the values of its labels, in the order of the labels' names."""
    shown = text.decode() if isinstance(text, bytes) else text
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(shown)
        for sample in family.samples
    }
