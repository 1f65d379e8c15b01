#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine with CUDA 13 and PyTorch:
#
#   dev/gpu.sh build|check|sanitize|bench|traces|python|compare|gradients|facts|code_11m|train|all
#
# `train` is the three before it. A stage takes less than 8 minutes, the experiments `facts` and
# `code_11m` the MINUTES that they may (default 7), and leaves its results as JSON and logs in $OUT
# (default build/gpu). Those that time something want a GPU to themselves. SIZE (default gpu) and
# ARMS are those of `facts`. MSA_BIN names a folder with ready-made `msa`, `msa_gpu` and
# python/msa_cpp (and what they need); without it they are built into build/cuda, the Python package
# where nanobind is. `python`, `gradients` and `compare` run in $PYTHON (default python3), which
# needs what scripts/requirements-test.txt lists, for the experiments torch, NumPy and safetensors
# alone; `python` and `compare` include vLLM and SGLang where they are installed, or their functions
# where dev/engine_modules.py has put them on PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-build/gpu}
BIN=${MSA_BIN:-build/cuda}
LIMIT=480  # seconds a stage may take
mkdir -p "$OUT"
export LD_LIBRARY_PATH=$BIN${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

failed=0
# Runs a command, keeps its output in $OUT/NAME.log, shows the end of it, and goes on.
step() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
  tail -n 6 "$OUT/$name.log" | cut -c 1-180
  printf '== %s: %s, %d s\n' "$name" "$([[ $code == 0 ]] && echo ok || echo "FAILED ($code)")" \
    $((SECONDS - start))
  ((code == 0)) || failed=1
}

build() {
  if [[ ${MSA_BIN:-} ]]; then
    echo "MSA_BIN is set: nothing to build"
    return
  fi
  step configure 60 cmake --preset cuda
  local targets=(--target msa_cli --target msa_gpu)
  cmake --build --preset cuda --target help | grep -q '_core' && targets+=(--target _core)
  step build $LIMIT cmake --build --preset cuda --parallel "$(nproc)" "${targets[@]}"
}

check() {
  step info 30 "$BIN/msa" info --json "$OUT/info.json"
  for backend in cuda cuda-plain cuda-kv-outer; do
    step "check_$backend" 200 "$BIN/msa" check --backend $backend --suite full --quiet \
      --json "$OUT/check_$backend.json"
  done
  step contracts 200 "$BIN/msa_gpu" --gtest_output="json:$OUT/contracts.json"
}

# A sanitizer's own exit code, for what it finds. In the background, for `sanitize` to wait for.
sanitizer() {  # TOOL NAME COMMAND...
  local tool=$1 name=$2
  shift 2
  {
    step "$tool-$name" 440 compute-sanitizer --tool "$tool" --error-exitcode 99 "$@"
    exit $failed
  } &
}

# All at once: they load the processor more than the GPU.
sanitize() {
  local tool ops job
  for tool in memcheck racecheck initcheck; do
    for ops in index_scores,select_blocks,index_select sparse_attention dense_attention \
      msa_layer,merge,block_lists,append_paged,block_mass \
      sparse_attention_backward dense_attention_backward index_lse,kl_backward,kl_loss; do
      sanitizer $tool "${ops%%,*}" "$BIN/msa" check --backend cuda --suite smoke --op $ops --quiet
    done
  done
  sanitizer racecheck kv_outer "$BIN/msa_gpu" --gtest_filter='*ThreeRuns*cuda_kv_outer'
  sanitizer memcheck bad_metadata "$BIN/msa_gpu" --gtest_filter='*BadMetadata*'
  for job in $(jobs -p); do wait "$job" || failed=1; done
}

# One line per setting: a name, seconds, a backend, and what else `msa bench` is given.
bench() {
  local name limit backend flags
  while read -r name limit backend flags; do
    # shellcheck disable=SC2086  # flags are words
    step "bench_$name" "$limit" "$BIN/msa" bench --backend "$backend" --shape m3 --quiet $flags \
      --json "$OUT/bench_$name.json"
  done <<'SETTINGS'
prefill         60 cuda          --context 8192,32768 --selection random --repeats 20
prefill_128k    60 cuda          --context 131072 --selection random --repeats 5
kv_outer        60 cuda-kv-outer --context 8192,32768 --op sparse_attention --selection random --repeats 10
decode          40 cuda          --context 32768,131072 --new-tokens 1 --repeats 20
decode_1m       40 cuda          --context 524288,1048576 --new-tokens 1 --repeats 20
decode_4x1m     40 cuda          --context 1048576 --new-tokens 1 --batch 4 --op dense_attention,msa --repeats 20
decode_8        40 cuda          --context 131072 --new-tokens 1 --batch 8 --op index_select,sparse_attention,msa --repeats 20
decode_8x4      40 cuda          --context 131072 --new-tokens 4 --batch 8 --op index_select,sparse_attention,msa --repeats 20
decode_32       40 cuda          --context 32768,131072 --new-tokens 1 --batch 32 --op index_select,sparse_attention,msa --repeats 20
extend          40 cuda          --context 131072 --new-tokens 128 --op index_select,sparse_attention,msa --selection random --repeats 20
extend_1k       60 cuda          --context 524288,1048576 --new-tokens 1024 --op index_select,sparse_attention,msa --selection random --repeats 10
extend_16k      60 cuda          --context 1048576 --new-tokens 16384 --op index_select,sparse_attention,msa --selection random --repeats 5
select          40 cuda          --context 131072,1048576 --new-tokens 16384 --op select_blocks --selection random
parts           40 cuda          --context 8192 --op index_scores,select_blocks,merge,block_lists,append_paged,block_mass --selection random
SETTINGS
}

# The same on the block lists of a trained model, which `msa eval` leaves: all tokens of a context, or
# the last ones. Dense attention over 1M takes half a minute: once is enough.
traces() {
  local context name limit flags trace last=
  while read -r context name limit flags; do
    if [[ $context != "$last" ]]; then
      [[ ! $last ]] || rm -f "$trace"
      last=$context trace=$OUT/trace_$context
      step "eval_$context" 60 "$BIN/msa" eval --backend cuda --model models/code-11m --quiet \
        --text models/code-11m/sample.txt --context "$context" --attention msa --trace "$trace" \
        --json "$OUT/eval_$context.json"
    fi
    # shellcheck disable=SC2086  # flags are words
    step "bench_real_$name" "$limit" "$BIN/msa" bench --backend cuda --shape m3 --quiet \
      --context "$context" --selection "$trace" $flags --json "$OUT/bench_real_$name.json"
  done <<'SETTINGS'
8192    8k          60  --repeats 20
32768   32k         60  --repeats 20
32768   train_32k   60  --op sparse_attention,sparse_attention_backward,index_lse,kl_backward,kl_loss --repeats 10
131072  128k        60  --repeats 5
131072  train_128k  90  --op sparse_attention,sparse_attention_backward,index_lse,kl_backward --repeats 5
131072  128_of_128k 60  --new-tokens 128 --op index_select,sparse_attention,msa --repeats 20
524288  1k_of_512k  60  --new-tokens 1024 --op index_select,sparse_attention,msa --repeats 10
1048576 1k_of_1m    60  --new-tokens 1024 --op index_select,sparse_attention,msa --repeats 10
1048576 16k_of_1m   60  --new-tokens 16384 --op index_select,sparse_attention,msa --repeats 3
1048576 1m          260 --op dense_attention,msa --repeats 1
SETTINGS
  rm -f "$trace"
}

# A command of Python with our package.
in_python() {  # NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" env PYTHONPATH="$BIN/python${PYTHONPATH:+:$PYTHONPATH}" \
    MSA_TEST_DEVICE=cuda MSA_CLI="$BIN/msa" "${PYTHON:-python3}" "$@"
}

pytest() {  # SECONDS FILE...
  local limit=$1 file
  shift
  for file in "$@"; do
    in_python "python_$(basename "$file" .py)" "$limit" -m pytest -q -rs -p no:cacheprovider "$file"
  done
}

# The tests of the Python package whose tensors follow MSA_TEST_DEVICE, a file at a time.
python() {
  # shellcheck disable=SC2046  # names without blanks
  pytest 300 $(grep -lE 'msa_arrays|msa_serving' tests/python/test_*.py)
}

# Those of training, and a layer's training step beside cuDNN's and FlashAttention's.
gradients() {
  pytest 200 tests/python/test_{gradients,training_ops,torch_ops,train}.py
  local tokens
  for tokens in 8192 32768 131072; do
    in_python "training_step_$tokens" 60 bench/training_step.py --device cuda --tokens $tokens \
      --rounds 10 --json "$OUT/training_step_$tokens.json"
  done
}

# Both experiments stop by themselves and leave their JSON on the way; draw it with facts.py --plot.
facts() {
  in_python facts $LIMIT experiments/facts.py --size "${SIZE:-gpu}" --device cuda \
    --minutes "${MINUTES:-7}" --output "$OUT" ${ARMS:+--arms "$ARMS"}
}

code_11m() {
  in_python code_11m $LIMIT experiments/code_11m.py --size gpu --device cuda \
    --minutes "${MINUTES:-7}" --output "$OUT"
}

# Ours beside cuDNN, FlashAttention and the engines, interleaved; on random and on trained lists.
# With the engines, whose Triton tries its variants first, it takes less than five minutes.
compare() {
  local name limit flags trace=$OUT/trace_compare
  step eval_compare 60 "$BIN/msa" eval --backend cuda --model models/code-11m --quiet \
    --text models/code-11m/sample.txt --context 32768 --attention msa --trace "$trace"
  while read -r name limit flags; do
    # shellcheck disable=SC2086  # flags are words
    in_python "compare_$name" "$limit" -m msa_cpp.bench --device cuda ${flags//TRACE/$trace} \
      --json "$OUT/compare_$name.json" --tsv "$OUT/compare_$name.tsv"
  done <<'SETTINGS'
prefill       150 --context 8192,32768 --selection TRACE
prefill_128k  150 --context 131072 --selection random --repeats 3
extend        120 --context 131072 --new-tokens 1024
decode        120 --context 32768,131072 --new-tokens 1
decode_batch  90  --context 32768 --new-tokens 1 --batch 32
verify        90  --context 131072 --new-tokens 4 --batch 8
SETTINGS
  rm -f "$trace"
}

stages='build check sanitize bench traces python compare gradients facts code_11m'
chosen=${1:-none}
case $chosen in
  all) chosen=$stages ;;
  train) chosen='gradients facts code_11m' ;;
esac
if [[ " $stages " != *" ${chosen%% *} "* ]]; then
  echo "usage: dev/gpu.sh ${stages// /|}|train|all" >&2
  exit 2
fi
for stage in $chosen; do "$stage"; done
exit $failed
