"""Reading users' data: what goes in comes out, and whatever is wrong is said once, all together, with its place."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcanary.clients.data import Columns, Table, read
from fedcanary.clients.sources import LISTED
from fedcanary.errors import BadInput
from fedcanary.types import Item

TEXT = Columns(text="text")
CLASSES = Columns(text="text", label="label", client="user", group="group", domain="domain")
ROWS = [
    {"text": 'He said "no",\nthen left', "label": "bad", "user": "u2", "group": "a", "domain": "x"},
    {"text": "naïve café 🐤 日本", "label": "good", "user": "u1", "group": None, "domain": "y"},
    {"text": " spaces , kept ", "label": "good", "user": "u2", "group": "b", "domain": "x"},
]
# Any text there is: quotes, line breaks of every kind, right to left, control characters. Half a surrogate is not text.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda text: text.strip())
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
            out.writeheader()
            out.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def problems(source: object, columns: Columns, cache: Path, **more: object) -> list[tuple[str, str, str]]:
    with pytest.raises(BadInput) as caught:
        read(source, columns, cache, **more)
    assert not cache.exists() or not list(cache.iterdir()), "something half-written was left in the cache"
    return [(problem.where, problem.what, problem.remedy) for problem in caught.value.problems]


def one(source: object, columns: Columns, cache: Path, **more: object) -> tuple[str, str, str]:
    (found,) = problems(source, columns, cache, **more)
    return found


# --- what goes in comes out


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rows_become_items(tmp_path: Path, ending: str) -> None:
    table = read(write(tmp_path / f"data.{ending}", ROWS), CLASSES, tmp_path / "cache")
    assert table.rows == 3
    assert (table.labels, table.clients) == (("bad", "good"), ("u1", "u2"))
    assert (table.groups, table.domains) == (("a", "b"), ("x", "y"))
    assert table.label.tolist() == [0, 1, 1]
    assert table.client.tolist() == [1, 0, 1]
    assert table.group.tolist() == [0, -1, 1]
    assert table.length.tolist() == [len(str(row["text"])) for row in ROWS]
    assert table.item(1) == Item(prompt=str(ROWS[1]["text"]), choices=("bad", "good"), answer=1, group=None, domain="y")
    assert [item.prompt for item in table.items([2, 0])] == [ROWS[2]["text"], ROWS[0]["text"]]
    assert table.item(-1) == table.item(2)
    with pytest.raises(IndexError):
        table.item(3)


def test_the_digest_is_of_the_rows_not_of_the_files(tmp_path: Path) -> None:
    read_all = {
        ending: read(write(tmp_path / f"data.{ending}", ROWS), CLASSES, tmp_path / "cache").digest
        for ending in ("csv", "jsonl", "parquet")
    }
    halves = [write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.csv", ROWS[1:])]
    digest = read(halves, CLASSES, tmp_path / "cache").digest
    assert set(read_all.values()) == {digest}
    named = read(halves, CLASSES, tmp_path / "cache", labels=("bad", "good")).digest
    turned = read(halves, CLASSES, tmp_path / "cache", labels=("good", "bad")).digest
    assert named == digest != turned
    for change in ({"text": "other"}, {"label": "worse"}, {"user": "u3"}, {"group": None}, {"domain": "y"}):
        changed = write(tmp_path / "changed.jsonl", [ROWS[0] | change, *ROWS[1:]])
        assert read(changed, CLASSES, tmp_path / "cache").digest != digest
    no_client = Columns(text="text", label="label", group="group", domain="domain")
    assert read(halves, no_client, tmp_path / "cache").digest != digest


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
@quick
def test_text_survives_every_format(tmp_path: Path, ending: str, pairs: list[tuple[str, str]]) -> None:
    path = write(tmp_path / f"pairs.{ending}", [{"q": q, "a": a} for q, a in pairs])
    table = read(path, Columns(prompt="q", response="a"), tmp_path / "cache")
    assert table.items(range(table.rows)) == tuple(Item(prompt=q, choices=(a,), answer=0) for q, a in pairs)


def test_free_text(tmp_path: Path) -> None:
    table = read(write(tmp_path / "t.jsonl", ROWS), TEXT, tmp_path / "cache")
    assert table.item(0) == Item(prompt="", choices=(str(ROWS[0]["text"]),), answer=0)
    assert table.labels == table.clients == () and set(table.client.tolist()) == {-1}


def test_many_batches_and_files_keep_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "2.csv", [{"text": f"row {i}"} for i in range(9000, 18000)])
    write(folder / "1.jsonl", [{"text": f"row {i}"} for i in range(9000)])
    (folder / "README").write_text("not data")
    table = read(folder, TEXT, tmp_path / "cache")
    rows = [0, 8191, 8192, 8999, 9000, 17191, 17192, 17999]
    assert [item.choices[0] for item in table.items(rows)] == [f"row {row}" for row in rows]


def test_labels_may_be_names_or_numbers(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "no"}, {"text": "c", "label": 0.0}]
    table = read(write(tmp_path / "l.jsonl", rows), Columns(text="text", label="label"), tmp_path, labels=["no", "yes"])
    assert table.labels == ("no", "yes") and table.label.tolist() == [1, 0, 0]
    numbers = [{"text": "a", "label": label} for label in (10, 9, 2, 10)]
    table = read(write(tmp_path / "n.parquet", numbers), Columns(text="text", label="label"), tmp_path)
    assert table.labels == ("2", "9", "10") and table.label.tolist() == [2, 1, 0, 2]


def test_one_column_may_play_two_code_roles(tmp_path: Path) -> None:
    columns = Columns(text="text", client="user", group="user")
    for ending in ("csv", "parquet"):
        table = read(write(tmp_path / f"d.{ending}", ROWS), columns, tmp_path / "cache")
        assert table.client.tolist() == table.group.tolist() == [1, 0, 1]


def test_byte_order_mark_blank_lines_and_dictionary_columns(tmp_path: Path) -> None:
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbftext,user\r\nhello,a\r\n\r\nworld,b\r\n")
    table = read(tmp_path / "bom.csv", Columns(text="text", client="user"), tmp_path / "cache")
    assert table.rows == 2 and table.clients == ("a", "b")
    columns = {"text": pa.array(["x", "y"], pa.string_view()), "user": pa.array([7, 7]).dictionary_encode()}
    pq.write_table(pa.table(columns | {"text": pa.array(["x", "y"]).dictionary_encode()}), tmp_path / "d.parquet")
    table = read(tmp_path / "d.parquet", Columns(text="text", client="user"), tmp_path / "cache")
    assert table.clients == ("7",) and table.item(1).choices == ("y",)


def test_the_cache_is_reused_and_follows_the_bytes(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "t.jsonl", ROWS), tmp_path / "cache"
    first = read(path, CLASSES, cache)
    stamp = (first.path / "rows.arrow").stat().st_mtime_ns
    assert read(path, CLASSES, cache).path == first.path
    assert (first.path / "rows.arrow").stat().st_mtime_ns == stamp
    assert Table.open(first.path).item(0) == first.item(0)
    old = path.stat()
    path.write_text(path.read_text("utf-8").replace("spaces", "SPACES"), "utf-8")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    second = read(path, CLASSES, cache)
    assert second.path != first.path and "SPACES" in second.item(2).prompt
    assert "spaces" in first.item(2).prompt


def test_two_readers_at_once_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": f"row {i}"} for i in range(20_000)])
    digests: list[str] = []
    threads = [
        threading.Thread(target=lambda: digests.append(read(path, TEXT, tmp_path / "cache").digest)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 2 and len(set(digests)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


# --- saved datasets

SAVE = """
    import sys
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"]), "who": Value("int64")})
    rows = {"text": ["a", "b\\n", "c", "\U0001f424"], "label": [1, 0, 0, 1], "who": [3, 3, 12, 3]}
    whole = Dataset.from_dict(rows, features=features)
    whole.save_to_disk(sys.argv[1] + "/whole", num_shards=2)
    DatasetDict(train=whole, test=whole.select([2, 0])).save_to_disk(sys.argv[1] + "/split")
    whole.to_parquet(sys.argv[1] + "/whole.parquet")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as the real library writes them; in a process of its own, for its warnings are its own business."""
    pytest.importorskip("datasets", reason="needs the test extra")
    home = tmp_path_factory.mktemp("saved")
    environment = {**os.environ, "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SAVE), str(home)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return home


WHO = Columns(text="text", label="label", client="who")


def test_a_saved_dataset(saved: Path, tmp_path: Path) -> None:
    table = read(saved / "whole", WHO, tmp_path)
    assert table.labels == ("pos", "neg") and table.label.tolist() == [1, 0, 0, 1]  # declared order, not sorted
    assert table.clients == ("12", "3") and table.client.tolist() == [1, 1, 0, 1]
    assert [item.prompt for item in table.items(range(4))] == ["a", "b\n", "c", "🐤"]
    assert read(saved / "whole.parquet", WHO, tmp_path).digest == table.digest
    train, test = (read(saved / "split", WHO, tmp_path, split=split) for split in ("train", "test"))
    assert train.digest == table.digest
    assert [item.prompt for item in test.items(range(2))] == ["c", "a"] and test.label.tolist() == [0, 1]


def test_declared_classes_can_be_reordered_or_renamed(saved: Path, tmp_path: Path) -> None:
    assert read(saved / "whole", WHO, tmp_path, labels=("neg", "pos")).label.tolist() == [0, 1, 1, 0]
    renamed = read(saved / "whole", WHO, tmp_path, labels=("great", "terrible"))
    assert renamed.labels[renamed.label[0]] == "terrible"


def test_splits_are_named_not_guessed(saved: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "name a split: train, test" in one(saved / "split", WHO, cache)[2]
    assert one(saved / "split", WHO, cache, split="tset")[2] == "did you mean 'test'?"
    assert "single dataset" in one(saved / "whole", WHO, cache, split="train")[1]
    assert "only saved datasets" in one(saved / "whole.parquet", WHO, cache, split="train")[1]


def test_a_damaged_saved_dataset(saved: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for entry in (saved / "whole").iterdir():
            (folder / entry.name).write_bytes(entry.read_bytes())
        return folder

    shard = sorted((saved / "whole").glob("*.arrow"))[1].name
    torn = copy("torn")
    (torn / shard).write_bytes((torn / shard).read_bytes()[:300])
    assert one(torn, WHO, tmp_path / "cache")[0] == str(torn / shard)
    (lost := copy("lost")).joinpath(shard).unlink()
    assert f"{shard} is not there" in one(lost, WHO, tmp_path / "cache")[1]
    (blank := copy("blank")).joinpath("dataset_info.json").write_text("{}")
    assert "not a sound saved dataset" in one(blank, WHO, tmp_path / "cache")[1]
    (strange := copy("strange")).joinpath("state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    assert "not a sound saved dataset" in one(strange, WHO, tmp_path / "cache")[1]


# --- everything that can be wrong


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (Columns(), "no text"),
        (Columns(prompt="a"), "prompt"),
        (Columns(response="a", client="c"), "response"),
        (Columns(text="a", prompt="b", response="c"), "prompt and response and text"),
        (Columns(prompt="a", response="b", label="c"), "label and prompt and response"),
        (Columns(label="a"), "no kind of example has label"),
        (Columns(text="a", label="a"), "text and label are both column 'a'"),
    ],
)
def test_impossible_columns(tmp_path: Path, columns: Columns, said: str) -> None:
    write(tmp_path / "d.jsonl", ROWS)
    assert any(said in what for _, what, _ in problems(tmp_path / "d.jsonl", columns, tmp_path / "cache"))


def test_impossible_labels(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "d.jsonl", ROWS), tmp_path / "cache"
    assert "no label column" in one(path, TEXT, cache, labels=("a", "b"))[1]
    for labels in (("a",), ("a", "a"), ("a", "")):
        assert "are not classes" in one(path, CLASSES, cache, labels=labels)[1]


def test_files_that_are_not_there_or_of_no_use(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS)
    (tmp_path / "d.xlsx").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    found = problems([tmp_path / "d.json", tmp_path / "d.xlsx", tmp_path / "nothing", path], TEXT, tmp_path / "cache")
    assert [what for _, what, _ in found] == [
        "no such file or folder",
        "cannot read files ending in '.xlsx'",
        "holds no .csv, .jsonl, .parquet file and is no saved dataset (subfolders are not searched)",
    ]
    assert found[0][2] == "did you mean 'd.jsonl'?"
    assert one([], TEXT, tmp_path / "cache")[1] == "no file is named"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_missing_columns(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"d.{ending}", ROWS)
    found = problems(path, Columns(text="txt", client="usr"), tmp_path / "cache")
    assert found == [
        (str(path), "has no column 'txt'", "did you mean 'text'?"),
        (str(path), "has no column 'usr'", "did you mean 'user'?"),
    ]


def test_broken_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [
        '{"text": "fine"}',
        '{"text": ',
        "[1]",
        "",
        '{"text": 3}',
        '{"text": "half \\ud83d"}',
        "7",
        "{}",
        "[" * 99999,
    ]
    path.write_text("\n".join(lines))
    found = {where.rpartition(":")[2]: what for where, what, _ in problems(path, TEXT, tmp_path / "cache")}
    assert list(found) == ["2", "9", "3", "7", "5", "6", "8"]  # by kind, in the order of the first of each
    assert found["2"] == "broken JSON at character 11: Expecting value"
    assert "a list where an object is expected" in found["3"]
    assert "a int, not text" in found["5"]
    assert "surrogate" in found["6"]
    assert "column 'text' is empty" in found["8"]


def test_codes_must_be_plain_values(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"text": "a", "user": ["x"]}, {"text": "b", "user": {}}])
    found = problems(path, Columns(text="text", client="user"), tmp_path / "cache")
    assert [what for _, what, _ in found] == [
        f"column 'user' holds a {kind}, not text or a number" for kind in ("list", "dict")
    ]


def test_not_utf8(tmp_path: Path) -> None:
    for name, data in {"d.csv": b"text\nfine\ncaf\xe9\n", "d.jsonl": b'{"text": "x"}\n{"text": "caf\xe9"}\n'}.items():
        (tmp_path / name).write_bytes(data)
        where, what, remedy = one(tmp_path / name, TEXT, tmp_path / "cache")
        assert where.endswith(":3" if name == "d.csv" else ":2")
        assert f"byte {data.index(0xE9)} of the file" in what and remedy == "save the file as UTF-8"
    raw = pa.array([b"ok", b"\xff\xfe", b"ok"]).view(pa.string())
    pq.write_table(pa.table({"text": raw, "user": ["a", "b", "c"]}), tmp_path / "t.parquet")
    assert one(tmp_path / "t.parquet", TEXT, tmp_path / "cache")[0].endswith("row 2")
    pq.write_table(pa.table({"text": ["a", "b", "c"], "user": raw}), tmp_path / "u.parquet")
    found = one(tmp_path / "u.parquet", Columns(text="text", client="user"), tmp_path / "cache")
    assert found[0].endswith("row 2") and "'user' is not UTF-8" in found[1]


def test_broken_csv(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text,user\n"two\nlines",a\nshort\none,two,three\n"a"b,c\nfine,d\n"never closed,e\n')
    found = {where.rpartition(":")[2]: what for where, what, _ in problems(path, TEXT, tmp_path / "cache")}
    assert list(found) == ["4", "5", "6", "8"]
    assert found["4"] == "1 fields where the header has 2"
    assert found["5"] == "3 fields where the header has 2"
    assert "not CSV" in found["6"] and "not CSV" in found["8"]
    path.write_text("text,text\na,b\n")
    assert one(path, TEXT, tmp_path / "cache")[1] == "has 2 columns named 'text'"


def test_a_long_field_is_text_and_the_limit_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "word " * 100_000
    table = read(write(tmp_path / "long.csv", [{"text": long}]), TEXT, tmp_path / "cache")
    assert table.item(0).choices[0] == long
    assert csv.field_size_limit() == before


def test_values_that_cannot_be_used(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": "good", "user": "u"},
        {"text": " \n", "label": "good", "user": "u"},
        {"text": "c", "label": "goood", "user": "u"},
        {"text": "d", "label": 2, "user": "u"},
        {"text": "e", "label": -1, "user": None},
        {"text": None, "label": None, "user": ""},
    ]
    columns = Columns(text="text", label="label", client="user")
    path = write(tmp_path / "d.jsonl", rows)
    found = problems(path, columns, tmp_path / "cache", labels=("good", "bad"))
    assert [(where.rpartition(":")[2], what) for where, what, _ in found] == [
        ("2", "column 'text' is empty"),
        ("6", "column 'text' is empty"),
        ("6", "column 'label' is empty: no label"),
        ("3", "label 'goood' is neither a class nor one of 0..1"),
        ("4", "label '2' is neither a class nor one of 0..1"),
        ("5", "label '-1' is neither a class nor one of 0..1"),
        ("5", "column 'user' is empty: no client"),
        ("6", "column 'user' is empty: no client"),
    ]
    assert found[3][2] == "did you mean 'good'?"
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "d.parquet")
    assert one(tmp_path / "d.parquet", TEXT, tmp_path / "cache")[0] == f"{tmp_path / 'd.parquet'} row 2"
    response = write(tmp_path / "r.jsonl", [{"q": "a", "a": ""}])
    assert one(response, Columns(prompt="q", response="a"), tmp_path / "cache")[1] == "column 'a' is empty"


def test_inferred_classes_must_be_few_and_more_than_one(tmp_path: Path) -> None:
    columns = Columns(text="text", label="label")
    for labels in (["same"] * 3, [f"essay {i}" for i in range(1001)]):
        path = write(tmp_path / "d.jsonl", [{"text": "a", "label": label} for label in labels])
        assert f"has {len(set(labels))} different labels" in one(path, columns, tmp_path / "cache")[1]


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b""), ("b.csv", b""), ("c.csv", b"text\n"), ("d.jsonl", b"\n\n")]
)
def test_empty_files(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert one(tmp_path / name, TEXT, tmp_path / "cache")[:2] == (str(tmp_path / name), "holds no rows")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", ROWS)
    whole = path.read_bytes()
    for data in (b"", b"PAR1 and nothing else", whole[: len(whole) // 2], whole[:4] + b"\xff" * 60 + whole[64:]):
        path.write_bytes(data)
        where, what, _ = one(path, TEXT, tmp_path / "cache")
        assert where == str(path) and "not readable as parquet" in what
    pq.write_table(pa.table({"text": pa.array([1, 2]), "user": pa.array([[1], [2]])}), path)
    found = problems(path, Columns(text="text", client="user"), tmp_path / "cache")
    assert [what for _, what, _ in found] == [
        "column 'text' holds int64, not text",
        "column 'user' holds list<element: int64>, not text or a number",
    ]


def test_a_kind_of_problem_is_listed_so_far_and_then_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"text": ""}] * 500)
    found = problems([path, tmp_path / "gone.csv"], TEXT, tmp_path / "cache")
    assert len(found) == LISTED + 2
    assert ("and more", f"{500 - LISTED} more of the same kind: empty text", "fill it in or remove the row") in found


def test_a_failure_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "d.jsonl", ROWS), tmp_path / "cache"
    good = read(path, TEXT, cache)
    bad = write(tmp_path / "bad.jsonl", [*[{"text": "fine"}] * 10_000, {"text": ""}])
    with pytest.raises(BadInput):
        read(bad, TEXT, cache)
    assert list(cache.iterdir()) == [good.path]
    with pytest.raises(BadInput, match="cannot write the cache"):
        read(path, TEXT, path)


def test_a_damaged_cache_says_what_to_delete(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS)
    table = read(path, TEXT, tmp_path / "cache")
    (table.path / "rows.arrow").write_bytes(b"torn")
    with pytest.raises(BadInput, match="delete this folder"):
        read(path, TEXT, tmp_path / "cache")


# --- size

GROWTH = """
    import json, sys, time
    from pathlib import Path
    from fedcanary.clients.data import Columns, read
    from fedcanary.clients.partition import FilePopulation, PartitionSpec, partition

    def megabytes(kind: str) -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
        return int(line.split()[1]) / 2**10

    columns = Columns(text="text", label="label", client="user")
    small = read(Path(sys.argv[1]), columns, Path(sys.argv[3]))  # imports and caches of the libraries
    partition(small, PartitionSpec(kind="column", min_examples=1, eval_fraction=0.0), 0)
    held, peak, clock = megabytes("RssAnon"), megabytes("VmHWM"), [time.perf_counter()]
    table = read(Path(sys.argv[2]), columns, Path(sys.argv[3]))
    peak = megabytes("VmHWM") - peak
    clock.append(time.perf_counter())
    plan = partition(table, PartitionSpec(kind="column"), 0)
    clock.append(time.perf_counter())
    population = FilePopulation(table=table, partition=plan)
    examples = sum(len(population.items(client, "train")) for client in range(0, len(population), 100))
    clock.append(time.perf_counter())
    seconds = [round(stop - start, 2) for start, stop in zip(clock, clock[1:])]
    size = [table.rows, len(plan), examples]
    print(json.dumps({"size": size, "held": megabytes("RssAnon") - held, "peak": peak, "seconds": seconds}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_million_rows_of_a_hundred_thousand_clients_stay_on_disk(tmp_path: Path, ending: str) -> None:
    filler = "the quick brown fox jumps over the lazy dog and goes on about it at some length; " * 3
    small, big = tmp_path / f"small.{ending}", tmp_path / f"big.{ending}"
    write(small, [{"text": "a", "label": str(i % 2), "user": f"u{i}"} for i in range(2)])
    rows = 1_000_000
    if ending == "jsonl":
        with big.open("w") as file:
            for i in range(rows):
                file.write(f'{{"text": "{i} {filler}", "label": "{i % 2}", "user": "user-{i * 7919 % 100_000}"}}\n')
    else:
        schema = pa.schema([("text", pa.string()), ("label", pa.string()), ("user", pa.string())])
        with pq.ParquetWriter(big, schema) as writer:
            for start in range(0, rows, 100_000):
                span = range(start, start + 100_000)
                values = (
                    [f"{i} {filler}" for i in span],
                    [str(i % 2) for i in span],
                    [f"user-{i * 7919 % 100_000}" for i in span],
                )
                writer.write_table(pa.table(dict(zip(schema.names, values, strict=True)), schema=schema))
    command = [sys.executable, "-c", textwrap.dedent(GROWTH), str(small), str(big), str(tmp_path / "cache")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sys.stdout.write(out)
    got = json.loads(out)
    assert got["size"] == [rows, 100_000, 8 * 1000]
    assert got["held"] < 150, got  # MB that are the process's own: mapped pages are the kernel's to take back
    assert got["peak"] < 150, got  # MB in all while reading about 250 MB of text


# --- real data


def test_hatecheck(tmp_path: Path) -> None:
    if not (home := os.environ.get("FEDCANARY_DATA")):
        pytest.skip("FEDCANARY_DATA is not set: point it at a folder that holds hatecheck/test_suite_cases.csv")
    columns = Columns(text="test_case", label="label_gold", group="target_ident", domain="functionality")
    table = read(Path(home) / "hatecheck" / "test_suite_cases.csv", columns, tmp_path)
    assert (table.rows, len(table.groups), len(table.domains)) == (3728, 7, 29)
    assert np.bincount(table.label).tolist() == [2563, 1165] and table.labels == ("hateful", "non-hateful")
    assert int((table.group < 0).sum()) == 292  # the cases that aim at nobody's identity
    assert table.item(0).prompt.startswith("I hate women.")
