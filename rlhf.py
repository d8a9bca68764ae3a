"""Reinforcement learning from human feedback on a real transformer, in one file, to be read from the top.

    policy, reference = one model twice: one is trained, the other stays as it was      # sections 3 and 4
    for phase in range(total_phases):
        completions = what the policy writes after the prompts                          # 2, 5  rollout phase
        rewards     = reward_fn(prompts, completions)                                   # 6
        advantages  = compute_advantages(rewards, values)                               # 7
        memory      = all of these, and what the reference makes of the completions     # 8
        for minibatch in memory, a few times over:                                      #       learning phase
            ρ         = p(token | policy now) / p(token | policy that wrote it)
            objective = mean of min(ρ Â, clip(ρ) Â) - β KL(policy ‖ reference) + entropy bonus  # 9
            one step of AdamW up the gradient of the objective                          # 10
        log one line                                                                    # 11

The algorithms differ in compute_advantages. PPO learns values too, and so its objective also has
- vf_coef (values - returns)²; GRPO and RLOO need none.

From reinforcement learning to language models:

    state        the text so far                 episode       one completion of a prompt
    action       the next token, one of V        environment   appends the token, and nothing else
    policy       the language model              reward        one number for the completion, at its end
    critic       the value head, a small network on the model's last hidden state: how much reward is to come?

What is different from PPO on CartPole:
  - The policy can write before it is trained, and is to change its ways without forgetting its language. So
    there is a reference, the model as it was, and a price β on leaving it: the KL penalty, its leash.
  - Any state can be started from again: K completions of one prompt can be compared, and their
    mean reward can do the critic's work (GRPO, RLOO).
  - There is one reward, at the end, and nothing is random but the policy itself: γ = λ = 1 is a good choice.
  - There are V actions, thousands. Entropy and KL are sums over all of them, at every token: that costs
    memory.
  - One forward pass sees all states of an episode, for each is the beginning of the next. Only drawing the
    tokens has to go one by one.

Notation   B completions in a batch, b in a minibatch   K completions in a group (of one prompt)
           P width of the prompts   C width of the completions   T = P + C columns
           D width of the residual stream   V size of the vocabulary   R reward functions
           L layers   H heads   In formulas: r reward, Â advantage, V_t value, ρ = π_θ / π_old the ratio of
           probabilities, ε where it is clipped, β = kl_coef. Log-probabilities, entropy and KL divergence are
           in nats: natural logarithms.
Papers     PPO 1707.06347   GAE 1506.02438   GRPO (DeepSeekMath) 2402.03300   RLOO 2402.14740
           LoRA 2106.09685
Course     ARENA, chapter 2.4 (RLHF). A table in README.md has each of its functions, the name here, and what
           differs and why.
Left out   because it would hide the idea: a reward for each token, a critic of its own (the value head shares
           the policy's trunk), dropout in the policy, samples of older phases.

    python rlhf.py --algo grpo --lora          trains the embedded toy model, in two minutes on a laptop
    python rlhf.py --kl-coef 0                 PPO without its leash: watch the mode collapse
    python rlhf.py compare runs/a runs/b       draws the curves of several runs over each other
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from kernels import linear_token_logprobs, lora_linear

# ---- 1 Settings --------------------------------------------------------------------------------------------
# In: the command line. Out: one frozen record that everything below reads. Each field is a flag, and its
# comment the flag's help. Bounds stand in the types, and `check_settings` in section 12 enforces them.

Count = Annotated[int, "at least 1"]
Amount = Annotated[float, "a finite number of at least 0"]


@dataclass(frozen=True)
class RLHFArgs:
    """Trains a language model by reinforcement learning; every field is a flag.

    >>> RLHFArgs(algo="grpo", batch_size=32).samples_per_prompt  # one prompt, so one group
    32
    """

    # The experiment
    algo: Literal["ppo", "grpo", "rloo"] = (
        "ppo"  # compares a reward with: critic's value, group mean, others' mean
    )
    base_model: str = (
        "tiny"  # `tiny` (embedded), a name that TransformerLens knows, a hub id, a local directory
    )
    reward: tyro.conf.UseAppendAction[
        tuple[str, ...]
    ] = ()  # periods, char:X, sentiment, classifier:MODEL[:LABEL], preferences:FILE, FILE.py:FUNCTION
    reward_weights: tuple[float, ...] = ()  # one for each --reward; by default 1
    gold_reward: str | None = None  # a reward that is logged, and never learned from
    prefix: str = "This is"  # the prompt that every completion continues
    prompts: Path | None = (
        None  # instead of the prefix: a file, one prompt a line, or JSON lines with "prompt"
    )
    seed: int = 0  # of the new weights (adapters, value head), of sampling and shuffling

    # Rollout phase: completions are drawn and judged
    total_phases: Count = 50  # rollout phase and learning phase, this many times
    batch_size: Count = 64  # completions in a rollout phase, of all processes together
    group_size: int | None = None  # completions of a prompt; by default all, with --prompts 8 (ppo: 1)
    gen_len: Count = 32  # tokens in a completion, at most
    temperature: float = 1.0  # divides the logits, when sampling and when learning alike
    top_k: Count | None = None  # draw from the k likeliest only; scored over all, so the gradient is biased
    normalize_reward: bool = True  # shift and scale the batch's rewards to mean 0 and standard deviation 1

    # Learning phase: the policy is moved towards what was better than expected
    batches_per_learning_phase: Count = 2  # passes over the memory (PPO's epochs)
    num_minibatches: Count = 4  # optimizer steps in each pass
    clip_coef: Amount = 0.2  # ε: nothing is gained by moving the ratio beyond 1 ± ε
    clip_high: Amount | None = None  # a higher upper end, 1 + this in place of 1 + ε (DAPO)
    kl_coef: Amount = (
        0.12  # β: the price of leaving the reference, the model as it was; 0 lets the policy collapse
    )
    kl_target: float | None = None  # adapt β until the KL is this, in nats a token
    kl_horizon: Count = 2560  # completions over which β adapts; a smaller horizon adapts faster
    kl_estimator: Literal["full", "k1", "k2", "k3"] = (
        "full"  # exact, or estimated from the sampled token alone
    )
    ent_coef: float = 0.02  # reward for uncertainty
    vf_coef: Amount = 0.15  # weight of the value loss (ppo)
    gamma: Amount = 1.0  # discount (ppo)
    gae_lambda: Amount = (
        1.0  # GAE's λ (ppo): 1 trusts the rewards alone, 0 the critic's next value (the course)
    )
    scale_by_group_std: bool = True  # divide by the group's standard deviation (grpo); without it, Dr. GRPO
    loss_average: Literal["sequence", "token", "constant"] = (
        "sequence"  # over what a token's loss is averaged
    )

    # What is trained, and how fast
    base_lr: Amount = 5e-4  # learning rate of the transformer, or of its adapters
    head_lr: Amount = 3e-3  # learning rate of the value head, which starts from nothing (ppo)
    warmup_steps: int = 3  # phases (not optimizer steps) over which the learning rates rise linearly
    final_scale: Amount = 0.1  # learning rates of the last phase, reached linearly, as a share of the peak
    max_grad_norm: Amount = 1.0  # longer gradients are shortened to this
    train_layers: Count | None = None  # train only this many of the last blocks (and the final norm)
    lora: bool = False  # train low-rank adapters and freeze the rest
    lora_rank: Count = 4  # rank of an adapter: its inner width
    lora_alpha: float = 32.0  # what an adapter adds is scaled by alpha / rank
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o")  # adapted matrices of each block; MLP: in, out, gate

    # The machine
    device: str = "auto"  # `auto` takes the first there is of cuda, mps and cpu
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # precision of the weights that LoRA freezes
    low_gpu_mem: bool = False  # gpt2 in place of gpt2-medium, and half the batch
    run_dir: Path | None = None  # where results go; by default runs/DATE-TIME-ALGO
    resume: Path | None = None  # a run directory: go on from its last checkpoint, with its settings
    save_every: Count = 10  # phases between checkpoints; Ctrl-C and SIGTERM leave one too
    track: Literal["wandb", "tensorboard"] | None = None  # send the metrics there, too

    def __post_init__(self):
        check_settings(self)

    @property
    def samples_per_prompt(self) -> int:
        """The size K of a group: as given; or of one prompt all completions, of many 8, and 1 with a
        critic."""
        if self.group_size is not None:
            return self.group_size
        if self.prompts is None:
            return self.batch_size
        return 1 if ALGORITHMS[self.algo].has_critic else math.gcd(self.batch_size, 8)


# ---- 2 Prompt to tokens ------------------------------------------------------------------------------------
# In: texts. Out: one rectangle of token ids. Prompts are padded on the left, so that every completion starts
# in column P and is padded on the right. This is one row, with P = 4 and C = 4; the rest of the file leans on
# it:
#
#     column            0     1     2     3  |  4     5     6     7
#     tokens           pad   BOS  This   is  |  a   test  EOS   pad
#     attention_mask    0     1     1     1  |  1     1     1     0
#     position          0     0     1     2  |  3     4     5     5    counted from the first real token
#     mask                                   |  1     1     1     0    EOS is an action, so it is trained
#     completion                             |  a   test  EOS  -100    -100 stands where mask is 0
#     scored by column                       |  3     4     5     6
#     logprobs                               | l_0   l_1   l_2    0    log π(token | everything to its left)
#     values                                 | V_0   V_1   V_2    0    what the critic expected before it
#     reward                                 |  0     0     r     0    falls on the last token
#
# The transformer's output in column t speaks of column t + 1: what scores the completion comes from columns
# P-1 to T-2. That shift is made once, in `TransformerWithValueHead.completion_features`; all [B, C] tensors
# below are aligned with the completion: logprobs[b, c] is of completion token c, values[b, c] of the state in
# which it was chosen. BOS, EOS and pad (beginning of text, end of text, filler) are one and the same token
# here, as in GPT-2: only the masks tell them apart.


def token_ids(tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens, behind a beginning-of-text token if the tokenizer has one."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer.encode(prompt, add_special_tokens=False)


def tokenize(tokenizer, prompts: list[str], device: str) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Token ids of the prompts, left-padded, and their mask."""
    rows = [torch.tensor(token_ids(tokenizer, prompt)) for prompt in prompts]
    masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    mask = pad_sequence(masks, batch_first=True, padding_side="left")
    tokens = pad_sequence(rows, True, tokenizer.eos_token_id, padding_side="left")
    return tokens.to(device), mask.to(device)


def positions(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Each column's position, counted from the row's first real token. Without them GPT-2 counts the padding
    too, and silently answers for another prompt.

    >>> positions(torch.tensor([[False, True, True, True]]))
    tensor([[0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def unpad(tokens: Int[Tensor, "B C"], mask: Bool[Tensor, "B C"]) -> list[list[int]]:
    """What is not masked, row by row.

    >>> unpad(torch.tensor([[7, 8], [9, 0]]), torch.tensor([[True, True], [True, False]]))
    [[7, 8], [9]]
    """
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


@dataclass
class Samples:
    """Completions behind their prompts: the picture, row by row."""

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    logprobs: Float[
        Tensor, "B C"
    ]  # of π_old, at the temperature used, over the whole vocabulary; 0 where masked
    values: Float[Tensor, "B C"]  # of the critic, 0 without one

    @property
    def prompt_width(self) -> int:
        return self.tokens.shape[1] - self.logprobs.shape[1]

    @property
    def mask(self) -> Bool[Tensor, "B C"]:
        """True on the completion's tokens, the end-of-text token included."""
        return self.attention_mask[:, self.prompt_width :]

    @property
    def completion(self) -> Int[Tensor, "B C"]:
        """The completion's tokens; -100 where masked."""
        return self.tokens[:, self.prompt_width :].masked_fill(~self.mask, -100)

    def texts(self, tokenizer) -> list[str]:
        """The completions as text, decoded behind the last token of the prompt: alone, Llama's would lose a
        leading space."""
        first = self.prompt_width - 1
        rows = unpad(self.tokens[:, first:], self.attention_mask[:, first:])
        starts = tokenizer.batch_decode([row[:1] for row in rows], skip_special_tokens=True)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.removeprefix(start) for text, start in zip(texts, starts, strict=True)]


# ---- 3 Tokens to logits and values -------------------------------------------------------------------------
# In: token ids and their mask. Out: `logits, values = model(tokens)`. For each column the logits say which
# token comes next, and the value how much reward the critic expects. From the logits come three numbers a
# token:


def get_logprobs(
    logits: Float[Tensor, "*rows V"],
    tokens: Int[Tensor, "*rows"],  # -100 where masked
    temperature: float = 1.0,
    ref_logits: Float[Tensor, "*rows V"] | None = None,
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"], Float[Tensor, "*rows"] | None]:
    """Log-probability of each token, entropy of the distribution it was drawn from and, where the reference's
    logits are given, the KL divergence to the reference, exactly:

        log π(token)      H = - Σ_v π(v) log π(v)      KL = Σ_v π(v) (log π(v) - log π_ref(v))

    All are 0 where the token is masked.

    >>> logprobs, entropy, kl = get_logprobs(torch.zeros(4), torch.tensor(2), ref_logits=torch.ones(4))
    >>> [round(x.item(), 2) for x in (logprobs, entropy, kl)]  # equal chances: -log 4, log 4, no distance
    [-1.39, 1.39, 0.0]
    """
    log_pi = (logits.float() / temperature).log_softmax(dim=-1)
    mask = tokens != -100
    logprobs = log_pi.gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1) * mask
    entropy = -(log_pi.exp() * log_pi).sum(dim=-1) * mask
    if ref_logits is None:
        return logprobs, entropy, None
    log_ref = (ref_logits.float() / temperature).log_softmax(dim=-1)
    kl = (log_pi.exp() * (log_pi - log_ref)).sum(dim=-1) * mask
    return logprobs, entropy, kl


# That is all there is to it; the price is memory, since V numbers a token are made to keep three (in GPT-2 V
# is 65 times D). So the model below hands on its features, the D numbers a token from which one matrix makes
# the logits, and `score` has from them the same three numbers without holding the logits: kernels.py makes a
# few rows of logits at a time, forward and backward.
#
# A TransformerBridge is TransformerLens' view of a Hugging Face model, a hook around each of its parts:
#     bridge.original_model              the Hugging Face model, made of the hooked parts: hooks fire here too
#     bridge.original_model.base_model   the same without its output layer
#     bridge.blocks[i].attn.q            a hooked part; .original_component is the nn.Linear or Conv1D inside
# The value head is such a hook, and any experiment of yours can be another.


class TransformerWithValueHead(nn.Module):
    """A language model, its hooks and, if asked for, a critic: the value head on its final residual stream.

    `bridge` is the TransformerLens model: `bridge.run_with_cache` and `bridge.run_with_hooks` work at any
    time.
    """

    def __init__(
        self, base_model: str, has_critic: bool = False, device: str = "cpu", dtype: str = "float32"
    ):
        super().__init__()
        # published: the weights by the names that they have in the model's files, for export
        self.bridge, self.published = load_bridge(base_model, device, dtype)
        self.logit_scale, self.soft_cap = read_head(self.bridge)
        self.value_head = None
        if has_critic:
            D = self.bridge.cfg.d_model
            self.value_head = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, 1)).to(device)
            nn.init.zeros_(self.value_head[-1].weight)  # at first the critic has no opinion, and no wrong one
            nn.init.zeros_(self.value_head[-1].bias)
        self.bridge.ln_final.hook_out.add_hook(self.read_values, is_permanent=True)

    def read_values(self, normalized_residual: Float[Tensor, "B T D"], hook) -> None:
        """TransformerLens hook on the final normalised residual stream; values are 0 without a critic."""
        if self.value_head is None:
            self.values = torch.zeros(normalized_residual.shape[:2], device=normalized_residual.device)
        else:
            self.values = self.value_head(normalized_residual.float()).squeeze(-1)

    def forward(
        self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T"]]:
        """Logits and values of every column: `logits, values = model(tokens)`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        features, values = self.features(tokens, attention_mask)
        return self.logits(features), values

    def features(
        self,
        tokens: Int[Tensor, "B new"],
        attention_mask: Bool[Tensor, "B all"],
        cache: DynamicCache | None = None,
    ) -> tuple[Float[Tensor, "B new D"], Float[Tensor, "B new"]]:
        """What the output layer sees, the final residual stream, normalised; and the values. The KV cache
        keeps keys and values of attention, so that of all columns only the new ones need be computed; the
        mask is of all."""
        output = self.bridge.original_model.base_model(
            input_ids=tokens,
            attention_mask=attention_mask.long(),
            position_ids=positions(attention_mask)[:, -tokens.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state, self.values

    def logits(self, features: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """The output layer: one matrix, in some models times a scale, in Gemma 2 under a soft cap."""
        logits = self.logit_scale * self.bridge.unembed(features)
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits

    @property
    def output_layer(self) -> tuple[Float[Tensor, "V D"], Float[Tensor, "V"] | None]:
        """The output layer's weight and bias."""
        layer = self.bridge.unembed.original_component
        return layer.weight, layer.bias

    def completion_features(self, samples: Samples) -> tuple[Float[Tensor, "B C D"], Float[Tensor, "B C"]]:
        """Features and values aligned with the completion: those of columns P-1 to T-2."""
        features, values = self.features(samples.tokens, samples.attention_mask)
        columns = slice(samples.prompt_width - 1, -1)
        return features[:, columns], values[:, columns]

    def score(
        self,
        features: Float[Tensor, "B C D"],
        tokens: Int[Tensor, "B C"],
        temperature: float = 1.0,
        ref_features: Float[Tensor, "B C D"] | None = None,
        reference: "TransformerWithValueHead | None" = None,
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Float[Tensor, "B C"] | None]:
        """get_logprobs(self.logits(features), tokens, temperature, reference.logits(ref_features)): the same
        numbers, without holding the logits."""
        if self.soft_cap:
            ref_logits = None if ref_features is None else reference.logits(ref_features)
            return get_logprobs(self.logits(features), tokens, temperature, ref_logits)
        weight, bias = self.output_layer
        ref_weight, ref_bias = (None, None) if ref_features is None else reference.output_layer
        temperature = temperature / self.logit_scale
        return linear_token_logprobs(
            features, weight, tokens, bias, temperature, ref_features, ref_weight, ref_bias
        )


# Try:  model = TransformerWithValueHead("tiny", has_critic=True)
#       logits, values = model(model.bridge.to_tokens("This is"))

# ---- 4 LoRA: what is trained -------------------------------------------------------------------------------
# In: a model. Out: the same model with its weights frozen and small trained matrices beside some of them:
#
#     h = W x + (α/rank) lora_b (lora_a x)     W: [d_out, d_in]   lora_a: [rank, d_in]   lora_b: [d_out, rank]
#
# (LoRA 2106.09685, eq. 3; the paper's A and B.) Why low rank: changing a model's ways takes few directions,
# and rank · (d_in + d_out) numbers in place of d_in · d_out are few to train, to keep AdamW's moments of, and
# to store: for a 1024 x 1024 matrix at rank 4 one in 128. Why lora_b starts at zero and lora_a random: the
# sum starts at W exactly, and yet lora_b gets a gradient; were both zero, neither would. Why α/rank: what r
# columns add up to grows with the rank; divided by it, one learning rate does for every rank. Switched off,
# the adapters leave the model that we started from, exactly: so the reference costs no second copy.


class LoRALinear(nn.Module):
    """h = W x + (α/rank) lora_b (lora_a x), W frozen.

    >>> layer = LoRALinear(nn.Linear(3, 2), rank=1, alpha=1.0)
    >>> torch.equal(layer(torch.ones(3)), layer.base(torch.ones(3)))
    True
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        d_out, d_in = self.matrix.shape
        self.lora_a = nn.Parameter(torch.empty(rank, d_in, device=base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(d_out, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale = alpha / rank
        self.enabled = True

    @property
    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        """W in the layout of nn.Linear; GPT-2's Conv1D stores it transposed."""
        return self.base.weight.t() if isinstance(self.base, Conv1D) else self.base.weight

    @property
    def weight(self) -> Tensor:
        """W as it is stored: TransformerLens asks its components for it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        if not self.enabled:
            return self.base(x)
        # self.base(x) + self.scale * (x @ self.lora_a.T) @ self.lora_b.T, with x read once
        return lora_linear(x, self.matrix, self.bias, self.lora_a, self.lora_b, self.scale)

    def merged(self) -> Tensor:
        """W + (α/rank) lora_b lora_a, as W is stored."""
        update = self.scale * self.lora_b @ self.lora_a
        update = update.t() if isinstance(self.base, Conv1D) else update
        return (self.base.weight.float() + update).to(self.base.weight.dtype)


def choose_trained(bridge: TransformerBridge, args: RLHFArgs) -> None:
    """Freezes all but what is to be trained: adapters, or the weights themselves, of all blocks or the last
    few.

    A LoRALinear takes the place of each target matrix inside of its hooks, which so see what LoRA adds.
    """
    blocks = list(bridge.blocks)[-(args.train_layers or 0) :]  # the last 0 are all
    if args.lora or args.train_layers:
        bridge.requires_grad_(False)
    if args.lora:
        for part in target_matrices(blocks, args.lora_targets):
            part.set_original_component(LoRALinear(part.original_component, args.lora_rank, args.lora_alpha))
    elif args.train_layers:
        nn.ModuleList([*blocks, bridge.ln_final]).requires_grad_(True)
    for block in bridge.blocks:
        if hasattr(block.attn, "qkv"):
            block.attn.qkv.requires_grad_(False)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within, the model is the one that LoRA started from."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


# ---- 5 Tokens to completion --------------------------------------------------------------------------------
# In: left-padded prompts. Out: completions, and what the policy thought of each token when it drew it: π_old
# needs no second forward pass.


@torch.no_grad()
def get_samples(
    policy: TransformerWithValueHead,
    prompt_tokens: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    gen_len: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Samples:
    """Draws a completion of up to gen_len tokens for each prompt, one column at a time.

    C is the length of the longest completion drawn, at most gen_len.
    """
    (B, P), device = prompt_tokens.shape, prompt_tokens.device
    eos = policy.bridge.tokenizer.eos_token_id
    # The sampler's own buffers, filled in place column by column.
    tokens = torch.cat([prompt_tokens, prompt_tokens.new_full((B, gen_len), eos)], dim=1)
    mask = torch.cat([prompt_mask, prompt_mask.new_zeros(B, gen_len)], dim=1)
    logprobs, values = torch.zeros(2, B, gen_len, device=device)
    cache = DynamicCache(config=policy.bridge.original_model.config)
    alive = torch.ones(B, dtype=torch.bool, device=device)
    for t in range(P, P + gen_len):
        new = slice(0 if t == P else t - 1, t)  # the whole prompt first, then the token just drawn
        features, state_values = policy.features(tokens[:, new], mask[:, :t], cache)
        distribution = (policy.logits(features[:, -1]).float() / temperature).log_softmax(dim=-1)
        drawable = distribution if top_k is None else keep_top_k(distribution, top_k)
        drawn = sample_token(drawable.exp(), generator)
        tokens[:, t] = torch.where(alive, drawn, tokens[:, t])
        mask[:, t] = alive
        logprobs[:, t - P] = distribution.gather(1, drawn[:, None]).squeeze(1) * alive
        values[:, t - P] = state_values[:, -1] * alive
        alive = alive & (drawn != eos)
        if not alive.any():
            break
    C = t + 1 - P  # columns that no completion has reached are cut off
    return Samples(tokens[:, : P + C], mask[:, : P + C], logprobs[:, :C], values[:, :C])


def sample_token(probs: Float[Tensor, "B V"], generator: torch.Generator | None) -> Int[Tensor, "B"]:
    """One token a row, by inverting the cumulative distribution: one random number a row, where
    torch.multinomial draws V of them (16 against 179 ms for 128 rows of GPT-2). Rows need not add up to 1.

    >>> sample_token(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 5.0]]), None).tolist()
    [1, 2]
    """
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    uniform = torch.rand(len(probs), 1, generator=generator, device=probs.device)
    # `right` passes over tokens of probability 0; where the product rounds up to the total, the minimum leads
    # back to the last token that has any.
    token = torch.searchsorted(cumulative, uniform * total, right=True)
    return torch.minimum(token, torch.searchsorted(cumulative, total)).squeeze(1)


def keep_top_k(logprobs: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """All but the k likeliest at -inf.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    tensor([[-inf, 3., 2.]])
    """
    kth = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1).values[:, -1:]
    return logprobs.masked_fill(logprobs < kth, -math.inf)


# ---- 6 Completion to reward --------------------------------------------------------------------------------
# In: prompts and completions as text. Out: one number each. A reward function has the signature that TRL's
# users know. The prompts come as examples: one dict each, with its text under "prompt" and the prompts file's
# other columns.

RewardFn = Callable[..., list[float]]


def reward_fn_char_count(char: str = ".") -> RewardFn:
    """The course's reward: how many there are of a character (or text), by default full stops.

    >>> reward_fn_char_count()(prompts=["This is", "This is"], completions=[" it. Yes.", " it"])
    [2.0, 0.0]
    """

    def count(prompts: list[str], completions: list[str], **columns) -> list[float]:
        return [float(completion.count(char)) for completion in completions]

    return count


class Reward(NamedTuple):
    """One term of the reward."""

    name: str  # under which its mean is logged
    function: RewardFn
    weight: float


def get_rewards(rewards: list[Reward], examples: list[dict], completions: list[str]) -> Float[Tensor, "B R"]:
    """What each of the R reward functions gives each completion; NaN where one does not apply. A function is
    called once for the whole batch, with the columns of the prompts file as lists."""
    columns = {key: [example[key] for example in examples] for key in examples[0]}
    prompts = columns.pop("prompt")
    return torch.tensor([call_reward(reward, prompts, completions, columns) for reward in rewards]).T


def total_reward(scores: Float[Tensor, "B R"], rewards: list[Reward]) -> Float[Tensor, "B"]:
    """The weighted sum of the terms that apply."""
    return scores.nan_to_num() @ scores.new_tensor([reward.weight for reward in rewards])


def centered(x: Float[Tensor, "*groups n"]) -> Float[Tensor, "*groups n"]:
    """Less their mean. The first one is taken off before: so equal numbers become exactly 0, not a rounding
    error, that a division by their standard deviation would blow up."""
    x = x - x[..., :1]
    return x - x.mean(dim=-1, keepdim=True)


def normalize_reward(rewards: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Mean 0 and standard deviation 1 over the batch; all 0 where all rewards are equal.

    PPO gains by it: kl_coef and vf_coef then mean the same whatever a reward's unit. GRPO and RLOO take the
    group's mean off anyway. On one prompt the batch is the group, and it has been divided by its deviation
    here already: so there GRPO with and without `scale_by_group_std` are the same, and RLOO is K/(K-1) times
    that.

    >>> normalize_reward(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.0000,  0.0000,  1.0000])
    """
    rewards = centered(rewards)
    return rewards / (rewards.std() + 1e-6) if len(rewards) > 1 else rewards


# ---- 7 Reward to advantage ---------------------------------------------------------------------------------
# In: a reward for each completion. Out: for each token, how much better it was than expected. The three
# algorithms differ in what they expected: the critic's value, the group's mean, or the mean of the others in
# the group. All take the same arguments, so that the trainer need not know which it calls; the rows of a
# group are neighbours.
#
# Why GRPO and RLOO can do without a critic: what the critic would say of the prompt, the expected reward, is
# estimated by the mean over K completions of that prompt. What they pay: K completions of each prompt, and
# one advantage for all tokens of a completion, the good ones and the bad ones; a critic can tell where in the
# text things got better.
#
# A completion cut off at gen_len is over like one that ended by itself: the reward is for the text as it
# stands, and nothing comes after it. (CartPole, cut off by a time limit, would have gone on; there V of the
# last state is added.)


def gae(
    rewards: Float[Tensor, "B"], values: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], args: RLHFArgs
) -> Float[Tensor, "B C"]:
    """Â_t = δ_t + γλ Â_{t+1} with δ_t = r_t + γ V_{t+1} - V_t (GAE 1506.02438, eq. 16; PPO 1707.06347, eq.
    11, 12).

    The reward falls on the last token; after it there is no state, V = 0. λ = 0 gives the one-step estimate
    δ_t.

    >>> values, mask, args = torch.tensor([[0.5, 0.2]]), torch.ones(1, 2).bool(), RLHFArgs(gae_lambda=0.0)
    >>> gae(torch.ones(1), values, mask, args)  # 0.2 - 0.5 and 1 - 0.2
    tensor([[-0.3000,  0.8000]])
    """
    values = values * mask  # so that V and Â are 0 past the end, and the recursion below needs no cases
    last_token = mask.sum(dim=1, keepdim=True) - 1
    token_rewards = torch.zeros_like(values).scatter(1, last_token, rewards[:, None])
    advantages = torch.zeros_like(values)
    next_value, next_advantage = 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + args.gamma * next_value - values[:, t]
        advantages[:, t] = delta + args.gamma * args.gae_lambda * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages


def group_relative(
    rewards: Float[Tensor, "B"], values: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], args: RLHFArgs
) -> Float[Tensor, "B C"]:
    """Â_{i,t} = (r_i - mean(r)) / std(r) within the group (DeepSeekMath 2402.03300, section 4.1.2).

    >>> rewards, one_token = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.ones(4, 1)
    >>> args = RLHFArgs(algo="grpo", batch_size=4)
    >>> group_relative(rewards, one_token, one_token.bool(), args).T  # mean 1, std √(2/3) = 0.8165
    tensor([[-1.2247,  0.0000,  0.0000,  1.2247]])
    """
    advantages = centered(rearrange(rewards, "(prompt K) -> prompt K", K=args.samples_per_prompt))
    if args.scale_by_group_std:
        advantages = advantages / (advantages.std(dim=1, keepdim=True) + 1e-6)
    return rearrange(advantages, "prompt K -> (prompt K) 1") * mask


def leave_one_out(
    rewards: Float[Tensor, "B"], values: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], args: RLHFArgs
) -> Float[Tensor, "B C"]:
    """Â_i = r_i - mean of the other rewards of the group = K/(K-1) (r_i - mean(r)) (RLOO 2402.14740, section
    2.2).

    >>> rewards, one_token = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.ones(4, 1)
    >>> args = RLHFArgs(algo="rloo", batch_size=4)
    >>> leave_one_out(rewards, one_token, one_token.bool(), args).T  # 0 - 4/3, 1 - 3/3, 1 - 3/3, 2 - 2/3
    tensor([[-1.3333,  0.0000,  0.0000,  1.3333]])
    """
    K = args.samples_per_prompt
    advantages = K / (K - 1) * centered(rearrange(rewards, "(prompt K) -> prompt K", K=K))
    return rearrange(advantages, "prompt K -> (prompt K) 1") * mask


# ---- 8 Replay memory ---------------------------------------------------------------------------------------
# In: one rollout phase. Out: shuffled minibatches, several times over. After its learning phase a memory is
# thrown away: its tokens are no longer what the policy would write.


@dataclass
class ReplayMemory(Samples):
    """All that is known of a phase's completions, or of some of them: row i of every field belongs to
    completion i."""

    advantages: Float[Tensor, "B C"]
    ref_features: Float[Tensor, "B C D"]  # of the reference, for the exact KL
    ref_logprobs: Float[Tensor, "B C"]  # for the estimates of it

    @property
    def returns(self) -> Float[Tensor, "B C"]:
        """What the critic should have said."""
        return self.advantages + self.values

    def __getitem__(self, rows: Int[Tensor, "b"]) -> "ReplayMemory":
        """These rows of every field."""
        return ReplayMemory(**{name: field[rows] for name, field in vars(self).items()})

    def get_minibatches(
        self, passes: int, count: int, generator: torch.Generator
    ) -> Iterator["ReplayMemory"]:
        """Goes through all rows `passes` times, each time in a new order and in `count` parts.

        >>> zeros, tokens = torch.zeros(4, 1), torch.zeros(4, 2).long()
        >>> samples = tokens, tokens == 0, zeros, zeros
        >>> memory = ReplayMemory(*samples, torch.arange(4.0)[:, None], zeros[..., None], zeros)
        >>> [m.advantages.T.tolist() for m in memory.get_minibatches(1, 2, torch.Generator().manual_seed(0))]
        [[[0.0, 1.0]], [[3.0, 2.0]]]
        """
        for _ in range(passes):
            order = torch.randperm(len(self.tokens), generator=generator, device=generator.device)
            for rows in order.to(self.tokens.device).chunk(count):
                yield self[rows]


# ---- 9 Advantage to objective ------------------------------------------------------------------------------
# In: what the policy says now of a minibatch, and what it said when it drew it. Out: one number to be
# maximised. All functions are pure; all [b, C] tensors are aligned with the completion.


class PolicyOutput(NamedTuple):
    """What the policy says now of a minibatch's completions; gradients flow through it."""

    logprobs: Float[Tensor, "b C"]
    entropy: Float[Tensor, "b C"]
    kl: Float[Tensor, "b C"]  # to the reference: exact or estimated
    values: Float[Tensor, "b C"]


def clip_range(args: RLHFArgs) -> tuple[float, float]:
    """Where the ratio stops paying: 1 - ε and 1 + ε, or a higher upper end (Clip-Higher of DAPO
    2503.14476)."""
    return 1 - args.clip_coef, 1 + (args.clip_coef if args.clip_high is None else args.clip_high)


def clipped_surrogate(
    logprobs: Float[Tensor, "b C"],
    old_logprobs: Float[Tensor, "b C"],
    advantages: Float[Tensor, "b C"],
    low: float,
    high: float,
) -> Float[Tensor, "b C"]:
    """min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â) with ρ = π_θ / π_old, token by token (PPO 1707.06347, eq. 7).

    Why clip: the advantages were measured on the old policy's completions; beyond 1 ± ε there is nothing to
    gain, so the gradient is 0 and the policy stays near. Why the minimum too: where ρ has gone the wrong way,
    say up with Â < 0, clip alone would have gradient 0 as well and never bring it back; the minimum takes ρ
    Â, the worse of the two.

    >>> ratio, old_logprobs = torch.tensor([[1.5, 1.5]]), torch.zeros(1, 2)
    >>> clipped_surrogate(ratio.log(), old_logprobs, torch.tensor([[1.0, -1.0]]), low=0.8, high=1.2)
    tensor([[ 1.2000, -1.5000]])
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def kl_estimate(
    logprobs: Float[Tensor, "b C"], ref_logprobs: Float[Tensor, "b C"], estimator: str
) -> Float[Tensor, "b C"]:
    """KL(π_θ ‖ π_ref) from the sampled token alone, with q = π_ref / π_θ (Schulman 2020,
    joschu.net/blog/kl-approx.html; k3 is DeepSeekMath 2402.03300, eq. 4):

        k1 = - log q      k2 = (log q)² / 2      k3 = q - 1 - log q

    For tokens drawn from π_θ, k1 and k3 are right on average, k2 is not. Of their gradients it is the other
    way round: only k2's is on average that of the KL; k1's is 0, and k3's that of KL(π_ref ‖ π_θ). `full` is
    right in both.

    >>> [round(kl_estimate(torch.zeros(1, 1), torch.ones(1, 1), k).item(), 3) for k in ("k1", "k2", "k3")]
    [-1.0, 0.5, 0.718]
    """
    log_q = ref_logprobs - logprobs
    return {"k1": -log_q, "k2": log_q.square() / 2, "k3": log_q.exp() - 1 - log_q}[estimator]


def masked_mean(
    x: Float[Tensor, "b C"], mask: Bool[Tensor, "b C"], average: str = "token", gen_len: int = 1
) -> Float[Tensor, ""]:
    """Averages what is not masked, in one of three ways:

    sequence   the mean of each completion, then the mean of these (GRPO)
    token      the mean of all tokens, so that a long completion counts for more (DAPO)
    constant   the sum of all tokens, divided by b · gen_len (Dr. GRPO)

    >>> x, mask = torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> [masked_mean(x, mask, average, gen_len=2).item() for average in ("sequence", "token", "constant")]
    [3.75, 3.0, 2.25]
    """
    x = x * mask
    if average == "sequence":
        return (x.sum(dim=1) / mask.sum(dim=1)).mean()
    return x.sum() / (mask.sum() if average == "token" else len(x) * gen_len)


def grpo_objective(new: PolicyOutput, old: ReplayMemory, kl_coef: float, args: RLHFArgs) -> Float[Tensor, ""]:
    """J = E[ min(ρ Â, clip(ρ) Â) - β KL ] + c_ent E[ entropy ] (DeepSeekMath 2402.03300, eq. 3; entropy is
    ours)."""
    surrogate = clipped_surrogate(new.logprobs, old.logprobs, old.advantages, *clip_range(args))
    per_token = surrogate - kl_coef * new.kl + args.ent_coef * new.entropy
    return masked_mean(per_token, old.mask, args.loss_average, args.gen_len)


def ppo_objective(new: PolicyOutput, old: ReplayMemory, kl_coef: float, args: RLHFArgs) -> Float[Tensor, ""]:
    """J_PPO = J - c_vf E[ (V - V_target)² ] (PPO 1707.06347, eq. 9, with a KL penalty), J as above and
    V_target = Â + V of when the completion was drawn: `old.returns`."""
    squared_error = (new.values - old.returns).square()
    value_loss = masked_mean(squared_error, old.mask, args.loss_average, args.gen_len)
    return grpo_objective(new, old, kl_coef, args) - args.vf_coef * value_loss


def adapt_kl_coef(kl_coef: float, kl: float, args: RLHFArgs) -> float:
    """β ← β (1 + clip(KL/target - 1, ±0.2) n/horizon) after n completions (1909.08593, section 2.2, where
    n/horizon is the constant K_β); fixed without a target.

    >>> adapt_kl_coef(1.0, 9.0, RLHFArgs(kl_target=1.0, kl_horizon=128))  # 8 is clipped: 0.2 · 64/128
    1.1
    """
    if args.kl_target is None:
        return kl_coef
    error = min(max(kl / args.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * args.batch_size / args.kl_horizon)


class Algorithm(NamedTuple):
    """All that tells one algorithm from another."""

    compute_advantages: Callable[..., Float[Tensor, "B C"]]
    objective: Callable[[PolicyOutput, ReplayMemory, float, RLHFArgs], Float[Tensor, ""]]
    has_critic: bool


ALGORITHMS = {
    "ppo": Algorithm(gae, ppo_objective, has_critic=True),
    "grpo": Algorithm(group_relative, grpo_objective, has_critic=False),
    # RLOO is REINFORCE; where ρ = 1, before the first update of a phase, the surrogate's gradient is the
    # same.
    "rloo": Algorithm(leave_one_out, grpo_objective, has_critic=False),
}


# ---- 10 Objective to update --------------------------------------------------------------------------------
# In: the settings. Out: a trained policy. All state lives in the trainer, and nothing here knows which
# algorithm runs. Several processes may share the work by rows, each with its part of the batch; the four
# helpers of the section "several processes" hide that, and on one process do nothing.


class RLHFTrainer:
    """Alternates rollout phases and learning phases: `RLHFTrainer(RLHFArgs(algo="grpo", lora=True)).train()`.

    What it does comes first; `__init__`, which sets up what it does it with, stands last.
    """

    def train(self) -> Path:
        """All phases that are still to come; returns the run directory."""
        args = self.args
        # autocast: matrix products in bfloat16 where `accelerate launch --mixed_precision bf16` asks for it
        with RunLog(self) as log, self.stop, self.accelerator.autocast():
            if self.phase == 0:
                log.samples("before", self.showcase())
            while self.phase < args.total_phases and not self.stop.is_requested():
                start = time.perf_counter()
                with saved_on_error(self):
                    memory, rollout, samples = self.rollout_phase()
                middle = time.perf_counter()
                learning = self.learning_phase(memory)
                rollout["rollout_seconds"] = middle - start
                learning["learning_seconds"] = time.perf_counter() - middle
                log.phase({"phase": self.phase} | rollout | learning, samples[:3])
                if self.phase % args.save_every == 0:
                    save_checkpoint(self)
            save_checkpoint(self)
            export(self)
            if self.phase == args.total_phases:
                log.samples("after", self.showcase())
        return self.run_dir

    @torch.no_grad()
    def rollout_phase(self) -> tuple[ReplayMemory, dict[str, float], list[dict]]:
        """Fills a memory; also returns the phase's metrics, and the completions as records for people to
        read."""
        args, accelerator = self.args, self.accelerator
        # A seed for each phase and process: going on after a stop needs no stored random state.
        self.generator.manual_seed(phase_seed(args.seed, self.phase, accelerator))
        # 1. Prompts, each K times in a row; of these the share of this process.
        examples = [one for one in self.examples_of(self.phase) for _ in range(args.samples_per_prompt)]
        examples = own_share(examples, accelerator)
        prompts = [example["prompt"] for example in examples]
        # 2. Completions, with π_old and the critic's values from the sampling pass itself.
        samples, texts = self.sample(prompts, self.generator)
        # 3. Rewards. A group may be spread over processes: so everybody's, with their completions and values.
        scores = gather_rows(get_rewards(self.rewards, examples, texts).to(self.device), accelerator)
        completion, values = (gather_rows(x, accelerator) for x in (samples.completion, samples.values))
        rewards = total_reward(scores, self.rewards)
        # 4. Advantages, and of them our own, as wide as our own completions.
        normal = normalize_reward(rewards) if args.normalize_reward else rewards
        advantages = self.algorithm.compute_advantages(normal, values, completion != -100, args)
        own_advantages = own_share(advantages, accelerator)[:, : samples.values.shape[1]]
        # 5. The reference's features, for the exact KL, and its log-probabilities, for estimates of it.
        with adapters_off(self.reference):
            ref_features, _ = self.reference.completion_features(samples)
        ref_logprobs, _, _ = self.reference.score(ref_features, samples.completion, args.temperature)
        memory = ReplayMemory(
            **vars(samples), advantages=own_advantages, ref_features=ref_features, ref_logprobs=ref_logprobs
        )
        metrics = rollout_metrics(completion, rewards, advantages, values, args)
        metrics |= term_means(scores, self.rewards)
        own_rewards, ref_logprob = own_share(rewards, accelerator).tolist(), ref_logprobs.sum(dim=1).tolist()
        shown = records(prompt=prompts, completion=texts, reward=own_rewards, ref_logprob=ref_logprob)
        return memory, metrics, shown

    def learning_phase(self, memory: ReplayMemory) -> dict[str, float]:
        """Goes through the memory batches_per_learning_phase times, then on to the next phase; returns
        metrics: means over all tokens of all minibatches, learning rate and β."""
        args, metrics, counts = self.args, [], []
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["peak_lr"] * lr_scale(self.phase, args)
        weights = list(self.trained.values())
        passes = args.batches_per_learning_phase
        for minibatch in memory.get_minibatches(passes, args.num_minibatches, self.generator):
            new = self.evaluate(minibatch)
            objective = self.algorithm.objective(new, minibatch, self.kl_coef, args)
            loss = -objective * gradient_weight(minibatch, args, self.accelerator)  # AdamW goes downhill
            self.optimizer.zero_grad()
            loss.backward()
            average_gradients(weights, self.accelerator)
            grad_norm = nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            check_gradient(grad_norm, self.phase)
            self.optimizer.step()
            metrics.append(minibatch_metrics(new, minibatch, args) | {"grad_norm": grad_norm.item()})
            counts.append(minibatch.mask.sum().item())
        means = weighted_mean(metrics, counts, self.accelerator)
        means |= {"lr": self.optimizer.param_groups[0]["lr"], "kl_coef": self.kl_coef}
        self.kl_coef = adapt_kl_coef(self.kl_coef, means["kl"], args)
        self.phase += 1
        return means

    # What the two phases are made of:

    def evaluate(self, minibatch: ReplayMemory) -> PolicyOutput:
        """What the policy says now of the minibatch's completions; gradients flow."""
        args = self.args
        features, values = self.policy.completion_features(minibatch)
        ref_features = minibatch.ref_features if args.kl_estimator == "full" else None
        logprobs, entropy, kl = self.policy.score(
            features, minibatch.completion, args.temperature, ref_features, self.reference
        )
        if kl is None:
            kl = kl_estimate(logprobs, minibatch.ref_logprobs, args.kl_estimator)
        return PolicyOutput(logprobs, entropy, kl, values)

    def examples_of(self, phase: int) -> list[dict]:
        """The B / K prompts of a phase: the file is gone through again and again, each time in another seeded
        order."""
        count, size = self.args.batch_size // self.args.samples_per_prompt, len(self.examples)
        epoch, skip = divmod(phase * count, size)
        epochs = range(epoch, epoch + (skip + count) // size + 1)
        orders = [np.random.default_rng((self.args.seed, one)).permutation(size) for one in epochs]
        return [self.examples[i] for i in np.concatenate(orders)[skip : skip + count]]

    def sample(self, prompts: list[str], generator: torch.Generator) -> tuple[Samples, list[str]]:
        """One completion of each prompt, as tokens and as text."""
        args = self.args
        tokens, mask = tokenize(self.tokenizer, prompts, self.device)
        samples = get_samples(
            self.policy, tokens, mask, args.gen_len, args.temperature, args.top_k, generator
        )
        return samples, samples.texts(self.tokenizer)

    def showcase(self) -> list[dict]:
        """Eight completions, drawn with the same random numbers before and after training."""
        examples = [self.examples[i % len(self.examples)] for i in range(8)]
        prompts = [example["prompt"] for example in examples]
        _, texts = self.sample(prompts, torch.Generator(self.device).manual_seed(self.args.seed))
        rewards = total_reward(get_rewards(self.rewards, examples, texts), self.rewards)
        return records(prompt=prompts, completion=texts, reward=rewards.tolist())

    def __init__(self, args: RLHFArgs):
        # What chooses, checks and loads is in section 12; at bad input it stops with one line.
        self.accelerator = Accelerator(cpu=is_cpu(args.device), log_with=args.track)
        self.run_dir = from_main_process(choose_run_dir, args)
        self.device = pick_device(args.device, self.accelerator)
        self.args = args = low_memory(args)
        check_processes(args, self.accelerator)
        self.algorithm = ALGORITHMS[args.algo]
        self.examples = load_examples(args.prefix, args.prompts)

        with self.accelerator.main_process_first():  # what is made on first use, like `tiny`, is made once
            self.rewards = load_rewards(args, self.run_dir, self.device)
            torch.manual_seed(
                args.seed
            )  # only now: a reward may have drawn, and all start from equal weights
            dtype = args.dtype if args.lora else "float32"
            self.policy = TransformerWithValueHead(
                args.base_model, self.algorithm.has_critic, self.device, dtype
            )
        self.tokenizer = self.policy.bridge.tokenizer
        check_context(self.policy.bridge, self.examples, args.gen_len)
        choose_trained(self.policy.bridge, args)
        self.reference = self.policy  # with LoRA the policy itself, its adapters off; else a second copy
        if not args.lora:
            self.reference = TransformerWithValueHead(args.base_model, device=self.device)
            self.reference.requires_grad_(False)

        self.trained = {
            name: weight for name, weight in self.policy.named_parameters() if weight.requires_grad
        }
        self.optimizer = get_optimizer(self.trained, args)
        self.generator = torch.Generator(self.device)
        self.phase, self.kl_coef = 0, args.kl_coef
        self.stop = StopSignals(self.accelerator)
        if args.resume:
            load_checkpoint(self)


def get_optimizer(trained: dict[str, nn.Parameter], args: RLHFArgs) -> torch.optim.Optimizer:
    """AdamW with one peak learning rate for the value head, which starts from nothing, and one for all else.

    No weight decay: it would pull full fine-tuning towards zero weights, and the KL term pulls to the
    reference.
    """
    head = [weight for name, weight in trained.items() if name.startswith("value_head")]
    base = [weight for name, weight in trained.items() if not name.startswith("value_head")]
    groups = [{"params": base, "peak_lr": args.base_lr}, {"params": head, "peak_lr": args.head_lr}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def lr_scale(phase: int, args: RLHFArgs) -> float:
    """Linear warm-up over warmup_steps phases, then linear decay to final_scale in the last one.

    >>> [round(lr_scale(phase, RLHFArgs(total_phases=5, warmup_steps=1)), 2) for phase in range(5)]
    [0.5, 1.0, 0.7, 0.4, 0.1]
    """
    warmup, last = args.warmup_steps, args.total_phases - 1
    if phase < warmup:
        return (phase + 1) / (warmup + 1)
    return 1 - (1 - args.final_scale) * min(1.0, (phase - warmup) / max(1, last - warmup))


# ---- 11 Update to log --------------------------------------------------------------------------------------
# In: one phase. Out: one dict of numbers, and from it a line, a JSON line and a picture.


def rollout_metrics(
    completion: Int[Tensor, "B C"],  # -100 where masked
    rewards: Float[Tensor, "B"],  # as they came, before any normalisation
    advantages: Float[Tensor, "B C"],
    values: Float[Tensor, "B C"],
    args: RLHFArgs,
) -> dict[str, float]:
    """What the rollout phase tells by itself."""
    mask = completion != -100
    metrics = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "completion_length": mask.sum(dim=1).float().mean().item(),
        "distinct_2": distinct_2(unpad(completion, mask)),
    }
    if ALGORITHMS[
        args.algo
    ].has_critic:  # 1 is a perfect critic, 0 one that knows the mean only, below 0 one that misleads
        unexplained, returns = (
            advantages[mask].var(correction=0),
            (advantages + values)[mask].var(correction=0),
        )
        metrics["explained_variance"] = (1 - unexplained / (returns + 1e-8)).item()
    return metrics


@torch.no_grad()
def minibatch_metrics(new: PolicyOutput, old: ReplayMemory, args: RLHFArgs) -> dict[str, float]:
    """Means over the minibatch's tokens."""
    low, high = clip_range(args)
    ratio = (new.logprobs - old.logprobs).exp()  # 1, up to rounding, in the first minibatch of a phase
    per_token = {
        "kl": new.kl,
        "entropy": new.entropy,
        "clip_fraction": ((ratio < low) | (ratio > high)).float(),
    }
    if ALGORITHMS[args.algo].has_critic:
        per_token["value_loss"] = (new.values - old.returns).square()
    return {name: masked_mean(x, old.mask).item() for name, x in per_token.items()}


def distinct_2(completions: list[list[int]]) -> float:
    """Distinct bigrams over all bigrams: mode collapse as a number (Li et al., 1510.03055). 0 without any
    bigram.

    >>> distinct_2([[1, 2, 1, 2], [3, 4]])   # (1, 2), (2, 1), (3, 4) of four
    0.75
    """
    bigrams = [pair for tokens in completions for pair in zip(tokens, tokens[1:], strict=False)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


# ==== The workshop: a first reader may stop here ======================================================================
# Files, errors, terminal, pictures and commands: what it takes to make of the lesson a program that others
# can use.

import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import runpy
import shutil
import signal
import sys
import sysconfig
import textwrap
import threading
import traceback
from collections import Counter
from datetime import datetime

import matplotlib.pyplot as plt
import safetensors.torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from matplotlib.colors import SymLogNorm
from rich.console import Console, Group
from rich.live import Live
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text
from transformer_lens import ActivationCache
from transformer_lens.tools.model_registry.registry_io import resolve_model_alias

console = Console(highlight=False, markup=False, emoji=False)  # what a model writes is no markup


class SettingError(ValueError):
    """Something the user gave is wrong; its message is the one line that `main` prints before it exits with
    2."""


def require(condition: bool, message: str) -> None:
    """Raises SettingError(message) unless the condition holds."""
    if not condition:
        raise SettingError(message)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever a library raises within becomes a SettingError: `what`, and the first line of its own
    message."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:
        raise SettingError(f"{what}: {first_line(error)}") from error


# ---- Several processes -------------------------------------------------------------------------------------
# What the trainer shares with its likes under torchrun or `accelerate launch`. Rows of the batch are shared
# out evenly; gradients and metrics become means over all. Of one process all of these are the identity.


def from_main_process(function: Callable, *arguments):
    """What the function returns to the first process, for all."""
    return broadcast_object_list([function(*arguments) if PartialState().is_main_process else None])[0]


def phase_seed(seed: int, phase: int, accelerator: Accelerator) -> int:
    return int(np.random.SeedSequence((seed, phase, accelerator.process_index)).generate_state(1)[0])


def own_share(rows, accelerator: Accelerator):
    """Of the rows of all processes, a list or a tensor, those of this one."""
    size = len(rows) // accelerator.num_processes
    return rows[accelerator.process_index * size :][:size]


def gather_rows(x: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes, one process after the other; the narrower ones are padded on the right with
    -100, so tokens are masked there."""
    return accelerator.gather(accelerator.pad_across_processes(x, dim=1, pad_index=-100))


def gradient_weight(minibatch: ReplayMemory, args: RLHFArgs, accelerator: Accelerator) -> float:
    """The weight of this process's gradient in the mean of all: where all tokens count alike, the process
    that has more of them must weigh more."""
    if args.loss_average != "token":
        return 1.0
    count = minibatch.mask.sum().float()
    return (count / accelerator.reduce(count, "mean")).item()


def average_gradients(weights: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over all processes; without the usual wrapper around the model, which would hide the bridge's
    hooks."""
    for weight in weights:
        if weight.grad is not None:
            weight.grad = accelerator.reduce(weight.grad, "mean")


def check_gradient(norm: Tensor, phase: int) -> None:
    message = f"phase {phase + 1}: the gradient is not finite; smaller learning rates may help"
    require(math.isfinite(norm), message)


def weighted_mean(
    metrics: list[dict[str, float]], counts: list[int], accelerator: Accelerator
) -> dict[str, float]:
    """Means over the minibatches of all processes, each weighted by its count of tokens."""
    sums = np.array(counts) @ np.array([[*one.values(), 1.0] for one in metrics])
    sums = torch.tensor(sums, dtype=torch.float32, device=accelerator.device)
    *totals, count = accelerator.reduce(sums, "sum").tolist()
    return {name: total / count for name, total in zip(metrics[0], totals, strict=True)}


def records(**columns: list) -> list[dict]:
    """One dict a row."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# ---- 11 goes on: files, terminal and pictures ------------------------------------------------------------------------


class RunLog:
    """The run directory and the terminal. Of several processes the first writes, the others are silent."""

    def __init__(self, trainer: RLHFTrainer):
        self.run_dir, self.accelerator = trainer.run_dir, trainer.accelerator
        self.is_main = self.accelerator.is_main_process
        self.batch_size = trainer.args.batch_size
        console.quiet = not self.is_main
        self.history: list[dict] = open_run_dir(trainer) if self.is_main else []
        start_tracker(trainer)
        self.bar = Progress(MofNCompleteColumn(), *Progress.get_default_columns(), console=console)
        self.task = self.bar.add_task("phases", total=trainer.args.total_phases, completed=trainer.phase)
        self.live = Live(self.bar, console=console, transient=True)

    def __enter__(self) -> "RunLog":
        self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        self.live.stop()
        self.accelerator.end_training()
        if self.history:
            plot_curves({self.run_dir.name: self.history}, self.run_dir / "curves.png")
            console.print(f"results in {self.run_dir}", soft_wrap=True)

    def append(self, file: str, *records: dict) -> None:
        if self.is_main:
            with open(self.run_dir / file, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def phase(self, metrics: dict, samples: list[dict]) -> None:
        """One line in metrics.jsonl, three in samples.jsonl, one in the terminal with the samples under
        it."""
        seconds = metrics["rollout_seconds"] + metrics["learning_seconds"]
        metrics["tokens_per_second"] = metrics["completion_length"] * self.batch_size / seconds
        metrics["peak_memory_mb"] = peak_memory_mb("cpu")
        self.append("samples.jsonl", *({"phase": metrics["phase"]} | sample for sample in samples))
        self.append("metrics.jsonl", metrics)
        self.accelerator.log(
            {name: x for name, x in metrics.items() if name != "phase"}, step=metrics["phase"]
        )
        if self.is_main:
            self.history.append(metrics)
        figures = "  ".join(
            f"{name} {metrics[name]:.2f}" for name in ("reward", "kl", "entropy", "distinct_2")
        )
        console.print(f"phase {metrics['phase']:>3}  {figures}  {metrics['tokens_per_second']:.0f} tokens/s")
        self.bar.update(self.task, completed=metrics["phase"])
        self.live.update(Group(sample_table(samples), self.bar))

    def samples(self, when: str, samples: list[dict]) -> None:
        """The showcase, into samples.jsonl and the terminal."""
        self.append("samples.jsonl", *({"phase": when} | sample for sample in samples))
        console.print(f"\nsamples {when} training")
        console.print(sample_table(samples[:4]))


def sample_table(samples: list[dict]) -> Table:
    """Reward, log-probability under the reference where known, and text."""
    figures = [name for name in ("reward", "ref_logprob") if name in samples[0]]
    table = Table(*figures, "sample", box=None, pad_edge=False)
    for sample in samples:
        text = printable((sample["prompt"] + sample["completion"]).replace("\n", "⏎"))
        table.add_row(*(f"{sample[name]:.3g}" for name in figures), text)
    return table


PANELS = {
    "reward": "mean reward",
    "kl": "KL to the reference, nats a token",
    "entropy": "entropy, nats a token",
    "distinct_2": "distinct bigrams: falls when the mode collapses",
}
# Okabe and Ito's colours, which the colour-blind tell apart, each with a style; 5 and 3 repeat after 15 lines
# only.
LINES = plt.cycler(
    color=["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#000000"] * 3, linestyle=["-", "-.", ":"] * 5
)
plt.rcParams.update({"font.size": 8, "axes.titlesize": 10, "axes.prop_cycle": LINES, "text.parse_math": False,
                     "figure.constrained_layout.use": True, "savefig.dpi": 110})  # fmt: skip


def plot_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """Reward, KL, entropy and distinct-2 over phases, one line a run; for several runs also reward against
    KL.

    A gold reward (Gao et al. 2210.10760) is dashed, on its own axis: where the two part, the policy has found
    what the learned reward gets wrong. Where a history holds key_low and key_high, as `average` makes them,
    that band is shaded.
    """
    rows = [["reward", "kl"], ["entropy", "distinct_2"], *([["frontier"] * 2] if len(runs) > 1 else [])]
    lines = sum(label.count("\n") + 1 for label in runs) if len(runs) > 1 else 0
    figure = plt.figure(figsize=(9, 2.75 * len(rows) + 0.2 * lines))
    axes = figure.subplot_mosaic(rows)
    for key, title in PANELS.items():
        draw_lines(axes[key], runs, key)
        axes[key].set(title=title, xlabel="phase")
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if any("gold_reward" in history[0] for history in runs.values()):
        gold = axes["reward"].twinx()
        draw_lines(gold, runs, "gold_reward", linestyle="--")
        for axis in (axes["reward"], gold):
            axis.autoscale(
                axis="y"
            )  # each from its lowest to its highest, since the scales have nothing in common
        gold.spines["top"].set_visible(False)
        ways = [plt.Line2D([], [], color="#595959", linestyle=style) for style in ("-", "--")]
        gold.legend(ways, ["trained on, left axis", "gold, right axis"], loc="lower right")
    if len(runs) > 1:
        for history in runs.values():
            kl, reward = [m["kl"] for m in history], [m["reward"] for m in history]
            axes["frontier"].plot(kl, reward, marker="o", markevery=[-1])
        title = "frontier: mean reward against KL; the dot is the last phase"
        axes["frontier"].set(title=title, xlabel=PANELS["kl"])
        figure.legend(*axes["reward"].get_legend_handles_labels(), loc="outside lower left", frameon=False)
    save_picture(figure, path)


def draw_lines(axis, runs: dict[str, list[dict]], key: str, **look) -> None:
    """One metric of every run, with its band; from 0 unless something is below."""
    for label, history in runs.items():
        phases = [m["phase"] for m in history]
        (line,) = axis.plot(phases, [m.get(key, math.nan) for m in history], label=label, **look)
        if f"{key}_low" in history[0]:
            band = ([m[f"{key}_{edge}"] for m in history] for edge in ("low", "high"))
            axis.fill_between(phases, *band, color=line.get_color(), alpha=0.2, linewidth=0)
    if axis.dataLim.y0 >= 0:
        axis.set_ylim(bottom=0)


def save_picture(figure: plt.Figure, path: Path) -> None:
    """Replaced whole, so that a reader never meets half a picture."""
    write_whole(path, lambda beside: figure.savefig(beside, format="png"))
    plt.close(figure)


# ---- 12 What the user brings -----------------------------------------------------------------------------------------
# In: settings and the files and names in them. Out: prompts, a model, a reward function, or one line that
# says why not.


def check_settings(args: RLHFArgs) -> None:
    """Raises SettingError for the first setting that cannot work, whatever the model."""
    require(args.algo in ALGORITHMS, f"--algo {args.algo}: unknown; expected one of {', '.join(ALGORITHMS)}")
    counts = "total_phases batch_size gen_len num_minibatches batches_per_learning_phase lora_rank top_k train_layers"
    for name in (*counts.split(), "kl_horizon", "save_every"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: must be at least 1")
    for flag, parts in {
        "num-minibatches": args.num_minibatches,
        "group-size": args.samples_per_prompt,
    }.items():
        divides = parts >= 1 and args.batch_size % parts == 0
        require(divides, f"--batch-size {args.batch_size}: must be divisible by --{flag} {parts}")
    alone = args.samples_per_prompt == 1 and not ALGORITHMS[args.algo].has_critic
    require(not alone, f"--group-size 1: --algo {args.algo} compares completions of a group; give at least 2")
    warm = 0 <= args.warmup_steps < args.total_phases
    require(
        warm, f"--total-phases {args.total_phases}: must be greater than --warmup-steps {args.warmup_steps}"
    )
    require(args.temperature > 0, f"--temperature {args.temperature}: must be positive; --top-k 1 is greedy")
    require(args.kl_target is None or args.kl_target > 0, f"--kl-target {args.kl_target}: must be positive")
    require(0 <= args.seed < 2**31, f"--seed {args.seed}: must be from 0 to 2147483647")
    amounts = "kl_coef vf_coef clip_coef clip_high base_lr head_lr max_grad_norm final_scale gamma gae_lambda"
    for name in amounts.split():
        value = getattr(args, name)
        message = f"--{name.replace('_', '-')} {value}: must be a number of at least 0"
        require(value is None or 0 <= value < math.inf, message)
    count = len(args.reward) or 1
    weighted = len(args.reward_weights) in (0, count)
    require(
        weighted,
        f"--reward-weights: {len(args.reward_weights)} given for {count} rewards; expected one for each",
    )
    installed = args.track is None or importlib.util.find_spec(args.track) is not None
    require(installed, f"--track {args.track}: is not installed; pip install {args.track}")
    frozen = args.lora or args.dtype == "float32"
    require(
        frozen, f"--dtype {args.dtype}: is for weights that stay frozen; give --lora too, or leave it float32"
    )


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a user's file that are not blank, each behind the words that say where it stands."""
    require(path.is_file(), f"{path}: no such file")
    with explained(f"{path}: is not UTF-8 text"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    require(bool(lines), f"{path}: is empty")
    return lines


def read_texts(where: str, line: str, *keys: str) -> dict:
    """The JSON object in a line, which must hold a text under each of the keys."""
    with explained(f"{where}: is not JSON"):
        row = json.loads(line)
    for key in keys:
        value = row.get(key) if isinstance(row, dict) else None
        found = "none" if value is None else f"a {type(value).__name__}"
        require(isinstance(value, str), f'{where}: expected a text under "{key}", found {found}')
    return row


def load_examples(prefix: str, path: Path | None) -> list[dict]:
    """Reads the prompts, one dict each with "prompt" and the file's other columns; the prefix alone without a
    file."""
    if path is None:
        return [{"prompt": prefix}]
    is_json, rows = path.suffix in (".jsonl", ".json"), []
    for where, line in read_lines(path):
        rows.append(read_texts(where, line, "prompt") if is_json else {"prompt": line})
        require(rows[-1].keys() == rows[0].keys(), f"{where}: its columns differ from line 1's")
        clash = min(rows[-1].keys() & {"prompts", "completions"}, default=None)
        require(clash is None, f"{where}: a column named {clash!r} would hide what a reward is given")
    return rows


def check_context(bridge: TransformerBridge, rows: list[dict], gen_len: int) -> None:
    """Raises SettingError if the longest prompt leaves no room for gen_len tokens in the model's context."""
    room = bridge.cfg.n_ctx - max(len(token_ids(bridge.tokenizer, row["prompt"])) for row in rows)
    require(gen_len >= 1, f"--gen-len {gen_len}: must be at least 1")
    message = f"--gen-len {gen_len}: the context of {bridge.cfg.n_ctx} leaves {room} tokens after the longest prompt"
    require(gen_len <= room, message)


def load_bridge(
    base_model: str, device: str, dtype: str = "float32"
) -> tuple[TransformerBridge, dict[str, Tensor]]:
    """Boots `tiny`, a name that TransformerLens knows, a hub id or a local directory; never runs a model's
    own code.

    Also returns the weights under the names that they have in the model's files: the bridge renames what it
    wraps.
    """
    with explained(f"--base-model {base_model}: cannot be loaded"):
        name = model_name(base_model)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(
            device
        )
        published = model.state_dict(keep_vars=True)
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, device=device, dtype=model.dtype, tokenizer=load_tokenizer(name)
        )
    check_cache(bridge)
    return bridge.eval(), published


@torch.no_grad()
def check_cache(bridge: TransformerBridge) -> None:
    """Raises SettingError if the KV cache stays empty, as it does from transformers 5.24 on, which renames
    the argument that TransformerLens 4.3 looks for: completions would ignore their prompts, silently."""
    cache = transformers.DynamicCache(config=bridge.original_model.config)
    bridge.original_model(
        torch.zeros(1, 2, dtype=torch.long, device=bridge.cfg.device), past_key_values=cache
    )
    versions = " and ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "transformer_lens")
    )
    message = f"{versions} leave the KV cache empty; pip install -r requirements.txt brings versions that fit"
    require(cache.get_seq_length() == 2, message)


def model_name(base_model: str) -> str:
    """What transformers calls it: a directory or a hub id."""
    return str(tiny_model()) if base_model == "tiny" else resolve_model_alias(base_model) or base_model


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    readable = bool(
        tokenizer.encode("This is text.", add_special_tokens=False)
    )  # without files: an empty vocabulary
    require(
        readable and tokenizer.eos_token_id is not None, f"{name}: has no tokenizer with an end-of-text token"
    )
    return tokenizer


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_head(bridge):
    config = bridge.original_model.config
    return getattr(config, "logit_scale", 1.0), getattr(config, "final_logit_softcapping", None)


def block_matrices(block: nn.Module) -> dict[str, nn.Module]:
    """A block's components that hold a matrix; not GPT-2's fused qkv, since the bridge computes with q, k and
    v."""
    parts = [*block.attn.named_children(), *block.mlp.named_children()]
    kinds = nn.Linear | Conv1D
    return {
        name: part
        for name, part in parts
        if name != "qkv" and isinstance(getattr(part, "original_component", None), kinds)
    }


def target_matrices(blocks: list[nn.Module], targets: tuple[str, ...]) -> list[nn.Module]:
    """The components that `--lora-targets` names, of every block."""
    matrices = [block_matrices(block) for block in blocks]
    for target in targets:
        known = ", ".join(matrices[0])
        require(target in matrices[0], f"--lora-targets {target}: no such matrix; expected of {known}")
    return [found[target] for found in matrices for target in targets]


def term_means(scores: Float[Tensor, "B R"], rewards: list[Reward]) -> dict[str, float]:
    """The mean of each term by its name, over the completions to which it applies."""
    means = scores.nanmean(dim=0).nan_to_num().tolist()
    return {reward.name: mean for reward, mean in zip(rewards, means, strict=True)}


def load_rewards(args: RLHFArgs, run_dir: Path, device: str) -> list[Reward]:
    """The terms of the reward, and with weight 0 what is only logged."""
    specs = args.reward or ("periods",)
    weights = args.reward_weights or (1.0,) * len(specs)
    names = [f"reward/{spec}" for spec in specs]
    if args.gold_reward:
        specs, weights, names = (*specs, args.gold_reward), (*weights, 0.0), [*names, "gold_reward"]
    functions = [load_reward(spec, args, run_dir, device) for spec in specs]
    return [Reward(*term) for term in zip(names, functions, weights, strict=True)]


def load_reward(spec: str, args: RLHFArgs, run_dir: Path, device: str) -> RewardFn:
    """The reward function that a --reward flag names."""
    kind, colon, rest = spec.partition(":")
    if spec == "periods":
        return reward_fn_char_count()
    if kind == "char" and rest:
        return reward_fn_char_count(rest)
    if spec == "sentiment":
        return classifier_reward("lvwerra/distilbert-imdb", "POSITIVE", device)
    if kind == "classifier" and rest:
        path, _, label = ("", "", "") if Path(rest).is_dir() else rest.rpartition(":")
        return classifier_reward(path or rest, label or None, device)
    if kind == "preferences" and rest:
        return preferences_reward(Path(rest), args, run_dir, device)
    path, colon, name = spec.rpartition(":")
    expected = "`periods`, `char:X`, `sentiment`, `classifier:MODEL[:LABEL]`, `preferences:FILE` or `FILE.py:FUNCTION`"
    require(bool(colon) and path.endswith(".py"), f"--reward {spec}: unknown; expected {expected}")
    require(Path(path).is_file(), f"--reward {spec}: there is no file {path}")
    try:
        function = runpy.run_path(path).get(name)
    except Exception as error:
        traceback.print_exc()
        raise SettingError(f"--reward {spec}: {path} raises {type(error).__name__} when loaded") from error
    require(callable(function), f"--reward {spec}: {path} has no function {name}")
    return function


def load_classifier(name: str, what: str, device: str, **options):
    """A sequence classifier and its tokenizer, padding on the right and cutting on the left."""
    with explained(f"{what}: cannot be loaded as a classifier"):
        model = (
            transformers.AutoModelForSequenceClassification.from_pretrained(name, **options)
            .float()
            .to(device)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, truncation_side="left", padding_side="right"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2's has none
    model.config.pad_token_id = tokenizer.pad_token_id  # by which the head finds the last token
    return model.eval(), tokenizer


def classify(model: nn.Module, tokenizer, texts: list[str]) -> Float[Tensor, "B labels"]:
    """Logits of the labels; of a text longer than the context, the end is kept."""
    width, logits = (
        min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2**20)),
        [],
    )
    for start in range(0, len(texts), 64):
        batch = [text or tokenizer.pad_token for text in texts[start : start + 64]]
        batch = tokenizer(batch, padding=True, truncation=True, max_length=width, return_tensors="pt")
        logits.append(model(**batch.to(model.device)).logits.float())
    return torch.cat(logits)


def classifier_reward(model: str, label: str | None, device: str) -> RewardFn:
    """Score of a sequence classifier for prompt and completion: the label's probability, or, of a reward
    model with one output, that output."""
    classifier, tokenizer = load_classifier(model, f"--reward classifier:{model}", device)
    labels = {name: number for number, name in classifier.config.id2label.items()}
    known = label in labels or (label is None and len(labels) == 1)
    require(
        known,
        f"--reward classifier:{model}:{label or ''}: no such label; expected one of {', '.join(labels)}",
    )

    @torch.no_grad()
    def score(prompts: list[str], completions: list[str], **columns) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        logits = classify(classifier, tokenizer, texts)
        if len(labels) == 1:
            return logits[:, 0].tolist()
        are_independent = classifier.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if are_independent else logits.softmax(-1))[:, labels[label]].tolist()

    return score


def call_reward(
    reward: Reward, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list[float]:
    """Calls a reward function and checks what it returns.

    None says, as in TRL, that the reward does not apply to a completion, and becomes NaN. Raises
    SettingError, naming the completion, for a count that is off, a NaN or infinity, or something that is no
    number; and, with its traceback shown once, for what the function itself raises.
    """
    where = f"reward function {reward.name.removeprefix('reward/')}"
    try:
        scores = reward.function(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        traceback.print_exc()
        raise SettingError(f"{where}: raised {type(error).__name__}: {first_line(error)}") from error
    require(hasattr(scores, "__iter__"), f"{where}: returned {scores!r}; expected a list of numbers")
    scores, count = list(scores), len(completions)
    require(len(scores) == count, f"{where}: returned {len(scores)} values for {count} completions")
    for i, (score, completion) in enumerate(zip(scores, completions, strict=True)):
        is_finite = score is None or (
            hasattr(score, "__float__") and math.isfinite(score)
        )  # which texts are not
        require(
            is_finite,
            f"{where}: value {i} is {score!r}, not a finite number, for the completion {completion!r}",
        )
    return [math.nan if score is None else float(score) for score in scores]


def is_cpu(device: str) -> bool:
    """Whether the CPU will do the work; accelerate has to be told, or its processes do not find each other
    there."""
    return device == "cpu" or (device == "auto" and not torch.accelerator.is_available())


def pick_device(device: str, accelerator: Accelerator) -> str:
    """Resolves `auto` and refuses what torch does not have here."""
    if device == "auto":
        return str(accelerator.device)
    with explained(f"--device {device}: not available here"):
        torch.empty(1, device=device)
    return device


def check_processes(args: RLHFArgs, accelerator: Accelerator) -> None:
    """Raises SettingError where processes were launched that did not find each other, or cannot share the
    work."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    message = f"{launched} processes were launched, but {accelerator.num_processes} found each other; check --device"
    require(launched == accelerator.num_processes, message)
    parts = accelerator.num_processes * args.num_minibatches
    message = (
        f"--batch-size {args.batch_size}: must be divisible by {accelerator.num_processes} processes times"
    )
    require(args.batch_size % parts == 0, f"{message} --num-minibatches {args.num_minibatches}")
    precision = accelerator.mixed_precision
    require(precision in ("no", "bf16"), f"mixed precision {precision}: not supported; expected no or bf16")


def low_memory(args: RLHFArgs) -> RLHFArgs:
    return args


def peak_memory_mb(device: str) -> float:
    import resource

    """Of the GPU where there is one, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# ---- 13 What outlives the run ----------------------------------------------------------------------------------------
# In: the trainer. Out: its run directory: checkpoints to go on from, and the result as PEFT and transformers
# load it. Whatever is written is written beside and then renamed, so that a kill at any moment leaves the
# last whole one.


def choose_run_dir(args: RLHFArgs) -> Path:
    """The directory of --resume, of --run-dir, or a new one by date and time; nobody's files are
    overwritten."""
    if args.resume:
        return args.resume
    now = datetime.now().strftime("%Y%m%d-%H%M%S.%f")[
        :-3
    ]  # to the millisecond: several runs may start together
    run_dir = args.run_dir or Path("runs") / f"{now}-{args.algo}{'-lora' if args.lora else ''}"
    message = (
        f"--run-dir {run_dir}: holds a run already; go on with it by --resume {run_dir}, or give another"
    )
    require(not (run_dir / "args.json").exists(), message)
    is_free = not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir()))
    require(is_free, f"--run-dir {run_dir}: is not an empty directory; give a new one")
    return run_dir


def read_settings(run_dir: Path) -> dict:
    """What args.json of a run says."""
    require((run_dir / "args.json").is_file(), f"{run_dir}: is no run directory, it holds no args.json")
    with explained(f"{run_dir / 'args.json'}: is damaged"):
        return json.loads((run_dir / "args.json").read_text(encoding="utf-8"))


def read_records(path: Path) -> list[dict]:
    """The lines of a file that RunLog appends to; the last may be torn, and then it does not count."""
    *lines, _torn = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    return [json.loads(line) for line in lines]


def saved_settings(run_dir: Path) -> RLHFArgs:
    """The settings of the run in this directory."""
    record, names = read_settings(run_dir), {field.name for field in dataclasses.fields(RLHFArgs)}
    settings = {name: tuple(x) if isinstance(x, list) else x for name, x in record.items() if name in names}
    require("base_model" in settings, f"{run_dir / 'args.json'}: holds no settings")
    paths = {name: Path(settings[name]) for name in ("prompts", "run_dir", "resume") if settings.get(name)}
    return RLHFArgs(**settings | paths)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file or directory written beside and renamed to its place."""
    beside, aside = (path.with_name(f"{path.name}.{os.getpid()}{end}.unfinished") for end in ("", ".old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        if beside.is_file():  # on the disk before the old one goes
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
        if (
            beside.is_dir() and path.is_dir()
        ):  # a file replaces a file by the renaming itself, and never a directory
            path.rename(aside)
        beside.rename(path)
    except OSError as error:
        raise SettingError(
            f"{path}: cannot be written ({error.strerror or error}); what was there is whole"
        ) from error
    finally:
        discard(beside)
        discard(aside)


def discard(path: Path) -> None:
    """Deletes a file or directory, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def open_run_dir(trainer: RLHFTrainer) -> list[dict]:
    """Writes args.json, or, in a run that goes on, forgets the phases after its checkpoint; returns the
    others."""
    run_dir, args = trainer.run_dir, trainer.args
    for orphan in (
        *run_dir.glob("*.unfinished"),
        *run_dir.glob("checkpoint/*.unfinished"),
    ):  # of a run that was killed
        discard(orphan)
    if not args.resume:
        versions = {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "transformer_lens")
        }
        versions["python"] = platform.python_version()
        record = dataclasses.asdict(args) | {
            "run_dir": run_dir,
            "running_on": trainer.device,
            "versions": versions,
        }
        text = json.dumps(record, indent=2, default=str) + "\n"
        write_whole(run_dir / "args.json", lambda path: path.write_text(text, encoding="utf-8"))
    kept = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        records, done = (
            read_records(run_dir / name),
            ["before"] * bool(trainer.phase) + [*range(1, trainer.phase + 1)],
        )
        kept[name] = [record for record in records if record["phase"] in done]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept[name])
        write_whole(run_dir / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return kept["metrics.jsonl"]


def fingerprint(trainer: RLHFTrainer) -> str:
    """Of the model that training starts from, which a checkpoint holds only in part."""
    weights = trainer.reference.published.values()
    count, norm = (
        sum(weight.numel() for weight in weights),
        sum(weight.float().norm().item() for weight in weights),
    )
    return f"{len(weights)} tensors of {count} numbers, norms {norm:.5g}"


def save_checkpoint(trainer: RLHFTrainer) -> None:
    """checkpoint/phase-N.safetensors: trained weights, moments of AdamW, β. All else follows from settings
    and phase.

    The one before is kept, in case that this one is damaged later.
    """
    if not trainer.accelerator.is_main_process:
        return
    directory = trainer.run_dir / "checkpoint"
    finite = all(weight.isfinite().all() for weight in trainer.trained.values())
    advice = "what was saved before is kept; smaller learning rates may help"
    require(finite, f"phase {trainer.phase}: the weights are no longer finite; {advice}")
    tensors = {}
    for name, weight in trainer.trained.items():
        moments = trainer.optimizer.state.get(weight, {})
        tensors |= {name: weight.detach()} | {f"{name}@{key}": value for key, value in moments.items()}
    state = {
        "phase": str(trainer.phase),
        "kl_coef": trainer.kl_coef.hex(),
        "base_model": fingerprint(trainer),
    }
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, state)
    write_whole(directory / f"phase-{trainer.phase:05}.safetensors", lambda path: path.write_bytes(data))
    for old in sorted(directory.glob("phase-*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(trainer: RLHFTrainer) -> None:
    """Goes back to the newest checkpoint that is whole; with none at all, the run begins anew."""
    directory = trainer.run_dir / "checkpoint"
    foreign = [path for path in directory.glob("*") if not path.name.startswith("phase-")]
    refused = "is no checkpoint of this program, and a pickle could run code; move it away"
    require(not foreign, f"{foreign[0] if foreign else directory}: {refused}")
    paths = sorted(directory.glob("phase-*.safetensors"), reverse=True)
    if not paths:
        return
    for path in paths:
        try:
            with safetensors.safe_open(path, "pt", device=trainer.device) as file:
                state, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            break
        except (OSError, safetensors.SafetensorError) as error:
            console.print(f"{path}: is damaged ({first_line(error)}); trying the one before", soft_wrap=True)
    else:
        raise SettingError(
            f"--resume {trainer.run_dir}: no checkpoint is whole; begin anew in another directory"
        )
    require("base_model" in (state or {}), f"{path}: is no checkpoint of this program; move it away")
    same = state["base_model"] == (here := fingerprint(trainer))
    require(
        same, f"--resume {trainer.run_dir}: its base model was another: {state['base_model']}; here {here}"
    )
    shapes = {name: tensor.shape for name, tensor in tensors.items() if "@" not in name}
    same = shapes == {name: weight.shape for name, weight in trainer.trained.items()}
    require(same, f"{path}: holds other weights than these settings train; was args.json changed?")
    for name, weight in trainer.trained.items():
        weight.data.copy_(tensors[name])
        moments = {
            key.rpartition("@")[2]: value for key, value in tensors.items() if key.rpartition("@")[0] == name
        }
        if moments:
            trainer.optimizer.state[weight] = moments
    trainer.phase, trainer.kl_coef = int(state["phase"]), float.fromhex(state["kl_coef"])


@contextlib.contextmanager
def saved_on_error(trainer: RLHFTrainer) -> Iterator[None]:
    """A reward function that fails must not take with it what was learned before."""
    try:
        yield
    except Exception:
        save_checkpoint(trainer)
        raise


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM asks for a stop after the phase; a second one stops at
    once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received, self.before = accelerator, 0, {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self.before = {
                number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)
            }

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.received = number
        self.__exit__()
        console.print("stopping after this phase; once more to stop at once")

    def is_requested(self) -> bool:
        """Whether any process was asked to."""
        received = torch.tensor(float(self.received), device=self.accelerator.device)
        self.received = int(self.accelerator.gather(received).max())
        return self.received > 0


def start_tracker(trainer: RLHFTrainer) -> None:
    """Opens what --track names, through accelerate."""
    args = trainer.args
    if args.track is None:
        return
    trainer.accelerator.project_configuration.set_directories(str(trainer.run_dir))
    with explained(f"--track {args.track}: cannot be opened"):
        settings = {name: str(value) for name, value in dataclasses.asdict(args).items()}
        trainer.accelerator.init_trackers("rlhf", settings, {"wandb": {"dir": str(trainer.run_dir)}})


def export(trainer: RLHFTrainer) -> None:
    """Writes model/ and, with LoRA, adapter/."""
    if not trainer.accelerator.is_main_process:
        return
    policy, source = trainer.policy, trainer.args.base_model
    write_whole(trainer.run_dir / "model", lambda path: export_model(policy, path))
    if trainer.args.lora:
        write_whole(
            trainer.run_dir / "adapter", lambda path: export_adapter(policy, model_name(source), path)
        )


def fused_rows(attn: nn.Module) -> dict[str, Int[Tensor, "rows"]]:
    """Which output rows of a fused query-key-value matrix belong to q, k and v; GPT-2 stacks them, NeoX
    alternates by head. Found by having the bridge split a matrix whose every row holds its own number."""
    fused = attn.qkv.original_component
    is_conv1d, weight = isinstance(fused, Conv1D), fused.weight.data
    rows = torch.arange(weight.shape[1 if is_conv1d else 0], device=weight.device, dtype=torch.float32)
    try:
        fused.weight.data = (
            rows.expand(len(weight), -1) if is_conv1d else rows[:, None].expand(-1, weight.shape[1])
        )
        parts = attn.split_qkv_matrix(attn.original_component)
    finally:
        fused.weight.data = weight
    return {name: part.weight[:, 0].detach().long() for name, part in zip("qkv", parts, strict=True)}


@torch.no_grad()
def trained_weights(policy: TransformerWithValueHead) -> dict[str, Tensor]:
    """The model's weights as its files name and store them, adapters merged in."""
    layers = [module for module in policy.bridge.modules() if isinstance(module, LoRALinear)]
    merged = {
        id(layer.weight): layer.merged() for layer in layers
    }  # by the identity of the tensor that it replaces
    weights = {name: merged.get(id(weight), weight.detach()) for name, weight in policy.published.items()}
    for block in policy.bridge.blocks:
        if not hasattr(block.attn, "qkv"):
            continue
        fused = block.attn.qkv.original_component
        weight, bias = (
            fused.weight.detach().clone(),
            None if fused.bias is None else fused.bias.detach().clone(),
        )
        matrix = weight.t() if isinstance(fused, Conv1D) else weight
        for part, rows in fused_rows(block.attn).items():
            ours = getattr(block.attn, part).original_component
            matrix[rows] = merged.get(id(ours.weight), ours.weight)
            if bias is not None:
                bias[rows] = ours.bias
        new = {id(fused.weight): weight, id(fused.bias): bias}
        weights |= {name: new[id(old)] for name, old in policy.published.items() if id(old) in new}
    return weights


def export_model(policy: TransformerWithValueHead, path: Path) -> None:
    """An ordinary Hugging Face directory with tokenizer and generation config."""
    model = policy.bridge.original_model
    config = copy.deepcopy(model.config)
    config._attn_implementation = None  # eager was for the hooks
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(config)
    shell.generation_config = model.generation_config
    shell.save_pretrained(path, state_dict=trained_weights(policy))
    policy.bridge.tokenizer.save_pretrained(path)


@torch.no_grad()
def export_adapter(policy: TransformerWithValueHead, source: str, path: Path) -> None:
    """A PEFT directory. On a fused matrix the adapters of q, k and v become one, block-diagonal, of rank 3
    r."""
    layers = {
        id(layer.base.weight): layer for layer in policy.bridge.modules() if isinstance(layer, LoRALinear)
    }
    named = {
        name.removesuffix(".weight"): layers.get(id(weight)) for name, weight in policy.published.items()
    }
    adapters = {
        name: (layer.lora_a, layer.lora_b) for name, layer in named.items() if layer
    }  # by the module's name
    for block in policy.bridge.blocks:
        if not hasattr(block.attn, "qkv"):
            continue
        fused = block.attn.qkv.original_component.weight
        name = next(name for name, weight in policy.published.items() if weight is fused).removesuffix(
            ".weight"
        )
        parts = {part: getattr(block.attn, part).original_component for part in "qkv"}
        parts = {part: layer for part, layer in parts.items() if isinstance(layer, LoRALinear)}
        if parts:
            rows = fused_rows(block.attn)
            lora_a = torch.cat([layer.lora_a for layer in parts.values()])
            lora_b = lora_a.new_zeros(sum(map(len, rows.values())), len(lora_a))
            lora_b[torch.cat([rows[part] for part in parts])] = torch.block_diag(
                *(p.lora_b for p in parts.values())
            )
            adapters[name] = lora_a, lora_b
    layer = next(iter(layers.values()))
    rank = len(layer.lora_a)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in policy.bridge.modules()),
        "r": rank,
        "lora_alpha": layer.scale * rank,
        "target_modules": list(adapters),
        "rank_pattern": {name: len(a) for name, (a, _) in adapters.items() if len(a) != rank},
        "alpha_pattern": {name: layer.scale * len(a) for name, (a, _) in adapters.items() if len(a) != rank},
    }
    tensors = {}
    for name, (a, b) in adapters.items():
        prefix = f"base_model.model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": a.contiguous(), f"{prefix}.lora_B.weight": b.contiguous()}
    path.mkdir()
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- 14 The embedded model -------------------------------------------------------------------------------------------
# In: the English that every Python carries. Out: `tiny`, a GPT-2 of a million parameters, as a Hugging Face
# directory.


def tiny_model() -> Path:
    """Directory of the embedded model under ~/.cache/rlhf (or RLHF_CACHE); trains it on first use, in a
    minute."""
    cache = Path(os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf")
    path = cache / "tiny-1"  # the number changes when what follows does
    if not path.exists():
        console.print(f"training the embedded model once, into {path}", soft_wrap=True)
        write_whole(path, train_tiny)
    return path


def english_prose() -> list[str]:
    """Plain English sentences from Python's language reference and the standard library's docstrings.

    Code, doctests, grammar and tables fall away because a sentence here is a capital, then words and ordinary
    punctuation, then a full stop; and one with rare words (names, mostly) is dropped, so that a small model
    can learn the words that remain. What stood together stays together.
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    outside = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "encodings",
    }
    files = [
        path for path in sorted(library.rglob("*.py")) if not outside & set(path.relative_to(library).parts)
    ]
    sources = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    texts = [
        *topics.values(),
        *(doc for source in sources for doc in re.findall(r'(?sm)^ *r?"""(.*?)"""', source)),
    ]
    is_sentence = re.compile(r"[A-Z](?:(?![a-z][A-Z]|\(\)|--)[A-Za-z ,;:'\"()/-]|\.(?=[,)\"]))+\.").fullmatch
    quotes = str.maketrans("‘’“”", "''\"\"", "*`")
    documents, seen = [], set()
    for text in texts:
        sentences = []
        for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text.expandtabs()).translate(quotes)):
            for sentence in re.split(r"(?<=\.) (?=[A-Z])", " ".join(paragraph.split()).removeprefix("- ")):
                if is_sentence(sentence) and len(sentence.split()) >= 4 and sentence not in seen:
                    sentences.append(sentence)
                    seen.add(sentence)
        documents.append(sentences)
    words = re.compile(r"[a-z]+").findall
    frequency = Counter(word for sentence in seen for word in words(sentence.lower()))
    kept = (
        [s for s in sentences if min(map(frequency.get, words(s.lower()))) >= 10] for sentences in documents
    )
    return [" ".join(sentences) for sentences in kept if sentences]


def train_tiny(path: Path, steps: int = 900, rows: int = 8, width: int = 64) -> None:
    """Trains tokenizer and model from scratch and saves both; the same on every run with the same Python."""
    generator = torch.Generator().manual_seed(0)
    prose = english_prose()
    prose = [prose[i] for i in torch.randperm(len(prose), generator=generator)]
    # Eight docstrings make a document, since most are one sentence: text should not end after every full
    # stop.
    documents = [" ".join(prose[i : i + 8]) for i in range(0, len(prose), 8)]
    tokenizer = transformers.GPT2Tokenizer().train_new_from_iterator(documents, 1200, show_progress=False)
    tokenizer.pad_token = tokenizer.eos_token  # <|endoftext|>, of id 0, begins a document too
    tokens = torch.tensor([id for ids in tokenizer(documents).input_ids for id in (0, *ids)])
    held_out, tokens = tokens[: len(tokens) // 20], tokens[len(tokens) // 20 :]
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        activation_function="gelu_pytorch_tanh",  # gelu_new, fused
        initializer_range=0.05, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
    starts = (torch.randint(len(tokens) - width, (rows, 1), generator=generator) for _ in range(steps))
    batches = (tokens[start + torch.arange(width)] for start in starts)
    losses = (model(batch, labels=batch).loss for batch in batches)
    fit(model, losses, steps, "tiny", lr=4e-3, betas=(0.9, 0.99), weight_decay=0.1)
    with torch.no_grad():
        batch = held_out[: len(held_out) // width * width].view(-1, width)
        loss = model(batch, labels=batch).loss.item()
    console.print(f"held-out loss {loss:.2f} nats a token, {model.num_parameters():,} parameters")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def fit(model: nn.Module, losses: Iterator[Tensor], steps: int, title: str, lr: float, **adamw) -> None:
    """One step of AdamW down each loss; the learning rate rises for a tenth of the steps, then falls to
    zero."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, **adamw)
    rises_then_falls = lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rises_then_falls)
    model.train()
    with Progress(console=console, transient=True) as bar:
        for loss in bar.track(
            losses, total=steps, description=title
        ):  # each is computed when it is asked for
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.eval()


# ---- 15 People to preferences ----------------------------------------------------------------------------------------
# In: pairs of completions, and one key from a person for each. Out: a preferences file, a JSON line an
# answer, each on disk before the next pair is shown. Where to go on follows from that file and the list of
# skips beside it alone.

KEYS = "[l] left is better   [r] right is better   [s] skip   [u] undo   [q] quit"


def label(
    file: Path,
    base_model: str = "tiny",
    prefix: str = "This is",
    prompts: Path | None = None,
    pairs: int = 200,
    gen_len: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Shows two completions side by side; one key says which is better, and the answer is appended to a file.

    Args:
        file: the preferences, JSON lines; an earlier session goes on where it ended
        base_model: `tiny`, a name that TransformerLens knows, a hub id, or a local directory
        prefix: the prompt that every completion continues
        prompts: instead of the prefix, a file, one prompt a line, or JSON lines with "prompt"
        pairs: stop when the file holds this many answers
        gen_len: tokens in a completion, at most
        temperature: divides the logits
        seed: fixes the sequence of pairs
        device: `auto` takes the first there is of cuda, mps and cpu
    """
    RLHFArgs(gen_len=gen_len, temperature=temperature, seed=seed)  # the same limits
    rows = load_examples(prefix, prompts)
    policy = TransformerWithValueHead(base_model, device=pick_device(device, Accelerator(cpu=is_cpu(device))))
    check_context(policy.bridge, rows, gen_len)
    sampling = {"seed": seed, "gen_len": gen_len, "temperature": temperature}
    ask(file, pairs, functools.partial(draw_pair, policy, rows, **sampling))


def draw_pair(
    policy: TransformerWithValueHead, rows: list[dict], number: int, answers: list[str], seed: int, **sampling
) -> tuple[str, str, str]:
    """Pair `number` of the sequence that the seed fixes: a prompt and two different completions, left and
    right.

    While they are equal, or among the answers, both are drawn anew: so which stands on the left is a fair
    coin.
    """
    prompt, tokenizer, device = (
        rows[number % len(rows)]["prompt"],
        policy.bridge.tokenizer,
        policy.bridge.cfg.device,
    )
    generator = torch.Generator(device).manual_seed(1_000_003 * seed + number)
    tokens, mask = tokenize(tokenizer, [prompt, prompt], device)
    for _ in range(20):
        drawn = get_samples(policy, tokens, mask, generator=generator, **sampling)
        left, right = drawn.texts(tokenizer)
        if left != right and not {preference(prompt, left, right), preference(prompt, right, left)} & {
            *answers
        }:
            return prompt, left, right
    raise SettingError(f"label: nothing new for {prompt!r} in 20 draws; raise --temperature or --gen-len")


def ask(file: Path, pairs: int, draw: Callable[[int, list[str]], tuple[str, str, str]]) -> None:
    """Shows pairs and stores answers until the file holds `pairs` of them, or a key or the end of input says
    stop."""
    skips = file.with_name(file.name + ".skipped")
    answers = whole_lines(file, "prompt", "chosen", "rejected")
    skipped = {json.loads(line)["pair"] for line in whole_lines(skips)}
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(keypresses()) as keys:
        while len(answers) < pairs:
            number = next_number(len(answers), skipped)
            prompt, left, right = draw(number, answers)
            show_pair(prompt, left, right, f"pair {len(answers) + 1} of {pairs}")
            key = next((key for key in keys if key in "lrsuq"), "q")
            if key == "q":
                break
            if key == "s":
                skipped.add(number)
                append_line(skips, json.dumps({"pair": number}))
            elif key == "u":
                rewrite(file, answers := answers[:-1])
            else:
                answers.append(
                    preference(prompt, left, right) if key == "l" else preference(prompt, right, left)
                )
                append_line(file, answers[-1])
            console.print({"l": "left", "r": "right", "s": "skipped", "u": "undone"}[key])
    console.print(f"{len(answers)} answers in {file}; the same command goes on from here", soft_wrap=True)


def next_number(answered: int, skipped: set[int]) -> int:
    """Every pair before the next one is answered or skipped; an answer undone makes its pair the next one
    again.

    >>> next_number(3, skipped={1, 4})   # 0, 2 and 3 are answered
    5
    """
    unskipped = (number for number in itertools.count() if number not in skipped)
    return next(itertools.islice(unskipped, answered, None))


def preference(prompt: str, chosen: str, rejected: str) -> str:
    """One line of a preferences file."""
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False)


def show_pair(prompt: str, left: str, right: str, title: str) -> None:
    """The prompt, two columns that share the terminal's width, and the keys."""
    table = Table("left", "right", title=f"\n{title}", title_justify="left", expand=True)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    table.add_row(*(Text(printable(text) or "(nothing)") for text in (left, right)))
    console.print(table, Text(f"after: {printable(prompt)}"), Text(KEYS), sep="\n")


def printable(text: str) -> str:
    """Control characters made visible: what a model writes must not steer the terminal.

    >>> printable("red" + chr(27) + "[31m")
    'red␛[31m'
    """
    shown = {code: 0x2400 + code for code in range(32) if code != ord("\n")} | {127: "␡"}
    hidden = dict.fromkeys(
        [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�"
    )  # C1, direction
    return text.translate(shown | hidden)


def keypresses() -> Iterator[str]:
    import select
    import termios
    import tty

    """Characters of standard input as they come: of a terminal without Enter, of a pipe one by one, up to its
    end."""
    stdin = sys.stdin.fileno()
    with contextlib.ExitStack() as restore:
        if termios and os.isatty(stdin):
            restore.callback(termios.tcsetattr, stdin, termios.TCSANOW, termios.tcgetattr(stdin))
            tty.setcbreak(stdin, termios.TCSANOW)  # not the default, which would throw away a key typed early
        while (key := os.read(stdin, 1).decode("latin-1").lower()) not in ("", "\x04"):
            if key == "\x1b" and os.isatty(
                stdin
            ):  # an arrow or function key: the letters that follow are no answer
                while select.select([stdin], [], [], 0.02)[0]:
                    os.read(stdin, 1)
            yield key


def whole_lines(path: Path, *keys: str) -> list[str]:
    """The lines of a JSON-lines file that need not exist, each with texts under these keys; half a line at
    its end, left by a crash, is moved to PATH.torn. A file that holds anything else is refused as it is."""
    require(not path.is_dir(), f"{path}: is a directory")
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    *lines, rest = text.split("\n")
    for number, line in enumerate(lines, start=1):
        read_texts(f"{path}, line {number}", line, *keys)
    require(not rest or rest[0] == "{", f"{path}: its last line is no JSON object")
    if rest:
        torn = path.with_name(path.name + ".torn")
        try:
            read_texts("", rest, *keys)
            lines.append(rest)  # whole but for its line feed
        except SettingError:
            append_line(torn, rest)
            console.print(
                f"{path}: half a line at its end, left by a crash, was moved to {torn}", soft_wrap=True
            )
        rewrite(path, lines)
    return lines


def append_line(path: Path, line: str) -> None:
    """Returns when the line is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def rewrite(path: Path, lines: list[str]) -> None:
    text = "".join(line + "\n" for line in lines).encode("utf-8", errors="surrogateescape")
    write_whole(path, lambda new: new.write_bytes(text))


# ---- 16 Preferences to reward ----------------------------------------------------------------------------------------
# In: a preferences file. Out: a sequence classifier with one label, as an ordinary Hugging Face directory:
# the base model's trunk under a scalar head on the last token. People compare well and grade badly, hence the
# pairs.


def load_preferences(path: Path) -> list[tuple[str, str]]:
    """Reads JSON lines of "prompt", "chosen" and "rejected" into texts, better and worse; where both hold the
    prompt already, it is not repeated."""
    pairs = []
    for where, line in read_lines(path):
        row = read_texts(where, line, "prompt", "chosen", "rejected")
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        require(chosen != rejected, f'{where}: "chosen" and "rejected" are the same text')
        if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
            chosen, rejected = prompt + chosen, prompt + rejected
        pairs.append((chosen, rejected))
    require(
        len(pairs) > 1,
        f"{path}: holds one preference; expected at least two, to learn from one and test on one",
    )
    return pairs


def bradley_terry_loss(chosen: Float[Tensor, "b"], rejected: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """-E[ log σ(r_chosen - r_rejected) ] (Christiano 1706.03741, eq. 1; InstructGPT 2203.02155, eq. 1).

    >>> bradley_terry_loss(torch.tensor([1.0]), torch.tensor([1.0]))   # log 2: no opinion
    tensor(0.6931)
    """
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def calibration_error(margins: Float[Tensor, "n"], bins: int = 10) -> float:
    """Σ_b n_b/n |accuracy_b - confidence_b| over bins of the confidence σ(|r_chosen - r_rejected|)
    (1706.04599, eq. 3).

    >>> round(calibration_error(torch.tensor([0.0, 0.0, 50.0, -50.0])), 3)   # σ says 0.5 and 1; right are 0 and 1/2
    0.5
    """
    confidence, right = margins.abs().sigmoid(), (margins > 0).float()
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, device=margins.device).scatter_add(0, bin_of, right - confidence)
    return gaps.abs().sum().item() / len(margins)


def preferences_reward(file: Path, args: RLHFArgs, run_dir: Path, device: str) -> RewardFn:
    """Learns RUN/reward_model from the file and has it judge; a run that goes on has learned it already."""
    specs = [spec for spec in (*args.reward, args.gold_reward or "") if spec.startswith("preferences:")]
    require(len(specs) == 1, "--reward preferences: one a run; give another as classifier:RUN/reward_model")
    if args.resume is None and PartialState().is_main_process:
        train_reward_model(file, args.base_model, run_dir / "reward_model", device, args.seed)
    return classifier_reward(str(run_dir / "reward_model"), None, device)


def train_reward_model(
    file: Path,
    base_model: str,
    directory: Path,
    device: str = "cpu",
    seed: int = 0,
    rank: int = 16,
    lr: float = 1e-3,
    dropout: float = 0.3,
    batch: int = 4,
    most_epochs: int = 12,
) -> Path:
    """Learns a reward from pairs, tests it on the 15 % held out, saves it under `directory`, and returns
    that.

    Two hundred pairs are few: LoRA on the attention matrices alone, and dropout before them, overfit the
    least.
    """
    pairs = load_preferences(file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, tokenizer = load_classifier(
            model_name(base_model), f"--base-model {base_model}", device, num_labels=1
        )
        nn.init.zeros_(model.score.weight)
        add_dropout_and_lora(model, rank, dropout)
        shuffled = [pairs[i] for i in torch.randperm(len(pairs))]
        held_out, training = shuffled[: (count := math.ceil(0.15 * len(pairs)))], shuffled[count:]
        epochs = max(1, min(most_epochs, 10_000 // len(training)))
        orders = (torch.randperm(len(training)).split(batch) for _ in range(epochs))
        batches = (zip(*(training[i] for i in rows), strict=True) for order in orders for rows in order)
        rewards = (classify(model, tokenizer, [*chosen, *rejected])[:, 0] for chosen, rejected in batches)
        losses = (bradley_terry_loss(*both.chunk(2)) for both in rewards)
        fit(model, losses, epochs * math.ceil(len(training) / batch), "reward model", lr=lr, weight_decay=0.0)
    with torch.no_grad():
        merge_dropout_and_lora(model)
        subtract_mean(model, tokenizer, [text for pair in training for text in pair])
        chosen, rejected = (
            classify(model, tokenizer, list(texts))[:, 0] for texts in zip(*held_out, strict=True)
        )
    accuracy, calibration = (chosen > rejected).float().mean().item(), calibration_error(chosen - rejected)
    console.print(f"reward model: {len(training)} pairs learned; of {len(held_out)} held out {accuracy:.0%} right, "
                  f"calibration error {calibration:.2f}", soft_wrap=True)  # fmt: skip
    write_whole(directory, lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path)))
    return directory


def add_dropout_and_lora(model: nn.Module, rank: int, dropout: float) -> None:
    """Freezes all but the head, and replaces each matrix of the attention by dropout and a LoRALinear."""
    model.base_model.requires_grad_(False)
    matrices = [
        (parent, name)
        for path, parent in model.base_model.named_modules()
        for name, child in parent.named_children()
        if "att" in path.lower() and isinstance(child, nn.Linear | Conv1D)
    ]
    for parent, name in matrices:
        lora = LoRALinear(getattr(parent, name), rank, alpha=2.0 * rank)
        setattr(parent, name, nn.Sequential(nn.Dropout(dropout), lora))


@torch.no_grad()
def merge_dropout_and_lora(model: nn.Module) -> None:
    """Undoes add_dropout_and_lora, with α/r B A added to the weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Sequential) and isinstance(child[-1], LoRALinear):
                child[-1].weight.copy_(child[-1].merged())
                setattr(parent, name, child[-1].base)


@torch.no_grad()
def subtract_mean(model: nn.Module, tokenizer, texts: list[str]) -> None:
    """Shifts the reward to mean 0 over the texts.

    The head w has no bias, but the final LayerNorm before it has one, b: w·(b - μ w/|w|²) = w·b - μ. RMSNorm
    has none: there the mean stays, which only PPO with --no-normalize-reward has to unlearn.
    """
    norms = [m for name, m in model.base_model.named_modules()
             if isinstance(m, nn.LayerNorm) and m.bias is not None and not re.search(r"\d", name)]  # fmt: skip
    weight = model.score.weight[0]
    if norms and weight.norm() > 0:
        norms[-1].bias -= classify(model, tokenizer, texts).mean() * weight / weight.square().sum()


# ---- 17 What changed inside ------------------------------------------------------------------------------------------
# In: a run directory. Out: the trained model beside the one it started from: where they differ, which heads
# and MLPs carry a token's logit, how far and in how many directions the weights moved. All of it is read off
# TransformerLens.


class Texts(NamedTuple):
    """What both models read: completions that the trained model drew after one prompt."""

    tokens: Int[Tensor, "B T"]
    is_completion: Bool[Tensor, "B T"]  # at columns that predict a completion's token
    where: Bool[Tensor, "B T"]  # those of them that predict the token in question; if it never came, all


class Attribution(NamedTuple):
    """Shares of a token's logit, means over the places; together they are that logit."""

    components: Float[Tensor, "L H+1"]  # heads, then the MLP
    embedding: float
    biases: float  # of attention outputs, final norm and unembedding: they belong to no head

    @property
    def total(self) -> float:
        return self.components.sum().item() + self.embedding + self.biases


class Update(NamedTuple):
    """A weight update ΔW beside its W."""

    size: float  # ‖ΔW‖ / ‖W‖, Frobenius
    rank: float  # effective rank: exp of the entropy of the singular values, normalised (Roy & Vetterli 2007)


class Inspection(NamedTuple):
    """What there is to tell; lists are of the base and of the trained model."""

    token: str
    texts: Texts
    divergence: Float[Tensor, "C"]
    lenses: list[Float[Tensor, "L+1"]]
    shares: list[Attribution]
    drops: dict[tuple[int, int], float]  # of the components whose share grew most
    updates: dict[tuple[str, int], Update]
    patterns: list[Float[Tensor, "L B H T T"]]

    def name(self, layer: int, part: int) -> str:
        is_mlp = part == self.shares[0].components.shape[1] - 1
        return f"layer {layer} MLP" if is_mlp else f"layer {layer} head {part}"


def inspect(
    run: Path,
    token: str = ".",
    prompt: str | None = None,
    samples: int = 32,
    gen_len: int = 32,
    seed: int = 0,
) -> None:
    """Compares a run's model with the one it started from: a table, and RUN/inspect.png.

    Args:
        run: a run directory token: whose logit is taken apart prompt: what the completions continue, on which
        both models are read; by default the run's own, or its first samples: completions, drawn from the
        trained model gen_len: tokens in a completion, at most seed: of the completions
    """
    settings = saved_settings(run)
    require((run / "model").is_dir(), f"{run}: holds no model; training writes it at the end")
    require(samples >= 1, f"--samples {samples}: must be at least 1")
    base, trained = (TransformerWithValueHead(str(model)) for model in (settings.base_model, run / "model"))
    tokenizer = trained.bridge.tokenizer
    id = single_token(tokenizer, token)
    prompt = load_examples(settings.prefix, settings.prompts)[0]["prompt"] if prompt is None else prompt
    check_context(trained.bridge, [{"prompt": prompt}], gen_len)
    texts = draw_texts(trained, prompt, id, samples, gen_len, seed)
    found = look_inside(base.bridge, trained.bridge, texts, token, id)
    places = f"where it wrote {token!r}" if (texts.where != texts.is_completion).any() else "all"
    console.print(f"{run / 'model'} against {settings.base_model}: {samples} completions of {prompt!r} by the "
                  f"trained model, {texts.where.sum()} places ({places})", soft_wrap=True)  # fmt: skip
    print_inspection(found)
    words = [
        "".join(c if c.isprintable() else "·" for c in tokenizer.decode([i]))
        for i in texts.tokens[0].tolist()
    ]
    plot_inspection(found, words, run / "inspect.png")
    console.print(f"wrote {run / 'inspect.png'}", soft_wrap=True)


def look_inside(
    base: TransformerBridge, trained: TransformerBridge, texts: Texts, token: str, id: int
) -> Inspection:
    """Reads the texts with both models, and takes apart the logit of the token of this id."""
    bridges = (base, trained)
    logits, caches = zip(*(read(bridge, texts) for bridge in bridges), strict=True)
    shares = [
        attribute(bridge, cache, id, texts.where) for bridge, cache in zip(bridges, caches, strict=True)
    ]
    for share, truth in zip(shares, logits, strict=True):
        is_sum = abs(share.total - truth[texts.where][:, id].mean().item()) < 1e-3 * (1 + abs(share.total))
        require(is_sum, "inspect: soft caps or norms after blocks: this logit is no sum of heads and MLPs")
    difference = shares[1].components - shares[0].components
    largest = [
        divmod(i, difference.shape[1]) for i in difference.flatten().argsort(descending=True)[:6].tolist()
    ]
    return Inspection(
        token,
        texts,
        kl_by_position(*logits, texts.is_completion),
        [logit_lens(cache, id, texts.where) for cache in caches],
        shares,
        {part: ablation_drop(trained, texts, id, *part) for part in largest},
        weight_updates(*bridges),
        [cache.stack_activation("pattern") for cache in caches],
    )


def single_token(tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
    require(
        len(ids) == 1,
        f"--token {text!r}: is no single token but {len(ids)} ({parts}); a leading space may matter",
    )
    return ids[0]


def draw_texts(
    trained: TransformerWithValueHead, prompt: str, id: int, samples: int, gen_len: int, seed: int
) -> Texts:
    """Completions of the one prompt, so no row is padded on the left, and the right no causal model sees."""
    tokens, mask = tokenize(trained.bridge.tokenizer, [prompt] * samples, "cpu")
    drawn = get_samples(trained, tokens, mask, gen_len, generator=torch.Generator().manual_seed(seed))
    is_completion, where = torch.zeros_like(drawn.attention_mask), torch.zeros_like(drawn.attention_mask)
    is_completion[:, drawn.prompt_width - 1 : -1] = drawn.completion != -100
    where[:, drawn.prompt_width - 1 : -1] = drawn.completion == id
    return Texts(drawn.tokens, is_completion, where if where.any() else is_completion)


def read(bridge: TransformerBridge, texts: Texts) -> tuple[Float[Tensor, "B T V"], ActivationCache]:
    """Logits, and the activations that the rest of this section looks at."""
    wanted = (
        "resid_pre",
        "resid_post",
        "_z",
        "mlp_out",
        "pattern",
        "hook_embed",
        "pos_embed",
        "final.hook_scale",
    )
    with torch.no_grad():
        return bridge.run_with_cache(texts.tokens, names_filter=lambda name: name.endswith(wanted))


def kl_by_position(
    base: Float[Tensor, "B T V"], trained: Float[Tensor, "B T V"], is_completion: Bool[Tensor, "B T"]
) -> Float[Tensor, "C"]:
    """KL(trained ‖ base) over the whole vocabulary at each of the completion's tokens, mean over rows that
    reach it."""
    p, q = trained.log_softmax(-1), base.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1) * is_completion
    rows = is_completion.sum(dim=0)
    return (kl.sum(dim=0) / rows)[rows > 0]


def logit_lens(cache: ActivationCache, id: int, where: Bool[Tensor, "B T"]) -> Float[Tensor, "L+1"]:
    """Log-probability of the token if the model stopped after 0, 1, … L blocks (nostalgebraist 2020, logit
    lens)."""
    lens = cache.logit_lens(targets=id, positions=None, return_type="log_probs")
    return lens.values[:, where].mean(dim=(1, 2))


@torch.no_grad()
def attribute(
    bridge: TransformerBridge, cache: ActivationCache, id: int, where: Bool[Tensor, "B T"]
) -> Attribution:
    """Direct logit attribution (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits).

    The residual stream is a sum x = Σ_c x_c, and with the final norm's scale s held fixed the logit is linear
    in it: Σ_c x_c / s · γ w, plus what the model says of x = 0. So the places can be averaged first, with
    weights 1 / s.
    """
    norm, w = bridge.ln_final, bridge.unembed.original_component.weight[id]
    gain = norm.weight + 1 if norm.uses_weight_offset else norm.weight
    weights = 1 / cache["ln_final.hook_scale"][where]  # [n, 1]
    places = {name: x[where] for name, x in cache.items() if x.shape[:2] == where.shape}
    mean = {name: torch.tensordot(weights.T / weights.sum(), x, 1) for name, x in places.items()}
    mean["ln_final.hook_scale"] = 1 / weights.mean(dim=0, keepdim=True)
    shares = ActivationCache(mean, bridge, has_batch_dim=False).get_full_resid_decomposition(
        expand_neurons=False, apply_ln=True, project_output_onto=gain * w
    )[:, 0]
    L, H = bridge.cfg.n_layers, bridge.cfg.n_heads
    heads, mlps, embedding = (
        shares[: L * H].view(L, H),
        shares[L * H : L * H + L],
        shares[L * H + L : -1].sum(),
    )
    constant = bridge.unembed(norm(torch.zeros(1, 1, len(w))))[0, 0, id]
    return Attribution(
        torch.cat([heads, mlps[:, None]], dim=1), embedding.item(), (shares[-1] + constant).item()
    )


@torch.no_grad()
def ablation_drop(bridge: TransformerBridge, texts: Texts, id: int, layer: int, part: int) -> float:
    """By how much the token's logit really falls when a head, or the MLP behind the last one, writes
    zeros."""
    is_mlp = part == bridge.cfg.n_heads

    def zero(x, hook):
        return x * 0 if is_mlp else x.index_fill(2, torch.tensor(part), 0.0)

    name = f"blocks.{layer}.mlp.hook_out" if is_mlp else f"blocks.{layer}.attn.o.hook_in"
    with_it, without = bridge(texts.tokens), bridge.run_with_hooks(texts.tokens, fwd_hooks=[(name, zero)])
    return (with_it - without)[texts.where][:, id].mean().item()


@torch.no_grad()
def weight_updates(base: TransformerBridge, trained: TransformerBridge) -> dict[tuple[str, int], Update]:
    """Of every matrix, by name and layer; an unembedding tied to the embedding is none of its own."""
    last = base.cfg.n_layers - 1
    pairs = {("embed", 0): (base.embed, trained.embed), ("unembed", last): (base.unembed, trained.unembed)}
    for i, blocks in enumerate(zip(base.blocks, trained.blocks, strict=True)):
        before, after = map(block_matrices, blocks)
        pairs |= {(name, i): (before[name], after[name]) for name in before}
    weights = {key: [part.original_component.weight for part in pair] for key, pair in pairs.items()}
    if base.unembed.original_component.weight is base.embed.original_component.weight:
        del weights["unembed", last]
    return {key: weight_update(*pair) for key, pair in weights.items()}


def weight_update(before: Float[Tensor, "m n"], after: Float[Tensor, "m n"]) -> Update:
    """
    >>> [round(x, 2) for x in weight_update(torch.ones(3, 3), torch.ones(3, 3) + 0.5 * torch.eye(3))]
    [0.29, 3.0]
    """
    difference = (after - before).float()
    if not difference.any():
        return Update(0.0, 0.0)
    shares = torch.linalg.svdvals(difference)
    entropy = torch.special.entr(shares / shares.sum()).sum()
    return Update((difference.norm() / before.float().norm()).item(), entropy.exp().item())


def print_inspection(found: Inspection) -> None:
    """Three tables and the sentence that they are for."""

    def show(title: str, *columns: str, rows: list[tuple]) -> None:
        table = Table("", *columns, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, *figures in rows:
            table.add_row(name, *(f"{figure:.3g}" for figure in figures))
        console.print(f"\n{title}", table, sep="\n")

    (base, trained), token = found.shares, repr(found.token)
    worst = found.divergence.argmax().item()
    console.print(f"KL(trained ‖ base): mean {found.divergence.mean():.3g} nats a token, most at token {worst + 1}: "
                  f"{found.divergence[worst]:.3g}", soft_wrap=True)  # fmt: skip
    lenses = enumerate(zip(*(lens.tolist() for lens in found.lenses), strict=True))
    rows = [(f"after block {i - 1}" if i else "embedding", *pair) for i, pair in lenses]
    show(f"log-probability of {token} if the model ended there (logit lens)", "base", "trained", rows=rows)
    rows = [
        (found.name(*part), *(share.components[part].item() for share in found.shares))
        for part in found.drops
    ]
    rows += [("embedding", base.embedding, trained.embedding), ("biases", base.biases, trained.biases)]
    others = [share.total - sum(row[i] for row in rows) for i, share in enumerate(found.shares, start=1)]
    rows += [("all other heads and MLPs", *others), (f"logit of {token}", base.total, trained.total)]
    rows = [
        (*row, row[2] - row[1], *drop) for row, *drop in itertools.zip_longest(rows, found.drops.values())
    ]
    rows = [(name, *(figure for figure in figures if figure is not None)) for name, *figures in rows]
    columns = ("base", "trained", "change", "drop when ablated")
    show(f"who writes the logit of {token} (direct logit attribution)", *columns, rows=rows)
    carriers = ", ".join(found.name(*part) for part, drop in found.drops.items() if drop > 0)
    console.print(f"\nablated, these lower the logit of {token}: {carriers or 'none of them'}")
    largest = sorted(found.updates.items(), key=lambda item: -item[1].size)[:8]
    rows = [
        (name if "embed" in name else f"layer {layer} {name}", *update) for (name, layer), update in largest
    ]
    show("largest weight updates", "‖ΔW‖ / ‖W‖", "effective rank", rows=rows)


def plot_inspection(found: Inspection, words: list[str], path: Path) -> None:
    """Eight panels, each with a caption that says how to read it; `words` are the first text's tokens."""
    figure, axes = plt.subplots(4, 2, figsize=(9, 15))

    def finish(axis, title: str, caption: str, ylabel: str = "") -> None:
        axis.set(title=title, ylabel=ylabel)
        axis.set_xlabel(textwrap.fill(caption, 56), loc="left")

    def heatmap(
        axis, values: Tensor, rows: list[str], columns: list[str], label: str, ticks=None, **colors
    ) -> None:
        image = axis.imshow(values.numpy(), aspect="auto", interpolation="nearest", **colors)
        for set_ticks, names in ((axis.set_yticks, rows), (axis.set_xticks, columns)):
            step = math.ceil(len(names) / 40)
            set_ticks(range(0, len(names), step), names[::step], fontsize=8 if len(names) < 20 else 5)
        figure.colorbar(image, ax=axis, shrink=0.8, ticks=ticks, format="%.3g", label=label)

    L, H = found.patterns[0].shape[0], found.patterns[0].shape[2]
    layers, token, names = list(map(str, range(L))), repr(found.token), ("base", "trained")
    axes[0, 0].plot(range(1, len(found.divergence) + 1), found.divergence.numpy(), marker=".")
    axes[0, 0].set_ylim(bottom=0)
    finish(axes[0, 0], "KL(trained ‖ base) by position", "Token of the completion, from left to right. High: there the "
           "two models would write different things. Mean over all completions.", "nats")  # fmt: skip
    for lens, name in zip(found.lenses, names, strict=True):
        axes[0, 1].plot(lens.numpy(), marker=".", label=name)
    axes[0, 1].set_xticks(range(0, L + 1, math.ceil(L / 12)))
    axes[0, 1].legend()
    finish(axes[0, 1], f"Logit lens: {token} after each block", f"Blocks passed. How likely {token} would be if "
           "the model ended there. Where the curves part, training has changed the computation.",
           "log-probability")  # fmt: skip
    limit = max(share.components.abs().max().item() for share in found.shares) + 1e-6
    ticks = [sign * limit / fraction for sign in (-1, 1) for fraction in (1, 3, 10)] + [0]
    signed = {"ticks": ticks, "cmap": "PuOr", "norm": SymLogNorm(limit / 20, vmin=-limit, vmax=limit)}
    for axis, share, name in zip(axes[1], found.shares, names, strict=True):
        heatmap(axis, share.components, layers, [*map(str, range(H)), "MLP"], "share of the logit", **signed)
        finish(axis, f"Who writes the logit of {token}: {name}", "Heads by number, then the MLP. Purple pushes the "
               f"logit up, orange down; with embedding {share.embedding:.1f} and biases {share.biases:.1f} they add up "
               f"to {share.total:.1f}. Both panels have one, logarithmic, scale.", "layer")  # fmt: skip
    kinds = list(dict.fromkeys(name for name, _ in found.updates))
    for axis, field, label in zip(axes[2], (0, 1), ("‖ΔW‖ / ‖W‖", "effective rank"), strict=True):
        grid = torch.full((len(kinds), L), math.nan)
        for (name, layer), update in found.updates.items():
            grid[kinds.index(name), layer] = update[field]
        heatmap(axis, grid, kinds, layers, label, vmin=0)
    finish(axes[2, 0], "How far each matrix moved", "Layer. Size of the update, as a share of the matrix that it "
           "changes. White: there is no such matrix.")  # fmt: skip
    finish(axes[2, 1], "In how many directions", "Layer. 1: the whole update is one direction in, one out. LoRA cannot "
           "exceed its rank; full training can.")  # fmt: skip
    valid = found.texts.is_completion[None, :, None, :]  # rows of attention that belong to a completion
    moved = ((found.patterns[1] - found.patterns[0]).abs().sum(-1) / 2 * valid).sum(dim=(1, 3)) / valid.sum()
    layer, head = divmod(moved.argmax().item(), H)
    words = words[: int(found.texts.is_completion[0].nonzero().max()) + 1]
    for axis, pattern, name in zip(axes[3], found.patterns, names, strict=True):
        pattern = pattern[layer, 0, head, : len(words), : len(words)]
        heatmap(axis, pattern, words, words, "attention", cmap="Blues", vmin=0, vmax=1)
        axis.tick_params(axis="x", labelrotation=90)
        finish(axis, f"Attention of layer {layer} head {head}: {name}", "Each row is a token and says where it looks; "
               f"rows add up to 1. Of all heads this one moved most: {moved.max():.0%} of its attention, on "
               "average.")  # fmt: skip
    save_picture(figure, path)


# ---- 18 Comparing runs -----------------------------------------------------------------------------------------------
# In: run directories. Out: one picture of their curves. Runs that differ in nothing but the seed become one
# line, their mean, in a band from the lowest to the highest.


def compare(runs: tuple[Path, ...], output: Path = Path("compare.png")) -> None:
    """Draws the curves of several runs over each other, and reward against KL; seeds of one setting become a
    band.

    Args:
        runs: run directories
        output: the picture
    """
    require(len(runs) > 0, "compare: expected at least one run directory")
    settings, histories = zip(*map(read_run, runs), strict=True)
    names = [field.name for field in dataclasses.fields(RLHFArgs) if field.name not in ("run_dir", "seed")]
    differing = [name for name in names if len({str(record.get(name)) for record in settings}) > 1]
    groups: dict[str, list[list[dict]]] = {}
    for record, history in zip(settings, histories, strict=True):
        label = ", ".join(f"{name} {record.get(name)}" for name in differing) or (
            "all runs" if len(runs) > 1 else runs[0].name
        )
        groups.setdefault(label, []).append(history)
    curves = {}
    for label, group in groups.items():
        label += f" (mean of {len(group)}, band from lowest to highest)" if len(group) > 1 else ""
        curves[textwrap.fill(label, 110)] = average(group)
    plot_curves(curves, output)
    console.print(f"wrote {output}", soft_wrap=True)


def read_run(run: Path) -> tuple[dict, list[dict]]:
    """A run's settings and its metrics, one dict a phase."""
    settings, history = read_settings(run), read_records(run / "metrics.jsonl")
    require(bool(history), f"{run}: holds no metrics.jsonl with at least one phase")
    return settings, history


def average(histories: list[list[dict]]) -> list[dict]:
    """Phase by phase, as far as all go: each key's mean and, of several, key_low and key_high.

    >>> average([[{"kl": 1.0}], [{"kl": 2.0}, {"kl": 5.0}]])
    [{'kl': 1.5, 'kl_low': 1.0, 'kl_high': 2.0}]
    """
    if len(histories) == 1:
        return histories[0]
    merged = []
    for phases in zip(*histories, strict=False):
        values = {key: [m[key] for m in phases] for key in phases[0] if all(key in m for m in phases)}
        merged.append({})
        for key, numbers in values.items():
            merged[-1] |= {
                key: sum(numbers) / len(numbers),
                f"{key}_low": min(numbers),
                f"{key}_high": max(numbers),
            }
    return merged


# ---- 19 Command line -------------------------------------------------------------------------------------------------


def parse(target: Callable, argv: list[str], **options):
    """tyro reads the command line; of the box in which it complains, the sentence is kept."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(target, args=argv, config=(tyro.conf.PositionalRequiredArgs,), **options)
    except SystemExit as stop:
        if stop.code:
            lines = [line.strip("│ \n") for line in complaint.getvalue().splitlines()[1:]]
            sentence = " ".join(
                lines[: next((i for i, line in enumerate(lines) if set(line) <= {"─"}), None)]
            )
            sentence = sentence.removeprefix("Error parsing RLHFArgs: ")
            raise SettingError(f"{sentence} (python rlhf.py --help lists all settings)") from None
        raise


def parse_settings(argv: list[str]) -> RLHFArgs:
    """The settings of the command line; with --resume those of the run, which the command line must not
    contradict."""
    runs = [value for flag, value in itertools.pairwise([*argv, ""]) if flag == "--resume"]
    runs += [flag.partition("=")[2] for flag in argv if flag.startswith("--resume=")]
    if not runs:
        return parse(RLHFArgs, argv)
    saved = dataclasses.replace(saved_settings(Path(runs[-1])), run_dir=None, resume=Path(runs[-1]))
    args = parse(
        RLHFArgs, argv, default=dataclasses.replace(saved, reward=())
    )  # to which those given are appended
    given = {flag.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for flag in argv}
    for name in given & {field.name for field in dataclasses.fields(RLHFArgs)}:
        ours, theirs, flag = getattr(args, name), getattr(saved, name), name.replace("_", "-")
        message = f"--resume {args.resume}: was begun with --{flag} {theirs}, not {ours}; leave --{flag} out"
        require(ours == theirs, message)
    return saved


def train(args: RLHFArgs) -> int:
    """Trains; returns the exit status."""
    trainer = RLHFTrainer(args)
    trainer.train()
    if trainer.phase == args.total_phases:
        return 0
    console.print(
        f"stopped after phase {trainer.phase}; go on with: python rlhf.py --resume {trainer.run_dir}"
    )
    return 128 + trainer.stop.received


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status, 2 for bad input."""
    transformers.utils.logging.disable_progress_bar()
    commands = {"label": label, "inspect": inspect, "compare": compare}
    try:
        if argv and argv[0] in commands:
            parse(commands[argv[0]], argv[1:])
            return 0
        return train(parse_settings(argv))
    except (SettingError, OSError) as error:
        print(f"rlhf.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
