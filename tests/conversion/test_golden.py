"""Golden files: no difference on the same machine, a failure if a single value moves."""

import json

import numpy as np
import pytest
import torch
from support.networks import NETS, model_of

from soundnet_port import assert_golden
from soundnet_port.cli.main import main
from soundnet_port.conversion.golden import GoldenError, compare_golden, save_golden


@pytest.fixture(scope="module", params=["n8_d16", "n5_d8"])
def golden(request, tmp_path_factory):
    net = NETS[request.param]
    path = tmp_path_factory.mktemp("golden") / f"{net.name}.npz"
    save_golden(model_of(net), path)
    return net, path


def test_the_same_machine_differs_by_nothing(golden):
    net, path = golden
    comparison = compare_golden(model_of(net), path)
    assert comparison.passed
    assert {d.error for d in comparison.differences} == {0.0}
    keys = [d.layer for d in comparison.differences if d.samples > 100_000]
    assert keys == [str(m.module) for m in net.architecture.modules] + ["objects", "scenes"]
    assert comparison.made_by == comparison.run_by
    assert_golden(model_of(net).requires_grad_(True).train(), path)  # the mode does not matter


def test_other_thread_counts_pass(golden):
    net, path = golden
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_golden(model_of(net), path)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tensor", ["bn1.running_mean", "bn4.weight", "bn4.bias", "bn2.running_var"])
def test_one_batch_norm_value_that_moves_by_a_thousandth_fails(golden, tensor):
    net, path = golden
    model = model_of(net)
    with torch.no_grad():
        model.state_dict()[tensor][0] += 1e-3
    comparison = compare_golden(model, path)
    assert not comparison.same_weights
    assert any(not d.passed for d in comparison.differences)
    with pytest.raises(AssertionError, match="<- differs"):
        assert_golden(model, path)


def test_nan_and_other_networks_fail(golden):
    net, path = golden
    model = model_of(net)
    with torch.no_grad():
        model.bn3.bias[0] = np.nan
    assert not compare_golden(model, path).passed
    other = NETS["n5_d8" if net.name == "n8_d16" else "n8_d16"]
    with pytest.raises(GoldenError, match="of a network with architecture"):
        compare_golden(model_of(other), path)


def test_damaged_files_are_named(golden, tmp_path):
    net, path = golden
    model = model_of(net)
    for content in (b"", b"no zip", path.read_bytes()[:5_000]):
        bad = tmp_path / "bad.npz"
        bad.write_bytes(content)
        with pytest.raises(GoldenError, match=r"bad\.npz: not a golden file"):
            compare_golden(model, bad)
    np.savez(tmp_path / "other.npz", about=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(GoldenError, match=r"other\.npz: not a golden file"):
        compare_golden(model, tmp_path / "other.npz")
    with pytest.raises(GoldenError, match="No such file"):
        compare_golden(model, tmp_path / "gone.npz")


def test_the_command_line(demo_report, tmp_path, capsys):
    weights, path = str(demo_report.weights), str(tmp_path / "golden.npz")
    assert main(["verify", weights, "--save", path]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert main(["verify", weights, "--save", path]) == 2
    assert main(["verify", weights, "--save", path, "--force"]) == 0
    capsys.readouterr()
    assert main(["verify", weights, "--against", path]) == 0
    assert "worst 0.0e+00 of a layer's largest value" in capsys.readouterr().out
    assert main(["verify", weights, "--against", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    changed = model_of(NETS["n8_d16"])
    with torch.no_grad():
        changed.bn5.weight[3] *= 1.001
    save_golden(changed, path)
    assert main(["verify", weights, "--against", path]) == 1
    assert "other weights than those of" in capsys.readouterr().err
    assert main(["verify", weights]) == 2
    assert main(["verify", weights, "--against", str(tmp_path / "gone.npz")]) == 2
