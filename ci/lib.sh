# Shared by the scripts here; sourced, not run.
# shellcheck shell=bash

repository=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/xbee

# What the scripts do themselves goes to standard error, so that output can be piped.
say() { printf '== %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
