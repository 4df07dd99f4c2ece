"""What every stage asks of the engine, in tokens, from the configuration and the prompts' words alone.

Upper bounds: every conversation has data.max_prompt_tokens, every text is as long as it may become, and no chain or
pair is rejected. What the engine computes once is counted once: few-shot blocks, the prompt of several samples, the
conversation of a judge's questions, a critique's prompt before its revision.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cai_fast import pipeline, readers
from cai_fast.config import Config
from cai_fast.constitution import load as load_constitution
from cai_fast.records import Turn
from cai_fast.tokenizer import Rendered, Renderer, Tokenizer

FIRST_ANSWERS = 64  # that stage revise samples beforehand, to see whether the assistant refuses
TOY_ANSWER = 48  # tokens of the longest answer of the toy world, of which stage base samples two a comparison
STANDARDISE_SAMPLES = 256  # that stage rl scores before it begins, with rl.reward_transform = standardise
ANSWERS_AT_ONCE = 4  # times compare.chunk: answers that stage evaluate asks for in one call
_TURNS = (Turn("human", "x"),)


@dataclass(frozen=True)
class Phase:
    """Requests alike: `context` tokens each, few-shot block and all, then `new` sampled ones."""

    requests: int
    at_once: int
    """Requests of one call on one rank, at most."""
    context: int
    new: int
    prefill: int
    """Tokens computed for the prompts of all requests together."""
    block: int = 0
    """Tokens of the context that are a few-shot block."""

    @property
    def tokens(self) -> int:
        """Positions that a request needs."""
        return self.context + self.new


@dataclass(frozen=True)
class Work:
    """What one engine (or each of several equal ones) does for a stage."""

    name: str
    role: str
    """Whose model it is: assistant, judge or base."""
    room: int
    """Tokens of the longest request that it takes."""
    phases: tuple[Phase, ...] = ()
    blocks: tuple[int, ...] = ()
    """Tokens of each few-shot block, computed once."""
    scored: int = 0
    """Tokens computed to read options, without sampling."""
    kept: int = 0
    """Tokens of critiques to be continued, whose keys are held outside the cache as those of the blocks are."""
    engines: int = 1

    @property
    def prefill(self) -> int:
        """Tokens computed in packed passes."""
        return sum(self.blocks) + self.scored + sum(phase.prefill for phase in self.phases)

    @property
    def decode(self) -> int:
        """Tokens sampled."""
        return sum(phase.requests * phase.new for phase in self.phases)


@dataclass(frozen=True)
class Frame:
    """Tokens of a kind of prompt besides conversation and texts: the few-shot blocks, and the other words."""

    blocks: tuple[int, ...]
    words: int

    @property
    def block(self) -> int:
        """The longest block."""
        return max(self.blocks, default=0)


def limit(setting: int, available: int) -> int:
    """How many there are of what a setting bounds; 0 is all."""
    return min(setting or available, available)


def works(
    config: Config, counts: dict[str, int], renderer: Callable[[str], Renderer], cpu: bool, ranks: int = 1
) -> dict[str, list[Work]]:
    """The engines' work by stage, that of all ranks together; stages that make no engine are left out.

    counts: prompts by kind and split, see `prompt_counts`; renderer(role) of the model in that role.
    """
    deterministic = cpu if config.engine.deterministic == "auto" else bool(config.engine.deterministic)
    made: dict[str, list[Work]] = {}
    for stage in config.stages:
        if stage == "base":
            made[stage] = [_base(config, renderer("base"))]
        elif stage == "revise":
            made[stage] = [_revise(config, counts, renderer("assistant"), deterministic)]
        elif stage == "compare":
            made[stage] = [_compare(config, counts, renderer("base"))]
        elif stage == "label" and not config.label.from_:
            pairs = limit(config.compare.num_prompts, counts["red_team"]) * config.compare.pairs_per_prompt
            made[stage] = [_label(config, renderer("judge"), pairs)]
        elif stage == "rl" and config.rl.algorithm != "dpo":
            made[stage] = [_rl(config, ranks)]
        elif stage == "evaluate":
            made[stage] = _evaluate(config, counts, renderer, deterministic)
    return made


def _room(config: Config, renderer: Renderer, *lengths: int) -> int:
    return config.engine.max_len or pipeline.longest(renderer, config.data.max_prompt_tokens, *lengths)


def frame(rendered: list[Rendered], more: int = 0) -> Frame:
    """Of prompts about texts of one token; `more` tokens follow each."""
    blocks = {tuple(r.prefix) for r in rendered if r.prefix}
    return Frame(tuple(sorted(map(len, blocks))), max((len(r.ids) for r in rendered), default=0) + more)


def _base(config: Config, renderer: Renderer) -> Work:
    """The answers in the toy world's helpfulness comparisons."""
    prompt, count = config.data.max_prompt_tokens, 2 * config.base.comparisons
    phase = Phase(count, count // 2, prompt, TOY_ANSWER, count * prompt)
    return Work("base", "base", _room(config, renderer, TOY_ANSWER), (phase,))


def _revise(config: Config, counts: dict[str, int], renderer: Renderer, deterministic: bool) -> Work:
    cfg, prompt = config.revise, config.data.max_prompt_tokens
    red_team = limit(cfg.num_red_team, counts["red_team"])
    helpful = limit(cfg.num_helpful, counts["helpful"])
    first, samples = min(FIRST_ANSWERS, red_team), helpful * cfg.helpful_samples
    chains = _chains(config, renderer, red_team, deterministic)
    answers = (
        Phase(first, first, prompt, cfg.max_new_tokens, first * prompt),
        Phase(samples, min(cfg.chunk, samples), prompt, cfg.max_new_tokens, (helpful if samples else 0) * prompt),
    )
    return dataclasses.replace(chains, name="revise", phases=answers + chains.phases)


def _chains(config: Config, renderer: Renderer, count: int, deterministic: bool) -> Work:
    """`count` critique-revision chains."""
    cfg, prompt = config.revise, config.data.max_prompt_tokens
    answer, critique, steps = cfg.max_new_tokens, cfg.critique_max_new_tokens, count * cfg.rounds
    at_once, shot = min(cfg.chunk, count), 0 if cfg.few_shot else -1
    principles = renderer.prompts.constitution.principles_for("critique")
    phases = [Phase(count, at_once, prompt, answer, count * prompt)]
    kept = 0
    if cfg.critique:
        asked = frame([renderer.critique(_TURNS, "x", p, shot) for p in principles])
        suffix = max((len(renderer.revision_suffix(p)) for p in principles), default=0)
        own, whole = prompt + answer + asked.words, asked.block + prompt + answer + asked.words
        # The handle of a critique ends with its prompt, or in the fast mode with its last token but one.
        again = critique if deterministic else 1
        phases += [
            Phase(steps, at_once, whole, critique, steps * own, asked.block),
            Phase(steps, at_once, whole + critique + suffix, answer, steps * (again + suffix), asked.block),
        ]
        kept = at_once * (own + critique - again)
    else:
        asked = frame([renderer.direct_revision(_TURNS, "x", p, shot) for p in principles])
        own = prompt + answer + asked.words
        phases.append(Phase(steps, at_once, asked.block + own, answer, steps * own, asked.block))
    room = _room(config, renderer, 2 * answer, critique)
    return Work("chains", "assistant", room, tuple(phases), asked.blocks, kept=kept)


def _compare(config: Config, counts: dict[str, int], renderer: Renderer) -> Work:
    cfg, prompt = config.compare, config.data.max_prompt_tokens
    pairs = limit(cfg.num_prompts, counts["red_team"]) * cfg.pairs_per_prompt
    # Both answers of a pair have one prompt, but two models compute it twice.
    prompts = pairs + round(pairs * cfg.base_fraction)
    phase = Phase(2 * pairs, 2 * min(cfg.chunk, pairs), prompt, cfg.max_new_tokens, prompts * prompt)
    room = config.engine.max_len or pipeline.round_up(prompt + cfg.max_new_tokens)
    return Work("compare", "base", room, (phase,), engines=2 if cfg.base_fraction else 1)


def _label(config: Config, renderer: Renderer, pairs: int, *, measuring: bool = False) -> Work:
    """Questions about pairs of answers; `measuring`: between policies, for stage evaluate."""
    cfg, prompt = config.label, config.data.max_prompt_tokens
    answer = max(config.compare.max_new_tokens, config.evaluate.max_new_tokens if measuring else 0)
    asked = cfg.principles * (2 if measuring or cfg.orders == "both" else 1)  # a pair
    render, thought = renderer.cot if cfg.cot else renderer.comparison, cfg.cot_max_new_tokens if cfg.cot else 0
    shots = range(renderer.few_shot_pool) if cfg.few_shot else [-1]
    options = renderer.options("cot" if cfg.cot else "comparison")
    principles = renderer.prompts.constitution.principles_for("comparison")
    question = frame([render(_TURNS, "x", "x", p, shot) for p in principles for shot in shots], len(options.suffix))
    own, questions = prompt + 2 * answer + question.words, pairs * asked
    phases: tuple[Phase, ...] = ()
    # The questions of a pair under one few-shot block are a tree that begins with the conversation.
    trees = min(cfg.principles, max(1, len(question.blocks)))
    scored = pairs * trees * prompt + questions * (own - prompt)
    if cfg.cot:
        samples = questions * cfg.cot_samples
        at_once = samples * min(cfg.chunk, pairs) // max(1, pairs)
        phases = (Phase(samples, at_once, question.block + own, thought, scored, question.block),)
        scored += samples * (thought + len(renderer.cot_answer_suffix()))
    if options.sequences:  # whole options are scored, each after the whole prompt
        leaf = cfg.cot_samples * (thought + len(renderer.cot_answer_suffix())) if cfg.cot else 0
        scored = sum(questions * (question.block + own + leaf + len(ids)) for ids in options.sequences)
    room = _room(config, renderer, 2 * answer, thought)
    # Of the comparisons of a chunk, the keys of what chains of thought share.
    kept = min(cfg.chunk, pairs) * (trees * prompt + asked * question.words) if cfg.cot else 0
    return Work("label", "judge", room, phases, question.blocks, scored, kept)


def _rl(config: Config, ranks: int) -> Work:
    cfg, prompt = config.rl, config.data.max_prompt_tokens
    prompts = (cfg.steps + 1) * cfg.prompts_per_step  # the last policy answers too, for the guards
    at_once = -(-cfg.prompts_per_step * cfg.samples_per_prompt // ranks)  # ranks share the answers of one iteration
    phases = [Phase(prompts * cfg.samples_per_prompt, at_once, prompt, cfg.max_new_tokens, prompts * prompt)]
    if cfg.reward_transform == "standardise":
        n = STANDARDISE_SAMPLES
        phases.append(Phase(n, n, prompt, cfg.max_new_tokens, n * prompt))
    return Work("rl", "base", config.engine.max_len or pipeline.round_up(prompt + cfg.max_new_tokens), tuple(phases))


def _evaluate(
    config: Config, counts: dict[str, int], renderer: Callable[[str], Renderer], deterministic: bool
) -> list[Work]:
    """Answers of three policies, chains of the assistant, verdicts of the judge on three pairs of policies."""
    cfg, prompt = config.evaluate, config.data.max_prompt_tokens
    red_team, answered = held_out(config, counts)
    phase = Phase(
        3 * answered, min(ANSWERS_AT_ONCE * config.compare.chunk, answered), prompt, cfg.max_new_tokens,
        3 * answered * prompt,
    )  # fmt: skip
    room = config.engine.max_len or pipeline.round_up(prompt + cfg.max_new_tokens)
    made = [Work("evaluate: policies", "base", room, (phase,))]
    if red_team:
        chains = _chains(config, renderer("assistant"), red_team, deterministic)
        made.append(dataclasses.replace(chains, name="evaluate: chains"))
    if pairs := 3 * min(cfg.judge_pairs, red_team):
        verdicts = _label(config, renderer("judge"), pairs, measuring=True)
        made.append(dataclasses.replace(verdicts, name="evaluate: judge"))
    return made


def held_out(config: Config, counts: dict[str, int]) -> tuple[int, int]:
    """Held-out red-team prompts, and prompts of both kinds, that stage evaluate asks about."""
    red_team = limit(config.evaluate.num_red_team, counts["red_team_eval"])
    return red_team, red_team + limit(config.evaluate.num_helpful, counts["helpful_eval"])


@dataclass(frozen=True)
class Passes:
    """Tokens through packed passes other than the engine's: trained on (by one network), and only computed."""

    trained: int = 0
    scored: int = 0


def passes(config: Config, counts: dict[str, int]) -> dict[str, Passes]:
    """Training, and scores, log-probs and divergences outside the engine, by stage."""
    revise, prompt = config.revise, config.data.max_prompt_tokens
    answer, chosen = prompt + revise.max_new_tokens, config.sft.revisions
    revisions = {"all": revise.rounds, "last": 1}[chosen] if isinstance(chosen, str) else len(set(chosen))
    examples = limit(revise.num_red_team, counts["red_team"]) * revisions
    examples += limit(revise.num_helpful, counts["helpful"]) * revise.helpful_samples
    pairs = limit(config.compare.num_prompts, counts["red_team"]) * config.compare.pairs_per_prompt
    compared = (pairs + counts["preferences"]) * 2 * (prompt + config.compare.max_new_tokens)
    red_team, answered = held_out(config, counts)
    answers = 3 * answered * (prompt + config.evaluate.max_new_tokens)
    return dict.fromkeys(config.stages, Passes()) | {
        "base": Passes(config.base.steps * config.base.tokens_per_step),
        "sft": Passes(examples * answer * config.sft.epochs),
        "pm": Passes(compared * config.pm.epochs),
        "rl": _rl_passes(config, compared),
        # Preference scores of answers and revisions, and the divergence of two models on the answers.
        "evaluate": Passes(0, 3 * answers + (revise.rounds + 1) * red_team * answer),
    }


def _rl_passes(config: Config, compared: int) -> Passes:
    """Of stage rl; compared: tokens of all comparisons, of which DPO has half."""
    rl = config.rl
    if rl.algorithm == "dpo":
        half = -(-compared // 2)
        return Passes(half * rl.epochs, half)  # SL-CAI's log-probabilities, before training
    rollouts = rl.prompts_per_step * rl.samples_per_prompt * (config.data.max_prompt_tokens + rl.max_new_tokens)
    networks = 4 if rl.network in ("own", "pm") else 3  # preference model, policy, reference, a critic of its own
    again = rl.steps * rl.epochs if rl.kl_kind == "exact" else 0  # the reference, beside every pass of the policy
    every = config.guards.pm_eval_every
    judged = -(-(rl.steps + 1) // every) if every else 0
    return Passes(rl.steps * rollouts * rl.epochs, ((rl.steps + 1) * networks + judged + again) * rollouts)


def prompt_counts(config: Config) -> dict[str, int]:
    """Prompts by kind and split, and helpfulness comparisons, from the sources."""
    data, counts = config.data, {}
    for kind, limit in (("red_team", data.num_red_team), ("helpful", data.num_helpful)):
        prompts = pipeline.prompt_source(config, kind)[0]
        train = sum(p.split == "train" for p in prompts)
        counts[kind] = min(limit or train, train)
        counts[kind + "_eval"] = len(prompts) - train
    counts["preferences"] = config.base.comparisons if data.preferences else 0
    if data.preferences not in ("", pipeline.TOY):
        rows, _ = readers.read_comparisons(data.preferences, max_bad_fraction=data.max_bad_fraction)
        counts["preferences"] = len(rows)
    return counts


def renderers(config: Config) -> Callable[[str], Renderer]:
    """The renderer of the model in a role (assistant, base, judge), each made once."""
    constitution = load_constitution(config.data.constitution)

    @cache
    def of(name: str) -> Renderer:
        with tempfile.TemporaryDirectory() as scratch:
            if name == pipeline.TOY:  # its checkpoint may not be made yet
                from cai_fast.toy.pretrain import ToyTokenizer

                ToyTokenizer().save(Path(scratch))
            tokenizer = Tokenizer.load(scratch if name == pipeline.TOY else name)
        return Renderer(tokenizer, constitution, seed=config.seed, few_shot_pool=config.data.few_shot_pool)

    return lambda role: of(config.role(role))
