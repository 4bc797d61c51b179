"""How near expert reads and their overlap come to what the disk allows: `make bench-store`.

Containers of true geometry, cut in layers (and the vocabulary with them), are made by `repack rehearse` and removed
afterwards. Every bar is a ratio of times taken in turns in one process; its value is the median over the rounds.
What is neither read nor kernel is measured apart for layers and for what a step has once (threads, the check of its
logits, the row of the embedding); its share is stated for the whole model's number of layers. The last line is one JSON
object.
"""

import argparse
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from formats.bars import Bar, bar, report
from formats.container import open_container
from formats.dtypes import AnyArray
from runtime.backends import abi, native
from runtime.backends.facts import Routing, Stack, Wanted
from runtime.backends.native_ops import NativeOps
from runtime.bench_kernels import seconds
from runtime.cache import ExpertKey, Held
from runtime.engine import READERS, Engine
from runtime.experts import Experts
from runtime.native_reader import NativeReader
from runtime.sampling import SamplingOptions
from runtime.session import Sequence as StepSequence
from runtime.simulate import engine_policy, hit_rates, replay
from runtime.store import ExpertStore
from runtime.trace import Trace, read_trace, skewed_trace

SLOT_BYTES = 512 << 20  # of the pool that reads go into: every round uses all of it
ROUNDS = 9
STEPS = 3  # decode steps of each kind in a round
OVERHEAD = 1.10
CACHE_SHARES = (0.1, 0.25, 0.5)
SKEWS = {"24 % take 80 %": (0.24, 0.8), "10 % take 70 %": (0.1, 0.7)}

QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936 * 6 // 48,
    "max_position_embeddings": 40960,
}  # fmt: skip
QWEN3_5_397B = {
    "model_type": "qwen3_5_moe_text", "hidden_size": 4096, "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024, "num_hidden_layers": 4, "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_attention_heads": 32, "num_key_value_heads": 2,
    "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 64, "num_experts": 128, "num_experts_per_tok": 10,
    "hidden_act": "silu", "attention_bias": False, "attn_output_gate": True, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "vocab_size": 248320 * 4 // 60, "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_interleaved": True, "mrope_section": [11, 11, 10]},
}  # fmt: skip
QWEN3_5_35B = {
    **QWEN3_5_397B, "hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_attention_heads": 16, "linear_num_value_heads": 32, "vocab_size": 248320 * 4 // 40,
}  # fmt: skip
KIMI_K2_WIDE = {  # Kimi's experts, 24.8 MB each; attention is that of qwen3_moe, for only the reads are measured
    **QWEN3_30B, "hidden_size": 7168, "moe_intermediate_size": 2048, "num_hidden_layers": 2, "num_experts": 48,
    "vocab_size": 4096,
}  # fmt: skip
MODELS = {
    "Qwen3.5-35B-A3B": QWEN3_5_35B,
    "Qwen3-30B-A3B": QWEN3_30B,
    "Qwen3.5-397B-A17B": QWEN3_5_397B,
    "Kimi-K2": KIMI_K2_WIDE,
}
DEPTHS = {"Qwen3-30B-A3B": 48, "Qwen3.5-397B-A17B": 60}  # layers of the whole models, whose vocabularies are cut alike
SHARES_OF_REST = {"Qwen3-30B-A3B": 0.10, "Qwen3.5-397B-A17B": 0.03}  # the most that is neither read nor kernel


def repack(*words: str | Path) -> None:
    """Run the other half of the program."""
    code = "from repack.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, stdout=sys.stderr)


# ---- reads


class Reads:
    """Random experts of one container into all slots, by the native reader and by bare preadv."""

    def __init__(self, folder: Path) -> None:
        self.store = ExpertStore(open_container(folder))
        self._layers = [(i, layer.num_experts) for i, layer in open_container(folder).index.layout.moe_layers()]
        self.record_bytes = self.store.record_bytes(self._layers[0][0])
        self.slots = self.store.new_slots(max(8, SLOT_BYTES // self.record_bytes))
        self.reader = NativeReader(self.store, self.slots, READERS)
        self.store.proven.update(ExpertKey(i, e) for i, number in self._layers for e in range(number))
        self._rng = np.random.default_rng(0)

    def draw(self) -> list[Held]:
        """An expert for every slot."""
        picks = (self._layers[self._rng.integers(len(self._layers))] for _ in self.slots)
        return [
            Held(ExpertKey(layer, int(self._rng.integers(number))), slot) for slot, (layer, number) in enumerate(picks)
        ]

    def by_reader(self, reads: Sequence[Held]) -> None:
        """As the engine reads."""
        self.reader.submit(reads)
        left = [slot for _, slot in reads]
        while left:
            left.pop(self.reader.wait_any(left))

    def raw(self, reads: Sequence[Held], pool: ThreadPoolExecutor | None) -> None:
        """The same reads, preadv and nothing else: from this thread, or from those of pool."""

        def read(held: Held) -> None:
            place = self.store.place(held.key)
            assert os.preadv(place.fd, [self.slots[held.slot][: place.nbytes].data], place.offset) == place.nbytes

        list(map(read, reads) if pool is None else pool.map(read, reads))

    def close(self) -> None:
        """End the reader and close the files."""
        self.reader.close()
        self.store.close()


def read_bar(folder: Path) -> Bar:
    """Rate of random reads by the native reader over that of the best number of threads that only call preadv."""
    with closing(Reads(folder)) as reads, ExitStack() as pools:
        threads = {n: pools.enter_context(ThreadPoolExecutor(n)) if n > 1 else None for n in (1, 2, READERS)}
        spent: dict[int, list[float]] = {n: [] for n in threads}
        ours: list[float] = []
        for _ in range(ROUNDS):
            draw = reads.draw()
            for n, pool in threads.items():
                spent[n].append(seconds(partial(reads.raw, draw, pool)))
            ours.append(seconds(partial(reads.by_reader, draw)))
        best = min(spent, key=lambda n: statistics.median(spent[n]))
        rate = reads.slots.shape[0] * reads.record_bytes / statistics.median(spent[best]) / 1e9
        megabytes = reads.record_bytes / 1e6
        sys.stderr.write(f"records of {megabytes:.1f} MB: raw O_DIRECT {rate:.2f} GB/s with {best} threads\n")
        ratios = [raw / own for raw, own in zip(spent[best], ours, strict=True)]
    return bar(f"random reads of {megabytes:.1f} MB / raw O_DIRECT preadv", ratios, 0.95)


# ---- a decode step


class Scripted:
    """The engine's kernels behind a router that is told how many of the experts it chooses are cached."""

    def __init__(self, ops: NativeOps, experts: Experts, num_experts: int) -> None:
        self._ops = ops
        methods = inspect.getmembers(ops, inspect.ismethod)  # called as an engine's model calls them
        vars(self).update({name: method for name, method in methods if not hasattr(Scripted, name)})
        ops._told.routing = partial(_given, ops._told.routing)
        self._experts = experts
        self._num_experts = num_experts
        self._rng = np.random.default_rng(0)
        self.cached_share = 0.5
        self.without_experts = False
        self.script_s = 0.0  # that no engine spends
        self.layers_rest_s = 0.0  # from the first layer's beginning to the last one's end, neither read nor kernel

    def __getattr__(self, name: str) -> Any:  # of what is no method
        return getattr(self._ops, name)

    def split(self, layer: int, hits: int, misses: int) -> AnyArray:
        """So many random experts of a layer that are cached, and so many that are not."""
        held = np.array([self._experts.cache.holds(ExpertKey(layer, e)) for e in range(self._num_experts)])
        cached, others = self._rng.permutation(np.flatnonzero(held)), self._rng.permutation(np.flatnonzero(~held))
        return np.concatenate([cached[:hits], others[:misses]])

    def _rest_s(self) -> float:
        return time.perf_counter() - self.kernel_s - self._experts.wait_s - self.script_s

    def layers(
        self, h: Any, y: Any, stack: Stack, sequences: Sequence[StepSequence], wanted: Wanted = None
    ) -> tuple[Any, Any]:
        """Experts are chosen before the first layer: one that leaves for another one's sake is one more to be read."""
        began = time.perf_counter()
        run = self._ops.written(stack, sequences[0].states)
        for layer, routed in enumerate(run.routed, stack.first):
            k = routed.expert_ids.shape[1]
            hits = round(self.cached_share * k)
            routed.expert_ids[0] = self.split(layer, hits, k - hits)
        self.script_s += time.perf_counter() - began
        rest_began = self._rest_s()
        if self.without_experts:
            run.tell(h, y, sequences[0])
            for begin, end in zip(run.begins, run.finds, strict=True):
                run.make(begin, end)
            h, y = run.h, run.y
        else:
            h, y = self._ops.layers(h, y, stack, sequences, wanted)
        self.layers_rest_s += self._rest_s() - rest_began
        return h, y


def _given(routing: Callable[..., abi.Routing], num_experts: int, how: Routing, _: bool) -> abi.Routing:
    """As it is told to kernels, but that experts are chosen before."""
    return routing(num_experts, how, True)


class Step(NamedTuple):
    """Seconds of a decode step."""

    whole: float
    layers_rest: float  # of the layers, neither read nor kernel
    other_rest: float  # of what a step has once, however many layers there are: threads, the check of logits
    row: float  # to read the token's row of the embedding, once too

    @property
    def kernels_and_reads(self) -> float:
        return self.whole - self.layers_rest - self.other_rest - self.row


def share_of_rest(steps: Sequence[Step], times: float) -> float:
    """What is neither read nor kernel in steps of so many times the layers, and of such a part of the vocabulary."""
    rest = sum(times * step.layers_rest + step.other_rest for step in steps)
    return rest / (rest + sum(times * step.kernels_and_reads + step.row for step in steps))


class Decoding:
    """One engine whose decode steps are taken apart."""

    def __init__(self, folder: Path) -> None:
        layout = open_container(folder).index.layout
        every = sum(layer.num_experts for _, layer in layout.moe_layers())
        record = max(layer.record.record_bytes for _, layer in layout.moe_layers())
        with Engine.open(folder, ctx_size=512, chunk_size=64) as engine:
            floor = engine.terms.floor_bytes
        self.engine = Engine.open(
            folder, ram_bytes=floor + every * record // 2, ctx_size=512, chunk_size=64, lookahead="off"
        )
        ops = self.engine.ops
        assert isinstance(ops, NativeOps)
        layers = dict(layout.moe_layers())
        self.layers = list(layers)
        experts, num_experts = self.engine.experts, next(iter(layers.values())).num_experts
        self.ops = Scripted(ops, experts, num_experts)
        self.engine.steps.model = replace(self.engine.steps.model, ops=self.ops)  # type: ignore[type-var]  # models are dataclasses
        for layer in self.layers:  # every layer fills its share of the slots, and all checksums count as compared
            experts.store.proven.update(ExpertKey(layer, e) for e in range(num_experts))
            for _ in experts.get(layer, list(range(num_experts // 2))):
                pass
        self._rng = np.random.default_rng(1)
        self._session = self.engine.new_session()

    def step(self, cached_share: float, *, without_experts: bool = False) -> float:
        """Seconds of a decode step, without what the script takes."""
        if len(self._session.token_ids) > 256:
            self._session = self.engine.new_session()
        self.ops.cached_share, self.ops.without_experts = cached_share, without_experts
        token, script_s = int(self._rng.integers(self.engine.config.vocab_size)), self.ops.script_s
        took = seconds(lambda: self.engine.step([(self._session, [token])]))
        return took - (self.ops.script_s - script_s)

    def reads(self) -> float:
        """Seconds of reading half of a step's experts, layer by layer, and nothing else."""
        misses = self.engine.config.top_k // 2
        draws = [(layer, self.ops.split(layer, 0, misses).tolist()) for layer in self.layers]

        def read() -> None:
            for layer, expert_ids in draws:
                for _ in self.engine.experts.get(layer, expert_ids):
                    pass

        return seconds(read)

    def split(self, cached_share: float, *, without_experts: bool = False) -> Step:
        """A step taken apart."""
        ops, waited = self.ops, self.engine.experts
        before = ops.kernel_s + waited.wait_s, ops.layers_rest_s, ops.rows_read_s
        whole = self.step(cached_share, without_experts=without_experts)
        after = ops.kernel_s + waited.wait_s, ops.layers_rest_s, ops.rows_read_s
        kernels_and_reads, layers_rest, row = (now - then for now, then in zip(after, before, strict=True))
        return Step(whole, layers_rest, whole - kernels_and_reads - layers_rest - row, row)


def decode_bars(model: str, folder: Path) -> Iterator[Bar]:
    """A step with half of its experts cached, beside its parts alone, and what is neither read nor kernel."""
    decoding = Decoding(folder)
    with decoding.engine:
        ratios, rest, rest_cached, parts = [], [], [], []
        times = DEPTHS[model] / len(decoding.layers)
        for number in range(ROUNDS + 1):
            half = [decoding.split(0.5) for _ in range(STEPS)]
            without = [decoding.split(0.5, without_experts=True) for _ in range(STEPS)]
            reads = [decoding.reads() for _ in range(STEPS)]
            cached = [decoding.split(1.0) for _ in range(STEPS)]
            if number == 0:
                continue  # the first round warms up
            whole, rest_alone = (statistics.median(step.whole for step in steps) for steps in (half, without))
            kernels = [statistics.median(step.kernels_and_reads for step in steps) for steps in (cached, without)]
            alone = rest_alone, statistics.median(reads), kernels[0] - kernels[1]
            ratios.append(whole / (alone[0] + max(alone[1:])))
            rest.append(share_of_rest(half, times))
            rest_cached.append(share_of_rest(cached, times))
            parts.append(
                (whole, *alone, *(s for step in (half[0], cached[0]) for s in (step.layers_rest, step.other_rest)))
            )
        step, no_experts, read, compute, *outside = (1e3 * statistics.median(kind) for kind in zip(*parts, strict=True))
        sys.stderr.write(
            f"{model}: step {step:.1f} ms; alone: all but experts {no_experts:.1f}, reads {read:.1f}, "
            f"experts {compute:.1f} ms\n"
            f"{model}: neither read nor kernel, in {len(decoding.layers)} layers and besides: half cached "
            f"{outside[0]:.2f} and {outside[1]:.2f}, all cached {outside[2]:.2f} and {outside[3]:.2f} ms\n"
        )
    yield bar(f"{model}: step / (rest + max(read, compute)), half cached", ratios, OVERHEAD, at_most=True)
    limit, depth = SHARES_OF_REST[model], f"at {DEPTHS[model]} layers"
    yield bar(f"{model}: neither read nor kernel {depth}, half cached", rest, limit, at_most=True)
    yield bar(f"{model}: neither read nor kernel {depth}, all cached", rest_cached, limit, at_most=True)


# ---- hit rates


def demo_trace(folder: Path) -> Trace:
    """What the demo checkpoint's router chooses over 400 tokens that it writes itself."""
    repack("convert", "demo", folder / "demo", "--no-hash-source")
    path = folder / "demo.jsonl.zst"
    with Engine.open(folder / "demo", trace=path) as engine:
        engine.generate_ids([5], max_new_tokens=400, ignore_eos=True, sampling=SamplingOptions(temperature=1.0, seed=0))
    return read_trace(path)


def hit_bars(traces: dict[str, Trace]) -> Iterator[Bar]:
    """Points of hit rate by which the engine's policy differs from the best online policy that is simulated."""
    for name, trace in traces.items():
        for share in CACHE_SHARES:
            slots = int(share * sum(trace.num_experts))
            rates = hit_rates(trace, slots)
            own = replay(trace, slots, engine_policy(trace, slots))
            best = max(rates.by_policy, key=lambda policy: rates.by_policy[policy])
            found = {"ours": own, f"best online ({best})": rates.by_policy[best]}
            found |= {"static optimum": rates.most_used, "Belady": rates.belady}
            listed = ", ".join(f"{policy} {100 * rate:.1f}" for policy, rate in found.items())
            sys.stderr.write(f"hit rates in %, {name}, {share:.0%} cached: {listed}\n")
            yield bar(f"hit rate - best online, {name}, {share:.0%} cached", [own - rates.by_policy[best]], -0.01)


def main() -> None:
    """Measure everything; a table on stderr, one JSON line on stdout."""
    parser = argparse.ArgumentParser(description="Reads, overlap and cache against what the disk allows.")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where up to 4 GB at a time are written")
    parser.add_argument("--only", choices=[*MODELS, "hits"], help="one part")
    parser.add_argument("--keep", action="store_true", help="keep containers, and use those that an earlier run kept")
    options = parser.parse_args()
    only, folder = options.only, options.folder
    folder.mkdir(parents=True, exist_ok=True)
    bars: list[Bar] = []

    def note(found: Bar) -> None:
        bars.append(found)
        sys.stderr.write(
            f"{found.name:70} {found.value:7.3f} of {found.bar:.3f} ({found.low:.3f} to {found.high:.3f})\n"
        )

    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-store-") as scratch:
        for model, config in MODELS.items():
            if only not in (None, model):
                continue
            out = (folder if options.keep else Path(scratch)) / f"bench-store-{model}"
            if not (out / "index.json").exists():
                (Path(scratch) / "config.json").write_text(json.dumps(config))
                repack("rehearse", Path(scratch) / "config.json", out)
            note(read_bar(out))
            if model in SHARES_OF_REST:
                for found in decode_bars(model, out):
                    note(found)
            if not options.keep:
                shutil.rmtree(out)
        if only in (None, "hits"):
            traces = {name: skewed_trace(hot_share=a, hot_accesses=b, seed=0) for name, (a, b) in SKEWS.items()}
            for found in hit_bars({"demo": demo_trace(Path(scratch)), **traces}):
                note(found)
    settings = {"rounds": ROUNDS, "steps": STEPS, "readers": READERS, "levels": native.levels()}
    sys.stdout.write(report(bars, {"settings": settings}) + "\n")


if __name__ == "__main__":
    main()
