# What the drivers of rows share: item sizes, and some of an array's axes with byte strides for each operand.
from fastattn._runtime cimport (FA_F32, FA_F64, FA_ROW_AXES, FA_ROW_GRAD, FA_ROW_MASK, FA_ROW_OPERANDS, FA_ROW_OUT,
                                FA_ROW_X, fa_axes, fa_dtype)

cdef enum:
    MOST_AXES = FA_ROW_AXES

cdef enum RowOperand:
    ROW_X = FA_ROW_X
    ROW_GRAD = FA_ROW_GRAD
    ROW_MASK = FA_ROW_MASK
    ROW_OUT = FA_ROW_OUT
    ROW_OPERANDS = FA_ROW_OPERANDS

ctypedef fa_axes Axes


cdef inline Py_ssize_t size_of(fa_dtype dtype) noexcept nogil:
    """Bytes of an element in storage."""
    return 8 if dtype == FA_F64 else 4 if dtype == FA_F32 else 2


cdef inline Py_ssize_t real_size(fa_dtype dtype) noexcept nogil:
    """Bytes of an element in the accumulation dtype."""
    return 8 if dtype == FA_F64 else 4


cdef inline void join_axes(Axes *axes) noexcept:
    """Merges each axis with the next if the strides of all operands allow it; drops axes of length 1."""
    cdef int i, k, n = 0
    cdef bint joined
    for i in range(axes.count):
        if axes.shape[i] == 1:
            continue
        joined = n > 0
        for k in range(<int> ROW_OPERANDS):
            if n > 0 and axes.strides[k][n - 1] != axes.strides[k][i] * axes.shape[i]:
                joined = False
        if joined:
            axes.shape[n - 1] *= axes.shape[i]
            for k in range(<int> ROW_OPERANDS):
                axes.strides[k][n - 1] = axes.strides[k][i]
        else:
            axes.shape[n] = axes.shape[i]
            for k in range(<int> ROW_OPERANDS):
                axes.strides[k][n] = axes.strides[k][i]
            n += 1
    axes.count = n
