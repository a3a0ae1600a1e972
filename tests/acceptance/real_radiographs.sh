#!/usr/bin/env bash
# Four hospitals of real radiographs become one evaluated model, with the commands of the README, over four separate node
# processes and real TLS.
#
#   tests/acceptance/real_radiographs.sh OUT [TEMPLATE]     leaves OUT/report/report.html and OUT/report/metrics.json
#
# TEMPLATE: opacity (without differential privacy, the default) or opacity_private.
#
# The radiographs are not part of this project: they are looked for beside it, in ../shared (or where SHARED says).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: real_radiographs.sh OUT [TEMPLATE]}
template=${2:-opacity}
shared=${SHARED:-$PWD/../shared}
bin=${BIN:-$PWD/.venv/bin}
if [ ! -f "$shared/tools/make_hospitals.py" ]; then
    echo "skipped: there are no real radiographs in $shared"
    exit 0
fi
if [ -e "$out" ] && [ -n "$(ls -A "$out")" ]; then
    echo "$out is not empty; choose a new folder" >&2
    exit 2
fi
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
export PATH="$bin:$PATH"
pids=()
finish() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

# A long-lived command in the background; waits until its log holds the given words.
launch() {
    local label=$1 words=$2
    shift 2
    "$@" > "$out/logs/$label.log" 2>&1 &
    pids+=($!)
    for _ in $(seq 600); do
        grep -q "$words" "$out/logs/$label.log" && return
        kill -0 "${pids[-1]}" 2>/dev/null || break
        sleep 0.1
    done
    echo "$label did not get ready:" >&2
    cat "$out/logs/$label.log" >&2
    exit 1
}
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

echo "== four hospitals of DICOM with their own label tables"
"$bin/python" "$shared/tools/make_hospitals.py" --data "$shared/data" --out "$out/hospitals"

echo "== the coordinator"
fl-server init "$out/coordinator" --name midrc --host 127.0.0.1 --gateway-port "$(port)" --service-port "$(port)"
launch coordinator "is ready" fl-server start --home "$out/coordinator"

join_site() {
    local name=$1 labels=$2
    fl-client join "$(fl-server invite "$name" --home "$out/coordinator" 2>/dev/null)" --home "$out/sites/$name"
    # What a person would write into the commented site.yaml: the data section, and decisions about policy and the machine.
    sed -i 's/minimum_patients: 10/minimum_patients: 5/; s/cpu_threads: 0/cpu_threads: 1/
            s/permit_without_privacy: false/permit_without_privacy: true/' \
        "$out/sites/$name/site.yaml"
    cat >> "$out/sites/$name/site.yaml" << YAML

data:
  name: chest
  folder: $out/hospitals/$name/dicom
  format: dicom
  labels:
    table: $out/hospitals/$name/labels.csv
$labels
YAML
    fl-client ingest --home "$out/sites/$name"
    fl-client ingest --home "$out/sites/$name" --json > "$out/logs/ingest-$name.json" 2> /dev/null
    fl-client check --home "$out/sites/$name"
}
echo "== four sites join, describe their tables, read their images"
join_site north '    key: StudyInstanceUID
    matches: study_uid
    targets:
      opacity: {column: pneumonia, words: {"1": 1, "0": 0}}'
join_site south '    key: Study UID
    matches: study_uid
    targets:
      opacity: {column: Diagnosis, words: {PNEUMONIA: 1, normal: 0}}'
join_site east '    key: AccessionNumber
    matches: accession
    targets:
      opacity: {column: finding, words: {Pneumonia: 1, COVID-19: 1, No Finding: 0}}'
join_site west '    key: PatientID
    matches: patient_id
    targets:
      opacity: {column: opacity, words: {yes: 1, no: 0}}'

echo "== the researcher"
fl-study join "$(fl-server invite researcher --researcher --home "$out/coordinator" 2>/dev/null)" --home "$out/researcher"
fl-study new "$out/study.yaml" --template "$template"
fl-study check "$out/study.yaml"
fl-study submit "$out/study.yaml" --home "$out/researcher" | tee "$out/logs/submit.log"
digest=$(grep -oE -m 1 '[0-9a-f]{64}' "$out/logs/submit.log")

echo "== each site reads the study and approves it; the nodes start"
for name in north south east west; do
    fl-client approve "$digest" --yes --home "$out/sites/$name"
    launch "node-$name" "waits for orders" fl-client start --home "$out/sites/$name"
done

echo "== the run"
fl-study run "$digest" --home "$out/researcher"
fl-study report "$digest" --home "$out/researcher" --out "$out/report"
for name in north south east west; do fl-client budget --home "$out/sites/$name" --plot "$out/budget-$name.png"; done
fl-server runs --home "$out/coordinator"
if [ "$template" = opacity ]; then  # a private model goes out only with the attack on it
    echo "== the released model, and its scores on a folder of DICOM"
    fl-study release "$digest" --home "$out/researcher" --out "$out/opacity.isocenter"
    fl-study verify "$out/opacity.isocenter"
    fl-study predict "$out/opacity.isocenter" "$out/hospitals/north/dicom" --out "$out/scores.csv"
fi
