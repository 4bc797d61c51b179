"""Damage on disk becomes an error that names the place, at open or at the first read; never text."""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.container import open_container
from formats.dtypes import Float32
from formats.errors import ChecksumError, FormatError, StorageError, StreamingExpertsError
from formats.layout import BLOCK_BYTES, EMBEDDING_FILE, RESIDENT_FILE, LayerLayout, layer_file
from runtime import Engine
from runtime.cache import ExpertKey
from runtime.store import EmbeddingRows, ExpertStore, ReadCounters, load_resident
from tests.refusals import result_or_line
from tests.runtime.helpers import PLENTY, flip, open_fds

LAYER, EXPERT = 2, 31


def record_of(folder: Path) -> LayerLayout:
    layer = open_container(folder).index.layout.layers[LAYER]
    assert layer is not None
    return layer


def regions(folder: Path) -> dict[str, int]:
    """A byte of every array of a record, and of its padding if it has some."""
    record = record_of(folder).record
    places = {f"{part.name} {array.name}": array.offset for part in record.parts for array in part.arrays}
    if record.payload_bytes < record.record_bytes:
        places["padding"] = record.record_bytes - 1
    return places


REGIONS = [f"{part} {array}" for part in ("gate", "up", "down") for array in ("codes", "scales", "biases")]


def read_expert(folder: Path, expert: int = EXPERT) -> bytes:
    with closing(ExpertStore(open_container(folder))) as store:
        slot = store.new_slots(1)[0]
        store.read(ExpertKey(LAYER, expert), slot)
        return slot[: store.record_bytes(LAYER)].tobytes()


# ---- what is sound


def test_a_record_is_read_as_it_lies_on_disk(demo4: Path) -> None:
    nbytes = record_of(demo4).record.record_bytes
    on_disk = (demo4 / layer_file(LAYER)).read_bytes()
    assert read_expert(demo4) == on_disk[EXPERT * nbytes :][:nbytes]


def test_resident_memory_is_the_resident_file(demo4: Path) -> None:
    assert load_resident(open_container(demo4)).tobytes() == (demo4 / RESIDENT_FILE).read_bytes()


def test_embedding_rows_are_those_of_the_file_wherever_they_lie(demo4: Path) -> None:
    container = open_container(demo4)
    row_bytes, rows = container.index.layout.embedding.row_bytes, container.index.layout.embedding.rows
    on_disk = np.frombuffer((demo4 / EMBEDDING_FILE).read_bytes(), np.uint8)[: rows * row_bytes]
    with closing(EmbeddingRows(container, container.index.layout.embedding)) as embedding:
        ids = [*range(0, rows, 37), rows - 1]
        assert np.array_equal(embedding.read(ids), on_disk.reshape(rows, row_bytes)[ids])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how many pages are resident")
def test_slots_have_their_pages_before_anything_is_read(demo4: Path) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with closing(ExpertStore(open_container(demo4))) as store:
        before = resident_bytes()
        slots = store.new_slots(200)
        assert resident_bytes() - before > 0.9 * slots.nbytes


def test_every_slot_begins_on_a_page(demo4: Path) -> None:
    with closing(ExpertStore(open_container(demo4))) as store:
        assert all(slot.ctypes.data % 4096 == 0 for slot in store.new_slots(3))


# ---- what is damaged


def test_the_regions_below_are_all_that_a_record_has(demo4: Path) -> None:
    assert [region for region in regions(demo4) if region != "padding"] == REGIONS


@pytest.mark.parametrize("region", REGIONS)
def test_a_damaged_record_names_file_layer_and_expert(own4: Path, region: str) -> None:
    path, nbytes = own4 / layer_file(LAYER), record_of(own4).record.record_bytes
    flip(path, EXPERT * nbytes + regions(own4)[region])
    with pytest.raises(ChecksumError) as caught:
        read_expert(own4)
    assert f"{path}: layer {LAYER} expert {EXPERT} has checksum" in str(caught.value)


def test_the_neighbours_of_a_damaged_record_can_be_read(own4: Path) -> None:
    flip(own4 / layer_file(LAYER), EXPERT * record_of(own4).record.record_bytes)
    assert read_expert(own4, EXPERT - 1)
    assert read_expert(own4, EXPERT + 1)


def test_the_last_byte_of_a_record_is_checked_too(own4: Path) -> None:
    flip(own4 / layer_file(LAYER), (EXPERT + 1) * record_of(own4).record.record_bytes - 1)
    with pytest.raises(ChecksumError, match=f"expert {EXPERT} "):
        read_expert(own4)


def test_experts_that_changed_places_are_refused(own4: Path) -> None:
    path, nbytes = own4 / layer_file(LAYER), record_of(own4).record.record_bytes
    content = path.read_bytes()
    path.write_bytes(content[nbytes : 2 * nbytes] + content[:nbytes] + content[2 * nbytes :])
    with pytest.raises(ChecksumError, match="layer 2 expert 0 "):
        read_expert(own4, 0)


def test_a_layer_that_took_the_place_of_another_is_refused(own4: Path) -> None:
    (own4 / layer_file(LAYER)).write_bytes((own4 / layer_file(LAYER + 1)).read_bytes())
    with pytest.raises(ChecksumError, match="layer 2 expert 31 "):
        read_expert(own4)


@pytest.mark.parametrize("block", [0, 1])
def test_a_damaged_resident_block_names_file_tensor_and_block(own16: Path, block: int) -> None:
    head = open_container(own16).index.layout.tensors["lm_head"]
    assert head.nbytes == 2 * BLOCK_BYTES
    flip(own16 / RESIDENT_FILE, head.offset + block * BLOCK_BYTES + 5)
    with pytest.raises(ChecksumError) as caught:
        Engine.open(own16, ram_bytes=PLENTY)
    assert f"{own16 / RESIDENT_FILE}: tensor lm_head block {block} has checksum" in str(caught.value)


def test_every_resident_tensor_is_checked_to_its_last_byte(own4: Path) -> None:
    container = open_container(own4)
    unnoticed = []
    for tensor in container.index.layout.resident[::7]:
        last = tensor.offset + tensor.nbytes - 1
        flip(own4 / RESIDENT_FILE, last)
        try:
            load_resident(container)
            unnoticed.append(tensor.name)
        except ChecksumError:
            flip(own4 / RESIDENT_FILE, last)
    assert unnoticed == []


@pytest.mark.parametrize("row", [0, 1, 777, 4095])
def test_a_damaged_embedding_row_is_named(own4: Path, row: int) -> None:
    flip(own4 / EMBEDDING_FILE, row * open_container(own4).index.layout.embedding.row_bytes + 9)
    with Engine.open(own4, ram_bytes=PLENTY) as engine:
        with pytest.raises(ChecksumError, match=rf"embedding\.bin: row {row} has checksum"):
            engine.logits([5, row, 6])
        assert engine.logits([5, 6]).shape == (2, 4096)


def test_a_damaged_row_is_named_among_many(own4: Path) -> None:
    container = open_container(own4)
    layout = container.index.layout.embedding
    with (own4 / EMBEDDING_FILE).open("r+b") as file:
        file.seek(150 * layout.row_bytes)
        file.write(b"\xff" * 8)
    rows = EmbeddingRows(container, layout)
    with closing(rows) as embedding, pytest.raises(ChecksumError, match="row 150 has checksum"):
        embedding.read(range(200))


def test_embedding_rows_that_changed_places_are_refused(own4: Path) -> None:
    row_bytes = open_container(own4).index.layout.embedding.row_bytes
    content = (own4 / EMBEDDING_FILE).read_bytes()
    (own4 / EMBEDDING_FILE).write_bytes(
        content[row_bytes : 2 * row_bytes] + content[:row_bytes] + content[2 * row_bytes :]
    )
    container = open_container(own4)
    rows = EmbeddingRows(container, container.index.layout.embedding)
    with closing(rows) as embedding, pytest.raises(ChecksumError, match="row 1 "):
        embedding.read([1])


def some_logits(folder: Path) -> Float32:
    with Engine.open(folder, ram_bytes=PLENTY) as engine:
        return engine.logits([1, 2, 3, 4])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_is_refused_or_changes_nothing(fused16: Path, own_fused16: Path, data: st.DataObject) -> None:
    files = sorted(path for path in own_fused16.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    found, _ = result_or_line(some_logits, own_fused16)
    assert found is None or np.array_equal(found, some_logits(fused16))
    shutil.copyfile(fused16 / path.relative_to(own_fused16), path)


# ---- what is cut, gone or cannot be read


DATA_FILES = [EMBEDDING_FILE, RESIDENT_FILE, layer_file(0), layer_file(7)]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("harm", [cut, Path.unlink], ids=["cut", "gone"])
@pytest.mark.parametrize("name", DATA_FILES)
def test_a_cut_or_missing_file_is_named_at_open(own4: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(own4 / name)
    with pytest.raises(FormatError) as caught:
        Engine.open(own4, ram_bytes=PLENTY)
    assert str(caught.value).startswith(f"{own4 / name}: ")


def test_a_layer_that_is_cut_while_it_is_open_names_the_expert(own4: Path) -> None:
    nbytes = record_of(own4).record.record_bytes
    with closing(ExpertStore(open_container(own4))) as store:
        os.truncate(own4 / layer_file(LAYER), EXPERT * nbytes + 4096)
        with pytest.raises(StorageError) as caught:
            store.read(ExpertKey(LAYER, EXPERT), store.new_slots(1)[0])
    message = str(caught.value)
    assert message.startswith(f"{own4 / layer_file(LAYER)}: layer {LAYER} expert {EXPERT} has 4096 bytes")
    assert message.endswith("it was cut")


def test_a_refusal_of_the_operating_system_names_the_expert(demo4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(5, "Input/output error")

    with closing(ExpertStore(open_container(demo4))) as store:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(StorageError, match=r"layer 2 expert 31 cannot be read \(Input/output error\)"):
            store.read(ExpertKey(LAYER, EXPERT), store.new_slots(1)[0])


def test_a_file_that_cannot_be_opened_is_named_and_the_others_are_closed(
    demo4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = os.open, open_fds()

    def refuses(path: Path, flags: int, *args: int) -> int:
        if str(path).endswith(layer_file(6)):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(StorageError, match=r"layer-006\.bin: cannot be opened \(Permission denied\)"):
        Engine.open(demo4, ram_bytes=PLENTY)
    assert open_fds() == before


@pytest.mark.parametrize("harm", ["nothing", "resident", "record"])
def test_no_file_stays_open(own4: Path, harm: str) -> None:
    before = open_fds()
    if harm == "resident":
        flip(own4 / RESIDENT_FILE, 0)
    if harm == "record":
        for expert in range(40):
            flip(own4 / layer_file(LAYER), expert * record_of(own4).record.record_bytes)
    try:
        with Engine.open(own4, ram_bytes=PLENTY) as engine:
            engine.logits([1, 2, 3])
        refused = False
    except StreamingExpertsError:
        refused = True
    assert refused == (harm != "nothing")
    assert open_fds() == before


# ---- counters


def test_bytes_are_those_of_whole_records(demo4: Path) -> None:
    with closing(ExpertStore(open_container(demo4))) as store:
        slot = store.new_slots(1)[0]
        for expert in range(3):
            store.read(ExpertKey(LAYER, expert), slot)
        assert store.counters.nbytes == 3 * store.record_bytes(LAYER)
        assert store.counters.seconds > 0


def test_seconds_of_reads_that_overlap_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    counters = ReadCounters()
    with counters, counters:  # from 10 to 13, however many there are
        pass
    with counters:  # from 20 to 21
        pass
    assert counters.seconds == 4
