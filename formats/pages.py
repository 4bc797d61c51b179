"""Memory for reads past the page cache and for weights."""

import mmap
from contextlib import suppress


def anonymous_pages(nbytes: int) -> mmap.mmap:
    """Zeroed private memory that begins on a page and is resident once touched, in huge pages where there are any.

    A read of a whole expert into huge pages is a few segments instead of hundreds, and products take fewer walks of the
    page table (docs/LEARNED.md 51).
    """
    pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
