"""The compiler vectorises the CPU loops of the ends: a loop that it gives up on takes ten times as long."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
DRIVER = CSRC / "host" / "driver.h"
BODIES = (
    "EndsOfTensor",
    "AddEndsGradient<true>",
    "Normalise<Activation::none, false, true, float>",
    "Normalise<Activation::relu6, true, true, float>",
    "BackwardSums<Activation::relu, Mask::from_x, true, float>",
    "BackwardApply<Activation::relu, Mask::from_x, true, float>",
)
SPAN = (
    "void probe_{i}(const Pass<{body}, float, float>& p, float* sum) {{ p.span<1>(0, 128, p.k, sum, 256); }}"
)


def _flags() -> list[str]:
    """Return the options of the CPU loops, as the build has them."""
    text = (CSRC / "host" / "host.cmake").read_text()
    lists = [re.search(rf"set\({name} ([^)]*)\)", text) for name in ("exact", "avx2")]
    return [flag for found in lists if found for flag in found[1].split()]


def _is_gcc() -> bool:
    try:
        version = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return "Free Software Foundation" in version


@pytest.mark.skipif(platform.machine() != "x86_64" or not _is_gcc(), reason="needs GCC on x86-64")
def test_loops_over_ends_are_vectorised(tmp_path: Path) -> None:
    functions = [SPAN.format(i=i, body=body) for i, body in enumerate(BODIES)]
    includes = ['#include "host/batch_norm_act.h"', '#include "arithmetic/tap.h"']
    opened = ["namespace gradl1::host {", "inline namespace GRADL1_ISA {"]
    source = tmp_path / "probe.cpp"
    source.write_text("\n".join([*includes, *opened, *functions, "}", "}", ""]))
    options = ["-std=c++17", "-O3", *_flags(), "-DGRADL1_ISA=probe", f"-I{CSRC}", "-fopt-info-vec-all"]
    command = ["c++", *options, "-c", str(source), "-o", str(tmp_path / "probe.o")]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    line = DRIVER.read_text().splitlines().index("        GRADL1_INDEPENDENT") + 2
    of_span = [text for text in log.splitlines() if f"driver.h:{line}:" in text]
    assert not [text for text in of_span if "missed: couldn't vectorize loop" in text]
    assert sum("optimized: loop vectorized using 32 byte" in text for text in of_span) >= len(BODIES)
