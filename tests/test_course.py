"""The course: every page runs, prints what it quotes, makes its picture, and its links lead somewhere.

The pages draw with matplotlib; without it they are skipped, with the reason.
"""

import importlib.util
import re
from pathlib import Path

import pytest

COURSE = Path(__file__).resolve().parent.parent / "docs" / "course"
PAGES = sorted(COURSE.glob("[0-9]*.md"))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.fixture(scope="module")
def course():
    """The module docs/course/run.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("run", COURSE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def links(page):
    """Return the targets of the page's images, and of its relative links, without anchors."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)  # brackets and parentheses in code are not links
    found = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    inside = [(mark, target.partition("#")[0]) for mark, target in found if not re.match(r"[a-z]+:", target)]
    return [target for mark, target in inside if mark], [target for mark, target in inside if target and not mark]


@each_page
def test_page_runs_and_makes_its_picture(page, course, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the course draws with matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    printed = course.run_page(page)
    for line, text in course.blocks(page, "output"):
        assert text in printed, f"{page.name}, line {line}: not what the page prints"
    made = [path.name for path in tmp_path.iterdir()]
    assert made == [f"{page.stem}.png"]
    assert made == links(page)[0]
    assert 2_000 < (tmp_path / made[0]).stat().st_size < 120_000


@pytest.mark.parametrize("page", [*PAGES, COURSE / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    images, others = links(page)
    for target in images + others:
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_all_pages_are_listed_and_chained():
    assert PAGES
    names = [page.name for page in PAGES]
    assert [name for name in links(COURSE / "README.md")[1] if name in names] == names
    for page, following in zip(PAGES, names[1:], strict=False):
        assert following in links(page)[1], f"{page.name} does not lead to {following}"


@each_page
def test_page_names_its_source(page):
    assert re.search(r"^Source: \S", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_traceback_shows_the_line_of_the_page(course, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\nWords.\n\n```python\n\nraise ValueError(x)\n```\n")
    with pytest.raises(ValueError, match="1") as caught:
        course.run_page(page)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 11)


def test_a_page_that_is_not_there_is_explained(course):
    with pytest.raises(SystemExit, match=PAGES[0].stem):
        course.main(["99"])


def test_a_folder_that_is_not_there_is_explained(course, tmp_path):
    with pytest.raises(SystemExit, match=r"--output.*nowhere"):
        course.main(["01", "--output", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("is_told", [False, True])
def test_pictures_go_to_a_temporary_folder_or_where_they_are_told_to(course, tmp_path, monkeypatch, capsys, is_told):
    pytest.importorskip("matplotlib", reason="the course draws with matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(course.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "told").mkdir()
    before = {path: path.stat().st_mtime_ns for path in COURSE.iterdir()}
    course.main(["01", *(["--output", str(tmp_path / "told")] if is_told else [])])
    made = list(tmp_path.rglob("*.png"))
    assert [path.name for path in made] == [f"{PAGES[0].stem}.png"]
    assert made[0].is_relative_to(tmp_path / ("told" if is_told else "temporary"))
    assert str(made[0].parent) in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in COURSE.iterdir()} == before
