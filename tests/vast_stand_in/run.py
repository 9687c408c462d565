import torch.distributed as dist
from utils.args import get_args, logging_cfgs
from utils.build import build_model, build_optimizer, create_train_dataloaders, create_val_dataloaders
from utils.initialize import initialize
from utils.pipeline import train


def main():
    args = get_args()
    initialize(args)
    logging_cfgs(args)
    train_loader, val_loaders = create_train_dataloaders(args), create_val_dataloaders(args)
    model, optimizer_state, start_step = build_model(args)
    optimizer = build_optimizer(model, args, optimizer_state)
    train(model, optimizer, train_loader, val_loaders, args.run_cfg, start_step=start_step, verbose_time=False)
    dist.destroy_process_group()  # VAST leaves it: gloo's threads, which it does not use, may then abort at exit


if __name__ == "__main__":
    main()
