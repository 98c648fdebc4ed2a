"""The run folder: config.json, checkpoints, and the state to resume from."""

import json
import pickle
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from infra.errors import InputError
from infra.files import (
    UNFINISHED,
    begin_folder,
    finish_folder,
    first_free,
    remove,
    sync,
    write_text,
    writing,
)
from infra.ownership import require_ownership
from infra.processes import SharedInputError, exit_if_abandoned, gather, on_rank_0, wait_for_all_ranks
from model.checkpoints import save_checkpoint
from model.lora import adapter_base, is_adapter
from training.disk import check_disk_of_run, require_disk_space
from training.metrics import cut_jsonl, draw_curves

# The files of a run, beside its checkpoints step_000100/, step_000200/, ...
RUN_FILES = ["config.json", "metrics.jsonl", "completions.jsonl", "curves.png", "resume"]
RUN_FILES += ["metrics.jsonl.damaged", "completions.jsonl.damaged", "tensorboard"]
# Settings that may change when a run is resumed. They change results by rounding at most, or by LoRA's dropout. Only
# another number of ranks draws other samples. Questions may move: questions_digest tells whether they are the same. The
# model may move, too: _check_same_model compares its files.
FREE_SETTINGS = {"data", "audio_dir", "out", "resume", "save_every", "save_state_every", "keep_last"}
FREE_SETTINGS |= {"log_completions_every", "log_kl", "tensorboard", "world_size", "launchers"}
FREE_SETTINGS |= {"heldout_every", "accumulation_steps", "gradient_checkpointing", "cuda_graph"}
FREE_SETTINGS |= {"skip_bad_audio", "skipped_questions", "skipped_heldout", "bad_clips_met"}
FREE_SETTINGS |= {"version", "model_files"}  # have checks of their own
# Values in older runs, which do not record these settings.
UNRECORDED = {"vary_choice_order": False, "dynamic_sampling": 0}
VERSION = 2  # of the run folder's format; states of other versions are not resumed

# ---- what a run has saved ----


def step_folders(folder: Path) -> list[Path]:
    """List the complete step_000100/, step_000200/, ... in a folder, by step."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def what_is_saved(out: Path) -> str:
    """Say in a message which checkpoint is the newest, and after which step --resume continues."""
    checkpoints, states = step_folders(out), step_folders(out / "resume")
    last = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
    return f"{last}, and --resume " + (f"continues after step {step_of(states[-1])}" if states else "starts at step 1")


def writing_run(path: Path, out: Path):
    """Wrap `writing` for a file in the run folder `out`."""
    return writing(path, lambda: f"{what_is_saved(out)}; check the disk, then continue with --resume")


# ---- starting and continuing a run ----


def check_model_stays(out: Path, model: str) -> None:
    """Raise InputError if a run in `out` would overwrite, move or remove its model, or the base of its adapter."""
    config = {}
    with suppress(InputError):  # there is none, or it is damaged
        config = _read_config(out)
    if (config and "steps" not in config) or is_adapter(out):
        raise InputError(f"{out}: is the folder of a model, not of a run; name another folder with --out")
    used = [path for name in (*RUN_FILES, "step_*") for path in out.glob(name) if path.exists()]
    folder = Path(model).resolve()
    for path in [folder, *folder.parents] if folder.is_dir() else []:
        if any(path.samefile(other) for other in used):
            fault = f"the run would move or remove the model that it starts from, {model}"
            raise InputError(f"{out}: {fault}; name another folder with --out")
    if is_adapter(model):
        check_model_stays(out, adapter_base(model))


def _check_same_model(out: Path, saved: dict, config: dict) -> None:
    """Raise InputError if the model's files have changed since the run began. Older runs have no record of them."""
    then, now = saved.get("model_files", {}), config.get("model_files", {})
    if not then or then == now:
        return
    if set(then) == set(now) == {"commit"}:
        changed = f"it is at commit {now['commit']}, and was at {then['commit']}"
        remedy = f"give as --model the folder that `hf download {saved['model']} --revision {then['commit']}` prints"
    else:
        changed = "these files differ: " + ", ".join(name for name in then | now if then.get(name) != now.get(name))
        remedy = "restore the model as it was"
    raise InputError(
        f"{out}: cannot be resumed: the model under --model, {config['model']}, has changed since the run began "
        f"({changed}); {remedy}, or name a new run with --out"
    )


def find_state(out: Path, config: dict, resume: bool) -> Path | None:
    """Return the folder of the newest complete state, or None if the run starts at step 1. Changes nothing.

    A run continues with --resume, or if its torchrun has restarted the ranks because one of them died.
    Raises InputError if the settings contradict those of the run.
    """
    states = step_folders(out / "resume")
    if not (states and (out / "config.json").exists()):
        if resume:
            print(f"{out}: no complete state to resume from; starting at step 1", flush=True)
        return None
    saved = _read_config(out)
    if not resume and not set(config["launchers"]) & set(saved.get("launchers", [])):
        return None
    if saved.get("version") != VERSION:
        raise InputError(
            f"{out}: cannot be resumed: its run folder has version {saved.get('version', 0)}, and this code writes "
            f"version {VERSION}; continue it with the code that began it, or name a new run with --out"
        )
    _check_same_model(out, saved, config)
    # With another number of ranks, the share of each may change as well.
    free = FREE_SETTINGS | ({"prompts_per_rank"} if config["world_size"] != saved.get("world_size") else set())
    free |= {"model"} if "model_files" in saved else set()
    contradicting = [
        f"{name} {value} (now {config.get(name)})"
        for name, value in (UNRECORDED | saved).items()
        if name not in free and value != (UNRECORDED | config).get(name)
    ]
    if contradicting:
        hint = ""
        if saved.get("questions_digest") != config.get("questions_digest"):
            then, now = (settings.get("skipped_questions", 0) for settings in (saved, config))
            hint = f"; the questions or their usable clips have changed ({then} left out, now {now})"
        raise InputError(
            f"{out}: cannot be resumed with other settings: it has {', '.join(contradicting)}{hint}; "
            "use the same settings, or name a new run with --out"
        )
    return states[-1]


def _read_config(out: Path) -> dict:
    """Read a run's config.json. Raises InputError."""
    try:
        return dict(json.loads((out / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{out}/config.json: cannot be used ({error}); restore it, or name a new run with --out"
        ) from None


def open_run(out: Path, config: dict, state: Path | None, policy) -> None:
    """Continue the run in `out` from `state`, as returned by find_state, or start a new one. All ranks call this.

    Prints the disk space that the run takes. Raises SharedInputError if a save does not fit on the disk, or if the
    nodes do not share the folder.
    """

    def change_folder():
        require_ownership()
        for name in (*RUN_FILES, "step_*", "resume/step_*"):
            for unfinished in out.glob(name + UNFINISHED):
                remove(unfinished)
        for earlier in step_folders(out / "resume")[:-1] if state else []:
            remove(earlier)
        newer = [folder for folder in step_folders(out) if state and step_of(folder) > step_of(state)]
        for folder in newer:
            remove(folder)
        if newer:
            print(f"{out}: removed checkpoints newer than the state: {', '.join(folder.name for folder in newer)}")
        kept = len(step_folders(out)) if state else 0  # the checkpoints of an earlier run are moved
        check_disk_of_run(out, policy, config, step_of(state) if state else 0, kept)
        if state:
            _continue_run(out, config, state)
        else:
            _start_run(out, config)
        return (out / "config.json").read_bytes()

    written = on_rank_0(change_folder)
    if not all(gather(_appears(out / "config.json", written))):
        raise SharedInputError(f"{out}: is not the same folder on all nodes; name one on a shared disk with --out")


def _appears(path: Path, content: bytes, seconds: float = 60) -> bool:
    """Wait until the file has this content, as a network disk may be slow. Return whether it has.

    The content is compared because an earlier run may have left a file of this name on the node's own disk.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() <= deadline:
        with suppress(OSError):  # missing, or being replaced
            if path.read_bytes() == content:
                return True
        time.sleep(0.2)
    return False


def _start_run(out: Path, config: dict) -> None:
    """Make the run folder and write config.json. Files of an earlier run are moved to out/earlier_1, _2, ..."""
    out.mkdir(parents=True, exist_ok=True)
    left = [out / name for name in RUN_FILES if (out / name).exists()] + step_folders(out)
    if left and left != [out / "config.json"]:
        earlier = first_free(lambda n: out / f"earlier_{n}")
        earlier.mkdir()
        for path in left:  # config.json first: without it, a state is not resumed
            path.rename(earlier / path.name)
        print(f"{out} holds an earlier run; its files were moved to {earlier}", flush=True)
    _write_config(out, config)


def _continue_run(out: Path, config: dict, state: Path) -> None:
    """Cut the run's logs back to the step of `state`."""
    for name in ("metrics.jsonl", "completions.jsonl"):
        cut_jsonl(out / name, step_of(state))
    _write_config(out, config | {"bad_clips_met": _read_config(out).get("bad_clips_met", {})})
    print(f"{out}: resuming after step {step_of(state)}", flush=True)


def _write_config(out: Path, config: dict) -> None:
    write_text(out / "config.json", json.dumps(config | {"version": VERSION}, indent=2) + "\n")


def note_bad_clips(out: Path, step: int, met: dict[str, str]) -> None:
    """Print the bad clips of a step that are new, and add them to config.json.

    met: what is wrong with each bad clip of the step, by its question's place.
    """
    config = _read_config(out)
    new = {place: fault for place, fault in met.items() if place not in config["bad_clips_met"]}
    if new:
        config["bad_clips_met"] |= new
        _write_config(out, config)
        for place, fault in new.items():
            tqdm.write(f"step {step}: {place}: {fault}; another question takes its place")
        tqdm.write(f"{len(config['bad_clips_met'])} bad clips so far")


# ---- resume state ----


def save_state(out: Path, progress: dict, optimizer, generator: torch.Generator, first=lambda: None) -> None:
    """Write the state after progress["step"], then remove the earlier state. All ranks call this.

    Rank 0 calls first() before it writes its file. The other ranks write their files meanwhile. An error in first() or
    in any rank's file ends all ranks (see processes.finish_together).

    progress: JSON values that the run needs back. Each rank writes one file: its share of the optimizer's state by
    parameter name, the state of the generator that it samples with, and the states of torch's default generators, which
    dropout uses. The weights need no file: they are the optimizer's masters, rounded.
    """
    folder = out / "resume" / f"step_{progress['step']:06d}"
    unfinished = on_rank_0(lambda: begin_folder(folder))
    rank = dist.get_rank()
    if rank == 0:
        first()
    rank_state = {"optimizer": optimizer.state, "generator": generator.get_state()}
    rank_state["dropout"] = {device: default.get_state() for device, default in _default_generators(generator).items()}
    with writing_run(folder / f"rank_{rank}.pt", out):
        torch.save(rank_state, unfinished / f"rank_{rank}.pt")
        sync(unfinished / f"rank_{rank}.pt")
    wait_for_all_ranks()

    def finish_state():
        exit_if_abandoned()
        saved = progress | {"world_size": dist.get_world_size()}
        with writing_run(folder, out):
            write_text(unfinished / "progress.json", json.dumps(saved, indent=2) + "\n")
            for name in ("metrics.jsonl", "completions.jsonl"):  # on the disk before the state is
                if (out / name).exists():
                    sync(out / name)
            finish_folder(folder)
        for earlier in step_folders(out / "resume")[:-1]:
            remove(earlier)

    on_rank_0(finish_state)


def load_state(folder: Path, optimizer, generator: torch.Generator) -> dict:
    """Restore weights, optimizer and generators from a folder of save_state. Return progress. All ranks call this.

    Raises InputError for a damaged state.
    """
    try:
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        if progress["step"] != step_of(folder):
            raise ValueError(f"progress.json is of step {progress['step']!r}")
        ranks = [
            torch.load(folder / f"rank_{rank}.pt", map_location="cpu", mmap=True, weights_only=True)
            for rank in range(progress["world_size"])
        ]
        saved = {name: state for rank in ranks for name, state in rank["optimizer"].items()}
        optimizer.load_state(saved)
        if dist.get_rank() < len(ranks):  # a rank that is new starts its own random sequence
            own = ranks[dist.get_rank()]
            generator.set_state(own["generator"])
            for device, default in _default_generators(generator).items():
                if device in own["dropout"]:  # a state that was saved on a CPU has none for a GPU
                    default.set_state(own["dropout"][device])
    except pickle.UnpicklingError:  # its own message advises to trust the file
        raise InputError(
            f"{folder}: cannot be resumed from: a file holds more than tensors and could run code when it is opened; "
            "remove this state"
        ) from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: cannot be resumed from ({type(error).__name__}: {reason})") from None
    wait_for_all_ranks()  # some read a slower disk
    optimizer.send_weights()
    return progress


def _default_generators(like: torch.Generator) -> dict[str, torch.Generator]:
    """Return torch's default generators: the CPU's and, if `like` is on a GPU, that GPU's."""
    generators = {"cpu": torch.default_generator}
    if like.device.type == "cuda":
        generators["cuda"] = torch.cuda.default_generators[like.device.index or 0]
    return generators


# ---- saving ----


def save_run(
    out: Path,
    progress: dict,
    policy,
    processor,
    optimizer,
    generator,
    checkpoint: bool,
    state: bool,
    keep_last: int,
    template: str | None = None,
) -> None:
    """Save a checkpoint and the resume state after progress["step"], or only one of them. All ranks call this.

    The checkpoint remembers `template`. The newest `keep_last` checkpoints stay, and the newest one that --resume would
    not remove; 0 keeps all. Raises SharedInputError, before any file changes, if the disk has too little room.
    """
    step = progress["step"]

    def announce():
        size = require_disk_space(out, policy, checkpoint, state)
        due = " and ".join(["checkpoint"] * checkpoint + ["resume state"] * state)
        tqdm.write(f"step {step}: saving {due}, {size / 1e9:.2f} GB")
        sys.stdout.flush()

    def write_checkpoint():
        if checkpoint:
            folder = out / f"step_{step:06d}"
            with writing_run(folder, out):
                save_checkpoint(folder, policy, processor, template)
        with writing_run(out / "curves.png", out):
            draw_curves(out)

    def remove_earlier():
        folders, saved = step_folders(out), max(map(step_of, step_folders(out / "resume")), default=0)
        # --resume removes checkpoints newer than the state, and might leave none.
        others = [folder for folder in folders if step_of(folder) <= saved]
        for folder in folders[:-keep_last] if keep_last else []:
            if folder not in others[-1:]:
                remove(folder)

    on_rank_0(announce)
    if state:
        save_state(out, progress, optimizer, generator, first=write_checkpoint)
    else:
        on_rank_0(write_checkpoint)
    on_rank_0(remove_earlier)
