"""What the six dashboards show: a panel is a title, its queries and a unit.

make_dashboards.py writes them out as Grafana's JSON.

In queries, @ stands for the chosen job and instance, [R] for the range that suits the scrape
interval. A description that begins with "Empty" marks a panel which has nothing to show on a
healthy machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Panel:
    """queries: (PromQL, legend).  limits: (colour, from this value on), the first from the
    bottom.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    about: str = ""
    kind: str = "timeseries"  # or stat, heatmap, table
    width: int = 8
    height: int = 8
    limits: tuple[tuple[str, float | None], ...] = (("blue", None),)


@dataclass(frozen=True, slots=True)
class Dashboard:
    """uid: never changed, links point at it."""

    uid: str
    title: str
    panels: tuple[Panel, ...]
    variables: tuple[tuple[str, str, str], ...] = ()  # name, label, query


def stat(title: str, query: str, unit: str, about: str, *limits: tuple[str, float | None], width: int = 4) -> Panel:
    """One number, now."""
    return Panel(title, ((query, "__auto"),), unit, about, "stat", width, 4, limits or (("blue", None),))


def quantiles(
    series: str, by: str, where: str = "", at: Sequence[float] = (0.5, 0.95, 0.99)
) -> tuple[tuple[str, str], ...]:
    """p50, p95, p99 of a histogram, one line for each value of the labels `by`."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return tuple(
        (f"histogram_quantile({q}, sum by (le, {by}) (rate({series}_bucket{{@{where}}}[R])))", f"p{100 * q:g} {legend}")
        for q in at
    )


REQUESTS = "sum(rate(reco_requests_total{@}[R]))"
ON = ',endpoint=~"$endpoint",modality=~"$modality"'
OF = ',modality=~"$modality"'
ENDPOINT = ("endpoint", "Route", "label_values(reco_requests_total{@}, endpoint)")
MODALITY = ("modality", "Modality", "label_values(reco_stage_duration_seconds_count{@}, modality)")
STAGES = "An item's own decode, tokenize, queue and serialize; encode, retrieve and fuse are those of its batch."
GREEN, ORANGE, RED = "green", "orange", "red"

OVERVIEW = Dashboard(
    "reco-overview",
    "RECO Serve: overview",
    (
        stat(
            "Ready",
            "min(reco_ready{@})",
            "bool_yes_no",
            "The least ready instance: whether /readyz answers 200.",
            (RED, None),
            (GREEN, 1),
        ),
        stat("Requests", REQUESTS, "reqps", "All routes but health and metrics."),
        stat(
            "Refused or failed",
            f'(sum(rate(reco_requests_total{{@,code=~"[45].."}}[R])) or vector(0)) / {REQUESTS}',
            "percentunit",
            "Share of replies with a 4xx or 5xx code; 499 = the caller left before the reply.",
            *((GREEN, None), (ORANGE, 0.01), (RED, 0.05)),
        ),
        stat(
            "p99 of embedding",
            'histogram_quantile(0.99, sum by (le) (rate(reco_request_duration_seconds_bucket{@,endpoint=~"/embed/.+"}[R])))',
            "s",
            "From arrival to reply.",
        ),
        stat("Items", "sum(rate(reco_items_total{@}[R]))", "ops", "Images and texts encoded per second."),
        stat(
            "Enhanced",
            'sum(rate(reco_enhanced_total{@,enhanced="true"}[R])) / sum(rate(reco_enhanced_total{@}[R]))',
            "percentunit",
            "Share of vectors that neighbours have refined.",
        ),
        Panel(
            "Requests by route",
            (("sum by (endpoint) (rate(reco_requests_total{@}[R]))", "{{endpoint}}"),),
            "reqps",
            width=12,
        ),
        Panel(
            "Latency of all routes",
            quantiles("reco_request_duration_seconds", "job"),
            "s",
            "From arrival to reply.",
            width=12,
        ),
        Panel(
            "Error budget burn",
            (('slo:reco_burn:ratio{job=~"$job",window=~"5m|1h|6h"}', "{{slo}} {{window}}"),),
            "short",
            "1 = the budget lasts exactly 30 days; 14.4 over an hour wakes someone. From the recording rules.",
            width=12,
        ),
        Panel(
            "Alerts firing",
            (('ALERTS{alertname=~"Reco.+",alertstate="firing"}', "{{alertname}} {{severity}} {{instance}} {{name}}"),),
            "short",
            "Empty unless an alert fires. docs/how-to/operations.md says what to do about each.",
            width=12,
        ),
        Panel(
            "Versions being served",
            (("reco_memory_info{@} * on (job, name, instance) group_left () reco_memory_pairs{@}", "__auto"),),
            "short",
            "What answers now, and its pairs.",
            "table",
            16,
            6,
        ),
        Panel(
            "Running",
            (("reco_build_info{@}", "__auto"),),
            "short",
            "Versions of the service and its libraries.",
            "table",
            8,
            6,
        ),
    ),
)

LATENCY = Dashboard(
    "reco-latency",
    "RECO Serve: latency",
    (
        Panel(
            "By route",
            quantiles("reco_request_duration_seconds", "endpoint", ON),
            "s",
            "From arrival to reply.",
            width=12,
        ),
        Panel(
            "All requests",
            ((f"sum by (le) (increase(reco_request_duration_seconds_bucket{{@{ON}}}[R]))", "{{le}}"),),
            "s",
            "How many requests took how long.",
            "heatmap",
            12,
        ),
        Panel("By stage, p50", quantiles("reco_stage_duration_seconds", "stage, modality", OF, (0.5,)), "s", STAGES),
        Panel("By stage, p95", quantiles("reco_stage_duration_seconds", "stage, modality", OF, (0.95,)), "s", STAGES),
        Panel("By stage, p99", quantiles("reco_stage_duration_seconds", "stage, modality", OF, (0.99,)), "s", STAGES),
        Panel(
            "Where the time goes",
            ((f"sum by (stage) (rate(reco_stage_duration_seconds_sum{{@{OF}}}[R]))", "{{stage}}"),),
            "s",
            "Seconds spent in each stage per second; waiting counts for each item, encoding once a batch.",
            width=12,
        ),
        Panel(
            "Waiting for a batch",
            ((f'sum by (le) (increase(reco_stage_duration_seconds_bucket{{@,stage="queue"{OF}}}[R]))', "{{le}}"),),
            "s",
            "How many items waited how long in the queue.",
            "heatmap",
            12,
        ),
    ),
    (ENDPOINT, MODALITY),
)

BATCHING = Dashboard(
    "reco-batching",
    "RECO Serve: batching",
    (
        Panel(
            "Queue depth",
            ((f"max by (modality) (reco_queue_depth{{@{OF}}})", "{{modality}}"),),
            about="Items waiting for a batch.",
        ),
        Panel("Wait for a batch", quantiles("reco_stage_duration_seconds", "modality", f',stage="queue"{OF}'), "s"),
        Panel("Items encoded", ((f"sum by (modality) (rate(reco_items_total{{@{OF}}}[R]))", "{{modality}}"),), "ops"),
        Panel(
            "Batch size",
            (
                (
                    f"sum by (modality) (rate(reco_batch_size_sum{{@{OF}}}[R]))"
                    f" / sum by (modality) (rate(reco_batch_size_count{{@{OF}}}[R]))",
                    "mean {{modality}}",
                ),
                *quantiles("reco_batch_size", "modality", OF, (0.5, 0.95)),
            ),
            about="Items encoded together. The service's own test item counts as a batch of one.",
        ),
        Panel(
            "Batch sizes",
            ((f"sum by (le) (increase(reco_batch_size_bucket{{@{OF}}}[R]))", "{{le}}"),),
            "short",
            "How many batches had how many items.",
            "heatmap",
        ),
        Panel("Batches", ((f"sum by (modality) (rate(reco_batch_size_count{{@{OF}}}[R]))", "{{modality}}"),), "ops"),
    ),
    (MODALITY,),
)

MEMORY = Dashboard(
    "reco-memory",
    "RECO Serve: memory and swaps",
    (
        Panel(
            "Versions being served",
            (("reco_memory_info{@} * on (job, name, instance) group_left () reco_memory_pairs{@}", "__auto"),),
            "short",
            "What answers now, and its pairs. Marks on every dashboard show where a version begins.",
            "table",
            12,
        ),
        Panel("Pairs", (("max by (name) (reco_memory_pairs{@})", "{{name}}"),), width=6),
        Panel(
            "Age",
            (("time() - min by (name) (reco_memory_created_timestamp_seconds{@})", "{{name}}"),),
            "s",
            "Since the build.",
            width=6,
        ),
        Panel(
            "Swaps",
            (("sum by (name, outcome) (reco_memory_swaps_total{@})", "{{name}} {{outcome}}"),),
            about="Since the service began.",
        ),
        Panel(
            "A swap's phases, mean",
            (
                (
                    "sum by (phase) (reco_memory_swap_duration_seconds_sum{@})"
                    " / sum by (phase) (reco_memory_swap_duration_seconds_count{@})",
                    "{{phase}}",
                ),
            ),
            "s",
            "Over all swaps since the service began: they are too rare for a rate.",
        ),
        Panel(
            "Snapshots alive",
            (("max by (name) (reco_snapshots_alive{@})", "{{name}}"),),
            about="1 between swaps, 2 while requests end on the old version; one that stays above 1 leaks.",
        ),
        Panel(
            "Bytes",
            (("sum by (name, tier) (reco_memory_bytes{@})", "{{name}} {{tier}}"),),
            "bytes",
            "Mapped: read from disk as needed.",
        ),
        Panel(
            "Label sets looked up",
            (("sum by (result) (rate(reco_label_cache_total{@}[R]))", "{{result}}"),),
            "ops",
            "A miss embeds all.",
        ),
        Panel(
            "GPU memory", (("max by (kind) (reco_gpu_memory_bytes{@})", "{{kind}}"),), "bytes", "Empty without a GPU."
        ),
    ),
)

QUALITY = Dashboard(
    "reco-quality",
    "RECO Serve: quality",
    (
        Panel(
            "Similarity of the nearest neighbour",
            quantiles("reco_neighbor_similarity", "modality", OF, (0.1, 0.5, 0.9)),
            about="A fall after a swap, or over days, says that the memory no longer covers what is being asked.",
            width=12,
        ),
        Panel(
            "Similarities",
            ((f"sum by (le) (increase(reco_neighbor_similarity_bucket{{@{OF}}}[R]))", "{{le}}"),),
            "short",
            "How many items found their nearest neighbour how near.",
            "heatmap",
            12,
        ),
        Panel(
            "Enhanced share",
            (
                (
                    'sum by (job) (rate(reco_enhanced_total{@,enhanced="true"}[R])) / sum by (job) (rate(reco_enhanced_total{@}[R]))',
                    "enhanced",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Vectors, and why",
            (("sum by (enhanced, reason) (rate(reco_enhanced_total{@}[R]))", "{{reason}} ({{enhanced}})"),),
            "ops",
        ),
        Panel(
            "Recall of live queries",
            (("min by (name, side) (reco_recall_sampled{@})", "{{name}} {{side}}"),),
            "percentunit",
            "What the index finds of the exact 10 nearest, for a sample of what is being asked.",
        ),
        Panel(
            "Drift of the last swap",
            (("min by (name) (reco_drift_cosine{@})", "{{name}}"),),
            about="Mean cosine of recent vectors under the old and the new version, measured before it is served.",
        ),
    ),
    (MODALITY,),
)

ERRORS = Dashboard(
    "reco-errors",
    "RECO Serve: errors and saturation",
    (
        Panel("Replies by code", (("sum by (code) (rate(reco_requests_total{@}[R]))", "{{code}}"),), "reqps"),
        Panel(
            "Server errors by route",
            (('sum by (endpoint, code) (rate(reco_requests_total{@,code=~"5.."}[R]))', "{{endpoint}} {{code}}"),),
            "reqps",
            "500 a bug, 503 not serving, 504 past the deadline.",
        ),
        Panel("Refused at the door", (("sum by (reason) (rate(reco_rejected_total{@}[R]))", "{{reason}}"),), "reqps"),
        Panel("Cores in use", (("sum by (instance) (rate(process_cpu_seconds_total{@}[R]))", "{{instance}}"),)),
        Panel("Resident memory", (("sum by (instance) (process_resident_memory_bytes{@})", "{{instance}}"),), "bytes"),
        Panel(
            "Open files",
            (("max by (instance) (process_open_fds{@} / process_max_fds{@})", "{{instance}}"),),
            "percentunit",
        ),
        Panel("Queue depth", (("max by (modality) (reco_queue_depth{@})", "{{modality}}"),)),
        Panel("Wait for a batch", quantiles("reco_stage_duration_seconds", "modality", ',stage="queue"', (0.95,)), "s"),
        Panel(
            "GPU memory in use",
            (
                (
                    'max(reco_gpu_memory_bytes{@,kind="used"} / ignoring (kind) reco_gpu_memory_bytes{@,kind="total"})',
                    "used",
                ),
            ),
            "percentunit",
            "Empty without a GPU.",
        ),
    ),
)

DASHBOARDS = (OVERVIEW, LATENCY, BATCHING, MEMORY, QUALITY, ERRORS)
