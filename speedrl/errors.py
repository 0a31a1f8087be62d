"""What is said of an error."""


def one_line(error: BaseException) -> str:
    """An error's message, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


class Stopped(KeyboardInterrupt):
    """A signal ended the work in good order; `status` is the exit status that schedulers expect of it."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.status = 128 + signal
