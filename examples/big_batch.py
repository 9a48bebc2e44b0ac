"""A contrastive batch of thousands of pairs in the memory of a small one, by gradient caching.

    python examples/big_batch.py 'shards/*.tar' --model ViT-B-32 \
        --batch-size 8192 --micro-batch 128 --steps 500 --out big.pt

A batch is encoded micro-batch by micro-batch, without activations; one loss compares all its pairs;
then each micro-batch is encoded again for its part of the gradient. The gradient is that of the
whole batch, for one more forward pass. Gradient accumulation would compare the pairs of each
micro-batch only.
"""

import argparse
from itertools import islice

import open_clip
import torch

from simplclip import crop_texts, data, gradient_cache
from simplclip.losses import ClipLoss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", help="a pattern of tars; `simplclip data pack` makes them")
    parser.add_argument(
        "--model",
        default="ViT-B-32",
        help="without batch norms, whose statistics would be of micro-batches",
    )
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", required=True, help="file of the trained weights")
    options = parser.parse_args(arguments)
    if options.batch_size % options.micro_batch:
        parser.error("--batch-size: expected a multiple of --micro-batch")
    open(options.out, "ab").close()  # an error now, not after the training

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, preprocess, _ = open_clip.create_model_and_transforms(options.model, device=device)
    crop_texts(model)  # captions cost their length, not the context length of 77 tokens
    loader = data.Loader(
        options.shards,
        tokenizer=open_clip.get_tokenizer(options.model),
        transform=preprocess,
        batch_size=options.micro_batch,
        batches_per_step=options.batch_size // options.micro_batch,
        workers=options.workers,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    loss = ClipLoss()

    def encode(batch: dict) -> tuple[torch.Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            return model(batch["image"].to(device), batch["text"].to(device))

    model.train()
    micro_batches = iter(loader)
    for step in range(options.steps):
        batch = list(islice(micro_batches, options.batch_size // options.micro_batch))
        optimizer.zero_grad()
        terms = gradient_cache.backward(encode, batch, loss, model=model)
        optimizer.step()
        loss_value = terms["loss"].item()
        print(f"step {step}: loss {loss_value:.4f} of {options.batch_size} pairs", flush=True)
    torch.save(model.state_dict(), options.out)


if __name__ == "__main__":
    main()
