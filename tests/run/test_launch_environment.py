"""Launches whose ranks would not find each other are refused before anything slow happens."""

from __future__ import annotations

import pytest

from offload_sparse.run.launch import check_environment

RENDEZVOUS = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2", **RENDEZVOUS}])
def test_one_process_and_complete_rendezvous_are_accepted(environment: dict[str, str]) -> None:
    check_environment(environment)


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "ACCELERATE_USE_CPU=true accelerate launch"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "accelerate launch per node"),
        ({"PMI_SIZE": "2"}, "accelerate launch per node"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "accelerate launch per node"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_ranks_that_cannot_find_each_other_are_told_what_to_run(
    environment: dict[str, str], advice: str
) -> None:
    with pytest.raises(ValueError, match=advice) as error:
        check_environment(environment)
    assert "\n" not in str(error.value)
