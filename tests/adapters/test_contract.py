"""Every installed adapter keeps the contract; ours are its first users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from golden_model import GoldenModel
from hosts import HOSTS, with_hosts
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.adapter import BACKENDS, BASE_QUANTIZERS, installed
from qlip_plugins.contract import (
    BACKEND_CHECKS,
    BASE_QUANTIZER_CHECKS,
    BackendCase,
    BackendCheck,
    BaseQuantizerCase,
    BaseQuantizerCheck,
)
from qlip_plugins.fitting import fit_ranges
from qlip_plugins.grids import Ranges
from qlip_plugins.packed import write_packed
from qlip_plugins.state import CalibratedState

BASES = ("packed", "ptqd", "qdiffusion")
SAME_MODEL = ("packed", "qdiffusion")
BASES_RUN = ("w4a8", "w4a16", "w8a8")


def base_options(name: str, golden: Path, states: dict[str, CalibratedState], folder: Path) -> dict[str, Any]:
    """The `base:` section of a golden W4A8 model as one of our base quantizers has it; the path comes first."""
    if name == "packed":
        state = states["w4a8"]
        write_packed(folder / "packed", state.with_activations({}), {8: state.activations}, {}, "a test")
        return {"folder": folder / "packed", "activation_bits": 8}
    if name == "ptqd":
        theirs = golden / "ptqd" / "w4a8"
        return {
            "checkpoint": theirs / "quantw4a8_ldm_brecq.pth",
            "zero_points": theirs / "quantizers.json",
        }
    checkpoint = golden / "qdiffusion" / "w4a8" / "ckpt.pth"
    return {"checkpoint": checkpoint, "weight_bits": 4, "activation_bits": 8, "softmax_bits": 16}


@pytest.fixture(scope="module")
def fitted(model: GoldenModel, states: dict[str, CalibratedState]) -> dict[str, Ranges]:
    """Ranges for 4, 8 and 16 bits of both bases, fitted on the recorded inputs."""
    found = {}
    for case in ("w4a8", "w4a16", "w8a8"):
        unet = model.unet()
        quantizers = load_backend("torch").install(unet, states[case])

        def run(unet: torch.nn.Module = unet) -> None:
            with torch.no_grad():
                for index in range(6):
                    unet(**model.call(index))

        found[case] = fit_ranges(quantizers, states[case], (4, 8, 16), run)
        quantizers.remove()
    return found


def backends() -> list[Any]:
    """Every backend on every base; a framework's own on one, since only its rounding differs."""
    names = tuple(name for name in installed(BACKENDS) if name != "elsewhere")
    bases = {name: BASES_RUN[:1] if name in HOSTS else BASES_RUN for name in names}
    return [
        pytest.param(*param.values, base, marks=param.marks, id=f"{param.values[0]}-{base}")
        for param in with_hosts(names)
        for base in bases[str(param.values[0])]
    ]


@pytest.mark.parametrize("check", BACKEND_CHECKS.values(), ids=list(BACKEND_CHECKS))
@pytest.mark.parametrize(("name", "base"), backends())
def test_backend(
    name: str,
    check: BackendCheck,
    base: str,
    model: GoldenModel,
    states: dict[str, CalibratedState],
    fitted: dict[str, Ranges],
) -> None:
    check(
        BackendCase(
            backend=load_backend(name),
            make_denoiser=model.unet,
            state=states[base],
            inputs=model.call(5),
            ranges=fitted[base],
            widths=(4, 8, 32),
        )
    )


SMOOTHED = ("exact_at_base", "untouched_at_32", "rows_have_their_own_bits", "reversible", "survives_deepcopy")


@pytest.mark.parametrize("check", SMOOTHED)
@pytest.mark.parametrize("name", with_hosts(("torch", *HOSTS)))
def test_smoothed_inputs_and_low_rank_branches(
    name: str, check: str, model: GoldenModel, states: dict[str, CalibratedState]
) -> None:
    """As SmoothQuant, AWQ and SVDQuant leave them; a convolution can be smoothed, too."""
    generator = torch.Generator().manual_seed(0)
    layers = dict(states["w8a8"].layers)
    for path, layer in states["w8a8"].layers.items():
        if path.endswith((".to_q", ".to_out.0", "conv1")) and layer.split is None:
            out, into = layer.shape[:2]
            branch = (torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator))
            layers[path] = replace(
                layer,
                smoothing=torch.rand(into, generator=generator) + 0.5,
                low_rank=None if path.endswith("conv1") else branch,
            )
    case = BackendCase(
        backend=load_backend(name),
        make_denoiser=model.unet,
        state=replace(states["w8a8"], layers=layers, operands={}),
        inputs=model.call(5),
        ranges=Ranges(keep_calibrated=True),
        widths=(6, 8, 32),
    )
    BACKEND_CHECKS[check](case)


@pytest.mark.parametrize("check", BASE_QUANTIZER_CHECKS.values(), ids=list(BASE_QUANTIZER_CHECKS))
@pytest.mark.parametrize("name", BASES)
def test_base_quantizer(
    name: str, check: BaseQuantizerCheck, golden: Path, states: dict[str, CalibratedState], tmp_path: Path
) -> None:
    options = base_options(name, golden, states, tmp_path)
    foreign = tmp_path / "foreign.pth"
    torch.save({"conv.weight": torch.zeros(2, 2)}, foreign)
    check(
        BaseQuantizerCase(
            name=name,
            adapter=load_base_quantizer(name),
            options=options,
            checkpoint=next(iter(options.values())),
            foreign=foreign,
        )
    )


def test_every_base_quantizer_of_ours_has_a_case() -> None:
    ours = {name for name, entry in installed(BASE_QUANTIZERS).items() if entry.value.startswith("qlip_")}
    # Those of frameworks have their cases in test_framework_models.py.
    assert ours - {"outside"} == {*BASES, *HOSTS}


def test_both_bases_are_one_model(golden: Path, states: dict[str, CalibratedState], tmp_path: Path) -> None:
    """A controller or ranges made on one of them serve the other."""
    prints = set()
    for name in SAME_MODEL:
        adapter = load_base_quantizer(name)
        config: Any = adapter.config_class
        prints.add(adapter.load(config(**base_options(name, golden, states, tmp_path))).fingerprint)
    assert len(prints) == 1
