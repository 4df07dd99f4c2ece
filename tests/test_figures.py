"""The suite of figures: jobs done once, resumed and redone; the page."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.environment import environment
from bench.figures import __main__ as command
from bench.figures import figure, graph, page, stats
from bench.figures.graph import Job, Suite
from bench.figures.world import FULL, QUICK, UPSTREAM, Results, World, configuration
from bench.forks import Run
from cai_fast import config
from cai_fast.toy import checker
from tests.test_figure_claims import Planted, PlantedPolicies, planted


class Pipe:
    """What `Suite` closes at its end."""

    stdin = None

    def close(self) -> None:
        return None


class Workers:
    """Stands in for `Forks`: a job's result is its name; jobs named in `broken` fail."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.broken: set[str] = set()
        self.process = Pipe()
        self.process.stdin = Pipe()

    def __call__(self) -> "Workers":
        return self

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, words: Sequence[str], *, program: str) -> Run:
        order = json.loads(words[0])
        name = Path(order["run"]).name
        self.done.append(name)
        Path(order["run"]).mkdir(parents=True, exist_ok=True)
        if name in self.broken:
            return Run(2, "error: a bad thing", 0.0)
        out = Path(order["out"])
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {"identity": order["identity"], "commit": order["commit"], "measured": {"words": order["words"]}}
        out.write_text(json.dumps(result))
        return Run(0, "", 0.0)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    monkeypatch.setattr(graph, "Forks", made)
    return made


def tree(setting: str = "1") -> tuple[Job, Job, Job]:
    main = Job("s/main", ("--a", "1"))
    return main, Job("s/left", ("--b", setting), (main,), "rl"), Job("s/right", ("--model", "@s/main/model"), (main,))


def test_shared_work_is_done_once_and_before_what_needs_it(workers: Workers, tmp_path: Path) -> None:
    main, left, right = tree()
    assert Suite(tmp_path).run([left, right, left, main], 2) == {}
    assert workers.done[0] == "main" and sorted(workers.done) == ["left", "main", "right"]
    assert Suite(tmp_path).result(right)["measured"]["words"] == ["--model", str(tmp_path / "runs/s/main/model")]


def test_a_second_suite_only_reads(workers: Workers, tmp_path: Path) -> None:
    Suite(tmp_path).run(tree(), 1)
    workers.done.clear()
    assert Suite(tmp_path).run(tree(), 1) == {} and workers.done == []


def test_what_is_unfinished_is_continued_and_what_has_changed_begins_anew(workers: Workers, tmp_path: Path) -> None:
    suite, (main, left, right) = Suite(tmp_path), tree()
    suite.run([main, left, right], 1)
    (tmp_path / "runs/s/left/half").touch()
    (tmp_path / "done/s/left.json").unlink()
    workers.done.clear()
    suite.run([main, left, right], 1)
    assert workers.done == ["left"] and (tmp_path / "runs/s/left/half").exists()
    workers.done.clear()
    suite.run(tree("2"), 1)
    assert workers.done == ["left"] and not (tmp_path / "runs/s/left/half").exists()


def test_a_change_upstream_redoes_what_was_made_of_it(workers: Workers, tmp_path: Path) -> None:
    main, left, _ = tree()
    Suite(tmp_path).run([left], 1)
    workers.done.clear()
    other = Job("s/main", ("--a", "2"))
    Suite(tmp_path).run([Job(left.name, left.words, (other,), left.fork)], 1)
    assert workers.done == ["main", "left"]


@pytest.mark.slow
def test_a_suite_that_is_killed_ends_with_the_same_numbers(tmp_path: Path) -> None:
    def suite(folder: Path, seconds: float | None = None) -> bool:
        words = ["--tiny", "--seeds", "1", "--only", "elo", "--folder", str(folder), "--out", str(folder / "out")]
        process = subprocess.Popen([sys.executable, "-m", "bench.figures", *words], cwd=page.HERE.parents[1],
                                   env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")})  # fmt: skip
        try:
            assert process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
        return True

    assert suite(tmp_path / "whole")
    for seconds in range(8, 80, 4):
        if suite(tmp_path / "parts", seconds):
            break
    names = [path.name for path in (tmp_path / "whole/done/seed_0").iterdir()]
    assert sorted(names) == ["main.json", "rl.json"]
    for name in names:
        whole, parts = (json.loads((tmp_path / part / "done/seed_0" / name).read_text()) for part in ("whole", "parts"))
        assert whole["measured"] == parts["measured"]


def test_a_changed_configuration_redoes_its_jobs(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"

    def identity(text: str) -> str:
        own.write_text(text)
        configuration.cache_clear()
        return World(0, QUICK, str(own), False).rl_default().identity

    assert identity("[rl]\nlr = 1e-5\n") == identity("[rl]\nlr = 0.00001\n") != identity("[rl]\nlr = 2e-5\n")


def test_results_name_the_commits_of_their_jobs(workers: Workers, tmp_path: Path) -> None:
    main, left, right = tree()
    Suite(tmp_path, "one").run([main, left], 1)
    Suite(tmp_path, "two").run([main, left, right], 1)
    found = Results(Suite(tmp_path, "three"), World(0, QUICK))
    assert found.commits([left]) == {"one"} and found.commits([right]) == {"one", "two"}


def test_a_failed_job_stops_only_what_needs_it(workers: Workers, tmp_path: Path) -> None:
    main, left, right = tree()
    below = Job("s/below", ("--c", "1"), (left,))
    workers.broken = {"left"}
    failed = Suite(tmp_path).run([main, below, right], 2)
    assert failed["s/left"].startswith("exit code 2: error: a bad thing") and failed["s/below"] == "needs s/left"
    assert set(failed) == {"s/left", "s/below"} and Suite(tmp_path).result(right)


def test_two_jobs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two different jobs are called s/main"):
        graph.closure([Job("s/main", ("--a", "1")), Job("s/main", ("--a", "2"))])


def test_the_longest_chain_of_jobs_goes_first() -> None:
    main = Job("main", cost=5)
    far = Job("far", needs=(main,), cost=7)
    assert graph.weights(graph.closure([main, far, Job("alone", cost=10)]).values()) == {
        "main": 12, "far": 7, "alone": 10,
    }  # fmt: skip


@pytest.mark.parametrize("sizes", [QUICK, FULL])
def test_the_jobs_of_all_figures_fit_together_and_have_valid_settings(sizes: Any) -> None:
    world = World(0, sizes)
    found = graph.closure([job for f in command.EVERY.values() for job in f.jobs(world)])
    assert list(found)[0] == "seed_0/main" and sum(UPSTREAM in job.words for job in found.values()) == 1
    for job in found.values():
        if job.words and job.words[1] in config.preset_names():
            config.load(job.words)
        assert not job.fork or job.needs[0].name == "seed_0/main"


UNTRUE = {
    "revisions": (2, 4), "principles": (0, 1), "critique": (1, 1), "labels": (1, 1), "elo": (1, 4),
    "soft_hard": (1, 1), "weight": (1, 1), "frontier": (0, 4), "algorithms": (1, 1),
}  # fmt: skip
"""Figure -> claims that cannot be tested where nobody knows the truth, and all of them."""


class Untrue(PlantedPolicies):
    """What is measured where nobody knows the truth: scores, KL and texts."""

    def chains(self, job: Job) -> dict[str, dict[str, list]]:
        return {k: {key: t[key] for key in ("prompt", "pm_eval", "text")}
                for k, t in planted([0, 1, 2, 3, 4], 0.5, self.world.seed).items()}  # fmt: skip

    def of(self, job: Job) -> dict[str, Any]:
        def scored(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            return {key: scored(v) for key, v in value.items() if key not in checker.METRICS}

        return scored(super().of(job))


def test_a_figure_without_truth_is_made_of_what_there_is_and_says_so(tmp_path: Path) -> None:
    results = [Untrue(seed, lambda name, step: {}, [1.0, 2.0]) for seed in range(2)]
    for result in results:
        result.world = World(result.world.seed, QUICK, "toy", False)
    for f in command.EVERY.values():
        for job in graph.closure(f.jobs(results[0].world)).values():
            assert not job.words or "base" not in job.words[5].split(",")
            assert "make_judge" not in str(job)
        made = command.make(f, results, {"command": "", "environment": environment()}, tmp_path)
        assert (tmp_path / f"{f.name}.svg").is_file() == bool(made["panels"])
        assert f"results/figures/{f.name}.svg" in page.page([made]) or not made["panels"]
        open_claims = sum(claim["verdict"] == stats.NOT_TESTABLE for claim in made["claims"])
        assert (open_claims, len(made["claims"])) == UNTRUE[f.name]


def test_a_run_that_a_guard_ended_is_named(tmp_path: Path) -> None:
    found, job = Results(Suite(tmp_path), World(0, QUICK)), World(0, QUICK).rl_default()
    assert found.ended(job) == ""
    manifest = tmp_path / "runs" / job.name / "manifest.json"
    manifest.parent.mkdir(parents=True)
    for guard, said in (("", ""), ("kl", "seed_0/rl: guard kl, the policy after 24 iterations is the last")):
        summary = {"guard_name": guard, "iterations": 24}
        manifest.write_text(json.dumps({"stages": {"rl": {"summary": summary}}}))
        assert found.ended(job) == said


def test_what_is_typed_is_recorded_without_folders_and_trials_leave_the_committed_results_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, options = command.parse(["--quick", "--folder", "/somewhere", "--jobs", "1"])
    assert options.out == page.RESULTS and command.given(options) == "python -m bench.figures --seeds 3 --quick"
    for words in (["--tiny"], ["--config", "/somewhere/own.toml"]):
        _, options = command.parse([*words, "--only", "elo", "--folder", "/somewhere"])
        assert options.out == Path("/somewhere/figures") and "/somewhere" not in command.given(options)
    assert command.given(options) == "python -m bench.figures --only elo --seeds 3 --config own.toml"
    for wrong in (["--seeds", "0"], ["--jobs", "0"], ["--quick", "--tiny"]):
        with pytest.raises(SystemExit):
            command.parse(wrong)
    assert "--seeds and --jobs must be at least 1; got 0 and 2" in capsys.readouterr().err


def test_every_figure_has_its_words_and_a_place_on_the_page() -> None:
    assert set(page.ORDER) == set(command.EVERY) == set(page.texts())
    assert all(set(words) == {"title", "paper", "ours", "note"} for words in page.texts().values())


def test_the_page_is_made_of_the_results() -> None:
    results = page.load()
    assert page.PAGE.read_text() == page.page(results)
    assert all((page.RESULTS / f"{result['figure']}.svg").is_file() for result in results)
    for result in results:  # what does not show has its reason found
        missed = any(claim["verdict"] == stats.NOT_REPRODUCED for claim in result["claims"])
        assert page.texts()[result["figure"]]["note"] or not missed, result["figure"]


def test_a_figure_is_written_with_its_environment_and_drawn_alike_twice(tmp_path: Path) -> None:
    results = [Planted(s, {"": planted([0, 1, 1.4, 1.6, 1.7], 0.5, s)}) for s in range(3)]
    where = {"command": "the command", "environment": environment()}
    made = [command.make(command.EVERY["revisions"], results, where, tmp_path / n) for n in ("a", "b")]
    written = json.loads((tmp_path / "a" / "revisions.json").read_text())
    assert {"seeds": [0, 1, 2], **where}.items() <= written.items()
    assert (tmp_path / "a/revisions.svg").read_bytes() == (tmp_path / "b/revisions.svg").read_bytes()
    text = page.page(made[:1])
    assert "| The preference score rises with every revision (Fig. 5) | **reproduced** |" in text
    assert figure.NAMES["harm"] in (tmp_path / "a/revisions.svg").read_text()
