# cython: wraparound=True
"""What all functions `f_vjp` share: the gradient that comes in, the names asked for, and where results go.

A gradient has the shape and dtype of its array, integers and bools those of float64. `out` may also be of the
accumulation dtype. Nothing here computes, and nothing is written before `store`.
"""
import numpy as np

cimport numpy as cnp

from fastattn._checks cimport as_array, checked_out, empty, floating, shape_of

cnp.import_array()

cdef class Wanted:
    cpdef object target(self, str name):
        """Where the gradient of this name goes; None: nobody asked for it."""
        return self.targets[self.names.index(name)] if name in self.names else None

    cpdef object result(self):
        return self.targets[0] if self.one else tuple(self.targets)


cdef object gradient_dtype(cnp.ndarray a):
    """Of the gradient of an array."""
    return np.dtype(np.float64) if (<object> a).dtype.kind in "biu" else (<object> a).dtype


cpdef cnp.ndarray read_gradient(object x, tuple shape, str name="grad_out"):
    """The gradient for a result of this shape, in a dtype that the kernels store."""
    cdef cnp.ndarray a = floating(x, name)
    if shape_of(a) != shape:
        raise ValueError(f"{name} has shape {shape_of(a)}; it must have that of the result, {shape}")
    return a


cpdef tuple read_names(object wrt, dict given):
    """The names in `wrt`; given: as for `read_wanted`."""
    cdef list allowed = [name for name in given if given[name] is not None]
    cdef str choice = ", ".join([repr(name) for name in allowed])
    cdef tuple names = (wrt,) if isinstance(wrt, str) else tuple(wrt) if isinstance(wrt, (tuple, list)) else None
    if names is None or not all([isinstance(name, str) for name in names]):
        # By its type: a dict of gradients would fill the screen.
        got = " with ".join([type(x).__name__ for x in (wrt, *[n for n in names or () if not isinstance(n, str)][:1])])
        raise TypeError(f"wrt must be a name or a tuple of names, of {choice}, not {got}")
    for name in names:
        if name not in allowed:
            why = ", which was not given" if name in given else ""
            raise ValueError(f"wrt names {name!r}{why}; those that can be named are {choice}")
    if len(set(names)) != len(names):
        raise ValueError(f"wrt names {[n for n in names if names.count(n) > 1][0]!r} twice: {wrt!r}")
    return names


cpdef Wanted read_wanted(object wrt, dict given, object out, object real, dict others=None):
    """The names in `wrt`, and memory for their gradients.

    given: the differentiable arguments by name, as they came; None: not given. real: the accumulation dtype. others:
    more arguments that `out` must not overlap.
    """
    cdef Wanted w = Wanted()
    cdef object into, dtype
    cdef dict inputs = {**given, **(others or {})}
    cdef list earlier = []
    cdef tuple outs
    cdef int i
    w.names = read_names(wrt, given)
    w.one = isinstance(wrt, str)
    w.arrays = [as_array(given[name], name) for name in w.names]
    w.targets = []
    if out is None:
        outs = (None,) * len(w.names)
    elif w.one:
        outs = (out,)
    elif not isinstance(out, (tuple, list)):
        raise TypeError(f"out must be a tuple of {len(w.names)} arrays or None, one for each name in wrt, not "
                        f"{type(out).__name__}")
    elif len(out) != len(w.names):
        raise ValueError(f"out has {len(out)} arrays; it must have one, or None, for each of the {len(w.names)} names "
                         f"in wrt")
    else:
        outs = tuple(out)
    for i, into in enumerate(outs):
        dtype = gradient_dtype(w.arrays[i])
        if into is None:
            w.targets.append(None)
            continue
        called = "out" if w.one else f"out[{i}]"
        if isinstance(into, np.ndarray) and into.dtype == real:
            dtype = real
        names = tuple(inputs)
        arrays = [a if a is None else as_array(a, name) for name, a in inputs.items()]  # tensors too: they share memory
        checked_out(into, shape_of(w.arrays[i]), dtype, arrays + [a for _, a in earlier],
                    names + tuple([name for name, _ in earlier]), False, called, f"that of {w.names[i]}")
        earlier.append((called, into))
        w.targets.append(into)
    for i in range(len(outs)):
        if outs[i] is None:
            w.targets[i] = empty(shape_of(w.arrays[i]), gradient_dtype(w.arrays[i]), f"the gradient of {w.names[i]}")
    return w


cpdef object store(object target, object gradient):
    """Writes a gradient where it goes, rounded once."""
    if target is not gradient:
        with np.errstate(all="ignore"):
            np.copyto(target, gradient, casting="unsafe")
    return target
