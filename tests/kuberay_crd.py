"""KubeRay's ray.io/v1 resources as JSON schemas, reduced to the fields that a deploy file may set; any other key is refused.

Derived from the Go types that its CRD is generated from (github.com/ray-project/kuberay, Apache-2.0):
ray-operator/apis/ray/v1/raycluster_types.go at 3275ee09f6a6c899c37e82ea6349785536de6bd4 and rayjob_types.go at
0057210ed5a94e830c864af372577328c3542b44; authOptions, which is newer, from Ray's "KubeRay CRD API reference" of v1.6.2. The CRD
itself is a megabyte, nearly all of it Kubernetes' pod template: that part is left to kubernetes-validate (`pods_of`).
"""

STRING = {"type": "string"}
BOOLEAN = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STRINGS = {"type": "object", "additionalProperties": STRING}
# Checked by kubernetes-validate.
KUBERNETES = {"type": "object"}
KUBERNETES_LIST = {"type": "array", "items": {"type": "object"}}


def _object(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


AUTOSCALER = _object(
    resources=KUBERNETES, image=STRING, imagePullPolicy=STRING, securityContext=KUBERNETES, env=KUBERNETES_LIST,
    envFrom=KUBERNETES_LIST, volumeMounts=KUBERNETES_LIST, idleTimeoutSeconds=COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
)  # fmt: skip
HEAD = _object(
    ["rayStartParams", "template"],
    template=KUBERNETES, headService=KUBERNETES, enableIngress=BOOLEAN, rayStartParams=STRINGS, serviceType=STRING,
)  # fmt: skip
WORKERS = _object(
    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    groupName=STRING, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, idleTimeoutSeconds=COUNT, numOfHosts=COUNT,
    rayStartParams=STRINGS, template=KUBERNETES, suspend=BOOLEAN,
    scaleStrategy=_object(workersToDelete={"type": "array", "items": STRING}),
)  # fmt: skip
CLUSTER = _object(
    ["headGroupSpec"],
    rayVersion=STRING, enableInTreeAutoscaling=BOOLEAN, autoscalerOptions=AUTOSCALER, headServiceAnnotations=STRINGS,
    suspend=BOOLEAN, managedBy=STRING, headGroupSpec=HEAD, workerGroupSpecs={"type": "array", "items": WORKERS},
    authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=STRING, enableK8sTokenAuth=BOOLEAN),
)  # fmt: skip
JOB = _object(
    activeDeadlineSeconds=COUNT, backoffLimit=COUNT, rayClusterSpec=CLUSTER, submitterPodTemplate=KUBERNETES, metadata=STRINGS,
    clusterSelector=STRINGS, submitterConfig=_object(backoffLimit=COUNT), managedBy=STRING, entrypoint=STRING,
    runtimeEnvYAML=STRING, jobId=STRING, submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    entrypointResources=STRING, entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=COUNT, shutdownAfterJobFinishes=BOOLEAN, suspend=BOOLEAN,
)  # fmt: skip
METADATA = _object(["name"], name=STRING, namespace=STRING, labels=STRINGS, annotations=STRINGS)


def schema_of(kind):
    """JSON schema of a RayCluster or RayJob."""
    spec = {"RayCluster": CLUSTER, "RayJob": JOB}[kind]
    return _object(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"}, kind={"const": kind}, metadata=METADATA, spec=spec,
    )  # fmt: skip


def cluster_of(document):
    """The cluster that a RayCluster, or a RayJob with one of its own, asks for; None where it uses another."""
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"].get("rayClusterSpec")


def pods_of(document):
    """The pods of a RayCluster or RayJob as v1 Pods, that of the autoscaler's container among them."""
    spec = cluster_of(document) or {}
    templates = [group["template"] for group in (spec.get("headGroupSpec"), *spec.get("workerGroupSpecs", [])) if group]
    options = spec.get("autoscalerOptions", {})
    if autoscaler := {key: options[key] for key in ("resources", "securityContext", "env", "volumeMounts") if key in options}:
        templates.append({"spec": {"containers": [{"name": "autoscaler", "image": "autoscaler:1.0.0", **autoscaler}]}})
    if submitter := document["spec"].get("submitterPodTemplate"):
        templates.append(submitter)
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template} for template in templates]
