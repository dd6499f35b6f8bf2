/* What a layer does to each number of a product. Limits at infinity are exact, NaN stays NaN. */

/* Results that would be denormal, or nearly, are 0: processors take a hundred cycles for each. */

/* y / (1 + e^-x). */
static ALWAYS_INLINE vec times_sigmoid(vec y, vec x)
{
    const real most = BITS == 32 ? 80 : 700;
    const vec e = v_exp_below(-v_min(v_fill(most), v_abs(x)), 0);
    const vec share = v_pick(x < (vec){0}, v_pick(x < v_fill(-most), (vec){0}, e), v_fill(1));
    return y * share * v_reciprocal(1 + e);
}

/* -inf times 0 would be NaN. */
static ALWAYS_INLINE vec above_least(vec x) { return v_max(v_fill(BITS == 32 ? -128 : -800), x); }

static ALWAYS_INLINE vec v_silu(vec x)
{
    const vec y = above_least(x);
    return times_sigmoid(y, y);
}

/* x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: 1 + tanh(u) is twice the sigmoid of 2 u. */
static ALWAYS_INLINE vec v_gelu_tanh(vec x)
{
    const vec y = above_least(x),
              cubic = v_fma(y * y, v_fill((real)0.07135481627260025), v_fill((real)1.5957691216057308));
    return times_sigmoid(y, y * cubic);
}

/* x times the standard normal distribution at x, Phi(x) = 1 - Phi(-x), with a relative error of a few eps and the
 * conditioning of the tail. Phi(-t) e^(t^2 / 2) is smooth for t >= 0: a quotient of polynomials, whose relative error
 * is 6.3e-9 in float, 1.0e-18 in double. Beyond `most` the result would be denormal. */
static ALWAYS_INLINE vec v_gelu(vec x)
{
#if BITS == 32
    static const real p[] = {0.500000003203386904f, 0.43928619682292311f, 0.183971589286728091f, 0.0408820568895379348f,
                             0.00415338672178198028f};
    static const real q[] = {1,
                             1.67645740072031857f,
                             1.20555759896353301f,
                             0.471415219491504463f,
                             0.102482237513311537f,
                             0.0104108848885869766f};
    const real most = (real)13.1;
#else
    static const real p[] = {0.5,
                             0.8286133719501805,
                             0.6806842329663131,
                             0.3581749856986769,
                             0.13245339514730808,
                             0.035806352243196476,
                             0.007156648519158513,
                             0.0010456142929097243,
                             0.00010728738130344238,
                             7.030931097338046e-06,
                             2.2626097892625974e-07};
    static const real q[] = {1.0,
                             2.4551113047032267,
                             2.8202638710079015,
                             2.0050008393808105,
                             0.9824992039535773,
                             0.34941828829069294,
                             0.09233893371241166,
                             0.0182068528003351,
                             0.002638590281842573,
                             0.0002694967356506177,
                             1.762393068559721e-05,
                             5.671521672221357e-07};
    const real most = 37.5;
#endif
    const int np = sizeof p / sizeof p[0], nq = sizeof q / sizeof q[0];
    const vec size = v_abs(x), t = v_min(v_fill(most), size);
    const vec e = v_exp_below(t * t * v_fill((real)-0.5), 0);
    vec top = v_fill(p[np - 1]), bottom = v_fill(q[nq - 1]);
    UNROLL(16)
    for (int i = np - 2; i >= 0; i--)
        top = v_fma(top, t, v_fill(p[i]));
    UNROLL(16)
    for (int i = nq - 2; i >= 0; i--)
        bottom = v_fma(bottom, t, v_fill(q[i]));
    const vec tail = v_pick(size > v_fill(most), (vec){0}, t * e);
    return v_max((vec){0}, x) - tail * (top * v_reciprocal(bottom));
}
