"""What an agent's flags say of a request: which go into its body, and how the body takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import validator
from validator import (
    Body,
    FlagTable,
    JsonObject,
    OpenedFlags,
    RequestDefaults,
    Resolved,
    SidecarSpec,
    Validator,
)

EXAMPLES = settings(max_examples=500, derandomize=True, deadline=None)
MODEL = Path("/models/m.gguf")
BUILT_IN = FlagTable.built_in()
REQUEST_LEVEL = {flag.name: flag for flag in BUILT_IN.flags if flag.body}
GRAMMAR = 'root ::= "ja" | "nein"\n'
SCHEMA = '{"type": "object"}'


def resolved(
    header: str,
    base: Sequence[str] = (),
    *,
    model: Sequence[str] = (),
    body: Body = Body.COMPLETION,
    opened: OpenedFlags | None = None,
    share: bool = True,
    owner: str = "",
) -> Resolved:
    subject = Validator(base, opened=opened, share=share)
    return subject.resolve("m", MODEL, subject.model_args(model), header, body=body, owner=owner)


def carried(header: str, base: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """The fields that a request is given, parsed."""
    fields = resolved(header, base, **options).defaults.fields
    return {name: json.loads(text) for name, text in fields.items()}


def kept(header: str, base: Sequence[str] = (), **options: Any) -> str:
    """The flags of the process."""
    return " ".join(resolved(header, base, **options).spec.args)


@pytest.fixture
def opened(tmp_path: Path) -> OpenedFlags:
    (tmp_path / "g").write_text(GRAMMAR)
    (tmp_path / "s").write_text(SCHEMA)
    text = f"--grammar-file={tmp_path},--json-schema-file={tmp_path}"
    return OpenedFlags.parse(text)


# --- each flag and its field

# A header, the field, and its value as it is written in JSON.
FIELDS = [
    ("--predict 64", "n_predict", "64"),
    ("-n -1", "n_predict", "-1"),
    ("--keep -1", "n_keep", "-1"),
    ("--reverse-prompt User:", "stop", '["User:"]'),
    ("-r a -r 'b c'", "stop", '["a","b c"]'),
    ("--samplers top_k;temperature", "samplers", '["top_k", "temperature"]'),
    ("--samplers top_p", "samplers", '["top_p"]'),
    ("--seed 123", "seed", "123"),
    ("--seed -1", "seed", "4294967295"),
    ("--seed 4294967295", "seed", "4294967295"),
    ("--sampler-seq kt", "samplers", '"kt"'),
    ("--samplers top_k --sampler-seq kt", "samplers", '"kt"'),
    ("--sampler-seq kt --samplers top_k", "samplers", '["top_k"]'),
    ("--ignore-eos", "ignore_eos", "true"),
    ("--temp 0.70", "temperature", "0.7"),
    ("--temp 1", "temperature", "1"),
    ("--temp .00001", "temperature", "1e-05"),
    ("--top-k 20", "top_k", "20"),
    ("--top-p 0.9", "top_p", "0.9"),
    ("--min-p 0", "min_p", "0"),
    ("--top-nsigma -1", "top_n_sigma", "-1"),
    ("--xtc-probability 0.5", "xtc_probability", "0.5"),
    ("--xtc-threshold 0.1", "xtc_threshold", "0.1"),
    ("--typical 0.95", "typical_p", "0.95"),
    ("--repeat-last-n 64", "repeat_last_n", "64"),
    ("--repeat-penalty 1.1", "repeat_penalty", "1.1"),
    ("--presence-penalty 0.5", "presence_penalty", "0.5"),
    ("--frequency-penalty -0.5", "frequency_penalty", "-0.5"),
    ("--dry-multiplier 0.8", "dry_multiplier", "0.8"),
    ("--dry-base 1.75", "dry_base", "1.75"),
    ("--dry-allowed-length 2", "dry_allowed_length", "2"),
    ("--dry-penalty-last-n 256", "dry_penalty_last_n", "256"),
    ("--dry-sequence-breaker x", "dry_sequence_breakers", '["x"]'),
    (
        r"--dry-sequence-breaker '\n' --dry-sequence-breaker :",
        "dry_sequence_breakers",
        r'["\n",":"]',
    ),
    ("--adaptive-target 0.5", "adaptive_target", "0.5"),
    ("--adaptive-decay 0.9", "adaptive_decay", "0.9"),
    ("--dynatemp-range 0.5", "dynatemp_range", "0.5"),
    ("--dynatemp-exp 1.5", "dynatemp_exponent", "1.5"),
    ("--mirostat 2", "mirostat", "2"),
    ("--mirostat-lr 0.1", "mirostat_eta", "0.1"),
    ("--mirostat-ent 5", "mirostat_tau", "5"),
    ("--logit-bias 15+1.5", "logit_bias", "[[15,1.5]]"),
    ("-l 15-1.5 -l 007+2 -l 8--3 -l 9-0", "logit_bias", "[[15,-1.5],[7,2],[8,3],[9,0]]"),
    ("--grammar 'root ::= \"é\"'", "grammar", r'"root ::= \"\u00e9\""'),
    ("--grammar-file g", "grammar", json.dumps(GRAMMAR)),
    ('--json-schema \'{ "type": "object" }\'', "json_schema", '{"type":"object"}'),
    ("--json-schema-file s", "json_schema", SCHEMA),
    ("--backend-sampling", "backend_sampling", "true"),
    ("--chat-template-kwargs '{\"a\": [1, 2]}'", "chat_template_kwargs", '{"a":[1,2]}'),
    ("--sse-ping-interval -1", "sse_ping_interval", "-1"),
    ("--cache-prompt", "cache_prompt", "true"),
    ("--no-cache-prompt", "cache_prompt", "false"),
    ("--cache-prompt --no-cache-prompt", "cache_prompt", "false"),
    ("--cache-reuse 256", "n_cache_reuse", "256"),
    ("--reasoning-format deepseek", "reasoning_format", '"deepseek"'),
    ("--reasoning on", "chat_template_kwargs", '{"enable_thinking":true}'),
    ("-rea off", "chat_template_kwargs", '{"enable_thinking":false}'),
    ("--reasoning 0", "chat_template_kwargs", '{"enable_thinking":false}'),
    ("--reasoning-effort high", "reasoning_effort", '"high"'),
    ("--reasoning-budget 512", "reasoning_budget_tokens", "512"),
    ("--reasoning-budget 0", "reasoning_budget_tokens", "0"),
    ("--reasoning-budget-message 'Enough.'", "reasoning_budget_message", '"Enough."'),
    ("--reasoning-preserve", "chat_template_kwargs", '{"preserve_reasoning":true}'),
    ("--no-reasoning-preserve", "chat_template_kwargs", '{"preserve_reasoning":false}'),
    ("--temp 0.1 --temp 0.2", "temperature", "0.2"),
]


@pytest.mark.parametrize(("header", "field", "text"), FIELDS)
def test_a_request_level_flag_becomes_a_field_and_leaves_the_command_line(
    opened: OpenedFlags, header: str, field: str, text: str
) -> None:
    found = resolved(header, opened=opened)
    assert dict(found.defaults.fields) == {field: text}
    assert json.loads(text) is not None
    assert found.spec.args == found.spec.identity == ()


@pytest.mark.parametrize(
    ("header", "text"), [("--embd-normalize 2", "2"), ("--embd-normalize -1", "-1")]
)
def test_how_embeddings_are_normalized_goes_into_their_requests(header: str, text: str) -> None:
    found = resolved(header, body=Body.EMBEDDING)
    assert dict(found.defaults.fields) == {"embd_normalize": text}
    assert found.spec.args == ()


def test_every_request_level_flag_of_the_table_is_tried_here() -> None:
    words = [word for header, *_ in FIELDS for word in header.split()]
    tried = {flag.name for word in words if (flag := BUILT_IN.flag(word))}
    assert set(REQUEST_LEVEL) - tried == {"--embd-normalize"}


def test_every_field_is_one_that_the_table_names() -> None:
    named = {str(flag.body).partition(".")[0] for flag in REQUEST_LEVEL.values()}
    assert {field for _, field, _ in FIELDS} == named - {"embd_normalize"}


@pytest.mark.parametrize(
    "header", ["-c 8192", "--flash-attn on", "--chat-template x", "--no-escape"]
)
def test_other_flags_stay_on_the_command_line(header: str) -> None:
    found = resolved(header)
    assert not found.defaults
    assert found.spec.args


def test_several_flags_travel_together() -> None:
    header = "--temp 0.5 -c 4096 --top-k 20 --reasoning off --chat-template-kwargs '{\"a\":1}'"
    kwargs = {"enable_thinking": False, "a": 1}
    assert carried(header) == {"temperature": 0.5, "top_k": 20, "chat_template_kwargs": kwargs}
    assert kept(header) == "--ctx-size 4096"


# --- what a request cannot say, and what need not be said

UNSAYABLE = [
    "--reasoning-effort none",
    "--reasoning-effort ''",
    "--dry-sequence-breaker none",
    "--dry-sequence-breaker ''",
    "--dry-sequence-breaker x --dry-sequence-breaker none",
    "--reverse-prompt ''",
    "--reverse-prompt x --reverse-prompt ''",
    "--samplers top_k;nonsense",
    "--samplers top-k",
    "--samplers ''",
    r"--reverse-prompt '\xff'",
    r"--reverse-prompt '\xc3'",
    r"--reverse-prompt '\xg'",
    r"--dry-sequence-breaker '\x4'",
]


@pytest.mark.parametrize("header", UNSAYABLE)
def test_what_a_request_cannot_say_stays_on_the_command_line(header: str) -> None:
    found = resolved(header)
    assert not found.defaults
    assert found.spec == resolved(header, share=False).spec
    assert found.spec.args


def test_one_value_that_cannot_be_said_leaves_the_other_flags_movable() -> None:
    header = "--reverse-prompt '' --temp 0.5 --reverse-prompt x"
    assert carried(header) == {"temperature": 0.5}
    assert resolved(header).spec.args == ("--reverse-prompt", "", "--reverse-prompt", "x")


@pytest.mark.parametrize(
    "header", ["--reasoning auto", "--reasoning-effort default", "--reasoning-budget -1"]
)
def test_the_default_is_said_by_saying_nothing(header: str) -> None:
    assert resolved(header).spec == resolved("").spec
    assert not resolved(header).defaults


# --- escapes in stop texts


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n", "\n"),
        (r"\r\t", "\r\t"),
        (r"\\n", r"\n"),
        (r"\x41", "A"),
        (r"\x41B", "AB"),
        (r"\xc3\xa9", "é"),
        (r"\q", r"\q"),
        (r"é\n", "é\n"),
        ("a\\", "a\\"),
        ("plain", "plain"),
    ],
)
def test_escapes_are_read_unless_switched_off(written: str, meant: str) -> None:
    for flag, field in (("-r", "stop"), ("--dry-sequence-breaker", "dry_sequence_breakers")):
        header = f"{flag} '{written}'"
        assert carried(header) == {field: [meant]}
        assert carried(f"{header} --escape") == {field: [meant]}
        assert carried(f"--no-escape {header}") == {field: [written]}
        assert carried(header, ["--no-escape"]) == {field: [written]}
        assert carried(header, model=["--no-escape"]) == {field: [written]}
        assert carried(f"--escape {header}", ["--no-escape"]) == {field: [meant]}
        assert carried(f"--no-escape --escape {header}") == {field: [meant]}


@pytest.mark.parametrize("text", [r"\xff", r"\xg"])
def test_without_escapes_every_text_can_be_said(text: str) -> None:
    assert carried(f"--no-escape -r '{text}'") == {"stop": [text]}


def test_escapes_mean_nothing_in_other_texts() -> None:
    assert carried(r"--reasoning-budget-message 'a\n'") == {"reasoning_budget_message": r"a\n"}


# --- what the chat template is told, in the order it was said

THINK = "--chat-template-kwargs '{\"enable_thinking\":true}'"
EFFORT = '--chat-template-kwargs \'{"reasoning_effort":"low"}\''


@pytest.mark.parametrize(
    ("header", "fields"),
    [
        (f"--reasoning off {THINK}", {"chat_template_kwargs": {"enable_thinking": True}}),
        (f"{THINK} --reasoning off", {"chat_template_kwargs": {"enable_thinking": False}}),
        (f"{THINK} --reasoning auto", {"chat_template_kwargs": {"enable_thinking": True}}),
        (
            f"{THINK} --no-reasoning-preserve",
            {"chat_template_kwargs": {"enable_thinking": True, "preserve_reasoning": False}},
        ),
        (
            f"{THINK} {EFFORT}",
            {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"}},
        ),
        (
            f"{EFFORT} --reasoning-effort high",
            {"chat_template_kwargs": {}, "reasoning_effort": "high"},
        ),
        (f"{EFFORT} --reasoning-effort default", {"chat_template_kwargs": {}}),
        (
            f"--reasoning-effort high {EFFORT}",
            {"chat_template_kwargs": {"reasoning_effort": "low"}},
        ),
    ],
)
def test_the_later_word_to_the_chat_template_wins(header: str, fields: dict[str, object]) -> None:
    assert carried(header) == fields


@pytest.mark.parametrize(
    ("header", "args"),
    [
        (f"{EFFORT} --reasoning-effort none", '{"reasoning_effort":"low"} --reasoning-effort none'),
        (
            f"--reasoning off {THINK} --reasoning-effort none",
            '{"enable_thinking":true} --reasoning-effort none',
        ),
    ],
)
def test_where_one_word_stays_those_whose_order_counts_stay_with_it(header: str, args: str) -> None:
    assert carried(header) == {}
    assert kept(header).endswith(f"--chat-template-kwargs {args}")


# --- files that were opened to agents


@pytest.mark.parametrize(
    "make_it",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff"),
        lambda file: file.write_bytes(b"{" + b" " * validator.MAX_LIFTED_FILE_BYTES + b"}"),
    ],
    ids=["empty", "not UTF-8", "too large"],
)
@pytest.mark.parametrize(("flag", "name"), [("--grammar-file", "g"), ("--json-schema-file", "s")])
def test_a_file_that_cannot_travel_stays_a_name(
    opened: OpenedFlags, tmp_path: Path, make_it: Callable[[Path], object], flag: str, name: str
) -> None:
    make_it(tmp_path / name)
    found = resolved(f"{flag} {name}", opened=opened)
    assert not found.defaults
    assert found.spec.args == (flag, str((tmp_path / name).resolve()))


@pytest.mark.parametrize("text", ["[]", "{", "{} {}", "nonsense", '{"a": NaN}'])
def test_a_schema_file_that_is_no_json_object_stays_a_name(
    opened: OpenedFlags, tmp_path: Path, text: str
) -> None:
    (tmp_path / "s").write_text(text)
    assert kept("--json-schema-file s", opened=opened).startswith("--json-schema-file ")
    assert carried("--json-schema-file s", opened=opened) == {}


def test_the_largest_file_that_travels_is_sent_whole(opened: OpenedFlags, tmp_path: Path) -> None:
    text = "#" * validator.MAX_LIFTED_FILE_BYTES
    (tmp_path / "g").write_text(text)
    assert carried("--grammar-file g", opened=opened) == {"grammar": text}


def test_a_file_is_read_for_each_request(opened: OpenedFlags, tmp_path: Path) -> None:
    subject = Validator([], opened=opened)
    layer = subject.model_args([])
    texts = []
    for text in ("one", "two"):
        (tmp_path / "g").write_text(text)
        found = subject.resolve("m", MODEL, layer, "--grammar-file g")
        texts.append(found.defaults.fields["grammar"])
    assert texts == ['"one"', '"two"']


@pytest.mark.parametrize(
    ("header", "fields"),
    [
        ("--grammar x --grammar-file g", {"grammar": GRAMMAR}),
        ("--grammar-file g --json-schema '{}'", {"json_schema": {}}),
        ("--json-schema '{}' --json-schema-file s", {"json_schema": json.loads(SCHEMA)}),
    ],
)
def test_of_what_constrains_the_answer_the_last_counts(
    opened: OpenedFlags, header: str, fields: dict[str, object]
) -> None:
    assert carried(header, opened=opened) == fields


# --- kinds of bodies

SAYS_MUCH = (
    "--temp 0.5 --top-k 20 --min-p 0.1 -r x --reasoning off --embd-normalize 2 -c 4096 -n 64"
)
KINDS: dict[Body, tuple[dict[str, object], str]] = {
    Body.COMPLETION: (
        {
            "temperature": 0.5,
            "top_k": 20,
            "min_p": 0.1,
            "stop": ["x"],
            "chat_template_kwargs": {"enable_thinking": False},
            "n_predict": 64,
        },
        "--ctx-size 4096",
    ),
    Body.MESSAGES: (
        {
            "temperature": 0.5,
            "top_k": 20,
            "stop_sequences": ["x"],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "--ctx-size 4096 --min-p 0.1 --predict 64",
    ),
    Body.EMBEDDING: ({"embd_normalize": 2}, "--ctx-size 4096"),
    Body.RANKING: ({}, "--ctx-size 4096"),
    Body.FORM: (
        {},
        "--ctx-size 4096 --min-p 0.1 --predict 64 --reasoning off -r x --temp 0.5 --top-k 20",
    ),
}


@pytest.mark.parametrize("body", Body)
def test_what_a_kind_of_body_carries_and_what_it_leaves_to_the_process(body: Body) -> None:
    fields, args = KINDS[body]
    assert carried(SAYS_MUCH, body=body) == fields
    assert kept(SAYS_MUCH, body=body).replace("--reverse-prompt", "-r") == args


@pytest.mark.parametrize("name", sorted(REQUEST_LEVEL))
def test_what_an_anthropic_body_cannot_carry_stays(opened: OpenedFlags, name: str) -> None:
    header = next((h for h, *_ in FIELDS if h.split()[0] == name), f"{name} 2")
    found = resolved(header, body=Body.MESSAGES, opened=opened)
    known = {"--temp", "--top-p", "--top-k", "--reverse-prompt", "--chat-template-kwargs"}
    known |= {"--reasoning", "--reasoning-preserve"}
    is_nothing = name == "--embd-normalize"
    assert bool(found.defaults) == (name in known)
    assert bool(found.spec.args) == (name not in known and not is_nothing)


# --- operators and agents


def test_an_operators_flags_stay_and_an_agents_go_into_the_request() -> None:
    base, model = ["--temp", "0.7", "-c", "4096"], ["--top-k", "40", "--temp", "0.8"]
    header = "--temp 0.5 --top-k 20"
    assert carried(header, base, model=model) == {"temperature": 0.5, "top_k": 20}
    assert kept(header, base, model=model) == "--ctx-size 4096 --temp 0.8 --top-k 40"
    assert carried("", base, model=model) == {}


# The operator's words, the agent's, what the request says and what the process is told.
OVER_OPERATORS: list[tuple[list[str], str, dict[str, object], str]] = [
    (["--reasoning", "on"], "--reasoning auto", {}, "--reasoning auto"),
    (["--reasoning-budget", "9"], "--reasoning-budget -1", {}, "--reasoning-budget -1"),
    (["--reasoning-effort", "low"], "--reasoning-effort default", {}, "--reasoning-effort default"),
    (
        ["--reasoning", "on"],
        "--reasoning off",
        {"chat_template_kwargs": {"enable_thinking": False}},
        "--reasoning on",
    ),
    (
        ["--chat-template-kwargs", '{"a":1}'],
        "--chat-template-kwargs '{\"b\":2}'",
        {},
        '--chat-template-kwargs {"b":2}',
    ),
    (
        ["--chat-template-kwargs", '{"a":1}'],
        "--reasoning off",
        {"chat_template_kwargs": {"enable_thinking": False}},
        '--chat-template-kwargs {"a":1}',
    ),
    (
        ["--chat-template-kwargs", '{"reasoning_effort":"low"}'],
        "--reasoning-effort default",
        {},
        '--chat-template-kwargs {"reasoning_effort":"low"} --reasoning-effort default',
    ),
    (
        ["--chat-template-kwargs", '{"reasoning_effort":"low"}'],
        "--reasoning-effort high",
        {"reasoning_effort": "high"},
        '--chat-template-kwargs {"reasoning_effort":"low"}',
    ),
    (
        ["--chat-template-kwargs", '{"a":1}'],
        "--reasoning on --chat-template-kwargs '{\"enable_thinking\":false}'",
        {},
        '--reasoning on --chat-template-kwargs {"enable_thinking":false}',
    ),
    (["--json-schema", "{}"], "--grammar x", {}, "--grammar x"),
    (["--grammar", "y"], "--json-schema {}", {}, "--json-schema {}"),
    (["--grammar", "y"], "--grammar x", {"grammar": "x"}, "--grammar y"),
    (["--sampler-seq", "kt"], "--samplers top_k", {"samplers": ["top_k"]}, "--sampler-seq kt"),
    (["--ignore-eos"], "--logit-bias 5+1", {}, "--ignore-eos --logit-bias 5+1"),
    (["--logit-bias", "5+1"], "--logit-bias 6+1", {"logit_bias": [[6, 1]]}, "--logit-bias 5+1"),
    (["--reverse-prompt", "a"], "--reverse-prompt b", {"stop": ["b"]}, "--reverse-prompt a"),
    (["--reverse-prompt", "a"], "--reverse-prompt ''", {}, "--reverse-prompt "),
    (["--no-cache-prompt"], "--cache-prompt", {"cache_prompt": True}, "--no-cache-prompt"),
]


@pytest.mark.parametrize(("base", "header", "fields", "args"), OVER_OPERATORS)
def test_what_would_show_through_of_an_operators_flag_is_replaced_on_the_command_line(
    base: list[str], header: str, fields: dict[str, object], args: str
) -> None:
    assert (carried(header, base), kept(header, base)) == (fields, args)
    assert (carried(header, model=base), kept(header, model=base)) == (fields, args)


# --- one process or several


def spec(header: str, **options: Any) -> SidecarSpec:
    return resolved(header, **options).spec


def test_agents_that_differ_in_their_requests_share_a_process() -> None:
    headers = ["", "--temp 0.1", "--temp 0.9 --top-k 3", "--grammar x --reasoning off"]
    assert len({spec(header).hash for header in headers}) == 1
    assert len({spec(header, share=False).hash for header in headers}) == len(headers)
    assert carried("--temp 0.1", share=False) == {}
    assert kept("--temp 0.1", share=False) == "--temp 0.1"


def test_an_owner_has_a_process_for_itself() -> None:
    shared, ann, bob = (spec("-c 4096", owner=owner) for owner in ("", "ann", "bob"))
    assert len({shared.hash, ann.hash, bob.hash}) == 3
    assert ann.hash == spec("-c 4096 --temp 1", owner="ann").hash
    assert shared.args == ann.args == bob.args


def test_an_owner_is_not_mistaken_for_a_flag() -> None:
    written = SidecarSpec("m", MODEL, (), ("-r", "", "ann"))
    assert (
        SidecarSpec("m", MODEL, (), ("-r",), owner="ann").hash
        != SidecarSpec("m", MODEL, (), ("-r", "ann")).hash
    )
    assert written.hash != SidecarSpec("m", MODEL, (), (), owner="ann").hash


@pytest.mark.parametrize(
    ("ours", "theirs", "serves"),
    [
        ("-c 8192", "-c 4096", True),
        ("-c 8192 --temp 1", "-c 4096 --temp 2", True),
        ("-c 8192 --mlock", "--mlock -c 4096", True),
        ("-c 4096", "-c 8192", False),
        ("-c 4096", "-c 4096", False),
        ("-c 8192 --mlock", "-c 4096", False),
        ("-c 8192", "-c 4096 --mlock", False),
        ("-c 8192", "", False),
        ("-c 8192", "-c 0", False),
        ("-c 0", "-c 4096", False),
        ("", "-c 4096", False),
    ],
)
def test_a_larger_context_serves_a_smaller_one(ours: str, theirs: str, serves: bool) -> None:
    assert spec(ours).can_serve(spec(theirs)) is serves


def test_no_process_serves_another_model_or_another_owner() -> None:
    large, small = spec("-c 8192"), spec("-c 4096")
    other = SidecarSpec("other", MODEL, small.args, small.identity, small.kin, small.context)
    assert not large.can_serve(other)
    ann = {"owner": "ann"}
    assert not large.can_serve(spec("-c 4096", **ann))
    assert not spec("-c 8192", **ann).can_serve(small)
    assert spec("-c 8192", **ann).can_serve(spec("-c 4096", **ann))


def test_the_context_is_taken_from_whoever_had_the_last_word() -> None:
    base = {"base": ["-c", "32768"], "model": ["-c", "16384", "--mlock"]}
    assert (spec("", **base).context, spec("-c 8192", **base).context) == (16384, 8192)
    assert spec("", **base).kin == spec("-c 8192", **base).kin == ("--mlock",)


# --- remarks


def test_a_remark_says_what_became_something_else() -> None:
    help_text = "--load-mode MODE    how\n--temp N    how hot\n"
    subject = Validator(["--no-mmap"], BUILT_IN.for_binary(help_text))
    layer = subject.model_args(["--mlock"])
    found = subject.resolve("m", MODEL, layer, "--direct-io --temp 0.5")
    assert [remark.split(" for ")[0] for remark in found.remarks] == [
        "--no-mmap is --load-mode none",
        "--mlock is --load-mode mlock",
        "--direct-io is --load-mode dio",
    ]


def test_a_flag_that_is_left_off_is_remarked() -> None:
    found = resolved("--tags a,b --temp 0.5 -c 4096")
    assert found.remarks == ("--tags changes no answer and is left off.",)
    assert resolved("--temp 0.5 -c 4096").remarks == ()


# --- the body takes what it lacks


def applied(body: str, **fields: object) -> str:
    texts = {name: json.dumps(value) for name, value in fields.items()}
    return RequestDefaults(texts).applied_to(JsonObject(body))


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("temperature", '{"temperature": 0}'),
        ("temperature", '{"temperature": "hot"}'),
        ("cache_prompt", '{"cache_prompt": false}'),
        ("n_predict", '{"n_predict": 1}'),
        ("n_predict", '{"max_tokens": 1}'),
        ("n_predict", '{"max_completion_tokens": 1}'),
        ("n_predict", '{"max_output_tokens": 1}'),
        ("grammar", '{"grammar": "y"}'),
        ("grammar", '{"tools": [{}]}'),
        ("grammar", '{"response_format": {}}'),
        ("grammar", '{"json_schema": {}}'),
        ("json_schema", '{"grammar": "y"}'),
        ("json_schema", '{"tools": [{}]}'),
        ("json_schema", '{"response_format": {}}'),
        ("json_schema", '{"json_schema": {}}'),
        ("reasoning_budget_tokens", '{"thinking_budget_tokens": 1}'),
        ("reasoning_budget_tokens", '{"reasoning_budget_tokens": -1}'),
        ("reasoning_effort", '{"reasoning_effort": "low"}'),
        ("reasoning_effort", '{"reasoning": {"effort": "low"}}'),
        ("reasoning_effort", '{"chat_template_kwargs": {"reasoning_effort": "low"}}'),
        ("stop", '{"stop": ["x"]}'),
        ("stop", '{"stop": "x"}'),
        ("stop_sequences", '{"stop_sequences": ["x"]}'),
        ("samplers", '{"samplers": []}'),
    ],
)
def test_a_body_that_says_it_itself_is_left_as_it_is(field: str, body: str) -> None:
    assert applied(body, **{field: 7}) == body


@pytest.mark.parametrize(
    ("field", "body", "after"),
    [
        ("top_k", "{}", '{"top_k":7}'),
        ("top_k", " { } ", ' { "top_k":7} '),
        ("top_k", '{"a":1}', '{"a":1,"top_k":7}'),
        ("top_k", '{"top_k":null,"a":1}', '{"top_k":7,"a":1}'),
        ("top_k", '{"top_k" : null , "a":1}', '{"top_k" : 7 , "a":1}'),
        ("top_k", '{"top_k":5,"top_k":null}', '{"top_k":5,"top_k":7}'),
        ("top_k", r'{"top\u005fk":null}', r'{"top\u005fk":7}'),
        ("n_predict", '{"max_tokens":null}', '{"max_tokens":null,"n_predict":7}'),
        ("grammar", '{"tools":[]}', '{"tools":[],"grammar":7}'),
        ("grammar", '{"tools":null}', '{"tools":null,"grammar":7}'),
        ("stop", '{"stop":[]}', '{"stop":7}'),
        ("stop", '{"stop":""}', '{"stop":7}'),
        ("temperature", '{"top_k":1}', '{"top_k":1,"temperature":7}'),
    ],
)
def test_a_body_that_lacks_it_gets_it(field: str, body: str, after: str) -> None:
    assert applied(body, **{field: 7}) == after


ODD_BODIES = [
    '{ "b" :1,\r\n\t"a":2 }\n',
    '{"x":1,"x":2}',
    '{"n":1.0,"m":1,"e":1E+0,"z":-0}',
    r'{"s":"\u00e9\ud83d\ude00\/","k\u0065y":"é"}',
    '{"n":' + "9" * 5000 + "}",
    r'{"half":"\ud800"}',
    '{"deep":' + "[" * 200 + "]" * 200 + "}",
]


@pytest.mark.parametrize("body", ODD_BODIES)
def test_all_else_in_the_body_stays_letter_by_letter(body: str) -> None:
    end = body.rindex("}")
    assert applied(body, top_k=7) == body[:end] + ',"top_k":7' + body[end:]
    assert applied(body) == body


def test_several_fields_are_put_in_their_places() -> None:
    body = '{"top_k":null,"a":[1, 2],"seed": null}'
    after = applied(body, seed=3, min_p=0.1, top_k=7)
    assert after == '{"top_k":7,"a":[1, 2],"seed": 3,"min_p":0.1}'


@pytest.mark.parametrize(
    ("body", "after"),
    [
        ("{}", '{"chat_template_kwargs":{"a":1,"b":2}}'),
        ('{"chat_template_kwargs":null}', '{"chat_template_kwargs":{"a":1,"b":2}}'),
        ('{"chat_template_kwargs":{}}', '{"chat_template_kwargs":{"a":1,"b":2}}'),
        (
            '{"chat_template_kwargs": {"b": 3.0, "c": [1, 2]}, "x": 1}',
            '{"chat_template_kwargs": {"a":1,"b":3.0,"c":[1, 2]}, "x": 1}',
        ),
        ('{"chat_template_kwargs":{"a":null}}', '{"chat_template_kwargs":{"a":null,"b":2}}'),
        ('{"chat_template_kwargs":"odd"}', '{"chat_template_kwargs":"odd"}'),
    ],
)
def test_template_arguments_are_merged_and_the_bodys_own_win(body: str, after: str) -> None:
    said = applied(body, chat_template_kwargs={"a": 1, "b": 2})
    assert said.replace(" ", "") == after.replace(" ", "")


# --- JSON objects as text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "}",
        "[]",
        "1",
        '"{}"',
        "null",
        "{} {}",
        "{}x",
        "{,}",
        '{"a"}',
        '{"a":}',
        '{"a":1,}',
        '{"a":1 "b":2}',
        "{a:1}",
        "{1:1}",
        "{'a':1}",
        '{"a":NaN}',
        '{"a":-Infinity}',
        '{"a":01}',
        '{"a":"\n"}',
        '{"a":"\\q"}',
        '\ufeff{"a":1}',
        '{"a":1}\0',
        '\x0b{"a":1}',
        '{"a":1}\xa0',
        '{"a":' + "[" * 200_000,
        '{"a":' + "[" * 200_000 + "]" * 200_000 + "}",
    ],
)
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        JsonObject(text)


@pytest.mark.parametrize("text", [*ODD_BODIES, "{}", " {\t}\r\n", '{"":{"":[]}}'])
def test_what_is_a_json_object_is_read(text: str) -> None:
    subject = JsonObject(text)
    wanted = json.loads(text, parse_int=float)
    assert subject.values == wanted
    assert {name: json.loads(t, parse_int=float) for name, t in subject.texts().items()} == wanted
    assert subject.with_members({}) == text


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["a", "b", "", "top_k", "é", '"', "\\", "\n"]) | st.text(max_size=4)
OBJECTS = st.dictionaries(NAMES, JSON_VALUES, max_size=5)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n", "\t:\n")])


LONG = " " * 20_000  # blanks that make a text long, which is read another way


@given(OBJECTS, OBJECTS, SEPARATORS, st.booleans(), st.sampled_from(["", " ", "\r\n\t", LONG]))
@EXAMPLES
def test_new_members_are_all_that_changes(
    old: dict[str, object],
    new: dict[str, object],
    separators: tuple[str, str],
    is_ascii: bool,
    blank: str,
) -> None:
    text = blank + json.dumps(old, separators=separators, ensure_ascii=is_ascii) + blank
    subject = JsonObject(text)
    assert subject.with_members({}) == text
    after = subject.with_members({name: json.dumps(value) for name, value in new.items()})
    assert json.loads(after) == old | new
    untouched = {name: t for name, t in subject.texts().items() if name not in new}
    assert {
        name: t for name, t in JsonObject(after).texts().items() if name not in new
    } == untouched


def without_objects(value: object) -> object:
    """Within lists, only whether an object has members."""
    if isinstance(value, list):
        return [without_objects(item) for item in value]
    return bool(value) if isinstance(value, dict) else value


def flat(values: dict[str, object]) -> dict[str, object]:
    return {n: without_objects(v) if isinstance(v, list) else v for n, v in values.items()}


NOISE = st.text(alphabet='{}[]":,\\ \nantrulefs0123.-+eE\u00e9\ud800', max_size=30)


BRACED = NOISE.map(lambda text: "{" + text + "}")


@given(NOISE | st.text(max_size=20) | OBJECTS.map(json.dumps) | BRACED)
@EXAMPLES
def test_any_text_is_read_or_refused_as_json_reads_it(text: str) -> None:
    try:
        wanted = json.loads(text, parse_int=float)
        is_object = isinstance(wanted, dict) and "NaN" not in text and "Infinity" not in text
    except ValueError:
        is_object = False
    if is_object:
        assert JsonObject(text).values == wanted
        assert JsonObject(text + LONG).values == flat(wanted)
    else:
        for refused in (text, text + LONG):
            with pytest.raises(ValueError, match=r"\w"):
                JsonObject(refused)
