"""Small shards of image-text pairs, whose batches can be read back; commands, and processes that
are killed.
"""

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import random
import signal
import sys
import tarfile

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from simplclip import data
from simplclip.commands.main import app
from simplclip.common import files
from simplclip.data import samples
from simplclip.data.errors import Skipped
from simplclip.data.read_tars import read_tar

SIZE = 8
COUNT = 23


def png(seed=0, size=(12, 12), form="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        out, form
    )
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def digests(folder, pattern="*"):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern)
    }


def meta(folder):
    return json.loads((folder / "meta.json").read_text())


def write(path, samples):
    """Writes a tar. samples: list of (key, {suffix: bytes}), as the tar's members in this order."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def joined(shards, *folders, teacher=False):
    """Returns the samples of shards by key, as training reads them with the sidecars in
    `folders`.
    """
    found = {}
    for source in data.sources_of(str(shards)):
        for raw in read_tar(source, Skipped(), sidecars=folders):
            found[raw["__key__"]] = samples.parse(raw, teacher=teacher)
    return found


def table(path, rows, header=("filepath", "title"), separator=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return str(path)


def sample(number):
    record = {"captions": [f"{number} {letter}" for letter in "abc"], "group": number // 2}
    return f"k{number:03d}", {
        "json": json.dumps(record).encode(),
        "png": png(number),
        "txt": f"{number} a".encode(),
    }


def tokenizer(texts):
    """Tokenizes without loss: a token is a byte of the text."""
    return torch.tensor([list(text.encode()[:12].ljust(12)) for text in texts], dtype=torch.int64)


def text_of(row):
    return bytes(row.tolist()).decode().strip()


def resize(image):
    return torch.from_numpy(np.array(image.resize((SIZE, SIZE)))).permute(2, 0, 1).float() / 255


def augment(image):
    """Adds draws from all three global generators, which torchvision, open_clip and timm use."""
    return resize(image) + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002


def loader(paths, state=None, **options):
    reader = data.Loader(
        paths, **{"batch_size": 4, "transform": augment, "tokenizer": tokenizer} | options
    )
    if state is not None:
        reader.load_state_dict(state)
    return reader


def take(batches, count):
    return list(itertools.islice(batches, count))


def keys(batches):
    return [key for batch in batches for key in batch["key"]]


def one_line(*arguments):
    """Runs a command that must end in an error, and returns the one line that it prints."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    return line


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def forked(action):
    """Runs `action()` in a process of its own. Returns its exit code, 1 after an exception."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            action()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_any_point(folder, work, least, check=lambda out: None):
    """Kills `work(out, step)` (-9) at every 16th point, with --prove at each, and repeats the work.

    A point is a call of `step` or a line that writes a file.

    After a kill no shard is torn and `check(out)` holds; the repeated work ends as undisturbed
    work. least: number of points.
    """
    writing = [f.__code__ for f in (files.write_atomically, files.replacing.__wrapped__)]

    def go(out, point=-1):
        count = itertools.count()
        step = lambda: os.kill(os.getpid(), signal.SIGKILL) if next(count) == point else None  # noqa: E731

        def trace(frame, event, _):
            if frame.f_code in writing:
                step() if event == "line" else None
                return trace

        if point >= 0:
            sys.settrace(trace)
        work(out, step)

    go(folder / "whole")
    whole = digests(folder / "whole")
    for point in itertools.count(step=int(os.environ.get("SIMPLCLIP_TEST_STRIDE", "16"))):
        out = folder / f"killed-{point}"
        code = forked(functools.partial(go, out, point))
        assert code in (0, -signal.SIGKILL)
        assert digests(out, "*.tar").items() <= whole.items()
        check(out)
        go(out)
        assert digests(out) == whole
        if code == 0:
            break
    assert point > least
