"""Names of the files in the folder of a run and of an export."""

from typing import Literal

# a run: the weights of its best evaluation, and of its last step
BEST, LAST = "best.pt", "last.pt"
# with LoRA, the weights that both lack, since they do not change
BASE = "base.pt"
EXPORT, EXPORTED_WEIGHTS, CARD = "export.json", "open_clip_model.safetensors", "README.md"
# an export's form -> its weights, and the file that is written last: with it the export is whole
Form = Literal["open_clip", "transformers"]
FORMS: dict[Form, tuple[str, str]] = {
    "open_clip": (EXPORTED_WEIGHTS, EXPORT),
    "transformers": ("model.safetensors", "config.json"),
}
