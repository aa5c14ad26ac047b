#!/usr/bin/env bash
# A training on a TPU slice of a GKE cluster that has JobSet, as one JobSet with a pod on every host of the slice.
#
#   bash launch/gke.sh image NAME --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/miracle_jax:1
#   bash launch/gke.sh run NAME --image IMAGE --accelerator tpu-v5-lite-podslice --topology 4x4 --claim CLAIM [--spot] \
#       [flags] -- --config configs/paper.py --workdir /runs/paper ...
#   bash launch/gke.sh manifest NAME ...       the same arguments; prints the manifest alone
#   bash launch/gke.sh logs|status|delete NAME
#
# `image` builds launch/Dockerfile from the files of HEAD and pushes it. `run` applies the manifest. The same line again
# leaves a training that runs alone, and one that has ended it starts again, which resumes. The cluster looks after it:
# when a pod ends with status 75 (preempted) or is lost, the JobSet starts all of them again, --tries times at most.
# Status 2, a mistake of the user's, ends it at once. Status 1 does not: so may the others end when one was lost.
#
#   --accelerator TYPE    the node's label cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, tpu-v5p-slice,
#                         tpu-v6e-slice, ...
#   --topology 4x4        of the slice's chips
#   --chips 4             chips a host
#   --claim CLAIM         a PersistentVolumeClaim that many pods may write (ReadWriteMany: Filestore's csi driver, for
#                         instance), mounted at /runs; --workdir has to be below, for nothing else outlives a pod
#   --spot                on spot nodes
#   --tries 50            how often to start it at most
#   --namespace NAME      where it is not kubectl's own
#   --dry-run             print each command and run none
#
# Follows JobSet v0.10 (jobset.x-k8s.io/v1alpha2, https://jobset.sigs.k8s.io), Kubernetes 1.31 (podFailurePolicy) and
# https://cloud.google.com/kubernetes-engine/docs/how-to/tpus. docs/launching.md has the line for xpk.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

MOUNT=/runs
# Seconds to save in. Nodes that are drained grant them; spot nodes are gone after 30, of which pods have 15 or so
# (https://cloud.google.com/kubernetes-engine/docs/concepts/spot-vms).
GRACE=120

command=${1:-} name=${2:-} image="" accelerator="" topology="" chips=4 claim="" spot="" namespace=""
case $command in
    -h | --help | "") usage ;;
    image | run | manifest | logs | status | delete) ;;
    *) fail "unknown command $command; gke.sh takes image, run, manifest, logs, status or delete, and --help" ;;
esac
if [[ $name == -h || $name == --help ]]; then usage; fi
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "$command needs a name of small letters, digits and hyphens: bash launch/gke.sh $command NAME ..."
shift 2
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage ;;
        --image) image=$(value "$@"); shift ;;
        --accelerator) accelerator=$(value "$@"); shift ;;
        --topology) topology=$(value "$@"); shift ;;
        --chips) chips=$(number "$@"); shift ;;
        --claim) claim=$(value "$@"); shift ;;
        --namespace) namespace=$(value "$@"); shift ;;
        --tries) tries=$(number "$@"); shift ;;
        --spot) spot=yes ;;
        --dry-run) dry_run=yes ;;
        --) shift && break ;;
        *) fail "unknown argument $1; what goes to the training follows a --" ;;
    esac
    shift
done

if [[ $command == run || $command == manifest ]]; then
    [[ -n $accelerator ]] || fail "$command needs --accelerator, for instance --accelerator tpu-v5-lite-podslice"
    [[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
        fail "$command needs --topology, for instance --topology 4x4, not '$topology'"
    hosts=$((${topology//x/*} / chips))
    ((hosts > 0 && hosts * chips == ${topology//x/*})) ||
        fail "a topology of $topology has no whole number of hosts of $chips chips; give --chips"
    [[ -n $claim ]] || fail "$command needs --claim, the volume on which the run outlives its pods"
    folder=$(workdir "$@")
    [[ $folder == $MOUNT/?* ]] || fail "--workdir $folder would be lost with its pod; it has to be below $MOUNT"
else
    [[ $# -eq 0 ]] || fail "only run and manifest train; $command takes nothing after --"
fi
[[ -n $image || ! $command =~ ^(image|run|manifest)$ ]] || fail "$command needs --image"

string() { # a word as a string of YAML; of a container's command also safe from Kubernetes' own $(...)
    local word=${1//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    echo "\"${word//\$(/\$\$(}\""
}

manifest() {
    local word
    cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:  # all pods on the nodes of one slice
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $((tries - 1))
    rules:
      - name: mistake  # all other failures start all pods again
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0  # no pod comes back alone: the others would wait for it in vain
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $GRACE
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(string "$accelerator")
                cloud.google.com/gke-tpu-topology: $(string "$topology")
${spot:+                cloud.google.com/gke-spot: \"true\"
}              tolerations:
                - {key: google.com/tpu, operator: Exists, effect: NoSchedule}
                - {key: cloud.google.com/gke-spot, operator: Exists, effect: NoSchedule}
              containers:
                - name: train
                  image: $(string "$image")
                  env:
                    - {name: JAX_COMPILATION_CACHE_DIR, value: $MOUNT/compiled}
                  resources:
                    limits: {google.com/tpu: $chips}
                  volumeMounts:
                    - {name: runs, mountPath: $MOUNT}
                  command:  # .venv/bin/python -m miracle_jax.train
END
    for word in .venv/bin/python -m miracle_jax.train "$@"; do
        echo "                    - $(string "$word")"
    done
    cat <<END
              volumes:
                - name: runs
                  persistentVolumeClaim: {claimName: $(string "$claim")}
END
}

case $command in
    manifest) manifest "$@" && exit ;;
    image)
        needs docker "https://docs.docker.com/get-docker says how"
        needs git "the image gets the files of its HEAD"
        ;;
    *) needs kubectl "gcloud components install kubectl gke-gcloud-auth-plugin brings it" ;;
esac
cluster=(kubectl ${namespace:+"--namespace=$namespace"})
case $command in
    image)
        run bash -o pipefail -c "git archive HEAD | docker build --tag=$(quoted "$image") --file=launch/Dockerfile -"
        run docker push "$image"
        ;;
    run)
        ended="--output=jsonpath={.status.terminalState}"
        ended=$(run "${cluster[@]}" get jobset "$name" --ignore-not-found "$ended")
        if [[ -n $ended || -n $dry_run ]]; then # Completed or Failed, of which no pod starts again by itself
            run "${cluster[@]}" delete jobset "$name" --ignore-not-found --cascade=foreground
        fi
        run "${cluster[@]}" apply --filename=- < <(manifest "$@")
        if [[ -n $dry_run ]]; then manifest "$@"; fi
        echo "bash launch/gke.sh logs $name${namespace:+ --namespace $namespace} shows what it prints"
        ;;
    logs)
        first="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
        run "${cluster[@]}" logs --follow "--selector=$first"
        ;;
    status) run "${cluster[@]}" get "jobset/$name" ;;
    delete) run "${cluster[@]}" delete jobset "$name" --ignore-not-found --cascade=foreground ;;
esac
