"""From flags, as people write them, to what a llama-server process is.

Operators write flags into BASE_ARGS and a model's `args`, agents into the
header X-Agent-Flags. Every spelling becomes one canonical form, what must not
be said is refused in words, and equal settings end in equal hashes. What an
agent's flags say of a request rather than of a process goes into the request.

What is known of llama-server's own flags stands in flags.json; `FlagTable`
cuts and widens it to what one binary names in its --help.
"""

import dataclasses
import difflib
import enum
import functools
import hashlib
import heapq
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

MAX_HEADER_BYTES: Final = 24 * 1024
MAX_TOKENS: Final = 256
MAX_TOKEN_CHARS: Final = 16 * 1024
MAX_FAULTS: Final = 24  # in one message; the rest is counted
MAX_HELP_BYTES: Final = 1024 * 1024
MAX_LIFTED_FILE_BYTES: Final = 256 * 1024  # a longer grammar is left to llama-server

# CreateProcess takes 32,767 characters with the closing NUL. Three quarters of
# it are the agent's; the rest holds the program, the model and the base args.
WINDOWS_COMMAND_LINE_CHARS: Final = 32_766
AGENT_COMMAND_LINE_CHARS: Final = 24_576
_RESERVED_CHARS: Final = 2_048  # for the program, the model and what the daemon adds

_CTX_SIZE: Final = "--ctx-size"
_KWARGS: Final = "chat_template_kwargs"
_EFFORT: Final = "reasoning_effort"

_SLOTS_BY_DEFAULT: Final = 4  # tools/server/server.cpp, where --parallel is not given or -1

_CACHED_SPECS: Final = 512
_CACHED_HEADER_CHARS: Final = 4096  # a longer header is parsed each time


class FlagsRefused(ValueError):
    """One or more flags cannot be used.

    `faults` holds one sentence each: the flag, what it held, and what is
    taken, why it is refused or what to ask the operator for. No control
    character and no more than a few kilobytes, whatever was sent.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        shown = list(faults[:MAX_FAULTS])
        if len(faults) > len(shown):
            shown.append(f"And {len(faults) - len(shown)} more like these.")
        super().__init__(" ".join(shown))
        self.faults: tuple[str, ...] = tuple(shown)


class HelpUnavailable(Exception):
    """The configured llama-server does not answer --help as llama-server does."""


class Author(enum.Enum):
    """Who wrote a flag."""

    AGENT = "agent"
    OPERATOR = "operator"


class Policy(enum.Enum):
    """Who may write a flag; flags.json says it at length under `policies`."""

    AGENT = "agent"
    OPERATOR = "operator"
    DAEMON = "daemon"
    NOBODY = "nobody"
    UNLISTED = "unlisted"  # only the binary's --help names it


@dataclasses.dataclass(frozen=True)
class SidecarSpec:
    """All that decides what a llama-server process is. Equal hashes share one."""

    model_id: str
    model_path: Path
    args: tuple[str, ...]  # canonical flags, daemon-owned ones excluded
    identity: tuple[str, ...]  # the same without flags that never split the pool
    kin: tuple[str, ...] = ()  # the identity without --ctx-size
    context: int = 0  # tokens of --ctx-size; 0 where it is not given or the model's own
    owner: str = ""  # the agent that has it for itself; empty: it is shared

    @functools.cached_property
    def hash(self) -> str:
        """First 12 hex digits of SHA-256 over model id and identity, not the path."""
        own = ["", self.owner] if self.owner else []  # no flag is empty, so nothing else ends so
        text = json.dumps([self.model_id, *self.identity, *own], ensure_ascii=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]

    def can_serve(self, other: "SidecarSpec") -> bool:
        """Whether it is what `other` asks for but for a larger context."""
        return (
            self.context > other.context > 0
            and self.kin == other.kin
            and self.model_id == other.model_id
            and self.owner == other.owner
        )


class Body(enum.Enum):
    """What kind of body a route takes, and so which request fields it can carry."""

    COMPLETION = "completion"
    MESSAGES = "messages"
    EMBEDDING = "embedding"
    RANKING = "ranking"
    FORM = "form"


@dataclasses.dataclass(frozen=True)
class RequestDefaults:
    """What an agent's flags say of its requests: JSON text by the name of the field."""

    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.fields)

    def applied_to(self, body: "JsonObject") -> str:
        """The body with each field that it lacks; all else stays letter by letter."""
        return body.with_members(self.fields_for(body))

    def fields_for(self, body: "JsonObject") -> dict[str, str]:
        """Those that this body lacks.

        The body wins over a default, and null counts as absent. Rules and
        precedence: llama.cpp's tools/server/server-schema.cpp, server-common.cpp.
        """
        added = {}
        for field, text in self.fields.items():
            if field == _KWARGS:
                text = _merged_kwargs(text, body)
            if text and not _is_settled(field, body):
                added[field] = text
        return added


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What a model and a header come to."""

    spec: SidecarSpec
    defaults: RequestDefaults
    remarks: tuple[str, ...] = ()  # one sentence each on what became something else


@dataclasses.dataclass(frozen=True, eq=False)
class Flag:
    """One row of the table: a flag of llama-server, its spellings and its rules."""

    name: str
    aliases: tuple[str, ...] = ()
    negated: tuple[str, ...] = ()  # spellings that switch it off
    takes: tuple[str, ...] = ()  # a key of _CANONICAL for each value
    value_hint: str = ""
    choices: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    min: float | None = None
    max: float | None = None
    above: float | None = None
    refuses: tuple[float, ...] = ()
    range_reason: str = ""
    bare: str | None = None  # the value meant where none of its own follows
    accumulates: bool = False  # repeats add up, instead of the last one winning
    policy: Policy = Policy.AGENT
    reason: str = ""
    path: str | None = None  # the shape of a value that names files
    body: str | None = None  # the request field that does the same
    body_as: str = ""  # a key of _AS_JSON where the field takes another form
    identity: bool = True  # False: two processes that differ in it are alike
    strip: bool = False  # taken, and left off the command line
    translate: tuple[str, ...] = ()  # what newer builds call it
    translate_negated: tuple[str, ...] = ()
    removes: frozenset[str] = frozenset()  # flags that a later use of it makes void
    order_with: frozenset[str] = frozenset()  # flags whose place before or after it counts

    @functools.cached_property
    def field(self) -> str:
        """The request field of `body`, or what holds it; empty if there is none."""
        return (self.body or "").partition(".")[0]

    @functools.cached_property
    def negated_name(self) -> str:
        """The canonical spelling that switches it off; empty if there is none."""
        regular = "--no-" + self.name.removeprefix("--")
        long = [name for name in self.negated if name.startswith("--")]
        return regular if regular in long else next(iter((*long, *self.negated)), "")


@dataclasses.dataclass(frozen=True, eq=False)
class Spelling:
    """What one word on a command line means to one binary."""

    flag: Flag
    name: str  # canonical
    spoken: str | None  # what this binary calls it; None: it does not know it
    instead: tuple[str, ...] = ()  # flag and values that say the same to this binary


class Setting(NamedTuple):
    """One flag with its values, in canonical form."""

    flag: Flag
    name: str
    spoken: str
    values: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return (self.spoken, *self.values)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """What one author set, in the order given.

    Opaque outside this module, and of use only to the validator that read it.
    """

    settings: tuple[Setting, ...] = ()
    voids: frozenset[str] = frozenset()  # flags of earlier layers it makes void
    touches_files: bool = False  # its validity hangs on what lies on the disk
    remarks: tuple[str, ...] = ()


class Validator:
    """Knows the base args and turns requests into specs. Safe to share by threads."""

    def __init__(
        self,
        base_args: Sequence[str],
        table: "FlagTable | None" = None,
        *,
        opened: "OpenedFlags | None" = None,
        unknown_flags_for_agents: bool = False,
        share: bool = True,
    ) -> None:
        """`share` lets agents differ in request-level flags and share a process.

        Raises FlagsRefused if `base_args` cannot be used.
        """
        self.table = table or FlagTable.built_in()
        self._opened = opened or OpenedFlags()
        self._unknown_flags_for_agents = unknown_flags_for_agents
        self._share = share
        self._base = self._operators_layer(base_args)
        self._recent = _RecentlyResolved()

    def model_args(self, args: Sequence[str]) -> Layer:
        """Read an operator's `args` of one model.

        Raises FlagsRefused if they, or they on top of the base args, cannot be used.
        """
        layer = self._operators_layer(args)
        merged = _merged(self._base, layer)
        _refuse([*_clashes(merged), *_length_faults(merged)])
        return layer

    def resolve(
        self,
        model_id: str,
        model_path: Path,
        model_args: Layer,
        header: str | None = None,
        *,
        body: Body = Body.COMPLETION,
        owner: str = "",
    ) -> Resolved:
        """What runs for a request with this raw X-Agent-Flags text, and what it is given.

        `owner` names the agent that wants a process of its own. Raises
        FlagsRefused with every fault of the header.
        """
        header = header or ""
        key = (model_id, model_path, model_args, header, body, owner)
        known = self._recent.get(key)
        if known is not None:
            return known
        agents = self._agents_layer(header)
        operators = _merged(self._base, model_args)
        kept, defaults = _lifted(agents, operators, body) if self._share else (agents, None)
        remarks = (*self._base.remarks, *model_args.remarks, *agents.remarks)
        resolved = Resolved(
            _spec(model_id, model_path, _merged(self._base, model_args, kept), owner),
            defaults or RequestDefaults(),
            remarks,
        )
        if not agents.touches_files and len(header) <= _CACHED_HEADER_CHARS:
            self._recent.put(key, resolved)
        return resolved

    def _operators_layer(self, args: Sequence[str]) -> Layer:
        _refuse(_operator_text_faults(args))
        return _Reader(self.table, Author.OPERATOR).read(args)

    def _agents_layer(self, header: str) -> Layer:
        _refuse(_header_faults(header))
        tokens = split_command_line(header)
        _refuse(_token_faults(tokens))
        reader = _Reader(self.table, Author.AGENT, self._opened, self._unknown_flags_for_agents)
        return reader.read(tokens)


class _RecentlyResolved:
    """What the headers seen last came to, so that a repeated one costs a look-up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _known
        self._known: OrderedDict[tuple[object, ...], Resolved] = OrderedDict()

    def get(self, key: tuple[object, ...]) -> Resolved | None:
        with self._lock:
            resolved = self._known.get(key)
            if resolved is not None:
                self._known.move_to_end(key)
            return resolved

    def put(self, key: tuple[object, ...], resolved: Resolved) -> None:
        with self._lock:
            self._known[key] = resolved
            if len(self._known) > _CACHED_SPECS:
                self._known.popitem(last=False)


# --- Several layers become one process


def _spec(model_id: str, model_path: Path, settings: Sequence[Setting], owner: str) -> SidecarSpec:
    _refuse([*_clashes(settings), *_length_faults(settings)])
    ordered = _in_canonical_order(settings)
    deciding = [s for s in ordered if s.flag.identity]
    return SidecarSpec(
        model_id,
        model_path,
        args=tuple([word for s in ordered for word in s.words]),
        identity=_canonical_words(deciding),
        kin=_canonical_words(s for s in deciding if s.name != _CTX_SIZE),
        context=sum(int(s.values[0]) for s in deciding if s.name == _CTX_SIZE),
        owner=owner,
    )


def _canonical_words(settings: Iterable[Setting]) -> tuple[str, ...]:
    return tuple([word for s in settings for word in (s.name, *s.values)])


def _length_faults(settings: Sequence[Setting]) -> list[str]:
    words = [word for s in settings for word in s.words]
    if not _is_longer_than(words, WINDOWS_COMMAND_LINE_CHARS - _RESERVED_CHARS):
        return []
    fault = (
        "All flags together, BASE_ARGS and the model's args included, are longer than the "
        f"{WINDOWS_COMMAND_LINE_CHARS} characters of a Windows command line, of which "
        f"{_RESERVED_CHARS} are kept for the program and the model."
    )
    return [fault]


def _merged(*layers: Layer) -> list[Setting]:
    """The settings of all layers, without those that a later layer makes void."""
    merged: list[Setting] = []
    for layer in layers:
        merged = [s for s in merged if s.flag.name not in layer.voids]
        merged += layer.settings
    return merged


def _layer(settings: Sequence[Setting], touches_files: bool, remarks: Sequence[str] = ()) -> Layer:
    """Drop what a later setting of the same author makes void.

    Repeats that add up stay: they replace those of earlier layers only.
    """
    kept: list[Setting] = []
    voids: set[str] = set()
    for setting in reversed(settings):
        flag = setting.flag
        if flag.accumulates or flag.name not in voids:
            kept.append(setting)
        voids.add(flag.name)
        voids |= flag.removes
    return Layer(tuple(reversed(kept)), frozenset(voids), touches_files, tuple(remarks))


def _in_canonical_order(settings: Sequence[Setting]) -> list[Setting]:
    """Sorted by name, but never across each other where the order has a meaning.

    Of all orders that keep such pairs as given it is the first by name, so it
    does not depend on where the independent flags stood. Repeats of one flag
    stay in their order.
    """
    before = _must_follow(settings)
    if not before:
        return sorted(settings, key=lambda s: s.name)
    after: dict[int, list[int]] = {}
    for later, earlier_ones in before.items():
        for earlier in earlier_ones:
            after.setdefault(earlier, []).append(later)
    waits_for = {later: len(earlier_ones) for later, earlier_ones in before.items()}
    ready = [(s.name, at) for at, s in enumerate(settings) if at not in waits_for]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, at = heapq.heappop(ready)
        ordered.append(settings[at])
        for later in after.get(at, ()):
            waits_for[later] -= 1
            if not waits_for[later]:
                heapq.heappush(ready, (settings[later].name, later))
    return ordered


def _must_follow(settings: Sequence[Setting]) -> dict[int, list[int]]:
    """For each setting that has any: the places of the earlier ones it must follow."""
    places: dict[str, list[int]] = {}
    must_follow: dict[int, list[int]] = {}
    for at, setting in enumerate(settings):
        flag = setting.flag
        if not flag.order_with:
            continue
        earlier = [place for name in flag.order_with for place in places.get(name, ())]
        if earlier:
            must_follow[at] = earlier
        places.setdefault(flag.name, []).append(at)
    return must_follow


def _clashes(settings: Iterable[Setting]) -> list[str]:
    """Values that are right one by one and end the process together."""
    values = {s.flag.name: s.values[0] for s in settings if s.values}
    faults = []
    cache_type = values.get("--cache-type-v", "")
    if values.get("--flash-attn") == "off" and cache_type.startswith(("q", "iq")):
        faults.append(
            f"--cache-type-v {cache_type} needs flash attention: llama-server cannot start "
            "with it and --flash-attn off. Use --flash-attn on, or f16."
        )
    slots = _number(values.get("--parallel"), otherwise=-1)
    slots = slots if slots > 0 else _SLOTS_BY_DEFAULT
    batch = _number(values.get("--batch-size"), otherwise=slots)
    if batch < slots:
        faults.append(
            f"--batch-size {batch} is too small for {slots} slots (--parallel): "
            "llama-server aborts with less than one token for each."
        )
    return faults


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text and _INT.fullmatch(text) else otherwise


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise FlagsRefused(faults)


# --- What flags say of a request goes into the request


def _lifted(
    agents: Layer, operators: Sequence[Setting], body: Body
) -> tuple[Layer, RequestDefaults]:
    """Part an agent's settings: what its process needs, and what its requests carry.

    An operator's settings stay on the command line, where they split nothing:
    every agent of the model has them. A setting that the body cannot say, or
    cannot say instead of the operator's, stays on the command line too.
    """
    if not any(s.flag.body for s in agents.settings):
        return agents, RequestDefaults()
    unescape = _unescaped if _reads_escapes([*operators, *agents.settings]) else str
    theirs = [s for s in operators if s.flag.body]
    kept = {s.flag.name for s in agents.settings if not s.flag.body}
    texts: list[str] = []
    for setting in agents.settings:
        texts.append("")
        try:
            if setting.flag.body:
                texts[-1] = _json_text(setting, theirs, body, unescape)
        except _Unsayable:
            kept.add(setting.flag.name)
    kept = _with_neighbours(kept, agents.settings)
    fields: dict[str, str] = {}
    for setting, text in zip(agents.settings, texts, strict=True):
        if setting.flag.name not in kept:
            _add_field(fields, setting.flag, text, body)
    staying = [s for s in agents.settings if s.flag.name in kept]
    return _layer(staying, agents.touches_files), RequestDefaults(fields)


def _with_neighbours(names: set[str], settings: Sequence[Setting]) -> set[str]:
    """The names, and those of flags whose place before or after one of them counts."""
    while more := {
        s.flag.name
        for s in settings
        if s.flag.name not in names and not names.isdisjoint(s.flag.order_with)
    }:
        names = names | more
    return names


class _Unsayable(Exception):
    """A request cannot say what the setting says."""


_NOTHING: Final = ""  # said by leaving the field out


def _json_text(
    setting: Setting, operators: Sequence[Setting], body: Body, unescape: Callable[[str], str]
) -> str:
    """The value of the setting's field, _NOTHING if none is needed. Raises _Unsayable."""
    flag = setting.flag
    field = _field_in(body, flag.field)
    if field is None:
        raise _Unsayable
    if field == _NOTHING:
        return _NOTHING
    text = _AS_JSON[flag.body_as or (flag.takes[0] if flag.takes else "switch")](setting, unescape)
    if any(_cannot_replace(setting, theirs, text) for theirs in operators):
        raise _Unsayable
    return text


def _cannot_replace(setting: Setting, theirs: Setting, text: str) -> bool:
    """Whether an operator's setting would show through the request's field."""
    flag, name = setting.flag, theirs.flag.name
    if flag.name == "--logit-bias" and name == "--ignore-eos":
        return True  # it is a list of biases too, and a request's list takes its place
    if flag.body == _EFFORT and theirs.flag.body == _KWARGS and text == _NOTHING:
        return True  # the default level takes theirs away, which no request can
    if name != flag.name and name not in flag.removes:
        return False
    return text == _NOTHING or flag.body == _KWARGS or theirs.flag.body != flag.body


def _add_field(fields: dict[str, str], flag: Flag, text: str, body: Body) -> None:
    name = _field_in(body, flag.field) or ""
    if name == _EFFORT and _KWARGS in fields:
        texts = JsonObject(fields[_KWARGS]).texts()
        fields[_KWARGS] = _json_members({key: texts[key] for key in texts if key != _EFFORT})
    if text == _NOTHING:
        return
    if name == _KWARGS:
        key = str(flag.body).partition(".")[2]
        added = {key: text} if key else JsonObject(text).texts()
        fields[name] = _json_members(JsonObject(fields.get(name, "{}")).texts() | added)
        if _EFFORT in added:
            fields.pop(_EFFORT, None)
    elif flag.accumulates:
        before = fields.get(name, "[]")[1:-1]
        fields[name] = f"[{before},{text}]" if before else f"[{text}]"
    else:
        fields[name] = text


def _json_members(texts: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{text}" for name, text in texts.items()) + "}"


_EMBEDDING_ONLY: Final = "embd_normalize"
_IN_MESSAGES: Final = {  # server_chat_convert_anthropic_to_oai in tools/server/server-chat.cpp
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop": "stop_sequences",
    _KWARGS: _KWARGS,
}


def _field_in(body: Body, field: str) -> str | None:
    """What a field is called in a body of this kind.

    _NOTHING where it would change no answer, None where it cannot be said.
    """
    if field == _EMBEDDING_ONLY:
        return field if body is Body.EMBEDDING else _NOTHING
    if body is Body.COMPLETION:
        return field
    if body is Body.MESSAGES:
        return _IN_MESSAGES.get(field)
    return None if body is Body.FORM else _NOTHING


def _reads_escapes(settings: Sequence[Setting]) -> bool:
    """--escape, on by default: what a backslash and a letter mean in stop texts."""
    said = [s.name for s in settings if s.flag.name == "--escape"]
    return not said or said[-1] == "--escape"


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}


def _unescaped(text: str) -> str:
    """As string_process_escapes in llama.cpp's common/common.cpp. Raises _Unsayable."""

    def replaced(match: re.Match[bytes]) -> bytes:
        code = match[1]
        if code.startswith(b"x"):
            if len(code) == 1:
                raise _Unsayable  # strtol takes more than digits
            return bytes([int(code[1:], 16)])
        return _ESCAPED.get(code, match[0])

    try:
        return _ESCAPE.sub(replaced, text.encode("utf-8")).decode("utf-8")
    except UnicodeDecodeError:
        raise _Unsayable from None


_SAMPLER_NAMES = frozenset(
    "penalties dry top_n_sigma top_k typ_p top_p min_p xtc temperature adaptive_p infill".split()
)

AsJson = Callable[[Setting, Callable[[str], str]], str]


def _as_written(setting: Setting, _unescape: object) -> str:
    return setting.values[0]


def _as_switch(setting: Setting, _unescape: object) -> str:
    return "true" if setting.name == setting.flag.name else "false"


def _as_text(setting: Setting, _unescape: object) -> str:
    return json.dumps(setting.values[0])


def _as_item(setting: Setting, unescape: Callable[[str], str]) -> str:
    """One of several texts. Where none is named, or "none", no request can say so."""
    if not setting.values[0] or setting.values == ("none",):
        raise _Unsayable
    return json.dumps(unescape(setting.values[0]))


def _as_names(setting: Setting, _unescape: object) -> str:
    names = setting.values[0].split(";")
    if not _SAMPLER_NAMES.issuperset(names):
        raise _Unsayable  # other names are known to the command line only, in some builds
    return json.dumps(names)


def _as_seed(setting: Setting, _unescape: object) -> str:
    return str(int(setting.values[0]) % 2**32)


def _as_bias(setting: Setting, _unescape: object) -> str:
    found = _LOGIT_BIAS.fullmatch(setting.values[0])
    assert found is not None  # it is canonical
    sign = -1.0 if found[2] == "-" else 1.0
    return f"[{found[1]},{_shortest(sign * float(found[3]))}]"


def _as_thinking(setting: Setting, _unescape: object) -> str:
    return {"on": "true", "off": "false"}.get(setting.values[0], _NOTHING)


def _as_effort(setting: Setting, _unescape: object) -> str:
    (level,) = setting.values
    if level in ("none", ""):
        raise _Unsayable  # of a request it would mean: do not think
    return _NOTHING if level == "default" else json.dumps(level)


def _as_budget(setting: Setting, _unescape: object) -> str:
    return _NOTHING if setting.values[0] == "-1" else setting.values[0]


def _as_file(setting: Setting, _unescape: object) -> str:
    return json.dumps(_file_text(setting.values[0]))


def _as_json_file(setting: Setting, _unescape: object) -> str:
    text = _file_text(setting.values[0])
    try:
        return JsonObject(text).text.strip(_JSON_BLANKS)
    except ValueError:
        raise _Unsayable from None


def _file_text(name: str) -> str:
    """What the file holds, to be sent instead of its name. Raises _Unsayable."""
    try:
        with Path(name).open("rb") as file:
            data = file.read(MAX_LIFTED_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError):
        raise _Unsayable from None
    if len(data) > MAX_LIFTED_FILE_BYTES or not text:
        raise _Unsayable
    if sys.platform == "win32":
        return text.replace("\r\n", "\n")  # llama-server opens it as text, which does the same
    return text


_AS_JSON: Final[Mapping[str, AsJson]] = {
    "switch": _as_switch,
    "int": _as_written,
    "float": _as_written,
    "json-object": _as_written,
    "choice": _as_text,
    "text": _as_text,
    "texts": _as_item,
    "names": _as_names,
    "seed": _as_seed,
    "logit-bias": _as_bias,
    "thinking": _as_thinking,
    "effort": _as_effort,
    "budget": _as_budget,
    "file": _as_file,
    "json-file": _as_json_file,
}

# With one of these in the body the field is not added.
_CONSTRAINTS = ("tools", "response_format", "json_schema", "grammar")
_SETTLED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "n_predict": ("n_predict", "max_completion_tokens", "max_tokens", "max_output_tokens"),
    "grammar": _CONSTRAINTS,
    "json_schema": _CONSTRAINTS,
    "reasoning_budget_tokens": ("reasoning_budget_tokens", "thinking_budget_tokens"),
    _EFFORT: (_EFFORT, "reasoning"),
}
_EMPTY_COUNTS_AS_ABSENT = frozenset({"stop", "stop_sequences", "tools"})


def _is_settled(field: str, body: "JsonObject") -> bool:
    """Whether the body itself says what the field would."""
    if field == _KWARGS:
        return False  # it was merged
    if field == _EFFORT:
        kwargs = body.values.get(_KWARGS)
        if isinstance(kwargs, dict) and _EFFORT in kwargs:
            return True
    for name in _SETTLED_BY.get(field, (field,)):
        value = body.values.get(name)
        is_absent = value is None or (name in _EMPTY_COUNTS_AS_ABSENT and value in ("", []))
        if not is_absent:
            return True
    return False


def _merged_kwargs(text: str, body: "JsonObject") -> str:
    """The defaults under the body's own keys; _NOTHING where the body's is no object."""
    theirs = body.values.get(_KWARGS)
    if theirs is None:
        return text
    if not isinstance(theirs, dict):
        return _NOTHING
    try:
        own = JsonObject(body.text_of(_KWARGS)).texts()
    except ValueError:  # it is nested as deeply as can be read at all
        return _NOTHING
    return _json_members(JsonObject(text).texts() | own)


_JSON_BLANKS: Final = " \t\r\n"
_LONG_CHARS: Final = 16 * 1024
_JSON_GAP = re.compile(r"[ \t\r\n]*")


class JsonObject:
    """A JSON object as text, which can be given members without touching the rest.

    `values` holds them parsed, every number a float. Within the lists of a long text
    stands for each object only whether it has members: all of it would take more memory
    than the text. Of a name that stands twice the last counts, as llama-server reads it.
    """

    def __init__(self, text: str) -> None:
        """Raises ValueError if the text is not one JSON object."""
        self.text = text
        if len(text) < _LONG_CHARS:
            values = self._decoded()
        else:  # once is enough: reading it takes longer than all else that is done with it
            spans, values = {}, {}
            for name, start, end, value in self._members():
                spans[name] = (start, end)
                values[name] = value
            self._spans = spans
        self.values: dict[str, object] = values

    def texts(self) -> dict[str, str]:
        """Every member's value, as it stands. Raises ValueError where it is nested too deeply."""
        return {name: self.text_of(name) for name in self._spans}

    def text_of(self, name: str) -> str:
        start, end = self._spans[name]
        return self.text[start:end]

    def with_members(self, new: Mapping[str, str]) -> str:
        """The text with these members, values in JSON, in their old place if they had one."""
        pieces, at = [], 0
        for start, end, text in self.edits(new):
            pieces += [self.text[at:start], text]
            at = end
        return "".join([*pieces, self.text[at:]])

    def bytes_before(self, at: int) -> int:
        """How many bytes of UTF-8 stand before a character."""
        return at if self.text.isascii() else len(self.text[:at].encode("utf-8"))

    def edits(self, new: Mapping[str, str]) -> list[tuple[int, int, str]]:
        """What these members replace: from, to, and the text instead, in order."""
        edits = sorted((*self._spans[name], new[name]) for name in new if name in self.values)
        added = [f"{json.dumps(n)}:{text}" for n, text in new.items() if n not in self.values]
        if added:
            end = self.text.rindex("}")
            edits.append((end, end, ("," if self.values else "") + ",".join(added)))
        return edits

    def _decoded(self) -> dict[str, object]:
        try:
            values = _JSON_DECODER.decode(self.text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(values, dict):
            raise ValueError("it is another JSON value")  # noqa: TRY004 - one kind for all
        return values

    @functools.cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        """Where each member's value stands; of a short text worked out where it must be known."""
        return {name: (start, end) for name, start, end, _ in self._members()}

    def _members(self) -> Iterator[tuple[str, int, int, object]]:
        """Name, where the value stands, and the value. Raises ValueError."""
        is_long = len(self.text) >= _LONG_CHARS
        at = self._expect("{", 0)
        is_over = self.text.startswith("}", at)
        while not is_over:
            if not self.text.startswith('"', at):
                raise ValueError(f"a name is expected at character {at}")
            name, at = self._value(at)
            start = self._expect(":", at)
            is_long_list = is_long and self.text.startswith("[", start)
            value, end = self._value(start, _FLAT_DECODER if is_long_list else _JSON_DECODER)
            yield name, start, end, value
            at = self._gap(end)
            is_over = self.text.startswith("}", at)
            if not is_over:
                at = self._expect(",", at)
        if self._gap(at + 1) < len(self.text):
            raise ValueError(f"more follows the object at character {at + 1}")

    def _value(self, at: int, decoder: json.JSONDecoder | None = None) -> tuple[Any, int]:
        try:
            return (decoder or _JSON_DECODER).raw_decode(self.text, at)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def _expect(self, char: str, at: int) -> int:
        at = self._gap(at)
        if self.text[at : at + 1] != char:
            raise ValueError(f"{char} is expected at character {at}")
        return self._gap(at + 1)

    def _gap(self, at: int) -> int:
        gap = _JSON_GAP.match(self.text, at)
        assert gap is not None  # it may be empty
        return gap.end()


# --- One author's words become settings


_FREE = Policy.AGENT  # by its own name: looking into an Enum costs more than the rest


class _Reader:
    """Reads one author's words and collects every fault before it raises."""

    def __init__(
        self,
        table: "FlagTable",
        author: Author,
        opened: "OpenedFlags | None" = None,
        unknown_flags_for_agents: bool = False,
    ) -> None:
        self._table = table
        self._author = author
        self._opened = opened or OpenedFlags()
        self._unknown_flags_for_agents = unknown_flags_for_agents
        self._words: Sequence[str] = ()
        self._next = 0
        self._settings: list[Setting] = []
        self._faults: list[str] = []
        self._remarks: list[str] = []
        self._touches_files = False

    def read(self, words: Sequence[str]) -> Layer:
        """Raises FlagsRefused."""
        self._words = words
        while self._next < len(words):
            word = words[self._next]
            self._next += 1
            spelling, inline = self._table.look_up(word)
            if spelling is None:
                self._unknown(word)
            else:
                self._known(spelling, inline)
        _refuse(self._faults)
        return _layer(self._settings, self._touches_files, self._remarks)

    def _known(self, spelling: Spelling, inline: str | None) -> None:
        flag = spelling.flag
        values = self._values(spelling, inline)
        if values is None:
            return
        if refusal := self._refusal(spelling):
            self._faults.append(f"{spelling.name} {refusal}")
            return
        try:
            canonical = self._canonical(flag, values)
        except _BadValue as exc:
            self._faults.append(f"{spelling.name}: {exc}")
            return
        if flag.strip:
            self._remarks.append(f"{spelling.name} changes no answer and is left off.")
        else:
            self._settings.append(self._setting(spelling, canonical))

    def _values(self, spelling: Spelling, inline: str | None) -> tuple[str, ...] | None:
        """As many words as the flag takes, whatever they look like."""
        flag = spelling.flag
        arity = len(flag.takes)
        if inline is not None and not arity:
            self._faults.append(f"{spelling.name} takes no value, but was given {_quoted(inline)}.")
            return None
        given = () if inline is None else (inline,)
        if flag.bare is not None and not given and not self._choice_follows(flag):
            return (flag.bare,)
        end = self._next + arity - len(given)
        values = (*given, *self._words[self._next : end])
        self._next = end
        if len(values) < arity:
            self._faults.append(f"{spelling.name} stands last, but takes {_expects(flag)}.")
            return None
        return values

    def _choice_follows(self, flag: Flag) -> bool:
        if self._next >= len(self._words):
            return False
        word = self._words[self._next]
        return word in flag.choices or word in flag.synonyms

    def _setting(self, spelling: Spelling, values: tuple[str, ...]) -> Setting:
        if spelling.instead:
            said = " ".join(spelling.instead)
            self._remarks.append(f"{spelling.name} is {said} for the llama-server in use.")
            name, *instead = spelling.instead
            spelling, values = self._table.spellings[name], tuple(instead)
        return Setting(spelling.flag, spelling.name, spelling.spoken or spelling.name, values)

    def _canonical(self, flag: Flag, values: tuple[str, ...]) -> tuple[str, ...]:
        """Raises _BadValue."""
        if flag.path and self._author is Author.AGENT:
            if len(values) != 1:
                raise _BadValue("the llama-server in use takes it in a way that is not known.")
            self._touches_files = True
            return (_paths_below(self._opened.folders[flag.name], flag.path, values[0]),)
        pairs = zip(flag.takes, values, strict=True)
        return tuple([_CANONICAL[kind](flag, value) for kind, value in pairs])

    def _refusal(self, spelling: Spelling) -> str:
        """Why this author cannot use it, to stand behind its name; empty if nothing bars it."""
        flag = spelling.flag
        if flag.policy is _FREE and spelling.spoken is not None:
            return ""
        if flag.policy is Policy.DAEMON:
            return f"is set by the daemon alone: {flag.reason}."
        if flag.policy is Policy.NOBODY:
            return f"is refused from everyone: {flag.reason}."
        if self._author is Author.AGENT and not self._is_open(flag):
            return f"is for the operator to set: {flag.reason}. {_how_to_open(flag)}"
        if spelling.spoken is None and not spelling.instead:
            return "is a flag of other builds: the llama-server in use does not know it."
        return ""

    def _is_open(self, flag: Flag) -> bool:
        if flag.policy is Policy.AGENT or flag.name in self._opened.folders:
            return True
        return flag.policy is Policy.UNLISTED and self._unknown_flags_for_agents

    def _unknown(self, word: str) -> None:
        """Note the fault and pass over what are likely the values of the unknown flag."""
        if not word.startswith("-"):
            self._faults.append(f"{_quoted(word)} is a value, but no flag before it takes one.")
            return
        while self._next < len(self._words) and not self._words[self._next].startswith("-"):
            self._next += 1
        # Looking for a neighbour is slow: a handful of them helps, hundreds would not.
        neighbour = self._table.neighbour(word) if len(self._faults) < 8 else None
        hint = f" Did you mean {neighbour}?" if neighbour else ""
        name = _quoted(word.partition("=")[0])  # the rest may be a secret
        self._faults.append(f"{name} is no flag that llama-server is known to take.{hint}")


def _how_to_open(flag: Flag) -> str:
    if flag.policy is Policy.UNLISTED:
        return "Ask the operator to set LLAMA_SIDECAR_UNKNOWN_FLAGS=allow."
    folder = "=FOLDER" if flag.path else ""
    return (
        "Ask the operator to put it into the model's args, or to open it with "
        f"LLAMA_SIDECAR_AGENT_FLAGS={flag.name}{folder}."
    )


def _quoted(text: str) -> str:
    """The text for a message: short, and without a raw control character."""
    shown = text if len(text) <= 60 else text[:57] + "..."
    return "'" + "".join(c if c.isprintable() else _escaped(c) for c in shown) + "'"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


# --- Values


class _BadValue(Exception):
    """A value cannot be used; the text says what it was and what is taken."""


_INT = re.compile(r"[+-]?[0-9]{1,10}", re.ASCII)
_FLOAT = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
_FLOAT_CHARS = 64
_INT_MIN, _INT_MAX = -(2**31), 2**31 - 1
_FLOAT32_MIN, _FLOAT32_MAX = 1.1754943508222875e-38, 3.4028234663852886e38
_CPU_MASK = re.compile(r"(?:0x)?[0-9a-fA-F]{1,128}")
_CPU_RANGE = re.compile(r"[0-9]{0,3}-[0-9]{0,3}")
_MAX_CPUS = 512
_LOGIT_BIAS = re.compile(r"([0-9]{1,10})([+-])(.*)", re.DOTALL)
_JSON_BLANK = re.compile(r'("(?:[^"\\]|\\.)*+")|[ \t\r\n]+')


def _int(flag: Flag, value: str) -> str:
    if not _INT.fullmatch(value):
        raise _bad(flag, value)
    number = int(value)
    if not _INT_MIN <= number <= (_INT_MAX if flag.max is None else flag.max):
        raise _bad(flag, value)
    _check_range(flag, value, number)
    return flag.synonyms.get(str(number), str(number))


def _float(flag: Flag, value: str) -> str:
    number = _finite_float(value)
    if number is None:
        raise _bad(flag, value)
    _check_range(flag, value, number)
    return _shortest(number)


def _finite_float(value: str) -> float | None:
    """The number, or None where std::stof would throw or read something else."""
    if len(value) > _FLOAT_CHARS or not _FLOAT.fullmatch(value):
        return None
    number = float(value)
    if number and not _FLOAT32_MIN <= abs(number) <= _FLOAT32_MAX:
        return None
    return number


def _shortest(number: float) -> str:
    return repr(number + 0.0).removesuffix(".0")  # the sum turns -0.0 into 0.0


def _check_range(flag: Flag, value: str, number: float) -> None:
    too_small = flag.min is not None and number < flag.min
    too_small |= flag.above is not None and number <= flag.above
    too_big = flag.max is not None and number > flag.max
    if too_small or too_big or number in flag.refuses:
        raise _bad(flag, value)


def _choice(flag: Flag, value: str) -> str:
    if value in flag.choices:
        return value
    if value in flag.synonyms:
        return flag.synonyms[value]
    raise _bad(flag, value)


def _int_or_choice(flag: Flag, value: str) -> str:
    return value if value in flag.choices else _int(flag, value)


def _choices(flag: Flag, value: str) -> str:
    return ",".join([_choice(flag, item) for item in value.split(",")])


def _numbers(flag: Flag, value: str) -> str:
    numbers = [_finite_float(item) for item in re.split("[,/]+", value)]
    if None in numbers:
        raise _bad(flag, value)
    return ",".join([_shortest(number) for number in numbers if number is not None])


def _whole_numbers(flag: Flag, value: str) -> str:
    return ",".join([_int(flag, item) for item in re.split("[,/]+", value)])


def _cpu_mask(flag: Flag, value: str) -> str:
    if not _CPU_MASK.fullmatch(value):
        raise _bad(flag, value)
    return "0x" + (value.lower().removeprefix("0x").lstrip("0") or "0")


def _cpu_range(flag: Flag, value: str) -> str:
    first, _, last = value.partition("-")
    if not _CPU_RANGE.fullmatch(value) or max(int(first or 0), int(last or 0)) >= _MAX_CPUS:
        raise _bad(flag, value)
    return f"{int(first or 0)}-{int(last or _MAX_CPUS - 1)}"


def _logit_bias(flag: Flag, value: str) -> str:
    found = _LOGIT_BIAS.fullmatch(value)
    bias = _finite_float(found[3]) if found else None
    if found is None or bias is None or int(found[1]) > _INT_MAX:
        raise _bad(flag, value)
    return f"{int(found[1])}{found[2]}{_shortest(bias)}"


def _json_object(flag: Flag, value: str) -> str:
    if not isinstance(_parsed_json(flag, value), dict):
        raise _bad(flag, value)
    return _JSON_BLANK.sub(r"\1", value)


def _parsed_json(flag: Flag, value: str) -> object:
    try:
        parsed: object = _JSON_DECODER.decode(value)
        if "\\u" in value:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair
    except (ValueError, RecursionError):
        raise _bad(flag, value) from None
    return parsed


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


# Whole numbers may be longer than Python's own limit for int().
_JSON_DECODER = json.JSONDecoder(parse_int=float, parse_constant=_no_constant)
_FLAT_DECODER = json.JSONDecoder(
    parse_int=float, parse_constant=_no_constant, object_pairs_hook=bool
)


def _text(_flag: Flag, value: str) -> str:
    return value


_CANONICAL: Final[Mapping[str, Callable[[Flag, str], str]]] = {
    "int": _int,
    "float": _float,
    "choice": _choice,
    "choices": _choices,
    "int-or-choice": _int_or_choice,
    "numbers": _numbers,
    "whole-numbers": _whole_numbers,
    "cpu-mask": _cpu_mask,
    "cpu-range": _cpu_range,
    "logit-bias": _logit_bias,
    "json-object": _json_object,
    "text": _text,
}

_WHAT_IT_TAKES: Final[Mapping[str, str]] = {
    "int": "a whole number",
    "float": "a number, written with a point",
    "numbers": "a list of numbers with commas between them",
    "whole-numbers": "a list of whole numbers with commas between them",
    "cpu-mask": "a hexadecimal mask of at most 512 processors",
    "cpu-range": "FIRST-LAST, both below 512",
    "logit-bias": "TOKEN+BIAS or TOKEN-BIAS, as in 15043+1",
    "json-object": "a JSON object",
    "text": "a value",
}


def _bad(flag: Flag, value: str) -> _BadValue:
    why = f" ({flag.range_reason})" if flag.range_reason else ""
    return _BadValue(f"{_quoted(value)} is not {_expects(flag)}{why}.")


def _expects(flag: Flag) -> str:
    """What the flag takes, in words."""
    kind = flag.takes[0]
    choices = ", ".join(flag.choices)
    if kind == "choice":
        return f"one of {choices}"
    if kind == "choices":
        return f"a comma-separated list of {choices}"
    if kind == "int-or-choice":
        return f"a whole number or one of {choices}"
    if len(flag.takes) > 1:
        return f"{len(flag.takes)} values {flag.value_hint}, each {_WHAT_IT_TAKES[kind]}"
    return _WHAT_IT_TAKES[kind] + _range_in_words(flag)


def _range_in_words(flag: Flag) -> str:
    words = []
    if flag.above is not None:
        words.append(f"above {flag.above:g}")
    if flag.min is not None:
        words.append(f"from {flag.min:.10g}")
    if flag.max is not None:
        words.append(f"up to {flag.max:.10g}")
    words += [f"other than {number:g}" for number in flag.refuses]
    return "".join(" " + word for word in words)


# --- Files that agents may name


@dataclasses.dataclass(frozen=True)
class OpenedFlags:
    """Which flags the operator opened to agents.

    `folders` maps the canonical name to the absolute folder below which its
    files must lie, and to None where the flag names no file.
    """

    folders: Mapping[str, Path | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(
        cls, text: str, table: "FlagTable | None" = None, relative_to: Path | None = None
    ) -> "OpenedFlags":
        """Read LLAMA_SIDECAR_AGENT_FLAGS, as in `--device,--lora=adapters`.

        A relative folder is taken from `relative_to`, by default the working
        directory. Raises FlagsRefused with every fault.
        """
        table = table or FlagTable.built_in()
        folders: dict[str, Path | None] = {}
        faults = []
        for item in filter(None, map(str.strip, text.split(","))):
            name, has_folder, folder = item.partition("=")
            flag = table.flag(name.strip())
            try:
                if flag is None:
                    raise _BadValue("is no flag that llama-server is known to take")
                place = (relative_to or Path.cwd()) / folder if has_folder else None
                folders[flag.name] = _opened_folder(flag, place)
            except _BadValue as exc:
                faults.append(f"{_quoted(item)} {exc}.")
        _refuse(faults)
        return cls(folders)


def _opened_folder(flag: Flag, folder: Path | None) -> Path | None:
    """Raises _BadValue, to stand behind the flag's name."""
    if flag.policy in {Policy.DAEMON, Policy.NOBODY}:
        raise _BadValue(f"cannot be opened to agents: {flag.reason}")
    if not flag.path:
        if folder is not None:
            raise _BadValue("takes no folder, since its value names no file")
        return None
    if folder is None:
        raise _BadValue(f"needs the folder that agents may use, as in {flag.name}=FOLDER")
    try:
        is_folder = folder.is_dir()
    except OSError:
        is_folder = False
    if not is_folder:
        raise _BadValue("names no existing folder")
    return folder.absolute()


def _paths_below(folder: Path | None, shape: str, value: str) -> str:
    """The value with every path in it replaced by the real one below `folder`.

    Raises _BadValue if one lies, or leads by a link, elsewhere.
    """
    if folder is None:
        raise _BadValue("the operator named no folder for it.")
    if shape == "csv-files":
        return ",".join([_csv_field(_path_below(folder, item)) for item in _csv_fields(value)])
    if shape == "csv-file:scale":
        return ",".join([_csv_field(_scaled_below(folder, item)) for item in _csv_fields(value)])
    return _path_below(folder, value, is_folder=shape == "dir")


def _scaled_below(folder: Path, item: str) -> str:
    name, colon, scale = item.rpartition(":")
    number = _finite_float(scale)
    if not colon or number is None:
        raise _BadValue(f"{_quoted(item)} is not FILE:SCALE.")
    path = _path_below(folder, name)
    if ":" in path:
        raise _BadValue(f"{_quoted(item)}: llama-server cannot read a path with a colon here.")
    return f"{path}:{_shortest(number)}"


def _path_below(folder: Path, name: str, *, is_folder: bool = False) -> str:
    """The real path of a file below `folder`.

    The text is judged before the disk is asked: asking for a path on another
    machine would already send it this user's credentials.
    """
    kind, is_kind = ("folder", stat.S_ISDIR) if is_folder else ("file", stat.S_ISREG)
    wrong = _BadValue(
        f"{_quoted(name)} is no {kind} below the folder that the operator opened for it."
    )
    try:
        root = _real(folder)
        written = os.path.normpath(folder / name)
        if not name or not (
            _is_below(written, os.path.normpath(folder)) or _is_below(written, root)
        ):
            raise wrong
        real = _real(written)
        mode = Path(real).stat().st_mode
    except (OSError, ValueError):
        raise wrong from None
    if not _is_below(real, root) or not is_kind(mode):
        raise wrong
    return real


def _real(path: Path | str) -> str:
    return os.path.realpath(path, strict=True)


def _is_below(path: str, folder: str) -> bool:
    """Whether it is the folder or lies in it, both being absolute and without `..`."""
    top = os.path.normcase(folder).rstrip(os.sep) + os.sep
    return (os.path.normcase(path) + os.sep).startswith(top)


def _csv_fields(row: str) -> Iterator[str]:
    """As parse_csv_row in llama.cpp's common/arg.cpp: quotes only at a field's start."""
    field, in_quotes, at = "", False, 0
    while at < len(row):
        char = row[at]
        if char == '"' and in_quotes and row[at + 1 : at + 2] == '"':
            field += char
            at += 1
        elif char == '"' and (in_quotes or not field):
            in_quotes = not in_quotes
        elif char == "," and not in_quotes:
            yield field
            field = ""
        else:
            field += char
        at += 1
    yield field


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if "," in text or '"' in text else text


# --- The table


class FlagTable:
    """Every spelling of every flag, for one binary. Immutable."""

    def __init__(self, spellings: Mapping[str, Spelling]) -> None:
        self.spellings = spellings
        self.flags: tuple[Flag, ...] = tuple(
            dict.fromkeys(spelling.flag for spelling in spellings.values())
        )

    @classmethod
    @functools.cache
    def built_in(cls) -> "FlagTable":
        """What flags.json knows, whatever the binary: b11434 and, beside it, b10434."""
        file = Path(__file__).with_name("flags.json")
        rows = json.loads(file.read_text(encoding="utf-8"))["flags"]
        flags = [_flag(row) for row in rows]
        return cls(
            {word: Spelling(flag, name, name) for flag in flags for word, name in _names(flag)}
        )

    def for_binary(self, help_text: str) -> "FlagTable":
        """This table, cut down and widened to the flags that a binary's --help names.

        A flag the binary lost is translated where a newer one says the same,
        and so is one that it still knows under both names.
        """
        return _TableForBinary(self, help_text).table()

    def knows(self, word: str) -> bool:
        """Whether the binary takes the flag, by this name or another."""
        return self.spoken(word) is not None

    def spoken(self, word: str) -> str | None:
        """What the binary calls the flag; None if it does not know it."""
        spelling = self.spellings.get(word)
        return spelling.spoken if spelling else None

    def flag(self, word: str) -> Flag | None:
        spelling, inline = self.look_up(word)
        return spelling.flag if spelling and inline is None else None

    def look_up(self, word: str) -> tuple[Spelling | None, str | None]:
        """What a word means, and the value behind its `=` if it holds one."""
        spelling = self._spelling(word)
        if spelling is not None:
            return spelling, None
        name, equals, value = word.partition("=")
        return (self._spelling(name), value) if equals else (None, None)

    def _spelling(self, word: str) -> Spelling | None:
        found = self.spellings.get(word)
        if found is None and word.startswith("--"):
            return self.spellings.get(word.replace("_", "-"))
        return found

    def neighbour(self, word: str) -> str | None:
        """The known spelling most like an unknown one, by difflib's ratio."""
        name = word[:64].partition("=")[0].replace("_", "-")
        letters = _letters(name)
        bounded = [
            (2 * (letters & theirs).bit_count() / (len(name) + len(known)), known)
            for known, theirs in self._letters_of.items()
        ]
        matcher = difflib.SequenceMatcher(b=name)
        best = (_ALIKE, "")
        for bound in sorted((each for each in bounded if each[0] >= _ALIKE), reverse=True):
            if bound < best:
                break
            matcher.set_seq1(bound[1])
            best = max(best, (matcher.ratio(), bound[1]))
        return best[1] or None

    @functools.cached_property
    def _letters_of(self) -> Mapping[str, int]:
        return {known: _letters(known) for known in self.spellings}


_ALIKE: Final = 0.6  # of difflib's ratio, 1.0 being equal


def _letters(name: str) -> int:
    """A bit for each ASCII letter and how often it came, so that `&` tells what two share.

    No ratio is above that of the letters they share, whatever their order, and
    counting bits is much faster than difflib.
    """
    seen: dict[str, int] = {}
    bits = 0
    for char in filter(str.isascii, name):
        times = seen[char] = seen.get(char, -1) + 1
        bits |= 1 << 128 * times + ord(char)
    return bits


def _names(flag: Flag) -> Iterator[tuple[str, str]]:
    """Every spelling of a flag with its canonical one."""
    for word in (flag.name, *flag.aliases):
        yield word, flag.name
    for word in flag.negated:
        yield word, flag.negated_name


_LISTS = "aliases negated takes choices refuses translate translate_negated".split()
_SETS = "removes order_with".split()


def _flag(row: Mapping[str, Any]) -> Flag:
    fields = dict(row)
    fields |= {key: tuple(row[key]) for key in _LISTS if key in row}
    fields |= {key: frozenset(row[key]) for key in _SETS if key in row}
    fields["policy"] = Policy(row.get("policy", "agent"))
    return Flag(**fields)


class _TableForBinary:
    """Works out what each spelling means to the binary behind one help text."""

    def __init__(self, known: FlagTable, help_text: str) -> None:
        self._known = known
        self._rows = list(_help_rows(help_text))
        self._row_of = {name: row for row in self._rows for name in row.names}

    def table(self) -> FlagTable:
        spellings: dict[str, Spelling] = {}
        for flag in self._known.flags:
            spellings.update(self._spellings(self._as_told(flag)))
        for row in self._rows:
            if spellings.keys().isdisjoint(row.names):
                flag = _unlisted_flag(row)
                spellings.update({word: Spelling(flag, name, name) for word, name in _names(flag)})
        return FlagTable(spellings)

    def _as_told(self, flag: Flag) -> Flag:
        """The flag with this binary's choices and arity, and the spellings it adds."""
        words = (flag.name, *flag.aliases, *flag.negated)
        row = next((self._row_of[word] for word in words if word in self._row_of), None)
        if row is None:
            return flag
        new = [name for name in row.names if name not in self._known.spellings]
        negated = () if row.arity else tuple(filter(_is_negated, new))
        lists_choices = not set(row.values).isdisjoint(flag.choices)
        choices = row.values if lists_choices else flag.choices
        told = dataclasses.replace(
            flag,
            aliases=(*flag.aliases, *(name for name in new if name not in negated)),
            negated=(*flag.negated, *negated),
            removes=self._removed_by(flag),
            choices=choices,
            synonyms={
                word: choice
                for word, choice in flag.synonyms.items()
                if choice in choices or not choices
            },
        )
        if row.arity == len(flag.takes):
            return told
        return dataclasses.replace(told, takes=("text",) * row.arity, bare=None)

    def _removed_by(self, flag: Flag) -> frozenset[str]:
        """Builds without --load-mode hold what it replaced as switches of their own."""
        is_one_of_several = bool(flag.translate) and flag.translate[0] not in self._row_of
        return frozenset() if is_one_of_several else flag.removes

    def _spellings(self, flag: Flag) -> dict[str, Spelling]:
        on = self._spelling(flag, flag.name, (flag.name, *flag.aliases), flag.translate)
        off_words = (flag.negated_name, *flag.negated)
        off = self._spelling(flag, flag.negated_name, off_words, flag.translate_negated)
        return {word: on if name == flag.name else off for word, name in _names(flag)}

    def _spelling(
        self, flag: Flag, name: str, words: tuple[str, ...], translation: tuple[str, ...]
    ) -> Spelling:
        spoken = next((word for word in words if word in self._row_of), None)
        is_translated = bool(translation) and translation[0] in self._row_of
        return Spelling(flag, name, spoken, translation if is_translated else ())


def _unlisted_flag(row: "_HelpRow") -> Flag:
    negated = () if row.arity else tuple(filter(_is_negated, row.names))
    positive = [name for name in row.names if name not in negated]
    if not positive:
        positive, negated = [*negated], ()
    name = next((name for name in positive if name.startswith("--")), positive[0])
    return Flag(
        name=name,
        aliases=tuple(other for other in positive if other != name),
        negated=negated,
        takes=("text",) * row.arity,
        policy=Policy.UNLISTED,
        reason="only this build of llama-server knows it, so nothing is known of what it can do",
    )


def _is_negated(name: str) -> bool:
    return name.startswith(("--no-", "-no-"))


class _HelpRow(NamedTuple):
    """What a help text says of one option."""

    names: tuple[str, ...]
    arity: int
    values: tuple[str, ...]  # those it lists, if it does


_NAME = r"-{1,2}[A-Za-z][A-Za-z0-9._-]*"
_VALUE = "[A-Za-z0-9._+-]+"
_HELP_ROW = re.compile(rf"((?:{_NAME}, *)*{_NAME})(?: (\S.*?))?(?: {{2,}}.*)?")
_BRACKETED = re.compile(r"<[^>]*>|\[[^\]]*\]|\{[^}]*\}")
_VALUES_IN_HINT = re.compile(rf"[\[{{]?({_VALUE}(?:[|,]{_VALUE})+)[\]}}]?")
_VALUES_IN_TEXT = re.compile(rf"allowed values: ({_VALUE}(?:, {_VALUE})+)")


def _help_rows(help_text: str) -> Iterator[_HelpRow]:
    for block in re.split(r"^(?=-)", help_text, flags=re.MULTILINE):
        line = block.partition("\n")[0].rstrip()
        found = _HELP_ROW.fullmatch(line)
        if found is None:
            continue
        hint = found[2] or ""
        listed = _VALUES_IN_HINT.fullmatch(hint) or _VALUES_IN_TEXT.search(" ".join(block.split()))
        yield _HelpRow(
            names=tuple(re.split(", *", found[1])),
            arity=len(_BRACKETED.sub("x", hint).split()),
            values=tuple(re.split("[|,] *", listed[1])) if listed else (),
        )


# --- Command lines

# Possessive (++, *+), so that a backslash once read with its quote stays with it.
_TOKEN = re.compile(r"""(?:[^ \t"'\\]++|\\"?|'[^']*'|"(?:[^"\\]++|\\"?)*+")++""")
_PIECE = re.compile(r"""'([^']*)'|"((?:[^"\\]++|\\"?)*+)"|((?:[^"'\\]++|\\"?)++)""")


def split_command_line(text: str) -> list[str]:
    r"""Split as a shell does, but keep a Windows path whole.

    Blanks and tabs separate, single quotes take everything as it stands,
    double quotes group. A backslash stands for itself, except that `\"`
    outside single quotes is a double quote. Raises FlagsRefused for a quote
    that is never closed.
    """
    if '"' not in text and "'" not in text:
        return [word for word in text.replace("\t", " ").split(" ") if word]
    if _TOKEN.sub("", text).strip(" \t"):
        fault = f"A quote is opened and never closed in {_quoted(text)}."
        hint = "Where a backslash stands before the closing double quote, use single quotes."
        raise FlagsRefused([f"{fault} {hint}"])
    return [_unquoted(token) for token in _TOKEN.findall(text)]


def _unquoted(token: str) -> str:
    if '"' not in token and "'" not in token:
        return token
    return "".join(
        literal or (grouped or plain).replace('\\"', '"')
        for literal, grouped, plain in _PIECE.findall(token)
    )


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _header_faults(text: str) -> list[str]:
    """What is wrong with the header before it is split."""
    faults = []
    if len(text.encode("utf-8", "replace")) > MAX_HEADER_BYTES:
        faults.append(f"X-Agent-Flags is longer than {MAX_HEADER_BYTES} bytes.")
    if found := _CONTROL.search(text):
        faults.append(f"X-Agent-Flags holds the control character {_quoted(found[0])}.")
    if _SURROGATE.search(text):
        faults.append("X-Agent-Flags is not valid UTF-8.")
    return faults


def _token_faults(tokens: Sequence[str]) -> list[str]:
    faults = []
    if len(tokens) > MAX_TOKENS:
        faults.append(f"X-Agent-Flags holds {len(tokens)} words; at most {MAX_TOKENS} are taken.")
    for token in tokens:
        if len(token) > MAX_TOKEN_CHARS:
            faults.append(f"{_quoted(token)} is longer than {MAX_TOKEN_CHARS} characters.")
    if _is_longer_than(tokens, AGENT_COMMAND_LINE_CHARS):
        faults.append(
            f"X-Agent-Flags is longer than the {AGENT_COMMAND_LINE_CHARS} characters "
            "of a Windows command line that are an agent's."
        )
    return faults


def windows_command_line_chars(args: Sequence[str]) -> int:
    """How long Windows finds this command line, in UTF-16 units."""
    return len(subprocess.list2cmdline(args).encode("utf-16-le", "surrogatepass")) // 2


def _is_longer_than(args: Sequence[str], chars: int) -> bool:
    at_most = 2 * sum(map(len, args)) + 3 * len(args)  # quoting doubles at worst
    return at_most > chars and windows_command_line_chars(args) > chars


def _operator_text_faults(args: Sequence[object]) -> list[str]:
    faults = []
    for arg in args:
        if not isinstance(arg, str):
            faults.append(f"{_quoted(str(arg))} is not a text.")
        elif "\0" in arg:
            faults.append(f"{_quoted(arg)} holds a NUL character.")
        elif _SURROGATE.search(arg):
            faults.append(f"{_quoted(arg)} is not valid UTF-8.")
    return faults


# --- Asking the binary

if sys.platform == "win32":

    def _spawn(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(command, creationflags=subprocess.CREATE_NO_WINDOW, **options)

    def _kill(child: "subprocess.Popen[bytes]") -> None:
        child.kill()

else:

    def _spawn(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(command, start_new_session=True, **options)

    def _kill(child: "subprocess.Popen[bytes]") -> None:
        os.killpg(child.pid, signal.SIGKILL)


def probe_help(binary: Path, environment: Mapping[str, str], timeout_s: float = 30.0) -> str:
    """What `binary --help` prints. Blocks for at most about `timeout_s` seconds.

    The environment must hold no LLAMA_ARG_*: llama-server reads them before
    anything else. Raises HelpUnavailable, in words for the operator.
    """
    text = _output(binary, timeout_s, dict(environment))
    named = {name for row in _help_rows(text) for name in row.names}
    if not {"--model", "--host", "--port"} <= named:
        raise HelpUnavailable(f"{binary} --help does not read like that of a llama-server")
    return text


def _output(binary: Path, timeout_s: float, environment: dict[str, str]) -> str:
    """Into files, not pipes: a grandchild that holds a pipe open could not be waited for."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = _spawn(
                [str(binary), "--help"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
            )
        except (OSError, ValueError) as exc:
            raise HelpUnavailable(f"{binary} cannot be started: {exc}") from exc
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise HelpUnavailable(f"{binary} --help took more than {timeout_s:g} s") from None
        finally:
            if child.poll() is None:
                _kill(child)
                child.wait()
        if code:
            err.seek(0)
            last = err.read(MAX_HELP_BYTES).decode("utf-8", "replace").strip()[-300:]
            raise HelpUnavailable(f"{binary} --help ended with exit code {code}: {_quoted(last)}")
        out.seek(0)
        return out.read(MAX_HELP_BYTES).decode("utf-8", "replace")
