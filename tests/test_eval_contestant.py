"""Who is named on a command line, and what their files are called."""

from __future__ import annotations

import argparse

import pytest

from eval import contestant
from eval.contestant import Contestant


def chosen(*words: str) -> list[Contestant]:
    parser = argparse.ArgumentParser()
    contestant.add_arguments(parser)
    return contestant.chosen(parser.parse_args(words))


def test_contestants_come_in_the_order_in_which_they_are_named() -> None:
    named = ["--model", "a", "--models", "b, c,", "--agent-flags", "-c 512"]
    named += ["--contestant", " d  --cache-type-k q8_0 ", "--contestant", "d"]
    assert chosen(*named) == [
        Contestant("a", "-c 512"),
        Contestant("b", "-c 512"),
        Contestant("c", "-c 512"),
        Contestant("d", "--cache-type-k q8_0"),
        Contestant("d"),
    ]


def test_a_header_gives_back_who_it_was() -> None:
    one = Contestant("qwen3:8b", "-c 8192")
    assert contestant.from_header(one.decides()) == one


@pytest.mark.parametrize(
    ("one", "slug"),
    [
        (Contestant("tiny"), "tiny-86884c"),
        (Contestant("org/Qwen3:8B", "-c 8192 -ctk q8_0"), "org-Qwen3-8B-c-8192-ctk-q8_0-9f3f4b"),
        (Contestant("..\\..\\x"), "x-"),
        (Contestant("m" * 300), "m" * 48 + "-"),
        (Contestant("/"), "model-"),
    ],
)
def test_a_file_can_be_called_so(one: Contestant, slug: str) -> None:
    assert one.slug.startswith(slug)
    assert len(one.slug) < 60


def test_names_that_are_spelled_alike_have_different_files() -> None:
    ones = [
        Contestant("a", "b c"),
        Contestant("a b", "c"),
        Contestant("a-b-c"),
        Contestant("A-b-c"),
    ]
    assert len({one.slug.lower() for one in ones}) == 4
