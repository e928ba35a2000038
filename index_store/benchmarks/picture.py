"""A picture of the results of the `memory` benchmark."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot recall against latency per recipe, and queries per second of flat, bare and retrieve."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curve, bars = figure.subplots(1, 2)
    for recipe in dict.fromkeys(point["recipe"] for point in report["index"]["curve"]):
        points = [point for point in report["index"]["curve"] if point["recipe"] == recipe]
        curve.plot([p["ms"] for p in points], [p["recall"] for p in points], "o-", markersize=4, label=recipe)
    curve.axhline(0.99, linestyle=":", color="grey")
    curve.set(
        xscale="log", xlabel="milliseconds per query (batches of 32)", ylabel="recall@10", title="measured by the build"
    )
    curve.legend()
    for place, batch in enumerate(("batch_1", "batch_32")):
        rates = report["search"][batch]["queries_per_s"]
        drawn = bars.bar(
            [place + 0.27 * i for i in range(len(rates))], rates.values(), 0.25, color=["#999", "#4c78a8", "#e45756"]
        )
        bars.bar_label(drawn, [f"{name}\n{rate:,.0f}" for name, rate in rates.items()], fontsize=8)
    bars.set(
        yscale="log",
        ylabel="queries per second",
        title=f"{report['settings']['pairs']} pairs x {report['settings']['dim']}",
    )
    bars.set_xticks([0.27, 1.27], ["batch 1", "batch 32"])
    bars.margins(y=0.2)
    figure.savefig(path, dpi=120)
