from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.data.messages import row_messages
from megarl.data.parquet import read_rows
from megarl.errors import DataError


def write(path: Path, rows: list[dict[str, object]], row_group_size: int = 1024) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


def read(*files: str) -> list[object]:
    return [row.values["prompt"] for row in read_rows(files, {"prompt": "data.prompt_key = 'prompt'"})]


def test_rows_of_several_files_and_row_groups_come_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", [{"prompt": str(i)} for i in range(5)], row_group_size=2)
    second = write(tmp_path / "b.parquet", [{"prompt": "last"}])
    rows = list(read_rows([first, second], {"prompt": ""}))
    assert [row.values["prompt"] for row in rows] == ["0", "1", "2", "3", "4", "last"]
    assert [(row.row_group, row.index) for row in rows] == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (0, 0)]
    assert [row.uid for row in rows][-2:] == ["0:4", "1:0"]
    assert [row.origin for row in rows][-2:] == [f"{first}:4", f"{second}:0"]


def test_a_row_is_the_same_however_its_path_is_typed_and_another_where_its_file_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.parquet", [{"prompt": "x"}, {"prompt": "y"}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    typed = [[row.uid for row in read_rows([path], {})] for path in (file, "a.parquet", "./a.parquet", "~/a.parquet")]
    assert typed == [["0:0", "0:1"]] * 4
    assert [row.uid for row in read_rows([file, file], {})] == ["0:0", "0:1", "1:0", "1:1"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", [{"prompt": "x"}])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a.parquet") == ["x"]


def test_an_absent_optional_column_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"prompt": "x"}])
    rows = list(read_rows([file], {"prompt": ""}, optional=("extra_info",)))
    assert rows[0].values == {"prompt": "x", "extra_info": None}


def test_no_files_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no data files"):
        read()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.parquet does not exist"):
        read(str(tmp_path / "none.parquet"))


def test_a_folder_is_not_taken_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read(str(tmp_path))


@pytest.mark.parametrize("kept_bytes", [0, 3, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept_bytes: int) -> None:
    file = write(tmp_path / "a.parquet", [{"prompt": "x" * 100}])
    Path(file).write_bytes(Path(file).read_bytes()[:kept_bytes])
    with pytest.raises(DataError, match=r"a\.parquet can't be read: it is truncated or not parquet"):
        read(file)


def test_a_damaged_page_under_an_intact_footer_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": [f"prompt number {i}" for i in range(1000)]})
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet can't be read"):
        read(str(path))


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n' * 10)
    with pytest.raises(DataError, match="truncated or not parquet"):
        read(str(path))


def test_a_missing_column_lists_those_there_and_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"promt": "x", "answer": "y"}])
    with pytest.raises(DataError) as caught:
        read(file)
    for part in ("a.parquet", "'prompt'", "data.prompt_key", "promt, answer", "did you mean 'promt'?"):
        assert part in str(caught.value)


def messages_of(tmp_path: Path, value: object) -> list[dict[str, str]]:
    file = write(tmp_path / "a.parquet", [{"prompt": value}])
    return row_messages(next(read_rows([file], {"prompt": ""})), "prompt")


def test_a_string_is_one_user_message(tmp_path: Path) -> None:
    assert messages_of(tmp_path, "hello") == [{"role": "user", "content": "hello"}]


def test_messages_lose_the_fields_that_only_others_have(tmp_path: Path) -> None:
    value = [{"role": "system", "content": "s", "name": None}, {"role": "user", "content": "u", "name": "n"}]
    assert messages_of(tmp_path, value) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "name": "n"},
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "prompt is null"),
        ("", "content of message 0 of prompt is empty"),
        (" \n", "content of message 0 of prompt is empty"),
        ([], "prompt is an empty list"),
        (7, "prompt is of type int; allowed: a string, or a list"),
        (["hello"], "message 0 of prompt is 'hello'"),
        ([{"role": "user"}], "allowed: a struct with role and content"),
        ([{"role": "user", "content": None}], "content of message 0 of prompt is null"),
        ([{"role": "", "content": "x"}], "role of message 0 of prompt is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content of message 0 of prompt is of type list"),
    ],
)
def test_a_prompt_that_is_none_says_why(tmp_path: Path, value: object, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        messages_of(tmp_path, value)
    assert reason in str(caught.value)


def test_a_null_prompt_is_found_by_row_group_and_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"prompt": "x"}] * 3 + [{"prompt": None}], row_group_size=2)
    rows = list(read_rows([file], {"prompt": ""}))
    with pytest.raises(DataError, match=r"a\.parquet, row group 1, row 3: prompt is null"):
        row_messages(rows[3], "prompt")
