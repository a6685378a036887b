"""What the frozen program starts with: the daemon, and the runner that `bench.remote` copies.

    llama-sidecar.exe bench-run ...     bench.job
    llama-sidecar.exe ...               all else: llama_sidecar

The daemon itself knows nothing of bench/, and loads none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import llama_sidecar
import winsvc


def main(argv: Sequence[str]) -> int:
    """The exit code of the one or the other."""
    if argv[:1] == ["bench-run"]:
        winsvc.speak_utf8()
        from bench import job  # late: the daemon would start more slowly for what it never uses

        return job.main(argv[1:])
    return llama_sidecar.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
