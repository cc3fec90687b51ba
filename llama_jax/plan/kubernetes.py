"""A manifest for Kubernetes with the server that a plan proves."""

import os
from typing import Any

from llama_jax.plan.plan import Plan
from llama_jax.plan.serving import IMAGE, MODELS, Serving, deployed_name

PORT = 8000
# Probes and the service come from outside a pod. A server alone stays on the loopback interface.
POD_NETWORK = ("--host=0.0.0.0", f"--port={PORT}")
CLAIM = "models"
CALIBRATION = "/etc/llama-jax/calibration.json"  # where the manifest mounts one
SECRET = "llama-jax-key"
RESOURCES = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}
SHARED_MEMORY = "16Gi"  # NCCL's rings, and the sockets of the engine process
START_MINUTES = 30  # for loading and compiling, until a start counts as failed
# A pod that ends still gets requests until all proxies of the cluster know; it would refuse them.
PRE_STOP_SECONDS = 15
GRACE_SECONDS = 30  # beyond the time that running requests have to end


def manifest(found: Serving, plan: Plan, image: str = IMAGE) -> list[dict[str, Any]]:
    """A Deployment and a Service, and what they need, as objects of Kubernetes' API.

    The server is ready when `/health` says so, and restarted when `/live` fails. It reads its key
    from the Secret `SECRET`, if there is one, and the checkpoint from the claim `CLAIM`. The
    content of a calibration travels in a ConfigMap.
    """
    name = deployed_name(plan.question.model)
    labels = {"app.kubernetes.io/name": "llama-jax", "app.kubernetes.io/instance": name}
    drain = _drain_seconds(found)

    def probe(path: str, **more: int) -> dict[str, Any]:
        return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 5, **more}

    container: dict[str, Any] = {
        "name": "server",
        "image": image,
        "command": ["python", "-m", "llama_jax.serve"],
        "args": [pod_path(found), *_pod_arguments(found), *POD_NETWORK],
        "ports": [{"name": "http", "containerPort": PORT}],
        "env": [
            {
                "name": "LLAMA_JAX_API_KEY",
                "valueFrom": {"secretKeyRef": {"name": SECRET, "key": "key", "optional": True}},
            }
        ],
        "startupProbe": probe("/health", periodSeconds=10, failureThreshold=6 * START_MINUTES),
        "livenessProbe": probe("/live", periodSeconds=10, failureThreshold=3),
        "readinessProbe": probe("/health", periodSeconds=5, failureThreshold=2),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_SECONDS)]}}},
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if found.platform in RESOURCES:
        container["resources"] = {"limits": {RESOURCES[found.platform]: str(found.gpus)}}
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": PRE_STOP_SECONDS + drain + GRACE_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "models", "persistentVolumeClaim": {"claimName": CLAIM, "readOnly": True}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}},
        ],
    }
    calibration = []
    if found.calibration is not None:
        mounted, key = CALIBRATION.rsplit("/", 1)
        volume = {"name": "calibration", "configMap": {"name": f"{name}-calibration"}}
        pod["volumes"].append(volume)
        mount = {"name": "calibration", "mountPath": mounted, "readOnly": True}
        container["volumeMounts"].append(mount)
        calibration.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": f"{name}-calibration", "labels": dict(labels)},
                "data": {key: found.calibration.read_text()},
            }
        )
    return [
        *calibration,
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": dict(labels)},
            "spec": {
                "replicas": found.replicas,
                # The GPUs of a server are free only when it has ended.
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": dict(labels)},
                "template": {"metadata": {"labels": dict(labels)}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": dict(labels)},
            "spec": {
                "selector": dict(labels),
                "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            },
        },
    ]


def pod_path(found: Serving) -> str:
    """The checkpoint's path in a pod, where only the claim is mounted."""
    if found.path.startswith(f"{MODELS}/"):
        return found.path
    return f"{MODELS}/{deployed_name(os.path.abspath(found.path))}"


def checkpoint_note(found: Serving) -> str:
    """Where the claim must hold the checkpoint, in a sentence."""
    inside = pod_path(found).removeprefix(f"{MODELS}/")
    return f"The claim {CLAIM!r} must hold the checkpoint in its folder {inside!r}."


def _pod_arguments(found: Serving) -> list[str]:
    """The flags of the server in a pod, where the calibration lies elsewhere."""
    here = f"--calibration={found.calibration}"
    return [f"--calibration={CALIBRATION}" if a == here else a for a in found.arguments]


def _drain_seconds(found: Serving) -> int:
    """The time that running requests have to end: the server's own default."""
    from llama_jax.serve.command_line.arguments import parse_arguments

    return int(-(-parse_arguments([found.path, *found.arguments]).shutdown_timeout // 1))
