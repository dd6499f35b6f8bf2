from fastattn._call cimport Problem


cdef Problem read_additive(
    object query, object key, object value, object w_score, object w_query, object w_key, object b_hidden,
    object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads,
)
cdef Problem read_bilinear(
    object query, object key, object value, object w_query, object w_key, object b_query, object b_key,
    object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads,
)
