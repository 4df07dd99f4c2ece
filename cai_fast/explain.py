"""python -m cai_fast.explain RUN ID: where a row of a run comes from, back to its prompt.

ID is that of a prompt, revision, helpful answer, preference, comparison, label, rollout or answer, or the beginning of
one. Shown are texts, principles, few-shot examples, models (and whether their folders still hold them), sampling and
keys of randomness, judge probabilities, and all of that for what the row was made from. A link that was not recorded,
or leads nowhere any more, is named as such. --verify samples the row's text again. Exit code 2 for bad input.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from cai_fast import replay, rng
from cai_fast.constitution import Constitution
from cai_fast.errors import InputError
from cai_fast.hashing import hash_model
from cai_fast.inputs import kind, parse_json
from cai_fast.records import Comparison, Helpful, Label, PolicyAnswer, Prompt, Record, Revision, Rollout
from cai_fast.runfiles import RunFiles

ROWS: dict[str, tuple[str, type[Record] | None]] = {  # kind -> file, type; None: rows as parsed
    "prompt": ("prompts.jsonl", Prompt),
    "preference": ("preferences.jsonl", None),
    "revision": ("revisions.jsonl", Revision),
    "helpful": ("helpful.jsonl", Helpful),
    "comparison": ("comparisons.jsonl", Comparison),
    "label": ("labels.jsonl", Label),
    "rollout": ("rollouts.jsonl", Rollout),
    "answer": ("answers.jsonl", PolicyAnswer),
}
TOKENS = {"revision": "revisions", "helpful": "revisions", "comparison": "comparisons", "rollout": "rollouts",
          "answer": "answers"}  # fmt: skip
MADE_BY = {"revision": "revise", "helpful": "revise", "comparison": "compare", "label": "label", "rollout": "rl",
           "answer": "evaluate", "preference": "base"}  # fmt: skip
SHOWN = 10  # candidates
UNRECORDED = "not recorded"
Row = dict[str, Any]


class Explainer:
    """The rows of a run and what is known of their origin."""

    def __init__(self, run: RunFiles) -> None:
        self.run = run
        self._rows: dict[str, dict[str, Row]] = {}
        self._tokens: dict[str, dict[str, Any]] = {}
        self._models: dict[str, str] = {}
        self._constitutions: dict[str, Constitution | str] = {}

    def rows(self, name: str) -> dict[str, Row]:
        """All rows of a kind by id, in the order of their file."""
        if name not in self._rows:
            file, cls = ROWS[name]
            if cls is not None:
                found = [row.to_json() for row in self.run.rows(file, cls)]
            else:
                path = self.run.root / file
                lines = path.read_bytes().splitlines() if kind(path) else []
                found = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
            self._rows[name] = {row["id"]: row for row in found}
        return self._rows[name]

    def find(self, wanted: str) -> tuple[str, Row]:
        """(kind, row) of the one row whose id is, or begins with, `wanted`."""
        everything = [(name, i) for name in ROWS for i in self.rows(name)]
        found = [(name, i) for name, i in everything if i == wanted] or [
            (name, i) for name, i in everything if wanted and i.startswith(wanted)
        ]
        if len(found) == 1:
            name, identity = found[0]
            return name, self.rows(name)[identity]
        if found:
            shown = ", ".join(f"{i} ({name})" for name, i in found[:SHOWN])
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise InputError(
                f"{wanted}: {len(found)} rows of {self.run.root} begin so: {shown}{more}; give more digits"
            )
        kinds = {i: name for name, i in everything}
        near = ", ".join(f"{i} ({kinds[i]})" for i in difflib.get_close_matches(wanted, kinds, 3, 0.3))
        raise InputError(
            f"{wanted}: no row of {self.run.root} has this id" + (f"; the nearest: {near}" if near else "")
        )

    def explain(self, name: str, row: Row) -> Row:
        """The row with all that is known of its origin, and of what it was made from, under "parents"."""
        facts = {"kind": name, "file": ROWS[name][0]} | getattr(self, f"_{name}")(row)
        if name in MADE_BY:
            facts |= self._provenance(name, row)
        return facts | {"parents": list(self._parents(name, row))}

    def _parents(self, name: str, row: Row) -> Iterator[Row]:
        if name == "label":
            yield self._parent("comparison", row["comparison_id"])
        origin = row.get("provenance", {})
        if name == "comparison" and origin.get("file") == ROWS["preference"][0]:
            number, rows = origin["line"], [*self.rows("preference").values()]
            known = 0 < number <= len(rows)
            yield self._parent("preference", rows[number - 1]["id"] if known else f"line {number}")
        if "prompt_id" in row and ("turns" not in origin or row["prompt_id"] in self.rows("prompt")):
            yield self._parent("prompt", row["prompt_id"])

    def _parent(self, name: str, identity: str) -> Row:
        row = self.rows(name).get(identity)
        if row is not None:
            return self.explain(name, row)
        return {"kind": name, "id": identity, "missing": f"no such row in {ROWS[name][0]}"}

    def _prompt(self, row: Row) -> Row:
        setting = "red_team" if row["kind"] == "red_team" else "helpful"
        record = self.run.stages.get("revise", {"settings": {}, "inputs": {}})
        hashes = record["inputs"].get("prompts", [])
        source = {"setting": record["settings"].get(f"data.{setting}", UNRECORDED),
                  "sha256": hashes[setting == "helpful"] if len(hashes) == 2 else UNRECORDED}  # fmt: skip
        return {"id": row["id"], "about": row["kind"], "split": row["split"], "turns": row["turns"], "source": source}

    def _preference(self, row: Row) -> Row:
        return {k: v for k, v in row.items() if k != "provenance"} | {
            "generator": row.get("provenance", {}).get("generator", UNRECORDED)
        }

    def _revision(self, row: Row) -> Row:
        origin, laws = row["provenance"], self._constitution(row)
        keys = origin.get("rng", {})
        rounds = []
        for k, one in enumerate(row["rounds"], 1):
            drawn = keys.get("rounds", [])[k - 1 : k]
            rounds.append({
                "principle": _principle(laws, one["principle"], ("critique_request", "revision_request")),
                "few_shot": _examples(laws, "few_shot_critique", (origin.get("few_shot", [])[k - 1 : k] or [None])[0]),
                "critique": one["critique"], "revision": one["revision"],
                "tokens": self._count("revision", f"{row['id']}/{k}"),
                "rng": _keys(drawn[0]) if drawn else UNRECORDED,
            })  # fmt: skip
        facts = {"id": row["id"], "kept": row["kept"], "reject_reason": row["reject_reason"]}
        facts["first_answer"] = {"text": row["response"], "tokens": self._count("revision", f"{row['id']}/0")}
        facts["first_answer"]["rng"] = _keys(keys.get("response", UNRECORDED))
        return facts | {"rounds": rounds, "critique_sampling": origin.get("critique_sampling", UNRECORDED)}

    def _helpful(self, row: Row) -> Row:
        return {"id": row["id"], "response": row["response"], "tokens": self._count("helpful", row["id"])}

    def _comparison(self, row: Row) -> Row:
        origin = row["provenance"]
        facts = {name: row[name] for name in ("id", "source", "split")} | {"about": row["kind"]}
        roles, models = origin.get("roles", []), origin.get("models", {})
        for k, side in enumerate("ab"):
            facts[f"response_{side}"] = one = {"text": row[f"response_{side}"]}
            if row["source"] == "ai":
                one["tokens"] = self._count("comparison", f"{row['id']}/{side}")
                role = roles[k] if k < len(roles) else ""
                one["model"] = self._model(models.get(role), role) if role else UNRECORDED
        if row["source"] != "ai":
            facts["made_elsewhere"] = {
                k: origin.get(k, UNRECORDED) for k in ("file", "file_hash", "line", "prob_a", "turns")
            }
        return facts

    def _label(self, row: Row) -> Row:
        origin, laws = row["provenance"], self._constitution(row)
        facts = {name: row[name] for name in ("id", "comparison_id", "prob_a", "clamp")}
        facts |= {name: origin[name] for name in ("from", "line", "permuted_from", "option_mass") if name in origin}
        part = "few_shot_cot" if "sampling" in origin else "few_shot_comparison"
        shots, views = origin.get("few_shot", []), []
        for view in row["per_principle"]:
            asked = sum(view[name] is not None for name in ("prob_a_ab", "prob_a_ba"))
            mine, shots = shots[:asked], shots[asked:]  # one list a question, in the order they were asked
            views.append({
                "principle": _principle(laws, view["principle"], ("comparison",)),
                "prob_a_ab": view["prob_a_ab"], "prob_a_ba": view["prob_a_ba"], "cot": view["cot"],
                "few_shot": _examples(laws, part, mine[0] if mine else None),
            })  # fmt: skip
        return facts | {"per_principle": views}

    def _rollout(self, row: Row) -> Row:
        origin, record = row["provenance"], self.run.stages.get("rl", {}).get("summary", {})
        step = origin.get("policy_step")
        facts = {name: row[name] for name in ("id", "iteration", "sample", "response", "reward", "kl")}
        facts["tokens"] = self._count("rollout", row["id"])
        facts["policy"] = UNRECORDED if step is None else {"iterations": step} | self._policy(step)
        facts["preference_model"] = self._model(origin.get("pm"), "pm")
        facts["reward_transform"] = {k: record.get(k, UNRECORDED) for k in ("reward_mean", "reward_deviation")}
        return facts

    def _policy(self, step: int) -> Row:
        """The checkpoint of the policy after so many iterations."""
        role = self.run.policy(step)
        return self._model(self.run.made_hash(role), role) if role else {"missing": "its weights were not exported"}

    def _answer(self, row: Row) -> Row:
        facts = {name: row[name] for name in ("id", "policy", "response", "metrics")}
        return facts | {"tokens": self._count("answer", row["id"])}

    def _provenance(self, name: str, row: Row) -> Row:
        """Model, constitution, template, sampling and keys, as far as they were recorded."""
        origin = row.get("provenance", {})
        if "from" in origin or "file" in origin:  # made elsewhere
            return {}
        stage = self.run.stages.get(MADE_BY[name], {"inputs": {}})
        models = stage["inputs"].get("models", {})
        roles = [role for role, digest in models.items() if digest == origin.get("model")]
        role = origin.get("role") or ("base" if name == "preference" else row.get("policy") or next(iter(roles), ""))
        # The two sides of a comparison may have different models, which are shown with them.
        facts: Row = {} if name == "comparison" else {"model": self._model(origin.get("model"), role)}
        if name == "preference":
            return facts | {"rng": _keys(origin.get("rng", UNRECORDED)), "row": origin.get("row", UNRECORDED)}
        laws = self._constitution(row)
        facts["constitution"] = {"hash": origin.get("constitution", UNRECORDED)}
        facts["constitution"] |= {"missing": laws} if isinstance(laws, str) else {"name": laws.name}
        facts["template"] = origin.get("template", UNRECORDED)
        if name != "label" or "sampling" in origin:
            facts["sampling"] = origin.get("sampling", UNRECORDED)
        if name != "revision":  # has its own by text
            facts["rng"] = _keys(origin.get("rng", UNRECORDED))
        return facts

    def _model(self, digest: str | None, role: str) -> Row:
        """Which model it was, and whether its folder still holds it."""
        facts = {"role": role or UNRECORDED, "hash": digest or UNRECORDED}
        if not role:
            return facts
        folder = self.run.model_folder(role)
        if str(folder) not in self._models:
            self._models[str(folder)] = hash_model(folder) if any(folder.glob("*.safetensors")) else ""
        found = self._models[str(folder)]
        if not found:
            state = "no model there"
        elif digest:
            state = "holds this model" if found == digest else f"holds another model, {found}"
        else:
            state = f"holds {found}; whether it is this model was not recorded"
        return facts | {"folder": str(folder), "state": state}

    def _constitution(self, row: Row) -> Constitution | str:
        """The constitution of a row, or why it cannot be shown."""
        digest = row.get("provenance", {}).get("constitution")
        if not digest:
            return UNRECORDED
        if digest not in self._constitutions:
            try:
                self._constitutions[digest] = self.run.constitution(digest)
            except InputError as error:
                self._constitutions[digest] = str(error)
        return self._constitutions[digest]

    def _count(self, name: str, key: str) -> int | str:
        tokens = self.tokens(TOKENS[name])
        return len(tokens[key][0]) if key in tokens else UNRECORDED

    def tokens(self, name: str) -> dict[str, Any]:
        """A token side file by row id."""
        if name not in self._tokens:
            self._tokens[name] = self.run.tokens(name)
        return self._tokens[name]


def _principle(laws: Constitution | str, identity: str, fields: Sequence[str]) -> Row:
    found = [] if isinstance(laws, str) else [p for p in laws.principles if p.id == identity]
    if not found:
        return {"id": identity, "missing": laws if isinstance(laws, str) else "no such principle in the constitution"}
    return {"id": identity} | {name: getattr(found[0], name) for name in fields}


def _examples(laws: Constitution | str, part: str, ids: Sequence[str] | None) -> Any:
    """The few-shot examples behind ids ("number" or "number:principle:order")."""
    if ids is None:
        return UNRECORDED
    pool = () if isinstance(laws, str) else getattr(laws, part)
    numbers = [int(identity.split(":")[0]) for identity in ids]
    return [
        {"id": identity} | (asdict(pool[n]) if n < len(pool) else {"missing": "its text is not known"})
        for identity, n in zip(ids, numbers, strict=True)
    ]


def _keys(drawn: Any) -> Any:
    """Key parts with the whole number they make, wherever they stand in `drawn`."""
    if isinstance(drawn, dict):
        return {name: _keys(value) for name, value in drawn.items()}
    if isinstance(drawn, list) and len(drawn) == 4 and isinstance(drawn[1], str):
        return {"seed": drawn[0], "stage": drawn[1], "sample": drawn[2], "draw": drawn[3], "key": rng.key(*drawn)}
    return [_keys(value) for value in drawn] if isinstance(drawn, list) else drawn


def as_text(node: Row, indent: int = 0) -> list[str]:
    """An explanation as indented lines; what a row was made from stands below it."""
    pad = "  " * indent
    title = f"{node['kind']} {node['id']}"
    lines = [f"{pad}{title}" + (f" ({node['file']})" if "file" in node else "")]
    for name, value in node.items():
        if name not in ("kind", "id", "file", "parents"):
            lines += _lines(name, value, indent + 1)
    if node.get("parents"):
        lines.append(f"{pad}  made from")
    return lines + [line for parent in node.get("parents", []) for line in as_text(parent, indent + 2)]


def _lines(name: str, value: Any, indent: int) -> list[str]:
    pad = "  " * indent
    if isinstance(value, dict) and value.keys() == {"seed", "stage", "sample", "draw", "key"}:
        *parts, key = value.values()
        return [f"{pad}{name}: {key} = key({', '.join(map(str, parts))})"]
    if isinstance(value, dict) and value.keys() == {"role", "text"}:
        return _lines(value["role"], value["text"], indent)
    if isinstance(value, dict) and value:
        return [f"{pad}{name}", *(line for k, v in value.items() for line in _lines(k, v, indent + 1))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [line for n, item in enumerate(value, 1) for line in _lines(f"{name} {n}", item, indent)]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [f"{pad}{name}: " + text.replace("\n", f"\n{pad}  ")]


def main(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cai_fast.explain", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", help="a run folder")
    parser.add_argument("id", help="a row's id, or its beginning")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="sample the text again and compare its tokens; exit 1 if "
                                                              "they differ")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where --verify computes (default cpu)")
    args = parser.parse_args(argv)
    try:
        explainer = Explainer(RunFiles(args.run))
        name, row = explainer.find(args.id)
        node, checks = explainer.explain(name, row), []
        if args.verify:
            tokens = explainer.tokens(TOKENS[name]) if name in TOKENS else {}
            turns = explainer.rows("prompt").get(row.get("prompt_id", ""), {}).get("turns")
            checks = replay.verify(explainer.run, name, row, turns, tokens, args.device)
    except InputError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(node | ({"verified": checks} if args.verify else {}), ensure_ascii=False, indent=1))
    else:
        lines = as_text(node) + [f"{check['text']}: {check['result']}" for check in checks]
        print("\n".join(lines))
    return int(any(check["same"] is False for check in checks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
