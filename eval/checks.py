"""What of a reply can be judged without a judge: each check passes or says why not.

A check is a JSON object of a prompt file: `check` names one of KINDS, `label` is what the
report calls it, the rest are its settings. None of them runs what a model wrote, except
`python_runs`, which is skipped unless the caller brings a runner, and `sql_rows`, whose
statement sees an empty database in memory and may only read it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import re
import shlex
import sqlite3
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from eval.execution import with_check

Spec = Mapping[str, Any]
State = Literal["passed", "failed", "skipped"]
Runner = Callable[[str], str]  # a program of eval.execution's -> "" if it passed, else why not

SQL_STEPS_A_CALL = 10_000
SQL_CALLS = 500  # so a statement that never ends is stopped within a second or two
SQL_LONGEST_VALUE = 100_000
SQL_MOST_ROWS = 1_000
SHOWN_CHARS = 200

STOP_WORDS = {
    "de": "der die das und ist nicht ein eine wenn auf den mit es zu im oder dass von dem sich",
    "en": "the and is not an if on with it to in or that of this you are be for which",
    "es": "el la los las y es no un una si con lo en o que de por para se su",
    "fr": "le la les et est ne pas un une si sur avec il en ou que de ce pour qui",
}
FEWEST_STOP_WORDS = 5
PROBE, DONE = "probe_of_the_check", "done"
EMPTY = "empty"

FENCE = re.compile(
    r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL
)


class BadCheck(ValueError):
    """A prompt file asks for a check that does not exist, or asks for it wrongly."""


@dataclasses.dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # JSON, if the model wrote it well


@dataclasses.dataclass(frozen=True)
class Reply:
    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"

    @property
    def is_empty(self) -> bool:
        return not self.text.strip() and not self.tool_calls

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Reply:
        """From a record of an A/B file."""
        calls = [call.get("function") or {} for call in record.get("tool_calls") or []]
        return cls(
            record.get("reply") or "",
            tuple(
                ToolCall(str(call.get("name")), str(call.get("arguments") or "")) for call in calls
            ),
            record.get("finish_reason") or "",
        )


@dataclasses.dataclass(frozen=True)
class Finding:
    label: str
    state: State
    why: str = ""  # empty if it passed


@dataclasses.dataclass(frozen=True)
class Kind:
    find: Callable[[Spec, Reply], str]  # "" if it passes, else why it does not
    needs: frozenset[str]
    may: frozenset[str]


KINDS: dict[str, Kind] = {}


def _kind(name: str, needs: str = "", may: str = "") -> Callable[..., Callable[..., str]]:
    def noted(find: Callable[[Spec, Reply], str]) -> Callable[[Spec, Reply], str]:
        KINDS[name] = Kind(find, frozenset(needs.split()), frozenset(may.split()))
        return find

    return noted


def refuse_bad(spec: Spec) -> None:
    """Raises BadCheck."""
    name = spec.get("check")
    if name not in KINDS:
        raise BadCheck(f"there is no check {name!r}; there are {', '.join(sorted(KINDS))}")
    if not isinstance(spec.get("label"), str):
        raise BadCheck(f"a check {name} has no label")
    given = spec.keys() - {"check", "label"}
    kind = KINDS[name]
    if missing := kind.needs - given:
        raise BadCheck(f"the check {name} needs {', '.join(sorted(missing))}")
    if strange := given - kind.needs - kind.may:
        raise BadCheck(f"the check {name} knows no {', '.join(sorted(strange))}")


def findings(specs: Sequence[Spec], reply: Reply, run: Runner | None = None) -> list[Finding]:
    """First whether there is a whole reply at all, then every check in its order.

    An empty reply passes none.

    With `run`, checks of the kind `python_runs` execute what the model wrote.
    """
    return [_finished(reply), *(_finding(spec, reply, run) for spec in specs)]


def _finished(reply: Reply) -> Finding:
    why = ""
    if reply.finish_reason == "length":
        why = "cut off at the token limit"
    elif reply.is_empty:
        why = EMPTY
    return Finding("finished", "failed" if why else "passed", why)


def _finding(spec: Spec, reply: Reply, run: Runner | None) -> Finding:
    label = spec["label"]
    if reply.is_empty:  # else it would pass all that asks for something to be left out
        why = EMPTY
    elif spec["check"] != "python_runs":
        why = KINDS[spec["check"]].find(spec, reply)
    elif run is None:
        return Finding(label, "skipped", "running model code is not allowed")
    else:
        code = code_of(reply.text, "python")
        why = _python(reply)[1] or run(program_of(spec, code))
    return Finding(label, "failed" if why else "passed", why)


# --- text


def as_text(value: str | Sequence[str]) -> str:
    """Long texts stand in JSON as lists of lines."""
    return value if isinstance(value, str) else "\n".join(value)


def shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


@_kind("contains", needs="text", may="ignore_case")
def _contains(spec: Spec, reply: Reply) -> str:
    text, wanted = reply.text, spec["text"]
    if spec.get("ignore_case"):
        text, wanted = text.casefold(), wanted.casefold()
    return "" if wanted in text else f"does not say {spec['text']!r}"


@_kind("lacks", needs="text", may="ignore_case")
def _lacks(spec: Spec, reply: Reply) -> str:
    return "" if _contains(spec, reply) else f"says {spec['text']!r}"


@_kind("matches", needs="pattern", may="at_least at_most")
def _matches(spec: Spec, reply: Reply) -> str:
    """`pattern` is searched with re.MULTILINE; `at_least` is 1 unless given."""
    count = sum(1 for _ in re.finditer(spec["pattern"], reply.text, re.MULTILINE))
    least, most = spec.get("at_least", 1), spec.get("at_most")
    if not count and least == 1:
        return f"nothing matches {spec['pattern']}"
    if count < least:
        return f"{count} instead of {least} or more matches of {spec['pattern']}"
    if most is not None and count > most:
        return f"{count} instead of at most {most} matches of {spec['pattern']}"
    return ""


@_kind("lacks_match", needs="pattern")
def _lacks_match(spec: Spec, reply: Reply) -> str:
    found = re.search(spec["pattern"], reply.text, re.MULTILINE)
    return f"says {shown(found[0])!r}" if found else ""


@_kind("only_of", needs="pattern allowed")
def _only_of(spec: Spec, reply: Reply) -> str:
    """Every match of `pattern` is one of `allowed`: nothing is made up."""
    found = {match[0] for match in re.finditer(spec["pattern"], reply.text, re.MULTILINE)}
    made_up = sorted(found - set(spec["allowed"]))
    return f"made up: {shown(', '.join(made_up))}" if made_up else ""


@_kind("in_order", needs="texts")
def _in_order(spec: Spec, reply: Reply) -> str:
    at = 0
    for text in spec["texts"]:
        at = reply.text.find(text, at)
        if at < 0:
            return f"{text!r} is missing or not in its place"
        at += len(text)
    return ""


@_kind("words", may="min max")
def _words(spec: Spec, reply: Reply) -> str:
    return _within(len(reply.text.split()), spec, "words")


@_kind("bullets", may="min max")
def _bullets(spec: Spec, reply: Reply) -> str:
    """Lines that begin with -, *, a bullet or a number."""
    found = re.findall(r"^[ \t]*(?:[-*\u2022]|\d+[.)])[ \t]+\S", reply.text, re.MULTILINE)
    return _within(len(found), spec, "bullets")


@_kind("code_lines", may="min max")
def _code_lines(spec: Spec, reply: Reply) -> str:
    """Lines with something in them, of the first code block or of the whole reply."""
    lines = [line for line in code_of(reply.text).splitlines() if line.strip()]
    return _within(len(lines), spec, "lines")


def _within(count: int, spec: Spec, what: str) -> str:
    if "min" in spec and count < spec["min"]:
        return f"{count} {what}, fewer than {spec['min']}"
    if "max" in spec and count > spec["max"]:
        return f"{count} {what}, more than {spec['max']}"
    return ""


@_kind("language", needs="is")
def _language(spec: Spec, reply: Reply) -> str:
    """By its most frequent small words; too short a text has no language."""
    words = re.findall(r"[^\W\d_]+", reply.text.casefold())
    counts = {
        name: sum(word in known.split() for word in words) for name, known in STOP_WORDS.items()
    }
    likely = max(counts, key=lambda name: counts[name])
    if counts[likely] < FEWEST_STOP_WORDS:
        return "too short to tell its language"
    return "" if likely == spec["is"] else f"looks like {likely}, not {spec['is']}"


# --- code


def code_of(text: str, language: str = "") -> str:
    """The first code block in this language, else the first one, else all of the text.

    A block without an end goes on to the end of the text.
    """
    blocks = [(match[1].lower(), match[2]) for match in FENCE.finditer(text)]
    for tag, block in blocks:
        if tag == language or (language == "python" and tag == "py"):
            return block
    return blocks[0][1] if blocks else text


@_kind("code_block", may="language max")
def _code_block(spec: Spec, reply: Reply) -> str:
    """There is a block; of this language, and no more than `max`, where these are given."""
    tags = [match[1].lower() for match in FENCE.finditer(reply.text)]
    if not tags:
        return "no code block"
    if "language" in spec and spec["language"] not in tags:
        return f"no code block is marked {spec['language']}"
    if len(tags) > spec.get("max", len(tags)):
        return f"{len(tags)} code blocks instead of {spec['max']}"
    return ""


def _python(reply: Reply) -> tuple[ast.Module, str]:
    """Its Python code, or an empty module and why there is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of "\d", which a model may well write
            module = ast.parse(code_of(reply.text, "python"))
    except SyntaxError as exc:
        return ast.Module([], []), f"no Python: {shown(exc.msg)}, line {exc.lineno}"
    except (ValueError, RecursionError, MemoryError) as exc:
        return ast.Module([], []), f"no Python: {shown(str(exc) or type(exc).__name__)}"
    return (module, "") if module.body else (module, "no code")


@_kind("python_compiles")
def _python_compiles(spec: Spec, reply: Reply) -> str:
    return _python(reply)[1]


@_kind("python_defines", needs="name", may="arguments at_least")
def _python_defines(spec: Spec, reply: Reply) -> str:
    """Functions whose name matches all of the pattern `name`; with just these arguments."""
    module, why = _python(reply)
    if why:
        return why
    found = [it for it in _functions(module) if re.fullmatch(spec["name"], it.name)]
    if len(found) < spec.get("at_least", 1):
        return f"{len(found)} functions are named {spec['name']}"
    for function in found:
        arguments = [argument.arg for argument in function.args.args]
        if arguments != spec.get("arguments", arguments):
            return f"{function.name} takes {', '.join(arguments) or 'nothing'}"
    return ""


def _functions(module: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]


@_kind("python_imports", needs="only")
def _python_imports(spec: Spec, reply: Reply) -> str:
    module, why = _python(reply)
    if why:
        return why
    names: list[str] = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or ".")
    others = sorted(set(names) - set(spec["only"]))
    return f"imports {', '.join(others)}" if others else ""


@_kind("python_depth", needs="max")
def _python_depth(spec: Spec, reply: Reply) -> str:
    """How deep if, for, while, with, try and match stand in each other; elif is no depth."""
    module, why = _python(reply)
    depth = max((_depth(function) for function in _functions(module)), default=0)
    return why or (f"{depth} levels deep" if depth > spec["max"] else "")


BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def _depth(node: ast.AST) -> int:
    depths = [0]
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        depths.append(_depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return max(depths)


@_kind("python_runs", needs="after", may="before")
def _python_runs(spec: Spec, reply: Reply) -> str:
    raise AssertionError("findings() runs it")


def program_of(spec: Spec, code: str) -> str:
    """What a check of the kind python_runs executes: our lines before, the reply, our lines.

    The last stand in a function that the check calls from another process.
    """
    after = textwrap.indent(as_text(spec["after"]), "    ")
    probe = f"def {PROBE}():\n{after}\n    return {DONE!r}"
    check = f"assert {PROBE}() == {DONE!r}"
    solution = "\n\n".join([as_text(spec.get("before", "")), code, probe])
    return with_check(solution, check, PROBE)


@_kind("shell_splits")
def _shell_splits(spec: Spec, reply: Reply) -> str:
    """Its quotes are closed: a shell could split it into words."""
    try:
        words = shlex.split(code_of(reply.text), comments=True)
    except ValueError as exc:
        return f"no shell could read it: {exc}"
    return "" if words else "no command"


# --- SQL


@_kind("sql_rows", needs="setup rows", may="ordered")
def _sql_rows(spec: Spec, reply: Reply) -> str:
    """One statement, run over the tables of `setup`, returns `rows`."""
    statement = code_of(reply.text, "sql")
    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.executescript(as_text(spec["setup"]))
            _let_only_read(database)
            rows = [list(row) for row in database.execute(statement).fetchmany(SQL_MOST_ROWS)]
    except (sqlite3.Error, sqlite3.Warning, ValueError) as exc:
        return f"SQLite says: {shown(str(exc))}"
    wanted = [list(row) for row in spec["rows"]]
    if not spec.get("ordered"):
        rows, wanted = sorted(rows, key=repr), sorted(wanted, key=repr)
    return "" if _is_same(rows, wanted) else f"returns {shown(json.dumps(rows, default=repr))}"


def _let_only_read(database: sqlite3.Connection) -> None:
    """From now on no statement writes, opens files, or goes on for ever."""
    reading = {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
    calls = iter(range(SQL_CALLS))
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, SQL_LONGEST_VALUE)
    database.set_progress_handler(lambda: next(calls, None) is None, SQL_STEPS_A_CALL)
    database.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action in reading else sqlite3.SQLITE_DENY
    )


def _is_same(found: Any, wanted: Any) -> bool:
    """Equal, where sums of floats may differ in their last digits."""
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(map(_is_same, found, wanted))
    if isinstance(wanted, float) and isinstance(found, int | float):
        return abs(found - wanted) < 1e-6
    return bool(found == wanted)


# --- JSON and tools


@_kind("json", needs="schema", may="bare")
def _json(spec: Spec, reply: Reply) -> str:
    """The reply is JSON of this schema; with `bare` not even a fence is around it."""
    value, why = _json_of(reply.text, is_bare=spec.get("bare", False))
    return why or next(misfits(value, spec["schema"]), "")


def _json_of(text: str, *, is_bare: bool = False) -> tuple[Any, str]:
    source = text.strip()
    fenced = FENCE.fullmatch(source)
    if fenced and not is_bare:
        source = fenced[2]
    try:
        return json.loads(source, parse_constant=_refuse_constant), ""
    except (ValueError, RecursionError) as exc:
        return None, f"no JSON: {shown(str(exc))}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


JSON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def misfits(value: Any, schema: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Where a value is not what the schema says: the part of JSON Schema that prompts need.

    type, const, enum, pattern, minimum, maximum, required, properties,
    additionalProperties: false, items, minItems, maxItems.
    """
    place = at or "it"
    if "type" in schema and not _has_type(value, schema["type"]):
        yield f"{place} is {_type_of(value)}, not {schema['type']}"
        return
    if "const" in schema and not _is_equal(value, schema["const"]):
        yield f"{place} is {_as_json(value)}, not {_as_json(schema['const'])}"
    if "enum" in schema and not any(_is_equal(value, one) for one in schema["enum"]):
        yield f"{place} is {_as_json(value)}, none of {_as_json(schema['enum'])}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{place} is {_as_json(value)}, which does not match {schema['pattern']}"
    if _has_type(value, "number") and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
    ):
        yield f"{place} is {value}"
    if isinstance(value, dict):
        yield from _misfits_of_object(value, schema, at)
    if isinstance(value, list):
        yield from _misfits_of_array(value, schema, at)


def _misfits_of_object(value: Mapping[str, Any], schema: Spec, at: str) -> Iterator[str]:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{_below(at, name)} is missing"
    for name, inner in value.items():
        if name in properties:
            yield from misfits(inner, properties[name], _below(at, name))
        elif schema.get("additionalProperties") is False:
            yield f"{_below(at, name)} was not asked for"


def _misfits_of_array(value: Sequence[Any], schema: Spec, at: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{at or 'it'} has {len(value)} items"
    for number, inner in enumerate(value):
        yield from misfits(inner, schema.get("items", {}), _below(at, str(number)))


def _below(at: str, name: str) -> str:
    return f"{at}/{name}" if at else name


def _has_type(value: Any, names: str | Sequence[str]) -> bool:
    if not isinstance(names, str):
        return any(_has_type(value, name) for name in names)
    if isinstance(value, bool) and names != "boolean":
        return False
    return isinstance(value, JSON_TYPES[names])


def _type_of(value: Any) -> str:
    return next((name for name in JSON_TYPES if _has_type(value, name)), type(value).__name__)


def _is_equal(first: Any, second: Any) -> bool:
    """As JSON has it: true is not 1, and the order of keys does not count."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_is_equal, first, second))
    return bool(first == second)


def _as_json(value: Any) -> str:
    return shown(json.dumps(value, ensure_ascii=False))


@_kind("json_before", needs="pairs", may="list key")
def _json_before(spec: Spec, reply: Reply) -> str:
    """In the array `list` of the reply each pair's first stands before its second.

    `key` names the field by which items are known.
    """
    value, why = _json_of(reply.text)
    if why:
        return why
    items = value.get(spec["list"]) if isinstance(value, dict) and "list" in spec else value
    if not isinstance(items, list):
        return f"there is no array {spec.get('list', '')}"
    if "key" in spec:
        items = [item.get(spec["key"]) if isinstance(item, dict) else None for item in items]
    for first, second in spec["pairs"]:
        if first not in items or second not in items:
            return f"{first if first not in items else second} is missing"
        if items.index(first) > items.index(second):
            return f"{second} stands before {first}"
    return ""


@_kind("tool_call", needs="name arguments")
def _tool_call(spec: Spec, reply: Reply) -> str:
    """Exactly one call, of this tool, with arguments of this schema."""
    if not reply.tool_calls:
        return "no tool call"
    if len(reply.tool_calls) > 1:
        return f"{len(reply.tool_calls)} tool calls"
    call = reply.tool_calls[0]
    if call.name != spec["name"]:
        return f"calls {shown(call.name)}"
    value, why = _json_of(call.arguments, is_bare=True)
    return why or next(misfits(value, spec["arguments"]), "")


@_kind("no_text", may="max_words")
def _no_text(spec: Spec, reply: Reply) -> str:
    """Nothing, or little, is said beside the tool call."""
    count = len(reply.text.split())
    return f"{count} words beside the call" if count > spec.get("max_words", 0) else ""
