# A call of linear attention, checked, and how a recurrence is walked: for its driver and that of its gradients.
from libc.stdint cimport int64_t

from fastattn._call cimport Problem, fa_layout
from fastattn._runtime cimport FA_LINEAR_OPERANDS, Watch, fa_kernels, fa_linear, fa_linear_head, fa_view

cdef enum:
    BLOCK = 24             # keys: runs are a multiple of it


# One call, checked. `call` has the shapes, batch axes and lengths; a group of query heads shares a key head.
cdef class Recurrence:
    cdef Problem call
    cdef fa_linear shared
    cdef fa_layout layouts[<int> FA_LINEAR_OPERANDS]
    cdef Py_ssize_t heads                       # of keys
    cdef Py_ssize_t parts, columns              # of a head: tasks, and columns of each
    cdef list kept
    cdef object out, state                      # the state that is wanted, or None
    cdef object target                          # where it is made


cdef Recurrence read_call(object query, object key, object value, object feature_map, object is_causal,
                          object query_offset, object key_lengths, object query_lengths, object log_decay, object beta,
                          object normalize, object scale, object eps, object state, object return_state,
                          object state_out, object enable_gqa, object out, object num_threads, bint named_maps=*)
cdef void find_head(Recurrence r, Py_ssize_t head, Py_ssize_t *index) noexcept nogil
cdef fa_view placed(const fa_layout *layout, int axes, const Py_ssize_t *index, Py_ssize_t group) noexcept nogil
cdef void locate(Recurrence r, Py_ssize_t head, fa_linear_head *to, int64_t *offset, int64_t *rows,
                 int64_t *keys) noexcept nogil
cdef int walk(const fa_kernels *kernels, const fa_linear *shared, fa_linear_head *head, int64_t keys, void *workspace,
              Watch *watch, bint caller, int64_t chunk=*, size_t size=*) noexcept nogil
