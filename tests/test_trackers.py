"""Trackers: which run of Weights & Biases a training writes to, told apart by its id."""

import sys
import types

import pytest

from speedrl.run.trackers import open_trackers


@pytest.fixture
def started(monkeypatch):
    """The arguments of each run that a stand-in for wandb started."""
    runs = []

    def init(**given):
        runs.append(given)
        return types.SimpleNamespace(log=lambda row, step: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return runs


def test_each_training_has_a_run_of_its_own_and_a_resumed_one_goes_on(started, tmp_path):
    for folder, resume in (("a/train", False), ("b/train", False), ("a/train", True), ("a/train", False),
                           ("a/train", True), ("new/train", True)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        assert open_trackers(["wandb"], tmp_path / folder, {}, resume=resume)({"iteration": 1}) == []
    first, second, resumed, again, resumed_again, new = (run["id"] for run in started)
    assert len({first, second, again, new}) == 4, "a second training in a folder of the same name is another run"
    assert resumed == first and resumed_again == again
    assert [run["resume"] for run in started] == ["never", "never", "allow", "never", "allow", "never"]


def test_a_missing_tracker_says_how_to_install_it_from_a_clone(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (problem,) = open_trackers(["wandb"], tmp_path, {})({"iteration": 1})
    assert 'pip install -e ".[wandb]" in a clone' in problem and "\n" not in problem
