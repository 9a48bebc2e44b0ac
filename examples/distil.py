"""Distils a large CLIP model into a small one, which learns from the large one's stored features.

    python examples/distil.py 'shards/*.tar' --teacher open_clip:ViT-B-16/laion2b_s34b_b88k \
        --out distilled

The teacher's features of all images and captions are written into OUT/teacher, one tar beside each
shard, and a later call goes on from them; the teacher itself is not in memory while the student
trains. WIKDLoss has the student match the pairs as CLIP does, and also the teacher's features
(feature), its similarities (relational) and both across images and texts (interactive). `simplclip
train` does the same with checkpoints, evaluation and schedules of the weights.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch

from simplclip import create_model, data, models, teacher
from simplclip.losses import WIKDLoss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", help="a pattern of tars; `simplclip data pack` makes them")
    parser.add_argument(
        "--teacher",
        required=True,
        help="what simplclip.load takes: open_clip:NAME/TAG, a run, an export",
    )
    parser.add_argument("--student", default="siclip2-s0", help="what simplclip.create_model takes")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the teacher's features and of student.pt"
    )
    options = parser.parse_args(arguments)

    features = options.out / "teacher"
    teacher.run(options.shards, features, options.teacher, workers=options.workers)
    stamp = data.teacher_stamp([features])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = create_model(options.student, device=device)
    transform = models.transforms(options.student, train=True)
    loader = data.Loader(
        options.shards,
        sidecars=[features],
        teacher=True,
        tokenizer=models.tokenizer(options.student),
        transform=transform,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    width = models.spec_of(options.student).config["embed_dim"]
    weights = {"relational_weight": 1.0, "interactive_weight": 1.0, "feature_weight": 0.8}
    # projects to the teacher's width
    loss = WIKDLoss(embed_dim=width, teacher_dim=stamp["width"], **weights).to(device)
    parameters = [*student.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
    )

    teacher_scale = torch.tensor(stamp["logit_scale"], device=device)
    student.train()
    for step, batch in enumerate(islice(loader, options.steps)):
        names = ("image", "text", "teacher_image", "teacher_text", "group")
        image, text, teacher_image, teacher_text, ids = (batch[name].to(device) for name in names)
        with torch.autocast(device, torch.bfloat16):
            image_features, text_features, scale = student(transform.finish(image), text)[:3]
            terms = loss(
                image_features,
                text_features,
                scale,
                teacher_image,
                teacher_text,
                teacher_scale,
                ids=ids,
                output_dict=True,
            )
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        if step % 10 == 0:
            values = ", ".join(f"{name} {value.item():.3f}" for name, value in terms.items())
            print(f"step {step}: {values}", flush=True)
    torch.save(student.state_dict(), options.out / "student.pt")


if __name__ == "__main__":
    main()
