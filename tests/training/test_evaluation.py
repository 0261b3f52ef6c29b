"""Evaluation against scikit-learn and slow, written-out formulas; any split over ranks is equal."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn

from training.batch import Batch, Progress
from training.evaluation import (
    EVAL_CHUNK,
    binary_auroc,
    compute_metrics,
    evaluate,
    evaluated_subsets,
    local_sums,
    misaligned_sources,
    shapley_values,
)
from training.methods.base import Method
from training.model import MultimodalModel, keep_only


class Pass(nn.Module):
    """Features are the inputs."""

    def __init__(self, width: int):
        super().__init__()
        self.out_features = width

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class Joint(Method):
    """Prediction of the plain model."""

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"fused": self.model.fuse(features), **self.model.unimodal_logits(features)}


class Sum(Method):
    """Inputs are logits: a modality predicts itself, the fusion their sum."""

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"fused": torch.stack(list(features.values())).sum(0), **features}


def method_of(kind: type[Method], num_classes: int, names: str = "ab") -> Method:
    model = MultimodalModel({name: Pass(num_classes) for name in names}, num_classes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return kind(model)


def split_of(rows: int, num_classes: int, names: str = "ab", seed: int = 0):
    """Random rows: modality -> (rows, C) inputs that lean to the label, and (rows,) labels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, num_classes, (rows,), generator=generator)
    lean = 2.0 * nn.functional.one_hot(label, num_classes)
    inputs = {n: lean + torch.randn(rows, num_classes, generator=generator) for n in names}
    return inputs, label


def chunks_of(inputs: dict[str, Tensor], label: Tensor) -> list[Batch]:
    rows = torch.arange(len(label)).split(EVAL_CHUNK)
    return [
        Batch(
            inputs={name: value[index] for name, value in inputs.items()},
            label=label[index],
            sample_id=index,
            lane=torch.full_like(index, chunk),
            num_lanes=len(rows),
            global_rows=len(label),
        )
        for chunk, index in enumerate(rows)
    ]


def run(method: Method, inputs, label, *, subsets: bool = False) -> dict[str, float]:
    return evaluate(method, chunks_of(inputs, label), seed=5, subsets=subsets, device="cpu")


@pytest.mark.parametrize("num_classes", [2, 5, 90])
def test_classification_metrics_equal_sklearn(num_classes):
    """150 rows: with 90 classes many do not occur."""
    method = method_of(Joint, num_classes)
    inputs, label = split_of(150, num_classes)
    found = run(method, inputs, label)
    with torch.no_grad():
        predictions = method.predict(inputs)
        alone = {m: method.predict(keep_only(inputs, (m,)))["fused"] for m in "ab"}
    fused = predictions["fused"]
    guess = fused.argmax(1)
    per_chunk = [
        (sk.f1_score(true, guessed, average="macro", zero_division=0), len(true))
        for true, guessed in zip(label.split(64), guess.split(64), strict=True)
    ]
    expected = {
        "loss": float(nn.functional.cross_entropy(fused.double(), label)),
        "accuracy": sk.accuracy_score(label, guess),
        "f1_macro": sk.f1_score(label, guess, average="macro", zero_division=0),
        "f1_weighted": sk.f1_score(label, guess, average="weighted", zero_division=0),
        "f1_macro_batch64": sum(f1 * rows for f1, rows in per_chunk) / 150,
        "head_accuracy/a": sk.accuracy_score(label, predictions["a"].argmax(1)),
        "head_accuracy/b": sk.accuracy_score(label, predictions["b"].argmax(1)),
        "zero_out_accuracy/a": sk.accuracy_score(label, alone["a"].argmax(1)),
        "zero_out_accuracy/b": sk.accuracy_score(label, alone["b"].argmax(1)),
    }
    if num_classes == 2:
        expected["auroc"] = sk.roc_auc_score(label, (fused[:, 1] - fused[:, 0]).double())
        expected["f1_binary"] = sk.f1_score(label, guess)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    misaligned = {"misaligned_top2", "misaligned_confidence/a", "misaligned_confidence/b"}
    assert found.keys() == expected.keys() | misaligned


def test_f1_macro_batch64_by_hand():
    """Chunk 1 (64 rows): classes 0 and 1, F1 = 2/3 and 0; chunk 2 (1 row): class 2 right, F1 = 1.

    Class 0 in chunk 1: 32 hits, 64 predictions, 32 labels: 64 / 96. Class 2 is absent there.
    """
    label = torch.tensor([0] * 32 + [1] * 32 + [2])
    guess = torch.tensor([0] * 64 + [2])
    logits = nn.functional.one_hot(guess, 3).double()
    found = run(method_of(Sum, 3), {"a": logits, "b": logits}, label)
    assert found["f1_macro_batch64"] == pytest.approx((64 * (2 / 3 + 0) / 2 + 1 * 1) / 65)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 0 + 1) / 3)


def misaligned_by_hand(logits: dict[str, Tensor], label: Tensor, permutation: list[int]):
    """Top-k share and confidences of method Sum on one chunk, row by row."""
    names, rows = list(logits), len(label)
    needed = len(names) if logits["a"].shape[1] >= len(names) else 2
    hits, confidence, counted = 0, dict.fromkeys(names, 0.0), 0
    for position in range(rows):
        sources = [permutation[(position + m) % rows] for m in range(len(names))]
        labels = [int(label[source]) for source in sources]
        distinct = set(labels)
        if len(distinct) < needed:
            continue
        fused = sum(logits[name][source] for name, source in zip(names, sources, strict=True))
        counted += 1
        hits += set(fused.topk(len(distinct)).indices.tolist()) == distinct
        for name, of_source in zip(names, labels, strict=True):
            confidence[name] += float(fused.double().softmax(0)[of_source])
    return hits / counted, {name: value / counted for name, value in confidence.items()}


@pytest.mark.parametrize(("names", "num_classes"), [("ab", 4), ("abc", 5), ("abcd", 3)])
def test_misaligned_metrics_equal_the_row_by_row_formula(names, num_classes):
    inputs, label = split_of(40, num_classes, names)
    generator = Progress(seed=5, epoch=0, step=0, num_epochs=0).generator("misaligned evaluation")
    permutation = torch.randperm(40, generator=generator).tolist()
    found = run(method_of(Sum, num_classes, names), inputs, label)
    top, confidence = misaligned_by_hand(inputs, label, permutation)
    assert 0 < found["misaligned_top2"] < 1
    assert found["misaligned_top2"] == pytest.approx(top, rel=1e-12)
    for name in names:
        assert found[f"misaligned_confidence/{name}"] == pytest.approx(confidence[name], rel=1e-6)


def test_misaligned_sources_by_hand():
    permutation = torch.tensor([2, 0, 3, 1])
    label = torch.tensor([0, 1, 2, 2])
    sources, counts = misaligned_sources(label, 2, 3, permutation)
    assert sources.tolist() == [[2, 0], [0, 3], [3, 1], [1, 2]]
    assert counts.tolist() == [True, True, True, True]
    _, counts = misaligned_sources(label, 3, 3, permutation)
    assert counts.tolist() == [False, True, False, True]
    two_classes = torch.tensor([1, 0, 0, 0])
    sources, counts = misaligned_sources(two_classes, 3, 2, permutation)
    assert sources.tolist() == [[2, 0, 3], [0, 3, 1], [3, 1, 2], [1, 2, 0]]
    assert counts.tolist() == [True, True, False, True]


def test_one_class_has_no_misaligned_samples():
    inputs, label = split_of(20, 3)
    found = run(method_of(Sum, 3), inputs, torch.zeros_like(label))
    assert math.isnan(found["misaligned_top2"])
    assert math.isnan(found["misaligned_confidence/a"])


def test_ties_are_misses():
    logits = torch.zeros(20, 3)
    _, label = split_of(20, 3)
    found = run(method_of(Sum, 3), {"a": logits, "b": logits}, label)
    assert found["misaligned_top2"] == 0
    assert found["misaligned_confidence/a"] == pytest.approx(1 / 3)


def test_misaligned_samples_depend_on_seed_and_chunk_only():
    inputs, label = split_of(200, 4)
    chunks, method = chunks_of(inputs, label), method_of(Sum, 4)

    def value(order, seed):
        found = evaluate(method, order, seed=seed, subsets=False, device="cpu")
        return found["misaligned_confidence/a"]

    torch.manual_seed(0)
    first = value(chunks, 5)
    torch.manual_seed(1)
    assert value(chunks[::-1], 5) == pytest.approx(first, rel=1e-13)
    assert value(chunks, 6) != pytest.approx(first, rel=1e-6)


def test_shapley_equals_the_mean_over_orders_of_joining():
    """phi_m = mean over all orders of v(before and m) - v(before): the other definition."""
    names = ("a", "b", "c")
    generator = torch.Generator().manual_seed(0)
    subsets = evaluated_subsets(names, True)
    value = dict(zip(subsets, torch.rand(8, generator=generator).tolist(), strict=True))
    expected = dict.fromkeys(names, 0.0)
    for order in permutations(names):
        for position, name in enumerate(order):
            before = tuple(sorted(order[:position]))
            after = tuple(sorted(order[: position + 1]))
            expected[name] += (value[after] - value[before]) / 6
    assert shapley_values(names, value) == pytest.approx(expected)


def test_shapley_of_two_modalities_and_their_sum():
    """phi_a = ((v(a) - v()) + (v(ab) - v(b))) / 2, v() from all-zero features."""
    method = method_of(Joint, 4)
    inputs, label = split_of(150, 4)
    found = run(method, inputs, label, subsets=True)
    with torch.no_grad():
        nothing = method.predict(keep_only(inputs, ()))["fused"].argmax(1)
    empty = float((nothing == label).double().mean())
    alone_a, alone_b = found["zero_out_accuracy/a"], found["zero_out_accuracy/b"]
    expected = ((alone_a - empty) + (found["accuracy"] - alone_b)) / 2
    assert found["shapley/a"] == pytest.approx(expected, rel=1e-12)
    total = found["shapley/a"] + found["shapley/b"]
    assert total == pytest.approx(found["accuracy"] - empty, rel=1e-12)


def test_shapley_is_skipped_above_six_modalities():
    inputs, label = split_of(20, 3, "abcdefg")
    found = run(method_of(Sum, 3, "abcdefg"), inputs, label, subsets=True)
    assert "zero_out_accuracy/g" in found
    assert not any(key.startswith("shapley") for key in found)


@pytest.mark.parametrize("num_classes", [2, 7])
@pytest.mark.parametrize("first_rank", [[0, 2, 4], [3], [4, 1, 0, 2], [0, 1, 2, 3, 4], []])
@pytest.mark.parametrize("missing", [False, True])
def test_two_ranks_equal_one(num_classes, first_rank, missing):
    """Sums of two simulated ranks, added, give the metrics of one process."""
    inputs, label = split_of(280, num_classes)
    method, chunks = method_of(Joint, num_classes), chunks_of(inputs, label)
    if missing:
        chunks = with_present(chunks, missing_of(280, 2))
    parts = [first_rank, [chunk for chunk in range(5) if chunk not in first_rank]]
    kept = evaluated_subsets(("a", "b"), True)
    with torch.no_grad():
        ranks = [
            local_sums(method, [chunks[i] for i in part], seed=5, kept=kept, device="cpu")
            for part in parts
        ]
    sums = {name: ranks[0][0][name] + ranks[1][0][name] for name in ranks[0][0]}
    found = compute_metrics(sums, ("a", "b"), kept)
    if num_classes == 2:
        found["auroc"] = binary_auroc(torch.cat([scores for _, scores in ranks]))
    expected = evaluate(method, chunks, seed=5, subsets=True, device="cpu")
    assert found == pytest.approx(expected, rel=1e-12)
    assert list(ranks[0][0]) == list(ranks[1][0])


def test_auroc_equals_the_share_of_ordered_pairs():
    """P(score of a positive > score of a negative) + half the ties."""
    score = torch.tensor([0.1, 0.4, 0.4, 0.9, -2.0, 40.0, 50.0], dtype=torch.float64)
    label = torch.tensor([0, 1, 0, 1, 1, 0, 1], dtype=torch.float64)
    pairs = score[label == 1][:, None] - score[label == 0][None, :]
    expected = float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    assert binary_auroc(torch.stack([score, label], 1)) == pytest.approx(expected)


def test_auroc_without_a_definition_is_nan():
    assert math.isnan(binary_auroc(torch.tensor([[0.1, 1.0], [0.2, 1.0]])))
    assert math.isnan(binary_auroc(torch.tensor([[math.nan, 1.0], [0.2, 0.0]])))


def test_modes_are_restored_module_by_module():
    method = method_of(Joint, 3)
    method.model.fusion.eval()
    modes = [module.training for module in method.modules()]
    run(method, *split_of(10, 3))
    assert [module.training for module in method.modules()] == modes
    broken = [Batch({}, torch.zeros(1, dtype=torch.int64), *[torch.zeros(1)] * 2, 1, 1)]
    with pytest.raises(KeyError):
        evaluate(method, broken, seed=0, subsets=False, device="cpu")
    assert [module.training for module in method.modules()] == modes


def test_dropout_is_off_and_no_graph_is_kept():
    method = method_of(Joint, 3)
    method.model.encoders["a"] = nn.Sequential(nn.Dropout(0.9))
    inputs, label = split_of(100, 3)
    assert run(method, inputs, label) == run(method, inputs, label)
    assert all(parameter.grad is None for parameter in method.parameters())


def test_no_rows_anywhere_is_an_error():
    with pytest.raises(ValueError, match="no rows on any rank; a split needs at least one"):
        evaluate(method_of(Sum, 3), [], seed=0, subsets=False, device="cpu")


def test_lost_chunk_is_noticed():
    chunks = chunks_of(*split_of(150, 3))
    with pytest.raises(AssertionError, match="86 rows in 2 chunks"):
        evaluate(method_of(Sum, 3), chunks[1:], seed=0, subsets=False, device="cpu")


def missing_of(rows: int, modalities: int) -> Tensor:
    """(rows, M) bool: a third is absent, and the first rows lack all but one in turn."""
    generator = torch.Generator().manual_seed(3)
    present = torch.rand(rows, modalities, generator=generator) > 1 / 3
    present[:modalities] = torch.eye(modalities, dtype=torch.bool)
    return present


def with_present(chunks: list[Batch], present: Tensor) -> list[Batch]:
    return [replace(chunk, present=present[chunk.sample_id]) for chunk in chunks]


def test_metrics_of_a_modality_are_over_the_rows_that_have_it():
    """Fused ones and Shapley values are over all rows, with zeros for absent features."""
    method, present = method_of(Joint, 4), missing_of(150, 2)
    inputs, label = split_of(150, 4)
    chunks = with_present(chunks_of(inputs, label), present)
    found = evaluate(method, chunks, seed=5, subsets=True, device="cpu")
    zeroed = {m: inputs[m] * present[:, i, None] for i, m in enumerate("ab")}
    with torch.no_grad():
        predictions = method.predict(zeroed)
        alone = {m: method.predict(keep_only(zeroed, (m,)))["fused"].argmax(1) for m in "ab"}
        nothing = method.predict(keep_only(zeroed, ()))["fused"].argmax(1)
    expected = {"accuracy": sk.accuracy_score(label, predictions["fused"].argmax(1))}
    for i, m in enumerate("ab"):
        here = present[:, i]
        head = predictions[m].argmax(1)[here]
        expected[f"head_accuracy/{m}"] = sk.accuracy_score(label[here], head)
        expected[f"zero_out_accuracy/{m}"] = sk.accuracy_score(label[here], alone[m][here])
        expected[f"missing/{m}"] = int((~here).sum())
    value = {m: sk.accuracy_score(label, alone[m]) for m in "ab"}
    value[""] = sk.accuracy_score(label, nothing)
    expected["shapley/a"] = (value["a"] - value[""] + expected["accuracy"] - value["b"]) / 2
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)


def test_misaligned_samples_take_only_what_their_sources_have():
    """The same as leaving the others out of the row-by-row formula."""
    inputs, label = split_of(40, 4)
    generator = Progress(seed=5, epoch=0, step=0, num_epochs=0).generator("misaligned evaluation")
    permutation = torch.randperm(40, generator=generator)
    present = missing_of(40, 2)
    chunks = with_present(chunks_of(inputs, label), present)
    found = evaluate(method_of(Sum, 4), chunks, seed=5, subsets=False, device="cpu")
    counted = hits = 0
    for position in range(40):
        first, second = permutation[position], permutation[(position + 1) % 40]
        if label[first] == label[second] or not (present[first, 0] and present[second, 1]):
            continue
        top = (inputs["a"][first] + inputs["b"][second]).topk(2).indices
        counted += 1
        hits += set(top.tolist()) == {int(label[first]), int(label[second])}
    assert 5 < counted < 30
    assert found["misaligned_top2"] == pytest.approx(hits / counted, rel=1e-12)


def test_a_complete_mask_changes_nothing():
    inputs, label = split_of(100, 3)
    chunks = with_present(chunks_of(inputs, label), torch.ones(100, 2, dtype=torch.bool))
    found = evaluate(method_of(Sum, 3), chunks, seed=5, subsets=False, device="cpu")
    assert found == run(method_of(Sum, 3), inputs, label)


def test_a_modality_that_no_row_has_has_no_accuracy():
    inputs, label = split_of(20, 3)
    present = torch.tensor([[True, False]]).expand(20, 2)
    chunks = with_present(chunks_of(inputs, label), present)
    found = evaluate(method_of(Sum, 3), chunks, seed=5, subsets=False, device="cpu")
    assert found["missing/b"] == 20
    assert "missing/a" not in found
    assert math.isnan(found["head_accuracy/b"])
