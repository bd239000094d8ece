"""Real photographs that ship inside the scikit-image and scikit-learn wheels, with captions written by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from conf import UserError
from data_pipelines.prepare.demo_corpora.shards import Sample, encode_image, rng_of

LONGEST_SIDE = 256
MARGIN = 0.06

WHOLE = (0.0, 0.0, 1.0, 1.0)
# package -> folder of its pictures, name to install it by
FOLDERS = {"skimage": ("data", "scikit-image"), "sklearn": ("datasets/images", "scikit-learn")}
# (picture, (left, upper, right, lower) as shares of its sides, captions that are true of that part)
VIEWS = (
    ("skimage/astronaut.png", WHOLE, ("a smiling astronaut in an orange space suit", "an astronaut next to a flag")),
    ("skimage/astronaut.png", (0.28, 0.0, 0.64, 0.36), ("a smiling woman with short hair",)),
    ("skimage/astronaut.png", (0.54, 0.62, 1.0, 1.0), ("a black and white space helmet",)),
    ("skimage/astronaut.png", (0.7, 0.0, 0.95, 0.6), ("a model of a space shuttle",)),
    ("skimage/astronaut.png", (0.0, 0.0, 0.22, 0.5), ("a flag with stars and stripes",)),
    ("skimage/camera.png", WHOLE, ("a man with a camera on a tripod", "a man in a dark coat takes a picture")),
    ("skimage/camera.png", (0.2, 0.08, 0.72, 0.5), ("a man looks into a camera",)),
    ("skimage/camera.png", (0.62, 0.2, 1.0, 0.5), ("a white tower behind a field",)),
    ("skimage/chelsea.png", WHOLE, ("a cat with green eyes", "the face of a cat")),
    ("skimage/chelsea.png", (0.25, 0.15, 0.9, 0.6), ("the green eyes of a cat",)),
    ("skimage/chelsea.png", (0.4, 0.6, 0.8, 0.95), ("the nose of a cat",)),
    ("skimage/coffee.png", WHOLE, ("a cup of coffee on a red saucer", "a cup of coffee on a wooden table")),
    ("skimage/coffee.png", (0.28, 0.02, 0.7, 0.55), ("a cup of coffee",)),
    ("skimage/coffee.png", (0.5, 0.45, 0.75, 0.85), ("a spoon on a red saucer",)),
    ("skimage/coins.png", WHOLE, ("rows of old coins", "many old coins on a dark table")),
    ("skimage/coins.png", (0.0, 0.05, 0.5, 0.45), ("a few old coins",)),
    ("skimage/brick.png", WHOLE, ("a wall of bricks", "rows of grey bricks")),
    ("skimage/grass.png", WHOLE, ("grass seen from above",)),
    ("skimage/gravel.png", WHOLE, ("many small stones", "grey gravel")),
    ("skimage/hubble_deep_field.jpg", WHOLE, ("many galaxies in the dark sky", "galaxies far away")),
    ("skimage/hubble_deep_field.jpg", (0.6, 0.45, 0.95, 0.75), ("galaxies and a bright star",)),
    ("skimage/moon.png", WHOLE, ("the ground of the moon with craters",)),
    ("skimage/moon.png", (0.0, 0.0, 0.4, 0.4), ("a round crater on the moon",)),
    ("skimage/motorcycle_left.png", WHOLE, ("a red motorcycle in a garage", "a red motorcycle seen from the side")),
    ("skimage/motorcycle_left.png", (0.6, 0.3, 0.95, 0.95), ("the front wheel of a red motorcycle",)),
    ("skimage/motorcycle_left.png", (0.0, 0.35, 0.4, 0.95), ("the back wheel of a red motorcycle",)),
    ("skimage/page.png", WHOLE, ("a page of printed text",)),
    ("skimage/retina.jpg", WHOLE, ("the back of an eye with red vessels", "a retina")),
    ("skimage/rocket.jpg", WHOLE, ("a rocket between towers in the evening", "a white rocket before its start")),
    ("skimage/rocket.jpg", (0.35, 0.25, 0.65, 0.9), ("a white rocket under a blue sky",)),
    ("skimage/rocket.jpg", (0.0, 0.0, 0.35, 1.0), ("two steel towers and bright lights",)),
    ("sklearn/china.jpg", WHOLE, ("a red chinese tower above a lake", "a tower with three roofs and a lake")),
    ("sklearn/china.jpg", (0.0, 0.0, 0.45, 0.7), ("the roofs of a chinese tower",)),
    ("sklearn/china.jpg", (0.4, 0.4, 1.0, 1.0), ("trees at a lake",)),
    ("sklearn/flower.jpg", WHOLE, ("an orange flower with green leaves behind it", "an orange dahlia")),
    ("sklearn/flower.jpg", (0.3, 0.2, 0.7, 0.8), ("an orange flower from near by", "the petals of an orange flower")),
)

README = """Photographs for the demo

Crops of pictures that ship inside two Python packages; the captions were written by hand for this demo.

scikit-image (folder skimage/data), as its documentation states:
  astronaut          NASA, public domain
  camera             Lav Varshney, CC0
  chelsea            Stefan van der Walt, CC0
  coffee             Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0
  coins              Brooklyn Museum Collection, no known copyright restrictions
  brick, gravel      CC0Textures, CC0
  grass              DeviantArt (linolafett), CC0
  hubble_deep_field  NASA and HubbleSite, public domain
  motorcycle_left    Middlebury 2014 stereo benchmark (Nesic, Westling, Wang, Kitajima, Krathwohl, Scharstein)
  retina             Mikael Haggstrom, CC0
  rocket             SpaceX, public domain
  moon, page         no licence stated for the single picture; the package is under BSD-3-Clause

scikit-learn (folder sklearn/datasets/images), CC BY 2.0, https://creativecommons.org/licenses/by/2.0/:
  china              by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/
  flower             by vultilion, https://www.flickr.com/photos/vultilion/6056698931/
"""


def samples(count: int, seed: int) -> Iterator[Sample]:
    """``count`` crops, the views in turn, as ``.jpg`` and ``.txt``. Raises UserError if a package is missing."""
    pictures: dict[str, Image.Image] = {}
    for number in range(count):
        rng = rng_of("photos", seed, number)
        name, box, captions = VIEWS[number % len(VIEWS)]
        if name not in pictures:
            pictures[name] = load_photo(name)
        picture = pictures[name]
        margins = [rng.uniform(0, MARGIN) for _ in box]
        left, upper, right, lower = box
        width, height = right - left, lower - upper
        crop = picture.crop(
            (
                round((left + margins[0] * width) * picture.width),
                round((upper + margins[1] * height) * picture.height),
                round((right - margins[2] * width) * picture.width),
                round((lower - margins[3] * height) * picture.height),
            )
        )
        crop.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        caption = rng.choice(captions)
        yield Sample(f"{number:06d}", {"jpg": encode_image(crop), "txt": caption.encode()}, (caption,))


def load_photo(name: str) -> Image.Image:
    """The whole picture "package/file" in RGB. Raises UserError if the package is missing."""
    package, _, file = name.partition("/")
    folder, distribution = FOLDERS[package]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / folder / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"the photograph {file} comes from {distribution}, which lacks it here: pip install {distribution}"
        )
    with Image.open(path) as image:
        return image.convert("RGB")
