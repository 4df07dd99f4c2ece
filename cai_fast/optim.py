"""Optimizers with fp32 state whatever the model's dtype, learning-rate schedules, and gradient clipping.

The state is a flat dict of tensors keyed by parameter name, so it does not depend on the order of parameters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
Named = Iterable[tuple[str, nn.Parameter]]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then the nearest orthogonal matrix as the update of each matrix.

    As torch.optim.Muon without weight decay, but in fp32 and with matrices of one shape stacked: on a CPU, where torch
    multiplies bf16 matrices one by one and slowly, a step of the toy model takes a quarter of the time.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz iteration, tuned for a steep start

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, iterations: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "iterations": iterations})

    @torch.no_grad()
    def step(self) -> None:
        """One update; parameters without a gradient stay."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                for p in params:
                    self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                grads = torch.stack([p.grad for p in params])
                buffers = torch.stack([self.state[p]["momentum_buffer"] for p in params])
                buffers.lerp_(grads, 1 - group["momentum"])
                update = self._orthogonal(grads.lerp_(buffers, group["momentum"]), group["iterations"])
                size = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for p, buffer, change in zip(params, buffers, update, strict=True):
                    self.state[p]["momentum_buffer"].copy_(buffer)
                    p.sub_(change, alpha=size)

    @classmethod
    def _orthogonal(cls, x: Tensor, iterations: int) -> Tensor:
        """[N, rows, columns] matrices with their singular values brought near 1."""
        a, b, c = cls.COEFFICIENTS
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT.contiguous() if tall else x
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
        for _ in range(iterations):
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
        return x.mT if tall else x


class Optimizer:
    """Some torch optimizers over named parameters, stepped together.

    A parameter that is not fp32 gets an fp32 master copy: gradients of micro-batches are summed on the master, the
    update happens there, and the rounded result is copied back; otherwise small updates would be lost in rounding.
    """

    def __init__(self, named: Named) -> None:
        self._models = dict(named)
        self._masters: dict[str, Tensor] = {}
        for name, parameter in self._models.items():
            self._masters[name] = parameter if parameter.dtype == torch.float32 else self._master(parameter)
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []

    @staticmethod
    def _master(parameter: nn.Parameter) -> Tensor:
        master = parameter.detach().float().requires_grad_()

        def move(p: Tensor) -> None:
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(move)
        return master

    @classmethod
    def adamw(cls, named: Named, lr: float, *, weight_decay: float = 0.0, betas: tuple[float, float] = BETAS
              ) -> "Optimizer":  # fmt: skip
        """AdamW; weight decay applies to matrices only."""
        optimizer = cls(named)
        optimizer._add_adamw(list(optimizer._masters), lr, weight_decay, betas)
        return optimizer

    @classmethod
    def muon(cls, named: Named, *, matrices: Sequence[str], muon_lr: float, lr: float,
             betas: tuple[float, float] = (0.9, 0.98), scales: Mapping[str, float] = MappingProxyType({})
             ) -> "Optimizer":  # fmt: skip
        """Muon for the named hidden matrices, AdamW for everything else; `scales` multiply `lr` for some of that."""
        optimizer = cls(named)
        hidden = [optimizer._masters[name] for name in matrices]
        optimizer._parts.append((Muon(hidden, lr=muon_lr), muon_lr))
        rest = [n for n in optimizer._masters if n not in set(matrices)]
        for scale in sorted({scales.get(n, 1.0) for n in rest}):
            optimizer._add_adamw([n for n in rest if scales.get(n, 1.0) == scale], lr * scale, 0.0, betas)
        return optimizer

    def _add_adamw(self, names: Sequence[str], lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        masters = [self._masters[name] for name in names]
        groups = [
            {"params": [p for p in masters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in masters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._parts.append((torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True), lr))

    @property
    def params(self) -> list[Tensor]:
        """The fp32 tensors whose `.grad` a step uses: reduce and clip these."""
        return list(self._masters.values())

    def step(self, factor: float = 1.0) -> None:
        """One update at `factor` times the learning rates; clears the gradients."""
        for part, lr in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * factor
            part.step()
        for name, master in self._masters.items():
            if master is not self._models[name]:
                self._models[name].detach().copy_(master)
            master.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and master copies; the tensors are the live ones."""
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if master is not self._models[name]:
                state[f"{name}/master"] = master.detach()
            for part, _ in self._parts:
                state |= {f"{name}/{key}": value for key, value in part.state.get(master, {}).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, bit for bit; the model's parameters themselves are restored by the caller."""
        unknown = {key.rsplit("/", 1)[0] for key in state} - set(self._masters)
        if unknown:
            raise ValueError(f"optimizer state of unknown parameters: {sorted(unknown)[:3]}")
        owner = {id(p): part for part, _ in self._parts for group in part.param_groups for p in group["params"]}
        for key, value in state.items():
            name, field = key.rsplit("/", 1)
            master = self._masters[name]
            if field == "master":
                master.data.copy_(value)
            else:  # torch keeps `step` on the CPU except for fused CUDA steps; the device of the parameter suits both
                owner[id(master)].state[master][field] = value.to(master.device, copy=True)


def schedule(name: str, step: int, total: int, warmup: int, floor: float = 0.1) -> float:
    """Learning-rate factor of step 0 .. `total` - 1: linear warm-up, then constant, or linear or cosine to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    if name == "linear":
        return 1.0 - (1.0 - floor) * done
    if name == "cosine":
        return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * done)) / 2
    raise ValueError(f"schedule: expected constant, linear or cosine, got {name!r}")


def clip_grad_norm(params: Sequence[Tensor], max_norm: float) -> Tensor:
    """Global L2 norm of the gradients (a scalar tensor), scaled down to `max_norm` if above it; 0 only measures."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_([p for p in params if p.grad is not None], max_norm, norm)
    return norm
