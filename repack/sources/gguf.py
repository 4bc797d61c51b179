"""GGUF files as a source, split ones included: tensors under their publisher's names, small files from the metadata."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formats.encodings.sources.base import FLOATS, GGML_BLOCKS
from formats.encodings.sources.expert_ids import INTEGERS
from formats.errors import FormatError
from formats.fields import shown
from formats.gguf import GGUFHeader, read_gguf_header
from repack.sources.base import Shard, SourceTensor
from repack.sources.folder import FolderReader, Stamp, check_stamp, open_file
from repack.sources.gguf_keys import Metadata
from repack.sources.gguf_models import architecture_of, published_name
from repack.vocabulary.gguf import listed, stop_ids, tokenizer_files

SUFFIX = ".gguf"
STORED = (*FLOATS, *GGML_BLOCKS, *INTEGERS)  # types of ggml that an encoding reads
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def split_names(name: str) -> list[str]:
    """All files of the split that a file of this name belongs to, or the name alone. Raises FormatError."""
    match = _SPLIT.fullmatch(name)
    if match is None:
        return [name]
    if not 1 <= int(match[2]) <= int(match[3]):
        raise FormatError(f"{name}: is no part of a split of its name, expected one from 00001 to {match[3]}")
    return [f"{match[1]}-{nth:05}-of-{match[3]}{SUFFIX}" for nth in range(1, int(match[3]) + 1)]


class GGUFSource:
    """GGUF files of a folder as a source (see repack.sources.base.Source). Opening reads and checks every header.

    Raises FormatError, UnsupportedError or StorageError, naming the file.
    """

    repository: str | None = None
    revision: str | None = None

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self._stamps: dict[str, Stamp] = {}
        headers: dict[str, GGUFHeader] = {}
        for name in split_names(path.name):
            if not (self.folder / name).is_file():
                raise FormatError(f"{self.folder / name}: is missing, but {path.name} is a part of it")
            headers[name] = self._read_header(name)
        check_split(headers, str(self.folder))
        self._checkpoint = GGUFCheckpoint(headers, str(path))
        self._shards = tuple(
            Shard(name, stamp.nbytes, f"mtime {stamp.mtime_ns}") for name, stamp in self._stamps.items()
        )

    def _read_header(self, name: str) -> GGUFHeader:
        path = self.folder / name
        fd = open_file(path)
        try:
            self._stamps[name] = Stamp.of(os.fstat(fd))
            nbytes = self._stamps[name].nbytes
            return read_gguf_header(lambda offset, most: os.pread(fd, most, offset), nbytes, str(path))
        finally:
            os.close(fd)

    @property
    def shards(self) -> Sequence[Shard]:
        return self._shards

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        return self._checkpoint.tensors

    @property
    def notes(self) -> Sequence[str]:
        return self._checkpoint.notes

    def small_file(self, name: str) -> bytes | None:
        return self._checkpoint.small_files.get(name)

    def reader(self) -> FolderReader:
        return FolderReader(self.folder, self._stamps)

    def check(self) -> None:
        for name, stamp in self._stamps.items():
            check_stamp(self.folder / name, os.stat(self.folder / name), stamp)


class GGUFCheckpoint:
    """What the headers of a GGUF file, or of all parts of a split one, say: tensors, small files and notes."""

    def __init__(self, headers: Mapping[str, GGUFHeader], where: str) -> None:
        metadata: Metadata = next(iter(headers.values())).metadata
        names = {name: tensor.shape for header in headers.values() for name, tensor in header.tensors.items()}
        factors = next((h.rope_factors for h in headers.values() if h.rope_factors is not None), None)
        architecture, keys = architecture_of(metadata, names, factors, where)
        config = architecture.config(keys)
        self.notes = tuple(keys.notes)
        self.tensors: dict[str, SourceTensor] = {}
        for file, header in headers.items():
            for tensor in header.tensors.values():
                name, adjustment = published_name(tensor.name, architecture, config["num_hidden_layers"])
                if name in self.tensors:
                    raise FormatError(f"{file}: {shown(name)} stands in {self.tensors[name].file} as well")
                # I8 here is not that of safetensors.
                dtype = tensor.type if tensor.type in STORED else f"ggml {tensor.type}"
                self.tensors[name] = SourceTensor(
                    name, file, dtype, tensor.shape, tensor.offset, tensor.nbytes, adjustment
                )
        embedding = self.tensors.get(architecture.outside["token_embd.weight"])
        if embedding is None:
            raise FormatError(f"{where}: token_embd.weight is missing")
        if len(embedding.shape) != 2:
            raise FormatError(
                f"{where}: token_embd.weight has shape {list(embedding.shape)}, expected rows and columns"
            )
        tokens = listed(metadata, "tokens", "strings", where)
        if len(tokens) > embedding.shape[0]:
            raise FormatError(
                f"{where}: tokenizer.ggml.tokens holds {len(tokens)}, expected at most the {embedding.shape[0]} rows "
                "of token_embd.weight"
            )
        config |= {
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": architecture.outside["output.weight"] not in self.tensors,
        }
        self.small_files = {
            "config.json": _json(config),
            "generation_config.json": _json(_generation_config(metadata, where)),
            **(tokenizer_files(metadata, where) if "tokenizer.ggml.model" in metadata else {}),
        }


def check_split(headers: Mapping[str, GGUFHeader], where: str) -> None:
    """Raises FormatError when files are not all the parts of one split file, in order."""
    count = len(headers)
    for nth, (name, header) in enumerate(headers.items()):
        found = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
        if found != (count, nth) and not (count == 1 and found[0] in (0, 1)):
            raise FormatError(f"{where}/{name}: is part {found[1]} of {found[0]}, expected part {nth} of {count}")
    total = next(iter(headers.values())).metadata.get("split.tensors.count")
    found_total = sum(len(header.tensors) for header in headers.values())
    if count > 1 and total != found_total:
        raise FormatError(f"{where}: split.tensors.count is {shown(total)}, but the parts hold {found_total} tensors")


def _generation_config(metadata: Metadata, where: str) -> dict[str, Any]:
    """Stop tokens, and the sampling that the publisher recommends, where the file has it. Raises FormatError."""
    config: dict[str, Any] = {}
    if ids := stop_ids(metadata, where):
        config["eos_token_id"] = ids
    if isinstance(bos := metadata.get("tokenizer.ggml.bos_token_id"), int):
        config["bos_token_id"] = bos
    for key, name in (("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        value = metadata.get(f"general.sampling.{key}")
        if value is not None:
            if type(value) not in (int, float) or not math.isfinite(value):
                found = shown(value)
                raise FormatError(f"{where}: general.sampling.{key} is {found}, expected a finite number")
            config[name] = round(value, 6) if isinstance(value, float) else value
            config["do_sample"] = True
    return config


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
