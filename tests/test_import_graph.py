"""The example of a graph: sources become modules and imports, alike words attract, the script runs and draws."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fastattn
from fastattn import reference

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "import_graph.py"


@pytest.fixture(scope="module")
def example():
    """The module examples/import_graph.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("import_graph", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path):
    """A small library."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__init__.py").write_text("from . import b\nfrom .c import thing\nimport sys\n")
    (tmp_path / "a" / "b.py").write_text("def read_archive(): import d\nclass ArchiveReader: pass\n")
    (tmp_path / "a" / "c.py").write_text("from .b import read_archive\nfrom ..a import b\nclass ArchiveWriter: pass\n")
    (tmp_path / "d.py").write_text("import a.b, d\nasync def play_sound(): pass\n")
    (tmp_path / "broken.py").write_text("this is no Python\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").write_text("import a\n")
    return tmp_path


def test_sources_become_a_graph(example, sources):
    modules = example.read_modules(sources)
    names, indptr, indices = example.import_graph(modules)
    assert names == ["a", "a.b", "a.c", "d"]
    rows = [[names[j] for j in indices[indptr[i] : indptr[i + 1]]] for i in range(len(names))]
    assert rows == [["a.b", "a.c"], ["d"], ["a", "a.b"], ["a.b"]]
    assert set(modules["a.b"][0]) == {"read_archive", "ArchiveReader"}


def test_alike_words_attract(example, sources):
    modules = example.read_modules(sources)
    names, *graph = example.import_graph(modules)
    features = example.project(example.words_of(modules), np.random.default_rng(0))
    assert names[example.similar(features, names.index("a.b"))[0]] == "a.c"
    known, weights = example.attend(fastattn.graph_attention, features, graph, 2)
    expected = example.attend(reference.graph_attention, features.astype(np.float64), graph, 2)
    np.testing.assert_allclose(known, expected[0], atol=1e-5)
    np.testing.assert_allclose(weights, expected[1], atol=1e-5)


def test_the_standard_library(example, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "graph.png"
    assert example.main(["--module", "json.decoder", "--output", str(path), "--top", "3"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "json.scanner" in text
    assert "rounds of graph attention" in text


def test_unusable_arguments_are_explained(example, sources, capsys):
    assert example.main(["--module", "nowhere", "--folder", str(sources)]) == 1
    assert "no module 'nowhere'" in capsys.readouterr().err
    for wrong, words in (
        ("--folder=nowhere", "no folder"),
        ("--output=x.txt", "must end in"),
        ("--rounds=0", "at least"),
    ):
        with pytest.raises(SystemExit):
            example.main([wrong])
        assert words in capsys.readouterr().err
