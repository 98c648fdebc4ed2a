"""LoRA against autograd on W + B A, against peft's own loading, and through checkpoints and the evaluation."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from forked import another_owner
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers import Qwen2AudioForConditionalGeneration

import eval_mmau
from infra.errors import InputError
from model import lora
from model.checkpoints import (
    REMEMBERED,
    check_model,
    identify_model,
    load_policy,
    remembered_template,
    save_checkpoint,
)
from model.lora import adapter_off, add_lora, dropout_on, lora_layers
from policy import CompletionLogprobs, completion_logprobs, encode_prompts, sample_group
from training import preflight
from training.disk import checkpoint_bytes, state_bytes
from training.optimizer import ShardedAdamW
from training.run_folder import load_state, save_state

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 3, 12
CPU = torch.device("cpu")


def randomize(model):
    """Make the adapter look trained: B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator).to(weight.dtype)


def adapted(tiny, dtype, dropout=0.0, frozen=False, base="some/model", seed=0, targets=TARGETS):
    """Return the tiny model in `dtype`, and a copy with a random adapter."""
    plain = copy.deepcopy(tiny[0]).to(dtype)
    model = copy.deepcopy(plain)
    add_lora(model, base, RANK, ALPHA, dropout, targets, frozen, seed)
    randomize(model)
    return plain, model


@pytest.fixture(scope="module")
def inputs(tiny, questions):
    """Two prompts with two completions each, temperature 0.7."""
    prompt = encode_prompts(tiny[1], questions[:2], "answer")
    completions = torch.randint(200, (4, 5), generator=torch.Generator().manual_seed(0))
    return prompt, completions, torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None], 0.7


@torch.no_grad()
def logprobs(model, inputs):
    return completion_logprobs(model, *inputs)[0]


# ---- in a model ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradients_equal_those_of_the_summed_weights(tiny, inputs, checkpointing):
    """Against autograd through W + B A * alpha / rank in a plain model. Only the adapter has gradients."""
    plain, model = adapted(tiny, torch.float64)
    pairs = {
        name: tuple(part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
        for name, layer in lora_layers(model).items()
    }
    assert len(pairs) == 7 * 2 + 3 * 2 and all(a.shape[0] == b.shape[1] == RANK for a, b in pairs.values())
    weights = dict(plain.named_parameters())
    sums = {f"model.{name}.weight": weights[f"{name}.weight"] + 4 * b @ a for name, (a, b) in pairs.items()}
    expected, _ = functional_call(CompletionLogprobs(plain, False), sums, inputs)
    expected.square().sum().backward()
    got, _ = completion_logprobs(model, *inputs, checkpointing)
    got.square().sum().backward()
    assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for name, layer in lora_layers(model).items():
        for part, tensor in zip((layer.lora_A, layer.lora_B), pairs[name]):
            assert_close(part["default"].weight.grad, tensor.grad, rtol=1e-4, atol=1e-6 * tensor.grad.abs().max())
    assert all(("lora_" in name) == (p.grad is not None) for name, p in model.named_parameters())


def test_the_sampler_samples_with_the_adapter(tiny, inputs):
    """Greedy words equal those of the merged model and differ from those of the base."""
    plain, model = adapted(tiny, torch.float64)

    def said(model):
        return sample_group(model, inputs[0], 1, 12, 0.0, [-1])[0]

    with_adapter = said(model)
    assert not torch.equal(with_adapter, said(plain))
    with adapter_off(model):
        assert torch.equal(said(model), said(plain))
    lora.merge(model)
    assert torch.equal(with_adapter, said(model))
    assert not lora_layers(model) and model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_its_adapter_off_a_model_is_its_base_to_the_bit(tiny, inputs, dtype):
    plain, model = adapted(tiny, dtype, dropout=0.5)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    base, with_adapter = logprobs(plain, inputs), logprobs(model, inputs)
    assert not torch.equal(base, with_adapter)
    with adapter_off(model):
        assert torch.equal(logprobs(model, inputs), base)
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert torch.equal(logprobs(model, inputs), with_adapter)
    assert learning == [name for name, p in model.named_parameters() if p.requires_grad]
    assert {model.get_parameter(name).dtype for name in learning} == {torch.float32}


def test_a_new_adapter_changes_nothing_and_is_the_same_for_a_seed(tiny, inputs):
    plain, before = copy.deepcopy(tiny[0]).float(), torch.get_rng_state()
    models = [copy.deepcopy(plain) for _ in range(3)]
    for seed, model in zip((0, 0, 1), models):
        add_lora(model, "some/model", RANK, ALPHA, 0.1, TARGETS, False, seed)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logprobs(models[0], inputs), logprobs(plain, inputs))
    first, second, other = (model.state_dict() for model in models)
    assert_close(first, second, rtol=0, atol=0)
    bounds = []
    for name, layer in lora_layers(models[0]).items():
        a = layer.lora_A["default"].weight
        assert not torch.equal(a, other[f"{name}.lora_A.default.weight"])
        bounds.append(a.abs().max().item() * a.shape[1] ** 0.5)
    assert 0.9 < min(bounds) and max(bounds) <= 1  # uniform within 1 / sqrt(inputs), as nn.Linear begins


def test_targets(tiny):
    """A frozen tower has no adapters. An unknown target is an error that lists the layers."""
    _, model = adapted(tiny, torch.float32, frozen=True, targets=["q_proj"])
    assert list(lora_layers(model)) == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert not any(p.requires_grad for p in model.model.audio_tower.parameters())
    for targets, frozen, message in (
        (["q_proj", "fc_one", "c"], False, "named fc_one, c; some/model has .*fc1, .*linear, lm_head, o_proj"),
        (["fc1"], True, r"named fc1; some/model has down_proj, gate_proj, k_proj, linear, lm_head, o_proj, q_proj,"),
        ([], False, "no layer is named"),
    ):
        with pytest.raises(InputError, match=f"--lora_targets: .*{message}"):
            adapted(tiny, torch.float32, frozen=frozen, targets=targets)


def test_dropout(tiny, inputs):
    """Only inside `dropout_on`, only in adapters, and the same if checkpointing computes a layer again."""
    _, model = adapted(tiny, torch.float64, dropout=0.5)
    plain = logprobs(model, inputs)
    assert torch.equal(plain, logprobs(model, inputs)) and not any(m.training for m in model.modules())
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        with dropout_on(model):
            assert {type(m) for m in model.modules() if m.training} == {nn.Dropout}
            got, _ = completion_logprobs(model, *inputs, checkpointing)
            got.sum().backward()
        assert not torch.allclose(got, plain, atol=1e-3)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert_close(*gradients)
    with pytest.raises(KeyError), dropout_on(model):
        raise KeyError
    assert torch.equal(plain, logprobs(model, inputs))


def test_dropout_continues_from_a_saved_state(one_rank, tmp_path):
    optimizer, generator = ShardedAdamW({"w": nn.Parameter(torch.ones(3))}), torch.Generator().manual_seed(5)
    torch.manual_seed(4)
    save_state(tmp_path, {"step": 1}, optimizer, generator)
    expected = nn.functional.dropout(torch.ones(100))
    torch.manual_seed(9)
    load_state(tmp_path / "resume" / "step_000001", optimizer, generator)
    assert torch.equal(nn.functional.dropout(torch.ones(100)), expected)


# ---- in a folder ----


@pytest.fixture(scope="module")
def home(tiny, questions, tmp_path_factory):
    """base/, a model; adapter/, trained on it with template think; questions.json, with the clips of `questions`."""
    folder = tmp_path_factory.mktemp("lora")
    save_checkpoint(folder / "base", copy.deepcopy(tiny[0]).float(), tiny[1])
    _, model = adapted(tiny, torch.float32, base=str(folder / "base"))
    save_checkpoint(folder / "adapter", model, tiny[1], "think")
    records = [dict(audio=q.audio, question=q.question, choices=q.choices, answer=q.answer) for q in questions]
    (folder / "questions.json").write_text(json.dumps(records))
    return folder


def test_an_adapter_folder_is_pefts(home, tiny, inputs):
    """peft itself loads it onto the base. Checkpoint and state take a fraction of the full model's space."""
    names = {path.name for path in (home / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", REMEMBERED, "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    base = Qwen2AudioForConditionalGeneration.from_pretrained(home / "base", dtype=torch.float32).eval()
    total = state_bytes(base)
    peft.PeftModel.from_pretrained(base, home / "adapter").eval()
    plain, model = adapted(tiny, torch.float32)
    assert torch.equal(logprobs(base, inputs), logprobs(model, inputs))
    config = json.loads((home / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "base") and config["target_modules"] == sorted(TARGETS)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert checkpoint_bytes(model) == 4 * trained
    assert (home / "adapter" / "adapter_model.safetensors").stat().st_size == pytest.approx(4 * trained, rel=0.1)
    assert state_bytes(model) == 12 * trained < total / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_loads_merged(home, tiny, dtype):
    """Each weight is the float32 sum, rounded once. All weights can be trained, as in any model."""
    check_model(str(home / "adapter"))
    loaded, processor = load_policy(str(home / "adapter"), dtype, CPU)
    plain, model = adapted(tiny, torch.float32)
    expected = plain.to(dtype).state_dict()
    for name, layer in lora_layers(model).items():
        delta = ALPHA / RANK * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected[f"{name}.weight"] = (expected[f"{name}.weight"].float() + delta).to(dtype)
    assert_close(loaded.state_dict(), expected, rtol=0, atol=0)
    plain, _ = load_policy(str(home / "base"), dtype, CPU)
    assert not loaded.training and processor.tokenizer.padding_side == "left"
    for (name, p), (other_name, other) in zip(loaded.named_parameters(), plain.named_parameters(), strict=True):
        assert (name, p.requires_grad) == (other_name, other.requires_grad)


def test_an_adapter_of_an_adapter(home, tiny, inputs, tmp_path):
    """Training with LoRA from an adapter folder saves one. Loading merges both into the base of the first."""
    model, processor = load_policy(str(home / "adapter"), torch.float32, CPU)
    add_lora(model, str(home / "adapter"), 2, 4, 0.0, ["lm_head", "linear"], True, 0)
    randomize(model)
    save_checkpoint(tmp_path / "second", model, processor)
    loaded, _ = load_policy(str(tmp_path / "second"), torch.float32, CPU)
    assert_close(logprobs(loaded, inputs), logprobs(model, inputs), rtol=1e-4, atol=1e-4)
    preflight.check_texts(str(tmp_path / "second"), [], "answer", 16, strict=True)


def test_an_adapter_of_peft_has_the_processor_of_its_base(home, tmp_path):
    """peft writes no processor."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(home / "adapter" / name, folder)
    check_model(str(folder))
    preflight.check_texts(str(folder), [], "answer", 16, strict=True)
    processors = [load_policy(str(where), torch.float32, CPU)[1] for where in (folder, home / "base")]
    assert processors[0].tokenizer.get_vocab() == processors[1].tokenizer.get_vocab()
    own = identify_model(str(folder))
    base = {f"base/{name}": digest for name, digest in identify_model(str(home / "base")).items()}
    assert base.items() < own.items() and own.keys() - base.keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def config_with(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def weights_with(change):
    def rewrite(folder):
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return rewrite


def with_nan(weights):
    next(iter(weights.values()))[0, 0] = float("nan")
    return weights


BAD_ADAPTERS = {  # case: how to damage it, and the message
    "base moved": (config_with(base_model_name_or_path="/no/such"), "/no/such, cannot .* .it does not exist.; put"),
    "no base": (config_with(base_model_name_or_path=None), "names no base model"),
    "itself as base": (
        lambda folder: config_with(base_model_name_or_path=str(folder))(folder),
        "names this very folder",
    ),
    "more than LoRA": (config_with(modules_to_save=["lm_head"]), "holds more than LoRA, whole modules .'lm_head'.;"),
    "another kind": (config_with(peft_type="LOHA"), "not a LoRA adapter, its adapter_config.json says 'LOHA'"),
    "broken config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be used .JSONDecodeE"),
    "list as config": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "cannot be used .TypeError"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors$"),
    "pickled": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "only adapter_model.bin, which could run code",
    ),
    "no processor": (
        lambda folder: (folder / "processor_config.json").unlink(),
        r"has no .*: .*from_pretrained.*/base",
    ),
}
BAD_WEIGHTS = {
    "cut weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"{" * 99), "as a LoRA adapter"),
    "half the weights": (weights_with(lambda w: dict([*w.items()][::2])), "does not fit .*: it has no model"),
    "strange weights": (
        weights_with(lambda w: w | {"x.lora_A.weight": torch.ones(2)}),
        "does not fit .*: it has an unexpected x",
    ),
    "another rank": (config_with(r=5), "size mismatch|shape"),
    "other targets": (config_with(target_modules=["q_proj"]), "does not fit .*: it has an unexpected"),
    "no number": (weights_with(with_nan), "not finite"),
}


@pytest.mark.parametrize("damage", BAD_ADAPTERS | BAD_WEIGHTS)
def test_a_bad_adapter_is_one_line(home, tmp_path, damage):
    folder = shutil.copytree(home / "adapter", tmp_path / "adapter")
    change, message = (BAD_ADAPTERS | BAD_WEIGHTS)[damage]
    change(folder)
    loads = [lambda: load_policy(str(folder), torch.float32, CPU)]
    for load in [*loads, lambda: check_model(str(folder))] if damage in BAD_ADAPTERS else loads:
        with pytest.raises(InputError, match=message) as error:
            load()
        assert re.fullmatch(rf"{re.escape(str(folder))}: .{{1,500}}", str(error.value))


# ---- the evaluation ----


@pytest.fixture
def evaluate(home, monkeypatch, capsys):
    """Runs eval_mmau.py in this process. Returns its exit status and what it printed."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["eval_mmau.py", *map(str, flags)])
        try:
            status = eval_mmau.main()
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_a_merged_model_predicts_the_same(home, tmp_path, evaluate):
    """Byte for byte, in float32, with the template that the adapter was trained with unless another is given."""
    merged = tmp_path / "new" / "merged"
    status, printed = evaluate("--ckpt", home / "adapter", "--merge", merged, "--dtype", "float32")
    assert status == 0 and f"merged model, float32, 0.00 GB: {merged}" in printed
    assert remembered_template(merged) == "think" and not lora.is_adapter(merged)
    flags = ["--data", home / "questions.json", "--max_new_tokens", 10, "--dtype", "float32"]
    said = {}
    for name, ckpt, added in (
        ("adapter", home / "adapter", []),
        ("merged", merged, []),
        ("base", home / "base", []),
        ("answer", home / "adapter", ["--template", "answer"]),
    ):
        status, printed = evaluate("--ckpt", ckpt, "--out", tmp_path / f"{name}.json", *flags, *added)
        assert status == 0
        settings = json.loads((tmp_path / f"{name}.json.settings.json").read_text())
        said[name] = (tmp_path / f"{name}.json").read_bytes(), settings["template"], printed
    assert said["adapter"][:2] == said["merged"][:2] and said["adapter"][1] == "think"
    assert "template think, the one it was trained with" in said["merged"][2]
    assert said["base"][1] == "answer" and "template answer, the default" in said["base"][2]
    assert (
        said["answer"][1] == "answer"
        and "trained with template think, evaluated with --template answer" in said["answer"][2]
    )
    assert len({said[name][0] for name in ("adapter", "base", "answer")}) == 3


def test_a_model_that_cannot_be_merged_is_one_line(home, tmp_path, evaluate):
    new = tmp_path / "merged"
    (tmp_path / "run" / "step_000001").mkdir(parents=True)
    cases = (
        (["--ckpt", home / "base", "--merge", new], "nothing to merge, this is not the folder of an adapter"),
        (["--ckpt", tmp_path / "run", "--merge", new], "nothing to merge, this is a run folder; name one of its step_"),
        (["--ckpt", home / "adapter", "--merge", tmp_path], "exists already"),
        (["--ckpt", home / "adapter", "--merge", new, "--silence"], "--merge and --silence contradict each other"),
        (["--ckpt", home / "adapter", "--merge", new, "--template", "think"], "--merge and --template contradict"),
        (["--merge", new], "--ckpt is missing"),
        (["--ckpt", home / "adapter", "--merge", tmp_path / "theirs"], "another job (process"),
    )
    with another_owner(tmp_path / "theirs.owner.json"):
        for flags, message in cases:
            status, printed = evaluate(*flags)
            assert status in (1, 2) and message in printed and "Traceback" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert not new.exists() and Path(home / "adapter").exists()
