"""What holds of all Triton kernels, read from their source."""

import ast
from pathlib import Path

import pytest
from cai_fast.kernels import triton as package

FOLDER = Path(package.__file__).parent
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(FOLDER.glob("*.py"))}
LAUNCHED = [
    (module, node.value.id)
    for module, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id.startswith("_")
]
KERNELS = sorted(
    (module, node.name)
    for module, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and (module, node.name) in LAUNCHED
)


def body(module: str, name: str) -> str:
    return next(ast.unparse(n) for n in TREES[module].body if isinstance(n, ast.FunctionDef) and n.name == name)


def test_kernels_are_found() -> None:
    assert len(KERNELS) >= 20 and ("rows", "_row") in KERNELS


@pytest.mark.parametrize(("module", "name"), KERNELS)
def test_a_kernel_is_compiled_for_sm_90_by_some_test(module: str, name: str) -> None:
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(f'"{module}:{name}"' in text for text in texts)


@pytest.mark.parametrize(("module", "name"), KERNELS)
def test_offsets_grow_in_64_bits(module: str, name: str) -> None:
    """A program's number becomes an int64 where it is read, before it is multiplied by anything."""
    numbers = [line for line in body(module, name).splitlines() if "tl.program_id(0)" in line]
    assert numbers or (module, name) in (("adamw", "_root_of_sum"), ("sums", "_merge")), "one program has no number"
    # The descriptors of _partials take coordinates, not offsets.
    known = (module, name) == ("fused_logprob", "_partials")
    assert known or all("tl.program_id(0).to(tl.int64)" in line for line in numbers)
