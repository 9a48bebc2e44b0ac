"""The folder of a run: whether a run may start or continue in it, and with which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simplclip.common.files import differences
from simplclip.train import checkpoint
from simplclip.train.config import Config, ConfigError, from_dict

# Settings that may differ from the checkpoint's, since they do not change the result. So may the folder of data.train.
_FREE = (
    "data.micro_batch",
    "loss.scratch_mib",
    "model.recompute",
    "eval.",
    "run.out",
    "run.steps",
    "run.device",
    "run.threads",
    "run.log_every",
    "run.print_every",
    "run.save_every",
    "run.keep",
    "run.tensorboard",
)


def claim(out: Path, config: Config, resume: bool) -> tuple[dict[str, Any] | None, Config]:
    """Read the checkpoint to continue from, or check that the run's folder is free. Never overwrites another run.

    If data.micro_batch is "auto", the returned config has the micro-batch of the checkpoint.
    """
    last = out / "last.pt"
    if resume and last.exists():
        state = checkpoint.load(last)
        was = from_dict(state["config"])
        if config.data.micro_batch == "auto":
            config = config.model_copy(update={"data": config.data.model_copy(update={"micro_batch": was.data.micro_batch})})
        _check_same(state, config, last)
        state["batch"] = _place(state["batch"], was, config, last)
        return state, config
    if not resume and any((out / name).exists() for name in ("last.pt", "config.yaml", "metrics.csv")):
        raise ConfigError(
            f"run.out: expected a folder without a run, got {out}; continue that run by --resume, or --set run.out=FOLDER"
        )
    return None, config


def _place(batch: int, was: Config, config: Config, last: Path) -> int:
    """The number of finished batches of the epoch, in batches of `config`."""
    before, now = (c.data.micro_batch or c.data.batch_size for c in (was, config))
    done, rest = divmod(batch * before, now)
    if rest:
        raise ConfigError(
            f"data.micro_batch: expected a divisor of the {batch * before:,} images that {last} has seen of its epoch, "
            f"got {now}"
        )
    return done


def _check_same(state: dict[str, Any], config: Config, last: Path) -> None:
    changed = differences(from_dict(state["config"]).to_dict(), config.to_dict())
    if "data.train" in changed:
        names = [[Path(p).name for p in ([v] if isinstance(v, str) else v)] for v in changed["data.train"]]
        if names[0] == names[1]:
            del changed["data.train"]
    changed = {k: v for k, v in changed.items() if not k.startswith(_FREE)}
    if changed:
        changes = "; ".join(f"{k} was {old!r}, now {new!r}" for k, (old, new) in changed.items())
        raise ConfigError(f"resume: expected the settings of {last}, got other settings: {changes}")
    if state["step"] > config.run.steps:
        raise ConfigError(f"run.steps: expected at least {state['step']}, the step of {last}, got {config.run.steps}")
