"""A GPU computes the same numbers as the CPU, and resumes a bfloat16 run. Skipped without a GPU."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from model import decoding
from model.checkpoints import save_checkpoint
from model.decoding import GroupDecoder
from policy import completion_logprobs, encode_prompts, sample_group, slice_prompt, to_device
from training import toy_model
from training.optimizer import ShardedAdamW, clip_scale

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def both(tiny):
    """The tiny model in float32 on CPU and GPU, and its processor."""
    model = copy.deepcopy(tiny[0]).float()
    return model, copy.deepcopy(model).to(GPU), tiny[1]


def test_greedy_tokens_equal_the_cpus(both, questions):
    cpu, gpu, processor = both
    prompt = encode_prompts(processor, questions, "answer")
    tokens, mask = sample_group(cpu, prompt, 2, 12, 0.0, [-1])
    gpu_tokens, gpu_mask = sample_group(gpu, to_device(prompt, GPU), 2, 12, 0.0, [-1])
    assert torch.equal(tokens, gpu_tokens.cpu()) and torch.equal(mask, gpu_mask.cpu())


def test_recorded_cuda_graphs_draw_the_same_tokens(both, questions, monkeypatch):
    """CUDA graphs draw the same tokens as the same kernels without graphs, over several rollouts: with longer and
    shorter prompts, more than COMPLETION_SLOTS tokens, and changed weights."""
    monkeypatch.setattr(decoding, "PROMPT_SLOTS", 8)  # so that these prompts take different numbers of slots
    model, processor = copy.deepcopy(both[1]), both[2]
    prompt, decoder = to_device(encode_prompts(processor, questions, "answer"), GPU), GroupDecoder(model, 3, 80, True)
    for start, stop in ((0, 2), (0, 2), (2, 4), (2, 4), (0, 4), (0, 1)):
        inputs = model, slice_prompt(prompt, start, stop), 3, 80, 1.0, [-1]
        drawn = [sample_group(*inputs, torch.Generator(GPU).manual_seed(0), kept)[0] for kept in (decoder, None)]
        assert torch.equal(*drawn)
        model.lm_head.weight.data *= 1.1
        model.model.language_model.layers[0].mlp.down_proj.weight.data *= -1.1
    assert len(decoder.graphs) > 0


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16", "--samples", "2"], ["--dtype", "float32"]])
def test_an_evaluation_repeats(both, questions, tmp_path, flags):
    save_checkpoint(tmp_path / "model", both[0], both[2])
    records = [{"audio": q.audio, "question": q.question, "choices": q.choices, "answer": q.answer} for q in questions]
    (tmp_path / "questions.json").write_text(json.dumps(records))
    command = [sys.executable, ROOT / "eval_mmau.py", "--ckpt", "model", "--data", "questions.json", "--out", "a.json"]
    command += ["--batch_size", "3", "--max_new_tokens", "70", *flags]
    written = []
    for _ in range(2):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        written.append((tmp_path / "a.json").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_logprobs_and_gradients_equal_the_cpus(both, questions, dtype, tolerance, checkpointing):
    """The tolerance is relative to the size of the numbers: bfloat16 keeps no more."""
    cpu, gpu, processor = both
    prompt = encode_prompts(processor, questions[:2], "answer")
    completions = torch.randint(cpu.config.audio_token_id, (6, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([[1], [5], [3], [2], [5], [4]])
    outcomes = []
    for model, device in ((cpu, torch.device("cpu")), (copy.deepcopy(gpu).to(dtype), GPU)):
        inputs = to_device(prompt, device), completions.to(device), mask.to(device)
        logprobs, entropy = completion_logprobs(model, *inputs, 1.0, checkpointing)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(logprobs.sum(), parameters)
        outcomes.append([logprobs, entropy, *gradients])
    for expected, found in zip(*outcomes):
        assert (found.cpu().float() - expected).norm() < tolerance * expected.norm()


def test_optimizer_masters_equal_the_cpus():
    """After 20 bfloat16 steps, the float32 masters equal those on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    masters = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter((0.02 * torch.randn(1000, generator=generator)).bfloat16().to(device))
        optimizer = ShardedAdamW({"weight": weight})
        for _ in range(20):
            weight.grad = torch.randn(1000, generator=generator).bfloat16().to(device)
            optimizer.step(1e-4, clip_scale(optimizer.grad_norm(), 1.0))
        masters.append(optimizer.state["weight"]["master"].cpu())
    dist.destroy_process_group()
    assert_close(*masters, rtol=1e-5, atol=1e-8)


def test_a_killed_run_resumes(questions, tmp_path):
    """In bfloat16, on one rank. Its numbers stay close to those of an uninterrupted run, but not equal to the last bit:
    CUDA adds some sums in any order."""
    # A little training, so that some rewards differ.
    toy_model.make_base(questions, tmp_path / "base", steps=45, random_answers=1.0, seed=0)
    records = [{"audio": q.audio, "question": q.question, "choices": q.choices, "answer": q.answer} for q in questions]
    (tmp_path / "questions.json").write_text(json.dumps(records))
    flags = "--model base --data questions.json --steps 30 --save_every 2 --max_new_tokens 8 --lr 1e-4".split()

    def start(out, *more):
        command = [sys.executable, ROOT / "grpo_aqa.py", *flags, "--out", out, *more]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def metrics(out):
        return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]

    assert start("whole").wait() == 0
    killed = start("killed")
    while not (tmp_path / "killed" / "resume" / "step_000004").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() != 0 and start("killed", "--resume").wait() == 0
    whole, resumed = metrics("whole"), metrics("killed")
    assert [m["step"] for m in whole] == [m["step"] for m in resumed] == list(range(1, 31))
    assert 0 < whole[-1]["peak_memory_gb"] < 10
    assert sum(m["grad_norm"] > 0 for m in whole) > 5
    # A resume that lost the weights would start at the base model again, with a KL of 0.
    assert sum(m["kl"] for m in resumed[5:]) == pytest.approx(sum(m["kl"] for m in whole[5:]), rel=0.3)
    same = [a["kl"] == b["kl"] for a, b in zip(whole, resumed)]
    print(f"{sum(same)} of {len(same)} steps have equal KL")
