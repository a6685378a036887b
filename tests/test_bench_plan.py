"""From a llama-swap configuration to a plan: macros, command lines, modes and secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import llama_swap, plan, server_args
from bench.llama_swap import ConfigError
from bench.plan import PlanError
from tests.daemon import ROOT

SLOW = [HealthCheck.too_slow]  # a machine with other work is no fault
CONFIGS = ROOT / "tests" / "llama_swap_configs"
ENVIRONMENT = {"LLAMA_BIN": "/opt/llama-server", "MODEL_DIR": "/srv/gguf"}


def argv_of(text: str, **environment: str) -> dict[str, list[str]]:
    config = llama_swap.parsed(text, environment)
    return {entry.id: list(entry.argv) for entry in config.entries}


def made(config: str, **wanted: object) -> plan.Plan:
    recipe = {"schema": 1, "llama_swap": {"config": f"{config}.yaml"} | wanted}
    return plan.made_whole(recipe, CONFIGS, ENVIRONMENT)


def model(config: str, id_: str, **wanted: object) -> plan.Model:
    (found,) = [each for each in made(config, **wanted).models if each.id == id_]
    return found


# --- macros


def test_macros_nest_where_they_are_defined_before_and_a_models_own_win() -> None:
    found = argv_of((CONFIGS / "windows_macros.yaml").read_text())

    server = "C:/Tools/llama/llama-server.exe --host 127.0.0.1 --port"
    common = "-ngl 99 -fa on --no-mmap -m E:/gguf"
    assert " ".join(found["small"]) == f"{server} 9101 {common}/small.gguf -c 32768"
    assert " ".join(found["large"]) == (
        f"{server} 9100 {common}/large.gguf -c 16384 --spec-type draft-mtp --spec-draft-n-max 3"
    )


def test_a_macro_that_names_a_later_one_is_an_error() -> None:
    text = "macros: {a: '${b}', b: x}\nmodels: {m: {cmd: 's ${a}'}}"

    with pytest.raises(ConfigError, match="model m: cmd: there is no macro b above"):
        argv_of(text)


def test_variables_of_the_environment_are_put_in_where_they_are_used() -> None:
    text = (CONFIGS / "posix_env_macro.yaml").read_text()

    assert argv_of(text, **ENVIRONMENT) == {
        "one": ["/opt/llama-server", "--port", "5800", "-m", "/srv/gguf/one.gguf"]
    }
    with pytest.raises(ConfigError, match=r"model one: cmd: .* variable MODEL_DIR is not set"):
        argv_of(text, LLAMA_BIN="x")


def test_ports_are_counted_in_the_order_of_the_names() -> None:
    text = "models: {b: {cmd: 's ${PORT}'}, c: {cmd: s}, a: {cmd: 's ${PORT}'}}"

    assert argv_of(text) == {"b": ["s", "5801"], "c": ["s"], "a": ["s", "5800"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1", "there are no models in it"),
        ("models: [a]", "models is no map"),
        ("models: {m: x}", "model m is no map"),
        ("models: {m: {}}", "model m has no cmd"),
        ("models: {m: {cmd: [a]}}", "model m: cmd is no text"),
        ("models: {m: {cmd: '# only'}}", "model m: cmd: it is empty"),
        ('models: {m: {cmd: "s \'open"}}', "a quote is opened and never closed"),
        ("macros: {a b: c}\nmodels: {m: {cmd: s}}", "'a b' is no name of a macro"),
        ("macros: {PORT: 1}\nmodels: {m: {cmd: s}}", "PORT is llama-swap's own macro"),
        ("macros: {a: 'x${a}'}\nmodels: {m: {cmd: s}}", "macros: a names itself"),
        ("models: {m: {cmd: s, env: x}}", "model m: env is no list"),
        ("models: {m: {cmd: s, env: [x]}}", "model m: env holds what is no NAME=VALUE"),
        ("startPort: x\nmodels: {m: {cmd: s}}", "startPort is no number"),
    ],
)
def test_a_configuration_that_is_none_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        argv_of(text)

    assert words in str(refused.value)


def test_macros_that_grow_without_end_are_refused() -> None:
    doubling = "".join(f"  m{n}: '{f'${{m{n - 1}}}' * 10}'\n" for n in range(1, 12))
    text = f"macros:\n  m0: 'xxxxxxxxxx'\n{doubling}models: {{m: {{cmd: 's ${{m11}}'}}}}"

    with pytest.raises(ConfigError, match="grows beyond"):
        argv_of(text)


# --- splitting


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (r"a.exe -m C:\gguf\x.gguf", ["a.exe", "-m", r"C:\gguf\x.gguf"]),
        (r'"C:\Program Files\a.exe" b', [r"C:\Program Files\a.exe", "b"]),
        ("a 'b c'", ["a", "'b", "c'"]),
        (r'a "b \"c\" d"', ["a", 'b "c" d']),
        (r'a b\\"c d"', ["a", r"b\c d"]),
        (r'a "b\\" c', ["a", "b\\", "c"]),
        (r"a b\\c", ["a", r"b\\c"]),
        ('a "" b', ["a", "", "b"]),
        ('a "b""c" d', ["a", 'b"c', "d"]),
        ("a\tb\n  c\r\nd", ["a", "b", "c", "d"]),
        ("a \\\n  b \\\n  c", ["a", "b", "c"]),
        ("a\n # b\n#c\nd", ["a", "d"]),
    ],
)
def test_commands_are_split_as_windows_does(command: str, words: list[str]) -> None:
    assert llama_swap.split(command, is_windows=True) == words


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (r"a b\ c 'd \e' " + r'"f \"g\""', ["a", "b c", r"d \e", 'f "g"']),
        ("a \\\n  b\\\nc", ["a", "b", "c"]),
        ("a --x '{\"y\": 1}'", ["a", "--x", '{"y": 1}']),
        ("a\n # b\n#c\nd", ["a", "d"]),
    ],
)
def test_commands_are_split_as_a_shell_does(command: str, words: list[str]) -> None:
    assert llama_swap.split(command, is_windows=False) == words


@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(st.lists(st.text(st.sampled_from('ab \\"\t'), max_size=8), min_size=1, max_size=5))
def test_what_windows_programs_are_given_is_split_back(words: list[str]) -> None:
    assert llama_swap.split_windows(subprocess.list2cmdline(words)) == words


def test_paths_tell_by_whose_rules_commands_are_split() -> None:
    for file in CONFIGS.glob("*.yaml"):
        config = llama_swap.read(file, ENVIRONMENT)
        assert config.is_windows == file.stem.startswith("windows"), file


# --- what a command line becomes


@pytest.mark.parametrize("id_", ["a", "b", "c", "d", "e"])
def test_every_spelling_of_the_context_becomes_one(id_: str) -> None:
    modes = model("posix_every_spelling_of_context", id_).modes

    for words in modes.values():
        assert words[words.index("--ctx-size") + 1] == "32768"
        assert len([word for word in words if word.startswith(("-c", "--ctx"))]) == 1
    assert "5" not in modes["off"]


def test_what_the_runner_owns_is_removed_and_the_rest_stays_in_order() -> None:
    found = model("posix_owned", "owned")

    assert (found.server, found.model_path) == ("llama-server", "/m/a.gguf")
    kept = "--metrics --threads 4 --temp -1 --seed -1 --new-flag -5 --other"
    assert " ".join(found.modes["off"]) == f"{kept} --ctx-size 32768"
    assert " ".join(found.modes["on"]) == f"{kept} --ctx-size 32768 --spec-type draft-mtp"


def test_production_that_predicts_several_tokens_is_on_as_it_is() -> None:
    modes = model("windows_folded", "glm-air", n_max=[1, 3]).modes

    plain = "--ctx-size 32768 -ngl 99 -ncmoe 28 --jinja"
    assert {mode: " ".join(words) for mode, words in modes.items()} == {
        "off": plain,
        "on": f"{plain} --spec-type draft-mtp --spec-draft-n-max 2",
        "on-n1": f"{plain} --spec-type draft-mtp --spec-draft-n-max 1",
        "on-n3": f"{plain} --spec-type draft-mtp --spec-draft-n-max 3",
    }


def test_other_speculation_is_off_in_both_and_measured_as_production_if_asked() -> None:
    found = model("windows_draft_model", "with-draft", prod=True)

    assert found.modes["off"] == ("--ctx-size", "32768")
    assert found.modes["on"] == ("--ctx-size", "32768", "--spec-type", "draft-mtp")
    assert " ".join(found.modes["prod"]) == (
        r"-md C:\gguf\small-draft.gguf --spec-type draft-simple -ngld 99 -devd CUDA1 "
        "-ctkd q8_0 --draft-p-min 0.6 --ctx-size 32768"
    )
    assert found.notes == ("production speculates by draft-simple, which neither off nor on does",)


def test_a_head_in_a_file_of_its_own_is_used_when_on() -> None:
    modes = model("windows_draft_model", "with-head").modes

    assert modes["off"] == ("--ctx-size", "32768")
    assert " ".join(modes["on"]) == (
        r"--ctx-size 32768 --model-draft C:\gguf\mtp-big.gguf --spec-type draft-mtp"
    )


def test_other_words_can_turn_it_on() -> None:
    on = ["-md", "{model}", "--spec-type", "draft-simple"]

    modes = model("bare", "m", on=on).modes

    assert " ".join(modes["on"]) == "--ctx-size 32768 -md m.gguf --spec-type draft-simple"


def test_variables_that_change_the_server_or_are_secret_are_left_out_and_named() -> None:
    found = model("windows_env", "second-card")

    assert found.env == {"CUDA_VISIBLE_DEVICES": "1", "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1"}
    assert found.notes == (
        "its variable LLAMA_ARG_SPEC_TYPE is left out",
        "its variable HF_TOKEN is left out",
    )


def test_what_is_no_llama_server_is_skipped_with_the_reason() -> None:
    whole = made("windows_others")

    assert [each.id for each in whole.models] == ["chat"]
    assert {each["id"]: each["reason"] for each in whole.skipped} == {
        "whisper": "whisper-server.exe is no llama-server",
        "docker": "docker is no llama-server",
        "no-model": "its command names no model",
    }


SPECULATIVE = sorted(
    {
        word
        for flag in json.loads((ROOT / "flags.json").read_text())["flags"]
        if flag["name"].startswith(("--spec-", "--draft", "--lookup-cache-"))
        for word in (flag["name"], *flag.get("aliases", []), *flag.get("negated", []))
    }
)


@pytest.mark.parametrize("word", [*SPECULATIVE, "--spec-of-a-later-build"])
def test_every_spelling_of_every_speculative_flag_is_gone_when_off(word: str) -> None:
    kept = ["-ngl", "99", "--temp", "-1", "-fa", "on"]
    parts = server_args.parts_of([*kept[:2], word, *_values(word), *kept[2:]])

    off = server_args.without(parts, lambda part: part.is_speculative)

    assert server_args.joined(off) == kept


def _values(word: str) -> list[str]:
    flag = server_args._table().flag(word)
    return ["7"] * (len(flag.takes) if flag else 1)


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(
    st.lists(
        st.sampled_from(
            "-c --ctx-size=5 -fa on -ngl 99 --temp -0.5 -m x.gguf --jinja --new 3 -1 a "
            "--api-key sk-secret --api-key=sk-secret -hft hf-secret --spec-type draft-mtp".split()
        ),
        max_size=12,
    )
)
def test_cutting_loses_no_word_and_a_mask_hides_every_key(words: list[str]) -> None:
    assert server_args.joined(server_args.parts_of(words)) == words
    parts = server_args.parts_of(words)
    secret = {v for part in parts if part.name in server_args.SECRETS for v in part.values}
    shown = server_args.masked(words)
    assert len(shown) == len(words)
    for value in secret - {"", "a", "on"}:
        position = [
            n for n, word in enumerate(words) if value in word.partition("=")[2] or word == value
        ]
        assert any(server_args.MASK in shown[n] for n in position)


# --- plans


def test_a_plan_that_is_written_is_read_back(tmp_path: Path) -> None:
    whole = made("windows_folded", n_max=[2])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(whole.as_json()))

    assert plan.read(file) == whole


def test_a_recipe_is_made_whole_where_its_configuration_is(tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    (tmp_path / "swap" / "config.yaml").write_bytes((CONFIGS / "windows_folded.yaml").read_bytes())
    file = tmp_path / "plan.json"
    recipe = {"config": "swap/config.yaml", "rules": "windows", "models": ["glm-air"]}
    file.write_text(json.dumps({"schema": 1, "n_predict": 64, "llama_swap": recipe}))

    whole = plan.read(file)

    assert [each.id for each in whole.models] == ["glm-air"]
    assert whole.n_predict == 64


def test_the_desktops_plan_names_no_model_of_its_own(tmp_path: Path) -> None:
    recipe = json.loads((ROOT / "bench" / "plans" / "sam-desktop.json").read_text())
    assert "models" not in recipe
    assert "models" not in recipe["llama_swap"]
    eight = "".join(
        f"  model-{n}:\n    cmd: C:\\llama\\llama-server.exe -m C:\\gguf\\{n}.gguf -c 8192\n"
        for n in range(8)
    )
    (tmp_path / "config.yaml").write_text("models:\n" + eight)
    recipe["llama_swap"]["config"] = "config.yaml"
    (tmp_path / "plan.json").write_text(json.dumps(recipe))

    whole = plan.read(tmp_path / "plan.json")

    assert [each.id for each in whole.models] == [f"model-{n}" for n in range(8)]
    assert {tuple(each.modes) for each in whole.models} == {
        ("off", "on", "on-n1", "on-n2", "on-n3")
    }
    assert {each.modes["off"] for each in whole.models} == {("--ctx-size", "32768")}


def valid() -> dict[str, Any]:
    one = {"id": "m", "server": "s", "model_path": "m.gguf", "modes": {"off": [], "on": []}}
    return {"schema": 1, "models": [one]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_predict": 1}, "n_predict is 1, not a whole number 2 to 100000"),
        ({"n_predict": True}, "n_predict is true"),
        ({"rounds": 0}, "rounds is 0"),
        ({"pause_s": -1}, "pause_s is -1"),
        ({"load_timeout_s": "x"}, 'load_timeout_s is "x"'),
        ({"prompts": ["code", "nonsense"]}, "prompts: take each at most once out of code, "),
        ({"prompts": []}, "prompts: take each at most once"),
        ({"prompts": ["code", "code"]}, "prompts: take each at most once"),
        ({"name": 5}, "name is no text"),
        ({"skipped": 5}, "skipped is no list"),
        ({"skipped": [5]}, "skipped is no JSON object"),
        ({"modells": []}, "the plan has a field 'modells'"),
        ({"models": {}}, "models is no list"),
        ({"models": [5]}, "models[0] is no JSON object"),
    ],
)
def test_a_faulty_plan_is_refused_by_its_field(change: Mapping[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as refused:
        plan.parsed(valid() | dict(change))

    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modes": {"on": []}}, "models[0].modes has no 'off'"),
        ({"modes": {"off": [], "on-n0": []}}, "models[0].modes: 'on-n0' is none of"),
        ({"modes": {"off": "-c 5"}}, "models[0].modes.off is no list of texts"),
        ({"id": ""}, "models[0].id is no text"),
        ({"server": None}, "models[0].server is no text"),
        ({"env": {"LLAMA_ARG_CTX_SIZE": "1"}}, "LLAMA_ARG_CTX_SIZE would change"),
        ({"path": "x"}, "models[0] has a field 'path'"),
    ],
)
def test_a_faulty_model_is_refused_by_its_field(change: Mapping[str, Any], words: str) -> None:
    value = valid()
    value["models"][0] |= dict(change)

    with pytest.raises(PlanError) as refused:
        plan.parsed(value)

    assert words in str(refused.value)


def test_two_models_of_one_id_are_refused() -> None:
    value = valid()
    value["models"] *= 2

    with pytest.raises(PlanError, match="two models have one id"):
        plan.parsed(value)


# --- the command


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.plan", "llama-swap", *words]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_no_output_shows_a_key() -> None:
    written = []
    for name in ("windows_folded", "posix_owned", "windows_env", "routing"):
        done = run(str(CONFIGS / f"{name}.yaml"), "--prod")
        assert done.returncode == 0, done.stderr
        written.append(done.stdout + done.stderr)

    for secret in ("sk-desktop", "k1,k2", "hf_secret", "hf_not_for_you", "sk-one", "sk-peer"):
        assert secret not in "".join(written)


def test_the_command_writes_a_plan_and_tells_what_it_leaves_out(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"

    done = run(
        *(str(CONFIGS / "windows_others.yaml"), "--out", str(out), "--n-max", "1,2"),
        *("--ctx-size", "4096", "--models", "chat,docker", "--windows", "--n-predict", "32"),
    )

    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "plan: docker is skipped: docker is no llama-server\n"
    whole = plan.read(out)
    assert (whole.name, whole.ctx_size, whole.n_predict) == ("windows_others", 4096, 32)
    assert tuple(whole.models[0].modes) == ("off", "on", "on-n1", "on-n2")
    assert whole.models[0].modes["off"] == ("--ctx-size", "4096")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.yaml"], "No such file"),
        ([str(CONFIGS / "windows_others.yaml"), "--models", "nobody"], "has no model 'nobody'"),
        ([str(CONFIGS / "windows_others.yaml"), "--models", "docker"], "has no model to measure"),
        ([str(CONFIGS / "bare.yaml"), "--n-max", "x"], 'llama_swap.n_max is "x"'),
        ([str(ROOT / "Makefile")], "line "),
    ],
)
def test_the_command_refuses_in_words(words: list[str], said: str) -> None:
    done = run(*words)

    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("plan: ")
    assert done.stderr.count("\n") == 1
