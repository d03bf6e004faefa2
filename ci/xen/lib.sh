# Shared by the scripts here; sourced, not run.
# shellcheck shell=bash

xen=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=images/lib.sh
. "$xen/../../images/lib.sh"
# After the images': say and die are those of ci.
# shellcheck source=ci/lib.sh
. "$xen/../lib.sh"

seconds_since() {
    local ms=$(($(now_ms) - $1))
    printf '%d.%d' $((ms / 1000)) $((ms % 1000 / 100))
}
