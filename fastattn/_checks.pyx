# cython: wraparound=True
"""Checks of arguments, each written once: arrays and their dtypes, numbers, flags, `out`, memory, missing arguments.

Messages name the argument, what was passed, and what is allowed. Nothing here computes or writes to `out`. Compiled,
because small calls spend most of their time here.
"""
import math
import numbers
import sys

import numpy as np

cimport numpy as cnp
from cpython.exc cimport PyErr_ExceptionMatches, PyErr_Fetch, PyErr_Restore, PyErr_SetObject
from cpython.object cimport PyObject
from libc.math cimport isfinite
from libc.stdint cimport int64_t

from fastattn._runtime cimport FA_BF16, FA_F16, FA_F32, FA_F64, fa_dtype

cnp.import_array()

FAR = <int64_t> 1 << 60

cdef object float16 = np.dtype(np.float16)
cdef object float32 = np.dtype(np.float32)
cdef object float64 = np.dtype(np.float64)


# Arrays

cdef bint is_masked(object x) except -1:
    """Whether x is a masked array. If numpy.ma is not loaded there can be none, so it is not imported here."""
    if cnp.PyArray_CheckExact(x):
        return False
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(x, getattr(ma, "MaskedArray", ()))


cdef object as_plain(object x):
    """numpy.asarray, but not of a Dask array, or of what holds one, which would be computed whole, here and now."""
    graph = getattr(x, "__dask_graph__", None)
    if graph is not None and graph() is not None:  # xarray: None where it holds no Dask array
        raise TypeError(f"{type(x).__name__} is lazy, of Dask, and would be computed as a whole, in this process. "
                        f"fastattn.integrations.dask has attention for Dask arrays; .compute() makes a NumPy array")
    return np.asarray(x)


cpdef cnp.ndarray as_array(object x, str name, str instead="pass its data, and its mask inverted as mask= where the "
                           "function takes one (True means attend)"):
    """x as an ndarray; not copied if it is one already. instead: what the error for a masked array advises."""
    if cnp.PyArray_CheckExact(x):
        return x
    if is_masked(x):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored: {instead}")
    try:
        return as_plain(x)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{name} cannot be made into an array: {error}") from error


cpdef cnp.ndarray converted(cnp.ndarray a, object dtype):
    """The array in that dtype; not copied if it has it. Every conversion that may over- or underflow is made here, so
    that it does not depend on the caller's np.errstate."""
    if a.dtype is dtype or a.dtype == dtype:
        return a
    with np.errstate(all="ignore"):
        try:
            return a.astype(dtype)
        except ValueError as error:  # as in `empty`
            raise MemoryError(f"no memory for a copy of an array of shape {shape_of(a)} and dtype {dtype}") from error


cdef object bad_dtype(str name, dtype):
    if dtype.kind in "fcbiu" and not dtype.isnative:
        return TypeError(f"{name} has the byte order of another machine ({dtype.str}): "
                         f"convert it with {name}.astype({name}.dtype.newbyteorder('='))")
    return TypeError(f"{name} has dtype {dtype}: allowed are float32, float64, float16, ml_dtypes.bfloat16, "
                     f"and integers and bools, which become float64")


cdef fa_dtype storage_of(cnp.ndarray a, str name) except *:
    """The storage dtype of a floating array."""
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT32 and cnp.PyArray_ISNOTSWAPPED(a):
        return FA_F32
    if number == cnp.NPY_FLOAT64 and cnp.PyArray_ISNOTSWAPPED(a):
        return FA_F64
    if number == cnp.NPY_FLOAT16 and cnp.PyArray_ISNOTSWAPPED(a):
        return FA_F16
    if a.dtype.name == "bfloat16" and a.dtype.isnative:
        return FA_BF16
    raise bad_dtype(name, a.dtype)


def storage_dtype(x, others=()):
    """The dtype that a caller passes: one that the kernels store or, by its name, one of others."""
    cdef tuple names = ("float32", "float64", "float16", "bfloat16", *others)
    allowed = ", ".join(["ml_dtypes.bfloat16" if name == "bfloat16" else name for name in names])
    allowed = " or ".join(allowed.rsplit(", ", 1))
    try:
        dtype = np.dtype(x)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"dtype must be {allowed}: {error}") from error
    if dtype.name not in names or not dtype.isnative:
        raise TypeError(f"dtype must be {allowed}, not {dtype}")
    return dtype


cpdef cnp.ndarray floating(object x, str name):
    """x as an array of a dtype that the kernels store; integers and bools become float64."""
    cdef cnp.ndarray a = as_array(x, name)
    if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 and cnp.PyArray_ISNOTSWAPPED(a):
        return a
    if a.dtype.kind in "biu" and a.dtype.isnative:
        return a.astype(np.float64)
    storage_of(a, name)
    return a


cpdef object common_dtype(list dtypes, tuple names):
    """The dtype to which query, key, value and weight matrices of these dtypes promote."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    if float16 in dtypes and any([d.name == "bfloat16" for d in dtypes]):
        got = ", ".join([f"{name} {d}" for name, d in zip(names, dtypes, strict=True)])
        raise TypeError(f"float16 and bfloat16 have no common dtype ({got}): convert one of them")
    return np.result_type(*dtypes)


cdef object promoted(list arrays, tuple names, fa_dtype *storage):
    """The dtype to which the arrays promote. None is converted: kernels read each dtype in place."""
    cdef int i, number = cnp.PyArray_TYPE(arrays[0])
    if number == cnp.NPY_FLOAT32 or number == cnp.NPY_FLOAT64:
        for i in range(1, len(arrays)):
            if cnp.PyArray_TYPE(arrays[i]) != number:
                break
        else:
            storage[0] = FA_F32 if number == cnp.NPY_FLOAT32 else FA_F64
            return (<cnp.ndarray> arrays[0]).dtype
    dtype = common_dtype([a.dtype for a in arrays], names)
    storage[0] = FA_F32 if dtype == float32 else FA_F64 if dtype == float64 else FA_F16 if dtype == float16 else FA_BF16
    return dtype


cdef object accumulation(fa_dtype dtype):
    return float64 if dtype == FA_F64 else float32


cdef tuple shape_of(cnp.ndarray a):
    return (<object> a).shape


cdef object too_few_axes(str name, tuple shape, str wanted):
    return ValueError(f"{name} has shape {shape}; it needs at least two axes, {wanted}")


# Scalars

cpdef double real(object x, str name, str allowed, bint positive=False) except? -1.0:
    """A finite real number or 0-d array as a float; bools are refused. allowed: for the message."""
    cdef double value
    if type(x) is not float:
        kind = getattr(x, "dtype", None)
        if (isinstance(x, (bool, np.bool_)) or getattr(x, "ndim", 0) or is_masked(x) or
                not (isinstance(x, (numbers.Real, np.floating, np.integer)) or
                     getattr(kind, "name", None) == "bfloat16" or
                     isinstance(x, np.ndarray) and kind.kind in "fiu")):
            raise TypeError(f"{name} must be {allowed}, not {x!r}")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{name} must be {allowed}, not {x!r}") from error
    if not isfinite(value) or positive and value <= 0:
        raise ValueError(f"{name} must be {allowed}, not {x}")
    return value


cpdef object integer(object x, str name, str allowed, object least=None, object most=None):
    """An integer or 0-d array as a Python int; bools are refused. allowed: for the message; least, most: optional
    bounds."""
    if type(x) is not int:
        if (isinstance(x, (bool, np.bool_)) or not hasattr(x, "__index__") or getattr(x, "ndim", 0) or
                is_masked(x)):
            raise TypeError(f"{name} must be {allowed}, not {x!r}")
        try:
            x = x.__index__()
        except MemoryError:
            raise
        except Exception as error:
            raise TypeError(f"{name} must be {allowed}, not {x!r}") from error
    if least is not None and x < least or most is not None and x > most:
        raise ValueError(f"{name} must be {allowed}, not {x}")
    return x


cpdef bint is_one_number(object x) except -1:
    """Whether an argument that may be an integer or an array of integers is to be read as an integer."""
    return type(x) is int or getattr(x, "ndim", 0) == 0 and (isinstance(x, np.ndarray) or not hasattr(x, "__len__"))


cdef object checked_threads(object num_threads):
    """None, or an int of at least 1."""
    if num_threads is None:
        return None
    return min(integer(num_threads, "num_threads", "an integer of at least 1 or None", 1), 1 << 30)


cdef bint flag(object x, str name) except -1:
    if x is False:
        return False
    if x is True:
        return True
    if isinstance(x, np.bool_):
        return bool(x)
    raise TypeError(f"{name} must be True or False, not {x!r}")


cdef int64_t clipped(object x):
    return max(-FAR, min(FAR, x))


cpdef cnp.ndarray integer_array(object x, str name, str allowed, str kinds="iu"):
    """x as an array of integers; kinds: of the dtypes allowed. An empty list may have any dtype."""
    cdef cnp.ndarray a
    if is_masked(x):
        raise TypeError(f"{name} must be {allowed}, not masked")
    try:
        a = as_array(x, name)
    except TypeError as error:
        raise TypeError(f"{name} must be {allowed}: {error}") from error
    if cnp.PyArray_SIZE(a) == 0 and a is not x:
        a = a.astype(np.int64)
    if a.dtype.kind not in kinds or not a.dtype.isnative:
        raise TypeError(f"{name} must be {allowed}, not of dtype {a.dtype}")
    return a


cpdef str of_mask(str name, tuple shape, tuple batch, object most, bint heads=True):
    """What to say of lengths that look like Hugging Face's mask, (B, S) with 1 for a token and 0 for padding; heads:
    whether lengths have axes behind that of B."""
    if not name.endswith("lengths") or len(batch) == 0 or shape != (batch[0], most):
        return ""
    index = "[" + ", ".join([":"] + ["None"] * (len(batch) - 1)) + "]" if heads and len(batch) > 1 else ""
    return f". A mask of 1 for tokens and 0 for padding on the right, (B, S), becomes {name}=mask.sum(-1){index}"


cdef cnp.ndarray integers(object x, str name, tuple batch, object least, object most, int64_t *scalar):
    """Lengths or offsets: an integer is stored in `scalar` and gives None, an array a new int64 array with exactly the
    batch axes.
    """
    cdef cnp.ndarray a
    allowed = f"an integer or an integer array with {len(batch)} axes, one for each batch axis"
    if is_one_number(x):
        n = integer(x, name, allowed)
        if least is not None and not least <= n <= most:
            raise ValueError(f"{name} must lie between {least} and {most}, not {n}")
        scalar[0] = clipped(n)
        return None
    a = integer_array(x, name, allowed)
    a = np.array(a)  # of our own: nobody can change it after the check
    shape = shape_of(a)
    if len(shape) != len(batch) or any([have != want and have != 1
                                        for have, want in zip(shape, batch, strict=True)]):
        text = f"{name} has shape {shape}; allowed is {allowed}, each of its size or 1: the batch axes are {batch}"
        if len(shape) < len(batch):
            short = "lengths" if name.endswith("lengths") else name
            index = ", ".join([":"] * len(shape) + ["None"] * (len(batch) - len(shape)))
            text += f"; one number for each of the first axes is {short}[{index}]"
        raise ValueError(text + of_mask(name, shape, batch, most))
    if least is not None and a.size:
        low, high = a.min(), a.max()
        if low < least or high > most:
            raise ValueError(f"{name} must lie between {least} and {most}, not {low if low < least else high}")
    elif a.size:
        if a.dtype.kind == "u":
            a = np.asarray(np.minimum(a, np.uint64(FAR)).astype(np.int64))
        else:
            a = np.asarray(np.clip(a.astype(np.int64), -FAR, FAR))
    return np.ascontiguousarray(a, np.int64)


# Memory

cdef bint overlaps_itself(cnp.ndarray a):
    """Whether two index tuples may refer to the same byte: not if each stride steps past all that smaller ones
    reach."""
    cdef list axes = sorted([(abs(s), n) for s, n in zip((<object> a).strides, shape_of(a), strict=True) if n > 1])
    reach = cnp.PyArray_ITEMSIZE(a)
    for stride, n in axes:
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


cdef int extent(cnp.ndarray a, char **begin, char **end) noexcept:
    """The first byte of an array that is not empty, and the byte behind its last one."""
    cdef int axis
    cdef Py_ssize_t reach
    begin[0] = end[0] = <char *> cnp.PyArray_DATA(a)
    for axis in range(cnp.PyArray_NDIM(a)):
        reach = (cnp.PyArray_DIM(a, axis) - 1) * cnp.PyArray_STRIDE(a, axis)
        if reach < 0:
            begin[0] += reach
        else:
            end[0] += reach
    end[0] += cnp.PyArray_ITEMSIZE(a)
    return 0


cdef bint overlap(cnp.ndarray a, cnp.ndarray b):
    cdef char *begin_a
    cdef char *end_a
    cdef char *begin_b
    cdef char *end_b
    if cnp.PyArray_SIZE(a) == 0 or cnp.PyArray_SIZE(b) == 0:
        return False
    extent(a, &begin_a, &end_a)
    extent(b, &begin_b, &end_b)
    if end_a <= begin_b or end_b <= begin_a:  # as np.may_share_memory says, which takes as long as a small call
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


cdef int refuse_overlap(object out, tuple inputs, tuple names, str called="out") except -1:
    if out is not None:
        for a, name in zip(inputs, names, strict=True):
            if isinstance(a, np.ndarray) and overlap(out, a):
                raise ValueError(f"{called} overlaps {name}; it needs memory of its own")
    return 0


cpdef object empty(tuple shape, dtype, str what="an array", bint zero=False):
    """An uninitialised array, or zeros. what: its name in the error; for sizes beyond the address space NumPy raises a
    ValueError that names nothing."""
    try:
        return np.zeros(shape, dtype) if zero else np.empty(shape, dtype)
    except ValueError as error:
        raise MemoryError(f"no memory for {what} of shape {shape} and dtype {dtype}") from error


cpdef cnp.ndarray checked_out(object out, tuple shape, dtype, list inputs, tuple names, bint same_allowed=False,
                              str called="out", str whose="the output's"):
    """`out`, or a new array. inputs: arrays that it must not overlap; same_allowed: it may be the first of them.
    called, whose: its name, and what it receives, for the errors."""
    if out is None:
        return empty(shape, dtype)
    if not isinstance(out, np.ndarray) or is_masked(out):
        raise TypeError(f"{called} must be a NumPy array, not {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"{called} has shape {out.shape}; it must have {whose}, {shape}")
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"{called} has dtype {out.dtype.str if not out.dtype.isnative else out.dtype}; it must have "
                        f"{whose}, {dtype}")
    if not out.flags.writeable:
        raise ValueError(f"{called} is read-only; it must be writeable")
    if out.size == 0:
        return out
    if not cnp.PyArray_IS_C_CONTIGUOUS(out) and overlaps_itself(out):
        raise ValueError(f"{called} overlaps itself (strides {out.strides} for shape {shape}): each element needs its "
                         f"place")
    for i in range(len(inputs)):
        a = inputs[i]
        if same_allowed and i == 0 and (a is out or a.ctypes.data == out.ctypes.data and a.strides == out.strides):
            continue
        refuse_overlap(out, (a,), (names[i],), called)
    return out


cdef bint same_place(object out, cnp.ndarray a) except -1:
    """Whether out is an array, element for element."""
    return out is a or (isinstance(out, np.ndarray) and out.shape == shape_of(a) and out.dtype == a.dtype and
                        out.ctypes.data == a.ctypes.data and out.strides == (<object> a).strides)


# Missing arguments

cdef extern from *:
    """
    #define FA_VECTORCALL(f) (*(vectorcallfunc *)((char *)(f) + Py_TYPE(f)->tp_vectorcall_offset))
    static vectorcallfunc fa_call_of(PyObject *f) { return FA_VECTORCALL(f); }
    static void fa_set_call(PyObject *f, vectorcallfunc call) { FA_VECTORCALL(f) = call; }

    /* Cython's call of any function: the same, whichever import finds it first. */
    static vectorcallfunc fa_plain;
    static vectorcallfunc fa_plain_call(void) { return __atomic_load_n(&fa_plain, __ATOMIC_RELAXED); }
    static void fa_set_plain_call(vectorcallfunc call) { __atomic_store_n(&fa_plain, call, __ATOMIC_RELAXED); }
    """
    ctypedef PyObject *(*vectorcallfunc)(PyObject *, PyObject *const *, size_t, PyObject *) noexcept
    vectorcallfunc fa_call_of(object f)
    void fa_set_call(object f, vectorcallfunc call)
    vectorcallfunc fa_plain_call() noexcept
    void fa_set_plain_call(vectorcallfunc call) noexcept
    Py_ssize_t PyVectorcall_NARGS(size_t count)


cdef PyObject *naming_call(PyObject *f, PyObject *const *arguments, size_t count, PyObject *names) noexcept:
    """The plain call; missing arguments are looked for only if it fails."""
    cdef PyObject *result = fa_plain_call()(f, arguments, count, names)
    if result == NULL and PyErr_ExceptionMatches(TypeError):
        name_missing(<object> f, PyVectorcall_NARGS(count), () if names == NULL else <object> names)
    return result


cdef str text_of_missing(object f, Py_ssize_t given, tuple names):
    code = f.__code__
    needed = code.co_varnames[given:code.co_argcount - len(f.__defaults__ or ())]
    missing = [repr(name) for name in needed if name not in names]
    unknown = set(names).difference(code.co_varnames[:code.co_argcount + code.co_kwonlyargcount])
    if not missing or unknown:
        return None
    text = f"{f.__name__}() missing {len(missing)} required positional argument{'s' * (len(missing) > 1)}: "
    return text + ", ".join(missing[:-1]) + " and " * (len(missing) > 1) + missing[len(missing) - 1]


cdef void name_missing(object f, Py_ssize_t given, tuple names) noexcept:
    """If arguments are missing, replaces Cython's error by Python's; an unknown keyword takes precedence."""
    cdef PyObject *kind
    cdef PyObject *value
    cdef PyObject *traceback
    PyErr_Fetch(&kind, &value, &traceback)
    try:
        text = text_of_missing(f, given, names)
    except MemoryError:
        text = None  # Cython's error remains
    PyErr_Restore(kind, value, traceback)
    if text is not None:
        PyErr_SetObject(TypeError, text)


def names_missing_arguments(f):
    """Makes the errors of a compiled function say which arguments are missing, not only how many; returns it."""
    if type(f).__name__ == "cython_function_or_method" and fa_plain_call() in (NULL, fa_call_of(f)):
        fa_set_plain_call(fa_call_of(f))
        fa_set_call(f, naming_call)
    return f


# Objects that change

cdef extern from *:
    """
    /* The fences keep what a reader has read before its last look, and what a writer writes after its first. */
    static int64_t fa_seen(const int64_t *p)
    {
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        return __atomic_load_n(p, __ATOMIC_ACQUIRE);
    }
    static int fa_begins(int64_t *p)
    {
        int64_t now = __atomic_load_n(p, __ATOMIC_RELAXED);
        int is_free = now % 2 == 0 &&
                      __atomic_compare_exchange_n(p, &now, now + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_RELEASE);
        return is_free;
    }
    static void fa_ends(int64_t *p) { __atomic_add_fetch(p, 1, __ATOMIC_RELEASE); }
    """
    int64_t fa_seen(const int64_t *) noexcept
    int fa_begins(int64_t *) noexcept
    void fa_ends(int64_t *) noexcept


cdef class Turn:
    """
    For an object that one call at a time may change: ``with turn:`` raises if another one is within. It does not wait,
    so there is no deadlock, not even in a signal handler or a forked child.

    A copy or a pickle of it is a new one.
    """
    cdef int64_t changes        # begun and ended; odd: within one
    cdef str name

    def __init__(self, str name not None):
        self.name = name

    def __enter__(self):
        if not fa_begins(&self.changes):
            raise self.error()

    def __exit__(self, *error):
        fa_ends(&self.changes)

    def __reduce__(self):
        return Turn, (self.name,)

    cdef object error(self):
        return RuntimeError(f"this {self.name} is being changed by another call, in another thread: one at a time may "
                            f"do that; threads that need not share it take a copy each")

    def begin_reading(self):
        """What `end_reading` wants, which raises if the object has changed since."""
        cdef int64_t seen = fa_seen(&self.changes)
        if seen % 2:
            raise self.error()
        return seen

    def end_reading(self, int64_t seen):
        if fa_seen(&self.changes) != seen:
            raise self.error()
