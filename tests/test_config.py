"""Configuration: the environment variables, the model map and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llama_sidecar
from llama_sidecar import Config, ConfigError, Model, read_config
from tests.daemon import FAKE_SERVER, ROOT, free_port_range, started_daemon

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
        env={"PATH": os.environ["PATH"]} | variables,
        capture_output=True,
        text=True,
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


@pytest.mark.parametrize("args", [("--port", "1"), ("serve",), ("check", "more"), ("",)])
def test_an_unknown_argument_ends_with_2_and_the_usage(args: tuple[str, ...]) -> None:
    ended = run_daemon({}, *args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: llama-sidecar ")
    assert args[-1] in ended.stderr.splitlines()[-1]
