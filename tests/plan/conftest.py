import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Sets one thread: oneDNN's memory grows with the threads, and is stated for one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
