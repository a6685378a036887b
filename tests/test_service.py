"""What a Windows service and a task of the Task Scheduler are made of, on every system."""

from __future__ import annotations

import sys
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
