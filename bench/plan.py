"""What a sweep measures: models, each with the arguments of each mode, and how often.

A plan is JSON (bench/README.md describes it). It names its models itself, or a llama-swap
configuration from which they are taken where and when the sweep begins.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from bench import prompts

SCHEMA: Final = 1
CTX_SIZE: Final = 32_768
MODE: Final = re.compile(r"off|on|on-n[1-9][0-9]?|prod")
NOT_DECIDING: Final = frozenset({"load_timeout_s", "request_timeout_s", "pause_s"})


class PlanError(Exception):
    """In words for the user."""


@dataclasses.dataclass(frozen=True)
class Model:
    """One GGUF, and what llama-server is told in each mode beside it, host and port.

    `model_path` is None where the arguments say in another way which model it is.
    """

    id: str
    server: str
    model_path: str | None
    modes: Mapping[str, tuple[str, ...]]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole plan. `rounds` counts ABBA: two blocks of each mode, a fresh server for each."""

    name: str
    models: tuple[Model, ...]
    prompts: tuple[str, ...] = tuple(prompts.PROMPTS)
    n_predict: int = 192
    seed: int = 42
    warm_ups: int = 2
    rounds: int = 1
    repetitions: int = 2
    ctx_size: int = CTX_SIZE
    pause_s: float = 0.0  # before each further model, for the machine to cool down
    load_timeout_s: float = 900.0
    request_timeout_s: float = 900.0
    skipped: tuple[Mapping[str, str], ...] = ()

    def as_json(self) -> dict[str, Any]:
        value = {"schema": SCHEMA} | dataclasses.asdict(self)
        plain: dict[str, Any] = json.loads(json.dumps(value))
        return plain

    def decides(self) -> dict[str, Any]:
        """All of it that changes the numbers, the texts of the prompts included."""
        kept = {name: v for name, v in self.as_json().items() if name not in NOT_DECIDING}
        return kept | {"prompt_sums": prompts.sums(self.prompts)}


def parsed(value: object) -> Plan:
    """A plan out of JSON. Raises PlanError naming the field."""
    fields = dict(_mapping(value, "the plan"))
    if fields.pop("schema", None) != SCHEMA:
        raise PlanError(f"the plan's schema is not {SCHEMA}")
    known = {field.name for field in dataclasses.fields(Plan)}
    _no_others(fields, known, "the plan")
    models = tuple(_model(entry, f"models[{n}]") for n, entry in enumerate(_list(fields, "models")))
    if not models:
        raise PlanError("the plan has no models")
    if len({model.id for model in models}) != len(models):
        raise PlanError("two models have one id")
    checks: dict[str, Callable[[str, object], Any]] = {
        "name": _text,
        "prompts": _prompt_names,
        "n_predict": lambda what, found: _whole(what, found, 2, 100_000),
        "seed": lambda what, found: _whole(what, found, 0, 2**31 - 1),
        "warm_ups": lambda what, found: _whole(what, found, 0, 100),
        "rounds": lambda what, found: _whole(what, found, 1, 100),
        "repetitions": lambda what, found: _whole(what, found, 1, 1000),
        "ctx_size": lambda what, found: _whole(what, found, 0, 2**31 - 1),
        "pause_s": lambda what, found: _seconds(what, found, 0.0),
        "load_timeout_s": lambda what, found: _seconds(what, found, 0.1),
        "request_timeout_s": lambda what, found: _seconds(what, found, 0.1),
        "skipped": lambda what, found: tuple(_mapping(each, what) for each in found),  # type: ignore[attr-defined]
    }
    given = {name: check(name, fields[name]) for name, check in checks.items() if name in fields}
    return Plan(models=models, **({"name": "sweep"} | given))


def _model(value: object, where: str) -> Model:
    fields = _mapping(value, where)
    _no_others(fields, {field.name for field in dataclasses.fields(Model)}, where)
    modes = _mapping(fields.get("modes"), f"{where}.modes")
    for mode in modes:
        if not MODE.fullmatch(mode):
            raise PlanError(f"{where}.modes: {mode!r} is none of off, on, on-n1 ..., prod")
    if "off" not in modes:
        raise PlanError(f"{where}.modes has no 'off'")
    path = fields.get("model_path")
    if path is not None:
        path = _text(f"{where}.model_path", path)
    return Model(
        id=_text(f"{where}.id", fields.get("id")),
        server=_text(f"{where}.server", fields.get("server")),
        model_path=path,
        modes={mode: _texts(f"{where}.modes.{mode}", words) for mode, words in modes.items()},
        env={
            name: _text(f"{where}.env.{name}", text)
            for name, text in _mapping(fields.get("env", {}), f"{where}.env").items()
        },
        notes=_texts(f"{where}.notes", fields.get("notes", [])),
    )


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"{what} is no JSON object")
    return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise PlanError(f"{name} is no list")
    return value


def _no_others(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    others = sorted(fields.keys() - known)
    if others:
        raise PlanError(f"{where} has a field {others[0]!r}; known are {', '.join(sorted(known))}")


def _text(what: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise PlanError(f"{what} is no text")
    return value


def _texts(what: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise PlanError(f"{what} is no list of texts")
    return tuple(value)


def _prompt_names(what: str, value: object) -> tuple[str, ...]:
    names = _texts(what, value)
    unknown = [name for name in names if name not in prompts.PROMPTS]
    if unknown or not names or len(set(names)) != len(names):
        raise PlanError(f"{what}: take each at most once out of {', '.join(prompts.PROMPTS)}")
    return names


def _whole(what: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PlanError(f"{what} is {json.dumps(value)}, not a whole number {least} to {most}")
    return value


def _seconds(what: str, value: object, least: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= float(value) <= 864_000.0:  # type: ignore[arg-type]
        raise PlanError(f"{what} is {json.dumps(value)}, not a number of seconds from {least:g}")
    return float(value)  # type: ignore[arg-type]


def read(file: Path) -> Plan:
    """Raises PlanError, or OSError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as exc:
        raise PlanError(f"{file} is no JSON: {exc}") from None
    return parsed(value)
