"""Encoders from transformers, on tiny models saved to local folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel

from training.config import EncoderConfig, ModelConfig
from training.encoders import build_encoder, build_model
from training.modality import ModalitySpec
from training.networks import Encoder
from training.precision import best_precision

WIDTH = 8
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
WORDS = {**SIZES, "vocab_size": 30, "max_position_embeddings": 14}
SPECS = {
    "bert": ModalitySpec("m", "text", (12,), pad=0, vocab_size=30),
    "electra": ModalitySpec("m", "text", (12,), pad=0, vocab_size=30),
    "roberta": ModalitySpec("m", "text", (12,), pad=1, vocab_size=30),
    "vit": ModalitySpec("m", "image", (3, 16, 16)),
    "ast": ModalitySpec("m", "audio", (1, 32, 16)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """One folder per model; BERT and ELECTRA with the heads they were pre-trained with."""
    torch.manual_seed(0)
    made = {
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**WORDS)),
        "electra": transformers.ElectraForPreTraining(
            transformers.ElectraConfig(**WORDS, embedding_size=4)
        ),
        "roberta": transformers.RobertaModel(transformers.RobertaConfig(**WORDS)),
        "vit": transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)),
        "ast": transformers.ASTModel(
            transformers.ASTConfig(**SIZES, max_length=32, num_mel_bins=16, patch_size=8)
        ),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return folder


def build(folder: Path, spec: ModalitySpec, **config) -> Encoder:
    config = EncoderConfig(kind="pretrained", name=str(folder), **config)
    return build_encoder(config, spec)


def rows_of(spec: ModalitySpec, count: int = 3) -> Tensor:
    """Random rows; texts of 12, 9, 6, ... tokens, padded behind."""
    generator = torch.Generator().manual_seed(5)
    if spec.kind != "text":
        return torch.randn(count, *spec.shape, generator=generator)
    ids = torch.randint(2, spec.vocab_size, (count, *spec.shape), generator=generator)
    for row, text in enumerate(ids):
        text[12 - 3 * row :] = spec.pad
    return ids.int()


def narrow_models() -> list[nn.Module]:
    """Swin's first layers are narrower than what it is called by; GPT-2 has no linear layers."""
    swin = transformers.SwinConfig(embed_dim=96, depths=[1, 1], num_heads=[3, 6])
    gpt = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=30)
    return [transformers.SwinModel(swin), transformers.GPT2Model(gpt)]


def test_auto_precision_sees_their_attention(models, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    narrow = [build(models / name, spec) for name, spec in SPECS.items()] + narrow_models()
    assert [best_precision(torch.device("cpu"), model) for model in narrow] == ["fp32"] * 7
    wide = transformers.BertConfig(**WORDS | {"hidden_size": 192})
    convolutions = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8])
    for model in (transformers.BertModel(wide), transformers.ResNetModel(convolutions)):
        assert best_precision(torch.device("cpu"), model) == "bf16"


@pytest.mark.parametrize("name", ["bert", "electra", "roberta"])
def test_text_features_are_the_first_token_of_the_masked_text(name, models):
    """Compared with the model's own output for every text, cut where its padding begins."""
    spec = SPECS[name]
    encoder, rows = build(models / name, spec).eval(), rows_of(spec)
    network = AutoModel.from_pretrained(models / name).eval()
    found = encoder(rows)
    for row, text in enumerate(rows):
        alone = network(input_ids=text[None, : 12 - 3 * row].long()).last_hidden_state[:, 0]
        torch.testing.assert_close(found[row], alone[0], rtol=0, atol=1e-5)
    assert encoder.out_features == WIDTH


def test_image_features_are_the_class_token(models):
    spec = SPECS["vit"]
    encoder, rows = build(models / "vit", spec).eval(), rows_of(spec)
    expected = AutoModel.from_pretrained(models / "vit").eval()(pixel_values=rows)
    torch.testing.assert_close(encoder(rows), expected.last_hidden_state[:, 0])


def test_features_of_a_clip_are_the_mean_over_its_frames(models):
    clips = rows_of(ModalitySpec("m", "frames", (2, 3, 16, 16)))
    encoder = build(models / "vit", ModalitySpec("m", "frames", (2, 3, 16, 16))).eval()
    frame = build(models / "vit", SPECS["vit"]).eval()
    torch.testing.assert_close(encoder(clips), (frame(clips[:, 0]) + frame(clips[:, 1])) / 2)


def test_audio_features_are_the_mean_of_the_two_class_tokens(models):
    """Frames and bands in either order."""
    spec = SPECS["ast"]
    encoder, rows = build(models / "ast", spec).eval(), rows_of(spec)
    output = AutoModel.from_pretrained(models / "ast").eval()(input_values=rows[:, 0])
    expected = output.last_hidden_state[:, :2].mean(dim=1)
    torch.testing.assert_close(encoder(rows), expected)
    turned = build(models / "ast", ModalitySpec("m", "audio", (1, 16, 32))).eval()
    torch.testing.assert_close(turned(rows.mT), expected)


@pytest.mark.parametrize("name", SPECS)
def test_all_parameters_learn(name, models):
    """DDP waits for the gradient of every parameter; a pooler without a use is not there."""
    encoder = build(models / name, SPECS[name])
    weights = torch.linspace(-1, 1, WIDTH)
    (encoder(rows_of(SPECS[name])) @ weights).square().sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.requires_grad, key
        assert parameter.grad is not None, key
        assert "pooler" not in key
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize("name", ["bert", "electra", "roberta"])
def test_texts_of_padding_only_are_harmless(name, models):
    """What a row without the text may be made of."""
    spec = SPECS[name]
    encoder = build(models / name, spec)
    encoder(torch.full((2, 12), spec.pad)).square().sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    assert all(bool(grad.isfinite().all()) for grad in gradients if grad is not None)


def test_parameters_without_a_gradient_are_frozen(tmp_path):
    """BEiT keeps the token that hid patches in pre-training."""
    config = transformers.BeitConfig(**SIZES, image_size=16, patch_size=8, use_mask_token=True)
    transformers.BeitModel(config).save_pretrained(tmp_path)
    encoder = build(tmp_path, SPECS["vit"])
    encoder(rows_of(SPECS["vit"])).square().sum().backward()
    parameters = dict(encoder.named_parameters())
    frozen = [key for key, parameter in parameters.items() if not parameter.requires_grad]
    assert [key.split(".")[-1] for key in frozen] == ["mask_token"]
    assert all((p.grad is None) == (key in frozen) for key, p in parameters.items())


def test_architecture_alone_draws_its_weights_from_the_seed(models):
    spec = SPECS["bert"]
    config = ModelConfig.model_validate(
        {"encoders": {"m": {"kind": "pretrained", "name": str(models / "bert")}}}
    )
    random = ModelConfig.model_validate(
        {"encoders": {"m": {**config.encoders["m"].model_dump(), "pretrained": False}}}
    )
    before = torch.get_rng_state()
    loaded, first, again, other = (
        build_model(settings, [spec], 4, seed)
        for settings, seed in ((config, 3), (random, 3), (random, 3), (random, 4))
    )
    assert torch.equal(torch.get_rng_state(), before)
    state, saved = first.state_dict(), loaded.state_dict()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())
    key = next(key for key in state if "word_embeddings" in key)
    assert state[key].std().item() == pytest.approx(0.02, rel=0.3)
    assert not torch.equal(state[key], other.state_dict()[key])
    own = transformers.BertForMaskedLM.from_pretrained(models / "bert")
    assert torch.equal(saved[key], own.bert.embeddings.word_embeddings.weight)
    assert saved.keys() == state.keys()


def test_other_width_adds_a_linear_layer_and_double_precision_works(models):
    encoder = build(models / "electra", SPECS["electra"], features=3).double()
    features = encoder(rows_of(SPECS["electra"]))
    assert features.shape == (3, 3)
    assert features.dtype == torch.float64
    assert encoder.body.project.weight.shape == (3, WIDTH)


def test_nothing_to_load(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        for weights in (True, False):
            with pytest.raises(ValueError, match=rf"(?s){name}' cannot be loaded.*local folder"):
                build(tmp_path / name, SPECS["bert"], pretrained=weights)


def test_pickled_weights_are_refused(tmp_path, models):
    network = AutoModel.from_pretrained(models / "roberta")
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="(?s)cannot be loaded.*weights in safetensors"):
        build(tmp_path, SPECS["roberta"])


def test_incomplete_weights_are_refused(tmp_path):
    small = transformers.BertModel(transformers.BertConfig(**{**WORDS, "num_hidden_layers": 1}))
    small.save_pretrained(tmp_path)
    transformers.BertConfig(**WORDS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for encoder\.layer\.1\..*pretrained=false"):
        build(tmp_path, SPECS["bert"])


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("vit", SPECS["bert"], "reads pixel_values, modality m is text, which needs input_ids"),
        ("ast", SPECS["vit"], "reads input_values, modality m is image"),
        (
            "bert",
            ModalitySpec("m", "text", (12,), pad=0, vocab_size=31),
            r"knows 30 tokens and pads with 0, the data set has 31.*modalities\.m\.tokenizer=",
        ),
        (
            "roberta",
            ModalitySpec("m", "text", (12,), pad=0, vocab_size=30),
            "pads with 1, the data set has 30 and pads with 0",
        ),
        (
            "bert",
            ModalitySpec("m", "text", (15,), pad=0, vocab_size=30),
            r"(?s)cannot read text rows of shape \(15,\).*tokens",
        ),
        (
            "vit",
            ModalitySpec("m", "image", (3, 32, 32)),
            r"(?s)cannot read image rows of shape \(3, 32, 32\).*side",
        ),
        (
            "vit",
            ModalitySpec("m", "image", (1, 16, 16)),
            r"(?s)cannot read image rows of shape \(1, 16, 16\)",
        ),
        (
            "ast",
            ModalitySpec("m", "audio", (1, 64, 16)),
            r"(?s)cannot read audio rows of shape \(1, 64, 16\).*frames, num_mels",
        ),
    ],
)
def test_rows_that_the_network_cannot_read(name, spec, message, models):
    with pytest.raises(ValueError, match=message):
        build(models / name, spec)


def test_loading_is_quiet_and_leaves_the_settings_of_transformers(models, capfd):
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    build(models / "bert", SPECS["bert"])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
