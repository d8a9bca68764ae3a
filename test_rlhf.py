"""Tests for rlhf.py and kernels.py, against independent truths: formulas by hand, brute force, float64.

No network and no GPU: the models are small random ones of real architectures, made here and loaded like any other.
"""

import contextlib
import dataclasses
import doctest
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import nn

import kernels
import rlhf
from rlhf import Evaluation, LoRALinear, ReplayMemory, RLHFArgs, RLHFTrainer, SettingError, TransformerWithValueHead

pytestmark = [pytest.mark.filterwarnings("error:::rlhf"), pytest.mark.filterwarnings("error:::kernels")]

TEXT = "This is a test. It has words and stops. Here is a longer sentence, with a comma, that goes on. No."
TIMINGS = {"rollout_seconds", "learning_seconds", "tokens_per_second", "peak_memory_mb"}


# ---- Small models ----------------------------------------------------------------------------------------------------


def save_model(path: Path, config: transformers.PretrainedConfig) -> str:
    """A random model of the architecture, with a tokenizer, as a local directory."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<eos>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(path)
    torch.manual_seed(0)
    config.vocab_size, config.bos_token_id, config.eos_token_id = bpe.get_vocab_size(), 0, 0
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> str:
    config = transformers.GPT2Config(
        n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return save_model(tmp_path_factory.mktemp("gpt2"), config)


@pytest.fixture(scope="session")
def soft_capped(tmp_path_factory) -> str:
    """Gemma 2 ends in 30 tanh(logits / 30): no linear head."""
    config = transformers.Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=64, final_logit_softcapping=2.0, initializer_range=0.2,
    )  # fmt: skip
    return save_model(tmp_path_factory.mktemp("gemma2"), config)


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "No", "id": 0}, {"prompt": "Here is a longer sentence, with", "id": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_args(base_model: str, **settings) -> RLHFArgs:
    defaults = dict(batch_size=8, gen_len=6, num_minibatches=2, total_phases=4, warmup_steps=1, device="cpu")
    return RLHFArgs(base_model=base_model, **(defaults | settings))


# ---- Settings and the command line -----------------------------------------------------------------------------------


def test_every_setting_is_read():
    source = Path(rlhf.__file__).read_text()
    for field in dataclasses.fields(RLHFArgs):
        assert re.search(rf"args\.{field.name}\b|self\.{field.name}\b", source.split("# ---- 2 ")[1]) or re.search(
            rf"self\.{field.name}\b", source
        ), field.name


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--algo dpo", "'dpo'.*'ppo', 'grpo', 'rloo'"),
        ("--no-such-flag 1", "no-such-flag"),
        ("--reward lengthh", "lengthh.*expected `periods`"),
        ("--reward char:", "char:.*expected"),
        ("--reward nowhere.py:f", "no file nowhere.py"),
        ("--batch-size 10 --num-minibatches 4", "batch-size 10.*divisible by --num-minibatches 4"),
        ("--batch-size 12 --group-size 5", "batch-size 12.*divisible by --group-size 5"),
        ("--algo grpo --group-size 1", "group-size 1.*at least 2"),
        ("--algo rloo --group-size 1", "group-size 1.*at least 2"),
        ("--total-phases 3 --warmup-steps 3", "total-phases 3.*greater than --warmup-steps 3"),
        ("--lora-rank 0", "lora-rank 0.*at least 1"),
        ("--lora --lora-targets q wibble", "wibble.*q, k, v, o, in, out"),
        ("--gen-len 100", "gen-len 100.*context of 64"),
        ("--temperature 0", "temperature 0.*positive"),
        ("--prompts EMPTY", "is empty"),
        ("--prompts nowhere.txt", "no such file"),
        ("--base-model ./nowhere", "nowhere.*cannot be loaded"),
        ("--device tpu9", "tpu9.*not available"),
    ],
)
def test_bad_settings_end_with_one_line_and_status_2(gpt2, tmp_path, capsys, flags, expected):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    argv = ["--base-model", gpt2, "--run-dir", str(tmp_path / "run"), *flags.replace("EMPTY", str(empty)).split()]
    assert rlhf.main(argv) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and complaint.startswith("rlhf.py: "), complaint
    assert re.search(expected, complaint), complaint
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_never_overwritten(gpt2, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("precious")
    assert rlhf.main(["--base-model", gpt2, "--run-dir", str(tmp_path)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_malformed_prompts_name_their_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    for bad, expected in [
        ("{", "line 2: is not JSON"),
        ('{"text": "a"}', 'line 2: expected an object with a text under "prompt"'),
        ('{"prompt": "a", "more": 1}', "line 2: its columns differ"),
    ]:
        path.write_text('{"prompt": "fine"}\n' + bad)
        with pytest.raises(SettingError, match=expected):
            rlhf.load_prompts("", path)


# ---- Tokens, model, padding ------------------------------------------------------------------------------------------


def test_tokenize_pads_left_behind_a_bos(gpt2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    tokens, mask = rlhf.tokenize(tokenizer, ["This is", "No"], "cpu")
    long, short = tokenizer.encode("This is"), tokenizer.encode("No")
    assert tokens[0].tolist() == [0, *long] and mask[0].all()
    assert tokens[1][mask[1]].tolist() == [0, *short]
    assert mask[1].tolist() == [False] * (len(long) - len(short)) + [True] * (1 + len(short))


def test_left_padding_changes_nothing(gpt2):
    model = TransformerWithValueHead(gpt2, has_critic=True)
    nn.init.normal_(model.value_head[-1].weight)
    tokenizer = model.bridge.tokenizer
    prompts = ["This is a test. It has words", "No", "Here is"]
    together, mask = rlhf.tokenize(tokenizer, prompts, "cpu")
    batch = rlhf.get_samples(model, together, mask, gen_len=8, top_k=1)
    P = together.shape[1]
    for row, prompt in enumerate(prompts):
        tokens, alone_mask = rlhf.tokenize(tokenizer, [prompt], "cpu")
        alone = rlhf.get_samples(model, tokens, alone_mask, gen_len=8, top_k=1)
        length = int(alone.attention_mask[:, tokens.shape[1] :].sum())
        greedy = alone.tokens[0, tokens.shape[1] :][:length]
        assert torch.equal(batch.tokens[row, P : P + length], greedy)
        torch.testing.assert_close(batch.logprobs[row, :length], alone.logprobs[0, :length], atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.values[row, :length], alone.values[0, :length], atol=1e-5, rtol=0)
        # and both agree with Hugging Face, which has never heard of padding here
        truth = transformers.AutoModelForCausalLM.from_pretrained(gpt2)(alone.tokens).logits.log_softmax(-1)
        expected = truth[0, tokens.shape[1] - 1 : -1].gather(1, alone.tokens[0, tokens.shape[1] :, None])[:, 0]
        torch.testing.assert_close(alone.logprobs[0, :length], expected[:length], atol=1e-5, rtol=0)


def test_value_head_starts_at_zero_and_only_a_critic_has_one(gpt2):
    tokens = torch.arange(6)[None]
    model = TransformerWithValueHead(gpt2, has_critic=True)
    model.features(tokens, torch.ones_like(tokens).bool())
    assert model.values.shape == (1, 6) and model.values.abs().max() == 0
    assert TransformerWithValueHead(gpt2).value_head is None


def test_soft_capped_head_uses_the_models_own_logits(soft_capped):
    model = TransformerWithValueHead(soft_capped)
    assert not model.has_linear_head
    tokens = torch.arange(3, 11)[None]
    logits = transformers.AutoModelForCausalLM.from_pretrained(soft_capped, attn_implementation="eager")(tokens).logits
    features = model.features(tokens, torch.ones_like(tokens).bool())
    ref = features.flip(1)
    logprobs, entropy, kl = model.get_logprobs(features, tokens, 0.7, ref)
    p, q = (logits / 0.7).log_softmax(-1), (logits.flip(1) / 0.7).log_softmax(-1)
    torch.testing.assert_close(logprobs, p.gather(2, tokens[..., None])[..., 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(p.exp() * p).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-5)


def test_hooks_work_before_during_and_after_training(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="ppo", lora=True, reward=("char:e",), temperature=1.5))
    bridge, tokens = trainer.policy.bridge, torch.arange(8)[None]
    for _ in range(2):
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(tokens)
            assert cache["blocks.1.attn.hook_pattern"].shape == (1, 2, 8, 8)
            assert cache["ln_final.hook_out"].shape == (1, 8, 32)
            zeroed = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_out", lambda x, hook: x * 0)])
        assert not torch.allclose(zeroed, logits)
        memory, *_ = trainer.rollout_phase()  # the value head's own hook has survived
        assert trainer.learning_phase(memory)["value_loss"] > 0


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def randomize_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_b.data = 0.2 * torch.randn(layer.lora_b.shape, generator=generator)


@pytest.mark.parametrize("targets", [("q", "k", "v", "o"), ("in", "out"), ("q", "out")])
def test_lora_is_the_base_plus_a_low_rank_update_and_exactly_the_base_when_off(gpt2, targets):
    model, base = TransformerWithValueHead(gpt2), TransformerWithValueHead(gpt2)
    rlhf.choose_trained(model.bridge, RLHFArgs(lora=True, lora_targets=targets, lora_rank=3, lora_alpha=6.0))
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model.bridge(tokens), base.bridge(tokens))  # B is zero
    randomize_adapters(model)
    with rlhf.adapters_off(model):
        assert torch.equal(model.bridge(tokens), base.bridge(tokens))
    assert not torch.allclose(model.bridge(tokens), base.bridge(tokens), atol=1e-3)
    for block, ours in zip(base.bridge.blocks, model.bridge.blocks, strict=True):  # merge by hand: W + 6/3 B A
        for target in targets:
            part = "mlp" if target in ("in", "out") else "attn"
            there, layer = (getattr(getattr(b, part), target).original_component for b in (block, ours))
            update = 2.0 * layer.lora_b.detach() @ layer.lora_a.detach()
            is_conv1d = type(there).__name__ == "Conv1D"
            there.weight.data += update.t() if is_conv1d else update
    torch.testing.assert_close(model.bridge(tokens), base.bridge(tokens), atol=1e-5, rtol=1e-4)
    trained = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_a", "lora_b"}


@pytest.mark.parametrize("lora", [True, False])
def test_training_moves_the_policy_and_not_the_reference(gpt2, lora):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=lora, reward=("char:e",), temperature=1.5))
    tokens = torch.arange(10)[None]
    mask, before = torch.ones_like(tokens).bool(), TransformerWithValueHead(gpt2).bridge(tokens)
    for _ in range(3):
        memory, *_ = trainer.rollout_phase()
        trainer.learning_phase(memory)
    with trainer.reference() as reference, torch.no_grad():
        torch.testing.assert_close(reference.logits(reference.features(tokens, mask)), before, atol=1e-6, rtol=0)
    assert not torch.allclose(trainer.policy.bridge(tokens), before, atol=1e-3)


# ---- Sampling --------------------------------------------------------------------------------------------------------


def test_samples_follow_the_softmax_at_the_temperature(gpt2):
    model = TransformerWithValueHead(gpt2)
    tokens, mask = rlhf.tokenize(model.bridge.tokenizer, ["This is"] * 4000, "cpu")
    samples = rlhf.get_samples(model, tokens, mask, 1, temperature=0.7, generator=torch.Generator().manual_seed(0))
    probs = (model.bridge(tokens[:1])[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(samples.tokens[:, -1], minlength=len(probs))
    z = (counts - 4000 * probs) / (4000 * probs * (1 - probs) + 1e-3).sqrt()
    assert z[probs > 0.002].abs().max() < 4.5


def test_draw_never_returns_a_token_of_probability_zero(monkeypatch):
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for uniform in (0.0, 0.3, 1 - 2**-24, 1.0):  # 1.0 stands for a product that rounds up
        monkeypatch.setattr(torch, "rand", lambda *_, uniform=uniform, **__: torch.tensor([[uniform]]))
        assert rlhf.draw(probs, None).item() in (1, 3)


def test_top_k_restricts_what_is_drawn_and_not_how_it_is_scored(gpt2):
    model = TransformerWithValueHead(gpt2)
    tokens, mask = rlhf.tokenize(model.bridge.tokenizer, ["This is"] * 200, "cpu")
    samples = rlhf.get_samples(model, tokens, mask, 1, top_k=3, generator=torch.Generator().manual_seed(0))
    logprobs = model.bridge(tokens[:1])[0, -1].log_softmax(-1)
    assert set(samples.tokens[:, -1].tolist()) == set(logprobs.topk(3).indices.tolist())
    torch.testing.assert_close(samples.logprobs[:, 0], logprobs[samples.tokens[:, -1]], atol=1e-5, rtol=1e-5)


def test_end_of_text_is_an_action_and_what_follows_is_masked(gpt2):
    trainer = RLHFTrainer(
        small_args(gpt2, algo="grpo", batch_size=256, gen_len=20, temperature=2.0, reward=("char:e",))
    )
    memory, _, samples = trainer.rollout_phase()
    P, endings = memory.prompt_width, 0
    for row in range(256):
        drawn, kept = memory.tokens[row, P:].tolist(), memory.mask[row].tolist()
        length = drawn.index(0) + 1 if 0 in drawn else len(drawn)
        endings += 0 in drawn
        assert kept == [True] * length + [False] * (len(drawn) - length)
        assert memory.completion[row].tolist() == drawn[:length] + [-100] * (len(drawn) - length)
        assert "<eos>" not in samples[row]["completion"]
        assert (memory.logprobs[row, length:] == 0).all() and (memory.advantages[row, length:] == 0).all()
    assert endings > 5
    new = trainer.evaluate(memory)
    gradient = torch.autograd.grad(trainer.algorithm.objective(new, memory, 0.1, trainer.args), new.logprobs)[0]
    is_eos = memory.completion == 0
    assert (gradient[is_eos] != 0).all() and (gradient[~memory.mask] == 0).all()


def test_a_completion_that_is_only_end_of_text(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="ppo", gen_len=1, lora=True))
    weight = trainer.policy.bridge.ln_final.original_component
    weight.bias.data = 50 * trainer.policy.output_layer[0][0].detach()  # the end-of-text token, always
    weight.weight.data.zero_()
    memory, _, samples = trainer.rollout_phase()
    assert (memory.completion == 0).all() and all(sample["completion"] == "" for sample in samples)
    assert all(math.isfinite(value) for value in trainer.learning_phase(memory).values())


# ---- Ratio and agreement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("algo, lora", [("ppo", False), ("ppo", True), ("grpo", True), ("grpo", False), ("rloo", True)])
def test_ratio_is_one_on_the_first_minibatch(gpt2, prompts_file, algo, lora, temperature):
    trainer = RLHFTrainer(
        small_args(gpt2, algo=algo, lora=lora, temperature=temperature, prompts=prompts_file, group_size=4)
    )
    for _ in range(3):
        memory, *_ = trainer.rollout_phase()
        minibatch = next(memory.minibatches(2, trainer.generator))
        assert len({tuple(row) for row in minibatch.attention_mask[:, : memory.prompt_width].tolist()}) == 2
        new = trainer.evaluate(minibatch)
        ratio = (new.logprobs - minibatch.logprobs).exp()[minibatch.mask]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
        assert rlhf.minibatch_metrics(new, minibatch, rlhf.clip_range(trainer.args))["clip_fraction"] == 0
        if algo == "ppo":
            torch.testing.assert_close(new.values * minibatch.mask, minibatch.values, atol=1e-5, rtol=0)
        trainer.learning_phase(memory)


# ---- Rewards ---------------------------------------------------------------------------------------------------------


def test_reward_functions_of_ones_own(tmp_path, gpt2, prompts_file):
    path = tmp_path / "mine.py"
    path.write_text("def f(prompts, completions, id, **columns):\n    return [100.0 * i + len(prompts) for i in id]\n")
    trainer = RLHFTrainer(small_args(gpt2, prompts=prompts_file, group_size=4, reward=(f"{path}:f",)))
    _, _, samples = trainer.rollout_phase()
    assert [s["reward"] for s in samples] == [108.0 if s["prompt"].startswith("Here") else 8.0 for s in samples]
    assert [s["prompt"] for s in samples[:4]] == [samples[0]["prompt"]] * 4  # a group stands together
    with pytest.raises(SettingError, match="has no function g"):
        rlhf.load_reward(f"{path}:g", trainer.args, tmp_path, "cpu")


@pytest.mark.parametrize(
    "returned, expected",
    [
        ([1.0], "1 values for 2 completions"),
        (None, "returned None; expected a list"),
        ([0.0, math.nan], "value 1 is nan.*'bad'"),
        ([math.inf, 0.0], "value 0 is inf.*'good'"),
        ([0.0, "1"], "value 1 is '1'.*'bad'"),
        ([0.0, None], "value 1 is None.*'bad'"),
    ],
)
def test_bad_rewards_name_the_completion(returned, expected):
    with pytest.raises(SettingError, match=expected):
        rlhf.get_rewards([rlhf.Reward("reward/f", lambda **_: returned, 1.0)], [{"prompt": "p"}] * 2, ["good", "bad"])


def test_normalize():
    torch.testing.assert_close(rlhf.normalize(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]) / 2**0.5)
    assert rlhf.normalize(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


# ---- Advantages ------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    # Four tokens, V = 0.5, 1, 0, 2, reward 3 on the last, γ = 1, λ = 0.5:
    # δ = 1 - 0.5, 0 - 1, 2 - 0, 3 - 2 = 0.5, -1, 2, 1;  A_4 = 1, A_3 = 2 + 0.5 = 2.5, A_2 = -1 + 1.25 = 0.25,
    # A_1 = 0.5 + 0.125 = 0.625.  With λ = 0, A = δ: the course's one-step estimate.
    values, mask = torch.tensor([[0.5, 1.0, 0.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
    advantages = rlhf.gae(torch.tensor([3.0]), values, mask, RLHFArgs(gae_lambda=0.5))
    torch.testing.assert_close(advantages, torch.tensor([[0.625, 0.25, 2.5, 1.0]]))
    one_step = rlhf.gae(torch.tensor([3.0]), values, mask, RLHFArgs(gae_lambda=0.0))
    torch.testing.assert_close(one_step, torch.tensor([[0.5, -1.0, 2.0, 1.0]]))


def test_gae_equals_the_double_loop():
    torch.manual_seed(0)
    lengths, gamma, lam = [7, 1, 4], 0.9, 0.8
    values, rewards = torch.randn(3, 7), torch.randn(3)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    advantages = rlhf.gae(rewards, values, mask, RLHFArgs(gamma=gamma, gae_lambda=lam))
    for row, length in enumerate(lengths):
        for t in range(7):
            expected = 0.0
            for step in range(t, length):  # A_t = Σ_l (γλ)^l δ_{t+l}
                following = values[row, step + 1] if step + 1 < length else 0.0
                delta = (rewards[row] if step == length - 1 else 0.0) + gamma * following - values[row, step]
                expected = expected + (gamma * lam) ** (step - t) * delta
            torch.testing.assert_close(advantages[row, t], torch.as_tensor(expected), atol=1e-6, rtol=1e-5)


def test_group_advantages_by_hand():
    # Groups (1, 2, 3, 6) and (5, 5, 5, 5). Means 3 and 5; std of the first sqrt((4 + 1 + 0 + 9) / 3) = 2.160247.
    rewards, mask = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0]), torch.ones(8, 2, dtype=torch.bool)
    mask[0, 1] = False
    args = RLHFArgs(batch_size=8, group_size=4)
    centred = torch.tensor([-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    grpo = rlhf.group_relative(rewards, None, mask, args)
    torch.testing.assert_close(grpo, (centred / 2.160247)[:, None] * mask)
    dr_grpo = rlhf.group_relative(rewards, None, mask, dataclasses.replace(args, scale_by_group_std=False))
    torch.testing.assert_close(dr_grpo, centred[:, None] * mask)
    rloo = rlhf.leave_one_out(rewards, None, mask, args)
    for group, row in itertools.product(range(2), range(4)):
        others = [rewards[4 * group + i] for i in range(4) if i != row]
        expected = rewards[4 * group + row] - sum(others) / 3
        torch.testing.assert_close(rloo[4 * group + row, 0], expected)
    assert rloo[0, 1] == 0


# ---- Objectives ------------------------------------------------------------------------------------------------------


def random_minibatch(rows=3, width=4, dtype=torch.float64) -> tuple[Evaluation, ReplayMemory]:
    torch.manual_seed(0)

    def draw():
        return torch.randn(rows, width, dtype=dtype)

    mask = torch.arange(width) < torch.tensor([width, 1, 3])[:rows, None]
    completion = torch.where(mask, 5, -100)
    old = ReplayMemory(
        tokens=torch.zeros(rows, width + 2, dtype=torch.long), attention_mask=torch.ones(rows, width + 2).bool(),
        completion=completion, logprobs=-draw().abs() - 1, ref_logprobs=-draw().abs() - 1,
        ref_features=draw()[..., None], advantages=draw(), values=draw(), returns=draw(),
    )  # fmt: skip
    new = Evaluation(old.logprobs + 0.3 * draw(), draw().abs(), draw().abs(), draw())
    return Evaluation(*(x.requires_grad_() for x in new)), old


def test_objectives_by_hand():
    # Four tokens, ε = 0.2, β = 0.5, c_ent = 0.1, c_vf = 0.25:
    #   ρ      1.5    0.5    1.1    0.7
    #   A        1      1     -2     -2
    #   ρA     1.5    0.5   -2.2   -1.4
    #   clip   1.2    0.8   -2.2   -1.6     clipped ρ is 1.2, 0.8, 1.1, 0.8
    #   min    1.2    0.5   -2.2   -1.6     mean -0.525
    #   KL     0.2    0.4    0.0    0.2     mean  0.2      S = 1, 1, 2, 2: mean 1.5
    #   grpo = -0.525 - 0.5 * 0.2 + 0.1 * 1.5 = -0.475
    #   V - V_target = 1, 0, -2, 1: mean square 1.5;  ppo = -0.475 - 0.25 * 1.5 = -0.85
    ratio = torch.tensor([[1.5, 0.5, 1.1, 0.7]])
    _, old = random_minibatch(rows=1, dtype=torch.float32)
    old = dataclasses.replace(
        old, logprobs=torch.full((1, 4), -2.0), advantages=torch.tensor([[1.0, 1.0, -2.0, -2.0]]),
        returns=torch.zeros(1, 4),
    )  # fmt: skip
    new = Evaluation(
        logprobs=ratio.log() - 2, entropy=torch.tensor([[1.0, 1.0, 2.0, 2.0]]),
        kl=torch.tensor([[0.2, 0.4, 0.0, 0.2]]), values=torch.tensor([[1.0, 0.0, -2.0, 1.0]]),
    )  # fmt: skip
    args = RLHFArgs(clip_coef=0.2, kl_coef=0.5, ent_coef=0.1, vf_coef=0.25)
    assert rlhf.grpo_objective(new, old, args.kl_coef, args).item() == pytest.approx(-0.475, abs=1e-6)
    assert rlhf.ppo_objective(new, old, args.kl_coef, args).item() == pytest.approx(-0.85, abs=1e-6)
    higher = dataclasses.replace(args, clip_high=0.4)  # the first token may go up to 1.4: + 0.2 / 4
    assert rlhf.grpo_objective(new, old, higher.kl_coef, higher).item() == pytest.approx(-0.425, abs=1e-6)


def brute_force_objective(new, old, args, average) -> float:
    """GRPO eq. 3 term by term in plain Python, for the three ways to average."""
    per_row = []
    for row in range(len(old.completion)):
        terms = []
        for t in range(old.completion.shape[1]):
            if old.completion[row, t] == -100:
                continue
            ratio = math.exp(new.logprobs[row, t].item() - old.logprobs[row, t])
            a = old.advantages[row, t].item()
            clipped = max(min(ratio, 1 + (args.clip_high or args.clip_coef)), 1 - args.clip_coef)
            q = math.exp(old.ref_logprobs[row, t] - new.logprobs[row, t].item())
            kl = q - math.log(q) - 1  # eq. 4
            terms.append(min(ratio * a, clipped * a) - args.kl_coef * kl + args.ent_coef * new.entropy[row, t].item())
        per_row.append(terms)
    if average == "sequence":
        return sum(sum(terms) / len(terms) for terms in per_row) / len(per_row)
    total, count = sum(map(sum, per_row)), sum(map(len, per_row))
    return total / (count if average == "token" else len(per_row) * args.gen_len)


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_grpo_objective_is_deepseekmath_equation_3_and_4(average):
    new, old = random_minibatch()
    new = new._replace(kl=rlhf.kl_estimate(new.logprobs, old.ref_logprobs, "k3"))
    args = RLHFArgs(loss_average=average, kl_coef=0.04, clip_high=0.3, ent_coef=0.01)
    expected = brute_force_objective(new, old, args, average)
    assert rlhf.grpo_objective(new, old, args.kl_coef, args).item() == pytest.approx(expected, rel=1e-12)


def test_ppo_objective_is_equations_7_and_9():
    new, old = random_minibatch()
    args = RLHFArgs(kl_coef=0.0, vf_coef=0.15, ent_coef=0.001, loss_average="token")
    keep = old.mask
    ratio = (new.logprobs - old.logprobs).exp()[keep]
    a, clipped = old.advantages[keep], ratio.clamp(0.8, 1.2)
    surrogate = torch.where(ratio * a < clipped * a, ratio * a, clipped * a).mean()
    value_loss = (new.values - old.returns)[keep].pow(2).mean()
    expected = surrogate - 0.15 * value_loss + 0.001 * new.entropy[keep].mean()
    torch.testing.assert_close(rlhf.ppo_objective(new, old, args.kl_coef, args), expected)


@pytest.mark.parametrize("objective", [rlhf.grpo_objective, rlhf.ppo_objective])
@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_gradients_equal_finite_differences(objective, average):
    new, old = random_minibatch()
    args = RLHFArgs(loss_average=average)
    assert torch.autograd.gradcheck(lambda *fields: objective(Evaluation(*fields), old, args.kl_coef, args), tuple(new))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate_gradients_equal_finite_differences(estimator):
    new, old = random_minibatch()
    assert torch.autograd.gradcheck(lambda x: rlhf.kl_estimate(x, old.ref_logprobs, estimator), (new.logprobs,))


def test_kl_estimates_by_enumeration():
    """Σ_a π(a) k(a) over a vocabulary of 50: k1 and k3 are the KL; of the gradients only k2's is right."""
    torch.manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    p, q = logits.log_softmax(-1), torch.randn(50, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    k = {name: rlhf.kl_estimate(p, q, name) for name in ("k1", "k2", "k3")}
    for name in ("k1", "k3"):
        torch.testing.assert_close((p.exp().detach() * k[name]).sum(), exact)
    assert k["k3"].min() >= 0
    mean_gradient = {
        name: torch.autograd.grad((p.exp().detach() * k[name]).sum(), logits, retain_graph=True)[0] for name in k
    }
    torch.testing.assert_close(mean_gradient["k2"], gradient)
    assert mean_gradient["k1"].abs().max() < 1e-12


def test_full_kl_of_the_trainer_is_the_sum_over_the_vocabulary(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, temperature=0.7))
    randomize_adapters(trainer.policy)
    memory, *_ = trainer.rollout_phase()
    new, P = trainer.evaluate(memory), memory.prompt_width
    base = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    p = (trainer.policy.bridge(memory.tokens)[:, P - 1 : -1] / 0.7).log_softmax(-1)
    q = (base(memory.tokens).logits[:, P - 1 : -1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(new.kl, (p.exp() * (p - q)).sum(-1) * memory.mask, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new.entropy, -(p.exp() * p).sum(-1) * memory.mask, atol=1e-5, rtol=1e-4)
    index = memory.completion.clamp(min=0)[..., None]
    torch.testing.assert_close(memory.ref_logprobs, q.gather(2, index)[..., 0] * memory.mask, atol=1e-5, rtol=1e-4)


# ---- Memory, schedule, trainer ---------------------------------------------------------------------------------------


def test_minibatches_are_a_seeded_partition():
    _, old = random_minibatch()
    old = dataclasses.replace(old, returns=torch.arange(3.0))
    orders = [
        [mb.returns.tolist() for mb in old.minibatches(3, torch.Generator().manual_seed(s))] for s in (0, 0, 1, 2)
    ]
    assert all(sorted(sum(order, [])) == [0.0, 1.0, 2.0] for order in orders)
    assert orders[0] == orders[1] and len({str(order) for order in orders}) > 1


def test_learning_rate_rises_then_falls_to_final_scale(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, total_phases=11, warmup_steps=4, final_scale=0.1))
    scales = [trainer.lr_scale(phase) for phase in range(11)]
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and scales[-1] == pytest.approx(0.1)
    assert [a - b for a, b in itertools.pairwise(scales[4:])] == pytest.approx([0.15] * 6)
    memory, *_ = trainer.rollout_phase()
    lr = trainer.learning_phase(memory)["lr"]
    base, head = trainer.optimizer.param_groups
    assert lr == base["lr"] == pytest.approx(0.2 * trainer.args.base_lr)
    assert head["lr"] == pytest.approx(0.2 * trainer.args.head_lr)


def test_prompts_are_all_seen_before_any_is_repeated(gpt2, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join("abcde"))
    trainer = RLHFTrainer(small_args(gpt2, prompts=path, group_size=4))  # two prompts a phase
    drawn = [row["prompt"] for phase in range(10) for row in trainer.prompts_of(phase)]
    assert all(sorted(drawn[i : i + 5]) == list("abcde") for i in (0, 5, 10, 15)) and drawn[:5] != drawn[5:10]


@pytest.mark.parametrize("algo, lora", [("ppo", False), ("grpo", True)])
def test_a_run_is_reproducible_and_leaves_its_files(gpt2, tmp_path, capsys, algo, lora):
    runs = []
    for name in ("first", "second"):
        flags = f"--algo {algo} --batch-size 8 --gen-len 6 --total-phases 4 --device cpu".split()
        argv = ["--base-model", gpt2, "--run-dir", str(tmp_path / name), *flags, *["--lora"] * lora]
        assert rlhf.main(argv) == 0
        assert {p.name for p in (tmp_path / name).iterdir()} == {
            "args.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoint", "model", *["adapter"] * lora
        }  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["phase"] for line in lines] == [1, 2, 3, 4] and all(TIMINGS <= line.keys() for line in lines)
        runs.append([{key: value for key, value in line.items() if key not in TIMINGS} for line in lines])
        samples = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        assert {sample["phase"] for sample in samples} == {"before", 1, 2, 3, 4, "after"}
    assert runs[0] == runs[1]
    keys = "phase reward reward_std kl entropy clip_fraction grad_norm lr completion_length distinct_2 kl_coef".split()
    keys += ["reward/periods"]
    keys += ["value_loss", "explained_variance"] if algo == "ppo" else []
    assert runs[0][0].keys() == set(keys)
    assert "phase   4" in capsys.readouterr().out
    assert rlhf.main(["compare", str(tmp_path / "first"), str(tmp_path / "second"), "--output",
                      str(tmp_path / "both.png")]) == 0  # fmt: skip
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert rlhf.main(["compare", str(tmp_path)]) == 2


def test_it_learns(gpt2):
    """A random model, asked for the letter e, says it more often after a dozen phases."""
    trainer = RLHFTrainer(
        small_args(gpt2, algo="grpo", lora=True, reward=("char:e",), batch_size=64, base_lr=1e-2, kl_coef=0.0,
                   total_phases=12)
    )  # fmt: skip
    rewards = []
    for _ in range(12):
        memory, metrics, _ = trainer.rollout_phase()
        trainer.learning_phase(memory)
        rewards.append(metrics["reward"])
    assert rewards[-1] > 3 * (rewards[0] + 0.1)


def test_minibatch_means_are_weighted_by_tokens():
    new, old = random_minibatch(dtype=torch.float32)
    metrics = rlhf.minibatch_metrics(new, old, (0.8, 1.2))
    assert metrics["kl"] == pytest.approx(new.kl[old.mask].mean().item())
    ratio = (new.logprobs - old.logprobs).exp()[old.mask]
    assert metrics["clip_fraction"] == pytest.approx(((ratio > 1.2) | (ratio < 0.8)).float().mean().item())


# ---- The embedded model ----------------------------------------------------------------------------------------------


def test_english_prose_is_sentences_without_code():
    prose = rlhf.english_prose()
    text = " ".join(prose)
    assert len(text) > 100_000
    assert not re.search(r">>>|\.\.\.|::=|[_=<>\[\]{}|\d]|\(\)", text)
    assert all(document[0].isupper() and document.endswith(".") for document in prose)


def test_tiny_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))

    def die(path):
        (path / "half").write_text("written")
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf, "train_tiny", die)
    with pytest.raises(KeyboardInterrupt):
        rlhf.tiny_model()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    train_tiny = rlhf.train_tiny
    monkeypatch.setattr(rlhf, "train_tiny", lambda path: train_tiny(path, steps=5))
    path = rlhf.tiny_model()
    monkeypatch.setattr(rlhf, "train_tiny", die)
    assert rlhf.tiny_model() == path  # found, not trained again
    model = TransformerWithValueHead("tiny")
    assert model.has_linear_head and (model.bridge.cfg.n_layers, model.bridge.cfg.d_model) == (4, 128)
    text = "This is a test, with ünïcode."
    assert model.bridge.tokenizer.decode(model.bridge.tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("module", [rlhf, kernels])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# ---- Real models: families, export, resume, processes ----------------------------------------------------------------

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2),
    "neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
}


def logits_of(directory: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers makes of a directory, an adapter added to its weights by hand as PEFT's documents say:
    W + alpha/r B A, transposed where fan_in_fan_out is set."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
        for name in config["target_modules"]:
            A, B = (tensors.pop(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB")
            rank = config["rank_pattern"].get(name, config["r"])
            assert len(A) == rank
            update = config["alpha_pattern"].get(name, config["lora_alpha"]) / rank * B @ A
            model.get_submodule(name).weight.data += update.t() if config["fan_in_fan_out"] else update
        assert not tensors
    with torch.no_grad():
        return model(torch.arange(3, 13)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_export_loads_in_transformers_and_as_peft(family, lora, tmp_path):
    base = save_model(tmp_path / "base", FAMILIES[family]())
    targets = ("q", "v", "o", "out")  # not k: the fused matrix of GPT-2 and NeoX has rows without an adapter
    trainer = RLHFTrainer(
        small_args(base, algo="grpo", lora=lora, reward=("char:e",), base_lr=1e-2, lora_targets=targets,
                   run_dir=tmp_path / "run", total_phases=2)
    )  # fmt: skip
    if lora:
        randomize_adapters(trainer.policy)
    trainer.train()
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        trained = trainer.policy.bridge.original_model(tokens).logits
    assert (trained - logits_of(base)).abs().max() > 0.1
    torch.testing.assert_close(logits_of(tmp_path / "run" / "model"), trained, atol=1e-4, rtol=0)
    if lora:
        torch.testing.assert_close(logits_of(base, tmp_path / "run" / "adapter"), trained, atol=1e-4, rtol=0)
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "run" / "model")
        for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    assert tokenizer("This is", add_special_tokens=False).input_ids == trainer.tokenizer.encode(
        "This is", add_special_tokens=False
    )
    greedy = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    ours = rlhf.get_samples(trainer.policy, tokens, torch.ones_like(tokens).bool(), 8, top_k=1)
    assert greedy[0].tolist() == ours.tokens[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_lora_work_in_every_family(family, tmp_path):
    base = save_model(tmp_path / "base", FAMILIES[family]())
    trainer = RLHFTrainer(small_args(base, algo="ppo", lora=True, lora_targets=("q", "k", "v", "o", "in", "out")))
    for _ in range(2):
        memory, *_ = trainer.rollout_phase()
        new = trainer.evaluate(memory)
        torch.testing.assert_close(new.logprobs, memory.logprobs, atol=1e-5, rtol=0)
        trainer.learning_phase(memory)
    tokens, mask = rlhf.tokenize(trainer.tokenizer, ["No", "Here is a longer sentence, with a comma"], "cpu")
    with torch.no_grad():
        padded = trainer.policy.features(tokens, mask)[0, -1]
        alone = trainer.policy.features(tokens[:1, -int(mask[0].sum()) :], mask[:1, -int(mask[0].sum()) :])[0, -1]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_frozen_weights_in_bfloat16(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, dtype="bfloat16", reward=("char:e",)))
    assert {weight.dtype for weight in trainer.trained.values()} == {torch.float32}
    assert {weight.dtype for weight in trainer.policy.published.values()} == {torch.bfloat16}
    memory, *_ = trainer.rollout_phase()
    metrics = trainer.learning_phase(memory)
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["grad_norm"] > 0


@pytest.mark.parametrize("lora", [True, False])
def test_train_layers_trains_only_the_last_blocks(gpt2, lora):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=lora, train_layers=1, reward=("char:e",), base_lr=1e-2))
    before = {name: weight.clone() for name, weight in rlhf.trained_weights(trainer.policy).items()}
    memory, *_ = trainer.rollout_phase()
    trainer.learning_phase(memory)
    moved = {name for name, weight in rlhf.trained_weights(trainer.policy).items() if not weight.equal(before[name])}
    assert moved and all(".h.1." in name or "ln_f" in name for name in moved)
    assert any("c_attn" in name for name in moved)


def test_full_fine_tuning_moves_every_weight(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", reward=("char:e",), base_lr=1e-2, temperature=1.5))
    before = {name: weight.clone() for name, weight in rlhf.trained_weights(trainer.policy).items()}
    memory, *_ = trainer.rollout_phase()
    trainer.learning_phase(memory)
    assert all(not weight.equal(before[name]) for name, weight in rlhf.trained_weights(trainer.policy).items())


def metrics_of(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("algo, lora", [("ppo", True), ("grpo", False)])
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(gpt2, prompts_file, tmp_path, algo, lora):
    flags = f"--algo {algo} --batch-size 8 --gen-len 6 --num-minibatches 2 --total-phases 6 --warmup-steps 1".split()
    flags += ["--base-model", gpt2, "--prompts", str(prompts_file), "--group-size", "4", "--reward", "char:e"]
    flags += ["--save-every", "1", "--kl-target", "0.05", "--device", "cpu", *["--lora"] * lora]
    assert rlhf.main([*flags, "--run-dir", str(tmp_path / "whole")]) == 0
    torn, kills, delays = tmp_path / "torn", 0, random.Random(0)
    for attempt in range(60):
        goes_on = (torn / "args.json").exists()
        child = os.fork()
        if child == 0:
            with contextlib.redirect_stdout(io.StringIO()):
                os._exit(rlhf.main(["--resume", str(torn)] if goes_on else [*flags, "--run-dir", str(torn)]))
        deadline = time.monotonic() + delays.uniform(0.05, 0.2 + 0.05 * attempt)
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        if status[0] == 0:
            os.kill(child, signal.SIGKILL)
            kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        elif (code := os.waitstatus_to_exitcode(status[1])) == 0:
            break
        else:
            pytest.fail(f"the run ended with {code}")
    assert kills >= 2
    assert metrics_of(torn) == metrics_of(tmp_path / "whole")
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (torn / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    ours, whole = (
        safetensors.torch.load_file(run / "checkpoint" / "phase-00006.safetensors")
        for run in (torn, tmp_path / "whole")
    )
    assert ours.keys() == whole.keys() and all(ours[name].equal(whole[name]) for name in whole)


def test_resume_refuses_what_it_should(gpt2, tmp_path, capsys):
    run, flags = tmp_path / "run", "--batch-size 8 --gen-len 6 --num-minibatches 2 --total-phases 3 --warmup-steps 1"
    shutil.copytree(gpt2, tmp_path / "base")
    argv = [*flags.split(), "--lora", "--base-model", str(tmp_path / "base"), "--save-every", "1"]
    assert rlhf.main([*argv, "--run-dir", str(run)]) == 0
    whole = metrics_of(run)

    def resumed(*more, expected: str, status: int = 2):
        capsys.readouterr()
        assert rlhf.main(["--resume", str(run), *more]) == status
        out, err = capsys.readouterr()
        text = (out if status == 0 else err).replace("\n", " ")
        assert re.search(expected, text), text
        assert status == 0 or err.count("\n") == 1

    resumed("--base-lr", "3", expected="begun with --base-lr 0.0005, not 3.0")
    (run / "checkpoint" / "optimizer.pt").write_bytes(b"\x80\x04.")
    resumed(expected="optimizer.pt: is no checkpoint.*pickle")
    (run / "checkpoint" / "optimizer.pt").unlink()
    (run / "checkpoint" / "phase-00003.safetensors").write_bytes(b"\x80\x04.")
    resumed(expected="phase-00003.safetensors: is damaged.*the checkpoint before", status=0)
    assert metrics_of(run) == whole
    save_model(tmp_path / "base", transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2))
    resumed(expected="its base model was another")
    assert rlhf.main(["--resume", str(tmp_path)]) == 2


def test_a_full_disk_leaves_the_checkpoint_before(gpt2, tmp_path, monkeypatch, capsys):
    trainer = RLHFTrainer(small_args(gpt2, lora=True, run_dir=tmp_path / "run", save_every=1, total_phases=2))
    trainer.train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint").iterdir()}

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    trainer.phase = 3
    with pytest.raises(SettingError, match="phase-00003.safetensors: cannot be written .No space left on device"):
        rlhf.save_checkpoint(trainer)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint").iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_phase_and_leaves_a_checkpoint(gpt2, tmp_path, capsys, number):
    source = tmp_path / "reward.py"
    source.write_text(
        "import os\ncalls = []\n\ndef f(prompts, completions, **columns):\n    calls.append(0)\n"
        f"    if len(calls) == 3:\n        os.kill(os.getpid(), {int(number)})\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    flags = "--batch-size 8 --gen-len 6 --num-minibatches 2 --total-phases 5 --warmup-steps 1 --device cpu".split()
    argv = [*flags, "--base-model", gpt2, "--reward", f"{source}:f"]
    assert rlhf.main([*argv, "--run-dir", str(tmp_path / "run")]) == 128 + number
    assert "stopped after phase 2; go on with" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["phase-00002.safetensors"]
    source.write_text("def f(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    assert rlhf.main(["--resume", str(tmp_path / "run")]) == 0
    assert rlhf.main([*argv, "--run-dir", str(tmp_path / "whole")]) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failing_reward_function_costs_no_learning(gpt2, tmp_path, capsys):
    source = tmp_path / "reward.py"
    source.write_text(
        "calls = []\n\ndef f(prompts, completions, **columns):\n    calls.append(0)\n"
        "    return [1.0 / (4 - len(calls))] * len(completions)\n"
    )
    argv = "--batch-size 8 --gen-len 6 --num-minibatches 2 --total-phases 5 --warmup-steps 1 --device cpu".split()
    argv += ["--base-model", gpt2, "--reward", f"{source}:f", "--run-dir", str(tmp_path / "run")]
    assert rlhf.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("Traceback") == 1 and "reward.py:f: raised ZeroDivisionError" in error.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["phase-00002.safetensors"]


PROCESS = """
import sys, torch
import rlhf
base, out = sys.argv[1:]
results = {}
for algo, group, average in (("ppo", 12, "sequence"), ("grpo", 4, "token"), ("rloo", 12, "token")):
    args = rlhf.RLHFArgs(
        base_model=base, algo=algo, lora=True, reward=("char:e",), batch_size=12, group_size=group, gen_len=6,
        device="cpu", num_minibatches=1, batches_per_learning_phase=1, total_phases=3, warmup_steps=0, loss_average=average, temperature=1.5,
        run_dir=rlhf.Path(out, algo),
    )
    trainer = rlhf.RLHFTrainer(args)
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    sample, generator = trainer.sample, torch.Generator().manual_seed(3)

    def share_of_one_batch(rows, _):
        drawn, texts = sample([{"prompt": "This is"}] * 12, generator)
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
        return rlhf.Samples(*(None if x is None else x[mine] for x in drawn)), texts[mine]

    trainer.sample = share_of_one_batch
    memory, metrics, _ = trainer.rollout_phase()
    metrics |= trainer.learning_phase(memory)
    results[algo] = {n: w.detach().clone() for n, w in trainer.trained.items()}, metrics
if rank == 0:
    torch.save(results, out + ".pt")
"""


def launch(count: int, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(rlhf.__file__).parent), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_make_the_update_of_one(gpt2, tmp_path):
    """Groups of 4 straddle the processes' halves of 12 completions; a group of 12 is spread over both."""
    (tmp_path / "process.py").write_text(PROCESS)
    results = []
    for count in (1, 2):
        run = launch(count, str(tmp_path / "process.py"), gpt2, str(tmp_path / str(count)))
        assert run.returncode == 0, run.stderr
        results.append(torch.load(tmp_path / f"{count}.pt"))
    for algo, (weights, metrics) in results[0].items():
        assert results[1][algo][1] == pytest.approx(metrics, abs=1e-5), algo
        for name, weight in weights.items():
            torch.testing.assert_close(results[1][algo][0][name], weight, atol=1e-5, rtol=0)


def test_a_whole_run_on_two_processes_and_one_that_dies(gpt2, tmp_path):
    flags = (
        "--algo grpo --lora --batch-size 8 --gen-len 6 --num-minibatches 2 --total-phases 3 --warmup-steps 1".split()
    )
    flags += ["--base-model", gpt2, "--device", "cpu"]
    run = launch(2, rlhf.__file__, *flags, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert [line["phase"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert run.stdout.count("samples after training") == 1  # one process talks
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    (tmp_path / "reward.py").write_text(
        "import os, signal\n\ndef f(prompts, completions, **columns):\n"
        "    if os.environ['RANK'] == '1':\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [0.0] * len(prompts)\n"
    )
    start = time.monotonic()
    dead = launch(2, rlhf.__file__, *flags, "--reward", f"{tmp_path}/reward.py:f", "--run-dir", str(tmp_path / "dead"))
    assert dead.returncode != 0 and time.monotonic() - start < 120


# ---- Rewards and settings of the second chapter ----------------------------------------------------------------------


def test_several_rewards_are_weighted_and_the_gold_one_is_only_logged(gpt2):
    settings = dict(
        reward=("char:e", "char:s"), reward_weights=(1.0, 0.5), gold_reward="char:a", normalize_reward=False
    )
    trainer = RLHFTrainer(small_args(gpt2, batch_size=64, gen_len=20, num_minibatches=1, **settings))
    _, metrics, samples = trainer.rollout_phase()
    texts = [sample["completion"] for sample in samples]
    for char, name in (("e", "reward/char:e"), ("s", "reward/char:s"), ("a", "gold_reward")):
        assert metrics[name] == pytest.approx(sum(text.count(char) for text in texts) / 64)
    expected = [text.count("e") + 0.5 * text.count("s") for text in texts]
    assert [sample["reward"] for sample in samples] == expected
    assert metrics["reward"] == pytest.approx(sum(expected) / 64)


@pytest.fixture
def classifier(gpt2, tmp_path) -> str:
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(gpt2, num_labels=2, id2label={0: "BAD", 1: "GOOD"}, pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "classifier")
    transformers.AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def test_classifier_reward_is_the_labels_probability(classifier, gpt2):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    prompts, completions = ["This is", "No", ""], [" a test.", ". It has words " * 40, ""]
    scores = rlhf.load_reward(f"classifier:{classifier}:GOOD", RLHFArgs(), Path(), "cpu")(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        tokens = tokenizer(prompt + completion, return_tensors="pt").input_ids[:, -64:]  # the end of a long text
        if tokens.shape[1]:
            with torch.no_grad():
                assert score == pytest.approx(model(tokens).logits.softmax(-1)[0, 1].item(), abs=1e-5)
    assert all(0 <= score <= 1 for score in scores)
    trainer = RLHFTrainer(small_args(gpt2, reward=(f"classifier:{classifier}:GOOD",)))
    assert 0 < trainer.rollout_phase()[1]["reward"] < 1


@pytest.mark.parametrize("suffix, expected", [("", "no such label.*BAD, GOOD"), (":UGLY", "no such label.*BAD, GOOD")])
def test_classifier_labels_are_checked(classifier, suffix, expected):
    with pytest.raises(SettingError, match=expected):
        rlhf.load_reward(f"classifier:{classifier}{suffix}", RLHFArgs(), Path(), "cpu")
    with pytest.raises(SettingError, match="cannot be loaded"):
        rlhf.load_reward("classifier:/no/where", RLHFArgs(), Path(), "cpu")


def test_kl_coefficient_follows_its_target():
    """Ziegler et al.: e = clip(KL/target - 1, ±0.2), β ← β (1 + e n / horizon)."""
    args = RLHFArgs(kl_target=0.5, batch_size=64, kl_horizon=640)
    for kl, error in ((0.55, 0.1), (5.0, 0.2), (0.0, -0.2), (0.5, 0.0)):
        assert rlhf.adapt_kl_coef(0.3, kl, args) == pytest.approx(0.3 * (1 + error * 64 / 640))
    assert rlhf.adapt_kl_coef(0.3, 9.9, RLHFArgs()) == 0.3


def test_low_gpu_mem_takes_the_smaller_model_and_half_the_batch(monkeypatch, capsys):
    medium = RLHFArgs(base_model="gpt2-medium", lora=True)
    monkeypatch.setattr(rlhf, "machine_memory", lambda: 2 * 2**30)
    small = rlhf.relieve_memory(medium, "cpu")
    assert (small.base_model, small.batch_size) == ("gpt2", 32) and "saving memory" in capsys.readouterr().out
    monkeypatch.setattr(rlhf, "machine_memory", lambda: 64 * 2**30)
    assert rlhf.relieve_memory(medium, "cpu") == medium
    asked = rlhf.relieve_memory(dataclasses.replace(medium, low_gpu_mem=True, num_minibatches=64), "cpu")
    assert (asked.base_model, asked.batch_size) == ("gpt2", 64)  # 32 would not divide


def test_prompts_of_any_length_and_alphabet(gpt2, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffNo\r\nNo\r\n\r\nünïcode 漢字 🎉\r\n".encode() + b"word " * 8)
    rows = rlhf.load_prompts("", path)
    assert [row["prompt"] for row in rows] == ["No", "No", "ünïcode 漢字 🎉", "word " * 8]
    trainer = RLHFTrainer(small_args(gpt2, prompts=path, group_size=2))
    memory, *_ = trainer.rollout_phase()
    torch.testing.assert_close(trainer.evaluate(memory).logprobs, memory.logprobs, atol=1e-5, rtol=0)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match="not UTF-8"):
        rlhf.load_prompts("", path)


def test_model_directories_that_cannot_be_loaded(gpt2, tmp_path):
    for name, match in (("tokenizer*", "has no tokenizer"), ("model.safetensors", "cannot be loaded")):
        broken = tmp_path / name.strip("*")
        shutil.copytree(gpt2, broken)
        for path in broken.glob(name):
            path.write_bytes(path.read_bytes()[:2000]) if path.suffix == ".safetensors" else path.unlink()
        with pytest.raises(SettingError, match=match):
            TransformerWithValueHead(str(broken))
