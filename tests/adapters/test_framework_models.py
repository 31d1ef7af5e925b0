"""Models that a framework has quantized in place, under its own backend, on every shape of denoiser."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest

from family_models import make, one_call
from golden_model import GoldenModel
from hosts import HOSTS, model_reader_case, with_hosts
from qlip_plugins.contract import (
    BACKEND_CHECKS,
    MODEL_READER_CHECKS,
    BackendCase,
    BackendCheck,
    ModelReaderCase,
    ModelReaderCheck,
)
from qlip_plugins.families import denoiser_of

SHAPES = ("golden", "sdxl", "flux")

# There are no float weights to refuse: `notices_other_ranges` takes that check's place.
ON_QUANTIZED = {name: check for name, check in BACKEND_CHECKS.items() if name != "loads_or_refuses"}


class Cases:
    """Each made when it is first asked for."""

    def __init__(self, model: GoldenModel, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._made: dict[tuple[str, str], ModelReaderCase] = {}
        self._on_backend: dict[tuple[str, str], BackendCase] = {}

    def of(self, host: str, shape: str) -> ModelReaderCase:
        if (host, shape) not in self._made:
            if shape == "golden":
                make_float, inputs = self._model.unet, self._model.call(5)
            else:
                pipe = make(shape, self._folder / shape)
                make_float, inputs = partial(copy.deepcopy, denoiser_of(pipe)), one_call(shape, pipe)
                del inputs["return_dict"]
            self._made[host, shape] = model_reader_case(host, make_float, inputs)
        return self._made[host, shape]

    def on_backend(self, host: str, shape: str) -> BackendCase:
        if (host, shape) not in self._on_backend:
            self._on_backend[host, shape] = self.of(host, shape).as_backend()
        return self._on_backend[host, shape]


@pytest.fixture(scope="module")
def cases(model: GoldenModel, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(model, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("host", with_hosts(HOSTS))
@pytest.mark.parametrize("check", MODEL_READER_CHECKS.values(), ids=MODEL_READER_CHECKS)
def test_model(check: ModelReaderCheck, host: str, shape: str, cases: Cases, tmp_path: Path) -> None:
    check(cases.of(host, shape), tmp_path)


@pytest.mark.parametrize("shape", ["golden", "flux"])  # on SDXL's shape test_families_contract.py has them
@pytest.mark.parametrize("host", with_hosts(HOSTS))
@pytest.mark.parametrize("check", ON_QUANTIZED.values(), ids=ON_QUANTIZED)
def test_backend(check: BackendCheck, host: str, shape: str, cases: Cases) -> None:
    check(cases.on_backend(host, shape))
