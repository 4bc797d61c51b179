"""Opening a folder: what is missing, cut, unfinished or leads elsewhere is named."""

import os
from pathlib import Path

import pytest

from formats.container import CONVERTING_FILE, open_container, read_container_index
from formats.errors import ChecksumError, FormatError
from tests.containers import write_container


def test_a_sound_folder_opens(container: Path) -> None:
    opened = open_container(container)
    assert opened.index == write_container(container)
    assert opened.small_files() == {
        name: (container / name).read_bytes() for name in ("generation_config.json", "tokenizer.json")
    }
    for name, nbytes in opened.data_bytes.items():
        assert opened.data_path(name).stat().st_size == nbytes


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere: no such folder"):
        open_container(tmp_path / "nowhere")


def test_a_checkpoint_is_no_container_and_the_line_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no index.json, so it is no container$"):
        open_container(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="convert it first: `repack convert`"):
        open_container(tmp_path)


def test_an_unfinished_conversion_is_refused_as_such(container: Path) -> None:
    (container / "index.json").unlink()
    (container / CONVERTING_FILE).touch()
    with pytest.raises(FormatError, match="its conversion is not finished; run the same `repack convert` again"):
        open_container(container)


FILES = ["embedding.bin", "resident.bin", "experts/layer-000.bin", "experts/layer-003.bin"]


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
def test_a_missing_file_is_named(container: Path, name: str) -> None:
    (container / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: is missing or no file, but index.json names it"):
        open_container(container)


@pytest.mark.parametrize("change", [-1, 1, 16384])
@pytest.mark.parametrize("name", FILES)
def test_a_data_file_of_the_wrong_length_is_named(container: Path, name: str, change: int) -> None:
    nbytes = (container / name).stat().st_size
    os.truncate(container / name, nbytes + change)
    with pytest.raises(FormatError, match=f"{name}: is {nbytes + change} bytes long, expected {nbytes}"):
        open_container(container)


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json", "index.json"])
def test_a_link_out_of_the_folder_is_refused(container: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (container / name).rename(outside)
    (container / name).symlink_to(outside)
    with pytest.raises(FormatError, match=f"{name}: leads out of the folder, to .*outside"):
        open_container(container)


def test_a_folder_of_experts_that_leads_out_is_refused(container: Path, tmp_path: Path) -> None:
    (container / "experts").rename(tmp_path / "elsewhere")
    (container / "experts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"experts/layer-000.bin: leads out of the folder"):
        open_container(container)


def test_a_link_to_the_folder_itself_and_links_inside_are_fine(container: Path, tmp_path: Path) -> None:
    (container / "experts" / "layer-000.bin").rename(container / "here.bin")
    (container / "experts" / "layer-000.bin").symlink_to(container / "here.bin")
    (tmp_path / "link").symlink_to(container)
    open_container(tmp_path / "link")


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "resident.bin"])
def test_a_folder_or_pipe_in_place_of_a_file_is_refused(container: Path, name: str) -> None:
    (container / name).unlink()
    (container / name).mkdir()
    with pytest.raises(FormatError, match=f"{name}"):
        open_container(container)
    (container / name).rmdir()
    os.mkfifo(container / name)
    with pytest.raises(FormatError, match=f"{name}"):
        open_container(container)


def test_a_changed_small_file_is_refused_when_it_is_read(container: Path) -> None:
    path = container / "tokenizer.json"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"]")
    with pytest.raises(ChecksumError, match=r"tokenizer.json: has SHA-256 \w{64}, expected \w{64}"):
        open_container(container).small_file("tokenizer.json")
    for other in (raw + b" ", raw[:-1]):
        path.write_bytes(other)
        with pytest.raises(FormatError, match=f"tokenizer.json: is {len(other)} bytes long, expected {len(raw)}"):
            open_container(container).small_file("tokenizer.json")


def test_the_index_alone_can_be_read_of_a_damaged_container(container: Path) -> None:
    for name in FILES:
        (container / name).unlink()
    assert set(read_container_index(container).data_bytes) >= set(FILES)


def test_a_change_of_the_index_is_named_with_its_path(container: Path) -> None:
    path = container / "index.json"
    path.write_bytes(path.read_bytes().replace(b'"a test"', b'"a fake"'))
    with pytest.raises(ChecksumError, match=f"{path}: checksum is .*, but the content gives .*: it was changed"):
        open_container(container)
