"""Processes for the tests: ranks that share a training, and trainings that are killed. They start in a moment, as a
server that has imported the libraries is forked for each."""

import multiprocessing
import os
import socket
import sys

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.preloaded"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def one(work, rank: int, world: int, port: int, log: str, arguments: tuple) -> None:
    """A rank as torchrun starts it: its place in the environment, its output in a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    apart(work, log, arguments)


def apart(work, log: str, arguments: tuple) -> None:
    """work(*arguments) with its output in a file; in a process of its own."""
    import torch

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", buffering=1, encoding="utf-8")  # noqa: SIM115, as long as the process
    work(*arguments)


def start_ranks(work, world: int, folder, *arguments):
    """Starts work(*arguments) on `world` ranks; their outputs go to FOLDER/rank-N.log."""
    port, started = free_port(), []
    for rank in range(world):
        given = (work, rank, world, port, str(folder / f"rank-{rank}.log"), arguments)
        started.append(PROCESSES.Process(target=one, args=given))
        started[-1].start()
    return started


def start(work, log, *arguments):
    """Starts work(*arguments) in a process of its own; its output goes to the file `log`."""
    process = PROCESSES.Process(target=apart, args=(work, str(log), arguments))
    process.start()
    return process


def finish(processes, *, seconds: float = 240) -> list[int]:
    """The exit statuses; what still runs after so long is ended."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def command(*arguments: str) -> None:
    """The command line, as a process runs it."""
    from speedrl.cli import app

    app([str(argument) for argument in arguments])
