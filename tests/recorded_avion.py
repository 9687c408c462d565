"""Started under the name of one of AVION's scripts: writes down what goes into and comes out of its loss.

``TEST_SCRIPT`` is the script to become, ``TEST_RECORD`` where to write, ``TEST_DIE_AT`` the step at which to be killed,
``TEST_INSTALL=1`` arms the plugin, as the start-up file would; ``TEST_WORKERS`` starts loader workers that way.
"""

import os
import random
import runpy
import sys

import numpy as np
import torch


def spread(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embedding" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 3 * weight[0].numel() ** -0.5)
    return model


def main():
    if os.environ.get("TEST_INSTALL") == "1":
        import mmts_plugins

        mmts_plugins.install()
        assert "avion.losses.losses" not in sys.modules
    if "TEST_WORKERS" in os.environ:
        torch.multiprocessing.set_start_method(os.environ["TEST_WORKERS"])
    import avion.data.clip_dataset as data
    import avion.losses.losses as losses

    if "TEST_SPREAD" in os.environ:  # AVION's own initialisation maps everything to nearly one point
        import avion.models.model_clip as model_clip

        made = model_clip.CLIP_TINY
        model_clip.CLIP_TINY = lambda *args, **kwargs: spread(made(*args, **kwargs))

    target = f"{os.environ['TEST_RECORD']}-{os.environ.get('RANK', '0')}.npz"
    records = {name: [] for name in ("image", "text", "verb", "noun", "caption", "loss", "accuracy", "validation")}
    drawn = []

    def recording_item(get_raw_item):
        def get(self, i, *args, **kwargs):
            # What a sample looks like depends on the sample alone, so that a resumed run can be compared to the bit.
            random.seed(i)
            np.random.seed(i)
            torch.manual_seed(i)
            frames, caption = get_raw_item(self, i, *args, **kwargs)
            if self.is_training:
                drawn.append((self.samples[i], caption[0] if isinstance(caption, tuple) else caption))
            return frames, caption

        return get

    def recording(forward):
        def record(self, image_features, text_features, *rest, **weight):
            if torch.is_grad_enabled() and str(len(records["loss"])) == os.environ.get("TEST_DIE_AT"):
                np.savez(target, **records)
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()  # the first to die takes the others with it
                os._exit(9)
            out = forward(self, image_features, text_features, *rest, **weight)
            if not torch.is_grad_enabled():
                records["validation"].append(float(out["loss"]))
                return out
            batch, drawn[:] = drawn[-len(image_features) :], []
            records["image"].append(image_features.detach().double().numpy())
            records["text"].append(text_features.detach().double().numpy())
            records["verb"].append([sample[-2] for sample, _ in batch])
            records["noun"].append([str(sample[-1]) for sample, _ in batch])
            records["caption"].append([caption for _, caption in batch])
            records["loss"].append(float(out["loss"].detach()))
            records["accuracy"].append(float(out.get("clip_acc", -1)))
            return out

        return record

    losses.MaxMarginRankingLoss.forward = recording(losses.MaxMarginRankingLoss.forward)
    losses.ClipLoss.forward = recording(losses.ClipLoss.forward)
    data.VideoCaptionDatasetCLIP.get_raw_item = recording_item(data.VideoCaptionDatasetCLIP.get_raw_item)
    torch.set_num_threads(1)
    sys.argv[0] = os.environ["TEST_SCRIPT"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    records["validation"] = records["validation"] or [0.0]
    np.savez(target, **records)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order, even without a group


if __name__ == "__main__":
    main()
