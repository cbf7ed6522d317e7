"""Google Kubernetes Engine: our own JobSet manifest, or XPK."""

import argparse
import math
import re
import shlex
import tempfile
from datetime import datetime
from pathlib import Path

from hnet.errors import ConfigError
from hnet.files import parse_json
from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from tpu import bundle
from tpu.commands import HostReport, LaunchError, Runner, Step, verdict, worst_first
from tpu.tpu_vm import family

JOBSET = "https://github.com/kubernetes-sigs/jobset/releases/download/v0.11.1/manifests.yaml"
MOUNT = "/mnt/hnet"
# (accelerator label of the nodes, machine type with 4 chips), for multi-host slices
MACHINES = {
    "v4": ("tpu-v4-podslice", "ct4p-hightpu-4t"),
    "v5litepod": ("tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
    "v5p": ("tpu-v5p-slice", "ct5p-hightpu-4t"),
    "v6e": ("tpu-v6e-slice", "ct6e-standard-4t"),
}
_FLAT = {4: "2x2", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
         256: "4x8x8", 512: "8x8x8"}  # fmt: skip


def topology(accelerator: str) -> tuple[str, int]:
    """("4x4", 4 hosts) for "v5litepod-16". Raises ConfigError for a slice without an entry."""
    name, number = family(accelerator)
    shapes = _FLAT if name in ("v5litepod", "v6e") else _CUBE
    chips = number if shapes is _FLAT else number // 2
    if chips not in shapes:
        sizes = ", ".join(str(c if shapes is _FLAT else 2 * c) for c in shapes)
        raise ConfigError(f"accelerator={accelerator!r}: GKE slices here are {name}- {sizes}")
    return shapes[chips], math.prod(map(int, shapes[chips].split("x"))) // 4


def region(options: argparse.Namespace) -> str:
    return options.zone.rsplit("-", 1)[0]


def _place(options: argparse.Namespace) -> tuple[str, str]:
    return f"--project={options.project}", f"--location={region(options)}"


def _xpk(options: argparse.Namespace, *words: str) -> tuple[str, ...]:
    place = (f"--project={options.project}", f"--zone={options.zone}")
    return ("xpk", *words, f"--cluster={options.cluster}", *place)


def _host_command(options: argparse.Namespace) -> list[str]:
    return ["bash", "/hnet/code/tpu/host.sh", "exec", options.name, *options.command]


def _environment(options: argparse.Namespace) -> dict[str, str]:
    return {
        "HNET_HOME": "/hnet",
        "HNET_CODE_HASH": bundle.code_hash(),
        "HNET_CONFIG_HASH": bundle.config_hash(options.command),
        "HNET_STAGGER": str(options.stagger),
    }


def yaml_string(text: str) -> str:
    """A double-quoted YAML scalar; characters outside plain ASCII are written as their number."""
    plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return '"' + "".join(plain) + '"'


def unexpanded(text: str) -> str:
    """`text` escaped so that a container receives it unchanged in its command or environment.

    Kubernetes replaces $(NAME) by a variable and $$ by one $.
    """
    return text.replace("$", "$$")


def manifest(options: argparse.Namespace) -> str:
    """The JobSet of a run.

    A disrupted pod or the requeue exit code restarts all pods; any other failure ends the JobSet.
    """
    shape, hosts = topology(options.accelerator)
    label = MACHINES[family(options.accelerator)[0]][0]
    words = map(unexpanded, _host_command(options))
    environment = "".join(
        f"\n                - {{name: {name}, value: {yaml_string(unexpanded(value))}}}"
        for name, value in _environment(options).items()
    )
    account = annotations = mounts = volumes = ""
    if options.service_account:
        account = f"\n              serviceAccountName: {yaml_string(options.service_account)}"
    if options.bucket:
        annotations = '\n            metadata: {annotations: {gke-gcsfuse/volumes: "true"}}'
        mounts = f"\n                volumeMounts: [{{name: run, mountPath: {MOUNT}}}]"
        volumes = f"""
              volumes:
              - name: run
                csi:
                  driver: gcsfuse.csi.storage.gke.io
                  volumeAttributes:
                    bucketName: {yaml_string(options.bucket)}
                    mountOptions: "implicit-dirs,metadata-cache:ttl-secs:0,\
metadata-cache:negative-ttl-secs:0\""""
    return f"""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {yaml_string(options.name)}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {options.max_restarts}
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: Count
            onPodConditions: [{{type: DisruptionTarget}}]
          - action: FailJob
            onExitCodes: {{containerName: train, operator: NotIn, values: [{REQUEUE_EXIT_CODE}]}}
        template:{annotations}
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300{account}
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {label}
                cloud.google.com/gke-tpu-topology: {shape}
              tolerations: [{{key: google.com/tpu, operator: Exists}}]
              containers:
              - name: train
                image: {yaml_string(options.image)}
                securityContext: {{privileged: true}}
                ports: [{{containerPort: 8471}}, {{containerPort: 8431}}]
                command: [{", ".join(map(yaml_string, words))}]
                env:{environment}{mounts}
                resources: {{limits: {{google.com/tpu: 4}}}}{volumes}
"""


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that this platform cannot use."""
    topology(options.accelerator)
    for word in options.command if options.via == "xpk" else ():
        if not word.isprintable():
            raise ConfigError(
                f"command: {word!r} has a line break or control character, which xpk cannot pass "
                "on: use --via jobset"
            )


# --- actions -------------------------------------------------------------------------------------


def create(options: argparse.Namespace, runner: Runner) -> None:
    shape, hosts = topology(options.accelerator)
    spot = ["--spot"] if options.spot else []
    if options.via == "xpk":
        words = ["cluster", "create", f"--tpu-type={options.accelerator}", "--num-slices=1", *spot]
        why = f"a cluster with one {options.accelerator} ({hosts} hosts)"
        runner.run(Step(why, _xpk(options, *words), costs=True))
        return
    gcloud = ("gcloud", "container")
    if not options.existing_cluster:
        words = ("clusters", "create", options.cluster, *_place(options), "--num-nodes=1")
        words += ("--addons=GcsFuseCsiDriver", f"--workload-pool={options.project}.svc.id.goog")
        runner.run(Step("a cluster, billed until deleted", (*gcloud, *words), costs=True))
    machine = MACHINES[family(options.accelerator)[0]][1]
    words = ("node-pools", "create", options.name, f"--cluster={options.cluster}", *_place(options))
    words += (f"--node-locations={options.zone}", f"--machine-type={machine}")
    words += (f"--tpu-topology={shape}", f"--num-nodes={hosts}", *spot)
    runner.run(Step(f"{hosts} TPU hosts, billed until deleted", (*gcloud, *words), costs=True))
    _credentials(options, runner)
    why = "the JobSet controller"
    runner.run(Step(why, ("kubectl", "apply", "--server-side", "-f", JOBSET)))


def _credentials(options: argparse.Namespace, runner: Runner) -> None:
    words = ("gcloud", "container", "clusters", "get-credentials", options.cluster)
    runner.run(Step("point kubectl at the cluster", (*words, *_place(options))))


def setup(options: argparse.Namespace, runner: Runner) -> None:
    """Build the image from the shipped files only and push it."""
    with tempfile.TemporaryDirectory(prefix="hnet-image-") as folder:
        context = Path(folder) / "code.tar.gz"
        if runner.go:
            bundle.write_bundle(context)
        recipe = bundle.ROOT / "tpu" / "Dockerfile"
        words = ("docker", "build", f"--file={recipe}", f"--tag={options.image}", folder)
        runner.run(Step(f"an image of this code, hash {bundle.code_hash()}", words))
    runner.run(
        Step("push it; its storage is billed", ("docker", "push", options.image), costs=True)
    )


def run(options: argparse.Namespace, runner: Runner) -> None:
    if options.via == "xpk":
        words = ["workload", "create", f"--workload={options.name}", "--num-slices=1"]
        words += [f"--tpu-type={options.accelerator}", f"--docker-image={options.image}"]
        words += [f"--max-restarts={options.max_restarts}"]
        words += [f"--restart-on-exit-codes={REQUEUE_EXIT_CODE}"]
        words += [f"--env={name}={value}" for name, value in _environment(options).items()]
        words += [f"--command={unexpanded(shlex.join(_host_command(options)))}"]
        runner.run(Step("submit; it is restarted on requeue and eviction", _xpk(options, *words)))
        return
    file = Path(options.state) / options.name / "jobset.yaml"
    runner.write(file, manifest(options), "the run as a JobSet")
    why = "submit; the controller restarts it on requeue and eviction"
    runner.run(Step(why, ("kubectl", "create", "-f", str(file))))


def _pods(options: argparse.Namespace, runner: Runner) -> dict[str, HostReport]:
    chosen = f"jobset.sigs.k8s.io/jobset-name={options.name}"
    words = ("kubectl", "get", "pods", f"--selector={chosen}", "--output=json")
    text = runner.run(Step("pods of the run", words), capture=True)
    try:
        pods = parse_json(text)["items"] if text.strip() else []
        return {pod["metadata"]["name"]: _report(pod) for pod in pods}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise LaunchError(f"kubectl gave no list of pods ({type(e).__name__}: {e})") from None


def _report(pod: dict) -> HostReport:
    labels = pod["metadata"].get("labels", {})
    number = int(labels.get("batch.kubernetes.io/job-completion-index", 0))
    name = pod["spec"].get("nodeName", pod["metadata"]["name"])
    for status in pod["status"].get("containerStatuses", []):
        ended = status.get("state", {}).get("terminated")
        if status.get("name") in ("train", "jax-tpu") and ended:
            at = datetime.fromisoformat(ended["finishedAt"].replace("Z", "+00:00")).timestamp()
            return HostReport(number, name, "ended", int(ended["exitCode"]), at)
    phase = pod["status"].get("phase", "Unknown")
    return HostReport(number, name, phase.lower())


def status(options: argparse.Namespace, runner: Runner) -> None:
    words = ("kubectl", "get", "jobset", options.name, "--output=wide")
    runner.run(Step("the run", words, may_fail=True))
    reports = worst_first(list(_pods(options, runner).values()))
    for report in reports:
        runner.say(str(report))
    if reports:
        runner.say(verdict(reports))


def logs(options: argparse.Namespace, runner: Runner) -> None:
    """Print the end of every pod's log, the pod that failed first on top."""
    pods = _pods(options, runner)
    if not runner.go:
        pods = {"POD": HostReport(0, "each, the first to fail on top", "running")}
    name_of = {report: name for name, report in pods.items()}
    container = "jax-tpu" if options.via == "xpk" else "train"
    for report in worst_first(list(name_of)):
        pod = name_of[report]
        if not re.fullmatch(r"[A-Za-z0-9.-]+", pod) or pod.startswith("-"):
            continue
        words = ("kubectl", "logs", pod, f"--container={container}", f"--tail={options.lines}")
        text = runner.run(Step(str(report), words, may_fail=True), capture=True)
        runner.say(text.rstrip("\n"))


def stop(options: argparse.Namespace, runner: Runner) -> None:
    why = f"ask every pod to save and end; the grace is that of the manifest, not {options.grace} s"
    words = ("kubectl", "delete", "jobset", options.name, "--ignore-not-found")
    if options.via == "xpk":
        words = _xpk(options, "workload", "delete", f"--workload={options.name}", "--force")
        why = "ask every pod to save and end"
    runner.run(Step(why, words, may_fail=True))
    if not options.delete:
        runner.say("\n# the nodes are still billed; stop --delete gives them back   [COSTS MONEY]")
        return
    if options.via == "xpk":
        runner.run(Step("delete the cluster: ends the bill", _xpk(options, "cluster", "delete")))
        return
    words = ("node-pools", "delete", options.name, f"--cluster={options.cluster}", "--quiet")
    why = "give the TPU hosts back; the cluster itself stays, and costs a little"
    runner.run(Step(why, ("gcloud", "container", *words, *_place(options))))
