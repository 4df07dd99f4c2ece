"""What the ranks of tests/test_sharing.py do: shared work of every kind, and stages from given checkpoints."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import textworld
import torch
from rank_worker import settings

from cai_fast import config, distributed, model, pipeline, sharing
from cai_fast.comparisons import KINDS, Pair
from cai_fast.distributed import Distributed, Stopped
from cai_fast.errors import InputError
from cai_fast.records import Turn
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog
from cai_fast.stages import base, compare, evaluate, label, pm, revise
from cai_fast.tokenizer import Renderer, Tokenizer
from cai_fast.toy.pretrain import ToyTokenizer, initialise

NUMBERS = [1 / 3, 0.1, float(torch.tensor(0.1)), 1e-300, 2.0**60 + 2.0**9]
STAGES = {"revise": revise, "compare": compare, "label": label, "evaluate": evaluate}
MANY = 200
SMALLEST = 1  # in place of sharing.SMALLEST, so that little work has many chunks


def helper(folder: Path, dist: Distributed) -> None:
    """`sharing.shared` and `pipeline.journaled` where all goes well, fails, or is stopped; into rank{n}.json."""
    distributed.install_signal_handlers()
    run = RunDir.open(folder / "run", settings(folder / "run"), dist=dist)
    ctx = pipeline.open_context(run.cfg, run, RunLog(run.path("metrics.jsonl"), dist.is_main), dist)
    mine: list[Any] = []
    out: dict[str, Any] = {}

    def slow_on_rank_0(items: list[int]) -> list[list[Any]]:
        mine.extend(items)
        time.sleep(0.02 if dist.rank else 0.3)
        return [[item, NUMBERS[item % len(NUMBERS)]] for item in items]

    chunks = [[11, 3], [0], [5, 4], [1, 2], [10], [9, 8, 7], [6]] + [[n] for n in range(12, 20)]
    out["uneven"] = sharing.shared(ctx, "uneven", range(20), chunks, slow_on_rank_0)
    out["mine"], mine = mine, []
    out["one"] = sharing.shared(ctx, "one", ["only"], [[0]], lambda items: [f"{items[0]} item"])
    out["none"] = sharing.shared(ctx, "none", [], [], lambda items: items)

    def attempt(act: Callable[[int], Any]) -> list[str]:
        """How a list of many items ends on this rank whose number 4 does `act`; `mine` are those that it began."""

        def process(items: list[int]) -> list[int]:
            mine.extend(items)
            if items == [4]:
                act(items[0])
            time.sleep(0.02)
            return items

        try:
            sharing.shared(ctx, "many", range(MANY), sharing.even(MANY, 1), process)
        except (InputError, Stopped) as error:
            return [type(error).__name__, str(error)]
        return []

    def broken(number: int) -> None:
        raise InputError(f"item {number} is broken")

    out["error"] = attempt(broken)
    out["began_before_error"], mine = len(mine), []

    def rows(ids: list[str]) -> Iterator[dict[str, str]]:
        if ids == ["4"]:
            broken(4)
        yield from ({"id": i} for i in ids)

    try:
        pipeline.journaled(ctx, "compare", [str(n) for n in range(9)], 1, rows)
    except InputError as error:
        out["journal_error"] = str(error)
    out["stopped"] = attempt(lambda number: os.kill(os.getpid(), signal.SIGTERM))
    out["began_before_stop"] = len(mine)
    (folder / f"rank{dist.rank}.json").write_text(json.dumps(out))
    run.close()


def write_checkpoints(inputs: Path, folder: Path) -> None:
    """The models that stages before would have trained: the base model with some noise."""
    tokenizer = Tokenizer.load(inputs / "base")
    for seed, name in enumerate(("sl_cai", "rl_cai", "pm", "pm_eval")):
        made, draw = model.load(inputs / "base"), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in made.parameters():
                tensor.add_(0.01 * torch.randn(tensor.shape, generator=draw))
        made = made.with_score_head(seed) if name.startswith("pm") else made
        made.save(folder / name, tokenizer=tokenizer)
    initialise(0).save(folder / "toy", tokenizer=ToyTokenizer())


def context(words: list[str], checkpoints: Path, dist: Distributed) -> pipeline.Context:
    """The context of a new run folder with links to the checkpoints."""
    cfg = config.load(words)
    run = RunDir.open(cfg.run_dir, cfg, dist=dist)
    if dist.is_main:
        for path in checkpoints.iterdir():
            run.path("checkpoints", "base" if path.name == "toy" else path.name).symlink_to(path)
    dist.barrier()
    return pipeline.open_context(cfg, run, RunLog(run.path("metrics.jsonl"), dist.is_main), dist)


def watch_pieces(dist: Distributed) -> list[list[int]]:
    """For every list of work from now on, which pieces this rank did. Each rank gets one, where there are enough."""
    seen: list[list[int]] = []
    share = dist.share

    def watched(count: int, work: Callable[[int], Any]) -> list[Any]:
        began = f"test/{len(seen)}"
        seen.append([])

        def wait_for_others(number: int) -> Any:
            if not seen[-1]:
                dist.add(began, 1)
            seen[-1].append(number)
            while dist.add(began, 0) < min(count, dist.world):
                time.sleep(0.001)
            return work(number)

        return share(count, wait_for_others)

    dist.share = watched
    return seen


def stages(inputs: Path, checkpoints: Path, folder: Path, dist: Distributed) -> None:
    """Stages revise, compare, label, evaluate, the held-out results of stage pm, and the toy world's comparisons."""
    seen, pieces = watch_pieces(dist), {}
    words = textworld.arguments(
        inputs, folder / "text", evaluate__hhh=inputs / "hhh.jsonl", revise__num_red_team=10, label__cot=True,
        label__cot_max_new_tokens=8, compare__pairs_per_prompt=1, engine__max_batch=2,
    )  # fmt: skip
    ctx = context(words, checkpoints, dist)
    for name, stage in STAGES.items():
        ctx.run.begin(name, {})
        stage.run(ctx)
        pieces[name], seen[:] = [list(numbers) for numbers in seen], []
    pairs = held_out_pairs(ctx.renderer("pm"))
    results = pm.held_out_results(ctx, "pm", ctx.scorer(ctx.model("pm")), pairs)
    ctx.run.close()
    words = ["--config", "smoke", "--run-dir", str(folder / "toy"), "--base.comparisons", "60"]
    ctx = context(words, checkpoints, dist)
    base._write_comparisons(ctx)
    ctx.run.close()
    pieces["others"] = seen
    (folder / f"seen.{dist.rank}.json").write_text(json.dumps(pieces))
    (folder / f"held_out.{dist.rank}.json").write_text(json.dumps(results))


def held_out_pairs(renderer: Renderer) -> list[Pair]:
    """Comparisons as stage pm makes them."""
    return [
        Pair(kind, (Turn("human", str(n)),), renderer.response_ids(f"{kind} {n}"), renderer.response_ids(f"Not {n}."),
             n / 9, 1.0, 0)
        for n in range(10) for kind in KINDS
    ]  # fmt: skip


if __name__ == "__main__":
    ranks, sharing.SMALLEST = distributed.init("cpu"), SMALLEST
    {"helper": helper, "stages": stages}[sys.argv[1]](*map(Path, sys.argv[2:]), ranks)
    distributed.shutdown()
