"""The public interface: names, signatures, docstrings and their examples."""

import ast
import doctest
import functools
import importlib
import inspect
import pathlib
import pkgutil
import pydoc
import re
import types

import fresh_process
import numpy as np
import pytest

import fastattn
from fastattn import _rules, reference

# What the examples of a module need besides NumPy.
NEEDS = {"fastattn.plot": "matplotlib"}


def public_modules():
    """fastattn and its modules without a leading underscore (running __main__ is another matter)."""
    names = [m.name for m in pkgutil.iter_modules(fastattn.__path__) if not m.name.startswith("_")]
    return ["fastattn", *(f"fastattn.{name}" for name in names)]


def test_all():
    """`from fastattn import *` imports what the reference defines, and more; sorted, each name once."""
    assert fastattn.__all__ == sorted(set(fastattn.__all__))
    assert set(reference.__all__) | set(fastattn._LATER) - {"_C_API"} <= set(fastattn.__all__)
    namespace = {}
    exec("from fastattn import *", namespace)
    for name in fastattn.__all__:
        assert callable(namespace[name]), name
        assert namespace[name].__module__.startswith("fastattn"), name


def test_dir_holds_nothing_unexpected():
    """`fastattn.` has the public names and modules, and nothing that was merely imported."""
    modules = {name.rpartition(".")[2] for name in public_modules()}
    names = {name for name in vars(fastattn) if not name.startswith("_")}
    assert names <= set(fastattn.__all__) | modules
    assert set(fastattn.__all__) <= set(dir(fastattn))


def test_classes_are_loaded_when_asked_for():
    """Without cached byte code, reading them is most of an import."""
    fresh_process.run("""
        import sys, fastattn
        classes = {"cache": ["KVCache"], "streaming": ["StreamingAttention", "StreamingMultiHeadAttention"],
                   "multihead": ["self_attention", "MultiHeadAttention"],
                   "layers": ["Linear", "layer_norm", "rms_norm"]}
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


def keywords(function):
    """Keyword-only parameters with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


SCALES = ("key_scale", "value_scale", "key_center")  # of arrays that are passed: no layer hands them on


def test_lists_of_rules_agree():
    """What functions take, what layers pass on, and what Cython reads: the same names, the same defaults."""
    public = {name: x for name, x in keywords(fastattn.dot_product_attention).items() if name not in SCALES}
    assert set(_rules.Rules.__annotations__) == set(public)
    text = (pathlib.Path(fastattn.__file__).parent / "_rules.pxd").read_text()
    assert re.findall(r"^    PyObject \*(\w+)$", text, re.MULTILINE) == list(public)
    for name in public:
        assert f"    r.{name} = <PyObject *> {name}\n" in text, name
    defaults = re.findall(r"^        (\w+)=some\.get\(\"(\w+)\", (.*)\),$", text, re.MULTILINE)
    assert {name: ast.literal_eval(default) for name, _, default in defaults} == public
    assert all(name == key for name, key, _ in defaults)


@pytest.mark.parametrize(
    ("function", "kind", "own"),
    [
        (fastattn.self_attention, _rules.LayerRules, set()),
        (fastattn.MultiHeadAttention.__call__, _rules.LayerRules, {"cache", "cu_seqlens", "cu_seqlens_context"}),
        (fastattn.StreamingAttention, _rules.StreamRules, set()),
        (fastattn.StreamingMultiHeadAttention, _rules.StreamingLayerRules, set()),
    ],
)
def test_layers_show_the_rules_that_they_hand_on(function, kind, own):
    public, shown = keywords(fastattn.dot_product_attention), keywords(function)
    assert set(shown) == set(kind.__annotations__) | own
    held = _rules.HELD_RULES if "MultiHead" in function.__qualname__ else ()
    for name in set(shown) - own:
        assert shown[name] is _rules.HELD if name in held else shown[name] == public[name]


def test_layers_refuse_keywords_that_they_do_not_have():
    x = np.ones((3, 2))
    layer = fastattn.MultiHeadAttention(np.eye(2), np.eye(2), np.eye(2), num_heads=1)
    calls = {
        "self_attention": functools.partial(fastattn.self_attention, x, np.eye(2), np.eye(2), np.eye(2)),
        "MultiHeadAttention.__call__": functools.partial(layer, x),
        "StreamingAttention": functools.partial(fastattn.StreamingAttention, 1),
        "StreamingMultiHeadAttention": functools.partial(fastattn.StreamingMultiHeadAttention, layer, 1),
    }
    for name, call in calls.items():
        other = "mask" if name == "StreamingAttention" else "enable_gqa"
        with pytest.raises(TypeError, match=rf"^{re.escape(name)}\(\) got an unexpected keyword argument '{other}'$"):
            call(**{other: True})


@pytest.mark.parametrize("name", [n for n in fastattn.__all__ if n.endswith("_attention")])
def test_help_begins_with_a_signature_that_a_person_can_read(name):
    text = pydoc.render_doc(getattr(fastattn, name), renderer=pydoc.plaintext)
    begin, end = text.index(f"{name}("), text.index(")\n")
    assert begin < end
    shown = text[begin:end]
    assert "ArrayLike" not in shown and "->" not in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert all(parameter in shown for parameter in inspect.signature(getattr(fastattn, name)).parameters)
    assert getattr(fastattn, name).__annotations__, "which checkers read"


@pytest.mark.parametrize("name", fastattn.__all__)
def test_docstrings(name):
    """numpydoc: a summary line, every parameter, what is returned, and an example for the array functions."""
    function = getattr(fastattn, name)
    doc = inspect.getdoc(function)
    assert doc, name
    assert doc.splitlines()[0].strip(), "the summary is on the first line"
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
    """The reference uses NumPy, three standard modules, and nothing of the library."""
    modules = {x.__name__ for x in vars(reference).values() if isinstance(x, types.ModuleType)}
    assert modules == {"numpy", "functools", "inspect", "math"}
    owners = {x.__module__ for x in vars(reference).values() if isinstance(x, types.FunctionType)}
    assert owners == {"fastattn.reference"}


def test_show_config(capsys):
    fastattn.show_config()
    assert capsys.readouterr().out.strip()


def test_command_line():
    """`python -m fastattn --info` prints what runs here."""
    code = "import runpy, sys; sys.argv = ['fastattn', '--info']; runpy.run_module('fastattn', run_name='__main__')"
    assert fastattn.cpu_info()["selected"] in fresh_process.run(code)


def test_cpu_info():
    info = fastattn.cpu_info()
    assert isinstance(info, dict)
    assert info["selected"] in info["runnable"]
    assert all(isinstance(name, str) for name in info["runnable"])


def test_version():
    """Said once, and repeated by what people cite and read."""
    root = pathlib.Path(__file__).parent.parent
    citation = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    heading = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation[1] == heading[1] == fastattn.__version__
