"""Results of a sweep that nobody measured: for the tests of what reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import journal

PROMPTS = ("code", "story", "facts")
LOREM = "a text of the model"

Speeds = Mapping[str, Sequence[float]]  # of each prompt, block for block, in tokens a second


def cell(
    model: str,
    mode: str,
    block: int,
    prompt: str,
    rep: int = 0,
    *,
    speed: float = 0.0,
    drafted: int | None = None,
    accepted: int | None = None,
    text: str = LOREM,
    error: str = "",
) -> dict[str, Any]:
    """One measured request of 101 tokens, so that `speed` is 100 tokens in 100 / speed s."""
    measured = {
        "prompt_n": 50,
        "prompt_ms": 100.0,
        "predicted_n": 101,
        "predicted_ms": 100 / speed * 1000 if speed else 1.0,
        "draft_n": drafted,
        "draft_n_accepted": accepted,
        "wall_ms": 1.0,
        "text": text,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return {
        "id": f"{model}/{mode}/b{block}/{prompt}/r{rep}",
        "kind": "cell",
        "model": model,
        "mode": mode,
        "block": block,
        "prompt": prompt,
        "rep": rep,
        "outcome": "error" if error else "ok",
        "error": error,
        **(dict.fromkeys(measured) if error else measured),
    }


def server(model: str, mode: str, block: int, **found: Any) -> dict[str, Any]:
    return {
        "id": f"{model}/{mode}/b{block}/server",
        "kind": "server",
        "model": model,
        "mode": mode,
        "block": block,
        "outcome": "ok",
        "error": "",
        "load_ms": 1500.0 + 500 * block,
        "rss_bytes": 3 << 29,
        "vram_bytes": None,
        "n_ctx": 32768,
        "build_info": "b1-abc",
        "speculative": mode != "off",
        "argv": ["llama-server.exe", "--model", f"{model}.gguf"],
        **found,
    }


def measured(model: str, mode: str, speeds: Speeds, **more: Any) -> list[dict[str, Any]]:
    """Servers and cells of one mode, a repetition each."""
    blocks = range(len(next(iter(speeds.values()))))
    return [server(model, mode, block) for block in blocks] + [
        cell(model, mode, block, prompt, speed=speeds[prompt][block], **more)
        for block in blocks
        for prompt in speeds
    ]


def plan(modes: Mapping[str, Sequence[str]], repetitions: int = 1) -> dict[str, Any]:
    """What a header says decides; `modes` of each model."""
    models = [
        {"id": model, "server": "s", "model_path": "m", "modes": {key: [] for key in names}}
        for model, names in modes.items()
    ]
    counts = {"rounds": 1, "repetitions": repetitions, "n_predict": 101}
    return {"name": "made up", "models": models, "prompts": list(PROMPTS), **counts}


def write(file: Path, decides: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Path:
    about = {"created": "2026-01-02T03:04:05+00:00", "machine": {"node": "box"}}
    with journal.opened(file, decides, about) as results:
        for record in records:
            results.append(dict(record))
    return file
