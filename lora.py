"""LoRA (arXiv 2106.09685) through peft: a weight W [out, in] stays frozen, and B A * alpha / rank is learned on top.

A [rank, in] begins random and B [out, rank] zero, so the model begins as its base. Adapters are float32 whatever the
base's dtype: they are their own master weights, and peft casts what goes in and out of them.

The adapter sits inside the model, in place: policy.py and decoding.py call the same layers as without it, and with the
adapter off the model is its base again. So GRPO with LoRA needs no second model as its reference.
"""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
ADAPTER = "default"  # peft's name of a model's only adapter
PREFIX = "base_model.model."  # of the weights' names in peft's files

# ---- in a model ----


def add_lora(
    model,
    base: str,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    freeze_audio_tower: bool,
    seed: int,
) -> None:
    """Add a new adapter to a loaded Qwen2-Audio model, in place, and freeze everything else.

    base: the Hugging Face name or folder that `model` was loaded from, for the checkpoints; targets: names of linear
    layers such as q_proj, wherever they occur, but for the audio tower if that is frozen. The same seed gives the same
    adapter on every rank. Raises InputError for a target that names no linear layer.
    """
    frozen = "model.audio_tower." if freeze_audio_tower else None
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (frozen and name.startswith(frozen))
    }
    unknown = [target for target in targets if target not in linear]
    if unknown or not targets:
        named = f"no linear layer to train is named {', '.join(unknown)}" if unknown else "no layer is named"
        raise InputError(f"--lora_targets: {named}; {base} has {', '.join(sorted(linear))}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft computes with it as with any number
        lora_dropout=dropout,
        target_modules=targets,
        exclude_modules=r"model\.audio_tower\..*" if freeze_audio_tower else None,
        base_model_name_or_path=os.path.abspath(base) if os.path.exists(base) else base,
    )
    with unset_fake_temporarily():  # peft cannot handle FakeTensorMode, under which bench_memory.py calls this
        inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)  # with weights that have no data yet
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        like = layer.get_base_layer().get_parameter("weight")
        dtype = torch.promote_types(like.dtype, torch.float32)
        # On the CPU, where the seed gives the same everywhere.
        random = torch.empty(a.get_parameter("weight").shape, dtype=dtype, device="cpu")
        nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator)  # as peft and the paper's code do
        a.weight = nn.Parameter(random.to(like.device))
        b.weight = nn.Parameter(torch.zeros(b.get_parameter("weight").shape, dtype=dtype, device=like.device))
    model.eval()  # new modules begin in training mode


def lora_layers(model) -> dict[str, LoraLayer]:
    """The layers with an adapter, by name; empty for a model without LoRA."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def adapter_off(model):
    """Inside `with`, the model computes as its base."""
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters(False) would take requires_grad from the weights as well
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def dropout_on(model):
    """Inside `with`, adapters drop inputs at random, by torch's default generator; all else stays in eval mode."""
    layers = lora_layers(model).values()
    dropouts = [module for layer in layers for module in layer.lora_dropout.values() if isinstance(module, nn.Dropout)]
    try:
        for dropout in dropouts:
            dropout.train()
        yield
    finally:
        for dropout in dropouts:
            dropout.eval()


def dropout_is_on(model) -> bool:
    """Whether a model that is in eval mode otherwise draws random numbers."""
    return any(module.training for module in model.modules())


@torch.no_grad()
def merge(model) -> None:
    """Add the adapter to the weights, W + B A * alpha / rank, in place: the model is a plain one again, not frozen.

    Each sum is computed in float32 (or float64) and rounded to the weight's dtype once.
    """
    for name, layer in lora_layers(model).items():
        layer.merge(adapter_names=[ADAPTER])
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


# ---- in a folder ----


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a PEFT adapter, whatever its kind and state."""
    return os.path.isfile(os.path.join(folder, CONFIG))


def save_adapter(model, folder: Path) -> None:
    """Write the adapter as peft does, into an existing folder."""
    config = model.peft_config[ADAPTER]
    settings = config.to_dict() | {"inference_mode": True, "target_modules": sorted(config.target_modules)}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    weights = {PREFIX + name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def adapter_base(folder: str) -> str:
    """The name or folder of the model that an adapter folder is for. Raises InputError unless it is LoRA's."""
    try:
        config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
        kind, base = config["peft_type"], config["base_model_name_or_path"]
        itself = isinstance(base, str) and os.path.realpath(base) == os.path.realpath(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder}: its {CONFIG} cannot be used ({type(error).__name__}: {error})") from None
    if kind != "LORA":
        raise InputError(f"{folder}: not a LoRA adapter, its {CONFIG} says {kind!r:.100}")
    if config.get("modules_to_save"):
        whole = config["modules_to_save"]
        raise InputError(f"{folder}: holds more than LoRA, whole modules {whole!r:.200}; merge it with peft")
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder}: its {CONFIG} names no base model; name one there as base_model_name_or_path")
    if itself:
        raise InputError(f"{folder}: its {CONFIG} names this very folder as base_model_name_or_path; name the base")
    if not Path(folder, WEIGHTS).is_file():
        pickled = ", only adapter_model.bin, which could run code when it is opened; convert it"
        pickled = pickled if Path(folder, "adapter_model.bin").exists() else ""
        raise InputError(f"{folder}: the adapter has no {WEIGHTS}{pickled}")
    return base


def base_of(name_or_path: str) -> str:
    """The model below an adapter, or below adapters on adapters; of any other model, itself."""
    while is_adapter(name_or_path):
        name_or_path = adapter_base(name_or_path)
    return name_or_path


def merge_adapter(model, folder: str) -> None:
    """Merge an adapter folder into its loaded base, in place. Raises ValueError if it does not fit, and what peft and
    safetensors raise for files that they can't read."""
    weights = load_file(os.path.join(folder, WEIGHTS))
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ValueError(f"{WEIGHTS} holds numbers that are not finite")
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = True
    inject_adapter_in_model(config, model, ADAPTER)
    cast_adapter_dtype(model, ADAPTER)  # to float32
    loaded: Any = set_peft_model_state_dict(model, weights, ADAPTER)
    missing = [name for name in loaded.missing_keys if ".lora_" in name]
    if missing or loaded.unexpected_keys:
        what, names = ("lacks", missing) if missing else ("has no place for", loaded.unexpected_keys)
        raise ValueError(f"the base with this {CONFIG} and {WEIGHTS} do not fit: one {what} {sorted(names)[0]}")
    merge(model)
