"""The daemon over the real llama-server with real models, asked as agents ask it.

The tiny model counts, so that a chunk which is lost, doubled or swapped on the
way shows in the text. SmolLM2 is slow enough to be interrupted.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import real_parts
from tests.daemon import CHAT, Daemon, is_alive, settings_of, started_daemon, wait_until
from tests.tiny_gguf import WORDS

pytestmark = pytest.mark.integration

ONE_SLOT = ["--parallel", "1"]
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}<|im_start|>system\n{{ tool | tojson }}<|im_end|>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONG = 8000  # tokens: SmolLM2 needs most of a minute for so many, whoever computes them
PROMPTLY_S = 5.0  # for a short answer behind a long one that nobody wants any more


def settings(folder: Path, models: dict[str, object], **env: str) -> dict[str, str]:
    return settings_of(real_parts.llama_server_bin(), folder, models, **env)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Room for everything that the tests start, so that they do not meet."""
    folder = tmp_path_factory.mktemp("integration")
    (folder / "text.gguf").write_text("this is no model")
    tiny, smollm2 = str(real_parts.tiny()), str(real_parts.smollm2())
    models: dict[str, object] = {
        "tiny": {"path": tiny, "aliases": ["counter"]},
        "headed": str(real_parts.tiny_mtp()),
        "smollm2": smollm2,
        "one-slot": {"path": smollm2, "args": ONE_SLOT},
        "embedder": {"path": smollm2, "args": ["--embedding", "--pooling", "mean"]},
        "tool-user": {"path": smollm2, "args": ["--chat-template", TOOL_TEMPLATE]},
        "broken": "text.gguf",
    }
    base_args = json.dumps(["-c", "8192", "-t", "1", "--parallel", "4"])
    chosen = settings(folder, models, BASE_ARGS=base_args, MAX_SIDECARS="14")
    with started_daemon(chosen, folder) as started:
        yield started


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    base_url = f"http://127.0.0.1:{daemon.port}/v1"
    with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=60) as opened:
        yield opened


def counted(words: int) -> str:
    return "".join(f" {word}" for word in itertools.islice(itertools.cycle(WORDS), words))


def stream_of_tiny(client: openai.OpenAI, tokens: int) -> str:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "count"}],
        max_tokens=tokens,
        stream=True,
    )
    with stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def sidecar(daemon: Daemon, headers: dict[str, str]) -> dict[str, Any]:
    """The row of GET /sidecars for the process that gave this answer."""
    (row,) = [row for row in daemon.sidecars() if row["hash"] == headers["x-sidecar-hash"]]
    return row


def pids_in_use(daemon: Daemon, model: str) -> list[int]:
    rows = daemon.sidecars()
    return [row["pid"] for row in rows if row["model_id"] == model and row["in_flight"]]


def seconds_for_a_short_answer(daemon: Daemon, model: str) -> float:
    begun = time.monotonic()
    status, headers, _ = daemon.chat(model, max_tokens=2)
    assert (status, headers["x-sidecar-start"]) == (200, "reused")
    return time.monotonic() - begun


def starts_logged(daemon: Daemon) -> int:
    """How many processes the daemon has started, once its log has come this far."""
    answered = daemon.log.count(" request hash=")
    assert daemon.chat("tiny", max_tokens=1)[0] == 200
    wait_until(lambda: daemon.log.count(" request hash=") > answered, "the request is logged")
    return daemon.log.count(" start hash=")


# --- through the official client


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "count"}], max_tokens=30
    )
    assert (answer.choices[0].message.content or "").strip() == counted(30).strip()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30


def test_a_long_stream_arrives_whole_and_in_order(client: openai.OpenAI) -> None:
    assert stream_of_tiny(client, 500).strip() == counted(500).strip()


def test_parallel_streams_do_not_mix(client: openai.OpenAI) -> None:
    lengths = [500, 487, 473, 461]
    with ThreadPoolExecutor(len(lengths)) as threads:
        texts = list(threads.map(lambda tokens: stream_of_tiny(client, tokens), lengths))
    assert [text.strip() for text in texts] == [counted(length).strip() for length in lengths]


def test_the_last_chunk_of_a_stream_tells_the_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="counter",
        messages=[{"role": "user", "content": "count"}],
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    with stream:
        chunks = list(stream)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 7
    assert usage.total_tokens == usage.prompt_tokens + 7


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Tell me a long story about a dragon."}],
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"colour", "count"}
    assert value["colour"] in ("red", "green", "blue")
    assert value["count"] in range(1, 10)


def test_tools_reach_the_model_and_the_answer_is_well_formed(client: openai.OpenAI) -> None:
    """Whether a model so small calls the tool is its own affair, even if that is required."""
    parameters: dict[str, object] = {"type": "object", "properties": {"city": {"type": "string"}}}
    plain = client.chat.completions.create(
        model="tool-user", messages=[{"role": "user", "content": "Hello"}], max_tokens=1
    )
    answer = client.chat.completions.create(
        model="tool-user",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=60,
        tools=[{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        tool_choice="required",
    )
    assert plain.usage is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 20  # the tool's own words
    message = answer.choices[0].message
    for call in message.tool_calls or []:
        assert call.type == "function"
        assert call.function.name == "weather"
    assert message.tool_calls or message.content


def test_an_embedding_model_embeds(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="embedder", input=["red", "green"])
    vectors = [row.embedding for row in answer.data]
    assert [len(vector) for vector in vectors] == [576, 576]  # SmolLM2-135M's width
    assert vectors[0] != vectors[1]


def test_models_are_listed_by_id(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed == ["tiny", "headed", "smollm2", "one-slot", "embedder", "tool-user", "broken"]


# --- flags


def test_agents_with_different_flags_have_processes_of_their_own(daemon: Daemon) -> None:
    rows = []
    for size in ("64", "128"):
        status, headers, _ = daemon.chat("tiny", f"-b {size}", max_tokens=3)
        assert status == 200
        rows.append(sidecar(daemon, headers))
        args = rows[-1]["args"]
        assert args[args.index("--batch-size") + 1] == size
        command = Path(f"/proc/{rows[-1]['pid']}/cmdline").read_text().split("\0")
        assert args == [arg for arg in command if arg][-len(args) :]
    assert rows[0]["hash"] != rows[1]["hash"]
    assert rows[0]["pid"] != rows[1]["pid"]


def test_one_setting_in_other_spellings_shares_a_process(daemon: Daemon) -> None:
    starts, pids = [], set()
    for flags in ("-c 1536 -fa", "--ctx-size=1536 --flash-attn on", "-fa on -c 1536"):
        status, headers, _ = daemon.chat("tiny", flags, max_tokens=3)
        assert status == 200
        starts.append(headers["x-sidecar-start"])
        pids.add(sidecar(daemon, headers)["pid"])
    assert starts == ["started", "reused", "reused"]
    assert len(pids) == 1


def test_an_agent_has_its_tokens_drafted_by_the_models_own_head(daemon: Daemon) -> None:
    """Of " one" and two rounds of numbers 28 words are drafted, by two, and 3 of them wrong."""
    plain, drafted = (
        daemon.chat("headed", flags, max_tokens=41, temperature=0)
        for flags in (None, "--spec-type draft-mtp --spec-draft-n-max 2")
    )
    assert (plain[0], drafted[0]) == (200, 200)
    assert plain[1]["x-sidecar-hash"] != drafted[1]["x-sidecar-hash"]
    for _, _, answer in (plain, drafted):
        assert answer["choices"][0]["message"]["content"].strip() == counted(41).strip()
    assert "draft_n" not in plain[2]["timings"]
    timings = drafted[2]["timings"]
    assert (timings["draft_n"], timings["draft_n_accepted"]) == (28, 25)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("-c many", "many"),
        ("--cache-type-k q9_9", "q9_9"),
        ("--ctx-sise 4096", "--ctx-size"),
        ("--port 80", "--port"),
    ],
)
def test_a_bad_flag_is_refused_before_anything_starts(
    daemon: Daemon, flags: str, named: str
) -> None:
    started = starts_logged(daemon)
    status, _, body = daemon.chat("tiny", flags)
    assert (status, body["error"]["code"]) == (400, "invalid_flags")
    assert named in body["error"]["message"]
    assert starts_logged(daemon) == started


def test_a_file_that_is_no_model_is_reported_with_the_last_lines(daemon: Daemon) -> None:
    def has_said_why() -> bool:
        status, _, body = daemon.chat("broken")
        assert (status, body["error"]["code"]) == (502, "model_load_failed")
        assert "exit code 1" in body["error"]["message"]
        return "invalid magic" in body["error"]["message"]

    # On a busy machine llama-server itself now and then ends before its lines are written.
    wait_until(has_said_why, "its last lines are told")


# --- interruptions


def test_a_stream_that_its_client_leaves_frees_the_slot(daemon: Daemon) -> None:
    body = {"model": "one-slot", "prompt": "Once", "max_tokens": LONG}
    connection, response = daemon.send(
        "POST", "/v1/completions", body | {"stream": True, "ignore_eos": True}
    )
    with contextlib.closing(connection), response:
        assert response.readline().startswith(b"data: ")
        assert len(pids_in_use(daemon, "one-slot")) == 1
    assert seconds_for_a_short_answer(daemon, "one-slot") < PROMPTLY_S
    wait_until(lambda: not pids_in_use(daemon, "one-slot"), "its lease ends", 2)


def test_a_request_that_its_client_leaves_frees_the_slot(daemon: Daemon) -> None:
    assert daemon.chat("one-slot", max_tokens=1)[0] == 200
    daemon.idle_sidecars()
    body = {"model": "one-slot", "prompt": "Once", "max_tokens": LONG, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body))
        wait_until(lambda: pids_in_use(daemon, "one-slot"), "it is being answered")
    assert seconds_for_a_short_answer(daemon, "one-slot") < PROMPTLY_S
    wait_until(lambda: not pids_in_use(daemon, "one-slot"), "its lease ends", 2)


def test_a_killed_server_cuts_its_stream_and_is_started_again(daemon: Daemon) -> None:
    body = {
        "model": "one-slot",
        "messages": [{"role": "user", "content": "count"}],
        "max_tokens": LONG,
        "stream": True,
        "ignore_eos": True,
    }
    connection, response = daemon.send("POST", CHAT, body)
    with contextlib.closing(connection), response:
        assert response.readline().startswith(b"data: ")
        (pid,) = pids_in_use(daemon, "one-slot")
        os.kill(pid, 9)  # kill -9; Windows has no name for it
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    wait_until(lambda: pid not in [row["pid"] for row in daemon.sidecars()], "its end is seen")
    status, headers, _ = daemon.chat("one-slot", max_tokens=2)
    assert (status, headers["x-sidecar-start"]) == (200, "started")
    assert sidecar(daemon, headers)["pid"] != pid


# --- daemons of their own


def test_a_full_pool_evicts_the_other_model(tmp_path: Path) -> None:
    models: dict[str, object] = {
        "smollm2": str(real_parts.smollm2()),
        "gemma": str(real_parts.gemma()),
    }
    chosen = settings(tmp_path, models, BASE_ARGS='["-c","2048"]', MAX_SIDECARS="1")
    seen, pids = [], []
    with started_daemon(chosen, tmp_path) as daemon:
        for model in ("smollm2", "gemma", "smollm2"):
            status, headers, body = daemon.chat(model, max_tokens=3)
            (row,) = daemon.sidecars()
            seen.append((status, headers["x-sidecar-start"], body["model"], row["model_id"]))
            pids.append(row["pid"])
            assert [pid for pid in pids if is_alive(pid)] == [row["pid"]]
        assert daemon.stop() == 0
    assert seen == [
        (200, "started", "smollm2", "smollm2"),
        (200, "evicted", "gemma", "gemma"),
        (200, "evicted", "smollm2", "smollm2"),
    ]


def test_default_base_args_start_and_sigterm_leaves_no_server(tmp_path: Path) -> None:
    models: dict[str, object] = {
        "tiny": str(real_parts.tiny()),
        "smollm2": str(real_parts.smollm2()),
    }
    with started_daemon(settings(tmp_path, models), tmp_path) as daemon:
        for model in models:
            status, headers, _ = daemon.chat(model, max_tokens=3)
            assert status == 200
            args = sidecar(daemon, headers)["args"]
            assert args[args.index("--ctx-size") + 1] == "32768"
        pids = [row["pid"] for row in daemon.sidecars()]
        assert [is_alive(pid) for pid in pids] == [True, True]
        assert daemon.stop() == 0
        assert [is_alive(pid) for pid in pids] == [False, False]
