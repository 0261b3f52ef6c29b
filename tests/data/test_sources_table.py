"""Bring your own: every kind from every format, choices, gaps, bad rows, and the real recipes."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.schema import DataError
from data.sources.raw import (
    Media,
    RawSample,
    Sound,
    Stills,
    Text,
    TextFile,
    Unreadable,
    Values,
    Video,
)
from data.sources.table import Table

Row = dict[str, object]


def write_csv(path: Path, rows: list[Row]) -> Path:
    """Every cell in quotes; lists as JSON, None as an empty cell."""

    def quoted(cell: object) -> str:
        text = "" if cell is None else json.dumps(cell) if isinstance(cell, list) else str(cell)
        return '"' + text.replace('"', '""') + '"'

    lines = [",".join(map(quoted, cells)) for cells in (rows[0], *(row.values() for row in rows))]
    path = path.with_suffix(".csv")
    path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig", newline="")
    return path


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    return path


def write_parquet(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "own.csv"
    text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    return path


def table(path: Path, **settings: object) -> Table:
    return Table(DataConfig.model_validate({"name": "table", "table": str(path), **settings}))


def sound_samples(own: Table) -> list[RawSample]:
    samples = list(own.samples())
    assert all(isinstance(sample, RawSample) for sample in samples), samples
    return [sample for sample in samples if isinstance(sample, RawSample)]


def reasons(own: Table) -> dict[str, str]:
    return {bad.key: bad.reason for bad in own.samples() if isinstance(bad, Unreadable)}


def plain(media: Media) -> object:
    """To be compared with ==."""
    return media.array.tolist() if isinstance(media, Values) else media


ROWS: list[Row] = [
    {
        "id": f"s{number}",
        "label": "yes" if number % 2 else "no",
        "photo": f"photos/ä b {number}.JPG",
        "shots": [f"shots/{number}-0.png", f"shots/{number}-1.png"],
        "clip": f"clips/{number}.mp4",
        "sound": f"sounds/{number}.flac",
        "note": f"notes/{number}.md",
        "title": f'"Grüezi", said\nnumber {number}',
        "age": 30 + number,
        "weight": 60.5 + number,
        "embedding": [0.5, -1.0, float(number)],
        "series": [[1.0, 2.0], [3.0, float(number)]],
    }
    for number in range(4)
]
WRITERS = [write_csv, write_jsonl, write_parquet]


@pytest.mark.parametrize("write", WRITERS)
def test_kinds_are_inferred_alike_from_all_formats(
    tmp_path: Path, write: Callable[[Path, list[Row]], Path]
) -> None:
    own = table(write(tmp_path / "own", ROWS))
    assert own.kinds == {
        "photo": "image",
        "shots": "frames",
        "clip": "frames",
        "sound": "audio",
        "note": "text",
        "title": "text",
        "table": "vector",
        "embedding": "vector",
        "series": "sequence",
    }
    assert own.classes == ("no", "yes")
    assert own.root == tmp_path.resolve()
    samples = sound_samples(own)
    assert [sample.key for sample in samples] == ["s0", "s1", "s2", "s3"]
    assert [sample.label for sample in samples] == ["no", "yes", "no", "yes"]
    assert {(sample.split, sample.group) for sample in samples} == {("train", None)}
    assert {name: plain(media) for name, media in samples[3].media.items()} == {
        "photo": Stills(("photos/ä b 3.JPG",)),
        "shots": Stills(("shots/3-0.png", "shots/3-1.png")),
        "clip": Video("clips/3.mp4"),
        "sound": Sound("sounds/3.flac"),
        "note": TextFile("notes/3.md"),
        "title": Text('"Grüezi", said\nnumber 3'),
        "table": [33.0, 63.5],
        "embedding": [0.5, -1.0, 3.0],
        "series": [[1.0, 2.0], [3.0, 3.0]],
    }


def test_description(tmp_path: Path) -> None:
    lines = table(write_csv(tmp_path / "own", ROWS)).describe()
    assert "photo: image (from column photo, 4 paths .jpg)" in lines
    assert "shots: frames (from column shots, 8 paths .png)" in lines
    assert "title: text (from column title, 4 texts)" in lines
    assert "table: vector (from columns age, weight, 4 rows of numbers)" in lines


def test_only_chosen_modalities_and_a_column_for_two(tmp_path: Path) -> None:
    own = table(
        write_csv(tmp_path / "own", ROWS),
        modalities={
            "visual": {"column": "clip", "kind": "frames"},
            "audio": {"column": "clip", "kind": "audio"},
            "motion": {"column": "clip", "kind": "flow"},
            "cover": {"column": "shots", "kind": "image"},
            "title": {},
            "age": {},
        },
    )
    assert own.kinds == {
        "visual": "frames",
        "audio": "audio",
        "motion": "flow",
        "cover": "image",
        "title": "text",
        "age": "vector",
    }
    assert "cover: image (from column shots, 8 paths .png, the first of several in 4 rows)" in (
        own.describe()
    )
    media = sound_samples(own)[1].media
    assert media["visual"] == media["audio"] == media["motion"] == Video("clips/1.mp4")
    assert media["cover"] == Stills(("shots/1-0.png",))
    assert plain(media["age"]) == [31.0]


def test_table_stands_for_the_numbers_not_used_otherwise(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "own", ROWS)
    own = table(path, modalities={"table": {}, "body": {"column": "weight"}})
    assert own.describe()[0] == "table: vector (from column age, 4 rows of numbers)"
    assert plain(sound_samples(own)[0].media["table"]) == [30.0]


def test_chosen_kinds_for_cells_that_look_like_nothing(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "label,hash,tag,wave", 'a,00aa,x,"[1, 2]"', "b,00bb,y,[3]")
    own = table(
        path,
        modalities={
            "photo": {"column": "hash", "kind": "image"},
            "tag": {"kind": "text"},
            "wave": {"kind": "sequence"},
        },
    )
    media = sound_samples(own)[0].media
    assert media["photo"] == Stills(("00aa",))
    assert media["tag"] == Text("x")
    assert plain(media["wave"]) == [[1.0], [2.0]]


def test_paths_separated_by_semicolons(tmp_path: Path) -> None:
    lines = ("label,shots,text", "a, a.png ; b.png;,two words", "b,c.png;d.png,three words more")
    own = table(write_lines(tmp_path, *lines))
    assert own.kinds == {"shots": "frames", "text": "text"}
    assert sound_samples(own)[0].media["shots"] == Stills(("a.png", "b.png"))


def test_arrays_are_read_as_they_are(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    np.save(raw / "v.npy", np.array([1.5, 2.5], dtype=np.float32))
    np.save(raw / "s.npy", np.array([[1, 2], [3, 4], [5, 6]], dtype=np.int16))
    path = write_lines(tmp_path, "label,vec,seq", "a,gone.npy,s.npy", "b,v.npy,s.npy")
    own = table(path, root=str(raw))
    assert own.kinds == {"vec": "vector", "seq": "sequence"}
    assert own.root == raw.resolve()
    assert reasons(own) == {"own.csv line 2": "column vec: gone.npy does not exist"}
    sample = list(own.samples())[1]
    assert isinstance(sample, RawSample)
    dtypes = [str(m.array.dtype) for m in sample.media.values() if isinstance(m, Values)]
    assert dtypes == ["float32", "float64"]
    assert plain(sample.media["vec"]) == [1.5, 2.5]
    assert plain(sample.media["seq"]) == [[1, 2], [3, 4], [5, 6]]


def test_bad_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.zeros(4))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    cut = (tmp_path / "good.npy").read_bytes()[:-8]
    (tmp_path / "cut.npy").write_bytes(cut)
    (tmp_path / "no.npy").write_bytes(b"no array")
    names = ("good", "object", "words", "cube", "cut", "no", "../out")
    path = write_lines(tmp_path, "label,vec,text", *(f"a,{name}.npy,two words" for name in names))
    np.save(tmp_path.parent / "out.npy", np.zeros(4))
    found = reasons(table(path))
    assert len(found) == 6
    assert "object.npy is no whole .npy file of numbers" in found["own.csv line 3"]
    assert "words.npy holds <U1, not numbers" in found["own.csv line 4"]
    assert "shape (2, 2, 2) and is not a list of numbers" in found["own.csv line 5"]
    assert "cut.npy is no whole .npy file" in found["own.csv line 6"]
    assert "no.npy is no whole .npy file" in found["own.csv line 7"]
    assert "leads out of data.root" in found["own.csv line 8"]


def test_lists_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    columns = {
        "a": pa.array([[1, 2], None, [3, 4, 5]], pa.list_(pa.float32())),
        "b": pa.array([[1, 2], [5, 6], [3, 4]], pa.list_(pa.float32(), 2)),
        "c": pa.array([[1, 2], [], [3, 4]], pa.large_list(pa.int8())),
        "d": pa.array([1, 2, 3]),
    }
    pq.write_table(pa.table({"label": ["x", "y", "x"], **columns}), path)
    samples = sound_samples(table(path))
    assert sorted(samples[1].media) == ["b", "table"]
    arrays = {name: media for name, media in samples[2].media.items() if isinstance(media, Values)}
    assert {name: str(media.array.dtype) for name, media in arrays.items()} == {
        "a": "float32",
        "b": "float32",
        "c": "float64",
        "table": "float64",
    }
    assert [plain(media) for media in arrays.values()] == [[3, 4, 5], [3, 4], [3, 4], [3]]


@pytest.mark.parametrize("write", WRITERS)
def test_empty_cells_leave_the_modality_out(
    tmp_path: Path, write: Callable[[Path, list[Row]], Path]
) -> None:
    rows: list[Row] = [
        {"label": "a", "photo": "a.jpg", "text": "two words", "x": 1.0, "y": 2.0},
        {"label": "b", "photo": None, "text": "three words more", "x": None, "y": None},
        {"label": "a", "photo": None, "text": " ", "x": None, "y": None},
        {"label": "b", "photo": "b.jpg", "text": "", "x": 1.0, "y": None},
        {"label": " ", "photo": "c.jpg", "text": "two words", "x": 1.0, "y": 2.0},
    ]
    own = table(write(tmp_path / "own", rows))
    samples = list(own.samples())
    present = [sorted(s.media) for s in samples if isinstance(s, RawSample)]
    assert present == [["photo", "table", "text"], ["text"]]
    assert [s.reason for s in samples if isinstance(s, Unreadable)] == [
        "all modalities are empty (photo, text, table)",
        "column y is empty, and others of table are not",
        "column label is empty; a label is needed",
    ]
    assert own.describe()[0] == "photo: image (from column photo, 2 paths .jpg, none in 2 rows)"
    assert own.classes == ("a", "b")


def test_cells_that_do_not_fit(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"label": "a", "n": 1, "v": [1, 2], "s": [[1], [2]], "sound": "a.wav"} for _ in range(12)
    ]
    rows.append({"label": "a", "n": "n/a", "v": [1, 2], "s": [[1], [2]], "sound": "a.wav"})
    rows.append({"label": "a", "n": 1, "v": [1, "x"], "s": [[1], [2]], "sound": "a.wav"})
    rows.append({"label": "a", "n": 1, "v": [1, 2], "s": [[1], [2, 3]], "sound": "a.wav"})
    rows.append({"label": "a", "n": 1, "v": [1, 2], "s": [[1]], "sound": ["a.wav", "b.wav"]})
    rows.append({"label": ["a"], "n": 1, "v": [1, 2], "s": [[1]], "sound": "a.wav"})
    found = reasons(table(write_jsonl(tmp_path / "own", rows)))
    ragged = found.pop("own.jsonl line 15")
    assert ragged == "column s: [[1], [2, 3]] is not a list of equally long lists of numbers"
    assert found == {
        "own.jsonl line 13": "column n: 'n/a' is no number",
        "own.jsonl line 14": "column v: [1, 'x'] is not a list of numbers",
        "own.jsonl line 16": "column sound: ['a.wav', 'b.wav'] holds 2 paths, and one is needed",
        "own.jsonl line 17": "column label: ['a'] is no text or number",
    }


def test_split_and_group_columns(tmp_path: Path) -> None:
    sides = ("Test", "train", "VALID", "training", "dev", "testing", "holdout", "", "val")
    rows: list[Row] = [
        {"label": 1, "a": "two words", "b": "a.jpg", "who": number // 2 or None, "part": side}
        for number, side in enumerate(sides)
    ]
    own = table(write_jsonl(tmp_path / "own", rows), split_column="part", group_column="who")
    samples = list(own.samples())
    assert [(s.key, s.split) for s in samples if isinstance(s, RawSample)] == [
        ("row 2", "train"),
        ("row 4", "train"),
        ("row 3", "val"),
        ("row 5", "val"),
        ("row 9", "val"),
        ("row 1", "test"),
        ("row 6", "test"),
    ]
    assert [s.group for s in samples if isinstance(s, RawSample)][:3] == [None, "1", "1"]
    assert reasons(own) == {
        "own.jsonl line 7": "column part holds 'holdout'; use train, val or test",
        "own.jsonl line 8": "column part is empty; use train, val or test",
    }
    assert set(own.kinds) == {"a", "b"}


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, -1, 9], ("-1", "9", "10")),
        ([10.0, 9.0, 1.5, 2.0], ("1.5", "10", "2", "9")),
        (["10", "b", " a ", "a"], ("10", "a", "b")),
    ],
)
def test_classes(tmp_path: Path, labels: list[object], classes: tuple[str, ...]) -> None:
    rows: list[Row] = [{"label": label, "a": "two words", "b": "x.wav"} for label in labels]
    assert table(write_jsonl(tmp_path / "own", rows)).classes == classes


def test_bad_csv_rows_cost_only_themselves(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path,
        "id,label,photo,text",
        '1,a,1.jpg,"two',
        'lines, with ""quotes"" too"',
        "2,a,2.jpg",
        "3,a,3.jpg,some, comma",
        '4,a,4.jpg,"left open',
        "5,b,5.jpg,good words",
        "",
        '6,b,6.jpg,"quoted words"',
        '7,b,7.jpg,"wrongly "quoted" words"',
        "8,b,8.jpg,caf\udce9 au lait",
        "9,b,9.jpg,good words",
        '10,b,10.jpg,"open to the end',
    )
    own = table(path)
    samples = {s.key: s.media["text"] for s in own.samples() if isinstance(s, RawSample)}
    assert list(samples) == ["1", "5", "6", "9"]
    assert samples["1"] == Text('two\nlines, with "quotes" too')
    found = reasons(own)
    assert list(found) == [f"own.csv line {line}" for line in (4, 5, 6, 10, 11, 13)]
    assert "3 cells, and the header has 4" in found["own.csv line 4"]
    assert "5 cells, and the header has 4" in found["own.csv line 5"]
    assert "quotes do not match" in found["own.csv line 6"]
    assert "quotes do not match" in found["own.csv line 10"]
    assert "is not UTF-8" in found["own.csv line 11"]
    assert "quotes do not match" in found["own.csv line 13"]


def test_long_texts(tmp_path: Path) -> None:
    text = "word, " * 100_000
    own = table(write_lines(tmp_path, "label,photo,text", f'a,a.jpg,"{text}"'))
    assert sound_samples(own)[0].media["text"] == Text(text)


def test_bad_json_lines_cost_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    good = b'{"label": "a", "photo": "a.jpg", "text": "two words"}'
    lines = [good, b'{"label": "a"', b"", b"[1]", b"[" * 100_000, b'{"label": "\xe9"}', good[:-1]]
    lines[-1] += b', "text": "\\ud800 and more"}'
    path.write_bytes(b"\n".join(lines))
    own = table(path)
    assert [s.key for s in own.samples() if isinstance(s, RawSample)] == ["row 1"]
    found = reasons(own)
    assert list(found) == [f"own.jsonl line {line}" for line in (2, 4, 5, 6, 7)]
    assert "no JSON" in found["own.jsonl line 2"]
    assert "[1] is no JSON object" in found["own.jsonl line 4"]
    assert "utf-8" in found["own.jsonl line 6"]
    assert "is not UTF-8" in found["own.jsonl line 7"]


def test_columns_of_json_lines_may_come_later(tmp_path: Path) -> None:
    rows: list[Row] = [{"label": "a", "photo": "a.jpg"}, {"label": "b", "text": "two words"}]
    samples = sound_samples(table(write_jsonl(tmp_path / "own", rows)))
    assert [sorted(sample.media) for sample in samples] == [["photo"], ["text"]]


def test_a_column_of_unclear_kind_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path, "label,photo,color,n,mix", "a,a.jpg,red,1,2", "b,b.jpg,blue,2,c.wav"
    )
    with pytest.raises(DataError) as caught:
        table(path)
    message = str(caught.value)
    assert "color ('red', 'blue'); mix ('2', 'c.wav')" in message
    assert (
        "`--data.modalities.photo.kind image --data.modalities.table.kind vector "
        "--data.modalities.color.kind KIND`" in message
    )
    chosen = {"photo": {"kind": "image"}, "table": {"kind": "vector"}, "color": {"kind": "text"}}
    own = table(path, modalities=chosen)
    assert own.kinds == {"photo": "image", "table": "vector", "color": "text"}


GOOD = ("label,photo,text,n", "a,a.jpg,two words,1", "b,b.jpg,three more words,2")


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (
            GOOD,
            {"label_column": "Labels"},
            r"no column 'Labels' \(did you mean 'label'\?\).*label_c",
        ),
        (GOOD, {"split_column": "zzz"}, r"no column 'zzz'; its columns are label, photo, text, n"),
        (GOOD, {"modalities": {"foto": {}}}, r"'foto' \(did you mean 'photo'\?\).*foto\.column"),
        (GOOD, {"modalities": {"x": {"column": "label"}}}, "column of the label"),
        (GOOD, {"modalities": {"photo": {}}}, r"at least 2 .* there is photo: image .*text, n"),
        (GOOD, {"modalities": {"photo": {"kind": "audio"}}}, r"form image .*use image or frames"),
        (GOOD, {"modalities": {"text": {"kind": "vector"}}}, r"form string .*or text"),
        (GOOD, {"modalities": {"table": {}, "n": {}}}, "own.csv has none"),
        (GOOD, {"modalities": {"table": {"kind": "text"}}}, "own.csv has n; leave out its kind"),
        (GOOD, {"modalities": {"group": {"column": "text"}}}, "cannot be named 'group'"),
        (GOOD, {"modalities": {"a.b": {"column": "text"}}}, "cannot be named 'a.b'"),
        (GOOD, {"root": "nowhere"}, "nowhere is not a folder"),
        (("label,a,a", "1,2,3"), {}, "several columns 'a'"),
        (("label,,a", "1,2,3"), {}, "column 2 of .* has no name"),
        (("label;a;b", "1;2;3"), {}, "separated by commas"),
        (("label,a,b",), {}, "no row with a label .it has no rows"),
        (("label,a,b", ",x.jpg,two words"), {}, "line 2: column label is empty.*label_column"),
        (("label,a,b", "1,x.jpg,"), {}, r"b \(nothing but empty cells\)"),
        (("label,n,table", "1,2,two words"), {}, "name of two modalities"),
        (('label,"a', "1,2"), {}, "no header .quotes do not match"),
    ],
)
def test_errors(
    tmp_path: Path, lines: tuple[str, ...], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        table(write_lines(tmp_path, *lines), **settings)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.table is not set"):
        Table(DataConfig(name="table"))
    with pytest.raises(DataError, match="not a file"):
        table(tmp_path / "none.csv")
    (tmp_path / "own.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"suffix '\.xlsx'.*\.csv, \.jsonl, .*\.parquet"):
        table(tmp_path / "own.xlsx")
    (tmp_path / "own.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        table(tmp_path / "own.parquet")
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(DataError, match="no header line"):
        table(tmp_path / "empty.csv")
    (tmp_path / "wide.csv").write_text("label,a\n1,2\n", encoding="utf-16")
    with pytest.raises(DataError, match="not UTF-8"):
        table(tmp_path / "wide.csv")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "own", ROWS)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        table(path)


def test_other_columns_of_parquet_need_a_kind(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    columns = {"label": [1], "photo": ["a.jpg"], "blob": [b"\x00\x01"], "n": [1]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=r"cannot be told: blob \(b'\\x00\\x01'\)"):
        table(path)


def test_pickled(tmp_path: Path) -> None:
    own = table(write_csv(tmp_path / "own", ROWS))
    again: Table = pickle.loads(pickle.dumps(own))
    assert (again.root, again.kinds, again.classes) == (own.root, own.kinds, own.classes)
    assert [s.key for s in again.samples()] == ["s0", "s1", "s2", "s3"]


def test_recipes(shared_data: Path) -> None:
    path = shared_data / "recipes" / "recipes.csv"
    with pytest.raises(DataError, match=r"cannot be told: tags \('swiss;pork;potato;pasta'"):
        table(path, label_column="course")
    own = table(
        path,
        label_column="course",
        modalities={"photo": {"column": "images"}, "text": {"column": "text_file"}},
    )
    assert own.describe() == [
        "photo: image (from column images, 136 paths .webp, the first of several in 15 rows)",
        "text: text (from column text_file, 115 paths .txt)",
    ]
    samples = sound_samples(own)
    assert Counter(sample.label for sample in samples) == {
        "main": 41,
        "side-soup-sauce": 31,
        "sweet": 18,
        "breakfast-bread": 14,
        "other": 11,
    }
    assert own.classes == tuple(sorted({sample.label for sample in samples}))
    assert samples[3].key == "apple-strudel"
    assert samples[3].media["photo"] == Stills(("images/apple-strudel-1.webp",))
    for sample in samples:
        photo, text = sample.media["photo"], sample.media["text"]
        assert isinstance(photo, Stills)
        assert isinstance(text, TextFile)
        assert (own.root / photo.paths[0]).is_file()
        assert (own.root / text.path).is_file()


def test_recipes_with_all_photos(shared_data: Path) -> None:
    own = table(
        shared_data / "recipes" / "recipes.csv",
        label_column="course",
        modalities={"photos": {"column": "images", "kind": "frames"}, "title": {}},
    )
    samples = sound_samples(own)
    photos = [s.media["photos"] for s in samples]
    assert Counter(len(p.paths) for p in photos if isinstance(p, Stills)) == {
        1: 100,
        2: 11,
        3: 2,
        4: 2,
    }
    assert samples[0].media["title"] == Text("Älplermagronen (Alpine macaroni)")
