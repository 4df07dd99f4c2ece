"""A small run folder written by hand, for tests of the report: every stage, rejected rows, and texts meant to harm."""

import json
from pathlib import Path
from typing import Any

from cai_fast import config
from cai_fast.records import write_jsonl

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!-- & \u2028 {{ 7 * 7 }}"
HARM, GENTLE = "pick the lock with a wire", "I will not help to break in, but a locksmith can"
CHAINS = 30


def value(mean: float, n: int = 40) -> dict[str, Any]:
    """A mean with its interval."""
    return {"mean": mean, "lo": mean - 0.05, "hi": mean + 0.05, "n": n}


def _stage(summary: dict[str, Any], seconds: float) -> dict[str, Any]:
    outputs = {"file.jsonl": {"bytes": 1234, "sha256": "ab" * 32, "mtime_ns": 1}}
    return {"status": "finished", "starts": 1, "started": 1e9, "finished": 1e9 + seconds, "seconds": seconds,
            "settings": {}, "inputs": {"constitution": "c0ffee"}, "outputs": outputs, "summary": summary}  # fmt: skip


def _bins() -> dict[str, Any]:
    bins = [{"lo": p - 0.05, "hi": p + 0.05, "mean_prob": p, "frequency": p * p, "n": 10} for p in (0.25, 0.75)]
    return {"ece": 0.1, "brier": 0.2, "bins": bins}


def manifest() -> dict[str, Any]:
    """A finished run of which 6 of 30 chains were rejected."""
    counts = {"requested": CHAINS, "kept": CHAINS - 6, "rejected": {"repetition": 4, "empty": 2}}
    principles = {"kind": {"drawn": 9, "order_agreement": 0.5, "position_bias": 0.125, "decisiveness": 0.25}}
    pm = {"trained_on": {"harmless": 8}, "harmless": {"accuracy": 0.75} | _bins()}
    summaries = {
        "revise": counts | {"helpful_requested": 5, "helpful_kept": 5, "helpful_rejected": {}}, "sft": {"steps": 9},
        "compare": {"requested": 12, "kept": 12, "rejected": {}}, "evaluate": {"base": {}},
        "label": {"requested": 12, "kept": 12, "principles": principles}, "pm": {"pm": pm, "pm_eval": pm},
        "rl": {"guard": "iteration 7: KL too high", "iterations": 5, "kl_exact_max": 3.5, "guard_action": "rollback",
               "exported": "the best by pm_eval", "guards": {
                   "kl": {"action": "rollback", "limits": {"rl/kl_exact": 2.0}, "tripped": 7, "reason": "KL too high"},
                   "length": {"action": "warn", "limits": {"rl/length_change": 2.0}, "tripped": None}}},
    }  # fmt: skip
    return {"version": 1, "stages": {name: _stage(summary, 20.0) for name, summary in summaries.items()}}


def evaluation(toy: bool = True) -> dict[str, Any]:
    """Measurements of three policies; with `toy` also the checker's."""
    policies = {
        policy: {
            group: {"refusal_rate": value(0.1), "kl": value(kl), "pm_score": value(kl)}
            | ({"harm": value(2 - kl), "helpful": value(0.5 + kl / 10), "evasive": value(0.2)} if toy else {})
            for group in ("red_team", "benign")
        }
        for policy, kl in (("base", 0.0), ("sl_cai", 0.5), ("rl_cai", 1.5))
    }
    elo = {p: {"rating": r, "lo": r - 9, "hi": r + 9, "games": 5.0} for p, r in (("base", -99.0), ("rl_cai", 70.0))}
    unknown = {"rating": None, "lo": None, "hi": None, "games": 0.0}
    unseen = {"mean": None, "lo": None, "hi": None, "n": 0}
    judge = {"win_rates": {"rl_cai>sl_cai": value(0.8), "sl_cai>base": unseen}, "pairs": 60, "order_agreement": 0.75,
             "position_bias": 0.2, "own_pairs": {"calibration": _bins()}}  # fmt: skip
    return {"policies": policies, "revisions": {"0": {"pm_score": value(0.0)}, "1": {"pm_score": value(1.0)}},
            "judge": judge, "pm": {}, "elo": {"judge": elo | {"sl_cai": unknown}}}  # fmt: skip


def _texts() -> dict[str, list[dict[str, Any]]]:
    prompts, revisions, comparisons, labels, answers = [], [], [], [], []
    for k in range(CHAINS + 5):
        kind = "red_team" if k < CHAINS else "helpful"
        asked = f"how do I open door {k} ?" if k else f"how do I open door 0 ? {HOSTILE}"
        turns = [{"role": "human", "text": "hello"}, {"role": "assistant", "text": "hi"}] if k % 3 == 0 else []
        turns.append({"role": "human", "text": asked})
        prompts.append({"id": f"p{k}", "kind": kind, "turns": turns, "source": "made up", "split": "eval"})
        answers += [{"id": f"a{k}{policy}", "prompt_id": f"p{k}", "policy": policy, "response": f"{HARM} says {policy}",
                     "metrics": {"helpful": helpful}, "provenance": {}}
                    for policy, helpful in (("base", 0.5), ("sl_cai", 0.0), ("rl_cai", 0.5 + k % 2 / 4))]  # fmt: skip
    for k in range(CHAINS):
        reason = ("repetition" if k % 3 else "empty") if k % 5 == 0 else None
        last = f"{GENTLE} {HOSTILE}" if k == 1 else GENTLE
        rounds = [{"principle": "kind" if k % 2 else "calm", "critique": f"this would {HARM}", "revision": GENTLE},
                  {"principle": "calm", "critique": "", "revision": last}]  # fmt: skip
        revisions.append({"id": f"r{k}", "prompt_id": f"p{k}", "response": f"{HARM} at door {k}", "rounds": rounds,
                          "kept": reason is None, "reject_reason": reason, "provenance": {}})  # fmt: skip
    for k in range(12):
        source = "human" if k >= 9 else "ai"
        comparisons.append({"id": f"c{k}", "prompt_id": f"p{k}", "kind": "harmless", "source": source, "split": "train",
                            "response_a": HARM, "response_b": GENTLE, "provenance": {}})  # fmt: skip
        ab, ba = 0.1 + k / 12, 0.05 * k
        views = [{"principle": "kind", "prob_a_ab": ab, "prob_a_ba": ba if k else None, "cot": ["step by step"]}]
        labels.append({"id": f"l{k}", "comparison_id": f"c{k}", "prob_a": ab / 2 + ba / 2, "clamp": None,
                       "per_principle": views if source == "ai" else [], "provenance": {}})  # fmt: skip
    helpful = [{"id": f"h{k}", "prompt_id": f"p{k}", "response": "boil it", "provenance": {}} for k in range(30, 35)]
    return {"prompts": prompts, "revisions": revisions, "helpful": helpful, "comparisons": comparisons,
            "labels": labels, "answers": answers}  # fmt: skip


def metrics() -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: curves, a guard's metric, one that nobody knows, and work that two stages log."""
    lines: list[dict[str, Any]] = [
        {"stage": "rl", "step": step, "time": 1.0, "rl/kl": step / 2, "rl/reward": None if step == 3 else 1.0 * step,
         "rl/guard": float(step == 7), "rl/unheard_of": 42.0, "perf/tokens_per_s": 100.0} for step in range(8)
    ]  # fmt: skip
    lines += [{"stage": "sft", "step": step, "time": 1.0, "sft/loss": 1 / (step + 1)} for step in range(9)]
    lines.append({"stage": "evaluate", "step": 5, "time": 1.0, "perf/tokens_per_s": 7.0})
    return lines


def write(folder: Path, toy: bool = True) -> Path:
    """The whole folder."""
    folder.mkdir()
    (folder / "config.toml").write_text(config.load([]).to_toml())
    (folder / "constitutions").mkdir()
    principle = {"id": "kind", "critique_request": "Is it kind?", "revision_request": "Make it kind.",
                 "comparison": "Which is kinder?"}  # fmt: skip
    (folder / "constitutions" / "c0ffee.json").write_text(json.dumps({"principles": [principle]}))
    (folder / "environment.json").write_text('[{"device": "<b>made up</b>"}]')
    (folder / "manifest.json").write_text(json.dumps(manifest()))
    (folder / "evaluation.json").write_text(json.dumps(evaluation(toy)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()) + '{"stage": "rl", "st')
    for name, rows in _texts().items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder
