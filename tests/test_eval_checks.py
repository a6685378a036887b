"""The checks of the A/B prompts: each with replies that pass and replies that do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from eval import ab, roles
from eval.checks import KINDS, BadCheck, Reply, ToolCall, code_of, findings, misfits, refuse_bad

REPLIES = Path(__file__).resolve().parent / "ab_replies"
ROLES = (
    "coder reviewer debugger test_writer refactorer architect planner documenter sql shell "
    "json_extractor tool_caller summarizer explainer"
).split()

PYTHON = "```python\ndef f(a, b):\n    if a:\n        return b\n```"
DEEP = "def f(a):\n    for b in a:\n        if b:\n            return b"
ELIF = "def f(a):\n    if a:\n        return 1\n    elif not a:\n        return 2"
TABLE = {"setup": ["CREATE TABLE t (n INTEGER);", "INSERT INTO t VALUES (1), (2);"]}
PLAN = '{"steps": [{"task": "a"}, {"task": "b"}]}'
STEPS = {"list": "steps", "key": "task"}
ENGLISH = "This is the way that it has to be, and you are not alone if it is not to be."
GERMAN = "Das ist der Weg, und wenn es nicht der ist, dann ist es ein anderer, den du im Kopf hast."
CALL = ToolCall("run", '{"n": 1}')

Settings = Mapping[str, Any]


@pytest.mark.parametrize(
    ("check", "settings", "passes", "fails"),
    [
        ("contains", {"text": "abc"}, "xabcx", "ABC"),
        ("contains", {"text": "abc", "ignore_case": True}, "ABC", "ab"),
        ("lacks", {"text": "abc"}, "ABC", "abc"),
        ("matches", {"pattern": "^b"}, "a\nb", "ab"),
        ("matches", {"pattern": "a", "at_least": 2, "at_most": 3}, "aaa", "a"),
        ("matches", {"pattern": "a", "at_least": 0, "at_most": 1}, "b", "aa"),
        ("lacks_match", {"pattern": "^b"}, "ab", "a\nb"),
        ("only_of", {"pattern": r"--\w+", "allowed": ["--a"]}, "--a and --a", "--a --b"),
        ("in_order", {"texts": ["a", "b", "a"]}, "abba", "aab"),
        ("words", {"min": 2, "max": 3}, "one two", "one"),
        ("words", {"max": 3}, "1", "1 2 3 4"),
        ("bullets", {"min": 2, "max": 2}, "- a\nno\n2. b", "- a\n-b"),
        ("code_lines", {"max": 1}, "text\n```\none\n\n```", "```\none\ntwo\n```"),
        ("language", {"is": "de"}, GERMAN, ENGLISH),
        ("language", {"is": "en"}, ENGLISH, GERMAN),
        ("language", {"is": "en"}, ENGLISH, "the one"),
        ("code_block", {}, "a\n```\nb\n```", "a b"),
        ("code_block", {"language": "sql"}, "```SQL\nb\n```", "```\nb\n```"),
        ("code_block", {"max": 1}, "```\nb\n```", "```\nb\n```\n```\nc\n```"),
        ("python_compiles", {}, "a = 1", "a ="),
        ("python_compiles", {}, 'a = "\\d"', ""),
        ("python_compiles", {}, PYTHON, "a = '\0'"),
        ("python_compiles", {}, PYTHON, "(" * 5000),
        ("python_defines", {"name": "f", "arguments": ["a", "b"]}, PYTHON, "def f(a): pass"),
        ("python_defines", {"name": "f"}, PYTHON, "def ff(): pass"),
        ("python_defines", {"name": "f.", "at_least": 2}, "def f1(): pass\ndef f2(): pass", PYTHON),
        ("python_imports", {"only": ["re"]}, "import re", "from os import path"),
        ("python_imports", {"only": []}, PYTHON, "import re as r"),
        ("python_depth", {"max": 1}, ELIF, DEEP),
        ("shell_splits", {}, "```\nfind . -name '*.log'\n```", "echo 'open"),
        ("shell_splits", {}, "ls", "# only a comment"),
        ("sql_rows", {**TABLE, "rows": [[2], [1]]}, "SELECT n FROM t", "SELECT max(n) FROM t"),
        (
            "sql_rows",
            {**TABLE, "rows": [[2], [1]], "ordered": True},
            "```sql\nSELECT n FROM t ORDER BY n DESC;\n```",
            "SELECT n FROM t ORDER BY n",
        ),
        ("sql_rows", {**TABLE, "rows": [[1.5]]}, "SELECT avg(n) FROM t", "SELECT n FROM u"),
        ("json", {"schema": {"type": "object"}}, "```json\n{}\n```", "here: {}"),
        ("json", {"schema": {}, "bare": True}, "{}", "```json\n{}\n```"),
        ("json", {"schema": {}}, "1", "NaN"),
        ("json", {"schema": {}}, "[]", "[" * 100_000),
        ("json_before", {**STEPS, "pairs": [["a", "b"]]}, PLAN, '{"steps": [{"task": "a"}, 1]}'),
        ("json_before", {"pairs": [["a", "b"]]}, '["a", "b"]', '["b", "a"]'),
        ("json_before", {**STEPS, "pairs": [["a", "b"]]}, PLAN, '{"steps": 1}'),
        ("tool_call", {"name": "run", "arguments": {}}, (CALL,), ()),
        ("tool_call", {"name": "run", "arguments": {}}, (CALL,), (CALL, CALL)),
        ("tool_call", {"name": "run", "arguments": {}}, (CALL,), (ToolCall("go", "{}"),)),
        ("tool_call", {"name": "run", "arguments": {}}, (CALL,), (ToolCall("run", "n=1"),)),
        (
            "tool_call",
            {"name": "run", "arguments": {"required": ["n"]}},
            (CALL,),
            (ToolCall("run", "{}"),),
        ),
        ("no_text", {}, (CALL,), "a"),
        ("no_text", {"max_words": 1}, "a", "a b"),
    ],
)
def test_a_check_passes_and_fails(
    check: str,
    settings: Settings,
    passes: str | tuple[ToolCall, ...],
    fails: str | tuple[ToolCall, ...],
) -> None:
    spec = {"check": check, "label": "it", **settings}
    refuse_bad(spec)
    for given, state in ((passes, "passed"), (fails, "failed")):
        reply = Reply(given) if isinstance(given, str) else Reply("", given)
        found = findings([spec], reply)[1]
        assert (found.label, found.state) == ("it", state), found
        assert bool(found.why) == (state == "failed")


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM t",
        "ATTACH DATABASE 'x.db' AS x",
        "PRAGMA journal_mode",
        "SELECT 1; SELECT 2",
        "SELECT load_extension('x')",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "SELECT length(randomblob(900000000))",
        "SELECT '\ud800'",
        "",
    ],
)
def test_a_statement_can_do_no_harm(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = {"check": "sql_rows", "label": "it", **TABLE, "rows": [[1]]}
    assert findings([spec], Reply(statement))[1].state == "failed"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reply", "state"),
    [
        (Reply("text"), "passed"),
        (Reply("", (CALL,), "tool_calls"), "passed"),
        (Reply(" \n"), "failed"),
        (Reply("text", (), "length"), "failed"),
    ],
)
def test_first_comes_whether_there_is_a_whole_reply(reply: Reply, state: str) -> None:
    (found,) = findings([], reply)
    assert (found.label, found.state) == ("finished", state)


def test_an_empty_reply_passes_nothing() -> None:
    for prompt in roles.load():
        found = findings(prompt.checks, Reply(" \n"))
        assert {finding.state for finding in found} == {"failed"}


@pytest.mark.parametrize(
    ("value", "schema", "where"),
    [
        (1, {"type": "string"}, "it is integer, not string"),
        (True, {"type": "integer"}, "it is boolean, not integer"),
        (True, {"const": 1}, "it is true, not 1"),
        ([True], {"const": [1]}, "it is [true], not [1]"),
        (1.5, {"type": ["integer", "null"]}, "it is number, not ['integer', 'null']"),
        ("c", {"enum": ["a", "b"]}, 'it is "c", none of ["a", "b"]'),
        ("c", {"pattern": "^a"}, 'it is "c", which does not match ^a'),
        (0, {"minimum": 1}, "it is 0"),
        (3, {"maximum": 2}, "it is 3"),
        ({}, {"required": ["a"]}, "a is missing"),
        ({"a": {"b": 1}}, {"properties": {"a": {"required": ["c"]}}}, "a/c is missing"),
        ({"b": 1}, {"additionalProperties": False}, "b was not asked for"),
        ([], {"minItems": 1}, "it has 0 items"),
        ([1, 2], {"maxItems": 1}, "it has 2 items"),
        ([1, "a"], {"items": {"type": "integer"}}, "1 is string, not integer"),
        (None, {"type": ["integer", "null"]}, None),
        (1, {"const": 1.0, "type": "number", "minimum": 1, "maximum": 1}, None),
        ({"a": [1]}, {"type": "object", "properties": {"a": {"maxItems": 1}}}, None),
    ],
)
def test_the_part_of_json_schema(value: object, schema: Settings, where: str | None) -> None:
    assert next(misfits(value, schema), None) == where


@pytest.mark.parametrize(
    ("text", "language", "code"),
    [
        ("x = 1", "python", "x = 1"),
        ("a\n```\nb\n```\nc", "python", "b\n"),
        ("```sh\na\n```\n```py\nb\n```", "python", "b\n"),
        ("```sh\na\n```\n```python3\nb\n```", "", "a\n"),
        ("```python\nnever ends", "python", "never ends"),
        ("  ```python title=x\n  a\n  ```", "python", "  a\n"),
    ],
)
def test_where_the_code_is(text: str, language: str, code: str) -> None:
    assert code_of(text, language) == code


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"check": "tastes", "label": "it"}, "there is no check 'tastes'"),
        ({"check": "words"}, "has no label"),
        ({"check": "contains", "label": "it"}, "needs text"),
        ({"check": "words", "label": "it", "most": 3}, "knows no most"),
    ],
)
def test_a_prompt_cannot_ask_for_what_is_no_check(spec: Settings, why: str) -> None:
    with pytest.raises(BadCheck, match=why):
        refuse_bad(spec)


# --- the fourteen prompts


def test_there_is_a_prompt_for_each_role_in_their_order() -> None:
    assert [prompt.id for prompt in roles.load()] == ROLES


def test_every_kind_of_check_is_tried_above_or_run_below() -> None:
    used = {check["check"] for prompt in roles.load() for check in prompt.checks}
    assert used <= set(KINDS)
    (tried,) = (
        {row[0] for row in mark.args[1]}
        for mark in test_a_check_passes_and_fails.pytestmark  # type: ignore[attr-defined]
    )
    assert set(KINDS) - {"python_runs"} == tried


def golden(name: str) -> Reply:
    """A whole reply: a text, or a record with tool calls."""
    file = REPLIES / f"{name}.json"
    if file.exists():
        return Reply.of(json.loads(file.read_text(encoding="utf-8")))
    return Reply((REPLIES / f"{name}.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("role", ROLES)
def test_a_right_reply_passes_every_check(role: str) -> None:
    (prompt,) = (prompt for prompt in roles.load() if prompt.id == role)
    found = findings(prompt.checks, golden(f"{role}.good"), ab.runner())
    assert [finding for finding in found if finding.state != "passed"] == []


FAILING = {
    "coder": "raises ValueError, prints nothing, right results",
    "reviewer": "sees the SQL injection, sees the shared default list, "
    "sees the open connection, asks for changes, does not approve",
    "debugger": "both causes are gone",
    "test_writer": "five tests without arguments, imports nothing, asserts, tests the error, "
    "passes on the right function, finds four planted bugs",
    "refactorer": "one level deep, does what it did",
    "architect": "the four headings, decides for SQLite, does not decide for another, "
    "rejects Redis, rejects Kafka, rejects the cloud, length",
    "planner": "JSON of this shape, an order that works, downtime from freeze to switch",
    "documenter": "--limit-kbps, --exclude, no made-up option, the default of retries, "
    "an example command, a table of four rows",
    "sql": "one statement, only reads, returns the right rows",
    "shell": "one line, a shell can read it, looks in the right folder, regular files, only .log, "
    "older than 14 days, safe with odd names, no rm, no sudo, no loop over ls",
    "json_extractor": "bare JSON, the start in UTC, 1250 as a number, two causes, "
    "no ticket made up",
    "tool_caller": "just this test, 90 seconds, as a number, no made-up argument",
    "summarizer": "three points, what was decided, until when, what is open, not the wrong figure, "
    "nothing that was turned down",
    "explainer": "in German, length, no headings, names the port, "
    "says that somebody has it, a command that helps, no reboot",
}


@pytest.mark.parametrize("role", ROLES)
def test_a_wrong_reply_fails_what_it_does_wrong(role: str) -> None:
    (prompt,) = (prompt for prompt in roles.load() if prompt.id == role)
    found = findings(prompt.checks, golden(f"{role}.bad"), ab.runner())
    failed = [finding.label for finding in found if finding.state == "failed"]
    assert ", ".join(failed) == FAILING[role]


def test_what_a_model_wrote_is_not_run_unless_somebody_brings_a_runner() -> None:
    (prompt,) = (prompt for prompt in roles.load() if prompt.id == "coder")
    found = findings(prompt.checks, golden("coder.good"))
    assert [finding.label for finding in found if finding.state == "skipped"] == ["right results"]


@pytest.mark.parametrize("role", ROLES)
def test_what_decides_an_answer_is_in_the_digest_and_checks_are_not(role: str) -> None:
    file = roles.PROMPTS / f"{role}.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    value["checks"] = []
    before = next(prompt for prompt in roles.load() if prompt.id == role).sha256
    assert roles._prompt(value, role).sha256 == before
    value["max_tokens"] += 1
    assert roles._prompt(value, role).sha256 != before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"id": "other"}, "is not the file's name"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"colour": "red"}, "nothing is known of colour"),
        ({"checks": [{"check": "matches", "label": "it", "pattern": "("}]}, r"it: \("),
    ],
)
def test_a_bad_prompt_file_is_named(tmp_path: Path, change: Settings, why: str) -> None:
    value = json.loads((roles.PROMPTS / "coder.json").read_text(encoding="utf-8"))
    (tmp_path / "coder.json").write_text(json.dumps(value | dict(change)), encoding="utf-8")
    with pytest.raises(roles.BadPrompt, match=rf"coder\.json: .*{why}"):
        roles.load(tmp_path)


def test_a_folder_without_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(roles.BadPrompt, match="there are no prompts"):
        roles.load(tmp_path)
