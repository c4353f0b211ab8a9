"""Runs files in OpenVINO, in turn, with one thread: a request in JSON comes in, seconds go out."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Answer the request on standard input."""
    import numpy
    import openvino  # type: ignore[import-not-found]  # in an environment of its own

    request = json.load(sys.stdin)
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    image = (
        numpy.random.default_rng(0)
        .standard_normal((1, 3, request["size"], request["size"]))
        .astype("float32")
    )
    requests, refused = {}, {}
    for label, path in request["paths"].items():
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            refused[label] = " ".join(str(error).split())[-80:]
            continue
        model.reshape(list(image.shape))
        requests[label] = core.compile_model(model, "CPU", settings).create_infer_request()
    times: dict[str, list[float]] = {label: [] for label in requests}
    for turn in range(request["repeats"] + 2):
        for label, infer in requests.items():
            start = time.perf_counter()
            infer.infer([image])
            if turn > 1:
                times[label].append(time.perf_counter() - start)
    json.dump({"times": times, "refused": refused}, sys.stdout)


if __name__ == "__main__":
    main()
