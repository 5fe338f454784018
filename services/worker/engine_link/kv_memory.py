"""An engine's KV cache as its worker sees it: blocks to read from and to write into."""

import contextlib
import mmap
import os

from gearfall.core.errors import Internal
from services.worker.engine_link.kv_layout import KvLayout


class KvMemory:
    """A mapping of the engine's memory, which works on after the engine is gone.

    What lies in a block is the engine's word alone: read blocks that a report calls computed, of
    jobs that are pinned, write those of jobs that are held by KV, from `computed_tokens` on.

    On small pages, as the engine's own mapping is: a block that is written first would have a huge
    one cleared in each layer's part, all under the interpreter's lock.
    """

    def __init__(self, descriptor: int, layout: KvLayout) -> None:
        """Take over `descriptor`. Raises Internal when the memory is shorter than its layout."""
        self.layout = layout
        try:
            mapping = mmap.mmap(descriptor, layout.size_bytes)
            with contextlib.suppress(OSError):  # a kernel that knows no huge pages
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
            self._view = memoryview(mapping)
        except (OSError, ValueError) as error:
            raise Internal(f"the engine's KV memory can't be mapped: {error}") from error
        finally:
            os.close(descriptor)

    def views(self, block: int, tokens: int | None = None) -> list[memoryview]:
        """View the first `tokens` (by default all) of a block: keys, values, layer by layer."""
        return [
            self._view[part.offset : part.offset + part.size_bytes]
            for part in self.layout.ranges(block, tokens)
        ]

    def read(self, block: int, tokens: int | None = None) -> bytes:
        """Return a block's bytes, in the order of `views`."""
        return b"".join(self.views(block, tokens))

    def write(self, block: int, content: bytes | memoryview, tokens: int | None = None) -> None:
        """Put in what `read` returned elsewhere. Raises Internal when its length is another."""
        views = self.views(block, tokens)
        if len(content) != sum(map(len, views)):
            raise Internal("a block's bytes are not as long as the block")
        at = 0
        for view in views:
            view[:] = content[at : at + len(view)]
            at += len(view)
