"""Our reading of YAML against PyYAML's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bench import yaml_subset

CONFIGS = sorted((Path(__file__).parent / "llama_swap_configs").glob("*.yaml"))


def by_pyyaml(text: str) -> Any:
    """Every scalar as a text, as ours is; an empty document too."""
    found = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506 - it makes texts only
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


@settings(max_examples=150, deadline=None)
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


@settings(max_examples=80, deadline=None)
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


@settings(max_examples=600, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
@example("a:\n - b\n - c\nd: |2\n    x\n")
@example("a: 'b\n\n  c'\n")
def test_what_is_read_at_all_is_read_as_pyyaml_reads_it(text: str) -> None:
    try:
        ours = yaml_subset.load(text)
    except yaml_subset.YamlError:
        return

    assert ours == by_pyyaml(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_nothing_raises_anything_else(text: str) -> None:
    try:
        yaml_subset.load(text)
    except yaml_subset.YamlError as exc:
        assert 1 <= exc.line <= text.count("\n") + 1
