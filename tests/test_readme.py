"""What README tells of the program is what the program does."""

import re

import pytest

from llama_sidecar import DEFAULTS
from tests import flag_table
from validator import FlagTable

README = flag_table.README.read_text(encoding="utf-8")
REQUIRED = {"LLAMA_SERVER_BIN", "MODEL_DIR_MAP_FILE"}
DOCUMENTED = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", README, re.MULTILINE))


def test_the_table_of_flags_is_the_one_that_flags_json_makes() -> None:
    assert flag_table.block() in README, "refresh it: python -m tests.flag_table --write"


def test_the_table_of_flags_names_every_flag_once() -> None:
    named = re.findall(r"`(-[^`]+)`", flag_table.block())
    assert sorted(named) == sorted(flag.name for flag in FlagTable.built_in().flags)


def test_every_topic_of_the_table_of_flags_has_flags() -> None:
    rows = re.findall(r"^\| (.*?) \| `", flag_table.block(), re.MULTILINE)
    assert set(rows) >= set(flag_table.TOPICS)


def test_the_table_goes_between_its_marks_and_nowhere_else() -> None:
    text = f"before {flag_table.BEGIN} old {flag_table.END} after"
    assert flag_table.written_into(text) == f"before {flag_table.block()} after"
    with pytest.raises(ValueError, match="not both there"):
        flag_table.written_into("no marks")


@pytest.mark.parametrize("variable", DEFAULTS)
def test_readme_gives_each_variable_with_its_default(variable: str) -> None:
    default = "required" if variable in REQUIRED else f"`{DEFAULTS[variable]}`"
    assert DOCUMENTED.get(variable) == ("none" if default == "``" else default)


def test_readme_gives_no_variable_that_is_not_read() -> None:
    assert DOCUMENTED.keys() == DEFAULTS.keys()
