"""The pages of `midas ui` after a training and a sweep, in a real browser; leaves screenshots.

They go to the folder MIDAS_SCREENSHOTS, where it is set. Those of the README are made by
`MIDAS_SCREENSHOTS=tests/screenshots uv run pytest -m slow tests/service/test_ui.py -k "not sweep"`.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Locator, Page, ViewportSize, expect, sync_playwright

from service import study
from service.record import Record
from tests.service.cli import finish, last_json, midas, start
from tests.service.test_tracking import free_port, wait_until_up
from tests.service.test_tune import SWEEP

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH to open the pages in"),
]

NAME = "attributes.`Run Name`"
FIGURES = [
    "Optimization History Plot",
    "Intermediate Values Plot",
    "Hyperparameter Importances",
    "Parallel Coordinate Plot",
    "Slice Plot",
    "Contour Plot",
]
MAX_BYTES = 150_000
# The report has to do without a network.
CLASSIC = "?workflowType=machine_learning"
SIZE: ViewportSize = {"width": 1280, "height": 800}
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(storage: Path) -> dict[str, Any]:
    """A run, and its model as champion."""
    train = ("train", "digits", "--name", "first", "--register-as", "digits", "--json")
    result = last_json(midas(*train, storage=storage))
    promote = ("promote", "digits", "1", "--floor", "0", "--json")
    assert last_json(midas(*promote, storage=storage))["promote/promoted"]
    return result


@pytest.fixture(scope="module")
def swept(storage: Path) -> dict[str, Any]:
    return last_json(midas(*SWEEP, "--name", "shown", storage=storage))


@pytest.fixture(scope="module")
def runs_url(swept: dict[str, Any]) -> str:
    """Of the runs of the sweep's experiment, on its server."""
    run = MlflowClient(swept["mlflow_uri"]).get_run(swept["mlflow_run_id"])
    return f"/#/experiments/{run.info.experiment_id}/runs"


@pytest.fixture(scope="module")
def page(storage: Path, trained: dict[str, Any]) -> Iterator[Page]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = start("ui", "--port", str(port), storage=storage)
    try:
        wait_until_up(url, server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", OFFLINE]
            )
            expect.set_options(timeout=30_000)
            page = browser.new_page(base_url=url)
            page.goto("/")
            page.get_by_role("button", name="Close", exact=True).click()  # MLflow's assistant
            yield page
            browser.close()
    finally:
        server.terminate()
        finish(server, timeout=20)


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("MIDAS_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shoot(page: Page, path: Path) -> None:
    """A picture of the page, with few enough colours for a small file."""
    page.screenshot(path=path)
    with Image.open(path) as image:
        assert image.size == tuple((page.viewport_size or {}).values())
        pixels = image.convert("RGB")
    assert len(pixels.getcolors(1 << 24) or []) > 100
    pixels.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES


def toggle_columns(page: Page, *names: str) -> None:
    page.get_by_role("button", name="Columns", exact=True).click()
    search = page.get_by_placeholder("Search columns")
    titles = page.get_by_test_id("column-selector-tree").locator("[class$=tree-title]")
    for name in names:
        search.fill(name)
        titles.filter(has_text=re.compile(f"^{re.escape(name)}$")).click()
    page.keyboard.press("Escape")
    expect(search).to_be_hidden()


def left(locator: Locator) -> float:
    box = locator.bounding_box()
    assert box
    return box["x"]


def run_url(trained: dict[str, Any], tab: str = "") -> str:
    run = MlflowClient(trained["mlflow_uri"]).get_run(trained["mlflow_run_id"])
    return f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}{CLASSIC}"


def test_the_experiment_lists_the_run_with_its_model(
    page: Page, trained: dict[str, Any], shots: Path
):
    page.set_viewport_size(SIZE)
    page.goto(run_url(trained))  # where the pages learn which version is of this run
    expect(page.get_by_text(re.compile(r"digits\s*v1")).first).to_be_visible()
    page.goto(run_url(trained).rpartition("/")[0] + CLASSIC)
    row = page.locator(f"[row-id='{trained['mlflow_run_id']}']")
    expect(row.get_by_role("link", name="first", exact=True)).to_be_visible()
    expect(row.get_by_text("digits v1")).to_be_visible()
    changed = ("Dataset", "Source", "test/accuracy", "test/f1_macro")
    toggle_columns(page, *changed)
    accuracy = row.locator("[col-id='metrics.`test/accuracy`']")
    expect(accuracy).to_be_visible()
    assert float(accuracy.inner_text()) == pytest.approx(trained["test/accuracy"], abs=1e-3)
    shoot(page, shots / "experiment.png")
    toggle_columns(page, *changed)


def test_a_run_shows_its_results_and_curves(page: Page, trained: dict[str, Any], shots: Path):
    page.set_viewport_size(SIZE)
    page.goto(run_url(trained))
    expect(page.get_by_role("heading", name="first")).to_be_visible()
    expect(page.get_by_text("Finished")).to_be_visible()
    page.goto(run_url(trained, "/model-metrics"))
    page.get_by_placeholder("Search metric charts").fill("alpha/|conf_uni/|val/accuracy$")
    for section in (r"alpha\s*\(2\)", r"conf_uni\s*\(2\)", r"val\s*\(1\)"):
        expect(page.get_by_text(re.compile(section)).first).to_be_attached()
    curves = page.locator(".js-plotly-plot")
    expect(curves).to_have_count(4)  # the others are drawn when one scrolls to them
    client = MlflowClient(trained["mlflow_uri"])
    epochs = len(client.get_metric_history(trained["mlflow_run_id"], "alpha/audio"))
    assert epochs > 10
    expect(curves.first.locator("path.point")).to_have_count(epochs)
    shoot(page, shots / "curves.png")


def test_figures_are_drawn_in_the_artifacts(page: Page, trained: dict[str, Any], shots: Path):
    page.set_viewport_size(SIZE)
    page.goto(run_url(trained, "/artifacts/confidences.png"))
    for name in ("accuracy.png", "alpha.png", "confidences.png", "loss.png", "result.json"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    picture = page.locator("img[src*=blob], img[src*=artifact]").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 300
    shoot(page, shots / "figure.png")


def test_the_registered_model_shows_its_alias_and_the_decision(
    page: Page, trained: dict[str, Any], shots: Path
):
    page.set_viewport_size(SIZE)
    page.goto(f"/#/models/digits{CLASSIC}")
    expect(page.get_by_text("Version 1")).to_be_visible()
    expect(page.get_by_text("@ champion")).to_be_visible()
    page.goto(f"/#/models/digits/versions/1{CLASSIC}")
    expect(page.get_by_text("@ champion")).to_be_visible()
    expect(page.get_by_text("all rules are met")).to_be_visible()
    shoot(page, shots / "model.png")


def test_the_runs_page_shows_the_trials_inside_the_sweep(
    page: Page, runs_url: str, swept: dict[str, Any], storage: Path, shots: Path
):
    record = Record(storage / "shown")
    best = study.best(record.entries)
    assert best

    def cell(run_id: str, column: str) -> Locator:
        return page.locator(f"[row-id='{run_id}'] [col-id='{column}']")

    page.set_viewport_size({"width": 1600, "height": 1000})
    page.goto(f"{runs_url}?workflowType=machine_learning")
    parent = cell(swept["mlflow_run_id"], NAME)
    expect(parent.get_by_role("link")).to_have_text("shown")
    expect(page.get_by_text("trial-")).to_have_count(0)
    parent.get_by_role("button").click()
    toggle_columns(page, "Dataset", "Models", "Source", "best/val/accuracy", "state", "best")
    page.locator(f".ag-header-cell[col-id='{NAME}'] .ag-header-cell-resize").dblclick()

    assert len(list(record.all())) == 6 + swept["trials_reseeded"]
    for entry in record.all():
        name = cell(entry.run_id, NAME).get_by_role("link")
        expect(name).to_have_text(entry.name)
        assert left(name) > left(parent.get_by_role("link"))
        expect(cell(entry.run_id, "tags.`state`")).to_contain_text(entry.state)
        is_best = "true" if entry is best else "false"
        expect(cell(entry.run_id, "tags.`best`")).to_have_text(is_best)
    accuracy = cell(best.run_id, "metrics.`best/val/accuracy`").inner_text()
    assert float(accuracy) == pytest.approx(swept["best/val/accuracy"], abs=1e-4)
    shoot(page, shots / "sweep-runs.png")


def test_the_report_is_drawn_in_the_artifacts_of_the_sweep(
    page: Page, runs_url: str, swept: dict[str, Any], shots: Path
):
    page.set_viewport_size({"width": 1600, "height": 2000})
    artifact = f"{swept['mlflow_run_id']}/artifacts/report.html"
    page.goto(f"{runs_url}/{artifact}?workflowType=machine_learning")
    expect(page.get_by_role("heading", name="shown")).to_be_visible()
    report = page.frame_locator("iframe.mlflow-html-iframe")
    expect(report.locator("table").last.get_by_role("row")).to_have_count(1 + swept["trials"])
    expect(report.locator(".gtitle")).to_have_text(FIGURES)
    history = report.locator(".js-plotly-plot").first
    expect(history.locator("path.point")).to_have_count(swept["trials_complete"])
    expect(history.get_by_text("Best Value")).to_be_visible()
    shoot(page, shots / "sweep-report.png")
