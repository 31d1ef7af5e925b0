"""The contract suite on tiny models of every family."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from family_models import BASE_BITS, PIPELINES, make, one_call
from hosts import HOSTS, with_hosts
from qlip_plugins import load_backend
from qlip_plugins.calibration.nearest import nearest_state
from qlip_plugins.contract import BACKEND_CHECKS, BackendCase, BackendCheck
from qlip_plugins.families import denoiser_of
from qlip_plugins.grids import Ranges

WIDTHS = (4, BASE_BITS, 32)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BackendCase]:
    made = {}
    for name in PIPELINES:
        pipe = make(name, tmp_path_factory.mktemp(name))
        denoiser, inputs = denoiser_of(pipe), one_call(name, pipe)
        state = nearest_state(denoiser, inputs, 4, BASE_BITS)
        weights = {f"{layer}.weight": denoiser.get_parameter(f"{layer}.weight") for layer in state.layers}
        whole: Any = {**state.float_parameters, **weights}
        fitted = {quantizer: {4: grid.at_width(4)} for quantizer, grid in state.activations.items()}
        del inputs["return_dict"]
        made[name] = BackendCase(
            backend=load_backend("torch"),
            make_denoiser=partial(copy.deepcopy, denoiser),
            state=state.__class__(state.format, state.layers, float_parameters=whole, source=state.source),
            inputs=inputs,
            ranges=Ranges(fitted, fingerprint=state.fingerprint),
            widths=WIDTHS,
        )
    return made


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("check", BACKEND_CHECKS.values(), ids=BACKEND_CHECKS)
def test_backend(cases: dict[str, BackendCase], name: str, check: BackendCheck) -> None:
    check(cases[name])


@pytest.mark.parametrize("name", ["sdxl", "flux"])  # tests/adapters has SD's shape
@pytest.mark.parametrize("host", with_hosts(HOSTS))
@pytest.mark.parametrize("check", BACKEND_CHECKS.values(), ids=BACKEND_CHECKS)
def test_framework(cases: dict[str, BackendCase], host: str, name: str, check: BackendCheck) -> None:
    check(replace(cases[name], backend=load_backend(host)))
