"""What a model says: columns, conflicts, missing modalities; and its graph."""

import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from data.schema import Manifest, Modality
from service.config import RunConfig, config_yaml
from service.served import Answers, Served, prediction_columns, prediction_schema
from service.stepper import Stepper
from training.augment import RowSpec, augment
from training.checkpoint import pack
from training.config import EncoderConfig, ModelConfig
from training.encoders import build_model
from training.export import Deployed, difference, exported, write
from training.loop import Position
from training.methods.joint import JointUni
from training.methods.unimodal import Unimodal
from training.modality import ModalitySpec

SHAPES = {"image": (3, 16, 16), "words": (6,), "steps": (4, 5)}
SPECS = {
    "image": RowSpec("image", SHAPES["image"], (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 255.0),
    "words": None,
    "steps": None,
}


def answers(*modality: list[list[float]], present: list[list[bool]] | None = None) -> Answers:
    own = np.array(modality, np.float32)
    fused = own.mean(axis=0)
    there = np.ones((own.shape[1], own.shape[0]), bool) if present is None else np.array(present)
    return Answers(fused, fused.argmax(axis=1), own, own.argmax(axis=2).T, there)


def manifest(*names: str, optional: bool = False) -> Manifest:
    return Manifest(
        name="toy",
        source={},
        split_rule="",
        modalities=tuple(
            Modality(name=n, kind="vector", shape=(2,), dtype="float32", optional=optional)
            for n in names
        ),
        classes=("cat", "dog", "eel"),
        splits={},
        class_counts={},
    )


SURE_CAT, SURE_DOG, UNSURE = [0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]


@pytest.mark.parametrize(
    ("image", "audio", "present", "conflict"),
    [
        (SURE_CAT, SURE_DOG, [True, True], True),
        (SURE_CAT, SURE_CAT, [True, True], False),
        (SURE_CAT, UNSURE, [True, True], False),
        (UNSURE, UNSURE, [True, True], False),
        (SURE_CAT, SURE_DOG, [True, False], False),
    ],
)
def test_a_conflict_is_two_sure_modalities_of_other_opinion(
    image: list[float], audio: list[float], present: list[bool], conflict: bool
):
    said = answers([image], [audio], present=[present])
    assert said.conflicts(0.5).tolist() == [conflict]


def test_sureness_is_a_setting():
    said = answers([SURE_CAT], [SURE_DOG])
    assert said.conflicts(0.75).tolist() == [False]
    assert answers([UNSURE], [SURE_DOG]).conflicts(0.4).tolist() == [True]


def test_columns_name_classes_and_leave_out_what_is_not_there():
    said = answers(
        [SURE_CAT, SURE_CAT], [SURE_DOG, SURE_DOG], present=[[True, True], [True, False]]
    )
    about = manifest("image", "audio", optional=True)
    labels = ["dog", "fox"]
    columns = prediction_columns(about, said, 0.5, labels)
    told = {"key": ["a", "b"], "label": labels, "reason": pa.nulls(2, pa.string())}
    rows = pa.table(told | columns, schema=prediction_schema(about)).to_pylist()
    assert [row["predicted"] for row in rows] == ["cat", "cat"]
    assert rows[0]["confidence"] == pytest.approx(0.45)
    assert rows[0]["confidence/audio"] == pytest.approx(0.1)  # of cat
    assert rows[0]["label_confidence/audio"] == pytest.approx(0.7)  # of dog
    assert rows[0]["predicted/audio"] == "dog"
    assert [rows[1][f"{name}/audio"] for name in ("predicted", "confidence")] == [None, None]
    assert rows[1]["label_confidence/image"] is None  # no such class
    assert [row["conflict"] for row in rows] == [True, False]
    assert sum(rows[0]["probabilities"]) == pytest.approx(1.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_a_model_answers_as_the_method_that_was_saved(precision: str, tmp_path: Path):
    """Also without the weights that its training began with."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(**sizes, intermediate_size=8, vocab_size=11)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    encoder = {"kind": "pretrained", "name": str(tmp_path / "bert")}
    settings = {
        "train": {"precision": precision},
        "method": "joint_uni",
        "model": {"encoders": {"words": encoder}},
    }
    config = RunConfig.model_validate(settings)
    about = Manifest(
        name="toy",
        source={},
        split_rule="",
        modalities=(
            Modality(name="words", kind="text", shape=(6,), dtype="int32", vocab_size=11),
            Modality(name="numbers", kind="vector", shape=(3,), dtype="float16", optional=True),
        ),
        classes=("cat", "dog", "eel"),
        splits={},
        class_counts={},
    )
    stepper = Stepper(config, about, torch.device("cpu"))
    notes = {"precision": stepper.precision}
    packed = pack(stepper.method, stepper.optimizer, stepper.schedule, Position(), notes)
    files = {
        "config.yaml": config_yaml(config).encode(),
        "manifest.json": about.to_json().encode(),
        **packed.files(),
    }
    (tmp_path / "bert" / "model.safetensors").unlink()
    rng = np.random.default_rng(0)
    rows = {
        "words": rng.integers(1, 11, (70, 6), dtype=np.int32),
        "numbers": rng.normal(size=(70, 3)).astype(np.float16),
    }
    present = np.ones((70, 2), bool)
    present[::3, 1] = False
    served = Served(files, "the model", "cpu")
    said = served(rows, present)
    method = stepper.method.eval()
    inputs = {name: torch.from_numpy(value) for name, value in rows.items()}
    with torch.no_grad():
        logits = method.predict(method.model.encode(inputs, torch.from_numpy(present)))
    expected = logits["fused"].double().softmax(dim=1).numpy()
    np.testing.assert_allclose(
        said.probability_BC, expected, atol=1e-2 if precision == "bf16" else 1e-6
    )
    np.testing.assert_array_equal(said.present_BM, present)
    nothing = served({name: value[:0] for name, value in rows.items()}, present[:0])
    assert nothing.probability_BC.shape == (0, 3)
    assert nothing.predicted_B.shape == (0,)


@pytest.mark.parametrize("method", [JointUni, Unimodal])
@pytest.mark.parametrize("lacking", [False, True])
def test_a_graph_says_what_the_model_says(method: type, lacking: bool, tmp_path: Path):
    specs = [
        ModalitySpec("image", "image", SHAPES["image"]),
        ModalitySpec("words", "text", SHAPES["words"], pad=0, vocab_size=11),
        ModalitySpec("steps", "sequence", SHAPES["steps"]),
    ]
    small = EncoderConfig(width=8, heads=2, layers=1)
    encoders = {
        "image": EncoderConfig(kind="small_cnn", width=4),
        **dict.fromkeys(("words", "steps"), small),
    }
    model = method(build_model(ModelConfig(encoders=encoders), specs, 3, seed=1)).eval()
    generator = torch.Generator().manual_seed(0)
    rows = {
        "image": torch.randint(0, 256, (64, *SHAPES["image"]), generator=generator).byte(),
        "words": torch.randint(0, 11, (64, *SHAPES["words"]), generator=generator).int(),
        "steps": torch.randn(64, *SHAPES["steps"], generator=generator),
    }
    present = torch.rand(64, 3, generator=generator) < 0.7 if lacking else None
    deployed = Deployed(model, SPECS).eval()
    few = {name: value[:3] for name, value in rows.items()}
    program = exported(deployed, few, None if present is None else present[:3])
    path = tmp_path / "model.pt2"
    write(program, path, {"classes.json": "[]"})
    assert difference(path, deployed, rows, present) < 1e-6
    inputs = rows | {"image": augment(rows["image"], SPECS["image"], None)}
    with torch.no_grad():
        logits = model.predict(model.model.encode(inputs, present))["fused"]
        given = (rows, present) if lacking else (rows,)
        said = torch.export.load(path).module()(*given)["fused"]
    torch.testing.assert_close(said, logits.softmax(dim=1), atol=1e-5, rtol=0)
    with zipfile.ZipFile(path) as archive:  # torch would pickle the sample inputs
        assert {n: archive.read(n) for n in archive.namelist() if n.endswith(".pt")} == {
            "model/data/sample_inputs/model.pt": b""
        }
