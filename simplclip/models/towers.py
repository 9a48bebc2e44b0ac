"""The two towers of an open_clip model, by the names of its modules and parameters."""

SCALARS = ("logit_scale", "logit_bias")  # parameters of neither tower


def tower_of(name: str) -> str:
    """Returns "image" or "text", or "" for the model itself and for one of `SCALARS`."""
    if name in ("", *SCALARS):
        return ""
    return "image" if name.partition(".")[0] == "visual" else "text"
