"""Rules of the validator as tables, and its table against the real llama-server."""

import concurrent.futures
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import validator
from tests import real_parts
from tests.llama_server import help_of
from validator import (
    FlagsRefused,
    FlagTable,
    HelpUnavailable,
    Layer,
    OpenedFlags,
    Policy,
    SidecarSpec,
    Validator,
    split_command_line,
)

BASE_ARGS = ["-ngl", "999", "-c", "32768", "--flash-attn", "on", "--no-mmap"]
MODEL = Path("/models/m.gguf")
BUILT_IN = FlagTable.built_in()

# How a help text looks, in three builds: before --load-mode, with both, after --no-mmap.
HELP_OLDEST = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the prompt context (default: 0, 0 = loaded from
                                        model)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
--mlock                                 force system to keep model in RAM
--mmap, --no-mmap                       whether to memory-map model
-dio,  --direct-io, -ndio, --no-direct-io
                                        use DirectIO if available
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, bf16, q8_0, tq3_1
                                        (default: f16)
--control-vector-layer-range START END  layer range to apply the control vector(s) to
-ot,   --override-tensor <tensor name pattern>=<buffer type>,...
                                        override tensor buffer type
--swa-checkpoints N                     max number of checkpoints
-m,    --model FNAME                    model path to load
--host HOST                             ip address to listen
--port PORT                             port to listen
"""
HELP_BETWEEN = HELP_OLDEST + "-lm,   --load-mode MODE                  model loading mode\n"
HELP_NEWEST = (
    re.sub(r"(?s)--mlock.*?(?=-ngl)", "", HELP_BETWEEN)
    + """\
-tl,   --token-limit N                  a flag of the future
--strange START END                     one with two values
--glow, --no-glow                       one that comes in a pair
-fa2                                    one with a short name alone
"""
)


def spec(
    header: str | None = None,
    *,
    base: Sequence[str] = (),
    model: Sequence[str] = (),
    table: FlagTable | None = None,
    opened: OpenedFlags | None = None,
    unknown_flags_for_agents: bool = False,
) -> SidecarSpec:
    """The process that a header gets where nothing is shared."""
    subject = Validator(
        base,
        table,
        opened=opened,
        unknown_flags_for_agents=unknown_flags_for_agents,
        share=False,
    )
    return subject.resolve("m", MODEL, subject.model_args(model), header).spec


def faults(header: str, **options: object) -> tuple[str, ...]:
    with pytest.raises(FlagsRefused) as refused:
        spec(header, **options)  # type: ignore[arg-type]
    return refused.value.faults


def args(header: str | None = None, **options: object) -> str:
    return " ".join(spec(header, **options).args)  # type: ignore[arg-type]


def names_that(*policies: Policy) -> list[str]:
    return [flag.name for flag in BUILT_IN.flags if flag.policy in policies]


# --- Splitting


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        (" \t ", []),
        ("-c 8192", ["-c", "8192"]),
        ("\t-c \t 8192  ", ["-c", "8192"]),
        ("''", [""]),
        ("-r ''", ["-r", ""]),
        ('-r ""x', ["-r", "x"]),
        ("-r 'a b'", ["-r", "a b"]),
        ('-r "a b"', ["-r", "a b"]),
        ('-r a" "b', ["-r", "a b"]),
        ('-r it"\'"s', ["-r", "it's"]),
        ("-r '\"'", ["-r", '"']),
        (r'-j "{\"a\":1}"', ["-j", '{"a":1}']),
        (r"""-j '{"a":1}'""", ["-j", '{"a":1}']),
        (r"-r \"", ["-r", '"']),
        (r"-r a\"b", ["-r", 'a"b']),
        (r"-m C:\models\x.gguf", ["-m", r"C:\models\x.gguf"]),
        (r'-m "C:\my models\x.gguf"', ["-m", r"C:\my models\x.gguf"]),
        (r"-m 'C:\my models\'", ["-m", "C:\\my models\\"]),
        (r"-m \\server\share\x.gguf", ["-m", r"\\server\share\x.gguf"]),
        (r'-m "\\server\share\x y.gguf"', ["-m", r"\\server\share\x y.gguf"]),
        (r"-r \n", ["-r", r"\n"]),
        (r"-r '\"'", ["-r", r"\""]),
        (r"a\ b", ["a\\", "b"]),
        ("-r Grüße\u00a0Welt", ["-r", "Grüße\u00a0Welt"]),
        ("-r \U0001f999", ["-r", "\U0001f999"]),
        ("-r $HOME `id` *", ["-r", "$HOME", "`id`", "*"]),
    ],
)
def test_split_as_a_shell_but_with_backslashes_kept(text: str, tokens: list[str]) -> None:
    assert split_command_line(text) == tokens


@pytest.mark.parametrize(
    "text", ["'", '"', "-r 'a", '-r "a b', "-r a'b c", r'-r "C:\models\"', "\"'", "'a' 'b"]
)
def test_an_unclosed_quote_is_refused(text: str) -> None:
    with pytest.raises(FlagsRefused, match="quote is opened and never closed"):
        split_command_line(text)


# --- Limits before anything is read


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("-c 1\x002", r"control character '\x00'"),
        ("-c 1\n2", r"control character '\n'"),
        ("-c 1\r2", r"control character '\r'"),
        ("-c 1\x1b2", r"control character '\x1b'"),
        ("-c 1\x7f2", r"control character '\x7f'"),
        ("-c 1\x852", r"control character '\x85'"),
        ("-r \ud800", "not valid UTF-8"),
        ("-r " + "x" * 24_576, "longer than 24576 bytes"),
        ("-r " + "ü" * 12_288, "longer than 24576 bytes"),
        ("-r " + "x" * 16_385, "longer than 16384 characters"),
        ("--jinja " * 257, "holds 257 words; at most 256"),
        (r"-r " + r"""'"' """ * 1 + "'" + '"' * 12_300 + "'", "characters of a Windows command"),
    ],
)
def test_a_header_beyond_a_limit_is_refused(header: str, fault: str) -> None:
    assert any(fault in each for each in faults(header))


@pytest.mark.parametrize(
    "header",
    [
        "-r " + "x" * 16_384,
        "-r " + "ü" * 12_000,
        "--jinja " * 256,
        "-c\t8192",
        "-r '" + '"' * 12_000 + "'",
    ],
)
def test_a_header_within_the_limits_is_taken(header: str) -> None:
    assert spec(header).args


def test_a_command_line_is_measured_in_utf16_as_windows_quotes_it() -> None:
    assert validator.windows_command_line_chars(["a b", 'c"d', "\U0001f999"]) == 5 + 1 + 4 + 1 + 2
    assert validator.AGENT_COMMAND_LINE_CHARS < validator.WINDOWS_COMMAND_LINE_CHARS < 32_767


@pytest.mark.parametrize(
    ("base", "fault"),
    [
        (["-r", "a\0b"], "holds a NUL character"),
        (["-r", "a\udc80"], "not valid UTF-8"),
        (["-c", 8192], "'8192' is not a text"),
        (["-c", None], "'None' is not a text"),
    ],
)
def test_base_args_that_no_process_could_be_given_are_refused(base: list[str], fault: str) -> None:
    with pytest.raises(FlagsRefused, match=re.escape(fault)):
        Validator(base)


def test_an_operator_may_break_lines_in_a_value() -> None:
    assert spec(base=["--grammar", 'root ::= "a"\n\t| "b"']).args[1] == 'root ::= "a"\n\t| "b"'


# --- Spellings


@pytest.mark.parametrize(
    ("header", "canonical"),
    [
        (None, ""),
        ("", ""),
        ("-c 8192", "--ctx-size 8192"),
        ("--ctx-size=8192", "--ctx-size 8192"),
        ("-c=8192", "--ctx-size 8192"),
        ("--ctx_size 8192", "--ctx-size 8192"),
        ("--ctx_size=8192", "--ctx-size 8192"),
        ("--n-gpu-layers 20", "--gpu-layers 20"),
        ("-nkvo", "--no-kv-offload"),
        ("--no_kv_offload", "--no-kv-offload"),
        ("-nocb", "--no-cont-batching"),
        ("-no-kvu", "--no-kv-unified"),
        ("--no-mmproj", "--no-mmproj-auto"),
        ("-ndio", "--no-direct-io"),
        ("--no-host", "--no-host"),
        ("-e", "--escape"),
        ("-fa", "--flash-attn on"),
        ("-fa -c 8192", "--ctx-size 8192 --flash-attn on"),
        ("-fa auto", "--flash-attn auto"),
        ("-fa -1", "--flash-attn auto"),
        ("-fa 0", "--flash-attn off"),
        ("--flash-attn=off", "--flash-attn off"),
        ("-c 8192 --flash_attn", "--ctx-size 8192 --flash-attn on"),
        ("-r a=b", "--reverse-prompt a=b"),
        ("--reverse-prompt=a=b", "--reverse-prompt a=b"),
        ("-r --host", "--reverse-prompt --host"),
        ("-r -c --temp 1", "--reverse-prompt -c --temp 1"),
        ("--reverse-prompt= -c 2", "--ctx-size 2 --reverse-prompt "),
        ("--control-vector-layer-range 1 5", "--control-vector-layer-range 1 5"),
        ("--control-vector-layer-range=1 5", "--control-vector-layer-range 1 5"),
        ("--defrag-thold 0.1", ""),
        ("-dt -c -c 4096", "--ctx-size 4096"),
        ("--tags a,b", ""),
    ],
)
def test_every_spelling_becomes_the_canonical_one(header: str | None, canonical: str) -> None:
    assert args(header) == canonical


def test_every_alias_of_the_table_means_its_flag() -> None:
    for flag in BUILT_IN.flags:
        for word in (flag.name, *flag.aliases):
            assert BUILT_IN.spellings[word].name == flag.name
        for word in flag.negated:
            assert BUILT_IN.spellings[word].name == flag.negated_name != flag.name


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (
            "--ctxsize 8192",
            "'--ctxsize' is no flag that llama-server is known to take. Did you mean --ctx-size?",
        ),
        ("--CTX-SIZE 8192", "'--CTX-SIZE' is no flag"),
        ("-C_size", "'-C_size' is no flag"),
        ("-no_kvu", "'-no_kvu' is no flag"),
        ("-c8192", "'-c8192' is no flag"),
        ("--", "'--' is no flag"),
        ("-", "'-' is no flag"),
        ("8192", "'8192' is a value, but no flag before it takes one"),
        ("''", "'' is a value, but no flag before it takes one"),
        ("--jinja true", "'true' is a value, but no flag before it takes one"),
        ("-fa maybe", "'maybe' is a value, but no flag before it takes one"),
        ("--jinja=true", "--jinja takes no value, but was given 'true'"),
        ("--no-jinja=", "--no-jinja takes no value, but was given ''"),
        ("-c", "--ctx-size stands last, but takes a whole number"),
        ("--control-vector-layer-range 1", "stands last, but takes 2 values START END"),
        ("' -c' 8192", "' -c' is a value"),
        ("'-c ' 8192", "'-c ' is no flag"),
        ("--=1", "'--' is no flag"),
        ("=", "'=' is a value"),
    ],
)
def test_what_is_no_flag_is_refused_with_a_hint(header: str, fault: str) -> None:
    assert fault in " ".join(faults(header))


def test_the_value_of_an_unknown_flag_is_not_reported_and_not_shown() -> None:
    assert len(faults("--apikey geheim")) == 1
    assert "geheim" not in " ".join(faults("--apikey=geheim"))


# --- Values


@pytest.mark.parametrize(
    ("header", "canonical"),
    [
        ("-c +5", "--ctx-size 5"),
        ("-c 0", "--ctx-size 0"),
        ("-c 008192", "--ctx-size 8192"),
        ("--threads -1", "--threads -1"),
        ("--keep -0", "--keep 0"),
        ("--temp 0.70", "--temp 0.7"),
        ("--temp .7", "--temp 0.7"),
        ("--temp 7e-1", "--temp 0.7"),
        ("--temp 1.", "--temp 1"),
        ("--temp 1.0", "--temp 1"),
        ("--temp -0.0", "--temp 0"),
        ("--presence-penalty -1.50", "--presence-penalty -1.5"),
        ("--rope-freq-base 1E6", "--rope-freq-base 1000000"),
        ("-s 42", "--seed 42"),
        ("-s -1", "--seed -1"),
        ("-s 4294967295", "--seed -1"),
        ("-s 4294967294", "--seed 4294967294"),
        ("-ngl auto", "--gpu-layers auto"),
        ("-ngl -1", "--gpu-layers auto"),
        ("-ngl -2", "--gpu-layers all"),
        ("-ngl +20", "--gpu-layers 20"),
        ("--fit disabled", "--fit off"),
        ("--reasoning true", "--reasoning on"),
        ("-ctk q8_0", "--cache-type-k q8_0"),
        ("--load-mode mmap+mlock", "--load-mode mmap+mlock"),
        ("--spec-type ngram-mod,ngram-map-k", "--spec-type ngram-mod,ngram-map-k"),
        ("--reasoning-format deepseek-legacy", "--reasoning-format deepseek-legacy"),
        ("--fit-target 1024/0512", "--fit-target 1024,512"),
        ("--cpu-mask 0xFF", "--cpu-mask 0xff"),
        ("--cpu-mask 00ff", "--cpu-mask 0xff"),
        ("--cpu-mask 0", "--cpu-mask 0x0"),
        ("--cpu-range 0-07", "--cpu-range 0-7"),
        ("--cpu-range -3", "--cpu-range 0-3"),
        ("--cpu-range 8-", "--cpu-range 8-511"),
        ("-l 15043+1.0", "--logit-bias 15043+1"),
        ("-l 15043-.50", "--logit-bias 15043-0.5"),
        ("-l 15043--1", "--logit-bias 15043--1"),
        ("""-j '{ "b": 1, "a": [ 1 ] }'""", '--json-schema {"b":1,"a":[1]}'),
        ("""-j '{"a b": " x ", "c": 1.50}'""", '--json-schema {"a b":" x ","c":1.50}'),
        (r"""-j '{"a": "\" \\"}'""", r'--json-schema {"a":"\" \\"}'),
        ('-j \'{"a": ' + "9" * 5000 + "}'", '--json-schema {"a":' + "9" * 5000 + "}"),
        ("-j '{\"a\": 1e999}'", '--json-schema {"a":1e999}'),
        ("--chat-template-kwargs '{}'", "--chat-template-kwargs {}"),
        ("-ub 0", "--ubatch-size 0"),
    ],
)
def test_a_value_gets_its_canonical_text(header: str, canonical: str) -> None:
    assert args(header) == canonical


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("-c 20abc", "--ctx-size: '20abc' is not a whole number"),
        ("-c 0x14", "'0x14' is not a whole number"),
        ("-c 1.9", "'1.9' is not a whole number"),
        ("-c ' 20'", "' 20' is not a whole number"),
        ("-c ''", "'' is not a whole number"),
        ("-c 1_000", "'1_000' is not a whole number"),
        ("-c \u0661\u0662", "is not a whole number"),
        ("-c -1", "'-1' is not a whole number from 0"),
        ("-c 1", "'1' is not a whole number from 0 other than 1"),
        ("-c 2147483648", "'2147483648' is not a whole number"),
        ("-c 99999999999", "'99999999999' is not a whole number"),
        ("--threads -2147483649", "'-2147483649' is not a whole number"),
        ("--threads 513", "'513' is not a whole number up to 512 (llama-server crashes with more"),
        ("-b 1", "'1' is not a whole number from 2 (llama-server aborts with less)"),
        ("--temp 0,5", "--temp: '0,5' is not a number, written with a point"),
        ("--temp nan", "'nan' is not a number"),
        ("--temp inf", "'inf' is not a number"),
        ("--temp 1e39", "'1e39' is not a number"),
        ("--temp 1e-50", "'1e-50' is not a number"),
        ("--temp 1e9999", "'1e9999' is not a number"),
        ("--temp 0x1p3", "'0x1p3' is not a number"),
        ("--temp .", "'.' is not a number"),
        ("--temp 1e", "'1e' is not a number"),
        ("--repeat-penalty 0", "'0' is not a number, written with a point above 0"),
        ("--adaptive-decay 1", "from 0 up to 0.99"),
        ("--mirostat 3", "from 0 up to 2"),
        ("--poll 101", "from 0 up to 100"),
        ("--cpu-strict 2", "from 0 up to 1"),
        ("--repeat-last-n -1", "from 0 up to 16777216"),
        ("--reasoning-budget -2", "from -1"),
        ("--spec-ngram-mod-n-match 0", "from 1 up to 1024"),
        ("--n-cpu-moe -1", "from 0 up to 4096"),
        ("-s -2", "from -1 up to 4294967295"),
        ("-s 4294967296", "from -1 up to 4294967295"),
        ("-ngl many", "--gpu-layers: 'many' is not a whole number or one of auto, all"),
        ("-ngl -3", "'-3' is not a whole number or one of auto, all"),
        ("-ctk Q8_0", "'Q8_0' is not one of f32, f16, bf16, q8_0"),
        ("-fa=ON", "'ON' is not one of on, off, auto"),
        ("--fit auto", "'auto' is not one of on, off."),
        ("--spec-type mtp", "'mtp' is not a comma-separated list of none, draft-simple"),
        ("--spec-type ''", "'' is not a comma-separated list"),
        ("--spec-type ngram-mod,", "'' is not a comma-separated list"),
        ("--reasoning-format x", "'x' is not one of none, auto, deepseek, deepseek-legacy"),
        ("--fit-target 1.5", "'1.5' is not a list of whole numbers"),
        ("--cpu-mask xyz", "'xyz' is not a hexadecimal mask"),
        ("--cpu-range 5", "'5' is not FIRST-LAST"),
        ("--cpu-range 0-512", "'0-512' is not FIRST-LAST, both below 512"),
        ("-l 15043", "'15043' is not TOKEN+BIAS"),
        ("-l 15043+x", "'15043+x' is not TOKEN+BIAS"),
        ("-l 99999999999+1", "is not TOKEN+BIAS"),
        ("-j '{'", "'{' is not a JSON object"),
        ("-j '[1]'", "'[1]' is not a JSON object"),
        ("-j NaN", "'NaN' is not a JSON object"),
        ("""-j '{"a":Infinity}'""", "is not a JSON object"),
        (r"""-j '{"a":"\ud800"}'""", "is not a JSON object"),
        ("-j '" + '{"a":' * 2500 + "1" + "}" * 2500 + "'", "is not a JSON object"),
        ("--chat-template-kwargs true", "'true' is not a JSON object"),
        ("--control-vector-layer-range 1 x", "'x' is not 2 values START END, each a whole number"),
    ],
)
def test_a_value_that_llama_server_would_misread_is_refused(header: str, fault: str) -> None:
    assert fault in " ".join(faults(header))


@pytest.mark.parametrize("value", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"])
def test_a_quantised_v_cache_needs_flash_attention(value: str) -> None:
    assert "needs flash attention" in faults(f"-ctv {value}", base=["-fa", "off"])[0]
    assert args(f"-ctv {value} -fa", base=["-fa", "off"])


@pytest.mark.parametrize("value", ["f16", "bf16", "f32"])
def test_a_plain_v_cache_needs_no_flash_attention(value: str) -> None:
    assert args(f"-fa off -ctv {value} -ctk q8_0")


def test_a_batch_smaller_than_the_slots_is_refused() -> None:
    assert "4 slots" in faults("-b 3")[0]
    assert "4 slots" in faults("-b 3", base=["-np", "-1"])[0]
    assert "8 slots" in faults("-b 7", base=["-np", "8"])[0]
    assert args("-b 3", base=["-np", "3"])
    assert args("-b 4")


def test_a_model_whose_own_args_clash_with_the_base_args_is_refused() -> None:
    subject = Validator(["-fa", "off"])
    with pytest.raises(FlagsRefused, match="needs flash attention"):
        subject.model_args(["-ctv", "q8_0"])


def test_all_faults_of_a_header_are_told_together() -> None:
    told = faults("--ctxsize 3 --temp 0,5 --port 1 --device 0 --jinja=1 stray -c -5 --top-k")
    assert len(told) == 8


@pytest.mark.parametrize(
    "header",
    [
        "--\u202egnp.exe",
        "-c '\u2028'",
        "-c " + "x" * 16_000,
        "--" + "x" * 16_000,
        " ".join(f"--x{n}" for n in range(256)),
        "--spec-type x " * 100,
    ],
)
def test_a_message_is_short_and_shows_no_raw_control_character(header: str) -> None:
    with pytest.raises(FlagsRefused) as refused:
        spec(header)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 16_000
    assert len(refused.value.faults) <= validator.MAX_FAULTS + 1


# --- Authors


@pytest.mark.parametrize("name", names_that(Policy.DAEMON, Policy.NOBODY))
def test_what_no_author_may_say_is_refused_from_each(name: str) -> None:
    flag = BUILT_IN.spellings[name].flag
    for word in (name, *flag.aliases, *flag.negated):
        words = [word, *["1"] * len(flag.takes)]
        assert flag.reason in faults(" ".join(words))[0]
        with pytest.raises(FlagsRefused, match=re.escape(flag.reason)):
            Validator(words)
    with pytest.raises(FlagsRefused, match="cannot be opened"):
        OpenedFlags.parse(name)


@pytest.mark.parametrize("name", names_that(Policy.OPERATOR))
def test_what_operators_may_say_is_refused_from_agents_with_what_to_ask_for(name: str) -> None:
    flag = BUILT_IN.spellings[name].flag
    words = [name, *(good_value(flag) for _ in flag.takes)]
    (told,) = faults(" ".join(words))
    assert flag.reason in told
    assert f"LLAMA_SIDECAR_AGENT_FLAGS={name}" in told
    assert spec(base=words).args[0] == name
    assert spec(model=words).args[0] == name


@pytest.mark.parametrize("name", names_that(Policy.AGENT))
def test_what_agents_may_say_is_taken_from_each(name: str) -> None:
    flag = BUILT_IN.spellings[name].flag
    words = [name, *(good_value(flag) for _ in flag.takes)]
    taken = spec(" ".join(f"'{word}'" for word in words)).args
    assert taken == (() if flag.strip else tuple(words))
    assert spec(base=words).args == taken


def good_value(flag: validator.Flag) -> str:
    """One that the flag takes, in its canonical text."""
    samples = {
        "int": "8",
        "float": "0.5",
        "numbers": "1,2",
        "whole-numbers": "8,9",
        "cpu-mask": "0xff",
        "cpu-range": "0-3",
        "logit-bias": "5+1",
        "json-object": '{"a":1}',
        "text": "x",
    }
    if flag.takes == ("int",) and flag.max is not None and flag.max < 8:
        return "1"
    return flag.choices[0] if flag.choices else samples[flag.takes[0]]


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *(
            (name, Policy.DAEMON)
            for name in "--model --host --port --api-key --ssl-key-file "
            "--api-prefix --slot-save-path --models-dir --ui --offline --log-file --alias".split()
        ),
        *(
            (name, Policy.NOBODY)
            for name in "--help --version --list-devices --hf-repo --tools "
            "--mcp-servers-json --agent --draft --gpt-oss-20b-default --mmproj-url".split()
        ),
        *(
            (name, Policy.OPERATOR)
            for name in "--parallel --embedding --rerank --pooling --timeout "
            "--threads-http --mmproj --lora --rpc --device --chat-template-file".split()
        ),
        *(
            (name, Policy.AGENT)
            for name in "--ctx-size --cache-type-k --temp --spec-type "
            "--override-tensor --json-schema --no-mmap".split()
        ),
    ],
)
def test_who_may_say_what(name: str, policy: Policy) -> None:
    assert BUILT_IN.spellings[name].flag.policy is policy


# --- Precedence


@pytest.mark.parametrize(
    ("base", "model", "header", "canonical"),
    [
        ("-c 32768 -ngl 999", "", "-c 8192", "--ctx-size 8192 --gpu-layers 999"),
        ("--ctx-size 32768 -ngl 999", "", "-c=8192", "--ctx-size 8192 --gpu-layers 999"),
        ("-c 32768", "-c 16384", "", "--ctx-size 16384"),
        ("-c 32768", "-c 16384", "--ctx_size 8192", "--ctx-size 8192"),
        ("", "", "-c 1024 -c 2048 --ctx-size 4096", "--ctx-size 4096"),
        ("--no-mmap", "", "--mmap", "--mmap"),
        ("--no-mmap", "", "--load-mode mlock", "--load-mode mlock"),
        ("--load-mode mlock", "", "--no-mmap", "--no-mmap"),
        ("--mlock", "", "-dio", "--direct-io"),
        ("--kv-offload", "", "-nkvo", "--no-kv-offload"),
        ("-nkvo", "", "-kvo", "--kv-offload"),
        # The context is not dropped by a neighbour, but carries its own neighbour away.
        ("-c 8192", "", "--fit-ctx 4096", "--ctx-size 8192 --fit-ctx 4096"),
        ("--fit-ctx 4096", "", "-c 8192", "--ctx-size 8192"),
        ("", "", "-c 8192 --fit-ctx 4096", "--ctx-size 8192 --fit-ctx 4096"),
        ("", "", "--fit-ctx 4096 -c 8192", "--ctx-size 8192"),
        (
            "-c 8192",
            "",
            "--fit on --cache-type-k f16",
            "--cache-type-k f16 --ctx-size 8192 --fit on",
        ),
        # One setting under several names.
        ("--temp 1", "", "--top-k 5", "--temp 1 --top-k 5"),
        ("--rope-scale 2", "", "--rope-freq-scale 0.5", "--rope-freq-scale 0.5"),
        ("--samplers top_k", "", "--sampler-seq k", "--sampler-seq k"),
        ("--grammar x", "", "-j {}", "--json-schema {}"),
        ("-j {}", "--grammar-file g", "", "--grammar-file g"),
        ("--pooling mean --embedding", "", "", "--embedding --pooling mean"),
        ("--pooling mean --embedding", "--rerank", "", "--rerank"),
        ("--rerank", "--pooling mean", "", "--rerank --pooling mean"),
        # What adds up replaces an earlier author, not itself.
        ("-r a -r b", "", "", "--reverse-prompt a --reverse-prompt b"),
        ("-r a -r b", "", "-r c", "--reverse-prompt c"),
        ("-r a", "-r b", "--temp 1", "--reverse-prompt b --temp 1"),
        ("", "", "-r b -r a -r b", "--reverse-prompt b --reverse-prompt a --reverse-prompt b"),
        ("--lora a --lora-scaled b:1", "--lora c", "", "--lora-scaled b:1 --lora c"),
        ("--cpu-mask 1", "", "--cpu-mask 2 --cpu-range 4-5", "--cpu-mask 0x2 --cpu-range 4-5"),
        ("--cpu-mask 1", "", "--cpu-range 4-5", "--cpu-range 4-5"),
        # Speculation can be switched off, in either of its two words.
        ("--spec-type draft-mtp", "", "--spec-type none", "--spec-type none"),
        ("--spec-default", "", "--spec-type none", "--spec-type none"),
        ("--spec-type draft-mtp", "", "--spec-default", "--spec-default"),
        ("", "", "--spec-type ngram-mod --spec-default", "--spec-type ngram-mod --spec-default"),
        ("-b 4", "", "-ub 2", "--batch-size 4 --ubatch-size 2"),
    ],
)
def test_a_later_setting_replaces_the_earlier_and_nothing_else(
    base: str, model: str, header: str, canonical: str
) -> None:
    assert args(header, base=base.split(), model=model.split()) == canonical


def test_the_base_args_of_the_documentation_are_taken() -> None:
    assert args(base=BASE_ARGS) == "--ctx-size 32768 --flash-attn on --gpu-layers 999 --no-mmap"


@pytest.mark.parametrize(
    ("header", "canonical"),
    [
        ("--top-k 1 --temp 1 -c 2", "--ctx-size 2 --temp 1 --top-k 1"),
        ("--n-cpu-moe 1 -ot a=CPU", "--n-cpu-moe 1 --override-tensor a=CPU"),
        ("-ot a=CPU --n-cpu-moe 1", "--override-tensor a=CPU --n-cpu-moe 1"),
        (
            "--temp 1 -ot a=CPU -c 2 --n-cpu-moe 1",
            "--ctx-size 2 --override-tensor a=CPU --n-cpu-moe 1 --temp 1",
        ),
        ("--spec-default --spec-ngram-mod-n-min 3", "--spec-default --spec-ngram-mod-n-min 3"),
        ("--spec-ngram-mod-n-min 3 --spec-default", "--spec-ngram-mod-n-min 3 --spec-default"),
        ("--reasoning on --chat-template-kwargs {}", "--reasoning on --chat-template-kwargs {}"),
        ("--no-warmup --no-perf --jinja", "--jinja --no-perf --no-warmup"),
    ],
)
def test_the_order_is_by_name_except_where_it_has_a_meaning(header: str, canonical: str) -> None:
    assert args(header) == canonical


# --- What makes a process another


@pytest.mark.parametrize(
    ("base", "header", "golden"),
    [
        ([], "", "4182765a1912"),
        (BASE_ARGS, "", "e213de0af3b7"),
        (BASE_ARGS, "-c 8192 --cache-type-k q8_0", "4e46997418db"),
        (BASE_ARGS, "--cache_type_k=q8_0 --ctx-size +8192", "4e46997418db"),
        (BASE_ARGS, "--ctx-size 8192 -ctk q8_0 --no-warmup --no-perf", "4e46997418db"),
        (BASE_ARGS, "--temp .70 -r 'Grüße, \U0001f999'", "e216f5d01f02"),
        ([], r"""-j '{"path": "C:\\x"}'""", "ffd172bb65b3"),
    ],
)
def test_the_hash_of_a_flag_set_never_changes(base: list[str], header: str, golden: str) -> None:
    assert spec(header, base=base).hash == golden


def test_the_hash_is_over_model_and_flags_but_not_over_the_path() -> None:
    subject = Validator(BASE_ARGS)
    one = subject.resolve("m", Path("/a.gguf"), Layer(), "").spec
    assert one.hash == subject.resolve("m", Path("/b.gguf"), Layer(), "").spec.hash
    assert one.hash != subject.resolve("n", Path("/a.gguf"), Layer(), "").spec.hash


def test_flag_and_value_cannot_change_places_in_the_hash() -> None:
    assert spec("-r a -r b").hash != spec("-r 'a b'").hash != spec("-r a --reverse-prompt=b").hash
    assert spec("-r ''").hash != spec("").hash


def test_flags_that_never_split_the_pool_stand_in_args_alone() -> None:
    quiet = spec("--no-warmup --check-tensors --perf -c 8192")
    assert quiet.args == ("--check-tensors", "--ctx-size", "8192", "--no-warmup", "--perf")
    assert quiet.identity == ("--ctx-size", "8192")
    assert quiet.hash == spec("-c 8192").hash


# --- Remembered headers


def test_a_repeated_header_is_looked_up() -> None:
    subject = Validator(BASE_ARGS)
    layer = subject.model_args([])
    assert subject.resolve("m", MODEL, layer, "-c 2") is subject.resolve("m", MODEL, layer, "-c 2")
    assert subject.resolve("m", MODEL, layer, "-c 2") is not subject.resolve(
        "n", MODEL, layer, "-c 2"
    )
    other = subject.model_args(["--temp", "1"])
    assert "--temp" in subject.resolve("m", MODEL, other, "-c 2").spec.args


def test_only_the_headers_seen_last_are_remembered() -> None:
    subject = Validator([])
    layer = subject.model_args([])
    rare, frequent = (subject.resolve("m", MODEL, layer, header) for header in ("-c 2", "-c 3"))
    for n in range(1000):
        subject.resolve("m", MODEL, layer, f"-c {n + 100}")
        assert subject.resolve("m", MODEL, layer, "-c 3") is frequent
    assert subject.resolve("m", MODEL, layer, "-c 2") is not rare


def test_a_long_header_is_not_remembered() -> None:
    subject = Validator([])
    layer = subject.model_args([])
    header = "-r " + "x" * 10_000
    assert subject.resolve("m", MODEL, layer, header) is not subject.resolve(
        "m", MODEL, layer, header
    )


def test_threads_share_a_validator() -> None:
    subject = Validator(BASE_ARGS)
    start = threading.Barrier(8)

    def work(seed: int) -> list[str]:
        start.wait()
        return [
            subject.resolve("m", MODEL, Layer(), f"-c {2 + (n * seed) % 700}").spec.args[1]
            for n in range(2000)
        ]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for seed, sizes in zip(range(1, 9), threads.map(work, range(1, 9)), strict=True):
            assert sizes == [str(2 + (n * seed) % 700) for n in range(2000)]


# --- Flags that the operator opened


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder with files, links and a neighbour that must stay out of reach."""
    inside = tmp_path / "adapters"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "adapters-secret").mkdir()
    for file in (
        "adapters/a.gguf",
        "adapters/sub/b ü.gguf",
        "adapters/c,d.gguf",
        "adapters/e:f.gguf",
        "adapters-secret/s.gguf",
        "outside.gguf",
    ):
        (tmp_path / file).write_bytes(b"GGUF")
    if sys.platform != "win32":  # where links are for administrators, and quotes in no name
        (inside / 'q"x.gguf').write_bytes(b"GGUF")
        (inside / "out.gguf").symlink_to(tmp_path / "outside.gguf")
        (inside / "in.gguf").symlink_to(inside / "a.gguf")
        (inside / "up").symlink_to(tmp_path)
        (inside / "loop").symlink_to(inside / "loop")
        (tmp_path / "door").symlink_to(inside)
    return inside


def opened(text: str, adapters: Path) -> OpenedFlags:
    return OpenedFlags.parse(text, relative_to=adapters.parent)


def test_an_opened_flag_may_be_said_by_agents(adapters: Path) -> None:
    some = opened(" --device , -np,", adapters)
    assert args("-dev CUDA0 --parallel 2", opened=some) == "--device CUDA0 --parallel 2"
    assert "--main-gpu is for the operator" in faults("-mg 0", opened=some)[0]


@pytest.mark.parametrize(
    ("flag", "value", "real"),
    [
        ("--lora", "a.gguf", "{}/a.gguf"),
        ("--lora", "./sub/../a.gguf", "{}/a.gguf"),
        ("--lora", "{}/a.gguf", "{}/a.gguf"),
        ("--lora", "sub/b ü.gguf", "{}/sub/b ü.gguf"),
        ("--lora", "in.gguf", "{}/a.gguf"),
        ("--lora", "a.gguf,sub/b ü.gguf", "{}/a.gguf,{}/sub/b ü.gguf"),
        ("--lora", '"c,d.gguf",a.gguf', '"{}/c,d.gguf",{}/a.gguf'),
        ("--lora", '"q""x.gguf"', '"{}/q""x.gguf"'),
        ("--lora", 'q"x.gguf', '"{}/q""x.gguf"'),
        ("--lora-scaled", "a.gguf:0.50", "{}/a.gguf:0.5"),
        ("--lora-scaled", "a.gguf:1,in.gguf:-2", "{}/a.gguf:1,{}/a.gguf:-2"),
        ("--grammar-file", "c,d.gguf", "{}/c,d.gguf"),
        ("--media-path", "sub", "{}/sub"),
        ("--media-path", "{}", "{}"),
    ],
)
def test_an_opened_path_becomes_the_real_one(
    adapters: Path, flag: str, value: str, real: str
) -> None:
    value = value.replace("{}", str(adapters))
    taken = spec(f"{flag} '{value}'", opened=opened(f"{flag}=adapters", adapters))
    wanted = real.replace("{}", str(adapters.resolve()))
    assert taken.args == (flag, wanted.replace("/", os.sep))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--lora", "../outside.gguf"),
        ("--lora", "{}/../door/a.gguf"),
        ("--lora", "{}/../outside.gguf"),
        ("--lora", "../adapters-secret/s.gguf"),
        ("--lora", "out.gguf"),
        ("--lora", "up/outside.gguf"),
        ("--lora", "up/adapters/../outside.gguf"),
        ("--lora", "missing.gguf"),
        ("--lora", "loop"),
        ("--lora", "sub"),
        ("--lora", "."),
        ("--lora", ""),
        ("--lora", "a.gguf,"),
        ("--lora", "a.gguf,../outside.gguf"),
        ("--lora", '"a.gguf",""../outside.gguf"'),
        ("--lora", "/etc/passwd"),
        ("--lora", r"\\server\share\x.gguf"),
        ("--lora", "~/a.gguf"),
        ("--lora", "x" * 5000),
        ("--lora-scaled", "a.gguf"),
        ("--lora-scaled", "a.gguf:x"),
        ("--lora-scaled", "a.gguf:1:1"),
        ("--lora-scaled", "e:f.gguf:1"),
        ("--lora-scaled", "out.gguf:1"),
        ("--media-path", ".."),
        ("--media-path", "up"),
        ("--media-path", "a.gguf"),
    ],
)
def test_a_path_that_leads_out_of_the_opened_folder_is_refused(
    adapters: Path, flag: str, value: str
) -> None:
    value = value.replace("{}", str(adapters))
    (told,) = faults(f"{flag} '{value}'", opened=opened(f"{flag}=adapters", adapters))
    assert told.startswith(f"{flag}: ")


@pytest.mark.parametrize("value", ["a.gguf", "{}/../door/a.gguf", "{}/a.gguf"])
def test_the_opened_folder_may_itself_be_a_link(adapters: Path, value: str) -> None:
    value = value.replace("{}", str(adapters))
    taken = spec(f"--lora {value}", opened=opened("--lora=door", adapters))
    assert taken.args == ("--lora", str(adapters.resolve() / "a.gguf"))


def test_an_opened_file_is_looked_at_each_time(adapters: Path) -> None:
    subject = Validator([], opened=opened("--lora=adapters", adapters))
    layer = subject.model_args([])
    subject.resolve("m", MODEL, layer, "--lora a.gguf")
    (adapters / "a.gguf").unlink()
    with pytest.raises(FlagsRefused):
        subject.resolve("m", MODEL, layer, "--lora a.gguf")


def test_a_folder_that_is_gone_refuses_its_flag(adapters: Path) -> None:
    some = opened("--media-path=adapters/sub", adapters)
    (adapters / "sub" / "b ü.gguf").unlink()
    (adapters / "sub").rmdir()
    assert "is no folder below" in faults("--media-path x", opened=some)[0]


def test_operators_name_files_wherever_they_lie() -> None:
    assert args(base=["--lora", "../any/where.gguf"]) == "--lora ../any/where.gguf"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("--nonsense", "'--nonsense' is no flag"),
        ("--port", "cannot be opened to agents"),
        ("--tools", "cannot be opened to agents"),
        ("--lora", "needs the folder that agents may use, as in --lora=FOLDER"),
        ("--lora=missing", "names no existing folder"),
        ("--lora=" + "x" * 5000, "names no existing folder"),
        ("--lora=a\0b", "names no existing folder"),
        ("--lora=outside.gguf", "names no existing folder"),
        ("--device=adapters", "takes no folder"),
    ],
)
def test_opening_what_cannot_be_opened_is_refused(adapters: Path, text: str, fault: str) -> None:
    with pytest.raises(FlagsRefused, match=fault):
        opened(text, adapters)
    with pytest.raises(FlagsRefused) as refused:
        opened(f"--hf-repo,{text},--device,--lora=adapters", adapters)
    assert len(refused.value.faults) == 2


# --- The binary decides


@pytest.mark.parametrize(
    ("help_text", "header", "spoken"),
    [
        (HELP_OLDEST, "--no-mmap", "--no-mmap"),
        (HELP_OLDEST, "-ndio", "--no-direct-io"),
        (HELP_OLDEST, "--no-mmap --mlock", "--mlock --no-mmap"),
        (HELP_OLDEST, "--no-mmap --mmap", "--mmap"),
        (HELP_BETWEEN, "--no-mmap --mlock", "--load-mode mlock"),
        (HELP_BETWEEN, "--no-mmap", "--load-mode none"),
        (HELP_NEWEST, "--no-mmap", "--load-mode none"),
        (HELP_NEWEST, "--mmap", "--load-mode mmap"),
        (HELP_NEWEST, "--mlock", "--load-mode mlock"),
        (HELP_NEWEST, "-dio", "--load-mode dio"),
        (HELP_NEWEST, "--no-direct-io", "--load-mode none"),
        (HELP_NEWEST, "-fa", "--flash-attn on"),
        (HELP_NEWEST, "--no-mmap -lm mlock", "--load-mode mlock"),
        (HELP_NEWEST, "-lm mlock --no-mmap", "--load-mode none"),
        (HELP_NEWEST, "-ctk tq3_1", "--cache-type-k tq3_1"),
        (HELP_NEWEST, "-fa=enabled", "--flash-attn on"),
        (HELP_NEWEST, "--ctx-checkpoints 3", "--swa-checkpoints 3"),
        (HELP_NEWEST, "--control-vector-layer-range 1 2", "--control-vector-layer-range 1 2"),
        (HELP_NEWEST, "-ot a=CPU", "--override-tensor a=CPU"),
    ],
)
def test_a_flag_is_said_as_the_binary_knows_it(help_text: str, header: str, spoken: str) -> None:
    assert args(header, table=BUILT_IN.for_binary(help_text)) == spoken


@pytest.mark.parametrize("help_text", [HELP_OLDEST, HELP_BETWEEN, HELP_NEWEST])
def test_the_agent_decides_how_a_model_is_loaded_whatever_the_base_args_call_it(
    help_text: str,
) -> None:
    table = BUILT_IN.for_binary(help_text)
    assert args("--mmap", base=["--no-mmap"], table=table).endswith("mmap")
    assert "none" not in args("--mmap", base=["--no-mmap"], table=table)


def test_the_default_base_args_are_one_process_on_every_build_with_load_mode() -> None:
    between = spec(base=BASE_ARGS, table=BUILT_IN.for_binary(HELP_BETWEEN))
    newest = spec(base=BASE_ARGS, table=BUILT_IN.for_binary(HELP_NEWEST))
    assert between.hash == newest.hash == "afd4fe3dda4c"


def test_a_choice_that_the_binary_does_not_list_is_refused() -> None:
    table = BUILT_IN.for_binary(HELP_NEWEST)
    assert "one of f32, f16, bf16, q8_0, tq3_1" in faults("-ctk q5_1", table=table)[0]
    table = BUILT_IN.for_binary("-rea,  --reasoning [on|off]            no auto")
    assert "'-1' is not one of on, off." in faults("-rea -1", table=table)[0]


@pytest.mark.parametrize("header", ["--top-k 5", "--load-mode none", "-lm=none", "--no-kv-offload"])
def test_a_flag_that_the_binary_lacks_is_refused_for_that_reason(header: str) -> None:
    table = BUILT_IN.for_binary(HELP_OLDEST)
    assert "the llama-server in use does not know it" in faults(header, table=table)[0]
    with pytest.raises(FlagsRefused, match="the llama-server in use does not know it"):
        Validator(split_command_line(header), table)


def test_the_name_by_which_an_older_binary_knows_a_flag_leaves_the_hash_alone() -> None:
    table = BUILT_IN.for_binary(HELP_OLDEST)
    assert spec("--ctx-checkpoints 3", table=table).hash == spec("--swa-checkpoints 3").hash


NEWEST = BUILT_IN.for_binary(HELP_NEWEST)


@pytest.mark.parametrize(
    ("words", "canonical"),
    [
        ("-tl -5", "--token-limit -5"),
        ("--token_limit=5", "--token-limit 5"),
        ("--strange -a -b --glow", "--glow --strange -a -b"),
        ("--glow --no-glow", "--no-glow"),
        ("-fa2", "-fa2"),
    ],
)
def test_a_flag_that_only_the_binary_knows_is_the_operators(words: str, canonical: str) -> None:
    assert args(base=words.split(), table=NEWEST) == canonical
    assert "LLAMA_SIDECAR_UNKNOWN_FLAGS=allow" in faults(words, table=NEWEST)[0]
    assert args(words, table=NEWEST, unknown_flags_for_agents=True) == canonical


def test_one_flag_that_only_the_binary_knows_can_be_opened() -> None:
    some = OpenedFlags.parse("--token-limit", NEWEST)
    assert args("-tl 5", table=NEWEST, opened=some) == "--token-limit 5"
    assert faults("--glow", table=NEWEST, opened=some)


@pytest.mark.parametrize(
    ("row", "header", "canonical"),
    [
        ("-c,    --ctx-size, --context N         a new alias", "--context 8", "--ctx-size 8"),
        ("--spm-infill, --no-spm-infill          now a pair", "--no-spm-infill", "--no-spm-infill"),
        ("-fa,   --flash-attn                    a switch, as it once was", "-fa", "--flash-attn"),
        ("--top-k A B                            two values", "--top-k x y", "--top-k x y"),
        ("-rea,  --reasoning [on|off]            no auto", "-rea=1", "--reasoning on"),
    ],
)
def test_what_the_help_text_says_of_a_known_flag_counts(
    row: str, header: str, canonical: str
) -> None:
    assert args(header, table=BUILT_IN.for_binary(row + "\n")) == canonical


def test_a_path_is_never_taken_unseen_because_a_binary_takes_its_flag_otherwise(
    adapters: Path,
) -> None:
    for row in ("--lora FNAME SCALE", "--lora"):
        table = BUILT_IN.for_binary(row)
        some = OpenedFlags.parse("--lora=adapters", table, relative_to=adapters.parent)
        words = "--lora /etc/passwd 1" if "SCALE" in row else "--lora"
        assert "not known" in faults(words, table=table, opened=some)[0]


def test_a_table_knows_which_spellings_its_binary_takes() -> None:
    assert NEWEST.knows("--load-mode")
    assert NEWEST.knows("-tl")
    assert not NEWEST.knows("--mlock")
    assert not NEWEST.knows("--offline")
    assert not NEWEST.knows("--nonsense")


@pytest.mark.parametrize("line", ["--b\x1b[31mad   x", "--b\u202ead   x", "  --indented", "-----"])
def test_a_line_that_names_no_flag_adds_none(line: str) -> None:
    table = BUILT_IN.for_binary(HELP_NEWEST + line)
    assert table.spellings.keys() == NEWEST.spellings.keys()


# --- Asking the binary


def program(folder: Path, text: str) -> Path:
    file = folder / "llama-server"
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")


@needs_sh
def test_the_help_text_is_asked_for_in_a_scrubbed_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_THREADS", "abc")
    monkeypatch.setenv("HF_TOKEN", "geheim")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "help").write_text(HELP_OLDEST, encoding="utf-8")
    text = help_of(
        program(
            tmp_path,
            f'test "$1" = --help && cat {tmp_path}/help && env && '
            'test -d "$XDG_CONFIG_HOME" && echo "config: $(ls -A "$XDG_CONFIG_HOME")."',
        )
    )
    assert text.startswith(HELP_OLDEST)
    assert "LLAMA_ARG" not in text
    assert "geheim" not in text
    assert text.endswith("config: .\n")


@needs_sh
def test_the_program_cannot_wait_for_the_daemons_own_input(tmp_path: Path) -> None:
    (tmp_path / "help").write_text(HELP_OLDEST, encoding="utf-8")
    file = program(tmp_path, f"cat {tmp_path}/help -")
    own_input = os.dup(0)
    silent, writer = os.pipe()
    os.dup2(silent, 0)
    try:
        assert help_of(file, timeout_s=5) == HELP_OLDEST
    finally:
        os.dup2(own_input, 0)
        for fd in (own_input, silent, writer):
            os.close(fd)


@needs_sh
@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 0", "does not read like that of a llama-server"),
        ("echo broken >&2; exit 3", "ended with exit code 3: 'broken'"),
        ("echo hello", "does not read like that of a llama-server"),
        ("sleep 60 & sleep 60", "took more than 0.5 s"),
        ("kill -9 $$", "ended with exit code -9"),
    ],
)
def test_a_program_that_is_no_llama_server_is_named(tmp_path: Path, script: str, why: str) -> None:
    with pytest.raises(HelpUnavailable, match=re.escape(why)):
        help_of(program(tmp_path, script), timeout_s=0.5)


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(HelpUnavailable, match="cannot be started"):
        help_of(tmp_path / "missing")


# --- The table itself


def rows() -> list[dict[str, object]]:
    file = Path(validator.__file__).with_name("flags.json")
    table = json.loads(file.read_text(encoding="utf-8"))
    flags: list[dict[str, object]] = table["flags"]
    return flags


def test_the_table_holds_every_spelling_once() -> None:
    words = [word for flag in BUILT_IN.flags for word in (flag.name, *flag.aliases, *flag.negated)]
    assert len(words) == len(set(words)) == 413 + 7
    assert len(rows()) == 256 + 3


def test_the_table_is_consistent() -> None:
    names = {flag.name for flag in BUILT_IN.flags}
    by_name = {flag.name: flag for flag in BUILT_IN.flags}
    for flag in BUILT_IN.flags:
        assert set(flag.takes) <= set(validator._CANONICAL)
        assert bool(flag.reason) == (flag.policy is not Policy.AGENT), flag.name
        assert (flag.removes | flag.order_with) <= names
        assert flag.name not in flag.removes
        assert all(by_name[other].accumulates == flag.accumulates for other in flag.removes)
        assert all(flag.name in by_name[other].order_with for other in flag.order_with)
        assert all(value in flag.choices for value in flag.synonyms.values()) or not flag.choices
        assert not flag.translate or flag.translate[0] in names
        assert not (flag.negated and flag.takes)


def test_a_row_says_nothing_that_goes_without_saying() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(validator.Flag)}
    for row in rows():
        for key, value in row.items():
            assert value not in ([], {}, "", None), (row["name"], key)
            assert value != defaults[key], (row["name"], key)


def test_what_can_travel_in_a_request_is_marked() -> None:
    assert len([flag for flag in BUILT_IN.flags if flag.body]) == 48
    assert BUILT_IN.spellings["--temp"].flag.body == "temperature"


# --- The real llama-server

# Spellings that one build has and another has not: what came after b10068, what
# went with it, and what b11434 dropped.
COMES_AND_GOES = set(
    "--kv-unified-per-slot --mmproj-device -mmdev --video-fps --video-timestamp-interval "
    "--video-ffmpeg-dir --load-mode -lm --lazy-mode -lzm --n-cpu-ffn -ncffn --tools-runtime "
    "--mcp-servers-config --mcp-servers-json --reasoning-effort --log-jsonl --no-log-jsonl "
    "--spec-synth-len --spec-synth-rates --spec-draft-sampling "
    "--mlock --mmap --no-mmap -dio --direct-io -ndio --no-direct-io".split()
)
ONLY_IN_OLDER_BUILDS = set(
    "-mv --model-vocoder --hf-file-v -hffv -hfrv -hfv --hf-repo-v --tts-use-guide-tokens".split()
)
STRANGERS = ("--no-such-flag-0", "--no-such-flag-1", "--no-such-flag-2")


@pytest.fixture(scope="module")
def llama_server() -> Path:
    return real_parts.llama_server_bin()


@pytest.fixture(scope="module")
def help_text(llama_server: Path) -> str:
    return help_of(llama_server)


@pytest.fixture(scope="module")
def empty_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def answer(llama_server: Path, folder: Path, *words: str) -> str:
    """What it prints before it gives up on the last word, which must be one it cannot take."""
    environment = {"PATH": os.environ["PATH"], "XDG_CONFIG_HOME": str(folder)}
    done = subprocess.run(
        [str(llama_server), *words],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=30,
        check=False,
    )
    text = done.stdout.decode("utf-8", "replace")
    return text if done.returncode else "exit 0"


def real_arity(llama_server: Path, folder: Path, word: str) -> int | str:
    """How many words llama-server takes after this one, found from where it stumbles."""
    text = answer(llama_server, folder, word, *STRANGERS)
    if text == "exit 0":
        return 0
    for arity, stranger in enumerate(STRANGERS):
        if f"invalid argument: {stranger}" in text:
            return arity
    text = answer(llama_server, folder, word, "1", *STRANGERS)  # perhaps it wants a number
    for arity, stranger in enumerate(STRANGERS, start=1):
        if f"invalid argument: {stranger}" in text:
            return arity
    text = answer(llama_server, folder, word, "1")  # or something that "1" is not, or two
    if "expected value for argument" in text:
        return 2
    return 1 if "error while handling argument" in text else text[-200:]


@pytest.mark.integration
def test_the_table_has_every_flag_of_the_real_llama_server(help_text: str) -> None:
    columns = [
        line[:40] if line[39:40] == " " else line
        for line in help_text.splitlines()
        if re.match(r"--?[a-zA-Z]", line)
    ]
    named = {
        word
        for column in columns
        for word in re.findall(r"(?<![^ ])--?[a-zA-Z][\w.-]*(?=[, ]|$)", column)
    }
    table = BUILT_IN.for_binary(help_text)
    assert {word for word in table.spellings if table.knows(word)} == named
    assert len(named) > 400
    assert named - BUILT_IN.spellings.keys() <= ONLY_IN_OLDER_BUILDS
    assert BUILT_IN.spellings.keys() - named <= COMES_AND_GOES


@pytest.mark.integration
def test_every_spelling_takes_as_many_values_as_the_table_says(
    llama_server: Path, help_text: str, empty_folder: Path
) -> None:
    table = BUILT_IN.for_binary(help_text)
    words = [word for word in table.spellings if table.knows(word)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda word: real_arity(llama_server, empty_folder, word), words)
        real = dict(zip(words, found, strict=True))
    assert real == {word: len(table.spellings[word].flag.takes) for word in words}


@pytest.mark.integration
def test_every_choice_of_the_table_is_one_of_the_real_llama_server(
    llama_server: Path, help_text: str, empty_folder: Path
) -> None:
    table = BUILT_IN.for_binary(help_text)
    pairs = [
        (flag.name, value)
        for flag in table.flags
        if table.knows(flag.name)
        for value in (*flag.choices, *flag.synonyms)
    ]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        answers = list(
            threads.map(lambda pair: answer(llama_server, empty_folder, *pair, STRANGERS[0]), pairs)
        )
    refused = [
        pair
        for pair, text in zip(pairs, answers, strict=True)
        if f"invalid argument: {STRANGERS[0]}" not in text
    ]
    assert refused == []
    assert len(pairs) > 80


@pytest.mark.integration
def test_the_real_llama_server_takes_what_comes_of_the_default_base_args(
    llama_server: Path, help_text: str, empty_folder: Path
) -> None:
    taken = spec("-ctk q8_0 -fa", base=BASE_ARGS, table=BUILT_IN.for_binary(help_text)).args
    text = answer(llama_server, empty_folder, *taken, STRANGERS[0])
    assert f"invalid argument: {STRANGERS[0]}" in text
