import torch
import torch.distributed as dist


@torch.no_grad()
def concat_all_gather(tensor):
    own = tensor.float().contiguous()  # older gloo knows no bfloat16
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts).to(tensor.dtype)
