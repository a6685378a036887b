"""What a llama-swap configuration starts for each of its models.

Macros, comments within commands and the splitting of command lines are llama-swap's own
(internal/config/load.go and commands.go there), so that a command comes out as it runs it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bench import yaml_subset
from bench.yaml_subset import Node

START_PORT: Final = 5800
MOST_MACRO_CHARS: Final = 1_000_000

_MACRO = re.compile(r"\$\{([a-zA-Z0-9_-]+)\}")
_MACRO_NAME = re.compile(r"[a-zA-Z0-9_-]{1,63}")
_ENV_MACRO = re.compile(r"\$\{env\.([a-zA-Z_][a-zA-Z0-9_]*)\}")
_RESERVED: Final = ("PORT", "MODEL_ID")
_LOOKS_LIKE_WINDOWS = re.compile(r"(?:^|[\s\"'=])[A-Za-z]:[\\/]|\.exe\b")


class ConfigError(Exception):
    """In words, which name a model and never a value: it may be secret."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the configuration. `notes` say what a sweep leaves out of account."""

    id: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """All models, in the order of the file."""

    entries: tuple[Entry, ...]
    is_windows: bool


def read(file: Path, environment: Mapping[str, str], is_windows: bool | None = None) -> Config:
    """Raises ConfigError, which names the file, or OSError."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        return parsed(text, environment, is_windows)
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: it is not UTF-8") from None
    except (ConfigError, yaml_subset.YamlError) as exc:
        raise ConfigError(f"{file}: {exc}") from None


def parsed(text: str, environment: Mapping[str, str], is_windows: bool | None = None) -> Config:
    """`is_windows` says by whose rules commands are split; None tells it by their paths.

    Raises ConfigError or YamlError.
    """
    root = _mapping(yaml_subset.load(text), "the configuration")
    models = _mapping(root.get("models", {}), "models")
    if not models:
        raise ConfigError("there are no models in it")
    shared = _macros(root.get("macros", {}), "macros")
    commands = {id_: _command(id_, node, shared, environment) for id_, node in models.items()}
    if is_windows is None:
        is_windows = any(_LOOKS_LIKE_WINDOWS.search(text) for text in commands.values())
    ports = _ports(root, commands)
    entries = []
    for id_, command in commands.items():
        whole = command.replace("${PORT}", str(ports.get(id_, "")))
        _refuse_unknown_macros(id_, whole)
        fields = _mapping(models[id_], f"model {id_}")
        argv = tuple(split(whole, is_windows=is_windows, what=f"model {id_}: cmd"))
        entries.append(Entry(id_, argv, _env(id_, fields, shared, environment), _notes(fields)))
    return Config(tuple(entries), is_windows)


def _ports(root: Mapping[str, Node], commands: Mapping[str, str]) -> dict[str, int]:
    """llama-swap counts up in the order of the names, where a command asks for a port."""
    start = _text(root.get("startPort", ""), "startPort") or str(START_PORT)
    if not re.fullmatch("[0-9]{1,5}", start):
        raise ConfigError("startPort is no number")
    asking = [id_ for id_ in sorted(commands) if "${PORT}" in commands[id_]]
    return {id_: int(start) + number for number, id_ in enumerate(asking)}


# --- macros


def _command(
    id_: str, node: Node, shared: Mapping[str, str], environment: Mapping[str, str]
) -> str:
    """The model's cmd with every macro but ${PORT} in place."""
    fields = _mapping(node, f"model {id_}")
    command = _text(fields.get("cmd", ""), f"model {id_}: cmd")
    if not command.strip():
        raise ConfigError(f"model {id_} has no cmd")
    command = without_comments(command)
    return _substituted(command, _all_macros(id_, fields, shared), environment, f"model {id_}: cmd")


def _all_macros(id_: str, fields: Mapping[str, Node], shared: Mapping[str, str]) -> dict[str, str]:
    """A model's own macro takes the place of the shared one of its name."""
    own = _macros(fields.get("macros", {}), f"model {id_}: macros")
    return {"MODEL_ID": id_} | dict(shared) | own


def _substituted(
    text: str, macros: Mapping[str, str], environment: Mapping[str, str], where: str
) -> str:
    """The last macro first, so that each may name those before it, and then variables."""
    for name, value in reversed([*macros.items()]):
        text = text.replace("${" + name + "}", value)
        if len(text) > MOST_MACRO_CHARS:
            raise ConfigError(f"{where} grows beyond {MOST_MACRO_CHARS} characters by its macros")

    def variable(found: re.Match[str]) -> str:
        if found[1] not in environment:
            raise ConfigError(f"{where}: the environment variable {found[1]} is not set")
        return environment[found[1]]

    return _ENV_MACRO.sub(variable, text)


def _macros(node: Node, where: str) -> dict[str, str]:
    macros = {}
    for name, value in _mapping(node, where).items():
        if not _MACRO_NAME.fullmatch(name):
            raise ConfigError(f"{where}: {name!r} is no name of a macro")
        if name in _RESERVED:
            raise ConfigError(f"{where}: {name} is llama-swap's own macro")
        if isinstance(value, dict):
            continue  # for llama-swap's own settings; it stands in no command
        macros[name] = _text(value, f"{where}.{name}")
        if "${" + name + "}" in macros[name]:
            raise ConfigError(f"{where}: {name} names itself")
    return macros


def _refuse_unknown_macros(id_: str, command: str) -> None:
    if found := _MACRO.search(command):
        raise ConfigError(
            f"model {id_}: cmd: there is no macro {found[1]} above, or one that names it stands "
            "before it"
        )


# --- command lines


def without_comments(command: str) -> str:
    lines = command.split("\n")
    return "\n".join(line for line in lines if not line.strip().startswith("#"))


def split(command: str, *, is_windows: bool, what: str = "a command") -> list[str]:
    """As llama-swap does on this system: # lines go, and a backslash at the end of a line."""
    lines = []
    for line in without_comments(command).split("\n"):
        stripped = line.strip()
        lines.append(stripped.removesuffix("\\") + " " if stripped.endswith("\\") else line)
    joined = "\n".join(lines)
    try:
        words = split_windows(joined) if is_windows else shlex.split(joined)
    except ValueError:
        raise ConfigError(f"{what}: a quote is opened and never closed") from None
    if not words:
        raise ConfigError(f"{what}: it is empty")
    return words


_WINDOWS_PIECE = re.compile(r'(\\*)(")|(\\+)|([^\\"])', re.DOTALL)


def split_windows(command: str) -> list[str]:
    r"""By the rules of CommandLineToArgvW; an end of a line parts words too.

    Double quotes group, and single ones mean nothing. Backslashes stand for themselves
    but before a double quote: there a pair is one, and an odd one makes the quote a letter.
    """
    words: list[str] = []
    word: str | None = None
    is_quoted = False
    at = 0
    while at < len(command):
        found = _WINDOWS_PIECE.match(command, at)
        assert found is not None  # every character fits one of the pieces
        at = found.end()
        if found[2]:
            word = (word or "") + "\\" * (len(found[1]) // 2)
            if len(found[1]) % 2:
                word += '"'
            elif is_quoted and command[at : at + 1] == '"':
                word += '"'
                at += 1
            else:
                is_quoted = not is_quoted
        elif found[4] and found[4] in " \t\r\n" and not is_quoted:
            if word is not None:
                words.append(word)
            word = None
        else:
            word = (word or "") + found[0]
    return words if word is None else [*words, word]


# --- fields


def _env(
    id_: str,
    fields: Mapping[str, Node],
    shared: Mapping[str, str],
    environment: Mapping[str, str],
) -> dict[str, str]:
    lines = fields.get("env", [])
    where = f"model {id_}: env"
    if not isinstance(lines, list):
        raise ConfigError(f"{where} is no list")
    macros = _all_macros(id_, fields, shared)
    variables = {}
    for line in lines:
        text = _substituted(_text(line, where), macros, environment, where)
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{where} holds what is no NAME=VALUE")
        variables[name] = value
    return variables


def _notes(fields: Mapping[str, Node]) -> tuple[str, ...]:
    """What changes production's requests and not its process."""
    named = ("filters", "useModelName", "setParams", "stripParams")
    return tuple(f"llama-swap's own {name}: not applied" for name in named if fields.get(name))


def _mapping(node: Node, what: str) -> Mapping[str, Node]:
    if node == "":
        return {}
    if not isinstance(node, dict):
        raise ConfigError(f"{what} is no map")
    return node


def _text(node: Node, what: str) -> str:
    if not isinstance(node, str):
        raise ConfigError(f"{what} is no text")
    return node
