"""Runs one program of a model's and asks it what a check wants to know. A script, no module.

`eval/execution.py` starts the keeper, and the keeper starts the program, each in a fresh
interpreter. The check runs in the keeper: what it calls travels to the program, which sends
back plain data. So the program holds no frame, no object and no name of the check, and can
do nothing to be right but answer rightly. The keeper tells how it went with a token that it
is given only after the check has returned.

The keeper also watches the program and ends it and all that it started. On Linux these live
in a PID namespace of their own, if the system lets the user make one: then they cannot even
name a process outside, and end with the program at once. Where it does not, the keeper
looks for them in /proc as the one that inherits every orphan.

None of this is a security boundary.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

FLAGS = ("-I", "-S", "-B", "-X", "utf8")  # alone with the standard library; prints anything
START_S = 60.0  # for an interpreter to start on a machine that has much to do
WATCH_EVERY_S = 0.05
ENDING_S = 10.0
MOST_PROCESSES = 16
MOST_FILE_BYTES = 16 << 20
MOST_FOLDER_BYTES = 64 << 20
MOST_FILES = 1000
MOST_OPEN_FILES = 128
MOST_MESSAGE_BYTES = 16 << 20
MOST_ITEMS = 100_000
MOST_DETAIL_CHARS = 500

Message = dict[str, Any]


# --- plain data as JSON: lists as they are, everything that JSON lacks as {kind: content}


class Opaque:
    """What is no plain data: true, and equal to nothing."""


def encoded(value: Any) -> Any:
    """Raises ValueError for what is too long, RecursionError for what is too deep.

    Subclasses become their plain kind: a Counter is equal to its dict there too.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}  # JSON's digits have a limit
    for plain in (str, float):
        if isinstance(value, plain):
            return plain(value)
    for kind, (plain_type, spelt, _) in KINDS.items():
        if isinstance(value, plain_type):
            return {kind: spelt(value)}
    for name, module in NUMBERS.items():
        number_type = getattr(sys.modules.get(module), name, None)
        if number_type and isinstance(value, number_type):
            return {name: str(value)}
    if isinstance(value, list):
        return _items(value)
    return {"iterator": _items(value)} if isinstance(value, Iterable) else {"opaque": ""}


def decoded(value: Any) -> Any:
    """Raises ValueError, TypeError or KeyError for what `encoded` does not say."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "int":
        return int(content, 16)
    if kind == "opaque":
        return Opaque()
    if kind == "iterator":
        return iter(decoded(content))
    if kind in NUMBERS:
        return getattr(importlib.import_module(NUMBERS[kind]), kind)(content)
    return KINDS[kind][2](content)


def _items(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if len(found) == MOST_ITEMS:
            raise ValueError(f"more than {MOST_ITEMS} items")
        found.append(encoded(value))
    return found


KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, _items, lambda items: tuple(map(decoded, items))),
    "dict": (
        dict,
        lambda value: [[encoded(key), encoded(of_key)] for key, of_key in value.items()],
        lambda pairs: {decoded(key): decoded(of_key) for key, of_key in pairs},
    ),
    "set": (set, _items, lambda items: set(map(decoded, items))),
    "frozenset": (frozenset, _items, lambda items: frozenset(map(decoded, items))),
    "deque": (collections.deque, _items, lambda items: collections.deque(map(decoded, items))),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, lambda value: [value.real, value.imag], lambda both: complex(*both)),
}
NUMBERS = {"Decimal": "decimal", "Fraction": "fractions"}  # imported only by who needs them


def send(stream: IO[bytes], message: Mapping[str, Any]) -> None:
    """One line of ASCII. Raises OSError."""
    stream.write(json.dumps(message).encode("ascii") + b"\n")
    stream.flush()


def receive(stream: IO[bytes]) -> Message:
    """The next message. Raises EOFError if there comes none, ValueError if it is none."""
    line = stream.readline(MOST_MESSAGE_BYTES)
    if not line:
        raise EOFError
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("no message")  # noqa: TRY004 - nobody called this wrongly
    return message


def in_words(exc: BaseException) -> str:
    """Its kind and its text, without addresses: the same in every run."""
    text = re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", str(exc))
    return f"{type(exc).__name__}: {text}"[:MOST_DETAIL_CHARS].rstrip(": ")


# --- the program's interpreter


def be_program() -> int:
    """Load the program, then answer calls of its function until nobody asks any more."""
    asked, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    send(told, {"ready": True})
    job = receive(asked)
    module = types.ModuleType("program")  # not __main__: its demonstrations are not wanted
    sys.modules["program"] = module
    own_pid = os.getpid()
    try:
        exec(compile(job["program"], "<program>", "exec"), module.__dict__)
        function = module.__dict__[job["entry_point"]]
    except BaseException as exc:  # noqa: BLE001 - a model's code may raise anything
        send(told, {"raised": in_words(exc)})
        return 1
    answer: Message = {"loaded": True}
    while os.getpid() == own_pid:  # else a child of its own has come back from its code
        send(told, answer)
        try:
            call = receive(asked)
        except EOFError:
            return 0
        answer = _answer(function, call)
    return 1


def _answer(function: Callable[..., Any], call: Message) -> Message:
    try:
        value = function(*decoded(call["args"]), **decoded(call["named"]))
    except BaseException as exc:  # noqa: BLE001 - a model's code may raise anything
        return {"raised": in_words(exc)}
    try:
        return {"value": encoded(value)}
    except BaseException as exc:  # noqa: BLE001 - also what it returned may be code of its own
        return {"raised": f"what it returned cannot be told: {in_words(exc)}"}


# --- the keeper


class ProgramFailed(BaseException):
    """Not an Exception: no check may take it for the program's own."""


class ProgramRaised(Exception):
    """What the program's function raised."""


class Keeper:
    """One program and the check of it. The threads only put into `_heard` and set `_ended_for`."""

    def __init__(self, job: Message) -> None:
        self._job = job
        self._deadline = time.monotonic() + START_S
        self._heard: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._ended_for = ""
        self._is_over = threading.Event()
        self._begun = time.monotonic()
        self._process = _started_apart(job)

    def result(self) -> Message:
        """What is to be told. Blocks for START_S and the job's time at most."""
        _start_thread(self._listen)
        _start_thread(self._watch)
        outcome, detail, own = "error", "", frozenset[int]()
        try:
            self._expect("ready")
            own = processes_below()
            outcome = "failed"
            self._begun = time.monotonic()
            self._deadline = self._begun + self._job["timeout_s"]
            self._ask({name: self._job[name] for name in ("program", "entry_point")})
            self._expect("loaded")
            self._check()
            outcome = "passed"
        except ProgramFailed as exc:
            detail = str(exc)
        except ProgramRaised as exc:
            detail = str(exc)
        except AssertionError as exc:
            detail = f"an assertion of the check failed: {exc}".rstrip(": ")
        except Exception as exc:  # noqa: BLE001 - of the check, at what the program answered
            detail = f"the check failed: {in_words(exc)}"
        if outcome == "passed" and processes_below() != own:
            outcome, detail = "failed", LEFT_A_PROCESS
        wall_s = time.monotonic() - self._begun
        if self._ended_for and outcome != "error":
            outcome = "timeout" if self._ended_for == TIMED_OUT else "failed"
            detail = self._ended_for
        return {"outcome": outcome, "detail": detail[:MOST_DETAIL_CHARS], "wall_s": wall_s}

    def end(self) -> None:
        """End the program and all that it has started. Blocks for ENDING_S at most."""
        self._is_over.set()
        with contextlib.suppress(OSError):
            self._process.kill()
        end_others()

    def _check(self) -> None:
        names: dict[str, Any] = {"__name__": "check", self._job["entry_point"]: self._call}
        exec(compile(self._job["check"], "<check>", "exec"), names)

    def _call(self, *args: Any, **named: Any) -> Any:
        self._ask({"args": encoded(list(args)), "named": encoded(named)})
        answer = self._next()
        if "raised" in answer:
            raise ProgramRaised(str(answer["raised"]))
        try:
            return decoded(answer["value"])
        except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as exc:
            raise ProgramFailed("its answer makes no sense") from exc

    def _ask(self, message: Message) -> None:
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, message)
        except OSError:
            raise ProgramFailed(self._how_it_ended()) from None

    def _expect(self, word: str) -> None:
        answer = self._next()
        if word not in answer:
            raise ProgramFailed(str(answer.get("raised", f"it is not {word}")))

    def _next(self) -> Message:
        """Raises ProgramFailed once the program has ended, or the time is over."""
        while True:
            try:
                answer = self._heard.get(timeout=WATCH_EVERY_S)
            except queue.Empty:
                answer = None
            if answer is not None:
                return answer
            # Its pipe may be held by a child that it left: only its end is certain.
            if self._process.poll() is not None and self._heard.empty():
                raise ProgramFailed(self._how_it_ended())

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1)
            return f"it ended before the check did (exit {code if code >= 0 else 128 - code})"
        return "it does not listen any more"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(EOFError, OSError):
            while True:
                try:
                    self._heard.put(receive(self._process.stdout))
                except (ValueError, RecursionError):
                    self._heard.put({"raised": "its answer makes no sense"})
                    return

    def _watch(self) -> None:
        """Until it is over, or the program takes more than it may; then end that."""
        while not self._is_over.wait(WATCH_EVERY_S):
            self._ended_for = self._excess()
            if self._ended_for:
                with contextlib.suppress(OSError):
                    self._process.kill()
                end_others()
                return

    def _excess(self) -> str:
        if time.monotonic() > self._deadline:
            return TIMED_OUT
        return process_excess(self._job["memory_bytes"]) or folder_excess(self._job["folder"])


TIMED_OUT = "it took too long"
LEFT_A_PROCESS = "it left a process running"


def folder_excess(folder: str) -> str:
    """What of this folder is more than a program may fill; empty if nothing is."""
    files, size, unseen = 0, 0, [folder]
    while unseen:
        with contextlib.suppress(OSError), os.scandir(unseen.pop()) as entries:
            for entry in entries:
                files += 1
                if files > MOST_FILES:
                    return f"it made more than {MOST_FILES} files"
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_size
                    if entry.is_dir(follow_symlinks=False):
                        unseen.append(entry.path)
    return f"it wrote more than {MOST_FOLDER_BYTES >> 20} MiB" if size > MOST_FOLDER_BYTES else ""


def be_keeper() -> int:
    """One job from standard input; ends as soon as that does, with all that the program left."""
    asked, told = sys.stdin.buffer, sys.stdout.buffer
    job = receive(asked)
    become_keeper()
    send(told, {"begun": True})
    messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    keeper = Keeper(job)

    def listen() -> None:
        with contextlib.suppress(EOFError, ValueError, OSError):
            while True:
                messages.put(receive(asked))
        keeper.end()  # who asked has gone, perhaps in the midst of the check
        messages.put(None)

    try:
        _start_thread(listen)
        result = keeper.result()
        send(told, {"checked": True})
        answer = messages.get()
        if answer:
            send(told, {**result, "token": answer["token"]})
            messages.get()
    finally:
        keeper.end()
        with contextlib.suppress(OSError):
            Path(job["folder"]).rmdir()  # who asked may be dead; a full one is left to them
    return 0


def _start_thread(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()


if sys.platform == "win32":

    def become_keeper() -> None:
        """The job object around this process does it all."""

    def _started_apart(job: Message) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *FLAGS, __file__, "program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=job["folder"],
            creationflags=subprocess.DETACHED_PROCESS,
        )

    def process_excess(memory_bytes: int) -> str:
        """The job object sees to it."""
        return ""

    def processes_below() -> frozenset[int]:
        """Who holds the job object counts what is inside."""
        return frozenset()

    def end_others() -> None:
        """The job ends them when its handle is closed."""

else:
    import resource

    _PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4  # linux/prctl.h
    _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
    _NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000

    def become_keeper() -> None:
        """Let nobody look into this process, and inherit what the program leaves."""
        if sys.platform == "linux":
            prctl = ctypes.CDLL(None).prctl
            prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
            prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def _started_apart(job: Message) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *FLAGS, __file__, "program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=job["folder"],
            env={},
            start_new_session=True,
            preexec_fn=_limits(job),  # noqa: PLW1509 - no thread runs yet
        )

    def _limits(job: Message) -> Callable[[], None]:
        """To be called after the fork; everything is looked up before it."""
        cpu_s = int(job["timeout_s"]) + 2
        wanted = {
            resource.RLIMIT_CPU: cpu_s,
            resource.RLIMIT_AS: job["memory_bytes"],
            resource.RLIMIT_FSIZE: MOST_FILE_BYTES,
            resource.RLIMIT_NOFILE: MOST_OPEN_FILES,
            resource.RLIMIT_CORE: 0,
            # For the superuser the system knows no such limit: `process_excess` must do.
            resource.RLIMIT_NPROC: _tasks_of_user() + MOST_PROCESSES,
        }
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        apart = _NEW_USER | _NEW_PID | _NEW_NET | _NEW_IPC  # all of it, or nothing

        def after_fork() -> None:
            if libc and job["is_apart"] and libc.unshare(apart) == 0:
                _leave_to_first_process()
            for what, most in wanted.items():
                _, hard = resource.getrlimit(what)
                limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.setrlimit(what, (limit, limit))
            if libc:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

        return after_fork

    def _leave_to_first_process() -> None:
        """Go on as the first process of the new namespace, with whom all others there end.

        What has been stays outside only to hand its exit code on.
        """
        first = os.fork()
        if first:
            os.closerange(0, os.sysconf("SC_OPEN_MAX"))
            _, status = os.waitpid(first, 0)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)

    def _tasks_of_user() -> int:
        """How many threads of all processes this user has."""
        count = 0
        for task in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if task.stat().st_uid == os.getuid():
                    count += sum(1 for _ in (task / "task").iterdir())
        return count

    class _Process(NamedTuple):  # a dataclass takes as long to import as Python to start
        pid: int
        parent: int
        group: int
        memory_bytes: int
        has_ended: bool  # but nobody has asked how

    def _processes() -> Iterator[_Process]:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        for name in os.listdir("/proc"):  # noqa: PTH208 - there may be thousands
            if not name.isdigit():
                continue
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            state, parent, group = fields[0], int(fields[1]), int(fields[2])
            memory_bytes = int(fields[21]) * page_bytes  # field 24 of proc_pid_stat(5)
            yield _Process(int(name), parent, group, memory_bytes, state in b"ZX")

    def _descendants() -> list[_Process]:
        """Each process below this one that has not ended."""
        children: dict[int, list[_Process]] = {}
        for process in _processes():
            children.setdefault(process.parent, []).append(process)
        below, unseen = [], [os.getpid()]
        while unseen:
            found = children.get(unseen.pop(), [])
            below += found
            unseen += [process.pid for process in found]
        return [process for process in below if not process.has_ended]

    def process_excess(memory_bytes: int) -> str:
        """What of the processes below this one is more than they may take; empty if nothing is."""
        found = _descendants()
        if len(found) > MOST_PROCESSES:
            return f"it started more than {MOST_PROCESSES} processes"
        is_too_much = sum(process.memory_bytes for process in found) > memory_bytes
        return f"it took more than {memory_bytes >> 20} MiB of memory" if is_too_much else ""

    def processes_below() -> frozenset[int]:
        """All that live below this process, by their numbers."""
        return frozenset(process.pid for process in _descendants())

    def end_others() -> None:
        """Kill all below this process until nothing is left. Blocks for ENDING_S at most.

        No list can show that: what forks and leaves at once is in none of them. But an
        orphan becomes a child of this process, so where no child is, nothing is.
        """
        deadline = time.monotonic() + ENDING_S
        for turn in itertools.count():
            if not _has_children() or time.monotonic() > deadline:
                return
            for pid in _children():
                _kill(pid, pid)
            if turn % 10 == 0:
                for process in _descendants():
                    _kill(process.pid, process.group)

    def _has_children() -> bool:
        """Whether there is any, once those that have ended are buried."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return True

    def _children() -> list[int]:
        """Those of this process itself, found fast; empty if this system does not tell."""
        found: list[int] = []
        for file in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, file.read_text().split())
        return found

    def _kill(pid: int, group: int) -> None:
        """It and its group, all of that at once so that none has time to fork."""
        if group != os.getpgrp():
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit({"keeper": be_keeper, "program": be_program}[sys.argv[1]]())
