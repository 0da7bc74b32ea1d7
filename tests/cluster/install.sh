#!/usr/bin/env bash
# Installs what the cluster tests need and this Debian machine lacks: SLURM, munge, network namespaces. Needs root.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"
missing=()
need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null || missing+=("$2")
}
need slurmctld slurmctld
need slurmd slurmd
need sbatch slurm-client
need munged munge
need ip iproute2
need ps procps
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "error: the cluster tests need ${missing[*]}: install them as root (sudo $0)" >&2
    exit 2
fi
# The tests start daemons of their own; installing the packages must start none.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
