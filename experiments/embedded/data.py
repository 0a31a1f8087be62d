"""Emoji from npm packages: download, join by code point, render to RGBA sprites.

Noto (Apache-2.0) and Fluent (MIT) train the model and its reward. Twemoji and EmojiOne 2 (both CC BY 4.0) make the
judge's prototypes and nothing else. OpenMoji is left out, as its licence (CC BY-SA) would bind what is shipped.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from speedrl.system.files import write_atomically

EMBEDDED = Path(__file__).parents[2] / "speedrl/models/embedded"
PACKAGES = {
    "emojibase-data": "17.0.0",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
}
TRAIN_VENDORS = ("noto", "fluent-emoji-flat")
JUDGE_VENDORS = ("twemoji", "emojione")
SPRITE = 128  # pixels; larger than any size that a composition asks for

# Things with a shape of their own. Left out: near twins (clock faces, moon phases, "dog face" beside "dog"),
# scenes that fill their frame, and things that differ by a detail under 4 pixels.
SUBGROUPS = (  # noqa: SIM905
    "animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug plant-flower plant-other "
    "food-fruit food-vegetable food-prepared food-asian food-sweet drink transport-water transport-air"
).split()
LEFT_OUT = {
    "monkey", "guide dog", "service dog", "wolf", "black cat", "tiger", "horse", "ox", "water buffalo", "cow", "pig",
    "pig nose", "camel", "mouse", "rat", "rabbit", "badger", "boar", "ewe", "goat", "moose", "chipmunk", "donkey",
    "hatching chick", "front-facing baby chick", "black bird", "goose", "wing", "phoenix", "dragon", "orca", "oyster",
    "whale", "cricket", "cockroach", "beetle", "fly", "mosquito", "microbe", "worm", "spider web", "rosette",
    "wilted flower", "white flower", "leaf fluttering in wind", "empty nest", "leafless tree", "sheaf of rice",
    "fallen leaf", "shamrock", "lime", "brown mushroom", "root vegetable", "beans", "tamale", "flatbread", "fondue",
    "stuffed flatbread", "shallow pan of food", "bowl with spoon", "canned food", "salt", "cooked rice", "oden",
    "curry rice", "fried shrimp", "moon cake", "bento box", "roasted sweet potato", "custard", "pouring liquid",
    "teacup without handle", "clinking glasses", "clinking beer mugs", "mate", "ship", "ferry", "airplane departure",
    "airplane arrival", "small airplane", "suspension railway", "mountain cableway", "aerial tramway", "seat",
    "motor boat", "falafel", "butter", "ginger root", "beverage box", "bison", "blossom", "burrito", "cat face",
    "cooking", "coral", "cut of meat", "dango", "dog face", "dodo", "fish cake with swirl", "fortune cookie",
    "green salad", "hamster", "herb", "hyacinth", "ice", "lizard", "mammoth", "nest with eggs", "orangutan", "otter",
    "pie", "poodle", "pot of food", "rice ball", "rice cracker", "ring buoy", "sake", "seedling", "shaved ice",
    "shortcake", "skunk", "spaghetti", "squid", "takeout box", "tropical drink", "tumbler glass", "turkey", "chestnut",
    "steaming bowl", "bug",
}
ALSO = {
    "locomotive", "bullet train", "bus", "ambulance", "fire engine", "police car", "taxi", "automobile",
    "delivery truck", "tractor", "racing car", "motor scooter", "bicycle", "skateboard", 
    "wheel", "horizontal traffic light", "luggage", "watch", "alarm clock",
    "hourglass done", "crescent moon", "sun", "star", "cloud", "rainbow", "umbrella", "snowflake", "snowman", "fire",
    "droplet", "high voltage", "ringed planet", "jack-o-lantern", "Christmas tree", "balloon", 
    "wrapped gift", "ribbon", "trophy", "soccer ball", "basketball", "baseball", "tennis", "bowling", "volleyball",
    "american football", "bullseye", "kite", "pool 8 ball", 
    "teddy bear", "heart suit", "spade suit", "artist palette", "glasses", "sunglasses", "necktie", "t-shirt",
    "jeans", "gloves", "socks", "dress", "handbag", "backpack", "running shoe", "high-heeled shoe", "crown",
    "top hat", "graduation cap", "ring", "gem stone", "megaphone", "bell", "musical note", "microphone",
    "headphone", "radio", "saxophone", "trumpet", "accordion", "guitar", "violin", "drum", "mobile phone", "telephone",
    "battery", "laptop", "optical disk", "television", "camera",
    "movie camera", "magnifying glass tilted left", "candle", "light bulb", "closed book", 
    "coin", "money bag", "credit card", "envelope", "pencil", "paintbrush", "crayon", "briefcase",
    "calendar", "pushpin", "scissors", "locked", "key", "hammer", "axe",
    "bomb", "shield", "wrench", "screwdriver", "gear", "magnet", "ladder", "microscope", "telescope",
    "door", "chair", "toilet", "bathtub", "broom", "bucket", 
    "toothbrush", "fire extinguisher", "shopping cart", "house", "castle", "tent", "anchor", "volcano",
}
RENAME = {
    "sun with face": "sun", "hourglass done": "hourglass", "horizontal traffic light": "traffic light",
    "heart suit": "heart", "spade suit": "spade", "high voltage": "lightning bolt", "locked": "padlock",
    "magnifying glass tilted left": "magnifying glass", "closed book": "book", "tennis": "tennis ball",
    "soft ice cream": "soft serve", "hot beverage": "coffee", "spouting whale": "whale", "lady beetle": "ladybug",
    "honeybee": "bee", "pool 8 ball": "eight ball", "bottle with popping cork": "champagne bottle", "gem stone": "gem",
    "christmas tree": "christmas tree", "two-hump camel": "camel", "ear of corn": "corn", "baguette bread": "baguette",
    "cup with straw": "soda cup", "horse face": "horse",
    "cow face": "cow", "pig face": "pig", "mouse face": "mouse", "rabbit face": "rabbit",
    "tiger face": "tiger", "monkey face": "monkey", "dragon face": "dragon", "poultry leg": "chicken leg",
    "optical disk": "disc", "leafy green": "lettuce", "automobile": "car",
}


def fetch(folder: Path) -> None:
    """Downloads and unpacks every package of PACKAGES into ``folder/NAME`` (kept when already there)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in track(PACKAGES.items(), "packages"):
        target = folder / name.split("/")[-1]
        if target.exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", f"{name}@{version}", "--silent"], cwd=folder, check=True, stdout=subprocess.PIPE
        )
        archive = folder / packed.stdout.decode("utf-8").split()[-1]
        partial = folder / (target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        (partial / "package").rename(target)
        shutil.rmtree(partial)
        archive.unlink()


def codepoints(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def held_out(names: list[str]) -> set[str]:
    """The sixth of the concepts with the smallest hash: known to the base, in no RL prompt and no tuning."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[: round(len(names) / 6)])


def concepts(folder: Path) -> list[dict]:
    """Concepts that every vendor has drawn: name, tags, and a key per vendor."""
    meta = json.loads((folder / "emojibase-data/meta/groups.json").read_text(encoding="utf-8"))["subgroups"]
    vendors = (*TRAIN_VENDORS, *JUDGE_VENDORS)
    icons = {v: json.loads((folder / v / "icons.json").read_text(encoding="utf-8"))["icons"] for v in vendors}
    chars = {}
    for vendor in icons:
        path = folder / vendor / "chars.json"
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        chars[vendor] = {codepoints(code): name for code, name in table.items()}
    found = {}
    for entry in json.loads((folder / "emojibase-data/en/data.json").read_text(encoding="utf-8")):
        label = entry["label"]
        wanted = meta.get(str(entry.get("subgroup"))) in SUBGROUPS and label not in LEFT_OUT
        if not (wanted or label in ALSO):
            continue
        code = codepoints(entry["hexcode"])
        keys = {}
        for vendor in icons:
            by_slug = slug(label) if slug(label) in icons[vendor] else None
            keys[vendor] = chars[vendor].get(code, by_slug)
        if not all(keys.values()):
            continue
        name = label.lower().replace("’", "'")
        name = RENAME.get(name, name)
        found.setdefault(name, {"name": name, "tags": entry.get("tags", []), "keys": keys})
    return sorted(found.values(), key=lambda c: c["name"])


def render(table: dict, key: str) -> np.ndarray:
    """One icon of an iconify table as uint8 RGBA [SPRITE, SPRITE, 4], cropped to what is drawn and centred."""
    import resvg_py

    icon = table["icons"][key]
    width, height = icon.get("width", table.get("width", 16)), icon.get("height", table.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {names} viewBox="{box}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    bounds = image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    image = image.crop(bounds)
    scale = SPRITE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SPRITE, SPRITE))
    canvas.paste(image, ((SPRITE - size[0]) // 2, (SPRITE - size[1]) // 2))
    return np.asarray(canvas)


def sprites(folder: Path, vendors: tuple[str, ...], out: Path) -> tuple[list[dict], np.ndarray]:
    """(concepts, their designs, uint8 [concepts, vendors, SPRITE, SPRITE, 4]), kept in the file `out`."""
    if out.exists():  # enough without the packages, and small enough to carry to another machine
        with np.load(out) as kept:
            return json.loads(str(kept["concepts"])), kept["sprites"]
    listed = concepts(folder)
    icons = {v: json.loads((folder / v / "icons.json").read_text(encoding="utf-8")) for v in vendors}
    table = np.zeros((len(listed), len(vendors), SPRITE, SPRITE, 4), np.uint8)
    for i, concept in enumerate(track(listed, f"sprites: {', '.join(vendors)}")):
        for j, vendor in enumerate(vendors):
            table[i, j] = render(icons[vendor], concept["keys"][vendor])

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez_compressed(file, sprites=table, concepts=json.dumps(listed))

    write_atomically(out, write)
    return listed, table
