"""`reco serve`: answer over HTTP, with one flag per setting."""

from __future__ import annotations

import typer

from service.cli.options import with_settings
from service.settings import Settings

app = typer.Typer(rich_markup_mode=None)


@app.command("serve")
@with_settings(*Settings.model_fields)
def serve(settings: Settings) -> None:
    """Serve until a signal stops it."""
    from service.server import server

    server.serve(settings)
