"""Every data set: raw files -> shards -> two epochs of MIDAS, on one real cluster."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.cluster import local_nodes
from service.files import read_history
from tests.service.cli import SMALL, last_json, midas
from tests.service.object_store import ENVIRONMENT, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

SHARED = Path(__file__).parents[2].parent / "shared"
LAYOUTS = SHARED / "reference" / "make_layouts.py"
DATA = SHARED / "data"
needs_layouts = pytest.mark.skipif(not LAYOUTS.is_file(), reason="needs the layout generator")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data sets")

EPOCHS = (
    *("--optim.epochs", "2", "--midas.warmup-epochs", "1"),
    *("--train.global-batch-size", "8", "--train.lanes", "4"),
)
SMALL_AUDIO = ("--data.modalities.audio.seconds", "0.4")
FIT = ("--data.modalities.text.tokenizer", "fit", "--data.modalities.text.tokens", "16")


def small(*pictures: str) -> tuple[str, ...]:
    """Flags that make pictures of 32 pixels."""
    sides = (("side", "32"), ("train-side", "36"))
    return tuple(
        word for p in pictures for s, n in sides for word in (f"--data.modalities.{p}.{s}", n)
    )


def networks(**kinds: str) -> tuple[str, ...]:
    """Flags for small encoders."""
    return tuple(word for m, k in kinds.items() for word in (f"--model.encoders.{m}.kind", k))


CLIPS = (*small("visual"), *SMALL_AUDIO, *networks(audio="small_cnn", visual="small_cnn"))
PHOTOS = (*small("image"), *FIT, *networks(text="transformer", image="small_cnn"))
FLAGS = {
    "cremad": CLIPS,
    "kinetics": CLIPS,
    "ucf101": (*small("visual", "flow"), *networks(flow="small_cnn", visual="small_cnn")),
    "food101": (*PHOTOS, "--model.encoders.image.weights", "none"),
    "n24news": PHOTOS,
    "mosi": (),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trees of every official layout: clean ones with original videos, and faulty ones."""
    root = tmp_path_factory.mktemp("trees")
    base = [sys.executable, str(LAYOUTS)]
    sizes = ["--per-class", "7", "--clip-seconds", "1"]
    for name, extra in (("clean", ["--raw", "--pickle"]), ("faulty", ["--faults", "all"])):
        subprocess.run([*base, str(root / name), *sizes, *extra], check=True, capture_output=True)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """One cluster for all runs; to start one for each takes longer than the runs."""
    with local_nodes(1, 2) as nodes:
        yield {"RAY_ADDRESS": nodes.environment["RAY_ADDRESS"]}


def train(storage: Path, cluster: dict[str, str], name: str, root: Path, *flags: str) -> dict:
    """Two epochs of MIDAS; the result and what prepare did with the samples."""
    command = (name, "--data.root", str(root), *EPOCHS, *flags, "--json")
    prepared = last_json(midas("prepare", *command, storage=storage, **cluster))
    run = root.parts[-2].strip("-") + "-" + root.parts[-1] + "-" + name
    result = last_json(midas("train", *command, "--name", run, storage=storage, **cluster))
    assert result["data_digest"] == prepared["digest"]
    losses = [
        row["train/loss"] for row in read_history(Path(result["run_folder"]) / "history.jsonl")
    ]
    assert len(losses) == 2
    return {**result, **prepared}


@needs_layouts
@pytest.mark.parametrize("name", sorted(FLAGS))
def test_clean_trees(name: str, trees: Path, cluster: dict[str, str], tmp_path: Path):
    done = train(tmp_path, cluster, name, trees / "clean" / name, *FLAGS[name])
    assert (done["read"], done["rejected"]) == (14 if name == "mosi" else 21, 0)


@needs_layouts
@pytest.mark.parametrize("name", sorted(FLAGS))
def test_faulty_trees(name: str, trees: Path, cluster: dict[str, str], tmp_path: Path):
    """All faults are found, and nothing else; the rest is trained on."""
    root = trees / "faulty" / name
    truth = json.loads((root / "_manifest.json").read_text())
    planted = [fault for fault in truth["faults"] if fault["kind"] != "unsafe_pickle"]
    bad_rows = sum(fault["kind"] == "bad_row" for fault in planted)
    flags = (*FLAGS[name], "--data.max-rejected", "0.5")
    done = train(tmp_path, cluster, name, root, *flags)
    assert done["read"] == len(truth["samples"]) + bad_rows
    assert done["rejected"] == len(planted)
    assert done["written"] == done["read"] - done["rejected"]
    lines = (Path(done["folder"]) / "rejected.jsonl").read_text().splitlines()
    rejected = {json.loads(line)["key"] for line in lines}
    assert {fault["id"] for fault in planted if fault["id"]} <= rejected


@needs_layouts
@pytest.mark.parametrize("name", ["cremad", "kinetics", "ucf101"])
def test_original_videos(name: str, trees: Path, cluster: dict[str, str], tmp_path: Path):
    done = train(tmp_path, cluster, name, trees / "clean" / name / "raw", *FLAGS[name])
    assert (done["read"], done["written"]) == (21, 21)


@needs_data
@pytest.mark.parametrize(
    ("name", "folder", "read"),
    [("rosmap", "rosmap", 351), ("mfeat", "mfeat", 2000), ("mosi", "mosi", 2199)],
)
def test_real_data(name: str, folder: str, read: int, cluster: dict[str, str], tmp_path: Path):
    done = train(tmp_path, cluster, name, DATA / folder, "--train.global-batch-size", "64")
    assert (done["read"], done["rejected"]) == (read, 0)
    assert done["test/accuracy"] > 0.3


@needs_data
def test_a_table_of_recipes(cluster: dict[str, str], tmp_path: Path):
    """Photos and long texts in a csv of one's own; one photo of a recipe is taken."""
    folder = DATA / "recipes"
    command = (
        *("--manifest", str(folder / "recipes.csv"), "--data.label-column", "course"),
        *("--data.modalities.images.kind", "image", "--data.modalities.text_file.kind", "text"),
        *small("images"),
        *("--data.modalities.text_file.tokens", "64", *EPOCHS, "--json"),
    )
    prepared = last_json(midas("prepare", *command, storage=tmp_path, **cluster))
    assert (prepared["read"], prepared["rejected"]) == (115, 0)
    result = last_json(midas("train", *command, "--name", "r", storage=tmp_path, **cluster))
    assert 0 < result["test/loss"] < 10


def test_a_table_whose_samples_lack_a_modality(cluster: dict[str, str], tmp_path: Path):
    """Every fourth row has no `w`: it is refused, or kept, counted and masked."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "label": "abc"[n % 3],
            "v": rng.normal(n % 3, 0.5, 4).tolist(),
            "w": rng.normal(n % 3, 1.0, 5).tolist() if n % 4 else None,
        }
        for n in range(120)
    ]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = [w for m in "vw" for w in (f"--data.modalities.{m}.kind", "vector")]
    command = ("--manifest", str(table), *kinds, *EPOCHS, "--json")
    refused = midas("prepare", *command, storage=tmp_path, **cluster)
    assert refused.returncode == 1
    assert "--data.modalities.w.optional" in refused.stderr
    kept = (*command, "--data.modalities.w.optional", "--name", "kept")
    result = last_json(midas("train", *kept, storage=tmp_path, **cluster))
    assert 0 < result["test/missing/w"] < 24
    assert "test/missing/v" not in result
    assert result["test/accuracy"] > 0.5


def test_a_set_in_an_object_store(tmp_path: Path):
    """Prepared to S3 and read from there, it trains as from a folder."""
    short = (*SMALL, "--optim.epochs", "2", "--json")
    with serving(tmp_path / "objects") as server:
        kept = ("--data.storage", server.uri)
        prepared = last_json(
            midas("prepare", "digits", *kept, "--json", storage=tmp_path, **ENVIRONMENT)
        )
        assert prepared["folder"].startswith("s3://bucket/runs/digits-")
        far = last_json(
            midas("train", "digits", *kept, *short, "--name", "f", storage=tmp_path, **ENVIRONMENT)
        )
    near = last_json(midas("train", "digits", *short, "--name", "n", storage=tmp_path))
    assert far["loss_chain"] == near["loss_chain"]
    assert far["data_digest"] == near["data_digest"]


@needs_layouts
def test_augmented_clips_are_the_same_after_a_kill(trees: Path, tmp_path: Path):
    """Frames, crops and flips of a sample depend on the seed, the epoch and the sample only."""
    flags = (*FLAGS["cremad"], "--data.root", str(trees / "clean" / "cremad"))
    card = last_json(
        midas(
            *("train", "cremad", *flags, *EPOCHS, "--optim.epochs", "8", "--name", "k", "--json"),
            *("--checkpoint.every-steps", "2", "--chaos", "kill:worker@step=3, kill:driver@step=6"),
            storage=tmp_path,
        )
    )
    assert card["chaos/recovered"] is True
    assert card["chaos/final_weights_equal"] is True
    assert card["chaos/loss_equal"] is True
