"""The HTML page of a sweep: what was tried, how sure the best is, tables, Optuna's figures."""

import html
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from service import study
from service.record import Record
from service.search import SearchConfig
from service.study import OBJECTIVE, Trial

STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
    "td{border-bottom:1px solid #ddd;padding:.2em .8em}tr:first-child{font-weight:bold}"
)


def page(search: SearchConfig, record: Record, result: Mapping[str, Any]) -> str:
    """One page with interactive figures; works without a network.

    Args:
        result: see `record.summary`.
    """
    trials = record.entries
    over_seeds = [(entry, scores) for entry, scores in record.over_seeds() if len(scores) > 1]
    figures = [
        figure.to_html(full_html=False, include_plotlyjs=index == 0)
        for index, figure in enumerate(_figures(search, trials))
    ]
    title = f"<meta charset='utf-8'><title>Sweep</title><style>{STYLE}</style>"
    told = "".join(f"<p>{html.escape(fact)}.</p>" for fact in _facts(result))
    tables = _seeds_html(over_seeds) + _trials_html(trials)
    return f"<!doctype html>{title}<h1>Sweep</h1>{told}{tables}{''.join(figures)}\n"


def _facts(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the best number has to know."""
    lines = [
        f"{result['trials']} configurations tried, {result['trials_complete']} trained to the end, "
        f"{result['trials_pruned']} pruned, {result['trials_diverged']} diverged, "
        f"{result['trials_failed']} failed; pruning saved {result['pruned_share']:.0%} of the "
        "main-phase epochs"
    ]
    if result["warmup/forked_trials"]:
        lines.append(
            f"{result['warmup/forked_trials']} trials went on from a shared warm-up, which saved "
            f"{result['warmup/saved_seconds']:.0f} s of training"
        )
    if "top/best_mean" in result:
        lines.append(
            f"The best of the search has {result[f'best/{OBJECTIVE}']:.4f}, over "
            f"{result['top/seeds']} seeds {result['top/best_mean']:.4f}; the spread of the best "
            f"trials over seeds is {result['top/std_over_seeds']:.4f}"
        )
    return lines


def _figures(search: SearchConfig, trials: Sequence[Trial]) -> Iterator[Any]:
    from optuna import visualization
    from optuna.trial import TrialState

    done = study.make_study(search, trials)
    names = [name for name in search.space if any(name in trial.values for trial in trials)]
    finished = [t for t in done.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    if finished:
        yield visualization.plot_optimization_history(done)
    if any(trial.scores for trial in trials):
        yield visualization.plot_intermediate_values(done)
    if len(finished) > 1 and len({trial.value for trial in finished}) > 1:
        yield visualization.plot_param_importances(done)
    if finished:
        yield visualization.plot_parallel_coordinate(done, params=names)
        yield visualization.plot_slice(done, params=names)
    if finished and len(names) > 1:
        yield visualization.plot_contour(done, params=names[:3])


def _trials_html(trials: Iterable[Trial]) -> str:
    """The trials, best first."""
    rows = sorted(trials, key=lambda t: (t.state != "complete", -(t.score or 0.0), t.number))
    names = list(dict.fromkeys(name for trial in rows for name in trial.values))
    cells = [["trial", "state", OBJECTIVE, *names]]
    for trial in rows:
        score = "" if trial.score is None else f"{trial.score:.4f}"
        values = [study.text_of(trial.values.get(name, "")) for name in names]
        cells.append([str(trial.number), trial.state, score, *values])
    return _table_html(cells)


def _seeds_html(over_seeds: Sequence[tuple[Trial, Sequence[float]]]) -> str:
    if not over_seeds:
        return ""
    cells = [["trial", "seeds", "mean", "std", "scores, that of the search first"]]
    for trial, scores in over_seeds:
        std = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        each = ", ".join(f"{score:.4f}" for score in scores)
        mean = f"{statistics.mean(scores):.4f}"
        cells.append([str(trial.number), str(len(scores)), mean, std, each])
    return _table_html(cells)


def _table_html(cells: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
