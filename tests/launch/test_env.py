from pathlib import Path

import pytest

from clear_dist.launch import env

RANK_1_OF_4 = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert env.read({}) == env.Place(rank=0, local_rank=0, world_size=1, local_world_size=1, launcher=None)
    assert env.read({"RANK": "0"}) == env.Place()


def test_torchruns_variables() -> None:
    error_file = {"TORCHELASTIC_ERROR_FILE": "/logs/none_x/attempt_0/1/error.json"}
    place = env.read(RANK_1_OF_4 | error_file)
    assert (place.rank, place.world_size, place.local_world_size) == (1, 4, 2)
    assert place.launcher == "torchrun"
    assert place.failures == Path("/logs/none_x/attempt_0")


def test_our_own_variables_are_read_back() -> None:
    place = env.read(IN_A_STEP | env.variables(rank=2, size=3, port=1234, threads=5))
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (2, 2, 3, 3)
    assert place.launcher == "clear-dist"
    assert (place.threads, place.meeting) == (5, ("127.0.0.1", 1234))
    assert env.read(env.variables(rank=2, size=3, port=1234, threads=None)).threads is None


IN_A_STEP = {  # srun --nodes 2 --ntasks 3, its second machine
    "SLURM_JOB_ID": "81",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01,07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
IN_A_BATCH_SHELL = {  # sbatch --nodes 4 --ntasks-per-node 1
    "SLURM_JOB_ID": "200505",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "1(x4)",
    "SLURM_JOB_NODELIST": "gnode[10,20,25,37]",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
BY_OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-a-7@1",
}


def test_a_step_of_several_tasks() -> None:
    place = env.read(IN_A_STEP)
    assert (place.launcher, place.rank, place.world_size, place.hosts_meeting) == ("srun", 2, 3, False)
    assert (place.local_rank, place.local_world_size) == (0, 1)
    first = env.read(IN_A_STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert (first.hosts_meeting, first.local_world_size) == (True, 2)
    assert first.meeting == place.meeting is not None and place.meeting[0] == "gpu07"
    assert 20_000 <= place.meeting[1] < 30_000
    others = [env.read(IN_A_STEP | {name: "5"}).meeting for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    assert len({place.meeting, *others}) == 3
    given = env.read(IN_A_STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert given.meeting == ("10.0.0.1", 29500)
    bound = env.read(IN_A_STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_GPUS_PER_TASK": "1"})
    assert bound.local_world_size == 1, "it sees no GPU of another rank"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b[1-2]", "a"), ("n[001-015],b", "n001"), ("n[3,7-9]-ib", "n3-ib"), ("r[1-2]c[04,06]", "r1c04")],
)
def test_the_first_machine_of_a_step(nodes: str, first: str) -> None:
    meeting = env.read(IN_A_STEP | {"SLURM_STEP_NODELIST": nodes}).meeting
    assert meeting is not None and meeting[0] == first


def test_a_step_on_one_machine_meets_there() -> None:
    one = IN_A_STEP | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu07"}
    meeting = env.read(one).meeting
    assert meeting is not None and meeting[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "alone",
    [
        IN_A_BATCH_SHELL,
        IN_A_BATCH_SHELL | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell
        {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0"},
        BY_OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_shell_without_a_second_task_is_alone(alone: dict[str, str]) -> None:
    assert env.read(alone) == env.Place()


def test_mpirun() -> None:
    here = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    place = env.read(BY_OPEN_MPI | here)
    assert (place.launcher, place.rank, place.world_size, place.local_rank) == ("mpirun", 3, 4, 3)
    assert place.meeting is not None and place.meeting[0] == "127.0.0.1"
    with pytest.raises(ValueError, match="MASTER_ADDR must name the machine of rank 0"):
        env.read(BY_OPEN_MPI)
    # Within a job mpirun starts its daemons by srun, one task a machine.
    within = env.read(IN_A_STEP | BY_OPEN_MPI)
    assert (within.rank, within.world_size, within.local_world_size) == (3, 4, 2)
    assert within.meeting is not None and within.meeting[0] == "gpu07"
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert (env.read(hydra).rank, env.read(hydra).local_rank, env.read(hydra).world_size) == (1, 1, 2)
    bare = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    assert (env.read(bare).rank, env.read(bare).local_rank, env.read(bare).local_world_size) == (1, 1, 2)


def test_pmi_of_srun_does_not_know_machines() -> None:
    assert env.read(IN_A_STEP | {"PMI_RANK": "2", "PMI_SIZE": "3"}) == env.read(IN_A_STEP)


def test_torchrun_wins_over_the_step_that_started_it() -> None:
    assert env.read(IN_A_STEP | RANK_1_OF_4) == env.read(RANK_1_OF_4)


def test_torchruns_agent_is_met_or_rank_0() -> None:
    first = RANK_1_OF_4 | {"RANK": "0"}
    assert env.read(first).hosts_meeting
    assert not env.read(RANK_1_OF_4).hosts_meeting
    assert not env.read(first | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_meeting


def test_ranks_of_ones_own_win_over_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in IN_A_STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLEAR_DIST_ALONE", "")
    monkeypatch.delenv("CLEAR_DIST_ALONE")
    assert env.read_for(None).launcher == "srun"
    assert env.read_for(2) == env.Place()


@pytest.mark.parametrize(
    "wrong", [{"RANK": "4"}, {"RANK": "one"}, {"WORLD_SIZE": "-1"}, {"LOCAL_RANK": "²"}, {"MASTER_PORT": "x"}]
)
def test_nonsense_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"RANK|WORLD_SIZE|MASTER_PORT"):
        env.read(RANK_1_OF_4 | wrong)
