from pathlib import Path

from setuptools import setup

setup(
    name="vision-paper-references",
    version="0.1.0",
    description="Minimal-dependency reference implementations of ten vision and ML papers",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["reference", "data_tools"],
    install_requires=["torch>=2.4", "numpy", "pillow"],
    extras_require={"test": ["pytest"]},
)
