"""What is said of an error, and of a signal that ends the work."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def one_line(error: BaseException) -> str:
    """An error's message, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


@contextmanager
def unsaved(iteration: int) -> Iterator[None]:
    """Within, where the trained model is saved, any failure is an OSError that says what stands: `iteration`'s."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have their own for what the system refuses
        stands = f"the checkpoint of iteration {iteration} stands" if iteration else "no checkpoint was saved"
        advice = f"{stands}: mend that, and give the same command with `resume`"
        raise OSError(f"the trained model cannot be saved ({one_line(error)}); {advice}") from error


class Stopped(KeyboardInterrupt):
    """A signal ended the work in good order; `status` is the exit status that schedulers expect of it."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.status = 128 + signal


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Turns SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) into a request, so that an iteration ends whole.

    Yields a function that gives the signal's number, 0 before. A second Ctrl-C stops at once; not one within a second,
    as a terminal and torchrun both pass on the same key. A SIGHUP that is ignored, as under nohup, stays so.
    """
    asked: list[float] = []

    def ask(number: int, _: object) -> None:
        if not asked:
            asked.extend((number, time.monotonic()))
        elif number == signal.SIGINT and time.monotonic() - asked[1] > 1:
            raise KeyboardInterrupt("stopped at once; what was saved before stands")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    try:
        before = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not in the main thread, where signals do not arrive
        yield lambda: 0
        return
    try:
        yield lambda: int(asked[0]) if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
