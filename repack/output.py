"""The folder that a conversion writes: whose it is, who works in it, and what may be removed."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.budget import human
from formats.checksum import xxh3_64
from formats.container import CONVERTING_FILE
from formats.errors import FormatError, RequestError, StorageError
from formats.fields import parse_json, shown
from formats.index import FORMAT_NAME, INDEX_FILE
from formats.layout import EMBEDDING_FILE, NGRAM_FILE, RESIDENT_FILE, layer_file
from repack.journal import open_locked
from repack.writer import FETCHED, JOURNAL, PARTIAL, add_suffix, storage_errors, sync_folder

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "tiktoken.model",  # becomes tokenizer.json
    "chat_template.json",  # becomes chat_template.jinja
    "additional_chat_templates/tool_use.jinja",  # goes into tokenizer_config.json
)
SOURCE_JOURNAL = "source" + JOURNAL
EXPERTS_FOLDER = os.path.dirname(layer_file(0))
_OURS = re.compile(
    r"({})({}|{}|{})?".format(
        "|".join(
            [
                *map(re.escape, (INDEX_FILE, EMBEDDING_FILE, NGRAM_FILE, RESIDENT_FILE, *SMALL_FILES)),
                r"experts/layer-\d{3,}\.bin",
            ]
        ),
        re.escape(PARTIAL),
        re.escape(JOURNAL),
        re.escape(FETCHED),
    )
    + f"|{re.escape(CONVERTING_FILE)}|{re.escape(SOURCE_JOURNAL)}"
)


def inspect_folder(out: Path) -> None:
    """Raises RequestError when OUT is a file, or a folder with anything that no conversion has put there."""
    if not out.exists():
        if out.is_symlink():
            raise RequestError(f"{out}: is a link to {os.readlink(out)}, which is not there")
        return
    if not out.is_dir():
        raise RequestError(f"{out}: is a file, expected a folder to write")
    names = sorted(_names(out))
    if not names:
        return
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise RequestError(f"{out}: holds {foreign[0]}, which is no part of a container; choose an empty folder")
    if CONVERTING_FILE not in names and not _is_container(out):
        raise RequestError(f"{out}: holds {names[0]} but no container; choose an empty folder")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold OUT against other conversions; CONVERTING_FILE is the lock and says that OUT is unfinished.

    It stays behind when the work fails or is killed; `finish` removes it. Raises StorageError.
    """
    path = out / CONVERTING_FILE
    with storage_errors(path):
        out.mkdir(parents=True, exist_ok=True)
        fd = open_locked(path, os.O_RDWR | os.O_CREAT)
    if fd is None:
        raise StorageError(f"{out}: another conversion is writing it")
    try:
        yield
    finally:
        os.close(fd)


def begin(out: Path, fingerprint: Mapping[str, Any], force: bool) -> None:
    """Make OUT this conversion's: go on with what is there, or begin anew when forced. OUT is locked.

    Raises RequestError when OUT was begun differently, naming the first difference.
    """
    path = out / CONVERTING_FILE
    with storage_errors(path):
        begun = _read_json(path)
        if force or begun is None:
            clear(out)
        elif begun != fingerprint:
            if isinstance(begun, str):
                raise FormatError(f"{begun}; --force begins anew")
            differs = difference(begun, fingerprint)
            raise RequestError(f"{out}: was begun with {differs}; do the same again, or --force to begin anew")
        (out / INDEX_FILE).unlink(missing_ok=True)  # it says that every file is finished: see repack/workers.py
        with open(path, "r+b") as file:
            file.write(json.dumps(fingerprint, sort_keys=True, indent=1).encode())
            file.truncate()
            os.fsync(file.fileno())
        sync_folder(out)


def was_committed(out: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether this conversion wrote its index, which comes last, and was stopped before `finish` had ended."""
    with storage_errors(out):
        return (out / INDEX_FILE).is_file() and _read_json(out / CONVERTING_FILE) == fingerprint


def fingerprint_id(fingerprint: Mapping[str, Any]) -> str:
    """What journals and workers know a conversion by."""
    return xxh3_64(json.dumps(fingerprint, sort_keys=True).encode())


def begun_revision(out: Path, repository: str) -> str | None:
    """The commit with which an unfinished conversion of a repository was begun in OUT: it goes on with that one."""
    path = out / CONVERTING_FILE
    begun = _read_json(path) if path.is_file() else None
    source = begun.get("source") if isinstance(begun, dict) else None
    if not isinstance(source, dict) or source.get("repository") != repository:
        return None
    revision = source.get("revision")
    return revision if isinstance(revision, str) else None


def clear(out: Path) -> None:
    """Remove every file that is ours, the index first; the lock stays."""
    (out / INDEX_FILE).unlink(missing_ok=True)
    for name in _names(out):
        if _OURS.fullmatch(name) and name != CONVERTING_FILE:
            (out / name).unlink()


def publish(out: Path, name: str, content: bytes) -> None:
    """Write a small file whole: NAME.partial, fsync, rename. Raises StorageError."""
    path = out / name
    partial = add_suffix(path, PARTIAL)
    with storage_errors(path):
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(out)


def link(out: Path, name: str, repeated: str) -> None:
    """Make a data file a hard link to another one. Raises StorageError, also where the disk has no such links."""
    with storage_errors(out / name):
        (out / name).unlink(missing_ok=True)
        os.link(out / repeated, out / name)
        sync_folder((out / name).parent)


def finish(out: Path) -> None:
    """Remove journals and the lock once the index is in place."""
    with storage_errors(out):
        for name in _names(out):
            if name.endswith(JOURNAL):
                (out / name).unlink()
        (out / CONVERTING_FILE).unlink()
        sync_folder(out)


def check_space(out: Path, output_bytes: int, also: tuple[Path, int] | None = None) -> None:
    """Raises StorageError unless OUT's disk has room for what is not yet written there.

    `also` is another folder that grows before, a download cache, and by how much; it may be on the same disk.
    """
    needs = [(out, output_bytes - written_bytes(out))] + ([also] if also else [])
    disks: dict[int, list[tuple[Path, int]]] = {}
    for folder, nbytes in needs:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        disks.setdefault(there.stat().st_dev, []).append((there, nbytes))
    for entries in disks.values():
        there, needed = entries[0][0], sum(nbytes for _, nbytes in entries)
        free = shutil.disk_usage(there).free
        if free < needed:
            raise StorageError(f"{there}: needs {human(needed)} more, but its disk has {human(free)} free")


def written_bytes(out: Path) -> int:
    """What OUT already holds of ours; hard links to one file take its bytes once."""
    found = [(out / name).stat() for name in _names(out) if _OURS.fullmatch(name)]
    return sum({stat.st_ino: stat.st_size for stat in found}.values())


def _names(out: Path) -> list[str]:
    """Every file below OUT, relative; an empty folder that is not ours counts as a file."""
    if not out.is_dir():
        return []
    names = []
    for entry in os.scandir(out):
        if entry.name == EXPERTS_FOLDER and entry.is_dir(follow_symlinks=False):
            names += [f"{EXPERTS_FOLDER}/{inner.name}" for inner in os.scandir(entry.path)]
        else:
            names.append(entry.name)
    return names


def _is_container(out: Path) -> bool:
    path = out / INDEX_FILE
    return path.is_file() and f'"format": "{FORMAT_NAME}"'.encode() in path.read_bytes()


def _read_json(path: Path) -> Any:
    """What CONVERTING_FILE says; None when it is new, or torn by a loss of power at the very start.

    The line of the error, which no fingerprint equals, for a file that `begin` has not begun to write.
    """
    raw = path.read_bytes()
    try:
        return parse_json(raw, str(path))
    except FormatError as error:
        torn = not raw.strip(b"\0") or raw.startswith(b"{\n")
        return None if torn else str(error)


def difference(begun: Any, now: Mapping[str, Any], at: str = "") -> str | None:
    """The first place where two descriptions differ, in words; None when they are equal."""
    for key in dict.fromkeys((*now, *begun)) if isinstance(begun, dict) else ():
        old, new = begun.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = difference(old, new, f"{at}{key} ")
            if inner is not None:
                return inner
        elif old != new:
            return f"{at}{key} {shown(old)}, not {shown(new)}"
    return None if begun == now else f"{at}another description"
