"""Two operations where reinforcement learning of a language model spends its memory: from hidden state to token
log-probability, and the LoRA matmul. Each stands below a reference in plain torch, which is its meaning and its test.

    token_logprobs         log p(token) and H(p), from logits x that are read once
    linear_token_logprobs  the same and KL(p ‖ q) from hidden states h, x = h Uᵀ + b never held as a whole
    lora_linear            x Wᵀ + b + s (x Aᵀ) Bᵀ, x read once

    N tokens (all leading axes, flattened)     x, y   logits of policy and reference, divided by the temperature T
    V vocabulary                               p, q   their softmax; lse(x) = log Σ exp x, so log p = x - lse(x)
    D width of the hidden states               H, KL  -Σ p log p and Σ p log(p/q), sums over the vocabulary
    K, M, R inputs, outputs, rank of LoRA      g_l, g_H, g_KL  incoming gradients of log p(token), H, KL

               8,192 tokens, V = 50,257, D = 1,024, bf16:     forward              backward           beside the inputs
    token_logprobs         bound by bandwidth                 reads 0.8 GB         moves 1.6 GB       0.8 GB, the result
    linear_token_logprobs  bound by matmul                    0.84 TFLOP           1.7 TFLOP          8 MB, one chunk

Plain torch holds x, log p, p, p log p and their gradients, N·V numbers each. A chunk of rows bounds all of them here.
CUDA tensors take the Triton kernels, all others the torch path, which is as correct and as frugal (`path_taken`).
Left out: a gradient to W (LoRA freezes it) and to the reference, float8, second derivatives.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS and Windows have no Triton
    triton = constexpr = None

IGNORE = -100  # the id of a masked token, torch's own convention
MAX_RANK = 32  # the tile of x Aᵀ stays in registers, without spills, up to this rank
CHUNK_NUMBERS = {"torch": 128 * 50257, "triton": 80 * 50257}  # N·V numbers of one chunk: 26 MB, and 8 MB in bf16


# Choosing a path

_interpreted = False  # set by `interpreted` alone


def path_taken(tensor: Tensor) -> str:
    """ "triton" or "torch": the one place that decides which path an operation on this tensor takes.

    >>> path_taken(torch.zeros(1))
    'torch'
    """
    supported = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return "triton" if triton and supported and (tensor.is_cuda or _interpreted) else "torch"


@contextlib.contextmanager
def interpreted():
    """Sends CPU tensors to the Triton kernels too. TRITON_INTERPRET=1 must be set before this file is imported."""
    global _interpreted
    if triton is None or os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("interpreted: needs Triton, and TRITON_INTERPRET=1 before kernels.py is imported")
    _interpreted = True
    try:
        yield
    finally:
        _interpreted = False


def kernel(function):
    """`triton.jit` where there is Triton; elsewhere the source stands as documentation."""
    return triton.jit(function) if triton else function


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # float64 stays, for gradcheck


# Checking arguments: one line that names the argument, what it was and what was expected


def _check(argument: str, tensor: Tensor, shape: tuple, like: Tensor, dtype: bool = True) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{argument}: dtype {tensor.dtype}, expected a floating dtype")
    if dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{argument}: dtype {tensor.dtype}, expected {like.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{argument}: on {tensor.device}, expected {like.device}")
    if tensor.shape != shape:
        raise ValueError(f"{argument}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _check_tokens(tokens: Tensor, shape: tuple, V: int, temperature: float, like: Tensor) -> None:
    """An id outside of the vocabulary is an error on CPU; on CUDA, where looking would stall, its log p is NaN."""
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens: dtype {tokens.dtype}, expected an integer dtype")
    if tokens.device != like.device:
        raise ValueError(f"tokens: on {tokens.device}, expected {like.device}")
    if tokens.shape != shape:
        raise ValueError(f"tokens: shape {tuple(tokens.shape)}, expected {tuple(shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}, expected a positive number")
    if tokens.device.type == "cpu":
        wrong = tokens[((tokens < 0) & (tokens != IGNORE)) | (tokens >= V)]
        if wrong.numel():
            raise ValueError(f"tokens: id {wrong[0].item()}, expected 0 to {V - 1}, or {IGNORE} where masked")


# Token log-probability: the references


def token_logprobs_reference(
    logits: Float[Tensor, "... V"], tokens: Int[Tensor, "..."], temperature: float = 1.0
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """log p(token) and the entropy of p = softmax(logits / temperature), in float32 at least; 0 where masked.

    >>> [f"{x.item():.4f}" for x in token_logprobs_reference(torch.zeros(4), torch.tensor(2))]  # -log 4, log 4
    ['-1.3863', '1.3863']
    """
    log_p = (logits.to(_statistics_dtype(logits.dtype)) / temperature).log_softmax(-1)
    p, kept = log_p.exp(), tokens != IGNORE
    logprobs = log_p.gather(-1, tokens.clamp(min=0).long()[..., None]).squeeze(-1)
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)  # p log p → 0
    return logprobs.masked_fill(~kept, 0), entropy.masked_fill(~kept, 0)


def linear_token_logprobs_reference(
    hidden: Float[Tensor, "... D"],
    unembed: Float[Tensor, "V D"],
    tokens: Int[Tensor, "..."],
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    ref_hidden: Float[Tensor, "... D_ref"] | None = None,
    ref_unembed: Float[Tensor, "V D_ref"] | None = None,
    ref_bias: Float[Tensor, "V"] | None = None,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."] | None]:
    """`token_logprobs` of hidden Uᵀ + b and, with `ref_hidden`, the exact KL to the reference (no gradient into it)."""
    logits = torch.nn.functional.linear(hidden, unembed, bias)
    logprobs, entropy = token_logprobs_reference(logits, tokens, temperature)
    if ref_hidden is None:
        return logprobs, entropy, None
    head = (unembed, bias) if ref_unembed is None else (ref_unembed, ref_bias)
    with torch.no_grad():
        ref_logits = torch.nn.functional.linear(ref_hidden, *head)
        log_q = (ref_logits.to(logprobs.dtype) / temperature).log_softmax(-1)
    log_p = (logits.to(logprobs.dtype) / temperature).log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)
    return logprobs, entropy, kl.masked_fill(tokens == IGNORE, 0)


# Token log-probability: the kernels, one row of logits a program


@kernel
def token_logprobs_forward_kernel(
    x_ptr,  # [N, V] policy logits
    y_ptr,  # [N, V] reference logits; read only with HAS_REF
    tokens_ptr,  # [N]
    rows_ptr,  # [7, N] float32 out: log p(token), H, KL, max x, log Σ exp(x - max x), and these two of y
    N,
    V,
    stride_xn,
    stride_yn,
    inv_temperature,
    HAS_REF: constexpr,
    BLOCK_V: constexpr,
):
    """Computes log p(token), H and KL of one row by an online log-sum-exp.
    Program: one row, BLOCK_V logits a step. Bytes: V·itemsize read (twice that with HAS_REF), 28 written.
    FLOPs: one exp and about 6 more a logit. Bound by bandwidth.

    With m the maximum so far, x̃ = x - m and ỹ = y - m_q, each lane adds up its own
        s = Σ exp x̃,   t = Σ exp(x̃) x̃,   u = Σ exp(x̃) (x̃ - ỹ),   s_q = Σ exp ỹ
    and when the maximum grows by δ (of y: δ_q), every x̃ falls by δ:
        s ← s e^-δ,   t ← (t - δ s) e^-δ,   u ← (u - (δ - δ_q) s) e^-δ,   s_q ← s_q e^-δ_q.
    Then log p = x̃ - log s, H = log s - t/s, KL = u/s - log s + log s_q: no difference of large numbers.
    """
    row = tl.program_id(0).to(tl.int64)  # at V = 50,257 offsets pass 2³¹ in row 42,730
    lanes = tl.arange(0, BLOCK_V)
    m, m_q = -float("inf"), -float("inf")
    s, t = tl.zeros((BLOCK_V,), tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    s_q, u = tl.zeros((BLOCK_V,), tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        # other=-inf: a lane past the end is an impossible token
        x = tl.load(x_ptr + row * stride_xn + cols, mask=cols < V, other=-float("inf")).to(tl.float32) * inv_temperature
        m_new = tl.maximum(m, tl.max(x))
        delta = tl.where(m == -float("inf"), 0.0, m_new - m)  # nothing to rescale before the first finite logit
        x = x - tl.where(m_new == -float("inf"), 0.0, m_new)
        shrink, e = tl.exp(-delta), tl.exp(x)
        if HAS_REF:
            y = tl.load(y_ptr + row * stride_yn + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            y = y * inv_temperature
            m_q_new = tl.maximum(m_q, tl.max(y))
            delta_q = tl.where(m_q == -float("inf"), 0.0, m_q_new - m_q)
            y = y - tl.where(m_q_new == -float("inf"), 0.0, m_q_new)
            s_q = s_q * tl.exp(-delta_q) + tl.exp(y)
            u = (u - (delta - delta_q) * s) * shrink + tl.where(e > 0, e * (x - y), 0.0)  # p = 0: 0, even at q = 0
            m_q = m_q_new
        t = (t - delta * s) * shrink + tl.where(e > 0, e * x, 0.0)
        s = s * shrink + e
        m = m_new
    total = tl.sum(s)
    log_s = tl.log(total)

    token = tl.load(tokens_ptr + row)
    kept = token != -100
    in_vocabulary = (token >= 0) & (token < V)
    x_token = tl.load(x_ptr + row * stride_xn + token, mask=in_vocabulary, other=float("nan")).to(tl.float32)
    tl.store(rows_ptr + row, tl.where(kept, x_token * inv_temperature - m - log_s, 0.0))
    tl.store(rows_ptr + N + row, tl.where(kept, log_s - tl.sum(t) / total, 0.0))
    tl.store(rows_ptr + 3 * N + row, m)
    tl.store(rows_ptr + 4 * N + row, log_s)
    if HAS_REF:
        log_s_q = tl.log(tl.sum(s_q))
        tl.store(rows_ptr + 2 * N + row, tl.where(kept, tl.sum(u) / total - log_s + log_s_q, 0.0))
        tl.store(rows_ptr + 5 * N + row, m_q)
        tl.store(rows_ptr + 6 * N + row, log_s_q)


@kernel
def token_logprobs_backward_kernel(
    x_ptr,  # [N, V] policy logits
    y_ptr,  # [N, V] reference logits; read only with HAS_REF
    tokens_ptr,  # [N]
    rows_ptr,  # [7, N] float32, written by the forward kernel
    coefficients_ptr,  # [4, N] float32: g_l, a, g_H, g_KL
    dx_ptr,  # [N, V] out; may be x itself
    N,
    V,
    stride_xn,
    stride_yn,
    stride_dn,
    inv_temperature,
    HAS_REF: constexpr,
    BLOCK_V: constexpr,
):
    """Computes dx = (g_l onehot(token) + p (a - g_H log p + g_KL log(p/q))) / T, see `_coefficients`.
    Program: one row, BLOCK_V logits a step. Bytes: 2 V·itemsize (3 with HAS_REF). Bound by bandwidth.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row)
    m, log_s = tl.load(rows_ptr + 3 * N + row), tl.load(rows_ptr + 4 * N + row)
    g_l, a = tl.load(coefficients_ptr + row), tl.load(coefficients_ptr + N + row)
    g_H, g_KL = tl.load(coefficients_ptr + 2 * N + row), tl.load(coefficients_ptr + 3 * N + row)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + row * stride_xn + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        log_p = x * inv_temperature - m - log_s
        p = tl.exp(log_p)
        slope = a - g_H * log_p
        if HAS_REF:
            y = tl.load(y_ptr + row * stride_yn + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            m_q, log_s_q = tl.load(rows_ptr + 5 * N + row), tl.load(rows_ptr + 6 * N + row)
            slope = slope + g_KL * (log_p - (y * inv_temperature - m_q - log_s_q))
        dx = tl.where(p > 0, p * slope, 0.0) + tl.where(cols == token, g_l, 0.0)  # p log p → 0
        tl.store(dx_ptr + row * stride_dn + cols, (dx * inv_temperature).to(dx_ptr.dtype.element_ty), mask=cols < V)


def _launch(V: int) -> dict:
    """The block and warps of the row kernels: 8 logits a thread are one 16-byte load of bf16, and spill no register."""
    block = min(2048, max(16, 1 << (V - 1).bit_length()))
    return {"BLOCK_V": block, "num_warps": max(1, block // 256)}


def _rows_triton(x: Tensor, y: Tensor | None, tokens: Tensor, inv_temperature: float) -> Float[Tensor, "7 N"]:
    N, V = x.shape
    rows = torch.zeros(7, N, device=x.device, dtype=torch.float32)
    other = x if y is None else y
    token_logprobs_forward_kernel[(N,)](
        x, other, tokens, rows, N, V, x.stride(0), other.stride(0), inv_temperature, HAS_REF=y is not None, **_launch(V)
    )
    return rows


def _dlogits_triton(x: Tensor, y: Tensor | None, tokens, rows, coefficients, inv_temperature: float, out: Tensor):
    N, V = x.shape
    other = x if y is None else y
    strides = x.stride(0), other.stride(0), out.stride(0)
    token_logprobs_backward_kernel[(N,)](
        x, other, tokens, rows, coefficients, out, N, V, *strides, inv_temperature, HAS_REF=y is not None, **_launch(V)
    )
    return out


# Token log-probability: the same rows in torch


def _distribution(x: Float[Tensor, "n V"], tokens: Int[Tensor, "n"], y: Float[Tensor, "n V"] | None = None):
    """p, p log p and p log(p/q) of a chunk [n, V], and its rows log p(token), H, KL; writes over y."""
    log_p = x.log_softmax(-1)
    p = log_p.exp()
    logprobs = log_p.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
    p_log_ratio = kl = None
    if y is not None:
        p_log_ratio = torch.sub(log_p, y.log_softmax(-1), out=y)
        kl = _times_p(p_log_ratio, p)
    entropy = -_times_p(log_p, p)
    rows = [None if row is None else row.masked_fill_(tokens == IGNORE, 0) for row in (logprobs, entropy, kl)]
    return (p, log_p, p_log_ratio), rows


def _times_p(logs: Float[Tensor, "n V"], p: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
    """Σ p·logs; leaves p·logs in `logs`. 0 · (-inf) shows as NaN in the sums and counts as 0: p log p → 0."""
    total = logs.mul_(p).sum(-1)
    return logs.masked_fill_(p == 0, 0).sum(-1) if total.isnan().any() else total


def _coefficients(g: tuple, rows: Float[Tensor, "rows N"], tokens: Int[Tensor, "N"]) -> Float[Tensor, "4 N"]:
    """g_l, a, g_H, g_KL with which dx = g_l onehot(token) + p (a - g_H log p + g_KL log(p/q)), before 1/T, because

    ∂ log p(token)/∂x = onehot(token) - p,   ∂H/∂x = -p (log p + H),   ∂KL/∂x = p (log(p/q) - KL)
    so a = -g_l - g_H H - g_KL KL. A masked token has all four 0; an output that nobody used (None) counts as 0.
    """
    zero = torch.zeros_like(rows[0])
    g_l, g_H, g_KL = (zero if one is None else one.to(zero.dtype) for one in g)
    a = -g_l - g_H * rows[1] - (zero if g[2] is None else g_KL * rows[2])
    return torch.stack([g_l, a, g_H, g_KL]).masked_fill_(tokens == IGNORE, 0)


def _dlogits_torch(chunk: tuple, coefficients: Float[Tensor, "4 n"], tokens: Int[Tensor, "n"], g: tuple) -> Tensor:
    """dx of `_coefficients`, written over the chunk's p; a gradient g that is None costs no pass."""
    p, p_log_p, p_log_ratio = chunk
    g_l, a, g_H, g_KL = coefficients.unsqueeze(-1)
    dx = p.mul_(a)
    if g[1] is not None:
        dx.addcmul_(p_log_p, g_H, value=-1)
    if g[2] is not None:
        dx.addcmul_(p_log_ratio, g_KL)
    return dx.scatter_add_(1, tokens.clamp(min=0)[:, None], g_l)


# Token log-probability from logits


def _chunks(N: int, V: int, path: str) -> list[slice]:
    step = max(1, CHUNK_NUMBERS[path] // V)
    return [slice(start, min(N, start + step)) for start in range(0, N, step)]


class _TokenLogprobs(torch.autograd.Function):
    """Saves logits and tokens, in memory anyway, and the row statistics; the softmax is rebuilt from them."""

    @staticmethod
    def forward(ctx, logits: Float[Tensor, "N V"], tokens: Int[Tensor, "N"], temperature: float):
        ctx.temperature, ctx.path = temperature, path_taken(logits)
        ctx.set_materialize_grads(False)
        if ctx.path == "triton":
            rows = _rows_triton(logits, None, tokens, 1 / temperature)
        else:
            rows = logits.new_empty(2, len(tokens), dtype=_statistics_dtype(logits.dtype))
            for part in _chunks(*logits.shape, ctx.path):
                x = logits[part].to(rows.dtype)
                (rows[0, part], rows[1, part], _) = _distribution(x / temperature, tokens[part])[1]
        ctx.save_for_backward(logits, tokens, rows)
        return rows[0].clone(), rows[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *g):
        logits, tokens, rows = ctx.saved_tensors
        g = (*g, None)  # there is no KL
        coefficients = _coefficients(g, rows, tokens)
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if ctx.path == "triton":
            return _dlogits_triton(logits, None, tokens, rows, coefficients, 1 / ctx.temperature, dlogits), None, None
        coefficients /= ctx.temperature
        for part in _chunks(*logits.shape, ctx.path):
            chunk, _ = _distribution(logits[part].to(rows.dtype) / ctx.temperature, tokens[part])
            dlogits[part] = _dlogits_torch(chunk, coefficients[:, part], tokens[part], g)
        return dlogits, None, None


def token_logprobs(
    logits: Float[Tensor, "... V"], tokens: Int[Tensor, "..."], temperature: float = 1.0
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """`token_logprobs_reference`, each logit read once and nothing of N·V numbers kept but the gradient itself.

    >>> token_logprobs(torch.zeros(2, 4), torch.tensor([2, -100]))[1]
    tensor([1.3863, 0.0000])
    """
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, expected [..., V]")
    _check("logits", logits, logits.shape, logits)
    V = logits.shape[-1]
    _check_tokens(tokens, logits.shape[:-1], V, temperature, logits)
    flat = logits.reshape(-1, V)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    logprobs, entropy = _TokenLogprobs.apply(flat, tokens.reshape(-1).long(), temperature)
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


# Token log-probability from hidden states


def _chunk_logits(hidden, unembed, bias, reference, part: slice) -> tuple[Tensor, Tensor | None]:
    """Logits of a chunk, of the policy and, where there is one, of the reference (hidden, unembed, bias)."""
    x = torch.nn.functional.linear(hidden[part], unembed, bias)
    return x, torch.nn.functional.linear(reference[0][part], *reference[1:]) if reference else None


def _chunk_rows(x: Tensor, y: Tensor | None, tokens: Int[Tensor, "n"], temperature: float, path: str):
    """What the backward pass of a chunk needs, and its rows (log p, H, KL first); may write over x and y."""
    if path == "triton":
        return (x, y), _rows_triton(x, y, tokens, 1 / temperature)
    x, y = (None if one is None else one.to(_statistics_dtype(one.dtype)) for one in (x, y))
    if temperature != 1:
        x, y = x.div_(temperature), None if y is None else y.div_(temperature)
    chunk, rows = _distribution(x, tokens, y)
    return chunk, torch.stack([row for row in rows if row is not None])


class _LinearTokenLogprobs(torch.autograd.Function):
    """Chunks of tokens: a matmul by the vendor's library, then the row operations above on a chunk that fits a cache.

    Why not one kernel over vocabulary tiles (CCE, arXiv 2411.09009)? dh = dx U would need D accumulators a row, or
    atomics, and a KL two tiles of logits at once; chunks let both operations share their row kernels. The price on a
    GPU: U is read once a chunk, so small chunks are bound by bandwidth; a larger CHUNK_NUMBERS trades memory for time.

    Backward recomputes the logits, chunk by chunk; only the last chunk is still there from the forward pass. But where
    h alone wants a gradient (LoRA), dx U is linear in p, p log p and p log(p/q): the torch path multiplies these by U
    in the forward pass, for as many matmuls in all, and saves the second softmax.
    """

    @staticmethod
    def forward(ctx, hidden, unembed, bias, tokens, temperature, reference, differentiable):
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.path = temperature, path_taken(hidden)
        ctx.parts = _chunks(len(hidden), len(unembed), ctx.path)
        only_hidden = ctx.needs_input_grad[:3] == (True, False, False)
        ctx.early = differentiable and only_hidden and ctx.path == "torch" and len(ctx.parts) > 1
        count = 2 if reference is None else 3  # log p, H and perhaps KL
        rows = torch.zeros(7 if ctx.path == "triton" else count, len(hidden), device=hidden.device)
        rows = rows.to(_statistics_dtype(hidden.dtype))
        early = hidden.new_empty(count, *hidden.shape) if ctx.early else None
        last = None
        for part in ctx.parts:
            last = None  # one chunk at a time in memory
            logits = _chunk_logits(hidden, unembed, bias, reference, part)
            last, rows[:, part] = _chunk_rows(*logits, tokens[part], temperature, ctx.path)
            logits = None
            if ctx.early:
                for slopes, product in zip(early, last, strict=False):
                    torch.mm(product.to(hidden.dtype), unembed, out=slopes[part])
        ctx.last = last if differentiable and not ctx.early else None
        ctx.save_for_backward(hidden, unembed, bias, tokens, rows, early, *(reference or ()))
        return tuple(row.clone() for row in rows[:count]) if count == 3 else (rows[0].clone(), rows[1].clone(), None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *g):
        hidden, unembed, bias, tokens, rows, early, *reference = ctx.saved_tensors
        coefficients = _coefficients(g, rows, tokens)
        if ctx.path == "torch":
            coefficients /= ctx.temperature  # the kernel does this by itself
        if ctx.early:
            return _early_gradient(early, unembed, coefficients.to(hidden.dtype), tokens, g), *[None] * 6
        last, ctx.last = ctx.last, None  # dx is written over it, so it serves one backward pass
        wants_hidden, wants_unembed, wants_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dunembed = torch.zeros_like(unembed, dtype=rows.dtype) if wants_unembed else None
        dbias = torch.zeros_like(bias, dtype=rows.dtype) if wants_bias else None
        for part in reversed(ctx.parts):
            if last is None:
                last = _chunk_logits(hidden, unembed, bias, reference, part)
                if ctx.path == "torch":
                    last, _ = _chunk_rows(*last, tokens[part], ctx.temperature, ctx.path)
            if ctx.path == "triton":
                ours = rows[:, part].contiguous(), coefficients[:, part].contiguous()
                dx = _dlogits_triton(*last, tokens[part], *ours, 1 / ctx.temperature, out=last[0])
            else:
                dx = _dlogits_torch(last, coefficients[:, part], tokens[part], g).to(hidden.dtype)
            if wants_hidden:
                torch.mm(dx, unembed, out=dhidden[part])
            if wants_unembed and dx.dtype == dunembed.dtype:
                dunembed.addmm_(dx.t(), hidden[part])
            elif wants_unembed:
                dunembed += dx.t() @ hidden[part]
            if wants_bias:
                dbias += dx.sum(0, dtype=dbias.dtype)
            last = dx = None
        dunembed, dbias = (None if d is None else d.to(hidden.dtype) for d in (dunembed, dbias))
        return dhidden, dunembed, dbias, None, None, None, None


def _early_gradient(early: Float[Tensor, "k N D"], unembed, coefficients, tokens, g: tuple) -> Float[Tensor, "N D"]:
    """dx U of `_coefficients`, from p U, (p log p) U and (p log(p/q)) U."""
    g_l, a, g_H, g_KL = coefficients.unsqueeze(-1)
    dhidden = early[0] * a
    if g[0] is not None:
        dhidden.addcmul_(unembed[tokens.clamp(min=0)], g_l)
    if g[1] is not None:
        dhidden.addcmul_(early[1], g_H, value=-1)
    if g[2] is not None:
        dhidden.addcmul_(early[2], g_KL)
    return dhidden


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under torch.autocast a matmul casts its inputs; so does an operation that consists of matmuls."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [None if one is None else one.to(torch.get_autocast_dtype(device)) for one in tensors]


def linear_token_logprobs(
    hidden: Float[Tensor, "... D"],
    unembed: Float[Tensor, "V D"],
    tokens: Int[Tensor, "..."],
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    ref_hidden: Float[Tensor, "... D_ref"] | None = None,
    ref_unembed: Float[Tensor, "V D_ref"] | None = None,
    ref_bias: Float[Tensor, "V"] | None = None,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."] | None]:
    """`linear_token_logprobs_reference` without its logits: at most one chunk of them is ever in memory.

    >>> h, U, tokens = torch.zeros(3, 2), torch.ones(4, 2), torch.tensor([0, 1, -100])
    >>> linear_token_logprobs(h, U, tokens, ref_hidden=h)[2]  # the reference is the policy
    tensor([0., 0., 0.])
    """
    hidden, unembed, bias, ref_hidden, ref_unembed, ref_bias = _autocast(
        hidden, unembed, bias, ref_hidden, ref_unembed, ref_bias
    )
    if hidden.dim() == 0 or unembed.dim() != 2:
        raise ValueError(f"unembed: shape {tuple(unembed.shape)}, expected [V, D], and hidden [..., D]")
    V, D = unembed.shape
    _check("hidden", hidden, (*hidden.shape[:-1], D), hidden)
    _check("unembed", unembed, (V, D), hidden)
    _check_tokens(tokens, hidden.shape[:-1], V, temperature, hidden)
    if bias is not None:
        _check("bias", bias, (V,), hidden)
    reference = None
    if ref_hidden is not None:
        ref_unembed, ref_bias = (unembed, bias) if ref_unembed is None else (ref_unembed, ref_bias)
        _check("ref_unembed", ref_unembed, (V, ref_unembed.shape[-1]), hidden)
        _check("ref_hidden", ref_hidden, (*tokens.shape, ref_unembed.shape[-1]), hidden)
        if ref_bias is not None:
            _check("ref_bias", ref_bias, (V,), hidden)
        reference = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]), ref_unembed, ref_bias
    elif ref_unembed is not None or ref_bias is not None:
        raise ValueError("ref_hidden: None, expected hidden states beside ref_unembed or ref_bias")
    inputs = hidden.reshape(-1, D), unembed, bias
    differentiable = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    outputs = _LinearTokenLogprobs.apply(*inputs, tokens.reshape(-1).long(), temperature, reference, differentiable)
    return tuple(None if output is None else output.view(tokens.shape) for output in outputs)


# LoRA matmul


def lora_linear_reference(
    x: Float[Tensor, "... K"],
    weight: Float[Tensor, "M K"],
    bias: Float[Tensor, "M"] | None,
    lora_a: Float[Tensor, "R K"],
    lora_b: Float[Tensor, "M R"],
    scale: float,
) -> Float[Tensor, "... M"]:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ in the dtype of x, to which A and B are cast; W and b are frozen."""
    low_rank = (x @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T
    return torch.nn.functional.linear(x, weight, bias) + scale * low_rank


@kernel
def lora_linear_kernel(
    x_ptr,  # [N, K], rows contiguous
    w_ptr,  # [M, K], any strides: nn.Linear's, or the transposed view of Conv1D's
    bias_ptr,  # [M]; read only with HAS_BIAS
    a_ptr,  # [R, K] contiguous
    b_ptr,  # [M, R] contiguous
    out_ptr,  # [N, M] out
    xa_ptr,  # [N, R] out: x Aᵀ for the backward pass
    N,
    M,
    K,
    stride_xn,
    stride_wm,
    stride_wk,
    scale,
    HAS_BIAS: constexpr,
    R: constexpr,
    BLOCK_R: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
    BLOCK_K: constexpr,
    PRECISION: constexpr,
):
    """Computes x Wᵀ + b + s (x Aᵀ) Bᵀ for one tile [BLOCK_N, BLOCK_M] of the output.
    Program: the tile, tiles in groups of 8 rows so that neighbours share W in L2. FLOPs: 2 N K M + 2 N R (K + M).
    Bytes: x, W, out once if L2 is kind. Bound by matmul. Saves a round trip of x Aᵀ and of the output;
    the price is that every column of tiles computes x Aᵀ anew, 2 N K BLOCK_R · M / BLOCK_M instead of 2 N K R.
    """
    tiles_n, tiles_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    first = pid // (8 * tiles_m) * 8
    height = min(tiles_n - first, 8)
    pid_n, pid_m = first + pid % (8 * tiles_m) % height, pid % (8 * tiles_m) // height
    rows = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks, inner = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    xa = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        # other=0: what lies past an edge adds nothing to a sum
        x = tl.load(x_ptr + rows[:, None] * stride_xn + k, mask=(rows[:, None] < N) & (k < K), other=0.0)
        w = tl.load(w_ptr + k[:, None] * stride_wk + cols * stride_wm, mask=(k[:, None] < K) & (cols < M), other=0.0)
        a = tl.load(a_ptr + ranks * K + k[:, None], mask=(ranks < R) & (k[:, None] < K), other=0.0)
        out = tl.dot(x, w, out, input_precision=PRECISION)
        xa = tl.dot(x, a, xa, input_precision=PRECISION)
    b = tl.load(b_ptr + cols * R + ranks[:, None], mask=(ranks[:, None] < R) & (cols < M), other=0.0)
    out += scale * tl.dot(xa.to(b.dtype), b, input_precision=PRECISION)
    if HAS_BIAS:
        out += tl.load(bias_ptr + cols, mask=cols < M, other=0.0).to(tl.float32)
    in_tile = (rows[:, None] < N) & (cols < M)
    tl.store(out_ptr + rows[:, None] * M + cols, out.to(out_ptr.dtype.element_ty), mask=in_tile)
    if pid_m == 0:
        in_rank = (rows[:, None] < N) & (ranks < R)
        tl.store(xa_ptr + rows[:, None] * R + ranks, xa.to(xa_ptr.dtype.element_ty), mask=in_rank)


def _lora_launch(dtype: torch.dtype, R: int) -> dict:
    """Tensor cores want large tiles and three stages of loads in flight; exact float32 has no tensor cores to feed.
    A large rank takes registers, so its tiles are shallower: no configuration spills on sm_80 or sm_90.
    """
    half, small = dtype != torch.float32, R <= 16
    tile = {"BLOCK_N": 128, "BLOCK_M": 128} if half else {"BLOCK_N": 64, "BLOCK_M": 64}
    depth = (64 if half else 32) if small else (32 if half else 16)
    stages = {"num_warps": 8, "num_stages": 3 if half else 2}
    return {"R": R, "BLOCK_R": max(16, 1 << (R - 1).bit_length()), **tile, "BLOCK_K": depth, **stages}


def _lora_triton(x, weight, bias, lora_a, lora_b, scale: float) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N R"]]:
    (N, K), M, R = x.shape, len(weight), len(lora_a)
    out, xa = x.new_empty(N, M), x.new_empty(N, R)
    config = _lora_launch(x.dtype, R)
    grid = (triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(M, config["BLOCK_M"]),)
    exact = torch.get_float32_matmul_precision() == "highest"  # as torch's own matmul decides
    lora_linear_kernel[grid](
        *(x, weight, x if bias is None else bias, lora_a.contiguous(), lora_b.contiguous(), out, xa),
        *(N, M, K, x.stride(0), *weight.stride(), scale),
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if exact else "tf32",
        **config,
    )
    return out, xa


class _LoraLinear(torch.autograd.Function):
    """Saves x, in memory anyway, and x Aᵀ. Backward is plain matmuls: with g = dy B of rank R,

    dx = dy W + s g A,   dA = s gᵀ x,   dB = s dyᵀ (x Aᵀ); the second of each pair is too small for a fusion to pay.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale):
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        if path_taken(x) == "triton" and len(a) <= MAX_RANK:
            out, xa = _lora_triton(x if x.stride(1) == 1 else x.contiguous(), weight, bias, a, b, scale)
        else:
            xa = x @ a.t()
            out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            out.addmm_(xa, b.t(), alpha=scale)
        ctx.scale, ctx.dtypes = scale, (lora_a.dtype, lora_b.dtype)
        ctx.save_for_backward(x, weight, a, b, xa)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, a, b, xa = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        dx = da = db = None
        g = (dy @ b).mul_(ctx.scale) if wants_x or wants_a else None
        if wants_x:
            dx = (dy @ weight).addmm_(g, a)
        if wants_a:
            da = (g.t() @ x).to(ctx.dtypes[0])
        if wants_b:
            db = (dy.t() @ xa).mul_(ctx.scale).to(ctx.dtypes[1])
        return dx, None, None, da, db, None


def lora_linear(
    x: Float[Tensor, "... K"],
    weight: Float[Tensor, "M K"],
    bias: Float[Tensor, "M"] | None,
    lora_a: Float[Tensor, "R K"],
    lora_b: Float[Tensor, "M R"],
    scale: float,
) -> Float[Tensor, "... M"]:
    """`lora_linear_reference` with x read once; a rank above MAX_RANK takes the torch path.

    >>> one = torch.ones(1, 1)
    >>> lora_linear(one, one, None, 2 * one, 3 * one, 0.5)  # 1 + 0.5 · 2 · 3
    tensor([[4.]])
    """
    x, weight, bias = _autocast(x, weight, bias)
    if x.dim() == 0 or weight.dim() != 2 or lora_a.dim() != 2:
        shapes = [tuple(one.shape) for one in (x, weight, lora_a)]
        raise ValueError(f"x, weight, lora_a: shapes {shapes}, expected [..., K], [M, K], [R, K]")
    M, K = weight.shape
    R = len(lora_a)
    _check("x", x, (*x.shape[:-1], K), x)
    _check("weight", weight, (M, K), x)
    if bias is not None:
        _check("bias", bias, (M,), x)
    _check("lora_a", lora_a, (R, K), x, dtype=False)
    _check("lora_b", lora_b, (M, R), x, dtype=False)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight: requires a gradient, expected weight and bias frozen")
    return _LoraLinear.apply(x.reshape(-1, K), weight, bias, lora_a, lora_b, scale).view(*x.shape[:-1], M)


# python kernels.py: the report


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(*functions, repeats: int = 5) -> list[list[float]]:
    """Medians of each function's laps; the functions alternate, so that a slow minute of the machine hits all."""
    laps = [[function() for function in functions] for _ in range(repeats + 1)][1:]
    return [
        [statistics.median(lap) for lap in zip(*laps_of_one, strict=True)] for laps_of_one in zip(*laps, strict=True)
    ]


def _timed(function, inputs: list[Tensor]):
    """A function that returns the seconds of a forward pass alone, and of forward and backward together: gradients
    that are computed in the forward pass have no time of their own."""

    def laps() -> tuple[float, float]:
        _synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            function(*inputs)
        _synchronize()
        middle = time.perf_counter()
        torch.autograd.grad(sum(one.float().sum() for one in function(*inputs) if one is not None), inputs)
        _synchronize()
        return middle - start, time.perf_counter() - middle

    return laps


def _error(function, reference, inputs: list[Tensor]) -> tuple[float, float]:
    """Largest error of values and of gradients against the reference in float64, relative to the largest number."""
    results = []
    for f, cast in ((function, lambda one: one), (reference, torch.Tensor.double)):
        leaves = [cast(one.detach()).requires_grad_() for one in inputs]
        outputs = [one for one in f(*leaves) if one is not None]
        gradients = torch.autograd.grad(sum(one.double().sum() for one in outputs), leaves)
        results.append(([one.detach().double() for one in outputs], [one.double() for one in gradients]))
    ours, truth = results
    pairs = (zip(*two, strict=True) for two in zip(ours, truth, strict=True))
    return tuple(max(((a - b).abs().max() / b.abs().max()).item() for a, b in two) for two in pairs)


def _cases(device: str, dtype: torch.dtype):
    """Per operation: name, function, reference, inputs, unit, and work of forward and of both passes."""
    N, V, D = (8192, 50257, 1024) if device == "cuda" else (256, 50257, 768)
    L, R = (4096, 16) if device == "cuda" else (1024, 16)

    def draw(*shape):
        return torch.randn(shape, device=device, dtype=dtype)

    tokens, unembed, weight = torch.randint(V, (N,), device=device), draw(V, D) / D**0.5, draw(L, L) / L**0.5
    size, head = dtype.itemsize * N * V / 1e9, 2 * N * V * D / 1e12
    head_of = lambda function: lambda h: function(h, unembed.to(h.dtype), tokens)  # noqa: E731
    lora_of = lambda function: lambda x, a, b: (function(x, weight.to(x.dtype), None, a, b, 2.0),)  # noqa: E731
    return [
        ("token_logprobs", lambda f: lambda x: f(x, tokens), token_logprobs, token_logprobs_reference, [draw(N, V)],
         "GB/s", size, 3 * size),
        ("linear_token_logprobs", head_of, linear_token_logprobs, linear_token_logprobs_reference, [draw(N, D)],
         "TFLOP/s", head, 2 * head),
        ("lora_linear", lora_of, lora_linear, lora_linear_reference, [draw(L, L), draw(R, L), draw(L, R)],
         "TFLOP/s", 2 * L**3 / 1e12, 4 * L**3 / 1e12),
    ]  # fmt: skip


def report_speed(console, device: str, dtype: torch.dtype) -> None:
    big = torch.empty(1 << (28 if device == "cuda" else 26), dtype=torch.float32, device=device)
    side = 8192 if device == "cuda" else 2048
    square = torch.randn(side, side, device=device, dtype=dtype)

    def lap(function):
        def laps():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            return (time.perf_counter() - start,)

        return laps

    target = torch.empty_like(big)
    [[copy], [matmul]] = _seconds(lap(lambda: target.copy_(big)), lap(lambda: square @ square))
    ceiling = {"GB/s": 2 * big.numel() * 4 / 1e9 / copy, "TFLOP/s": 2 * len(square) ** 3 / 1e12 / matmul}
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, {str(dtype)[6:]}: copies {ceiling['GB/s']:.0f} GB/s, multiplies {ceiling['TFLOP/s']:.2f} TFLOP/s"
    table = rich.table.Table(
        "operation",
        "pass",
        "error",
        "torch's",
        "ms",
        "torch's",
        "rate",
        "torch's",
        "of ceiling",
        title=title,
        padding=0,
    )
    for operation, wrap, function, reference, inputs, unit, *works in _cases(device, dtype):
        inputs = [one.requires_grad_() for one in inputs]
        errors = [_error(wrap(f), wrap(reference), inputs) for f in (function, reference)]
        times = _seconds(_timed(wrap(function), inputs), _timed(wrap(reference), inputs), repeats=3)
        for i, (lap_name, work) in enumerate(zip(("forward", "+ backward"), works, strict=True)):
            rates = [work / one[i] for one in times]
            table.add_row(
                *(operation, lap_name), *(f"{one[i]:.0e}" for one in errors),
                *(f"{1e3 * one[i]:.1f}" for one in times), f"{rates[0]:.3g} {unit}", f"{rates[1]:.3g}",
                f"{rates[0] / ceiling[unit]:.0%}",
            )  # fmt: skip
    console.print(table)


def measure_memory(which: str) -> tuple[float, float]:
    """MB above the inputs and seconds of forward and backward, 4,096 tokens x 768, V = 50,257; in its own process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, unembed = torch.randn(4096, 768, device=device), torch.randn(50257, 768, device=device).div_(28)
    tokens, ref = torch.randint(50257, (4096,), device=device), hidden + 0.1
    hidden.requires_grad_()
    function = linear_token_logprobs_reference if which == "plain" else linear_token_logprobs
    (torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)).sum().item()  # the library's own buffers

    def peak() -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    before, start = peak(), time.perf_counter()
    outputs = function(hidden, unembed, tokens, ref_hidden=ref if which == "kl" else None)
    sum(one.sum() for one in outputs if one is not None).backward()
    _synchronize()
    return (peak() - before) / 1e6, time.perf_counter() - start


def report_memory(console) -> None:
    table = rich.table.Table(
        "4,096 x 768, V = 50,257, float32, forward and backward", "peak MB", "seconds", "memory", "time"
    )
    names = {"plain": "plain torch", "chunks": "linear_token_logprobs", "kl": "  with exact KL"}
    measured = {}
    for which in names:
        run = subprocess.run([sys.executable, __file__, which], capture_output=True, text=True, check=True)
        measured[which] = [float(number) for number in run.stdout.split()]
    for which, name in names.items():
        ratios = (f"{one / plain:.2f}x" for one, plain in zip(measured[which], measured["plain"], strict=True))
        table.add_row(name, *(f"{one:.1f}" for one in measured[which]), *ratios)
    console.print(table)
    console.print(f"exact KL takes {measured['kl'][1] / measured['chunks'][1]:.2f} times as long as log p and H alone")


if __name__ == "__main__":
    import resource  # POSIX alone has it

    import rich.console
    import rich.table

    torch.manual_seed(0)
    if len(sys.argv) > 1:
        print(*measure_memory(sys.argv[1]))
    else:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        console = rich.console.Console(width=100)
        report_memory(console)  # first: a child process starts from its parent's peak
        report_speed(console, found, torch.bfloat16 if found == "cuda" else torch.float32)
