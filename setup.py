"""Put conf/, recipes/ and launch/ into the installed package; all other metadata is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("conf", "recipes", "launch")
DATA = ("jinja", "yaml", "css", "js", "json", "jsonl", "sql", "csv")
setup(
    packages=[*find_packages(include=["csc_train*"]), *(f"csc_train.{folder}" for folder in FOLDERS)],
    package_dir={f"csc_train.{folder}": folder for folder in FOLDERS},
    package_data={
        "csc_train": [f"**/*.{kind}" for kind in DATA],
        "csc_train.conf": ["**/*.yaml"],
        "csc_train.launch": ["**/*"],
    },
)
