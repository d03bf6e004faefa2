# Sourced in dom0 by suites that use xbed and xbe, which lie beside them.
# shellcheck shell=bash

work=$(mktemp -d)
export XBE_SERVER=$work/xbed.sock
xbed=

start() {
    ./xbed --config "$work/xbed.toml" --data "$work/data" --socket "$XBE_SERVER" --backend xen 2>>"$work/xbed.log" &
    xbed=$!
    local tries
    for ((tries = 0; tries < 300; tries++)); do
        ./xbe host >/dev/null 2>&1 && return
        sleep 0.1
    done
    echo "xbed did not answer within 30 s"
    return 1
}

cleanup() {
    local domain
    kill -9 "$xbed" 2>/dev/null || true
    for domain in $(xl list | awk '$1 ~ /^xbee-/ { print $1 }'); do xl destroy "$domain" || true; done
    rm -rf "$work"
}
trap cleanup EXIT

# expect WHAT GOT
expect() {
    [[ $2 == "$1" ]] || {
        echo "expected '$1', got '$2'"
        return 1
    }
}

# within_s SECONDS COMMAND...: waits until the command succeeds.
within_s() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" 2>/dev/null; do
        if [[ $SECONDS -ge $deadline ]]; then
            echo "not in time: $*"
            return 1
        fi
        sleep 0.2
    done
}

# The address of a task's domain.
address() {
    ./xbe exec "$1" -- cat /proc/net/if_inet6 |
        awk '$1 ~ /^fd58454e/ { gsub("....", "&:", $1); sub(":$", "", $1); print $1 }'
}

# What the manual says, with the prefix of this dom0.
cp xbed.toml "$work/"

# run_tests TEST...: runs functions as tests and says the result as `cargo test` does.
run_tests() {
    local test began result=ok passed=0 failed=0
    start
    for test; do
        began=$SECONDS
        # Not in a subshell: xbed is started anew by one of them.
        if $test >"$work/output" 2>&1; then
            passed=$((passed + 1))
            echo "test $test ... ok ($((SECONDS - began)) s)"
        else
            failed=$((failed + 1))
            echo "test $test ... FAILED"
            cat "$work/output"
            tail -n 30 "$work/xbed.log"
        fi
    done
    [[ $failed == 0 ]] || result=FAILED
    echo "test result: $result. $passed passed; $failed failed; 0 ignored"
    [[ $failed == 0 ]]
}
