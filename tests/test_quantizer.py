"""Saving and loading patched models through diffusers' own calls; broken checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from patching import assert_restored, snapshot
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, dit_call, dit_pipeline, wan_inputs, wan_model

import triskele as tk
from triskele.diffusers import TriskeleConfig, quantizer
from triskele.nn import SVDQuantLinear

SLA = tk.SLA(keep=0.5, block_q=16, block_k=16)
RANK4 = tk.SVDQuant(rank=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@torch.no_grad()
def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


def cast(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@torch.no_grad()
def patched(family="wan", linear=RANK4, attention=SLA, model=None):
    """A patched model with a projection that is not zero, and its inputs."""
    model = FAMILIES[family][0]() if model is None else model
    handle = tk.patch(model, linear=linear, attention=attention)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "triskele_sla" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, FAMILIES[family][1](), handle


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_for_bit(family, tmp_path):
    model, inputs, _ = patched(family)
    want = run(model, inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs), want)
    old, new = model.state_dict(), again.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)
    assert any(isinstance(m, SVDQuantLinear) for m in again.modules())


@pytest.mark.parametrize("config", [
    tk.SVDQuant(rank=4, format="nvfp4", activation="none"), tk.SVDQuant(rank=0), tk.SVDQuant(rank=4, exclude=("to_q",)),
    tk.SVDQuant(rank=4, include=("ffn.net.2",), activation="int4"), tk.SVDQuant(rank=4, scales="integer"),
])
def test_round_trip_of_configs(config, tmp_path):
    model, inputs, _ = patched(linear=config, attention=None)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs), run(model, inputs))


@pytest.mark.parametrize("attention", [SLA, tk.SLA(keep=0.5, block_q=16, block_k=16, linear="alpha"),
                                       tk.VMoBA(top_k=2, chunks=(1, (4, 4), (1, 4, 4)))])
def test_attention_alone(attention, tmp_path):
    model, inputs, _ = patched(linear=None, attention=attention)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs), run(model, inputs))
    again.to(torch.bfloat16)                              # nothing is packed: diffusers lets it be cast


def test_saved_again_after_loading(tmp_path):
    model, inputs, _ = patched()
    model.save_pretrained(tmp_path / "one")
    type(model).from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = type(model).from_pretrained(tmp_path / "two")
    assert torch.equal(run(again, inputs), run(model, inputs))
    one, two = (json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("one", "two"))
    assert one == two and one["quant_method"] == "triskele"
    assert one["linear"]["include"]                       # the table of names is in the file, not only in this version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype_keeps_the_packed_tensors(dtype, tmp_path):
    model, inputs, _ = patched(attention=None)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    old = model.state_dict()
    packed = 0
    for name, tensor in again.state_dict().items():
        if name.rpartition(".")[2] in quantizer.PACKED:
            assert tensor.dtype == old[name].dtype and torch.equal(tensor, old[name])
            packed += 1
        elif not any(part in name for part in model._keep_in_fp32_modules):
            assert tensor.dtype == dtype, name
    assert packed == 20 * 5
    want = run(model, inputs)
    got = run(again, cast(inputs, dtype))
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.1 * float(want.abs().max()))


def test_model_saved_in_bfloat16(tmp_path):
    wan_model().save_pretrained(tmp_path / "plain")
    model = type(wan_model()).from_pretrained(tmp_path / "plain", torch_dtype=torch.bfloat16)
    model, inputs, _ = patched(model=model)
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    inputs = cast(inputs, torch.bfloat16)
    assert torch.equal(run(again, inputs), run(model, inputs))


def test_sharded(tmp_path):
    model, inputs, _ = patched()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(run(type(model).from_pretrained(tmp_path), inputs), run(model, inputs))


def test_whole_pipeline(tmp_path):
    from diffusers import DiTPipeline

    pipe = dit_pipeline()
    with tk.patch(pipe, linear=RANK4, attention=SLA, sampler=tk.ParaTAA(window=2, tolerance=1e-6)):
        pipe.save_pretrained(tmp_path)
    with tk.patch(pipe, linear=RANK4, attention=SLA):
        want = dit_call(pipe)
    again = DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(dit_call(again), want)
    assert type(again.scheduler).__name__ == "DDIMScheduler"


def test_restored_model_is_saved_as_plain(tmp_path):
    model, inputs = wan_model(), wan_inputs()
    before, want = snapshot(model), run(model, inputs)
    with tk.patch(model, linear=RANK4, attention=SLA):
        assert "quantization_config" in model.config
    assert_restored(model, before)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(run(type(model).from_pretrained(tmp_path), inputs), want)


def test_the_other_arm_on_a_loaded_model(tmp_path):
    model, inputs, _ = patched(linear=None)
    model.save_pretrained(tmp_path / "sla")
    loaded = type(model).from_pretrained(tmp_path / "sla")
    plain = run(loaded, inputs)
    with tk.patch(loaded, linear=RANK4):
        want = run(loaded, inputs)
        assert not torch.equal(want, plain)
        loaded.save_pretrained(tmp_path / "both")
    assert torch.equal(run(loaded, inputs), plain)
    both = type(model).from_pretrained(tmp_path / "both")
    assert torch.equal(run(both, inputs), want)
    with pytest.raises(ValueError, match=r"got .*SVDQuantLinear"):
        tk.patch(both, linear=RANK4)


# ---- quantizing while loading ----------------------------------------------------------------------------------------

def test_quantize_on_load(tmp_path):
    from diffusers import WanTransformer3DModel

    model, inputs = wan_model(), wan_inputs()
    model.save_pretrained(tmp_path / "plain")
    loaded = WanTransformer3DModel.from_pretrained(
        tmp_path / "plain", quantization_config=TriskeleConfig(linear=RANK4, attention=SLA))
    tk.patch(model, linear=RANK4, attention=SLA)
    want = run(model, inputs)
    assert torch.equal(run(loaded, inputs), want)
    loaded.save_pretrained(tmp_path / "packed")
    assert torch.equal(run(WanTransformer3DModel.from_pretrained(tmp_path / "packed"), inputs), want)
    assert (tmp_path / "packed" / WEIGHTS).stat().st_size < (tmp_path / "plain" / WEIGHTS).stat().st_size


def test_quantize_on_load_in_a_pipeline(tmp_path):
    from diffusers import DiTPipeline, PipelineQuantizationConfig

    pipe = dit_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path, quantization_config=PipelineQuantizationConfig(
        quant_mapping={"transformer": TriskeleConfig(linear=RANK4)}))
    loaded.set_progress_bar_config(disable=True)
    with tk.patch(pipe, linear=RANK4):
        assert torch.equal(dit_call(loaded), dit_call(pipe))


def test_quantize_on_load_refuses_several_devices_and_missing_weights(tmp_path):
    model = wan_model()
    model.save_pretrained(tmp_path)
    config = TriskeleConfig(linear=RANK4)
    with pytest.raises(ValueError, match="device_map: expected one device"):
        type(model).from_pretrained(tmp_path, quantization_config=config, device_map={"blocks": "cpu", "": "disk"})
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        type(model).from_pretrained(tmp_path, quantization_config=config, low_cpu_mem_usage=False)
    state = load_file(tmp_path / WEIGHTS)
    del state["blocks.1.ffn.net.2.weight"]
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.ffn\.net\.2\.weight; nothing was quantized"):
        type(model).from_pretrained(tmp_path, quantization_config=config)


# ---- broken and hostile checkpoints ----------------------------------------------------------------------------------

def _tamper(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})


Q = "blocks.0.attn1.to_q."


@pytest.mark.parametrize("change, match", [
    (lambda s: s.pop(Q + "qweight"), r"lacks blocks\.0\.attn1\.to_q\.qweight, .* nothing was loaded"),
    (lambda s: [s.pop(k) for k in list(s) if "triskele_sla" in k], "lacks blocks.0.attn1.triskele_sla"),
    (lambda s: s.pop("proj_out.weight"), "lacks proj_out.weight"),
    (lambda s: s.update({Q + "qweight": s[Q + "qweight"][:, :3]}), r"to_q\.qweight: expected shape \[24, 32\], got"),
    (lambda s: s.update({Q + "wscales": s[Q + "wscales"].repeat(1, 2)}), r"to_q\.wscales: expected shape"),
    (lambda s: s.update({Q + "lora_up": s[Q + "lora_up"][:, :2]}), r"to_q\.lora_up: expected shape \[24, 4\], got"),
    (lambda s: s.update({Q + "bias": s[Q + "bias"][:5]}), r"to_q\.bias expected shape"),
    (lambda s: s.update({Q + "qweight": s[Q + "qweight"].float()}), r"to_q\.qweight: expected dtype torch\.uint8"),
    (lambda s: s.update({Q + "qweight": s[Q + "qweight"].view(torch.int8)}), r"to_q\.qweight: expected dtype"),
    (lambda s: s.update({Q + "smooth": torch.ones(24, dtype=torch.int32)}), r"to_q\.smooth: expected dtype"),
    (lambda s: s[Q + "wscales"].fill_(float("nan")), r"to_q\.wscales: expected finite values"),
    (lambda s: s[Q + "lora_down"][0].fill_(float("inf")), r"to_q\.lora_down: expected finite values"),
    (lambda s: s[Q + "smooth"][3].fill_(0), r"to_q\.smooth: expected positive values"),
])
def test_tampered_weights(change, match, tmp_path):
    model, *_ = patched()
    model.save_pretrained(tmp_path)
    _tamper(tmp_path, change)
    with pytest.raises(ValueError, match=match):
        type(model).from_pretrained(tmp_path)


def test_truncated_and_hostile_files(tmp_path):
    model, *_ = patched()
    model.save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header[Q + "qweight"]["shape"] = [2**40, 2**20]                       # a petabyte, says the header
    huge = json.dumps(header).encode()
    for broken in (data[:len(data) // 2], data[:4], b"", b"\xff" * 64, (2**60).to_bytes(8, "little") + data[8:],
                   len(huge).to_bytes(8, "little") + huge + data[8 + size:]):
        (tmp_path / WEIGHTS).write_bytes(broken)
        with pytest.raises((OSError, ValueError)) as caught:
            type(model).from_pretrained(tmp_path)
        assert str(caught.value)


@pytest.mark.parametrize("change, match", [
    (lambda q: q.update(linear={"kind": "SVDQuant", "rank": -1}), "rank: expected an integer >= 0"),
    (lambda q: q.update(linear={"rank": 4, "bits": 3}), "config keys"),
    (lambda q: q.update(linear={"kind": "GPTQ"}), r"linear\['kind'\]: expected one of"),
    (lambda q: q.update(linear="int4"), "linear: expected SVDQuant, or its to_dict"),
    (lambda q: q.update(attention={"kind": "SVDQuant"}), r"attention\['kind'\]: expected one of"),
    (lambda q: q.update(linear=None, attention=None), "expected linear=, attention= or both"),
    (lambda q: q.update(surprise=1), "quantization_config keys: expected"),
    (lambda q: q["linear"].update(rank=8), "expected shape"),
    (lambda q: q["linear"].update(include=["ffn.net.2"]), "lacks blocks.0.attn1.to_k.weight"),
    (lambda q: q["linear"].update(include=["nothing"]), "include: expected"),
    (lambda q: q["linear"].update(format="nvfp4"), r"wtscale|shape"),
])
def test_tampered_config(change, match, tmp_path):
    model, *_ = patched()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        type(model).from_pretrained(tmp_path)


def test_unsupported_model_class(tmp_path):
    from diffusers import AutoencoderKL

    dit_pipeline().vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoencoderKL is not supported"):
        AutoencoderKL.from_pretrained(tmp_path, quantization_config=TriskeleConfig(linear=RANK4))


# ---- the config itself -----------------------------------------------------------------------------------------------

def test_config_round_trips_through_json():
    config = TriskeleConfig(linear=RANK4, attention=tk.VMoBA(chunks=(1, (4, 4), (1, 4, 4))))
    values = json.loads(json.dumps(config.to_dict()))
    again = TriskeleConfig.from_dict(values)
    assert again.to_dict() == config.to_dict() and again.linear == RANK4
    assert again.quant_method.value == "triskele" == again.quant_method
    assert "attention" not in TriskeleConfig(linear=RANK4).to_diff_dict()
    assert json.loads(config.to_json_string())["linear"]["rank"] == 4
    with pytest.raises(ValueError, match="neither"):
        TriskeleConfig()
    with pytest.raises(ValueError, match="quant_method"):
        TriskeleConfig(linear=RANK4, quant_method="bitsandbytes")


def test_attach_config_refuses_another_method():
    model = wan_model()

    class Other:
        quantization_config = type("C", (), {"quant_method": "bitsandbytes"})()

    model.hf_quantizer = Other()
    with pytest.raises(ValueError, match="bitsandbytes"):
        quantizer.attach_config(model, attention=SLA)
    assert "quantization_config" not in model.config


def test_without_the_import_diffusers_says_so(tmp_path):
    model, *_ = patched()
    model.save_pretrained(tmp_path)
    code = f"""
from diffusers import WanTransformer3DModel
try:
    WanTransformer3DModel.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    print(error)
import triskele.diffusers
WanTransformer3DModel.from_pretrained({str(tmp_path)!r})
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Unknown quantization type, got triskele" in done.stdout and done.stdout.endswith("loaded\n")
