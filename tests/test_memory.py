"""Micro-batches that shrink where memory runs out."""

import pytest
import torch

from speedrl.system.memory import MicroBatches

VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])


def update(size: int, *, most: int = 100, halve: bool = True, order: str = "after"):
    """The gradient of sum(w * values), its totals and the sizes that were tried; more than `most` do not fit."""
    weight, tried = torch.ones(7, requires_grad=True), []
    optimizer = torch.optim.SGD([weight])
    batches = MicroBatches(size, undo=optimizer.zero_grad, halve=halve)
    for index in batches.over(torch.arange(7)):
        with batches:
            tried.append(len(index))
            loss = (weight[index] * VALUES[index]).sum()
            loss.backward()  # some of the gradient is there when it happens
            stats = {"sum": loss.detach(), "largest_max": VALUES[index].max(), "count": torch.tensor(len(index) * 1.0)}
            if order == "after":
                batches.add(stats)
            if len(index) > most or (sum(tried) > 3 and len(index) == most):
                raise torch.OutOfMemoryError("CUDA out of memory")
            if order == "last":
                batches.add(stats)
    return weight.grad, batches, tried


@pytest.mark.parametrize("order", ["after", "last"])
def test_where_memory_runs_out_the_size_is_halved_and_all_parts_begin_anew(order):
    """Once at the first part, and once at a second, when a part is done already."""
    whole, batches, tried = update(7)
    assert tried == [7] and torch.equal(whole, VALUES)
    found, shrunk, tried = update(6, most=3, order=order)
    assert tried == [6, 3, 2, 2, 2, 1] and shrunk.size == 2
    assert torch.equal(found, whole), "nothing of an attempt that failed is left in the gradient"
    assert shrunk.totals == batches.totals == {"sum": 28.0, "largest_max": 7.0, "count": 7.0}


def test_the_size_stays_for_the_updates_after_it_and_their_totals_are_their_own():
    batches, failed = MicroBatches(4, undo=lambda: None), []
    for attempt in range(2):
        sizes = []
        for index in batches.over(torch.arange(7)):
            with batches:
                sizes.append(len(index))
                if not failed:
                    failed.append(1)
                    raise torch.OutOfMemoryError
                batches.add({"count": torch.tensor(float(len(index)))})
        assert sizes == [[4, 2, 2, 2, 1], [2, 2, 2, 1]][attempt] and batches.totals == {"count": 7.0}


def test_memory_for_not_even_one_sample_is_an_error():
    sizes, undone = [], []
    batches = MicroBatches(5, undo=lambda: undone.append(1))
    with pytest.raises(torch.OutOfMemoryError):
        for index in batches.over(torch.arange(9)):
            with batches:
                sizes.append(len(index))
                raise torch.OutOfMemoryError("CUDA out of memory")
    assert sizes == [5, 3, 2, 1] and len(undone) == 3


def test_ranks_that_share_the_weights_of_each_part_do_not_halve():
    with pytest.raises(torch.OutOfMemoryError):
        update(6, most=3, halve=False)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("bad"), KeyboardInterrupt()])
def test_other_errors_are_raised(error):
    batches = MicroBatches(5, undo=lambda: pytest.fail("nothing is to undo"))
    with pytest.raises(type(error)):
        for _ in batches.over(torch.arange(9)):
            with batches:
                raise error
