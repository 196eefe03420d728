"""The folders beside the package: conf/, recipes/ and launch/, in a checkout or installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def project_folder(name: str) -> Path:
    """The folder `name`: inside the package if it is installed, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


CONF = project_folder("conf")


def script_of(command: str) -> Path:
    """The script of a recipe, or of `launch`, `sweep` and `reproduce`."""
    return project_folder("launch" if command in ("launch", "sweep", "reproduce") else "recipes") / f"{command}.py"
