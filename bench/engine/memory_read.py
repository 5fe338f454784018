"""How fast threads read memory: the bound of generating one token after another."""

import ctypes
import mmap
import threading
import time
from collections.abc import Callable

_SIZE_BYTES = 1 << 29


def read_bytes_per_s(threads: int, rounds: int = 7) -> float:
    """Return the best of `rounds` readings of half a GiB by `threads` threads side by side.

    Reads with the C library's memchr for a byte that is not there: nothing is computed beside.
    """
    find = ctypes.CDLL(None).memchr
    find.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    find.restype = ctypes.c_void_p
    with mmap.mmap(-1, _SIZE_BYTES) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(bytes(_SIZE_BYTES))
        anchor = ctypes.c_char.from_buffer(memory)
        address, share = ctypes.addressof(anchor), _SIZE_BYTES // threads

        def read(part: int) -> None:
            assert find(address + part * share, 1, share) is None

        best_s = min(_seconds(read, threads) for _ in range(rounds))
        del anchor
    return threads * share / best_s


def _seconds(read: Callable[[int], None], threads: int) -> float:
    workers = [threading.Thread(target=read, args=(part,)) for part in range(threads)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begun
