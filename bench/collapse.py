"""Force the known collapses of RL-CAI on the toy world, and see that the guards flag them.

    python -m bench.collapse RUN_FOLDER [--out bench/results/collapse.json]

RUN_FOLDER is a finished toy run. Its stages up to `label` are reused; preference models and RL are run again
 - with AI harmlessness labels only (no helpfulness comparisons), and
 - with KL coefficient 0 and a high learning rate,
each once with the guards off, to see the collapse, and once with them on, to see it flagged and the exported policy
still sane.
"""

import argparse
import contextlib
import io
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

GUARDS_OFF = ["--guards.kl", "off", "--guards.refusals", "off"]
STAGES = "base,revise,sft,compare,label,pm,rl,evaluate"
CASES = {
    "harmless_only": ("pm", ["--pm.harmless_only", "true", "--rl.kl_coef", "0.02", "--rl.lr", "6e-4"]),
    "no_kl": ("rl", ["--rl.kl_coef", "0", "--rl.lr", "1.5e-3", "--rl.schedule", "constant"]),
}


def run_case(source: Path, scratch: Path, name: str, extra: list[str]) -> dict[str, Any]:
    """Restart a copy of the run with other settings -> the policy's metrics and what the guard said."""
    from cai_fast import train

    stage, settings = CASES[name]
    shutil.copytree(source, scratch)
    seed = [line.split("=")[1].strip() for line in (source / "config.toml").read_text().splitlines() if "seed" in line]
    arguments = ["--run-dir", str(scratch), "--seed", seed[0], "--stages", STAGES, "--restart-from", stage]
    arguments += ["--evaluate.num_red_team", "300"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train.main([*arguments, *settings, *extra])
    if code:
        raise RuntimeError(f"{name}: the run ended with exit code {code}")
    summary = json.loads((scratch / "manifest.json").read_text())["stages"]["rl"]["summary"]
    policies = json.loads((scratch / "evaluation.json").read_text())["policies"]
    metrics = ("harm", "helpful", "evasive", "objection", "malformed", "kl", "length")
    return {
        "guard": summary["guard"], "iterations": summary["iterations"], "kl_exact_max": summary["kl_exact_max"],
        "kl_exact_final": summary["kl_exact_final"],
        "rl_cai": {
            group: {metric: round(rows[metric]["mean"], 4) for metric in metrics}
            for group, rows in policies["rl_cai"].items()
        },
    }  # fmt: skip


def campaign(source: Path) -> dict[str, Any]:
    """All cases, with and without guards."""
    results: dict[str, Any] = {}
    for name, (_, settings) in CASES.items():
        for guards in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                result = run_case(source, Path(folder) / "run", name, [] if guards else GUARDS_OFF)
            key = f"{name}, guards {'on' if guards else 'off'}"
            results[key] = {"settings": " ".join(settings)} | result
            print(key, json.dumps(results[key]), flush=True)
    return results


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results/collapse.json"))
    arguments = parser.parse_args()
    results = campaign(arguments.run)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    arguments.out.write_text(json.dumps({"environment": environment, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
