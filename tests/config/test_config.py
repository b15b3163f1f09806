"""Rules, selectors, files and the errors that a typo gives."""

import json

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.config.presets import CONFIGS, SCHEMES
from graphq.errors import ConfigError
from graphq.graph.view import layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.softmax(self.query(x) + self.key(x), -1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.layer:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def views():
    return {v.path: v for v in layers(graphq.capture(Net(), (torch.randn(2, 4),))) if v.family == "linear"}


def chosen(views, selector):
    config = QuantConfig(rules=(Rule(select=selector, scheme="int8"),))
    return {p for p, v in views.items() if config.resolve(v).scheme is not None}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("head", {"head"}),
        ("layer.0", {"layer.0.query", "layer.0.key"}),
        ("re:layer.*query", {"layer.0.query", "layer.1.query"}),
        ("layer.*.key", {"layer.0.key", "layer.1.key"}),
        ("Block", {"layer.0.query", "layer.0.key", "layer.1.query", "layer.1.key"}),
        ("Linear", {"head", "layer.0.query", "layer.0.key", "layer.1.query", "layer.1.key"}),
        (nn.Linear, {"head", "layer.0.query", "layer.0.key", "layer.1.query", "layer.1.key"}),
        ("aten.linear", {"head", "layer.0.query", "layer.0.key", "layer.1.query", "layer.1.key"}),
        ("aten.softmax", set()),
        (lambda layer: layer.path.endswith("1.key"), {"layer.1.key"}),
    ],
)
def test_every_form_of_selector_chooses_what_it_says(views, selector, expected):
    assert chosen(views, selector) == expected


def test_the_last_matching_rule_wins_and_ignore_beats_all(views):
    config = QuantConfig(
        rules=(Rule(select="*", scheme="int8"), Rule(select="layer.0", scheme="int8_weight_only")), ignore=("*.key",)
    )
    assert config.resolve(views["head"]).scheme == SCHEMES["int8"]
    assert config.resolve(views["layer.0.query"]).scheme == SCHEMES["int8_weight_only"]
    ignored = config.resolve(views["layer.0.key"])
    assert ignored.scheme is None
    assert ignored.because == "ignored by '*.key'"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_presets_survive_yaml_and_json(name):
    config = CONFIGS[name]
    assert QuantConfig.from_text(config.to_yaml()) == config
    assert QuantConfig.from_text(config.model_dump_json()) == config


def test_a_file_with_schemes_by_name_and_in_full(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nrules:\n- select: Linear\n  scheme: int8\n- select: head\n  scheme:\n    weight:"
        " {format: int4, granularity: group, group_size: 32}\nignore: [layer.1]\n"
    )
    config = QuantConfig.load(path)
    assert config.rules[0].scheme == SCHEMES["int8"]
    assert config.rules[1].scheme == Scheme(weight=QuantSpec(format="int4", granularity="group", group_size=32))


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        ("rules:\n- {select: '*', scheme: int9}", "unknown scheme 'int9'", "int8"),
        ("rules:\n- {select: '*', schema: int8}", "Extra inputs are not permitted", "'scheme'"),
        ("rules:\n- {select: '*', scheme: {weight: {format: int88}}}", "unknown number format", "'int8'"),
        ("rules:\n- {select: '*', scheme: {weight: {granularity: group}}}", "group_size belongs to", "schema"),
        ("[1, 2]", "a config file holds a mapping", "schema"),
        ("rules: [", "not valid YAML", "syntax"),
    ],
)
def test_a_wrong_file_names_the_key_and_the_nearest_word(text, complaint, hint):
    with pytest.raises(ConfigError) as e:
        QuantConfig.from_text(text, where="mine.yaml")
    assert complaint in str(e.value)
    assert hint in str(e.value)
    assert "mine.yaml" in str(e.value) or "unknown number format" in str(e.value)


def test_an_unmatched_selector_is_an_error_with_the_nearest_path():
    config = QuantConfig(rules=(Rule(select="*", scheme="int8"), Rule(select="layer.0.qerry")))
    with pytest.raises(ConfigError, match=r"layer\.0\.query"):
        graphq.prepare(Net(), config, (torch.randn(2, 4),))


def test_explain_says_which_rule_won():
    config = QuantConfig(rules=(Rule(select="*", scheme="int8"), Rule(select="head", reason="too small to pay off")))
    explanation = graphq.explain(graphq.prepare(Net(), config, (torch.randn(2, 4),)))
    (head,) = explanation["head"]
    assert (head.action, head.rule) == ("float", "rule 2: 'head' (too small to pay off)")
    assert {r.rule for r in explanation["layer.0"]} == {"rule 1: '*'"}


def test_the_schema_is_json_and_names_every_key_of_a_spec():
    schema = json.loads(json.dumps(QuantConfig.model_json_schema()))
    assert set(schema["$defs"]["QuantSpec"]["properties"]) == set(QuantSpec.model_fields)
