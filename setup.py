"""Packaging of the DMT-JEPA trainer; `pip install -e .` takes what it needs."""

from pathlib import Path

from setuptools import find_packages, setup

init = Path("dmtjepa/__init__.py").read_text()
version = init.split('__version__ = "')[1].split('"')[0]

setup(
    name="dmtjepa",
    version=version,
    description="High-performance trainer for DMT-JEPA: self-supervised pretraining of vision transformers",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # dmtjepa/kernels is a link to the folder kernels at the top: a PyPI package is already called `kernels`.
    packages=find_packages(include=["dmtjepa", "dmtjepa.*"]),
    # Likewise, dmtjepa/configs is a link to the folder of settings files.
    package_data={"dmtjepa": ["py.typed", "configs/*.yaml"], "dmtjepa.evaluation.page": ["templates/*"]},
    entry_points={"console_scripts": ["dmtjepa = dmtjepa.cli:main"]},
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "triton>=3.6; platform_system == 'Linux'",
        # 0.0.36 replaces the operators that dmtjepa/models/attention.py calls.
        "xformers>=0.0.35,<0.0.36; platform_system == 'Linux'",
        "numpy",
        "pillow",
        "pydantic>=2.7",
        "pyyaml",
        "submitit>=1.5",
        "tqdm",
        "tensorboard",
        "safetensors",
        "matplotlib",
        "jinja2>=3.1",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130>=2.4"],
        "export": [
            "timm>=1.0",
            "transformers>=5.0",
            "huggingface_hub",
            "onnx>=1.19",
            "onnxscript>=0.5",
            "onnxruntime>=1.22",
        ],
        "hf": ["datasets>=3.0"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "loggers": ["wandb", "mlflow-skinny"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "scipy",
            "scikit-learn",
            "mypy",
            "types-PyYAML",
            "ruff",
            "pre-commit",
        ],
    },
)
