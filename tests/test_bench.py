"""The benchmark's own arithmetic, its refusals, and its load of streams against its upstream."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import proxy_report
from bench.parts import answers_health, end, free_port
from bench.rows import Found, run_streams
from bench.streams import STREAM_HEAD, Reader, as_chunk
from tests.daemon import ROOT, wait_until

SCRIPT = ROOT / "bench" / "proxy_overhead.py"
KEY = "key-of-the-upstream"


def run_script(*words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | ({"PATH": path} if path is not None else {})
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


# --- targets


@pytest.mark.parametrize(
    ("is_at_most", "limit", "where_base_is", "value", "base", "is_met"),
    [
        (True, 120, None, 120, 40, True),
        (True, 120, None, 121, 40, False),
        (False, 0.12, None, 0.12, 80_000, True),
        (False, 0.12, None, 0.11, 80_000, False),
        # The limit follows the base: a machine twice as slow may add twice as much.
        (True, 120, 40, 240, 80, True),
        (True, 120, 40, 120, 20, False),
        (False, 9_000, 75_000, 4_500, 37_500, True),
        (True, 120, 40, 121, None, False),
    ],
)
def test_a_target_is_met_at_its_limit_and_scales_with_the_base(
    is_at_most: bool,
    limit: float,
    where_base_is: float | None,
    value: float,
    base: float | None,
    is_met: bool,
) -> None:
    target = proxy_report.Target("one", "p50 us", "added", is_at_most, limit, where_base_is)

    assert target.is_met(value, base) is is_met


def test_every_target_names_a_column() -> None:
    assert {target.column for target in proxy_report.TARGETS} <= set(proxy_report.COLUMNS)


def test_added_and_ratio_are_medians_within_a_round() -> None:
    rounds: list[Found] = [
        {"p50 us": pair} for pair in ((10.0, 30.0), (100.0, 110.0), (20.0, 25.0))
    ]

    (result,) = proxy_report.summarize("one", "1 connection", rounds)

    shown = {column: result[column] for column in proxy_report.COLUMNS}
    assert shown == {"base": 20.0, "daemon": 30.0, "added": 10.0, "ratio": 1.25}


def test_what_was_not_measured_is_no_miss() -> None:
    rounds: list[Found] = [{"p50 us": (40.0, 200.0)}]

    judged = proxy_report.judge(proxy_report.summarize("one", "1 connection", rounds))

    assert proxy_report.misses(judged) == [
        "one: p50 us: added is 160.00, added <= 120.00 MISSED",
        "one: p50 us: ratio is 5.00, ratio <= 4.00 MISSED",
    ]
    assert {verdict["is_met"] for verdict in judged} == {False, None}


# --- the command line


def test_two_runs_are_compared_by_ratio(tmp_path: Path) -> None:
    files = []
    for name, values in (("a", (40.0, 200.0)), ("b", (40.0, 100.0))):
        found: Found = {"p50 us": values}
        results = proxy_report.summarize("one", "1 connection", [found])
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"results": results}))

    done = run_script("--compare", *map(str, files))

    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[-4:] for row in rows] == [
        ["(base)", "40.00", "40.00", "1.00"],
        ["(daemon)", "200.00", "100.00", "0.50"],
    ]


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "nginx").write_text("#!/bin/sh\n")
    (tmp_path / "nginx").chmod(0o755)

    done = run_script("--only", "one", path=str(tmp_path))

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "proxy_overhead: apt-get install wrk\n"


def test_a_row_that_there_is_not_is_refused() -> None:
    done = run_script("--only", "one,nonsense")

    assert done.returncode == 2
    assert "no row nonsense; there are one, many," in done.stderr


# --- streams


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[int]:
    """The port of the streaming upstream."""
    port = free_port()
    with (tmp_path / "upstream.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "streams.py"), "serve", str(port)],
            env=os.environ | {"LLAMA_API_KEY": KEY},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: answers_health(port), "the upstream answers")
        yield port
    finally:
        with contextlib.suppress(OSError):
            end(process)


def job(port: int, key: str, streams: int, chunks: int) -> dict[str, object]:
    body = json.dumps({"bench": {"chunks": chunks, "delay_s": 0.001}})
    return {
        "port": port,
        "key": key,
        "path": "/v1/chat/completions",
        "body": body,
        "streams": streams,
        "spread_s": 0.1,
        "delay_s": 0.001,
        "timeout_s": 30,
    }


def test_the_load_sees_every_chunk_of_every_stream(upstream: int) -> None:
    found = run_streams(job(upstream, KEY, streams=7, chunks=40))

    assert (found["completed"], found["faults"], found["chunks"]) == (7, [], 280)
    assert 0 < found["delay p50 ms"] <= found["delay p99 ms"]
    assert found["MB/s"] > 0


@pytest.mark.parametrize("piece_bytes", [1, 7, 150, 1000])
def test_a_stream_is_read_the_same_however_it_is_cut(piece_bytes: int) -> None:
    event = b'data: {"choices":[],"t":12.5}\n\n'
    stream = STREAM_HEAD + as_chunk(event) * 3 + as_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = Reader(ours, 0.0)
        ends = []
        for at in range(0, len(stream), piece_bytes):
            theirs.sendall(stream[at : at + piece_bytes])
            ends.append(reader.receive())

    assert len(reader.delays_s) == 3
    assert ends == [False] * (len(ends) - 1) + [True]


def test_a_refused_stream_is_a_fault(upstream: int) -> None:
    found = run_streams(job(upstream, "another-key", streams=2, chunks=3))

    assert found["completed"] == 0
    assert len(found["faults"]) == 2
    assert "401" in found["faults"][0]
