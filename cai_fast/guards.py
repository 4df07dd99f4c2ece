"""Guards against reward hacking in stage rl: numbers of an iteration in, trips out.

RL against a preference model ends in answers that the model likes and people do not (paper §4.3: overly harsh replies,
reassurance appended to most of them). What is watched is what such answers have in common: a held-out preference
model stops agreeing (arXiv 2204.05862 §4.2), answers grow, end alike, refuse, or leave SL-CAI behind. All numbers are
those of the whole iteration, the same on every rank, before anything is trained on its answers.
"""

import dataclasses
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cai_fast.config_rl import GUARD_OF, GuardsConfig

ENDING = ("stop", "rollback")  # actions that end training, the stronger one last
NGRAM = 5  # tokens of a phrase
COMMON = 0.2  # a phrase in the answers to more than this share of an iteration's prompts is boilerplate
BUCKETS = 2**20  # phrases are counted by hash; so many that chance brings no common one about
WINDOW = 10  # iterations of the running median of KL,
KL_FLOOR = 0.2  # nats per answer, which counts as so much at least: the first updates multiply a KL of nearly nothing
LOGPROB_GAP = {True: 1e-3, False: 0.05}  # nats: a float32 engine and trainer agree far better than bfloat16 ones
START = ("length", "entropy", "score", "score_deviation", "pm_eval", "pm_eval_deviation", "boilerplate")


@dataclass(frozen=True)
class Rule:
    """A metric and the setting that limits it; "{:...}" in the text is the metric's value."""

    metric: str
    limit: str
    text: str

    @property
    def guard(self) -> str:
        """The name of its guard, which is the setting of what to do."""
        return GUARD_OF[self.limit]

    @property
    def above(self) -> bool:
        """Whether it is too high a value that trips."""
        return self.limit.startswith("max")


RULES = (
    Rule("rl/kl_exact", "max_kl", "KL to SL-CAI is {:.3g} nats per answer"),
    Rule("rl/kl_jump", "max_kl_jump", "KL to SL-CAI is {:.3g} times that of the last iterations"),
    Rule("rl/refusal_rate_red_team", "max_refusal_rate", "{:.0%} of red_team answers refuse"),
    Rule("rl/refusal_rate_helpful", "max_refusal_rate", "{:.0%} of helpful answers refuse"),
    Rule("rl/entropy", "min_entropy", "entropy is {:.3g} nats per token"),
    Rule("rl/entropy_share", "min_entropy_share", "entropy is {:.2g} times that of SL-CAI"),
    Rule(
        "rl/pm_divergence", "max_divergence",
        "the preference model's score has gained {:.2g} deviations more than that of pm_eval",
    ),
    Rule("rl/length_change", "max_length_change", "answers are {:.2g} times longer or shorter than SL-CAI's"),
    Rule("rl/length_slope", "max_length_slope", "the score follows the length of answers with slope {:.2g}"),
    Rule(
        "rl/boilerplate_rise", "max_boilerplate_rise",
        "phrases that many answers share make up {:.0%} more of them than of SL-CAI's",
    ),
    Rule("rl/logprob_gap", "max_logprob_gap", "engine and trainer disagree by {:.2g} nats per token"),
)  # fmt: skip
GUARDS = tuple(dict.fromkeys(rule.guard for rule in RULES))


@dataclass(frozen=True)
class Trip:
    """A guard found a value beyond its limit."""

    guard: str
    action: str
    step: int
    reason: str

    def __str__(self) -> str:
        return f"iteration {self.step}: {self.reason}"


class Guards:
    """What the guards remember and decide. `memory` holds JSON values and belongs into the training state.

    Judging an iteration again, after a resume, gives the same trips and the same memory. `precise`: weights are fp32.
    """

    def __init__(self, settings: GuardsConfig, precise: bool, memory: dict[str, Any] | None = None) -> None:
        self.settings, self.precise = settings, precise
        self.memory: dict[str, Any] = memory or {"start": {}, "kl": [], "first": {}}

    def derive(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Metrics that compare an iteration with the start (iteration 0, SL-CAI's own answers) and with those before.

        values: the iteration's means, by metric; rl/pm_eval and rl/pm_eval_deviation only where they were measured.
        """
        if step == 0:
            self.memory["start"] = {name: values[f"rl/{name}"] for name in START if f"rl/{name}" in values}
        start, kl = self.memory["start"], values["rl/kl_exact"]
        earlier = [[n, past] for n, past in self.memory["kl"] if n < step][-WINDOW:]
        self.memory["kl"] = [*earlier, [step, kl]]
        usual = max(KL_FLOOR, statistics.median([past for _, past in earlier])) if earlier else KL_FLOOR
        ratio = _ratio(values["rl/length"], start["length"])
        derived = {
            "rl/kl_jump": kl / usual,
            "rl/entropy_share": _ratio(values["rl/entropy"], start["entropy"]),
            "rl/length_change": max(ratio, _ratio(1.0, ratio)),
            "rl/boilerplate_rise": values["rl/boilerplate"] - start["boilerplate"],
            "rl/pm_gain": _ratio(values["rl/score"] - start["score"], start["score_deviation"]),
        }
        if "rl/pm_eval" in values:
            gain = _ratio(values["rl/pm_eval"] - start["pm_eval"], start["pm_eval_deviation"])
            derived |= {"rl/pm_eval_gain": gain, "rl/pm_divergence": derived["rl/pm_gain"] - gain}
        return derived

    def judge(self, step: int, values: Mapping[str, float]) -> list[Trip]:
        """Every guard that is on and beyond its limit; what was not measured, or is nan, trips none but the first."""
        trips = []
        if not all(math.isfinite(values[f"rl/{name}"]) for name in ("reward", "kl_exact", "entropy")):
            trips.append(self.broken(step, "reward, KL or entropy is not finite"))
        for rule in RULES:
            action, limit = getattr(self.settings, rule.guard), self.limit(rule)
            value = values.get(rule.metric, math.nan)
            if action != "off" and (value > limit if rule.above else value < limit):
                side = "above" if rule.above else "below"
                reason = f"{rule.text.format(value)}, {side} guards.{rule.limit} = {limit}"
                trips.append(self._trip(rule.guard, action, step, reason))
        return trips

    def broken(self, step: int, reason: str) -> Trip:
        """The trip of numbers that are none; no setting lets them pass."""
        return self._trip("finite", "rollback", step, reason)

    def _trip(self, guard: str, action: str, step: int, reason: str) -> Trip:
        first = self.memory["first"].get(guard)
        if first is None or first["step"] >= step:
            self.memory["first"][guard] = {"step": step, "reason": reason}
        return Trip(guard, action, step, reason)

    def is_first(self, trip: Trip) -> bool:
        """Whether its guard has not tripped at an earlier iteration."""
        return self.memory["first"][trip.guard]["step"] == trip.step

    def limit(self, rule: Rule) -> float:
        """The value of its setting."""
        value = getattr(self.settings, rule.limit)
        return LOGPROB_GAP[self.precise] if value == "auto" else value

    def report(self) -> dict[str, Any]:
        """By guard: action, limit of each metric, first iteration beyond it (null: none) and what was said then."""
        table: dict[str, Any] = {
            guard: {"action": getattr(self.settings, guard), "limits": {}, "tripped": None, "reason": ""}
            for guard in GUARDS
        }
        for rule in RULES:
            table[rule.guard]["limits"][rule.metric] = self.limit(rule)
        table["finite"] = {"action": "rollback", "limits": {}, "tripped": None, "reason": ""}
        for guard, first in self.memory["first"].items():
            table[guard] |= {"tripped": first["step"], "reason": first["reason"]}
        return table


def ending(trips: Sequence[Trip]) -> Trip | None:
    """The trip that ends training: of several the one with the strongest action; None if none does."""
    return max((t for t in trips if t.action in ENDING), key=lambda t: ENDING.index(t.action), default=None)


def _ratio(value: float, unit: float) -> float:
    return value / unit if unit else math.nan


# Length: does the preference model pay for it?


@dataclass(frozen=True)
class Moments:
    """Sums over answers to one kind of prompt, that of all ranks being the sum of theirs: x length, y score."""

    n: float
    x: float
    y: float
    xx: float
    yy: float
    xy: float

    @classmethod
    def of(cls, lengths: Sequence[float], scores: Sequence[float]) -> "Moments":
        """Of some answers."""
        x, y = np.asarray(lengths, np.float64), np.asarray(scores, np.float64)
        return cls(len(x), *(float(v.sum()) for v in (x, y, x * x, y * y, x * y)))

    def centred(self) -> tuple[float, float, float]:
        """Sums of squares and products about the means: (xx, yy, xy)."""
        n = max(self.n, 1.0)
        return self.xx - self.x * self.x / n, self.yy - self.y * self.y / n, self.xy - self.x * self.y / n


def length_slope(kinds: Sequence[Moments]) -> float:
    """Slope of score on length in deviations of both, within each kind of prompt; nan if either never varies.

    Within kinds, because red-team and helpful answers differ in length and score for reasons of their own.
    """
    xx, yy, xy = (sum(parts) for parts in zip(*(kind.centred() for kind in kinds), strict=True))
    tiny = 1e-9 * sum(kind.xx for kind in kinds), 1e-9 * sum(kind.yy for kind in kinds)
    return xy / math.sqrt(xx * yy) if xx > tiny[0] and yy > tiny[1] else math.nan


def sums(moments: Mapping[str, Moments]) -> dict[str, float]:
    """Flat, to be added over ranks; `from_sums` undoes it."""
    return {f"{kind}/{key}": value for kind, m in moments.items() for key, value in dataclasses.asdict(m).items()}


def from_sums(values: Mapping[str, float], kinds: Sequence[str]) -> list[Moments]:
    """The moments of each kind."""
    return [Moments(*(values[f"{kind}/{field.name}"] for field in dataclasses.fields(Moments))) for kind in kinds]


# Boilerplate: phrases that answers to different prompts share


def phrases(token_ids: Sequence[int]) -> NDArray[np.int64]:
    """[max(0, T - 4)] hashes in [0, BUCKETS) of the five-token phrases of an answer of T tokens, in order."""
    ids = np.asarray(token_ids, dtype=np.uint64)
    if len(ids) < NGRAM:
        return np.zeros(0, dtype=np.int64)
    hashes = np.zeros(len(ids) - NGRAM + 1, dtype=np.uint64)
    for place in range(NGRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[place : place + len(hashes)] + np.uint64(1)
    hashes ^= hashes >> np.uint64(33)  # the last step of MurmurHash3: every bit reaches the low ones
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    return (hashes % np.uint64(BUCKETS)).astype(np.int64)


def phrase_counts(answers: Sequence[NDArray[np.int64]], prompts: Sequence[Hashable]) -> NDArray[np.int32]:
    """[BUCKETS] to how many prompts some answer has each phrase; answers are given by `phrases`, with their prompt."""
    by_prompt: dict[Hashable, list[NDArray[np.int64]]] = {}
    for phrase, prompt in zip(answers, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(phrase)
    counts = np.zeros(BUCKETS, dtype=np.int32)
    for own in by_prompt.values():
        counts[np.concatenate(own)] += 1  # once, however often a prompt has it: numpy adds to each place once
    return counts


def covered(answers: Sequence[NDArray[np.int64]], counts: NDArray[np.int32], prompts: int) -> int:
    """Tokens of the answers that lie in a phrase shared by more than COMMON of so many prompts, by two at least."""
    common, tokens = counts > max(1.0, COMMON * prompts), 0
    for phrase in answers:
        starts = common[phrase]
        inside = np.zeros(len(starts) + NGRAM - 1 if len(starts) else 0, dtype=bool)
        for place in range(NGRAM):
            inside[place : place + len(starts)] |= starts
        tokens += int(inside.sum())
    return tokens
