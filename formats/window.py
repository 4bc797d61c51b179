"""What a cache of keys and values keeps of a layer with a window: its tokens, in whole blocks, and room for more.

A layer that attends in chunks keeps one chunk.
"""

BLOCK = 128  # kernels take keys in blocks from multiples of this, so tokens are forgotten in such


def forgets(window: int, ctx_size: int) -> bool:
    """Whether a cache forgets at all: for short contexts it holds every token."""
    return ctx_size > _worth_it(window)


def _worth_it(window: int) -> int:
    return 4 * room(window, 0)


def first_kept(window: int, length: int) -> int:
    """The first token that a cache of `length` tokens keeps for the next one."""
    return max(0, length - window + 1) // BLOCK * BLOCK


def room(window: int, tokens: int) -> int:
    """Tokens that a cache has room for when it is made for the next `tokens`; a multiple of BLOCK."""
    return -(-(2 * window + 2 * BLOCK + tokens) // BLOCK) * BLOCK


def held_tokens(window: int, ctx_size: int, chunk_size: int) -> int:
    """Tokens in memory at most: an old cache lives until the step ends that moved to a new one."""
    if not forgets(window, ctx_size):
        return ctx_size
    return max(_worth_it(window), min(2 * room(window, chunk_size), 2 * ctx_size))


def chunked_tokens(chunk: int, ctx_size: int, chunk_size: int) -> int:
    """As `held_tokens`, of a layer whose attention begins anew every `chunk` tokens."""
    return min(ctx_size, chunk + min(chunk, chunk_size))
