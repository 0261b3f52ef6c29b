"""training.loop.fit: what it calls, when, and with what numbers."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from time import sleep

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tests.training.toys import NUM_CLASSES, WIDTH, random_batch, tiny_method
from training.batch import Batch, Progress
from training.chain import Chain, StepRecord, order_digest, order_text
from training.checkpoint import load, pack
from training.loop import LOSS, ORDER, SHARES, Hooks, Position, _seed, fit
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
    steps: list[tuple[Position, dict[str, Tensor]]] = field(default_factory=list)
    history: dict[int, dict[str, float]] = field(default_factory=dict)
    disturb: bool = False

    def hooks(self) -> Hooks:
        return Hooks(
            wrap=self.wrap,
            train_batches=self.train_batches,
            data=EpochData(train=lambda: batches(0), val=lambda: batches(0)),
            signals=lambda: {"asked": torch.tensor(2.0)},
            on_step=self.on_step,
            on_trained=lambda position, validates: None,
            validate=self.validate,
            on_epoch=self.on_epoch,
        )

    def on_step(self, position: Position, signals: dict[str, Tensor]) -> None:
        self.steps.append((replace(position), signals))

    def wrap(self, method: Method) -> nn.Module:
        self.calls.append("wrap")
        self.wrapped.append([p.requires_grad for p in method.parameters()])
        return method

    def train_batches(
        self, epoch: int, resampling: Resampling | None, step: int
    ) -> Iterator[Batch]:
        self.calls.append(f"train {epoch}")
        for batch in islice(batches(epoch), step, None):
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
        Position(start_epoch),
        seed=seed,
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
    limits = {"num_epochs": 2, "eval_every_epochs": 1}
    fit(method, optimizer, schedule, recorder.hooks(), Position(), seed=0, **limits)
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
        assert history[epoch]["speed/samples_per_second"] > 0
        assert 0 <= history[epoch]["speed/wait_share"] <= 1


def test_steps_report_position_sums_and_signals():
    recorder = run(tiny_method("joint"), 2)
    positions = [position for position, _ in recorder.steps]
    assert [(p.epoch, p.step, p.steps_done) for p in positions] == [
        *((0, 1, 1), (0, 2, 2), (0, 3, 3)),
        *((1, 1, 4), (1, 2, 5), (1, 3, 6)),
    ]
    assert [int(position.totals["rows"]) for position in positions] == [16, 28, 33] * 2
    assert all(float(signals["asked"]) == 2 for _, signals in recorder.steps)
    assert "asked" not in positions[0].totals
    for epoch in (0, 1):
        last = positions[3 * epoch + 2].totals
        assert recorder.history[epoch]["train/loss"] == float(last["loss_sum"] / last["rows"])
        rows = torch.tensor(BATCH_ROWS)
        losses = torch.stack([signals[LOSS] for _, signals in recorder.steps[3 * epoch :][:3]])
        assert float((losses * rows).sum() / rows.sum()) == pytest.approx(
            recorder.history[epoch]["train/loss"]
        )


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_steps_are_seeded_as_torch_seeds(seed):
    torch.manual_seed(seed)
    expected = torch.rand(5)
    _seed(seed, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


def test_every_epoch_logs_its_speed_and_where_its_time_went():
    class Slow(Recorder):
        """Takes as long to report a step as to save an epoch."""

        def hooks(self) -> Hooks:
            return replace(super().hooks(), on_trained=lambda position, validates: sleep(0.06))

        def on_step(self, position: Position, signals: dict[str, Tensor]) -> None:
            sleep(0.02)

        def train_batches(self, *args) -> Iterator[Batch]:
            for batch in super().train_batches(*args):
                sleep(0.02)
                yield batch

    method, recorder = tiny_method("joint"), Slow()
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda epoch: 1.0)
    limits = {"num_epochs": 2, "eval_every_epochs": 1}
    fit(method, optimizer, schedule, recorder.hooks(), Position(), seed=0, **limits)
    for metrics in recorder.history.values():
        shares = {name: metrics[f"speed/{name}_share"] for name in SHARES}
        assert all(0 <= share <= 1 for share in shares.values())
        assert sum(shares.values()) <= 1 + 1e-9
        assert 0.04 < metrics["speed/step_p50_seconds"] <= metrics["speed/step_p95_seconds"] < 60
        seconds = sum(BATCH_ROWS) / metrics["speed/samples_per_second"]
        assert 3 * 0.04 + 0.06 < seconds < 60
        assert shares["wait"] * seconds >= 0.06
        assert shares["report"] * seconds >= 0.12
        assert 10 < metrics["memory/peak_mib"] < 2**20
    assert shares["report"] > shares["wait"] > 0.15  # the first steps of a process take longer


def test_scheduler_steps_once_an_epoch_after_the_steps():
    history = run(tiny_method("joint"), 3, lr=0.8).history
    assert [metrics["lr"] for metrics in history.values()] == pytest.approx([0.8, 0.4, 0.2])


def test_a_later_start_runs_the_epochs_that_are_left():
    recorder = run(tiny_method("midas", warmup_epochs=2), 5, start_epoch=3)
    assert list(recorder.history) == [3, 4]
    assert [call for call in recorder.calls if "train" in call] == ["train 3", "train 4"]
    assert recorder.calls.count("wrap") == 1
    assert {position.epoch for position, _ in recorder.steps} == {3, 4}


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


class Stop(Exception):
    """Ends a fit from a hook, as a killed process would."""


class Resampled(Joint):
    """Rows of an epoch follow from the weights at its start; dropout in the encoders."""

    def before_epoch(self, data: EpochData, progress: Progress) -> Resampling:
        weight = self.model.fusion.weight.detach().double().abs().sum()
        first = int(weight * 1e6) % 7
        return Resampling(torch.arange(first, first + 9), torch.ones(9, 2, dtype=torch.bool))


def resampled_batches(resampling: Resampling, step: int) -> Iterator[Batch]:
    for part in resampling.sample_id.split(3)[step:]:
        yield random_batch(int(part.sum()), len(part))


class Attempt:
    """A run that is stopped after some steps, keeping what a checkpoint keeps after each step."""

    def __init__(self, build):
        self.method = build()
        self.optimizer = torch.optim.SGD(self.method.parameter_groups(), lr=0.1, momentum=0.9)
        self.schedule = LambdaLR(self.optimizer, lambda epoch: 0.5**epoch)
        self.kept: list[dict[str, bytes]] = []
        self.records: list[tuple[int, int, str, float]] = []
        self.history: list[dict[str, float]] = []

    def fit(self, position: Position, stop_after: int | None = None) -> "Attempt":
        def train_batches(epoch: int, resampling: Resampling | None, step: int) -> Iterator[Batch]:
            if resampling is None:
                return islice(batches(epoch), step, None)
            return resampled_batches(resampling, step)

        def on_step(position: Position, signals: dict[str, Tensor]) -> None:
            record = (position.epoch, position.step, order_text(signals[ORDER]))
            self.records.append((*record, float(signals[LOSS])))
            packed = pack(self.method, self.optimizer, self.schedule, position, {})
            self.kept.append(packed.files())
            if position.steps_done == stop_after:
                raise Stop

        def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
            timings = ("time/", "speed/", "memory/")
            self.history.append({k: v for k, v in metrics.items() if not k.startswith(timings)})

        hooks = Hooks(
            wrap=lambda method: method,
            train_batches=train_batches,
            data=EpochData(train=lambda: batches(0), val=lambda: batches(0)),
            signals=dict,
            on_step=on_step,
            on_trained=lambda position, validates: None,
            validate=dict,
            on_epoch=on_epoch,
        )
        parts = (self.method, self.optimizer, self.schedule)
        with contextlib.suppress(Stop):
            fit(*parts, hooks, position, seed=3, num_epochs=4, eval_every_epochs=1)
        return self


def dropout_model() -> MultimodalModel:
    torch.manual_seed(7)
    return MultimodalModel({"m0": DropoutEncoder(), "m1": DropoutEncoder()}, NUM_CLASSES)


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_method("midas", warmup_epochs=2, eta=0.3),
        lambda: tiny_method("midas", batchnorm=True),
        lambda: tiny_method("ogm_ge"),
        lambda: Joint(dropout_model()),
        lambda: Resampled(dropout_model()),
    ],
    ids=["midas", "batchnorm", "ogm_ge", "dropout", "resampled"],
)
def test_stopped_after_any_step_and_resumed_equals_unbroken(build):
    """Weights, sums of the running epoch, order and losses, bit for bit."""
    unbroken = Attempt(build).fit(Position())
    num_steps = len(unbroken.records)
    assert num_steps == 12
    for stop_after in range(1, num_steps + 1):
        stopped = Attempt(build).fit(Position(), stop_after)
        resumed = Attempt(build)
        position, _ = load(
            stopped.kept[-1], "memory", resumed.method, resumed.optimizer, resumed.schedule
        )
        resumed.fit(position)
        assert stopped.records + resumed.records == unbroken.records
        assert stopped.history + resumed.history == unbroken.history
        assert equal(unbroken.method.state_dict(), resumed.method.state_dict())


def test_order_digest_sees_rows_places_and_lanes_but_not_ranks():
    batch = random_batch(0, 16)  # four lanes of four rows

    def digest(batch: Batch) -> str:
        return order_text(order_digest(batch))

    halves = [
        replace(batch, sample_id=batch.sample_id[part], lane=batch.lane[part])
        for part in (slice(0, 8), slice(8, None))
    ]
    assert order_text(order_digest(halves[0]) + order_digest(halves[1])) == digest(batch)
    swapped = batch.sample_id.clone()
    swapped[[2, 3]] = swapped[[3, 2]]
    other = batch.sample_id.clone()
    other[5] = 99
    moved = batch.lane.clone()
    moved[4] = 0
    changes = [{"sample_id": swapped}, {"sample_id": other}, {"lane": moved}]
    digests = {digest(batch), *(digest(replace(batch, **change)) for change in changes)}
    assert len(digests) == 4


def test_chains_differ_from_the_first_different_step_on():
    records = [StepRecord(0, step, f"{step:016x}", 0.1 * step) for step in range(4)]
    whole = Chain().extended(records)
    assert Chain().extended(records[:2]).extended(records[2:]) == whole
    loss = Chain().extended([*records[:3], replace(records[3], loss=0.3)])
    assert records[3].loss == 0.1 * 3 != 0.3
    assert (loss.order, loss.loss) != (whole.order, whole.loss)
    assert loss.order == whole.order
    order = Chain().extended([replace(records[0], order="f" * 16), *records[1:]])
    assert order.order != whole.order
    assert order.loss == whole.loss
