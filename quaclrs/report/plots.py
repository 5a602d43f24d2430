"""Plots of a fold's report, drawn by matplotlib through its object-oriented interface.

``Figure`` without ``pyplot`` keeps no global state, needs no display and works in any thread.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from quaclrs.system.atomic_files import atomic_writer
from quaclrs.training.records import EpochRecord

DPI = 120
TRAIN_COLOUR = "#1f77b4"
VALIDATION_COLOUR = "#d9541e"
QUIET_COLOUR = "#8a8a8a"
MAX_ANNOTATED_CLASSES = 40
"""With more classes the numbers in the confusion matrix would overlap."""
MAX_LISTED_CLASSES = 20
"""With more classes the legend of the ROC curves would not fit, and colours would repeat."""
LOWEST_LISTED = 10
"""Classes in that legend where not all are listed."""
MAX_NAME_LENGTH = 28
"""Characters of a class name that are drawn; longer ones would leave no room for the plot."""

History = Sequence[EpochRecord]


def write_plots(directory: Path, history: History, metrics: Mapping[str, Any]) -> list[Path]:
    """Write the four plots of a fold into ``directory``; returns their paths.

    Values in ``history`` that are NaN are left out; ``metrics`` is the result of
    :func:`quaclrs.report.metrics.compute_metrics`. Raises :class:`StorageError` naming the file that cannot be written.
    """
    with matplotlib.style.context("default"):  # a user's matplotlibrc, say with text.usetex, is about their own figures
        figures = {
            "loss_curves.png": draw_losses(history),
            "accuracy_curves.png": draw_accuracies(history),
            "confusion_matrix.png": draw_confusion_matrix(metrics),
            "roc_curves.png": draw_roc_curves(metrics),
        }
        for file_name, figure in figures.items():
            _save(figure, directory / file_name)
    return [directory / file_name for file_name in figures]


def draw_losses(history: History) -> Figure:
    """Training and validation loss over the epochs, with the learning rate behind them."""
    figure, axes = _new_axes(8.0, 4.8)
    _draw_pair(axes, history, "loss")
    axes.set_ylabel("loss")
    axes.set_title("Loss", loc="left", fontweight="bold")
    _draw_learning_rate(axes, history)
    axes.legend(loc="upper right", framealpha=0.9)
    return figure


def draw_accuracies(history: History) -> Figure:
    """Training and validation accuracy over the epochs."""
    figure, axes = _new_axes(8.0, 4.8)
    _draw_pair(axes, history, "accuracy")
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Accuracy", loc="left", fontweight="bold")
    axes.legend(loc="lower right", framealpha=0.9)
    return figure


def draw_confusion_matrix(metrics: Mapping[str, Any]) -> Figure:
    """Counts of (label, prediction), coloured by count / row sum."""
    counts = np.asarray(metrics["confusion_matrix"], dtype=np.int64)  # (C, C)
    names = [_shorten_name(name) for name in metrics["class_names"]]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(4.0 + 0.5 * len(names), 24.0)
    figure, axes = _new_axes(side + 0.8, side)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    ticks = range(len(names))
    cell = 0.75 * 72 * side / len(names)  # points of a row, names and colour bar taken off
    size = min(10.0, 0.85 * cell)
    rotation, vertical = (45, "top") if cell > 14 else (90, "center")
    axes.set_xticks(ticks, names, fontsize=size, rotation=rotation, ha="right", va=vertical, rotation_mode="anchor")
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.2, 0.08 * cell))
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"Confusion matrix, accuracy {metrics['accuracy']:.1%}", loc="left", fontweight="bold")
    colour_bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, label="share of the true class's rows")
    colour_bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    colour_bar.outline.set_visible(False)
    if len(names) <= MAX_ANNOTATED_CLASSES:
        _annotate_counts(axes, counts, shares)
    return figure


def draw_roc_curves(metrics: Mapping[str, Any]) -> Figure:
    """One-vs-rest ROC curves of all classes and their two averages, with the areas in the legend.

    Of more than :data:`MAX_LISTED_CLASSES`, the legend lists the :data:`LOWEST_LISTED` with the smallest areas; the
    others are grey.
    """
    roc = metrics["roc"]
    curves: dict[str, Mapping[str, Any]] = roc["classes"]
    listed = list(curves)
    if len(curves) > MAX_LISTED_CLASSES:
        defined = [name for name in curves if curves[name]["auc"] is not None]
        listed = sorted(defined, key=lambda name: curves[name]["auc"])[:LOWEST_LISTED]
    quiet = [name for name in curves if name not in set(listed)]
    figure, axes = _new_axes(10.0, 6.2)
    axes.plot([0, 1], [0, 1], color=QUIET_COLOUR, linewidth=1, linestyle=":")
    colours = matplotlib.colormaps["tab10"]
    for number, name in enumerate(quiet):
        label = f"{len(quiet)} other classes" if number == 0 else None
        axes.plot(curves[name]["fpr"], curves[name]["tpr"], label=label, color=QUIET_COLOUR, linewidth=0.6, alpha=0.35)
    for index, name in enumerate(listed):
        # dashes tell neighbours apart without colour, and show the first of two equal curves below the second
        dashes = (0, (4, 2)) if (index + index // 10) % 2 else "-"  # the 20 pairs of colour and dashes differ
        _draw_curve(axes, curves[name], name, color=colours(index % 10), linewidth=1.4, linestyle=dashes)
    _draw_curve(axes, roc["macro"], "macro average", color="black", linewidth=2.2, linestyle="--")
    _draw_curve(axes, roc["micro"], "micro average", color="black", linewidth=2.2)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.set_title("ROC curves, one class against the rest", loc="left", fontweight="bold")
    title = f"AUC, the {len(listed)} lowest classes" if quiet else "AUC"
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), title=title, frameon=False)
    for line in legend.get_lines():
        line.set_alpha(None)
    with _missing_glyphs_ignored():
        figure.draw_without_rendering()
        right = legend.get_window_extent().x1 / DPI + 0.12  # inches
    beyond = right - figure.get_figwidth()  # wide names need more
    if beyond > 0:
        figure.set_figwidth(figure.get_figwidth() + 2 * beyond)  # the axes stay in the middle of what is left
    return figure


@functools.cache
def heat_colours() -> npt.NDArray[np.uint8]:
    """(256, 3) uint8: matplotlib's ``turbo``, from blue to red. All callers share the array: do not write to it."""
    table = matplotlib.colormaps["turbo"](np.arange(256), bytes=True)
    return np.ascontiguousarray(table[:, :3])


def font_path() -> Path:
    """Path of matplotlib's own DejaVu Sans: always installed, and it covers more scripts than Pillow's default font."""
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of ``width`` × ``height`` inches with one pair of axes, without top and right spines."""
    margins = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(width, height), dpi=DPI, layout=margins)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with atomic_writer(path) as file, _missing_glyphs_ignored():
        figure.savefig(file, format="png")


@contextlib.contextmanager
def _missing_glyphs_ignored() -> Iterator[None]:
    """A class name in a script that the font lacks is drawn as boxes; one warning per letter would not help."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        yield


def _shorten_name(name: str) -> str:
    """A class name for a plot: shortened, on one line, with ``$`` escaped, which matplotlib reads as a formula."""
    line = " ".join(name.split())
    if len(line) > MAX_NAME_LENGTH:
        half = MAX_NAME_LENGTH // 2
        line = f"{line[:half]}…{line[-half:]}"
    return line.replace("$", r"\$")


def _column(history: History, name: str) -> npt.NDArray[np.float64]:
    """(epochs,) float64; matplotlib leaves NaN out."""
    return np.array([getattr(record, name) for record in history], dtype=np.float64)


def _draw_pair(axes: Axes, history: History, quantity: str) -> None:
    """Draw ``loss`` or ``accuracy`` in training and validation, and mark the epoch whose weights were kept."""
    epochs = _column(history, "epoch")
    validation = _column(history, f"val_{quantity}")
    marker = "o" if len(epochs) <= 40 else None
    axes.plot(
        epochs, _column(history, f"train_{quantity}"), color=TRAIN_COLOUR, marker=marker, ms=3.5, label="training"
    )
    axes.plot(epochs, validation, color=VALIDATION_COLOUR, marker=marker, ms=3.5, label="validation")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    best = _best_epoch_index(history)
    if best is not None:
        # the validation loss may well be lower in another epoch, so both figures say what "best" refers to
        value = f"{validation[best]:.1%}" if quantity == "accuracy" else f"loss {validation[best]:.3f}"
        axes.axvline(epochs[best], color=VALIDATION_COLOUR, linewidth=1, linestyle="--", alpha=0.6)
        label = f"best validation accuracy, epoch {epochs[best]:.0f}: {value}"
        axes.plot(epochs[best], validation[best], "*", color=VALIDATION_COLOUR, ms=14, mec="white", label=label)


def _best_epoch_index(history: History) -> int | None:
    """Index in ``history`` of the first epoch with the highest validation accuracy, whose weights training keeps."""
    accuracies = _column(history, "val_accuracy")
    return None if np.isnan(accuracies).all() else int(np.nanargmax(accuracies))


def _draw_learning_rate(axes: Axes, history: History) -> None:
    rates = _column(history, "learning_rate")
    if np.isnan(rates).all() or np.nanmin(rates) <= 0:
        return
    behind = axes.twinx()
    behind.step(_column(history, "epoch"), rates, where="mid", color=QUIET_COLOUR, linewidth=1, alpha=0.7)
    behind.set_yscale("log")
    behind.set_ylim(np.nanmin(rates) / 2, np.nanmax(rates) * 2)
    behind.set_ylabel("learning rate", color=QUIET_COLOUR)
    behind.tick_params(axis="y", which="both", colors=QUIET_COLOUR)
    behind.spines[["top", "left", "right"]].set_visible(False)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)  # otherwise it hides the axes behind it


def _annotate_counts(axes: Axes, counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> None:
    size = 9 if len(counts) <= 20 else 6
    for row, column in np.argwhere(counts > 0):
        colour = "white" if shares[row, column] > 0.55 else "#2b2b2b"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=size, color=colour)


def _draw_curve(axes: Axes, curve: Mapping[str, Any], name: str, **style: Any) -> None:
    # the area comes first: matplotlib hides labels that start with an underscore, and a class name may
    area = "  –  " if curve["auc"] is None else f"{curve['auc']:.3f}"
    axes.plot(curve["fpr"], curve["tpr"], label=f"{area}  {_shorten_name(name)}", **style)
