"""DeepSpeed ZeRO-3: the weights, gradients and optimizer state of a training partitioned over its processes.

Checkpoints hold whole tensors, as those of one process do, so any number of processes resumes them. DeepSpeed is
imported when the strategy is created.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

NAME = "zero3"
"""Value of `trainer.strategy`."""

_MOMENTS = "exp_avg", "exp_avg_sq"
"""The state of AdamW for each weight."""


class ZeRO3Strategy(DeepSpeedStrategy):
    """ZeRO-3 over all processes, with the checkpoints of a training in one process.

    Raises:
        ValueError: DeepSpeed is not installed.
    """

    def __init__(self, **options: Any) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError(f"{NAME} needs DeepSpeed: pip install 'distill[deepspeed]'")
        super().__init__(stage=3, **options)

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
        else:  # Lightning takes CUDA only; DeepSpeed itself has an accelerator for CPUs
            DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
        else:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    def setup(self, trainer: L.Trainer) -> None:
        self._types = {name: weights.dtype for name, weights in self._trained()}
        super().setup(trainer)
        module: Any = self.lightning_module
        module.check_model = module.on_fit_start

        def on_fit_start() -> None:
            """In a forward pass of the engine, which gathers weights where they are read, such as those of the head."""
            self._forward_redirection(self.deepspeed_engine, module, "check_model")

        module.on_fit_start = on_fit_start

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed

        trained = [w for _, w in self._trained()]
        engine, optimizer, _, _ = deepspeed.initialize(
            config=self.config, model=model, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )  # fmt: skip
        return engine, optimizer

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, whole and in the type that they had before DeepSpeed changed it."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(w).detach().clone().to(self._types[name]) for name, w in self._trained()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        weights = dict(self._trained())
        for name, value in checkpoint["state_dict"].items():
            with deepspeed.zero.GatheredParameters([weights[name]], modifier_rank=0):
                weights[name].data.copy_(value)
            safe_set_local_fp32_param(weights[name], _partition(value, weights[name]))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.deepspeed_engine.optimizer.optimizer
        step = next(iter(inner.state.values()))["step"]
        weights = [w for _, w in self._trained()]
        state = {
            n: {"step": step.clone(), **{name: safe_get_full_optimizer_state(w, name).clone() for name in _MOMENTS}}
            for n, w in enumerate(weights)
        }
        return {"state": state, "param_groups": [inner.param_groups[0] | {"params": list(range(len(weights)))}]}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        (saved,) = checkpoint["optimizer_states"]
        partitioned = self.deepspeed_engine.optimizer
        inner = partitioned.optimizer
        for part in partitioned.fp32_partitioned_groups_flat:  # as its first step would
            inner.state[part] = {name: torch.zeros_like(part) for name in _MOMENTS}
            inner.state[part]["step"] = saved["state"][0]["step"].clone()
        for n, (_, weights) in enumerate(self._trained()):
            for name in _MOMENTS:
                safe_set_local_optimizer_state(weights, _partition(saved["state"][n][name], weights), name)
        for group in inner.param_groups:
            group |= {name: value for name, value in saved["param_groups"][0].items() if name != "params"}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        assert self.lightning_module is not None
        return [(name, w) for name, w in self.lightning_module.named_parameters() if w.requires_grad]


StrategyRegistry.register(NAME, ZeRO3Strategy, "DeepSpeed ZeRO-3")


def _partition(value: torch.Tensor, weights: Any) -> torch.Tensor:
    """The part of a whole tensor that this process has."""
    size = weights.ds_tensor.numel()
    begin = size * torch.distributed.get_rank()
    part = value.flatten()[begin : begin + size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))
