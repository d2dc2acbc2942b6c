"""Distillation: the numbers of a step."""

import math

import numpy as np
import pytest
import torch
from support.distillation import HEADS, draw_distributions

from soundnet_port.learning.distillation import (
    TrainConfig,
    create_adam,
    distillation_loss,
    set_torch7_eps,
)
from soundnet_port.learning.randomness import derive_rng, initialize
from soundnet_port.network.architecture import SOUNDNET5, SOUNDNET8
from soundnet_port.network.model import Logits, SoundNet

pytestmark = pytest.mark.usefixtures("one_thread")


class ReferenceNetwork:
    """Forward and backward pass of SoundNet in training mode, in float64, tap by tap and frame by frame."""

    def __init__(self, architecture, state):
        self.architecture = architecture
        self.state = {name: tensor.double().numpy() for name, tensor in state.items()}
        self.running = {}

    def convolution(self, name, row, x):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        x = np.pad(x, ((0, 0), (0, 0), (row.padding, row.padding)))
        frames = (x.shape[2] - row.kernel) // row.stride + 1
        y = np.zeros((len(x), len(weight), frames)) + bias[:, None]
        for k in range(row.kernel):
            y += np.einsum("oi,bit->bot", weight[:, :, k], x[:, :, k : k + row.stride * frames : row.stride])
        return y, x

    def convolution_backward(self, name, row, padded, dy, grads):
        weight, frames = self.state[f"{name}.weight"], dy.shape[2]
        dweight, dx = np.zeros_like(weight), np.zeros_like(padded)
        for k in range(row.kernel):
            seen = slice(k, k + row.stride * frames, row.stride)
            dweight[:, :, k] = np.einsum("bot,bit->oi", dy, padded[:, :, seen])
            dx[:, :, seen] += np.einsum("oi,bot->bit", weight[:, :, k], dy)
        grads[f"{name}.weight"], grads[f"{name}.bias"] = dweight, dy.sum((0, 2))
        return dx[:, :, row.padding : dx.shape[2] - row.padding]

    def step(self, waveform, targets, balance):
        """Return (loss, gradients) of a batch; the running statistics are in `running`."""
        x, kept = waveform[:, None], []
        for block in self.architecture.blocks:
            y, padded = self.convolution(block.name, block, x)
            count = y.shape[0] * y.shape[2]
            mean, variance = y.mean((0, 2)), y.var((0, 2))
            for field, now in (("mean", mean), ("var", variance * count / (count - 1))):  # unbiased
                name = f"{block.norm}.running_{field}"
                self.running[name] = 0.9 * self.state[name] + 0.1 * now
            inverse = 1 / np.sqrt(variance + 1e-5)
            normal = (y - mean[:, None]) * inverse[:, None]
            x = (
                normal * self.state[f"{block.norm}.weight"][:, None]
                + self.state[f"{block.norm}.bias"][:, None]
            )
            relu = x > 0
            x = x * relu
            best = None
            if block.pool:
                pooled = x.shape[2] // block.pool
                windows = x[:, :, : pooled * block.pool].reshape(*x.shape[:2], pooled, block.pool)
                best, x = windows.argmax(3), windows.max(3)
            kept.append((padded, normal, inverse, relu, best))
        loss, grads, dx = 0.0, {}, 0.0
        for head in self.architecture.heads:
            y, padded = self.convolution(head.name, head, x)
            y = y - y.max(1, keepdims=True)
            p = np.exp(y) / np.exp(y).sum(1, keepdims=True)
            dy = np.zeros_like(y)
            for teacher, weight in targets[head.name]:
                t = teacher.transpose(0, 2, 1)
                # nn.DistKLDivCriterion for every step, the mean over heads x steps, times lambda
                for step in range(t.shape[2]):
                    target, q = t[:, :, step], p[:, :, step]
                    terms = np.where(
                        target > 0, target * (np.log(np.where(target > 0, target, 1)) - np.log(q)), 0
                    )
                    loss += weight * balance / (2 * t.shape[2]) * terms.sum() / target.size
                    slope = q * target.sum(1, keepdims=True) - target
                    dy[:, :, step] += weight * balance / (2 * t.shape[2]) / target.size * slope
            dx = dx + self.convolution_backward(head.name, head, padded, dy, grads)
        for block, (padded, normal, inverse, relu, best) in zip(
            reversed(self.architecture.blocks), reversed(kept), strict=True
        ):
            if best is not None:
                spread = np.zeros((*best.shape, block.pool))
                np.put_along_axis(spread, best[..., None], dx[..., None], 3)
                dx = np.zeros_like(normal)
                dx[:, :, : best.shape[2] * block.pool] = spread.reshape(*best.shape[:2], -1)
            g = dx * relu
            gain = self.state[f"{block.norm}.weight"]
            grads[f"{block.norm}.weight"] = (g * normal).sum((0, 2))
            grads[f"{block.norm}.bias"] = g.sum((0, 2))
            g = g * gain[:, None]
            dy = g - g.mean((0, 2))[:, None] - normal * (g * normal).mean((0, 2))[:, None]
            dx = self.convolution_backward(block.name, block, padded, dy * inverse[:, None], grads)
        return loss, grads


@pytest.mark.parametrize("template", [SOUNDNET8, SOUNDNET5], ids=lambda a: a.name)
def test_a_training_step_matches_the_reference_network(template):
    architecture = template.resized((2, 3, 2, 3, 2, 3, 4)[: len(template.blocks)], HEADS)
    generator = np.random.default_rng(5)
    model = SoundNet(architecture)
    for name, tensor in model.state_dict().items():
        if "num_batches" not in name:
            values = generator.normal(0, 0.3, tuple(tensor.shape))
            if name.startswith("bn"):  # gains of both signs; running statistics are only moved
                values += generator.choice([-1, 1], values.shape) if name.endswith("weight") else 0
                values = np.abs(values) if name.endswith("var") else values
            tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    samples = 280_000
    frames = architecture.frames("objects", samples)
    waveform = generator.normal(0, 20, (2, samples)).astype(np.float32)
    columns = {"objects": 1.0, "objects:other": 3.0, "scenes": 1.0}
    targets = {
        column: np.stack(
            [draw_distributions(generator, frames, HEADS[column.partition(":")[0]]) for _ in range(2)]
        )
        for column in columns
    }
    targets["scenes"][0, 0] = [0, 1, 0]  # 0 log 0 is 0
    config = TrainConfig(teachers=columns)

    reference = ReferenceNetwork(architecture, model.state_dict())
    by_head = {
        "objects": [(targets["objects"].astype(float), 0.25), (targets["objects:other"].astype(float), 0.75)],
        "scenes": [(targets["scenes"].astype(float), 1.0)],
    }
    expected, gradients = reference.step(waveform.astype(np.float64), by_head, 250.0)

    # float64 goes through the modules: rounding alone. float32, as it is trained: sums over up to
    # 280,000 frames; measured 7e-6.
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-5)):
        model.load_state_dict(state)
        model.to(dtype).train().zero_grad()
        logits = model(torch.from_numpy(waveform).to(dtype))
        tensors = {column: torch.from_numpy(rows).to(dtype) for column, rows in targets.items()}
        loss, _ = distillation_loss(logits, tensors, config)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=max(tolerance / 10, 1e-9))
        parameters = dict(model.named_parameters())
        assert parameters.keys() == gradients.keys()
        for name, parameter in parameters.items():
            # batch norm takes away what a convolution's bias adds: its gradient is rounding alone
            bias = name.startswith("conv") and name.endswith("bias")
            largest = np.abs(gradients[name.replace("conv", "bn") if bias else name]).max()
            error = np.abs(parameter.grad.double().numpy() - gradients[name]).max()
            assert error <= tolerance * largest, f"{name}: {error / largest:.1e}"
        for name, running in reference.running.items():
            ours = model.state_dict()[name].double().numpy()
            assert np.abs(ours - running).max() <= tolerance / 10 * np.abs(running).max(), name


def test_adam_is_torch7s():
    """optim.adam: eps is added to sqrt(v) as it is. Gradients of 1e-7 make that show."""
    config = TrainConfig()
    generator = np.random.default_rng(1)
    x = generator.normal(size=50)
    layer = torch.nn.Linear(50, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(x))
    initial = x = layer.weight[0].detach().double().numpy()
    optimizer = create_adam(layer, config)
    m, v = np.zeros(50), np.zeros(50)
    for t in range(1, 5):
        g = generator.normal(0, 1e-7, 50)
        layer.weight.grad = torch.from_numpy(g[None].astype(np.float32))
        set_torch7_eps(optimizer, config, t)
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        x = x - 0.001 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
    # float32 holds numbers near 1 to 6e-8; the parameters have moved by 1e-3
    assert np.abs(layer.weight[0].detach().numpy() - x).max() < 5e-7
    assert np.abs(x - initial).max() > 5e-4


def test_temperature_softens_both_sides():
    generator = np.random.default_rng(2)
    scores = {head: torch.from_numpy(generator.normal(size=(2, n, 4))) for head, n in HEADS.items()}
    targets = {
        head: torch.from_numpy(
            np.stack([draw_distributions(generator, 4, n).astype(float) for _ in range(2)])
        )
        for head, n in HEADS.items()
    }
    softened = {head: torch.softmax(rows.log() / 3, 2) for head, rows in targets.items()}
    divided = Logits(**{head: rows / 3 for head, rows in scores.items()})
    loss, _ = distillation_loss(Logits(**scores), targets, TrainConfig(temperature=3.0))
    expected, _ = distillation_loss(divided, softened, TrainConfig(balance=250.0 * 9))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_initial_values_are_the_originals():
    model = SoundNet(SOUNDNET5.resized((8, 16, 32, 32), {"objects": 20, "scenes": 10}))
    initialize(model, derive_rng(0))
    weight = model.conv3.weight.detach()  # 8,192 numbers: their deviation is known to 1 %
    assert float(weight.std()) == pytest.approx(0.01, rel=0.03)
    assert abs(float(weight.mean())) < 5e-4
    assert float(model.bn4.weight.detach().mean()) == pytest.approx(1, abs=0.02)
    assert 0.01 < float(model.bn4.weight.detach().std()) < 0.03
    for name, tensor in model.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            assert not tensor.any(), name
