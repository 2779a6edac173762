"""The figure: how much of each bound was used.

Ratios only, so that one machine's figure says something about another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import Result

_INK, _GOOD, _BAD, _GREY = "#26323f", "#2f7d6d", "#b5452c", "#9aa7b2"


def draw(results: Mapping[str, Result], files: Sequence[Path]) -> None:
    """Write the figure to each of `files`; the suffix says in which format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "gridsession"  # the same figures, the same file
    from matplotlib import pyplot

    checks = [x for result in results.values() for x in result.checks if not x.exact]
    if not checks:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.36 * len(checks)), layout="constrained")
    shares = [check.value / check.limit for check in checks]
    colours = [_GOOD if check.ok else _BAD for check in checks]
    axes.barh([x.what for x in checks], shares, color=colours, height=0.62)
    axes.axvline(1, color=_INK, linewidth=1.2)
    for place, check in enumerate(checks):
        shown = f" {check.value:.2f}{check.unit} of {check.limit:g}{check.unit}"
        label = axes.text(shares[place], place, shown, va="center", fontsize=8, color=_INK)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.set_xlim(0, max(1.0, *shares) * 1.28)
    axes.invert_yaxis()
    axes.set_xlabel("share of the bound (left of the line: kept)", color=_INK)
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=150, metadata=metadata)
    pyplot.close(figure)
