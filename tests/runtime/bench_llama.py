"""Decode and prefill beside llama.cpp, on the same weights: `make bench-llama LLAMA_BENCH=path/of/llama-bench`.

A GGUF file of Qwen3-30B-A3B's widths with made-up Q4_0 weights is written; llama-bench reads it, and `repack convert`
keeps its blocks to the bit. Runs take turns, in memory and in memory groups of shares of the file, page cache counted
and emptied before. By hand only: it takes a quarter of an hour, 2 x 6 GB of disk and a llama-bench built with
GGML_NATIVE. The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from formats.bars import Bar, bar, report
from formats.budget import human
from formats.dtypes import AnyArray
from tests.runtime.helpers import STREAM_RUN
from tests.runtime.memory_groups import evict, memory_group

HIDDEN, INNER, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 768, 128, 8, 32, 4, 128, 32_000
GAIN = 0.1  # small matrices: what a token is decides where it is routed (docs/LEARNED.md 22)
Q4_0 = gguf.GGMLQuantizationType.Q4_0
Q4_0_BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
PROMPT, NEW = 256, 24
TIMEOUT_S = 200


class Limit(NamedTuple):
    """Memory for a run as a share of the file, and the least ratios of decode and prefill to its best with mmap."""

    share: float
    decode: float
    prefill: float | None


LIMITS = (Limit(2 / 3, 1.15, None), Limit(0.45, 1.0, None), Limit(1 / 3, 15.0, 3.0))


class Speed(NamedTuple):
    """Tokens per second."""

    prefill: float
    decode: float


def blocks(rng: np.random.Generator, *shape: int) -> AnyArray:
    """Uniform Q4_0 codes around zero whose rows keep the size of what they multiply, times GAIN."""
    raw = np.empty((*shape[:-1], shape[-1] // 32), Q4_0_BLOCK)
    raw["d"] = GAIN / (math.sqrt((16**2 - 1) / 12) * math.sqrt(shape[-1]))
    raw["qs"] = rng.integers(0, 256, raw["qs"].shape, np.uint8)
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


def write_model(path: Path, num_layers: int) -> None:
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
        plain = values is not None and values.dtype == np.float32
        stored = shape if plain else (*shape[:-1], shape[-1] // 32 * Q4_0_BLOCK.itemsize)
        nbytes = math.prod(stored) * (4 if plain else 1)
        dtype = np.dtype(np.float32) if plain else np.dtype(np.uint8)
        writer.add_tensor_info(name, stored, dtype, nbytes, None if plain else Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1)
    for _, shape, values in tensors(num_layers):
        writer.write_tensor_data(values if values is not None else blocks(rng, *shape))
    writer.close()


class Contest:
    """The two programs on one model."""

    def __init__(self, llama_bench: Path, folder: Path, threads: int) -> None:
        self.model, self.container = folder / "model.gguf", folder / "container"
        self._llama_bench = llama_bench
        self._threads = threads

    def llama(self, limit: int | None, *options: str) -> Speed:
        """llama-bench with these options; 0 for what it could not end in time."""
        words = [str(self._llama_bench), "-m", str(self.model), "-t", str(self._threads), "-r", "1", "-o", "json"]
        speeds = {}
        for kind, tokens in (("-p", PROMPT), ("-n", NEW)):
            other = "-n" if kind == "-p" else "-p"
            found = self._run([*words, kind, str(tokens), other, "0", *options], limit)
            speeds[kind] = 0.0 if found is None else float(json.loads(found)[0]["avg_ts"])
        return Speed(speeds["-p"], speeds["-n"])

    def ours(self, limit: int | None) -> Speed:
        """`stream-run bench` on the container, within 95 % of the limit."""
        ram = ["--ram", str(int(0.95 * limit))] if limit else []
        shape = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW), "--runs", "1", "-t", str(self._threads)]
        found = self._run([*STREAM_RUN, "bench", str(self.container), *shape, *ram], limit)
        assert found is not None
        figures = {entry["name"]: entry["median"] for entry in json.loads(found.splitlines()[-1])["measurements"]}
        return Speed(figures["prefill"], figures["decode"])

    def _run(self, words: list[str], limit: int | None) -> str | None:
        """stdout of a command, None when it took too long."""
        evict(self.model.parent)
        try:
            if limit is None:
                done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
            else:
                with memory_group(limit) as group:
                    done = group.run(words)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode != 0:
            raise SystemExit(f"{words[0]}: {done.stderr.strip().splitlines()[-1:]}")
        return done.stdout


def ratios(ours: list[Speed], theirs: list[Speed], which: str) -> list[float]:
    """Ours over theirs, run by run; a run that theirs did not end counts as one token in the time that it had."""
    floor = {"prefill": PROMPT / TIMEOUT_S, "decode": NEW / TIMEOUT_S}[which]
    return [getattr(mine, which) / (getattr(other, which) or floor) for mine, other in zip(ours, theirs, strict=True)]


def row(name: str, runs: list[Speed]) -> str:
    prefill, decode = (statistics.median(getattr(run, which) for run in runs) for which in ("prefill", "decode"))
    spread = f"{min(run.decode for run in runs):.3g}-{max(run.decode for run in runs):.3g}"
    return f"{name:44} {prefill:9.4g} {decode:9.4g}  ({spread})"


def compare(contest: Contest, runs: int) -> Iterator[str | Bar]:
    """Lines of a table and bars as they are measured."""
    size = contest.model.stat().st_size
    yield f"{'tokens/s, medians':44} {'prefill':>9} {'decode':>9}"
    kinds = {
        "llama.cpp, mmap, not repacked": ("-lm", "mmap", "--repack", "0"),
        "llama.cpp, in memory, repacked": ("-lm", "none", "--repack", "1"),
        "llama.cpp, in memory, repacked, ubatch 2048": ("-lm", "none", "--repack", "1", "-ub", "2048"),
    }
    found: dict[str, list[Speed]] = {name: [] for name in ("ours", *kinds)}
    for _ in range(runs):
        found["ours"].append(contest.ours(None))
        for name, options in kinds.items():
            found[name].append(contest.llama(None, *options))
    yield from (row(f"in memory: {name}", speeds) for name, speeds in found.items())
    plain, repacked, _ = kinds
    best = [Speed(max(s.prefill for s in turn), 0.0) for turn in zip(*(found[name] for name in kinds), strict=True)]
    yield bar("in memory, decode over llama.cpp not repacked", ratios(found["ours"], found[plain], "decode"), 1.3)
    yield bar("in memory, decode over llama.cpp repacked", ratios(found["ours"], found[repacked], "decode"), 0.9)
    yield bar("in memory, prefill over its best", ratios(found["ours"], best, "prefill"), 0.8)
    for limit in LIMITS:
        nbytes, ours, theirs = int(limit.share * size), [], []
        for _ in range(runs):
            ours.append(contest.ours(nbytes))
            theirs.append(contest.llama(nbytes, "-lm", "mmap", "--repack", "0"))
        at = f"at {limit.share:.2f} of the model ({human(nbytes)})"
        yield row(f"{at}: ours", ours)
        yield row(f"{at}: llama.cpp, mmap", theirs)
        yield bar(f"{at}, decode over mmap", ratios(ours, theirs, "decode"), limit.decode)
        if limit.prefill is not None:
            yield bar(f"{at}, prefill over mmap", ratios(ours, theirs, "prefill"), limit.prefill)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for model and container; kept for the next time")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    contest = Contest(options.llama_bench, options.folder, options.threads)
    if not contest.model.exists():
        write_model(contest.model, options.layers)
    convert = "from repack.cli import main; main()"
    words = [sys.executable, "-c", convert, "convert", str(contest.model), str(contest.container), "--no-hash-source"]
    subprocess.run(words, check=True)
    version = subprocess.run([options.llama_bench, "--version"], capture_output=True, text=True, check=False)
    settings: dict[str, Any] = {"layers": options.layers, "threads": options.threads, "prompt": PROMPT, "new": NEW}
    settings["llama.cpp"] = " ".join((version.stdout + version.stderr).split())[:200]
    sys.stdout.write(f"{settings['llama.cpp']}\n")
    bars = []
    for line in compare(contest, options.runs):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if isinstance(line, Bar):
            bars.append(line)
    sys.stdout.write(report(bars, {"settings": settings}) + "\n")


if __name__ == "__main__":
    main()
