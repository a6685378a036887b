"""kill -9 at any moment, and the same command again: the results of an unbroken run."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import journal
from bench.parts import free_port
from eval import tasks
from eval.data import Source
from eval.results import VERDICTS
from tests import real_parts
from tests.daemon import ROOT, bare_environment
from tests.eval_parts import DATA, CountingProxy, needs_data, without_times
from tests.llama_server import started_server

pytestmark = [pytest.mark.integration, needs_data, pytest.mark.timeout(600)]

KILLS = 20
QUESTIONS = 6
SEED = 7
MOMENTS = ("asked", "answered", "relayed", "any")
# So that even a model of 2 MB gives replies with something for every grader.
GRAMMAR = (
    'root ::= "```python\\n    return " value "\\n```\\n#### " [0-9] "\\nAnswer: " [A-D]\n'
    'value ::= "True" | "False" | "0" | "[]" | "None"'
)


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [real_parts.llama_server_bin(), "-m", real_parts.tiny(), "--port", port]
    command += ["-c", 8192, "-np", 1, "-t", 1, "--grammar", GRAMMAR]
    texts = [str(word) for word in command]
    with started_server(texts, port, folder / "log", bare_environment()):
        yield port


@pytest.fixture
def proxy(llama_server: int) -> Iterator[CountingProxy]:
    with CountingProxy(llama_server).running() as running:
        yield running


class Run:
    """One `python -m eval.run` after another on one folder of results."""

    def __init__(self, task: str, proxy: CountingProxy, folder: Path) -> None:
        self.task = task
        self.proxy = proxy
        self.folder = folder

    @property
    def file(self) -> Path:
        (found,) = self.folder.glob(f"{self.task}.*.jsonl")
        return found

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "eval.run", "--task", self.task, "--model", "m"]
        command += ["--base-url", self.proxy.url, "--data-dir", str(DATA), "--out"]
        command += [str(self.folder), "--limit", str(QUESTIONS), "--seed", str(SEED)]
        command += ["--max-tokens", "60", "--allow-code-execution"]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=bare_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def to_the_end(self) -> None:
        process = self.start()
        _, told = process.communicate(timeout=500)
        assert process.returncode == 0, told.decode()

    def done(self) -> set[str]:
        """Ids of what is on the disk."""
        if not list(self.folder.glob(f"{self.task}.*.jsonl")):
            return set()
        return set(journal.read(self.file).records)

    def results(self) -> dict[str, bytes]:
        """Every file of results, without what is measured and when it began."""
        return {path.name: without_times(path.read_bytes()) for path in self.folder.glob("*.jsonl")}


class Killer:
    """Kills one process at a random moment: of a clock, or of a question's way."""

    def __init__(self, process: subprocess.Popen[bytes], dice: random.Random, run_s: float) -> None:
        self.process = process
        self.moment = dice.choice(MOMENTS)
        self.count = dice.randint(1, 3)  # questions of this process until then
        self.delay_s = dice.random() * (run_s if self.moment == "any" else 0.01)
        self._timer = threading.Timer(self.delay_s, process.kill)

    def __str__(self) -> str:
        return f"{self.moment} {self.count} +{self.delay_s:.4f} s"

    def hook(self, moment: str, text: str) -> None:
        if moment == self.moment:
            self.count -= 1
            if self.count == 0 and moment == "relayed":
                self._timer.start()  # into the writing of the record
            elif self.count == 0:
                self.process.kill()

    def wait(self) -> bool:
        """Whether it was killed, or came to its end before."""
        if self.moment == "any":
            self._timer.start()
        try:
            _, told = self.process.communicate(timeout=300)
        finally:
            self._timer.cancel()
        assert self.process.returncode in (0, -9), told.decode()
        return self.process.returncode != 0


@functools.cache
def ids_by_text(task: str) -> dict[str, str]:
    questions = tasks.load(task, Source(DATA), SEED, QUESTIONS).questions
    return {question.messages[-1]["content"]: question.id for question in questions}


@pytest.mark.parametrize("task", tasks.NAMES)
def test_a_run_that_is_killed_again_and_again_leaves_what_an_unbroken_one_does(
    task: str, proxy: CountingProxy, tmp_path: Path
) -> None:
    whole = Run(task, proxy, tmp_path / "whole")
    begun = time.monotonic()
    whole.to_the_end()
    run_s = time.monotonic() - begun
    assert task != tasks.HUMANEVAL_NAME or (whole.folder / VERDICTS).exists()
    ids = ids_by_text(task)
    assert Counter(ids[text] for text in proxy.asked if text in ids) == Counter(ids.values())
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    kills = rounds = 0
    while kills < KILLS:
        rounds += 1
        assert rounds <= KILLS + 1
        kills += killed_run(Run(task, proxy, tmp_path / str(rounds)), dice, run_s, KILLS - kills)
        assert Run(task, proxy, tmp_path / str(rounds)).results() == whole.results()


def killed_run(run: Run, dice: random.Random, run_s: float, most: int) -> int:
    """Start it until it is whole, and return how often it was killed, at most so often."""
    ids = ids_by_text(run.task)
    kills, is_whole = 0, False
    while not is_whole:
        done, asked = run.done(), len(run.proxy.asked)
        process = run.start()
        if kills == most:
            _, told = process.communicate(timeout=500)
            assert process.returncode == 0, told.decode()
            is_whole = True
        else:
            killer = Killer(process, dice, run_s)
            run.proxy.hook = killer.hook
            is_killed = killer.wait()
            run.proxy.hook = lambda moment, text: None
            print(f"{run.folder.name}: {killer}: {is_killed}, {len(done)} were done")
            kills, is_whole = kills + is_killed, not is_killed
        again = [ids[text] for text in run.proxy.asked[asked:] if text in ids]
        assert not done & set(again), "what was on the disk was asked again"
        assert len(again) == len(set(again)), "one process asked twice"
    return kills
