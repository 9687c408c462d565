import glob
import os

import torch
import torch.distributed as dist
from data.IndexAnno import AnnoIndexedDataset, annoindexedcollate
from model import model_registry
from torch.nn.parallel import DistributedDataParallel


class MetaLoader:
    """Draws from several loaders, for ever, and hands on which it was."""

    def __init__(self, name2loader):
        self.name2loader = name2loader

    def __iter__(self):
        iterators, epoch, number = {name: iter(loader) for name, loader in self.name2loader.items()}, 0, 0
        while True:
            name = list(self.name2loader)[number % len(self.name2loader)]
            number += 1
            try:
                batch = next(iterators[name])
            except StopIteration:
                epoch += 1
                self.name2loader[name].sampler.set_epoch(epoch)
                iterators[name] = iter(self.name2loader[name])
                batch = next(iterators[name])
            yield name, batch


class PrefetchLoader:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __getattr__(self, name):
        return self.loader.__getattribute__(name)


def _loader(path, batch_size):
    dataset = AnnoIndexedDataset(path)
    sampler = torch.utils.data.distributed.DistributedSampler(dataset)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size // dist.get_world_size(),
        sampler=sampler,
        drop_last=True,
        collate_fn=annoindexedcollate,
    )


def create_train_dataloaders(args):
    cfg = args.run_cfg
    loaders = {
        f"{task}--set{number}": _loader(path, cfg.train_batch_size)
        for number, (path, task) in enumerate(zip(cfg.train_txt, cfg.train_task))
    }
    cfg.valid_steps = cfg.num_train_steps // cfg.valid_freq - 1
    return PrefetchLoader(MetaLoader(loaders))


def create_val_dataloaders(args):
    return {"ret%tvas--val": _loader(args.run_cfg.train_txt[0], 4)}


class DDP(DistributedDataParallel):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def build_model(args):
    (cls,) = model_registry.values()
    model, optimizer_state, start_step = cls(args.run_cfg), None, 0
    if args.run_cfg.resume:
        folder = os.path.join(args.run_cfg.output_dir, "ckpt")
        start_step = max(int(path.split("_")[-1][:-3]) for path in glob.glob(f"{folder}/optimizer_step_*.pt"))
        model.load_state_dict(torch.load(f"{folder}/model_step_{start_step}.pt", weights_only=True))
        optimizer_state = torch.load(f"{folder}/optimizer_step_{start_step}.pt", weights_only=True)
    if not args.run_cfg.checkpointing:
        model = DDP(model, find_unused_parameters=True)
    return model, optimizer_state, start_step


def build_optimizer(model, args, state):
    optimizer = torch.optim.Adam([{"params": list(model.parameters()), "init_lr": args.run_cfg.learning_rate}])
    if state is not None:
        optimizer.load_state_dict(state)
    return optimizer
