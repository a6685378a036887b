"""The one-file program for Windows, run by Wine: as a process, under NSSM, as a service.

`make test-windows` runs these. They want dist/llama-sidecar.exe (make build-windows), and
a llama-server.exe (LLAMA_SERVER_EXE); without that the fake one takes its place, which
the summary of the run says.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import real_parts, windows_parts
from tests.daemon import CHAT, Daemon, free_port_range, wait_until
from tests.windows_parts import EXE, FAKE, REPO, Wine, windows_path

pytestmark = [
    pytest.mark.windows,
    pytest.mark.timeout(300),
    # A pipe may be held by one of Wine's own programs until they all end.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

START_S = 90.0
GONE_S = 2.0  # the job object ends children at once
NAME = "llama-sidecar"

Settings = dict[str, str]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wine]:
    folder = tmp_path_factory.mktemp("wine") / "prefix"
    try:
        windows_parts.check_packages("wine64", "gcc-mingw-w64-x86-64")
        windows_parts.fake_server()
    except RuntimeError as exc:
        pytest.fail(str(exc))
    if not EXE.exists():
        pytest.fail(f"there is no {EXE}: make build-windows")
    try:
        with windows_parts.prefix(folder) as started:
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # it takes 700 MB


def real_settings(folder: Path) -> Settings:
    """The daemon over the real llama-server.exe and SmolLM2; over the fake if there is none."""
    folder.mkdir(exist_ok=True)
    if windows_parts.real_server():
        server, models = windows_parts.llama_server(), [real_parts.smollm2(), real_parts.tiny()]
    else:
        server, models = FAKE, [folder / "smollm2.json", folder / "tiny.json"]
        for model in models:
            model.write_text("{}")
    named = dict(zip(("smollm2", "tiny"), map(windows_path, models), strict=True))
    return settings(folder, server, named) | {
        "BASE_ARGS": '["-c","2048","-t","1","--no-mmap"]',
        "MAX_SIDECARS": "1",
    }


def fake_settings(folder: Path, models: Mapping[str, Mapping[str, object]]) -> Settings:
    for name, switches in models.items():
        (folder / f"{name}.json").write_text(json.dumps(switches))
    return settings(folder, FAKE, {name: f"{name}.json" for name in models})


def settings(folder: Path, server: Path, models: Mapping[str, object]) -> Settings:
    file = folder / "models.map"
    file.write_text(json.dumps(models, ensure_ascii=False), encoding="utf-8")
    first, last = free_port_range().split("-")
    return {
        "LLAMA_SERVER_BIN": windows_path(server),
        "MODEL_DIR_MAP_FILE": windows_path(file),
        "LLAMA_SIDECAR_BIND": f"127.0.0.1:{first}",
        "PORT_RANGE": f"{int(first) + 1}-{last}",
        "BASE_ARGS": "[]",
        "HEALTH_TIMEOUT_SECONDS": "60",
        "LLAMA_SIDECAR_STATE_DIR": windows_path(folder / "state"),
    }


@contextlib.contextmanager
def running(
    windows: Wine,
    folder: Path,
    env: Settings,
    words: Sequence[str] = (),
    variables: Settings | None = None,
) -> Iterator[Daemon]:
    """The exe as a process of its own, ended in any case; it is given `env` or `variables`."""
    process = subprocess.Popen(
        [windows_parts.wine(), str(EXE), *words],
        env=windows.environment(env if variables is None else variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    )
    daemon = Daemon(process, folder)
    daemon.port = port_of(env)
    try:
        wait_until(lambda: "listening on http://127.0.0.1" in daemon.log, "it listens", START_S)
        yield daemon
    finally:
        end(windows, folder)
        process.kill()
        process.wait()
        daemon._reader.join(10)
        if process.stdout and not daemon._reader.is_alive():
            process.stdout.close()


def end(windows: Wine, folder: Path) -> None:
    """End the daemon hard, as Windows' Task Manager does; its state file names it."""
    for file in (folder / "state").glob("[0-9]*.json"):
        windows.run(["taskkill", "/f", "/pid", file.stem])
        file.unlink(missing_ok=True)


def port_of(env: Settings) -> int:
    return int(env["LLAMA_SIDECAR_BIND"].partition(":")[2])


def ask(env: Settings, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(env), timeout=120)
    with contextlib.closing(connection):
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def chat(env: Settings, model: str) -> int:
    message = {"role": "user", "content": "Count."}
    return ask(env, "POST", CHAT, {"model": model, "messages": [message], "max_tokens": 6})[0]


def answers(env: Settings) -> bool:
    try:
        return ask(env, "GET", "/health")[0] == 200
    except OSError:
        return False


def processes(env: Settings) -> list[int]:
    """Children of this daemon, in this machine's numbers: only they have a port of its range."""
    first, last = map(int, env["PORT_RANGE"].split("-"))
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ports = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--port"]
            if any(port.isdigit() and first <= int(port) <= last for port in ports):
                found.append(int(folder.name))
    return found


# --- the program


def test_it_says_its_version_and_carries_it(windows: Wine) -> None:
    said = windows.run([EXE, "--version"]).stdout.decode().split()
    assert said[0] == NAME
    carried = EXE.read_bytes().decode("utf-16-le", errors="ignore")
    other_half = EXE.read_bytes()[1:].decode("utf-16-le", errors="ignore")
    assert f"ProductVersion\0{said[1]}" in (carried + other_half).replace("\0\0", "\0")


def test_its_help_names_the_runner_of_the_bench_which_it_holds(windows: Wine) -> None:
    assert "bench-run" in windows.run([EXE, "--help"]).stdout.decode()
    assert windows.run([EXE, "bench-run", "--help"]).stdout.decode().startswith("usage: bench-run ")


def test_what_it_prints_is_utf8(windows: Wine, tmp_path: Path) -> None:
    env = fake_settings(tmp_path, {"münchen-模型": {}})
    said = windows.run([EXE, "check", "--model", "münchen-模型"], env=env).stdout.decode("utf-8")
    assert "münchen-模型" in said


def test_chats_are_served_whole_and_streamed_by_the_real_server(
    windows: Wine, tmp_path: Path
) -> None:
    env = real_settings(tmp_path)
    with running(windows, tmp_path, env) as daemon:
        status, named, body = daemon.chat("smollm2", max_tokens=6)
        assert (status, named["x-sidecar-start"]) == (200, "started")
        assert body["choices"][0]["message"]["content"]
        first = processes(env)
        status, named, body = daemon.chat("smollm2", max_tokens=6, stream=True)
        assert (status, named["x-sidecar-start"]) == (200, "reused")
        assert body.startswith(b"data: ")
        assert body.endswith(b"data: [DONE]\n\n")
        assert processes(env) == first, "it outlived the request that started it"
        status, named, _ = daemon.chat("tiny", max_tokens=6)
        assert (status, named["x-sidecar-start"]) == (200, "evicted")
        assert daemon.ask("DELETE", f"/sidecars/{named['x-sidecar-hash']}")[0] == 200
        wait_until(lambda: processes(env) == [], "the deleted one is gone", 10)


def test_children_end_with_a_daemon_that_is_terminated(windows: Wine, tmp_path: Path) -> None:
    env = real_settings(tmp_path)
    with running(windows, tmp_path, env) as daemon:
        assert daemon.chat("tiny", max_tokens=2)[0] == 200
        assert len(processes(env)) >= 1
        (file,) = (tmp_path / "state").glob("[0-9]*.json")
        windows.run(["taskkill", "/f", "/pid", file.stem])
        wait_until(lambda: processes(env) == [], "no llama-server is left", GONE_S)


def test_whoever_kills_its_launcher_ends_it_and_its_children(windows: Wine, tmp_path: Path) -> None:
    env = real_settings(tmp_path)
    with running(windows, tmp_path, env) as daemon:
        assert daemon.chat("tiny", max_tokens=2)[0] == 200
        assert len(processes(env)) >= 1
        daemon.process.kill()  # the one-file program's first process; Python runs in a second
        wait_until(lambda: processes(env) == [], "no llama-server is left", GONE_S)
        wait_until(lambda: not answers(env), "the port is free")


ARGUMENTS = [
    "a b",
    'say "yes" or \\"no\\"',
    "ends with \\",
    "ends with two \\\\",
    '"',
    "100 % & | < > ^",
    "ümläut 模型 😀",
]


def test_every_argument_reaches_the_child_as_it_is(windows: Wine, tmp_path: Path) -> None:
    inner = tmp_path / "mödel földer"
    inner.mkdir()
    (inner / "m.json").write_text("{}")
    rows: dict[str, Any] = {
        f"m{number}": {"path": "mödel földer\\m.json", "args": ["--chat-template", text]}
        for number, text in enumerate(ARGUMENTS)
    }
    env = settings(tmp_path, FAKE, rows) | {"MAX_SIDECARS": "10"}
    with running(windows, tmp_path, env) as daemon:
        seen = []
        for name in rows:
            argv = daemon.chat(name)[2]["echo"]["argv"]
            seen.append(argv[argv.index("--chat-template") + 1])
    assert seen == ARGUMENTS


def test_a_model_in_a_folder_with_an_umlaut_is_loaded(windows: Wine, tmp_path: Path) -> None:
    if not windows_parts.real_server():
        pytest.skip("no llama-server.exe: LLAMA_SERVER_EXE")
    inner = tmp_path / "Größe é"
    inner.mkdir()
    shutil.copy(real_parts.tiny(), inner / "münze.gguf")
    uri = "file:///" + windows_path(inner / "münze.gguf").replace("\\", "/").replace(" ", "%20")
    env = settings(tmp_path, windows_parts.llama_server(), {"m": uri})
    env |= {"BASE_ARGS": '["-c","512","--no-mmap"]'}
    with running(windows, tmp_path, env) as daemon:
        assert daemon.chat("m", max_tokens=2)[0] == 200


def test_ten_megabytes_of_output_block_nothing(windows: Wine, tmp_path: Path) -> None:
    env = fake_settings(tmp_path, {"m": {"flood_bytes_per_request": 10 << 20}})
    with running(windows, tmp_path, env) as daemon:
        assert daemon.chat("m")[0] == 200
        assert daemon.chat("m")[1]["x-sidecar-start"] == "reused"


def test_a_second_daemon_cannot_have_the_same_port(windows: Wine, tmp_path: Path) -> None:
    env = fake_settings(tmp_path, {"m": {}})
    with running(windows, tmp_path, env):
        second = windows.run([EXE], env=env | {"LLAMA_SIDECAR_STATE_DIR": ""})
        assert second.returncode == 2
        assert b"cannot listen on 127.0.0.1:" in second.stdout


# --- NSSM

HOME = "C:\\llama-sidecar"  # where README puts it all


@pytest.fixture
def nssm_env(windows: Wine, tmp_path: Path) -> Iterator[Settings]:
    """A machine as README supposes it, and what its lines for NSSM set, with free ports."""
    drive = windows.folder / "drive_c"
    for name in ("llama-sidecar", "llama.cpp"):
        (drive / name).mkdir()
    env = real_settings(tmp_path)
    shutil.copy(tmp_path / "models.map", drive / "llama-sidecar" / "models.json")
    earlier = EXE.read_bytes() + b"\0"  # another one, to be replaced by EXE
    (drive / "llama-sidecar" / "llama-sidecar.exe").write_bytes(earlier)
    server = windows_parts.real_server() or FAKE
    shutil.copy(server, drive / "llama.cpp" / "llama-server.exe")
    if server == FAKE:
        shutil.copy(FAKE.with_suffix(".py"), drive / "llama.cpp" / "llama-server.py")
    try:
        yield env
    finally:
        windows.run([windows_parts.nssm(), "stop", NAME])
        windows.run([windows_parts.nssm(), "remove", NAME, "confirm"])


def nssm_lines(env: Settings) -> Iterator[list[str]]:
    """README's commands, in its order; only its ports are replaced."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("nssm "):
            ports = line.replace("127.0.0.1:8402", env["LLAMA_SIDECAR_BIND"])
            yield ports.replace("8500-8599", env["PORT_RANGE"]).split()[1:]


def test_nssm_does_what_the_readme_says_and_its_stop_is_a_clean_drain(
    windows: Wine, nssm_env: Settings
) -> None:
    env = nssm_env
    log = windows.folder / "drive_c" / "llama-sidecar" / "sidecar.log"
    starts, is_up = 0, False
    for words in nssm_lines(env):
        if words[0] == "stop" and not is_up:
            continue  # README's next block begins with it
        if words[0] == "start" and starts:
            upgrade(windows)
        done = windows.run([windows_parts.nssm(), *words])
        said = done.stdout.replace(b"\0", b"").decode(errors="replace")
        assert done.returncode == 0, f"nssm {' '.join(words)}: {said}"
        if words[0] == "install":  # NSSM may go on in a process of its own
            wait_until(lambda: is_known_to_nssm(windows), "NSSM has installed it")
        elif words[0] == "start":
            wait_until(lambda: answers(env), "it serves", START_S)
            assert chat(env, "tiny") == 200
            assert len(processes(env)) >= 1
            starts, is_up = starts + 1, True
        elif words[0] == "status":
            assert "SERVICE_RUNNING" in said
        elif words[0] == "stop":
            is_up = False
            assert processes(env) == []
            text = log.read_text(encoding="utf-8", errors="replace")
            assert re.search(r"signal \d+: draining", text)
            assert "stopped" in text.splitlines()[-1]
    assert (starts, words) == (2, ["remove", NAME, "confirm"]), "an upgrade, and the end"


def is_known_to_nssm(windows: Wine) -> bool:
    return windows.run([windows_parts.nssm(), "get", NAME, "Application"]).returncode == 0


def upgrade(windows: Wine) -> None:
    """Copy EXE over the program, which Windows lets nobody do while it runs."""
    program = f"{HOME}\\llama-sidecar.exe"
    done = windows.run(["cmd", "/c", "copy", "/y", windows_path(EXE), program])
    assert done.returncode == 0, done.stdout
    installed = windows.folder / "drive_c" / "llama-sidecar" / "llama-sidecar.exe"
    assert installed.read_bytes() == EXE.read_bytes()


# --- a service of its own


def service(windows: Wine, action: str, env: Settings | None = None) -> tuple[int, str]:
    done = windows.run([EXE, "service", action], env=env)
    return done.returncode, done.stdout.decode().strip()


@pytest.fixture
def no_service(windows: Wine) -> Iterator[None]:
    yield
    service(windows, "stop")
    service(windows, "remove")


@pytest.mark.usefixtures("no_service")
def test_the_service_is_installed_started_used_stopped_and_removed(
    windows: Wine, tmp_path: Path
) -> None:
    log = tmp_path / "sidecar.log"
    env = real_settings(tmp_path) | {"LLAMA_SIDECAR_LOG_FILE": windows_path(log)}
    code, said = service(windows, "status")
    assert (code, "error 1060" in said, "install it first" in said) == (1, True, True)
    assert service(windows, "install", env)[0] == 0
    code, said = service(windows, "install", env)
    assert (code, "error 1073" in said) == (1, True)
    assert service(windows, "status") == (0, "stopped")
    key = f"HKLM\\System\\CurrentControlSet\\Services\\{NAME}"
    asked = windows.run(["reg", "query", key, "/v", "PreshutdownTimeout"]).stdout.decode()
    assert int(asked.split()[-1], 0) == 180_000
    assert service(windows, "start") == (0, "started")
    wait_until(lambda: answers(env), "it serves", START_S)
    wait_until(lambda: service(windows, "status") == (0, "running"), "it says so", START_S)
    assert chat(env, "tiny") == 200
    assert len(processes(env)) >= 1
    assert service(windows, "stop") == (0, "stopped")
    assert processes(env) == []
    assert "draining" in log.read_text(encoding="utf-8")
    assert service(windows, "status") == (0, "stopped")
    assert service(windows, "remove") == (0, "removed")
    assert "error 1060" in service(windows, "status")[1]


@pytest.mark.usefixtures("no_service")
def test_a_service_that_is_stopped_lets_a_running_answer_end(windows: Wine, tmp_path: Path) -> None:
    env = fake_settings(tmp_path, {"m": {"answer_gate": True}})
    env |= {"LLAMA_SIDECAR_LOG_FILE": windows_path(tmp_path / "sidecar.log")}
    assert service(windows, "install", env)[0] == 0
    assert service(windows, "start")[0] == 0
    wait_until(lambda: answers(env), "it serves", START_S)
    got: list[int] = []
    asking = threading.Thread(target=lambda: got.append(chat(env, "m")))
    asking.start()
    wait_until((tmp_path / "m.json.events").exists, "it is asked", START_S)
    stopping = threading.Thread(target=service, args=(windows, "stop"))
    stopping.start()
    wait_until(lambda: not answers(env), "it drains", START_S)
    checkpoints: set[str] = set()
    deadline = time.monotonic() + 60
    while len(checkpoints) < 2 and time.monotonic() < deadline:
        said = windows.run(["sc", "query", NAME]).stdout.decode(errors="replace")
        checkpoints |= set(re.findall(r"CHECKPOINT\s*:\s*(0x[0-9a-f]+)", said))
    (tmp_path / "m.json.answer_gate").touch()
    asking.join(60)
    stopping.join(60)
    assert got == [200]
    assert len(checkpoints) >= 2, "it showed Windows that it goes on"
    assert service(windows, "status") == (0, "stopped")


def test_without_the_service_manager_service_run_says_what_it_is_for(windows: Wine) -> None:
    code, said = service(windows, "run")
    assert code == 1
    assert "Service Control Manager" in said


# --- a task of the Task Scheduler


def test_a_task_is_registered_with_its_variables_runs_with_them_and_is_removed(
    windows: Wine, tmp_path: Path
) -> None:
    drive = windows.folder / "drive_c"
    env = fake_settings(tmp_path, {"m": {}})
    done = windows.run([EXE, "task", "install"], env=env)
    assert (done.returncode, done.stdout[:10]) == (0, b"installed:")
    registered = drive / "windows" / "system32" / "tasks" / NAME
    assert "<ExecutionTimeLimit>PT0S</ExecutionTimeLimit>" in registered.read_text("utf-8")
    (variables,) = drive.glob("users/*/AppData/Local/llama-sidecar/task.json")
    assert json.loads(variables.read_text("utf-8")) == env
    state = {"LLAMA_SIDECAR_STATE_DIR": env["LLAMA_SIDECAR_STATE_DIR"]}
    with running(windows, tmp_path, env, ["task", "run"], state) as daemon:
        assert daemon.chat("m")[0] == 200
    done = windows.run([EXE, "task", "remove"])
    assert (done.returncode, done.stdout.strip()) == (0, b"removed")
    assert not registered.exists()
    assert list(variables.parent.glob("task.*")) == []
