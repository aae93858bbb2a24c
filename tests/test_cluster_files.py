"""The files that start clusters, checked without one: by Ray's launcher, the models of AWS and Kubernetes, and our rules."""

import json
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.version import Version

from coda_ray.cluster import OOM_RETRIES
from kuberay_crd import cluster_of, pods_of, schema_of

ROOT = Path(__file__).resolve().parents[1]
PATHS = ["cluster.yaml", "Dockerfile", "requirements.lock", "docs/cluster.md"]
PATHS += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "deploy").rglob("*")) if path.is_file()]
KUBERNETES = "1.33"
STOP_WAIT_S = 60
FLOORS = {"ray": "2.54", "mlflow": "3.5", "torch": "2.6"}


@pytest.fixture
def files():
    return {path: (ROOT / path).read_text() for path in PATHS}


def documents(files):
    """Yield every YAML document with its path."""
    for path, text in files.items():
        if path.endswith(".yaml"):
            yield path, yaml.safe_load(text)


def nested(value):
    """Yield every (key, value) of a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield key, inner
        yield from nested(inner)


# Rules. Each yields (path, what is wrong).


def listens_everywhere(files):
    for path, text in files.items():
        for found in re.findall(r"0\.0\.0\.0|\[::\]|\s::/0", text):
            yield path, found


def public(files):
    for path, document in documents(files):
        for key, value in nested(document):
            if value in ("LoadBalancer", "NodePort") or (key, value) in (("enableIngress", True), ("kind", "Ingress")):
                yield path, f"{key}: {value}"
            if key == "ports" and "services" in document:
                yield from ((path, port) for port in value if not str(port).startswith("127.0.0.1:"))


# A literal behind a name that holds a secret. References ($…, ${…}, "…", file://) are how it should be.
NAMED = re.compile(r"(?i)\b[\w.-]*(?:password|passwd|secret|token|access_key|api_key)['\"]?[ \t]*[:=][ \t]*(?P<value>[^\s,}]+)")
REFERENCE = re.compile(r"""['"]?(?:\$|…|file://|\[|\{|true\b|false\b)""")
# Identifiers of AWS, PEM files, and anything as long and mixed as a random key; long words have fewer digits.
KEY = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|\b(?=(?:[A-Za-z+=]*\d){4})(?=\d*[A-Za-z])[A-Za-z0-9+=]{32,}\b")


def secret(files):
    for path, text in files.items():
        if path == "requirements.lock":
            continue
        for found in NAMED.finditer(text):
            if not REFERENCE.match(found["value"]):
                yield path, found[0]
        for found in KEY.finditer(text):
            yield path, found[0]


def open_ray(files):
    for path, text in files.items():
        if re.search(r"RAY_AUTH_MODE['\"]?\s*[:=,]\s*['\"]?(?!token)\w", text):
            yield path, "another RAY_AUTH_MODE"
    if not re.search(r"^(?:ENV|   ) *RAY_AUTH_MODE=token\b", files["Dockerfile"], re.MULTILINE):
        yield "Dockerfile", "no RAY_AUTH_MODE"
    for path, document in documents(files):
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            for command in document.get(key, []):
                if "ray start" in command and "export RAY_AUTH_MODE=token;" not in command:
                    yield path, command
        if document.get("apiVersion") == "ray.io/v1" and (cluster := cluster_of(document)):
            auth = cluster.get("authOptions", {})
            if auth.get("mode") != "token" or not auth.get("secretName"):
                yield path, f"authOptions: {auth}"


def open_dashboard(files):
    for command in yaml.safe_load(files["cluster.yaml"])["head_start_ray_commands"]:
        if "ray start" in command and "--dashboard-host=127.0.0.1" not in command:
            yield "cluster.yaml", command


def hasty(files):
    if int((re.findall(r"\bRAY_JOB_STOP_WAIT_TIME_S=(\d+)", files["Dockerfile"]) or ["3"])[0]) < STOP_WAIT_S:
        yield "Dockerfile", "a sweep that is stopped is killed before its table is written"


def endless(files):
    name, count = OOM_RETRIES
    if not re.search(rf"^(?:ENV|   ) *{name}={count}\b", files["Dockerfile"], re.MULTILINE):
        yield "Dockerfile", f"no {name}"


def loose_image(files):
    images = [("Dockerfile", image) for image in re.findall(r"^FROM (?:--\S+ )*(\S+)", files["Dockerfile"], re.MULTILINE)]
    for path, document in documents(files):
        images += [(path, value) for key, value in nested(document) if key in ("image", "head_image", "worker_image")]
    for path, image in images:
        if not re.search(r":v?\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", image):
            yield path, image


def loose_build(files):
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", files["Dockerfile"], flags=re.MULTILINE)).splitlines()
    for line in lines:
        if "://" in line or line.startswith("ADD "):
            yield "Dockerfile", line
        if "pip install" in line and "--require-hashes" not in line and "--no-index" not in line:
            yield "Dockerfile", line
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    if not users or users[-1] in ("root", "0"):
        yield "Dockerfile", "runs as root"


def loose_pod(files):
    for path, document in documents(files):
        if document.get("apiVersion") != "ray.io/v1":
            continue
        for pod in pods_of(document):
            whole = pod["spec"].get("securityContext", {})
            for container in pod["spec"]["containers"]:
                own = container.get("securityContext", {})
                # The autoscaler's container runs in the head's pod.
                as_user = whole.get("runAsNonRoot") or container["name"] == "autoscaler"
                if not as_user or own.get("allowPrivilegeEscalation") is not False:
                    yield path, container["name"]


def lasting(files):
    for path, document in documents(files):
        if document.get("kind") == "RayCluster":
            for group in document["spec"]["workerGroupSpecs"]:
                if group["template"]["spec"].get("restartPolicy") != "Never":
                    yield path, f"{group['groupName']}: an idle pod that is ended starts again"
    cluster = yaml.safe_load(files["cluster.yaml"])["cluster_name"]
    statements = json.loads(files["deploy/aws/head.json"])["Statement"]
    ends = [one["Condition"] for one in statements if one["Action"] == "ec2:TerminateInstances"]
    if ends != [own_workers(cluster)]:
        yield "deploy/aws/head.json", f"the head may not end the workers of {cluster}"


def own_workers(cluster):
    return {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": cluster}}


def reaching(files):
    """By its tags a machine belongs to a cluster: who may tag any machine may end any."""
    cluster = yaml.safe_load(files["cluster.yaml"])["cluster_name"]
    known = [own_workers(cluster), {"StringEquals": {"ec2:CreateAction": "RunInstances"}}]
    for statement in json.loads(files["deploy/aws/head.json"])["Statement"]:
        if "ec2:CreateTags" in statement["Action"] and statement.get("Condition") not in known:
            yield "deploy/aws/head.json", "tags machines of others"


def costly(files):
    """Machines that nobody uses or that cost more than they have to, data that crosses regions, a cache off the local disk."""
    cluster = yaml.safe_load(files["cluster.yaml"])
    if cluster["provider"]["region"] != "us-east-1" or cluster["provider"].get("cache_stopped_nodes") is not False:
        yield "cluster.yaml", f"provider: {cluster['provider']}"
    types = dict(cluster["available_node_types"])
    if types.pop(cluster["head_node_type"])["resources"] != {"CPU": 0}:
        yield "cluster.yaml", "stages run on the head"
    gpus = {kind["node_config"]["InstanceType"][0] in "gp" for kind in types.values()}
    if gpus != {True, False}:
        yield "cluster.yaml", "no workers with GPUs, or none without"
    for name, kind in types.items():
        if kind["min_workers"] or kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") != "spot":
            yield "cluster.yaml", f"{name}: kept when idle, or not spot"
    local = {volume.split(":")[1] for volume in re.findall(r"--volume (/opt/dlami/nvme\S*)", files["cluster.yaml"])}
    spill = re.findall(r"--object-spilling-directory=(\S+)", files["cluster.yaml"])
    if local != {"/scratch"} or {where.rpartition("/")[0] for where in spill} != local:
        yield "cluster.yaml", "cache or spilled objects off the local disk"


def loose_machine(files):
    for name, kind in yaml.safe_load(files["cluster.yaml"])["available_node_types"].items():
        node = kind["node_config"]
        if not (node.get("SecurityGroupIds") and node.get("IamInstanceProfile")):
            yield "cluster.yaml", f"{name}: the launcher's own group or role"
        if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield "cluster.yaml", f"{name}: metadata without a session"


def loose_role(files):
    for path, text in files.items():
        for statement in json.loads(text)["Statement"] if path.endswith(".json") else ():
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            for action in actions:
                bound = statement.get("Resource") != "*" or "Condition" in statement or action.startswith("ec2:Describe")
                if "*" in action or not (bound or "Principal" in statement):
                    yield path, action


def old_release(files):
    for name, floor in FLOORS.items():
        found = re.search(rf"^{name}==(\S+)", files["requirements.lock"], re.MULTILINE)
        if not found or Version(found[1]) < Version(floor):
            yield "requirements.lock", f"{name} below {floor}"


RULES = [
    listens_everywhere, public, secret, open_ray, open_dashboard, loose_image, loose_build, loose_pod, loose_machine, loose_role,
    old_release, endless, hasty, lasting, reaching, costly,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_files_keep_the_rules(files, rule):
    assert list(rule(files)) == []


SPOILT = [
    (listens_everywhere, "cluster.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    (listens_everywhere, "deploy/mlflow/compose.yaml", "${MLFLOW_BIND:-127.0.0.1}", "0.0.0.0"),  # noqa: S104
    (listens_everywhere, "docs/cluster.md", "YOUR.ADDRESS/32", "0.0.0.0/0"),
    (public, "deploy/kuberay/raycluster.yaml", "serviceType: ClusterIP", "serviceType: LoadBalancer"),
    (public, "deploy/kuberay/raycluster.yaml", "serviceType: ClusterIP", "serviceType: NodePort"),
    (public, "deploy/kuberay/raycluster.yaml", "enableIngress: false", "enableIngress: true"),
    (public, "deploy/mlflow/compose.yaml", "127.0.0.1:5432:5432", "5432:5432"),
    (secret, "deploy/mlflow/compose.yaml", "${MLFLOW_DATABASE_PASSWORD:?a long random string}", "hunter2"),
    (secret, "deploy/mlflow/README.md", "export MLFLOW_DATABASE_PASSWORD=…", "export MLFLOW_DATABASE_PASSWORD=mlflow"),
    (secret, "deploy/mlflow/compose.yaml", "AWS_SECRET_ACCESS_KEY:", "AWS_SECRET_ACCESS_KEY: abcdefgh"),
    (secret, "docs/cluster.md", 'auth_token="$HOME/.ray/coda-ray"', "auth_token=letmein"),
    (secret, "cluster.yaml", "cluster_name: coda-ray", f"cluster_name: {'3f' * 32}"),
    (secret, "Dockerfile", "PYTHONUNBUFFERED=1", "AWS_ACCESS_KEY_ID=AKIA" + "A2" * 8),
    (open_ray, "Dockerfile", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
    (open_ray, "Dockerfile", "RAY_AUTH_MODE=token", "RAY_OTHER=token"),
    (endless, "Dockerfile", "RAY_task_oom_retries=3", "RAY_task_oom_retries=-1"),
    (hasty, "Dockerfile", "RAY_JOB_STOP_WAIT_TIME_S=60", "RAY_JOB_STOP_WAIT_TIME_S=3"),
    (hasty, "Dockerfile", "RAY_JOB_STOP_WAIT_TIME_S=60", "OTHER=60"),
    (lasting, "deploy/kuberay/raycluster.yaml", "restartPolicy: Never", "restartPolicy: Always"),
    (lasting, "deploy/aws/head.json", '"ec2:ResourceTag/ray-cluster-name": "coda-ray"', '"ec2:ResourceTag/Name": "coda-ray"'),
    (lasting, "deploy/aws/head.json", '"ec2:TerminateInstances"', '"ec2:StopInstances"'),
    (reaching, "deploy/aws/head.json", '"ec2:CreateAction": "RunInstances"', '"aws:RequestedRegion": "us-east-1"'),
    (reaching, "deploy/aws/head.json", '"ec2:RunInstances",', '["ec2:RunInstances", "ec2:CreateTags"],'),
    (costly, "cluster.yaml", "region: us-east-1", "region: eu-central-1"),
    (costly, "cluster.yaml", "resources: {CPU: 0}", "resources: {}"),
    (costly, "cluster.yaml", "min_workers: 0", "min_workers: 1"),
    (costly, "cluster.yaml", "        MarketType: spot", "        MarketType: capacity-block"),
    (costly, "cluster.yaml", "InstanceType: c6id.4xlarge", "InstanceType: g6e.4xlarge"),
    (costly, "cluster.yaml", "/opt/dlami/nvme/coda_ray:/scratch", "/home/ubuntu/scratch:/scratch"),
    (costly, "cluster.yaml", "--object-spilling-directory=/scratch/spill", "--object-spilling-directory=/tmp/spill"),
    (open_ray, "cluster.yaml", "export RAY_AUTH_MODE=token;\n    ray start --head", "ray start --head"),
    (open_ray, "cluster.yaml", "export RAY_AUTH_MODE=token;\n    ray start --address", "ray start --address"),
    (open_ray, "deploy/kuberay/raycluster.yaml", "mode: token", "mode: disabled"),
    (open_ray, "deploy/kuberay/raycluster.yaml", "secretName: coda-ray-token", ""),
    (open_dashboard, "cluster.yaml", "--dashboard-host=127.0.0.1", ""),
    (loose_image, "Dockerfile", "python:3.11.14-slim-bookworm", "python:latest"),
    (loose_image, "cluster.yaml", "image: coda-ray:0.1.0", "image: coda-ray"),
    (loose_image, "deploy/kuberay/raycluster.yaml", "coda-ray:0.1.0", "coda-ray:latest"),
    (loose_image, "deploy/mlflow/compose.yaml", "postgres:17.6-bookworm", "postgres:17"),
    (loose_build, "Dockerfile", "--require-hashes ", ""),
    (loose_build, "Dockerfile", "COPY requirements.lock", "ADD requirements.lock"),
    (loose_build, "Dockerfile", "--no-index", "--index-url https://example.org/simple"),
    (loose_build, "Dockerfile", "USER 1000", "USER root"),
    (loose_pod, "deploy/kuberay/raycluster.yaml", "runAsNonRoot: true", "runAsNonRoot: false"),
    (loose_pod, "deploy/kuberay/raycluster.yaml", "allowPrivilegeEscalation: false", "privileged: true"),
    (loose_machine, "cluster.yaml", "SecurityGroupIds: &groups [sg-00000000000000000]", "SecurityGroupIds: &groups []"),
    (loose_machine, "cluster.yaml", "IamInstanceProfile: {Name: coda-ray-head}", "EbsOptimized: true"),
    (loose_machine, "cluster.yaml", "HttpTokens: required", "HttpTokens: optional"),
    (loose_role, "deploy/aws/worker.json", '"s3:GetObject", ', '"s3:*", '),
    (loose_role, "deploy/aws/head.json", '"arn:aws:iam::*:role/coda-ray-worker",\n      "Condition"', '"*",\n      "Because"'),
    (old_release, "requirements.lock", "\nray==", "\nray==2.53.0 #"),
    (old_release, "requirements.lock", "\nmlflow==", "\nmlflow==3.4.2 #"),
    (old_release, "requirements.lock", "\ntorch==", "\ntorch==2.5.1 #"),
]


@pytest.mark.parametrize(("rule", "path", "old", "new"), SPOILT, ids=lambda value: getattr(value, "__name__", None))
def test_each_rule_finds_what_it_is_for(files, rule, path, old, new):
    assert old in files[path]
    found = list(rule(files | {path: files[path].replace(old, new, 1)}))
    assert found
    assert {where for where, _ in found} == {path}


def test_every_rule_is_shown_to_find_something():
    assert {rule for rule, *_ in SPOILT} == set(RULES)


# Ray's launcher.


def launcher_accepts(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


@pytest.fixture
def launcher(files):
    return yaml.safe_load(files["cluster.yaml"])


def test_rays_launcher_accepts_the_cluster(launcher):
    launcher_accepts(launcher)
    assert launcher["available_node_types"]["gpu"]["min_workers"] == 0
    assert launcher["max_workers"] >= sum(kind.get("max_workers", 0) for kind in launcher["available_node_types"].values())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.update(idle_timeout=5),
        lambda config: config["docker"].update(images="x"),
        lambda config: config["available_node_types"]["gpu"].update(max_worker=2),
        lambda config: config.update(head_node_type="heads"),
        lambda config: config["available_node_types"]["gpu"].update(min_workers=99),
    ],
    ids=["key", "docker", "node type", "head", "more than most"],
)
def test_rays_launcher_refuses_a_spoilt_cluster(launcher, spoil):
    spoil(launcher)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        launcher_accepts(launcher)


def wrong_in_aws_request(node_config):
    """What AWS's model of RunInstances, which the launcher calls with this, says; the launcher itself looks at none of it."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, shape).generate_report()


def test_aws_knows_every_field_of_the_machines(launcher):
    for kind in launcher["available_node_types"].values():
        assert wrong_in_aws_request(kind["node_config"]) == ""
    node = launcher["available_node_types"]["gpu"]["node_config"]
    assert "InstanceMarket" in wrong_in_aws_request(node | {"InstanceMarket": {}})
    assert "Size" in wrong_in_aws_request(node | {"BlockDeviceMappings": [{"Ebs": {"Size": 1}}]})


def test_ray_has_the_options_of_the_start_commands(launcher, files):
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    commands = launcher["head_start_ray_commands"] + launcher["worker_start_ray_commands"]
    used = {found for command in commands for found in re.findall(r"--[a-z-]+", command)}
    cluster = yaml.safe_load(files["deploy/kuberay/raycluster.yaml"])["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    used |= {f"--{name}" for group in groups for name in group["rayStartParams"]}
    assert {"--dashboard-host", "--object-spilling-directory", "--num-cpus"} <= used <= known


def test_one_release_of_ray_and_of_the_image_everywhere(files):
    cluster = yaml.safe_load(files["deploy/kuberay/raycluster.yaml"])["spec"]
    assert f"\nray=={cluster['rayVersion']} " in files["requirements.lock"]
    images = {value for _, document in documents(files) for key, value in nested(document) if key == "image"}
    assert len({image for image in images if "coda" in image}) == 1


# KubeRay.


def kubernetes_accepts(document):
    if not document["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, schema_of(document["kind"]))
    for pod in pods_of(document):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "networkpolicy"])
def test_kubernetes_accepts(files, name):
    kubernetes_accepts(yaml.safe_load(files[f"deploy/kuberay/{name}.yaml"]))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("raycluster", "authOptions:", "authOption:"),
        ("raycluster", "secretName:", "secret:"),
        ("raycluster", "mode: token", "mode: tokens"),
        ("raycluster", "apiVersion: ray.io/v1", "apiVersion: ray.io/v1alpha1"),
        ("raycluster", "maxReplicas: 8", "maxReplicas: many"),
        ("raycluster", "minReplicas: 0\n      ", ""),
        ("raycluster", "upscalingMode: Default", "upscalingMode: Slow"),
        ("raycluster", "mountPath: /scratch", "path: /scratch"),
        ("raycluster", "containerPort: 6379", "port: 6379"),
        ("raycluster", "secretKeyRef: {name", "secretKey: {name"),
        ("raycluster", "allowPrivilegeEscalation: false", "allowPrivileges: false"),
        ("raycluster", "limits: {cpu: 500m", "limit: {cpu: 500m"),
        ("rayjob", "clusterSelector:", "cluster:"),
        ("rayjob", "HTTPMode", "HttpMode"),
        ("networkpolicy", "podSelector:", "pods:"),
    ],
)
def test_kubernetes_refuses_a_typo(files, name, old, new):
    text = files[f"deploy/kuberay/{name}.yaml"]
    assert old in text
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        kubernetes_accepts(yaml.safe_load(text.replace(old, new, 1)))


def test_the_job_finds_the_cluster(files):
    names = ("raycluster", "rayjob", "networkpolicy")
    cluster, job, policy = (yaml.safe_load(files[f"deploy/kuberay/{name}.yaml"]) for name in names)
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    chosen = policy["spec"]["podSelector"]["matchLabels"].items()
    pods = [pod for pod in pods_of(cluster) if "labels" in pod["metadata"]]
    assert len(pods) == 1 + len(cluster["spec"]["workerGroupSpecs"])
    assert all(chosen <= pod["metadata"]["labels"].items() for pod in pods)
    assert len({document["metadata"]["namespace"] for document in (cluster, job, policy)}) == 1


def test_a_stage_of_the_gallery_fits_on_a_gpu_worker(files):
    train = yaml.safe_load((ROOT / "configs" / "jump.yaml").read_text())["train"]
    groups = yaml.safe_load(files["deploy/kuberay/raycluster.yaml"])["spec"]["workerGroupSpecs"]
    limits = next(g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in groups if g["groupName"] == "gpu")
    assert train["cpus_per_worker"] <= int(limits["cpu"])
    assert train["gpus_per_worker"] <= int(limits["nvidia.com/gpu"])


# MLflow.


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")  # MLflow's, about its own code
def test_mlflow_has_the_options_of_the_server(files):
    from mlflow.cli import server

    known = {option for parameter in server.params for option in (*parameter.opts, *parameter.secondary_opts)}
    compose = yaml.safe_load(files["deploy/mlflow/compose.yaml"])
    used = {word.partition("=")[0] for word in compose["services"]["tracking"]["command"] if word.startswith("--")}
    assert {"--serve-artifacts", "--backend-store-uri"} <= used <= known
    assert set(compose["services"]["database"]["secrets"]) <= set(compose["secrets"])
    assert {volume.partition(":")[0] for volume in compose["services"]["database"]["volumes"]} <= set(compose["volumes"])
    # SQLAlchemy loads the driver that the address names; the image must have it.
    (address,) = re.findall(r"postgresql\+(\w+)://", " ".join(compose["services"]["tracking"]["command"]))
    assert f"\n{address}==" in files["requirements.lock"]
    assert f"postgresql+{address}://" in files["deploy/mlflow/README.md"]


# Commands; those of our own jobs are checked in test_docs.py.


def shown(text):
    """Yield command and options of every `ray …` that a text names, without what `ray job submit` runs."""
    whole = re.sub(r"\\\n#? *", " ", text)
    for name, rest in re.findall(r"(?<![\w/-])ray ((?:job )?[a-z-]+)((?:(?!(?<![\w/-])ray )[^`\n#…])*)", whole):
        yield name, set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest.partition(" -- ")[0]))


def unknown(text):
    """Yield the shown commands and options that Ray does not have."""
    from ray.scripts.scripts import cli

    for name, options in shown(text):
        group, _, own = name.rpartition(" ")
        command = (cli.commands["job"] if group else cli).commands.get(own)
        known = {option for parameter in command.params for option in parameter.opts} if command else set()
        yield from ([own] if not command else sorted(options - known))


RAY_SHOWN = ["README.md", "cluster.yaml", "docs/cluster.md", "docs/reproduce.md"]


@pytest.mark.parametrize("path", RAY_SHOWN)
def test_ray_has_the_commands_that_are_shown(path):
    text = (ROOT / path).read_text()
    assert any(name == "job submit" for name, _ in shown(text))
    assert list(unknown(text)) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [("--submission-id", "--submision-id", "--submision-id"), ("ray dashboard", "ray dashbord", "dashbord"),
     ("ray job stop", "ray job halt", "halt"), ("--no-wait", "--nowait", "--nowait")],
)  # fmt: skip
def test_a_command_that_ray_does_not_have_is_found(files, old, new, told):
    assert old in files["docs/cluster.md"]
    assert told in unknown(files["docs/cluster.md"].replace(old, new))
