"""Our callbacks in the real trainers, run by test_trainers.py where these are installed:
``python tests/with_trainers.py transformers`` in an empty folder.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compared import assert_same_bits, values
from torch import Tensor

import triton_optim as to
from triton_optim.integrations import unwrap_optimizer

DATA = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
AVERAGED = {"lr": 1e-2, "ema_decay": 0.9, "state_dtype": "int8"}


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 300), torch.nn.GELU(), torch.nn.Linear(300, 16))


def both(model: torch.nn.Module, optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The weights, and their averages."""
    ours = unwrap_optimizer(optimizer)
    ours.train()
    with ours.averaged_parameters():
        averages = values(model)
    return values(model), averages


def transformers() -> None:
    from transformers import Trainer, TrainingArguments

    from triton_optim.integrations.transformers import AveragedWeights, ReleaseGradients

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.net(x)
            return {"loss": (y - x.roll(1, -1)).square().mean(), "logits": y}

    data = [{"x": x} for x in DATA]

    def run(options: Any, resume: Any = None, callbacks: Any = (), **arguments: Any) -> Any:
        settings = {"output_dir": "out", "use_cpu": True, "max_steps": 6, "save_strategy": "no", "report_to": []}
        settings |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "remove_unused_columns": False}
        args = TrainingArguments(**(settings | {"label_names": []} | arguments))
        chosen = (to.AdamW, options)
        trainer = Trainer(
            Model(),
            args,
            train_dataset=data,
            eval_dataset=data[:8],
            optimizer_cls_and_kwargs=chosen,
            callbacks=[*callbacks],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    plain = run(AVERAGED)
    weights, averages = both(plain.model, plain.optimizer)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    for callbacks, steps in (([AveragedWeights()], 3), ([AveragedWeights("weights")], 2), ([], 2)):
        whole = run(AVERAGED, callbacks=callbacks, save_steps=steps, **evaluated)
        if callbacks and steps == 3:
            assert_same_bits(values(whole.model), averages)
        assert_same_bits(both(whole.model, whole.optimizer), (weights, averages))
        more = [type(c)() for c in callbacks]
        again = run(AVERAGED, f"out/checkpoint-{steps}", more, save_steps=steps, **evaluated)
        assert_same_bits(both(again.model, again.optimizer), (weights, averages))
    for accumulation in (1, 3):  # 16 batches are not thrice so many: the last step is shorter
        more = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.0, "max_steps": 8}
        released = run({"lr": 1e-2}, callbacks=[ReleaseGradients()], **more)
        assert_same_bits(values(released.model), values(run({"lr": 1e-2}, **more).model))


def lightning() -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from triton_optim.integrations.lightning import AveragedWeights, ReleaseGradients

    class Model(LightningModule):
        def __init__(self, options: Any) -> None:
            super().__init__()
            self.net, self.options = net(), options
            self.validated: list[float] = []

        def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
            return (self.net(x) - x.roll(1, -1)).square().mean()

        def validation_step(self, x: Tensor, batch_idx: int) -> None:
            self.validated.append((self.net(x) - x.roll(1, -1)).square().mean().item())

        def configure_optimizers(self) -> Any:
            return to.AdamW(self.parameters(), **self.options)

    data = torch.utils.data.DataLoader(DATA, batch_size=8)

    def run(options: Any, resume: Any = None, **settings: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        saves = any(isinstance(callback, ModelCheckpoint) for callback in settings.get("callbacks", ()))
        model = Model(options)
        trainer = Trainer(**({"max_epochs": 3, "enable_checkpointing": saves} | quiet | settings))
        trainer.fit(model, data, data, ckpt_path=resume)
        return trainer, model

    (trainer, model), (averaging, averaged) = run(AVERAGED), run(AVERAGED, callbacks=[AveragedWeights()])
    assert all(a != b for a, b in zip(model.validated[-8:], averaged.validated[-8:], strict=True))
    weights, averages = both(model, trainer.optimizers[0])
    assert_same_bits(values(averaged), averages)
    assert_same_bits(both(averaged, averaging.optimizers[0]), (weights, averages))
    for name, when in (("epochs", {"every_n_epochs": 1}), ("steps", {"every_n_train_steps": 8})):
        save = ModelCheckpoint(name, save_top_k=-1, filename="{step}", **when)
        run(AVERAGED, callbacks=[save, AveragedWeights()], max_epochs=1)
        held = torch.load(f"{name}/step=8.ckpt", weights_only=True)["state_dict"]
        _, first = run(AVERAGED, callbacks=[AveragedWeights()], max_epochs=1)
        assert_same_bits(list(held.values()), values(first))
        again, resumed = run(AVERAGED, f"{name}/step=8.ckpt", callbacks=[AveragedWeights()])
        assert_same_bits(both(resumed, again.optimizers[0]), (weights, averages))
    for accumulation in (1, 3):
        more = {"accumulate_grad_batches": accumulation}
        _, released = run({"lr": 1e-2}, callbacks=[ReleaseGradients()], **more)
        assert_same_bits(values(released), values(run({"lr": 1e-2}, **more)[1]))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
