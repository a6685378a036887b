"""python -m eval.ab: the same fourteen tasks for several contestants, side by side.

One contestant after another, so that each model is loaded once; every reply is on the disk
before the next question is asked, and the same command goes on where it was interrupted.
Without contestants it asks nobody and writes the report of a folder anew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bench import journal
from bench.progress import Progress
from eval import checks, comparison, judge, options, roles, runs, side_by_side, votes
from eval import contestant as contestants
from eval.client import Answer, AskError, Client, greedy
from eval.comparison import EMPTY, ERROR, OK, TRUNCATED, Comparison
from eval.contestant import Contestant
from eval.execution import run_program
from eval.judge import Pair
from eval.roles import Prompt
from eval.runs import ServerDown, Tried

DEFAULT_OUT = Path("eval-ab")
TOKENS_TO_THINK = 4096  # added to each budget with --thinking on
POLL_S = 0.5  # Windows delivers Ctrl-C only between waits
INTERRUPTED = 130
PAGE, MARKDOWN = "ab.html", "ab.md"

Record = dict[str, Any]
Seated = tuple[Pair, str]  # and which of the two is shown first
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings(options.Asking):
    more_tokens: int

    @property
    def kwargs(self) -> Record:
        thinking = {"enable_thinking": self.thinking == "on"}
        return {"chat_template_kwargs": thinking} if self.thinking else {}

    def body(self, max_tokens: int) -> Record:
        return greedy(max_tokens + self.more_tokens, self.seed) | self.kwargs

    def decides(self, task: str, contestant: Contestant) -> Record:
        """All that can change an answer, beside what is asked."""
        sampling = {name: it for name, it in self.body(0).items() if name != "max_tokens"}
        return {
            "task": task,
            "contestant": contestant.decides(),
            "seed": self.seed,
            "sampling": sampling,
            "more_tokens": self.more_tokens,
            "thinking": self.thinking or "as the model does",
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        chosen = contestants.chosen(args) if _names_somebody(args) else []
        settings = _settings(args)
        settings.client()
    except ValueError as exc:
        parser.error(str(exc))
    if not chosen and not list(settings.out.glob(f"{comparison.TASK}.*.jsonl")):
        parser.error(f"nobody to ask (--models A,B or --contestant), and nothing in {settings.out}")
    try:
        return _compared(args, chosen, settings)
    except (AskError, journal.JournalError, ValueError, OSError) as exc:
        print(f"eval.ab: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\neval.ab: interrupted; every reply so far is in {settings.out}, and the same "
            "command goes on with it",
            file=sys.stderr,
        )
        return INTERRUPTED


def _names_somebody(args: argparse.Namespace) -> bool:
    return bool(args.model or args.models or args.contestant)


def _compared(args: argparse.Namespace, chosen: list[Contestant], settings: Settings) -> int:
    prompts = roles.load(args.prompts)
    run = runner() if args.allow_code_execution else None
    failed = _ask_all(prompts, chosen, settings)
    if args.judge:
        judge_by = Contestant(args.judge, args.judge_flags.strip())
        judged = comparison.read(settings.out, prompts)
        failed += _judge(judge_by, judged, settings, judges_own=args.judge_own)
    found = comparison.read(settings.out, prompts, run)
    _write_report(found, settings)
    if args.blind_sheet:
        _write_sheet(found, settings, args.sheet_limit)
    return 1 if failed or any(side.errors for side in found.sides) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.ab",
        description="Give the same tasks to several models, or to one with several sets of "
        "flags, check the replies and show them side by side. The same command again goes on "
        "where it was interrupted; without contestants it only writes the report anew.",
    )
    contestants.add_arguments(parser)
    options.add_where(parser, DEFAULT_OUT)
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--prompts", type=Path, default=roles.PROMPTS, help="folder of prompts (eval/prompts)"
    )
    what.add_argument("--seed", type=int, default=1, help="of the sampler (%(default)s)")
    options.add_thinking(what)
    what.add_argument(
        "--more-tokens",
        type=_from_0,
        metavar="N",
        help="added to the budget of each prompt, for models that think first "
        f"(0; {TOKENS_TO_THINK} with --thinking on)",
    )
    verdicts = parser.add_argument_group("verdicts")
    verdicts.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="also make the checks that run what a model wrote, on this machine",
    )
    verdicts.add_argument(
        "--judge", metavar="ID", help="a model that compares every two replies, in both orders"
    )
    verdicts.add_argument(
        "--judge-flags", metavar="FLAGS", default="", help="llama-server flags for the judge"
    )
    verdicts.add_argument(
        "--judge-own", action="store_true", help="also show the judge pairs with its own replies"
    )
    verdicts.add_argument(
        "--blind-sheet",
        action="store_true",
        help=f"write {votes.SHEET} for a person to vote on; python -m eval.votes reads it",
    )
    verdicts.add_argument(
        "--sheet-limit",
        type=options.from_1,
        metavar="N",
        help="so many pairs at most, drawn by lot",
    )
    options.add_how(parser.add_argument_group("how"), "numbers")
    return parser


def _from_0(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _settings(args: argparse.Namespace) -> Settings:
    """Raises ValueError, in words for the user."""
    usual = TOKENS_TO_THINK if args.thinking == "on" else 0
    return Settings(
        **options.asking(args),
        more_tokens=usual if args.more_tokens is None else args.more_tokens,
    )


def runner() -> checks.Runner:
    """What a model wrote is run as HumanEval's programs are; "" if it ran through."""

    def run(program: str) -> str:
        verdict = run_program(program)
        if verdict.outcome == "passed":
            return ""
        return f"{verdict.outcome}: {verdict.detail}" if verdict.detail else verdict.outcome

    return run


# --- asking


@dataclasses.dataclass(frozen=True)
class _Asker:
    """One contestant at its server. Use it as a context: leaving cuts off what still runs."""

    contestant: Contestant
    settings: Settings
    client: Client
    thread: ThreadPoolExecutor

    @classmethod
    @contextlib.contextmanager
    def at(cls, contestant: Contestant, settings: Settings) -> Iterator[_Asker]:
        client = settings.client()
        thread = ThreadPoolExecutor(1)
        try:
            yield cls(contestant, settings, client, thread)
        finally:
            client.abort()
            thread.shutdown(cancel_futures=True)
            client.close()

    def ask(self, asked: Mapping[str, Any], max_tokens: int) -> Answer:
        """Once. Raises AskError."""
        body = {"model": self.contestant.model} | self.settings.body(max_tokens) | dict(asked)
        return self._waited_for(lambda: self.client.chat(body, self.contestant.agent_flags))

    def greeted(self) -> Record:
        """Who answers, by a first request of one token; the model is loaded with it."""
        first = self.ask({"messages": [{"role": "user", "content": "Hello"}]}, 1)
        return self._waited_for(lambda: runs.described(self.client, first))

    def tried(self, asked: Mapping[str, Any], max_tokens: int) -> Tried:
        """Raises AskError where no other question would be answered either."""
        return runs.tried(lambda: self.ask(asked, max_tokens), self.settings.tries, time.sleep)

    def _waited_for(self, call: Callable[[], T]) -> T:
        future = self.thread.submit(call)
        while True:
            with contextlib.suppress(TimeoutError):
                return future.result(POLL_S)
            if future.done():
                return future.result()


def _ask_all(prompts: list[Prompt], chosen: list[Contestant], settings: Settings) -> int:
    """Everybody, one after another; how many could not go on."""
    failed = 0
    for contestant in chosen:
        try:
            _ask_one(prompts, contestant, settings)
        except (ServerDown, AskError, journal.JournalError, OSError) as exc:
            print(f"eval.ab: {contestant}: {exc}", file=sys.stderr)
            failed += 1
    return failed


def _ask_one(prompts: list[Prompt], contestant: Contestant, settings: Settings) -> None:
    decides = settings.decides(comparison.TASK, contestant)
    decides["prompts"] = {prompt.id: prompt.sha256 for prompt in prompts}
    path = comparison.file_of(settings.out, contestant)
    with (
        _Asker.at(contestant, settings) as asker,
        _results(path, decides, asker, lambda it: bool(_left(it, prompts))) as file,
    ):
        left = _left(file.records, prompts)
        done = len(prompts) - len(left)
        with Progress(str(contestant), len(prompts), done, is_json=settings.is_json) as progress:
            errors = 0
            for number, prompt in enumerate(left, done + 1):
                tried = asker.tried(prompt.asked, prompt.max_tokens)
                before = file.records.get(_id(prompt), {}).get("attempts", 0)
                record = _record(prompt, tried.answer, before + tried.attempts)
                file.append(record)
                progress.report(number, _said(tried.answer))
                errors = runs.errors_in_a_row(errors, record)


@contextlib.contextmanager
def _results(
    path: Path,
    decides: Record,
    asker: _Asker,
    is_left: Callable[[Mapping[str, Record]], bool],
) -> Iterator[journal.Journal]:
    """The file to go on with, after a greeting if `is_left` says that somebody is asked."""
    settings = asker.settings
    about = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base_url": settings.base_url,
    }
    with runs.gone_on_with(
        path, decides, about, settings, is_left=is_left, server=asker.greeted
    ) as file:
        yield file


def _id(prompt: Prompt) -> str:
    return f"{comparison.TASK}/{prompt.id}"


def _left(records: Mapping[str, Record], prompts: Sequence[Prompt]) -> list[Prompt]:
    done = {name for name, record in records.items() if record["outcome"] != ERROR}
    return [prompt for prompt in prompts if _id(prompt) not in done]


def _record(prompt: Prompt, answer: Answer | AskError, attempts: int) -> Record:
    name = {"id": _id(prompt), "prompt_sha256": prompt.sha256, "attempts": attempts}
    if isinstance(answer, AskError):
        return name | {"outcome": ERROR, "error": str(answer), "measured": {}}
    calls = [_without_id(call) for call in answer.tool_calls]
    outcome = OK if answer.reply.strip() or calls else EMPTY
    return name | {
        "outcome": TRUNCATED if answer.finish_reason == "length" else outcome,
        "reply": answer.reply,
        "reasoning": answer.reasoning,
        "tool_calls": calls,
        "finish_reason": answer.finish_reason,
        "measured": answer.measured | {"build": answer.build},
    }


def _without_id(call: Mapping[str, Any]) -> Record:
    """A call's id is drawn by lot, and would make two equal runs differ."""
    function = call.get("function") or {}
    return {"function": {"name": function.get("name"), "arguments": function.get("arguments")}}


def _said(answer: Answer | AskError) -> str:
    if isinstance(answer, AskError):
        return "error"
    measured = answer.measured
    return f"{measured['predicted_n'] or '?'} tokens in {answer.wall_ms / 1000:.1f} s"


# --- judging


def _judge(
    judge_by: Contestant, judged: Comparison, settings: Settings, *, judges_own: bool
) -> int:
    """Show the judge every pair in both orders; 1 if it could not go on."""
    decides = settings.decides(comparison.JUDGE_TASK, judge_by)
    decides["prompt_version"] = judge.PROMPT_VERSION
    path = comparison.judge_file_of(settings.out, judge_by)
    found = judge.pairs(judged.prompts, judged.entries())
    shown = [pair for pair in found if judges_own or not judge.is_own(pair, judge_by)]
    if not shown:
        print(
            f"eval.ab: no pair is left for {judge_by}: it does not judge its own replies "
            "(--judge-own lets it)",
            file=sys.stderr,
        )
        return 1
    every = [(pair, order) for pair in shown for order in judge.ORDERS]
    try:
        with (
            _Asker.at(judge_by, settings) as asker,
            _results(path, decides, asker, lambda it: _is_asked(_unjudged(it, every))) as file,
        ):
            _judge_all(file, every, asker)
    except (ServerDown, AskError, journal.JournalError, OSError) as exc:
        print(f"eval.ab: judge {judge_by}: {exc}", file=sys.stderr)
        return 1
    return 0


def _unjudged(records: Mapping[str, Record], every: Sequence[Seated]) -> list[Seated]:
    return [
        (pair, order)
        for pair, order in every
        if not judge.is_done(records.get(pair.id(order)), pair)
    ]


def _is_asked(left: Sequence[Seated]) -> bool:
    """Equal texts are a tie without asking."""
    return any(not pair.is_same_text for pair, _ in left)


def _judge_all(file: journal.Journal, every: Sequence[Seated], asker: _Asker) -> None:
    left = _unjudged(file.records, every)
    done = len(every) - len(left)
    is_json = asker.settings.is_json
    with Progress(f"judge {asker.contestant}", len(every), done, is_json=is_json) as progress:
        errors = 0
        for number, (pair, order) in enumerate(left, done + 1):
            record = _judged(asker, pair, order)
            file.append(record)
            progress.report(number)
            errors = runs.errors_in_a_row(errors, record)


def _judged(asker: _Asker, pair: Pair, order: str) -> Record:
    name: Record = {"id": pair.id(order), "pair_sha256": pair.sha256}
    if pair.is_same_text:
        return name | {"outcome": "tie", "reply": "", "is_same_text": True, "measured": {}}
    asked = {"messages": judge.messages(pair, order)}
    tried = asker.tried(asked, judge.MAX_TOKENS)
    answer, name["attempts"] = tried.answer, tried.attempts
    if isinstance(answer, AskError):
        return name | {"outcome": ERROR, "error": str(answer), "measured": {}}
    return name | {
        "outcome": judge.verdict(answer.reply),
        "reply": answer.reply,
        "finish_reason": answer.finish_reason,
        "measured": answer.measured,
    }


# --- the report


def _write_report(found: Comparison, settings: Settings) -> None:
    html, markdown = settings.out / PAGE, settings.out / MARKDOWN
    journal.write_whole(html, side_by_side.page_of(found).encode("utf-8", "replace"))
    text = side_by_side.markdown_of(found)
    journal.write_whole(markdown, text.encode("utf-8", "replace"))
    if settings.is_json:
        print(comparison.as_json(found))
        return
    print(text)
    print(f"Side by side: {html}")


def _write_sheet(found: Comparison, settings: Settings, limit: int | None) -> None:
    """Raises BadSheet if there is one."""
    path = settings.out / votes.SHEET
    count = votes.write(path, judge.pairs(found.prompts, found.entries()), settings.seed, limit)
    line = {"sheet": str(path), "pairs": count}
    print(json.dumps(line) if settings.is_json else f"Blind sheet of {count} pairs: {path}")


if __name__ == "__main__":
    sys.exit(main())
