#!/usr/bin/env bash
# Runs core_tests on processors that this machine is not, under qemu's user-mode emulation:
#
#   infra/setup/cross_tests.sh aarch64             Cortex-A53, Cortex-A76 and all that qemu knows
#   infra/setup/cross_tests.sh x86_64              Nehalem (no AVX2) and Haswell (no AVX-512)
#   infra/setup/cross_tests.sh aarch64 forward     these parts of core_tests instead of the quick ones
#
# Each processor has to offer exactly the kernels that it should, and no kernel file may leave code for its
# instructions where the linker could pick it for everybody. Exits with 77 and one sentence when a tool is missing.
set -euo pipefail
cd "${BASH_SOURCE%/*}/../.."

missing() { echo "cross tests: not run, $*" >&2; exit 77; }
fail() { echo "cross tests: $*" >&2; exit 1; }

machine=${1:-}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(half kernels packed golden)
case $machine in
aarch64) processors=("cortex-a53=reference neon" "cortex-a76=reference neon neon_dotprod"
    "max=reference neon neon_dotprod neon_i8mm") ;;
x86_64) processors=("Nehalem=reference" "Haswell=reference avx2") ;;
*) fail "name a machine, aarch64 or x86_64" ;;
esac

command -v cmake >/dev/null || missing "there is no cmake"
emulator=$(command -v "qemu-$machine-static" || command -v "qemu-$machine") ||
    missing "there is no qemu-$machine (on Debian: apt-get install qemu-user-static)"

folder=build/cross-$machine
mkdir -p "$folder"
options=()
names=nm
python=.venv/bin/python
[ -x $python ] || python=${PYTHON:-python3}
if [ "$machine" = "$(uname -m)" ]; then
    compiler=${CXX:-c++}
    command -v "$compiler" >/dev/null || missing "there is no C++ compiler '$compiler'"
elif compiler=$(command -v "$machine-linux-gnu-g++"); then
    names=$machine-linux-gnu-nm
elif "$python" -c 'import ziglang' 2>/dev/null; then
    names=true # zig has no nm
    python=$(command -v "$python")
    for tool in ar ranlib; do printf '#!/bin/sh\nexec "%s" -m ziglang %s "$@"\n' "$python" $tool >"$folder/$tool"; done
    cat >"$folder/c++" <<END # zig names processors, not architectures
#!/bin/bash
arguments=()
for argument; do
    [[ \$argument = -march=armv8* ]] && argument=\$(sed 's/-march=armv8[^+]*/-mcpu=generic/; s/+fp16/+fullfp16/' <<<"\$argument")
    arguments+=("\$argument")
done
exec "$python" -m ziglang c++ -target $machine-linux-musl "\${arguments[@]}"
END
    chmod +x "$folder"/{c++,ar,ranlib}
    compiler=$PWD/$folder/c++
    options=(-DCMAKE_AR="$PWD/$folder/ar" -DCMAKE_RANLIB="$PWD/$folder/ranlib")
else
    missing "nothing here compiles for $machine (on Debian: apt-get install g++-${machine/_/-}-linux-gnu; or pip install ziglang)"
fi
if command -v ninja >/dev/null; then options+=(-G Ninja); fi

log=$folder/log
{
    cmake -S . -B "$folder" "${options[@]}" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR="$machine" \
        -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_FLAGS_RELEASE="-O2 -DNDEBUG" -DCMAKE_EXE_LINKER_FLAGS=-static \
        -DSMALLTHINKER_MODULE=OFF -DSMALLTHINKER_TESTS=ON -DSMALLTHINKER_WERROR=ON &&
        cmake --build "$folder" --target core_tests --parallel 2
} >"$log" 2>&1 || { tail -n 40 "$log" >&2; fail "core_tests does not build for $machine"; }

objects=$(find "$folder" -path '*/kernels/*/*.o')
[ -n "$objects" ] || fail "no kernel file was compiled for $machine"
for object in $objects; do
    leaked=$($names -C --defined-only "$object" | grep -E ' [WVu] ' || true)
    [ -z "$leaked" ] || fail "$(basename "$object") leaves code that the linker could pick for everybody:"$'\n'"$leaked"
done

for processor in "${processors[@]}"; do
    name=${processor%%=*}
    "$emulator" -cpu "$name" "$folder/core_tests" --golden tests/golden/gguf "${parts[@]}" >"$log" 2>&1 ||
        { tail -n 40 "$log" >&2; fail "core_tests fails on $name"; }
    if [[ " ${parts[*]} " = *" kernels "* ]]; then
        offered=$(sed -n 's/^kernels \(.*\): ok$/\1/p' "$log" | xargs)
        [ "$offered" = "${processor#*=}" ] || fail "$name offers the kernels '$offered', not '${processor#*=}'"
    fi
    echo "$machine $name: ${parts[*]}: ok"
done
