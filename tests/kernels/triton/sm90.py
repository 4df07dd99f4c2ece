"""Compile kernels for sm_90 (H100, H200) without a GPU, in a process of its own: there the interpreter is off.

`compile_all(cases)` from a test; `check(report)` asserts the limits. Run as a program it reads cases as JSON.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

SHARED_LIMIT = 232_448  # bytes of shared memory that one block may use on sm_90


@dataclasses.dataclass(frozen=True)
class Case:
    kernel: str
    """'module:function' under cai_fast.kernels.triton."""
    signature: dict[str, str]
    """Argument -> Triton type ('*fp32', 'i64', 'fp32'), in the kernel's order, constexprs left out."""
    constexprs: dict[str, int | bool | str | None]
    warps: int = 4
    stages: int = 3
    aligned: tuple[str, ...] = ()
    """Integer arguments divisible by 16; every pointer counts as 16-byte aligned, as torch's are."""


@dataclasses.dataclass(frozen=True)
class Report:
    case: dict[str, Any]
    shared: int
    ptx: str
    sass: str
    usage: str

    def count(self, instruction: str) -> int:
        """How often an instruction such as HGMMA stands in the machine code."""
        return len(re.findall(rf"\b{instruction}\b", self.sass or ""))


def compile_all(cases: list[Case], cache: Path) -> list[Report]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        input=json.dumps([dataclasses.asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Report(**report) for report in json.loads(done.stdout)]


def check(report: Report) -> None:
    """It compiled; now no spills, shared memory within the limit, no fp64 instruction."""
    name = report.case["kernel"], report.case["constexprs"]
    assert report.shared <= SHARED_LIMIT, f"{name}: {report.shared} bytes of shared memory"
    assert ".f64" not in report.ptx, f"{name}: fp64 instructions"
    spills = report.count("STL") + report.count("LDL")
    assert spills == 0, f"{name}: {spills} local loads and stores; {report.usage}"


def _dump(tool: Path, cubin: bytes, option: str, scratch: Path) -> str:
    scratch.write_bytes(cubin)
    return subprocess.run([tool, option, scratch], capture_output=True, text=True, check=True).stdout


def _compile(case: dict[str, Any], scratch: Path) -> dict[str, Any]:
    import importlib

    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case["kernel"].partition(":")
    kernel = getattr(importlib.import_module(f"cai_fast.kernels.triton.{module}"), name)
    types = case["signature"] | {c: "constexpr" for c in case["constexprs"]}
    assert set(types) == set(kernel.arg_names), set(types) ^ set(kernel.arg_names)
    signature = {argument: types[argument] for argument in kernel.arg_names}
    aligned = [(i,) for i, (a, t) in enumerate(signature.items()) if t.startswith("*") or a in case["aligned"]]
    source = ASTSource(kernel, signature, case["constexprs"], {i: [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": case["warps"], "num_stages": case["stages"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool, cubin = Path(nvidia.__file__).parent / "bin" / "cuobjdump", compiled.asm["cubin"]
    return {
        "case": case,
        "shared": compiled.metadata.shared,
        "ptx": compiled.asm["ptx"],
        "sass": _dump(tool, cubin, "--dump-sass", scratch),
        "usage": _dump(tool, cubin, "--dump-resource-usage", scratch),
    }


if __name__ == "__main__":
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps([_compile(case, folder / f"{os.getpid()}.cubin") for case in json.load(sys.stdin)]))
