import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import nn


def gathered(*features):
    if not dist.is_initialized():
        return features
    return [torch.cat(dist.nn.all_gather(rows)) for rows in features]


class ClipLoss(nn.Module):
    def __init__(
        self,
        local_loss=False,
        gather_with_grad=False,
        cache_labels=False,
        rank=0,
        world_size=1,
        use_horovod=False,
    ):
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size

    def forward(self, image_features, text_features, logit_scale):
        image_features, text_features = gathered(image_features, text_features)
        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return {"loss": loss, "clip_acc": 100 * (logits.argmax(1) == labels).float().mean()}


class MaxMarginRankingLoss(nn.Module):
    def __init__(
        self,
        margin=0.2,
        fix_norm=True,
        local_loss=False,
        gather_with_grad=False,
        rank=0,
        world_size=1,
        use_horovod=False,
    ):
        super().__init__()
        self.margin = margin
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size

    def forward(self, image_features, text_features, weight=None):
        image_features, text_features = gathered(image_features, text_features)
        scores = F.normalize(text_features, dim=-1) @ F.normalize(image_features, dim=-1).T
        others = ~torch.eye(len(scores), dtype=torch.bool)
        hinges = F.relu(self.margin - scores.diag()[:, None] + torch.stack([scores, scores.T]))[:, others]
        return {"loss": hinges.mean(), "max_margin_loss": hinges.mean()}
