"""The launch scripts: what they print, and what they do with programs that stand in for SLURM and gcloud."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml
from grids import exhaustive, grid, quick

from clipmoe_jax.data.parts import Part

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
TPU_POD = ["--name=l14", "--zone=z", "--type=v5p-512", "--runtime=v2-alpha-tpuv5"]


def run(script, *arguments, **env):
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=60)


def stand_in(folder, name, text):
    """A program of this name, first on the PATH that is returned."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    command = [pathlib.Path(sys.executable).parent / "shellcheck", "--external-sources", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["node.sh", "tpu_pod.sh", "slurm.sbatch"])
def test_help_is_the_comment_at_the_top(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert "clipmoe_jax.main" in done.stdout and "set -euo" not in done.stdout and "# " not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("node.sh", ["--config=a"], "unknown argument '--config=a'"),
        ("node.sh", [], "--platform is missing"),
        ("node.sh", ["--platform=npu"], "platform 'npu' is not known: choose tpu, gpu or cpu"),
        ("tpu_pod.sh", ["--name=a", "--zone=b"], "--type is missing"),
    ],
)
def test_wrong_arguments_are_refused_with_code_2(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_dry_runs_print_the_commands_with_the_users_arguments():
    config = ["--config=configs/demo.py", "--workdir=two words"]
    node = run("node.sh", "--platform=gpu", "--dry-run", "--", *config, XLA_FLAGS="--xla_mine=1").stdout
    assert re.search(r"XLA_FLAGS=--xla_gpu\S*latency\S*\\ --xla_mine=1", node)  # the user's comes last
    assert node.rstrip().endswith(r"-m clipmoe_jax.main --config=configs/demo.py --workdir=two\ words")
    slurm = run("slurm.sbatch", "--dry-run", *config).stdout
    assert "srun --kill-on-bad-exit=1" in slurm and slurm.rstrip().endswith(r"--workdir=two\ words")
    lines = run("tpu_pod.sh", *TPU_POD, "--spot", "--dry-run", "--", *config).stdout.splitlines()
    assert lines[0].startswith("gcloud compute tpus queued-resources create l14") and "--spot" in lines[0]
    assert "--worker=all" in lines[-2] and "clipmoe_jax.main" not in lines[-2] and "node.sh" in lines[-2]
    assert "queued-resources delete l14" in lines[-1]


def test_installed_jaxlib_knows_the_gpu_flags():
    flags = subprocess.run(
        ["bash", "-c", "source launch/xla_flags.sh && set_xla_flags gpu && echo $XLA_FLAGS"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
    ).stdout.strip()
    assert "latency_hiding" in flags
    for given, fine in ((flags, True), ("--xla_gpu_no_such_flag=true", False)):
        done = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            capture_output=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": given},
        )
        assert (done.returncode == 0) == fine, given


def test_preempted_run_starts_again(tmp_path):
    path = stand_in(
        tmp_path, "run", f'echo "$@" >> {tmp_path}/log; [[ $(wc -l < {tmp_path}/log) == 3 ]] || exit 75'
    )
    done = run("node.sh", "--platform=cpu", "--", "--config=x", PYTHON=f"{tmp_path}/run", PATH=path)
    assert done.returncode == 0
    assert (tmp_path / "log").read_text() == 3 * "-m clipmoe_jax.main --config=x\n"


@pytest.mark.parametrize(("code", "starts"), [(75, 2), (1, 1), (134, 1)])
def test_other_codes_and_too_many_restarts_end_node_sh(tmp_path, code, starts):
    stand_in(tmp_path, "run", f"echo started >> {tmp_path}/log; exit {code}")
    done = run("node.sh", "--platform=cpu", "--restarts=1", PYTHON=f"{tmp_path}/run")
    assert done.returncode == code
    assert (tmp_path / "log").read_text() == starts * "started\n"


def test_sigterm_to_node_sh_reaches_the_run_and_ends_both(tmp_path):
    text = f"trap 'sleep 0.5; exit 75' TERM; echo started >> {tmp_path}/log; while :; do sleep 0.1; done"
    stand_in(tmp_path, "run", text)
    command = ["bash", str(LAUNCH / "node.sh"), "--platform=cpu"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHON": f"{tmp_path}/run"})
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "log").read_text() == "started\n"


def test_run_that_ends_before_it_is_looked_at_keeps_its_code(tmp_path):
    """A run may end between the signal and what node.sh does next; the shell is slow here, so it does."""
    slow = 'kill() { builtin kill "$@"; local code=$?; /bin/sleep 0.5; return $code; }'
    (tmp_path / "slow").write_text(slow)
    stand_in(
        tmp_path, "run", f"trap 'exit 75' TERM; echo started >> {tmp_path}/log; while :; do sleep 0.1; done"
    )
    command = ["bash", str(LAUNCH / "node.sh"), "--platform=cpu"]
    environment = os.environ | {"PYTHON": f"{tmp_path}/run", "BASH_ENV": f"{tmp_path}/slow"}
    process = subprocess.Popen(command, env=environment)
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "log").read_text() == "started\n"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_slurm_queues_a_preempted_job_again(tmp_path, code, requeued):
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/requeued')
    path = stand_in(tmp_path, "srun", f"[[ $SRUN_CPUS_PER_TASK == 7 ]] || exit 9; exit {code}")
    job = {"SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = run("slurm.sbatch", "--config=x", PATH=path, **job)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 12\n"


def test_slurm_finds_the_repository_from_any_folder(tmp_path):
    """SLURM runs a copy of the script; arguments are still relative to the folder that it is called in."""
    (tmp_path / "spool").mkdir()
    copy = tmp_path / "spool" / "slurm_script"
    copy.write_text((LAUNCH / "slurm.sbatch").read_text())
    stand_in(tmp_path, "scontrol", f'echo "JobId=$3"; echo "   Command={LAUNCH}/slurm.sbatch --config=x"')
    path = stand_in(tmp_path, "srun", f'echo "$PWD $PYTHONPATH $XLA_FLAGS $*" > {tmp_path}/started')
    job = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": path, "PYTHONPATH": ""}
    command = ["bash", str(copy), "--config=x", "--workdir=runs/x"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, found, *_ = (started := (tmp_path / "started").read_text()).split()
    assert (folder, found) == (str(tmp_path), str(ROOT))
    assert "latency_hiding" in started and started.endswith("clipmoe_jax.main --config=x --workdir=runs/x\n")


def test_slurm_without_the_repository_is_one_line(tmp_path):
    copy = tmp_path / "slurm_script"
    copy.write_text((LAUNCH / "slurm.sbatch").read_text())
    path = stand_in(tmp_path, "scontrol", "echo Command=/elsewhere/launch/slurm.sbatch")
    job = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": path}
    done = subprocess.run(
        ["bash", str(copy)], cwd=tmp_path, env=os.environ | job, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "launch/xla_flags.sh is not found: call sbatch in the folder that holds launch/\n"


def test_node_sh_runs_in_the_folder_that_it_is_called_in(tmp_path):
    stand_in(tmp_path, "run", f'echo "$PWD $PYTHONPATH" > {tmp_path}/started')
    command = ["bash", os.path.relpath(LAUNCH / "node.sh", tmp_path), "--platform=cpu"]
    environment = os.environ | {"PYTHON": "./run", "PYTHONPATH": ""}
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "started").read_text() == f"{tmp_path} {ROOT}\n"
    told = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "clipmoe_jax.main" in told


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_to_node_sh_ends_with_130(tmp_path, times):
    """The run saves; after a second one it does not."""
    ends = {1: "sleep 0.2; exit 75", 2: "sleep 60"}[times]
    stand_in(
        tmp_path, "run", f"trap '{ends}' TERM; echo started >> {tmp_path}/log; while :; do sleep 0.1; done"
    )
    command = ["bash", str(LAUNCH / "node.sh"), "--platform=cpu"]
    with subprocess.Popen(command, env=os.environ | {"PYTHON": f"{tmp_path}/run"}) as process:
        while not (tmp_path / "log").exists():
            time.sleep(0.05)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(timeout=10) == 130
    assert (tmp_path / "log").read_text() == "started\n"


# A slice of one host, which is a folder. Calls are logged, `slice` holds the state, the first look at the run
# is interrupted. ssh does what it is told, but for installing Python. `offline`: so many calls get no answer.
GCLOUD = """
echo "$3 $4" >> LOG/calls
offline=$(cat LOG/offline 2> /dev/null || echo 0)
if [[ $offline -gt 0 ]]; then
    echo $((offline - 1)) > LOG/offline
    echo "ERROR: (gcloud) There was a problem connecting" >&2
    exit 1
fi
case "$3 $4" in
"queued-resources describe")
    if ! cat LOG/slice 2> /dev/null; then
        echo "ERROR: (gcloud) NOT_FOUND: Resource 'l14'" >&2
        exit 1
    fi ;;
"queued-resources create") rm -rf LOG/host/clipmoe && echo ACTIVE > LOG/slice ;;
"queued-resources delete") rm LOG/slice ;;
"tpu-vm ssh")
    [[ $(cat LOG/slice) == ACTIVE ]] || exit 1
    cd LOG/host || exit 255
    command="${@: -1}"
    case "$command" in
    *"uv venv"*)
        [[ ! -e LOG/no_python ]] || exit 1
        rm -rf clipmoe && mkdir -p clipmoe/.venv/bin && cp -r launch clipmoe && cp python clipmoe/.venv/bin ;;
    *tail*)
        if [[ ! -e LOG/interrupted ]]; then
            touch LOG/interrupted
            INTERRUPTION
            exit 255
        fi ;;&
    *) setsid --wait bash -c "${command#--command=}" ;;
    esac ;;
esac
"""


@pytest.fixture
def slice_of_one(tmp_path):
    """The PATH with a `gcloud`, and a `sleep` that does not. The run ends with each of the codes in turn."""

    def make(interruption=":", seconds=0, codes=(0,)):
        (tmp_path / "host").mkdir()
        (tmp_path / "host" / "launch").symlink_to(LAUNCH)
        code = f"codes=({' '.join(map(str, codes))}); exit ${{codes[$(wc -l < {tmp_path}/runs) - 1]}}"
        began = f'echo "$@" >> {tmp_path}/runs; trap "exit 75" TERM; echo loss 0.1'
        text = f"{began}; /bin/sleep {seconds} & wait $!; {code}"
        stand_in(tmp_path / "host", "python", text)
        stand_in(tmp_path, "sleep", "")
        gcloud = GCLOUD.replace("INTERRUPTION", interruption).replace("LOG", str(tmp_path))
        return stand_in(tmp_path, "gcloud", gcloud)

    return make


def changes(tmp_path):
    """What was done to slices, in order."""
    calls = [line.split()[1] for line in (tmp_path / "calls").read_text().splitlines()]
    return [call for call in calls if call not in ("describe", "list", "ssh")]


def test_slice_gets_no_virtual_environment_of_whatever_name(tmp_path):
    lines = run("tpu_pod.sh", *TPU_POD, "--dry-run", "--", "--config=x").stdout.splitlines()
    [pack] = [line for line in lines if line.startswith("tar ")]
    (tmp_path / "repository").mkdir()
    for name in ("configs/mine.py", "env/pyvenv.cfg", "env/lib/large", ".venv311/bin/python", "runs/demo/x"):
        file = tmp_path / "repository" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    archive = tmp_path / "packed.tar.gz"
    command = pack.replace("clipmoe.tar.gz", str(archive))
    subprocess.run(["bash", "-c", command], cwd=tmp_path / "repository", check=True)
    with tarfile.open(archive) as packed:
        assert {member.name for member in packed if member.isfile()} == {"./configs/mine.py"}


def test_preempted_slice_is_requested_again(tmp_path, slice_of_one):
    path = slice_of_one("echo SUSPENDED > LOG/slice")
    done = run("tpu_pod.sh", *TPU_POD, "--", "--config=x", PATH=path)
    assert done.returncode == 0, done.stderr
    assert changes(tmp_path) == 2 * ["create", "scp", "delete"]
    assert (tmp_path / "runs").read_text() == 2 * "-m clipmoe_jax.main --config=x\n"


def test_deleted_slice_is_not_requested_again(tmp_path, slice_of_one):
    done = run("tpu_pod.sh", *TPU_POD, "--", "--config=x", PATH=slice_of_one("rm LOG/slice"))
    assert done.returncode == 1 and "l14 was deleted" in done.stderr
    assert changes(tmp_path) == ["create", "scp"]


@pytest.mark.parametrize("code", grid(3, rest=[255]))
def test_failed_run_on_a_slice_is_not_restarted(tmp_path, slice_of_one, code):
    done = run("tpu_pod.sh", *TPU_POD, "--keep", "--", "--config=x", PATH=slice_of_one(codes=[code]))
    assert done.returncode == code
    assert (tmp_path / "runs").read_text() == "-m clipmoe_jax.main --config=x\n"
    assert (tmp_path / "slice").exists()  # kept


STOPPED = {
    "a host shuts down": "pkill -TERM -P $(cat clipmoe/run.pid); /bin/sleep 1",
    "a host boots again": "pid=$(cat clipmoe/run.pid); kill -9 $pid $(pgrep -P $pid)",
}


@pytest.mark.parametrize("interruption", quick(STOPPED, "a host boots again"))
def test_run_stopped_by_its_host_starts_again(tmp_path, slice_of_one, interruption):
    begun = "until grep -q loss clipmoe/run.log; do /bin/sleep 0.1; done"
    path = slice_of_one(f"{begun}; {interruption}", seconds=2)
    done = run("tpu_pod.sh", *TPU_POD, "--", "--config=x", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "the run was stopped" in done.stderr and changes(tmp_path) == ["create", "scp", "scp", "delete"]


@exhaustive
def test_run_goes_on_while_the_connection_is_lost(tmp_path, slice_of_one):
    path = slice_of_one("echo 4 > LOG/offline", seconds=1)
    done = run("tpu_pod.sh", *TPU_POD, "--", "--config=x", "--workdir=two words' end", PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no answer about l14, asking again: ERROR") == 3
    assert "the connection to l14 was lost" in done.stderr and "loss 0.1" in done.stdout
    assert changes(tmp_path) == ["create", "scp", "delete"]
    assert (tmp_path / "runs").read_text() == "-m clipmoe_jax.main --config=x --workdir=two words' end\n"


def test_host_that_cannot_be_reached_is_left_as_it_is(tmp_path, slice_of_one):
    path = slice_of_one()
    (tmp_path / "slice").write_text("ACTIVE")
    (tmp_path / "host").rename(tmp_path / "elsewhere")
    done = run("tpu_pod.sh", *TPU_POD, "--", "--config=x", PATH=path)
    assert done.returncode == 1 and "no connection to l14: what runs there goes on" in done.stderr
    assert changes(tmp_path) == []


def test_slice_on_which_installation_fails_is_kept(tmp_path, slice_of_one):
    path = slice_of_one()
    (tmp_path / "no_python").touch()
    done = run("tpu_pod.sh", *TPU_POD, "--", "--config=x", PATH=path)
    assert done.returncode == 1 and "nothing was started on l14" in done.stderr
    assert changes(tmp_path) == ["create", "scp"]


def test_waiting_request_is_kept(tmp_path, slice_of_one):
    path = slice_of_one()
    (tmp_path / "slice").write_text("WAITING_FOR_RESOURCES")
    stand_in(tmp_path, "sleep", f"echo ACTIVE > {tmp_path}/slice")
    done = run("tpu_pod.sh", *TPU_POD, "--", "--config=x", PATH=path)
    assert done.returncode == 0, done.stderr
    assert changes(tmp_path) == ["scp", "delete"]


def test_nothing_is_requested_without_a_connection(tmp_path, slice_of_one):
    path = slice_of_one()
    (tmp_path / "offline").write_text("1")
    done = run("tpu_pod.sh", *TPU_POD, "--", "--config=x", PATH=path)
    assert done.returncode == 1 and "problem connecting" in done.stderr
    assert (tmp_path / "calls").read_text() == "queued-resources list\n"


@exhaustive
@pytest.mark.parametrize(("seconds", "code"), grid((0, 3), rest=[(3, 0)]))
def test_same_command_again_follows_the_run(tmp_path, slice_of_one, seconds, code):
    """Also one that has ended since; after that it starts another."""
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), *TPU_POD, "--keep", "--", "--config=x"]
    environment = os.environ | {"PATH": slice_of_one("/bin/sleep 60", seconds, codes=(code, 5))}
    with subprocess.Popen(command, env=environment, start_new_session=True) as first:
        while not (tmp_path / "interrupted").exists():
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
    for expected, runs in ((code, 1), (5, 2)):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == expected, done.stderr
        assert "loss 0.1" in done.stdout
        assert ("following the run that is on l14" in done.stderr) == (runs == 1)
        assert (tmp_path / "runs").read_text() == runs * "-m clipmoe_jax.main --config=x\n"


# Fields of jobset.sigs.k8s.io/docs/reference/jobset (v1alpha2) and of Kubernetes' Job and Pod that are used.
JOBSET = {"apiVersion", "kind", "metadata", "spec"}
JOBSET_SPEC = {
    "failurePolicy",
    "network",
    "replicatedJobs",
    "successPolicy",
    "suspend",
    "ttlSecondsAfterFinished",
}
REPLICATED_JOB = {"name", "replicas", "template"}
JOB_SPEC = {
    *("parallelism", "completions", "completionMode", "backoffLimit", "backoffLimitPerIndex", "template"),
    "podFailurePolicy",
}
POD_SPEC = {
    *("restartPolicy", "hostNetwork", "dnsPolicy", "terminationGracePeriodSeconds", "nodeSelector"),
    *("containers", "serviceAccountName", "volumes", "tolerations"),
}
CONTAINER = {"name", "image", "workingDir", "ports", "env", "command", "args", "resources", "volumeMounts"}


def test_jobset_has_known_fields_and_a_pod_for_each_host():
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    (job,) = manifest["spec"]["replicatedJobs"]
    job_spec = job["template"]["spec"]
    pod = job_spec["template"]["spec"]
    (container,) = pod["containers"]
    for found, known in (
        (manifest, JOBSET),
        (manifest["spec"], JOBSET_SPEC),
        (job, REPLICATED_JOB),
        (job_spec, JOB_SPEC),
        (pod, POD_SPEC),
        (container, CONTAINER),
    ):
        assert found.keys() <= known
    # A failed pod fails its job, and that the JobSet.
    assert job_spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    # As many pods as the slice has hosts, and each knows which it is.
    env = {entry["name"]: entry for entry in container["env"]}
    hosts = job_spec["parallelism"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    assert hosts * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job_spec["completions"] == hosts == int(env["CLIPMOE_NUM_PROCESSES"]["value"])
    assert job_spec["completionMode"] == "Indexed"
    # The first pod's name under the JobSet's headless service: JOBSET-JOB-REPLICA-INDEX.JOBSET.
    name = manifest["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    assert env["CLIPMOE_COORDINATOR"]["value"] == f"{name}-{job['name']}-0-0.{name}:{port}"
    # What it runs is there.
    command = container["command"]
    assert (ROOT / command[0]).exists()
    (config,) = [word.partition("=")[2] for word in command if word.startswith("--config=")]
    assert (ROOT / config).exists()
    for word in command:
        if word.endswith("batch_size=1024"):
            assert 1024 % chips == 0


def test_indexed_job_prepares_each_part_once():
    manifest = yaml.safe_load((LAUNCH / "prepare_job.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    job, pod = manifest["spec"], manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for found, known in ((job, JOB_SPEC), (pod, POD_SPEC), (container, CONTAINER)):
        assert found.keys() <= known
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    (part,) = [word for word in container["command"] if word.startswith("--part=")]
    assert part == f"--part=$({container['env'][0]['name']})/{job['completions']}"
    assert Part.parse(f"0/{job['completions']}").total == job["completions"]
    (claimed,) = {volume["name"] for volume in pod["volumes"]}
    assert [mount["name"] for mount in container["volumeMounts"]] == [claimed]
