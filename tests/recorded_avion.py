"""Started under the name of AVION's script: writes down what goes into and comes out of the loss of the real one.

``TEST_SCRIPT`` is the script to become, ``TEST_RECORD`` where to write, ``TEST_DIE_AT`` the step at which to be killed,
``TEST_INSTALL=1`` arms the plugin, as the start-up file would.
"""

import os
import random
import runpy
import sys

import numpy as np
import torch

if os.environ.get("TEST_INSTALL") == "1":
    import mmts_plugins

    mmts_plugins.install()
    assert "torch" in sys.modules
    assert "avion.losses.losses" not in sys.modules
import avion.data.clip_dataset as data
import avion.losses.losses as losses

target = f"{os.environ['TEST_RECORD']}-{os.environ.get('RANK', '0')}.npz"
records = {name: [] for name in ("image", "text", "verb", "noun", "loss", "validation")}
drawn = []
forward, get_raw_item = losses.MaxMarginRankingLoss.forward, data.VideoCaptionDatasetCLIP.get_raw_item


def recording_item(self, i, *args, **kwargs):
    # What a sample looks like depends on the sample alone, so that a resumed run can be compared to the bit.
    random.seed(i)
    np.random.seed(i)
    torch.manual_seed(i)
    if self.is_training:
        drawn.append(self.samples[i])
    return get_raw_item(self, i, *args, **kwargs)


def recording_forward(self, image_features, text_features, weight=None):
    if torch.is_grad_enabled() and str(len(records["loss"])) == os.environ.get("TEST_DIE_AT"):
        np.savez(target, **records)
        os._exit(9)
    out = forward(self, image_features, text_features, weight=weight)
    assert set(out) == {"loss", "max_margin_loss"}
    if not torch.is_grad_enabled():
        records["validation"].append(float(out["loss"]))
        return out
    batch, drawn[:] = drawn[-len(image_features) :], []
    records["image"].append(image_features.detach().double().numpy())
    records["text"].append(text_features.detach().double().numpy())
    records["verb"].append([sample[-2] for sample in batch])
    records["noun"].append([sample[-1] for sample in batch])
    records["loss"].append(float(out["loss"].detach()))
    return out


losses.MaxMarginRankingLoss.forward = recording_forward
data.VideoCaptionDatasetCLIP.get_raw_item = recording_item
torch.set_num_threads(1)
sys.argv[0] = os.environ["TEST_SCRIPT"]
runpy.run_path(sys.argv[0], run_name="__main__")
records["validation"] = records["validation"] or [0.0]
np.savez(target, **records)
