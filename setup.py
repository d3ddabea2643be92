"""Packaging as nbdev 2 does it: every field is read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=["dsft", "dsft.*"]),
    include_package_data=True,
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "bench", "docs", "lab")},
    entry_points={
        "console_scripts": settings.get("console_scripts", "").split(),
        "nbdev": [f"{settings['lib_name']}=dsft._modidx:d"],
    },
    zip_safe=False,
)
