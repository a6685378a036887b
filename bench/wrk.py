"""Load of whole answers, made by wrk."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

from bench.parts import CHAT, HOST, PATIENCE_S, BenchError, Target, program

# No function `request`: wrk then writes the request once and sends the same bytes again.
SCRIPT = """\
wrk.method = "POST"
local file = assert(io.open(os.getenv("BENCH_BODY"), "rb"))
wrk.body = file:read("*a")
file:close()
wrk.headers["Content-Type"] = "application/json"

function done(summary, latency, requests)
  local bad = summary.errors
  local line = '{"requests":%d,"duration_us":%d,"p50_us":%g,"p99_us":%g,"refused":%d,"broken":%d}'
  io.write(string.format("\\nRESULT " .. line .. "\\n",
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    bad.status, bad.connect + bad.read + bad.write + bad.timeout))
end
"""


@dataclasses.dataclass(frozen=True)
class Load:
    """So many connections, each of which asks again when it has its answer."""

    connections: int
    seconds: int
    body: bytes
    path: str = CHAT
    headers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    requests: int
    seconds: float
    p50_us: float
    p99_us: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def run(load: Load, target: Target, folder: Path) -> Result:
    """Raises BenchError if a single answer was not as it should be."""
    script, body = folder / "post.lua", folder / "body.json"
    script.write_text(SCRIPT)
    body.write_bytes(load.body)
    fields = [f"{name}: {value}" for name, value in target.headers().items()] + [*load.headers]
    command = [
        program("wrk") or "wrk",
        *("-t1", f"-c{load.connections}", f"-d{load.seconds}s", "--timeout", "30s"),
        *("-s", str(script)),
        *(word for field in fields for word in ("-H", field)),
        f"http://{HOST}:{target.port}{load.path}",
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"BENCH_BODY": str(body)},
        capture_output=True,
        text=True,
        timeout=load.seconds + PATIENCE_S,
        check=False,
    )
    _, found, line = done.stdout.partition("\nRESULT ")
    if not found:
        raise BenchError(f"wrk says: {done.stdout[-500:]}{done.stderr[-500:]}")
    values = json.loads(line.splitlines()[0])
    if values["refused"] or values["broken"] or not values["requests"]:
        raise BenchError(f"{' '.join(command[-5:])}: wrk counts {line.splitlines()[0]}")
    seconds = values["duration_us"] / 1e6
    return Result(values["requests"], seconds, values["p50_us"], values["p99_us"])
