"""The terms of divergence_rows for single ids and buckets, and scalar functions that avoid cancellation.

With d = log p - log q from differences of logits, the larger of p and q is exp of its logarithm and the smaller follows
from exp(-|d|) - 1. So q - p and every term of D keep their relative accuracy when the two are close, and every term
is >= 0.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(-1e30)  # logits are clamped here: stands for -inf without the NaN of inf - inf
LOG_FLOOR = tl.constexpr(-100.0)  # log p is clamped here in reverse KL
FORWARD, REVERSE, JS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# ---- scalar functions, written by hand to avoid cancellation ----


@triton.jit
def exp_change(x):
    """For x <= 0: exp(x), exp(x) - 1 and exp(x) - 1 - x >= 0, each accurate to about its own last place."""
    bounded = tl.where(x < -87.0, -87.0, x)
    shifted = bounded * 1.44269504 + 12582912.0  # the integer n next to x / ln 2, in the low bits
    n = shifted - 12582912.0
    r = bounded - n * 0.693359375 + n * 2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    square = p * (r * r)
    small = r + square
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    far = tl.where(x < -87.0, 0.0, (small + 1.0) * power)
    near = n == 0.0
    return tl.where(near, small + 1.0, far), tl.where(near, small, far - 1.0), tl.where(near, square, far - 1.0 - x)


@triton.jit
def _log1p(w, y):
    """For w > -1 and y = 1 + w (perhaps more accurate than the sum): log(1 + w), and w - log(1 + w) >= 0."""
    bits = y.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # 1 + w = 2^k f with f in [sqrt(1/2), sqrt(2))
    near = k == 0
    u = tl.where(near, w, (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0)
    s = u / (u + 2.0)  # log(1 + u) = 2 s + 2 s^3 (1/3 + s^2/5 + ...)
    s2 = s * s
    p = 0.181818182 * s2 + 0.222222222
    p = p * s2 + 0.285714286
    p = p * s2 + 0.4
    p = (p * s2 + 0.666666667) * s2
    log = p * s + (s + s) + k.to(tl.float32) * 0.693147181
    return log, tl.where(near, s * (w - p), w - log)


@triton.jit
def tanh(x):
    _, t, _ = exp_change(-2.0 * tl.abs(x))
    value = -t / (t + 2.0)
    return tl.where(x < 0.0, -value, value)


@triton.jit
def at_least_none(z):
    return tl.where(z < NONE, NONE, z)  # a comparison with NaN keeps it; tl.maximum would not


# ---- buckets of a top-k teacher, and its tail ----


@triton.jit
def bucket(log_p, log_q, beta, KIND: tl.constexpr):
    """For buckets in fp64: their terms of D, their q, and q - p for forward KL, else log q/p or log q/m."""
    q = tl.exp(log_q)
    if KIND == REVERSE:
        log_p = tl.where((q > 0) & (log_p < LOG_FLOOR), LOG_FLOOR, log_p)
    p = tl.exp(log_p)
    if KIND == FORWARD:
        return tl.where(p > 0, p * (log_p - log_q), 0.0) - p + q, q, q - p
    if KIND == REVERSE:
        return tl.where(q > 0, q * (log_q - log_p), 0.0) - q + p, q, tl.where(q > 0, log_q - log_p, 0.0)
    m = beta * p + (1 - beta) * q
    log_m = tl.log(m)
    of_p = tl.where(p > 0, p * (log_p - log_m), 0.0) - p + m
    of_q = tl.where(q > 0, q * (log_q - log_m), 0.0) - q + m
    return beta * of_p + (1 - beta) * of_q, q, tl.where(q > 0, log_q - log_m, 0.0)


@triton.jit
def teacher_buckets(log_p, used, has_tail, tail_tau, tail_one, inv_tau):
    """log p of the support and of the tail at the row's temperature, fp64; the tail has the student's shape."""
    log_p = tl.where(used, log_p.to(tl.float64), float("-inf"))
    total = tl.sum(tl.exp(log_p), 0)
    excess = tl.where(total > 1, tl.log(total), 0.0)  # a total above 1 by rounding is scaled back to 1
    tail = tl.log(1 - tl.where(total > 1, 1.0, total)) * inv_tau + tl.log(tail_tau) - tl.log(tail_one) * inv_tau
    tail = tl.where(has_tail, tail, float("-inf"))
    log_p = (log_p - excess) * inv_tau
    top = tl.maximum(tl.max(log_p, 0), tail)
    normaliser = top + tl.log(tl.sum(tl.exp(log_p - top), 0) + tl.exp(tail - top))
    return log_p - normaliser, tail - normaliser


# ---- ids of a dense teacher ----


@triton.jit
def _lesser_term(gap, all, change, rest):
    """(b log(b/a) - b + a) / a for b = a exp(-gap) < a."""
    near = -rest - gap * change
    far = 1.0 - (tl.where(gap > 100.0, 100.0, gap) + 1.0) * all
    return tl.where(gap < 0.34, near, far)


@triton.jit
def _js_term(p_leads, e, gap, all, change, beta):
    """The term of D, and log q/m. Of p and q, the larger is e and the smaller e * all."""
    # m = e (1 + u change), u the weight of the smaller one; m / (the smaller one) = 1 - (1 - u) change / all.
    u = tl.where(p_leads, 1.0 - beta, beta)
    rest_of_u = tl.where(p_leads, beta, 1.0 - beta)
    larger_log, larger_rest = _log1p(u * change, u * all + rest_of_u)
    is_far = gap > 40.0  # the growth may overflow, and the smaller one is negligible beside m
    growth = tl.where(is_far, 0.0, -rest_of_u * change / all)
    smaller_log, smaller_rest = _log1p(growth, growth + 1.0)
    lesser = tl.where(is_far, rest_of_u, all * smaller_rest)
    smaller_log = tl.where(is_far, larger_log + gap, smaller_log)
    return e * (rest_of_u * larger_rest + u * lesser), tl.where(p_leads, -smaller_log, -larger_log)


@triton.jit
def dense_term(z, t, z_max, z_log, t_max, t_log, shift, inv_tau, beta, KIND: tl.constexpr):
    """For a block of ids: its terms of D, its q, and q - p for forward KL, else log q/p or log q/m."""
    log_q = (z - z_max) * inv_tau - z_log
    log_p = (t - t_max) * inv_tau - t_log
    # Equal differences must cancel before the product, which the compiler may fuse, unrounded, into a subtraction.
    d = ((t - z) - (t_max - z_max)) * inv_tau - shift
    if KIND == REVERSE:
        low = log_p < LOG_FLOOR
        log_p = tl.where(low, LOG_FLOOR, log_p)
        d = tl.where(low, log_p - log_q, d)
    gap, p_leads = tl.abs(d), d >= 0.0
    log_e = tl.where(p_leads, log_p, log_q)
    e = tl.exp(tl.where(log_e > 0.0, 0.0, log_e))
    all, change, rest = exp_change(-gap)
    q = tl.where(p_leads, e * all, e)
    if KIND == FORWARD:
        term = e * tl.where(p_leads, rest, _lesser_term(gap, all, change, rest))
        return term, q, e * tl.where(p_leads, change, -change)
    if KIND == REVERSE:
        term = e * tl.where(p_leads, _lesser_term(gap, all, change, rest), rest)
        return term, q, -d
    term, score = _js_term(p_leads, e, gap, all, change, beta)
    return term, q, score
