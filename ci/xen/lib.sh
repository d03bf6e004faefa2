# Shared by the scripts here; sourced, not run.
# shellcheck shell=bash

xen=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=images/lib.sh
. "$xen/../../images/lib.sh"
# After the images': say and die are those of ci.
# shellcheck source=ci/lib.sh
. "$xen/../lib.sh"

# Without the date that images' scripts export: a C library's build script that sees another date runs again, and all that
# needs the library is built again, by everybody in turn.
cargo() { env -u SOURCE_DATE_EPOCH cargo "$@"; }

seconds_since() {
    local ms=$(($(now_ms) - $1))
    printf '%d.%d' $((ms / 1000)) $((ms % 1000 / 100))
}

# copy_modules FROM TO NAME...: the kernel modules and what they need, and the file `order`, in which they can be
# loaded. FROM is a directory with modules.dep.
copy_modules() {
    local from=$1 to=$2 name module
    shift 2
    for name; do
        # The dependencies come after the module, the innermost last.
        sed -n "s|^\(.*/$name\.ko\): *|\1 |p" "$from/modules.dep" | tr ' ' '\n' | sed '/^$/d' | tac
    done | awk '!seen[$0]++' | while read -r module; do
        cp "$from/$module" "$to/"
        basename "$module"
    done >"$to/order"
}

# The newc archive of a directory, on standard output.
archive() {
    (cd "$1" && find . | sort | busybox cpio -o -H newc -R 0:0 2>/dev/null)
}
