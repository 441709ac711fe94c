"""scripts/export.py: policies and classifiers as NIR and ONNX, and bad input in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from agents import RECIPES
from envs.classic import make_cartpole
from scripts.export import main
from snn_rl import SpikingDQN, load_policy, save_policy, to_spiking
from snn_rl.runs._run import Run
from snn_rl.runs.ann import new_ann
from snn_rl.share import read_nir
from snn_rl.vision import Classifier, build, save_classifier


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kwargs = {"net_arch": [16], "timesteps": 2}
    agent = SpikingDQN("MlpPolicy", make_cartpole(1, seed=0), policy_kwargs=kwargs, buffer_size=100, device="cpu")
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    save_policy(agent, path, {})
    return path


def test_a_policy_becomes_either(policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.nir", "a.onnx"):
        assert main([str(policy_file), str(tmp_path / name)]) == 0
        assert name in capsys.readouterr().out
    x = torch.randn(1, 4)
    network = load_policy(policy_file).network
    with torch.no_grad():
        expected = network(x)[0]
        torch.testing.assert_close(read_nir(tmp_path / "a.nir")(x)[0], expected)
    model = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    q_values = model.run(["output"], {"observation": x.numpy(), "carry_mlp_1": np.zeros((1, 16), dtype=np.float32)})
    np.testing.assert_allclose(q_values[0], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_classifier_becomes_either(tmp_path: Path) -> None:
    ann = build("vgg6", classes=3, image_size=8, width=0.0625, batch_norm=True, dropout=0.0).eval()
    network = to_spiking(ann, torch.randn(8, 3, 8, 8), timesteps=1)
    architecture = {"model": "vgg6", "image_size": 8, "width": 0.0625, "batch_norm": True, "dropout": 0.0}
    classifier = Classifier(network, architecture, ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3, {})  # type: ignore[arg-type]
    save_classifier(classifier, tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 8, 8)
    assert main([str(tmp_path / "model.safetensors"), str(tmp_path / "a.onnx")]) == 0
    model = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    zeros = [np.zeros((1, *i.shape[1:]), dtype=np.float32) for i in model.get_inputs()[1:]]
    inputs = dict(zip([i.name for i in model.get_inputs()], [x.numpy(), *zeros], strict=True))
    with torch.no_grad():
        np.testing.assert_allclose(model.run(["output"], inputs)[0], network(x)[0].numpy(), rtol=1e-4, atol=1e-5)


def test_bad_input_is_one_line(policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES["cartpole"].smoke()
    ann = new_ann(Run(recipe, tmp_path, 0, "cpu"), recipe.build_env(8, 0))
    save_policy(ann, tmp_path / "ann.safetensors", {})
    for file, out, message in (
        (policy_file, "a.pt", "must end in .nir or .onnx, got 'a.pt'"),
        (tmp_path / "none", "a.nir", "no policy file at"),
        (tmp_path / "ann.safetensors", "a.nir", "holds an ANN; export a spiking stage"),
    ):
        assert main([str(file), str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "a.nir").exists()
