"""Standard output and error that may go away: a closed pipe, a closed terminal, a full disk."""

import errno
import os
import sys
from contextlib import suppress
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # what a reader or a terminal that is gone leaves behind


class Output:
    """A text stream whose faults cost nothing: what it cannot take is dropped, and no error is raised.

    A letter that its encoding lacks is a question mark.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.drop(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.drop(error)

    def drop(self, error: Exception) -> None:
        """Where there will be no reader again, what is left in the buffers goes nowhere, also at exit."""
        if getattr(error, "errno", None) in GONE:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


def secure_output() -> None:
    """Makes an `Output` of this process's standard output and error. A closed one is opened to nowhere, as its number
    would be that of the next file, which then would get what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in (sys.stdout, sys.stderr))
