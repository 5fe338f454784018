"""An end from outside, taken as Ctrl-C: what was begun ends in order, and scratch files go."""

import signal


def take_sigterm_as_ctrl_c() -> None:
    """Let SIGTERM raise what SIGINT raises, in place of ending this process at once.

    For programs without a stop of their own; call it on the main thread, before an event loop runs.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell begins what ends with `&`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
