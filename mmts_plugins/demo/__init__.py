"""``mmts demo``: plain CLIP against MM-TS with OpenCLIP's own trainer, on a small long-tail set of real images."""
