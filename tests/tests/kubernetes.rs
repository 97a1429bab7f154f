//! The MPIJob in configs/kubernetes against what the MPI operator's API v2beta1 takes. It drops keys that it does not
//! know, so a slip in one would go unseen.

use std::path::Path;

use yaml_rust2::{Yaml, YamlLoader};

/// The documents of the manifest.
fn manifest() -> Vec<Yaml> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/kubernetes/mpijob.yaml");
    YamlLoader::load_from_str(&std::fs::read_to_string(path).expect("readable")).expect("YAML")
}

/// A mapping has these keys, and besides them none but those.
#[track_caller]
fn holds(value: &Yaml, required: &[&str], others: &[&str]) {
    let map = value.as_hash().unwrap_or_else(|| panic!("no mapping: {value:?}"));
    let keys: Vec<&str> = map.keys().map(|key| key.as_str().expect("a word")).collect();
    for key in required {
        assert!(keys.contains(key), "no {key} among {keys:?}");
    }
    for key in keys {
        assert!(required.contains(&key) || others.contains(&key), "unknown key {key}");
    }
}

#[track_caller]
fn one_of(value: &Yaml, words: &[&str]) {
    assert!(value.as_str().is_some_and(|word| words.contains(&word)), "{value:?} is none of {words:?}");
}

#[test]
fn the_mpi_job_fits_the_api() {
    let documents = manifest();
    let [claim, job] = &documents[..] else { panic!("{} documents", documents.len()) };
    holds(claim, &["apiVersion", "kind", "metadata", "spec"], &[]);
    assert_eq!(
        (claim["apiVersion"].as_str(), claim["kind"].as_str()),
        (Some("v1"), Some("PersistentVolumeClaim"))
    );

    holds(job, &["apiVersion", "kind", "metadata", "spec"], &[]);
    assert_eq!(
        (job["apiVersion"].as_str(), job["kind"].as_str()),
        (Some("kubeflow.org/v2beta1"), Some("MPIJob"))
    );
    let spec = &job["spec"];
    holds(
        spec,
        &["slotsPerWorker", "runPolicy", "mpiReplicaSpecs"],
        &["launcherCreationPolicy", "mpiImplementation", "runLauncherAsWorker", "sshAuthMountPath"],
    );
    one_of(&spec["launcherCreationPolicy"], &["AtStartup", "WaitForWorkersReady"]);
    let policy = &spec["runPolicy"];
    let others =
        ["activeDeadlineSeconds", "managedBy", "schedulingPolicy", "suspend", "ttlSecondsAfterFinished"];
    holds(policy, &["cleanPodPolicy", "backoffLimit"], &others);
    one_of(&policy["cleanPodPolicy"], &["All", "None", "Running"]);
    assert!(policy["backoffLimit"].as_i64().is_some_and(|limit| limit > 0));

    let replicas = &spec["mpiReplicaSpecs"];
    holds(replicas, &["Launcher", "Worker"], &[]);
    for name in ["Launcher", "Worker"] {
        let replica = &replicas[name];
        holds(replica, &["replicas", "template"], &["restartPolicy"]);
        if !replica["restartPolicy"].is_badvalue() {
            one_of(&replica["restartPolicy"], &["Never", "OnFailure"]);
        }
        holds(&replica["template"], &["spec"], &["metadata"]);
        pod(&replica["template"]["spec"], claim);
    }
    // A launcher that is not started again would make the first stop the last.
    assert_eq!(replicas["Launcher"]["replicas"].as_i64(), Some(1));
    assert_eq!(replicas["Launcher"]["restartPolicy"].as_str(), Some("OnFailure"));
    // A rank for each slot.
    let slots = spec["slotsPerWorker"].as_i64().expect("a number");
    let ranks = slots * replicas["Worker"]["replicas"].as_i64().expect("a number");
    let arguments =
        replicas["Launcher"]["template"]["spec"]["containers"][0]["args"].as_vec().expect("a list");
    let at = arguments.iter().position(|word| word.as_str() == Some("-n")).expect("-n");
    assert_eq!(arguments[at + 1].as_str(), Some(ranks.to_string().as_str()));
}

/// A pod's containers, and the volumes that they mount.
#[track_caller]
fn pod(spec: &Yaml, claim: &Yaml) {
    holds(spec, &["containers", "volumes"], &["terminationGracePeriodSeconds"]);
    let volumes = spec["volumes"].as_vec().expect("a list");
    for volume in volumes.iter().map(|volume| &volume["persistentVolumeClaim"]).filter(|v| !v.is_badvalue()) {
        assert_eq!(volume["claimName"], claim["metadata"]["name"]);
    }
    for container in spec["containers"].as_vec().expect("a list") {
        let others = ["args", "command", "lifecycle", "resources", "volumeMounts"];
        holds(container, &["name", "image"], &others);
        holds(&container["resources"], &["requests", "limits"], &[]);
        for word in ["command", "args"].iter().flat_map(|key| container[*key].as_vec().expect("a list")) {
            assert!(word.as_str().is_some(), "{word:?} has to be a string");
        }
        for mount in container["volumeMounts"].as_vec().expect("a list") {
            holds(mount, &["name", "mountPath"], &[]);
            assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "no volume {mount:?}");
        }
    }
}
