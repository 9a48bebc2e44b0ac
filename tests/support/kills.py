"""kill -9 of a process at random moments, and what must hold after it."""

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import time

KILLS = int(os.environ.get("SIMPLCLIP_TEST_KILLS", "2"))  # number of kills in a test; the long proof has 6


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def start(preload, target, *args):
    """Runs `target(*args, ready)` in a process of its own, which has `preload` imported; returns when `ready` is set."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    ready = context.Event()
    process = context.Process(target=target, args=(*args, ready))
    process.start()
    assert ready.wait(120)
    return process


def finish(process):
    process.join()
    return process.exitcode


def check(preload, target, folder, check_whole, content=digests):
    """Runs `target(out, ready)` undisturbed, then in other folders with kills. Each run must end as the undisturbed run did.

    check_whole(out): checks after each kill that visible files are whole. content(out): has to be equal in the end.
    """
    whole = start(preload, target, folder / "whole")
    began = time.monotonic()
    assert finish(whole) == 0
    took = time.monotonic() - began
    draw = random.Random(0)
    for number in range(-(-KILLS // 2)):
        out, left = folder / f"killed-{number}", took
        for _ in range(2):
            while True:
                process = start(preload, target, out)
                moment = draw.random() * left
                time.sleep(moment)
                process.kill()
                if finish(process) == -signal.SIGKILL:
                    break
                left *= 0.7  # the process ended before the kill: start again, with an earlier kill
                shutil.rmtree(out)
            left -= moment
            check_whole(out)
        assert finish(start(preload, target, out)) == 0
        assert content(out) == content(folder / "whole")
