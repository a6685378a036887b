"""The loaders: downloads from a server of our own, sums, counts, and both shapes of MMLU."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from eval import data
from eval.data import Choice, DataError, PinnedFile, Source
from tests.eval_parts import DATA, needs_data

CONTENT = b'{"question": "one and one?", "answer": "#### 2"}\n'
LETTERED = b'Is it?,w,"x, y",y,z,D\n" What ""is""\nit? ",1,2,3,4,A\n'
NUMBERED = b'question,choice0,choice1,choice2,choice3,answer\r\nIs it?,w,"x, y",y,z,3\r\n'


class Site:
    """Serves `files` by path, and notes what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                content = site.files.get(self.path)
                self.send_response(404 if content is None else 200)
                extra = 10 if self.path.endswith("torn") else 0
                self.send_header("Content-Length", str(len(content or b"") + extra))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def pinned(self, *paths: str, content: bytes = CONTENT, max_bytes: int = 1000) -> PinnedFile:
        urls = tuple(self.url + path for path in paths)
        return PinnedFile("set/file", urls, hashlib.sha256(content).hexdigest(), max_bytes)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield site
    finally:
        site.server.shutdown()
        thread.join()
        site.server.server_close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- downloads


def test_a_file_is_downloaded_once(site: Site, tmp_path: Path) -> None:
    site.files["/file"] = CONTENT
    for _ in range(2):
        assert data.fetched(site.pinned("/file"), tmp_path).read_bytes() == CONTENT
    assert site.asked == ["/file"]
    assert names(tmp_path) == ["file"]


def test_the_next_address_is_asked_if_one_fails(site: Site, tmp_path: Path) -> None:
    site.files |= {"/torn": CONTENT[:9], "/other": b"other", "/file": CONTENT}
    pinned = site.pinned("/none", "/other", "/torn", "/file")
    assert data.fetched(pinned, tmp_path).read_bytes() == CONTENT
    assert site.asked == ["/none", "/other", "/torn", "/file"]
    assert names(tmp_path) == ["file"]


def test_a_wrong_sum_is_an_error_that_shows_both_and_leaves_nothing(
    site: Site, tmp_path: Path
) -> None:
    site.files["/file"] = b"something else"
    pinned = site.pinned("/file")
    with pytest.raises(DataError) as caught:
        data.fetched(pinned, tmp_path)
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert pinned.sha256 in str(caught.value)
    assert names(tmp_path) == []


def test_too_long_a_file_is_not_read_to_its_end(site: Site, tmp_path: Path) -> None:
    site.files["/file"] = CONTENT
    with pytest.raises(DataError, match="more than 10 bytes"):
        data.fetched(site.pinned("/file", max_bytes=10), tmp_path)
    assert names(tmp_path) == []


def test_nobody_there_is_an_error_that_names_data_dir(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"404.*--data-dir"):
        data.fetched(site.pinned("/none"), tmp_path)


def test_a_file_in_the_cache_that_was_changed_is_not_used(site: Site, tmp_path: Path) -> None:
    site.files["/file"] = CONTENT
    pinned = site.pinned("/file")
    data.fetched(pinned, tmp_path).write_bytes(CONTENT + b"\n")
    with pytest.raises(DataError, match=pinned.sha256):
        data.fetched(pinned, tmp_path)


def test_the_cache_lies_in_the_users_own_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    monkeypatch.setenv(variable, str(tmp_path))
    assert data.cache_dir() == tmp_path / "llama-sidecar" / "eval"
    monkeypatch.delenv(variable)
    assert data.cache_dir().is_relative_to(Path.home())


def test_a_source_without_a_folder_downloads_into_the_cache(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    monkeypatch.setenv(variable, str(tmp_path))
    site.files["/gsm"] = CONTENT
    pinned = dataclasses.replace(site.pinned("/gsm"), name="gsm8k/test.jsonl")
    monkeypatch.setattr(data, "GSM8K", pinned)
    with pytest.raises(DataError, match="1 rows, but there must be 1319"):
        Source().gsm8k()
    monkeypatch.setattr(data, "GSM8K_ROWS", 1)
    assert Source().gsm8k() == [data.Sum(0, "one and one?", "#### 2", "2")]
    assert site.asked == ["/gsm"]


# --- copies at hand


def test_a_copy_with_another_sum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes(CONTENT)
    with pytest.raises(DataError) as caught:
        Source(tmp_path).gsm8k()
    assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)
    assert data.GSM8K.sha256 in str(caught.value)


@pytest.mark.parametrize("load", ["gsm8k", "humaneval", "mmlu"])
def test_a_folder_without_the_file_is_an_error_that_names_it(tmp_path: Path, load: str) -> None:
    with pytest.raises(DataError, match=str(tmp_path).replace("\\", "\\\\")):
        getattr(Source(tmp_path), load)()


@needs_data
def test_the_published_copies_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    source = Source(DATA)
    assert len(source.gsm8k()) == 1319
    assert len(source.humaneval()) == 164
    mmlu = source.mmlu()
    assert (len(mmlu.test), sum(map(len, mmlu.test.values()))) == (57, 14042)
    assert {len(choices) for choices in mmlu.dev.values()} == {5}
    assert data.content_digest(mmlu.test) == data.MMLU_TEST_DIGEST
    assert data.content_digest(mmlu.dev) == data.MMLU_DEV_DIGEST
    assert "warning" not in capsys.readouterr().err


@needs_data
def test_unpacked_files_of_mmlu_are_taken_too_and_missing_ones_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(DATA / "mmlu" / "mmlu-test-dev.tar.xz") as archive:
        for member in archive:
            if member.isreg():
                path = tmp_path / "mmlu" / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                file = archive.extractfile(member)
                assert file is not None
                path.write_bytes(file.read())
    assert Source(tmp_path).mmlu() == Source(DATA).mmlu()
    one = tmp_path / "mmlu" / "data" / "test" / "anatomy_test.csv"
    one.write_bytes(one.read_bytes().replace(b"facial", b"other", 1))
    Source(tmp_path).mmlu()
    assert data.MMLU_TEST_DIGEST in capsys.readouterr().err  # a warning
    one.write_bytes(b"\n".join(one.read_bytes().splitlines()[1:]) + b"\n")
    with pytest.raises(DataError, match="14041 rows, but there must be 14042"):
        Source(tmp_path).mmlu()
    one.unlink()
    with pytest.raises(DataError, match="56 subjects in test, but there must be 57"):
        Source(tmp_path).mmlu()


# --- the shapes of MMLU


def test_both_shapes_say_the_same() -> None:
    lettered = data.read_choices("s", LETTERED, "here")
    assert lettered[0] == Choice("s", 0, "Is it?", ("w", "x, y", "y", "z"), "D")
    assert lettered[1] == Choice("s", 1, 'What "is"\nit?', ("1", "2", "3", "4"), "A")
    assert data.read_choices("s", NUMBERED, "here") == lettered[:1]
    assert data.read_choices("s", b"\xef\xbb\xbf" + NUMBERED, "here") == lettered[:1]


@pytest.mark.parametrize(
    "row",
    [b"q,1,2,3,4,E\n", b"q,1,2,3,4,0\n", b"q,1,2,3,A\n", b"q,1,2,3,4,5,A\n", b"\n", b"\xff,A\n"],
)
def test_another_shape_is_refused(row: bytes) -> None:
    with pytest.raises(DataError, match="here"):
        data.read_choices("s", row, "here")


def test_the_digest_does_not_see_how_cells_are_quoted() -> None:
    plain = {"s": data.read_choices("s", b"q,1,2,3,4,A\n", "")}
    quoted = {"s": data.read_choices("s", b'"q ","1","2",3," 4",A\r\n', "")}
    other = {"s": data.read_choices("s", b"q,1,2,3,4,B\n", "")}
    assert data.content_digest(plain) == data.content_digest(quoted)
    assert data.content_digest(plain) != data.content_digest(other)
    line = b'["s",0,"q","1","2","3","4","A"]\n'
    assert data.content_digest(plain) == hashlib.sha256(line).hexdigest()


def archive_of(folder: Path, members: dict[str, bytes | str]) -> Path:
    """`members` with a text are links to it."""
    path = folder / "data.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def test_only_the_questions_of_an_archive_are_read(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "data/test/good_test.csv": LETTERED,
        "./data/test/bare.csv": NUMBERED,
        "data/val/good_val.csv": LETTERED,
        "data/dev/good_dev.csv": LETTERED,
        "data/test/link_test.csv": "/etc/passwd",
        "data/test/._good_test.csv": b"\x00",
        "data/possibly_contaminated_urls.txt": b"x",
    }
    path = archive_of(tmp_path, members)
    found = data._read_mmlu(path)
    assert (list(found.test), list(found.dev)) == (["bare", "good"], ["good"])
    assert names(tmp_path) == ["data.tar"]


@pytest.mark.parametrize("name", ["/data/test/x_test.csv", "data/../../x.csv", "..\\x.csv"])
def test_an_archive_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    path = archive_of(tmp_path, {"data/test/good_test.csv": LETTERED, name: LETTERED})
    with pytest.raises(DataError, match="a member with the path"):
        data._read_mmlu(path)


def test_what_is_no_archive_is_an_error_in_words(tmp_path: Path) -> None:
    path = tmp_path / "data.tar"
    path.write_bytes(os.urandom(2000))
    with pytest.raises(DataError, match="cannot be read as an archive"):
        data._read_mmlu(path)
