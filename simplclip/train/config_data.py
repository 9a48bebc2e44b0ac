"""The part of a run's configuration that says which data is read, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MicroBatch(Section):
    """What each tower encodes at a time; None: the whole batch."""

    image: int | None = Field(None, ge=1)
    text: int | None = Field(None, ge=1)


class Source(Section):
    """Some of the pairs, with their weight; see `simplclip.data.parts_of`."""

    shards: str | list[str]
    weight: float = Field(1.0, gt=0)
    image_key: str | None = None
    caption_key: str | None = None
    separator: str | None = None


_Pattern = Annotated[str, Tag("train-pattern")]
_Source = Annotated[Source, Tag("train-source")]


def _form(value: Any) -> str:
    several = "train-list" if isinstance(value, list) else "train-pattern"
    return "train-source" if isinstance(value, dict | Source) else several


class DataConfig(Section):
    train: Annotated[
        _Pattern | _Source | Annotated[list[Annotated[_Pattern | _Source, Discriminator(_form)]], Tag("train-list")],
        Discriminator(_form),
    ] = Field(
        description="the pairs: tars by path, glob, brace pattern, URL, pipe:COMMAND or list file, a table, or a folder of "
        "images; {shards, weight}: each sample weight times an epoch; or a list of these"
    )
    batch_size: int = Field(256, ge=1, description="images per step")
    micro_batch: Annotated[
        Annotated[Annotated[int, Field(ge=1)] | Literal["auto"] | None, Tag("number")] | Annotated[MicroBatch, Tag("towers")],
        Discriminator(lambda value: "towers" if isinstance(value, dict | MicroBatch) else "number"),
    ] = Field(
        None,
        description="images, with their captions, at a time (gradient caching: the gradient is that of the whole batch); "
        "{image, text}: images and captions at a time, each tower by itself; null: all; auto: as many as fit, see "
        "`simplclip plan`",
    )
    captions_per_image: int = Field(1, ge=1, description="captions drawn for each image in each step; each makes a pair")
    workers: int | None = Field(
        None, ge=0, description="loader processes; 0 reads in the training process; null: as many as there are cores"
    )
    on_error: Literal["skip", "stop"] = Field(
        "skip",
        description="a shard that cannot be read after several tries is skipped and counted, or ends (stop) the run",
    )
    sidecars: list[str] = Field(
        [],
        description="folders of `simplclip teacher` and `simplclip caption`, whose files are joined to the samples",
    )
    cache_prefix: str | None = Field(
        None,
        description="folder for the outputs of the image tower's frozen prefix, one for each view that a teacher saw (or for "
        "each image, with augment none): made once, then read in place of the images; null: computed in each step",
    )
    max_pixels: int | None = Field(
        None, ge=1, description="images of more pixels are skipped and counted before they are decoded; null: Pillow's limit"
    )
    max_bytes: int = Field(
        256 << 20, ge=1, description="samples whose files have more bytes together are skipped and counted, and not read"
    )
    augment: str | dict[str, Any] | None = Field(
        None,
        description="image augmentation: affine, none, or fields of open_clip's AugmentationCfg; null: that of the views "
        "which the teacher saw, else the model's default",
    )
    options: dict[str, Any] = Field({}, description="further keyword arguments for `simplclip.data.make_loader`")

    @property
    def images_at_a_time(self) -> int:
        """Images of a micro-batch; "auto" must have been replaced by a number."""
        micro = self.micro_batch.image if isinstance(self.micro_batch, MicroBatch) else self.micro_batch
        assert micro != "auto"
        return micro or self.batch_size

    @property
    def pairs(self) -> Any:
        """`train` in plain values, as `simplclip.data.parts_of` takes it."""
        return self.model_dump(include={"train"})["train"]
