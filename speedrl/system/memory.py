"""Micro-batches that shrink where the device's memory runs out."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class MicroBatches:
    """Parts of an update, each computed inside the object as a context manager:

        for index in batches:
            with batches:
                ...

    Where memory runs out inside, `undo` takes back what the update left so far, the size is halved, and the parts begin
    anew. With `halve` off the error is raised: ranks that share the weights of each part cannot differ in their number.
    """

    def __init__(self, size: int, *, undo: Callable[[], object], halve: bool = True):
        self.size, self.undo, self.halve = size, undo, halve
        self.totals: dict[str, float] = {}

    def over(self, index: Tensor) -> Iterator[Tensor]:
        """The samples at `index`, int64 [n], `size` at a time."""
        self.start, self.totals = 0, {}
        while self.start < len(index):
            begun = self.start
            self.start += self.size
            yield index[begun : begun + self.size]

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Adds a part's statistics to `totals`; of names ending in _max the largest counts."""
        for name, value in stats.items():
            merge = max if name.endswith("_max") else float.__add__
            self.totals[name] = merge(self.totals.get(name, 0.0), value.item())

    def __enter__(self) -> "MicroBatches":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, torch.OutOfMemoryError) or not self.halve or self.size == 1:
            return False
        error.__traceback__ = None  # its frames hold the tensors that took the memory
        self.undo()
        self.size, self.start, self.totals = (self.size + 1) // 2, 0, {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True
