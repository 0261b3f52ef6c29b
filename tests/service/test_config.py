"""RunConfig: presets, YAML errors as sentences, settings checked against each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from data.sources import TENSOR_SOURCES, source_class
from service.config import (
    PRESETS,
    ConfigError,
    MethodName,
    RunConfig,
    check,
    check_search,
    config_yaml,
    difference,
    load_preset,
    parse_config,
    preset_names,
)
from training.methods import METHODS, SECTIONS

PRESET_FILES = sorted(PRESETS.glob("*.yaml"))


def config(**values: Any) -> RunConfig:
    return RunConfig.model_validate(values)


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_pass_the_check(name: str):
    preset = load_preset(name)
    check(preset)
    check_search(preset)
    assert name.startswith(preset.data.name)


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_preset_headers_say_what_for_and_how(path: Path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header[0].startswith("# Purpose: ")
    name = path.stem.removesuffix("_midas")
    assert any(line.startswith(f"# Command: midas train {name}") for line in header)
    assert any(line.startswith("# Sweep:   midas tune ") for line in header)


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_presets_name_the_modalities_of_their_data(path: Path):
    preset = load_preset(str(path))
    source = source_class(preset.data.name)
    if preset.data.name in TENSOR_SOURCES:
        modalities = {modality.name for modality in source.modalities}
    elif isinstance(getattr(source, "kinds", None), Mapping):
        modalities = set(source.kinds)
    else:  # known from the files only
        modalities = {"text", "audio", "vision"}
    assert set(preset.model.encoders) | set(preset.data.noise) <= modalities
    assert set(preset.data.modalities) <= modalities


def test_preset_is_found_by_short_name_by_stem_and_by_path():
    short = load_preset("digits")
    assert load_preset("digits_midas") == short
    assert load_preset(str(PRESETS / "digits_midas.yaml")) == short


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'digit' \(did you mean digits\?\); presets are avdig"):
        load_preset("digit")
    with pytest.raises(ConfigError, match="no preset 'zzz'; presets are .* path of a YAML file"):
        load_preset("zzz")


def test_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"none/such\.yaml does not exist; give an existing YAML"):
        load_preset("none/such.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "metod: midas",
            r"^here: unknown key metod \(did you mean method\?\); valid .*: method, d",
        ),
        ("optim: {lrr: 1}", r"unknown key optim\.lrr \(did you mean lr\?\); .*weight_decay"),
        (
            "checkpoint: {every_step: 5}",
            r"unknown key checkpoint\.every_step \(did you mean every_steps\?\); .*storage",
        ),
        ("midas: {warmup: 1}", r"unknown key midas\.warmup \(did you mean warmup_epochs\?\)"),
        (
            "model: {encoders: {image: {wdith: 8}}}",
            r"unknown key model\.encoders\.image\.wdith \(did you mean width\?\); .*hidden",
        ),
        ("zzzzzz: 1", r"unknown key zzzzzz; valid keys here: method, data"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_config(text, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: fast}", r"^here: optim\.lr='fast': .*valid number"),
        ("optim: {lr: -1}", r"optim\.lr=-1: .*greater than 0"),
        ("train: {seed: 1.5}", r"train\.seed=1\.5: .*valid integer"),
        ("midas: 3", "midas=3: .*MidasConfig"),
        ("data: {noise: {image: loud}}", r"data\.noise\.image='loud': .*valid number"),
        ("method: mides", "method='mides': .*'midas', 'joint'"),
        ("name: a/b", "name='a/b': .*match pattern"),
        ("scaling: {num_workers: 0}", r"scaling\.num_workers\S*=0: .*greater than or equal to 1"),
        (
            "scaling: {num_workers: [4, 2]}",
            r"num_workers=\(4, 2\) must be .* the smaller first; one",
        ),
        ("scaling: {num_workers: [0, 2]}", r"num_workers=\(0, 2\) must be two numbers from 1 up"),
        ("scaling: {num_workers: [1, 2, 3]}", r"scaling\.num_workers\S*=\[1, 2, 3\]: "),
        ("scaling: {start_timeout_seconds: 0}", "start_timeout_seconds=0: .*greater than 0"),
        (
            "checkpoint: {every_steps: 0}",
            r"checkpoint\.every_steps=0: .*greater than or equal to 1",
        ),
        ("checkpoint: {every_seconds: 0}", r"checkpoint\.every_seconds=0: .*greater than 0"),
        ("checkpoint: {keep: 0}", r"checkpoint\.keep=0: .*greater than or equal to 1"),
        ("midas: {kinetics_ratio_test: true}", "kinetics_ratio_test=True changes nothing .*set"),
        ("- midas", "^here: .*valid dictionary"),
        ("a: [", "^here is not valid YAML: .*line 1"),
    ],
)
def test_bad_value_or_yaml_is_one_sentence(text: str, message: str):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parse_config(text, "here")


def test_empty_file_is_the_defaults():
    assert parse_config("# nothing\n", "here") == RunConfig()


def test_a_float_may_be_written_without_a_point():
    assert parse_config("optim: {lr: 1e-2}", "here").optim.lr == 0.01  # a string in YAML 1.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train": {"global_batch_size": 100}},
            r"train\.lanes=8 must be at least scaling\.num_workers=2 and divide "
            r"train\.global_batch_size=100: .* use one of \[2, 4, 5, 10, 20, 25, 50, 100\], or",
        ),
        (
            {"train": {"lanes": 6}},
            r"train\.lanes=6 must be .*; use one of \[2, 4, 8, 16, 32, 64\], or another batch size",
        ),
        (
            {"scaling": {"num_workers": 9}},
            r"train\.lanes=8 must be at least scaling\.num_workers=9 .*one of \[16, 32, 64\], or",
        ),
        (
            {"scaling": {"num_workers": [2, 9]}},
            r"train\.lanes=8 must be at least scaling\.num_workers=9 .*one of \[16, 32, 64\], or",
        ),
        (
            {"midas": {"pair_groups": 3}},
            r"midas\.pair_groups=3 must divide train\.lanes=8; 1 pairs over the whole global batch",
        ),
        (
            {"midas": {"warmup_epochs": 70}},
            r"midas\.warmup_epochs=70 leaves no main phase in optim\.epochs=70; .*use fewer",
        ),
        (
            {"train": {"micro_batches": 3}},
            r"train\.micro_batches=3 must divide .*train\.global_batch_size / train\.lanes = 8",
        ),
        (
            {"train": {"deterministic": True, "gradient_compression": "bf16"}},
            r"train\.gradient_compression=bf16 .*train\.deterministic=True .*give up one of them",
        ),
    ],
)
def test_check_states_value_rule_and_remedy(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check(config(**values))


@pytest.mark.parametrize("remedy", [2, 4, 8, 16, 32, 64])
def test_a_recommended_number_of_lanes_passes(remedy: int):
    check(config(train={"lanes": remedy}))


@pytest.mark.parametrize("workers", [1, 3, 5, 8, [1, 8], [3, 7]])
def test_lanes_need_not_divide_evenly_among_workers(workers: int | list[int]):
    check(config(scaling={"num_workers": workers}, midas={"pair_groups": 2}))


@pytest.mark.parametrize(
    ("workers", "fewest", "most"), [("3", 3, 3), ("[2, 4]", 2, 4), ("[2, 2]", 2, 2)]
)
def test_workers_are_one_number_or_two(workers: str, fewest: int, most: int):
    read = parse_config(f"scaling: {{num_workers: {workers}}}", "here")
    assert (read.scaling.min_workers, read.scaling.max_workers) == (fewest, most)
    assert parse_config(config_yaml(read), "config.yaml") == read


def test_checkpoints_are_due_by_time_alone_unless_steps_are_given():
    assert RunConfig().checkpoint.every_steps is None
    read = parse_config("checkpoint: {every_steps: 50, storage: s3://bucket/a}", "here").checkpoint
    assert (read.every_steps, read.every_seconds, read.keep) == (50, 300.0, 3)
    assert read.storage == "s3://bucket/a"


def test_rules_of_midas_do_not_bind_other_methods():
    check(config(method="joint", midas={"pair_groups": 3, "warmup_epochs": 70}))


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_through_yaml_keeps_what_decides_the_result(method: str):
    sections = {
        "midas": {"warmup_epochs": 3, "perms_per_sample": 2},
        "ogm_ge": {"strength": 0.5},
    }
    own = {method: sections[method]} if method in sections else {}
    written = config(method=method, name="n", data={"noise": {"image": 0.5}}, **own)
    assert parse_config(config_yaml(written), "config.yaml") == written
    others = config(method=method, **sections)
    read = parse_config(config_yaml(others), "config.yaml")
    assert read.resolved() == others.resolved()
    assert set(SECTIONS) & set(others.resolved()) == set(own)


def test_resolved_config_is_plain_yaml():
    assert yaml.safe_load(config_yaml(RunConfig())) == RunConfig().resolved()


def test_difference_lists_changed_values_by_dotted_name():
    old = config(optim={"lr": 0.1}).resolved()
    new = config(optim={"lr": 0.2}, data={"noise": {"image": 1.0}}, name="x").resolved()
    assert difference(old, new) == [
        "data.noise.image: None -> 1.0",
        "name: None -> 'x'",
        "optim.lr: 0.1 -> 0.2",
    ]
    assert difference(old, old) == []
    assert difference({"midas": {"eta": 1}}, {}) == ["midas: {'eta': 1} -> None"]


def test_only_midas_has_a_warm_up():
    assert config(midas={"warmup_epochs": 4}).warmup_epochs == 4
    assert config(method="joint", midas={"warmup_epochs": 4}).warmup_epochs == 0


def test_method_names_and_sections_are_those_of_training():
    assert set(get_args(MethodName)) == set(METHODS)
    sections = RunConfig().method_sections
    assert {name: type(section) for name, section in sections.items()} == SECTIONS
    for name, section in SECTIONS.items():
        assert RunConfig.model_fields[name].annotation is section
