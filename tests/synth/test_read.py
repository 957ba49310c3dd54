"""Reading documents: every format gives the same, and what cannot be read is named or counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from saltire.errors import SaltireError
from saltire.synth.read import Problems, describe_source, find_sources, read_documents

LINES = b"".join(b'{"text": "%d"}\n' % (i * 7919**2) for i in range(20_000))


def read(path: Path, strict: bool = False) -> tuple[list[tuple[int, str]], Problems]:
    problems = Problems(strict)
    return list(read_documents(str(path), "text", problems)), problems


def test_lines_that_cannot_be_read_are_counted_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "one"}', b"{broken", b'{"other": 1}', b'{"text": "\xff"}', b'{"text": " "}']
    path.write_bytes(b"\n".join([*lines, b'{"text": 5}', b'{"text": "two"}']))
    rows, problems = read(path)
    assert rows == [(1, "one"), (7, "two")]
    assert problems.counts == {
        "broken JSON": 1,
        "no field 'text'": 1,
        "broken UTF-8": 1,
        "empty text": 1,
        "text is no string": 1,
    }
    assert problems.places["no field 'text'"] == [f"{path}, line 3 (has: other)"]
    with pytest.raises(SaltireError, match="line 2: broken JSON"):
        read(path, strict=True)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b'{"text": "one"}\n'), ("a.txt", b"one")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        rows, problems = read(tmp_path / name)
        assert rows == [(1, "one")]
        assert not problems.counts


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["first", "zweite ß", "third\nwith lines"]
    data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(data))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    sources = find_sources([str(tmp_path)])
    assert len(sources) == 4
    for source in [*sources, *find_sources([str(tmp_path / "saved")])]:
        assert [text for _, text in read(Path(source))[0]] == texts


@pytest.mark.parametrize("name", ["missing.jsonl", "/nowhere/at/all", "file.exe"])
def test_inputs_that_are_not_there_or_unknown_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.exe").write_text("x")
    path = tmp_path / name if name == "file.exe" else Path(name)
    with pytest.raises(SaltireError, match=path.name):
        find_sources([str(path)])


def test_text_files_below_a_folder_are_a_document_each(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.md").write_text("zwei ß")
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    sources = find_sources([str(tmp_path)])
    assert [row for s in sources for row in read(Path(s))[0]] == [(1, "one\ntwo"), (1, "zwei ß")]
    (tmp_path / "a.txt").write_bytes(b"one\xff")
    assert read(tmp_path / "a.txt")[1].places == {
        "broken UTF-8": [f"{tmp_path / 'a.txt'} (byte 3)"]
    }


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten", "another format"])
def test_a_damaged_compressed_file_is_refused_with_the_line(
    tmp_path: Path, name: str, damage: str
) -> None:
    checked = zstandard.ZstdCompressor(write_checksum=True)
    data = gzip.compress(LINES) if name.endswith("gz") else checked.compress(LINES)
    data = {
        "cut off": data[: len(data) // 2],
        "overwritten": data[:1000] + b"overwritten" * 20 + data[1220:],
        "another format": LINES,
    }[damage]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SaltireError, match=f"cannot read .*{name} after line [0-9]+: ") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def test_zstd_frames_behind_one_another_are_one_file(tmp_path: Path) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    frames = zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert len(read(tmp_path / "a.jsonl.zst")[0]) == 20_000


@pytest.mark.parametrize("damage", ["cut off", "empty", "pages overwritten"])
def test_a_damaged_parquet_file_is_refused_with_the_row(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"row {i * 7919} " * 20 for i in range(2000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)
    data = path.read_bytes()
    middle = len(data) // 2
    data = {
        "cut off": data[:middle],
        "empty": b"",
        "pages overwritten": data[:middle] + b"\xff" * 2000 + data[middle + 2000 :],
    }[damage]
    path.write_bytes(data)
    with pytest.raises(
        SaltireError, match=r"cannot read .*a\.parquet after row [0-9]+: "
    ) as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "n": [1]}, "has no column 'text'; it has body, n"),
        ({"text": [1, 2]}, "column 'text' holds int64; expected strings"),
        ({"text": [b"x"]}, "column 'text' holds binary; expected strings"),
        ({"text": [["x"]]}, r"column 'text' holds list<.*>; expected strings"),
    ],
)
def test_a_parquet_file_without_a_column_of_texts_is_refused_by_the_column(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(SaltireError, match=rf"a\.parquet:? {message}.*--text-key"):
        read(tmp_path / "a.parquet")


def test_parquet_rows_that_cannot_be_read_are_counted_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    data = pyarrow.array([b"one", None, b"\xff", b"", b"two"])
    text = pyarrow.StringArray.from_buffers(5, *data.buffers()[1:], data.buffers()[0])
    parquet.write_table(pyarrow.table({"text": text}), path)
    rows, problems = read(path)
    assert rows == [(1, "one"), (5, "two")]
    assert problems.places == {
        "text is no string": [f"{path}, row 2 (null)"],
        "broken UTF-8": [f"{path}, row 3 (byte 0)"],
        "empty text": [f"{path}, row 4"],
    }
    with pytest.raises(SaltireError, match="row 2: text is no string"):
        read(path, strict=True)
    behind = Problems()
    assert list(read_documents(str(path), "text", behind, skip=3)) == [(5, "two")]
    assert behind.counts == {"empty text": 1}


def test_texts_in_a_dictionary_or_a_column_of_nulls_are_read_as_what_they_are(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.parquet"
    text = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": text}), path)
    assert [text for _, text in read(path)[0]] == ["x", "y", "x"]
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2)}), path)
    assert read(path)[1].counts == {"text is no string": 2}


def test_a_saved_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", None, "b"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(SaltireError, match=r"2 splits.*two/test, .*two/train"):
        find_sources([str(tmp_path / "two")])
    chosen = find_sources([str(tmp_path / "two/train")])
    got, problems = read(Path(chosen[0]))
    assert got == [(1, "a"), (3, "b")]
    assert problems.counts == {"text is no string": 1}
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "one"))
    assert find_sources([str(tmp_path / "one")]) == [str(tmp_path / "one/train")]


def test_a_saved_dataset_without_the_column_or_cut_off_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(str(folder))
    with pytest.raises(SaltireError, match="row 1: no column 'text'; it has body"):
        read(folder)
    before = describe_source(str(folder))
    data = next(folder.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:-64])
    assert describe_source(str(folder)) != before
    with pytest.raises(SaltireError, match="saved"):
        read(folder)
