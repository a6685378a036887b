"""A sweep on a Windows machine over SSH: real ssh and sshd, Wine's cmd.exe, and the exe.

The models are measured by the real llama-server.exe: one with an MTP head, one without, and
SmolLM2, which drafts for itself and is slow enough to be interrupted. `make test-windows` runs
these.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import doctor, job, journal, remote
from bench.ssh import Host, HostError, Unreachable
from tests import real_parts, windows_host, windows_parts
from tests.daemon import running_daemon, wait_until
from tests.llama_swap_double import llama_swap
from tests.windows_host import NAME, WindowsHost
from tests.windows_parts import EXE, REPO, windows_path

pytestmark = [pytest.mark.windows, pytest.mark.timeout(900)]

SLOWLY_S = 400.0
OUT = "out"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WindowsHost]:
    folder = tmp_path_factory.mktemp("host")
    missing = windows_host.why_missing()
    if missing:
        pytest.fail(missing)
    if not EXE.exists():
        pytest.fail(f"there is no {EXE}: make build-windows")
    try:
        with (
            windows_parts.prefix(folder / "prefix") as windows,
            windows_host.running(folder / "ssh", windows) as started,
        ):
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # it takes 700 MB


def server() -> str:
    if not windows_parts.real_server():
        pytest.skip("NO REAL llama-server.exe: set LLAMA_SERVER_EXE")
    return windows_path(windows_parts.llama_server())


def plan(folder: Path, name: str = "sweep", **fields: object) -> Path:
    """Two blocks off and two on of SmolLM2, of a model with an MTP head, and of one without."""
    parts = (real_parts.smollm2(), real_parts.tiny_mtp(), real_parts.tiny())
    model, headed, tiny = map(windows_path, parts)
    common = ["--ctx-size", "1024", "-np", "1", "-t", "1"]
    drafting = ["--spec-draft-n-max", "3", "--spec-type"]
    by_itself = {"off": common, "on": [*common, "-md", model, *drafting, "draft-simple"]}
    by_head = {"off": common, "on": [*common, *drafting, "draft-mtp"]}
    value = {
        "schema": 1,
        "name": name,
        "models": [
            {"id": "smollm2", "server": server(), "model_path": model, "modes": by_itself},
            {"id": "headed", "server": server(), "model_path": headed, "modes": by_head},
            {"id": "tiny", "server": server(), "model_path": tiny, "modes": by_head},
        ],
        "prompts": ["code", "story"],
        "n_predict": 24,
        "warm_ups": 1,
        "repetitions": 1,
        "ctx_size": 1024,
        **fields,
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(value))
    return file


def words(host: WindowsHost, plan: Path, *more: str) -> list[str]:
    """The command line of bench.remote."""
    fixed = ["--host", NAME, "--ssh-config", str(host.config), "--out", str(plan.parent / OUT)]
    nobody = ["--sidecar", "", "--llama-swap", ""]
    return [str(plan), *fixed, "--silent-s", "10", *nobody, *more]


@contextlib.contextmanager
def started(argv: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """bench.remote as a process of its own."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.remote", *argv],
            cwd=REPO,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def of(host: WindowsHost, plan: Path) -> Path:
    """The job's folder on the host."""
    name = remote.Wanted(plan, None, "", {}).name
    return host.home / remote.BASE / name


def cells(folder: Path) -> list[str]:
    """Ids of what the host has measured, in order."""
    with contextlib.suppress(OSError, journal.JournalError):
        lines = (folder / job.RESULTS).read_bytes().split(b"\n")[1:-1]
        return [json.loads(line)["id"] for line in lines if b'"kind":"cell"' in line]
    return []


def fetched(plan: Path) -> journal.Contents:
    (file,) = (plan.parent / OUT).glob("*.jsonl")
    return journal.read(file)


def state(folder: Path) -> dict[str, Any]:
    return job.read_state(folder) or {}


def test_a_sweep_survives_a_cut_line_and_a_killed_watcher_and_leaves_all_as_it_was(
    host: WindowsHost, tmp_path: Path
) -> None:
    file = plan(tmp_path)
    folder = of(host, file)
    with (
        running_daemon(tmp_path, {"m": {}}) as daemon,
        llama_swap(["qwen"]) as (swap, running, _),
    ):
        assert daemon.chat("m", flags="-c 2048")[0] == 200
        before = daemon.sidecars()
        where = ["--sidecar", f"http://127.0.0.1:{daemon.port}", "--llama-swap", swap]
        argv = words(host, file, *where)
        with started(argv, tmp_path / "first.log") as first:
            wait_until(lambda: len(cells(folder)) >= 1, "a cell is measured", SLOWLY_S)
            assert daemon.sidecars() == []
            assert running == []
            host.disconnect()
            seen = len(cells(folder))
            wait_until(lambda: len(cells(folder)) > seen, "it goes on by itself", SLOWLY_S)
            assert first.poll() is None, (tmp_path / "first.log").read_text()
        host.connect()
        with started(argv, tmp_path / "second.log") as second:
            code = second.wait(SLOWLY_S)
        said = (tmp_path / "second.log").read_text()
        assert code == 0, said
        assert running == ["qwen"]
        assert [row["hash"] for row in daemon.sidecars()] == [row["hash"] for row in before]
    assert "watching it" in said
    assert "smollm2  on: " in said
    assert "headed  on: " in said
    assert "tiny  on: unsupported: the GGUF (llama) has no layers" in said
    assert (state(folder)["state"], state(folder)["starts"]) == ("done", 1)
    results = fetched(file)
    assert (results.repeated, results.broken) == (0, ())
    assert len(cells(folder)) == 20
    of_head = [results.records[f"headed/on/b{block}/code/r0"] for block in (0, 1)]
    assert [(cell["draft_n"], cell["draft_n_accepted"]) for cell in of_head] == [(21, 15)] * 2
    assert results.header["about"]["priority"] == "normal"
    (page,) = (tmp_path / OUT).glob("*.html")
    assert "All 24 cells are there." in page.read_text(encoding="utf-8")
    assert list(host.tasks.glob("*.xml")) == []


def test_a_sweep_goes_on_after_the_host_was_restarted(host: WindowsHost, tmp_path: Path) -> None:
    file = plan(tmp_path, "restarted", models=json.loads(plan(tmp_path).read_text())["models"][:1])
    folder = of(host, file)
    with started(words(host, file), tmp_path / "log") as watching:
        wait_until(lambda: len(cells(folder)) >= 2, "two cells are measured", SLOWLY_S)
        host.reboot()
        code = watching.wait(SLOWLY_S)
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    assert state(folder)["starts"] == 2, "Windows started it, and nobody else did so too"
    assert len(cells(folder)) == len(set(cells(folder))) == 8
    assert fetched(file).repeated == 0


def test_a_job_that_was_killed_is_started_again(host: WindowsHost, tmp_path: Path) -> None:
    """And what it had unloaded is loaded again in the end."""
    file = plan(tmp_path, "killed", models=json.loads(plan(tmp_path).read_text())["models"][1:])
    folder = of(host, file)
    with llama_swap(["qwen"]) as (swap, running, _):
        argv = words(host, file, "--llama-swap", swap)
        with started(argv, tmp_path / "log") as watching:
            wait_until(lambda: len(cells(folder)) >= 1, "a cell is measured", SLOWLY_S)
            host.windows.run(["taskkill", "/f", "/pid", str(state(folder)["pid"])])
            code = watching.wait(SLOWLY_S)
        assert code == 0, (tmp_path / "log").read_text()
        assert running == ["qwen"]
    assert "it is gone, and did not come to an end" in (tmp_path / "log").read_text()
    assert state(folder)["starts"] == 2
    assert len(cells(folder)) == len(set(cells(folder)))


def test_a_sweep_that_cannot_be_says_why_and_leaves_all_as_it_was(
    host: WindowsHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the Python of the host, from sources."""
    file = tmp_path / "bad.json"
    file.write_text('{"schema": 1, "models": []}')
    python = windows_path(windows_parts.windows_python() / "python.exe")
    with llama_swap(["qwen"]) as (swap, running, asked):
        code = remote.main(words(host, file, "--llama-swap", swap, "--python", python))
    assert code == 1
    assert "the plan has no models" in capsys.readouterr().err
    assert running == ["qwen"]
    assert "/unload" in asked
    assert list(host.tasks.glob("*.xml")) == []


def test_stop_ends_it_early_and_keeps_what_is_measured(
    host: WindowsHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = plan(tmp_path, "stopped", n_predict=64)
    folder = of(host, file)
    assert remote.main(words(host, file, "--detach")) == 0
    wait_until(lambda: len(cells(folder)) >= 1, "a cell is measured", SLOWLY_S)
    assert remote.main(words(host, file, "--stop")) == 1
    assert state(folder)["state"] == "stopped"
    assert "stopped, and not done" in capsys.readouterr().err
    assert 1 <= len(fetched(file).records) < 20
    assert list(host.tasks.glob("*.xml")) == []


def test_the_doctor_finds_what_is_there_and_what_is_missing(
    host: WindowsHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = json.loads(plan(tmp_path).read_text())["models"]
    models[1]["model_path"] = "C:\\models\\missing.gguf"
    file = plan(tmp_path, "doctor", models=models)
    argv = ["--host", NAME, "--ssh-config", str(host.config), "--sidecar", "", "--llama-swap", ""]
    assert doctor.main([*argv, str(file)]) == 1
    said = capsys.readouterr().out
    assert "C:\\models\\missing.gguf" in said
    assert "MISSING" in said
    faults = [line for line in said.splitlines() if line.startswith("MISSING")]
    assert all("missing.gguf" in line for line in faults), said
    assert list(host.tasks.glob("*.xml")) == []


# --- the ground it stands on


def at(host: WindowsHost) -> Host:
    return Host(NAME, host.config)


def schtasks(host: WindowsHost, *words: str) -> tuple[int, str]:
    done = at(host).run("schtasks", *words)
    return done.returncode, (done.stdout + done.stderr).decode()


def test_the_double_of_schtasks_is_as_strict_as_the_real_one(
    host: WindowsHost, tmp_path: Path
) -> None:
    (tmp_path / "plain.xml").write_text('<?xml version="1.0"?><Task/>')
    at(host).put([(tmp_path / "plain.xml", "plain.xml")])
    for arguments in (
        ["/create", "/tn", "t", "/sc", "once"],
        ["/create", "/tn", "t", "/xml", "plain.xml", "/f"],
        ["/create", "/tn", "t", "/xml", "none.xml", "/f"],
        ["/run", "/tn", "none"],
        ["/query", "/tn", "none"],
        ["/delete", "/tn", "none", "/f"],
        ["/delete"],
    ):
        code, said = schtasks(host, *arguments)
        assert (code, "ERROR" in said) == (1, True), arguments


def test_a_command_ends_with_its_session_and_its_exit_code_comes_back(host: WindowsHost) -> None:
    assert at(host).shell() == "cmd"
    assert at(host).run("cmd", "/c", "exit", "5").returncode == 5
    with pytest.raises(Unreachable, match="has not answered within"):
        at(host).run("ping", "-n", "60", "127.0.0.1", timeout_s=5)
    with pytest.raises(HostError, match=r"none\.exe"):
        at(host).checked("none.exe")


def test_files_come_piece_by_piece(host: WindowsHost, tmp_path: Path) -> None:
    there, here = host.home / "piece.txt", tmp_path / "piece.txt"
    for text in ("one\n", "one\ntwo\n", "one\ntwo\n"):
        there.write_text(text)
        at(host).get_more("piece.txt", here, [("none.txt", tmp_path / "none.txt")])
        assert here.read_text() == text
    assert not (tmp_path / "none.txt").exists()
    at(host).remove("piece.txt", "none.txt")
    assert not there.exists()


def test_a_host_that_is_not_there_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: WindowsHost
) -> None:
    host.disconnect()
    try:
        file = tmp_path / "p.json"
        file.write_text("{}")
        assert remote.main(words(host, file)) == 1
        assert "Connection refused" in capsys.readouterr().err
    finally:
        host.connect()
