"""FSDP2: the weights, gradients and optimizer state of a training sharded over its processes.

The Lightning module is the root unit of `fully_shard`: what no layer owns (embeddings, output head, norms) is gathered
for a whole step, because the loss multiplies by the weights of the head. Each layer is a unit of its own, gathered
while it runs. Checkpoints hold whole tensors, as those of one process do, so any number of processes resumes them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy, StrategyRegistry
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from distill.training.zero3 import NAME as ZERO3
from distill.training.zero3 import ZeRO3Strategy

NAME = "fsdp2"
"""Value of `trainer.strategy`."""

SHARDED = (NAME, ZERO3)
"""Values of `trainer.strategy` that divide the weights among the processes."""

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
        saved = optimizer.state_dict()
        state = {n: {name: whole(v) for name, v in values.items()} for n, values in saved["state"].items()}
        return {**saved, "state": state}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [w for group in optimizer.param_groups for w in group["params"]]
            state = {
                n: {name: shard_of(v, weights[n]) for name, v in values.items()} for n, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)


StrategyRegistry.register(NAME, FSDP2Strategy, "FSDP2: weights, gradients and optimizer state are sharded")


def shard(module: torch.nn.Module, mesh: Any, model: Any, *, all_used: bool) -> list[str]:
    """Shard the weights of a Lightning module over the processes of a mesh.

    All processes gather a unit together, so a unit is a layer that runs in every step of each of them.

    Args:
        model: its transformers model.
        all_used: whether each step uses all weights: every post has an image. If not, the layers of the towers, and
            those that attend to images, are part of the root unit.

    Returns:
        Names of the trained weights that a step may not use. Processes exchange the gradients of a unit together, so
        each must have all of them (`unused`).
    """
    layers, decoder = units(model, all_used=all_used), model.get_decoder()
    skipped = {id(w) for part in decoder.modules() if hasattr(part, "cross_attn") for w in part.parameters()}
    always = {id(w) for w in decoder.parameters()} - skipped
    always |= {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = [name for name, w in module.named_parameters() if w.requires_grad and id(w) not in always]
    for unit in [*layers, module]:
        fully_shard(unit, mesh=mesh)
    for name in _STEPS:
        register_fsdp_forward_method(module, name)
    return [] if all_used else names


def units(model: Any, *, all_used: bool) -> list[torch.nn.Module]:
    """The layers of a transformers model that are gathered one by one; `all_used` as for `shard`."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if all_used:
        return layers
    decoder = set(map(id, model.get_decoder().modules()))
    return [layer for layer in layers if id(layer) in decoder and not hasattr(layer, "cross_attn")]


def has_towers(model: Any) -> bool:
    """Whether a transformers model has weights outside its language model: those of a vision or audio tower."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    of_language = {id(weights) for part in parts for weights in part.parameters()}
    return any(id(weights) not in of_language for weights in model.parameters())


def unused(module: torch.nn.Module, names: list[str]) -> torch.Tensor | float:
    """Zero, with a gradient of zero for the weights of these names."""
    weights = dict(module.named_parameters()) if names else {}
    return sum(0 * weights[name].flatten()[0] for name in names)


def drop_unused_gradients(module: torch.nn.Module, names: list[str]) -> None:
    """Remove the gradients of the weights of these names if no process has used them: an optimizer step skips them."""
    weights = [w for name, w in module.named_parameters() if name in set(names)]
    gradients = [w.grad for w in weights if w.grad is not None]
    if gradients and not whole(torch.nn.utils.get_total_norm(gradients)):
        for w in weights:
            w.grad = None


def unshard(module: torch.nn.Module, strategy: Strategy) -> None:
    """Make the trained weights whole tensors on the CPU; frozen ones stay sharded. All processes call it together."""
    if not isinstance(strategy, FSDP2Strategy | ZeRO3Strategy):
        return
    values = strategy.lightning_module_state_dict()
    plain = {w: torch.nn.Parameter(values[name].cpu()) for name, w in module.named_parameters() if w.requires_grad}
    for child in module.modules():
        for name, weights in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            if weights in plain:  # tied weights stay tied
                setattr(child, name, plain[weights])


def whole(value: Any) -> Any:
    """The whole tensor of shards, on every process, or any other value as it is. All processes call it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_of(value: Any, weights: torch.Tensor) -> Any:
    """The shard that this process has of a whole tensor, if `weights` of its shape are sharded."""
    if not isinstance(weights, DTensor) or not isinstance(value, torch.Tensor) or value.shape != weights.shape:
        return value
    mesh, placements = weights.device_mesh, weights.placements
    return distribute_tensor(value.to(weights.device), mesh, placements, src_data_rank=None)  # all have the whole
