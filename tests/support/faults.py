"""Faults at random moments of real training runs, and what must hold after each.

A process trains; while it does, it is killed (-9), or its loader process is, or its shard is removed or cut in half, or
its disk becomes full. Then the last whole step is in the checkpoint, or the process said why not and which checkpoint is
good; with the fault mended, the run goes on and ends as an undisturbed one, to the bit.

A full disk is a tmpfs of a few MiB that is filled; without the right to mount one, a limit of the size of the process's
files.
"""

import contextlib
import io
import os
import random
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import kills
import tiny
import torch
from rich.console import Console
from runs import bits, rows, state_of

from simplclip import train
from simplclip.train import checkpoint

FAULTS = int(os.environ.get("SIMPLCLIP_FAULTS", "5"))  # how many; 30 are the long proof
KINDS = ("kill", "worker", "full", "removed", "truncated")
STEPS = 24
MISSED = "ended before it was met"
CHANGES = ["data.workers=1", f"run.steps={STEPS}", "run.save_every=7", "model.options.vision_cfg.timm_drop=0.2"]


def work(config, out, told, ready):
    """Trains; what it printed, and the error that ended it, go to the file `told`."""
    torch.set_num_threads(1)
    ready.set()
    text = io.StringIO()
    try:
        train.run(tiny.config.load(config, [*CHANGES, f"run.out={out}"]), resume=True, console=Console(file=text, width=500))
    except Exception as error:
        told.write_text(f"{text.getvalue()}\n{type(error).__name__}: {error}")
        os._exit(1)
    told.write_text(text.getvalue())


class Faults:
    """One shard and an undisturbed run; `meet` a fault."""

    def __init__(self, folder, seed=0):
        self.folder, self.random, self.counts, self.missed = folder, random.Random(seed), {}, 0
        self.config = tiny.write_config(folder)
        self.shard = folder / "data" / "train-0.tar"
        self.content = self.shard.read_bytes()
        process = self.start(folder / "whole")
        began = time.monotonic()
        assert self.end(process)[0] == 0
        self.took = time.monotonic() - began
        self.whole = bits(state_of(folder / "whole"))
        self.disk = folder / "disk"
        self.disk.mkdir()
        size = 4 * (folder / "whole" / "last.pt").stat().st_size
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.disk)]
        self.mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
        print(f"a full disk is {'a tmpfs' if self.mounted else 'a limit of file size: no right to mount a tmpfs'}")

    def close(self):
        if self.mounted:
            subprocess.run(["umount", str(self.disk)], check=True)

    def start(self, out):
        self.told = self.folder / "told"
        self.told.unlink(missing_ok=True)
        return kills.start(["simplclip.train", "faults"], work, self.config, out, self.told)

    def end(self, process):
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, self.told.read_text() if self.told.exists() else ""

    def meet(self, kind):
        """Until the run has met the fault: one may come when it has all that it needs."""
        while self.meet_or_miss(kind) == MISSED:
            self.missed += 1
            assert self.missed <= 3 * FAULTS, "faults come too late"

    def meet_or_miss(self, kind):
        out = self.disk / "run" if kind == "full" else self.folder / "run"
        process = self.start(out)
        time.sleep(self.random.random() * self.took)
        mend = getattr(self, kind)(process)
        code, told = self.end(process)
        mend()
        outcome = self.check(kind, out, code, told)
        if outcome != "told":  # of a shard that was cut in half, whose other half was not seen
            assert self.end(self.start(out))[0] == 0, self.told.read_text()
            assert bits(state_of(out)) == self.whole, f"{kind}: it does not end as undisturbed"
            if kind != "full":  # where a row may be what did not fit
                assert rows(out) == rows(self.folder / "whole")
        assert not list(out.glob(".*")), "a torn file was left"
        assert not (out / "run.lock").exists()
        shutil.rmtree(out)
        if outcome != MISSED:
            key = f"{kind}: {outcome}"
            self.counts[key] = self.counts.get(key, 0) + 1
        return outcome

    def check(self, kind, out, code, told):
        """What is there or was said right after the fault."""
        good = checkpoint.load(out)["step"] if (out / "last.pt").exists() else None
        if kind == "kill" and code != 0:
            assert good is None or good % 7 == 0 or good == STEPS
            return "before its end"
        assert kind == "kill" or not list(out.glob(".*")), "a torn file was left"
        if code == 0:
            assert good == STEPS
            return "told" if "torn tar" in told else MISSED
        whole = [int(step) for step in re.findall(r"^step (\d+)/", told, re.MULTILINE)]
        if saved := re.search(r"Saved step (\d+) in|Step (\d+) is saved", told):
            assert good == int(saved[1] or saved[2]) == max(whole), told
            return "saved the last whole step"
        if not whole:
            assert good is None
            assert not (out / "config.yaml").exists(), told
            return "before a first step"
        assert re.search(r"Step \d+ could not be saved: \w+: .+", told), told
        assert f"last.pt of step {good}, is intact" in told if good else "There is no checkpoint" in told, told
        return "said why it could not, and what is good"

    def kill(self, process):
        process.kill()
        return lambda: None

    def worker(self, process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in children.read_text().split():
                os.kill(int(child), 9)
        return lambda: None

    def removed(self, process):
        self.shard.unlink()
        return lambda: self.shard.write_bytes(self.content)

    def truncated(self, process):
        os.truncate(self.shard, len(self.content) // 2)
        return lambda: self.shard.write_bytes(self.content)

    def full(self, process):
        filler = self.disk / "filler"
        if not self.mounted:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
            return lambda: None
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        # Until the end: what the trainer removes of its own must not make room.
        return filler.unlink
