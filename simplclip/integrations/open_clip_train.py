"""open_clip's own trainer with this library's losses and models.

    simplclip-open-clip ARGS
    torchrun -m simplclip.integrations.open_clip_train ARGS

ARGS are those of `python -m open_clip_train.main`, and --crop-texts. The trainer runs under
`use_losses`, after `register_models`.
"""

import argparse
import contextlib
import functools
import inspect
import sys
from typing import Any
from unittest import mock

from simplclip.common.errors import UserError
from simplclip.integrations.open_clip import register_models, use_losses
from simplclip.models.crop import crop_texts


def main(argv: list[str] | None = None) -> Any:
    """Runs open_clip_train.main.main with our losses and returns its result.

    argv: None for the arguments of the command line. A missing package, and a text tower that
    cannot be cropped, exit as a wrong argument does. `register_models` changes open_clip for the
    whole process, other names are replaced only while the trainer runs.
    """
    ours = argparse.ArgumentParser("simplclip-open-clip", add_help=False, allow_abbrev=False)
    ours.add_argument("--crop-texts", action="store_true")
    try:
        import open_clip_train.main as trainer
    except ModuleNotFoundError as error:
        ours.error(f"{error}, which open_clip's trainer needs: pip install 'simplclip[openclip]'")
    options, rest = ours.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print("--crop-texts  compute no tokens behind the end of texts. open_clip's options:\n")
    register_models()
    args = trainer.parse_args(rest)
    # torch.compile and a static graph need a fixed number of calls and few sizes in a step
    fixed = args.torchcompile or args.ddp_static_graph
    sizes = {"multiple": 16, "groups": 1} if fixed else {}
    create_model = trainer.create_model_and_transforms

    def create_cropped(*arguments: Any, **keywords: Any) -> tuple:
        """Returns what open_clip's function does, a model that crops texts first."""
        model, *transforms = create_model(*arguments, **keywords)
        crop_texts(model, **sizes)
        return model, *transforms

    with contextlib.ExitStack() as stack:
        stack.enter_context(use_losses())
        stack.enter_context(shards_of_webdataset_1())
        if options.crop_texts:
            stack.enter_context(
                mock.patch.object(trainer, "create_model_and_transforms", create_cropped)
            )
        try:
            return trainer.main(rest)
        except UserError as error:
            ours.error(str(error))


def shards_of_webdataset_1() -> contextlib.AbstractContextManager:
    """Returns a context in which open_clip, made for webdataset 0.2.86, reads shards by 1.0."""
    # which ends each shard with an empty sample: open_clip would raise KeyError: 'fname'
    import open_clip_train.data as data

    expander = getattr(data, "tar_file_expander", None)
    if expander is None or "eof_value" not in inspect.signature(expander).parameters:
        return contextlib.nullcontext()
    return mock.patch.object(data, "tar_file_expander", functools.partial(expander, eof_value=None))


if __name__ == "__main__":
    sys.exit(main())
