"""`reco eval classify`, `retrieve`, `entities` and `ablate`: their flags, and the steps of each."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from service.cli.evaluate.options import AblateOptions, EvaluateOptions, LabelOptions
from service.cli.options import MODEL, ListCommand, with_settings
from service.cli.paths import check_input_file
from service.settings import Settings

EVALUATE = (*MODEL, "memory")
CLASSIFY_EXAMPLES = """\b
Examples:
  reco eval classify test.tar --memory catalog --label class
  reco eval classify test.tar --memory catalog --enhance both --k 1 5 10 20 --json k.json
  reco eval classify test.tar --memory catalog --fusion mean:2 --per-class
  reco eval classify test.tar --memory catalog --search uni cross --fuse cross uni"""
RETRIEVE_EXAMPLES = """\b
Examples:
  reco eval retrieve test.tar --memory pictures --enhance image text both
  reco eval retrieve test.tar --memory pictures --fusion mean:0.5 --dehub 0.75"""
ENTITIES_EXAMPLES = """\b
Examples:
  reco eval entities test.tar --memory everything --seen trained-on.txt
  reco eval entities test.tar --memory everything --seen-share 0.5 --seed 1"""
ABLATE_EXAMPLES = """\b
Examples:
  reco eval ablate grocery/test-*.tar --memory grocery --learn-from things --out var/ablation
  reco eval ablate test.tar --memory catalog --learn-from pictures@v2 --seeds 3 --limit 500
  reco eval ablate test.tar --memory catalog --learn-from things --tune-on things.tar \\
      --tune-caption 'a photo of {class}'"""

app = typer.Typer(rich_markup_mode=None)
Sources = Annotated[
    list[Path], typer.Argument(metavar="SOURCE", help="webdataset tars, or folders with a captions.csv")
]


@app.command("classify", cls=ListCommand, epilog=CLASSIFY_EXAMPLES)
@with_settings(*EVALUATE)
def classify(
    settings: Settings,
    sources: Sources,
    options: EvaluateOptions,
    labelled: LabelOptions,
    per_class: Annotated[bool, typer.Option("--per-class", help="class by class, and the worst confusions")] = False,
) -> None:
    """Count how many labels are right, plain and enhanced."""
    from models.evaluation import evaluate
    from models.evaluation.report import details
    from service.cli.evaluate import inputs, output
    from service.cli.evaluate.examples import Subject, choose_examples

    options.check()
    labelled.check()
    reco, snapshot = inputs.open_memory(settings)
    data = inputs.Data(sources, labelled.caption, options.limit)
    names = inputs.read_labels(data, labelled)
    photos = inputs.encode_labelled(data, reco, names)
    labels = evaluate.Labels(names, labelled.templates, reco.encoder)
    subject = Subject(reco, photos, labels, snapshot)
    report = evaluate.classify(reco, photos, labels, snapshot, options.settings(), labelled.label)
    examples = None
    if options.report:
        report = output.with_memory_curve(report, options.settings(), subject)
        examples = choose_examples(report, options.settings(), subject, data)
    output.show(report, options, examples)
    if per_class:
        print(details(report))


@app.command("retrieve", cls=ListCommand, epilog=RETRIEVE_EXAMPLES)
@with_settings(*EVALUATE)
def retrieve(
    settings: Settings,
    sources: Sources,
    options: EvaluateOptions,
    caption: Annotated[
        str | None,
        typer.Option(metavar="TEMPLATE", help="over the item's fields; default every caption that the tars hold"),
    ] = None,
) -> None:
    """Measure recall from text to image and from image to text over all captions."""
    from models.evaluation import evaluate
    from service.cli.evaluate import inputs, output

    options.check()
    reco, snapshot = inputs.open_memory(settings)
    captioned = inputs.encode_captioned(inputs.Data(sources, caption, options.limit), reco)
    output.show(evaluate.retrieve(reco, captioned, snapshot, options.settings()), options)


@app.command("entities", cls=ListCommand, epilog=ENTITIES_EXAMPLES)
@with_settings(*EVALUATE)
def entities(
    settings: Settings,
    sources: Sources,
    options: EvaluateOptions,
    labelled: LabelOptions,
    seen: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the entities that training saw, one a line")
    ] = None,
    seen_share: Annotated[float, typer.Option(metavar="S", help="without a list: a seeded share of them")] = 0.5,
    seed: Annotated[int, typer.Option(metavar="N", help="of that share")] = 0,
) -> None:
    """Measure labels seen in training and labels never seen, apart."""
    from models.evaluation import evaluate
    from service.cli.evaluate import inputs, output

    options.check()
    labelled.check()
    check_input_file(seen, "--seen")
    reco, snapshot = inputs.open_memory(settings)
    data = inputs.Data(sources, labelled.caption, options.limit)
    names = inputs.read_labels(data, labelled)
    photos = inputs.encode_labelled(data, reco, names)
    known = inputs.read_lines(seen) if seen else inputs.draw_share(names, seen_share, seed)
    labels = evaluate.Labels(names, labelled.templates, reco.encoder)
    both = sorted({*known} & {*names})
    output.show(evaluate.entities(reco, photos, labels, snapshot, options.settings(), both), options)


@app.command("ablate", cls=ListCommand, epilog=ABLATE_EXAMPLES)
@with_settings(*EVALUATE)
def ablate(
    settings: Settings, sources: Sources, options: EvaluateOptions, labelled: LabelOptions, ablation: AblateOptions
) -> None:
    """Measure every claim of the method as one row; rows of an earlier run are kept."""
    from models.evaluation.ablation import ablate as measure
    from models.evaluation.ablation import markdown
    from models.evaluation.evaluate import Labels
    from models.evaluation.workbench import LearningRecipe, Workbench
    from models.fusion.checkpoint import FusionFile
    from service.cli.evaluate import inputs, output

    options.check()
    labelled.check()
    ablation.check()
    reco, snapshot = inputs.open_memory(settings)
    teacher = inputs.open_named(settings, ablation.learn_from, reco)
    data = inputs.Data(sources, labelled.caption, options.limit)
    names = inputs.read_labels(data, labelled)
    photos = inputs.encode_labelled(data, reco, names)
    labels = Labels(names, labelled.templates, reco.encoder)
    recipe = LearningRecipe(steps=ablation.steps, alpha=ablation.alpha, seeds=tuple(range(ablation.seeds)))
    ablation.out.mkdir(parents=True, exist_ok=True)
    served = FusionFile(reco.fusions, reco.k, reco.fusion_id, {})
    rival = inputs.read_rival(ablation, data, names)
    bench = Workbench(reco.encoder, photos, labels, snapshot, teacher, recipe, ablation.out, served=served, rival=rival)
    rows = measure(bench, ablation.out / "rows.jsonl")
    head = (
        f"{len(photos.queries)} photos, {len(names)} labels; encoder {reco.encoder.fingerprint}; "
        f"memory {snapshot.ref}, learned from {teacher.ref}; "
        f"seeds {ablation.seeds}, {ablation.steps} steps, alpha {ablation.alpha:g}"
    )
    text = f"{datetime.now(UTC):%Y-%m-%d}: {head}\n\n{markdown(rows)}\n"
    (ablation.out / "table.md").write_text(text, "utf-8")
    output.print_or_write(text, [dataclasses.asdict(row) for row in rows], options.json)
