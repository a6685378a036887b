"""Headers of GGUF files: real ones, made ones, broken and hostile ones."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import gguf_header
from bench.gguf_header import BadHeader
from tests import real_parts
from tests.daemon import ROOT

EXTRA = "blk.1.nextn.eh_proj.weight"


def written(
    file: Path,
    layers: int | None = None,
    tensors: tuple[str, ...] = ("token_embd.weight",),
    parts: int | None = None,
) -> Path:
    """A file with a vocabulary, a long template and numbers of all kinds, by the gguf package."""
    writer = gguf.GGUFWriter(file, "qwen35")
    writer.add_name("made")
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_chat_template("x" * 5000)
    writer.add_token_list([f"token {number}" for number in range(300)])
    writer.add_token_scores([0.5] * 300)
    writer.add_add_bos_token(True)
    writer.add_int64("made.long", -(2**40))
    writer.add_float64("made.double", 0.25)
    if layers is not None:
        writer.add_uint32("qwen35.nextn_predict_layers", layers)
    if parts is not None:
        writer.add_uint16("split.count", parts)
    for name in tensors:
        writer.add_tensor(name, np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# --- what is read


def test_fields_are_read_and_lists_and_long_texts_passed_over(tmp_path: Path) -> None:
    header = gguf_header.read(written(tmp_path / "a.gguf", tensors=("a", "b.c")))

    assert header.version == 3
    assert header.architecture == "qwen35"
    assert header.fields["general.name"] == "made"
    assert header.fields["qwen35.block_count"] == 2
    assert header.fields["made.long"] == -(2**40)
    assert header.fields["made.double"] == 0.25
    assert header.fields["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.chat_template" not in header.fields
    assert "tokenizer.ggml.tokens" not in header.fields
    assert header.tensors == ("a", "b.c")


@pytest.mark.parametrize(
    ("layers", "tensors", "parts", "found"),
    [
        (None, ("token_embd.weight",), None, 0),
        (0, ("token_embd.weight", EXTRA), None, 0),
        (1, ("token_embd.weight", EXTRA), None, 1),
        (2, ("token_embd.weight", EXTRA), None, 2),
        (1, ("token_embd.weight",), None, 0),  # the tensors were stripped
        (1, ("token_embd.weight",), 3, 1),  # they may be in another part
        (1, ("token_embd.weight",), 1, 0),
    ],
)
def test_an_mtp_head_is_found(
    tmp_path: Path, layers: int | None, tensors: tuple[str, ...], parts: int | None, found: int
) -> None:
    file = written(tmp_path / "a.gguf", layers, tensors, parts)

    assert gguf_header.read(file).mtp_layers == found


@pytest.mark.integration
@pytest.mark.parametrize(
    ("model", "architecture", "tensors"),
    [(real_parts.smollm2, "llama", 272), (real_parts.gemma, "gemma3", 236)],
)
def test_real_models_have_no_head(
    model: Callable[[], Path], architecture: str, tensors: int
) -> None:
    header = gguf_header.read(model())

    assert (header.architecture, header.mtp_layers) == (architecture, 0)
    assert len(header.tensors) == tensors


@pytest.mark.integration
def test_a_head_that_llama_server_runs_is_seen() -> None:
    headers = [gguf_header.read(real_parts.tiny_mtp(part)) for part in ("whole", "head", "trunk")]

    assert {header.architecture for header in headers} == {"qwen35"}
    assert [header.mtp_layers for header in headers] == [1, 1, 0]


# --- what is refused


def with_counts(tensors: int, fields: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def field(kind: int, value: bytes, name: bytes = b"k") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def test_it_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.gguf").read_bytes()
    end = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16 + 12
    file = tmp_path / "cut.gguf"

    for size in [*range(400), *range(400, end, 97), end - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(BadHeader):
            gguf_header.read(file)
    file.write_bytes(whole[:end])
    assert gguf_header.read(file).architecture == "qwen35"


HUGE = 2**63
HOSTILE = {
    "another file": b"PK\x03\x04" + bytes(100),
    "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 1": with_counts(0, 0, version=1),
    "tensors without end": with_counts(HUGE, 0),
    "fields without end": with_counts(0, HUGE),
    "many fields": with_counts(0, gguf_header.MOST_FIELDS),
    "a long name of a field": with_counts(0, 1, struct.pack("<Q", HUGE)),
    "a name that is longer than the file": with_counts(0, 1, struct.pack("<Q", 60_000) + b"k"),
    "a long text": with_counts(0, 1, field(8, struct.pack("<Q", HUGE))),
    "a text that is longer than the file": with_counts(0, 1, field(8, struct.pack("<Q", 5000))),
    "a list without end": with_counts(0, 1, field(9, struct.pack("<IQ", 4, HUGE))),
    "texts without end": with_counts(0, 1, field(9, struct.pack("<IQ", 8, HUGE))),
    "a list of lists": with_counts(0, 1, field(9, struct.pack("<IQ", 9, 1))),
    "an unknown type": with_counts(0, 1, field(13, bytes(8))),
    "a long name of a tensor": with_counts(1, 0, struct.pack("<Q", 65) + bytes(100)),
    "a tensor of many dimensions": with_counts(1, 0, struct.pack("<QI", 0, 2**32 - 1)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_at_once_and_without_memory(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(data)

    tracemalloc.start()
    try:
        with pytest.raises(BadHeader):
            gguf_header.read(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_a_terabyte_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    """Its list of texts is as long as it says, and all of them are empty."""
    file = tmp_path / "a.gguf"
    endless = with_counts(0, 1, field(9, struct.pack("<IQ", 8, 2**36)))
    long = with_counts(0, 2, field(8, struct.pack("<Q", 2**35)))
    for data in (endless, long):
        with file.open("wb") as opened:
            opened.write(data)
            opened.truncate(2**40)
        began = time.process_time()
        tracemalloc.start()
        try:
            if data is endless:
                with pytest.raises(BadHeader, match="too long"):
                    gguf_header.read(file)
            else:  # the second field is made of zeros: an empty name and a number
                assert gguf_header.read(file).fields == {"": 0}
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
        assert time.process_time() - began < 5


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_damage_raises_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    source = tmp_path / "whole.gguf"
    if not source.exists():
        written(source, 1, ("token_embd.weight", EXTRA))
    damaged = bytearray(source.read_bytes())
    end = damaged.index(EXTRA.encode()) + 60
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end))
        new = data.draw(st.binary(min_size=1, max_size=9))
        damaged[at : at + len(new)] = new
    file = tmp_path / "damaged.gguf"
    file.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])

    with contextlib.suppress(BadHeader):
        assert gguf_header.read(file).mtp_layers >= 0


# --- the command


def run(file: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "bench.gguf_header", str(file)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_tells_it_as_json(tmp_path: Path) -> None:
    done = run(written(tmp_path / "a.gguf", 1, ("x", EXTRA)))

    said = json.loads(done.stdout)
    assert (said["architecture"], said["mtp_layers"], said["tensors"]) == ("qwen35", 1, 2)


@pytest.mark.parametrize("exists", [True, False])
def test_the_command_refuses_in_words(tmp_path: Path, exists: bool) -> None:
    file = tmp_path / "a.gguf"
    if exists:
        file.write_bytes(b"no")

    done = run(file)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{file}: ")
    assert done.stderr.count("\n") == 1
