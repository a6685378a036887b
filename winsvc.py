"""How a child process is started, held and ended on this platform.

The rest of the program calls the same names everywhere; what differs between
Windows and POSIX systems is decided here, once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import functools
import io
import json
import math
import os
import queue
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

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
    if getattr(sys, "frozen", False):
        for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"):
            original = os.environ.get(f"{name}_ORIG")  # PyInstaller's own libraries stand there
            kept |= {name: original} if original else {}
            if not original:
                kept.pop(name, None)
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
    for half in folder.glob("[0-9]*.new"):  # left where a daemon ended while it wrote
        with contextlib.suppress(OSError, ValueError):
            if process_stamp(int(half.stem)) is None:
                half.unlink()
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
    """Where this user's programs keep what they must find again after a restart.

    A user without a home folder has them where temporary files lie.
    """
    is_windows = sys.platform == "win32"
    base = os.environ.get("LOCALAPPDATA" if is_windows else "XDG_STATE_HOME")
    if base:
        return Path(base) / "llama-sidecar"
    try:
        home = Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "llama-sidecar"
    return home.joinpath(*(("AppData", "Local") if is_windows else (".local", "state"))) / (
        "llama-sidecar"
    )


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

    _JOB_OBJECT_ACCOUNTING = 1
    _JOB_OBJECT_EXTENDED_LIMITS = 9
    _JOB_KILL_ON_CLOSE = 0x2000
    _JOB_PROCESSES, _JOB_PROCESS_MEMORY = 0x8, 0x100

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
        kernel32 = _kernel32()
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

    def end_with_launcher() -> None:
        """End at once when the launcher of a one-file program is killed.

        That is what Windows knows by the program's name and started: the Python
        below it would live on unseen, and hold its port.
        """
        launcher = _open_process(os.getppid(), _SYNCHRONIZE | _PROCESS_QUERY_LIMITED)
        if not launcher:
            return
        if getattr(sys, "frozen", False) and _is_our_file(launcher):
            start_thread("launcher", _end_after, launcher)
        else:
            _kernel32().CloseHandle(launcher)

    def _is_our_file(process: int) -> bool:
        name = ctypes.create_unicode_buffer(_LONGEST_PATH)
        length = wintypes.DWORD(_LONGEST_PATH)
        if not _kernel32().QueryFullProcessImageNameW(process, 0, name, ctypes.byref(length)):
            return False
        try:
            return Path(name.value).samefile(sys.executable)
        except OSError:
            return False

    def _end_after(process: int) -> None:
        _kernel32().WaitForSingleObject(process, _FOR_EVER)
        os._exit(1)  # `contain_children` takes the children along

    _Struct = TypeVar("_Struct", bound=ctypes.Structure)

    class _Accounting(ctypes.Structure):
        _fields_ = [
            ("Times", wintypes.LARGE_INTEGER * 4),
            ("TotalPageFaultCount", wintypes.DWORD),
            ("TotalProcesses", wintypes.DWORD),
            ("ActiveProcesses", wintypes.DWORD),
            ("TotalTerminatedProcesses", wintypes.DWORD),
        ]

    class LimitedJob:
        """A job object for programs that nobody trusts: closing it ends all in it.

        Each of them has so many bytes of memory, and no more than so many run at once.
        Raises OSError.
        """

        def __init__(self, memory_bytes: int, most_processes: int) -> None:
            limits = _ExtendedLimits()
            limits.Basic.LimitFlags = _JOB_KILL_ON_CLOSE | _JOB_PROCESSES | _JOB_PROCESS_MEMORY
            limits.Basic.ActiveProcessLimit = most_processes
            limits.ProcessMemoryLimit = memory_bytes
            self._handle = _kernel32().CreateJobObjectW(None, None)
            self._checked(
                self._handle
                and _kernel32().SetInformationJobObject(
                    *(self._handle, _JOB_OBJECT_EXTENDED_LIMITS),
                    *(ctypes.byref(limits), ctypes.sizeof(limits)),
                )
            )

        def add(self, process: subprocess.Popen[bytes]) -> None:
            """What it starts from now on is inside too."""
            handle = int(process._handle)  # type: ignore[attr-defined]  # as asyncio reads it
            self._checked(_kernel32().AssignProcessToJobObject(self._handle, handle))

        def limits(self) -> tuple[int, int]:
            """As Windows has stored them: bytes of memory, and processes."""
            found = self._asked(_JOB_OBJECT_EXTENDED_LIMITS, _ExtendedLimits())
            return found.ProcessMemoryLimit, found.Basic.ActiveProcessLimit

        def active_processes(self) -> int:
            """How many run inside at this moment."""
            count: int = self._asked(_JOB_OBJECT_ACCOUNTING, _Accounting()).ActiveProcesses
            return count

        def _asked(self, what: int, found: _Struct) -> _Struct:
            self._checked(
                _kernel32().QueryInformationJobObject(
                    *(self._handle, what, ctypes.byref(found), ctypes.sizeof(found), None)
                )
            )
            return found

        def close(self) -> None:
            _kernel32().CloseHandle(self._handle)

        def _checked(self, is_done: int) -> None:
            if not is_done:
                raise ctypes.WinError(ctypes.get_last_error())

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
    _SYNCHRONIZE = 0x100000
    _FOR_EVER = 0xFFFFFFFF
    _LONGEST_PATH = 32_768

    @functools.cache
    def _kernel32() -> ctypes.WinDLL:
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
        kernel32.QueryInformationJobObject.argtypes = [
            wintypes.HANDLE,
            ctypes.c_int,
            ctypes.c_void_p,
            wintypes.DWORD,
            ctypes.c_void_p,
        ]
        kernel32.OpenProcess.restype = wintypes.HANDLE
        kernel32.OpenProcess.argtypes = [wintypes.DWORD, wintypes.BOOL, wintypes.DWORD]
        kernel32.CloseHandle.argtypes = [wintypes.HANDLE]
        kernel32.TerminateProcess.argtypes = [wintypes.HANDLE, wintypes.UINT]
        moment = ctypes.POINTER(wintypes.FILETIME)
        kernel32.GetProcessTimes.argtypes = [wintypes.HANDLE, moment, moment, moment, moment]
        kernel32.WaitForSingleObject.argtypes = [wintypes.HANDLE, wintypes.DWORD]
        kernel32.QueryFullProcessImageNameW.argtypes = [
            wintypes.HANDLE,
            wintypes.DWORD,
            wintypes.LPWSTR,
            ctypes.POINTER(wintypes.DWORD),
        ]
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

    def keep_to_one_cpu() -> None:
        """Nothing to do here: nobody has measured whether it would help."""

    def raise_descriptor_limit() -> None:
        """Windows has no such limit."""

    def restore_dll_search() -> None:
        """Undo what PyInstaller's bootloader does, which children would inherit."""
        _kernel32().SetDllDirectoryW(None)

    def quoted_command(argv: Sequence[str]) -> str:
        """The command line as this system's shell takes it."""
        return subprocess.list2cmdline(argv)

    STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)

    _SHUT_DOWN_SEEN_S = 1.0

    def wait_readable(
        sockets: Sequence[socket.socket], timeout_s: float | None
    ) -> list[socket.socket]:
        """Those of at most a few sockets that can be read from, or have ended."""
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            pause_s = max(0.0, min(end - time.monotonic(), _SHUT_DOWN_SEEN_S))
            ready = select.select(sockets, [], [], pause_s)[0]
            ready = ready or [sock for sock in sockets if _is_shut_down(sock)]
            if ready or time.monotonic() >= end:
                return ready

    def _is_shut_down(sock: socket.socket) -> bool:
        """Whether another thread of ours has shut it down, which wakes no select here."""
        try:
            sock.send(b"")
        except BlockingIOError:
            return False
        except OSError:
            return True
        return False

    def wait_writable(sock: socket.socket, timeout_s: float) -> bool:
        """Whether more can be sent, or the connection has ended, within so many seconds."""
        return any(select.select([], [sock], [sock], timeout_s))

    def limit_receive(sock: socket.socket, seconds: float) -> float:
        """Let no receive block: after one that timed out the socket would be of no use here."""
        sock.setblocking(False)
        return 0.0

    def claim(listener: socket.socket) -> None:
        """Before bind: no second program may listen on this port beside us."""
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
else:
    import resource

    _PR_SET_PDEATHSIG = 1  # linux/prctl.h

    def contain_children() -> None:
        """Nothing to do here: each child is tied to us when it is started."""

    def end_with_launcher() -> None:
        """Nothing to do here: on Linux the launcher's death is a SIGTERM to us."""

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

    def keep_to_one_cpu() -> None:
        """Let this thread and those that it will start run on one CPU; children have them all.

        Only one thread of an interpreter runs at a time. On several CPUs each system call
        hands it across to another, which costs more than the request (docs/performance.md).
        The second CPU is taken: the first often serves the devices.
        """
        if sys.platform != "linux":
            return
        cpus = _spawner.submit(os.sched_getaffinity, 0).result()  # from now on a thread of its own
        if len(cpus) > 1:
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.sched_setaffinity(0, {sorted(cpus)[1]})

    def raise_descriptor_limit() -> None:
        """As many sockets as the system lets this user have."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def restore_dll_search() -> None:
        """Nothing to do here: `child_environment` gives the library path back."""

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

    def wait_writable(sock: socket.socket, timeout_s: float) -> bool:
        """Whether more can be sent, or the connection has ended, within so many seconds."""
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        return bool(poll.poll(timeout_s * 1000))

    def limit_receive(sock: socket.socket, seconds: float) -> float:
        """Let a receive block for so long and then raise BlockingIOError; on Windows at once.

        The seconds that it will really block. It saves asking before each one
        whether there is something to read.
        """
        sock.setblocking(True)
        whole_s, part_s = divmod(seconds, 1)
        limit = struct.pack("ll", int(whole_s), int(part_s * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return seconds

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


# --- a service of the Service Control Manager


class ServiceState(enum.IntEnum):
    """dwCurrentState of SERVICE_STATUS, winsvc.h."""

    STOPPED = 1
    START_PENDING = 2
    STOP_PENDING = 3
    RUNNING = 4


SERVICE_MOVES: Final[Mapping[ServiceState, frozenset[ServiceState]]] = {
    ServiceState.START_PENDING: frozenset(
        {ServiceState.RUNNING, ServiceState.STOP_PENDING, ServiceState.STOPPED}
    ),
    ServiceState.RUNNING: frozenset({ServiceState.STOP_PENDING, ServiceState.STOPPED}),
    ServiceState.STOP_PENDING: frozenset({ServiceState.STOPPED}),
    ServiceState.STOPPED: frozenset(),
}
SERVICE_NAME: Final = "llama-sidecar"
SERVICE_TITLE: Final = "llama-sidecar"
SERVICE_WORDS: Final = "Gives every coding agent a llama-server of its own."
SERVICE_TICK_S: Final = 1.0  # between two checkpoints while it starts or stops
SERVICE_HINT_MS: Final = 10_000  # how long Windows may wait for the next one
RESTART_AFTER_MS: Final = 5_000
PRESHUTDOWN_MS: Final = 180_000  # before Windows shuts down; newer ones would give 10 s
FAILURES_FORGOTTEN_AFTER_S: Final = 86_400

_ACCEPT_STOP, _ACCEPT_SHUTDOWN, _ACCEPT_PRESHUTDOWN = 0x1, 0x4, 0x100
_CONTROL_STOP, _CONTROL_INTERROGATE, _CONTROL_SHUTDOWN, _CONTROL_PRESHUTDOWN = 1, 4, 5, 15
STOP_CONTROLS: Final = frozenset({_CONTROL_STOP, _CONTROL_SHUTDOWN, _CONTROL_PRESHUTDOWN})


@dataclasses.dataclass(frozen=True)
class ServiceStatus:
    """What is told to the Service Control Manager: the fields of SERVICE_STATUS that change."""

    state: ServiceState
    controls_accepted: int
    exit_code: int
    checkpoint: int
    wait_hint_ms: int


class ServiceProgress:
    """Which status comes next, by the rules of SetServiceStatus: rising checkpoints.

    A pending state has a checkpoint that rises with every report, and takes no
    controls; the others have none. Not safe to share by threads.
    """

    def __init__(self) -> None:
        self.state = ServiceState.START_PENDING
        self._checkpoint = 0

    def moved_to(self, state: ServiceState, exit_code: int = 0) -> ServiceStatus:
        """The status after a move, or the next one of the same pending state."""
        if state is not self.state:
            if state not in SERVICE_MOVES[self.state]:
                raise AssertionError(f"a service cannot go from {self.state} to {state}")
            self.state, self._checkpoint = state, 0
        is_pending = state in (ServiceState.START_PENDING, ServiceState.STOP_PENDING)
        self._checkpoint += is_pending
        accepted = _ACCEPT_STOP | _ACCEPT_SHUTDOWN | _ACCEPT_PRESHUTDOWN
        return ServiceStatus(
            state,
            accepted if state is ServiceState.RUNNING else 0,
            exit_code,
            self._checkpoint if is_pending else 0,
            SERVICE_HINT_MS if is_pending else 0,
        )


class SystemRefused(Exception):
    """The system did not do what it was asked for; its own words, with the number."""


Work = Callable[["queue.SimpleQueue[int]", Callable[[], None]], int]

if sys.platform == "win32":
    import winreg

    _SC_ALL_ACCESS, _SERVICE_ALL_ACCESS = 0xF003F, 0xF01FF
    _SC_CONNECT, _SERVICE_QUERY = 0x1, 0x4
    _OWN_PROCESS, _AUTO_START, _ERROR_NORMAL = 0x10, 2, 1
    _CONFIG_DESCRIPTION, _CONFIG_FAILURE_ACTIONS = 1, 2
    _CONFIG_FAILURE_FLAG, _CONFIG_PRESHUTDOWN = 4, 7
    _ACTION_RESTART = 1
    _ERROR_CALL_NOT_IMPLEMENTED, _ERROR_INVALID_LEVEL, _ERROR_NOT_ACTIVE = 120, 124, 1062
    _ADVICE = {5: "run as administrator", 1060: "install it first: llama-sidecar service install"}

    class _ServiceStatus(ctypes.Structure):
        _fields_ = [
            (name, wintypes.DWORD)
            for name in (
                "type state controls_accepted exit_code own_exit_code checkpoint wait_hint".split()
            )
        ]

    _MainFunction = ctypes.WINFUNCTYPE(None, wintypes.DWORD, ctypes.POINTER(wintypes.LPWSTR))
    _HandlerFunction = ctypes.WINFUNCTYPE(
        wintypes.DWORD, wintypes.DWORD, wintypes.DWORD, ctypes.c_void_p, ctypes.c_void_p
    )

    class _TableEntry(ctypes.Structure):
        _fields_ = [("name", wintypes.LPWSTR), ("main", _MainFunction)]

    class _Description(ctypes.Structure):
        _fields_ = [("text", wintypes.LPWSTR)]

    class _FailureAction(ctypes.Structure):
        _fields_ = [("type", ctypes.c_int), ("delay_ms", wintypes.DWORD)]

    class _FailureActions(ctypes.Structure):
        _fields_ = [
            ("forgotten_after_s", wintypes.DWORD),
            ("reboot_message", wintypes.LPWSTR),
            ("command", wintypes.LPWSTR),
            ("count", wintypes.DWORD),
            ("actions", ctypes.POINTER(_FailureAction)),
        ]

    @functools.cache
    def _advapi32() -> ctypes.WinDLL:
        library = ctypes.WinDLL("advapi32", use_last_error=True)
        handle, text, number = wintypes.HANDLE, wintypes.LPCWSTR, wintypes.DWORD
        for name, result, arguments in (
            ("OpenSCManagerW", handle, [text, text, number]),
            ("OpenServiceW", handle, [handle, text, number]),
            (
                "CreateServiceW",
                handle,
                [handle, text, text, *[number] * 4, text, text, *[ctypes.c_void_p] * 2, text, text],
            ),
            ("ChangeServiceConfig2W", wintypes.BOOL, [handle, number, ctypes.c_void_p]),
            ("StartServiceW", wintypes.BOOL, [handle, number, ctypes.c_void_p]),
            ("ControlService", wintypes.BOOL, [handle, number, ctypes.c_void_p]),
            ("QueryServiceStatus", wintypes.BOOL, [handle, ctypes.c_void_p]),
            ("DeleteService", wintypes.BOOL, [handle]),
            ("CloseServiceHandle", wintypes.BOOL, [handle]),
            ("StartServiceCtrlDispatcherW", wintypes.BOOL, [ctypes.c_void_p]),
            (
                "RegisterServiceCtrlHandlerExW",
                handle,
                [text, _HandlerFunction, ctypes.c_void_p],
            ),
            ("SetServiceStatus", wintypes.BOOL, [handle, ctypes.c_void_p]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        return library

    def _system_refused() -> SystemRefused:
        number = ctypes.get_last_error()
        words = ctypes.FormatError(number).strip().rstrip(".")
        advice = f": {_ADVICE[number]}" if number in _ADVICE else ""
        return SystemRefused(f"{words} (error {number}){advice}")

    @contextlib.contextmanager
    def _opened_service(access: int) -> Iterator[tuple[ctypes.WinDLL, int]]:
        """The service of our name. Raises SystemRefused."""
        library = _advapi32()
        manager = library.OpenSCManagerW(None, None, _SC_CONNECT)
        if not manager:
            raise _system_refused()
        try:
            service = library.OpenServiceW(manager, SERVICE_NAME, access)
            if not service:
                raise _system_refused()
            try:
                yield library, service
            finally:
                library.CloseServiceHandle(service)
        finally:
            library.CloseServiceHandle(manager)

    def install_service(command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Register the program as a service that starts with Windows. Raises SystemRefused.

        The variables are stored in the service's own environment. After a
        failure Windows starts it again in RESTART_AFTER_MS.
        """
        library = _advapi32()
        manager = library.OpenSCManagerW(None, None, _SC_ALL_ACCESS)
        if not manager:
            raise _system_refused()
        try:
            service = library.CreateServiceW(
                *(manager, SERVICE_NAME, SERVICE_TITLE, _SERVICE_ALL_ACCESS),
                *(_OWN_PROCESS, _AUTO_START, _ERROR_NORMAL, subprocess.list2cmdline(command)),
                *(None, None, None, None, None),
            )
            if not service:
                raise _system_refused()
            try:
                _describe(library, service)
            finally:
                library.CloseServiceHandle(service)
        finally:
            library.CloseServiceHandle(manager)
        _store_environment(variables)

    def _describe(library: ctypes.WinDLL, service: int) -> None:
        for kind, value in (
            (_CONFIG_DESCRIPTION, _Description(SERVICE_WORDS)),
            (_CONFIG_FAILURE_ACTIONS, _restarts()),
            (_CONFIG_FAILURE_FLAG, wintypes.BOOL(True)),  # also if it ends in order, not with 0
            (_CONFIG_PRESHUTDOWN, wintypes.DWORD(PRESHUTDOWN_MS)),
        ):
            is_set = library.ChangeServiceConfig2W(service, kind, ctypes.byref(value))
            is_of_wine = ctypes.get_last_error() == _ERROR_INVALID_LEVEL  # it has no such flag
            if not is_set and not (kind == _CONFIG_FAILURE_FLAG and is_of_wine):
                raise _system_refused()

    def _restarts() -> _FailureActions:
        """Another start after each failure; the last of the three stands for all that follow."""
        actions = (_FailureAction * 3)(*[_FailureAction(_ACTION_RESTART, RESTART_AFTER_MS)] * 3)
        return _FailureActions(FAILURES_FORGOTTEN_AFTER_S, None, None, 3, actions)

    _SERVICE_KEY: Final = rf"SYSTEM\CurrentControlSet\Services\{SERVICE_NAME}"

    def service_variables() -> dict[str, str]:
        """What `install_service` stored; Windows gives it to the service, Wine does not."""
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, _SERVICE_KEY) as key:
                lines, _ = winreg.QueryValueEx(key, "Environment")
        except OSError:
            return {}
        pairs = [line.partition("=") for line in lines]
        return {name: value for name, _, value in pairs}

    def _store_environment(variables: Mapping[str, str]) -> None:
        lines = [f"{name}={value}" for name, value in variables.items()]
        try:
            access = winreg.KEY_SET_VALUE
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, _SERVICE_KEY, 0, access) as key:
                winreg.SetValueEx(key, "Environment", 0, winreg.REG_MULTI_SZ, lines)
        except OSError as exc:
            raise SystemRefused(f"{exc.strerror} (error {exc.winerror})") from exc

    def start_service() -> None:
        """Ask Windows to start it; returns at once. Raises SystemRefused."""
        with _opened_service(_SERVICE_ALL_ACCESS) as (library, service):
            if not library.StartServiceW(service, 0, None):
                raise _system_refused()

    def stop_service(timeout_s: float) -> None:
        """Stop it and wait until it has stopped. Raises SystemRefused."""
        with _opened_service(_SERVICE_ALL_ACCESS) as (library, service):
            status = _ServiceStatus()
            if not library.ControlService(service, _CONTROL_STOP, ctypes.byref(status)):
                if ctypes.get_last_error() == _ERROR_NOT_ACTIVE:
                    return
                raise _system_refused()
            deadline = time.monotonic() + timeout_s
            while _query(library, service) is not ServiceState.STOPPED:
                if time.monotonic() > deadline:
                    raise SystemRefused(f"it has not stopped within {timeout_s:g} s")
                time.sleep(0.2)  # Windows has nothing to wait on before Windows 8

    def service_state() -> ServiceState:
        """Raises SystemRefused."""
        with _opened_service(_SERVICE_QUERY) as (library, service):
            return _query(library, service)

    def _query(library: ctypes.WinDLL, service: int) -> ServiceState:
        status = _ServiceStatus()
        if not library.QueryServiceStatus(service, ctypes.byref(status)):
            raise _system_refused()
        return ServiceState(status.state)

    def remove_service() -> None:
        """Raises SystemRefused."""
        with _opened_service(_SERVICE_ALL_ACCESS) as (library, service):
            if not library.DeleteService(service):
                raise _system_refused()

    def run_as_service(work: Work) -> int:
        """Be the service: blocks until it has stopped. Raises SystemRefused outside of one.

        `work` runs in a thread of Windows' own. It gets a queue in which a
        number stands once the service is to stop, and a function to call once
        it serves; what it returns is the exit code.
        """
        running = _RunningService(work)
        table = (_TableEntry * 2)(_TableEntry(SERVICE_NAME, running.main), _TableEntry())
        if not _advapi32().StartServiceCtrlDispatcherW(table):
            raise _system_refused()
        return running.exit_code

    class _RunningService:
        def __init__(self, work: Work) -> None:
            self.exit_code = 0
            self.main = _MainFunction(self._main)
            self._handler = _HandlerFunction(self._control)
            self._work = work
            self._stops: queue.SimpleQueue[int] = queue.SimpleQueue()
            self._ended = threading.Event()
            self._lock = threading.Lock()  # guards _progress, held while a status is told
            self._progress = ServiceProgress()
            self._library = _advapi32()
            self._handle = 0

        def _main(self, _count: int, _arguments: object) -> None:
            self._handle = self._library.RegisterServiceCtrlHandlerExW(
                SERVICE_NAME, self._handler, None
            )
            self._tell(ServiceState.START_PENDING)
            start_thread("service-checkpoints", self._tick)
            self.exit_code = 1
            try:
                self.exit_code = self._work(self._stops, lambda: self._tell(ServiceState.RUNNING))
            finally:
                self._ended.set()
                self._tell(ServiceState.STOPPED, self.exit_code)

        def _control(self, control: int, _type: int, _data: object, _context: object) -> int:
            if control in STOP_CONTROLS:
                self._tell(ServiceState.STOP_PENDING)
                self._stops.put(control)
            return (
                0
                if control in {*STOP_CONTROLS, _CONTROL_INTERROGATE}
                else (_ERROR_CALL_NOT_IMPLEMENTED)
            )

        def _tick(self) -> None:
            """While it starts or stops, show Windows that it goes on."""
            while not self._ended.wait(SERVICE_TICK_S):
                state = self._progress.state
                if state is not ServiceState.RUNNING:
                    self._tell(state)

        def _tell(self, state: ServiceState, exit_code: int = 0) -> None:
            with self._lock:
                if self._progress.state is ServiceState.STOPPED:
                    return
                if self._progress.state is ServiceState.STOP_PENDING and state in (
                    ServiceState.START_PENDING,
                    ServiceState.RUNNING,
                ):
                    return  # it was told to stop before it served
                told = self._progress.moved_to(state, exit_code)
                status = _ServiceStatus(
                    *(_OWN_PROCESS, told.state, told.controls_accepted, told.exit_code, 0),
                    *(told.checkpoint, told.wait_hint_ms),
                )
                self._library.SetServiceStatus(self._handle, ctypes.byref(status))
else:

    def _not_here() -> SystemRefused:
        return SystemRefused("services of this kind are Windows' own: use systemd, say")

    def install_service(command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Raises SystemRefused: there is no Service Control Manager here."""
        raise _not_here()

    def service_variables() -> dict[str, str]:
        """There is no Service Control Manager here."""
        return {}

    def start_service() -> None:
        """Raises SystemRefused: there is no Service Control Manager here."""
        raise _not_here()

    def stop_service(timeout_s: float) -> None:
        """Raises SystemRefused: there is no Service Control Manager here."""
        raise _not_here()

    def service_state() -> ServiceState:
        """Raises SystemRefused: there is no Service Control Manager here."""
        raise _not_here()

    def remove_service() -> None:
        """Raises SystemRefused: there is no Service Control Manager here."""
        raise _not_here()

    def run_as_service(work: Work) -> int:
        """Raises SystemRefused: there is no Service Control Manager here."""
        raise _not_here()


# --- a task of the Task Scheduler

TASK_NAME: Final = "llama-sidecar"


def task_xml(program: str, arguments: str, folder: str, user: str) -> str:
    """A task that runs a program at this user's logon, and keeps it running.

    By the Task Scheduler schema 1.2: no end after 72 hours, none on battery,
    another start a minute after a failure. Save it as UTF-16.
    """
    trigger = {"LogonTrigger": {"Enabled": "true", "UserId": user}}
    identity = {"UserId": user, "LogonType": "InteractiveToken", "RunLevel": "LeastPrivilege"}
    return _task(program, arguments, folder, SERVICE_WORDS, trigger, identity, is_kept=True)


def unattended_task_xml(
    program: str, arguments: str, folder: str, user: str, *, is_system: bool, is_at_boot: bool
) -> str:
    """A task for a long job with all rights, whether or not anybody is logged on.

    It runs when it is asked to, and with `is_at_boot` at each start of Windows
    too, as Windows' own account or as `user`, of whom no password is asked. A
    second start while it runs is ignored. Save it as UTF-16.
    """
    trigger = {"BootTrigger": {"Enabled": "true", "Delay": "PT1M"}} if is_at_boot else {}
    identity = {"UserId": _SYSTEM_ACCOUNT} if is_system else {"UserId": user, "LogonType": "S4U"}
    identity["RunLevel"] = "HighestAvailable"
    words = "A sweep of llama-sidecar; bench.remote deletes this task when it is over"
    return _task(program, arguments, folder, words, trigger, identity, is_kept=False)


_SYSTEM_ACCOUNT: Final = "S-1-5-18"


def _task(
    program: str,
    arguments: str,
    folder: str,
    words: str,
    triggers: Mapping[str, Mapping[str, str]],
    identity: Mapping[str, str],
    *,
    is_kept: bool,
) -> str:
    settings = {
        "MultipleInstancesPolicy": "IgnoreNew",
        "DisallowStartIfOnBatteries": "false",
        "StopIfGoingOnBatteries": "false",
        "AllowHardTerminate": "true",
        "StartWhenAvailable": "true",
        "RunOnlyIfNetworkAvailable": "false",
        "AllowStartOnDemand": "true",
        "Enabled": "true",
        "Hidden": "false",
        "RunOnlyIfIdle": "false",
        "WakeToRun": "false",
        "ExecutionTimeLimit": "PT0S",
        "Priority": "5",
    }
    task = ElementTree.Element("Task", {"version": "1.2", "xmlns": _TASK_SCHEMA})
    _add(task, "RegistrationInfo", {"Description": words})
    trigger = ElementTree.SubElement(task, "Triggers")
    for name, texts in triggers.items():
        _add(trigger, name, texts)
    principals = ElementTree.SubElement(task, "Principals")
    _add(principals, "Principal", identity).set("id", "Author")
    wanted = _add(task, "Settings", settings)
    if is_kept:
        restart = _add(wanted, "RestartOnFailure", {"Interval": "PT1M", "Count": "255"})
        wanted.remove(restart)
        wanted.insert(list(settings).index("ExecutionTimeLimit"), restart)
    actions = ElementTree.SubElement(task, "Actions", {"Context": "Author"})
    what = {"Command": program, "Arguments": arguments, "WorkingDirectory": folder}
    _add(actions, "Exec", what)
    ElementTree.indent(task)
    text = ElementTree.tostring(task, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-16"?>\n{text}\n'


_TASK_SCHEMA: Final = "http://schemas.microsoft.com/windows/2004/02/mit/task"


def _add(parent: Element, name: str, texts: Mapping[str, str]) -> Element:
    child = ElementTree.SubElement(parent, name)
    for tag, text in texts.items():
        ElementTree.SubElement(child, tag).text = text
    return child


def install_task(command: Sequence[str], xml_file: Path) -> None:
    """Register the logon task; its definition is left at `xml_file`. Raises SystemRefused."""
    program, *words = command
    user = os.environ.get("USERNAME", "")
    domain = os.environ.get("USERDOMAIN", "")
    text = task_xml(
        program,
        subprocess.list2cmdline(words),
        str(xml_file.parent),
        f"{domain}\\{user}" if domain else user,
    )
    xml_file.write_text(text, encoding="utf-16")
    _schtasks("/create", "/tn", TASK_NAME, "/xml", str(xml_file), "/f")


def remove_task() -> None:
    """Raises SystemRefused."""
    _schtasks("/delete", "/tn", TASK_NAME, "/f")


def task_status() -> str:
    """What the Task Scheduler says of it. Raises SystemRefused."""
    return _schtasks("/query", "/tn", TASK_NAME, "/fo", "list").strip()


def _schtasks(*words: str) -> str:
    try:
        done = subprocess.run(
            ["schtasks", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise SystemRefused(f"schtasks cannot be run: {exc}") from exc
    if done.returncode:
        words_of_windows = (done.stderr or done.stdout).strip()
        raise SystemRefused(f"{words_of_windows or 'schtasks failed'} (exit {done.returncode})")
    return done.stdout


def speak_utf8() -> None:
    """What is printed is UTF-8, whatever the console's code page."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
