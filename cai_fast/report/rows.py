"""The rows that the page lets its reader browse: chains, comparisons and answers, a few of each sort.

Files are read line by line, twice: what is drawn is chosen by place, so a run of any size costs little memory.
"""

from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from cai_fast.inputs import parse_json
from cai_fast.records import Comparison, Helpful, Label, Prompt, Revision, Turn
from cai_fast.report.compare import paired

Row = dict[str, Any]


def _lines(path: Path) -> Iterator[Row]:
    if path.is_file():
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield parse_json(line, f"{path}, line {number}")


def spread(groups: dict[Hashable, list[int]], count: int) -> list[int]:
    """Up to `count` of the places that stand in `groups`, as equally from each as there are, at even distances."""
    chosen, left = [], count
    for number, places in enumerate(sorted(groups.values(), key=len)):
        share = min(len(places), left // (len(groups) - number))
        chosen += [places[i * len(places) // share] for i in range(share)]
        left -= share
    return sorted(chosen)


def sample(path: Path, count: int, group: Callable[[Row], Hashable]) -> tuple[list[Row], int]:
    """Up to `count` rows of a file, spread over the groups that `group` names, and how many rows there are."""
    groups: dict[Hashable, list[int]] = {}
    total = 0
    for total, row in enumerate(_lines(path), 1):
        groups.setdefault(group(row), []).append(total - 1)
    chosen = set(spread(groups, count))
    return [row for place, row in enumerate(_lines(path)) if place in chosen], total


def with_ids(path: Path, wanted: set[str], key: str = "id") -> dict[str, Row]:
    """Rows whose `key` is wanted, by it."""
    return {row[key]: row for row in _lines(path) if row[key] in wanted} if wanted else {}


def _turns(prompt: Prompt) -> list[list[str]]:
    return [[turn.role, turn.text] for turn in prompt.turns]


def _prompts(folder: Path, rows: list[Row]) -> dict[str, Prompt]:
    """The rows' prompts; one that is not on file is taken for a red-team prompt, so that its answers stay hidden."""
    missing = (Turn("human", "(not in prompts.jsonl)"),)
    unknown = {row["prompt_id"]: Prompt(row["prompt_id"], "red_team", missing, "", "train") for row in rows}
    found = with_ids(folder / "prompts.jsonl", set(unknown))
    return unknown | {key: Prompt.from_json(row, "prompts.jsonl") for key, row in found.items()}


def chains(folder: Path, count: int) -> dict[str, Any]:
    """Chains with their critiques and revisions, rejected ones as well as kept, and plain helpful answers."""
    revised, total = sample(folder / "revisions.jsonl", count, lambda row: row["reject_reason"])
    plain, more = sample(folder / "helpful.jsonl", min(count, max(1, count // 5)), lambda row: None)
    prompts, rows = _prompts(folder, revised + plain), []
    for row in revised:
        chain = Revision.from_json(row, "revisions.jsonl")
        prompt, steps = prompts[chain.prompt_id], [[r.principle, r.critique, r.revision] for r in chain.rounds]
        rows.append({"id": chain.id, "kind": prompt.kind, "turns": _turns(prompt), "response": chain.response,
                     "rounds": steps, "kept": chain.kept, "reason": chain.reject_reason})  # fmt: skip
    for row in plain:
        answer = Helpful.from_json(row, "helpful.jsonl")
        prompt = prompts[answer.prompt_id]
        rows.append({"id": answer.id, "kind": prompt.kind, "turns": _turns(prompt), "response": answer.response,
                     "rounds": [], "kept": True, "reason": None})  # fmt: skip
    return {"rows": rows, "total": total + more}


def comparisons(folder: Path, count: int) -> dict[str, Any]:
    """Labelled comparisons by source; the judged ones with the probability in either order."""
    differ = {row["comparison_id"]: _orders_differ(row) for row in _lines(folder / "labels.jsonl")}
    drawn, total = sample(folder / "comparisons.jsonl", count, lambda row: (row["source"], differ.get(row["id"])))
    labels = with_ids(folder / "labels.jsonl", {row["id"] for row in drawn}, "comparison_id")
    prompts, rows = _prompts(folder, drawn), []
    for row in drawn:
        pair, found = Comparison.from_json(row, "comparisons.jsonl"), labels.get(row["id"])
        label = Label.from_json(found, "labels.jsonl") if found else None
        prompt, views = prompts[pair.prompt_id], label.per_principle if label else ()
        rows.append({
            "id": pair.id, "kind": prompt.kind, "about": pair.kind, "source": pair.source, "split": pair.split,
            "turns": _turns(prompt), "a": pair.response_a, "b": pair.response_b,
            "prob": _short(label.prob_a) if label else None, "clamp": label.clamp if label else None,
            "views": [[v.principle, _short(v.prob_a_ab), _short(v.prob_a_ba), list(v.cot)] for v in views],
        })  # fmt: skip
    return {"rows": rows, "total": total}


def _orders_differ(label: Row) -> bool:
    """Whether some principle made the judge prefer one answer when asked A/B and the other when asked B/A."""
    views = [(view["prob_a_ab"], view["prob_a_ba"]) for view in label["per_principle"]]
    return any(None not in view and (view[0] > 0.5) != (view[1] > 0.5) for view in views)


def answers(folder: Path, count: int) -> dict[str, Any]:
    """What every policy answered to the same held-out prompt: up to `count` prompts."""
    by_prompt: dict[str, dict[str, str]] = {}
    for row in _lines(folder / "answers.jsonl"):
        by_prompt.setdefault(row["prompt_id"], {})[row["policy"]] = row["response"]
    prompts = list(_prompts(folder, [{"prompt_id": key} for key in by_prompt]).values())
    groups: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt.kind, []).append(place)
    rows = [
        {"id": p.id, "kind": p.kind, "turns": _turns(p), "answers": list(by_prompt[p.id].items())}
        for p in (prompts[place] for place in spread(groups, count))
    ]
    return {"rows": rows, "total": len(prompts)}


def change(folder: Path, metric: str, kind: str, first: str, second: str) -> Row:
    """`paired` of a metric's values of two policies, over the prompts of one kind that both answered."""
    kinds = {row["id"]: row["kind"] for row in _lines(folder / "prompts.jsonl") if row["split"] == "eval"}
    found: dict[str, dict[str, float]] = {first: {}, second: {}}
    for row in _lines(folder / "answers.jsonl"):
        if row["policy"] in found and kinds.get(row["prompt_id"]) == kind and metric in row.get("metrics", {}):
            found[row["policy"]][row["prompt_id"]] = row["metrics"][metric]
    both = [key for key in found[first] if key in found[second]]
    return paired(*([found[policy][key] for key in both] for policy in (first, second)), both)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
