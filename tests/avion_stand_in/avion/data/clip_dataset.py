import csv
import json
import random

import torch


class Sentences:
    """As much of a pandas frame as the data set's own is asked for."""

    def __init__(self, rows):
        self.rows = rows
        self.iloc = self

    def __getitem__(self, index):
        _, column = index
        return [row[column] for row in self.rows]


class VideoCaptionDatasetCLIP(torch.utils.data.Dataset):
    def __init__(self, dataset, root, metadata, transform=None, is_training=True, tokenizer=None):
        self.dataset, self.metadata = dataset, metadata
        with open(metadata) as file:
            if dataset == "ego4d":
                self.samples = [tuple(sample) for sample in json.load(file)]
            else:
                rows = list(csv.reader(file))[1:]
                self.samples = [(row[1], 0.0, 1.0, 30.0, row[8], int(row[10]), int(row[12])) for row in rows]
                self.metadata_sentence = Sentences([(row[0], row[8]) for row in rows])
        self.is_training = is_training
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.samples)

    def get_raw_item(self, i, is_training=True):
        frames = torch.randn(12, generator=torch.Generator().manual_seed(i))
        if self.dataset == "ego4d":
            narration = self.samples[i][3]
            return frames, random.choice(narration) if isinstance(narration, list) else narration
        return frames, (random.choice(self.samples)[4], 0.5 if is_training else 1)

    def __getitem__(self, i):
        frames, caption = self.get_raw_item(i, is_training=self.is_training)
        caption, relevancy = caption if isinstance(caption, tuple) else (caption, 0.0)
        return frames, self.tokenizer(caption)[0], relevancy
