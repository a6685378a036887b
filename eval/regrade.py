"""python -m eval.regrade DIR...: score the stored replies again, without asking anybody.

For when a grader has changed. It shows each question whose outcome or answer would change;
with --write the new grade is appended to the file of results, where the later record of a
question counts. Programs of HumanEval are run again only by eval.run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import journal
from eval import results, tasks
from eval.data import DataError, Problem, Source
from eval.results import Record
from eval.task import ERROR, Reply

INTERRUPTED = 130
GRADED = ("outcome", "answer", "strict", "flexible", "flexible_answer", "program_sha256")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return _regrade(args)
    except (DataError, journal.JournalError, OSError) as exc:
        print(f"eval: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\neval: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.regrade",
        description="Score the stored replies again without asking anybody, and show what changes.",
    )
    parser.add_argument("folder", type=Path, nargs="+", help="a folder of results")
    parser.add_argument("--write", action="store_true", help="keep the new grades")
    parser.add_argument("--data-dir", type=Path, help="copies of the data at hand, for humaneval")
    parser.add_argument("--json", action="store_true", help="the changes as JSON lines")
    return parser


def _regrade(args: argparse.Namespace) -> int:
    found = results.read_folders(args.folder)
    if not found:
        raise journal.JournalError(f"no results in {', '.join(map(str, args.folder))}")
    problems: list[Problem] = []
    if any(one.task == tasks.HUMANEVAL_NAME for one in found):
        problems = Source(args.data_dir).humaneval()
    for one in found:
        _regrade_file(one.path, problems, args)
    return 0


def _regrade_file(path: Path, problems: list[Problem], args: argparse.Namespace) -> None:
    contents = journal.read(path)
    task = contents.header["decides"]["task"]
    changed = changes(contents, tasks.grader(task, problems), tasks.grader_version(task))
    for record in changed:
        _show(path, contents.records[record["id"]], record, is_json=args.json)
    if args.write and changed:
        with journal.opened(path, contents.header["decides"], {}) as results_file:
            for record in changed:
                results_file.append(record)
    if not args.json:
        done = "written" if args.write else "would change (--write keeps them)"
        print(f"{path}: {len(contents.records)} replies, {len(changed)} {done}")


def changes(contents: journal.Contents, grade: tasks.Grader, version: str) -> list[Record]:
    """The records as they are graded now, those whose grade is another one."""
    changed = []
    for record in contents.records.values():
        if record["outcome"] == ERROR:
            continue
        now = grade(record["id"], Reply.of_record(record), record["gold"] or "")
        graded = {"outcome": now.outcome, "answer": now.answer, **now.more}
        if any(record.get(name) != value for name, value in graded.items()):
            changed.append(record | graded | {"grader": version})
    return changed


def _show(path: Path, then: Record, now: Record, *, is_json: bool) -> None:
    names = [name for name in GRADED if then.get(name) != now.get(name)]
    if is_json:
        told = {name: [then.get(name), now.get(name)] for name in names}
        print(json.dumps({"file": str(path), "id": now["id"], "changed": told}))
        return
    shown = ", ".join(f"{name} {then.get(name)!s:.40} -> {now.get(name)!s:.40}" for name in names)
    print(f"{now['id']}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
