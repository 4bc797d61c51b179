"""What makes safetensors files one checkpoint, wherever they lie: the index's weight_map, and every tensor once."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath

from formats.errors import FormatError
from formats.fields import Fields, parse_json, shown
from formats.tensorfile import TensorEntry
from repack.sources.base import SourceTensor

SAFETENSORS_INDEX = "model.safetensors.index.json"
SHARDS = "model*.safetensors"
MAX_NAME_BYTES = 255  # of every file system


def read_weight_map(raw: bytes, where: str, exists: Callable[[str], bool]) -> dict[str, str]:
    """Shard by tensor as the checkpoint's index says. Raises FormatError."""
    listing = Fields(parse_json(raw, where), where).raw("weight_map")
    if not isinstance(listing, dict) or not listing:
        raise FormatError(f"{where}: weight_map is {shown(listing)}, expected shards by tensor")
    sound: set[str] = set()  # names, each looked for once: tensors are many more
    for tensor, name in listing.items():
        if isinstance(name, str) and name in sound:
            continue
        if not is_shard_name(name):
            raise FormatError(
                f"{where}: weight_map puts {shown(tensor)} into {shown(name)}, expected a file in this folder"
            )
        if not exists(name):
            raise FormatError(f"{where}: weight_map names {shown(name)}, which is missing")
        sound.add(name)
    return listing


def collect_tensors(
    headers: Iterable[tuple[str, Mapping[str, TensorEntry]]], weight_map: Mapping[str, str] | None, folder: object
) -> dict[str, SourceTensor]:
    """Every tensor by name, from (shard, its header). Raises FormatError unless each stands once, where it should."""
    tensors: dict[str, SourceTensor] = {}
    for file, entries in headers:
        for entry in entries.values():
            if entry.name in tensors:
                raise FormatError(f"{folder}/{file}: {shown(entry.name)} stands in {tensors[entry.name].file} as well")
            tensors[entry.name] = SourceTensor(entry.name, file, entry.dtype, entry.shape, entry.offset, entry.nbytes)
    for tensor, file in (weight_map or {}).items():
        if tensor not in tensors or tensors[tensor].file != file:
            raise FormatError(
                f"{folder}/{SAFETENSORS_INDEX}: weight_map puts {shown(tensor)} into {shown(file)}, "
                "which does not hold it"
            )
    return tensors


def is_shard_name(name: object) -> bool:
    """Whether it is a file of the folder itself; it must be printable, as the index of a container will hold it."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
        and PurePath(name).name == name
        and not name.startswith(".")
    )
