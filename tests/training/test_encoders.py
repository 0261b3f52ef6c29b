"""Encoders: shapes, conversions, initial weights; build_model: seeds and errors."""

import pytest
import torch
import torchvision
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from training.config import EncoderConfig, ModelConfig
from training.encoders import build_encoder, build_model
from training.modality import ModalitySpec
from training.networks import Encoder

MODALITIES = [
    ModalitySpec("audio", "audio", (40, 20)),
    ModalitySpec("image", "image", (3, 8, 8)),
    ModalitySpec("text", "vector", (6,)),
]
SMALL = ModelConfig(
    encoders={name: EncoderConfig(width=4, hidden=8) for name in ("audio", "image", "text")}
)


def build(config: EncoderConfig, kind, shape: tuple[int, ...], **text) -> Encoder:
    return build_encoder(config, ModalitySpec("m", kind, shape, **text))


@pytest.mark.parametrize(
    ("config", "kind", "shape", "expected"),
    [
        ({}, "vector", (11,), 256),
        ({"hidden": 7}, "vector", (11,), 7),
        ({"hidden": 7, "features": 5}, "vector", (2, 3), 5),
        ({}, "image", (1, 8, 8), 128),
        ({"width": 4, "features": 10}, "image", (3, 28, 28), 10),
        ({"width": 4}, "audio", (1, 40, 100), 16),
        ({"width": 4}, "audio", (40, 100), 16),
        ({"width": 4, "kind": "small_cnn"}, "image", (1, 1, 3), 16),
        ({"kind": "mlp", "hidden": 9}, "image", (1, 8, 8), 9),
        ({}, "image", (2, 64, 64), 512),
        ({"features": 6}, "audio", (1, 70, 64), 6),
    ],
)
def test_output_is_rows_by_out_features(config, kind, shape, expected):
    encoder = build(EncoderConfig(**config), kind, shape)
    output = encoder(torch.rand(2, *shape))
    assert encoder.out_features == expected
    assert output.shape == (2, expected)
    assert output.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32])
@pytest.mark.parametrize(("kind", "shape"), [("image", (3, 8, 8)), ("vector", (6,))])
def test_other_dtypes_equal_the_same_numbers_in_float32(dtype, kind, shape):
    encoder = build(EncoderConfig(width=4), kind, shape).eval()
    rows = torch.randint(0, 9, (4, *shape)).to(dtype)
    torch.testing.assert_close(encoder(rows), encoder(rows.float()), rtol=0, atol=0)


def test_float64_stays():
    encoder = build(EncoderConfig(), "vector", (6,)).double()
    assert encoder(torch.rand(2, 6, dtype=torch.float64)).dtype == torch.float64


def test_no_rows_give_no_features():
    encoder = build(EncoderConfig(), "vector", (6,))
    assert encoder(torch.rand(0, 6)).shape == (0, 256)


def test_mlp_equals_the_written_out_formula():
    encoder = build(EncoderConfig(hidden=5, features=3), "vector", (4,))
    first, _, last = encoder.body
    rows = torch.randn(7, 4)
    expected = (rows @ first.weight.T).clamp_min(0) @ last.weight.T
    torch.testing.assert_close(encoder(rows), expected)


def test_initial_weights_have_the_stated_spread():
    """Compared with sqrt(2 / (in + out)), sqrt(2 / fan_out) and 0.02 (methods.md 3.2, 5.2)."""
    mlp = build(EncoderConfig(hidden=300), "vector", (500,)).body
    assert mlp[0].weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert mlp[2].bias.abs().max().item() == 0
    resnet = build(EncoderConfig(kind="resnet18"), "image", (2, 64, 64)).body
    assert resnet.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    scales = torch.cat([m.weight for m in resnet.modules() if isinstance(m, nn.BatchNorm2d)])
    assert scales.mean().item() == pytest.approx(1, abs=0.002)
    assert scales.std().item() == pytest.approx(0.02, rel=0.05)


def test_convolutions_need_an_image_shape():
    with pytest.raises(ValueError, match=r"audio rows of shape \(16000,\).*log-mel.*mlp"):
        build(EncoderConfig(), "audio", (16000,))


def test_config_rejects_unknown_keys_and_empty_layers():
    with pytest.raises(ValidationError, match="widht"):
        EncoderConfig(widht=3)
    with pytest.raises(ValidationError, match="greater than 0"):
        EncoderConfig(width=0)


def test_model_depends_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(SMALL, MODALITIES, 5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    again, other = (build_model(SMALL, MODALITIES, 5, seed=seed) for seed in (3, 4))
    weights = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert not torch.equal(first.fusion.weight, other.fusion.weight)


def test_model_classifies_every_modality():
    model = build_model(SMALL, MODALITIES, 5, seed=0)
    inputs = {spec.name: torch.rand(2, *spec.shape) for spec in MODALITIES}
    features = model.encode(inputs)
    assert model.modalities == ("audio", "image", "text")
    assert {name: value.shape[1] for name, value in features.items()} == {
        "audio": 16,
        "image": 16,
        "text": 8,
    }
    assert model.fuse(features).shape == (2, 5)


def test_head_hidden_adds_a_layer():
    model = build_model(
        ModelConfig(head_hidden=3), [ModalitySpec("text", "vector", (6,))], 2, seed=0
    )
    assert [layer.out_features for layer in model.fusion if isinstance(layer, nn.Linear)] == [3, 2]


@pytest.mark.parametrize(
    ("name", "remedy"), [("adio", "did you mean 'audio'"), ("zzz", "remove it")]
)
def test_unknown_modality_names_the_nearest(name, remedy):
    config = ModelConfig(encoders={name: EncoderConfig()})
    with pytest.raises(ValueError, match=f"'{name}'.*it has audio, image, text.*{remedy}"):
        build_model(config, MODALITIES, 5, seed=0)


@pytest.mark.parametrize(
    ("config", "kind", "shape", "expected"),
    [
        ({}, "frames", (3, 3, 16, 16), 128),
        ({}, "flow", (2, 2, 64, 64), 512),
        ({"kind": "mlp"}, "frames", (3, 1, 8, 8), 256),
        ({}, "audio", (1, 70, 64), 512),
        ({}, "sequence", (7, 5), 128),
        ({"width": 8, "heads": 2, "features": 3}, "sequence", (7, 5), 3),
        ({"kind": "mlp"}, "sequence", (7, 5), 256),
    ],
)
def test_every_kind_has_an_encoder(config, kind, shape, expected):
    encoder = build(EncoderConfig(**config), kind, shape)
    assert encoder(torch.rand(2, *shape)).shape == (2, expected)
    assert encoder.out_features == expected


@pytest.mark.parametrize("kind", ["small_cnn", "resnet18"])
def test_features_of_a_clip_are_the_mean_over_its_frames(kind):
    encoder = build(EncoderConfig(kind=kind), "frames", (3, 3, 16, 16)).eval()
    clips = torch.rand(2, 3, 3, 16, 16)
    each = torch.stack([encoder.body(clips[:, k]) for k in range(3)])
    torch.testing.assert_close(encoder(clips), each.mean(dim=0))


def sequence_encoder() -> Encoder:
    torch.manual_seed(0)
    return build(EncoderConfig(width=8, heads=2), "sequence", (6, 5))


def text_encoder() -> Encoder:
    torch.manual_seed(0)
    return build(EncoderConfig(width=8, heads=2), "text", (6,), pad=1, vocab_size=20)


def test_padding_in_front_of_a_sequence_does_not_count_but_zeros_inside_do():
    encoder, rows = sequence_encoder(), torch.randn(2, 6, 5)
    rows[:, :2] = 0
    rows[:, 4] = 0
    before = encoder(rows)
    with torch.no_grad():
        encoder.body.position[:2] += 9 * torch.randn(8)
    torch.testing.assert_close(encoder(rows), before, rtol=0, atol=1e-6)
    with torch.no_grad():
        encoder.body.position[4] += 9 * torch.randn(8)
    assert (encoder(rows) - before).abs().amax() > 0.1


def test_padding_of_a_text_does_not_count():
    encoder = text_encoder()
    rows = torch.tensor([[5, 0, 7, 1, 1, 1], [2, 3, 4, 5, 6, 19]], dtype=torch.int32)
    before = encoder(rows)
    with torch.no_grad():
        encoder.body.embed.weight[1] += 9 * torch.randn(8)
    torch.testing.assert_close(encoder(rows), before, rtol=0, atol=1e-6)
    with torch.no_grad():
        encoder.body.embed.weight[0] += 9 * torch.randn(8)
    changed = (encoder(rows) - before).abs().amax(dim=1)
    assert changed[0] > 0.1
    assert changed[1] == 0


@pytest.mark.parametrize("make", [sequence_encoder, text_encoder])
def test_rows_that_are_padding_only_are_harmless(make):
    """What rows without the modality are made of: features and gradients stay finite, of all."""
    encoder = make()
    rows = torch.ones(2, 6) if make is text_encoder else torch.zeros(2, 6, 5)
    encoder(rows).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transformer_evaluates_as_it_trains(dtype):
    """Torch takes another path without gradients; there is no dropout."""
    encoder, rows = sequence_encoder().to(dtype), torch.randn(3, 6, 5)
    rows[0, :3] = 0
    rows[1] = 0
    trained = encoder(rows)
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(rows), trained, rtol=0, atol=1e-5)
    assert trained.dtype == dtype


def test_layers_of_a_transformer_start_from_different_weights():
    first, second = sequence_encoder().body.encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    bound = (6 / (8 + 32)) ** 0.5
    assert first.linear1.weight.abs().max().item() == pytest.approx(bound, rel=0.05)


@pytest.mark.parametrize(
    ("config", "kind", "shape", "message"),
    [
        ({"kind": "mlp"}, "text", (6,), "m.kind=mlp does not read text .* transformer, pretrained"),
        (
            {"kind": "resnet18"},
            "vector",
            (6,),
            "does not read vector rows; use auto or one of: mlp",
        ),
        ({"kind": "transformer"}, "image", (3, 8, 8), "does not read image"),
        ({"weights": "imagenet"}, "image", (3, 8, 8), "'imagenet' belongs to .* is small_cnn"),
        ({"width": 10}, "sequence", (3, 8), "width=10 is not a multiple of heads=4"),
        ({}, "frames", (3, 8, 8), r"frames rows of shape \(3, 8, 8\).*clips with frames in front"),
    ],
)
def test_encoder_and_modality_that_do_not_fit(config, kind, shape, message):
    with pytest.raises(ValueError, match=message):
        build(EncoderConfig(**config), kind, shape, vocab_size=9)


def test_name_and_kind_pretrained_belong_together():
    with pytest.raises(ValidationError, match="kind='pretrained' with name=None"):
        EncoderConfig(kind="pretrained")
    with pytest.raises(ValidationError, match="kind='auto' with name='x'.*belongs to"):
        EncoderConfig(name="x")
    assert EncoderConfig(kind="transformer", name="x").kind == "transformer"


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, torch.Tensor]:
    """A state dict like torchvision's: with classifier, without counters."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18(num_classes=4).state_dict()
    return {name: value for name, value in state.items() if "num_batches" not in name}


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize(("channels", "features"), [(3, None), (1, None), (2, 10)])
def test_resnet18_takes_weights_from_a_file(tmp_path, resnet_state, file, channels, features):
    """With three channels it is torchvision's network; otherwise with averaged filters."""
    write = save_file if file.endswith(".safetensors") else torch.save
    write(resnet_state, tmp_path / file)
    config = EncoderConfig(kind="resnet18", features=features, weights=str(tmp_path / file))
    encoder = build(config, "image", (channels, 32, 32)).eval()
    whole = torchvision.models.resnet18(num_classes=4)
    whole.load_state_dict(resnet_state)
    rows = torch.rand(2, channels, 32, 32)
    with torch.no_grad():
        if channels != 3:
            filters = whole.conv1.weight.mean(dim=1, keepdim=True)
            whole.conv1.weight = nn.Parameter(filters.repeat(1, channels, 1, 1))
        whole.fc = encoder.body.fc
        torch.testing.assert_close(encoder(rows), whole.eval()(rows))
    assert encoder(rows).shape == (2, features or 512)


def test_resnet18_takes_imagenet_weights_from_torchs_cache(tmp_path, monkeypatch, resnet_state):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(resnet_state, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    config = EncoderConfig(kind="resnet18", weights="imagenet")
    body = build(config, "image", (3, 32, 32)).body
    assert torch.equal(body.layer4[1].conv2.weight, resnet_state["layer4.1.conv2.weight"])


def test_resnet18_weights_that_cannot_be_had(tmp_path, resnet_state):
    other = {name: value for name, value in resnet_state.items() if "layer4" not in name}
    torch.save(other, tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"conv": 1}, tmp_path / "foreign.pth")
    files = ["absent.pth", "absent.safetensors", "part.pth", "text.pth", "text.safetensors"]
    for name in [*files, "foreign.pth"]:
        config = EncoderConfig(kind="resnet18", weights=str(tmp_path / name))
        with pytest.raises(
            ValueError, match=f"(?s){name}' cannot be loaded.*give the path of a local"
        ):
            build(config, "image", (3, 32, 32))


@pytest.mark.parametrize("name", ["values", "type", "a.b"])
def test_names_that_torch_uses_are_refused(name: str):
    parts = [ModalitySpec(name, "vector", (3,)), ModalitySpec("other", "vector", (3,))]
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        build_model(ModelConfig(), parts, 2, seed=0)


@pytest.mark.parametrize("kind", ["small_cnn", "resnet18"])
@pytest.mark.parametrize(
    ("modality", "shape"), [("image", (3, 64, 64)), ("frames", (2, 3, 64, 64)), ("audio", (70, 64))]
)
def test_convolutions_are_channels_last_to_the_end(kind: str, modality, shape: tuple[int, ...]):
    """Also of spectrograms, whose one channel is in any layout."""
    encoder = build(EncoderConfig(kind=kind), modality, shape)
    outputs = []
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    encoder(torch.rand(2, *shape))
    assert outputs
    for output in outputs:
        assert output.shape[1] > 1
        assert output.is_contiguous(memory_format=torch.channels_last)
