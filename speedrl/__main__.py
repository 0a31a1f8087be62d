"""The same as the command `speedrl`."""

from speedrl.cli import app

app()
