"""python -m eval.run: ask a benchmark's questions, one after another, and score the replies.

What was answered is on the disk before the next question is asked, so a run that is
killed goes on where it was: the same command again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import platform
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from bench import journal
from bench.progress import Progress
from eval import contestant as contestants
from eval import mmlu, options, results, runs, tasks, verdicts
from eval.client import Answer, AskError, Client, greedy
from eval.contestant import Contestant
from eval.data import DataError, Source
from eval.results import Record, Summary
from eval.runs import ServerDown, Tried
from eval.task import CORRECT, ERROR, UNSCORED, Question, Reply
from eval.tasks import Task

DEFAULT_OUT = Path("eval-results")
MAX_TOKENS = 2048
MAX_TOKENS_THINKING = 8192
POLL_S = 0.5  # Windows delivers Ctrl-C only between waits
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Settings(options.Asking):
    source: Source
    max_tokens: int
    parallel: int
    allows_code: bool


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        chosen = contestants.chosen(args)
        settings = _settings(args)
        settings.client()
    except ValueError as exc:
        parser.error(str(exc))
    try:
        loaded = [
            tasks.load(name, settings.source, args.seed, _limit(args, name), args.mode)
            for name in args.task
        ]
        return _run_all(loaded, chosen, settings)
    except DataError as exc:
        print(f"eval: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\neval: interrupted; every answer so far is in {settings.out}, and the same command "
            "goes on with it",
            file=sys.stderr,
        )
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description="Ask a model the questions of a benchmark and score its replies. "
        "The same command again goes on where it was interrupted.",
    )
    parser.add_argument(
        "--task",
        type=_task_names,
        required=True,
        metavar="TASK",
        help=f"{', '.join(tasks.NAMES)}, or several with commas",
    )
    contestants.add_arguments(parser)
    where = options.add_where(parser, DEFAULT_OUT)
    where.add_argument(
        "--data-dir", type=Path, help="copies of the data at hand; without it they are downloaded"
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--limit",
        type=_count_or_all,
        help="questions a task, or all (mmlu 100, gsm8k 50, humaneval 164)",
    )
    what.add_argument("--seed", type=int, default=1, help="another one draws others (%(default)s)")
    what.add_argument(
        "--mode",
        choices=mmlu.MODES,
        default=mmlu.CHAT,
        help="for mmlu: logprob asks for the likeliest letter after five examples",
    )
    options.add_thinking(what)
    what.add_argument(
        "--max-tokens",
        type=options.from_1,
        help=f"budget of a reply, thoughts included "
        f"({MAX_TOKENS}; {MAX_TOKENS_THINKING} with --thinking on)",
    )
    what.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="for humaneval: run the programs that the model wrote, on this machine",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--parallel",
        type=options.from_1,
        default=1,
        metavar="N",
        help="requests at once; more than 1 may change answers from run to run",
    )
    options.add_how(how, "scores")
    return parser


def _task_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in tasks.NAMES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(tasks.NAMES)}")
    return list(dict.fromkeys(names))


def _count_or_all(text: str) -> int | str:
    return "all" if text == "all" else options.from_1(text)


def _limit(args: argparse.Namespace, name: str) -> int | None:
    if args.limit == "all":
        return None
    return int(args.limit or tasks.default_limit(name))


def _settings(args: argparse.Namespace) -> Settings:
    """Raises ValueError, in words for the user."""
    usual = MAX_TOKENS_THINKING if args.thinking == "on" else MAX_TOKENS
    return Settings(
        **options.asking(args),
        source=Source(args.data_dir),
        max_tokens=args.max_tokens or usual,
        parallel=args.parallel,
        allows_code=args.allow_code_execution,
    )


def _run_all(loaded: list[Task], chosen: list[Contestant], settings: Settings) -> int:
    """One contestant after another, so that each model is loaded once."""
    found: list[Summary] = []
    is_failed = False
    for contestant in chosen:
        for task in loaded:
            try:
                found.append(_run(task, contestant, settings))
            except (ServerDown, AskError, journal.JournalError, OSError) as exc:
                print(f"eval: {task.name}, {contestant}: {exc}", file=sys.stderr)
                is_failed = True
    _show(found, settings)
    return 1 if is_failed or any(one.outcomes[ERROR] for one in found) else 0


def _run(task: Task, contestant: Contestant, settings: Settings) -> Summary:
    """Ask what is not yet answered, run what is not yet run."""
    path = results.file_of(settings.out, task.name, contestant, task.mode)
    with runs.gone_on_with(
        path,
        _decides(task, contestant, settings),
        _about(task, settings),
        settings,
        is_left=lambda records: bool(_left(records, task)),
        server=lambda: _server(task, contestant, settings),
    ) as results_file:
        _ask_all(results_file, task, contestant, settings)
    if task.problems and settings.allows_code:
        verdicts.judge(path, task.problems, is_json=settings.is_json)
    return results.summary(results.read(path))


def _decides(task: Task, contestant: Contestant, settings: Settings) -> Record:
    """All that can change an answer, and so what a run may not be gone on with otherwise."""
    return {
        "task": task.name,
        "mode": task.mode,
        "contestant": contestant.decides(),
        "ids_sha256": task.ids_sha256,
        "data_sha256": task.data_sha256,
        "prompt_version": task.prompt_version,
        "seed": settings.seed,
        "sampling": _body_of_all(task, settings),
        "thinking": settings.thinking or "as the model does",
        "parallel": settings.parallel,
    }


def _about(task: Task, settings: Settings) -> Record:
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base_url": settings.base_url,
        "is_reproducible": settings.parallel == 1,
        "grader_version": task.grader_version,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "server": {},
        "ids": task.ids,
    }


def _body_of_all(task: Task, settings: Settings) -> Record:
    """What the body of every question holds beside the question."""
    if task.mode == mmlu.LOGPROB:
        count = mmlu.CANDIDATES  # llama-server takes either name, others know only OpenAI's
        return greedy(1, settings.seed) | {"logprobs": count, "n_probs": count}
    thinking = {"enable_thinking": settings.thinking == "on"}
    kwargs = {"chat_template_kwargs": thinking} if settings.thinking else {}
    return greedy(settings.max_tokens, settings.seed) | kwargs


def _left(records: Mapping[str, Record], task: Task) -> list[Question]:
    done = {name for name, record in records.items() if record["outcome"] != ERROR}
    return [question for question in task.questions if question.id not in done]


def _server(task: Task, contestant: Contestant, settings: Settings) -> Record:
    """Who will answer: learned by a first request, which loads the model too."""
    hello = Question("", "", ({"role": "user", "content": "Hello"},), "Hello")
    with settings.client() as client:
        first = _asked(client, task, contestant, settings, hello, one_token=True)
        return runs.described(client, first)


# --- questions


def _ask_all(
    results_file: journal.Journal, task: Task, contestant: Contestant, settings: Settings
) -> None:
    """Ask what is left; each record is on the disk before the next question goes out."""
    left = _left(results_file.records, task)
    total = len(task.questions)
    with (
        Progress(
            f"{task.name} {contestant}", total, total - len(left), is_json=settings.is_json
        ) as progress,
        _Askers(task, contestant, settings) as askers,
    ):
        errors = 0
        for question, answer in askers.answers(left):
            record = _record(task, question, answer, results_file)
            results_file.append(record)
            _report(progress, results_file, total)
            errors = runs.errors_in_a_row(errors, record)


class _Askers:
    """Threads that ask, `parallel` questions at once; leaving cuts them off."""

    def __init__(self, task: Task, contestant: Contestant, settings: Settings) -> None:
        self._ask_one = functools.partial(_tried, task, contestant, settings)
        self._clients = [settings.client() for _ in range(settings.parallel)]
        self._stopping = threading.Event()
        self._threads = ThreadPoolExecutor(settings.parallel)

    def __enter__(self) -> _Askers:
        return self

    def __exit__(self, *args: object) -> None:
        self._stopping.set()
        for client in self._clients:
            client.abort()
        self._threads.shutdown(cancel_futures=True)
        for client in self._clients:
            client.close()

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Tried]]:
        """As they come. The next question goes out when the caller comes back for more."""
        left, free = deque(questions), list(self._clients)
        running: dict[Future[Tried], tuple[Question, Client]] = {}
        while left or running:
            while left and free:
                question, client = left.popleft(), free.pop()
                future = self._threads.submit(self._ask_one, self._stopping, client, question)
                running[future] = question, client
            done, _ = wait(running, POLL_S, FIRST_COMPLETED)
            for future in done:
                question, client = running.pop(future)
                yield question, future.result()
                free.append(client)


def _tried(
    task: Task,
    contestant: Contestant,
    settings: Settings,
    stopping: threading.Event,
    client: Client,
    question: Question,
) -> Tried:
    """Raises AskError where no question will be answered."""
    ask = functools.partial(_asked, client, task, contestant, settings, question)
    return runs.tried(ask, settings.tries, stopping.wait)


def _asked(
    client: Client,
    task: Task,
    contestant: Contestant,
    settings: Settings,
    question: Question,
    *,
    one_token: bool = False,
) -> Answer:
    body: Record = {"model": contestant.model} | _body_of_all(task, settings)
    if one_token:
        body["max_tokens"] = 1
    if task.mode == mmlu.LOGPROB:
        return client.complete(body | {"prompt": question.prompt}, contestant.agent_flags)
    return client.chat(body | {"messages": list(question.messages)}, contestant.agent_flags)


def _record(
    task: Task,
    question: Question,
    answered: Tried,
    results_file: journal.Journal,
) -> Record:
    before = results_file.records.get(question.id, {}).get("attempts", 0)
    attempts = before + answered.attempts
    answer = answered.answer
    if isinstance(answer, AskError):
        return {"id": question.id, "outcome": ERROR, "error": str(answer), "attempts": attempts}
    grade = task.grade(question.id, Reply.of_answer(answer), question.gold)
    tokens = {"tokens": [list(pair) for pair in answer.tokens]} if answer.tokens else {}
    return {
        "id": question.id,
        "outcome": grade.outcome,
        "answer": grade.answer,
        "gold": question.gold or None,
        **grade.more,
        "reply": answer.reply,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        **tokens,
        "prompt_sha256": _prompt_sha256(question),
        "grader": task.grader_version,
        "attempts": attempts,
        "measured": answer.measured,
    }


def _prompt_sha256(question: Question) -> str:
    said: dict[str, Any] = {"messages": list(question.messages), "prompt": question.prompt}
    return journal.run_key(said)


# --- what is shown


def _report(progress: Progress, results_file: journal.Journal, total: int) -> None:
    outcomes = [record["outcome"] for record in results_file.records.values()]
    errors = outcomes.count(ERROR)
    scored = len(outcomes) - errors - outcomes.count(UNSCORED)
    correct = outcomes.count(CORRECT)
    said = f"{correct}/{scored} right" if scored else ""
    if errors:
        said = f"{said}, {errors} errors".lstrip(", ")
    done = len(outcomes) - errors
    progress.report(done, said, correct=correct, scored=scored, errors=errors)


def _show(found: Sequence[Summary], settings: Settings) -> None:
    if settings.is_json:
        print(json.dumps({"results": [one.as_json() for one in found]}))
        return
    for one in found:
        print(f"{one.task}  {one.contestant}: {results.sentence(one)}")
        if one.unscored and not settings.allows_code:
            print("  programs are run only with --allow-code-execution; replies are kept")
        if one.outcomes[ERROR]:
            print(f"  {one.outcomes[ERROR]} without an answer: the same command asks them again")


if __name__ == "__main__":
    sys.exit(main())
