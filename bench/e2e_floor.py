"""The least time of a step: its matrix products with the model's weights, bare, in the shapes that we compute them in.

Attention, norms, activations, softmax, sampling and the optimizer are left out, so no program that multiplies these
matrices can be faster: (peer's time) / (this time) bounds every ratio. A token that several prompts share and that we
compute once is counted once; of log-probabilities under the sampling policy, which one pass over the answers gives
together with the gradient, nothing is counted beside the update.
"""

from collections.abc import Sequence
from itertools import pairwise
from os.path import commonprefix

import torch

from bench.e2e_load import Work
from bench.e2e_ours import Place
from bench.e2e_turns import Done, Step

HEAD_ROWS = 1024  # logits are multiplied in pieces, as no program keeps all of them


class Products:
    """Matrix products with random weights of a model's shapes; results are thrown away."""

    def __init__(self, place: Place) -> None:
        s, self.device = place.size.shape, place.device
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        hidden, kv = s["hidden_size"], s["num_kv_heads"] * s["head_dim"]
        queries, inner = s["num_heads"] * s["head_dim"], s["intermediate_size"]
        block = [(hidden, queries), (hidden, kv), (hidden, kv), (queries, hidden), (hidden, inner), (hidden, inner),
                 (inner, hidden)]  # fmt: skip
        head = (hidden, s["vocab_size"])
        g = torch.Generator().manual_seed(0)

        def random(shape: tuple[int, int]) -> torch.Tensor:
            return torch.randn(shape[::-1], generator=g).to(self.device, self.dtype)

        # Of every layer their own, since decoding a few rows is bound by reading them.
        self.layers, self.head = [[random(shape) for shape in block] for _ in range(s["num_layers"])], random(head)
        self.buffers: dict[int, torch.Tensor] = {}

    def _rows(self, count: int, width: int) -> torch.Tensor:
        """[count, width], of a buffer that grows."""
        held = self.buffers.get(width)
        if held is None or held.shape[0] < count:
            held = self.buffers[width] = torch.randn(count, width).to(self.device, self.dtype)
        return held[:count]

    def _product(self, rows: int, weight: torch.Tensor, backward: bool) -> None:
        x, y = self._rows(rows, weight.shape[1]), self._rows(rows, weight.shape[0])
        x @ weight.t()
        if backward:
            y @ weight
            y.t() @ x

    def trunk(self, rows: int, backward: bool = False) -> None:
        for layer in self.layers:
            for weight in layer:
                self._product(rows, weight, backward)

    def logits(self, rows: int, backward: bool = False) -> None:
        for start in range(0, rows, HEAD_ROWS):
            self._product(min(HEAD_ROWS, rows - start), self.head, backward)

    def decode(self, prompt_rows: int, lengths: Sequence[int]) -> None:
        """Prompts, which give the first token of each answer, then one row for each that goes on."""
        self.trunk(prompt_rows)
        self.logits(len(lengths))
        for step in range(1, max(lengths)):
            rows = sum(n > step for n in lengths)
            self.trunk(rows)
            self.logits(rows)


def distinct(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens of some sequences, beginnings that they share counted once."""
    ordered = sorted(map(list, sequences))
    return sum(map(len, ordered)) - sum(len(commonprefix(pair)) for pair in pairwise(ordered))


def on_policy(p: Products, work: Work, critic: bool, epochs: int) -> None:
    """Sampling, scores, the reference's log-probabilities, the updates, and those of a critic of its own."""
    repeat, answers = len(work.lengths) // len(work.sequences), sum(work.lengths)
    prompts = [len(ids) for ids in work.sequences for _ in range(repeat)]
    distinct_prompts = sum(map(len, work.sequences))
    packed = sum(prompts) + answers - len(prompts)
    p.decode(distinct_prompts, work.lengths)
    p.trunk(distinct_prompts + answers)  # the preference model
    p.trunk(packed)  # the reference
    p.logits(answers)
    for _ in range(epochs):
        p.trunk(packed, backward=True)
        p.logits(answers, backward=True)
        if critic:
            p.trunk(packed, backward=True)


def floor(place: Place, stage: str) -> Step:
    """The bare products of one step of a stage."""
    p = Products(place)

    def step(work: Work) -> Done:
        lengths = [len(ids) for ids in work.sequences]
        if stage == "sft":
            rows = sum(lengths) - len(lengths)  # the last token is not read
            p.trunk(rows, backward=True)
            p.logits(rows, backward=True)
        elif stage == "reward":
            p.trunk(sum(lengths), backward=True)
        elif stage == "dpo":
            p.trunk(sum(lengths) - len(lengths), backward=True)
            p.logits(sum(lengths) - sum(work.starts), backward=True)
        elif stage == "generate":
            p.decode(sum(lengths), work.lengths)
        elif stage == "judge":
            groups = [work.sequences[i : i + work.together] for i in range(0, len(lengths), work.together)]
            p.trunk(sum(map(distinct, groups)))
            p.logits(len(lengths))
        else:
            on_policy(p, work, critic=stage == "ppo", epochs=place.settings.epochs if stage == "ppo" else 1)
        return Done(0)

    return step
