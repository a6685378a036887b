"""The part of YAML that configurations are written in, read without a package.

Maps and lists in block and flow style, plain, quoted and block scalars on one line or more,
comments. Everything else is an error that names its line: anchors, tags, merge keys, keys
of more than a word, tabs outside of texts, several documents, one key twice.

A scalar stays the text that it is, `8080` and `true` too, as PyYAML's BaseLoader has it:
llama-swap puts values into command lines, and what stands nowhere is an empty text.
"""

from __future__ import annotations

import re
from typing import Final, TypeAlias

Node: TypeAlias = "str | list[Node] | dict[str, Node]"

MOST_CHARS: Final = 4_000_000
MOST_DEPTH: Final = 64

_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_DOCUMENT_MARK = re.compile(r"^(?:---|\.\.\.)(?=[ \n]|\Z)", re.MULTILINE)
_BLOCK_HEADER = re.compile(r"([|>])(?:([+-])([1-9])?|([1-9])([+-])?)?(?: +(?:#.*)?)?(?=\n|\Z)")
_PLAIN_END = re.compile(r" +#|:(?=[ \t\n]|\Z)|\t| *(?=\n|\Z)")
_FLOW_PLAIN_END = re.compile(r" +#|:(?=[ \t\n,\[\]{}]|\Z)|[,\[\]{}?\t]| *(?=\n|\Z)")
_CANNOT_BEGIN: Final = frozenset(",]}#%@`")
_FOREIGN: Final = {"&": "an anchor", "*": "an alias", "!": "a tag", "?": "a key behind a '?'"}
_ESCAPES: Final = {
    "0": "\0",
    "a": "\a",
    "b": "\b",
    "t": "\t",
    "\t": "\t",
    "n": "\n",
    "v": "\v",
    "f": "\f",
    "r": "\r",
    "e": "\x1b",
    " ": " ",
    '"': '"',
    "/": "/",
    "\\": "\\",
    "N": "\x85",
    "_": "\xa0",
    "L": "\u2028",
    "P": "\u2029",
}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}


class YamlError(Exception):
    """The text cannot be read; in words, without any of its values, which may be secret."""

    def __init__(self, line: int, words: str) -> None:
        super().__init__(f"line {line}: {words}")
        self.line = line


def load(text: str) -> Node:
    """Read one document. Raises YamlError."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    return _Parser(text).document()


class _Parser:
    """Reads from `_at` on. Columns count from 0, the root's parent has column -1."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        if len(text) > MOST_CHARS:
            raise YamlError(1, f"more than {MOST_CHARS} characters")
        if found := _FORBIDDEN.search(text):
            name = f"U+{ord(found[0]):04X}"
            raise self._error(f"the character {name} is not allowed here", found.start())

    def document(self) -> Node:
        self._to_content()
        if self._peek() == "%":
            raise self._error("directives are not read")
        if self._text.startswith("---", self._at) and self._is_document_mark():
            self._at += 3
            self._end_line()
            self._to_content()
        is_empty = self._is_at_end()
        node: Node = "" if is_empty else self._block_node(-1)
        self._to_content()
        if not is_empty and self._text.startswith("...", self._at) and self._is_document_mark():
            self._at += 3
            self._end_line()
            self._to_content()
        if self._at < len(self._text):
            is_other = self._is_document_mark()
            raise self._error("a second document" if is_other else "the indentation fits nothing")
        return node

    # --- where we are

    def _peek(self, ahead: int = 0) -> str:
        """The character there; empty at the end."""
        return self._text[self._at + ahead : self._at + ahead + 1]

    def _column(self) -> int:
        return self._at - (self._text.rfind("\n", 0, self._at) + 1)

    def _error(self, words: str, at: int | None = None) -> YamlError:
        place = self._at if at is None else at
        return YamlError(self._text.count("\n", 0, place) + 1, words)

    def _is_document_mark(self) -> bool:
        return self._column() == 0 and bool(_DOCUMENT_MARK.match(self._text, self._at))

    def _is_at_end(self) -> bool:
        return self._at >= len(self._text) or self._is_document_mark()

    def _skip_blanks(self) -> None:
        while self._peek() == " ":
            self._at += 1

    def _is_rest_empty(self) -> bool:
        """Whether nothing but a comment follows on this line; blanks are behind us."""
        is_comment = self._peek() == "#" and self._text[self._at - 1 : self._at] in ("", " ", "\n")
        return self._peek() in ("", "\n") or is_comment

    def _end_line(self) -> None:
        """Go to the end of the line, over a comment."""
        self._skip_blanks()
        if not self._is_rest_empty():
            self._refuse_tab()
            raise self._error("text behind a value that has ended")
        self._to_line_end()

    def _to_line_end(self) -> None:
        end = self._text.find("\n", self._at)
        self._at = len(self._text) if end < 0 else end

    def _to_content(self) -> None:
        """Over blanks, comments and empty lines."""
        self._skip_blanks()
        while self._at < len(self._text) and self._is_rest_empty():
            self._to_line_end()
            self._at += self._at < len(self._text)
            self._skip_blanks()
        self._refuse_tab()

    def _refuse_tab(self) -> None:
        if self._peek() == "\t":
            raise self._error("a tab, where only blanks may stand")

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise self._error(f"nested deeper than {MOST_DEPTH} levels")

    # --- block style

    def _block_node(self, parent: int) -> Node:
        """What begins here, further right than `parent`."""
        self._enter()
        column = self._column()
        node: Node
        if self._is_dash():
            node = self._sequence(column)
        elif self._is_key():
            node = self._mapping(column)
        else:
            node = self._leaf(parent)
        self._depth -= 1
        return node

    def _is_dash(self) -> bool:
        return self._peek() == "-" and self._peek(1) in ("", " ", "\n")

    def _sequence(self, column: int) -> list[Node]:
        items: list[Node] = []
        while not self._is_at_end() and self._column() == column and self._is_dash():
            self._at += 1
            self._skip_blanks()
            if self._is_rest_empty():
                self._to_content()
                is_nested = not self._is_at_end() and self._column() > column
                items.append(self._block_node(column) if is_nested else "")
            else:
                self._refuse_tab()
                items.append(self._block_node(column))
            self._to_content()
        self._refuse_deeper(column)
        return items

    def _mapping(self, column: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not self._is_at_end() and self._column() == column:
            if not self._is_key():
                raise self._error("neither a key with its ':' nor the rest of the value above")
            at = self._at
            key = self._key()
            if key in entries:
                raise self._error("the key stands twice", at)
            entries[key] = self._value(column)
            self._to_content()
        self._refuse_deeper(column)
        return entries

    def _refuse_deeper(self, column: int) -> None:
        if not self._is_at_end() and self._column() > column:
            raise self._error("the indentation fits nothing")

    def _is_key(self) -> bool:
        """Whether a key and its ':' stand here, on one line."""
        start = self._at
        try:
            if self._peek() in ("'", '"'):
                self._quoted()
                is_on_one_line = "\n" not in self._text[start : self._at]
                self._skip_blanks()
                return is_on_one_line and self._is_colon()
            if self._begins_plain(is_flow=False):
                found = _PLAIN_END.search(self._text, self._at)
                return found is not None and found[0] == ":"
            return self._peek() in ("&", "*", "!", "?") and self._complain_of_foreign()
        finally:
            self._at = start

    def _is_colon(self) -> bool:
        return self._peek() == ":" and self._peek(1) in ("", " ", "\t", "\n")

    def _key(self) -> str:
        if self._peek() in ("'", '"'):
            key = self._quoted()
            self._skip_blanks()
        else:
            end = self._text.index(":", self._at)
            while self._text[end + 1 : end + 2] not in ("", " ", "\t", "\n"):
                end = self._text.index(":", end + 1)
            key = self._text[self._at : end].rstrip(" ")
            if key == "<<":
                raise self._error("a merge key")
            self._at = end
        self._at += 1
        return key

    def _value(self, column: int) -> Node:
        """What stands behind the ':' of a key in `column`."""
        self._skip_blanks()
        self._refuse_tab()
        if not self._is_rest_empty():
            if self._is_dash():
                raise self._error("a list begins on a line of its own")
            if self._peek() not in ("'", '"') and self._is_key():
                raise self._error("a second ':' with a blank behind it")
            return self._leaf(column)
        self._to_content()
        if self._is_at_end() or self._column() < column:
            return ""
        if self._column() > column:
            return self._block_node(column)
        return self._sequence(column) if self._is_dash() else ""

    def _leaf(self, parent: int) -> Node:
        char = self._peek()
        if char in ("|", ">"):
            return self._block_scalar(parent)
        if char not in ("'", '"', "[", "{"):
            self._complain_of_foreign()
            return self._plain(parent)
        node: Node = self._quoted() if char in ("'", '"') else self._flow()
        self._end_line()
        return node

    def _complain_of_foreign(self) -> bool:
        char = self._peek()
        is_plain = char == "?" and self._peek(1) not in ("", " ", "\n")
        if char in _FOREIGN and not is_plain:
            raise self._error(f"{_FOREIGN[char]} is not read")
        return False

    def _begins_plain(self, *, is_flow: bool) -> bool:
        char, following = self._peek(), self._peek(1)
        if char in ("-", "?", ":"):
            blocked = ("", " ", "\t", "\n")
            return following not in blocked and (char == "-" or not is_flow)
        return char not in _CANNOT_BEGIN and char not in tuple("&*!|>'\"[{\n\t ") and char != ""

    # --- scalars

    def _plain(self, parent: int) -> str:
        if not self._begins_plain(is_flow=False):
            raise self._error(f"a value cannot begin with {self._peek()!r}")
        pieces = [self._plain_piece(_PLAIN_END)]
        while not self._is_comment_next() and (breaks := self._continued(parent)):
            pieces += [_folded(breaks), self._plain_piece(_PLAIN_END)]
        self._refuse_colon_and_tab()
        return "".join(pieces)

    def _plain_piece(self, end: re.Pattern[str]) -> str:
        """What of a plain scalar stands on this line."""
        found = end.search(self._text, self._at)
        assert found is not None  # a line has an end
        piece = self._text[self._at : found.start()]
        self._at = found.start()
        return piece.rstrip(" ")

    def _is_comment_next(self) -> bool:
        return self._text[self._at :].lstrip(" ")[:1] == "#" if self._peek() == " " else False

    def _continued(self, parent: int | None) -> int:
        """Go to the next line that belongs to a plain scalar; over how many ends of lines.

        0, and nothing is moved, where the scalar ends. In flow style `parent` is None.
        """
        start = self._at
        self._skip_blanks()
        breaks = 0
        while self._peek() == "\n":
            breaks += 1
            self._at += 1
            self._skip_blanks()
        is_outside = parent is not None and self._column() <= parent
        if breaks and self._at < len(self._text) and not is_outside and self._peek() != "#":
            self._refuse_tab()
            if not self._is_document_mark():
                return breaks
        self._at = start
        return 0

    def _refuse_colon_and_tab(self) -> None:
        self._refuse_tab()
        if self._peek() == ":":
            raise self._error("a ':' with a blank behind it within a value: put it into quotes")

    def _quoted(self) -> str:
        """From the opening quote to behind the closing one."""
        start, quote = self._at, self._peek()
        self._at += 1
        pieces: list[str] = []
        while (char := self._peek()) != quote or self._is_doubled(quote):
            if not char:
                raise self._error("a quote is opened and never closed", start)
            if char == quote:
                pieces.append("'")
                self._at += 2
            elif char == "\\" and quote == '"':
                pieces.append(self._escaped())
            elif char in (" ", "\t", "\n"):
                pieces.append(self._space_in_quotes())
            else:
                pieces.append(char)
                self._at += 1
        self._at += 1
        return "".join(pieces)

    def _is_doubled(self, quote: str) -> bool:
        return quote == "'" and self._peek(1) == "'"

    def _space_in_quotes(self) -> str:
        """Blanks as they are, unless the line ends behind them."""
        end = self._at
        while self._text[end : end + 1] in (" ", "\t"):
            end += 1
        blanks = self._text[self._at : end]
        self._at = end
        if self._peek() != "\n":
            return blanks
        return _folded(self._breaks_in_quotes())

    def _breaks_in_quotes(self) -> int:
        breaks = 0
        while self._peek() == "\n":
            breaks += 1
            self._at += 1
            if self._is_document_mark():
                raise self._error("a document ends within quotes")
            while self._peek() in (" ", "\t"):
                self._at += 1
        return breaks

    def _escaped(self) -> str:
        char = self._peek(1)
        if char == "\n":
            self._at += 1
            return "\n" * (self._breaks_in_quotes() - 1)
        if char in _ESCAPES:
            self._at += 2
            return _ESCAPES[char]
        digits = _HEX_DIGITS.get(char, 0)
        code = self._text[self._at + 2 : self._at + 2 + digits]
        if not digits or not re.fullmatch(f"[0-9a-fA-F]{{{digits}}}", code):
            raise self._error("a backslash in double quotes before what is no escape")
        number = int(code, 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise self._error("an escape for what is no character")
        self._at += 2 + digits
        return chr(number)

    def _block_scalar(self, parent: int) -> str:
        header = _BLOCK_HEADER.match(self._text, self._at)
        if header is None:
            raise self._error("behind | or > stand only + or -, a digit and a comment")
        chomping = header[2] or header[5]
        explicit = header[3] or header[4]
        self._at = header.end() + (header.end() < len(self._text))
        least = max(parent + 1, 1)
        indent = least + int(explicit) - 1 if explicit else self._block_indent(least)
        lines = self._block_lines(indent)
        return _block_text(lines, is_folded=header[1] == ">", chomping=chomping)

    def _block_indent(self, least: int) -> int:
        """How far the first line with text is indented, or a longer one of blanks before it."""
        at, most = self._at, 0
        while True:
            blanks = len(self._text) - at - len(self._text[at:].lstrip(" "))
            most = max(most, blanks)
            if self._text[at + blanks : at + blanks + 1] != "\n":
                return max(least, most)
            at += blanks + 1

    def _block_lines(self, indent: int) -> list[str]:
        """The lines of a block scalar without their indentation, with their ends."""
        lines = []
        while self._at < len(self._text):
            end = self._text.find("\n", self._at)
            end = len(self._text) if end < 0 else end + 1
            line = self._text[self._at : end]
            inside = line[indent:]
            is_empty = not line[:indent].strip(" \n") and inside in ("", "\n")
            if not is_empty and line[:indent].strip(" "):
                break
            if is_empty and not line.endswith("\n"):
                break  # blanks at the end of the text are no line
            lines.append("\n" if is_empty else inside)
            self._at = end
        self._at -= bool(lines) and self._text[self._at - 1] == "\n"
        return lines

    # --- flow style

    def _flow(self) -> Node:
        self._enter()
        is_list = self._peek() == "["
        start = self._at
        self._at += 1
        items: list[Node] = []
        entries: dict[str, Node] = {}
        closing = "]" if is_list else "}"
        self._to_flow_content(start)
        while self._peek() != closing:
            if is_list:
                items.append(self._flow_item(start))
            else:
                at = self._at
                key, value = self._flow_entry(start)
                if key in entries:
                    raise self._error("the key stands twice", at)
                entries[key] = value
            self._to_flow_content(start)
            if self._peek() == ",":
                self._at += 1
                self._to_flow_content(start)
            elif self._peek() != closing:
                raise self._error(f"neither ',' nor {closing!r}")
        self._at += 1
        self._depth -= 1
        return items if is_list else entries

    def _to_flow_content(self, start: int) -> None:
        self._to_content()
        if self._is_at_end():
            raise self._error(f"{self._text[start]} is opened and never closed", start)

    def _flow_item(self, start: int) -> Node:
        """An item of a list; `a: b` there is a map of one entry."""
        at = self._at
        node = self._flow_node()
        self._to_flow_content(start)
        if self._peek() != ":":
            return node
        if "\n" in self._text[at : self._at]:
            raise self._error("a key on more than one line", at)
        return {self._flow_key(node, at): self._flow_value(start)}

    def _flow_entry(self, start: int) -> tuple[str, Node]:
        at = self._at
        key = self._flow_key(self._flow_node(), at)
        self._to_flow_content(start)
        return key, self._flow_value(start) if self._peek() == ":" else ""

    def _flow_key(self, node: Node, at: int) -> str:
        if not isinstance(node, str):
            raise self._error("a key that is no text", at)
        if node == "<<" and self._text[at] == "<":
            raise self._error("a merge key", at)
        return node

    def _flow_value(self, start: int) -> Node:
        self._at += 1
        self._to_flow_content(start)
        return "" if self._peek() in (",", "]", "}") else self._flow_node()

    def _flow_node(self) -> Node:
        char = self._peek()
        if char in ("[", "{"):
            return self._flow()
        if char in ("'", '"'):
            return self._quoted()
        self._complain_of_foreign()
        if not self._begins_plain(is_flow=True):
            raise self._error(f"a value cannot begin with {char!r}")
        pieces = [self._plain_piece(_FLOW_PLAIN_END)]
        while not self._is_comment_next() and (breaks := self._continued(None)):
            if self._peek() in (":", ",", "[", "]", "{", "}"):
                break
            pieces += [_folded(breaks), self._plain_piece(_FLOW_PLAIN_END)]
        self._refuse_tab()
        return "".join(pieces)


def _folded(breaks: int) -> str:
    """One end of a line becomes a blank, of several all but the first stay."""
    return "\n" * (breaks - 1) or " "


def _block_text(lines: list[str], *, is_folded: bool, chomping: str | None) -> str:
    """The text of a block scalar, by how it treats single and trailing ends of lines."""
    count = len(lines)
    while count and lines[count - 1] == "\n":
        count -= 1
    kept, trailing = lines[:count], lines[count:]
    text = _fold(kept) if is_folded else "".join(kept)
    if chomping == "+":
        return text + "".join(trailing)
    return text.removesuffix("\n") if chomping == "-" else text


def _fold(lines: list[str]) -> str:
    """Ends of lines become blanks, but for those of empty and of further indented lines."""
    pieces: list[str] = []
    empty = 0
    before = ""  # the last line with text
    for line in lines:
        if line == "\n":
            empty += 1
            continue
        if before:
            is_prose = before[0] not in " \t" and line[0] not in " \t"
            glue = "" if is_prose else "\n"
            pieces.append((glue + "\n" * empty) or " ")
        else:
            pieces.append("\n" * empty)
        pieces.append(line.removesuffix("\n"))
        before, empty = line, 0
    return "".join(pieces) + ("\n" if before.endswith("\n") else "")
