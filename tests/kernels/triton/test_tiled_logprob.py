"""The head's statistics without logits, as tiles and as one kernel: fp64 references, poison, planted faults, sm_90."""

import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cai_fast.kernels import linear_logprob
from cai_fast.kernels.triton import fused_logprob, tiles
from guarded import error, same_under_poison
from mutants import mutant
from sm90 import SHARED_LIMIT, Case, check, compile_all
from torch import Tensor

# numpy's, for rows that are NaN: on purpose, or 0 x -inf in a block's rows beyond the batch, which are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

FORMS = (tiles, fused_logprob)
DTYPES = (torch.float32, torch.bfloat16)
ROWS = {tiles: 7, fused_logprob: 19}  # a chunk of tiles, a block of the kernel and a part of the next
WIDTH = 24  # not a multiple of the small BLOCK_WIDTH
SMALL = {
    "CHUNK": 4, "TILE": 32, "BLOCK_ROWS": 16, "BLOCK_COLUMNS": 16, "BLOCK_WIDTH": 16, "SPLIT": 32, "GROUP": 2,
    "MAX_ROWS": 48, "MERGE_ROWS": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, tiles and chunks so small that every test crosses their borders."""
    for module in FORMS:
        for name, value in SMALL.items():
            monkeypatch.setattr(module, name, value, raising=False)


def grid(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/8 up to 2: products and their sums are exact in every type used here."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed)) / 8


def head(case: str, dtype: torch.dtype, rows: int = 19, vocab: int = 77) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [N, H], weight [V, H], targets [N]); hidden's last column is 1, weight's last is added to the logits."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(rows, WIDTH, generator=g), torch.randn(vocab, WIDTH, generator=g) / 3
    hidden[:, -1], weight[:, -1] = 1.0, 0.0
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[:2], targets[-2:] = torch.tensor([0, vocab - 1])[:rows], torch.tensor([vocab - 1, 0])[:rows]
    match case:
        case "peaked tail":  # mass in the last block, which the vocabulary fills in part
            weight[-1, -1] = 20.0
        case "negative":  # a column beyond V taken for logit 0 would win (verl #2899)
            weight[:, -1] = -30.0
        case "first tile absent":
            weight[:33, -1] = -torch.inf
        case "middle tile absent":
            weight[32:64, -1] = -torch.inf
        case "last tile absent":
            weight[64:, -1] = -torch.inf
        case "one left":
            weight[:-1, -1] = -torch.inf
        case "rising":  # every tile brings a new maximum, and the ones before still count
            weight[:, -1] = torch.arange(vocab) * 0.125
        case "borders":  # targets on either side of the borders of tiles and blocks
            targets = (torch.arange(rows) * 16 - torch.arange(rows) % 2) % vocab
    return hidden.to(dtype), weight.to(dtype), targets


CASES = ("plain", "peaked tail", "negative", "first tile absent", "middle tile absent", "last tile absent", "one left",
         "rising", "borders")  # fmt: skip


def by_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    z = hidden.to(dtype) @ weight.to(dtype).t() / temperature
    logp = z.log_softmax(-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), z.logsumexp(-1), entropy


def check_statistics(
    module: ModuleType, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 0.7
) -> Tensor:
    """As exact as torch in fp32 on the same inputs, the same bits whatever the memory held, and within their ranges."""
    ours = same_under_poison(lambda: module.statistics(hidden, weight, targets, temperature).unbind())
    exact, torchs = (by_torch(hidden, weight, targets, temperature, d) for d in (torch.float64, torch.float32))
    for number, (a, b, c) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        slack = 1e-6 * max([1.0, *c[c.isfinite()].abs().tolist()])
        assert error(a, c) <= 2 * error(b, c) + slack, (number, error(a, c), error(b, c))
    assert (ours[0] <= 0).all()
    assert (ours[2] >= -1e-6).all() and (ours[2] <= math.log(weight.shape[0]) + 1e-5).all()
    return torch.stack(ours)


@pytest.mark.parametrize("module", FORMS)
@pytest.mark.parametrize(
    "case,dtype", [*((case, torch.bfloat16) for case in CASES), ("plain", torch.float32), ("rising", torch.float32)]
)
def test_as_exact_as_torch(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    check_statistics(module, *head(case, dtype, ROWS[module]))


@pytest.mark.parametrize("rows,vocab", [(0, 5), (1, 257), (3, 1), (4, 2), (5, 32), (8, 33), (9, 31), (5, 64)])
def test_sizes_around_chunks_and_tiles(rows: int, vocab: int) -> None:
    check_statistics(tiles, *head("plain", torch.bfloat16, rows, vocab))


@pytest.mark.parametrize("rows,vocab", [(0, 5), (1, 257), (15, 1), (16, 2), (17, 32), (31, 33), (40, 77), (49, 64)])
def test_sizes_around_blocks_groups_and_splits(rows: int, vocab: int) -> None:
    check_statistics(fused_logprob, *head("plain", torch.bfloat16, rows, vocab))


@pytest.mark.parametrize("module", FORMS)
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_temperature(module: ModuleType, temperature: float) -> None:
    check_statistics(module, *head("plain", torch.float32, ROWS[module]), temperature)


@pytest.mark.parametrize("module", FORMS)
def test_the_kernels_own_blocks(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.undo()
    check_statistics(module, *head("plain", torch.bfloat16, 3, 2 * tiles.TILE + 77))


@pytest.mark.parametrize("module,dtype", [(tiles, torch.float32), (fused_logprob, torch.bfloat16)])
@pytest.mark.parametrize("shift", [9984.0, -9984.0])
def test_shifting_all_logits_changes_no_bit(module: ModuleType, dtype: torch.dtype, shift: float) -> None:
    rows = ROWS[module]
    hidden, weight, targets = grid(rows, WIDTH), grid(77, WIDTH, seed=1), torch.arange(rows) * 4
    hidden[:, -1] = 1.0
    results = []
    for constant in (0.0, shift):
        weight[:, -1] = constant
        results.append(module.statistics(hidden.to(dtype), weight.to(dtype), targets, 0.7))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][2], results[1][2])
    torch.testing.assert_close(results[1][1] - shift / 0.7, results[0][1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("module", FORMS)
def test_a_row_without_any_probability_is_nan_as_in_torch(module: ModuleType) -> None:
    hidden, weight, targets = head("plain", torch.float32, ROWS[module])
    weight[:, -1] = -torch.inf
    logprob, lse, _ = module.statistics(hidden, weight, targets, 1.0)
    assert logprob.isnan().all() and (lse == -torch.inf).all()
    hidden[3, 0] = torch.nan
    weight[:, -1] = 0.0
    bad = module.statistics(hidden, weight, targets, 1.0).isnan()
    assert bad[:, 3].all() and bad.sum() == 3


def test_strided_inputs() -> None:
    hidden, weight, targets = head("plain", torch.bfloat16, 7)
    h, w = torch.zeros(7, 64, dtype=torch.bfloat16), torch.zeros(77, 48, dtype=torch.bfloat16)
    h[:, 8 : 8 + WIDTH], w[:, :WIDTH] = hidden, weight
    h, w = h[:, 8 : 8 + WIDTH], w[:, :WIDTH]
    for module in FORMS:
        plain = module.statistics(hidden, weight, targets, 0.7)
        assert torch.equal(module.statistics(h, w, targets, 0.7), plain)
    assert fused_logprob.fits(h[4:5].t().contiguous().t(), w)  # one row: its stride means nothing
    transposed, shifted = weight.t().contiguous().t(), torch.zeros(7, WIDTH + 1, dtype=torch.bfloat16)[:, 1:]
    shifted.copy_(hidden)
    check_statistics(tiles, shifted, transposed, targets)


def test_what_descriptors_cannot_describe_is_refused() -> None:
    hidden, weight, targets = head("plain", torch.bfloat16)
    storage = torch.zeros(19 * WIDTH + 1, dtype=torch.bfloat16)
    for h, w in (
        (hidden, weight.t().contiguous().t()),  # columns contiguous
        (storage[1:].view(19, WIDTH), weight),  # start not at 16 bytes
        (torch.zeros(19, WIDTH + 1, dtype=torch.bfloat16)[:, :WIDTH], weight),  # rows not at multiples of 16 bytes
        (hidden[:, :12].contiguous(), weight[:, :12].contiguous()),
        (hidden[:1].expand(19, WIDTH), weight),  # rows on top of each other
        (hidden.float(), weight),
        (hidden.double(), weight.double()),
        (hidden[:, :0], weight[:, :0]),
    ):
        assert not fused_logprob.fits(h, w)
        with pytest.raises(ValueError, match="hidden and weight must be of one dtype, not fp64, .* Take tiles"):
            fused_logprob.statistics(h, w, targets, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_the_one_kernel_form_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Bitwise: alone, elsewhere in its block, in another block, in another chunk. With exact products, because those of
    numpy depend on the place in the block; random ones are for the GPU."""
    hidden, weight, targets = grid(50, WIDTH).to(dtype), grid(50, WIDTH, seed=1).to(dtype), torch.arange(50)
    together = fused_logprob.statistics(hidden, weight, targets, 0.7)
    for rows in ([0], [37], [49], list(range(5, 22)), list(range(49, -1, -3))):
        some = fused_logprob.statistics(hidden[rows], weight, targets[rows], 0.7)
        assert torch.equal(some, together[:, rows]), rows


def test_fp64_and_mixed_types() -> None:
    hidden, weight, targets = head("plain", torch.float64, 7)
    ours, exact = tiles.statistics(hidden, weight, targets, 0.7), by_torch(hidden, weight, targets, 0.7, torch.float64)
    torch.testing.assert_close(ours, torch.stack(exact), atol=1e-12, rtol=1e-12)
    for h, w in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)):
        check_statistics(tiles, hidden.to(h), weight.to(w), targets)
    check_statistics(fused_logprob, hidden.half(), weight.half(), targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_operation(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Ignored targets, strided targets; the form is the table's choice and the results are the reference's."""
    hidden, weight, targets = head("plain", dtype, 5)
    targets = torch.stack((targets, targets), 1)[:, 0]
    targets[1], targets[4] = -100, 77
    exact = linear_logprob(hidden.double(), weight.double(), targets, temperature=0.7, entropy=True)
    used: list[ModuleType] = []

    def spy(module: ModuleType) -> None:
        statistics = module.statistics
        monkeypatch.setattr(module, "statistics", lambda *arguments: used.append(module) or statistics(*arguments))

    for module in FORMS:
        spy(module)
    for shapes in (frozenset(), frozenset({(WIDTH, 77)})):
        monkeypatch.setattr(fused_logprob, "FUSED_SHAPES", shapes)
        for entropy in (True, False):
            ours = linear_logprob(
                hidden, weight, targets, temperature=0.7, entropy=entropy, tiled=True, backend="triton"
            )
            assert (ours.entropy is not None) is entropy
            assert ours.logprob[1] == ours.logprob[4] == 0 and ours.logprob.dtype == torch.float32
            for a, b in zip(ours, exact, strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b.float(), atol=5e-6, rtol=1e-6)
        fused = bool(shapes) and dtype == torch.bfloat16
        assert used == [fused_logprob if fused else tiles] * 2
        used.clear()
        misfit = linear_logprob(hidden, weight.t().contiguous().t(), targets, tiled=True, backend="triton")
        assert used == [tiles] and not misfit.logprob.isnan().any()
        used.clear()
    none = linear_logprob(hidden, weight, torch.full_like(targets, -1), tiled=True, backend="triton")
    assert not none.logprob.any() and none.lse.isfinite().all()


FAULTS = {
    "columns beyond V count as logit 0": (tiles, "other=_ABSENT", "other=0.0", ("negative",)),
    "the target is not moved into the tile": (
        tiles, "tl.load(targets + i) - first_column", "tl.load(targets + i)", ("plain",)
    ),
    "a target in a tile's first column is missed": (tiles, "(target >= 0) &", "(target > 0) &", ("borders",)),
    "every tile starts anew": (tiles, "if first_column != 0:", "if first_column < 0:", ("rising",)),
    "the tile's width is taken for its stride": (tiles, "tile + i * stride", "tile + i * width", ("plain",)),
    "each tile lacks its last column": (
        tiles, "weight[column : column + tile]", "weight[column : column + tile - 1]", ("plain",)
    ),
    "the last tile is not known where it is full": (
        tiles, "column + tile >=", "column + tile >", ("plain", 5, 64)
    ),
    "the spread of the tile before is lost": (
        tiles, "tl.load(state + 2 * count)", "tl.load(state + count)", ("rising",)
    ),
    "the entropy lacks the temperature": (tiles, "spread / total * inv_t", "spread / total", ("plain",)),
    "the vocabulary's tail counts as logit 0": (fused_logprob, "z, _ABSENT)", "z, 0.0)", ("negative",)),
    "the vocabulary's tail is not masked": (
        fused_logprob, "RAGGED=vocab % BLOCK_COLUMNS != 0", "RAGGED=False", ("negative",)
    ),
    "the sum is not rescaled": (
        fused_logprob, "total * keep + tl.sum(p, 1)", "total + tl.sum(p, 1)", ("rising",)
    ),
    "the entropy's sum is not moved to the new maximum": (
        fused_logprob, "keep * (spread + total * (top - new_top))", "keep * spread", ("rising",)
    ),
    "the target is off by one": (fused_logprob, "(at[None, :] ==", "(at[None, :] + 1 ==", ("plain",)),
    "a target in a split's first column is missed": (
        fused_logprob, "(target >= first_column)", "(target > first_column)", ("borders",)
    ),
    "the product lacks its last, partial block": (
        fused_logprob, "range(0, width, WIDTH)", "range(0, width - WIDTH + 1, WIDTH)", ("plain",)
    ),
    "a split begins a block late": (
        fused_logprob, "range(first_column, tl", "range(first_column + COLUMNS, tl", ("plain",)
    ),
    "the first split is merged in place of the others": (fused_logprob, "at += rows", "at += 0", ("rising",)),
    "the last split is merged twice": (
        fused_logprob, "range(n_splits)", "range(n_splits + 1)", ("plain", 49, 64)
    ),
    "the last split is not merged": (fused_logprob, "range(n_splits)", "range(n_splits - 1)", ("plain",)),
    "a merged sum is not rescaled": (fused_logprob, "their_total * theirs", "their_total", ("rising",)),
    "partials have the stride of a block": (
        fused_logprob, "split.to(tl.int64) * n +", "split.to(tl.int64) * ROWS +", ("plain",)
    ),
    "rows beyond the batch are stored": (
        fused_logprob, "tl.store(out + step, total, mask=inside)", "tl.store(out + step, total)", ("plain",)
    ),
    "a last group of fewer row blocks is walked as a full one": (
        fused_logprob, "in_group // group_rows", "in_group // GROUP", ("plain", 40)
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path: Path, fault: str) -> None:
    original, old, new, (case, *size) = FAULTS[fault]
    with mutant(original, tmp_path, old, new) as module:
        for name, value in SMALL.items():
            setattr(module, name, value)
        with pytest.raises(AssertionError):
            check_statistics(module, *head(case, torch.bfloat16, *(size or [ROWS[original]])))


def cases() -> list[Case]:
    rows, columns, width = (getattr(fused_logprob, f"BLOCK_{name}") for name in ("ROWS", "COLUMNS", "WIDTH"))
    pointers = dict.fromkeys(("partials", "chosen"), "*fp32")
    partials = {"hidden": f"tensordesc<bf16[{rows}, {width}]>", "weight": f"tensordesc<bf16[{columns}, {width}]>"}
    partials |= {"targets": "*i64", "inv_t": "fp32"} | pointers
    partials |= dict.fromkeys(("n", "n_splits", "vocab", "width"), "i32")
    blocks = {"ROWS": rows, "COLUMNS": columns, "WIDTH": width}
    blocks |= {"SPLIT": fused_logprob.SPLIT, "GROUP": fused_logprob.GROUP}
    merge = pointers | {"outputs": "*fp32", "inv_t": "fp32"} | dict.fromkeys(("rows", "n_splits", "n"), "i32")
    fold = dict.fromkeys(("tile", "state", "outputs"), "*fp32") | {"targets": "*i64", "inv_t": "fp32"}
    fold |= dict.fromkeys(("stride", "first_column", "width", "n", "last"), "i32")
    return [
        *(
            Case(
                "fused_logprob:_partials", partials, blocks | {"RAGGED": ragged},
                fused_logprob.WARPS, fused_logprob.STAGES, ("width",) if ragged else ("width", "vocab"),
            )
            for ragged in (False, True)
        ),
        Case("fused_logprob:_merge", merge, {"BLOCK": fused_logprob.MERGE_ROWS}),
        Case("tiles:_fold", fold, {"BLOCK": tiles.TILE}, warps=16, aligned=("stride", "width")),
    ]  # fmt: skip


def test_sm_90(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    for report in compile_all(cases(), tmp_path):
        check(report)
        if report.case["kernel"].endswith("_partials"):
            assert report.count("HGMMA") > 0 and report.count("UTMALDG") > 0
            registers = int(re.search(r"REG:(\d+)", report.usage)[1])
            assert 2 * report.shared <= SHARED_LIMIT and 2 * registers * 32 * fused_logprob.WARPS <= 65536
        if report.case["kernel"].endswith("_fold"):
            assert report.sass.count("LDG.E.128") >= 2, "a tile is read 16 bytes at a time"


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128_256, 128_256 - 3])
def test_gpu_both_forms_agree_with_the_default_in_less_than_64_mb(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    """The bound lies far below what bf16 logits would give (2e-2) and above two orders of summing 2048 products."""
    monkeypatch.undo()
    rows, width = 4096 + 129, 2048
    g = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=g, device="cuda").bfloat16() for n in (rows, vocab))
    weight /= 16
    targets = torch.randint(0, vocab, (rows,), generator=g, device="cuda")
    expected = torch.stack(linear_logprob(hidden, weight, targets, temperature=0.7, entropy=True, backend="triton"))
    for module in FORMS:
        module.statistics(hidden[:256], weight, targets[:256], 0.7)  # the library's own workspace, compilation
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours = module.statistics(hidden, weight, targets, 0.7)
        assert torch.cuda.max_memory_allocated() - before < 64e6
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-6)
        assert torch.equal(ours, module.statistics(hidden, weight, targets, 0.7)) and (ours[0] <= 0).all()
    alone = fused_logprob.statistics(hidden[1234:1235], weight, targets[1234:1235], 0.7)
    assert torch.equal(alone[:, 0], ours[:, 1234])
    public = linear_logprob(hidden, weight, targets, temperature=0.7, entropy=True, tiled=True, backend="triton")
    torch.testing.assert_close(torch.stack(public), expected, atol=2e-4, rtol=1e-6)
