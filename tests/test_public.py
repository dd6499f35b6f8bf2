"""The public face: names, signatures, docstrings and the examples in them."""

import doctest
import importlib
import inspect
import pkgutil
import types

import fresh_process
import numpy as np
import pytest

import fastattn
from fastattn import reference

# What the examples of a module need besides NumPy.
NEEDS = {"fastattn.plot": "matplotlib"}


def public_modules():
    """fastattn and its modules without a leading underscore (running __main__ is another matter)."""
    names = [m.name for m in pkgutil.iter_modules(fastattn.__path__) if not m.name.startswith("_")]
    return ["fastattn", *(f"fastattn.{name}" for name in names)]


def test_all():
    """What `from fastattn import *` brings: what the reference defines, and more; in order, each name once."""
    assert fastattn.__all__ == sorted(set(fastattn.__all__))
    assert set(reference.__all__) | set(fastattn._LATER) <= set(fastattn.__all__)
    namespace = {}
    exec("from fastattn import *", namespace)
    for name in fastattn.__all__:
        assert callable(namespace[name]), name
        assert namespace[name].__module__.startswith("fastattn"), name


def test_dir_holds_nothing_unexpected():
    """Behind `fastattn.` stand the public names and modules, nothing that was merely imported."""
    modules = {name.rpartition(".")[2] for name in public_modules()}
    names = {name for name in vars(fastattn) if not name.startswith("_")}
    assert names <= set(fastattn.__all__) | modules
    assert set(fastattn.__all__) <= set(dir(fastattn))


def test_classes_are_loaded_when_asked_for():
    """Reading them is most of an import where there is no byte code."""
    fresh_process.run("""
        import sys, fastattn
        classes = {"cache": ["KVCache"], "streaming": ["StreamingAttention"],
                   "multihead": ["self_attention", "MultiHeadAttention"]}
        for module in classes:
            assert f"fastattn.{module}" not in sys.modules, module
        for module, names in classes.items():
            for name in names:
                assert getattr(fastattn, name) is getattr(getattr(fastattn, module), name)
    """)
    with pytest.raises(AttributeError, match="'nothing'"):
        fastattn.nothing  # noqa: B018


@pytest.mark.parametrize("name", reference.__all__)
def test_signatures_are_those_of_the_reference(name):
    ours = inspect.signature(getattr(fastattn, name)).parameters
    theirs = inspect.signature(getattr(reference, name)).parameters
    assert set(ours) == set(theirs)
    for parameter in theirs.values():
        assert ours[parameter.name].kind == parameter.kind, parameter.name
        assert ours[parameter.name].default == parameter.default, parameter.name
    positional = [p.name for p in theirs.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in ours.values() if p.kind is not p.KEYWORD_ONLY] == positional


@pytest.mark.parametrize("name", fastattn.__all__)
def test_docstrings(name):
    """numpydoc: a summary line, every parameter, what is returned, and an example of the array functions."""
    function = getattr(fastattn, name)
    doc = inspect.getdoc(function)
    assert doc, name
    assert doc.splitlines()[0].strip(), "the summary stands on the first line"
    parameters = inspect.signature(function).parameters
    if parameters:
        assert "Parameters\n----------" in doc
    for parameter in parameters:
        assert parameter in doc, parameter
    if name not in ("set_num_threads", "show_config") and not inspect.isclass(function):
        assert "Returns\n-------" in doc
    if name in reference.__all__:
        assert "Examples\n--------" in doc


@pytest.mark.parametrize("name", public_modules())
def test_modules_say_what_they_are_for(name):
    assert (importlib.import_module(name).__doc__ or "").strip()


@pytest.mark.parametrize("name", public_modules())
def test_examples_run(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"the examples of {name} need {NEEDS[name]}")
    module = importlib.import_module(name)
    results = doctest.testmod(
        module,
        extraglobs={"np": np, "fastattn": fastattn},
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    counts = {
        name: sum(len(test.examples) for test in finder.find(getattr(fastattn, name), name, globs={}))
        for name in reference.__all__
    }
    assert min(counts.values()) > 0, counts


def test_reference_stands_alone():
    """The reference uses NumPy and nothing of the library."""
    modules = {x.__name__ for x in vars(reference).values() if isinstance(x, types.ModuleType)}
    assert modules == {"numpy"}
    owners = {x.__module__ for x in vars(reference).values() if isinstance(x, types.FunctionType)}
    assert owners == {"fastattn.reference"}


def test_show_config(capsys):
    fastattn.show_config()
    assert capsys.readouterr().out.strip()


def test_command_line():
    """`python -m fastattn --info` says what runs here."""
    code = "import runpy, sys; sys.argv = ['fastattn', '--info']; runpy.run_module('fastattn', run_name='__main__')"
    assert fastattn.cpu_info()["selected"] in fresh_process.run(code)


def test_cpu_info():
    info = fastattn.cpu_info()
    assert isinstance(info, dict)
    assert info["selected"] in info["runnable"]
    assert all(isinstance(name, str) for name in info["runnable"])
