"""python -m bench.bench_engine [--rounds 5] [--only TEXT]: generation by cai_fast, transformers generate and its
continuous batching: the same model folder, the same prompts, in one process, one after the other.

Lengths come from workloads.json. Every response has a given length: cai_fast and continuous batching take it as the
request's token limit; `generate` has none, so a logits processor forbids the end token until a row's turn, and the
processor's own time is measured apart and taken off. Random weights: tokens are drawn from the model as usual.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contest import OURS, Contest, measure, table
from bench.environment import RESULTS, ROOT, environment
from cai_fast.engine import Engine, Sampling
from cai_fast.model import Model, ModelConfig, init_random
from cai_fast.model import load as load_model

GENERATE, BATCHING = "generate", "continuous batching"
DETERMINISTIC = "cai_fast, deterministic"
CACHE_BLOCKS = 128  # pages of transformers' cache on a CPU, where it would otherwise take most of the memory


def workloads() -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "workloads.json").read_text(encoding="utf-8"))


def models(shape: dict[str, int], folder: Path, device: torch.device) -> tuple[Model, Any]:
    """(ours, transformers'): the same random weights, through a checkpoint folder."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    init_random(ModelConfig(**shape, max_position_embeddings=8192), 0).save(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    return load_model(folder, dtype=dtype, device=str(device)), theirs


def prompts_of(lengths: list[int], vocab: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths; tokens 0 and 1 are kept for padding and the end."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (length,), generator=g).tolist() for length in lengths]


class ForcedStop:
    """A logits processor after which row i ends with token `end` at its lengths[i]-th token and not before."""

    def __init__(self, lengths: list[int], device: torch.device, end: int = 1) -> None:
        self.lengths, self.step, self.end = torch.tensor(lengths, device=device), 0, end

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        ends = self.lengths == self.step
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, self.end] = torch.where(ends, 0.0, -torch.inf)
        return scores


@dataclass(frozen=True)
class Ours:
    """A work of ours, with the engine that does it."""

    engine: Engine
    work: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        return self.work(value)

    def counted(self) -> dict[str, float]:
        """The engine's work so far: GEMM rows that were padding, and trunk tokens over those of the
        prompts and responses, each computed once (less, because a response's last token is no input)."""
        counts = self.engine.counters
        fewest = counts["prefill_tokens"] + counts["generated_tokens"]
        return {"padding": counts["padding_tokens"], "trunk over minimum": round(counts["trunk_tokens"] / fewest, 4)}


def counted(contest: Contest) -> dict[str, dict[str, float]]:
    """What our engines did in a contest."""
    return {name: work.counted() for name, work in contest.works.items() if isinstance(work, Ours)}


def ours(
    model: Model, prompts: list[list[int]], lengths: list[int], deterministic: bool = False
) -> Callable[[Any], None]:
    size = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    engine = Engine(model, max_batch=len(prompts), max_len=size, deterministic=deterministic)
    samplings = [Sampling(max_new_tokens=n) for n in lengths]

    def work(_: Any) -> None:
        done = engine.generate(prompts, samplings)
        assert [len(c.token_ids) for c in done] == lengths

    return Ours(engine, work)


def generate(model: Any, prompts: list[list[int]], lengths: list[int]) -> Callable[[Any], None]:
    """Left-padded, all rows at once, until the longest is done."""
    from transformers import GenerationConfig, LogitsProcessorList

    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max(lengths), pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    @torch.no_grad()
    def work(_: Any) -> None:
        processors = LogitsProcessorList([ForcedStop(lengths, model.device)])
        out = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=processors)
        ends = (out[:, width:] == 1).int().argmax(1) + 1
        assert ends.tolist() == lengths

    return work


def forced_stop_seconds(rows: int, steps: int, vocab: int, device: torch.device) -> float:
    """What the logits processor alone costs a run of `generate`."""
    scores, processor = torch.zeros(rows, vocab, device=device), ForcedStop([steps] * rows, device)
    start = time.perf_counter()
    for _ in range(steps):
        processor(scores, scores)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def batching_manager(model: Any, longest: int) -> Iterator[Any]:
    """transformers' own engine, running: paged cache, requests join and leave a batch; no response ends by itself."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=longest, pad_token_id=0, eos_token_id=-1)
    options = {"num_blocks": CACHE_BLOCKS} if model.device.type == "cpu" else {}
    settings = ContinuousBatchingConfig(seed=0, **options)
    with (
        torch.no_grad(),
        model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=settings, block=True, timeout=5
        ) as manager,
    ):
        yield manager


def serve(manager: Any, prompts: list[list[int]], lengths: list[int]) -> None:
    """Let it answer these prompts with as many tokens as asked for."""
    got: dict[str, int] = {}
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        manager.add_request(prompt, request_id=str(i), max_new_tokens=length)
    while len(got) < len(prompts):
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            got[result.request_id] = len(result.generated_tokens)
        elif result is None and not manager.is_running():
            raise RuntimeError("continuous batching stopped by itself")
    assert [got[str(i)] for i in range(len(prompts))] == lengths


def continuous_batching(model: Any, prompts: list[list[int]], lengths: list[int]) -> Callable[[Any], None]:
    """A call of its own: the engine is started and stopped in it."""

    def work(_: Any) -> None:
        with batching_manager(model, max(lengths)) as manager:
            serve(manager, prompts, lengths)

    return work


def _both(model: Model, theirs: Any, prompts: list[list[int]], lengths: list[int]) -> dict[str, Callable[[Any], None]]:
    """The peer promises nothing about bits, so our fast mode is its like; deterministic is the default on a CPU."""
    return {
        GENERATE: generate(theirs, prompts, lengths),
        OURS: ours(model, prompts, lengths),
        DETERMINISTIC: ours(model, prompts, lengths, deterministic=True),
    }


def contests(model: Model, theirs: Any, device: torch.device) -> Iterator[Contest]:
    """Ragged lengths against both peers; equal lengths, where padding costs nothing, against generate."""
    load, vocab = workloads()["generate"], model.config.vocab_size
    prompts, lengths = prompts_of(load["prompt_tokens"], vocab), load["new_tokens"]
    size = f"{len(prompts)} ragged prompts, {sum(lengths)} new tokens"
    works = _both(model, theirs, prompts, lengths)
    works[BATCHING] = continuous_batching(theirs, prompts, lengths)
    yield Contest("generation", size, [None], works, baseline=GENERATE)
    for batch in (1, 16, 64):
        prompts = prompts_of([load["equal_prompt"]] * batch, vocab)
        lengths = [load["equal_new"]] * batch
        works = _both(model, theirs, prompts, lengths)
        yield Contest("generation", f"batch {batch}, {load['equal_new']} new tokens each", [None], works, GENERATE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_engine", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contests whose name contains this text")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    report = {**environment(), "contests": []}
    path = options.out / f"engine-{report['device'] if device.type == 'cuda' else 'cpu'}.json".replace(" ", "_")
    with tempfile.TemporaryDirectory() as folder:
        model, theirs = models(workloads()["model"], Path(folder), device)
        for contest in contests(model, theirs, device):
            if options.only not in contest.name:
                continue
            result = measure(contest, device, float("inf"), rounds=options.rounds, memory=False)
            result["work"] = counted(contest)
            report["contests"].append(corrected(result, contest, model.config.vocab_size, device))
            print(table(result), result["work"], sep="\n", flush=True)
            for title, speedups in result.items():
                if title.startswith("speedup"):
                    print(f"{title}: " + ", ".join(f"{name} {value:.2f}" for name, value in speedups.items()))
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")


def corrected(result: dict[str, Any], contest: Contest, vocab: int, device: torch.device) -> dict[str, Any]:
    """Adds the cost of the forced stop and what `generate` without it takes in units of ours."""
    load = workloads()["generate"]
    ragged = "ragged" in contest.size
    rows = len(load["prompt_tokens"]) if ragged else int(contest.size.split()[1].rstrip(","))
    steps = max(load["new_tokens"]) if ragged else load["equal_new"]
    forced = sorted(forced_stop_seconds(rows, steps, vocab, device) for _ in range(5))[2] * 1e3
    times = {name: row["median"] for name, row in result["contestants"].items()}
    result["forced stop ms"] = forced
    ours = {OURS: times[OURS], DETERMINISTIC: times[DETERMINISTIC]}
    result["speedup over generate"] = {name: (times[GENERATE] - forced) / time for name, time in ours.items()}
    if BATCHING in times:
        result["speedup over continuous batching"] = {name: times[BATCHING] / time for name, time in ours.items()}
    return result


if __name__ == "__main__":
    main()
