"""The embedded demo: a trained text-to-image pipeline, its calibrated bases, ranges and controllers.

`FOLDER` holds them; README.md beside this file is the model card.
"""

from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files(__name__)))
