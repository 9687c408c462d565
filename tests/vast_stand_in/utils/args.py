import argparse
import json
import os
import sys
from types import SimpleNamespace


def parse_with_config(parser):
    values = vars(parser.parse_args())
    local_rank = values.pop("local_rank")
    given = [word[2:].split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    return SimpleNamespace(run_cfg=SimpleNamespace(**values), local_rank=local_rank, given=given)


def logging_cfgs(args):
    values = {**vars(args), "run_cfg": {**vars(args.run_cfg), "output_dir": ""}}
    with open(os.path.join(args.run_cfg.output_dir, "log", "hps.json"), "w") as file:
        json.dump(values, file, indent=4)


def str2bool(text):
    return {"true": True, "false": False}[text.lower()]


def get_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local-rank", type=int, default=-1)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--output_dir", default="output/")
    parser.add_argument("--learning_rate", type=float, default=0.003)
    parser.add_argument("--train_txt", nargs="+")
    parser.add_argument("--train_task", nargs="+", default=["ret%tvas"])
    parser.add_argument("--train_batch_size", type=int, default=6)
    parser.add_argument("--num_train_steps", type=int, default=10)
    parser.add_argument("--valid_freq", type=int, default=2)
    parser.add_argument("--fp16", type=str2bool, default=False)
    parser.add_argument("--checkpointing", type=str2bool, default=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--loss_type", default="")
    parser.add_argument("--log_steps", type=int, default=-1)
    return parse_with_config(parser)
