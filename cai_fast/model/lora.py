"""LoRA adapters inside the decoder (Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / rank) B A x, W frozen.

They are layers of the model, so that training, scoring, and the engine's decoding compute with them unmerged. Only
`merge` gives a model that `Model.save` accepts. A scalar head is trained and stored with the adapters. Files are
peft's: adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cai_fast import rng
from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.inputs import read_json, require_file
from cai_fast.model.decoder import Linear, Model
from cai_fast.model.hf import check_names

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_TASKS = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}
_HEADS = {"classifier", "score"}  # peft names both for every sequence classifier, and saves the one there is
# Fields of adapter_config.json that do not change what a loaded adapter computes, and values that change nothing.
_PASSIVE = {"peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"}
_PASSIVE |= {"auto_mapping", "lora_dropout", "r", "lora_alpha", "target_modules", "megatron_core", "qalora_group_size"}
_NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}  # others change the base weights


class LoraLinear(Linear):
    """`base`, whose weight it takes over under its own name, and a low-rank term in the weight's type.

    The two small products are `Linear`s, so on the CPU a row's bits do not depend on the number of rows.
    """

    def __init__(self, base: Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        kind = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = Linear(base.in_features, rank, bias=False, **kind)
        self.lora_B = Linear(rank, base.out_features, bias=False, **kind)
        self.rank, self.alpha = rank, alpha

    @property
    def scale(self) -> float:
        """What the low-rank term is multiplied by."""
        return self.alpha / self.rank

    @torch.no_grad()
    def reset(self, key: int) -> None:
        """Start as nothing: B zero, A uniform as peft draws it (Kaiming with a = sqrt 5), by `key` alone."""
        bound = self.in_features**-0.5
        drawn = torch.rand(self.lora_A.weight.shape, generator=torch.Generator().manual_seed(key))
        self.lora_A.weight.copy_((2 * drawn - 1) * bound)
        self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        out = super().forward(x)
        # Not torch.add(out, low, alpha=scale): in bf16 a CPU rounds its vectors and their remainder differently.
        return out + self.lora_B(self.lora_A(x) * self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + scale B A: multiplied and added in fp32, rounded once."""
        product = self.lora_B.weight.float() @ self.lora_A.weight.float()
        return torch.add(self.weight.float(), product, alpha=self.scale).to(self.weight.dtype)


def adapters(model: Model) -> dict[str, LoraLinear]:
    """Every adapted layer by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_adapters(model: Model, rank: int, alpha: float, targets: Sequence[str], seed: int) -> list[str]:
    """Put an adapter on every layer that `targets` names; returns the layers' names.

    From then on only the adapters and a scalar head require gradients. Engines are made afterwards. See `reset`.
    """
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        found = f"unknown {', '.join(unknown)[:80]}" if unknown else "found none"
        raise InputError(f"LoRA: targets must be some of {', '.join(TARGETS)}; {found}.")
    if rank < 1 or adapters(model):
        raise InputError(
            f"LoRA: rank must be >= 1. Got {rank}." if rank < 1 else "LoRA: the model has adapters; merge() them first."
        )
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]
    model.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(model.get_submodule(name), rank, alpha))
    if model.head == "score":
        model.score.requires_grad_(True)
    reset(model, seed)
    return names


def reset(model: Model, seed: int) -> None:
    """Let the adapters do nothing, each drawn anew by (seed, its layer's name)."""
    for name, layer in adapters(model).items():
        layer.reset(rng.key(seed, "lora", name))


def merge(model: Model, device: str | torch.device | None = None) -> Model:
    """A copy without adapters that computes the same, up to one rounding of each adapted weight.

    device: of the copy, default the model's own; weights are merged where they are, one at a time.
    """
    layers = {f"{name}.weight": layer for name, layer in adapters(model).items()}
    return model.with_weights({
        name: layers[name].merged().to(device) if name in layers else tensor.detach().to(device, copy=True)
        for name, tensor in model.state_dict().items()
        if not name.removesuffix(".weight").endswith((".lora_A", ".lora_B"))
    })  # fmt: skip


def _tensors(model: Model) -> dict[str, Tensor]:
    """The adapters' weights, and a scalar head's, by peft's names."""
    found = {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight
        for name, layer in adapters(model).items()
        for part in ("lora_A", "lora_B")
    }
    return found | ({PREFIX + "score.weight": model.score.weight} if model.head == "score" else {})


def save_adapters(model: Model, folder: str | Path, base: str | None = None) -> None:
    """Write the adapters alone, and a scalar head, as peft does; `base` names the model below, default its folder."""
    layers, folder = adapters(model), Path(folder)
    if not layers:
        raise InputError("LoRA: the model has no adapters to save; see add_adapters.")
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": _TASKS[model.head],
        "base_model_name_or_path": base or (None if model.source is None else str(model.source)),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "modules_to_save": ["score"] if model.head == "score" else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
    write_atomic(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapters(model: Model, folder: str | Path) -> list[str]:
    """Put the adapters of a peft folder, and its scalar head, on a model without any; returns the layers' names.

    A missing or unexpected tensor, another shape, or an option that LoraLinear does not have is an InputError, and
    leaves the model as it was.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG, model.head)
    found = _read_tensors(folder / WEIGHTS)
    with torch.device("meta"):
        plan = Model(model.config, model.head)
    add_adapters(plan, config["r"], config["lora_alpha"], config["target_modules"], 0)
    wanted = {name: tensor.shape for name, tensor in _tensors(plan).items()}
    check_names(folder, model.head, sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted)))
    for name, shape in wanted.items():
        if found[name].shape != shape or not found[name].is_floating_point():
            raise InputError(
                f"{folder / WEIGHTS}: tensor {name} is {tuple(found[name].shape)}; expected {tuple(shape)} "
                f"of floats, found {found[name].dtype} (do the adapters belong to this model?)"
            )
    names = add_adapters(model, config["r"], config["lora_alpha"], config["target_modules"], 0)
    for name, tensor in _tensors(model).items():
        tensor.copy_(found[name])
    return names


def _read_config(path: Path, head: str) -> dict[str, Any]:
    """adapter_config.json, whose options are all within what LoraLinear does, on a model with that head."""
    config = read_json(path, "a folder of adapters")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: expected an adapter with peft_type LORA")
    for name, value in config.items():
        if name == "modules_to_save" and head == "score" and isinstance(value, list) and set(map(str, value)) <= _HEADS:
            continue
        if name not in _PASSIVE and value and value not in _NEUTRAL.get(name, ()):
            raise InputError(f"{path}: {name[:80]} = {value!r:.80} is not supported")
    rank, alpha, targets = (config.get(name) for name in ("r", "lora_alpha", "target_modules"))
    numbers = type(rank) is int and rank <= 2**16 and type(alpha) in (int, float) and abs(alpha) < 2**31
    if not numbers or not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{path}: expected numbers r and lora_alpha and a list target_modules")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    require_file(path, "the adapters' weights")
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({str(error):.300}); is the download complete?"
        ) from error
