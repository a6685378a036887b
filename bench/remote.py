"""A sweep on a Windows machine, started over SSH and watched from here.

    python -m bench.remote --host sam-desktop plan.json

The runner and the plan are copied below the home folder of the account, and a scheduled task
is made that runs them at normal priority and without a time limit. Then no connection is held:
the job's state and its new results are fetched every now and then. Said again, whatever
happened meanwhile, the command finds the job that runs, or starts it again where it was, or
fetches what it left. In the end the task is deleted and the report is written.

The job itself asks llama-sidecar and llama-swap on its machine to unload, notes what they had,
and has it loaded again; if it was ended too hard for that, it is done from here.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench import job, journal, report
from bench.progress import Progress
from bench.ssh import Host, HostError, Unreachable

ROOT = Path(__file__).resolve().parent.parent
EXE = ROOT / "dist" / "llama-sidecar.exe"
BASE = "llama-sidecar-bench"  # below the home folder on the host
SIDECAR, SWAP = "http://127.0.0.1:8402", "http://127.0.0.1:8080"
SOURCES = ("winsvc.py", "validator.py", "flags.json")
MAIN = "import sys\n\nfrom bench.job import main\n\nsys.exit(main())\n"

POLL_FIRST_S, POLL_MOST_S = 2.0, 30.0
RETRY_FIRST_S, RETRY_MOST_S = 2.0, 120.0
BACKOFF = 1.5
SILENT_S = 90.0  # longer than Windows takes to start a task and a program that it never saw
RESTARTS = 5
GIVE_UP_H = 72.0
PUT_BACK_S = 1800.0
RUNNING_RESULT = "267009"  # SCHED_S_TASK_RUNNING, a number in every language of Windows

T = TypeVar("T")


class JobFailed(Exception):
    """In words."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to run, and where on the host: the same plan always gives the same folder."""

    plan: Path
    exe: Path | None  # None: sources, run by `python` on the host
    python: str
    settings: Mapping[str, Any]  # job.json

    @property
    def name(self) -> str:
        data = self.plan.read_bytes()
        slug = re.sub(r"[^a-z0-9]+", "-", self.plan.stem.lower()).strip("-")[:30] or "plan"
        return f"{slug}-{hashlib.sha256(data).hexdigest()[:8]}"

    @property
    def folder(self) -> str:
        return f"{BASE}/{self.name}"

    @property
    def task(self) -> str:
        return f"\\llama-sidecar-{self.name}"

    def command(self, verb: str) -> list[str]:
        """The runner on the host, on the job's folder."""
        there = self.folder.replace("/", "\\")
        if self.exe is None:
            return [self.python, there, verb, there]
        return [f"{there}\\llama-sidecar.exe", "bench-run", verb, there]


class Remote:
    """One job on one host. Every method blocks, and raises Unreachable or HostError."""

    def __init__(self, host: Host, wanted: Wanted, out: Path) -> None:
        self.host = host
        self.wanted = wanted
        self.results = out / f"{wanted.name}.jsonl"
        self.log = out / f"{wanted.name}.log.txt"

    # --- what is there

    def state(self) -> dict[str, Any] | None:
        """The job's state, with its new results fetched too; None if it has none yet."""
        _end_at_a_line(self.results)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            file = Path(folder) / job.STATE
            there = f"{self.wanted.folder}/{job.STATE}"
            self.host.get_more(f"{self.wanted.folder}/{job.RESULTS}", self.results, [(there, file)])
            _end_at_a_line(self.results)
            return job.read_state(Path(folder))

    def is_task_running(self) -> bool:
        """By the number that schtasks has for it; False too if there is no task."""
        words = ["/query", "/tn", self.wanted.task, "/fo", "csv", "/v", "/nh"]
        said = self.host.run("schtasks", *words).stdout.decode("utf-8", "replace")
        return f'"{RUNNING_RESULT}"' in said

    # --- what is done

    def prepare(self) -> None:
        """Copy the runner and the plan, and make the task."""
        self.prepare_files()
        self.host.checked(*self.wanted.command("--task-xml"))
        self.create_task()

    def prepare_files(self) -> None:
        folder = self.wanted.folder
        with tempfile.TemporaryDirectory(prefix="bench-") as made:
            settings = Path(made) / job.JOB
            settings.write_bytes(journal.as_line(self.wanted.settings))
            main = Path(made) / "__main__.py"
            main.write_text(MAIN, encoding="utf-8")
            files = [(settings, f"{folder}/{job.JOB}"), (self.wanted.plan, f"{folder}/{job.PLAN}")]
            if self.wanted.exe is not None:
                files.append((self.wanted.exe, f"{folder}/llama-sidecar.exe"))
            else:
                files.append((main, f"{folder}/__main__.py"))
                files += [(ROOT / name, f"{folder}/{name}") for name in SOURCES]
                sources = sorted((ROOT / "bench").glob("*.py"))
                files += [(file, f"{folder}/bench/{file.name}") for file in sources]
            self.host.put(files)

    def create_task(self) -> None:
        xml = f"{self.wanted.folder}/{job.TASK}".replace("/", "\\")
        self.host.checked("schtasks", "/create", "/tn", self.wanted.task, "/xml", xml, "/f")

    def start(self) -> None:
        """Start the task, which ignores a second start while it runs.

        A connection that breaks here leaves open whether it was started: whoever looks
        at the state next finds out.
        """
        self.host.remove(f"{self.wanted.folder}/{job.STOP}")
        self.host.checked("schtasks", "/run", "/tn", self.wanted.task)

    def stop(self) -> None:
        """Ask the job to end; it does so after the request under way."""
        with tempfile.NamedTemporaryFile() as nothing:
            self.host.put([(Path(nothing.name), f"{self.wanted.folder}/{job.STOP}")])

    def delete_task(self) -> None:
        """One that is gone already is no error."""
        done = self.host.run("schtasks", "/delete", "/tn", self.wanted.task, "/f")
        if (
            done.returncode
            and not self.host.run("schtasks", "/query", "/tn", self.wanted.task).returncode
        ):
            raise HostError(f"the task {self.wanted.task} cannot be deleted")

    def delete_folder(self) -> None:
        """Everything of this job on the host."""
        self.host.run("cmd", "/c", "rmdir", "/s", "/q", self.wanted.folder.replace("/", "\\"))

    def fetch_all(self) -> None:
        """The whole results and the log, as they are in the end.

        What was fetched piece by piece is replaced only if it is not the same.
        """
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            file, log = Path(folder) / job.RESULTS, Path(folder) / job.LOG
            there = self.wanted.folder
            self.host.get([(f"{there}/{job.RESULTS}", file), (f"{there}/{job.LOG}", log)])
            for whole, here in ((file, self.results), (log, self.log)):
                data = whole.read_bytes() if whole.exists() else b""
                if data and (not here.exists() or here.read_bytes() != data):
                    journal.write_whole(here, data)

    def put_back(self, state: Mapping[str, Any]) -> str:
        """Have loaded again what a job that was ended hard had unloaded; what failed, in words."""
        if all(one["back"] for one in state.get("unloaded", [])):
            return ""
        done = self.host.run(*self.wanted.command("--put-back"), timeout_s=PUT_BACK_S)
        return "" if not done.returncode else done.stderr.decode("utf-8", "replace").strip()


def _end_at_a_line(file: Path) -> None:
    """Cut off what is not a whole line: the host may yet write that line anew."""
    if not file.exists():
        return
    with file.open("r+b") as opened:
        data = opened.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            opened.truncate(end)


class Watch:
    """Brings a job to its end and follows it, whatever breaks in between.

    Every method blocks. They raise JobFailed once the time is over, and HostError.
    """

    def __init__(
        self, remote: Remote, give_up_s: float, silent_s: float, *, is_json: bool = False
    ) -> None:
        self._remote = remote
        self._silent_s = silent_s
        self._is_json = is_json
        self._deadline = time.monotonic() + give_up_s
        self._progress: Progress | None = None
        self._starts_before = 0  # ends of earlier starts are none of ours
        self._revived = 0
        self._beat: tuple[int, int] | None = None
        self._beat_at = time.monotonic()
        self._disturbed = 0
        self.is_stopping = False
        self.last_state: dict[str, Any] | None = None

    def say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.say(line)
        elif self._is_json:
            print(json.dumps({"said": line}), flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def begin(self, *, is_again: bool) -> dict[str, Any] | None:
        """Find the job, or start it; its state, if it is over already and not wanted `again`."""
        state = self.patiently(self._remote.state)
        how = None if state is None else state["state"]
        if state is not None and how not in job.ENDED:
            self.say(f"it was begun {state['began']}: watching it")
            self._starts_before = int(state["starts"]) - 1
            return None
        if how == job.DONE and not is_again:
            return state
        self._starts_before = 0 if state is None else int(state["starts"])
        self.say(f"copying to {self._remote.host.name}:{self._remote.wanted.folder}")
        self.patiently(self._remote.prepare)
        self._start()
        return None

    def to_the_end(self) -> dict[str, Any]:
        """The last state."""
        pause_s = POLL_FIRST_S
        while True:
            state = self.patiently(self._remote.state)
            if state is not None and int(state["starts"]) > self._starts_before:
                self._show(state)
                self.last_state = state
                if state["state"] in job.ENDED:
                    return state
            if self._is_silent(state):
                if self.is_stopping:
                    raise JobFailed("it was to be ended, but does not run")
                self._revive()
            self._wait(pause_s)
            pause_s = min(POLL_MOST_S, pause_s * BACKOFF)

    def finish(self, state: Mapping[str, Any]) -> list[str]:
        """Fetch everything, put things back, delete the task; what could not be, in words."""
        self.patiently(self._remote.fetch_all)
        fault = self.patiently(lambda: self._remote.put_back(state))
        self.patiently(self._remote.delete_task)
        if self._progress is not None:
            self._progress.close()
        return [fault] if fault else []

    def _start(self) -> None:
        """Start it once. Where the connection breaks meanwhile, look before starting again."""
        while True:
            try:
                self._remote.start()
                break
            except Unreachable as exc:
                self.say(f"the connection broke while it was being started: {exc}")
            state = self.patiently(self._remote.state)
            if state is not None and int(state["starts"]) > self._starts_before:
                break
            if self.patiently(self._remote.is_task_running):
                break
        self._beat_at = time.monotonic()

    def _is_silent(self, state: Mapping[str, Any] | None) -> bool:
        beat = None if state is None else (int(state["starts"]), int(state["beat"]))
        if beat != self._beat:
            self._beat, self._beat_at = beat, time.monotonic()
        return time.monotonic() - self._beat_at > self._silent_s

    def _revive(self) -> None:
        """A job that shows no life is started again if its task does not run: after a reboot,
        a crash, a kill. RESTARTS times at most."""
        self._beat_at = time.monotonic()
        if self.patiently(self._remote.is_task_running):
            self.say("no sign of life, but the task runs: waiting")
            return
        if self._revived >= RESTARTS:
            raise JobFailed(f"it ended {RESTARTS} times without a word; see its log.txt")
        self._revived += 1
        self.say("it is gone, and did not come to an end: starting it again")
        self._start()

    def _show(self, state: Mapping[str, Any]) -> None:
        done, total = int(state["done"]), int(state["total"])
        if self._progress is None and total:
            title = self._remote.wanted.plan.stem
            self._progress = Progress(title, total, done, is_json=self._is_json)
        if self._progress is not None:
            more = {name: state[name] for name in ("state", "beat", "tok_s")}
            self._progress.report(done, str(state["said"]), **more)
        for line in state["disturbed"][self._disturbed :]:
            self.say(f"disturbed: {line}")
        self._disturbed = len(state["disturbed"])

    def patiently(self, ask: Callable[[], T]) -> T:
        """Its answer; it is asked again, more and more seldom, where the host is not there."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                return ask()
            except Unreachable as exc:
                self.say(f"no connection, trying again in {pause_s:.0f} s: {exc}")
                self._wait(pause_s)
                pause_s = min(RETRY_MOST_S, pause_s * BACKOFF)

    def _wait(self, seconds: float) -> None:
        if time.monotonic() > self._deadline:
            raise JobFailed("gave up; the job may still run: say the same again to look for it")
        time.sleep(seconds)


# --- the command


def run(options: argparse.Namespace) -> int:
    """Raises HostError, Unreachable at the first contact, JobFailed, JournalError, OSError."""
    options.out.mkdir(parents=True, exist_ok=True)
    host = Host(options.host, options.ssh_config)
    remote = Remote(host, wanted(options, options.plan, "--job", options.sweep_option), options.out)
    watch = Watch(remote, options.give_up_h * 3600, options.silent_s, is_json=options.json)
    host.shell()
    state = None
    if options.stop:
        remote.stop()
        watch.is_stopping = True
    else:
        state = watch.begin(is_again=bool(options.sweep_option))
    if options.detach:
        watch.say(f"it runs on {options.host}; say the same without --detach to watch it")
        return 0
    try:
        state = state or watch.to_the_end()
    except JobFailed as exc:
        if watch.last_state is None:
            raise
        state = watch.last_state | {"error": str(exc)}
    faults = watch.finish(state)
    _tell(remote, state, faults)
    return 0 if state["state"] == job.DONE and not faults else 1


def wanted(
    options: argparse.Namespace, plan: Path, verb: str, sweep_options: Sequence[str]
) -> Wanted:
    """By `add_host_options`. Raises HostError."""
    if not plan.is_file():
        raise HostError(f"{plan} is no file")
    exe = None if options.python else options.exe
    if exe is not None and not exe.is_file():
        raise HostError(f"there is no {exe}: make build-windows, or --python on the host")
    settings = {
        "verb": verb,
        "as_user": options.as_user,
        "sidecar": options.sidecar,
        "llama_swap": options.llama_swap,
        "options": list(sweep_options),
    }
    return Wanted(plan, exe, options.python, settings)


def _tell(remote: Remote, state: Mapping[str, Any], faults: Sequence[str]) -> None:
    """How it ended, and the report if there are results. Raises JournalError or OSError."""
    for fault in faults:
        print(f"remote: {fault}", file=sys.stderr)
    if state["state"] != job.DONE:
        said = state["error"] or job.last_line(remote.log)
        print(f"remote: {state['state']}, and not done: {said}", file=sys.stderr)
    if state["disturbed"]:
        print(f"remote: disturbed {len(state['disturbed'])} times, see above", file=sys.stderr)
    if remote.results.exists() and remote.results.stat().st_size:
        report.main([str(remote.results)])


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nno longer watched; the job goes on. Say the same again to watch it, or with")
        print("--stop to end it", file=sys.stderr)
        return job.INTERRUPTED
    except (HostError, Unreachable, JobFailed, journal.JournalError, OSError, ValueError) as exc:
        print(f"remote: {exc}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.remote",
        description="Run a sweep on a Windows machine over SSH, as a scheduled task. Said again "
        "it finds the job that runs, goes on with one that was ended, or fetches the results.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.json")
    add_host_options(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder here for results (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="progress as one JSON object a line")
    parser.add_argument("--detach", action="store_true", help="start it and do not watch")
    parser.add_argument("--stop", action="store_true", help="have the running job end early")
    parser.add_argument(
        "--sweep-option",
        action="append",
        default=[],
        metavar="=--OPTION",
        help="for the sweep itself, as --sweep-option=--retry; starts one that is done again",
    )
    parser.add_argument(
        "--give-up-h", type=float, default=GIVE_UP_H, help="watch for so long (%(default)g h)"
    )
    parser.add_argument(
        "--silent-s",
        type=float,
        default=SILENT_S,
        help="a job without a sign of life for so long is looked after (%(default)g s)",
    )
    return parser


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """Those that bench.doctor takes too."""
    parser.add_argument("--host", required=True, help="as ssh knows it; an administrator's account")
    parser.add_argument("--ssh-config", type=Path, help="in place of ~/.ssh/config")
    parser.add_argument("--exe", type=Path, default=EXE, help="the runner (%(default)s)")
    parser.add_argument(
        "--python", default="", help="in place of the exe: python.exe on the host, by its path"
    )
    parser.add_argument(
        "--as-user",
        action="store_true",
        help="run the task as the account of the SSH session, not as Windows' own (SYSTEM)",
    )
    parser.add_argument(
        "--sidecar", default=SIDECAR, help="llama-sidecar on the host, or '' (%(default)s)"
    )
    parser.add_argument(
        "--llama-swap", default=SWAP, help="llama-swap on the host, or '' (%(default)s)"
    )


if __name__ == "__main__":
    sys.exit(main())
