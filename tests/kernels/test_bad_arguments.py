"""A wrong argument gets one message that names the operation, the argument, what was expected and what was found."""

from collections.abc import Callable

import pytest
import torch

from cai_fast import kernels

H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
ROWS, PAIR = torch.zeros(3), torch.zeros(2)
META = torch.zeros(3, 4, device="meta")
BF16, I16 = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int16)
STEP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}


def adamw(**changes: object) -> None:
    kernels.adamw_step(BF16, I16, BF16, PAIR, PAIR, **STEP | changes)


def paged(table: torch.Tensor, lengths: torch.Tensor, **arguments: object) -> None:
    pages = torch.zeros(2, 3, 1, 8, 4)
    kernels.paged_attention(torch.zeros(2, 2, 4), *pages, table, lengths, **arguments)


def shared(**changes: object) -> None:
    pages = {"query": torch.zeros(2, 2, 4), "k_pages": torch.zeros(3, 1, 8, 4), "v_pages": torch.zeros(3, 1, 8, 4)}
    tiles = {"tables": T[:2, None], "lengths": T[:2], "tile_group": T, "tile_rows": T[:, None]}
    kernels.shared_attention(**pages | tiles | changes)


def entropy(**arguments: object) -> None:
    kernels.linear_cross_entropy(**{"hidden": H, "weight": W, "targets": T} | arguments)


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "targets of floats": (lambda: entropy(targets=ROWS), "linear_cross_entropy: targets must be an integer tensor"),
    "a list": (lambda: entropy(hidden=[1]), "hidden must be a floating-point tensor, got list"),
    "another device": (lambda: entropy(hidden=META), "hidden must be on cpu, got meta"),
    "weights of another length": (lambda: entropy(weights=PAIR), "expected weights of shape .3., got .2."),
    "temperature": (lambda: kernels.linear_logprob(H, W, T, temperature=float("inf")), "temperature must be a finite"),
    "clip_coef": (
        lambda: kernels.linear_policy_loss(H, W, T, ROWS, ROWS, clip_coef=-1.0),
        "clip_coef must be",
    ),
    "a column of rewards": (
        lambda: kernels.preference_loss(H[:, :1], ROWS, ROWS),
        "expected reward_a .C. as",
    ),
    "a label too few": (lambda: kernels.preference_loss(ROWS, ROWS, PAIR), "preference_loss: expected prob_a"),
    "bounds of floats": (lambda: kernels.gae(ROWS, ROWS, PAIR), "gae: cu_seqlens must be an integer tensor"),
    "bounds of no sequence": (lambda: kernels.gae(ROWS, ROWS, T[:1]), "gae: expected cu_seqlens"),
    "options of floats": (lambda: kernels.score_options(H, W, PAIR[None]), "option_ids must be an integer tensor"),
    "clamp": (lambda: kernels.preference_labels(torch.zeros(1, 1, 2, 2), clamp=(0.6, 0.4)), "0 <= lo <= hi <= 1"),
    "halves of a gate": (lambda: kernels.swiglu(H, H[:1]), "swiglu: gate and up must be alike"),
    "norm of integers": (lambda: kernels.rms_norm(T, T, 1e-5), "rms_norm: x must be a floating-point tensor"),
    "norm's weight": (lambda: kernels.rms_norm(H, ROWS, 1e-5), "rms_norm: expected x .*H. and weight .H."),
    "norm's eps": (lambda: kernels.rms_norm(H, H[0], H), "rms_norm: eps must be a finite number"),
    "two batches": (lambda: kernels.merge_attention(H, ROWS, H[:1], ROWS[:1]), "merge_attention: expected two out"),
    "table of floats": (lambda: paged(torch.zeros(2, 1), T[:2]), "block_table must be an integer tensor"),
    "a table too short": (lambda: paged(T[:1, None], T[:2]), "expected block_table .B, P. and seq_lens .B. for 2"),
    "a start too few": (lambda: paged(T[:2, None], T[:2], starts=T[:1]), "expected starts of shape .2., got .1."),
    "starts of floats": (lambda: paged(T[:2, None], T[:2], starts=PAIR), "starts must be an integer tensor"),
    "heads of two sizes": (lambda: shared(query=torch.zeros(2, 2, 8)), "shared_attention: expected query .B, Hq, D."),
    "a list of queries": (lambda: shared(query=[1]), "query must be a floating-point tensor, got list"),
    "prefixes without lengths": (lambda: shared(lengths=T), "shared_attention: expected tables .G, P., lengths .G."),
    "tiles without rows": (lambda: shared(tile_rows=T), "and tile_rows .N, R., got .2, 1., .2., .3., .3."),
    "tiles elsewhere": (lambda: shared(tile_group=META.long()), "tile_group must be on cpu, got meta"),
    "rows of floats": (lambda: shared(tile_rows=H), "tile_rows must be an integer tensor"),
    "learning rate": (lambda: adamw(lr=-1.0), "adamw_step: lr must be a finite number >= 0, got -1.0"),
    "one beta": (lambda: adamw(betas=(0.9,)), "betas must be two numbers"),
    "half a step": (lambda: adamw(step=1.5), "expected step >= 1"),
    "clip as a float": (lambda: adamw(clip=0.5), "clip must be one float32 number, got 0.5"),
    "master in bf16": (lambda: kernels.split_master(BF16), "split_master: expected float32, got torch.bfloat16"),
    "remainder in fp32": (lambda: kernels.join_master(BF16, PAIR), "join_master: expected bfloat16 and int16"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named(case: str) -> None:
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        call()
