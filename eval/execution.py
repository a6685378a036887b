"""Runs programs that a model wrote, each in a fresh interpreter with limits; see keeper.py.

This is no security boundary. It stops accidents and the usual tricks; a program that is
out for harm has all the rights of the user who runs it wherever the system grants no
namespace, and can read that user's files in any case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from eval import keeper

RUNNER_VERSION = 1  # raised with every change that may change a verdict
TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
LINGER_S = 2.0
ENDING_S = keeper.ENDING_S + 5.0
KEEPER = Path(keeper.__file__).resolve()
CHECK_MARK = "# --- the check, which runs apart from all above; of "

Outcome = Literal["passed", "failed", "timeout", "error"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a program. "error" says that it was not judged, and why in `detail`."""

    outcome: Outcome
    detail: str
    wall_s: float  # from the program's first line to the end of the check


def with_check(solution: str, check: str, entry_point: str) -> str:
    """One program, whole and readable, that `run_program` can part again."""
    return f"{solution.rstrip()}\n\n\n{CHECK_MARK}{entry_point}\n{check}"


def run_program(
    program: str,
    *,
    timeout_s: float = TIMEOUT_S,
    memory_bytes: int = MEMORY_BYTES,
    is_apart: bool = True,
) -> Verdict:
    """Judge what `with_check` made: "passed" if its check returned without a complaint.

    Blocks for `timeout_s`, and for the start and the end of two interpreters. Without
    `is_apart` no namespace is made. Raises ValueError if the program has no check.
    """
    solution, mark, rest = program.rpartition(CHECK_MARK)
    if not mark:
        raise ValueError("the program has no check")
    entry_point, _, check = rest.partition("\n")
    if getattr(sys, "frozen", False):
        return _unjudged("code runs in a Python of its own, and this program brings none along")
    folder = tempfile.mkdtemp(prefix="eval-")
    job = {
        "program": solution,
        "check": check,
        "entry_point": entry_point,
        "timeout_s": timeout_s,
        "memory_bytes": memory_bytes,
        "folder": folder,
        "is_apart": is_apart,
    }
    try:
        return _judged(job)
    except OSError as exc:
        return _unjudged(f"no Python can be started: {exc}")
    finally:
        _remove(folder)


def _judged(job: keeper.Message) -> Verdict:
    process = subprocess.Popen(
        [_python(), *keeper.FLAGS, str(KEEPER), "keeper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(),
        **_apart(),
    )
    try:
        with _contained(process, job["memory_bytes"]) as has_others:
            return _Conversation(process, has_others).verdict(job)
    finally:
        process.kill()
        process.wait()


class _Conversation:
    """What is said to a keeper, and what it answers."""

    def __init__(self, process: subprocess.Popen[bytes], has_others: Callable[[], bool]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._has_others = has_others
        self._asked, self._told = process.stdin, process.stdout
        self._heard: queue.SimpleQueue[keeper.Message | None] = queue.SimpleQueue()
        self._last_said = ""
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def verdict(self, job: keeper.Message) -> Verdict:
        """Blocks until the keeper and all that it watches over have ended. Raises OSError."""
        self._listener.start()
        try:
            return self._asked_for_verdict(job)
        finally:
            with contextlib.suppress(OSError):
                self._asked.close()  # for the keeper that is the end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_S)
            self._process.kill()
            self._listener.join(ENDING_S)

    def _asked_for_verdict(self, job: keeper.Message) -> Verdict:
        self._say(job)
        if not self._next("begun", keeper.START_S):
            return _unjudged(f"no keeper: {self._last_said}".rstrip(": "))
        if not self._next("checked", keeper.START_S + job["timeout_s"] + ENDING_S):
            return _ended_from_within(job)
        is_alone = not self._has_others()
        token = secrets.token_hex(16)  # made only now: nobody below can know it before
        self._say({"token": token})
        result = self._next("token", ENDING_S)
        if not result or result["token"] != token:
            return _ended_from_within(job)
        if result["outcome"] == "passed" and not is_alone:
            return Verdict("failed", keeper.LEFT_A_PROCESS, result["wall_s"])
        return Verdict(result["outcome"], result["detail"], result["wall_s"])

    def _say(self, message: keeper.Message) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            keeper.send(self._asked, message)

    def _next(self, word: str, timeout_s: float) -> keeper.Message | None:
        """The next message, if it has this word; None too if none comes in time."""
        try:
            message = self._heard.get(timeout=timeout_s)
        except queue.Empty:
            return None
        return message if message and word in message else None

    def _listen(self) -> None:
        with self._told:
            while line := self._told.readline(keeper.MOST_MESSAGE_BYTES):
                try:
                    message = json.loads(line)
                except ValueError:
                    self._last_said = line.decode(errors="replace").strip()[:500]
                    continue
                self._heard.put(message)
        self._heard.put(None)


def _unjudged(why: str) -> Verdict:
    return Verdict("error", why, 0.0)


def _ended_from_within(job: keeper.Message) -> Verdict:
    return Verdict("failed", "its keeper was ended, or did not answer", job["timeout_s"])


def _python() -> str:
    """The interpreter itself: what lies in a virtual environment on Windows only starts it."""
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def _remove(folder: str) -> None:
    """Also what is nested too deep for Python's own way, or locked; no error if it stays."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass  # the keeper has done so
    except (OSError, RecursionError):
        if sys.platform != "win32":
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, "--", folder], capture_output=True, check=False)


if sys.platform == "win32":
    import winsvc

    def _environment() -> dict[str, str]:
        """No Python starts there without this one variable."""
        return {"SYSTEMROOT": os.environ.get("SYSTEMROOT", r"C:\Windows")}

    def _apart() -> dict[str, Any]:
        return {"creationflags": subprocess.DETACHED_PROCESS}

    def _has_others(job: winsvc.LimitedJob) -> bool:
        """Blocks for a moment: a program that ended just now is counted, and its console."""
        deadline = time.monotonic() + LINGER_S
        while job.active_processes() > 2:
            if time.monotonic() > deadline:
                return True
            time.sleep(0.05)
        return False

    @contextlib.contextmanager
    def _contained(
        process: subprocess.Popen[bytes], memory_bytes: int
    ) -> Iterator[Callable[[], bool]]:
        """End all with this context, and tell whether others run than keeper and program.

        The keeper waits for its job to be sent, so all that it starts is inside.
        """
        job = winsvc.LimitedJob(memory_bytes, keeper.MOST_PROCESSES)
        try:
            job.add(process)
            yield lambda: _has_others(job)
        finally:
            job.close()

else:

    def _environment() -> dict[str, str]:
        return {}

    def _apart() -> dict[str, Any]:
        return {"start_new_session": True}  # Ctrl-C is for us

    @contextlib.contextmanager
    def _contained(
        process: subprocess.Popen[bytes], memory_bytes: int
    ) -> Iterator[Callable[[], bool]]:
        """The keeper sees to it."""
        yield lambda: False
