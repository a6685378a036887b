"""The command line of a benchmark: what is asked, stored, scored, refused and gone on with."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import journal
from bench.parts import free_port
from eval import regrade, results, run, runs
from eval.contestant import Contestant
from tests import real_parts
from tests.daemon import ROOT, bare_environment, settings_of, started_daemon, wait_until
from tests.eval_parts import (
    DATA,
    CountingProxy,
    Replying,
    Said,
    chat,
    needs_data,
    question_of,
    small_data,
    without_times,
)
from tests.llama_server import started_server


def text_of(body: dict[str, Any]) -> str:
    return question_of(json.dumps(body).encode())


def sum_of(body: dict[str, Any]) -> int:
    """The right answer to `What is N and N?`."""
    words = text_of(body).rpartition("What is ")[2]
    return 2 * int(words.split()[0])


def right(body: dict[str, Any]) -> Said:
    return chat(f"#### {sum_of(body)}")


class Bench:
    """One folder of data and one of results."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = small_data(folder / "data", monkeypatch)
        self.out = folder / "out"
        monkeypatch.setattr(runs, "RETRY_PAUSE_S", 0.001)

    def main(self, server: Replying, *words: str, task: str = "gsm8k", model: str = "m") -> int:
        fixed = ["--task", task, "--base-url", server.url, "--data-dir", str(self.data)]
        named = ["--model", model] if model else []
        return run.main([*fixed, *named, "--out", str(self.out), *words])

    def file(
        self, task: str = "gsm8k", contestant: Contestant | None = None, mode: str = "chat"
    ) -> Path:
        return results.file_of(self.out, task, contestant or Contestant("m"), mode)

    def records(self, task: str = "gsm8k") -> dict[str, dict[str, Any]]:
        return journal.read(self.file(task)).records

    def outcomes(self, task: str = "gsm8k") -> list[str]:
        return [record["outcome"] for record in results.read(self.file(task)).records]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_every_outcome_is_stored_and_counted_apart(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {
        0: chat("#### 0"),
        2: chat("#### 3"),
        4: chat("no idea"),
        6: chat("16 and", "length"),
        8: chat(""),
        10: chat("", reasoning_content="#### 10"),
        12: chat("<think>#### 12", "length"),
        14: (400, {"error": {"message": "too long for me"}}),
    }
    with Replying(lambda body: said[sum_of(body)]).running() as server:
        code = bench.main(server, "--json")
    assert code == 1
    wanted = ["correct", "wrong", "no_answer", "truncated", "empty", "empty", "truncated", "error"]
    assert bench.outcomes() == wanted
    (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (told["correct"], told["scored"], told["questions"]) == (1, 7, 8)
    assert told["outcomes"] == {name: wanted.count(name) for name in told["outcomes"]}
    assert told["extra"] == {"strict": 1, "flexible": 1}
    assert told["low"] < 1 / 7 < told["high"]
    record = bench.records()["gsm8k/5"]
    assert (record["reasoning"], record["gold"], record["attempts"]) == ("#### 10", "10", 1)
    assert bench.records()["gsm8k/7"]["error"].endswith("too long for me")


def test_an_error_is_tried_again_and_asked_again_by_the_next_run(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replying(right).running() as server:
        broken = (500, {"error": {"message": "out of order"}})
        server.reply = lambda body: broken if sum_of(body) == 6 else right(body)
        assert bench.main(server) == 1
        assert "7/7 = 100.0 %" in capsys.readouterr().out
        assert [sum_of(body) for body in server.bodies].count(6) == 3
        del server.bodies[:]
        server.reply = right
        assert bench.main(server) == 0
        assert [sum_of(body) for body in server.bodies] == [6]
        assert bench.records()["gsm8k/3"]["attempts"] == 4
        assert "8/8 = 100.0 %" in capsys.readouterr().out
        assert bench.main(server) == 0
        assert len(server.bodies) == 1


def test_an_error_that_passes_is_no_error(bench: Bench) -> None:
    fails = iter([True, True])
    with Replying(
        lambda body: (502, {}) if next(fails, False) else right(body)
    ).running() as server:
        assert bench.main(server) == 0
    assert bench.records()["gsm8k/0"]["attempts"] == 3
    assert bench.outcomes() == ["correct"] * 8


def test_a_server_that_is_down_ends_the_run_soon(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replying(lambda body: (500, {"error": {"message": "boom"}})).running() as server:
        assert bench.main(server, "--tries", "1") == 1
        assert len(server.bodies) == runs.MAX_ERRORS_IN_A_ROW
    told = capsys.readouterr().err
    assert "5 errors in a row" in told
    assert "boom" in told
    assert bench.outcomes() == ["error"] * 5


def test_one_contestant_who_is_refused_does_not_keep_the_next_from_being_asked(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = (404, {"error": {"message": "no model", "code": "model_not_found"}})
    with Replying(
        lambda body: refusal if body["model"] == "gone" else right(body)
    ).running() as server:
        assert bench.main(server, "--models", "gone,here", model="") == 1
        assert [body["model"] for body in server.bodies] == ["gone"] + ["here"] * 8
    assert "gone: POST /v1/chat/completions: 404" in capsys.readouterr().err
    assert bench.file(contestant=Contestant("here")).exists()


def test_other_settings_are_not_mixed_into_a_run(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replying(right).running() as server:
        assert bench.main(server, "--limit", "4") == 0
        before = bench.file().read_bytes()
        server.reply = lambda body: (500, {})
        assert bench.main(server, "--limit", "4", "--seed", "9") == 1
        server.reply = right
        assert "seed: 1, now 9" in capsys.readouterr().err
        assert bench.file().read_bytes() == before
        assert bench.main(server, "--limit", "4", "--seed", "9", "--new-run") == 0
    assert bench.file().with_suffix(".1.jsonl").read_bytes() == before
    (only,) = results.read_folders([bench.out])
    assert only.header["decides"]["seed"] == 9


def test_the_two_modes_of_mmlu_have_a_file_each(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replying(letter_b).running() as server:
        assert bench.main(server, task="mmlu") == 0
        assert bench.main(server, "--mode", "logprob", task="mmlu") == 0
        assert bench.main(server, task="mmlu") == 0
    assert len(server.bodies) == 12, "a mode that was asked is not asked again"
    names = {path.name for path in bench.out.glob("*.jsonl")}
    slug = Contestant("m").slug
    assert names == {f"mmlu.{slug}.jsonl", f"mmlu-logprob.{slug}.jsonl"}
    logprob, chat = results.read_folders([bench.out])
    assert (chat.mode, logprob.mode) == ("chat", "logprob")
    assert {*results.summary(chat).extra} == {"strict", "flexible"}
    assert results.summary(logprob).extra == {}
    capsys.readouterr()
    assert regrade.main([str(bench.out)]) == 0
    assert capsys.readouterr().out.count("6 replies, 0 would change") == 2


def test_a_file_of_the_other_mode_is_not_gone_on_with(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both modes once had files of one name."""
    with Replying(letter_b).running() as server:
        assert bench.main(server, "--mode", "logprob", task="mmlu") == 0
        bench.file("mmlu", mode="logprob").rename(bench.file("mmlu"))
        del server.bodies[:]
        assert bench.main(server, task="mmlu") == 1
        assert server.bodies == []
    assert 'mode: "logprob", now "chat"' in capsys.readouterr().err
    (only,) = results.read_folders([bench.out])
    assert only.mode == "logprob", "an old file is read as what it is"


def letter_b(body: dict[str, Any]) -> Said:
    """ "B. x" in a chat; the likeliest token where candidates are asked for."""
    if "messages" in body:
        return chat("B. x")
    top = [{"token": " B", "logprob": -0.1}, {"token": " A", "logprob": -2.0}]
    choice = {
        "text": " B",
        "finish_reason": "length",
        "logprobs": {"content": [top[0] | {"top_logprobs": top}]},
    }
    return 200, {"choices": [choice], "usage": {}, "system_fingerprint": "fake-1"}


def test_another_build_of_the_server_is_not_mixed_into_a_run(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    broken: Said = (500, {})
    with Replying(lambda body: broken if sum_of(body) else right(body)).running() as server:
        assert bench.main(server, "--tries", "1", "--limit", "all") == 1
    text = bench.file().read_text()
    assert '"build":"fake-1"' in text
    bench.file().write_text(text.replace("fake-1", "fake-0"))
    with Replying(right).running() as server:
        capsys.readouterr()
        address = text.partition('"base_url":"')[2].partition('"')[0]
        assert address
        assert bench.main(server) == 1
        assert "build fake-0, now fake-1" in capsys.readouterr().err
        assert server.bodies == []
        assert bench.main(server, "--new-run") == 0


def test_what_is_sent_says_how_to_think_and_nothing_of_stops(bench: Bench) -> None:
    with Replying(right).running() as server:
        bench.main(server, "--limit", "1", model="plain")
        bench.main(server, "--limit", "1", "--thinking", "on", model="on")
        bench.main(server, "--limit", "1", "--thinking", "off", "--max-tokens", "5", model="off")
    plain, on, off = server.bodies
    expected = {"temperature": 0, "seed": 1, "cache_prompt": False, "max_tokens": 2048}
    assert {name: plain[name] for name in expected} == expected
    assert set(plain) == {*expected, "model", "messages"}
    assert on["chat_template_kwargs"] == {"enable_thinking": True}
    assert on["max_tokens"] == 8192
    assert off["chat_template_kwargs"] == {"enable_thinking": False}
    assert off["max_tokens"] == 5


def test_several_at_once_are_all_stored_and_the_run_is_marked(bench: Bench) -> None:
    together = threading.Barrier(4, timeout=60)

    def reply(body: dict[str, Any]) -> Said:
        together.wait()
        return right(body)

    with Replying(reply).running() as server:
        assert bench.main(server, "--parallel", "4") == 0
    header = journal.read(bench.file()).header
    assert header["decides"]["parallel"] == 4
    assert header["about"]["is_reproducible"] is False
    assert bench.outcomes() == ["correct"] * 8


def test_one_at_a_time_means_that_nothing_is_asked_before_the_last_is_on_the_disk(
    bench: Bench,
) -> None:
    stored: list[int] = []

    def reply(body: dict[str, Any]) -> Said:
        stored.append(len(bench.records()))
        return right(body)

    with Replying(reply).running() as server:
        assert bench.main(server) == 0
    assert stored == list(range(8))


def test_a_file_that_was_torn_anywhere_becomes_the_whole_one(
    bench: Bench,
) -> None:
    with Replying(right).running() as server:
        assert bench.main(server) == 0
        whole = bench.file().read_bytes()
        dice = random.Random(5)
        for _ in range(20):
            end = dice.randrange(len(whole))
            bench.file().write_bytes(whole[:end])
            del server.bodies[:]
            assert bench.main(server) == 0
            kept = max(0, whole[:end].count(b"\n") - 1)
            assert len(server.bodies) == 8 - kept
            assert without_times(bench.file().read_bytes()) == without_times(whole)


# --- HumanEval


def plus(body: dict[str, Any]) -> Said:
    """Right but for number 2; nothing for number 3."""
    number = int(text_of(body).partition("def plus")[2].partition("(")[0])
    if number == 3:
        return chat("I would rather not.")
    added = 7 if number == 2 else number
    return chat(f"```python\ndef plus{number}(x):\n    return x + {added}\n```")


def test_programs_are_run_only_when_that_is_allowed_and_nobody_is_asked_again(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replying(plus).running() as server:
        assert bench.main(server, task="humaneval") == 0
        assert "--allow-code-execution" in capsys.readouterr().out
        assert bench.outcomes("humaneval") == ["unscored"] * 3 + ["no_answer"]
        assert not (bench.out / results.VERDICTS).exists()
        assert bench.main(server, "--allow-code-execution", task="humaneval") == 0
        assert len(server.bodies) == 4
        assert "2/4 = 50.0 %" in capsys.readouterr().out
    assert bench.outcomes("humaneval") == ["correct", "correct", "wrong", "no_answer"]
    verdicts = journal.read(bench.out / results.VERDICTS).records
    assert [row["outcome"] for row in verdicts.values()] == ["passed", "passed", "failed"]
    before = (bench.out / results.VERDICTS).read_bytes()
    with Replying(plus).running() as server:
        bench.main(server, "--allow-code-execution", task="humaneval")
    assert (bench.out / results.VERDICTS).read_bytes() == before  # nothing is run twice


def test_a_program_that_was_cut_off_is_truncated(bench: Bench) -> None:
    cut = chat("```python\ndef plus0(x):\n    return x", "length")
    with Replying(lambda body: cut).running() as server:
        bench.main(server, "--limit", "1", "--allow-code-execution", task="humaneval")
    assert bench.outcomes("humaneval") == ["truncated"]


# --- regrade


def test_stored_replies_are_graded_again_without_asking(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replying(right).running() as server:
        bench.main(server)
    text = bench.file().read_text()
    older = text.replace('"outcome":"correct","answer":"6"', '"outcome":"wrong","answer":"5"')
    assert older != text
    bench.file().write_text(older)
    capsys.readouterr()
    assert regrade.main([str(bench.out)]) == 0
    told = capsys.readouterr().out
    assert "gsm8k/3: outcome wrong -> correct, answer 5 -> 6" in told
    assert "8 replies, 1 would change" in told
    assert bench.file().read_text() == older
    assert regrade.main([str(bench.out), "--write"]) == 0
    assert bench.outcomes() == ["correct"] * 8
    capsys.readouterr()
    assert regrade.main([str(bench.out), "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_old_replies_to_mmlu_are_read_flexibly_too_and_stay_what_they_were_strictly(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["Answer: A", "B. x", "The answer is C.", "A. w\nB. x\nC. y", "(B) x", "no idea"])
    with Replying(lambda body: chat(next(said))).running() as server:
        assert bench.main(server, task="mmlu") == 0
    told = capsys.readouterr().out
    assert "no_answer 5, strict 1/6, flexible 4/6" in told
    new = ("strict", "flexible", "flexible_answer")
    lines = [json.loads(line) for line in bench.file("mmlu").read_bytes().splitlines()]
    whole = {record["id"]: record for record in lines[1:]}
    assert [record["flexible_answer"] for record in whole.values()] == [
        "A",
        "B",
        "C",
        None,
        "B",
        None,
    ]
    older = [
        {key: it for key, it in line.items() if key not in new}
        | ({"grader": "mmlu-1"} if "id" in line else {})
        for line in lines
    ]
    bench.file("mmlu").write_bytes(b"".join(map(journal.as_line, older)))
    before = [(record["outcome"], record["answer"]) for record in older[1:]]
    assert regrade.main([str(bench.out)]) == 0
    told = capsys.readouterr().out
    changed = "strict None -> False, flexible None -> True, flexible_answer None -> B"
    assert f"mmlu/art/1: {changed}" in told
    assert "6 replies, 6 would change" in told
    assert regrade.main([str(bench.out), "--write"]) == 0
    now = bench.records("mmlu")
    assert [(record["outcome"], record["answer"]) for record in now.values()] == before
    assert now == whole


def test_a_program_that_is_found_otherwise_is_run_anew(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replying(plus).running() as server:
        bench.main(server, "--allow-code-execution", task="humaneval")
        path = bench.file("humaneval")
        sha256 = bench.records("humaneval")["HumanEval/0"]["program_sha256"]
        path.write_text(path.read_text().replace(sha256, "0" * 64))
        assert bench.main(server, "--allow-code-execution", task="humaneval") == 1
        assert "python -m eval.regrade" in capsys.readouterr().err
        assert regrade.main([str(bench.out), "--write", "--data-dir", str(bench.data)]) == 0
        assert bench.main(server, "--allow-code-execution", task="humaneval") == 0
        assert len(server.bodies) == 4
    assert bench.outcomes("humaneval") == ["correct", "correct", "wrong", "no_answer"]


def test_a_folder_without_results_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regrade.main([str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err


# --- the command line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--task"),
        (["--task", "chess", "--model", "m"], "'chess' is none of"),
        (["--task", "gsm8k"], "nobody to ask"),
        (["--task", "gsm8k", "--model", "m", "--limit", "0"], "'0' is not a whole number"),
        (["--task", "gsm8k", "--model", "m", "--base-url", "x"], "'x' is no address"),
        (["--task", "gsm8k", "--model", "m", "--api-key-env", "NOT_SET"], "NOT_SET"),
        (["--task", "gsm8k", "--models", "m,m"], "named twice: m"),
        (["--task", "gsm8k", "--model", "mö"], "must be ASCII"),
        (["--task", "gsm8k", "--contestant", " "], "is empty"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_a_key_is_sent_and_stored_nowhere(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "geheim")
    with Replying(right).running() as server:
        assert bench.main(server, "--api-key-env", "SOME_KEY") == 0
    assert "geheim" not in bench.file().read_text()


# --- with the real llama-server


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [real_parts.llama_server_bin(), "-m", real_parts.tiny(), "--port", port]
    texts = [str(word) for word in [*command, "-c", 8192, "-np", 1, "-t", 1]]
    with started_server(texts, port, folder / "log", bare_environment()):
        yield port


@pytest.mark.integration
@needs_data
def test_the_likeliest_letters_come_from_the_real_server(llama_server: int, tmp_path: Path) -> None:
    words = ["--task", "mmlu", "--mode", "logprob", "--model", "tiny", "--limit", "3"]
    words += ["--base-url", f"http://127.0.0.1:{llama_server}", "--data-dir", str(DATA)]
    assert run.main([*words, "--out", str(tmp_path)]) == 0
    (found,) = results.read_folders([tmp_path])
    for record in found.records:
        assert len(record["tokens"]) == 40
        assert record["measured"]["predicted_n"] == 1
    server = found.header["about"]["server"]
    assert server["model_bytes"] == real_parts.tiny().stat().st_size
    assert server["build"]


@pytest.mark.integration
@needs_data
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C goes to a whole console there")
def test_ctrl_c_ends_a_run_at_once_and_says_how_to_go_on(llama_server: int, tmp_path: Path) -> None:
    held = threading.Event()
    with CountingProxy(llama_server).running() as proxy:

        def hold_the_third(moment: str, text: str) -> None:
            if moment == "asked" and len(proxy.asked) == 4:
                held.wait(60)

        proxy.hook = hold_the_third
        words = ["--task", "gsm8k", "--model", "tiny", "--limit", "6", "--max-tokens", "5"]
        words += ["--base-url", proxy.url, "--data-dir", str(DATA), "--out", str(tmp_path)]
        command = [sys.executable, "-m", "eval.run", *words]
        process = subprocess.Popen(
            command, cwd=ROOT, env=bare_environment(), stderr=subprocess.PIPE, text=True
        )
        try:
            wait_until(lambda: len(proxy.asked) == 4, "the third question is asked", 60)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=50)
        finally:
            held.set()
            process.kill()
            process.wait()
        assert process.returncode == 130
        assert "the same command goes on" in told
        assert "Traceback" not in told
        assert run.main(words) == 0
        assert len(set(proxy.asked)) == 7
        assert len(proxy.asked) == 2 + 6 + 1  # two first requests, and the one cut off twice


@pytest.mark.integration
@needs_data
def test_two_sets_of_flags_of_one_model_are_two_contestants_with_a_process_each(
    tmp_path: Path,
) -> None:
    settings = settings_of(
        real_parts.llama_server_bin(),
        tmp_path,
        {"tiny": str(real_parts.tiny())},
        base_args=["-c", "2048", "-t", "1", "--parallel", "1"],
    )
    with started_daemon(settings, tmp_path) as daemon:
        words = ["--task", "gsm8k", "--limit", "2", "--max-tokens", "5"]
        words += ["--contestant", "tiny -ctk f16", "--contestant", "tiny --cache-type-k q8_0"]
        words += ["--base-url", f"http://127.0.0.1:{daemon.port}", "--data-dir", str(DATA)]
        assert run.main([*words, "--out", str(tmp_path / "out")]) == 0
        rows = {row["hash"]: row for row in daemon.sidecars()}
    found = results.read_folders([tmp_path / "out"])
    assert [one.contestant.agent_flags for one in found] == ["--cache-type-k q8_0", "-ctk f16"]
    hashes = [one.header["about"]["server"]["sidecar"] for one in found]
    assert len({rows[name]["pid"] for name in hashes}) == 2
    for one, name, kind in zip(found, hashes, ("q8_0", "f16"), strict=True):
        args = one.header["about"]["server"]["args"]
        assert args == rows[name]["args"]
        assert args[args.index("--cache-type-k") + 1] == kind
        assert rows[name]["requests_total"] == 3  # the first, and two questions
