"""The native reader: the same bytes, errors and results as the threads of Python, and nothing left behind."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import xxhash

from formats.container import open_container
from formats.errors import ChecksumError, StorageError
from formats.layout import layer_file
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from runtime import Engine
from runtime.backends import native
from runtime.cache import ExpertKey, Held
from runtime.experts import Experts
from runtime.native_reader import NativeReader, xxh3
from runtime.store import ExpertStore

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels are not built")

LAYER = 3
EVERY = list(range(40))
PROMPT = [int(i) for i in np.random.default_rng(0).integers(3, 4000, 60)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reader") / "out"
    convert(prepare(open_local("demo"), Options(4, 64, 4)), out, hash_source=False)
    return out


@pytest.fixture
def own(demo: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(demo, tmp_path / "own"))


@pytest.fixture
def store(demo: Path) -> Iterator[ExpertStore]:
    with closing(ExpertStore(open_container(demo))) as opened:
        yield opened


def experts(store: ExpertStore, num_slots: int, readers: int = 4) -> "closing[Experts]":
    return closing(Experts(store, num_slots, readers, native=True))


def nothing_is_leased(found: Experts, num_slots: int) -> bool:
    return found.cache.leased() == [] and found.cache.idle_slots == num_slots


@pytest.mark.parametrize("nbytes", [241, 256, 1023, 1024, 1025, 1088, 1089, 16384, 99_999])
def test_its_checksum_is_that_of_xxhash(nbytes: int) -> None:
    data = np.frombuffer(np.random.default_rng(nbytes).bytes(nbytes), np.uint8)
    assert xxh3(data) == xxhash.xxh3_64_intdigest(data.tobytes())


@pytest.mark.parametrize("num_slots", [1, 2, 3, 39, 40, 100])
@pytest.mark.parametrize("readers", [1, 4])
def test_every_expert_comes_once_with_its_record(store: ExpertStore, num_slots: int, readers: int) -> None:
    slot = store.new_slots(1)[0]
    with experts(store, num_slots, readers) as found:
        records = {expert: record.copy() for expert, record in found.get(LAYER, EVERY)}
        assert nothing_is_leased(found, num_slots)
    assert sorted(records) == EVERY
    for expert, record in records.items():
        store.read(ExpertKey(LAYER, expert), slot)
        assert np.array_equal(record, slot[: len(record)])


def test_a_second_time_nothing_is_read(store: ExpertStore) -> None:
    with experts(store, 40) as found:
        list(found.get(LAYER, EVERY))
        list(found.get(LAYER, EVERY))
        assert found.bytes_read == 40 * store.record_bytes(LAYER)
    assert found.bytes_read == 40 * store.record_bytes(LAYER)  # and closing forgets no count


def test_a_damaged_record_is_named_as_the_reference_names_it(own: Path) -> None:
    nbytes = open_container(own).data_bytes[layer_file(LAYER)] // 40
    with open(own / layer_file(LAYER), "r+b") as file:
        file.seek(17 * nbytes + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with closing(ExpertStore(open_container(own))) as store:
        with pytest.raises(ChecksumError) as expected:
            store.read(ExpertKey(LAYER, 17), store.new_slots(1)[0])
        with experts(store, 8) as found:
            for _ in range(2):  # a record that was wrong once is checked again
                with pytest.raises(ChecksumError) as caught:
                    list(found.get(LAYER, EVERY))
                assert str(caught.value) == str(expected.value)
                assert nothing_is_leased(found, 8)
            assert len(list(found.get(LAYER, EVERY[:17]))) == 17


def test_a_short_read_is_named_as_the_reference_names_it(own: Path) -> None:
    with closing(ExpertStore(open_container(own))) as store:
        os.truncate(own / layer_file(LAYER), 39 * store.record_bytes(LAYER) + 4096)
        with pytest.raises(StorageError) as expected:
            store.read(ExpertKey(LAYER, 39), store.new_slots(1)[0])
        with experts(store, 8) as found, pytest.raises(StorageError) as caught:
            list(found.get(LAYER, EVERY))
    assert str(caught.value) == str(expected.value)
    assert "layer 3 expert 39 has 4096 bytes" in str(caught.value)


def test_a_read_that_the_kernel_refuses_is_named(store: ExpertStore) -> None:
    with experts(store, 8) as found:
        os.close(store._files[LAYER].fd)
        with pytest.raises(StorageError, match=r"layer 3 expert 0 cannot be read \(Bad file descriptor\)"):
            list(found.get(LAYER, [0]))
        store._files[LAYER].fd = os.open(os.devnull, os.O_RDONLY)


def test_no_two_reads_go_into_one_slot(store: ExpertStore) -> None:
    slots = store.new_slots(40)
    with closing(NativeReader(store, slots, 1)) as reader:
        reader.submit([Held(ExpertKey(LAYER, i), i) for i in EVERY])
        with pytest.raises(AssertionError, match="while it is in use"):
            reader.submit([Held(ExpertKey(LAYER, 0), 39)])


def test_reads_that_have_not_begun_can_be_taken_back(store: ExpertStore) -> None:
    slots = store.new_slots(40)
    with closing(NativeReader(store, slots, 1)) as reader:
        reader.submit([Held(ExpertKey(LAYER, i), i) for i in EVERY])
        reader.cancel(EVERY)
        assert not any(reader.pending(slot) for slot in EVERY)
        assert reader.counters.nbytes == sum(reader.holds(slot) for slot in EVERY) * store.record_bytes(LAYER)
        assert not reader.holds(39)


def test_closing_takes_back_what_is_queued(store: ExpertStore) -> None:
    reader = NativeReader(store, store.new_slots(40), 2)
    reader.submit([Held(ExpertKey(LAYER, i), i) for i in EVERY])
    reader.close()
    assert reader.counters.nbytes < 40 * store.record_bytes(LAYER)


def test_stopping_ends_a_step_and_leaves_nothing_leased(store: ExpertStore) -> None:
    with experts(store, 8) as found:
        records = found.get(LAYER, EVERY)
        next(records)
        found.stop()
        with pytest.raises(CancelledError):
            next(records)
        assert nothing_is_leased(found, 8)
        found.resume()
        assert len(list(found.get(LAYER, EVERY))) == 40


# ---- guesses


def test_guesses_that_come_true_are_read_once_and_count_as_misses(store: ExpertStore) -> None:
    with experts(store, 40) as found:
        found.look_ahead(LAYER, [1, 2, 3, 4], most=4)
        assert sorted(expert for expert, _ in found.get(LAYER, [1, 2, 3, 4, 5])) == [1, 2, 3, 4, 5]
        assert (found.early_reads, found.early_used) == (4, 4)
        assert (found.cache.hits, found.cache.misses) == (0, 5)
        assert found.bytes_read == 5 * store.record_bytes(LAYER)
        assert nothing_is_leased(found, 40)


def test_guesses_that_come_to_nothing_leave_nothing_leased(store: ExpertStore) -> None:
    with experts(store, 40) as found:
        found.look_ahead(LAYER, EVERY[10:30], most=20)
        list(found.get(LAYER, [1, 2]))
        assert found.early_used == 0
        list(found.get(LAYER, [1, 2]))
        found.abandon()
        assert nothing_is_leased(found, 40)
        assert len(list(found.get(LAYER, EVERY))) == 40


def test_guesses_take_at_most_half_of_the_idle_slots(store: ExpertStore) -> None:
    with experts(store, 6) as found:
        found.look_ahead(LAYER, EVERY, most=40)
        assert found.early_reads == 3
        assert len(list(found.get(LAYER + 1, EVERY))) == 40


# ---- under a whole model


def test_results_are_the_same_bits_whatever_is_cached_and_however_it_arrives(demo: Path) -> None:
    with Engine.open(demo, backend="native") as engine:
        expected, floor = engine.logits(PROMPT), engine.terms.floor_bytes
    record = 1 << 16
    for slots, readers, lookahead in ((0, 1, "off"), (0, 4, "on"), (10, 2, "on"), (60, 2, "on"), (100, 8, "auto")):
        with Engine.open(
            demo, backend="native", ram_bytes=floor + slots * record, readers=readers, lookahead=lookahead
        ) as engine:
            assert np.array_equal(engine.logits(PROMPT), expected)
            assert np.array_equal(engine.logits(PROMPT), expected)


def test_guesses_are_made_and_change_no_token(demo: Path) -> None:
    with Engine.open(demo, backend="native", lookahead="off") as engine:
        expected, floor = engine.generate_ids(PROMPT, max_new_tokens=80, ignore_eos=True), engine.terms.floor_bytes
        assert (engine.stats.lookahead, engine.stats.early_reads) == ("off", 0)
    with Engine.open(demo, backend="native", ram_bytes=floor + 80 * (1 << 16), lookahead="on") as engine:
        assert engine.generate_ids(PROMPT, max_new_tokens=80, ignore_eos=True) == expected
        assert 0 < engine.stats.early_used < engine.stats.early_reads
    with Engine.open(demo, backend="native", ram_bytes=floor + 80 * (1 << 16), lookahead="auto") as engine:
        assert engine.generate_ids(PROMPT, max_new_tokens=80, ignore_eos=True) == expected
        assert engine.stats.lookahead.startswith(("auto: on, a step is", "auto: off, a step is"))


@pytest.mark.parametrize("lookahead", ["prompts", "auto", "on"])
def test_a_prompt_guesses_also_where_tokens_do_not(demo: Path, lookahead: str) -> None:
    with Engine.open(demo, backend="native") as engine:
        floor = engine.terms.floor_bytes
    with Engine.open(demo, backend="native", ram_bytes=floor + 80 * (1 << 16), lookahead=lookahead) as engine:
        engine.logits(PROMPT)
        assert engine.stats.early_used > 0


def test_a_damaged_expert_stops_a_native_step_and_the_next_one_works(own: Path) -> None:
    with Engine.open(own, backend="native") as engine:
        expected = engine.logits(PROMPT)
    nbytes = open_container(own).data_bytes[layer_file(LAYER)] // 40
    path = own / layer_file(LAYER)
    sound = path.read_bytes()
    path.write_bytes(sound[: 4 * nbytes] + bytes(nbytes) + sound[5 * nbytes :])
    with Engine.open(own, backend="native") as engine:
        with pytest.raises(ChecksumError, match="layer 3 expert 4 has checksum"):
            engine.logits(PROMPT)
        with open(path, "r+b") as file:
            file.write(sound)
        assert np.array_equal(engine.logits(PROMPT), expected)
