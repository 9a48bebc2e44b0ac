"""Processes for tests that disturb or kill them."""

import multiprocessing


def start(preload, target, *args):
    """Runs `target(*args, ready)` in a process of its own, which has `preload` imported; returns
    when `ready` is set.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    ready = context.Event()
    process = context.Process(target=target, args=(*args, ready))
    process.start()
    assert ready.wait(120)
    return process
