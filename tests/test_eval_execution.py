"""Programs run apart from their check: who answers rightly passes, and no trick does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import winsvc
from eval import execution, humaneval, keeper
from eval.data import Problem, Source
from eval.execution import Verdict, run_program, with_check
from tests.daemon import PATIENCE, ROOT, is_alive, wait_until

DATA = ROOT.parent / "shared" / "data"
SHORT_S = 1.0 * PATIENCE  # for programs that never come to an end

RIGHT = "def same(x):\n    return x\n"
WRONG = "def same(x):\n    return 2\n"
CHECK = "def check(candidate):\n    assert candidate(1) == 1\n\ncheck(same)\n"


def judged(solution: str, check: str = CHECK, **limits: Any) -> Verdict:
    limits.setdefault("timeout_s", execution.TIMEOUT_S * PATIENCE)
    return run_program(with_check(textwrap.dedent(solution), check, "same"), **limits)


@pytest.fixture(params=[True, False], ids=["apart", "with no namespace"])
def is_apart(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test no process of a program's is there, and no folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    assert list(tmp_path.glob("eval-*")) == []
    if sys.platform == "linux":
        wait_until(lambda: not processes_with(str(tmp_path)), "all of its processes are gone")


def processes_with(folder: str) -> list[int]:
    """Those that stand in this folder, as every program and its children do."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(folder):
                found.append(int(link.parent.name))
    return found


# --- what passes


def test_who_answers_rightly_passes_and_who_does_not_fails(is_apart: bool) -> None:
    verdict = judged(RIGHT, is_apart=is_apart)
    assert (verdict.outcome, verdict.detail) == ("passed", "")
    assert 0 < verdict.wall_s < execution.TIMEOUT_S * PATIENCE
    assert judged(WRONG, is_apart=is_apart).outcome == "failed"


HONEST = {
    "it prints, and what no code page knows": "print('x' * 100_000, '\u2713')",
    "it runs a thread": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "it runs another program": (
        "import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', ''], check=True)"
    ),
    "it writes a file": "from pathlib import Path\nPath('a.txt').write_text('a' * 1_000_000)",
    "its demonstration is not run": "if __name__ == '__main__':\n    input()",
    "it uses the standard library": "import dataclasses, heapq, itertools, typing",
}


@pytest.mark.parametrize("words", HONEST.values(), ids=HONEST)
def test_an_honest_program_passes(words: str) -> None:
    verdict = judged(f"{words}\n{RIGHT}")
    assert (verdict.outcome, verdict.detail) == ("passed", "")


ANSWERS = [
    "None, True, -1, 10**5000, 1.5, 'a\\nb\\u2713\\ud800', b'\\x00', 1j",
    "[], (), {}, set(), frozenset({1}), [(1, {'a': {2, 3}})], {(1, 2): [None]}",
    "float('inf'), -0.0, bytearray(b'a')",
]


@pytest.mark.parametrize("answers", ANSWERS)
def test_plain_data_travels_there_and_back_unchanged(answers: str) -> None:
    check = f"values = ({answers},)\nassert same(values) == values\n"
    check += "assert [type(a) for a in same(values)] == [type(v) for v in values]\n"
    assert judged(RIGHT, check).detail == ""


ODD_ANSWERS = {
    "a subclass is as its plain kind": (
        "from collections import Counter\ndef same(x): return Counter('aab')",
        "assert same(1) == {'a': 2, 'b': 1}",
    ),
    "a named tuple": (
        "from typing import NamedTuple\nclass P(NamedTuple):\n  x: int\ndef same(x): return P(x)",
        "assert same(1) == (1,)",
    ),
    "a generator gives its items": (
        "def same(x): yield from (x, 2)",
        "answer = same(1)\nassert answer != [1, 2]\nassert list(answer) == [1, 2]",
    ),
    "a range gives its items": ("def same(x): return range(x)", "assert tuple(same(2)) == (0, 1)"),
    "a number of another kind": (
        "from fractions import Fraction\ndef same(x): return Fraction(1, 2)",
        "assert same(1) == 0.5",
    ),
    "by name": ("def same(x, *, y): return x + y", "assert same(1, y=2) == 3"),
    "anything else is true": ("def same(x): return object()", "assert same(1)"),
    "it may raise": (
        "def same(x): raise ValueError(x)",
        "try:\n  same(1)\nexcept Exception as exc:\n  assert 'ValueError: 1' in str(exc)",
    ),
}


@pytest.mark.parametrize(("solution", "check"), ODD_ANSWERS.values(), ids=ODD_ANSWERS)
def test_an_odd_answer_is_taken_as_it_would_be_at_home(solution: str, check: str) -> None:
    assert judged(solution, check).detail == ""


def test_a_fraction_stays_one() -> None:
    assert keeper.decoded(keeper.encoded({Fraction(1, 3): 1})) == {Fraction(1, 3): 1}


def test_the_program_has_an_environment_folder_and_input_of_its_own(is_apart: bool) -> None:
    solution = """
        import os, sys
        def same(x):
            return os.getcwd(), sorted(os.environ), sys.path, sys.flags.isolated, sys.stdin.read()
    """
    check = """if True:
        cwd, names, path, is_isolated, said = same(1)
        assert "eval-" in cwd, cwd
        ours = [name for name in names if not name.startswith("WINE")]
        assert set(ours) <= {"LC_CTYPE", "SYSTEMROOT", "SYSTEMDRIVE"}, names
        assert not [entry for entry in path if "site-packages" in entry or entry == ""], path
        assert (is_isolated, said) == (1, "")
    """
    assert judged(solution, check, is_apart=is_apart).detail == ""


# --- tricks

TRICKS = {
    "leaves with 0": "import os\nos._exit(0)",
    "leaves with 0 when it is called": "def same(x):\n    import os\n    os._exit(0)",
    "leaves by exception": "raise SystemExit(0)",
    "prints a token": (
        f"""print('{{"token": "1", "outcome": "passed", "detail": "", "wall_s": 1}}')\n{WRONG}"""
    ),
    "writes to all that is open": """
        import os
        def same(x):
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, b'{"token": "1", "outcome": "passed"}\\n')
                except OSError:
                    pass
            return 2
    """,
    "looks for the check in frames and objects": """
        import gc, sys
        def same(x):
            frame = sys._getframe()
            while frame:
                for name, value in {**frame.f_globals, **frame.f_locals}.items():
                    if name == "check" or "token" in name or "candidate" in name:
                        return x
                frame = frame.f_back
            for found in gc.get_objects():
                if getattr(found, "__name__", "") == "check":
                    return x
            return 2
    """,
    "replaces the check": "def check(candidate):\n    pass\n" + WRONG,
    "replaces builtins": f"""
        import builtins
        builtins.AssertionError = type("Never", (Exception,), {{}})
        builtins.exec = builtins.compile = builtins.isinstance = lambda *a, **k: None
{textwrap.indent(WRONG, " " * 8)}
    """,
    "answers with what equals all": """
        class Same:
            def __eq__(self, other):
                return True
        def same(x):
            return Same()
    """,
    "answers with a number that equals all": """
        class Same(int):
            def __eq__(self, other):
                return True
        def same(x):
            return Same(2)
    """,
    "reads what there is to read": f"input()\n{RIGHT}",
    "answers with something endless": """
        import itertools
        def same(x):
            return itertools.count()
    """,
    "answers with something deep": """
        def same(x):
            for _ in range(100_000):
                x = [x]
            return x
    """,
    "calls itself for ever": "def same(x):\n    return same(x)",
    "has no such function": "def other(x):\n    return x",
    "does not compile": "def same(x)\n    return x",
    "leaves a process": f"""
        import subprocess, sys
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
{textwrap.indent(RIGHT, " " * 8)}
    """,
}


@pytest.mark.parametrize("solution", TRICKS.values(), ids=TRICKS)
def test_a_trick_fails(solution: str) -> None:
    verdict = judged(solution)
    assert verdict.outcome == "failed", verdict
    assert verdict.detail


if sys.platform != "win32":
    import fcntl

SYSTEM_TRICKS = {
    "kills its parent": f"""
        import os, signal
        try:
            os.kill(os.getppid(), signal.SIGKILL)
        except OSError:
            pass
{textwrap.indent(WRONG, " " * 8)}
    """,
    "leaves a process in a session of its own": f"""
        import os, time
        if not os.fork():
            os.setsid()
            if not os.fork():
                time.sleep(600)
            os._exit(0)
        os.wait()
{textwrap.indent(RIGHT, " " * 8)}
    """,
    "returns twice": f"import os\nos.fork()\n{WRONG}",
    "forks without end": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
    "forks and leaves, without end": """
        import os
        while True:
            try:
                if os.fork():
                    os._exit(0)
                os.setsid()
            except OSError:
                pass
    """,
    "looks into the keeper": """
        import os
        def same(x):
            for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
                with open(f"/proc/{pid}/cmdline") as file:
                    if "keeper.py\\0keeper" not in file.read():
                        continue
                for name in ("mem", "environ", "fd/0", "fd/1"):
                    try:
                        open(f"/proc/{pid}/{name}", "rb" if name == "mem" else "r").close()
                    except OSError:
                        continue
                    return x  # it could read there what it is asked for
            return 2
    """,
}


@contextlib.contextmanager
def held_by(folder: Path) -> Iterator[str]:
    """Words of a program that hold a lock as long as it lives, or anything that it forked.

    Soon nobody may hold it any more: unlike a list of processes, that misses none. (Not at
    once: where the keeper is dead, the system ends the program in its own time.)
    """
    file = folder / "held"
    file.touch()
    yield f"import fcntl\nheld = open({str(file)!r}, 'w')\nfcntl.flock(held, fcntl.LOCK_EX)\n"
    if sys.platform != "win32":
        wait_until(lambda: is_free(file), "all that hold the lock are gone")


def is_free(file: Path) -> bool:
    if sys.platform != "win32":
        with file.open("w") as again, contextlib.suppress(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@pytest.mark.parametrize("solution", SYSTEM_TRICKS.values(), ids=SYSTEM_TRICKS)
def test_a_trick_with_the_system_fails(solution: str, tmp_path: Path) -> None:
    with held_by(tmp_path) as words:
        assert judged(words + textwrap.dedent(solution)).outcome == "failed"


@pytest.mark.parametrize("name", SYSTEM_TRICKS)
def test_it_fails_too_where_there_are_no_namespaces(name: str, tmp_path: Path) -> None:
    if name == "looks into the keeper" and sys.platform != "win32" and os.getuid() == 0:
        pytest.skip("nothing is closed to the superuser")
    with held_by(tmp_path) as words:
        verdict = judged(words + textwrap.dedent(SYSTEM_TRICKS[name]), is_apart=False)
        assert verdict.outcome == "failed"


GREEDY = {
    "fills the disk with one file": (
        "with open('a', 'wb') as file:\n    while True:\n        file.write(bytes(1 << 20))",
        "File too large",
    ),
    "fills the disk with many": (
        """
        import itertools
        for number in itertools.count():
            with open(str(number), "wb") as file:
                file.write(bytes(8 << 20))
        """,
        "it wrote more than",
    ),
    "makes many files": (
        "import itertools\nfor n in itertools.count():\n    open(str(n), 'wb').close()",
        "it made more than",
    ),
    "nests folders": (
        "import os\nfor _ in range(10_000):\n    os.mkdir('a')\n    os.chdir('a')",
        "it made more than",
    ),
    "takes memory": ("x = bytearray(10 << 30)", "MemoryError"),
    "starts threads": (
        """
        import threading, time
        for _ in range(100_000):
            threading.Thread(target=time.sleep, args=(600,)).start()
        """,
        "can't start new thread",
    ),
}


@pytest.mark.parametrize(("solution", "why"), GREEDY.values(), ids=GREEDY)
def test_who_takes_too_much_fails(solution: str, why: str) -> None:
    verdict = judged(solution)
    assert verdict.outcome == "failed", verdict
    assert why in verdict.detail


def test_the_memory_of_all_its_processes_counts() -> None:
    solution = """
        import os, time
        for _ in range(8):
            if not os.fork():
                x = b"1" * (100 << 20)
                time.sleep(600)
        time.sleep(600)
    """
    verdict = judged(solution, memory_bytes=300 << 20)
    assert (verdict.outcome, verdict.detail) == ("failed", "it took more than 300 MiB of memory")


ENDLESS = {
    "does nothing else": "while True:\n    pass",
    "is deaf to signals": """
        import signal
        for number in signal.valid_signals():
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            pass
    """,
    "prints": "while True:\n    print('x' * 10_000)",
    "when it is called": "def same(x):\n    while True:\n        pass",
}


@pytest.mark.parametrize("solution", ENDLESS.values(), ids=ENDLESS)
def test_what_does_not_end_is_ended(solution: str) -> None:
    begun = time.monotonic()
    verdict = judged(solution, timeout_s=SHORT_S)
    assert verdict.outcome == "timeout"
    assert verdict.wall_s >= SHORT_S
    assert time.monotonic() - begun < SHORT_S + keeper.START_S


# --- the keeper, and who asks it


def test_a_program_ends_with_who_asked_for_it(tmp_path: Path) -> None:
    script = (
        "from eval.execution import *\n"
        f"import tempfile\ntempfile.tempdir = {str(tmp_path)!r}\n"
        "run_program(with_check('import time; time.sleep(600)', '', 'f'), timeout_s=600)"
    )
    asking = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        program = wait_until(lambda: processes_with(str(tmp_path)), "the program runs", 60)
    finally:
        asking.kill()
        asking.wait()
    for pid in program:
        wait_until(lambda: not is_alive(pid), "it is gone", 60)  # noqa: B023 - called at once
    wait_until(lambda: not list(tmp_path.glob("eval-*")), "its folder is gone", 60)


def test_several_at_once_do_not_touch_each_other() -> None:
    solutions = [RIGHT, WRONG, "import os\nos._exit(0)", RIGHT] * 2
    with ThreadPoolExecutor(4) as pool:
        outcomes = [verdict.outcome for verdict in pool.map(judged, solutions)]
    assert outcomes == ["passed", "failed", "failed", "passed"] * 2


def test_a_program_that_has_no_check_is_a_fault_of_ours() -> None:
    with pytest.raises(ValueError, match="no check"):
        run_program(RIGHT)


def test_no_mark_of_the_program_itself_parts_it() -> None:
    fake = with_check("x = 1", "pass", "x")
    assert judged(fake + WRONG).outcome == "failed"


def test_a_frozen_program_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    verdict = judged(RIGHT)
    assert (verdict.outcome, "Python of its own" in verdict.detail) == ("error", True)


def test_a_missing_interpreter_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_python", lambda: "/nowhere/python")
    assert judged(RIGHT).outcome == "error"


def test_a_detail_is_the_same_in_every_run() -> None:
    solution = "def same(x):\n    raise ValueError(object())"
    first, second = judged(solution), judged(solution)
    assert first.detail == second.detail == "ValueError: <object object at 0x...>"


if sys.platform == "win32":

    def test_a_job_takes_its_limits() -> None:
        """Read back, where that can be: Wine 8 says 0 whatever was set, and keeps neither."""
        assert ctypes.sizeof(winsvc._ExtendedLimits) == 144  # winnt.h, 64 bits
        assert winsvc._ExtendedLimits.ProcessMemoryLimit.offset == 112
        job = winsvc.LimitedJob(300 << 20, 7)
        try:
            assert job.limits() in ((300 << 20, 7), (0, 0))
            assert job.active_processes() == 0
        finally:
            job.close()


# --- HumanEval itself


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    if not DATA.exists():
        pytest.skip(f"NOTHING OF HumanEval IS TESTED: there is no {DATA}")
    return Source(DATA).humaneval()


def outcomes(programs: list[str]) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        return [verdict.outcome for verdict in pool.map(run_program, programs)]


@pytest.mark.timeout(600)
def test_the_canonical_solutions_pass(problems: list[Problem]) -> None:
    """Half of them as the completion that they are, half as a chat says it."""
    programs = [humaneval.program_of(one, one.canonical_solution) for one in problems[::2]]
    for one in problems[1::2]:
        reply = f"Here it is:\n```python\n{one.prompt}{one.canonical_solution}```\nThat's all."
        programs.append(humaneval.program_of(one, reply))
    assert outcomes([program for program in programs if program]) == ["passed"] * 164


@pytest.mark.timeout(600)
def test_empty_bodies_fail(problems: list[Problem]) -> None:
    programs = [humaneval.assembled(one, "    pass\n") for one in problems]
    assert outcomes(programs) == ["failed"] * 164
