#!/usr/bin/env python3
"""What the daemon adds to a request, against the targets of docs/performance.md.

    python bench/proxy_overhead.py [--quick] [--rounds N] [--only ROW,...] [--peers]
                                   [--json FILE] [--check]
    python bench/proxy_overhead.py --compare A.json B.json

Whole answers: load from wrk, nginx as the instant upstream. Streams: bench/streams.py,
which is the load and the upstream, in two processes. The daemon starts the upstream as
it starts llama-server, and direct requests go to that same process by turns with those
through the daemon, so every ratio is within one run. All rows are measured once in each
round; the numbers are medians over the rounds.

Load, daemon and upstream share the cores: compare numbers of one machine only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench import peers, proxy_report  # noqa: E402
from bench.parts import BenchError, missing_programs  # noqa: E402
from bench.rows import QUICK, ROWS, Bench, Found, Row, Settings  # noqa: E402

DEFAULT_JSON = ROOT / ".cache" / "bench" / "proxy_overhead.json"


def measure(bench: Bench, rows: Mapping[str, Row]) -> list[proxy_report.Result]:
    """Every row in every round."""
    found: dict[str, list[Found]] = {name: [] for name in rows}
    for number in range(bench.settings.rounds):
        bench.round = number
        for name, row in rows.items():
            begun = time.monotonic()
            found[name].append(row.measure(bench))
            took = f"{time.monotonic() - begun:.1f} s"
            print(
                f"round {number + 1}/{bench.settings.rounds}: {row.title}: {took}", file=sys.stderr
            )
    return [
        result
        for name, row in rows.items()
        for result in proxy_report.summarize(name, row.title, found[name])
    ]


def run(options: argparse.Namespace, settings: Settings) -> list[proxy_report.Result]:
    rows = {name: ROWS[name] for name in options.only}
    with (
        tempfile.TemporaryDirectory(prefix="proxy-overhead-") as folder,
        contextlib.ExitStack() as stack,
    ):
        bench = Bench(options.daemon, settings, Path(folder), stack)
        if options.peers:
            rows |= peers.rows(bench, stack)
        return measure(bench, rows)


def compare(files: Sequence[Path]) -> int:
    first, second = (json.loads(file.read_text()) for file in files)
    print(proxy_report.comparison(first, second))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round: does it work?")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 5, or 1 if quick")
    parser.add_argument("--only", metavar="ROW,...", default=",".join(ROWS), help="of %(default)s")
    parser.add_argument(
        "--peers", action="store_true", help="llama-server's router and LiteLLM too"
    )
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"))
    script = ROOT / "llama_sidecar.py"
    parser.add_argument("--daemon", type=Path, default=script, metavar="FILE", help=".py or not")
    options = parser.parse_args(argv)
    options.only = [name for name in options.only.split(",") if name]
    if unknown := sorted(set(options.only) - set(ROWS)):
        parser.error(f"--only: no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds takes whole numbers from 1")
    return options


def main(argv: Sequence[str]) -> int:
    """0; 1 if the run broke off or a target is missed; 2 if something is not installed."""
    options = parse(argv)
    if options.compare:
        return compare(options.compare)
    if packages := missing_programs():
        print(f"proxy_overhead: apt-get install {' '.join(packages)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every `finally`
    settings = QUICK if options.quick else Settings()
    if options.rounds:
        settings = dataclasses.replace(settings, rounds=options.rounds)
    begun = time.monotonic()
    about = proxy_report.circumstances(options.daemon)
    try:
        results = run(options, settings)
    except BenchError as exc:
        print(f"proxy_overhead: {exc}", file=sys.stderr)
        return 1
    judged = proxy_report.judge(results)
    about |= {"settings": dataclasses.asdict(settings), "is_quick": options.quick}
    about["took_s"] = round(time.monotonic() - begun, 1)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "results": results, "targets": judged}, indent=1)
    options.json.write_text(text + "\n")
    print(proxy_report.table(results, judged))
    missed = proxy_report.misses(judged)
    if options.check:
        print("\n".join(["", f"{len(missed)} targets missed", *missed]))
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
