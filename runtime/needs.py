"""What running a container takes, with the defaults of what was not given."""

from formats.budget import DEFAULT_CHUNK_SIZE, DEFAULT_CTX_SIZE, MemoryTerms, memory_terms
from formats.container import Container
from formats.errors import RequestError
from formats.memory import granted_processors


def memory_needs(
    container: Container, ctx_size: int | None, chunk_size: int | None, threads: int | None
) -> tuple[MemoryTerms, int, int, int]:
    """What one sequence takes, and ctx_size, chunk_size and threads with their defaults. Raises RequestError."""
    index = container.index
    longest = index.layout.model.max_position_embeddings
    ctx_size = _at_least_one("--ctx-size", ctx_size, min(DEFAULT_CTX_SIZE, longest))
    if ctx_size > longest:
        raise RequestError(f"--ctx-size is {ctx_size}, but the model's max_position_embeddings is {longest}")
    chunk_size = _at_least_one("--chunk", chunk_size, DEFAULT_CHUNK_SIZE)
    threads = _at_least_one("--threads", threads, granted_processors())
    tokenizer = index.files.get("tokenizer.json")
    terms = memory_terms(
        index.layout,
        tokenizer_json_bytes=tokenizer.nbytes if tokenizer else 0,
        ctx_size=ctx_size,
        chunk_size=chunk_size,
        threads=threads,
    )
    return terms, ctx_size, chunk_size, threads


def _at_least_one(option: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if value < 1:
        raise RequestError(f"{option} is {value}, expected at least 1")
    return value
