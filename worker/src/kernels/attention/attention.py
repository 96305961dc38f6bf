"""Causal attention of documents laid end to end, forward and backward, for GPUs of Hopper: what `scripts/attention-kernels` compiles.

Flash attention (Dao, arXiv:2307.08691): no matrix of scores is ever in memory. The backward has a kernel for the gradient of queries
and one for those of keys and values, each of which makes the scores anew: seven products instead of five, and no sum that several
blocks add to, so that the bits follow from the inputs.

n tokens, H heads of D elements. Rows of queries, keys, values, the output and gradients are [H, D], `stride` elements apart; LSE, the
logarithms to base 2 of the sums of exponents, and DELTA, of the output times its gradient, are [H, n], fp32. STARTS and ENDS, [n],
int32: where the document of each token begins, and the one after it. `scale` is 1/sqrt(D) by log2(e), `factor` 1/sqrt(D).

A block walks over the tokens that it attends to in three runs: blocks that a document begins in, whole ones, which need no mask, and
those on the diagonal or at the end.
"""

import triton
import triton.language as tl


@triton.jit
def _scores(acc, m, l, q, K, V, rows, starts, first, until, n, stride_k, stride_v, scale, D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TAIL: tl.constexpr):
    cols = tl.arange(0, BN)
    dims = tl.arange(0, D)
    first = tl.multiple_of(first, BN)
    for at in tl.range(first, until, BN):
        at = tl.multiple_of(at, BN)
        kv = at + cols
        if TAIL:
            k = tl.load(K + kv[None, :] * stride_k + dims[:, None], mask=kv[None, :] < n, other=0.0)
        else:
            k = tl.load(K + kv[None, :] * stride_k + dims[:, None])
        s = tl.dot(q, k)
        if MASKED:
            s = tl.where((kv[None, :] <= rows[:, None]) & (kv[None, :] >= starts[:, None]), s * scale, float("-inf"))
            now = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - now[:, None])
        else:
            now = tl.maximum(m, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - now[:, None])
        alpha = tl.exp2(m - now)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if TAIL:
            v = tl.load(V + kv[:, None] * stride_v + dims[None, :], mask=kv[:, None] < n, other=0.0)
        else:
            v = tl.load(V + kv[:, None] * stride_v + dims[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = now
    return acc, m, l


@triton.jit
def attention_forward(O, LSE, Q, K, V, STARTS, n, stride_q, stride_k, stride_v, stride_o, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    m0 = block * BM
    rows = m0 + tl.arange(0, BM)
    dims = tl.arange(0, D)
    here = rows < n
    starts = tl.load(STARTS + rows, mask=here, other=0)
    q = tl.load(Q + head * D + rows.to(tl.int64)[:, None] * stride_q + dims[None, :], mask=here[:, None], other=0.0)
    K += head * D
    V += head * D
    acc = tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    low = tl.load(STARTS + m0) // BN * BN
    diagonal = m0 // BN * BN
    whole = tl.minimum((tl.max(starts, 0) + BN - 1) // BN * BN, diagonal)
    whole = tl.maximum(whole, low)
    acc, m, l = _scores(acc, m, l, q, K, V, rows, starts, low, whole, n, stride_k, stride_v, scale, D, BN, True, False)
    acc, m, l = _scores(acc, m, l, q, K, V, rows, starts, whole, diagonal, n, stride_k, stride_v, scale, D, BN, False, False)
    acc, m, l = _scores(acc, m, l, q, K, V, rows, starts, tl.maximum(diagonal, low), tl.minimum(m0 + BM, n), n, stride_k, stride_v, scale, D, BN, True, True)
    tl.store(LSE + head.to(tl.int64) * n + rows, m + tl.log2(l), mask=here)
    tl.store(O + head * D + rows.to(tl.int64)[:, None] * stride_o + dims[None, :], (acc / l[:, None]).to(O.dtype.element_ty), mask=here[:, None])


@triton.jit
def attention_delta(DELTA, O, DO, n, stride_o, stride_do, D: tl.constexpr, BM: tl.constexpr):
    head = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    here = rows < n
    far = rows.to(tl.int64)[:, None]
    o = tl.load(O + head * D + far * stride_o + dims[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    do = tl.load(DO + head * D + far * stride_do + dims[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    tl.store(DELTA + head.to(tl.int64) * n + rows, tl.sum(o * do, 1), mask=here)


@triton.jit
def _of_queries(dq, q, do, lse, delta, K, V, rows, starts, first, until, n, stride_k, stride_v, scale, D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TAIL: tl.constexpr):
    cols = tl.arange(0, BN)
    dims = tl.arange(0, D)
    first = tl.multiple_of(first, BN)
    for at in tl.range(first, until, BN):
        at = tl.multiple_of(at, BN)
        kv = at + cols
        if TAIL:
            k = tl.load(K + kv[None, :] * stride_k + dims[:, None], mask=kv[None, :] < n, other=0.0)
            v = tl.load(V + kv[None, :] * stride_v + dims[:, None], mask=kv[None, :] < n, other=0.0)
        else:
            k = tl.load(K + kv[None, :] * stride_k + dims[:, None])
            v = tl.load(V + kv[None, :] * stride_v + dims[:, None])
        p = tl.exp2(tl.dot(q, k) * scale - lse[:, None])
        if MASKED:
            p = tl.where((kv[None, :] <= rows[:, None]) & (kv[None, :] >= starts[:, None]), p, 0.0)
        ds = p * (tl.dot(do, v) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq)
    return dq


@triton.jit
def attention_of_queries(DQ, DO, Q, K, V, LSE, DELTA, STARTS, n, stride_dq, stride_do, stride_q, stride_k, stride_v, scale, factor, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    m0 = block * BM
    rows = m0 + tl.arange(0, BM)
    dims = tl.arange(0, D)
    here = rows < n
    far = rows.to(tl.int64)[:, None]
    starts = tl.load(STARTS + rows, mask=here, other=0)
    q = tl.load(Q + head * D + far * stride_q + dims[None, :], mask=here[:, None], other=0.0)
    do = tl.load(DO + head * D + far * stride_do + dims[None, :], mask=here[:, None], other=0.0)
    lse = tl.load(LSE + head.to(tl.int64) * n + rows, mask=here, other=0.0)
    delta = tl.load(DELTA + head.to(tl.int64) * n + rows, mask=here, other=0.0)
    K += head * D
    V += head * D
    dq = tl.zeros([BM, D], tl.float32)
    low = tl.load(STARTS + m0) // BN * BN
    diagonal = m0 // BN * BN
    whole = tl.maximum(tl.minimum((tl.max(starts, 0) + BN - 1) // BN * BN, diagonal), low)
    dq = _of_queries(dq, q, do, lse, delta, K, V, rows, starts, low, whole, n, stride_k, stride_v, scale, D, BN, True, False)
    dq = _of_queries(dq, q, do, lse, delta, K, V, rows, starts, whole, diagonal, n, stride_k, stride_v, scale, D, BN, False, False)
    dq = _of_queries(dq, q, do, lse, delta, K, V, rows, starts, tl.maximum(diagonal, low), tl.minimum(m0 + BM, n), n, stride_k, stride_v, scale, D, BN, True, True)
    tl.store(DQ + head * D + far * stride_dq + dims[None, :], (dq * factor).to(DQ.dtype.element_ty), mask=here[:, None])


@triton.jit
def _of_keys(dk, dv, k, v, Q, DO, LSE, DELTA, kv, ends, first, until, n, stride_q, stride_do, scale, D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr):
    cols = tl.arange(0, BM)
    dims = tl.arange(0, D)
    first = tl.multiple_of(first, BM)
    for at in tl.range(first, until, BM):
        at = tl.multiple_of(at, BM)
        rows = at + cols
        if MASKED:
            q = tl.load(Q + rows[None, :] * stride_q + dims[:, None], mask=rows[None, :] < n, other=0.0)
            lse = tl.load(LSE + rows, mask=rows < n, other=0.0)
            delta = tl.load(DELTA + rows, mask=rows < n, other=0.0)
            do = tl.load(DO + rows[:, None] * stride_do + dims[None, :], mask=rows[:, None] < n, other=0.0)
        else:
            q = tl.load(Q + rows[None, :] * stride_q + dims[:, None])
            lse = tl.load(LSE + rows)
            delta = tl.load(DELTA + rows)
            do = tl.load(DO + rows[:, None] * stride_do + dims[None, :])
        p = tl.exp2(tl.dot(k, q) * scale - lse[None, :])
        if MASKED:
            p = tl.where((rows[None, :] >= kv[:, None]) & (rows[None, :] < ends[:, None]), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), tl.trans(q), dk)
    return dk, dv


@triton.jit
def attention_of_keys(DK, DV, DO, Q, K, V, LSE, DELTA, ENDS, n, stride_dk, stride_dv, stride_do, stride_q, stride_k, stride_v, scale, factor, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    n0 = tl.program_id(0) * BN
    head = tl.program_id(1)
    kv = n0 + tl.arange(0, BN)
    dims = tl.arange(0, D)
    here = kv < n
    far = kv.to(tl.int64)[:, None]
    ends = tl.load(ENDS + kv, mask=here, other=0)
    k = tl.load(K + head * D + far * stride_k + dims[None, :], mask=here[:, None], other=0.0)
    v = tl.load(V + head * D + far * stride_v + dims[None, :], mask=here[:, None], other=0.0)
    Q += head * D
    DO += head * D
    LSE += head.to(tl.int64) * n
    DELTA += head.to(tl.int64) * n
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    last = tl.max(ends, 0)
    below = tl.minimum((n0 + BN + BM - 1) // BM * BM, (last + BM - 1) // BM * BM)
    whole = tl.maximum(tl.load(ENDS + n0) // BM * BM, below)
    dk, dv = _of_keys(dk, dv, k, v, Q, DO, LSE, DELTA, kv, ends, n0 // BM * BM, below, n, stride_q, stride_do, scale, D, BM, True)
    dk, dv = _of_keys(dk, dv, k, v, Q, DO, LSE, DELTA, kv, ends, below, whole, n, stride_q, stride_do, scale, D, BM, False)
    dk, dv = _of_keys(dk, dv, k, v, Q, DO, LSE, DELTA, kv, ends, whole, last, n, stride_q, stride_do, scale, D, BM, True)
    tl.store(DK + head * D + far * stride_dk + dims[None, :], (dk * factor).to(DK.dtype.element_ty), mask=here[:, None])
    tl.store(DV + head * D + far * stride_dv + dims[None, :], dv.to(DV.dtype.element_ty), mask=here[:, None])
