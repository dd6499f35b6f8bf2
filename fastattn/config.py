"""Threads, what this build runs on, and where its C header is."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any, TextIO

import numpy

from fastattn import _runtime
from fastattn._checks import integer


def get_num_threads() -> int:
    """
    Number of threads that a call may use when it has no ``num_threads`` argument.

    The first of these that applies: `set_num_threads`, the environment variable ``FASTATTN_NUM_THREADS`` (read at
    import), what OpenMP would use in this thread (``OMP_NUM_THREADS``, or what `threadpoolctl.threadpool_limits`,
    joblib or another library has set, for the thread that set it), the CPUs that this process may use (affinity and
    control-group quota). Small calls always use one thread, calls use fewer if the system allows no more, and no result
    depends on it.

    Returns
    -------
    int

    Examples
    --------
    >>> import fastattn
    >>> fastattn.get_num_threads() >= 1
    True
    """
    count: int = _runtime.get_threads()
    return count


def set_num_threads(num_threads: int) -> None:
    """
    Set the number of threads for the calls of this process that have no ``num_threads`` argument.

    Parameters
    ----------
    num_threads : int
        At least 1.

    Raises
    ------
    ValueError, TypeError
        If `num_threads` is below 1, or not an integer.

    Examples
    --------
    >>> import fastattn
    >>> before = fastattn.get_num_threads()
    >>> fastattn.set_num_threads(1)
    >>> fastattn.get_num_threads()
    1
    >>> fastattn.set_num_threads(before)
    """
    _runtime.set_threads(integer(num_threads, "num_threads", "an integer of at least 1", 1))


def cpu_info() -> dict[str, Any]:
    """
    The instruction set in use, and those available.

    Returns
    -------
    dict
        ``'selected'``: the instruction set in use; ``'runnable'``: all that are in this build and that this CPU can
        run, best first (each can be forced with the environment variable ``FASTATTN_ISA``, read at import);
        ``'kernels'``: for each dtype the name of the kernels that serve it; ``'features'``: instructions of this CPU
        for 16-bit numbers, whether kernels use them or not; ``'machine'``: the architecture.

    Examples
    --------
    >>> import fastattn
    >>> info = fastattn.cpu_info()
    >>> info["selected"] in info["runnable"]
    True
    """
    return {
        "selected": _runtime.selected,
        "runnable": list(_runtime.runnable),
        "kernels": dict(_runtime.kernel_names),
        "features": list(_runtime.cpu_features),
        "machine": platform.machine(),
    }


def get_include() -> str:
    """
    Folder of ``fastattn.h``, for the compiler's ``-I`` or an extension's ``include_dirs``.

    C and C++ extensions include that header after ``Python.h``; Cython modules ``cimport`` from
    ``fastattn.cython_attention``. README.md shows both.

    Returns
    -------
    str

    Examples
    --------
    >>> import os
    >>> import fastattn
    >>> os.listdir(fastattn.get_include())
    ['fastattn.h']
    """
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "include")


def show_config(file: TextIO | None = None) -> None:
    """
    Print version, instruction sets, threads and OpenMP: what a bug report should say.

    Parameters
    ----------
    file : text file, optional
        Where to print; default `sys.stdout`.

    Examples
    --------
    >>> import fastattn
    >>> fastattn.show_config()  # doctest: +ELLIPSIS
    fastattn ...
    """
    import fastattn

    info = cpu_info()
    openmp = _runtime.openmp_version
    if not openmp:
        library = "none, this build runs on one thread"
    elif _runtime.own_threads:
        library = f"{openmp}, no libgomp.so.1 found: each large call starts threads of its own"
    else:
        library = str(openmp)
    lines = [
        f"fastattn {fastattn.__version__}",
        f"instruction set: {info['selected']} (runnable: {', '.join(info['runnable'])})",
        f"kernels: {', '.join(f'{dtype}: {name}' for dtype, name in info['kernels'].items())}",
        f"OpenMP: {library}",
        f"threads: {get_num_threads() if openmp else 1}",
        f"NumPy {numpy.__version__}, Python {platform.python_version()}, {platform.system()} {info['machine']}",
    ]
    print("\n".join(lines), file=file or sys.stdout)
