"""What holds for every flag set and every header, however it is written or meant."""

import random
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from validator import (
    _CANONICAL,
    Flag,
    FlagsRefused,
    FlagTable,
    Layer,
    OpenedFlags,
    Policy,
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
    if not flag.takes:
        return (draw(st.sampled_from([name for name in (flag.name, flag.negated_name) if name])),)
    return (flag.name, *(draw(st.sampled_from(good_values(flag))) for _ in flag.takes))


def good_values(flag: Flag) -> list[str]:
    kind = flag.takes[0]
    values = list(flag.choices) or VALUES[kind]
    return [value for value in values if is_good(flag, value)]


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

PIECES = st.one_of(
    st.sampled_from(sorted(BUILT_IN.spellings)),
    st.sampled_from(
        [
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
    ),
    st.text(max_size=4),
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
            assert not {"--model", "--host", "--port", "--api-key"} & set(flags_of(taken))
            assert re.fullmatch("[0-9a-f]{12}", taken.hash)


def flags_of(taken: SidecarSpec) -> list[str]:
    names, words = [], list(taken.args)
    while words:
        names.append(words.pop(0))
        del words[: len(BUILT_IN.spellings[names[-1]].flag.takes)]
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
@given(HEADERS, HEADERS)
def test_no_help_text_makes_a_table_that_breaks(help_text: str, header: str) -> None:
    table = BUILT_IN.for_binary(help_text.replace(" --", "\n--"))
    try:
        Validator(split_command_line(header), table)
    except FlagsRefused as refused:
        assert str(refused).isprintable()  # noqa: PT017
