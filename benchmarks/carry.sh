#!/usr/bin/env bash
# gpu_check on a machine that has torch and Triton, but no package registry.
#
#   benchmarks/carry.sh download [--all]   here: wheels of what such a machine lacks, into build/carry (6 MB)
#   benchmarks/carry.sh list [--all]       names of what it fetches, without what these need
#   benchmarks/carry.sh run --part 1 --out results --archive part1.tar.gz      there, then parts 2 and 3
#
# --all adds what a machine with nothing but torch and Triton lacks: numpy, pytest and others (40 MB). PYTHON names the
# interpreter, python3 by default, and PYTHON_VERSION the other machine's version if it is not the same, e.g. 3.12. Take
# the checkout with build/carry to the other machine; if its repository stays here, set GIT_COMMIT there, which the
# results name. `run` unpacks the wheels and passes its options to gpu_check.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=build/carry unpacked=$PWD/build/carried
packages=(pydantic submitit) # and xformers, without torch, which it needs and which is there
[[ ${2:-} != --all ]] || packages+=(numpy pillow pyyaml tqdm safetensors pytest pytest-timeout hypothesis)

case ${1:-} in
download)
    version=${PYTHON_VERSION:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
    options=(--quiet --only-binary=:all: --python-version "$version" --implementation cp --dest "$wheels")
    for glibc in 2_28 2_27 2_17 2_12 2_5; do options+=(--platform "manylinux_${glibc}_x86_64"); done
    options+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --constraint constraints.txt)
    rm -rf "$wheels"
    "$python" -m pip download "${options[@]}" "${packages[@]}"
    "$python" -m pip download "${options[@]}" --no-deps xformers
    du -sh "$wheels"
    ;;
list)
    echo "${packages[@]}" xformers
    ;;
run)
    if ! compgen -G "$wheels/*.whl" >/dev/null; then
        echo "no wheels in $wheels: call benchmarks/carry.sh download where there is a package registry" >&2
        exit 1
    fi
    rm -rf "$unpacked"
    unpack='import sys, zipfile; [zipfile.ZipFile(path).extractall(sys.argv[1]) for path in sys.argv[2:]]'
    "$python" -c "$unpack" "$unpacked" "$wheels"/*.whl # pip may not be there
    PYTHONPATH=$unpacked:$PWD exec "$python" -m benchmarks.gpu_check "${@:2}"
    ;;
*)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
    ;;
esac
