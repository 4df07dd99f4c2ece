"""cai_fast: Constitutional AI (Bai et al. 2022, arXiv 2212.08073), the whole loop in one program."""

from pathlib import Path as _Path

__version__ = "0.1.0"

_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "__init__.py").is_file():
    # Source checkout: cai_fast.kernels is ../kernels and cai_fast.constitutions is ../constitutions.
    __path__.append(str(_here.parent))
