"""The same as the command `speedrl`, without installing it."""

from speedrl.cli import app

app()
