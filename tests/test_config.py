"""Configuration: the environment variables, the model map and the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import llama_sidecar
import winsvc
from llama_sidecar import Config, ConfigError, LiveCatalog, Model, read_config
from tests.daemon import (
    FAKE_SERVER,
    ROOT,
    bare_environment,
    free_port_range,
    running_daemon,
    started_daemon,
)
from validator import FlagsRefused

CONTRACT = {
    "LLAMA_SERVER_BIN": "",
    "MODEL_DIR_MAP_FILE": "",
    "LLAMA_SIDECAR_BIND": "127.0.0.1:8402",
    "PORT_RANGE": "8500-8599",
    "MAX_SIDECARS": "2",
    "LOG_LEVEL": "info",
    "BASE_ARGS": '["-ngl","999","-c","32768","--flash-attn","on","--no-mmap"]',
    "HEALTH_TIMEOUT_SECONDS": "60",
    "HEALTH_INTERVAL_SECONDS": "30",
}


def required(folder: Path, models: object = None, encoding: str = "utf-8") -> dict[str, str]:
    """The two variables without a default, the map holding `models`."""
    file = folder / "models.map"
    text = models if isinstance(models, str) else json.dumps(models or {"a": "a.gguf"})
    file.write_text(text, encoding=encoding)
    return {"LLAMA_SERVER_BIN": str(FAKE_SERVER), "MODEL_DIR_MAP_FILE": str(file)}


def config_of(folder: Path, models: object = None, **variables: str) -> Config:
    return read_config(required(folder, models) | variables)


def args_of(config: Config, model: Model) -> tuple[str, ...]:
    """The flags of the process that this model gets."""
    validator = config.catalog.validator
    return validator.resolve(model.id, model.path, model.args).spec.args


def faults_of(variables: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(variables)
    return list(caught.value.faults)


def run_daemon(variables: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    """A run that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, str(ROOT / "llama_sidecar.py"), *args],
        env=bare_environment() | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


# --- defaults


def test_the_nine_variables_of_the_contract_have_exactly_these_defaults() -> None:
    assert {name: llama_sidecar.DEFAULTS[name] for name in CONTRACT} == CONTRACT
    assert list(llama_sidecar.DEFAULTS)[: len(CONTRACT)] == list(CONTRACT)
    others = set(llama_sidecar.DEFAULTS) - set(CONTRACT)
    assert [name for name in others if not name.startswith("LLAMA_SIDECAR_")] == []


def test_with_the_required_two_alone_the_defaults_are_in_force(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert config.bind == ("127.0.0.1", 8402)
    assert config.ports == range(8500, 8600)
    assert config.max_sidecars == 2
    assert config.log_level == "info"
    assert config.health_timeout_s == 60
    assert config.health_interval_s == 30
    assert config.api_key is None
    assert config.queue_size == 64
    assert config.queue_s == 300
    assert config.max_body_bytes == 64 * 1024 * 1024
    assert config.drain_s == 30
    model = config.catalog.models["a"]
    args = args_of(config, model)
    settings = dict(zip(args[::2], args[1::2], strict=True))
    assert settings["--gpu-layers"] == "999"
    assert settings["--ctx-size"] == "32768"
    assert settings["--flash-attn"] == "on"


@pytest.mark.parametrize("name", sorted(set(llama_sidecar.DEFAULTS) - set(list(CONTRACT)[:2])))
def test_an_empty_variable_is_as_good_as_none(tmp_path: Path, name: str) -> None:
    unset, empty = config_of(tmp_path), config_of(tmp_path, **{name: ""})
    for field in ("bind", "ports", "max_sidecars", "log_level", "api_key", "queue_s", "drain_s"):
        assert getattr(empty, field) == getattr(unset, field)


def test_every_variable_is_read(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        LLAMA_SIDECAR_BIND="[::1]:9000",
        PORT_RANGE="9100-9104",
        MAX_SIDECARS="5",
        LOG_LEVEL="error",
        BASE_ARGS="[]",
        HEALTH_TIMEOUT_SECONDS="1.5",
        HEALTH_INTERVAL_SECONDS="7",
        LLAMA_SIDECAR_API_KEY="k3y",
        LLAMA_SIDECAR_ALLOWED_HOSTS="Box.local, other",
        LLAMA_SIDECAR_QUEUE_SIZE="3",
        LLAMA_SIDECAR_QUEUE_SECONDS="0.25",
        LLAMA_SIDECAR_MAX_BODY_MB="2",
        LLAMA_SIDECAR_MAX_CONNECTIONS="9",
        LLAMA_SIDECAR_DRAIN_SECONDS="11",
    )
    assert config.bind == ("::1", 9000)
    assert config.ports == range(9100, 9105)
    assert (config.max_sidecars, config.log_level, config.api_key) == (5, "error", "k3y")
    assert (config.health_timeout_s, config.health_interval_s) == (1.5, 7)
    assert config.allowed_hosts == {"box.local", "other"}
    assert (config.queue_size, config.queue_s) == (3, 0.25)
    assert (config.max_body_bytes, config.max_connections, config.drain_s) == (2 << 20, 9, 11)
    model = config.catalog.models["a"]
    assert args_of(config, model) == ()


# --- bad values

BAD_VALUES = [
    ("LLAMA_SERVER_BIN", "/nowhere/llama-server", "takes the path of llama-server"),
    ("LLAMA_SERVER_BIN", "/", "takes the path of llama-server"),
    ("LLAMA_SIDECAR_BIND", "8402", "takes ADDRESS:PORT"),
    ("LLAMA_SIDECAR_BIND", "127.0.0.1", "takes ADDRESS:PORT"),
    ("LLAMA_SIDECAR_BIND", "127.0.0.1:65536", "takes ADDRESS:PORT"),
    ("LLAMA_SIDECAR_BIND", "::1:8402", "takes ADDRESS:PORT"),
    ("LLAMA_SIDECAR_BIND", "127.0.0.1:8402 ", "takes ADDRESS:PORT"),
    ("LLAMA_SIDECAR_BIND", "0.0.0.0:8402", "LLAMA_SIDECAR_API_KEY"),
    ("LLAMA_SIDECAR_BIND", "[::]:8402", "LLAMA_SIDECAR_API_KEY"),
    ("LLAMA_SIDECAR_BIND", "desktop.lan:8402", "LLAMA_SIDECAR_API_KEY"),
    ("PORT_RANGE", "8500", "takes FIRST-LAST"),
    ("PORT_RANGE", "8599-8500", "takes FIRST-LAST"),
    ("PORT_RANGE", "0-100", "takes FIRST-LAST"),
    ("PORT_RANGE", "65000-65536", "takes FIRST-LAST"),
    ("PORT_RANGE", "8500-8500", "takes at least MAX_SIDECARS"),
    ("PORT_RANGE", "8400-8410", "not the port of LLAMA_SIDECAR_BIND"),
    ("MAX_SIDECARS", "0", "takes a whole number from 1 to 64"),
    ("MAX_SIDECARS", "65", "takes a whole number from 1 to 64"),
    ("MAX_SIDECARS", "-1", "takes a whole number from 1 to 64"),
    ("MAX_SIDECARS", "2.0", "takes a whole number from 1 to 64"),
    ("MAX_SIDECARS", "٢", "takes a whole number from 1 to 64"),
    ("LOG_LEVEL", "INFO", "takes one of debug, info, warn, error"),
    ("LOG_LEVEL", "verbose", "takes one of debug, info, warn, error"),
    ("BASE_ARGS", "-c 1", "takes a JSON array of strings"),
    ("BASE_ARGS", '"-c 1"', "takes a JSON array of strings"),
    ("BASE_ARGS", '["-c", 1]', "takes a JSON array of strings"),
    ("BASE_ARGS", "{}", "takes a JSON array of strings"),
    ("BASE_ARGS", "[" * 100_000, "takes a JSON array of strings"),
    ("HEALTH_TIMEOUT_SECONDS", "0", "takes a number of seconds above 0"),
    ("HEALTH_TIMEOUT_SECONDS", "-1", "takes a number of seconds above 0"),
    ("HEALTH_TIMEOUT_SECONDS", "nan", "takes a number of seconds above 0"),
    ("HEALTH_INTERVAL_SECONDS", "inf", "takes a number of seconds above 0"),
    ("HEALTH_INTERVAL_SECONDS", "1e3", "takes a number of seconds above 0"),
    ("HEALTH_INTERVAL_SECONDS", "30s", "takes a number of seconds above 0"),
    ("LLAMA_SIDECAR_ALLOW_NO_KEY", "yes", "takes 0 or 1"),
    ("LLAMA_SIDECAR_ALLOWED_HOSTS", "box:80", "takes host names without ports"),
    ("LLAMA_SIDECAR_QUEUE_SIZE", "0", "takes a whole number from 1 to"),
    ("LLAMA_SIDECAR_QUEUE_SECONDS", "0.0", "takes a number of seconds above 0"),
    ("LLAMA_SIDECAR_MAX_BODY_MB", "1025", "takes a whole number from 1 to 1024"),
    ("LLAMA_SIDECAR_MAX_CONNECTIONS", "many", "takes a whole number from 1 to"),
    ("LLAMA_SIDECAR_DRAIN_SECONDS", "30 s", "takes a number of seconds above 0"),
    ("LLAMA_SIDECAR_UNKNOWN_FLAGS", "yes", "takes refuse or allow"),
    ("LLAMA_SIDECAR_UNKNOWN_FLAGS", "Allow", "takes refuse or allow"),
    ("LLAMA_SIDECAR_SHARE", "1", "takes off or on"),
    ("LLAMA_SIDECAR_SHARE", " off", "takes off or on"),
    ("LLAMA_SIDECAR_ISOLATE", "on", "takes off or agent"),
    ("LLAMA_SIDECAR_CPUS", "2", "takes all or one"),
    ("LLAMA_SIDECAR_AGENT_FLAGS", "--nonsense", "is no flag that llama-server is known to take"),
    ("LLAMA_SIDECAR_AGENT_FLAGS", "--lora", "needs the folder that agents may use"),
    ("LLAMA_SIDECAR_AGENT_FLAGS", "--lora=none", "names no existing folder"),
    ("LLAMA_SIDECAR_AGENT_FLAGS", "--device=.", "takes no folder"),
    ("LLAMA_SIDECAR_AGENT_FLAGS", "--port", "cannot be opened to agents"),
]


@pytest.mark.parametrize(("name", "value", "takes"), BAD_VALUES)
def test_a_bad_value_is_one_line_with_what_it_held_and_what_it_takes(
    tmp_path: Path, name: str, value: str, takes: str
) -> None:
    faults = faults_of(required(tmp_path) | {name: value})
    assert len(faults) == 1, faults
    assert faults[0].startswith(f"{name}: ")
    shown = value.partition(":8402")[0] if "API_KEY" in takes else value
    assert shown.strip("[]")[:50] in faults[0]
    assert takes in faults[0]
    assert "\n" not in faults[0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('["--port", "1"]', "--port"),
        ('["--api-key", "x"]', "--api-key"),
        ('["--nonsense"]', "Did you mean"),
        ('["-c"]', "--ctx-size"),
    ],
)
def test_a_flag_that_cannot_be_a_base_arg_stops_the_start(
    tmp_path: Path, value: str, words: str
) -> None:
    (fault,) = faults_of(required(tmp_path) | {"BASE_ARGS": value})
    assert fault.startswith("BASE_ARGS: ")
    assert words in fault


@pytest.mark.parametrize("key", ["two words", "trailing ", "ключ", "tab\t"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(tmp_path: Path, key: str) -> None:
    (fault,) = faults_of(required(tmp_path) | {"LLAMA_SIDECAR_API_KEY": key})
    assert fault.startswith("LLAMA_SIDECAR_API_KEY: ")
    assert key not in fault


def test_all_faults_are_reported_in_one_run_which_ends_with_2(tmp_path: Path) -> None:
    ended = run_daemon(
        {
            "LLAMA_SERVER_BIN": "/nowhere/x",
            "MODEL_DIR_MAP_FILE": str(tmp_path / "none.json"),
            "LLAMA_SIDECAR_BIND": "nonsense",
            "PORT_RANGE": "9-1",
            "MAX_SIDECARS": "none",
            "LOG_LEVEL": "loud\x1b[31m\nnot a line of its own",
            "BASE_ARGS": "{",
            "HEALTH_TIMEOUT_SECONDS": "0",
            "HEALTH_INTERVAL_SECONDS": "never",
        }
    )
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == sorted(CONTRACT)
    assert all(line.startswith("llama-sidecar: ") for line in lines)
    assert "\x1b" not in ended.stderr


def test_a_port_that_is_taken_ends_the_start_with_2(tmp_path: Path) -> None:
    settings = required(tmp_path) | {"LLAMA_SIDECAR_BIND": "127.0.0.1:0"}
    settings["PORT_RANGE"] = free_port_range()
    with started_daemon(settings, tmp_path) as daemon:
        ended = run_daemon(settings | {"LLAMA_SIDECAR_BIND": f"127.0.0.1:{daemon.port}"})
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{daemon.port}" in ended.stderr


@pytest.mark.parametrize(
    "opening",
    [{"LLAMA_SIDECAR_API_KEY": "k3y"}, {"LLAMA_SIDECAR_ALLOW_NO_KEY": "1"}],
    ids=str,
)
def test_an_address_for_others_needs_a_key_or_the_word_that_none_is_meant(
    tmp_path: Path, opening: dict[str, str]
) -> None:
    config = config_of(tmp_path, None, LLAMA_SIDECAR_BIND="0.0.0.0:8402", **opening)
    assert config.bind == ("0.0.0.0", 8402)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "[::1]", "localhost"])
def test_loopback_needs_no_key(tmp_path: Path, host: str) -> None:
    assert config_of(tmp_path, LLAMA_SIDECAR_BIND=f"{host}:8402").bind == (host.strip("[]"), 8402)


# --- what agents may say


def flags_of(config: Config, header: str) -> tuple[str, ...]:
    model, validator = config.catalog.models["a"], config.catalog.validator
    return validator.resolve(model.id, model.path, model.args, header).spec.args


def refusal_of(config: Config, header: str) -> str:
    with pytest.raises(FlagsRefused) as caught:
        flags_of(config, header)
    return str(caught.value)


def test_an_opened_flags_folder_is_relative_to_the_map_wherever_the_daemon_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "here" / "adapters" / "x.gguf"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "elsewhere").mkdir()
    variables = required(tmp_path / "here") | {"BASE_ARGS": "[]"}
    variables["MODEL_DIR_MAP_FILE"] = str(Path("here", "models.map"))
    variables["LLAMA_SIDECAR_AGENT_FLAGS"] = "--lora=adapters, --device"
    monkeypatch.chdir(tmp_path)
    config = read_config(variables)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert flags_of(config, "--lora x.gguf") == ("--lora", str(file.resolve()))
    assert flags_of(config, "--device none") == ("--device", "none")
    assert "LLAMA_SIDECAR_AGENT_FLAGS=--spec-draft-device" in refusal_of(
        config, "--spec-draft-device none"
    )


def test_every_fault_of_the_opened_flags_is_reported_beside_those_of_the_base_args(
    tmp_path: Path,
) -> None:
    variables = {"LLAMA_SIDECAR_AGENT_FLAGS": "--nonsense,--port,--device", "BASE_ARGS": '["-q"]'}
    faults = faults_of(required(tmp_path) | variables)
    assert [fault.partition(": ")[0] for fault in faults] == [
        "LLAMA_SIDECAR_AGENT_FLAGS",
        "LLAMA_SIDECAR_AGENT_FLAGS",
        "BASE_ARGS",
    ]
    assert ["--nonsense" in faults[0], "--port" in faults[1], "-q" in faults[2]] == [True] * 3


@pytest.mark.parametrize(
    ("settings", "share", "isolates"),
    [
        ({}, True, False),
        ({"LLAMA_SIDECAR_SHARE": "on", "LLAMA_SIDECAR_ISOLATE": "off"}, True, False),
        ({"LLAMA_SIDECAR_SHARE": "off"}, False, False),
        ({"LLAMA_SIDECAR_ISOLATE": "agent"}, True, True),
    ],
)
def test_what_is_shared_and_who_is_isolated_can_be_said(
    tmp_path: Path, settings: dict[str, str], share: bool, isolates: bool
) -> None:
    config = config_of(tmp_path, **(settings | {"BASE_ARGS": "[]"}))
    assert flags_of(config, "--temp 0.5") == (() if share else ("--temp", "0.5"))
    assert config.isolates_agents is isolates


# --- llama-server is replaced while the daemon runs

OLD_HELP = """\
-m,    --model FNAME                    model path to load
--host HOST                             ip address to listen
--port PORT                             port to listen
-c,    --ctx-size N                     size of the prompt context
--mmap, --no-mmap                       whether to memory-map model
--no-webui                              no page
"""
NEW_HELP = OLD_HELP.replace("--mmap, --no-mmap ", "--load-mode MODE ").replace(
    "--no-webui", "--no-ui   "
)
NEW_HELP += "--glow N                                a flag of the future\n"


class Binary:
    """A program that prints a help text, and can be replaced by another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / ("llama-server.exe" if sys.platform == "win32" else "llama-server")
        self._calls = folder / "calls"

    def becomes(self, help_text: str, exit_code: int = 0) -> None:
        text = self.folder / "help.txt"
        text.write_text(help_text)
        new = self.folder / "llama-server.new"
        script = (
            f"import sys\nopen({str(self._calls)!r}, 'a').write('x ')\n"
            f"print(open({str(text)!r}).read(), end='')\nsys.exit({exit_code})\n"
        )
        if sys.platform == "win32":  # the fake's program runs whatever script lies beside it
            self.file.with_suffix(".py").write_text(script)
            new.write_bytes(FAKE_SERVER.read_bytes() + str(time.monotonic_ns()).encode())
        else:
            new.write_text(f"#!{sys.executable}\n{script}# {time.monotonic_ns()}\n")
            new.chmod(0o755)
        new.replace(self.file)

    @property
    def times_asked(self) -> int:
        return len(self._calls.read_text().split())


@pytest.fixture
def binary(tmp_path: Path) -> Binary:
    binary = Binary(tmp_path)
    binary.becomes(OLD_HELP)
    return binary


def config_with(binary: Binary, **variables: str) -> Config:
    base = {"LLAMA_SERVER_BIN": str(binary.file), "BASE_ARGS": '["--no-mmap"]'}
    models = {"a": {"path": "a.gguf", "args": ["-c", "4096"], "aliases": ["b"]}}
    return read_config(required(binary.folder, models) | base | variables)


def live_args(live: LiveCatalog, header: str = "") -> tuple[str, ...]:
    catalog = live.current()
    model = catalog.models["a"]
    return catalog.validator.resolve(model.id, model.path, model.args, header).spec.args


def test_a_llama_server_that_stays_is_asked_once(binary: Binary) -> None:
    config = config_with(binary)
    live = LiveCatalog(config, trust_s=0)
    assert live.current() is live.current() is config.catalog
    assert binary.times_asked == 1


def test_a_replaced_llama_server_is_asked_for_its_flags_again(binary: Binary) -> None:
    live = LiveCatalog(config_with(binary, LLAMA_SIDECAR_UNKNOWN_FLAGS="allow"), trust_s=0)
    assert live_args(live) == ("--ctx-size", "4096", "--no-mmap")
    assert live.current().own_args() == ("--no-webui",)
    with pytest.raises(FlagsRefused, match="--glow"):
        live_args(live, "--glow 1")
    binary.becomes(NEW_HELP)
    assert live_args(live) == ("--ctx-size", "4096", "--load-mode", "none")
    assert live_args(live, "--glow 1 -c 8192")[:4] == ("--ctx-size", "8192", "--glow", "1")
    assert live.current().own_args() == ("--no-ui",)
    assert live.current().models["b"] is live.current().models["a"]
    assert binary.times_asked == 2


BROKEN = {
    "ends with an error": ("", 1),
    "is another program": ("usage: something else\n", 0),
    "lost a flag of the base args": (OLD_HELP.replace("--mmap, --no-mmap", "--other"), 0),
    "lost a flag of a model": (OLD_HELP.replace("-c,    --ctx-size N", "--other N"), 0),
}


@pytest.mark.parametrize(("help_text", "code"), BROKEN.values(), ids=BROKEN.keys())
def test_a_replacement_that_cannot_be_used_leaves_what_was_known(
    binary: Binary, caplog: pytest.LogCaptureFixture, help_text: str, code: int
) -> None:
    live = LiveCatalog(config_with(binary), trust_s=0)
    before = live.current()
    binary.becomes(help_text, code)
    assert live.current() is live.current() is live.current() is before
    assert binary.times_asked == 2
    (warning,) = [record for record in caplog.records if "has changed" in record.message]
    assert warning.levelname == "WARNING"
    assert str(binary.file) in warning.message
    binary.becomes(NEW_HELP)
    assert live_args(live) == ("--ctx-size", "4096", "--load-mode", "none")


def test_a_llama_server_that_vanished_leaves_what_was_known(
    binary: Binary, caplog: pytest.LogCaptureFixture
) -> None:
    live = LiveCatalog(config_with(binary), trust_s=0)
    before = live.current()
    caplog.clear()
    binary.file.unlink()
    assert live.current() is before
    assert caplog.records == []
    binary.becomes(NEW_HELP)
    assert live.current() is not before


def test_threads_that_see_the_change_together_ask_once(binary: Binary) -> None:
    live = LiveCatalog(config_with(binary), trust_s=0)
    binary.becomes(NEW_HELP)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: live_args(live), range(16)))
    assert set(found) == {("--ctx-size", "4096", "--load-mode", "none")}
    assert binary.times_asked == 2


# --- the model map


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_map_is_utf_8_with_or_without_a_bom(tmp_path: Path, encoding: str) -> None:
    variables = required(tmp_path, '{"模型": "é.gguf"}', encoding)
    assert read_config(variables).catalog.models["模型"].path == tmp_path / "é.gguf"


def test_an_entry_is_a_path_or_an_object(tmp_path: Path) -> None:
    elsewhere = tmp_path.parent / "elsewhere.gguf"
    entry = {"path": str(elsewhere), "args": ["-c", "8192"], "aliases": ["b1", "b2"]}
    config = config_of(tmp_path, {"a": "sub/a.gguf", "b": entry | {"pinned": True}})
    a, b = config.catalog.models["a"], config.catalog.models["b"]
    assert list(config.catalog.models) == ["a", "b", "b1", "b2"]
    assert config.catalog.models["b1"] is config.catalog.models["b2"] is b
    assert (a.path, a.aliases, a.is_pinned) == (tmp_path / "sub" / "a.gguf", (), False)
    assert (b.path, b.aliases, b.is_pinned) == (elsewhere, ("b1", "b2"), True)
    args = args_of(config, b)
    assert args[args.index("--ctx-size") + 1] == "8192"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///C:/models/x.gguf", "C:/models/x.gguf"),
        ("FILE:///c:/a%20b/m%C3%BCnchen.gguf", "c:/a b/münchen.gguf"),
        ("file:/C:/models/x.gguf", "C:/models/x.gguf"),
        ("file://localhost/C:/x.gguf", "C:/x.gguf"),
        ("file:///C:\\models\\x.gguf", "C:/models/x.gguf"),
        ("file://server/share/x.gguf", "//server/share/x.gguf"),
        ("C:\\models\\x.gguf", "C:/models/x.gguf"),
        ("sub\\x.gguf", "sub/x.gguf"),
    ]
    if sys.platform == "win32"
    else [
        ("file:///models/x.gguf", "/models/x.gguf"),
        ("FILE:///a%20b/m%C3%BCnchen%23%3F.gguf", "/a b/münchen#?.gguf"),
        ("file:/models/x.gguf", "/models/x.gguf"),
        ("file://localhost/x.gguf", "/x.gguf"),
        ("file:sub/x.gguf", "sub/x.gguf"),
        ("sub%20/x.gguf", "sub%20/x.gguf"),
    ],
)
def test_a_model_may_be_named_by_a_file_uri(tmp_path: Path, uri: str, path: str) -> None:
    assert config_of(tmp_path, {"a": uri}).catalog.models["a"].path == tmp_path / path


@pytest.mark.skipif(sys.platform == "win32", reason="there it names a share of that server")
def test_a_file_of_another_machine_is_refused(tmp_path: Path) -> None:
    (fault,) = faults_of(required(tmp_path, {"a": "file://server/x.gguf"}))
    assert "a file of this machine" in fault


@pytest.mark.parametrize("uri", ["file:", "file://", "file:///%FF"])
def test_a_uri_that_names_no_file_is_refused(tmp_path: Path, uri: str) -> None:
    (fault,) = faults_of(required(tmp_path, {"a": uri}))
    assert repr(uri) in fault


def test_relative_paths_are_relative_to_the_map_wherever_the_daemon_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    variables = required(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    variables["MODEL_DIR_MAP_FILE"] = str(Path("here", "models.map"))
    assert read_config(variables).catalog.models["a"].path == tmp_path / "here" / "a.gguf"


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "takes a JSON object"),
        ("{}", "takes a JSON object"),
        ('"a.gguf"', "takes a JSON object"),
        ('{"a": 1}', "'a': takes a path, or an object"),
        ('{"a": null}', "'a': takes a path, or an object"),
        ('{"a": {}}', "'a': takes a path, or an object"),
        ('{"a": {"path": 1}}', "'a': takes a path, or an object"),
        ('{"a": {"path": "x", "arg": []}}', "'a': unknown arg"),
        ('{"a": {"path": "x", "args": "-c 1"}}', "'a': args takes an array of strings"),
        ('{"a": {"path": "x", "args": [1]}}', "'a': args takes an array of strings"),
        ('{"a": {"path": "x", "aliases": "b"}}', "'a': aliases takes an array of strings"),
        ('{"a": {"path": "x", "pinned": 1}}', "'a': pinned takes true or false"),
        ('{"a": {"path": "x", "args": ["--host", "::"]}}', "'a': --host"),
        ('{"": "x"}', "a model's name cannot be empty"),
        ('{"a\\nb": "x"}', "control characters"),
        ('{"a": {"path": "x", "aliases": ["b"]}, "b": "y"}', "'b' names two models"),
        (
            '{"a": {"path": "x", "aliases": ["c"]}, "b": {"path": "y", "aliases": ["c"]}}',
            "'c' names two models",
        ),
    ],
)
def test_a_bad_map_stops_the_start(tmp_path: Path, models: str, words: str) -> None:
    variables = required(tmp_path)
    (tmp_path / "models.map").write_text(models)
    faults = faults_of(variables)
    assert [fault for fault in faults if not fault.startswith("MODEL_DIR_MAP_FILE: ")] == []
    assert words in faults[0]


def test_every_fault_of_the_map_is_reported(tmp_path: Path) -> None:
    faults = faults_of(required(tmp_path, {"a": 1, "b": {"path": "x", "pinned": 1}, "c": "c"}))
    assert [fault.split(": ")[1] for fault in faults] == ["'a'", "'b'"]


def test_a_missing_model_file_is_a_warning_at_start_and_a_404_when_asked_for(
    tmp_path: Path,
) -> None:
    settings = required(tmp_path) | {"LLAMA_SIDECAR_BIND": "127.0.0.1:0", "BASE_ARGS": "[]"}
    settings["PORT_RANGE"] = free_port_range()
    with started_daemon(settings, tmp_path) as daemon:
        warnings = [line for line in daemon.lines if " WARNING " in line]
        assert len(warnings) == 1
        assert f"model a: {tmp_path / 'a.gguf'} is no file" in warnings[0]
        status, _, body = daemon.chat("a")
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        (tmp_path / "a.gguf").write_text("{}")
        assert daemon.chat("a")[0] == 200, "a file that came later is served"


# --- the command line


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_every_variable_with_its_default(word: str) -> None:
    ended = run_daemon({}, word)
    assert (ended.returncode, ended.stderr) == (0, "")
    _, _, variables = ended.stdout.partition("environment variables and their defaults:\n")
    rows = dict(line.split(maxsplit=1) for line in variables.splitlines())
    assert rows == {name: value or "(none)" for name, value in llama_sidecar.DEFAULTS.items()}


def test_version_says_the_version() -> None:
    ended = run_daemon({}, "--version")
    assert (ended.returncode, ended.stdout) == (0, f"llama-sidecar {llama_sidecar.__version__}\n")


# --- the command "check"


def checkable(folder: Path) -> dict[str, str]:
    """Two models whose files exist, over a fake that knows the flags of a real one."""
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_text("{}")
    models = {"a": "a.gguf", "b": {"path": "b.gguf", "args": ["-c", "8192"], "aliases": ["bee"]}}
    return required(folder, models) | {"BASE_ARGS": '["-ngl", "9"]'}


def check(
    folder: Path, *args: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What `check --model ... --json` found."""
    ended = run_daemon(checkable(folder) | variables, "check", *args, "--json")
    assert ended.stdout.count("\n") == 1
    return ended, json.loads(ended.stdout)


def test_check_says_what_every_model_comes_to(tmp_path: Path) -> None:
    ended = run_daemon(checkable(tmp_path), "check")
    assert (ended.returncode, ended.stderr) == (0, "")
    server, *rows = ended.stdout.splitlines()
    assert re.fullmatch(
        rf"llama-server +{re.escape(str(FAKE_SERVER))} \(it knows [0-9]+ flags\)", server
    )
    assert [row.split()[:2] for row in rows] == [["model", "a"], ["model", "b"]]
    assert all(re.search(r" [0-9a-f]{12} ", row) for row in rows)
    assert rows[1].endswith(f" {tmp_path / 'b.gguf'}")


def test_check_notes_what_is_translated(binary: Binary) -> None:
    binary.becomes(NEW_HELP)
    (binary.folder / "a.gguf").touch()
    variables = required(binary.folder) | {
        "LLAMA_SERVER_BIN": str(binary.file),
        "BASE_ARGS": '["--no-mmap"]',
    }
    ended = run_daemon(variables, "check")
    assert ended.returncode == 0
    note = ended.stdout.splitlines()[-1]
    assert re.fullmatch(r"note +--no-mmap is --load-mode none for the llama-server in use\.", note)
    one = run_daemon(variables, "check", "--model", "a")
    assert note.split(maxsplit=1)[1] in one.stdout
    assert "--load-mode none" in one.stdout


def test_check_ends_with_2_where_a_models_file_is_missing(tmp_path: Path) -> None:
    variables = checkable(tmp_path)
    (tmp_path / "b.gguf").unlink()
    ended = run_daemon(variables, "check")
    assert ended.returncode == 2
    assert [row.endswith(" is no file") for row in ended.stdout.splitlines()[1:]] == [False, True]


def test_check_ends_with_2_and_every_fault_where_the_configuration_is_wrong(
    tmp_path: Path,
) -> None:
    wrong = {"MAX_SIDECARS": "0", "LLAMA_SIDECAR_SHARE": "x"}
    for args in ((), ("--model", "a")):
        ended = run_daemon(checkable(tmp_path) | wrong, "check", *args)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert [line.split(": ")[1] for line in ended.stderr.splitlines()] == [
            "MAX_SIDECARS",
            "LLAMA_SIDECAR_SHARE",
        ]


def test_check_starts_nothing(tmp_path: Path) -> None:
    run_daemon(checkable(tmp_path), "check")
    check(tmp_path, "--model", "a")
    assert list(tmp_path.glob("*.starts")) == []


def test_check_of_a_request_says_what_would_run_and_what_travels(tmp_path: Path) -> None:
    flags = "--temp 0.5 -c 4096 --tags x"
    ended, found = check(tmp_path, "--model", "bee", "--flags", flags)
    assert (ended.returncode, found["model"], found["refused"]) == (0, "b", [])
    assert found["request"] == {"temperature": 0.5}
    assert found["notes"] == ["--tags changes no answer and is left off."]
    command = found["command"]
    assert command[0] == str(FAKE_SERVER)
    assert command[command.index("--ctx-size") + 1] == "4096"
    assert command[command.index("--gpu-layers") + 1] == "9"
    assert "--temp" not in command
    text = run_daemon(checkable(tmp_path), "check", "--model", "bee", "--flags", flags)
    assert text.returncode == 0
    rows = dict(line.split(maxsplit=1) for line in text.stdout.splitlines())
    assert rows == {
        "model": "b",
        "hash": found["hash"],
        "command": winsvc.quoted_command(command),
        "request": '{"temperature": 0.5}',
        "note": found["notes"][0],
    }


def test_check_foretells_the_hash_and_the_command_of_the_real_start(tmp_path: Path) -> None:
    with running_daemon(tmp_path, {"m": {}}, BASE_ARGS='["-ngl", "9"]') as daemon:
        _, named, answer = daemon.chat("m", "-c 4096 --temp 1")
    variables = required(tmp_path, {"m": "m.json"}) | {"BASE_ARGS": '["-ngl", "9"]'}
    ended = run_daemon(variables, "check", "--model", "m", "--flags", "--temp 0 -c 4096", "--json")
    found = json.loads(ended.stdout)
    assert found["hash"] == named["x-sidecar-hash"]
    started, foretold = answer["echo"]["argv"], found["command"][1:]
    port = started.index("--port") + 1
    assert foretold[port] == "8500"
    assert foretold[:port] + foretold[port + 1 :] == started[:port] + started[port + 1 :]


@pytest.mark.parametrize("args", [("--flags", "-fa"), ("--flags=-fa",), ("--flags", "-fa on")])
def test_flags_may_begin_with_a_dash(tmp_path: Path, args: tuple[str, ...]) -> None:
    _, found = check(tmp_path, "--model", "a", *args)
    command = found["command"]
    assert command[command.index("--flash-attn") + 1] == "on"


@pytest.mark.parametrize(
    ("endpoint", "request_fields", "is_kept"),
    [
        ("/v1/chat/completions", {"min_p": 0.1}, False),
        ("/v1/messages", {}, True),
        ("/v1/embeddings", {}, False),
        ("/v1/audio/transcriptions", {}, True),
    ],
)
def test_check_knows_what_each_endpoint_can_carry(
    tmp_path: Path, endpoint: str, request_fields: dict[str, float], is_kept: bool
) -> None:
    args = ("--model", "a", "--flags", "--min-p 0.1", "--endpoint", endpoint)
    _, found = check(tmp_path, *args)
    assert found["request"] == request_fields
    assert ("--min-p" in found["command"]) is is_kept


def test_check_of_an_agents_own_process(tmp_path: Path) -> None:
    hashes = [
        check(tmp_path, "--model", "a", *args, LLAMA_SIDECAR_ISOLATE=isolate)[1]["hash"]
        for isolate in ("agent", "off")
        for args in ((), ("--agent-id", "ann"))
    ]
    assert hashes[0] == hashes[2] == hashes[3] != hashes[1]


def test_check_refuses_an_agent_id_that_the_daemon_would_refuse(tmp_path: Path) -> None:
    args = ("--model", "a", "--agent-id", "x" * 129)
    ended, found = check(tmp_path, *args, LLAMA_SIDECAR_ISOLATE="agent")
    assert ended.returncode == 2
    assert found["refused"] == ["X-Agent-Id takes at most 128 printable characters"]


def test_check_ends_with_2_and_every_fault_where_flags_are_refused(tmp_path: Path) -> None:
    args = ("--model", "a", "--flags", "--port 1 --nonsense")
    ended, found = check(tmp_path, *args)
    assert ended.returncode == 2
    assert (found["model"], len(found["refused"])) == ("a", 2)
    assert "command" not in found
    text = run_daemon(checkable(tmp_path), "check", *args)
    assert text.returncode == 2
    assert text.stdout.splitlines() == [
        "model    a",
        *(f"refused  {fault}" for fault in found["refused"]),
    ]


def test_check_ends_with_2_where_the_model_is_unknown_or_its_file_missing(tmp_path: Path) -> None:
    ended, found = check(tmp_path, "--model", "bea")
    assert ended.returncode == 2
    assert "no model 'bea'; nearest: bee" in found["refused"][0]
    variables = checkable(tmp_path)
    (tmp_path / "b.gguf").unlink()
    ended = run_daemon(variables, "check", "--model", "b")
    assert ended.returncode == 2
    assert re.match(r"refused +model b: its file b\.gguf is missing", ended.stdout)


@pytest.mark.parametrize("args", [("check", "--endpoint", "/v1/nothing"), ("check", "--flags")])
def test_a_check_that_is_asked_wrongly_ends_with_2_and_the_usage(args: tuple[str, ...]) -> None:
    ended = run_daemon({}, *args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: llama-sidecar check ")


@pytest.mark.parametrize("args", [("--port", "1"), ("serve",), ("check", "more"), ("",)])
def test_an_unknown_argument_ends_with_2_and_the_usage(args: tuple[str, ...]) -> None:
    ended = run_daemon({}, *args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: llama-sidecar ")
    assert args[-1] in ended.stderr.splitlines()[-1]
