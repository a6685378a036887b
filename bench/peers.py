"""Other programs at the same work, in the same run, where they can be had.

llama-server's own router mode relays to llama-servers that it starts; LiteLLM's proxy
relays to any OpenAI server. Each is a row like the others, with the peer in the
place of the daemon; the daemon's own numbers for the same work stand beside it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import wrk
from bench.parts import (
    CHAT,
    PATIENCE_S,
    ROOT,
    BenchError,
    Setup,
    Target,
    ask,
    await_health,
    free_port,
    poll,
    running_daemon,
    started,
)
from bench.rows import MANY, Bench, Found, Row, chat, run_streams
from tests import real_parts

LITELLM = ROOT / ".cache" / "litellm"
INSTALL_S = 300.0
TOKENS = 64
SERVER_ARGS = ("-c", "2048", "-t", "2")


def rows(bench: Bench, stack: contextlib.ExitStack) -> Mapping[str, Row]:
    """Those that can be had; says on stderr which cannot, and why."""
    found = {}
    try:
        real_parts.llama_server_bin()
        found["router"] = Row("a peer: llama-server's router mode, 1 real stream", router)
    except RuntimeError as exc:
        print(f"no router mode to compare with: {exc}", file=sys.stderr)
    try:
        proxy = stack.enter_context(running_litellm(bench, litellm_program()))
    except BenchError as exc:
        print(f"no LiteLLM to compare with: {exc}", file=sys.stderr)
    else:
        title = "a peer: LiteLLM's proxy, the instant upstream"
        found["litellm"] = Row(title, functools.partial(litellm, proxy))
    return found


# --- llama-server's router mode


def router(bench: Bench) -> Found:
    """The same stream direct, through the router, and through the daemon."""
    server, model = real_parts.llama_server_bin(), real_parts.tiny()
    folder = bench.folder / f"router-{bench.round}"
    models = folder / "models"
    models.mkdir(parents=True)
    (models / "tiny.gguf").symlink_to(model)
    direct_port, router_port = free_port(), free_port()
    own = ["--host", "127.0.0.1", "--offline", *SERVER_ARGS]
    setup = Setup(bench.program, server, {"tiny": model}, 1, SERVER_ARGS)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with (
        started(
            [str(server), "-m", str(model), "--port", str(direct_port), *own],
            *(environment, folder / "direct.log"),
        ) as direct,
        started(
            [str(server), "--models-dir", str(models), "--port", str(router_port), *own],
            *(environment, folder / "router.log"),
        ) as routing,
        running_daemon(setup, folder / "daemon") as daemon,
    ):
        await_health(direct, direct_port, "llama-server")
        await_health(routing, router_port, "the router")
        ways = {"direct": direct_port, "the router": router_port, "llama-sidecar": daemon.port}
        found = {}
        for way, port in ways.items():
            _answer_once(Target(port))
            found[way] = real_stream(port)
    return {
        f"{name}, {way}": (found["direct"][name], found[way][name])
        for name in ("first byte p50 ms", "gap p50 ms", "gap p99 ms")
        for way in ("the router", "llama-sidecar")
    }


def _answer_once(target: Target) -> None:
    """Have the model loaded, which neither way is measured by."""

    def is_answered() -> bool:
        return ask(target, "POST", CHAT, chat("tiny", max_tokens=1))[0] == 200

    poll(is_answered, f"port {target.port} answers a chat")


def real_stream(port: int) -> dict[str, Any]:
    """10 streams that begin a quarter of a second after each other."""
    job = {
        "port": port,
        "key": "",
        "path": CHAT,
        "body": chat("tiny", stream=True, max_tokens=TOKENS, cache_prompt=False).decode(),
        "streams": 10,
        "spread_s": 2.5,
        "delay_s": 0,
        "timeout_s": PATIENCE_S,
    }
    found = run_streams(job)
    if found["faults"]:
        raise BenchError(f"a real stream broke: {found['faults'][0]}")
    return found


# --- LiteLLM


def litellm_program() -> Path:
    """In a virtual environment of its own. Raises BenchError if it cannot be installed."""
    program = LITELLM / "bin" / "litellm"
    if program.exists():
        return program
    print("installing litellm[proxy] into .cache/litellm, some minutes", file=sys.stderr)
    venv.create(LITELLM, with_pip=True)
    command = [str(LITELLM / "bin" / "python"), "-m", "pip", "install", "-q", "litellm[proxy]"]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=True)
    except subprocess.TimeoutExpired:
        raise BenchError(f"pip took more than {INSTALL_S:g} s") from None
    except subprocess.CalledProcessError as exc:
        raise BenchError(f"pip install failed: {exc.stderr[-500:]}") from exc
    return program


@contextlib.contextmanager
def running_litellm(bench: Bench, program: Path) -> Iterator[Target]:
    """Its proxy over the shared daemon's instant upstream. Raises BenchError."""
    upstream = bench.shared().upstream("instant", bench.launcher)
    target = Target(free_port(), "sk-" + secrets.token_urlsafe(24))
    model = {
        "model": "openai/instant",
        "api_base": f"http://127.0.0.1:{upstream.port}/v1",
        "api_key": upstream.key,
    }
    config = bench.folder / "litellm.yaml"  # JSON is YAML too
    entry = {"model_name": "instant", "litellm_params": model}
    config.write_text(json.dumps({"model_list": [entry]}))
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": target.key}
    python = program.with_name("python")  # its first line names one that may have moved since
    command = [str(python), str(program), "--config", str(config), "--host", "127.0.0.1"]
    log = bench.folder / "litellm.log"
    with started([*command, "--port", str(target.port)], environment, log) as process:

        def is_answered_or_ended() -> bool:
            if process.poll() is not None:
                return True
            with contextlib.suppress(OSError):
                return ask(target, "POST", CHAT, chat())[0] == 200
            return False

        poll(is_answered_or_ended, "LiteLLM answers a chat")
        if process.poll() is not None:
            raise BenchError(f"LiteLLM ended with exit code {process.returncode}")
        yield target


def litellm(proxy: Target, bench: Bench) -> Found:
    daemon = bench.shared()
    direct = daemon.upstream("instant", bench.launcher)
    ways = {"base": direct, "LiteLLM": proxy, "llama-sidecar": daemon.target("instant")}
    found: Found = {}
    for connections in (1, MANY):
        load = wrk.Load(connections, bench.settings.seconds, chat())
        results = {way: bench.wrk(load, target) for way, target in ways.items()}
        base = results.pop("base")
        for way, result in results.items():
            where = f"{connections} connection{'s' if connections > 1 else ''}, {way}"
            found[f"p50 us, {where}"] = (base.p50_us, result.p50_us)
            found[f"requests/s, {where}"] = (base.rate, result.rate)
    return found
