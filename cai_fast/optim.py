"""Optimizers of fp32 and of bf16 weights, the gradients they step on, and learning-rate schedules.

The state is a flat dict of tensors keyed by parameter name, so it does not depend on the order of parameters.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cai_fast import kernels, rng
from cai_fast.distributed import Distributed

BETAS, EPS = (0.9, 0.999), 1e-8
Named = Iterable[tuple[str, nn.Parameter]]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then the nearest orthogonal matrix as the update of each matrix.

    As torch.optim.Muon without weight decay, but in fp32 and with matrices of one shape stacked: on a CPU, where torch
    multiplies bf16 matrices one by one and slowly, a step of the toy model takes a quarter of the time.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz iteration, tuned for a steep start

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, iterations: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "iterations": iterations})

    @staticmethod
    def initial(p: Tensor) -> dict[str, Tensor]:
        """State of a parameter before the first step."""
        return {"momentum_buffer": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> None:
        """One update; parameters without a gradient stay."""
        _allocate(self)
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
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


def _collect(gradients: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """A hook that moves a bf16 parameter's gradient into `gradients`."""

    def take(parameter: Tensor) -> None:
        grad, held = parameter.grad, gradients.get(name)
        if grad is None:  # what was used gave its gradient to main_grad
            return
        gradients[name] = grad if held is None else held.float().add_(grad)
        parameter.grad = None

    return take


def _release(parameter: nn.Parameter) -> None:
    """Undo what an earlier optimizer did to the parameter, which would otherwise take the gradients."""
    if hasattr(parameter, "gradient_hook"):
        parameter.gradient_hook.remove()
        del parameter.gradient_hook
    if hasattr(parameter, "main_grad"):
        del parameter.main_grad


def _allocate(part: "Muon | SplitAdamW | FusedAdamW") -> None:
    """Make the state of parameters that have none yet."""
    for group in part.param_groups:
        for p in group["params"]:
            if not part.state[p]:
                part.state[p].update(part.initial(p))


class SplitAdamW(torch.optim.Optimizer):
    """AdamW of bf16 parameters: kernels.adamw_step on (parameter, 16-bit remainder), which are the fp32 weights.

    It holds the gradients too, since `.grad` would have to be bf16: the first since the last step as autograd gives
    it, and the fp32 sum from the second on. So a step of one micro-batch never has an fp32 gradient; only that of
    `head`, the output head's weight, is always summed in fp32, because the losses form it so (its `main_grad`).
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], groups: list[dict[str, Any]], moments: torch.dtype,
        head: nn.Parameter | None = None,
    ) -> None:  # fmt: skip
        """groups: as torch.optim.AdamW's with lr, betas, weight_decay and eps; moments: dtype of their state."""
        super().__init__(groups, {})
        self.gradients: dict[str, Tensor] = {}
        self.clip: Tensor | None = None
        """A number on the device that the next step's gradients are multiplied by."""
        self.names = {parameter: name for name, parameter in named.items()}
        self._moments = moments
        for name, parameter in named.items():
            _release(parameter)
            parameter.gradient_hook = parameter.register_post_accumulate_grad_hook(_collect(self.gradients, name))
            if parameter is head:
                self.gradients[name] = parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)

    def initial(self, p: Tensor) -> dict[str, Tensor]:
        """State of a parameter before the first step."""
        step = torch.zeros((), dtype=torch.int64)  # on the CPU: read there, at every step
        moments = {key: torch.zeros_like(p, dtype=self._moments) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": step, "remainder": torch.zeros_like(p, dtype=torch.int16)} | moments

    @torch.no_grad()
    def step(self) -> None:
        """One update; parameters without a gradient stay."""
        _allocate(self)
        for group in self.param_groups:
            for p in group["params"]:
                name = self.names[p]
                if name not in self.gradients:
                    continue
                state = self.state[p]
                state["step"] += 1
                step = int(state["step"])
                kernels.adamw_step(
                    p, state["remainder"], self.gradients.pop(name), state["exp_avg"], state["exp_avg_sq"],
                    lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                    step=step, clip=self.clip, key=rng.key(0, "adamw", name, step),
                )  # fmt: skip
                if hasattr(p, "main_grad"):
                    self.gradients[name] = p.main_grad.zero_()


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW of fp32 parameters, with the state that its first step would make."""

    @staticmethod
    def initial(p: Tensor) -> dict[str, Tensor]:
        """State of a parameter before the first step."""
        step = torch.zeros((), dtype=torch.float32, device=p.device)  # beside the parameter for a fused step
        return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


class Optimizer:
    """Some torch optimizers over named fp32 or bf16 parameters, stepped together; frozen ones are left out.

    After the backward passes of a step: `reduce` over ranks, `clip`, `step`.
    """

    def __init__(self, named: Named) -> None:
        self._params = {name: p for name, p in named if p.requires_grad}
        self._parts: list[tuple[Muon | FusedAdamW | SplitAdamW, float]] = []

    @classmethod
    def adamw(cls, named: Named, lr: float, *, weight_decay: float = 0.0, betas: tuple[float, float] = BETAS,
              moments: str = "float32", head: nn.Parameter | None = None) -> "Optimizer":  # fmt: skip
        """AdamW; weight decay applies to matrices only. `moments`: dtype of the moments of bf16 parameters; `head`: the
        weight that the losses of kernels/ take, whose gradient, if it is bf16, they sum in fp32 themselves."""
        optimizer = cls(named)
        optimizer._add_adamw(list(optimizer._params), lr, weight_decay, betas, moments, head)
        return optimizer

    @classmethod
    def muon(cls, named: Named, *, matrices: Sequence[str], muon_lr: float, lr: float,
             betas: tuple[float, float] = (0.9, 0.98), scales: Mapping[str, float] = MappingProxyType({})
             ) -> "Optimizer":  # fmt: skip
        """Muon for the named hidden matrices, which must be fp32, AdamW for everything else; `scales` multiply `lr` for
        some of that."""
        optimizer = cls(named)
        hidden = [optimizer._params[name] for name in matrices]
        if any(p.dtype != torch.float32 for p in hidden):
            raise ValueError("muon: expected float32 matrices")
        optimizer._parts.append((Muon(hidden, lr=muon_lr), muon_lr))
        rest = [n for n in optimizer._params if n not in set(matrices)]
        for scale in sorted({scales.get(n, 1.0) for n in rest}):
            optimizer._add_adamw([n for n in rest if scales.get(n, 1.0) == scale], lr * scale, 0.0, betas)
        return optimizer

    def _add_adamw(self, names: Sequence[str], lr: float, weight_decay: float, betas: tuple[float, float],
                   moments: str = "float32", head: nn.Parameter | None = None) -> None:  # fmt: skip
        half = {n: self._params[n] for n in names if self._params[n].dtype == torch.bfloat16}
        full = {n: self._params[n] for n in names if n not in half}
        if any(p.dtype != torch.float32 for p in full.values()):
            raise ValueError("adamw: expected float32 or bfloat16 parameters")
        options = {"lr": lr, "betas": betas, "eps": EPS}
        if full:
            groups = _groups(full.values(), weight_decay)
            self._parts.append((FusedAdamW(groups, **options, fused=True), lr))
        if half:
            groups = [group | options for group in _groups(half.values(), weight_decay)]
            self._parts.append((SplitAdamW(half, groups, getattr(torch, moments), head), lr))

    @property
    def _split(self) -> list[SplitAdamW]:
        return [part for part, _ in self._parts if isinstance(part, SplitAdamW)]

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """What the next step will use, by parameter name; in fp32, but bf16 ones of a single micro-batch."""
        held = {name: grad for part in self._split for name, grad in part.gradients.items()}
        return {name: held.get(name, p.grad) for name, p in self._params.items()}

    def reduce(self, dist: Distributed) -> None:
        """Collective: sum the gradients over ranks; those of sharded parameters have been in the backward pass."""
        whole = {name: p for name, p in self._params.items() if not isinstance(p, DTensor)}
        gradients = self.gradients
        reduced = dist.all_reduce_grads([gradients[name] for name in whole], list(whole.values())) if whole else []
        sums = dict(zip(whole, reduced, strict=True))
        for part in self._split:
            part.gradients.update({n: g for n in part.names.values() if (g := sums.pop(n)) is not None})
        for name, grad in sums.items():
            self._params[name].grad = grad

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Global L2 norm of the gradients, a scalar tensor; the step scales them down to `max_norm` if they are above.

        0 only measures. Once a step, after `reduce`. bf16 parameters' gradients are scaled within the step's kernel.
        """
        params = [p for p in self._params.values() if p.grad is not None]
        if not self._split:
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            if max_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
            return norm.full_tensor() if isinstance(norm, DTensor) else norm
        norm = kernels.gradient_norm(list(self.gradients.values()))
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)  # torch's formula
            for p in params:
                p.grad.mul_(factor)
            for part in self._split:
                part.clip = factor
        return norm

    def step(self, factor: float = 1.0) -> None:
        """One update at `factor` times the learning rates; clears the gradients."""
        for part, lr in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * factor
            part.step()
        for part in self._split:
            part.clip = None
        for p in self._params.values():
            p.grad = None

    def release(self) -> None:
        """Leave the parameters as they were found, with no gradient taken or held."""
        for p in self._params.values():
            _release(p)
        for part in self._split:
            part.gradients.clear()

    def allocate(self) -> None:
        """Make the state of all parameters, which their first step would make otherwise."""
        for part, _ in self._parts:
            _allocate(part)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and remainders of bf16 parameters, of every parameter; the tensors are the live ones, so
        that a saved state can be loaded into them. The model's parameters are saved and restored by the caller.

        A remainder is only right for the bf16 parameter it was saved with: the two are one fp32 weight.
        """
        self.allocate()
        state: dict[str, Tensor] = {}
        for name, p in self._params.items():
            held = {key: value for part, _ in self._parts for key, value in part.state.get(p, {}).items()}
            assert held, f"{name}: belongs to no optimizer"
            state |= {f"{name}/{key}": value for key, value in held.items()}
        return state


def _groups(params: Collection[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
