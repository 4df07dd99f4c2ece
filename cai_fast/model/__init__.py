"""The packed decoder: Hugging Face checkpoints in, Hugging Face checkpoints out, one implementation in between."""

from cai_fast.model.config import ModelConfig, Rope
from cai_fast.model.decoder import Model
from cai_fast.model.heads import ScalarHead
from cai_fast.model.hf import init_random, load
from cai_fast.model.verify import check

__all__ = ["Model", "ModelConfig", "Rope", "ScalarHead", "check", "init_random", "load"]
