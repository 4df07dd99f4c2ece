"""The rules of the code base that a program can check: import order, sizes, and what may not be used at all."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = [*sorted((ROOT / "cai_fast").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
OTHER = [path for folder in ("tests", "bench", "constitutions") for path in sorted((ROOT / folder).rglob("*.py"))]
MAX_FILE, MAX_FUNCTION, MAX_JIT_FUNCTION = 400, 60, 100

# A module imports only from groups before its own, and within its group without cycles. An import inside a function,
# such as the one of `Model.save`, may close a cycle but must keep to the groups.
GROUPS = [
    {"kernels"},
    {
        "errors",
        "files",
        "inputs",
        "config_schema",
        "config_rl",
        "config_sections",
        "config",
        "constitution",
        "published",
        "prompts",
        "records",
        "readers",
    },
    {
        "rng",
        "tokenizer_files",
        "chat_template",
        "tokenizer",
        "heartbeat",
        "distributed",
        "sinks",
        "runlog",
        "rundir",
        "runfiles",
        "checkpoint",
        "hashing",
    },
    {"model"},
    {"engine"},
    {
        "batching",
        "guards",
        "losses",
        "optim",
        "parallel",
        "fit",
        "advantages",
        "policy_gradient",
        "elo",
        "prefixes",
        "scorer",
    },
    {"toy", "report"},
    {
        "pipeline",
        "sharing",
        "comparisons",
        "dpo",
        "model_card",
        "roles",
        "workload",
        "capacity",
        "memory",
        "moments",
        "planner",
        "remedies",
        "plan",
        "preflight",
        "chains",
        "judging",
        "measure",
        "replay",
        "hhh",
        "sampler",
        "rl_states",
        "elo",
    },
    {"stages"},
    {"train", "explain", "chat"},
]
TORCH_FREE = GROUPS[1]
CHECKER_USERS = {"cai_fast.toy.helpfulness", "cai_fast.stages.evaluate"}


def module_name(path: Path) -> str:
    """cai_fast.x.y for a file; kernels/ is cai_fast.kernels."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["cai_fast", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes_outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from nodes_outside_functions(child)


def imports(path: Path, in_functions: bool = True) -> Iterator[str]:
    """Full names of everything a file imports: 'a.b.c' for `from a.b import c`."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree(path)) if in_functions else nodes_outside_functions(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def owner(name: str) -> str:
    """The module of ours that an imported name belongs to; empty for everything else."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return ""


def own_imports(path: Path, in_functions: bool = True) -> set[str]:
    names = imports(path, in_functions)
    return {module for name in names if (module := owner(name)) not in ("", "cai_fast", module_name(path))}


def group(module: str) -> int:
    part = module.split(".")[1]
    found = [number for number, names in enumerate(GROUPS) if part in names]
    assert found, f"{module} belongs to no group: add it to GROUPS where its imports allow"
    return found[0]


def test_modules_import_only_from_groups_before_their_own() -> None:
    wrong = []
    for name, path in MODULES.items():
        if name == "cai_fast":
            assert not own_imports(path), "cai_fast/__init__.py must import nothing of ours"
            continue
        wrong += [f"{name} imports {other}" for other in own_imports(path) if group(other) > group(name)]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_import_cycle() -> None:
    state: dict[str, str] = {}

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"import cycle: {' -> '.join((*chain, name))}"
        if name in state:
            return
        state[name] = "open"
        for other in sorted(own_imports(MODULES[name], in_functions=False)):
            visit(other, (*chain, name))
        state[name] = "done"

    for module in MODULES:
        visit(module, ())


def test_stages_exchange_files_and_never_import_each_other() -> None:
    stages = [name for name in MODULES if name.startswith("cai_fast.stages.")]
    wrong = [f"{name} imports {other}" for name in stages for other in own_imports(MODULES[name]) if other in stages]
    assert not wrong, wrong


def test_nobody_imports_the_entry_point() -> None:
    users = [name for name, path in MODULES.items() if "cai_fast.train" in own_imports(path)]
    assert not users, users


def test_only_the_judges_of_the_toy_world_see_its_checker() -> None:
    users = {name for name, path in MODULES.items() if "cai_fast.toy.checker" in own_imports(path)}
    assert users <= CHECKER_USERS, users - CHECKER_USERS


def test_kernels_stand_alone_and_are_used_through_their_public_names() -> None:
    for name, path in MODULES.items():
        used = {other for other in own_imports(path) if other.startswith("cai_fast.kernels")}
        if name.startswith("cai_fast.kernels"):
            assert used == own_imports(path), f"{name} imports {own_imports(path) - used}"
        else:
            assert used <= {"cai_fast.kernels"}, f"{name} imports {used}: import the names from cai_fast.kernels"
    top_level = [str(path) for path in SOURCE + OTHER for name in imports(path) if name.split(".")[0] == "kernels"]
    assert not top_level, f"top-level `kernels` is another package; import cai_fast.kernels: {top_level}"


def test_the_first_modules_need_no_torch() -> None:
    for name, path in MODULES.items():
        if name != "cai_fast" and name.split(".")[1] in TORCH_FREE:
            heavy = {
                top for top in (i.split(".")[0] for i in imports(path)) if top in ("torch", "transformers", "triton")
            }
            assert not heavy, f"{name} imports {heavy}"


@pytest.mark.parametrize("path", SOURCE + OTHER, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_and_its_name_is_free(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{lines} lines; split it (at most {MAX_FILE})"
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names, "named like a stdlib module"


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_annotated(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where = f"{node.name} (line {node.lineno})"
        jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        length, limit = node.end_lineno - node.lineno + 1, MAX_JIT_FUNCTION if jit else MAX_FUNCTION
        assert length <= limit, f"{where} has {length} lines, at most {limit}"
        if jit:
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{where}: no annotation for {', '.join(bare)}"
        assert node.returns is not None or node.name == "__init__", f"{where}: no return annotation"


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_dangerous_is_used(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            caught = {ast.unparse(part) for part in ast.walk(node.type)} if node.type else {"Exception"}
            assert not caught & {"Exception", "BaseException"}, f"{where}: except {caught} is too broad"
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save"), f"{where}: use safetensors and JSON"
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False", f"{where}: code of a checkpoint must never run"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
            raise AssertionError(f"{where}: {ast.unparse(node.func)}")


@pytest.mark.parametrize("path", [*SOURCE, *OTHER], ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_that_the_code_names_are_in_the_repository(path: Path) -> None:
    named = set(re.findall(r"\b\w+\.md\b", path.read_text(encoding="utf-8")))
    assert not named - {
        document.name for folder in (ROOT, ROOT / "bench", ROOT / "tests") for document in folder.glob("*.md")
    }


def test_every_package_and_data_file_is_in_the_distribution() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name for name, path in MODULES.items() if path.name == "__init__.py"} | {"cai_fast.constitutions"}
    assert found == set(settings["packages"])
    packaged = set()
    for package, patterns in settings["package-data"].items():
        folder = ROOT / settings["package-dir"].get(package, package.replace(".", "/"))
        packaged |= {path for pattern in patterns for path in folder.glob(pattern)}
    data = {path for folder in ("cai_fast", "kernels", "constitutions") for path in (ROOT / folder).rglob("*.*")}
    missing = {path for path in data if path.suffix not in (".py", ".pyc")} - packaged
    assert not missing, f"not covered by package-data: {missing}"
