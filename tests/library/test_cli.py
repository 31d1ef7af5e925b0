"""The program as a user meets it: data on stdout, talk on stderr, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from qlip_plugins import BitPlan, load_base_quantizer
from qlip_plugins.cli import main
from qlip_plugins.generation import noise_seeds
from qlip_plugins.recipe import Recipe

SAMPLING = ["--steps", "4", "--guidance", "3"]


@pytest.mark.parametrize(
    ("case", "bits", "acts"), [("w4a8", 4, 8), ("w8a8", 8, 8), ("w4a16", 4, 16), ("w4", 4, None)]
)
def test_inspect(
    golden: Path, capsys: pytest.CaptureFixture[str], case: str, bits: int, acts: int | None, tmp_path: Path
) -> None:
    checkpoint = golden / "qdiffusion" / case / "ckpt.pth"
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "qdiffusion"
    assert found["weight_bits"] == bits
    assert found["activation_bits"] == acts
    assert found["has_activations"] is (acts is not None)
    assert (found["quantized_layers"], found["split_layers"]) == (83, 4)
    path = tmp_path / "r.yaml"
    path.write_text(found["recipe"])
    recipe = Recipe.from_yaml(path)
    state = load_base_quantizer("qdiffusion").load(recipe.base)
    assert len(state.activations) == (119 if acts else 0)


def test_inspect_without_a_record_says_what_is_unknown(
    golden: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "renamed.pth"
    path.write_bytes((golden / "qdiffusion" / "w4a8" / "ckpt.pth").read_bytes())
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "weight_bits: 4" in text
    assert "# note: activation_bits is in neither the file nor a record" in text
    assert "note: softmax_bits is in neither" in text
    assert "activation_bits: null" not in text, "null would mean weights only"


def test_what_inspect_prints_is_a_recipe(
    golden: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for case in ("w4a8", "w4"):
        assert main(["inspect", str(golden / "qdiffusion" / case / "ckpt.pth")]) == 0
        path = tmp_path / "my.yaml"
        path.write_text(capsys.readouterr().out)
        assert Recipe.from_yaml(path).missing_files() == [
            f"model.pipeline: {tmp_path}/path/to/the/calibrated/pipeline"
        ]


@pytest.mark.parametrize(
    ("case", "note"), [("w8a8", "weight_bits is given as 8"), ("w4a8", "beyond the last code 255")]
)
def test_inspect_sees_that_the_record_is_another_run_s(
    golden: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str, note: str
) -> None:
    (tmp_path / "ckpt.pth").write_bytes((golden / "qdiffusion" / "w4a16" / "ckpt.pth").read_bytes())
    record = (golden / "qdiffusion" / case / "sampling_config.yaml").read_text()
    (tmp_path / "sampling_config.yaml").write_text(record)
    assert main(["inspect", str(tmp_path / "ckpt.pth")]) == 0
    text = capsys.readouterr().out
    assert "# note: does not load with sampling_config.yaml as it is" in text
    assert note in text


def test_inspect_of_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    assert main(["inspect", str(path)]) == 3
    assert "qdiffusion: " in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none.pth")]) == 3
    assert "no such file" in capsys.readouterr().err


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        "generate",
        "golden-w4a8",
        "--prompt",
        "row 12",
        "--prompt",
        "row 21",
        *SAMPLING,
        "--out",
        str(out),
    ]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((out / "report.json").read_text())
    assert "wrote" in captured.err
    assert [row["prompt"] for row in report["prompts"]] == ["row 12", "row 21"]
    plan = BitPlan.load(out / "plan.safetensors")
    assert plan.digest() == report["plan_digest"]
    assert [row["fab"] for row in report["prompts"]] == pytest.approx(plan.fab())
    names = {
        "000.png",
        "001.png",
        "000-bits.png",
        "001-bits.png",
        "plan.safetensors",
        "report.json",
        "report.txt",
    }
    assert {path.name for path in out.iterdir()} == names
    with Image.open(out / "000.png") as image:
        assert image.size == (4 * 128 + 3 * 4, 128 + 16)
    before = (out / "000.png").read_bytes()
    assert main(command) == 0, "an earlier result of this command is replaced"
    assert (out / "000.png").read_bytes() == before, "and the same command makes the same picture"


def test_noise_seeds() -> None:
    first, second, again = noise_seeds(["a", "b", "a"], seed=0)
    assert len({first, second, again}) == 3
    assert noise_seeds(["b"], seed=0) == [second]
    assert noise_seeds(["b", "a"], seed=0) == [second, first]
    assert noise_seeds(["b"], seed=1) != [second]


def test_a_picture_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    pair, alone = tmp_path / "pair", tmp_path / "alone"
    prompts = ["--prompt", "row 12", "--prompt", "row 21"]
    assert main(["generate", "golden-w4a8", *prompts, *SAMPLING, "--out", str(pair)]) == 0
    assert main(["generate", "golden-w4a8", *prompts[2:], *SAMPLING, "--out", str(alone)]) == 0
    both, one = BitPlan.load(pair / "plan.safetensors"), BitPlan.load(alone / "plan.safetensors")
    assert torch.equal(both.bits[1], one.bits[0])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["golden-w4a8", "--prompt", "a cat"], 2, "prompt 'a cat' is not among the 65 precomputed ones"),
        (["golden-w4a9", "--prompt", "row 1"], 2, "did you mean 'golden-w4a8'"),
        (["no/such.yaml", "--prompt", "row 1"], 2, "no such recipe file"),
    ],
)
def test_generate_refuses(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments, *SAMPLING, "--out", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_generate_does_not_overwrite_what_is_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "report.json").write_text("{}")
    assert main(["generate", "golden-w4a8", "--prompt", "row 1", *SAMPLING, "--out", str(tmp_path)]) == 3
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_generate_with_weights_only(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(golden / "qdiffusion" / "w4" / "ckpt.pth"), "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["recipe"]
    folder = "package://qlip_recipes/golden_w4a8"
    model = f"{folder}/pipeline\n  prompt_embeddings: {folder}/prompt_embeddings.safetensors"
    (tmp_path / "r.yaml").write_text(text.replace("path/to/the/calibrated/pipeline", model))
    out = tmp_path / "out"
    command = ["generate", str(tmp_path / "r.yaml"), "--prompt", "row 1", *SAMPLING]
    assert main([*command, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"][0]["fab"] is None
    assert report["prompts"][0]["bitops_paper"] > 0
    assert not (out / "000-bits.png").exists()


def test_text_prompts_need_a_text_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = subprocess_free_show(capsys)
    path = tmp_path / "r.yaml"
    path.write_text("\n".join(line for line in shown.splitlines() if "prompt_embeddings:" not in line))
    assert main(["generate", str(path), "--prompt", "a cat", *SAMPLING, "--out", str(tmp_path / "out")]) == 4
    assert "has no tokenizer or no text encoder" in capsys.readouterr().err


def test_no_ranges_for_weights_only(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = subprocess_free_show(capsys)
    path = tmp_path / "r.yaml"
    path.write_text(shown.replace("activation_bits: 8\n", "activation_bits: null\n"))
    out = tmp_path / "ranges.safetensors"
    assert main(["fit-ranges", str(path), "--prompt", "row 1", *SAMPLING, "--out", str(out)]) == 4
    assert "no range to fit" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "ten", "expected a whole number from 1 to 1000, found 'ten'"),
        ("--steps", "2000", "expected a whole number from 1 to 1000"),
        ("--guidance", "nan", "expected a finite number, found 'nan'"),
        ("--guidance", "strong", "expected a finite number, found 'strong'"),
    ],
)
def test_settings_are_checked(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "golden-w4a8", "--prompt", "row 1", "--out", "nowhere", option, value])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "generate",
        "golden-w4a8",
        "--prompt",
        "row 1",
        "--device",
        "nonsense",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(command) == 4
    assert "device 'nonsense' cannot be used" in capsys.readouterr().err


def test_fit_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.safetensors"
    assert (
        main(["fit-ranges", "golden-w4a8", "--prompt", "row 40", *SAMPLING, "--out", str(out), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["quantizers"], found["widths"]) == (119, [8, 16])
    recipe = tmp_path / "r.yaml"
    shipped = subprocess_free_show(capsys)
    recipe.write_text(
        shipped.replace("package://qlip_recipes/golden_w4a8/ranges.safetensors", "r.safetensors")
    )
    assert (
        main(["generate", str(recipe), "--prompt", "row 1", *SAMPLING, "--out", str(tmp_path / "out")]) == 0
    )
    assert main(["fit-ranges", "golden-w4a8", "--prompt", "row 40", "--out", str(tmp_path / "r.txt")]) == 2


def subprocess_free_show(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["recipe", "show", "golden-w4a8"]) == 0
    return capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["adapters"]["qlip_plugins.backends"]["torch"]["usable"] is True
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "ok  torch" in shown
    assert "torchmetrics" in shown, "installed or not, it is no reason to fail"


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlip_plugins", "recipe", "list"], capture_output=True, text=True, check=True
    )
    assert "golden-w4a8" in done.stdout
