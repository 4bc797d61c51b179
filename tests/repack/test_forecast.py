"""`repack plan`: what a model needs here and how fast it would run, from config and headers alone."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from formats.budget import memory_terms, token_bytes
from formats.errors import RequestError
from formats.predict import LAYER_S, outlook, tokens_per_s
from formats.probe import Probe, probe
from repack.cli import cli
from repack.convert import prepare
from repack.forecast import forecast
from repack.known_models import known_geometry
from repack.plan import Options
from repack.report import describe_layout
from repack.sources.folder import FolderSource

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MACHINE = Probe(disk_bytes_per_s=2e9, memory_bytes_per_s=30e9, direct=True, threads=2)
BIG = "Qwen/Qwen3.5-397B-A17B"


def test_a_well_known_model_is_planned_without_a_network() -> None:
    done = CliRunner().invoke(cli, ["plan", BIG, "--no-probe", "--json", "--ram", "4GiB"])
    report = json.loads(done.stdout)
    assert done.exit_code == 1  # it does not fit into so little
    assert report["model"]["weights"] == pytest.approx(396.35e9, rel=1e-3)
    assert report["records"][0]["record_bytes"] == 7_077_888
    assert "predictions" not in report
    assert any("--ram is 4.00 GiB, but this model needs" in refusal for refusal in report["refusals"])


def test_the_plan_of_a_folder_holds_what_its_container_will() -> None:
    conversion = prepare(FolderSource(FIXTURES / "fused"), Options())
    report = forecast(conversion, Path(), 8 << 30, MACHINE, threads=2)
    assert report.items() >= describe_layout(conversion.plan.layout, 0, 2, conversion.plan.origins()).items()
    choices = {choice["resident_bits"]: choice for choice in report["resident_choices"]}
    assert choices[8]["total_bytes"] == report["total_bytes"]
    assert choices[16]["resident_bytes"] > choices[8]["resident_bytes"] > choices[4]["resident_bytes"]
    assert choices[8]["floor_bytes"] == report["memory"]["floor_bytes"]
    assert not report["refusals"]


def test_speed_grows_with_hits_until_the_memory_is_what_limits() -> None:
    layout = prepare(known_geometry(BIG), Options()).plan.layout
    need = token_bytes(layout)
    cold = tokens_per_s(layout, MACHINE, 0.0)
    kernel_rate = 0.6 * MACHINE.memory_bytes_per_s
    expected = need.expert_bytes / 2e9 + need.resident_bytes / kernel_rate + LAYER_S * 60
    assert cold == pytest.approx(1 / expected)
    speeds = [tokens_per_s(layout, MACHINE, hits / 10) for hits in range(11)]
    assert speeds == sorted(speeds)
    assert speeds[-1] == pytest.approx(1 / (expected - need.expert_bytes / 2e9 + need.expert_bytes / kernel_rate))


def test_a_budget_gives_a_band_from_even_to_skewed_routing() -> None:
    conversion = prepare(known_geometry(BIG), Options())
    report = forecast(conversion, Path(), 64 << 30, MACHINE, threads=2)
    (even, skewed), (low, high) = report["at_ram"]["hit_rates"], report["at_ram"]["tokens_per_s"]
    assert 0 < even < skewed < 1
    assert 0 < low < high
    assert low == tokens_per_s(conversion.plan.layout, MACHINE, even)


def test_below_the_floor_there_is_no_outlook_but_every_term_by_name() -> None:
    conversion = prepare(known_geometry(BIG), Options())
    report = forecast(conversion, Path(), 1 << 30, MACHINE, threads=2)
    assert "at_ram" not in report
    assert any("resident" in refusal and "is enough" in refusal for refusal in report["refusals"])
    terms = memory_terms(conversion.plan.layout, tokenizer_json_bytes=0, ctx_size=4096, chunk_size=512)
    with pytest.raises(RequestError, match="but this model needs"):
        outlook(conversion.plan.layout, MACHINE, terms, 1 << 30)


def test_a_probe_measures_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("formats.probe.FILE_BYTES", 1 << 20)
    monkeypatch.setattr("formats.probe.PROBE_S", 0.02)
    found = probe(tmp_path / "not" / "there", 70_000, 2)
    assert found.disk_bytes_per_s > 0
    assert found.memory_bytes_per_s > 0
    assert not list(tmp_path.iterdir())


def test_the_table_names_disk_memory_and_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repack.cli_plan.probe", lambda *_: MACHINE)
    done = CliRunner().invoke(cli, ["plan", "demo", "--ram", "1GiB"])
    assert done.exit_code == 0
    for words in ("--resident-bits", "RAM floor", "are free", "2.00 GB/s", "predicted, 75 % cache hits", "tokens/s"):
        assert words in done.stdout
