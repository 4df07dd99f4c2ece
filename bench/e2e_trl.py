"""The peer's side: TRL's trainers and transformers, at their fastest settings for the same work.

TRL's defaults that only cost time here are off: gradient checkpointing, logging, dropout, saving. Packed documents do
not see each other on either side (bfd). On a CPU both sides compute in fp32; on a GPU TRL's own mix is used, bf16
under autocast with fp32 weights, except for its PPO, which has no such mix and gets bf16 weights.
"""

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.bench_feedback import BATCH, straightforward
from bench.contest import Absent
from bench.e2e_load import EOS, PAD, Work, draw, text_of
from bench.e2e_ours import Place
from bench.e2e_turns import Done, Turns

QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "ACCELERATE_LOG_LEVEL": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip

CPU_ROWS = {"sft": 1, "reward": 4, "dpo": 1, "rloo": 8, "grpo": 8, "ppo": 8}
"""Rows (pairs) of the micro-batch that the peer is fastest with on a CPU, where more of them are more padding and more
cache misses: of the whole batch and its halves, quarters, ..., the best that was measured. A GPU takes the whole batch.
Packed rows that go together become one long row, whose attention is quadratic without flash attention."""
CPU_QUESTIONS = 16


def peer(ppo_path: Path | None = None) -> Any:
    """The module trl; Absent says what to install."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    warnings.filterwarnings("ignore")
    if ppo_path is not None:
        sys.path.insert(0, str(ppo_path))
    try:
        import trl
        from transformers.utils import logging
    except ImportError as error:
        raise Absent(f"{error.name} is not installed here: pip install trl transformers accelerate datasets") from error
    logging.disable_progress_bar()
    return trl


class Peer:
    """Models, tokenizer and arguments that all trainers share."""

    def __init__(self, place: Place, turns: Turns) -> None:
        from transformers import AutoTokenizer

        self.place, self.turns = place, turns
        self.tokenizer = AutoTokenizer.from_pretrained(place.folder / "policy")
        self.scratch = tempfile.TemporaryDirectory()
        self.inference = torch.float32 if place.device.type == "cpu" else torch.bfloat16

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        kind = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
        options = {} if name == "policy" else {"num_labels": 1}
        path = self.place.folder / name
        return kind.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", **options).to(self.place.device)

    def rows(self, stage: str, batch: int) -> int:
        """Of a micro-batch."""
        return min(CPU_ROWS[stage], batch) if self.place.device.type == "cpu" else batch

    def arguments(self, stage: str, batch: int, lr: float | None = None) -> dict[str, Any]:
        """TrainingArguments of `turns.steps` steps of `batch` rows."""
        s, cpu, rows = self.place.settings, self.place.device.type == "cpu", self.rows(stage, batch)
        return {
            "output_dir": self.scratch.name, "max_steps": self.turns.steps, "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": batch // rows, "learning_rate": s.lr if lr is None else lr,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused", "weight_decay": 0.0,
            "adam_beta1": s.betas[0], "adam_beta2": s.betas[1], "max_grad_norm": s.max_grad_norm, "bf16": not cpu,
            "fp16": False, "gradient_checkpointing": False, "use_cpu": cpu, "seed": 0, "data_seed": 0,
            "report_to": "none", "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no",
            "disable_tqdm": True, "dataloader_num_workers": 0, "dataloader_pin_memory": not cpu,
        }  # fmt: skip

    def callback(self, end: Callable[[], None]) -> Any:
        """Runs `end` after each optimizer step."""
        from transformers import TrainerCallback

        class Ends(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                end()

        return Ends()

    def works(self, stage: str) -> list[Work]:
        """A step more than is done: loaders look ahead."""
        return draw(self.place.size, stage, self.turns.steps + 1)

    def train(self, trainer: Any) -> None:
        self.turns.start()
        with contextlib.redirect_stdout(io.StringIO()):  # PPO prints; what we say comes afterwards
            trainer.train()


def real(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Rows without their padding."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def supervised(
    peer: Peer, base: type, read: Callable[[dict[str, Any]], tuple[Work, int]], *, mean: bool
) -> tuple[type, Any]:
    """`base` that notes each micro-batch's work and loss, and the callback that takes the turn at a step's end.

    mean: micro-batches of equal size have losses of their own, whose mean is the step's; else their sum is.
    """
    seen: list[tuple[Work, int, float]] = []

    class Noting(base):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            work, tokens = read(inputs)
            loss = super().compute_loss(model, inputs, *args, **options)
            seen.append((work, tokens, loss.detach()))
            return loss

    def end() -> None:
        works, tokens, loss = zip(*seen, strict=True)
        seen.clear()
        starts = [s for w in works for s in w.starts or []]
        work = Work([ids for w in works for ids in w.sequences], starts or None)
        peer.turns(work, Done(sum(tokens), float(sum(loss)) / (len(loss) if mean else 1)))

    return Noting, peer.callback(end)


def fit(peer: Peer, kind: type, callback: Any, config: Any, role: str, columns: dict[str, list[Any]]) -> None:
    """Train the model in `role` on those columns."""
    from datasets import Dataset

    peer.tokenizer.padding_side = "right"
    peer.train(
        kind(model=peer.model(role).train(), args=config, train_dataset=Dataset.from_dict(columns),
             processing_class=peer.tokenizer, callbacks=[callback])
    )  # fmt: skip


def sft(peer: Peer) -> None:
    """Rows of packed documents."""
    from trl import SFTConfig, SFTTrainer

    size = peer.place.size
    documents = [ids for work in peer.works("sft") for ids in work.sequences]

    def read(inputs: dict[str, Any]) -> tuple[Work, int]:
        ids, positions = (inputs[name].flatten() for name in ("input_ids", "position_ids"))
        bounds = (positions == 0).nonzero().flatten().tolist()
        rows = [part.tolist() for part in ids.tensor_split(bounds[1:])]
        return Work(rows), int((inputs["labels"][:, 1:] != -100).sum())

    kind, callback = supervised(peer, SFTTrainer, read, mean=False)
    config = SFTConfig(
        **peer.arguments("sft", size.rows), packing=True, packing_strategy="bfd", max_length=size.row,
        shuffle_dataset=False, loss_type="nll",
    )  # fmt: skip
    fit(peer, kind, callback, config, "policy", {"input_ids": documents})


def reward(peer: Peer) -> None:
    """Chosen and rejected answers in one padded batch."""
    from trl import RewardConfig, RewardTrainer

    sequences = [ids for work in peer.works("reward") for ids in work.sequences]

    def read(inputs: dict[str, Any]) -> tuple[Work, int]:
        rows = real(inputs["input_ids"], inputs["attention_mask"])
        half = len(rows) // 2  # all chosen, then all rejected
        pairs = zip(rows[:half], rows[half:], strict=True)
        return Work([ids for pair in pairs for ids in pair]), int(inputs["attention_mask"].sum())

    kind, callback = supervised(peer, RewardTrainer, read, mean=True)
    config = RewardConfig(**peer.arguments("reward", peer.place.size.pairs), max_length=None, disable_dropout=True)
    fit(peer, kind, callback, config, "pm", {"chosen_ids": sequences[::2], "rejected_ids": sequences[1::2]})


def dpo(peer: Peer) -> None:
    """The reference's log-probabilities are computed before training, on both sides."""
    from trl import DPOConfig, DPOTrainer

    place, works = peer.place, peer.works("dpo")

    def read(inputs: dict[str, Any]) -> tuple[Work, int]:
        rows, answers = real(inputs["input_ids"], inputs["attention_mask"]), inputs["completion_mask"]
        starts, half = answers.argmax(1).tolist(), len(rows) // 2  # all chosen, then all rejected
        order = [i for pair in zip(range(half), range(half, 2 * half), strict=True) for i in pair]
        return Work([rows[i] for i in order], [starts[i] for i in order]), int(answers.sum())

    kind, callback = supervised(peer, DPOTrainer, read, mean=True)
    pairs = place.size.pairs // 2
    config = DPOConfig(
        **peer.arguments("dpo", pairs), max_length=None, beta=place.settings.dpo_beta, loss_type="sigmoid",
        disable_dropout=True, precompute_ref_log_probs=True, precompute_ref_batch_size=peer.rows("dpo", pairs),
    )  # fmt: skip
    texts: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for work in works:
        for chosen, rejected, start in zip(work.sequences[::2], work.sequences[1::2], work.starts[::2], strict=True):
            texts["prompt"].append(text_of(chosen[:start]))
            texts["chosen"].append(text_of(chosen[start:]))
            texts["rejected"].append(text_of(rejected[start:]))
    fit(peer, kind, callback, config, "policy", texts)


class ForcedLengths:
    """`generate` of a model, whose row i ends with its lengths[i]-th token: random weights would never stop. A logits
    processor forbids the end before and forces it there; tokens are sampled as usual."""

    def __init__(self, model: Any, lengths: list[list[int]]) -> None:
        from transformers import LogitsProcessorList

        from bench.bench_engine import ForcedStop

        self.prompts: list[list[int]] = []
        self.lengths: list[int] = []
        self.sampled: Tensor = torch.empty(0, 0)
        original, calls = model.generate, iter(lengths)

        def generate(*args: Any, **options: Any) -> Any:
            self.lengths = next(calls)
            self.prompts = real(options["input_ids"], options["attention_mask"])
            force = ForcedStop(self.lengths, options["input_ids"].device, EOS)
            options["logits_processor"] = LogitsProcessorList([force])
            result = original(*args, **options)
            self.sampled = getattr(result, "sequences", result)[:, options["input_ids"].shape[1] :]
            return result

        model.generate = generate

    def done(self) -> tuple[Work, Done]:
        """The last call, with the tokens that it did sample."""
        ends = self.sampled == EOS
        counts = torch.where(ends.any(1), ends.int().argmax(1) + 1, self.sampled.shape[1])
        return Work(self.prompts, lengths=self.lengths), Done(int(counts.sum()))


def group(peer: Peer, algorithm: str) -> None:
    """RLOO and GRPO with a KL penalty, so with a reference model, and a preference model as reward."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    place, works = peer.place, peer.works(algorithm)
    size, s = place.size, place.settings
    policy = peer.model("policy").train()
    forced = ForcedLengths(policy, [work.lengths for work in works])
    answers = size.prompts * size.samples
    options: dict[str, Any] = {
        **peer.arguments(algorithm, answers, s.rl_lr), "num_generations": size.samples, "top_p": 1.0, "top_k": 0,
        "max_completion_length": size.answer[1], "temperature": 1.0, "beta": s.kl_coef, "shuffle_dataset": False,
        "num_iterations": 1, "disable_dropout": True, "log_completions": False, "epsilon": s.clip_coef,
    }  # fmt: skip
    if algorithm == "rloo":
        kind, config = trl.RLOOTrainer, trl.RLOOConfig(**options, normalize_advantages=False)
    else:
        kind = trl.GRPOTrainer
        config = trl.GRPOConfig(**options, loss_type="dapo", scale_rewards="group")
    reader = AutoTokenizer.from_pretrained(place.folder / "pm", padding_side="right")

    def end() -> None:
        work, done = forced.done()
        peer.turns(Work(work.sequences[:: size.samples], lengths=work.lengths), done)

    peer.train(
        kind(
            model=policy, reward_funcs=[peer.model("pm").eval()], reward_processing_classes=[reader], args=config,
            train_dataset=Dataset.from_dict({"prompt": [text_of(ids) for w in works for ids in w.sequences]}),
            processing_class=peer.tokenizer, callbacks=[peer.callback(end)],
        )
    )  # fmt: skip


def ppo(peer: Peer) -> None:
    """Four models: policy, reference, reward and value. (TRL dropped it after 1.12.)"""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    place, works = peer.place, peer.works("ppo")
    size, s = place.size, place.settings
    dtype = peer.inference
    policy = peer.model("policy", dtype).train()
    forced, answers = ForcedLengths(policy, [work.lengths for work in works]), size.prompts * size.samples
    options = peer.arguments("ppo", answers, s.rl_lr)
    options.pop("max_steps")
    config = PPOConfig(
        **options, total_episodes=answers * peer.turns.steps, num_ppo_epochs=s.epochs, num_mini_batches=1,
        local_rollout_forward_batch_size=answers, response_length=size.answer[1],
        stop_token="eos", temperature=1.0, kl_coef=s.kl_coef, num_sample_generations=0, kl_estimator="k1",
        cliprange=s.clip_coef, vf_coef=0.1, gamma=1.0, lam=0.95, whiten_rewards=False,
    )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": [ids for work in works for ids in work.sequences]})
    peer.train(
        PPOTrainer(
            args=config, processing_class=peer.tokenizer, model=policy, ref_model=peer.model("policy", dtype).eval(),
            reward_model=peer.model("pm", dtype).eval(), value_model=peer.model("pm", dtype).train(),
            train_dataset=dataset, eval_dataset=dataset.select(range(2)),
            callbacks=[peer.callback(lambda: peer.turns(*forced.done()))],
        )
    )  # fmt: skip


def generate(peer: Peer) -> None:
    """transformers' generate, all rows at once, left-padded; the forced stop is part of its time, and small."""
    from transformers import GenerationConfig

    model, size = peer.model("policy", peer.inference).eval(), peer.place.size
    works = peer.works("generate")
    forced = ForcedLengths(model, [work.lengths for work in works])
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=size.response[1], pad_token_id=PAD,
                              eos_token_id=EOS)  # fmt: skip
    device = peer.place.device
    peer.turns.start()
    for work in works[: peer.turns.steps]:
        width = max(map(len, work.sequences))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in work.sequences], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in work.sequences], device=device)
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        peer.turns(work, forced.done()[1])


def judge(peer: Peer) -> None:
    """Left-padded batches of questions of about the same length, the logits of the last position only."""
    cpu = peer.place.device.type == "cpu"
    answer = straightforward(peer.model("policy", peer.inference).eval(), CPU_QUESTIONS if cpu else BATCH)
    works = peer.works("judge")
    peer.turns.start()
    for work in works[: peer.turns.steps]:
        probabilities = answer((work.sequences, []))["logprob"][:, 0].exp().tolist()
        peer.turns(work, Done(sum(map(len, work.sequences)), probabilities=probabilities))


RUNS: dict[str, Callable[[Peer], None]] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "rloo": lambda peer: group(peer, "rloo"),
    "grpo": lambda peer: group(peer, "grpo"),
    "ppo": ppo,
    "generate": generate,
    "judge": judge,
}
