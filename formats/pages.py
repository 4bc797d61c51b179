"""Memory for reads past the page cache and for weights."""

import mmap
from contextlib import suppress

HUGE_BYTES = 2 << 20  # of a huge page, on all machines that have pages of 4 KiB


def anonymous_pages(nbytes: int) -> mmap.mmap:
    """Zeroed private memory that begins on a page and is resident once touched, in huge pages where there are any.

    A read of a whole expert into huge pages is a few segments instead of hundreds, and products take fewer walks of the
    page table (docs/LEARNED.md 51). Only a mapping of whole huge pages begins on one, so what fills one at least is
    made of them: else most of 3 MiB lies in small pages, and they are read at half the rate (docs/LEARNED.md 65).
    """
    length = -(-nbytes // HUGE_BYTES) * HUGE_BYTES if nbytes >= HUGE_BYTES else max(nbytes, 1)
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
