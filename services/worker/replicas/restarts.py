"""How long to wait before a replica that failed is started again."""

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 15.0


def restart_delay_s(failures: int) -> float:
    """Return the pause after the `failures`-th failure in a row (1: the first) without a token.

    The first restart comes at once; then the pause doubles up to LONGEST_DELAY_S.
    """
    assert failures >= 0
    if failures <= 1:
        return 0.0
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(failures - 2, 16))
