"""Reinforcement learning of a language model spends its memory in two operations: the way from hidden state
to token log-probability, and the LoRA matmul. Each stands here below a reference in plain torch, its
definition and its test. And on a GPU, training spends its time in Python, between one small kernel and the
next: so passes are recorded.

    token_logprobs         log p(token) and H(p), from logits that are read once
    linear_token_logprobs  the same and KL(p ‖ q), from hidden states h whose logits are h Uᵀ + b, in bounded
                           memory; h and U are rlhf.py's features and output layer; this is what it calls
    lora_linear            x Wᵀ + b + s (x Aᵀ) Bᵀ, as one kernel where that pays
    float32_linear         x Wᵀ + b in float32: those logits, for a sampler that needs them whole
    RecordedPass           a pass of a model, forward and backward, replayed on a GPU (a CUDA graph)
    replays                likewise a step that is taken over and over, without gradients

    N tokens (all leading axes, flattened)  x, y   logits of policy and reference, divided by temperature τ
    n tokens of one chunk, the slice `part` p, q   their softmax; lse(x) = log Σ exp x, so log p = x - lse(x)
    V vocabulary                            H, KL  -Σ p log p and Σ p log(p/q), sums over the vocabulary
    D, D_ref  width of the hidden states    g_l, g_H, g_KL  incoming gradients of log p(token), H, KL
    d_in, d_out, rank  of LoRA's matrices   dx, dhidden, …  gradients to x, to hidden, …

    8,192 tokens, V = 50,257, D = 1,024, bf16:   forward         backward        memory beside the inputs
    token_logprobs         bound by bandwidth    reads 0.8 GB    moves 1.6 GB    0.8 GB, the result
    linear_token_logprobs  bound by matmul       0.84 TFLOP      1.6 TFLOP       77 MB, and 268 MB kept

Plain torch holds x, log p, p, p log p and their gradients, N·V numbers each. Here they exist for one
chunk of rows at a time, except for the logits of the first rows: as many as a budget allows are kept for the
backward pass, and in a minibatch of reinforcement learning that is usually all of them.

CUDA tensors take the Triton kernels; all others, and float64, the torch path, which is as correct and as
frugal (`path_taken`; of lora_linear, only small products in 16 bits take the kernel). Whatever the dtype of
the inputs, logits and statistics are float32 (`float32_linear` says why), or float64 for gradcheck; a
gradient has the dtype of the tensor it belongs to.
Left out: a gradient to W (LoRA freezes it) and to the reference, float8, second derivatives.
"""

import functools
import gc
import importlib.metadata
import inspect
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS and Windows have no Triton
    triton = constexpr = None
try:
    from jaxtyping import Float, Integer
except ImportError:  # whoever imports transformers in this directory imports this file, too: see its end
    from typing import Annotated

    Float = Integer = Annotated

CUDA = torch.cuda.is_available()
IGNORE = -100  # the id of a masked token, torch's own convention
MAX_RANK = 32  # the tile of x Aᵀ stays in registers, without spills, up to this rank
FUSED_OUTPUTS = 2**21  # up to so many outputs, in 16 bits, one fused launch beats the vendor's three
# How many tokens' logits are made at a time: enough to make reading U worth it. On a CPU GPT-2's are 32 MB:
# glibc keeps a block of that size for the next chunk; a larger one comes from the system anew, page by page.
CHUNK_ROWS = 256 if CUDA else 160
KEPT_NUMBERS = 2**26  # logits kept from forward to backward, 268 MB; those of further tokens are made again
# For the row kernels: 8 logits a thread, one 16-byte load of bf16; nothing spills.
ROW_CONFIG = {"BLOCK_V": 2048, "num_warps": 8}
BLOCK_NUMBERS = 4 * 50257  # how much of a chunk the torch path takes at a time, to stay in a cache


# ---- Choosing a path ---------------------------------------------------------------------------------------


def path_taken(tensor: Tensor) -> str:
    """ "triton" or "torch": the one place that decides which path is open to an operation on this tensor.

    >>> path_taken(torch.zeros(1))
    'torch'
    """
    return "triton" if triton and tensor.is_cuda and tensor.dtype != torch.float64 else "torch"


def kernel(function):
    """`triton.jit` where there is Triton; elsewhere the source stands as documentation. Triton compiles the
    function itself, not what a type checker's import hook has wrapped around it."""
    return triton.jit(inspect.unwrap(function)) if triton else function


# ---- What comes in: dtypes, and errors that name the argument, what it was and what was expected -----------

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check(**arguments: tuple) -> None:
    """Each argument is a tensor (or None), its axes as in the signatures, and the dtypes it may have.
    The name of an axis stands for the same size wherever it occurs."""
    device, sizes = None, {}
    for name, (tensor, axes, dtypes) in arguments.items():
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        device = device or tensor.device  # that of the first
        if tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, expected {device}")
        letters, shape = axes.split(), tuple(tensor.shape)
        if letters[0] == "...":  # any number of axes, before the others
            leading = max(0, len(shape) - len(letters) + 1)
            shape = shape[:leading], *shape[leading:]
        own = dict(zip(letters, shape, strict=False))
        if len(letters) != len(shape) or own | sizes != sizes | own:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected [{axes}] where {sizes}")
        sizes |= own


def _flat_tokens(tokens: Integer[Tensor, "..."], V: int, temperature: float) -> Integer[Tensor, "N"]:
    """The ids as the kernels read them. An id outside the vocabulary is an error on CPU; on CUDA, where
    checking would stall, the kernel makes its whole row NaN."""
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}, expected a positive number")
    tokens = tokens.ravel().long()  # contiguous
    if tokens.device.type == "cpu":
        wrong = tokens[(tokens != IGNORE) & (tokens % V != tokens)]
        if len(wrong):
            raise ValueError(f"tokens: id {wrong[0].item()}, expected 0 to {V - 1}, or {IGNORE} where masked")
    return tokens


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under torch.autocast a matmul casts its inputs, but not float64; so do operations made of them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [None if one is None else one.to(torch.get_autocast_dtype(device)) for one in tensors]


def _outside_autocast(backward):
    """A backward pass computes in the dtypes of its forward pass, also under autocast; and only once."""

    @staticmethod
    def run(ctx, *g):
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("a second derivative of these operations")
        with torch.autocast(g[0].device.type, enabled=False):
            return backward(ctx, *g)

    return run


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of logits and statistics: float32 at least; float64 stays, for gradcheck."""
    return torch.promote_types(x.dtype, torch.float32)


def _even_parts(V: int) -> list[slice]:
    """0 to V in two parts: a multiple of 8, which tensor cores want, and the rest. GPT-2's V = 50,257 is odd,
    and products with it take six times as long in one piece.

    >>> _even_parts(50257)
    [slice(0, 50256, None), slice(50256, 50257, None)]
    """
    even = V // 8 * 8
    return [part for part in (slice(0, even), slice(even, V)) if part.start < part.stop]


def float32_linear(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, "d_out"] | None
) -> Float[Tensor, "... d_out"]:
    """x Wᵀ + b, added up and returned in float32, even if the inputs are bf16 or fp16. Without gradients the
    rows lie padded in memory.

    Why not return them in the inputs' dtype? bf16 has 8 bits: from 64 to 128 it counts in steps of 0.5. An
    offset that all logits share does not matter to a softmax, but it does to rounding, and GPT-2's logits lie
    at -35 to -100.

    >>> half = torch.ones(1, 1).bfloat16()
    >>> float32_linear(half, -80 * half, half[0] / 8)  # in bf16: -80
    tensor([[-79.8750]])
    """
    x, weight, bias = _autocast(x, weight, bias)
    V, wide = len(weight), _wide(x)
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():  # what is written in place below has no derivative, or a slow one
            out = rows.to(wide) @ weight.to(wide).T
        else:
            out = rows.new_empty(len(rows), -(-V // 64) * 64, dtype=wide)[:, :V]  # so that rows are aligned
            if x.is_cuda:
                for part in _even_parts(V):
                    torch.mm(rows, weight[part].T, out_dtype=wide, out=out[:, part])
            else:
                # W is taken in parts: a cast of all of it would cost half as much again as the product. And
                # the product is W xᵀ: with few rows in x, it takes two thirds of the time of x Wᵀ.
                columns = rows.to(wide).T
                for part in row_slices(V, 2048):
                    out[:, part] = (weight[part].to(wide) @ columns).T
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], V)


# ---- Token log-probability: the references -----------------------------------------------------------------


def _log_softmax(logits: Float[Tensor, "... V"], temperature: float) -> Float[Tensor, "... V"]:
    """log softmax(logits / τ), in float32 at least."""
    return (logits.to(_wide(logits)) / temperature).log_softmax(-1)


def _mean(log_p: Float[Tensor, "... V"], values: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """Σ p·values, where 0·∞ is 0: an impossible token has no weight."""
    p = log_p.exp()
    return (p * values.masked_fill(p == 0, 0)).sum(-1)


def _outputs(
    log_p: Float[Tensor, "... V"], log_q: Float[Tensor, "... V"] | None, tokens: Integer[Tensor, "..."]
) -> Float[Tensor, "3 ..."]:
    """log p(token), H = -Σ p log p, KL = Σ p (log p - log q) (0 without a reference); all 0 where masked."""
    tokens = tokens.long()
    logprobs = log_p.gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1)
    entropy = -_mean(log_p, log_p)
    kl = torch.zeros_like(entropy) if log_q is None else _mean(log_p, log_p - log_q)
    return torch.stack([logprobs, entropy, kl]).masked_fill(tokens == IGNORE, 0)


def token_logprobs_reference(
    logits: Float[Tensor, "... V"], tokens: Integer[Tensor, "..."], temperature: float = 1.0
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """log p(token) and the entropy of p = softmax(logits / τ), in float32 at least; 0 where masked.

    >>> [round(x.item(), 4) for x in token_logprobs_reference(torch.zeros(4), torch.tensor(2))]  # ∓log 4
    [-1.3863, 1.3863]
    """
    logprobs, entropy, _ = _outputs(_log_softmax(logits, temperature), None, tokens)
    return logprobs, entropy


def linear_token_logprobs_reference(
    hidden: Float[Tensor, "... D"],
    unembed: Float[Tensor, "V D"],
    tokens: Integer[Tensor, "..."],
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    ref_hidden: Float[Tensor, "... D_ref"] | None = None,
    ref_unembed: Float[Tensor, "V D_ref"] | None = None,
    ref_bias: Float[Tensor, "V"] | None = None,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."] | None]:
    """`token_logprobs` of hidden Uᵀ + b and, with `ref_hidden`, the exact KL = Σ p (log p - log q) to the
    reference (no gradient flows into it), whose output layer is `ref_unembed` and `ref_bias` or, without
    these, the policy's own. Rounds bf16 and fp16 logits, as plain torch does.

    >>> h, U = torch.tensor([0.0]), torch.tensor([[0.0], [1.0]])
    >>> linear_token_logprobs_reference(h, U, torch.tensor(1), ref_hidden=h + 1)[2]  # p = 1/2, q₁ = 0.731
    tensor(0.1201)
    """
    log_p = _log_softmax(linear(hidden, unembed, bias), temperature)
    if ref_hidden is None:
        logprobs, entropy, _ = _outputs(log_p, None, tokens)
        return logprobs, entropy, None
    head = (unembed, bias) if ref_unembed is None else (ref_unembed, ref_bias)
    log_q = _log_softmax(linear(ref_hidden, *head), temperature).detach()
    return tuple(_outputs(log_p, log_q, tokens))


# ---- Token log-probability: the kernels, one row of logits a program ---------------------------------------


@kernel
def _load_logits(pointers, mask, inv_temperature):
    """Logits divided by τ; -inf past the end of the row, where a lane is thus an impossible token."""
    return tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32) * inv_temperature


@kernel
def _below_maximum(x, m):
    """x less the new maximum; that maximum; and δ, by which it has grown."""
    m_new = tl.maximum(m, tl.max(x))
    return x - m_new, m_new, tl.minimum(m_new - m, 3.4e38)  # finite, so that δ e^-δ is 0 and not ∞·0


@kernel
def token_logprobs_forward_kernel(
    x_ptr,  # [N, V] policy logits, not yet divided by τ
    y_ptr,  # [N, V] reference logits, likewise; read only with HAS_REF
    tokens_ptr,  # [N]
    rows_ptr,  # [7, N] float32 out: log p(token), H, KL, max x, log Σ exp(x - max x), and these two of y
    N,
    V,
    stride,  # from one row of logits to the next
    inv_temperature,  # 1/τ
    HAS_REF: constexpr,
    BLOCK_V: constexpr,
):
    """Computes log p(token), H and KL of one row by an online log-sum-exp.
    Program: one row, BLOCK_V logits a step. Bytes: V·itemsize read (twice that with HAS_REF), 28 written.
    FLOPs: one exp and about 6 more a logit. Bound by bandwidth.

    With m the maximum so far, x̃ = x - m and ỹ = y - m_q, each lane adds up its own
        s = Σ exp x̃,   t = Σ exp(x̃) x̃,   u = Σ exp(x̃) (x̃ - ỹ),   s_q = Σ exp ỹ
    and when the maximum grows by δ (that of y by δ_q), every x̃ falls by δ (ỹ by δ_q):
        s ← s e^-δ,   t ← (t - δ s) e^-δ,   u ← (u - (δ - δ_q) s) e^-δ,   s_q ← s_q e^-δ_q.
    Then log p = x̃ - log s, H = log s - t/s, KL = u/s - log s + log s_q: no difference of large numbers.
    """
    row = tl.program_id(0).to(tl.int64)  # at V = 50,257 offsets pass 2³¹ in row 42,730
    x_ptr += row * stride
    rows_ptr += row
    lanes = tl.arange(0, BLOCK_V)
    m, m_q = -3.4028234663852886e38, -3.4028234663852886e38  # the least float32: no logit but -inf is less
    zeros = tl.zeros((BLOCK_V,), tl.float32)
    s, t, s_q, u = zeros, zeros, zeros, zeros
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        x = _load_logits(x_ptr + cols, cols < V, inv_temperature)
        x, m, delta = _below_maximum(x, m)
        shrink, e = tl.exp(-delta), tl.exp(x)
        if HAS_REF:
            y = _load_logits(y_ptr + row * stride + cols, cols < V, inv_temperature)
            y, m_q, delta_q = _below_maximum(y, m_q)
            s_q = s_q * tl.exp(-delta_q) + tl.exp(y)
            # p = 0 adds 0, even at q = 0; so does a p that shrinks to 0 here
            u = tl.where(shrink > 0, u * shrink - (delta - delta_q) * shrink * s, 0.0)
            u += tl.where(e > 0, e * (x - y), 0.0)
        t = t * shrink - delta * shrink * s + tl.where(e > 0, e * x, 0.0)
        s = s * shrink + e
    total = tl.sum(s)

    token = tl.load(tokens_ptr + row)
    kept = token != -100
    in_vocabulary = (token >= 0) & (token < V)
    # an id that no token has makes all of the row NaN, its gradient too
    log_s = tl.log(tl.where(in_vocabulary | ~kept, total, float("nan")))
    x_token = tl.load(x_ptr + token, mask=in_vocabulary).to(tl.float32)
    tl.store(rows_ptr, tl.where(kept, x_token * inv_temperature - m - log_s, 0.0))
    tl.store(rows_ptr + N, tl.where(kept, log_s - tl.sum(t) / total, 0.0))
    tl.store(rows_ptr + 3 * N, m)
    tl.store(rows_ptr + 4 * N, log_s)
    if HAS_REF:
        log_s_q = tl.log(tl.sum(s_q))
        tl.store(rows_ptr + 2 * N, tl.where(kept, tl.sum(u) / total - log_s + log_s_q, 0.0))
        tl.store(rows_ptr + 5 * N, m_q)
        tl.store(rows_ptr + 6 * N, log_s_q)


@kernel
def token_logprobs_backward_kernel(
    x_ptr,  # [N, V] policy logits, not yet divided by τ
    y_ptr,  # [N, V] reference logits, likewise; read only with HAS_REF
    tokens_ptr,  # [N]
    rows_ptr,  # [7, N] float32, written by the forward kernel
    coefficients_ptr,  # [4, N] float32: g_l, a, g_H, g_KL
    out_ptr,  # [N, V] out: dx / τ, in rows `stride` apart like the logits; may be x itself
    N,
    V,
    stride,  # from one row of logits to the next
    inv_temperature,  # 1/τ
    HAS_REF: constexpr,
    BLOCK_V: constexpr,
):
    """Computes dx / τ, dx = g_l onehot(token) + p (a - g_H log p + g_KL log(p/q)), see `_coefficients`.
    Program: one row, BLOCK_V logits a step. Bytes: 2 V·itemsize (3 with HAS_REF). Bound by bandwidth.
    """
    row = tl.program_id(0).to(tl.int64)
    rows_ptr += row
    coefficients_ptr += row
    token = tl.load(tokens_ptr + row)
    m, log_s = tl.load(rows_ptr + 3 * N), tl.load(rows_ptr + 4 * N)
    g_l, a = tl.load(coefficients_ptr), tl.load(coefficients_ptr + N)
    g_H, g_KL = tl.load(coefficients_ptr + 2 * N), tl.load(coefficients_ptr + 3 * N)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = _load_logits(x_ptr + row * stride + cols, cols < V, inv_temperature)
        log_p = x - m - log_s
        p = tl.exp(log_p)
        slope = a - g_H * log_p
        if HAS_REF:
            y = _load_logits(y_ptr + row * stride + cols, cols < V, inv_temperature)
            m_q, log_s_q = tl.load(rows_ptr + 5 * N), tl.load(rows_ptr + 6 * N)
            slope = slope + g_KL * (log_p - (y - m_q - log_s_q))
        dx = tl.where(p == 0, 0.0, p * slope) + tl.where(cols == token, g_l, 0.0)  # p log p → 0
        tl.store(
            out_ptr + row * stride + cols, (dx * inv_temperature).to(out_ptr.dtype.element_ty), mask=cols < V
        )


def _run_rows(
    kernel, x: Float[Tensor, "N V"], y: Float[Tensor, "N V"] | None, temperature: float, *tensors: Tensor
) -> None:
    """Launches one of the two kernels above; `tensors` are its arguments between y and N."""
    N, V = x.shape
    inputs = x, x if y is None else y, *tensors, N, V, x.stride(0), 1 / temperature
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, wherever the tensors are
        kernel[(N,)](*inputs, HAS_REF=y is not None, **ROW_CONFIG)


# ---- Token log-probability: either path, forward and backward ----------------------------------------------


def row_slices(N: int, step: int) -> list[slice]:
    """Rows 0 to N, at most `step` (and at least one) at a time, in parts as equal as can be.

    >>> row_slices(7, 3)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """
    count = -(-N // max(1, step))
    return [slice(i * N // count, (i + 1) * N // count) for i in range(count)]


def _minus(
    logits: Float[Tensor, "n V"], temperature: float, m: Float[Tensor, "n"], *tops: Float[Tensor, "n"]
) -> Float[Tensor, "n V"]:
    """logits / τ minus m and each of `tops`, one at a time: the sum of these would be rounded, and that
    would shift the whole row."""
    x = torch.add(-m[:, None], logits, alpha=1 / temperature)
    for top in tops:
        x -= top[:, None]
    return x


def _exponentials(logits: Float[Tensor, "n V"], temperature: float) -> tuple[Tensor, ...]:
    """x̃ = x - max x and exp x̃, both [n, V]; then Σ exp x̃, max x, and log Σ exp x̃, all [n]."""
    m = logits.amax(-1).to(_wide(logits)) / temperature
    x = _minus(logits, temperature, m)
    e = x.exp()
    s = e.sum(-1)
    return x, e, s, m, s.log()


def _statistics(
    logits: Float[Tensor, "N V"],
    ref_logits: Float[Tensor, "N V"] | None,
    tokens: Integer[Tensor, "N"],
    temperature: float,
) -> Float[Tensor, "7 N"]:
    """log p(token), H, KL, and the four rows from which the backward pass makes p and q again."""
    N, V = logits.shape
    rows = logits.new_zeros(7, N, dtype=_wide(logits))
    if path_taken(logits) == "triton":
        _run_rows(token_logprobs_forward_kernel, logits, ref_logits, temperature, tokens, rows)
        return rows
    for part in row_slices(N, BLOCK_NUMBERS // V):  # as the kernel above computes them, and in its symbols
        logprobs, entropy, kl, m, log_s, m_q, log_s_q = rows[:, part]  # views, filled here
        x, e, s, m[:], log_s[:] = _exponentials(logits[part], temperature)
        logprobs[:] = x.gather(1, tokens[part, None].clamp(min=0)).squeeze(1) - log_s
        if ref_logits is not None:
            y, _, _, m_q[:], log_s_q[:] = _exponentials(ref_logits[part], temperature)
            kl[:] = (x - y).mul_(e).nansum(-1) / s - log_s + log_s_q
        entropy[:] = log_s - e.mul_(x).nansum(-1) / s  # 0·∞ of an impossible token: NaN, counts as 0
    rows[:3].masked_fill_(tokens == IGNORE, 0)
    return rows


def _coefficients(g: tuple, rows: Float[Tensor, "7 N"], tokens: Integer[Tensor, "N"]) -> Float[Tensor, "4 N"]:
    """g_l, a, g_H, g_KL with which dx = g_l onehot(token) + p (a - g_H log p + g_KL log(p/q)), because

    ∂ log p(token)/∂x = onehot(token) - p,   ∂H/∂x = -p (log p + H),   ∂KL/∂x = p (log(p/q) - KL)
    so a = -g_l - g_H H - g_KL KL. For a masked token all four are 0.
    """
    g_l, g_H, g_KL = g
    _, entropy, kl, *_ = rows
    a = -g_l - g_H * entropy - g_KL * kl
    return torch.stack([g_l, a, g_H, g_KL]).masked_fill(tokens == IGNORE, 0)


def _write_gradient(
    out: Float[Tensor, "N V"],
    logits: Float[Tensor, "N V"],
    ref_logits: Float[Tensor, "N V"] | None,
    tokens: Integer[Tensor, "N"],
    rows: Float[Tensor, "7 N"],
    coefficients: Float[Tensor, "4 N"],
    temperature: float,
) -> None:
    """Writes into `out` the gradient to the logits, dx / τ with the dx of `_coefficients`. `out` may be the
    logits themselves, and has their strides."""
    if path_taken(logits) == "triton":
        tensors = tokens, rows.contiguous(), coefficients.contiguous(), out
        _run_rows(token_logprobs_backward_kernel, logits, ref_logits, temperature, *tensors)
        return
    N, V = logits.shape
    for part in row_slices(N, BLOCK_NUMBERS // V):
        g_l, a, g_H, g_KL = coefficients[:, part, None]
        _, _, _, m, log_s, m_q, log_s_q = rows[:, part]
        log_p = _minus(logits[part], temperature, m, log_s).clamp_(min=-1e30)  # no 0·∞ below
        p = log_p.exp()
        if ref_logits is not None:
            log_q = _minus(ref_logits[part], temperature, m_q, log_s_q).clamp_(min=-1e30)
            a = a + g_KL * (log_p - log_q)
        dx = log_p.mul_(-g_H).add_(a).mul_(p)
        dx.scatter_add_(1, tokens[part, None].clamp(min=0), g_l)
        torch.div(dx, temperature, out=out[part])


# ---- Token log-probability from logits ---------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    """Saves logits and tokens, in memory anyway, and the row statistics; the softmax is rebuilt from them."""

    @staticmethod
    def forward(ctx, logits: Float[Tensor, "N V"], tokens: Integer[Tensor, "N"], temperature: float):
        rows = _statistics(logits, None, tokens, temperature)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, tokens, rows)
        return tuple(row.clone() for row in rows[:3])

    @_outside_autocast
    def backward(ctx, *g: Float[Tensor, "N"]):
        logits, tokens, rows = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        coefficients = _coefficients(g, rows, tokens)
        _write_gradient(dlogits, logits, None, tokens, rows, coefficients, ctx.temperature)
        return dlogits, None, None


def token_logprobs(
    logits: Float[Tensor, "... V"], tokens: Integer[Tensor, "..."], temperature: float = 1.0
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """`token_logprobs_reference`, but each logit is read once, and no N·V numbers are kept but the gradient.

    >>> token_logprobs(torch.zeros(2, 4), torch.tensor([2, -100]))[1]
    tensor([1.3863, 0.0000])
    """
    _check(logits=(logits, "... V", FLOATS), tokens=(tokens, "...", INTEGERS))
    V = logits.shape[-1]
    inputs = logits.reshape(-1, V).contiguous(), _flat_tokens(tokens, V, temperature)
    logprobs, entropy, _ = _TokenLogprobs.apply(*inputs, temperature)
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


# ---- Token log-probability from hidden states --------------------------------------------------------------


def _chunks(tokens: Integer[Tensor, "N"]) -> list:
    """The rows whose logits are made at a time. Masked ones are left out, except with CUDA, where Python
    would have to wait for the GPU to know them."""
    if tokens.is_cuda:
        return row_slices(len(tokens), CHUNK_ROWS)
    kept = (tokens != IGNORE).nonzero().squeeze(1)
    return [kept[part] for part in row_slices(len(kept), CHUNK_ROWS)]


def _logits_of(part: slice | Tensor, *heads: Tensor | None) -> tuple[Float[Tensor, "n V"] | None, ...]:
    """Logits of policy and reference. heads: hidden states, unembedding and bias of each, or three None."""
    return tuple(h if h is None else float32_linear(h[part], U, b) for h, U, b in (heads[:3], heads[3:]))


class _LinearTokenLogprobs(torch.autograd.Function):
    """Goes by chunks of tokens: the vendor's matmul makes their logits, then come the row operations above.
    Backward takes a chunk's logits as they were kept, or makes them again, writes their gradient over them
    (in 16 bits beside them), and multiplies that gradient by U.

    Why not one kernel over vocabulary tiles (CCE, arXiv 2411.09009)? dh = dx U would need D accumulators a
    row, or atomics, and a KL would need two tiles of logits at once. Chunks let this and `token_logprobs`
    share their row kernels.
    The price on a GPU: U is read once a chunk, so a chunk of few tokens is bound by bandwidth.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Float[Tensor, "N D"],
        unembed: Float[Tensor, "V D"],
        bias: Float[Tensor, "V"] | None,
        tokens: Integer[Tensor, "N"],
        temperature: float,
        reference: tuple,  # hidden [N, D_ref], unembed [V, D_ref], bias [V] or None; three None: no KL
        may_keep: bool,  # False under no_grad, of which needs_input_grad does not know
    ):
        rows = hidden.new_zeros(7, len(hidden), dtype=_wide(hidden))
        ctx.temperature, ctx.kept = temperature, {}
        sides = 1 if reference[0] is None else 2
        to_keep = KEPT_NUMBERS // (sides * len(unembed)) if may_keep and any(ctx.needs_input_grad) else 0
        for i, part in enumerate(_chunks(tokens), 1):
            logits = _logits_of(part, hidden, unembed, bias, *reference)
            rows[:, part] = _statistics(*logits, tokens[part], temperature)
            if i * len(logits[0]) <= to_keep:
                ctx.kept[i] = logits
            del logits  # before the next ones are made
        ctx.save_for_backward(hidden, unembed, bias, tokens, rows, *reference)
        return tuple(row.clone() for row in rows[:3])

    @_outside_autocast
    def backward(ctx, *g: Float[Tensor, "N"]):
        hidden, unembed, bias, tokens, rows, *reference = ctx.saved_tensors
        coefficients = _coefficients(g, rows, tokens)
        wants_hidden, wants_unembed, wants_bias = ctx.needs_input_grad[:3]
        dhidden = torch.zeros_like(hidden) if wants_hidden else None
        dunembed = torch.zeros_like(unembed, dtype=rows.dtype) if wants_unembed else None
        dbias = torch.zeros_like(bias, dtype=rows.dtype) if wants_bias else None
        for i, part in enumerate(_chunks(tokens), 1):
            logits, ref_logits = ctx.kept.pop(i, None) or _logits_of(part, hidden, unembed, bias, *reference)
            inputs = tokens[part], rows[:, part], coefficients[:, part], ctx.temperature
            dlogits = logits  # in float32 their gradient takes their place
            if hidden.dtype != logits.dtype:
                dlogits = hidden.new_empty_strided(logits.shape, logits.stride())
            _write_gradient(dlogits, logits, ref_logits, *inputs)
            del logits, ref_logits
            if wants_bias:
                dbias += dlogits.sum(0, dtype=dbias.dtype)
            for ids in _even_parts(len(unembed)):
                if wants_hidden:
                    dhidden[part] += dlogits[:, ids] @ unembed[ids]
                if wants_unembed and hidden.dtype == dunembed.dtype:
                    dunembed[ids].addmm_(dlogits[:, ids].T, hidden[part])  # without a product as large as U
                elif wants_unembed:
                    dunembed[ids] += dlogits[:, ids].T @ hidden[part]
            del dlogits  # before the next one is made
        return dhidden, dunembed, dbias, None, None, None, None  # autograd rounds them to the weights' dtype


def linear_token_logprobs(
    hidden: Float[Tensor, "... D"],
    unembed: Float[Tensor, "V D"],
    tokens: Integer[Tensor, "..."],
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    ref_hidden: Float[Tensor, "... D_ref"] | None = None,
    ref_unembed: Float[Tensor, "V D_ref"] | None = None,
    ref_bias: Float[Tensor, "V"] | None = None,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."] | None]:
    """`linear_token_logprobs_reference` in bounded memory: one chunk of logits at a time, of which at most
    KEPT_NUMBERS wait for the backward pass.

    >>> h, U, tokens = torch.zeros(3, 2), torch.ones(4, 2), torch.tensor([0, 1, -100])
    >>> linear_token_logprobs(h, U, tokens, ref_hidden=h)[2]  # the reference is the policy
    tensor([0., 0., 0.])
    """
    hidden, unembed, bias, ref_hidden, ref_unembed, ref_bias = _autocast(
        hidden, unembed, bias, ref_hidden, ref_unembed, ref_bias
    )
    if ref_unembed is None and ref_bias is not None:
        raise ValueError("ref_unembed: None, expected a matrix beside ref_bias")
    if ref_hidden is None:
        if ref_unembed is not None:
            raise ValueError("ref_hidden: None, expected hidden states beside ref_unembed")
    elif ref_unembed is None:
        ref_unembed, ref_bias = unembed, bias
    same = (hidden.dtype,)
    _check(
        hidden=(hidden, "... D", FLOATS),
        unembed=(unembed, "V D", same),
        tokens=(tokens, "...", INTEGERS),
        bias=(bias, "V", same),
        ref_hidden=(ref_hidden, "... D_ref", same),
        ref_unembed=(ref_unembed, "V D_ref", same),
        ref_bias=(ref_bias, "V", same),
    )
    flat_tokens = _flat_tokens(tokens, len(unembed), temperature)
    flat, ref_flat = (h if h is None else h.reshape(-1, h.shape[-1]) for h in (hidden, ref_hidden))
    reference = ref_flat, ref_unembed, ref_bias
    inputs = flat, unembed, bias, flat_tokens, temperature, reference
    outputs = _LinearTokenLogprobs.apply(*inputs, torch.is_grad_enabled())
    logprobs, entropy, kl = (one.view(tokens.shape) for one in outputs)
    return logprobs, entropy, None if ref_hidden is None else kl


# ---- LoRA matmul -------------------------------------------------------------------------------------------


def lora_linear_reference(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, "d_out"] | None,
    lora_a: Float[Tensor, "rank d_in"],
    lora_b: Float[Tensor, "d_out rank"],
    scale: float,
) -> Float[Tensor, "... d_out"]:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ in the dtype of x, to which A and B are cast; W and b are frozen.

    >>> one = torch.ones(1, 1)
    >>> lora_linear_reference(one, one, None, 2 * one, 3 * one, 0.5)  # 1 + 0.5 · 2 · 3
    tensor([[4.]])
    """
    low_rank = (x @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T
    return linear(x, weight, bias) + scale * low_rank


@kernel
def lora_linear_kernel(
    x_ptr,  # [N, d_in] contiguous
    w_ptr,  # [d_out, d_in], any strides: nn.Linear's, or the transposed view of Conv1D's
    bias_ptr,  # [d_out]; read only with HAS_BIAS
    a_ptr,  # [rank, d_in] contiguous
    b_ptr,  # [d_out, rank] contiguous
    out_ptr,  # [N, d_out] out
    xa_ptr,  # [N, rank] out: x Aᵀ for the backward pass
    N,
    d_in,
    d_out,
    stride_w_out,
    stride_w_in,
    scale,
    HAS_BIAS: constexpr,
    RANK: constexpr,
    BLOCK_RANK: constexpr,
    BLOCK_N: constexpr,
    BLOCK_OUT: constexpr,
    BLOCK_IN: constexpr,
):
    """Computes x Wᵀ + b + s (x Aᵀ) Bᵀ for one tile [BLOCK_N, BLOCK_OUT] of the output.
    Program: one tile. Tiles come in groups of 8 rows of tiles, so that neighbours share W in L2.
    FLOPs: 2 N d_in d_out + 2 N rank (d_in + d_out). Bytes: x, W, out once if L2 is kind. Bound by matmul.
    Spares x Aᵀ and the output a trip to memory and back. The price is that every column of tiles computes
    x Aᵀ anew, 2 N d_in BLOCK_RANK · d_out / BLOCK_OUT instead of 2 N d_in rank.
    """
    tiles_n, tiles_out = tl.cdiv(N, BLOCK_N), tl.cdiv(d_out, BLOCK_OUT)
    pid = tl.program_id(0)
    first = pid // (8 * tiles_out) * 8
    height = min(tiles_n - first, 8)
    pid_n, pid_out = first + pid % (8 * tiles_out) % height, pid % (8 * tiles_out) // height
    rows = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    cols = (pid_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    ranks, inner = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_IN)
    out = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    xa = tl.zeros((BLOCK_N, BLOCK_RANK), tl.float32)
    for start in range(0, d_in, BLOCK_IN):
        i = start + inner
        # other=0: what lies past an edge adds nothing to a sum
        x = tl.load(x_ptr + rows * d_in + i, mask=(rows < N) & (i < d_in), other=0.0)
        i = i[:, None]
        w = tl.load(
            w_ptr + i.to(tl.int64) * stride_w_in + cols * stride_w_out,
            mask=(i < d_in) & (cols < d_out),
            other=0.0,
        )
        a = tl.load(a_ptr + ranks * d_in + i, mask=(ranks < RANK) & (i < d_in), other=0.0)
        out = tl.dot(x, w, out)
        xa = tl.dot(x, a, xa)
    b = tl.load(
        b_ptr + cols * RANK + ranks[:, None], mask=(ranks[:, None] < RANK) & (cols < d_out), other=0.0
    )
    out += scale * tl.dot(xa.to(b.dtype), b)
    if HAS_BIAS:
        out += tl.load(bias_ptr + cols, mask=cols < d_out, other=0.0).to(tl.float32)
    in_tile = (rows < N) & (cols < d_out)
    tl.store(out_ptr + rows * d_out + cols, out.to(out_ptr.dtype.element_ty), mask=in_tile)
    if pid_out == 0:
        in_rank = (rows < N) & (ranks < RANK)
        tl.store(xa_ptr + rows * RANK + ranks, xa.to(xa_ptr.dtype.element_ty), mask=in_rank)


def _lora_config(rank: int) -> dict:
    """Small tiles, since only small products come here (FUSED_OUTPUTS): so there are enough of them to fill a
    GPU. Tensor cores want several stages of loads in flight. A large rank takes registers, so its tiles are
    shallower: no configuration spills on sm_80 or sm_90.
    """
    return {
        "RANK": rank,
        "BLOCK_RANK": max(16, triton.next_power_of_2(rank)),
        "BLOCK_N": 64,
        "BLOCK_OUT": 64,
        "BLOCK_IN": 64 if rank <= 16 else 32,
        "num_warps": 4,
        "num_stages": 4,
    }


class _LoraLinear(torch.autograd.Function):
    """Calls the kernel. Saves x, in memory anyway, and x Aᵀ. Backward is plain matmuls, since products with
    the rank in them are too small to fuse; with g = s dy B, of width rank,

    dx = dy W + g A,   dA = gᵀ x,   dB = s dyᵀ (x Aᵀ).
    """

    @staticmethod
    def forward(
        ctx,
        x: Float[Tensor, "N d_in"],
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, "d_out"] | None,
        lora_a: Float[Tensor, "rank d_in"],
        lora_b: Float[Tensor, "d_out rank"],
        scale: float,
    ):
        (N, d_in), d_out, rank = x.shape, len(weight), len(lora_a)
        out, xa = x.new_empty(N, d_out), x.new_empty(N, rank)
        config = _lora_config(rank)
        grid = (triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(d_out, config["BLOCK_OUT"]),)
        with torch.cuda.device_of(x):
            lora_linear_kernel[grid](
                x.contiguous(),
                weight,
                x if bias is None else bias.contiguous(),
                lora_a.contiguous(),
                lora_b.contiguous(),
                out,
                xa,
                N,
                d_in,
                d_out,
                *weight.stride(),
                scale,
                HAS_BIAS=bias is not None,
                **config,
            )
        ctx.scale = scale
        ctx.save_for_backward(x, weight, lora_a, lora_b, xa)
        return out

    @_outside_autocast
    def backward(ctx, dy: Float[Tensor, "N d_out"]):
        x, weight, lora_a, lora_b, xa = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        g = ctx.scale * (dy @ lora_b)
        dx = (dy @ weight).addmm_(g, lora_a) if wants_x else None
        da = g.T @ x if wants_a else None
        db = ctx.scale * (dy.T @ xa) if wants_b else None
        return dx, None, None, da, db, None


def lora_linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, "d_out"] | None,
    lora_a: Float[Tensor, "rank d_in"],
    lora_b: Float[Tensor, "d_out rank"],
    scale: float,
) -> Float[Tensor, "... d_out"]:
    """`lora_linear_reference`; the kernel reads x once, the torch path adds up in place. The torch path takes
    a rank above MAX_RANK, more than FUSED_OUTPUTS outputs, and float32, which has no tensor cores to feed:
    there the vendor's three products took a third of the time of the kernel (1,088 tokens, 1,024², H200).

    >>> one = torch.ones(1, 1)
    >>> lora_linear(one, one, None, 2 * one, 3 * one, 0.5)  # 1 + 0.5 · 2 · 3
    tensor([[4.]])
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check(
        x=(x, "... d_in", FLOATS),
        weight=(weight, "d_out d_in", (x.dtype,)),
        bias=(bias, "d_out", (x.dtype,)),
        lora_a=(lora_a, "rank d_in", FLOATS),
        lora_b=(lora_b, "d_out rank", FLOATS),
    )
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and one.requires_grad:
            raise ValueError(f"{name}: requires a gradient, expected to be frozen")
    d_out, d_in = weight.shape
    rows, lora_a, lora_b = x.reshape(-1, d_in), lora_a.to(x.dtype), lora_b.to(x.dtype)
    is_small = len(lora_a) <= MAX_RANK and len(rows) * d_out <= FUSED_OUTPUTS
    if path_taken(x) == "triton" and is_small and x.dtype != torch.float32:
        out = _LoraLinear.apply(rows, weight, bias, lora_a, lora_b, scale)
    else:
        out = linear(rows, weight, bias).addmm_(rows @ lora_a.T, lora_b.T, alpha=scale)
    return out.view(*x.shape[:-1], d_out)


# ---- Replaying what a function launches --------------------------------------------------------------------


def call_watched(function, *inputs: Tensor) -> tuple[tuple, bool]:
    """What function(*inputs) returns, and whether it can be recorded: it cannot if Python waited in it for
    the GPU, to read a number from it or to copy one to it. Some models do (a mixture of experts, rotations
    that depend on the length), and during a recording that is an error. (A backward pass is not watched.)"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # also warns that it is a prototype and may miss some
        try:
            outputs = function(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return outputs, not any("called a synchronizing" in str(one.message) for one in caught)


class RecordedPass:
    """Calls `function`, which takes tensors and returns a tuple of them, through which gradients flow to the
    parameters that are trained. At the second call in a row with inputs of the same shapes, all that it
    launches on the GPU, forward and backward, is recorded once, and from then on replayed (a CUDA graph), if
    that is possible (`call_watched`): for a small kernel, Python takes ten times as long as the GPU.

    Each call overwrites what the one before it returned, gradients too: so be done with a call's backward
    pass, and with its gradients, before the next call. While it records, no autograd graph that reaches the
    parameters may be alive. The memory that a recording works on stays reserved until the next one.
    """

    def __init__(self, function, parameters):
        self.function, self.parameters = function, parameters
        self.shapes = self.replay = self.trained = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = [one.shape for one in inputs]
        if shapes != self.shapes:
            self.shapes = None
            if self.replay:
                self.replay = None
                gc.collect()  # frees the older recording, which refers to itself
            outputs, self.is_recordable = call_watched(self.function, *inputs)
            self.shapes = shapes
            return outputs
        if not self.is_recordable:
            return self.function(*inputs)
        if self.replay is None:
            if self.trained is None:
                gc.collect()  # frees the recordings of earlier models: trainer and model refer to each other
            self.trained = [one for one in self.parameters() if one.requires_grad]
            self.replay = torch.cuda.make_graphed_callables(
                lambda *tensors: self.function(*tensors[: len(inputs)]),
                (*(one.clone() for one in inputs), *self.trained),
                num_warmup_iters=0,
                allow_unused_input=True,
            )
        return self.replay(*inputs, *self.trained)


def replays(step) -> Iterator[tuple[Tensor, ...]]:
    """Yields what step() returns, again and again, without gradients. If step can be recorded, it is called
    only twice: from then on its launches are replayed on the same tensors, and overwrite what it returned."""
    outputs, is_recordable = call_watched(step)
    yield outputs
    again = step
    if is_recordable:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        again = graph.replay
    while True:
        yield again() or outputs


# ---- python kernels.py: the report -------------------------------------------------------------------------


def _timed(function, inputs: dict, trained: list[str], runs: int = 4) -> tuple[list | tuple, float]:
    """Outputs or, where inputs are trained, the gradients of the outputs' sum; and the median seconds of the
    last three runs, after one that warms up."""
    inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in trained}
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        outputs = function(**inputs)
        results = [one for one in (outputs if isinstance(outputs, tuple) else [outputs]) if one is not None]
        if trained:
            loss = sum(one.sum() for one in results)
            results = torch.autograd.grad(loss, [inputs[name] for name in trained])
        results[0].flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return results, statistics.median(seconds[-3:])


def _error(results: list | tuple, truth: list | tuple) -> float:
    """The largest of all errors, each relative to the largest number in its tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, truth, strict=True))


def report_speed(device: str, dtype: torch.dtype, N: int, V: int, D: int) -> None:
    """Prints error against float64, time and rate of each operation, beside those of its reference. For
    lora_linear N = d_in = d_out = D, which on a GPU takes the kernel."""
    draw = functools.partial(torch.randn, device=device, dtype=dtype)
    tokens, logits = torch.randint(V, (N,), device=device), draw(N, V)
    head = {"hidden": draw(N, D), "unembed": draw(V, D) / D**0.5, "tokens": tokens}
    layer = {"x": draw(D, D), "weight": draw(D, D) / D**0.5, "bias": None, "scale": 2.0}
    layer |= {"lora_a": draw(16, D) / D**0.5, "lora_b": draw(D, 16)}
    cases = [  # operation, its inputs, the trained ones; work forward, its factor with backward, and its unit
        ("token_logprobs", {"logits": logits, "tokens": tokens}, ["logits"], logits.nbytes / 1e9, 3, "GB/s"),
        ("linear_token_logprobs", head, ["hidden"], 2e-12 * N * V * D, 2, "TFLOP/s"),
        ("lora_linear", layer, ["x", "lora_a", "lora_b"], 2e-12 * D**3, 2, "TFLOP/s"),
    ]
    print(f"\n{device}, {dtype}; in brackets plain torch")
    for name, inputs, trainable, forward, more, unit in cases:
        ours, plain = globals()[name], globals()[name + "_reference"]
        exact = {
            k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()
        }
        for trained, work in ([], forward), (trainable, more * forward):
            truth, _ = _timed(plain, exact, trained)
            cells = []
            for function in (ours, plain):
                results, seconds = _timed(function, inputs, trained)
                cells.append((_error(results, truth), 1e3 * seconds, work / seconds))
            error, ms, rate = (f"{a:8.2g} ({b:.2g})" for a, b in zip(*cells, strict=True))
            passes = "and backward" if trained else "forward"
            print(f"{name:22} {passes:12} error {error} ms {ms} {unit} {rate}")


def peak_memory(device: str) -> int:
    """The most bytes that were ever in use: by this process or, on a GPU, by tensors as torch counts what is
    allocated (without what a recording holds in between)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(which: str, N: int = 4096, V: int = 50257) -> tuple[float, float]:
    """MB beyond the inputs, and seconds, forward and backward, for N x 768; needs a process of its own."""
    device = "cuda" if CUDA else "cpu"
    with torch.device(device):
        inputs = {"hidden": torch.randn(N, 768), "tokens": torch.randint(V, (N,))}
        unembed = torch.randn(V, 768).div_(28)
    if "KL" in which:
        inputs["ref_hidden"] = inputs["hidden"] + 0.1
    function = linear_token_logprobs_reference if "plain" in which else linear_token_logprobs
    for rows in (2, N):  # the first, small one compiles kernels and makes the library's own buffers
        before = peak_memory(device)
        first = {name: x[:rows] for name, x in inputs.items()}
        _, seconds = _timed(function, first | {"unembed": unembed}, ["hidden"], runs=1)
    return (peak_memory(device) - before) / 1e6, seconds


def report_memory() -> None:
    """Prints peak memory and time of plain torch and of ours, each measured in a process of its own."""
    print("linear_token_logprobs, 4,096 x 768, V = 50,257, float32, forward and backward")
    for which in ("plain torch", "ours", "plain torch, KL", "ours, KL"):
        printed = subprocess.check_output([sys.executable, __file__, which], text=True)
        megabytes, seconds = map(float, printed.split())
        print(f"{which:22} {megabytes:6.0f} MB {seconds:6.1f} s")


# transformers imports Hugging Face's package `kernels` and finds this file. Where that package is installed,
# both share the name: its modules are found below this one, and what this file lacks is looked up there.
__path__ = [str(one.locate_file("kernels")) for one in importlib.metadata.distributions(name="kernels")]
if __path__:

    def __getattr__(name: str):
        return getattr(importlib.import_module("kernels.__init__"), name)


if __name__ == "__main__":
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        print(*measure_memory(sys.argv[1]))
    else:
        report_memory()  # first: a child process starts from its parent's peak
        if CUDA:
            report_speed("cuda", torch.bfloat16, 8192, 50257, 1024)
        else:
            report_speed("cpu", torch.float32, 256, 50257, 768)
