"""How long the table takes and how much disk, before anything is started."""

import json
import shutil
from collections import namedtuple

import peft
import pytest

import reproduce
import reproduce_estimate
import reproduce_rows
from errors import InputError
from training import LORA_TARGETS


def slow_rate(dtype, device):
    """A stand-in for bench_speed.matmul_rate that another process can call."""
    return 1e6


@pytest.mark.slow
def test_time_that_a_real_table_takes_at_least(tiny, tmp_path, monkeypatch):
    """Nothing measured yet: the arithmetic of all trainings over a rate; GRPO's is more than supervised training's."""
    tiny[0].save_pretrained(tmp_path / "m")
    monkeypatch.setattr(reproduce_estimate, "matmul_rate", slow_rate)
    seconds = {s: reproduce_estimate.floor_seconds(str(tmp_path / "m"), s) for s in ("sft_aqa.py", "grpo_aqa.py")}
    flops = seconds["grpo_aqa.py"] * slow_rate(None, None)
    # A multiply-add for each weight and token, at least: prompts thrice, one of them backward too.
    weights = sum(p.numel() for p in tiny[0].model.language_model.layers.parameters())
    assert flops > (3 + 2) * 2 * weights * 2 * 50 and seconds["grpo_aqa.py"] > 1.5 * seconds["sft_aqa.py"]
    args = reproduce.parse_args(["--model", str(tmp_path / "m"), "--data", "d", "--mmau", "e", "--out", str(tmp_path)])
    total = 1000 * (2 * seconds["sft_aqa.py"] + 4 * seconds["grpo_aqa.py"])
    said = reproduce_estimate.time_text(args, reproduce.jobs(args))
    assert f"these trainings take {reproduce_estimate.duration(total)} at the very least" in said


def test_disk_counted_is_disk_written(tiny, tmp_path, monkeypatch):
    """Against files of the tiny model: its checkpoint, and peft's own adapter on the same layers."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # a GPU has bfloat16
    model, _ = tiny
    model = model.float()
    model.save_pretrained(tmp_path / "m")
    size = reproduce_estimate.sizes(str(tmp_path / "m"))
    assert size[False][0] == pytest.approx((tmp_path / "m" / "model.safetensors").stat().st_size, rel=0.01)
    trained = sum(p.numel() for n, p in model.named_parameters() if "embed_positions" not in n)
    assert size[False][1] == 12 * trained
    model.double()  # as other tests expect it
    clone = type(model)(model.config)
    config = peft.LoraConfig(r=reproduce_rows.LORA_RANK, target_modules=LORA_TARGETS.split(","))
    numbers = sum(p.numel() for p in peft.get_peft_model(clone, config).parameters() if p.requires_grad)
    assert size[True] == (4 * numbers, 12 * numbers)
    (tmp_path / "adapter").mkdir()
    config.base_model_name_or_path = str(tmp_path / "m")
    config.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    assert reproduce_estimate.sizes(str(tmp_path / "adapter")) == size


def test_too_small_a_disk_is_refused(tmp_path, monkeypatch):
    """Checkpoints of all rows, beside one more and two states of the largest: more than is free."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce_estimate, "sizes", lambda model: {False: (10**9, 6 * 10**9), True: (10**7, 10**8)})
    args = reproduce.parse_args(["--model", "m", "--data", "d", "--mmau", "e", "--out", "t"])
    todo = reproduce.jobs(args)
    needed = 4 * 10**9 + 2 * 10**7 + 10**9 + 12 * 10**9 + 9 * reproduce_estimate.SMALL_FILES
    assert reproduce_estimate.disk_bytes(args, todo) == needed
    every = {row.name: (0, row) for row in reproduce_rows.ROWS}
    for name, own, steps in (("sft_lora", True, 1000), ("grpo_lora", True, 100), ("grpo_think", False, 1000)):
        folder = reproduce_rows.row_folder(args, *every[name])
        (folder / "run" / f"step_{steps:06d}").mkdir(parents=True)
        (folder / "run" / f"step_{steps:06d}" / "weights").write_bytes(bytes(5000))
        saved = {"settings": reproduce_rows.settings(args, *every[name]) if own else {}}
        (folder / "row.json").write_text(json.dumps(saved))
    held = 5000 + (reproduce_rows.row_folder(args, *every["grpo_lora"]) / "row.json").stat().st_size
    # sft_lora has its last checkpoint, grpo_lora an earlier one, and grpo_think's are of other settings.
    assert reproduce_estimate.disk_bytes(args, todo) == needed - 10**7 - held
    assert reproduce_estimate.disk_bytes(args, [every["sft_lora"]]) == reproduce_estimate.SMALL_FILES
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    reproduce_estimate.require_disk(args, needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(InputError, match=r"t: the table takes up to 17\.5 GB and 17\.5 GB are free; make room"):
        reproduce_estimate.require_disk(args, needed)
