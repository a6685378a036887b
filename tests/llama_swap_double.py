"""As much of llama-swap's API as bench/ uses, for what is unloaded and loaded again."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def llama_swap(
    running: list[str], *, is_stubborn: bool = False
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Its address, what is loaded, and what it was asked but for /running.

    `running` is the same list, and changes as models come and go; with `is_stubborn`
    they do not go.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/running":
                asked.append(self.path)
            if self.path == "/unload" and not is_stubborn:
                running.clear()
            elif self.path.startswith("/upstream/"):
                running.append(self.path.removeprefix("/upstream/").removesuffix("/health"))
            body = json.dumps({"running": [{"model": m, "state": "ready"} for m in running]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", running, asked
    finally:
        listening.shutdown()
        listening.server_close()
