"""Text of what repack/report.py and repack/findings.py hold: aligned tables, units in the head."""

from collections.abc import Mapping, Sequence
from typing import Any

from formats.budget import UNIT_BYTES, human, three_digits
from formats.fields import shown
from repack import supported
from repack.findings import Verification

BAR_WIDTH = 20
MAX_BINS = 16


def inspection_text(report: Mapping[str, Any]) -> str:
    """All of report.inspect or report.describe_layout."""
    return "\n\n".join([_model_text(report), _parts_text(report), _records_text(report), _running_text(report)])


def _model_text(report: Mapping[str, Any]) -> str:
    model = report["model"]
    weights, chosen = _count(model["weights"]), _count(model["weights_per_token"])
    experts = f"{model['moe_layers']} with {model['num_experts']} experts, {model['top_k']} per token"
    lines = [
        ("model", f"{model['model_type']}, {weights} weights, {chosen} per token"),
        ("layers", f"{model['num_hidden_layers']}, of them {experts}"),
    ]
    if report.get("rehearsal") is not None:
        lines.append(("rehearsal", _rehearsal(report["rehearsal"])))
    elif "source" in report:
        lines.append(("source", _source(report["source"])))
    if "options" in report:  # what a writer liked to say
        options = (f"{shown(key)} {shown(value)}" for key, value in report["options"].items())
        lines.append(("options", ", ".join(options)))
    if "written_by" in report:
        lines.append(("written by", report["written_by"]))
    return _columns(lines)


def _source(source: Mapping[str, Any]) -> str:
    nbytes = sum(file["bytes"] for file in source["files"])
    proofs = sorted({file["proof"] for file in source["files"]})
    where = source["repository"] or "a local folder"
    at = f" at {source['revision']}" if source["revision"] else ""
    return f"{where}{at}, {len(source['files'])} files of weights, {human(nbytes)}, SHA-256 {' or '.join(proofs)}"


def _rehearsal(mark: Any) -> str:
    distinct = mark.get("distinct_bytes") if isinstance(mark, dict) else None  # what a writer liked to say
    repeats = f", {human(distinct)} of them distinct" if isinstance(distinct, int) else ""
    return f"made-up weights{repeats}: good for measuring, not for text"


def _parts_text(report: Mapping[str, Any]) -> str:
    unit = _unit(report["total_bytes"])
    rows = [
        (
            part["part"],
            part.get("source", ""),
            part["encoding"],
            {True: "yes", False: "no"}.get(part.get("exact"), ""),
            str(part["tensors"]),
            _count(part["weights"]),
            _size(part["bytes"], unit),
            three_digits(part["bits_per_weight"]),
        )
        for part in report["parts"]
    ]
    rows.append(("padding and row checksums", "", "", "", "", "", _size(report["padding_bytes"], unit), ""))
    weights = report["model"]["weights"]
    total = (_count(weights), _size(report["total_bytes"], unit), three_digits(report["bits_per_weight"]))
    rows.append(("total", "", "", "", "", *total))
    return _table(("part", "source", "encoding", "exact", "tensors", "weights", unit, "bits/weight"), rows, left=4)


def _records_text(report: Mapping[str, Any]) -> str:
    rows = [
        (
            _ranges(record["layers"]),
            str(record["num_experts"]),
            str(record["record_bytes"]),
            str(record["pages"]),
            str(record["padding_bytes"]),
            three_digits(record["bits_per_weight"]),
        )
        for record in report["records"]
    ]
    return _table(("layers", "experts", "record bytes", "pages", "padding bytes", "bits/weight"), rows)


def _running_text(report: Mapping[str, Any]) -> str:
    memory, token = report["memory"], report["per_token"]
    terms = ", ".join(f"{name.removesuffix('_bytes')} {human(n)}" for name, n in memory["terms"].items())
    conditions = f"context {memory['ctx_size']}, chunk {memory['chunk_size']}, threads {memory['threads']}"
    return _columns(
        [
            (
                "read per token",
                (
                    f"{human(token['expert_bytes'])} of experts when none is cached, "
                    f"{human(token['embedding_bytes'])} of embedding"
                ),
            ),
            ("RAM floor", f"{human(memory['floor_bytes'])} ({terms})"),
            ("", f"at {conditions}; {human(memory['all_experts_bytes'])} hold every expert"),
        ]
    )


def forecast_text(report: Mapping[str, Any]) -> str:
    """All of forecast.forecast."""
    disk = report["disk"]
    fetched = [("fetched for this plan", human(report["fetched_bytes"]))] if report["fetched_bytes"] else []
    vocabulary = f"its file is not known: RAM is counted for a vocabulary of {report['model']['vocab_size']} alone"
    lines = [
        *fetched,
        *([] if report["tokenizer_is_known"] else [("tokenizer", vocabulary)]),
        ("weights to read", human(report["weights_bytes"])),
        ("disk", f"{human(disk['needed_bytes'])} for the container, {human(disk['free_bytes'])} are free"),
        ("memory", f"{human(report['ram_bytes'])} to run with (--ram){_beyond(report)}"),
    ]
    return "\n\n".join(
        [
            inspection_text(report),
            _resident_choices_text(report["resident_choices"]),
            _columns(lines),
            *([_predictions_text(report)] if "machine" in report else []),
            *[f"cannot run here: {refusal}" for refusal in report["refusals"]],
        ]
    )


def _beyond(report: Mapping[str, Any]) -> str:
    granted = report["granted_bytes"]
    return f"; this machine grants {human(granted)} of it now" if report["ram_bytes"] > granted else ""


def _resident_choices_text(choices: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            str(choice["resident_bits"]),
            *(
                human(choice[key]) if key in choice else "does not fit"
                for key in ("total_bytes", "resident_bytes", "floor_bytes")
            ),
        )
        for choice in choices
    ]
    return _table(("--resident-bits", "container", "resident", "RAM floor"), rows)


def _predictions_text(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    past = "" if machine["direct"] else ", through the page cache"
    lines = [
        ("disk here", f"{three_digits(machine['disk_bytes_per_s'] / 1e9)} GB/s in records{past}"),
        (
            "memory here",
            f"{three_digits(machine['memory_bytes_per_s'] / 1e9)} GB/s with {machine['threads']} threads",
        ),
    ]
    rates = sorted({three_digits(kernel["bytes_per_s"] / 1e9) for kernel in machine["kernels"]["experts"]}, key=float)
    lines.append(("products here", f"{rates[0]} to {rates[-1]} GB/s, one token by matrices of an expert"))
    for prediction in report["predictions"]:
        hits = f"{100 * prediction['hit_rate']:.0f} % cache hits"
        lines.append((f"predicted, {hits}", f"{three_digits(prediction['tokens_per_s'])} tokens/s"))
    if "at_ram" in report:
        low, high = (three_digits(speed) for speed in report["at_ram"]["tokens_per_s"])
        lines.append(
            (
                f"predicted, --ram {human(report['ram_bytes'])}",
                f"{low} tokens/s, all experts in memory"
                if low == high
                else f"{low} to {high} tokens/s, from routing that spreads evenly to routing as skewed as published",
            )
        )
    return _columns(lines)


def families_text() -> str:
    """What can be converted: model types, then encodings, then what runs on NumPy whatever the backend."""
    models = _table(supported.MODEL_HEAD, supported.model_rows(), left=len(supported.MODEL_HEAD))
    encodings = _table(supported.ENCODING_HEAD, supported.SOURCE_ENCODINGS, left=len(supported.ENCODING_HEAD))
    beside = _table(supported.NUMPY_HEAD, supported.numpy_rows(), left=len(supported.NUMPY_HEAD))
    return f"{models}\n\n{encodings}\n\n{beside}"


def expert_text(report: Mapping[str, Any]) -> str:
    """All of report.inspect_expert."""
    title = (
        f"layer {report['layer']}, expert {report['expert']}: {report['file']}, byte {report['offset']}, "
        f"{report['record_bytes']} bytes = {report['pages']} pages, {report['padding_bytes']} of them padding, "
        f"XXH3-64 {report['checksum']}"
    )
    by_codes: dict[int, list[Mapping[str, Any]]] = {}
    for part in report["parts"]:
        by_codes.setdefault(len(part.get("codes", ())), []).append(part)
    histograms = [_histogram(parts) for num_codes, parts in by_codes.items() if num_codes]
    return "\n\n".join([title, _arrays_text(report), *histograms])


def _arrays_text(report: Mapping[str, Any]) -> str:
    rows = [
        (
            part["part"],
            array["array"],
            array["dtype"],
            "×".join(map(str, array["shape"])),
            str(array["offset"]),
            str(array["bytes"]),
            f"{array['min']:.3g}" if "min" in array else "",
            f"{array['max']:.3g}" if "max" in array else "",
        )
        for part in report["parts"]
        for array in part["arrays"]
    ]
    return _table(("part", "array", "dtype", "shape", "offset", "bytes", "min", "max"), rows, left=3)


def _histogram(parts: Sequence[Mapping[str, Any]]) -> str:
    """How often parts with the same codes have each: at most MAX_BINS lines of a share in percent and a bar."""
    num_codes = len(parts[0]["codes"])
    width = max(1, num_codes // MAX_BINS)
    firsts = range(0, num_codes, width)
    columns = [[str(first) if width == 1 else f"{first}-{first + width - 1}" for first in firsts]]
    head = ["code"]
    for part in parts:
        bins = [sum(part["codes"][first : first + width]) for first in firsts]
        columns.append([three_digits(100 * count / sum(bins)) for count in bins])
        columns.append(["#" * round(BAR_WIDTH * count / max(bins)) for count in bins])
        head += [f"{part['part']} %", ""]
    return _table(head, list(zip(*columns, strict=True)))


def verification_text(result: Verification) -> str:
    """What was found, damage first."""
    lines = [str(damage) for damage in result.damage]
    if result.num_damage > len(result.damage):
        lines.append(f"and {result.num_damage - len(result.damage)} more")
    lines += [f"note: {note}" for note in result.notes]
    if result.comparisons:
        rows = [
            (
                c.source,
                c.encoding,
                str(c.tensors),
                _count(c.weights),
                "not finite" if c.max_abs_error is None else f"{c.max_abs_error:.3g}",
                "not finite" if c.relative_rms_error is None else three_digits(100 * c.relative_rms_error),
                "yes" if c.exact else "no",
            )
            for c in result.comparisons
        ]
        head = ("source", "encoding", "tensors", "weights", "max error", "RMS error %", "exact")
        lines += ["", _table(head, rows, left=2), ""]
    verdict = "sound" if result.sound else f"{result.num_damage} damaged place{'s' * (result.num_damage != 1)}"
    lines.append(f"{result.files} files, {human(result.total_bytes)} of weights: {verdict}")
    return "\n".join(lines).lstrip("\n")


# ---- cells and tables


def _unit(largest: int) -> str:
    return next((unit for unit in ("GiB", "MiB") if largest >= UNIT_BYTES[unit]), "KiB")


def _size(nbytes: int, unit: str) -> str:
    return three_digits(nbytes / UNIT_BYTES[unit])


def _count(number: int) -> str:
    """A number of weights as K, M or B."""
    for suffix, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{three_digits(number / size)} {suffix}"
    return str(number)


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges: 0-2, 4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _columns(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they need, the first `left` and nameless ones flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            f"{cell:<{width}}" if i < left or not head[i] else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(head), *map(line, rows)])


def fetched_text(fetched: Mapping[str, Any]) -> str:
    """What went over the network, the two rates, and what was survived."""
    link, encoder = fetched["link_bytes_per_s"] / 1e9, fetched["encoder_bytes_per_s"] / 1e9
    faults = ", ".join(f"{kind} × {count}" for kind, count in sorted(fetched["faults"].items()))
    return (
        f"fetched {human(fetched['bytes'])} in {fetched['requests']} requests, link {three_digits(link)} GB/s, "
        f"encoder {three_digits(encoder)} GB/s while it had bytes"
        + (f"; survived {sum(fetched['faults'].values())} faults: {faults}" if faults else "")
    )
