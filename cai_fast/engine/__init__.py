"""Generation and option scoring with the trainer's own model: continuous batching over a cache of slots or pages."""

from cai_fast.engine.engine import Engine
from cai_fast.engine.prefix import Prefix
from cai_fast.engine.requests import Completion, Sampling, Tree
from cai_fast.engine.trees import token_tree
from cai_fast.engine.trunk import COUNTERS

__all__ = ["COUNTERS", "Completion", "Engine", "Prefix", "Sampling", "Tree", "token_tree"]
