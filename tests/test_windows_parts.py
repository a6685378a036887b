"""What `make build-windows` and `make test-windows` say and count; needs no Wine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import windows_parts
from tests.not_on_windows import REASONS
from tests.windows_parts import REPO, Outcome, Tally

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_windows" name="test_nssm_starts_it"/>
<testcase classname="tests.test_windows" name="test_the_service_is_installed"/>
<testcase classname="tests.test_windows" name="test_a_task_is_registered"><skipped/></testcase>
<testcase classname="tests.test_windows" name="test_it_says_its_version"><failure/></testcase>
<testcase classname="tests.test_windows" name="test_what_it_prints[a]"><error/></testcase>
<testcase classname="tests.test_b11434" name="test_the_service_of_another"/>
</testsuite></testsuites>"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parts are put together on Linux")
def test_what_is_missing_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(windows_parts.PACKAGES, "wine64", str(tmp_path / "wine64"))
    with pytest.raises(RuntimeError, match=r"apt-get install wine64 gcc-mingw-w64-x86-64$"):
        windows_parts.check_packages("wine64", "gcc-mingw-w64-x86-64")
    done = subprocess.run(
        [sys.executable, "-m", "tests.windows_parts", "unit", "tests/test_service.py"],
        cwd=REPO,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "apt-get install" in done.stderr


def test_every_file_of_the_unit_suite_is_in_one_part() -> None:
    named = [name for part in windows_parts._parts() for name in part]
    there = {file.name for file in (REPO / "tests").glob("test_*.py")}
    assert sorted(named) == sorted(there - set(windows_parts.OF_REAL_PARTS))
    assert set(windows_parts.SECONDS_OF_FILES) <= there, "a file that is gone"


def test_the_parts_take_about_as_long() -> None:
    seconds = [sum(map(windows_parts._seconds_of, part)) for part in windows_parts._parts()]
    assert max(seconds) < 1.3 * min(seconds)


@pytest.mark.parametrize("name", REASONS)
def test_what_is_left_out_on_windows_exists(name: str) -> None:
    file, _, test = name.partition("::")
    found = (REPO / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *def {re.escape(test.partition('[')[0])}\(", found, re.MULTILINE)


def test_the_closing_table_counts_by_what_was_tested(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    rows = windows_parts._rows(tmp_path / "report.xml", windows_parts._row_of_exe_test)
    assert rows == {
        "exe under NSSM": Tally(passed=1),
        "exe as a service of its own": Tally(passed=1),
        "exe as a task of the Task Scheduler": Tally(skipped=1),
        "exe as a process": Tally(failed=2),
        "a newer llama-server": Tally(passed=1),
    }
    table = windows_parts._closing_table([Outcome("exe", 1, rows, "1 failed in 2s")])
    assert "exe: 1 failed in 2s" in table.splitlines()
    assert table.splitlines()[-1] == "Windows: 3 passed, 2 failed, 1 skipped"


def test_a_run_that_died_is_no_success_and_says_so(tmp_path: Path) -> None:
    rows = windows_parts._rows(tmp_path / "nothing.xml", windows_parts._row_of_exe_test)
    died = Outcome("exe", 0, rows, "no summary")
    assert not died.is_good
    table = windows_parts._closing_table([died]).splitlines()
    assert "exe: IT DIED" in table
    assert table[-1] == "Windows: 0 passed, 0 failed, 0 skipped, 1 DIED"


def test_what_failed_is_named_as_pytest_takes_it(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert windows_parts._failed(tmp_path / "report.xml") == [
        "tests/test_windows.py::test_it_says_its_version",
        "tests/test_windows.py::test_what_it_prints[a]",
    ]


def test_what_passed_at_the_second_try_only_is_named() -> None:
    rows = {"unit": Tally(passed=9)}
    mended = Outcome("part 1", 0, rows, "9 passed", [], ["tests/test_pool.py::test_x"])
    table = windows_parts._closing_table([mended]).splitlines()
    assert "passed at the second try only: tests/test_pool.py::test_x" in table
    assert table[-1] == "Windows: 9 passed, 0 failed, 0 skipped (1 at the second try)"
