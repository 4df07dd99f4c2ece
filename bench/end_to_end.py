"""python -m bench.end_to_end --peer trl [--only sft,ppo] [--preset tiny]: the steps of the loop, by us and by TRL.

Every stage runs in a process of its own: the peer's trainer sets the pace, and after each of its steps ours does the
same work on the same tokens, from the same model folders with the same hyper-parameters; then the bare matrix products
of that work take a turn. A ratio is the peer's time over ours of neighbouring steps. Peak memory is each side's alone,
in a fresh process on the same works.

What is checked, at every step in turns: in all stages that both sides trained, sampled or judged the same number of
tokens; in sft, reward and dpo also that their losses agree, and in judge their probabilities (column "gap", within
`e2e_turns.TOLERANCE`). What rloo, grpo, ppo and generate sample and learn is not compared: each side draws its own
tokens. Nor are the bare matrix products, and in the processes that measure memory nothing is.

What is timed is a whole step, from the end of the last one: collating, forward, backward, clipping, AdamW, and for RL
sampling, scoring and log-probabilities. Loading and the first steps are not. TRL's PPO left it after 1.12:
`pip install --no-deps --target DIR trl==1.12.0` and --ppo-trl-path DIR. Exit code 1 if a stage, or the memory of a side
in it, could not be measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import e2e_floor, e2e_ours, e2e_trl
from bench.contest import Absent
from bench.e2e_load import PRESETS, STAGES, Settings, Work, make_folders
from bench.e2e_ours import Place
from bench.e2e_turns import Memory, Turns, report
from bench.environment import RESULTS, ROOT, environment

PARTS = ("turns", "ours", "peer")
NUMBERS = ("preset", "rounds", "warmup", "threads", "epochs")  # options that a stage's process gets too
MEMORY_STEPS = 2
UNITS = {"generate": "sampled", "rloo": "sampled", "grpo": "sampled", "ppo": "sampled", "judge": "prompt"}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--peer", choices=("trl",), default="trl")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, with commas between them")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps that are timed, after --warmup others")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each side, on a CPU")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="passes of PPO over a step's answers")
    parser.add_argument("--ppo-trl-path", type=Path, help="a folder with TRL 1.12, which still has PPO")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the chart")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the models: a part of one stage
    parser.add_argument("--part", choices=PARTS, default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.only.split(",")) - set(STAGES)
    if unknown or chosen.rounds < 1 or chosen.warmup < 1:
        parser.error(f"expected stages among {', '.join(STAGES)}, --rounds and --warmup of at least 1; got {chosen}")
    return chosen


def place_of(chosen: argparse.Namespace) -> Place:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Place(chosen.folder, device, PRESETS[chosen.preset], Settings(epochs=chosen.epochs))


def run_part(chosen: argparse.Namespace, stage: str) -> dict[str, Any]:
    """One part of one stage, in this process: both sides in turns, or the memory of one."""
    torch.set_num_threads(chosen.threads)
    place = place_of(chosen)
    if chosen.part != "ours":
        trl = e2e_trl.peer(chosen.ppo_trl_path if stage == "ppo" else None)
    memory = Memory(place.device)
    if chosen.part == "turns":
        turns = Turns(place.device, chosen.warmup, chosen.rounds, e2e_ours.STEPS[stage](place),
                      e2e_floor.floor(place, stage))  # fmt: skip
        e2e_trl.RUNS[stage](e2e_trl.Peer(place, turns))
        return report(turns) | {"works": [w.json() for w in turns.works], "trl": trl.__version__}
    if chosen.part == "peer":
        turns = Turns(place.device, 1, MEMORY_STEPS, memory=memory)
        e2e_trl.RUNS[stage](e2e_trl.Peer(place, turns))
        return memory.peak()
    works = json.loads(works_file(chosen.folder, stage).read_text(encoding="utf-8"))
    step = e2e_ours.STEPS[stage](place)
    for number, work in enumerate(works[: 1 + MEMORY_STEPS]):
        if number == 1:
            memory.reset()
        if hasattr(step, "prepare"):
            step.prepare(Work(**work))
        step(Work(**work))
    return memory.peak()


def works_file(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.works.json"


def in_process(chosen: argparse.Namespace, folder: Path, stage: str, part: str) -> dict[str, Any]:
    """`run_part` in a process of its own, which writes its result to a file."""
    result = folder / f"{stage}.{part}.json"
    arguments = [sys.executable, "-m", "bench.end_to_end", "--only", stage, "--part", part, "--folder", str(folder)]
    for name in NUMBERS:
        arguments += [f"--{name}", str(getattr(chosen, name))]
    if chosen.ppo_trl_path is not None:
        arguments += ["--ppo-trl-path", str(chosen.ppo_trl_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": last}
    return json.loads(result.read_text(encoding="utf-8"))


def run_stage(chosen: argparse.Namespace, folder: Path, stage: str, run: Callable[..., dict[str, Any]]) -> dict:
    """All parts of a stage: times, then both sides' memory on the same works."""
    found = run(chosen, folder, stage, "turns")
    if "failed" in found:
        return found
    works_file(folder, stage).write_text(json.dumps(found.pop("works")), encoding="utf-8")
    found["memory MiB"] = {"ours": run(chosen, folder, stage, "ours"), "peer": run(chosen, folder, stage, "peer")}
    return found


def incomplete(found: dict[str, Any]) -> bool:
    """Whether a part of a stage failed: its times, or the memory of a side."""
    return "failed" in found or any("failed" in side for side in found["memory MiB"].values())


HEADER = (
    f"{'':9} {'tokens':>8} {'ours':>8} {'TRL':>8}   {'ratio (min..max)':>19} {'of CPU time':>12} {'floor':>7}"
    f" {'floor/ours':>10}   {'peak MiB (work): ours':>22} {'TRL':>14} {'gap':>8}"
)


def line(stage: str, found: dict[str, Any]) -> str:
    """A row of the table: tokens a second of both sides, ratios, memory, largest gap between the results."""
    if "failed" in found:
        return f"{stage:9} not measured: {found['failed']}"
    rates, ratio, cpu = found["tokens/s"], found["ratio"], found["ratio of cpu time"]["median"]
    floor = found["floor ratio"]["median"]
    memory = [memory_cell(found["memory MiB"][side]) for side in ("ours", "peer")]
    gap = "-" if found["largest gap"] is None else f"{found['largest gap']:.0e}"
    spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})"
    return (
        f"{stage:9} {UNITS.get(stage, 'trained'):>8} {rates['ours']:8.0f} {rates['peer']:8.0f}   {spread:>19}"
        f" {cpu:12.2f} {floor:7.2f} {found['share of floor']:10.0%}   {memory[0]:>22} {memory[1]:>14} {gap:>8}"
    )


def memory_cell(found: dict[str, Any]) -> str:
    """Peak, and in brackets what of it the imports do not hold."""
    return "failed" if "failed" in found else f"{found['peak']:.0f} ({found['peak'] - found['imports']:.0f})"


def command(chosen: argparse.Namespace) -> str:
    """What was typed, without folders of this machine."""
    parts = ["python -m bench.end_to_end", f"--peer {chosen.peer}"]
    parts += [f"--{name} {getattr(chosen, name)}" for name in ("only", *NUMBERS)]
    return " ".join(parts + ["--ppo-trl-path DIR"] * (chosen.ppo_trl_path is not None))


def main() -> int:
    chosen = options()
    if chosen.part:
        result = run_part(chosen, chosen.only)
        (chosen.folder / f"{chosen.only}.{chosen.part}.json").write_text(json.dumps(result), encoding="utf-8")
        return 0
    try:
        e2e_trl.peer()
    except Absent as why:
        print(f"bench.end_to_end: {why}", file=sys.stderr)
        return 2
    torch.set_num_threads(chosen.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {**environment(), "command": command(chosen), "preset": chosen.preset, "stages": {}}
    chosen.out.mkdir(parents=True, exist_ok=True)  # now, not after an hour
    path = chosen.out / f"end_to_end-{device}.json"
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as name:
        make_folders(PRESETS[chosen.preset], Path(name), torch.float32)
        for stage in STAGES:
            if stage not in chosen.only.split(","):
                continue
            found = result["stages"][stage] = run_stage(chosen, Path(name), stage, in_process)
            print(line(stage, found), flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)
    failed = any(map(incomplete, result["stages"].values()))
    try:
        from bench.e2e_chart import draw
    except ModuleNotFoundError as error:
        print(f"no chart: {error.name} is not installed here")
        return int(failed)
    draw(result, chosen.peer.upper(), path.with_suffix(".svg"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
