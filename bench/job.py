"""The sweep as a job that nobody watches: what a scheduled task runs on the machine itself.

    llama-sidecar.exe bench-run plan.json --out results.jsonl     a sweep, as bench.mtp_sweep
    llama-sidecar.exe bench-run --job FOLDER                      the one that FOLDER describes
    llama-sidecar.exe bench-run --task-xml FOLDER                 write its task's definition
    llama-sidecar.exe bench-run --put-back FOLDER                 load again what made room
    llama-sidecar.exe bench-run --look FOLDER                     what this machine is like

FOLDER holds job.json and plan.json. The job writes results.jsonl, log.txt and, every few
seconds, state.json, which is the truth on it: whether it runs, how far it is, how it ended,
what it unloaded. Its `beat` counts up while it lives. A file `stop` ends it.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import ctypes
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import winsvc
from bench import journal, mtp_sweep, room

BEAT_S = 3.0
DISTURBED_MOST = 50  # of these notes are kept
LOOK_FOR_OTHERS_S = 30.0
INTERRUPTED = 130

STATE, JOB, PLAN, RESULTS, LOG, STOP = (
    "state.json",
    "job.json",
    "plan.json",
    "results.jsonl",
    "log.txt",
    "stop",
)
TASK = "task.xml"
LOOK = "look.json"

STARTING, RUNNING, DONE, FAILED, STOPPED = "starting", "running", "done", "failed", "stopped"
ENDED = (DONE, FAILED, STOPPED)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in _VERBS and words[0] not in ("-h", "--help"):
        return mtp_sweep.main(words)
    options = _parser().parse_args(words)
    for name, work in _VERBS.items():
        folder = getattr(options, name.removeprefix("--").replace("-", "_"))
        if folder is not None:
            try:
                return work(folder.absolute())
            except (OSError, ValueError, KeyError) as exc:
                print(f"bench-run {name}: {type(exc).__name__}: {exc}", file=sys.stderr)
                return 1
    _parser().print_usage(sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench-run",
        description="With a plan: a sweep, with the options of bench.mtp_sweep. Else one of:",
    )
    parser.add_argument("--job", type=Path, metavar="FOLDER", help="run the job described there")
    parser.add_argument(
        "--task-xml", type=Path, metavar="FOLDER", help="write the definition of its task"
    )
    parser.add_argument(
        "--put-back", type=Path, metavar="FOLDER", help="load again what it unloaded"
    )
    parser.add_argument(
        "--look", type=Path, metavar="FOLDER", help="write what this machine is like"
    )
    return parser


# --- the state


class State:
    """state.json, written whole each time. Its lock guards the values and the writing."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / STATE
        self._lock = threading.Lock()
        before = read_state(folder) or {}
        self.values: dict[str, Any] = {
            "state": STARTING,
            "beat": int(before.get("beat", 0)),
            "starts": int(before.get("starts", 0)) + 1,
            "pid": os.getpid(),
            "began": _now(),
            "done": int(before.get("done", 0)),
            "total": int(before.get("total", 0)),
            "said": "",
            "tok_s": None,
            "eta_s": None,
            "unloaded": list(before.get("unloaded", [])),
            "disturbed": list(before.get("disturbed", [])),
            "exit_code": None,
            "error": "",
        }

    def set(self, **values: Any) -> None:
        """Write it. Raises OSError."""
        with self._lock:
            self.values |= values
            self.values["beat"] += 1
            self.values["time"] = _now()
            journal.write_whole(self._file, journal.as_line(self.values))


def read_state(folder: Path) -> dict[str, Any] | None:
    """The last state that was written; None if there is none, or it is not whole."""
    return parsed_state(_bytes(folder / STATE))


def parsed_state(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "state" in value else None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# --- the job


def run_job(folder: Path) -> int:
    """Raises OSError, or ValueError if job.json is none."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    os.chdir(folder)
    with _only_one(folder) as is_mine:
        if not is_mine:
            return 0  # another start of the task, while the first is at work
        before = read_state(folder) or {}
        is_over = before.get("state") == DONE and all(o["back"] for o in before["unloaded"])
        if is_over or (folder / STOP).exists():
            return 0  # as at each start of Windows, until the task is deleted
        with _logged(folder / LOG):
            return _Job(folder, job).run()


class _Job:
    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self._folder = folder
        self._job = job
        self._state = State(folder)
        self._ended = threading.Event()
        self._tail = _Tail(self._state)

    def run(self) -> int:
        """0 after a whole sweep; the state says the same."""
        self._state.set()
        winsvc.contain_children()
        stay_awake()
        beating = winsvc.start_thread("heartbeat", self._beat)
        code, error = 1, ""
        faults: list[str] = []
        try:
            try:
                self._make_room()
                code = self._sweep()
                error = "" if not code else self._tail.last_error
            finally:
                faults = room.put_back(self._state.values["unloaded"], self._say)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except room.RoomError as exc:
            error = f"no room: {exc}"
        except Exception as exc:  # noqa: BLE001 - the state is how anybody hears of it
            traceback.print_exc()
            error = f"{type(exc).__name__}: {exc}"
        self._ended.set()
        beating.join(BEAT_S * 2)
        for fault in faults:
            print(fault, file=sys.stderr)
        ended = DONE if not code else STOPPED if code == INTERRUPTED else FAILED
        self._state.set(state=ended, exit_code=code, error=error or "; ".join(faults))
        return code

    def _make_room(self) -> None:
        """Note what is loaded before it goes: a crash in between is put right by the next start.

        Raises RoomError or OSError.
        """
        sidecar, swap = self._job.get("sidecar", ""), self._job.get("llama_swap", "")
        known = [one for one in self._state.values["unloaded"] if not one["back"]]
        names = {(one["url"], one["model"], one.get("hash")) for one in known}
        now = room.loaded(sidecar, swap)
        more = [one for one in now if (one["url"], one["model"], one.get("hash")) not in names]
        self._state.set(unloaded=known + more, said="making room")
        room.make(sidecar, swap, self._say)

    def _sweep(self) -> int:
        self._state.set(state=RUNNING)
        words = [PLAN, "--out", RESULTS, "--json", *self._job.get("options", [])]
        with contextlib.redirect_stdout(self._tail):
            return mtp_sweep.main(words)

    def _say(self, words: str) -> None:
        print(f"{_now()} {words}", file=sys.stderr, flush=True)
        self._state.set(said=words)

    def _beat(self) -> None:
        """Until the end: show that the job lives, look whether it is to stop, or is disturbed."""
        looked = time.monotonic()
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the next beat may be luckier
                self._state.set()
            if (self._folder / STOP).exists():
                _thread.interrupt_main(signal.SIGINT)
                return
            if self._state.values["state"] == RUNNING and (
                time.monotonic() - looked > LOOK_FOR_OTHERS_S
            ):
                looked = time.monotonic()
                self._look_for_others()

    def _look_for_others(self) -> None:
        """A model that somebody had loaded meanwhile makes the numbers doubtful: note it."""
        with contextlib.suppress(room.RoomError, OSError):
            now = room.loaded(self._job.get("sidecar", ""), self._job.get("llama_swap", ""))
            notes = self._state.values["disturbed"]
            cell = self._state.values["said"]
            notes += [f"{_now()} {o['by']} had loaded {o['model']} at {cell}" for o in now]
            self._state.set(disturbed=notes[:DISTURBED_MOST])


class _Tail:
    """What a sweep with --json prints: lines of progress, for the state."""

    encoding = "utf-8"

    def __init__(self, state: State) -> None:
        self._state = state
        self._line = ""

    @property
    def last_error(self) -> str:
        return last_line(Path(LOG))

    def write(self, text: str) -> int:
        self._line += text
        while "\n" in self._line:
            line, _, self._line = self._line.partition("\n")
            self._take(line)
        return len(text)

    def flush(self) -> None:
        """Each line is taken when it is whole."""

    def isatty(self) -> bool:
        return False

    def _take(self, line: str) -> None:
        try:
            told = json.loads(line)
        except ValueError:
            print(line, file=sys.stderr)
            return
        names = ("done", "total", "said", "tok_s", "eta_s")
        with contextlib.suppress(OSError):
            self._state.set(**{name: told[name] for name in names if name in told})


def last_line(file: Path) -> str:
    lines = _bytes(file).decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder for itself."""
    try:
        with journal.locked(folder / STATE):
            yield True
    except journal.JournalError:
        yield False


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """All that this process prints goes to a file: a task has no window."""
    before = sys.stdout, sys.stderr
    with file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as log:
        sys.stdout = sys.stderr = log
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def put_back(folder: Path) -> int:
    """For a job that was ended too hard to do it itself. Raises OSError."""
    state = read_state(folder)
    if state is None:
        return 0
    with _only_one(folder) as is_mine:
        if not is_mine:
            print("the job runs: it will put things back itself", file=sys.stderr)
            return 1
        faults = room.put_back(state["unloaded"], print)
        journal.write_whole(folder / STATE, journal.as_line(state))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if sys.platform == "win32":

    def stay_awake() -> None:
        """Keep Windows from going to sleep while this thread lives; nobody has to touch a key."""
        if not ctypes.windll.kernel32.SetThreadExecutionState(_CONTINUOUS | _SYSTEM_REQUIRED):
            print("Windows may go to sleep: it does not want to be kept awake", file=sys.stderr)

    _CONTINUOUS = 0x80000000  # winnt.h
    _SYSTEM_REQUIRED = 1
else:

    def stay_awake() -> None:
        """Elsewhere that is for who starts it."""


# --- the task


def own_command(*words: str) -> list[str]:
    """How this program is started with other words."""
    if getattr(sys, "frozen", False):
        return [sys.executable, "bench-run", *words]
    return [sys.executable, str(Path(__file__).absolute().parent.parent), *words]


def write_task_xml(folder: Path) -> int:
    """FOLDER/task.xml for schtasks /create. Raises OSError."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    program, *words = own_command(str(job.get("verb", "--job")), str(folder))
    domain, user = os.environ.get("USERDOMAIN", ""), os.environ.get("USERNAME", "")
    text = winsvc.unattended_task_xml(
        program,
        subprocess.list2cmdline(words),
        str(folder),
        f"{domain}\\{user}" if domain else user,
        is_system=not job.get("as_user"),
        is_at_boot=job.get("verb", "--job") == "--job",
    )
    (folder / TASK).write_text(text, encoding="utf-16")
    return 0


def write_look(folder: Path) -> int:
    """FOLDER/look.json. Raises OSError."""
    from bench import look

    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    seen = look.seen(job, folder / PLAN, folder)
    journal.write_whole(folder / LOOK, journal.as_line(seen))
    return 0


_VERBS = {
    "--job": run_job,
    "--task-xml": write_task_xml,
    "--put-back": put_back,
    "--look": write_look,
}

if __name__ == "__main__":
    sys.exit(main())
