"""The command line: doctor, quantize, demo; a user's mistake is one line and exit code 2."""

import json

import pytest
from tiny import dit_pipeline, wan_model

from triskele.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and "triskele" in capsys.readouterr().out


def test_doctor_names_hardware_backends_and_models(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for wanted in ("cpu", "commit", "CPU library   loads", "sla.forward", "reference", "Wan", "refused"):
        assert wanted in out, wanted


def test_quantize_a_transformer_folder(tmp_path, capsys):
    from diffusers import WanTransformer3DModel

    wan_model().save_pretrained(tmp_path / "in")
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), "--rank", "4",
                 "--scales", "integer"]) == 0
    assert "linears" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["linear"]["rank"] == 4
    assert config["quantization_config"]["linear"]["scales"] == "integer"
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert type(loaded.blocks[0].attn1.to_q).__name__ == "SVDQuantLinear"


@pytest.mark.parametrize("arguments, match", [
    (["quantize", "{tmp}/none", "{tmp}/out"], "model: expected a folder"),
    (["demo", "--model", "{tmp}/none"], "--model: expected a diffusers folder"),
    (["demo", "--scenes", "music"], "--scenes: expected image, video"),
    (["demo", "--model", "{tmp}", "--call", "height"], "--call: expected NAME=VALUE"),
])
def test_mistakes(arguments, match, tmp_path, capsys):
    assert main([a.format(tmp=tmp_path) for a in arguments]) == 2
    assert match in capsys.readouterr().err


def test_demo_of_the_trained_models(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "demo.json").read_text())
    rows = {(r["scene"], r["name"]): r for r in record["rows"]}
    assert record["quick"] and record["machine"]["commit"]
    for scene in ("image", "video"):
        assert rows[scene, "plain"]["psnr"] is None and rows[scene, "plain"]["ratio"] == 1.0
        linear = next(r for (s, n), r in rows.items() if s == scene and n.startswith("linear"))
        assert linear["weight_mb"] < 0.7 * rows[scene, "plain"]["weight_mb"]
        assert all(r["psnr"] is None or r["psnr"] > 5 for (s, _), r in rows.items() if s == scene)
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/webp") >= 7 and page.count("data:image/png") >= 5
    assert "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "video.png").stat().st_size > 10_000


def test_demo_of_a_folder_of_ones_own(tmp_path, capsys):
    dit_pipeline().save_pretrained(tmp_path / "mine")
    arguments = ["demo", "--model", str(tmp_path / "mine"), "--steps", "3", "--prompt", "3,7", "--out",
                 str(tmp_path / "out"), "--call", "guidance_scale=2.0"]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "out" / "demo.json").read_text())["rows"]
    assert [r["name"].split(":")[0] for r in rows] == ["plain", "attention", "linear", "sampler", "all arms"]
    assert (tmp_path / "out" / "index.html").exists()
    assert main([*arguments[:5], "--prompt", "a cat", "--out", str(tmp_path / "out")]) == 2
    assert "--prompt for a DiT" in capsys.readouterr().err
