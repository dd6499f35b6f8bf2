cimport numpy as cnp
from libc.stdint cimport int64_t

# The tokens of x, (..., tokens, channels), as int8 in `to`, (..., places, channels), with `scales`, (..., places,
# groups). center: float32, (..., 1, channels), or None. Leading axes are the same everywhere; the last but one of them
# are heads, and for each sequence (those before) `count` of the tokens, from `first` on, go to the places from `at` on.
# NULL: from 0 on, or all. name: of x, for errors.
cdef int place_int8(str name, cnp.ndarray x, cnp.ndarray center, cnp.ndarray to, cnp.ndarray scales,
                    const int64_t *first, const int64_t *count, const int64_t *at) except -1
