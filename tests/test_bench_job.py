"""The unattended job, where it runs: its state, its room, its end; and what is said over SSH."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import winsvc
from bench import job, look, remote, room, ssh
from tests import real_parts
from tests.daemon import ROOT, running_daemon, wait_until
from tests.llama_swap_double import llama_swap

XMLNS = "{http://schemas.microsoft.com/windows/2004/02/mit/task}"
NOT_THERE = "http://127.0.0.1:9"
SLOWLY_S = 100.0


def folder_with(tmp_path: Path, plan: object, **settings: object) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / job.PLAN).write_text(json.dumps(plan))
    (folder / job.JOB).write_text(json.dumps(settings))
    return folder


def sweep_plan(repetitions: int = 1) -> dict[str, Any]:
    model = str(real_parts.tiny())
    return {
        "schema": 1,
        "models": [
            {
                "id": "tiny",
                "server": str(real_parts.llama_server_bin()),
                "model_path": model,
                "modes": {"off": ["-c", "512", "-t", "1", "--no-warmup"]},
            }
        ],
        "prompts": ["code"],
        "n_predict": 4,
        "warm_ups": 0,
        "repetitions": repetitions,
    }


def state(folder: Path) -> dict[str, Any]:
    return job.read_state(folder) or {}


@contextlib.contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "bench.job", "--job", str(folder)], cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# --- the job


@pytest.mark.integration
def test_a_job_tells_its_state_until_it_is_done_and_does_nothing_twice(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, sweep_plan())
    with running(folder) as process:
        assert process.wait(SLOWLY_S) == 0, (folder / job.LOG).read_text()
    told = state(folder)
    assert (told["state"], told["exit_code"], told["error"]) == ("done", 0, "")
    assert (told["done"], told["total"], told["starts"]) == (2, 2, 1)
    before = (folder / job.RESULTS).read_bytes()
    assert job.main(["--job", str(folder)]) == 0
    assert state(folder) == told, "as at each start of Windows, until the task is deleted"
    assert (folder / job.RESULTS).read_bytes() == before


@pytest.mark.integration
def test_a_second_start_leaves_a_running_job_alone_and_stop_ends_it(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, sweep_plan(repetitions=1000))
    with running(folder) as process:
        wait_until(lambda: state(folder).get("state") == "running", "it runs", SLOWLY_S)
        with running(folder) as second:
            assert second.wait(SLOWLY_S) == 0
        assert state(folder)["starts"] == 1
        (folder / job.STOP).touch()
        assert process.wait(SLOWLY_S) == job.INTERRUPTED
    assert state(folder)["state"] == "stopped"


@pytest.mark.skipif(sys.platform == "win32", reason="no program of Windows can refuse to end")
def test_a_job_killed_in_the_middle_puts_things_back_at_its_next_start(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {}}) as daemon:
        assert daemon.chat("m", flags="-c 2048")[0] == 200
        before = daemon.sidecars()
        url = f"http://127.0.0.1:{daemon.port}"
        folder = folder_with(tmp_path, {"schema": 1, "models": []}, sidecar=url)
        unloaded = room.loaded(url, "")
        room.make(url, "", print)
        assert daemon.sidecars() == []
        left = {"state": "running", "starts": 3, "unloaded": unloaded, "disturbed": []}
        (folder / job.STATE).write_text(json.dumps(left))  # as a power cut leaves it
        assert job.main(["--job", str(folder)]) == 1
        assert [row["hash"] for row in daemon.sidecars()] == [row["hash"] for row in before]
    told = state(folder)
    assert (told["state"], told["starts"]) == ("failed", 4)
    assert "the plan has no models" in told["error"]
    assert all(one["back"] for one in told["unloaded"])


def test_what_a_dead_job_had_unloaded_can_be_loaded_from_outside(tmp_path: Path) -> None:
    with llama_swap([]) as (url, running, asked):
        unloaded = [{"by": "llama-swap", "url": url, "model": "a/b c", "back": False}]
        folder = folder_with(tmp_path, {})
        (folder / job.STATE).write_text(json.dumps({"state": "running", "unloaded": unloaded}))
        assert job.main(["--put-back", str(folder)]) == 0
        assert asked == ["/upstream/a/b%20c/health"]
        assert running == ["a/b%20c"]
        assert job.main(["--put-back", str(folder)]) == 0
        assert len(asked) == 1, "once"


def test_a_machine_that_does_not_let_go_stops_the_job_and_gets_back_what_it_had(
    tmp_path: Path,
) -> None:
    with llama_swap(["a"], is_stubborn=True) as (url, _, asked):
        folder = folder_with(tmp_path, {"schema": 1}, llama_swap=url)
        assert job.main(["--job", str(folder)]) == 1
        assert state(folder)["state"] == "failed"
        assert state(folder)["error"].startswith("no room: a was loaded again at once")
        assert "/upstream/a/health" in asked
        assert not (folder / job.RESULTS).exists()


def test_a_plain_sweep_goes_through_the_same_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.json").write_text("{}")
    command = [sys.executable, "-m", "bench.exe", "bench-run"]
    arguments = [str(tmp_path / "p.json"), "--out", str(tmp_path / "r.jsonl")]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the plan's schema is not 1" in done.stderr
    assert job.main([]) == 2
    assert "usage: bench-run" in capsys.readouterr().err


def test_the_daemon_does_not_load_the_bench() -> None:
    """It would start more slowly for what it never uses."""
    assert loaded_with("llama_sidecar") == []


def test_nor_does_the_frozen_program_before_it_is_told_to() -> None:
    assert loaded_with("bench.exe") == ["bench", "bench.exe"]


def loaded_with(module: str) -> list[str]:
    """What of bench/ a fresh interpreter holds, once it has imported the module."""
    code = f"import sys, {module}; print(*(m for m in sys.modules if m.startswith('bench')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


# --- room


def test_a_sidecar_comes_back_with_the_flags_it_had(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {}, "n": {}}) as daemon:
        assert daemon.chat("m", flags="-c 4096 --cache-type-k q8_0")[0] == 200
        assert daemon.chat("n")[0] == 200
        before = sorted(row["hash"] for row in daemon.sidecars())
        url = f"http://127.0.0.1:{daemon.port}"
        unloaded = room.loaded(url, NOT_THERE)
        room.make(url, NOT_THERE, print)
        assert daemon.sidecars() == []
        assert room.put_back(unloaded, print) == []
        assert sorted(row["hash"] for row in daemon.sidecars()) == before


def test_a_model_of_llama_swap_goes_and_comes_back() -> None:
    with llama_swap(["a"]) as (url, running, _):
        unloaded = room.loaded("", url)
        room.make("", url, print)
        assert running == []
        assert room.put_back(unloaded, print) == []
        assert running == ["a"]


def test_a_sidecar_that_answers_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {"answer_gate": True}}) as daemon:
        asking = threading.Thread(target=daemon.chat, args=("m",))
        asking.start()
        try:
            url = f"http://127.0.0.1:{daemon.port}"
            wait_until(lambda: any(r["in_flight"] for r in daemon.sidecars()), "it answers")
            with pytest.raises(room.RoomError, match="m has been answering for 0 s"):
                room.make(url, "", print, busy_s=0)
        finally:
            daemon.open_gate("m", "answer_gate")
            asking.join(30)
        room.make(url, "", print)
        assert daemon.sidecars() == []


def test_nobody_there_is_room_enough_and_a_stranger_is_told() -> None:
    assert room.loaded(NOT_THERE, "") == []
    with (
        llama_swap([]) as (url, _, _),
        pytest.raises(room.RoomError, match=r"is no llama-sidecar: its /sidecars lacks 'sidecars'"),
    ):
        room.loaded(url, "")


def test_a_machine_is_described_for_the_doctor(tmp_path: Path) -> None:
    value = {
        "schema": 1,
        "models": [
            {"id": "m", "server": "/no/server", "model_path": "/no/m", "modes": {"off": []}}
        ],
    }
    folder = folder_with(tmp_path, value, llama_swap="", sidecar="")
    assert job.main(["--look", str(folder)]) == 0
    seen = json.loads((folder / job.LOOK).read_text())
    assert seen["servers"] == {"/no/server": {"error": "there is no such file"}}
    assert seen["models"] == {"/no/m": None}
    assert seen["free_bytes"] > 0
    (folder / job.PLAN).write_text("{")
    assert "is no JSON" in look.seen({}, folder / job.PLAN, folder)["plan"]


# --- the task


@pytest.mark.parametrize("is_system", [True, False])
def test_an_unattended_task_has_no_limit_and_a_normal_priority(is_system: bool) -> None:
    text = winsvc.unattended_task_xml(
        "C:\\a & b\\x.exe",
        '--job "C:\\ü"',
        "C:\\ü",
        "PC\\Jörg",
        is_system=is_system,
        is_at_boot=True,
    )
    task = ElementTree.fromstring(text.partition("\n")[2])
    found = {child.tag.removeprefix(XMLNS): child.text for child in task.iter()}
    assert found["Priority"] in ("4", "5", "6")
    assert found["ExecutionTimeLimit"] == "PT0S"
    assert found["MultipleInstancesPolicy"] == "IgnoreNew"
    assert found["DisallowStartIfOnBatteries"] == found["StopIfGoingOnBatteries"] == "false"
    assert found["UserId"] == ("S-1-5-18" if is_system else "PC\\Jörg")
    assert found.get("LogonType") == (None if is_system else "S4U")
    assert found["RunLevel"] == "HighestAvailable"
    assert "BootTrigger" in found
    assert "RestartOnFailure" not in found
    assert found["Command"] == "C:\\a & b\\x.exe"
    assert found["Arguments"] == '--job "C:\\ü"'


def test_the_runner_writes_its_own_task(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {}, verb="--job")
    assert job.main(["--task-xml", str(folder)]) == 0
    data = (folder / job.TASK).read_bytes()
    assert data[:2] in (b"\xff\xfe", b"\xfe\xff")
    assert f"--job {folder}" in data.decode("utf-16")


# --- over SSH


@pytest.mark.parametrize("word", ["a b", "%OS%", "a&b", 'a"b', "a|b", "a>b", "$x", "^", "", "a;b"])
def test_a_word_that_a_shell_would_read_otherwise_is_never_sent(word: str) -> None:
    with pytest.raises(ValueError, match="means something else to a shell"):
        ssh.Host("h").run("echo", word)


@pytest.mark.parametrize("path", ["a b", "../x", "/x", "C:/x", "a//b", ""])
def test_a_path_is_plain_and_below_the_home_folder(path: str) -> None:
    with pytest.raises(ValueError, match="no plain path"):
        ssh.Host("h").remove(path)


def test_an_option_is_no_host() -> None:
    with pytest.raises(ssh.HostError, match="is no host"):
        ssh.Host("-oProxyCommand=x")


def test_a_job_has_its_name_from_the_plan_alone(tmp_path: Path) -> None:
    names = []
    for text in ("{}", "{}", "{ }"):
        (tmp_path / "My Plan!.json").write_text(text)
        names.append(remote.Wanted(tmp_path / "My Plan!.json", None, "", {}).name)
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("my-plan-")


def test_half_a_line_that_was_fetched_is_fetched_again(tmp_path: Path) -> None:
    """The host may have lost it in a power cut, and written another since."""
    file = tmp_path / "r.jsonl"
    for before, after in ((b"a\nb", b"a\n"), (b"a\n", b"a\n"), (b"a", b""), (b"", b"")):
        file.write_bytes(before)
        remote._end_at_a_line(file)
        assert file.read_bytes() == after


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_a_state_is_whole_at_every_moment(tmp_path: Path) -> None:
    """Read as fast as it can be while it is written as fast as it can be."""
    (tmp_path / job.JOB).write_text("{}")
    written = job.State(tmp_path)
    written.set()
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            written.set(said="x" * 5000)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        beats = [state(tmp_path)["beat"] for _ in range(200)]
    finally:
        ended.set()
        writing.join(30)
    assert beats == sorted(beats)
