"""Configurations: they read back as they were written, and a mistake is named with file and key."""

import dataclasses
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradl1_fast.training import config, toml
from gradl1_fast.training.config import Config, Data, Model, Optimizer, Penalty, Training

EVERYTHING = Config(
    Data("cifar10", 'a "folder" with \\ and ä', 64, flip=True, crop=4),
    Model("resnet18", 8, "imagenet", per_channel=True, initialiser="he-normal"),
    Optimizer("sgd", 0.05, 0.85, 5e-4, 2),
    Training(9, 64, 4, 0.1, 0.999, 3, "bfloat16", True, True, True, 100),
    Penalty("gradl1", 3, 1, {"lambda_w": 1e-3, "every": 2, "scale": "none", "flag": True}),
)


@pytest.mark.parametrize("made", [Config(), EVERYTHING], ids=["defaults", "everything"])
def test_a_configuration_reads_back_as_it_was_written(made, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(made.to_toml(), encoding="utf-8")
    assert Config.read(path) == made


def test_everything_differs_from_the_defaults():
    for section in dataclasses.fields(Config):
        mine, default = getattr(EVERYTHING, section.name), getattr(Config(), section.name)
        for field in dataclasses.fields(mine):
            same = getattr(mine, field.name) == getattr(default, field.name)
            assert not same or (section.name, field.name) == ("penalty", "method")


@dataclasses.dataclass(frozen=True)
class Sample:
    text: str = ""
    number: float = 0.0
    whole: int = 0
    table: dict = dataclasses.field(default_factory=dict)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS, st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1), st.dictionaries(TEXTS, TEXTS))
def test_any_text_and_number_reads_back(text, number, whole, table):
    sample = Sample(text, number, whole, table)
    assert msgspec.toml.decode(toml.dumps(sample)) == dataclasses.asdict(sample)


@pytest.mark.parametrize("name", config.recipes())
def test_each_recipe_is_a_configuration(name):
    made = Config.read(config.recipe(name))
    assert name.startswith(made.data.name)


def test_the_example_in_the_documentation_is_a_configuration(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (tmp_path / "my.toml").write_text(page.split("```toml")[1].split("```")[0])
    assert Config.read(tmp_path / "my.toml").penalty.warmup_epochs == 2


def test_the_recipe_for_digits_is_the_default():
    assert Config.read(config.recipe("digits")) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training\n", "not a TOML file"),
        ("[trainin]\n", "unknown key 'trainin'; allowed are data, model, optimizer, training, penalty"),
        ("[training]\nepoch = 3\n", "training: unknown key 'epoch'; allowed are epochs, batch_size"),
        ("training = 3\n", "training: Expected `object`, got `int`"),
        ("[training]\nepochs = 3.0\n", "training.epochs: Expected `int`, got `float`"),
        ("[training]\nepochs = true\n", "training.epochs: Expected `int`, got `bool`"),
        ("[training]\nepochs = 0\n", "training: epochs must be 1 or more, got 0"),
        ("[training]\nbatch_size = 9\naccumulate = 2\n", "batch_size must be a multiple of accumulate, 2"),
        ("[training]\nema = 1.0\n", "ema must be from 0 to less than 1"),
        ("[training]\nseed = -1\n", "seed must be 0 or more"),
        (f"[training]\nseed = {2**63}\n", "seed must be less than 2\\*\\*63"),
        ("data = " + "[" * 10000, "not a TOML file"),
        ("data.name" + ".a" * 3000 + " = 1", "data.name: Expected `str`, got `object`"),
        (f"[model]\nwidth = '{'a' * 1000}'\n", r"model.width: Expected `int \| null`, got `str`$"),
        ('[training]\nprecision = "half"\n', "precision must be one of 'float32', 'bfloat16', 'float16'"),
        ("[training]\ncompile = 1\n", "training.compile: Expected `bool`, got `int`"),
        ("[data]\nname = 3\n", "data.name: Expected `str`, got `int`"),
        ("[data]\ncrop = -1\n", "crop must be 0 or more"),
        ("[model]\nwidth = 0\n", "model: width must be 1 or more"),
        ("[optimizer]\nname = 'lion'\n", "name must be one of 'sgd', 'adam', 'adamw', got 'lion'"),
        ("[optimizer]\nlearning_rate = 0\n", "learning_rate must be more than 0"),
        ("[optimizer]\nlearning_rate = nan\n", "learning_rate must be finite"),
        ("[optimizer]\nlearning_rate = '1e-2'\n", "optimizer.learning_rate: Expected `float`, got `str`"),
        (
            "[optimizer]\nwarmup_epochs = 20\n",
            "optimizer.warmup_epochs must be less than training.epochs, 20",
        ),
        ("[penalty]\nepochs = 21\n", "penalty.epochs must be at most training.epochs, 20, got 21"),
        ("[penalty]\nwarmup_epochs = 11\n", "penalty.warmup_epochs must be at most penalty.epochs, 10"),
        (
            "[penalty]\nsettings = { a = [1] }\n",
            r"penalty.settings\[...\]: Expected `bool \| int",
        ),
    ],
)
def test_a_mistake_is_named_with_file_and_key(text, message, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(toml.SettingsError, match=message) as error:
        Config.read(path)
    assert str(error.value).startswith(str(path))


def test_a_file_of_bytes_is_no_configuration(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(toml.SettingsError, match="not a TOML file"):
        Config.read(path)


def test_a_whole_number_serves_where_a_number_is_asked_for(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[optimizer]\nlearning_rate = 1\n")
    rate = Config.read(path).optimizer.learning_rate
    assert (rate, type(rate)) == (1.0, float)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match=r"one of digits, fashion-mnist.*got 'mnist'"):
        config.recipe("mnist")
    assert str(config.recipe("my.toml")) == "my.toml"


@pytest.mark.parametrize("missing", ["msgspec", "tomli_w"])
def test_without_its_packages_says_what_to_install(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "a.toml").touch()
    with pytest.raises(ImportError, match=r"pip install '\.\[train\]'"):
        toml.read(tmp_path / "a.toml")
