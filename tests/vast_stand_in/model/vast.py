from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from utils.distributed import concat_all_gather

from .general_module import Batch


class VAST(nn.Module):
    def __init__(self, config):
        super().__init__()
        from .text_encoders.bert.bert import WORDS

        self.config = config
        self.words = nn.EmbeddingBag(WORDS, 8)
        self.heads = nn.ModuleDict({name: nn.Linear(12, 8) for name in "vas"})
        self.match = nn.Linear(8, 2)
        self.caption = nn.Linear(8, 1)
        self.contra_temp = nn.Parameter(torch.tensor(0.07))

    def batch_get(self, batch, key):
        if key in batch:
            return batch[key]
        if key == "feat_t":
            ids = [[crc32(word.encode()) % self.words.num_embeddings for word in c.split()] for c in batch.raw_captions]
            starts = [sum(map(len, ids[:i])) for i in range(len(ids))]
            raw = self.words(torch.tensor([word for row in ids for word in row]), torch.tensor(starts))
        else:
            raw = sum(self.heads[name](batch.vision_pixels) for name in key[len("feat_") :])
        batch[key] = F.normalize(raw, dim=-1)
        return batch[key]

    def forward(self, batch, task, compute_loss=True):
        batch, out = Batch(batch), {}
        if "omni_captions" in batch:
            return self.forward_ret_vast27m(batch, task)
        for one in task.split("_"):
            method = self.forward_ret if one.startswith("ret") else self.forward_cap
            out.update(method(batch, one, compute_loss=compute_loss))
        return out

    def forward_cap(self, batch, task, compute_loss=True):
        return {"loss_cap": self.caption(self.batch_get(batch, "feat_v")).square().mean()}

    def forward_ret_vast27m(self, batch, task):
        raise NotImplementedError

    def forward_ret(self, batch, task, compute_loss=True):
        if isinstance(batch.raw_captions[0], list):
            batch.raw_captions = [caption for captions in batch.raw_captions for caption in captions]
        texts = self.batch_get(batch, "feat_t")
        if not compute_loss:
            return {"feat_t": texts}
        itc, itm = [], []
        n, first = len(texts), dist.get_rank() * len(texts)
        targets = torch.arange(first, first + n)
        all_texts = concat_all_gather(texts)
        for subtask in task.split("%")[1:]:
            clips = self.batch_get(batch, f"feat_{subtask[1:]}")
            all_clips = concat_all_gather(clips)
            clip_rows = clips @ all_texts.T / self.contra_temp
            text_rows = texts @ all_clips.T / self.contra_temp
            itc += [F.cross_entropy(rows, targets, label_smoothing=0.1) for rows in (clip_rows, text_rows)]
            wrong_clips, wrong_texts = (
                others[self.negatives(rows, first)] for others, rows in ((all_clips, text_rows), (all_texts, clip_rows))
            )
            pairs = torch.cat([texts * clips, texts * wrong_clips, wrong_texts * clips])
            itm.append(F.cross_entropy(self.match(pairs), (torch.arange(3 * n) < n).long()))
        return {"loss_itc": sum(itc) / len(itc), "loss_itm": 0.1 * sum(itm) / len(itm)}

    @torch.no_grad()
    def negatives(self, rows, first):
        weights = F.softmax(rows, dim=1) + 1e-4
        weights[:, first : first + len(rows)].fill_diagonal_(0)
        return [torch.multinomial(row, 1).item() for row in weights]
