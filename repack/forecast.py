"""What `repack plan` says, as plain data: whether a model is worth converting here, from its config and headers.

All sizes are bytes; repack/tables.py makes text of it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from formats.budget import DEFAULT_CHUNK_SIZE, DEFAULT_CTX_SIZE, MemoryTerms, human, memory_terms
from formats.errors import RequestError
from formats.layout import Layout
from formats.memory import default_ram_bytes
from formats.origins import read_origins
from formats.predict import HIT_RATES, Machine, outlook, tokens_per_s
from repack.convert import Conversion
from repack.planner import with_resident_bits
from repack.report import TOKENIZER_FILE, describe_layout

RESIDENT_BITS = (16, 8, 4)


def forecast(
    conversion: Conversion, out: Path, ram_bytes: int | None, machine: Machine | None, threads: int
) -> dict[str, Any]:
    """Everything about a conversion that is not begun: sizes, what it needs here, and how fast it would decode.

    Without ram_bytes it runs with what the machine grants now.
    `refusals` names what forbids it, term by term; it is empty when the model runs here.
    """
    from repack.sources.hub import HubSource  # slow to import

    layout, granted_bytes = conversion.plan.layout, default_ram_bytes()
    ram_bytes = granted_bytes if ram_bytes is None else ram_bytes
    tokenizer_bytes = _tokenizer_json_bytes(conversion)
    terms = _terms(layout, tokenizer_bytes, threads)
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    report: dict[str, Any] = {
        "repository": conversion.source.repository,
        "revision": conversion.source.revision,
        "fetched_bytes": conversion.source.fetched_bytes() if isinstance(conversion.source, HubSource) else 0,
        "weights_bytes": conversion.plan.source_bytes,
        "options": conversion.plan.options.facts(),
        "tokenizer_is_known": tokenizer_bytes is not None,
        **describe_layout(layout, tokenizer_bytes, threads, read_origins(conversion.extensions, "plan")),
        "resident_choices": [_resident_choice(conversion, bits, tokenizer_bytes, threads) for bits in RESIDENT_BITS],
        "disk": {"needed_bytes": conversion.output_bytes, "free_bytes": free},
        "ram_bytes": ram_bytes,
        "granted_bytes": granted_bytes,
        "refusals": [*_disk_refusal(conversion.output_bytes, free), *_ram_refusal(layout, terms, ram_bytes)],
    }
    if machine is not None:
        report["machine"] = machine.facts()
        report["predictions"] = [
            {"hit_rate": hits, "tokens_per_s": tokens_per_s(layout, machine, hits)} for hits in HIT_RATES
        ]
        if ram_bytes >= terms.floor_bytes:
            report["at_ram"] = asdict(outlook(layout, machine, terms, ram_bytes))
    return report


def _tokenizer_json_bytes(conversion: Conversion) -> int | None:
    """0 for a checkpoint without one, None for a geometry, which may have left it out."""
    if TOKENIZER_FILE in conversion.small_files:
        return len(conversion.small_files[TOKENIZER_FILE])
    return 0 if conversion.source.shards else None


def _terms(layout: Layout, tokenizer_bytes: int | None, threads: int) -> MemoryTerms:
    return memory_terms(
        layout,
        tokenizer_json_bytes=tokenizer_bytes,
        ctx_size=min(DEFAULT_CTX_SIZE, layout.model.max_position_embeddings),
        chunk_size=DEFAULT_CHUNK_SIZE,
        threads=threads,
    )


def _resident_choice(conversion: Conversion, bits: int, tokenizer_bytes: int | None, threads: int) -> dict[str, Any]:
    """Sizes with other --resident-bits; `error` instead where they do not fit the model."""
    try:
        layout = with_resident_bits(conversion.plan, bits).layout
    except RequestError as error:
        return {"resident_bits": bits, "error": str(error)}
    return {
        "resident_bits": bits,
        "total_bytes": layout.total_bytes,
        "resident_bytes": layout.resident_bytes,
        "floor_bytes": _terms(layout, tokenizer_bytes, threads).floor_bytes,
    }


def _disk_refusal(needed: int, free: int) -> Sequence[str]:
    return [f"disk: the container takes {human(needed)}, {human(free)} are free"] if needed > free else []


def _ram_refusal(layout: Layout, terms: MemoryTerms, ram_bytes: int) -> Sequence[str]:
    try:
        terms.slots(layout, ram_bytes)
    except RequestError as error:
        return [f"memory: {error}"]
    return []
