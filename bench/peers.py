"""Other people's implementations of the head's losses, as contestants. One that is not installed, or cannot run on this
device, raises Absent with the reason. Optional packages: pip install -e '.[bench]'."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Absent, Outputs, Work

CLIP, KL = 0.2, 0.1


class HeadInput(NamedTuple):
    """N tokens before a head of V words: what every head operation may need."""

    hidden: Tensor  # [N, H], requires grad
    weight: Tensor  # [V, H], requires grad
    targets: Tensor  # [N]
    old: Tensor  # [N] log-probabilities of the sampling policy
    advantage: Tensor  # [N]
    ref: Tensor  # [N] log-probabilities of the reference
    ref_hidden: Tensor  # [N, H]

    @property
    def grads(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @property
    def scale(self) -> float:
        return 1.0 / self.targets.shape[0]


def need(package: str, module: str, *, gpu: bool) -> None:
    """Raise Absent unless `module` can be imported and, if it needs one, a GPU is here."""
    if importlib.util.find_spec(module) is None:
        raise Absent(f"package {package} is not installed")
    if gpu and not torch.cuda.is_available():
        raise Absent(f"{package} runs on a GPU only")


def gradients(loss: Tensor, x: HeadInput) -> Outputs:
    d_hidden, d_weight = torch.autograd.grad(loss, x.grads)
    return {"loss": loss, "d_hidden": d_hidden, "d_weight": d_weight}


def ppo(logprob: Tensor, x: HeadInput) -> Tensor:
    """The clipped objective with a k2 term, in plain torch: what every peer has to add to its log-probabilities."""
    ratio = (logprob - x.old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    policy = torch.maximum(-x.advantage * ratio, -x.advantage * clipped)
    return (policy + KL * (x.ref - logprob).square() / 2).sum() * x.scale


def eager_cross_entropy(x: HeadInput) -> Outputs:
    return gradients(F.cross_entropy((x.hidden @ x.weight.t()).float(), x.targets), x)


def eager_logprob(x: HeadInput) -> Outputs:
    with torch.no_grad():
        z = (x.hidden @ x.weight.t()).float().log_softmax(-1)
        return {"logprob": z.gather(1, x.targets[:, None])[:, 0], "entropy": -(z.exp() * z).sum(-1)}


def eager_policy(x: HeadInput) -> Outputs:
    z = (x.hidden @ x.weight.t()).float().log_softmax(-1)
    entropy = -(z.detach().exp() * z.detach()).sum()
    return gradients(ppo(z.gather(1, x.targets[:, None])[:, 0], x), x) | {"entropy": entropy}


def eager_kl(x: HeadInput) -> Outputs:
    p, q = ((h @ x.weight.t()).float().log_softmax(-1) for h in (x.hidden, x.ref_hidden))
    return gradients((p.exp() * (p - q.detach())).sum() * x.scale, x)


def liger_cross_entropy(**options: object) -> Callable[[], Work]:
    """A candidate; Liger's default chunks are small, and sums in bf16 unless `accum_dtype` says otherwise."""

    def candidate() -> Work:
        need("liger-kernel", "liger_kernel", gpu=True)
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(**options)
        return lambda x: gradients(loss(x.weight, x.hidden, x.targets), x)

    return candidate


def cce(**options: object) -> Callable[[], Callable[..., Tensor]]:
    """cut-cross-entropy's op; its Triton kernels need a GPU, and the published package has no exact variant."""

    def make() -> Callable[..., Tensor]:
        need("cut-cross-entropy", "cut_cross_entropy", gpu=True)
        from cut_cross_entropy import linear_cross_entropy

        return lambda x, reduction: linear_cross_entropy(x.hidden, x.weight, x.targets, reduction=reduction, **options)

    return make


def cce_cross_entropy() -> Work:
    op = cce()()
    return lambda x: gradients(op(x, "mean"), x)


def cce_policy() -> Work:
    op = cce()()
    return lambda x: gradients(ppo(-op(x, "none").float(), x), x)


def cce_logprob() -> Work:
    op = cce()()

    def work(x: HeadInput) -> Outputs:
        with torch.no_grad():
            return {"logprob": -op(x, "none").float()}

    return work


LogProb = Callable[[HeadInput], tuple[Tensor, Tensor]]
"""(log-probability, entropy) of every row by a peer, before anything is differentiated."""


def _trl_softmax() -> LogProb:
    """TRL's log-softmax on full logits: Triton on a GPU, loops over rows elsewhere."""
    need("trl", "trl", gpu=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda x: selective_log_softmax_and_entropy(x.hidden @ x.weight.t(), x.targets, entropy_requires_grad=False)


def _trl_fused() -> LogProb:
    """What TRL's trainers use: chunks over the vocabulary, no full logits. Not a public function: it may move."""
    need("trl", "trl", gpu=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import utils

    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    outputs = ("log_probs", "entropy")
    op = utils._ChunkedLogProbFunction
    return lambda x: op.apply(x.hidden, x.weight, None, x.targets, 1.0, size, None, 1.0, outputs)[:2]


def _logprob_of(make: Callable[[], LogProb]) -> Callable[[], Work]:
    def candidate() -> Work:
        op = make()

        def work(x: HeadInput) -> Outputs:
            with torch.no_grad():
                logprob, entropy = op(x)
            return {"logprob": logprob.float(), "entropy": entropy.float()}

        return work

    return candidate


def _policy_of(make: Callable[[], LogProb]) -> Callable[[], Work]:
    def candidate() -> Work:
        op = make()

        def work(x: HeadInput) -> Outputs:
            logprob, entropy = op(x)
            return gradients(ppo(logprob.float(), x), x) | {"entropy": entropy.detach().float().sum()}

        return work

    return candidate


TRL_LOGPROB = {"TRL log-softmax": _logprob_of(_trl_softmax), "TRL fused": _logprob_of(_trl_fused)}
TRL_POLICY = {"TRL log-softmax": _policy_of(_trl_softmax), "TRL fused": _policy_of(_trl_fused)}


def torch_cross_entropy() -> Work:
    """torch's own fused head loss, since 2.13."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: gradients(F.linear_cross_entropy(x.hidden, x.weight, x.targets, options=options), x)
