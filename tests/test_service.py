"""What a Windows service and a task of the Task Scheduler are made of, on every system."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import winsvc
from winsvc import SERVICE_MOVES, ServiceProgress, ServiceState

PENDING = [ServiceState.START_PENDING, ServiceState.STOP_PENDING]
STOP, SHUTDOWN, PRESHUTDOWN = 0x1, 0x4, 0x100  # SERVICE_ACCEPT_..., winsvc.h
XMLNS = "{http://schemas.microsoft.com/windows/2004/02/mit/task}"


def test_checkpoints_of_a_pending_state_rise_and_begin_anew() -> None:
    progress = ServiceProgress()
    start, stop = PENDING
    told = [progress.moved_to(state) for state in (start, start, ServiceState.RUNNING, stop, stop)]
    assert [status.checkpoint for status in told] == [1, 2, 0, 1, 2]
    assert [status.wait_hint_ms > 0 for status in told] == [True, True, False, True, True]


def test_only_a_running_service_takes_controls() -> None:
    progress = ServiceProgress()
    taken = {state: progress.moved_to(state).controls_accepted for state in (PENDING[0], *MOVED)}
    assert taken[ServiceState.RUNNING] == STOP | SHUTDOWN | PRESHUTDOWN
    assert {taken[state] for state in taken if state is not ServiceState.RUNNING} == {0}


MOVED = (ServiceState.RUNNING, ServiceState.STOP_PENDING, ServiceState.STOPPED)


@pytest.mark.parametrize("before", ServiceState)
@pytest.mark.parametrize("after", ServiceState)
def test_a_service_moves_only_along_the_table(before: ServiceState, after: ServiceState) -> None:
    progress = ServiceProgress()
    progress.state = before
    if after is before or after in SERVICE_MOVES[before]:
        assert progress.moved_to(after).state is after
    else:
        with pytest.raises(AssertionError, match="cannot go"):
            progress.moved_to(after)


def test_the_exit_code_is_told_with_the_end() -> None:
    status = ServiceProgress().moved_to(ServiceState.STOPPED, 7)
    assert (status.exit_code, status.checkpoint) == (7, 0)


# Learn, "Task Scheduler Schema": settingsType, principalType, execActionType and restartType
# are xs:all (any order, each once); logonTriggerType is a sequence behind triggerBaseType's.
SWITCHES = (
    "AllowStartOnDemand DisallowStartIfOnBatteries StopIfGoingOnBatteries AllowHardTerminate "
    "StartWhenAvailable RunOnlyIfNetworkAvailable WakeToRun Enabled Hidden RunOnlyIfIdle"
).split()
SETTINGS = {
    "MultipleInstancesPolicy": {"Parallel", "Queue", "IgnoreNew", "StopExisting"},
    **{name: {"true", "false"} for name in SWITCHES},
    "ExecutionTimeLimit": {"PT0S"},
    "Priority": {str(number) for number in range(11)},
}
TRIGGER = "Enabled StartBoundary EndBoundary Repetition ExecutionTimeLimit UserId Delay".split()


def children(parent: ElementTree.Element, path: str) -> dict[str, ElementTree.Element]:
    """By name; no name twice."""
    found = parent.find("/".join(XMLNS + name for name in path.split("/")))
    assert found is not None
    named = {child.tag.removeprefix(XMLNS): child for child in found}
    assert len(named) == len(found)
    return named


def test_a_tasks_xml_keeps_to_the_schema_of_the_task_scheduler() -> None:
    text = winsvc.task_xml("C:\\a & b\\x.exe", 'task "run" <1>', "C:\\ü", "PC\\Jörg")
    first, _, body = text.partition("\n")
    assert 'encoding="UTF-16"' in first
    task = ElementTree.fromstring(body)
    assert (task.tag, task.get("version")) == (f"{XMLNS}Task", "1.2")
    settings = children(task, "Settings")
    restart = settings.pop("RestartOnFailure")
    assert {name: value.text in SETTINGS[name] for name, value in settings.items()} == (
        dict.fromkeys(settings, True)
    )
    assert {child.tag.removeprefix(XMLNS): child.text for child in restart} == {
        "Interval": "PT1M",  # from PT1M to P31D
        "Count": "255",  # from 1 to 255
    }
    trigger = [TRIGGER.index(name) for name in children(task, "Triggers/LogonTrigger")]
    assert trigger == sorted(trigger)
    principal = children(task, "Principals/Principal")
    assert {name: value.text for name, value in principal.items()} == {
        "UserId": "PC\\Jörg",
        "LogonType": "InteractiveToken",
        "RunLevel": "LeastPrivilege",
    }
    action = children(task, "Actions/Exec")
    assert [action[name].text for name in ("Command", "Arguments", "WorkingDirectory")] == [
        "C:\\a & b\\x.exe",
        'task "run" <1>',
        "C:\\ü",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="there is a Service Control Manager")
def test_elsewhere_a_service_is_refused_in_words() -> None:
    with pytest.raises(winsvc.SystemRefused, match="Windows' own"):
        winsvc.start_service()


if sys.platform != "win32":  # where a program of PATH would not be found before Windows' own
    SCHTASKS = """#!/bin/sh
printf '%s\\n' "$@" >>"$0.asked"
echo "$SCHTASKS_SAYS"
exit "$SCHTASKS_EXIT"
"""

    @pytest.fixture
    def schtasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A schtasks that notes each of its arguments in a line of the file `asked`."""
        program = tmp_path / "schtasks"
        program.write_text(SCHTASKS)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setenv("SCHTASKS_SAYS", "Status: Ready")
        monkeypatch.setenv("SCHTASKS_EXIT", "0")
        return program

    def asked(schtasks: Path) -> list[str]:
        return schtasks.with_name("schtasks.asked").read_text().splitlines()

    def test_a_task_is_installed_from_a_file_in_utf16(
        schtasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("USERNAME", "Jörg")
        monkeypatch.setenv("USERDOMAIN", "PC")
        file = tmp_path / "a folder" / "task.xml"
        file.parent.mkdir()
        winsvc.install_task(["C:\\a b\\x.exe", "task", "run"], file)
        assert asked(schtasks) == ["/create", "/tn", "llama-sidecar", "/xml", str(file), "/f"]
        written = file.read_text(encoding="utf-16")
        assert "<Command>C:\\a b\\x.exe</Command>" in written
        assert "<Arguments>task run</Arguments>" in written
        assert "<UserId>PC\\Jörg</UserId>" in written

    def test_a_task_is_asked_for_and_removed_by_its_name(schtasks: Path) -> None:
        assert winsvc.task_status() == "Status: Ready"
        winsvc.remove_task()
        assert asked(schtasks) == [
            *("/query", "/tn", "llama-sidecar", "/fo", "list"),
            *("/delete", "/tn", "llama-sidecar", "/f"),
        ]

    def test_what_the_task_scheduler_refuses_comes_in_its_own_words(
        schtasks: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SCHTASKS_SAYS", "ERROR: Access is denied.")
        monkeypatch.setenv("SCHTASKS_EXIT", "1")
        with pytest.raises(winsvc.SystemRefused, match=r"^ERROR: Access is denied\. \(exit 1\)$"):
            winsvc.remove_task()
        schtasks.unlink()
        monkeypatch.setenv("PATH", str(schtasks.parent))
        with pytest.raises(winsvc.SystemRefused, match="schtasks cannot be run"):
            winsvc.task_status()
