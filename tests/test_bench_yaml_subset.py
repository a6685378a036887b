"""Our reading of YAML against PyYAML's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from bench import yaml_subset

SLOW = [HealthCheck.too_slow]  # a machine with other work is no fault
CONFIGS = sorted((Path(__file__).parent / "llama_swap_configs").glob("*.yaml"))


def by_pyyaml(text: str) -> Any:
    """Every scalar as a text, as ours is; an empty document too."""
    found = yaml.load(text, Loader=yaml.BaseLoader)
    return "" if found is None else found


class WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, _data: object) -> bool:
        return True


# --- what is read, is read as PyYAML reads it


def test_there_are_configurations_to_compare() -> None:
    assert len(CONFIGS) >= 30


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_configuration_is_read_as_pyyaml_reads_it(file: Path, ends: str) -> None:
    text = file.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\n", ends)

    assert yaml_subset.load(text) == by_pyyaml(text)


LETTERS = st.sampled_from("abZ09 .,:;#-_=+*&!?|>%@`'\"/\\()[]{}<>~$\n\u00e4\u4e16\U0001f600")
TEXTS = st.text(LETTERS, max_size=40)
TREES = st.recursive(
    TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
NUMBERS_TOO = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@given(
    TREES,
    st.sampled_from([None, '"', "'", "|", ">"]),
    st.sampled_from([20, 80, 1000]),
    st.sampled_from([2, 4, 7]),
    st.sampled_from([None, True, False]),
    st.booleans(),
)
@example({"a": ["\n\n b\nc  \n", {"": "- x"}]}, ">", 20, 2, None, True)
def test_what_pyyaml_writes_is_read_as_pyyaml_reads_it(
    tree: Any, style: str | None, width: int, indent: int, is_flow: bool | None, is_unicode: bool
) -> None:
    text = yaml.dump(
        tree,
        Dumper=WithoutAliases,
        default_style=style,
        width=width,
        indent=indent,
        default_flow_style=is_flow,
        allow_unicode=is_unicode,
    )
    assume("? " not in text)  # how a long key is written: ours refuses it
    expected = by_pyyaml(text)

    assert yaml_subset.load(text) == expected


@settings(max_examples=80, deadline=None, suppress_health_check=SLOW)
@given(NUMBERS_TOO, st.sampled_from([None, True, False]))
def test_numbers_stay_the_text_that_they_are(tree: Any, is_flow: bool | None) -> None:
    text = yaml.dump(tree, Dumper=WithoutAliases, default_flow_style=is_flow)
    assume("? " not in text)

    assert yaml_subset.load(text) == by_pyyaml(text)


PIECES = st.sampled_from(
    [
        *["a: ", "b:\n", "- ", "-\n", "c", "d e", "'x y'", '"q\\n"', "\n", "\n\n", "  ", "    "],
        *["|\n", ">-\n", "|+\n", ">2\n", "# no\n", " # no\n", "[", "]", "{", "}", ", ", ": "],
        *[
            "''",
            "x:y",
            "http://h/p",
            "---\n",
            "...\n",
            "\\",
            "\t",
            '"',
            "'",
            "&a ",
            "*a",
            "!t ",
            "?",
        ],
    ]
)


@settings(max_examples=600, deadline=None, suppress_health_check=SLOW)
@given(st.lists(PIECES, max_size=14).map("".join))
@example("a:\n - b\n - c\nd: |2\n    x\n")
@example("a: 'b\n\n  c'\n")
def test_what_is_read_at_all_is_read_as_pyyaml_reads_it(text: str) -> None:
    try:
        ours = yaml_subset.load(text)
    except yaml_subset.YamlError:
        return

    assert ours == by_pyyaml(text)


@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(st.text(max_size=200))
def test_nothing_raises_anything_else(text: str) -> None:
    line = 1
    try:
        yaml_subset.load(text)
    except yaml_subset.YamlError as exc:
        line = exc.line

    assert 1 <= line <= text.count("\n") + 1


# --- what is refused, with its line

REFUSED = [
    ("a: &here b\n", 1, "an anchor"),
    ("a: 1\nb: *here\n", 2, "an alias"),
    ("a: !!str 1\n", 1, "a tag"),
    ("a:\n  <<: {b: c}\n", 2, "a merge key"),
    ("a: {<<: {b: c}}\n", 1, "a merge key"),
    ("a:\n\tb: c\n", 2, "a tab"),
    ("a:\tb\n", 1, "a tab"),
    ("a: b\tc\n", 1, "a tab"),
    ("a: [b,\tc]\n", 1, "a tab"),
    ("a: 1\n---\nb: 2\n", 2, "a second document"),
    ("a: 1\n...\nb: 2\n", 3, "the indentation fits nothing"),
    ("%YAML 1.2\n---\na: 1\n", 1, "directives"),
    ("? a\n: b\n", 1, "a key behind a '?'"),
    ("a: 1\nb: 2\na: 3\n", 3, "the key stands twice"),
    ("{a: 1,\n a: 2}\n", 2, "the key stands twice"),
    ("a: b: c\n", 1, "a second ':'"),
    ("a: b\n  c: d\n", 2, "a ':' with a blank"),
    ("a:\n    b: 1\n  c: 2\n", 3, "the indentation fits nothing"),
    ("a:\n  b: 1\n    c: 2\n", 3, "a ':' with a blank"),
    ("a: - b\n", 1, "a list begins on a line of its own"),
    ("- a\nb: c\n", 2, "the indentation fits nothing"),
    ("a: 1\n- b\n", 2, "neither a key"),
    ("a: 'b\nc: d\n", 1, "a quote is opened and never closed"),
    ('a: "b\\q"\n', 1, "no escape"),
    ('a: "\\ud800"\n', 1, "no character"),
    ("a: 'b' c\n", 1, "text behind a value"),
    ("a: [b, c\n", 1, "[ is opened and never closed"),
    ("a: [b}\n", 1, "neither ',' nor ']'"),
    ("a: [, b]\n", 1, "a value cannot begin with ','"),
    ("a: {[b]: c}\n", 1, "a key that is no text"),
    ("a: @b\n", 1, "a value cannot begin with '@'"),
    ("a: `b`\n", 1, "a value cannot begin with '`'"),
    ("a: |x\n  b\n", 1, "behind | or >"),
    ("a: |\n  b\n c\n", 3, "the indentation fits nothing"),
    ("a: b\x00\n", 1, "U+0000"),
    ("a: 1\nb: c\u2028d\n", 2, "U+2028"),
    ("a\rb: c\n", 1, "U+000D"),
    ("[" * 100, 1, "deeper than"),
    ("- " * 100 + "a\n", 1, "deeper than"),
]


@pytest.mark.parametrize(("text", "line", "words"), REFUSED, ids=[repr(t[0][:20]) for t in REFUSED])
def test_what_is_not_read_is_named_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(yaml_subset.YamlError) as refused:
        yaml_subset.load(text)

    assert refused.value.line == line
    assert words in str(refused.value)


def test_a_refusal_shows_no_value() -> None:
    with pytest.raises(yaml_subset.YamlError) as refused:
        yaml_subset.load("cmd: llama-server --api-key sk-secret\n  more: words\n")

    assert "secret" not in str(refused.value)
