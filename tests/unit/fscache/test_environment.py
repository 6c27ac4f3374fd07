"""What the environment and Docker's configuration add to a backend's."""

import base64
import json
import stat
from pathlib import Path

import pytest
from fakes.registry import AUTH, PASSWORD, USER

from fscache.backend import Credentials, HttpProxyConfig, LocalFsConfig, RegistryConfig
from fscache.backend.dockerauth import docker_credentials
from fscache.config import ConfigError
from fscache.environment import with_environment

ROBOT = Credentials(USER, PASSWORD)
PLAIN = RegistryConfig("reg.example:5000", "r")


def encoded(text):
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("text", ["", "x", encoded("nocolon"), encoded(":p"), "!!!!", "ä"])
def test_credentials_that_are_none(text):
    with pytest.raises(ValueError, match="base64 of user:password"):
        Credentials.from_base64(text)


def test_credentials_both_ways():
    found = Credentials.from_base64(encoded("us er:pa:ß"))
    assert (found.username, found.password) == ("us er", "pa:ß")
    assert found.basic == f"Basic {encoded('us er:pa:ß')}"


def test_headers():
    environment = {"NYDUS_HEADER_X-Team": "blue", "NYDUS_HEADER_y": "", "PATH": "/bin"}
    for config in (PLAIN, HttpProxyConfig("http://x")):
        assert with_environment(config, environment).headers == {"X-Team": "blue", "y": ""}
    local = LocalFsConfig(dir=Path("/"))
    assert with_environment(local, environment) is local


@pytest.mark.parametrize("variable", ["NYDUS_HEADER_", "NYDUS_HEADER_a b", "NYDUS_HEADER_a:"])
def test_headers_that_are_none(variable):
    with pytest.raises(ConfigError, match="NYDUS_HEADER_"):
        with_environment(PLAIN, {variable: "x"})
    with pytest.raises(ConfigError) as caught:
        with_environment(PLAIN, {"NYDUS_HEADER_x": "secret\r\ninjected: yes"})
    assert "secret" not in str(caught.value)


def test_pull_auth_replaces_auth(tmp_path):
    config = RegistryConfig("h", "r", credentials=Credentials("a", "b"))
    assert with_environment(config, {}).credentials == Credentials("a", "b")
    assert with_environment(config, {"IMAGE_PULL_AUTH": AUTH}).credentials == ROBOT
    with pytest.raises(ConfigError, match="IMAGE_PULL_AUTH") as caught:
        with_environment(config, {"IMAGE_PULL_AUTH": "s3cret!"})
    assert "s3cret" not in str(caught.value)


def docker(directory, **config):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))


def test_docker_is_asked_last(tmp_path):
    docker(tmp_path / ".docker", auths={"reg.example:5000": {"auth": AUTH}})
    docker(tmp_path / "other", auths={"reg.example:5000": {"auth": encoded("x:y")}})
    home = {"HOME": str(tmp_path)}
    assert with_environment(PLAIN, home).credentials == ROBOT
    named = {**home, "DOCKER_CONFIG": str(tmp_path / "other")}
    assert with_environment(PLAIN, named).credentials == Credentials("x", "y")
    with_token = RegistryConfig("reg.example:5000", "r", registry_token="t")
    assert with_environment(with_token, home).credentials is None
    own = RegistryConfig("reg.example:5000", "r", credentials=Credentials("a", "b"))
    assert with_environment(own, home).credentials == Credentials("a", "b")
    assert with_environment(RegistryConfig("elsewhere", "r"), home).credentials is None


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("reg.example", "reg.example"),
        ("reg.example", "https://reg.example"),
        ("reg.example:1", "http://reg.example:1/v2/"),
        ("docker.io", "https://index.docker.io/v1/"),
        ("registry-1.docker.io", "https://index.docker.io/v1/"),
    ],
)
def test_names_of_hosts(tmp_path, host, name):
    docker(tmp_path, auths={"other": {"auth": encoded("x:y")}, name: {"auth": AUTH}})
    assert docker_credentials(tmp_path, host) == ROBOT


@pytest.mark.parametrize(
    "entry", [{}, {"auth": "!!!"}, {"auth": 3}, {"identitytoken": 3}, [], None, "x"]
)
def test_entries_that_are_none(tmp_path, entry, caplog):
    docker(tmp_path, auths={"h": entry})
    assert docker_credentials(tmp_path, "h") is None
    assert "!!!" not in caplog.text
    assert "t0k" not in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"auths": 3}', "\x00", "[" * 100_000])
def test_files_that_are_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert docker_credentials(tmp_path, "h") is None


def test_user_and_password_apart(tmp_path):
    docker(tmp_path, auths={"h": {"username": USER, "password": PASSWORD}})
    assert docker_credentials(tmp_path, "h") == ROBOT


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """Return a function that puts a credential helper on the PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def make(name, script):
        path = programs / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


ANSWER = f'\'{{"ServerURL":"x","Username":"{USER}","Secret":"{PASSWORD}"}}\''


def test_helper_of_the_host_comes_first(tmp_path, helper):
    helper("one", f'read host; test "$1/$host" = get/h && echo {ANSWER}')
    helper("all", """echo '{"Username":"all","Secret":"x"}'""")
    docker(tmp_path, credHelpers={"h": "one"}, credsStore="all")
    assert docker_credentials(tmp_path, "h") == ROBOT
    assert docker_credentials(tmp_path, "other") == Credentials("all", "x")


def test_helper_for_docker_hub(tmp_path, helper):
    helper("all", f'read host; test "$host" = https://index.docker.io/v1/ && echo {ANSWER}')
    docker(tmp_path, credsStore="all")
    assert docker_credentials(tmp_path, "docker.io") == ROBOT


@pytest.mark.parametrize(
    "script",
    ["echo s3cr3t >&2; exit 1", "echo s3cr3t", "echo '[]'", """echo '{"Username":"u"}'""",
     """echo '{"Username":"","Secret":"s3cr3t"}'"""],
)  # fmt: skip
def test_helpers_without_an_answer(tmp_path, helper, script, caplog, capfd):
    caplog.set_level("DEBUG")
    helper("bad", script)
    docker(tmp_path, credsStore="bad", auths={"h": {"auth": AUTH}})
    assert docker_credentials(tmp_path, "h") == ROBOT
    assert "s3cr3t" not in caplog.text + "".join(capfd.readouterr())


def test_identity_tokens(tmp_path, helper):
    """They come instead of a password, in the file or by a helper."""
    wanted = Credentials("<token>", "", "t0k3n")
    docker(tmp_path, auths={"h": {"auth": AUTH, "identitytoken": "t0k3n"}})
    assert docker_credentials(tmp_path, "h") == wanted
    assert "t0k3n" not in repr(wanted)
    helper("all", """echo '{"Username":"<token>","Secret":"t0k3n"}'""")
    docker(tmp_path, credsStore="all")
    assert docker_credentials(tmp_path, "h") == wanted


def test_helper_that_hangs(tmp_path, helper, monkeypatch):
    monkeypatch.setattr("fscache.backend.dockerauth.HELPER_SECONDS", 0.1)
    helper("slow", "exec sleep 60")
    docker(tmp_path, credsStore="slow")
    assert docker_credentials(tmp_path, "h") is None


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "", "-x", "missing"])
def test_helpers_that_cannot_be_run(tmp_path, helper, name):
    docker(tmp_path, credsStore=name)
    assert docker_credentials(tmp_path, "h") is None
