"""`repack plan`: what a model needs here and how fast it would run, from config and headers alone."""

import errno
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from formats.budget import memory_terms, token_bytes
from formats.encodings import Affine
from formats.errors import RequestError, StorageError
from formats.kernels import product_rate
from formats.layout import Layout
from formats.predict import (
    LAYER_CALLS,
    LINEAR_LAYER_CALLS,
    MISS_CALLS,
    READ_CALLS,
    Machine,
    outlook,
    part_spec,
    tokens_per_s,
)
from formats.probe import READS_IN_FLIGHT, Probe, probe
from repack.cli import cli
from repack.convert import prepare
from repack.forecast import forecast
from repack.known_models import known_geometry
from repack.plan import Options
from repack.planner import with_resident_bits
from repack.report import describe_layout
from repack.sources.folder import FolderSource

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
PROBE = Probe(7_077_888, 2e9, 1e-3, direct=True, memory_bytes_per_s=30e9, call_s=2e-6, threads=2)
BIG = "Qwen/Qwen3.5-397B-A17B"


def machine(layout: Layout) -> Machine:
    """One whose kernels take 15 GB/s of resident weights and 10 of experts."""
    parts = {part_spec(part): 10e9 for _, layer in layout.moe_layers() for part in layer.record.parts}
    return Machine(PROBE, {tensor.encoding: 15e9 for tensor in layout.resident}, parts)


def test_a_well_known_model_is_planned_without_a_network() -> None:
    done = CliRunner().invoke(cli, ["plan", BIG, "--no-probe", "--json", "--ram", "4GiB"])
    report = json.loads(done.stdout)
    assert done.exit_code == 1  # it does not fit into so little
    assert report["model"]["weights"] == pytest.approx(396.35e9, rel=1e-3)
    assert report["records"][0]["record_bytes"] == 7_077_888
    assert "predictions" not in report
    assert any("--ram is 4.00 GiB, but this model needs" in refusal for refusal in report["refusals"])


def test_a_tokenizer_that_is_not_there_is_counted_by_the_vocabulary_and_said() -> None:
    words = ["plan", BIG, "--no-probe", "--ram", "400GiB", "--out", "."]
    memory = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)["memory"]
    assert memory["terms"]["tokenizer_bytes"] == 248_320 * 1100 + memory["ctx_size"] * 700  # LEARNED.md 8
    said = "its file is not known: RAM is counted for a vocabulary of 248320 alone"
    assert said in CliRunner().invoke(cli, words).stdout
    assert said not in CliRunner().invoke(cli, ["plan", "demo", "--no-probe"]).stdout


def test_more_memory_than_the_machine_grants_is_planned_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repack.forecast.default_ram_bytes", lambda: 6 << 30)
    for ram, said in (("48GiB", True), ("5GiB", False)):
        text = CliRunner().invoke(cli, ["plan", "demo", "--no-probe", "--ram", ram]).stdout
        assert ("this machine grants 6.00 GiB of it now" in text) == said


def test_a_disk_that_cannot_be_measured_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("repack.cli_plan.measure", full)
    error = CliRunner().invoke(cli, ["plan", "demo", "--out", str(tmp_path)]).exception
    assert isinstance(error, StorageError)
    reason = "its disk cannot be measured (No space left on device); --no-probe plans without speeds"
    assert str(error) == f"{tmp_path}: {reason}"


def test_the_plan_of_a_folder_holds_what_its_container_will() -> None:
    conversion = prepare(FolderSource(FIXTURES / "fused"), Options())
    report = forecast(conversion, Path(), 8 << 30, machine(conversion.plan.layout), threads=2)
    assert report.items() >= describe_layout(conversion.plan.layout, 0, 2, conversion.plan.origins()).items()
    choices = {choice["resident_bits"]: choice for choice in report["resident_choices"]}
    assert choices[8]["total_bytes"] == report["total_bytes"]
    assert choices[16]["resident_bytes"] > choices[8]["resident_bytes"] > choices[4]["resident_bytes"]
    assert choices[8]["floor_bytes"] == report["memory"]["floor_bytes"]
    assert not report["refusals"]


@pytest.mark.parametrize("name", [BIG, "Qwen/Qwen3.8-Flash-Next"])  # which has n-grams
@pytest.mark.parametrize("bits", [4, 16])
def test_a_plan_with_other_resident_bits_is_the_plan_of_these_options(name: str, bits: int) -> None:
    source = known_geometry(name)
    assert (
        with_resident_bits(prepare(source, Options()).plan, bits) == prepare(source, Options(resident_bits=bits)).plan
    )


def test_resident_bits_that_do_not_go_with_requantize_are_no_choice() -> None:
    conversion = prepare(FolderSource(FIXTURES / "fused"), Options(requantize=True))
    choices = forecast(conversion, Path(), 8 << 30, None, threads=2)["resident_choices"]
    assert ["error" in choice for choice in choices] == [True, False, False]


def test_speed_grows_with_hits_until_the_kernels_are_what_limits() -> None:
    layout = prepare(known_geometry(BIG), Options()).plan.layout
    here, need = machine(layout), token_bytes(layout)
    record = need.expert_bytes / 60 / 10
    python = 2e-6 * (45 * LINEAR_LAYER_CALLS + 15 * LAYER_CALLS)
    states = 45 * (64 * 128 * 128 + 12288 * 3)  # of the delta rule and its convolution, read and written in float32
    rest = need.resident_bytes / 15e9 + 2 * 4 * states / 30e9 + python
    warm = rest + need.expert_bytes / 10e9
    assert tokens_per_s(layout, here, 1.0) == pytest.approx(1 / warm, rel=1e-3)
    last = READS_IN_FLIGHT * record / 10e9
    cold = rest + 60 * (1e-3 + 10 * record / 2e9 + last + (MISS_CALLS + 10 * READ_CALLS) * 2e-6)
    assert tokens_per_s(layout, here, 0.0) == pytest.approx(1 / cold, rel=1e-3)
    speeds = [tokens_per_s(layout, here, hits / 10) for hits in range(11)]
    assert speeds == sorted(speeds)


def test_kernels_are_measured_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("formats.kernels.PRODUCT_S", 0.01)
    monkeypatch.setattr("formats.kernels.ARENA_BYTES", 1 << 20)
    native = product_rate(Affine(4, 64, "bf16"), 256, 512, threads=2)
    monkeypatch.setattr("formats.kernels.load_library", lambda: None)
    assert 0 < product_rate(Affine(4, 64, "bf16"), 256, 512, threads=2) < native


def test_a_budget_gives_a_band_from_even_to_skewed_routing() -> None:
    conversion = prepare(known_geometry(BIG), Options())
    report = forecast(conversion, Path(), 64 << 30, machine(conversion.plan.layout), threads=2)
    (even, skewed), (low, high) = report["at_ram"]["hit_rates"], report["at_ram"]["tokens_per_s"]
    assert 0 < even < skewed < 1
    assert 0 < low < high
    assert low == tokens_per_s(conversion.plan.layout, machine(conversion.plan.layout), even)


def test_below_the_floor_there_is_no_outlook_but_every_term_by_name() -> None:
    conversion = prepare(known_geometry(BIG), Options())
    report = forecast(conversion, Path(), 1 << 30, machine(conversion.plan.layout), threads=2)
    assert "at_ram" not in report
    assert any("resident" in refusal and "is enough" in refusal for refusal in report["refusals"])
    terms = memory_terms(conversion.plan.layout, tokenizer_json_bytes=0, ctx_size=4096, chunk_size=512)
    with pytest.raises(RequestError, match="but this model needs"):
        outlook(conversion.plan.layout, machine(conversion.plan.layout), terms, 1 << 30)


def test_a_probe_measures_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("formats.probe.FILE_BYTES", 1 << 20)
    for name, value in (("DISK_S", 0.02), ("MEMORY_S", 0.02), ("SLOT_BYTES", 1 << 20)):
        monkeypatch.setattr(f"formats.probe.{name}", value)
    found = probe(tmp_path / "not" / "there", 70_000, 3, 2)
    assert found.disk_bytes_per_s > 0
    assert found.read_wait_s >= 0
    assert found.call_s > 0
    assert found.memory_bytes_per_s > 0
    assert not list(tmp_path.iterdir())


def test_the_table_names_disk_memory_and_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repack.cli_plan.measure", lambda layout, *_: machine(layout))
    done = CliRunner().invoke(cli, ["plan", "demo", "--ram", "1GiB"])
    assert done.exit_code == 0
    for words in ("--resident-bits", "RAM floor", "are free", "2.00 GB/s", "predicted, 75 % cache hits", "tokens/s"):
        assert words in done.stdout
