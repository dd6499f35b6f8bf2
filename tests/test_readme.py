"""README.md, CONTRIBUTING.md and the guide: quoted output is what is printed, and what they name exists.

A ```python block is run, and must print what a ```output block after it says. Blocks of a page share a namespace, but
for those that import a framework, which is not always installed: they stand alone.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "docs" / "notebook").glob("*.md"))]  # fmt: skip
EXAMPLES = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """The (language, line, text) of the page's code blocks; the line is where the text begins."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(block[1], text.count("\n", 0, block.start(2)) + 1, block[2]) for block in found]


def frameworks(text):
    """What an example needs that is not always installed."""
    hosts = r"torch|transformers|jax|autograd|onnx|sklearn|xarray|dask\.distributed|dask|zarr|pandas|numba"
    return sorted(set(re.findall(rf"^ *(?:import|from) ({hosts})\b", text, re.MULTILINE)))


def examples(page):
    """The (line, text, output) of its Python; no output block means that nothing is printed."""
    found, last = [], ""
    for language, line, text in blocks(page):
        if language == "python":
            found.append((line, text, ""))
        elif language == "output":
            assert last == "python", f"line {line}: the output of what?"
            found[-1] = (*found[-1][:2], text)
        last = language
    return found


ALONE = [(page, *example) for page in EXAMPLES for example in examples(page) if frameworks(example[1])]


def run(page, line, text, names):
    """What it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        exec(compile("\n" * (line - 1) + text, name(page), "exec"), names)
    return stream.getvalue()


def anchor(heading):
    """GitHub's anchor for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_examples_print_what_the_page_says(page):
    names = {"__name__": "__main__"}
    for line, text, output in examples(page):
        if not frameworks(text):
            assert run(page, line, text, names) == output, f"line {line}"


@pytest.mark.parametrize(
    ("page", "line", "text", "output"),
    ALONE,
    ids=[f"{name(page)}-{'-'.join(frameworks(text))}" for page, _, text, _ in ALONE],
)
def test_examples_of_frameworks(page, line, text, output):
    for host in frameworks(text):
        pytest.importorskip(host, reason=f"the example needs {host}")
    assert run(page, line, text, {"__name__": "__main__"}) == output, f"line {line}"


def test_readme_has_an_example_with_its_output():
    languages = [language for language, _, _ in blocks(ROOT / "README.md")]
    assert languages[:2] == ["python", "output"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, part = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if part:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES[:1] + [page for page in PAGES if page.stem == "guide"], ids=name)
def test_functions_that_are_named_are_there(page):
    """Every public name is in the guide; what README and guide name as a function or a method exists."""
    text = page.read_text(encoding="utf-8")
    words = set(re.findall(r"`(?:fastattn\.)?([A-Za-z_]\w*(?:\.\w+)?)`", text))
    for word in words & set(fastattn.__all__):
        assert callable(getattr(fastattn, word))
    for method in (word for word in words - set(fastattn.__all__) if word.startswith(("from_", "MultiHeadAttention."))):
        assert hasattr(fastattn.MultiHeadAttention, method.rpartition(".")[2]), method
    if page.stem == "guide":
        assert set(fastattn.__all__) <= words


def test_commands_that_others_rely_on():
    """`.ci/run` installs and tests as in the README, and runs its example."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ('pip install -e ".[test]" && python -m pytest', "python examples/semantic_search.py"):
        assert command in text
    for script in re.findall(
        r"python ((?:examples|benchmarks|docs|tests)/\S+\.py)", "".join(p.read_text() for p in PAGES)
    ):
        assert (ROOT / script).exists(), script


def test_notebook_lists_its_pages():
    folder = ROOT / "docs" / "notebook"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for page in sorted(folder.glob("[0-9]*.md")):
        assert f"({page.name})" in index
        headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings[:2] == ["Question", "Method"], page.name
        assert headings[-1] == "Verdict", page.name
