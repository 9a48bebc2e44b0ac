"""open_clip's own trainer with this library's losses: `simplclip-open-clip ARGS`, or, for torchrun,
`python -m simplclip.integrations.open_clip_train ARGS`.

ARGS are all arguments of `python -m open_clip_train.main`, and those of `parser()` below, whose defaults give the values of
open_clip's losses. ClipPMLoss replaces ClipLoss, WIKDLoss DistillClipLoss, and SigLipLoss and CoCaLoss their namesakes.
While `main` runs, the names `create_loss` (open_clip 3.3) or `create_task` (open_clip 4) and `train_one_epoch` in the module
open_clip_train.main are replaced; no file is changed. --model takes the models of `register_models`, too.

Learned parameters of a loss (the plane of pair matching, projections to a teacher's width) do not belong to the model, see
`LossParameters`.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from simplclip import losses
from simplclip.common.errors import InputError, UserError
from simplclip.common.files import replacing
from simplclip.integrations.open_clip import register_models
from simplclip.losses.wikd import INTERACTIVE
from simplclip.models.crop import crop_texts

# Not .pt, since open_clip resumes from the last file with that suffix.
SUFFIX = ".loss"
DISTILLATION = ("relational_weight", "interactive_weight", "interactive", "feature_weight")


def parser() -> argparse.ArgumentParser:
    """The parser of the options that are added to open_clip's."""
    ours = argparse.ArgumentParser(
        prog="simplclip-open-clip", add_help=False, allow_abbrev=False, usage="%(prog)s [options]",
        description="open_clip's trainer with simplclip's losses. Options beside open_clip's own, which follow:",
    )  # fmt: skip
    matching = ours.add_argument_group("pair matching, beside any loss but that of CoCa models")
    matching.add_argument("--pm-weight", type=_weight, default=0.0, help="weight of pair matching (default: 0, none)")
    matching.add_argument("--pm-plane", choices=losses.PLANES, default="scalar", help="its hyperplane (default: scalar)")
    ours.add_argument(
        "--crop-texts", action="store_true",
        help="compute no tokens behind the end of the texts (models whose text tower is causal)",
    )  # fmt: skip
    distillation = ours.add_argument_group("distillation, beside --distill-model and --distill-pretrained")
    for name, default in (("relational", 1.0), ("interactive", 0.0), ("feature", 0.0)):
        distillation.add_argument(
            f"--{name}-weight", type=_weight, default=default, help=f"weight of the {name} term (default: {default:g})"
        )
    what = "form of the interactive term (default: infonce)"
    distillation.add_argument("--interactive", choices=INTERACTIVE, default="infonce", help=what)
    return ours


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a weight of 0 or more, got {text}")
    return value


def command():
    """Runs `main` as a command, which prints an error that the user can fix as one line."""
    try:
        return main()
    except UserError as error:
        if os.environ.get("SIMPLCLIP_DEBUG"):
            raise
        parser().error(str(error))


def main(argv: list[str] | None = None):
    """Runs open_clip_train.main.main with our losses and returns its result. Wrong arguments exit as in argparse."""
    ours = parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        trainer = importlib.import_module("open_clip_train.main")
    except ModuleNotFoundError as error:
        ours.error(f"open_clip's trainer does not load: {error}; pip install 'simplclip[openclip]'")
    if {"-h", "--help"} & set(argv):
        ours.print_help()
        print(flush=True)
        trainer.parse_args(["--help"])
    register_models()
    options, rest = ours.parse_known_args(argv)
    replacements = _replacements(ours, options, trainer)
    args = trainer.parse_args(rest)
    _check(ours, options, args)
    if options.crop_texts:
        create = functools.partial(create_cropped, args, trainer.create_model_and_transforms)
        replacements["create_model_and_transforms"] = create
    with mock.patch.multiple(trainer, **replacements), _shards_of_webdataset_1():
        return trainer.main(rest)


def _replacements(ours: argparse.ArgumentParser, options: argparse.Namespace, trainer) -> dict:
    """This library's functions by name in open_clip_train.main: `create_loss`, or `create_task` for model and loss in one."""
    makers = {"create_task": create_task, "create_loss": create_loss}
    makers = {name: make for name, make in makers.items() if hasattr(trainer, name)}
    if not makers or not hasattr(trainer, "train_one_epoch"):
        ours.error(
            "open_clip_train.main: expected train_one_epoch, and create_loss (open_clip 3.3) or create_task (open_clip 4), "
            "found another trainer; pip install 'open_clip_torch==3.3.*' works"
        )
    found = {name: functools.partial(make, options, getattr(trainer, name)) for name, make in makers.items()}
    return found | {"train_one_epoch": _with_loss_parameters(trainer.train_one_epoch)}


def _shards_of_webdataset_1():
    """Lets open_clip, made for webdataset 0.2.86, read shards by webdataset 1.0, which ends each shard with an empty sample;
    open_clip would raise KeyError: 'fname' on it."""
    data = importlib.import_module("open_clip_train.data")
    expander = getattr(data, "tar_file_expander", None)
    if expander is None or "eof_value" not in inspect.signature(expander).parameters:
        return contextlib.nullcontext()
    return mock.patch.multiple(data, tar_file_expander=functools.partial(expander, eof_value=None))


def _check(ours: argparse.ArgumentParser, options: argparse.Namespace, args: argparse.Namespace) -> None:
    """Raises errors for options that do not go together, or would be ignored silently."""
    distilled = args.distill_model is not None and args.distill_pretrained is not None  # the same test as in open_clip
    refused = {name: "expected a teacher (--distill-model and --distill-pretrained), got none" for name in DISTILLATION}
    if distilled:
        refused = {}
        if args.siglip:
            ours.error("--siglip: expected no --distill-model, since open_clip's distillation takes no logit bias, got both")
    elif "coca" in args.model.lower():
        refused["pm_weight"] = f"expected 0, since CoCa's loss has no pair matching, got --model {args.model}"
    elif args.siglip:
        what = "since --siglip computes pair matching with it in one sweep"
        refused |= {"pm_plane": f"expected scalar, {what}"}
    if options.crop_texts and (args.trace or args.torchscript):
        ours.error("--crop-texts: expected no --trace and no --torchscript, which fix the length of texts")
    for name, why in refused.items():
        if getattr(options, name) != ours.get_default(name):
            ours.error(f"--{name.replace('_', '-')}: {why}")


def create_loss(options: argparse.Namespace, theirs: Callable, args: argparse.Namespace) -> nn.Module:
    """Returns this library's loss in place of the one that `theirs`, open_clip's create_loss, makes."""
    return replacement(options, args, theirs(args))


def create_cropped(args: argparse.Namespace, theirs: Callable, *names, **options) -> tuple:
    """Returns the result of `theirs`, open_clip's create_model_and_transforms, with a model whose texts are cropped."""
    model, *transforms = theirs(*names, **options)
    # Both options need a fixed number of calls and fixed sizes in a step.
    fixed = args.torchcompile or args.ddp_static_graph
    crop_texts(model, **{"multiple": 16, "groups": 1} if fixed else {})
    return model, *transforms


def create_task(options: argparse.Namespace, theirs: Callable, args: argparse.Namespace, **parts) -> nn.Module:
    """Returns the task that `theirs`, open_clip 4's create_task, makes of the model, with this library's loss."""
    task = theirs(args, **parts)
    task.loss = replacement(options, args, getattr(task, "loss", None))
    return task


def replacement(options: argparse.Namespace, args: argparse.Namespace, loss: nn.Module | None) -> nn.Module:
    """Returns this library's loss with the settings of `loss`, open_clip's, on args.device."""
    from open_clip import loss as theirs

    shared = {name: getattr(loss, name, None) for name in ("cache_labels", "rank", "world_size")}
    gather = {name: getattr(loss, name, False) for name in ("local_loss", "gather_with_grad", "use_horovod")}  # 4: no horovod
    matching = {"pm_weight": options.pm_weight}
    plane = {"plane": options.pm_plane, "embed_dim": _width(args.model)}
    if type(loss) is theirs.SigLipLoss:
        kind = OneSweepSigLipLoss if options.pm_weight else losses.SigLipLoss
        ours = kind(**shared, **matching, dist_impl=loss.dist_impl)
    elif type(loss) is theirs.CoCaLoss:
        ours = losses.CoCaLoss(
            loss.caption_loss_weight, loss.clip_loss_weight, loss.caption_loss.ignore_index, **shared, **gather
        )
    elif type(loss) is theirs.ClipLoss:
        ours = losses.ClipPMLoss(**shared, **gather, **matching, **plane)
    elif type(loss) is theirs.DistillClipLoss:
        distillation = {name: getattr(options, name) for name in DISTILLATION}
        width = _width(args.distill_model)
        ours = losses.WIKDLoss(**shared, **gather, **matching, **plane, **distillation, teacher_dim=width)
    else:
        raise InputError(
            f"--model {args.model}: expected open_clip's ClipLoss, SigLipLoss, CoCaLoss or DistillClipLoss, got "
            f"{type(loss).__name__}, which simplclip does not replace: train it with python -m open_clip_train.main"
        )
    return ours.to(args.device)


class OneSweepSigLipLoss(losses.SigLipLoss):
    """SigLipLoss with pair matching for open_clip's trainer, which adds up the terms of the dict.

    Both terms share a sweep, and the first one carries the gradient of the sum.
    """

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        weights = {"sigmoid": 1.0, "pair_matching": self.pm_weight}
        total, terms = self.terms(image_features, text_features, logit_scale, weights=weights, logit_bias=logit_bias)
        if not output_dict:
            return total
        return {"contrastive_loss": terms["sigmoid"] + total - total.detach(), "pair_matching_loss": terms["pair_matching"]}


def _width(model: str) -> int | None:
    """Returns the embedding width in open_clip's configs; None for a model without a config (hf-hub:, local-dir:)."""
    import open_clip

    return (open_clip.get_model_config(model) or {}).get("embed_dim")


def _with_loss_parameters(theirs: Callable) -> Callable:
    """Wraps open_clip's train_one_epoch, to add parameters of the loss to the optimizer and to save them after an epoch."""
    parameters: LossParameters | None = None

    def train_one_epoch(first, *others, **rest):
        nonlocal parameters
        args = others[-1]
        if hasattr(first, "task"):  # open_clip 4: (state, data, args)
            loss, epoch, optimizer = first.task.loss, first.epoch, first.optimizer
        else:  # open_clip 3.3: (model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args)
            _, loss, epoch, optimizer, *_ = others
        if parameters is None and any(True for _ in loss.parameters()):
            parameters = LossParameters(loss, optimizer, args)
            # Here `epoch` is the number of epochs that the checkpoint has completed, 0 for a checkpoint of weights only.
            if args.resume is not None and epoch > 0:
                parameters.load(args.resume, epoch)
            parameters.set_apart()
        theirs(first, *others, **rest)
        completed = epoch + 1
        numbered = args.save_frequency > 0 and completed % args.save_frequency == 0
        if parameters and args.save_logs and (numbered or completed == args.epochs or args.save_most_recent):
            parameters.save(args.checkpoint_path, completed)

    return train_one_epoch


class LossParameters:
    """Learned parameters of a loss as groups of open_clip's optimizer, saved in files beside its unchanged checkpoints.

    The groups follow open_clip's rule: matrices have its weight decay, other parameters none; its schedule sets their
    learning rate. Its gradient clipping covers only the model. The loss itself averages the gradients over the ranks. Hooks
    of this class average them over the backward passes of --accum-freq, each of which is that of the whole loss.

    optimizer.state_dict() does not contain the groups, so that open_clip's trainer can resume from the checkpoint. They are
    saved in `epoch_K.loss` (loaded with weights_only=True): {"epoch", "loss": state dict, "optimizer": state by parameter}.
    """

    def __init__(self, loss: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace):
        for flag, why in (("horovod", "are not averaged over its ranks"), ("fsdp", "are not sharded with the model's")):
            if getattr(args, flag, False):
                raise InputError(f"--{flag}: expected a loss without learned parameters, which {why}")
        self.loss, self.optimizer, self.opt = loss, optimizer, args.opt
        self.groups = len(optimizer.param_groups)  # open_clip's
        self.names: list[str] = []  # of our parameters, in the order of our groups
        rate = optimizer.param_groups[0]["lr"]  # in compiled steps of open_clip 4 a tensor, whose value the schedule sets
        for matrices in (False, True):
            group = {name: p for name, p in loss.named_parameters() if (p.ndim >= 2) == matrices}
            if group:
                options = {"weight_decay": args.wd if matrices else 0.0}
                options |= {"lr": rate.clone()} if isinstance(rate, Tensor) else {}
                optimizer.add_param_group({"params": list(group.values()), **options})
                self.names += group
        for parameter in loss.parameters():
            parameter.register_hook(lambda gradient: gradient / args.accum_freq)
        self.taken: dict[str, dict] = {}

    def _numbers(self, state: dict) -> dict[str, int]:
        """The indices of our parameters in a state dict of the optimizer with all groups."""
        return dict(zip(self.names, (number for group in state["param_groups"][self.groups :] for number in group["params"])))

    def set_apart(self) -> None:
        """Removes our groups from the optimizer's state_dict()."""
        self.optimizer.register_state_dict_post_hook(self._take_out)
        if len(self.optimizer.state_dict()["param_groups"]) != self.groups:
            raise InputError(f"--opt {self.opt}: expected an optimizer whose state dict can be split, or no learned loss")

    def _take_out(self, optimizer: torch.optim.Optimizer, state: dict) -> dict:
        numbers = self._numbers(state)
        self.taken = {name: state["state"][number] for name, number in numbers.items() if number in state["state"]}
        theirs = {number: value for number, value in state["state"].items() if number not in numbers.values()}
        return {**state, "state": theirs, "param_groups": state["param_groups"][: self.groups]}

    def save(self, folder: str, epoch: int) -> None:
        """Writes the file of this epoch atomically, and removes files whose checkpoint is gone."""
        self.optimizer.state_dict()  # fills `taken`
        state = {"epoch": epoch, "loss": self.loss.state_dict(), "optimizer": self.taken}
        path = Path(folder) / f"epoch_{epoch}{SUFFIX}"
        with replacing(path) as file:
            torch.save(state, file)
        for other in Path(folder).glob(f"epoch_*{SUFFIX}"):
            number = re.fullmatch(r"epoch_(\d+)", other.stem)
            # The last file is kept, since open_clip writes this epoch's checkpoint only after this.
            if number and int(number[1]) < epoch - 1 and not other.with_suffix(".pt").exists():
                other.unlink()

    def load(self, checkpoint: str, epoch: int) -> None:
        """Loads the file beside this checkpoint, local or remote as in open_clip."""
        import fsspec

        path = f"{checkpoint.rpartition('/')[0] or '.'}/epoch_{epoch}{SUFFIX}"
        try:
            with fsspec.open(path, "rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"--resume {checkpoint}: expected the learned parameters of the loss in {path}, got no such file; "
                "--pretrained starts from the model's weights alone"
            ) from None
        found = {name: tuple(value.shape) for name, value in state["loss"].items()}
        expected = {name: tuple(value.shape) for name, value in self.loss.state_dict().items()}
        if found != expected:
            raise InputError(f"{path}: expected parameters {expected}, got {found}")
        self.loss.load_state_dict(state["loss"])
        full = self.optimizer.state_dict()
        moments = state["optimizer"]
        full["state"] |= {number: moments[name] for name, number in self._numbers(full).items() if name in moments}
        self.optimizer.load_state_dict(full)
        logging.info(f"=> loaded the parameters of the loss '{path}' (epoch {epoch})")


if __name__ == "__main__":
    sys.exit(command())
