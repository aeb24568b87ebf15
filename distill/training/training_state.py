"""What a checkpoint holds besides Lightning's part: accumulated gradients, and the generators that dropout uses.

Both are the same files for any number of processes. The gradients are means over the processes, which is what the next
optimizer step takes.
"""

from typing import Any

import lightning as L
import torch

from distill.training.sharding import shard_of, whole


def gradients(module: L.LightningModule, *, accumulated: bool) -> dict[str, torch.Tensor]:
    """The gradients of the batches since the last optimizer step, by name of the weights.

    Args:
        accumulated: whether there were such batches. All processes call it together.
    """
    weights = {name: w for name, w in module.named_parameters() if w.requires_grad}
    found = {name: w.grad for name, w in weights.items() if w.grad is not None}
    trainer = module.trainer
    if trainer.world_size == 1 or module.device_mesh is not None:  # fsdp2 has averaged them
        return {name: whole(gradient) for name, gradient in found.items()}
    if not accumulated:
        return {}
    used = set().union(*_gathered(list(found)))
    return {
        name: trainer.strategy.reduce(found.get(name, torch.zeros_like(w)).clone(), reduce_op="mean")
        for name, w in weights.items()
        if name in used
    }


def restore_gradients(module: L.LightningModule, saved: dict[str, torch.Tensor]) -> None:
    """Continue from gradients that `gradients` returned."""
    weights = dict(module.named_parameters())
    for name, gradient in saved.items():
        weights[name].grad = shard_of(gradient.to(weights[name].device), weights[name])


def generators(module: L.LightningModule) -> dict[str, Any]:
    """The states of the random generators of the first process and, as `others`, of the others."""
    cuda = [torch.cuda.get_rng_state(module.device)] if module.device.type == "cuda" else []
    state = {"torch": torch.get_rng_state(), "cuda": cuda}
    if module.trainer.world_size == 1:
        return state
    first, *others = _gathered(state)
    return first | {"others": others}


def restore_generators(module: L.LightningModule, saved: dict[str, Any]) -> None:
    """Continue with the states of this process; with those of the first one on another number of processes."""
    others, rank = saved.get("others", []), module.trainer.global_rank
    own = others[rank - 1] if rank and len(others) + 1 == module.trainer.world_size else saved
    torch.set_rng_state(own["torch"].cpu())
    for state in own["cuda"][: module.device.type == "cuda"]:
        torch.cuda.set_rng_state(state.cpu(), module.device)


def _gathered(value: Any) -> list[Any]:
    """A value of each process."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
