import pytest
import torch
import yaml


@pytest.fixture(autouse=True)
def one_thread():
    """Sets one thread: oneDNN's memory grows with the threads, and is stated for one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The config of a siclip-tiny with one text layer; its shards are nowhere."""
    path = tmp_path_factory.mktemp("run") / "tiny.yaml"
    values = {
        "data": {"train": "nowhere/*.tar", "batch_size": 96},
        "run": {"out": "runs/tiny", "steps": 50},
    }
    path.write_text(yaml.safe_dump(values | {"model": {"options": {"text_cfg": {"layers": 1}}}}))
    return str(path)
