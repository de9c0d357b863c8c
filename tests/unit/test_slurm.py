"""The processes that srun started, in torch.distributed's variables. The values are those of Slurm's manual."""

from __future__ import annotations

import pytest

from align.errors import InputError
from align.slurm import first_host, translate

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def told(environ: dict[str, str]) -> dict[str, str]:
    """What is added."""
    after = dict(environ)
    translate(after)
    assert after.items() >= environ.items()
    return {name: value for name, value in after.items() if name not in environ}


def test_a_task_of_several_knows_its_place() -> None:
    found = told(TASK)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "WORLD_SIZE": "16",
        "RANK": "11",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
    }
    assert "LOCAL_WORLD_SIZE" not in told(TASK | {"SLURM_STEP_NUM_TASKS": "15"})
    assert 20_000 <= port < 30_000
    assert told(TASK | {"SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)
    assert told(TASK | {"SLURM_STEP_ID": "3"})["MASTER_PORT"] != str(port)


def test_one_machine_needs_no_network() -> None:
    found = told(TASK | {"SLURM_STEP_NUM_NODES": "1"})
    assert (found["MASTER_ADDR"], found["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        TASK | {"WORLD_SIZE": "4"},  # torchrun, started by srun
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
    ],
)
def test_one_process_and_other_launchers_are_left_alone(environ: dict[str, str]) -> None:
    assert told(environ) == {}


def test_an_address_that_is_set_stays() -> None:
    assert "MASTER_ADDR" not in told(TASK | {"MASTER_ADDR": "10.0.0.7"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("a,b", "a"),
        ("rack[1-2]node[05,07]-ib", "rack1node05-ib"),
        ("big[12]", "big12"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_what_is_missing_is_named() -> None:
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"):
        with pytest.raises(InputError, match=f"{name} is not set; start it with torchrun"):
            translate({key: value for key, value in TASK.items() if key != name})
    with pytest.raises(InputError, match="SLURM_PROCID is 'x'"):
        translate(TASK | {"SLURM_PROCID": "x"})
    with pytest.raises(InputError, match="names no node; set MASTER_ADDR"):
        translate(TASK | {"SLURM_STEP_NODELIST": ""})
