"""HumanEval's second phase: the programs of the replies are run, each once for all time.

A verdict is kept by question, program and version of what ran it, so a crash here never
asks a model again, and two models with one program share its verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench import journal
from bench.progress import Progress
from eval import execution, results, tasks
from eval.data import Problem
from eval.task import UNSCORED, Reply

KIND = {"task": "humaneval-verdicts"}


def judge(path: Path, problems: Mapping[str, Problem], *, is_json: bool = False) -> None:
    """Run each program in this file of replies that has no verdict yet. Blocks for long.

    Programs come from a model: whoever calls this has been allowed to run them. Raises
    JournalError or OSError.
    """
    records = [row for row in results.read(path).records if row["outcome"] == UNSCORED]
    if not records:
        return
    with (
        journal.opened(path.parent / results.VERDICTS, KIND, {}) as verdicts,
        Progress("humaneval programs", len(records), is_json=is_json) as progress,
    ):
        for number, record in enumerate(records, 1):
            program = tasks.program_of(problems[record["id"]], Reply.of_record(record))
            if program is None or tasks.sha256_of(program) != record["program_sha256"]:
                raise journal.JournalError(
                    f"{path}: {record['id']} was read by another grader: python -m eval.regrade"
                )
            verdicts.append(_verdict(record, program))
            progress.report(number)


def _verdict(record: results.Record, program: str) -> results.Record:
    found = execution.run_program(program)
    name = f"{record['id']}/{record['program_sha256']}/{execution.RUNNER_VERSION}"
    return {
        "id": name,
        "outcome": found.outcome,
        "measured": {"wall_s": round(found.wall_s, 3), "detail": found.detail},
    }
