"""Model folders: check and identify them without loading weights, load them on every rank, save them."""

import hashlib
import json
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, Qwen2AudioForConditionalGeneration
from transformers.utils import cached_file, logging

from data import AUDIO_TOKEN, TEMPLATES
from infra.errors import InputError
from infra.files import begin_folder, finish_folder
from infra.processes import SharedInputError, gather, memory_errors
from model.lora import adapter_base, base_of, is_adapter, lora_layers, merge_adapter, save_adapter
from model.qwen2_audio import freeze_position_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REMEMBERED = "aqa.json"  # file in a checkpoint, for the template: transformers and peft have no field for it
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")  # fmt: skip
MODEL_FILES = (*PROCESSOR_FILES, "config.json", "generation_config.json", "special_tokens_map.json",
               "added_tokens.json", "adapter_config.json", "*.safetensors*")  # fmt: skip

# what the message of a failed download says -> what helps
REMEDIES = {
    "couldn't connect": "connect to the internet and unset HF_HUB_OFFLINE; or run `hf download` on another machine, "
    "copy the folder that it prints with `cp -rL`, and name the copy",
    "gated repo": "ask for access on the model's page, then run `hf auth login`",
    "401 Client Error": "check the name, or run `hf auth login` with a valid token",
    "No space left": "make room, or name a folder on a larger disk with HF_HOME",
}

# ---- check ----


@contextmanager
def loading_errors(name_or_path: str, expected: str = "a Qwen2-Audio model"):
    """Inside `with`, turn every exception into an InputError, with the remedy for a failed download."""
    try:
        yield
    except Exception as error:  # transformers, safetensors and tokenizers raise exceptions of all types for bad files
        said = [" ".join(str(text).split())[:300] for text in (error, error.__context__)]
        known = ((text, f"; {remedy}") for text in said for fault, remedy in REMEDIES.items() if fault in text)
        reason, remedy = next(known, (said[0], ""))
        raise InputError(f"{name_or_path}: cannot be loaded as {expected} ({reason}){remedy}") from None


def check_model(name_or_path: str) -> None:
    """Raise InputError unless a Hugging Face name or folder is a Qwen2-Audio model or a LoRA adapter of one.

    Loads no weights.
    """
    if is_adapter(name_or_path):
        base = adapter_base(name_or_path)
        try:
            if os.path.isabs(base) and not os.path.exists(base):
                raise InputError("it does not exist")
            check_model(base)
        except RecursionError:
            raise InputError(f"{name_or_path}: this adapter's bases are adapters of each other; name a model") from None
        except InputError as error:
            raise InputError(
                f"{name_or_path}: the base model of this adapter, {base}, cannot be used ({error}); put it there, or "
                "change base_model_name_or_path in adapter_config.json"
            ) from None
        if _processor_source(name_or_path) == name_or_path:
            _check_processor_files(name_or_path, _processor_source(base))
        return
    is_folder = os.path.exists(name_or_path)
    if is_folder:
        if not os.path.isfile(os.path.join(name_or_path, "config.json")):
            raise InputError(f"{name_or_path}: not a model folder, it has no config.json")
        _check_weight_files(name_or_path)
    of_hub = "" if is_folder else " of the Hub, and no folder here has this name"
    with loading_errors(name_or_path, f"a Qwen2-Audio model{of_hub}"):
        model_type = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False).model_type
        if model_type != "qwen2_audio":
            raise ValueError(f"its config.json says {model_type}")
    if is_folder:
        _check_processor_files(name_or_path, "Qwen/Qwen2-Audio-7B-Instruct")


def _check_weight_files(folder: str) -> None:
    """Raise InputError unless a model folder has all of its weights as safetensors."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(index):
        try:
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
            missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: cannot be used ({type(error).__name__}: {error}); copy it again") from None
        if missing:
            raise InputError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, {missing[0]}; copy it again"
            )
    elif not os.path.isfile(os.path.join(folder, "model.safetensors")):
        pickled = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickled:
            found = f"only {pickled[0]}, a pickle, which could run code when it is opened; convert it to safetensors"
            raise InputError(f"{folder}: has no model.safetensors, {found}")
        raise InputError(f"{folder}: has no model.safetensors; is this the folder of a checkpoint?")


def _check_processor_files(folder: str, base: str) -> None:
    """Raise InputError if a folder lacks processor files. transformers would use defaults in place of some of them.

    base: the model whose processor the message recommends.
    """
    found = {name for name in PROCESSOR_FILES if os.path.isfile(os.path.join(folder, name))}
    missing = {
        "processor_config.json": not found & {"processor_config.json", "preprocessor_config.json"},
        "tokenizer.json": "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= found,
        "tokenizer_config.json": "tokenizer_config.json" not in found,
    }
    if any(missing.values()):
        names = ", ".join(name for name, is_missing in missing.items() if is_missing)
        load, save = f"AutoProcessor.from_pretrained({json.dumps(base)})", f"save_pretrained({json.dumps(folder)})"
        command = f"python -c {shlex.quote(f'from transformers import AutoProcessor; {load}.{save}')}"
        remedy = f"copy the processor of the model that it was trained from, for example with: {command}"
        raise InputError(f"{folder}: has no {names}; {remedy}")


def _processor_source(name_or_path: str) -> str:
    """Return the model that has the processor: the base of an adapter if the adapter has no processor files."""
    if is_adapter(name_or_path) and not any(Path(name_or_path, name).is_file() for name in PROCESSOR_FILES):
        return _processor_source(adapter_base(name_or_path))
    return name_or_path


# ---- identify ----


def identify_model(name_or_path: str) -> dict[str, str]:
    """Return file name -> size and digest for a model folder, or {"commit": COMMIT} for a Hugging Face name.

    An adapter includes the files of its base, as base/NAME. Reads all weights, one thread per file: one core of a
    server hashes 1.3 GB/s.
    """
    if os.path.isdir(name_or_path):
        folder = Path(os.path.abspath(name_or_path))
    else:
        folder = Path(str(cached_file(name_or_path, "config.json"))).parent
    # The Hub's cache: models--Qwen--Qwen2-Audio-7B-Instruct/snapshots/COMMIT
    if re.fullmatch("models--.+/snapshots/[0-9a-f]{40}", "/".join(folder.parts[-3:])):
        return {"commit": folder.name}
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        identity = {path.name: digest for path, digest in zip(files, pool.map(_digest, files))}
    if is_adapter(folder):
        settings = json.loads((folder / "adapter_config.json").read_bytes())
        del settings["base_model_name_or_path"]  # the base may move: its files are compared
        text = json.dumps(settings, sort_keys=True)
        identity["adapter_config.json"] = f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        identity |= {f"base/{name}": digest for name, digest in identify_model(adapter_base(str(folder))).items()}
    return identity


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{path.stat().st_size} bytes, SHA-256 {digest[:16]}"


# ---- load ----


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that --dtype names. "auto" is bfloat16 on a GPU and float32 on a CPU."""
    return DTYPES[("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name]


def load_policy(name_or_path: str, dtype: torch.dtype, device: torch.device):
    """Load a Qwen2-Audio model and its processor by Hugging Face name or folder. Raises InputError.

    For the folder of a LoRA adapter, load the base model in `dtype` and merge the adapter into it. The model is in
    eval mode and stays in eval mode in training: the same tokens must have the same log-probs each time.
    """
    check_model(name_or_path)
    processor = load_processor(name_or_path)
    if is_adapter(name_or_path):
        # On the CPU, so that the merged weights are the same everywhere.
        model, _ = load_policy(adapter_base(name_or_path), dtype, torch.device("cpu"))
        with loading_errors(name_or_path, "a LoRA adapter"):
            merge_adapter(model, name_or_path)
    else:
        with loading_errors(name_or_path):
            with _no_warnings():  # transformers would print a table of mismatched weights; we raise one line
                both: Any = Qwen2AudioForConditionalGeneration.from_pretrained(
                    name_or_path, dtype=dtype, output_loading_info=True, use_safetensors=True
                )
            model, loaded = both
            if loaded["missing_keys"]:  # transformers would fill them with random numbers
                raise ValueError(f"weights are missing: {', '.join(sorted(loaded['missing_keys'])[:3])}, ...")
    freeze_position_table(model)
    return model.to(device).eval(), processor


def load_processor(name_or_path: str):
    """Load the processor of a model or an adapter. Raises InputError if it does not fit the model's config.json."""
    home = _processor_source(name_or_path)
    with loading_errors(home, "a processor of Qwen2-Audio"):
        processor = AutoProcessor.from_pretrained(home, trust_remote_code=False)
        config = AutoConfig.from_pretrained(base_of(name_or_path), trust_remote_code=False)
        token, bins = processor.tokenizer.convert_tokens_to_ids(AUDIO_TOKEN), processor.feature_extractor.feature_size
        if token != config.audio_token_id:
            raise ValueError(f"{AUDIO_TOKEN} is {token} in its tokenizer, but {config.audio_token_id} in config.json")
        if bins != config.audio_config.num_mel_bins:
            raise ValueError(f"it makes {bins} mel bins, but config.json has {config.audio_config.num_mel_bins}")
    processor.tokenizer.padding_side = "left"
    return processor


@contextmanager
def _no_warnings():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_on_all_ranks(name_or_path: str, dtype: torch.dtype, device: torch.device):
    """Call load_policy on every rank and wait until all ranks have loaded, however slow some node is.

    Raises SharedInputError if loading fails on any rank, or if a node has another model under this name.
    """
    loaded = failure = sample = None
    try:
        with memory_errors("loading the model"):
            loaded = load_policy(name_or_path, dtype, device)
            sample = torch.cat([weight.detach().flatten()[:64].float().cpu() for weight in loaded[0].parameters()])
    except InputError as error:
        failure = str(error)
    failures = [reason for reason in gather(failure) if reason]
    if failures:
        raise SharedInputError(failures[0])
    first, *others = gather(sample)
    # Not torch.equal: another processor may round the weights of a merged adapter in another way.
    if not all(other.shape == first.shape and torch.allclose(other, first, rtol=0.01) for other in others):
        raise SharedInputError(f"{name_or_path}: is not the same model on all nodes; copy it again, or share one disk")
    return loaded


# ---- save ----


def save_checkpoint(folder: Path, model, processor, template: str | None = None) -> None:
    """Write model and processor as a Hugging Face folder, or as a PEFT adapter's folder if the model has LoRA.

    Replaces an existing folder of that name. `template`, which the model was trained with, is saved in REMEMBERED.
    """
    unfinished = begin_folder(folder)
    if lora_layers(model):
        save_adapter(model, unfinished)
    else:
        model.save_pretrained(unfinished, max_shard_size="5GB")
    processor.save_pretrained(unfinished)
    # safetensors writes files that only their owner can read, whatever the umask.
    for weights in unfinished.glob("*.safetensors"):
        weights.chmod((unfinished / "processor_config.json").stat().st_mode & 0o777)
    if template:
        (unfinished / REMEMBERED).write_text(json.dumps({"template": template}) + "\n", encoding="utf-8")
    finish_folder(folder)


def remembered_template(folder: str | Path) -> str | None:
    """Return the template that a checkpoint was trained with; None if it has no REMEMBERED file. Raises InputError."""
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
