"""The examples in the docstrings of the method's functions are true."""

import doctest
import importlib
import pkgutil

import pytest

import speedrl.method

MODULES = [module.name for module in pkgutil.iter_modules(speedrl.method.__path__, "speedrl.method.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [one for name in MODULES for one in finder.find(importlib.import_module(name)) if one.examples]
    assert len(MODULES) >= 10 and len(found) >= 2
