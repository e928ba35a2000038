"""Flags of the evaluations, as frozen values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.cli.paths import check_input_file, check_output_file, check_output_folder

if TYPE_CHECKING:
    from models.evaluation.queries import Setting


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """Flags of every evaluation; each combination of what is listed is one setting."""

    enhance: Annotated[
        list[Literal["none", "image", "text", "both"]],
        typer.Option(metavar="none|image|text|both...", help="which side the memory refines"),
    ] = dataclasses.field(default_factory=lambda: ["image", "text", "both"])
    search: Annotated[
        list[Literal["uni", "cross"]],
        typer.Option(metavar="uni|cross...", help="compare with the same side, or the other"),
    ] = dataclasses.field(default_factory=lambda: ["uni"])
    fuse: Annotated[
        list[Literal["cross", "uni", "both"]], typer.Option(metavar="cross|uni|both...", help="whose vectors come back")
    ] = dataclasses.field(default_factory=lambda: ["cross"])
    k: Annotated[list[int], typer.Option("--k", metavar="K...", help="neighbours (default the fusion's)")] = (
        dataclasses.field(default_factory=list)
    )
    max_similarity: Annotated[float, typer.Option(metavar="COS", help="nearer images are duplicates")] = 0.98
    max_text_similarity: Annotated[
        float | None, typer.Option(metavar="COS", help="nearer texts are duplicates (default none)")
    ] = None
    dehub: Annotated[float, typer.Option(metavar="W", help="take W times each candidate's hubness off (NNN)")] = 0.0
    limit: Annotated[int | None, typer.Option(metavar="N", help="the first N items only")] = None
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the figures as JSON too; - prints them instead")
    ] = None
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write a page with plots and examples, and a Markdown table")
    ] = None

    def check(self) -> None:
        """Raise UsageError where the results could not be written."""
        check_output_file(self.json, "--json")
        check_output_folder(self.report, "--report")

    def settings(self) -> list[Setting]:
        """Every combination; `none` only with --dehub, since plain CLIP is measured anyway."""
        from models.evaluation.queries import Setting
        from models.reco import RetrievalMode

        counts: list[int | None] = [*self.k] or [None]
        return [
            Setting(enhance, k, RetrievalMode(search, fuse), self.max_similarity, self.max_text_similarity, self.dehub)
            for enhance in self.enhance
            if enhance != "none" or self.dehub
            for search in self.search
            for fuse in self.fuse
            for k in counts
        ]


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """Flags of the evaluations that know classes."""

    label: Annotated[str, typer.Option(metavar="FIELD", help="the JSON field of the class")] = "class"
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the labels, one a line; default all that the data name")
    ] = None
    templates: Annotated[list[str], typer.Option(metavar="TEXT...", help="prompts, each with one {}")] = (
        dataclasses.field(default_factory=lambda: ["a photo of a {}."])
    )

    def check(self) -> None:
        """Raise UsageError where the labels cannot be read."""
        check_input_file(self.labels, "--labels")

    @property
    def caption(self) -> str:
        """The template that makes an item's class its caption."""
        return f"{{{self.label}}}"


@dataclass(frozen=True, slots=True)
class AblateOptions:
    """Flags of the ablation alone."""

    learn_from: Annotated[
        str, typer.Option(metavar="NAME[@V]", help="the memory whose pairs the learned rows learn from")
    ]
    out: Annotated[Path, typer.Option(metavar="DIR", help="rows and table; a second run goes on")] = Path(
        "var/ablation"
    )
    seeds: Annotated[int, typer.Option(metavar="N", help="runs of each learned row")] = 3
    steps: Annotated[int, typer.Option(metavar="N", help="of each learned row")] = 200
    alpha: Annotated[float, typer.Option(metavar="A", help="strength of every rule")] = 2.0
    tune_on: Annotated[
        list[Path], typer.Option(metavar="SOURCE...", help="pairs for the rows that compare full fine-tuning")
    ] = dataclasses.field(default_factory=list)
    tune_caption: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="over their fields; default every caption that they hold")
    ] = None
    tune_steps: Annotated[int, typer.Option(metavar="N", help="of full fine-tuning")] = 100
    tune_pairs: Annotated[int, typer.Option(metavar="N", help="so many of them, drawn with a fixed seed")] = 2048

    def check(self) -> None:
        """Raise UsageError where the rows could not be written."""
        check_output_folder(self.out, "--out")
