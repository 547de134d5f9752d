"""Recipes: the grammar, its messages, precedence, gradients, rules."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.errors import RecipeError
from shardmerge.methods.api import METHODS, Over
from shardmerge.methods.dare import Rescale
from shardmerge.numerics import DType
from shardmerge.recipe import Gradient, ModelName, Recipe, method_for, rules_for
from shardmerge.recipe_parts import Filtered, setting_at, value_at
from shardmerge.recipe_yaml import read_yaml

TIES = """
merge_method: ties
base_model: org/base
models:
- {model: a, parameters: {weight: 0.5, density: 0.4}}
- {model: b@main, parameters: {weight: 1}}
"""
SLERP = """
merge_method: slerp
base_model: b
parameters: {t: 1}
"""


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert caught.value.exit_code == 2
    return caught.value.problems


def problem(text: str) -> str:
    (only,) = problems(text)
    return only


def recipe(**keys: object) -> str:
    """A recipe of ties with these keys changed; None takes one away."""
    content = {**yaml.safe_load(TIES), **keys}
    return yaml.safe_dump({key: value for key, value in content.items() if value is not None})


def of_weight(value: object) -> str:
    """A recipe of linear with one model of this weight, given as YAML text."""
    return f"merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: {value}\n"


def resolved(text: str, tensor: str = "x", t: float = 0.0, models=None):
    made = Recipe.parse(text)
    return method_for(made, made.slices[0], tensor, t, models=models)


# --- what is read -------------------------------------------------------------------------------


def test_a_whole_recipe():
    made = Recipe.parse(
        TIES + "dtype: float32\nout_dtype: bfloat16\ntokenizer_source: b@main\nseed: 7\n"
        "shard_size: 4.5MiB\nallow_non_finite: true\n"
    )
    assert made.base_model == ModelName("org/base")
    assert made.merge_method == "ties" and not made.layered and made.rules == made.notes == ()
    assert made.dtype is DType.F32 and made.out_dtype is DType.BF16
    assert made.tokenizer_source == ModelName("b", "main")
    assert (made.seed, made.shard_size, made.allow_non_finite) == (7, 9 * 2**19, True)
    (part,) = made.slices
    assert [str(source.model) for source in part.sources] == ["a", "b@main"]
    assert [source.where for source in part.sources] == ["models[0]", "models[1]"]
    assert part.base is not None and part.base.model == ModelName("org/base")
    assert part.sources[1].parameters == {"weight": 1.0}


def test_the_text_is_kept_and_defaults_are_plain():
    made = Recipe.parse(TIES)
    assert made.text == TIES
    assert made.dtype is made.out_dtype is made.tokenizer_source is made.shard_size is None
    assert made.seed == 0 and made.allow_non_finite is False


def test_tokenizer_source_base_is_the_base_model():
    made = Recipe.parse(recipe(tokenizer_source="base"))
    assert made.tokenizer_source == ModelName("org/base")
    text = of_weight(1) + "tokenizer_source: base"
    assert problem(text).startswith("tokenizer_source: 'base' needs base_model")


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ("org/name", ModelName("org/name")),
        ("org/name@refs/pr/3", ModelName("org/name", "refs/pr/3")),
        ("/data/name///", ModelName("/data/name")),
        ("s3://user@host/bucket/name", ModelName("s3://user@host/bucket/name")),
        ("hf://org/name@v1", ModelName("hf://org/name", "v1")),
        ({"model": "org/name@v1"}, ModelName("org/name", "v1")),
        ({"model": {"path": "org/a+b@c"}}, ModelName("org/a+b@c")),
        ({"path": "org/name", "revision": "v1"}, ModelName("org/name", "v1")),
        ("a@v1+b/c@v2", ModelName("a", "v1", ModelName("b/c", "v2"))),
        ({"model": "a", "lora": "b@v2"}, ModelName("a", None, ModelName("b", "v2"))),
        (
            {"model": {"path": "a+b"}, "lora": {"path": "c+d"}, "any_base": True},
            ModelName("a+b", None, ModelName("c+d"), True),
        ),
    ],
)
def test_models(given, model):
    made = Recipe.parse(recipe(models=[{"model": given, "parameters": {"weight": 1}}]))
    assert made.slices[0].sources[0].model == model


def test_an_adapter_beside_the_model():
    models = [{"model": "a", "lora": "b", "parameters": {"weight": 1}}]
    made = Recipe.parse(recipe(models=models))
    assert made.slices[0].sources[0].model == ModelName("a", None, ModelName("b"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a+b+c", "models[0].model: 'a+b+c' has more than one '+' (model+lora)"),
        ("a+", "models[0].model: 'a+' has nothing on one side of '+' (model+lora)"),
        ({"model": "a+b", "lora": "c"}, "models[0].model.lora: is a second adapter"),
        ({"model": "a", "any_base": True}, "models[0].model.any_base: is about an adapter"),
        ("a@b@c", "models[0].model: 'a@b@c' has more than one '@'"),
        ("a@", "models[0].model: 'a@' has nothing on one side of '@'"),
        ("", "models[0].model: must be text, not an empty text"),
        (3, "models[0].model: must be text, not 3; put it in quotes"),
        (["a"], "models[0].model: must be text, not a list"),
        ({"revision": "a"}, "models[0].model: needs 'path'"),
        ({"model": "a", "override_architecture": "X"}, "models[0].model: 'override_archi"),
    ],
)
def test_wrong_models(given, message):
    text = recipe(models=[{"model": given, "parameters": {"weight": 1}}])
    assert problem(text).startswith(message)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (4096, 4096),
        ("5GB", 5 * 10**9),
        ("4GiB", 2**32),
        ("500 mb", 5 * 10**8),
        ("1.5KiB", None),
        ("5B", None),
        ("5b", None),
        ("5G", None),
        ("4095", None),
        (4095, None),
        (True, None),
        (5e9, None),
        ("-5GB", None),
        ("5XB", None),
    ],
)
def test_shard_size(given, size):
    text = recipe(shard_size=given)
    if size is None:
        assert problem(text).startswith("shard_size: ")
    else:
        assert Recipe.parse(text).shard_size == size


def test_mergekits_shard_sizes_are_explained():
    assert "mergekit documents such sizes as parameters" in problem(recipe(shard_size="5B"))


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("1E3", 1e3), (".5", 0.5), ("5.", 5.0), ("+2", 2.0), ("-0.0", 0.0), ("7", 7)],
)
def test_numbers_are_those_of_yaml_1_2(text, number):
    found = resolved(TIES + f"parameters: {{lambda: {text}}}").lam
    assert isinstance(found, float) and found == number and math.copysign(1, found) == 1


@pytest.mark.parametrize("text", ["'0.5'", "1_000", "1:30", "0x10", "true", "null", "", "one"])
def test_what_is_no_number(text):
    assert problem(of_weight(text)).startswith("models[0].parameters.weight: must be a number, not")


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", "1e999"])
def test_numbers_that_are_refused_by_the_check(text):
    assert "must be a finite number" in problem(of_weight(text))


def test_quotes_around_a_number():
    assert problem(of_weight("'0.5'")).endswith("not the text '0.5'; remove the quotes")


def test_notes_tell_what_has_no_effect():
    text = recipe(
        parameters={"int8_mask": True, "normalize": False},
        models=[{"model": "a", "parameters": {"weight": 1, "int8_mask": True}}],
    )
    assert Recipe.parse(text).notes == (
        "models[0].parameters.int8_mask: has no effect here",
        "parameters.int8_mask: has no effect here",
    )


GOLDENS = sorted((Path(__file__).parent / "golden" / "mergekit").glob("*/config.yml"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.parent.name)
def test_recipes_that_mergekit_ran(path):
    made = Recipe.load(path)
    for part in made.slices:
        assert method_for(made, part, "model.layers.0.mlp.up_proj.weight", 0.5)


# --- YAML ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe: is empty"),
        ("# nothing", "recipe: is empty"),
        ("--- ~", "recipe: is empty"),
        ("- a", "recipe: must be a mapping (key: value), not a list"),
        ("a: 1\n---\nb: 2", "recipe: has several YAML documents"),
        ("a: [1\nb: 2", "recipe, line 2, column 2: is not valid YAML: "),
        ("a:\n\tb: 1", "recipe, line 2, column 1: is not valid YAML: "),
        ("a: *b", "recipe, line 1, column 4: is not valid YAML: "),
        ("[" * 5000, "recipe, line 1, column 33: is not valid YAML: nested more than 32 deep"),
        ("a: &a [*a]", "recipe: grows beyond"),
        ('a: "\\UFFFFFFFF"', "recipe: is not valid YAML"),
        ("a: \0", "recipe: is not valid YAML"),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1", "recipe: is not valid YAML"),
        ("x" * 2**20 + "x", "recipe: has 1,048,577 bytes"),
        ("a: '\ud800'", "recipe: is not valid YAML"),
    ],
)
def test_text_that_is_no_recipe(text, message):
    assert problem(text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "recipe, line 2: key 'seed' is given twice (first in line 1)"),
        ("seed: !new 1", "recipe, line 1: has the tag !new"),
        ("seed: !!python/name:os.system", "recipe, line 1: has the tag"),
        ("seed: !!int x", "recipe, line 1: 'x' cannot be used as int"),
        ("seed: " + "9" * 101, "recipe, line 1: '99"),
        ("seed: " + "9" * 5000, "recipe, line 1: '99"),
        ("? [1]\n: 2", "recipe, line 1: a key must be a word"),
        ('base_model: "a\\0b"', "recipe, line 1: line break or control character"),
        ('"a\\nb": 1', "recipe, line 1: control character in the key"),
        ("<<: 3", "recipe, line 1: '<<' takes a mapping, not 3"),
    ],
)
def test_values_that_no_recipe_has(text, message):
    assert any(found.startswith(message) for found in problems(text))


def test_aliases_are_counted_as_if_written_out():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert problem("\n".join(lines)).startswith("recipe: grows beyond 100,000 values")
    merges = ["a0: &a0 {k: 1}"]
    merges += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]
    assert problem("\n".join(merges)).startswith("recipe: grows beyond 100,000 values")


def test_anchors_and_merge_keys():
    text = """
merge_method: linear
models:
- {model: a, parameters: &same {weight: 0.5}}
- {model: b, parameters: {<<: *same}}
- {model: c, parameters: {<<: [{weight: 2}, *same], weight: 3}}
"""
    assert resolved(text).weight == (0.5, 0.5, 3.0)


@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        Recipe.parse(text)
    except RecipeError as error:
        assert error.problems and all("\n" not in found for found in error.problems)


def test_values_are_plain():
    tree = read_yaml("[1, 0.5, yes, off, ~, text, 1e-3, 010, {a: b}]", "x").value
    assert tree == [1, 0.5, True, False, None, "text", 0.001, 10, {"a": "b"}]


# --- messages -----------------------------------------------------------------------------------


def test_all_problems_at_once_and_in_words():
    text = """
merge_method: ties
base_model: b
models:
- {model: a, parameters: {weight: 1}}
- {model: c, parameters: {desnity: 0.5, weight: 1}}
dtype: float8
sede: 1
"""
    assert problems(text) == (
        "recipe: unknown key 'sede' (it has merge_method, base_model, models, slices, parameters, "
        "dtype, out_dtype, tokenizer_source, rules, seed, shard_size, allow_non_finite). "
        "Did you mean 'seed'?",
        "models[1].parameters: unknown parameter 'desnity' of ties (it has weight, density, "
        "normalize, rescale, lambda, trim). Did you mean 'density'?",
        "dtype: 'float8' is not a dtype that can be written; it must be one of float16, bfloat16, "
        "float32, float64",
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modules": {}}, "recipe: 'modules' is not supported yet"),
        ({"tokenizer": {"source": "base"}}, "recipe: 'tokenizer' is not supported yet; write tok"),
        ({"chat_template": "auto"}, "recipe: 'chat_template' is not supported yet"),
        ({"name": "x"}, "recipe: 'name' belongs to mergekit-multi"),
        ({"lambda": 1}, "recipe: 'lambda' belongs under 'parameters:'"),
        ({"tokenizer_source": "union"}, "tokenizer_source: 'union'"),
        ({"merge_method": "karcher"}, "merge_method: 'karcher' is a method of mergekit that is"),
        ({"merge_method": "tise"}, "merge_method: unknown merge method 'tise' (there are dare_l"),
        ({"merge_method": 3}, "merge_method: must be text, not 3"),
        ({"merge_method": None}, "recipe: needs 'merge_method' (dare_linear"),
        ({"base_model": None}, "base_model: is missing; ties takes task vectors from it"),
        ({"models": None}, "recipe: needs exactly one of models and slices"),
        ({"slices": []}, "recipe: needs exactly one of models and slices"),
        ({"models": []}, "models: must be a list of at least one entry, not an empty list"),
        ({"models": "a"}, "models: must be a list of at least one entry, not the text 'a'"),
        ({"models": ["a"]}, "models[0]: must be a mapping; write model: a"),
        ({"models": [{"parameters": {}}]}, "models[0]: needs 'model'"),
        ({"models": [{"model": "a", "weight": 1}]}, "models[0]: 'weight' belongs under 'parame"),
        ({"models": [{"model": "a", "modle": 1}]}, "models[0]: unknown key 'modle'"),
        ({"models": [{"model": "a", "layer_range": [0, 1]}]}, "models[0]: 'layer_range' belongs"),
        ({"models": [{"model": "a", "fisher": "f"}]}, "models[0]: 'fisher' is not used by ties"),
        ({"dtype": "int64"}, "dtype: 'int64' would round"),
        ({"dtype": 32}, "dtype: must be text, not 32"),
        ({"out_dtype": "fp32"}, "out_dtype: 'fp32' is not a dtype"),
        ({"seed": -1}, "seed: must be a whole number from 0 to 9223372036854775807, not -1"),
        ({"seed": True}, "seed: must be a whole number"),
        ({"seed": 1.0}, "seed: must be a whole number"),
        ({"seed": 2**63}, "seed: must be a whole number"),
        ({"allow_non_finite": 1}, "allow_non_finite: must be true or false, not 1"),
        ({"parameters": [1]}, "parameters: must be a mapping"),
        ({"parameters": {"weight": None}}, "parameters.weight: must be a number, not nothing"),
        ({"parameters": {"normalize": 1}}, "parameters.normalize: must be true or false, not 1"),
        ({"parameters": {"trim": "models"}}, "parameters.trim: must be one of tensor, model, not"),
        ({"parameters": {"density": 1.5}}, "parameters.density: must be from 0 to 1, not 1.5"),
        ({"parameters": {"density": [0, 2]}}, "parameters.density[1]: must be from 0 to 1, not 2"),
        ({"parameters": {"density": []}}, "parameters.density: must be a list of at least one"),
        ({"parameters": {"density": [0, [1]]}}, "parameters.density[1]: must be a number, not a l"),
        ({"parameters": {"density": {"value": 1}}}, "parameters.density: must be a number, not a"),
        ({"parameters": {"density": [1, {"value": 1}]}}, "parameters.density: mixes numbers and"),
        ({"parameters": {"density": [{"filter": "x"}]}}, "parameters.density[0]: needs 'value'"),
        ({"parameters": {"density": [{"value": 2}]}}, "parameters.density[0].value: must be from"),
        ({"parameters": {"density": [{"value": []}]}}, "parameters.density[0].value: must be a l"),
        ({"parameters": {"density": [{"value": [2]}]}}, "parameters.density[0].value[0]: must be"),
        ({"parameters": {"density": [{"filtre": "x", "value": 1}]}}, "parameters.density[0]: unk"),
        ({"parameters": {"density": [{"filter": "x*", "value": 1}]}}, "parameters.density[0].fil"),
        ({"parameters": {"density": [{"filter": 3, "value": 1}]}}, "parameters.density[0].filter"),
    ],
)
def test_message(keys, message):
    assert any(found.startswith(message) for found in problems(recipe(**keys)))


def test_an_entry_after_one_for_all_tensors_is_never_reached():
    value = [{"value": 1}, {"filter": "mlp", "value": 0.5}]
    assert problem(recipe(parameters={"density": value})).startswith(
        "parameters.density[1]: is never reached: parameters.density[0] has no filter"
    )


def test_a_shared_parameter_of_one_model():
    models = [{"model": "a", "parameters": {"weight": 1, "normalize": True}}]
    assert problem(recipe(models=models)) == (
        "models[0].parameters.normalize: normalize is one value for all models of ties; move it "
        "to the top-level parameters"
    )


def test_a_refused_model_is_the_only_problem():
    models = [{"model": "a+"}, {"model": "c"}]
    rules = [{"tensors": "x", "from": "a"}]
    assert problem(recipe(models=models, rules=rules)).startswith(
        "models[0].model: 'a+' has nothing"
    )


def test_a_misspelt_parameter_is_not_missing_as_well():
    models = [{"model": "a", "parameters": {"wieght": 1}}]
    assert problem(recipe(models=models)).endswith("Did you mean 'weight'?")


def test_missing_parameters_are_told_once_per_parameter():
    models = [{"model": name} for name in "ab"]
    assert problem(recipe(models=models)).startswith(
        "models[0], models[1]: no 'weight': ties needs it of each model"
    )
    assert problem("merge_method: slerp\nbase_model: b\nmodels: [{model: a}]") == (
        "models: slerp needs 't'; give it in the top-level parameters"
    )


def test_weights_that_sum_to_zero():
    text = "merge_method: linear\nparameters: {weight: %s}\nmodels: [{model: a}, {model: b}]"
    assert problem(text % "0").startswith("models: linear: ")
    assert problem(text % "[0, 1]").startswith("models: linear: ")  # at the first layer
    made = Recipe.parse(text % "[{filter: mlp, value: 0}, {value: 1}]")
    assert method_for(made, made.slices[0], "attn", 0.0).weight == (1.0, 1.0)
    with pytest.raises(RecipeError, match=r"linear: .* \(for mlp\.up\)"):
        method_for(made, made.slices[0], "mlp.up", 0.0)


# --- base model ---------------------------------------------------------------------------------


def test_a_listed_base_model_is_taken_out():
    models = [{"model": "org/base/"}, {"model": "a", "parameters": {"weight": 1}}]
    (part,) = Recipe.parse(recipe(models=models)).slices
    assert [str(source.model) for source in part.sources] == ["a"]
    assert part.base is not None and part.base.where == "models[0]"
    again = [*models, {"model": "org/base"}]
    assert "is listed twice (models[0] and models[2])" in problem(recipe(models=again))


def test_parameters_of_a_listed_base_model_are_refused_unless_inert():
    other = {"model": "a", "parameters": {"weight": 1}}
    listed = {"model": "org/base", "parameters": {"int8_mask": True}}
    assert Recipe.parse(recipe(models=[listed, other])).notes
    listed = {"model": "org/base", "parameters": {"weight": 0.5}}
    assert problem(recipe(models=[listed, other])).startswith("models[0]: weight of the base model")


def test_only_the_base_model_is_not_enough():
    assert problem(recipe(models=[{"model": "org/base"}])).startswith(
        "models: ties merges at least 1 models besides the base model; there are 0 (none)"
    )


@pytest.mark.parametrize("models", ["[{model: b}, {model: a}]", "[{model: a}]"])
def test_slerp_with_and_without_the_base_listed(models):
    made = Recipe.parse(
        f"merge_method: slerp\nbase_model: b\nmodels: {models}\nparameters: {{t: 1}}"
    )
    assert [str(source.model) for source in made.slices[0].sources] == ["a"]
    assert method_for(made, made.slices[0], "x", 0.0).t == 1.0


def test_slerp_of_too_many():
    text = (
        "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: c}]\nparameters: {t: 1}"
    )
    assert problem(text) == (
        "models: slerp merges exactly 1 model besides the base model; there are 2 (a, c)"
    )


def test_linear_averages_the_base_model_too():
    text = "merge_method: linear\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]"
    assert problem(text).startswith("base_model: no 'weight': linear needs it of each model; ")
    assert "weight: 0 to leave it out, or remove base_model" in problem(text)
    made = Recipe.parse(text + "\nparameters: {weight: 3}")
    assert [str(source.model) for source in made.slices[0].sources] == ["a", "b"]
    assert method_for(made, made.slices[0], "x", 0.0).weight == (1.0, 3.0)
    listed = "merge_method: linear\nbase_model: b\nparameters: {weight: 1}\nmodels: "
    made = Recipe.parse(listed + "[{model: b, parameters: {weight: 0}}, {model: a}]")
    assert method_for(made, made.slices[0], "x", 0.0).weight == (0.0, 1.0)


def test_passthrough_only_takes_configuration_from_the_base_model():
    made = Recipe.parse("merge_method: passthrough\nbase_model: b\nmodels: [{model: a}]")
    assert made.base_model == ModelName("b") and made.slices[0].base is None


def test_the_same_model_twice():
    made = Recipe.parse(
        "merge_method: linear\nmodels: [{model: a}, {model: a}]\nparameters: {weight: 1}"
    )
    assert [source.where for source in made.slices[0].sources] == ["models[0]", "models[1]"]


def test_fisher_needs_an_extra_of_each_model():
    text = "merge_method: fisher\nmodels: [{model: a, fisher: f@v1}, {model: b}]"
    assert problem(text) == "models[1]: needs 'fisher: <checkpoint>' for fisher"
    made = Recipe.parse(text.replace("model: b", "model: b, fisher: {path: g+h}"))
    extras = [source.extras["fisher"] for source in made.slices[0].sources]
    assert extras == [ModelName("f", "v1"), ModelName("g+h")]


# --- slices -------------------------------------------------------------------------------------


def sliced(*parts: str, method: str = "ties", base: str = "base_model: b") -> str:
    lines = [f"merge_method: {method}", base, "parameters: {weight: 1}", "slices:"]
    return "\n".join([*lines, *(f"- {part}" for part in parts)])


def test_slices():
    made = Recipe.parse(
        sliced(
            "{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [2, 6]}]}",
            "{sources: [{model: a, layer_range: [4, 8]}], parameters: {lambda: 2}}",
            "{sources: [{model: a, layer_range: [4, 8]}], base_model: c}",
        )
    )
    assert made.layered and len(made.slices) == 3
    assert [part.where for part in made.slices] == ["slices[0]", "slices[1]", "slices[2]"]
    assert made.slices[0].sources[0].where == "slices[0].sources[0]"
    bases = [(str(part.base.model), part.base.layers) for part in made.slices if part.base]
    assert bases == [("b", (2, 6)), ("b", (4, 8)), ("c", (4, 8))]
    assert [method_for(made, part, "x", 0.0).lam for part in made.slices] == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("{}", "slices[0]: needs 'sources'"),
        ("[]", "slices[0]: must be a mapping"),
        ("{sources: []}", "slices[0].sources: must be a list of at least one entry"),
        ("{sources: [{model: a}]}", "slices[0].sources[0]: needs 'layer_range'"),
        ("{sources: [{model: a, layer_range: 4}]}", "slices[0].sources[0].layer_range: must be"),
        ("{sources: [{model: a, layer_range: [4, 4]}]}", "slices[0].sources[0].layer_range: mus"),
        ("{sources: [{model: a, layer_range: [-1, 4]}]}", "slices[0].sources[0].layer_range: mu"),
        ("{sources: [{model: a, layer_range: [0, 4.0]}]}", "slices[0].sources[0].layer_range: m"),
        ("{sources: [{model: a, layer_range: [false, true]}]}", "slices[0].sources[0].layer_ran"),
        (
            "{sources: [{model: a, layer_range: [0, 4]}, {model: c, layer_range: [0, 5]}]}",
            "slices[0]: all sources of a slice must have equally many layers; they have 4 ([0, 4)",
        ),
        (
            "{sources: [{model: a, layer_range: [0, 4]}], residual_weight: 1}",
            "slices[0]: 'residual_weight' has no effect in mergekit either",
        ),
        ("{sources: [{model: a, layer_range: [0, 4]}], models: []}", "slices[0]: unknown key 'mo"),
        ("{sources: [{model: a, layer_range: [0, 4]}], t: 1}", "slices[0]: 't' belongs under"),
    ],
)
def test_wrong_slices(part, message):
    assert any(found.startswith(message) for found in problems(sliced(part)))


def test_the_base_model_is_not_added_to_slices_of_linear():
    made = Recipe.parse(sliced("{sources: [{model: a, layer_range: [0, 4]}]}", method="linear"))
    assert [str(source.model) for source in made.slices[0].sources] == ["a"]


def test_a_gradient_that_is_zero_where_no_tensor_of_the_slice_is():
    gradient = "parameters: {weight: [0, 1]}"
    inner = "{sources: [{model: a, layer_range: [0, 1]}], " + gradient + "}"
    assert Recipe.parse(sliced(inner, method="linear", base=""))
    wide = "{sources: [{model: a, layer_range: [0, 2]}], " + gradient + "}"
    assert problem(sliced(wide, method="linear", base="")).startswith("slices[0]: linear: ")


# --- parameters of a tensor ---------------------------------------------------------------------

VALUES = {"rule": 0.1, "source": 0.2, "slice": 0.3, "top": 0.4}


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("filtered", [False, True])
def test_precedence(given, filtered):
    """A rule before the model, the slice, the top level and the default; filters fall through."""
    levels = [name for name, there in zip(VALUES, given, strict=True) if there]

    def density(level):
        if level not in levels:
            return {}
        value = VALUES[level]
        return {"density": [{"filter": "mlp", "value": value}] if filtered else value}

    source = {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1} | density("source")}
    content = {
        "merge_method": "ties",
        "base_model": "b",
        "slices": [{"sources": [source], "parameters": density("slice")}],
        "parameters": density("top"),
    }
    if "rule" in levels:
        content["rules"] = [{"tensors": "*", "parameters": density("rule")}]
    text = yaml.safe_dump(content)
    expected = VALUES[levels[0]] if levels else 1.0
    assert resolved(text, "layer.mlp.up").density == (expected,)
    assert resolved(text, "layer.attn").density == ((1.0,) if filtered else (expected,))


def test_each_level_of_filters_falls_through_to_the_next():
    text = """
merge_method: ties
base_model: b
parameters: {weight: [{filter: norm, value: 4}, {filter: "*", value: 5}]}
models:
- {model: a, parameters: {weight: [{filter: mlp, value: 1}, {filter: attn, value: 2}]}}
- {model: c, parameters: {weight: 3}}
rules:
- {tensors: "*.bias", parameters: {weight: [{filter: up, value: 6}]}}
- {tensors: "*.up.bias", parameters: {weight: 7}}
"""
    expected = {
        "mlp.attn": (1, 3),
        "attn": (2, 3),
        "norm": (4, 3),
        "embed": (5, 3),
        "mlp.bias": (1, 3),
        "mlp.up.bias": (7, 7),
        "mlp.ups.bias": (6, 6),
    }
    assert {name: resolved(text, name).weight for name in expected} == expected


def test_values_have_the_types_of_the_fields():
    text = recipe(parameters={"lambda": 2, "trim": "model", "normalize": False})
    method = resolved(text)
    assert type(method.lam) is float and method.normalize is False and method.trim is Over.MODEL
    assert method.weight == (0.5, 1.0) and all(type(value) is float for value in method.weight)


@pytest.mark.parametrize(
    ("given", "rescale"),
    [(True, Rescale.L1), (False, Rescale.NONE), ("inv_keep", Rescale.INV_KEEP), (None, Rescale.L1)],
)
def test_choices_that_may_be_true_or_false(given, rescale):
    parameters = {} if given is None else {"rescale": given}
    text = recipe(merge_method="dare_ties", parameters=parameters)
    assert resolved(text).rescale is rescale
    gradient = recipe(merge_method="dare_ties", parameters={"rescale": [False, "inv_keep"]})
    picked = [resolved(gradient, t=t).rescale for t in (0, 0.99, 1)]
    assert picked == [Rescale.NONE, Rescale.NONE, Rescale.INV_KEEP]


def test_a_subset_of_the_models():
    assert resolved(TIES, models=(1,)).weight == (1.0,)
    assert resolved(TIES, models=(1, 0)).weight == (1.0, 0.5)
    with pytest.raises(RecipeError, match="ties cannot merge 0 models"):
        resolved(TIES, models=())


def test_a_value_that_no_filter_gives():
    text = """
merge_method: linear
base_model: b
models:
- {model: a, parameters: {weight: [{filter: mlp, value: 1}]}}
- {model: b, parameters: {weight: 1}}
"""
    assert resolved(text, "mlp.up").weight == (1.0, 1.0)
    with pytest.raises(RecipeError) as caught:
        resolved(text, "attn")
    (found,) = caught.value.problems
    assert found.startswith("models[0] (a): no 'weight': linear needs it of each model")
    assert found.endswith("a list of filters needs a last entry without filter (for attn)")
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}]\nparameters: {t: %s}"
    with pytest.raises(RecipeError, match=r"models: no 't': slerp needs it; .* \(for attn\)"):
        resolved(text % "[{filter: mlp, value: 1}]", "attn")


def test_t_outside_of_the_slice_is_a_bug():
    with pytest.raises(ValueError, match="t must be from 0 to 1"):
        resolved(TIES, t=1.5)


NUMBERS = st.floats(-10, 10).map(lambda number: number + 0.0)
GRADIENTS = st.lists(NUMBERS, min_size=1, max_size=6).map(lambda values: Gradient(tuple(values)))
PLACES = st.floats(0, 1)


@given(GRADIENTS, PLACES)
def test_gradients_stay_within_their_values(gradient, t):
    value = value_at(gradient, t)
    slack = 1e-12
    assert min(gradient.values) - slack <= value <= max(gradient.values) + slack


@given(GRADIENTS)
def test_gradients_pass_through_their_values(gradient):
    steps = max(1, len(gradient.values) - 1)
    for index, value in enumerate(gradient.values):
        assert value_at(gradient, index / steps) == pytest.approx(value, abs=1e-12)
    assert value_at(gradient, 0.0) == gradient.values[0]
    assert value_at(gradient, 1.0) == gradient.values[-1]


@given(NUMBERS, PLACES, st.integers(1, 5))
def test_a_gradient_of_equal_values_is_that_value(number, t, count):
    assert value_at(Gradient((number,) * count), t) == pytest.approx(number, abs=1e-12)


@given(NUMBERS, NUMBERS, PLACES)
def test_a_gradient_of_two_is_mergekits_formula(first, last, t):
    value = value_at(Gradient((first, last)), t)
    assert value == (last if t == 1 else (1 - t) * first + t * last)


@given(st.lists(st.sampled_from(["l1", "none", True, False]), min_size=1, max_size=6), PLACES)
def test_other_values_are_picked(values, t):
    assert value_at(Gradient(tuple(values)), t) is values[int(t * (len(values) - 1))]


def test_the_first_matching_filter_counts():
    setting = (Filtered("mlp", 1.0), Filtered("up", Gradient((2.0, 4.0))))
    assert setting_at(setting, "mlp.up", 0.0) == 1.0
    assert setting_at(setting, "attn.up", 0.5) == 3.0
    assert setting_at(setting, "attn", 0.5) is None


# --- rules --------------------------------------------------------------------------------------


def ruled(*rules: str) -> str:
    return TIES + "rules:\n" + "".join(f"- {rule}\n" for rule in rules)


def test_rules_of_a_tensor():
    made = Recipe.parse(
        ruled(
            "{tensors: 'lm_head.*', from: b@main}",
            "{tensors: ['*.inv_freq', 'rotary.*'], drop: true}",
            "{tensors: '*.experts.*', missing: skip, parameters: {density: 0.5, lambda: 2}}",
            "{tensors: '*.experts.1?.*', missing: base, parameters: {density: [0.1, 0.3]}}",
            "{tensors: '*.norm', merge_method: linear, parameters: {weight: 1}}",
        )
    )
    plain = rules_for(made, "mlp")
    assert (plain.merge_method, plain.missing, plain.drop) == ("ties", "error", False)
    assert plain.take_from is None and plain.parameters == {}
    assert rules_for(made, "lm_head.weight").take_from == ModelName("b", "main")
    assert rules_for(made, "rotary.x").drop and rules_for(made, "a.inv_freq").drop
    expert = rules_for(made, "a.experts.12.up")
    assert expert.missing == "base"
    assert expert.parameters == {"density": Gradient((0.1, 0.3)), "lambda": 2.0}
    assert rules_for(made, "a.experts.1.up").missing == "skip"
    method = method_for(made, made.slices[0], "a.experts.12.up", 0.5)
    assert method.density == pytest.approx((0.2, 0.2)) and method.lam == 2.0
    assert method_for(made, made.slices[0], "a.norm", 0.5) == METHODS["linear"].cls(
        weight=(1.0, 1.0), normalize=True
    )


def test_a_rules_method_uses_the_recipes_parameters():
    made = Recipe.parse(ruled("{tensors: '*.norm', merge_method: linear}"))
    assert method_for(made, made.slices[0], "a.norm", 0.0).weight == (0.5, 1.0)


def test_the_last_choice_of_what_to_do_counts():
    made = Recipe.parse(
        ruled(
            "{tensors: '*', drop: true}",
            "{tensors: 'b*', from: a}",
            "{tensors: 'bc*', merge_method: linear}",
            "{tensors: 'bcd*', drop: true}",
            "{tensors: '*', parameters: {density: 0.1}}",
        )
    )
    found = [rules_for(made, name) for name in ("a", "b", "bc", "bcd")]
    assert [one.drop for one in found] == [True, False, False, True]
    assert [one.take_from for one in found] == [None, ModelName("a"), None, None]
    assert [one.merge_method for one in found] == ["ties", "ties", "linear", "linear"]


def test_globs_are_case_sensitive_and_whole():
    made = Recipe.parse(ruled("{tensors: ['A*', 'x[12]'], drop: true}"))
    names = ("A.b.c", "a", "bA", "x1", "x3", "x12")
    assert [rules_for(made, name).drop for name in names] == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{tensors: x}", "rules[0]: does nothing; give it one of merge_method, parameters, from"),
        ("{tensors: x, parameters: {}}", "rules[0]: does nothing"),
        ("{drop: true}", "rules[0]: needs 'tensors'"),
        ("{tensors: [], drop: true}", "rules[0].tensors: must be a list of at least one entry"),
        ("{tensors: [3], drop: true}", "rules[0].tensors[0]: must be text, not 3"),
        ("{tensors: x, drop: false}", "rules[0].drop: false does nothing"),
        ("{tensors: x, drop: true, missing: skip}", "rules[0]: 'drop' leaves nothing to do for m"),
        ("{tensors: x, from: a, merge_method: linear}", "rules[0]: 'from' leaves nothing to do f"),
        ("{tensors: x, from: b}", "rules[0].from: unknown model 'b' (the recipe has org/base, a,"),
        ("{tensors: x, missing: skp}", "rules[0].missing: unknown choice 'skp' (there are error,"),
        ("{tensors: x, merge_method: karcher}", "rules[0].merge_method: 'karcher' is a method of"),
        ("{tensors: x, merge_method: linaer}", "rules[0].merge_method: unknown merge method 'lin"),
        ("{tensors: x, parameters: {t: 1}}", "rules[0].parameters: unknown parameter 't' of ties"),
        ("{tensors: x, merge_method: slerp}", "models: slerp (the method of a rule) merges exact"),
        ("{tensors: x, merge_method: fisher}", "models[0]: needs 'fisher: <checkpoint>' for fish"),
        ("{tensor: x, drop: true}", "rules[0]: unknown key 'tensor'"),
        ("[x]", "rules[0]: must be a mapping"),
    ],
)
def test_wrong_rules(rule, message):
    assert any(found.startswith(message) for found in problems(ruled(rule)))


def test_a_rules_method_needs_its_parameters_and_a_base_model():
    text = """
merge_method: passthrough
%s
models: [{model: a}]
rules: [{tensors: x, merge_method: slerp%s}]
"""
    assert problem(text % ("base_model: b", "")).startswith("rules[0]: slerp needs 't'; give it")
    assert problem(text % ("", ", parameters: {t: 1}")).startswith("base_model: is missing; slerp")
    made = Recipe.parse(text % ("base_model: b", ", parameters: {t: 1}"))
    assert made.slices[0].base is not None
    assert method_for(made, made.slices[0], "x", 0.0).t == 1.0
    assert method_for(made, made.slices[0], "y", 0.0).scale == (1.0,)


def test_missing_base_needs_a_base_model():
    text = of_weight(1) + "rules: [{tensors: x, missing: base}]"
    assert problem(text) == "base_model: is missing; a rule says 'missing: base'"


def test_task_vectors_from_a_base_model_that_is_merged_itself():
    text = "merge_method: linear\nbase_model: b\nparameters: {weight: 1}\nmodels: [{model: a}]\n"
    assert "make ties the recipe's merge_method and linear that of rules" in problem(
        text + "rules: [{tensors: x, merge_method: ties}]"
    )


def test_a_parameter_that_two_methods_understand_differently():
    rules = [{"tensors": "x", "merge_method": "dare_ties"}]
    text = recipe(rules=rules, parameters={"rescale": "inv_keep"})
    assert "parameters.rescale" in problem(text)  # ties knows only true and false
    rules[0]["parameters"] = {"rescale": "inv_keep"}
    assert resolved(recipe(rules=rules), "x").rescale is Rescale.INV_KEEP
    models = [{"model": "a", "parameters": {"weight": -1}, "fisher": "f"}]
    rules = [{"tensors": "x", "merge_method": "fisher"}]
    text = recipe(rules=rules, models=models)
    with pytest.raises(RecipeError, match=r"weight of fisher must be .*, not -1\.0 \(for x\)"):
        resolved(text, "x")


# --- files --------------------------------------------------------------------------------------


def test_load(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(TIES)
    made = Recipe.load(path)
    assert made == Recipe.load(str(path)) == Recipe.parse(TIES) and Recipe.load(made) is made
    path.write_text("mergemethod: ties")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert caught.value.problems[0].startswith(f"{path}: unknown key 'mergemethod'")
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        Recipe.load(path)
    path.write_text("#" * 2**21)
    with pytest.raises(RecipeError, match="a recipe may have"):
        Recipe.load(path)


@pytest.mark.parametrize("name", ["nothing.yml", ".", "a\0b"])
def test_a_file_that_cannot_be_read(name, tmp_path):
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.load(tmp_path / name)


def test_a_text_is_no_path():
    with pytest.raises(RecipeError, match=r"use Recipe\.parse"):
        Recipe.load(TIES)


# --- whatever is given --------------------------------------------------------------------------

WORDS = st.sampled_from(
    """
    merge_method base_model models slices sources parameters model layer_range rules tensors from
    missing drop weight density normalize lambda trim t rescale int8_mask filter value fisher path
    revision lora dtype out_dtype tokenizer_source seed shard_size union base float32 5GB skip error
    * a b a+b a@b ties linear slerp dare_ties fisher passthrough karcher
    """.split()  # noqa: SIM905
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS | WORDS
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | LEAVES, inner, max_size=4),
    max_leaves=25,
)
PARAMETERS = st.dictionaries(WORDS, TREES, max_size=4) | TREES
MODELS = st.lists(st.fixed_dictionaries({"model": WORDS}, optional={"parameters": PARAMETERS}))
RULES = st.lists(
    st.fixed_dictionaries(
        {"tensors": WORDS},
        optional={"merge_method": WORDS, "parameters": PARAMETERS, "from": WORDS, "drop": TREES},
    )
)
LIKELY = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(sorted(METHODS)), "models": MODELS | TREES},
    optional={"base_model": WORDS, "parameters": PARAMETERS, "rules": RULES | TREES},
)


@settings(deadline=None, max_examples=300)
@given(TREES | st.dictionaries(WORDS, TREES) | LIKELY)
def test_whatever_is_given_is_read_or_refused_in_words(tree):
    try:
        made = Recipe.parse(yaml.safe_dump(tree))
        for part in made.slices:
            method_for(made, part, "a", 0.5)
    except RecipeError as error:
        assert error.problems
        assert all(found and "\n" not in found for found in error.problems)


@given(
    st.sampled_from(sorted(name for name in METHODS if not METHODS[name].extras)),
    st.lists(st.floats(0.1, 1), min_size=1, max_size=4),
    PLACES,
)
def test_numbers_come_through_unchanged(name, numbers, t):
    info = METHODS[name]
    given = {item.key: numbers for item in info.parameters if item.kind is float}
    content = {"merge_method": name, "base_model": "b", "models": [{"model": "a"}]}
    made = Recipe.parse(yaml.safe_dump({**content, "parameters": given}))
    method = method_for(made, made.slices[0], "x", t)
    for item in info.parameters:
        if item.kind is float:
            value = getattr(method, item.name)
            expected = value_at(Gradient(tuple(numbers)), t)
            assert value == ((expected,) * len(value) if item.per_model else expected)


def test_many_tensors_do_not_take_long():
    """Bound is ten times what an idle machine takes: it guards the order of growth."""
    made = Recipe.parse(ruled("{tensors: '*.7.*', parameters: {density: [0.1, 0.9]}}"))
    names = [f"model.layers.{n // 450}.mlp.experts.{n % 450}.weight" for n in range(9_000)]
    begun = time.perf_counter()
    methods = {id(method_for(made, made.slices[0], name, 0.25)) for name in names}
    assert time.perf_counter() - begun < 2.0
    assert len(methods) == 2
