"""README's table of who may say which flag, made from flags.json.

python -m tests.flag_table            print it
python -m tests.flag_table --write    put it into README.md, between its two marks
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from validator import Flag, FlagTable, Policy

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- flags: made by python -m tests.flag_table --write -->"
END = "<!-- flags: end -->"

HEADINGS = {
    Policy.AGENT: "Agents may say",
    Policy.OPERATOR: "Operators may say, and agents where the operator opens it",
    Policy.DAEMON: "Only the daemon sets",
    Policy.NOBODY: "Nobody may say",
}
# What agents may say, by the first pattern that a name matches.
TOPICS = {
    "speculative decoding": r"--spec-",
    "threads and processors": r"--(threads|cpu-(mask|range|strict)|poll)",
    "GPU, memory and loading": (
        r"--(gpu-layers|fit|cpu-moe|n-cpu|override-tensor|load-mode|lazy-mode|mlock|mmap|"
        r"direct-io|repack|no-host|op-offload)"
    ),
    "context, cache and batches": (
        r"--(ctx|kv-|cache-|batch|ubatch|swa|checkpoint|context-shift|cont-batching|flash-attn)"
    ),
    "position encoding": r"--(rope|yarn)",
    "pictures and video": r"--(mmproj|image|video|mtmd)",
    "templates and tokens": r"--(jinja|chat-template|skip-chat|prefill|special|escape|spm-infill)",
}


def why(flag: Flag) -> str:
    """What a row says behind its flags: flags of one policy that share it share the row."""
    if flag.policy is not Policy.AGENT:
        return flag.reason
    if flag.strip:
        return "nothing that changes an answer (taken, and left off)"
    if flag.body:
        return "one request (they travel in its body)"
    if not flag.identity:
        return "start-up and log (they never split the pool)"
    matching = (topic for topic, names in TOPICS.items() if re.match(names, flag.name))
    return next(matching, "other")


def shown(flag: Flag) -> str:
    is_marked = flag.body and flag.policy is not Policy.AGENT
    return f"`{flag.name}`" + (" (in the body)" if is_marked else "")


def lines(flags: tuple[Flag, ...]) -> Iterator[str]:
    for policy, heading in HEADINGS.items():
        rows: dict[str, list[str]] = {}
        theirs = [flag for flag in flags if flag.policy is policy]
        for flag in theirs:
            rows.setdefault(why(flag), []).append(shown(flag))
        if policy is Policy.AGENT:
            rows = dict(sorted(rows.items(), key=lambda row: (row[0] == "other", -len(row[1]))))
        column = "what it is about" if policy is Policy.AGENT else "because"
        yield f"<details><summary><b>{heading}</b> ({len(theirs)} flags)</summary>"
        yield ""
        yield f"| {column} | flags |"
        yield "|---|---|"
        for reason, names in rows.items():
            yield f"| {reason} | {', '.join(names)} |"
        yield ""
        yield "</details>"
        yield ""


def block() -> str:
    """What stands in README from one mark to the other, both included."""
    return "\n".join([BEGIN, *lines(FlagTable.built_in().flags), END])


def written_into(text: str) -> str:
    """The text with the block between the marks. Raises ValueError if they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{BEGIN} and {END} are not both there")
    return before + block() + after


def main(argv: list[str]) -> int:
    if argv == ["--write"]:
        text = README.read_text(encoding="utf-8")
        README.write_text(written_into(text), encoding="utf-8")
    elif argv:
        print("usage: python -m tests.flag_table [--write]", file=sys.stderr)
        return 2
    else:
        print(block())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
