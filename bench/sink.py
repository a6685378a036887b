#!/usr/bin/env python3
"""A llama-server that reads a request's body to its end, and then says one sentence.

    python bench/sink.py PORT [parse]

nginx would answer at once and read the body afterwards, which llama-server does not do
(and which wrk takes for the end of the request). Bodies land in one buffer that is
used again, so that reading costs as little as it can. With `parse` it reads them as
JSON too, as every server does that understands them.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading

HOST = "127.0.0.1"
RECV_BYTES = 1 << 20
BUFFER_BYTES = 32 << 20  # the largest body
ANSWER = b'{"choices":[{"finish_reason":"stop","index":0,"message":{"content":"Yes."}}]}'

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class Client:
    """One connection, served by a thread of its own."""

    def __init__(self, sock: socket.socket, key: str, parses: bool) -> None:
        self._sock = sock
        self._parses = parses
        self._key = key.encode()
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def serve(self) -> None:
        with self._sock:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                while self._answer_one():
                    pass
            except OSError:
                return  # the client left in the middle

    def _answer_one(self) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self._sock.recv(RECV_BYTES)
            if not piece:
                return False
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        found = _LENGTH.search(head)
        length = int(found[1]) if found else 0
        self._buffer[: len(body)] = body
        filled = len(body)
        while filled < length:
            count = self._sock.recv_into(
                self._buffer[filled:length], min(length - filled, RECV_BYTES)
            )
            if not count:
                return False
            filled += count
        if self._parses and length:
            json.loads(bytes(self._buffer[:length]))
        is_known = self._key in head or head.startswith(b"GET /health ")
        status, text = (b"200 OK", ANSWER) if is_known else (b"401 Unauthorized", b"{}")
        self._sock.sendall(
            b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(text), text)
        )
        return True


def main(argv: list[str]) -> int:
    if not argv or argv[1:] not in ([], ["parse"]):
        print(__doc__, file=sys.stderr)
        return 2
    key, parses = os.environ["LLAMA_API_KEY"], bool(argv[1:])
    with socket.create_server((HOST, int(argv[0])), backlog=128) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=Client(sock, key, parses).serve, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
