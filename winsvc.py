"""How a child process is started, held and ended on this platform.

The rest of the program calls the same names everywhere; what differs between
Windows and POSIX systems is decided here, once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# What a child may see of our environment. LLAMA_*, GGML_*, AIP_* and HF_TOKEN are
# left out on purpose: each of them can change a llama-server's port, model or behaviour.
KEPT_VARIABLES = frozenset(
    "PATH HOME USER LOGNAME LANG LC_ALL LC_CTYPE TZ TMPDIR TMP TEMP LD_LIBRARY_PATH "
    "DYLD_LIBRARY_PATH SYSTEMROOT SYSTEMDRIVE WINDIR COMSPEC PATHEXT PROGRAMFILES "
    "PROGRAMDATA LOCALAPPDATA USERPROFILE NUMBER_OF_PROCESSORS PROCESSOR_ARCHITECTURE "
    "XDG_RUNTIME_DIR XDG_CACHE_HOME OMP_NUM_THREADS".split()
)
KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "VK_", "MESA_", "SYCL_", "ONEAPI_")


def child_environment(private_dir: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: an allow-list of ours, and `extra`.

    `private_dir` is an empty folder; the child looks there for a user's
    llama.cpp configuration file and finds none.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in KEPT_VARIABLES or name.upper().startswith(KEPT_PREFIXES)
    }
    private = {"XDG_CONFIG_HOME": str(private_dir), "APPDATA": str(private_dir)}
    return kept | private | {"GGML_NO_BACKTRACE": "1"} | dict(extra)


def private_dir() -> tempfile.TemporaryDirectory[str]:
    """A new empty folder that only this user can enter; gone when it is cleaned up."""
    return tempfile.TemporaryDirectory(prefix="llama-sidecar-", ignore_cleanup_errors=True)


class Roster:
    """A file that names the children of this process, for `end_orphans` after a crash.

    Safe to share by threads. It is a second line behind the parent-death signal
    and the job object: a folder that cannot be written to is no fault.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / f"{os.getpid()}.json"
        self._lock = threading.Lock()  # guards _children, held while the file is written
        self._children: dict[int, dict[str, object]] = {}

    def add(self, pid: int, port: int, hash_: str) -> None:
        stamp = process_stamp(pid)
        if stamp is not None:
            with self._lock:
                self._children[pid] = {"pid": pid, "stamp": stamp, "port": port, "hash": hash_}
                self._write()

    def remove(self, pid: int) -> None:
        with self._lock:
            if self._children.pop(pid, None):
                self._write()

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._children.clear()  # a late `remove` writes no file again
            self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        stamp = process_stamp(os.getpid())
        record = {"stamp": stamp, "children": list(self._children.values())}
        half = self._file.with_suffix(".new")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            half.write_text(json.dumps(record), encoding="utf-8")
            half.replace(self._file)


def end_orphans(folder: Path) -> list[str]:
    """End what daemons that are gone have left running; a line for each, for the log.

    A process is ended only if it started at the very moment that was noted: a
    number that belongs to another program by now is left alone.
    """
    ended = []
    for file in sorted(folder.glob("[0-9]*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            owner, children = int(file.stem), list(record["children"])
            if process_stamp(owner) == record["stamp"]:
                continue  # that daemon lives
            for child in children:
                if end_process(int(child["pid"]), str(child["stamp"])):
                    ended.append("pid={pid} port={port} hash={hash}".format_map(child))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass  # half a file, or none of ours: nothing can be said of its processes
        with contextlib.suppress(OSError):
            file.unlink()
    return ended


def state_dir() -> Path:
    """Where this user's programs keep what they must find again after a restart."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return Path(base or Path.home() / "AppData" / "Local") / "llama-sidecar"
    base = os.environ.get("XDG_STATE_HOME")
    return Path(base or Path.home() / ".local" / "state") / "llama-sidecar"


# Linux sends the parent-death signal when the *thread* that forked ends, so every
# child is started by this one, which lives as long as the program.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def spawn(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a child that ends with the daemon, whatever ends the daemon.

    Its standard input is the null device; stdout and stderr share one pipe,
    `process.stdout`, which the caller must drain until it ends. No shell, and
    no other handle of ours is inherited. Blocks for the fork only. Raises OSError.
    """
    return _spawner.submit(_start, list(argv), dict(environment)).result()


def _start(argv: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        **_apart(),
    )


if sys.platform == "win32":
    from ctypes import wintypes

    _JOB_OBJECT_EXTENDED_LIMITS = 9
    _JOB_KILL_ON_CLOSE = 0x2000

    class _BasicLimits(ctypes.Structure):
        _fields_ = [
            ("PerProcessUserTimeLimit", wintypes.LARGE_INTEGER),
            ("PerJobUserTimeLimit", wintypes.LARGE_INTEGER),
            ("LimitFlags", wintypes.DWORD),
            ("MinimumWorkingSetSize", ctypes.c_size_t),
            ("MaximumWorkingSetSize", ctypes.c_size_t),
            ("ActiveProcessLimit", wintypes.DWORD),
            ("Affinity", ctypes.c_size_t),
            ("PriorityClass", wintypes.DWORD),
            ("SchedulingClass", wintypes.DWORD),
        ]

    class _ExtendedLimits(ctypes.Structure):
        _fields_ = [
            ("Basic", _BasicLimits),
            ("IoCounters", ctypes.c_ulonglong * 6),
            ("ProcessMemoryLimit", ctypes.c_size_t),
            ("JobMemoryLimit", ctypes.c_size_t),
            ("PeakProcessMemoryUsed", ctypes.c_size_t),
            ("PeakJobMemoryUsed", ctypes.c_size_t),
        ]

    _jobs: list[int] = []

    def contain_children() -> None:
        """Put this process into a job that ends all its children when it ends.

        Children start inside the job, so none can slip out before it is assigned.
        Raises OSError.
        """
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.CreateJobObjectW.restype = wintypes.HANDLE
        kernel32.GetCurrentProcess.restype = wintypes.HANDLE
        kernel32.SetInformationJobObject.argtypes = [
            wintypes.HANDLE,
            ctypes.c_int,
            ctypes.c_void_p,
            wintypes.DWORD,
        ]
        kernel32.AssignProcessToJobObject.argtypes = [wintypes.HANDLE, wintypes.HANDLE]
        job = kernel32.CreateJobObjectW(None, None)
        limits = _ExtendedLimits()
        limits.Basic.LimitFlags = _JOB_KILL_ON_CLOSE
        ok = (
            job
            and kernel32.SetInformationJobObject(
                job, _JOB_OBJECT_EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
            )
            and kernel32.AssignProcessToJobObject(job, kernel32.GetCurrentProcess())
        )
        if not ok:
            raise ctypes.WinError(ctypes.get_last_error())
        _jobs.append(job)  # never closed by us: Windows closes it when we end

    def _apart() -> dict[str, Any]:
        """Without our console and process group; `contain_children` ties it to us."""
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
        return {"creationflags": flags}

    def terminate(process: subprocess.Popen[bytes]) -> None:
        """End it. Windows has no softer way for a process without a console."""
        kill(process)

    def kill(process: subprocess.Popen[bytes]) -> None:
        try:
            process.kill()
        except OSError:  # access denied is what Windows says of one that is just ending
            if process.poll() is None:
                raise

    def process_stamp(pid: int) -> str | None:
        """What tells this process from a later one with the same number; None if it is gone."""
        handle = _open_process(pid, _PROCESS_QUERY_LIMITED)
        if not handle:
            return None
        try:
            return _creation_time(handle)
        finally:
            _kernel32().CloseHandle(handle)

    def end_process(pid: int, stamp: str) -> bool:
        """End the process that has this number and this stamp; False if there is none."""
        handle = _open_process(pid, _PROCESS_QUERY_LIMITED | _PROCESS_TERMINATE)
        if not handle:
            return False
        try:
            is_it = _creation_time(handle) == stamp
            return is_it and bool(_kernel32().TerminateProcess(handle, 1))
        finally:
            _kernel32().CloseHandle(handle)

    _PROCESS_TERMINATE = 0x0001
    _PROCESS_QUERY_LIMITED = 0x1000

    def _kernel32() -> ctypes.WinDLL:
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.OpenProcess.restype = wintypes.HANDLE
        kernel32.OpenProcess.argtypes = [wintypes.DWORD, wintypes.BOOL, wintypes.DWORD]
        kernel32.CloseHandle.argtypes = [wintypes.HANDLE]
        kernel32.TerminateProcess.argtypes = [wintypes.HANDLE, wintypes.UINT]
        moment = ctypes.POINTER(wintypes.FILETIME)
        kernel32.GetProcessTimes.argtypes = [wintypes.HANDLE, moment, moment, moment, moment]
        return kernel32

    def _open_process(pid: int, access: int) -> int | None:
        handle: int | None = _kernel32().OpenProcess(access, False, pid)
        return handle

    def _creation_time(handle: int) -> str | None:
        """None for one that has ended, which lives on while somebody holds a handle."""
        created, exited, kernel, user = (wintypes.FILETIME() for _ in range(4))
        times = [ctypes.byref(moment) for moment in (created, exited, kernel, user)]
        is_known = _kernel32().GetProcessTimes(handle, *times)
        if not is_known or exited.dwHighDateTime or exited.dwLowDateTime:
            return None
        return f"{created.dwHighDateTime:08x}{created.dwLowDateTime:08x}"

    def raise_descriptor_limit() -> None:
        """Windows has no such limit."""

    def quoted_command(argv: Sequence[str]) -> str:
        """The command line as this system's shell takes it."""
        return subprocess.list2cmdline(argv)

    STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)

    def wait_readable(
        sockets: Sequence[socket.socket], timeout_s: float | None
    ) -> list[socket.socket]:
        """Those of at most a few sockets that can be read from, or have ended."""
        return select.select(sockets, [], [], timeout_s)[0]

    def claim(listener: socket.socket) -> None:
        """Before bind: no second program may listen on this port beside us."""
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
else:
    import resource

    _PR_SET_PDEATHSIG = 1  # linux/prctl.h

    def contain_children() -> None:
        """Nothing to do here: each child is tied to us when it is started."""

    def _apart() -> dict[str, Any]:
        """In a session of its own, and yet ended with us."""
        return {"start_new_session": True, "preexec_fn": _die_with_parent()}

    def _die_with_parent() -> Callable[[], None] | None:
        if sys.platform != "linux":
            return None
        prctl = ctypes.CDLL(None).prctl  # looked up here: little may be done after the fork
        parent = os.getpid()

        def after_fork() -> None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before the call above
                os._exit(127)

        return after_fork

    def terminate(process: subprocess.Popen[bytes]) -> None:
        """Ask it, and what it started, to end."""
        _signal_group(process, signal.SIGTERM)

    def kill(process: subprocess.Popen[bytes]) -> None:
        _signal_group(process, signal.SIGKILL)

    def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
        if process.returncode is not None:
            return  # reaped: the number may belong to somebody else by now
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return  # it has just ended

    def process_stamp(pid: int) -> str | None:
        """What tells this process from a later one with the same number; None if it is gone.

        Known on Linux only: field 22 of proc_pid_stat(5), in a boot of this name.
        """
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        has_ended = fields[0] in "ZX"
        return None if has_ended else f"{boot} {fields[19]}"

    def end_process(pid: int, stamp: str) -> bool:
        """End the process that has this number and this stamp; False if there is none."""
        if sys.platform != "linux":
            return False
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            if process_stamp(pid) != stamp:
                return False
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def raise_descriptor_limit() -> None:
        """As many sockets as the system lets this user have."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def quoted_command(argv: Sequence[str]) -> str:
        """The command line as this system's shell takes it."""
        return shlex.join(argv)

    STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def wait_readable(
        sockets: Sequence[socket.socket], timeout_s: float | None
    ) -> list[socket.socket]:
        """Those of at most a few sockets that can be read from, or have ended."""
        poll = select.poll()  # unlike select, it has no limit on a descriptor's number
        for sock in sockets:
            poll.register(sock, select.POLLIN)
        ready = poll.poll(None if timeout_s is None else timeout_s * 1000)
        return [s for s in sockets for descriptor, _ in ready if s.fileno() == descriptor]

    def claim(listener: socket.socket) -> None:
        """Before bind: a port whose last connections linger may be taken again."""
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def is_port_free(port: int) -> bool:
    """Whether nothing listens on this port of 127.0.0.1 or of all addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        claim(probe)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def output_lines(process: subprocess.Popen[bytes], longest: int) -> Iterator[bytes]:
    """The child's output line by line until it ends; longer lines come in pieces."""
    assert process.stdout is not None
    rest = b""
    with process.stdout as pipe:
        while data := pipe.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                for start in range(0, len(line) or 1, longest):
                    yield line[start : start + longest]
            while len(rest) > longest:
                yield rest[:longest]
                rest = rest[longest:]
    if rest:
        yield rest


def start_thread(name: str, target: Callable[..., None], *args: object) -> threading.Thread:
    """A started thread that does not keep the program alive."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread
