"""llama-sidecar: every coding agent gets a llama-server of its own.

The daemon: configuration, the strict HTTP front, and the relay between a client
and the llama-server child that the pool leases for it.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import dataclasses
import difflib
import functools
import hmac
import ipaddress
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from urllib.parse import unquote

import winsvc
from pool import (
    OUT_OF_DESCRIPTORS,
    UNWATCHED_S,
    Connection,
    Lease,
    NotConnected,
    OutOfDescriptors,
    Pool,
    PoolConfig,
    SidecarError,
    Ticket,
    UpstreamFailed,
    WaitCancelled,
    command_line,
    printable,
)
from validator import (
    Body,
    FlagsRefused,
    FlagTable,
    HelpUnavailable,
    JsonObject,
    Layer,
    OpenedFlags,
    Resolved,
    SidecarSpec,
    Validator,
    probe_help,
)

__version__ = "0.1.0"

log = logging.getLogger("llama-sidecar")

Bytes = bytes | bytearray | memoryview

MAX_REQUEST_LINE_BYTES: Final = 8 * 1024
MAX_HEAD_BYTES: Final = 64 * 1024
MAX_FIELDS: Final = 100
MAX_TRAILER_BYTES: Final = 8 * 1024
MAX_CHUNK_LINE_BYTES: Final = 1024
MAX_PORT: Final = 65535
MAX_AGENT_ID_CHARS: Final = 128
MAX_IDLE_THREADS: Final = 32  # kept for the connections to come
MAX_REMEMBERED_BYTES: Final = 256  # of a header line
RECEIVE_BYTES: Final = 64 * 1024
WAITING_BYTES: Final = 8 * 1024  # of a buffer that is held while nothing comes
IDLE_TIMEOUT_S: Final = 75.0  # between two requests of a kept connection
HEAD_TIMEOUT_S: Final = 30.0  # for a whole request head, however it trickles in
BODY_SILENCE_S: Final = 30.0  # between two pieces of a body
MIN_BODY_BYTES_PER_S: Final = 1024.0  # what a body must bring on average, after the first silence
SEND_TIMEOUT_S: Final = 60.0  # a reader that takes nothing for so long has gone
UPSTREAM_SEND_TIMEOUT_S: Final = 60.0
SERVICE_STOP_S: Final = 60.0
LOG_FILE_BYTES: Final = 10 * 1024 * 1024
LOG_RETRY_S: Final = 60.0  # after a try to rename it that failed
MAX_LINES_WAITING: Final = 1000  # to be written; whoever brings more waits
MOST_WRITINGS: Final = 4  # of others' log lines, before a client's thread goes on
LOG_FILES_KEPT: Final = 3  # besides the one that is written
LINGER_S: Final = 1.0  # what is in flight is read so long, so that a refusal arrives
LINGER_BYTES: Final = 4 * 1024 * 1024
FILE_TRUST_S: Final = 1.0  # a file is looked at no more often
COMMENT_PAUSE_S: Final = 1.0  # between two comments to a client that waits


# --- errors that a client is told


class RequestRefused(SidecarError):
    """The request cannot be served as it is; closes the connection if framing is in doubt."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        closes: bool = False,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.closes = closes
        self.allow = allow


class ClientGone(Exception):
    """The client closed its connection, or takes nothing any more."""


def _bad_request(message: str, status: int = 400, code: str = "bad_request") -> RequestRefused:
    return RequestRefused(status, code, message, closes=True)


ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def _error_body(error: SidecarError) -> bytes:
    otherwise = "invalid_request_error" if error.status < 500 else "server_error"
    fields = {
        "message": printable(error.message),
        "type": ERROR_TYPES.get(error.status, otherwise),
        "code": error.code,
        "param": getattr(error, "param", None),
    }
    return json.dumps({"error": fields}).encode()


# --- configuration


class ConfigError(Exception):
    """The environment cannot be used; one line per fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


@dataclasses.dataclass(frozen=True)
class Model:
    """One entry of the model map."""

    id: str
    path: Path
    written_args: tuple[str, ...]
    args: Layer  # the same as the catalog's validator read them
    aliases: tuple[str, ...]
    is_pinned: bool


@dataclasses.dataclass(frozen=True)
class FlagRules:
    """What the operator says of flags, whichever llama-server runs."""

    base_args: tuple[str, ...] = ()
    opened_to_agents: str = ""
    folder: Path = Path()  # relative folders in `opened_to_agents` begin here
    unknown_flags_for_agents: bool = False
    share: bool = True

    def opened(self, table: FlagTable) -> OpenedFlags:
        """Raises FlagsRefused."""
        return OpenedFlags.parse(self.opened_to_agents, table, self.folder)

    def validator(self, table: FlagTable) -> Validator:
        """Raises FlagsRefused."""
        return Validator(
            self.base_args,
            table,
            opened=self.opened(table),
            unknown_flags_for_agents=self.unknown_flags_for_agents,
            share=self.share,
        )


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The models, and what one llama-server knows of the flags they run with."""

    validator: Validator
    models: Mapping[str, Model]  # by id and by alias

    def own_args(self) -> tuple[str, ...]:
        """What the daemon sets besides model, host, port and alias."""
        spoken = map(self.validator.table.spoken, ("--no-ui", "--offline"))
        return tuple(flag for flag in spoken if flag)

    def read_anew(self, validator: Validator) -> Catalog:
        """The same models for another llama-server. Raises FlagsRefused."""
        read = {
            model.id: dataclasses.replace(model, args=validator.model_args(model.written_args))
            for model in self.models.values()
        }
        return Catalog(validator, {name: read[model.id] for name, model in self.models.items()})


@dataclasses.dataclass(frozen=True)
class Config:
    """What the environment says. Seconds and bytes, as the names tell."""

    server_bin: Path
    server_stamp: tuple[int, ...]  # of the file that `catalog` was made for
    catalog: Catalog
    flag_rules: FlagRules
    bind: tuple[str, int]
    ports: range
    max_sidecars: int
    log_level: str
    health_timeout_s: float
    health_interval_s: float
    api_key: str | None
    allowed_hosts: frozenset[str]
    queue_size: int
    queue_s: float
    max_body_bytes: int
    max_connections: int
    drain_s: float
    isolates_agents: bool
    fair_s: float
    step_s: float
    stall_s: float
    state_dir: Path
    log_file: Path | None
    keeps_to_one_cpu: bool


DEFAULT_BASE_ARGS: Final = '["-ngl","999","-c","32768","--flash-attn","on","--no-mmap"]'
DEFAULTS: Final[Mapping[str, str]] = {
    "LLAMA_SERVER_BIN": "",
    "MODEL_DIR_MAP_FILE": "",
    "LLAMA_SIDECAR_BIND": "127.0.0.1:8402",
    "PORT_RANGE": "8500-8599",
    "MAX_SIDECARS": "2",
    "LOG_LEVEL": "info",
    "BASE_ARGS": DEFAULT_BASE_ARGS,
    "HEALTH_TIMEOUT_SECONDS": "60",
    "HEALTH_INTERVAL_SECONDS": "30",
    "LLAMA_SIDECAR_API_KEY": "",
    "LLAMA_SIDECAR_ALLOW_NO_KEY": "0",
    "LLAMA_SIDECAR_ALLOWED_HOSTS": "",
    "LLAMA_SIDECAR_QUEUE_SIZE": "64",
    "LLAMA_SIDECAR_QUEUE_SECONDS": "300",
    "LLAMA_SIDECAR_MAX_BODY_MB": "64",
    "LLAMA_SIDECAR_MAX_CONNECTIONS": "1024",
    "LLAMA_SIDECAR_DRAIN_SECONDS": "30",
    "LLAMA_SIDECAR_AGENT_FLAGS": "",
    "LLAMA_SIDECAR_UNKNOWN_FLAGS": "refuse",
    "LLAMA_SIDECAR_SHARE": "on",
    "LLAMA_SIDECAR_ISOLATE": "off",
    "LLAMA_SIDECAR_FAIR_SECONDS": "20",
    "LLAMA_SIDECAR_STEP_SECONDS": "5",
    "LLAMA_SIDECAR_STALL_SECONDS": "300",
    "LLAMA_SIDECAR_STATE_DIR": "",
    "LLAMA_SIDECAR_LOG_FILE": "",
    "LLAMA_SIDECAR_CPUS": "one",
}
LOG_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}


T = TypeVar("T")
K = TypeVar("K", bytes, str)


class _Faulty(Exception):
    """This variable cannot be used; the message says what it takes."""


class _Environment:
    """Reads variables one by one and collects what is wrong with them."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self.faults: list[str] = []

    def read(self, name: str, parse: Callable[[str], T], otherwise: T) -> T:
        """The variable as `parse` reads it; after a fault `otherwise`, to go on looking."""
        text = self._variables.get(name) or DEFAULTS[name]
        try:
            return parse(text)
        except _Faulty as exc:
            shown = "a secret" if name == "LLAMA_SIDECAR_API_KEY" else f"{text[:200]!r}"
            self.faults.append(printable(f"{name}: {shown}: {exc}"))
            return otherwise


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise _Faulty(f"takes a whole number from {low} to {high}")
        return int(text)

    return parse


_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?", re.ASCII)


def _seconds(text: str) -> float:
    if not _SECONDS.fullmatch(text) or float(text) <= 0:
        raise _Faulty("takes a number of seconds above 0")
    return float(text)


def _seconds_or_none(text: str) -> float:
    if not _SECONDS.fullmatch(text):
        raise _Faulty("takes a number of seconds, 0 to do without")
    return float(text)


def _file(text: str) -> Path | None:
    return Path(text).absolute() if text else None


def _state_dir(text: str) -> Path:
    return Path(text).absolute() if text else winsvc.state_dir()


def _either(no: str, yes: str) -> Callable[[str], bool]:
    def parse(text: str) -> bool:
        if text not in (no, yes):
            raise _Faulty(f"takes {no} or {yes}")
        return text == yes

    return parse


def _key(text: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]*", text):
        raise _Faulty("takes visible ASCII characters without spaces: no other fits in a header")
    return text


def _program(text: str) -> Path:
    if not text:
        raise _Faulty("is required: the path of llama-server")
    found = shutil.which(text)
    if found is None:
        raise _Faulty("is no program that can be run: takes the path of llama-server")
    if sys.platform == "win32" and found.lower().endswith((".bat", ".cmd")):
        raise _Faulty("is a batch file, which takes some arguments for commands: name the .exe")
    return Path(found).absolute()


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", text)
    if match is None or int(match[3]) > MAX_PORT:
        raise _Faulty("takes ADDRESS:PORT, an IPv6 address in brackets")
    return match[1] or match[2], int(match[3])


def _port_range(text: str) -> range:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_PORT:
        raise _Faulty("takes FIRST-LAST, ports from 1 to 65535")
    return range(int(match[1]), int(match[2]) + 1)


def _anything(text: str) -> str:
    return text


def _level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise _Faulty(f"takes one of {', '.join(LOG_LEVELS)}")
    return text


def _strings(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _Faulty(f"takes a JSON array of strings, and this is no JSON: {exc}") from exc
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _Faulty("takes a JSON array of strings")
    return value


def _hosts(text: str) -> frozenset[str]:
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"[a-z0-9.-]+", name):
            raise _Faulty("takes host names without ports, separated by commas")
    return frozenset(names)


def read_config(variables: Mapping[str, str]) -> Config:
    """The configuration. Runs `llama-server --help` once: it may block for 30 s.

    Raises ConfigError with every fault.
    """
    env = _Environment(variables)
    number, seconds = _whole_number, _seconds
    server_bin = env.read("LLAMA_SERVER_BIN", _program, None)
    bind = env.read("LLAMA_SIDECAR_BIND", _address, ("127.0.0.1", 0))
    ports = env.read("PORT_RANGE", _port_range, range(8500, 8600))
    max_sidecars = env.read("MAX_SIDECARS", number(1, 64), 1)
    base_args = env.read("BASE_ARGS", _strings, list[str]())
    api_key = env.read("LLAMA_SIDECAR_API_KEY", _key, "") or None
    is_open = env.read("LLAMA_SIDECAR_ALLOW_NO_KEY", _either("0", "1"), False)
    env.faults += _port_faults(ports, max_sidecars, bind[1])
    if not _is_loopback(bind[0]) and not api_key and not is_open:
        env.faults.append(
            f"LLAMA_SIDECAR_BIND: {bind[0]!r}: others can reach this address: set "
            "LLAMA_SIDECAR_API_KEY, or LLAMA_SIDECAR_ALLOW_NO_KEY=1 if that is meant"
        )
    model_map = variables.get("MODEL_DIR_MAP_FILE", "")
    rules = _flag_rules(env, base_args, Path(model_map).absolute().parent)
    stamp = _stamp(server_bin) if server_bin else ()
    validator = _validator(rules, _table_of(server_bin, env.faults), env.faults)
    models = _read_models(model_map, validator, env.faults)
    config = Config(
        server_bin=server_bin or Path(),
        server_stamp=stamp,
        catalog=Catalog(validator, models),
        flag_rules=rules,
        bind=bind,
        ports=ports,
        max_sidecars=max_sidecars,
        log_level=env.read("LOG_LEVEL", _level, "info"),
        health_timeout_s=env.read("HEALTH_TIMEOUT_SECONDS", seconds, 60.0),
        health_interval_s=env.read("HEALTH_INTERVAL_SECONDS", seconds, 30.0),
        api_key=api_key,
        allowed_hosts=env.read("LLAMA_SIDECAR_ALLOWED_HOSTS", _hosts, frozenset()),
        queue_size=env.read("LLAMA_SIDECAR_QUEUE_SIZE", number(1, 10_000), 64),
        queue_s=env.read("LLAMA_SIDECAR_QUEUE_SECONDS", seconds, 300.0),
        max_body_bytes=env.read("LLAMA_SIDECAR_MAX_BODY_MB", number(1, 1024), 64) << 20,
        max_connections=env.read("LLAMA_SIDECAR_MAX_CONNECTIONS", number(1, 100_000), 1024),
        drain_s=env.read("LLAMA_SIDECAR_DRAIN_SECONDS", seconds, 30.0),
        isolates_agents=env.read("LLAMA_SIDECAR_ISOLATE", _either("off", "agent"), False),
        fair_s=env.read("LLAMA_SIDECAR_FAIR_SECONDS", seconds, 20.0),
        step_s=env.read("LLAMA_SIDECAR_STEP_SECONDS", _seconds_or_none, 5.0),
        stall_s=env.read("LLAMA_SIDECAR_STALL_SECONDS", seconds, 300.0),
        state_dir=env.read("LLAMA_SIDECAR_STATE_DIR", _state_dir, Path()),
        log_file=env.read("LLAMA_SIDECAR_LOG_FILE", _file, None),
        keeps_to_one_cpu=env.read("LLAMA_SIDECAR_CPUS", _either("all", "one"), True),
    )
    if env.faults:
        raise ConfigError(env.faults)
    return config


def _port_faults(ports: range, max_sidecars: int, own_port: int) -> list[str]:
    if own_port not in ports and len(ports) >= max_sidecars:
        return []
    fault = (
        f"PORT_RANGE: {ports.start}-{ports.stop - 1}: takes at least MAX_SIDECARS "
        f"({max_sidecars}) ports, and not the port of LLAMA_SIDECAR_BIND ({own_port})"
    )
    return [fault]


def _flag_rules(env: _Environment, base_args: Sequence[str], folder: Path) -> FlagRules:
    unknown = env.read("LLAMA_SIDECAR_UNKNOWN_FLAGS", _either("refuse", "allow"), False)
    return FlagRules(
        base_args=tuple(base_args),
        opened_to_agents=env.read("LLAMA_SIDECAR_AGENT_FLAGS", _anything, ""),
        folder=folder,
        unknown_flags_for_agents=unknown,
        share=env.read("LLAMA_SIDECAR_SHARE", _either("off", "on"), True),
    )


@functools.lru_cache(maxsize=64)
def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _ip_address(host)
    return host == "localhost" if address is None else address.is_loopback


def _table_of(server_bin: Path | None, faults: list[str]) -> FlagTable:
    if server_bin is None:
        return FlagTable.built_in()
    try:
        return _asked_table(server_bin)
    except HelpUnavailable as exc:
        faults.append(printable(f"LLAMA_SERVER_BIN: {exc}"))
        return FlagTable.built_in()


def _asked_table(server_bin: Path) -> FlagTable:
    """What this llama-server knows, asked in the environment that it will run in.

    Blocks for at most 30 s. Raises HelpUnavailable.
    """
    with winsvc.private_dir() as empty:
        environment = winsvc.child_environment(Path(empty), {})
        return FlagTable.built_in().for_binary(probe_help(server_bin, environment))


def _validator(rules: FlagRules, table: FlagTable, faults: list[str]) -> Validator:
    """As the rules say; without what is faulty in them, which is appended to `faults`."""
    try:
        rules.opened(table)
    except FlagsRefused as exc:
        faults += [printable(f"LLAMA_SIDECAR_AGENT_FLAGS: {fault}") for fault in exc.faults]
        rules = dataclasses.replace(rules, opened_to_agents="")
    try:
        return rules.validator(table)
    except FlagsRefused as exc:
        faults += [f"BASE_ARGS: {fault}" for fault in exc.faults]
        return Validator([], table)


class _Glance(Generic[T]):
    """What a file looked like less than `trust_s` ago. Safe to share by threads.

    One that is not there is looked for each time.
    """

    def __init__(self, look: Callable[[Path], T], trust_s: float = FILE_TRUST_S) -> None:
        self._look = look
        self._trust_s = trust_s
        self._seen: dict[Path, tuple[float, T]] = {}  # as many as there are models

    def at(self, file: Path) -> T:
        now = time.monotonic()
        seen_at, found = self._seen.get(file, (0.0, None))
        if not found or now - seen_at >= self._trust_s:
            found = self._look(file)
            self._seen[file] = (now, found)
        return found


def _stamp(file: Path) -> tuple[int, ...]:
    """What changes when the file does; empty if it is not there."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_size, status.st_ino)


class LiveCatalog:
    """The catalog for the llama-server that lies there now. Safe to share by threads.

    That it was replaced may take `trust_s` to be seen.
    """

    def __init__(self, config: Config, trust_s: float = FILE_TRUST_S) -> None:
        self._server_bin = config.server_bin
        self._stamps = _Glance(_stamp, trust_s)
        self._rules = config.flag_rules
        self._renewing = threading.Lock()  # held while the file is asked; guards what follows
        self._stamp = config.server_stamp
        self._catalog = config.catalog

    def current(self) -> Catalog:
        """Asks for --help again once the file has changed: it may then block for 30 s.

        A file that cannot be asked, or that refuses what is configured, leaves
        the catalog as it was until the file changes again.
        """
        stamp = self._stamps.at(self._server_bin)
        if stamp and stamp != self._stamp:
            with self._renewing:
                if stamp != self._stamp:
                    self._catalog = self._renewed()
                    self._stamp = stamp
        return self._catalog

    def _renewed(self) -> Catalog:
        try:
            table = _asked_table(self._server_bin)
            catalog = self._catalog.read_anew(self._rules.validator(table))
        except (HelpUnavailable, FlagsRefused) as exc:
            log.warning("%s has changed, and cannot be used: %s", self._server_bin, exc)
            return self._catalog
        log.info("%s has changed: its flags were read again", self._server_bin)
        return catalog


def _read_models(file: str, validator: Validator, faults: list[str]) -> dict[str, Model]:
    """The model map, by id and by alias; every fault of it is appended to `faults`."""
    where = "MODEL_DIR_MAP_FILE"
    if not file:
        faults.append(f"{where}: is required: the path of a JSON file, model ids to GGUF paths")
        return {}
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        entries = json.loads(text, object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as exc:
        faults.append(printable(f"{where}: {file!r} cannot be read as JSON: {exc}"))
        return {}
    if not isinstance(entries, dict) or not entries:
        faults.append(f'{where}: {file!r}: takes a JSON object like {{"id": "path.gguf"}}')
        return {}
    models: dict[str, Model] = {}
    folder = Path(file).absolute().parent
    for model_id, entry in entries.items():
        try:
            model = _model(model_id, entry, folder, validator)
        except (_Faulty, FlagsRefused) as exc:
            reasons = exc.faults if isinstance(exc, FlagsRefused) else (str(exc),)
            faults += [printable(f"{where}: {model_id!r}: {reason}") for reason in reasons]
            continue
        for name in (model.id, *model.aliases):
            if name in models or (name != model.id and name in entries):
                faults.append(printable(f"{where}: {name!r} names two models"))
            models[name] = model
    return models


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object whose names all differ. Raises ValueError."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(map(repr, twice))} stands there twice")
    return dict(pairs)


def _model_path(text: str, folder: Path) -> Path:
    """A path, whole or below the map's folder, or a file: URI (RFC 8089). Raises _Faulty."""
    if text[:5].lower() != "file:":
        return folder / text
    is_windows = sys.platform == "win32"
    host, path = "", text[5:].replace("\\", "/") if is_windows else text[5:]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
    try:
        path = unquote(path, errors="strict")
    except ValueError as exc:
        raise _Faulty(f"{text!r}: what % stands for is not UTF-8") from exc
    if is_windows and re.match(r"/[A-Za-z]:", path):
        path = path[1:]
    is_remote = host.lower() not in ("", "localhost")
    if not path or (is_remote and not is_windows):
        raise _Faulty(f"{text!r}: takes file:///PATH, a file of this machine")
    return folder / (f"//{host}{path}" if is_remote else path)


def _model(model_id: str, entry: object, folder: Path, validator: Validator) -> Model:
    fields = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
        raise _Faulty('takes a path, or an object with "path"')
    if unknown := sorted(set(fields) - {"path", "args", "aliases", "pinned"}):
        raise _Faulty(f"unknown {', '.join(unknown)}: takes path, args, aliases, pinned")
    args, aliases = fields.get("args", []), fields.get("aliases", [])
    for name, value in (("args", args), ("aliases", aliases)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _Faulty(f"{name} takes an array of strings")
    if not isinstance(fields.get("pinned", False), bool):
        raise _Faulty("pinned takes true or false")
    if not all(name and name == printable(name) for name in (model_id, *aliases)):
        raise _Faulty("a model's name cannot be empty or hold control characters")
    path = _model_path(fields["path"], folder)
    if not path.is_file():
        log.warning("model %s: %s is no file, requests for it will be refused", model_id, path)
    layer = validator.model_args(args)
    is_pinned = fields.get("pinned", False)
    return Model(model_id, path, tuple(args), layer, tuple(aliases), is_pinned)


# --- reading HTTP: RFC 9110 and 9112, strictly

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_ABSOLUTE = re.compile(r"https?://([^/?#@]+)(/[^#]*|\?[^#]*)?", re.IGNORECASE)
_HOST = re.compile(
    r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._~!$&'()*+,;=%-]+))(?::([0-9]{1,5}))?", re.ASCII
)
_BARE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e]|\\[\t\x20-\x7e])*"'
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,15})(?:;" + _TOKEN + rb"(?:=(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?)*"
)


class MalformedMessage(Exception):
    """A message head or body that breaks the framing rules; `status` is for a request."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Head:
    """The start line and the fields of a message, names in lower case."""

    def __init__(self, start: re.Match[bytes], fields: list[tuple[str, str]]) -> None:
        self.start = start
        self.fields = fields
        self._last = dict(fields)
        self._has_repeats = len(self._last) < len(fields)

    def all(self, name: str) -> Sequence[str]:
        if name not in self._last:
            return ()
        if not self._has_repeats:
            return (self._last[name],)
        return [value for each, value in self.fields if each == name]

    def get(self, name: str) -> str | None:
        """The value of a field that may stand once. Raises MalformedMessage for a second."""
        if self._has_repeats and len(self.all(name)) > 1:
            raise MalformedMessage(f"more than one {name} header")
        return self._last.get(name)

    def tokens(self, name: str) -> set[str]:
        """The comma-separated words of a list field, in lower case."""
        return {word.strip().lower() for value in self.all(name) for word in value.split(",")}


def _remembered(parse: Callable[[K], T]) -> Callable[[K], T]:
    """As `parse`, remembering what it made of short texts: heads say the same again and again."""
    known = functools.lru_cache(maxsize=1024)(parse)

    @functools.wraps(parse)
    def look_up(text: K) -> T:
        return known(text) if len(text) <= MAX_REMEMBERED_BYTES else parse(text)

    return look_up


def parse_head(block: bytes, start_line: re.Pattern[bytes]) -> Head:
    """Split a head without its final empty line. Raises MalformedMessage."""
    first, *lines = block.split(b"\r\n")
    start = start_line.fullmatch(first)
    if start is None:
        raise MalformedMessage("the first line is malformed")
    if len(lines) > MAX_FIELDS:
        raise MalformedMessage(f"more than {MAX_FIELDS} header fields", 431)
    return Head(start, [_field(line) for line in lines])


@_remembered
def _field(line: bytes) -> tuple[str, str]:
    """Name, in lower case, and value. Raises MalformedMessage."""
    field = _FIELD.fullmatch(line)
    if field is None:
        raise MalformedMessage("a header line is malformed")
    return field[1].lower().decode("ascii"), field[2].rstrip(b" \t").decode("latin-1")


CHUNKED: Final = -1
UNTIL_CLOSE: Final = -2


def body_length(head: Head, minor_version: int) -> int | None:
    """Bytes of the body, CHUNKED, or None where the head names no length.

    RFC 9112, 6.3, without its leniencies. Raises MalformedMessage.
    """
    codings = head.all("transfer-encoding")
    length = head.get("content-length")
    if codings:
        if length is not None:
            raise MalformedMessage("both Content-Length and Transfer-Encoding")
        if minor_version == 0:
            raise MalformedMessage("Transfer-Encoding in HTTP/1.0")
        if len(codings) == 1 and codings[0].lower() == "chunked":
            return CHUNKED
        is_odd = any("chunked" in coding.lower() for coding in codings)
        raise MalformedMessage("Transfer-Encoding takes chunked alone", 400 if is_odd else 501)
    if length is None:
        return None
    if not _LENGTH.fullmatch(length):
        raise MalformedMessage("Content-Length takes digits only")
    return int(length)


class ChunkedDecoder:
    """Takes a chunked body as it arrives. RFC 9112, 7.1, exact CRLF, bounded lines."""

    def __init__(self) -> None:
        self.is_done = False
        self.rest = b""  # once done: what came after the body
        self._buffer = b""
        self._at = 0  # where in it the next step begins
        self._left = 0  # bytes of the current chunk still to come
        self._step = self._size
        self._trailer_bytes = 0
        self._error: MalformedMessage | None = None
        self._out: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        """What of the body these bytes bring.

        Raises MalformedMessage; if good bytes came ahead of the fault, they are
        handed out first and `check` raises it.
        """
        self._buffer = self._buffer[self._at :] + data
        self._at = 0
        try:
            while not self.is_done and self._step():
                pass
        except MalformedMessage as exc:
            if not self._out:
                raise
            self._error = exc
        if self.is_done:
            self.rest, self._buffer = self._buffer[self._at :], b""
        out, self._out = self._out, []
        return out[0] if len(out) == 1 else b"".join(out)

    def check(self) -> None:
        """Raise the MalformedMessage that `feed` held back."""
        if self._error:
            raise self._error

    def _line(self, longest: int) -> bytes | None:
        start, end = self._at, self._buffer.find(b"\r\n", self._at)
        if end - start > longest or (end < 0 and len(self._buffer) - start > longest + 1):
            raise MalformedMessage("a line of the chunked body is too long")
        if end < 0:
            return None
        self._at = end + 2
        return self._buffer[start:end]

    def _size(self) -> bool:
        line = self._line(MAX_CHUNK_LINE_BYTES)
        if line is None:
            return False
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise MalformedMessage("a chunk size is malformed")
        self._left = int(match[1], 16)
        self._step = self._data if self._left else self._trailer
        return True

    def _data(self) -> bool:
        piece = self._buffer[self._at : self._at + self._left]
        self._at += len(piece)
        self._left -= len(piece)
        if piece:
            self._out.append(piece)
        if self._left:
            return False
        self._step = self._data_end
        return True

    def _data_end(self) -> bool:
        end = self._buffer[self._at : self._at + 2]
        if not b"\r\n".startswith(end):
            raise MalformedMessage("a chunk is longer than its size")
        if len(end) < 2:
            return False
        self._at += 2
        self._step = self._size
        return True

    def _trailer(self) -> bool:
        line = self._line(MAX_TRAILER_BYTES - self._trailer_bytes)
        if line is None:
            return False
        self._trailer_bytes = min(MAX_TRAILER_BYTES, self._trailer_bytes + len(line) + 2)
        if line and not _FIELD.fullmatch(line):
            raise MalformedMessage("a trailer line is malformed")
        self.is_done = not line
        return True


class Wire:
    """Reads one peer's messages from a socket, in bounded pieces and bounded time.

    Where the socket itself waits `blocks_s` for what comes, a wait for just so long
    takes no call of its own.
    """

    def __init__(self, sock: socket.socket, blocks_s: float = 0.0) -> None:
        self._sock = sock
        self._blocks_s = blocks_s
        self.buffer = b""

    def receive(self, timeout_s: float | None) -> bytes:
        """What is there or comes next; b"" at the end. Raises TimeoutError, OSError."""
        if self.buffer:
            data, self.buffer = self.buffer, b""
            return data
        return self._next(timeout_s)

    def _next(self, timeout_s: float | None) -> bytes:
        if timeout_s == self._blocks_s:
            try:
                return self._sock.recv(WAITING_BYTES)
            except BlockingIOError:
                raise TimeoutError("nothing came") from None
        if not winsvc.wait_readable([self._sock], timeout_s):
            raise TimeoutError("nothing came")
        return self._sock.recv(RECEIVE_BYTES)

    def head_block(self, first_timeout_s: float | None, timeout_s: float) -> bytes | None:
        """The bytes of a head, without its final empty line; None if the peer ended before any.

        Waits `first_timeout_s` for the first byte and from then on `timeout_s` for
        all of it. Raises MalformedMessage, TimeoutError, OSError.
        """
        data = self.receive(first_timeout_s)
        deadline = time.monotonic() + timeout_s
        searched = 0
        while data:
            end = data.find(b"\r\n\r\n", max(0, searched - 3))
            if 0 <= end <= MAX_HEAD_BYTES:
                self.buffer = data[end + 4 :]
                return data[:end]
            _check_size(data)
            searched = len(data)
            try:
                more = self.receive(max(0.001, deadline - time.monotonic()))
            except TimeoutError:
                raise MalformedMessage("the request head took too long", 408) from None
            if not more:
                raise MalformedMessage("the connection ended within a message head")
            data += more
        return None


class InTurn:
    """A lock that those who wait for it get in the order in which they came.

    threading.Lock knows no order: who has just let go of it may take it again before any
    other has woken up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows; nobody keeps it
        self._is_held = False
        self._waiting: collections.deque[threading.Lock] = collections.deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._is_held:
                self._is_held = True
                return
            my_turn = threading.Lock()
            my_turn.acquire()
            self._waiting.append(my_turn)
        my_turn.acquire()

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_held = False


NO_WAIT: Final = getattr(socket, "MSG_DONTWAIT", 0)  # where there is none, no call blocks
# Each send lets go of the interpreter. Of many threads some would have it again and again,
# and others late, if none of their calls was made in turn (docs/performance.md). What goes to
# a child takes turns, and so does the first piece of an answer that is passed on; later
# pieces of a stream wait for nobody.
TURNS: Final = InTurn()
NO_TURNS: Final = contextlib.nullcontext()
Turn = contextlib.AbstractContextManager[None]


def _send_all(sock: socket.socket, data: Bytes, timeout_s: float, turn: Turn = NO_TURNS) -> None:
    """Send it all. Raises OSError.

    TimeoutError if for `timeout_s` the peer takes nothing; nobody's `turn` lasts so long.
    """
    sent = 0
    while sent < len(data):
        try:
            with turn:
                sent += sock.send(memoryview(data)[sent:], NO_WAIT)
        except BlockingIOError:
            if not winsvc.wait_writable(sock, timeout_s):
                raise TimeoutError("the peer takes nothing") from None


def _check_size(data: bytes) -> None:
    """Whether a head that has not ended may still become one."""
    if len(data) > MAX_REQUEST_LINE_BYTES and b"\n" not in data:
        raise MalformedMessage("the request line is too long", 414)
    if _BARE_LF.search(data):
        raise MalformedMessage("a line ends without CR")
    if len(data) > MAX_HEAD_BYTES:
        raise MalformedMessage(f"the head is longer than {MAX_HEAD_BYTES} bytes", 431)


# --- requests

KNOWN_METHODS: Final = frozenset("GET HEAD POST PUT DELETE PATCH OPTIONS".split())
POST_ROUTES: Final[Mapping[str, Body]] = {
    "/v1/audio/transcriptions": Body.FORM,
    "/v1/chat/completions": Body.COMPLETION,
    "/v1/chat/completions/input_tokens": Body.COMPLETION,
    "/v1/completions": Body.COMPLETION,
    "/v1/embeddings": Body.EMBEDDING,
    "/v1/messages": Body.MESSAGES,
    "/v1/messages/count_tokens": Body.MESSAGES,
    "/v1/rerank": Body.RANKING,
    "/v1/reranking": Body.RANKING,
    "/v1/responses": Body.COMPLETION,
    "/v1/responses/input_tokens": Body.COMPLETION,
}


@dataclasses.dataclass
class Request:
    """One request as its head tells; the body follows on the wire."""

    method: str
    path: str
    query: str
    minor_version: int
    head: Head
    length: int | None  # of the body: bytes, CHUNKED, or None
    host: str
    is_last: bool  # the connection closes after it

    @property
    def has_body(self) -> bool:
        return bool(self.length)


def parse_request(block: bytes) -> Request:
    """Judge a request head by RFC 9112. Raises RequestRefused, always closing."""
    line_end = block.find(b"\r\n")
    if (len(block) if line_end < 0 else line_end) > MAX_REQUEST_LINE_BYTES:
        raise _bad_request("the request line is too long", 414, "uri_too_long")
    try:
        head = parse_head(block, _REQUEST_LINE)
        method, path, query, authority, minor_version = _asked(head.start[0])
        host = _host(head, authority, minor_version)
        length = body_length(head, minor_version)
    except MalformedMessage as exc:
        raise _bad_request(str(exc), exc.status) from exc
    words = head.tokens("connection")
    is_last = "close" in words or (minor_version == 0 and "keep-alive" not in words)
    return Request(method, path, query, minor_version, head, length, host, is_last)


@_remembered
def _asked(line: bytes) -> tuple[str, str, str, str | None, int]:
    """Method, path, query, authority and minor version of a request line that was matched."""
    start = _REQUEST_LINE.fullmatch(line)
    assert start is not None
    method, target, major, minor = (group.decode("ascii") for group in start.groups())
    if (major, minor) not in (("1", "0"), ("1", "1")):
        raise MalformedMessage(f"HTTP/{major}.{minor} is not spoken here: use HTTP/1.1", 505)
    return method, *_target(method, target), int(minor)


def _target(method: str, target: str) -> tuple[str, str, str | None]:
    """Path, query, and the authority of an absolute form (RFC 9112, 3.2)."""
    authority = None
    if target == "*" and method == "OPTIONS":
        return "*", "", None
    if not target.startswith("/"):
        match = _ABSOLUTE.fullmatch(target)
        if match is None:
            raise MalformedMessage("the request target is malformed")
        authority, target = match[1], match[2] or "/"
        target = target if target.startswith("/") else f"/{target}"
    if "#" in target:
        raise MalformedMessage("the request target holds a fragment")
    path, _, query = target.partition("?")
    return path, query, authority


def _host(head: Head, authority: str | None, minor_version: int) -> str:
    """The host asked for, without port. RFC 9112, 3.2: exactly one Host in 1.1."""
    values = head.all("host")
    if len(values) > 1 or (minor_version == 1 and not values):
        raise MalformedMessage("an HTTP/1.1 request takes exactly one Host header")
    hosts = {_named(text) for text in values}
    if authority:
        hosts.add(_named(authority))
    if len(hosts) > 1:
        raise MalformedMessage("the request target and Host name different hosts")
    return hosts.pop() if hosts else ""


@_remembered
def _named(authority: str) -> str:
    """The host without its port, in lower case. Raises MalformedMessage."""
    match = _HOST.fullmatch(authority)
    if match is None or int(match[3] or 0) > MAX_PORT:
        raise MalformedMessage("the Host is malformed")
    return (match[1] or match[2]).lower()


# --- the server


class Server(ThreadingHTTPServer):
    """Accepts connections, one thread each, up to a limit; a thread serves one after another."""

    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = False  # winsvc.claim says what is right here

    def __init__(self, config: Config, catalog: LiveCatalog, pool: Pool) -> None:
        self.config = config
        self.catalog = catalog
        self.pool = pool
        self.started = time.monotonic()
        self._lock = threading.Lock()  # guards the two that follow
        self._connections = 0
        self._idle_threads = 0  # those that wait for a connection which nobody has put there yet
        self._accepted: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._pause = threading.Event()
        host = config.bind[0]
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__(config.bind, Handler)

    def server_bind(self) -> None:
        winsvc.claim(self.socket)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            self._pause.wait(0.05)  # out of descriptors: do not spin until one is free
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            is_full = self._connections >= self.config.max_connections
            self._connections += not is_full
            is_awaited = not is_full and self._idle_threads > 0
            self._idle_threads -= is_awaited
        if is_full:
            with contextlib.suppress(OSError):
                request.settimeout(0.2)
                request.sendall(_TOO_MANY_CONNECTIONS)
            self.shutdown_request(request)
            return
        if is_awaited:
            self._accepted.put((request, client_address))
            return
        try:
            winsvc.start_thread("http-client", self._serve_some, request, client_address)
        except RuntimeError:  # no thread to be had: the server goes on without this one
            with self._lock:
                self._connections -= 1
            raise

    def _serve_some(self, request: Any, client_address: Any) -> None:
        """One connection, and then others: starting a thread for each takes longer."""
        while True:
            self.process_request_thread(request, client_address)
            with self._lock:
                if self._idle_threads >= MAX_IDLE_THREADS:
                    return
                self._idle_threads += 1
            request, client_address = self._accepted.get()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._connections -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed")

    def is_ours(self, host: str) -> bool:
        """Whether a Host or Origin names this daemon, against DNS rebinding."""
        if host in self.config.allowed_hosts or host == "localhost":
            return True
        address = _ip_address(host)
        if address is None:
            return host == self.config.bind[0].lower()
        return address.is_loopback or not _is_loopback(self.config.bind[0])


_TOO_MANY_BODY = _error_body(
    RequestRefused(503, "too_many_connections", "too many open connections: close idle ones")
)
_TOO_MANY_CONNECTIONS: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
    % (len(_TOO_MANY_BODY), _TOO_MANY_BODY)
)


class Handler(BaseHTTPRequestHandler):
    """One client connection. Reading and writing are our own, stricter and faster."""

    server: Server
    connection: socket.socket

    def setup(self) -> None:
        self.connection = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        # Not a timeout of Python's: it asks before each call whether the socket is ready.
        blocks_s = winsvc.limit_receive(self.connection, IDLE_TIMEOUT_S)
        self.wire = Wire(self.connection, blocks_s=blocks_s)
        self.close_connection = False

    def finish(self) -> None:
        """Nothing is buffered for writing."""

    def handle(self) -> None:
        try:
            while not self.close_connection:
                self._handle_one()
            if self.may_send_more:
                self._linger()
        except (ClientGone, OSError):
            return  # the connection is closed by the server

    def _handle_one(self) -> None:
        self.wants_close = True  # until the request says otherwise
        self.may_send_more = True  # likewise
        self.is_head = False
        self.expects_continue = False
        self.progress: _Progress | None = None
        try:
            block = self.wire.head_block(IDLE_TIMEOUT_S, HEAD_TIMEOUT_S)
            if block is None:
                self.close_connection = True
                self.may_send_more = False
                return
            request = parse_request(block)
            self.is_head = request.method == "HEAD"
            is_read = request.method == "POST" and request.path in POST_ROUTES
            leaves_body = request.has_body and not is_read
            self.wants_close = request.is_last or leaves_body
            self._dispatch(request)
            self.may_send_more = leaves_body or not request.is_last
        except MalformedMessage as exc:
            self._refuse(_bad_request(str(exc), exc.status))
        except SidecarError as exc:
            self._refuse(exc)
        except TimeoutError:
            self.close_connection = True
            self.may_send_more = False
        except (ClientGone, OSError):
            raise
        except Exception:
            log.exception("a request failed")
            self._refuse(RequestRefused(500, "internal_error", "internal error", closes=True))

    # --- routes

    def _dispatch(self, request: Request) -> None:
        self._check_sender(request)
        if request.method not in KNOWN_METHODS:
            raise _bad_request(f"method {request.method} is not known", 501, "unknown_method")
        expected = request.head.all("expect")
        if expected and (len(expected) > 1 or expected[0].lower() != "100-continue"):
            raise _bad_request("only Expect: 100-continue is met", 417, "expectation_failed")
        self.expects_continue = bool(expected) and request.minor_version == 1
        allowed = self._allowed_methods(request.path)
        if request.method == "OPTIONS":
            self._send(204, b"", {"Allow": ", ".join([*allowed, "OPTIONS"])})
        elif request.method not in allowed:
            raise RequestRefused(
                405,
                "method_not_allowed",
                f"{request.path} takes {', '.join(allowed)}",
                closes=request.has_body,
                allow=", ".join([*allowed, "OPTIONS"]),
            )
        elif request.path == "/health":
            self._health()
        elif request.path == "/sidecars":
            self._send_json(200, {"sidecars": self.server.pool.snapshot()})
        elif request.path == "/v1/models":
            self._models()
        elif request.method == "DELETE":
            self._delete(request.path.removeprefix("/sidecars/"))
        else:
            self._proxy(request)

    def _allowed_methods(self, path: str) -> tuple[str, ...]:
        if path in ("/health", "/sidecars", "/v1/models", "*"):
            return ("GET", "HEAD")
        if path.startswith("/sidecars/"):
            return ("DELETE",)
        if path in POST_ROUTES:
            return ("POST",)
        raise RequestRefused(
            404,
            "not_found",
            f"no such path: {path[:200]}; try /health, /sidecars, /v1/models or "
            "/v1/chat/completions",
            closes=self.wants_close,
        )

    def _check_sender(self, request: Request) -> None:
        """Refuse other hosts' names, web pages of others, and strangers."""
        if (request.host or request.minor_version) and not self.server.is_ours(request.host):
            raise _bad_request(
                f"host {request.host!r} is not served: name it in LLAMA_SIDECAR_ALLOWED_HOSTS",
                *(403, "host_not_allowed"),
            )
        origin = request.head.get("origin")
        is_cross_site = request.head.get("sec-fetch-site") == "cross-site"
        if is_cross_site or (origin is not None and not self._is_own_origin(origin)):
            raise _bad_request("web pages of others are not served", 403, "origin_not_allowed")
        if self.server.config.api_key and request.path != "/health" and not self._is_known(request):
            raise _bad_request("send the key: Authorization: Bearer KEY", 401, "invalid_api_key")

    def _is_own_origin(self, origin: str) -> bool:
        match = re.fullmatch(r"https?://([^/?#@]+)", origin)
        host = _HOST.fullmatch(match[1]) if match else None
        return host is not None and self.server.is_ours((host[1] or host[2]).lower())

    def _is_known(self, request: Request) -> bool:
        scheme, _, bearer = (request.head.get("authorization") or "").partition(" ")
        given = bearer if scheme.lower() == "bearer" else request.head.get("x-api-key") or ""
        wanted = self.server.config.api_key or ""
        return hmac.compare_digest(given.strip().encode(), wanted.encode())

    def _health(self) -> None:
        states, waiting = self.server.pool.counts()
        is_closed = self.server.pool.is_closed
        sidecars: dict[str, int] = {
            name: states[name] for name in ("ready", "starting", "stopping")
        }
        self._send_json(
            503 if is_closed else 200,
            {
                "status": "draining" if is_closed else "ok",
                "version": __version__,
                "uptime_seconds": round(time.monotonic() - self.server.started, 3),
                "sidecars": sidecars | {"max": self.server.config.max_sidecars},
                "queue": {"waiting": waiting},
            },
        )

    def _models(self) -> None:
        loaded = self.server.pool.ready_models()
        models = dict.fromkeys(self.server.config.catalog.models.values())
        rows = [
            {
                "id": model.id,
                "object": "model",
                "created": 0,
                "owned_by": "llama-sidecar",
                "aliases": list(model.aliases),
                "loaded": model.id in loaded,
            }
            for model in models
        ]
        self._send_json(200, {"object": "list", "data": rows})

    def _delete(self, hash_: str) -> None:
        self.server.pool.remove(hash_[:64])
        self._send_json(200, {"hash": hash_, "deleted": True})

    # --- the relay

    def _proxy(self, request: Request) -> None:
        work = self._work(request, self._read_body(request))
        try:
            self._relay(request, work)
        except NotConnected:  # it died just now, and saw nothing of this request
            self._relay(request, work)

    def _work(self, request: Request, body: Bytes) -> _Work:
        """Which process the request needs, and what goes to it. Raises RequestRefused."""
        catalog = self.server.catalog.current()
        name = self._header(request, "x-model-id")
        model = _model_called(name, catalog.models) if name else None
        is_form = POST_ROUTES[request.path] is Body.FORM
        parsed = None if model and is_form else _json_object(body)
        model = model or _model_called(_model_in(parsed), catalog.models)
        resolved = self._resolve(request, catalog.validator, model)
        is_exact = self._wants_exact(request)
        if parsed is None:
            return _Work(model, resolved.spec, is_exact, [body])
        self.progress = self._wanted_progress(request, parsed)
        added = resolved.defaults.fields_for(parsed)
        streaming = _stream_fields(request.path, parsed, added)
        pieces = _with_members(body, parsed, added | streaming)
        return _Work(model, resolved.spec, is_exact, pieces, bool(streaming))

    def _wanted_progress(self, request: Request, body: JsonObject) -> _Progress | None:
        """For a streaming request that asks to be told what it waits for."""
        wish = self._header(request, "x-sidecar-progress")
        if wish not in (None, "comments"):
            raise RequestRefused(
                *(400, "invalid_header", "X-Sidecar-Progress takes: comments"),
                param="X-Sidecar-Progress",
            )
        can_be_told = body.values.get("stream") is True and request.minor_version == 1
        return _Progress(self, request.path) if wish and can_be_told else None

    def _relay(self, request: Request, work: _Work) -> None:
        begun = time.perf_counter()  # time.monotonic() goes in steps of 16 ms on Windows
        with self._lease(work) as lease:
            relay = _Relay(self, request, work, lease)
            try:
                relay.run()
            except ClientGone:
                relay.remark = " client left"
                raise
            finally:
                log.info(
                    "request hash=%s model=%s path=%s status=%d start=%s "
                    "wait_ms=%d ms=%d bytes=%d%s",
                    *(lease.sidecar.spec.hash, work.model.id, request.path, relay.status),
                    *(lease.start_kind, lease.wait_s * 1000, (time.perf_counter() - begun) * 1000),
                    *(relay.sent_bytes, relay.remark),
                )

    def _read_body(self, request: Request) -> Bytes:
        """The whole body. Refused by its announced size before a byte of it is read."""
        kind = (request.head.get("content-type") or "").partition(";")[0].strip().lower()
        if kind == "text/plain":
            raise _bad_request(
                "send JSON with Content-Type: application/json", 415, "unsupported_media_type"
            )
        limit = self.server.config.max_body_bytes
        length = request.length or 0
        if length > limit:
            raise _too_large(limit)
        if self.expects_continue and length:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length != CHUNKED and len(self.wire.buffer) >= length:
            body, self.wire.buffer = self.wire.buffer[:length], self.wire.buffer[length:]
            return body
        incoming = _Incoming(self.wire)
        return self._read_exactly(incoming, length) if length >= 0 else self._read_chunks(incoming)

    def _read_exactly(self, incoming: _Incoming, length: int) -> Bytes:
        body = bytearray()  # it grows where it stands, as what comes is not to be trusted to come
        while len(body) < length:
            data = incoming.receive()
            left = length - len(body)
            self.wire.buffer = data[left:]
            body += data[:left] if len(data) > left else data
        return body

    def _read_chunks(self, incoming: _Incoming) -> Bytes:
        decoder, body, limit = ChunkedDecoder(), bytearray(), self.server.config.max_body_bytes
        while not decoder.is_done:
            body += decoder.feed(incoming.receive())
            decoder.check()
            if len(body) > limit:
                raise _too_large(limit)
        self.wire.buffer = decoder.rest
        return body

    def _resolve(self, request: Request, validator: Validator, model: Model) -> Resolved:
        flags = self._header(request, "x-agent-flags")
        owner = self._agent_id(request) if self.server.config.isolates_agents else ""
        body = POST_ROUTES[request.path]
        try:
            return validator.resolve(
                model.id, model.path, model.args, flags, body=body, owner=owner
            )
        except FlagsRefused as exc:
            raise RequestRefused(
                400, "invalid_flags", " ".join(exc.faults), param="X-Agent-Flags"
            ) from exc

    def _agent_id(self, request: Request) -> str:
        return _checked_agent_id(self._header(request, "x-agent-id") or "")

    def _wants_exact(self, request: Request) -> bool:
        wish = self._header(request, "x-sidecar-exact") or "0"
        if wish not in ("0", "1"):
            raise RequestRefused(
                400, "invalid_header", "X-Sidecar-Exact takes 0 or 1", param="X-Sidecar-Exact"
            )
        return wish == "1" or not self.server.config.flag_rules.share

    def _header(self, request: Request, name: str) -> str | None:
        """One of our own headers, as UTF-8. Raises RequestRefused."""
        try:
            value = request.head.get(name)
            return value if value is None else value.encode("latin-1").decode("utf-8")
        except (MalformedMessage, UnicodeDecodeError):
            raise RequestRefused(
                *(400, HEADER_FAULTS.get(name, "invalid_header")),
                f"{_titled(name)} takes one value in UTF-8, once",
                param=_titled(name),
            ) from None

    def _lease(self, work: _Work) -> Lease:
        with contextlib.ExitStack() as stack:

            def on_wait(ticket: Ticket) -> None:
                pool, progress = self.server.pool, self.progress
                cancel = functools.partial(pool.cancel, ticket)

                def tell() -> None:
                    if progress:
                        progress.comment(pool.progress(ticket))

                watching = _watching(self.connection, cancel, tell if progress else None)
                stack.enter_context(watching)

            try:
                return self.server.pool.lease(
                    work.spec,
                    self.server.config.queue_s,
                    pinned=work.model.is_pinned,
                    exact=work.is_exact,
                    on_wait=on_wait,
                )
            except WaitCancelled:
                log.info("request hash=%s left while it waited", work.spec.hash)
                raise ClientGone from None

    # --- answering

    def _write(self, data: bytes, turn: Turn = NO_TURNS) -> None:
        """Send to the client. Raises ClientGone if it takes nothing for SEND_TIMEOUT_S."""
        try:
            _send_all(self.connection, data, SEND_TIMEOUT_S, turn)
        except OSError as exc:
            raise ClientGone from exc

    def _send_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.close_connection = self.wants_close
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {_date()}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if status != 204:
            lines.append(f"Content-Length: {len(body)}")
        lines.append("Connection: close" if self.close_connection else "Connection: keep-alive")
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        self._write(head if self.is_head else head + body)

    def _refuse(self, error: SidecarError) -> None:
        headers = {"Content-Type": "application/json"}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        if isinstance(error, RequestRefused):
            self.wants_close = self.wants_close or error.closes
            if error.allow:
                headers["Allow"] = error.allow
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        log.info("refused status=%d code=%s: %s", error.status, error.code, error.message)
        if self.progress and self.progress.has_begun:
            self.progress.end_with(_error_body(error))
            return
        self._send(error.status, _error_body(error), headers)

    def _linger(self) -> None:
        """Read what is in flight and throw it away: a reset would take the answer with it."""
        deadline, seen = time.monotonic() + LINGER_S, len(self.wire.buffer)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while seen < LINGER_BYTES and (left_s := deadline - time.monotonic()) > 0:
                if not winsvc.wait_readable([self.connection], left_s):
                    return
                data = self.connection.recv(RECEIVE_BYTES)
                if not data:
                    return
                seen += len(data)


class _Incoming:
    """A request body on its way, which must neither pause nor trickle."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._begun = time.monotonic()
        self._bytes = 0

    def receive(self) -> bytes:
        """The next piece. Raises MalformedMessage, OSError."""
        late = self._begun + BODY_SILENCE_S + self._bytes / MIN_BODY_BYTES_PER_S
        left_s = max(0.001, late - time.monotonic())
        try:
            data = self._wire.receive(min(BODY_SILENCE_S, left_s))
        except TimeoutError:
            raise MalformedMessage("the rest of the body did not come in time", 408) from None
        if not data:
            raise MalformedMessage("the connection ended within the body")
        self._bytes += len(data)
        return data


@dataclasses.dataclass(frozen=True)
class _Work:
    """What one request comes to."""

    model: Model
    spec: SidecarSpec
    is_exact: bool  # no process but one of exactly this spec will do
    body: Sequence[Bytes]  # for the child, in pieces: a large one is copied nowhere
    is_made_whole: bool = False  # the child streams to us, and the client gets one answer


def _too_large(limit: int) -> RequestRefused:
    words = f"the body is larger than {limit} bytes"
    return RequestRefused(413, "request_too_large", words, closes=True)


def _checked_agent_id(agent_id: str) -> str:
    """Raises RequestRefused."""
    if len(agent_id) > MAX_AGENT_ID_CHARS or not agent_id.isprintable():
        raise RequestRefused(
            *(400, "invalid_header"),
            f"X-Agent-Id takes at most {MAX_AGENT_ID_CHARS} printable characters",
            param="X-Agent-Id",
        )
    return agent_id


HEADER_FAULTS: Final = {"x-agent-flags": "invalid_flags", "x-model-id": "missing_model"}


def _json_object(body: Bytes) -> JsonObject:
    """Raises RequestRefused."""
    try:
        return JsonObject(str(body, "utf-8-sig"))
    except ValueError as exc:
        raise RequestRefused(400, "invalid_json", f"the body is no JSON object: {exc}") from exc


def _with_members(body: Bytes, parsed: JsonObject, new: Mapping[str, str]) -> list[Bytes]:
    """The body with these members; all else stays byte by byte."""
    if not new:
        return [body]
    view, pieces = memoryview(body).toreadonly(), list[Bytes]()
    at = len(codecs.BOM_UTF8) if body[:3] == codecs.BOM_UTF8 else 0
    begin = at
    for start, end, text in parsed.edits(new):
        pieces += [view[at : begin + parsed.bytes_before(start)], text.encode("utf-8")]
        at = begin + parsed.bytes_before(end)
    return [*pieces, view[at:]]


# What a request is given so that the child streams to us: only then does llama-server
# notice at once that nobody wants the answer any more (server-queue.cpp, recv_with_timeout).
STREAMED: Final = {"stream": "true"}
STREAMED_WITH_USAGE: Final = STREAMED | {"stream_options": '{"include_usage":true}'}

# With one of these a stream says less than the whole answer does: probabilities of tokens
# that show in no text; text held back because a stop word may have begun with it.
NOT_IN_STREAMS: Final = frozenset(
    "logprobs n_probs n_cmpl stop stop_sequences top_logprobs verbose".split()
)


def _stream_fields(path: str, body: JsonObject, added: Mapping[str, str]) -> dict[str, str]:
    """What makes the child stream an answer that is wanted in one piece.

    Empty if it could not be put together again exactly. `added` are the fields
    that the request gets besides its own.
    """
    values = body.values
    is_one = not values.get("stream") and values.get("n") in (None, 1)
    told = {name for name, value in values.items() if value not in (None, False, 0, "", [])}
    if path not in WHOLE_ANSWERS or not is_one or NOT_IN_STREAMS & (told | set(added)):
        return {}
    if path == "/v1/completions" and not isinstance(values.get("prompt"), str):
        return {}
    return STREAMED_WITH_USAGE if path.endswith("/completions") else STREAMED


def _model_in(body: JsonObject | None) -> str:
    """The body's `model`. Raises RequestRefused."""
    name = body.values.get("model") if body else None
    if not isinstance(name, str) or not name:
        raise RequestRefused(
            400,
            "missing_model",
            'name a model: "model" in the JSON body, or the header X-Model-Id',
            param="model",
        )
    return name


_presence = _Glance(Path.is_file)


def _model_called(name: str, models: Mapping[str, Model]) -> Model:
    """Raises RequestRefused."""
    model = models.get(name)
    if model is None:
        known = list(models)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5]
        raise RequestRefused(
            404,
            "model_not_found",
            f"no model {name[:200]!r}; nearest: {', '.join(near)} (GET /v1/models lists all)",
            param="model",
        )
    if not _presence.at(model.path):
        raise RequestRefused(
            404,
            "model_not_found",
            f"model {model.id}: its file {model.path.name} is missing; put it where "
            "MODEL_DIR_MAP_FILE says, or change the map",
            param="model",
        )
    return model


def _date() -> str:
    return _date_at(int(time.time()))


@functools.lru_cache(maxsize=1)
def _date_at(second: int) -> str:
    """RFC 9110, 5.6.7."""
    moment = time.gmtime(second)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[moment.tm_wday]
    months = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
    return time.strftime(f"{day}, %d {months[moment.tm_mon - 1]} %Y %H:%M:%S GMT", moment)


def _has_left(client: socket.socket) -> bool:
    """Whether a readable client socket has ended rather than sent its next request."""
    try:
        return not client.recv(1, socket.MSG_PEEK | NO_WAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextlib.contextmanager
def _watching(
    client: socket.socket, when_gone: Callable[[], None], tell: Callable[[], None] | None = None
) -> Iterator[None]:
    """While the block runs, call `when_gone` as soon as the client closes its connection.

    `tell` is called every COMMENT_PAUSE_S, and may raise ClientGone. Raises
    OutOfDescriptors where none is left to do so.
    """
    try:
        ours, theirs = socket.socketpair()
    except OSError as exc:
        raise OutOfDescriptors.because(exc) from exc
    pause_s = COMMENT_PAUSE_S if tell else None

    def watch() -> None:
        watched = [client, theirs]
        while theirs not in (ready := winsvc.wait_readable(watched, pause_s)):
            if client in ready:
                if _has_left(client):
                    return when_gone()
                watched = [theirs]  # it has sent its next request already
            elif tell:
                try:
                    tell()
                except ClientGone:
                    return when_gone()
        return None

    thread = winsvc.start_thread("watch-client", watch)
    try:
        yield
    finally:
        ours.close()
        thread.join()
        theirs.close()


class _Progress:
    """Comments on an event stream that has not begun yet, for a client that waits.

    The first one sends the answer's head; from then on an error can only be
    told as an event, and the stream is cut behind it.
    """

    def __init__(self, handler: Handler, path: str) -> None:
        self._handler = handler
        self._path = path
        self.has_begun = False

    def comment(self, text: str) -> None:
        """Raises ClientGone."""
        head = b"" if self.has_begun else self._head()
        self.has_begun = True
        self._handler._write(head + _as_chunk(b": %b\n\n" % text.encode()))

    def end_with(self, error: bytes) -> None:
        """Tell an error, one JSON text, and cut the stream. Raises ClientGone."""
        name = b"event: error\n" if POST_ROUTES[self._path] is Body.MESSAGES else b""
        self._handler.close_connection = True
        line = b" ".join(error.splitlines())
        self._handler._write(_as_chunk(name + b"data: %b\n\n" % line))

    def _head(self) -> bytes:
        lines = [
            "HTTP/1.1 200 OK",
            f"Date: {_date()}",
            "Content-Type: text/event-stream",
            "Cache-Control: no-cache",
            "X-Accel-Buffering: no",
            "Transfer-Encoding: chunked",
            f"Connection: {'close' if self._handler.wants_close else 'keep-alive'}",
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def _as_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HOP_BY_HOP: Final = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    "transfer-encoding upgrade content-length".split()
)
PASSED_HEADERS: Final = ("content-type", "accept")
NO_BODY_STATUS: Final = frozenset({204, 304})


# An answer that ends so is followed by the next step of the same agent. Within a JSON
# string the quotes would be escaped, so no text that a model writes can look like this.
_TOOL_CALLS = re.compile(
    rb'"(?:finish_reason": ?"tool_calls|stop_reason": ?"tool_use|type": ?"function_call)"'
)
_TOOL_CALLS_BYTES: Final = 32  # at least as long as any match


class _ChildWire(Wire):
    """Reads what a child says to its client, however long it takes. Raises ClientGone.

    Its socket blocks for UNWATCHED_S at most. The client is looked at that often, and
    whenever the child is silent for so long.
    """

    def __init__(self, sock: socket.socket, client: socket.socket) -> None:
        super().__init__(sock)
        self._client = client
        self._watched = [sock, client]
        self._unwatched_until = time.monotonic() + UNWATCHED_S

    def _next(self, timeout_s: float | None) -> bytes:
        if time.monotonic() < self._unwatched_until:
            with contextlib.suppress(BlockingIOError):
                return self._sock.recv(WAITING_BYTES)
        self._await()
        self._unwatched_until = time.monotonic() + UNWATCHED_S
        return self._sock.recv(RECEIVE_BYTES)

    def _await(self) -> None:
        """Until the child says something. Raises ClientGone if the client leaves first."""
        while self._sock not in winsvc.wait_readable(self._watched, None):
            if _has_left(self._client):
                raise ClientGone
            self._watched = [self._sock]  # the client has sent its next request already


class _Relay:
    """One request to a child, and its answer back to the client, as it comes."""

    def __init__(self, handler: Handler, request: Request, work: _Work, lease: Lease) -> None:
        self._handler = handler
        self._request = request
        self._body = work.body
        self._is_made_whole = work.is_made_whole
        self._lease = lease
        self._tail = b""  # of the piece before, where a match may begin
        self.status = 0  # 0 until an answer was passed on
        self.sent_bytes = 0
        self.remark = ""

    def run(self) -> None:
        """Relay it all. Raises UpstreamFailed before the first byte, ClientGone."""
        connection, wire, head, length = self._exchange()
        is_reusable = False
        try:
            is_stream = any(v.startswith("text/event-stream") for v in head.all("content-type"))
            if self._is_made_whole and is_stream:
                is_reusable = self._answer_whole(wire, head, length)
            elif self._has_begun() and not (is_stream and int(head.start[2]) == 200):
                is_reusable = self._answer_as_event(wire, length)
            else:
                is_reusable = self._answer(wire, head, length)
        finally:
            if is_reusable:
                self._lease.upstream.keep(connection)
            else:
                self._lease.upstream.drop(connection)

    def _has_begun(self) -> bool:
        """Whether the client got a head, and comments, while it waited."""
        return bool(self._handler.progress and self._handler.progress.has_begun)

    def _note(self, piece: bytes) -> None:
        """The answer moves; does it end in tool calls?"""
        self._lease.progressed()
        seen = self._tail + piece
        if _TOOL_CALLS.search(seen):
            self._lease.ended_in_tool_calls = True
        self._tail = seen[-_TOOL_CALLS_BYTES:]

    def _exchange(self) -> tuple[Connection, Wire, Head, int]:
        """Send the request, read the answer's head; once more if a kept connection was stale."""
        for is_retry in (False, True):
            connection = self._connect(is_retry)
            wire = _ChildWire(connection.sock, self._handler.connection)
            try:
                return (connection, wire, *self._ask(connection, wire))
            except (ClientGone, OSError, MalformedMessage) as exc:
                self._lease.upstream.drop(connection)
                if isinstance(exc, ClientGone):
                    raise
                is_stale = connection.used > 0 and isinstance(exc, ConnectionError)
                if is_retry or not is_stale:
                    raise UpstreamFailed(self._failure_words(exc)) from exc
        raise AssertionError("unreachable: the second try returns or raises")

    def _connect(self, is_retry: bool) -> Connection:
        try:
            return self._lease.upstream.take(fresh=is_retry)
        except OSError as exc:
            if exc.errno in OUT_OF_DESCRIPTORS:
                raise OutOfDescriptors.because(exc) from exc
            failure = UpstreamFailed if is_retry else NotConnected
            raise failure(self._failure_words(exc)) from exc

    def _ask(self, connection: Connection, wire: Wire) -> tuple[Head, int]:
        for data in self._message():
            _send_all(connection.sock, data, UPSTREAM_SEND_TIMEOUT_S, TURNS)
        for _ in range(5):
            block = wire.head_block(None, HEAD_TIMEOUT_S)
            if block is None:
                raise ConnectionResetError("it closed the connection without an answer")
            head = parse_head(block, _STATUS_LINE)
            status = int(head.start[2])
            if status >= 200:
                length = body_length(head, int(head.start[1]))
                if status in NO_BODY_STATUS:
                    length = 0
                return head, UNTIL_CLOSE if length is None else length
        raise MalformedMessage("more interim answers than make sense")

    def _message(self) -> Sequence[Bytes]:
        """What the child is sent: in one piece if that takes no large copy."""
        length = sum(map(len, self._body))
        pieces = [self._head_for_child(length), *self._body]
        return [b"".join(pieces)] if length <= RECEIVE_BYTES else pieces

    def _head_for_child(self, length: int) -> bytes:
        """Built anew: nothing of the client's framing reaches the child."""
        request = self._request
        target = f"{request.path}?{request.query}" if request.query else request.path
        lines = [
            f"POST {target} HTTP/1.1",
            f"Host: 127.0.0.1:{self._lease.upstream.port}",
            f"Authorization: Bearer {self._lease.upstream.api_key}",
            f"Content-Length: {length}",
        ]
        for name, value in request.head.fields:
            if name in PASSED_HEADERS:
                lines.append(f"{name}: {value}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"

    def _answer(self, wire: Wire, head: Head, length: int) -> bool:
        """Pass the answer on; True if the child's connection can serve again."""
        self.status = int(head.start[2])
        handler = self._handler
        handler.close_connection = handler.wants_close
        has_begun = self._has_begun()  # with a head that says chunked
        has_no_length = length in (CHUNKED, UNTIL_CLOSE)
        is_chunked = has_begun or (has_no_length and self._request.minor_version == 1)
        if has_no_length and not is_chunked:
            handler.close_connection = True
        start = b"" if has_begun else self._head_for_client(head, length, is_chunked)
        pieces = _body_pieces(wire, length)
        try:
            for piece in pieces:
                self._note(piece)
                data = _as_chunk(piece) if is_chunked and piece else piece
                handler._write(start + data if start else data, TURNS if start else NO_TURNS)
                self.sent_bytes += len(piece)
                start = b""
        except (OSError, MalformedMessage) as exc:
            if start:
                raise UpstreamFailed(self._failure_words(exc)) from exc
            handler.close_connection = True
            self.remark = f" cut: {printable(str(exc))}"
            return False
        tail = b"0\r\n\r\n" if is_chunked else b""
        if start or tail:
            handler._write(start + tail)
        return _is_reusable(wire, head, length)

    def _answer_as_event(self, wire: Wire, length: int) -> bool:
        """The child refused, but the client's stream has begun: tell it as an event."""
        progress = self._handler.progress
        assert progress is not None
        self.status = 200
        progress.end_with(self._whole_body(wire, length))
        return False

    def _answer_whole(self, wire: Wire, head: Head, length: int) -> bool:
        """Put the child's stream together and pass it on as one answer."""
        whole = WHOLE_ANSWERS[self._request.path]()
        try:
            for piece in _body_pieces(wire, length):
                self._note(piece)
                whole.feed(piece)
        except (OSError, MalformedMessage) as exc:
            raise UpstreamFailed(self._failure_words(exc)) from exc
        if not whole.is_complete:
            raise UpstreamFailed(self._failure_words(EOFError("its answer ended too early")))
        self.status, value = whole.answer()
        body = json.dumps(value).encode()
        self.sent_bytes = len(body)
        self._handler.close_connection = self._handler.wants_close
        start = self._head_for_client(_json_head(head, self.status), len(body), is_chunked=False)
        self._handler._write(start + body)
        return _is_reusable(wire, head, length)

    def _whole_body(self, wire: Wire, length: int) -> bytes:
        try:
            return b"".join(_body_pieces(wire, length))
        except (OSError, MalformedMessage) as exc:
            raise UpstreamFailed(self._failure_words(exc)) from exc

    def _head_for_client(self, head: Head, length: int, is_chunked: bool) -> bytes:
        dropped = HOP_BY_HOP | head.tokens("connection")
        status = int(head.start[2])
        lines = [head.start[0].replace(b"HTTP/1.0", b"HTTP/1.1", 1).decode("latin-1")]
        for name, value in head.fields:
            if name not in dropped and not name.startswith("access-control-"):
                lines.append(f"{_titled(name)}: {value}")
        if not head.all("date"):
            lines.append(f"Date: {_date()}")
        lines += [
            f"X-Sidecar-Hash: {self._lease.sidecar.spec.hash}",
            f"X-Sidecar-Start: {self._lease.start_kind}",
            f"X-Sidecar-Wait-Ms: {self._lease.wait_s * 1000:.0f}",
        ]
        if is_chunked:
            lines.append("Transfer-Encoding: chunked")
        elif length >= 0 and status not in NO_BODY_STATUS:
            lines.append(f"Content-Length: {length}")
        lines.append(f"Connection: {'close' if self._handler.close_connection else 'keep-alive'}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"

    def _failure_words(self, exc: Exception) -> str:
        """What to tell the client, with the child's own last words if it died."""
        sidecar = self._lease.sidecar
        reason = self._handler.server.pool.why_gone(sidecar, 0.5)
        return (
            f"sidecar {sidecar.spec.hash} did not answer properly: {reason or exc}; "
            "the next request starts it again if it died"
        )


def _is_reusable(wire: Wire, head: Head, length: int) -> bool:
    """Whether the child's connection can serve again, its answer being read to the end."""
    says_close = "close" in head.tokens("connection") or head.start[1] == b"0"
    return not says_close and length != UNTIL_CLOSE and not wire.buffer


def _json_head(head: Head, status: int) -> Head:
    """The head of an event stream as that of one JSON answer."""
    line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()
    start = _STATUS_LINE.fullmatch(line)
    assert start is not None
    others = [(name, value) for name, value in head.fields if name not in STREAM_FIELDS]
    return Head(start, [*others, ("content-type", "application/json; charset=utf-8")])


STREAM_FIELDS: Final = frozenset({"content-type", "cache-control", "x-accel-buffering"})


class WholeAnswer:
    """Puts an answer together from llama-server's event stream.

    What comes out has the shape that the same request has without `stream`
    (tools/server/server-task.cpp, the pairs to_json_... and to_json_..._stream).
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._error: dict[str, Any] | None = None
        self.is_complete = False

    def feed(self, data: bytes) -> None:
        """Take more of the stream. Raises MalformedMessage."""
        *events, self._buffer = (self._buffer + data).split(b"\n\n")
        for event in events:
            fields = dict(line.partition(b": ")[::2] for line in event.split(b"\n"))
            if b"data" in fields:
                self._read(fields.get(b"event", b""), fields[b"data"])

    def answer(self) -> tuple[int, dict[str, Any]]:
        """The status and the JSON answer."""
        if self._error is None:
            return 200, self._value()
        code = self._error.get("code")
        is_status = isinstance(code, int) and 400 <= code <= 599
        return code if is_status and code else 500, {"error": self._error}

    def _read(self, name: bytes, data: bytes) -> None:
        if data.strip() == b"[DONE]":
            self.is_complete = True
            return
        try:
            event = dict(json.loads(data))
            if name == b"error" or "error" in event:
                self._error, self.is_complete = dict(event.get("error", event)), True
            else:
                self._take(event)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
            raise MalformedMessage(f"an event that makes no sense: {exc}") from exc

    def _take(self, event: dict[str, Any]) -> None:
        raise NotImplementedError

    def _value(self) -> dict[str, Any]:
        raise NotImplementedError


class WholeCompletion(WholeAnswer):
    """/v1/completions."""

    kind = "text_completion"

    def __init__(self) -> None:
        super().__init__()
        self._top: dict[str, Any] = {}
        self._choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        self._texts: dict[str, list[str]] = {}

    def _take(self, event: dict[str, Any]) -> None:
        for choice in event.pop("choices", ()):
            self._take_choice(choice)
        event.pop("prompt_progress", None)  # of streams alone
        self._top |= {name: value for name, value in event.items() if value is not None}

    def _take_choice(self, choice: dict[str, Any]) -> None:
        self._add_texts({"text": choice.pop("text", "")})
        self._choice |= {"logprobs": None} | _not_null(choice)

    def _add_texts(self, pieces: dict[str, Any]) -> None:
        for name, piece in _not_null(pieces).items():
            if not isinstance(piece, str):
                raise TypeError(f"{name} is no text")
            self._texts.setdefault(name, []).append(piece)

    def _joined(self) -> dict[str, Any]:
        return {name: "".join(pieces) for name, pieces in self._texts.items()}

    def _value(self) -> dict[str, Any]:
        choice = self._choice | {"text": ""} | self._joined()
        return {"choices": [choice]} | self._top | {"object": self.kind}


class WholeChat(WholeCompletion):
    """/v1/chat/completions."""

    kind = "chat.completion"

    def __init__(self) -> None:
        super().__init__()
        self._tool_calls: dict[int, dict[str, Any]] = {}

    def _take_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.pop("delta", {})
        for call in delta.pop("tool_calls", None) or ():
            self._take_tool_call(call)
        delta.pop("role", None)
        self._add_texts(delta)
        self._choice |= _not_null(choice)

    def _take_tool_call(self, call: dict[str, Any]) -> None:
        function = call.pop("function", {})
        known = self._tool_calls.setdefault(
            int(call.pop("index")), {"type": "function", "function": {"name": "", "arguments": ""}}
        )
        known["function"]["name"] += function.get("name") or ""
        known["function"]["arguments"] += function.get("arguments") or ""
        known |= call

    def _value(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": ""} | self._joined()
        if self._tool_calls:
            message["tool_calls"] = [self._tool_calls[n] for n in sorted(self._tool_calls)]
        choice = self._choice | {"message": message}
        return {"choices": [choice]} | self._top | {"object": self.kind}


class WholeMessage(WholeAnswer):
    """/v1/messages."""

    def __init__(self) -> None:
        super().__init__()
        self._message: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._pieces: dict[tuple[int, str], list[str]] = {}

    def _take(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "message_start":
                self._message = dict(event["message"])
            case "content_block_start":
                self._blocks[int(event["index"])] = dict(event["content_block"])
            case "content_block_delta":
                self._take_delta(int(event["index"]), event["delta"])
            case "message_delta":
                self._message |= event["delta"]
                self._message["usage"] = self._message["usage"] | event["usage"]
            case "message_stop":
                self._join()
                self.is_complete = True

    def _take_delta(self, index: int, delta: dict[str, Any]) -> None:
        del delta["type"]
        for name, piece in delta.items():
            self._pieces.setdefault((index, name), []).append(piece)

    def _join(self) -> None:
        for (index, name), pieces in self._pieces.items():
            self._blocks[index][name] = "".join(pieces)
        for block in self._blocks.values():
            if block["type"] == "tool_use":
                block["input"] = _json_or_empty(block.pop("partial_json", ""))

    def _value(self) -> dict[str, Any]:
        return self._message | {"content": [self._blocks[n] for n in sorted(self._blocks)]}


class WholeResponse(WholeAnswer):
    """/v1/responses: the last event of its stream holds it all."""

    def __init__(self) -> None:
        super().__init__()
        self._response: dict[str, Any] = {}

    def _take(self, event: dict[str, Any]) -> None:
        if event["type"] == "response.completed":
            found = event["response"]
            output = [item | {"status": "completed"} for item in found["output"]]
            self._response = found | {"completed_at": found["created_at"], "output": output}
            self.is_complete = True

    def _value(self) -> dict[str, Any]:
        return self._response


def _not_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _json_or_empty(text: str) -> object:
    """As llama-server reads a tool call's arguments."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


WHOLE_ANSWERS: Final[Mapping[str, Callable[[], WholeAnswer]]] = {
    "/v1/chat/completions": WholeChat,
    "/v1/completions": WholeCompletion,
    "/v1/messages": WholeMessage,
    "/v1/responses": WholeResponse,
}


@functools.lru_cache(maxsize=256)
def _titled(name: str) -> str:
    return "-".join(part.capitalize() for part in name.split("-"))


def _body_pieces(wire: Wire, length: int) -> Iterator[bytes]:
    """The answer's body as it comes, first b"" if nothing is there yet.

    Raises MalformedMessage or OSError when it breaks off.
    """
    if length == 0:
        return
    if not wire.buffer:
        yield b""  # the head goes out at once
    if length == CHUNKED:
        decoder = ChunkedDecoder()
        while not decoder.is_done:
            if piece := decoder.feed(_more(wire)):
                yield piece
            decoder.check()
        wire.buffer = decoder.rest
        return
    if length == UNTIL_CLOSE:
        while data := wire.receive(None):
            yield data
        return
    while length > 0:
        data = _more(wire)
        yield data[:length]
        wire.buffer = data[length:]
        length -= min(length, len(data))


def _more(wire: Wire) -> bytes:
    data = wire.receive(None)
    if not data:
        raise ConnectionResetError("the answer broke off")
    return data


# --- the program


class _OneLine(logging.Formatter):
    """No event takes more than one line, but for tracebacks; none holds control characters."""

    def format(self, record: logging.LogRecord) -> str:
        moment = f"{_local_time(int(record.created))},{int(record.msecs):03}"
        message = printable(record.getMessage())
        line = f"{moment} {record.levelname} {record.name} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


@functools.lru_cache(maxsize=1)
def _local_time(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


class _AsItIs(logging.Formatter):
    """For text that has its form already."""

    def format(self, record: logging.LogRecord) -> str:
        return str(record.msg)


class _Lines(logging.Handler):
    """Hands lines on to the handlers that write them, and nobody waits for another's writing.

    Whoever finds that nobody writes does so for all who come meanwhile, in the order
    in which they came.
    """

    def __init__(self, writers: Sequence[logging.Handler]) -> None:
        super().__init__()
        self._lines: collections.deque[str] = collections.deque()
        self._writing = threading.Lock()  # guards what follows
        self._writers = writers
        self._written = logging.makeLogRecord({})  # used again and again: making one takes long
        for writer in writers:
            writer.setFormatter(_AsItIs())

    def createLock(self) -> None:  # noqa: N802 - logging's name
        self.lock = None  # `handle` holds it while it writes, and that is what we do without

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record))
        except (TypeError, ValueError, KeyError):  # a log line is no reason to fail
            self.handleError(record)
        self.flush()

    def flush(self) -> None:
        """Have all lines written, by us or by who writes now; waits where too many wait already.

        Whoever wrote for others often enough goes on with its own work: a thread of its own
        writes as long as lines keep coming.
        """
        for _ in range(MOST_WRITINGS):
            if not self._write(is_waiting=len(self._lines) > MAX_LINES_WAITING):
                return
        if self._lines:
            winsvc.start_thread("log", self._write_all)

    def close(self) -> None:
        """Write what is left; waits for who writes now."""
        self._write(is_waiting=True)
        super().close()

    def _write_all(self) -> None:
        while self._write(is_waiting=False):
            pass

    def _write(self, *, is_waiting: bool) -> bool:
        """Write the lines that there are, unless somebody does; whether we did."""
        if not self._lines or not self._writing.acquire(blocking=is_waiting):
            return False
        try:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if lines:  # who waited may find that all were written meanwhile
                self._written.msg = "\n".join(lines)
                for writer in self._writers:
                    writer.handle(self._written)
        finally:
            self._writing.release()
        return True


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file that goes on growing while Windows lets nobody rename it.

    It does so as long as another program has the file open.
    """

    retry_at = 0.0  # monotonic

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802 - logging's name
        return time.monotonic() >= self.retry_at and bool(super().shouldRollover(record))

    def doRollover(self) -> None:  # noqa: N802 - logging's name
        """Move the file aside first: where that fails nothing else has been moved."""
        if self.stream:
            self.stream.close()
        aside = Path(f"{self.baseFilename}.aside")
        try:
            Path(self.baseFilename).replace(aside)
            aside.replace(self.baseFilename)
        except OSError:
            self.retry_at = time.monotonic() + LOG_RETRY_S
            self.stream = self._open()
            return
        super().doRollover()


def set_up_logging(level: str, file: Path | None = None) -> None:
    """To stderr, and to the file if one is named. Raises OSError if it cannot be written."""
    handlers: list[logging.Handler] = []
    if sys.stderr is not None:  # a service has none
        handlers.append(logging.StreamHandler())
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(
            _LogFile(file, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES_KEPT, encoding="utf-8")
        )
    # What no format of ours shows need not be looked up for each line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # the logging HOWTO, "Optimization": no search for the caller
    lines = _Lines(handlers)
    lines.setFormatter(_OneLine())
    logging.basicConfig(level=LOG_LEVELS[level], handlers=[lines], force=True)


Stops = queue.SimpleQueue[int]  # its put is safe in a signal handler


def stop_signals() -> Stops:
    """A queue in which each stop signal of this process will stand."""
    stops: Stops = queue.SimpleQueue()
    for signum in winsvc.STOP_SIGNALS:
        signal.signal(signum, lambda number, _frame: stops.put(number))
    return stops


def serve(config: Config, stops: Stops, when_serving: Callable[[], None] = lambda: None) -> None:
    """Run until a number stands in `stops`, drain, end all children; a second one ends at once.

    Raises OSError if it cannot listen.
    """
    winsvc.contain_children()
    winsvc.end_with_launcher()
    winsvc.restore_dll_search()
    winsvc.raise_descriptor_limit()
    if config.keeps_to_one_cpu:
        winsvc.keep_to_one_cpu()
    for orphan in winsvc.end_orphans(config.state_dir):
        log.warning("ended an orphan of an earlier daemon: %s", orphan)
    with winsvc.private_dir() as private_dir:
        catalog = LiveCatalog(config)
        pool = Pool(_pool_config(config, catalog, Path(private_dir)))
        try:
            server = Server(config, catalog, pool)
        except OSError:
            pool.close(0)
            raise
        winsvc.start_thread("http", server.serve_forever)
        host, port = server.server_address[:2]
        log.info("listening on http://%s:%d version=%s", host, port, __version__)
        when_serving()
        log.info("signal %d: draining for up to %g s", _next(stops), config.drain_s)
        _drain(pool, config.drain_s, stops)
        server.shutdown()
        server.server_close()
    log.info("stopped")


def _drain(pool: Pool, drain_s: float, stops: Stops) -> None:
    finished = -1

    def close() -> None:
        pool.close(drain_s)
        stops.put(finished)

    winsvc.start_thread("drain", close)
    if _next(stops) != finished:
        log.warning("second signal: ending at once")
        pool.close(0)


def _next(stops: Stops) -> int:
    """Wait for a signal; in slices: one that another thread received is handled between them."""
    while True:
        with contextlib.suppress(queue.Empty):
            return stops.get(timeout=0.5)


def _pool_config(config: Config, catalog: LiveCatalog, private_dir: Path) -> PoolConfig:
    return PoolConfig(
        server_bin=config.server_bin,
        ports=config.ports,
        max_sidecars=config.max_sidecars,
        queue_size=config.queue_size,
        load_silence_s=config.health_timeout_s,
        health_interval_s=config.health_interval_s,
        private_dir=private_dir,
        fair_wait_s=config.fair_s,
        step_s=config.step_s,
        stall_s=config.stall_s,
        state_dir=config.state_dir,
        own_args=lambda: catalog.current().own_args(),
    )


# --- the command `check`


def check_all(config: Config) -> int:
    """Say what every model entry comes to; 2 if one cannot be served."""
    catalog = config.catalog
    known = {s.flag.name for s in catalog.validator.table.spellings.values() if s.spoken}
    print(f"llama-server  {config.server_bin} (it knows {len(known)} flags)")
    missing = 0
    for model in dict.fromkeys(catalog.models.values()):
        resolved = catalog.validator.resolve(model.id, model.path, model.args)
        is_there = model.path.is_file()
        missing += not is_there
        state = "" if is_there else " is no file"
        print(f"model         {printable(model.id)} {resolved.spec.hash} {model.path}{state}")
        for remark in resolved.remarks:
            print(f"note          {printable(remark)}")
    return 2 if missing else 0


def check_one(config: Config, options: argparse.Namespace) -> int:
    """Say what one request would come to, and start nothing; 2 if it is refused."""
    catalog = config.catalog
    try:
        model = _model_called(options.model, catalog.models)
        resolved = catalog.validator.resolve(
            *(model.id, model.path, model.args, options.flags),
            body=POST_ROUTES[options.endpoint],
            owner=_checked_agent_id(options.agent_id) if config.isolates_agents else "",
        )
    except RequestRefused as exc:
        return _print_checked({"refused": [exc.message]}, options.json)
    except FlagsRefused as exc:
        return _print_checked({"model": model.id, "refused": list(exc.faults)}, options.json)
    spec = resolved.spec
    command = command_line(config.server_bin, spec, config.ports[0], catalog.own_args())
    found = {
        "model": model.id,
        "hash": spec.hash,
        "command": command,
        "request": json.loads(resolved.defaults.applied_to(JsonObject("{}"))),
        "notes": list(resolved.remarks),
        "refused": [],
    }
    return _print_checked(found, options.json)


def _print_checked(found: Mapping[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(found))
        return 2 if found["refused"] else 0
    for name, value in found.items():
        if name == "command":
            print(f"command  {winsvc.quoted_command(value)}")
        elif name == "request":
            print(f"request  {json.dumps(value)}")
        elif isinstance(value, str):
            print(f"{name:8} {printable(value)}")
        else:
            for line in value:
                print(f"{name.removesuffix('s'):8} {printable(line)}")
    return 2 if found["refused"] else 0


# --- the command line


def _parser() -> argparse.ArgumentParser:
    rows = [f"  {name:32} {value or '(none)'}" for name, value in DEFAULTS.items()]
    parser = argparse.ArgumentParser(
        prog="llama-sidecar",
        description="Without a command it runs the daemon, configured by environment variables.",
        epilog="\n".join(["environment variables and their defaults:", *rows]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llama-sidecar {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="say what would run, and start nothing",
        description="Without --model it judges the whole configuration and every model entry. "
        "With it, what one request would run: the command line, its hash, what travels in the "
        "request instead, what became something else, what is refused. Exits with 0, or with "
        "2 if something cannot be used.",
    )
    check.add_argument("--model", metavar="ID", help="a model id or alias of the map")
    check.add_argument("--flags", metavar="TEXT", default="", help="as in X-Agent-Flags")
    check.add_argument(
        "--endpoint",
        choices=POST_ROUTES,
        default="/v1/chat/completions",
        metavar="PATH",
        help="which request it is (default: %(default)s)",
    )
    check.add_argument("--agent-id", metavar="ID", default="", help="as in X-Agent-Id")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    service = commands.add_parser(
        "service",
        help="be a Windows service",
        description="Registers the program with the Service Control Manager, which starts it "
        "with Windows; the variables set at `install` go with it.",
    )
    service.add_argument("action", choices=["install", "start", "stop", "status", "remove", "run"])
    task = commands.add_parser(
        "task",
        help="be a Windows logon task",
        description="Registers the program with the Task Scheduler, which starts it when this "
        "user logs on; the variables set at `install` go with it.",
    )
    task.add_argument("action", choices=["install", "status", "remove", "run"])
    if getattr(sys, "frozen", False):  # bench/exe.py takes that word before it comes here
        commands.add_parser("bench-run", help="measure models, as bench/README.md tells")
    return parser


def _flags_joined(argv: Sequence[str]) -> list[str]:
    """`--flags -fa` as `--flags=-fa`: argparse takes a lone -fa for an option of its own."""
    joined: list[str] = []
    for word in argv:
        if joined[-1:] == ["--flags"]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def main(argv: Sequence[str]) -> int:
    """0 after an orderly end, 2 if the arguments or the environment cannot be used."""
    winsvc.speak_utf8()
    options = _parser().parse_args(_flags_joined(argv))
    try:
        if options.command == "service" and options.action != "run":
            return _manage_service(options.action)
        if options.command == "task" and options.action != "run":
            return _manage_task(options.action)
        if options.command == "task":
            os.environ |= _task_variables()
    except winsvc.SystemRefused as exc:
        print(f"llama-sidecar: {options.command} {options.action}: {exc}", file=sys.stderr)
        return 1
    set_up_logging("info")
    if options.command == "service":
        return _run_service()
    config = _config_or_faults()
    if config is None:
        return 2
    if options.command == "check":
        return check_one(config, options) if options.model else check_all(config)
    return _run(config, stop_signals())


def _config_or_faults() -> Config | None:
    """The configuration with its logging set up, or None once its faults are told."""
    try:
        config = read_config(os.environ)
        set_up_logging(config.log_level, config.log_file)
    except ConfigError as exc:
        for fault in exc.faults:
            _complain(fault)
        return None
    except OSError as exc:
        _complain(f"LLAMA_SIDECAR_LOG_FILE: {exc}")
        return None
    return config


def _complain(text: str) -> None:
    if sys.stderr is not None:
        print(f"llama-sidecar: {text}", file=sys.stderr)
    else:
        log.error("%s", text)


def _run(config: Config, stops: Stops, when_serving: Callable[[], None] = lambda: None) -> int:
    try:
        serve(config, stops, when_serving)
    except OSError as exc:
        host, port = config.bind
        _complain(f"cannot listen on {host}:{port}: {exc}")
        return 2
    return 0


# --- a Windows service, a scheduled task


def _own_command(*words: str) -> list[str]:
    """How this very program is started again."""
    is_frozen = getattr(sys, "frozen", False)
    own = [sys.executable] if is_frozen else [sys.executable, str(Path(__file__).absolute())]
    return [*own, *words]


def _set_variables() -> dict[str, str]:
    """Those of ours that are set now."""
    return {name: os.environ[name] for name in DEFAULTS if os.environ.get(name)}


def _manage_service(action: str) -> int:
    """Raises SystemRefused."""
    if action == "install":
        winsvc.install_service(_own_command("service", "run"), _set_variables())
        print(f"installed: {winsvc.SERVICE_NAME} starts with Windows, with the variables set now")
    elif action == "start":
        winsvc.start_service()
        print("started")
    elif action == "stop":
        winsvc.stop_service(SERVICE_STOP_S)
        print("stopped")
    elif action == "remove":
        winsvc.stop_service(SERVICE_STOP_S)
        winsvc.remove_service()
        print("removed")
    else:
        print(winsvc.service_state().name.lower().replace("_", " "))
    return 0


def _run_service() -> int:
    """What the Service Control Manager starts."""
    os.environ |= winsvc.service_variables() | dict(os.environ)
    log_file = winsvc.state_dir() / "llama-sidecar.log"
    os.environ.setdefault("LLAMA_SIDECAR_LOG_FILE", str(log_file))
    set_up_logging("info", Path(os.environ["LLAMA_SIDECAR_LOG_FILE"]))

    def work(stops: Stops, when_serving: Callable[[], None]) -> int:
        try:
            config = _config_or_faults()
            return 2 if config is None else _run(config, stops, when_serving)
        except Exception:
            log.exception("the service failed")
            return 1

    try:
        return winsvc.run_as_service(work)
    except winsvc.SystemRefused as exc:
        log.error("service run: %s; it is for the Service Control Manager to start", exc)  # noqa: TRY400 - the words say it all
        return 1


def _task_file() -> Path:
    return winsvc.state_dir() / "task.json"


def _task_variables() -> dict[str, str]:
    """What `task install` stored. Raises SystemRefused."""
    try:
        stored = json.loads(_task_file().read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in stored.items()}
    except (OSError, ValueError, AttributeError) as exc:
        raise winsvc.SystemRefused(f"{_task_file()}: {exc}: run task install again") from exc


def _manage_task(action: str) -> int:
    """Raises SystemRefused."""
    if action == "install":
        _task_file().parent.mkdir(parents=True, exist_ok=True)
        _task_file().write_text(json.dumps(_set_variables(), indent=1), encoding="utf-8")
        winsvc.install_task(_own_command("task", "run"), _task_file().with_name("task.xml"))
        print(f"installed: {winsvc.TASK_NAME} runs at logon, with the variables set now")
    elif action == "remove":
        winsvc.remove_task()
        for file in (_task_file(), _task_file().with_name("task.xml")):
            file.unlink(missing_ok=True)
        print("removed")
    else:
        print(winsvc.task_status())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
