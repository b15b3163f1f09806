"""Write the pages that are made from the code; with --check, fail if they are not up to date."""

import inspect
import sys
from pathlib import Path

import formats

from graphq.config import QuantConfig, QuantSpec, Rule, Scheme
from graphq.config.config import Algorithm
from graphq.config.known import KNOWN_CONFIGS, LLM_COMPRESSOR, MODELOPT, MODELOPT_PARTS, QUARK
from graphq.config.presets import CONFIGS
from graphq.graph.match import Match
from graphq.graph.optable import FAMILIES
from graphq.graph.pattern import Ops
from graphq.lint.fix import FIXES
from graphq.lint.rules import RULES
from graphq.numerics.formats import FORMATS
from graphq.observers import OBSERVERS
from graphq.passes.targets import get_target, onnxruntime, openvino, tensorrt, torch_compile

HERE = Path(__file__).parent


def fields(model) -> str:
    """A table of a pydantic model's keys."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


def configuration() -> str:
    parts = [(HERE / "configuration.head.md").read_text().rstrip()]
    for model in (QuantConfig, Algorithm, Rule, Scheme, QuantSpec):
        parts.append(f"## {model.__name__}\n\n{model.__doc__}\n\n{fields(model)}")
    observers = "\n".join(f"| `{n}` | {OBSERVERS[n].__doc__.splitlines()[0]} |" for n in OBSERVERS.names())
    parts.append(f"## Observers\n\n| name | what it finds |\n|---|---|\n{observers}")
    formats = ", ".join(f"`{n}`" for n in FORMATS)
    parts.append(f"## Formats\n\n{formats}")
    for name, config in CONFIGS.items():
        if name in KNOWN_CONFIGS:
            continue
        parts.append(f"## Preset `{name}`\n\n```yaml\n{config.to_yaml()}```")
    for source, table in (("llm-compressor", LLM_COMPRESSOR), ("ModelOpt", MODELOPT), ("AMD Quark", QUARK)):
        lines = "\n".join(f"| `{n}` | {s.weight or ''} | {s.input or ''} |" for n, s in table.items())
        parts.append(f"## Presets of {source}\n\n| name | weight | input |\n|---|---|---|\n{lines}")
    lines = "\n".join(
        f"| `{n}` | {', '.join(f'`{g}`' for g in globs)} | {s.weight} | {s.input or ''} |"
        for n, (globs, s) in MODELOPT_PARTS.items()
    )
    parts.append(
        f"## Presets of ModelOpt for some linears\n\n| name | of | weight | input |\n|---|---|---|---|\n{lines}"
    )
    return "\n\n".join(parts) + "\n"


def target(name, module) -> str:
    rows = ["| ops | kernel | role | result | bias |", "|---|---|---|---|---|"]
    for family, kernels in module.KERNELS.items():
        for k in kernels:
            bias = k.bias if family.startswith(("conv", "linear")) else ""
            rows.append(f"| {family} | {k.name} | {k.role} | {k.output if k.role != 'carry' else ''} | {bias} |")
    reasons = "\n".join(f"| {f} | {why} |" for f, why in module.FLOAT_REASONS.items())
    head = (HERE / f"target-{name}.head.md").read_text().rstrip()
    kernels = "\n".join(rows)
    weight_only = get_target(name).weight_only
    packed = "\n".join(f"| {f} | {k.name} |" for f, ks in weight_only.items() for k in ks)
    if packed:
        kernels += f"\n\n## Kernels for weights beside float inputs\n\n| ops | kernel |\n|---|---|\n{packed}"
    return f"{head}\n\n## Kernels\n\n{kernels}\n\n## What stays float, and why\n\n| ops | why |\n|---|---|\n{reasons}\n"


def words(cls, *, private=()) -> str:
    """A table of a class's public methods: signature and purpose."""
    rows = ["| word | meaning |", "|---|---|"]
    for name, method in vars(cls).items():
        if name.startswith("_") or not callable(method) or name in private:
            continue
        doc = " ".join(method.__doc__.split()) if method.__doc__ else ""
        signature = inspect.signature(method)
        plain = [p.replace(annotation=p.empty) for p in list(signature.parameters.values())[1:]]
        signature = signature.replace(parameters=plain, return_annotation=signature.empty)
        rows.append(f"| `{name}{signature}` | {doc} |")
    return "\n".join(rows)


def pattern_language() -> str:
    head = (HERE / "pattern-language.head.md").read_text().rstrip()
    families = "\n".join(
        f"| `{f}` | {', '.join(f'`{o}`' for o in ops) or '`getitem`'} |" for f, ops in FAMILIES.items()
    )
    return (
        f"{head}\n\n## Words of `op`\n\n{words(Ops)}\n\n## Words of a match\n\n{words(Match, private=('valued',))}\n\n"
        f"## Families\n\n| family | ATen ops |\n|---|---|\n{families}\n"
    )


def lint_page() -> str:
    parts = [(HERE / "lint.head.md").read_text().rstrip()]
    for target_name, rules in RULES.items():
        lines = "\n".join(
            f"| `{n}` | {' '.join(r.__doc__.split())} | {'yes' if n in FIXES else ''} |" for n, r in rules.items()
        )
        parts.append(f"## Rules for {target_name}\n\n| rule | finds | `--fix` |\n|---|---|---|\n{lines}")
    return "\n\n".join(parts) + "\n"


PAGES = {
    "lint.md": lint_page,
    "configuration.md": configuration,
    "target-onnxruntime.md": lambda: target("onnxruntime", onnxruntime),
    "target-openvino.md": lambda: target("openvino", openvino),
    "target-torch_compile.md": lambda: target("torch_compile", torch_compile),
    "target-tensorrt.md": lambda: target("tensorrt", tensorrt),
    "pattern-language.md": pattern_language,
    "formats.md": lambda: formats.page((HERE / "formats.head.md").read_text()),
}

if __name__ == "__main__":
    stale = [name for name, make in PAGES.items() if not (HERE / name).exists() or (HERE / name).read_text() != make()]
    if "--check" in sys.argv:
        sys.exit(f"not up to date: {', '.join(stale)}; run `make docs`" if stale else 0)
    for name in stale:
        (HERE / name).write_text(PAGES[name]())
        print(f"wrote docs/{name}")
