"""Plot of an index: recall against milliseconds per query, as measured at the build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import ServiceError

if TYPE_CHECKING:
    from index_store.storage.manifest import Manifest


def draw_curve(manifest: Manifest, path: Path) -> None:
    """Draw the points measured at the build; the setting that serves has a ring around it.

    Raises ServiceError where matplotlib is not installed (it is no part of serving), or where the
    picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ServiceError(
            "--plot needs matplotlib, which is not installed: pip install 'reco-serve[plots]'"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for recipe in dict.fromkeys(point["recipe"] for point in manifest.index["curve"]):
        points = [point for point in manifest.index["curve"] if point["recipe"] == recipe]
        axes.plot([p["ms"] for p in points], [p["recall"] for p in points], "o-", markersize=4, label=recipe)
        for point in points:
            if (recipe, point["probes"]) == (manifest.index["recipe"], manifest.index["probes"]):
                axes.plot(point["ms"], point["recall"], "o", markersize=13, fillstyle="none", color="black")
    axes.axhline(manifest.recall["floor"], linestyle=":", color="grey")
    axes.set(
        xscale="log",
        xlabel="milliseconds per query (batches of 32)",
        ylabel=f"recall@{manifest.recall['k']}, the worse side",
    )
    axes.set_title(f"{manifest.ref}: {manifest.pairs:,} pairs", fontsize=10)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a file ending that is no picture's
        raise ServiceError(f"cannot draw {path} ({error}): name a .png in a folder that can be written") from error
