"""On a tiny model: the counted memory is what torch really allocates; the measurement runs; the table."""

import json
from argparse import Namespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import policy
from benchmarks import memory, models
from benchmarks.memory import count, measure
from benchmarks.models import GB, NO_STOP, build_model, make_prompt
from benchmarks.speed import allocated
from infra.errors import InputError
from model.decoding import GroupDecoder
from policy import completion_logprobs, sample_group
from training import optimizer, toy_model
from training.optimizer import trainable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(questions):
    """The toy's shape, but with so many words that logits and word matrices matter, as in the real model."""
    config = toy_model.make_model(questions, seconds=2, seed=0)[0].config
    config.text_config.vocab_size = 4000
    return config


def settings(**changed) -> Namespace:
    """Clips of 1 s, for a model that hears up to 2 s: two frames of padding are masked, as in a mixed batch."""
    names = "memory --gpus 2 --clip_seconds 1 --max_new_tokens 20 --group_size 4 --accumulation_steps 1".split()
    return bench.parse_args([*names, *(word for name, value in changed.items() for word in (f"--{name}", str(value)))])


def saved_bytes(model, function) -> int:
    """Count the bytes that a forward pass saves for autograd: each storage once, without weights and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = []  # keeps the tensors alive, so no address is used twice

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = function()  # noqa: F841
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in kept)}
    return sum(nbytes for key, nbytes in storages.items() if key not in own)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("tokens", [1, 80])  # 80 tokens of 8 completions are more than two chunks of logits
def test_count_is_what_training_allocates(config, monkeypatch, checkpointing, tokens):
    monkeypatch.setattr(policy, "LOGITS_CHUNK", 256)
    args = settings(max_new_tokens=tokens, gradient_checkpointing=checkpointing)
    counted = count(config, torch.float32, args.gpus, args)
    model = build_model(config, torch.float32, CPU)
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    prompt, completions = make_prompt(model, 2, args.clip_seconds), torch.zeros(8, tokens, dtype=torch.long)
    mask = torch.ones_like(completions, dtype=torch.bool)

    def forward():
        return completion_logprobs(model, prompt, completions, mask, 1.0, checkpointing=checkpointing == "on")

    peak, _ = allocated(lambda: forward()[0].sum().backward())
    _, left = allocated(forward)
    assert counted["train"] * GB == pytest.approx(peak, rel=0.005)
    assert counted["saved"] * GB == pytest.approx(left, rel=0.01)
    if checkpointing == "off":  # with it, torch's checkpoint holds the inputs of layers itself, unseen by autograd
        assert counted["saved"] * GB == pytest.approx(saved_bytes(model, forward), rel=0.01)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_count_is_what_sampling_allocates(config, tokens):
    counted = count(config, torch.float32, 2, settings(max_new_tokens=tokens))
    model = build_model(config, torch.float32, CPU)
    prompt = make_prompt(model, 2, clip_seconds=1.0)
    decoder = GroupDecoder(model, 4, tokens)

    def sample():
        return sample_group(model, prompt, 4, tokens, 1.0, NO_STOP, None, decoder)

    peak, _ = allocated(lambda: (sample(), sample()))
    assert (counted["sample"] + counted["decoder"]) * GB == pytest.approx(peak, rel=0.005)


@pytest.mark.parametrize(
    "gpus, beta, dtype, checkpointing, lora_rank",
    [(1, 0.0, torch.float32, "off", 0), (8, 0.04, torch.bfloat16, "on", 0), (1, 0.04, torch.bfloat16, "on", 8)],
)
def test_count_is_what_a_run_allocates(config, gpus, beta, dtype, checkpointing, lora_rank):
    """Two real steps with DistributedDataParallel and ShardedAdamW. On a CPU, measure finds only times."""
    flags = dict(gpus=gpus, beta=beta, gradient_checkpointing=checkpointing, lora_rank=lora_rank)
    args = settings(**flags, max_new_tokens=100)
    measured = []
    peak, _ = allocated(lambda: measured.append(measure(config, dtype, args, CPU)))
    assert count(config, dtype, gpus, args)["peak"] * GB == pytest.approx(peak, rel=0.005)
    assert measured[0].peak_gb == measured[0].reserved_gb == {}
    assert list(measured[0].seconds) == ["setup", "sample", "reference", "train", "update"]
    assert min(measured[0].seconds.values()) > 0


def test_memory_that_runs_out_is_one_line(config, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(models, "accumulate_gradients", full)
    with pytest.raises(InputError, match="phase train ran out"):
        measure(config, torch.float32, settings(), CPU)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_the_real_shape(monkeypatch, capsys, tmp_path):
    """Qwen2-Audio-7B has 8,397 million weights. No rank's share of the optimizer state is much larger than rank 0's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--clip_seconds", "10", "--max_new_tokens", "16", "--out", f"{tmp_path}/x/m.json"]
    monkeypatch.setattr("sys.argv", ["bench.py", "memory", *flags])
    bench.main()
    counted = json.loads((tmp_path / "x" / "m.json").read_text())["counted_gb"]
    assert f"{counted['peak']:.2f}" in capsys.readouterr().out and counted.keys() == memory.PARTS.keys()
    assert counted["weights"] == counted["reference"] == pytest.approx(2 * 8.397, abs=0.001)
    assert counted["optimizer"] == pytest.approx(12 * 8.395 / 8, rel=0.001)
    fixed = sum(counted[name] for name in ("weights", "gradients", "reference", "optimizer", "decoder"))
    # Two prompts of 330 tokens in slots for 384, sixteen completions of 16; keys and values are 4,096 wide.
    assert counted["decoder"] * GB == 32 * 2 * 4096 * 2 * (2 * 384 + 16 * 16)
    assert counted["peak"] == pytest.approx(fixed + max(counted["sample"], counted["train"], counted["update"]))

    with FakeTensorMode():
        model = build_model(models.qwen2_audio_7b(), torch.bfloat16, CPU)
    sizes = {name: parameter.numel() for name, parameter in trainable(model).items()}
    owners = optimizer.assign_owners(sizes, 8)
    shares = [12 * sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(8)]
    assert max(shares) / GB == pytest.approx(counted["optimizer"], rel=0.001)
    assert owners[max(sizes, key=sizes.get)] == 0  # rank 0's update has the largest temporary


def test_table(monkeypatch):
    """Two rows per number of GPUs, with and without a reference. LoRA has one: its reference takes no memory."""
    peaks = {1: 155.9, 2: 104.9, 4: 78.5, 8: 62.0}

    def count(config, dtype, gpus, args):
        return {"peak": peaks[gpus] / (4 if args.lora_rank else 1), "reference": 0 if args.lora_rank else 16.8}

    monkeypatch.setattr(memory, "count", count)
    header, _, *rows = memory.memory_table(settings()).splitlines()[3:]
    assert header == "| beta | GPUs | peak per GPU | 24 GB card | 48 GB card | 80 GB card |"
    assert rows[2] == "| 0.04 | 4 | 78.5 GB | does not fit | does not fit | does not fit |"  # 2 GB are left
    assert rows[3] == "| 0.04 | 8 | 62.0 GB | does not fit | does not fit | fits |"
    assert rows[7] == "| 0 | 8 | 45.2 GB | does not fit | fits | fits |"
    assert len(rows) == 8 and all(row.endswith((" fits |", " fit |")) for row in rows)
    title, *_, lora = memory.memory_table(settings(lora_rank=16)).splitlines()
    assert "LoRA of rank 16" in title and lora == "| 0.04 | 8 | 15.5 GB | fits | fits | fits |"
    assert len(memory.memory_table(settings(lora_rank=16)).splitlines()) == 5 + 4
