import json
from zlib import crc32

import torch


class AnnoIndexedDataset(torch.utils.data.Dataset):
    def __init__(self, txt):
        with open(txt) as file:
            self.annos = json.load(file)

    def __len__(self):
        return len(self.annos)

    def __getitem__(self, i):
        anno = self.annos[i]
        generator = torch.Generator().manual_seed(crc32(anno["video_id"].encode()))
        return anno["video_id"], anno["desc"], torch.randn(12, generator=generator)


def annoindexedcollate(inputs):
    ids, captions, pixels = zip(*inputs)
    return {"ids": list(ids), "raw_captions": list(captions), "vision_pixels": torch.stack(pixels)}
