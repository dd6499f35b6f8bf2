"""Run the pages of the course, and write their pictures beside them.

    python docs/course/run.py          all pages
    python docs/course/run.py 03 07    the pages with these numbers

The ```python blocks of a page are one program, run from top to bottom; a page saves its picture in the current folder.
What a page prints is quoted in ```output blocks. The tests run the pages with the same function, `run_page`, and
compare the quotations.
"""

import contextlib
import io
import os
import re
import sys
import time
from pathlib import Path

COURSE = Path(__file__).resolve().parent


def pages():
    """Return the paths of all pages, in their order."""
    return sorted(COURSE.glob("[0-9]*.md"))


def blocks(path, language):
    """Return the (line, text) of a page's blocks in a language; the line is the one that the text begins on."""
    page = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [(page.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


def run_page(path):
    """Run a page's Python in the current folder, and return what it printed.

    All blocks share one namespace. Each is compiled under the page's name and behind as many empty lines as come before
    it there, so that a traceback shows the page's own lines.
    """
    os.environ["MPLBACKEND"] = "Agg"  # no window, also where pyplot is used
    names = {"__name__": "__main__", "__file__": str(path)}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for line, text in blocks(path, "python"):
            exec(compile("\n" * (line - 1) + text, str(path), "exec"), names)
    return printed.getvalue()


def main(numbers):
    """Run the pages whose names begin with one of the numbers, or all of them."""
    chosen = [path for path in pages() if not numbers or path.name.startswith(tuple(numbers))]
    if not chosen:
        sys.exit(f"no page begins with {' or '.join(numbers)}; there are {', '.join(path.stem for path in pages())}")
    for path in chosen:
        start = time.perf_counter()
        with contextlib.chdir(COURSE):
            printed = run_page(path)
        print(f"{path.name}  {time.perf_counter() - start:.1f} s")
        print("".join(f"    {line}\n" for line in printed.splitlines()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
