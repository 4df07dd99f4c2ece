"""Planted faults: a kernel module with one piece of its text replaced, to see that the tests notice."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def mutant(original: ModuleType, folder: Path, old: str, new: str) -> Iterator[ModuleType]:
    """A second copy of `original`, under another name, with `old` replaced by `new` everywhere."""
    source = Path(original.__file__).read_text()
    assert old in source, f"nothing to plant the fault in: {old}"
    path = folder / "mutant.py"  # a file, because triton reads the source of its kernels
    path.write_text(source.replace(old, new))
    name = f"{original.__package__}.mutant_{abs(hash((old, new)))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
