"""What a sweep measures: models, each with the arguments of each mode, and how often.

A plan is JSON (bench/README.md describes it). It names its models itself, or a llama-swap
configuration from which they are taken where and when the sweep begins.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench import llama_swap, prompts, server_args
from bench.server_args import Part

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
        """All of it that changes the numbers, the texts of the prompts included; no keys."""
        kept = {name: v for name, v in self.as_json().items() if name not in NOT_DECIDING}
        for model in kept["models"]:
            modes = model["modes"].items()
            model["modes"] = {mode: server_args.masked(words) for mode, words in modes}
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
        "skipped": lambda what, _: tuple(_mapping(each, what) for each in _list(fields, what)),
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
            _variable(f"{where}.env", name): _text(f"{where}.env.{name}", text)
            for name, text in _mapping(fields.get("env", {}), f"{where}.env").items()
        },
        notes=_texts(f"{where}.notes", fields.get("notes", [])),
    )


def _variable(what: str, name: str) -> str:
    if name.upper().startswith("LLAMA_"):
        raise PlanError(f"{what}: {name} would change what llama-server does: write it as a flag")
    return name


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


def read(file: Path, environment: Mapping[str, str] | None = None) -> Plan:
    """The plan in this file, made whole if it takes its models from a llama-swap configuration.

    A relative path of a configuration is taken from the plan's folder. Raises PlanError, or
    OSError.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as exc:
        raise PlanError(f"{file} is no JSON: {exc}") from None
    try:
        if isinstance(value, dict) and "llama_swap" in value:
            return made_whole(
                value, file.parent, os.environ if environment is None else environment
            )
        return parsed(value)
    except PlanError as exc:
        raise PlanError(f"{file}: {exc}") from None


# --- from a llama-swap configuration


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be taken from a llama-swap configuration. `models` None: all of them."""

    config: str
    models: tuple[str, ...] | None = None
    n_max: tuple[int, ...] = ()
    rules: str | None = None  # "windows" or "posix"; None: told by the paths
    on: tuple[str, ...] | None = None  # instead of --spec-type draft-mtp; {model} is the GGUF
    prod: bool = False


def made_whole(value: Mapping[str, Any], folder: Path, environment: Mapping[str, str]) -> Plan:
    """A plan whose models are those of the configuration that it names.

    Raises PlanError, or OSError.
    """
    fields = dict(value)
    wanted = _wanted(fields.pop("llama_swap"))
    if "models" in fields or "skipped" in fields:
        raise PlanError("models and skipped come from the llama-swap configuration")
    placeholder = {"id": "-", "server": "-", "modes": {"off": []}}
    settings = parsed(fields | {"models": [placeholder]})
    is_windows = None if wanted.rules is None else wanted.rules == "windows"
    try:
        config = llama_swap.read(folder / wanted.config, environment, is_windows)
    except llama_swap.ConfigError as exc:
        raise PlanError(str(exc)) from None
    models, skipped = _taken(config, wanted, settings.ctx_size)
    if not models:
        reasons = "; ".join(f"{each['id']}: {each['reason']}" for each in skipped)
        raise PlanError(f"{wanted.config} has no model to measure: {reasons}")
    return dataclasses.replace(settings, models=tuple(models), skipped=tuple(skipped))


def _wanted(value: object) -> Wanted:
    fields = _mapping(value, "llama_swap")
    _no_others(fields, {field.name for field in dataclasses.fields(Wanted)}, "llama_swap")
    models, on, rules = fields.get("models"), fields.get("on"), fields.get("rules")
    if rules not in (None, "windows", "posix"):
        raise PlanError('llama_swap.rules is neither "windows" nor "posix"')
    numbers = fields.get("n_max", [])
    if not isinstance(numbers, list):
        raise PlanError("llama_swap.n_max is no list")
    return Wanted(
        config=_text("llama_swap.config", fields.get("config")),
        models=None if models is None else _texts("llama_swap.models", models),
        n_max=tuple(_whole("llama_swap.n_max", number, 1, 99) for number in numbers),
        rules=rules,
        on=None if on is None else _texts("llama_swap.on", on),
        prod=bool(fields.get("prod", False)),
    )


def _taken(
    config: llama_swap.Config, wanted: Wanted, ctx_size: int
) -> tuple[list[Model], list[dict[str, str]]]:
    known = {entry.id for entry in config.entries}
    unknown = [name for name in wanted.models or () if name not in known]
    if unknown:
        raise PlanError(
            f"{wanted.config} has no model {unknown[0]!r}; it has {', '.join(sorted(known))}"
        )
    models, skipped = [], []
    for entry in config.entries:
        if wanted.models is not None and entry.id not in wanted.models:
            continue
        reason = why_skipped(entry)
        if reason:
            skipped.append({"id": entry.id, "reason": reason})
        else:
            models.append(_model_of(entry, wanted, ctx_size))
    return models, skipped


def why_skipped(entry: llama_swap.Entry) -> str:
    """Empty for a llama-server with a model."""
    program = re.split(r"[\\/]", entry.argv[0])[-1]
    if "llama-server" not in program.lower():
        return f"{program} is no llama-server"
    parts = server_args.parts_of(entry.argv[1:])
    if not any(part.name in server_args.NAMES_MODEL for part in parts):
        return "its command names no model"
    if any(part.name in server_args.MAKES_NO_TEXT for part in parts):
        return "it makes no text"
    return ""


def _model_of(entry: llama_swap.Entry, wanted: Wanted, ctx_size: int) -> Model:
    parts = server_args.parts_of(entry.argv[1:])
    path = server_args.last_value(parts, "--model")
    kept = with_ctx_size(server_args.without(parts, server_args.is_owned), ctx_size)
    env, left_out = _environment(entry.env)
    return Model(
        id=entry.id,
        server=entry.argv[0],
        model_path=path,
        modes={mode: tuple(words) for mode, words in _modes(kept, path, wanted).items()},
        env=env,
        notes=(*entry.notes, *left_out, *_notes(parts, kept, wanted)),
    )


def with_ctx_size(parts: Sequence[Part], ctx_size: int) -> list[Part]:
    """The context size said once, where it was said first, else at the end."""
    said = Part(server_args.CTX_SIZE, (str(ctx_size),), (server_args.CTX_SIZE, str(ctx_size)))
    at = next((n for n, part in enumerate(parts) if part.name == said.name), len(parts))
    others = [part for part in parts[at:] if part.name != said.name]
    return [*parts[:at], said, *others]


def _modes(parts: Sequence[Part], path: str | None, wanted: Wanted) -> dict[str, list[str]]:
    """The words of each mode, off first."""
    off = server_args.without(parts, lambda part: part.is_speculative)
    on = _speculating(parts, off, path, wanted)
    modes = {"off": server_args.joined(off), "on": server_args.joined(on)}
    plain = server_args.without(on, lambda part: part.name == server_args.N_MAX)
    for number in wanted.n_max:
        modes[f"on-n{number}"] = [*server_args.joined(plain), server_args.N_MAX, str(number)]
    production = server_args.joined(parts)
    if wanted.prod and production not in (modes["off"], modes["on"]):
        modes["prod"] = production
    return modes


def _speculating(
    parts: Sequence[Part], off: Sequence[Part], path: str | None, wanted: Wanted
) -> list[Part]:
    """With multi-token prediction: as in production if it is on there."""
    if wanted.on is not None:
        words = [word.replace("{model}", path or "") for word in wanted.on]
        return [*off, *server_args.parts_of(words)]
    if server_args.MTP in server_args.speculation_types(parts):
        return [*parts]
    heads = [part for part in parts if _is_mtp_head(part)]
    return [*off, *heads, *server_args.parts_of([server_args.SPEC_TYPE, server_args.MTP])]


def _is_mtp_head(part: Part) -> bool:
    """A draft model is a head for MTP if its file is called so, as the converter does."""
    if part.name != server_args.DRAFT_MODEL or not part.values:
        return False
    return "mtp" in re.split(r"[\\/]", part.values[-1])[-1].lower()


def _environment(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What a server is given of them, and a note on each that it is not."""
    kept, notes = {}, []
    for name, value in env.items():
        if name.upper().startswith("LLAMA_") or server_args.SECRET_NAME.search(name):
            notes.append(f"its variable {name} is left out")
        else:
            kept[name] = value
    return kept, notes


def _notes(parts: Iterable[Part], kept: Iterable[Part], wanted: Wanted) -> list[str]:
    notes = []
    types = server_args.speculation_types(parts)
    if types and server_args.MTP not in types and wanted.on is None:
        how = ", ".join(sorted(types))
        notes.append(f"production speculates by {how}, which neither off nor on does")
    slots = server_args.last_value(kept, "--parallel")
    if slots not in (None, "1", "-1"):
        notes.append(f"production has {slots} slots: a request may have a part of the context only")
    return notes


# --- the command


def _commas(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan",
        description="Make a plan for bench.mtp_sweep.",
    )
    sources = parser.add_subparsers(dest="source", required=True)
    swap = sources.add_parser("llama-swap", help="from a llama-swap configuration")
    swap.add_argument("config", metavar="CONFIG.yaml", help="where llama-swap's models stand")
    swap.add_argument("--out", type=Path, metavar="PLAN.json", help="by default it is printed")
    swap.add_argument("--name", help="by default the configuration's")
    swap.add_argument("--models", type=_commas, metavar="A,B", help="by default all")
    swap.add_argument("--n-max", type=_commas, default=[], metavar="1,2,3", help="further modes")
    swap.add_argument("--ctx-size", type=int, default=CTX_SIZE, metavar="N")
    swap.add_argument("--prompts", type=_commas, metavar="A,B", help=", ".join(prompts.PROMPTS))
    for name in ("n-predict", "rounds", "repetitions", "warm-ups", "seed"):
        swap.add_argument(f"--{name}", type=int, metavar="N")
    swap.add_argument(
        "--on",
        metavar="FLAGS",
        help="what turns speculation on, instead of draft-mtp; {model} is the GGUF",
    )
    swap.add_argument(
        "--prod", action="store_true", help="production's flags too, where they speculate otherwise"
    )
    rules = swap.add_mutually_exclusive_group()
    for system in ("windows", "posix"):
        rules.add_argument(
            f"--{system}",
            action="store_const",
            const=system,
            dest="rules",
            help="how commands are split; by default their paths tell",
        )
    return parser.parse_args(argv)


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    numbers = [int(n) if n.isdecimal() else n for n in options.n_max]
    on = None if options.on is None else llama_swap.split(options.on, is_windows=False)
    wanted = {
        "config": str(Path(options.config).absolute()),
        "models": options.models,
        "n_max": numbers,
        "rules": options.rules,
        "on": on,
        "prod": options.prod,
    }
    names = ("prompts", "n_predict", "rounds", "repetitions", "warm_ups", "seed", "ctx_size")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    name = options.name or Path(options.config).stem
    return {"schema": SCHEMA, "name": name, "llama_swap": wanted} | given


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        plan = made_whole(_recipe(options), Path.cwd(), os.environ)
        text = json.dumps(plan.as_json(), indent=2) + "\n"
        if options.out:
            options.out.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
    except (PlanError, llama_swap.ConfigError, OSError) as exc:
        print(f"plan: {exc}", file=sys.stderr)
        return 1
    for each in plan.skipped:
        print(f"plan: {each['id']} is skipped: {each['reason']}", file=sys.stderr)
    for model in plan.models:
        for note in model.notes:
            print(f"plan: {model.id}: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
