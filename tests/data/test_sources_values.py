"""Sets that come as numbers: MOSI and MOSEI, ROSMAP and BRCA, Multiple Features, AV-MNIST.

Real counts are those of the sets' README files; planted faults those of the generator's manifest.
"""

import csv
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.schema import DataError
from data.sources import avmnist as avmnist_module
from data.sources import build_source, mosi
from data.sources.avmnist import AVMnist
from data.sources.base import stratified_splits
from data.sources.mfeat import WIDTHS, Mfeat
from data.sources.mogonet import Brca, Rosmap
from data.sources.mosi import Mosei, Mosi
from data.sources.raw import Adapter, Media, RawSample, Unreadable, Values

GENERATOR = Path(__file__).parents[2].parent / "shared" / "reference" / "make_layouts.py"
SIDE = {"train": "train", "valid": "val", "test": "test"}
SCORES = (-2.5, -0.25, 0.0, 1.5)
STEPS, SIZES = 6, {"text": 3, "audio": 5, "vision": 2}


def adapter(cls: type[Adapter], root: Path, **settings: object) -> Adapter:
    return cls(DataConfig.model_validate({"name": cls.name, "root": str(root), **settings}))


def read(source: Adapter) -> tuple[list[RawSample], list[Unreadable]]:
    """Samples, and rows that are none."""
    rows = list(source.samples())
    return (
        [row for row in rows if isinstance(row, RawSample)],
        [row for row in rows if isinstance(row, Unreadable)],
    )


def numbers(media: Media) -> np.ndarray:
    assert isinstance(media, Values)
    return media.array


def counts(samples: list[RawSample]) -> Counter[str]:
    return Counter(sample.split for sample in samples)


# ---- CMU-MOSI and CMU-MOSEI: sequences


def utterances(split: str, count: int = len(SCORES)) -> dict[str, np.ndarray]:
    """A split with zeros in front of one to six words."""
    rng = np.random.default_rng(len(split))
    part: dict[str, np.ndarray] = {}
    for name, width in SIZES.items():
        part[name] = rng.normal(size=(count, STEPS, width)).astype(np.float32)
        for row in range(count):
            part[name][row, : STEPS - 1 - row] = 0.0
    part["labels"] = np.resize(SCORES, count).reshape(-1, 1, 1).astype(np.float32)
    part["id"] = np.array([[f"{split}{row // 2}[{row}]"] for row in range(count)])
    return part


def whole() -> dict[str, dict]:
    return {split: utterances(split) for split in SIDE}


def write_npz(root: Path, name: str, content: Mapping[str, dict]) -> Path:
    for split, part in content.items():
        np.savez(root / f"{name}_{split}.npz", **part)
    return root


def write_pickle(root: Path, name: str, content: object, protocol: int = 4) -> Path:
    (root / name).write_bytes(pickle.dumps(content, protocol))
    return root


def test_mosi_npz(tmp_path: Path) -> None:
    content = whole()
    source = adapter(Mosi, write_npz(tmp_path, "mosi", content))
    assert list(source.kinds.items()) == [(m, "sequence") for m in ("text", "audio", "vision")]
    samples, unreadable = read(source)
    assert not unreadable
    assert [sample.split for sample in samples] == ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    first = samples[:4]
    assert [s.key for s in first] == ["train0[0]", "train0[1]", "train1[2]", "train1[3]"]
    assert [s.group for s in first] == ["train0", "train0", "train1", "train1"]
    assert [s.label for s in first] == ["negative", "negative", "positive", "positive"]
    for row, sample in enumerate(first):
        for name in SIZES:
            np.testing.assert_array_equal(numbers(sample.media[name]), content["train"][name][row])
    assert numbers(first[0].media["text"]).base is numbers(first[1].media["text"]).base  # views


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_mosi_pickle_is_as_npz(tmp_path: Path, protocol: int) -> None:
    content = whole()
    npz, pkl = tmp_path / "npz", tmp_path / "pkl"
    npz.mkdir()
    pkl.mkdir()
    expected, _ = read(adapter(Mosi, write_npz(npz, "mosi", content)))
    content["train"]["id"] = content["train"]["id"].astype("S")  # as in MOSI's own
    samples, _ = read(adapter(Mosi, write_pickle(pkl, "mosi_data.pkl", content, protocol)))
    assert_same(samples, expected)


def assert_same(samples: list[RawSample], expected: list[RawSample]) -> None:
    def facts(sample: RawSample) -> tuple:
        return sample.key, sample.label, sample.split, sample.group, list(sample.media)

    assert list(map(facts, samples)) == list(map(facts, expected))
    for sample, other in zip(samples, expected, strict=True):
        for name in sample.media:
            np.testing.assert_array_equal(numbers(sample.media[name]), numbers(other.media[name]))


def test_mosei_ids_of_three_parts(tmp_path: Path) -> None:
    content = whole()
    ids = [["--qXJuDtHPw", "23.199", "30.325"], ["--qXJuDtHPw", "30.325", "31"], ["a_b", "0", "1"]]
    content["train"] = {key: array[:3] for key, array in utterances("train").items()}
    content["train"]["id"] = np.array(ids)
    root = write_pickle(tmp_path, "mosei_senti_data.pkl", content)
    samples, _ = read(adapter(Mosei, root))
    assert [sample.key for sample in samples[:3]] == list(map("_".join, ids))
    assert [sample.group for sample in samples[:3]] == ["--qXJuDtHPw", "--qXJuDtHPw", "a_b"]


@pytest.mark.parametrize("aligned", [True, False])
def test_mmsa(tmp_path: Path, aligned: bool) -> None:
    """Zeros behind the words are cut off; aligned sequences at one place."""
    content: dict[str, dict] = {}
    for split in SIDE:
        part = utterances(split)
        part = {name: array[:, ::-1] if array.ndim == 3 else array for name, array in part.items()}
        part["regression_labels"] = part.pop("labels").reshape(-1)
        part["id"] = [f"video$_${row}" for row in range(len(SCORES))]  # type: ignore[assignment]
        part["raw_text"] = np.array(["some words"] * len(SCORES), object)
        part["vision"][1] = 0.0
        part["vision"][1, 0] = 1.0  # no face in the last of two words
        if not aligned:
            part["audio"] = np.pad(part["audio"], [(0, 0), (0, 4), (0, 0)])
        content[split] = part
    name = "aligned_50.pkl" if aligned else "unaligned_50.pkl"
    samples, _ = read(adapter(Mosi, write_pickle(tmp_path, name, content)))
    assert counts(samples) == {"train": 4, "val": 4, "test": 4}
    assert [sample.key for sample in samples[:2]] == ["video$_$0", "video$_$1"]
    assert samples[0].group == "video"
    assert [sample.label for sample in samples[:4]] == ["negative"] * 2 + ["positive"] * 2
    for row, sample in enumerate(samples[:4]):
        assert len(numbers(sample.media["text"])) == row + 1
        assert len(numbers(sample.media["audio"])) == row + 1
        expected = content["train"]["text"][row, : row + 1]
        np.testing.assert_array_equal(numbers(sample.media["text"]), expected)
    assert len(numbers(samples[1].media["vision"])) == (2 if aligned else 1)


def test_mosi_bad_numbers(tmp_path: Path) -> None:
    content = whole()
    part = content["train"]
    part["audio"][0, -1, 0] = -np.inf
    part["audio"][1, -1, 0] = np.inf
    part["vision"][2, -1, 0] = -np.inf
    part["text"][3] = 0.0
    part["labels"][:2] = [[[30.0]], [[np.nan]]]
    samples, _ = read(adapter(Mosi, write_npz(tmp_path, "mosi", content)))
    silenced = numbers(samples[0].media["audio"])
    assert silenced.dtype == np.float32
    assert silenced[-1, 0] == 0.0
    np.testing.assert_array_equal(silenced[:, 1:], part["audio"][0, :, 1:])
    assert np.isposinf(numbers(samples[1].media["audio"])[-1, 0])
    assert np.isneginf(numbers(samples[2].media["vision"])[-1, 0])
    assert list(samples[3].media) == ["audio", "vision"]  # no word: it lacks its text
    assert [sample.label for sample in samples[:2]] == ["score 30.0", "score nan"]


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    write_npz(tmp_path, "mosi", whole())
    (tmp_path / "mosi_data.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "mosi_hostile.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert len(read(adapter(Mosi, tmp_path))[0]) == 12
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    with pytest.raises(DataError, match=r"mosi_data\.pkl asks for 'os\.system'.*numpy\.savez"):
        read(adapter(Mosi, tmp_path))


def test_mosi_missing_files(tmp_path: Path) -> None:
    (tmp_path / "other.pkl").touch()
    with pytest.raises(
        DataError, match=r"lacks mosei_train\.npz,.* holds other\.pkl; give .*mosei_senti_data\.pkl"
    ):
        adapter(Mosei, tmp_path)
    write_npz(tmp_path, "mosi", {"train": utterances("train")})
    with pytest.raises(DataError, match=r"lacks mosi_valid\.npz, mosi_test\.npz"):
        adapter(Mosi, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision": None}, r"lacks the array 'vision'; it holds text, audio, labels, id"),
        ({"text": np.zeros((4, 3))}, r"text is float64 of shape \(4, 3\).* 4 x any x any"),
        ({"text": np.zeros((3, 6, 3))}, r"text is float64 of shape \(3, 6, 3\)"),
        ({"audio": np.full((4, 6, 5), "x")}, r"audio is <U1"),
        ({"labels": np.zeros((4, 1, 7))}, r"scores of shape \(4, 1, 7\)"),
        ({"id": np.array(["a"])}, r"id of shape \(1,\)"),
    ],
)
def test_mosi_wrong_arrays(tmp_path: Path, change: dict, reason: str) -> None:
    content = whole()
    content["valid"] = {k: v for k, v in (content["valid"] | change).items() if v is not None}
    root = write_npz(tmp_path, "mosi", content)
    with pytest.raises(DataError, match=rf"mosi_valid\.npz.*{reason}"):
        read(adapter(Mosi, root))


def test_mosi_broken_files(tmp_path: Path) -> None:
    root = write_npz(tmp_path, "mosi", whole())
    path = root / "mosi_test.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"mosi_test\.npz is no npz of plain arrays"):
        read(adapter(Mosi, root))
    np.savez(path, **(utterances("test") | {"id": np.array([["a"]] * 4, object)}))
    with pytest.raises(DataError, match=r"mosi_test\.npz is no npz.*allow_pickle=False"):
        read(adapter(Mosi, root))
    for part in root.glob("*.npz"):
        part.unlink()
    write_pickle(root, "mosi_data.pkl", {"train": utterances("train")})
    with pytest.raises(DataError, match=r"mosi_data\.pkl has no dict 'valid'"):
        read(adapter(Mosi, root))


def test_mosi_npz_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_npz(tmp_path, "mosi", whole())
    path = root / "mosi_valid.npz"
    np.savez_compressed(path, text=np.zeros(1 << 20, np.uint8))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(mosi, "MAX_BYTES", 1 << 20)
    with pytest.raises(
        DataError,
        match=r"mosi_valid\.npz has 1048704 bytes when it is unpacked and at most 1048576",
    ):
        read(adapter(Mosi, root))


def test_mosi_npz_that_claims_too_much(tmp_path: Path) -> None:
    root = write_npz(tmp_path, "mosi", whole())
    head = io.BytesIO()
    claim = {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)}
    np.lib.format.write_array_header_1_0(head, claim)
    with zipfile.ZipFile(root / "mosi_train.npz", "w") as file:
        file.writestr("text.npy", head.getvalue())
    with pytest.raises(DataError, match=r"mosi_train\.npz is no npz of plain arrays"):
        read(adapter(Mosi, root))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", np.zeros((4, STEPS, 3)).tolist()),
        ("id", [["a", "b"]] * 4),
        ("id", np.array([["a"], ["b"], ["c"], [["d"]]], object)),
        ("labels", [[0.5]] * 4),
        ("labels", 0.5),
        ("audio", {}),
    ],
    ids=["text", "id", "objects", "labels", "number", "dict"],
)
def test_mosi_pickle_of_lists_in_lists(tmp_path: Path, name: str, value: object) -> None:
    """Shared lists make gigabytes of some bytes, once they are an array."""
    content = whole()
    content["train"][name] = value
    root = write_pickle(tmp_path, "mosi_data.pkl", content)
    with pytest.raises(DataError, match=rf"mosi_data\.pkl: {name} is neither a NumPy array"):
        read(adapter(Mosi, root))


def test_mosi_pickle_of_flat_lists(tmp_path: Path) -> None:
    content = whole()
    arrays, _ = read(adapter(Mosi, write_pickle(tmp_path, "mosi_data.pkl", content)))
    for part in content.values():
        part["id"] = part["id"].reshape(-1).tolist()
        part["labels"] = list(part["labels"].reshape(-1))
    lists, _ = read(adapter(Mosi, write_pickle(tmp_path, "mosi_data.pkl", content)))
    assert_same(lists, arrays)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MOSI of the generator, clean and with all faults."""
    if not GENERATOR.is_file():
        pytest.skip("needs the generator of the trees")
    root = tmp_path_factory.mktemp("mosi")
    for name, flags in {"clean": ["--pickle"], "faults": ["--faults", "all"]}.items():
        options = ["--datasets", "mosi", "--per-class", "12", *flags]
        command = [sys.executable, str(GENERATOR), str(root / name), *options]
        subprocess.run(command, check=True, capture_output=True)
    return root


def test_generated_mosi(generated: Path, tmp_path: Path) -> None:
    root = generated / "clean" / "mosi"
    manifest = json.loads((root / "_manifest.json").read_text())
    samples, unreadable = read(adapter(Mosi, root))
    assert not unreadable
    found = {(s.key, Mosi.classes.index(s.label), s.split) for s in samples}
    assert found == {(s["id"], s["class"], SIDE[s["split"]]) for s in manifest["samples"]}
    (tmp_path / "mosi_data.pkl").write_bytes((root / "mosi_data.pkl").read_bytes())
    assert_same(read(adapter(Mosi, tmp_path))[0], samples)


def test_generated_faults(generated: Path, tmp_path: Path) -> None:
    root = generated / "faults" / "mosi"
    manifest = json.loads((root / "_manifest.json").read_text())
    fault = {fault["kind"]: fault for fault in manifest["faults"]}
    samples, _ = read(adapter(Mosi, root))
    assert len(samples) == len(manifest["samples"])
    by_label = [s.key for s in samples if s.label not in Mosi.classes]
    assert by_label == [fault["unknown_label"]["id"]]
    twice = [key for key, count in Counter(s.key for s in samples).items() if count > 1]
    assert twice == [fault["duplicate_id"]["id"]]
    bad = [
        (s.key, name)
        for s in samples
        for name in s.media
        if not np.isfinite(numbers(s.media[name])).all()
    ]
    assert bad == [(fault["non_finite"]["id"], "vision")]  # -inf in audio became 0
    hostile = root / fault["unsafe_pickle"]["path"]
    (tmp_path / "mosi_data.pkl").write_bytes(hostile.read_bytes())
    with pytest.raises(DataError, match=r"asks for 'posix\.getcwd'"):
        read(adapter(Mosi, tmp_path))


# ---- CMU-MOSI: vectors


VECTOR_ROWS = (
    ("a_1", "a", "1", "train", "train", "1", "GOOD"),
    ("a_2", "a", "2", "train", "train", "0", "BAD, REALLY"),
    ("b_1", "b", "1", "valid", "train", "1", "FINE"),
    ("c_1", "c", "1", "train", "test", "2", "HM"),
    ("c_2", "c", "2", "test", "dev", "0", "NO"),
)


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    with (tmp_path / "utterances.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "video_id", "clip", "split_standard", "split_repo", "label", "text"])
        writer.writerows(VECTOR_ROWS)
    arrays = {
        name: np.arange(5 * width, dtype=np.float32).reshape(5, width)
        for name, width in SIZES.items()
    }
    np.savez(tmp_path / "features.npz", **arrays)
    return tmp_path


def test_mosi_vectors(vectors: Path) -> None:
    source = adapter(Mosi, vectors)
    assert list(source.kinds.items()) == [(m, "vector") for m in ("text", "audio", "vision")]
    samples, unreadable = read(source)
    assert [(s.key, s.group, s.split, s.label) for s in samples] == [
        ("a_1", "a", "train", "positive"),
        ("a_2", "a", "train", "negative"),
        ("b_1", "b", "train", "positive"),
        ("c_1", "c", "test", "2"),
    ]
    assert unreadable == [
        Unreadable("utterances.csv line 6", "split_repo is 'dev', no split", "train")
    ]
    np.testing.assert_array_equal(numbers(samples[2].media["audio"]), np.arange(10, 15))


def test_mosi_vectors_given_split(vectors: Path) -> None:
    samples, unreadable = read(adapter(Mosi, vectors, split="given"))
    assert [s.split for s in samples] == ["train", "train", "val", "train", "test"]
    assert not unreadable


def test_mosi_vectors_bad_files(vectors: Path) -> None:
    path = vectors / "utterances.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "a_2,a", *lines[3:]]))
    samples, unreadable = read(adapter(Mosi, vectors))
    assert unreadable[0].key == "utterances.csv line 3"
    assert numbers(samples[1].media["text"])[0] == 6.0  # rows keep their place
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match=r"text is float32 of shape \(5, 3\).* 4 x any are needed"):
        read(adapter(Mosi, vectors))
    (vectors / "features.npz").unlink()
    with pytest.raises(DataError, match=r"lacks features\.npz"):
        adapter(Mosi, vectors)


@pytest.mark.parametrize("column", ["id", "video_id", "split_repo", "label"])
def test_mosi_vectors_without_a_column(vectors: Path, column: str) -> None:
    path = vectors / "utterances.csv"
    path.write_text(path.read_text().replace(f"{column},", "other,", 1))
    with pytest.raises(
        DataError, match=rf"utterances\.csv lacks the column {column}; it has .*other"
    ):
        read(adapter(Mosi, vectors))


def test_real_mosi(shared_data: Path) -> None:
    samples, unreadable = read(adapter(Mosi, shared_data / "mosi"))
    assert not unreadable
    assert counts(samples) == {"train": 1447, "test": 752}
    assert Counter(s.label for s in samples) == {"positive": 1176, "negative": 1023}
    assert len({s.group for s in samples}) == 93
    assert {name: numbers(m).shape for name, m in samples[0].media.items()} == {
        "text": (100,),
        "audio": (73,),
        "vision": (100,),
    }
    samples, _ = read(adapter(Mosi, shared_data / "mosi", split="given"))
    assert counts(samples) == {"train": 1284, "val": 229, "test": 686}


def test_real_mosi_validation_is_by_video(shared_data: Path) -> None:
    source = build_source(DataConfig(name="mosi", root=str(shared_data / "mosi")))
    sides: dict[str, set[str]] = {}
    for item in source.items():
        sides.setdefault(item.group, set()).add(item.split)
    assert Counter(side for (side,) in sides.values())["test"] == 31
    assert set().union(*sides.values()) == {"train", "val", "test"}


# ---- ROSMAP and BRCA


MOGONET_ROWS = {"tr": 20, "te": 6}


def write_mogonet(root: Path, widths: Mapping[int, int], num_classes: int) -> Path:
    rng = np.random.default_rng(0)
    root.mkdir()
    for part, rows in MOGONET_ROWS.items():
        for view, width in widths.items():
            values = rng.normal(size=(rows, width))
            values[:, 5] = 3.0 if part == "tr" else 4.0  # constant over train, another in test
            np.savetxt(root / f"{view}_{part}.csv", values, delimiter=",")
        np.savetxt(root / f"labels_{part}.csv", np.arange(rows) % num_classes)
    return root


@pytest.fixture
def rosmap(tmp_path: Path) -> Path:
    return write_mogonet(tmp_path / "rosmap", {1: 200, 2: 200, 3: 200}, 2)


def replace_line(path: Path, row: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[row] = line
    path.write_text("\n".join(lines) + "\n")


def test_rosmap(rosmap: Path) -> None:
    samples, unreadable = read(adapter(Rosmap, rosmap))
    assert not unreadable
    assert [s.key for s in samples] == [
        f"{part}-{row:03d}" for part, rows in MOGONET_ROWS.items() for row in range(rows)
    ]
    assert [s.label for s in samples[:3]] == ["control", "alzheimer", "control"]
    assert all((s.split == "test") == s.key.startswith("te-") for s in samples)
    expected = np.loadtxt(rosmap / "3_te.csv", delimiter=",")
    np.testing.assert_array_equal(numbers(samples[22].media["mirna"]), expected[2])


def test_brca(tmp_path: Path) -> None:
    source = adapter(Brca, write_mogonet(tmp_path / "brca", {1: 1000, 2: 1000, 3: 503}, 5))
    samples, _ = read(source)
    assert [s.label for s in samples[:6]] == [
        *("normal-like", "basal-like", "HER2-enriched", "luminal A", "luminal B", "normal-like"),
    ]
    shapes = {name: numbers(media).shape for name, media in samples[0].media.items()}
    assert shapes == {"mrna": (1000,), "methylation": (1000,), "mirna": (503,)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (",".join(["0.5"] * 199 + ["n/a"]), "column 200 holds 'n/a', which is not a number"),
        ("0.5,0.5", "2 cells, 200 expected"),
    ],
)
def test_rosmap_bad_row(rosmap: Path, line: str, reason: str) -> None:
    replace_line(rosmap / "2_tr.csv", 3, line)
    samples, unreadable = read(adapter(Rosmap, rosmap))
    assert unreadable == [Unreadable("tr-003", f"2_tr.csv row 4: {reason}", "train")]
    assert len(samples) == 25


def test_rosmap_nan_and_unknown_labels_are_left_to_the_checks(rosmap: Path) -> None:
    replace_line(rosmap / "2_tr.csv", 3, ",".join(["nan"] * 200))
    for row, cell in enumerate(("2.0", "0.5", "-1", "AD", "1")):
        replace_line(rosmap / "labels_tr.csv", row, cell)
    samples, unreadable = read(adapter(Rosmap, rosmap))
    assert not unreadable
    assert np.isnan(numbers(samples[3].media["methylation"])).all()
    assert [s.label for s in samples[:5]] == ["2.0", "0.5", "-1", "AD", "alzheimer"]


def test_rosmap_views_of_unequal_length(rosmap: Path) -> None:
    path = rosmap / "3_te.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match=r"3_te\.csv \(mirna\) has 5 rows and labels_te\.csv has 6"):
        read(adapter(Rosmap, rosmap))


def test_rosmap_missing_file(rosmap: Path) -> None:
    (rosmap / "2_te.csv").unlink()
    with pytest.raises(DataError, match=r"lacks 2_te\.csv.*it holds 1_te\.csv.*`--data\.root DIR`"):
        adapter(Rosmap, rosmap)


def test_rosmap_official_scaling_is_by_train_rows(rosmap: Path) -> None:
    """Compared with (x - min) / (max - min) of what is train after validation was cut off."""
    source = build_source(DataConfig(name="rosmap", root=str(rosmap), recipe="official"))
    items = source.items()
    parts = [np.loadtxt(rosmap / f"2_{part}.csv", delimiter=",") for part in MOGONET_ROWS]
    raw = np.concatenate(parts)
    train = raw[[item.sample_id for item in items if item.split == "train"]]
    low, high = train.min(axis=0), train.max(axis=0)
    high[5] = low[5] + 1.0  # constant feature: x - min
    for item in items:
        expected = (raw[item.sample_id] - low) / (high - low)
        np.testing.assert_allclose(source.load(item)["methylation"], expected, atol=1e-5)


def test_real_rosmap(shared_data: Path) -> None:
    samples, unreadable = read(adapter(Rosmap, shared_data / "rosmap"))
    assert not unreadable
    assert counts(samples) == {"train": 245, "test": 106}
    labels = [s.label for s in samples if s.split == "train"]
    cut = stratified_splits(labels, {"val": 0.2}, seed=0)
    assert Counter(zip(cut, labels, strict=True)) == {
        ("train", "control"): 94,
        ("train", "alzheimer"): 102,
        ("val", "control"): 24,
        ("val", "alzheimer"): 25,
    }
    items = build_source(DataConfig(name="rosmap", root=str(shared_data / "rosmap"))).items()
    assert [item.split for item in items if item.split != "test"] == cut


# ---- Multiple Features


@pytest.fixture
def mfeat(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for view, width in WIDTHS.items():
        rows = np.column_stack([rng.normal(size=(20, width)).round(4), np.arange(20) // 2])
        header = ",".join(map(str, range(width))) + ",0.1"
        np.savetxt(tmp_path / f"mfeat-{view}.csv", rows, "%g", ",", header=header, comments="")
    return tmp_path


def test_mfeat(mfeat: Path) -> None:
    source = adapter(Mfeat, mfeat)
    samples, unreadable = read(source)
    assert not unreadable
    assert [(s.key, s.label) for s in samples[:3]] == [
        ("row-0000", "0"),
        ("row-0001", "0"),
        ("row-0002", "1"),
    ]
    assert counts(samples) == {"train": 20}
    expected = np.loadtxt(mfeat / "mfeat-zer.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(numbers(samples[7].media["zer"]), expected[7, :-1])
    lines = {path: path.read_text().splitlines()[1:] for path in mfeat.iterdir()}
    for path, rows in lines.items():
        path.write_text("\n".join(rows))
    assert len(read(adapter(Mfeat, mfeat))[0]) == 20  # without header no digit is lost


def test_mfeat_bad_rows(mfeat: Path) -> None:
    replace_line(mfeat / "mfeat-mor.csv", 1, "1,2,3,4,5,x,0")
    replace_line(mfeat / "mfeat-mor.csv", 2, "1,2,3,4,5,6,9")
    replace_line(mfeat / "mfeat-mor.csv", 3, "1,2,3")
    samples, unreadable = read(adapter(Mfeat, mfeat))
    assert len(samples) == 17
    assert [(row.key, row.split) for row in unreadable] == [
        (f"row-000{n}", "train") for n in range(3)
    ]
    assert "mfeat-mor.csv row 1: column 6 holds 'x'" in unreadable[0].reason
    assert "do not agree on the digit: 0 in fou" in unreadable[1].reason
    assert "mfeat-mor.csv row 3: 3 cells, 7 expected" in unreadable[2].reason


def test_mfeat_views_of_unequal_length(mfeat: Path) -> None:
    path = mfeat / "mfeat-pix.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    with pytest.raises(DataError, match=r"mfeat-kar\.csv has 20, mfeat-pix\.csv has 18, .* rows"):
        read(adapter(Mfeat, mfeat))


def test_real_mfeat(shared_data: Path) -> None:
    samples, unreadable = read(adapter(Mfeat, shared_data / "mfeat"))
    assert not unreadable
    assert Counter(s.label for s in samples) == dict.fromkeys("0123456789", 200)
    assert {name: numbers(m).shape for name, m in samples[-1].media.items()} == {
        "fou": (76,),
        "fac": (216,),
        "kar": (64,),
        "pix": (240,),
        "zer": (47,),
        "mor": (6,),
    }
    assert numbers(samples[0].media["mor"]).tolist() == [1, 0, 0, 133.15, 1.3117, 1620.2]


# ---- AV-MNIST


AVMNIST_ROWS = {"train": 12, "test": 3}


@pytest.fixture
def avmnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(avmnist_module, "VAL_ROWS", 4)
    rng = np.random.default_rng(0)
    for folder, shape in {"image": (784,), "audio": (112, 112)}.items():
        (tmp_path / folder).mkdir()
        for part, rows in AVMNIST_ROWS.items():
            values = rng.integers(0, 256, (rows, *shape))
            dtype = np.float64 if folder == "image" else np.uint8
            np.save(tmp_path / folder / f"{part}_data.npy", values.astype(dtype))
    for part, rows in AVMNIST_ROWS.items():
        np.save(tmp_path / f"{part}_labels.npy", np.arange(rows) % 10)
    return tmp_path


def test_avmnist(avmnist: Path) -> None:
    samples, _ = read(adapter(AVMnist, avmnist))
    assert [s.split for s in samples] == ["train"] * 8 + ["val"] * 4 + ["test"] * 3
    assert [s.key for s in samples[-4:]] == ["train-00011", *(f"test-0000{n}" for n in range(3))]
    assert [s.label for s in samples[9:12]] == ["9", "0", "1"]
    images = np.load(avmnist / "image" / "train_data.npy")
    sounds = np.load(avmnist / "audio" / "train_data.npy")
    for row in (0, 11):
        image, sound = (numbers(samples[row].media[name]) for name in ("image", "audio"))
        assert image.dtype == sound.dtype == np.float32
        np.testing.assert_allclose(image, images[row].reshape(1, 28, 28) / 255, rtol=1e-6)
        np.testing.assert_allclose(sound, sounds[row][None] / 255, rtol=1e-6)


def test_avmnist_keeps_no_copies(avmnist: Path) -> None:
    samples, _ = read(adapter(AVMnist, avmnist))
    for sample in samples:
        for media in sample.media.values():
            (kept,) = vars(media).values()
            assert isinstance(kept, np.memmap)


def test_avmnist_unknown_label(avmnist: Path) -> None:
    np.save(avmnist / "test_labels.npy", np.array([1.0, 10.0, np.nan]))
    samples, _ = read(adapter(AVMnist, avmnist))
    assert [s.label for s in samples[-3:]] == ["1", "10", "nan"]


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("image/train_data.npy", np.zeros((11, 784)), r"shape \(11, 784\), and \(12, 1, 28, 28\)"),
        ("audio/test_data.npy", np.zeros((3, 112)), r"shape \(3, 112\), and \(3, 1, 112, 112\)"),
        ("train_labels.npy", np.zeros(4), r"has 4 rows, of which the last 4 are for validation"),
        ("test_labels.npy", np.array(["1", "2", "3"]), "holds <U1, not numbers"),
        ("test_labels.npy", np.array([1, 2, 3], object), "is no array of numbers .*Python objects"),
    ],
)
def test_avmnist_bad_files(avmnist: Path, name: str, array: np.ndarray, reason: str) -> None:
    np.save(avmnist / name, array)
    with pytest.raises(DataError, match=reason):
        read(adapter(AVMnist, avmnist))


def test_avmnist_truncated(avmnist: Path) -> None:
    path = avmnist / "audio" / "train_data.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train_data\.npy is no array of numbers"):
        read(adapter(AVMnist, avmnist))
