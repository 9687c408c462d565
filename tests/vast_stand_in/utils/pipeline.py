import contextlib
import os

import torch
import torch.distributed as dist

from .logger import LOGGER
from .sched import get_lr_sched


def train(model, optimizer, train_loader, val_loaders, run_cfg, start_step=0, verbose_time=False):
    global_step = start_step
    for name, batch in train_loader:
        with torch.autocast("cpu", torch.bfloat16) if run_cfg.fp16 else contextlib.nullcontext():
            losses = model(batch, task=name.split("--")[0], compute_loss=True)
            loss = sum(losses.values())
        global_step += 1
        ratio = get_lr_sched(global_step, run_cfg)
        for group in optimizer.param_groups:
            group["lr"] = group["init_lr"] * ratio
        LOGGER.info("step %d: %s", global_step, {key: value.item() for key, value in losses.items()})
        loss.backward()
        if run_cfg.checkpointing:  # no DDP then: gradients are summed by hand
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        if (global_step + 1) % run_cfg.valid_steps == 0:
            test(model, val_loaders, run_cfg)
            if dist.get_rank() == 0:
                save(getattr(model, "module", model), optimizer, run_cfg, global_step)
        if global_step >= run_cfg.num_train_steps:
            break


@torch.no_grad()
def test(model, val_loaders, run_cfg):
    for name, loader in val_loaders.items():
        for batch in loader:
            out = model(batch, name.split("--")[0], compute_loss=False)
    LOGGER.info("validation %r", out["feat_t"].double().sum().item())


def save(model, optimizer, run_cfg, step):
    for kind, state in (("model", model.state_dict()), ("optimizer", optimizer.state_dict())):
        torch.save(state, os.path.join(run_cfg.output_dir, "ckpt", f"{kind}_step_{step}.pt"))
