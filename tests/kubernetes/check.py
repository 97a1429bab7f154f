"""Checks the MPIJob manifest named by the first argument, and names what does not fit.

Claims and pod templates are held against Kubernetes' own schemas, which the package kubernetes-validate brings; of the
MPIJob itself, the fields of its CRD v2beta1 (kubeflow/mpi-operator, manifests/base/kubeflow.org_mpijobs.yaml and, for
launcherCreationPolicy, later ones) are written down here. Its schema leaves unknown fields out without a word, so that
a slip in a name would only show on a cluster, as a setting that does nothing.
"""

import sys

import jsonschema
import kubernetes_validate
import yaml

VERSION = "1.37"

MPI_JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "kubeflow.org/v2beta1"},
        "kind": {"const": "MPIJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["mpiReplicaSpecs"],
            "properties": {
                "slotsPerWorker": {"type": "integer", "minimum": 1},
                "sshAuthMountPath": {"type": "string"},
                "mpiImplementation": {"enum": ["OpenMPI", "Intel", "MPICH"]},
                "launcherCreationPolicy": {"enum": ["AtStartup", "WaitForWorkersReady"]},
                "runLauncherAsWorker": {"type": "boolean"},
                "runPolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "activeDeadlineSeconds": {"type": "integer"},
                        "backoffLimit": {"type": "integer"},
                        "cleanPodPolicy": {"enum": ["None", "Running", "All"]},
                        "managedBy": {"type": "string"},
                        "schedulingPolicy": {"type": "object"},
                        "suspend": {"type": "boolean"},
                        "ttlSecondsAfterFinished": {"type": "integer"},
                    },
                },
                "mpiReplicaSpecs": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["Launcher", "Worker"],
                    "properties": {name: {"$ref": "#/$defs/replica"} for name in ("Launcher", "Worker")},
                },
            },
        },
    },
    "$defs": {
        "replica": {
            "type": "object",
            "additionalProperties": False,
            "required": ["template"],
            "properties": {
                "replicas": {"type": "integer", "minimum": 1},
                "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
                "template": {"type": "object"},
            },
        },
    },
}


def main() -> int:
    with open(sys.argv[1], encoding="utf-8") as file:
        documents = list(yaml.safe_load_all(file))
    jobs = 0
    for document in documents:
        if document["kind"] != "MPIJob":
            kubernetes_validate.validate(document, VERSION, strict=True)
            continue
        jobs += 1
        jsonschema.validate(document, MPI_JOB)
        spec = document["spec"]
        for replica in spec["mpiReplicaSpecs"].values():
            pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pods"}}
            kubernetes_validate.validate({**pods, "template": replica["template"]}, VERSION, strict=True)
            pod = replica["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
            if volumes != mounts:
                print(f"volumes {sorted(volumes)} and mounts {sorted(mounts)} are not the same")
                return 1
        ranks = spec["slotsPerWorker"] * spec["mpiReplicaSpecs"]["Worker"]["replicas"]
        launcher = spec["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
        words = [*launcher["command"], *launcher["args"]]
        if words[words.index("-n") + 1] != str(ranks):
            print(f"mpirun starts {words[words.index('-n') + 1]} ranks on {ranks} slots")
            return 1
        print("words:", *words[words.index("repa-dist") + 1 :], sep="\n")
    return 0 if jobs == 1 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (jsonschema.ValidationError, kubernetes_validate.utils.ValidationError) as error:
        print(error)
        sys.exit(1)
