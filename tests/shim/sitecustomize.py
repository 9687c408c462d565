"""For tests only: OpenCLIP 3.x passes ``device_ids=[cpu]`` to DDP, which refuses it; without it ranks run on a CPU."""

import torch.nn.parallel.distributed as distributed

_init = distributed.DistributedDataParallel.__init__


def _without_device_ids(self, module, device_ids=None, **kwargs):
    _init(self, module, **kwargs)


distributed.DistributedDataParallel.__init__ = _without_device_ids
