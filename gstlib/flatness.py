"""How flat the loss is round a network: pure functions of a network, images and labels (v4 Figure 6; claim C20).

The loss is the mean cross-entropy in evaluation mode, in the parameters' own precision: in bf16 a curvature would be
rounding.  No function changes the network; directions are vectors in the order of `named_parameters()`.  What is
removed does not move: where a parameter has no effect its derivatives, and its entry in every direction, are exactly 0.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, func, nn

from gstlib.errors import InputError


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The network in evaluation mode and copies of its parameters; afterwards every module is in its mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in model.named_parameters()}
    finally:
        for module, training in modes:
            module.training = training


def _losses(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(func.functional_call(model, parameters, (x,)), y, reduction="none")


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _shaped(vector: np.ndarray, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.as_tensor(vector).to(next(iter(like.values()))).split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts)}


def gradients(model: nn.Module, x: Tensor, y: Tensor, chunk: int = 8) -> tuple[Tensor, Tensor]:
    """Squared norm of each image's own loss gradient (n,), and the mean gradient (parameters,), with `chunk` gradients in
    memory at a time.  The mean of the former is the trace of the gradient covariance (uncentred), less the squared norm
    of the latter the centred one.  Raises `InputError` where an image has no loss of its own.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(f"{path!r} normalises by the batch in evaluation too, so that no image has "
                             "a gradient of its own; give it running statistics")
    with _evaluating(model) as parameters:
        one = func.grad(lambda p, image, label: _losses(model, p, image[None], label[None])[0])
        norms, total = [], 0
        for part in zip(x.split(chunk), y.split(chunk)):
            each = func.vmap(one, (None, 0, 0))(parameters, *part).values()
            norms.append(sum(g.flatten(1).square().sum(1) for g in each))
            total = total + _flat(g.sum(0) for g in each)
        return torch.cat(norms), total / len(y)


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> LinearOperator:
    """The Hessian of the mean loss as an operator on NumPy vectors (parameters,); no matrix is formed: the gradient's
    graph is kept, so that a product is a single backward pass through that.  Raises `InputError` for bf16 and half.
    """
    with _evaluating(model) as parameters, torch.enable_grad():
        if kinds := {p.dtype for p in parameters.values()} - {torch.float32, torch.float64}:
            raise InputError(f"in {kinds.pop()} a curvature is rounding; take it of model.float()")
        leaves = [p.requires_grad_() for p in parameters.values()]
        loss = _losses(model, parameters, x, y).mean()
        gradient = _flat(torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True))

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.tensor(vector.ravel()).to(gradient)
        return _flat(torch.autograd.grad(gradient, leaves, v, retain_graph=True, materialize_grads=True)).cpu().numpy()

    return LinearOperator((len(gradient),) * 2, product, dtype=gradient.detach().cpu().numpy().dtype)


def leading(operator: LinearOperator, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` algebraically largest eigenvalues (k,) of a symmetric operator, falling, and eigenvectors (k, size).

    Lanczos's method starts from the image of a fixed random vector, so that an entry whose row is 0 is exactly 0 throughout.
    Raises `InputError` where the operator is zero or not finite.
    """
    start = operator.matvec(np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype))
    if not 0 < np.abs(start).max() < np.inf:  # not a number either
        raise InputError("the loss has no finite curvature here: the network's outputs are saturated or not finite")
    values, vectors = eigsh(operator, k, which="LA", v0=start, tol=1e-2)  # of residuals; values are off by the square
    return values[::-1].copy(), vectors.T[::-1].copy()


def curvatures(model: nn.Module, x: Tensor, y: Tensor, vectors: np.ndarray) -> Tensor:
    """Each image's own curvature (n,): the second derivatives of its loss along `vectors` (k, parameters), summed.

    Over the images of the eigenvectors their mean is the sum of the eigenvalues, and their standard error that of the
    sum over the choice of images, since to first order an eigenvalue moves as the second derivative along its vector.
    """
    with _evaluating(model) as parameters:
        loss, moves = partial(_losses, model, x=x, y=y), (_shaped(vector, parameters) for vector in vectors)
        return sum(func.jvp(lambda p: func.jvp(loss, (p,), (v,))[1], (parameters,), (v,))[1] for v in moves)


def along(model: nn.Module, x: Tensor, y: Tensor, vector: np.ndarray, steps: Iterable[float]) -> list[tuple[float, float]]:
    """Mean loss (nats) and accuracy (0 … 1) after all parameters moved by each of `steps` along `vector`."""
    with _evaluating(model) as parameters:
        way = _shaped(vector, parameters)
        outputs = (func.functional_call(model, {name: p + step * way[name] for name, p in parameters.items()}, (x,))
                   for step in steps)
        return [(float(nn.functional.cross_entropy(z, y)), float((z.argmax(1) == y).double().mean())) for z in outputs]


def relative(model: nn.Module, x: Tensor, y: Tensor, size: float, draws: int) -> list[float]:
    """Mean loss after each of `draws` random moves, every filter (or row) by `size` times its own norm.

    Scaling a layer up where what follows scales it down again leaves these as they are, but not the Hessian.  Moves are
    normal, from a fixed seed, within what the loss depends on; biases, scales and shifts, which are no filter's, stay.
    """
    with _evaluating(model) as parameters:
        slope = func.grad(lambda p: _losses(model, p, x, y).mean())(parameters)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(draws):
            moved = dict(parameters)
            for name, p in parameters.items():
                if p.dim() > 1:
                    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p).flatten(1)
                    free = slope[name].flatten(1) != 0  # by selection: what lies where something was removed may be anything
                    norm, noise = p.flatten(1).where(free, 0).norm(dim=1, keepdim=True), noise.where(free, 0)
                    moved[name] = p + (size * norm * nn.functional.normalize(noise)).view_as(p)
            losses.append(float(_losses(model, moved, x, y).mean()))
        return losses
