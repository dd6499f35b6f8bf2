# cython: wraparound=True
"""The driver of neighborhood_attention: arrays of pixels, checked, cut into tiles of an image, and those over threads.

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
from fastattn._rows cimport MOST_AXES, real_size
from fastattn._runtime cimport (FA_ALONG_X, FA_ALONG_Y, FA_ALONG_Z, FA_BF16, FA_F16, FA_F32, FA_F64, FA_SPACE, Team,
                                Watch, allowed_threads, fa_dtype, fa_image, fa_kernels, fa_neighborhood, fa_pixels,
                                gathered, give_workspace, interrupted, join_team, kernels_for, raise_pending,
                                take_workspace)

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
    cdef fa_dtype dtype
    cdef object num_threads, out, weights, lse
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


cdef int share_heads(Call p, int group) except -1:
    """The last batch axis, or the queries of a group in it, becomes `heads` where all of it is over the same keys."""
    cdef int last = p.axes - 1, operand
    cdef Layout *layout
    p.heads = 1
    if last < 0:
        return 0
    if group > 1:
        for operand in range(<int> OPERANDS):
            layout = &p.layouts[operand]
            layout.pixels.head = layout.batch[last]
            if operand == KEY or operand == VALUE:
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
    return 0


cdef Call read_call(object query, object key, object value, object kernel_size, object dilation, object stride,
                    object is_causal, object edge, object relative_bias, object scale, object softcap, object sinks,
                    object activation, object enable_gqa, object return_weights, object return_lse, object out,
                    object num_threads):
    cdef Call p = Call.__new__(Call)
    cdef Problem rules = new_problem()
    cdef tuple names = ("query", "key", "value"), batch, space, shape
    cdef list arrays = [floating(x, name) for x, name in zip((query, key, value), names, strict=True)]
    cdef list kernel = read_kernel(kernel_size), inputs
    cdef int axes = len(kernel), i, group
    cdef cnp.ndarray bias = None, sink = None
    p.kept = []
    dtype = promoted(arrays, names, &p.dtype)
    real_dtype = accumulation(p.dtype)
    allowed = "an integer of at least 1"
    dilation = along_axes(dilation, "dilation", allowed, axes, lambda one: integer(one, "dilation", allowed, 1))
    stride = along_axes(stride, "stride", allowed, axes, lambda one: integer(one, "stride", allowed, 1))
    causal = along_axes(is_causal, "is_causal", "True or False", axes, lambda one: flag(one, "is_causal"))
    read_shapes(arrays, axes, names)
    shape = shape_of(arrays[0])
    space = shape[len(shape) - axes - 1:len(shape) - 1]
    read_reach(p, kernel, dilation, stride, causal, edge, space)
    batch, group = read_batch(arrays, axes, flag(enable_gqa, "enable_gqa"))
    with_weights, with_lse = flag(return_weights, "return_weights"), flag(return_lse, "return_lse")
    read_activation(rules.call, activation, sinks, with_lse)
    p.shared.activation = rules.call.problem.activation
    p.num_threads = checked_threads(num_threads)
    p.shared.head_dim, p.shared.value_dim = shape[len(shape) - 1], arrays[2].shape[arrays[2].ndim - 1]
    p.shared.scale = 1 / sqrt(<double> max(p.shared.head_dim, 1))
    if scale is not None:
        p.shared.scale = max(-DBL_MAX, min(DBL_MAX, real(scale, "scale", "a finite real number or None")))
    p.shared.softcap = 0
    if softcap is not None:
        p.shared.softcap = real(softcap, "softcap", "a positive finite number or None", True)
    inputs = list(arrays)
    if relative_bias is not None:
        bias = read_bias(relative_bias, batch, kernel)
        inputs.append(bias)
    if sinks is not None:
        sink = read_sinks(sinks, batch, p.dtype)
    p.out = checked_out(out, (*batch, *space, p.shared.value_dim), dtype, inputs, (*names, "relative_bias"))
    refuse_overlap(out, (query, key, value, relative_bias, sinks), (*names, "relative_bias", "sinks"))

    for i in range(<int> OPERANDS):
        p.layouts[i].pixels.data = NULL
        for axis in range(len(batch)):
            p.layouts[i].batch[axis] = 0
    for i in range(3):
        place(p, i, arrays[i], axes, True, 0, len(batch))
    if group > 1:  # a key head counts for its whole group
        for i in (KEY, VALUE):
            p.layouts[i].batch[len(batch) - 1] = stride_of(arrays[i], arrays[i].ndim - axes - 2)
    place(p, OUT, p.out, axes, True, 0, len(batch))
    if with_weights:
        p.weights = empty((*batch, *space, *[min(k, FAR) for k in kernel]), real_dtype, "the weights", True)
        place(p, WEIGHTS, p.weights, axes, False, axes, len(batch))
    if with_lse:
        p.lse = empty((*batch, *space), real_dtype)
        place(p, LSE, p.lse, axes, False, 0, len(batch))
    if bias is not None:
        place(p, BIAS, bias, axes, False, 0, len(batch))
    if sink is not None:
        place(p, SINK, sink, 0, False, 0, len(batch))
    p.axes = len(batch)
    for i in range(p.axes):
        p.shape[i] = batch[i]
    share_heads(p, group)
    p.images = 1
    for i in range(p.axes):
        p.images *= p.shape[i]
    return p


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
    cdef int axis
    cdef double count = p.images
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
        (<double> p.shared.head_dim + p.shared.value_dim + 32) * real_size(p.dtype)


cdef void choose_tile(Call p, int threads, int lanes) noexcept:
    """Tiles whose keys stay in the second cache; smaller ones where there are too few for the threads."""
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
    while threads > 1 and count_tiles(p) < TILES * threads:
        if not halve(p, FA_ALONG_Z, 1, kernel[<int> FA_ALONG_Z]):
            if not halve(p, FA_ALONG_Y, lanes, 2 * lanes):
                if not halve(p, FA_ALONG_X, 2, kernel[<int> FA_ALONG_X]):
                    if not halve(p, FA_ALONG_Y, lanes, lanes):
                        break
    count_tiles(p)


# Running

cdef inline void set_image(const Layout *layout, Py_ssize_t offset, fa_pixels *to) noexcept nogil:
    to[0] = layout.pixels
    if to.data != NULL:
        to.data += offset


cdef int run_tile(Call p, const fa_kernels *kernels, Py_ssize_t task, void *workspace) noexcept nogil:
    cdef fa_image image
    cdef int64_t begin[<int> FA_SPACE]
    cdef int64_t end[<int> FA_SPACE]
    cdef int64_t residue[<int> FA_SPACE]
    cdef Py_ssize_t offset[<int> OPERANDS]
    cdef Py_ssize_t index
    cdef int axis, operand
    cdef fa_pixels *views[<int> OPERANDS]
    views[:] = [&image.query, &image.key, &image.value, &image.out, &image.weights, &image.lse, &image.bias,
                &image.sink]
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
            return 0
    for operand in range(<int> OPERANDS):
        offset[operand] = 0
    for axis in range(p.axes - 1, -1, -1):
        index = task % p.shape[axis]
        task //= p.shape[axis]
        for operand in range(<int> OPERANDS):
            offset[operand] += index * p.layouts[operand].batch[axis]
    for operand in range(<int> OPERANDS):
        for axis in range(<int> FA_SPACE):
            if operand != BIAS and operand != SINK:
                offset[operand] += residue[axis] * p.layouts[operand].pixels.space[axis]
        set_image(&p.layouts[operand], offset[operand], views[operand])
        for axis in range(<int> FA_SPACE):
            if operand != BIAS:
                views[operand].space[axis] *= p.classes[axis]
    image.heads = p.heads
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


def neighborhood_attention(query, key, value, kernel_size, dilation, stride, is_causal, edge, relative_bias, scale,
                           softcap, sinks, activation, enable_gqa, return_weights, return_lse, out, num_threads):
    cdef Call p = read_call(query, key, value, kernel_size, dilation, stride, is_causal, edge, relative_bias, scale,
                            softcap, sinks, activation, enable_gqa, return_weights, return_lse, out, num_threads)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef int axis, threads, lanes = kernels.tuning.lanes
    cdef double work = <double> p.images * p.heads, slots = 1, estimate
    cdef Py_ssize_t tasks
    cdef size_t size
    cdef bint small
    cdef char *workspaces
    cdef Watch watch = Watch(0, 0)
    for axis in range(<int> FA_SPACE):
        work *= p.extent[axis]
        slots *= min(p.shared.reach[axis].kernel, p.extent[axis])
    if work == 0:
        return result(p)
    work *= slots * (<double> p.shared.head_dim + p.shared.value_dim + 4)
    small = work < SMALL_WORK
    threads = 1 if small else allowed_threads(p.num_threads)
    choose_axes(p, lanes)
    choose_tile(p, threads, lanes)
    tasks = <Py_ssize_t> count_tiles(p)
    threads = <int> min(<Py_ssize_t> threads, tasks)
    # Panels, and for each key that a pair of strips might see two vectors of scores and what goes with them.
    estimate = bytes_of_panels(p, lanes) + 8.0 * slots * (4.0 * lanes * 8 + 64) + \
        16.0 * p.tile[<int> FA_ALONG_Y] * (<double> p.shared.head_dim + p.shared.value_dim + 64)
    if estimate * threads > 1e15:
        raise MemoryError(f"no memory for a workspace of {estimate * threads:.3g} bytes")
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
