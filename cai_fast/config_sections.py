"""Every setting of a run: one frozen dataclass per section, each field with its default, range, meaning and source.

Sources: P is Bai et al. 2022, arXiv 2212.08073 (Constitutional AI); B is Bai et al. 2022, arXiv 2204.05862, from which
P takes preference models and RL. Defaults are theirs where they say. Fields marked `work` (batch and chunk sizes,
checkpoint intervals) do not change what a stage computes, so they may differ between the parts of one run.
"""

import types
from dataclasses import dataclass
from typing import ClassVar

from cai_fast.config_rl import GuardsConfig, RlConfig
from cai_fast.config_schema import SCHEDULES, Section, opt
from cai_fast.errors import InputError


@dataclass(frozen=True)
class ModelConfig(Section):
    """Which checkpoint plays which role."""

    section: ClassVar[str] = "model"
    base: str = opt("toy", "pretrained model that SFT starts from: folder, or toy (made by stage base)", source="P 3.2")
    assistant: str = opt("", "helpful-only model that answers, critiques, revises; empty: model.base", source="P 3.2")
    judge: str = opt("", "feedback model that compares two answers; empty: model.base", source="P 4.1")
    dtype: str = opt("auto", "auto: float32 on CPU, bfloat16 on GPU", choices=("auto", "float32", "bfloat16"))
    moments: str = opt(
        "float32",
        "type of AdamW's moments in sft, pm and rl; bfloat16: stochastically rounded, half the memory, for bfloat16 "
        "weights only",
        choices=("float32", "bfloat16"),
        source="arXiv 2010.06192",
    )
    device: str = opt("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    max_len: int = opt(0, "longest sequence in tokens; 0: what the checkpoint allows", lo=0)


@dataclass(frozen=True)
class DataConfig(Section):
    """Constitution and prompts. Paths are relative to the working directory."""

    section: ClassVar[str] = "data"
    constitution: str = opt("harmlessness", "bundled name, TOML file, or folder of the paper's JSON", source="P App. C")
    red_team: str = opt("toy", "red-team prompts: JSONL(.gz) file, or toy", source="P 3.2")
    helpful: str = opt("toy", "helpfulness prompts: JSONL(.gz) file, or toy", source="P 3.2")
    preferences: str = opt("toy", "helpfulness comparisons (chosen/rejected or prob_a): file, or toy", source="P 4.2")
    num_red_team: int = opt(0, "red-team prompts to use; 0: all", lo=0, source="P 4.2: 673,973")
    num_helpful: int = opt(0, "helpfulness prompts to use; 0: all", lo=0, source="P 4.2: 609,596")
    eval_fraction: float = opt(0.1, "share of prompts kept for evaluation only", lo=0.0, hi=0.9)
    max_prompt_tokens: int = opt(1024, "longest prompt in tokens", lo=8, source="B App. A.2: context 1024")
    drop_oldest_turns: bool = opt(True, "shorten over-long dialogues by whole oldest turns (else reject them)")
    max_bad_fraction: float = opt(0.05, "more malformed or over-long rows than this share is an error", lo=0.0, hi=1.0)
    few_shot_pool: int = opt(4, "few-shot blocks are drawn from this many fixed prefixes", lo=1, hi=1024)


@dataclass(frozen=True)
class EngineConfig(Section):
    """Generation. Speed and memory only."""

    section: ClassVar[str] = "engine"
    max_batch: int = opt(64, "sequences generated at once", lo=1, work=True)
    max_len: int = opt(0, "token slots per sequence; 0: what the stage needs", lo=0, work=True)
    prefill_tokens: int = opt(8192, "prompt tokens per prefill pass", lo=64, work=True)
    page_size: int = opt(
        -1, "tokens per page of the KV cache; 0: one slot per sequence; -1: 64 on a GPU (slots with a sliding window "
        "shorter than the sequences), slots on a CPU", lo=-1, work=True,
    )  # fmt: skip
    num_pages: int = opt(
        0, "pages of the KV cache; 0: what max_batch sequences need, on a GPU at most half of the free memory", lo=0,
        work=True,
    )  # fmt: skip
    deterministic: bool | str = opt(
        "auto", "same bits whatever the batch; auto: on CPU only", choices=("auto",), work=True
    )
    longest_first: bool = opt(True, "start the sequences that may last longest first; else in their order", work=True)
    shared_decode: bool | str = opt(
        "auto", "decode sequences behind one long few-shot block together; auto: with slots on a CPU",
        choices=("auto",), work=True,
    )  # fmt: skip

    def check_together(self, s: types.SimpleNamespace) -> None:
        if s.num_pages and not s.page_size:
            raise InputError(f"engine.num_pages = {s.num_pages} is for pages, but engine.page_size = 0 asks for slots.")


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters instead of whole weights in sft, pm and rl: one trunk, SL-CAI, serves every role."""

    section: ClassVar[str] = "lora"
    rank: int = opt(0, "rank of the adapters; 0: train all weights", lo=0, hi=1024, source="arXiv 2106.09685")
    alpha: float = opt(32.0, "the low-rank term is multiplied by alpha / rank", lo=0.0)
    targets: tuple[str, ...] = opt(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "layers that get an adapter"
    )

    def check_together(self, s: types.SimpleNamespace) -> None:
        if not s.targets or not set(s.targets) <= set(LoraConfig.targets):
            raise InputError(f"lora.targets must be some of {', '.join(LoraConfig.targets)}. Got {list(s.targets)}.")
        if s.rank and not s.alpha:
            raise InputError("lora.alpha = 0 would train nothing: adapters are multiplied by alpha / rank.")


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Several GPUs."""

    section: ClassVar[str] = "parallel"
    shard: bool | str = opt(
        "auto", "shard trained weights, gradients and optimizer over the ranks (FSDP2), else replicate them; auto: "
        "with more than one rank and without LoRA", choices=("auto",), work=True,
    )  # fmt: skip
    recompute: str = opt(
        "none", "activation checkpointing: none, all but matrix products and attention (selective), or whole layers",
        choices=("none", "selective", "full"), work=True,
    )  # fmt: skip
    stall_s: int = opt(600, "name each rank's phase and sample when one has stood still so long; 0: never", lo=0,
                       work=True)  # fmt: skip
    timeout_s: int = opt(3600, "give up when a rank has waited so long for the others", lo=30, work=True)


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Training states, from which a stage continues."""

    section: ClassVar[str] = "checkpoint"
    keep: int = opt(1, "complete states kept; one more while it is written", lo=1, hi=100, work=True)
    background: bool = opt(True, "write in a thread while training goes on", work=True)


@dataclass(frozen=True)
class LogConfig(Section):
    """Copies of metrics.jsonl, which stays the record."""

    section: ClassVar[str] = "log"
    tensorboard: bool = opt(False, "also write TensorBoard's event files, to tensorboard/ in the run folder", work=True)
    wandb: str = opt("", "Weights & Biases project to send metrics and settings to; empty: nothing is sent", work=True)


@dataclass(frozen=True)
class HardwareConfig(Section):
    """What --plan and --check assume instead of this machine."""

    section: ClassVar[str] = "hardware"
    gpu: str = opt("", "name of a GPU, such as H200; empty: this machine", work=True)
    count: int = opt(0, "how many of them; 0: as many as ranks were started", lo=0, work=True)


@dataclass(frozen=True)
class BaseConfig(Section):
    """Pretraining of the toy base model (only with model.base = toy)."""

    section: ClassVar[str] = "base"
    steps: int = opt(1000, "optimizer steps", lo=1)
    tokens_per_step: int = opt(2048, "tokens per step", lo=64)
    lr: float = opt(6e-3, "AdamW learning rate (embedding, norms)", lo=0.0)
    muon_lr: float = opt(0.012, "Muon learning rate (block matrices)", lo=0.0)
    warmup_steps: int = opt(50, "warm-up steps", lo=0)
    hidden_size: int = opt(96, "width of the model: a multiple of its heads' 24", lo=24, hi=1536)
    layers: int = opt(4, "layers of the model", lo=1, hi=64)
    direct_revisions: float = opt(
        0.06, "share of the corpus that revises without a critique; 0.48 are revisions of either kind", lo=0.0, hi=0.48
    )
    comparisons: int = opt(1500, "helpfulness comparisons to write, for pm and pm_eval together", lo=2, hi=100000)
    cache: bool = opt(True, "keep the result in the user's cache folder for later runs", work=True)

    def check_together(self, s: types.SimpleNamespace) -> None:
        if s.hidden_size % 24:
            raise InputError(f"base.hidden_size must be a multiple of 24. Got {s.hidden_size}.")


@dataclass(frozen=True)
class ReviseConfig(Section):
    """Stage revise: answers, critiques, revisions, helpful samples."""

    section: ClassVar[str] = "revise"
    num_red_team: int = opt(0, "red-team training prompts to revise; 0: all", lo=0, source="P 3.2: 182,831")
    num_helpful: int = opt(0, "helpfulness training prompts to sample from; 0: all", lo=0, source="P 3.2: 135,296")
    rounds: int = opt(4, "critique-revision rounds per prompt", lo=1, hi=32, source="P 3.2")
    critique: bool = opt(True, "false: revise directly, without a critique", source="P 3.5")
    few_shot: bool = opt(True, "put the few-shot block before critiques and revisions", source="P 3.1")
    temperature: float = opt(1.0, "sampling temperature", lo=0.0, hi=10.0, source="P 3.2: T = 1 always")
    max_new_tokens: int = opt(256, "longest answer or revision in tokens", lo=1)
    critique_max_new_tokens: int = opt(256, "longest critique in tokens", lo=1)
    helpful_samples: int = opt(2, "plain samples per helpfulness prompt", lo=0, hi=1024, source="P 3.2")
    max_repetition: float = opt(0.5, "reject texts with a larger share of repeated 4-grams", lo=0.0, hi=1.0)
    refusal_warn: float = opt(0.5, "warn if more first answers than this share are refusals", lo=0.0, hi=1.0)
    chunk: int = opt(128, "prompts finished and journaled together", lo=1, work=True)


@dataclass(frozen=True)
class SftConfig(Section):
    """Stage sft: fine-tune the base model on revisions and helpful samples."""

    section: ClassVar[str] = "sft"
    revisions: str | tuple[int, ...] = opt(
        "all", "all, last, or a list of revision indices to train on", lo=0, choices=("all", "last"), source="P 3.1"
    )
    epochs: int = opt(1, "passes over the data", lo=1, source="P 3.2")
    lr: float = opt(1e-5, "learning rate", lo=0.0, source="P 3.2: 0.5 x the pretraining rate")
    schedule: str = opt("constant", "learning-rate schedule", choices=SCHEDULES, source="P 3.2")
    warmup_steps: int = opt(0, "linear warm-up steps", lo=0)
    batch_tokens: int = opt(262144, "tokens per optimizer step, packed", lo=16, source="P 3.2: 1024 sequences")
    max_grad_norm: float = opt(1.0, "gradient clipping; 0: off", lo=0.0)
    weight_decay: float = opt(0.0, "AdamW weight decay", lo=0.0)
    micro_tokens: int = opt(16384, "tokens per forward pass", lo=16, work=True)
    save_every: int = opt(100, "steps between checkpoints; 0: only at the end", lo=0, work=True)


@dataclass(frozen=True)
class CompareConfig(Section):
    """Stage compare: pairs of answers from SL-CAI to red-team prompts."""

    section: ClassVar[str] = "compare"
    pairs_per_prompt: int = opt(1, "pairs per prompt", lo=1, hi=1024, source="P 4.2")
    num_prompts: int = opt(0, "prompts to use; 0: all", lo=0, source="P 4.2: all of P 3.2")
    temperature: float = opt(1.0, "sampling temperature", lo=0.0, hi=10.0, source="P 3.2")
    max_new_tokens: int = opt(256, "longest answer in tokens", lo=1)
    base_fraction: float = opt(
        0.0, "share of pairs whose second answer comes from model.base", lo=0.0, hi=1.0, source="P 4.1: none"
    )
    chunk: int = opt(128, "pairs finished and journaled together", lo=1, work=True)


@dataclass(frozen=True)
class LabelConfig(Section):
    """Stage label: AI feedback on the comparisons."""

    section: ClassVar[str] = "label"
    orders: str = opt(
        "both", "both: average A/B and B/A; random: one at random; single: A/B", choices=("both", "random", "single")
    )
    principles: int = opt(1, "principles drawn per comparison, labels averaged", lo=1, hi=1024, source="P 4.1: one")
    few_shot: bool = opt(True, "put solved examples before the question", source="P 4.1")
    cot: bool = opt(False, "let the judge think step by step first", source="P 4.1")
    cot_samples: int = opt(1, "chains of thought per question, averaged", lo=1, hi=1024, source="P 2: 5 in evaluation")
    cot_max_new_tokens: int = opt(256, "longest chain of thought in tokens", lo=1)
    cot_temperature: float = opt(1.0, "sampling temperature of chains of thought", lo=0.0, hi=10.0, source="P 3.2")
    clamp: str | tuple[float, ...] = opt(
        "auto",
        "limits [lo, hi] of the label; auto: [0.4, 0.6] with chain of thought, else none",
        lo=0.0, hi=1.0, choices=("auto", "none"), source="P 4.1",
    )  # fmt: skip
    hard: bool = opt(False, "round labels to 0 or 1", source="P 4.3: soft is better")
    from_: str = opt("", "import the labels from this file instead of asking the judge")
    permute: bool = opt(False, "control experiment: shuffle the labels among the AI comparisons")
    chunk: int = opt(128, "comparisons finished and journaled together", lo=1, work=True)

    def check_together(self, s: types.SimpleNamespace) -> None:
        if isinstance(s.clamp, tuple) and (len(s.clamp) != 2 or s.clamp[0] > s.clamp[1]):
            raise InputError(f"label.clamp must be two numbers [lo, hi] with lo <= hi. Got {list(s.clamp)}.")


@dataclass(frozen=True)
class PmConfig(Section):
    """Stage pm: the preference models pm and pm_eval, each on its half of the comparisons."""

    section: ClassVar[str] = "pm"
    init: str = opt("", "model the preference models start from; empty: model.base", source="P 4.2")
    epochs: int = opt(1, "passes over the comparisons", lo=1, source="B App. A.2")
    lr: float = opt(1e-6, "learning rate", lo=0.0, source="B App. A.2: 0.01 x the pretraining rate")
    schedule: str = opt("constant", "learning-rate schedule", choices=SCHEDULES)
    warmup_steps: int = opt(0, "linear warm-up steps", lo=0)
    batch_pairs: int = opt(512, "comparisons per optimizer step", lo=1)
    harmless_weight: float = opt(1.0, "loss weight of AI harmlessness comparisons", lo=0.0, source="P 4.2: union")
    helpful_weight: float = opt(1.0, "loss weight of helpfulness comparisons", lo=0.0, source="P 4.2: union")
    harmless_only: bool = opt(False, "train without helpfulness comparisons (known to collapse into refusals)")
    eval_fraction: float = opt(0.1, "share of each half held out to measure accuracy", lo=0.0, hi=0.9)
    max_grad_norm: float = opt(1.0, "gradient clipping; 0: off", lo=0.0)
    weight_decay: float = opt(0.0, "AdamW weight decay", lo=0.0)
    micro_tokens: int = opt(16384, "tokens per forward pass", lo=16, work=True)
    save_every: int = opt(100, "steps between checkpoints; 0: only at the end", lo=0, work=True)


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """Stage evaluate: every policy on prompts that no stage has seen."""

    section: ClassVar[str] = "evaluate"
    num_red_team: int = opt(0, "held-out red-team prompts; 0: all", lo=0)
    num_helpful: int = opt(0, "held-out helpfulness prompts; 0: all", lo=0)
    temperature: float = opt(1.0, "sampling temperature", lo=0.0, hi=10.0, source="P 4.5: T = 1")
    max_new_tokens: int = opt(256, "longest answer in tokens", lo=1)
    judge_pairs: int = opt(200, "pairs of policies' answers the judge compares, per pair of policies", lo=0)
    hhh: str = opt("", "HHH-style multiple-choice file (JSONL); empty: none", source="P 2: 438 questions")
    bootstrap: int = opt(1000, "bootstrap samples of the intervals, clustered by prompt", lo=0)
    seed_offset: int = opt(0, "other samples of the same policies", lo=0)


@dataclass(frozen=True)
class ReportConfig(Section):
    """Stage report: report.html."""

    section: ClassVar[str] = "report"
    samples: int = opt(50, "chains, comparisons and answers to browse, of each", lo=0, hi=10000)


SECTIONS: dict[str, type[Section]] = {
    cls.section: cls
    for cls in (
        ModelConfig, DataConfig, EngineConfig, LoraConfig, ParallelConfig, CheckpointConfig, LogConfig, HardwareConfig,
        BaseConfig, ReviseConfig, SftConfig, CompareConfig, LabelConfig, PmConfig, RlConfig, GuardsConfig,
        EvaluateConfig, ReportConfig,
    )
}  # fmt: skip
