"""`reco train`: learn a fusion from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import with_settings
from service.settings import Settings

app = typer.Typer(rich_markup_mode=None)


@app.command("train")
@with_settings()
def train(
    settings: Settings,
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="what to learn from, and how")],
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the checkpoint that a stopped run left beside the output")
    ] = False,
) -> None:
    """Train, and print where the fusion lies and what it reached."""
    from models.training.config import TrainConfig
    from models.training.train import train as learn

    print(learn(TrainConfig.read(recipe), resume=resume))
