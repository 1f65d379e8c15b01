#!/usr/bin/env bash
# check_isa_symbols.sh BUILD_DIR: no ISA object offers code that a linker may use elsewhere.
#
# The sources of src/cpu/{avx2,avx512,amx} are compiled for CPUs that the running one may not be. An
# inline function or template of another header that is emitted there is a weak symbol, and the
# linker may pick that copy for all callers: an illegal instruction on older machines. Allowed are
# weak functions of the ISA's own: its vocabulary (class Avx2, say) is in their name, as template
# argument or scope. BUILD_DIR is an optimised build, as a debug one inlines nothing.
set -euo pipefail

objects=${1:?build directory}/src/CMakeFiles/msa_objects.dir/cpu
checked=0
bad=0
for isa in avx2 avx512 amx; do
  for object in "$objects/$isa"/*.o; do
    [[ -e $object ]] || continue
    checked=$((checked + 1))
    own="${#isa}$isa"  # how a mangled name spells it, but for the case
    foreign=$(nm --defined-only "$object" | \
      awk -v own="$own" '$2 == "W" && !index(tolower($3), own) { print $3 }')
    [[ -z $foreign ]] && continue
    bad=1
    echo "$object: weak functions that are not its own:" >&2
    c++filt <<<"$foreign" | sed 's/^/  /' >&2
  done
done
((checked)) || { echo "no object files of src/cpu/{avx2,avx512,amx} in $1" >&2; exit 1; }
((bad)) && exit 1
echo "$checked objects of instruction-set backends keep their code to themselves"
