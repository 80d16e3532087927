"""The frozen dataclasses that patch takes."""

import dataclasses
import json

import pytest

import triskele as tk

CONFIGS = [tk.SLA(), tk.SLA(keep=3, scope="complement", skip_layers=(1, 1)), tk.VMoBA(),
           tk.VMoBA(chunks=(3, (5, 13), (7, 5, 13)), top_k=(2, 6, 18)), tk.SVDQuant(exclude=("proj_out",)),
           tk.SVDQuant(scales="integer"),
           tk.ParaTAA(), tk.ParaTAA(window=8, criterion="rms")]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values) == config


def test_lists_become_tuples():
    config = tk.SVDQuant(include=["ffn.net.2"], exclude=["blocks.0.ffn.net.2"])
    assert config == tk.SVDQuant(include=("ffn.net.2",), exclude=("blocks.0.ffn.net.2",))
    assert tk.SLA(skip_layers=[1, 2]).skip_layers == (1, 2)
    assert tk.VMoBA(chunks=[2, [2, 2], [1, 2, 2]], top_k=[1, 2, 3]).chunks == (2, (2, 2), (1, 2, 2))


def test_dicts_from_before_a_key_still_load():
    values = tk.SVDQuant(rank=8).to_dict()
    del values["scales"]
    assert tk.SVDQuant.from_dict(values) == tk.SVDQuant(rank=8)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tk.SLA().keep = 0.1


@pytest.mark.parametrize("make, match", [
    (lambda: tk.SLA(keep=0.0), "keep: expected"),
    (lambda: tk.SLA(keep=1.5), "keep: expected"),
    (lambda: tk.SLA(keep=0), "keep: expected an integer >= 1"),
    (lambda: tk.SLA(keep=float("nan")), "keep: expected"),
    (lambda: tk.SLA(keep="a"), "keep: expected"),
    (lambda: tk.SLA(keep=None), "keep: expected"),
    (lambda: tk.SLA(keep=True), "keep: expected"),
    (lambda: tk.SLA(skip_layers=3), "skip_layers: expected \\(first, last\\), got 3"),
    (lambda: tk.SLA(skip_layers=(0,)), "skip_layers"),
    (lambda: tk.SLA(skip_layers=(-1, 0)), "skip_layers"),
    (lambda: tk.SLA(backend="gpu"), "backend: expected one of"),
    (lambda: tk.SLA(keep=0.6, drop=0.5), "keep \\+ drop"),
    (lambda: tk.SLA(drop=-0.1), "drop"),
    (lambda: tk.SLA(block_q=0), "block_q"),
    (lambda: tk.SLA(feature_map="gelu"), "feature_map"),
    (lambda: tk.SLA(scope="some"), "scope"),
    (lambda: tk.VMoBA(top_k=0), "top_k"),
    (lambda: tk.VMoBA(top_k=(3, 3)), "top_k"),
    (lambda: tk.VMoBA(chunks=3), "chunks: expected"),
    (lambda: tk.VMoBA(chunks=(3, (2, 2))), "chunks: expected"),
    (lambda: tk.VMoBA(dense_steps="all"), "dense_steps"),
    (lambda: tk.VMoBA(backend="gpu"), "backend"),
    (lambda: tk.VMoBA(pool="block"), "pool"),
    (lambda: tk.VMoBA(select="threshold", threshold=0.0), "threshold"),
    (lambda: tk.SVDQuant(rank=-1), "rank"),
    (lambda: tk.SVDQuant(format="int3"), "format"),
    (lambda: tk.SVDQuant(activation="int7"), "activation"),
    (lambda: tk.SVDQuant(include="attn1.to_q"), "include: expected a tuple of name endings"),
    (lambda: tk.SVDQuant(exclude=("proj_out", 3)), "exclude"),
    (lambda: tk.SVDQuant(smooth="yes"), "smooth"),
    (lambda: tk.SVDQuant(scales="float"), "scales: expected one of"),
    (lambda: tk.SVDQuant(scales="integer", format="nvfp4"), "scales with format='nvfp4': expected 'amax'"),
    (lambda: tk.SVDQuant(backend="gpu"), "backend"),
    (lambda: tk.ParaTAA(window=0), "window"),
    (lambda: tk.ParaTAA(window=True), "window"),
    (lambda: tk.ParaTAA(tolerance=0), "tolerance"),
    (lambda: tk.ParaTAA(tolerance=None), "tolerance"),
    (lambda: tk.ParaTAA(ridge=-1.0), "ridge"),
    (lambda: tk.ParaTAA(ridge=float("nan")), "ridge"),
    (lambda: tk.ParaTAA(max_iterations=0), "max_iterations"),
    (lambda: tk.ParaTAA(backend="gpu"), "backend"),
    (lambda: tk.ParaTAA(criterion="max"), "criterion"),
    (lambda: tk.SLA.from_dict({"keep": 0.1, "blocks": 3}), "config keys"),
    (lambda: tk.SLA.from_dict({"kind": "VMoBA"}), "kind"),
])
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()
