"""The demo model quantized by ModelOpt and by brevitas, and one checkpoint through every backend (docs/frameworks.md).

python scripts/frameworks.py quantize build/frameworks   # W4A8, each with its own calibration; and recipes
python scripts/frameworks.py show build/frameworks       # before and after, saved and reloaded in a fresh process
python scripts/frameworks.py golden                      # docs/frameworks/golden.json and golden.md
python scripts/frameworks.py device --device cuda        # both frameworks there, in three types
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qlip_plugins import apply
from qlip_plugins.adapter import Installed, load_backend, load_base_quantizer
from qlip_plugins.artefacts import versions
from qlip_plugins.generation import load_pipeline
from qlip_plugins.grids import Ranges
from qlip_plugins.recipe import Recipe
from qlip_plugins.sharing import convert
from qlip_plugins.state import CalibratedState

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "frameworks"
FRAMEWORKS = ("modelopt", "brevitas")
STEPS, GUIDANCE, SEED = 25, 3.0, 0
CALIBRATION_PROMPTS = 32
PROMPTS = ("rocket", "castle", "cat", "a pencil drawing of a slice of pizza, food")


def sample(pipe: Any, prompts: list[str], seed: int = SEED) -> list[Image.Image]:
    """One picture of each prompt, always from the same noise."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": generators}
    found: list[Image.Image] = pipe(prompts, **options).images
    return found


def demo_pipe() -> Any:
    """The demo pipeline in full precision."""
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _calibration() -> list[str]:
    text = (ROOT / "scripts" / "demo_model" / "calibration.txt").read_text(encoding="utf-8")
    return text.splitlines()[:CALIBRATION_PROMPTS]


def by_modelopt(pipe: Any, calibration: list[str]) -> None:
    """W4A8 by `mtq.quantize`, ranges from the largest value seen."""
    import modelopt.torch.quantization as mtq

    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
            {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False},
        ],
        "algorithm": "max",
    }
    pipe.unet = mtq.quantize(pipe.unet, config, lambda _: sample(pipe, calibration, 1000))


def by_brevitas(pipe: Any, calibration: list[str]) -> None:
    """W4A8 by `layerwise_quantize`, ranges from the largest value seen; none without prompts."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    class W4(Int8WeightPerChannelFloat):  # type: ignore[misc]
        bit_width = 4

    class A8(Int8ActPerTensorFloat):  # type: ignore[misc]
        scaling_stats_op = "max"

    options = {"weight_quant": W4, "input_quant": A8, "bias_quant": None, "return_quant_tensor": False}
    layers = {nn.Conv2d: (qnn.QuantConv2d, dict(options)), nn.Linear: (qnn.QuantLinear, dict(options))}
    device = pipe.unet.device
    pipe.unet = layerwise_quantize(pipe.unet, compute_layer_map=layers).to(device)  # it is made on the CPU
    if calibration:
        with torch.no_grad(), calibration_mode(pipe.unet):
            sample(pipe, calibration, 1000)
    pipe.unet.eval()


def save(name: str, pipe: Any, path: Path) -> None:
    """Write a quantized denoiser in its framework's own way."""
    if name == "modelopt":
        import modelopt.torch.opt as mto

        mto.save(pipe.unet, path)
    else:
        torch.save(pipe.unet.state_dict(), path)


def restore(name: str, path: Path) -> Any:
    """A pipeline with a quantized denoiser, as its framework gives it back."""
    pipe = demo_pipe()
    if name == "modelopt":
        import modelopt.torch.opt as mto

        pipe.unet = mto.restore(pipe.unet, path)
    else:
        by_brevitas(pipe, [])
        pipe.unet.load_state_dict(torch.load(path, weights_only=True))
    return pipe


QUANTIZE: dict[str, Callable[[Any, list[str]], None]] = {"modelopt": by_modelopt, "brevitas": by_brevitas}
WIDTHS = {"modelopt": "", "brevitas": ", weight_bits: 4, activation_bits: 8"}


def recipe_text(base: str, backend: str, controller: str, ranges: bool = True) -> str:
    """A recipe over a quantized demo model; without ranges until they are fitted."""
    table = "ranges: {table: ranges.safetensors}\n" if ranges else ""
    return (
        "schema_version: 1\n"
        "model: {pipeline: 'package://qlip_demo/pipeline'}\n"
        f"base: {base}\nbackend: {backend}\n"
        "activation_bits: {low: 4, medium: 6, high: 8}\n"
        f"{table}controller: {controller}\n"
    )


def quantize(out: Path) -> None:
    """Quantize the demo model by each framework and write file, recipes and a copy that needs no framework."""
    for name in FRAMEWORKS:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        pipe = demo_pipe()
        QUANTIZE[name](pipe, _calibration())
        save(name, pipe, folder / "unet.pth")
        base = f"{{adapter: {name}, checkpoint: unet.pth{WIDTHS[name]}}}"
        static, qlip = "{kind: static, bits: base}", "{kind: qlip, path: controller}"
        packed = "{adapter: packed, folder: packed, activation_bits: 8}"
        recipes = {
            "base": recipe_text(base, name, static, ranges=False),
            "qlip": recipe_text(base, name, qlip),
            "live-base": recipe_text(f"{{adapter: {name}}}", name, static, ranges=False),
            "live": recipe_text(f"{{adapter: {name}}}", name, qlip),
            # The same base for a machine without the framework, a rented GPU say.
            "portable-base": recipe_text(packed, "torch", static, ranges=False),
            "fitted": recipe_text(packed, "torch", static),
            "portable": recipe_text(packed, "torch", qlip),
        }
        for file, text in recipes.items():
            (folder / f"{file}.yaml").write_text(text)
        convert(Recipe.load(folder / "base.yaml").base, "package://qlip_demo/pipeline", folder / "packed")
        print(name, load_base_quantizer(name).inspect(folder / "unet.pth").base)


def digests(pictures: list[Image.Image]) -> list[str]:
    """SHA-256 of each picture's pixels."""
    return [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]


def run(pipe: Any, recipe: Recipe) -> tuple[list[Image.Image], Any]:
    """Pictures and the controller that made them, which stays on the pipeline."""
    controller = apply(pipe, recipe)
    return sample(pipe, list(PROMPTS)), controller


def reload(folder: Path) -> None:
    """In a process of its own: restore, apply, and print what comes out."""
    pictures, controller = run(restore(folder.name, folder / "saved.pth"), Recipe.load(folder / "live.yaml"))
    print(json.dumps({"plan": controller.plan.digest(), "pictures": digests(pictures)}))


def show(out: Path) -> None:
    """Pictures and costs before and after; the same from a file, and from a fresh process."""
    OUT.mkdir(exist_ok=True)
    found: dict[str, Any] = {"prompts": PROMPTS, "seed": SEED, "versions": versions()}
    full = sample(demo_pipe(), list(PROMPTS))
    for name in FRAMEWORKS:
        folder = out / name
        pipe = restore(name, folder / "unet.pth")
        base, controller = run(pipe, Recipe.load(folder / "live-base.yaml"))
        before = controller.report()
        controller.remove()
        ours, controller = run(pipe, Recipe.load(folder / "live.yaml"))
        after, plan = controller.report(), controller.plan.digest()
        # Saved while bits are chosen: the file must hold the base alone.
        save(name, pipe, folder / "saved.pth")
        controller.remove()
        command = [sys.executable, __file__, "reload", str(folder)]
        again = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
        from_file, controller = run(demo_pipe(), Recipe.load(folder / "qlip.yaml"))
        found[name] = {
            "before": before.to_dict()["mean"],
            "after": after.to_dict()["mean"],
            "fab": [cost.fab for cost in after.prompts],
            "quality": [cost.quality for cost in after.prompts],
            "fresh process: same plan": again["plan"] == plan,
            "fresh process: same pictures": again["pictures"] == digests(ours),
            "from the file: same plan": controller.plan.digest() == plan,
            "from the file: largest difference of a pixel (of 255)": max(map(_difference, ours, from_file)),
            "remarks": controller.report().remarks,
        }
        _grid({"full precision": full, f"{name} W4A8": base, "+ QLIP {4,6,8}": ours}).save(
            OUT / f"{name}.png"
        )
        print(json.dumps({name: found[name]}, indent=2))
    (OUT / "demo.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _difference(one: Image.Image, other: Image.Image) -> int:
    pixels = [
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int() for picture in (one, other)
    ]
    return int((pixels[0] - pixels[1]).abs().max())


def _grid(columns: dict[str, list[Image.Image]], side: int = 128) -> Image.Image:
    head, margin = 16, 4
    width, height = side + margin, side + margin
    sheet = Image.new("RGB", (len(columns) * width, head + len(PROMPTS) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns.items()):
        draw.text((column * width + 2, 2), title, fill="black")
        for row, picture in enumerate(pictures):
            sheet.paste(
                picture.resize((side, side), Image.Resampling.NEAREST), (column * width, head + row * height)
            )
    return sheet


GOLDEN = ("w4a8", "w4a16", "w8a8")
BACKENDS = ("torch", *FRAMEWORKS)


def golden() -> None:
    """Genuine Q-Diffusion checkpoints through every backend, layer by layer, on recorded inputs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from golden_model import GoldenModel

    OUT.mkdir(exist_ok=True)
    model = GoldenModel(ROOT / "tests" / "golden")
    table: dict[str, Any] = {}
    for case in GOLDEN:
        state = _golden_state(case)
        expected = _layers(model.unet(), state, "torch", model)[0]
        for backend in BACKENDS:
            got, installed = _layers(model.unet(), state, backend, model)
            table[f"{case} {backend}"] = {
                "quantizers": len(installed),
                "run by the framework": len(installed) - len(installed.not_expressed),
                "not expressed": dict(Counter(installed.not_expressed.values())),
                **_compared(state, expected, got),
            }
    head = (
        *("checkpoint", "backend", "quantizers", "run by it", "values quantized", "rounded otherwise"),
        *("furthest, in steps", "whole UNet, relative RMS"),
    )
    lines = [_row(head), _row(["---"] * len(head))]
    for name, row in table.items():
        figures = [f"{row['furthest, in steps']:.3f}", f"{row['whole model, relative RMS']:.1e}"]
        counts = [row[key] for key in ("quantizers", "run by the framework", "values", "rounded otherwise")]
        lines.append(_row([*name.split(), *counts, *figures]))
    (OUT / "golden.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (OUT / "golden.json").write_text(
        json.dumps({"versions": versions(), **table}, indent=2) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))


def _golden_state(case: str) -> CalibratedState:
    adapter = load_base_quantizer("qdiffusion")
    config: Any = adapter.config_class
    return adapter.load(config(checkpoint=ROOT / "tests" / "golden" / "qdiffusion" / case / "ckpt.pth"))


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


Layers = dict[str, tuple[Tensor, Tensor]]
"""What each layer multiplies its weight with, and what it gives."""


@torch.no_grad()
def _layers(unet: nn.Module, state: CalibratedState, backend: str, model: Any) -> tuple[Layers, Installed]:
    """Every layer on the input that it has in the torch backend's run, and the whole model."""
    reference = model.unet()
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda module, args: inputs.__setitem__(name, args[0].clone())

    for name in state.layers:
        reference.get_submodule(name).register_forward_pre_hook(keep(name))
    load_backend("torch").install(reference, state)
    reference(**model.call(0))
    installed = load_backend(backend).install(unet, state)
    found = {name: _multiplied(unet.get_submodule(name), x) for name, x in inputs.items()}
    whole = unet(**model.call(0), return_dict=False)[0]
    found["whole"] = (whole, whole)
    return found, installed


class _Watch(TorchFunctionMode):
    """Sees what a linear or convolution multiplies its weight with, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.linear, functional.conv2d):
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


def _multiplied(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with _Watch() as watch:
        out = layer(x)
    return watch.seen[0], out


def _compared(state: CalibratedState, expected: Layers, got: Layers) -> dict[str, Any]:
    furthest, values, otherwise = 0.0, 0, 0
    for name, layer in state.layers.items():
        if layer.inputs:
            steps = (got[name][0] - expected[name][0]).abs() / max(abs(grid.scale) for grid in layer.inputs)
            furthest = max(furthest, float(steps.max()))
            values += steps.numel()
            otherwise += int((steps > 0.5).sum())
    one, other = got["whole"][1], expected["whole"][1]
    return {
        "layers": len(state.layers),
        "values": values,
        "rounded otherwise": otherwise,
        "furthest, in steps": furthest,
        "whole model, relative RMS": float((one - other).norm() / other.norm()),
    }


def on_device(device: str) -> None:
    """A model in memory and from a file on a device: to the bit where it has to be, and in half precision."""
    pipe = demo_pipe().to(device)
    states = pipe.encode_prompt(["rocket", "cat", "a house", "tree"], device, 1, False)[0].detach()
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    times = torch.tensor([801.0, 401.0, 201.0, 11.0], device=device)

    @torch.no_grad()
    def predict(unet: Any, kind: torch.dtype = torch.float32) -> Tensor:
        found: Tensor = unet(noise.to(kind), times, states.to(kind)).sample.float()
        return found

    for name in FRAMEWORKS:
        own = copy.copy(pipe)
        own.unet = copy.deepcopy(pipe.unet)
        QUANTIZE[name](own, ["rocket", "cat", "castle", "tree"])
        unet, kept = own.unet, Ranges(keep_calibrated=True)
        expected = predict(unet)
        adapter: Any = load_base_quantizer(name)
        state = adapter.read(adapter.config_class(), unet)
        handles = load_backend(name).install(unet, state, kept)
        found: dict[str, Any] = {"live base equal": torch.equal(predict(unet), expected)}
        _set(handles, torch.tensor([4, 8, 32, 6]))
        mixed = predict(unet)
        _set(handles, 6)
        found["row alone equal"] = torch.equal(predict(unet)[3], mixed[3])
        logits = torch.zeros(3, requires_grad=True, device=device)
        for handle in handles.values():
            handle.set_mixture((4, 6, 8), logits.softmax(-1), 6)
        unet(noise, times, states).sample.square().mean().backward()
        found["gradient"] = logits.grad.tolist() if logits.grad is not None else None
        handles.remove()
        found["removed equal"] = torch.equal(predict(unet), expected)
        for kind in (torch.float32, torch.float16, torch.bfloat16):
            found |= _against_torch(name, pipe.unet, state, kind, predict)
        print(json.dumps({name: found}, indent=2))


def _against_torch(
    name: str, unet: nn.Module, state: CalibratedState, kind: torch.dtype, predict: Callable[..., Tensor]
) -> dict[str, float]:
    by_backend: dict[str, list[Tensor]] = {}
    for backend in ("torch", name):
        plain = copy.deepcopy(unet).to(kind)
        handles = load_backend(backend).install(plain, state, Ranges(keep_calibrated=True))
        by_backend[backend] = [predict(plain, kind)]
        _set(handles, 16)
        by_backend[backend].append(predict(plain, kind))
    return {
        f"{kind} {name} vs torch, {bits} bits": float((ours - reference).norm() / reference.norm())
        for bits, ours, reference in zip((8, 16), by_backend[name], by_backend["torch"], strict=True)
    }


def _set(handles: Installed, bits: int | Tensor) -> None:
    for handle in handles.values():
        handle.set_bits(bits)


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["quantize", "show", "reload", "golden", "device"])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "frameworks")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.what == "golden":
        golden()
    elif options.what == "device":
        on_device(options.device)
    else:
        {"quantize": quantize, "show": show, "reload": reload}[options.what](options.folder)


if __name__ == "__main__":
    main()
