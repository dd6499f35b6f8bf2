# What all functions `f_vjp` share: the gradient that comes in, the names asked for, and where results go.
cimport numpy as cnp


# The gradients that a call is to give, in the order of `wrt`.
cdef class Wanted:
    cdef readonly tuple names
    cdef list arrays           # what each is the gradient of, as an array
    cdef list targets          # where it goes
    cdef bint one              # wrt was a single name

    cpdef object target(self, str name)
    cpdef object result(self)


cdef object gradient_dtype(cnp.ndarray a)
cpdef tuple read_names(object wrt, dict given)
cpdef cnp.ndarray read_gradient(object x, tuple shape, str name=*)
cpdef Wanted read_wanted(object wrt, dict given, object out, object real, dict others=*)
cpdef object store(object target, object gradient)
