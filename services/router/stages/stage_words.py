"""What a stage did, as the request log says it."""

from gearfall.core.generation.usage import StageReport


def in_words(report: StageReport) -> str:
    """Return what a stage answered and took, or why it failed."""
    if report.error:
        return f"{report.model} failed: {report.error}"
    certainty = "" if report.certainty is None else f", certainty {report.certainty:.4f}"
    if report.stopped_early:
        certainty += f", stopped there, at most {report.spared_tokens} tokens spared"
    if report.samples:
        certainty += f", {report.agreeing} of {report.samples} answers the same"
    owners = "" if report.epochs <= 1 else f", by {report.epochs} owners one after the other"
    if report.draft_tokens:
        right = report.accepted_draft_tokens
        certainty += f", {right} of {report.draft_tokens} tokens of the draft were right"
    return (
        f"{report.model}: {report.completion_tokens} tokens in {report.duration_s:.3f} s, "
        f"{report.queued_s:.3f} s of them in the queue{owners}{certainty}"
    )


def why_up(report: StageReport) -> str:
    """Return why a stage's answer goes up."""
    if report.certainty is None:
        return f"{report.model} failed: {report.error}"
    return f"{report.model} certainty {report.certainty:.4f} below {report.threshold:.4f}"
