"""The C interface under sanitizers, in programs without Python that are compiled here.

fuzz_embed.c: hostile structs, with the address and undefined-behaviour sanitizers; FASTATTN_FUZZ is as in test_fuzz.py,
with 80 calls of each kind for one there. race_embed.c: many threads at once, with the thread sanitizer.

Kernels are those of the baseline, which compile fastest; what differs in others is their vectors (test_guard_pages.py).
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
FLAGS = "-std=gnu11 -ffp-contract=fast -fno-math-errno -fno-trapping-math -w -pthread -lm".split()

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers of GCC and clang on Linux")


def build(folder, main, compiler, *flags):
    """A program of tests/, with the drivers in C and the baseline kernels; skips where there is no such sanitizer."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    include = shutil.copytree(os.path.join(ROOT, "fastattn", "include"), folder / "include")
    kernels = folder / "kernels"
    shutil.copytree(os.path.join(ROOT, "fastattn", "kernels"), kernels)
    select = kernels / "select.c"
    select.write_text(re.sub(r"defined\(__(x86_64|aarch64)__\)", "0", select.read_text()))
    others = [path for path in kernels.glob("*_f??.c") if not path.name.startswith("baseline")]
    sources = [*(set(kernels.glob("*.c")) - set(others)), os.path.join(ROOT, "tests", main)]

    def compile_one(source):
        target = folder / (os.path.basename(source) + ".o")
        # Without optimisation the kernels are compiled in less than half of the time, and calls here are small.
        level = "-O0" if "baseline" in str(source) else "-O1"
        command = [compiler, *FLAGS, *flags, level, f"-I{include}", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(sources, key=lambda source: "baseline" not in str(source))))
    command = [compiler, *flags, *objects, *FLAGS, "-o", str(folder / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if re.search(r"(cannot find|No such file).*(san|omp)", done.stderr):
        pytest.skip(f"the libraries of {' '.join(flags)} are not installed")
    assert done.returncode == 0, done.stderr
    return str(folder / "program")


def run(*command, **environment):
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=3000, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout


def test_hostile_structs(tmp_path):
    program = build(tmp_path, "fuzz_embed.c", "cc", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    only = [str(EXAMPLES[0])] if len(EXAMPLES) == 1 else []
    printed = run(program, str(80 * len(EXAMPLES)), str(SEED), *only, UBSAN_OPTIONS="print_stacktrace=1")
    if not only:
        allowed, refused, skipped = map(int, re.findall(r"\d+", printed))
        assert min(allowed, refused) > 40 * len(EXAMPLES), printed
        assert skipped < allowed / 10, printed


def test_many_threads(tmp_path):
    """Without OpenMP, whose barriers in libgomp the thread sanitizer does not know."""
    program = build(tmp_path, "race_embed.c", "cc", "-fsanitize=thread")
    assert run(program) == "the same bits\n"


def test_many_threads_each_with_threads(tmp_path):
    """With clang's OpenMP, whose barriers its tool Archer explains to the thread sanitizer."""
    program = build(tmp_path, "race_embed.c", "clang", "-fsanitize=thread", "-fopenmp")
    options = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1", "ARCHER_OPTIONS": "verbose=1"}
    probe = subprocess.run([program], capture_output=True, text=True, check=False, env={**os.environ, **options})
    if "Archer detected" not in probe.stdout + probe.stderr:
        pytest.skip("this OpenMP comes without Archer")
    assert run(program, "3", **options).endswith("the same bits\n")
