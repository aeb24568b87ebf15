"""FSDP2: the weights, gradients and optimizer state of a training sharded over its processes.

The Lightning module is the root unit of `fully_shard`: what no layer owns (embeddings, output head, norms) is gathered
for a whole step, because the loss multiplies by the weights of the head. Each layer is a unit of its own, gathered
while it runs. Checkpoints hold whole tensors, as those of one process do, so any number of processes resumes them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

NAME = "fsdp2"
"""Value of `trainer.strategy`."""

_STEPS = "on_fit_start", "training_step", "validation_step"
"""Methods that run the model: they gather the root unit as its forward pass would."""


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes, with the checkpoints of a training in one process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # configure_model has sharded the weights before

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, whole; the frozen ones are not in a checkpoint and need not be gathered."""
        module = self.lightning_module
        assert module is not None
        if isinstance(module, FSDPModule):
            module.reshard()  # a validation leaves the root unit gathered
        return {name: whole(w.detach()) for name, w in module.named_parameters() if w.requires_grad}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        weights = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                weights[name].copy_(shard_of(value, weights[name]))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return _map_state(optimizer.state_dict(), lambda _, value: whole(value))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [w for group in optimizer.param_groups for w in group["params"]]
            optimizer.load_state_dict(_map_state(state, lambda n, value: shard_of(value, weights[n])))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)


StrategyRegistry.register(NAME, FSDP2Strategy, "FSDP2: weights, gradients and optimizer state are sharded")


def shard(module: torch.nn.Module, mesh: Any, decoder: torch.nn.Module, *, whole_model: bool) -> None:
    """Shard the weights of a Lightning module over the processes of a mesh.

    All processes gather a unit together, so a unit is a layer that runs in every step of each of them.

    Args:
        decoder: the language model; its layers run in every step.
        whole_model: whether those of the towers do, too: every post has an image.
    """
    for layer in _layers(module if whole_model else decoder, cross=whole_model):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in _STEPS:
        register_fsdp_forward_method(module, name)


def _layers(module: torch.nn.Module, *, cross: bool) -> Iterator[torch.nn.Module]:
    """The layers of transformers' models; with `cross` those that attend to images, and are skipped without one."""
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer) and (cross or not hasattr(layer, "cross_attn")):
            yield layer


def unshard(module: torch.nn.Module) -> None:
    """Make the trained weights whole tensors on the CPU; frozen ones stay sharded. All processes call it together."""
    if not isinstance(module, FSDPModule):
        return
    module.reshard()
    found: dict[torch.Tensor, torch.nn.Parameter] = {}
    for child in module.modules():
        for name, weights in child.named_parameters(recurse=False, remove_duplicate=False):
            if weights.requires_grad:
                if weights not in found:  # tied weights stay tied
                    found[weights] = torch.nn.Parameter(whole(weights.detach()).cpu())
                setattr(child, name, found[weights])


def whole(value: Any) -> Any:
    """The whole tensor of shards, on every process, or any other value as it is. All processes call it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_of(value: Any, weights: torch.Tensor) -> Any:
    """The shard that this process has of a whole tensor, if `weights` of its shape are sharded."""
    if not isinstance(weights, DTensor) or not isinstance(value, torch.Tensor) or value.shape != weights.shape:
        return value
    mesh, placements = weights.device_mesh, weights.placements
    return distribute_tensor(value.to(weights.device), mesh, placements, src_data_rank=None)  # all have the whole


def _map_state(state: Mapping[str, Any], change: Callable[[int, Any], Any]) -> dict[str, Any]:
    """An optimizer's state dict, each value of its state changed; `change` is called with the number of the weights."""
    changed = {n: {name: change(n, value) for name, value in values.items()} for n, values in state["state"].items()}
    return {**state, "state": changed}
