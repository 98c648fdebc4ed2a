"""The run folder: settings, Hugging Face checkpoints, and the state to resume from."""

import json
import pickle
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import TEMPLATES
from errors import InputError
from files import (
    UNFINISHED,
    begin_folder,
    finish_folder,
    first_free,
    free_bytes,
    remove,
    step_folders,
    step_of,
    sync,
    write_text,
    writing_run,
)
from lora import lora_layers, save_adapter
from metrics import cut_jsonl, draw_curves
from runtime import SharedInputError, exit_if_abandoned, gather, on_rank_0, wait_for_all_ranks

# What a run leaves in its folder, beside step_000100/, step_000200/, ...
RUN_FILES = ["config.json", "metrics.jsonl", "completions.jsonl", "curves.png", "resume"]
RUN_FILES += ["metrics.jsonl.damaged", "completions.jsonl.damaged"]
# Settings that may differ when a run is resumed: they do not alter what is learned, beyond rounding (and what an
# adapter's dropout drops). Questions may lie elsewhere; that they are the same, questions_digest says.
FREE_SETTINGS = {"data", "audio_dir", "out", "resume", "save_every", "keep_last", "log_completions_every", "world_size"}
FREE_SETTINGS |= {"accumulation_steps", "gradient_checkpointing", "cuda_graph", "launchers"}
FREE_SETTINGS |= {"skip_bad_audio", "skipped_questions", "skipped_heldout", "bad_clips_met"}
FREE_SETTINGS |= {"version"}  # is compared for itself
VERSION = 1  # of what a run folder holds; a state of another is not resumed from

# ---- starting and continuing a run ----


def find_state(out: Path, config: dict, resume: bool) -> Path | None:
    """The folder of the newest complete state to go on from; None if there is none or a run is to start anew.

    A run is continued if the user wishes to `resume` it, or if the torchrun that started these processes has started
    its as well: then one of them had died. Changes nothing. Raises InputError for settings that contradict the run's.
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
            f"{out}: cannot be resumed, its config.json is of version {saved.get('version', 0)} of the run folder and "
            f"this code's is {VERSION}; continue it with the code that began it, or name a new run with --out"
        )
    # With another number of processes, their share of a step may be another too.
    free = FREE_SETTINGS | ({"prompts_per_rank"} if config["world_size"] != saved.get("world_size") else set())
    contradicting = [
        f"{name} {value} (now {config.get(name)})"
        for name, value in saved.items()
        if name not in free and value != config.get(name)
    ]
    if contradicting:
        hint = ""
        if saved.get("questions_digest") != config.get("questions_digest"):
            then, now = (settings.get("skipped_questions", 0) for settings in (saved, config))
            hint = f"; the questions have changed, or which have a usable clip ({then} left out, now {now})"
        raise InputError(
            f"{out}: cannot be resumed with other settings than its own, {', '.join(contradicting)}{hint}; "
            "give the same, or name a new run with --out"
        )
    return states[-1]


def _read_config(out: Path) -> dict:
    """A run's settings. Raises InputError."""
    try:
        return dict(json.loads((out / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = f"cannot be used ({error}); restore it, or name a new run with --out"
        raise InputError(f"{out}/config.json: {reason}") from None


def open_run(out: Path, config: dict, state: Path | None, policy) -> None:
    """Continue the run in `out` from find_state's `state`, or start one. All ranks call this.

    Raises SharedInputError if a save would not fit on the disk, or if the nodes do not share it.
    """

    def change_folder():
        if state and step_folders(out / "resume")[-1:] != [state]:
            raise InputError(f"{out}: another process has saved a state there meanwhile; end it, and start again")
        for name in (*RUN_FILES, "step_*", "resume/step_*"):
            for unfinished in out.glob(name + UNFINISHED):
                remove(unfinished)
        for earlier in step_folders(out / "resume")[:-1] if state else []:
            remove(earlier)
        _require_disk_space(out, policy)
        if state:
            _continue_run(out, config, state)
        else:
            _start_run(out, config)
        return (out / "config.json").read_bytes()

    written = on_rank_0(change_folder)
    if not all(gather(_appears(out / "config.json", written))):
        raise SharedInputError(f"{out}: not a folder that all nodes share, as --out has to be")


def _appears(path: Path, content: bytes, seconds: float = 60) -> bool:
    """Whether a file of that content is here, or comes within the seconds that a network disk may take. A file of
    that name alone may be of an earlier run on this node's own disk."""
    deadline = time.monotonic() + seconds
    while time.monotonic() <= deadline:
        with suppress(OSError):  # not there yet, or just being replaced
            if path.read_bytes() == content:
                return True
        time.sleep(0.2)
    return False


def _start_run(out: Path, config: dict) -> None:
    """Make the run folder and write config.json. What an earlier run left there is moved to out/earlier_1, _2, ..."""
    out.mkdir(parents=True, exist_ok=True)
    left = [out / name for name in RUN_FILES if (out / name).exists()] + step_folders(out)
    if left and left != [out / "config.json"]:
        earlier = first_free(lambda n: out / f"earlier_{n}")
        earlier.mkdir()
        for path in left:  # config.json first: a state without one is not resumed from
            path.rename(earlier / path.name)
        print(f"{out} holds an earlier run; its files are now in {earlier}", flush=True)
    _write_config(out, config)


def _continue_run(out: Path, config: dict, state: Path) -> None:
    """Bring the run folder back to when `state` was saved."""
    for later in step_folders(out):
        if step_of(later) > step_of(state):
            remove(later)
    for name in ("metrics.jsonl", "completions.jsonl"):
        cut_jsonl(out / name, step_of(state))
    _write_config(out, config | {"bad_clips_met": _read_config(out).get("bad_clips_met", {})})
    print(f"{out}: resuming after step {step_of(state)}", flush=True)


def _write_config(out: Path, config: dict) -> None:
    write_text(out / "config.json", json.dumps(config | {"version": VERSION}, indent=2) + "\n")


def note_bad_clips(out: Path, step: int, met: dict[str, str]) -> None:
    """Print clips that turned out bad in a step, unless they did before, and add them to config.json. met: what is
    wrong with each, by its question's place."""
    config = _read_config(out)
    new = {place: fault for place, fault in met.items() if place not in config["bad_clips_met"]}
    if new:
        config["bad_clips_met"] |= new
        _write_config(out, config)
        for place, fault in new.items():
            tqdm.write(f"step {step}: {place}: {fault}; another question takes its place")
        tqdm.write(f"{len(config['bad_clips_met'])} clips have turned out bad so far")


# ---- Hugging Face checkpoints ----

REMEMBERED = "aqa.json"  # in a checkpoint: what transformers and peft have no place for


def save_checkpoint(folder: Path, model, processor, template: str | None = None) -> None:
    """Write model and processor as a Hugging Face folder, in place of one of that name if there is one.

    Of a model with LoRA, the folder is a PEFT adapter's. `template`, the one that the model was trained with, is
    remembered in it.
    """
    unfinished = begin_folder(folder)
    if lora_layers(model):
        save_adapter(model, unfinished)
    else:
        model.save_pretrained(unfinished, max_shard_size="5GB")
    processor.save_pretrained(unfinished)
    for weights in unfinished.glob("*.safetensors"):  # which safetensors hides from all others, whatever the umask
        weights.chmod((unfinished / "processor_config.json").stat().st_mode & 0o777)
    if template:
        (unfinished / REMEMBERED).write_text(json.dumps({"template": template}) + "\n", encoding="utf-8")
    finish_folder(folder)


def remembered_template(folder: str | Path) -> str | None:
    """The template that a checkpoint was trained with; None if it does not say, as others' don't. Raises InputError."""
    file = Path(folder, REMEMBERED)
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_text(encoding="utf-8"))["template"]
        if template not in TEMPLATES:
            raise ValueError(f"no such template: {template!r:.100}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: cannot be used ({reason}); repair it, or remove it and give --template") from None
    return template


# ---- resume state ----


def save_state(out: Path, progress: dict, optimizer, generator: torch.Generator) -> None:
    """Write all that is needed to go on after progress["step"], and remove the state before it. All ranks call this.

    progress: what else the training loop wants back, as JSON holds it. Each rank writes one file: the optimizer state
    of the parameters that it owns, by name, and the states of its random generators: the one that it samples with, and
    torch's default ones, which dropout draws from. Weights are those optimizer states' masters, rounded.
    """
    folder = out / "resume" / f"step_{progress['step']:06d}"
    unfinished = on_rank_0(lambda: begin_folder(folder))
    rank = dist.get_rank()
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
            for name in ("metrics.jsonl", "completions.jsonl"):  # what leads up to this state is not younger than it
                if (out / name).exists():
                    sync(out / name)
            finish_folder(folder)
        for earlier in step_folders(out / "resume")[:-1]:
            remove(earlier)

    on_rank_0(finish_state)


def load_state(folder: Path, optimizer, generator: torch.Generator) -> dict:
    """Restore weights, optimizer and random generator from save_state's folder. Returns progress. For all ranks."""
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
        if dist.get_rank() < len(ranks):  # of more processes than before, the new ones begin their own sequence
            own = ranks[dist.get_rank()]
            generator.set_state(own["generator"])
            for device, default in _default_generators(generator).items():
                if device in own.get("dropout", {}):  # a state from before there was dropout has none
                    default.set_state(own["dropout"][device])
    except pickle.UnpicklingError:  # whose own words advise to trust it
        raise InputError(
            f"{folder}: cannot be resumed from; a file there holds more than tensors, and what that is could run code "
            "when it is opened"
        ) from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: cannot be resumed from ({type(error).__name__}: {reason})") from None
    wait_for_all_ranks()  # some may read a slower disk
    optimizer.send_weights()
    return progress


def _default_generators(like: torch.Generator) -> dict[str, torch.Generator]:
    """torch's default generators of the CPU and, if `like` is one of a GPU, of that."""
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
    keep_last: int,
    template: str | None = None,
) -> None:
    """Save a run at the end of step progress["step"]: its state and, if asked for, a checkpoint. All ranks call this.

    The checkpoint remembers `template`. Of the checkpoints, the newest `keep_last` stay; 0 keeps all. Raises
    SharedInputError before anything is touched if the disk has too little room.
    """
    step = progress["step"]

    def write_checkpoint():
        size = _require_disk_space(out, policy, checkpoint)
        tqdm.write(f"step {step}: saving {'checkpoint and ' if checkpoint else ''}resume state, {size / 1e9:.2f} GB")
        sys.stdout.flush()
        if checkpoint:
            folder = out / f"step_{step:06d}"
            with writing_run(folder, out):
                save_checkpoint(folder, policy, processor, template)
        with writing_run(out / "curves.png", out):
            draw_curves(out)

    def remove_earlier():
        for folder in step_folders(out)[:-keep_last] if keep_last else []:
            remove(folder)

    on_rank_0(write_checkpoint)
    save_state(out, progress, optimizer, generator)
    on_rank_0(remove_earlier)  # only now: without the state, --resume goes back to before this checkpoint, and drops it


def state_bytes(policy) -> int:
    """The bytes of a resume state: a float32 master and two moments of each weight that is trained."""
    return sum(12 * p.numel() for p in policy.parameters() if p.requires_grad)


def checkpoint_bytes(policy) -> int:
    """The bytes of a checkpoint's weights: all of them, or those of the adapter. Of a policy without data as well."""
    adapter = bool(lora_layers(policy))
    return sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad or not adapter)


def _require_disk_space(out: Path, policy, checkpoint: bool = True) -> int:
    """The bytes that the next save takes. Raises InputError if the disk has less room."""
    size = state_bytes(policy) + checkpoint * checkpoint_bytes(policy) + 20_000_000  # processor, metrics, curves
    free = free_bytes(out)
    if free < size:
        raise InputError(
            f"{out}: the next save takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; make room "
            "(--keep_last keeps fewer checkpoints), then continue with --resume"
        )
    return size
