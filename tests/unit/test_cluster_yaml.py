"""cluster.yaml against Ray's own schema, and against this repository: what it copies, installs and names must exist.

The only unit tests that import Ray, for its schema code and its command line; nothing is started, no cloud is asked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.distributed.placement import ClusterResources, compute_layout

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
COMMENTS = "\n".join(line.strip().lstrip("# ") for line in TEXT.splitlines() if line.strip().startswith("#"))
COMMAND_LISTS = (
    "initialization_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)

Config = dict[str, Any]


def shipped() -> Config:
    config: Config = yaml.safe_load(TEXT)
    return config


def as_ray_reads_it(config: Config) -> Config:
    """Defaults filled in, common setup commands merged into those of head and workers; invalid files raise."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: Config = prepare_config(config)
    validate_config(prepared)
    return prepared


def variant(name: str) -> Config:
    """The shipped file with the commented block `# NAME| ...` in place of the settings of the same names."""
    marked = [
        line.removeprefix(f"# {name}| ") for line in TEXT.splitlines() if line.startswith(f"# {name}| ")
    ]
    config = shipped()
    if name == "local":
        del config["available_node_types"], config["head_node_type"]
    return config | yaml.safe_load("\n".join(marked))


def commands(config: Config) -> Iterator[str]:
    """Every shell command that Ray would run."""
    for key in COMMAND_LISTS:
        yield from config[key]


def test_the_shipped_file_is_valid_for_ray() -> None:
    prepared = as_ray_reads_it(shipped())
    assert prepared["provider"]["type"] == "aws"


@pytest.mark.parametrize(("name", "provider"), [("local", "local"), ("gcp", "gcp"), ("s3", "aws")])
def test_the_variants_in_its_comments_are_valid_for_ray(name: str, provider: str) -> None:
    prepared = as_ray_reads_it(variant(name))
    assert prepared["provider"]["type"] == provider
    assert prepared["head_node_type"] in prepared["available_node_types"]


def half_a_gpu(config: Config) -> None:
    config["available_node_types"]["gpu_worker"]["resources"]["GPU"] = 0.5


def unknown_head(config: Config) -> None:
    config["head_node_type"] = "gpu_head"


def unknown_key(config: Config) -> None:
    config["head_setup_command"] = []


def more_workers_than_allowed(config: Config) -> None:
    config["max_workers"] = 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (half_a_gpu, "0.5 is not of type 'integer'"),
        (unknown_head, "head_node_type"),
        (unknown_key, "head_setup_command"),
        (more_workers_than_allowed, "max_workers"),
    ],
)
def test_a_spoilt_file_is_refused(spoil: Callable[[Config], None], said: str) -> None:
    config = shipped()
    spoil(config)
    with pytest.raises(Exception, match=re.escape(said)):
        as_ray_reads_it(config)


def test_what_is_copied_to_the_machines_exists_here() -> None:
    sources = {ROOT / source for source in shipped()["file_mounts"].values()} - {ROOT / ".git"}
    assert [str(source) for source in sources if not source.exists()] == []


def test_a_run_on_the_cluster_can_tell_its_commit_and_whether_it_was_changed() -> None:
    # Without .gitignore every __pycache__ would count as a change.
    assert {"~/bim/.git", "~/bim/.gitignore"} <= set(shipped()["file_mounts"])


def test_all_packages_of_this_project_are_copied_and_installed_on_every_machine() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.split(".")[1] for name in project["tool"]["setuptools"]["packages"]}
    needed = packages | {"pyproject.toml", project["project"]["readme"]}
    prepared = as_ray_reads_it(shipped())
    copied = {target.removeprefix("~/bim/") for target in prepared["file_mounts"]}
    assert needed <= copied
    for machine in ("head", "worker"):
        installs = [
            c for c in prepared[f"{machine}_setup_commands"] if "pip install" in c and "~/bim[s3] " in c
        ]
        assert len(installs) == 1
        assert "--editable" in installs[0]


def test_workers_get_the_versions_and_the_token_of_the_head() -> None:
    config = shipped()
    head = " ; ".join(config["head_setup_commands"])
    assert "~/bim-versions.txt" in config["cluster_synced_files"]
    assert "pip freeze --exclude-editable > ~/bim-versions.txt" in head
    assert "~/.ray/auth_token" in config["cluster_synced_files"]
    assert "ray get-auth-token --generate" in head


def test_every_block_of_the_large_recipe_gets_a_gpu_of_its_own() -> None:
    config = shipped()
    settings = load_settings(["--recipe", "vit_base_imagenet", "--data.source", "digits"])
    types = config["available_node_types"].values()
    have = {
        kind: sum(t.get("min_workers", 1) * t["resources"].get(kind, 0) for t in types)
        for kind in ("CPU", "GPU")
    }
    layout = compute_layout(settings.num_blocks, ClusterResources(have["CPU"], have["GPU"]))
    assert layout.stage_blocks == tuple((k,) for k in range(settings.num_blocks))
    assert layout.gpus == 1.0
    assert layout.loader_cpus >= 1.0


def test_no_stage_may_land_on_the_head() -> None:
    assert shipped()["available_node_types"]["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("config", [shipped(), variant("s3")], ids=["shipped", "s3"])
def test_every_shell_command_can_be_parsed(config: Config) -> None:
    for command in commands(as_ray_reads_it(config)):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def run_with_stubs(command: str, folder: Path, **stubs: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command with scripts in place of programs; each gets its own arguments."""
    for name, script in stubs.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    environment = {"HOME": str(folder), "PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("routes", "exported"),
    [
        (
            "172.31.16.0/20 src 172.31.20.5 metric 100",
            "/shared 172.31.16.0/20(rw,sync,no_subtree_check)\n",
        ),
        ("", None),
    ],
)
def test_the_head_serves_its_folder_to_its_subnet_alone(
    routes: str, exported: str | None, tmp_path: Path
) -> None:
    (command,) = (c for c in shipped()["head_setup_commands"] if "exports" in c)
    done = run_with_stubs(
        command,
        tmp_path,
        mountpoint="exit 1",
        sudo=f"case $1 in tee) cat > {tmp_path}/bim.exports;; esac",
        ip=f"""case "$*" in
            "-4 route show default") echo default via 172.31.16.1 dev ens5 proto dhcp src 172.31.20.5 metric 100;;
            "-4 route show dev ens5 proto kernel scope link") echo {routes};;
        esac""",
    )
    file = tmp_path / "bim.exports"
    assert (file.read_text() if file.exists() else None) == exported
    assert (done.returncode == 0) == (exported is not None)
    if exported is None:
        assert "this machine has no subnet to serve /shared to" in done.stderr


def test_without_nfs_nothing_is_served_or_mounted() -> None:
    assert [c for c in commands(variant("s3")) if "exports" in c or "mount" in c] == []


@pytest.mark.filterwarnings("ignore")  # of Ray Serve, which Ray's command line imports
def test_every_ray_command_and_option_that_is_named_exists() -> None:
    from ray.scripts.scripts import cli

    named = re.findall(
        r"(?:^|[;`] ?|=0 )ray ([a-z-]+)([^;`'\n]*)", "\n".join([COMMENTS, *commands(shipped())]), re.M
    )
    assert {name for name, _ in named} >= {
        "up",
        "submit",
        "exec",
        "attach",
        "down",
        "start",
        "stop",
        "dashboard",
    }
    for name, rest in named:
        assert name in cli.commands, f"ray {name}"
        options = {option for parameter in cli.commands[name].params for option in parameter.opts}
        given = re.findall(r"(?<=\s)--[a-z-]+", rest.split(" -- ")[0])
        assert set(given) <= options, f"ray {name} {rest}"


def test_scripts_recipes_and_settings_that_its_comments_name_exist() -> None:
    scripts = set(re.findall(r"pipelines/\w+\.py", TEXT))
    assert scripts == {"pipelines/bim_pipeline.py"}
    assert all((ROOT / script).is_file() for script in scripts)
    example = re.search(r"bim_pipeline\.py -- (.*?\\\n.*)$", COMMENTS, re.M)
    assert example is not None
    settings = load_settings(shlex.split(example[1].replace("\\\n", " ")))
    assert settings.data.source == "data/photos"
    assert settings.placement.wait_s > 600


def test_setting_a_machine_up_twice_leaves_one_line_in_its_shell_profile(tmp_path: Path) -> None:
    profile = tmp_path / ".bashrc"
    profile.write_text("# the user's own\n", encoding="utf-8")
    shell = [command for command in shipped()["setup_commands"] if "bim-shell.sh" in command]
    for command in shell * 2:
        subprocess.run(
            ["bash", "-c", command], check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        )
    assert profile.read_text(encoding="utf-8") == "# the user's own\n. ~/bim-shell.sh\n"
    show = ["bash", "-c", ". ~/.bashrc; echo $PATH $RAY_ADDRESS $RAY_AUTH_MODE"]
    said = subprocess.run(
        show, check=True, capture_output=True, text=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin"}
    )
    assert said.stdout.split() == [f"{tmp_path}/venv/bin:/usr/bin", "auto", "token"]
