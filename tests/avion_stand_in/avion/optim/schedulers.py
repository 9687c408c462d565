import numpy as np


def cosine_scheduler(base_value, final_value, epochs, niter_per_ep, warmup_epochs=0, start_warmup_value=0):
    return np.linspace(base_value, final_value, epochs * niter_per_ep)
