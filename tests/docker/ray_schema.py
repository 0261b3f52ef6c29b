"""What the base may say to KubeRay: JSON schemas of the fields it uses, and of no others.

No package ships the schemas of KubeRay's resources. These follow its CRDs of version 1.7; a
field that is not here is an error, also a misspelt one. Pods are checked as Kubernetes' own.
"""

from typing import Any

COUNT = {"type": "integer", "minimum": 0}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
POD = {"type": "object", "required": ["metadata", "spec"]}


def closed(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


CLUSTER = closed(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=closed("mode secretName", mode={"const": "token"}, secretName={"type": "string"}),
    headGroupSpec=closed(
        "rayStartParams template",
        serviceType={"enum": ["ClusterIP"]},
        rayStartParams=WORDS,
        template=POD,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName={"type": "string"},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=WORDS,
            template=POD,
        ),
    },
)
JOB = closed(
    "entrypoint suspend submissionMode shutdownAfterJobFinishes submitterPodTemplate "
    "rayClusterSpec",
    entrypoint={"type": "string"},
    suspend={"type": "boolean"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    # Kueue, and suspending at all, ask for a cluster that goes with its job.
    shutdownAfterJobFinishes={"const": True},
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=COUNT,
    submitterConfig=closed("backoffLimit", backoffLimit=COUNT),
    submitterPodTemplate=POD,
    rayClusterSpec=CLUSTER,
)
