"""A sweep's record and decisions on real MLflow, its trials played by the test."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from data.folder import Folder
from service import launch, study
from service.config import ConfigError, RunConfig, RunError, check_search, load_preset, with_values
from service.cost import trial_seconds
from service.files import (
    ATTEMPT_NAME,
    BEST_NAME,
    PAYLOAD_NAME,
    REPORT_NAME,
    RESULT_NAME,
    TRIALS_NAME,
    read_history,
    read_json,
)
from service.plan import manifest_of
from service.record import Record, check_same, is_sweep, stored_config, summary, sweep_table
from service.sweep import Sweep
from service.sweep_page import page
from service.tune import extended, make_plan, slots

MANIFEST = manifest_of(load_preset("digits"))
TIMES = {"began": 1.0, "setup_seconds": 0.1, "forked_epochs": 0, "forked_seconds": 0.0}


def config(storage: Path, name: str = "s", **search: Any) -> RunConfig:
    preset = load_preset("digits")
    values = preset.search.model_dump() | {"trials": 10, "grace_epochs": 1, **search}
    changed = {"name": name, "storage": str(storage), "search": type(preset.search)(**values)}
    return launch.resolve(preset.model_copy(update=changed))


class Player:
    """Plays the trials of a sweep: at any time, any of those that run reports."""

    def __init__(self, wanted: RunConfig, order: int, num_slots: int = 2):
        self.sweep = Sweep(wanted, MANIFEST, Folder.at(wanted.storage), slots=2, on_gpu=False)
        self._random = random.Random(order)
        self._slots = num_slots
        self.running: dict[str, Any] = {}
        self.sweep.open(began=0.0)

    def step(self) -> bool:
        """Start what may start, and let one report; False at the end."""
        while len(self.running) < self._slots and not isinstance(found := self.sweep.next(), str):
            name, folder = found
            payload = read_json(folder / PAYLOAD_NAME)
            assert payload
            self.running[name] = reports(payload["config"], payload["generation"] or {})
        if not self.running:
            assert self.sweep.next() == "done"
            return False
        name = self._random.choice(list(self.running))
        report = next(self.running[name])
        if self.sweep.report(name, {**report, "seconds": 1.0, **TIMES}) or "end" in report:
            del self.running[name]
        return True

    def run(self) -> Record:
        while self.step():
            pass
        self.sweep.close("FINISHED")
        return self.sweep.record


def reports(values: dict[str, Any], generation: dict[str, Any]):
    """What a trial with this config reports: higher for lr near 0.02, rising with epochs."""
    lr, eta, seed = values["optim"]["lr"], values["midas"]["eta"], values["train"]["seed"]
    first = 0.9 - abs(lr - 0.02) * 5 - eta / 10 + seed / 1000
    scores = [first + epoch / 100 for epoch in range(1, 6)]
    if eta > 0.4:
        yield {"end": "diverged", "reason": "loss nan"}
    for epoch, score in enumerate(scores[:-1], 1):
        if epoch == generation.get("until"):
            yield {"end": "paused", "main_epochs": epoch, "score": score}
        if epoch > generation.get("since", 0):
            yield {"main_epochs": epoch, "score": score}
    best = {"metrics": {"val/accuracy": scores[-1], "best_epoch": 4}, "checkpoint": "c"}
    chains = {"precision": "fp32", "order_chain": "", "loss_chain": ""}
    yield {"end": "complete", "main_epochs": 5, "score": scores[-1], **best, **chains}


def outcome(record: Record) -> list[Any]:
    return [(e.name, e.values, e.state, e.scores) for e in record.all()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Record]:
    wanted = config(tmp_path_factory.mktemp("runs"))
    return wanted, Player(wanted, order=0).run()


def test_all_trials_end_and_some_are_pruned(unbroken: tuple[RunConfig, Record]):
    wanted, record = unbroken
    states = [entry.state for entry in record.entries]
    assert len(states) == 10
    assert states.count("complete") >= 2
    assert states.count("pruned") >= 2
    found = summary(wanted, record, Path())
    assert found["trials_finished"] == 10
    assert 0 < found["pruned_share"] < 1
    best = study.best(record.entries)
    assert best
    assert found["best/val/accuracy"] == best.score


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_reports_does_not_matter(
    unbroken: tuple[RunConfig, Record], tmp_path: Path, order: int
):
    assert outcome(Player(config(tmp_path), order).run()) == outcome(unbroken[1])


def test_an_interrupted_sweep_goes_on_as_it_would_have(
    unbroken: tuple[RunConfig, Record], tmp_path: Path
):
    for kill in (3, 7, 4, 100):
        player = Player(config(tmp_path), order=kill)
        for _ in range(kill):
            player.step()  # then the driver is lost: nothing is closed
        with (player.sweep.folder / TRIALS_NAME).open("a") as file:
            file.write('{"event": "sco')
    record = Player(config(tmp_path), order=9).run()
    assert outcome(record) == outcome(unbroken[1])
    begun = [e for e in read_history(player.sweep.folder / TRIALS_NAME) if e["event"] == "begin"]
    assert [event["number"] for event in begun if not event["reseed"]] == list(range(10))


def test_the_best_are_trained_again_with_another_seed(unbroken: tuple[RunConfig, Record]):
    wanted, record = unbroken
    complete = [entry for entry in record.entries if entry.state == "complete"]
    assert [entry.reseed for entry in record.reseeded] == [1] * min(5, len(complete))
    assert all(entry.state == "complete" for entry in record.reseeded)
    best, again = record.top()[0], record.reseeded[0]
    assert (again.number, again.values) == (best.number, best.values)
    assert again.score == pytest.approx((best.score or 0) + 0.001)
    found = summary(wanted, record, Path())
    assert found["best/val/accuracy"] == best.score
    assert found["top/seeds"] == 2
    assert found["top/best_mean"] == pytest.approx((best.score or 0) + 0.0005)
    assert found["top/std_over_seeds"] == pytest.approx(0.001 / 2**0.5)
    page = (Path(wanted.storage) / "s" / REPORT_NAME).read_text()
    assert "10 configurations tried" in page
    assert "over 2 seeds" in page


def test_the_page_has_figures_and_tables_and_fetches_nothing(
    unbroken: tuple[RunConfig, Record], tmp_path: Path
):
    wanted, record = unbroken
    text = (Path(wanted.storage) / "s" / REPORT_NAME).read_text()
    for name in ("Optimization History", "Parallel Coordinate", "Importances", "Contour"):
        assert name in text
    assert text.count("<td>complete</td>") == sum(e.state == "complete" for e in record.entries)
    best, scores = record.over_seeds()[0]
    assert f"<td>{best.number}</td><td>2</td><td>{sum(scores) / 2:.4f}</td>" in text
    assert not re.search(r"<script[^>]* src=", text)
    nothing = Record(tmp_path)
    assert page(wanted.search, nothing, summary(wanted, nothing, tmp_path))


def test_a_trial_that_was_to_be_ended_is_ended_by_the_next_command(
    unbroken: tuple[RunConfig, Record], tmp_path: Path
):
    """The driver is lost between a score and the end that follows from it."""
    events = read_history(Path(unbroken[0].storage) / "s" / TRIALS_NAME)
    last = next(i for i, e in enumerate(events) if e.get("state") == "pruned")
    wanted = config(tmp_path)
    folder = tmp_path / "s"
    shutil.copytree(Path(unbroken[0].storage) / "s", folder)
    shutil.copy(Path(unbroken[0].storage) / "mlflow.db", tmp_path)
    lines = [json.dumps(event) + "\n" for event in events[:last]]
    (folder / TRIALS_NAME).write_text("".join(lines))
    player = Player(wanted, order=3)
    assert player.sweep.record.named(events[last]["trial"]).state == "pruned"
    assert outcome(player.run()) == outcome(unbroken[1])


def test_a_population_goes_on_from_its_best_whatever_is_faster(tmp_path: Path):
    outcomes = []
    for order in (0, 1, 2):
        wanted = config(tmp_path / str(order), scheduler="pbt", trials=8)
        player = Player(wanted, order)
        if order == 2:  # lost on the way, and started again
            for _ in range(17):
                player.step()
            player = Player(wanted, order)
        record = player.run()
        outcomes.append(outcome(record))
        assert not record.reseeded
        alive = [entry for entry in record.entries if entry.state == "complete"]
        assert len(alive) >= 6
        assert {max(entry.scores) for entry in alive} == {5}
    assert outcomes[0] == outcomes[1] == outcomes[2]
    events = read_history(tmp_path / "0" / "s" / TRIALS_NAME)
    generations = [event for event in events if event["event"] == "generation"]
    assert [event["generation"] for event in generations] == [1, 2, 3, 4]
    taken = [
        m for event in generations for n, m in event["members"].items() if int(n) != m["donor"]
    ]
    assert len(taken) >= 4
    started = {repr(event["values"]) for event in events if event["event"] == "begin"}
    assert any(repr(member["values"]) not in started for member in taken)


def test_mlflow_has_a_run_per_trial_inside_that_of_the_sweep(unbroken: tuple[RunConfig, Record]):
    wanted, record = unbroken
    client = MlflowClient(f"sqlite:///{wanted.storage}/mlflow.db")
    parent = client.get_run(record.fixed["mlflow_run_id"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert len(children) == 10 + len(record.reseeded)
    assert {child.info.status for child in children} == {"FINISHED"}
    best = study.best(record.entries)
    assert best
    marked = [child for child in children if child.data.tags["best"] == "true"]
    assert [child.data.tags["trial"] for child in marked] == [str(best.number)]
    assert f"Best: **{best.name}**" in parent.data.tags["mlflow.note.content"]
    assert marked[0].data.params["optim.lr"] == str(best.values["optim.lr"])
    assert any(child.data.tags["state"].startswith("pruned: asha") for child in children)
    history = client.get_metric_history(parent.info.run_id, "best/val/accuracy")
    assert [point.value for point in history] == sorted(point.value for point in history)
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {BEST_NAME, REPORT_NAME, RESULT_NAME} <= names


def test_best_yaml_is_a_config_for_train(unbroken: tuple[RunConfig, Record]):
    wanted, record = unbroken
    best, found = study.best(record.entries), load_preset(f"{wanted.storage}/s/{BEST_NAME}")
    assert best
    assert found.optim.lr == best.values["optim.lr"]
    assert found.scaling == wanted.scaling
    assert found.name is None
    assert with_values(wanted, best.values).resolved() | {"name": None} == found.resolved()


def test_an_ended_sweep_has_nothing_to_do_and_can_be_extended(tmp_path: Path):
    wanted = config(tmp_path, trials=3)
    before = outcome(Player(wanted, order=0).run())
    assert not Player(wanted, order=0).step()
    record = Player(extended(stored_config("s", str(tmp_path)), 2), order=0).run()
    assert len(record.entries) == 5
    assert outcome(record)[:3] == before[:3]
    assert not record.due_reseeds(1)


def test_a_stopped_trial_goes_on_later_in_the_same_mlflow_run(tmp_path: Path):
    player = Player(config(tmp_path, trials=2), order=0)
    player.step()
    player.sweep.ask_to_stop()
    assert player.sweep.next() == "done"
    for name in player.running:
        assert (player.sweep.folder / name / ATTEMPT_NAME).read_text() == ""
        assert not player.sweep.report(name, {"end": "stopped", "seconds": 0.5, **TIMES})
    player.sweep.close("KILLED")
    runs = [entry.run_id for entry in player.sweep.record.entries]
    record = Player(config(tmp_path, trials=2), order=0).run()
    assert [entry.run_id for entry in record.entries] == runs
    assert [entry.reseed for entry in record.reseeded] == [1, 1]
    assert all(entry.state == "complete" for entry in record.entries)


def test_a_sweep_whose_trials_all_fail_stops(tmp_path: Path):
    player = Player(config(tmp_path), order=0)
    for _ in range(4):
        name, _ = player.sweep.next()
        player.sweep.lost(str(name), "out of memory")
    with pytest.raises(RunError, match="all 4 trials so far failed.*out of memory"):
        player.sweep.next()


def test_other_settings_are_refused_and_budgets_are_not(
    unbroken: tuple[RunConfig, Record],
):
    wanted, _ = unbroken
    assert is_sweep(wanted)
    storage = Path(wanted.storage)
    check_same(config(storage, trials=99, hours=2.0))
    with pytest.raises(ConfigError, match="search.seed: 0 -> 1"):
        check_same(config(storage, seed=1))
    with pytest.raises(ConfigError, match="sweeps there are s"):
        stored_config("t", wanted.storage)


def test_table_of_a_sweep(unbroken: tuple[RunConfig, Record]):
    wanted, record = unbroken
    table = sweep_table(wanted, record, Path(wanted.storage) / "s")
    assert table["ended"] == 10
    assert table["eta"] == 0.0
    assert "optim.lr=" in table["rows"][0][-1]


def test_slots_follow_the_cluster(tmp_path: Path):
    wanted = config(tmp_path)
    assert slots(wanted, [{"CPU": 4}]) == 4
    assert slots(wanted, [{"CPU": 64}]) == 10
    assert slots(wanted, [{"CPU": 64, "GPU": 3}]) == 3
    assert slots(config(tmp_path, concurrent=2), [{"CPU": 64}]) == 2
    pairs = config(tmp_path, workers_per_trial=2)
    assert slots(pairs, [{"CPU": 3}, {"CPU": 2}, {"CPU": 0}]) == 2
    assert slots(pairs, [{"CPU": 8, "GPU": 2}, {"CPU": 1, "GPU": 4}]) == 1
    assert slots(pairs, [{"CPU": 1}]) == 0


def test_plan_has_the_numbers_and_refuses_what_cannot_be(tmp_path: Path):
    plan = make_plan(config(tmp_path), 360.0, [{"CPU": 3}])
    assert plan["concurrent"] == 3
    assert plan["hours_without_pruning"] == 0.5
    assert plan["rungs_in_main_epochs"] == "1, 3, 9"
    with pytest.raises(ConfigError, match="less than one trial takes, about 0.1 hours"):
        make_plan(config(tmp_path, hours=0.05), 360.0, [{"CPU": 3}])
    assert plan["trials_reseeded"] == 5
    with pytest.raises(ConfigError, match="the cluster has 0 CPUs"):
        make_plan(config(tmp_path), 360.0, [{}])


def test_cost_of_a_trial_grows_with_its_epochs(tmp_path: Path):
    short = config(tmp_path)
    long = short.model_copy(update={"optim": short.optim.model_copy(update={"epochs": 3000})})
    assert 0 < trial_seconds(short, MANIFEST) < trial_seconds(long, MANIFEST)


def test_a_search_needs_settings_that_exist():
    preset = load_preset("digits")
    check_search(preset)

    def searching(space: dict[str, Any]) -> RunConfig:
        return preset.model_copy(update={"search": type(preset.search)(space=space)})

    for space, message in (
        ({}, "space is empty"),
        ({"optim.rate": {"kind": "choice", "values": [1]}}, "unknown key optim.rate"),
        ({"optim.lr": {"kind": "uniform", "low": -1, "high": 1}}, "optim.lr=-1"),
        ({"midas.warmup_epochs": {"kind": "int", "low": 2, "high": 99}}, "no main phase"),
        ({"train.precision": {"kind": "choice", "values": ["fp8"]}}, "train.precision='fp8'"),
        ({"scaling.num_workers": {"kind": "choice", "values": [1]}}, "does not decide"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_search(searching(space))


def test_a_population_needs_settings_that_can_change_on_the_way():
    preset = load_preset("digits")
    space = {"midas.warmup_epochs": {"kind": "int", "low": 2, "high": 5}}
    search = type(preset.search)(space=space, scheduler="pbt")
    with pytest.raises(ConfigError, match="search.space has none that can"):
        check_search(preset.model_copy(update={"search": search}))


def test_training_does_not_look_at_the_search():
    assert "search" not in json.dumps(load_preset("digits").resolved())
