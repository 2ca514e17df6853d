#!/bin/sh
# What each image's Python is made of: FOLDER/SERVICE.cdx.json (CycloneDX), from the same pins as its Dockerfile.
# sbom.sh FOLDER PYTHON, where PYTHON has cyclonedx-bom, hatchling and pip
set -eu
folder=$1 python=$2
here=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$folder"
(cd "$here" && "$python" -m hatchling build -t wheel -d "$scratch" >/dev/null 2>&1)

# image:extras, as in deploy/compose/Dockerfile; the bus's image holds one package, which is no Python.
for image in collector:collector enricher:enricher signer:signer,hsm gateway:gateway cli:cli,signer,hsm; do
  name=${image%%:*}
  "$python" -m venv --without-pip "$scratch/$name"
  "$python" -m pip --python "$scratch/$name/bin/python" install -q --disable-pip-version-check \
    -c "$here/requirements.lock" "$(echo "$scratch"/*.whl)[${image#*:}]"
  "$python" -m cyclonedx_py environment --output-reproducible --pyproject "$here/pyproject.toml" \
    -o "$folder/$name.cdx.json" "$scratch/$name/bin/python"
  echo "$folder/$name.cdx.json"
done
