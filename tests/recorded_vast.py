"""Started under the name of VAST's script: writes down what goes into and comes out of the losses of the real one.

``TEST_SCRIPT`` is the script to become, ``TEST_RECORD`` where to write, ``TEST_DIE_AT`` the step at which to be killed,
``TEST_INSTALL=1`` arms the plugin, as the start-up file would.
"""

import importlib
import itertools
import json
import os
import random
import runpy
import sys

import numpy as np
import torch

if os.environ.get("TEST_INSTALL") == "1":
    import mmts_plugins

    mmts_plugins.install()
    assert "model" not in sys.modules

root = os.path.dirname(os.environ["TEST_SCRIPT"])
sys.path[0] = root  # Python follows the link that this script is, to its own folder
utils = "utils" if os.path.isdir(os.path.join(root, "utils")) else "vast_utils"
pipeline = importlib.import_module(f"{utils}.pipeline")
data = importlib.import_module("data.IndexAnno")
model_registry = importlib.import_module("model").model_registry
((_, model_class),) = model_registry.items()

target = f"{os.environ['TEST_RECORD']}-{os.environ.get('RANK', '0')}.json"
records, weights = [], []
step = 0
forward_ret, multinomial = model_class.forward_ret, torch.multinomial
train, get_lr_sched = pipeline.train, pipeline.get_lr_sched
get_item = data.AnnoIndexedDataset.__getitem__


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def recording_item(self, i):
    # What a sample looks like depends on the sample alone, so that a resumed run can be compared to the bit.
    seed(i)
    return get_item(self, i)


def recording_multinomial(row, samples):
    weights.append(row.double().tolist())
    return multinomial(row, samples)


def recording_forward(self, batch, task, compute_loss=True):
    if not compute_loss:
        return forward_ret(self, batch, task, compute_loss=compute_loss)
    if str(step) == os.environ.get("TEST_DIE_AT"):
        finish()
        os._exit(9)
    seed(1000 + step)
    weights.clear()
    torch.multinomial = recording_multinomial
    losses = forward_ret(self, batch, task, compute_loss=compute_loss)
    torch.multinomial = multinomial
    features = {key: batch[key].detach().double().tolist() for key in batch if key.startswith("feat_")}
    records.append(
        {
            "step": step,
            "task": task,
            "captions": list(batch["raw_captions"]),
            "ids": list(batch["ids"]),
            "features": features,
            "weights": list(weights),
            "losses": {key: float(value.detach()) for key, value in losses.items()},
            "temperature": float(self._parameters["contra_temp"]),
            "dtype": str(losses.get("loss_area", losses["loss_itc"]).dtype),
        }
    )
    return losses


def recording_step(global_step, run_cfg):
    global step
    step = global_step
    return get_lr_sched(global_step, run_cfg)


class From:
    """VAST starts a resumed run with its first batches again; to be compared, it must go on where it was."""

    def __init__(self, loader, first):
        self.loader, self.first = loader, first

    def __iter__(self):
        return itertools.islice(iter(self.loader), self.first, None)

    def __getattr__(self, name):
        return getattr(self.loader, name)


def recording_train(model, optimizer, train_loader, val_loaders, run_cfg, start_step=0, verbose_time=False):
    global step
    step = start_step
    random.seed(0)
    return train(model, optimizer, From(train_loader, start_step), val_loaders, run_cfg, start_step=start_step)


def finish():
    with open(target, "w") as file:
        json.dump(records, file)


model_class.forward_ret = recording_forward
pipeline.train, pipeline.get_lr_sched = recording_train, recording_step
data.AnnoIndexedDataset.__getitem__ = recording_item
torch.set_num_threads(1)
sys.argv[0] = os.environ["TEST_SCRIPT"]
runpy.run_path(sys.argv[0], run_name="__main__")
finish()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order, even without a group
