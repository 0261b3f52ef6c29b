"""Evaluation: chunk by chunk into plain sums, one reduction, metrics from the reduced sums.

Contract with the reader. A split is cut in fixed order into chunks of 64 rows (`EVAL_CHUNK`; only
the last may be shorter). Every Batch is one whole chunk: `lane` holds the chunk's index in every
row, `num_lanes` the number of chunks, `global_rows` the rows of the split. A rank gets any subset
of the chunks, also none; over all ranks each chunk comes exactly once. Every sum is a sum over
chunks, so no metric depends on the number of ranks (beyond the rounding of fp64 additions).

Shapes: B rows of a chunk, C classes, M modalities, S evaluated subsets of modalities.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, combinations

import torch
from torch import Tensor, nn

from training.batch import Batch, Progress
from training.delayed import sent
from training.distributed import gather_rows, reduce_sums, row_counts
from training.methods.base import Method
from training.model import keep_only

EVAL_CHUNK = 64
MAX_SHAPLEY_MODALITIES = 6

Subset = tuple[str, ...]


def evaluate(
    method: Method,
    chunks: Iterable[Batch],
    *,
    seed: int,
    subsets: bool,
    device: torch.device | str,
) -> dict[str, float]:
    """Metrics of a split, equal on every rank; called by all ranks together.

    Args:
        method: evaluated in eval mode without gradients; its modes are restored.
        chunks: this rank's chunks (see the contract above), on any device.
        seed: training seed of the run; fixes the misaligned samples for all epochs.
        subsets: also compute Shapley values (2^M predictions per chunk; M <= 6, else skipped).
        device: where the method is.

    Returns:
        `loss`: mean cross-entropy of the fused prediction, nats.
        `accuracy`, `head_accuracy/<m>`: of the fused prediction and of the unimodal ones, these
            over the rows that have the modality.
        `zero_out_accuracy/<m>`: fused, the features of all other modalities zeroed; over the rows
            that have the modality.
        `missing/<m>`: rows that lack the modality, if any do. Its features are zeros there.
        `f1_macro`: whole split; mean over classes that occur in labels or predictions, as in
            scikit-learn (BalanceBenchmark counts classes that never occur as 0).
        `f1_weighted`: whole split, weighted by class counts.
        `f1_macro_batch64`: macro-F1 of every chunk over the classes that occur in its labels or
            predictions, mean weighted by rows (methods.md 3.3); what MIDAS reports as F1.
        `misaligned_top2`: share of misaligned samples whose k highest classes are exactly the k
            labels of their sources (k = 2 for two modalities, else see `misaligned_sources`);
            ties are misses; trivially 1 when k = C (methods.md 2.13). Samples with a source that
            lacks what it is to supply do not count.
        `misaligned_confidence/<m>`: mean probability of the label of modality m's source; NaN,
            like `misaligned_top2`, if the split has no misaligned samples.
        `shapley/<m>`: with `subsets`, contribution to the accuracy (`shapley_values`).
        `auroc`, `f1_binary`: two classes only, class 1 positive; `auroc` is NaN if only one class
            occurs or a score is not finite. Costs two more small collectives.

    Raises:
        ValueError: no rank got a row.
    """
    model = method.model
    kept = evaluated_subsets(model.modalities, subsets)
    with _eval_mode(method), torch.no_grad():
        local, scores = local_sums(method, chunks, seed=seed, kept=kept, device=device)
    sums = {name: value.cpu() for name, value in reduce_sums(local).items()}
    _check_coverage(sums)
    metrics = compute_metrics(sums, model.modalities, kept)
    if model.num_classes == 2:
        scores = gather_rows(scores, row_counts(len(scores), scores.device))
        metrics["auroc"] = binary_auroc(scores)
    return metrics


def evaluated_subsets(modalities: tuple[str, ...], all_subsets: bool) -> list[Subset]:
    """The single modalities, or all 2^M subsets if asked for and M <= 6."""
    if not all_subsets or len(modalities) > MAX_SHAPLEY_MODALITIES:
        return [(name,) for name in modalities]
    sizes = range(len(modalities) + 1)
    return list(chain.from_iterable(combinations(modalities, size) for size in sizes))


def local_sums(
    method: Method,
    chunks: Iterable[Batch],
    *,
    seed: int,
    kept: list[Subset],
    device: torch.device | str,
) -> tuple[dict[str, Tensor], Tensor]:
    """This rank's part: fp64 sums, and (n, 2) fp64 score and label of each row if C = 2.

    Sums of several ranks, added, are the sums of one rank with all chunks; scores concatenate.
    """
    num_classes, num_modalities = method.model.num_classes, len(method.model.modalities)
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (),
        "chunks": (),
        "expected_rows": (),
        "expected_chunks": (),
        "loss": (),
        "confusion": (num_classes, num_classes),
        "f1_chunk": (),
        "modality_rows": (num_modalities,),
        "head_correct": (num_modalities,),
        "zero_out_correct": (num_modalities,),
        "subset_correct": (len(kept),),
        "misaligned_rows": (),
        "misaligned_hits": (),
        "misaligned_confidence": (num_modalities,),
    }
    options = {"dtype": torch.float64, "device": device}
    sums = {name: torch.zeros(shape, **options) for name, shape in shapes.items()}
    scores = [torch.zeros(0, 2, **options)]
    for batch in chunks:
        chunk = int(batch.lane[0]) if batch.chunk is None else batch.chunk
        moved = _move(batch, device)
        features = method.model.encode(moved.inputs, moved.present)
        present_BM = _present(moved, num_modalities)
        permutation = _permutation(len(moved.label), seed, chunk, device)
        sources, distinct = misaligned_sources(
            moved.label, num_modalities, num_classes, permutation
        )
        mixed = {name: value[sources[:, m]] for m, (name, value) in enumerate(features.items())}
        subsets = [keep_only(features, subset) for subset in kept]
        predictions, of_mixed, *of_subsets = _predict_together(method, [features, mixed, *subsets])
        counted = distinct & present_BM.gather(0, sources).all(1)
        fused = {subset: found["fused"] for subset, found in zip(kept, of_subsets, strict=True)}
        parts = {
            **_coverage_sums(moved),
            **_aligned_sums(predictions, moved.label, present_BM, method.model.modalities),
            **_subset_sums(fused, moved.label, present_BM, method.model.modalities),
            **_misaligned_sums(of_mixed["fused"], moved.label[sources], counted),
        }
        for name, total in sums.items():
            total += parts[name]
        if num_classes == 2:
            fused = predictions["fused"].double()
            scores.append(torch.stack([fused[:, 1] - fused[:, 0], moved.label.double()], dim=1))
    return sums, torch.cat(scores)


def compute_metrics(
    sums: dict[str, Tensor], modalities: tuple[str, ...], kept: list[Subset]
) -> dict[str, float]:
    """Metrics (see `evaluate`, without `auroc`) from the sums over all chunks of a split."""
    rows, confusion = sums["rows"], sums["confusion"]
    rows_M = sums["modality_rows"]
    f1 = class_f1(confusion)
    misaligned_rows = sums["misaligned_rows"]
    values = (sums["subset_correct"] / rows).tolist()
    subset_accuracy = dict(zip(kept, values, strict=True))
    metrics = {
        "loss": float(sums["loss"] / rows),
        "accuracy": float(confusion.trace() / rows),
        "f1_macro": float(macro_f1(confusion)),
        "f1_macro_batch64": float(sums["f1_chunk"] / rows),
        "f1_weighted": float((f1 * confusion.sum(1)).sum() / rows),
        **_by_modality("head_accuracy", modalities, sums["head_correct"] / rows_M),
        **_by_modality("zero_out_accuracy", modalities, sums["zero_out_correct"] / rows_M),
        "misaligned_top2": float(sums["misaligned_hits"] / misaligned_rows),
        **_by_modality(
            "misaligned_confidence", modalities, sums["misaligned_confidence"] / misaligned_rows
        ),
    }
    missing = _by_modality("missing", modalities, rows - rows_M)
    metrics |= {name: count for name, count in missing.items() if count}
    if () in subset_accuracy:
        shapley = shapley_values(modalities, subset_accuracy)
        metrics |= {f"shapley/{name}": value for name, value in shapley.items()}
    if len(confusion) == 2:
        metrics["f1_binary"] = float(f1[1])
    return metrics


def confusion_matrix(label: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """(C, C) fp64 counts, labels in rows, predictions in columns, from (B,) int64 each."""
    ones = torch.ones_like(label, dtype=torch.float64)
    cells = ones.new_zeros(num_classes**2).index_add_(0, label * num_classes + predicted, ones)
    return cells.reshape(num_classes, num_classes)


def class_f1(confusion: Tensor) -> Tensor:
    """(C,) F1 = 2 TP / (labels + predictions) from a (C, C) confusion matrix; absent classes 0."""
    return 2 * confusion.diagonal() / _occurrences(confusion).clamp_min(1)


def macro_f1(confusion: Tensor) -> Tensor:
    """() mean F1 of the classes that occur in labels or predictions."""
    present = _occurrences(confusion) > 0
    return class_f1(confusion).sum() / present.sum()


def misaligned_sources(
    label: Tensor, num_modalities: int, num_classes: int, permutation: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, M) rows that the modalities of B mixed samples come from; (B,) which are misaligned.

    Modality m of sample p comes from row `permutation[(p + m) mod B]`. A sample counts if its
    sources have M distinct labels; with fewer classes than modalities, if they have at least two
    (k is then the number of distinct labels of the sample).

    Args:
        label: (B,) int64.
        num_modalities: M.
        num_classes: C.
        permutation: (B,) int64.
    """
    sources = torch.stack([permutation.roll(-shift) for shift in range(num_modalities)], dim=1)
    needed = num_modalities if num_classes >= num_modalities else 2
    distinct = _label_sets(label[sources], num_classes).sum(1)
    return sources, distinct >= needed


def shapley_values(modalities: tuple[str, ...], value: dict[Subset, float]) -> dict[str, float]:
    """phi_m = sum over S without m of |S|! (M-|S|-1)! / M! (v(S and m) - v(S)) (methods.md 4.0).

    Args:
        modalities: all M, in order.
        value: v of all 2^M subsets, each in the order of `modalities`.
    """
    total = math.factorial(len(modalities))
    phi = dict.fromkeys(modalities, 0.0)
    for name in modalities:
        for subset in (subset for subset in value if name not in subset):
            others = len(modalities) - len(subset) - 1
            weight = math.factorial(len(subset)) * math.factorial(others) / total
            joined = tuple(m for m in modalities if m in subset or m == name)
            phi[name] += weight * (value[joined] - value[subset])
    return phi


def binary_auroc(scores: Tensor) -> float:
    """Area under the ROC curve of (N, 2) scores and 0/1 labels; NaN if it is not defined."""
    from sklearn.metrics import roc_auc_score  # three seconds that only binary tasks need

    score, label = scores.cpu().unbind(1)
    if not bool(score.isfinite().all()) or len(label.unique()) < 2:
        return math.nan
    return float(roc_auc_score(label.numpy(), score.numpy()))


@contextmanager
def _eval_mode(method: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in method.modules()]
    method.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _move(batch: Batch, device: torch.device | str) -> Batch:
    inputs = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
    label = batch.label.to(device, non_blocking=True)
    present = None if batch.present is None else batch.present.to(device, non_blocking=True)
    return replace(batch, inputs=inputs, label=label, present=present)


def _present(batch: Batch, num_modalities: int) -> Tensor:
    """(B, M) bool, which modalities the rows have."""
    if batch.present is not None:
        return batch.present
    return torch.ones_like(batch.label[:, None], dtype=torch.bool).expand(-1, num_modalities)


def _coverage_sums(batch: Batch) -> dict[str, int]:
    return {
        "rows": len(batch.label),
        "chunks": 1,
        "expected_rows": batch.global_rows,
        "expected_chunks": batch.num_lanes,
    }


def _check_coverage(sums: dict[str, Tensor]) -> None:
    """Reduced numbers only, so that all ranks agree; the expected ones were added per chunk."""
    rows, chunks = int(sums["rows"]), int(sums["chunks"])
    if rows == 0:
        raise ValueError(
            "evaluation got no rows on any rank; a split needs at least one; give the split rows "
            "when preparing the data or evaluate another split"
        )
    expected_rows, expected_chunks = int(sums["expected_rows"]), int(sums["expected_chunks"])
    assert (rows * chunks, chunks * chunks) == (expected_rows, expected_chunks), (
        f"evaluation saw {rows} rows in {chunks} chunks, not each chunk of the split once"
    )


def _aligned_sums(
    predictions: dict[str, Tensor],
    label: Tensor,
    present_BM: Tensor,
    modalities: tuple[str, ...],
) -> dict[str, Tensor]:
    fused = predictions["fused"].double()
    confusion = confusion_matrix(label, fused.argmax(1), fused.shape[1])
    hits_BM = torch.stack([_correct(predictions[name], label) for name in modalities], dim=1)
    return {
        "loss": nn.functional.cross_entropy(fused, label, reduction="sum"),
        "confusion": confusion,
        "f1_chunk": macro_f1(confusion) * len(label),
        "modality_rows": present_BM.sum(0),
        "head_correct": (hits_BM & present_BM).sum(0),
    }


def _predict_together(method: Method, variants: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """`method.predict` of V variants of the features of B rows, in one pass of V x B rows."""
    names, count = method.model.modalities, len(next(iter(variants[0].values())))
    together = {name: torch.cat([variant[name] for variant in variants]) for name in names}
    parts = {name: value.split(count) for name, value in method.predict(together).items()}
    return [{name: part[place] for name, part in parts.items()} for place in range(len(variants))]


def _subset_sums(
    fused: dict[Subset, Tensor], label: Tensor, present_BM: Tensor, modalities: tuple[str, ...]
) -> dict[str, Tensor]:
    """Rows that the fused prediction gets right from each subset's features alone, (S,), and from
    each modality's alone where it is present, (M,)."""
    hits = {subset: _correct(logits, label) for subset, logits in fused.items()}
    alone_BM = torch.stack([hits[(name,)] for name in modalities], dim=1)
    return {
        "subset_correct": torch.stack([hits_B.sum() for hits_B in hits.values()]),
        "zero_out_correct": (alone_BM & present_BM).sum(0),
    }


def _permutation(count: int, seed: int, chunk: int, device: torch.device | str) -> Tensor:
    """(B,) order of the rows of a chunk in which misaligned samples are put together."""
    generator = Progress(seed=seed, epoch=0, step=chunk, num_epochs=0).generator(
        "misaligned evaluation"
    )
    return sent(torch.randperm(count, generator=generator), torch.device(device))


def _misaligned_sums(logits: Tensor, label_BM: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """What the fused prediction says of mixed samples, those that are `counted`, (B,) bool, whose
    modalities have these labels."""
    fused = logits.double()
    hits = _top_classes_are(fused, _label_sets(label_BM, fused.shape[1]))
    confidence = fused.softmax(1).gather(1, label_BM)
    return {
        "misaligned_rows": counted.sum(),
        "misaligned_hits": (hits & counted).sum(),
        "misaligned_confidence": (confidence * counted[:, None]).sum(0),
    }


def _correct(logits: Tensor, label: Tensor) -> Tensor:
    """(B,) whether the highest logit is the label's."""
    return logits.argmax(1) == label


def _occurrences(confusion: Tensor) -> Tensor:
    return confusion.sum(0) + confusion.sum(1)


def _label_sets(labels: Tensor, num_classes: int) -> Tensor:
    """(n, M) labels to a (n, C) mask of the classes among them."""
    mask = torch.zeros(len(labels), num_classes, dtype=torch.bool, device=labels.device)
    return mask.scatter(1, labels, True)


def _top_classes_are(logits: Tensor, classes: Tensor) -> Tensor:
    """(n,) whether the classes of a (n, C) mask are strictly ahead of all the others."""
    lowest_inside = logits.masked_fill(~classes, math.inf).amin(1)
    highest_outside = logits.masked_fill(classes, -math.inf).amax(1)
    return lowest_inside > highest_outside


def _by_modality(name: str, modalities: tuple[str, ...], values: Tensor) -> dict[str, float]:
    return {f"{name}/{m}": value for m, value in zip(modalities, values.tolist(), strict=True)}
