# Shared by the image recipes; sourced, not run.
# shellcheck shell=bash

recipes=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$recipes")
images=${XBEE_IMAGES:-${XDG_CACHE_HOME:-$HOME/.cache}/xbee/images}
downloads=$images/.downloads

# Every time stamp inside an image. Fixed, so that the same packages give the same bytes.
export SOURCE_DATE_EPOCH=1700000000
export LC_ALL=C TZ=UTC

say() { printf 'images: %s\n' "$*"; }

die() {
    printf 'images: error: %s\n' "$*" >&2
    exit 1
}

all_images() {
    local script
    for script in "$recipes"/*/build; do
        printf '%s ' "$(basename "$(dirname "$script")")"
    done
}

now_ms() { date +%s%3N; }

elapsed() {
    local ms=$(($(now_ms) - $1))
    printf '%d.%d s' $((ms / 1000)) $((ms % 1000 / 100))
}

need() {
    local tool
    for tool; do
        command -v "$tool" >/dev/null || die "$tool is missing; run: ci/install images"
    done
}

# 16 hexadecimal digits for all that image $1 is made from.
recipe_hash() {
    local folder=$recipes/$1
    {
        (cd "$recipes" && find "$1" lib.sh mkdisk trim -type f -print0 | sort -z | xargs -0 sha256sum)
        if [[ -x $folder/inputs ]]; then "$folder/inputs"; fi
    } | sha256sum | cut -c 1-16
}

# What apt offers today, one `Package:`, `Version:` or `Depends:` line after the other. A question to
# apt costs half a second, so the answer is kept until apt's own files change.
apt_offer() {
    local state kept
    state=$(find /var/lib/apt/lists/ /etc/apt/preferences /etc/apt/preferences.d "$recipes/lib.sh" \
        -maxdepth 1 -type f -printf '%p %s %t\n' 2>/dev/null | sort | sha256sum | cut -c 1-16) || true
    kept=$downloads/apt-$state
    if [[ ! -s $kept ]]; then
        mkdir -p "$downloads"
        apt-cache show --no-all-versions linux-image-cloud-amd64 linux-source-6.12 busybox-static |
            sed -n '/^Package: /p; /^Version: /p; /^Depends: /p' >"$kept.$$" ||
            die "apt does not know the packages; run: apt-get update"
        find "$downloads" -maxdepth 1 -name 'apt-????????????????' -delete
        mv "$kept.$$" "$kept"
    fi
    cat "$kept"
}

# Version of package $1 (one of those in apt_offer) that apt would install.
candidate() {
    local version
    version=$(apt_offer | sed -n "/^Package: $1\$/,/^Version: /s/^Version: //p")
    [[ -n $version ]] || die "apt knows no package $1; run: apt-get update"
    printf '%s\n' "$version"
}

# Package of the distribution's cloud kernel, and its version.
cloud_kernel() {
    apt_offer | sed -n 's/^Depends: \(linux-image-[^ ]*-cloud-amd64\) (= \(.*\))$/\1 \2/p'
}

# The archive of package $1 at version $2, downloaded once; prints its path. Needs no root.
package() {
    local folder=$downloads/$1_$2
    if [[ ! -d $folder ]]; then
        local work
        mkdir -p "$downloads"
        work=$(mktemp -d "$downloads/.new-XXXXXX")
        # As root, apt drops to the user _apt, who may not enter a private cache directory.
        (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$1=$2") >&2 ||
            { rm -rf "$work"; die "cannot download package $1 $2; run: apt-get update"; }
        rm -rf "$downloads/${1%%-[0-9]*}"[-_]*
        mv -T "$work" "$folder"
    fi
    printf '%s\n' "$folder"/*.deb
}

# cargo_binary ARGUMENT...: builds with cargo, prints the path of the program.
cargo_binary() {
    local path
    path=$(cargo build --quiet --manifest-path "$repository/Cargo.toml" \
        --message-format=json-render-diagnostics "$@" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
    [[ -x $path ]] || die "cargo build $* made no program"
    printf '%s\n' "$path"
}

# debian_root VARIANT TAR PACKAGES_TXT PACKAGE...: the files of a Debian system with the packages and
# what they need, and the list of packages it was made of. Nothing is installed or started here.
#   extract    the packages are only unpacked
#   essential  they are installed, on top of the distribution's essential ones
debian_root() {
    local variant=$1 tar=$2 list=$3 hook query log
    shift 3
    need mmdebstrap
    case $variant in
    extract)
        hook=extract-hook
        query='for deb in "$1"/var/cache/apt/archives/*.deb; do dpkg-deb -W "$deb"; done'
        ;;
    essential)
        hook=customize-hook
        query='dpkg-query --admindir="$1/var/lib/dpkg" -W'
        ;;
    esac
    log=$(mktemp)
    mmdebstrap --variant="$variant" --include="$(IFS=,; echo "$*")" --format=tar \
        --dpkgopt=force-unsafe-io --aptopt='APT::Install-Recommends "false"' \
        "--$hook=$query >\"\$1/packages.txt\"" "--$hook=download /packages.txt $list" \
        "--$hook=rm \"\$1/packages.txt\"" \
        bookworm "$tar" >"$log" 2>&1 || {
        cat "$log" >&2
        rm -f "$log"
        die "mmdebstrap failed"
    }
    rm -f "$log"
}

# disk_from_tar TAR DISK SIZE_MIB NAME SETUP: an ext4 disk with the files of TAR, after the script
# SETUP has changed them (it is run in their root directory). Owners survive without root.
disk_from_tar() {
    local tar=$1 disk=$2 size_mib=$3 name=$4 setup=$5 work
    local root=()
    if [[ $(id -u) != 0 ]]; then
        need fakeroot
        root=(fakeroot --)
    fi
    work=$(mktemp -d)
    # Device nodes come with devtmpfs.
    "${root[@]}" bash -euc '
        tar -C "$1" --exclude="./dev/*" -xf "$2"
        (cd "$1" && "$3")
        "$4" "$1" "$5" "$6" "$7"' - \
        "$work" "$tar" "$setup" "$recipes/mkdisk" "$disk" "$size_mib" "$name"
    rm -rf "$work"
}

# The static busybox of the distribution, unpacked into directory $1; prints its path.
busybox_static() {
    local version archive
    version=$(candidate busybox-static)
    archive=$(package busybox-static "$version")
    dpkg -x "$archive" "$1"
    printf '%s\n' "$1/bin/busybox"
}

# Hash of all that the tuned kernel is made from, and the directory it is kept in.
tuned_kernel_hash() {
    local version
    version=$(candidate linux-source-6.12)
    {
        echo "$version"
        cat "$recipes/tuned-kernel/config" "$recipes/tuned-kernel/make"
    } | sha256sum | cut -c 1-16
}

tuned_kernel() {
    local hash
    hash=$(tuned_kernel_hash)
    printf '%s\n' "$images/.tuned-$hash"
}
