"""Decode and prefill beside llama.cpp, on the same weights: `make bench-llama LLAMA_BENCH=path/of/llama-bench`.

A GGUF file of Qwen3-30B-A3B's widths with made-up Q4_0 (or Q4_K) weights is written; llama-bench reads it, and
`repack convert` keeps its blocks to the bit. Runs take turns, in memory and in memory groups of shares of the file,
page cache counted and emptied before. Both programs make a warm-up run before they measure; in memory both decode
behind a prompt. A prompt has the 512 tokens of llama-bench's own default, one chunk for either. llama.cpp multiplies
with activations of 8 bits, as our `fast` does; in memory every precision of ours is shown and has its bars, within a
limit the default and `fast`. By hand only: it takes ten minutes, 2 x 4.3 GB of disk and a llama-bench built with
GGML_NATIVE. The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from formats.bars import Bar, bar, report
from formats.budget import human
from formats.dtypes import AnyArray
from formats.kernels import DEFAULT_PRECISION, PRECISIONS
from runtime.backends import native
from tests.runtime.helpers import STREAM_RUN
from tests.runtime.memory_groups import evict, memory_group

HIDDEN, INNER, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 768, 128, 8, 32, 4, 128, 32_000
GAIN = 0.1  # small matrices: what a token is decides where it is routed (docs/LEARNED.md 22)
Q4_0 = gguf.GGMLQuantizationType.Q4_0
BLOCKS = {  # of weights whose rows keep the size of what they multiply
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, np.dtype([("d", "<f2"), ("qs", "u1", 16)])),
    "q4_k": (gguf.GGMLQuantizationType.Q4_K, np.dtype([("d", "<f2", 2), ("scales", "u1", 12), ("qs", "u1", 128)])),
}
PROMPT, NEW = 512, 24
LEAST = 4  # new tokens where a token takes the opponent seconds
TIMEOUT_S = 90  # for a run within a limit


WITHIN = (DEFAULT_PRECISION, "fast")  # precisions within a limit


class Limit(NamedTuple):
    """Memory for runs as a share of the file, the least ratios of decode and prefill to its mmap, and their number."""

    share: float
    decode: float
    prefill: float | None
    new_tokens: int


LIMITS = (Limit(2 / 3, 1.15, None, NEW), Limit(0.45, 1.0, None, NEW), Limit(1 / 3, 15.0, 3.0, LEAST))


class Speed(NamedTuple):
    """Tokens per second."""

    prefill: float
    decode: float


def blocks(rng: np.random.Generator, quantization: str, *shape: int) -> AnyArray:
    """Random codes whose rows keep the size of what they multiply, times GAIN."""
    kind, block = BLOCKS[quantization]
    raw = np.empty((*shape[:-1], shape[-1] // gguf.GGML_QUANT_SIZES[kind][0]), block)
    spread = math.sqrt((16**2 - 1) / 12) * math.sqrt(shape[-1])
    raw["qs"] = rng.integers(0, 256, raw["qs"].shape, np.uint8)
    if quantization == "q4_0":
        raw["d"] = GAIN / spread
    else:  # eight scales of 32 and minima of 30, in 6 bits each: codes around 7.5
        raw["d"] = (GAIN / spread / 32, GAIN / spread / 4)
        raw["scales"] = np.array([160] * 4 + [94] * 4 + [0xE0] * 4, np.uint8)
    return raw.view(np.uint8).reshape(*shape[:-1], -1)


def tensors(num_layers: int) -> Iterator[tuple[str, tuple[int, ...], AnyArray | None]]:
    """(name, shape, float32 values or None for blocks)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, std: float = 1.0) -> AnyArray:
        return rng.standard_normal(shape, np.float32) * np.float32(std)

    embedding = normal(VOCAB, HIDDEN)
    yield "token_embd.weight", embedding.shape, gguf.quants.quantize(embedding, Q4_0)
    yield "output_norm.weight", (HIDDEN,), np.full(HIDDEN, 0.5, np.float32)
    yield "output.weight", (VOCAB, HIDDEN), None
    for i in range(num_layers):
        for name, width in (
            ("attn_norm", HIDDEN),
            ("ffn_norm", HIDDEN),
            ("attn_q_norm", HEAD_DIM),
            ("attn_k_norm", HEAD_DIM),
        ):
            yield f"blk.{i}.{name}.weight", (width,), np.full(width, 0.5, np.float32)
        router = normal(EXPERTS, HIDDEN, std=HIDDEN**-0.5)
        yield f"blk.{i}.ffn_gate_inp.weight", router.shape, router - router.mean(axis=0)
        for name, rows, columns in (
            ("attn_q", HEADS * HEAD_DIM, HIDDEN),
            ("attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
            ("attn_v", KV_HEADS * HEAD_DIM, HIDDEN),
            ("attn_output", HIDDEN, HEADS * HEAD_DIM),
        ):
            yield f"blk.{i}.{name}.weight", (rows, columns), None
        for part, rows, columns in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
            yield f"blk.{i}.ffn_{part}_exps.weight", (EXPERTS, rows, columns), None


def write_model(path: Path, num_layers: int, quantization: str) -> None:
    """The GGUF file, one tensor in memory at a time."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(num_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_feed_forward_length(INNER)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    byte_level = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    writer.add_token_list([*byte_level, "!!", *(f"token{i}" for i in range(VOCAB - len(byte_level) - 1))])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["! !"])
    for name, shape, values in tensors(num_layers):
        if values is not None and values.dtype == np.float32:
            writer.add_tensor_info(name, shape, values.dtype, values.nbytes)
            continue
        kind = Q4_0 if values is not None else BLOCKS[quantization][0]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        stored = (*shape[:-1], shape[-1] // per_block * block_bytes)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1)
    for _, shape, values in tensors(num_layers):
        writer.write_tensor_data(values if values is not None else blocks(rng, quantization, *shape))
    writer.close()


class Contest:
    """The two programs on one model."""

    def __init__(self, llama_bench: Path, folder: Path, threads: int) -> None:
        self.model, self.container = folder / "model.gguf", folder / "container"
        self.system: dict[str, Any] = {}  # what llama-bench says of itself
        self._llama_bench = llama_bench
        self._threads = threads

    def llama(self, limit: Limit | None, *options: str) -> Speed:
        """llama-bench with these options; 0 for what it could not end in time."""
        words = [str(self._llama_bench), "-m", str(self.model), "-t", str(self._threads), "-r", "1", "-o", "json"]
        prompt = ["-p", str(PROMPT), "-n", "0"]
        new = ["-p", "0", "-n", str(limit.new_tokens if limit else NEW), *(() if limit else ("-d", str(PROMPT)))]
        found = [self._run([*words, *tokens, *options], limit) for tokens in (prompt, new)]
        runs = [json.loads(text)[0] for text in found if text is not None]
        self.system = {key: runs[0][key] for key in ("build_commit", "cpu_info", "backends", "n_batch")} if runs else {}
        prefill, decode = (0.0 if text is None else float(json.loads(text)[0]["avg_ts"]) for text in found)
        return Speed(prefill, decode)

    def ours(self, limit: Limit | None, precision: str = DEFAULT_PRECISION) -> Speed:
        """`stream-run bench` on the container, within 95 % of the limit."""
        ram = ["--ram", str(int(0.95 * self.nbytes(limit)))] if limit else []
        shape = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW), "--runs", "1", "--precision", precision]
        guess = ["--lookahead", "prompts"]  # while decoding, every guess about made-up weights would be right
        words = [*STREAM_RUN, "bench", str(self.container), "-t", str(self._threads)]
        found = self._run([*words, *shape, *guess, *ram], limit)
        assert found is not None, "stream-run took too long"
        figures = {entry["name"]: entry["median"] for entry in json.loads(found.splitlines()[-1])["measurements"]}
        return Speed(figures["prefill"], figures["decode"])

    def nbytes(self, limit: Limit) -> int:
        """Of memory."""
        return int(limit.share * self.model.stat().st_size)

    def _run(self, words: list[str], limit: Limit | None) -> str | None:
        """stdout of a command, None when it took too long."""
        try:
            if limit is None:
                done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
            else:
                evict(self.model.parent)
                with memory_group(self.nbytes(limit)) as group:
                    done = group.run(words, TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode != 0:
            raise SystemExit(f"{words[0]}: {done.stderr.strip().splitlines()[-1:]}")
        return done.stdout


def ratios(ours: list[Speed], theirs: list[Speed], which: str, new_tokens: int = NEW) -> list[float]:
    """Ours over theirs, run by run; a run that theirs did not end counts as if it had ended just then."""
    floor = {"prefill": PROMPT / TIMEOUT_S, "decode": new_tokens / TIMEOUT_S}[which]
    return [getattr(mine, which) / (getattr(other, which) or floor) for mine, other in zip(ours, theirs, strict=True)]


def row(name: str, runs: list[Speed]) -> str:
    cells = []
    for which in ("prefill", "decode"):
        values = [getattr(run, which) for run in runs]
        cells.append(f"{statistics.median(values):9.4g} {f'({min(values):.3g}-{max(values):.3g})':14}")
    return f"{name:48} {' '.join(cells)}"


def in_memory(contest: Contest, runs: int) -> Iterator[str | Bar]:
    """All of it in memory, in turns."""
    plain, repacked = "llama.cpp, mmap, not repacked", "llama.cpp, repacked"
    kinds = {plain: ("-lm", "mmap", "--repack", "0"), repacked: ("-lm", "none", "--repack", "1")}
    found: dict[str, list[Speed]] = {name: [] for name in (*PRECISIONS, *kinds)}
    for _ in range(runs):
        for precision in PRECISIONS:
            found[precision].append(contest.ours(None, precision))
        for name, options in kinds.items():
            found[name].append(contest.llama(None, *options))
    yield from (row(f"in memory: {'ours, ' if name in PRECISIONS else ''}{name}", runs) for name, runs in found.items())
    best = [Speed(max(s.prefill for s in turn), 0.0) for turn in zip(*(found[name] for name in kinds), strict=True)]
    for mine in PRECISIONS:
        yield bar(
            f"in memory, {mine}: decode / llama.cpp not repacked", ratios(found[mine], found[plain], "decode"), 1.3
        )
        yield bar(
            f"in memory, {mine}: decode / llama.cpp repacked", ratios(found[mine], found[repacked], "decode"), 0.9
        )
        yield bar(f"in memory, {mine}: prefill / its best", ratios(found[mine], best, "prefill"), 0.8)


def within(contest: Contest, limit: Limit, runs: int) -> Iterator[str | Bar]:
    """In a memory group, in turns."""
    ours: dict[str, list[Speed]] = {precision: [] for precision in WITHIN}
    theirs = []
    for _ in range(runs):
        for precision in WITHIN:
            ours[precision].append(contest.ours(limit, precision))
        theirs.append(contest.llama(limit, "-lm", "mmap", "--repack", "0"))
    at = f"at {limit.share:.2f} ({human(contest.nbytes(limit))})"
    yield from (row(f"{at}: ours, {precision}", found) for precision, found in ours.items())
    yield row(f"{at}: llama.cpp, mmap", theirs)
    for precision, found in ours.items():
        name = f"{at}, {precision}"
        yield bar(f"{name}: decode / mmap", ratios(found, theirs, "decode", limit.new_tokens), limit.decode)
        if limit.prefill is not None:
            yield bar(f"{name}: prefill / mmap", ratios(found, theirs, "prefill"), limit.prefill)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for model and container; kept for the next time")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--quantization", choices=list(BLOCKS), default="q4_0")
    parser.add_argument("--runs", type=int, default=2, help="in memory; within a limit one less")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    folder = options.folder / f"{options.quantization}-{options.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    contest = Contest(options.llama_bench, folder, options.threads)
    if not contest.model.exists():
        write_model(contest.model, options.layers, options.quantization)
    convert = "from repack.cli import main; main()"
    words = [sys.executable, "-c", convert, "convert", str(contest.model), str(contest.container), "--no-hash-source"]
    subprocess.run(words, check=True)
    version = subprocess.run([options.llama_bench, "--version"], capture_output=True, text=True, check=False)
    settings: dict[str, Any] = vars(options) | {"prompt": PROMPT, "new": NEW, "levels": native.levels()}
    settings = {key: value for key, value in settings.items() if key not in ("llama_bench", "folder")}
    settings["llama.cpp"] = " ".join((version.stdout + version.stderr).split())[:200]
    sys.stdout.write(f"{settings['llama.cpp']}\n{'tokens/s, medians':48} {'prefill':>9} {'':14} {'decode':>9}\n")
    bars = []
    parts = [in_memory(contest, options.runs), *(within(contest, limit, max(1, options.runs - 1)) for limit in LIMITS)]
    for line in chain(*parts):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if isinstance(line, Bar):
            bars.append(line)
    settings["llama.cpp system"] = contest.system
    sys.stdout.write(f"{contest.system}\n{report(bars, {'settings': settings})}\n")


if __name__ == "__main__":
    main()
