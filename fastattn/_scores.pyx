# cython: wraparound=True
"""Scores with weights of their own, additive and bilinear: checks the weights and projects query and key.

The projections are NumPy matrix products; the call then proceeds with their results.
"""
import numpy as np

cimport numpy as cnp
from libc.math cimport fabs, frexp, isfinite, ldexp

from fastattn._call cimport Problem, new_problem, read_call
from fastattn._checks cimport accumulation, converted, empty, floating, promoted, shape_of, too_few_axes
from fastattn._rules cimport Rules
from fastattn._runtime cimport FA_ADDITIVE, FA_DOT, FA_F64, fa_dtype

cnp.import_array()


cdef list read_weights(Problem p, tuple given, tuple names):
    """Query, key, value and weights as arrays; sets the dtype of the result, to which they promote. A weight that is
    None stays None."""
    cdef list arrays = [], present = [], present_names = []
    cdef int i
    cdef cnp.ndarray a
    for i in range(len(given)):
        if i < 3 or given[i] is not None:
            present.append(floating(given[i], names[i]))
            present_names.append(names[i])
    p.dtype = promoted(present, tuple(present_names), &p.call.problem.dtype)
    present.reverse()
    for i in range(len(given)):
        arrays.append(None if given[i] is None else present.pop())
    for i in range(2):
        a = arrays[i]
        if cnp.PyArray_NDIM(a) < 2:
            raise too_few_axes(names[i], shape_of(a), ("(..., L, D_query)", "(..., S, D_key)")[i])
    return arrays


cdef object read_vector(object x, str name, Py_ssize_t size, str why, fa_dtype dtype):
    """A bias of a projection, in the accumulation dtype."""
    cdef cnp.ndarray b = floating(x, name)
    if cnp.PyArray_NDIM(b) != 1 or cnp.PyArray_DIM(b, 0) != size:
        raise ValueError(f"{name} has shape {shape_of(b)}; it must be ({size},), {why}")
    return converted(b, accumulation(dtype))


cdef int check_matrix(cnp.ndarray w, str name, cnp.ndarray x, str x_name, object columns, str why) except -1:
    """Checks that x @ w is possible and has this many columns; None: any number."""
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
    if (cnp.PyArray_NDIM(w) != 2 or cnp.PyArray_DIM(w, 0) != rows or
            columns is not None and cnp.PyArray_DIM(w, 1) != columns):
        allowed = f"({rows}, {'n' if columns is None else columns})"
        raise ValueError(f"{name} has shape {shape_of(w)}; it must be {allowed}: {rows} is {x_name}'s last axis{why}")
    return 0


cdef cnp.ndarray projected(cnp.ndarray x, cnp.ndarray w, cnp.ndarray b, fa_dtype dtype):
    """x @ w + b in the accumulation dtype; without w and b, x itself. The product is NumPy's."""
    if w is None and b is None:
        return x
    cdef object real = accumulation(dtype)
    cdef tuple shape = shape_of(x) if w is None else (*shape_of(x)[:-1], cnp.PyArray_DIM(w, 1))
    cdef cnp.ndarray y = empty(shape, real, "the projection")
    x = converted(x, real)
    with np.errstate(all="ignore"):
        if w is None:
            return np.add(x, b, out=y)
        np.matmul(x, converted(w, real), out=y)
        return y if b is None else np.add(y, b, out=y)


cdef cnp.ndarray normalised(cnp.ndarray w, double *factor):
    """Score weights in float64, scaled by a power of two so that the largest is between 1/2 and 1; `factor` undoes it.
    As part of the scale, which may be applied after the sum, it keeps products from over- or underflowing."""
    cdef cnp.ndarray a = empty(shape_of(w), accumulation(FA_F64), "a copy of w_score")
    cnp.PyArray_CopyInto(a, w)
    cdef double *number = <double *> cnp.PyArray_DATA(a)
    cdef double most = 0
    cdef int exponent = 0
    cdef Py_ssize_t i, n = cnp.PyArray_DIM(a, 0)
    for i in range(n):
        if isfinite(number[i]):
            most = max(most, fabs(number[i]))
    frexp(most, &exponent)
    for i in range(n):
        number[i] = ldexp(number[i], -exponent)
    factor[0] = ldexp(1.0, exponent)
    return a


cdef Problem read_additive(object query, object key, object value, object w_score, object w_query, object w_key,
                           object b_hidden, Rules r):
    cdef Problem p = new_problem()
    cdef list arrays
    cdef tuple names = ("query", "key", "value", "w_score", "w_query", "w_key")
    cdef cnp.ndarray q, k, x, w, b = None
    cdef Py_ssize_t hidden
    cdef int i
    if w_score is None:
        raise TypeError("w_score must be an array of shape (hidden,), not None")
    arrays = read_weights(p, (query, key, value, w_score, w_query, w_key), names)
    q, k, w = arrays[0], arrays[1], arrays[3]
    if cnp.PyArray_NDIM(w) != 1:
        raise ValueError(f"w_score has shape {shape_of(w)}; it must have one axis, (hidden,)")
    hidden = cnp.PyArray_DIM(w, 0)
    for i in range(2):
        x = arrays[i]
        if arrays[4 + i] is not None:
            check_matrix(arrays[4 + i], names[4 + i], x, names[i], hidden,
                         f", and {hidden} (hidden) the length of w_score")
        elif cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1) != hidden:
            size = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
            raise ValueError(f"{names[i]}'s last axis is {size}; without {names[4 + i]} it must be {hidden} (hidden), "
                             f"the length of w_score; {names[4 + i]}, of shape ({size}, {hidden}), projects it")
    if b_hidden is not None:
        b = read_vector(b_hidden, "b_hidden", hidden, "as long as w_score", p.call.problem.dtype)
    q, k = projected(q, arrays[4], b, p.call.problem.dtype), projected(k, arrays[5], None, p.call.problem.dtype)
    p.call.problem.score = FA_ADDITIVE
    p.score_weights = normalised(w, &p.call.problem.scale)
    p.call.problem.score_weights = <const double *> cnp.PyArray_DATA(p.score_weights)
    return read_call(p, q, k, arrays[2], (query, key, value, w_score, w_query, w_key, b_hidden),
                     (*names, "b_hidden"), &r, None)


cdef Problem read_bilinear(object query, object key, object value, object w_query, object w_key, object b_query,
                           object b_key, Rules r):
    cdef Problem p = new_problem()
    cdef list arrays
    cdef tuple names = ("query", "key", "value", "w_query", "w_key")
    cdef cnp.ndarray q, k, q_matrix, k_matrix, q_bias = None, k_bias = None
    if w_query is None:
        raise TypeError("w_query must be a matrix of shape (D_query, n), not None")
    arrays = read_weights(p, (query, key, value, w_query, w_key), names)
    q, k, q_matrix, k_matrix = arrays[0], arrays[1], arrays[3], arrays[4]
    check_matrix(q_matrix, "w_query", q, "query", None, "")
    columns = cnp.PyArray_DIM(q_matrix, 1)
    if k_matrix is not None:
        check_matrix(k_matrix, "w_key", k, "key", columns, f", and {columns} the number of w_query's columns")
    else:
        check_matrix(q_matrix, "w_query", k, "key", None, ", and without w_key both share w_query")
        k_matrix = q_matrix
    if b_query is not None:
        q_bias = read_vector(b_query, "b_query", columns, "one for each column of w_query", p.call.problem.dtype)
    if b_key is not None:
        k_bias = read_vector(b_key, "b_key", columns, "one for each column of w_query", p.call.problem.dtype)
    elif w_key is None:
        k_bias = q_bias
    q, k = projected(q, q_matrix, q_bias, p.call.problem.dtype), projected(k, k_matrix, k_bias, p.call.problem.dtype)
    p.call.problem.score = FA_DOT
    p.call.problem.scale = 1
    return read_call(p, q, k, arrays[2], (query, key, value, w_query, w_key, b_query, b_key),
                     (*names, "b_query", "b_key"), &r, None)
