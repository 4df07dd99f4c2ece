"""Figures 5 to 7 of the paper: revisions, the number of principles, critiques."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.figures import stats
from bench.figures.figure import NAMES, Figure, panel
from bench.figures.graph import Job
from bench.figures.stats import NOT_REPRODUCED, REPRODUCED, above, claim
from bench.figures.world import SIZES, Results, World

GENERAL, MIXED = (1, 2, 4, 8), (1, 2, 4, 8, 16)
ALONE = 4  # principles of all kinds that are tried alone, for one would speak for its own kind
NEGLIGIBLE = 0.1  # of the score that all revisions gain


def relative(tables: Sequence[dict[str, dict[str, list]]], revision: str, column: str) -> dict[str, Any]:
    """Estimate of a column after a revision; scores are counted from the first response's."""
    if column == "pm_eval":
        return stats.differences([t[revision] for t in tables], [t["0"] for t in tables], column)
    return stats.means([t[revision][column] for t in tables])


def columns(tables: Sequence[dict[str, dict[str, list]]], *names: str) -> list[str]:
    """Those of the columns that were measured."""
    return [name for name in names if name in tables[0]["0"]]


def monotone(tables: Sequence[dict[str, dict[str, list]]], column: str, sign: int, text: str) -> dict[str, Any]:
    """Whether a column goes the given way with every revision."""
    if column not in tables[0]["0"]:
        return claim(text, "needs the truth", stats.NOT_TESTABLE)
    last = max(map(int, tables[0]))
    steps = [stats.differences([t[str(k + 1)] for t in tables], [t[str(k)] for t in tables], column)["mean"] * sign
             for k in range(last)]  # fmt: skip
    total = stats.differences([t[str(last)] for t in tables], [t["0"] for t in tables], column)
    signed = total if sign > 0 else negated(total)
    verdict = stats.positive(signed) if min(steps) > 0 else NOT_REPRODUCED
    rule = "every step has the right sign on average over seeds; the whole change on every seed, its interval beyond 0"
    return claim(text, rule, verdict, total)


def negated(estimate: dict[str, Any]) -> dict[str, Any]:
    """The estimate of the opposite number."""
    turned = {"mean": -estimate["mean"], "lo": -estimate["hi"], "hi": -estimate["lo"]}
    return turned | ({"seeds": [negated(seed) for seed in estimate["seeds"]]} if "seeds" in estimate else {})


def revisions_jobs(world: World) -> list[Job]:
    return [world.main()]


def revisions(results: Sequence[Results]) -> dict[str, Any]:
    """Score and truth by revision."""
    tables = [r.chains(r.world.main()) for r in results]
    names = columns(tables, "pm_eval", "harm", "helpful", "evasive", "objection", "malformed")
    panels = {
        NAMES[name]: panel("revision", NAMES[name], {name: [(int(k), relative(tables, k, name)) for k in tables[0]]})
        for name in names
    }
    last = max(tables[0], key=int)
    first = stats.means([
        2 * np.array(stats.paired(t["1"], t["0"], "pm_eval")) - np.array(stats.paired(t[last], t["0"], "pm_eval"))
        for t in tables
    ])  # fmt: skip
    gained = stats.differences([t["1"] for t in tables], [t["0"] for t in tables], "pm_eval")
    most = stats.positive(first) if stats.positive(gained) == REPRODUCED else NOT_REPRODUCED
    claims = [
        monotone(tables, "pm_eval", 1, "The preference score rises with every revision (Fig. 5)"),
        monotone(tables, "harm", -1, "True harm falls with every revision"),
        claim("The first revision does most of the work (App. A)", "the score that it gains, and twice that minus the "
              "whole gain: above 0 on every seed, interval above 0", most, first),
        monotone(tables, "helpful", -1, "Pure helpfulness falls with revisions (Fig. 5, middle)"),
    ]  # fmt: skip
    return {"panels": panels, "claims": claims}


def subset(world: World, kind: str, count: int) -> list[Job]:
    """Chains with so many principles; the seed draws which. With one of all kinds there are several."""
    if kind == "mixed" and count == MIXED[-1]:
        return [world.chains("principles_all", {})]
    given = {"source": world.path("main"), "general": GENERAL, "mixed": MIXED[1:-1], "alone": ALONE}
    made = Job(world.name("constitutions"), (), (world.main(),), "", (("subsets", tuple(given.items())),), 1)
    names = [f"alone_{k}" for k in range(ALONE)] if kind == "mixed" and count == 1 else [f"{kind}_{count}"]
    files = {name: world.path("constitutions", f"{name}.toml") for name in names}
    return [world.chains(f"principles_{name}", {"data.constitution": file}, needs=[made])
            for name, file in files.items()]  # fmt: skip


def kinds(world: World) -> dict[str, tuple[int, ...]]:
    """Which numbers of which principles are tried."""
    return {"general": GENERAL, "mixed": MIXED} if world.toy else {"mixed": MIXED}


def principles_jobs(world: World) -> list[Job]:
    return [job for kind, counts in kinds(world).items() for count in counts for job in subset(world, kind, count)]


def averaged(runs: Sequence[dict[str, dict[str, list]]]) -> dict[str, dict[str, list]]:
    """Chains of several runs as one table: the mean of every number by prompt, where all runs have the prompt."""
    if len(runs) == 1:
        return runs[0]
    result = {}
    for revision in runs[0]:
        tables = [run[revision] for run in runs]
        prompts = sorted(set.intersection(*(set(t["prompt"]) for t in tables)))
        result[revision] = {"prompt": prompts}
        for name in set(tables[0]) - {"prompt", "text"}:
            values = [dict(zip(t["prompt"], t[name], strict=True)) for t in tables]
            result[revision][name] = [float(np.mean([found[p] for found in values])) for p in prompts]
    return result


def distinct(texts: Sequence[str]) -> float:
    """Different word pairs per answer, a measure of diversity; it falls with the number of answers."""
    pairs = {pair for text in texts for words in [text.split()] for pair in zip(words, words[1:], strict=False)}
    return len(pairs) / len(texts)


def diversity(found: Sequence[dict[str, list]], shared: Sequence[set[str]]) -> dict[str, Any]:
    """Of the answers to each seed's shared prompts. The interval is that of the seeds alone: answers drawn with
    replacement are fewer different ones."""
    texts = [[text for p, text in zip(t["prompt"], t["text"], strict=True) if p in common]
             for t, common in zip(found, shared, strict=True)]  # fmt: skip
    return stats.means([[distinct(chosen)] if chosen else [] for chosen in texts])


def principles(results: Sequence[Results]) -> dict[str, Any]:
    """Final revisions by the number of principles."""
    tables = {
        (kind, count): [averaged([r.chains(job) for job in subset(r.world, kind, count)]) for r in results]
        for kind, counts in kinds(results[0].world).items() for count in counts
    }  # fmt: skip
    last = max(next(iter(tables.values()))[0], key=int)
    names = columns(next(iter(tables.values())), "pm_eval", "harm", "helpful", "objection")

    def line(kind: str, name: str) -> list[tuple[int, dict[str, Any]]]:
        return [(count, relative(t, last, name)) for (k, count), t in tables.items() if k == kind]

    present = list(kinds(results[0].world))
    panels = {NAMES[name]: panel("principles", NAMES[name], {k: line(k, name) for k in present}, log=True)
              for name in names}  # fmt: skip
    shared = [set.intersection(*(set(t[s][last]["prompt"]) for t in tables.values())) for s in range(len(results))]
    panels["diversity"] = panel("principles", "different word pairs per answer", {
        kind: [(n, diversity([t[last] for t in found], shared)) for (k, n), found in tables.items()
               if k == kind and "text" in found[0][last]]
        for kind in present
    }, log=True)  # fmt: skip
    claims = []
    for kind, words in (("general", "that name no category"), ("mixed", "of all kinds")):
        if kind in present:
            most = max(count for k, count in tables if k == kind)
            many, one = ([t[last] for t in tables[kind, count]] for count in (most, 1))
            gain, found = relative(tables[kind, most], last, "pm_eval"), stats.differences(many, one, "pm_eval")
            verdict = stats.negligible(found, NEGLIGIBLE * gain["mean"])
            least = f"1 (mean of {ALONE} alone)" if kind == "mixed" else "1"
            claims.append(claim(
                f"The number of principles, {words}, makes no difference to the score (Fig. 6)",
                f"{most} minus {least}: the interval of the difference is within {NEGLIGIBLE:.0%} of what revisions "
                "gain; not reproduced if beyond it; not testable where partly so, or where revisions gain nothing",
                verdict if stats.positive(gain) == REPRODUCED else stats.NOT_TESTABLE, found,
            ))  # fmt: skip
    return {"panels": panels, "claims": claims}


def critique_job(world: World, size: str, critique: bool) -> Job:
    """Chains of a base model of some size, with critiques or direct."""
    if critique:
        return world.base(size) if world.toy else world.chains("principles_all", {})
    needs = [world.base(size)] if world.toy else []
    return world.chains(f"direct_{size}", {"revise.critique": "false"}, f"base_{size}", needs)


def sizes(world: World) -> list[str]:
    """Sizes that there are base models of."""
    return list(SIZES) if world.toy else ["default"]


def critique_jobs(world: World) -> list[Job]:
    return [critique_job(world, size, critique) for size in sizes(world) for critique in (True, False)]


def gained(more: dict[str, list], less: dict[str, list]) -> dict[str, list]:
    """Score of one table minus another's, as a table of the prompts that both have."""
    both = set(less["prompt"])
    return {"prompt": [p for p in more["prompt"] if p in both], "pm_eval": stats.paired(more, less, "pm_eval")}


def critique(results: Sequence[Results]) -> dict[str, Any]:
    """Critiqued against direct revisions by size of the base model."""
    every = sizes(results[0].world)
    tables = {
        (size, how): [r.chains(critique_job(r.world, size, how)) for r in results]
        for size in every for how in (True, False)
    }  # fmt: skip
    last = max(next(iter(tables.values()))[0], key=int)
    names = columns(tables[every[0], True], "pm_eval", "harm", "malformed")
    weights = {size: 12 * SIZES[size][0] ** 2 * SIZES[size][1] for size in every}

    def gap(size: str, column: str, revision: str = last) -> dict[str, Any]:
        return stats.differences([t[revision] for t in tables[size, True]], [t[revision] for t in tables[size, False]],
                                 column)  # fmt: skip

    def value(size: str, how: bool, column: str) -> dict[str, Any]:
        return stats.means([t[last][column] for t in tables[size, how]])

    by_size = {
        f"{NAMES[name]} after {last} revisions": panel(
            "weights in the layers", NAMES[name],
            {word: [(weights[size], value(size, how, name)) for size in every]
             for how, word in ((True, "critiqued"), (False, "direct"))}, log=True,
        ) for name in names
    }  # fmt: skip
    panels = {
        f"critiqued minus direct, {size} model": panel(
            "revision", NAMES["pm_eval"], {size: [(int(k), gap(size, "pm_eval", k)) for k in tables[size, True][0]]}
        ) for size in every
    }  # fmt: skip
    if len(every) < 2:
        return {"panels": panels, "claims": [claim("needs models of several sizes", "", stats.NOT_TESTABLE)]}
    small, large = gap("small", "pm_eval"), gap("large", "pm_eval")
    gains = [[gained(t[last], u[last]) for t, u in zip(tables[size, True], tables[size, False], strict=True)]
             for size in ("small", "large")]  # fmt: skip
    closing = stats.differences(*gains, "pm_eval")
    margin = NEGLIGIBLE * abs(relative(tables["large", True], last, "pm_eval")["mean"])
    falls = stats.positive(closing) if stats.positive(small) == REPRODUCED else NOT_REPRODUCED
    claims = [
        above("Small models revise better with critiques (Fig. 7)", "smallest model, last revision: score with minus "
              "without", small),
        claim("The difference is smaller for large models (Fig. 7)", "the smallest model's gain by critiques is "
              "above 0, and above the largest model's, on every seed, interval above 0", falls, closing),
        claim("Critiques do not hurt large models (Fig. 7: always slightly better)", "largest model: the interval of "
              f"the gain lies above minus {NEGLIGIBLE:.0%} of what revisions gain; not reproduced if it lies below 0",
              stats.no_worse(large, margin), large),
    ]  # fmt: skip
    return {"panels": by_size | panels, "claims": claims}


FIGURES = (
    Figure("revisions", revisions_jobs, revisions),
    Figure("principles", principles_jobs, principles),
    Figure("critique", critique_jobs, critique),
)
