"""What `alvts plan` says of a benchmark on this machine, beside what was measured."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..engine.sizes import default_carry_rank
from ..plan.cards import Ceilings
from ..plan.describe import describe
from ..plan.machine import device_here, measure_machine
from ..plan.predict import Prediction, predict
from ..plan.work import Case
from .subject import Subject

_PLANNED = {"prefill": "prefill", "ttft": "first token", "decode": "decode"}
"""By the name of a figure, that of the predicted phase."""


def predicted(subject: Subject) -> tuple[Prediction, Ceilings]:
    """What to expect of a subject on the machine it runs on, whose ceilings are measured first."""
    settings, model = subject.settings, subject.model
    machine = measure_machine(str(model.device), settings["dtype"])
    device = device_here(str(model.device))
    shape = describe(settings["model"], model.config, {"its": subject.policy}, device)
    case = Case(
        shape,
        subject.policy,
        shape.counts["its"],
        tuple(settings["kept_per_layer"]),
        subject.prompt.visual_tokens,
        subject.prompt.text_tokens,
        settings["batch"],
        rank=settings["rank"],
        carry_rank=default_carry_rank(shape.width),
    )
    return predict(case, machine), machine


def speedups(prediction: Prediction) -> dict[str, float]:
    """The eager ones, by the name of the figure they predict: `prefill_speedup`, ..."""
    return {
        f"{name}_speedup": prediction.dense[phase].eager / prediction.selective[phase].eager
        for name, phase in _PLANNED.items()
    }


def error(prediction: Prediction, figures: Mapping[str, float]) -> float:
    """How far the predicted prefill speed-up is from the measured one, as a share of it."""
    return abs(speedups(prediction)["prefill_speedup"] / figures["prefill_speedup"] - 1)


def to_table(prediction: Prediction, machine: Ceilings, figures: Mapping[str, float]) -> Table:
    """Predicted beside measured; the ceilings stand below."""
    table = Table(
        "predicted / measured",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=_ceilings(machine),
        caption_justify="left",
    )
    for column in ("dense, ms", "selective, ms", "ratio", "ratio off by"):
        table.add_column(column, justify="right")
    for name, phase in _PLANNED.items():
        planned = speedups(prediction)[f"{name}_speedup"]
        measured = figures[f"{name}_speedup"]
        table.add_row(
            phase,
            _pair(prediction.dense[phase].eager, figures[f"{name}_ms_dense"]),
            _pair(prediction.selective[phase].eager, figures[f"{name}_ms"]),
            f"{planned:.2f} / {measured:.2f}",
            f"{100 * (planned / measured - 1):+.0f} %",
        )
    return table


def to_json(prediction: Prediction, machine: Ceilings) -> dict[str, Any]:
    """The same as plain values, with the ceilings that were measured."""
    return {
        "machine": asdict(machine),
        "predicted": {
            **speedups(prediction),
            **{
                f"{name}_ms{side}": 1000 * phases[phase].eager
                for name, phase in _PLANNED.items()
                for side, phases in (
                    ("", prediction.selective),
                    ("_dense", prediction.dense),
                )
            },
        },
    }


def _ceilings(machine: Ceilings) -> str:
    few, *_, many = machine.matmul[-1][1]
    return (
        f"ceilings: products {few[1] / 1e9:,.0f} GFLOP/s at {few[0]:g} row and "
        f"{many[1] / 1e9:,.0f} at {many[0]:g}, attention {machine.attention[-1][1] / 1e9:,.0f}, "
        f"memory {machine.bandwidth / 1e9:,.1f} GB/s, other operators "
        f"{machine.elementwise[0][1] / 1e9:,.1f} to {machine.elementwise[-1][1] / 1e9:,.1f}, a "
        f"launch {machine.launch * 1e6:.1f} us; timings of one figure {machine.spread:.0%} apart"
    )


def _pair(seconds: float, ms: float) -> str:
    return f"{1000 * seconds:,.3g} / {ms:,.3g}"
