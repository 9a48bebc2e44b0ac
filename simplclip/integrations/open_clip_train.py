"""open_clip's own trainer with this library's losses.

    simplclip-open-clip ARGS
    torchrun -m simplclip.integrations.open_clip_train ARGS

ARGS are all arguments of `python -m open_clip_train.main`, and those of `parser()` below, whose
defaults give the values of open_clip's losses. ClipPMLoss replaces ClipLoss, WIKDLoss
DistillClipLoss, and SigLipLoss and CoCaLoss their namesakes. While `main` runs, a few names in the
module open_clip_train.main are replaced; no file is changed. --model takes the models of
`register_models`, too.

A loss that learns (the plane of pair matching, projections to a teacher's width) is the submodule
`simplclip_loss` of the model: open_clip's optimizer trains it, DistributedDataParallel keeps it
equal on all ranks, and checkpoints have it.
"""

import argparse
import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor, nn

from simplclip import losses
from simplclip.common.errors import InputError, UserError
from simplclip.common.terms import BY_NAME, TERMS, Term, choices
from simplclip.integrations.open_clip import register_models
from simplclip.models.crop import crop_texts


class Option(NamedTuple):
    """An option of a term, which is the argument of a loss."""

    term: Term
    argument: str
    name: str  # as the attribute of parsed options
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The option as it is written: --pm-weight."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def default_text(self) -> str:
        """The default as texts show it: 0, scalar."""
        return str(self.default).removesuffix(".0")


def _options() -> Iterator[Option]:
    """Yields the options of each term's weight and choice; open_clip has the base's."""
    for term in TERMS:
        if term.is_base:
            continue
        what = term.help.partition(":")[0]
        yield Option(term, term.weight, term.weight, term.default, what)
        if term.choice:
            name, words, about = term.choice.name, term.choice.words, term.choice.help
            prefix = term.weight.removesuffix("_weight")
            option = name if name == prefix else f"{prefix}_{name}"
            yield Option(term, name, option, words[0], about)


OPTIONS = tuple(_options())


def parser() -> argparse.ArgumentParser:
    """Returns a new parser of the options that are added to open_clip's; it parses nothing yet."""
    ours = argparse.ArgumentParser(
        prog="simplclip-open-clip",
        add_help=False,
        allow_abbrev=False,
        usage="%(prog)s [options]",
        description=(
            "open_clip's trainer with simplclip's losses. Options beside open_clip's own, which "
            "follow:"
        ),
    )
    matching = ours.add_argument_group("pair matching, beside any loss but that of CoCa models")
    distillation = ours.add_argument_group(
        "distillation, beside --distill-model and --distill-pretrained"
    )
    for option in OPTIONS:
        group = distillation if option.term.needs_teacher else matching
        group.add_argument(
            option.flag,
            type=_weight if option.argument == option.term.weight else str,
            choices=None if option.argument == option.term.weight else choices(option.argument),
            default=option.default,
            help=f"{option.help} (default: {option.default_text})",
        )
    ours.add_argument(
        "--crop-texts",
        action="store_true",
        help="compute no tokens behind the end of the texts (models whose text tower is causal)",
    )
    return ours


def _weight(text: str) -> float:
    """Returns an option's text as a weight; argparse reports errors."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a weight of 0 or more, got {text}")
    return value


def command() -> Any:
    """Runs `main`; a UserError is one line and status 2, unless SIMPLCLIP_DEBUG is set."""
    try:
        return main()
    except UserError as error:
        if os.environ.get("SIMPLCLIP_DEBUG"):
            raise
        parser().error(str(error))


def main(argv: list[str] | None = None) -> Any:
    """Runs open_clip_train.main.main with our losses and returns its result.

    argv: the options of both, None for those of the command line. Wrong arguments, or another
    version of open_clip, exit as in argparse. `register_models` changes open_clip for the whole
    process; other names are replaced only while the trainer runs.
    """
    ours = parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        import open_clip_train.main as trainer
    except ModuleNotFoundError as error:
        ours.error(f"open_clip's trainer does not load: {error}; pip install 'simplclip[openclip]'")
    if not hasattr(trainer, "create_loss") and not hasattr(trainer, "create_task"):
        ours.error(
            "open_clip_train.main: expected that of open_clip 3.3 or 4, got another: pip install "
            "'open_clip_torch==3.3.*'"
        )
    if {"-h", "--help"} & set(argv):
        ours.print_help()
        print(flush=True)
        trainer.parse_args(["--help"])
    register_models()
    options, rest = ours.parse_known_args(argv)
    args = trainer.parse_args(rest)
    _check(ours, options, args)
    # The trainer gets these very args, in which it notes its rank before it makes the model.
    replacements = _replacements(options, args, trainer)
    replacements["parse_args"] = lambda argv: args
    with mock.patch.multiple(trainer, **replacements), _shards_of_webdataset_1():
        return trainer.main(rest)


def _replacements(
    options: argparse.Namespace, args: argparse.Namespace, trainer: ModuleType
) -> dict[str, Any]:
    """Returns what replaces names of `trainer`, which makes a model, then its loss or task.

    The loss is made before open_clip makes the optimizer, which has to train what it learns.
    """
    create_model = trainer.create_model_and_transforms

    def create_cropped(*arguments: Any, **keywords: Any) -> tuple:
        """Returns what open_clip's create_model_and_transforms does, with --crop-texts."""
        model, *transforms = create_model(*arguments, **keywords)
        if options.crop_texts:
            if args.torchcompile or args.ddp_static_graph:
                # Both need a fixed number of calls and fixed sizes in a step.
                crop_texts(model, multiple=16, groups=1)
            else:
                crop_texts(model)
        return model, *transforms

    if hasattr(trainer, "create_task"):  # open_clip 4
        create_task = trainer.create_task

        def create_task_with_ours(args: argparse.Namespace, model: nn.Module, **others: Any) -> Any:
            """Returns open_clip's task with this library's loss."""
            task = create_task(args, model=model, **others)
            task.loss = replacement(options, args, getattr(task, "loss", None))
            _attach(task.loss, model, args)
            return task

        return {
            "create_model_and_transforms": create_cropped,
            "create_task": create_task_with_ours,
        }

    create_loss = trainer.create_loss
    losses_made: list[nn.Module] = []  # at most one

    def create_with_loss(*arguments: Any, **keywords: Any) -> tuple:
        """Returns what `create_cropped` does; the first call also makes the loss."""
        model, *transforms = create_cropped(*arguments, **keywords)
        if not losses_made:  # the first model is the student, a second one the teacher
            losses_made.append(replacement(options, args, create_loss(args)))
            _attach(losses_made[0], model, args)
        return model, *transforms

    return {
        "create_model_and_transforms": create_with_loss,
        "create_loss": lambda args: losses_made[0],
    }


def _attach(loss: nn.Module, model: nn.Module, args: argparse.Namespace) -> None:
    """Sets a loss that has parameters as the submodule of a model without wrapper and optimizer."""
    learned = list(loss.parameters())
    if not learned:
        return
    if getattr(args, "fsdp", False):
        raise InputError(
            "--fsdp: expected a loss without learned parameters, which are not sharded with the "
            "model's"
        )
    for parameter in learned:
        # Each of the K backward passes of --accum-freq K is that of the whole loss.
        parameter.register_hook(lambda gradient: gradient / args.accum_freq)
    model.simplclip_loss = loss


def _shards_of_webdataset_1() -> contextlib.AbstractContextManager:
    """Returns a context in which open_clip, made for webdataset 0.2.86, reads shards by 1.0."""
    # which ends each shard with an empty sample: open_clip would raise KeyError: 'fname'
    import open_clip_train.data as data

    expander = getattr(data, "tar_file_expander", None)
    if expander is None or "eof_value" not in inspect.signature(expander).parameters:
        return contextlib.nullcontext()
    return mock.patch.multiple(data, tar_file_expander=functools.partial(expander, eof_value=None))


def _check(
    ours: argparse.ArgumentParser, options: argparse.Namespace, args: argparse.Namespace
) -> None:
    """Exits as argparse does for options that do not go together, or would be ignored silently."""
    # the same test as in open_clip
    distilled = args.distill_model is not None and args.distill_pretrained is not None
    if distilled and args.siglip:
        ours.error(
            "--siglip: expected no --distill-model, since open_clip's distillation takes no logit "
            "bias, got both"
        )
    # options of open_clip 3.3
    scripted = getattr(args, "trace", False) or getattr(args, "torchscript", False)
    if options.crop_texts and scripted:
        ours.error(
            "--crop-texts: expected no --trace and no --torchscript, which fix the length of texts"
        )
    for option in OPTIONS:
        term = option.term
        if getattr(options, option.name) == option.default:
            continue
        if term.needs_teacher and not distilled:
            why = "expected a teacher (--distill-model and --distill-pretrained), got none"
        elif term.needs_plane and not distilled and "coca" in args.model.lower():
            why = (
                f"expected {option.default_text}, since CoCa's loss has no pair matching, got "
                f"--model {args.model}"
            )
        elif option.argument == term.weight:
            continue
        elif term.needs_plane and args.siglip:
            why = "expected scalar, since --siglip computes pair matching with it in one sweep"
        elif not getattr(options, term.weight):
            why = f"expected --{term.weight.replace('_', '-')} above 0, got 0"
        else:
            continue
        ours.error(f"{option.flag}: {why}")


def replacement(options: argparse.Namespace, args: argparse.Namespace, loss: Any) -> nn.Module:
    """Returns this library's loss with the settings of `loss`, open_clip's, on args.device.

    Raises InputError for a loss that has no replacement, also None.
    """
    from open_clip import loss as originals

    shared: dict[str, Any] = {
        name: getattr(loss, name, None) for name in ("cache_labels", "rank", "world_size")
    }
    gather: dict[str, Any] = {
        name: getattr(loss, name, False)
        for name in ("local_loss", "gather_with_grad", "use_horovod")
    }
    ours: nn.Module
    given = {
        option.argument: getattr(options, option.name)
        for option in OPTIONS
        if not option.term.needs_teacher or type(loss) is originals.DistillClipLoss
    }
    if type(loss) is originals.SigLipLoss:
        weights = {name: value for name, value in given.items() if name.endswith("_weight")}
        kind = OneSweepSigLipLoss if any(weights.values()) else losses.SigLipLoss
        ours = kind(**shared, **weights, dist_impl=loss.dist_impl)
    elif type(loss) is originals.CoCaLoss:
        ours = losses.CoCaLoss(
            loss.caption_loss_weight,
            loss.clip_loss_weight,
            loss.caption_loss.ignore_index,
            **shared,
            **gather,
        )
    elif type(loss) is originals.ClipLoss:
        ours = losses.ClipPMLoss(**shared, **gather, **given, embed_dim=_width(args.model))
    elif type(loss) is originals.DistillClipLoss:
        widths: dict[str, Any] = {
            "embed_dim": _width(args.model),
            "teacher_dim": _width(args.distill_model),
        }
        ours = losses.WIKDLoss(**shared, **gather, **given, **widths)
    else:
        raise InputError(
            f"--model {args.model}: expected open_clip's ClipLoss, SigLipLoss, CoCaLoss or "
            f"DistillClipLoss, got {type(loss).__name__}, which has no replacement"
        )
    return ours.to(args.device)


class OneSweepSigLipLoss(losses.SigLipLoss):
    """SigLipLoss with pair matching for open_clip's trainer, which adds up the terms of the dict.

    Both terms share a sweep, and the first one carries the gradient of the sum.
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        logit_bias: Tensor | None = None,  # []
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Returns the weighted sum [] of sigmoid and pair matching.

        With output_dict, the weighted terms by open_clip's keys, of which only the first has a
        gradient, that of the sum.
        """
        total, terms = self.terms(
            image_features,
            text_features,
            logit_scale,
            weights=self._weights(),
            logit_bias=logit_bias,
        )
        if not output_dict:
            return total
        terms[self.TERM] = terms[self.TERM] + total - total.detach()
        return {BY_NAME[name].key: value for name, value in terms.items()}


def _width(model: str) -> int | None:
    """Returns the embedding width D of a model as open_clip's config says; None without one."""
    import open_clip

    if ":" not in model:
        model = model.replace("/", "-")  # as create_model takes ViT-B/32
    return (open_clip.get_model_config(model) or {}).get("embed_dim")


if __name__ == "__main__":
    sys.exit(command())
