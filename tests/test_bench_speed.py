"""bench.py step, sample, train and scale: that they compare equal work and count right, on a tiny model. No times."""

import copy
import json
from argparse import Namespace

import pytest
import torch
from torch.testing import assert_close

import bench
import bench_eval
import bench_models
import bench_scale
import bench_speed
import toy
from bench_models import lone_rank, make_prompt, make_rank
from runtime import Clock

CPU = torch.device("cpu")
ARGS = Namespace(cuda_graph="on", prompts_per_rank=2, group_size=3, max_new_tokens=5, accumulation_steps=2)


@pytest.fixture(scope="module")
def config(questions):
    return toy.make_model(questions, seconds=2, seed=0)[0].config


@pytest.fixture
def on_the_tiny_model(config, monkeypatch, tmp_path):
    """The benchmarks of this model, with round numbers for the machine's speed, in an empty folder."""
    monkeypatch.setattr(bench_speed, "hardware", lambda: (config, torch.float32, CPU, 1))
    monkeypatch.setattr(bench_scale, "hardware", lambda: (config, torch.float32, CPU, 1))
    monkeypatch.setattr(bench_speed, "matmul_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(bench_speed, "copy_bandwidth", lambda device: 1e9)
    for module in (bench_speed, bench_models):
        monkeypatch.setattr(module, "machine_name", lambda: "Some(R) CPU, 2 cores")
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, *words) -> dict:
    """Run bench.py. Returns the results file that it writes."""
    monkeypatch.setattr("sys.argv", ["bench.py", *words])
    bench.main()
    with open(f"bench_results/{words[0]}_Some_R_CPU_2_cores.json") as file:
        return json.load(file)


# ---- equal work ----


def random_prompt(model, generator):
    """Two prompts of different words and sounds; clips of 1 s, of up to 2 s that the tiny model can hear."""
    prompt = make_prompt(model, 2, clip_seconds=1.0)
    ids, mel = prompt["input_ids"], prompt["input_features"]
    words = torch.randint(200, 300, ids.shape, generator=generator)
    heard = prompt["feature_attention_mask"][:, None]
    return prompt | {
        "input_ids": torch.where(ids == model.config.audio_token_id, ids, words),
        "input_features": torch.randn(mel.shape, generator=generator, dtype=mel.dtype) * heard,
    }


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")  # by its new name only in newer versions
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_ways_learn_the_same(config, monkeypatch, checkpointing):
    """In float64, also where the code says float: equal losses and gradients, in any order of the two ways."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    generator = torch.Generator().manual_seed(0)
    with lone_rank(1):
        rank = make_rank(config, torch.float64, CPU, checkpointing)
        for weight in rank.reference.parameters():  # so that the KL penalty matters
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        prompt = random_prompt(rank.policy, generator)
        padded = bench_speed.pad_clips(rank.policy, prompt)
        assert prompt["input_features"].shape[2] == 102 and padded["input_features"].shape[2] == 200
        completions = torch.randint(200, 300, (6, 5), generator=generator)
        advantages = torch.randn(6, generator=generator)
        outcomes = []
        for learn, inputs in 2 * [(bench_models.learn, prompt), (bench_speed.plain_learn, padded)]:
            rank.policy.zero_grad(set_to_none=False)
            loss = learn(rank, inputs, completions, advantages, ARGS, Clock(CPU))
            gradients = {name: weight.grad.clone() for name, weight in bench_models.trainable(rank.policy).items()}
            outcomes.append((loss, gradients))
            assert not rank.policy.training
    for loss, gradients in outcomes[1:]:
        assert loss == pytest.approx(outcomes[0][0], rel=1e-9)
        assert_close(gradients, outcomes[0][1], rtol=1e-7, atol=1e-12)
    assert all(gradient.abs().max() > 0 for name, gradient in outcomes[0][1].items() if "k_proj.bias" not in name)


def test_both_ways_sample_the_same(config):
    """From a model so sure of each token that chance plays no part."""
    with lone_rank(1):
        rank = make_rank(config, torch.float32, CPU, checkpointing=False)
    rank.policy.lm_head.weight.data *= 1e4
    rank.policy.lm_head.weight.data[config.audio_token_id] = 0
    prompt = random_prompt(rank.policy, torch.Generator().manual_seed(0))
    ours = bench_models.sample(rank, prompt, ARGS)
    plain = bench_speed.plain_sample(rank, bench_speed.pad_clips(rank.policy, prompt), ARGS)
    assert ours.shape == (6, 5) and torch.equal(ours, plain)
    assert len({*map(tuple, ours.tolist())}) == 2 and len(ours.unique()) > 2


# ---- counts ----


@pytest.mark.parametrize("seconds, frames, encoder_frames, audio_tokens", [(1.0, 102, 50, 25), (2.0, 200, 100, 50)])
def test_flops_by_hand(config, seconds, frames, encoder_frames, audio_tokens):
    counted = bench_speed.count_flops(config, seconds, ARGS)
    audio, text = config.audio_config, config.text_config
    d, hidden, n = audio.d_model, text.hidden_size, encoder_frames
    conv1 = 2 * 3 * audio.num_mel_bins * d * frames
    layer = 2 * n * (4 * d * d + 2 * d * audio.encoder_ffn_dim) + 2 * 2 * n * n * d
    tower = conv1 + 2 * 3 * d * d * ((frames + 1) // 2) + audio.encoder_layers * layer + 2 * d * hidden * audio_tokens

    keys = hidden // text.num_attention_heads * text.num_key_value_heads
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * text.intermediate_size
    prompt, completion = 80 + audio_tokens, 4  # the last of 5 tokens predicts nothing
    linear = 2 * weights * (2 * prompt + 6 * completion)
    attention = 2 * 2 * hidden * (2 * prompt * prompt + 6 * completion * (prompt + completion))
    head = 2 * hidden * text.vocab_size * 6 * 5
    forward = 2 * tower + text.num_hidden_layers * (linear + attention) + head
    # Backward, each product has two gradients; the first convolution's input needs none.
    assert counted == {"sample": forward, "reference": forward, "train": 3 * forward - 2 * conv1}


def test_decode_bytes_by_hand(config):
    text = config.text_config
    model = bench_models.build_model(config, torch.bfloat16, CPU)
    args = Namespace(prompts_per_rank=2, group_size=3, max_new_tokens=50)
    weights, cache = bench_speed.decode_bytes(model, 105, args)
    hidden, keys = text.hidden_size, 2 * 32  # two key-value heads
    attention = 2 * hidden * hidden + 2 * hidden * keys + hidden + 2 * keys  # with biases but for its output
    layer = attention + 3 * hidden * text.intermediate_size + 2 * hidden
    assert weights == 2 * (2 * layer + hidden + text.vocab_size * hidden)
    assert cache == 2 * 2 * 2 * keys * (2 * 105 + 6 * 30)  # bytes, keys and values, layers; from 10 to 50 tokens


def test_held_bytes(config):
    """Weights, gradients and reference once each and two moments; in bfloat16 six bytes and twelve of the optimizer."""
    for dtype, nbytes in ((torch.float32, 20), (torch.bfloat16, 18)):
        with lone_rank(1):
            rank = make_rank(config, dtype, CPU, checkpointing=False)
        weights = sum(weight.numel() for weight in bench_models.trainable(rank.policy).values())
        assert bench_speed.held_bytes(rank) == pytest.approx(nbytes * weights, rel=0.02)


def test_the_small_model():
    """Made in the proportions of the real one: layers, words and audio tower have about the same shares."""
    shares = []
    for config in (bench_models.qwen2_audio_7b(), bench_models.qwen2_audio_small()):
        with torch.device("meta"):
            model = bench_models.Qwen2AudioForConditionalGeneration(config)
        parts = (model, model.model.language_model.layers, model.lm_head, model.model.audio_tower)
        total, *sizes = (sum(weight.numel() for weight in part.parameters()) for part in parts)
        shares.append([size / total for size in sizes])
    assert 47e6 < total < 50e6
    assert shares[0] == pytest.approx([0.77, 0.08, 0.08], abs=0.01) and shares[1] == pytest.approx(shares[0], abs=0.25)


# ---- reports ----


def test_step(on_the_tiny_model, monkeypatch, capsys):
    words = "--clip_seconds 0.5 1 --rounds 2 --group_size 3 --max_new_tokens 5".split()
    result = run(monkeypatch, "step", *words)
    printed = capsys.readouterr().out
    assert result["machine"] == "Some(R) CPU, 2 cores" and result["torch"] == torch.__version__
    assert result["settings"]["rounds"] == 2 and [clip["clip_seconds"] for clip in result["clips"]] == [0.5, 1.0]
    for clip in result["clips"]:
        for way in ("plain", "ours"):
            assert [list(seconds) for seconds in clip["rounds"][way]] == 2 * [list(bench_speed.PHASES)]
            assert all(seconds > 0 for times in clip["rounds"][way] for seconds in times.values())
        assert 0 < 2 * clip["beside_gb"]["ours"] < clip["beside_gb"]["plain"]
    assert printed.count("plain / ours") == 2


def test_step_report():
    """The step's ratio is the median of the rounds' ratios."""

    def rounds(*totals):
        return [dict(zip(bench_speed.PHASES, (0.5, 0.25, total - 1, 0.25))) for total in totals]

    found = {
        "rounds": {"plain": rounds(10, 30, 12), "ours": rounds(2, 3, 4)},  # 5, 10 and 3 times
        "beside_gb": {"plain": 6.0, "ours": 1.5},
        "flops": {"sample": 1e9, "reference": 1e9, "train": 4e9},
    }
    lines = bench_speed.step_report(found, held_gb=1.0, rate=4e9).splitlines()
    assert lines[1].split() == "plain 0.500 0.250 11.000 0.250 12.000 6.000".split()
    assert lines[2].split() == "ours 0.500 0.250 2.000 0.250 3.000 1.500".split()
    assert lines[3].split() == "plain / ours 1.00 1.00 5.50 1.00 5.00 4.00".split()
    assert lines[4].split() == "floor 0.250 0.250 1.000 1.500".split()
    assert "2.00 times that" in lines[5] and "7.00 GB and ours 2.50 GB" in lines[7]


def test_sample(on_the_tiny_model, monkeypatch, capsys):
    result = run(monkeypatch, "sample", "--clip_seconds", "1", "--rounds", "2", "--max_new_tokens", "10")
    assert result["clips"][0]["lengths"] == [1, 2, 10] and len(result["clips"][0]["rounds"]) == 2
    assert "decode step, a token of each of 16" in capsys.readouterr().out
    found = {"rounds": [[0.5, 1.0, 5.0]], "weight_bytes": 3e7, "cache_bytes": 1e7}
    report = bench_speed.sample_report(found, 1e9, Namespace(prompts_per_rank=2, group_size=8, max_new_tokens=50))
    for expected in ("0.5000 s", "100.000 ms         160 tokens/s", "40.000 ms         40% of", "0.030 GB of weights"):
        assert expected in report


def test_eval(on_the_tiny_model, config, monkeypatch, capsys):
    """Both ways give the same texts, of clips of different lengths and in batches of their own."""
    config = copy.deepcopy(config)
    config.text_config.vocab_size = 4096
    monkeypatch.setattr(bench_eval, "hardware", lambda: (config, torch.float32, CPU, 1))
    monkeypatch.setattr(bench_eval, "PLAIN_BATCH", 4)
    flags = ["--clip_seconds", "1", "0.5", "--rounds", "2", "--max_new_tokens", "6", "--questions", "7"]
    found = run(monkeypatch, "eval", *flags, "--batch_size", "3")["clips"]
    assert found["equal_texts"] == 7 and {way: len(times) for way, times in found["rounds"].items()} == {
        "plain": 2, "ours": 2
    }  # fmt: skip
    assert "7 questions, clips of 1 and 0.5 s" in capsys.readouterr().out
    args = Namespace(questions=8, clip_seconds=[10.0], max_new_tokens=6)
    report = bench_eval.report(args, {"plain": [8.0, 9.0, 4.0], "ours": [4.0, 2.0, 1.0]}, 8).splitlines()
    assert report[2].split()[1:] == ["8.00", "s", "1.00", "questions/s"] and report[4].split()[3] == "4.00"


def test_train(on_the_tiny_model, monkeypatch, capsys):
    result = run(monkeypatch, "train", "--clip_seconds", "1", "--rounds", "1", "--max_new_tokens", "4")
    assert result["clips"][0]["rounds"][0].keys() == {"reference", "train"}
    found = {"rounds": [{"reference": 1.0, "train": 4.0}], "flops": {"sample": 1, "reference": 5e11, "train": 1e12}}
    _, train, reference, _ = bench_speed.train_report(found, rate=1e12).splitlines()
    assert train.split()[-4:] == "4.000 1.000 0.250 25.0%".split()
    assert reference.split()[-4:] == "1.000 0.500 0.500 50.0%".split()
    assert "recomputing layers: no" in capsys.readouterr().out


def test_scale(on_the_tiny_model, monkeypatch, capsys, tmp_path):
    sizes = {"group_size": (2, 4), "clip_seconds": (0.5, 1), "max_new_tokens": (2, 4), "prompts_per_rank": (1, 2)}
    monkeypatch.setattr(bench_scale, "SIZES", sizes)
    words = "--clip_seconds 1 --group_size 4 --max_new_tokens 3 --rounds 1".split()
    result = run(monkeypatch, "scale", *words)
    assert {name: [point["size"] for point in curve] for name, curve in result["curves"].items()} == {
        "group_size": [2, 4], "clip_seconds": [0.5, 1], "max_new_tokens": [2, 3, 4], "prompts_per_rank": [1, 2],
    }  # fmt: skip
    here = [result["curves"][name][1]["seconds"] for name in sizes]
    assert here[0] == here[1] == here[2] == here[3] and here[0].keys() == {*bench_speed.PHASES}  # measured once
    assert (tmp_path / "docs" / "bench_scale.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"  {label}: " in printed for label in bench_scale.LABELS.values())


def curve(sizes, **seconds):
    zeros = dict.fromkeys(bench_speed.PHASES, 0.0)
    return [{"size": size, "seconds": zeros | {name: f(size) for name, f in seconds.items()}} for size in sizes]


def test_where_a_curve_bends(tmp_path):
    """1 s that is fixed and 0.05 s a token: doubling 16 tokens costs 2.6 / 1.8, doubling 32 costs 4.2 / 2.6."""
    bends = curve((8, 16, 32, 64, 128), sample=lambda x: 1 + 0.01 * x, train=lambda x: 0.04 * x)
    assert bench_scale.bend(bends) == 2
    assert bench_scale.bend_sentence("max_new_tokens", bends) == (
        "completion length (tokens): bends at 32: from there on doubling costs 1.5 times and more "
        "(1.62 from 32 to 64); 80% of what is added there is the phase train."
    )
    flat = curve((1, 2, 4, 8), update=lambda x: 1 + 0.01 * x)
    assert bench_scale.bend(flat) is None and "no bend up to 8" in bench_scale.bend_sentence("group_size", flat)
    squares = curve((1, 5, 10, 30), sample=lambda x: x * x)
    assert bench_scale.bend(squares) == 0 and bench_scale.doublings(squares) == pytest.approx([4, 4, 4])

    bench_scale.draw({name: bends for name in bench_scale.SIZES}, "Some CPU", tmp_path / "docs" / "scale.png")
    assert (tmp_path / "docs" / "scale.png").stat().st_size < 100_000


def test_rounds_of_a_point(monkeypatch):
    """The first is a warm-up unless the time is up by then."""
    monkeypatch.setattr(bench_scale, "make_prompt", lambda *_: None)
    monkeypatch.setattr(bench_scale, "timed_step", lambda *_: dict.fromkeys(bench_speed.PHASES, next(times)))
    rank, args = Namespace(policy=None), Namespace(prompts_per_rank=1, clip_seconds=1, rounds=3)
    for limit, expected in ((100, {"rounds": 3, "seconds": 2}), (0, {"rounds": 1, "seconds": 9})):
        times = iter([9, 1, 2, 3, 4])
        found = bench_scale.time_point(rank, Namespace(**vars(args), seconds_per_point=limit))
        assert found == expected | {"seconds": dict.fromkeys(bench_speed.PHASES, expected["seconds"])}


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        ([], "arguments are required"),
        (["step", "--clip_seconds", "10", "31"], "--clip_seconds must be at most 30, not 31.0"),
        (["sample", "--max_new_tokens", "9"], "--max_new_tokens must be at least 10"),
        (["scale", "--rounds", "0"], "--rounds must be"),
        (["train", "--gpus", "8"], "unrecognized arguments"),
        (["eval", "--questions", "0"], "--questions must be"),
    ],
)
def test_settings_that_cannot_be(wrong, complaint, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(wrong)
    assert complaint in capsys.readouterr().err
