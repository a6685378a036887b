"""What holds for every flag set and every header, however it is written or meant."""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from validator import (
    _CANONICAL,
    MAX_LIFTED_FILE_BYTES,
    Body,
    Flag,
    FlagsRefused,
    FlagTable,
    JsonObject,
    Layer,
    OpenedFlags,
    Policy,
    RequestDefaults,
    Resolved,
    SidecarSpec,
    Validator,
    _BadValue,
    split_command_line,
)

EXAMPLES = settings(max_examples=500, derandomize=True, deadline=None)

BUILT_IN = FlagTable.built_in()
ALONE = Validator([], share=False)
BASE_ARGS = ["-ngl", "999", "-c", "32768", "--flash-attn", "on", "--no-mmap"]
OVER_BASE = Validator(BASE_ARGS, share=False)
SHARED = Validator(BASE_ARGS)
ALONE_SHARED = Validator([])
MODEL = Path("/models/m.gguf")

# The flags whose place and whose neighbours never matter.
INDEPENDENT = [
    flag
    for flag in BUILT_IN.flags
    if flag.policy is Policy.AGENT
    and not (flag.strip or flag.removes or flag.order_with)
    and not any(flag.name in other.removes for other in BUILT_IN.flags)
    and flag.name not in {"--batch-size", "--cache-type-v", "--flash-attn"}
]
VALUES: dict[str, list[str]] = {
    "int": ["8", "9", "1"],
    "float": ["0.5", "0.25", "0.125"],
    "cpu-mask": ["0xff", "0x1"],
    "cpu-range": ["0-3", "4-7"],
    "logit-bias": ["5+1", "5-1.5"],
    "json-object": ['{"a":[1,"x y"]}', "{}"],
    "whole-numbers": ["1", "1,2"],
    "text": ["x", "", "a b", "--host", 'it\'s "so"', "C:\\dir\\", "\\\\unc\\x", "ü\U0001f999", "="],
}

Setting = tuple[str, ...]  # the canonical spelling and its values


def spec(validator: Validator, header: str) -> SidecarSpec:
    return validator.resolve("m", MODEL, Layer(), header).spec


@st.composite
def setting(draw: st.DrawFn, flag: Flag) -> Setting:
    """One use of a flag, in canonical form."""
    return draw(st.sampled_from(uses_of(flag)))


@functools.cache
def uses_of(flag: Flag) -> list[Setting]:
    if not flag.takes:
        return [(name,) for name in (flag.name, flag.negated_name) if name]
    values = list(flag.choices) or VALUES[flag.takes[0]]
    good = [value for value in values if is_good(flag, value)]
    return [(flag.name, *chosen) for chosen in itertools.product(good, repeat=len(flag.takes))]


def is_good(flag: Flag, value: str) -> bool:
    try:
        return _CANONICAL[flag.takes[0]](flag, value) == value
    except _BadValue:
        return False


@st.composite
def flag_sets(draw: st.DrawFn) -> list[Setting]:
    flags = draw(
        st.lists(
            st.sampled_from(INDEPENDENT), unique_by=lambda flag: flag.name, min_size=1, max_size=12
        )
    )
    return [draw(setting(flag)) for flag in flags]


def written(uses: list[Setting], rng: random.Random) -> str:
    """A header that says so, in spellings chosen by `rng`."""
    words = []
    for name, *values in uses:
        flag = BUILT_IN.spellings[name].flag
        spellings = (flag.name, *flag.aliases) if name == flag.name else flag.negated
        word = respelled_name(rng.choice(spellings), rng)
        values = [respelled_value(flag, value, rng) for value in values]
        if len(values) == 1 and rng.random() < 0.5:
            words.append(quoted(f"{word}={values[0]}", rng))
        else:
            words += [quoted(each, rng) for each in (word, *values)]
    return rng.choice([" ", "  ", "\t"]).join(words)


def respelled_name(name: str, rng: random.Random) -> str:
    if name.startswith("--") and rng.random() < 0.3:
        return "--" + name[2:].replace("-", "_")
    return name


def respelled_value(flag: Flag, value: str, rng: random.Random) -> str:
    kind = flag.takes[0]
    synonyms = [word for word, meaning in flag.synonyms.items() if meaning == value]
    if synonyms and rng.random() < 0.7:
        return rng.choice(synonyms)
    forms = [value]
    if re.fullmatch("[0-9]+", value) and kind in {"int", "int-or-choice"}:
        forms += ["+" + value, "0" + value]
    if kind == "float":
        forms += [value + "0", "+" + value, value.removeprefix("0"), value + "e0", value + "E-00"]
    if kind == "json-object":
        forms += [value.replace(",", " , ").replace("{", " {\t").replace("}", "} ")]
    if kind == "cpu-mask":
        forms += [value.upper().replace("X", "x"), value[2:], "0" + value[2:]]
    return rng.choice(forms)


def quoted(word: str, rng: random.Random) -> str:
    bare = [] if not word or set(word) & set(" \t'\"") else [word]
    doubled = [] if "\\" in word else ['"' + word.replace('"', '\\"') + '"']
    return rng.choice(["'" + word.replace("'", "'\"'\"'") + "'", *doubled, *bare])


@EXAMPLES
@given(flag_sets(), st.randoms(use_true_random=False))
def test_every_order_and_spelling_of_a_flag_set_is_the_same_process(
    flags: list[Setting], rng: random.Random
) -> None:
    plain = spec(
        ALONE,
        " ".join("'" + word.replace("'", "'\"'\"'") + "'" for words in flags for word in words),
    )
    assert plain.args == tuple(word for words in sorted(flags) for word in words)
    rng.shuffle(flags)
    again = spec(ALONE, written(flags, rng))
    assert again.args == plain.args
    assert again.hash == plain.hash


@EXAMPLES
@given(flag_sets(), st.data())
def test_every_other_value_is_another_process_unless_the_flag_never_matters(
    flags: list[Setting], data: st.DataObject
) -> None:
    rng = random.Random(0)
    at = data.draw(st.integers(0, len(flags) - 1))
    flag = BUILT_IN.spellings[flags[at][0]].flag
    changed = data.draw(setting(flag))
    before = spec(ALONE, written(flags, rng))
    after = spec(ALONE, written([*flags[:at], changed, *flags[at + 1 :]], rng))
    without = spec(ALONE, written(flags[:at] + flags[at + 1 :], rng))
    assert (before.hash == after.hash) == (changed == flags[at] or not flag.identity)
    assert (before.hash == without.hash) == (not flag.identity)


def is_lifted(use: Setting) -> bool:
    words = " ".join("'" + word.replace("'", "'\"'\"'") + "'" for word in use)
    return not ALONE_SHARED.resolve("m", MODEL, Layer(), words).spec.args


REQUEST_USES = {
    flag.name: [use for use in uses_of(flag) if is_lifted(use)] for flag in INDEPENDENT if flag.body
}
PROCESS_FLAGS = [flag for flag in INDEPENDENT if not flag.body]


def meant(resolved: Resolved) -> dict[str, object]:
    return {field: json.loads(text) for field, text in resolved.defaults.fields.items()}


def two_uses_each(names: list[str]) -> st.SearchStrategy[list[tuple[Setting, Setting]]]:
    pairs = [st.tuples(*[st.sampled_from(REQUEST_USES[name])] * 2) for name in names]
    return st.tuples(*pairs).map(list)


@EXAMPLES
@given(
    st.lists(st.sampled_from(PROCESS_FLAGS), unique=True, max_size=4).flatmap(
        lambda flags: st.tuples(*map(setting, flags))
    ),
    st.lists(st.sampled_from(sorted(REQUEST_USES)), unique=True, min_size=1, max_size=8).flatmap(
        two_uses_each
    ),
    st.randoms(use_true_random=False),
)
def test_what_a_request_can_say_never_splits_the_pool_and_its_last_value_counts(
    process: tuple[Setting, ...], request: list[tuple[Setting, Setting]], rng: random.Random
) -> None:
    first, last = ([*uses] for uses in zip(*request, strict=True))
    without = SHARED.resolve("m", MODEL, Layer(), written([*process], rng))
    said = [
        SHARED.resolve("m", MODEL, Layer(), written(rng.sample(uses, len(uses)), rng))
        for uses in ([*process, *first], [*process, *last], [*last, *process])
    ]
    assert {each.spec for each in said} == {without.spec}
    assert meant(said[1]) == meant(said[2])
    single = [at for at, use in enumerate(last) if not BUILT_IN.spellings[use[0]].flag.accumulates]
    twice = written([*(first[at] for at in single), *(last[at] for at in single)], rng)
    once = written([last[at] for at in single], rng)
    assert meant(SHARED.resolve("m", MODEL, Layer(), twice)) == meant(
        SHARED.resolve("m", MODEL, Layer(), once)
    )


@EXAMPLES
@given(st.sampled_from(PROCESS_FLAGS), flag_sets(), st.data())
def test_a_process_level_flag_splits_the_pool_whatever_else_is_said(
    flag: Flag, others: list[Setting], data: st.DataObject
) -> None:
    rng = random.Random(0)
    others = [use for use in others if BUILT_IN.spellings[use[0]].flag is not flag]
    one, other = data.draw(setting(flag)), data.draw(setting(flag))
    with_one = spec(SHARED, written([one, *others], rng))
    with_other = spec(SHARED, written([*others, other], rng))
    assert (with_one.hash == with_other.hash) == (one == other or not flag.identity)


def test_request_level_flags_are_most_of_those_with_a_field() -> None:
    """Else the properties above would hold of nothing."""
    assert sum(map(bool, REQUEST_USES.values())) > 35


AGENTS = [flag for flag in BUILT_IN.flags if flag.policy is Policy.AGENT]


@EXAMPLES
@given(st.lists(st.sampled_from(AGENTS).flatmap(setting), max_size=12))
def test_what_comes_out_says_the_same_when_it_is_read_again(uses: list[Setting]) -> None:
    header = written(uses, random.Random(0))
    try:
        first = spec(OVER_BASE, header)
    except FlagsRefused as refused:
        assert "flash attention" in str(refused) or "slots" in str(refused)  # noqa: PT017
        return
    assert Validator(first.args).resolve("m", MODEL, Layer()).spec == first
    assert spec(OVER_BASE, written(uses, random.Random(1))) == first


@EXAMPLES
@given(
    st.lists(st.text(alphabet="ab'\"\\ =-", max_size=8), max_size=6),
    st.randoms(use_true_random=False),
)
def test_a_quoted_word_comes_back_as_it_was(words: list[str], rng: random.Random) -> None:
    assert split_command_line(" ".join(quoted(word, rng) for word in words)) == words


@EXAMPLES
@given(st.text(alphabet="ab \t'\"\\", max_size=16))
def test_splitting_follows_its_rules_letter_by_letter(text: str) -> None:
    try:
        words = split_command_line(text)
    except FlagsRefused:
        assert slowly_split(text) is None
    else:
        assert words == slowly_split(text)


def slowly_split(text: str) -> list[str] | None:
    """The same rules, one letter after the other; None for an unclosed quote."""
    words: list[str] = []
    word: str | None = None
    quote = ""
    at = 0
    while at < len(text):
        letter = text[at]
        at += 1
        if letter == "\\" and quote != "'" and text[at : at + 1] == '"':
            word = (word or "") + '"'
            at += 1
        elif letter == quote:
            quote = ""
        elif quote:
            word = (word or "") + letter
        elif letter in "'\"":
            quote, word = letter, word or ""
        elif letter in " \t":
            words += [] if word is None else [word]
            word = None
        else:
            word = (word or "") + letter
    if quote:
        return None
    return words if word is None else [*words, word]


# --- Hostile input

SCRAPS = [
    " ",
    "\t",
    "=",
    "'",
    '"',
    "\\",
    '\\"',
    "--",
    "-",
    ",",
    ":",
    "_",
    "\n",
    "\0",
    "\x1b",
    "\ud800",
    "\u202e",
    "{",
    "}",
    '{"a":',
    "[",
    "1",
    "-1",
    "0.5",
    "1e999",
    "9" * 40,
    "on",
    "q8_0",
    "none",
    "../x",
    "x" * 300,
    "\U0001f999",
    "ü",
]
PIECES = st.one_of(
    st.sampled_from(sorted(BUILT_IN.spellings)), st.sampled_from(SCRAPS), st.text(max_size=4)
)
HEADERS = st.one_of(
    st.lists(PIECES, max_size=30).map("".join),
    st.lists(PIECES, max_size=30).map(" ".join),
    st.text(max_size=200),
)
OPENED = Validator(
    BASE_ARGS,
    opened=OpenedFlags(
        {
            "--lora": Path(__file__).parent.absolute(),
            "--device": None,
            "--lora-scaled": Path("/missing"),
            "--media-path": Path("/"),
        }
    ),
    unknown_flags_for_agents=True,
)


OF_THE_DAEMON = {flag.name for flag in BUILT_IN.flags if flag.policy is Policy.DAEMON}


@settings(EXAMPLES, max_examples=1500)
@given(HEADERS)
def test_no_header_raises_anything_but_a_refusal(header: str) -> None:
    for validator in (ALONE, OPENED):
        try:
            taken = spec(validator, header)
        except FlagsRefused as refused:
            assert refused.faults  # noqa: PT017
            assert str(refused).isprintable()  # noqa: PT017
            assert len(str(refused)) < 16_000  # noqa: PT017
        else:
            assert not OF_THE_DAEMON & set(flags_of(taken))
            assert re.fullmatch("[0-9a-f]{12}", taken.hash)


def flags_of(taken: SidecarSpec, table: FlagTable = BUILT_IN) -> list[str]:
    names, words = [], list(taken.args)
    while words:
        names.append(words.pop(0))
        del words[: len(table.spellings[names[-1]].flag.takes)]
    return names


@EXAMPLES
@given(st.lists(st.one_of(PIECES, st.integers(), st.none()), max_size=12))
def test_no_base_args_raise_anything_but_a_refusal(words: list[str]) -> None:
    try:
        subject = Validator(words)
        subject.model_args(words)
    except FlagsRefused as refused:
        assert str(refused).isprintable()  # noqa: PT017


@EXAMPLES
@given(HEADERS)
def test_no_list_of_opened_flags_raises_anything_but_a_refusal(text: str) -> None:
    try:
        OpenedFlags.parse(text)
    except FlagsRefused as refused:
        assert str(refused).isprintable()  # noqa: PT017


@EXAMPLES
@given(st.sampled_from(sorted(BUILT_IN.spellings)), st.lists(PIECES, max_size=3))
def test_the_neighbour_of_an_unknown_word_is_the_one_that_difflib_finds(
    word: str, pieces: list[str]
) -> None:
    rng = random.Random(word)
    for piece in pieces:
        at = rng.randrange(len(word) + 1)
        word = word[:at] + piece + word[at + rng.randrange(3) :]
    name = word[:64].partition("=")[0].replace("_", "-")
    expected = difflib.get_close_matches(name, BUILT_IN.spellings, n=1)
    assert BUILT_IN.neighbour(word) == (expected[0] if expected else None)


@EXAMPLES
@given(HEADERS, HEADERS)
def test_no_help_text_makes_a_table_that_breaks(help_text: str, header: str) -> None:
    table = BUILT_IN.for_binary(help_text.replace(" --", "\n--"))
    try:
        Validator(split_command_line(header), table)
    except FlagsRefused as refused:
        assert str(refused).isprintable()  # noqa: PT017


# --- The same by the hundred thousand, from a generator that is faster than hypothesis

WORDS = sorted(BUILT_IN.spellings)
BLANKS = ["", " ", " ", "  ", "\t"]
SLOW_OR_LONG = ["--" + "a" * 24_000, "'" * 5000, '\\"' * 5000, "-r x " * 300, "[" * 5000]
FILES = [
    "a.gguf",
    "sub/b.gguf",
    "./sub/../a.gguf",
    "../out.gguf",
    "/etc/passwd",
    "link",
    "loop",
    "pipe",
    "sub",
    "",
    "a.gguf:0.5",
    "a.gguf:x,sub/b.gguf:1",
    "a.gguf,sub/b.gguf",
    "g.gbnf",
    "s.json",
    "bad.json",
    "latin-1",
    "empty",
    "huge",
    "C:\\a.gguf",
    "\\\\host\\share",
    "x" * 300,
    "nul\0",
]
UNUSUAL_USES = [
    "--brand-new",
    "--no-brand-new",
    "--bn=1 2",
    "--device=CUDA0",
    "--reverse-prompt=a\\n",
    "--reverse-prompt=\\xff",
    "--reverse-prompt=\\xzz",
    "--reverse-prompt=\\",
]
OF_FILES = ["--lora", "--lora-scaled", "--grammar-file", "--json-schema-file", "--media-path"]


@pytest.fixture(scope="module")
def opened_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the names in FILES lie in, or point out of."""
    top = tmp_path_factory.mktemp("opened")
    folder = top / "in"
    (folder / "sub").mkdir(parents=True)
    (top / "out.gguf").touch()
    for name in ("a.gguf", "sub/b.gguf", "empty"):
        (folder / name).touch()
    (folder / "g.gbnf").write_text('root ::= "ü"\n', encoding="utf-8")
    (folder / "s.json").write_text(' {"type": "object"}\n')
    (folder / "bad.json").write_text('{"type": ')
    (folder / "latin-1").write_bytes(b"\xfc")
    (folder / "huge").write_text("x" * (MAX_LIFTED_FILE_BYTES + 1))
    if sys.platform != "win32":
        (folder / "link").symlink_to(top / "out.gguf")
        (folder / "loop").symlink_to(folder / "loop")
        os.mkfifo(folder / "pipe")
    return folder


def hostile(text: str, other: str, rng: random.Random) -> str:
    """A text spoilt in one of the ways in which texts are."""
    words = text.split(" ")
    at, to = sorted((rng.randrange(len(words) + 1), rng.randrange(len(words) + 1)))
    place = rng.randrange(len(text) + 1)
    match rng.randrange(8):
        case 0:
            return " ".join(words[:at] + words[to:])
        case 1:
            return " ".join(words[:to] + words[at:])
        case 2:
            rng.shuffle(words)
            return " ".join(words)
        case 3:
            return text[:place]
        case 4:
            return text[:place] + other[rng.randrange(len(other) + 1) :]
        case 5:
            return text[:place] + rng.choice(SCRAPS) + text[place:]
        case 6:
            return text[:place] + chr(rng.choice([rng.randrange(128), 0x7F, 0xD800, 0x2028]))
        case _:
            return text[:place] + text[place + 1 :]


def some_header(rng: random.Random) -> str:
    if rng.random() < 0.25:
        words = (rng.choice(rng.choice([WORDS, SCRAPS])) for _ in range(rng.randrange(12)))
        return rng.choice(BLANKS).join(words)
    uses = [rng.choice(uses_of(rng.choice(AGENTS))) for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.3:
        uses.append((rng.choice(OF_FILES), rng.choice(FILES)))
    if rng.random() < 0.1:
        uses.append((rng.choice(UNUSUAL_USES),))
    header = " ".join([quoted(word, rng) for use in uses for word in use])
    return header + " " + rng.choice(SLOW_OR_LONG) if rng.random() < 0.002 else header


def hostile_header(rng: random.Random) -> str:
    header = some_header(rng)
    for _ in range(rng.randrange(3)):
        header = hostile(header, some_header(rng), rng)
    return header


JSON_VALUES = ["null", '""', "[]", "{}", "0", "-0.5e+3", '"x"', '"\\ud800"', '{"a":[1,{"b":null}]}']
NO_JSON = ["NaN", "-", "01", "'x'", "9" * 5000, "1e999", "[" * 3000, '{"a":' * 3000, "\0", "tru"]
FIELDS = [flag.field for flag in BUILT_IN.flags if flag.body]
NAMES = [*FIELDS, "model", "tools", "max_tokens", "grammar", "", "\\u0041", '\\"', "\\ud800"]


def some_body(rng: random.Random) -> str:
    gap = rng.choice(["", "", " ", "\r\n"])
    members = []
    for _ in range(rng.randrange(6)):
        value = rng.choice(NO_JSON if rng.random() < 0.05 else JSON_VALUES)
        members.append(f'"{rng.choice(NAMES)}"{gap}:{gap}{value}')
    return gap + "{" + gap + f"{gap},{gap}".join(members) + gap + "}" + gap


def hostile_body(rng: random.Random) -> str:
    body = some_body(rng)
    return hostile(body, some_body(rng), rng) if rng.random() < 0.5 else body


@contextlib.contextmanager
def naming(*inputs: object) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        exc.add_note(f"the input was {inputs!r}")
        raise


@dataclasses.dataclass(frozen=True)
class Judges:
    """What is put to the test, in as many ways as it can be configured."""

    validators: list[Validator]
    defaults: list[RequestDefaults]
    folder: Path

    def header(self, rng: random.Random) -> None:
        header, body = hostile_header(rng), rng.choice([*Body])
        at, owner = rng.randrange(len(self.validators)), rng.choice(["", "", "agent ü"])
        validator = self.validators[at]
        with naming(header, body, at, owner):
            resolved = validator.resolve("m", MODEL, Layer(), header, body=body, owner=owner)
            assert re.fullmatch("[0-9a-f]{12}", resolved.spec.hash)
            assert not OF_THE_DAEMON & set(flags_of(resolved.spec, validator.table))
            json.loads(resolved.defaults.applied_to(JsonObject("{}")))

    def body(self, rng: random.Random) -> None:
        text, defaults = hostile_body(rng), rng.choice(self.defaults)
        with naming(text, defaults.fields):
            expected = as_python_reads_it(text)
            try:
                body = JsonObject(text)
            except ValueError:
                assert expected is None
                raise Refused from None
            assert body.values == expected
            given = JsonObject(defaults.applied_to(body))
            assert given.values.keys() >= body.values.keys()
            for name, value in body.values.items():
                if value not in (None, "", []) and name != "chat_template_kwargs":
                    assert given.text_of(name) == body.text_of(name)

    def operators_words(self, rng: random.Random) -> None:
        words: list[Any] = split_command_line(hostile_header(rng))
        if rng.random() < 0.2:
            words.insert(rng.randrange(len(words) + 1), rng.choice([None, 1, [], "\0", "\ud800"]))
        with naming(words):
            Validator(words)
            rng.choice(self.validators).model_args(words)

    def opened_flags(self, rng: random.Random) -> None:
        items = [
            rng.choice([*OF_FILES, *WORDS]) + rng.choice(["", "=", "=" + rng.choice(FILES)])
            for _ in range(rng.randrange(6))
        ]
        text = hostile(",".join(items), some_header(rng), rng)
        with naming(text):
            OpenedFlags.parse(text, rng.choice(self.validators).table, self.folder)

    def help_text(self, rng: random.Random) -> None:
        rows = [f"{flag.name} {flag.value_hint}  words" for flag in rng.sample(AGENTS, 120)]
        text, header = hostile("\n".join(rows), hostile_header(rng), rng), hostile_header(rng)
        with naming(text, header):
            table = BUILT_IN.for_binary(text)
            Validator([], table, unknown_flags_for_agents=True).resolve("m", MODEL, Layer(), header)


class Refused(FlagsRefused):
    """A body is refused with ValueError alone."""

    def __init__(self) -> None:
        super().__init__(["no JSON object"])


def as_python_reads_it(text: str) -> object:
    """The same object by json.loads; None if it is none."""
    try:
        value = json.loads(text, parse_int=float, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def no_constant(name: str) -> None:
    raise ValueError(name)


@pytest.fixture(scope="module")
def judges(opened_folder: Path) -> Judges:
    opened = OpenedFlags(dict.fromkeys(OF_FILES, opened_folder) | {"--device": None})
    rows = [f"{flag.name} {'X ' * len(flag.takes)}" for flag in BUILT_IN.flags[::2]]
    other_build = BUILT_IN.for_binary("\n".join([*rows, "--brand-new, --no-brand-new", "--bn X Y"]))
    rng = random.Random(0)
    return Judges(
        [
            ALONE,
            Validator(BASE_ARGS, opened=opened),
            Validator(["--no-escape", "--temp", "1"], opened=opened, unknown_flags_for_agents=True),
            Validator([], other_build, opened=opened, unknown_flags_for_agents=True),
        ],
        [
            ALONE_SHARED.resolve("m", MODEL, Layer(), written(uses, rng), body=body).defaults
            for body in (Body.COMPLETION, Body.MESSAGES)
            for uses in ([rng.choice(uses) for uses in REQUEST_USES.values() if uses],) * 5
        ],
        opened_folder,
    )


HOSTILE_INPUTS: dict[str, tuple[Callable[[Judges, random.Random], None], int]] = {
    "headers": (Judges.header, 75_000),
    "bodies": (Judges.body, 25_000),
    "operators' words": (Judges.operators_words, 4_000),
    "opened flags": (Judges.opened_flags, 4_000),
    "help texts": (Judges.help_text, 500),
}


def test_hostile_inputs_are_a_hundred_thousand() -> None:
    assert sum(count for _, count in HOSTILE_INPUTS.values()) >= 100_000


@pytest.mark.parametrize("kind", HOSTILE_INPUTS)
def test_no_hostile_input_raises_anything_but_a_refusal(kind: str, judges: Judges) -> None:
    judge, count = HOSTILE_INPUTS[kind]
    rng = random.Random(kind)
    taken = refused = 0
    for _ in range(count):
        try:
            judge(judges, rng)
        except FlagsRefused as exc:
            assert exc.faults  # noqa: PT017
            assert str(exc).isprintable(), exc.__notes__  # noqa: PT017
            assert len(str(exc)) < 16_000, exc.__notes__  # noqa: PT017
            refused += 1
        else:
            taken += 1
    assert taken + refused == count
    assert min(taken, refused) > count / 20, "the generator makes one kind of input only"


def test_a_body_nested_as_deep_as_can_be_read_is_given_defaults_or_left_alone() -> None:
    """Its chat_template_kwargs are read a second time, from deeper in the stack."""
    defaults = RequestDefaults({"chat_template_kwargs": '{"x":1}', "top_k": "8"})
    for depth in range(700, 1000):
        text = '{"chat_template_kwargs":{"a":' + "[" * depth + "]" * depth + "}}"
        try:
            body = JsonObject(text)
        except ValueError:  # by now too deep for the first reading
            break
        assert '"top_k":8' in defaults.applied_to(body)
