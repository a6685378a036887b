"""What holds for every test of the project."""

import os
import sys

import pytest

from tests import windows_parts
from tests.browser import browser as browser
from tests.not_on_windows import REASONS


class SkipsFailTheRun:
    """With CI=true a skipped integration test fails the run.

    A CI machine has every real part; a skip there means that a part was
    missing and that nothing was tested. A module skipped while it is
    collected counts as well: its marks were never read.
    """

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        is_xfail = hasattr(report, "wasxfail")
        if report.skipped and not is_xfail and "integration" in report.keywords:
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for nodeid in self.skipped:
            terminalreporter.write_line(
                f"CI=true: skipped, so the run fails: {nodeid}", red=True, bold=True
            )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform == "win32":
        for item in items:
            name = item.nodeid.rpartition("/")[2]
            for left_out, reason in REASONS.items():
                if name == left_out or name.startswith((f"{left_out}[", f"{left_out}::")):
                    item.add_marker(pytest.mark.skip(reason=f"not on Windows: {reason}"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.option.markexpr == "windows" and windows_parts.real_server() is None:
        terminalreporter.write_line(
            "NO REAL llama-server.exe: all of this ran against the fake one, or was skipped. "
            "Set LLAMA_SERVER_EXE to test what users run.",
            red=True,
            bold=True,
        )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") == "true":
        config.pluginmanager.register(SkipsFailTheRun())
