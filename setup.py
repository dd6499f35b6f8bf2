"""Extensions and compiler flags, nothing else.

FASTATTN_OPENMP=0  builds without OpenMP: everything runs on one thread, and show_config() says so.
FASTATTN_DEBUG=1   builds with bounds checks, -O1 and the address and undefined-behaviour sanitizers.

On Windows clang-cl compiles, as Microsoft's compiler does not read GNU C: written without a machine to try it on.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy
from Cython import __version__ as cython_version
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("FASTATTN_DEBUG", "0") == "1"
KERNELS = "fastattn/kernels"
INTERFACE = "fastattn/include/fastattn.h"
# The only headers that others than kernels include.
SHARED = ("allocate", "call", "compiler", "contract", "drive", "drive_dense", "drive_rows", "gomp", "threads")
CONTRACT = [INTERFACE, *(f"{KERNELS}/{name}.h" for name in SHARED)]

# Contraction turns a * b + c into one instruction; -std=c11 would disable it, and -ffast-math would disable denormals
# in the whole process and break infinities.
compile_args = [
    "-std=gnu11",
    "-O2",
    "-g0",  # Python is built with -g, and passes it on
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-wrapv",  # Python is built with -fwrapv, and passes it on
    "-Wno-psabi",
]
link_args = ["-s"] if sys.platform == "linux" and not DEBUG else []  # symbols of static functions
if DEBUG:
    compile_args += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    link_args += ["-fsanitize=address,undefined"]


def compiles(program, *flags):
    """Whether the compiler that builds the extensions compiles and links this program; not if there is none."""
    cc = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    if shutil.which(cc[0]) is None:
        cc = ["cc"]
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.c")
        with open(source, "w") as file:
            file.write(program)
        command = [*cc, *flags, source, "-o", os.path.join(folder, "probe")]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


# Modules of GCC's on Linux find the OpenMP library when they are loaded (kernels/gomp.c). Others are linked with it, as
# are those of 32 bits, whose loops call other functions of it.
FINDER = """\
#if defined(__clang__) || !defined(__GNUC__) || !defined(__LP64__)
#error
#endif
int main(void) { return 0; }
"""
finds_openmp = False
OPENMP = ("-fopenmp", "-DFASTATTN_FINDS_OPENMP")
if os.environ.get("FASTATTN_OPENMP", "1") != "0" and sys.platform != "win32":
    if compiles("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n", "-fopenmp"):
        compile_args.append("-fopenmp")
        finds_openmp = sys.platform == "linux" and compiles(FINDER)
        if finds_openmp:
            compile_args.append("-DFASTATTN_FINDS_OPENMP")
        else:
            link_args.append("-fopenmp")
    else:
        print("fastattn: this compiler has no OpenMP; building for one thread", file=sys.stderr)


def spelt(flags):
    """Flags of GCC and clang as the compiler at hand takes them."""
    return [f"/clang:{flag}" for flag in flags] if sys.platform == "win32" else flags


class BuildInParallel(build_ext):
    """Compiles the C files of all extensions in one pool, the largest first, and only those that have changed."""

    def build_extensions(self):
        repair(self.extensions)
        compiler = self.compiler
        if sys.platform == "win32":
            compiler.initialize()
            compiler.cc = shutil.which("clang-cl") or "clang-cl"
        compile_one, jobs = compiler.compile, []

        def note(sources, output_dir=None, depends=None, **options):
            """Instead of compiling, return the names of the object files."""
            objects = compiler.object_filenames(sources, output_dir=output_dir)
            for source, target in zip(sources, objects, strict=True):
                if any(source == job[0] for job in jobs):
                    continue  # gomp.c, which several extensions have
                flags = options.get("extra_postargs", [])
                if is_kernel(source):  # without threads, the same object for all builds
                    flags = [flag for flag in flags if flag not in OPENMP]
                flags = spelt(flags + flags_of(source))
                if self.force or newer(target, [source, *(depends if is_kernel(source) else CONTRACT)]):
                    jobs.append((source, {"output_dir": output_dir, **options, "extra_postargs": flags}))
            return objects

        linking, link = [], compiler.link_shared_object
        compiler.compile = note
        compiler.link_shared_object = lambda *arguments, **options: linking.append((arguments, options))
        try:
            super().build_extensions()
        finally:
            compiler.compile, compiler.link_shared_object = compile_one, link
        jobs.sort(key=lambda job: cost(job[0]), reverse=True)
        with ThreadPoolExecutor(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ) as pool:
            list(pool.map(lambda job: compile_one([job[0]], **job[1]), jobs))
        for arguments, options in linking:
            link(*arguments, **options)


def repair(extensions):
    """In C of Cython 3.3, a list comprehension without memory for its list gives an element back twice: once."""
    wrong = "    int result = PyList_Append(list, x);\n    Py_DECREF(x);\n    return result;"
    right = wrong.replace("    Py_DECREF", "    if (result == 0) Py_DECREF")
    for source in [source for each in extensions for source in each.sources if "kernels/" not in source]:
        with open(source) as file:
            text = file.read()
        if wrong in text:
            with open(source, "w") as file:
                file.write(text.replace(wrong, right))


def is_kernel(source):
    """Whether this is an instruction set for a dtype: short files that include all the long ones."""
    return source.endswith(("_f32.c", "_f64.c"))


# What a small call spends its time on.
QUICK = (
    "attention",
    "_attention",
    "_call",
    "_checks",
    "_layers",
    "_merge",
    "_neighborhood",
    "_positions",
    "_quantize",
    "_runtime",
    "_scores",
    "_shared",
    "_softmax",
    "_step",
)


def flags_of(source):
    """
    How much a C file is optimised: kernels most, but for those that only old CPUs run and parts that gain nothing
    (kernels.inc.h); what stands around them for size, where calls are long.
    """
    name = os.path.splitext(os.path.basename(source))[0]
    if DEBUG:
        return []
    if is_kernel(source):
        is_for_old = name.startswith("baseline") and platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64")
        return ["-Os"] if is_for_old else ["-O3", "-fno-asynchronous-unwind-tables"]
    is_quick = name in QUICK or (f"{KERNELS}/" in source and name != "gomp")
    return ["-O2"] if is_quick else ["-Os"]


def newer(target, sources):
    """Whether any of the sources is newer than the target, or the target does not exist."""
    if not os.path.exists(target):
        return True
    return max(os.path.getmtime(source) for source in sources) > os.path.getmtime(target)


def cost(source):
    """Roughly how long a C file takes to compile."""
    return 3_000_000 if is_kernel(source) else os.path.getsize(source)


def extension(name, extra_sources=(), suffix="pyx"):
    source = f"fastattn/{name}.{suffix}"
    sources = [source, *extra_sources]
    if finds_openmp and "cython.parallel" in open(source, encoding="utf-8").read():
        sources.append(f"{KERNELS}/gomp.c")
    return Extension(
        f"fastattn.{name}",
        sources,
        libraries=["dl", "pthread"] if finds_openmp else [],  # part of newer C libraries, but not of glibc before 2.34
        include_dirs=[KERNELS, "fastattn/include", numpy.get_include()],
        depends=[INTERFACE, *glob(f"{KERNELS}/*.h")],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_22_API_VERSION")] + [("FASTATTN_DEBUG", "1")] * DEBUG,
    )


def shared_utilities():
    """The module with the code that Cython would otherwise repeat in each of the others; it has no .pyx."""
    source = "fastattn/_shared.c"
    made_by = open(source).readline() if os.path.exists(source) else ""
    if made_by.split() != ["/*", "Generated", "by", "Cython", cython_version, "*/"]:
        subprocess.run([sys.executable, "-m", "cython", f"--generate-shared={source}"], check=True)
    return Extension("fastattn._shared", [source], extra_compile_args=compile_args, extra_link_args=link_args)


setup(
    ext_modules=cythonize(
        [
            # The kernels are linked into one module, from which the drivers get their table of functions.
            extension("_runtime", sorted(glob(f"{KERNELS}/*.c"))),
            extension("_checks"),
            extension("_call"),
            extension("_scores"),
            extension("_vjp"),
            extension("_attention"),
            extension("_quantize"),
            extension("_step"),
            extension("cython_attention"),
            extension("_softmax"),
            extension("_layers"),
            extension("_merge"),
            extension("_neighborhood"),
            extension("_positions"),
            extension("_graph"),
            extension("_graph_gradients"),
            extension("_linear"),
            extension("_gradients"),
            extension("_linear_gradients"),
            # Plain Python, compiled because a small call spends a fifth of its time on default arguments.
            extension("attention", suffix="py"),
            shared_utilities(),
        ],
        shared_utility_qualified_name="fastattn._shared",
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "initializedcheck": DEBUG,
            "cdivision": True,
            "embedsignature": False,
            "annotation_typing": False,
            # Reviewed: CONTRIBUTING.md, "Without the GIL". Otherwise an import would switch the GIL on again.
            "freethreading_compatible": True,
        },
        nthreads=0,
    ),
    cmdclass={"build_ext": BuildInParallel},
)
