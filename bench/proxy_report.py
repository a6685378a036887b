"""From what the rows found to one table, one JSON text, and the targets that were met."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.parts import PATIENCE_S, ROOT, program
from bench.rows import Found

COLUMNS = ("base", "daemon", "added", "ratio")


@dataclasses.dataclass(frozen=True)
class Target:
    """What one measure should come to.

    With `where_base_is` the limit was set on a machine with that base value, and
    grows or shrinks with the base of this run.
    """

    row: str
    measure: str
    column: str
    is_at_most: bool
    limit: float
    where_base_is: float | None = None

    def limit_here(self, base: float | None) -> float:
        if self.where_base_is is None or base is None:
            return self.limit
        return self.limit * base / self.where_base_is

    def is_met(self, value: float, base: float | None) -> bool:
        limit = self.limit_here(base)
        return value <= limit if self.is_at_most else value >= limit


AT_MOST, AT_LEAST = True, False

# docs/performance.md says where each comes from.
TARGETS = (
    Target("one", "p50 us", "added", AT_MOST, 120, 40),
    Target("one", "p50 us", "ratio", AT_MOST, 4),
    Target("many", "requests/s", "ratio", AT_LEAST, 0.12),
    Target("many", "requests/s", "daemon", AT_LEAST, 9_000, 75_000),
    Target("many", "p99 us", "daemon", AT_MOST, 60_000),
    Target("close", "requests/s", "daemon", AT_LEAST, 2_500),
    Target("streams", "delay p50 ms", "added", AT_MOST, 0.15),
    Target("streams", "delay p99 ms", "added", AT_MOST, 5),
    Target("stream", "MB/s", "ratio", AT_LEAST, 0.3),
    Target("crowd", "completed", "daemon", AT_LEAST, 500),
    Target("crowd", "faults", "daemon", AT_MOST, 0),
    Target("memory", "MB after all requests", "daemon", AT_MOST, 60),
    Target("memory", "MB more than after half of them", "daemon", AT_MOST, 1),
    Target(
        "cold",
        "first byte ms, against /health by hand",
        *("added", AT_MOST, 50),
    ),
    Target("bodies", "200 kB: MB/s", "ratio", AT_LEAST, 0.5),
    Target("bodies", "20 MB: MB/s", "ratio", AT_LEAST, 0.5),
    Target("bodies", "20 MB: bodies in memory", "daemon", AT_MOST, 2.9),
    Target("start", "ms of the script", "daemon", AT_MOST, 250),
    Target("start", "ms of the frozen program", "daemon", AT_MOST, 800),
    Target("growth", "processor time us with 10 sidecars, against 1", "ratio", AT_MOST, 1.2),
    Target("growth", "processor time us with 50 sidecars, against 1", "ratio", AT_MOST, 1.2),
)

Result = dict[str, Any]  # row, title, measure, base, daemon, added, ratio, rounds


def summarize(row: str, title: str, rounds: Sequence[Found]) -> list[Result]:
    """A result for each measure of a row.

    `base` and `daemon` are medians over the rounds, `added` and `ratio` medians of
    the difference and quotient within a round.
    """
    results = []
    for measure in rounds[0]:
        found = [values[measure] for values in rounds]
        pairs = [(base, daemon) for base, daemon in found if base is not None]
        quotients = [daemon / base for base, daemon in pairs if base]
        result = {
            "row": row,
            "title": title,
            "measure": measure,
            "base": _median(base for base, _ in pairs),
            "daemon": _median(daemon for _, daemon in found),
            "added": _median(daemon - base for base, daemon in pairs),
            "ratio": _median(quotients),
            "rounds": found,
        }
        results.append(result)
    return results


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def judge(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every target with what was found; `is_met` is None where nothing was measured."""
    by_name = {(result["row"], result["measure"]): result for result in results}
    judged = []
    for target in TARGETS:
        result = by_name.get((target.row, target.measure), {})
        value, base = result.get(target.column), result.get("base")
        verdict = {
            **dataclasses.asdict(target),
            "limit_here": target.limit_here(base),
            "found": value,
            "is_met": None if value is None else target.is_met(value, base),
        }
        judged.append(verdict)
    return judged


# --- tables


def table(results: Sequence[Result], judged: Sequence[Mapping[str, Any]]) -> str:
    """The results by row, each with its targets."""
    width = max([len(result["measure"]) for result in results], default=0) + 2
    layout = "  {:<" + str(width) + "} {:>10} {:>10} {:>10} {:>7}  {}"
    lines = [layout.format("", *COLUMNS, "target")]
    title = ""
    for result in results:
        if result["title"] != title:
            title = result["title"]
            lines.append(title)
        targets = [
            target_words(verdict)
            for verdict in judged
            if (verdict["row"], verdict["measure"]) == (result["row"], result["measure"])
        ]
        numbers = [shown(result[column]) for column in COLUMNS]
        lines.append(layout.format(result["measure"], *numbers, "; ".join(targets)).rstrip())
    return "\n".join(lines)


def target_words(verdict: Mapping[str, Any]) -> str:
    sign = "<=" if verdict["is_at_most"] else ">="
    outcome = {True: "met", False: "MISSED", None: "not measured"}[verdict["is_met"]]
    return f"{verdict['column']} {sign} {shown(verdict['limit_here'])} {outcome}"


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def misses(judged: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"{verdict['row']}: {verdict['measure']}: {verdict['column']} is "
        f"{shown(verdict['found'])}, {target_words(verdict)}"
        for verdict in judged
        if verdict["is_met"] is False
    ]


def comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What the second run found over what the first did, by measure."""
    before = {(result["row"], result["measure"]): result for result in first["results"]}
    lines = [f"{'':<74} {'A':>10} {'B':>10} {'B/A':>6}"]
    for result in second["results"]:
        earlier = before.get((result["row"], result["measure"]))
        for column in ("base", "daemon"):
            old, new = (earlier or {}).get(column), result[column]
            if old is not None and new is not None:
                name = f"{result['row']}: {result['measure']} ({column})"
                ratio = f"{new / old:.2f}" if old else "-"
                lines.append(f"{name:<74} {shown(old):>10} {shown(new):>10} {ratio:>6}")
    return "\n".join(lines)


# --- circumstances


def circumstances(daemon: Path) -> dict[str, object]:
    """The machine, the versions, the commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "load": Path("/proc/loadavg").read_text().split()[:3],
        },
        "versions": {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "wrk": version("wrk", "-v", r"wrk \S*?([0-9][\w.+-]*)"),
            "nginx": version("nginx", "-v", r"nginx/([0-9.]+)"),
        },
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "daemon": str(daemon),
    }


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def version(name: str, option: str, pattern: str) -> str:
    """What the program says of itself, on either output and with any exit code."""
    command = [program(name) or name, option]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        if match := re.search(pattern, done.stdout + done.stderr):
            return match[1]
    return "unknown"


def git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
        return done.stdout.strip()
    return "unknown"
