"""Figures of one run, drawn from its history: one row of named numbers per epoch.

No pyplot: `matplotlib.figure.Figure` has no global state and needs no display. A figure whose
series are absent from the history is left out. Quantities follow figures 3, 4 and 6 of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]

# Okabe-Ito colours, told apart with the common kinds of colour blindness.
MODALITY_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
VALIDATION_COLOR = "#E69F00"
TERM_STYLES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
PER_MODALITY = (
    "alpha/",
    "conf_uni/",
    "conf_multi/",
    "val/head_accuracy/",
    "val/zero_out_accuracy/",
)


def curves(history: History) -> dict[str, Figure]:
    """Draws every figure the history has numbers for, by file name."""
    colors = _modality_colors(history)
    figures = {
        "alpha.png": _alpha(history, colors),
        "confidences.png": _confidences(history, colors),
        "accuracy.png": _accuracy(history, colors),
        "loss.png": _loss(history),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _alpha(history: History, colors: Mapping[str, str]) -> Figure | None:
    figure, axes = _new_figure("Weight α of the unimodal confidences", "α (no unit)")
    for modality, color in colors.items():
        _line(axes, history, f"alpha/{modality}", modality, color=color)
    return _finished(figure, axes, history)


def _confidences(history: History, colors: Mapping[str, str]) -> Figure | None:
    figure, axes = _new_figure(
        "Confidence on misaligned training samples", "mean confidence (0 to 1)"
    )
    for modality, color in colors.items():
        _line(axes, history, f"conf_uni/{modality}", f"{modality}, own head", color=color)
        label = f"{modality}, fusion head"
        _line(axes, history, f"conf_multi/{modality}", label, color=color, linestyle="--")
    return _finished(figure, axes, history)


def _accuracy(history: History, colors: Mapping[str, str]) -> Figure | None:
    figure, axes = _new_figure("Validation accuracy", "share of samples (0 to 1)")
    _line(axes, history, "val/accuracy", "fusion", color="black", linewidth=2.4)
    for modality, color in colors.items():
        _line(axes, history, f"val/head_accuracy/{modality}", f"{modality}, own head", color=color)
        label = f"{modality}, others zeroed"
        key = f"val/zero_out_accuracy/{modality}"
        _line(axes, history, key, label, color=color, linestyle="--")
    label = "both labels on top\n(misaligned samples)"
    _line(axes, history, "mis_val_top2", label, color="0.45", linestyle=":")
    return _finished(figure, axes, history)


def _loss(history: History) -> Figure | None:
    figure, axes = _new_figure("Loss", "loss (nats)")
    _line(axes, history, "train/loss", "training", color="black", linewidth=2.4)
    _line(axes, history, "val/loss", "validation", color=VALIDATION_COLOR, linewidth=2.4)
    terms = sorted({key for row in history for key in row if key.startswith("train/loss_")})
    for index, key in enumerate(terms):
        label = f"training, {key.removeprefix('train/loss_')}"
        style = TERM_STYLES[index % len(TERM_STYLES)]
        _line(axes, history, key, label, color="0.45", linestyle=style)
    return _finished(figure, axes, history)


def _modality_colors(history: History) -> dict[str, str]:
    """One colour per modality, the same in every figure of the run."""
    keys = {key for row in history for key in row}
    names = {
        key.removeprefix(start)
        for start in PER_MODALITY
        for key in keys
        if key[: len(start)] == start
    }
    count = len(MODALITY_COLORS)
    return {name: MODALITY_COLORS[i % count] for i, name in enumerate(sorted(names))}


def _new_figure(title: str, quantity: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.0, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch (1 = first)")
    axes.set_ylabel(quantity)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def _line(
    axes: Axes,
    history: History,
    key: str,
    label: str,
    *,
    color: str,
    linestyle: str | tuple[int, tuple[int, ...]] = "-",
    linewidth: float = 1.6,
) -> None:
    """Draws one series over the epochs that have a finite value of it; nothing if none has."""
    points = [(epoch, row[key]) for epoch, row in enumerate(history, start=1) if key in row]
    points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
    if not points:
        return
    marker = "o" if len(points) <= 20 else ""
    x, y = zip(*points, strict=True)
    axes.plot(
        x, y, label=label, color=color, linestyle=linestyle, linewidth=linewidth,
        marker=marker, markersize=3.5,
    )  # fmt: skip


def _finished(figure: Figure, axes: Axes, history: History) -> Figure | None:
    """Adds the warm-up shade and the legend; None for a figure without any series."""
    if not axes.lines:
        return None
    warm_up = [i for i, row in enumerate(history, start=1) if row.get("main_phase") == 0]
    if warm_up:
        axes.axvspan(0.5, warm_up[-1] + 0.5, color="0.93", zorder=0, label="warm-up")
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize="small")
    return figure
