#!/usr/bin/env bash
# check_exports.sh LIBRARY: the shared library exports names of the public headers and no others.
set -euo pipefail

library=${1:?path of libmsa.so}
names=$(nm -D --defined-only "$library" | awk '{ print $3 }')
foreign=$(grep -Ev '^(msa_|_ZNK?3msa|_ZT[ISV]N3msa)' <<<"$names" || true)
# Namespaces inside msa are internal.
internal=$(c++filt <<<"$names" | grep -E '\bmsa::[a-z_0-9]+::' || true)
if [[ -n $foreign$internal ]]; then
  echo "$library exports what is not public:" >&2
  c++filt <<<"$foreign$internal" | sed 's/^/  /' >&2
  exit 1
fi
for name in msa_version msa_plan_create _ZN3msa8backendsEv; do
  grep -qx "$name" <<<"$names" || { echo "$library does not export $name" >&2; exit 1; }
done
echo "$(wc -l <<<"$names") exported symbols, all of the public headers"
