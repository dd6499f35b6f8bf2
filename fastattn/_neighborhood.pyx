# cython: wraparound=True
"""The drivers of neighborhood_attention and its way back: arrays of pixels, checked, cut into tiles of an image, and
those over threads.

The residue classes of a dilation are images of their own, by their strides. One axis lies in the lanes of the vectors:
the one where lanes, and the pixels that tiles share, waste least. Neither that choice nor the cut into tiles changes
with threads, batch or strides where it could change bits: tiles begin where kernels say that they may.
"""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.float cimport DBL_MAX
from libc.math cimport ceil, sqrt
from libc.stdint cimport int64_t

from fastattn._call cimport Problem, new_problem, read_activation
from fastattn._checks cimport (FAR, accumulation, as_array, checked_out, checked_threads, converted, empty, flag,
                               floating, integer, promoted, real, refuse_overlap, shape_of, storage_of)
from fastattn._rows cimport MOST_AXES
from fastattn._runtime cimport (FA_ALONG_X, FA_ALONG_Y, FA_ALONG_Z, FA_BF16, FA_F16, FA_F32, FA_F64, FA_NOTES,
                                FA_SOFTMAX, FA_SPACE, Team, Watch, allowed_threads, fa_dtype, fa_image, fa_image_back,
                                fa_kernels, fa_neighborhood, fa_pixels, fa_real_size, fa_table_size, gathered,
                                give_workspace, interrupted, join_team, kernels_for, raise_pending, take_workspace)
from fastattn._vjp cimport Wanted, read_gradient, read_wanted, store

cnp.import_array()

cdef enum:
    PANEL_BYTES = 384 << 10     # of packed keys and values of a tile, where it can be: part of a second cache
    TILES = 4                   # wanted for each thread
    MOST_COLUMNS = 128          # queries of a row in a tile

cdef enum Operand:
    QUERY
    KEY
    VALUE
    OUT
    WEIGHTS
    LSE
    BIAS
    SINK
    GRAD_OUT
    GRAD_LSE
    NOTES
    D_QUERY
    D_KEY
    D_VALUE
    OPERANDS

# Multiplications below which threads, and letting others have the GIL, cost more than they bring.
cdef double SMALL_WORK = 1e6
# What packing a vector of keys and values costs, in multiplications of vectors.
cdef double PACKING = 6


# Where an array lies: byte strides, 0 along axes that are broadcast.
cdef struct Layout:
    fa_pixels pixels                # of image 0; its axes of space are the caller's, the last of them last
    Py_ssize_t step[<int> FA_SPACE]       # weights: axes of the kernel
    Py_ssize_t batch[<int> MOST_AXES]


cdef class Call:
    cdef fa_neighborhood shared
    cdef Layout layouts[<int> OPERANDS]
    cdef int axes                                # batch axes but that of the heads that share keys
    cdef Py_ssize_t shape[<int> MOST_AXES]
    cdef Py_ssize_t images                       # their product
    cdef int64_t heads                           # query heads over the same keys
    cdef int64_t extent[<int> FA_SPACE]          # pixels along each axis
    cdef int64_t classes[<int> FA_SPACE]         # residue classes that are images of their own
    cdef int64_t pixels[<int> FA_SPACE]          # of the largest class
    cdef int64_t tile[<int> FA_SPACE]
    cdef int64_t tiles[<int> FA_SPACE]
    cdef int order[<int> FA_SPACE]               # the caller's axis at each place
    cdef fa_dtype dtype
    cdef int group                               # query heads that share a key head, by enable_gqa
    cdef tuple batch, space, inputs              # of the result; query, key, value and the bias, if there is one
    cdef object result_dtype, num_threads, out, weights, lse
    cdef list kept


# Arguments

cdef list along_axes(object x, str name, str what, Py_ssize_t axes, object read):
    """One setting an axis: x, or its elements where it is a sequence of them. what: of one, for messages."""
    if isinstance(x, (tuple, list)) or getattr(x, "ndim", 0) == 1:
        if len(x) != axes:
            raise ValueError(f"{name} must be {what}, or a sequence of {axes}, one for each axis that kernel_size "
                             f"names, not of {len(x)}: {x!r}")
        return [read(one) for one in x]
    return [read(x)] * axes


cdef list read_kernel(object x):
    allowed = "an integer of at least 1, or a sequence of one to three, one for each axis of space"
    if isinstance(x, (tuple, list)) or getattr(x, "ndim", 0) == 1:
        if not 1 <= len(x) <= 3:
            raise ValueError(f"kernel_size must be {allowed}, not a sequence of {len(x)}")
        return [integer(one, "kernel_size", allowed, 1) for one in x]
    return [integer(x, "kernel_size", allowed, 1)]


cdef int read_reach(Call p, list kernel, list dilation, list stride, list causal, object edge, tuple space) except -1:
    cdef int axis, front = FA_SPACE - len(kernel)
    cdef bint clamp
    if type(edge) is not str:
        raise TypeError(f"edge must be 'clamp' or 'truncate', not {edge!r}")
    if edge not in ("clamp", "truncate"):
        raise ValueError(f"edge must be 'clamp' or 'truncate', not {edge!r}")
    clamp = edge == "clamp"
    for axis in range(<int> FA_SPACE):
        p.extent[axis] = 1
        p.shared.reach[axis].kernel = p.shared.reach[axis].dilation = p.shared.reach[axis].stride = 1
        p.shared.reach[axis].causal = p.shared.reach[axis].clamp = 0
        if axis < front:
            continue
        k, d, s, n = kernel[axis - front], dilation[axis - front], stride[axis - front], space[axis - front]
        if s > k:
            raise ValueError(f"stride must be at most kernel_size, {k}, not {s}: queries between the kernels would "
                             f"not see themselves")
        if clamp and k * d > n:
            raise ValueError(f"kernel_size {k} times dilation {d} is more than the {n} pixels of query {space}: "
                             f"edge='clamp' needs a whole kernel inside; 'truncate' leaves out what is outside")
        p.extent[axis] = n
        p.shared.reach[axis].kernel, p.shared.reach[axis].stride = min(k, FAR), min(s, FAR)
        p.shared.reach[axis].dilation = min(d, FAR)
        p.shared.reach[axis].causal, p.shared.reach[axis].clamp = causal[axis - front], clamp
    return 0


cdef tuple names_of_space(Py_ssize_t axes):
    return ("X", "Y", "Z")[:axes]


cdef int read_shapes(list arrays, Py_ssize_t axes, tuple names) except -1:
    """query, key and value fit, batch axes aside."""
    space = ", ".join(names_of_space(axes))
    for a, name, last in zip(arrays, names, ("D", "D", "E"), strict=True):
        if a.ndim < axes + 1:
            raise ValueError(f"{name} has shape {a.shape}; kernel_size asks for at least {axes + 1} axes, "
                             f"(..., {space}, {last})")
    query, key = arrays[:2]
    if key.shape[key.ndim - 1] != query.shape[query.ndim - 1]:
        raise ValueError(f"key has head_dim {key.shape[key.ndim - 1]} (its last axis) and query "
                         f"{query.shape[query.ndim - 1]}: for dot products they must be equal")
    shapes = [a.shape[a.ndim - axes - 1:a.ndim - 1] for a in arrays]
    if shapes[0] != shapes[1] or shapes[1] != shapes[2]:
        raise ValueError(f"query, key and value must have the same pixels ({space}), not {shapes[0]}, {shapes[1]} and "
                         f"{shapes[2]}")
    return 0


cdef tuple read_batch(list arrays, Py_ssize_t axes, bint grouped):
    """The batch axes of the result, and how many query heads share a key head."""
    query, key, value = [a.shape[:a.ndim - axes - 1] for a in arrays]
    group = 1
    if grouped:
        heads, shared, others = [shape[len(shape) - 1] if shape else 1 for shape in (query, key, value)]
        if shared != others:
            raise ValueError(f"enable_gqa needs as many heads (the axis before the pixels) in key as in value, not "
                             f"{shared} and {others}")
        if heads != shared and (shared == 0 or heads % shared):
            raise ValueError(f"enable_gqa needs a whole multiple of key's {shared} heads (the axis before the pixels) "
                             f"in query, not {heads}")
        group = heads // shared if shared else 1
        key, value = [(*shape[:-1], heads) if shape else shape for shape in (key, value)]
    try:
        return np.broadcast_shapes(query, key, value), group
    except ValueError:
        raise ValueError(f"the batch axes of query {query}, key {key} and value {value} do not broadcast: heads and "
                         f"batch stand before the pixels, (B, X, Y, H, D) is passed as numpy.moveaxis(x, -2, 1); "
                         f"enable_gqa=True allows a query with a whole multiple of key's and value's heads") from None


cdef cnp.ndarray broadcastable(object x, str name, tuple shape):
    """An array that is known to broadcast to a shape."""
    if x.ndim > len(shape) or any([have != want and have != 1
                                   for have, want in zip(reversed(x.shape), reversed(shape), strict=False)]):
        raise ValueError(f"{name} has shape {x.shape}, which does not broadcast to {shape}")
    return x


cdef cnp.ndarray read_bias(object x, tuple batch, list kernel):
    cdef cnp.ndarray a = as_array(x, "relative_bias")
    if a.dtype.kind in "biu":
        raise TypeError(f"relative_bias must be floating, not of dtype {a.dtype}")
    storage_of(a, "relative_bias")
    return broadcastable(a, "relative_bias", (*batch, *[2 * k - 1 for k in kernel]))


cdef cnp.ndarray read_sinks(object x, tuple batch, fa_dtype dtype):
    cdef cnp.ndarray a = as_array(x, "sinks")
    if a.dtype.kind not in "biu" or not a.dtype.isnative:
        storage_of(a, "sinks")
    broadcastable(a, "sinks", batch)
    return converted(converted(a, accumulation(dtype)), np.dtype(np.float64))


# Layouts

cdef fa_dtype dtype_of(cnp.ndarray a) noexcept:
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT32:
        return FA_F32
    if number == cnp.NPY_FLOAT64:
        return FA_F64
    return FA_F16 if number == cnp.NPY_FLOAT16 else FA_BF16


cdef Py_ssize_t stride_of(cnp.ndarray a, int axis) noexcept:
    """0 along an axis of one element, whose stride means nothing, and where there is no such axis."""
    return cnp.PyArray_STRIDE(a, axis) if axis >= 0 and cnp.PyArray_DIM(a, axis) > 1 else 0


cdef int place(Call p, int operand, cnp.ndarray a, int space, bint channels, int kernel_axes, int batch) except -1:
    """Notes where an array lies. Behind its batch axes come `space` axes of pixels, `kernel_axes` of a kernel, and the
    channels; batch: axes of the whole result."""
    cdef Layout *layout = &p.layouts[operand]
    cdef int ndim = cnp.PyArray_NDIM(a), trailing = space + kernel_axes + channels, axis
    layout.pixels.data = <char *> cnp.PyArray_DATA(a)
    layout.pixels.dtype = dtype_of(a)
    layout.pixels.head = 0
    layout.pixels.col = cnp.PyArray_ITEMSIZE(a)
    if channels and cnp.PyArray_DIM(a, ndim - 1) > 1:
        layout.pixels.col = cnp.PyArray_STRIDE(a, ndim - 1)
    for axis in range(<int> FA_SPACE):
        layout.pixels.space[axis] = layout.step[axis] = 0
        if axis >= FA_SPACE - space:
            layout.pixels.space[axis] = stride_of(a, ndim - channels - kernel_axes - FA_SPACE + axis)
        if axis >= FA_SPACE - kernel_axes:
            layout.step[axis] = stride_of(a, ndim - channels - FA_SPACE + axis)
    for axis in range(batch):
        layout.batch[axis] = stride_of(a, ndim - trailing - batch + axis)
    p.kept.append(a)
    return 0


cdef int share_heads(Call p) noexcept:
    """The last batch axis, or the queries of a group in it, becomes `heads` where all of it is over the same keys."""
    cdef int last = p.axes - 1, operand, i, group = p.group
    cdef Layout *layout
    p.heads = 1
    if last < 0:
        p.images = 1
        return 0
    if group > 1:
        for operand in range(<int> OPERANDS):
            layout = &p.layouts[operand]
            layout.pixels.head = layout.batch[last]
            if operand in (KEY, VALUE, D_KEY, D_VALUE):
                layout.pixels.head = 0
            else:
                layout.batch[last] *= group
        p.shape[last] //= group
        p.heads = group
    elif p.layouts[<int> KEY].batch[last] == 0 and p.layouts[<int> VALUE].batch[last] == 0:
        for operand in range(<int> OPERANDS):
            p.layouts[operand].pixels.head = p.layouts[operand].batch[last]
        p.heads = p.shape[last]
        p.axes -= 1
    p.images = 1
    for i in range(p.axes):
        p.images *= p.shape[i]
    return 0


cdef Call read_call(object query, object key, object value, object kernel_size, object dilation, object stride,
                    object is_causal, object edge, object relative_bias, object scale, object softcap, object sinks,
                    object activation, object enable_gqa, bint return_lse, object num_threads):
    """Everything but the results, which are placed next; then comes share_heads."""
    cdef Call p = Call.__new__(Call)
    cdef Problem rules = new_problem()
    cdef tuple names = ("query", "key", "value"), shape
    cdef list arrays = [floating(x, name) for x, name in zip((query, key, value), names, strict=True)]
    cdef list kernel = read_kernel(kernel_size)
    cdef int axes = len(kernel), i
    cdef cnp.ndarray bias = None, sink = None
    p.kept = []
    p.result_dtype = promoted(arrays, names, &p.dtype)
    allowed = "an integer of at least 1"
    dilation = along_axes(dilation, "dilation", allowed, axes, lambda one: integer(one, "dilation", allowed, 1))
    stride = along_axes(stride, "stride", allowed, axes, lambda one: integer(one, "stride", allowed, 1))
    causal = along_axes(is_causal, "is_causal", "True or False", axes, lambda one: flag(one, "is_causal"))
    read_shapes(arrays, axes, names)
    shape = shape_of(arrays[0])
    p.space = shape[len(shape) - axes - 1:len(shape) - 1]
    read_reach(p, kernel, dilation, stride, causal, edge, p.space)
    p.batch, p.group = read_batch(arrays, axes, flag(enable_gqa, "enable_gqa"))
    read_activation(rules.call, activation, sinks, return_lse)
    p.shared.activation = rules.call.problem.activation
    p.num_threads = checked_threads(num_threads)
    p.shared.head_dim, p.shared.value_dim = shape[len(shape) - 1], arrays[2].shape[arrays[2].ndim - 1]
    p.shared.scale = 1 / sqrt(<double> max(p.shared.head_dim, 1))
    if scale is not None:
        p.shared.scale = max(-DBL_MAX, min(DBL_MAX, real(scale, "scale", "a finite real number or None")))
    p.shared.softcap = 0
    if softcap is not None:
        p.shared.softcap = real(softcap, "softcap", "a positive finite number or None", True)
    if relative_bias is not None:
        bias = read_bias(relative_bias, p.batch, kernel)
    if sinks is not None:
        sink = read_sinks(sinks, p.batch, p.dtype)
    p.inputs = (*arrays, bias)

    p.axes = len(p.batch)
    for i in range(p.axes):
        p.shape[i] = p.batch[i]
    for i in range(3):
        place(p, i, arrays[i], axes, True, 0, p.axes)
    if p.group > 1:  # a key head counts for its whole group
        for i in (KEY, VALUE):
            p.layouts[i].batch[p.axes - 1] = stride_of(arrays[i], arrays[i].ndim - axes - 2)
    if bias is not None:
        place(p, BIAS, bias, axes, False, 0, p.axes)
    if sink is not None:
        place(p, SINK, sink, 0, False, 0, p.axes)
    return p


cdef int place_results(Call p, bint with_weights, bint with_lse, object out, tuple given) except -1:
    """given: the inputs as they came, sinks last."""
    cdef tuple names = ("query", "key", "value", "relative_bias", "sinks")
    cdef int axes = len(p.space)
    inputs = [x for x in p.inputs if x is not None]
    p.out = checked_out(out, (*p.batch, *p.space, p.shared.value_dim), p.result_dtype, inputs, names)
    refuse_overlap(out, given, names)
    place(p, OUT, p.out, axes, True, 0, p.axes)
    if with_weights:
        kernel = [p.shared.reach[axis].kernel for axis in range(<int> FA_SPACE - axes, <int> FA_SPACE)]
        p.weights = empty((*p.batch, *p.space, *kernel), accumulation(p.dtype), "the weights", True)
        place(p, WEIGHTS, p.weights, axes, False, axes, p.axes)
    if with_lse:
        p.lse = empty((*p.batch, *p.space), accumulation(p.dtype))
        place(p, LSE, p.lse, axes, False, 0, p.axes)
    return 0


# Axes and tiles

cdef double cost_of_lanes(Call p, int axis, int64_t dilation, double others, int lanes) noexcept:
    """Multiplications of vectors for a pixel and channel where this axis lies in the lanes, with so much of its
    dilation left. others: kernel of the other axes."""
    cdef double classes = <double> p.shared.reach[axis].dilation / dilation
    cdef double pixels = ceil(p.extent[axis] / classes)
    cdef double kernel = min(p.shared.reach[axis].kernel, p.extent[axis])
    cdef double hidden = min(p.shared.reach[axis].stride - 1, p.extent[axis]), used = ceil(pixels / lanes)
    return used * lanes / max(pixels, 1.0) * (2 * others * (kernel + hidden) +
                                              PACKING * (lanes + (kernel - 1) * dilation) / lanes)


cdef void swap_axes(Call p, int a, int b) noexcept:
    cdef int operand
    if a == b:
        return
    p.extent[a], p.extent[b] = p.extent[b], p.extent[a]
    p.order[a], p.order[b] = p.order[b], p.order[a]
    p.shared.reach[a], p.shared.reach[b] = p.shared.reach[b], p.shared.reach[a]
    for operand in range(<int> OPERANDS):
        p.layouts[operand].pixels.space[a], p.layouts[operand].pixels.space[b] = \
            p.layouts[operand].pixels.space[b], p.layouts[operand].pixels.space[a]
        p.layouts[operand].step[a], p.layouts[operand].step[b] = \
            p.layouts[operand].step[b], p.layouts[operand].step[a]


cdef void choose_axes(Call p, int lanes) noexcept:
    """Puts the axes in the order that the kernels want, and splits the classes of dilations."""
    cdef int axis, best = FA_ALONG_Y, other
    cdef bint whole = False
    cdef double cost, least = -1, others
    cdef int64_t d
    for axis in range(<int> FA_SPACE):
        p.order[axis] = axis
    for axis in range(<int> FA_SPACE - 1, -1, -1):
        if p.extent[axis] <= 1 and least >= 0:
            continue
        others = 1
        for other in range(<int> FA_SPACE):
            if other != axis:
                others *= min(p.shared.reach[other].kernel, p.extent[other])
        d = p.shared.reach[axis].dilation
        cost = cost_of_lanes(p, axis, 1, others, lanes)
        if least < 0 or cost < 0.95 * least:
            best, least, whole = axis, cost, False
        if 1 < d < p.extent[axis]:
            cost = cost_of_lanes(p, axis, d, others, lanes)
            if cost < 0.95 * least:
                best, least, whole = axis, cost, True
    swap_axes(p, best, FA_ALONG_Y)
    if p.extent[<int> FA_ALONG_X] == 1:
        swap_axes(p, FA_ALONG_Z, FA_ALONG_X)
    for axis in range(<int> FA_SPACE):
        d = p.shared.reach[axis].dilation
        p.classes[axis] = 1 if whole and axis == FA_ALONG_Y else max(1, min(d, p.extent[axis]))
        p.pixels[axis] = p.extent[axis]
        if p.classes[axis] > 1:
            p.pixels[axis] = (p.extent[axis] + d - 1) // d
        if not (whole and axis == FA_ALONG_Y):
            p.shared.reach[axis].dilation = 1
        p.shared.weights_step[axis] = p.layouts[<int> WEIGHTS].step[axis]


cdef double count_tiles(Call p) noexcept:
    """Of an image."""
    cdef int axis
    cdef double count = 1
    for axis in range(<int> FA_SPACE):
        p.tiles[axis] = (p.pixels[axis] + p.tile[axis] - 1) // p.tile[axis]
        count *= <double> p.tiles[axis] * p.classes[axis]
    return count


cdef bint halve(Call p, int axis, int64_t unit, int64_t least) noexcept:
    """Whether tiles could be made smaller along an axis: by half, to a multiple of the unit, but not below `least`."""
    cdef int64_t half = ((p.tile[axis] + 1) // 2 + unit - 1) // unit * unit
    if half < least or half >= p.tile[axis]:
        return False
    p.tile[axis] = half
    return True


cdef double width_of_panel(Call p, int lanes) noexcept:
    """Columns, at most."""
    cdef int64_t n = (p.pixels[<int> FA_ALONG_Y] + p.shared.reach[<int> FA_ALONG_Y].dilation - 1) // \
        p.shared.reach[<int> FA_ALONG_Y].dilation
    cdef double offsets = 2.0 * min(p.shared.reach[<int> FA_ALONG_Y].kernel, n) - 1
    return max(lanes, p.tile[<int> FA_ALONG_Y]) + (offsets - 1) * p.shared.reach[<int> FA_ALONG_Y].dilation


cdef double rows_seen(Call p, int axis, int64_t rows) noexcept:
    """Rows of keys that so many rows of queries see along an axis, at most."""
    return min(<double> p.pixels[axis], <double> rows + p.shared.reach[axis].kernel - 1 +
               2 * (p.shared.reach[axis].stride - 1))


cdef double bytes_of_panels(Call p, int lanes) noexcept:
    """Kernels keep the planes that are still seen and, where there is one plane of queries, the rows."""
    cdef int64_t rows = 2 if p.tile[<int> FA_ALONG_Z] == 1 else p.tile[<int> FA_ALONG_X]
    return rows_seen(p, FA_ALONG_Z, 1) * rows_seen(p, FA_ALONG_X, rows) * width_of_panel(p, lanes) * \
        (<double> p.shared.head_dim + p.shared.value_dim + 32) * fa_real_size(p.dtype)


cdef void choose_tile(Call p, double wanted, int lanes) noexcept:
    """Tiles whose keys stay in the second cache; smaller ones where an image has fewer than are wanted."""
    cdef int axis
    cdef int64_t kernel[<int> FA_SPACE]
    for axis in range(<int> FA_SPACE):
        kernel[axis] = min(p.shared.reach[axis].kernel, p.pixels[axis])
        p.tile[axis] = max(1, p.pixels[axis])
    p.tile[<int> FA_ALONG_X] = (p.tile[<int> FA_ALONG_X] + 1) // 2 * 2
    p.tile[<int> FA_ALONG_Y] = (p.tile[<int> FA_ALONG_Y] + lanes - 1) // lanes * lanes
    while bytes_of_panels(p, lanes) > PANEL_BYTES or <double> p.tile[<int> FA_ALONG_Y] > MOST_COLUMNS:
        if not halve(p, FA_ALONG_Y, lanes, lanes):
            if p.tile[<int> FA_ALONG_Z] == 1 or not halve(p, FA_ALONG_X, 2, 2 * kernel[<int> FA_ALONG_X]):
                break
    while count_tiles(p) < wanted:
        if not halve(p, FA_ALONG_Z, 1, kernel[<int> FA_ALONG_Z]):
            if not halve(p, FA_ALONG_Y, lanes, 2 * lanes):
                if not halve(p, FA_ALONG_X, 2, kernel[<int> FA_ALONG_X]):
                    if not halve(p, FA_ALONG_Y, lanes, lanes):
                        break
    count_tiles(p)


# Running

cdef Py_ssize_t find_tile(Call p, Py_ssize_t task, fa_image *image, int64_t *begin, int64_t *end,
                          int64_t *residue) noexcept nogil:
    """The tile, and the class, of a task; returns what is left of the task, the image; or -1: the tile is empty."""
    cdef int axis
    for axis in range(<int> FA_SPACE - 1, -1, -1):
        begin[axis] = task % p.tiles[axis] * p.tile[axis]
        task //= p.tiles[axis]
    for axis in range(<int> FA_SPACE - 1, -1, -1):
        residue[axis] = task % p.classes[axis]
        task //= p.classes[axis]
        # Classes of a dilation differ by one pixel.
        image.pixels[axis] = (p.extent[axis] - residue[axis] + p.classes[axis] - 1) // p.classes[axis]
        end[axis] = min(begin[axis] + p.tile[axis], image.pixels[axis])
        if begin[axis] >= end[axis]:
            return -1
    image.heads = p.heads
    return task


cdef void find_array(Call p, int operand, const Py_ssize_t *index, const int64_t *residue,
                     fa_pixels *to) noexcept nogil:
    """The part of an operand that belongs to one image, or to a class of its pixels."""
    cdef const Layout *layout = &p.layouts[operand]
    cdef Py_ssize_t offset = 0
    cdef int axis
    to[0] = layout.pixels
    if to.data == NULL:
        return
    for axis in range(p.axes):
        offset += index[axis] * layout.batch[axis]
    if operand != BIAS and operand != SINK:
        for axis in range(<int> FA_SPACE):
            offset += residue[axis] * layout.pixels.space[axis]
            to.space[axis] *= p.classes[axis]
    to.data += offset


cdef int run_tile(Call p, const fa_kernels *kernels, Py_ssize_t task, void *workspace) noexcept nogil:
    cdef fa_image image
    cdef int64_t begin[<int> FA_SPACE]
    cdef int64_t end[<int> FA_SPACE]
    cdef int64_t residue[<int> FA_SPACE]
    cdef Py_ssize_t index[<int> MOST_AXES]
    cdef int axis, operand
    cdef fa_pixels *views[8]
    views[:] = [&image.query, &image.key, &image.value, &image.out, &image.weights, &image.lse, &image.bias,
                &image.sink]
    task = find_tile(p, task, &image, begin, end, residue)
    if task < 0:
        return 0
    for axis in range(p.axes - 1, -1, -1):
        index[axis] = task % p.shape[axis]
        task //= p.shape[axis]
    for operand in range(8):
        find_array(p, operand, index, residue, views[operand])
    kernels.neighborhood(&p.shared, &image, begin, end, workspace)
    return 0


cdef void run_serial(Call p, const fa_kernels *kernels, Py_ssize_t tasks, void *workspace, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    for task in range(tasks):
        if watch != NULL and interrupted(watch, True):
            return
        run_tile(p, kernels, task, workspace)


cdef void run_parallel(Call p, const fa_kernels *kernels, Py_ssize_t tasks, int threads, char *workspaces,
                       size_t workspace_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(tasks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                run_tile(p, kernels, task, workspaces + threadid() * workspace_size)


cdef object result(Call p):
    if p.weights is None:
        return p.out if p.lse is None else (p.out, p.lse)
    return (p.out, p.weights) if p.lse is None else (p.out, p.weights, p.lse)


cdef double work_of(Call p, double *slots) noexcept:
    """Multiplications of the way forward. slots: pixels of a kernel, at most."""
    cdef int axis
    cdef double work = <double> p.images * p.heads
    slots[0] = 1
    for axis in range(<int> FA_SPACE):
        work *= p.extent[axis]
        slots[0] *= min(p.shared.reach[axis].kernel, p.extent[axis])
    return work * slots[0] * (<double> p.shared.head_dim + p.shared.value_dim + 4)


cdef double estimate_of(Call p, double slots, int lanes) except -1:
    """Panels, and for each key that a pair of strips might see two vectors of scores and what goes with them."""
    cdef double estimate = bytes_of_panels(p, lanes) + 8.0 * slots * (4.0 * lanes * 8 + 64) + \
        16.0 * p.tile[<int> FA_ALONG_Y] * (<double> p.shared.head_dim + p.shared.value_dim + 64)
    if estimate > 1e14:
        raise MemoryError(f"no memory for a workspace of {estimate:.3g} bytes")
    return estimate


def neighborhood_attention(query, key, value, kernel_size, dilation, stride, is_causal, edge, relative_bias, scale,
                           softcap, sinks, activation, enable_gqa, return_weights, return_lse, out, num_threads):
    cdef bint with_weights = flag(return_weights, "return_weights"), with_lse = flag(return_lse, "return_lse")
    cdef Call p = read_call(query, key, value, kernel_size, dilation, stride, is_causal, edge, relative_bias, scale,
                            softcap, sinks, activation, enable_gqa, with_lse, num_threads)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef int threads, lanes = kernels.tuning.lanes
    cdef double work, slots, estimate
    cdef Py_ssize_t tasks
    cdef size_t size
    cdef bint small
    cdef char *workspaces
    cdef Watch watch = Watch(0, 0)
    place_results(p, with_weights, with_lse, out, (query, key, value, relative_bias, sinks))
    share_heads(p)
    work = work_of(p, &slots)
    if work == 0:
        return result(p)
    small = work < SMALL_WORK
    threads = 1 if small else allowed_threads(p.num_threads)
    choose_axes(p, lanes)
    choose_tile(p, TILES * <double> threads / p.images if threads > 1 else 1, lanes)
    tasks = <Py_ssize_t> (p.images * count_tiles(p))
    threads = <int> min(<Py_ssize_t> threads, tasks)
    estimate = estimate_of(p, slots, lanes)
    size = (kernels.neighborhood_workspace(&p.shared, p.pixels, p.tile) + 63) // 64 * 64
    workspaces = <char *> take_workspace(size * threads, estimate * threads)
    try:
        if small:
            run_serial(p, kernels, tasks, workspaces, NULL)
        elif threads <= 1:
            with nogil:
                run_serial(p, kernels, tasks, workspaces, &watch)
        else:
            with nogil:
                run_parallel(p, kernels, tasks, threads, workspaces, size, &watch)
    finally:
        give_workspace(workspaces)
    if watch.stop:
        raise_pending()
    return result(p)


# The way back

# One of its two passes: over the queries, or over the keys. A task is a tile of all images that add to the same
# gradients, in ascending order: those along the axes that are `shared`.
cdef struct Pass:
    fa_image_back image                         # what all tasks have in common
    bint shared[<int> MOST_AXES]
    Py_ssize_t repeats                          # images of a task
    char *tables                                # [image][class][tile][head] sums for the bias and the sinks, or NULL
    Py_ssize_t table_bytes                      # of a tile's heads


cdef int run_task_back(Call p, const fa_kernels *kernels, const Pass *which, Py_ssize_t task, void *workspace,
                       Watch *watch, bint caller) noexcept nogil:
    cdef fa_image_back image = which.image
    cdef int64_t begin[<int> FA_SPACE]
    cdef int64_t end[<int> FA_SPACE]
    cdef int64_t residue[<int> FA_SPACE]
    cdef Py_ssize_t index[<int> MOST_AXES]
    cdef Py_ssize_t tiles = 1, tile, repeat, rest, number
    cdef int axis, i
    cdef int operands[11]
    cdef fa_pixels *views[11]
    cdef int *adds[3]
    operands[:] = [QUERY, KEY, VALUE, BIAS, SINK, GRAD_OUT, GRAD_LSE, NOTES, D_QUERY, D_KEY, D_VALUE]
    views[:] = [&image.image.query, &image.image.key, &image.image.value, &image.image.bias, &image.image.sink,
                &image.grad_out, &image.grad_lse, &image.notes, &image.d_query, &image.d_key, &image.d_value]
    adds[:] = [&image.add_query, &image.add_key, &image.add_value]
    for axis in range(<int> FA_SPACE):
        tiles *= p.tiles[axis] * p.classes[axis]
    tile = task % tiles
    task = find_tile(p, task, &image.image, begin, end, residue)
    if task < 0:
        return 0
    for axis in range(p.axes - 1, -1, -1):
        index[axis] = 0
        if not which.shared[axis]:
            index[axis] = task % p.shape[axis]
            task //= p.shape[axis]
    for repeat in range(which.repeats):
        if watch != NULL and interrupted(watch, caller):
            return 0
        rest, number = repeat, 0
        adds[0][0] = adds[1][0] = adds[2][0] = False
        for axis in range(p.axes - 1, -1, -1):
            if which.shared[axis]:
                index[axis] = rest % p.shape[axis]
                rest //= p.shape[axis]
                for i in range(3):
                    if index[axis] > 0 and p.layouts[<int> D_QUERY + i].batch[axis] == 0:
                        adds[i][0] = True
        for axis in range(p.axes):
            number = number * p.shape[axis] + index[axis]
        for i in range(11):
            find_array(p, operands[i], index, residue, views[i])
        if image.of_keys:
            image.d_query.data = NULL
        else:
            image.d_key.data = image.d_value.data = NULL
        if which.tables != NULL:
            image.tables = which.tables + (number * tiles + tile) * which.table_bytes
        kernels.neighborhood_back(&p.shared, &image, begin, end, workspace)
    return 0


cdef void run_back_parallel(Call p, const fa_kernels *kernels, const Pass *which, Py_ssize_t tasks, int threads,
                            char *workspaces, size_t workspace_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(tasks, schedule="dynamic", chunksize=1):
            run_task_back(p, kernels, which, task, workspaces + threadid() * workspace_size, watch, threadid() == 0)


cdef int run_back(Call p, const fa_kernels *kernels, Pass *which, int threads, double slots, Watch *watch) except -1:
    """All tasks of a pass; the tiles are chosen."""
    cdef int lanes = kernels.tuning.lanes, axis, i
    cdef int first = D_KEY if which.image.of_keys else D_QUERY, last = D_VALUE if which.image.of_keys else D_QUERY
    cdef Py_ssize_t tasks, task
    cdef double estimate = 8 * estimate_of(p, slots, lanes)
    cdef size_t size
    cdef char *workspaces
    which.repeats = 1
    for axis in range(p.axes):
        which.shared[axis] = False
        for i in range(first, last + 1):
            if p.layouts[i].pixels.data != NULL and p.layouts[i].batch[axis] == 0 and p.shape[axis] > 1:
                which.shared[axis] = True
        if which.shared[axis]:
            which.repeats *= p.shape[axis]
    tasks = <Py_ssize_t> (p.images // which.repeats * count_tiles(p))
    threads = <int> min(<Py_ssize_t> threads, tasks)
    size = (kernels.neighborhood_back_workspace(&p.shared, which.image.of_keys, p.pixels, p.tile) + 63) // 64 * 64
    workspaces = <char *> take_workspace(size * threads, estimate * threads)
    try:
        with nogil:
            if threads <= 1:
                for task in range(tasks):
                    run_task_back(p, kernels, which, task, workspaces, watch, True)
            else:
                run_back_parallel(p, kernels, which, tasks, threads, workspaces, size, watch)
    finally:
        give_workspace(workspaces)
    if watch.stop:
        raise_pending()
    return 0


cdef int read_forward(Call p, object output, object lse, object grad_lse) except -1:
    """What the call may know of the way forward. The notes of a query are cheaper made again than read, so of this the
    gradient of the log-sum-exp alone is used."""
    cdef tuple shape = (*p.batch, *p.space)
    if (output is None) != (lse is None):
        raise ValueError(f"output and lse belong together: {'lse' if lse is None else 'output'} is missing")
    for x, name in ((output, "output"), (grad_lse, "grad_lse")):
        if x is not None and p.shared.activation != FA_SOFTMAX:
            raise ValueError(f"{name} needs activation='softmax': other activations have no log-sum-exp, and do "
                             f"without")
    if output is not None:
        read_gradient(output, (*shape, p.shared.value_dim), "output")
        read_gradient(lse, shape, "lse")
    if grad_lse is not None:
        place(p, GRAD_LSE, read_gradient(grad_lse, shape, "grad_lse"), len(p.space), False, 0, p.axes)
    return 0


cdef object place_gradient(Call p, int operand, object target):
    """Where the sums for the gradient of an array go: to `target`, or, if they are added up step by step, to an array
    of the accumulation dtype."""
    cdef cnp.ndarray a = target
    cdef object real_dtype = accumulation(p.dtype)
    cdef Py_ssize_t all_elements = <Py_ssize_t> np.prod((*p.batch, *p.space), dtype=object) * a.shape[a.ndim - 1]
    if a.size != all_elements and target.dtype != real_dtype:
        a = empty(shape_of(a), real_dtype, "the sums of a gradient")
    place(p, operand, a, len(p.space), True, 0, p.axes)
    if p.group > 1 and operand != D_QUERY:
        p.layouts[operand].batch[p.axes - 1] = stride_of(a, a.ndim - <int> len(p.space) - 2)
    return a


cdef int lay_notes(Call p) except -1:
    """Numbers of each query, for the axes as they are chosen."""
    cdef Py_ssize_t step = fa_real_size(p.dtype)
    cdef int axis
    cdef Layout *layout = &p.layouts[<int> NOTES]
    cdef cnp.ndarray notes = empty((p.images * p.heads * <int> FA_NOTES, *[p.extent[i] for i in range(<int> FA_SPACE)]),
                                   accumulation(p.dtype), "notes of the queries")
    layout.pixels.data = <char *> cnp.PyArray_DATA(notes)
    for axis in range(<int> FA_SPACE - 1, -1, -1):
        layout.pixels.space[axis] = step
        step *= p.extent[axis]
    layout.pixels.col = step
    step *= <int> FA_NOTES
    layout.pixels.head = step
    step *= p.heads
    for axis in range(p.axes - 1, -1, -1):
        layout.batch[axis] = step
        step *= p.shape[axis]
    p.kept.append(notes)
    return 0


cdef object summed(object full, tuple shape):
    """The sum over the axes along which an array of this shape was broadcast, one after the other."""
    full = full.sum(axis=0) if full.ndim > len(shape) else full
    if full.ndim > len(shape):
        return summed(full, shape)
    for axis in range(full.ndim):
        if shape[axis] == 1 and full.shape[axis] != 1:
            full = full.sum(axis=axis, keepdims=True)
    return full


cdef int finish_tables(Call p, Wanted w, object tables, const int64_t *half, int64_t table_row) except -1:
    """The gradients of bias and sinks from the sums of all tiles."""
    cdef int axes = len(p.space), axis
    cdef Py_ssize_t entries = tables.shape[3]
    # In double, of which the order is the same whatever the tables' dtype.
    totals = tables.sum(axis=1, dtype=np.float64)
    target = w.target("relative_bias")
    if target is not None:
        rows = [2 * half[axis] + 1 for axis in range(<int> FA_SPACE - 1)]
        size = rows[0] * rows[1] * table_row
        table = (totals[..., :size] + totals[..., size:2 * size]).reshape(*p.batch, *rows, table_row)
        table = table[..., :2 * half[<int> FA_ALONG_Y] + 1]
        # To the caller's axes.
        place_of = [0] * <int> FA_SPACE
        for axis in range(<int> FA_SPACE):
            place_of[p.order[axis]] = axis
        table = table.transpose(*range(len(p.batch)), *[len(p.batch) + axis for axis in place_of])
        table = table.reshape(*p.batch, *table.shape[table.ndim - axes:])
        shape, inside = target.shape, []
        for axis in range(axes):
            # A table that is broadcast has one entry for all; of others, some may be for no pixel there is.
            n, have = table.shape[table.ndim - axes + axis], 1
            if len(shape) >= axes - axis:
                have = shape[len(shape) - axes + axis]
                inside.append(slice((have - n) // 2, (have + n) // 2) if have > 1 else slice(None))
        small = list(shape)
        for axis in range(len(inside)):
            at = len(shape) - len(inside) + axis
            if shape[at] > 1:
                small[at] = table.shape[table.ndim - len(inside) + axis]
        target[...] = 0
        part = target[(..., *inside)] if inside else target
        store(part, summed(table, tuple(small)))
    target = w.target("sinks")
    if target is not None:
        size = entries - 2 * kernels_for(p.dtype).tuning.lanes
        sinks = totals[..., size:].sum(axis=-1).reshape(p.batch)
        store(target, summed(sinks, target.shape))
    return 0


def neighborhood_attention_vjp(grad_out, query, key, value, kernel_size, dilation, stride, is_causal, edge,
                               relative_bias, scale, softcap, sinks, activation, enable_gqa, wrt, output, lse,
                               grad_lse, out, num_threads):
    cdef Call p = read_call(query, key, value, kernel_size, dilation, stride, is_causal, edge, relative_bias, scale,
                            softcap, sinks, activation, enable_gqa, False, num_threads)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef int threads, lanes = kernels.tuning.lanes, axis, i
    cdef double slots, work
    cdef Pass which
    cdef Watch watch = Watch(0, 0)
    cdef Wanted w = read_wanted(wrt, {"query": query, "key": key, "value": value, "relative_bias": relative_bias,
                                      "sinks": sinks}, out, accumulation(p.dtype),
                                {"grad_out": grad_out, "output": output, "lse": lse, "grad_lse": grad_lse})
    cdef dict sums = {}
    cdef bint of_table = w.target("relative_bias") is not None or w.target("sinks") is not None
    read_forward(p, output, lse, grad_lse)
    place(p, GRAD_OUT, read_gradient(grad_out, (*p.batch, *p.space, p.shared.value_dim)), len(p.space), True, 0, p.axes)
    for i, name in enumerate(("query", "key", "value")):
        target = w.target(name)
        if target is not None:
            sums[name] = place_gradient(p, <int> D_QUERY + i, target)
    share_heads(p)
    work = work_of(p, &slots)
    if work == 0:
        for target in w.targets:
            target[...] = 0
        return w.result()
    threads = 1 if 3 * work < SMALL_WORK else allowed_threads(p.num_threads)
    choose_axes(p, lanes)

    # The queries; where sums for all of them are wanted, tiles do not follow the number of threads.
    of_keys = p.layouts[<int> D_KEY].pixels.data != NULL or p.layouts[<int> D_VALUE].pixels.data != NULL
    if of_keys:
        lay_notes(p)
    which.image.of_keys = False
    which.image.of_scores = list(w.names) != ["value"]
    which.image.of_bias = w.target("relative_bias") is not None
    which.image.of_sinks = w.target("sinks") is not None
    which.tables = which.image.tables = NULL
    wanted = TILES * <double> threads / p.images if threads > 1 else 1
    choose_tile(p, TILES if of_table else wanted, lanes)
    if of_table:
        for axis in range(<int> FA_SPACE):
            n = (p.pixels[axis] + p.shared.reach[axis].dilation - 1) // p.shared.reach[axis].dilation
            which.image.half[axis] = min(p.shared.reach[axis].kernel, n) - 1
        which.image.table_row = (2 * which.image.half[<int> FA_ALONG_Y] + 1 + lanes - 1) // lanes * lanes + lanes
        tables = empty((p.images, <Py_ssize_t> count_tiles(p), p.heads,
                        fa_table_size(which.image.half, which.image.table_row, lanes)), accumulation(p.dtype),
                       "sums for the bias", True)
        which.tables = <char *> cnp.PyArray_DATA(tables)
        which.table_bytes = tables.strides[1]
    run_back(p, kernels, &which, threads, slots, &watch)
    if of_table:
        with np.errstate(all="ignore"):
            finish_tables(p, w, tables, which.image.half, which.image.table_row)

    if of_keys:
        which.image.of_keys = True
        which.image.of_scores = p.layouts[<int> D_KEY].pixels.data != NULL
        which.image.of_bias = which.image.of_sinks = False
        which.tables = which.image.tables = NULL
        choose_tile(p, wanted, lanes)
        run_back(p, kernels, &which, threads, slots, &watch)
    for name in sums:
        store(w.target(name), sums[name])
    return w.result()
