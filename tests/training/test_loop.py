"""training.loop.fit: what it calls, when, and with what numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tests.training.toys import NUM_CLASSES, WIDTH, random_batch, tiny_method
from training.batch import Batch, Progress
from training.loop import Hooks, fit
from training.methods import Joint
from training.methods.base import EpochData, Method, Resampling
from training.model import MultimodalModel

BATCH_ROWS = (16, 12, 5)


def batches(epoch: int) -> Iterator[Batch]:
    """Batches of different sizes; other rows in every epoch."""
    return (random_batch(10 * epoch + step, rows) for step, rows in enumerate(BATCH_ROWS))


@dataclass
class Recorder:
    """Hooks that write down every call."""

    calls: list[str] = field(default_factory=list)
    wrapped: list[list[bool]] = field(default_factory=list)
    steps: list[tuple[Progress, dict[str, Tensor]]] = field(default_factory=list)
    history: dict[int, dict[str, float]] = field(default_factory=dict)
    disturb: bool = False

    def hooks(self) -> Hooks:
        return Hooks(
            wrap=self.wrap,
            train_batches=self.train_batches,
            data=EpochData(train=lambda: batches(0), val=lambda: batches(0)),
            validate=self.validate,
            on_step=lambda progress, sums: self.steps.append((progress, dict(sums))),
            on_epoch=self.on_epoch,
        )

    def wrap(self, method: Method) -> nn.Module:
        self.calls.append("wrap")
        self.wrapped.append([p.requires_grad for p in method.parameters()])
        return method

    def train_batches(self, epoch: int, resampling: Resampling | None) -> Iterator[Batch]:
        self.calls.append(f"train {epoch}")
        for batch in batches(epoch):
            if self.disturb:
                torch.rand(3)  # somebody else draws from the global generator
            yield batch

    def validate(self) -> dict[str, float]:
        self.calls.append("validate")
        return {"val/accuracy": 0.5}

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        self.calls.append(f"report {epoch}")
        self.history[epoch] = dict(metrics)


def run(
    method: Method,
    num_epochs: int,
    *,
    start_epoch: int = 0,
    every: int = 1,
    lr: float = 0.1,
    seed: int = 3,
    disturb: bool = False,
) -> Recorder:
    """Fit with SGD; the learning rate halves after every epoch."""
    recorder = Recorder(disturb=disturb)
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=lr)
    fit(
        method,
        optimizer,
        LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        recorder.hooks(),
        seed=seed,
        start_epoch=start_epoch,
        num_epochs=num_epochs,
        eval_every_epochs=every,
    )
    return recorder


def test_calls_come_in_order():
    assert run(tiny_method("joint"), 3, every=2).calls == [
        *("wrap", "train 0", "report 0"),
        *("train 1", "validate", "report 1"),
        *("train 2", "validate", "report 2"),
    ]


@pytest.mark.parametrize(
    ("every", "validated"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])]
)
def test_validates_every_k_epochs_and_after_the_last(every: int, validated: list[int]):
    history = run(tiny_method("joint"), 5, every=every).history
    assert list(history) == [0, 1, 2, 3, 4]
    assert [epoch for epoch, metrics in history.items() if "val/accuracy" in metrics] == validated


def test_wraps_again_exactly_when_the_trainable_set_changes():
    recorder = run(tiny_method("midas", warmup_epochs=2), 4)
    order = [call for call in recorder.calls if call.startswith(("wrap", "train"))]
    assert order == ["wrap", "train 0", "train 1", "wrap", "train 2", "train 3"]
    warm_up, main = recorder.wrapped
    assert sum(main) - sum(warm_up) == 2  # weight and bias of the fusion head
    assert [recorder.history[epoch]["main_phase"] for epoch in range(4)] == [0, 0, 1, 1]


def test_the_wrapped_module_is_the_one_that_is_called():
    class Counting(nn.Module):
        def __init__(self, method: Method):
            super().__init__()
            self.method, self.count = method, 0

        def forward(self, batch: Batch, progress: Progress):
            self.count += 1
            return self.method(batch, progress)

    class Wrapping(Recorder):
        def wrap(self, method: Method) -> nn.Module:
            self.module = Counting(method)
            return self.module

    method, recorder = tiny_method("joint"), Wrapping()
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda epoch: 1.0)
    limits = {"start_epoch": 0, "num_epochs": 2, "eval_every_epochs": 1}
    fit(method, optimizer, schedule, recorder.hooks(), seed=0, **limits)
    assert recorder.module.count == 2 * len(BATCH_ROWS)


def test_train_loss_is_the_mean_over_rows_not_over_batches():
    method = tiny_method("joint")
    history = run(method, 2, lr=0.0).history  # nothing moves: one pass over all rows is the oracle
    for epoch in (0, 1):
        total = 0.0
        for batch in batches(epoch):
            logits = method.model.fuse(method.model.encode(batch.inputs))
            total += nn.functional.cross_entropy(logits, batch.label, reduction="sum").item()
        assert history[epoch]["train/loss"] == pytest.approx(total / sum(BATCH_ROWS), abs=1e-6)
        assert history[epoch]["data/rows_per_second"] > 0
        assert 0 <= history[epoch]["data/wait_share"] <= 1


def test_steps_report_the_sums_of_the_epoch_so_far():
    recorder = run(tiny_method("joint"), 2)
    assert [(progress.epoch, progress.step) for progress, _ in recorder.steps] == [
        (epoch, step) for epoch in (0, 1) for step in (0, 1, 2)
    ]
    assert [int(sums["rows"]) for _, sums in recorder.steps] == [16, 28, 33] * 2
    for epoch in (0, 1):
        last = recorder.steps[3 * epoch + 2][1]
        assert recorder.history[epoch]["train/loss"] == float(last["loss_sum"] / last["rows"])


def test_scheduler_steps_once_an_epoch_after_the_steps():
    history = run(tiny_method("joint"), 3, lr=0.8).history
    assert [metrics["lr"] for metrics in history.values()] == pytest.approx([0.8, 0.4, 0.2])


def test_a_later_start_runs_the_epochs_that_are_left():
    recorder = run(tiny_method("midas", warmup_epochs=2), 5, start_epoch=3)
    assert list(recorder.history) == [3, 4]
    assert [call for call in recorder.calls if "train" in call] == ["train 3", "train 4"]
    assert recorder.calls.count("wrap") == 1
    assert {progress.epoch for progress, _ in recorder.steps} == {3, 4}
    assert {progress.num_epochs for progress, _ in recorder.steps} == {5}


def test_nothing_left_does_nothing():
    method = tiny_method("joint")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert run(method, 4, start_epoch=4).calls == []
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


class DropoutEncoder(nn.Sequential):
    """(B, WIDTH) -> (B, 4), half of them zero."""

    out_features = 4

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, self.out_features), nn.Dropout(0.5))


def weights_after_dropout(num_epochs: int, **settings) -> dict[str, Tensor]:
    torch.manual_seed(7)
    method = Joint(MultimodalModel({"m0": DropoutEncoder(), "m1": DropoutEncoder()}, NUM_CLASSES))
    run(method, num_epochs, **settings)
    return method.state_dict()


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_dropout_depends_on_seed_and_step_alone():
    first = weights_after_dropout(2)
    assert equal(first, weights_after_dropout(2, disturb=True))
    assert not equal(first, weights_after_dropout(2, seed=4))
    assert not equal(first, weights_after_dropout(1))
