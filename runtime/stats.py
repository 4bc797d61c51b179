"""What an engine has done so far, in numbers."""

from dataclasses import dataclass


@dataclass
class Stats:
    """Counters and seconds since the engine was opened."""

    backend: str  # "numpy", or "native" with instruction set and precision
    read_mode: str  # "direct" or "buffered"
    ram_bytes: int
    slots: int
    prompt_tokens: int = 0
    prompt_s: float = 0.0
    generated_tokens: int = 0
    decode_s: float = 0.0
    bytes_read: int = 0
    read_s: float = 0.0  # at least one read was under way
    wait_s: float = 0.0  # native kernels had nothing to do but wait for reads
    reader: str = ""  # who reads: "native threads" or "Python threads"
    lookahead: str = "off"  # the mode, and what auto has measured
    early_reads: int = 0  # experts read on a guess, and those of them that were then wanted
    early_used: int = 0
    hot_loaded: int = 0  # experts read at the start because earlier runs used them most
    cache_hits: int = 0
    cache_misses: int = 0
    peak_memory_bytes: int = 0
    ended: str = ""  # what ended the latest generation: stop token, stop text, max_new_tokens or ctx_size

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.generated_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def read_bytes_per_s(self) -> float:
        return self.bytes_read / self.read_s if self.read_s else 0.0

    @property
    def hit_rate(self) -> float:
        wanted = self.cache_hits + self.cache_misses
        return self.cache_hits / wanted if wanted else 0.0
