"""How near conversion comes to what the disk allows, and its encoder to MLX: `make bench-convert`.

Every bar is a ratio of two rates taken in turns in one process. The last line is one JSON object.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from formats import native
from formats.bars import Bar, bar, report
from formats.checksum import blocks
from formats.config import read_config
from formats.dtypes import AnyArray, from_float32
from formats.encodings import Affine
from formats.errors import StreamingExpertsError
from formats.families import FAMILIES
from repack.convert import Conversion, convert, default_jobs, prepare
from repack.direct import BUFFER_BYTES, READ_BYTES, aligned_buffer, open_direct
from repack.encode import encoder_name
from repack.plan import Options
from repack.rehearse import prepare_rehearsal, read_geometry
from repack.sources.folder import FolderSource

RUNS = 5
PARTS = ("encoder", "convert", "rehearse")
# Layers of Qwen3-30B-A3B with half of their experts and a small vocabulary: 0.6 GB of bf16 each.
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 2048,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
}
SOURCE_LAYERS, REHEARSAL_LAYERS = 6, 6  # twice as many files as there are jobs on two processors, and no rest
RAW_WRITE_BYTES = (BUFFER_BYTES, 4 * BUFFER_BYTES)  # whichever is faster today is the yardstick (LEARNED 42)
ENCODER_ROWS, ENCODER_COLUMNS = 1024, 4096  # stays in the last-level cache, as what was just read does
BARS = {"encoder": 5.0, "file to file": 0.85, "rehearse": 0.70}

# Runs in another Python, which has MLX: quantizes the same matrix each time a line comes in, and answers with seconds
# of a processor.
MLX_PROGRAM = """
import sys, time
import mlx.core as mx
mx.set_default_device(mx.cpu)
rows, columns = int(sys.argv[1]), int(sys.argv[2])
x = (mx.random.normal((rows, columns)) * 0.02).astype(mx.bfloat16)
mx.eval(x)
for line in sys.stdin:
    began = time.process_time()
    mx.eval(*mx.quantize(x, group_size=64, bits=int(line)))
    print(time.process_time() - began, flush=True)
"""


def main() -> None:
    """Measure everything; a table on stderr, one JSON line on stdout."""
    parser = argparse.ArgumentParser(prog="repack.bench_convert", description=__doc__)
    parser.add_argument("--mlx", help="a Python that has mlx, for the encoder's bar")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--out", type=Path, help="on another disk, for what is converted (default: FOLDER)")
    parser.add_argument("--only", choices=PARTS, help="one part")
    options = parser.parse_args()
    out = options.out or options.folder
    with tempfile.TemporaryDirectory(dir=options.folder) as name, tempfile.TemporaryDirectory(dir=out) as other:
        bars: list[Bar] = []
        for found in measure(Path(name), Path(other), options.mlx, [options.only] if options.only else PARTS):
            bars.append(found)
            sys.stderr.write(f"{found}\n")
    settings = {
        "encoder": encoder_name(),
        "jobs": default_jobs(),
        "hash_source": False,
        "own_disk": options.out is not None,
        "bits": 4,
        "group_size": 64,
    }
    sys.stdout.write(report(bars, settings) + "\n")


def measure(folder: Path, out: Path, mlx: str | None, parts: Sequence[str]) -> Iterator[Bar]:
    """Every bar of some parts, with the rates behind it on stderr."""
    if "encoder" in parts and (mlx is None or not native.encoder_levels()):
        sys.stderr.write("encoder: not measured, it takes the native library and --mlx\n")
    elif "encoder" in parts:
        yield from encoder_bars(str(mlx))
    if "convert" in parts:
        yield from conversion_bars(folder, out)
    if "rehearse" in parts:
        yield rehearsal_bar(folder)


def encoder_bars(mlx: str) -> Iterator[Bar]:
    """The native encoder over mx.quantize on the CPU, one thread each, in processor time: neighbours count for less."""
    values = normal(ENCODER_ROWS * ENCODER_COLUMNS).reshape(ENCODER_ROWS, ENCODER_COLUMNS)
    step = READ_BYTES // (2 * ENCODER_COLUMNS)  # as a conversion encodes: what it has just read

    def ours(bits: int) -> float:
        encoding = Affine(bits, 64, "bf16")
        began = time.process_time()
        for i in range(0, len(values), step):
            native.encode_affine(encoding, values[i : i + step], "bf16")
        return time.process_time() - began

    arguments = [mlx, "-c", MLX_PROGRAM, str(ENCODER_ROWS), str(ENCODER_COLUMNS)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for bits in native.ENCODED_BITS:
            mine, theirs = [], []
            for _ in range(RUNS):
                process.stdin.write(f"{bits}\n")
                process.stdin.flush()
                theirs.append(float(process.stdout.readline()))
                mine.append(ours(bits))
            tell(f"encoder, {bits} bits", values.nbytes, mine, "mx.quantize", theirs)
            yield bar(f"encoder {bits} bits / mx.quantize", ratios(theirs, mine), BARS["encoder"])
        process.stdin.close()


def conversion_bars(folder: Path, out: Path) -> Iterator[Bar]:
    """A whole conversion over raw reading of the same shards, alone and with raw writing of the output beside it."""
    source = write_checkpoint(folder / "source")
    conversion = prepare(FolderSource(source), Options())
    shards = [source / shard.name for shard in conversion.shards]
    nbytes = sum(path.stat().st_size for path in shards)
    reads, boths, converts = [], [], []
    for _ in range(RUNS):
        reads.append(min(seconds(partial(read_raw, shards, threads)) for threads in (1, 2)))
        both = partial(read_and_write_raw, shards, out / "raw", conversion.plan.layout.total_bytes)
        boths.append(min(seconds(partial(both, step)) for step in RAW_WRITE_BYTES))
        converts.append(convert_once(conversion, out / "out"))
    shutil.rmtree(source)
    tell("file to file", nbytes, converts, "raw reading", reads)
    yield bar("file to file / raw reading", ratios(reads, converts), BARS["file to file"])
    tell("file to file", nbytes, converts, "raw reading beside raw writing", boths)
    yield bar("file to file / raw reading beside raw writing", ratios(boths, converts), BARS["file to file"])


def rehearsal_bar(folder: Path) -> Bar:
    """A whole rehearsal over raw sequential writing of as many bytes."""
    config = folder / "config.json"
    config.write_bytes(config_bytes(REHEARSAL_LAYERS))
    rehearsal = prepare_rehearsal(read_geometry(config), Options(), 0)
    nbytes = rehearsal.plan.layout.total_bytes
    writes, rehearses = [], []
    for _ in range(RUNS):
        writes.append(min(seconds(partial(write_raw_once, folder / "raw", nbytes, step)) for step in RAW_WRITE_BYTES))
        rehearses.append(convert_once(rehearsal, folder / "out"))
    tell("rehearse", nbytes, rehearses, "raw writing", writes)
    return bar("rehearse / raw sequential writing", ratios(writes, rehearses), BARS["rehearse"])


def convert_once(conversion: Conversion, out: Path) -> float:
    """Seconds of a conversion into a new folder, durable at its end."""
    took = seconds(lambda: convert(conversion, out, jobs=default_jobs(), hash_source=False))
    shutil.rmtree(out)
    return took


def read_raw(paths: Sequence[Path], threads: int, step: int = BUFFER_BYTES) -> None:
    """Read files past the page cache into one buffer per thread, so many at a time."""

    def read(path: Path) -> None:
        fd, _ = open_direct(path, os.O_RDONLY)
        buffer = aligned_buffer(step)
        for offset, _ in blocks(os.fstat(fd).st_size, step):
            os.preadv(fd, [buffer], offset)
        os.close(fd)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, paths))


def write_raw_once(path: Path, nbytes: int, step: int) -> None:
    """Write a file raw, and remove it."""
    write_raw(path, nbytes, step)
    path.unlink()


def write_raw(path: Path, nbytes: int, step: int) -> None:
    """Write a file past the page cache from one buffer, and make it durable."""
    fd, _ = open_direct(path, os.O_WRONLY | os.O_CREAT)
    buffer = aligned_buffer(step)
    buffer[:] = np.random.default_rng(0).bytes(step)
    for offset, length in blocks(nbytes, step):
        os.pwrite(fd, buffer[:length], offset)
    os.fsync(fd)
    os.close(fd)


def read_and_write_raw(shards: Sequence[Path], path: Path, nbytes: int, step: int) -> None:
    """Both at once: what a disk that shares its rate between them allows a conversion."""
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_raw, path, nbytes, step)
        read_raw(shards, 2)
        writing.result()
    path.unlink()


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint of CONFIG with normal weights, one shard per layer and one for the rest."""
    folder.mkdir()
    raw = config_bytes(SOURCE_LAYERS)
    (folder / "config.json").write_bytes(raw)
    config = read_config(raw)
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape, _ in FAMILIES[config.model_type].checkpoint(config):
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append((name, shape))
    pool = normal(1 << 25).data.cast("B")
    for file, tensors in shards.items():
        write_shard(folder / file, tensors, pool)
    return folder


def write_shard(path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], pool: memoryview) -> None:
    header, end = {}, 0
    for name, shape in tensors:
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + nbytes)}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the safetensors library does
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, length in blocks(end, len(pool)):
            file.write(pool[:length])
            file.flush()
            os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def config_bytes(layers: int) -> bytes:
    return json.dumps({**CONFIG, "num_hidden_layers": layers}).encode()


def normal(count: int) -> AnyArray:
    """Weights of about the usual size, bf16."""
    return from_float32(np.random.default_rng(0).standard_normal(count, np.float32) * np.float32(0.02), "bf16")


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Rates of ours over theirs, from seconds for the same bytes."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def tell(what: str, nbytes: int, ours: Sequence[float], yardstick: str, theirs: Sequence[float]) -> None:
    """The rates behind a bar."""
    rates = [nbytes / statistics.median(times) / 1e9 for times in (ours, theirs)]
    sys.stderr.write(f"{what}: {rates[0]:.2f} GB/s where {yardstick} reaches {rates[1]:.2f}\n")


def seconds(work: Callable[[], object]) -> float:
    """How long work takes, once."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    try:
        main()
    except StreamingExpertsError as error:
        sys.exit(f"error: {error}")
