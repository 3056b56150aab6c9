from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slimtron_common.data import check_source, open_source, sources
from slimtron_common.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    SlimtronError,
)

LINES = b'{"text": "one"}\n{"text": "zwei \xc3\xa4"}\n'


def texts(spec: object, **options: Any) -> list[str]:
    return ["".join(pieces) for pieces in open_source(str(spec), **options)]


def refusal(kind: type[SlimtronError], spec: object, **options: Any) -> SlimtronError:
    """The error of reading the whole source, which the user's command would end with."""
    with pytest.raises(kind) as caught:
        texts(spec, **options)
    assert caught.value.exit_code == 2
    return caught.value


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_pydoc_topics_in_order_of_their_names() -> None:
    from pydoc_data.topics import topics

    assert texts("pydoc") == [topics[name] for name in sorted(topics)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name, LINES)) == ["one", "zwei ä"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_compressed_json_lines(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name, gzip.compress(LINES))) == ["one", "zwei ä"]


def test_byte_order_mark_and_blank_lines_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"))
    assert texts(path) == ["one", "zwei ä"]


@pytest.mark.parametrize("compress", [False, True])
def test_text_file_is_one_document(tmp_path: Path, compress: bool) -> None:
    content = "\ufeffEin Absatz.\r\n\r\nNoch einer: ä.\r\n".encode()
    path = tmp_path / ("a.txt.gz" if compress else "a.txt")
    write(path, gzip.compress(content) if compress else content)
    assert texts(path) == ["Ein Absatz.\n\nNoch einer: ä.\n"]


def test_text_file_is_read_as_a_stream(tmp_path: Path) -> None:
    text = "some words of text, " * 50_000
    path = write(tmp_path / "a.txt", text.encode() + b"\xff")
    (document,) = open_source(str(path))
    assert text.startswith(next(document))
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        list(document)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 40,
        "no-place-to-cut/" * 20,
        "語" * 100,
        "x" * 100 + " then some words with 12 numbers 34, 56 and\n\n  lines" * 5,
        "",
        " ",
        "a b",
    ],
)
def test_pieces_join_to_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(sources, "PIECE_LENGTH", 16)
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}).encode())
    (document,) = open_source(str(path))
    pieces = list(document)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 32 for piece in pieces)
    assert len(pieces) >= len(text) // 32


def test_pieces_end_before_a_space_between_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_LENGTH", 2000)
    num_cuts = 0
    for document in open_source("pydoc"):
        for piece, following in pairwise(document):
            assert piece[-1].isalpha()
            assert following[0] == " "
            assert following[1].isalpha()
            num_cuts += 1
    assert num_cuts > 100


def test_a_short_document_is_one_piece(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES)
    assert [list(document) for document in open_source(str(path))] == [["one"], ["zwei ä"]]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = [f"text {index}" for index in range(1000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": values, "n": list(range(1000))}), path, row_group_size=300)
    assert texts(path, text_field="body") == values
    error = refusal(ConfigError, path)
    assert error.found == "body, n"
    assert error.where == f"{path}, row 1"


def test_parquet_null(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None]}), path)
    error = refusal(CheckpointError, path)
    assert (error.where, error.found) == (f"{path}, row 2", "NoneType")


@pytest.mark.parametrize("content", [b"not parquet at all", b"PAR1 and nothing PAR1"])
def test_damaged_parquet(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("pyarrow")
    assert refusal(CheckpointError, write(tmp_path / "a.parquet", content)).where is not None


def test_parquet_cut_short(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 100}), path)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    refusal(CheckpointError, write(path, bytes(content)))
    refusal(CheckpointError, write(path, path.read_bytes()[:-20]))


def test_dataset_with_config_and_split(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl", LINES[: LINES.index(b"\n") + 1])
    assert texts(f"hf:{tmp_path}") == ["one", "zwei ä"]
    assert texts(f"hf:{tmp_path}:test") == ["one"]
    assert texts(f"hf:{tmp_path},default:test") == ["one"]
    assert refusal(ConfigError, f"hf:{tmp_path}", text_field="body").found == "text"
    for wrong in (f"hf:{tmp_path}:nowhere", f"hf:{tmp_path},other", f"hf:{tmp_path / 'none'}"):
        assert refusal(CheckpointError, wrong).where == wrong


def test_check_does_not_ask_for_a_dataset() -> None:
    pytest.importorskip("datasets")
    check_source("hf:some/name,config:split")


@pytest.mark.parametrize("spec", ["hf:", "hf::train", "hf:,config", "hf:name,", "hf:name:"])
def test_dataset_without_a_name(spec: str) -> None:
    with pytest.raises(ConfigError, match="names no dataset"):
        check_source(spec)


@pytest.mark.parametrize("spec", ["hf:name", "a.parquet"])
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", b"PAR1")
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'slimtron-common\[data\]'"):
        check_source(spec)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"text": "one"}\nnot json\n', 2),
        (b'\n\n{"text": "cut', 3),
        (b'{"text": "one"}\n' + b"[" * 100_000 + b"\n", 2),
    ],
)
def test_line_that_is_not_json(tmp_path: Path, content: bytes, line: int) -> None:
    path = write(tmp_path / "a.jsonl", content)
    error = refusal(CheckpointError, path)
    assert error.where == f"{path}, line {line}"
    assert error.message == "is not JSON"


def test_line_that_is_no_object(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'[{"text": "one"}]')
    error = refusal(CheckpointError, path)
    assert (error.where, error.found) == (f"{path}, line 1", "list")


def test_missing_field_lists_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES + b'{"body": "x", "id": 3}\n')
    error = refusal(ConfigError, path)
    assert (error.where, error.found) == (f"{path}, line 3", "body, id")
    assert refusal(ConfigError, write(path, b"{}\n")).found == "no fields"


@pytest.mark.parametrize(("value", "kind"), [("3", "int"), ("null", "NoneType"), ("[]", "list")])
def test_field_that_is_not_text(tmp_path: Path, value: str, kind: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": {value}}}\n'.encode())
    assert refusal(CheckpointError, path).found == kind


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES + b'{"text": "a \\ud83d"}\n')
    error = refusal(CheckpointError, path)
    assert (error.where, error.found) == (f"{path}, line 3", r"'\ud83d'")


def test_undecodable_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES + '{"text": "ä"}'.encode("latin1"))
    error = refusal(CheckpointError, path)
    assert error.where == f"{path}, line 3"
    assert str(error.found).startswith("byte 0xe4")
    error = refusal(CheckpointError, write(tmp_path / "a.txt", "ä ".encode("latin1")))
    assert error.where == tmp_path / "a.txt"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
@pytest.mark.parametrize("damage", ["plain", "cut", "flipped"])
def test_damaged_gzip(tmp_path: Path, name: str, damage: str) -> None:
    packed = gzip.compress(LINES * 1000)
    damaged = {
        "plain": LINES,
        "cut": packed[:-12],
        "flipped": packed[:30] + bytes(byte ^ 255 for byte in packed[30:60]) + packed[60:],
    }
    path = write(tmp_path / name, damaged[damage])
    assert refusal(CheckpointError, path).where is not None


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        check_source(str(write(tmp_path / name, b"")))


def test_no_documents(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no documents"):
        check_source(str(write(tmp_path / "a.jsonl", b"\n \n")))


def test_directory(tmp_path: Path) -> None:
    folder = tmp_path / "data.jsonl"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="is a directory"):
        check_source(str(folder))


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.parquet.gz"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.jsonl"):
        check_source(str(write(tmp_path / name, LINES)))


def test_what_looks_like_a_dataset_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="hf:org/name"):
        check_source("org/name")


@pytest.mark.parametrize("spec", ["no/such/file.jsonl", "nul\0.txt", "x" * 300 + ".txt"])
def test_file_that_cannot_be_opened(spec: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_source(spec)


def test_check_reads_the_first_document_only(tmp_path: Path) -> None:
    check_source("pydoc")
    check_source(str(write(tmp_path / "a.jsonl", LINES + b"not json\n")))
    for name, content in (("b.jsonl", b"not json\n"), ("b.txt", b"\xff"), ("b.txt.gz", b"x")):
        with pytest.raises(CheckpointError):
            check_source(str(write(tmp_path / name, content)))
    with pytest.raises(ConfigError):
        check_source(str(tmp_path / "a.jsonl"), text_field="body")


def test_shuffle_keeps_every_document() -> None:
    plain = texts("pydoc")
    shuffled = texts("pydoc", shuffle_seed=3)
    assert shuffled != plain
    assert Counter(shuffled) == Counter(plain)
    assert shuffled == texts("pydoc", shuffle_seed=3)
    assert shuffled != texts("pydoc", shuffle_seed=4)


def test_shuffle_reads_no_further_than_its_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SHUFFLE_BUFFER", 400)
    lines = [json.dumps({"text": f"{index:04d}"}) for index in range(1000)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    shuffled = [int(text) for text in texts(path, shuffle_seed=1)]
    assert sorted(shuffled) == list(range(1000))
    assert all(number <= position + 100 for position, number in enumerate(shuffled))
    assert sum(a > b for a, b in pairwise(shuffled)) > 300
