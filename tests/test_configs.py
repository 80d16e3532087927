"""The frozen dataclasses that patch takes."""

import dataclasses
import json

import pytest

import triskele as tk

CONFIGS = [tk.SLA(), tk.SLA(keep=3, scope="complement", skip_layers=(1, 1)), tk.VMoBA(),
           tk.VMoBA(chunks=(3, (5, 13), (7, 5, 13)), top_k=(2, 6, 18)), tk.SVDQuant(exclude=("proj_out",)),
           tk.ParaTAA(), tk.ParaTAA(window=8, criterion="rms")]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values) == config


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tk.SLA().keep = 0.1


@pytest.mark.parametrize("make, match", [
    (lambda: tk.SLA(keep=0.0), "keep: expected"),
    (lambda: tk.SLA(keep=1.5), "keep: expected"),
    (lambda: tk.SLA(keep=0), "keep: expected an integer >= 1"),
    (lambda: tk.SLA(keep=float("nan")), "keep: expected"),
    (lambda: tk.SLA(keep=0.6, drop=0.5), "keep \\+ drop"),
    (lambda: tk.SLA(drop=-0.1), "drop"),
    (lambda: tk.SLA(block_q=0), "block_q"),
    (lambda: tk.SLA(feature_map="gelu"), "feature_map"),
    (lambda: tk.SLA(scope="some"), "scope"),
    (lambda: tk.VMoBA(top_k=0), "top_k"),
    (lambda: tk.VMoBA(pool="block"), "pool"),
    (lambda: tk.VMoBA(select="threshold", threshold=0.0), "threshold"),
    (lambda: tk.SVDQuant(rank=-1), "rank"),
    (lambda: tk.SVDQuant(format="int3"), "format"),
    (lambda: tk.SVDQuant(activation="int7"), "activation"),
    (lambda: tk.ParaTAA(window=0), "window"),
    (lambda: tk.ParaTAA(window=True), "window"),
    (lambda: tk.ParaTAA(tolerance=0), "tolerance"),
    (lambda: tk.ParaTAA(criterion="max"), "criterion"),
    (lambda: tk.SLA.from_dict({"keep": 0.1, "blocks": 3}), "config keys"),
    (lambda: tk.SLA.from_dict({"kind": "VMoBA"}), "kind"),
])
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()
