"""LoRA (arXiv 2106.09685) through peft: each weight W [out, in] stays frozen, and B A * alpha / rank on top learns.

A [rank, in] starts random and B [out, rank] starts at zero, so training starts from the base model. Adapters are
float32 whatever the dtype of the base: they are their own master weights, and peft casts their inputs and outputs.

The adapter is inside the model: policy.py and decoding.py call the same layers with and without it. With the adapter
off, the model is its base again, so GRPO with LoRA needs no second model as its reference.
"""

import json
import math
import os
import re
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

from infra.errors import InputError
from model.qwen2_audio import AUDIO_TOWER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's file names
ADAPTER = "default"  # peft's name for the only adapter of a model
PREFIX = "base_model.model."  # of weight names in peft's files

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
    """Add a new adapter to a loaded Qwen2-Audio model, in place, and freeze all other weights.

    base: Hugging Face name or folder that `model` was loaded from; checkpoints name it. targets: names of linear layers
    such as q_proj, wherever they occur, except in a frozen audio tower. The same seed gives the same adapter on every
    rank. Raises InputError for a target that names no linear layer.
    """
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (freeze_audio_tower and name.startswith(f"{AUDIO_TOWER}."))
    }
    unknown = [target for target in targets if target not in linear]
    if unknown or not targets:
        fault = f"no linear layer to train is named {', '.join(unknown)}" if unknown else "no layer is named"
        raise InputError(f"--lora_targets: {fault}; {base} has {', '.join(sorted(linear))}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=dropout,
        target_modules=targets,
        exclude_modules=re.escape(AUDIO_TOWER) + r"\..*" if freeze_audio_tower else None,
        base_model_name_or_path=os.path.abspath(base) if os.path.exists(base) else base,
    )
    with unset_fake_temporarily():  # peft cannot handle FakeTensorMode, in which benchmarks/memory.py calls this
        inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)  # the weights have no data yet
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        like = layer.get_base_layer().get_parameter("weight")
        dtype = torch.promote_types(like.dtype, torch.float32)
        # On the CPU, where a seed gives the same numbers on every machine.
        random = torch.empty(a.get_parameter("weight").shape, dtype=dtype, device="cpu")
        nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator)  # as in peft and the paper's code
        a.weight = nn.Parameter(random.to(like.device))
        b.weight = nn.Parameter(torch.zeros(b.get_parameter("weight").shape, dtype=dtype, device=like.device))
    model.eval()  # new modules start in training mode


def lora_layers(model) -> dict[str, LoraLayer]:
    """Return the layers with an adapter, by name; none for a model without LoRA."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def adapter_off(model):
    """Inside `with`, switch the adapter off: the model computes the same as its base."""
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters(False) would also clear requires_grad
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def dropout_on(model):
    """Inside `with`, switch the adapters' dropout on, with torch's default generator. All else stays in eval mode."""
    layers = lora_layers(model).values()
    dropouts = [module for layer in layers for module in layer.lora_dropout.values() if isinstance(module, nn.Dropout)]
    try:
        for dropout in dropouts:
            dropout.train()
        yield
    finally:
        for dropout in dropouts:
            dropout.eval()


@torch.no_grad()
def merge(model) -> None:
    """Add the adapter to the weights in place, W + B A * alpha / rank. The model is a plain one again, nothing frozen.

    Each sum is computed in float32 (or float64) and rounded once, to the weight's dtype.
    """
    for name, layer in lora_layers(model).items():
        layer.merge(adapter_names=[ADAPTER])
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


# ---- in a folder ----


def is_adapter(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds a PEFT adapter, of any type and possibly damaged."""
    return os.path.isfile(os.path.join(folder, CONFIG))


def save_adapter(model, folder: Path) -> None:
    """Write the adapter into an existing folder, in peft's format."""
    config = model.peft_config[ADAPTER]
    settings = config.to_dict() | {"inference_mode": True, "target_modules": sorted(config.target_modules)}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    weights = {PREFIX + name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def adapter_base(folder: str) -> str:
    """Return the name or folder of an adapter's base model. Raises InputError unless the folder is a LoRA adapter."""
    try:
        config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
        peft_type, base = config["peft_type"], config["base_model_name_or_path"]
        itself = isinstance(base, str) and os.path.realpath(base) == os.path.realpath(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder}: its {CONFIG} cannot be used ({type(error).__name__}: {error})") from None
    if peft_type != "LORA":
        raise InputError(f"{folder}: not a LoRA adapter, its {CONFIG} says {peft_type!r:.100}")
    if config.get("modules_to_save"):
        modules = config["modules_to_save"]
        raise InputError(f"{folder}: holds more than LoRA, whole modules {modules!r:.200}; merge it with peft")
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder}: its {CONFIG} names no base model; name one there as base_model_name_or_path")
    if itself:
        raise InputError(f"{folder}: its {CONFIG} names this very folder as base_model_name_or_path; name the base")
    if not Path(folder, WEIGHTS).is_file():
        pickled = ""
        if Path(folder, "adapter_model.bin").exists():
            pickled = ", only adapter_model.bin, which could run code when it is opened; convert it"
        raise InputError(f"{folder}: the adapter has no {WEIGHTS}{pickled}")
    return base


def base_of(name_or_path: str) -> str:
    """Return the model at the bottom of an adapter or of adapters on adapters; any other model is its own base."""
    while is_adapter(name_or_path):
        name_or_path = adapter_base(name_or_path)
    return name_or_path


def merge_adapter(model, folder: str) -> None:
    """Merge an adapter folder into its loaded base, in place.

    Raises ValueError if the two do not fit, and the exceptions of peft and safetensors for files they cannot read.
    """
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
        fault, names = ("no", missing) if missing else ("an unexpected", loaded.unexpected_keys)
        raise ValueError(f"{WEIGHTS} does not fit the base and {CONFIG}: it has {fault} {sorted(names)[0]}")
    merge(model)
