"""python -m bench.bench_feedback [--only TEXT]: AI feedback by cai_fast and by the best straightforward use of
transformers.

Judging: comparisons x principles x both orders, the probability of one of two answer tokens after each question.
cai_fast scores a tree per comparison (conversation, principle, order: each shared token is computed once); transformers
runs left-padded batches of questions sorted by length and makes the logits of the last position only. A measured round
is a part of the comparisons, the same for both; the gain is that of all together.

Chains: a measured round is a round of all chains: a critique of the current response and a revision by the critique,
all behind a long few-shot block. cai_fast computes the block once and continues a revision on the keys of its critique;
transformers' generate prefills every prompt anew, in left-padded batches. Nothing stops early, so both sides take the
same number of steps.

Lengths come from workloads.json; the bound of a gain is the ratio of the tokens that either side must process. In
chains that counts a token of a prefill like one that is decoded, though a decoded one costs more: what can be gained
lies below. On a CPU both sides have one thread, and times are the process's CPU time.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.bench_engine import DETERMINISTIC, Ours, counted, models, prompts_of, workloads
from bench.contest import OURS, Contest, Outputs, measure, table
from bench.environment import RESULTS, environment
from cai_fast.engine import Engine, Prefix, Sampling, Tree
from cai_fast.model import Model

STRAIGHT, AGAIN = "padded, sorted, last logit", "generate, prefilled anew"
OPTIONS = (5, 6)  # the two answer tokens
MODES = OURS, DETERMINISTIC
BATCH = 32
PRINCIPLES = (1, 4, 16)

Say = Callable[[list[list[int]], int, bool], list[list[int]]]
"""(requests without the few-shot block, new tokens of each, whether they continue the last ones) -> answers."""


class Question:
    """Token ids of one comparison: the parts of its questions."""

    def __init__(self, conversation: list[int], responses: list[list[int]], glue: list[int]) -> None:
        self.conversation, self.responses, self.glue = conversation, responses, glue

    def orders(self) -> list[list[int]]:
        """What follows the principle in either order."""
        first, second = self.responses
        return [[*first, *second, *self.glue], [*second, *first, *self.glue]]


def questions(vocab: int, limit: int) -> tuple[list[Question], list[list[int]]]:
    """(comparisons, principles) of the workload, with random tokens."""
    load = workloads()["judge"]
    conversations = prompts_of(load["conversation_tokens"][:limit], vocab, 1)
    responses = [prompts_of(pair, vocab, 100 + i) for i, pair in enumerate(load["response_tokens"][:limit])]
    glue = prompts_of([load["glue_tokens"]], vocab, 2)[0]
    asked = [Question(c, r, glue) for c, r in zip(conversations, responses, strict=True)]
    return asked, prompts_of(load["principle_tokens"], vocab, 3)


def flat(asked: list[Question], principles: list[list[int]], last: bool) -> list[list[int]]:
    """Every question as one prompt; `last`: the principle follows the responses."""
    prompts = []
    for q in asked:
        if last:
            prompts += [[*q.conversation, *order, *p] for order in q.orders() for p in principles]
        else:
            prompts += [[*q.conversation, *p, *order] for p in principles for order in q.orders()]
    return prompts


def trees(asked: list[Question], principles: list[list[int]], last: bool) -> list[Tree]:
    """The same questions as one tree per comparison, leaves in the order of `flat`."""
    made = []
    for q in asked:
        if last:
            children = [Tree(order, [Tree(p) for p in principles]) for order in q.orders()]
        else:
            children = [Tree(p, [Tree(order) for order in q.orders()]) for p in principles]
        made.append(Tree(q.conversation, children))
    return made


def tree_tokens(tree: Tree) -> int:
    return len(tree.token_ids) + sum(tree_tokens(child) for child in tree.children)


def straightforward(model: Any, batch: int = BATCH) -> Callable[[Any], Outputs]:
    options = torch.tensor(OPTIONS, device=model.device)

    @torch.no_grad()
    def work(part: tuple[list[list[int]], list[Tree]]) -> Outputs:
        prompts = part[0]
        order, result = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), torch.empty(len(prompts), 2)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in rows], device=model.device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            mask = mask.to(model.device)
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
            result[rows] = out.logits[:, -1, options].float().log_softmax(-1).cpu()
        return {"logprob": result}

    return work


def tree_scores(engine: Engine) -> Callable[[Any], Outputs]:
    options = torch.tensor(OPTIONS)[:, None]
    return Ours(engine, lambda part: {"logprob": engine.score(part[1], options).cpu()})


def judging(model: Model, theirs: Any, comparisons: int, rounds: int) -> Iterator[Contest]:
    asked, principles = questions(model.config.vocab_size, comparisons)
    engines = {name: Engine(model, max_batch=1, max_len=4096, deterministic=name != OURS) for name in MODES}
    for count in PRINCIPLES:
        for last in (False, True):
            parts = [
                (flat(part, principles[:count], last), trees(part, principles[:count], last))
                for part in (asked[n::rounds] for n in range(rounds))
            ]
            tokens = sum(len(prompt) for prompts, _ in parts for prompt in prompts)
            shared = sum(tree_tokens(tree) for _, items in parts for tree in items)
            where = "last" if last else "first"
            yield Contest(
                "judging", f"{len(asked)} x {count} principles x 2 orders, principle {where}, {tokens / shared:.3f}",
                parts, {STRAIGHT: straightforward(theirs), **{n: tree_scores(e) for n, e in engines.items()}}, STRAIGHT,
                exact=lambda part: {n: v.double() for n, v in straightforward(theirs)(part).items()},
            )  # fmt: skip


class Chains:
    """Critique-revision chains of the workload with random tokens; critiques and revisions are what the model says."""

    def __init__(self, vocab: int, limit: int) -> None:
        load = workloads()["chains"]
        self.few_shot, ask, mend = prompts_of([load["few_shot_tokens"], *[load["request_tokens"]] * 2], vocab, 1)
        self.requests = ask, mend
        self.prompts = prompts_of(load["prompt_tokens"][:limit], vocab, 2)
        self.responses = prompts_of([load["response_tokens"]] * len(self.prompts), vocab, 3)
        self.new = load["critique_tokens"], load["revision_tokens"]
        longest = max(map(len, self.prompts)) + max(load["response_tokens"], self.new[1])
        self.room = len(self.few_shot) + longest + 2 * load["request_tokens"] + sum(self.new)

    def round(self, say: Say) -> None:
        """One round of all chains; the next call goes on from its revisions."""
        ask, mend = self.requests
        asked = [[*p, *r, *ask] for p, r in zip(self.prompts, self.responses, strict=True)]
        critiques = say(asked, self.new[0], False)
        asked = [[*a, *c, *mend] for a, c in zip(asked, critiques, strict=True)]
        self.responses = say(asked, self.new[1], True)
        assert {len(c) for c in critiques} == {self.new[0]} and {len(r) for r in self.responses} == {self.new[1]}

    def bound(self) -> float:
        """Tokens of a round's prompts and answers, over those of a round that computes each of them once."""
        anew, once = 0, len(self.few_shot)

        def count(requests: list[list[int]], new: int, continued: bool) -> list[list[int]]:
            nonlocal anew, once
            anew += sum(len(self.few_shot) + len(request) + new for request in requests)
            once += sum((len(self.requests[1]) if continued else len(request)) + new for request in requests)
            return [[0] * new for _ in requests]

        self.round(count)
        return anew / once


def continued_chains(engine: Engine, chains: Chains) -> Callable[[Any], None]:
    def work(_: Any) -> None:
        block = engine.prefix(chains.few_shot)
        kept: list[Prefix] = []

        def say(requests: list[list[int]], new: int, continued: bool) -> list[list[int]]:
            before = kept if continued else [block] * len(requests)
            rest = [[*block.token_ids, *r][len(start) :] for r, start in zip(requests, before, strict=True)]
            done = engine.generate(rest, Sampling(max_new_tokens=new), prefix=before, keep=not continued)
            kept[:] = [] if continued else [c.kept for c in done]
            return [c.token_ids for c in done]

        chains.round(say)

    return Ours(engine, work)


def repeated_chains(model: Any, chains: Chains) -> Callable[[Any], None]:
    from transformers import GenerationConfig

    @torch.no_grad()
    def say(requests: list[list[int]], new: int, continued: bool) -> list[list[int]]:
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=0, bos_token_id=None)
        said: list[list[int]] = []
        for start in range(0, len(requests), BATCH):
            prompts = [[*chains.few_shot, *request] for request in requests[start : start + BATCH]]
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
            out = model.generate(ids, attention_mask=mask, generation_config=config)
            said += out[:, width:].tolist()
        return said

    return lambda _: chains.round(say)


def chain_contests(model: Model, theirs: Any, limit: int) -> Iterator[Contest]:
    vocab = model.config.vocab_size
    first = Chains(vocab, limit)
    size = f"{len(first.prompts)} behind {len(first.few_shot)} few-shot tokens, {Chains(vocab, limit).bound():.3f}"
    works = {AGAIN: repeated_chains(theirs, first)}
    for name in MODES:
        engine = Engine(model, max_batch=BATCH, max_len=first.room, deterministic=name != OURS)
        works[name] = continued_chains(engine, Chains(vocab, limit))
    yield Contest("chains", size, [None], works, AGAIN)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_feedback", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=16, help="parts of the comparisons; chains take 5 at most")
    parser.add_argument("--only", default="", help="contests whose name contains this text")
    parser.add_argument("--comparisons", type=int, default=256)
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    report = {**environment(), "contests": []}
    path = options.out / f"feedback-{report['device'] if device.type == 'cuda' else 'cpu'}.json".replace(" ", "_")
    with tempfile.TemporaryDirectory() as folder:
        model, theirs = models(workloads()["model"], Path(folder), device)
        everything = (
            judging(model, theirs, options.comparisons, options.rounds), chain_contests(model, theirs, options.chains)
        )  # fmt: skip
        for contest in itertools.chain(*everything):
            if options.only not in contest.name:
                continue
            rounds = options.rounds if len(contest.inputs) > 1 else min(5, options.rounds)
            result = measure(contest, device, math.inf, rounds=rounds, memory=False, clock=time.process_time)
            times = {name: row["rounds"] for name, row in result["contestants"].items()}
            theirs_times = times.pop(contest.baseline)
            result["work"] = counted(contest)
            result["gain"] = {name: sum(theirs_times) / sum(t) for name, t in times.items()}
            ratios = {name: [a / b for a, b in zip(theirs_times, t, strict=True)] for name, t in times.items()}
            result["median gain"] = {name: statistics.median(r) for name, r in ratios.items()}
            result["bound"] = float(contest.size.rpartition(" ")[2])
            report["contests"].append(result)
            print(table(result), flush=True)
            for name, gain in result["gain"].items():
                median, bound = result["median gain"][name], result["bound"]
                print(f"{name}: {gain:.2f} times (median {median:.2f} of rounds), token counts allow {bound:.2f}")
                print(f"{'':10}{result['work'][name]}", flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
