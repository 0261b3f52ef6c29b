"""The data card says what is in a set, shows it, and lets no text through unescaped."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from data.audit import audit
from data.card import write_card
from data.document import Bar, Paragraph, Table, to_html, to_markdown
from data.pictures import decode_jpeg, encode_jpeg
from data.schema import Manifest, Modality, Split
from tests.data.prepared_sets import Row, smooth_picture, spectrogram, token_ids, write_set

EVIL = '<script>alert("1")</script>'
MODALITIES = (
    Modality(
        name="visual",
        kind="frames",
        shape=(2, 3, 24, 24),
        train_shape=(2, 3, 32, 32),
        candidates=3,
        dtype="uint8",
        storage="jpeg",
        scale=255.0,
        about="RGB, bilinear to 24",
    ),
    Modality(name="flow", kind="flow", shape=(2, 2, 16, 16), dtype="uint8", scale=255.0),
    Modality(name="image", kind="image", shape=(1, 8, 8), dtype="float32", optional=True),
    Modality(name="audio", kind="audio", shape=(1, 100, 40), dtype="float16"),
    Modality(name="text", kind="text", shape=(20,), dtype="int32", vocab_size=9000),
    Modality(name="omics", kind="vector", shape=(30,), dtype="float32"),
    Modality(name="track", kind="sequence", shape=(12, 5), dtype="float32"),
)
REJECTED = [
    *((f"clip-{i}", "train", f"visual: frames/clip-{i}.jpg does not exist") for i in range(4)),
    ("a|b", "val", "label 'x|y' is none of cat, dog"),
    (EVIL, "test", f"visual: {EVIL} does not exist\nat all"),
]


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    @property
    def pictures(self) -> list[Image.Image]:
        sources = [v for tag, name, v in self.attributes if (tag, name) == ("img", "src")]
        files = [base64.b64decode(source.partition(";base64,")[2]) for source in sources]
        return [Image.open(io.BytesIO(file)) for file in files]


def make_row(rng: np.random.Generator, key: str, label: int, split: Split) -> Row:
    visual, flow = MODALITIES[0].stored(split), MODALITIES[1].stored(split)
    items: dict[str, np.ndarray | bytes] = {
        "visual": encode_jpeg(
            np.stack([smooth_picture(rng, visual[-1]) for _ in range(visual[0])])
        ),
        "flow": np.stack([smooth_picture(rng, flow[-1], 2) for _ in range(flow[0])]),
        "image": rng.standard_normal((1, 8, 8)).astype(np.float32),
        "audio": spectrogram(rng, 100, 40, 60).astype(np.float16),
        "text": token_ids(rng, 20, 15),
        "omics": rng.standard_normal(30).astype(np.float32),
        "track": rng.standard_normal((12, 5)).astype(np.float32),
    }
    return Row(key, label, items, group=f"actor {label}")


@pytest.fixture
def prepared(tmp_path: Path) -> Manifest:
    rng = np.random.default_rng(0)
    train = [make_row(rng, f"train-{i}", int(i > 3), "train") for i in range(10)]
    without = {name: item for name, item in train[1].items.items() if name != "image"}
    train[0] = Row(EVIL, 0, train[0].items, "actor <i>")
    train[1] = Row("no|image", 0, without)
    test = [make_row(rng, f"test-{i}", 0, "test") for i in range(3)]
    test[0] = Row("copy", 1, {**test[0].items, "text": train[4].items["text"]}, "actor <i>")
    splits: dict[Split, list[Row]] = {
        "train": train,
        "val": [make_row(rng, "val-0", 1, "val")],
        "test": test,
    }
    return write_set(tmp_path, MODALITIES, splits, classes=("<b>cat</b>", "dog"))


def cards(folder: Path, manifest: Manifest) -> tuple[str, str]:
    paths = write_card(folder, manifest, audit(folder, manifest), REJECTED)
    assert paths == (f"{folder}/card.md", f"{folder}/card.html")
    return (folder / "card.md").read_text(), (folder / "card.html").read_text()


def test_page_has_only_our_tags_and_nothing_from_elsewhere(prepared: Manifest, tmp_path: Path):
    _, html = cards(tmp_path, prepared)
    page = Page(html)
    document = {"html", "head", "meta", "title", "style", "body", "div"}
    tables = {"table", "thead", "tbody", "tr", "th", "td"}
    words = {"h1", "h2", "p", "ul", "li", "b", "span", "pre"}
    assert set(page.tags) == document | tables | words | {"figure", "figcaption", "img"}
    assert {name for _, name, _ in page.attributes} <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "style", "src", "alt"),
    }
    assert all(v.startswith("data:image/") for _, name, v in page.attributes if name == "src")
    assert "://" not in html
    assert "<script" not in html
    assert EVIL in page.text
    assert "<b>cat</b>" in page.text
    assert f"visual: {EVIL} does not exist at all" in page.text


def test_markdown_shows_text_as_it_is(prepared: Manifest, tmp_path: Path):
    markdown, _ = cards(tmp_path, prepared)
    assert "<" not in markdown
    assert '&lt;script&gt;alert("1")&lt;/script&gt;' in markdown
    assert "| &lt;b&gt;cat&lt;/b&gt; | 4 | 0 | 2 |" in markdown
    widths: set[int] = set()
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            lines = [len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()]
            assert len(set(lines)) == 1  # no text has opened a column
            widths |= set(lines)
    assert len(widths) > 2


def test_both_say_the_same(prepared: Manifest, tmp_path: Path):
    markdown, html = cards(tmp_path, prepared)
    page = Page(html).text
    for text in (markdown, page):
        assert prepared.digest in text
        assert "10 train, 1 val, 3 test" in text
        assert "2 x 3 x 24 x 24 (train: 6 x 3 x 32 x 32)" in text
        assert "RGB, bilinear to 24" in text
        assert "The largest class is 60.0 % of train, 100.0 % of val, 66.7 % of test" in text
        assert "6 (30.0 %) of 20 samples were left out." in text
        assert json.dumps(prepared.source, indent=2) in text
    audio_bytes = 100 * 40 * 2
    assert f"| float16, tensor | {audio_bytes:,} |" in markdown


def test_verdict_comes_first(prepared: Manifest, tmp_path: Path):
    markdown, html = cards(tmp_path, prepared)
    verdict = (
        "All 3 groups are on both sides of the split: test accuracy says nothing about unseen "
        "groups (actors, speakers, source videos). Use --data.split grouped."
    )
    assert markdown.startswith(f"# Data card: toy\n\n**{verdict}**\n")
    assert f'<p class="verdict bad">{verdict}</p>' in html
    assert "- 1 of 3 test items of text (33.3 %) are byte for byte also in train." in markdown
    assert "| text | identical | train-4 (train, dog) | copy (test, dog) |" in markdown
    assert "| text | identical | 1 | 0 | 0 | 0 | 0 |" in markdown


def test_rejected_samples_are_grouped_by_reason(prepared: Manifest, tmp_path: Path):
    markdown, _ = cards(tmp_path, prepared)
    rows = [line for line in markdown.splitlines() if "clip-0" in line or "x\\|y" in line]
    first = "; ".join(f"clip-{i}: visual: frames/clip-{i}.jpg does not exist" for i in range(3))
    assert rows == [
        f"| visual: … does not exist | 4 | 0 | 0 | {first} |",
        "| label … is none of cat, dog | 0 | 1 | 0 | a\\|b: label 'x\\|y' is none of cat, dog |",
    ]


def test_missing_items_are_counted_and_named(prepared: Manifest, tmp_path: Path):
    markdown, html = cards(tmp_path, prepared)
    assert "| image | 1 (10.0 %) | 0 (0.0 %) | 0 (0.0 %) |" in markdown
    assert "<span>image</span><p>missing</p>" in html


def test_pictures_can_be_opened(prepared: Manifest, tmp_path: Path):
    """Six samples: two frames side by side, two flows of two channels, an image, two heat maps."""
    page = Page(cards(tmp_path, prepared)[1])
    sizes = [(picture.format, picture.size) for picture in page.pictures]
    assert sizes.count(("JPEG", (64, 32))) == 6
    assert sizes.count(("PNG", (64, 16))) == 6
    assert sizes.count(("PNG", (8, 8))) == 5  # one is missing
    assert sizes.count(("PNG", (300, 96))) == 12
    assert len(sizes) == 29


def test_shown_frames_are_the_middle_candidates(prepared: Manifest, tmp_path: Path):
    """Of six stored pictures 1 and 4, up to JPEG."""
    rng = np.random.default_rng(0)
    row = make_row(rng, "", 0, "train")  # the first one of the fixture
    data = row.items["visual"]
    assert isinstance(data, bytes)
    pictures = np.zeros((2, 3, 32, 32), np.uint8)
    decode_jpeg(data, [1, 4], pictures)
    shown = np.asarray(Page(cards(tmp_path, prepared)[1]).pictures[0]).astype(int)
    expected = np.concatenate(list(pictures), axis=-1).transpose(1, 2, 0)
    assert np.abs(shown - expected).mean() < 10
    assert np.abs(shown - np.roll(expected, 32, axis=1)).mean() > 20


def test_spectrograms_lie_with_time_to_the_right(prepared: Manifest, tmp_path: Path):
    """Padding is the right 40 %: one colour."""
    picture = np.asarray(Page(cards(tmp_path, prepared)[1]).pictures[3].convert("RGB"))
    assert np.ptp(picture[:, 200:], axis=(0, 1)).max() == 0
    assert np.ptp(picture[:, :160], axis=(0, 1)).max() > 100


def test_samples_shown_are_of_all_classes(prepared: Manifest, tmp_path: Path):
    page = Page(cards(tmp_path, prepared)[1]).text
    gallery = page[page.index("Samples\n", page.index("Modalities")) :]
    for key in (EVIL, "no|image", "train-2", "train-3", "train-4", "train-5"):
        assert key in gallery


def test_texts_are_read_with_the_tokenizer_of_the_set(tmp_path: Path):
    vocab = {"[PAD]": 0, "hello": 1, EVIL: 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tokenizer-text.json").write_text(tokenizer.to_str())
    text = Modality(name="text", kind="text", shape=(4,), dtype="int32", vocab_size=3)
    rows = [Row("a", 0, {"text": np.array([1, 2, 0, 0], np.int32)})]
    kept = write_set(tmp_path, [text], {"train": rows}, files={"tokenizer-text.json": ""})
    assert f"2 of 4 tokens: hello {EVIL}" in Page(cards(tmp_path, kept)[1]).text
    lost = write_set(tmp_path, [text], {"train": rows})
    assert "2 of 4 tokens: 1 2" in Page(cards(tmp_path, lost)[1]).text


def test_equal_sets_have_equal_cards(prepared: Manifest, tmp_path: Path):
    first = cards(tmp_path, prepared)
    assert cards(tmp_path, prepared) == first
    assert str(tmp_path) not in "".join(first)


def test_a_clean_set_has_a_good_verdict(tmp_path: Path):
    rng = np.random.default_rng(1)
    vector = Modality(name="omics", kind="vector", shape=(8,), dtype="float32")
    splits: dict[Split, list[Row]] = {
        "train": [Row("a", 0, {"omics": rng.standard_normal(8).astype(np.float32)})],
        "test": [Row("b", 1, {"omics": rng.standard_normal(8).astype(np.float32)})],
    }
    manifest = write_set(tmp_path, [vector], splits)
    write_card(tmp_path, manifest, audit(tmp_path, manifest), [])
    html = (tmp_path / "card.html").read_text()
    assert '<p class="verdict good">No sample and no near copy' in html
    assert "<h2>Rejected samples</h2>\n<p>None.</p>" in html
    assert "Duplicates and leaks" not in html


def test_control_and_direction_characters_are_replaced():
    blocks = [Paragraph("a\u202eb\x1b[31mc\x00"), Table(["k"], [["line\nbreak"]])]
    assert (
        to_markdown("t", blocks)
        == "# t\n\na\ufffdb\ufffd\\[31mc\ufffd\n\n| k |\n| --- |\n| line break |\n"
    )
    assert "<p>a\ufffdb\ufffd[31mc\ufffd</p>" in to_html("t", blocks)


def test_long_tables_are_folded_and_bars_have_lengths():
    table = Table(["class", "rows", "all"], [[f"c{i}", str(i), Bar(i / 50)] for i in range(51)])
    html = to_html("t", [table])
    assert "<details><summary>51 rows</summary>" in html
    assert '<td>c25</td><td class="number">25</td><td class="bar"><div style="width:50.0%">' in html
    assert "| c25 | 25 | ██████████ |" in to_markdown("t", [table])
