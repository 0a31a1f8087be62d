"""The same as the command `speedrl`."""

import sys

from speedrl.cli import app


def main() -> None:
    """The command line. What the terminal's encoding cannot show is a question mark, not an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
