"""Tenants and API keys in a real SQLite file."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from s2ft_ray import cli
from s2ft_ray.accounts import Accounts, Principal, Tenant
from s2ft_ray.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def accounts(home: Path) -> Iterator[Accounts]:
    accounts = Accounts(f"sqlite:///{home / 'scheduler.db'}")
    yield accounts
    accounts.close()


def test_a_tenant_is_added_changed_and_read_back(accounts: Accounts, home: Path) -> None:
    assert accounts.set_tenant("acme", weight=2.0) == Tenant(name="acme", weight=2.0)
    accounts.set_tenant("acme", max_workers=8, data_roots=["/data/acme", "s3://acme"])
    again = Accounts()
    assert (home / "scheduler.db").is_file()
    found = again.tenant("acme")
    again.close()
    assert (found.weight, found.max_workers) == (2.0, 8)
    assert found.data_roots == ("/data/acme", "s3://acme")
    assert accounts.set_tenant("acme", max_workers=None).max_workers is None
    assert [tenant.name for tenant in accounts.tenants()] == ["acme"]


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("Acme", {}, "name"),
        ("acme", {"weight": 0}, "weight"),
        ("acme", {"weight": float("nan")}, "weight"),
        ("acme", {"quota": -1}, "quota"),
        ("acme", {"max_workers": 0}, "max_workers"),
        ("acme", {"data_roots": ["data"]}, "data_roots.0: 'data' is neither"),
        ("acme", {"wieght": 1}, "wieght"),
    ],
)
def test_a_value_that_cant_be_is_refused_and_changes_nothing(
    accounts: Accounts, name: str, changes: dict, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        accounts.set_tenant(name, **changes)
    assert accounts.tenants() == []


def test_an_unknown_tenant_is_told_with_the_nearest_and_the_way_out(accounts: Accounts) -> None:
    accounts.set_tenant("acme")
    with pytest.raises(ConfigError, match=r"acne: unknown; did you mean acme\? s2ft tenants set"):
        accounts.tenant("acne")


def test_everybody_is_a_tenant_until_an_operator_sets_one(accounts: Accounts) -> None:
    assert accounts.welcome("first") == Tenant(name="first")
    assert accounts.welcome("second") == Tenant(name="second")
    accounts.set_tenant("second", weight=3.0)
    assert accounts.welcome("second").weight == 3.0
    assert accounts.welcome("first").weight == 1.0
    with pytest.raises(ConfigError, match="third: unknown"):
        accounts.welcome("third")


def test_a_key_stands_for_its_tenant_until_it_is_revoked(accounts: Accounts) -> None:
    accounts.set_tenant("acme")
    new = accounts.create_key("acme")
    assert accounts.authenticate(new.secret) == Principal(new.key.id, "acme", False)
    first = accounts.revoke_key(new.key.id)
    assert accounts.authenticate(new.secret) is None
    assert accounts.revoke_key(new.key.id) == first
    assert [key.id for key in accounts.keys("acme")] == [new.key.id]


def test_an_operators_key_needs_no_tenant(accounts: Accounts) -> None:
    principal = accounts.authenticate(accounts.create_key(None, operator=True).secret)
    assert principal is not None
    assert principal.is_operator
    assert principal.tenant is None


def test_a_secret_is_in_no_file_and_in_no_repr(accounts: Accounts, home: Path) -> None:
    new = accounts.create_key(None, operator=True)
    secret = new.secret.split("-", 2)[2]
    for path in home.iterdir():
        assert secret.encode() not in path.read_bytes()
    assert secret not in repr(new)


@pytest.mark.parametrize(
    "form", ["", "s2ft", "sk-0123-abc", "s2ft--", "s2ft-ü-x", "s2ft-{id}-wrong"]
)
def test_what_is_no_live_key_stands_for_nobody(accounts: Accounts, form: str) -> None:
    key_id = accounts.create_key(None, operator=True).key.id
    assert accounts.authenticate(form.format(id=key_id)) is None


def test_a_key_of_nobody_or_of_an_unknown_tenant_is_refused(accounts: Accounts) -> None:
    with pytest.raises(ConfigError, match="needs a tenant"):
        accounts.create_key(None)
    with pytest.raises(ConfigError, match="ghost: unknown"):
        accounts.create_key("ghost")
    with pytest.raises(ConfigError, match="there is none"):
        accounts.revoke_key("0123")


def test_writers_of_two_processes_take_turns(accounts: Accounts) -> None:
    other = Accounts()

    def write(to: Accounts, first: int) -> None:
        for i in range(20):
            to.set_tenant(f"t{first + i}")

    threads = [threading.Thread(target=write, args=args) for args in ((accounts, 0), (other, 20))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert len(accounts.tenants()) == 40


def test_tables_of_a_newer_version_are_left_alone(home: Path) -> None:
    Accounts().close()
    with sqlite3.connect(home / "scheduler.db") as file:
        file.execute("UPDATE s2ft_alembic_version SET version_num = '9999'")
    file.close()
    with pytest.raises(ConfigError, match="revision 9999, newer than this package knows"):
        Accounts()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("no url", "no SQLAlchemy URL"),
        ("postgresql+psycopg://nobody:hidden@127.0.0.1:1/none", "can't be opened"),
        ("sqlite:////proc/none.db", "can't be opened"),
        ("sqlite:////proc/no/folder.db", "can't be opened"),
    ],
)
def test_a_database_that_cant_be_opened_is_told_without_its_password(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        Accounts(url)
    assert "hidden" not in str(error.value)


@pytest.mark.usefixtures("home")
def test_the_command_line_sets_lists_and_revokes(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tenants", "set", "acme", "--weight", "2", "--max-workers", "4", "--data-root", "/d"]
    assert cli.main(argv) == 0
    assert cli.main(["tenants", "set", "acme", "--max-workers", "none"]) == 0
    capsys.readouterr()
    assert cli.main(["tenants", "list", "--json"]) == 0
    (tenant,) = json.loads(capsys.readouterr().out)
    assert tenant == Tenant(name="acme", weight=2, data_roots=("/d",)).model_dump(mode="json")
    assert cli.main(["keys", "create", "--tenant", "acme"]) == 0
    secret = capsys.readouterr().out.strip()
    assert cli.main(["keys", "list", "--json"]) == 0
    (key,) = json.loads(capsys.readouterr().out)
    assert key["tenant"] == "acme"
    assert secret.split("-", 2)[2] not in json.dumps(key)
    assert cli.main(["keys", "revoke", key["id"]]) == 0
    assert cli.main(["keys", "list"]) == 0
    assert cli.main(["tenants", "list"]) == 0
    assert cli.main(["keys", "create", "--tenant", "ghost"]) == 2
