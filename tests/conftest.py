"""What holds for every test: in CI, hypothesis runs are reproducible and a skip must be listed here."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import pytest
from hypothesis import settings

# Reasons that CI accepts, word for word; each names what the machine of CI cannot have.
ALLOWED_SKIPS: frozenset[str] = frozenset(
    {
        "the headers of SIMDe are not installed",  # a package of the system, which pip cannot give
    }
)

IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}

# A deadline per example would measure the machine: the time limit per test is enough.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if IN_CI else "local")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes that are started heed Ctrl-C, even if the tests run in the background of a script, told not to."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SKIPS = pytest.StashKey[set[tuple[str, str]]]()


class WorkerNode(Protocol):
    """What this file uses of the object by which pytest-xdist knows one of its workers."""

    config: pytest.Config
    workeroutput: dict[str, list[tuple[str, str]]]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPS] = set()
    config.pluginmanager.register(SkipCollector(config.stash[SKIPS]), "skip-collector")


class SkipCollector:
    """Notes (test or file, reason) of every skip, of a test as of a whole file."""

    def __init__(self, skips: set[tuple[str, str]]) -> None:
        self.skips = skips

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.skips.add((report.nodeid, reason.removeprefix("Skipped: ")))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerNode, error: object) -> None:
    """Take over a worker's skips: pytest-xdist itself tells nothing of a file that skips as a whole."""
    for nodeid, reason in getattr(node, "workeroutput", {}).get("skips", []):
        node.config.stash[SKIPS].add((nodeid, reason))


def unexpected_skips(config: pytest.Config) -> list[tuple[str, str]]:
    """Skips whose reason is not in ALLOWED_SKIPS, in order."""
    return sorted(skip for skip in config.stash[SKIPS] if skip[1] not in ALLOWED_SKIPS)


def pytest_sessionfinish(session: pytest.Session) -> None:
    worker_output = getattr(session.config, "workeroutput", None)
    skips = session.config.stash[SKIPS]
    if worker_output is not None:
        worker_output["skips"] = sorted(skips)
    elif IN_CI and unexpected_skips(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    yield
    survived: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        survived.update(dict(report.user_properties).get("survived", {}))
    if survived:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(survived.items()))
        terminalreporter.write_line(f"survived {sum(survived.values())} faults: {kinds}")
    skips = unexpected_skips(config) if IN_CI else []
    if skips:
        terminalreporter.section("skips that CI does not expect", red=True)
        for nodeid, reason in skips:
            terminalreporter.write_line(f"{nodeid}: {reason}")
