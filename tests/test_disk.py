"""The disk space of a run is counted before it starts: compared with the saves of real and of simulated runs."""

import json
import shutil
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from training_runs import names

from infra.errors import InputError
from infra.files import remove
from model.checkpoints import load_policy
from training import run_folder
from training.disk import SMALL_FILES, added_saves, check_disk_of_run, checkpoint_bytes, state_bytes
from training.run_folder import save_run, step_folders

STEPS = 7
GRID = product(
    (1, 2, 3, 4),  # save_every
    (1, 2, 3, 6),  # save_state_every
    (0, 1, 2),  # keep_last
    (0, 4),  # the step at which the run stops and continues; 0: it does not stop
)


def test_added_saves_bound_what_a_run_holds(one_rank, tmp_path, monkeypatch):
    """save_run runs with empty folders as checkpoints and states. Without --keep_last, the bound is what it holds."""
    most = [0, 0]  # checkpoints and states on the disk

    def write(folder):
        folder.mkdir(parents=True)
        for kind, place in enumerate((out, out / "resume")):
            most[kind] = max(most[kind], len(step_folders(place)))

    def save_state(out, progress, optimizer, generator, first):
        first()
        write(out / "resume" / f"step_{progress['step']:06d}")
        for earlier in step_folders(out / "resume")[:-1]:
            remove(earlier)

    monkeypatch.setattr(run_folder, "save_checkpoint", lambda folder, *_: write(folder))
    monkeypatch.setattr(run_folder, "save_state", save_state)
    monkeypatch.setattr(run_folder, "draw_curves", lambda out: None)
    policy = torch.nn.Linear(1, 1)
    for case, (save_every, state_every, keep_last, stop) in enumerate(GRID):
        out = tmp_path / str(case)
        config = dict(steps=STEPS, save_every=save_every, save_state_every=state_every, keep_last=keep_last)
        done = [0, 0]
        for first, last in ((0, stop), (stop, STEPS)) if stop else ((0, STEPS),):
            most[:] = done
            added = added_saves(config, first, done[0])
            for step in range(first + 1, last + 1):
                checkpoint = step == STEPS or step % save_every == 0
                state = step == STEPS or step % state_every == 0 or step == stop  # a SIGTERM saves the state
                if checkpoint or state:
                    save_run(out, {"step": step}, policy, None, None, None, checkpoint, state, keep_last)
            assert most[0] - done[0] <= added[0] and most[1] - done[1] <= added[1], (config, stop)
            if last == STEPS and save_every == state_every and keep_last == 0:
                assert [now - before for now, before in zip(most, done)] == list(added), (config, stop)
            done = [len(step_folders(out)), len(step_folders(out / "resume"))]


def test_the_count_is_what_a_run_leaves(runs):
    """The reference run of other tests: 8 steps with a checkpoint and a state every 2."""
    out = runs / "reference"
    config = json.loads((out / "config.json").read_text())
    policy, _ = load_policy(str(runs / "base"), torch.float32, torch.device("cpu"))
    assert added_saves(config, 0, 0) == (4, 2) == (len(names(out)), 1 + len(names(out / "resume")))
    counted = {"step_*/*.safetensors": 4 * checkpoint_bytes(policy), "resume/*/*.pt": state_bytes(policy)}
    for pattern, size in counted.items():
        assert sum(path.stat().st_size for path in out.glob(pattern)) == pytest.approx(size, rel=0.02)


def test_the_line_before_a_run(tmp_path, monkeypatch, capsys):
    """It warns if the whole run does not fit. It is an error if the first save does not fit."""
    policy = torch.nn.Linear(10_000, 10_000, bias=False, device="meta")  # 0.4 GB, and 1.2 GB of state
    config = dict(steps=1000, save_every=100, save_state_every=100, keep_last=0)
    free = [10_000_000_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    counted = "the run takes up to 6.60 GB more disk (checkpoints: 10 x 0.42 GB, resume states: 2 x 1.20 GB)"
    check_disk_of_run(tmp_path, policy, config, 0, 0)
    assert capsys.readouterr().out == f"{tmp_path}: {counted}, and 10.00 GB are free\n"
    free[0] = 6_500_000_000
    check_disk_of_run(tmp_path, policy, config, 0, 0)
    short = "this is too little: make room, lower --keep_last or raise --save_every"
    assert capsys.readouterr().out == f"{tmp_path}: {counted}, and 6.50 GB are free; {short}\n"
    check_disk_of_run(tmp_path, policy, config | {"keep_last": 1}, 0, 0)
    assert "3.24 GB more disk (checkpoints: 2 x" in capsys.readouterr().out
    check_disk_of_run(tmp_path, policy, config, 600, 6)
    assert "2.88 GB more disk (checkpoints: 4 x 0.42 GB, resume states: 1 x 1.20" in capsys.readouterr().out
    free[0] = 1_600_000_000 + SMALL_FILES - 1
    with pytest.raises(InputError, match="the next save takes 1.62 GB and 1.62 GB are free"):
        check_disk_of_run(tmp_path, policy, config, 0, 0)
