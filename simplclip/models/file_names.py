"""Names of the files in the folder of a run and of an export."""

# a run: the weights of its best evaluation, and of its last step
BEST, LAST = "best.pt", "last.pt"
# with LoRA, the weights that both lack, since they do not change
BASE = "base.pt"
EXPORT, EXPORTED_WEIGHTS, CARD = "export.json", "open_clip_model.safetensors", "README.md"
