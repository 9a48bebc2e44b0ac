"""open_clip's training loop with simplclip's loss, whose memory grows with N and not with N².

    python examples/drop_in_loss.py 'shards/*.tar' --model ViT-B-32 --batch-size 256 \
        --steps 1000 --out my.pt

A shard has KEY.jpg or KEY.png and the caption in KEY.txt. Only the line marked below differs from
open_clip's loop: values and gradients are equal. `simplclip.load("open_clip:ViT-B-32/my.pt")` and
open_clip's `pretrained="my.pt"` load the result.
"""

import argparse
import glob
import math
from itertools import islice

import open_clip
import torch
import webdataset

from simplclip.losses import ClipLoss  # in place of: from open_clip import ClipLoss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", help="a pattern of tars")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", required=True, help="file of the trained weights")
    options = parser.parse_args(arguments)
    shards = sorted(glob.glob(options.shards))
    if not shards:
        parser.error(f"shards: expected files, got none by {options.shards!r}")
    workers = min(options.workers, len(shards))  # webdataset gives each whole shards
    open(options.out, "ab").close()  # an error now, not after the training

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, preprocess, _ = open_clip.create_model_and_transforms(options.model, device=device)
    tokenizer = open_clip.get_tokenizer(options.model)
    pairs = webdataset.WebDataset(shards, shardshuffle=100).repeat().shuffle(5000)
    pairs = pairs.decode("pilrgb").to_tuple("jpg;png", "txt")
    pairs = pairs.map_tuple(preprocess, lambda text: tokenizer(text)[0])
    batches = torch.utils.data.DataLoader(pairs, options.batch_size, num_workers=workers)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    clip_loss = ClipLoss()

    model.train()
    for step, (images, texts) in enumerate(islice(batches, options.steps)):
        with torch.autocast(device, torch.bfloat16):
            image_features, text_features, logit_scale = model(images.to(device), texts.to(device))
            loss = clip_loss(image_features, text_features, logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 10 == 0:
            values = f"loss {loss.item():.4f}, scale {logit_scale.item():.1f}"
            print(f"step {step}: {values}", flush=True)
    torch.save(model.state_dict(), options.out)


if __name__ == "__main__":
    main()
