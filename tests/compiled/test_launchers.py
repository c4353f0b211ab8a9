"""What the launchers of the CUDA kernels ask of CUDA, by their sources: nothing that waits or allocates."""

from __future__ import annotations

import re
from pathlib import Path

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
ASKED = {"cudaGetDevice", "cudaSetDevice", "cudaGetLastError", "cudaGetErrorString", "cudaSuccess"}


def test_nothing_waits_or_allocates_and_the_stream_is_the_callers() -> None:
    text = "\n".join(path.read_text() for path in CUDA.iterdir() if path.suffix in (".h", ".cu", ".cpp"))
    assert set(re.findall(r"\bcuda[A-Z]\w*[a-z](?<!_t)\b", text)) == ASKED
    launches = re.findall(r"<<<(.*?)>>>", text)
    assert launches
    assert all("cudaStream_t>(where.second)" in launch for launch in launches)
