"""The benchmarks by name: what each asks, and how what it stores of a reply is graded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

from eval import gsm8k, humaneval, mmlu
from eval.data import HUMANEVAL, Problem, Source
from eval.task import UNSCORED, Grade, Question, Reply, sample

HUMANEVAL_NAME = "humaneval"
HUMANEVAL_LIMIT = 164
NAMES = (mmlu.NAME, gsm8k.NAME, HUMANEVAL_NAME)
# Where a reply is read in two ways; the outcome goes by the first.
READINGS = {
    (mmlu.NAME, mmlu.CHAT): ("strict", "flexible"),
    (gsm8k.NAME, mmlu.CHAT): ("flexible", "strict"),
}

Grader = Callable[[str, Reply, str], Grade]  # of an id, what was stored, and the right answer


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark, drawn and ready to be asked."""

    name: str
    mode: str
    questions: list[Question]
    data_sha256: str
    prompt_version: str
    grader_version: str
    grade: Grader
    problems: Mapping[str, Problem] = dataclasses.field(default_factory=dict)  # HumanEval's

    @property
    def ids(self) -> list[str]:
        return [question.id for question in self.questions]

    @property
    def ids_sha256(self) -> str:
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()


def stem(name: str, mode: str) -> str:
    """What its files of results begin with: a mode of its own has files of its own."""
    return name if mode == mmlu.CHAT else f"{name}-{mode}"


STEMS = (*NAMES, stem(mmlu.NAME, mmlu.LOGPROB))


def readings(name: str, mode: str) -> tuple[str, ...]:
    return READINGS.get((name, mode), ())


def default_limit(name: str) -> int:
    limits = {mmlu.NAME: mmlu.DEFAULT_LIMIT, gsm8k.NAME: gsm8k.DEFAULT_LIMIT}
    return limits.get(name, HUMANEVAL_LIMIT)


def grader_version(name: str) -> str:
    versions = {gsm8k.NAME: gsm8k.GRADER_VERSION, mmlu.NAME: mmlu.GRADER_VERSION}
    return versions.get(name, humaneval.GRADER_VERSION)


def load(name: str, source: Source, seed: int, limit: int | None, mode: str = mmlu.CHAT) -> Task:
    """Draw the questions; `mode` matters to MMLU alone. Raises DataError."""
    if name == gsm8k.NAME:
        questions, sha256 = gsm8k.questions(source, seed, limit)
        versions = gsm8k.PROMPT_VERSION, gsm8k.GRADER_VERSION
        return Task(name, mmlu.CHAT, questions, sha256, *versions, grader(name))
    if name == mmlu.NAME:
        questions, sha256 = mmlu.questions(source, seed, limit, mode)
        is_chat = mode == mmlu.CHAT
        prompt_version = mmlu.PROMPT_VERSION if is_chat else mmlu.LOGPROB_PROMPT_VERSION
        return Task(
            name, mode, questions, sha256, prompt_version, mmlu.GRADER_VERSION, grader(name)
        )
    return _humaneval(source, seed, limit)


def _humaneval(source: Source, seed: int, limit: int | None) -> Task:
    rows = source.humaneval()
    drawn = [rows[index] for index in sample(HUMANEVAL_NAME, seed, len(rows), limit)]
    return Task(
        HUMANEVAL_NAME,
        mmlu.CHAT,
        [_asked(problem) for problem in drawn],
        HUMANEVAL.sha256,
        humaneval.PROMPT_VERSION,
        humaneval.GRADER_VERSION,
        grader(HUMANEVAL_NAME, drawn),
        {problem.task_id: problem for problem in drawn},
    )


def _asked(problem: Problem) -> Question:
    content = humaneval.prompt_of(problem)
    return Question(problem.task_id, "", messages=({"role": "user", "content": content},))


def grader(name: str, problems: list[Problem] | None = None) -> Grader:
    """HumanEval's needs the problems, the others nothing but the right answer."""
    if name == gsm8k.NAME:
        return lambda _, reply, gold: gsm8k.grade(reply, gold)
    if name == mmlu.NAME:
        return lambda _, reply, gold: mmlu.grade(reply, gold)
    by_id = {problem.task_id: problem for problem in problems or []}
    return lambda name, reply, _: _grade_program(by_id[name], reply)


def _grade_program(problem: Problem, reply: Reply) -> Grade:
    """UNSCORED where there is a program: its verdict is another file's."""
    program = program_of(problem, reply)
    if program is None:
        return Grade(reply.without_answer(), None, {"program_sha256": None})
    return Grade(UNSCORED, None, {"program_sha256": sha256_of(program)})


def program_of(problem: Problem, reply: Reply) -> str | None:
    """What is run for a reply; None if it holds no code, or was cut off inside of it."""
    fences = reply.visible.count("```")
    if reply.is_cut and (fences == 0 or fences % 2):
        return None
    return humaneval.program_of(problem, reply.text)


def sha256_of(program: str) -> str:
    return hashlib.sha256(program.encode("utf-8", "surrogatepass")).hexdigest()
