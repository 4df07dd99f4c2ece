"""cai_fast.kernels: the operations in which the time, the memory or the exactness of training is decided.

Every operation has backends behind one name: `reference` (a textbook oracle for tests), `chunked` (torch in bounded
memory), `triton` (own GPU kernels, in kernels/triton/, imported at the first use); `auto` takes triton on CUDA where
there is one and chunked elsewhere, and the environment variable CAI_FAST_KERNELS overrides `auto`.
"""

from .adamw import adamw_step, gradient_norm, join_master, split_master
from .attention import merge_attention, paged_attention, shared_attention
from .block import rms_norm, rope, swiglu
from .common import chunk_rows as chunk_rows
from .gae import gae
from .linear_cross_entropy import linear_cross_entropy
from .linear_kl import LinearKL, linear_kl
from .linear_logprob import LinearLogprob, linear_logprob
from .linear_policy_loss import PolicyLoss, linear_policy_loss
from .preference import (
    PreferenceLabels,
    PreferenceLoss,
    preference_labels,
    preference_loss,
    score_options,
)
from .sampling import philox_uniform, sample_tokens

__all__ = [
    "LinearKL",
    "LinearLogprob",
    "PolicyLoss",
    "PreferenceLabels",
    "PreferenceLoss",
    "adamw_step",
    "gae",
    "gradient_norm",
    "join_master",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "linear_policy_loss",
    "merge_attention",
    "paged_attention",
    "philox_uniform",
    "preference_labels",
    "preference_loss",
    "rms_norm",
    "rope",
    "sample_tokens",
    "score_options",
    "shared_attention",
    "split_master",
    "swiglu",
]
