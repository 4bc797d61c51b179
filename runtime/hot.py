"""The experts that a model was seen to use most, kept beside its container: a warm start that changes no result."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from formats.errors import FormatError, StorageError
from formats.fields import Fields, parse_json, shown
from formats.layout import Layout
from runtime.cache import ExpertKey

FORMAT = "streaming-experts hot experts"
Uses = Sequence[tuple[ExpertKey, float]]  # most used first


def hot_path(container: Path) -> Path:
    """OUT.hot.json: beside the folder, not in it, for it is no part of the model."""
    folder = Path(os.path.abspath(container))
    return folder.with_name(f"{folder.name}.hot.json")


def save_hot(path: Path, uses: Uses) -> None:
    """Write the list; its name appears only when it is whole. Raises StorageError."""
    experts = [[key.layer, key.expert, round(count, 3)] for key, count in uses]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another run may end in the same moment
    try:
        partial.write_text(json.dumps({"format": FORMAT, "version": 1, "experts": experts}, separators=(",", ":")))
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def load_hot(path: Path, layout: Layout) -> list[tuple[ExpertKey, float]]:
    """The list of an earlier run, most used first; empty when there is none.

    Raises FormatError for a list that is none, or of a model with other layers or experts, with the way out.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _read(raw, layout, path)
    except FormatError as error:
        raise FormatError(f"{error}; delete the file, or run without --hot") from None


def _read(raw: bytes, layout: Layout, path: Path) -> list[tuple[ExpertKey, float]]:
    fields = Fields(parse_json(raw, str(path)), str(path))
    if fields.string("format") != FORMAT or fields.integer("version") != 1:
        raise FormatError(f"{path}: is no list of hot experts of version 1")
    number = {layer: moe.num_experts for layer, moe in layout.moe_layers()}
    uses = [_entry(entry, number, path) for entry in fields.items("experts")]
    if len(dict(uses)) != len(uses):
        raise FormatError(f"{path}: experts names one twice, expected distinct ones")
    return uses


def _entry(entry: object, number: Mapping[int, int], path: Path) -> tuple[ExpertKey, float]:
    if isinstance(entry, list) and len(entry) == 3:
        layer, expert, count = entry
        ids_are_known = type(layer) is int and type(expert) is int and 0 <= expert < number.get(layer, 0)
        if ids_are_known and type(count) in (int, float) and 0 <= count < 1e9:
            return ExpertKey(layer, expert), float(count)
    raise FormatError(f"{path}: experts holds {shown(entry)}, expected [layer, expert, uses] of this model")
