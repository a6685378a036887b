"""How a child process is started, read and ended on this platform."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import winsvc
from tests.daemon import SIGKILL, is_alive, wait_until

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
posix_only = pytest.mark.skipif(
    sys.platform == "win32", reason="sessions, groups and signals; test_windows.py has the likes"
)
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


@posix_only
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


@posix_only
@pytest.mark.parametrize(("script", "code"), [(WAIT, -signal.SIGTERM), (WAIT_DEAF, -SIGKILL)])
def test_kill_ends_who_is_deaf_to_terminate(script: str, code: int) -> None:
    with spawned(script) as process:
        assert first_line(process) == b"up"
        winsvc.terminate(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5 if code == -SIGKILL else 10)
        winsvc.kill(process)
        assert process.wait(10) == code
        winsvc.terminate(process)  # it is gone: nothing happens, nobody else is hit
        winsvc.kill(process)


@posix_only
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
