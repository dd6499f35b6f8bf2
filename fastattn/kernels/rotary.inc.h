/* Rotary encoding: pairs of channels turn by angles in proportion to the position.
 *
 * The table of a position is its cosines, one a pair, and then its sines. Angles are taken in double, so that those of
 * far positions keep their fraction of a turn; a pair's bits depend on itself and its angle only. */

/* Contract: fastattn.h. */
static void NAME(turns)(void *table, const double *speed, int64_t pairs, int64_t position)
{
    real *cosine = table, *sine = cosine + pairs;
    for (int64_t c = 0; c < pairs; c++) {
        const double angle = (double)position * speed[c];
        cosine[c] = (real)cos(angle);
        sine[c] = (real)sin(angle);
    }
}

/* Pairs (a, b) become (a cos - b sin, b cos + a sin): lane i of the two vectors or, interleaved, neighbouring lanes. */
static ALWAYS_INLINE void NAME(turn)(vec *a, vec *b, vec cosine, vec sine, const int interleaved)
{
    const vec u = *a, v = *b;
    if (interleaved) {
        *a = NAME(fma)(u, INTERLEAVE_LOW(LANES, cosine, cosine),
                       SWAP_LANES(LANES, 1, u) * INTERLEAVE_LOW(LANES, -sine, sine));
        *b = NAME(fma)(v, INTERLEAVE_HIGH(LANES, cosine, cosine),
                       SWAP_LANES(LANES, 1, v) * INTERLEAVE_HIGH(LANES, -sine, sine));
    } else {
        *a = NAME(fma)(u, cosine, v * -sine);
        *b = NAME(fma)(v, cosine, u * sine);
    }
}

static ALWAYS_INLINE void NAME(rotate_row)(real *out, const real *x, const real *cosine, int64_t pairs,
                                           const int interleaved)
{
    const real *sine = cosine + pairs;
    const int64_t whole = pairs / LANES * LANES, step = interleaved ? 2 : 1, other = interleaved ? LANES : pairs;
    for (int64_t c = 0; c < whole; c += LANES) {
        vec a = NAME(load)(x + step * c), b = NAME(load)(x + step * c + other);
        NAME(turn)(&a, &b, NAME(load)(cosine + c), NAME(load)(sine + c), interleaved);
        NAME(store)(out + step * c, a);
        NAME(store)(out + step * c + other, b);
    }
    const int rest = (int)(pairs - whole);
    if (rest) {
        const int in_a = !interleaved ? rest : 2 * rest < LANES ? 2 * rest : LANES;
        const int in_b = interleaved ? 2 * rest - in_a : rest;
        const real *x_b = in_b ? x + step * whole + other : x; /* no address past the row */
        vec a = NAME(load_some)(x + step * whole, in_a), b = NAME(load_some)(x_b, in_b);
        NAME(turn)(&a, &b, NAME(load_some)(cosine + whole, rest), NAME(load_some)(sine + whole, rest), interleaved);
        NAME(store_row)(out + step * whole, 0, in_a, a);
        if (in_b)
            NAME(store_row)(out + step * whole + other, 0, in_b, b);
    }
}

/* Contract: fastattn.h. */
static void NAME(rotate)(char *out, ptrdiff_t out_row, const char *x, ptrdiff_t x_row, const char *table,
                         int64_t channels, int64_t pairs, int64_t rows, int interleaved)
{
    const size_t copied = (size_t)(channels - 2 * pairs) * sizeof(real);
    for (int64_t i = 0; i < rows; i++) {
        const real *x_i = (const real *)(x + i * x_row);
        const real *table_i = (const real *)table + i * 2 * pairs;
        real *out_i = (real *)(out + i * out_row);
        if (interleaved)
            NAME(rotate_row)(out_i, x_i, table_i, pairs, 1);
        else
            NAME(rotate_row)(out_i, x_i, table_i, pairs, 0);
        if (copied && out_i != x_i)
            memcpy(out_i + 2 * pairs, x_i + 2 * pairs, copied);
    }
}
