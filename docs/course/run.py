"""Run the pages of the course, and draw their pictures into a temporary folder, or into the one that you name.

    python docs/course/run.py                          all pages
    python docs/course/run.py 03 07                    the pages with these numbers
    python docs/course/run.py --output docs/course     renew the pictures that the pages show

The ```python blocks of a page are one program, run from top to bottom; a page saves its picture in the current folder.
What a page prints is quoted in ```output blocks. The tests run the pages with the same function, `run_page`, and
compare the quotations.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
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

    All blocks share one namespace. Each is compiled under the page's name and after as many empty lines as come before
    it there, so that a traceback shows the page's own lines.
    """
    os.environ["MPLBACKEND"] = "Agg"  # no window, also where pyplot is used
    names = {"__name__": "__main__", "__file__": str(path)}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for line, text in blocks(path, "python"):
            exec(compile("\n" * (line - 1) + text, str(path), "exec"), names)
    return printed.getvalue()


def main(arguments=None):
    """Run the pages whose names begin with one of the numbers, or all of them; say where their pictures are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", metavar="NUMBER", help="the pages to run (default: all)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to draw (default: a temporary folder)")
    options = parser.parse_args(arguments)
    numbers = tuple(options.numbers)
    chosen = [path for path in pages() if not numbers or path.name.startswith(numbers)]
    if not chosen:
        sys.exit(f"no page begins with {' or '.join(numbers)}; there are {', '.join(path.stem for path in pages())}")
    if options.output and not options.output.is_dir():
        sys.exit(f"--output: there is no folder {options.output}")
    folder = options.output or Path(tempfile.mkdtemp(prefix="fastattn-course-"))
    for path in chosen:
        start = time.perf_counter()
        with contextlib.chdir(folder):
            printed = run_page(path)
        print(f"{path.name}  {time.perf_counter() - start:.1f} s")
        print("".join(f"    {line}\n" for line in printed.splitlines()), end="")
    print(f"pictures: {folder}")


if __name__ == "__main__":
    main()
