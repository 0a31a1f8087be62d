"""The same as the command `speedrl`."""

import sys

from speedrl.cli import app
from speedrl.system.output import secure_output


def main() -> None:
    """The command line. What the terminal's encoding cannot show is a question mark, not an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    secure_output()
    app()


if __name__ == "__main__":
    main()
