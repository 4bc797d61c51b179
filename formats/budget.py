"""Memory and bytes per token, as pure arithmetic: every command prints its numbers from here.

All results are bytes. The terms are those of the NumPy runtime; docs/LEARNED.md tells how the constants were
measured.
"""

import math
import re
from dataclasses import asdict, dataclass

from formats.config import ModelConfig
from formats.errors import RequestError
from formats.layout import Layout

DEFAULT_CTX_SIZE = 4096
DEFAULT_CHUNK_SIZE = 512
MIN_SLOTS = 2  # one expert being read while another is computed
VALUE_BYTES = 4  # caches, states and activations are float32
BASE_BYTES = 54 << 20  # interpreter, NumPy, tokenizers, jinja2 and this program's code
TOKENIZER_FACTOR = 3  # bytes held while a tokenizer is loaded, per byte of tokenizer.json
TOKENIZER_ENTRY_BYTES = 1100  # and per entry of its vocabulary, then and later
ENCODING_BYTES = 700  # held while a prompt is encoded, per token
ROW_BLOCK_BYTES = 2 << 20  # float32 weights that a thread decodes at a time
UNIT_BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
SCORES_BYTES = 4 << 20  # attention scores computed at a time
ROPE_TABLES = 16  # of positions, kept
LOGITS_ROWS = 32  # rows of logits made at a time, where all positions are wanted


@dataclass(frozen=True)
class MemoryTerms:
    """What a run needs, term by term; their sum is the least RAM it can be given."""

    base_bytes: int
    tokenizer_bytes: int
    resident_bytes: int
    state_bytes: int
    kv_bytes: int
    scratch_bytes: int
    min_slots_bytes: int

    @property
    def floor_bytes(self) -> int:
        return sum(asdict(self).values())

    def slots(self, layout: Layout, ram_bytes: int) -> int:
        """How many experts fit into ram_bytes, at most all of them. Raises RequestError below the floor."""
        if ram_bytes < self.floor_bytes:
            terms = ", ".join(f"{name.removesuffix('_bytes')} {human(n)}" for name, n in asdict(self).items())
            enough = -(-self.floor_bytes // UNIT_BYTES["MiB"])  # in whole MiB: a rounded floor may be too little
            raise RequestError(
                f"--ram is {human(ram_bytes)}, but this model needs {human(self.floor_bytes)} ({terms}); "
                f"--ram {enough}MiB is enough"
            )
        every = sum(layer.num_experts for _, layer in layout.moe_layers())
        spare = ram_bytes - self.floor_bytes
        return min(every, MIN_SLOTS + spare // max(1, largest_record_bytes(layout)))

    def taken_bytes(self, layout: Layout, ram_bytes: int) -> int:
        """What a run takes of ram_bytes: no more than all experts need. Raises as `slots`."""
        return self.floor_bytes + (self.slots(layout, ram_bytes) - MIN_SLOTS) * largest_record_bytes(layout)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of weights that one token needs: chosen experts, and everything that is resident."""

    expert_bytes: int
    resident_bytes: int
    embedding_bytes: int


def memory_terms(
    layout: Layout, *, tokenizer_json_bytes: int | None, ctx_size: int, chunk_size: int, threads: int = 1
) -> MemoryTerms:
    """The terms for one sequence of at most ctx_size tokens, read in chunks of chunk_size.

    A tokenizer whose file is not known, None, is counted by the model's vocabulary alone.
    """
    model = layout.model
    return MemoryTerms(
        base_bytes=BASE_BYTES,
        tokenizer_bytes=_tokenizer_bytes(tokenizer_json_bytes, model.vocab_size, ctx_size),
        resident_bytes=layout.resident_bytes,
        state_bytes=2 * model.state_values * VALUE_BYTES,  # a step writes beside what it reads
        kv_bytes=model.cache_values(ctx_size, min(chunk_size, ctx_size)) * VALUE_BYTES,
        scratch_bytes=_activation_bytes(model, min(chunk_size, ctx_size), ctx_size)
        + 3 * LOGITS_ROWS * model.vocab_size * VALUE_BYTES  # those before, and new ones as they are and scaled
        + 3 * threads * ROW_BLOCK_BYTES,
        min_slots_bytes=MIN_SLOTS * largest_record_bytes(layout),
    )


def _tokenizer_bytes(json_bytes: int | None, vocab_size: int, ctx_size: int) -> int:
    """Bytes of a loaded tokenizer and of a prompt of ctx_size tokens being encoded; 0 where there is none."""
    if json_bytes == 0:
        return 0
    return TOKENIZER_FACTOR * (json_bytes or 0) + TOKENIZER_ENTRY_BYTES * vocab_size + ENCODING_BYTES * ctx_size


def _activation_bytes(model: ModelConfig, tokens: int, ctx_size: int) -> int:
    """Activations alive at the widest point of a step over `tokens` tokens, in a mixer or among experts.

    An eighth is added for what the allocator holds between them.
    """
    experts = tokens * (4 * model.hidden_size + 3 * model.feed_forward_width)
    values = tokens * _kept_values_per_token(model) + max(model.mixer_values(tokens), experts)
    marks = tokens * model.marks_per_token(ctx_size)
    scores = max(SCORES_BYTES, VALUE_BYTES * model.scores_per_token(ctx_size))
    return (VALUE_BYTES * values + marks + 4 * scores) * 9 // 8


def _kept_values_per_token(model: ModelConfig) -> int:
    """What lives through the layers of a step.

    The stream and what is added to it, before and after a layer; what each expert gives; the kernels' scratch, which
    is an input and what lies between the matrices of a feed-forward part; scores of experts; angles of positions.
    """
    stream, given = 6 * model.hidden_size, model.top_k * model.expert_hidden_size
    scratch = model.hidden_size + 3 * model.feed_forward_width
    return stream + given + scratch + 4 * model.num_experts + ROPE_TABLES * model.rotary_dim


def largest_record_bytes(layout: Layout) -> int:
    """Bytes of the largest expert of any layer; 0 for a model without experts."""
    return max((layer.record.record_bytes for _, layer in layout.moe_layers()), default=0)


def token_bytes(layout: Layout) -> TokenBytes:
    """What one token touches when nothing is cached."""
    experts = sum(
        min(layout.model.top_k, layer.num_experts) * layer.record.record_bytes for _, layer in layout.moe_layers()
    )
    ngrams = layout.model.ngrams_per_token * layout.ngrams.row_bytes if layout.ngrams is not None else 0
    return TokenBytes(experts, layout.resident_bytes, layout.embedding.row_bytes + ngrams)


def bits_per_weight(nbytes: int, shape: tuple[int, ...]) -> float:
    """Stored bits per weight."""
    return 8 * nbytes / math.prod(shape)


def human(nbytes: int) -> str:
    """Bytes as KiB, MiB or GiB in three significant digits; below 1 KiB as they are."""
    if nbytes < UNIT_BYTES["KiB"]:
        return f"{nbytes} B"
    unit = next((unit for unit in ("GiB", "MiB") if nbytes >= UNIT_BYTES[unit]), "KiB")
    return f"{three_digits(nbytes / UNIT_BYTES[unit])} {unit}"


def three_digits(value: float) -> str:
    """A number from 0 up in three significant digits, without an exponent: 0.0123, 4.50, 67.8, 1234."""
    if value == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(value))
    decimals -= round(value, decimals) >= 10 ** (3 - decimals)  # 9.999 is 10.0
    return f"{value:.{max(0, decimals)}f}"


def parse_size(text: str) -> int | None:
    """Bytes of 2GiB, 1500MB, 3g (GiB) or 1048576; None for what is no size."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)", text)
    if match is None or match[2].lower() not in _SIZE_UNITS:
        return None
    return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])
