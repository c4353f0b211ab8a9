"""What is asked of a converted model. A check returns its outcome; an exception is one as well."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

import gradl1_fast as gl
from tests.zoo import oracle
from tests.zoo.case import Case, gradients_of
from tests.zoo.compare import named_difference
from tests.zoo.entries import run
from tests.zoo.exporting import exported
from tests.zoo.float_weights import float_weights
from tests.zoo.subjects import loss_of, make, seed

LAMBDA = 0.01


@dataclass
class Outcome:
    """Outcome of one check.

    Attributes:
        ok: whether the model passed.
        value: a difference, or a share.
        reason: why it did not pass, or what stayed as it was.
        details: counts by reason, where there are several.
    """

    ok: bool
    value: float | None = None
    reason: str = ""
    details: dict[str, int] = field(default_factory=dict)


def identity(case: Case) -> Outcome:
    """Ask for the same class, names, order, parameters and buffers; load state dicts both ways."""
    model, converted = case.model, case.converted
    if type(converted) is not type(model):
        return Outcome(False, reason=f"the class is {type(converted).__name__}")
    for kind in ("parameters", "buffers"):
        before, after = (dict(getattr(m, f"named_{kind}")()) for m in (model, converted))
        if list(before) != list(after):
            odd = sorted(before.keys() ^ after.keys())
            return Outcome(False, reason=f"{kind} differ: {odd[0] if odd else 'in their order'}")
        if any(before[name] is not after[name] for name in before):
            return Outcome(False, reason=f"{kind} are not shared")
    converted.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(converted.state_dict(), strict=True)
    return Outcome(True)


def outputs(case: Case) -> Outcome:
    """Compare outputs, gradients and statistics in evaluation and training."""
    found: list[tuple[float, str]] = []
    for mode in ("evaluation", "training"):
        ours, theirs = (
            case.run(module, training=mode == "training") for module in (case.converted, case.original)
        )
        for kind in ("outputs", "gradients", "buffers"):
            value, name = named_difference(getattr(ours, kind), getattr(theirs, kind))
            found.append((value, f"{kind} in {mode}: {name}"))
    return _within(1e-10, *found)


def penalty(case: Case) -> Outcome:
    """Compare penalty and penalised gradients with double backprop through the original, in training."""
    case.reset(training=True)
    try:
        truth = _truth(case)
    except Exception as error:
        return Outcome(False, reason=f"the original itself: {type(error).__name__}: {error}")
    case.reset(training=True)
    gradl1 = gl.GradL1(case.converted, lambda_w=LAMBDA, lambda_a=LAMBDA, scale="none")
    seed()
    loss = loss_of(run(case.converted, case.batch))
    value = gradl1(loss)
    (loss + value).backward()
    ours = gradients_of(case.converted)
    apart = abs(float(value.detach()) - truth.penalty) / (abs(truth.penalty) or 1.0)
    terms = {name: float(term) for name, term in gradl1.terms.items()}
    odd = _odd_terms(terms, truth.terms)
    gradients = named_difference(ours, truth.gradients)
    return _within(
        case.entry.tolerance, (apart, f"penalty: {odd}"), (gradients[0], f"gradient: {gradients[1]}")
    )


def _truth(case: Case) -> oracle.Penalised:
    names = {"weights": case.quantized, "inputs": case.with_site}
    return oracle.penalised(case.original, case.batch, **names, lambda_w=LAMBDA, lambda_a=LAMBDA)


def _odd_terms(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Return the first terms that differ, for whoever looks for the reason."""
    names = [*theirs, *(name for name in ours if name not in theirs)]
    odd = [n for n in names if abs(ours.get(n, 0.0) - theirs.get(n, 0.0)) > 1e-6 * abs(theirs.get(n, 0.0))]
    shown = [f"{n} {ours.get(n, 0.0):.4g} for {theirs.get(n, 0.0):.4g}" for n in odd[:2]]
    return f"{len(odd)} terms, {', '.join(shown)}" if odd else "no term by itself"


def quantized(case: Case) -> Outcome:
    """Count the layers whose weight is quantized, by what the report says."""
    left = [name for name in case.layers if name not in case.quantized or name in case.left_in_float]
    share = 1 - len(left) / len(case.layers)
    return Outcome(not left, share, _some(left) if left else "")


def plans(case: Case) -> Outcome:
    """Count the layers that a plan runs; after a pass with a penalty."""
    rows = case.report.plans
    planned = sum(count for _, count, reason in rows if not reason)
    called = len(set(case.quantized) - case.left_in_float)
    share = min(1.0, planned / called)  # a layer that is called twice counts twice
    left = Counter[str]()
    for _, count, reason in rows:
        if reason:
            left[reason.removeprefix("not planned: ")] += count
    return Outcome(share == 1, share, left.most_common(1)[0][0] if left and share < 1 else "", dict(left))


def fold(case: Case) -> Outcome:
    """Fold batch norms; compare outputs in evaluation."""
    norms = sum(isinstance(m, _BatchNorm) for m in case.original.modules())
    if not norms:
        return Outcome(True, None, "no batch norm")
    case.reset(training=False)
    folding = gl.fold_batch_norm(case.converted, case.batch)
    apart, name = named_difference(case.outputs(folding.model), case.outputs(case.original))
    if apart > 1e-8:
        return Outcome(False, apart, f"outputs differ by {apart:.2g}: {name}")
    refused = [f"{name} {reason}" for name, reason in folding.refused.items()]
    return Outcome(not refused, len(folding.folded) / norms, refused[0] if refused else "")


def widths(case: Case) -> Outcome:
    """Calibrate, evaluate at two widths; no weight that counts as quantized may be used in float."""
    case.reset(training=False)
    before = case.outputs(case.converted)
    gl.calibrate(case.converted, [case.batch])
    layers = set(case.quantized) - case.left_in_float
    with gl.bits(case.converted, w=4, a=4), float_weights(case.converted, layers) as found:
        narrow = case.outputs(case.converted)
    table = gl.sweep(case.converted, lambda m: named_difference(case.outputs(m), before)[0], [(8, 8), (4, 4)])
    if found:
        return Outcome(False, reason=f"weights used in float: {_some(sorted(found))}")
    if not 0 < table[8, 8] < float("inf") or table[4, 4] != named_difference(narrow, before)[0]:
        return Outcome(False, table[8, 8], "a width has no effect, or another one at another time")
    again, _ = named_difference(case.outputs(case.converted), before)
    return Outcome(not again, table[8, 8], "not the same in float afterwards" if again else "")


def any_bit(case: Case) -> Outcome:
    """Write an any-bit file, read 4 bits of it; compare with the weights that the format's rule gives."""
    case.reset(training=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        gl.save_any_bit(case.converted, path)
        loaded = gl.load_any_bit(gl.convert(case.model), path, w=4)
    gl.set_bits(loaded, w=4, a=None)
    layers = case.quantized
    with oracle.weights_replaced(case.original, case.batch, layers, lambda weight: cut(weight, 4)):
        truth = case.outputs(case.original)
    return _within(1e-8, named_difference(case.outputs(loaded), truth))


def export(case: Case) -> Outcome:
    """Export to ONNX; a plain session of onnxruntime must compute what the simulation says."""
    case.reset(training=False)
    try:
        fault = exported(case.original, make(case.entry)[0], case.batch)
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    if fault is None:
        return Outcome(True, None, "torch.export does not take the original")
    return Outcome(not fault, 0.0 if fault else 1.0, fault)


def cut(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a weight on its 8-bit grid; keep the first bits of each code, and read it as their middle."""
    scale = weight.abs().max() / 127
    codes = torch.round(weight / scale)
    width = 2 ** (8 - bits)
    return (torch.floor(codes / width) * width + (width - 1) / 2) * scale


Check = Callable[[Case], Outcome]

# In this order: plans are known after a pass with a penalty, and any-bit changes weights of the original.
CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (identity, outputs, penalty, quantized, plans, fold, widths, export, any_bit)
}
OF_RECIPE = ("outputs", "penalty", "plans")


def _within(tolerance: float, *found: tuple[float, str]) -> Outcome:
    value, where = max(found)
    much = "not finite, or of another shape" if value == float("inf") else f"{value:.2g}"
    return Outcome(value <= tolerance, value, "" if value <= tolerance else f"{much}: {where}")


def _some(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
