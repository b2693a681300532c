"""The recipes for training language models."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from modeling_encodec.training.lm_configuration import LMTrainingConfig, load_lm_config
from modeling_encodec.training.options import recipe_names


ROOT = Path(__file__).parents[1]


def test_recipes_load_and_take_overrides():
    assert recipe_names(LMTrainingConfig) == ["c16_debian", "paper"]
    for name in recipe_names(LMTrainingConfig):
        config = load_lm_config(name, seed=7, output="elsewhere")
        assert (config.seed, config.output) == (7, "elsewhere")
        assert bool(config.codes) != bool(config.corpora)
        assert config.validation or config.validation_codes
    with pytest.raises(ValueError, match="option 'mel_weight' does not exist"):
        load_lm_config("paper", mel_weight=1.0)


def test_the_papers_recipe_holds_the_papers_numbers():
    config = load_lm_config("paper")
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (5, 8, 200)
    assert (config.intermediate_size, config.context_seconds, config.segment_seconds) == (800, 3.5, 5.0)
    assert config.bandwidths == []  # all
    assert config.chance_of_two == config.chance_of_three == 0


def test_the_debian_recipe_names_what_its_commands_write():
    text = (LMTrainingConfig.recipes / "c16_debian.toml").read_text()
    commands = [line.removeprefix("#").split() for line in text.splitlines() if line.startswith("#     ")]
    config = load_lm_config("c16_debian")
    targets = [words[3] for words in commands if words[:2] == ["modeling-encodec", "tokenize"]]
    assert targets == [*config.codes, config.validation_codes]
    (made,) = [words[2] for words in commands if words[:2] == ["python", "-m"]]
    assert (ROOT / made.replace(".", "/")).with_suffix(".py").is_file()


def test_recipes_are_packaged():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for path in LMTrainingConfig.recipes.glob("*.toml"):
        name = path.relative_to(ROOT / "modeling_encodec" / "training").as_posix()
        globs = packaged["modeling_encodec.training"]
        assert any(fnmatch(name, glob) and name.count("/") == glob.count("/") for glob in globs), name
