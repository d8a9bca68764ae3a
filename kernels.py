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
import functools
import itertools
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
CHUNK_NUMBERS = {
    "torch": 128 * 50257,
    "triton": 80 * 50257,
}  # N·V numbers of one chunk: 26 MB, and 8 MB in bf16


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


# What comes in: dtypes, and errors that name the argument, what it was and what was expected

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check(argument: str, tensor: Tensor | None, shape: tuple, device: torch.device, dtypes: tuple) -> None:
    if tensor is None:  # an optional argument
        return
    if tensor.dtype not in dtypes:
        raise TypeError(f"{argument}: dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{argument}: on {tensor.device}, expected {device}")
    if tensor.shape != shape:
        raise ValueError(f"{argument}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _check_tokens(tokens: Tensor, shape: tuple, V: int, temperature: float, device: torch.device) -> None:
    """An id outside of the vocabulary is an error on CPU; on CUDA, where looking would stall, its log p is NaN."""
    _check("tokens", tokens, shape, device, INTEGERS)
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}, expected a positive number")
    if tokens.device.type == "cpu":
        wrong = tokens[((tokens < 0) & (tokens != IGNORE)) | (tokens >= V)]
        if wrong.numel():
            raise ValueError(f"tokens: id {wrong[0].item()}, expected 0 to {V - 1}, or {IGNORE} where masked")


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under torch.autocast a matmul casts its inputs; so does an operation that consists of matmuls."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [None if one is None else one.to(torch.get_autocast_dtype(device)) for one in tensors]


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # float64 stays, for gradcheck


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
    x_ptr,  # [N, V] policy logits, contiguous like all here
    y_ptr,  # [N, V] reference logits; read only with HAS_REF
    tokens_ptr,  # [N]
    rows_ptr,  # [7, N] float32 out: log p(token), H, KL, max x, log Σ exp(x - max x), and these two of y
    N,
    V,
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
        x = (
            tl.load(x_ptr + row * V + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            * inv_temperature
        )
        m_new = tl.maximum(m, tl.max(x))
        delta = tl.where(
            m == -float("inf"), 0.0, m_new - m
        )  # nothing to rescale before the first finite logit
        x = x - tl.where(m_new == -float("inf"), 0.0, m_new)
        shrink, e = tl.exp(-delta), tl.exp(x)
        if HAS_REF:
            y = tl.load(y_ptr + row * V + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            y = y * inv_temperature
            m_q_new = tl.maximum(m_q, tl.max(y))
            delta_q = tl.where(m_q == -float("inf"), 0.0, m_q_new - m_q)
            y = y - tl.where(m_q_new == -float("inf"), 0.0, m_q_new)
            s_q = s_q * tl.exp(-delta_q) + tl.exp(y)
            u = (u - (delta - delta_q) * s) * shrink + tl.where(
                e > 0, e * (x - y), 0.0
            )  # p = 0: 0, even at q = 0
            m_q = m_q_new
        t = (t - delta * s) * shrink + tl.where(e > 0, e * x, 0.0)
        s = s * shrink + e
        m = m_new
    total = tl.sum(s)
    log_s = tl.log(total)

    token = tl.load(tokens_ptr + row)
    kept = token != -100
    in_vocabulary = (token >= 0) & (token < V)
    x_token = tl.load(x_ptr + row * V + token, mask=in_vocabulary, other=float("nan")).to(tl.float32)
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
    x_ptr,  # [N, V] policy logits, contiguous like all here
    y_ptr,  # [N, V] reference logits; read only with HAS_REF
    tokens_ptr,  # [N]
    rows_ptr,  # [7, N] float32, written by the forward kernel
    coefficients_ptr,  # [4, N] float32: g_l, a, g_H, g_KL
    dx_ptr,  # [N, V] out; may be x itself
    N,
    V,
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
        x = tl.load(x_ptr + row * V + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        log_p = x * inv_temperature - m - log_s
        p = tl.exp(log_p)
        slope = a - g_H * log_p
        if HAS_REF:
            y = tl.load(y_ptr + row * V + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            m_q, log_s_q = tl.load(rows_ptr + 5 * N + row), tl.load(rows_ptr + 6 * N + row)
            slope = slope + g_KL * (log_p - (y * inv_temperature - m_q - log_s_q))
        dx = tl.where(p > 0, p * slope, 0.0) + tl.where(cols == token, g_l, 0.0)  # p log p → 0
        tl.store(dx_ptr + row * V + cols, (dx * inv_temperature).to(dx_ptr.dtype.element_ty), mask=cols < V)


def _launch(V: int) -> dict:
    """The block and warps of the row kernels: 8 logits a thread are one 16-byte load of bf16, and spill no register."""
    block = min(2048, max(16, 1 << (V - 1).bit_length()))
    return {"BLOCK_V": block, "num_warps": max(1, block // 256)}


def _rows_triton(logits: list[Tensor], tokens: Int[Tensor, "n"], temperature: float) -> Float[Tensor, "7 n"]:
    """The forward kernel on the logits [x] or [x, y]."""
    N, V = logits[0].shape
    rows = torch.zeros(7, N, device=tokens.device)
    inputs = logits[0], logits[-1], tokens, rows
    token_logprobs_forward_kernel[(N,)](
        *inputs, N, V, 1 / temperature, HAS_REF=len(logits) == 2, **_launch(V)
    )
    return rows


def _dlogits_triton(
    logits: list[Tensor], tokens, rows, coefficients, temperature: float, out: Tensor
) -> Tensor:
    """The backward kernel on the logits [x] or [x, y]."""
    N, V = out.shape
    inputs = logits[0], logits[-1], tokens, rows.contiguous(), coefficients.contiguous(), out
    token_logprobs_backward_kernel[(N,)](
        *inputs, N, V, 1 / temperature, HAS_REF=len(logits) == 2, **_launch(V)
    )
    return out


# Token log-probability: the same rows in torch, in place


def _rows_torch(
    planes: Float[Tensor, "k n V"], tokens: Int[Tensor, "n"], temperature: float
) -> Float[Tensor, "7 n"]:
    """The rows of the forward kernel, from planes (anything, x) or (anything, x, y), which become
    (p, p (log p + H), p (log(p/q) - KL)): the slopes of which dx consists, see `_coefficients`."""
    p, x, *y = planes
    rows = planes.new_zeros(7, len(tokens))
    for logits, row in [*((one, 5) for one in y), (x, 3)]:  # x last, because its exponentials stay
        if temperature != 1:
            logits.div_(temperature)
        torch.amax(logits, -1, out=rows[row])
        logits.sub_(rows[row, :, None])
        torch.log(torch.exp(logits, out=p).sum(-1), out=rows[row + 1])
    log_s, log_s_q = rows[4], rows[6]
    p.mul_(torch.exp(-log_s)[:, None])
    rows[0] = x.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1) - log_s
    if y:
        rows[2] = _center(torch.sub(x, y[0], out=y[0]), p) - log_s + log_s_q
    rows[1] = log_s - _center(x, p)
    rows[:3].masked_fill_(tokens == IGNORE, 0)
    return rows


def _center(logs: Float[Tensor, "n V"], p: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
    """The mean Σ p·logs; leaves p (logs - mean) in `logs`. 0 · (-inf) shows as NaN in the sums and counts as 0."""
    mean = logs.mul_(p).sum(-1)
    if mean.isnan().any():
        mean = logs.masked_fill_(p == 0, 0).sum(-1)
    logs.addcmul_(p, mean[:, None], value=-1)
    return mean


def _coefficients(g: tuple, rows: Float[Tensor, "7 N"], tokens: Int[Tensor, "N"]) -> Float[Tensor, "4 N"]:
    """g_l, a, g_H, g_KL with which dx = (g_l onehot(token) + p (a - g_H log p + g_KL log(p/q))) / T, because

    ∂ log p(token)/∂x = onehot(token) - p,   ∂H/∂x = -p (log p + H),   ∂KL/∂x = p (log(p/q) - KL)
    so a = -g_l - g_H H - g_KL KL. A masked token has all four 0; an output that nobody used (None) counts as 0.
    """
    g_l, g_H, g_KL = (torch.zeros_like(rows[0]) if one is None else one.to(rows.dtype) for one in g)
    a = -g_l - g_H * rows[1] - g_KL * rows[2]
    return torch.stack([g_l, a, g_H, g_KL]).masked_fill_(tokens == IGNORE, 0)


def _combine(planes: Float[Tensor, "k n M"], coefficients, temperature: float, out: Tensor) -> Tensor:
    """dx without its one-hot term, from the planes of `_rows_torch`; from these times U, as it is linear, dx U."""
    g_l, _, g_H, g_KL = coefficients.unsqueeze(-1) / temperature
    torch.mul(planes[0], -g_l, out=out)
    for plane, weight in zip(planes[1:], (-g_H, g_KL), strict=False):
        out.addcmul_(plane, weight)
    return out


def _dlogits_torch(planes, tokens, coefficients, temperature: float) -> Float[Tensor, "n V"]:
    """The backward kernel's dx, written over p."""
    dx = _combine(planes, coefficients, temperature, out=planes[0])
    return dx.scatter_add_(1, tokens.clamp(min=0)[:, None], coefficients[0, :, None] / temperature)


def _chunks(N: int, V: int, count: int, like: Tensor) -> list[tuple[slice, Tensor]]:
    """Rows 0 to N in equal parts of at most CHUNK_NUMBERS logits, each with its planes of [n, V]: views of one buffer.
    `count` distributions need the planes x (and y), and on the torch path one of p before them, in float32 at least."""
    path = path_taken(like)
    planes, dtype = (count, like.dtype) if path == "triton" else (count + 1, _statistics_dtype(like.dtype))
    parts = -(-N // max(1, CHUNK_NUMBERS[path] // V))
    edges = [N * i // parts for i in range(parts + 1)] if N else []
    buffer = like.new_empty(planes * (-(-N // max(1, parts))) * V, dtype=dtype)
    return [
        (slice(start, stop), buffer[: planes * (stop - start) * V].view(planes, stop - start, V))
        for start, stop in itertools.pairwise(edges)
    ]


# Token log-probability from logits


class _TokenLogprobs(torch.autograd.Function):
    """Saves logits and tokens, in memory anyway, and the row statistics; the softmax is rebuilt from them."""

    @staticmethod
    def forward(ctx, logits: Float[Tensor, "N V"], tokens: Int[Tensor, "N"], temperature: float):
        ctx.set_materialize_grads(False)
        if path_taken(logits) == "triton":
            rows = _rows_triton([logits], tokens, temperature)
        else:
            rows = logits.new_empty(7, len(tokens), dtype=_statistics_dtype(logits.dtype))
            for part, planes in _chunks(*logits.shape, 1, logits):
                planes[1] = logits[part]
                rows[:, part] = _rows_torch(planes, tokens[part], temperature)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, tokens, rows)
        return rows[0].clone(), rows[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *g):
        logits, tokens, rows = ctx.saved_tensors
        coefficients = _coefficients((*g, None), rows, tokens)  # there is no KL
        dlogits = torch.empty_like(logits)
        if path_taken(logits) == "triton":
            return (
                _dlogits_triton([logits], tokens, rows, coefficients, ctx.temperature, out=dlogits),
                None,
                None,
            )
        for part, planes in _chunks(*logits.shape, 1, logits):
            planes[1] = logits[part]
            _rows_torch(planes, tokens[part], ctx.temperature)
            dlogits[part] = _dlogits_torch(planes, tokens[part], coefficients[:, part], ctx.temperature)
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
    V = logits.shape[-1]
    _check("logits", logits, logits.shape, logits.device, FLOATS)
    _check_tokens(tokens, logits.shape[:-1], V, temperature, logits.device)
    flat = logits.reshape(-1, V).contiguous()
    logprobs, entropy = _TokenLogprobs.apply(flat, tokens.reshape(-1).long(), temperature)
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


# Token log-probability from hidden states


def _chunk_rows(
    planes: Tensor, part: slice, heads: list, tokens: Int[Tensor, "N"], temperature: float
) -> Tensor:
    """Rows of a part of the tokens, whose planes are written. A head is (hidden, unembed, bias): policy, reference."""
    logits = planes[-len(heads) :]
    for x, (hidden, unembed, bias) in zip(logits, heads, strict=True):
        if x.dtype != hidden.dtype:
            x.copy_(torch.nn.functional.linear(hidden[part], unembed, bias))
        elif bias is None:
            torch.mm(hidden[part], unembed.t(), out=x)
        else:
            torch.addmm(bias, hidden[part], unembed.t(), out=x)
    if path_taken(heads[0][0]) == "triton":
        return _rows_triton(list(logits), tokens[part], temperature)
    return _rows_torch(planes, tokens[part], temperature)


class _LinearTokenLogprobs(torch.autograd.Function):
    """Chunks of tokens: a matmul by the vendor's library, then the row operations above on a chunk that fits a cache.

    Why not one kernel over vocabulary tiles (CCE, arXiv 2411.09009)? dh = dx U would need D accumulators a row, or
    atomics, and a KL two tiles of logits at once; chunks let both operations share their row kernels. The price on a
    GPU: U is read once a chunk, so small chunks are bound by bandwidth; a larger CHUNK_NUMBERS trades memory for time.

    Backward recomputes the logits, chunk by chunk; only the last chunk is still there from the forward pass. But where
    h alone wants a gradient (LoRA), the torch path multiplies its planes by U in the forward pass, see `_combine`:
    as many matmuls in all, and no second softmax.
    """

    @staticmethod
    def forward(ctx, hidden, unembed, bias, tokens, temperature, reference, differentiable):
        ctx.set_materialize_grads(False)
        heads = [(hidden, unembed, bias), *([reference] if reference else [])]
        parts = _chunks(len(hidden), len(unembed), len(heads), hidden)
        rows = hidden.new_empty(7, len(hidden), dtype=_statistics_dtype(hidden.dtype))
        only_hidden = ctx.needs_input_grad[:3] == (True, False, False)
        early = None
        if differentiable and only_hidden and len(parts) > 1 and path_taken(hidden) == "torch":
            early = rows.new_empty(len(heads) + 1, *hidden.shape)
        for part, planes in parts:
            rows[:, part] = _chunk_rows(planes, part, heads, tokens, temperature)
            if early is not None:
                products = torch.mm(planes.flatten(0, 1).to(hidden.dtype), unembed)
                early[:, part] = products.view(*planes.shape[:2], -1)
        ctx.temperature, ctx.parts = temperature, parts if differentiable and early is None else None
        ctx.save_for_backward(hidden, unembed, bias, tokens, rows, early, *(reference or ()))
        return rows[0].clone(), rows[1].clone(), rows[2].clone() if reference else None

    @staticmethod
    @once_differentiable
    def backward(ctx, *g):
        hidden, unembed, bias, tokens, rows, early, *reference = ctx.saved_tensors
        coefficients = _coefficients(g, rows, tokens)
        if early is not None:
            dhidden = _combine(early, coefficients, ctx.temperature, out=torch.empty_like(early[0]))
            dhidden.addcmul_(
                unembed[tokens.clamp(min=0)], coefficients[0, :, None], value=1 / ctx.temperature
            )
            return dhidden.to(hidden.dtype), *[None] * 6
        heads = [(hidden, unembed, bias), *([reference] if reference else [])]
        parts, still_there, ctx.parts = (
            ctx.parts,
            ctx.parts is not None,
            None,
        )  # dx is written over the last chunk
        wants_hidden, wants_unembed, wants_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dunembed = torch.zeros_like(unembed, dtype=rows.dtype) if wants_unembed else None
        dbias = torch.zeros_like(bias, dtype=rows.dtype) if wants_bias else None
        for part, planes in reversed(parts or _chunks(len(hidden), len(unembed), len(heads), hidden)):
            if not still_there:
                _chunk_rows(planes, part, heads, tokens, ctx.temperature)
            still_there = False
            if path_taken(hidden) == "triton":
                ours = tokens[part], rows[:, part], coefficients[:, part], ctx.temperature
                dx = _dlogits_triton(list(planes), *ours, out=planes[0])
            else:
                dx = _dlogits_torch(planes, tokens[part], coefficients[:, part], ctx.temperature).to(
                    hidden.dtype
                )
            if wants_hidden:
                torch.mm(dx, unembed, out=dhidden[part])
            if wants_unembed and dx.dtype == dunembed.dtype:
                dunembed.addmm_(dx.t(), hidden[part])
            elif wants_unembed:
                dunembed += dx.t() @ hidden[part]
            if wants_bias:
                dbias += dx.sum(0, dtype=dbias.dtype)
        dunembed, dbias = (None if d is None else d.to(hidden.dtype) for d in (dunembed, dbias))
        return dhidden, dunembed, dbias, None, None, None, None


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
    (V, D), device = unembed.shape, hidden.device
    _check("hidden", hidden, (*hidden.shape[:-1], D), device, FLOATS)
    _check("unembed", unembed, (V, D), device, (hidden.dtype,))
    _check("bias", bias, (V,), device, (hidden.dtype,))
    _check_tokens(tokens, hidden.shape[:-1], V, temperature, device)
    if ref_hidden is None and ref_unembed is not None:
        raise ValueError("ref_hidden: None, expected hidden states beside ref_unembed")
    if ref_unembed is None and ref_bias is not None:
        raise ValueError("ref_unembed: None, expected a matrix beside ref_bias")
    reference = None
    if ref_hidden is not None:
        ref_unembed, ref_bias = (unembed, bias) if ref_unembed is None else (ref_unembed, ref_bias)
        D_ref = ref_hidden.shape[-1]
        _check("ref_hidden", ref_hidden, (*tokens.shape, D_ref), device, (hidden.dtype,))
        _check("ref_unembed", ref_unembed, (V, D_ref), device, (hidden.dtype,))
        _check("ref_bias", ref_bias, (V,), device, (hidden.dtype,))
        reference = ref_hidden.detach().reshape(-1, D_ref), ref_unembed, ref_bias
    inputs = hidden.reshape(-1, D), unembed, bias
    differentiable = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    outputs = _LinearTokenLogprobs.apply(
        *inputs, tokens.reshape(-1).long(), temperature, reference, differentiable
    )
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
    x_ptr,  # [N, K] contiguous
    w_ptr,  # [M, K], any strides: nn.Linear's, or the transposed view of Conv1D's
    bias_ptr,  # [M]; read only with HAS_BIAS
    a_ptr,  # [R, K] contiguous
    b_ptr,  # [M, R] contiguous
    out_ptr,  # [N, M] out
    xa_ptr,  # [N, R] out: x Aᵀ for the backward pass
    N,
    M,
    K,
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
        x = tl.load(x_ptr + rows[:, None] * K + k, mask=(rows[:, None] < N) & (k < K), other=0.0)
        w = tl.load(
            w_ptr + k[:, None] * stride_wk + cols * stride_wm, mask=(k[:, None] < K) & (cols < M), other=0.0
        )
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


def _lora_triton(
    x, weight, bias, lora_a, lora_b, scale: float
) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N R"]]:
    (N, K), M, R = x.shape, len(weight), len(lora_a)
    out, xa = x.new_empty(N, M), x.new_empty(N, R)
    config = _lora_launch(x.dtype, R)
    grid = (triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(M, config["BLOCK_M"]),)
    exact = torch.get_float32_matmul_precision() == "highest"  # as torch's own matmul decides
    lora_linear_kernel[grid](
        *(
            x.contiguous(),
            weight,
            x if bias is None else bias,
            lora_a.contiguous(),
            lora_b.contiguous(),
            out,
            xa,
        ),
        *(N, M, K, *weight.stride(), scale),
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
            out, xa = _lora_triton(x, weight, bias, a, b, scale)
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
    (M, K), R, device = weight.shape, len(lora_a), x.device
    _check("x", x, (*x.shape[:-1], K), device, FLOATS)
    _check("weight", weight, (M, K), device, (x.dtype,))
    _check("bias", bias, (M,), device, (x.dtype,))
    _check("lora_a", lora_a, (R, K), device, FLOATS)
    _check("lora_b", lora_b, (M, R), device, FLOATS)
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and one.requires_grad:
            raise ValueError(f"{name}: requires a gradient, expected to be frozen")
    return _LoraLinear.apply(x.reshape(-1, K), weight, bias, lora_a, lora_b, scale).view(*x.shape[:-1], M)


# python kernels.py: the report


def _seconds(*functions) -> list[float]:
    """Median of three laps of each; the functions alternate, so that a slow minute of the machine hits all."""
    laps = []
    for function in functions * 4:  # the first lap warms up
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        laps.append(time.perf_counter() - start)
    return [statistics.median(laps[len(functions) + i :: len(functions)]) for i in range(len(functions))]


def _run(function, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The outputs; with `backward`, the gradients of their sum."""
    if not backward:
        with torch.no_grad():
            return list(function(*inputs))
    leaves = [one.detach().requires_grad_() for one in inputs]
    return list(torch.autograd.grad(sum(one.float().sum() for one in function(*leaves)), leaves))


def _error(results: list[Tensor], truth: list[Tensor]) -> str:
    """The largest error of all, each relative to the largest number of its tensor."""
    return f"{max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, truth, strict=True)):.0e}"


def report_speed(console, device: str, dtype: torch.dtype) -> None:
    """Each operation beside its reference, and as a share of what a large copy and a large matmul reach here."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    N, V, D, L, side = (8192, 50257, 1024, 4096, 8192) if device == "cuda" else (256, 50257, 768, 1024, 2048)
    tokens, unembed, weight = torch.randint(V, (N,), device=device), draw(V, D) / D**0.5, draw(L, L) / L**0.5
    square, source, target = draw(side, side), *torch.empty(2, 4 * side**2, device=device)
    copy, matmul = _seconds(lambda: target.copy_(source), lambda: square @ square)
    ceiling = {"GB/s": 2 * 4 * len(source) / 1e9 / copy, "TFLOP/s": 2 * side**3 / 1e12 / matmul}
    numbers, head, layer = (
        dtype.itemsize * N * V / 1e9,
        2 * N * V * D / 1e12,
        2 * L**3 / 1e12,
    )  # GB, TFLOP, TFLOP
    operations = [  # name, what to call, inputs, unit, work of the forward pass and of both
        ("token_logprobs", lambda f, x: f(x, tokens), [draw(N, V)], "GB/s", (numbers, 3 * numbers)),
        (
            *("linear_token_logprobs", lambda f, h: f(h, unembed.to(h.dtype), tokens)[:2]),
            *([draw(N, D)], "TFLOP/s", (head, 2 * head)),
        ),
        (
            *("lora_linear", lambda f, x, a, b: [f(x, weight.to(x.dtype), None, a, b, 2.0)]),
            *([draw(L, L), draw(16, L) / L**0.5, draw(L, 16)], "TFLOP/s", (layer, 2 * layer)),
        ),
    ]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, {str(dtype)[6:]}: copies {ceiling['GB/s']:.0f} GB/s, multiplies {ceiling['TFLOP/s']:.2f} TFLOP/s"
    columns = "operation", "pass", "error", "torch's", "ms", "torch's", "rate", "torch's", "of ceiling"
    table = rich.table.Table(*columns, title=title, padding=0)
    for (operation, call, inputs, unit, works), backward in itertools.product(operations, (False, True)):
        ours, plain = (
            functools.partial(call, globals()[operation + suffix]) for suffix in ("", "_reference")
        )
        truth = _run(plain, [one.double() for one in inputs], backward)
        errors = [_error(_run(f, inputs, backward), truth) for f in (ours, plain)]
        del truth
        times = _seconds(*(functools.partial(_run, f, inputs, backward) for f in (ours, plain)))
        rates = [works[backward] / one for one in times]
        speeds = f"{rates[0]:.3g} {unit}", f"{rates[1]:.3g}", f"{rates[0] / ceiling[unit]:.0%}"
        milliseconds = (f"{1e3 * one:.1f}" for one in times)
        table.add_row(operation, "and backward" if backward else "forward", *errors, *milliseconds, *speeds)
    console.print(table)


def measure_memory(which: str) -> tuple[float, float]:
    """MB above the inputs and seconds of forward and backward, 4,096 tokens x 768, V = 50,257; in its own process."""
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        hidden, unembed, tokens = (
            torch.randn(4096, 768),
            torch.randn(50257, 768).div_(28),
            torch.randint(50257, (4096,)),
        )
    ref_hidden = hidden + 0.1 if which == "kl" else None
    function = linear_token_logprobs_reference if which == "plain" else linear_token_logprobs
    (unembed[:64] @ unembed[:64].T).sum().item()  # the library's own buffers

    def peak() -> int:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        return torch.cuda.max_memory_allocated() if cuda else resident

    before, start = peak(), time.perf_counter()
    outputs = function(hidden.requires_grad_(), unembed, tokens, ref_hidden=ref_hidden)
    sum(one.sum() for one in outputs if one is not None).backward()
    hidden.grad[0, 0].item()  # waits for the device
    return (peak() - before) / 1e6, time.perf_counter() - start


def report_memory(console) -> None:
    """Prints peak memory and time of plain torch and linear_token_logprobs, each measured in a process of its own."""
    title = "4,096 x 768, V = 50,257, float32, forward and backward"
    table = rich.table.Table("", "peak MB", "seconds", "memory", "time", title=title)
    measured = {}
    for which, name in {
        "plain": "plain torch",
        "own": "linear_token_logprobs",
        "kl": "  with exact KL",
    }.items():
        run = subprocess.run([sys.executable, __file__, which], capture_output=True, text=True, check=True)
        measured[which] = [float(number) for number in run.stdout.split()]
        ratios = (
            f"{one / plain:.2f}x" for one, plain in zip(measured[which], measured["plain"], strict=True)
        )
        table.add_row(name, *(f"{one:.1f}" for one in measured[which]), *ratios)
    console.print(table)
    console.print(
        f"exact KL takes {measured['kl'][1] / measured['own'][1]:.2f} times as long as log p and H alone"
    )


if __name__ == "__main__":
    import resource  # POSIX alone has it

    import rich.console
    import rich.table

    torch.manual_seed(0)
    if len(sys.argv) > 1:
        print(*measure_memory(sys.argv[1]))
    else:
        console = rich.console.Console(width=100)
        report_memory(console)  # first: a child process starts from its parent's peak
        on_gpu = torch.cuda.is_available()
        report_speed(console, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)
