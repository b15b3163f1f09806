"""Write the files of a new rule: the rule itself, and its test."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path

from graphq.errors import PassError

RULE = '''"""{title}."""

import torch

from graphq.authoring import Rewrite

aten = torch.ops.aten


class {cls}(Rewrite):
    """relu(relu(x))  ⇒  relu(x): replace this by your own."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.relu(op.relu(x))

    @staticmethod
    def check(m):
        """Why a match is left alone, or None."""
        return None

    @staticmethod
    def rewrite(m):
        return m.call(aten.relu.default, m.x)
'''

TEST = '''"""{cls} keeps what it promises, and is found where it should be."""

import torch
from {module} import {cls}

from graphq.authoring import RewritePass, capture
from graphq.testing import prove


def test_the_rule_keeps_its_promise():
    assert prove({cls}).rewritten > 0


def test_it_is_found_in_a_model():
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    graph = capture(model, (torch.randn(2, 3),))
    assert RewritePass({cls})(graph).changed == 1
'''


def write_new_pass(name: str, folder: Path) -> tuple[Path, Path]:
    """Write NAME.py and test_NAME.py. Raises PassError for a name that is no identifier and for files that exist."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise PassError(f"{name!r} is no module name", remedy="Use lower case and underscores: fold_scale_into_linear.")
    if importlib.util.find_spec(name) is not None and not (folder / f"{name}.py").exists():
        raise PassError(f"there is a module {name!r} already, which this one would hide", remedy="Choose another name.")
    if not folder.is_dir():
        raise PassError("the folder does not exist", where=str(folder), remedy="Make it first.")
    rule, test = folder / f"{name}.py", folder / f"test_{name}.py"
    for path in (rule, test):
        if path.exists():
            raise PassError("this file exists already", where=str(path), remedy="Choose another name.")
    words = {"cls": "".join(w.capitalize() for w in name.split("_")), "module": name}
    rule.write_text(RULE.format(title=name.replace("_", " ").capitalize(), **words), encoding="utf-8")
    test.write_text(TEST.format(**words), encoding="utf-8")
    return rule, test
