"""Who watches a job on another machine: what it does when that does not answer, or dies.

tests/test_bench_remote.py shows it with a real machine; here a made-up one fails in ways that
cannot be hit on purpose there.
"""

from __future__ import annotations

import argparse
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from bench import remote
from bench.remote import JobFailed, Watch
from bench.ssh import Host, HostError, Unreachable

GIVE_UP_S = 20.0


class Machine(remote.Remote):
    """A job whose states are told one after the other; the last one stays."""

    def __init__(self, folder: Path, *states: dict[str, Any] | None) -> None:
        plan = folder / "plan.json"
        plan.write_text("{}")
        super().__init__(Host("h"), remote.Wanted(plan, None, "", {}), folder)
        self.states = list(states)
        self.done: list[str] = []
        self.lost_starts = 0  # so many arrive, and their answers do not
        self.unheard_starts = 0  # so many do not even arrive
        self.is_running = False

    def state(self) -> dict[str, Any] | None:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def is_task_running(self) -> bool:
        return self.is_running

    def prepare(self) -> None:
        self.done.append("prepare")

    def start(self) -> None:
        self.done.append("start")
        if self.unheard_starts:
            self.unheard_starts -= 1
            raise Unreachable("cut")
        self.is_running = True
        if self.lost_starts:
            self.lost_starts -= 1
            raise Unreachable("cut")

    def fetch_all(self) -> None:
        self.done.append("fetch")

    def put_back(self, state: Any) -> str:
        self.done.append("put back")
        return ""

    def delete_task(self) -> None:
        self.done.append("delete")


def told(state: str, starts: int = 1, beat: int = 1) -> dict[str, Any]:
    return {
        "state": state,
        "starts": starts,
        "beat": beat,
        "began": "then",
        "done": 1,
        "total": 2,
        "said": "a cell  12.5 tok/s",
        "tok_s": 12.5,
        "disturbed": [],
        "unloaded": [],
        "error": "",
    }


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_FIRST_S", "POLL_MOST_S", "RETRY_FIRST_S", "RETRY_MOST_S"):
        monkeypatch.setattr(remote, name, 0.01)


def watching(machine: Machine, silent_s: float = GIVE_UP_S) -> Watch:
    return Watch(machine, GIVE_UP_S, silent_s)


def test_a_start_whose_answer_was_lost_is_not_made_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, None, None, told("done"))  # the task runs, the job said nothing yet
    machine.lost_starts = 1
    watch = watching(machine)
    assert watch.begin(is_again=False) is None
    assert watch.to_the_end()["state"] == "done"
    assert machine.done == ["prepare", "start"]


def test_a_start_that_never_arrived_is_made_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, None)
    machine.unheard_starts = 2
    watching(machine).begin(is_again=False)
    assert machine.done == ["prepare", "start", "start", "start"]


def test_a_job_that_runs_is_watched_and_not_started(tmp_path: Path) -> None:
    machine = Machine(tmp_path, told("running"), told("running", beat=2), told("done", beat=3))
    watch = watching(machine)
    assert watch.begin(is_again=True) is None
    assert watch.to_the_end()["beat"] == 3
    assert machine.done == []


def test_the_end_of_an_earlier_start_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    old, new = told("failed", starts=4), told("done", starts=5)
    machine = Machine(tmp_path, old, old, old, new)
    watch = watching(machine)
    assert watch.begin(is_again=False) is None
    assert watch.to_the_end() == new


def test_what_is_done_is_only_fetched_unless_it_is_wanted_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, told("done"))
    assert watching(machine).begin(is_again=False) == told("done")
    assert machine.done == []
    assert watching(machine).begin(is_again=True) is None
    assert machine.done == ["prepare", "start"]


def test_a_silent_job_is_started_again_only_if_its_task_does_not_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path, told("running"))
    machine.is_running = True
    watch = Watch(machine, 0.5, 0.01)
    with pytest.raises(JobFailed, match="gave up"):
        watch.to_the_end()
    assert machine.done == []


def test_a_job_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    class Dying(Machine):
        def is_task_running(self) -> bool:
            return False

    machine = Dying(tmp_path, told("running"))
    watch = watching(machine, silent_s=0.01)
    with pytest.raises(JobFailed, match="ended 5 times without a word"):
        watch.to_the_end()
    assert machine.done == ["start"] * remote.RESTARTS
    assert watch.last_state is not None
    assert watch.finish(watch.last_state) == []
    assert machine.done[-3:] == ["fetch", "put back", "delete"]


def test_to_end_a_job_that_does_not_run_starts_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, told("running"))
    watch = watching(machine, silent_s=0.01)
    watch.is_stopping = True
    with pytest.raises(JobFailed, match="does not run"):
        watch.to_the_end()
    assert machine.done == []


def test_a_host_that_is_away_is_asked_until_the_time_is_over(tmp_path: Path) -> None:
    asked = []

    class Away(Machine):
        def state(self) -> dict[str, Any] | None:
            asked.append(1)
            raise Unreachable("no route to host")

    with pytest.raises(JobFailed, match="gave up"):
        Watch(Away(tmp_path, None), 0.3, 1.0).to_the_end()
    assert len(asked) > 3


def test_progress_is_told_to_machines_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(tmp_path, told("running"), told("done", beat=2))
    watch = Watch(machine, GIVE_UP_S, GIVE_UP_S, is_json=True)
    watch.begin(is_again=False)
    watch.to_the_end()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["said"] == "it was begun then: watching it"
    assert (lines[-1]["done"], lines[-1]["total"], lines[-1]["tok_s"]) == (1, 2, 12.5)
    assert lines[-1]["said"] == "a cell  12.5 tok/s"


# --- which machine it is


def ssh_that(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A program called ssh that answers as no server here does."""
    program = folder / "ssh"
    program.write_text(f"#!/bin/sh\nfor line; do :; done\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return Host("h")


POWERSHELL = 'case "$line" in *env:OS*) echo Windows_NT;; *) echo "%OS%";; esac'


@pytest.mark.parametrize(
    ("script", "expected"), [("echo Windows_NT", "cmd"), (POWERSHELL, "powershell")]
)
def test_the_shell_of_the_host_is_known_by_what_it_makes_of_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    assert ssh_that(tmp_path, script, monkeypatch).shell() == expected


def test_a_host_that_is_no_windows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match="is no Windows with cmd"):
        ssh_that(tmp_path, "echo %OS%", monkeypatch).shell()


def test_exit_code_255_is_the_lines_own_and_no_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unreachable, match="Connection reset by peer"):
        ssh_that(tmp_path, "echo Connection reset by peer >&2; exit 255", monkeypatch).run("x")


def test_every_call_is_without_input_and_with_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ssh_that(tmp_path, 'printf "%s " "$@"; cat', monkeypatch)
    said = host.run("x").stdout.decode()
    for wanted in ("-n", "BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15"):
        assert wanted in said
    with pytest.raises(Unreachable, match=r"has not answered within 0\.5 s"):
        ssh_that(tmp_path, "exec sleep 60", monkeypatch).run("x", timeout_s=0.5)


def test_a_plan_or_a_runner_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, none = tmp_path / "p.json", str(tmp_path / "none")
    argv = ["--host", "h", "--out", str(tmp_path)]
    assert remote.main([none, *argv]) == 1
    plan.write_text("{}")
    assert remote.main([str(plan), *argv, "--exe", none]) == 1
    said = capsys.readouterr().err
    assert "none is no file" in said
    assert "make build-windows, or --python" in said
    assert isinstance(remote._parser(), argparse.ArgumentParser)
