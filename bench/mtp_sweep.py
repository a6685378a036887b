"""Does speculation pay: each model of a plan, measured with it and without.

    python -m bench.mtp_sweep plan.json --out results.jsonl

For every model its modes run in blocks, in the order off, on, on, off, each block with a
llama-server of its own on a free port of 127.0.0.1. A block is a few warm-ups and then
every prompt, as often as the plan says, one at a time, greedily, without the prompt cache
and always to the same number of tokens. Whether the server speculates is asked of itself.

Every answer is on the disk before the next request is sent. A run that was ended in any way
goes on where it was: a block of which cells are missing gets a fresh server and its warm-ups
again, and only the missing cells are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

import winsvc
from bench import gguf_header, journal, machine, prompts, server_args
from bench import plan as plans
from bench.plan import Model, Plan
from bench.progress import Progress

HOST: Final = "127.0.0.1"
HEALTH_POLL_S: Final = 0.05
HEALTH_TIMEOUT_S: Final = 10.0
STOP_S: Final = 10.0
LAST_WORDS_S: Final = 5.0  # for a server that broke off an answer to end, and say why
SHUTDOWN_S: Final = 120.0  # then it was none
WARM_UP_TOKENS: Final = 32
LONGEST_LINE: Final = 4096
LONGEST_ERROR: Final = 500
EDGE_BYTES: Final = 2**20

INTERRUPTED: Final = 130


class ServerFailed(Exception):
    """A llama-server did not come up, or is not what was asked for; with its first error."""


class CellFailed(Exception):
    """One request was not answered as it should be."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One request of a block."""

    prompt: str
    repetition: int


@dataclasses.dataclass(frozen=True)
class Block:
    """One llama-server's turn: so and so many-th block of one mode of one model."""

    model: Model
    mode: str
    number: int

    @property
    def id(self) -> str:
        return f"{self.model.id}/{self.mode}/b{self.number}"

    @property
    def server_id(self) -> str:
        return f"{self.id}/server"

    @property
    def wants_speculation(self) -> bool | None:
        """None where production decides."""
        return None if self.mode == "prod" else self.mode != "off"

    def cell_id(self, cell: Cell) -> str:
        return f"{self.id}/{cell.prompt}/r{cell.repetition}"

    def record(self, kind: str, id_: str) -> journal.Record:
        return {
            "id": id_,
            "kind": kind,
            "model": self.model.id,
            "mode": self.mode,
            "block": self.number,
        }


def blocks_of(model: Model, rounds: int) -> list[Block]:
    """A, B, B, A for two modes, A, B, C, C, B, A for three; again for each further round."""
    modes = list(model.modes)
    seen: Counter[str] = Counter()
    blocks = []
    for mode in (modes + modes[::-1]) * rounds:
        blocks.append(Block(model, mode, seen[mode]))
        seen[mode] += 1
    return blocks


def cells_of(plan: Plan) -> list[Cell]:
    return [Cell(prompt, rep) for rep in range(plan.repetitions) for prompt in plan.prompts]


# --- the server


class Server:
    """A llama-server that runs and answers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, key: str) -> None:
        self.process = process
        self.load_ms = 0.0
        self._port = port
        self._key = key
        self._output = _Output(process, key)

    def ask(self, method: str, path: str, body: object = None, timeout_s: float = 10.0) -> Any:
        """The JSON that it answers. Raises OSError, HTTPException, ValueError or CellFailed."""
        connection = HTTPConnection(HOST, self._port, timeout=timeout_s)
        with contextlib.closing(connection):
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            text = response.read()
        if response.status != 200:
            raise CellFailed(f"{method} {path}: {response.status} {_shown_error(text)}")
        return json.loads(text)

    def is_up(self) -> bool:
        try:
            self.ask("GET", "/health", timeout_s=HEALTH_TIMEOUT_S)
            return True
        except (OSError, HTTPException, ValueError, CellFailed):
            return False

    def has_ended(self, within_s: float = 0.0) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(within_s)
        return self.process.poll() is not None

    def last_words(self) -> str:
        """How it ended, and its first line of error."""
        self._output.join(LAST_WORDS_S)
        code = self.process.poll()
        how = "" if code is None else f"llama-server ended with {_exit_code(code)}: "
        return (how + (self._output.first_error() or "it said nothing"))[:LONGEST_ERROR]

    def stop(self) -> None:
        winsvc.terminate(self.process)
        if not self.has_ended(STOP_S):
            winsvc.kill(self.process)
            self.has_ended(STOP_S)
        self._output.join(STOP_S)


def _exit_code(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _shown_error(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"]["message"])[:LONGEST_ERROR]
    except (ValueError, KeyError, TypeError):
        return text.decode("utf-8", "replace")[:LONGEST_ERROR]


_LOG_PREFIX = re.compile(r"^[0-9.]+ ([DIWE]) +")
_SOUNDS_BAD = re.compile(r"error|fail|invalid|unable|unknown|abort|not found", re.IGNORECASE)


class _Output:
    """Reads what a server says, for ever: a full pipe would hang it. Keeps little of it."""

    def __init__(self, process: subprocess.Popen[bytes], secret: str) -> None:
        self._process = process
        self._secret = secret
        self._error = self._hint = self._last = ""
        self._thread = winsvc.start_thread("server-output", self._drain)

    def first_error(self) -> str:
        """Its first line of level E; else one that sounds so; else its last."""
        return self._error or self._hint or self._last

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _drain(self) -> None:
        for raw in winsvc.output_lines(self._process, LONGEST_LINE):
            line = raw.decode("utf-8", "replace").strip().replace(self._secret, "***")
            if not line:
                continue
            level = _LOG_PREFIX.match(line)
            words = line[level.end() :] if level else line
            if level and level[1] == "E":
                self._error = self._error or words
            elif not self._hint and _SOUNDS_BAD.search(words):
                self._hint = words
            self._last = words


@contextlib.contextmanager
def started(block: Block, timeout_s: float) -> Iterator[Server]:
    """A server that is ready. Raises ServerFailed."""
    key = secrets.token_urlsafe(24)
    port = free_port()
    argv = [block.model.server, *told(block), "--host", HOST, "--port", str(port)]
    with winsvc.private_dir() as empty:
        secret = {"LLAMA_API_KEY": key}  # nobody else on this machine asks it by mistake
        environment = winsvc.child_environment(Path(empty), dict(block.model.env) | secret)
        began = time.monotonic()
        try:
            process = winsvc.spawn(argv, environment)
        except OSError as exc:
            raise ServerFailed(f"{block.model.server} cannot be started: {exc}") from exc
        server = Server(process, port, key)
        try:
            _wait_until_ready(server, began + timeout_s, timeout_s)
            server.load_ms = (time.monotonic() - began) * 1000
            yield server
        finally:
            server.stop()


def _wait_until_ready(server: Server, deadline: float, timeout_s: float) -> None:
    while not server.is_up():
        if server.has_ended(HEALTH_POLL_S):
            raise ServerFailed(server.last_words())
        if time.monotonic() > deadline:
            raise ServerFailed(f"it was not ready within {timeout_s:g} s: {server.last_words()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


# --- one block


class Sweep:
    """Works through a plan and appends to the journal what it finds."""

    def __init__(
        self, plan: Plan, results: journal.Journal, *, is_retrying: bool, is_json: bool
    ) -> None:
        self._plan = plan
        self._results = results
        self._cells = cells_of(plan)
        self._blocks = [b for model in plan.models for b in blocks_of(model, plan.rounds)]
        self._undone = {
            id_
            for id_, record in results.records.items()
            if is_retrying and record["outcome"] == "error"
        }

        counts = self.outcomes()
        done = counts.total() - counts["missing"]
        self._progress = Progress(plan.name, counts.total(), done, is_json=is_json)

    def run(self) -> None:
        """Raises OSError where nothing can be written any more, and JournalError."""
        with self._progress:
            self._report("")
            last = None
            for block in self._blocks:
                if self._missing(block):
                    self._pause(last, block.model.id)
                    last = block.model.id
                    self._run_block(block)
            self._report("")
            counts = self.outcomes()
            self._progress.say(
                f"done: {counts['ok']} measured, {counts['error']} failed, "
                f"{counts['unsupported']} unsupported: {self._results.path}"
            )

    def _pause(self, last: str | None, following: str) -> None:
        if last not in (None, following) and self._plan.pause_s:
            self._report(f"pausing for {self._plan.pause_s:g} s")
            threading.Event().wait(self._plan.pause_s)

    def outcomes(self) -> Counter[str]:
        """Cells by outcome; those that an unsupported block has not count as such."""
        counts: Counter[str] = Counter()
        for block in self._blocks:
            if self._is_unsupported(block):
                counts["unsupported"] += len(self._cells)
                continue
            for cell in self._cells:
                id_ = block.cell_id(cell)
                is_done = self._is_done(id_)
                counts[self._results.records[id_]["outcome"] if is_done else "missing"] += 1
        return counts

    def _is_unsupported(self, block: Block) -> bool:
        record = self._results.records.get(block.server_id)
        return record is not None and record["outcome"] == "unsupported"

    def _missing(self, block: Block) -> list[Cell]:
        if self._is_unsupported(block):
            return []
        return [cell for cell in self._cells if not self._is_done(block.cell_id(cell))]

    def _is_done(self, id_: str) -> bool:
        return id_ in self._results.records and id_ not in self._undone

    def _run_block(self, block: Block) -> None:
        reason = why_unsupported(block)
        if reason:
            self._append_server(block, outcome="unsupported", error=reason)
            self._progress.say(f"{block.id}: unsupported: {reason}")
            return
        while missing := self._missing(block):  # each turn writes one cell at least
            vram_before = machine.vram_bytes()
            try:
                with started(block, self._plan.load_timeout_s) as server:
                    self._prepare(block, server, vram_before)
                    self._measure(block, server, missing)
            except ServerFailed as exc:
                self._fail(block, missing, str(exc))

    def _prepare(self, block: Block, server: Server, vram_before: int | None) -> None:
        """Check what the server is, warm it up and note it. Raises ServerFailed."""
        self._report(f"{block.id}: warming up")
        try:
            found = _examined(server, block)
            for _ in range(self._plan.warm_ups):
                _answer(server, prompts.WARM_UP, WARM_UP_TOKENS, self._plan)
        except NO_ANSWER as exc:
            raise ServerFailed(_reason(server, exc)) from exc
        self._check_build(block, found["build_info"])
        known = self._results.records.get(block.server_id)
        if known is None or known["outcome"] != "ok":
            found |= {
                "load_ms": round(server.load_ms, 3),
                "rss_bytes": machine.rss_bytes(server.process.pid),
                "vram_bytes": _more(vram_before, machine.vram_bytes()),
            }
            self._append_server(block, **found)

    def _check_build(self, block: Block, build: str) -> None:
        """Raises JournalError where the run was begun with another build of this program."""
        for record in self._results.records.values():
            is_same = record["kind"] == "server" and record["argv"][:1] == [block.model.server]
            then = record.get("build_info") if is_same else None
            if then and then != build:
                raise journal.JournalError(
                    f"{block.model.server} is now build {build}, and {record['id']} was measured "
                    f"with {then}: begin anew with --new-run"
                )

    def _measure(self, block: Block, server: Server, cells: Sequence[Cell]) -> None:
        """Measure them, up to the first that leaves no server behind."""
        for cell in cells:
            self._report(f"{block.cell_id(cell)}")
            record = block.record("cell", block.cell_id(cell)) | {
                "prompt": cell.prompt,
                "rep": cell.repetition,
            }
            try:
                found = _measured(server, block, prompts.PROMPTS[cell.prompt], self._plan)
            except NO_ANSWER as exc:
                reason = _reason(server, exc)
                _wait_out_a_shutdown()
                self._append(record | NOTHING_MEASURED | {"outcome": "error", "error": reason})
                if server.has_ended() or not isinstance(exc, CellFailed):
                    return
            else:
                self._append(record | {"outcome": "ok", "error": ""} | found)

    def _fail(self, block: Block, cells: Sequence[Cell], reason: str) -> None:
        """No server, no cells: each is told why."""
        _wait_out_a_shutdown()
        if not self._is_done(block.server_id):
            self._append_server(block, outcome="error", error=reason)
        for cell in cells:
            record = block.record("cell", block.cell_id(cell))
            place = {"prompt": cell.prompt, "rep": cell.repetition}
            self._append(record | place | NOTHING_MEASURED | {"outcome": "error", "error": reason})
        self._progress.say(f"{block.id}: {reason}")

    def _append_server(self, block: Block, **found: Any) -> None:
        argv = server_args.masked(told(block))
        record = block.record("server", block.server_id) | NO_SERVER | found
        self._append(record | {"argv": [block.model.server, *argv]})

    def _append(self, record: journal.Record) -> None:
        self._results.append(record)
        self._undone.discard(record["id"])

    def _report(self, said: str) -> None:
        counts = self.outcomes()
        speed = self._last_speed()
        shown = f"{said}  {speed:.1f} tok/s" if speed else said
        done = counts.total() - counts["missing"]
        self._progress.report(done, shown, cell=said, tok_s=speed, failed=counts["error"])

    def _last_speed(self) -> float | None:
        for record in reversed(self._results.records.values()):
            if record["kind"] == "cell" and record["outcome"] == "ok":
                return speed_of(record)
        return None


NO_ANSWER: Final = (OSError, HTTPException, ValueError, KeyError, TypeError, IndexError, CellFailed)
NO_SERVER: Final[dict[str, Any]] = {
    "outcome": "ok",
    "error": "",
    "load_ms": None,
    "rss_bytes": None,
    "vram_bytes": None,
    "n_ctx": None,
    "build_info": None,
    "speculative": None,
}
NOTHING_MEASURED: Final[dict[str, Any]] = dict.fromkeys(
    "prompt_n prompt_ms predicted_n predicted_ms draft_n draft_n_accepted wall_ms text "
    "text_sha256".split()
)


def speed_of(cell: Mapping[str, Any]) -> float | None:
    """Tokens a second. The first token comes with the prompt, so it does not count."""
    if not cell["predicted_ms"]:
        return None
    return float((cell["predicted_n"] - 1) / cell["predicted_ms"] * 1000)


def told(block: Block) -> list[str]:
    """The words that llama-server is given, but for where it is to listen."""
    path = block.model.model_path
    return [*([] if path is None else ["--model", path]), *block.model.modes[block.mode]]


def why_unsupported(block: Block) -> str:
    """Empty unless the block asks a GGUF for an MTP head that it does not have.

    A file that cannot be read is left to llama-server, whose words are the better ones.
    """
    parts = server_args.parts_of(block.model.modes[block.mode])
    asks = server_args.MTP in server_args.speculation_types(parts)
    has_own_head = server_args.last_value(parts, server_args.DRAFT_MODEL) is not None
    path = block.model.model_path
    if not asks or has_own_head or path is None:
        return ""
    try:
        header = gguf_header.read(Path(path))
    except (gguf_header.BadHeader, OSError):
        return ""
    if header.mtp_layers:
        return ""
    return f"the GGUF ({header.architecture}) has no layers for multi-token prediction"


def _examined(server: Server, block: Block) -> dict[str, Any]:
    """What the server says of itself. Raises NO_ANSWER; CellFailed if it is another mode."""
    slots, props = server.ask("GET", "/slots"), server.ask("GET", "/props")
    speculates = bool(slots[0]["speculative"])
    if block.wants_speculation is not None and speculates is not block.wants_speculation:
        raise CellFailed(f"{block.mode} was asked for, and /slots says speculative: {speculates}")
    return {
        "n_ctx": props["default_generation_settings"]["n_ctx"],
        "build_info": str(props["build_info"]),
        "speculative": speculates,
    }


def _answer(server: Server, text: str, tokens: int, plan: Plan) -> Any:
    """Ask as an agent's chat would be asked, but for exactly so many tokens of any kind."""
    messages = [{"role": "user", "content": text}]
    whole = server.ask("POST", "/apply-template", {"messages": messages})["prompt"]
    body = {
        "prompt": whole,
        "n_predict": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "seed": plan.seed,
        "cache_prompt": False,
    }
    began = time.perf_counter()  # time.monotonic() goes in steps of 16 ms on Windows
    answer = server.ask("POST", "/completion", body, plan.request_timeout_s)
    return answer | {"wall_ms": (time.perf_counter() - began) * 1000}


def _measured(server: Server, block: Block, text: str, plan: Plan) -> dict[str, Any]:
    """The numbers of one cell. Raises NO_ANSWER."""
    answer = _answer(server, text, plan.n_predict, plan)
    timings, content = answer["timings"], str(answer["content"])
    drafted = timings.get("draft_n")
    if timings["predicted_n"] != plan.n_predict:
        raise CellFailed(f"{timings['predicted_n']} tokens came instead of {plan.n_predict}")
    if timings.get("cache_n"):
        raise CellFailed(f"{timings['cache_n']} tokens of the prompt came from the cache")
    if block.wants_speculation is not None and bool(drafted) is not block.wants_speculation:
        raise CellFailed(f"{block.mode} was asked for, and the answer has draft_n: {drafted}")
    return {
        "prompt_n": timings["prompt_n"],
        "prompt_ms": timings["prompt_ms"],
        "predicted_n": timings["predicted_n"],
        "predicted_ms": timings["predicted_ms"],
        "draft_n": drafted,
        "draft_n_accepted": timings.get("draft_n_accepted"),
        "wall_ms": round(answer["wall_ms"], 3),
        "text": content,
        "text_sha256": hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest(),
    }


def _reason(server: Server, exc: Exception) -> str:
    if isinstance(exc, CellFailed):
        return str(exc)
    is_cut = isinstance(exc, HTTPException | OSError) and not isinstance(exc, TimeoutError)
    if is_cut and server.has_ended(LAST_WORDS_S):
        return server.last_words()
    return f"{type(exc).__name__}: {exc}"[:LONGEST_ERROR]


def _wait_out_a_shutdown() -> None:
    """What fails while the system ends its programs is no failure: wait to be ended too."""
    if machine.is_shutting_down():
        threading.Event().wait(SHUTDOWN_S)


def _more(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)


# --- a run


def decides(plan: Plan) -> dict[str, Any]:
    """All that changes the numbers: the plan, the machine, the programs and the models."""
    here = machine.described()
    named = {model.server for model in plan.models}
    named |= {model.model_path for model in plan.models if model.model_path}
    return plan.decides() | {
        "machine": {name: here[name] for name in ("node", "processor", "cores")},
        "files": {name: _fingerprint(Path(name)) for name in sorted(named)},
    }


def _fingerprint(file: Path) -> dict[str, Any] | None:
    """Of a file of many gigabytes only both ends are read; None if there is none."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            edges = hashlib.sha256(opened.read(EDGE_BYTES))
            opened.seek(max(0, size - EDGE_BYTES))
            edges.update(opened.read(EDGE_BYTES))
    except OSError:
        return None
    return {"bytes": size, "edges_sha256": edges.hexdigest()}


def about() -> dict[str, Any]:
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.described(),
        "priority": machine.priority(),
        "versions": {"python": platform.python_version(), "system": platform.platform()},
    }


def run(options: argparse.Namespace) -> int:
    """Raises PlanError, JournalError or OSError."""
    plan = plans.read(options.plan)
    with journal.opened(
        options.out,
        decides(plan),
        about(),
        is_new_run=options.new_run,
        is_repair=options.repair,
    ) as results:
        Sweep(plan, results, is_retrying=options.retry, is_json=options.json).run()
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mtp_sweep",
        description="Measure every model of a plan with speculation and without. "
        "Started again it goes on where it was.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.json", help="bench/README.md tells how")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS.jsonl")
    parser.add_argument("--json", action="store_true", help="progress as one JSON object a line")
    parser.add_argument(
        "--new-run", action="store_true", help="set results of another run aside and begin anew"
    )
    parser.add_argument("--repair", action="store_true", help="drop broken lines of the results")
    parser.add_argument("--retry", action="store_true", help="measure failed cells again")
    return parser.parse_args(argv)


def _interrupt(_signum: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    for signum in winsvc.STOP_SIGNALS:
        signal.signal(signum, _interrupt)
    try:
        winsvc.contain_children()
        return run(options)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: {_same_again(argv)}", file=sys.stderr)
        return INTERRUPTED
    except (plans.PlanError, journal.JournalError, OSError) as exc:
        print(f"mtp_sweep: {exc}", file=sys.stderr)
        return 1


def _same_again(argv: Sequence[str] | None) -> str:
    words = sys.argv[1:] if argv is None else argv
    return winsvc.quoted_command(["python", "-m", "bench.mtp_sweep", *words])


if __name__ == "__main__":
    sys.exit(main())
