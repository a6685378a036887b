"""The sweep: its order, what it refuses to call a measurement, and being killed at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import journal, machine, mtp_sweep, prompts
from bench.plan import Model
from tests import real_parts
from tests.daemon import ROOT, is_alive, wait_until

MEASURED = ("load_ms", "rss_bytes", "vram_bytes", "prompt_ms", "predicted_ms", "wall_ms")
NUMBER_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()

# Started as llama-server is; its "model" is a JSON file that says how it misbehaves.
DOUBLE = """\
#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

words = sys.argv[1:]
model = Path(words[words.index("--model") + 1])
how = json.loads(model.read_text())
speculates = "--spec-type" in words
if "dies" in how:
    print(how["dies"], file=sys.stderr)
    sys.exit(3)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{
            "/health": {{"status": "ok"}},
            "/slots": [{{"speculative": how.get("slots", speculates)}}],
            "/props": {{
                "default_generation_settings": {{"n_ctx": 4096}},
                "build_info": how.get("build", "b1-test"),
            }},
        }}[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/apply-template":
            return self.answer({{"prompt": body["messages"][0]["content"]}})
        with open(f"{{model}}.asked", "a") as file:
            file.write(json.dumps(body) + "\\n")
        fault = how.get("at", {{}}).get(body["prompt"][:9], how.get("always", ""))
        if fault == "exit":
            print("0.00.001.002 E cuda: out of memory", file=sys.stderr, flush=True)
            os._exit(9)
        if fault == "hangs":
            return self.rfile.read()
        if fault == "refuses":
            return self.answer({{"error": {{"code": 400, "message": "too long"}}}}, 400)
        count = body["n_predict"] - (fault == "short")
        timings = {{
            "cache_n": 5 if fault == "cached" else 0,
            "prompt_n": 7,
            "prompt_ms": 3.5,
            "predicted_n": count,
            "predicted_ms": 10.0,
        }}
        if speculates != (fault == "drafts"):
            timings |= {{"draft_n": 4, "draft_n_accepted": 3}}
        self.answer({{"content": "x" * count, "timings": timings}})

    def answer(self, value, status=200):
        if self.headers["Authorization"] != "Bearer " + os.environ["LLAMA_API_KEY"]:
            value, status = {{"error": {{"message": "who are you"}}}}, 401
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def double(tmp_path: Path) -> Path:
    file = tmp_path / "llama-server-double"
    file.write_text(DOUBLE.format(python=sys.executable))
    file.chmod(0o755)
    return file


def model_of(
    id_: str, server: Path, gguf: Path, on: Sequence[str] = ("--spec-type", "draft-simple")
) -> dict[str, Any]:
    base = ["--ctx-size", "16384", "--threads", "1"]
    modes = {"off": base, "on": [*base, *on]}
    return {"id": id_, "server": str(server), "model_path": str(gguf), "modes": modes}


def doubled(double: Path, id_: str = "m", **how: object) -> dict[str, Any]:
    gguf = double.with_name(f"{id_}.json")
    gguf.write_text(json.dumps(how))
    return model_of(id_, double, gguf)


def real(id_: str, gguf: Path) -> dict[str, Any]:
    server = real_parts.llama_server_bin()
    return model_of(id_, server, gguf, ["-md", str(gguf), "--spec-type", "draft-simple"])


def written_plan(folder: Path, *models: Mapping[str, Any], **settings: object) -> Path:
    file = folder / "plan.json"
    small = {"n_predict": 8, "repetitions": 1, "prompts": ["code", "story"], "warm_ups": 1}
    plan = {"schema": 1, "name": "test", "models": models} | small | settings
    file.write_text(json.dumps(plan))
    return file


def command(plan: Path, *words: str) -> list[str]:
    out = str(plan.with_name("results.jsonl"))
    return [sys.executable, "-m", "bench.mtp_sweep", str(plan), "--out", out, *words]


def swept(
    plan: Path, *words: str, code: int = 0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(plan, *words),
        cwd=ROOT,
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def records_of(plan: Path) -> dict[str, journal.Record]:
    found = journal.read(plan.with_name("results.jsonl"))
    assert (found.repeated, found.broken) == (0, ())
    return found.records


def without_times(file: Path) -> list[dict[str, Any]]:
    """Every line, the header first, without what the clock and the memory say."""
    header, *lines = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
    header["about"].pop("created")
    return [header] + [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


# --- order


def test_blocks_come_there_and_back() -> None:
    model = Model("m", "s", None, {"off": (), "on": (), "on-n1": ()})

    ids = [block.id for block in mtp_sweep.blocks_of(model, rounds=2)]

    once = "off/b0 on/b0 on-n1/b0 on-n1/b1 on/b1 off/b1".split()
    again = "off/b2 on/b2 on-n1/b2 on-n1/b3 on/b3 off/b3".split()
    assert ids == [f"m/{id_}" for id_ in once + again]


def test_the_first_token_does_not_count_as_speed() -> None:
    assert mtp_sweep.speed_of({"predicted_n": 11, "predicted_ms": 2000.0}) == 5.0
    assert mtp_sweep.speed_of({"predicted_n": 11, "predicted_ms": 0}) is None


# --- the real llama-server


@pytest.mark.integration
def test_a_real_sweep(tmp_path: Path) -> None:
    """The environment of the runner would halve the context and draft in every mode."""
    gguf = real_parts.tiny()
    plan = written_plan(tmp_path, real("org/tiny", gguf), n_predict=24)
    tricky = {"CTX_SIZE": "512", "SPEC_TYPE": "draft-simple", "MODEL_DRAFT": str(gguf)}

    done = swept(plan, environment={f"LLAMA_ARG_{name}": tricky[name] for name in tricky})

    records = records_of(plan)
    order = "off/b0 on/b0 on/b1 off/b1".split()
    parts = ["server", "code/r0", "story/r0"]
    assert list(records) == [f"org/tiny/{block}/{part}" for block in order for part in parts]
    assert {record["outcome"] for record in records.values()} == {"ok"}
    servers = [record for record in records.values() if record["kind"] == "server"]
    assert [server["speculative"] for server in servers] == [False, True, True, False]
    assert {server["n_ctx"] for server in servers} == {16384}
    assert all(server["build_info"].startswith("b") for server in servers)
    assert servers[1]["rss_bytes"] > servers[0]["rss_bytes"] > 2**20
    assert "--port" not in servers[0]["argv"]
    assert servers[1]["argv"][-4:] == ["-md", str(gguf), "--spec-type", "draft-simple"]
    cells = [record for record in records.values() if record["kind"] == "cell"]
    text = " " + " ".join([*NUMBER_WORDS, *NUMBER_WORDS[:4]])
    for cell in cells:
        assert cell["text"] == text
        assert cell["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert cell["predicted_n"] == 24
        assert 0 < cell["predicted_ms"] < cell["wall_ms"]
        is_on = cell["mode"] == "on"
        assert (cell["draft_n"] is not None) == is_on
        assert cell["draft_n"] == cell["draft_n_accepted"]
    assert done.stderr.splitlines()[-1].startswith("done: 8 measured, 0 failed, 0 unsupported")


@pytest.mark.integration
def test_what_fails_is_told_and_the_sweep_goes_on(tmp_path: Path) -> None:
    gguf = real_parts.tiny()
    removed = real("removed", gguf)
    removed["modes"]["off"] = [*removed["modes"]["off"], "--draft-max", "3"]
    missing = real("missing", tmp_path / "missing.gguf")
    headless = real("headless", gguf)
    headless["modes"]["on"] = [*headless["modes"]["off"], "--spec-type", "draft-mtp"]
    lying = real("lying", gguf)
    lying["modes"]["off"] = lying["modes"]["on"]
    plan = written_plan(tmp_path, removed, missing, headless, lying, prompts=["code"])

    done = swept(plan)

    records = records_of(plan)
    outcomes = {id_: record["outcome"] for id_, record in records.items()}
    errors = {id_: record["error"] for id_, record in records.items()}
    assert outcomes["removed/off/b0/code/r0"] == "error"
    assert "ended with exit code 1" in errors["removed/off/b0/server"]
    assert '"--draft-max": the argument has been removed' in errors["removed/off/b1/code/r0"]
    assert outcomes["removed/on/b0/code/r0"] == "ok"
    assert "failed to open GGUF file" in errors["missing/on/b1/code/r0"]
    assert outcomes["headless/on/b0/server"] == "unsupported"
    assert errors["headless/on/b0/server"] == (
        "the GGUF (llama) has no layers for multi-token prediction"
    )
    assert "headless/on/b0/code/r0" not in outcomes
    assert outcomes["headless/off/b1/code/r0"] == "ok"
    assert errors["lying/off/b0/server"] == "off was asked for, and /slots says speculative: True"
    assert outcomes["lying/off/b1/code/r0"] == "error"
    assert done.stderr.splitlines()[-1].startswith("done: 6 measured, 8 failed, 2 unsupported")
    lines = plan.with_name("results.jsonl").read_bytes()
    swept(plan)  # nothing is left to do
    assert plan.with_name("results.jsonl").read_bytes() == lines


# --- the real llama-server, and a model with an MTP head

# Drafts for 41 tokens, " one" and two rounds up to the next. The head guesses wrong behind each
# " five" and " ten" (tests/tiny_gguf.py). With single drafts a round takes eleven: one, three,
# five (wrong), six, eight, ten (wrong), eleven, thirteen, fifteen, seventeen, nineteen.
DRAFTED_AND_RIGHT = {"on-n1": (22, 18), "on-n2": (28, 25)}


@pytest.mark.integration
def test_a_real_head_is_right_as_often_as_it_was_made_to_be(tmp_path: Path) -> None:
    """In the model's file and in one of its own, with the modes that a plan has from llama-swap."""
    commands = {
        "whole": f"{real_parts.tiny_mtp()}",
        "apart": f"{real_parts.tiny_mtp('trunk')} -md {real_parts.tiny_mtp('head')}",
        "unable": f"{real_parts.tiny()}",
    }
    server = f"{real_parts.llama_server_bin()} --port ${{PORT}} -t 1 --no-warmup -m"
    lines = [f"  {id_}:\n    cmd: {server} {words}\n" for id_, words in commands.items()]
    (tmp_path / "config.yaml").write_text("models:\n" + "".join(lines))
    taken = {"config": "config.yaml", "n_max": [1, 2]}
    few = {"prompts": ["code"], "repetitions": 1, "warm_ups": 1, "ctx_size": 1024}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"schema": 1, "llama_swap": taken, "n_predict": 41} | few))

    done = swept(plan)

    records = records_of(plan).values()
    cells = [record for record in records if record["kind"] == "cell"]
    assert {cell["outcome"] for cell in cells} == {"ok"}
    assert len({cell["text"] for cell in cells}) == 1
    order = "off on on-n1 on-n2 on-n2 on-n1 on off".split()
    for id_ in ("whole", "apart"):
        servers = [r for r in records if r["kind"] == "server" and r["model"] == id_]
        assert [server["mode"] for server in servers] == order
        assert [server["speculative"] for server in servers] == [mode != "off" for mode in order]
    for cell in cells:
        drafted = (cell["draft_n"], cell["draft_n_accepted"])
        if cell["mode"] == "off":
            assert drafted == (None, None)
        elif cell["mode"] == "on":
            assert 0 < drafted[1] < drafted[0]
        else:
            assert drafted == DRAFTED_AND_RIGHT[cell["mode"]]
    assert {r["error"] for r in records if r["model"] == "unable" and r["mode"] != "off"} == {
        "the GGUF (llama) has no layers for multi-token prediction"
    }
    assert done.stderr.splitlines()[-1].startswith("done: 18 measured, 0 failed, 6 unsupported")


@pytest.mark.integration
def test_what_the_server_says_of_a_missing_head_is_told(tmp_path: Path) -> None:
    """Where the header is not read first, as the model is named among the arguments."""
    model = real("hidden", real_parts.tiny())
    named = ["--model", model["model_path"], *model["modes"]["off"]]
    model |= {
        "model_path": None,
        "modes": {"off": named, "on": [*named, "--spec-type", "draft-mtp"]},
    }
    plan = written_plan(tmp_path, model, prompts=["code"])

    swept(plan)

    records = records_of(plan)
    assert records["hidden/off/b0/code/r0"]["outcome"] == "ok"
    told = {records[f"hidden/on/b0/{part}"]["error"] for part in ("server", "code/r0")}
    (reason,) = told
    assert reason.startswith("llama-server ended with exit code 1: ")
    assert reason.endswith(": failed to create MTP context")


# --- what is no measurement


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("short", "7 tokens came instead of 8"),
        ("cached", "5 tokens of the prompt came from the cache"),
        ("drafts", "was asked for, and the answer has draft_n"),
        ("refuses", "POST /completion: 400 too long"),
        ("exit", "llama-server ended with exit code 9: cuda: out of memory"),
        ("hangs", "TimeoutError: timed out"),
    ],
)
def test_an_answer_that_is_not_as_it_should_be_is_no_measurement(
    double: Path, fault: str, words: str
) -> None:
    begins = prompts.PROMPTS["code"][:9]
    model = doubled(double, at={begins: fault})
    plan = written_plan(double.parent, model, repetitions=2, request_timeout_s=0.5)

    swept(plan)

    cells = [record for record in records_of(plan).values() if record["kind"] == "cell"]
    assert Counter((cell["prompt"], cell["outcome"]) for cell in cells) == {
        ("code", "error"): 8,
        ("story", "ok"): 8,  # a server that is gone is started anew for the rest
    }
    errors = {cell["error"] for cell in cells if cell["prompt"] == "code"}
    assert all(words in error for error in errors), errors
    assert all(cell["text"] is None for cell in cells if cell["outcome"] == "error")


def test_a_server_whose_warm_up_fails_is_a_failed_server(double: Path) -> None:
    plan = written_plan(double.parent, doubled(double, at={prompts.WARM_UP[:9]: "exit"}))

    swept(plan)

    records = records_of(plan).values()
    assert {record["outcome"] for record in records} == {"error"}
    assert {record["error"] for record in records} == {
        "llama-server ended with exit code 9: cuda: out of memory"
    }


def test_every_request_is_greedy_uncached_and_of_one_length(double: Path) -> None:
    plan = written_plan(double.parent, doubled(double), seed=7, warm_ups=2)

    swept(plan)

    lines = double.with_name("m.json.asked").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    assert len(asked) == 4 * (2 + 2)
    assert {body["prompt"] for body in asked[:2]} == {prompts.WARM_UP}
    for body in asked:
        assert body["cache_prompt"] is False
        assert body["ignore_eos"] is True
        assert (body["temperature"], body["seed"]) == (0, 7)
    assert {body["n_predict"] for body in asked if body["prompt"] != prompts.WARM_UP} == {8}


def test_no_key_of_a_plan_is_written(double: Path) -> None:
    model = doubled(double)
    model["modes"]["off"] = ["--api-key", "sk-secret", "--hf-token=hf-secret", "--flash-attn", "on"]
    plan = written_plan(double.parent, model)

    done = swept(plan, "--json")

    written = plan.with_name("results.jsonl").read_text() + done.stdout + done.stderr
    assert "secret" not in written
    server = records_of(plan)["m/off/b0/server"]
    assert server["argv"][3:] == ["--api-key", "***", "--hf-token=***", "--flash-attn", "on"]


# --- going on


@pytest.mark.integration
@pytest.mark.timeout(900)  # a machine with other work takes several times as long
def test_killed_at_random_moments_it_ends_with_the_file_of_an_unbroken_run(tmp_path: Path) -> None:
    """At 20 moments: after so many bytes more and a bit, be it amid a load or a write."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    gguf = tmp_path / "of-this-test.gguf"
    shutil.copy(real_parts.tiny(), gguf)
    settings = {"n_predict": 48, "repetitions": 4, "prompts": ["code", "story", "summary"]}
    folders = [tmp_path / name for name in ("unbroken", "killed")]
    for folder in folders:
        folder.mkdir()
    models = [real("tiny", gguf), real("twin", gguf)]
    unbroken, killed = (written_plan(folder, *models, **settings) for folder in folders)
    swept(unbroken)

    file = killed.with_name("results.jsonl")
    for _ in range(20):
        kill_after(killed, size(file) + rng.randrange(1500), rng.uniform(0, 0.08))
    swept(killed)

    assert without_times(file) == without_times(unbroken.with_name("results.jsonl"))
    ids = [record.get("id") for record in without_times(file)]
    assert len(set(ids)) == len(ids) == 1 + 2 * 4 * (1 + 12)
    wait_until(lambda: not servers_of(gguf), "no llama-server is left over")


def kill_after(plan: Path, target_bytes: int, seconds: float) -> None:
    file = plan.with_name("results.jsonl")
    with started(command(plan)) as process:
        wait_until(
            lambda: size(file) > target_bytes or process.poll() is not None,
            "the file grows",
            timeout_s=100,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        assert process.poll() is None, "it ended before it was killed often enough"
        process.kill()


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@contextlib.contextmanager
def started(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def servers_of(gguf: Path) -> list[int]:
    """Processes whose command line names this file."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(gguf).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return [pid for pid in found if is_alive(pid)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_tells_how_to_go_on_and_leaves_no_server(
    double: Path, signum: signal.Signals
) -> None:
    model = doubled(double, at={prompts.PROMPTS["story"][:9]: "hangs"})
    plan = written_plan(double.parent, model)
    file = plan.with_name("results.jsonl")

    with started(command(plan)) as process:
        wait_until(lambda: file.exists() and journal.read(file).records.get("m/off/b0/code/r0"), "")
        process.send_signal(signum)
        assert process.wait(30) == 130
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]

    assert last.startswith("stopped; to go on: python -m bench.mtp_sweep ")
    assert last.endswith(f"--out {file}")
    wait_until(lambda: not servers_of(Path(model["model_path"])), "the server is gone")


def test_another_plan_is_refused_and_a_new_run_sets_the_old_aside(double: Path) -> None:
    plan = written_plan(double.parent, doubled(double))
    swept(plan)
    before = plan.with_name("results.jsonl").read_bytes()
    written_plan(double.parent, doubled(double), n_predict=9, request_timeout_s=50)

    refused = swept(plan, code=1)

    assert refused.stderr.startswith("mtp_sweep: ")
    assert "n_predict: 8, now 9" in refused.stderr
    assert "request_timeout_s" not in refused.stderr
    assert plan.with_name("results.jsonl").read_bytes() == before
    swept(plan, "--new-run")
    assert records_of(plan)["m/on/b0/code/r0"]["predicted_n"] == 9
    assert plan.with_name("results.1.jsonl").read_bytes() == before


def test_another_gguf_under_the_same_name_is_another_run(double: Path) -> None:
    plan = written_plan(double.parent, doubled(double))
    swept(plan)
    doubled(double, comment="longer")

    refused = swept(plan, code=1)

    assert f"files.{double.with_name('m.json')}.bytes: 2, now " in refused.stderr


def test_another_build_of_the_server_is_another_run(double: Path) -> None:
    """One whose file is the same: most of llama-server is in its libraries."""
    source = DOUBLE.replace('how.get("build", "b1-test")', 'model.with_name("build").read_text()')
    double.write_text(source.format(python=sys.executable))
    double.with_name("build").write_text("b1-one")
    plan = written_plan(double.parent, doubled(double, always="refuses", at={"Count fro": "ok"}))
    swept(plan)
    double.with_name("build").write_text("b2-two")

    refused = swept(plan, "--retry", code=1)

    assert f"{double} is now build b2-two, and m/off/b0/server was measured with b1-one" in (
        refused.stderr
    )


def test_failed_cells_stay_failed_until_a_retry_is_asked_for(double: Path) -> None:
    source = DOUBLE.replace('if "dies" in how:', 'if model.with_name("broken").exists():')
    double.write_text(source.replace('how["dies"]', '"error: no"').format(python=sys.executable))
    broken = double.with_name("broken")
    broken.touch()
    plan = written_plan(double.parent, doubled(double))
    swept(plan)
    broken.unlink()

    swept(plan)
    assert {record["outcome"] for record in records_of(plan).values()} == {"error"}
    swept(plan, "--retry")

    found = journal.read(plan.with_name("results.jsonl"))
    assert {record["outcome"] for record in found.records.values()} == {"ok"}
    assert found.repeated == 4 * 3


def test_killed_between_a_failed_server_and_its_cells_it_notes_the_server_once(
    double: Path,
) -> None:
    plan = written_plan(double.parent, doubled(double, dies="error: no"))
    swept(plan)
    file = plan.with_name("results.jsonl")
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[:2]))  # the header and the first server

    swept(plan)

    records_of(plan)
    assert file.read_bytes() == b"".join(whole)


def test_a_second_run_on_the_same_file_is_refused(double: Path) -> None:
    plan = written_plan(double.parent, doubled(double))
    swept(plan)
    header = journal.read(plan.with_name("results.jsonl")).header

    with journal.opened(plan.with_name("results.jsonl"), header["decides"], {}):
        refused = swept(plan, code=1)

    assert "another run writes" in refused.stderr


# --- what is shown


def test_programs_get_every_step_as_json(double: Path) -> None:
    plan = written_plan(double.parent, doubled(double))

    done = swept(plan, "--json")

    states = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == ""
    assert states[0]["done"] == 0
    assert {state["total"] for state in states} == {8}
    assert "m/on/b1/story/r0" in [state.get("cell") for state in states]
    assert states[-2]["tok_s"] == pytest.approx(700.0)
    assert states[-1]["said"].startswith("done: 8 measured, 0 failed, 0 unsupported: ")


def test_what_an_earlier_run_did_counts_as_done_from_the_start(double: Path) -> None:
    plan = written_plan(double.parent, doubled(double))
    swept(plan)
    file = plan.with_name("results.jsonl")
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:6]))

    done = swept(plan, "--json")

    states = [json.loads(line) for line in done.stdout.splitlines()]
    assert [state["done"] for state in states][:2] == [3, 3]
    assert (states[-1]["done"], states[-1]["total"]) == (8, 8)
    assert states[3]["eta_s"] is None  # one cell of this run says little


def test_the_header_tells_where_it_was_measured(double: Path) -> None:
    plan = written_plan(double.parent, doubled(double))
    swept(plan)

    header = journal.read(plan.with_name("results.jsonl")).header

    assert header["decides"]["models"][0]["id"] == "m"
    assert header["decides"]["machine"]["cores"] == os.cpu_count()
    assert header["decides"]["prompt_sums"].keys() == {"code", "story"}
    assert header["about"]["priority"] == machine.priority()
    assert header["about"]["created"].endswith("+00:00")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "the plan is no JSON object"),
        ('{"schema": 2}', "the plan's schema is not 1"),
        ('{"schema": 1, "models": []}', "the plan has no models"),
        ('{"schema": 1, "models": [], "n": 1}', "the plan has a field 'n'"),
    ],
)
def test_a_plan_that_is_none_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(text)

    refused = swept(plan, code=1)

    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not plan.with_name("results.jsonl").exists()
