"""A file of results: whole lines only, one writer, one run."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import journal
from tests.daemon import ROOT, wait_until

DECIDES = {"seed": 1, "sampling": {"temperature": 0}}

APPENDS_FOR_EVER = """
import itertools, sys
from pathlib import Path
from bench import journal
with journal.opened(Path(sys.argv[1]), {"seed": 1, "sampling": {"temperature": 0}}, {}) as results:
    for number in itertools.count(len(results.records)):
        results.append({"id": f"q/{number}", "text": "x" * (number % 5000)})
        print(number, flush=True)
"""
HAS_LITTLE_ROOM = """
import resource, signal, sys
from pathlib import Path
from bench import journal
path = Path(sys.argv[1])
with journal.opened(path, {"seed": 1, "sampling": {"temperature": 0}}, {}) as results:
    results.append({"id": "fits"})
    room = path.stat().st_size + 20
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        results.append({"id": "does not fit", "text": "x" * 1000})
    except OSError as exc:
        print(exc)
    print(sorted(results.records))
    results.append({"id": "fits"})
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def opened(path: Path, **options: Any) -> contextlib.AbstractContextManager[journal.Journal]:
    return journal.opened(path, DECIDES, {"created": "now"}, **options)


def write(path: Path, *ids: str) -> None:
    with opened(path) as results:
        for id_ in ids:
            results.append({"id": id_})


@contextlib.contextmanager
def running(script: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


# --- what is written stays


def test_records_come_back_with_their_header(path: Path) -> None:
    with opened(path) as results:
        results.append({"id": "a", "text": "one\u2028two\x85three\nfour \ud800"})
        results.append({"id": "b"})

    found = journal.read(path)

    assert found.header["decides"] == DECIDES
    assert found.header["run_key"] == journal.run_key(DECIDES)
    assert found.header["about"] == {"created": "now"}
    assert list(found.records) == ["a", "b"]
    assert found.records["a"]["text"] == "one\u2028two\x85three\nfour \ud800"
    assert path.read_bytes().count(b"\n") == 3
    assert path.read_bytes().isascii()


def test_a_record_is_there_for_readers_before_append_returns(path: Path) -> None:
    with opened(path) as results:
        results.append({"id": "a"})
        assert list(journal.read(path).records) == ["a"]


def test_of_two_records_with_one_id_the_later_counts_and_is_counted(path: Path) -> None:
    with opened(path) as results:
        results.append({"id": "a", "n": 1})
        results.append({"id": "a", "n": 2})
        assert (results.records["a"]["n"], results.repeated) == (2, 1)

    found = journal.read(path)

    assert (found.records["a"]["n"], found.repeated) == (2, 1)
    with opened(path) as results:
        assert results.repeated == 1


def test_what_is_no_json_is_not_begun(path: Path) -> None:
    with opened(path) as results, pytest.raises(ValueError, match="JSON"):
        results.append({"id": "a", "n": float("nan")})

    assert journal.read(path).records == {}


def test_the_file_is_open_only_while_a_line_is_written(path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.jsonl"
    with opened(path) as results:
        results.append({"id": "a"})
        path.rename(moved)
        with pytest.raises(FileNotFoundError):
            results.append({"id": "b"})
        moved.rename(path)
        results.append({"id": "c"})

    assert list(journal.read(path).records) == ["a", "c"]


def test_on_a_full_disk_nothing_half_is_left(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HAS_LITTLE_ROOM, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{path}: only 20 of 1032 bytes fitted", "['fits']"]
    assert path.read_bytes().endswith(b'{"id":"fits"}\n{"id":"fits"}\n')


# --- what a kill leaves


@pytest.mark.parametrize("torn", [b'{"id":"b","te', b"{", b'{"id":"b"}', b"\xff\x00"])
def test_a_torn_end_is_cut_off_before_anything_is_appended(path: Path, torn: bytes) -> None:
    write(path, "a")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)

    assert list(journal.read(path).records) == ["a"]
    write(path, "c")

    assert path.read_bytes() == whole + b'{"id":"c"}\n'


@pytest.mark.parametrize("torn", [b"", b'{"sch', b'{"schema":1,"run_key":"ab'])
def test_a_header_that_never_became_whole_is_written_anew(path: Path, torn: bytes) -> None:
    path.write_bytes(torn)

    write(path, "a")

    assert list(journal.read(path).records) == ["a"]


@pytest.mark.parametrize("text", [b"notes", b"notes\n", b'{"a": 1}\n', b'{"schema":7}\n', b"[]\n"])
def test_somebody_elses_file_is_left_alone(path: Path, text: bytes) -> None:
    path.write_bytes(text)

    with pytest.raises(journal.JournalError, match="header"), opened(path, is_new_run=True):
        pass

    assert path.read_bytes() == text


def test_killed_at_any_moment_it_goes_on_with_whole_records(path: Path) -> None:
    for _ in range(4):
        with running(APPENDS_FOR_EVER, path) as process:
            assert process.stdout is not None
            for _ in range(15):
                last = int(process.stdout.readline())
            process.kill()
            process.wait()

        found = journal.read(path)

        assert not found.broken
        assert found.repeated == 0
        assert list(found.records) == [f"q/{n}" for n in range(len(found.records))]
        assert len(found.records) > last  # what was told was on the disk


# --- broken lines


def broken(path: Path) -> bytes:
    write(path, "a", "b")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1], b'{"id":"x', b'{"n":1}', *lines[2:]]))
    return path.read_bytes()


def test_a_broken_line_is_named_and_nothing_is_changed(path: Path) -> None:
    before = broken(path)

    with pytest.raises(journal.JournalError, match=r"line 3 is broken; --repair"), opened(path):
        pass

    assert path.read_bytes() == before
    assert journal.read(path).broken == (3, 4)


def test_repair_sets_broken_lines_aside(path: Path) -> None:
    broken(path)

    with opened(path, is_repair=True) as results:
        assert list(results.records) == ["a", "b"]
        results.append({"id": "c"})

    assert list(journal.read(path).records) == ["a", "b", "c"]
    assert journal.read(path).broken == ()
    assert path.with_name("run.jsonl.bad").read_bytes() == b'{"id":"x\n{"n":1}\n'


def test_repair_with_a_torn_end_too(path: Path) -> None:
    before = broken(path)
    path.write_bytes(before + b'{"id":"torn')

    with opened(path, is_repair=True) as results:
        results.append({"id": "c"})

    assert list(journal.read(path).records) == ["a", "b", "c"]


# --- other runs, other writers


def test_another_run_is_refused_with_what_differs(path: Path) -> None:
    write(path, "a")
    before = path.read_bytes()
    other = {"seed": 2, "sampling": {"temperature": 0, "top_k": 1}}

    with pytest.raises(journal.OtherRun) as refused, journal.opened(path, other, {}):
        pass

    assert refused.value.differences == ["sampling.top_k: nothing, now 1", "seed: 1, now 2"]
    assert "seed: 1, now 2" in str(refused.value)
    assert path.read_bytes() == before


def test_what_is_only_about_the_run_may_differ(path: Path) -> None:
    write(path, "a")

    with journal.opened(path, DECIDES, {"created": "later"}) as results:
        assert list(results.records) == ["a"]
        assert results.header["about"] == {"created": "now"}


def test_a_new_run_sets_the_old_one_aside(path: Path) -> None:
    write(path, "a")
    before = path.read_bytes()
    path.with_name("run.1.jsonl").write_bytes(b"taken")

    with journal.opened(path, {"seed": 2}, {}, is_new_run=True) as results:
        results.append({"id": "b"})

    assert path.with_name("run.2.jsonl").read_bytes() == before
    assert list(journal.read(path).records) == ["b"]


def test_a_new_run_of_the_same_key_goes_on(path: Path) -> None:
    write(path, "a")

    with opened(path, is_new_run=True) as results:
        assert list(results.records) == ["a"]


def test_a_second_writer_is_refused_while_the_first_lives(path: Path) -> None:
    with (
        opened(path) as results,
        pytest.raises(journal.JournalError, match="another run writes"),
        opened(path),
    ):
        pass

    assert results.records == {}
    write(path, "a")


def test_a_killed_writer_holds_nothing(path: Path) -> None:
    with running(APPENDS_FOR_EVER, path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(journal.JournalError, match="another run writes"), opened(path):
            pass

    write(path, "after")

    assert "after" in journal.read(path).records


def test_of_many_that_begin_at_once_one_writes(path: Path) -> None:
    held, refused = threading.Event(), []
    together = threading.Barrier(6)

    def begin() -> None:
        together.wait(30)
        try:
            with opened(path) as results:
                results.append({"id": "mine"})
                held.wait(30)
        except journal.JournalError as exc:
            refused.append(str(exc))

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(refused) == 5, "five are refused")
    finally:
        held.set()
        for thread in threads:
            thread.join(30)

    assert list(journal.read(path).records) == ["mine"]


# --- replacing files


def test_a_file_is_replaced_whole_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    texts = {bytes([letter]) * 100_000 for letter in b"abc"}
    journal.write_whole(file, b"a" * 100_000)
    is_over = threading.Event()
    seen = set()

    def read() -> None:
        while not is_over.is_set():
            with contextlib.suppress(PermissionError):  # Windows, at the very moment
                seen.add(file.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(20):
            for text in texts:
                journal.write_whole(file, text)
    finally:
        is_over.set()
        reader.join(30)

    assert seen <= texts
    assert [other.name for other in tmp_path.iterdir()] == ["report.html"]


def test_differences_name_lists_and_kinds() -> None:
    then = {"models": [1, 2], "n": 1, "deep": {"a": 1}, "gone": None}
    now = {"models": [1], "n": True, "deep": 5}

    assert journal.differences(then, now) == [
        'deep: {"a": 1}, now 5',
        "gone: null, now nothing",
        "models: [1, 2], now [1]",
        "n: 1, now true",
    ]


def test_the_run_key_is_that_of_the_values_and_not_of_their_order() -> None:
    assert journal.run_key({"a": 1, "b": [2]}) == journal.run_key({"b": [2], "a": 1})
    assert journal.run_key({"a": 1}) != journal.run_key({"a": 2})
    assert json.loads(journal.as_line({"a": "\u2028"})) == {"a": "\u2028"}
