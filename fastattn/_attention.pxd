from fastattn._call cimport Problem

cdef object attend(Problem p, bint decode=*)
