import pytest

from s2ft_ray.errors import ConfigError
from s2ft_ray.registry import ModelRef, check_alias, parse_ref


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("acme.support-bot", ModelRef("acme.support-bot")),
        ("acme.support-bot@champion", ModelRef("acme.support-bot", alias="champion")),
        ("acme.support-bot:3", ModelRef("acme.support-bot", version=3)),
        ("models:/acme.support-bot@Blue_2", ModelRef("acme.support-bot", alias="Blue_2")),
        ("models:/acme.support-bot/12", ModelRef("acme.support-bot", version=12)),
        ("models:/acme.support-bot", ModelRef("acme.support-bot")),
    ],
)
def test_a_reference_is_read_in_both_forms(text: str, ref: ModelRef) -> None:
    assert parse_ref(text) == ref


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".acme",
        "acme",
        "acme@x",
        "acme.",
        "a.b.c",
        "Acme.bot",
        "acme.bot\n",
        "acme.-bot",
        "acme.bot@",
        "acme.bot@x@y",
        "acme.bot@x:3",
        "acme.bot:3@x",
        "acme.bot:0",
        "acme.bot:03",
        "acme.bot:-1",
        "acme.bot:three",
        "acme.bot@latest",
        "acme.bot@v7",
        "models:/acme.bot/3/extra",
        "models:/acme.bot/Production",
        "models:/m-0123456789abcdef",
        "acme.bot:١",
        "acme.bot@ß",
        "../acme.bot",
        "acme.bot' OR name LIKE '%",
    ],
)
def test_what_could_not_be_a_registered_adapter_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_ref(text)
    assert len(caught.value.faults) == 1
    assert repr(text) in str(caught.value)


def test_a_reference_prints_as_it_is_written() -> None:
    for text in ("acme.bot", "acme.bot@blue", "acme.bot:3"):
        assert str(parse_ref(text)) == text


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V20"])
def test_an_alias_that_mlflow_reserves_is_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match="reserved by MLflow"):
        check_alias(alias)
