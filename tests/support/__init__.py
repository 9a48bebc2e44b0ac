"""What tests share, by subject. tests/ is on the path: `from support.train import tiny`.

Calls of ops (similarity_call, ...) and the tolerance rule are in simplclip/selftest/, for
users' machines and for tests. A test imports no other test.

paths                where the repository is, and what other processes need on their path
devices              backends, dtypes, marks for what a machine lacks
programs             runs commands, scripts of examples/ and blocks of docs/; kills processes
losses               inputs of loss modules, losses of rows
evaluation           indices of held-out data with chosen features
ops/calls            calls of more tiles than selftest's; a record of the calls that others make
ops/small_calls      a small call of each op and loss module
ops/random_calls     calls of random shapes, dtypes, layouts and options, each made from its number
ops/plain            the definition of each op in plain torch
ops/compare          compares a call's results and gradients with the definition, by selftest's rule
ops/layouts          views in other memory layouts
ops/torch_attention  stand-ins for torch's attention functions on a GPU
kernels/calls        calls that the Triton kernels serve
kernels/launched     what the launchers start on a card
kernels/recorder     all that a call starts on a card that need not be there
kernels/launches     what each launch of a Triton kernel must write
kernels/mutants      kernels with one wrong instruction
kernels/few_lines    runs a few lines of PTX
kernels/cuda_attention the CUDA C++ kernels as a backend on a CPU
data/pairs           shards of small pictures and captions, and loaders of them
data/packs           tables and pictures to pack, and what packing makes of them
data/photos          pictures that compress like photographs
data/archives        damaged and hostile tars, their headers by hand
train/tiny           a tiny training: shards, teacher's features, config
train/runs           runs a training, and compares what runs leave
models/              tiny models of open_clip and transformers, published layouts, random weights
ranks/launch         runs a script on several ranks; the other files are such scripts
package/             programs of the Makefile: the sanitized kernels, a wheel in a new environment
"""
