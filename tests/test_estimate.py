"""How much time and disk the table takes, estimated before the start."""

import json
import shutil
import statistics
from collections import namedtuple

import peft
import pytest

import reproduce
from infra.errors import InputError
from paper import estimate, rows
from training.settings import LORA_TARGETS

BY_NAME = {row.name: row for row in rows.ROWS}


# ---- time ----


def test_time_from_measured_steps(tmp_path):
    """2 s a step of SFT and 4 s of GRPO are measured. Two steps of an interrupted row count."""
    args = reproduce.parse_args(["--out", str(tmp_path), "--steps", "100", "--nproc_per_node", "1"])
    jobs = {name: rows.Job(args, 0, row) for name, row in BY_NAME.items()}
    for name, seconds in (("sft_full", 2.0), ("grpo_answer", 4.0)):
        jobs[name].run_folder.mkdir(parents=True)
        steps = [json.dumps({"step": step, "seconds": seconds}) + "\n" for step in (1, 2, 3)]
        (jobs[name].run_folder / "metrics.jsonl").write_text("".join(steps))
        jobs[name].record.write_text(json.dumps({"settings": {}, "evaluation_seconds": 39}))
    half = jobs["grpo_lora"]
    half.run_folder.mkdir(parents=True)
    whole = '{"step": 1, "seconds": 7}\n{"step": 2, "seconds": 4, "seconds_heldout": 5}\n'
    metrics = half.run_folder / "metrics.jsonl"
    metrics.write_text("\0\0\n" + whole + '{"step": 3}\n{"step": 4, "secon')  # some lines are damaged
    half.record.write_text(json.dumps({"settings": half.settings()}))
    todo = [jobs[name] for name in ("untouched_think", "sft_lora", "grpo_think", "grpo_lora")]
    grpo = statistics.mean([4, 4, 4, 7, 9])  # rows of that script; its own steps, if it has any
    seconds = 100 * 2 + 100 * grpo + 98 * 8 + 4 * 39
    assert estimate.time_text(args, todo) == f"about {seconds / 60:.0f} min"
    metrics.write_text('{"step": 1, "seconds": 8}\n' * 150)  # never less than nothing
    assert estimate.time_text(args, todo[3:]) == "about 39 s"
    half.record.write_text('{"settings": {}}')  # other settings: none of the steps is done
    assert estimate.time_text(args, todo[3:]) == f"about {(100 * 8 + 39) / 60:.0f} min"


def test_time_is_unknown_until_something_is_measured(tmp_path):
    """Without a measured step and without --seconds_per_step. The toy and the real model alike."""
    for flags in ([], ["--model", "m", "--data", "d", "--mmau", "e"]):
        args = reproduce.parse_args([*flags, "--out", str(tmp_path), "--steps", "100"])
        todo = [rows.Job(args, 0, BY_NAME[name]) for name in ("untouched_think", "sft_lora", "grpo_think", "grpo_lora")]
        assert estimate.time_text(args, todo) == (
            "unknown until the first row of its kind has run: 1 x training by sft_aqa.py, 2 x training by grpo_aqa.py, "
            "4 x evaluation; give --seconds_per_step to estimate the trainings"
        )
        args.seconds_per_step = 10.0
        assert estimate.time_text(args, todo) == (
            "about 50 min; unknown until the first row of its kind has run: 4 x evaluation"
        )
        assert estimate.time_text(args, []) == "about 0 s"


# ---- disk ----


def test_disk_counted_is_disk_written(tiny, tmp_path, monkeypatch):
    """Against files of the tiny model: its checkpoint, and peft's own adapter on the same layers."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # a GPU has bfloat16
    model, _ = tiny
    model = model.float()
    model.save_pretrained(tmp_path / "m")
    size = estimate.sizes(str(tmp_path / "m"))
    assert size[False][0] == pytest.approx((tmp_path / "m" / "model.safetensors").stat().st_size, rel=0.01)
    trained = sum(p.numel() for n, p in model.named_parameters() if "embed_positions" not in n)
    assert size[False][1] == 12 * trained
    model.double()  # as other tests expect it
    clone = type(model)(model.config)
    config = peft.LoraConfig(r=rows.LORA_RANK, target_modules=LORA_TARGETS.split(","))
    numbers = sum(p.numel() for p in peft.get_peft_model(clone, config).parameters() if p.requires_grad)
    assert size[True] == (4 * numbers, 12 * numbers)
    (tmp_path / "adapter").mkdir()
    config.base_model_name_or_path = str(tmp_path / "m")
    config.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    assert estimate.sizes(str(tmp_path / "adapter")) == size


def test_too_small_a_disk_is_refused(tmp_path, monkeypatch):
    """Needed: a checkpoint of each trained row, and one more with two states of the largest."""
    monkeypatch.chdir(tmp_path)
    size = {False: estimate.Size(10**9, 6 * 10**9), True: estimate.Size(10**7, 10**8)}
    monkeypatch.setattr(estimate, "sizes", lambda model: size)
    args = reproduce.parse_args(["--model", "m", "--data", "d", "--mmau", "e", "--out", "t"])
    todo = rows.jobs(args)
    needed = 5 * 10**9 + 2 * 10**7 + 10**9 + 12 * 10**9 + 10 * estimate.SMALL_FILES
    assert estimate.disk_bytes(args, todo) == needed
    jobs = {job.row.name: job for job in todo}
    for name, own, steps in (("sft_lora", True, 1000), ("grpo_lora", True, 100), ("grpo_think", False, 1000)):
        checkpoint = jobs[name].run_folder / f"step_{steps:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(bytes(5000))
        jobs[name].record.write_text(json.dumps({"settings": jobs[name].settings() if own else {}}))
    held = 5000 + jobs["grpo_lora"].record.stat().st_size
    # sft_lora has its last checkpoint, grpo_lora an earlier one, and grpo_think's has other settings.
    assert estimate.disk_bytes(args, todo) == needed - 10**7 - held
    assert estimate.disk_bytes(args, [jobs["sft_lora"]]) == estimate.SMALL_FILES
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    estimate.require_disk(args.out, needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(InputError, match=r"t: the table takes up to 18\.5 GB and 18\.5 GB are free; make room"):
        estimate.require_disk(args.out, needed)
