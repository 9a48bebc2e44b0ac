"""The folder of a run: one process at a time trains in it, and only with settings that fit the run in the folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplclip.common.files import differences, fcntl
from simplclip.data.pool import cores
from simplclip.train import checkpoint
from simplclip.train.config import ConfigError, from_dict
from simplclip.train.settings import Config

# Settings that may differ from the checkpoint's: they do not change the result, except run.steps, which moves the end of the
# schedules. The folders of data.train and data.sidecars may differ too.
_FREE = (
    "model.checkpoint",
    "data.micro_batch",
    "data.options.on_error",
    "data.mean_tokens",
    "model.recompute",
    "eval.",
    "run.",
)
_NOT_FREE = ("run.seed", "run.precision", "run.compile")
_held: set[int] = set()  # descriptors of this process's locks


def _close_inherited_locks() -> None:
    """Closes inherited locks in a forked loader process, which may live seconds longer than a killed trainer."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[str | None]:
    """Context that locks `folder` for this process, and makes the folder if necessary.

    The file run.lock names the process and its host, and is locked (flock) while the process lives: the system releases the
    lock when the process ends, however it ends. If the file system has no locks, the context gives a warning instead. At the
    end run.lock is removed, and so are the folders that were made, unless they contain files.

    Raises ConfigError for a folder in use, naming the process and its host; nothing in the folder is changed then.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.out: expected a folder, got the file {folder}")
    path = folder / "run.lock"
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        file, reason = _lock(path)
        try:
            try:
                with open(path, "w", opener=_no_link) as named:
                    named.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
            yield reason and (f"{path} cannot be locked ({reason}): another run in this folder would not be noticed")
        finally:
            path.unlink(missing_ok=True)  # while locked: a process that has opened the file notices its removal
            if file is not None:
                _held.discard(file)
                os.close(file)
    finally:
        for part in made:
            with contextlib.suppress(OSError):  # not empty any more
                part.rmdir()


def _no_link(path: str | os.PathLike, flags: int) -> int:
    """Opens a file without following a link, and returns its descriptor. Raises ConfigError for a link."""
    if os.path.islink(path):
        raise ConfigError(f"run.out: expected a file or none, got the link {path}; remove it")
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(path: Path) -> tuple[int | None, str | None]:
    """Makes and locks the file. Returns its descriptor and None; or None and the reason why it cannot be locked."""
    while True:
        # Another process may remove the file or the folder in between.
        with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _no_link(path, os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, file)
            try:
                if fcntl is None:
                    raise OSError(0, "this system has no flock")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told = f"run.out: expected a folder that no process trains in, got {path.parent}: {_owner(path)} does"
                raise ConfigError(told) from None
            except OSError as error:
                return None, error.strerror
            if os.path.samestat(os.fstat(file), os.stat(path)):
                stack.pop_all()
                _held.add(file)
                return file, None


def _owner(path: Path) -> str:
    """Returns the process and the host that the file names, in words."""
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on host {found['host']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "a process that is starting"


def claim(out: Path, config: Config, resume: bool) -> tuple[dict[str, Any] | None, Config]:
    """Reads the checkpoint to continue from, or checks that the folder holds no run. Never overwrites another run.

    If data.micro_batch is "auto" or data.workers is null, the returned config has the checkpoint's value. Without a
    checkpoint, data.workers becomes the number of cores that this process may use.
    """
    last = out / "last.pt"
    if not (resume and last.exists()):
        if not resume and any((out / name).exists() for name in ("last.pt", "config.yaml", "metrics.csv")):
            raise ConfigError(
                f"run.out: expected a folder without a run, got {out}; continue that run by --resume, or --set run.out=FOLDER"
            )
        return None, _with(config, workers=cores()) if config.data.workers is None else config
    state = checkpoint.load(last)
    was = from_dict(state["config"], stored=True)
    if config.data.micro_batch == "auto":
        config = _with(config, micro_batch=was.data.micro_batch)
    if config.data.workers is None:
        config = _with(config, workers=was.data.workers)
    old, new = was.to_dict(), config.to_dict()
    for key in ("train", "sidecars"):
        if _names(old["data"][key]) == _names(new["data"][key]):
            old["data"][key] = new["data"][key]
    if all(config["data"]["cache_prefix"] is not None for config in (old, new)):  # PrefixCache refuses other outputs
        old["data"]["cache_prefix"] = new["data"]["cache_prefix"]
    changed = differences(old, new)
    changed = {k: v for k, v in changed.items() if k in _NOT_FREE or not k.startswith(_FREE)}
    if changed:
        changes = "; ".join(f"{k} was {old!r}, now {new!r}" for k, (old, new) in changed.items())
        raise ConfigError(
            f"resume: expected the settings of {last}, got other settings: {changes}. A new run takes its weights: "
            f"--set model.checkpoint={last} --set run.out=FOLDER"
        )
    if state["step"] > config.run.steps:
        raise ConfigError(f"run.steps: expected at least {state['step']}, the step of {last}, got {config.run.steps}")
    before, now = (c.data.images_at_a_time for c in (was, config))
    images = state["batch"] * before
    state["batch"], rest = divmod(images, now)
    if rest:
        raise ConfigError(
            f"data.micro_batch: expected a divisor of the {images:,} images that {last} has seen of its epoch, got {now}"
        )
    return state, config


def _with(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _names(train: Any) -> Any:
    """Returns data.train without the folders of its paths, which may have moved; a command stays whole."""
    if isinstance(train, str):
        return train if train.startswith("pipe:") else Path(train).name
    if isinstance(train, dict):
        return train | {"shards": _names(train["shards"])}
    return [_names(one) for one in train]
