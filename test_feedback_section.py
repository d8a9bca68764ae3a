"""Tests of the sections on human feedback, inspection and comparison; to be pasted into test_rlhf.py."""

import dataclasses
import itertools
import json
import math
import os
import pty
import random
import signal
import sys
import termios
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import pytest
import torch
import transformers

import rlhf
from rlhf import SettingError
from test_rlhf import gpt2, save_model  # noqa: F401

# ---- Labelling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def type_keys(monkeypatch):
    """Makes standard input a pipe that holds these keys and then ends."""

    def type_them(keys: str) -> None:
        reader, writer = os.pipe()
        os.write(writer, keys.encode())
        os.close(writer)
        monkeypatch.setattr(sys, "stdin", os.fdopen(reader))

    return type_them


def numbered_pair(number: int, answers: list[str]) -> tuple[str, str, str]:
    return "prompt", f"left {number}", f"right {number}"


def chosen(file: Path) -> list[str]:
    return [json.loads(line)["chosen"] for line in file.read_text().splitlines()]


def test_each_key_does_what_it_says(tmp_path, type_keys, capsys):
    file = tmp_path / "new" / "p.jsonl"
    type_keys("l\n\nxr s u\nr l q l")  # newlines, spaces and unknown keys are passed over; after q nothing is read
    rlhf.ask(file, 100, numbered_pair)
    # 0 left, 1 right, 2 skipped, 1 taken back, 1 right, 3 left
    assert chosen(file) == ["left 0", "right 1", "left 3"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == {"prompt": "prompt", "chosen": "left 0", "rejected": "right 0"}
    assert rows[1] == {"prompt": "prompt", "chosen": "right 1", "rejected": "left 1"}
    type_keys("ulr")  # a new session: the last answer can still be taken back, the skipped pair does not return
    rlhf.ask(file, 4, numbered_pair)
    assert chosen(file) == ["left 0", "right 1", "left 3", "right 4"]
    type_keys("l")
    rlhf.ask(file, 4, numbered_pair)  # enough already: asks nothing
    assert len(chosen(file)) == 4
    output = capsys.readouterr().out
    assert rlhf.KEYS in output and max(map(len, output.replace(str(file), "").splitlines())) <= 80


def test_undo_of_nothing_is_harmless_and_of_the_only_answer_empties_the_file(tmp_path, type_keys):
    type_keys("lu")
    rlhf.ask(tmp_path / "p.jsonl", 5, numbered_pair)
    assert (tmp_path / "p.jsonl").read_text() == ""
    type_keys("uul")
    rlhf.ask(tmp_path / "p.jsonl", 5, numbered_pair)
    assert chosen(tmp_path / "p.jsonl") == ["left 0"]


def test_no_pair_is_shown_twice_even_under_another_number(gpt2):  # noqa: F811
    policy, rows = rlhf.TransformerWithValueHead(gpt2), [{"prompt": "This is"}]
    prompt, left, right = rlhf.draw_pair(policy, rows, 0, [], 1, 0.5, 0)
    for answer in (rlhf.preference(prompt, left, right), rlhf.preference(prompt, right, left)):
        _, *other = rlhf.draw_pair(policy, rows, 0, [answer], 1, 0.5, 0)
        assert set(other) != {left, right}
    with pytest.raises(SettingError, match="nothing new for 'This is'"):
        rlhf.draw_pair(policy, rows, 0, [], 1, 1e-4, 0)


def test_half_a_line_is_set_aside_and_a_whole_one_kept(tmp_path, type_keys, capsys):
    file, line = tmp_path / "p.jsonl", rlhf.preference("prompt", "ünï", "x")
    file.write_bytes((line + "\n").encode() + line.encode()[:24])  # ends within a character
    type_keys("l")
    rlhf.ask(file, 2, numbered_pair)
    assert chosen(file) == ["ünï", "left 1"]
    assert (tmp_path / "p.jsonl.torn").read_bytes() == line.encode()[:24] + b"\n"
    assert capsys.readouterr().out.count("was moved to") == 1
    file.write_text(line)  # as other programs leave it: whole, without a line feed
    type_keys("l")
    rlhf.ask(file, 2, numbered_pair)
    assert chosen(file) == ["ünï", "left 1"]


def label_in_a_child(file: Path, keys: str) -> tuple[int, int]:
    """A session in a process of its own; returns its id and the pipe that carries what it prints."""
    keys_out, keys_in = os.pipe()
    os.write(keys_in, keys.encode())
    said_out, said_in = os.pipe()
    if (child := os.fork()) == 0:
        try:
            sys.stdin, sys.stdout = os.fdopen(keys_out), os.fdopen(said_in, "w")
            rlhf.ask(file, 10**6, numbered_pair)
        finally:
            os._exit(0)
    for fd in (keys_out, keys_in, said_in):
        os.close(fd)
    return child, said_out


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_answers_survive_kill_9_none_lost_none_twice(tmp_path):
    file, rng, killed = tmp_path / "p.jsonl", random.Random(0), 0
    answered_before = 0
    for _ in range(40):
        keys = "".join(rng.choices("lrsu", weights=(5, 5, 2, 2), k=60))
        child, said = label_in_a_child(file, keys)
        first = os.read(said, 1)  # it has started; now at any moment
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with os.fdopen(said, "rb") as rest:
            said_lines = (first + rest.read()).decode(errors="replace").splitlines()
        acknowledged = sum((line in ("left", "right")) - (line == "undone") for line in said_lines)
        whole = [line for line in file.read_text().split("\n")[:-1]] if file.exists() else []
        # One key can be on the disk and not yet acknowledged. Undone with nothing left to undo cannot occur so late.
        assert abs(len(whole) - answered_before - acknowledged) <= 1 or answered_before < 40
        numbers = [int(json.loads(line)["chosen"].split()[1]) for line in whole]
        skips = tmp_path / "p.jsonl.skipped"
        lines = skips.read_text().split("\n")[:-1] if skips.exists() else []
        skipped = {json.loads(line)["pair"] for line in lines}
        assert len(lines) == len(skipped)
        expected = [n for n in range(max(numbers, default=-1) + 1) if n not in skipped]
        assert numbers == expected  # no hole, no repetition, in order
        answered_before = len(whole)
    assert killed >= 20 and answered_before > 40


def test_the_command_goes_on_where_it_ended(gpt2, tmp_path, type_keys, capsys):  # noqa: F811
    def session(file: str, keys: str, *flags: str) -> list[str]:
        type_keys(keys)
        argv = ["label", str(tmp_path / file), "--base-model", gpt2, "--gen-len", "6", "--device", "cpu", *flags]
        assert rlhf.main(argv) == 0
        return (tmp_path / file).read_text().splitlines()

    at_once = session("once", "lrslrr")
    session("parts", "lrs")
    in_parts = session("parts", "lrr")
    assert at_once == in_parts and len(set(at_once)) == 5
    for row in map(json.loads, at_once):
        assert row.keys() == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"]
        assert row["prompt"] == "This is"
    assert len(session("limited", "l" * 9, "--pairs", "3")) == 3
    assert session("seeded", "lrslrr", "--seed", "1") != at_once
    assert "3 answers in" in capsys.readouterr().out


def test_left_and_right_are_a_fair_coin(gpt2):  # noqa: F811
    """Of two one-token completions, each order comes as often."""
    policy = rlhf.TransformerWithValueHead(gpt2)
    pairs = [rlhf.draw_pair(policy, [{"prompt": "This is"}], n, [], 1, 0.3, 0)[1:] for n in range(300)]
    likeliest = max({left for left, _ in pairs}, key=[text for pair in pairs for text in pair].count)
    sides = [left == likeliest for left, right in pairs if likeliest in (left, right)]
    assert abs(sum(sides) - len(sides) / 2) < 2 * math.sqrt(len(sides)) and len(sides) > 50
    assert all(left != right for left, right in pairs)


def test_a_terminal_needs_no_enter_and_is_left_as_it_was(monkeypatch):
    master, slave = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(slave))
    before = termios.tcgetattr(slave)
    keys = rlhf.keypresses()
    os.write(master, b"L")
    assert next(keys) == "l"
    assert not termios.tcgetattr(slave)[3] & termios.ICANON
    keys.close()
    assert termios.tcgetattr(slave) == before


# ---- Learned rewards -------------------------------------------------------------------------------------------------


def write_preferences(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


FINE = {"prompt": "This", "chosen": " is", "rejected": " has"}


def test_preferences_with_and_without_the_prompt_in_them(tmp_path):
    rows = [
        FINE | {"score": 3},  # other columns are no concern
        {"prompt": "This", "chosen": "This is", "rejected": "This has"},
        {"prompt": "a", "chosen": "a", "rejected": "b"},  # only one begins with the prompt: by chance
        {"prompt": "", "chosen": "x", "rejected": "y"},
    ]
    pairs = rlhf.load_preferences(write_preferences(tmp_path / "p.jsonl", rows))
    assert pairs == [("This is", "This has"), ("This is", "This has"), ("aa", "ab"), ("x", "y")]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([], "is empty"),
        ([FINE], "holds one preference"),
        ([FINE, FINE | {"rejected": " is"}], "line 2: .* are the same text"),
        ([FINE, {"prompt": "a", "chosen": "b"}], 'line 2: expected a text under "rejected", found none'),
        ([{"chosen": "a", "rejected": "b"}], 'line 1: expected a text under "prompt", found none'),
        ([FINE, "", "{"], "line 3: is not JSON"),
        ([FINE, "[1]"], 'line 2: expected a text under "prompt"'),
        ([FINE | {"chosen": [{"role": "user", "content": "hi"}]}], 'text under "chosen", found a list of messages'),
    ],
)
def test_bad_preferences_say_where(tmp_path, rows, expected):
    with pytest.raises(SettingError, match=expected):
        rlhf.load_preferences(write_preferences(tmp_path / "p.jsonl", rows))
    with pytest.raises(SettingError, match="no such file"):
        rlhf.load_preferences(tmp_path / "nowhere.jsonl")


def test_bradley_terry_by_hand_and_its_gradient():
    # margins 2, -1: -log σ is log(1 + e^-2) = 0.126928 and log(1 + e^1) = 1.313262, mean 0.720095
    margins = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = rlhf.bradley_terry_loss(margins + 5, torch.full_like(margins, 5))
    assert loss.item() == pytest.approx(0.720095, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, margins)  # -(1 - σ(m)) / 2
    torch.testing.assert_close(gradient, -(1 - margins.detach().sigmoid()) / 2)


def test_calibration_error_by_brute_force():
    torch.manual_seed(0)
    margins, total = torch.randn(500) * 2, 0.0
    for low in range(10):
        inside = [m for m in margins.tolist() if low <= 10 / (1 + math.exp(-abs(m))) < low + 1]
        if inside:
            accuracy = sum(m > 0 for m in inside) / len(inside)
            confidence = sum(1 / (1 + math.exp(-abs(m))) for m in inside) / len(inside)
            total += len(inside) / 500 * abs(accuracy - confidence)
    assert rlhf.calibration_error(margins) == pytest.approx(total, abs=1e-5)
    honest = torch.where(torch.rand(20_000) < torch.tensor(1.0).sigmoid(), 1.0, -1.0)
    assert rlhf.calibration_error(honest) < 0.02 < rlhf.calibration_error(5 * honest)


@pytest.fixture(scope="module")
def learned(gpt2, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    """A preferences file in which a final stop is better than a final comma, and the reward model learned from it."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("learned")
    texts = [" ".join(rng.choices("it has words and a longer test".split(), k=rng.randint(1, 6))) for _ in range(120)]
    rows = [{"prompt": "This is ", "chosen": a + ".", "rejected": b + ","} for a, b in itertools.pairwise(texts)]
    file = write_preferences(path / "p.jsonl", rows)
    return file, rlhf.train_reward_model(file, gpt2, path / "run" / "reward_model", "cpu", seed=0)


def test_a_reward_is_learned_and_reloads_as_an_ordinary_classifier(learned):
    file, directory = learned
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert model.config.num_labels == 1
    pairs = rlhf.load_preferences(file)
    with torch.no_grad():  # one by one, without any padding
        rewards = [[model(**tokenizer(t, return_tensors="pt")).logits.item() for t in pair] for pair in pairs]
    assert sum(a > b for a, b in rewards) / len(rewards) > 0.95
    assert abs(sum(map(sum, rewards)) / len(rewards) / 2) < 0.1 * numpy.std(rewards)  # training texts alone: exactly 0
    reward_fn = rlhf.classifier_reward(str(directory), None, "cpu")
    prompts, completions = ["This is "] * len(pairs), [pair.chosen.removeprefix("This is ") for pair in pairs]
    assert reward_fn(prompts=prompts, completions=completions) == pytest.approx([a for a, _ in rewards], abs=1e-4)


def test_of_a_text_longer_than_the_context_the_end_counts(learned):
    reward_fn = rlhf.classifier_reward(str(learned[1]), None, "cpu")
    tail = " and a test" * 40
    stop, comma, other = reward_fn(prompts=["", "", "No" * 50], completions=[tail + ".", tail + ",", tail + "."])
    assert stop > comma and other == pytest.approx(stop, abs=1e-5)


def test_the_reward_has_mean_zero_and_merging_changes_nothing(gpt2):  # noqa: F811
    model, tokenizer = rlhf.scalar_model(gpt2, "cpu")
    model.eval()
    torch.manual_seed(0)
    texts = ["This is", "No.", "It has words and stops"]
    assert rlhf.score_all(model, tokenizer, texts).tolist() == [0.0, 0.0, 0.0]
    torch.nn.init.normal_(model.score.weight)
    base = rlhf.score_all(model, tokenizer, texts)
    rlhf.add_dropout_and_lora(model, rank=3, dropout=0.5)
    model.eval()
    layers = [layer for layer in model.modules() if isinstance(layer, rlhf.LoRALinear)]
    assert len(layers) == 4  # c_attn and c_proj of two blocks
    torch.testing.assert_close(rlhf.score_all(model, tokenizer, texts), base)
    for layer in layers:
        torch.nn.init.normal_(layer.lora_b, std=0.2)
    adapted = rlhf.score_all(model, tokenizer, texts)
    assert not torch.allclose(adapted, base, atol=0.1)
    rlhf.merge_dropout_and_lora(model)
    assert not any(isinstance(layer, rlhf.LoRALinear) for layer in model.modules())
    torch.testing.assert_close(rlhf.score_all(model, tokenizer, texts), adapted, atol=1e-4, rtol=1e-4)
    rlhf.subtract_mean(model, tokenizer, texts)
    torch.testing.assert_close(rlhf.score_all(model, tokenizer, texts), adapted - adapted.mean(), atol=1e-4, rtol=1e-4)


def test_a_run_learns_its_reward_and_remembers_it(learned, gpt2, tmp_path, capsys):  # noqa: F811
    """--reward preferences:FILE, from the file to RL; and --gold-reward takes its place beside it."""
    run, flags = tmp_path / "run", "--algo grpo --lora --batch-size 8 --gen-len 6 --total-phases 2 --warmup-steps 1"
    argv = [*flags.split(), "--device", "cpu", "--base-model", gpt2, "--run-dir", str(run)]
    assert rlhf.main([*argv, "--reward", f"preferences:{learned[0]}", "--gold-reward", "periods"]) == 0
    assert "of 18 held out" in capsys.readouterr().out
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all("gold_reward" in m for m in metrics)
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    again = rlhf.classifier_reward(str(run / "reward_model"), None, "cpu")
    (reward,) = again(prompts=[sample["prompt"]], completions=[sample["completion"]])
    assert sample["reward"] == pytest.approx(reward, abs=1e-4)
    assert rlhf.main(["inspect", str(run), "--samples", "4", "--gen-len", "6"]) == 0
    for rewards in (["preferences:nowhere.jsonl"], [f"preferences:{learned[0]}"] * 2):
        flags = [flag for reward in rewards for flag in ("--reward", reward)]
        assert rlhf.main([*argv[:-1], str(tmp_path / "other"), *flags]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---- Inspection ------------------------------------------------------------------------------------------------------


def make_run(path: Path, base_model: str, model) -> Path:
    model.save_pretrained(path / "model")
    transformers.AutoTokenizer.from_pretrained(base_model).save_pretrained(path / "model")
    (path / "args.json").write_text(json.dumps({"base_model": base_model, "prefix": "This is"}))
    return path


@pytest.fixture(scope="module")
def collapsed(gpt2, tmp_path_factory) -> Path:  # noqa: F811
    """A run whose model was trained until it writes little but stops."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    torch.manual_seed(0)
    tokens = torch.tensor([[0, *tokenizer.encode("This is" + "." * 20)]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return make_run(tmp_path_factory.mktemp("collapsed"), gpt2, model)


ARCHITECTURES = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2),
    "llama": transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.2, attention_bias=True,
    ),
    "neox": transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        initializer_range=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attributions_add_up_to_the_logit_and_each_is_the_heads_own(tmp_path, architecture):
    path = save_model(tmp_path, ARCHITECTURES[architecture])
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():  # gains that are not 1, biases that are not 0
        if "bias" in name or "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(path)
    bridge, id = rlhf.load_bridge(path, "cpu")[0], 17
    tokens = torch.randint(1, 250, (3, 9))
    where = torch.rand(3, 9) < 0.5
    texts = rlhf.Texts(tokens, where, where)
    _, cache = rlhf.read(bridge, texts)
    share = rlhf.attribute(bridge, cache, id, where)
    with torch.no_grad():
        truth = model(tokens).logits[where][:, id].mean().item()
    assert share.total == pytest.approx(truth, abs=1e-3)
    assert sum(abs(x) for x in (share.embedding, share.biases)) > 0.01
    # A head's own: what is missing from the residual stream without it, through the norm as it was.
    heads, norm = bridge.cfg.n_heads, bridge.ln_final.original_component
    direction = bridge.unembed.original_component.weight[id]
    for head in range(heads):
        written = []

        def without(x, hook, head=head):
            return x * (torch.arange(heads) != head)[:, None]

        def keep(x, hook, written=written):
            written.append(x.detach())

        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_out", keep)])
        hooks = [("blocks.1.attn.o.hook_in", without), ("blocks.1.attn.hook_out", keep)]
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        x = (written[0] - written[1])[where]
        x = x if architecture == "llama" else x - x.mean(-1, keepdim=True)
        expected = (x / cache["ln_final.hook_scale"][where] * norm.weight) @ direction
        assert share.components[1, head].item() == pytest.approx(expected.mean().item(), abs=1e-4)


def test_named_components_do_lower_the_logit(collapsed, gpt2, capsys):  # noqa: F811
    """Ablated in Hugging Face's model, by zeroing weights, without any hook."""
    assert rlhf.main(["inspect", str(collapsed), "--samples", "8", "--gen-len", "10"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines()[3:-1])) <= 80
    assert (collapsed / "inspect.png").read_bytes().startswith(b"\x89PNG")
    names = " ".join(output.split("ablated, these lower the logit of '.': ")[1].split("\n\n")[0].split())
    assert names.startswith("layer ")
    trained = rlhf.TransformerWithValueHead(str(collapsed / "model"))
    id = rlhf.single_token(trained.bridge.tokenizer, ".")
    texts = rlhf.draw_texts(trained, "This is", id, 8, 10, 0)
    assert (texts.tokens[:, 1:][texts.where[:, :-1]] == id).all()  # the column before each stop
    truth = transformers.AutoModelForCausalLM.from_pretrained(collapsed / "model")
    with torch.no_grad():
        intact = truth(texts.tokens).logits[texts.where][:, id].mean()
        for name in names.split(", "):
            _, layer, kind, *head = name.split()
            model = transformers.AutoModelForCausalLM.from_pretrained(collapsed / "model")
            block = model.transformer.h[int(layer)]
            if kind == "MLP":
                block.mlp.c_proj.weight.zero_()
                block.mlp.c_proj.bias.zero_()
            else:
                block.attn.c_proj.weight[16 * int(head[0]) : 16 * int(head[0]) + 16] = 0
            drop = (intact - model(texts.tokens).logits[texts.where][:, id].mean()).item()
            part = 2 if kind == "MLP" else int(head[0])
            assert drop > 0
            assert rlhf.ablation_drop(trained.bridge, texts, id, int(layer), part) == pytest.approx(drop, abs=1e-3)


def test_what_does_not_lower_the_logit_is_not_named(capsys):
    share = rlhf.Attribution(torch.arange(6.0).view(2, 3), embedding=1.0, biases=2.0)
    drops = {(1, 2): 0.5, (1, 1): -0.1, (0, 2): 0.0, (1, 0): 1.5}
    rlhf.print_inspection(".", torch.ones(3), [torch.zeros(3)] * 2, [share] * 2, drops, {})
    output = capsys.readouterr().out
    assert "lower the logit of '.': layer 1 MLP, layer 1 head 0\n" in output
    rest = next(line.split() for line in output.splitlines() if line.startswith("all other"))
    assert rest[-3:] == ["1", "1", "0"]  # 0 + 1 + 2 + 3 + 4 + 5, less the four in the table


def test_lens_and_kl_by_brute_force(collapsed, gpt2):  # noqa: F811
    base, trained = (rlhf.TransformerWithValueHead(str(path)) for path in (gpt2, collapsed / "model"))
    texts = rlhf.draw_texts(trained, "This is", 5, 4, 6, 0)
    (q, _), (p, cache) = (rlhf.read(model.bridge, texts) for model in (base, trained))
    divergence = rlhf.kl_by_position(q, p, texts.is_completion)
    P = texts.tokens.shape[1] - len(divergence)
    for position in range(len(divergence)):
        values = []
        for row in range(4):
            if texts.is_completion[row, P - 1 + position]:
                a, b = (x[row, P - 1 + position].double().softmax(-1) for x in (p, q))
                values.append(float((a * (a / b).log()).sum()))
        assert divergence[position].item() == pytest.approx(sum(values) / len(values), rel=1e-3)
    lens = rlhf.logit_lens(trained.bridge, cache, 5, texts.where)
    assert len(lens) == 3
    assert lens[-1].item() == pytest.approx(p.log_softmax(-1)[texts.where][:, 5].mean().item(), abs=1e-4)
    model = transformers.AutoModelForCausalLM.from_pretrained(collapsed / "model")
    with torch.no_grad():
        states = model(texts.tokens, output_hidden_states=True).hidden_states
        early = model.lm_head(model.transformer.ln_f(states[1])).log_softmax(-1)
    assert lens[1].item() == pytest.approx(early[texts.where][:, 5].mean().item(), abs=1e-4)


def test_weight_updates_know_size_and_rank(gpt2, tmp_path):  # noqa: F811
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    base, numbers = transformers.AutoModelForCausalLM.from_pretrained(gpt2), numpy.random.default_rng(0)
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data += torch.tensor(numbers.normal(size=(32, 3)) @ numbers.normal(size=(3, 128)), dtype=torch.float32)
    run = make_run(tmp_path, gpt2, model)
    updates = rlhf.weight_updates(*(rlhf.load_bridge(path, "cpu")[0] for path in (gpt2, str(run / "model"))))
    assert len(updates) == 1 + 2 * 6
    assert rlhf.main(["inspect", str(run), "--token", "$", "--samples", "2", "--gen-len", "4"]) == 0  # no mathematics
    moved = {key: update for key, update in updates.items() if update.size}
    assert moved.keys() == {("mlp.in", 1)}
    before = base.transformer.h[1].mlp.c_fc.weight.detach().double().numpy()
    difference = weight.detach().double().numpy() - before
    s = numpy.linalg.svd(difference, compute_uv=False)[:3]
    s = s / s.sum()
    assert moved["mlp.in", 1].rank == pytest.approx(math.exp(-(s * numpy.log(s)).sum()), rel=1e-3)
    expected = math.sqrt((difference**2).sum() / (before**2).sum())
    assert moved["mlp.in", 1].size == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_inspected_says_so_in_one_line(collapsed, tmp_path, capsys):
    (tmp_path / "args.json").write_text("{}")
    for argv, expected in [
        ([str(tmp_path / "nowhere")], "is no run directory"),
        ([str(tmp_path)], "holds no model"),
        ([str(collapsed), "--token", "zqj"], "is no single token but 3 ('z', 'q', 'j')"),
        ([str(collapsed), "--token", ""], "is no single token but 0"),
        ([str(collapsed), "--gen-len", "100"], "context of 64"),
        ([str(collapsed / "model")], "is no run directory"),
    ]:
        assert rlhf.main(["inspect", *argv]) == 2
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1 and expected in complaint, complaint


# ---- Pictures --------------------------------------------------------------------------------------------------------


def history(level: float, phases: int = 4, **more) -> list[dict]:
    keys = ("reward", "kl", "entropy", "distinct_2")
    return [{"phase": p} | {key: level * p for key in keys} | {k: v * p for k, v in more.items()}
            for p in range(1, phases + 1)]  # fmt: skip


def save_run(path: Path, metrics: list[dict], **settings) -> str:
    path.mkdir()
    (path / "args.json").write_text(json.dumps(dataclasses.asdict(rlhf.RLHFArgs(**settings)), default=str))
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return str(path)


@pytest.fixture
def figures(monkeypatch) -> list:
    kept = []
    monkeypatch.setattr(rlhf, "save_picture", lambda figure, path: kept.append(figure))
    return kept


def test_compare_makes_one_line_of_seeds_and_names_what_differs(tmp_path, figures):
    runs = [
        save_run(tmp_path / "a", history(1), seed=0, kl_coef=0.1),
        save_run(tmp_path / "b", history(3, phases=3), seed=1, kl_coef=0.1),
        save_run(tmp_path / "c", history(5), seed=0, kl_coef=0.2, run_dir=tmp_path / "c"),
    ]
    assert rlhf.main(["compare", *runs, "--output", str(tmp_path / "c.png")]) == 0
    (figure,) = figures
    mean, other = figure.axes[0].lines
    assert mean.get_ydata().tolist() == [2, 4, 6] and other.get_ydata().tolist() == [5, 10, 15, 20]
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {(1.0, 1.0), (1.0, 3.0), (3.0, 3.0), (3.0, 9.0)} <= {tuple(v) for v in band.tolist()}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["kl_coef 0.1 (mean of 2, band from lowest to highest)", "kl_coef 0.2"]
    path = next(axis for axis in figure.axes if axis.get_title().startswith("frontier")).lines[0]
    assert list(path.get_xdata()) == list(path.get_ydata()) == [2, 4, 6]
    figure.canvas.draw()  # the legend stands below everything else
    renderer = figure.canvas.get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    assert legend.y0 >= 0 and all(legend.y1 <= axis.get_tightbbox(renderer).y0 for axis in figure.axes)


def test_a_gold_reward_is_dashed_on_its_own_axis(tmp_path, figures):
    rlhf.plot_curves({"run": history(-1, gold_reward=7)}, tmp_path / "c.png")
    panel, gold = figures[0].axes[0], figures[0].axes[-1]
    assert [line.get_linestyle() for line in panel.lines] == ["-"]
    assert list(panel.lines[0].get_ydata()) == [-1, -2, -3, -4] and panel.get_ylim()[0] < -4
    (line,) = gold.lines
    assert line.get_linestyle() == "--" and list(line.get_ydata()) == [7, 14, 21, 28]
    assert [text.get_text() for text in gold.get_legend().get_texts()] == ["trained on, left axis", "gold, right axis"]


def test_what_cannot_be_compared_says_so_in_one_line(tmp_path, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "args.json").write_text("{}")
    for path, expected in [(tmp_path, "is no run directory"), (tmp_path / "half", "holds no metrics.jsonl")]:
        assert rlhf.main(["compare", str(path)]) == 2
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1 and expected in complaint, complaint
