"""The real llama-server asked in one piece, directly and through the daemon: the same answer.

Through the daemon the answer is put together from a stream wherever that is exact.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import real_parts
from tests.daemon import CHAT, Daemon, settings_of, started_daemon, wait_until

pytestmark = pytest.mark.integration

TEXT, MESSAGES, RESPONSES = "/v1/completions", "/v1/messages", "/v1/responses"
AGENT_TEMPLATE = (
    "{% for tool in tools or [] %}<|im_start|>system\n"
    "<tools>{{ tool | tojson }}</tools><|im_end|>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARGS = ["--temp", "0", "--seed", "7", "--parallel", "1", "--chat-template", AGENT_TEMPLATE]
LONG = 8000  # tokens: SmolLM2 needs most of a minute for so many


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("whole")
    smollm2 = str(real_parts.smollm2())
    models = {
        "agent": {"path": smollm2, "args": ARGS},
        "two-slots": {"path": smollm2, "args": ["--parallel", "2"]},
    }
    settings = settings_of(
        real_parts.llama_server_bin(), folder, models, base_args=["-c", "8192", "-t", "1"]
    )
    with started_daemon(settings, folder) as started:
        yield started


def direct(daemon: Daemon, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The child's own answer, past the daemon; its key is in its environment."""
    (row,) = [row for row in daemon.sidecars() if row["model_id"] == body["model"]]
    environment = Path(f"/proc/{row['pid']}/environ").read_text()
    key = re.search(r"LLAMA_API_KEY=([^\0]+)", environment)
    assert key is not None
    connection = http.client.HTTPConnection("127.0.0.1", row["port"], timeout=60)
    with contextlib.closing(connection):
        headers = {"Authorization": f"Bearer {key[1]}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


VOLATILE = {"id", "call_id", "created", "created_at", "completed_at", "timings"}


def settled(value: Any) -> Any:
    """Without what differs between two answers to one question; its names stay."""
    if isinstance(value, list):
        return [settled(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {name: settled(each) for name, each in value.items() if name not in VOLATILE}
    return kept | {
        name: name == "timings" and sorted(value[name]) for name in VOLATILE & set(value)
    }


SAY_HI = [{"role": "user", "content": "Say hi."}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "weather", "parameters": PARAMETERS}
CALL = {"name": "weather", "arguments": '{"city": "Rome"}'}
ASK = {"role": "user", "content": "weather"}
STEP = [
    ASK,
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I look it up.",
        "tool_calls": [{"id": "c", "type": "function", "function": CALL}],
    },
]
USED = {"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Rome"}}
THOUGHT = {"type": "thinking", "thinking": "I look it up.", "signature": ""}
MESSAGE_STEP = [ASK, {"role": "assistant", "content": [THOUGHT, USED]}]
REASONING = [{"type": "reasoning_text", "text": "I look it up."}]
RESPONSE_STEP = [
    ASK,
    {"type": "reasoning", "summary": [], "content": REASONING},
    {"type": "function_call", "call_id": "c", **CALL},
]
TOOLS: dict[str, object] = {
    "messages": [*STEP * 4, ASK],
    "tools": [{"type": "function", "function": FUNCTION}],
    "max_tokens": 60,
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
COUNT = "one two three four five six one two three four five six one two three"
ASKED: dict[str, tuple[str, dict[str, object]]] = {
    "chat": (CHAT, {"messages": SAY_HI, "max_tokens": 12}),
    "chat to its end": (CHAT, {"messages": SAY_HI, "max_tokens": 200}),
    "chat of one token": (CHAT, {"messages": SAY_HI, "max_tokens": 1}),
    "reasoning and a tool call": (CHAT, TOOLS),
    "reasoning cut short": (CHAT, TOOLS | {"max_tokens": 5}),
    "a tool call cut short": (CHAT, TOOLS | {"max_tokens": 30}),
    "per-token extras": (
        CHAT,
        {
            "messages": SAY_HI,
            "max_tokens": 5,
            "timings_per_token": True,
            "return_progress": True,
            "return_tokens": True,
        },
    ),
    "logprobs": (
        CHAT,
        {"messages": SAY_HI, "max_tokens": 4, "logprobs": True, "top_logprobs": 2},
    ),
    "logprobs of a tool call": (CHAT, TOOLS | {"logprobs": True}),
    "stop": (CHAT, {"messages": SAY_HI, "max_tokens": 40, "stop": [" to"]}),
    "schema": (
        CHAT,
        {
            "messages": SAY_HI,
            "max_tokens": 60,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "it", "schema": SCHEMA},
            },
        },
    ),
    "no content": (CHAT, {"messages": SAY_HI, "max_tokens": 0}),
    "too long a prompt": (CHAT, {"messages": [{"role": "user", "content": "x " * 9000}]}),
    "a wrong field": (CHAT, {"messages": SAY_HI, "temperature": "hot"}),
    "text": (TEXT, {"prompt": COUNT, "max_tokens": 8}),
    "text, logprobs": (TEXT, {"prompt": COUNT, "max_tokens": 3, "logprobs": 2}),
    "text, held back for a stop word": (
        TEXT,
        {"prompt": COUNT, "max_tokens": 8, "stop": [" six six six six six six six six six no"]},
    ),
    "text, two prompts": (TEXT, {"prompt": [COUNT, "Once"], "max_tokens": 3}),
    "message": (MESSAGES, {"messages": SAY_HI, "max_tokens": 12}),
    "message with a stop sequence": (
        MESSAGES,
        {"messages": SAY_HI, "max_tokens": 40, "stop_sequences": [" to"]},
    ),
    "message with a tool call": (
        MESSAGES,
        {
            "messages": [*MESSAGE_STEP * 4, ASK],
            "tools": [{"name": "weather", "description": "weather", "input_schema": PARAMETERS}],
            "max_tokens": 60,
        },
    ),
    "response": (RESPONSES, {"input": "Say hi.", "max_output_tokens": 12}),
    "response to its end": (RESPONSES, {"input": "Say hi.", "max_output_tokens": 200}),
    "response with a tool call": (
        RESPONSES,
        {
            "input": [*RESPONSE_STEP * 4, ASK],
            "tools": [{"type": "function", **FUNCTION}],
            "max_output_tokens": 60,
        },
    ),
}


@pytest.mark.parametrize(("path", "fields"), ASKED.values(), ids=list(ASKED))
def test_through_the_daemon_the_answer_is_the_same(
    daemon: Daemon, path: str, fields: dict[str, object]
) -> None:
    body: dict[str, Any] = {"model": "agent", **fields}
    daemon.ask("POST", path, body)  # so that both find the same in the cache
    wanted_status, wanted = direct(daemon, path, body)
    status, _, answer = daemon.ask("POST", path, body)
    assert (status, settled(answer)) == (wanted_status, settled(wanted))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reasoning and a tool call", ("reasoning_content", "tool_calls", "Rome")),
        ("message with a tool call", ("thinking", "tool_use", "Rome")),
        ("response with a tool call", ("reasoning_text", "function_call", "Rome")),
    ],
)
def test_the_questions_above_do_lead_to_thought_and_tool_calls(
    daemon: Daemon, name: str, words: tuple[str, ...]
) -> None:
    path, fields = ASKED[name]
    status, _, answer = daemon.ask("POST", path, {"model": "agent", **fields})
    assert status == 200
    assert [word for word in words if word not in json.dumps(answer)] == []


def test_a_client_that_leaves_frees_its_slot_while_another_stream_runs(daemon: Daemon) -> None:
    assert daemon.chat("two-slots", max_tokens=1)[0] == 200
    body = {"model": "two-slots", "prompt": "Once", "max_tokens": LONG, "ignore_eos": True}
    connection, response = daemon.send("POST", TEXT, body | {"stream": True})
    with contextlib.closing(connection), response:
        assert response.readline().startswith(b"data: ")
        left = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)
        with contextlib.closing(left):
            left.request("POST", TEXT, json.dumps(body))
            wait_until(lambda: busy_slots(daemon) == 2, "both are being answered")
        begun = time.monotonic()
        wait_until(lambda: busy_slots(daemon) == 1, "its slot is free", 15)
        freed_s = time.monotonic() - begun
        assert response.readline()
    assert freed_s < 2  # without a stream behind it, it would run for most of a minute


def busy_slots(daemon: Daemon) -> int:
    """How many requests of the model are in the child now, by its own log."""
    (row,) = [row for row in daemon.sidecars() if row["model_id"] == "two-slots"]
    environment = Path(f"/proc/{row['pid']}/environ").read_text()
    key = re.search(r"LLAMA_API_KEY=([^\0]+)", environment)
    assert key is not None
    connection = http.client.HTTPConnection("127.0.0.1", row["port"], timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/slots", headers={"Authorization": f"Bearer {key[1]}"})
        slots = json.loads(connection.getresponse().read())
    return sum(slot["is_processing"] for slot in slots)
