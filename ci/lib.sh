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

# count_results WHAT FILE...: the sum of what runners of tests say of it, "12 tests run: 11 passed, 1 failed" of
# nextest and "test result: ok. 3 passed; 0 failed; 0 ignored" of cargo test.
count_results() {
    awk -v what="$1" '
        /^ *Summary \[/ || /^test result:/ {
            while (match($0, "[0-9]+ " what)) {
                n += substr($0, RSTART, RLENGTH)
                $0 = substr($0, RSTART + RLENGTH)
            }
        }
        END { print n + 0 }' "${@:2}"
}
