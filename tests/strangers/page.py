"""The snippets of docs/your-training-loop.md, and the variables that they assume."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PAGE = Path(__file__).parent.parent.parent / "docs" / "your-training-loop.md"
SNIPPETS: dict[str, str] = {}
"""Heading -> the section's code."""
for section in re.split(r"^#+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
    for code in re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL):
        SNIPPETS[section.splitlines()[0]] = code


def given() -> dict[str, Any]:
    """A small model and its data, different on every rank; `evaluate` adds the quantized weights to `evaluations`."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    evaluations: list[list[Tensor]] = []
    return {
        "model": model,
        "binary": [p for p in model.parameters() if p.ndim > 1],
        "loader": [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(4)],
        "criterion": nn.CrossEntropyLoss(),
        "num_epochs": 2,
        "evaluations": evaluations,
        "evaluate": lambda model: evaluations.append([p.detach().clone() for p in model.parameters() if p.ndim > 1]),
    }


def run(heading: str, names: dict[str, Any]) -> None:
    exec(compile(SNIPPETS[heading], f"{PAGE.name}: {heading}", "exec"), names)  # noqa: S102  (our own page)
