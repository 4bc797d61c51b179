"""The Python API as README documents it, and every request that it refuses."""

import threading
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.budget import human
from formats.dtypes import Float32
from formats.errors import FormatError, RequestError
from runtime import Engine, SamplingOptions, Session
from runtime.sampling import Sampler, read_generation_config
from tests.runtime.engines import PROMPT, every_call, joined, open_demo
from tests.runtime.helpers import floor_bytes, open_fds, reference

VOCAB_SIZE = 4096
GREEDY = reference("demo/reference.npz")["greedy_ids"].tolist()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning of a temporary folder in memory: see test_direct.py."""
    monkeypatch.setattr("runtime.store.proves_direct", lambda file: True)


# ---- what it gives


def test_logits_are_float32_of_every_position(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        found = engine.logits(PROMPT)
    assert found.shape == (len(PROMPT), VOCAB_SIZE)
    assert found.dtype == np.float32


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_the_last_layer_chooses_experts_for_the_last_token_of_each_chunk_alone(
    demo4: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    with open_demo(demo4, backend=backend, chunk_size=len(PROMPT) - 4, lookahead="off") as engine:
        ops, layers = engine.ops, engine.config.num_hidden_layers
        route = ops.route

        def watched(logits: Float32, *args: Any) -> Any:
            asked.append(len(logits))
            return route(logits, *args)

        monkeypatch.setattr(ops, "route", watched)
        engine.prefill(engine.new_session(), PROMPT)
        assert asked == [len(PROMPT) - 4] * (layers - 1) + [1] + [4] * (layers - 1) + [1]
        asked.clear()
        engine.logits(PROMPT)
        assert asked == [len(PROMPT) - 4] * layers + [4] * layers


def test_token_ids_may_be_an_array(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        assert np.array_equal(engine.logits(np.array(PROMPT)), engine.logits(PROMPT))  # type: ignore[arg-type]


def test_generated_ids_are_a_list_of_integers_greedy_unless_asked(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        found = engine.generate_ids(PROMPT, max_new_tokens=4, ignore_eos=True)
        best = [int(engine.logits([*PROMPT, *found[:i]])[-1].argmax()) for i in range(4)]
    assert found == best
    assert all(type(token_id) is int for token_id in found)


def test_sampling_can_be_asked_for(demo4: Path) -> None:
    hot = SamplingOptions(temperature=3.0, seed=1)
    with open_demo(demo4) as engine:
        greedy = engine.generate_ids(PROMPT, max_new_tokens=8, ignore_eos=True)
        assert engine.generate_ids(PROMPT, max_new_tokens=8, ignore_eos=True, sampling=hot) != greedy


def test_no_new_tokens_are_none(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        assert engine.generate_ids(PROMPT, max_new_tokens=0) == []


def test_text_comes_in_pieces(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        pieces = list(engine.generate("Once upon a time", max_new_tokens=8, temperature=0.7, seed=3))
    assert len(pieces) > 1
    assert all(isinstance(piece, str) for piece in pieces)


def test_text_is_that_of_the_ids(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        ids = engine.generate_ids(engine.text.encode("Once upon a time"), max_new_tokens=8, ignore_eos=True)
        decoder = engine.text.decoder()
        expected = "".join(map(decoder.push, ids)) + decoder.finish()
        assert joined(engine, temperature=0, ignore_eos=True) == expected


def test_a_prompt_of_text_may_be_given_as_ids(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        ids = engine.text.encode("Once upon a time")
        assert "".join(engine.generate(ids, max_new_tokens=8, temperature=0)) == joined(engine, temperature=0)


def test_one_seed_gives_one_text(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        assert joined(engine, seed=5) == joined(engine, seed=5)


def test_other_seeds_give_other_texts(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        assert len({joined(engine, seed=seed) for seed in range(4)}) > 1


def test_a_session_goes_on_where_it_was(demo16: Path) -> None:
    prompt = reference("demo/reference.npz")["prompt_ids"].tolist()
    with open_demo(demo16) as engine:
        session = engine.new_session()
        first = engine.generate_ids(prompt, max_new_tokens=5, ignore_eos=True, session=session)
        assert session.token_ids == [*prompt, *first[:-1]]
        following = engine.generate_ids(first[-1:], max_new_tokens=5, ignore_eos=True, session=session)
    assert first + following == GREEDY[:10]


def test_the_repeat_penalty_punishes_what_a_session_has_read(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    histories: list[list[int]] = []

    def sample(self: Sampler, logits: Float32, history: list[int]) -> int:
        histories.append(list(history))
        return 7

    monkeypatch.setattr(Sampler, "sample", sample)
    with open_demo(demo4) as engine:
        session = engine.new_session()
        engine.step([(session, [10, 11])])
        engine.generate_ids([12, 13], max_new_tokens=2, session=session)
    assert histories == [[10, 11, 12, 13], [10, 11, 12, 13, 7]]


# ---- how generation ends


def stop_at(monkeypatch: pytest.MonkeyPatch, token_ids: list[int]) -> None:
    """Make every generation choose these ids, then 9 for ever."""
    monkeypatch.setattr(Sampler, "sample", lambda *_: token_ids.pop(0) if token_ids else 9)


@pytest.mark.parametrize("stop_id", [0, 2])
def test_every_stop_id_of_generation_config_ends_the_ids_and_is_not_among_them(
    demo4: Path, monkeypatch: pytest.MonkeyPatch, stop_id: int
) -> None:
    stop_at(monkeypatch, [5, 6, stop_id, 8])
    with open_demo(demo4) as engine:
        assert engine.generation.stop_ids == (0, 2)
        assert engine.generate_ids(PROMPT, max_new_tokens=10) == [5, 6]
        assert engine.stats.ended == "stop token"


def test_stop_ids_can_be_ignored(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, [5, 0, 2, 8])
    with open_demo(demo4) as engine:
        assert engine.generate_ids(PROMPT, max_new_tokens=4, ignore_eos=True) == [5, 0, 2, 8]
        assert engine.stats.ended == "max_new_tokens"


def test_a_stop_string_ends_the_text_before_it(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        whole = joined(engine, temperature=0, max_new_tokens=24, ignore_eos=True)
        stop = whole[20:24]
        ended = joined(engine, temperature=0, max_new_tokens=24, ignore_eos=True, stop=["no such text", stop])
        assert engine.stats.ended == "stop text"
    assert ended == whole[: whole.index(stop)]


def test_generation_ends_when_the_context_is_full(demo4: Path) -> None:
    with open_demo(demo4, ctx_size=16) as engine:
        session = engine.new_session()
        found = engine.generate_ids(PROMPT, max_new_tokens=100, ignore_eos=True, session=session)
        assert len(session.token_ids) == 16
        assert engine.stats.ended == "ctx_size"
    assert len(found) == 5  # four more fit; the logits after the last one give a fifth


# ---- defaults


def test_text_is_sampled_as_generation_config_says(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingOptions] = []
    init = Sampler.__init__

    def watched(self: Sampler, options: SamplingOptions) -> None:
        seen.append(options)
        init(self, options)

    monkeypatch.setattr(Sampler, "__init__", watched)
    with open_demo(demo4) as engine:
        joined(engine, max_new_tokens=1)
        joined(engine, max_new_tokens=1, top_p=0.5, seed=1)
    defaults = SamplingOptions(temperature=0.7, top_k=40, top_p=0.95)
    assert seen == [defaults, replace(defaults, top_p=0.5, seed=1)]


def test_the_context_is_that_of_the_model_but_at_most_4096(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        assert engine.ctx_size == 2048
        assert engine.chunk_size == 512


def test_without_a_ceiling_it_takes_a_share_of_what_is_free(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.default_ram_bytes", lambda: 123_456_789_000)
    with open_demo(demo4, ram_bytes=None) as engine:
        assert engine.stats.ram_bytes == 123_456_789_000
        assert engine.warnings == []


def test_too_little_free_memory_is_a_warning_that_names_both(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floor = floor_bytes(demo4)
    monkeypatch.setattr("runtime.engine.default_ram_bytes", lambda: 1 << 20)
    with open_demo(demo4, ram_bytes=None) as engine:
        assert engine.stats.ram_bytes == floor
        assert engine.warnings == [f"1.00 MiB of memory are free for it, but this run takes {human(floor)}"]


def test_a_ceiling_beyond_the_machine_is_a_warning_only_where_it_would_be_used(
    demo4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor, every = floor_bytes(demo4), 500 << 30
    monkeypatch.setattr("runtime.engine.default_ram_bytes", lambda: 200 << 20)
    with open_demo(demo4, ram_bytes=every) as engine:
        taken = engine.terms.taken_bytes(engine.container.index.layout, every)
        assert floor < taken < 200 << 20
        assert engine.warnings == []
    monkeypatch.setattr("runtime.engine.default_ram_bytes", lambda: floor)
    with open_demo(demo4, ram_bytes=every) as engine:
        assert engine.warnings == [f"{human(floor)} of memory are free for it, but this run takes {human(taken)}"]


# ---- what it refuses


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as caught:
        call()
    return str(caught.value)


def test_less_memory_than_the_floor_is_refused_with_every_term(demo4: Path) -> None:
    floor = floor_bytes(demo4)
    message = refused(lambda: Engine.open(demo4, ram_bytes=floor - 1))
    assert f"but this model needs {human(floor)} (" in message
    for term in ("base", "tokenizer", "resident", "state", "kv", "scratch", "min_slots"):
        assert f"{term} " in message


def test_the_floor_itself_is_enough(demo4: Path) -> None:
    with open_demo(demo4, ram_bytes=floor_bytes(demo4)) as engine:
        assert engine.stats.slots == 2
        assert engine.generate_ids(PROMPT, max_new_tokens=2, ignore_eos=True)


def test_more_memory_is_more_slots_until_there_is_one_for_each(demo4: Path) -> None:
    with open_demo(demo4, ram_bytes=floor_bytes(demo4) + (1 << 20)) as engine:
        assert 2 < engine.stats.slots < 320
    with open_demo(demo4, ram_bytes=1 << 50) as engine:
        assert engine.stats.slots == 320


def test_an_unknown_backend_is_refused_by_name(demo4: Path) -> None:
    assert refused(lambda: open_demo(demo4, backend="abacus")).startswith("--backend is abacus, expected auto or ")


@pytest.mark.parametrize(
    ("option", "flag"), [("ctx_size", "--ctx-size"), ("chunk_size", "--chunk"), ("threads", "--threads")]
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_is_refused(demo4: Path, option: str, flag: str, value: int) -> None:
    message = refused(lambda: open_demo(demo4, **{option: value}))
    assert message == f"{flag} is {value}, expected at least 1"


def test_a_context_beyond_the_model_s_is_refused(demo4: Path) -> None:
    message = refused(lambda: open_demo(demo4, ctx_size=2049))
    assert message == "--ctx-size is 2049, but the model's max_position_embeddings is 2048"


@every_call
def test_a_prompt_longer_than_the_context_is_refused(demo4: Path, call: Callable[[Engine, list[int]], object]) -> None:
    with open_demo(demo4, ctx_size=8) as engine:
        assert refused(lambda: call(engine, [5] * 9)) == "the prompt makes 9 tokens, but --ctx-size is 8"


def test_a_session_that_would_outgrow_the_context_is_refused(demo4: Path) -> None:
    with open_demo(demo4, ctx_size=8) as engine:
        session = engine.new_session()
        engine.step([(session, [5] * 6)])
        assert refused(lambda: engine.prefill(session, [5] * 3)) == "the prompt makes 9 tokens, but --ctx-size is 8"
        assert len(session.token_ids) == 6


@every_call
def test_an_empty_prompt_is_refused(demo4: Path, call: Callable[[Engine, list[int]], object]) -> None:
    with open_demo(demo4) as engine:
        assert refused(lambda: call(engine, [])) == "the prompt has no tokens, expected at least one"


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(demo4: Path, token_id: int) -> None:
    with open_demo(demo4) as engine:
        assert refused(lambda: engine.logits([5, token_id])) == f"token id is {token_id}, expected 0 to 4095"


def test_a_session_may_stand_only_once_in_a_step(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        session = engine.new_session()
        assert "stands twice" in refused(lambda: engine.step([(session, [5]), (session, [6])]))
        assert session.token_ids == []


def test_sampling_that_makes_no_sense_is_refused_before_anything_is_computed(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        assert "top_p is 2" in refused(lambda: joined(engine, top_p=2.0))
        assert engine.stats.prompt_tokens == 0


# ---- a container without a tokenizer


def test_ids_work_without_a_tokenizer(fused16: Path) -> None:
    with open_demo(fused16) as engine:
        assert len(engine.generate_ids([1, 2, 3], max_new_tokens=4, ignore_eos=True)) == 4


def test_text_without_a_tokenizer_is_refused_by_name(fused16: Path) -> None:
    with (
        open_demo(fused16) as engine,
        pytest.raises(FormatError, match=r"^tokenizer\.json: is missing from the container: "),
    ):
        joined(engine)


# ---- resources and counters


def test_closing_ends_all_threads_and_closes_all_files(demo4: Path) -> None:
    files, threads = open_fds(), threading.active_count()
    with open_demo(demo4, threads=3) as engine:
        engine.logits(PROMPT)
        assert threading.active_count() > threads
    assert threading.active_count() == threads
    assert open_fds() == files


def test_closing_twice_does_no_harm(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        engine.close()


def test_counters_are_a_dataclass_that_stays_as_it_was(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        before = engine.stats
        engine.generate_ids(PROMPT, max_new_tokens=3, ignore_eos=True)
        assert is_dataclass(before)
        assert (before.prompt_tokens, before.bytes_read) == (0, 0)


def test_counters_count(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        engine.generate_ids(PROMPT, max_new_tokens=3, ignore_eos=True)
        stats = engine.stats
        record_bytes = engine.experts.store.record_bytes(0)
    assert stats.prompt_tokens == len(PROMPT)
    assert stats.generated_tokens == 2  # the first came out of the prompt
    assert stats.bytes_read == stats.cache_misses * record_bytes
    assert min(stats.prompt_s, stats.decode_s, stats.read_s, stats.cache_hits, stats.peak_memory_bytes) > 0
    assert stats.prompt_tokens_per_s == stats.prompt_tokens / stats.prompt_s
    assert stats.decode_tokens_per_s == stats.generated_tokens / stats.decode_s
    assert stats.read_bytes_per_s == stats.bytes_read / stats.read_s
    assert stats.hit_rate == stats.cache_hits / (stats.cache_hits + stats.cache_misses)


def test_rates_before_anything_happened_are_zero(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        stats = engine.stats
    rates = (stats.prompt_tokens_per_s, stats.decode_tokens_per_s, stats.read_bytes_per_s, stats.hit_rate)
    assert rates == (0, 0, 0, 0)


def test_generation_config_keys_that_are_not_implemented_are_one_warning(
    demo4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_generation_config(None)
    monkeypatch.setattr(
        "runtime.engine.read_generation_config", lambda *files: replace(config, ignored=("num_beams", "typical_p"))
    )
    with open_demo(demo4) as engine:
        assert engine.warnings == ["generation_config.json: num_beams, typical_p: not implemented, ignored"]


def test_a_new_session_has_read_nothing(demo4: Path) -> None:
    with open_demo(demo4) as engine:
        session = engine.new_session()
    assert isinstance(session, Session)
    assert session.token_ids == []
    assert len(session.states) == 8
