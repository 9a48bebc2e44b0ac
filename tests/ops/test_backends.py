import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import simplclip
from simplclip.commands.machine import render
from simplclip.common import hardware
from simplclip.ops import backends, registry, similarity_loss, simplified_block
from simplclip.ops import report as reports
from simplclip.selftest.calls import block_call
from support.devices import needs_cpu_kernels
from support.programs import run_python

pytestmark = pytest.mark.long


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FEATURES = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)


def loss(x=FEATURES):
    return similarity_loss(x, x, 10.0)["contrastive"]


def selected(op, dtype=torch.float32, device=CPU, facts=backends.NO_FACTS):
    """Returns the name of the backend that is selected."""
    return backends.select(op, device, dtype, backends.forced_for(op), facts)


def test_forcing_is_scoped_and_named():
    with simplclip.backend("reference"):
        assert selected("similarity_loss") == "reference"
        loss()
        with simplclip.backend(similarity_loss="cpu"):
            assert backends.forced() == "reference,similarity_loss=cpu"
            assert selected("parallel_mlp") == "reference"
            assert selected("similarity_loss") == "cpu"
    assert backends.forced() == ""
    got_gpu = "backend: expected one of cuda, triton, cpu, sdpa, xformers, reference, got 'gpu'"
    with pytest.raises(ValueError, match=got_gpu), simplclip.backend("gpu"):
        pass
    with pytest.raises(TypeError, match="mlp"), simplclip.backend(mlp="reference"):
        pass
    with simplclip.backend(**dict.fromkeys(backends.TABLE, "reference")):
        assert {backends.forced_for(op) for op in backends.TABLE} == {"reference"}


def test_every_backend_has_every_function_of_its_op():
    for op in registry.OPS.values():
        for backend in backends.TABLE.get(op.public, {}).values():
            assert callable(getattr(importlib.import_module(backend.module), op.name)), backend
    for rows in backends.TABLE.values():
        assert [name for name in backends.NAMES if name in rows] == [*rows]


def test_the_page_lists_every_backend():
    page = (Path(__file__).parents[2] / "docs/architecture.md").read_text()
    table = page.partition("| backend |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == [*backends.NAMES]


def test_a_backend_forced_for_all_ops_spares_parts_that_lack_it():
    block = block_call()
    names = {"reference": "reference,reference", "sdpa": "sdpa,", "cpu": "cpu,cpu"}
    for name, parts in names.items():
        with simplclip.backend(name):
            assert backends.forced_for("simplified_block") == parts
    registry.forget_calls()
    with simplclip.backend("sdpa"):
        simplified_block(**block.arguments(block.typed(torch.float32)))
    ran = {"parallel_mlp": [selected("parallel_mlp")], "shaped_attention": ["sdpa"]}
    assert registry.backends_of_calls(CPU) == ran
    message = "backend 'cuda' was forced but cannot serve shaped_attention"
    with simplclip.backend(shaped_attention="cuda"), pytest.raises(RuntimeError, match=message):
        simplified_block(**block.arguments(block.typed(torch.float32)))


@pytest.mark.parametrize(
    ("name", "features"), [("cuda", FEATURES), ("triton", FEATURES), ("cpu", FEATURES.double())]
)
def test_a_forced_backend_never_falls_back(name, features):
    message = f"backend '{name}' was forced but cannot serve similarity_loss"
    with simplclip.backend(name), pytest.raises(RuntimeError, match=message):
        loss(features)


@needs_cpu_kernels
def test_backward_keeps_the_backend_of_forward():
    registry.forget_calls()
    x = FEATURES.clone().requires_grad_()
    with simplclip.backend("cpu"):
        forced = loss(x)
    free = loss(x)
    with simplclip.backend("reference"):
        forced.backward()
        free.backward()
    assert registry.backends_of_calls(CPU) == {"similarity_loss": ["cpu"]}


OF_THE_ENVIRONMENT = """
import sys, simplclip
heavy = ("torch", "triton", "open_clip", "timm")
print("load" in dir(simplclip), [m for m in heavy if m in sys.modules])
import importlib.util, simplclip.ops, torch
if importlib.util.find_spec("triton"):
    import simplclip.kernels.similarity.launch
print(torch.cuda.is_initialized(), "open_clip" in sys.modules)
from simplclip.ops import backends, similarity_loss
calls = [lambda: similarity_loss(torch.eye(3), torch.eye(3), 1.0)]
for call in calls + ([backends.extension.cpu_isa] if backends.extension else []):
    try:
        call()
    except Exception as error:
        print(error)
"""


UNKNOWN = """
import torch
from simplclip.ops import similarity_loss
try:
    similarity_loss(torch.eye(3), torch.eye(3), 1.0)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_process_imports_what_it_needs_and_names_what_its_environment_forces():
    """No torch before a submodule is named, and then no GPU context and no open_clip."""
    forced = {"SIMPLCLIP_BACKEND": "triton", "SIMPLCLIP_CPU_ISA": "mmx"}
    first, then, *errors = run_python(OF_THE_ENVIRONMENT, **forced).stdout.splitlines()
    assert (first, then) == ("True []", "False False")
    assert "backend 'triton' was forced but cannot serve similarity_loss" in errors[0]
    if backends.extension:
        assert re.match("SIMPLCLIP_CPU_ISA: expected one of .* got 'mmx'", errors[1])
    # the value of SIMPLCLIP_BACKEND is read once
    got = {"fastest": "one of cuda, .*, reference", "mlp=reference": "an op among .*parallel_mlp.*"}
    for text, expected in got.items():
        value = text.split("=")[0]
        (line,) = [*run_python(UNKNOWN, SIMPLCLIP_BACKEND=text).stdout.splitlines()]
        assert re.fullmatch(f"backend: expected {expected}, got '{value}'", line)


WITHOUT_EXTENSION = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("simplclip._C"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
sys.modules["triton"] = None
import torch, simplclip
x = torch.eye(4)
print(float(simplclip.ops.similarity_loss(x, x, 5.0)["contrastive"]))
entry = simplclip.report()["ops"]["similarity_loss_fwd"]["cpu"]
print(entry["backend"], "|", entry["others"]["cpu"])
"""


@pytest.mark.slow
def test_without_extension_and_triton_the_reference_serves():
    value, serves = run_python(WITHOUT_EXTENSION).stdout.splitlines()
    x = torch.eye(4)
    assert float(value) == pytest.approx(float(similarity_loss(x, x, 5.0)["contrastive"]), rel=1e-5)
    assert serves == "reference | simplclip._C was not built"


def test_report_is_json_and_names_a_backend_for_every_op():
    report = simplclip.report()
    assert json.loads(json.dumps(report)) == report
    served = {name: op for name, op in registry.OPS.items() if op.public in backends.TABLE}
    assert {name.removesuffix(", long") for name in report["ops"]} == set(served)
    assert report["ops"]["shaped_attention_fwd, long"]["cuda"]["backend"] == "sdpa"
    for name, devices in report["ops"].items():
        for entry in devices.values():
            op = served[name.removesuffix(", long")].public
            assert entry["backend"] in backends.TABLE[op]
            assert all(entry["others"].values())
            assert set(entry["others"]) == set(backends.NAMES) - {entry["backend"]}
    text = render(report, why=True)
    assert all(f"{op}, {device}: " in text for op in report["ops"] for device in ("cpu", "cuda"))
    few = render(report)
    assert not any(op in few for op in report["ops"])
    assert re.search(r"^CPU tensors +\d+ ops by \w+, in b?float\d+, as in training$", few, re.M)


@pytest.mark.parametrize(
    ("capability", "dtype"), [(None, "bfloat16"), ((8, 6), "bfloat16"), ((7, 5), "float32")]
)
def test_report_has_the_dtype_of_training(monkeypatch, capability, dtype):
    """On a GPU bfloat16 if it has it, and without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(reports, "gpu", lambda: {"available": False, "reason": "none"})
    native = capability is not None and capability >= (8, 0)
    monkeypatch.setattr(hardware, "native_bf16", lambda device: native)
    machine = reports.report()
    assert {devices["cuda"]["dtype"] for devices in machine["ops"].values()} == {dtype}
    assert f"in {dtype}, as in training" in render(machine)
    expected = "bfloat16" if native else "float32"
    assert {devices["cpu"]["dtype"] for devices in machine["ops"].values()} == {expected}


@pytest.mark.skipif(backends.cuda_extension is None, reason=str(backends.cuda_extension_error))
def test_the_cuda_kernels_of_attention_name_what_they_do_not_serve(monkeypatch):
    def why_not(dtype=torch.bfloat16, device=CUDA, **call):
        facts = backends.Facts(**call)
        return backends.why_not("shaped_attention", "cuda", device, dtype, facts) or ""

    monkeypatch.setattr(backends, "capability", lambda device: (8, 6))
    widths = "serves heads of width 16, 32, ... or 128; got 77 tokens, width 40"
    assert why_not(length=80, width=128) == ""
    assert why_not(length=81, width=64) == "serves 1 to 80 tokens; got 81 tokens, width 64"
    assert why_not(length=77, width=40) == widths
    assert why_not(device=CPU) == "serves cuda tensors, not cpu"
    assert "float64 is for the reference" in why_not(torch.float64)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert "only through TF32" in why_not(torch.float32)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert why_not(torch.float32, length=80, width=64) == ""
        memory = "that fit in shared memory; got 80 tokens, width 128"
        assert memory in why_not(torch.float32, length=80, width=128)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_device_without_code_gets_the_next_backend(monkeypatch):
    extension = SimpleNamespace(
        architectures=lambda: "8.6", shaped_attention_why_not=lambda *_: None
    )
    monkeypatch.setattr(backends, "cuda_extension", extension)
    monkeypatch.setattr(backends, "capability", lambda device: ((9, 0), (8, 9))[device.index])
    facts = backends.Facts(length=77, width=64)
    for index in (0, 1):
        device = torch.device("cuda", index)
        name = selected("shaped_attention", torch.bfloat16, device=device, facts=facts)
        assert (name == "cuda") == (index == 1)
    device = torch.device("cuda", 0)
    reason = backends.why_not("shaped_attention", "cuda", device, torch.bfloat16)
    assert reason == (
        "was built for 8.6, the device has compute capability 9.0: rebuild with "
        "TORCH_CUDA_ARCH_LIST=9.0"
    )


@pytest.mark.parametrize(
    ("built", "card", "runs"),
    [
        ("8.6", (8, 6), True),
        ("8.6", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0;8.6", (9, 0), False),
        ("8.6+PTX", (12, 0), True),
        ("12.0+PTX", (9, 0), False),
        ("8.0;8.6;8.9;9.0;12.0+PTX", (10, 0), False),
    ],
)
def test_machine_code_runs_on_later_minor_versions_and_ptx_on_all_later_cards(built, card, runs):
    assert backends.has_code(built, card) == runs


@pytest.mark.parametrize(
    ("capability", "serves"),
    [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), False), ((12, 0), True)],
)
def test_triton_asks_for_a_capability_that_the_kernels_were_compiled_for(
    capability, serves, monkeypatch
):
    monkeypatch.setattr(backends, "capability", lambda device: capability)
    monkeypatch.setattr(backends, "installed", lambda package: True)
    name = selected("similarity_loss", torch.bfloat16, device=CUDA)
    assert name == ("triton" if serves else "reference")
