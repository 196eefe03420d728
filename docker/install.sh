#!/bin/sh
# Install CSC Train in an image, by steps that run as root in its checkout. The Dockerfile and csc_train.def call them.
#   install.sh system              packages of Debian or Ubuntu
#   install.sh libraries [EXTRAS]  what pyproject.toml names, in the versions of requirements.lock, into $VENV
#   install.sh project             the checkout itself, in place
set -eu
: "${VENV:=/opt/venv}"

case "$1" in
system)
    # Of the image's own hook: it would empty the cache of packages, which is a mount
    rm -f /etc/apt/apt.conf.d/docker-clean
    apt-get update
    # g++ and Python's headers: triton and inductor compile when they run. libibverbs: NCCL over InfiniBand.
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ ibverbs-providers libibverbs1 make python3-dev python3-venv
    ;;
libraries)
    python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"python3 is {sys.version.split()[0]}: \
choose a BASE with 3.11 or later")'
    python3 -m venv "$VENV"
    wanted=$(mktemp)
    "$VENV/bin/python" - "${2:-}" > "$wanted" << 'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
chosen = [name for name in sys.argv[1].split(",") if name]
if unknown := [name for name in chosen if name not in extras]:
    sys.exit(f"EXTRAS={sys.argv[1]}: no {unknown[0]} in pyproject.toml: choose of {', '.join(extras)}")
print(*project["dependencies"], *(wanted for name in chosen for wanted in extras[name]), sep="\n")
PYTHON
    "$VENV/bin/pip" install --requirement "$wanted" --constraint requirements.lock
    rm "$wanted"
    ;;
project)
    "$VENV/bin/pip" install --no-deps --no-build-isolation --editable .
    "$VENV/bin/python" -m compileall -q csc_train launch recipes
    # Of any user: pyxis and Apptainer run the image as the user who submits the job.
    install --directory --mode 1777 runs
    touch "$VENV/installed" # for make: nothing is left to install
    ;;
*)
    echo "install.sh $1: unknown step: choose system, libraries or project" >&2
    exit 2
    ;;
esac
