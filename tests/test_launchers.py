"""The launchers of tpu_scripts/: the exact commands that each renders, and that `wpjax` takes every option in them."""

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from wpjax.cli import make_app

SCRIPTS = Path(__file__).parent.parent / "tpu_scripts"
SWEEP = ["sweep", "--base", "org/base", "--expert", "my expert", "--behaviour", "tiny:title"]
SAID = r"wpjax sweep --base org/base --expert my\ expert --behaviour tiny:title"
CUT = ["--mesh", "patch=4,model=2", "--out", "/results/r.nc"]
CASES = {
    "slurm": ["slurm.sh", "--nodes", "2", "--gpus", "8", "--setup", "source .venv/bin/activate", "--", *SWEEP, *CUT],
    "slurm-array": ["slurm.sh", "--parts", "16", "--shards", "/my data/p", "--out", "r.nc", "--", *SWEEP],
    "sky-tpu": ["sky.sh", "--accelerator", "tpu-v5litepod-16", "--", *SWEEP, *CUT],
    "sky-v6e": ["sky.sh", "--accelerator", "tpu-v6e-8", "--region", "us-east5", "--", *SWEEP, "--out", "r.nc"],
    "sky-gpus": ["sky.sh", "--accelerator", "H100:8", "--nodes", "2", "--", *SWEEP, *CUT],
    "sky-spot": ["sky.sh", "--accelerator", "tpu-v6e-8", "--spot", "yes", "--bucket", "gs://b", "--", *SWEEP, *CUT],
    "sky-parts": [
        *("sky.sh", "--accelerator", "L4:1", "--spot", "yes", "--bucket", "s3://b"),
        *("--parts", "2", "--shards", "/results/p", "--out", "/results/r.nc", "--", *SWEEP),
    ],
    "gcloud": ["gcloud.sh", "--zone", "us-west4-a", "--accelerator", "v5litepod-16", "--", *SWEEP, "--out", "r.nc"],
    "gcloud-spot": [
        *("gcloud.sh", "--zone", "z", "--accelerator", "v6e-8", "--project", "p", "--spot", "yes", "--keep", "yes"),
        *("--", *SWEEP, *CUT),
    ],
    "xpk": [
        "xpk.sh",
        "--cluster",
        "c",
        "--zone",
        "z",
        "--tpu",
        "v5litepod-16",
        "--image",
        "i:1",
        "--storage",
        "s",
        "--",
        *SWEEP,
        *CUT,
    ],
    "jobset-gpus": [
        *("jobset.sh", "--image", "i:1", "--nodes", "2", "--gpus", "8", "--claim", "results", "--secret", "hf"),
        *("--", *SWEEP, *CUT),
    ],
    "jobset-tpu": [
        *("jobset.sh", "--image", "i:1", "--tpu", "tpu-v5-lite-podslice", "--topology", "4x4", "--nodes", "4"),
        *("--claim", "results", "--", *SWEEP, *CUT),
    ],
    "jobset-parts": [
        *("jobset.sh", "--image", "i:1", "--gpus", "1", "--claim", "results", "--parts", "3"),
        *("--shards", "/results/p", "--out", "/results/r.nc", "--", *SWEEP),
    ],
}


def launch(script, *arguments, **env):
    """Run a launcher without the user's own variables; returns (exit code, standard output, standard error)."""
    env = {"PATH": os.environ["PATH"], **env}
    done = subprocess.run([SCRIPTS / script, *arguments], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def rendered():
    """What each case prints with --dry-run."""
    made = {}
    for name, (script, *arguments) in CASES.items():
        code, made[name], said = launch(script, "--dry-run", *arguments)
        assert (code, said) == (0, ""), name
    return made


def texts(shown):
    """The texts that a dry run hands to commands: job scripts and manifests."""
    return re.findall(r"<<'END'\n(.*?)\nEND$", shown, re.DOTALL | re.MULTILINE)


def wpjax_commands(shown):
    """The arguments of every call of wpjax, also of those inside the arguments of other commands."""
    for line in shown.splitlines():
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
        for word, following in zip(words, [*words, ""][1:], strict=True):
            if " " in word:
                yield from wpjax_commands(word)
            elif word == "wpjax" and following.isalpha():
                yield words[words.index(following) :]


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_takes_every_option(rendered, name):
    app = typer.main.get_command(make_app())
    calls = list(wpjax_commands(rendered[name].replace("# when", "")))
    assert calls
    for command, *words in calls:
        assert command in app.commands, f"wpjax has no command {command}"
        options = {option for parameter in app.commands[command].params for option in parameter.opts}
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - options
        assert not unknown, f"wpjax {command} has no {unknown}"


@pytest.mark.parametrize("name", CASES)
def test_what_is_rendered_is_a_script(rendered, name):
    done = subprocess.run(["bash", "-n"], input=rendered[name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_slurm(rendered):
    (text,) = texts(rendered["slurm"])
    assert rendered["slurm"].startswith("sbatch <<'END'\n")
    head, *lines = text.splitlines()
    assert head == "#!/bin/bash"
    directives = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert directives == {
        *("job-name=wpjax", "time=12:00:00", "nodes=2", "ntasks-per-node=8", "gpus-per-task=1", "cpus-per-task=8"),
        *("requeue", "open-mode=append"),
    }
    assert lines[-2:] == [
        "source .venv/bin/activate",
        f"srun --kill-on-bad-exit=1 {SAID} --mesh patch=4\\,model=2 --out /results/r.nc --resume",
    ]
    array, collect = texts(rendered["slurm-array"])
    assert "#SBATCH --array=1-16" in array
    assert array.endswith(rf"{SAID} --part $SLURM_ARRAY_TASK_ID/16 --shards /my\ data/p")
    assert collect.endswith(r"wpjax collect /my\ data/p --out r.nc")
    assert '\nsbatch --dependency=afterok:"${array%%;*}" <<' in rendered["slurm-array"]


@pytest.mark.parametrize(
    ("name", "resources", "nodes"),
    [
        (
            "sky-tpu",
            {
                "accelerators": "tpu-v5litepod-16",
                "accelerator_args": {"runtime_version": "v2-alpha-tpuv5-lite"},
            },
            1,
        ),
        (
            "sky-v6e",
            {
                "accelerators": "tpu-v6e-8",
                "accelerator_args": {"runtime_version": "v2-alpha-tpuv6e"},
                "region": "us-east5",
            },
            1,
        ),
        ("sky-gpus", {"accelerators": "H100:8"}, 2),
    ],
)
def test_sky(rendered, name, resources, nodes):
    (text,) = texts(rendered[name])
    task = yaml.safe_load(text)
    assert (task["resources"], task["num_nodes"], task["workdir"]) == (resources, nodes, ".")
    extra = "cuda" if nodes > 1 else "tpu"
    assert task["setup"] == f"pip install -e '.[{extra}]' -c requirements.lock\n"
    words = shlex.split(task["run"])
    assert words[:7] == ["wpjax", "sweep", "--base", "org/base", "--expert", "my expert", "--behaviour"]
    assert "--resume" in words
    told = ["--coordinator", "$(head -n 1 <<< $SKYPILOT_NODE_IPS):12355", "--num-processes", "$SKYPILOT_NUM_NODES"]
    assert words[-6:] == [*told, "--process-id", "$SKYPILOT_NODE_RANK"] or nodes == 1
    assert rendered[name].endswith("\nsky launch --cluster wpjax --yes wpjax.yaml\n")


def test_sky_on_spot_machines(rendered):
    (text,) = texts(rendered["sky-spot"])
    task = yaml.safe_load(text)
    assert task["resources"]["use_spot"] is True
    assert task["file_mounts"] == {"/results": {"source": "gs://b", "mode": "MOUNT"}}
    assert shlex.split(task["run"])[-5:] == ["--mesh", "patch=4,model=2", "--out", "/results/r.nc", "--resume"]
    assert rendered["sky-spot"].endswith("\nsky jobs launch --name wpjax --yes --detach-run wpjax.yaml\n")
    parts = [yaml.safe_load(text)["run"] for text in texts(rendered["sky-parts"])]
    assert parts == [f"{SAID} --part {i}/2 --shards /results/p" for i in (1, 2)]
    assert rendered["sky-parts"].endswith(": wpjax collect /results/p --out /results/r.nc\n")
    _, shown, _ = launch(CASES["sky-v6e"][0], "--dry-run", *CASES["sky-v6e"][1:], HF_TOKEN="hf_x")
    assert shown.endswith("\nsky launch --cluster wpjax --secret HF_TOKEN --yes wpjax.yaml\n")
    assert "hf_x" not in shown


def test_gcloud(rendered):
    create, wait, copy, install, run, fetch, delete = rendered["gcloud"].splitlines()
    where, tpus = "--zone us-west4-a", "gcloud compute tpus"
    assert create == (
        f"{tpus} queued-resources create wpjax --node-id wpjax {where} --accelerator-type v5litepod-16 "
        "--runtime-version v2-alpha-tpuv5-lite"
    )
    assert f"{tpus} queued-resources describe wpjax {where} --format=value" in wait
    assert copy == f"{tpus} tpu-vm scp --recurse . wpjax:wpjax {where} --worker=all"
    ssh = [*f"{tpus} tpu-vm ssh wpjax {where} --worker=all --command".split()]
    assert shlex.split(install) == [*ssh, "cd wpjax && python3 -m pip install -e '.[tpu]' -c requirements.lock"]
    assert shlex.split(run) == [*ssh, f"cd wpjax && {SAID} --out r.nc --resume"]
    assert fetch == f"{tpus} tpu-vm scp --recurse wpjax:wpjax/r.nc r.nc {where} --worker=0"
    assert delete == f"{tpus} queued-resources delete wpjax {where} --force --quiet"
    create, *_, fetch = rendered["gcloud-spot"].splitlines()
    assert create.endswith("--zone z --project p --accelerator-type v6e-8 --runtime-version v2-alpha-tpuv6e --spot")
    assert fetch == f"{tpus} tpu-vm scp --recurse wpjax:/results/r.nc /results/r.nc --zone z --project p --worker=0"


def test_xpk(rendered):
    assert shlex.split(rendered["xpk"]) == [
        *("xpk", "workload", "create", "--workload", "wpjax", "--cluster", "c", "--zone", "z"),
        *("--tpu-type=v5litepod-16", "--num-slices=1", "--docker-image", "i:1", "--max-restarts=3", "--command"),
        f"{SAID} --mesh patch=4\\,model=2 --out /results/r.nc --resume",
        *("--storage", "s"),
    ]


def jobs(rendered, name):
    (text,) = texts(rendered[name])
    made = yaml.safe_load(text)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 3
    return [(job, job["template"]["spec"]) for job in made["spec"]["replicatedJobs"]]


def test_jobset(rendered):
    ((_, job),) = jobs(rendered, "jobset-gpus")
    (container,) = job["template"]["spec"]["containers"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["envFrom"] == [{"secretRef": {"name": "hf"}}]
    assert container["args"] == [
        f"{SAID} --mesh patch=4\\,model=2 --out /results/r.nc --resume --coordinator wpjax-run-0-0.wpjax:12355 "
        "--num-processes 2 --process-id $JOB_COMPLETION_INDEX\n"
    ]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    ((_, job),) = jobs(rendered, "jobset-tpu")
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert "--coordinator" not in pod["containers"][0]["args"][0]
    (_, parts), (collect, after) = jobs(rendered, "jobset-parts")
    assert (parts["completions"], parts["backoffLimit"]) == (3, 3)
    assert parts["template"]["spec"]["containers"][0]["args"] == [
        f"{SAID} --part $((JOB_COMPLETION_INDEX + 1))/3 --shards /results/p\n"
    ]
    assert collect["dependsOn"] == [{"name": "parts", "status": "Complete"}]
    assert after["template"]["spec"]["containers"][0]["args"] == ["wpjax collect /results/p --out /results/r.nc\n"]


def test_without_dry_run_the_same_is_run(rendered, tmp_path):
    """In place of Slurm and Kubernetes, programs that note what they are called with."""
    for tool in ("sbatch", "kubectl"):
        (tmp_path / tool).write_text(f'#!/bin/bash\n{{ echo "{tool} $*"; cat; }} >> "$NOTES"\necho "17;cluster"\n')
        (tmp_path / tool).chmod(0o755)
    for name in ("slurm", "slurm-array", "jobset-parts"):
        notes = tmp_path / name
        script, *arguments = CASES[name]
        path = f"{tmp_path}:{os.environ['PATH']}"
        code, _, said = launch(script, *arguments, PATH=path, NOTES=str(notes))
        assert (code, said) == (0, "")
        dry = tmp_path / f"{name}.dry"
        subprocess.run(["bash"], input=rendered[name], text=True, env={"PATH": path, "NOTES": str(dry)}, check=True)
        assert notes.read_text() == dry.read_text()
        assert notes.read_text().count(SAID) == 1
    assert "sbatch --dependency=afterok:17\n" in (tmp_path / "slurm-array").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["slurm.sh"], "no command; say which after --"),
        (["slurm.sh", "--node", "2", "--", *SWEEP], "slurm.sh has no option --node; --help lists them"),
        (["slurm.sh", "--nodes", "--", *SWEEP], "--nodes needs a value"),
        (["slurm.sh", "--nodes", "two", "--", *SWEEP], "--nodes two is no number from 1 on"),
        (["slurm.sh", "sweep"], "sweep stands before --"),
        (["slurm.sh", "--name", "a b", "--", *SWEEP], "--name a b holds a character other than"),
        (["slurm.sh", "--parts", "2", "--out", "r.nc", "--", *SWEEP], "--shards is missing"),
        (["slurm.sh", "--parts", "2", "--out", "r", "--shards", "s", "--", "demo"], "deals out a sweep, not demo"),
        (["slurm.sh", "--parts", "2", "--out", "r", "--shards", "s", "--", *SWEEP, "--out", "r"], "belongs before --"),
        (["sky.sh", "--", *SWEEP], "--accelerator is missing"),
        (["sky.sh", "--accelerator", "L4:1", "--spot", "yes", "--", *SWEEP], "--spot yes needs --bucket"),
        (["sky.sh", "--accelerator", "L4:1", "--spot", "perhaps", "--", *SWEEP], "--spot is yes or no"),
        (
            ["sky.sh", "--accelerator", "L4:1", "--spot", "yes", "--bucket", "s3://b", "--", *SWEEP, "--out", "r.nc"],
            "must lie below /results",
        ),
        (["gcloud.sh", "--zone", "z", "--accelerator", "a2", "--", *SWEEP], "--accelerator a2 is none of v4-N"),
        (["xpk.sh", "--cluster", "c", "--zone", "z", "--tpu", "v6e-8", "--", *SWEEP], "--image is missing"),
        (["jobset.sh", "--image", "i", "--gpus", "1", "--name", "A", "--", *SWEEP], "Kubernetes takes small letters"),
        (["jobset.sh", "--image", "i", "--tpu", "tpu-v6e-slice", "--", *SWEEP], "--topology is missing"),
        (
            ["jobset.sh", "--image", "i", "--gpus", "1", "--parts", "2", "--shards", "s", "--out", "r", "--", *SWEEP],
            "--parts needs --claim",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, says):
    code, shown, said = launch(arguments[0], "--dry-run", *arguments[1:])
    assert (code, shown) == (2, "")
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1


def test_every_launcher_says_how_it_is_called():
    for script in SCRIPTS.glob("*.sh"):
        if script.name != "lib.sh":
            code, shown, _ = launch(script.name, "--help")
            assert code == 0
            asked = set(re.findall(r"\[([a-z]+)\]=", script.read_text()))
            assert set(re.findall(r"^--([a-z-]+) ", shown, re.MULTILINE)) == asked | {"dry-run"}, script.name


def test_launchers_set_no_flags_of_xla():
    """A flag that this build of XLA does not know ends the process, so none is set for everybody."""
    for path in (*SCRIPTS.glob("*.sh"), SCRIPTS / "Dockerfile"):
        assert not re.search(r"XLA_FLAGS|LIBTPU_INIT_ARGS", path.read_text()), path


def test_the_image_is_made_of_what_is_there():
    """Every folder that is copied exists, and every extra that is installed is one of pyproject.toml's."""
    text = (SCRIPTS / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert "wpjax" in copied
    assert all((SCRIPTS.parent / name).exists() for name in copied)
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    extras = {name for line in re.findall(r"extras=([\w,]+)", text) for name in line.split(",") if name}
    assert extras | {"cuda", "tpu"} <= project["optional-dependencies"].keys()
    assert project["readme"] in copied
    licences = [path for pattern in project["license-files"] for path in SCRIPTS.parent.glob(pattern)]
    assert len(licences) >= len(project["license-files"])
    assert all(any(path.is_relative_to(SCRIPTS.parent / name) for name in copied) for path in licences)
