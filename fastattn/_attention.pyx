"""A call of attention from Python: read (_call.pyx), carried out by the driver (kernels/drive.c), its result."""
from fastattn._call cimport Problem, read_dot_product, read_varlen
from fastattn._rules cimport rules_of
from fastattn._runtime cimport carry_out, kernels_for


cdef object attend(Problem p, bint decode=True):
    """Carries the call out. decode=False: few queries take the same loops as many, so that their bits are the same."""
    carry_out(p.call, decode, p.num_threads)
    return p.result()


def dot_product_attention(query, key, value, dict some, bint decode=True, keys_before=None, own=None, quantized=None,
                          queries=None):
    """For layers: some, a dict of rules. decode: as `attend` has it. keys_before: how many keys were before the first
    one and are gone, an integer of at least 0 or an array as for lengths: chunks count from the first that ever was.
    own: the array for the output, which is right and which nobody else has. quantized: of int8 keys and values, their
    key_scale, value_scale and key_center. queries: for some rows of a larger call, how many queries that has: they take
    the loops, and get the bits, that they would have there."""
    cdef tuple scales = None if quantized is None else tuple(quantized)
    cdef Problem p = read_dot_product(query, key, value, rules_of(some), keys_before, own, scales)
    if queries is not None:
        decode = decode and queries <= kernels_for(p.call.problem.dtype).tuning.decode_queries
    return attend(p, decode)


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, dict some, own=None):
    """The same for packed sequences; of the rules, not those that have rows or columns."""
    return attend(read_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, rules_of(some), own))
