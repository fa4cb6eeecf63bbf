"""Weights spread over the processes (FSDP2), for models of which a copy for each would not fit.

Frozen weights are spread too; an adapter's are small, and every process has them all.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tunewright_trainer.train.checkpoints import Tensors
from tunewright_trainer.train.world import World

_BUCKET_BYTES: Final = 25 * 2**20  # of gradients that are added up at once; as much as torch's own DDP takes


def shard(network: Any, world: World, *, whole: bool) -> None:
    """Spread the weights of ``network``, layer by layer, over all processes. ``whole``: all of them train; otherwise those that do stay as they are."""
    mesh = init_device_mesh(network.device.type, (world.size,))
    apart = set() if whole else {weight for weight in network.parameters() if weight.requires_grad}
    layers = [module for module in network.modules() if type(module).__name__ in set(network._no_split_modules or ())]
    for module in (*layers, network):
        fully_shard(module, mesh=mesh, ignored_params=apart)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # A loss is already its share of the whole batch's, so gradients add up; plain sums are all that gloo knows.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread; all processes have to ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_up(weights: Iterable[torch.Tensor], world: World) -> None:
    """Make the gradient of each weight the sum over all processes. Of weights that are spread it is already."""
    if world.size == 1:
        return
    gradients = []
    for weight in weights:
        if not isinstance(weight, DTensor):
            if weight.grad is None:  # this process had no share of the batch
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
    for bucket in buckets(gradients):
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            continue
        together = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(together)
        for gradient, summed in zip(bucket, together.split_with_sizes([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type: a message each for the many small gradients of an adapter would cost more than what is in them."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def spread(tensors: Tensors, weights: Mapping[str, torch.Tensor], world: World) -> Tensors:
    """The leader's tensors, everywhere, each spread as its weight is if it has the weight's shape. They are called like their weight, or ``<weight>:<part>``."""
    if world.size == 1:
        return tensors
    shapes = world.of_leader({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    found: Tensors = {}
    for name, (shape, dtype) in shapes.items():
        weight = weights[name.partition(":")[0]]
        tensor = (tensors[name] if world.leads else torch.empty(shape, dtype=dtype)).to(weight.device)
        if isinstance(weight, DTensor) and shape == weight.shape:
            found[name] = distribute_tensor(tensor, weight.device_mesh, weight.placements)
        else:
            dist.broadcast(tensor, 0)
            found[name] = tensor
    return found
