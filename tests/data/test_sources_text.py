"""Sets of text and image: layouts, labels and bad rows, on generated and on hand-made trees."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.schema import DataError
from data.sources.food101 import Food101, clean_title
from data.sources.mmsd import Mmsd
from data.sources.n24news import SECTIONS, N24News
from data.sources.raw import Adapter, RawSample, Stills, Text, Unreadable
from data.sources.twitter2015 import Twitter2015

MAKE_LAYOUTS = Path(__file__).parents[2].parent / "shared" / "reference" / "make_layouts.py"
ADAPTERS: dict[str, type[Adapter]] = {
    "food101": Food101,
    "n24news": N24News,
    "twitter2015": Twitter2015,
    "mmsd": Mmsd,
}
SPLIT_NAMES = {
    "food101": {"train": "train", "dev": "train", "test": "test"},
    "n24news": {"train": "train", "dev": "val", "test": "test"},
}
ID = 862902619928506372  # as float 862902619928506368

needs_layouts = pytest.mark.skipif(not MAKE_LAYOUTS.is_file(), reason="needs make_layouts.py")


def adapter(name: str, root: Path, **settings: object) -> Adapter:
    config = DataConfig.model_validate({"name": name, "root": str(root), **settings})
    return ADAPTERS[name](config)


def rows_of(name: str, root: Path, **settings: object) -> list[RawSample | Unreadable]:
    return list(adapter(name, root, **settings).samples())


def samples_of(name: str, root: Path, **settings: object) -> list[RawSample]:
    rows = rows_of(name, root, **settings)
    return [row for row in rows if isinstance(row, RawSample)]


def unreadable_of(name: str, root: Path, **settings: object) -> list[Unreadable]:
    rows = rows_of(name, root, **settings)
    return [row for row in rows if isinstance(row, Unreadable)]


def image_of(sample: RawSample) -> str:
    image = sample.media["image"]
    assert isinstance(image, Stills)
    (path,) = image.paths
    return path


def text_of(sample: RawSample) -> str:
    text = sample.media["text"]
    assert isinstance(text, Text)
    return text.text


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, lines: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


# --- trees of make_layouts.py, against their _manifest.json


def make_tree(folder: Path, name: str, *arguments: str) -> Path:
    if not MAKE_LAYOUTS.is_file():
        pytest.skip("needs make_layouts.py")
    command = [sys.executable, str(MAKE_LAYOUTS), str(folder), "--datasets", name, *arguments]
    subprocess.run(command, check=True, capture_output=True)
    return folder / name


@pytest.fixture(scope="module", params=["food101", "n24news"])
def clean(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arguments = ("--classes", "6", "--per-class", "5")
    return make_tree(tmp_path_factory.mktemp("clean"), request.param, *arguments)


@pytest.fixture(scope="module", params=["food101", "n24news"])
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("faulty"), request.param, "--faults", "all")


def manifest_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "_manifest.json").read_text())


def expected_rows(root: Path) -> list[tuple[str, str, str]]:
    """Key, label and split of every sample, in index order."""
    manifest = manifest_of(root)
    splits = SPLIT_NAMES[manifest["dataset"]]
    wrong_labels = {"food101": "999", "n24news": "Weather"}
    wrong = {f["id"] for f in manifest["faults"] if f["kind"] == "unknown_label"}
    rows = [
        (
            s["id"],
            wrong_labels[root.name] if s["id"] in wrong else manifest["classes"][s["class"]],
            splits[s["split"]],
        )
        for s in manifest["samples"]
    ]
    return sorted(rows, key=lambda row: ("train", "val", "test").index(row[2]))


@needs_layouts
def test_clean_tree(clean: Path) -> None:
    source = adapter(clean.name, clean)
    rows = list(source.samples())
    samples = [row for row in rows if isinstance(row, RawSample)]
    assert [(s.key, s.label, s.split) for s in samples] == expected_rows(clean)
    assert len(rows) == len(samples) == 30
    assert list(source.classes) == manifest_of(clean)["classes"]
    assert list(source.kinds.items()) == [("text", "text"), ("image", "image")]
    on_disk = {str(path.relative_to(clean)) for path in clean.rglob("*.jpg")}
    assert {image_of(sample) for sample in samples} == on_disk
    assert all(len(text_of(sample).split()) >= 5 for sample in samples)


@needs_layouts
def test_faulty_tree(faulty: Path) -> None:
    manifest = manifest_of(faulty)
    faults = {fault["kind"]: fault for fault in manifest["faults"]}
    rows = rows_of(faulty.name, faulty)
    samples = [row for row in rows if isinstance(row, RawSample)]
    assert [(s.key, s.label, s.split) for s in samples] == expected_rows(faulty)
    assert list(adapter(faulty.name, faulty).classes) == manifest["classes"]

    absent = {image_of(s) for s in samples if not (faulty / image_of(s)).is_file()}
    twice = faults["duplicate_id"]["id"]
    moved = {image_of(s) for s in samples if s.key == twice and s.split == "test"}
    wanted = moved if faulty.name == "food101" else set()  # the file is in images/train
    assert absent == {faults["missing_file"]["path"]} | wanted

    (bad,) = [row for row in rows if isinstance(row, Unreadable)]
    line = 1 + sum(sample.split == "train" for sample in samples)
    key, reason = {
        "food101": (f"train.jsonl line {line}", "no JSON (Unterminated string"),
        "n24news": (f"nytimes_train.json item {line}", "image_id is None; the name of an image is"),
    }[faulty.name]
    assert bad.key == key
    assert bad.reason.startswith(reason)
    assert bad.split == "train"


# --- Food-101


def food_row(name: str, label: object, text: str = "a title") -> dict[str, object]:
    return {"img": f"{name.rpartition('_')[0]}/{name}.jpg", "label": label, "text": text}


@pytest.fixture
def food(tmp_path: Path) -> Path:
    """The MIDAS form; the numbers are not those of the sorted names."""
    (tmp_path / "images").mkdir()
    train = [food_row(f"{c}_{k}", n) for n, c in ((7, "baklava"), (2, "tacos")) for k in range(3)]
    write_lines(tmp_path / "train.jsonl", train)
    write_lines(tmp_path / "test.jsonl", [food_row("tacos_3", 2)])
    return tmp_path


def test_food101_numbers_give_the_order(food: Path) -> None:
    assert adapter("food101", food).classes == ("tacos", "baklava")
    rows = rows_of("food101", food)
    assert rows[0] == RawSample(
        key="baklava_0",
        label="baklava",
        split="train",
        media={
            "text": Text("a title"),
            "image": Stills(("images/train/baklava/baklava_0.jpg",)),
        },
    )
    last = rows[-1]
    assert isinstance(last, RawSample)
    assert (last.key, last.label, last.split) == ("tacos_3", "tacos", "test")
    assert image_of(last) == "images/test/tacos/tacos_3.jpg"


def test_food101_label_against_its_folder(food: Path) -> None:
    """Numbers belong to folders by majority; a row against it keeps its number, as no class."""
    odd = [food_row("tacos_8", 7), food_row("tacos_9", 999), food_row("tako_0", 2)]
    write_lines(food / "test.jsonl", odd)
    source = adapter("food101", food)
    assert source.classes == ("tacos", "baklava")
    labels = [row.label for row in samples_of("food101", food) if row.split == "test"]
    assert labels == ["7", "999", "2"]
    assert not set(labels) & set(source.classes)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"img": "tacos/x.jpg", "label', "no JSON (Unterminated string"),
        ("[1, 2]", "a JSON list, no object"),
        ({"label": 2, "text": "t"}, "img is None; `class/file` is needed"),
        ({"img": "x.jpg", "label": 2, "text": "t"}, "img is 'x.jpg'; `class/file` is needed"),
        ({"img": "tacos/x.jpg", "label": 2.5, "text": "t"}, "label is 2.5; a number or a name"),
        ({"img": "tacos/x.jpg", "text": "t"}, "label is None; a number or a name"),
        ({"img": "tacos/x.jpg", "label": 2, "text": None}, "text is None; a string is needed"),
    ],
)
def test_food101_bad_row(food: Path, line: object, reason: str) -> None:
    write_lines(food / "test.jsonl", [food_row("tacos_3", 2), line, food_row("tacos_4", 2)])
    rows = rows_of("food101", food)
    assert len(rows) == 9
    bad = rows[7]
    assert isinstance(bad, Unreadable)
    assert (bad.key, bad.split) == ("test.jsonl line 2", "test")
    assert bad.reason.startswith(reason)


def test_food101_mmbt_form(tmp_path: Path) -> None:
    """Names for labels, paths from the root, and the 5000 rows of dev.jsonl are validation."""
    for name, folder, number in (("train", "train", 0), ("dev", "train", 1), ("test", "test", 2)):
        row = {
            "id": f"tacos_tacos_{number}.jpg",
            "label": "tacos",
            "text": "page text",
            "img": f"images/{folder}/tacos/tacos_{number}.jpg",
        }
        write_lines(tmp_path / f"{name}.jsonl", [row])
    (tmp_path / "images").mkdir()
    assert adapter("food101", tmp_path).classes == ("tacos",)
    assert [(s.key, s.label, s.split, image_of(s)) for s in samples_of("food101", tmp_path)] == [
        ("tacos_0", "tacos", "train", "images/train/tacos/tacos_0.jpg"),
        ("tacos_1", "tacos", "val", "images/train/tacos/tacos_1.jpg"),
        ("tacos_2", "tacos", "test", "images/test/tacos/tacos_2.jpg"),
    ]


@pytest.mark.parametrize("header", [[], [["Image_path", "text", "label"]]])
def test_food101_titles_form(tmp_path: Path, header: list[list[str]]) -> None:
    (tmp_path / "images").mkdir()
    texts = tmp_path / "texts"
    rows = [["tacos_0.jpg", 'Tacos, "best"\nof all', "tacos"], ["pho_0.jpg", "Pho", "pho"]]
    write_csv(texts / "train_titles.csv", header + rows)
    write_csv(texts / "test_titles.csv", [*header, ["tacos_1.jpg", "cut off"]])
    assert adapter("food101", tmp_path).classes == ("pho", "tacos")
    tacos, pho = samples_of("food101", tmp_path)
    assert (tacos.key, tacos.label, text_of(tacos)) == ("tacos_0", "tacos", 'Tacos, "best"\nof all')
    assert image_of(pho) == "images/train/pho/pho_0.jpg"
    assert unreadable_of("food101", tmp_path) == [
        Unreadable(
            f"test_titles.csv line {1 + len(header)}",
            "2 cells; image, text, class are needed",
            "test",
        )
    ]


def test_food101_m3col_form(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    header = ["id", "text", "annotation", "label"]
    rows = [["tacos_0.jpg", "Tacos", "tacos", 0], ["pho_0.jpg", "Pho", "pho", 1]]
    write_csv(tmp_path / "train.csv", [header, *rows])
    write_csv(tmp_path / "test.csv", [header, ["pho_1.jpg", "Pho", "pho", 0]])
    assert adapter("food101", tmp_path).classes == ("tacos", "pho")
    samples = samples_of("food101", tmp_path)
    assert [(s.key, s.label, s.split) for s in samples] == [
        ("tacos_0", "tacos", "train"),
        ("pho_0", "pho", "train"),
        ("pho_1", "0", "test"),
    ]
    assert image_of(samples[2]) == "images/test/pho/pho_1.jpg"


def test_food101_prefers_jsonl(food: Path) -> None:
    write_csv(food / "train.csv", [["pho_0.jpg", "Pho", "pho", 1]])
    write_csv(food / "test.csv", [["pho_1.jpg", "Pho", "pho", 1]])
    assert adapter("food101", food).classes == ("tacos", "baklava")


def test_food101_no_index(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"lacks train\.jsonl, test\.jsonl, .*holds images; give"):
        adapter("food101", tmp_path)


def test_food101_recipes(food: Path) -> None:
    """The official recipe cleans as the release does, the default strips."""
    title = " RT #tacos see http://x.org/1 now "
    write_lines(food / "test.jsonl", [food_row("tacos_3", 2, title)])
    assert text_of(samples_of("food101", food)[-1]) == title.strip()
    official = samples_of("food101", food, recipe="official")[-1]
    assert text_of(official) == " RT tacos see "  # "RT" goes at the very start only


def test_food101_blank_text(food: Path) -> None:
    """Left out, also where only the official cleaning leaves nothing."""
    texts = [" ", "http://x.org/1"]
    write_lines(food / "test.jsonl", [food_row(f"tacos_{k}", 2, t) for k, t in enumerate(texts, 3)])

    def with_text(recipe: str) -> list[bool]:
        return ["text" in row.media for row in samples_of("food101", food, recipe=recipe)[-2:]]

    assert with_text("default") == [False, True]
    assert with_text("official") == [False, False]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("RT  Tacos", "Tacos"),
        ("RTacos", "RTacos"),
        ("Tacos #easy #1 | http://a.org/b c", "Tacos easy 1 | "),
        ("see https://a.org all\r\n\nnext line", "see next line"),
        ("ftp://a.org stays", "ftp://a.org stays"),
    ],
)
def test_clean_title(text: str, cleaned: str) -> None:
    assert clean_title(text) == cleaned


# --- N24News


def news_item(number: int, section: object, **fields: object) -> dict[str, object]:
    return {
        "section": section,
        "headline": f"headline {number}",
        "caption": f" caption {number} ",
        "abstract": f"abstract {number}",
        "article": f"article {number}",
        "image_id": f"image-{number}",
        "article_url": f"https://example.org/{number // 2}.html",
        **fields,
    }


@pytest.fixture
def news(tmp_path: Path) -> Path:
    (tmp_path / "imgs").mkdir()
    train = [news_item(0, "Sports"), news_item(1, "Weather"), news_item(2, "Books")]
    write_json(tmp_path / "news" / "nytimes_train.json", train)
    write_json(tmp_path / "news" / "nytimes_dev.json", [news_item(3, "Health")])
    write_json(tmp_path / "news" / "nytimes_test.json", [news_item(4, "Books")])
    return tmp_path


def test_n24news(news: Path) -> None:
    assert len(SECTIONS) == len(set(SECTIONS)) == 24
    assert (SECTIONS[7], SECTIONS[18], SECTIONS[23]) == ("Media", "Theater", "Global Business")
    assert adapter("n24news", news).classes == ("Health", "Books", "Sports")
    rows = samples_of("n24news", news)
    assert [(row.key, row.label, row.split) for row in rows] == [
        ("image-0", "Sports", "train"),
        ("image-1", "Weather", "train"),
        ("image-2", "Books", "train"),
        ("image-3", "Health", "val"),
        ("image-4", "Books", "test"),
    ]
    assert rows[0].media == {"text": Text("caption 0"), "image": Stills(("imgs/image-0.jpg",))}
    assert rows[0].group == rows[1].group == "https://example.org/0.html" != rows[2].group


@pytest.mark.parametrize("text", ["headline", "caption", "abstract", "article"])
def test_n24news_text(news: Path, text: str) -> None:
    assert text_of(samples_of("n24news", news, text=text)[3]) == f"{text} 3"


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_n24news_without_text(news: Path, caption: str | None) -> None:
    write_json(news / "news" / "nytimes_dev.json", [news_item(3, "Health", caption=caption)])
    assert samples_of("n24news", news)[3].media == {"image": Stills(("imgs/image-3.jpg",))}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"image_id": None}, "image_id is None; the name of an image is needed"),
        (news_item(1, "Books", image_id=""), "image_id is ''; the name of an image is needed"),
        (news_item(1, None), "section is None; a name is needed"),
        ("Books", "a JSON str, no object"),
    ],
)
def test_n24news_bad_item(news: Path, item: object, reason: str) -> None:
    write_json(news / "news" / "nytimes_dev.json", [news_item(3, "Health"), item])
    bad = Unreadable("nytimes_dev.json item 2", reason, "val")
    assert unreadable_of("n24news", news) == [bad]


def test_n24news_build_script_form(tmp_path: Path) -> None:
    """One list without partition, images/ for imgs/, and body for article."""
    (tmp_path / "images").mkdir()
    item = news_item(0, "Books", body="the body")
    del item["article"]
    write_json(tmp_path / "nytimes_dataset_full.json", [item])
    (row,) = samples_of("n24news", tmp_path, text="article")
    assert row.media == {"text": Text("the body"), "image": Stills(("images/image-0.jpg",))}
    assert (row.label, row.split) == ("Books", "train")


def test_n24news_missing_parts(news: Path) -> None:
    (news / "news" / "nytimes_dev.json").unlink()
    (news / "imgs").rmdir()
    with pytest.raises(DataError, match=r"lacks news/nytimes_dev\.json, imgs, which n24news needs"):
        adapter("n24news", news)


def test_n24news_broken_index(news: Path) -> None:
    (news / "news" / "nytimes_dev.json").write_text('[{"section": "Books"')
    with pytest.raises(DataError, match=r"nytimes_dev\.json is no JSON .*; get the file again"):
        adapter("n24news", news)


# --- Twitter2015

TWEETS = (
    "1\t2\t1860693.jpg\tRT @ ltsChuckBass : $T$ is everything # MCM\tChuck Bass",
    '2\t1\t1860693.jpg\tRT @ ltsChuckBass : Chuck Bass is "everything $T$\t# MCM',
    "3\t0\t17.jpg\tno $T$ today\tpie",
)


def write_twitter(folder: Path, train: Sequence[str] = TWEETS) -> None:
    head = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String"
    write_lines(folder / "train.tsv", [head, *train])
    write_lines(folder / "dev.tsv", [head, "1\t1\t5.jpg\tsee $T$\tBob"])
    write_lines(folder / "test.tsv", [head.replace("#1 Label\t", ""), "1\t0\t6.jpg\t$T$ !\tEve"])


def test_twitter2015(tmp_path: Path) -> None:
    write_twitter(tmp_path)
    (tmp_path / "images").mkdir()
    rows = samples_of("twitter2015", tmp_path)
    assert [(row.key, row.label, row.split, row.group) for row in rows] == [
        ("train-1", "positive", "train", "1860693.jpg"),
        ("train-2", "neutral", "train", "1860693.jpg"),
        ("train-3", "negative", "train", "17.jpg"),
        ("dev-1", "neutral", "val", "5.jpg"),
        ("test-1", "negative", "test", "6.jpg"),
    ]
    text = "RT @ ltsChuckBass : Chuck Bass is everything # MCM [SEP] Chuck Bass"
    assert rows[0].media == {"text": Text(text), "image": Stills(("images/1860693.jpg",))}
    assert text_of(rows[1]).endswith('Chuck Bass is "everything # MCM [SEP] # MCM')


def test_twitter2015_official_text(tmp_path: Path) -> None:
    """As TomBERT's two texts: lower case, the mark stays, and the separator as BERT knows it."""
    write_twitter(tmp_path)
    (tmp_path / "images").mkdir()
    first = samples_of("twitter2015", tmp_path, recipe="official")[0]
    assert text_of(first) == "rt @ ltschuckbass : $t$ is everything # mcm [SEP] chuck bass"


@pytest.mark.parametrize(
    ("texts", "images"),
    [
        ("twitter2015", "twitter2015_images"),
        ("absa_data/twitter2015", "absa_data/twitter2015_images"),
        (".", "twitter2015_images"),
    ],
)
def test_twitter2015_folders(tmp_path: Path, texts: str, images: str) -> None:
    write_twitter(tmp_path / texts)
    (tmp_path / images).mkdir(parents=True)
    assert image_of(samples_of("twitter2015", tmp_path)[2]) == f"{images}/17.jpg"


def test_twitter2015_odd_rows(tmp_path: Path) -> None:
    odd = ["4\t7\t8.jpg\tunknown label of $T$\tAnn", "5\t1\t9.jpg\tno target", "6\t1\t\tno $T$\tid"]
    write_twitter(tmp_path, [*TWEETS, *odd])
    (tmp_path / "images").mkdir()
    assert samples_of("twitter2015", tmp_path)[3].label == "7"
    assert unreadable_of("twitter2015", tmp_path) == [
        Unreadable("train.tsv line 6", "4 filled cells, 5 are needed", "train"),
        Unreadable("train.tsv line 7", "4 filled cells, 5 are needed", "train"),
    ]


def test_twitter2015_without_images(tmp_path: Path) -> None:
    write_twitter(tmp_path)
    with pytest.raises(DataError, match="lacks twitter2015_images, which twitter2015 needs"):
        adapter("twitter2015", tmp_path)


# --- MMSD


def write_mmsd(folder: Path, texts: str, train: Sequence[object]) -> None:
    (folder / "dataset_image").mkdir(parents=True, exist_ok=True)
    write_json(folder / texts / "train.json", train)
    write_json(folder / texts / "valid.json", [{"image_id": ID + 2, "text": "v", "label": 0}])
    write_json(folder / texts / "test.json", [{"image_id": ID + 3, "text": "t", "label": 1}])


@pytest.mark.parametrize("above", ["", "data/"])
def test_mmsd(tmp_path: Path, above: str) -> None:
    """From the repository and from its folder data; MMSD2.0 goes first; ids keep all digits."""
    train = [
        {"image_id": ID, "text": "love waiting ", "label": 1},
        {"image_id": str(ID + 1), "text": "plain", "label": 0},
        {"image_id": ID + 4, "text": "odd", "label": 5},
    ]
    write_mmsd(tmp_path / above, "text_json_clean", [])
    write_mmsd(tmp_path / above, "text_json_final", train)
    rows = samples_of("mmsd", tmp_path)
    assert [(row.key, row.label, row.split) for row in rows] == [
        ("862902619928506372", "sarcastic", "train"),
        ("862902619928506373", "not_sarcastic", "train"),
        ("862902619928506376", "5", "train"),
        ("862902619928506374", "not_sarcastic", "val"),
        ("862902619928506375", "sarcastic", "test"),
    ]
    image = f"{above}dataset_image/862902619928506372.jpg"
    assert rows[0].media == {"text": Text("love waiting"), "image": Stills((image,))}
    assert adapter("mmsd", tmp_path).classes == ("not_sarcastic", "sarcastic")


def test_mmsd_first_version(tmp_path: Path) -> None:
    item = {"image_id": ID, "text": " ", "label": 1, "1": 0}
    write_mmsd(tmp_path, "text_json_clean", [item])
    rows = samples_of("mmsd", tmp_path)
    assert [row.key for row in rows] == [str(ID + k) for k in (0, 2, 3)]
    assert list(rows[0].media) == ["image"]  # its text is blank


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"text": "a", "label": 1}, "image_id is None; a whole number is needed"),
        (
            {"image_id": float(ID), "text": "a", "label": 1},
            "image_id is 8.629026199285064e+17; a whole number is needed",
        ),
        ({"image_id": ID, "label": 1}, "text is None; a string is needed"),
        ({"image_id": ID, "text": "a"}, "label is None; 0 or 1 is needed"),
        ([ID, "a", 1], "a JSON list, no object"),
    ],
)
def test_mmsd_bad_item(tmp_path: Path, item: object, reason: str) -> None:
    write_mmsd(tmp_path, "text_json_final", [item])
    assert unreadable_of("mmsd", tmp_path) == [Unreadable("train.json item 1", reason, "train")]


def test_mmsd_without_images(tmp_path: Path) -> None:
    write_mmsd(tmp_path, "text_json_final", [])
    (tmp_path / "dataset_image").rmdir()
    with pytest.raises(DataError, match="lacks dataset_image, which mmsd needs.*give `--data.root"):
        adapter("mmsd", tmp_path)
