"""Encoders: shapes, conversions, initial weights; build_model: seeds and errors."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from training.encoders import EncoderConfig, ModelConfig, build_encoder, build_model

MODALITIES = [("audio", "audio", (40, 20)), ("image", "image", (3, 8, 8)), ("text", "vector", (6,))]
SMALL = ModelConfig(
    encoders={name: EncoderConfig(width=4, hidden=8) for name in ("audio", "image", "text")}
)


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
    encoder = build_encoder(EncoderConfig(**config), kind, shape)
    output = encoder(torch.rand(2, *shape))
    assert encoder.out_features == expected
    assert output.shape == (2, expected)
    assert output.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32])
@pytest.mark.parametrize(("kind", "shape"), [("image", (3, 8, 8)), ("vector", (6,))])
def test_other_dtypes_equal_the_same_numbers_in_float32(dtype, kind, shape):
    encoder = build_encoder(EncoderConfig(width=4), kind, shape).eval()
    rows = torch.randint(0, 9, (4, *shape)).to(dtype)
    torch.testing.assert_close(encoder(rows), encoder(rows.float()), rtol=0, atol=0)


def test_float64_stays():
    encoder = build_encoder(EncoderConfig(), "vector", (6,)).double()
    assert encoder(torch.rand(2, 6, dtype=torch.float64)).dtype == torch.float64


def test_no_rows_give_no_features():
    encoder = build_encoder(EncoderConfig(), "vector", (6,))
    assert encoder(torch.rand(0, 6)).shape == (0, 256)


def test_mlp_equals_the_written_out_formula():
    encoder = build_encoder(EncoderConfig(hidden=5, features=3), "vector", (4,))
    first, _, last = encoder.body
    rows = torch.randn(7, 4)
    expected = (rows @ first.weight.T).clamp_min(0) @ last.weight.T
    torch.testing.assert_close(encoder(rows), expected)


def test_initial_weights_have_the_stated_spread():
    """Compared with sqrt(2 / (in + out)), sqrt(2 / fan_out) and 0.02 (methods.md 3.2, 5.2)."""
    mlp = build_encoder(EncoderConfig(hidden=300), "vector", (500,)).body
    assert mlp[0].weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert mlp[2].bias.abs().max().item() == 0
    resnet = build_encoder(EncoderConfig(kind="resnet18"), "image", (2, 64, 64)).body
    assert resnet.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    scales = torch.cat([m.weight for m in resnet.modules() if isinstance(m, nn.BatchNorm2d)])
    assert scales.mean().item() == pytest.approx(1, abs=0.002)
    assert scales.std().item() == pytest.approx(0.02, rel=0.05)


def test_convolutions_need_an_image_shape():
    with pytest.raises(ValueError, match=r"audio rows of shape \(16000,\).*log-mel.*mlp"):
        build_encoder(EncoderConfig(), "audio", (16000,))


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
    inputs = {name: torch.rand(2, *shape) for name, _, shape in MODALITIES}
    features = model.encode(inputs)
    assert model.modalities == ("audio", "image", "text")
    assert {name: value.shape[1] for name, value in features.items()} == {
        "audio": 16,
        "image": 16,
        "text": 8,
    }
    assert model.fuse(features).shape == (2, 5)


def test_head_hidden_adds_a_layer():
    model = build_model(ModelConfig(head_hidden=3), [("text", "vector", (6,))], 2, seed=0)
    assert [layer.out_features for layer in model.fusion if isinstance(layer, nn.Linear)] == [3, 2]


@pytest.mark.parametrize(
    ("name", "remedy"), [("adio", "did you mean 'audio'"), ("zzz", "remove it")]
)
def test_unknown_modality_names_the_nearest(name, remedy):
    config = ModelConfig(encoders={name: EncoderConfig()})
    with pytest.raises(ValueError, match=f"'{name}'.*it has audio, image, text.*{remedy}"):
        build_model(config, MODALITIES, 5, seed=0)
