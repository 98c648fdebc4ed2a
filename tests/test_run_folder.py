"""Run folders: a save is complete or missing, any number of ranks loads it, and no run continues another run."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from forked import run_processes
from training_runs import killed_in, lines, names, snapshot

import grpo_aqa
from infra.errors import InputError
from infra.ownership import OWNER, owning
from model.checkpoints import identify_model, save_checkpoint
from training import run_folder
from training.optimizer import ShardedAdamW, clip_scale
from training.run import check_inputs
from training.run_folder import (
    check_model_stays,
    find_state,
    load_state,
    open_run,
    save_run,
    save_state,
    what_is_saved,
    writing_run,
)

# ---- what a run has saved ----


def test_step_folders_are_the_complete_ones_by_step(tmp_path):
    for name in ("step_1000000", "step_999999", "step_000002.unfinished", "step_000003.removed.unfinished", "step_x"):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["step_999999", "step_1000000"]


def test_the_message_for_a_failed_write(tmp_path, monkeypatch):
    """It names the file, the reason, the free disk space, the newest checkpoint and the step to resume from."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_230_000_000))

    def message():
        with pytest.raises(InputError) as error, writing_run(tmp_path / "x.pt", tmp_path):
            raise RuntimeError("failed\n  at position 7")
        return str(error.value)

    assert message().startswith(
        f"{tmp_path}/x.pt: could not be written (failed at position 7), with 1.23 GB free; there is"
    )
    assert what_is_saved(tmp_path) == "there is no checkpoint yet, and --resume starts at step 1"
    (tmp_path / "step_000100").mkdir()
    assert what_is_saved(tmp_path) == f"the last checkpoint is {tmp_path}/step_000100, and --resume starts at step 1"
    (tmp_path / "resume" / "step_000120").mkdir(parents=True)
    assert f"the last checkpoint is {tmp_path}/step_000100, and --resume continues after step 120; check" in message()


# ---- the resume state ----

SHAPES = {f"layer{i}.{name}": shape for i in range(3) for name, shape in (("weight", (40, 30 + i)), ("bias", (40,)))}


def save_with_two_load_with_others(rank, folder):
    """Take three steps on two ranks and save. Then four ranks load the state, then one. Each writes what it loaded.

    The checkpoint is complete once rank 1 has begun its file of the state: so rank 1 must not wait for rank 0.
    """

    def save_checkpoint(checkpoint, *_):
        deadline = time.monotonic() + 60
        while not Path(folder, "resume", "step_000003.unfinished", "rank_1.pt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        checkpoint.mkdir()

    run_folder.save_checkpoint, run_folder.draw_curves = save_checkpoint, lambda out: None  # in this process alone
    torch.set_num_threads(1)
    for world_size in (2, 4, 1):
        if rank >= world_size:
            continue
        store = dist.FileStore(f"{folder}/store_{world_size}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        random_numbers = torch.Generator().manual_seed(world_size)  # they differ from those in the state
        weights = {name: torch.randn(shape, generator=random_numbers) for name, shape in SHAPES.items()}
        parameters = {name: torch.nn.Parameter(weight.bfloat16()) for name, weight in weights.items()}
        optimizer, generator = ShardedAdamW(parameters), torch.Generator().manual_seed(10 * world_size + rank)
        if world_size == 2:
            for _ in range(3):
                for parameter in parameters.values():
                    parameter.grad = torch.randn(parameter.shape, generator=random_numbers).bfloat16()
                optimizer.step(1e-3, clip_scale(optimizer.grad_norm(), 1.0))
            progress = {"step": 3, "position": 12, "before": [0.5, 1.0]}
            policy = torch.nn.ParameterList(parameters.values())
            save_run(Path(folder), progress, policy, None, optimizer, generator, True, True, keep_last=0)
        else:
            progress = load_state(Path(folder) / "resume" / "step_000003", optimizer, generator)
        outcome = {"state": optimizer.state, "weights": {name: p.detach() for name, p in parameters.items()}}
        outcome |= {"generator": generator.get_state(), "progress": progress}
        torch.save(outcome, f"{folder}/{world_size}_{rank}.pt")
        dist.destroy_process_group()


def test_any_number_of_ranks_loads_a_state(tmp_path):
    run_processes(save_with_two_load_with_others, (str(tmp_path),), nprocs=4)
    assert names(tmp_path) == names(tmp_path / "resume") == ["step_000003"]
    saved = [torch.load(tmp_path / f"2_{rank}.pt") for rank in range(2)]
    expected = saved[0]["state"] | saved[1]["state"]
    for world_size in (4, 1):
        loaded = [torch.load(tmp_path / f"{world_size}_{rank}.pt") for rank in range(world_size)]
        assert sorted(name for rank in loaded for name in rank["state"]) == sorted(SHAPES)
        for rank in loaded:
            torch.testing.assert_close(rank["state"], {name: expected[name] for name in rank["state"]}, rtol=0, atol=0)
            torch.testing.assert_close(rank["weights"], saved[0]["weights"], rtol=0, atol=0)
            progress = {"step": 3, "position": 12, "before": [0.5, 1.0]}
            assert {key: rank["progress"][key] for key in progress} == progress
        sequences = [rank["generator"].tolist() for rank in loaded]
        assert sequences[:2] == [rank["generator"].tolist() for rank in saved][:world_size]
        assert len(set(map(tuple, sequences))) == world_size  # each rank draws its own random numbers


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_state_gives_one_clear_line(one_rank, tmp_path, damage):
    optimizer, generator = ShardedAdamW({"weight": torch.nn.Parameter(torch.ones(100, 100))}), torch.Generator()
    save_state(tmp_path, {"step": 1}, optimizer, generator)
    file = tmp_path / "resume" / "step_000001" / "rank_0.pt"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="step_000001: cannot be resumed from"):
        load_state(file.parent, optimizer, generator)


# ---- saving ----


@pytest.fixture
def save(one_rank, tmp_path, tiny, monkeypatch):
    """A function that saves the tiny model in tmp_path with save_run."""
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(run_folder, "draw_curves", lambda out: None)
    optimizer, generator = ShardedAdamW({"weight": torch.nn.Parameter(torch.ones(9))}), torch.Generator()

    def save(step, checkpoint=True, state=True, keep_last=1):
        save_run(tmp_path, {"step": step}, *tiny, optimizer, generator, checkpoint, state, keep_last)

    return save


@pytest.mark.parametrize("checkpoint, state, due", [(1, 1, "checkpoint and resume state"), (1, 0, "checkpoint"),
                                                    (0, 1, "resume state")])  # fmt: skip
def test_too_little_disk_space_is_reported_before_anything_is_written(
    save, tmp_path, tiny, monkeypatch, capsys, checkpoint, state, due
):
    """The message names the folder, the space that the save takes, and the free space. With enough, saving succeeds."""
    size = sum((12 * p.requires_grad * state + p.element_size() * checkpoint) * p.numel() for p in tiny[0].parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(InputError, match=rf"{tmp_path}: .* takes 0\.0\d GB and {size / 1e9:.2f} GB are free"):
        save(1, checkpoint, state)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size + 2.1e7))
    save(1, checkpoint, state)
    assert names(tmp_path) == ["step_000001"] * checkpoint and names(tmp_path / "resume") == ["step_000001"] * state
    assert capsys.readouterr().out == f"step 1: saving {due}, {(size + 2e7) / 1e9:.2f} GB\n"


def test_a_checkpoint_that_a_resume_keeps_stays(save, tmp_path):
    """--resume removes checkpoints newer than the state. With --keep_last 1, it would have none left."""
    save(1)
    with killed_in(run_folder, "finish_folder"):  # the checkpoint is complete, the state is not
        save(2)
    assert names(tmp_path) == ["step_000001", "step_000002"] and names(tmp_path / "resume") == ["step_000001"]
    save(3)
    assert names(tmp_path) == names(tmp_path / "resume") == ["step_000003"]
    save(4, state=False)
    save(5, state=False)
    assert names(tmp_path) == ["step_000003", "step_000005"] and names(tmp_path / "resume") == ["step_000003"]
    save(6, checkpoint=False)
    assert names(tmp_path) == ["step_000005"] and names(tmp_path / "resume") == ["step_000006"]


# ---- the model of a run ----


def make_model(folder, base=None):
    """Make a folder that looks like a model's, or like an adapter's if it has a base."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)} if base else {"model_type": "qwen2_audio"}
    (folder / ("adapter_config.json" if base else "config.json")).write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_text("")
    return folder


def model_in(place):
    return lambda out: make_model(out / place)


def adapter_of(place):
    """An adapter whose base is an adapter of a model in the run folder."""
    return lambda out: make_model(out.with_name("second"), make_model(out.with_name("first"), make_model(out / place)))


def linked(out):
    link = out.with_name("link")
    link.symlink_to(make_model(out / "step_000001" / "base"))
    return link


IN_THE_WAY = {
    "a checkpoint": model_in("step_000100"),
    "an unfinished one": model_in("step_000100.unfinished"),
    "in resume": model_in("resume/kept/base"),
    "by another path": linked,
    "an adapter's base": adapter_of("step_000100"),
}


@pytest.mark.parametrize("place", IN_THE_WAY)
def test_a_model_that_the_run_would_move_or_remove_is_refused(tmp_path, place):
    out = tmp_path / "run"
    model = IN_THE_WAY[place](out)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"{out}: the run would move or remove the model that it starts from, .*--out"):
        check_model_stays(out, str(model))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", [model_in("."), lambda out: make_model(out, base="some/model")])
def test_a_run_in_the_folder_of_a_model_is_refused(tmp_path, place):
    """It would overwrite the model's config.json, even if it trains another model."""
    out = tmp_path / "run"
    for model in (place(out), "some/model"):
        with pytest.raises(InputError, match="run: is the folder of a model, not of a run; .*--out"):
            check_model_stays(out, str(model))


def test_a_model_that_the_run_does_not_touch_stays(tmp_path):
    """The toy's base lies in its run folder, and a new run leaves the folders of earlier ones as they are."""
    out = tmp_path / "run"
    for place in (model_in("base"), model_in("earlier_1/step_000100"), adapter_of("earlier_2/step_000100")):
        check_model_stays(out, str(place(out)))
    (out / "config.json").write_text("{")
    (out / "step_000100").symlink_to("missing")
    for model in (out / "base", "some/model"):
        check_model_stays(out, str(model))


def test_a_run_checks_its_model_at_the_start_and_records_its_files(one_rank, tmp_path, tiny, questions, capsys):
    save_checkpoint(tmp_path / "base", *tiny)
    records = [dict(audio=q.audio, question=q.question, choices=q.choices, answer=q.answer) for q in questions]
    (tmp_path / "q.json").write_text(json.dumps(records))
    args = grpo_aqa.parse_args([f"--model={tmp_path}/base", f"--data={tmp_path}/q.json", f"--out={tmp_path}/run"])
    args.heldout = str(tmp_path / "heldout.json")  # whose right answers need not be among the choices, as in MMAU
    (tmp_path / "heldout.json").write_text(
        json.dumps([dict(records[0], id=0, audio_id=records[0]["audio"], answer="B")])
    )
    config, *_ = check_inputs(args, "GRPO", [])
    assert "record 1: the right answer 'B' cannot be rewarded" in capsys.readouterr().out
    assert config["model_files"] == identify_model(args.model) and "model.safetensors" in config["model_files"]
    args.out = args.model
    with pytest.raises(InputError, match="base: is the folder of a model"):
        check_inputs(args, "GRPO", [])


# ---- resuming ----

SAVES = {"steps": 8, "save_every": 2, "save_state_every": 2, "keep_last": 0}  # from these the disk space is counted


def test_resume_without_a_state_starts_anew_and_keeps_the_old_files(one_rank, tmp_path, tiny, capsys):
    """A run killed before its first save has no state. One whose move to earlier_N was interrupted has none either."""
    out, config = tmp_path / "run", SAVES | {"lr": 1.0, "world_size": 1, "launchers": []}

    def start(config):
        state = find_state(out, config, resume=True)
        open_run(out, config, state, tiny[0])
        return state

    assert start(config) is None and "starting at step 1" in capsys.readouterr().out
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    (out / "resume" / "step_000002.unfinished").mkdir(parents=True)
    assert start(config | {"lr": 2.0}) is None
    assert json.loads((out / "config.json").read_text())["lr"] == 2.0
    assert lines(out / "earlier_1" / "metrics.jsonl") == ['{"step": 1}']
    assert not (out / "metrics.jsonl").exists() and list(tmp_path.rglob("*.unfinished")) == []
    (out / "resume" / "step_000002").mkdir(parents=True)
    (out / "config.json").unlink()
    assert start(config) is None
    assert (out / "earlier_2" / "resume" / "step_000002").exists()


@pytest.fixture
def saved(one_rank, tmp_path):
    """(folder, config, state) of a run saved after step 2. It has a checkpoint of step 4, with an unfinished state."""
    config = SAVES | {"lr": 1.0, "world_size": 1, "launchers": ["node:1:2"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"version": run_folder.VERSION}))
    for name in ("resume/step_000001", "resume/step_000002", "resume/step_000004.unfinished", "step_000004"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 5)))
    return tmp_path, config, find_state(tmp_path, config, resume=True)


def test_leftovers_of_a_save_are_removed_before_disk_space_is_checked(saved, tiny, monkeypatch, capsys):
    """Otherwise a killed save could fill a disk that has space for two states, and no --resume would start."""
    out, config, state = saved

    def disk_usage(path):
        left = os.listdir(out / "resume"), names(out)
        return SimpleNamespace(free=10**12 if left == (["step_000002"], []) else 0)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    met = {"bad_clips_met": {"q.jsonl, line 2": "is silent"}}
    (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text()) | met))
    open_run(out, config, state, tiny[0])
    assert names(out) == [] and len(lines(out / "metrics.jsonl")) == 2  # the checkpoint of step 4 will be written again
    printed = capsys.readouterr().out
    assert "removed checkpoints newer than the state: step_000004" in printed
    assert printed.endswith("resuming after step 2\n")
    assert json.loads((out / "config.json").read_text()) == config | met | {"version": run_folder.VERSION}


def test_a_folder_that_another_job_takes_over_meanwhile_stays_as_it_is(saved, tiny):
    """A job may load a large model while the other one starts."""
    out, config, state = saved
    with owning(out / OWNER):
        (out / OWNER).write_text('{"token": "of another job"}')
        before = snapshot(out), set(out.rglob("*"))
        for found in (state, None):
            with pytest.raises(InputError, match="another job has taken over"):
                open_run(out, config, found, tiny[0])
        assert (snapshot(out), set(out.rglob("*"))) == before


def test_a_resume_may_find_the_same_questions_in_another_folder(saved):
    out, config, state = saved
    moved = {"data": "/scratch/job_7/q.jsonl", "audio_dir": "/scratch/job_7/wavs"}
    assert find_state(out, config | moved, resume=True) == state
    with pytest.raises(InputError, match="lr 1.0"):
        find_state(out, config | moved | {"lr": 2.0}, resume=True)


def test_a_run_from_before_a_setting_existed_continues_without_it(saved):
    out, config, state = saved
    assert find_state(out, config | {"vary_choice_order": False}, resume=True) == state
    with pytest.raises(InputError, match=r"it has vary_choice_order False \(now True\)"):
        find_state(out, config | {"vary_choice_order": True}, resume=True)


def test_a_resume_needs_the_model_that_the_run_began_with(saved):
    """The model may move. A run folder of an older version has no record of its model."""
    out, config, state = saved

    def begin(files):
        began = config | {"model": "base", "model_files": files, "version": run_folder.VERSION}
        (out / "config.json").write_text(json.dumps(began))

    def find(files, model="base", resume=True):
        return find_state(out, config | {"model": model, "model_files": files}, resume)

    files = {"config.json": "9 bytes", "model.safetensors": "8 bytes, SHA-256 a"}
    assert find_state(out, config | {"model_files": files}, resume=True) == state
    begin(files)
    assert find(files, model="/scratch/base") == state
    for resume in (True, False):  # by hand, and by torchrun
        with pytest.raises(InputError, match="base, has changed .* .these files differ: model.safetensors.; "):
            find(files | {"model.safetensors": "8 bytes, SHA-256 b"}, resume=resume)
    begin({"commit": "a"})
    with pytest.raises(InputError, match="at commit b, and was at a.; give .* `hf download base --revision a` "):
        find({"commit": "b"})


def test_a_folder_that_nodes_do_not_share_is_recognized_by_its_content(tmp_path):
    """A config.json of an earlier run does not count. A network disk may show a new one late."""
    path = tmp_path / "config.json"
    assert not run_folder._appears(path, b"new", seconds=0.3)
    path.write_text("old")
    assert not run_folder._appears(path, b"new", seconds=0.3)
    late = threading.Timer(0.3, path.write_text, ["new"])
    late.start()
    assert run_folder._appears(path, b"new", seconds=60)


def test_only_the_same_torchrun_continues_without_resume(saved):
    out, config, state = saved
    assert find_state(out, config | {"launchers": ["other:1:2", "node:1:2"]}, resume=False) == state
    assert find_state(out, config | {"launchers": ["node:1:3"]}, resume=False) is None
    assert find_state(out, config | {"launchers": []}, resume=False) is None  # without torchrun
