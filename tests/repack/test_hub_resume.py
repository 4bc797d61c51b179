"""A conversion from the hub that is killed goes on where it was: the same bytes, and little is fetched twice."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources.ahead import Link, RemoteReader, cut_segments
from repack.sources.base import Range
from repack.sources.folder import FolderSource
from repack.sources.remote import Location, Remote, RemoteFile
from repack.sources.spool import BLOCK_BYTES, Spool
from tests.repack.checkpoints import SMALL, read_tree, shapes, write_random
from tests.repack.hub_kills import disk_bytes, kill_and_complete
from tests.repack.hub_server import Hub, serve
from tests.repack.test_hub import PROGRAM

FILE = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    text = SMALL | {"num_experts": 24}
    with serve(write_random(tmp_path / "source", text, shapes(text))) as hub:
        yield hub


class Addresses:
    """Knows where the files of a test hub are, without a client of its hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.endpoint = hub.address

    def locate(self, file: RemoteFile) -> Location:
        port = self._hub.address.rpartition(":")[2]
        return Location(f"http://localhost:{port}/signed/{file.name}?signature={self._hub.signature}", {})


def remote_of(hub: Hub) -> Remote:
    nbytes = (hub.folder / FILE).stat().st_size
    return Remote(Addresses(hub), "org/tiny", {FILE: RemoteFile(FILE, nbytes, None)}, patience_s=10.0)


def test_kills_are_survived(hub: Hub, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    hub.bytes_per_s = 2e6
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1,localhost"}
    command = (sys.executable, "-c", PROGRAM)
    options = ("--connections", "2", "--jobs", "2")
    result = kill_and_complete(hub, tmp_path / "out", environment, kills=4, command=command, options=options)
    convert(prepare(FolderSource(hub.folder), Options()), tmp_path / "local")
    remote, local = read_tree(tmp_path / "out"), read_tree(tmp_path / "local")
    assert {name: raw for name, raw in remote.items() if name.endswith(".bin")} == {
        name: raw for name, raw in local.items() if name.endswith(".bin")
    }
    headers = (result.kills + 1) * 65536
    lost_at_most = result.kills * 2 * (65536 + 4096)  # of each connection: what was on its way, and an unfinished block
    assert result.fetched_bytes - headers - result.needed_bytes <= lost_at_most
    assert result.peak_disk_bytes <= disk_bytes(tmp_path / "local") + (2 << 20)
    record_property("survived", {"kills": result.kills})


# ---- segments


def test_ranges_that_touch_are_one_segment() -> None:
    units = [[Range("a", 100, 50), Range("b", 0, 10)], [Range("a", 150, 50), Range("b", 20, 5)]]
    found = [(s.file, s.offset, s.nbytes, s.last_unit) for s in cut_segments(units)]
    assert found == [("a", 100, 100, 1), ("b", 0, 10, 0), ("b", 20, 5, 1)]


def test_a_small_range_is_whole_in_a_segment_and_a_large_one_is_cut() -> None:
    sizes = (3 << 20, 3 << 20, 3 << 20, 20 << 20, 1 << 20)
    ranges = [Range("a", sum(sizes[:n]), nbytes) for n, nbytes in enumerate(sizes)]
    found = [(s.offset >> 20, s.nbytes >> 20) for s in cut_segments([ranges])]
    assert found == [(0, 6), (6, 3), (9, 8), (17, 8), (25, 5)]


# ---- the spool


def test_what_is_in_the_spool_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    raw = (hub.folder / FILE).read_bytes()
    units = [[Range(FILE, 0, len(raw))]]
    buffer = bytearray(len(raw))
    for fetched in (len(raw), 0):
        hub.ranges.clear()
        with RemoteReader(Link(remote_of(hub), 2, 1)) as reader:
            reader.expect(units, tmp_path / "spool")
            reader.read_into(FILE, 0, memoryview(buffer))  # and never `finished`: as if it were killed now
        assert bytes(buffer) == raw
        assert sum(length for _, _, length in hub.ranges) == fetched


def test_what_is_in_the_output_makes_room(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", [FILE], 2 * BLOCK_BYTES)
    slots = [spool.put(FILE, n * BLOCK_BYTES, memoryview(bytes(BLOCK_BYTES))) for n in range(3)]
    assert None not in slots[:2]
    assert slots[2] is None
    spool.release([slot for slot in slots[:1] if slot is not None])
    assert spool.put(FILE, 2 * BLOCK_BYTES, memoryview(b"x")) == slots[0]
    spool.close()


def test_a_torn_block_of_the_spool_is_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = Spool(path, [FILE], 4 * BLOCK_BYTES)
    for n in range(2):
        spool.put(FILE, n * BLOCK_BYTES, memoryview(bytes([n]) * BLOCK_BYTES))
    spool.close()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # of the second block
    path.write_bytes(raw)
    spool = Spool(path, [FILE], 4 * BLOCK_BYTES)
    pieces = list(spool.pieces(FILE, 100, 2 * BLOCK_BYTES))
    assert [(piece.start, piece.stop, piece.block is not None) for piece in pieces] == [
        (100, BLOCK_BYTES, True),
        (BLOCK_BYTES, 2 * BLOCK_BYTES, False),
    ]
    spool.close()


def test_a_spool_of_other_files_is_begun_anew(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", [FILE], BLOCK_BYTES)
    spool.put(FILE, 0, memoryview(b"x"))
    spool.close()
    spool = Spool(tmp_path / "spool", ["other"], BLOCK_BYTES)
    assert [piece.block for piece in spool.pieces("other", 0, 1)] == [None]
    spool.close()


# ---- reading ahead


def test_a_reader_goes_no_further_than_its_window(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repack.sources.ahead.SEGMENT_BYTES", 4096)
    monkeypatch.setattr("repack.sources.ahead.WINDOW_BYTES", 16384)
    nbytes = (hub.folder / FILE).stat().st_size
    with RemoteReader(Link(remote_of(hub), 4, 1)) as reader:
        reader.expect([[Range(FILE, 0, nbytes)]])
        first = bytearray(10)
        reader.read_into(FILE, 0, memoryview(first))
        assert sum(length for _, _, length in hub.ranges) <= 16384


def test_what_was_not_expected_is_read_too_in_any_order(hub: Hub) -> None:
    raw = (hub.folder / FILE).read_bytes()
    with RemoteReader(Link(remote_of(hub), 2, 1)) as reader:
        reader.expect([[Range(FILE, 1000, 5000)]])
        for start, stop in ((90_000, 91_000), (1000, 2000), (5000, 7000), (1500, 2500), (0, 10)):
            buffer = bytearray(stop - start)
            reader.read_into(FILE, start, memoryview(buffer))
            assert bytes(buffer) == raw[start:stop]


def test_what_lies_in_one_segment_is_viewed_until_it_is_released(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repack.sources.ahead.SEGMENT_BYTES", 4096)
    monkeypatch.setattr("repack.sources.ahead.WINDOW_BYTES", 4096)
    raw = (hub.folder / FILE).read_bytes()
    with RemoteReader(Link(remote_of(hub), 2, 1)) as reader:
        reader.expect([[Range(FILE, first, 4096) for first in range(0, 32768, 4096)]])
        for first in range(0, 32768, 4096):  # through more than the window holds
            views = [reader.view(FILE, first + at, 2048) for at in (0, 2048)]
            assert [bytes(view) for view in views if view is not None] == [
                raw[first + at : first + at + 2048] for at in (0, 2048)
            ]
            reader.release()
        assert sum(length for _, _, length in hub.ranges) == 32768


def test_what_lies_across_segments_or_off_the_border_of_an_item_is_not_viewed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repack.sources.ahead.SEGMENT_BYTES", 4096)
    with RemoteReader(Link(remote_of(hub), 2, 1)) as reader:
        reader.expect([[Range(FILE, 0, 8192)]])
        assert reader.view(FILE, 4000, 200) is None
        assert reader.view(FILE, 4, 8) is None
        assert reader.view(FILE, 8, 8) is not None
