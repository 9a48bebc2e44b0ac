"""Fine-tunes an open_clip model on a folder of pictures with captions, and keeps what it knew.

    python examples/finetune_photos.py photos --model ViT-B-32 --pretrained laion2b_s34b_b79k \
        --out finetuned.pt

photos/ has KEY.jpg, .png or another image and the caption in KEY.txt. Every tenth picture is held
out: R@1 among them is printed before, after each epoch, and for the saved weights, the mean of
before and after, which keep more of the model's general knowledge (WiSE-FT, arXiv 2109.01903).
Search with the result:

    python examples/search_photos.py photos --model open_clip:ViT-B-32/finetuned.pt \
        --find "a red car"
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simplclip import crop_texts
from simplclip.data.decode_images import IMAGE_SUFFIXES
from simplclip.losses import ClipLoss


class Photos(Dataset):
    """Pairs of pixels float32 [3, S, S] and tokens int64 [L]."""

    def __init__(self, files: list[Path], transform: Callable, tokenizer: Callable) -> None:
        self.files = files
        self.transform = transform
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        file = self.files[number]
        with Image.open(file) as image:
            pixels = self.transform(image)
        caption = file.with_suffix(".txt").read_text("utf-8-sig").strip()
        return pixels, self.tokenizer([caption])[0]


@torch.no_grad()
def recall(model: torch.nn.Module, batches: DataLoader, device: str) -> float:
    """Returns R@1 of the right caption of each picture; equal captions are all right."""
    model.eval()
    images = []
    texts = []
    tokens = []
    for pixels, captions in batches:
        images.append(model.encode_image(pixels.to(device), normalize=True))
        texts.append(model.encode_text(captions.to(device), normalize=True))
        tokens.append(captions)
    nearest = (torch.cat(images) @ torch.cat(texts).T).argmax(1).cpu()
    return (torch.cat(tokens)[nearest] == torch.cat(tokens)).all(1).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", required=True, help="open_clip's tag, or a file of weights")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", required=True, help="file of the weights")
    options = parser.parse_args(arguments)
    paths = options.folder.rglob("*")
    files = sorted(file for file in paths if file.suffix[1:].lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        parser.error(f"folder: expected at least two pictures, got {len(files)}")
    for file in files:
        if not file.with_suffix(".txt").is_file():
            parser.error(f"folder: expected a caption beside each picture, got none of {file}")
    open(options.out, "ab").close()  # an error now, not after the training

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, augment, preprocess = open_clip.create_model_and_transforms(
        options.model, pretrained=options.pretrained, device=device
    )
    tokenizer = open_clip.get_tokenizer(options.model)
    crop_texts(model)  # captions cost their length
    train_files = [file for number, file in enumerate(files) if number % 10]
    train = Photos(train_files, augment, tokenizer)
    shared = {"batch_size": min(options.batch_size, len(train)), "num_workers": options.workers}
    batches = DataLoader(train, shuffle=True, drop_last=True, **shared)
    held_out = DataLoader(Photos(files[::10], preprocess, tokenizer), **shared)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    r1 = recall(model, held_out, device)
    print(f"{len(train)} pictures, {len(files[::10])} held out, R@1 before: {r1:.1%}")

    optimizer = torch.optim.AdamW(
        model.parameters(), options.lr, betas=(0.9, 0.98), weight_decay=0.1
    )
    steps = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, steps, pct_start=0.1, cycle_momentum=False
    )
    clip_loss = ClipLoss()
    for epoch in range(options.epochs):
        model.train()
        for pixels, tokens in batches:
            # pictures with one caption are not each other's negatives
            _, ids = tokens.unique(dim=0, return_inverse=True)
            with torch.autocast(device, torch.bfloat16):
                outputs = model(pixels.to(device), tokens.to(device))
                loss = clip_loss(*outputs, ids=ids.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        r1 = recall(model, held_out, device)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, R@1 {r1:.1%}", flush=True)

    after = model.state_dict()
    model.load_state_dict({name: (before[name] + value) / 2 for name, value in after.items()})
    torch.save(model.state_dict(), options.out)
    r1 = recall(model, held_out, device)
    print(f"wrote {options.out}, the mean of before and after: R@1 {r1:.1%}")


if __name__ == "__main__":
    main()
