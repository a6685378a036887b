"""How far a job is, on a real terminal, in a log and for programs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.progress import Progress, duration
from tests.daemon import ROOT

JOB = """
import sys
from bench.progress import Progress
with Progress("sweep", 4, done=1, is_json="--json" in sys.argv) as progress:
    progress.report(1, "begins")
    progress.report(2, "a/off", tok_s=12.5)
    progress.say("a line that stays")
    progress.report(4, "the end")
print("after")
"""


def on_a_terminal(script: str, columns: int = 60) -> str:
    """What a program writes where its output is a terminal of so many columns."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=os.environ | {"COLUMNS": str(columns)},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
    finally:
        os.close(theirs)
    data = b""
    try:
        while piece := _read(ours):
            data += piece
    finally:
        os.close(ours)
        process.kill()
        process.wait()
    return data.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # on Linux a terminal whose other end is closed gives an error
        return b""


def test_a_terminal_gets_one_bar_that_changes_and_lines_that_stay_above_it() -> None:
    text = on_a_terminal(JOB)

    states = text.split("\r\x1b[K")
    assert states[1] == "[#####...............] sweep 1/4  begins"
    assert states[2] == "[##########..........] sweep 2/4  a/off"
    assert states[3] == "a line that stays\r\n"
    assert states[4] == states[2]
    assert states[5] == "[####################] sweep 4/4  the end\r\nafter\r\n"


def test_a_bar_is_never_wider_than_the_terminal() -> None:
    text = on_a_terminal(JOB.replace("a/off", "x" * 300), columns=40)

    states = [state for state in text.split("\r\x1b[K") if state.startswith("[")]
    assert max(len(state.split("\r\n")[0]) for state in states) == 39


def test_a_log_gets_few_lines_and_always_the_last() -> None:
    stream = io.StringIO()
    with Progress("sweep", 200, stream=stream) as progress:
        for done in range(201):
            progress.report(done)

    lines = stream.getvalue().splitlines()
    assert lines[0] == "sweep 0/200"
    assert lines[-1] == "sweep 200/200"
    assert len(lines) < 10  # one in ten seconds


def test_a_message_in_a_log_is_a_line() -> None:
    stream = io.StringIO()
    with Progress("sweep", 2, stream=stream) as progress:
        progress.say("one")
        progress.report(1, "a/off")
        progress.say("two")

    lines = stream.getvalue().splitlines()
    assert lines[0] == "one"
    assert lines[-1] == "two"
    assert "\r" not in stream.getvalue()


def test_a_message_puts_off_no_line() -> None:
    stream = io.StringIO()
    with Progress("sweep", 2, stream=stream) as progress:
        progress.say("one")
        progress.report(1, "a/off")

    assert stream.getvalue() == "one\nsweep 1/2  a/off\n"


def test_programs_get_json_on_standard_output() -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOB, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    *lines, last = done.stdout.splitlines()
    states = [json.loads(line) for line in lines]
    assert last == "after"
    assert done.stderr == ""
    assert [(state["done"], state["said"]) for state in states] == [
        (1, "begins"),
        (2, "a/off"),
        (2, "a line that stays"),
        (4, "the end"),
    ]
    assert {(state["job"], state["total"]) for state in states} == {("sweep", 4)}
    assert states[1]["tok_s"] == 12.5


@pytest.mark.parametrize("said", ["two\nlines", "\x1b[31mred", "bell\a"])
def test_a_message_stays_on_its_line(said: str) -> None:
    stream = io.StringIO()
    with Progress("sweep", 2, stream=stream) as progress:
        progress.report(2, said)
        progress.say(said)

    assert stream.getvalue().count("\n") == 2
    assert stream.getvalue().replace("\n", "").isprintable()


def test_the_eta_counts_only_what_this_run_did() -> None:
    stream = io.StringIO()
    progress = Progress("sweep", 1000, done=900, stream=stream)
    assert progress.eta_s is None
    progress.report(901)
    assert progress.eta_s is None
    progress.report(903)
    eta_s = progress.eta_s
    assert eta_s is not None
    progress.report(950)
    later_s = progress.eta_s
    assert later_s is not None
    assert later_s < eta_s + 1
    progress.report(1000)
    assert progress.eta_s == 0


def test_nothing_to_do_is_no_error() -> None:
    stream = io.StringIO()
    with Progress("sweep", 0, stream=stream) as progress:
        progress.report(0)

    assert stream.getvalue() == "sweep 0/0\n"


def test_a_reader_that_went_away_is_no_error_of_the_job(tmp_path: Path) -> None:
    script = JOB.replace('print("after")', f'open({str(tmp_path / "after")!r}, "w").close()')
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, "--json"],
            cwd=ROOT,
            stdout=writer,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)

    assert done.returncode == 0
    assert (tmp_path / "after").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_short_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stream_that_cannot_say_a_letter_gets_its_number() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252", newline="\n")
    with Progress("sweep", 1, stream=stream) as progress:
        progress.report(1, "modèle 模型")

    assert raw.getvalue().decode("cp1252") == "sweep 1/1  modèle \\u6a21\\u578b\n"
