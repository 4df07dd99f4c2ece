"""What the ranks of a test do: stage rl on written inputs, and rows of a journaled stage. `start` runs it on ranks."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support import byte_tokenizer
from tiny import CONFIG
from torch import Tensor

from cai_fast import config, distributed, model, pipeline, records, runlog
from cai_fast.engine import Completion
from cai_fast.records import Prompt, Turn
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog
from cai_fast.sampler import Item, Sampler
from cai_fast.stages import rl
from cai_fast.tokenizer import Finished, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "model.base": "x", "data.red_team": "x", "data.helpful": "x", "data.preferences": "x",
    "data.max_prompt_tokens": 100, "data.constitution": "harmlessness", "engine.max_batch": 2, "rl.steps": 2,
    "rl.prompts_per_step": 5, "rl.samples_per_prompt": 3, "rl.max_new_tokens": 12, "rl.lr": 0.0, "rl.critic_lr": 0.0,
    "rl.micro_tokens": 400, "guards.refusals": "off",
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Prompts and checkpoints, as the stages before would have written them."""
    tokenizer = Tokenizer.load(byte_tokenizer(folder / "tokenizer"))
    shape = CONFIG.replace(vocab_size=tokenizer.vocab_size)
    for name, head in (("sl_cai", "lm"), ("pm", "score")):
        model.init_random(shape, 0, head=head, std=0.1).save(folder / "checkpoints" / name, tokenizer=tokenizer)
    kinds = ("red_team", "helpful")
    rows = [Prompt(f"{k}{i}", k, (Turn("human", f"{k} question number {i} of several"),), "written", "train")
            for k in kinds for i in range(20)]  # fmt: skip
    records.write_jsonl(folder / "prompts.jsonl", rows)


def settings(folder: Path) -> config.Config:
    """The configuration of a run in `folder`."""
    return config.load(["--run-dir", str(folder), *(w for k, v in SETTINGS.items() for w in (f"--{k}", str(v)))])


def work(inputs: Path, folder: Path, dist: distributed.Distributed, pause: float) -> None:
    """Stage rl in `folder`, with `pause` seconds before rank 1 samples a piece; writes what this rank worked on."""
    cfg = settings(folder)
    run = RunDir.open(folder, cfg, dist=dist)
    if dist.is_main:
        for name in ("checkpoints/sl_cai", "checkpoints/pm", "prompts.jsonl"):
            (folder / name).symlink_to(inputs / name)
    dist.barrier()
    ctx = pipeline.open_context(cfg, run, RunLog(folder / "metrics.jsonl", dist.is_main), dist)
    seen: dict[str, list[list[int]]] = {"sampled": [], "scored": []}
    sample, score = Sampler._sample, Sampler.score

    def slowly(self: Sampler, items: list[Item], stage: str) -> list[Completion]:
        time.sleep(pause * dist.rank)
        seen["sampled"].append([item.number for item in items])
        return sample(self, items, stage)

    def scored(self: Sampler, items: list[Item], finished: list[Finished]) -> Tensor:
        seen["scored"].append([item.number for item in items])
        return score(self, items, finished)

    Sampler._sample, Sampler.score = slowly, scored
    try:
        run.begin("rl", {})
        rl.run(ctx)
    finally:
        Sampler._sample, Sampler.score = sample, score
    (folder / f"seen.{dist.rank}.json").write_text(json.dumps(seen))
    run.close()


def rows(folder: Path, dist: distributed.Distributed) -> None:
    """Twelve rows of a journaled stage, slower on rank 0; every change is shown."""
    run = RunDir.open(folder, settings(folder), dist=dist)
    runlog.PLAIN_INTERVAL = 0.0
    ctx = pipeline.open_context(settings(folder), run, RunLog(folder / "metrics.jsonl", dist.is_main), dist)

    def process(ids: list[str]) -> Iterator[dict[str, str]]:
        time.sleep(0.1 if dist.rank else 0.4)
        yield from ({"id": i} for i in ids)

    run.begin("compare", {})
    pipeline.journaled(ctx, "compare", [str(i) for i in range(12)], 1, process)
    run.close()


def start(function: str, *arguments: object, world: int = 2, script: str = __file__) -> list[str]:
    """Run `function(*arguments, dist)` of `script` on `world` gloo ranks; what each wrote to stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}  # fmt: skip
    line = [sys.executable, script, function, *map(str, arguments)]
    workers = [subprocess.Popen(line, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
               for rank in range(world)]  # fmt: skip
    texts = [worker.communicate(timeout=120)[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(texts)
    return texts


if __name__ == "__main__":
    ranks = distributed.init("cpu")
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]), Path(sys.argv[3]), ranks, float(sys.argv[4]))
    else:
        rows(Path(sys.argv[2]), ranks)
    distributed.shutdown()
