"""The ODE down the energy in PyTorch, as released and modernised. Needs torch, torchdiffeq and torchode.

Axis letters: B latents, Z latent, A attributes, F hidden, N aspects.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
import torchdiffeq
import torchode

BETA = (0.1, 20.0)
ACTIVATIONS = {"relu": torch.nn.functional.relu, "silu": torch.nn.functional.silu}


class Solved(NamedTuple):
    z: torch.Tensor
    """(B, Z), on the CPU."""
    evaluations: float
    """Of the field at a latent, in the mean over latents."""


def tensors(arrays, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """mean, aspects, weights as tensors; floats in `dtype`."""
    found = [torch.from_numpy(np.asarray(array)) for array in arrays]
    return [x.to(device, dtype if x.is_floating_point() else torch.long) for x in found]


class Heads(torch.nn.Module):
    """Two-layer classifiers, one module an attribute, as the paper's code has them."""

    def __init__(self, parameters: dict[str, np.ndarray], activation: str):
        """parameters: w1 (A, Z, F), b1 (A, F), w2 (A, F, N), b2 (A, N)."""
        super().__init__()

        def linear(weight, bias):
            layer = torch.nn.Linear(*weight.shape)
            layer.weight.data, layer.bias.data = torch.tensor(weight.T.copy()), torch.tensor(bias)
            return layer

        parts = [parameters[name] for name in ("w1", "b1", "w2", "b2")]
        self.first = torch.nn.ModuleList(linear(w1, b1) for w1, b1, _, _ in zip(*parts, strict=True))
        self.second = torch.nn.ModuleList(linear(w2, b2) for _, _, w2, b2 in zip(*parts, strict=True))
        self.activation = ACTIVATIONS[activation]
        self.requires_grad_(False)

    def forward(self, z):
        """A list of logits (B, N)."""
        return [
            second(self.activation(first(z))) for first, second in zip(self.first, self.second, strict=True)
        ]


class StackedHeads(torch.nn.Module):
    """The same as two products: what one writes today."""

    def __init__(self, parameters: dict[str, np.ndarray], activation: str):
        super().__init__()
        w1, b1, w2, b2 = (torch.tensor(parameters[name]) for name in ("w1", "b1", "w2", "b2"))
        self.register_buffer("w1", w1.permute(1, 0, 2).reshape(w1.shape[1], -1).contiguous())
        self.register_buffer("b1", b1.reshape(-1))
        self.register_buffer("w2", w2)
        self.register_buffer("b2", b2)
        self.activation = ACTIVATIONS[activation]

    def forward(self, z):
        """Logits (B, A, N)."""
        hidden = self.activation(torch.addmm(self.b1, z, self.w1)).view(len(z), len(self.w2), -1)
        return torch.einsum("baf,afn->ban", hidden, self.w2) + self.b2


def beta(t):
    return BETA[0] + t * (BETA[1] - BETA[0])


def solve_as_released(
    heads: Heads, mean, aspects, weights, tolerance: float, batch_size: int = 128, syncs: bool = False,
    slip: bool = False,
) -> Solved:  # fmt: skip
    """torchdiffeq's dopri5 on batches of 128 latents as one state, the gradient by autograd.

    syncs: the released code logs three scalars in every evaluation, each of which waits for the device.
    slip: its energy subtracts (B,) from (B, 1), so that its gradient is B times the energy's.
    """
    logged, evaluations, parts = [], 0, []

    def field(t, z):
        nonlocal evaluations
        evaluations += len(z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            energy = 0.0
            for a, logits in enumerate(heads(z)):
                wanted = torch.gather(logits, 1, wanted_of[:, a : a + 1])
                normaliser = torch.logsumexp(logits, dim=1)
                surprise = normaliser - wanted if slip else normaliser - wanted[:, 0]
                energy = energy + weight_of[:, a] * surprise
            gradient = torch.autograd.grad(energy.sum(), z)[0]
        if syncs:
            logged.append((t.item(), energy.mean().item(), gradient.norm().item()))
        return beta(t) / 2 * gradient

    times = torch.tensor([1.0, 0.0], device=mean.device, dtype=mean.dtype)
    with torch.no_grad():
        for start in range(0, len(mean), batch_size):
            z, wanted_of, weight_of = (x[start : start + batch_size] for x in (mean, aspects, weights))
            parts.append(torchdiffeq.odeint(field, z, times, rtol=tolerance, atol=tolerance, method="dopri5")[-1].cpu())
    return Solved(torch.cat(parts), evaluations / len(mean))


def solve_modernised(
    heads: StackedHeads, mean, aspects, weights, tolerance: float, solver: Literal["torchdiffeq", "torchode"],
    compiled: bool = False,
) -> Solved:  # fmt: skip
    """dopri5 on all latents at once: one step size for all (torchdiffeq), or one for each (torchode).

    compiled: the energy's gradient through torch.compile.
    """
    evaluations = 0

    def energy(z):
        log_p = torch.log_softmax(heads(z), dim=-1)
        return -(torch.gather(log_p, 2, aspects[..., None])[..., 0] * weights).sum()

    def gradient(z):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(energy(z), z)[0]

    if compiled:
        gradient = torch.compile(gradient)

    def field(t, z):
        nonlocal evaluations
        evaluations += 1
        return beta(t) / 2 * gradient(z)

    with torch.no_grad():
        if solver == "torchdiffeq":
            times = torch.tensor([1.0, 0.0], device=mean.device, dtype=mean.dtype)
            z = torchdiffeq.odeint(field, mean, times, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
            return Solved(z.cpu(), evaluations)
        # In 1 - t, which rises.
        term = torchode.ODETerm(lambda s, z: -field((1 - s)[:, None], z))
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        method = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
        ends = torch.zeros_like(mean[:, 0]), torch.ones_like(mean[:, 0])
        solution = method.solve(torchode.InitialValueProblem(y0=mean, t_start=ends[0], t_end=ends[1]))
        return Solved(solution.ys[:, -1].cpu(), evaluations)
