"""Pretraining of the toy base model: an ordinary Llama checkpoint with a word-level tokenizer, from nothing.

Muon moves the block matrices and AdamW the rest: with AdamW alone the model does not learn to copy, hence not to
criticise, in the same number of steps.
"""

import hashlib
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from cai_fast import heartbeat, kernels
from cai_fast.batching import pack
from cai_fast.checkpoint import Checkpoints, Saved, TrainState
from cai_fast.distributed import Stopped, stop_requested
from cai_fast.model import Model, ModelConfig
from cai_fast.model.config import Rope
from cai_fast.optim import Optimizer, schedule
from cai_fast.records import content_id
from cai_fast.runlog import RunLog
from cai_fast.toy import corpus
from cai_fast.toy.corpus import Sample

VERSION = 1  # of everything below that the corpus does not show; part of the cache key
POOL = 8  # steps whose samples are sorted by length: batches of equal lengths waste no attention on padding
SAVE_EVERY = 200
HEAD_DIM = 24


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train how large a model; everything else is fixed."""

    seed: int
    steps: int
    tokens_per_step: int
    lr: float
    muon_lr: float
    warmup_steps: int
    hidden_size: int = 96
    layers: int = 4
    direct: float = corpus.MIXTURE["direct"]

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""
        return model_config(self.hidden_size, self.layers)

    def key(self) -> str:
        """Identity of the resulting model: recipe, corpus, code version, torch version."""
        digest = hashlib.blake2b(digest_size=16)
        for number in (*range(100), *range(corpus.EARLY, corpus.EARLY + 400)):
            digest.update(repr(corpus.sample(self.seed, number, self.direct)).encode())
        words = list(corpus.vocabulary())
        apart = {"hidden_size", "layers"} | ({"direct"} if self.direct == Recipe.direct else set())
        training = {name: value for name, value in vars(self).items() if name not in apart}
        return content_id(training, digest.hexdigest(), words, VERSION, torch.__version__, vars(self.model))


def model_config(hidden_size: int = 96, layers: int = 4) -> ModelConfig:
    """A toy model, by default of 0.48 M parameters: 12 hidden_size² a layer, and the embedding."""
    table = corpus.vocabulary()
    kept = tuple((f"{name}_token_id", table[f"<{name}>"]) for name in ("bos", "eos", "pad"))
    heads = hidden_size // HEAD_DIM
    return ModelConfig(
        vocab_size=len(table), hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3, num_layers=layers,
        num_heads=heads, num_kv_heads=heads, head_dim=HEAD_DIM, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope=Rope(theta=1000.0), tie_word_embeddings=True, kept=kept,
    )  # fmt: skip


def input_scale(hidden_size: int) -> float:
    """How much larger the embedding is than suits the output, see `initialise`."""
    return 0.5 * math.sqrt(hidden_size)


def initialise(seed: int, config: ModelConfig | None = None) -> Model:
    """A new model, by default of the default shape.

    Tied embeddings serve two scales: inputs want rows of about 0.1, outputs five times less. The final norm's weight
    starts at 1 / `input_scale`, which makes up for it within what a Llama can express.
    """
    config = config or model_config()
    model, generator = Model(config), torch.Generator().manual_seed(seed)
    size = config.hidden_size
    scale = input_scale(size)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0 / scale if name == "model.norm.weight" else 1.0)
                continue
            if "embed_tokens" in name:
                std = scale * 0.02 * math.sqrt(128 / size)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                std = 0.4 / math.sqrt(config.num_layers * size)
            else:
                std = 0.7 / math.sqrt(size)
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def batches(
    seed: int, tokens_per_step: int, sample: Callable[[int, int], Sample] = corpus.sample
) -> Iterator[list[Sample]]:
    """The samples of each step, for ever; `sample(seed, number)` makes one."""
    number, rng = 0, random.Random(f"toy/batches/{seed}")
    while True:
        pool: list[Sample] = []
        while sum(len(s.ids) for s in pool) < POOL * tokens_per_step:
            pool.append(sample(seed, number))
            number += 1
        pool.sort(key=lambda s: len(s.ids))
        groups: list[list[Sample]] = [[] for _ in range(POOL)]
        total, before = sum(len(s.ids) for s in pool), 0
        for s in pool:
            groups[before * POOL // total].append(s)
            before += len(s.ids)
        rng.shuffle(groups)
        yield from groups


def loss(model: Model, batch: list[Sample]) -> torch.Tensor:
    """Weighted mean of the next-token losses of the samples."""
    packed = pack([s.ids[:-1] for s in batch])
    targets = torch.tensor([t for s in batch for t in s.ids[1:]])
    weights = torch.tensor([w for s in batch for w in s.weights[1:]])
    scale = 1.0 / float(weights.sum())
    return model(packed, loss=lambda hidden, head: kernels.linear_cross_entropy(
        hidden, head, targets, weights=weights, scale=scale))  # fmt: skip


def make_optimizer(model: Model, recipe: Recipe) -> Optimizer:
    """Muon for the block matrices, AdamW for embedding and norms, with steps in proportion to their first values."""
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    scale = input_scale(model.config.hidden_size)
    scales = {"model.embed_tokens.weight": scale, "model.norm.weight": 1.0 / scale}
    return Optimizer.muon(
        model.named_parameters(), matrices=matrices, muon_lr=recipe.muon_lr, lr=recipe.lr, scales=scales
    )


def train(
    recipe: Recipe, states: Checkpoints, log: RunLog, *, start: Model | None = None,
    sample: Callable[[int, int], Sample] | None = None, name: str = "base",
) -> Model:  # fmt: skip
    """Pretrain a new model, or train `start` further, on the recipe's corpus or on that of `sample`, resuming from
    `states`; SIGTERM saves the state and raises Stopped."""
    sample = sample or partial(corpus.sample, direct=recipe.direct)
    model = initialise(recipe.seed, recipe.model) if start is None else start
    optimizer = make_optimizer(model, recipe)
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state_dict().items()}
    state = states.latest() or Saved()
    if state.step:
        states.load(state, tensors)
    log.truncate(name, state.step)
    average = state.extra.get("loss", math.nan)
    stream = islice(batches(recipe.seed, recipe.tokens_per_step, sample), state.step, recipe.steps)
    with states, log.progress(recipe.steps, name, "step", initial=state.step) as bar:
        for step, batch in enumerate(stream, state.step):
            heartbeat.at(name, f"step {step}")
            value = loss(model, batch)
            value.backward()
            optimizer.clip(1.0)
            optimizer.step(schedule("cosine", step, recipe.steps, recipe.warmup_steps, floor=0.05))
            now = float(value.detach())
            if not math.isfinite(now):
                raise FloatingPointError(f"{name}: the loss is {now} at step {step}; lower base.lr or base.muon_lr")
            average = now if math.isnan(average) else 0.98 * average + 0.02 * now
            bar.update(1, loss=average)
            if step % 10 == 0:
                log.metrics(name, step, {f"{name}/loss": now})
            done, stop = step + 1, stop_requested()
            if stop or done % SAVE_EVERY == 0 or done == recipe.steps:
                states.save(TrainState(done, extra={"loss": average}, tensors=tensors))
            if stop:
                states.wait()
                raise Stopped
    return model


class ToyTokenizer:
    """Word-level tokenizer of the toy language, in the form `Model.save` wants."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer files into a checkpoint folder."""
        from transformers import PreTrainedTokenizerFast

        table = corpus.vocabulary()
        # Special tokens stay out of the word list, so that no text can contain one.
        words = {word: index for word, index in table.items() if word not in corpus.SPECIAL}
        backend = Backend(models.WordLevel(words, unk_token=corpus.UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens(list(corpus.SPECIAL))
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", table["<bos>"])]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token=corpus.UNKNOWN, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
            clean_up_tokenization_spaces=False, model_max_length=model_config().max_position_embeddings,
        ).save_pretrained(folder)  # fmt: skip


def cache_root() -> Path:
    """The user's cache folder for this program."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cai_fast"


def make_base(recipe: Recipe, folder: Path, states: Checkpoints, log: RunLog, *, use_cache: bool) -> bool:
    """Put the base model into `folder`, from the cache if it is there; returns whether it was."""
    cached = cache_root() / f"toy-{recipe.key()}"
    if use_cache and (cached / "config.json").is_file():
        log.info(f"base: taken from {cached}")
        shutil.copytree(cached, folder, dirs_exist_ok=True)
        return True
    model = train(recipe, states, log)
    model.save(folder, tokenizer=ToyTokenizer())
    if use_cache:
        _keep(folder, cached, log)
    return False


def _keep(folder: Path, cached: Path, log: RunLog) -> None:
    """Copy a finished base model into the cache; a cache that cannot be written to is no reason to fail."""
    partial = cached.with_name(f"{cached.name}.{os.getpid()}.partial")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, partial)
        os.replace(partial, cached)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not (cached / "config.json").is_file():  # else another run has just put the same model there
            log.warn(f"base: not cached in {cached}: {error.strerror}")
