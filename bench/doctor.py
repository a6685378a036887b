"""Is a Windows machine ready for bench.remote: everything that it takes, tried in one go.

    python -m bench.doctor --host sam-desktop [plan.json]

It copies the runner, has it look at the machine once in the SSH session and once as a
scheduled task, as the sweep will run, and compares the two. It starts no model, unloads
nothing, and takes away what it brought.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import job, remote
from bench.ssh import Host, HostError, Unreachable

LOOK_S = 600.0
POLL_S = 2.0
LEAST_FREE_BYTES = 1 << 30
MOST_SKEW_S = 60.0
OK, NOTE, MISSING = "ok", "note", "MISSING"
NO_PLAN = '{"schema": 1}'


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at; what to do, where it is missing."""

    kind: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n         -> {self.advice}" if self.advice else ""
        return f"{self.kind:8} {self.what}{advice}"


def examine(patient: remote.Remote) -> Iterator[Finding]:
    """Each finding as it is made; what hangs on something that is missing is left out."""
    host = patient.host
    try:
        begun = time.monotonic()
        shell = host.shell()
        yield Finding(OK, f"ssh to {host.name}: {shell}, {time.monotonic() - begun:.1f} s a call")
    except (Unreachable, HostError) as exc:
        yield Finding(MISSING, f"ssh to {host.name}: {exc}", SSH_ADVICE)
        return
    try:
        patient.prepare_files()
        yield Finding(OK, f"files can be copied to {patient.wanted.folder}")
    except (Unreachable, HostError) as exc:
        yield Finding(MISSING, f"copying files: {exc}", "turn on the sftp subsystem in sshd_config")
        return
    try:
        host.checked(*patient.wanted.command("--look"), timeout_s=LOOK_S)
        here = _look(patient)
        yield Finding(OK, "the runner runs in the SSH session")
    except (Unreachable, HostError) as exc:
        yield Finding(
            MISSING, f"the runner: {exc}", "is it blocked by a virus scanner, or too old?"
        )
        return
    yield from _of_machine(here)
    yield from _of_plan(here)
    yield from _as_task(patient, here)


SSH_ADVICE = (
    "install OpenSSH Server on it (Settings, Optional features), put your public key into "
    "C:\\ProgramData\\ssh\\administrators_authorized_keys, and try: ssh HOST echo hello"
)


def _of_machine(look: Mapping[str, Any]) -> Iterator[Finding]:
    yield Finding(OK, f"{look['system']}, account {look['user']}")
    yield _judged(look["is_admin"], "the account is an administrator", ADMIN_ADVICE)
    free = look["free_bytes"]
    yield _judged(free >= LEAST_FREE_BYTES, f"{free / 1e9:.1f} GB free", "make room on the disk")
    skew_s = look["time"] - time.time()
    if abs(skew_s) > MOST_SKEW_S:
        yield Finding(NOTE, f"its clock is {skew_s:+.0f} s from this machine's")
    gpus = ", ".join(look["gpus"])
    yield (
        Finding(OK, f"GPU: {gpus}")
        if gpus
        else Finding(NOTE, "nvidia-smi shows no GPU", GPU_ADVICE)
    )
    if look["running"]:
        numbers = ", ".join(map(str, look["running"]))
        yield Finding(
            NOTE,
            f"llama-server runs already: process {numbers}",
            "those of llama-sidecar and llama-swap are unloaded; end any other",
        )
    if isinstance(look["loaded"], str):
        yield Finding(MISSING, look["loaded"], "give the right --sidecar or --llama-swap, or ''")
    else:
        held = ", ".join(look["loaded"]) or "nothing"
        yield Finding(OK, f"llama-sidecar and llama-swap hold: {held}")


ADMIN_ADVICE = "use an account of the group Administrators: making the task takes its rights"
GPU_ADVICE = "without nvidia-smi on PATH the memory of the GPU is not measured"


def _of_plan(look: Mapping[str, Any]) -> Iterator[Finding]:
    if look["plan"]:
        yield Finding(MISSING, f"the plan: {look['plan']}", "mend it: bench/README.md, Plan")
    for path, found in look["servers"].items():
        if "error" in found:
            yield Finding(MISSING, f"{path}: {found['error']}", "name another in the plan")
        else:
            yield Finding(OK, f"{path}: {_one_line(found['version'])}")
            yield Finding(OK, f"its devices: {_one_line(found['list-devices'])}")
    for path, size in look["models"].items():
        if size is None:
            yield Finding(MISSING, f"{path}: there is no such file", "correct the plan, or copy it")
        else:
            yield Finding(OK, f"{path}: {size / 1e9:.2f} GB")


def _as_task(patient: remote.Remote, here: Mapping[str, Any]) -> Iterator[Finding]:
    """The same from a task: session 0, another account, another PATH."""
    try:
        patient.host.remove(f"{patient.wanted.folder}/{job.LOOK}")
        patient.host.checked(*patient.wanted.command("--task-xml"))
        patient.create_task()
    except (Unreachable, HostError) as exc:
        yield Finding(MISSING, f"a scheduled task: {exc}", ADMIN_ADVICE)
        return
    try:
        patient.start()
        look = _awaited(patient)
    except (Unreachable, HostError) as exc:
        yield Finding(MISSING, f"a scheduled task: {exc}", TASK_ADVICE)
        return
    yield Finding(OK, f"a scheduled task runs, as {look['user'] or 'nobody'}")
    is_normal = look["priority"] == "normal"
    yield _judged(is_normal, f"its priority is {look['priority']}", "is it made by other tools?")
    for name, title in (("gpus", "GPUs"), ("models", "models"), ("servers", "servers")):
        is_same = look[name] == here[name]
        advice = f"{TASK_ADVICE}; there it is {json.dumps(look[name])}"
        yield _judged(is_same, f"a task sees the same {title} as the SSH session", advice)


TASK_ADVICE = "try --as-user, or the other way round"


def _awaited(patient: remote.Remote) -> dict[str, Any]:
    """What the task saw. Raises Unreachable or HostError."""
    deadline = time.monotonic() + LOOK_S
    while time.monotonic() < deadline:
        try:
            return _look(patient)
        except HostError:
            time.sleep(POLL_S)
    raise HostError(f"it was started, and has not ended within {LOOK_S:g} s")


def _look(patient: remote.Remote) -> dict[str, Any]:
    """Raises Unreachable, or HostError if there is none."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / job.LOOK
        patient.host.get([(f"{patient.wanted.folder}/{job.LOOK}", file)])
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
        except (OSError, ValueError):
            raise HostError(f"there is no {job.LOOK}") from None
        return found


def _judged(is_good: bool, what: str, advice: str) -> Finding:
    return Finding(OK, what) if is_good else Finding(MISSING, what, advice)


def _one_line(words: str) -> str:
    return "; ".join(line.strip() for line in words.splitlines() if line.strip())


# --- the command


def run(options: argparse.Namespace) -> int:
    """Raises HostError or OSError."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        plan = Path(folder) / "doctor.json"
        plan.write_bytes(options.plan.read_bytes() if options.plan else NO_PLAN.encode())
        wanted = remote.wanted(options, plan, "--look", [])
        patient = remote.Remote(Host(options.host, options.ssh_config), wanted, Path(folder))
        missing = 0
        try:
            for finding in examine(patient):
                if options.plan or not finding.what.startswith("the plan:"):
                    missing += finding.kind == MISSING
                    print(finding, flush=True)
        finally:
            _clean_up(patient)
    print(f"{missing} missing" if missing else f"{options.host} is ready")
    return 1 if missing else 0


def _clean_up(patient: remote.Remote) -> None:
    try:
        patient.delete_task()
        patient.delete_folder()
    except (Unreachable, HostError) as exc:
        print(f"doctor: something is left behind: {exc}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.doctor",
        description="Try everything on a Windows machine that bench.remote needs there. "
        "Exits with 1 if something is missing.",
    )
    parser.add_argument("plan", type=Path, nargs="?", metavar="PLAN.json")
    remote.add_host_options(parser)
    options = parser.parse_args(argv)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\ndoctor: interrupted; say the same again", file=sys.stderr)
        return job.INTERRUPTED
    except (HostError, OSError) as exc:
        print(f"doctor: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
