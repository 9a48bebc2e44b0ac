"""What the captions of some samples are like, in lines for a user.

A mistake in the data, such as captions that are names of folders, shows there before it is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from simplclip.common.errors import visible

# images for each different caption above which captions are few
FEW = 10


@dataclass
class SomeCaptions:
    """Captions of some samples, in their order."""

    names: list[str] = field(default_factory=list)  # of the samples
    captions: list[list[str]] = field(default_factory=list)
    # names of what the images show: images of one are not each other's negatives
    things: list[str] = field(default_factory=list)

    def add(self, name: str, captions: list[str], group: str | None) -> None:
        """Adds a sample: its name, its captions, and its json's group."""
        self.names.append(name)
        self.captions.append(captions)
        self.things.append(f"image {name}" if group is None else f"group {group}")

    @property
    def all(self) -> list[str]:
        """All captions of all samples."""
        return [caption for captions in self.captions for caption in captions]

    def examples(self, count: int = 3) -> Iterator[str]:
        """Yields "NAME: CAPTION | ..." of up to `count` samples, from the first to the last."""
        for index in spread(len(self.names), count):
            text = " | ".join(self.captions[index])
            if len(text) > 90:
                text = f"{text[:90]}..."
            yield visible(f"{self.names[index]}: {text}")

    def counts(self) -> str:
        """Returns how many images were looked at, and how many different captions they have."""
        different, images = len({*self.all}), len(self.names)
        return f"{images:,} images looked at have {different:,} different captions"

    def warning(self) -> str | None:
        """Returns what is wrong if the captions are few, see FEW; else None.

        Images of one group, such as a class, may have one caption, unless all images have it.
        """
        different, things = len({*self.all}), len({*self.things})
        if different == 1 and len(self.names) > 1:
            return f"all images looked at have the caption {self.all[0][:90]!r}"
        if different * FEW >= things:
            return None
        return (
            f"{things / different:.0f} images for each different caption: images with one caption "
            "are each other's negatives, unless their json has one `group`"
        )


def spread(count: int, most: int) -> list[int]:
    """Returns up to `most` indices below `count`, at even distances from the first to the last."""
    most = min(count, most)
    return [index * (count - 1) // max(1, most - 1) for index in range(most)]
