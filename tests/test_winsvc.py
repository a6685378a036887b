"""How a child process is started, read and ended on this platform."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import winsvc
from tests.daemon import (
    ROOT,
    SIGKILL,
    Daemon,
    bare_environment,
    is_alive,
    running_daemon,
    wait_until,
)

TELL = """
import json, os, stat, sys
found = os.fstat(0)
print(json.dumps({
    "is_null": os.path.samestat(found, os.stat(os.devnull)),
    "leads_session": os.getsid(0) == os.getpid(),
    "same_pipe": os.path.samestat(os.fstat(1), os.fstat(2)),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    "env": dict(os.environ),
}))
"""
WAIT = "import time; print('up', flush=True); time.sleep(600)"
WAIT_DEAF = "import signal; signal.signal(15, signal.SIG_IGN);" + WAIT
KILLED = 1 if sys.platform == "win32" else -SIGKILL
WITH_GRANDCHILD = (
    "import subprocess, sys;"
    f"child = subprocess.Popen([sys.executable, '-c', {WAIT!r}], stdout=subprocess.DEVNULL);"
    "print(child.pid, flush=True); child.wait()"
)


@contextlib.contextmanager
def spawned(script: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = winsvc.spawn([sys.executable, "-c", script], environment)
    try:
        yield process
    finally:
        winsvc.kill(process)
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_child_gets_a_null_input_a_session_one_pipe_and_nothing_else_of_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, spawned(TELL, GIVEN="yes") as process:
        os.set_inheritable(ours.fileno(), True)
        told = json.loads(b"".join(winsvc.output_lines(process, 1 << 20)))
        assert process.wait(10) == 0
    assert (told["is_null"], told["leads_session"], told["same_pipe"]) == (True, True, True)
    assert set(told["descriptors"]) <= {0, 1, 2, 3}  # 3 is the folder that it lists
    assert {name: value for name, value in told["env"].items() if name != "LC_CTYPE"} == {
        "GIVEN": "yes"
    }


# A child of Windows: its console, its process group's mark (ConsoleFlags of the process's
# parameters, 1 where Ctrl-C is ignored), its standard handles, and what it reads of a file
# whose handle is said to be inherited.
TELL_ON_WINDOWS = """
import ctypes, json, msvcrt, os, sys
kernel32 = ctypes.WinDLL("kernel32")
ntdll = ctypes.WinDLL("ntdll")
ntdll.RtlGetCurrentPeb.restype = ctypes.c_uint64
parameters = ctypes.c_uint64.from_address(ntdll.RtlGetCurrentPeb() + 0x20).value
try:
    found = os.read(msvcrt.open_osfhandle(int(sys.argv[1]), os.O_RDONLY), 100).decode()
except OSError:
    found = "nothing"
print(json.dumps({
    "consoles": kernel32.GetConsoleProcessList((ctypes.c_uint32 * 4)(), 4),
    "is_deaf_to_ctrl_c": bool(ctypes.c_uint32.from_address(parameters + 0x18).value & 1),
    "stdin": os.read(0, 100).decode(),
    "found": found,
}))
"""


if sys.platform == "win32":
    import msvcrt

    STARTING = """
import os, subprocess, sys
import winsvc
os.set_handle_inheritable(int(sys.argv[4]), True)
if sys.argv[1] == "the daemon":
    process = winsvc.spawn(sys.argv[2:], dict(os.environ))
else:  # a program that takes no care: what the child tells is true
    process = subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE, close_fds=False)
print(process.communicate()[0].decode())
"""

    @pytest.mark.parametrize("parent", ["the daemon", "another program"])
    def test_a_child_gets_no_console_a_group_of_its_own_and_no_handle_but_the_pipe(
        tmp_path: Path, parent: str
    ) -> None:
        (tmp_path / "tell.py").write_text(TELL_ON_WINDOWS)
        (tmp_path / "start.py").write_text(STARTING)
        (tmp_path / "secret").write_text("the secret")
        with (tmp_path / "secret").open("rb") as ours:
            handle = msvcrt.get_osfhandle(ours.fileno())
            os.set_handle_inheritable(handle, True)
            starting = [sys.executable, str(tmp_path / "start.py"), parent]
            telling = [sys.executable, str(tmp_path / "tell.py"), str(handle)]
            done = subprocess.run(
                [*starting, *telling],
                env=bare_environment() | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                close_fds=False,
                check=True,
                creationflags=subprocess.CREATE_NEW_CONSOLE,
            )
        told = json.loads(done.stdout)
        is_ours = parent == "the daemon"
        assert told["found"] == ("nothing" if is_ours else "the secret")
        assert (told["consoles"] == 0) is is_ours
        assert told["is_deaf_to_ctrl_c"] is is_ours
        assert told["stdin"] == ""

    def test_the_folder_of_libraries_that_a_frozen_program_set_is_taken_back(
        tmp_path: Path,
    ) -> None:
        kernel32 = winsvc._kernel32()

        def folder() -> str:
            found = ctypes.create_unicode_buffer(500)
            kernel32.GetDllDirectoryW(500, found)
            return found.value

        kernel32.SetDllDirectoryW(str(tmp_path))
        assert folder() == str(tmp_path)
        winsvc.restore_dll_search()
        assert folder() == ""

    def test_after_a_failure_the_service_is_started_again_in_five_seconds() -> None:
        restarts = winsvc._restarts()
        # SERVICE_FAILURE_ACTIONSW and SC_ACTION, winsvc.h: with 64-bit pointers
        found = struct.unpack("<IxxxxQQIxxxxQ", bytes(restarts))
        seconds, message, command, count, address = found
        assert (seconds, message, command, count) == (86_400, 0, 0, 3)
        actions = ctypes.string_at(address, 8 * count)
        assert list(struct.iter_unpack("<iI", actions)) == [(1, 5000)] * 3  # SC_ACTION_RESTART

    def test_access_denied_comes_in_the_systems_words_with_number_and_advice(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        connect_only = 0x1  # SC_MANAGER_CONNECT, as a user who is no administrator may
        monkeypatch.setattr(winsvc, "_SC_ALL_ACCESS", connect_only)
        with pytest.raises(winsvc.SystemRefused) as refused:
            winsvc.install_service(["x.exe"], {})
        words = ctypes.FormatError(5).strip().rstrip(".")
        assert str(refused.value) == f"{words} (error 5): run as administrator"


def test_a_program_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        winsvc.spawn([str(tmp_path / "nothing")], {})


def test_a_child_outlives_the_thread_that_asked_for_it() -> None:
    found: list[subprocess.Popen[bytes]] = []
    argv = [sys.executable, "-c", WAIT]
    asking = threading.Thread(target=lambda: found.append(winsvc.spawn(argv, {})))
    asking.start()
    asking.join(10)
    try:
        assert first_line(found[0]) == b"up"
        with pytest.raises(subprocess.TimeoutExpired):
            found[0].wait(0.3)
    finally:
        winsvc.kill(found[0])
        assert found[0].wait(10) == KILLED
        assert found[0].stdout is not None
        found[0].stdout.close()


@pytest.mark.parametrize(("script", "code"), [(WAIT, -signal.SIGTERM), (WAIT_DEAF, -SIGKILL)])
def test_kill_ends_who_is_deaf_to_terminate(script: str, code: int) -> None:
    with spawned(script) as process:
        assert first_line(process) == b"up"
        winsvc.terminate(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5 if code == KILLED else 10)
        winsvc.kill(process)
        assert process.wait(10) == code
        winsvc.terminate(process)  # it is gone: nothing happens, nobody else is hit
        winsvc.kill(process)


def test_terminate_reaches_what_the_child_started() -> None:
    with spawned(WITH_GRANDCHILD) as process:
        grandchild = int(first_line(process))
        assert is_alive(grandchild)
        winsvc.terminate(process)
        wait_until(lambda: not is_alive(grandchild), "the grandchild ended", 5)


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        (b"", []),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\r\n\nb", [b"a\r", b"", b"b"]),
        (b"unended", [b"unended"]),
        (b"0123456789\nb\n", [b"01234567", b"89", b"b"]),
        (b"01234567\n", [b"01234567"]),
        (b"12345678", [b"12345678"]),
        (b"123456789", [b"12345678", b"9"]),
        (b"x" * 20, [b"x" * 8, b"x" * 8, b"x" * 4]),
        (b"\xff\x00\xfe\n", [b"\xff\x00\xfe"]),
    ],
)
def test_output_comes_in_lines_and_what_is_too_long_in_pieces(
    output: bytes, lines: list[bytes]
) -> None:
    with spawned(f"import os; os.write(1, {output!r})") as process:
        assert list(winsvc.output_lines(process, 8)) == lines
        assert process.stdout is not None
        assert process.stdout.closed


def test_a_flood_without_newlines_is_held_in_bounded_pieces() -> None:
    with spawned("import os\nfor _ in range(64): os.write(1, b'x' * 65536)") as process:
        pieces = list(winsvc.output_lines(process, 4096))
    assert {len(piece) for piece in pieces} == {4096}
    assert len(pieces) == 64 * 65536 // 4096


@pytest.mark.parametrize(
    ("name", "is_kept"),
    [
        ("PATH", True),
        ("CUDA_VISIBLE_DEVICES", True),
        ("HIP_VISIBLE_DEVICES", True),
        ("LLAMA_ARG_PORT", False),
        ("LLAMA_API_KEY", False),
        ("GGML_BACKEND_PATH", False),
        ("AIP_MODE", False),
        ("HF_TOKEN", False),
        ("LD_PRELOAD", False),
        ("AWS_SECRET_ACCESS_KEY", False),
    ],
)
def test_a_child_sees_only_what_is_on_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_kept: bool
) -> None:
    monkeypatch.setenv(name, "of the daemon")
    environment = winsvc.child_environment(tmp_path, {"EXTRA": "1"})
    assert (environment.get(name) == "of the daemon") is is_kept
    assert environment["EXTRA"] == "1"
    assert environment["XDG_CONFIG_HOME"] == str(tmp_path)


def test_the_private_folder_is_ours_alone_and_goes_away() -> None:
    with winsvc.private_dir() as name:
        if sys.platform != "win32":  # where TEMP is this user's, and modes mean nothing
            assert Path(name).stat().st_mode & 0o777 == 0o700
        assert list(Path(name).iterdir()) == []
    assert not Path(name).exists()


def test_a_port_is_free_only_if_nobody_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not winsvc.is_port_free(port)
    assert winsvc.is_port_free(port)
    with socket.create_server(("0.0.0.0", port)):
        assert not winsvc.is_port_free(port)


def test_waiting_names_the_sockets_that_can_be_read() -> None:
    a, b = socket.socketpair()
    c, d = socket.socketpair()
    with a, b, c, d:
        assert winsvc.wait_readable([a, c], 0.01) == []
        b.send(b"x")
        assert winsvc.wait_readable([a, c], 5) == [a]
        d.close()
        assert winsvc.wait_readable([a, c], 5) == [a, c]


def test_who_waits_sees_that_another_thread_has_shut_the_connection_down() -> None:
    ours, silent = socket.socketpair()
    with ours, silent, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(winsvc.wait_readable, [ours], 60)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        ours.shutdown(socket.SHUT_RDWR)
        assert waiting.result(20) == [ours]


# --- children of a daemon that is gone


@contextlib.contextmanager
def gone() -> Iterator[int]:
    """The number of a process that has ended and is not reaped: nobody else can have it."""
    with spawned("") as process:
        wait_until(lambda: not is_alive(process.pid), "it has ended")
        yield process.pid


def record(folder: Path, owner: int, owner_stamp: object, *children: object) -> Path:
    file = folder / f"{owner}.json"
    file.write_text(json.dumps({"stamp": owner_stamp, "children": list(children)}))
    return file


def child(process: subprocess.Popen[bytes], stamp: str | None = None) -> dict[str, object]:
    own = winsvc.process_stamp(process.pid)
    return {"pid": process.pid, "stamp": stamp or own, "port": 8500, "hash": "0123456789ab"}


def test_a_stamp_is_of_one_process_for_all_its_life() -> None:
    with spawned(WAIT) as process, spawned(WAIT) as other:
        stamp = winsvc.process_stamp(process.pid)
        assert stamp
        assert winsvc.process_stamp(process.pid) == stamp
        assert winsvc.process_stamp(os.getpid()) not in (None, stamp)
        assert winsvc.process_stamp(other.pid)
        winsvc.kill(process)
        wait_until(lambda: winsvc.process_stamp(process.pid) is None, "a zombie has none", 5)
    assert winsvc.process_stamp(process.pid) is None


def test_a_name_with_blanks_and_brackets_does_not_confuse_the_stamp(tmp_path: Path) -> None:
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to("/bin/sleep")
    process = winsvc.spawn([str(odd), "60"], {})
    try:
        wait_until(lambda: "a) R 1 (b" in Path(f"/proc/{process.pid}/stat").read_text(), "exec")
        assert winsvc.process_stamp(process.pid) == winsvc.process_stamp(process.pid)
        boot, start = str(winsvc.process_stamp(process.pid)).split()
        assert len(boot) == 36
        assert int(start) > 1000
    finally:
        winsvc.kill(process)
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def test_a_process_is_ended_only_by_its_own_stamp() -> None:
    with spawned(WAIT) as process:
        stamp = winsvc.process_stamp(process.pid)
        assert stamp
        for wrong in ("", "x", stamp + "0", stamp[:-1], stamp[1:]):
            assert not winsvc.end_process(process.pid, wrong)
        assert is_alive(process.pid)
        assert winsvc.end_process(process.pid, stamp)
        assert process.wait(10) == KILLED
        assert not winsvc.end_process(process.pid, stamp)


def test_orphans_of_a_daemon_that_is_gone_are_ended_and_its_file_goes(tmp_path: Path) -> None:
    with gone() as owner, spawned(WAIT_DEAF) as first, spawned(WAIT) as second:
        assert first_line(first) == b"up"
        file = record(tmp_path, owner, "of long ago", child(first), child(second))
        ended = winsvc.end_orphans(tmp_path)
        assert ended == [
            f"pid={process.pid} port=8500 hash=0123456789ab" for process in (first, second)
        ]
        assert [first.wait(10), second.wait(10)] == [KILLED, KILLED]
    assert not file.exists()


def test_a_number_that_belongs_to_another_program_by_now_is_left_alone(tmp_path: Path) -> None:
    with gone() as owner, spawned(WAIT) as process:
        stamp = str(winsvc.process_stamp(process.pid))
        earlier = f"{stamp.split()[0]} {int(stamp.split()[1]) - 1}"
        file = record(tmp_path, owner, "of long ago", child(process, earlier))
        assert winsvc.end_orphans(tmp_path) == []
        assert is_alive(process.pid)
    assert not file.exists()


def test_children_of_a_daemon_that_lives_are_left_alone(tmp_path: Path) -> None:
    with spawned(WAIT) as owner, spawned(WAIT) as process:
        own = winsvc.process_stamp(owner.pid)
        file = record(tmp_path, owner.pid, own, child(process))
        before = file.read_text()
        assert winsvc.end_orphans(tmp_path) == []
        assert is_alive(process.pid)
        assert file.read_text() == before


def test_a_daemons_number_that_was_given_to_another_does_not_protect(tmp_path: Path) -> None:
    with spawned(WAIT) as reused, spawned(WAIT) as process:
        record(tmp_path, reused.pid, "of long ago", child(process))
        assert len(winsvc.end_orphans(tmp_path)) == 1
        assert process.wait(10) == KILLED
        assert is_alive(reused.pid)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"stamp": "x"}',
        '{"stamp": "x", "children": 7}',
        '{"stamp": "x", "children": [7]}',
        '{"stamp": "x", "children": [{}]}',
        '{"stamp": "x", "children": [{"pid": "me"}]}',
        '{"stamp": "x", "children": [{"pid": -1, "stamp": "x"}]}',
        '{"stamp": "x", "children": [{"pid": 0, "stamp": "x"}]}',
        '{"stamp": "x", "children": [{"pid": 1e400, "stamp": "x"}]}',
        '{"stamp": "x", "children": [{"pid": 99999999999999999999, "stamp": "x"}]}',
        '{"stamp": "x", "children": [{"pid": "1", "stamp": "x"}, {"pid": "\\u0661"}]}',
        "[" * 100_000,
    ],
    ids=[str(n) for n in range(17)],
)
def test_half_a_file_ends_nobody_and_stops_nothing(tmp_path: Path, text: str) -> None:
    with gone() as owner, spawned(WAIT) as process:
        (tmp_path / "1.json").write_text(text)
        record(tmp_path, owner, "of long ago", child(process))
        assert len(winsvc.end_orphans(tmp_path)) == 1
        assert process.wait(10) == KILLED


def test_files_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    names = ["notes.json", "12.txt", "models.json", "readme"]
    for name in names:
        (tmp_path / name).write_text("{}")
    (tmp_path / "77.json").mkdir()
    assert winsvc.end_orphans(tmp_path) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names, "77.json"])


def test_a_file_that_is_no_utf8_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "5.json").write_bytes(b"\xff\xfe")
    assert winsvc.end_orphans(tmp_path) == []


def test_the_roster_names_who_lives(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on" / "demand"
    roster = winsvc.Roster(folder)
    file = folder / f"{os.getpid()}.json"
    with spawned(WAIT) as first, spawned(WAIT) as second:
        roster.add(first.pid, 8500, "aaa")
        roster.add(second.pid, 8501, "bbb")
        roster.remove(first.pid)
        roster.remove(first.pid)
        roster.remove(12345678)
        found = json.loads(file.read_text())
        assert found["stamp"] == winsvc.process_stamp(os.getpid())
        stamp = winsvc.process_stamp(second.pid)
        row = {"pid": second.pid, "stamp": stamp, "port": 8501, "hash": "bbb"}
        assert found["children"] == [row]
        assert winsvc.end_orphans(folder) == []
        assert is_alive(second.pid)
    assert [each.name for each in folder.iterdir()] == [file.name]
    roster.close()
    roster.close()
    roster.remove(second.pid)  # its end is noticed late
    assert list(folder.iterdir()) == []


def test_one_that_has_ended_already_is_not_noted(tmp_path: Path) -> None:
    with gone() as pid:
        winsvc.Roster(tmp_path).add(pid, 8500, "aaa")
    assert list(tmp_path.iterdir()) == []


def in_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "state"


@pytest.mark.parametrize("unusable", [in_a_file, lambda _: Path("/proc/nowhere")])
def test_a_folder_that_cannot_be_written_to_is_no_fault(
    tmp_path: Path, unusable: Callable[[Path], Path]
) -> None:
    folder = unusable(tmp_path)
    assert winsvc.end_orphans(folder) == []
    roster = winsvc.Roster(folder)
    with spawned(WAIT) as process:
        roster.add(process.pid, 8500, "aaa")
        roster.remove(process.pid)
    roster.close()


def state_files(daemon: Daemon) -> list[Path]:
    return sorted((daemon.folder / "state").glob("*.json"))


def test_a_killed_daemon_leaves_a_file_that_the_next_one_sweeps(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"a": {}, "b": {}}) as daemon:
        assert [daemon.chat(name)[0] for name in ("a", "b")] == [200, 200]
        pids = sorted(row["pid"] for row in daemon.sidecars())
        (file,) = state_files(daemon)
        assert file.name == f"{daemon.process.pid}.json"
        noted = [row["pid"] for row in json.loads(file.read_text())["children"]]
        assert sorted(noted) == pids
        daemon.stop(SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)), "every child is gone", 2)
        assert file.exists()
    with running_daemon(tmp_path, {"a": {}}) as next_one:
        assert state_files(next_one) == []
        assert next_one.chat("a")[0] == 200
        assert len(state_files(next_one)) == 1
        assert next_one.stop() == 0
        assert state_files(next_one) == []


def test_a_child_that_outlived_its_daemon_is_ended_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with gone() as owner, spawned(WAIT_DEAF) as orphan:
        assert first_line(orphan) == b"up"
        record(tmp_path / "state", owner, "of long ago", child(orphan))
        with running_daemon(tmp_path, {"a": {}}) as daemon:
            assert f"pid={orphan.pid} port=8500 hash=0123456789ab" in daemon.log
            assert orphan.wait(10) == KILLED
            assert state_files(daemon) == []


def test_a_daemon_works_without_a_folder_for_its_state(tmp_path: Path) -> None:
    env = {"LLAMA_SIDECAR_STATE_DIR": "/proc/nowhere"}
    with running_daemon(tmp_path, {"a": {}}, **env) as daemon:
        assert daemon.chat("a")[0] == 200
        assert daemon.stop() == 0
    assert "Traceback" not in daemon.log
