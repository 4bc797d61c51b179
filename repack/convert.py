"""Carries out a plan: lock, check space, write files as independent tasks, hash the source, commit."""

from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from formats import __version__
from formats.checksum import BLAKE3, sha256
from formats.config import read_config
from formats.container import CONVERTING_FILE, open_container
from formats.errors import FormatError, RequestError, StreamingExpertsError
from formats.index import INDEX_FILE, NGRAMS, REHEARSAL, FileChecksum, Index, SourceFile, index_to_bytes
from formats.index import Source as IndexSource
from formats.layout import BLOCK_BYTES, RESIDENT_FILE
from formats.memory import granted_processors
from formats.origins import ORIGINS
from formats.quantization import MODELOPT_FILE, read_quantization
from repack.encode import SourceWeights, Weights
from repack.output import (
    SMALL_FILES,
    begin,
    check_space,
    difference,
    fingerprint_id,
    finish,
    inspect_folder,
    link,
    locked,
    publish,
    was_committed,
)
from repack.plan import FilePlan, Options, Plan
from repack.planner import make_plan
from repack.rows import refuse_act_order
from repack.sources.base import SPOOL_BYTES, Shard, Source
from repack.tasks import Results, Tasks, Watched, run_tasks
from repack.vocabulary import with_templates, with_tokenizer
from repack.writer import Progress

WRITTEN_BY = f"streaming-experts {__version__}"
MAX_JOBS = 4
_BYTES_PER_CHECKSUM, _BYTES_PER_TENSOR = 80, 3000  # in index and journals together


@dataclass(frozen=True)
class Conversion:
    """A source that was read, checked and planned; nothing is written yet."""

    source: Source
    plan: Plan
    small_files: Mapping[str, bytes]
    extensions: Mapping[str, Any] = field(default_factory=dict)  # of the index
    links: Mapping[str, str] = field(default_factory=dict)  # data files that are hard links -> the file they repeat

    def weights(self) -> Weights:
        """What one file is written from; a rehearsal makes it up."""
        return SourceWeights(self.source.reader())

    @property
    def shards(self) -> list[Shard]:
        """The files of weights that the plan reads."""
        used = set(self.plan.source_files())
        return [shard for shard in self.source.shards if shard.name in used]

    @property
    def files(self) -> list[FilePlan]:
        """The data files to write; links come after them."""
        return [file for file in self.plan.files() if file.name not in self.links]

    @property
    def output_bytes(self) -> int:
        """Everything that OUT will take of its disk, index and journals estimated."""
        layout = self.plan.layout
        checksums = sum(layer.num_experts for _, layer in layout.moe_layers()) + layout.resident_bytes // BLOCK_BYTES
        described = len(layout.resident) + len(layout.layers)
        small = sum(map(len, self.small_files.values()))
        data = layout.total_bytes - sum(layer.nbytes for _, layer in layout.moe_layers() if layer.file in self.links)
        return data + small + _BYTES_PER_CHECKSUM * checksums + _BYTES_PER_TENSOR * (described + 1)

    @property
    def spool_bytes(self) -> int:
        """What OUT's disk must hold besides for a while, of a source that is fetched."""
        fetched = any(not shard.whole for shard in self.shards)
        return min(SPOOL_BYTES, self.plan.source_bytes) if fetched else 0

    def work_bytes(self, hash_source: bool) -> int:
        """Source bytes that a whole conversion reports to its progress callback."""
        hashed = sum(shard.nbytes for shard in self.shards if shard.whole) if hash_source else 0
        return sum(file.source_bytes for file in self.files) + hashed

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for an unfinished conversion to go on. JSON."""
        return {
            "written_by": WRITTEN_BY,
            "options": self.plan.options.facts(),
            "extensions": dict(self.extensions),
            "source": {
                "repository": self.source.repository,
                "revision": self.source.revision,
                "files": {shard.name: f"{shard.nbytes} bytes, {shard.identity}" for shard in self.shards},
                "small files": {name: sha256(raw) for name, raw in self.small_files.items()},
            },
        }


@dataclass(frozen=True)
class Outcome:
    """What a conversion did."""

    index: Index
    already_there: bool
    resumed_bytes: int  # of source, that an earlier run had finished
    direct_writes: bool  # past the page cache, all that was written


def prepare(source: Source, options: Options) -> Conversion:
    """Read the config and make the plan. Raises StreamingExpertsError for anything that cannot be done."""
    small_files = {name: raw for name in SMALL_FILES if (raw := source.small_file(name)) is not None}
    small_files = with_templates(with_tokenizer(small_files))
    if "config.json" not in small_files:
        raise FormatError("config.json is missing from the checkpoint")
    config = read_config(small_files["config.json"])
    quantization = read_quantization(small_files["config.json"], source.small_file(MODELOPT_FILE))
    plan = make_plan(source.tensors, config, options, quantization)
    if source.shards:  # a geometry has no bytes to look into
        refuse_act_order(source, plan)
    return Conversion(source, plan, small_files, {ORIGINS: plan.origins().to_json()})


def convert(
    conversion: Conversion,
    out: Path,
    *,
    jobs: int = 0,
    force: bool = False,
    hash_source: bool = True,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Outcome:
    """Write the container, or complete one that was stopped; the index comes last.

    `executor` runs the tasks in other processes, on machines that see OUT and the source at the same paths (default:
    `jobs` threads here). An exception out of `progress` stops all work and leaves an output that the same call
    completes. Raises StreamingExpertsError.
    """
    inspect_folder(out)
    if not force:
        finished = find_finished(conversion, out)
        if finished is not None:
            return finished
    check_space(out, conversion.output_bytes + conversion.spool_bytes)
    with locked(out):
        fingerprint = conversion.fingerprint()
        if not force and was_committed(out, fingerprint) and (index := _sound_index(conversion, out)) is not None:
            finish(out)
            return Outcome(index, True, 0, True)
        begin(out, fingerprint, force)
        for name, raw in conversion.small_files.items():
            publish(out, name, raw)
        identity = fingerprint_id(fingerprint)
        tasks = Tasks(
            conversion.source,
            conversion.weights,
            conversion.files,
            conversion.shards if hash_source else [],
        )
        watched = Watched(progress)
        if executor is None:
            with ThreadPoolExecutor(jobs or default_jobs(), "convert") as threads:
                done = run_tasks(tasks, threads, out, identity, watched)
        else:
            done = run_tasks(tasks, executor, out, identity, watched, here=False)
        conversion.source.check()
        for name, repeated in conversion.links.items():
            link(out, name, repeated)
            done.files[name] = done.files[repeated]
        index = _finished_index(conversion, done)
        publish(out, INDEX_FILE, index_to_bytes(index))
        finish(out)
    results = done.files.values()
    resumed_bytes = sum(result.resumed_bytes for result in results)
    return Outcome(index, False, resumed_bytes, all(result.direct for result in results))


def default_jobs() -> int:
    """Threads that read, encode and write: one more than processors for us, as one of them waits for the disk."""
    return min(MAX_JOBS, granted_processors() + 1)


def find_finished(conversion: Conversion, out: Path) -> Outcome | None:
    """What lies in OUT when it is a container of this source and options. Raises RequestError if of others."""
    path = out / INDEX_FILE
    if not path.exists() or (out / CONVERTING_FILE).exists():
        return None
    try:
        index = open_container(out).index
    except StreamingExpertsError as error:
        raise RequestError(f"{error}; --force converts anew") from None
    if (REHEARSAL in index.extensions) != (REHEARSAL in conversion.extensions):
        holds = "a rehearsal" if REHEARSAL in index.extensions else "a model that was converted, no rehearsal"
        raise RequestError(f"{out}: holds {holds}; --force replaces it")
    differs = difference(_origin(index), _origin(_new_index(conversion)))
    if differs is not None:
        raise RequestError(f"{out}: holds a container with {differs}; --force replaces it")
    return Outcome(index, True, 0, True)


def _sound_index(conversion: Conversion, out: Path) -> Index | None:
    """The index in OUT if it is this conversion's and all files that it names are there."""
    try:
        index = open_container(out).index
    except StreamingExpertsError:
        return None
    return index if difference(_origin(index), _origin(_new_index(conversion))) is None else None


def _origin(index: Index) -> dict[str, Any]:
    """What decides the bytes of a container, as far as its index tells."""
    return {
        "written_by": index.written_by,
        "options": dict(index.options),
        "extensions": dict(index.extensions),
        "repository": index.source.repository,
        "revision": index.source.revision,
        "source": {file.name: f"of {file.nbytes} bytes" for file in index.source.files},
        "small file": {name: file.sha256 for name, file in index.files.items()},
        "layout": index.layout,
    }


def _new_index(conversion: Conversion) -> Index:
    """The index as far as it is known before anything is written."""
    source = conversion.source
    files = tuple(SourceFile(shard.name, shard.nbytes, shard.sha256, _proof(shard)) for shard in conversion.shards)
    return Index(
        layout=conversion.plan.layout,
        source=IndexSource(source.repository, source.revision, files),
        options=conversion.plan.options.facts(),
        written_by=WRITTEN_BY,
        files={name: FileChecksum(len(raw), sha256(raw)) for name, raw in conversion.small_files.items()},
        data_files={},
        record_checksums={},
        block_checksums={},
        required_features=(BLAKE3,) if conversion.plan.layout.ngrams is None else (BLAKE3, NGRAMS),
        extensions=conversion.extensions,
    )


def _proof(shard: Shard) -> str:
    """What is known of a shard's SHA-256 before anything is read (FORMAT.md, source)."""
    if shard.sha256 is None:
        return "none"
    return "stated" if shard.whole else "ranges"


def _finished_index(conversion: Conversion, done: Results) -> Index:
    index, layout = _new_index(conversion), conversion.plan.layout
    files = tuple(
        replace(file, sha256=done.source_sha256[file.name], proof="computed")
        if file.name in done.source_sha256
        else file
        for file in index.source.files
    )
    resident = done.files[RESIDENT_FILE].checksums
    return replace(
        index,
        source=replace(index.source, files=files),
        data_files={name: result.digest for name, result in done.files.items()},
        record_checksums={
            i: tuple(checksum for (checksum,) in done.files[layer.file].checksums) for i, layer in layout.moe_layers()
        },
        block_checksums={tensor.name: sums for tensor, sums in zip(layout.resident, resident, strict=True)},
    )
