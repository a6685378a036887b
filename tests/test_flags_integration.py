"""Flags and the real llama-server: what they mean to it, in whichever way they reach it.

A flag of a request must do the same on the command line and in the body. What
`check` prints must start. What the daemon keeps from its children must stay away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

import winsvc
from tests import real_parts
from tests.daemon import CHAT, ROOT, Daemon, free_port_range, started_daemon
from tests.llama_server import LlamaServer, help_of, started_server
from tests.test_integration import settings, sidecar
from validator import (
    Body,
    FlagsRefused,
    FlagTable,
    JsonObject,
    Layer,
    OpenedFlags,
    RequestDefaults,
    Resolved,
    Validator,
)

pytestmark = pytest.mark.integration

NOTHING_LIFTED = RequestDefaults()


# --- a flag of a request, on the command line and in the body


@dataclasses.dataclass(frozen=True)
class Look:
    """How a setting is seen: a server of this kind, and what is asked of it."""

    see: Callable[[LlamaServer, RequestDefaults], object]
    args: tuple[str, ...] = ()
    model: Callable[[], Path] = real_parts.smollm2
    body: Body = Body.COMPLETION
    stays_busy: bool = False  # with what it was asked, after the answer was left


def generated(*, in_a_chat: bool = True, **fields: object) -> Look:
    """All settings of a generation, and its text, without chat and with it."""
    asked = {"seed": 7, "n_predict": 4, "cache_prompt": False} | fields
    asked = {name: value for name, value in asked.items() if value is not ...}

    def see(server: LlamaServer, lifted: RequestDefaults) -> object:
        answers = [posted(server, "/completion", {"prompt": "Once upon a time"} | asked, lifted)]
        if in_a_chat:
            body = {"messages": HELLO, "verbose": True} | asked
            answers.append(posted(server, CHAT, body, lifted)["__verbose"])
        return [(each["generation_settings"], each["content"]) for each in answers]

    return Look(see, SHORT_TEMPLATE)


def posted(
    server: LlamaServer, path: str, body: Mapping[str, object], lifted: RequestDefaults
) -> Any:
    return server.post(path, lifted.applied_to(JsonObject(json.dumps(body))))


SHORT_TEMPLATE = ("--chat-template", "{% for m in messages %}{{ m.content }}{% endfor %}")
HELLO = [{"role": "user", "content": "Hello."}]
ASKING_TEMPLATE = (
    "{{ enable_thinking }} {{ preserve_reasoning }} {{ reasoning_effort }} {{ colour }} {{ size }}"
)
THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)


def seen_prompt(server: LlamaServer, lifted: RequestDefaults) -> object:
    return posted(server, "/apply-template", {"messages": HELLO}, lifted)["prompt"]


def seen_message(server: LlamaServer, lifted: RequestDefaults) -> object:
    body = {"messages": HELLO, "max_tokens": 12, "temperature": 0, "cache_prompt": False}
    return posted(server, CHAT, body, lifted)["choices"][0]["message"]


def seen_vector(server: LlamaServer, lifted: RequestDefaults) -> object:
    return posted(server, "/v1/embeddings", {"input": "red"}, lifted)["data"][0]["embedding"]


def seen_reuse_of_a_beginning(server: LlamaServer, lifted: RequestDefaults) -> object:
    """How many tokens of a prompt are taken over from one that began alike."""
    prompts = (" one two three four", " one two three five")
    return [cached_tokens(server, prompt, lifted) for prompt in prompts][1]


def seen_reuse_of_a_chunk(server: LlamaServer, lifted: RequestDefaults) -> object:
    """How many tokens are taken over where a piece went missing before the last ones."""
    end = " two three four five six seven eight nine ten" * 8
    return [cached_tokens(server, " one" * count + end, lifted) for count in (60, 30)][1]


def cached_tokens(server: LlamaServer, prompt: str, lifted: RequestDefaults) -> object:
    body = {"prompt": prompt, "n_predict": 1}
    return posted(server, "/completion", body, lifted)["timings"]["cache_n"]


def seen_ping(server: LlamaServer, lifted: RequestDefaults) -> object:
    """What a stream says while a long prompt is read in one batch."""
    body = {"prompt": " a" * 1000, "n_predict": 1, "stream": True, "return_progress": True}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=SILENCE_S)
    with contextlib.closing(connection):
        asked = lifted.applied_to(JsonObject(json.dumps(body)))
        connection.request("POST", "/completion", asked.encode())
        with connection.getresponse() as response:
            begun = (response.readline()[:6], response.readline())
            try:
                return (*begun, response.readline())
            except TimeoutError:
                return begun


SILENCE_S = 3.0  # the first ping comes between one and two seconds; the batch takes eight
ANY_SETTING = generated()
UNLIMITED = generated(n_predict=..., stop=["."])
ANY_SEED = generated(seed=...)
GREEDY = generated(temperature=0, n_predict=16)
# In a chat a schema's grammar also grants the fence that is cut off the answer, so that
# other blanks are written; see test_a_json_schema_binds_a_chat_with_the_models_own_template.
WITHOUT_CHAT = generated(in_a_chat=False, temperature=0, n_predict=16)
ADAPTIVE = generated(
    in_a_chat=False, samplers=["temperature", "adaptive_p"], temperature=1.5, n_predict=12
)
PROMPT = Look(seen_prompt, ("--chat-template", ASKING_TEMPLATE), real_parts.tiny)
THOUGHTS = Look(seen_message, ("--chat-template", THINKING_TEMPLATE))
EMBEDDING = Look(seen_vector, ("--embedding", "--pooling", "mean"), real_parts.tiny, Body.EMBEDDING)
WITHOUT_STORE = ("--cache-ram", "0")
BEGINNING = Look(seen_reuse_of_a_beginning, WITHOUT_STORE, real_parts.tiny)
CHUNK = Look(seen_reuse_of_a_chunk, WITHOUT_STORE, real_parts.tiny)
ONE_BATCH = ("-c", "2048", "-b", "2048", "-ub", "8")
PING = Look(seen_ping, ONE_BATCH, stays_busy=True)

SHOWN: list[tuple[str, Look]] = [
    ("--predict 5", UNLIMITED),
    ("--keep 3", ANY_SETTING),
    ("--keep -1", ANY_SETTING),
    ("--reverse-prompt ,", GREEDY),
    (r"-r '\n' -r ' a'", GREEDY),
    (r"-r '\n' --no-escape", GREEDY),
    ("--samplers 'temperature;top_k'", ANY_SETTING),
    ("--seed 42", ANY_SEED),
    ("--seed 4294967294", ANY_SEED),
    ("--sampler-seq kt", ANY_SETTING),
    ("--ignore-eos", GREEDY),
    ("--temp 0.33", ANY_SETTING),
    ("--top-k 3", ANY_SETTING),
    ("--top-p 0.7", ANY_SETTING),
    ("--min-p 0.3", ANY_SETTING),
    ("--top-nsigma 1.5", ANY_SETTING),
    ("--xtc-probability 0.4", ANY_SETTING),
    ("--xtc-threshold 0.2", ANY_SETTING),
    ("--typical 0.6", ANY_SETTING),
    ("--repeat-last-n 5", ANY_SETTING),
    ("--repeat-penalty 1.3", ANY_SETTING),
    ("--presence-penalty -0.5", ANY_SETTING),
    ("--frequency-penalty 0.25", ANY_SETTING),
    ("--dry-multiplier 0.8", ANY_SETTING),
    ("--dry-base 1.5", ANY_SETTING),
    ("--dry-allowed-length 4", ANY_SETTING),
    ("--dry-penalty-last-n 9", ANY_SETTING),
    ("--dry-sequence-breaker ! --dry-sequence-breaker '?'", ANY_SETTING),
    ("--adaptive-target 0.2", ADAPTIVE),
    ("--adaptive-target 0.2 --adaptive-decay 0.99", ADAPTIVE),
    ("--dynatemp-range 0.5", ANY_SETTING),
    ("--dynatemp-exp 2", ANY_SETTING),
    ("--mirostat 2", ANY_SETTING),
    ("--mirostat-lr 0.3", ANY_SETTING),
    ("--mirostat-ent 4", ANY_SETTING),
    ("--logit-bias 28-3 -l 30+1.5", GREEDY),
    ("""--grammar 'root ::= "yes" | "no"'""", GREEDY),
    ("--grammar-file 'a folder/yes.gbnf'", GREEDY),
    ("""--json-schema '{"enum": [1, 2]}'""", WITHOUT_CHAT),
    ("--json-schema-file 'a folder/schema ü.json'", WITHOUT_CHAT),
    ("--backend-sampling", ANY_SETTING),
    ("--embd-normalize 1", EMBEDDING),
    ("--embd-normalize -1", EMBEDDING),
    ("""--chat-template-kwargs '{"colour": "red", "size": 1e3}'""", PROMPT),
    ("""--chat-template-kwargs '{"colour": "red"}' --reasoning on""", PROMPT),
    ("""--reasoning on --chat-template-kwargs '{"enable_thinking": false, "size": 1}'""", PROMPT),
    ("--sse-ping-interval 1", PING),
    ("--no-cache-prompt", BEGINNING),
    ("--cache-reuse 8", CHUNK),
    ("--reasoning-format none", THOUGHTS),
    ("--reasoning on", PROMPT),
    ("--reasoning off", THOUGHTS),
    ("--reasoning-budget 3", THOUGHTS),
    ("--reasoning-budget 0", THOUGHTS),
    ("--reasoning-budget 3 --reasoning-budget-message ' That is \"enough\".'", THOUGHTS),
    # Newer ones preserve by default, so that only the colour shows that it was said.
    ("""--reasoning-preserve --chat-template-kwargs '{"colour": "red"}'""", PROMPT),
    ("--no-reasoning-preserve", PROMPT),
]
# With the llama-server of the wheel these cannot be shown: it does not know them.
SHOWN_BY_NEWER: list[tuple[str, Look]] = [("--reasoning-effort high", PROMPT)]


class Servers:
    """Starts llama-servers for this module; those without a flag of their own stay up."""

    def __init__(self, folder: Path, kept: contextlib.ExitStack) -> None:
        self.folder = folder
        self.table = FlagTable.built_in().for_binary(help_of(real_parts.llama_server_bin()))
        self._kept = kept
        self._plain: dict[tuple[Path, tuple[str, ...]], LlamaServer] = {}
        self._seen_without: dict[Look, object] = {}
        self._names = itertools.count()

    def resolved(self, flags: str, *, share: bool, body: Body = Body.COMPLETION) -> Resolved:
        files = f"--grammar-file={self.folder},--json-schema-file={self.folder}"
        validator = Validator([], self.table, opened=OpenedFlags.parse(files), share=share)
        return validator.resolve("m", Path("m.gguf"), Layer(), flags, body=body)

    def plain(self, look: Look) -> LlamaServer:
        """One without a flag of its own."""
        key = (look.model(), look.args)
        if key not in self._plain:
            self._plain[key] = self._kept.enter_context(self.started(look))
        return self._plain[key]

    def see_plain(self, look: Look, lifted: RequestDefaults) -> object:
        if not look.stays_busy:
            return look.see(self.plain(look), lifted)
        with self.started(look) as server:
            return look.see(server, lifted)

    def see_plain_without(self, look: Look) -> object:
        """What is seen where the flag is given nowhere."""
        if look not in self._seen_without:
            self._seen_without[look] = self.see_plain(look, NOTHING_LIFTED)
        return self._seen_without[look]

    def started(
        self, look: Look, flags: tuple[str, ...] = (), **environment: str
    ) -> contextlib.AbstractContextManager[LlamaServer]:
        port = free_port_range(1).partition("-")[0]
        small = ("-c", "1024", "--parallel", "1", "-t", "1", "--no-warmup")
        program, model = str(real_parts.llama_server_bin()), str(look.model())
        command = [program, "-m", model, "--port", port, *small, *look.args, *flags]
        log = self.folder / f"server-{next(self._names)}.log"
        clean = winsvc.child_environment(self.folder / "private", {})
        return started_server(command, int(port), log, clean | environment)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("flags")
    (folder / "a folder").mkdir()
    (folder / "private").mkdir()
    (folder / "a folder" / "yes.gbnf").write_text('# ü\nroot ::= "yes"\n', encoding="utf-8")
    schema = '{"type": "object", "properties": {"ü": {"const": "ä"}}, "required": ["ü"]}'
    (folder / "a folder" / "schema ü.json").write_text(schema + "\n", encoding="utf-8")
    with contextlib.ExitStack() as kept:
        yield Servers(folder, kept)


def assert_lifted_is_said(servers: Servers, flags: str, look: Look) -> None:
    """The same is seen from the command line and from the body, and something else without."""
    on_command_line = servers.resolved(flags, share=False, body=look.body).spec.args
    lifted = servers.resolved(flags, share=True, body=look.body)
    assert set(lifted.spec.args) <= {"--no-escape"}
    with servers.started(look, on_command_line) as flagged:
        said = look.see(flagged, NOTHING_LIFTED)
    assert servers.see_plain(look, lifted.defaults) == said
    assert servers.see_plain_without(look) != said


@pytest.mark.parametrize(("flags", "look"), SHOWN, ids=[flags for flags, _ in SHOWN])
def test_a_flag_says_the_same_on_the_command_line_and_in_the_body(
    servers: Servers, flags: str, look: Look
) -> None:
    assert_lifted_is_said(servers, flags, look)


@pytest.mark.parametrize(("flags", "look"), SHOWN_BY_NEWER)
def test_a_flag_that_only_newer_ones_know_says_the_same_or_is_refused(
    servers: Servers, flags: str, look: Look
) -> None:
    if servers.table.knows(flags.split()[0]):
        assert_lifted_is_said(servers, flags, look)
    else:
        with pytest.raises(FlagsRefused, match="a flag of other builds"):
            servers.resolved(flags, share=True)


def test_no_flag_that_travels_in_the_body_is_left_out_above() -> None:
    table = FlagTable.built_in()
    words = {word for flags, _ in (*SHOWN, *SHOWN_BY_NEWER) for word in shlex.split(flags)}
    shown = {table.spellings[word].flag.name for word in words if word in table.spellings}
    assert {flag.name for flag in table.flags if flag.body} - shown == set()


def test_a_json_schema_binds_a_chat_with_the_models_own_template(servers: Servers) -> None:
    """On the command line it makes b10068 and b11434 refuse each such chat with status 400."""
    lifted = servers.resolved("""--json-schema '{"enum": [1, 2]}'""", share=True).defaults
    message = servers.see_plain(Look(seen_message), lifted)
    assert isinstance(message, dict)
    assert message["content"] in ("1", "2")


def text_of_completion(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


def text_of_response(answer: Any) -> str:
    return "".join(part["text"] for item in answer["output"] for part in item["content"])


@pytest.mark.parametrize(
    ("path", "body", "text_of"),
    [
        ("/v1/completions", {"prompt": "Once upon", "max_tokens": 12}, text_of_completion),
        ("/v1/responses", {"input": "Hello.", "max_output_tokens": 12}, text_of_response),
    ],
)
@pytest.mark.parametrize(
    "flags",
    [
        "--temp 0 --logit-bias 28-100 --logit-bias 30+0.5 -r sentence",
        """--temp 0 --grammar 'root ::= "yes" | "no"'""",
        """--temp 0 --json-schema '{"enum": [1, 2]}'""",
        "--top-k 1 --repeat-penalty 1.4 --predict 5",
    ],
)
def test_flags_reach_the_other_routes(
    servers: Servers,
    flags: str,
    path: str,
    body: dict[str, object],
    text_of: Callable[[Any], str],
) -> None:
    def see(server: LlamaServer, lifted: RequestDefaults) -> object:
        answer = posted(server, path, body | {"cache_prompt": False, "seed": 3}, lifted)
        return text_of(answer)

    assert_lifted_is_said(servers, flags, Look(see, SHORT_TEMPLATE))


@pytest.mark.parametrize("field", ["temperature", "top_k", "seed"])
def test_null_in_the_body_counts_as_absent(servers: Servers, field: str) -> None:
    flags = "--temp 0.25 --top-k 5 --seed 11"
    lifted = servers.resolved(flags, share=True).defaults
    body = {"prompt": "Once", "n_predict": 1, field: None}
    plain = servers.plain(ANY_SETTING)
    with servers.started(ANY_SETTING, tuple(flags.split())) as flagged:
        said = posted(flagged, "/completion", body, NOTHING_LIFTED)["generation_settings"]
    assert posted(plain, "/completion", body, lifted)["generation_settings"] == said
    assert (said["temperature"], said["top_k"], said["seed"]) == (0.25, 5, 11)


def test_the_body_wins_over_a_flag(servers: Servers) -> None:
    flags = "--temp 0.25 --top-k 5 -r stop"
    lifted = servers.resolved(flags, share=True).defaults
    body = {"prompt": "Once", "n_predict": 1, "temperature": 0.5, "stop": ["end"]}
    plain = servers.plain(ANY_SETTING)
    with servers.started(ANY_SETTING, tuple(flags.split())) as flagged:
        said = posted(flagged, "/completion", body, NOTHING_LIFTED)["generation_settings"]
    assert posted(plain, "/completion", body, lifted)["generation_settings"] == said
    assert (said["temperature"], said["top_k"], said["stop"]) == (0.5, 5, ["end"])


def test_flags_reach_anthropic_messages(servers: Servers) -> None:
    flags = "--temp 0 --top-k 1 -r ,"
    lifted = servers.resolved(flags, share=True, body=Body.MESSAGES)
    assert lifted.spec.args == ()
    body = {"messages": HELLO, "max_tokens": 16}
    plain = servers.plain(ANY_SETTING)
    with servers.started(ANY_SETTING, ("--temp", "0", "--top-k", "1", "-r", ",")) as flagged:
        said = posted(flagged, "/v1/messages", body, NOTHING_LIFTED)["content"]
    assert posted(plain, "/v1/messages", body, lifted.defaults)["content"] == said
    (slot,) = plain.get("/slots")
    assert (slot["params"]["temperature"], slot["params"]["top_k"]) == (0, 1)


# --- what `check` prints starts


FLAG_SETS: list[tuple[str, str]] = [
    ("tiny", ""),
    ("tiny", "--ctx-size=0 --no-warmup"),
    ("tiny", "-c 2048 -b 64 -ub 32"),
    ("tiny", "-c 1024 -ctk q8_0 --flash-attn auto"),
    ("tiny", "--cache-type-k q4_0 --cache-type-v q4_0 -fa on"),
    ("tiny", "-ctk f32 -ctv bf16 -fa off"),
    ("tiny", "-fa --kv-unified --cache-ram 16"),
    ("tiny", "--cache-ram -1 --no-cache-idle-slots --ctx-checkpoints 0"),
    ("tiny", "--swa-full --context-shift --keep -1"),
    ("tiny", "--no-kv-offload --no-repack --no-op-offload"),
    ("tiny", "-ngl all --fit off"),
    ("tiny", "--gpu-layers=-1 --fit-target 512,256"),
    ("tiny", "-t 1 -tb 2 --poll 0 --poll-batch 1"),
    ("tiny", "--cpu-mask 0x1 --cpu-strict 1"),
    ("tiny", "-Cr 0-0 -Crb 0-1 --cpu-strict-batch 0"),
    ("tiny", "--rope-scaling yarn --rope-scale 2 --yarn-orig-ctx 16384"),
    ("tiny", "--rope-freq-base 5e5 --rope-freq-scale .5"),
    ("tiny", "--yarn-ext-factor -1 --yarn-attn-factor 1.0 --yarn-beta-slow -1"),
    ("tiny", "--spec-type ngram-simple --spec-ngram-simple-size-n 4 --spec-draft-n-max 8"),
    ("tiny", "--spec-type ngram-mod,ngram-map-k --spec-ngram-mod-n-match 12"),
    ("tiny", "--spec-default"),
    ("tiny", "--temp 0 --top-k 1 --seed -1 --repeat-penalty 1.1"),
    ("tiny", "--samplers 'top_k;temperature' --min-p 0.02 --top-nsigma -1"),
    ("tiny", "--mirostat 2 --mirostat-lr 0.1 --mirostat-ent 5 -c 768"),
    ("tiny", "--dry-multiplier 0.8 --dry-sequence-breaker none"),
    ("tiny", "--logit-bias 5-100 --logit-bias 7+1.5 --ignore-eos"),
    ("tiny", """-r 'User: ' -r "it's" --no-escape"""),
    ("tiny", r"-r 'a\x0b' --escape --special"),
    ("tiny", """--grammar 'root ::= "one" | "a b"'"""),
    ("tiny", r"""--json-schema '{ "type": "object", "title": "a \\ b, ü" }' -c 640"""),
    ("tiny", """--chat-template-kwargs '{"enable_thinking": false, "who": "Jürgen"}'"""),
    ("tiny", """--chat-template "{% for m in messages %}{{ m['content'] }} {% endfor %}" """),
    ("tiny", "--chat-template chatml --no-prefill-assistant --skip-chat-parsing"),
    ("tiny", "--reasoning off --reasoning-format deepseek --reasoning-budget 64"),
    ("tiny", "--chat-template-file 'a folder/plän é.jinja' --jinja"),
    ("umlauts", "-c 512 --chat-template-file 'a folder/plän é.jinja'"),
    ("umlauts", r"--override-tensor 'blk\.0\.ffn_.*=CPU' --n-cpu-moe 1"),
    ("smollm2", "-c 4096 -ctk q8_0 -ctv q8_0 --spec-type ngram-cache --no-mmap"),
    ("embedder", "--embd-normalize -1 -ub 256 -b 256"),
    ("many-slots", "-b 16 --no-cont-batching --no-kv-unified"),
]


@dataclasses.dataclass(frozen=True)
class Checked:
    """What `check` printed, and what the real server told of itself."""

    printed: dict[str, Any]
    text: str
    props: dict[str, Any]


class Checker:
    """Checks flag sets and starts what is printed, each on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("modèle ü x", "a folder", "private"):
            (folder / name).mkdir()
        model = folder / "modèle ü x" / "zähler, klein.gguf"
        model.write_bytes(real_parts.tiny().read_bytes())
        template = "{% for m in messages %}ü {{ m.content }}{% endfor %}"
        (folder / "a folder" / "plän é.jinja").write_text(template, encoding="utf-8")
        tiny = str(real_parts.tiny())
        self.models: dict[str, object] = {
            "tiny": tiny,
            "umlauts": {"path": str(model)},
            "smollm2": str(real_parts.smollm2()),
            "embedder": {"path": tiny, "args": ["--embedding", "--pooling", "mean"]},
            "many-slots": {"path": tiny, "args": ["--parallel", "8", "-c", "4096"]},
        }
        self.first_port = int(free_port_range(len(FLAG_SETS)).partition("-")[0])

    def checked(self, number: int) -> Checked:
        model, flags = FLAG_SETS[number]
        port = self.first_port + number
        printed = json.loads(self._check(port, "--model", model, "--flags", flags, "--json"))
        text = self._check(port, "--model", model, "--flags", flags)
        environment = winsvc.child_environment(self.folder / "private", {})
        log = self.folder / f"{number}.log"
        with started_server(printed["command"], port, log, environment) as server:
            return Checked(printed, text, server.get("/props"))

    def _check(self, port: int, *args: str) -> str:
        folder = self.folder / str(port)
        folder.mkdir(exist_ok=True)
        chosen = settings(
            folder,
            self.models,
            PORT_RANGE=f"{port}-{port}",
            MAX_SIDECARS="1",
            LLAMA_SIDECAR_AGENT_FLAGS=f"--chat-template-file={self.folder}",
            PYTHONUTF8="1",
        )
        command = [sys.executable, str(ROOT / "llama_sidecar.py"), "check", *args]
        done = subprocess.run(
            command, env=chosen, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Future[Checked]]]:
    """All flag sets, a few at a time; each result is a test's own to ask for."""
    checker = Checker(tmp_path_factory.mktemp("checks"))
    with ThreadPoolExecutor(3) as threads:
        yield [threads.submit(checker.checked, number) for number in range(len(FLAG_SETS))]


@pytest.mark.parametrize(
    "number", range(len(FLAG_SETS)), ids=[f"{model} {flags}" for model, flags in FLAG_SETS]
)
def test_what_check_prints_starts(checks: list[Future[Checked]], number: int) -> None:
    checked = checks[number].result(timeout=100)
    command = checked.printed["command"]
    assert checked.props["model_alias"] == FLAG_SETS[number][0]
    assert checked.props["model_path"] == command[command.index("-m") + 1]
    (line,) = [line for line in checked.text.splitlines() if line.startswith("command ")]
    assert shlex.split(line)[1:] == command


# --- what reaches the children of a daemon, and what does not


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]


def own_props(row: Mapping[str, Any]) -> Any:
    """What the llama-server behind this row of /sidecars says of itself."""
    environment = environment_of(row["pid"])
    connection = HTTPConnection("127.0.0.1", row["port"], timeout=20)
    with contextlib.closing(connection):
        key = {"Authorization": f"Bearer {environment['LLAMA_API_KEY']}"}
        connection.request("GET", "/props", headers=key)
        return json.loads(connection.getresponse().read())


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def test_the_default_base_args_are_what_the_real_server_runs_with(tmp_path: Path) -> None:
    with started_daemon(settings(tmp_path, {"tiny": str(real_parts.tiny())}), tmp_path) as daemon:
        status, headers, _ = daemon.chat("tiny", max_tokens=3)
        assert status == 200
        row = sidecar(daemon, headers)
        given = "--ctx-size 32768 --flash-attn on --gpu-layers 999"
        assert given in " ".join(command_of(row["pid"]))
        assert " ".join(command_of(row["pid"])[-len(row["args"]) :]) == " ".join(row["args"])
        assert own_props(row)["default_generation_settings"]["n_ctx"] == 32768
        assert daemon.stop() == 0


STRAY = {
    "LLAMA_ARG_PORT": "1",
    "LLAMA_ARG_HOST": "0.0.0.0",
    "LLAMA_ARG_CTX_SIZE": "256",
    "LLAMA_ARG_TOP_K": "4",
    "LLAMA_ARG_ALIAS": "stranger",
    "LLAMA_API_KEY": "not the daemon's",
    "LLAMA_SERVER_ROUTER_PORT": "1",
    "AIP_MODE": "PREDICTION",
    "AIP_HTTP_PORT": "1",
    "HF_TOKEN": "secret",
    "GGML_BACKEND_PATH": "/nowhere",
    "GGML_VK_VISIBLE_DEVICES": "7",
}


def test_variables_and_files_of_the_user_do_not_reach_a_child(tmp_path: Path) -> None:
    (tmp_path / "home" / "llama.cpp").mkdir(parents=True)
    (tmp_path / "home" / "llama.cpp" / "config.ini").write_text("[*]\ntop-k = 3\n")
    stray = STRAY | {"XDG_CONFIG_HOME": str(tmp_path / "home")}
    chosen = settings(tmp_path, {"tiny": str(real_parts.tiny())}, BASE_ARGS='["-c","512"]')
    with started_daemon(stray | chosen, tmp_path) as daemon:
        status, headers, body = daemon.chat("tiny", max_tokens=3)
        assert (status, body["model"]) == (200, "tiny")
        row = sidecar(daemon, headers)
        environment = environment_of(row["pid"])
        assert {name for name in stray if name in environment} == {
            "LLAMA_API_KEY",
            "XDG_CONFIG_HOME",
        }
        assert environment["LLAMA_API_KEY"] != stray["LLAMA_API_KEY"]
        assert list(Path(environment["XDG_CONFIG_HOME"]).iterdir()) == []
        props = own_props(row)
        assert props["default_generation_settings"]["params"]["top_k"] == 40
        assert props["default_generation_settings"]["n_ctx"] == 512
        assert daemon.stop() == 0


def test_such_a_variable_would_have_had_an_effect(servers: Servers) -> None:
    with servers.started(PROMPT, LLAMA_ARG_ALIAS="stranger") as server:
        assert server.get("/props")["model_alias"] == "stranger"


# --- agents that share


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("shared")
    models: dict[str, object] = {"tiny": str(real_parts.tiny())}
    chosen = settings(folder, models, BASE_ARGS='["-c","1024","-t","1"]', MAX_SIDECARS="8")
    with started_daemon(chosen, folder) as daemon:
        yield daemon


def settings_of_a_chat(
    daemon: Daemon, flags: str, **headers: str
) -> tuple[str, int, dict[str, Any]]:
    """How its server was come by, the server's pid, and what it generated with."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, "verbose": True}
    named = {"X-Agent-Flags": flags} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    status, answered, answer = daemon.ask("POST", CHAT, body, named)
    assert status == 200, answer
    generated_with = answer["__verbose"]["generation_settings"]
    return answered["x-sidecar-start"], sidecar(daemon, answered)["pid"], generated_with


def test_agents_with_other_temperatures_share_one_process(shared: Daemon) -> None:
    agents = [f"-c 896 --temp {temperature}" for temperature in (0.25, 0.75, 1.5)]
    seen = [settings_of_a_chat(shared, flags) for flags in agents]
    assert [start for start, _, _ in seen] == ["started", "reused", "reused"]
    assert len({pid for _, pid, _ in seen}) == 1
    assert [each["temperature"] for _, _, each in seen] == [0.25, 0.75, 1.5]


def test_agents_that_share_at_once_keep_their_own_settings(shared: Daemon) -> None:
    temperatures = [number / 8 for number in range(1, 9)]
    with ThreadPoolExecutor(4) as threads:
        agents = (f"-c 832 --temp {temperature} --top-k 9" for temperature in temperatures)
        seen = list(threads.map(lambda flags: settings_of_a_chat(shared, flags), agents))
    assert len({pid for _, pid, _ in seen}) == 1
    assert [each["temperature"] for _, _, each in seen] == temperatures


def test_a_larger_context_serves_a_smaller_one_unless_exactly_it_is_asked_for(
    shared: Daemon,
) -> None:
    larger = settings_of_a_chat(shared, "-c 2048 --no-escape")
    smaller = settings_of_a_chat(shared, "-c 1536 --no-escape --temp 0.5")
    exact = settings_of_a_chat(shared, "-c 1536 --no-escape", X_Sidecar_Exact="1")
    again = settings_of_a_chat(shared, "-c 1536 --no-escape")
    assert [larger[0], smaller[0], exact[0], again[0]] == ["started", "reused"] * 2
    assert smaller[1] == larger[1]
    assert exact[1] == again[1] != larger[1]
    assert smaller[2]["temperature"] == 0.5
    assert {larger[1], exact[1]} <= {row["pid"] for row in shared.sidecars()}


def test_another_cache_type_is_no_larger_context(shared: Daemon) -> None:
    larger = settings_of_a_chat(shared, "-c 2048 -ctk q8_0")
    other = settings_of_a_chat(shared, "-c 1536 -ctk q5_0")
    assert (larger[0], other[0]) == ("started", "started")
    assert larger[1] != other[1]
