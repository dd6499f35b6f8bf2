"""Hostile structs for the C interface: fuzz_embed.c with the address and undefined-behaviour sanitizers.

It is a program without Python. Kernels are those of the baseline, which compile fastest; what differs in others is their
vectors (test_guard_pages.py). FASTATTN_FUZZ is as in test_fuzz.py, with 20 calls of each kind for one there.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_fuzz import EXAMPLES, SEED

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = (
    "-std=gnu11 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -w -pthread "
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
).split()

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers of GCC and clang on Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The harness, the drivers in C and the baseline kernels, without OpenMP."""
    folder = tmp_path_factory.mktemp("fuzz_embed")
    shutil.copytree(os.path.join(ROOT, "fastattn"), folder / "fastattn", ignore=shutil.ignore_patterns("*.so", "_*.c"))
    kernels = folder / "fastattn" / "kernels"
    for path in [path for path in kernels.glob("*.c") if re.fullmatch(r"(?!baseline).*_f..\.c", path.name)]:
        path.unlink()
    select = kernels / "select.c"
    select.write_text(re.sub(r"defined\(__\w+__\)", "0", select.read_text()))
    sources = [*kernels.glob("*.c"), os.path.join(ROOT, "tests", "fuzz_embed.c")]

    def compile_one(source):
        target = folder / (os.path.basename(source) + ".o")
        # Without optimisation the kernels are compiled in less than half of the time, and calls here are small.
        level = "-O0" if "baseline" in str(source) else "-O1"
        command = ["cc", *FLAGS, level, f"-I{folder / 'fastattn' / 'include'}", "-c", str(source), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True, check=False), str(target)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(compile_one, sorted(sources, key=lambda source: "baseline" not in str(source))))
    for result, _ in done:
        if "-fsanitize" in result.stderr:
            pytest.skip(f"this compiler has no sanitizers: {result.stderr.strip()}")
        assert result.returncode == 0, result.stderr
    linked = subprocess.run(
        ["cc", *FLAGS, *[target for _, target in done], "-lm", "-o", str(folder / "fuzz")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if re.search("cannot find.*(asan|ubsan)", linked.stderr):
        pytest.skip("the sanitizers' libraries are not installed")
    assert linked.returncode == 0, linked.stderr
    return str(folder / "fuzz")


def test_hostile_structs(program):
    only = [str(EXAMPLES[0])] if len(EXAMPLES) == 1 else []
    done = subprocess.run(
        [program, str(20 * len(EXAMPLES)), str(SEED), *only],
        capture_output=True, text=True, check=False, timeout=3000,
        env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "ASAN_OPTIONS": "detect_leaks=1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    allowed, refused, skipped = map(int, re.findall(r"\d+", done.stdout))
    if not only:
        assert allowed > len(EXAMPLES), done.stdout
        assert refused > len(EXAMPLES), done.stdout
        assert skipped < allowed / 10, done.stdout
