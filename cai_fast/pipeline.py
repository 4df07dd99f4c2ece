"""What the stages share: the context of a run, the roles, the prompts, and journaled work.

Stages exchange files of the run folder and never import each other; everything two of them need is here.
"""

import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cai_fast import heartbeat, readers, records, rng
from cai_fast.config import Config, stage_settings
from cai_fast.constitution import Constitution
from cai_fast.constitution import load as load_constitution
from cai_fast.distributed import Distributed, Stopped, stop_requested
from cai_fast.engine import COUNTERS, Completion, Engine, Sampling
from cai_fast.errors import InputError
from cai_fast.files import hash_file
from cai_fast.hashing import hash_model
from cai_fast.model import Model
from cai_fast.model import load as load_model
from cai_fast.records import Comparison, Journal, Prompt
from cai_fast.rundir import CONSTITUTIONS, SNAPSHOT, RunDir
from cai_fast.runlog import Progress, RunLog
from cai_fast.scorer import MICRO_TOKENS, Scorer
from cai_fast.tokenizer import Renderer, Tokenizer

TOY = "toy"
CHECKPOINTS = "checkpoints"
KeyParts = list[int | str]  # what an RNG key is made of: seed, stage, sample id, draw
TABLE = ("harm", "helpful", "evasive", "objection", "malformed", "refusal_rate", "pm_score", "kl", "length")


def weight_type(config: Config, device_type: str) -> torch.dtype:
    """dtype of the models' weights on "cpu" or "cuda"."""
    name = config.model.dtype
    if name == "auto":
        name = "float32" if device_type == "cpu" else "bfloat16"
    return getattr(torch, name)


@dataclass
class Context:
    """Everything a stage works with."""

    config: Config
    run: RunDir
    log: RunLog
    dist: Distributed
    constitution: Constitution
    engines: weakref.WeakSet[Engine | Scorer] = field(default_factory=weakref.WeakSet)
    bar: Progress | None = None  # the one that was opened last
    _hashes: dict[str, str] = field(default_factory=dict)
    _counted: int = 0  # tokens that `work` has taken from the counters

    @property
    def device(self) -> torch.device:
        """Where models live on this rank."""
        return self.dist.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute type of models: float32 on CPU, bfloat16 on CUDA unless `model.dtype` says otherwise."""
        return weight_type(self.config, self.device.type)

    def checkpoint(self, name: str) -> Path:
        """Folder of a checkpoint this run makes."""
        return self.run.path(CHECKPOINTS, name)

    def folder(self, role: str) -> Path:
        """Folder of the model in `role`: base, assistant, judge, pm_init, or the name of a checkpoint of this run."""
        if role in ("sl_cai", "pm", "pm_eval", "rl_cai") or role.startswith(SNAPSHOT):
            return self._made(role)
        name = self.config.pm.init or self.config.model.base if role == "pm_init" else self.config.role(role)
        return self._made("base") if name == TOY else Path(name)

    def _made(self, name: str) -> Path:
        folder, made = self.checkpoint(name), {"sl_cai": "sft", "rl_cai": "rl", "pm_eval": "pm"}
        stage = "rl" if name.startswith(SNAPSHOT) else made.get(name, name)
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} not found; run stage {stage} first.")
        return folder

    def model(self, role: str, head: str | None = None, **options: Any) -> Model:
        """The model in `role`, on this rank's device; `options` as for `model.load`."""
        return load_model(self.folder(role), **({"dtype": self.dtype, "device": self.device, "head": head} | options))

    def renderer(self, role: str) -> Renderer:
        """The prompt renderer for the model in `role`."""
        tokenizer = Tokenizer.load(self.folder(role))
        return Renderer(
            tokenizer, self.constitution, seed=self.config.seed, few_shot_pool=self.config.data.few_shot_pool
        )

    def model_hash(self, role: str) -> str:
        """Content hash of the model in `role`."""
        folder = str(self.folder(role))
        if folder not in self._hashes:
            self._hashes[folder] = hash_model(folder)
        return self._hashes[folder]

    def template_hash(self, role: str) -> str:
        """Hash of the renderer for the model in `role`."""
        key = f"template of {self.folder(role)}"
        if key not in self._hashes:
            self._hashes[key] = self.renderer(role).hash
        return self._hashes[key]

    @property
    def deterministic(self) -> bool:
        """Whether engines and scorers give the same bits whatever the batch."""
        chosen = self.config.engine.deterministic
        return self.device.type == "cpu" if chosen == "auto" else bool(chosen)

    def scorer(self, model: Model, max_tokens: int = MICRO_TOKENS) -> Scorer:
        """A preference model that scores, at most `max_tokens` tokens a pass, with its work counted."""
        scorer = Scorer(model, max_tokens=max_tokens, deterministic=self.deterministic)
        self.engines.add(scorer)
        return scorer

    def engine(self, model: Model, renderer: Renderer, max_len: int) -> Engine:
        """A generation engine for sequences of up to `max_len` tokens (prompt and response)."""
        settings = self.config.engine
        limit = self.config.model.max_len or model.config.max_position_embeddings
        needed = settings.max_len or max_len
        if needed > limit:
            raise InputError(
                f"{renderer.tokenizer.source_path}: sequences of up to {needed} tokens are needed (prompt, few-shot "
                f"examples, answers), the model has {limit} positions. Lower data.max_prompt_tokens or the stage's "
                "max_new_tokens, switch few_shot off, or set engine.max_len."
            )
        engine = Engine(
            model,
            max_batch=settings.max_batch,
            max_len=needed,
            deterministic=self.deterministic,
            prefill_tokens=settings.prefill_tokens,
            tokenizer=renderer.tokenizer,
            page_size=None if settings.page_size < 0 else settings.page_size,
            num_pages=settings.num_pages or None,
            longest_first=settings.longest_first,
            shared_decode=None if settings.shared_decode == "auto" else settings.shared_decode,
        )
        self.engines.add(engine)
        return engine

    def tokens(self) -> int:
        """Tokens that have passed through this rank's engines and scorers, prompts included, up to this moment."""
        return self._counted + sum(engine.counters["trunk_tokens"] for engine in self.engines)

    def progress(
        self, total: int, desc: str, unit: str, *, initial: int = 0, done: Callable[[], int] | None = None
    ) -> Progress:
        """A progress bar that shows the engines' tokens too; see `tick`."""
        done = None if self.dist.world == 1 else done
        self.bar = self.log.progress(total, desc, unit, initial=initial, done=done, tokens=self.tokens)
        return self.bar

    def tick(self, index: int, completion: Completion) -> None:
        """`progress` of `Engine.generate`: keeps the bar moving while a chunk of long texts is at work.

        After a stop signal it raises Stopped, so that the signal does not wait for the chunk, whose texts are lost.
        """
        heartbeat.beat()
        if self.bar is not None:
            self.bar.tick()
        if stop_requested():
            raise Stopped

    def log_work(self, stage: str, step: int, seconds: float) -> None:
        """Collective: log `work`, if there was any."""
        if values := self.work(seconds):
            self.log.metrics(stage, step, values)

    def work(self, seconds: float) -> dict[str, float]:
        """Collective: work counters of the engines and scorers used since the last call, over all ranks."""
        counts = dict.fromkeys(COUNTERS, 0.0)
        for engine in self.engines:
            for name in COUNTERS:
                counts[name] += engine.counters[name]
                engine.counters[name] = 0
        self._counted += int(counts["trunk_tokens"])
        counts = self.dist.all_reduce_sum(counts | {"seconds": seconds})
        if not counts["trunk_tokens"]:
            return {}
        generated = max(1.0, counts["generated_tokens"])
        minimum = counts["prefill_tokens"] + counts["generated_tokens"]
        return {
            "perf/tokens_per_s": minimum * self.dist.world / counts["seconds"],
            "perf/trunk_over_minimum": counts["trunk_tokens"] / minimum,
            "perf/prefill_over_prompts": counts["prefill_tokens"] / max(1.0, counts["prompt_tokens"]),
            "perf/padding_tokens": counts["padding_tokens"],
            "perf/head_rows_per_token": counts["head_rows"] / generated,
            "perf/kv_bytes_per_token": counts["kv_bytes"] / generated,
            "perf/host_syncs_per_token": counts["host_syncs"] / generated,
        }

    def inputs(self, stage: str, *, files: Sequence[str] = (), roles: Sequence[str] = ()) -> dict[str, Any]:
        """Fingerprint of all that `stage` depends on: settings, constitution, models, files of earlier stages."""
        return {
            "settings": stage_settings(self.config, stage),
            "constitution": self.constitution.hash,
            "models": {role: self.dist.on_main(lambda role=role: self.model_hash(role)) for role in roles},
            "templates": {role: self.template_hash(role) for role in roles},
            "files": {name: self.run.output_hash(name) for name in files},
        }

    def key(self, stage: str, sample_id: str, draw: int = 0) -> int:
        """RNG key of one draw: independent of batch, rank and time."""
        return rng.key(*self.key_parts(stage, sample_id, draw))

    def key_parts(self, stage: str, sample_id: str, draw: int = 0) -> KeyParts:
        """The arguments of `rng.key` for that draw, as provenance holds them."""
        return [self.config.seed, stage, sample_id, draw]


def open_context(config: Config, run: RunDir, log: RunLog, dist: Distributed) -> Context:
    """The context of a run whose folder is open; the text of its constitution is kept there for rows to refer to."""
    constitution = load_constitution(config.data.constitution)
    dist.on_main(lambda: run.keep(f"{CONSTITUTIONS}/{constitution.hash}.json", constitution.to_json()))
    return Context(config, run, log, dist, constitution)


def provenance(ctx: Context, role: str, renderer: Renderer, spec: Sampling | None, **more: Any) -> dict[str, Any]:
    """Where a generated row comes from; `more` adds keys, parents and few-shot ids."""
    row: dict[str, Any] = {
        "role": role,
        "model": ctx.model_hash(role),
        "constitution": ctx.constitution.hash,
        "template": renderer.hash,
    }
    if spec is not None:
        row["sampling"] = asdict(spec)
    return row | more


def sampling(renderer: Renderer, kind: str, temperature: float, max_new_tokens: int) -> Sampling:
    """The sampling specification of one kind of text, with its stop tokens and strings."""
    stop_token_ids, stop_strings = renderer.stops(kind)
    return Sampling(temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=tuple(stop_token_ids),
                    stop_strings=tuple(stop_strings))  # fmt: skip


def prompt_source(ctx_or_config: Context | Config, kind: str) -> tuple[list[Prompt], list[readers.Rejected]]:
    """All prompts of one kind from the configured source, and the rejected rows."""
    config = ctx_or_config.config if isinstance(ctx_or_config, Context) else ctx_or_config
    spec = config.data.red_team if kind == "red_team" else config.data.helpful
    if spec == TOY:
        from cai_fast.toy import world

        return (world.red_team_prompts() if kind == "red_team" else world.helpful_prompts()), []
    return readers.read_prompts(
        spec, kind, max_bad_fraction=config.data.max_bad_fraction, eval_fraction=config.data.eval_fraction
    )


def take(ctx: Context, prompts: Sequence[Prompt], name: str, count: int) -> list[Prompt]:
    """`count` of the prompts (0: all), drawn by the run's seed, in their own order."""
    if not count or count >= len(prompts):
        return list(prompts)
    order = rng.permutation(ctx.key("take", name), len(prompts))
    return [prompts[index] for index in sorted(order[:count])]


def load_prompts(ctx: Context, *, kind: str | None = None, split: str | None = None) -> list[Prompt]:
    """Prompts of prompts.jsonl, filtered."""
    path = ctx.run.path("prompts.jsonl")
    if not path.is_file():
        raise InputError(f"{path} not found; run stage revise first.")
    rows = records.read_jsonl(path, Prompt)
    return [p for p in rows if kind in (None, p.kind) and split in (None, p.split)]


def load_comparisons(ctx: Context) -> list[Comparison]:
    """Rows of comparisons.jsonl."""
    path = ctx.run.path("comparisons.jsonl")
    if not path.is_file():
        raise InputError(f"{path} not found; run stage compare first.")
    return records.read_jsonl(path, Comparison)


def journaled(
    ctx: Context,
    stage: str,
    ids: Sequence[str],
    chunk: int,
    process: Callable[[list[str]], Iterator[dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """Do `process` for every id once, in chunks of at most `chunk` pulled from one shared counter; survive a kill.

    `process(chunk of ids)` yields one JSON row per id, each holding its "id". Rows already journaled, by any rank
    of any earlier attempt, are not redone. Returns every row by id, in the order of `ids`.
    """
    # Rank 0 reads for all: on a shared file system the others may see less, and would cut other chunks.
    done = set(ctx.dist.on_main(lambda: sorted(_journal_rows(ctx, stage))))
    pending = [item for item in ids if item not in done]
    chunk = _chunk(ctx, len(pending), chunk)
    chunks = [pending[start : start + chunk] for start in range(0, len(pending), chunk)]
    began = time.monotonic()
    ctx.dist.barrier()  # nobody appends before everybody has read
    if done and pending:
        ctx.log.info(f"{stage}: {len(ids) - len(pending)} of {len(ids)} rows were already done")
    rows_done = ctx.dist.fresh("rows")
    known = len(ids) - len(pending)
    with ctx.progress(len(ids), stage, "row", initial=known, done=lambda: ctx.dist.add(rows_done, 0)) as bar:
        with ctx.run.journal(stage, ctx.dist.rank) as journal:

            def work(number: int) -> None:
                expected = dict.fromkeys(chunks[number])
                heartbeat.at(stage, _naming(expected))
                for row in process(chunks[number]):
                    del expected[row["id"]]
                    journal.append(row)
                    ctx.dist.add(rows_done, 1)
                    heartbeat.at(stage, _naming(expected))
                    bar.update(1)
                if expected:
                    raise RuntimeError(f"{stage}: {len(expected)} rows of a chunk were lost, e.g. {min(expected)}")

            ctx.dist.share(len(chunks), work)
    ctx.dist.barrier()
    ctx.log_work(stage.split(".")[0], len(ids), time.monotonic() - began)
    rows = _journal_rows(ctx, stage)
    if missing := [item for item in ids if item not in rows]:
        raise RuntimeError(
            f"{ctx.run.path('journal')}: rank {ctx.dist.rank} does not see {len(missing)} rows of {stage} that other "
            "ranks have written; is the run folder on one file system that all nodes share? Run the same command again"
        )
    return {item: rows[item] for item in ids}


def _naming(ids: Collection[str]) -> str:
    """The first of some ids, and how many more there are."""
    first = next(iter(ids), "")
    return f"{first} and {len(ids) - 1} more" if len(ids) > 1 else first


def _journal_rows(ctx: Context, stage: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(ctx.run.path("journal").glob(f"{stage}.[0-9]*.jsonl")):
        with Journal(path) as journal:
            rows.update((row["id"], row) for row in journal.rows())
    return rows


def _chunk(ctx: Context, total: int, chunk: int) -> int:
    """Items in a chunk, at most `chunk`: few enough that every rank gets several, but as many as an engine takes at
    once where there are that many for every rank."""
    world, batch = ctx.dist.world, ctx.config.engine.max_batch
    share = max(-(-total // (4 * world)), min(batch, -(-total // world)))
    return chunk if world == 1 else max(1, min(chunk, share))


def longest(renderer: Renderer, *lengths: int) -> int:
    """Token slots for texts of these lengths inside any prompt of `renderer`, in blocks of 64.

    `overhead` renders every principle; the 16 are for texts that cost a token more where they meet.
    """
    return round_up(renderer.overhead + sum(lengths) + 16)


def round_up(length: int) -> int:
    """The next multiple of 64."""
    return -(-length // 64) * 64


def check(config: Config, here: bool = False) -> list[str]:
    """Validate every input before any work: lines to print, or InputError; here: for a run that begins now."""
    from cai_fast import preflight

    return preflight.check(config, here)


def data_file_hash(spec: str) -> str:
    """Hash of an input file, or the word toy."""
    return TOY if spec in ("", TOY) else hash_file(Path(spec))


def summary_lines(run: RunDir) -> list[str]:
    """The final table: every policy's metrics if there is an evaluation, and where the report is."""
    record = run.record("evaluate")
    lines = []
    if record is not None and record["status"] == "finished":
        for group in ("red_team", "benign"):
            rows = {policy: groups[group] for policy, groups in record["summary"].items()}
            names = [name for name in TABLE if name in rows["base"]]
            lines += ["", f"{group + ' prompts':22}" + "".join(f"{name:>13}" for name in names)]
            for policy, metrics in rows.items():
                lines.append(f"  {policy:20}" + "".join(f"{round(metrics[name], 3) + 0.0:13.3f}" for name in names))
        lines += ["", f"Means over prompts; kl: nats per answer from SL-CAI. Intervals: {run.path('evaluation.json')}"]
    if run.path("report.html").is_file():
        lines += ["", f"Report: {run.path('report.html')}"]
    return lines
