"""The engine: equality with the trainer and transformers, independence of batching, stopping, limits, slots."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import byte_tokenizer

from cai_fast.engine import Completion, Engine, Sampling, trunk
from cai_fast.errors import InputError
from cai_fast.model import Model, ModelConfig, init_random
from cai_fast.tokenizer import Tokenizer

VOCAB = 61
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
)


class Letters:
    """A tokenizer of one to three letters a token."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        pieces = [a + b for a in "abcdef" for b in "xyz\n:"]
        self.pieces = [*"abcdefxyz\n:", *pieces, *(p + "q" for p in pieces)][:VOCAB]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def make_model(config: ModelConfig = CONFIG, seed: int = 0) -> Model:
    # A large init makes attention and logits matter: with 0.02 every distribution would be nearly uniform.
    return init_random(config, seed, std=0.3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def some_prompts(count: int, seed: int = 0, longest: int = 70) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def engine(model: Model, **options: object) -> Engine:
    return Engine(model, **{"max_batch": 16, "max_len": 160, **options})


def replay(model: Model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [len(tokens), V] of the trainer's packed forward at the positions that predict `tokens`."""
    ids = torch.tensor(prompt + tokens)
    with torch.no_grad():
        hidden = model.hidden(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
        return F.linear(hidden, model.lm_head_weight)[len(prompt) - 1 : -1]


def test_greedy_equals_transformers(model: Model, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model.save(tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = some_prompts(6)
    found = engine(model).generate(prompts, Sampling(temperature=0, max_new_tokens=20, stop_token_ids=(3,)))
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=3, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert completion.token_ids == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers_forward(model: Model, temperature: float) -> None:
    prompts = some_prompts(20)
    found = engine(model).generate(prompts, Sampling(temperature=temperature, max_new_tokens=40))
    again = engine(model).logprobs(prompts, [c.token_ids for c in found], temperature=temperature)
    for prompt, completion, other in zip(prompts, found, again, strict=True):
        logits = replay(model, prompt, completion.token_ids)
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        tolerance = 1e-5 * logits.abs().max().item() / temperature
        assert (torch.tensor(completion.logprobs) - expected).abs().max() <= tolerance
        assert (torch.tensor(other) - expected).abs().max() <= tolerance


def test_sampled_frequencies_follow_the_model(model: Model) -> None:
    count, prompt, keys = 4000, [1, 2, 3], range(9, 4009)
    found = engine(model, max_batch=500).generate([prompt] * count, Sampling(max_new_tokens=1), keys=keys)
    seen = torch.bincount(torch.tensor([c.token_ids[0] for c in found]), minlength=VOCAB) / count
    expected = replay(model, prompt, [0])[0].softmax(-1)
    assert ((seen - expected).abs() <= 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()


WIDE = {"hidden_size": 640, "intermediate_size": 576, "num_layers": 1}  # past MKL's limit for unsplit sums


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 24, "model_type": "mistral"}, WIDE])
def test_bits_do_not_depend_on_batch_order_or_slots(shape: dict) -> None:
    model = make_model(replace(CONFIG, **shape))
    torch.set_num_threads(2 if shape is WIDE else 1)
    count, longest = (12, 8) if shape is WIDE else (40, 30)
    prompts, keys = some_prompts(count), [1000 + 7 * i for i in range(count)]
    sampling = [Sampling(max_new_tokens=5 + i % longest, stop_token_ids=(3,)) for i in range(count)]
    whole = engine(model, max_batch=16).generate(prompts, sampling, keys=keys)
    assert len({tuple(c.token_ids) for c in whole}) > 0.75 * count
    assert shape is WIDE or {c.finish_reason for c in whole} == {"stop", "length"}

    def subset(order: list[int], max_batch: int, prefill_tokens: int = 8192) -> None:
        runner = engine(model, max_batch=max_batch, prefill_tokens=prefill_tokens)
        chosen, laws = [prompts[i] for i in order], [sampling[i] for i in order]
        assert runner.generate(chosen, laws, keys=[keys[i] for i in order]) == [whole[i] for i in order]

    for i in (0, 7, count - 1):
        subset([i], 1)
    order = list(range(count))
    random.Random(1).shuffle(order)
    subset(order, 40)
    subset(order, 3, prefill_tokens=50)
    subset(order[: count // 2], 33)


def test_mixed_sampling_equals_alone(model: Model) -> None:
    prompts = some_prompts(24)
    sampling = [
        Sampling(
            temperature=(0.0, 0.6, 1.0)[i % 3], top_k=(0, 5)[i % 2], top_p=(1.0, 0.8)[i // 2 % 2], max_new_tokens=12
        )
        for i in range(24)
    ]
    whole = engine(model).generate(prompts, sampling)
    for i in range(0, 24, 5):
        assert engine(model).generate([prompts[i]], sampling[i], keys=[i]) == [whole[i]]
        if sampling[i].top_k:
            logits = replay(model, prompts[i], whole[i].token_ids)
            allowed = logits.topk(5).indices
            assert (allowed == torch.tensor(whole[i].token_ids)[:, None]).any(1).all()


@pytest.mark.parametrize("length", [1, 32, 37, 300, 700])
def test_prefix_changes_nothing(model: Model, length: int) -> None:
    shared, rest = [(7 * i + i // 5) % VOCAB for i in range(length)], some_prompts(12, seed=5, longest=40)
    runner, sampling = engine(model, max_len=800), Sampling(max_new_tokens=20)
    handle = runner.prefix(shared)
    plain = runner.generate([shared + p for p in rest] + [shared], sampling)
    found = runner.generate([*rest, []], sampling, prefix=handle)
    before = runner.counters["prefill_tokens"]
    found += runner.generate([rest[0], shared + rest[1]], sampling, prefix=[handle, None], keys=[0, 1])
    assert runner.counters["prefill_tokens"] - before == len(rest[0]) + len(shared + rest[1])
    for i, (a, b) in enumerate(zip(found, [*plain, *plain[:2]], strict=True)):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        scale = replay(model, shared + [*rest, [], *rest][i], a.token_ids).abs().max()
        assert (torch.tensor(a.logprobs) - torch.tensor(b.logprobs)).abs().max() <= 1e-5 * scale
    assert runner.generate(rest[3:5], sampling, prefix=handle, keys=[3, 4]) == found[3:5]


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("deterministic", [True, False])
def test_kept_keys_continue_at_any_cut(model: Model, deterministic: bool, page_size: int) -> None:
    runner = engine(model, deterministic=deterministic, page_size=page_size)
    sampling = Sampling(max_new_tokens=9)
    shared, own = some_prompts(2, seed=8, longest=25)
    handle = runner.prefix(shared)
    (first,) = runner.generate([own], sampling, prefix=handle, keep=True)
    kept = first.kept
    assert first == runner.generate([own], sampling, prefix=handle)[0]  # and then nothing is kept:
    assert runner.generate([own], sampling)[0].kept is None
    said = [] if deterministic else first.token_ids[:-1]
    assert list(kept.token_ids) == shared + own + said and kept.stretches[0] is handle.stretches[0]
    prompt = [*kept.token_ids, 5, 6, 7]
    (want,) = runner.generate([prompt], sampling)
    parts = [kept.cut(n) for n in range(len(kept) + 1)]
    assert parts[-1] is kept and [len(part) for part in parts] == [part.kv.shape[3] for part in parts]
    before = runner.counters["prefill_tokens"]
    found = runner.generate([prompt[len(p) :] for p in parts], sampling, prefix=parts, keys=[0] * len(parts))
    assert runner.counters["prefill_tokens"] - before == sum(len(prompt) - len(p) for p in parts)
    scale = replay(model, prompt, want.token_ids).abs().max()
    for completion in found:
        assert completion.token_ids == want.token_ids
        assert (torch.tensor(completion.logprobs) - torch.tensor(want.logprobs)).abs().max() <= 1e-5 * scale
        assert not deterministic or page_size or completion == want  # so short, even to the bit
    with pytest.raises(InputError, match="prompt 0 is empty"):
        runner.generate([[]], sampling, prefix=kept)
    runner.invalidate()
    with pytest.raises(InputError, match="other weights"):
        runner.generate([[4]], sampling, prefix=kept.cut(3))


@pytest.mark.parametrize("page_size", [0, 16])
def test_requests_that_move_keep_their_own_keys(model: Model, page_size: int) -> None:
    runner, prompts = engine(model, max_batch=5, page_size=page_size), some_prompts(30, seed=2)
    sampling = [Sampling(max_new_tokens=i % 7) for i in range(30)]
    done = runner.generate(prompts, sampling, keep=True)
    for i, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
        assert (completion.kept is None) == (i % 7 == 0)
        if completion.kept is not None:
            assert list(completion.kept.token_ids) == prompt
            assert torch.equal(completion.kept.kv, runner.prefix(prompt).kv)


def test_stale_prefix_is_refused() -> None:
    model = make_model()
    runner = engine(model)
    handle = runner.prefix([1, 2, 3])
    runner.invalidate()
    with pytest.raises(InputError, match="other weights"):
        runner.generate([[4]], Sampling(max_new_tokens=1), prefix=handle)
    handle = runner.prefix([1, 2, 3])
    with pytest.raises(InputError, match="by another engine"):
        engine(make_model(seed=1)).generate([[4]], Sampling(max_new_tokens=1), prefix=handle)
    with torch.no_grad():
        model.lm_head_weight.mul_(1.5)
    with pytest.raises(InputError, match="other weights"):
        runner.score([[4]], [[1], [2]], prefix=handle)


def test_weight_changes_show(model: Model) -> None:
    changed = make_model()
    runner = engine(changed)
    first = runner.generate([[1, 2]], Sampling(temperature=0, max_new_tokens=30))
    changed.load_state_dict(make_model(seed=1).state_dict())
    second = runner.generate([[1, 2]], Sampling(temperature=0, max_new_tokens=30))
    assert first != second
    assert second == engine(make_model(seed=1)).generate([[1, 2]], Sampling(temperature=0, max_new_tokens=30))


def test_equal_prompts_are_prefilled_once(model: Model) -> None:
    prompts, sampling = some_prompts(3, longest=30), Sampling(max_new_tokens=8)
    runner = engine(model)
    found = runner.generate([p for p in prompts for _ in range(4)], sampling, keys=range(12))
    assert runner.counters["prefill_tokens"] == sum(map(len, prompts))
    for i, completion in enumerate(found):
        assert engine(model).generate([prompts[i // 4]], sampling, keys=[i]) == [completion]
    assert len({tuple(c.token_ids) for c in found[:4]}) > 1


@pytest.mark.parametrize("page_size", [0, 16])
def test_samples_of_a_prompt_share_it_over_several_admissions(model: Model, page_size: int) -> None:
    prompts, sampling = some_prompts(3, longest=40), [Sampling(max_new_tokens=9 + i % 7) for i in range(36)]
    asked = [prompts[i // 12] for i in range(36)]
    runner, apart = engine(model, max_batch=5, page_size=page_size), engine(model, page_size=page_size)
    found = runner.generate(asked, sampling)
    assert found == apart.generate(asked, sampling)
    handle = runner.prefix([1, 2, 3])
    assert runner.counters["prefill_tokens"] == sum(map(len, prompts)) + 3
    whole = runner.generate([[]] * 12, sampling[:12], prefix=handle)
    assert whole == runner.generate([[1, 2, 3]] * 12, sampling[:12]) or page_size


def test_empty_requests_and_generations(model: Model) -> None:
    runner = engine(model)
    assert runner.generate([], Sampling()) == []
    seen: list[int] = []
    assert (
        runner.generate([[5], [6]], Sampling(max_new_tokens=0), progress=lambda i, c: seen.append(i))
        == [Completion([], [], "length")] * 2
    )
    assert sorted(seen) == [0, 1]
    first = runner.generate([[5]], Sampling(temperature=0, max_new_tokens=4))[0].token_ids[0]
    stopped = runner.generate([[5]], Sampling(temperature=0, max_new_tokens=4, stop_token_ids=(60, first)))
    assert stopped[0].token_ids == [first] and stopped[0].finish_reason == "stop"


def test_stop_token_at_the_limit_counts_as_stop(model: Model) -> None:
    tokens = engine(model).generate([[5]], Sampling(max_new_tokens=9))[0].token_ids
    last = tokens[-1]
    cut = tokens.index(last) + 1
    found = engine(model).generate([[5]], Sampling(max_new_tokens=cut, stop_token_ids=(last,)))[0]
    assert (found.token_ids, found.finish_reason) == (tokens[:cut], "stop")


def test_stop_strings_across_token_borders(model: Model) -> None:
    letters, prompts = Letters(), some_prompts(60)
    free = engine(model).generate(prompts, Sampling(max_new_tokens=60))
    stops = ("ax", "\nb", "zzzz", "yc:")
    runner = engine(model, tokenizer=letters)
    sampling = [Sampling(max_new_tokens=60, stop_strings=stops if i % 3 else ()) for i in range(60)]
    borders = 0
    for i, found in enumerate(runner.generate(prompts, sampling)):
        tokens, reason = free[i].token_ids, "length"
        if i % 3:
            for n in range(1, len(tokens) + 1):
                if any(stop in letters.decode(tokens[:n]) for stop in stops):
                    borders += not any(stop in letters.pieces[tokens[n - 1]] for stop in stops)
                    tokens, reason = tokens[:n], "stop"
                    break
        assert (found.token_ids, found.finish_reason) == (tokens, reason)
    assert borders >= 5
    with pytest.raises(InputError, match="tokenizer"):
        engine(model).generate([[1]], sampling[1])


def test_stop_strings_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_tokenizer(tmp_path))
    model = make_model(replace(CONFIG, vocab_size=tokenizer.vocab_size))
    prompts, stops = some_prompts(80), (" a", "e\n", "n:", "é")
    free = engine(model).generate(prompts, Sampling(max_new_tokens=80))
    found = engine(model, tokenizer=tokenizer).generate(prompts, Sampling(max_new_tokens=80, stop_strings=stops))
    assert len({c.finish_reason for c in found}) == 2
    for a, b in zip(free, found, strict=True):
        ends = (n for n in range(1, 81) if any(stop in tokenizer.decode(a.token_ids[:n]) for stop in stops))
        assert b.token_ids == a.token_ids[: next(ends, 80)]


def test_overflow_and_bad_arguments_are_named(model: Model) -> None:
    runner = engine(model, max_len=20)
    assert runner.generate([[1] * 15], Sampling(max_new_tokens=5))[0].finish_reason == "length"
    with pytest.raises(ValueError, match=r"prompt 1 has 16 tokens; with max_new_tokens 5 .* max_len 20"):
        runner.generate([[1], [1] * 16], Sampling(max_new_tokens=5))
    with pytest.raises(InputError, match="prompt 0 is empty"):
        runner.generate([[]], Sampling())
    with pytest.raises(InputError, match="prompt 1 has token ids from 2 to 61; the model's are 0 to 60"):
        runner.generate([[1], [2, VOCAB]], Sampling(max_new_tokens=1))
    with pytest.raises(InputError, match="found the string 'END'"):
        Sampling(stop_strings="END")
    with pytest.raises(InputError, match="keys has 1 entries for 2 prompts"):
        runner.generate([[1], [2]], Sampling(max_new_tokens=1), keys=[1])
    with pytest.raises(InputError, match="max_len"):
        Engine(model, max_len=5000)
    wrong = {"temperature": -1.0, "top_p": 0.0, "top_k": -1, "max_new_tokens": -1, "stop_strings": ("",)}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=name.replace("_strings", " string")):
            Sampling(**{name: value})


def test_poisoned_slots_do_not_leak(model: Model) -> None:
    prompts, sampling = some_prompts(5), Sampling(max_new_tokens=10)
    runner = engine(model)
    expected = runner.generate(prompts, sampling)
    runner._cache.kv.fill_(1e30)
    assert runner.generate(prompts, sampling) == expected


def test_progress_reports_every_request_once(model: Model) -> None:
    seen: dict[int, Completion] = {}
    found = engine(model).generate(some_prompts(50), Sampling(max_new_tokens=6), progress=seen.__setitem__)
    assert [seen[i] for i in range(50)] == found


def test_ten_thousand_requests_leave_no_slot_behind() -> None:
    model = make_model(
        ModelConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=16,
            max_position_embeddings=64,
        )
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(16) for _ in range(rng.randint(1, 6))] for _ in range(10_000)]
    sampling = [Sampling(max_new_tokens=rng.randint(0, 8), stop_token_ids=(3,)) for _ in prompts]
    runner = Engine(model, max_batch=256, max_len=16)
    found = runner.generate(prompts, sampling)
    assert all(len(c.token_ids) <= s.max_new_tokens for c, s in zip(found, sampling, strict=True))
    assert all((c.finish_reason == "stop") == (3 in c.token_ids) for c in found)
    assert runner.counters["generated_tokens"] == sum(len(c.token_ids) for c in found)
    for i in range(0, 10_000, 997):
        assert runner.generate([prompts[i]], sampling[i], keys=[i]) == [found[i]]


def test_few_rows_are_padded_only_as_far_as_this_machine_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = frozenset({(48, VOCAB), (100, 48)})

    def multiple() -> int:
        trunk.row_multiple.cache_clear()
        return trunk.row_multiple(shapes, torch.float32, torch.get_num_threads())

    found, linear = multiple(), F.linear
    assert found in (4, 8, 16, 32)
    for width, out in shapes:
        x, weight = torch.randn(32, width), torch.randn(out, width)
        for rows in range(found, 32, found):
            assert torch.equal(linear(x[:rows], weight), linear(x, weight)[:rows])
    # Where the number of rows matters below 12, as if another kernel took over, 4 and 8 are not enough.
    monkeypatch.setattr(trunk.F, "linear", lambda x, w: linear(x, w) * (1 + 1e-6 * (len(x) < 12)))
    assert multiple() == 16
    monkeypatch.setattr(trunk.F, "linear", lambda x, w: linear(x, w) * (1 + 1e-6 * (len(x) % 32)))
    assert multiple() == 32
    monkeypatch.setattr(trunk, "PROBED", 10)
    assert multiple() == 32
    trunk.row_multiple.cache_clear()
