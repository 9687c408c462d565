import csv
import random

import torch


class VideoCaptionDatasetCLIP(torch.utils.data.Dataset):
    def __init__(self, dataset, root, metadata, transform=None, is_training=True, tokenizer=None):
        with open(metadata) as file:
            rows = list(csv.reader(file))[1:]
        self.samples = [(row[1], 0.0, 1.0, 30.0, row[8], int(row[10]), int(row[12])) for row in rows]
        self.is_training = is_training

    def __len__(self):
        return len(self.samples)

    def get_raw_item(self, i, is_training=True):
        frames = torch.randn(12, generator=torch.Generator().manual_seed(i))
        return frames, (random.choice(self.samples)[4], 0.5 if is_training else 1)

    def __getitem__(self, i):
        frames, (caption, relevancy) = self.get_raw_item(i, is_training=self.is_training)
        return frames, torch.tensor([float(len(caption)), float(ord(caption[0])), float(i)]) / 100, relevancy
