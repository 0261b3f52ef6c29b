"""FSDD with MNIST: the pairing rules on a small generated tree and on the real files."""

import gzip
import os
import struct
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.schema import DataError
from data.sources import DataConfig, Item, RejectedSample, build_source

SHARED = Path(
    os.environ.get("MIDAS_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)
SPEAKERS = ("ann", "bob", "cat")
NUM_INDICES = 12
needs_shared = pytest.mark.skipif(
    not (SHARED / "fsdd").is_dir(), reason="needs fsdd/ and mnist/; set MIDAS_SHARED_DATA"
)


def write_wav(path: Path, samples: np.ndarray, rate: int = 8000, channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def write_mnist(folder: Path, stem: str, images: np.ndarray, labels: np.ndarray) -> None:
    head = struct.pack(">4I", 2051, len(images), 28, 28)
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    head = struct.pack(">2I", 2049, len(labels))
    (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + labels.tobytes()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """10 digits x 3 speakers x 12 recordings; 400 training and 500 test images."""
    rng = np.random.default_rng(0)
    (tmp_path / "fsdd").mkdir()
    (tmp_path / "mnist").mkdir()
    for digit in range(10):
        for speaker in SPEAKERS:
            for index in range(NUM_INDICES):
                path = tmp_path / "fsdd" / f"{digit}_{speaker}_{index}.wav"
                write_wav(path, rng.integers(-3000, 3000, size=800))
    for stem, count in {"train": 400, "t10k": 500}.items():
        images = rng.integers(0, 256, size=(count, 28, 28), dtype=np.uint8)
        write_mnist(tmp_path / "mnist", stem, images, (np.arange(count) % 10).astype(np.uint8))
    return tmp_path


def avdigits(root: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"name": "avdigits", "root": str(root), **settings})


def item_of(items: list[Item], stem: str) -> Item:
    return next(item for item in items if item.key.startswith(f"{stem}+"))


def test_splits_by_index(root: Path) -> None:
    items = build_source(avdigits(root)).items()
    assert [item.sample_id for item in items] == list(range(360))
    for item in items:
        recording, image = item.key.split("+")
        digit, _, index = recording.split("_")
        assert item.label == digit
        expected = "test" if int(index) < 5 else "val" if int(index) < 10 else "train"
        assert item.split == expected
        assert image.startswith("t10k" if expected == "test" else "train")
    assert len({item.key.split("+")[1] for item in items}) == 360  # no image twice


def test_three_images_per_test_recording(root: Path) -> None:
    one = build_source(avdigits(root)).items()
    three = build_source(avdigits(root, test_images_per_recording=3)).items()
    assert Counter(i.split for i in three) == {"test": 450, "val": 150, "train": 60}
    assert [i for i in three if i.split != "test"] == [i for i in one if i.split != "test"]
    # Test images of digit 7 are 7, 17, ..., 497; recording 1 of it gets shuffled images 3, 4, 5.
    order = np.random.default_rng([2025, 7]).permutation(50)
    keys = [i.key for i in three if i.key.startswith("7_ann_1+")]
    assert keys == [f"7_ann_1+t10k-{7 + 10 * order[k]:05d}" for k in (3, 4, 5)]


def test_unseen_speakers(root: Path) -> None:
    config = avdigits(root, split="unseen_speakers")
    for item in build_source(config).items():
        _, speaker, index = item.key.split("+")[0].split("_")
        expected = "val" if 5 <= int(index) < 10 else "train"
        assert item.split == ("test" if speaker in ("bob", "cat") else expected)


def test_tensors_against_the_raw_files(root: Path) -> None:
    source = build_source(avdigits(root))
    items = source.items()
    item = item_of(items, "4_bob_11")
    raw = gzip.decompress((root / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    position = int(item.key[-5:])
    pixels = np.frombuffer(raw, np.uint8).reshape(-1, 28, 28)[position] / 255
    arrays = source.load(item)
    np.testing.assert_allclose(arrays["image"][0], (pixels - 0.1307) / 0.3081, atol=1e-5)
    train = np.stack([source.load(i)["audio"] for i in items if i.split == "train"])
    assert train.shape == (60, 1, 40, 100)
    assert train.mean() == pytest.approx(0.0, abs=1e-4)
    assert train.std() == pytest.approx(1.0, abs=1e-4)
    assert arrays["audio"].dtype == arrays["image"].dtype == np.float32


def test_noise_is_fixed_per_sample(root: Path) -> None:
    clean = build_source(avdigits(root))
    noisy = build_source(avdigits(root, noise={"audio": 2.0}))
    again = build_source(avdigits(root, noise={"audio": 2.0}))
    item = clean.items()[17]
    difference = noisy.load(item)["audio"] - clean.load(item)["audio"]
    assert difference.std() == pytest.approx(2.0, rel=0.05)
    np.testing.assert_array_equal(noisy.load(item)["audio"], again.load(item)["audio"])
    np.testing.assert_array_equal(noisy.load(item)["image"], clean.load(item)["image"])


def test_rate_is_read_from_the_file(root: Path) -> None:
    tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    write_wav(root / "fsdd" / "3_bob_0.wav", tone, rate=16000)
    write_wav(root / "fsdd" / "3_bob_1.wav", tone[::2])
    source = build_source(avdigits(root))
    items = source.items()
    fast, slow = (source.load(item_of(items, f"3_bob_{i}"))["audio"] for i in (0, 1))
    assert fast[0, :, 50].argmax() == slow[0, :, 50].argmax()
    assert fast[0, :, 50].max() == pytest.approx(slow[0, :, 50].max(), abs=0.01)


def test_a_quiet_speaker_looks_like_a_loud_one(root: Path) -> None:
    tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    write_wav(root / "fsdd" / "3_bob_0.wav", tone)
    write_wav(root / "fsdd" / "3_bob_1.wav", tone / 20)
    source = build_source(avdigits(root))
    items = source.items()
    loud, quiet = (source.load(item_of(items, f"3_bob_{i}"))["audio"] for i in (0, 1))
    band = loud[0, :, 50].argmax()
    assert quiet[0, band, 50] == pytest.approx(loud[0, band, 50], abs=0.02)


def test_unreadable_recordings_are_rejected(root: Path) -> None:
    fsdd = root / "fsdd"
    cut = fsdd / "3_bob_0.wav"
    cut.write_bytes(cut.read_bytes()[:-100])
    (fsdd / "3_bob_1.wav").write_bytes(b"RIFF")
    write_wav(fsdd / "3_bob_2.wav", np.zeros(800), channels=2)
    write_wav(fsdd / "3_bob_11.wav", np.zeros(0))
    source = build_source(avdigits(root))
    items = source.items()
    for stem, reason in {
        "3_bob_0": "750 samples, and the header says 800",
        "3_bob_1": "not a readable wav file",
        "3_bob_2": "2 channels of 16 bit; mono 16 bit expected",
        "3_bob_11": "0 samples",
    }.items():
        with pytest.raises(RejectedSample, match=reason):
            source.load(item_of(items, stem))


def test_cut_image_file_rejects_what_is_missing(root: Path) -> None:
    path = root / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = build_source(avdigits(root))
    test = [item for item in source.items() if item.split == "test"]
    test.sort(key=lambda item: item.key[-5:])  # by position in the file
    assert source.load(test[0])["image"].shape == (1, 28, 28)
    with pytest.raises(RejectedSample, match="t10k-images-idx3-ubyte.gz is cut off: it holds 2"):
        source.load(test[-1])


def test_cut_label_file(root: Path) -> None:
    path = root / "mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(DataError, match="399 labels and its header says 400.*download it again"):
        build_source(avdigits(root)).items()


def test_files_swapped(root: Path) -> None:
    mnist = root / "mnist"
    (mnist / "train-images-idx3-ubyte.gz").rename(mnist / "train-labels-idx1-ubyte.gz")
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(DataError, match="starts with 2051, idx magic 2049 expected"):
        build_source(avdigits(root)).items()


def test_wrong_root(root: Path) -> None:
    with pytest.raises(DataError, match=r"not set.*--data\.root DIR` with fsdd/"):
        build_source(DataConfig(name="avdigits"))
    with pytest.raises(DataError, match="nowhere is not a folder; give `--data.root DIR`"):
        build_source(avdigits(root / "nowhere"))
    with pytest.raises(DataError, match=r"lacks fsdd, mnist/.*it holds 0_ann_0.*352 more; give"):
        build_source(avdigits(root / "fsdd"))
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"lacks mnist/t10k-labels-idx1-ubyte\.gz, which avdigits"):
        build_source(avdigits(root))


def test_misnamed_recording(root: Path) -> None:
    (root / "fsdd" / "seven.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"seven\.wav is not named {digit}_{speaker}_{index}\.wav"):
        build_source(avdigits(root)).items()


def test_too_few_images(root: Path) -> None:
    config = avdigits(root, test_images_per_recording=4)
    with pytest.raises(DataError, match=r"50 images of digit 0 and 0_cat_2 would need number 52"):
        build_source(config).items()


@needs_shared
def test_real_pairing_of_one_digit_by_hand() -> None:
    items = build_source(avdigits(SHARED)).items()
    assert Counter(i.split for i in items) == {"train": 2400, "val": 300, "test": 300}
    digit = 6
    raw = gzip.decompress((SHARED / "mnist" / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    positions = [place for place, label in enumerate(raw) if label == digit]
    order = np.random.default_rng([2025, digit]).permutation(len(positions))
    names = sorted(name for name in os.listdir(SHARED / "fsdd") if name.startswith(f"{digit}_"))
    stems = [name[:-4] for name in names if int(name[:-4].split("_")[2]) >= 5]
    expected = [f"{stem}+train-{positions[order[k]]:05d}" for k, stem in enumerate(stems)]
    assert len(expected) == 270
    assert [i.key for i in items if i.label == "6" and i.split != "test"] == expected


@needs_shared
def test_real_unseen_speakers_and_three_images() -> None:
    config = avdigits(SHARED, split="unseen_speakers")
    items = build_source(config).items()
    assert Counter(i.split for i in items) == {"train": 1800, "val": 200, "test": 1000}
    assert {i.key.split("_")[1] for i in items if i.split == "test"} == {"theo", "yweweler"}
    three = build_source(avdigits(SHARED, test_images_per_recording=3)).items()
    test = [i.key.split("+")[1] for i in three if i.split == "test"]
    assert len(test) == len(set(test)) == 900
