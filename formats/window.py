"""How many tokens caches of keys and values hold, and what they keep of a layer with a window.

That is its tokens, in whole blocks, and room for more. A layer that attends in chunks keeps one chunk.
"""

LANES = 16  # keys, and values of one, that kernels keep together
BLOCK = 128  # kernels take keys in blocks from multiples of this, so tokens are forgotten in such


def in_lanes(number: int) -> int:
    """What kernels make room for where so many tokens or values are held."""
    return -(-number // LANES) * LANES


def forgets(window: int, ctx_size: int, chunk_size: int) -> bool:
    """Whether a cache forgets at all: an old one lives until the step ends that moved to a new one."""
    return ctx_size > 2 * room(window, chunk_size)


def first_kept(window: int, length: int) -> int:
    """The first token that a cache of `length` tokens keeps for the next one."""
    return max(0, length - window + 1) // BLOCK * BLOCK


def room(window: int, tokens: int) -> int:
    """Tokens that a cache has room for when it is made for the next `tokens`; a multiple of BLOCK."""
    return -(-(2 * window + 2 * BLOCK + tokens) // BLOCK) * BLOCK


def held_tokens(window: int, ctx_size: int, chunk_size: int) -> int:
    """Tokens that caches have room for at most, in steps of up to chunk_size."""
    return min(in_lanes(ctx_size), 2 * room(window, chunk_size))


def chunked_tokens(chunk: int, ctx_size: int, chunk_size: int) -> int:
    """As `held_tokens`, of a layer whose attention begins anew every `chunk` tokens.

    Of a new cache only what a step writes is in memory while the old one lives.
    """
    after = min(chunk, chunk_size, max(0, ctx_size - chunk))
    return in_lanes(min(chunk, ctx_size)) + in_lanes(after)
